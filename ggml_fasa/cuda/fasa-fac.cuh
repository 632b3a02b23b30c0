// Stage fac on CUDA: exact attention of one KV group over the selected cells, paper section 4.2.
//
// The blocks of a unit each attend to the cells selected out of their own, then each merges a piece of the output, in a fixed
// order, so that results repeat bit by bit.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-select.cuh"
#include "fasa-stages.cuh"
#include "fasa-tip.cuh"

namespace fasa {

// How rows are read: of any type; as F16; or as F16 by way of the row cache.
enum row_source { ROWS_ANY, ROWS_F16, ROWS_CACHED };

// Values 8 * l .. + 7 of a row, as they come from memory.
template <bool F16>
struct fac_row {
    uint4  bits;
    float4 values[F16 ? 1 : 2];

    __device__ __forceinline__ void load(const char * row, int l, int d, ggml_type type) {
        const bool in = 8*l < d;
        if constexpr (F16) {
            bits = in ? *(const uint4 *) (row + 16*l) : make_uint4(0, 0, 0, 0);
        } else {
            values[0] = in ? load4_any(row, 8*l,     type) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            values[1] = in ? load4_any(row, 8*l + 4, type) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    __device__ __forceinline__ void get(float * x) const {
        if constexpr (F16) {
            half4(make_uint2(bits.x, bits.y), x);
            half4(make_uint2(bits.z, bits.w), x + 4);
        } else {
            x[0] = values[0].x; x[1] = values[0].y; x[2] = values[0].z; x[3] = values[0].w;
            x[4] = values[1].x; x[5] = values[1].y; x[6] = values[1].z; x[7] = values[1].w;
        }
    }
};

// What a thread holds of the K and V row of a cell. LANES: threads of a row, 8 values each.
template <int LANES, row_source ROWS>
struct fac_cell {
    fac_row<ROWS != ROWS_ANY> k, v;

    // The thread's first cell.
    static __device__ __forceinline__ int first() {
        return threadIdx.x/LANES;
    }

    // Asks for cell c of the list; zeros if it has not so many. cache: of ROWS_CACHED.
    __device__ __forceinline__ void load(
            const attn_args & a, const unit & u, const row_cache * cache, const int32_t * list, int n, int c) {
        const int l = threadIdx.x%LANES;
        const size_t cell = c < n ? list[c] : 0;
        const char * k_row = a.k + u.s*a.k_nb3 + u.g*a.k_nb2 + cell*a.k_nb1;
        const char * v_row = a.v + u.s*a.v_nb3 + u.g*a.v_nb2 + cell*a.v_nb1;
        if constexpr (ROWS == ROWS_CACHED) {
            if (c < n) {
                cache->redirect(c, a.d_k, k_row, v_row);
            }
        }
        k.load(k_row, l, c < n ? a.d_k : 0, a.k_type);
        v.load(v_row, l, c < n ? a.d_v : 0, a.v_type);
    }
};

// Threads for a row.
static int fac_lanes(const attn_args & a) {
    const int d = std::max(a.d_k, a.d_v);
    return d <= 64 ? 8 : d <= 128 ? 16 : 32;
}

// Shared memory of fac_heads and of fac_merge, in floats.
static int fac_shared(const attn_args & a) {
    return std::max(FAC_WARP*FAC_THREAD + 3*a.n_fac*FAC_WARP, FAC_THREAD + MAX_PART*a.n_group);
}

// Attention of heads [h0, h0 + NH) over cells list[0 .. n). work: of fac_shared.
// To a.part: for each head sum of p * v, then the largest logit in powers of two, then the sum of p.
//
// A warp attends to its share of the cells alone, and then they sum up.
template <int NH, int LANES, row_source ROWS>
static __device__ __forceinline__ void fac_heads(
        const attn_args & a, const unit & u, const float * q, row_cache & cache, int h0, const int32_t * list, int n,
        float * work) {
    constexpr int STEP   = FAC_THREAD/LANES;                        // cells at once
    constexpr int N_SUM  = NH*LANES > 64 ? 64/LANES : NH;           // heads that are summed up at once: a thread for each value
    static_assert(NH%N_SUM == 0 && N_SUM*LANES*8 <= FAC_THREAD);

    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    const int l    = threadIdx.x%LANES;

    float * sums = work;                        // [FAC_WARP][N_SUM][d_v]
    float * top  = work + FAC_WARP*FAC_THREAD;  // [NH][FAC_WARP] largest logit of a warp
    float * sum  = top  + NH*FAC_WARP;          // [NH][FAC_WARP]
    float * part = sum  + NH*FAC_WARP;          // [NH][FAC_WARP] what a warp weighs

    fac_cell<LANES, ROWS> held;
    held.load(a, u, &cache, list, n, held.first());
    if constexpr (ROWS == ROWS_CACHED) {
        if (h0 == 0) {
            cache.place(list, n);
        }
    }
    float acc[NH][8] = {};
    float z[NH]      = {};
    float m[NH];
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        m[h] = SCORE_NONE;
    }
#pragma unroll 1
    for (int base = warp*WARP_SIZE/LANES; base < n; base += STEP) {
        const int  c  = base + lane/LANES;
        const bool in = c < n;
        float x[8];
        float y[8];
        held.k.get(x);
        held.v.get(y);
        if constexpr (ROWS == ROWS_CACHED) {
            if (h0 == 0 && in) {
                cache.keep(c, l, a.d_k, a.d_v, held.k.bits, held.v.bits);
            }
        }
        held.load(a, u, &cache, list, n, c + STEP); // the next cell is on its way while this one is worked on

        float s[NH] = {};
        if (8*l < a.d_k) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                const float4 q0 = *(const float4 *) (q + h*a.d_k + 8*l);
                const float4 q1 = *(const float4 *) (q + h*a.d_k + 8*l + 4);
                s[h] = x[0]*q0.x + x[1]*q0.y + x[2]*q0.z + x[3]*q0.w + x[4]*q1.x + x[5]*q1.y + x[6]*q1.z + x[7]*q1.w;
            }
        }
#pragma unroll
        for (int o = LANES/2; o > 0; o /= 2) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                s[h] += __shfl_xor_sync(0xFFFFFFFFu, s[h], o);
            }
        }
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            float logit = s[h]*a.scale;
            if (a.softcap != 0.0f) {
                logit = a.softcap*tanhf(logit/a.softcap);
            }
            logit = in ? logit*LOG2E : SCORE_NONE;
            float now = fmaxf(m[h], logit);
#pragma unroll
            for (int o = LANES; o < WARP_SIZE; o *= 2) {
                now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, o));
            }
            const float f = exp2f(m[h] - now);
            const float p = in ? exp2f(logit - now) : 0.0f;
            m[h] = now;
            z[h] = z[h]*f + p;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                acc[h][i] = acc[h][i]*f + p*y[i];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < NH; ++h) {
#pragma unroll
        for (int o = LANES; o < WARP_SIZE; o *= 2) {
            z[h] += __shfl_xor_sync(0xFFFFFFFFu, z[h], o);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                acc[h][i] += __shfl_xor_sync(0xFFFFFFFFu, acc[h][i], o);
            }
        }
    }

    const int n_head = min(NH, a.n_group - h0);
    const int n_warp = min((n*LANES + WARP_SIZE - 1)/WARP_SIZE, FAC_WARP); // that had cells
    float * out = a.part + (((size_t) u.at*a.n_part + u.rank)*a.n_group + h0)*(a.d_v + 2);
#pragma unroll
    for (int first = 0; first < NH; first += N_SUM) {
        if (first > 0 || h0 > 0) {
            __syncthreads(); // work may still be read
        }
#pragma unroll
        for (int h = 0; h < N_SUM; ++h) {
            if (lane/LANES == h%(WARP_SIZE/LANES) && 8*l < a.d_v) { // all groups of a warp have it
                const float * y = acc[first + h];
                float4 * to = (float4 *) (sums + (warp*N_SUM + h)*a.d_v + 8*l);
                to[0] = make_float4(y[0], y[1], y[2], y[3]);
                to[1] = make_float4(y[4], y[5], y[6], y[7]);
            }
        }
        if (first == 0) {
            if (lane == 0) {
#pragma unroll
                for (int h = 0; h < NH; ++h) {
                    top[h*FAC_WARP + warp] = m[h];
                    sum[h*FAC_WARP + warp] = z[h];
                }
            }
            __syncthreads();
            if (warp < n_head) {
                const float  mine = lane < FAC_WARP ? top[warp*FAC_WARP + lane] : SCORE_NONE;
                const float2 all  = softmax_sum(make_float2(mine, lane < FAC_WARP ? sum[warp*FAC_WARP + lane] : 0.0f));
                if (lane < FAC_WARP) {
                    part[warp*FAC_WARP + lane] = exp2f(mine - all.x);
                }
                if (lane == 0) {
                    __stcg(out + warp*(a.d_v + 2) + a.d_v,     all.x);
                    __stcg(out + warp*(a.d_v + 2) + a.d_v + 1, all.y);
                }
            }
        }
        __syncthreads();
        const int o = threadIdx.x;
        const int h = fastdiv(o, a.div_d_v);
        if (h < N_SUM && first + h < n_head) {
            float y = 0.0f;
#pragma unroll 4
            for (int w = 0; w < n_warp; ++w) {
                y += sums[w*N_SUM*a.d_v + o]*part[(first + h)*FAC_WARP + w];
            }
            __stcg(out + first*(a.d_v + 2) + o + 2*h, y);
        }
    }
}

// This block's piece of the output of a unit, from what fac_heads left in a.part. work: [n_group][MAX_PART] + [FAC_THREAD] floats
// of shared memory.
static __device__ __forceinline__ void fac_merge(const attn_args & a, const unit & u, float * work) {
    const int lane  = threadIdx.x%WARP_SIZE;
    const int n     = a.n_group*a.d_v;
    const int width = FAC_THREAD >> a.part_log2; // outputs of a block at once
    const int b     = threadIdx.x/width;         // a thread for an output and part
    float * share = work;
    float * sums  = work + a.n_group*MAX_PART;

    const float * part = a.part + (size_t) u.at*a.n_part*a.n_group*(a.d_v + 2);
    float       * out  = a.dst + (((int64_t) u.s*a.n_row + u.t)*a.n_head_kv + u.g)*n;

    auto load = [&](int i) {
        const int h = fastdiv(i, a.div_d_v);
        return b < a.n_part && i < n ? __ldcg(part + b*a.n_group*(a.d_v + 2) + i + 2*h) : 0.0f;
    };
    int   i = u.rank*width + threadIdx.x%width;
    float y = load(i);

    // what each part weighs: a warp for a head, a lane for a part
    const int h = threadIdx.x/WARP_SIZE;
    if (h < a.n_group) {
        const float * from = part + (lane*a.n_group + h)*(a.d_v + 2) + a.d_v;
        const float2  mine = lane < a.n_part ? make_float2(__ldcg(from), __ldcg(from + 1)) : make_float2(SCORE_NONE, 0.0f);
        const float2  all  = softmax_sum(mine);
        const float   sink = a.sinks ? a.sinks[u.g*a.n_group + h]*LOG2E : SCORE_NONE;
        const float   m    = fmaxf(all.x, sink);
        const float   z    = all.y*exp2f(all.x - m) + (a.sinks ? exp2f(sink - m) : 0.0f);
        if (lane < MAX_PART) {
            share[h*MAX_PART + lane] = mine.y > 0.0f ? exp2f(mine.x - m)/z : 0.0f;
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int base = u.rank*width; base < n; base += a.n_part*width) {
        const int h_out = min((int) fastdiv(i, a.div_d_v), a.n_group - 1);
        sums[threadIdx.x] = b < a.n_part ? y*share[h_out*MAX_PART + b] : 0.0f;
        __syncthreads();
        if (threadIdx.x < width && i < n) {
            float sum = 0.0f;
#pragma unroll 4
            for (int at = threadIdx.x; at < FAC_THREAD; at += width) {
                sum += sums[at];
            }
            out[i] = sum;
        }
        i += a.n_part*width;
        y = load(i);
        __syncthreads();
    }
}

} // namespace fasa
