#include "fasa-index-cache.cuh"

#include "fasa-cache.cuh"
#include "fasa-launch.cuh"
#include "fasa-row-cache.cuh"
#include "ggml-fasa.h"

namespace {

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

constexpr int N_WARP = 8;

// One warp for each (row, head), and as many again for the row cache, if there is one. Shared memory: for each warp d values of K, its head's dims, and n_dim integers rounded up to 8.
__global__ void fasa_index_write(const index_write_args a) {
    extern __shared__ float4 shared4[];
    float * shared = (float *) shared4;

    const int lane = threadIdx.x;
    const int warp = threadIdx.y;

    ggml_cuda_pdl_lc(); // what follows may start, and waits for this kernel's end before it reads the index

    const int64_t unit = (int64_t) blockIdx.x*N_WARP + warp;
    const int     g    = unit%a.n_head_kv;
    const int n_dim_pad = (a.n_dim + 7)/8*8;
    float * x    = shared + warp*(a.d + 2*n_dim_pad);
    int   * dims = (int *) (x + a.d);
    int   * v    = dims + n_dim_pad;
    for (int j = lane; j < a.n_dim; j += WARP_SIZE) { // no kernel writes them
        dims[j] = a.dims[g*a.n_dim + j];
    }
    ggml_cuda_pdl_sync();

    if (unit >= a.n_write*a.n_head_kv) {
        return;
    }
    const int64_t id   = a.cells[unit/a.n_head_kv];
    const int64_t s    = id/a.n_cells;
    const int     cell = id%a.n_cells;

    if (blockIdx.y == 1) {
        fasa::row_forget(a.rows + s*a.rows_nb3 + g*a.rows_nb2, a.n_rows, cell, lane);
        return;
    }

    const char * row = a.k + id*a.k_nb1 + g*a.k_head;
    for (int i = 4*lane; i < a.d; i += 4*WARP_SIZE) {
        *(float4 *) (x + i) = fasa::load4_any(row, i, a.type);
    }
    __syncwarp();
    if (a.hadamard) {
        fasa::unrotate_warp(x, a.d, a.hadamard, lane);
    }

    const float * center = a.center ? a.center + g*a.n_dim : nullptr;
    auto value = [&](int j) {
        return center ? __fsub_rn(x[dims[j]], center[j]) : x[dims[j]];
    };

    char * tile = a.index + s*a.index_nb3 + g*a.index_nb2 + (size_t) (cell/GGML_FASA_TILE)*a.tile_size;
    const int c = cell%GGML_FASA_TILE;

    if (a.index_type == GGML_FASA_INDEX_F16) {
        for (int j = lane; j < a.n_dim; j += WARP_SIZE) {
            ((half *) tile)[j*GGML_FASA_TILE + c] = __float2half_rn(value(j));
        }
        return;
    }

    // the first value of largest magnitude
    float    top   = 0.0f;
    uint32_t first = 0xFFFFFFFFu;
    for (int j = lane; j < a.n_dim; j += WARP_SIZE) {
        const float k = value(j);
        if (fabsf(k) > fabsf(top)) {
            top   = k;
            first = j;
        }
    }
#pragma unroll
    for (int offset = WARP_SIZE/2; offset > 0; offset /= 2) {
        const float    other_top   = __shfl_xor_sync(0xFFFFFFFFu, top,   offset);
        const uint32_t other_first = __shfl_xor_sync(0xFFFFFFFFu, first, offset);
        if (fabsf(other_top) > fabsf(top) || (fabsf(other_top) == fabsf(top) && other_first < first)) {
            top   = other_top;
            first = other_first;
        }
    }

    const bool  q4     = a.index_type == GGML_FASA_INDEX_Q4;
    const int   offset = q4 ? 8 : 128;
    const half  d16    = __float2half_rn(q4 ? __fdiv_rn(top, -8.0f) : __fdiv_rn(fabsf(top), 127.0f));
    const float d      = __half2float(d16);
    const float inv    = d == 0.0f ? 0.0f : __fdiv_rn(1.0f, d);
    for (int j = lane; j < n_dim_pad; j += WARP_SIZE) {
        const float q = j < a.n_dim ? rintf(__fmul_rn(value(j), inv)) : 0.0f;
        v[j] = j < a.n_dim ? (int) fmaxf(q4 ? -8.0f : -127.0f, fminf(q4 ? 7.0f : 127.0f, q)) + offset : 0;
    }
    __syncwarp();

    if (lane == 0) {
        ((half *) tile)[c] = d16;
    }
    uint32_t * words  = (uint32_t *) (tile + GGML_FASA_TILE*sizeof(half));
    const int  n_word = q4 ? n_dim_pad/8 : (a.n_dim + 3)/4;
    for (int w = lane; w < n_word; w += WARP_SIZE) {
        const int * p = v + w*(q4 ? 8 : 4);
        uint32_t word = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            word |= (uint32_t) (q4 ? p[b] | (p[b + 4] << 4) : p[b]) << 8*b;
        }
        words[w*GGML_FASA_TILE + c] = word;
    }
}

} // namespace

void ggml_cuda_fasa_index_write(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * k      = dst->src[GGML_FASA_WRITE_SRC_K];
    const ggml_tensor * cells  = dst->src[GGML_FASA_WRITE_SRC_CELLS];
    const ggml_tensor * index  = dst->src[GGML_FASA_WRITE_SRC_INDEX];
    const ggml_tensor * dims   = dst->src[GGML_FASA_WRITE_SRC_DIMS];
    const ggml_tensor * center = dst->src[GGML_FASA_WRITE_SRC_CENTER];
    const ggml_tensor * rows   = dst->src[GGML_FASA_WRITE_SRC_ROW_STATE];

    index_write_args a = {};
    a.k          = (const char *)    k->data;
    a.cells      = (const int64_t *) cells->data;
    a.index      = (char *)          index->data;
    a.dims       = (const int32_t *) dims->data;
    a.center     = center ? (const float *) center->data : nullptr;
    if (rows) {
        a.rows     = (char *) rows->data;
        a.rows_nb2 = rows->nb[2];
        a.rows_nb3 = rows->nb[3];
        a.n_rows   = (rows->ne[0] - GGML_FASA_ROW_STATE)/2;
    }
    a.k_nb1      = k->nb[1];
    a.index_nb2  = index->nb[2];
    a.index_nb3  = index->nb[3];
    a.type       = k->type;
    a.n_cells    = index->ne[1]*GGML_FASA_TILE;
    a.n_write    = cells->ne[0];
    a.n_head_kv  = dims->ne[1];
    a.d          = k->ne[0]/a.n_head_kv;
    a.n_dim      = dims->ne[0];
    a.tile_size  = index->nb[1];
    a.index_type = ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_INDEX_TYPE);
    a.hadamard   = ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_HADAMARD);

    const int64_t n_unit = a.n_write*a.n_head_kv;
    if (n_unit == 0) {
        return;
    }
    a.k_head = ggml_row_size(k->type, a.d);

    const size_t shared = N_WARP*(a.d + 2*GGML_PAD(a.n_dim, 8))*sizeof(float);
    fasa::launch(fasa_index_write, dim3((n_unit + N_WARP - 1)/N_WARP, rows ? 2 : 1), dim3(WARP_SIZE, N_WARP), shared, ctx.stream(), false, a);
}
