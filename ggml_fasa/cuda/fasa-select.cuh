// Stage select on CUDA: the budget best cells of a unit, by key descending then cell ascending.
//
// The blocks of a unit share its cells. Each turns scores into keys and counts them by their leading digit (select_count);
// the bin of the common histogram where the budget ends then splits the cells into selected ones, others, and candidates
// (select_offer); what the blocks offer as candidates is ranked exactly (select_cells). In between, they wait for each other.

#pragma once

#include "fasa-stages.cuh"

namespace fasa {

static_assert(4*FAC_THREAD == N_BIN, "a thread looks at four bins");

constexpr int N_OWN = 256; // cells at or above the threshold's bin that a block sorts at once
constexpr int OFFER = 32;  // candidates of a block that the others rank at once
static_assert(OFFER == WARP_SIZE && MAX_PART <= FAC_WARP, "a warp looks at what a block offers");

struct alignas(16) select_shared {
    uint32_t hist[N_BIN];
    uint64_t own[N_OWN];             // key << 32 | ~cell
    uint64_t mine[OFFER];            // what the block offers
    uint64_t cand[MAX_PART*OFFER];   // what all blocks offer
    uint64_t softmax[MAX_GROUP];     // what unit_sums has of a unit's only block
    float    shift[MAX_GROUP];       // of each head, what makes 2^(score - shift) its softmax
    float2   sums[MAX_GROUP][FAC_WARP];     // of tip
    uint32_t warps[FAC_WARP];
    uint32_t n_own, n_cand, n_offer; // cells in own, candidates of them, candidates of all blocks
    int      result[2];
    int      written[GGML_FASA_JOINED_MAX]; // see write_cells
};

// Sum of x over the threads before this one in the block; total over all.
static __device__ __forceinline__ uint32_t block_scan(uint32_t x, uint32_t * warps, uint32_t * total) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    auto scan = [&](uint32_t sum) {
#pragma unroll
        for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
            const uint32_t below = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
            sum += lane >= offset ? below : 0;
        }
        return sum;
    };
    const uint32_t sum = scan(x);
    __syncthreads(); // warps may still be read from the call before
    if (lane == WARP_SIZE - 1) {
        warps[warp] = sum;
    }
    __syncthreads();

    const uint32_t all = scan(lane < FAC_WARP ? warps[lane] : 0);
    *total = __shfl_sync(0xFFFFFFFFu, all, FAC_WARP - 1);
    const uint32_t before = __shfl_sync(0xFFFFFFFFu, all, (warp + WARP_SIZE - 1)%WARP_SIZE);
    return (warp > 0 ? before : 0) + sum - x;
}

// The largest bin b with hist[b] + hist[b + 1] + ... >= need, and the count beyond b; if all bins hold less than need, b is -1.
// n_bin: a multiple of 4, at most 4 for each thread.
struct bin_found {
    int      bin;
    uint32_t above;
};

static __device__ __noinline__ bin_found find_bin(const uint32_t * hist, int n_bin, uint32_t need, select_shared & sh) {
    const int first = n_bin - 4 - 4*(int) threadIdx.x; // threads go down from the last bin
    uint4 n = make_uint4(0, 0, 0, 0);
    if (first >= 0) {
        n = *(const uint4 *) (hist + first);
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
    if (total < need) {
        return { -1, total };
    }
    return { sh.result[0], (uint32_t) sh.result[1] };
}

// Softmax sums of a head over the cells of a block, when they are there. They are their own flags, and no fence is needed.
static __device__ __forceinline__ float2 wait_sums(
        const attn_args & a, const unit & u, const select_shared & sh, int block, int head) {
    const uint64_t * at = a.n_part > 1 ? a.sums[u.at].softmax[block] + head : nullptr;
    uint64_t now = sh.softmax[head];
    while (at) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(at) : "memory");
#else
        now = *(const volatile uint64_t *) at;
#endif
        if (now != 0) {
            break;
        }
    }
    return make_float2(__uint_as_float((uint32_t) now), __uint_as_float(now >> 32));
}

// Keys of the block's cells in the place of the first head's scores, and their histogram into that of the unit. score: of
// tip_scores. sh.hist must be zero.
template <int NH>
static __device__ __forceinline__ void select_count(const attn_args & a, const unit & u, select_shared & sh, float * score) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    if (warp < a.n_group) {
        const float2 x = softmax_sum(lane < a.n_part ? wait_sums(a, u, sh, lane, warp) : make_float2(SCORE_NONE, 0.0f));
        if (lane == 0) {
            sh.shift[warp] = x.y > 0.0f ? x.x + log2f(x.y) : INFINITY; // infinite: no weight
        }
    } else if (lane == 0) {
        sh.shift[warp] = INFINITY;
    }
    __syncthreads();

#pragma unroll 1
    for (int i = 4*threadIdx.x; i < a.n_run; i += 4*FAC_THREAD) {
        const uint4 first = *(const uint4 *) (score + i);
        float p[4] = {};
#pragma unroll 1
        for (int h0 = 0; h0 < a.n_group; h0 += NH) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                const float4 s = *(const float4 *) (score + min(h0 + h, a.n_group - 1)*a.n_run + i);
                const float shift = sh.shift[h0 + h];
                p[0] += exp2f(s.x - shift);
                p[1] += exp2f(s.y - shift);
                p[2] += exp2f(s.z - shift);
                p[3] += exp2f(s.w - shift);
            }
        }
        auto key_of = [](uint32_t bits, float importance) {
            return bits == 0xFF800000u ? KEY_HIDDEN : bits & 1 ? KEY_FORCED : __float_as_uint(importance) + 1;
        };
        const uint4 key = make_uint4(key_of(first.x, p[0]), key_of(first.y, p[1]), key_of(first.z, p[2]), key_of(first.w, p[3]));
        *(uint4 *) (score + i) = key;
        auto count = [&](uint32_t k) {
            if (k != KEY_HIDDEN) {
                atomicAdd(&sh.hist[bin_of(k)], 1);
            }
        };
        count(key.x);
        count(key.y);
        count(key.z);
        count(key.w);
    }
    __syncthreads();
    if (a.n_part > 1) {
#pragma unroll 1
        for (int b = threadIdx.x; b < N_BIN; b += FAC_THREAD) {
            if (sh.hist[b] > 0) {
                atomicAdd(a.sums[u.at].hist + b, sh.hist[b]);
            }
        }
    }
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

// Calls f(cell, key) for the cells of this thread whose key is at least lo. Such cells like to be neighbours: those are for other
// threads.
template <typename F>
static __device__ __forceinline__ void select_each(
        const attn_args & a, const unit & u, const uint32_t * key, uint32_t lo, F && f) {
    constexpr int N = 4; // looked at together
#pragma unroll 1
    for (int base = threadIdx.x; base < a.n_run; base += N*FAC_THREAD) {
        uint32_t k[N];
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const int i = base + c*FAC_THREAD;
            k[c] = i < a.n_run ? key[i] : KEY_HIDDEN;
        }
        if (max(max(k[0], k[1]), max(k[2], k[3])) < lo) {
            continue;
        }
#pragma unroll 1
        for (int i = base; i < a.n_run && i < base + N*FAC_THREAD; i += FAC_THREAD) { // rarely here: short code is worth more
            if (key[i] >= lo) {
                f(cell_of(a, u, i), key[i]);
            }
        }
    }
}

// Orders a cell like its key, and cells of one key from the first to the last. 0 of none.
static __device__ __forceinline__ uint64_t rank_of(int t, uint32_t key) {
    return (uint64_t) key << 32 | (uint32_t) ~t;
}

// The n_rest-th largest of a unit's candidates, digit by digit; all differ, since the cell is a part of them.
static __device__ uint64_t select_least(const attn_args & a, const unit & u, uint32_t n_rest, select_shared & sh) {
    constexpr int DIGIT = 10;
    const unsigned long long * cand = (const unsigned long long *) a.cand + (size_t) u.at*a.n_part*a.n_run;
    uint64_t least = 0;
#pragma unroll 1
    for (int shift = 60; shift >= 0; shift -= DIGIT) {
        __syncthreads();
        for (int b = threadIdx.x; b < (1 << DIGIT); b += FAC_THREAD) {
            sh.hist[b] = 0;
        }
        __syncthreads();
#pragma unroll 1
        for (int block = 0; block < a.n_part; ++block) {
            const uint32_t n = __ldcg(a.sync[u.at].n_cand + block);
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < n; i += FAC_THREAD) {
                const uint64_t c = __ldcg(cand + (size_t) block*a.n_run + i);
                if (shift == 60 || c >> (shift + DIGIT) == least) {
                    atomicAdd(&sh.hist[(c >> shift) & ((1u << DIGIT) - 1)], 1);
                }
            }
        }
        __syncthreads();
        const bin_found digit = find_bin(sh.hist, 1 << DIGIT, n_rest, sh);
        n_rest -= digit.above;
        least = least << DIGIT | (uint32_t) digit.bin;
    }
    return least;
}

// What select_cells does when there are many candidates or many cells to select. lo: smallest key of a candidate; n_rest:
// candidates to select, 0: all.
static __device__ __noinline__ int select_many(
        const attn_args & a, const unit u, select_shared & sh, const uint32_t * key, uint32_t lo, uint32_t n_rest,
        int32_t * list) {
    const uint64_t least = n_rest > 0 ? select_least(a, u, n_rest, sh) : (uint64_t) lo << 32;
    uint32_t own = 0;
    auto each = [&](auto && f) {
        select_each(a, u, key, lo, [&](int t, uint32_t k) {
            if (rank_of(t, k) >= least) {
                f(t);
            }
        });
    };
    each([&](int) { own++; });
    uint32_t n;
    uint32_t at = block_scan(own, sh.warps, &n);
    each([&](int t) { list[at++] = t; });
    __syncthreads();
    return n;
}

// Where select_cells got to before it waits for the other blocks.
struct select_state {
    uint32_t lo;     // smallest key of a candidate
    uint32_t hi;     // smallest key that is selected for certain
    uint32_t n_rest; // candidates to select; 0: there are none, all that is visible is selected
    uint32_t n_own;  // cells of the block with keys of at least lo; at most N_OWN of them are in the list, best first
};

constexpr int RANK_LANE = 8; // threads that rank one cell

// How many of the n numbers in x are larger than c, for all RANK_LANE threads of a cell. A warp calls it together.
static __device__ __forceinline__ uint32_t count_larger(const uint64_t * x, uint32_t n, uint64_t c) {
    uint32_t larger = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x%RANK_LANE; i < n; i += RANK_LANE) {
        larger += x[i] > c;
    }
#pragma unroll
    for (int o = 1; o < RANK_LANE; o *= 2) {
        larger += __shfl_xor_sync(0xFFFFFFFFu, larger, o);
    }
    return larger;
}

// First half of select: offers candidates, and puts the block's cells with keys of at least lo into list. key: of select_count.
// A unit's blocks call it together, after they have waited for each other for the turn before. sh: counts must be zero.
static __device__ __forceinline__ select_state select_offer(
        const attn_args & a, const unit & u, int turn, select_shared & sh, const uint32_t * key, int32_t * list) {
    unsigned long long * cand = (unsigned long long *) a.cand + ((size_t) u.at*a.n_part + u.rank)*a.n_run;

    const bin_found found = find_bin(a.n_part > 1 ? a.sums[u.at].hist : sh.hist, N_BIN, a.budget, sh);
    select_state now;
    now.lo     = found.bin >= 0 ? bin_base(found.bin) : 1;
    now.hi     = found.bin >= 0 ? bin_base(found.bin + 1) : now.lo;
    now.n_rest = found.bin >= 0 ? a.budget - found.above : 0;

    select_each(a, u, key, now.lo, [&](int t, uint32_t k) {
        const uint64_t rank = rank_of(t, k);
        prefetch_cell(a, u, t);
        const uint32_t at = atomicAdd(&sh.n_own, 1);
        if (at < N_OWN) {
            sh.own[at] = rank;
        }
        if (k < now.hi) {
            const uint32_t place = atomicAdd(&sh.n_cand, 1);
            if (place < OFFER) {
                sh.mine[place] = rank;
            }
            __stcg(cand + place, rank);
        }
    });
    __syncthreads();
    if (now.n_rest > 0) {
        if (threadIdx.x == 0) {
            __stcg(a.sync[u.at].n_cand + u.rank, sh.n_cand);
        }
        unit_arrive(a, u, turn);
    }

    // the place of a cell in the list: as many of the block's cells come before it
    now.n_own = sh.n_own;
#pragma unroll 1
    for (uint32_t base = 0; base < min(now.n_own, N_OWN); base += FAC_THREAD/RANK_LANE) {
        const uint32_t i = base + threadIdx.x/RANK_LANE;
        const uint64_t c = i < now.n_own && i < N_OWN ? sh.own[i] : 0;
        const uint32_t place = count_larger(sh.own, min(now.n_own, N_OWN), c);
        if (c != 0 && threadIdx.x%RANK_LANE == 0) {
            if (place < a.budget) {
                list[place] = ~(uint32_t) c;
            }
        }
    }
    __syncthreads();
    return now;
}

// Second half of select: the block's selected cells are the first of list; returns how many. Their order depends on keys and
// cells alone.
static __device__ __forceinline__ int select_cells(
        const attn_args & a, const unit & u, int turn, select_shared & sh, const select_state & now, const uint32_t * key,
        int32_t * list) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    if (now.n_rest == 0) {
        return now.n_own <= N_OWN ? now.n_own : select_many(a, u, sh, key, now.lo, 0, list);
    }
    unit_wait(a, u, turn);

    // warp b looks at what block b offers
    const unsigned long long * cand = (const unsigned long long *) a.cand + ((size_t) u.at*a.n_part + warp)*a.n_run;
    const uint64_t mine = warp < a.n_part ? __ldcg(cand + lane) : 0;
    const uint32_t n    = lane < a.n_part ? __ldcg(a.sync[u.at].n_cand + lane) : 0;
    if (now.n_own > N_OWN || __any_sync(0xFFFFFFFFu, n > OFFER)) {
        return select_many(a, u, sh, key, now.lo, now.n_rest, list);
    }
    if (lane < __shfl_sync(0xFFFFFFFFu, n, warp)) {
        sh.cand[atomicAdd(&sh.n_offer, 1)] = mine;
    }
    __syncthreads();
    const uint32_t i = threadIdx.x/RANK_LANE;
    static_assert(FAC_THREAD/RANK_LANE >= OFFER, "all are ranked at once");
    const uint32_t larger = count_larger(sh.cand, sh.n_offer, i < sh.n_cand ? sh.mine[i] : 0);
    const bool     take   = i < sh.n_cand && larger < now.n_rest;
    return now.n_own - sh.n_cand + __syncthreads_count(take && threadIdx.x%RANK_LANE == 0);
}

} // namespace fasa
