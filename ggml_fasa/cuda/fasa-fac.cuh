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

    // The thread's cell in the first turn; a turn serves FAC_THREAD/LANES.
    static __device__ __forceinline__ int first() {
        return threadIdx.x/LANES;
    }

    // Asks for cell c of the list, if it has so many. cache: of ROWS_CACHED.
    __device__ __forceinline__ void load(
            const attn_args & a, const unit & u, const row_cache * cache, const int32_t * list, int n, int c) {
        if (c < n) {
            const int l = threadIdx.x%LANES;
            const size_t cell = list[c];
            const char * k_row = a.k + u.s*a.k_nb3 + u.g*a.k_nb2 + cell*a.k_nb1;
            const char * v_row = a.v + u.s*a.v_nb3 + u.g*a.v_nb2 + cell*a.v_nb1;
            if constexpr (ROWS == ROWS_CACHED) {
                cache->redirect(c, a.d_k, k_row, v_row);
            }
            k.load(k_row, l, a.d_k, a.k_type);
            v.load(v_row, l, a.d_v, a.v_type);
        }
    }
};

// Cells of a thread in a turn: as registers allow, and so that a turn serves at least as many as a warp has lanes.
static constexpr __host__ __device__ int fac_cells(int lanes, row_source rows) {
    return lanes > (rows == ROWS_ANY ? 16 : 8) ? 2 : 1;
}

// Threads for a row.
static int fac_lanes(const attn_args & a) {
    const int d = std::max(a.d_k, a.d_v);
    return d <= 64 ? 8 : d <= 128 ? 16 : 32;
}

// Shared memory of fac_heads and of fac_merge, in floats.
static int fac_shared(const attn_args & a) {
    const int n_cell = fac_cells(fac_lanes(a), ROWS_F16)*FAC_THREAD/fac_lanes(a); // the most
    return std::max(n_cell*(a.n_fac + a.d_v) + GGML_PAD(a.n_fac, 4), FAC_THREAD + MAX_PART*a.n_group);
}

// Attention of heads [h0, h0 + NH) over cells list[0 .. n). work: of fac_shared.
// To a.part: for each head sum of p * v, then the largest logit in powers of two, then the sum of p.
template <int NH, int LANES, row_source ROWS>
static __device__ __forceinline__ void fac_heads(
        const attn_args & a, const unit & u, const float * q, row_cache & cache, int h0, const int32_t * list, int n,
        float * work) {
    constexpr int STEP   = FAC_THREAD/LANES; // cells between those of a thread
    constexpr int N_HELD = fac_cells(LANES, ROWS); // cells of a thread in a turn
    constexpr int N_CELL = N_HELD*STEP;      // cells of a turn
    constexpr int N_OUT  = (NH*LANES*8 + FAC_THREAD - 1)/FAC_THREAD;

    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    const int l    = threadIdx.x%LANES;

    float * prob    = work;                       // [NH][N_CELL] logits, then weights
    float * rescale = prob + NH*N_CELL;           // [NH] of what was summed up in earlier turns
    float * value   = rescale + GGML_PAD(NH, 4);  // [N_CELL][d_v]

    fac_cell<LANES, ROWS> held[N_HELD];
#pragma unroll
    for (int i = 0; i < N_HELD; ++i) {
        held[i].load(a, u, &cache, list, n, held[i].first() + i*STEP);
    }
    if constexpr (ROWS == ROWS_CACHED) {
        if (h0 == 0) {
            cache.place(list, n);
        }
    }
    float  acc[N_OUT] = {};
    float2 softmax = make_float2(SCORE_NONE, 0.0f); // of head h0 + warp
#pragma unroll 1
    for (int base = 0; base < n; base += N_CELL) {
        if (base > 0 || h0 > 0) {
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < N_HELD; ++i) {
            if (base + i*STEP >= n) {
                break;
            }
            const int at = i*STEP + held[i].first();
            const int c  = base + at;
            float x[8];
            float y[8];
            held[i].k.get(x);
            held[i].v.get(y);
            if constexpr (ROWS == ROWS_CACHED) {
                if (h0 == 0 && c < n) {
                    cache.keep(c, l, a.d_k, a.d_v, held[i].k.bits, held[i].v.bits);
                }
            }
            held[i].load(a, u, &cache, list, n, c + N_CELL); // the next cell is on its way while this one is worked on

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
            if (l == 0) {
#pragma unroll
                for (int h = 0; h < NH; ++h) {
                    prob[h*N_CELL + at] = s[h];
                }
            }
            if (8*l < a.d_v) {
                const bool in = c < n;
                float4 * to = (float4 *) (value + at*a.d_v + 8*l);
                to[0] = in ? make_float4(y[0], y[1], y[2], y[3]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                to[1] = in ? make_float4(y[4], y[5], y[6], y[7]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        }
        __syncthreads();

        const int n_here = min(n - base, N_CELL);
        if (warp < NH) {
            float z[N_CELL/WARP_SIZE];
            float top = softmax.x;
#pragma unroll
            for (int i = 0; i < N_CELL/WARP_SIZE; ++i) {
                const int at = i*WARP_SIZE + lane;
                z[i] = at < n_here ? prob[warp*N_CELL + at]*a.scale : SCORE_NONE;
                if (a.softcap != 0.0f && at < n_here) {
                    z[i] = a.softcap*tanhf(z[i]/a.softcap);
                }
                z[i] = at < n_here ? z[i]*LOG2E : SCORE_NONE;
                top  = fmaxf(top, z[i]);
            }
            top = warp_max(top);
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < N_CELL/WARP_SIZE; ++i) {
                const int   at = i*WARP_SIZE + lane;
                const float p  = at < n_here ? exp2f(z[i] - top) : 0.0f;
                prob[warp*N_CELL + at] = p;
                sum += p;
            }
            const float f = exp2f(softmax.x - top);
            softmax = make_float2(top, softmax.y*f + warp_sum(sum));
            if (lane == 0) {
                rescale[warp] = f;
            }
        }
        __syncthreads();

#pragma unroll
        for (int i = 0; i < N_OUT; ++i) {
            const int o = i*FAC_THREAD + threadIdx.x;
            const int h = fastdiv(o, a.div_d_v);
            if (h < NH) {
                const float * p = prob  + h*N_CELL;
                const float * v = value + o - h*a.d_v;
                float sum = acc[i]*rescale[h];
#pragma unroll 2
                for (int c = 0; c < n_here; c += 4) {
                    const float4 p4 = *(const float4 *) (p + c);
                    sum += p4.x*v[(c + 0)*a.d_v];
                    sum += p4.y*v[(c + 1)*a.d_v];
                    sum += p4.z*v[(c + 2)*a.d_v];
                    sum += p4.w*v[(c + 3)*a.d_v];
                }
                acc[i] = sum;
            }
        }
    }

    const int n_head = min(NH, a.n_group - h0);
    float * out = a.part + (((size_t) u.at*a.n_part + u.rank)*a.n_group + h0)*(a.d_v + 2);
#pragma unroll
    for (int i = 0; i < N_OUT; ++i) {
        const int o = i*FAC_THREAD + threadIdx.x;
        const int h = fastdiv(o, a.div_d_v);
        if (h < n_head) {
            __stcg(out + o + 2*h, acc[i]);
        }
    }
    if (warp < n_head && lane == 0) {
        __stcg(out + warp*(a.d_v + 2) + a.d_v,     softmax.x);
        __stcg(out + warp*(a.d_v + 2) + a.d_v + 1, softmax.y);
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
