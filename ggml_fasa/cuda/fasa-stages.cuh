// What the stages of the attention kernel share: its arguments, the memory that a team and a block work in, and two
// block-wide primitives. Letters as in ggml-fasa.h.

#pragma once

#include "fasa-launch.cuh"
#include "ggml-fasa.h"

namespace fasa {

constexpr int N_THREAD = 512;
constexpr int N_WARP   = N_THREAD/WARP_SIZE;
constexpr int MAX_TEAM = 32;   // blocks of a team: one lane for each
constexpr int BAND     = 128;  // cells that a warp scores at once: 4 tiles, 4 neighbouring cells for each lane
constexpr int N_BIN    = 2048; // of the histogram over the leading digit of keys

// A cell's key orders like its score, as an unsigned integer: 0 hidden, else the bits of the score (>= 0) plus 1.
constexpr uint32_t KEY_HIDDEN = 0;
constexpr uint32_t KEY_FORCED = 0x7F800001;

// Bins of the histogram: 64 for each power of two from 2^-27 on, where scores crowd (they are at most n_group), one for all
// that is smaller, and one for the forced cells.
constexpr int      BIN_SHIFT  = 17;
constexpr uint32_t BIN_FIRST  = (127 - 27) << (23 - BIN_SHIFT);
constexpr int      BIN_FORCED = N_BIN - 1;

static __device__ __forceinline__ int bin_of(uint32_t key) {
    if (key == KEY_HIDDEN || key == KEY_FORCED) {
        return key == KEY_HIDDEN ? -1 : BIN_FORCED;
    }
    return max((int) (key >> BIN_SHIFT) - (int) BIN_FIRST, 0);
}

// The smallest key of a bin.
static __device__ __forceinline__ uint32_t bin_base(int bin) {
    return bin == BIN_FORCED ? KEY_FORCED : bin == 0 ? 0 : (bin + BIN_FIRST) << BIN_SHIFT;
}

struct attn_args {
    const char    * q;
    const char    * k;
    const char    * v;
    const char    * mask;
    const float   * sinks;
    const char    * index;
    const int32_t * dims;
    float         * dst;

    size_t q_nb1, q_nb2, q_nb3;
    size_t k_nb1, k_nb2, k_nb3;
    size_t v_nb1, v_nb2, v_nb3;
    size_t mask_nb1, mask_nb3;
    size_t index_nb2, index_nb3;

    ggml_type k_type, v_type;
    bool      mask_f16;
    int       index_type, tile_size, hadamard;
    float     scale, softcap;
    int       budget;

    int n_kv, n_row, n_head_kv, n_group, d_k, d_v, n_dim;
    int n_unit;    // streams * rows * KV heads: a team works on one unit at a time
    int n_team;    // blocks of a team
    int n_cell;    // cells of a block, a multiple of BAND
    int n_slot;    // heads of a group, rounded up to what tip scores at once
    int n_fac;     // heads that fac serves at once
    team_sync sync;
    bool      w_shared; // whether the weights of a block's cells fit into shared memory

    char * scratch;     // of all teams
    size_t team_stride;
};

// Scratch of one team in global memory. Offsets in bytes, each a multiple of 16.
struct team_layout {
    size_t softmax, hist, count, sure, cand_key, cand_cell, sel, part, weight, total;

    __host__ __device__ team_layout(const attn_args & a) {
        size_t at = 0;
        softmax   = take(at, (size_t) a.n_team*a.n_group*2);
        hist      = take(at, N_BIN);
        count     = take(at, (size_t) a.n_team*2);
        sure      = take(at, (size_t) a.n_team*a.budget);
        cand_key  = take(at, (size_t) a.n_team*a.n_cell);
        cand_cell = take(at, (size_t) a.n_team*a.n_cell);
        sel       = take(at, a.budget);
        part      = take(at, (size_t) a.n_team*a.n_group*(a.d_v + 2));
        weight    = take(at, a.w_shared ? 0 : (size_t) a.n_team*a.n_cell*a.n_group);
        total     = at;
    }

private:
    static __host__ __device__ size_t take(size_t & at, size_t n_word) {
        const size_t was = at;
        at += (n_word*4 + 15)/16*16;
        return was;
    }
};

// Shared memory of a block. Offsets in floats, each a multiple of 4.
struct block_layout {
    size_t q, q_tip, head, hist, small, block, total;

    __host__ __device__ block_layout(const attn_args & a) {
        // block: weights of the block's cells, later the partial results of its warps
        const size_t weights = a.w_shared ? (size_t) a.n_cell*a.n_group : 0;
        const size_t parts   = (size_t) N_WARP*a.n_fac*((a.d_v + 2 + 3)/4*4);
        size_t at = 0;
        q     = take(at, (size_t) a.n_slot*a.d_k);
        q_tip = take(at, (size_t) (a.n_dim + 7)/8*8*a.n_slot);
        head  = take(at, (size_t) 3*a.n_slot);
        hist  = take(at, N_BIN);
        small = take(at, 4*(MAX_TEAM + 2) + 2*N_WARP + 8);
        block = take(at, weights > parts ? weights : parts);
        total = at;
    }

private:
    static __host__ __device__ size_t take(size_t & at, size_t n) {
        const size_t was = at;
        at += (n + 3)/4*4;
        return was;
    }
};

// The unit that a team works on.
struct unit {
    int s, t, g;

    __device__ unit(const attn_args & a, int u) : s(u/(a.n_head_kv*a.n_row)), t(u/a.n_head_kv%a.n_row), g(u%a.n_head_kv) {}
};

enum mask_kind { MASK_VISIBLE, MASK_HIDDEN, MASK_FORCED };

static __device__ __forceinline__ mask_kind mask_at(const char * mask, bool f16, int t) {
    const uint32_t m = f16 ? (uint32_t) ((const uint16_t *) mask)[t] << 16 : ((const uint32_t *) mask)[t];
    return m == (f16 ? 0xFC000000u : 0xFF800000u) ? MASK_HIDDEN : m == 0x80000000u ? MASK_FORCED : MASK_VISIBLE;
}

// Sum over the lanes of a warp.
static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = WARP_SIZE/2; o > 0; o /= 2) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, o);
    }
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int o = WARP_SIZE/2; o > 0; o /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, o));
    }
    return x;
}

// Sum of x over the threads before this one in the block; total over all. warps: N_WARP words of shared memory.
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
    for (int w = 0; w < N_WARP; ++w) {
        before += w < warp ? warps[w] : 0;
        all    += warps[w];
    }
    *total = all;
    return before + sum - x;
}

// The largest bin b with count[b] + count[b + 1] + ... >= need; above: the count beyond b. If the bins hold less than need,
// b is -1. result: two words of shared memory. load(b) gives count[b .. b + 3], b a multiple of 4.
template <int BINS, typename Load>
static __device__ __forceinline__ void find_bin(Load && load, uint32_t need, uint32_t * warps, int * result, int * bin, uint32_t * above) {
    static_assert(BINS <= 4*N_THREAD, "four bins for each thread");

    const int first = BINS - 4 - 4*(int) threadIdx.x; // threads go down from the last bin
    const uint4 n = first >= 0 ? load(first) : make_uint4(0, 0, 0, 0);

    if (threadIdx.x == 0) {
        result[0] = -1;
        result[1] = 0;
    }
    uint32_t total;
    uint32_t sum = block_scan(n.x + n.y + n.z + n.w, warps, &total);
    const uint32_t count[4] = { n.w, n.z, n.y, n.x };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (sum < need && sum + count[i] >= need) {
            result[0] = first + 3 - i;
            result[1] = sum;
        }
        sum += count[i];
    }
    __syncthreads();
    *bin   = result[0];
    *above = result[0] >= 0 ? result[1] : total;
}

} // namespace fasa
