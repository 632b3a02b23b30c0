// Stage fac on the CPU: exact attention of one KV group over the selected cells, paper section 4.2.

#include "fasa-simd.h"
#include "fasa-stages.h"

#include <algorithm>
#include <type_traits>

namespace fasa {

static const ggml_fp16_t * row(const void * base, size_t stride, int64_t cell) {
    return (const ggml_fp16_t *) ((const char *) base + cell*stride);
}

static void prefetch_row(const ggml_fp16_t * row, int64_t d) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < d; i += 64/(int64_t) sizeof(ggml_fp16_t)) {
        __builtin_prefetch(row + i);
    }
#else
    GGML_UNUSED(row);
    GGML_UNUSED(d);
#endif
}

static float apply_softcap(float s, float softcap) {
    return softcap != 0.0f ? softcap*tanhf(s/softcap) : s;
}

// Dot products of one K row with NH queries.
template <int NH>
static void fac_dot(const float * q, int64_t q_stride, const ggml_fp16_t * k, int64_t d, float * out, int64_t out_stride) {
    vec acc[NH];
    for (int h = 0; h < NH; ++h) {
        acc[h] = zero();
    }
    int64_t i = 0;
    for (; i + W <= d; i += W) {
        const vec ki = load(k + i);
        for (int h = 0; h < NH; ++h) {
            acc[h] = fma(ki, load(q + h*q_stride + i), acc[h]);
        }
    }
    for (int h = 0; h < NH; ++h) {
        float s = hsum(acc[h]);
        for (int64_t r = i; r < d; ++r) {
            s += ggml_fp16_to_fp32(k[r])*q[h*q_stride + r];
        }
        out[h*out_stride] = s;
    }
}

// acc[h][i0 .. i0 + NV*W) = sum over cells of p[h][cell] * v[cell], for NH heads.
template <int NH, int NV>
static void fac_values(
        const float * p, int64_t p_stride, const void * v, size_t v_stride, const int32_t * cells, int64_t n_cells,
        int64_t i0, float * out, int64_t out_stride) {
    vec acc[NH][NV];
    for (int h = 0; h < NH; ++h) {
        for (int i = 0; i < NV; ++i) {
            acc[h][i] = zero();
        }
    }
    for (int64_t c = 0; c < n_cells; ++c) {
        const ggml_fp16_t * vc = row(v, v_stride, cells[c]) + i0;
        vec x[NV];
        for (int i = 0; i < NV; ++i) {
            x[i] = load(vc + i*W);
        }
        for (int h = 0; h < NH; ++h) {
            const vec ph = splat(p[h*p_stride + c]);
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

template <int NH>
static void fac_values_row(
        const float * p, int64_t p_stride, const void * v, size_t v_stride, const int32_t * cells, int64_t n_cells,
        int64_t d, float * out, int64_t out_stride) {
    int64_t i = 0;
    for (; i + 4*W <= d; i += 4*W) {
        fac_values<NH, 4>(p, p_stride, v, v_stride, cells, n_cells, i, out, out_stride);
    }
    for (; i + W <= d; i += W) {
        fac_values<NH, 1>(p, p_stride, v, v_stride, cells, n_cells, i, out, out_stride);
    }
    for (; i < d; ++i) {
        for (int h = 0; h < NH; ++h) {
            float s = 0.0f;
            for (int64_t c = 0; c < n_cells; ++c) {
                s += p[h*p_stride + c]*ggml_fp16_to_fp32(row(v, v_stride, cells[c])[i]);
            }
            out[h*out_stride + i] = s;
        }
    }
}

// Calls fn(integral_constant NH, first head) over blocks of at most 4 heads.
template <typename F>
static void for_head_blocks(int64_t n_group, F && fn) {
    int64_t h = 0;
    for (; h + 4 <= n_group; h += 4) {
        fn(std::integral_constant<int, 4>(), h);
    }
    switch (n_group - h) {
        case 3: fn(std::integral_constant<int, 3>(), h); break;
        case 2: fn(std::integral_constant<int, 2>(), h); break;
        case 1: fn(std::integral_constant<int, 1>(), h); break;
        default: break;
    }
}

void fac_chunk(
        const float * q, int64_t n_group, int64_t q_stride, const void * k, size_t k_stride, const void * v, size_t v_stride,
        int64_t d_k, int64_t d_v, const int32_t * cells, int64_t n_cells, float scale, float softcap,
        int64_t chunk, float * logits, float * part) {
    constexpr int64_t AHEAD = 8; // rows are scattered: ask for the next few before they are needed

    const int64_t n = std::min(FAC_CHUNK, n_cells - chunk*FAC_CHUNK);
    cells += chunk*FAC_CHUNK;
    part  += chunk*n_group*(d_v + 2);

    for (int64_t c = 0; c < n; ++c) {
        if (c + AHEAD < n) {
            prefetch_row(row(k, k_stride, cells[c + AHEAD]), d_k);
            prefetch_row(row(v, v_stride, cells[c + AHEAD]), d_v);
        }
        const ggml_fp16_t * kc = row(k, k_stride, cells[c]);
        for_head_blocks(n_group, [&](auto nh, int64_t h) {
            fac_dot<decltype(nh)::value>(q + h*q_stride, q_stride, kc, d_k, logits + h*FAC_CHUNK + c, FAC_CHUNK);
        });
    }

    for (int64_t h = 0; h < n_group; ++h) {
        float * p = logits + h*FAC_CHUNK;

        float m = -INFINITY;
        for (int64_t c = 0; c < n; ++c) {
            p[c] = apply_softcap(p[c]*scale, softcap);
            m    = std::max(m, p[c]);
        }
        std::fill(p + n, p + FAC_CHUNK, -INFINITY);

        vec sum = zero();
        for (int64_t c = 0; c < FAC_CHUNK; c += W) {
            const vec e = exp_neg(sub(load(p + c), splat(m)));
            store(p + c, e);
            sum = add(sum, e);
        }
        part[h*(d_v + 2) + d_v + 0] = m;
        part[h*(d_v + 2) + d_v + 1] = hsum(sum);
    }

    for_head_blocks(n_group, [&](auto nh, int64_t h) {
        fac_values_row<decltype(nh)::value>(
                logits + h*FAC_CHUNK, FAC_CHUNK, v, v_stride, cells, n, d_v, part + h*(d_v + 2), d_v + 2);
    });
}

void fac_merge(const float * part, int64_t n_group, int64_t d_v, int64_t n_chunk, int64_t head, const float * sink, float * out) {
    auto chunk_part = [&](int64_t c) { return part + (c*n_group + head)*(d_v + 2); };

    float top = sink ? *sink : -INFINITY;
    for (int64_t c = 0; c < n_chunk; ++c) {
        top = std::max(top, chunk_part(c)[d_v]);
    }
    float sum = sink ? expf(*sink - top) : 0.0f;
    for (int64_t c = 0; c < n_chunk; ++c) {
        sum += expf(chunk_part(c)[d_v] - top)*chunk_part(c)[d_v + 1];
    }

    std::fill(out, out + d_v, 0.0f);
    for (int64_t c = 0; c < n_chunk; ++c) {
        const float * p = chunk_part(c);
        const float   f = expf(p[d_v] - top)/sum;
        for (int64_t i = 0; i < d_v; ++i) {
            out[i] += f*p[i];
        }
    }
}

// The oracle of the fast path: one head at a time, in double.
static void fac_ref(
        const float * q, int64_t n_group, int64_t q_stride, const void * k, size_t k_stride, const void * v, size_t v_stride,
        int64_t d_k, int64_t d_v, const int32_t * cells, int64_t n_cells, float scale, float softcap,
        const float * sinks, float * logits, float * out, int64_t out_stride) {
    for (int64_t h = 0; h < n_group; ++h) {
        float m = sinks ? sinks[h] : -INFINITY;
        for (int64_t c = 0; c < n_cells; ++c) {
            const ggml_fp16_t * kc = row(k, k_stride, cells[c]);
            double s = 0.0;
            for (int64_t i = 0; i < d_k; ++i) {
                s += (double) q[h*q_stride + i]*ggml_fp16_to_fp32(kc[i]);
            }
            logits[c] = apply_softcap((float) s*scale, softcap);
            m = std::max(m, logits[c]);
        }

        double total = sinks ? exp((double) sinks[h] - m) : 0.0;
        for (int64_t c = 0; c < n_cells; ++c) {
            total += exp((double) logits[c] - m);
        }
        for (int64_t i = 0; i < d_v; ++i) {
            double s = 0.0;
            for (int64_t c = 0; c < n_cells; ++c) {
                s += exp((double) logits[c] - m)*ggml_fp16_to_fp32(row(v, v_stride, cells[c])[i]);
            }
            out[h*out_stride + i] = n_cells > 0 ? (float) (s/total) : 0.0f;
        }
    }
}

} // namespace fasa

size_t ggml_fasa_cpu_fac_scratch(int64_t n_group, int64_t n_cells, int64_t d_v) {
    return n_group*(std::max(n_cells, fasa::FAC_CHUNK) + fasa::n_fac_chunk(n_cells)*(d_v + 2));
}

void ggml_fasa_cpu_fac(
        const float * q, int64_t n_group, int64_t q_stride, const void * k, size_t k_stride, const void * v, size_t v_stride,
        int64_t d_k, int64_t d_v, const int32_t * cells, int64_t n_cells, float scale, float softcap,
        const float * sinks, float * scratch, float * out, int64_t out_stride, bool use_ref) {
    if (use_ref) {
        fasa::fac_ref(q, n_group, q_stride, k, k_stride, v, v_stride, d_k, d_v, cells, n_cells, scale, softcap,
                sinks, scratch, out, out_stride);
        return;
    }

    const int64_t n_chunk = fasa::n_fac_chunk(n_cells);

    float * part = scratch + n_group*fasa::FAC_CHUNK;
    for (int64_t c = 0; c < n_chunk; ++c) {
        fasa::fac_chunk(q, n_group, q_stride, k, k_stride, v, v_stride, d_k, d_v, cells, n_cells, scale, softcap,
                c, scratch, part);
    }
    for (int64_t h = 0; h < n_group; ++h) {
        fasa::fac_merge(part, n_group, d_v, n_chunk, h, sinks ? sinks + h : nullptr, out + h*out_stride);
    }
}
