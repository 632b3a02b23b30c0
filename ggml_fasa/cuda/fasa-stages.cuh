// What the kernels of the stages share: their arguments, the scratch memory between them, and a few primitives.
// Letters as in ggml-fasa.h.

#pragma once

#include "fasa-launch.cuh"
#include "fasa-row-cache.cuh"
#include "ggml-fasa.h"

namespace fasa {

constexpr int BAND  = 128;  // cells that a warp serves at once: 4 tiles, 4 neighbouring cells for each lane
constexpr int N_BIN = 2048; // of the histogram over the leading digit of keys

constexpr float LOG2E = 1.44269504f;

// A cell's key orders like its score, as an unsigned integer: 0 hidden, else the bits of the score (>= 0) plus 1.
constexpr uint32_t KEY_HIDDEN = 0;
constexpr uint32_t KEY_FORCED = 0x7F800001;

// Bins of the histogram: 64 for each power of two from 2^-24 on (scores are at most n_group), where flat heads have their
// scores close together, 2 for each from 2^-122 on, as sharp heads need, one for all that is smaller, and one for the forced cells.
constexpr int      FINE_SHIFT   = 17;
constexpr int      COARSE_SHIFT = 22;
constexpr uint32_t FINE_FIRST   = (127 - 24)  << 23;
constexpr uint32_t COARSE_FIRST = (127 - 122) << 23;
constexpr int      N_COARSE     = (FINE_FIRST - COARSE_FIRST) >> COARSE_SHIFT;
constexpr int      BIN_FORCED   = N_BIN - 1;
static_assert(N_COARSE + (((127 + 4) << 23) - FINE_FIRST >> FINE_SHIFT) < BIN_FORCED, "scores reach 16");

static __device__ __forceinline__ int bin_of(uint32_t key) {
    if (key == KEY_HIDDEN || key == KEY_FORCED) {
        return key == KEY_HIDDEN ? -1 : BIN_FORCED;
    }
    return key >= FINE_FIRST ? N_COARSE + (int) ((key - FINE_FIRST) >> FINE_SHIFT) :
        key >= COARSE_FIRST ? (int) ((key - COARSE_FIRST) >> COARSE_SHIFT) : 0;
}

// The smallest key of a bin.
static __device__ __forceinline__ uint32_t bin_base(int bin) {
    return bin >= N_BIN ? 0xFFFFFFFFu : bin == BIN_FORCED ? KEY_FORCED : bin == 0 ? 1 :
        bin < N_COARSE ? COARSE_FIRST + ((uint32_t) bin << COARSE_SHIFT) : FINE_FIRST + ((uint32_t) (bin - N_COARSE) << FINE_SHIFT);
}

constexpr int MAX_PART = 16; // blocks of select and fac for a unit: their results fit into registers

// Where the blocks of a unit meet; zero at first.
struct unit_sync {
    uint32_t n_arrive;
    uint32_t n_done;
    uint32_t n_cand[MAX_PART]; // candidates of each block
};

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
    int n_fac;    // heads that tip and fac serve at once
    int n_slot;   // n_group rounded up to n_fac
    int n_pad;    // n_kv rounded up to BAND
    int n_scan;   // blocks of tip for a unit
    int n_part;   // blocks of select and fac for a unit
    int share;    // such a block owns every n_part-th stretch of 1 << share cells
    int n_run;    // cells that it owns, those beyond n_pad included
    int key_len;  // keys that such a block keeps in shared memory, n_run; 0: in global memory
    int list_len; // selected cells that it keeps in shared memory, budget; 0: in global memory
    int row_size; // bytes of a K or V row to ask for ahead of time, the larger of the two; 0: do not
    int unit0;    // first unit of this launch

    // Global memory between the kernels and between blocks, for each unit of the launch.
    float     * score;   // [n_group][n_pad], log2(e) * S_h, -inf if hidden
    float2    * softmax; // [n_scan][n_group], largest score m and sum of 2^(score - m)
    uint32_t  * hist;    // [N_BIN], visible cells by bin of their keys
    unit_sync * sync;    // [1]
    uint64_t  * cand;    // [n_part][n_run], candidates of each block: key << 32 | ~cell, which orders them
    uint32_t  * key;     // [n_part][n_run] if key_len is 0
    int32_t   * list;    // [n_part][budget] if list_len is 0
    float     * part;    // [n_part][n_group][d_v + 2], see fac_heads

    row_args rows;
};

// The blocks of a unit wait for each other: all of them are on the device together (see run_attn).
static __device__ __forceinline__ void unit_arrive(const attn_args & a, unit_sync * sync) {
    __syncthreads();
    if (a.n_part > 1 && threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&sync->n_arrive, 1);
    }
}

// Until every block has arrived for the turn-th time; what they wrote before is then visible to loads that bypass L1 (__ldcg).
static __device__ __forceinline__ void unit_wait(const attn_args & a, unit_sync * sync, int turn) {
    if (a.n_part > 1 && threadIdx.x == 0) {
        while ((int) *(volatile uint32_t *) &sync->n_arrive < turn*a.n_part) {
        }
        __threadfence();
    }
    __syncthreads();
}

// A KV group of one query row.
struct unit {
    int s, t, g;

    __device__ unit(const attn_args & a, int u) : s(u/(a.n_head_kv*a.n_row)), t(u/a.n_head_kv%a.n_row), g(u%a.n_head_kv) {}
};

// Four neighbouring cells of a mask row, from a cell that is a multiple of 4 on.
struct mask_four {
    uint2 f16 = {};

    __device__ static __forceinline__ bool fast(const attn_args & a) {
        return a.mask_f16 && a.n_kv%4 == 0;
    }

    // Asks for cells t .. t + 3.
    __device__ __forceinline__ void load(const attn_args & a, const char * mask, int t) {
        if (fast(a) && t < a.n_kv) {
            f16 = *(const uint2 *) ((const uint16_t *) mask + t);
        }
    }

    // Bits 0 to 3: hidden, as are cells from n_kv on; bits 4 to 7: forced. For the cells of the last load.
    __device__ __forceinline__ uint32_t bits(const attn_args & a, const char * mask, int t) const {
        if (fast(a) && t < a.n_kv && (f16.x | f16.y) == 0) {
            return 0;
        }
        return slow(a, mask, t);
    }

private:
    __device__ static __noinline__ uint32_t slow(const attn_args & a, const char * mask, int t) {
        uint32_t bits = 0;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            const uint32_t m = t + i >= a.n_kv ? 0xFF800000u : a.mask_f16 ?
                (uint32_t) ((const uint16_t *) mask)[t + i] << 16 : ((const uint32_t *) mask)[t + i];
            bits |= (m == 0xFF800000u || (a.mask_f16 && m == 0xFC000000u) ? 0x01 : m == 0x80000000u ? 0x10 : 0) << i;
        }
        return bits;
    }
};

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

} // namespace fasa
