// Stage index_cache: the dominant dims of K, kept beside a KV cache and never out of date.
//
// K is written in one place, llama_kv_cache_context::cpy_k, and the index is written by the same call if the step sees more
// cells than the budget. Before that nobody reads it: begin_step marks the cells of such a step dirty, as do a context
// shift, a state load and a copy between streams, and rebuilds what is dirty from K before the first step that writes.

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
    int32_t budget_schedule; // llama_fasa_params

    std::vector<llama_seq_id> prompts; // llama_fasa_set_prompts

    // The budget of the i-th of n sparse layers.
    int32_t layer_budget(int32_t i, int32_t n) const;

    ggml_fasa_index_type index_type;

    // How many rows of a step decode: the first ones, up to a sequence that reads a prompt or brings more than max_batch rows.
    int64_t n_decode_rows(const llama_ubatch & ubatch) const;

    // Whether n_kv cells are more than the smallest budget of a layer: only steps that see so many read the index.
    // n_kv comes padded to 256, so the budget is padded alike: a cache that fits the budget of every layer is decoded dense.
    bool exceeds_budget(int64_t n_kv) const;

    // Whether a step of n_tokens that sees n_kv cells writes the index. One that does not is caught up with when the index is read:
    // dear once, but free for what ends within the budget.
    bool writes_index(int64_t n_kv, int64_t n_tokens) const;

    // How many rows of a step that sees n_kv cells are sparse: those that decode, or none.
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

// The first backend of a context that can use a tensor where it lies. Throws std::runtime_error if there is none.
ggml_backend_t llama_fasa_backend_of(ggml_backend_sched_t sched, const ggml_tensor * t);

struct llama_fasa_index_cache {
    // Allocates the index of every layer that metadata gives FCs and whose K lives in kv. Throws std::runtime_error.
    // lctx: the context that runs what the index cache computes.
    llama_fasa_index_cache(
            llama_context & lctx, llama_kv_cache & kv, const llama_fasa_metadata & metadata, const llama_fasa_config & config);
    ~llama_fasa_index_cache();

    struct layer {
        int32_t       il;
        int32_t       n_tip; // 0: a dense layer, which has no index and no dims
        int32_t       i_sparse; // its place among the sparse layers
        ggml_tensor * k;     // the cache tensor
        ggml_tensor * index     = nullptr; // ggml_fasa_new_index
        ggml_tensor * dims      = nullptr; // I32 [2*n_tip, n_head_kv]
        ggml_tensor * center    = nullptr; // F32, like dims; NULL if the calibration has none
        ggml_tensor * row_state = nullptr; // of the row cache, see ggml_fasa_new_row_state; NULL if there is none
        ggml_tensor * rows      = nullptr;
        ggml_tensor * staging   = nullptr; // of ggml_fasa_staged, shared by the layers of a device; NULL if K and V are not mapped

        mutable ggml_tensor * write = nullptr; // the index write of the graph that is built now, if there is one
    };

    // Adds the index write that belongs to a write of K rows in a step that sees n_kv cells. k_set: the SET_ROWS node.
    // Returns k_set itself for layers without index and for steps within the budget.
    ggml_tensor * build_write(ggml_context * ctx, ggml_tensor * k_set, ggml_tensor * k_idxs, int64_t n_kv) const;

    // Joins the index write of a layer, if the graph has one, with the attention over it, where that saves a kernel.
    void join_write(const layer * l, ggml_tensor * attn) const;

    // Before the graph of a step that sees n_kv cells and writes K to cells[i] of streams[i]: brings the index up to date,
    // or remembers that those cells are not going to be in it. Throws std::runtime_error.
    void begin_step(const std::vector<llama_seq_id> & streams, const std::vector<std::vector<uint32_t>> & cells, int64_t n_kv);

    // Fills an attention mask (F16 or F32 [n_kv, rows], 0 or -inf) as llama.cpp does, but without a look at every cell, and
    // marks it. false: the mask is of a kind that is left to llama.cpp.
    bool set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal);

    // Marks the forced cells of every row of a mask by -0.0, and counts the step. See ggml_fasa_attn.
    void mark_forced(ggml_tensor * mask, const llama_ubatch & ubatch);

    // After K changed other than by a write: the whole stream (-1: all) is indexed again before it is read.
    void mark_dirty(int32_t stream = -1);

    // Indexes all dirty cells. Throws std::runtime_error.
    void rebuild();

    // Compares the index of every used cell that is not dirty with one taken from K now. Returns "", or a sentence that
    // names the first layer, stream, KV head and cell that differ.
    std::string verify() const;

    // The layer whose cache tensor is k, or NULL.
    const layer * find(const ggml_tensor * k) const;

    // The tokens that a sparse layer keeps in steps built from now on.
    int32_t budget(const layer * l) const { return config.layer_budget(l->i_sparse, n_sparse); }

    // Whether it is the first layer that a graph meets.
    bool is_first(const layer * l) const { return l == layers.data(); }

    llama_fasa_info info() const;

    // Read from the devices, so not for every step.
    llama_fasa_row_stats row_stats() const;

    llama_context &   lctx;
    llama_kv_cache &  kv;
    llama_fasa_config config; // but for budget and prompts as at creation
    const int32_t     hadamard;
    llama_fasa_stats  stats = {};

private:
    // Cells [begin, end) of a stream.
    struct cell_range {
        uint32_t begin = UINT32_MAX;
        uint32_t end   = 0;

        bool empty() const { return end <= begin; }
        bool has(uint32_t cell) const { return cell >= begin && cell < end; }
    };

    bool is_dirty() const;

    // The used cells that are dirty, or all others, as rows of the cache tensors.
    std::vector<int64_t> used_cells(bool is_dirty) const;

    // With LLAMA_FASA_VERIFY=1 set_mask leaves its mask here and has llama.cpp fill one too: aborts where they differ.
    void verify_mask(const ggml_tensor * mask);

    // Lays out what a device holds for its layers with mapped K and V beside their index: row cache and staging.
    // ctx_small: for what must outlive the KV cache's buffers.
    void new_device_tensors(
            ggml_context * ctx, ggml_context * ctx_small, const std::vector<size_t> & mapped, uint64_t index_size);
    size_t staging_size(const std::vector<size_t> & mapped, int64_t n_head_max) const;
    ggml_tensor * index_write(ggml_context * ctx, const layer & l, ggml_tensor * k, ggml_tensor * cells) const;
    void rebuild(ggml_backend_t backend, const std::vector<const layer *> & of, const std::vector<int64_t> & ids) const;

    std::vector<layer>                                 layers;
    int32_t                                            n_sparse = 0;
    std::unordered_map<const ggml_tensor *, size_t>    layer_of_k;
    std::vector<cell_range>                            dirty; // of each stream
    std::vector<uint8_t>                               mask_to_verify;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> dims_bufs;

    uint64_t index_bytes = 0;
    uint64_t kv_bytes     = 0;
    uint64_t mapped_bytes = 0;
    uint64_t staging_bytes = 0;
    uint64_t rows_bytes    = 0;
};
