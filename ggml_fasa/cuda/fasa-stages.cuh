// What the kernels of the stages share: their arguments, the scratch memory between them, and a few primitives.
// Letters as in ggml-fasa.h.

#pragma once

#include "fasa-index-cache.cuh"
#include "fasa-launch.cuh"
#include "fasa-row-cache.cuh"
#include "ggml-fasa.h"

namespace fasa {

#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
constexpr bool FASA_MMA = true; // whether fac has its matrix instructions
#else
constexpr bool FASA_MMA = false;
#endif

constexpr int N_BIN = 2048; // of the histogram over the leading digit of keys

constexpr float LOG2E = 1.44269504f;

// A cell's key orders like its importance, as an unsigned integer: 0 hidden, else the bits of the importance (>= 0) plus 1.
constexpr uint32_t KEY_HIDDEN = 0;
constexpr uint32_t KEY_FORCED = 0x7F800001;

// Bins of the histogram: 64 for each power of two from 2^-24 on (importance is at most n_group), where flat heads have theirs
// close together, 2 for each from 2^-122 on, as sharp heads need, one for all that is smaller, and one for the forced cells.
constexpr int      FINE_SHIFT   = 17;
constexpr int      COARSE_SHIFT = 22;
constexpr uint32_t FINE_FIRST   = (127 - 24)  << 23;
constexpr uint32_t COARSE_FIRST = (127 - 122) << 23;
constexpr int      N_COARSE     = (FINE_FIRST - COARSE_FIRST) >> COARSE_SHIFT;
constexpr int      BIN_FORCED   = N_BIN - 1;
static_assert(N_COARSE + (((127 + 4) << 23) - FINE_FIRST >> FINE_SHIFT) < BIN_FORCED, "importance reaches 16");

// Of a key that is not hidden.
static __device__ __forceinline__ int bin_of(uint32_t key) {
    const int fine   = N_COARSE + (int) (key >> FINE_SHIFT) - (int) (FINE_FIRST >> FINE_SHIFT);
    const int coarse = (int) (key >> COARSE_SHIFT) - (int) (COARSE_FIRST >> COARSE_SHIFT);
    return key >= FINE_FIRST ? min(fine, BIN_FORCED) : max(coarse, 0);
}

// The smallest key of a bin.
static __device__ __forceinline__ uint32_t bin_base(int bin) {
    return bin >= N_BIN ? 0xFFFFFFFFu : bin == BIN_FORCED ? KEY_FORCED : bin == 0 ? 1 :
        bin < N_COARSE ? COARSE_FIRST + ((uint32_t) bin << COARSE_SHIFT) : FINE_FIRST + ((uint32_t) (bin - N_COARSE) << FINE_SHIFT);
}

constexpr int MAX_GROUP  = 16;  // heads of a unit
constexpr int MAX_D_V    = 256; // values of a V row
constexpr int MAX_PART   = 16;  // blocks of a unit: a warp looks at what each offers
constexpr int MAX_OFFER  = 256; // cells that a block offers to the others of its unit, see select_by_offers
constexpr int FAC_THREAD = 512; // threads of a block
constexpr int FAC_WARP   = FAC_THREAD/WARP_SIZE;

// Where the blocks of a unit meet, beside their letters. All but n_cand is 0 before a launch and after it.
struct alignas(16) unit_sync {
    uint32_t turn[MAX_PART];   // how often each block has arrived
    uint32_t n_cand[MAX_PART]; // candidates of each block
    uint32_t n_done;           // blocks that wait for no other any more
};

// What a block tells the others of its unit. A word that is not 0 has been written: it is its own flag, and no fence is needed.
// All 0 before a launch and after it.
struct alignas(16) block_letter {
    uint64_t softmax[MAX_GROUP];       // of each head: bits of the largest score m, then of the sum of 2^(score - m)
    uint64_t offers[MAX_OFFER];        // see select_by_offers
    uint64_t bound;
    uint64_t tops[MAX_PART][MAX_GROUP]; // for each block and head: bits of the largest logit m, then of the sum of 2^(logit - m)
    uint32_t part[MAX_GROUP*MAX_D_V];   // of each head the sum of p * v, bits inverted
};

// Where things are in the dynamic shared memory of a block, in floats, each a multiple of 4.
struct attn_layout {
    int q;     // [n_slot][d_k]
    int tip;   // see tip_load_q
    int list;  // [list_len] cells
    int rows;  // see row_shared
    int score; // [n_group][score_len]; before, rows of tip_load_q; after select, of fac_heads, then of fac_merge
    int total;
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
    bool      mask_f16, mask_four;
    int       index_type, tile_size, hadamard;
    float     scale, softcap;
    int       budget;

    int n_kv, n_row, n_head_kv, n_group, d_k, d_v, n_dim, n_dim_pad;
    int n_word;    // of a cell in an integer index
    int n_fac;     // heads that tip and fac serve at once
    int n_slot;    // n_group rounded up to n_fac
    int n_part;    // blocks of a unit; block r owns tiles r, r + n_part, ...
    int part_log2; // of n_part rounded up to a power of two
    int n_run;     // cells that a block owns, those beyond n_kv included
    int n_even;    // of these, those that a thread scores for all heads, by fours; of the rest it scores four for one head
    int score_len; // cells whose scores it keeps in shared memory, n_run; 0: in global memory
    int list_len;  // selected cells that it keeps in shared memory, budget; 0: in global memory
    int n_offer;   // cells that a block offers, a power of two; 0: none do
    int row_size;  // bytes of a K or V row to ask for ahead of time, the larger of the two; 0: do not
    int row0;      // first query row of this launch, over all streams

    uint3 div_d_v, div_rest; // of fastdiv, by d_v and by the fours in the rest

    // Global memory of the blocks, for each unit of the launch.
    unit_sync * sync;    // [1], for several blocks see set_meeting_place
    uint32_t  * hist;    // [N_BIN] visible cells by bin of their keys; 0 before a launch and after it; for several blocks only
    block_letter * letters; // [n_part], for several blocks only
    uint64_t  * cand;    // [n_part][n_run], candidates of each block: key << 32 | ~cell, which orders them
    float     * score;   // [n_part][n_group][n_run] if score_len is 0, see tip_scores
    int32_t   * list;    // [n_part][budget] if list_len is 0
    float     * part;    // [n_group][d_v + 2] of a unit's only block, see fac_heads

    row_args         rows;
    index_write_args write;        // done before tip; n_write may be 0
    int              write_stream; // the stream there that is the first here
    attn_layout      at;
};

// A KV group of one query row, and the block that works on it.
struct unit {
    int s, t, g; // stream, row in it, KV head
    int at;      // unit of the launch
    int rank;    // of the block

    __device__ unit(const attn_args & a) : g(blockIdx.y), at(blockIdx.z*gridDim.y + blockIdx.y), rank(blockIdx.x) {
        const int row = a.row0 + blockIdx.z;
        s = a.n_row == 1 ? row : row/a.n_row;
        t = a.n_row == 1 ? 0   : row%a.n_row;
    }
};

// Cell i of the n_run of a block. May be beyond n_kv.
static __device__ __forceinline__ int cell_of(const attn_args & a, const unit & u, int i) {
    return (i/GGML_FASA_TILE*a.n_part + u.rank)*GGML_FASA_TILE + i%GGML_FASA_TILE;
}

// Four of the rest of the cells of a block, i .. i + 3 of its n_run, for one head; none if i is n_run.
struct rest_cells {
    int h, i;

    __device__ __forceinline__ explicit rest_cells(const attn_args & a) {
        const uint2 at = fast_div_modulo(threadIdx.x, a.div_rest);
        h = at.x;
        i = h < a.n_group ? min(a.n_even + 4*(int) at.y, a.n_run) : a.n_run;
    }
};

// The first cell that this thread scores.
static __device__ __forceinline__ int first_cell(const attn_args & a) {
    return a.n_even > 0 ? 4*threadIdx.x : rest_cells(a).i;
}

// What block b of a unit of several tells.
static __device__ __forceinline__ block_letter & letter_of(const attn_args & a, const unit & u, int b) {
    return a.letters[u.at*a.n_part + b];
}

// The histogram of a unit of several blocks.
static __device__ __forceinline__ uint32_t * hist_of(const attn_args & a, const unit & u) {
    return a.hist + (size_t) u.at*N_BIN;
}

// A word of a letter. x: not 0, but to clear the word when all have read it.
static __device__ __forceinline__ void put_word(uint32_t * at, uint32_t x) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(at), "r"(x) : "memory");
#else
    *(volatile uint32_t *) at = x;
#endif
}

static __device__ __forceinline__ void put_word(uint64_t * at, uint64_t x) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(at), "l"(x) : "memory");
#else
    *(volatile uint64_t *) at = x;
#endif
}

static __device__ __forceinline__ uint32_t look_at_word(const uint32_t * at) {
    uint32_t x;
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
#else
    x = *(const volatile uint32_t *) at;
#endif
    return x;
}

static __device__ __forceinline__ uint64_t look_at_word(const uint64_t * at) {
    uint64_t x;
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
#else
    x = *(const volatile uint64_t *) at;
#endif
    return x;
}

// Waits for a word. The blocks of a unit wait for each other: all of them are on the device together (see run_attn).
template <typename T>
static __device__ __forceinline__ T read_word(const T * at) {
    T x;
    do {
        x = look_at_word(at);
    } while (x == 0);
    return x;
}

static __device__ __forceinline__ uint64_t pack(float x, float y) {
    return (uint64_t) __float_as_uint(y) << 32 | __float_as_uint(x);
}

static __device__ __forceinline__ float2 unpack(uint64_t bits) {
    return make_float2(__uint_as_float((uint32_t) bits), __uint_as_float(bits >> 32));
}

// Where words do not do: what blocks wrote before they arrived is visible after the wait.
static __device__ __forceinline__ void unit_arrive(const attn_args & a, const unit & u, uint32_t turn) {
    __syncthreads();
    if (a.n_part > 1 && threadIdx.x == 0) {
        uint32_t * at = a.sync[u.at].turn + u.rank;
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
        asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(at), "r"(turn) : "memory");
#else
        __threadfence();
        *(volatile uint32_t *) at = turn;
#endif
    }
}

static __device__ __forceinline__ void unit_wait(const attn_args & a, const unit & u, uint32_t turn) {
    if (a.n_part > 1 && threadIdx.x < WARP_SIZE) {
        const uint32_t * at = a.sync[u.at].turn + min((int) threadIdx.x, a.n_part - 1);
        uint32_t now;
        do {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_VOLTA
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
#else
            now = *(const volatile uint32_t *) at;
            __threadfence();
#endif
        } while (!__all_sync(0xFFFFFFFFu, now >= turn)); // others may be ahead
    }
    __syncthreads();
}

// Four neighbouring cells of a mask row, from a cell that is a multiple of 4 on. attn_args::mask_four: they can be read at once.
struct mask_four {
    uint32_t f16[2];

    // Asks for cells t .. t + 3.
    __device__ __forceinline__ void load(const attn_args & a, const char * mask, int t) {
        if (a.mask_four && t < a.n_kv) {
            const uint2 x = *(const uint2 *) ((const uint16_t *) mask + t);
            f16[0] = x.x;
            f16[1] = x.y;
        }
    }

    // Bits 0 to 3: hidden, as are cells from n_kv on; bits 4 to 7: forced. For the cells of the last load.
    __device__ __forceinline__ uint32_t bits(const attn_args & a, const char * mask, int t) const {
        if (!a.mask_four) {
            return slow(a, mask, t);
        }
        if (t >= a.n_kv) {
            return 0x0F;
        }
        uint32_t bits = 0;
        if ((f16[0] | f16[1]) != 0) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const uint32_t m = f16[c/2] >> 16*(c%2) & 0xFFFF;
                bits |= (m == 0xFC00 ? 0x01 : m == 0x8000 ? 0x10 : 0) << c;
            }
        }
        return bits;
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

// What the stages take of a launch's first block, printed for one launch of 64 in builds with FASA_CUDA_CLOCK. mark() ends a stage.
struct stage_clock {
#ifdef FASA_CUDA_CLOCK
    uint64_t at[4];
    int      n = 0;

    __device__ __forceinline__ void mark() {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(at[n++]) :: "memory");
    }
    __device__ __forceinline__ void print(const attn_args & a) const {
        static __device__ unsigned n_launch;
        if (threadIdx.x + blockIdx.x + blockIdx.y + blockIdx.z == 0 && atomicAdd(&n_launch, 1)%64 == 63) {
            printf("fasa-clock n_kv %d index_type %d budget %d ns: tip %d select %d fac %d\n", a.n_kv, a.index_type, a.budget,
                    (int) (at[1] - at[0]), (int) (at[2] - at[1]), (int) (at[3] - at[2]));
        }
    }
#else
    __device__ __forceinline__ void mark() {}
    __device__ __forceinline__ void print(const attn_args &) const {}
#endif
};

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int o = WARP_SIZE/2; o > 0; o /= 2) {
        x += __shfl_xor_sync(0xFFFFFFFFu, x, o);
    }
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
    auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }; // like the number, and back
    return __int_as_float(ordered(__reduce_max_sync(0xFFFFFFFFu, ordered(__float_as_int(x)))));
#else
#pragma unroll
    for (int o = WARP_SIZE/2; o > 0; o /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, o));
    }
    return x;
#endif
}

constexpr float SCORE_NONE = -1e30f; // of no cell at all; finite, so that differences are numbers

// Largest score and sum of 2^(score - largest) over all lanes, from those of each.
static __device__ __forceinline__ float2 softmax_sum(const float2 & x) {
    const float m = warp_max(x.x);
    return make_float2(m, warp_sum(x.y*exp2f(x.x - m)));
}

} // namespace fasa
