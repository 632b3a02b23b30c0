// Stage index_cache: the dominant dims of K, kept beside a KV cache and never out of date.
//
// K is written in one place, llama_kv_cache::cpy_k, and the index is written by the same call. Whatever else changes K
// (context shift, state load, copy between streams) marks the index dirty, and llama_kv_cache::update rebuilds it
// from K before the next batch.

#pragma once

#include "fasa-metadata.h"
#include "ggml-fasa.h"
#include "llama-fasa.h"
#include "llama.h"

#include "ggml-cpp.h"

#include <string>
#include <unordered_map>
#include <vector>

struct llama_cparams;
struct llama_model;
struct llama_ubatch;
struct llm_graph_context;
class  llama_kv_cache;

// Settings of one context, resolved from caller, metadata and defaults.
struct llama_fasa_config {
    int32_t budget; // 0: every step is dense
    int32_t n_sink;
    int32_t n_recent;
    int32_t max_batch;
    int32_t vram; // MiB, 0: no bound

    ggml_fasa_index_type index_type;

    // How many rows of a step decode: the first ones, up to a sequence that brings more than max_batch rows.
    int64_t n_decode_rows(const llama_ubatch & ubatch) const;

    // How many rows of a step that sees n_kv cells are sparse: those that decode, or none. n_kv comes padded to 256, so
    // the budget is padded alike: a cache that fits the budget is always decoded dense.
    int64_t n_sparse_rows(const llama_ubatch & ubatch, int64_t n_kv) const;
};

// Why a budget cannot be, "" if it can: the forced tokens must leave room in it.
std::string llama_fasa_budget_error(const llama_fasa_config & config, int32_t budget);

// The index type of a context: the caller's, else the metadata's, else the default.
ggml_fasa_index_type llama_fasa_resolve_index_type(const llama_fasa_params & params, const llama_fasa_metadata & metadata);

// The size of the Walsh-Hadamard blocks by which kv rotates K, 0 if it does not: upstream rotates a quantised K.
int32_t llama_fasa_hadamard(const llama_kv_cache & kv);

// Whether LLAMA_FASA_VERIFY=1 is in the environment.
bool llama_fasa_verifies();

struct llama_fasa_index_cache {
    // Allocates the index of every layer that metadata gives FCs and whose K lives in kv. Throws std::runtime_error.
    llama_fasa_index_cache(llama_kv_cache & kv, const llama_fasa_metadata & metadata, const llama_fasa_config & config);
    ~llama_fasa_index_cache();

    struct layer {
        int32_t       il;
        int32_t       n_tip; // 0: a dense layer, which has no index and no dims
        ggml_tensor * k;     // the cache tensor
        ggml_tensor * index; // ggml_fasa_new_index
        ggml_tensor * dims;  // I32 [2*n_tip, n_head_kv]
        ggml_tensor * center; // F32, like dims; NULL if the calibration has none
        ggml_tensor * row_state; // of the row cache, see ggml_fasa_new_row_state; NULL if there is none
        ggml_tensor * rows;
        ggml_tensor * staging; // of ggml_fasa_staged, shared by the layers of a device; NULL if K and V are not in mapped memory
    };

    // Adds the index write that belongs to a write of K rows. k_set: the SET_ROWS node of cache tensor k.
    // Returns k_set itself for layers without index.
    ggml_tensor * build_write(ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_set, ggml_tensor * k_idxs) const;

    // Fills an attention mask (F16 or F32 [n_kv, rows], 0 or -inf) as llama.cpp does, but without a look at every cell, and
    // marks it. false: the mask is of a kind that is left to llama.cpp.
    bool set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal);

    // Marks the forced cells of every row of a mask by -0.0, and counts the step. See ggml_fasa_attn.
    void mark_forced(ggml_tensor * mask, const llama_ubatch & ubatch);

    // After K changed other than by a write: the whole stream (-1: all) is indexed again before the next batch.
    void mark_dirty(int32_t stream = -1);
    bool dirty() const;
    bool rebuild(llama_context & lctx);

    // Compares the index of every used cell with one taken from K now, except in streams marked dirty. Returns "", or
    // a sentence that names the first layer, stream, KV head and cell that differ.
    std::string verify(llama_context & lctx) const;

    // The layer whose cache tensor is k, or NULL.
    const layer * find(const ggml_tensor * k) const;

    // Whether it is the first layer that a graph meets.
    bool is_first(const layer * l) const { return l == layers.data(); }

    llama_fasa_info info() const;

    // Read from the devices, so not for every step.
    llama_fasa_row_stats row_stats() const;

    llama_kv_cache &  kv;
    llama_fasa_config config; // but for the budget as at creation
    const int32_t     hadamard;
    llama_fasa_stats  stats = {};

private:
    // Lays out what a device holds for its layers with mapped K and V beside their index: row cache and staging.
    // ctx_small: for what must outlive the KV cache's buffers.
    void new_device_tensors(
            ggml_context * ctx, ggml_context * ctx_small, const std::vector<size_t> & mapped, uint64_t index_size);
    size_t staging_size(const std::vector<size_t> & mapped, int64_t n_head_max) const;
    // With LLAMA_FASA_VERIFY=1 set_mask leaves its mask here and has llama.cpp fill one too: aborts where they differ.
    void verify_mask(const ggml_tensor * mask);

    ggml_tensor * index_write(ggml_context * ctx, const layer & l, ggml_tensor * k, ggml_tensor * cells) const;

    std::vector<layer>                                 layers;
    std::unordered_map<const ggml_tensor *, size_t>    layer_of_k;
    std::vector<bool>                                  stream_dirty;
    std::vector<uint8_t>                               mask_to_verify;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> dims_bufs;

    uint64_t index_bytes = 0;
    uint64_t kv_bytes     = 0;
    uint64_t mapped_bytes = 0;
    uint64_t staging_bytes = 0;
    uint64_t rows_bytes    = 0;
};
