// Stage select on CUDA: the budget best cells of a unit, by key descending then cell ascending.
//
// The blocks of a unit share its cells. Each turns scores into keys and counts them by their leading digit (select_count); the bin
// of the common histogram where the budget ends then splits the cells into selected ones, others, and candidates; what
// the blocks offer as candidates is ranked exactly (select_cells). In between, the blocks wait for each other.

#pragma once

#include "fasa-stages.cuh"

namespace fasa {

constexpr int SHARE = 7; // 1 << SHARE neighbouring cells belong to one block

constexpr int FAC_THREAD = 512;
constexpr int FAC_WARP   = FAC_THREAD/WARP_SIZE;
static_assert(4*FAC_THREAD == N_BIN, "a thread looks at four bins");

constexpr int OFFER = 32; // candidates of a block that the others rank at once
static_assert(OFFER == WARP_SIZE && MAX_PART*OFFER <= FAC_THREAD, "a warp looks at what a block offers");

struct alignas(16) select_shared {
    uint32_t hist[N_BIN];
    uint64_t cand[FAC_THREAD]; // what this block offers, then what all do
    uint32_t n_cand;           // candidates of this block
    float    shift[16];        // of each head, what makes 2^(score - shift) its softmax
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

// The four bins that this thread looks at in find_bin start here, if not below 0; n_bin: a multiple of 4, at most 4 a thread.
static __device__ __forceinline__ int first_bin(int n_bin) {
    return n_bin - 4 - 4*(int) threadIdx.x; // threads go down from the last bin
}

// The largest bin b with hist[b] + hist[b + 1] + ... >= need; above: the count beyond b. If all bins hold less than need, b is
// -1. n: the counts from bin first on, of first_bin.
static __device__ __forceinline__ void find_bin(
        const uint4 & n, int first, uint32_t need, select_shared & sh, int * bin, uint32_t * above) {
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

// Cell i of the n_run of block rank of a unit. May be beyond n_pad.
static __device__ __forceinline__ int select_cell(const attn_args & a, int rank, int i) {
    return (((i >> a.share)*a.n_part + rank) << a.share) + (i & ((1 << a.share) - 1));
}

// The shift of every head, from the softmax sums of tip's blocks.
static __device__ void select_softmax(const attn_args & a, int at_u, select_shared & sh) {
    const int lane = threadIdx.x%WARP_SIZE;
    const float2 * softmax = a.softmax + (size_t) at_u*a.n_scan*a.n_group;
    for (int h = threadIdx.x/WARP_SIZE; h < 16; h += FAC_WARP) {
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
            sh.shift[h] = all > -INFINITY ? all + log2f(sum) : INFINITY; // infinite: no weight
        }
    }
    __syncthreads();
}

// Keys of the block's cells into key[n_run], and their histogram into that of the unit. sh.hist must be zero.
static __device__ void select_count(const attn_args & a, const unit & u, int at_u, int rank, select_shared & sh, uint32_t * key) {
    constexpr int HEADS = 4; // scores of so many heads, and of so many turns,
    constexpr int TURNS = 2; // are on their way while others are worked on
    constexpr int STEP  = 4*FAC_THREAD;

    const char  * mask  = a.mask  + u.s*a.mask_nb3 + u.t*a.mask_nb1;
    const float * score = a.score + (size_t) at_u*a.n_group*a.n_pad;

    float4    held[TURNS][HEADS];
    mask_four four[TURNS];
    auto load = [&](int turn, int i) {
        const int t = select_cell(a, rank, i);
        if (i < a.n_run && t < a.n_pad) {
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                held[turn][h] = h < a.n_group ?
                    *(const float4 *) (score + (size_t) h*a.n_pad + t) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            four[turn].load(a, mask, t);
        }
    };
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        load(turn, 4*threadIdx.x + turn*STEP);
    }
    select_softmax(a, at_u, sh);

#pragma unroll 1
    for (int first = 4*threadIdx.x; first < a.n_run; first += TURNS*STEP) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int i = first + turn*STEP;
            const int t = select_cell(a, rank, i);
            if (i >= a.n_run) {
                break;
            }
            uint32_t k[4] = { KEY_HIDDEN, KEY_HIDDEN, KEY_HIDDEN, KEY_HIDDEN };
            if (t < a.n_pad) {
                float p[4] = {};
                auto add = [&](const float4 & s, float shift) {
                    p[0] += exp2f(s.x - shift);
                    p[1] += exp2f(s.y - shift);
                    p[2] += exp2f(s.z - shift);
                    p[3] += exp2f(s.w - shift);
                };
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    add(held[turn][h], sh.shift[h]);
                }
#pragma unroll 1
                for (int h = HEADS; h < a.n_group; ++h) {
                    add(*(const float4 *) (score + (size_t) h*a.n_pad + t), sh.shift[h]);
                }
                const uint32_t bits = four[turn].bits(a, mask, t);
                load(turn, i + TURNS*STEP);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    k[c] = bits >> c & 0x01 ? KEY_HIDDEN : bits >> c & 0x10 ? KEY_FORCED : __float_as_uint(p[c]) + 1;
                    if (k[c] != KEY_HIDDEN) {
                        atomicAdd(&sh.hist[bin_of(k[c])], 1);
                    }
                }
            }
            *(uint4 *) (key + i) = make_uint4(k[0], k[1], k[2], k[3]);
        }
    }
    __syncthreads();
    for (int b = threadIdx.x; b < N_BIN; b += FAC_THREAD) {
        if (sh.hist[b] > 0) {
            atomicAdd(&a.hist[at_u*N_BIN + b], sh.hist[b]);
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

// Calls f(cell, key) for the cells of this thread whose key is at least lo.
template <typename F>
static __device__ __forceinline__ void select_each(const attn_args & a, const uint32_t * key, int rank, uint32_t lo, F && f) {
#pragma unroll 1
    for (int i = 4*threadIdx.x; i < a.n_run; i += 4*FAC_THREAD) {
        const uint4 k4 = *(const uint4 *) (key + i);
        if (max(max(k4.x, k4.y), max(k4.z, k4.w)) < lo) {
            continue;
        }
        const int t = select_cell(a, rank, i);
#pragma unroll 1
        for (int c = 0; c < 4; ++c) { // rarely here: short code is worth more than few instructions
            const uint32_t k = key[i + c];
            if (k >= lo) {
                f(t + c, k);
            }
        }
    }
}

// The n_rest-th largest of a unit's candidates, digit by digit; all differ, since the cell is a part of them.
static __device__ uint64_t select_least(
        const attn_args & a, const unit_sync * sync, const unsigned long long * cand, uint32_t n_rest, select_shared & sh) {
    constexpr int DIGIT = 10;
    uint64_t least = 0;
#pragma unroll 1
    for (int shift = 60; shift >= 0; shift -= DIGIT) {
        for (int b = threadIdx.x; b < (1 << DIGIT); b += FAC_THREAD) {
            sh.hist[b] = 0;
        }
        __syncthreads();
#pragma unroll 1
        for (int block = 0; block < a.n_part; ++block) {
            const uint32_t n = __ldcg(sync->n_cand + block);
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < n; i += FAC_THREAD) {
                const uint64_t c = __ldcg(cand + (size_t) block*a.n_run + i);
                if (shift == 60 || c >> (shift + DIGIT) == least) {
                    atomicAdd(&sh.hist[(c >> shift) & ((1u << DIGIT) - 1)], 1);
                }
            }
        }
        __syncthreads();
        int      digit;
        uint32_t above;
        const int first = first_bin(1 << DIGIT);
        find_bin(first >= 0 ? *(const uint4 *) (sh.hist + first) : make_uint4(0, 0, 0, 0), first, n_rest, sh, &digit, &above);
        n_rest -= above;
        least = least << DIGIT | (uint32_t) digit;
    }
    return least;
}

// The block's selected cells into list, in an order that depends on keys and cells alone; returns how many. key: of select_count.
// A unit's blocks call it together, after they have waited for each other once.
static __device__ int select_cells(
        const attn_args & a, const unit & u, int at_u, int rank, select_shared & sh, const uint32_t * key, int32_t * list) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    unsigned long long * cand = (unsigned long long *) a.cand + (size_t) at_u*a.n_part*a.n_run;
    unit_sync * sync = a.sync + at_u;

    int      bin;
    uint32_t above;
    const int first = first_bin(N_BIN);
    find_bin(__ldcg((const uint4 *) (a.hist + at_u*N_BIN + first)), first, a.budget, sh, &bin, &above);
    const uint32_t lo     = bin >= 0 ? bin_base(bin) : 1; // smallest key of a candidate
    const uint32_t hi     = bin_base(bin + 1);            // smallest key that is selected for certain
    const uint32_t n_rest = bin >= 0 ? a.budget - above : 0;

    // what is selected for certain is counted, candidates are offered: the first ones by way of shared memory, padded with 0
    uint32_t own = 0;
    select_each(a, key, rank, lo, [&](int t, uint32_t k) {
        prefetch_cell(a, u, t);
        if (k >= hi) {
            own++;
            return;
        }
        const uint64_t c  = (uint64_t) k << 32 | (uint32_t) ~t;
        const uint32_t at = atomicAdd(&sh.n_cand, 1);
        if (at < OFFER) {
            sh.cand[at] = c;
        } else {
            __stcg(cand + (size_t) rank*a.n_run + at, c);
        }
    });
    if (n_rest > 0) {
        __syncthreads();
        if (warp == 0) {
            __stcg(cand + (size_t) rank*a.n_run + lane, sh.cand[lane]);
            if (lane == 0) {
                __stcg(sync->n_cand + rank, sh.n_cand);
            }
        }
        unit_arrive(a, sync);
    }
    uint32_t n_sure;
    uint32_t at = block_scan(own, sh.warps, &n_sure);
    if (own > 0) {
        select_each(a, key, rank, hi, [&](int t, uint32_t) { list[at++] = t; });
    }
    if (n_rest == 0) {
        __syncthreads();
        return n_sure;
    }
    unit_wait(a, sync, 2);

    // warp b looks at what block b offers
    const uint64_t mine = warp < a.n_part ? __ldcg(cand + (size_t) warp*a.n_run + lane) : 0;
    const uint32_t n    = lane < a.n_part ? __ldcg(sync->n_cand + lane) : 0;
    if (!__any_sync(0xFFFFFFFFu, n > OFFER)) { // nearly always: each thread counts who comes before its candidate
        uint32_t end = n; // of the candidates of blocks up to this lane
#pragma unroll
        for (int o = 1; o < MAX_PART; o *= 2) {
            const uint32_t below = __shfl_up_sync(0xFFFFFFFFu, end, o);
            end += lane >= o ? below : 0;
        }
        const uint32_t n_cand = __shfl_sync(0xFFFFFFFFu, end, MAX_PART - 1);
        const uint32_t start  = __shfl_sync(0xFFFFFFFFu, end - n, warp);
        const uint32_t n_mine = __shfl_sync(0xFFFFFFFFu, n, warp);
        if (lane < n_mine) {
            sh.cand[start + lane] = mine;
        }
        const uint32_t start_here = __shfl_sync(0xFFFFFFFFu, end - n, rank);
        const uint32_t n_here     = __shfl_sync(0xFFFFFFFFu, n, rank);
        __syncthreads();
        uint32_t before      = 0;
        uint32_t before_here = 0;
        uint64_t c           = 0;
        if (threadIdx.x < n_here) {
            c = sh.cand[start_here + threadIdx.x];
#pragma unroll 4
            for (uint32_t i = 0; i < n_cand; ++i) {
                const bool larger = sh.cand[i] > c;
                before      += larger;
                before_here += larger && i - start_here < n_here;
            }
        }
        const bool take = threadIdx.x < n_here && before < n_rest;
        if (take) {
            list[n_sure + before_here] = ~(uint32_t) c;
        }
        return n_sure + __syncthreads_count(take);
    }

    const uint64_t least = select_least(a, sync, cand, n_rest, sh);
    auto each = [&](auto && f) {
        select_each(a, key, rank, lo, [&](int t, uint32_t k) {
            if (k < hi && ((uint64_t) k << 32 | (uint32_t) ~t) >= least) {
                f(t);
            }
        });
    };
    own = 0;
    each([&](int) { own++; });
    uint32_t n_more;
    at = n_sure + block_scan(own, sh.warps, &n_more);
    each([&](int t) { list[at++] = t; });
    __syncthreads();
    return n_sure + n_more;
}

} // namespace fasa
