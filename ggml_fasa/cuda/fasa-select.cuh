// Stage select on CUDA: the budget best cells of a unit, by key descending then cell ascending.
//
// A kernel turns scores into keys and counts them by their leading digit. The bin of the histogram where the budget ends then
// splits the cells into selected ones, others, and candidates: the blocks of fac filter the cells (select_filter), and
// the last of them decides among the candidates (select_rest).

#pragma once

#include "fasa-stages.cuh"

namespace fasa {

constexpr int SELECT_THREAD = 512;

// grid: n_scan blocks for each unit.
__global__ void __launch_bounds__(SELECT_THREAD) fasa_select(const attn_args a) {
    __shared__ __align__(16) uint32_t hist[N_BIN];
    __shared__ float shift[16]; // of each head, what makes 2^(score - shift) its softmax

    const int lane = threadIdx.x%WARP_SIZE;
    const int at_u = blockIdx.y;
    const unit u(a, a.unit0 + at_u);

    for (int b = 4*threadIdx.x; b < N_BIN; b += 4*SELECT_THREAD) {
        *(uint4 *) (hist + b) = make_uint4(0, 0, 0, 0);
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    const char  * mask  = a.mask  + u.s*a.mask_nb3 + u.t*a.mask_nb1;
    const float * score = a.score + (size_t) at_u*a.n_group*a.n_pad;
    uint32_t    * key   = a.key   + (size_t) at_u*a.n_pad;

    // the scores of the next cells are on their way while others are worked on
    constexpr int HELD = 4;
    float4    held[HELD];
    mask_four four;
    auto load = [&](int t) {
        if (t < a.n_pad) {
#pragma unroll
            for (int h = 0; h < HELD; ++h) {
                held[h] = h < a.n_group ? *(const float4 *) (score + (size_t) h*a.n_pad + t) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            four.load(a, mask, t);
        }
    };
    int t = 4*(blockIdx.x*SELECT_THREAD + threadIdx.x);
    load(t);

    const float2 * softmax = a.softmax + (size_t) at_u*a.n_scan*a.n_group;
    for (int h = threadIdx.x/WARP_SIZE; h < 16; h += SELECT_THREAD/WARP_SIZE) {
        float m = -INFINITY;
        float z = 0.0f;
        for (int b = lane; b < a.n_scan && h < a.n_group; b += WARP_SIZE) {
            const float2 p = softmax[b*a.n_group + h];
            if (p.x > -INFINITY) {
                const float now = fmaxf(m, p.x);
                z = z*exp2f(m - now) + p.y*exp2f(p.x - now);
                m = now;
            }
        }
        const float all = warp_max(m);
        const float sum = warp_sum(m > -INFINITY ? z*exp2f(m - all) : 0.0f);
        if (lane == 0) {
            shift[h] = all > -INFINITY ? all + log2f(sum) : INFINITY; // infinite: no weight
        }
    }
    __syncthreads();

#pragma unroll 1
    for (; t < a.n_pad; t += 4*a.n_scan*SELECT_THREAD) {
        float p[4] = {};
        auto add = [&](const float4 & s, float shift) {
            p[0] += exp2f(s.x - shift);
            p[1] += exp2f(s.y - shift);
            p[2] += exp2f(s.z - shift);
            p[3] += exp2f(s.w - shift);
        };
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            add(held[h], shift[h]);
        }
#pragma unroll 1
        for (int h = HELD; h < a.n_group; ++h) {
            add(*(const float4 *) (score + (size_t) h*a.n_pad + t), shift[h]);
        }
        const uint32_t now = four.bits(a, mask, t);
        load(t + 4*a.n_scan*SELECT_THREAD);
        uint32_t k[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            k[i] = now >> i & 0x01 ? KEY_HIDDEN : now >> i & 0x10 ? KEY_FORCED : __float_as_uint(p[i]) + 1;
            if (k[i] != KEY_HIDDEN) {
                atomicAdd(&hist[bin_of(k[i])], 1);
            }
        }
        *(uint4 *) (key + t) = make_uint4(k[0], k[1], k[2], k[3]);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < N_BIN; b += SELECT_THREAD) {
        if (hist[b] > 0) {
            atomicAdd(&a.hist[at_u*N_BIN + b], hist[b]);
        }
    }
}

// What follows runs in blocks of fac.

constexpr int FAC_THREAD = 512;
constexpr int FAC_WARP   = FAC_THREAD/WARP_SIZE;

// Small words of shared memory.
struct alignas(16) select_shared {
    uint32_t hist[1024]; // read in fours
    uint64_t cand[FAC_THREAD];
    uint32_t warps[FAC_WARP];
    int      result[2];
};

// Sum of x over the threads before this one in the block; total over all.
static __device__ __forceinline__ uint32_t block_scan(uint32_t x, uint32_t * warps, uint32_t * total) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    uint32_t sum = x;
#pragma unroll
    for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
        const uint32_t below = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
        sum += lane >= offset ? below : 0;
    }
    __syncthreads(); // warps may still be read from the call before
    if (lane == WARP_SIZE - 1) {
        warps[warp] = sum;
    }
    __syncthreads();

    uint32_t before = 0;
    uint32_t all    = 0;
#pragma unroll
    for (int w = 0; w < FAC_WARP; ++w) {
        before += w < warp ? warps[w] : 0;
        all    += warps[w];
    }
    *total = all;
    return before + sum - x;
}

// The largest bin b with hist[b] + hist[b + 1] + ... >= need; above: the count beyond b. If the n_bin bins (a multiple of 4, at
// most 4 a thread) hold less than need, b is -1.
static __device__ __forceinline__ void find_bin(
        const uint32_t * hist, int n_bin, uint32_t need, select_shared & sh, int * bin, uint32_t * above) {
    const int   first = n_bin - 4 - 4*(int) threadIdx.x; // threads go down from the last bin
    const uint4 n     = first >= 0 ? *(const uint4 *) (hist + first) : make_uint4(0, 0, 0, 0);

    if (threadIdx.x == 0) {
        sh.result[0] = -1;
        sh.result[1] = 0;
    }
    uint32_t total;
    uint32_t sum = block_scan(n.x + n.y + n.z + n.w, sh.warps, &total);
    const uint32_t count[4] = { n.w, n.z, n.y, n.x };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (sum < need && sum + count[i] >= need) {
            sh.result[0] = first + 3 - i;
            sh.result[1] = sum;
        }
        sum += count[i];
    }
    __syncthreads();
    *bin   = sh.result[0];
    *above = sh.result[0] >= 0 ? sh.result[1] : total;
    __syncthreads();
}

// The cells of block rank of a unit: cell i of n_run.
static __device__ __forceinline__ int select_cell(const attn_args & a, int rank, int i) {
    return (i/BAND*a.n_part + rank)*BAND + i%BAND;
}

// Asks for the K and V rows of a cell ahead of time.
static __device__ __forceinline__ void prefetch_cell(const attn_args & a, const unit & u, int t) {
    const char * k = a.k + u.s*a.k_nb3 + u.g*a.k_nb2 + t*a.k_nb1;
    const char * v = a.v + u.s*a.v_nb3 + u.g*a.v_nb2 + t*a.v_nb1;
#pragma unroll 1
    for (int i = 0; i < a.row_size; i += 128) {
        asm volatile("prefetch.global.L2 [%0];" :: "l"(k + i));
        asm volatile("prefetch.global.L2 [%0];" :: "l"(v + i));
    }
}

// What a block of fac found among its cells.
struct select_found {
    int      bin;    // of the candidates, -1 if there are none
    uint32_t lo;     // smallest key of a candidate
    uint32_t hi;     // smallest key that is selected for certain
    uint32_t n_sure; // selected cells of the block
    uint32_t n_own;  // candidates of this thread
    uint32_t n_rest; // candidates of the unit that are to be selected
};

static __device__ __forceinline__ uint4 select_keys(const attn_args & a, const uint32_t * key, int rank, int i) {
    const int t = select_cell(a, rank, i);
    return i < a.n_run && t < a.n_pad ? *(const uint4 *) (key + t) : make_uint4(KEY_HIDDEN, KEY_HIDDEN, KEY_HIDDEN, KEY_HIDDEN);
}

// Calls f(cell, key) for the cells of this thread whose key is in [lo, hi).
template <typename F>
static __device__ __forceinline__ void select_each(const attn_args & a, const uint32_t * key, int rank, uint32_t lo, uint32_t hi, F && f) {
#pragma unroll 1
    for (int i = 4*threadIdx.x; i < a.n_run; i += 4*FAC_THREAD) {
        const uint4 k4 = select_keys(a, key, rank, i);
        if (max(max(k4.x, k4.y), max(k4.z, k4.w)) < lo) {
            continue;
        }
        const int t0 = select_cell(a, rank, i);
#pragma unroll 1
        for (int t = t0; t < t0 + 4; ++t) { // rarely here: short code is worth more than few instructions
            const uint32_t k = key[t];
            if (k >= lo && k < hi) {
                f(t, k);
            }
        }
    }
}

// Filters the block's cells. list: the selected ones.
static __device__ select_found select_filter(const attn_args & a, const unit & u, int at_u, int rank, select_shared & sh, int32_t * list) {
    constexpr int HELD = 4; // keys that are asked for before the bin is known, in fours

    const uint32_t * key = a.key + (size_t) at_u*a.n_pad;
    uint4 held[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
        held[j] = select_keys(a, key, rank, 4*(threadIdx.x + j*FAC_THREAD));
    }

    select_found found;
    uint32_t above;
    find_bin(a.hist + at_u*N_BIN, N_BIN, a.budget, sh, &found.bin, &above);
    found.n_rest = found.bin >= 0 ? a.budget - above : 0;
    found.lo     = found.bin >= 0 ? bin_base(found.bin) : 1;
    found.hi     = bin_base(found.bin + 1);

    uint32_t n_sure = 0;
    uint32_t n_any  = 0;
    auto count = [&](const uint4 & k) {
        n_any  += (k.x >= found.lo) + (k.y >= found.lo) + (k.z >= found.lo) + (k.w >= found.lo);
        n_sure += (k.x >= found.hi) + (k.y >= found.hi) + (k.z >= found.hi) + (k.w >= found.hi);
    };
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
        count(held[j]);
    }
#pragma unroll 1
    for (int i = 4*(threadIdx.x + HELD*FAC_THREAD); i < a.n_run; i += 4*FAC_THREAD) {
        count(select_keys(a, key, rank, i));
    }
    if (n_any > 0 && a.row_size > 0) {
        select_each(a, key, rank, found.lo, 0xFFFFFFFFu, [&](int t, uint32_t) { prefetch_cell(a, u, t); });
    }
    found.n_own = n_any - n_sure;

    uint32_t at = block_scan(n_sure, sh.warps, &found.n_sure);
    if (n_sure > 0) {
        select_each(a, key, rank, found.hi, 0xFFFFFFFFu, [&](int t, uint32_t) { list[at++] = t; });
    }
    __syncthreads();
    return found;
}

// Hands the candidates of this thread to the unit, in any order.
static __device__ void select_offer(const attn_args & a, int at_u, int rank, const select_found & found) {
    if (found.n_own > 0) {
        uint64_t * to = a.cand + (size_t) at_u*a.n_pad + (uint32_t) atomicAdd((unsigned long long *) a.done + at_u, found.n_own);
        select_each(a, a.key + (size_t) at_u*a.n_pad, rank, found.lo, found.hi, [&](int t, uint32_t k) {
            __stcg((unsigned long long *) to++, (uint64_t) k << 32 | (uint32_t) ~t);
        });
    }
}

// The n_rest best of a unit's n_cand candidates into list, n_rest > 0.
static __device__ void select_rest(
        const attn_args & a, int at_u, select_shared & sh, int bin, uint32_t n_cand, uint32_t n_rest, int32_t * list) {
    const unsigned long long * cand = (const unsigned long long *) a.cand + (size_t) at_u*a.n_pad;

    if (n_cand <= FAC_THREAD) { // nearly always: each thread counts who comes before its candidate
        const uint64_t own = threadIdx.x < n_cand ? __ldcg(cand + threadIdx.x) : 0;
        sh.cand[threadIdx.x] = own;
        __syncthreads();
        if (threadIdx.x < n_cand) {
            uint32_t r = 0;
#pragma unroll 4
            for (uint32_t i = 0; i < n_cand; ++i) {
                r += sh.cand[i] > own;
            }
            if (r < n_rest) {
                list[r] = ~(uint32_t) own;
            }
        }
        __syncthreads();
        return;
    }

    // the n_rest-th largest candidate, digit by digit; all differ, since the cell is a part of them
    constexpr int DIGIT = 10;
    uint64_t least = 0;
    uint32_t need  = n_rest;
#pragma unroll 1
    for (int shift = 60; shift >= 0; shift -= DIGIT) {
        for (int b = threadIdx.x; b < (1 << DIGIT); b += FAC_THREAD) {
            sh.hist[b] = 0;
        }
        __syncthreads();
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < n_cand; i += FAC_THREAD) {
            const uint64_t c = __ldcg(cand + i);
            if (shift == 60 || c >> (shift + DIGIT) == least) {
                atomicAdd(&sh.hist[(c >> shift) & ((1u << DIGIT) - 1)], 1);
            }
        }
        __syncthreads();
        int      digit;
        uint32_t above;
        find_bin(sh.hist, 1 << DIGIT, need, sh, &digit, &above);
        need -= above;
        least = least << DIGIT | (uint32_t) digit;
    }

    // in the order of cells, which the candidates are not in
    const uint32_t * key = a.key + (size_t) at_u*a.n_pad;
    uint32_t first = 0;
#pragma unroll 1
    for (int t0 = 0; t0 < a.n_pad; t0 += FAC_THREAD) {
        const int      t    = t0 + threadIdx.x;
        const uint32_t k    = t < a.n_pad ? key[t] : KEY_HIDDEN;
        const bool     take = bin_of(k) == bin && ((uint64_t) k << 32 | (uint32_t) ~t) >= least;
        uint32_t n;
        const uint32_t r = first + block_scan(take, sh.warps, &n);
        if (take) {
            list[r] = t;
        }
        first += n;
    }
    __syncthreads();
}

} // namespace fasa
