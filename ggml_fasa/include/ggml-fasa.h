// ggml-fasa: the graph op GGML_OP_FASA_ATTN and its stages.
//
// FASA (arXiv 2602.03152) lets each query attend to a few hundred cached tokens, picked anew for every query
// by a handful of rotary frequency chunks (FCs). One enum value carries two modes:
//
//   index_write : K rows -> index cache      (the dominant dims of K, the only thing tip reads)
//   attn        : tip -> select -> fac       (score, choose, attend)
//
// Letters used below: D head size of K, DV head size of V, H query heads, G KV heads, R = H/G,
// T tokens (query rows) of one stream, N cells of the KV cache seen by the graph, S streams,
// J index dims of a head = 2 * n_tip.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Cells of one index tile. Fixed: it is part of the index layout.
#define GGML_FASA_TILE 32

enum ggml_fasa_mode {
    GGML_FASA_MODE_ATTN        = 0,
    GGML_FASA_MODE_INDEX_WRITE = 1,
};

// op_params of GGML_OP_FASA_ATTN, as int32 slots; scale and softcap hold float bits.
enum ggml_fasa_op_param {
    GGML_FASA_OP_PARAM_MODE    = 0,
    GGML_FASA_OP_PARAM_SCALE   = 1,
    GGML_FASA_OP_PARAM_SOFTCAP = 2,
    GGML_FASA_OP_PARAM_BUDGET  = 3,
};

// Sources of the two modes.
enum ggml_fasa_attn_src {
    GGML_FASA_SRC_Q     = 0,
    GGML_FASA_SRC_K     = 1,
    GGML_FASA_SRC_V     = 2,
    GGML_FASA_SRC_MASK  = 3,
    GGML_FASA_SRC_SINKS = 4,
    GGML_FASA_SRC_INDEX = 5,
    GGML_FASA_SRC_DIMS  = 6,
};

enum ggml_fasa_index_write_src {
    GGML_FASA_WRITE_SRC_K      = 0,
    GGML_FASA_WRITE_SRC_CELLS  = 1,
    GGML_FASA_WRITE_SRC_INDEX  = 2,
    GGML_FASA_WRITE_SRC_DIMS   = 3,
};

// The index cache of one layer: F16 [TILE * J, n_cells / TILE, G, S], contiguous.
// The value of dim j of cell c of head g in stream s is element ((c / TILE) * J + j) * TILE + c % TILE of the
// plane (g, s): within a tile a dim's values for TILE neighbouring cells lie side by side, so that tip scores
// TILE cells with one broadcast of q[j] and no horizontal sum.
// n_cells must be a multiple of TILE; n_dim (J) must be even and positive.
GGML_API struct ggml_tensor * ggml_fasa_new_index(
        struct ggml_context * ctx,
        int64_t               n_dim,
        int64_t               n_cells,
        int64_t               n_head_kv,
        int64_t               n_stream);

// Stage index_cache: copies dims of K rows into the index. Returns a view of index.
//   k     : F16 [D * G, n_cells, S] or [D * G, n_cells * S]  the K cache of the layer, rows of all its heads
//   cells : I64 [n]                  global cell ids (stream * n_cells + cell), the rows to copy
//   index : see ggml_fasa_new_index
//   dims  : I32 [J, G]               dims of a head, each in [0, D)
GGML_API struct ggml_tensor * ggml_fasa_index_write(
        struct ggml_context * ctx,
        struct ggml_tensor  * k,
        struct ggml_tensor  * cells,
        struct ggml_tensor  * index,
        struct ggml_tensor  * dims);

// Stages tip -> select -> fac. Returns F32 [DV, H, T, S].
//   q     : F32 [D, T, H, S]         after RoPE
//   k     : F16 [D, N, G, S]         view of the K cache, rows contiguous
//   v     : F16 [DV, N, G, S]        view of the V cache, not transposed
//   mask  : F16 or F32 [N, T, 1, S]  0 = visible, -0.0 (sign bit set) = visible and always selected, -inf = hidden
//   sinks : F32 [H] or NULL          attention sinks: one more logit per head in the softmax denominator
//   index : the layer's index cache, all its cells and the streams that k shows (F16 [TILE * J, >= N / TILE, G, S])
//   dims  : I32 [J, G]
//   scale : factor on q.k; softcap : 0, or c in c * tanh(q.k * scale / c)
//   budget: cells a KV group keeps for a query row; all visible cells when there are no more than budget
//
// The set of a KV group g is chosen for all its R heads together. With S_h(t) = scale * sum_j q_h[dims[j]] K_t[dims[j]]
// (paper section 4.1) and p_h = softmax of S_h over the visible cells, cells are ranked by sum_h p_h(t); a tie goes
// to the lower cell. Always-selected cells count against the budget and come first; budget must cover them.
// A row that sees no cell yields zeros.
GGML_API struct ggml_tensor * ggml_fasa_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * index,
        struct ggml_tensor  * dims,
        float                 scale,
        float                 softcap,
        int32_t               budget);

#ifdef __cplusplus
}
#endif
