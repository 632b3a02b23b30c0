// Stage fac on the CPU: exact attention of one KV group over the selected cells, paper section 4.2.

#include "fasa-simd.h"
#include "fasa-stages.h"

#include <algorithm>
#include <type_traits>

namespace fasa {

inline float value(ggml_fp16_t x) { return ggml_fp16_to_fp32(x); }
inline float value(float x)       { return x; }

static float apply_softcap(float s, float softcap) {
    return softcap != 0.0f ? softcap*tanhf(s/softcap) : s;
}

// Dot products of 4 K rows with NH queries: out[h][0..4).
template <int NH, typename T>
static void fac_dot4(const float * q, int64_t q_stride, const T * const * k, int64_t d, float * out) {
    constexpr int NC = NH*4 < N_REG ? 4 : 2; // rows at a time, whose sums stay in registers

    for (int c0 = 0; c0 < 4; c0 += NC) {
        vec acc[NH][NC];
        for (int h = 0; h < NH; ++h) {
            for (int c = 0; c < NC; ++c) {
                acc[h][c] = zero();
            }
        }
        int64_t i = 0;
        for (; i + W <= d; i += W) {
            vec qi[NH];
            for (int h = 0; h < NH; ++h) {
                qi[h] = in_register(load(q + h*q_stride + i));
            }
            for (int c = 0; c < NC; ++c) {
                const vec x = load(k[c0 + c] + i);
                for (int h = 0; h < NH; ++h) {
                    acc[h][c] = fma(x, qi[h], acc[h][c]);
                }
            }
        }
        for (int h = 0; h < NH; h += 4/NC) { // a loop that unrolls, which keeps the sums in registers
            float * to = out + h*FAC_CHUNK + c0;
            if (NC == 4) {
                hsum4(acc[h][0], acc[h][1], acc[h][2 % NC], acc[h][3 % NC], to);
            } else {
                float sum[4];
                hsum4(acc[h][0], acc[h][1], acc[(h + 1)%NH][0], acc[(h + 1)%NH][1], sum);
                memcpy(to,             sum,     2*sizeof(float));
                memcpy(to + FAC_CHUNK, sum + 2, 2*sizeof(float));
            }
        }
        for (; i < d; ++i) {
            for (int h = 0; h < NH; ++h) {
                for (int c = 0; c < NC; ++c) {
                    out[h*FAC_CHUNK + c0 + c] += value(k[c0 + c][i])*q[h*q_stride + i];
                }
            }
        }
    }
}

// The same for n rows, a multiple of 4, each step elements behind where k says.
template <int NH, typename T>
static void fac_dots(const float * q, int64_t q_stride, const T * const * k, int64_t step, int64_t n, int64_t d, float * out) {
    for (int64_t c = 0; c < n; c += 4) {
        const T * const four[] = { k[c] + step, k[c + 1] + step, k[c + 2] + step, k[c + 3] + step };
        fac_dot4<NH>(q, q_stride, four, d, out + c);
    }
}

// out[h][i0 .. i0 + NV*W) += sum over cells of p[h][cell] * v[cell], for NH heads.
template <int NH, int NV, typename T>
static void fac_values(
        const float * p, const T * const * v, int64_t n_cells, int64_t i0, float * out, int64_t out_stride) {
    vec acc[NH][NV];
    for (int h = 0; h < NH; ++h) {
        for (int i = 0; i < NV; ++i) {
            acc[h][i] = load(out + h*out_stride + i0 + i*W);
        }
    }
    for (int64_t c = 0; c < n_cells; ++c) {
        vec ph[NH];
        for (int h = 0; h < NH; ++h) {
            ph[h] = splat(p[h*FAC_CHUNK + c]);
        }
        for (int i = 0; i < NV; ++i) {
            const vec x = load(v[c] + i0 + i*W);
            for (int h = 0; h < NH; ++h) {
                acc[h][i] = fma(ph[h], x, acc[h][i]);
            }
        }
    }
    for (int h = 0; h < NH; ++h) {
        for (int i = 0; i < NV; ++i) {
            store(out + h*out_stride + i0 + i*W, acc[h][i]);
        }
    }
}

template <int NH, typename T>
static void fac_values_row(
        const float * p, const T * const * v, int64_t n_cells, int64_t d, float * out, int64_t out_stride) {
    constexpr int NV = NH*4 + NH + 1 <= N_REG ? 4 : 2;

    int64_t i = 0;
    for (; i + NV*W <= d; i += NV*W) {
        fac_values<NH, NV>(p, v, n_cells, i, out, out_stride);
    }
    for (; i + W <= d; i += W) {
        fac_values<NH, 1>(p, v, n_cells, i, out, out_stride);
    }
    for (; i < d; ++i) {
        for (int h = 0; h < NH; ++h) {
            for (int64_t c = 0; c < n_cells; ++c) {
                out[h*out_stride + i] += p[h*FAC_CHUNK + c]*value(v[c][i]);
            }
        }
    }
}

// Calls fn(integral_constant NH, first head) over blocks of at most 4 heads.
template <typename F>
static void for_head_blocks(int64_t n_group, F && fn) {
    for (int64_t h = 0; h < n_group; h += 4) {
        switch (std::min<int64_t>(n_group - h, 4)) {
            case 4: fn(std::integral_constant<int, 4>(), h); break;
            case 3: fn(std::integral_constant<int, 3>(), h); break;
            case 2: fn(std::integral_constant<int, 2>(), h); break;
            case 1: fn(std::integral_constant<int, 1>(), h); break;
        }
    }
}

// The logits q.k of n cells, a multiple of 4, as out[h][0..n), of K rows step elements behind where k says.
template <typename T>
static void fac_logits(const fac_input & in, const T * const * k, int64_t step, int64_t n, float * out) {
    for_head_blocks(in.n_group, [&](auto nh, int64_t h) {
        fac_dots<decltype(nh)::value>(in.q + h*in.q_stride, in.q_stride, k, step, n, in.k.d, out + h*FAC_CHUNK);
    });
}

template <typename T>
static void fac_weighted_values(const fac_input & in, const float * p, const T * const * v, int64_t n, float * part) {
    for_head_blocks(in.n_group, [&](auto nh, int64_t h) {
        fac_values_row<decltype(nh)::value>(p + h*FAC_CHUNK, v, n, in.v.d, part + h*(in.v.d + 2), in.v.d + 2);
    });
}

// Calls fn(rows) with an array of pointers to n rows, as they are if they are of F16, else as floats. The last row is there
// again up to a multiple of 4.
template <typename F>
static void with_rows(const cache_rows & rows, const int32_t * cells, int64_t n, float * scratch, F && fn) {
    auto call = [&](auto ** row, auto && at) {
        for (int64_t c = 0; c < n; ++c) {
            row[c] = at(c);
        }
        std::fill(row + n, row + GGML_PAD(n, 4), row[n - 1]);
        fn(row);
    };
    if (rows.type == GGML_TYPE_F16) {
        const ggml_fp16_t * row[FAC_CHUNK];
        call(row, [&](int64_t c) { return (const ggml_fp16_t *) rows.row(cells[c]); });
    } else {
        const float * row[FAC_CHUNK];
        call(row, [&](int64_t c) { return rows.floats(cells[c], scratch + c*rows.d); });
    }
}

// Turns the logits of n cells of one head into weights relative to the largest logit so far, and brings what the part
// holds of earlier cells down to that.
static void fac_softmax(float * p, int64_t n, float scale, float softcap, float * part, int64_t d_v) {
    float & top = part[d_v];
    float & sum = part[d_v + 1];

    const int64_t end = GGML_PAD(n, W);

    vec largest = splat(top);
    std::fill(p + n, p + end, -INFINITY);
    for (int64_t c = 0; c < end; c += W) {
        const vec s = mul(load(p + c), splat(scale));
        largest = max(largest, s);
        store(p + c, s);
    }
    if (softcap != 0.0f) {
        largest = splat(top);
        for (int64_t c = 0; c < n; ++c) {
            p[c]    = softcap*tanhf(p[c]/softcap);
            largest = max(largest, splat(p[c]));
        }
    }
    const float m = hmax(largest);

    vec total = zero();
    for (int64_t c = 0; c < end; c += W) {
        const vec e = exp_neg(sub(load(p + c), splat(m)));
        store(p + c, e);
        total = add(total, e);
    }
    if (m > top) {
        const float f = expf(top - m);
        for (int64_t i = 0; i < d_v; ++i) {
            part[i] *= f;
        }
        sum *= f;
        top  = m;
    }
    sum += hsum(total);
}

// Brings a row into cache by reading it: of prefetches of rows far apart, one behind the other, CPUs drop some.
static void fetch(const cache_rows & rows, int64_t cell) {
    const volatile char * row = (const volatile char *) rows.row(cell);
    (void) row[0];
    (void) row[rows.size > 64 ? 64 : 0]; // most rows are of one or two lines
    for (size_t i = 128; i < rows.size; i += 64) {
        (void) row[i];
    }
}

// Attention of KV groups over the same cells, FAC_CHUNK at a time; the part of each begins empty. DENSE: cells are all those of
// some place in memory, which is asked for a while before it is needed, and a few rows at a time, as memory takes in few lines at
// once: of V while K is at work, of K AHEAD cells before. Else rows lie far apart, and are fetched together.
template <bool DENSE>
static void fac_cells(
        const fac_groups & all, const int32_t * cells, int64_t n_cells, float * scratch, float * part, size_t part_stride) {
    constexpr int64_t AHEAD   = 32;
    constexpr int64_t AT_ONCE = DENSE ? 4 : FAC_CHUNK; // cells

    const fac_input first    = all.first;
    const int64_t   n_groups = DENSE ? all.n_groups : 1;
    const int64_t   n_group  = first.n_group;
    const int64_t   d_v      = first.v.d;

    // rows of F16 are read where they lie, those of all groups before the next cell
    const int64_t n_at_once = first.k.type == GGML_TYPE_F16 ? n_groups : 1;

    float * logits = scratch; // [n_groups][n_group][FAC_CHUNK]
    float * rows   = scratch + n_groups*n_group*FAC_CHUNK;

    for (int64_t g = 0; g < n_groups; ++g) {
        std::fill(part + g*part_stride, part + g*part_stride + fac_part_size(first), 0.0f);
        for (int64_t h = 0; h < n_group; ++h) {
            part[g*part_stride + h*(d_v + 2) + d_v] = -INFINITY;
        }
    }
    for (int64_t c0 = 0; c0 < n_cells; c0 += FAC_CHUNK) {
        const int64_t n = std::min(FAC_CHUNK, n_cells - c0);

        for (int64_t c = c0; c < c0 + n && !DENSE; ++c) {
            fetch(first.k, cells[c]);
            fetch(first.v, cells[c]);
        }
        for (int64_t g0 = 0; g0 < n_groups; g0 += n_at_once) {
            with_rows(all.group(g0).k, cells + c0, n, rows, [&](auto * k) {
                for (int64_t c = 0; c < n; c += AT_ONCE) {
                    const int64_t n_now = std::min(AT_ONCE, n - c);
                    for (int64_t g = g0; g < g0 + n_at_once; ++g) {
                        const fac_input in = all.group(g);
                        for (int64_t i = c0 + c; i < c0 + c + n_now && DENSE; ++i) {
                            prefetch(in.k.row(cells[i] + AHEAD), in.k.size);
                            prefetch(in.v.row(cells[i]),         in.v.size);
                        }
                        const int64_t step = (g - g0)*all.k_step/sizeof(*k[0]);
                        fac_logits(in, k + c, step, GGML_PAD(n_now, 4), logits + g*n_group*FAC_CHUNK + c);
                    }
                }
            });
        }
        for (int64_t g = 0; g < n_groups; ++g) {
            const fac_input in = all.group(g);
            float * p    = logits + g*n_group*FAC_CHUNK;
            float * sums = part   + g*part_stride;
            for (int64_t h = 0; h < n_group; ++h) {
                fac_softmax(p + h*FAC_CHUNK, n, in.scale, in.softcap, sums + h*(d_v + 2), d_v);
            }
            with_rows(in.v, cells + c0, n, rows, [&](auto * v) {
                fac_weighted_values(in, p, v, n, sums);
            });
        }
    }
}

void fac_chunk(const fac_input & in, const int32_t * cells, int64_t n_cells, int64_t chunk, float * scratch, float * part) {
    fac_cells<false>({ in, 1, 0, 0, 0 }, cells + chunk*FAC_CHUNK, std::min(FAC_CHUNK, n_cells - chunk*FAC_CHUNK), scratch, part, 0);
}

void dense_chunk(
        const fac_groups & all, mask_row mask, int64_t n_kv, int64_t chunk, float * scratch, float * part, size_t part_stride) {
    constexpr int64_t TILE = GGML_FASA_TILE;

    const int64_t t1 = std::min(n_kv, (chunk + 1)*DENSE_CHUNK);

    int32_t cells[DENSE_CHUNK];
    int64_t n = 0;
    for (int64_t t = chunk*DENSE_CHUNK; t < t1; t += TILE) {
        const uint32_t hidden = mask.tile(t, std::min(TILE, t1 - t)).hidden;
        for (int64_t i = 0; i < TILE; ++i) {
            cells[n] = (int32_t) (t + i);
            n += ~hidden >> i & 1;
        }
    }
    fac_cells<true>(all, cells, n, scratch, part, part_stride);
}

void fac_merge(const float * part, int64_t n_group, int64_t d_v, int64_t n_chunk, int64_t head, const float * sink, float * out) {
    auto chunk_part = [&](int64_t c) { return part + (c*n_group + head)*(d_v + 2); };

    float top = -INFINITY;
    for (int64_t c = 0; c < n_chunk; ++c) {
        top = std::max(top, chunk_part(c)[d_v]);
    }
    std::fill(out, out + d_v, 0.0f);
    if (top == -INFINITY) {
        return; // no cell at all
    }

    float sum = 0.0f;
    if (sink) {
        top = std::max(top, *sink);
        sum = expf(*sink - top);
    }
    for (int64_t c = 0; c < n_chunk; ++c) {
        sum += expf(chunk_part(c)[d_v] - top)*chunk_part(c)[d_v + 1];
    }
    for (int64_t c = 0; c < n_chunk; ++c) {
        const float * p = chunk_part(c);
        const float   f = expf(p[d_v] - top)/sum;
        for (int64_t i = 0; i < d_v; ++i) {
            out[i] += f*p[i];
        }
    }
}

// The oracle of the fast path: one head and one cell at a time, in double. scratch: [n_cells] logits and a row.
static void fac_ref(
        const fac_input & in, const int32_t * cells, int64_t n_cells, const float * sinks, float * scratch,
        float * out, int64_t out_stride) {
    double * acc    = (double *) scratch;
    float  * row    = (float *) (acc + in.v.d);
    float  * logits = row + std::max(in.k.d, in.v.d);

    auto at = [row](const cache_rows & rows, int64_t cell) {
        if (rows.type == GGML_TYPE_F16) {
            const ggml_fp16_t * half = (const ggml_fp16_t *) rows.row(cell);
            for (int64_t i = 0; i < rows.d; ++i) {
                row[i] = ggml_fp16_to_fp32(half[i]);
            }
            return (const float *) row;
        }
        return rows.floats(cell, row);
    };

    for (int64_t h = 0; h < in.n_group; ++h) {
        const float * q = in.q + h*in.q_stride;

        float m = sinks ? sinks[h] : -INFINITY;
        for (int64_t c = 0; c < n_cells; ++c) {
            const float * k = at(in.k, cells[c]);
            double s = 0.0;
            for (int64_t i = 0; i < in.k.d; ++i) {
                s += (double) q[i]*k[i];
            }
            logits[c] = apply_softcap((float) s*in.scale, in.softcap);
            m = std::max(m, logits[c]);
        }

        double total = sinks ? exp((double) sinks[h] - m) : 0.0;
        std::fill(acc, acc + in.v.d, 0.0);
        for (int64_t c = 0; c < n_cells; ++c) {
            const double  p = exp((double) logits[c] - m);
            const float * v = at(in.v, cells[c]);
            total += p;
            for (int64_t i = 0; i < in.v.d; ++i) {
                acc[i] += p*v[i];
            }
        }
        for (int64_t i = 0; i < in.v.d; ++i) {
            out[h*out_stride + i] = n_cells > 0 ? (float) (acc[i]/total) : 0.0f;
        }
    }
}

} // namespace fasa

size_t ggml_fasa_cpu_fac_scratch(int64_t n_group, int64_t n_cells, int64_t d) {
    const size_t fast = fasa::fac_thread_scratch(n_group, d) + fasa::n_fac_chunk(n_cells)*n_group*(d + 2);
    const size_t ref  = 3*d + n_cells;
    return std::max(fast, ref);
}

void ggml_fasa_cpu_fac(
        const float * q, int64_t n_group, int64_t q_stride, const void * k, int type_k, size_t k_stride,
        const void * v, int type_v, size_t v_stride, int64_t d_k, int64_t d_v, const int32_t * cells, int64_t n_cells,
        float scale, float softcap, const float * sinks, float * scratch, float * out, int64_t out_stride, bool use_ref) {
    const fasa::fac_input in = {
        q, n_group, q_stride,
        { k, (ggml_type) type_k, k_stride, d_k, ggml_row_size((ggml_type) type_k, d_k) },
        { v, (ggml_type) type_v, v_stride, d_v, ggml_row_size((ggml_type) type_v, d_v) }, scale, softcap,
    };
    if (use_ref) {
        fasa::fac_ref(in, cells, n_cells, sinks, scratch, out, out_stride);
        return;
    }

    const int64_t n_chunk = fasa::n_fac_chunk(n_cells);

    float * part = scratch + fasa::fac_thread_scratch(n_group, std::max(d_k, d_v));
    for (int64_t c = 0; c < n_chunk; ++c) {
        fasa::fac_chunk(in, cells, n_cells, c, scratch, part + c*fasa::fac_part_size(in));
    }
    for (int64_t h = 0; h < n_group; ++h) {
        fasa::fac_merge(part, n_group, d_v, n_chunk, h, sinks ? sinks + h : nullptr, out + h*out_stride);
    }
}
