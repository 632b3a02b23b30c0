// Stage index_cache on CUDA: puts the dominant dims of K rows into the tiled index. See ggml-fasa.h for its layout.

#pragma once

#include "fasa-cache.cuh"
#include "ggml-fasa.h"

void ggml_cuda_fasa_index_write(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

namespace fasa {

// An op of mode index_write.
struct index_write_args {
    const char    * k;
    const int64_t * cells;
    char          * index;
    const int32_t * dims;
    const float   * center; // or NULL
    char          * rows;   // state of the row cache, or NULL
    size_t    rows_nb2;     // from head to head
    size_t    rows_nb3;     // from stream to stream
    int       n_rows;
    size_t    k_nb1;        // from cell to cell
    size_t    k_head;       // from head to head
    size_t    index_nb2;    // from head to head
    size_t    index_nb3;    // from stream to stream
    ggml_type type;
    int64_t   n_cells;      // of a stream
    int64_t   n_write;
    int       d, n_head_kv, n_dim, tile_size, index_type, hadamard;
};

index_write_args index_write_of(const ggml_tensor * op);

// Whether attn does such a write when it is joined with it.
bool index_write_joins(const ggml_tensor * op);

static __device__ __forceinline__ int warp_reduce_max_int(int x) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
    return __reduce_max_sync(0xFFFFFFFFu, x);
#else
#pragma unroll
    for (int o = WARP_SIZE/2; o > 0; o /= 2) {
        x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, o));
    }
    return x;
#endif
}

constexpr int INDEX_DIM_MAX = 256; // of a head

// The dims of a head and their center that a lane deals with: number lane + 32*i, 0 beyond n_dim. No kernel writes them.
template <int N>
struct held_dims {
    int   dim[N];
    float center[N];

    // dims: [n_head_kv][n_dim]; all_center: the same or NULL
    __device__ __forceinline__ void load(const int32_t * dims, const float * all_center, int n_dim, int g, int lane) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int j = lane + i*WARP_SIZE;
            dim[i]    = j < n_dim ? dims[g*n_dim + j] : 0;
            center[i] = j < n_dim && all_center ? all_center[g*n_dim + j] : 0.0f;
        }
    }
};

// Puts a cell, the c-th of a tile, into the index: K minus center of its dims, of which lane l of a warp has number l + 32*i in
// x[i], 0 beyond n_dim.
template <int N>
static __device__ __forceinline__ void index_put(const index_write_args & a, char * tile, int c, const float (&x)[N], int lane) {
    if (a.index_type == GGML_FASA_INDEX_F16) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int j = lane + i*WARP_SIZE;
            if (j < a.n_dim) {
                ((half *) tile)[j*GGML_FASA_TILE + c] = __float2half_rn(x[i]);
            }
        }
        return;
    }

    // the first value of largest magnitude
    auto magnitude = [](float v) { return __float_as_int(v) & 0x7FFFFFFF; };
    int most = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        most = max(most, magnitude(x[i]));
    }
    most = warp_reduce_max_int(most);
    float top = 0.0f;
    if (most > 0) {
#pragma unroll
        for (int i = N - 1; i >= 0; --i) {
            if (i*WARP_SIZE < a.n_dim) {
                const uint32_t has = __ballot_sync(0xFFFFFFFFu, magnitude(x[i]) == most);
                top = has ? __shfl_sync(0xFFFFFFFFu, x[i], __ffs(has) - 1) : top;
            }
        }
    }

    const bool  q4     = a.index_type == GGML_FASA_INDEX_Q4;
    const int   offset = q4 ? 8 : 128;
    const half  d16    = __float2half_rn(q4 ? __fdiv_rn(top, -8.0f) : __fdiv_rn(fabsf(top), 127.0f));
    const float d      = __half2float(d16);
    const float inv    = d == 0.0f ? 0.0f : __fdiv_rn(1.0f, d);
    if (lane == 0) {
        ((half *) tile)[c] = d16;
    }
    uint32_t * words = (uint32_t *) (tile + GGML_FASA_TILE*sizeof(half));
    const int  shift = 8*(lane%4) + (q4 ? lane/4%2*4 : 0); // of a value in its word
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i*WARP_SIZE < a.n_dim) {
            const int   j = lane + i*WARP_SIZE;
            const float q = fmaxf(q4 ? -8.0f : -127.0f, fminf(q4 ? 7.0f : 127.0f, rintf(__fmul_rn(x[i], inv))));
            uint32_t word = j < a.n_dim ? (uint32_t) ((int) q + offset) << shift : 0;
            word |= __shfl_xor_sync(0xFFFFFFFFu, word, 1);
            word |= __shfl_xor_sync(0xFFFFFFFFu, word, 2);
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, word, 4);
            const int      per   = q4 ? 8 : 4; // values of a word
            if (j%per == 0 && j < a.n_dim) {
                words[j/per*GGML_FASA_TILE + c] = q4 ? word | other : word;
            }
        }
    }
}

} // namespace fasa
