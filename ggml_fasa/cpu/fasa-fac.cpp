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

// Heads that one pass over K rows serves: 4 sums of each stay in registers.
#if defined(__AVX512F__) || defined(__ARM_NEON)
static constexpr int DOT_HEADS = 4;
#else
static constexpr int DOT_HEADS = 2;
#endif

// Dot products of 4 K rows with NH queries: out[h][0..4).
template <int NH, typename T>
static void fac_dot4(const float * q, int64_t q_stride, const T * const * k, int64_t d, float * out) {
    vec acc[NH][4];
    for (int h = 0; h < NH; ++h) {
        for (int c = 0; c < 4; ++c) {
            acc[h][c] = zero();
        }
    }
    int64_t i = 0;
    for (; i + W <= d; i += W) {
        vec x[4];
        for (int c = 0; c < 4; ++c) {
            x[c] = load(k[c] + i);
        }
        for (int h = 0; h < NH; ++h) {
            const vec qi = load(q + h*q_stride + i);
            for (int c = 0; c < 4; ++c) {
                acc[h][c] = fma(x[c], qi, acc[h][c]);
            }
        }
    }
    for (int h = 0; h < NH; ++h) { // a loop that unrolls, which keeps the sums in registers
        hsum4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], out + h*FAC_CHUNK);
    }
    for (; i < d; ++i) {
        for (int h = 0; h < NH; ++h) {
            for (int c = 0; c < 4; ++c) {
                out[h*FAC_CHUNK + c] += value(k[c][i])*q[h*q_stride + i];
            }
        }
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
        vec x[NV];
        for (int i = 0; i < NV; ++i) {
            x[i] = load(v[c] + i0 + i*W);
        }
        for (int h = 0; h < NH; ++h) {
            const vec ph = splat(p[h*FAC_CHUNK + c]);
            for (int i = 0; i < NV; ++i) {
                acc[h][i] = fma(ph, x[i], acc[h][i]);
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
    int64_t i = 0;
    for (; i + 4*W <= d; i += 4*W) {
        fac_values<NH, 4>(p, v, n_cells, i, out, out_stride);
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

// Calls fn(integral_constant NH, first head) over blocks of at most MAX heads, MAX <= 4.
template <int MAX, typename F>
static void for_head_blocks(int64_t n_group, F && fn) {
    for (int64_t h = 0; h < n_group; h += MAX) {
        switch (std::min<int64_t>(n_group - h, MAX)) {
            case 4: fn(std::integral_constant<int, 4>(), h); break;
            case 3: fn(std::integral_constant<int, 3>(), h); break;
            case 2: fn(std::integral_constant<int, 2>(), h); break;
            case 1: fn(std::integral_constant<int, 1>(), h); break;
        }
    }
}

// The logits q.k of n cells, [n_group][FAC_CHUNK]. k: pointers to n rows, and to any rows up to a multiple of 4. Calls
// ahead(first cell) before each 4.
template <typename T, typename F>
static void fac_logits(const fac_input & in, const T * const * k, int64_t n, float * logits, F && ahead) {
    for (int64_t c = 0; c < n; c += 4) {
        ahead(c);
        for_head_blocks<DOT_HEADS>(in.n_group, [&](auto nh, int64_t h) {
            fac_dot4<decltype(nh)::value>(in.q + h*in.q_stride, in.q_stride, k + c, in.k.d, logits + h*FAC_CHUNK + c);
        });
    }
}

template <typename T>
static void fac_weighted_values(const fac_input & in, const float * p, const T * const * v, int64_t n, float * part) {
    for_head_blocks<4>(in.n_group, [&](auto nh, int64_t h) {
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

// Adds cells to the part that begins empty, FAC_CHUNK at a time.
static void fac_cells(const fac_input & in, const int32_t * cells, int64_t n_cells, float * scratch, float * part) {
    const int64_t d_v    = in.v.d;
    const size_t  k_size = ggml_row_size(in.k.type, in.k.d);
    const size_t  v_size = ggml_row_size(in.v.type, d_v);

    float * logits = scratch;
    float * rows   = scratch + in.n_group*FAC_CHUNK;

    std::fill(part, part + fac_part_size(in), 0.0f);
    for (int64_t h = 0; h < in.n_group; ++h) {
        part[h*(d_v + 2) + d_v] = -INFINITY;
    }

    // memory is slow and rows are scattered: ask for them a while before they are needed, a few at a time
    constexpr int64_t AHEAD = 32; // cells
    auto prefetch = [n_cells, cells](const cache_rows & rows, size_t size, int64_t c, int64_t n) {
        for (int64_t i = c; i < std::min(n_cells, c + n); ++i) {
            fasa::prefetch(rows.row(cells[i]), size);
        }
    };

    prefetch(in.k, k_size, 0, AHEAD);
    for (int64_t c0 = 0; c0 < n_cells; c0 += FAC_CHUNK) {
        const int64_t n = std::min(FAC_CHUNK, n_cells - c0);

        with_rows(in.k, cells + c0, n, rows, [&](auto * k) {
            fac_logits(in, k, n, logits, [&](int64_t c) {
                prefetch(in.k, k_size, c0 + c + AHEAD, 4);
                prefetch(in.v, v_size, c0 + c, 4);
            });
        });
        for (int64_t h = 0; h < in.n_group; ++h) {
            fac_softmax(logits + h*FAC_CHUNK, n, in.scale, in.softcap, part + h*(d_v + 2), d_v);
        }
        with_rows(in.v, cells + c0, n, rows, [&](auto * v) {
            fac_weighted_values(in, logits, v, n, part);
        });
    }
}

void fac_chunk(const fac_input & in, const int32_t * cells, int64_t n_cells, int64_t chunk, float * scratch, float * part) {
    fac_cells(in, cells + chunk*FAC_CHUNK, std::min(FAC_CHUNK, n_cells - chunk*FAC_CHUNK), scratch, part);
}

void dense_chunk(const fac_input & in, mask_row mask, int64_t n_kv, int64_t chunk, float * scratch, float * part) {
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
    fac_cells(in, cells, n, scratch, part);
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
        q, n_group, q_stride, { k, (ggml_type) type_k, k_stride, d_k }, { v, (ggml_type) type_v, v_stride, d_v }, scale, softcap,
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
