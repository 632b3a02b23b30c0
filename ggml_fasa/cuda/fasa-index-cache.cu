#include "fasa-index-cache.cuh"

#include "fasa-cache.cuh"
#include "fasa-launch.cuh"
#include "fasa-row-cache.cuh"
#include "ggml-fasa.h"

namespace {

constexpr int N_WARP = 8;
constexpr int N_HELD = fasa::INDEX_DIM_MAX/WARP_SIZE; // dims of a lane

// One warp for each (row, head), and as many again for the row cache, if there is one. Shared memory: for each warp d values of K.
__global__ void fasa_index_write(const fasa::index_write_args a) {
    extern __shared__ float4 shared4[];
    float * shared = (float *) shared4;

    const int lane = threadIdx.x;
    const int warp = threadIdx.y;

    ggml_cuda_pdl_lc(); // what follows may start, and waits for this kernel's end before it reads the index

    const int64_t unit = (int64_t) blockIdx.x*N_WARP + warp;
    const int     g    = unit%a.n_head_kv;

    fasa::held_dims<N_HELD> held;
    held.load(a.dims, a.center, a.n_dim, g, lane);
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

    const char * from = a.k + id*a.k_nb1 + g*a.k_head;
    float      * row  = shared + warp*a.d;
    for (int i = 4*lane; i < a.d; i += 4*WARP_SIZE) {
        *(float4 *) (row + i) = fasa::load4_any(from, i, a.type);
    }
    __syncwarp();
    if (a.hadamard) {
        fasa::unrotate_warp(row, a.d, a.hadamard, lane);
    }
    float x[N_HELD];
#pragma unroll
    for (int i = 0; i < N_HELD; ++i) {
        x[i] = lane + i*WARP_SIZE < a.n_dim ? __fsub_rn(row[held.dim[i]], held.center[i]) : 0.0f;
    }
    char * tile = a.index + s*a.index_nb3 + g*a.index_nb2 + (size_t) (cell/GGML_FASA_TILE)*a.tile_size;
    fasa::index_put(a, tile, cell%GGML_FASA_TILE, x, lane);
}

} // namespace

fasa::index_write_args fasa::index_write_of(const ggml_tensor * op) {
    const ggml_tensor * k      = op->src[GGML_FASA_WRITE_SRC_K];
    const ggml_tensor * cells  = op->src[GGML_FASA_WRITE_SRC_CELLS];
    const ggml_tensor * index  = op->src[GGML_FASA_WRITE_SRC_INDEX];
    const ggml_tensor * dims   = op->src[GGML_FASA_WRITE_SRC_DIMS];
    const ggml_tensor * center = op->src[GGML_FASA_WRITE_SRC_CENTER];
    const ggml_tensor * rows   = op->src[GGML_FASA_WRITE_SRC_ROW_STATE];

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
    a.index_type = ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_INDEX_TYPE);
    a.hadamard   = ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_HADAMARD);
    a.k_head     = ggml_row_size(k->type, a.d);
    return a;
}

bool fasa::index_write_joins(const ggml_tensor * op) {
    return ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_JOINED) && op->src[GGML_FASA_WRITE_SRC_K]->type == GGML_TYPE_F16 &&
        ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_HADAMARD) == 0 && op->src[GGML_FASA_WRITE_SRC_DIMS]->ne[0] <= 2*WARP_SIZE;
}

void ggml_cuda_fasa_index_write(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (fasa::index_write_joins(dst)) {
        return; // attn does it
    }
    const fasa::index_write_args a = fasa::index_write_of(dst);

    const int64_t n_unit = a.n_write*a.n_head_kv;
    if (n_unit == 0) {
        return;
    }
    const size_t shared = N_WARP*a.d*sizeof(float);
    const dim3 grid((n_unit + N_WARP - 1)/N_WARP, a.rows ? 2 : 1);
    fasa::launch(fasa_index_write, grid, dim3(WARP_SIZE, N_WARP), shared, ctx.stream(), false, a);
}
