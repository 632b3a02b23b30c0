// Stage tip on CUDA: token importance prediction, paper section 4.1.
//
// tip_load_q puts the dominant dims of a group's queries into shared memory, tip_score leaves a softmax weight of every cell
// and head, up to a factor, and tip_combine turns the weights into keys once the team knows each head's softmax sum.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-stages.cuh"

namespace fasa {

// Asks for the block's part of the index ahead of time. May run before the kernels that this one depends on have ended.
static __device__ __forceinline__ void tip_prefetch(const attn_args & a, const unit & u, int cell0) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    const int n = min(a.n_cell, (a.n_kv + GGML_FASA_TILE - 1)/GGML_FASA_TILE*GGML_FASA_TILE - cell0);
    if (threadIdx.x == 0 && n > 0) {
        const char   * from = a.index + u.s*a.index_nb3 + u.g*a.index_nb2 + (size_t) (cell0/GGML_FASA_TILE)*a.tile_size;
        const uint32_t size = n/GGML_FASA_TILE*a.tile_size;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(size));
    }
#endif
    GGML_UNUSED(a);
    GGML_UNUSED(u);
    GGML_UNUSED(cell0);
}

// The group's queries in shared memory.
struct tip_q {
    const float * q;      // F16 index: [n_dim][n_slot], times scale
    const int   * words;  // integer index: [n_dim/4][n_slot], four signed bytes each
    const float * factor; // integer index: [n_slot], max |x| / 127
    const int   * offset; // integer index: [n_slot], index offset times the sum of the bytes
};

// q_rows: [n_group][d_k] of shared memory, all the queries of the group, as fac reads them. q_tip, head: see block_layout.
static __device__ tip_q tip_load_q(const attn_args & a, const unit & u, float * q_rows, float * q_tip, float * head) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    const int32_t * dims = a.dims + u.g*a.n_dim;
    const bool f16   = a.index_type == GGML_FASA_INDEX_F16;
    const int  n_pad = (a.n_dim + 7)/8*8;
    float * factor = head;
    int   * offset = (int *) (head + a.n_slot);

#pragma unroll 1
    for (int h = warp; h < a.n_slot; h += N_WARP) {
        if (h >= a.n_group) { // heads that only fill a slot
#pragma unroll 1
            for (int j = lane; j < n_pad; j += WARP_SIZE) {
                if (f16) {
                    q_tip[j*a.n_slot + h] = 0.0f;
                } else if (j%4 == 0) {
                    ((int *) q_tip)[j/4*a.n_slot + h] = 0;
                }
            }
            if (lane == 0) {
                factor[h] = 0.0f;
                offset[h] = 0;
            }
            continue;
        }

        const float * src = (const float *) (a.q + u.s*a.q_nb3 + u.t*a.q_nb1 + (u.g*a.n_group + h)*a.q_nb2);
        float * row = q_rows + h*a.d_k;
#pragma unroll 1
        for (int i = 4*lane; i < a.d_k; i += 4*WARP_SIZE) {
            *(float4 *) (row + i) = *(const float4 *) (src + i);
        }
        __syncwarp();
        if (a.hadamard) {
            unrotate_warp(row, a.d_k, a.hadamard, lane);
        }

        if (f16) {
#pragma unroll 1
            for (int j = lane; j < n_pad; j += WARP_SIZE) {
                q_tip[j*a.n_slot + h] = j < a.n_dim ? row[dims[j]]*a.scale : 0.0f;
            }
        } else {
            float top = 0.0f;
#pragma unroll 1
            for (int j = lane; j < a.n_dim; j += WARP_SIZE) {
                top = fmaxf(top, fabsf(__fmul_rn(row[dims[j]], a.scale)));
            }
#pragma unroll
            for (int o = WARP_SIZE/2; o > 0; o /= 2) {
                top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, o));
            }
            const float inv = top >= FLT_MIN ? __fdiv_rn(127.0f, top) : 0.0f;
            int sum = 0;
#pragma unroll 1
            for (int w = lane; w < n_pad/4; w += WARP_SIZE) {
                uint32_t word = 0;
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const int j = 4*w + b;
                    const int v = j < a.n_dim ? (int) rintf(__fmul_rn(__fmul_rn(row[dims[j]], a.scale), inv)) : 0;
                    sum  += v;
                    word |= (uint32_t) (v & 0xFF) << 8*b;
                }
                ((uint32_t *) q_tip)[w*a.n_slot + h] = word;
            }
#pragma unroll
            for (int o = WARP_SIZE/2; o > 0; o /= 2) {
                sum += __shfl_xor_sync(0xFFFFFFFFu, sum, o);
            }
            if (lane == 0) {
                factor[h] = __fdiv_rn(top, 127.0f);
                offset[h] = sum*(a.index_type == GGML_FASA_INDEX_Q4 ? 8 : 128);
            }
        }

        if (a.hadamard) { // fac wants the rows as they came
            __syncwarp();
#pragma unroll 1
            for (int i = lane; i < a.d_k; i += WARP_SIZE) {
                row[i] = src[i];
            }
        }
    }
    __syncthreads();
    return { q_tip, (const int *) q_tip, factor, offset };
}

static __device__ __forceinline__ int dot4(uint32_t x, int q, int sum) {
    return ggml_cuda_dp4a((int) x, q, sum);
}

// NH consecutive words of shared memory.
template <int NH>
static __device__ __forceinline__ void load_heads(const int * p, int * x) {
    if constexpr (NH%4 == 0) {
#pragma unroll
        for (int h = 0; h < NH; h += 4) {
            const int4 v = *(const int4 *) (p + h);
            x[h] = v.x; x[h + 1] = v.y; x[h + 2] = v.z; x[h + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            x[h] = p[h];
        }
    }
}

// Scores of four neighbouring cells for NH heads from h0 on. tile: the cells' tile; c: the first cell within it.
template <int NH>
static __device__ __forceinline__ void tip_cells_f16(const attn_args & a, const tip_q & q, int h0, const char * tile, int c, float (*s)[4]) {
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        s[h][0] = s[h][1] = s[h][2] = s[h][3] = 0.0f;
    }
    const uint2 * row = (const uint2 *) ((const half *) tile + c);
#pragma unroll 8
    for (int j = 0; j < a.n_dim; ++j) {
        const uint2  u  = row[j*(GGML_FASA_TILE/4)];
        const float2 lo = __half22float2(*(const half2 *) &u.x);
        const float2 hi = __half22float2(*(const half2 *) &u.y);
        int bits[NH];
        load_heads<NH>((const int *) q.q + j*a.n_slot + h0, bits);
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            const float x = __int_as_float(bits[h]);
            s[h][0] += x*lo.x;
            s[h][1] += x*lo.y;
            s[h][2] += x*hi.x;
            s[h][3] += x*hi.y;
        }
    }
}

template <int NH, bool Q4>
static __device__ __forceinline__ void tip_cells_int(const attn_args & a, const tip_q & q, int h0, const char * tile, int c, float (*s)[4]) {
    const uint2   scales = *(const uint2 *) ((const half *) tile + c);
    const uint4 * row    = (const uint4 *) ((const uint32_t *) (tile + GGML_FASA_TILE*sizeof(half)) + c);
    const int     n_word = Q4 ? (a.n_dim + 7)/8 : (a.n_dim + 3)/4;

    int sum[NH][4] = {};
#pragma unroll 4
    for (int w = 0; w < n_word; ++w) {
        const uint4 u = row[w*(GGML_FASA_TILE/4)];
        const uint32_t x[4] = { u.x, u.y, u.z, u.w };
        int qw[NH];
        if constexpr (Q4) {
            load_heads<NH>(q.words + 2*w*a.n_slot + h0, qw);
#pragma unroll
            for (int h = 0; h < NH; ++h) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[h][i] = dot4(x[i] & 0x0F0F0F0Fu, qw[h], sum[h][i]);
                }
            }
            load_heads<NH>(q.words + (2*w + 1)*a.n_slot + h0, qw);
#pragma unroll
            for (int h = 0; h < NH; ++h) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[h][i] = dot4((x[i] >> 4) & 0x0F0F0F0Fu, qw[h], sum[h][i]);
                }
            }
        } else {
            // bytes are signed here: x - 128 is what is summed, so no offset remains
            load_heads<NH>(q.words + w*a.n_slot + h0, qw);
#pragma unroll
            for (int h = 0; h < NH; ++h) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[h][i] = dot4(x[i] ^ 0x80808080u, qw[h], sum[h][i]);
                }
            }
        }
    }

    const float2 lo = __half22float2(*(const half2 *) &scales.x);
    const float2 hi = __half22float2(*(const half2 *) &scales.y);
    const float d[4] = { lo.x, lo.y, hi.x, hi.y };
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        const float factor = q.factor[h0 + h];
        const int   offset = Q4 ? q.offset[h0 + h] : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[h][i] = __fmul_rn(__fmul_rn(factor, d[i]), (float) (sum[h][i] - offset));
        }
    }
}

// Four neighbouring cells of a mask row from cell t on: bits 0 to 3 hidden, bits 4 to 7 forced. Cells from n_kv on are hidden.
static __device__ __forceinline__ uint32_t mask_cells(const attn_args & a, const char * mask, int t) {
    if (a.mask_f16 && t + 4 <= a.n_kv && a.n_kv%4 == 0) {
        const uint2 m = *(const uint2 *) ((const uint16_t *) mask + t);
        if ((m.x | m.y) == 0) {
            return 0;
        }
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const mask_kind kind = t + i < a.n_kv ? mask_at(mask, a.mask_f16, t + i) : MASK_HIDDEN;
        bits |= (kind == MASK_HIDDEN ? 0x01 : kind == MASK_FORCED ? 0x10 : 0) << i;
    }
    return bits;
}

// An int that orders like the float.
static __device__ __forceinline__ int ordered(float x) {
    const int i = __float_as_int(x);
    return i ^ ((i >> 31) & 0x7FFFFFFF);
}

static __device__ __forceinline__ float unordered(int i) {
    return __int_as_float(i ^ ((i >> 31) & 0x7FFFFFFF));
}

// 2^(x - n) for an integer n >= x - 1, as 2^r times a power of two: for other n the result differs by that power exactly, so
// that equal cells of different blocks tie. At least 2^-126.
static __device__ __forceinline__ float exp2_from(float x, int n) {
    constexpr float MAGIC = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    x = fmaxf(x, (float) (n - 126));
    const float m = x + MAGIC;
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x - (m - MAGIC)));
    const int k = max(__float_as_int(m) - __float_as_int(MAGIC) - n, -126);
    return y*__int_as_float((k + 127) << 23);
}

constexpr float WEIGHT_HIDDEN = -1.0f;
constexpr float WEIGHT_FORCED = INFINITY;

// Weights of cells [cell0, cell0 + n_cell) of the unit: weight[h][cell - cell0] = exp(S_h) / 2^n_h with an integer n_h of the
// block. The first head's is WEIGHT_HIDDEN or WEIGHT_FORCED where the cell is hidden (or beyond n_kv) or forced.
// softmax: [n_group] pairs in global memory, n_h and the sum of the block's weights.
// part: N_WARP * NH words of shared memory; top: NH words of it.
template <int NH>
static __device__ void tip_score(
        const attn_args & a, const unit & u, const tip_q & q, int cell0, float * weight, float2 * softmax, float * part, int * top) {
    constexpr float LOG2E = 1.44269504f;

    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    const char * plane = a.index + u.s*a.index_nb3 + u.g*a.index_nb2;
    const char * mask  = a.mask  + u.s*a.mask_nb3  + u.t*a.mask_nb1;

#pragma unroll 1
    for (int h0 = 0; h0 < a.n_group; h0 += NH) {
        if (threadIdx.x < NH) {
            top[threadIdx.x] = ordered(-INFINITY);
        }
        __syncthreads();

        float peak[NH];
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            peak[h] = -INFINITY;
        }
#pragma unroll 1
        for (int at = warp*BAND + 4*lane; at < a.n_cell; at += N_WARP*BAND) {
            const int      t    = cell0 + at;
            const uint32_t bits = mask_cells(a, mask, t);

            float s[NH][4];
            if (t < a.n_kv) {
                const char * tile = plane + (size_t) (t/GGML_FASA_TILE)*a.tile_size;
                const int c = t%GGML_FASA_TILE;
                switch (a.index_type) {
                    case GGML_FASA_INDEX_F16: tip_cells_f16<NH>       (a, q, h0, tile, c, s); break;
                    case GGML_FASA_INDEX_Q8:  tip_cells_int<NH, false>(a, q, h0, tile, c, s); break;
                    default:                  tip_cells_int<NH, true> (a, q, h0, tile, c, s); break;
                }
            }
            if (bits & 0x0F) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int h = 0; h < NH; ++h) {
                        s[h][i] = bits >> i & 1 ? -INFINITY : s[h][i];
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                peak[h] = fmaxf(peak[h], fmaxf(fmaxf(s[h][0], s[h][1]), fmaxf(s[h][2], s[h][3])));
                if (h0 + h < a.n_group) {
                    *(float4 *) (weight + (size_t) (h0 + h)*a.n_cell + at) = make_float4(s[h][0], s[h][1], s[h][2], s[h][3]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            peak[h] = warp_max(peak[h]);
            if (lane == 0) {
                atomicMax(&top[h], ordered(peak[h]));
            }
        }
        __syncthreads();

        int   n[NH];
        float sum[NH];
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            const float m = unordered(top[h]);
            n[h]   = m > -INFINITY ? (int) ceilf(m*LOG2E) : 0;
            sum[h] = 0.0f;
        }
        // each thread its own cells again
#pragma unroll 1
        for (int at = warp*BAND + 4*lane; at < a.n_cell; at += N_WARP*BAND) {
            const uint32_t bits = mask_cells(a, mask, cell0 + at);
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                if (h0 + h < a.n_group) {
                    float4 * to = (float4 *) (weight + (size_t) (h0 + h)*a.n_cell + at);
                    float4 w = *to;
                    w.x = bits & 1 ? 0.0f : exp2_from(w.x*LOG2E, n[h]);
                    w.y = bits & 2 ? 0.0f : exp2_from(w.y*LOG2E, n[h]);
                    w.z = bits & 4 ? 0.0f : exp2_from(w.z*LOG2E, n[h]);
                    w.w = bits & 8 ? 0.0f : exp2_from(w.w*LOG2E, n[h]);
                    sum[h] += (w.x + w.y) + (w.z + w.w);
                    *to = w;
                }
            }
            if (bits && h0 == 0) {
                for (int i = 0; i < 4; ++i) {
                    if (bits >> i & 0x11) {
                        weight[at + i] = bits >> i & 1 ? WEIGHT_HIDDEN : WEIGHT_FORCED;
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            sum[h] = warp_sum(sum[h]);
            if (lane == 0) {
                part[warp*NH + h] = sum[h];
            }
        }
        __syncthreads();
        if (threadIdx.x < NH && h0 + threadIdx.x < a.n_group) {
            float z = 0.0f;
#pragma unroll 4
            for (int w = 0; w < N_WARP; ++w) {
                z += part[w*NH + threadIdx.x];
            }
            const float m = unordered(top[threadIdx.x]);
            __stcg(softmax + h0 + threadIdx.x, make_float2(m > -INFINITY ? ceilf(m*LOG2E) : -INFINITY, z));
        }
        __syncthreads();
    }
}

// Keys of the block's cells, over the weights of the first head. softmax: the whole team's, [n_team][n_group] pairs.
// factor: [n_group] of shared memory, what makes the block's weights softmax values.
// hist: [N_BIN] of shared memory, the count of visible cells by bin.
static __device__ void tip_combine(
        const attn_args & a, int rank, float * weight, const float2 * softmax, float * factor, uint32_t * hist) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    *(uint4 *) (hist + 4*threadIdx.x) = make_uint4(0, 0, 0, 0);
    static_assert(N_BIN == 4*N_THREAD, "four bins for each thread");
#pragma unroll 1
    for (int h = warp; h < a.n_group; h += N_WARP) {
        const float2 f = lane < a.n_team ? __ldcg(softmax + lane*a.n_group + h) : make_float2(-INFINITY, 0.0f);
        const float n  = warp_max(f.x);
        const float z  = warp_sum(f.x > -INFINITY ? f.y*exp2f(f.x - n) : 0.0f);
        if (lane == rank) {
            factor[h] = f.x > -INFINITY ? exp2f(f.x - n)*__fdiv_rn(1.0f, z) : 0.0f;
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int at = 4*threadIdx.x; at < a.n_cell; at += 4*N_THREAD) {
        const float4 w0 = *(const float4 *) (weight + at);
        const float  f0 = factor[0];
        float4 p = make_float4(w0.x*f0, w0.y*f0, w0.z*f0, w0.w*f0);
#pragma unroll 1
        for (int h = 1; h < a.n_group; ++h) {
            const float4 w = *(const float4 *) (weight + (size_t) h*a.n_cell + at);
            const float  f = factor[h];
            p.x += w.x*f;
            p.y += w.y*f;
            p.z += w.z*f;
            p.w += w.w*f;
        }
        auto key_of = [](float w, float p) {
            return w == WEIGHT_HIDDEN ? KEY_HIDDEN : w == WEIGHT_FORCED ? KEY_FORCED : __float_as_uint(p) + 1;
        };
        const uint4 key = make_uint4(key_of(w0.x, p.x), key_of(w0.y, p.y), key_of(w0.z, p.z), key_of(w0.w, p.w));
        *(uint4 *) (weight + at) = key;

        const uint32_t keys[4] = { key.x, key.y, key.z, key.w };
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (keys[i] != KEY_HIDDEN) {
                atomicAdd(&hist[bin_of(keys[i])], 1);
            }
        }
    }
    __syncthreads();
}

} // namespace fasa
