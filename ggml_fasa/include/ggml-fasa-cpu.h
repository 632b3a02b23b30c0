// The stages of GGML_OP_FASA_ATTN on the CPU, as the op calls them; exported so that tests can check one stage at a
// time. With use_ref the scalar reference runs, else the fastest path of this CPU. Not thread-safe on shared outputs;
// no function allocates. Letters as in ggml-fasa.h; type_k and type_v are of enum ggml_type, index_type is of enum
// ggml_fasa_index_type. Scratch is aligned like a double.

#pragma once

#include "ggml.h"
#include "ggml-cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// Stage index_cache: writes one K row of one head into its plane of the index.
//   k        : d values of type_k
//   hadamard : see ggml_fasa_index_write
//   dims     : [n_dim], each in [0, d)
//   center   : [n_dim], subtracted from the values kept, or NULL
//   index    : the head's plane, a row of tiles as in ggml-fasa.h
//   scratch  : d + n_dim floats
GGML_BACKEND_API void ggml_fasa_cpu_index_write(
        const void * k, int type_k, int64_t d, int32_t hadamard, const int32_t * dims, const float * center, int64_t n_dim,
        int64_t cell, int index_type, void * index, float * scratch);

// Floats of scratch that the stages below need; d is the larger of d_k and d_v.
GGML_BACKEND_API size_t ggml_fasa_cpu_tip_scratch(int64_t n_group, int64_t n_dim, int64_t n_kv);
GGML_BACKEND_API size_t ggml_fasa_cpu_fac_scratch(int64_t n_group, int64_t n_cells, int64_t d);

// Stage tip (paper section 4.1): scores cells of one KV group for one query row.
//   q       : [n_group][n_dim]  the dominant dims of the group's queries, already multiplied by scale
//   index   : the head's plane
//   mask    : n_kv values of F16 (mask_f16) or F32, see ggml_fasa_attn
//   scratch : ggml_fasa_cpu_tip_scratch floats
//   scores  : [n_kv] out: sum over the group's heads of softmax(tip), -inf where hidden, +inf where always selected; the
//             rest of the last tile is written, too
GGML_BACKEND_API void ggml_fasa_cpu_tip(
        const float * q, int64_t n_group, int64_t n_dim, int index_type, const void * index,
        const void * mask, bool mask_f16, int64_t n_kv, float * scratch, float * scores, bool use_ref);

// Stage select: the budget best cells, by score descending then cell ascending; never one with score -inf.
//   scores  : [n_kv] each >= 0 or infinite
//   scratch : [2 * n_kv]
//   cells   : [min(budget, n_kv)] out, ascending
// Returns how many were selected.
GGML_BACKEND_API int64_t ggml_fasa_cpu_select(
        const float * scores, int64_t n_kv, int64_t budget, uint32_t * scratch, int32_t * cells, bool use_ref);

// Stage fac (paper section 4.2): exact attention of one KV group over the selected cells.
//   q       : [n_group][d_k] F32, q_stride floats from head to head
//   k, v    : rows of the head, k_stride and v_stride bytes from cell to cell
//   sinks   : [n_group] or NULL
//   scratch : ggml_fasa_cpu_fac_scratch floats
//   out     : [n_group][d_v], out_stride floats from head to head
GGML_BACKEND_API void ggml_fasa_cpu_fac(
        const float * q, int64_t n_group, int64_t q_stride, const void * k, int type_k, size_t k_stride,
        const void * v, int type_v, size_t v_stride, int64_t d_k, int64_t d_v, const int32_t * cells, int64_t n_cells,
        float scale, float softcap, const float * sinks, float * scratch, float * out, int64_t out_stride, bool use_ref);

// How often the op ran in this process, by mode. For tests: proof that the op was reached.
GGML_BACKEND_API uint64_t ggml_fasa_cpu_n_attn(void);
GGML_BACKEND_API uint64_t ggml_fasa_cpu_n_index_write(void);
GGML_BACKEND_API uint64_t ggml_fasa_cpu_n_dense(void);

#ifdef __cplusplus
}
#endif
