// ggml-fasa: the graph op GGML_OP_FASA_ATTN and its stages.
//
// FASA (arXiv 2602.03152) lets each query attend to a few hundred cached tokens, picked anew for every query
// by a handful of rotary frequency chunks (FCs). One enum value carries four modes:
//
//   index_write : K rows -> index cache      (the dominant dims of K, the only thing tip reads)
//   attn        : tip -> select -> fac       (score, choose, attend)
//   dense       : fac over every cell        (for layers without FCs, on backends where it beats flash attention)
//   staged      : flash attention over a K and V in mapped host memory (ggml-fasa-mapped.h), copied a few heads at a time
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

// Bytes of K and V up to which a staged op takes all heads at once, see ggml_fasa_staged_heads: to copy them takes less than a
// millisecond.
#define GGML_FASA_STAGED_WHOLE ((size_t) 32 << 20)

// Alignment in bytes of what lies in a staging tensor.
#define GGML_FASA_STAGING_ALIGN 256

enum ggml_fasa_mode {
    GGML_FASA_MODE_ATTN        = 0,
    GGML_FASA_MODE_INDEX_WRITE = 1,
    GGML_FASA_MODE_DENSE       = 2,
    GGML_FASA_MODE_STAGED      = 3,
};

// How the index keeps a value: F16; or an integer of 8 or 4 bits, with one F16 scale for the J values of a cell.
enum ggml_fasa_index_type {
    GGML_FASA_INDEX_F16 = 0,
    GGML_FASA_INDEX_Q8  = 1,
    GGML_FASA_INDEX_Q4  = 2,
    GGML_FASA_INDEX_COUNT,
};

// op_params of GGML_OP_FASA_ATTN, as int32 slots; scale and softcap hold float bits.
enum ggml_fasa_op_param {
    GGML_FASA_OP_PARAM_MODE       = 0,
    GGML_FASA_OP_PARAM_SCALE      = 1,
    GGML_FASA_OP_PARAM_SOFTCAP    = 2,
    GGML_FASA_OP_PARAM_BUDGET     = 3,
    GGML_FASA_OP_PARAM_INDEX_TYPE = 4,
    GGML_FASA_OP_PARAM_HADAMARD   = 5,
    GGML_FASA_OP_PARAM_JOINED     = 6, // of index_write: see ggml_fasa_attn_join_write
};

// Sources of the modes; dense and staged have the first five of attn.
enum ggml_fasa_attn_src {
    GGML_FASA_SRC_Q     = 0,
    GGML_FASA_SRC_K     = 1,
    GGML_FASA_SRC_V     = 2,
    GGML_FASA_SRC_MASK  = 3,
    GGML_FASA_SRC_SINKS = 4,
    GGML_FASA_SRC_INDEX = 5,
    GGML_FASA_SRC_DIMS  = 6,
    GGML_FASA_SRC_ROW_STATE = 7,
    GGML_FASA_SRC_ROWS      = 8,
    GGML_FASA_SRC_WRITE     = 9,
    GGML_FASA_SRC_STAGING = 5, // of staged
};

enum ggml_fasa_index_write_src {
    GGML_FASA_WRITE_SRC_K      = 0,
    GGML_FASA_WRITE_SRC_CELLS  = 1,
    GGML_FASA_WRITE_SRC_INDEX  = 2,
    GGML_FASA_WRITE_SRC_DIMS   = 3,
    GGML_FASA_WRITE_SRC_CENTER = 4,
    GGML_FASA_WRITE_SRC_ROW_STATE = 5,
};

// The index cache of one layer: [tile size, n_cells / TILE, G, S], contiguous. A plane (g, s) is a row of tiles, and
// a tile holds TILE neighbouring cells dim by dim, so that tip scores many cells at once and never sums across lanes.
//
//   F16     : tensor of F16, a tile is [J][TILE] values.
//   Q8, Q4  : tensor of I8. A tile is TILE scales d (F16), then [W][TILE] words of 32 bits (little-endian) with
//             W = ceil(J/4) for Q8 and ceil(J/8) for Q4. Value j of a cell is d * (x - 128) in Q8, where x is byte j%4 of
//             word j/4, and d * (x - 8) in Q4, where x is the low (j%8 < 4) or high nibble of byte j%4 of word j/8.
//             Bits beyond J are zero. The scale and the integers of K values k_j, in float:
//               Q8 : d = F16(max |k_j| / 127),  x = clamp(rint(k_j * (1/d)), -127, 127) + 128
//               Q4 : d = F16(k_m / -8) with k_m the first k_j of largest magnitude,  x = clamp(rint(k_j * (1/d)), -8, 7) + 8
//             and x = 128 or 8 throughout where d is 0.
//
// n_cells must be a multiple of TILE; n_dim (J) must be even and positive.
GGML_API struct ggml_tensor * ggml_fasa_new_index(
        struct ggml_context     * ctx,
        enum ggml_fasa_index_type type,
        int64_t                   n_dim,
        int64_t                   n_cells,
        int64_t                   n_head_kv,
        int64_t                   n_stream);

// Bytes of a tile, a multiple of 64.
GGML_API size_t ggml_fasa_tile_size(enum ggml_fasa_index_type type, int64_t n_dim);

// "f16", "q8", "q4"; NULL if there is no such type.
GGML_API const char * ggml_fasa_index_type_name(enum ggml_fasa_index_type type);

// Stage index_cache: puts dims of K rows into the index. Returns a view of index.
//   k        : [D * G, n_cells, S] or [D * G, n_cells * S]  the K cache of the layer, rows of all its heads; F16, BF16, F32
//              or a quantised type whose blocks divide D
//   cells    : I64 [n]                  global cell ids (stream * n_cells + cell), the rows to index
//   index    : see ggml_fasa_new_index, of type index_type
//   dims     : I32 [J, G]               dims of a head, each in [0, D)
//   hadamard : 0, or the size (a power of two that divides D) of the orthonormal Walsh-Hadamard blocks by which the
//              cached K is rotated; the index is taken from K before that rotation
GGML_API struct ggml_tensor * ggml_fasa_index_write(
        struct ggml_context     * ctx,
        struct ggml_tensor      * k,
        struct ggml_tensor      * cells,
        struct ggml_tensor      * index,
        struct ggml_tensor      * dims,
        enum ggml_fasa_index_type index_type,
        int32_t                   hadamard);

// Makes an index_write keep K minus center, F32 [J, G], in float: what all tokens have in common does not change the order
// of scores, and integers resolve the rest better without it. Every write to an index must have the same center.
GGML_API void ggml_fasa_index_write_set_center(struct ggml_tensor * write, struct ggml_tensor * center);

// Stages tip -> select -> fac. Returns F32 [DV, H, T, S].
//   q        : F32 [D, T, H, S]         after RoPE, and rotated like K if hadamard is not 0
//   k        : [D, N, G, S]             view of the K cache, of a type that ggml_fasa_index_write takes
//   v        : [DV, N, G, S]            view of the V cache, not transposed; the same types
//   mask     : F16 or F32 [N, T, 1, S]  0 = visible, -0.0 (sign bit set) = visible and always selected, -inf = hidden
//   sinks    : F32 [H] or NULL          attention sinks: one more logit per head in the softmax denominator
//   index    : the layer's index cache, all its cells and the streams that k shows ([tile size, >= N / TILE, G, S])
//   dims     : I32 [J, G]
//   scale    : factor on q.k; softcap : 0, or c in c * tanh(q.k * scale / c)
//   budget   : cells a KV group keeps for a query row; all visible cells when there are no more than budget
//   hadamard : as for ggml_fasa_index_write
//
// The set of a KV group g is chosen for all its R heads together. With S_h(t) = scale * sum_j q_h[dims[j]] K_t[dims[j]]
// (paper section 4.1) and p_h = softmax of S_h over the visible cells, cells are ranked by sum_h p_h(t); a tie goes
// to the lower cell. Always-selected cells count against the budget and come first; budget must cover them.
// A row that sees no cell yields zeros.
//
// Where the index is of integers, so is q, that all backends may sum in integers and agree: with x_j = scale *
// q_h[dims[j]] and m = max |x_j|, q'_j = rint(x_j * (127/m)) and S_h(t) = (m/127 * d_t) * sum_j q'_j (x - offset)_j.
// A head with m < FLT_MIN has q' = 0.
GGML_API struct ggml_tensor * ggml_fasa_attn(
        struct ggml_context     * ctx,
        struct ggml_tensor      * q,
        struct ggml_tensor      * k,
        struct ggml_tensor      * v,
        struct ggml_tensor      * mask,
        struct ggml_tensor      * sinks,
        struct ggml_tensor      * index,
        struct ggml_tensor      * dims,
        float                     scale,
        float                     softcap,
        int32_t                   budget,
        enum ggml_fasa_index_type index_type,
        int32_t                   hadamard);

// Cells that a joined write may have.
#define GGML_FASA_JOINED_MAX 8

// Makes attn depend on write, an index_write to the same index of at most GGML_FASA_JOINED_MAX cells and without a row state,
// and lets the backend do both at once, when it comes to attn. One backend must run both, and nothing else may read the index in
// between.
GGML_API void ggml_fasa_attn_join_write(struct ggml_tensor * attn, struct ggml_tensor * write);

// Words of 32 bits before the tags in the state of a row cache: {turn, rows in each half, 0, hits and misses of 64 bits}.
#define GGML_FASA_ROW_STATE 8

// The state of a row cache: I32 [GGML_FASA_ROW_STATE + 2 * n_rows, 1, G, S], zero when it is new. To it belong the rows: F16
// [2 * n_rows * (D + DV), 1, G, S].
GGML_API struct ggml_tensor * ggml_fasa_new_row_state(
        struct ggml_context * ctx,
        int64_t               n_rows,
        int64_t               n_head_kv,
        int64_t               n_stream);

// Lets attn keep n_rows of the rows that it reads for its next step, so that rows in host memory are read less often. CUDA,
// K and V in F16, one query row for each stream; elsewhere it changes nothing. Every write to K or V must tell the state.
GGML_API void ggml_fasa_attn_set_row_cache(struct ggml_tensor * attn, struct ggml_tensor * state, struct ggml_tensor * rows);
GGML_API void ggml_fasa_index_write_set_row_state(struct ggml_tensor * write, struct ggml_tensor * state);

// Stage fac over every visible cell: exact attention that reads each row of K and V once for a whole KV group.
// Arguments and result as of ggml_fasa_attn; -0.0 in the mask is 0.
GGML_API struct ggml_tensor * ggml_fasa_dense(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        float                 scale,
        float                 softcap);

// The backend's own flash attention over a cache that the device reaches slowly: K and V are copied to staging, all heads at once
// or some while those before them are worked on, see ggml_fasa_staged_heads. Only on CUDA. Arguments and result as of
// ggml_fasa_dense; mask is F16.
//   k, v    : the heads of a cell are neighbours
//   staging : I8, one-dimensional, in memory of the device, for ggml_fasa_staging_size bytes of at least one head
GGML_API struct ggml_tensor * ggml_fasa_staged(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * staging,
        float                 scale,
        float                 softcap);

// Bytes that staging n_head of the n_head_kv heads at a time takes, of n_cells cells of all streams: twice their K and V, or once
// if they are all.
GGML_API size_t ggml_fasa_staging_size(
        enum ggml_type type_k, int64_t d_k, enum ggml_type type_v, int64_t d_v, int64_t n_cells, int64_t n_head, int64_t n_head_kv);

// Heads of a large K and V that are staged at a time if nothing bounds them: a quarter, so that copies and work overlap.
GGML_API int64_t ggml_fasa_staged_heads_max(int64_t n_head_kv);

// Heads that a staged op copies at a time: all, if staging holds them and they take at most GGML_FASA_STAGED_WHOLE, so that the
// result is the one of K and V on the device bit by bit; else as many as staging holds, at most ggml_fasa_staged_heads_max.
GGML_API int64_t ggml_fasa_staged_heads(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
