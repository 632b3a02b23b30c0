// Stage tip on CUDA: token importance prediction, paper section 4.1.
//
// A block scores its cells for every head of the group, and sums up their softmax.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-stages.cuh"

namespace fasa {

// The group's queries in shared memory.
struct tip_q {
    const float * q;      // F16 index: [n_dim][n_slot], times scale and log2(e)
    const int   * words;  // integer index: [n_dim/4][n_slot], four signed bytes each
    const float * factor; // integer index: [n_slot], max |x| / 127 times log2(e)
    const int   * offset; // Q4 index: [n_slot], its offset times the sum of the bytes
};

// A query row, unrotated, in to. Cold: a call, so that it is out of the way.
static __device__ __noinline__ float * unrotated(const float * row, float * to, int d, int block) {
    const int lane = threadIdx.x%WARP_SIZE;
    for (int i = lane; i < d; i += WARP_SIZE) {
        to[i] = row[i];
    }
    __syncwarp();
    unrotate_warp(to, d, block, lane);
    return to;
}

// The group's queries: whole rows into q, [n_slot][d_k] of shared memory, a warp for each; for tip into tip,
// n_slot*(n_dim_pad + 2) words of it. dim: of held_dims, for more dims than these it reads on. spare: n_slot rows for a while.
// meanwhile: called when the rows are asked for.
template <typename F>
static __device__ __forceinline__ tip_q tip_load_q(
        const attn_args & a, const unit & u, const int (&dim)[2], float * q, float * tip, float * spare, F && meanwhile) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int h    = threadIdx.x/WARP_SIZE;

    const int  n_pad = a.n_dim_pad;
    const bool f16   = a.index_type == GGML_FASA_INDEX_F16;

    float * q_tip  = tip;
    float * factor = q_tip + a.n_slot*n_pad;
    int   * offset = (int *) (factor + a.n_slot);

    const float * src = (const float *) (a.q + u.s*a.q_nb3 + u.t*a.q_nb1 + (u.g*a.n_group + min(h, a.n_group - 1))*a.q_nb2);
    const bool in[2] = { h < a.n_slot && 4*lane < a.d_k, h < a.n_slot && 4*(lane + WARP_SIZE) < a.d_k };
    float4 x[2];
    if (in[0]) {
        x[0] = *(const float4 *) (src + 4*lane);
    }
    if (in[1]) {
        x[1] = *(const float4 *) (src + 4*(lane + WARP_SIZE));
    }
    __syncthreads(); // loads come back in the order in which they were asked for
    meanwhile();
    if (h < a.n_slot) {
        const float on = h < a.n_group ? a.scale : 0.0f; // heads that only fill a slot
        float * row = q + h*a.d_k;
        if (in[0]) {
            *(float4 *) (row + 4*lane) = x[0];
        }
        if (in[1]) {
            *(float4 *) (row + 4*(lane + WARP_SIZE)) = x[1];
        }
        __syncwarp();
        if (a.hadamard) {
            row = unrotated(row, spare + h*a.d_k, a.d_k, a.hadamard);
        }
        auto value = [&](int j) { // of dim j, whose lane this is
            return row[j < WARP_SIZE ? dim[0] : j < 2*WARP_SIZE ? dim[1] : a.dims[u.g*a.n_dim + j]];
        };
        if (f16) {
#pragma unroll 1
            for (int j = lane; j < n_pad; j += WARP_SIZE) {
                q_tip[j*a.n_slot + h] = j < a.n_dim ? value(j)*on*LOG2E : 0.0f;
            }
        } else {
            float top = 0.0f;
#pragma unroll 1
            for (int j = lane; j < a.n_dim; j += WARP_SIZE) {
                top = fmaxf(top, fabsf(__fmul_rn(value(j), on)));
            }
            top = warp_max(top);
            const float inv = top >= FLT_MIN ? __fdiv_rn(127.0f, top) : 0.0f;
            int sum = 0;
#pragma unroll 1
            for (int j = lane; j < n_pad; j += WARP_SIZE) {
                const int v = j < a.n_dim ? (int) rintf(__fmul_rn(__fmul_rn(value(j), on), inv)) : 0;
                ((int8_t *) q_tip)[(j/4*a.n_slot + h)*4 + j%4] = v;
                sum += v;
            }
            sum = warp_reduce_sum(sum);
            if (lane == 0) {
                factor[h] = __fdiv_rn(top, 127.0f)*LOG2E;
                offset[h] = a.index_type == GGML_FASA_INDEX_Q4 ? 8*sum : 0;
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
static __device__ __forceinline__ void tip_cells_f16(
        const attn_args & a, const tip_q & q, int h0, const char * tile, int c, float (*s)[4]) {
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

// What a thread needs of four neighbouring cells, asked for ahead of time: their mask, and of an integer index their scales and
// first words.
struct tip_held {
    static constexpr int N_WORD = 4;

    mask_four mask;
    uint2     scales;
    uint4     words[N_WORD];

    // t: the first cell.
    __device__ __forceinline__ void load(const attn_args & a, const char * plane, const char * mask_row, int t) {
        mask.load(a, mask_row, t);
        if (t < a.n_kv && a.index_type != GGML_FASA_INDEX_F16) {
            const char * tile = plane + (size_t) (t/GGML_FASA_TILE)*a.tile_size;
            const int    c    = t%GGML_FASA_TILE;
            scales = *(const uint2 *) ((const half *) tile + c);
            const uint4 * row = (const uint4 *) ((const uint32_t *) (tile + GGML_FASA_TILE*sizeof(half)) + c);
#pragma unroll
            for (int w = 0; w < N_WORD; ++w) {
                if (w < a.n_word) {
                    words[w] = row[w*(GGML_FASA_TILE/4)];
                }
            }
        }
    }
};

// Adds word w of four cells.
template <int NH, bool Q4>
static __device__ __forceinline__ void tip_word(
        const attn_args & a, const tip_q & q, int h0, int w, const uint4 & u, int (*sum)[4]) {
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

template <int NH, bool Q4>
static __device__ __forceinline__ void tip_cells_int(
        const attn_args & a, const tip_q & q, int h0, const tip_held & held, const char * tile, int c, float (*s)[4]) {
    int sum[NH][4];
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        sum[h][0] = sum[h][1] = sum[h][2] = sum[h][3] = -q.offset[h0 + h];
    }
#pragma unroll
    for (int w = 0; w < held.N_WORD; ++w) {
        if (w < a.n_word) {
            tip_word<NH, Q4>(a, q, h0, w, held.words[w], sum);
        }
    }
    const uint4 * row = (const uint4 *) ((const uint32_t *) (tile + GGML_FASA_TILE*sizeof(half)) + c);
#pragma unroll 4
    for (int w = held.N_WORD; w < a.n_word; ++w) {
        tip_word<NH, Q4>(a, q, h0, w, row[w*(GGML_FASA_TILE/4)], sum);
    }

    const uint2  scales = held.scales;
    const float2 lo = __half22float2(*(const half2 *) &scales.x);
    const float2 hi = __half22float2(*(const half2 *) &scales.y);
    const float d[4] = { lo.x, lo.y, hi.x, hi.y };
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        const float factor = q.factor[h0 + h];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[h][i] = __fmul_rn(__fmul_rn(factor, d[i]), (float) sum[h][i]);
        }
    }
}

constexpr int TIP_AHEAD = 4*FAC_WARP; // tiles of a block that are asked for before tip needs them

// Asks for n tiles of the block, from tile first on, one for each of the warp's first lanes. May run before the kernels that this
// one depends on have ended. Each tile costs some cycles, whoever asks.
static __device__ __forceinline__ void tip_prefetch(const attn_args & a, const unit & u, const char * plane, int first, int n) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    const int lane = threadIdx.x%WARP_SIZE;
    if (lane < n && GGML_FASA_TILE*(first + lane) < a.n_run) {
        const int t = cell_of(a, u, GGML_FASA_TILE*(first + lane));
        if (t < a.n_kv) {
            const char * tile = plane + (size_t) (t/GGML_FASA_TILE)*a.tile_size;
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(tile), "r"(a.tile_size));
        }
    }
#endif
    GGML_UNUSED(a);
    GGML_UNUSED(u);
    GGML_UNUSED(plane);
    GGML_UNUSED(first);
    GGML_UNUSED(n);
}

// Scores of four neighbouring cells from t on for NH heads from h0 on.
template <int NH>
static __device__ __forceinline__ void tip_cells(
        const attn_args & a, const tip_q & q, int h0, const tip_held & held, const char * plane, int t, float (*s)[4]) {
    const char * tile = plane + (size_t) (t/GGML_FASA_TILE)*a.tile_size;
    const int    c    = t%GGML_FASA_TILE;
    switch (a.index_type) {
        case GGML_FASA_INDEX_F16: tip_cells_f16<NH>       (a, q, h0, tile, c, s); break;
        case GGML_FASA_INDEX_Q8:  tip_cells_int<NH, false>(a, q, h0, held, tile, c, s); break;
        default:                  tip_cells_int<NH, true> (a, q, h0, held, tile, c, s); break;
    }
}

// Puts the scores s of four cells for NH heads, of which n_head are there, into score, [n_head][n_run] from the first of the cells
// on, -inf of hidden cells, and adds them to the softmax sums z of 2^(score - m). bits: of mask_four. first: whether the first head
// is that of the group, the lowest bit of whose scores says whether a cell is forced: a score is not known that well.
template <int NH>
static __device__ __forceinline__ void tip_put(
        const attn_args & a, uint32_t bits, bool first, int n_head, float (*s)[4], float * score, float * m, float * z) {
    if (first) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            s[0][c] = __uint_as_float((__float_as_uint(s[0][c]) & ~1u) | (bits >> c >> 4 & 1));
        }
    }
    if (bits != 0) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                s[h][c] = bits >> c & 0x01 ? -INFINITY : s[h][c];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        const float now = fmaxf(m[h], fmaxf(fmaxf(s[h][0], s[h][1]), fmaxf(s[h][2], s[h][3])));
        z[h] = z[h]*exp2f(m[h] - now) +
            ((exp2f(s[h][0] - now) + exp2f(s[h][1] - now)) + (exp2f(s[h][2] - now) + exp2f(s[h][3] - now)));
        m[h] = now;
        if (h < n_head) {
            *(float4 *) (score + h*a.n_run) = make_float4(s[h][0], s[h][1], s[h][2], s[h][3]);
        }
    }
}

// Scores of the block's cells, log2(e) * S_h, into score, [n_group][n_run], see tip_put; the block's softmax sums into softmax and,
// for others, its letter. NH: heads scored at once. held: of the thread's first cells.
template <int NH>
static __device__ __forceinline__ void tip_scores(
        const attn_args & a, const unit & u, const tip_q & q, const char * plane, const char * mask, tip_held & held,
        float2 (*sums)[FAC_WARP], uint64_t * softmax, float * score) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    const rest_cells rest(a);

#pragma unroll 1
    for (int h0 = 0; h0 < a.n_group; h0 += NH) {
        float m[NH];
        float z[NH];
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            m[h] = SCORE_NONE;
            z[h] = 0.0f;
        }
#pragma unroll 1
        for (int i = 4*threadIdx.x; i < a.n_even; i += 4*FAC_THREAD) {
            const int t = cell_of(a, u, i);
            if (h0 == 0) {
                tip_prefetch(a, u, plane, (i - 4*lane)/GGML_FASA_TILE + TIP_AHEAD, 4*WARP_SIZE/GGML_FASA_TILE);
            }
            float s[NH][4] = {};
            if (t < a.n_kv) {
                tip_cells<NH>(a, q, h0, held, plane, t, s);
            }
            const uint32_t bits = held.mask.bits(a, mask, t);
            const int next = i + 4*FAC_THREAD < a.n_even ? i + 4*FAC_THREAD : rest.i;
            if (next < a.n_run) {
                held.load(a, plane, mask, cell_of(a, u, next));
            }
            tip_put<NH>(a, bits, h0 == 0, a.n_group - h0, s, score + h0*a.n_run + i, m, z);
        }
        if (rest.i < a.n_run && rest.h >= h0 && rest.h < h0 + NH) {
            const int t = cell_of(a, u, rest.i);
            float s[1][4] = {};
            if (t < a.n_kv) {
                tip_cells<1>(a, q, rest.h, held, plane, t, s);
            }
            float one_m = SCORE_NONE;
            float one_z = 0.0f;
            tip_put<1>(a, held.mask.bits(a, mask, t), rest.h == 0, 1, s, score + rest.h*a.n_run + rest.i, &one_m, &one_z);
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                if (h0 + h == rest.h) {
                    const float now = fmaxf(m[h], one_m);
                    z[h] = z[h]*exp2f(m[h] - now) + one_z*exp2f(one_m - now);
                    m[h] = now;
                }
            }
        }
        if (h0 + NH < a.n_group) {
            held.load(a, plane, mask, cell_of(a, u, first_cell(a)));
        }
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            const float2 sum = softmax_sum(make_float2(m[h], z[h]));
            if (lane == 0) {
                sums[h][warp] = sum;
            }
        }
        __syncthreads();
        if (warp < NH && h0 + warp < a.n_group) {
            const float2 sum = softmax_sum(lane < FAC_WARP ? sums[warp][lane] : make_float2(SCORE_NONE, 0.0f));
            if (lane == 0) {
                // not 0 as a whole: the largest score of a block without visible cells is SCORE_NONE
                softmax[h0 + warp] = pack(sum.x, sum.y);
                if (a.n_part > 1) {
                    put_word(letter_of(a, u, u.rank).softmax + h0 + warp, pack(sum.x, sum.y));
                }
            }
        }
        __syncthreads();
    }
}

} // namespace fasa
