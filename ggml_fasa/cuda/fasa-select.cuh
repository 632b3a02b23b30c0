// Stage select on CUDA: the budget best cells of a unit, by key descending then cell ascending.
//
// The blocks of a unit share its cells. Each turns scores into keys and counts them by their leading digit (select_keys). If
// each tells the others its best cells, that is nearly always enough (select_by_offers). Else they add up their counts, and wait;
// the bin where the budget ends splits the cells into selected ones, others, and candidates (select_offer); they wait again, and
// rank the candidates (select_cells).

#pragma once

#include "fasa-stages.cuh"

namespace fasa {

static_assert(4*FAC_THREAD == N_BIN, "a thread looks at four bins");

constexpr int N_OWN     = 256; // cells at or above the threshold's bin that a block sorts at once
constexpr int OFFER     = 32;  // candidates of a block that the others rank at once
constexpr int MAX_CAND  = MAX_PART*OFFER;
constexpr int MIN_OFFER = 64;  // cells that a block offers, a power of two
constexpr int ALL_OFFER = 4*FAC_THREAD; // of the blocks of a unit
static_assert(OFFER == WARP_SIZE && MAX_PART <= FAC_WARP, "a warp looks at the candidates of a block");
static_assert(MAX_OFFER <= N_OWN, "a block sorts what it offers");

constexpr uint64_t NO_OFFER = 1;          // less than any rank
constexpr uint64_t BOUND    = 1ull << 32; // with the bound in the lower half

struct alignas(16) select_shared {
    uint32_t hist[N_BIN];
    uint64_t own[N_OWN];             // key << 32 | ~cell
    uint64_t mine[N_OWN];            // candidates of the block
    uint64_t cand[MAX_CAND];         // candidates of all blocks
    uint64_t softmax[MAX_GROUP];     // as in the block's letter
    float    shift[MAX_GROUP];       // of each head, what makes 2^(score - shift) its softmax
    float2   sums[MAX_GROUP][FAC_WARP];     // of tip
    uint32_t warps[FAC_WARP];
    uint32_t n_own, n_cand, n_all;   // cells in own, candidates of them, candidates of all blocks
    uint32_t bound;                  // a cell that its block has not offered has a smaller key
    int      result[2];
    int      written[GGML_FASA_JOINED_MAX]; // see write_cells
};

// Sum of x over the lanes up to this one.
static __device__ __forceinline__ uint32_t warp_scan(uint32_t x) {
#pragma unroll
    for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
        const uint32_t below = __shfl_up_sync(0xFFFFFFFFu, x, offset);
        x += (int) threadIdx.x%WARP_SIZE >= offset ? below : 0;
    }
    return x;
}

// Sum of x over the threads of the warps before this one; total over all. x_warp: sum of x over this warp. warps: not read any more
// from a call before.
static __device__ __forceinline__ uint32_t warps_before(uint32_t x_warp, uint32_t * warps, uint32_t * total) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    if (lane == 0) {
        warps[warp] = x_warp;
    }
    __syncthreads();
    const int of_lane = lane < FAC_WARP ? warps[lane] : 0;
    *total = warp_reduce_sum(of_lane);
    return warp_reduce_sum(lane < warp ? of_lane : 0);
}

// The largest bin b with hist[b] + hist[b + 1] + ... >= need, and the count beyond b; if all bins hold less than need, b is -1.
// n_bin: a multiple of 4, at most 4 for each thread. above, if given: may be hist, gets the count beyond each bin from b on.
struct bin_found {
    int      bin;
    uint32_t above;
};

static __device__ __noinline__ bin_found find_bin(
        const uint32_t * hist, int n_bin, uint32_t need, select_shared & sh, uint32_t * above = nullptr) {
    const int first = n_bin - 4 - 4*(int) threadIdx.x; // threads go down from the last bin
    uint4 n = make_uint4(0, 0, 0, 0);
    if (first >= 0) {
        n = *(const uint4 *) (hist + first);
    }
    const uint32_t mine   = n.x + n.y + n.z + n.w;
    const uint32_t x_warp = warp_reduce_sum((int) mine);
    uint32_t total;
    uint32_t sum = warps_before(x_warp, sh.warps, &total);
    if (sum < need) {
        sum += warp_scan(mine) - mine;
        const uint32_t count[4] = { n.w, n.z, n.y, n.x };
        uint32_t beyond[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (sum < need && sum + count[i] >= need) {
                sh.result[0] = first + 3 - i;
                sh.result[1] = sum;
            }
            beyond[i] = sum;
            sum += count[i];
        }
        if (above && first >= 0) {
            *(uint4 *) (above + first) = make_uint4(beyond[3], beyond[2], beyond[1], beyond[0]);
        }
    }
    __syncthreads();
    if (total < need) {
        return { -1, total };
    }
    return { sh.result[0], (uint32_t) sh.result[1] };
}

static __device__ __forceinline__ void count_key(select_shared & sh, uint32_t key) {
    if (key != KEY_HIDDEN) {
        atomicAdd(&sh.hist[bin_of(key)], 1);
    }
}

// Keys of the block's cells in the place of the first head's scores, and their histogram into sh.hist, which must be zero.
// score: of tip_scores.
template <int NH>
static __device__ __forceinline__ void select_keys(const attn_args & a, const unit & u, select_shared & sh, float * score) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    if (warp < a.n_group) {
        float2 x = make_float2(SCORE_NONE, 0.0f);
        if (lane < a.n_part) {
            x = unpack(a.n_part > 1 ? read_word(letter_of(a, u, lane).softmax + warp) : sh.softmax[warp]);
        }
        x = softmax_sum(x);
        if (lane == 0) {
            sh.shift[warp] = x.y > 0.0f ? x.x + log2f(x.y) : INFINITY; // infinite: no weight
        }
    } else if (lane == 0) {
        sh.shift[warp] = INFINITY;
    }
    __syncthreads();

    auto key_of = [](uint32_t bits, float importance) {
        return bits == 0xFF800000u ? KEY_HIDDEN : bits & 1 ? KEY_FORCED : __float_as_uint(importance) + 1;
    };
#pragma unroll 1
    for (int i = 4*threadIdx.x; i < a.n_even; i += 4*FAC_THREAD) {
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
        const uint4 key = make_uint4(key_of(first.x, p[0]), key_of(first.y, p[1]), key_of(first.z, p[2]), key_of(first.w, p[3]));
        *(uint4 *) (score + i) = key;
        count_key(sh, key.x);
        count_key(sh, key.y);
        count_key(sh, key.z);
        count_key(sh, key.w);
    }
#pragma unroll 1
    for (int i = a.n_even + threadIdx.x; i < a.n_run; i += FAC_THREAD) {
        float p = 0.0f;
#pragma unroll 4
        for (int h = 0; h < a.n_group; ++h) {
            p += exp2f(score[h*a.n_run + i] - sh.shift[h]);
        }
        const uint32_t key = key_of(__float_as_uint(score[i]), p);
        ((uint32_t *) score)[i] = key;
        count_key(sh, key);
    }
    __syncthreads();
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

// Calls f(cell, key) for the cells of this thread whose key is at least lo, which is not 0. Such cells like to be neighbours:
// those are for other threads.
template <typename F>
static __device__ __forceinline__ void select_each(
        const attn_args & a, const unit & u, const uint32_t * key, uint32_t lo, F && f) {
    constexpr int N = 16; // looked at together
#pragma unroll 1
    for (int base = threadIdx.x; base < a.n_run; base += N*FAC_THREAD) {
        uint32_t k[N];
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const int i = base + c*FAC_THREAD;
            k[c] = i < a.n_run ? key[i] : KEY_HIDDEN;
        }
        uint32_t found = 0;
#pragma unroll
        for (int c = 0; c < N; ++c) {
            found |= k[c] >= lo ? 1u << c : 0;
        }
#pragma unroll 1
        for (; found != 0; found &= found - 1) {
            const int i = base + (__ffs(found) - 1)*FAC_THREAD;
            f(cell_of(a, u, i), key[i]);
        }
    }
}

// Orders a cell like its key, and cells of one key from the first to the last. 0 of none.
static __device__ __forceinline__ uint64_t rank_of(int t, uint32_t key) {
    return (uint64_t) key << 32 | (uint32_t) ~t;
}

constexpr int RANK_LANE = 8; // threads that rank one cell

// How many of the n numbers in x are larger than c, for all RANK_LANE threads of a cell. A warp calls it together.
static __device__ __forceinline__ uint32_t count_larger(const uint64_t * x, uint32_t n, uint64_t c) {
    uint32_t larger = 0;
#pragma unroll 4
    for (uint32_t i = 2*(threadIdx.x%RANK_LANE); i < n; i += 2*RANK_LANE) {
        const ulonglong2 two = *(const ulonglong2 *) (x + i);
        larger += two.x > c;
        larger += i + 1 < n && two.y > c;
    }
#pragma unroll
    for (int o = 1; o < RANK_LANE; o *= 2) {
        larger += __shfl_xor_sync(0xFFFFFFFFu, larger, o);
    }
    return larger;
}

// How many of the block's candidates, sh.mine, are among the n_rest best of all, sh.cand.
static __device__ __forceinline__ int rank_candidates(const select_shared & sh, uint32_t n_rest) {
    int n = 0;
#pragma unroll 1
    for (uint32_t base = 0; base < sh.n_cand; base += FAC_THREAD/RANK_LANE) {
        const uint32_t i      = base + threadIdx.x/RANK_LANE;
        const uint32_t larger = count_larger(sh.cand, sh.n_all, i < sh.n_cand ? sh.mine[i] : 0);
        n += __syncthreads_count(i < sh.n_cand && larger < n_rest && threadIdx.x%RANK_LANE == 0);
    }
    return n;
}

// The block's cells in sh.own, the first n of them, into list, best first. The list depends on keys and cells alone.
static __device__ __forceinline__ void sort_own(const attn_args & a, const select_shared & sh, uint32_t n, int32_t * list) {
#pragma unroll 1
    for (uint32_t base = 0; base < n; base += FAC_THREAD/RANK_LANE) {
        const uint32_t i = base + threadIdx.x/RANK_LANE;
        const uint64_t c = i < n ? sh.own[i] : 0;
        const uint32_t place = count_larger(sh.own, n, c);
        if (c != 0 && threadIdx.x%RANK_LANE == 0 && place < a.budget) {
            list[place] = ~(uint32_t) c;
        }
    }
    __syncthreads();
}

constexpr int BIN_LANE = 4; // threads that rank one cell among those of its bin

// As sort_own, of cells that lie bin by bin, the last bin first. sh.hist: of each of these bins, where the next one begins.
static __device__ __forceinline__ void sort_bins(const attn_args & a, const select_shared & sh, uint32_t n, int32_t * list) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x/BIN_LANE; i < GGML_PAD(n, WARP_SIZE/BIN_LANE); i += FAC_THREAD/BIN_LANE) { // a warp together
        const uint64_t c   = i < n ? sh.own[i] : 0;
        const int      bin = i < n ? bin_of(c >> 32) : 0;
        const uint32_t end = i < n ? sh.hist[bin] : 0;
        uint32_t place = bin < BIN_FORCED ? sh.hist[bin + 1] : 0;
        uint32_t larger = 0;
#pragma unroll 1
        for (uint32_t j = place + threadIdx.x%BIN_LANE; j < end; j += BIN_LANE) {
            larger += sh.own[j] > c;
        }
#pragma unroll
        for (int o = 1; o < BIN_LANE; o *= 2) {
            larger += __shfl_xor_sync(0xFFFFFFFFu, larger, o);
        }
        place += larger;
        if (i < n && threadIdx.x%BIN_LANE == 0 && place < a.budget) {
            list[place] = ~(uint32_t) c;
        }
    }
    __syncthreads();
}

// Select with one wait. Each block offers its best cells, as many as n_offer of them by whole bins, and tells the bound below
// which it has others. The budget best of all offers are the selected cells unless one of them is below a bound. Returns how many
// the block has of them, the first of list; -1 if offers do not tell. meanwhile(n): called when only the others are waited for,
// with n cells in the list, in which the selected ones are the first.
template <typename F>
static __device__ __forceinline__ int select_by_offers(
        const attn_args & a, const unit & u, select_shared & sh, const uint32_t * key, int32_t * list, F && meanwhile) {
    constexpr int N = ALL_OFFER/FAC_THREAD;

    const bin_found own = find_bin(sh.hist, N_BIN, a.n_offer + 1, sh, sh.hist);
    const uint32_t n_own = own.above;
    const uint32_t lo    = own.bin >= 0 ? bin_base(own.bin + 1) : 1;
    select_each(a, u, key, lo, [&](int t, uint32_t k) {
        sh.own[atomicAdd(&sh.hist[bin_of(k)], 1)] = rank_of(t, k);
    });
    __syncthreads();
    block_letter & mine = letter_of(a, u, u.rank);
    if (threadIdx.x < a.n_offer) {
        put_word(mine.offers + threadIdx.x, threadIdx.x < n_own ? sh.own[threadIdx.x] : NO_OFFER);
    }
    if (threadIdx.x == 0) {
        put_word(&mine.bound, BOUND | (own.bin >= 0 ? lo : 0));
    }
    sort_bins(a, sh, n_own, list);
    ((uint4 *) sh.hist)[threadIdx.x] = make_uint4(0, 0, 0, 0); // now for the offers
    meanwhile(min((int) n_own, a.budget));

    uint64_t seen[N];
    const uint64_t * at[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int o = i*FAC_THREAD + threadIdx.x;
        at[i]   = letter_of(a, u, min(o/a.n_offer, a.n_part - 1)).offers + o%a.n_offer;
        seen[i] = o < a.n_part*a.n_offer ? look_at_word(at[i]) : NO_OFFER;
    }
    if (threadIdx.x < a.n_part) {
        atomicMax(&sh.bound, (uint32_t) read_word(&letter_of(a, u, threadIdx.x).bound));
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (seen[i] == 0) {
            seen[i] = read_word(at[i]);
        }
        count_key(sh, seen[i] >> 32);
    }
    __syncthreads();
    const bin_found found = find_bin(sh.hist, N_BIN, a.budget, sh);
    if (found.bin < 0) {
        return sh.bound == 0 ? (int) n_own : -1;
    }
    const uint32_t least = bin_base(found.bin);     // of the candidates
    const uint32_t most  = bin_base(found.bin + 1); // is selected for certain
    if (least < sh.bound) {
        return -1;
    }
    auto is_candidate = [&](uint64_t rank) {
        return rank >> 32 >= least && rank >> 32 < most;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (is_candidate(seen[i])) {
            const uint32_t place = atomicAdd(&sh.n_all, 1);
            if (place < MAX_CAND) {
                sh.cand[place] = seen[i];
            }
        }
    }
    const uint64_t my_own = threadIdx.x < n_own ? sh.own[threadIdx.x] : 0;
    if (is_candidate(my_own)) {
        sh.mine[atomicAdd(&sh.n_cand, 1)] = my_own;
    }
    const int n_sure = __syncthreads_count(my_own >> 32 >= most);
    if (sh.n_all > MAX_CAND) {
        return -1;
    }
    return n_sure + rank_candidates(sh, a.budget - found.above);
}

// The block's keys in sh.hist again, after select_by_offers has counted offers there.
static __device__ __noinline__ void select_recount(const attn_args & a, const unit u, select_shared & sh, const uint32_t * key) {
    __syncthreads();
    ((uint4 *) sh.hist)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
        sh.n_cand = sh.n_all = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < a.n_run; i += FAC_THREAD) {
        count_key(sh, key[i]);
    }
    __syncthreads();
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
    const uint32_t up_to = warp_scan(own);
    uint32_t at = warps_before(__shfl_sync(0xFFFFFFFFu, up_to, WARP_SIZE - 1), sh.warps, &n) + up_to - own;
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

// First half of select with two waits, or with none for a unit's only block: offers candidates, and puts the block's cells with
// keys of at least lo into list. key: of select_keys. A unit's blocks call it together. sh: of select_keys, counts must be zero.
static __device__ __forceinline__ select_state select_offer(
        const attn_args & a, const unit & u, select_shared & sh, const uint32_t * key, int32_t * list) {
    unsigned long long * cand = (unsigned long long *) a.cand + ((size_t) u.at*a.n_part + u.rank)*a.n_run;

    if (threadIdx.x < OFFER) { // others read so many
        __stcg(cand + threadIdx.x, 0);
    }
    if (a.n_part > 1) {
#pragma unroll 1
        for (int b = threadIdx.x; b < N_BIN; b += FAC_THREAD) {
            if (sh.hist[b] > 0) {
                atomicAdd(hist_of(a, u) + b, sh.hist[b]);
            }
        }
    }
    unit_arrive(a, u, 1);
    unit_wait(a, u, 1);
    const bin_found found = find_bin(a.n_part > 1 ? hist_of(a, u) : sh.hist, N_BIN, a.budget, sh);
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
        unit_arrive(a, u, 2);
    }
    now.n_own = sh.n_own;
    sort_own(a, sh, min(now.n_own, N_OWN), list);
    return now;
}

// Second half: the block's selected cells are the first of list; returns how many.
static __device__ __forceinline__ int select_cells(
        const attn_args & a, const unit & u, select_shared & sh, const select_state & now, const uint32_t * key, int32_t * list) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    if (now.n_rest == 0) {
        return now.n_own <= N_OWN ? now.n_own : select_many(a, u, sh, key, now.lo, 0, list);
    }
    unit_wait(a, u, 2);

    // warp b looks at what block b offers
    const unsigned long long * cand = (const unsigned long long *) a.cand + ((size_t) u.at*a.n_part + warp)*a.n_run;
    const uint64_t mine = warp < a.n_part ? __ldcg(cand + lane) : 0;
    const uint32_t n    = lane < a.n_part ? __ldcg(a.sync[u.at].n_cand + lane) : 0;
    if (now.n_own > N_OWN || __any_sync(0xFFFFFFFFu, n > OFFER)) {
        return select_many(a, u, sh, key, now.lo, now.n_rest, list);
    }
    if (lane < __shfl_sync(0xFFFFFFFFu, n, warp)) {
        sh.cand[atomicAdd(&sh.n_all, 1)] = mine;
    }
    __syncthreads();
    return now.n_own - sh.n_cand + rank_candidates(sh, now.n_rest);
}

} // namespace fasa
