// Stage select on CUDA: the budget best cells of a unit, by key descending then cell ascending, each block of the team
// naming its share of them.
//
// select_filter runs once the team's histogram is complete: the cells of a block that are selected for certain, and those
// in the bin where the budget ends. select_share then decides among the latter, the same way in every block.

#pragma once

#include "fasa-stages.cuh"

namespace fasa {

// Small words of shared memory.
struct select_shared {
    uint32_t * warps;    // [N_WARP]
    int      * result;   // [2]
    uint32_t * sure;     // [MAX_TEAM + 1] first rank of each block's certain cells
    uint32_t * cand;     // [MAX_TEAM + 1] the same of its candidates
};

// Adds the block's histogram to the team's.
static __device__ void select_count(const uint32_t * hist, uint32_t * team_hist) {
#pragma unroll 1
    for (int b = threadIdx.x; b < N_BIN; b += N_THREAD) {
        if (hist[b] > 0) {
            atomicAdd(&team_hist[b], hist[b]);
        }
    }
}

// keys: of the block's n_cell cells from cell0 on. sure: cell ids, ascending; cand_key, cand_cell: the candidates, ascending by
// cell, with their keys from the start of their bin. count: how many of either. Global memory of this block.
// Returns the bin of the candidates.
static __device__ int select_filter(
        const attn_args & a, const uint32_t * team_hist, const uint32_t * keys, int cell0, const select_shared & sh,
        int32_t * sure, uint32_t * cand_key, int32_t * cand_cell, uint32_t * count) {
    int      bin;
    uint32_t above;
    find_bin<N_BIN>([&](int b) { return __ldcg((const uint4 *) (team_hist + b)); }, a.budget, sh.warps, sh.result, &bin, &above);

    // every thread filters a run of cells, so that lists stay in order
    const int run = (a.n_cell/4 + N_THREAD - 1)/N_THREAD*4;
    const int i0  = min((int) threadIdx.x*run, a.n_cell);
    const int i1  = min(i0 + run, a.n_cell);

    uint32_t n_sure = 0;
    uint32_t n_cand = 0;
#pragma unroll 1
    for (int i = i0; i < i1; i += 4) {
        const uint4 key = *(const uint4 *) (keys + i);
        const int b[4] = { bin_of(key.x), bin_of(key.y), bin_of(key.z), bin_of(key.w) };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            n_sure += b[j] > bin;
            n_cand += b[j] == bin && bin >= 0;
        }
    }
    uint32_t all_sure, all_cand;
    uint32_t at_sure = block_scan(n_sure, sh.warps, &all_sure);
    uint32_t at_cand = block_scan(n_cand, sh.warps, &all_cand);

    if (n_sure + n_cand > 0) {
#pragma unroll 1
        for (int i = i0; i < i1; ++i) {
            const uint32_t key = keys[i];
            const int b = bin_of(key);
            if (b > bin) {
                __stcg(sure + at_sure++, cell0 + i);
            } else if (b == bin && bin >= 0) {
                __stcg(cand_key  + at_cand,   key - bin_base(bin)); // below 2^20, or 2^30 in the first bin
                __stcg(cand_cell + at_cand++, cell0 + i);
            }
        }
    }
    if (threadIdx.x == 0) {
        __stcg((uint2 *) count, make_uint2(all_sure, all_cand));
    }
    return bin;
}

// The block of the team whose list holds rank r, and the place in that list.
static __device__ __forceinline__ size_t find_rank(const uint32_t * first, int n_team, uint32_t r, size_t stride) {
    int b = 0;
#pragma unroll 1
    while (b + 1 < n_team && first[b + 1] <= r) {
        ++b;
    }
    return b*stride + (r - first[b]);
}

// This block's share of the selected cells: sel[r0 .. r1), in global memory. bin: of the candidates. hist: shared memory of N_BIN words.
// Returns r0 and r1.
static __device__ int2 select_share(
        const attn_args & a, int rank, int bin, const uint32_t * count, const int32_t * sure, const uint32_t * cand_key,
        const int32_t * cand_cell, const select_shared & sh, uint32_t * hist, int32_t * sel) {
    if (threadIdx.x < WARP_SIZE) {
        const int   lane = threadIdx.x;
        const uint2 n    = lane < a.n_team ? __ldcg((const uint2 *) count + lane) : make_uint2(0, 0);
        uint32_t s = n.x;
        uint32_t c = n.y;
#pragma unroll
        for (int o = 1; o < WARP_SIZE; o *= 2) {
            const uint32_t s_below = __shfl_up_sync(0xFFFFFFFFu, s, o);
            const uint32_t c_below = __shfl_up_sync(0xFFFFFFFFu, c, o);
            s += lane >= o ? s_below : 0;
            c += lane >= o ? c_below : 0;
        }
        sh.sure[lane + 1] = s;
        sh.cand[lane + 1] = c;
        if (lane == 0) {
            sh.sure[0] = 0;
            sh.cand[0] = 0;
        }
    }
    __syncthreads();

    const uint32_t n_sure = sh.sure[MAX_TEAM];
    const uint32_t n_cand = sh.cand[MAX_TEAM];
    const uint32_t n_take = min(n_cand, (uint32_t) a.budget - n_sure);
    const uint32_t n_sel  = n_sure + n_take;
    const uint32_t r0     = (uint32_t) ((uint64_t) n_sel* rank     /a.n_team);
    const uint32_t r1     = (uint32_t) ((uint64_t) n_sel*(rank + 1)/a.n_team);

#pragma unroll 1
    for (uint32_t r = r0 + threadIdx.x; r < min(r1, n_sure); r += N_THREAD) {
        sel[r] = __ldcg(sure + find_rank(sh.sure, a.n_team, r, a.budget));
    }
    if (r1 <= n_sure) { // the same for all threads
        __syncthreads();
        return make_int2(r0, r1);
    }

    if (n_cand <= N_THREAD) { // nearly always: each thread counts who comes before its candidate
        const size_t   at  = threadIdx.x < n_cand ? find_rank(sh.cand, a.n_team, threadIdx.x, a.n_cell) : 0;
        const uint32_t key = threadIdx.x < n_cand ? __ldcg(cand_key + at) : 0;
        hist[threadIdx.x] = key;
        __syncthreads();
        if (threadIdx.x < n_cand) {
            uint32_t r = n_sure;
#pragma unroll 4
            for (uint32_t i = 0; i < n_cand; ++i) {
                r += hist[i] > key || (hist[i] == key && i < threadIdx.x);
            }
            if (r >= r0 && r < r1) {
                sel[r] = __ldcg(cand_cell + at);
            }
        }
        __syncthreads();
        return make_int2(r0, r1);
    }

    // the n_take-th largest key, digit by digit; the first bin is wider than the others
    uint32_t threshold = 0;
    uint32_t n_equal   = n_cand; // candidates with exactly that key that are taken, the first ones
    if (n_take < n_cand) {
        constexpr int DIGIT = 10;
        const int top = bin == 0 ? 2*DIGIT : DIGIT;
        uint32_t prefix = 0;
        uint32_t need   = n_take;
#pragma unroll 1
        for (int shift = top; shift >= 0; shift -= DIGIT) {
#pragma unroll 1
            for (int b = threadIdx.x; b < (1 << DIGIT); b += N_THREAD) {
                hist[b] = 0;
            }
            __syncthreads();
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < n_cand; i += N_THREAD) {
                const uint32_t key = __ldcg(cand_key + find_rank(sh.cand, a.n_team, i, a.n_cell));
                if (shift == top || key >> (shift + DIGIT) == prefix) {
                    atomicAdd(&hist[(key >> shift) & ((1u << DIGIT) - 1)], 1);
                }
            }
            __syncthreads();
            int      digit;
            uint32_t above;
            find_bin<1 << DIGIT>([&](int b) { return *(const uint4 *) (hist + b); }, need, sh.warps, sh.result, &digit, &above);
            need  -= above;
            prefix = prefix << DIGIT | digit;
            __syncthreads();
        }
        threshold = prefix;
        n_equal   = need;
    }

    uint32_t greater = 0; // candidates before this round of the loop
    uint32_t equal   = 0;
#pragma unroll 1
    for (uint32_t i0 = 0; i0 < n_cand; i0 += N_THREAD) {
        const uint32_t i  = i0 + threadIdx.x;
        const bool     in = i < n_cand;
        const size_t   at = in ? find_rank(sh.cand, a.n_team, i, a.n_cell) : 0;
        const uint32_t key = in ? __ldcg(cand_key + at) : 0;
        const bool     g  = in && n_take < n_cand && key > threshold;
        const bool     e  = in && (n_take == n_cand || key == threshold);

        uint32_t total;
        const uint32_t before = block_scan((uint32_t) g << 16 | (uint32_t) e, sh.warps, &total);
        const uint32_t g_before = greater + (before >> 16);
        const uint32_t e_before = equal   + (before & 0xFFFF);
        if (g || (e && e_before < n_equal)) {
            const uint32_t r = n_sure + g_before + min(e_before, n_equal);
            if (r >= r0 && r < r1) {
                sel[r] = __ldcg(cand_cell + at);
            }
        }
        greater += total >> 16;
        equal   += total & 0xFFFF;
    }
    __syncthreads();
    return make_int2(r0, r1);
}

} // namespace fasa
