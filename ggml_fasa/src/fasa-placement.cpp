// Where K and V go: in the memory of the layer's device (variant C), or in host memory that the device reads in place
// (variant M), so that only the index takes device memory.

#include "fasa-graph.h"
#include "fasa-index-cache.h"
#include "fasa-metadata.h"
#include "ggml-fasa-mapped.h"
#include "ggml-fasa.h"
#include "llama-fasa.h"

#include "ggml-cpp.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>

// What variant C leaves free on a device: for compute buffers, and 1 GiB that llama.cpp's fitting wants left.
static constexpr uint64_t RESERVE = 2ull << 30;

// Bytes that K, V and index of all layers on a device take in variant C.
static uint64_t bytes_on_device(
        const llama_model & model, ggml_backend_dev_t dev, ggml_type type_k, ggml_type type_v, uint64_t n_cells) {
    const llama_hparams & hparams = model.hparams;
    const ggml_fasa_index_type index_type = llama_fasa_resolve_index_type(llama_fasa_get_params(), *model.fasa);
    uint64_t row = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (model.dev_layer(il) != dev || !hparams.has_kv(il) || hparams.is_swa(il)) {
            continue;
        }
        row += ggml_row_size(type_k, hparams.n_embd_k_gqa(il)) + ggml_row_size(type_v, hparams.n_embd_v_gqa(il));
        const llama_fasa_layer layer = model.fasa->layer(il);
        if (layer.n_tip > 0) {
            row += ggml_fasa_tile_size(index_type, 2*layer.n_tip)*layer.n_head_kv/GGML_FASA_TILE;
        }
    }
    return row*n_cells;
}

static uint64_t free_on_device(const llama_model & model, ggml_backend_dev_t dev) {
    size_t free, total;
    ggml_backend_dev_memory(dev, &free, &total);
    if (model.hparams.no_alloc) { // the weights are yet to come
        for (const auto & [buft, size] : model.memory_breakdown()) {
            if (ggml_backend_buft_get_device(buft) == dev && !ggml_backend_buft_is_host(buft)) {
                free -= std::min(free, size);
            }
        }
    }
    return free;
}

// Whether the device can read such a cache densely, too. Asked with an op of its shape over a few cells.
static bool can_stage(const llama_hparams & hparams, ggml_backend_dev_t dev, uint32_t il, ggml_type type_k, ggml_type type_v) {
    ggml_init_params params = { 16*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
    ggml_context_ptr ctx_ptr(ggml_init(params));
    ggml_context * ctx = ctx_ptr.get();

    constexpr int64_t N_CELLS = 256;
    const int64_t d_k = hparams.n_embd_head_k(il);
    const int64_t d_v = hparams.n_embd_head_v(il);
    const int64_t G   = hparams.n_head_kv(il);
    auto rows = [&](ggml_type type, int64_t d) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, type, d*G, N_CELLS);
        return ggml_view_3d(ctx, t, d, N_CELLS, G, t->nb[1], ggml_row_size(type, d), 0);
    };
    const ggml_tensor * staged = ggml_fasa_staged(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_k, 1, hparams.n_head(il)),
            rows(type_k, d_k), rows(type_v, d_v), ggml_new_tensor_2d(ctx, GGML_TYPE_F16, N_CELLS, 1), nullptr,
            ggml_new_tensor_1d(ctx, GGML_TYPE_I8, ggml_fasa_staging_size(type_k, d_k, type_v, d_v, N_CELLS, 1, G)), 1.0f, 0.0f);
    return ggml_backend_dev_supports_op(dev, staged);
}

// The first layer of a device that decodes sparse.
static uint32_t first_of_device(const llama_model & model, ggml_backend_dev_t dev) {
    uint32_t il = 0;
    while (model.dev_layer(il) != dev || model.fasa->layer(il).n_tip == 0) {
        ++il;
    }
    return il;
}

ggml_backend_buffer_type_t llama_fasa_kv_buft(ggml_backend_buffer_type_t buft, const llama_model & model, uint32_t il,
        ggml_type type_k, ggml_type type_v, uint64_t n_cells) {
    const llama_fasa_params     params = llama_fasa_get_params();
    const llama_fasa_metadata * md     = model.fasa.get();

    const bool wanted = params.mode == LLAMA_FASA_MODE_ON ||
            (params.mode == LLAMA_FASA_MODE_AUTO && md && (params.budget > 0 || md->budget >= 0));
    const char * refusal = llama_fasa_arch_refusal(model.arch); // whatever the file carries, no index will be beside K
    if (!wanted || !refusal || *refusal || params.variant == LLAMA_FASA_VARIANT_C || !md || !md->usable() ||
            md->layer(il).n_tip == 0 || ggml_backend_buft_is_host(buft)) {
        return buft;
    }

    ggml_backend_dev_t         dev    = model.dev_layer(il);
    ggml_backend_buffer_type_t mapped = ggml_fasa_mapped_buffer_type(dev);
    if (mapped && !can_stage(model.hparams, dev, il, type_k, type_v)) {
        mapped = nullptr;
    }
    if (mapped && params.variant == LLAMA_FASA_VARIANT_M) {
        return mapped;
    }
    const uint64_t bytes = bytes_on_device(model, dev, type_k, type_v, n_cells);
    const uint64_t free  = free_on_device(model, dev);
    const bool     fits  = bytes + RESERVE <= free && (params.vram == 0 || bytes <= (uint64_t) params.vram << 20);
    if (il == first_of_device(model, dev)) {
        // a warning: see llama_fasa_log_stats
        LLAMA_LOG_WARN("fasa: %s has %" PRIu64 " MiB free, of which %" PRIu64 " are left for other uses%s; K, V and index take %"
                PRIu64 " MiB: mode %s\n", ggml_backend_dev_name(dev), free >> 20, RESERVE >> 20,
                params.vram > 0 ? format(", and at most %d for the KV cache", params.vram).c_str() : "", bytes >> 20,
                fits || !mapped ? "c" : "m");
    }
    return fits || !mapped ? buft : mapped;
}
