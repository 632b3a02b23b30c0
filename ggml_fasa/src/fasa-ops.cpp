// Constructors of GGML_OP_FASA_ATTN: shape rules and op_params, no arithmetic. See ggml-fasa.h.

#include "ggml-fasa.h"

#include "ggml-impl.h"

static void fasa_set_mode(ggml_tensor * t, ggml_fasa_mode mode) {
    t->op = GGML_OP_FASA_ATTN;
    ggml_set_op_params_i32(t, GGML_FASA_OP_PARAM_MODE, mode);
}

size_t ggml_fasa_tile_size(ggml_fasa_index_type type, int64_t n_dim) {
    const int64_t scales = GGML_FASA_TILE*sizeof(ggml_fp16_t);
    switch (type) {
        case GGML_FASA_INDEX_F16: return GGML_FASA_TILE*n_dim*sizeof(ggml_fp16_t);
        case GGML_FASA_INDEX_Q8:  return GGML_FASA_TILE*GGML_PAD(n_dim, 4)   + scales;
        case GGML_FASA_INDEX_Q4:  return GGML_FASA_TILE*GGML_PAD(n_dim, 8)/2 + scales;
        default: GGML_ABORT("unknown FASA index type");
    }
}

const char * ggml_fasa_index_type_name(ggml_fasa_index_type type) {
    switch (type) {
        case GGML_FASA_INDEX_F16: return "f16";
        case GGML_FASA_INDEX_Q8:  return "q8";
        case GGML_FASA_INDEX_Q4:  return "q4";
        default: return NULL;
    }
}

ggml_tensor * ggml_fasa_new_index(
        ggml_context       * ctx,
        ggml_fasa_index_type type,
        int64_t              n_dim,
        int64_t              n_cells,
        int64_t              n_head_kv,
        int64_t              n_stream) {
    GGML_ASSERT(n_dim > 0 && n_dim % 2 == 0);
    GGML_ASSERT(n_cells % GGML_FASA_TILE == 0);

    const ggml_type tensor_type = type == GGML_FASA_INDEX_F16 ? GGML_TYPE_F16 : GGML_TYPE_I8;
    const int64_t   tile        = ggml_fasa_tile_size(type, n_dim)/ggml_type_size(tensor_type);
    return ggml_new_tensor_4d(ctx, tensor_type, tile, n_cells/GGML_FASA_TILE, n_head_kv, n_stream);
}

static void fasa_check_index(const ggml_tensor * index, const ggml_tensor * dims, ggml_fasa_index_type type) {
    GGML_ASSERT(dims->type == GGML_TYPE_I32 && ggml_is_contiguous(dims));
    GGML_ASSERT(index->type == (type == GGML_FASA_INDEX_F16 ? GGML_TYPE_F16 : GGML_TYPE_I8));
    GGML_ASSERT(index->nb[1] == ggml_fasa_tile_size(type, dims->ne[0]));
    GGML_ASSERT(index->nb[0] == ggml_type_size(index->type) && index->nb[1] == index->nb[0]*index->ne[0]);
    GGML_ASSERT(index->ne[2] == dims->ne[1]);
}

// The rows of a head of d values must be whole blocks.
static void fasa_check_cache(const ggml_tensor * t, int64_t d) {
    GGML_ASSERT(t->nb[0] == ggml_type_size(t->type) && d % ggml_blck_size(t->type) == 0);
}

static void fasa_check_hadamard(int32_t hadamard, int64_t d) {
    GGML_ASSERT(hadamard == 0 || (hadamard > 0 && (hadamard & (hadamard - 1)) == 0 && d % hadamard == 0));
}

ggml_tensor * ggml_fasa_index_write(
        ggml_context       * ctx,
        ggml_tensor        * k,
        ggml_tensor        * cells,
        ggml_tensor        * index,
        ggml_tensor        * dims,
        ggml_fasa_index_type index_type,
        int32_t              hadamard) {
    fasa_check_index(index, dims, index_type);
    GGML_ASSERT(ggml_is_contiguous(index));
    GGML_ASSERT(cells->type == GGML_TYPE_I64 && ggml_is_contiguous(cells) && ggml_is_vector(cells));
    GGML_ASSERT(index->ne[1]*GGML_FASA_TILE*index->ne[3] == k->ne[1]*k->ne[2] && k->ne[3] == 1);
    GGML_ASSERT(k->nb[2] == k->nb[1]*k->ne[1]);
    GGML_ASSERT(k->ne[0] % dims->ne[1] == 0);
    fasa_check_cache(k, k->ne[0]/dims->ne[1]);
    fasa_check_hadamard(hadamard, k->ne[0]/dims->ne[1]);

    // a view, so that the scheduler runs the write where the index lives
    ggml_tensor * result = ggml_view_tensor(ctx, index);

    fasa_set_mode(result, GGML_FASA_MODE_INDEX_WRITE);
    ggml_set_op_params_i32(result, GGML_FASA_OP_PARAM_INDEX_TYPE, index_type);
    ggml_set_op_params_i32(result, GGML_FASA_OP_PARAM_HADAMARD,   hadamard);
    result->src[GGML_FASA_WRITE_SRC_K]     = k;
    result->src[GGML_FASA_WRITE_SRC_CELLS] = cells;
    result->src[GGML_FASA_WRITE_SRC_INDEX] = index;
    result->src[GGML_FASA_WRITE_SRC_DIMS]  = dims;

    return result;
}

void ggml_fasa_index_write_set_center(ggml_tensor * write, ggml_tensor * center) {
    GGML_ASSERT(center->type == GGML_TYPE_F32 && ggml_is_contiguous(center));
    GGML_ASSERT(ggml_are_same_shape(center, write->src[GGML_FASA_WRITE_SRC_DIMS]));

    write->src[GGML_FASA_WRITE_SRC_CENTER] = center;
}

ggml_tensor * ggml_fasa_new_row_state(ggml_context * ctx, int64_t n_rows, int64_t n_head_kv, int64_t n_stream) {
    GGML_ASSERT(n_rows > 0);
    return ggml_new_tensor_4d(ctx, GGML_TYPE_I32, GGML_FASA_ROW_STATE + 2*n_rows, 1, n_head_kv, n_stream);
}

void ggml_fasa_index_write_set_row_state(ggml_tensor * write, ggml_tensor * state) {
    GGML_ASSERT(state->ne[2] == write->src[GGML_FASA_WRITE_SRC_DIMS]->ne[1]);

    write->src[GGML_FASA_WRITE_SRC_ROW_STATE] = state;
}

void ggml_fasa_attn_set_row_cache(ggml_tensor * attn, ggml_tensor * state, ggml_tensor * rows) {
    const ggml_tensor * k = attn->src[GGML_FASA_SRC_K];
    const ggml_tensor * v = attn->src[GGML_FASA_SRC_V];

    GGML_ASSERT(state->type == GGML_TYPE_I32 && rows->type == GGML_TYPE_F16);
    GGML_ASSERT(rows->ne[0] == (state->ne[0] - GGML_FASA_ROW_STATE)*(k->ne[0] + v->ne[0]));
    for (const ggml_tensor * t : { state, rows }) {
        GGML_ASSERT(t->nb[0] == ggml_type_size(t->type) && t->ne[1] == 1 && t->ne[2] == k->ne[2] && t->ne[3] == k->ne[3]);
    }

    attn->src[GGML_FASA_SRC_ROW_STATE] = state;
    attn->src[GGML_FASA_SRC_ROWS]      = rows;
}

void ggml_fasa_attn_join_write(ggml_tensor * attn, ggml_tensor * write) {
    GGML_ASSERT(ggml_get_op_params_i32(write, GGML_FASA_OP_PARAM_MODE) == GGML_FASA_MODE_INDEX_WRITE);
    GGML_ASSERT(ggml_nelements(write->src[GGML_FASA_WRITE_SRC_CELLS]) <= GGML_FASA_JOINED_MAX);
    GGML_ASSERT(write->src[GGML_FASA_WRITE_SRC_DIMS] == attn->src[GGML_FASA_SRC_DIMS]);
    GGML_ASSERT(!write->src[GGML_FASA_WRITE_SRC_ROW_STATE] && !attn->src[GGML_FASA_SRC_ROW_STATE]);

    attn->src[GGML_FASA_SRC_WRITE] = write;
    ggml_set_op_params_i32(write, GGML_FASA_OP_PARAM_JOINED, 1);
}

// What attn and dense have in common.
static ggml_tensor * fasa_attn_impl(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * sinks,
        float          scale,
        float          softcap,
        ggml_fasa_mode mode) {
    const int64_t n_kv      = k->ne[1];
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_stream  = k->ne[3];

    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float));
    GGML_ASSERT(q->ne[0] == k->ne[0]);
    GGML_ASSERT(q->ne[2] % n_head_kv == 0 && q->ne[3] == n_stream);
    GGML_ASSERT(v->ne[1] == n_kv && v->ne[2] == n_head_kv && v->ne[3] == n_stream);
    fasa_check_cache(k, k->ne[0]);
    fasa_check_cache(v, v->ne[0]);

    GGML_ASSERT(mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_is_contiguous(mask));
    GGML_ASSERT(mask->ne[0] == n_kv && mask->ne[1] == q->ne[1] && mask->ne[2] == 1 && mask->ne[3] == n_stream);

    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(sinks) && sinks->ne[0] == q->ne[2]);
    }

    ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], n_stream);

    fasa_set_mode(result, mode);
    ggml_set_op_params_f32(result, GGML_FASA_OP_PARAM_SCALE,   scale);
    ggml_set_op_params_f32(result, GGML_FASA_OP_PARAM_SOFTCAP, softcap);
    result->src[GGML_FASA_SRC_Q]     = q;
    result->src[GGML_FASA_SRC_K]     = k;
    result->src[GGML_FASA_SRC_V]     = v;
    result->src[GGML_FASA_SRC_MASK]  = mask;
    result->src[GGML_FASA_SRC_SINKS] = sinks;

    return result;
}

ggml_tensor * ggml_fasa_attn(
        ggml_context       * ctx,
        ggml_tensor        * q,
        ggml_tensor        * k,
        ggml_tensor        * v,
        ggml_tensor        * mask,
        ggml_tensor        * sinks,
        ggml_tensor        * index,
        ggml_tensor        * dims,
        float                scale,
        float                softcap,
        int32_t              budget,
        ggml_fasa_index_type index_type,
        int32_t              hadamard) {
    fasa_check_index(index, dims, index_type);
    fasa_check_hadamard(hadamard, k->ne[0]);
    GGML_ASSERT(index->ne[1]*GGML_FASA_TILE >= k->ne[1]);
    GGML_ASSERT(index->ne[2] == k->ne[2] && index->ne[3] == k->ne[3]);
    GGML_ASSERT(budget > 0);

    ggml_tensor * result = fasa_attn_impl(ctx, q, k, v, mask, sinks, scale, softcap, GGML_FASA_MODE_ATTN);

    ggml_set_op_params_i32(result, GGML_FASA_OP_PARAM_BUDGET,     budget);
    ggml_set_op_params_i32(result, GGML_FASA_OP_PARAM_INDEX_TYPE, index_type);
    ggml_set_op_params_i32(result, GGML_FASA_OP_PARAM_HADAMARD,   hadamard);
    result->src[GGML_FASA_SRC_INDEX] = index;
    result->src[GGML_FASA_SRC_DIMS]  = dims;

    return result;
}

ggml_tensor * ggml_fasa_dense(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * sinks,
        float          scale,
        float          softcap) {
    return fasa_attn_impl(ctx, q, k, v, mask, sinks, scale, softcap, GGML_FASA_MODE_DENSE);
}

size_t ggml_fasa_staging_size(
        ggml_type type_k, int64_t d_k, ggml_type type_v, int64_t d_v, int64_t n_cells, int64_t n_head, int64_t n_head_kv) {
    const int64_t n_slice = n_head < n_head_kv ? 2 : 1;
    return n_slice*(GGML_PAD(n_cells*n_head*ggml_row_size(type_k, d_k), GGML_FASA_STAGING_ALIGN) +
                    GGML_PAD(n_cells*n_head*ggml_row_size(type_v, d_v), GGML_FASA_STAGING_ALIGN));
}

int64_t ggml_fasa_staged_heads_max(int64_t n_head_kv) {
    return (n_head_kv + 3)/4;
}

int64_t ggml_fasa_staged_heads(const ggml_tensor * op) {
    const ggml_tensor * k       = op->src[GGML_FASA_SRC_K];
    const ggml_tensor * v       = op->src[GGML_FASA_SRC_V];
    const ggml_tensor * staging = op->src[GGML_FASA_SRC_STAGING];

    auto size_of = [&](int64_t n) {
        return ggml_fasa_staging_size(k->type, k->ne[0], v->type, v->ne[0], k->ne[1]*k->ne[3], n, k->ne[2]);
    };
    if (size_of(k->ne[2]) <= std::min(ggml_nbytes(staging), GGML_FASA_STAGED_WHOLE)) {
        return k->ne[2];
    }
    int64_t n = ggml_fasa_staged_heads_max(k->ne[2]);
    while (n > 0 && size_of(n) > ggml_nbytes(staging)) {
        --n;
    }
    return n;
}

ggml_tensor * ggml_fasa_staged(
        ggml_context * ctx,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * sinks,
        ggml_tensor  * staging,
        float          scale,
        float          softcap) {
    GGML_ASSERT(mask->type == GGML_TYPE_F16);
    for (const ggml_tensor * t : { k, v }) {
        GGML_ASSERT(t->nb[2] == ggml_row_size(t->type, t->ne[0]));
    }
    GGML_ASSERT(ggml_is_contiguous(staging) && ggml_is_vector(staging));

    ggml_tensor * result = fasa_attn_impl(ctx, q, k, v, mask, sinks, scale, softcap, GGML_FASA_MODE_STAGED);

    result->src[GGML_FASA_SRC_STAGING] = staging;
    GGML_ASSERT(ggml_fasa_staged_heads(result) > 0);

    return result;
}
