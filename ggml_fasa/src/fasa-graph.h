// The call sites that the patches add to llama.cpp, and nothing else: each patched line calls one of these.
// With no FASA in force each of them does nothing.

#pragma once

#include "llama.h"

#include "ggml-backend.h"

#include <memory>

struct gguf_context;
struct ggml_tensor;
struct ggml_context;
struct llama_cparams;
struct llama_fasa_index_cache;
struct llama_fasa_metadata;
struct llama_hparams;
struct llama_memory_i;
struct llama_model;
struct llama_ubatch;
struct llm_graph_context;

// llama-context: once the memory module exists. Returns the index cache that serves the context, or NULL if it stays
// dense. Throws std::runtime_error if FASA was asked for and cannot run.
llama_fasa_index_cache * llama_fasa_attach(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory);

// llama-kv-cache: where K and V of a layer go. buft: where llama.cpp puts them, memory of the layer's device; or mapped host memory
// in variant M. n_cells: of all streams.
ggml_backend_buffer_type_t llama_fasa_kv_buft(ggml_backend_buffer_type_t buft, const llama_model & model, uint32_t il,
        ggml_type type_k, ggml_type type_v, uint64_t n_cells);

// llama-graph: tip -> select -> fac, or fac alone for a dense layer, in place of llama.cpp's attention; NULL where that
// must stay.
// q, k, v as build_attn_mha gets them: [D, H, T, 1], [D, G, N, S], [DV, G, N, S].
ggml_tensor * llama_fasa_build_attn(
        const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il);

// llama-kv-cache: see the methods of the same names in llama_fasa_index_cache. fasa may be NULL.
ggml_tensor * llama_fasa_build_write(
        const llama_fasa_index_cache * fasa, ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_set, ggml_tensor * k_idxs);
bool llama_fasa_set_mask   (llama_fasa_index_cache * fasa, ggml_tensor * mask, const llama_ubatch & ubatch, bool causal);
void llama_fasa_mark_forced(llama_fasa_index_cache * fasa, ggml_tensor * mask, const llama_ubatch & ubatch);
void llama_fasa_mark_dirty (llama_fasa_index_cache * fasa, int32_t stream = -1);
bool llama_fasa_dirty      (const llama_fasa_index_cache * fasa);
bool llama_fasa_rebuild    (llama_fasa_index_cache * fasa, llama_context * lctx);

// llama-context: rebuilds a dirty index at the end of a scope, so that a restored state decodes at full speed at once.
class llama_fasa_restore_guard {
public:
    explicit llama_fasa_restore_guard(llama_context & lctx) : lctx(lctx) {}
    ~llama_fasa_restore_guard();

private:
    llama_context & lctx;
};

// llama-context: after a step. With LLAMA_FASA_VERIFY=1 in the environment, aborts if the index is not that of K.
void llama_fasa_verify(llama_context & lctx);

// What a context ran, as one line in the log.
void llama_fasa_log_stats(const llama_fasa_index_cache & fasa);
