// Stage tip on CUDA: token importance prediction, paper section 4.1.
//
// A kernel over bands of cells. It writes the score of every cell and head, and of each block the softmax sum.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-stages.cuh"

namespace fasa {

constexpr int TIP_WARP = 8;

// Words of shared memory: the group's dims and queries, the dominant dims of the queries, and two words for each head.
static size_t tip_shared(const attn_args & a) {
    return GGML_PAD(a.n_dim, 8) + (size_t) a.n_slot*(a.d_k + GGML_PAD(a.n_dim, 8) + 2);
}

// The group's queries in shared memory.
struct tip_q {
    const float * q;      // F16 index: [n_dim][n_slot], times scale
    const int   * words;  // integer index: [n_dim/4][n_slot], four signed bytes each
    const float * factor; // integer index: [n_slot], max |x| / 127
    const int   * offset; // integer index: [n_slot], index offset times the sum of the bytes
};

// shared: of tip_shared, the dims in it.
static __device__ tip_q tip_load_q(const attn_args & a, const unit & u, float * shared) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    const int * dims = (const int *) shared;
    float * q_rows = shared + (a.n_dim + 7)/8*8;
    float * q_tip  = q_rows + a.n_slot*a.d_k;
    float * head   = q_tip  + a.n_slot*((a.n_dim + 7)/8*8);

    const bool f16   = a.index_type == GGML_FASA_INDEX_F16;
    const int  n_pad = (a.n_dim + 7)/8*8;
    float * factor = head;
    int   * offset = (int *) (head + a.n_slot);

#pragma unroll 1
    for (int h = warp; h < a.n_slot; h += TIP_WARP) {
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

// Asks for the index of a band. May run before the kernels that this one depends on have ended.
static __device__ __forceinline__ void tip_prefetch(const attn_args & a, const char * plane, int t) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    const int n_tile = min(BAND/GGML_FASA_TILE, (a.n_kv + GGML_FASA_TILE - 1)/GGML_FASA_TILE - t/GGML_FASA_TILE);
    if (threadIdx.x%WARP_SIZE == 0 && n_tile > 0) {
        const char * from = plane + (size_t) (t/GGML_FASA_TILE)*a.tile_size;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(n_tile*a.tile_size));
    }
#endif
    GGML_UNUSED(a);
    GGML_UNUSED(plane);
    GGML_UNUSED(t);
}

// grid: n_scan blocks of TIP_WARP warps for each unit. NH: heads scored at once.
template <int NH, int TYPE>
__global__ void __launch_bounds__(TIP_WARP*WARP_SIZE, NH > 4 ? 2 : 3) fasa_tip(const attn_args a) {
    extern __shared__ float4 shared4[];
    __shared__ float2 part[TIP_WARP][NH];

    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    const int at_u = blockIdx.y;
    const unit u(a, a.unit0 + at_u);

    const char * plane = a.index + u.s*a.index_nb3 + u.g*a.index_nb2;
    for (int t = (blockIdx.x*TIP_WARP + warp)*BAND; t < a.n_pad; t += a.n_scan*TIP_WARP*BAND) {
        tip_prefetch(a, plane, t);
    }
    for (int j = threadIdx.x; j < a.n_dim; j += TIP_WARP*WARP_SIZE) { // no kernel writes them
        ((int *) shared4)[j] = a.dims[u.g*a.n_dim + j];
    }
    __syncthreads();
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    const char * mask  = a.mask  + u.s*a.mask_nb3  + u.t*a.mask_nb1;
    float      * score = a.score + (size_t) at_u*a.n_group*a.n_pad;

    if (blockIdx.x == 0) {
        for (int b = threadIdx.x; b < N_BIN; b += TIP_WARP*WARP_SIZE) {
            a.hist[at_u*N_BIN + b] = 0;
        }
        if (threadIdx.x == 0) {
            a.sync[at_u] = {};
        }
    }

    const tip_q q = tip_load_q(a, u, (float *) shared4);

#pragma unroll 1
    for (int h0 = 0; h0 < a.n_group; h0 += NH) {
        float m[NH];
        float z[NH];
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            m[h] = -INFINITY;
            z[h] = 0.0f;
        }
#pragma unroll 1
        for (int t = (blockIdx.x*TIP_WARP + warp)*BAND + 4*lane; t < a.n_pad; t += a.n_scan*TIP_WARP*BAND) {
            mask_four four;
            four.load(a, mask, t);
            float s[NH][4] = {};
            if (t < a.n_kv) {
                const char * tile = plane + (size_t) (t/GGML_FASA_TILE)*a.tile_size;
                const int    c    = t%GGML_FASA_TILE;
                if constexpr (TYPE == GGML_FASA_INDEX_F16) {
                    tip_cells_f16<NH>(a, q, h0, tile, c, s);
                } else {
                    tip_cells_int<NH, TYPE == GGML_FASA_INDEX_Q4>(a, q, h0, tile, c, s);
                }
            }
            const uint32_t bits = four.bits(a, mask, t);
#pragma unroll
            for (int h = 0; h < NH; ++h) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    s[h][i] = bits >> i & 1 ? -INFINITY : s[h][i]*LOG2E;
                }
                if (h0 + h < a.n_group) {
                    *(float4 *) (score + (size_t) (h0 + h)*a.n_pad + t) = make_float4(s[h][0], s[h][1], s[h][2], s[h][3]);
                }
                const float top = fmaxf(fmaxf(s[h][0], s[h][1]), fmaxf(s[h][2], s[h][3]));
                if (top > -INFINITY) {
                    const float now = fmaxf(m[h], top);
                    z[h] = z[h]*exp2f(m[h] - now) +
                        ((exp2f(s[h][0] - now) + exp2f(s[h][1] - now)) + (exp2f(s[h][2] - now) + exp2f(s[h][3] - now)));
                    m[h] = now;
                }
            }
        }
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            const float all = warp_max(m[h]);
            const float sum = warp_sum(m[h] > -INFINITY ? z[h]*exp2f(m[h] - all) : 0.0f);
            if (lane == 0) {
                part[warp][h] = make_float2(all, sum);
            }
        }
        __syncthreads();
        if (threadIdx.x < NH && h0 + threadIdx.x < a.n_group) {
            float all = -INFINITY;
#pragma unroll
            for (int w = 0; w < TIP_WARP; ++w) {
                all = fmaxf(all, part[w][threadIdx.x].x);
            }
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < TIP_WARP; ++w) {
                const float2 p = part[w][threadIdx.x];
                sum += p.x > -INFINITY ? p.y*exp2f(p.x - all) : 0.0f;
            }
            a.softmax[((size_t) at_u*a.n_scan + blockIdx.x)*a.n_group + h0 + threadIdx.x] = make_float2(all, sum);
        }
        __syncthreads();
    }
}

} // namespace fasa
