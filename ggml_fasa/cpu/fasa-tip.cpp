// Stage tip on the CPU: token importance prediction, paper section 4.1, for one KV group and one query row.

#include "fasa-simd.h"
#include "fasa-stages.h"

#include <algorithm>

namespace fasa {

static constexpr int64_t  TILE     = GGML_FASA_TILE;
static constexpr uint16_t F16_NINF = 0xFC00;
static constexpr uint16_t F16_NEG0 = 0x8000;
static constexpr uint32_t F32_NINF = 0xFF800000;
static constexpr uint32_t F32_NEG0 = 0x80000000;

static uint32_t bits32(const void * data, int64_t t) {
    uint32_t u;
    memcpy(&u, (const float *) data + t, sizeof(u));
    return u;
}

bool mask_row::hidden(int64_t t) const {
    return f16 ? ((const uint16_t *) data)[t] == F16_NINF : bits32(data, t) == F32_NINF;
}

bool mask_row::forced(int64_t t) const {
    return f16 ? ((const uint16_t *) data)[t] == F16_NEG0 : bits32(data, t) == F32_NEG0;
}

mask_row::tile_kind mask_row::kind(int64_t t0, int64_t n) const {
    bool plain = true;
    bool hide  = true;
    if (f16) {
        const uint16_t * m = (const uint16_t *) data + t0;
        for (int64_t i = 0; i < n; ++i) {
            plain &= m[i] == 0;
            hide  &= m[i] == F16_NINF;
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t m = bits32(data, t0 + i);
            plain &= m == 0;
            hide  &= m == F32_NINF;
        }
    }
    return plain ? ALL_PLAIN : hide ? ALL_HIDDEN : MIXED;
}

// Scores one tile for NH heads: out[h][0..TILE) = sum_j q[h][j] * tile[j][0..TILE).
template <int NH>
static void tip_tile(const float * q, int64_t n_dim, const ggml_fp16_t * tile, float * out, int64_t stride) {
    constexpr int NV = 2;                       // vectors of cells per pass: NH * NV accumulators stay in registers
    constexpr int CELLS = NV*W;
    static_assert(TILE % CELLS == 0, "a tile is a whole number of passes");

    for (int64_t c = 0; c < TILE; c += CELLS) {
        vec acc[NH][NV];
        for (int h = 0; h < NH; ++h) {
            for (int i = 0; i < NV; ++i) {
                acc[h][i] = zero();
            }
        }
        for (int64_t j = 0; j < n_dim; ++j) {
            vec k[NV];
            for (int i = 0; i < NV; ++i) {
                k[i] = load(tile + j*TILE + c + i*W);
            }
            for (int h = 0; h < NH; ++h) {
                const vec qj = splat(q[h*n_dim + j]);
                for (int i = 0; i < NV; ++i) {
                    acc[h][i] = fma(qj, k[i], acc[h][i]);
                }
            }
        }
        for (int h = 0; h < NH; ++h) {
            for (int i = 0; i < NV; ++i) {
                store(out + h*stride + c + i*W, acc[h][i]);
            }
        }
    }
}

static void tip_tile_heads(
        const float * q, int64_t n_group, int64_t n_dim, const ggml_fp16_t * tile, float * out, int64_t stride) {
    int64_t h = 0;
    for (; h + 4 <= n_group; h += 4) {
        tip_tile<4>(q + h*n_dim, n_dim, tile, out + h*stride, stride);
    }
    switch (n_group - h) {
        case 3: tip_tile<3>(q + h*n_dim, n_dim, tile, out + h*stride, stride); break;
        case 2: tip_tile<2>(q + h*n_dim, n_dim, tile, out + h*stride, stride); break;
        case 1: tip_tile<1>(q + h*n_dim, n_dim, tile, out + h*stride, stride); break;
        default: break;
    }
}

void tip_chunk(
        const float * q, int64_t n_group, int64_t n_dim, const ggml_fp16_t * index, mask_row mask, int64_t n_kv,
        int64_t chunk, float * weight, int64_t stride, float * peak, float * total) {
    const int64_t t0 = chunk*TIP_CHUNK;
    const int64_t t1 = std::min(n_kv, t0 + TIP_CHUNK);
    const int64_t te = t0 + GGML_PAD(t1 - t0, TILE);

    for (int64_t t = t0; t < t1; t += TILE) {
        const int64_t n = std::min(TILE, t1 - t);

        const mask_row::tile_kind kind = mask.kind(t, n);
        if (kind != mask_row::ALL_HIDDEN) {
            tip_tile_heads(q, n_group, n_dim, index + t*n_dim, weight + t, stride);
        }
        if (kind != mask_row::ALL_PLAIN || n < TILE) {
            // hidden cells are overwritten, never added to: a stale index row may hold NaN
            for (int64_t i = 0; i < TILE; ++i) {
                if (i >= n || mask.hidden(t + i)) {
                    for (int64_t h = 0; h < n_group; ++h) {
                        weight[h*stride + t + i] = -INFINITY;
                    }
                }
            }
        }
    }

    for (int64_t h = 0; h < n_group; ++h) {
        float * w = weight + h*stride;

        vec vmax = splat(-INFINITY);
        for (int64_t t = t0; t < te; t += W) {
            vmax = max(vmax, load(w + t));
        }
        const float m = hmax(vmax);

        // weights of equal cells in different chunks must differ by a power of two only, else rounding breaks their tie
        vec sum = zero();
        vec n   = splat(m);
        if (m > -INFINITY) {
            n = exp2_round(n);
            for (int64_t t = t0; t < te; t += W) {
                const vec e = exp_scaled(load(w + t), splat(m), n);
                sum = add(sum, e);
                store(w + t, e);
            }
        } else {
            std::fill(w + t0, w + te, 0.0f);
        }
        peak [chunk*n_group + h] = hmax(n);
        total[chunk*n_group + h] = hsum(sum);
    }
}

void tip_factors(int64_t n_group, int64_t n_chunk, float * peak, const float * total) {
    for (int64_t h = 0; h < n_group; ++h) {
        float top = -INFINITY;
        for (int64_t c = 0; c < n_chunk; ++c) {
            top = std::max(top, peak[c*n_group + h]);
        }
        float sum = 0.0f;
        for (int64_t c = 0; c < n_chunk; ++c) {
            float & p = peak[c*n_group + h];
            p    = p > -INFINITY ? ldexpf(1.0f, (int) (p - top)) : 0.0f;
            sum += p*total[c*n_group + h];
        }
        for (int64_t c = 0; c < n_chunk; ++c) {
            float & p = peak[c*n_group + h];
            p = sum > 0.0f ? p/sum : 0.0f;
        }
    }
}

void tip_combine(
        const float * weight, int64_t stride, int64_t n_group, const float * factor, mask_row mask, int64_t n_kv,
        float * scores) {
    for (int64_t t = 0; t < n_kv; t += TILE) {
        const int64_t n = std::min(TILE, n_kv - t);
        const float * f = factor + (t/TIP_CHUNK)*n_group;

        float tile[TILE];
        for (int64_t i = 0; i < TILE; i += W) {
            vec s = zero();
            for (int64_t h = 0; h < n_group; ++h) {
                s = fma(splat(f[h]), load(weight + h*stride + t + i), s);
            }
            store(tile + i, s);
        }
        if (mask.kind(t, n) != mask_row::ALL_PLAIN) {
            for (int64_t i = 0; i < n; ++i) {
                if (mask.hidden(t + i)) {
                    tile[i] = -INFINITY;
                } else if (mask.forced(t + i)) {
                    tile[i] = INFINITY;
                }
            }
        }
        memcpy(scores + t, tile, n*sizeof(float));
    }
}

// The oracle of the fast path: one cell and one head at a time.
static void tip_ref(
        const float * q, int64_t n_group, int64_t n_dim, const ggml_fp16_t * index, mask_row mask,
        int64_t n_kv, float * weight, int64_t stride, float * scores) {
    for (int64_t t = 0; t < n_kv; ++t) {
        scores[t] = mask.hidden(t) ? -INFINITY : mask.forced(t) ? INFINITY : 0.0f;
    }

    for (int64_t h = 0; h < n_group; ++h) {
        float * w = weight + h*stride;

        float peak = -INFINITY;
        for (int64_t t = 0; t < n_kv; ++t) {
            if (mask.hidden(t)) {
                continue;
            }
            double s = 0.0;
            for (int64_t j = 0; j < n_dim; ++j) {
                s += (double) q[h*n_dim + j]*ggml_fp16_to_fp32(index[((t/TILE)*n_dim + j)*TILE + t % TILE]);
            }
            w[t] = (float) s;
            peak = std::max(peak, w[t]);
        }

        double total = 0.0;
        for (int64_t t = 0; t < n_kv; ++t) {
            if (!mask.hidden(t)) {
                w[t]   = expf(w[t] - peak);
                total += w[t];
            }
        }
        for (int64_t t = 0; t < n_kv; ++t) {
            if (!mask.hidden(t)) {
                scores[t] += (float) (w[t]/total);
            }
        }
    }
}

} // namespace fasa

size_t ggml_fasa_cpu_tip_scratch(int64_t n_group, int64_t n_kv) {
    return n_group*(GGML_PAD(n_kv, GGML_FASA_TILE) + 2*fasa::n_tip_chunk(n_kv));
}

void ggml_fasa_cpu_tip(
        const float * q, int64_t n_group, int64_t n_dim, const ggml_fp16_t * index,
        const void * mask, bool mask_f16, int64_t n_kv, float * scratch, float * scores, bool use_ref) {
    const fasa::mask_row row     = { mask, mask_f16 };
    const int64_t        stride  = GGML_PAD(n_kv, GGML_FASA_TILE);
    const int64_t        n_chunk = fasa::n_tip_chunk(n_kv);

    if (use_ref) {
        fasa::tip_ref(q, n_group, n_dim, index, row, n_kv, scratch, stride, scores);
        return;
    }

    float * peak  = scratch + n_group*stride;
    float * total = peak + n_group*n_chunk;
    for (int64_t c = 0; c < n_chunk; ++c) {
        fasa::tip_chunk(q, n_group, n_dim, index, row, n_kv, c, scratch, stride, peak, total);
    }
    fasa::tip_factors(n_group, n_chunk, peak, total);
    fasa::tip_combine(scratch, stride, n_group, peak, row, n_kv, scores);
}
