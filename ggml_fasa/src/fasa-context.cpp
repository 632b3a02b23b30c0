// Who gets FASA and with which settings: llama-fasa.h, and the decision at context creation.

#include "llama-fasa.h"

#include "fasa-graph.h"
#include "fasa-index-cache.h"
#include "ggml-fasa-mapped.h"
#include "ggml-fasa.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

static std::mutex        fasa_mutex;
static llama_fasa_params fasa_params = llama_fasa_default_params();

static thread_local std::string fasa_error;

llama_fasa_params llama_fasa_default_params(void) {
    return {
        LLAMA_FASA_MODE_AUTO, /*.budget =*/ 0, /*.n_sink =*/ -1, /*.n_recent =*/ -1, /*.max_batch =*/ 0, /*.index_type =*/ -1,
        LLAMA_FASA_VARIANT_AUTO, /*.vram =*/ 0, /*.budget_schedule =*/ 0,
    };
}

int32_t llama_fasa_set_params(const llama_fasa_params * params) {
    fasa_error.clear();

    auto check = [](const char * name, int32_t value, int32_t lo, int32_t hi) {
        if (fasa_error.empty() && (value < lo || value > hi)) {
            fasa_error = format("FASA: %s is %d, outside [%d, %d]", name, value, lo, hi);
        }
    };
    check("mode",       params->mode,       LLAMA_FASA_MODE_OFF, LLAMA_FASA_MODE_ON);
    check("budget",     params->budget,      0, LLAMA_FASA_COUNT_MAX);
    check("n_sink",     params->n_sink,     -1, LLAMA_FASA_COUNT_MAX);
    check("n_recent",   params->n_recent,   -1, LLAMA_FASA_COUNT_MAX);
    check("max_batch",  params->max_batch,   0, LLAMA_FASA_COUNT_MAX);
    check("index_type", params->index_type, -1, GGML_FASA_INDEX_COUNT - 1);
    check("variant",    params->variant,    LLAMA_FASA_VARIANT_AUTO, LLAMA_FASA_VARIANT_M);
    check("vram",       params->vram,        0, LLAMA_FASA_COUNT_MAX);
    check("budget_schedule", params->budget_schedule, 0, 199);
    if (!fasa_error.empty()) {
        return -1;
    }

    std::lock_guard<std::mutex> lock(fasa_mutex);
    fasa_params = *params;
    return 0;
}

llama_fasa_params llama_fasa_get_params(void) {
    std::lock_guard<std::mutex> lock(fasa_mutex);
    return fasa_params;
}

int32_t llama_fasa_model_calibrated(const llama_model * model) {
    fasa_error.clear();
    if (!model->fasa || !model->fasa->present) {
        return 0;
    }
    fasa_error = model->fasa->error;
    return fasa_error.empty() ? 1 : -1;
}

int32_t llama_fasa_model_budget(const llama_model * model) {
    return model->fasa && model->fasa->usable() ? std::max(model->fasa->budget, 0) : 0;
}

llama_fasa_info llama_fasa_get_info(const llama_context * ctx) {
    const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa;
    return fasa ? fasa->info() : llama_fasa_info {};
}

int32_t llama_fasa_check_budget(const llama_context * ctx, int32_t budget) {
    fasa_error.clear();
    const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa;
    if (budget < 0 || budget > LLAMA_FASA_COUNT_MAX) {
        fasa_error = format("FASA: budget is %d, outside [0, %d]", budget, LLAMA_FASA_COUNT_MAX);
    } else if (budget > 0) {
        fasa_error = fasa ? llama_fasa_budget_error(fasa->config, budget) : "FASA: the context runs without it";
    }
    return fasa_error.empty() ? 0 : -1;
}

int32_t llama_fasa_set_budget(llama_context * ctx, int32_t budget) {
    if (llama_fasa_check_budget(ctx, budget) != 0) {
        return -1;
    }
    if (llama_fasa_index_cache * fasa = ctx->get_cparams().fasa) {
        fasa->config.budget = budget;
    }
    return 0;
}

void llama_fasa_set_prompts(llama_context * ctx, const llama_seq_id * seqs, size_t n) {
    if (llama_fasa_index_cache * fasa = ctx->get_cparams().fasa) {
        fasa->config.prompts.assign(seqs, seqs + n);
    }
}

llama_fasa_stats llama_fasa_get_stats(const llama_context * ctx) {
    const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa;
    return fasa ? fasa->stats : llama_fasa_stats {};
}

llama_fasa_row_stats llama_fasa_get_row_stats(llama_context * ctx) {
    const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa;
    if (!fasa) {
        return {};
    }
    ctx->synchronize();
    return fasa->row_stats();
}

void llama_fasa_reset_stats(llama_context * ctx) {
    if (llama_fasa_index_cache * fasa = ctx->get_cparams().fasa) {
        fasa->stats = {};
    }
}

void llama_fasa_print_stats(const llama_context * ctx) {
    if (const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa) {
        llama_fasa_log_stats(*fasa);
    }
}

const char * llama_fasa_last_error(void) {
    return fasa_error.c_str();
}

const char * llama_fasa_version(void) {
    return FASA_VERSION;
}

const char * llama_fasa_pin(void) {
    return FASA_PIN_VERSION;
}

ggml_fasa_index_type llama_fasa_resolve_index_type(const llama_fasa_params & params, const llama_fasa_metadata & metadata) {
    return (ggml_fasa_index_type) (params.index_type >= 0 ? params.index_type :
            metadata.index_type >= 0 ? metadata.index_type : LLAMA_FASA_INDEX_TYPE_DEFAULT);
}

namespace {

llama_fasa_config resolve(const llama_fasa_params & params, const llama_fasa_metadata & md) {
    auto first_set = [](int32_t given, bool is_given, int32_t metadata, int32_t fallback) {
        return is_given ? given : metadata >= 0 ? metadata : fallback;
    };
    llama_fasa_config config;
    config.budget    = first_set(params.budget,   params.budget   >  0, md.budget,   LLAMA_FASA_BUDGET_DEFAULT);
    config.n_sink    = first_set(params.n_sink,   params.n_sink   >= 0, md.n_sink,   LLAMA_FASA_N_SINK_DEFAULT);
    config.n_recent  = first_set(params.n_recent, params.n_recent >= 0, md.n_recent, LLAMA_FASA_N_RECENT_DEFAULT);
    config.max_batch = params.max_batch > 0 ? params.max_batch : LLAMA_FASA_MAX_BATCH_DEFAULT;
    config.vram       = params.vram;
    config.index_type = llama_fasa_resolve_index_type(params, md);
    config.budget_schedule = params.budget_schedule > 0 ? params.budget_schedule : LLAMA_FASA_BUDGET_SCHEDULE_DEFAULT;

    const std::string error = llama_fasa_budget_error(config, config.budget);
    if (!error.empty()) {
        throw std::runtime_error(error);
    }
    return config;
}

// The cache of the layers that see the whole context, or NULL.
llama_kv_cache * full_attention_cache(llama_memory_i * memory) {
    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        return kv;
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return hybrid->get_mem_attn()->get_base();
    }
    return nullptr;
}

bool type_supported(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
            return true;
        default:
            return false;
    }
}

} // namespace

// Whether and how a context can run FASA. Friend of llama_kv_cache.
struct llama_fasa_support {
    // Why this context cannot run FASA, "" if it can.
    static std::string reason(const llama_model & model, const llama_cparams & cparams, const llama_kv_cache * kv,
            const llama_fasa_config & config) {
        const llama_hparams & hparams = model.hparams;

        if (!kv) {
            return "the model has no KV cache of a kind that FASA can index";
        }
        if (cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
            return "the context is a draft head, not the model";
        }
        if (&kv->hparams != &model.hparams || kv->other) {
            return "the KV cache is a part of another one";
        }
        if (hparams.is_mla()) {
            return "multi-head latent attention has no rotary planes per head";
        }
        if (hparams.use_alibi) {
            return "ALiBi has no rotary planes";
        }
        if (!cparams.causal_attn) {
            return "attention is not causal";
        }
        if (kv->v_trans) {
            return "flash attention is off (switch it on with -fa on)";
        }
        if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
            return "split mode tensor is not supported, use split mode layer";
        }
        for (const auto & layer : kv->layers) {
            for (const ggml_tensor * t : { layer.k, layer.v }) {
                if (!t || !type_supported(t->type)) {
                    return format("the KV cache type %s is not supported, use f16, bf16, f32, q8_0, q5_1, q5_0, q4_1 or "
                            "q4_0", t ? ggml_type_name(t->type) : "none");
                }
            }
            const int32_t n_tip = model.fasa->layer(layer.il).n_tip;
            if (n_tip == 0) {
                continue; // dense on any device
            }
            const ggml_backend_dev_t dev = cparams.offload_kqv ? model.dev_layer(layer.il)
                                                               : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
            if (strncmp(ggml_backend_dev_name(dev), "RPC", 3) == 0) {
                return format("the backend %s cannot run FASA yet", ggml_backend_dev_name(dev));
            }
            if (!device_supports(dev, hparams, *kv, layer.il, 2*n_tip, config)) {
                return format("the backend %s cannot run FASA with K in %s, V in %s and an index of type %s",
                        ggml_backend_dev_name(dev), ggml_type_name(layer.k->type), ggml_type_name(layer.v->type),
                        ggml_fasa_index_type_name(config.index_type));
            }
        }
        return "";
    }

    // Whether a part of the cache is in mapped memory.
    static bool mapped(const llama_kv_cache * kv) {
        return kv && std::any_of(kv->layers.begin(), kv->layers.end(), [](const auto & layer) {
            return layer.k && ggml_fasa_buft_is_mapped(ggml_backend_buffer_get_type(layer.k->buffer));
        });
    }

    static llama_fasa_index_cache * attach(
            llama_context & lctx, llama_kv_cache & kv, const llama_fasa_metadata & md, const llama_fasa_config & config) {
        kv.fasa = std::make_shared<llama_fasa_index_cache>(lctx, kv, md, config);
        return kv.fasa.get();
    }

private:
    // Whether the device can run both modes; asked with ops of the shapes and types that the layer is going to have.
    static bool device_supports(ggml_backend_dev_t dev, const llama_hparams & hparams, const llama_kv_cache & kv,
            uint32_t il, int64_t n_dim, const llama_fasa_config & config) {
        ggml_init_params params = { 16*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
        ggml_context_ptr ctx_ptr(ggml_init(params));
        ggml_context * ctx = ctx_ptr.get();

        const auto &  layer    = kv.layers[kv.map_layer_ids.at(il)];
        const int64_t d_k      = hparams.n_embd_head_k(il);
        const int64_t d_v      = hparams.n_embd_head_v(il);
        const int64_t G        = hparams.n_head_kv(il);
        const int64_t n_kv     = kv.get_size();
        const int32_t hadamard = llama_fasa_hadamard(kv);

        ggml_tensor * dims  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_dim, G);
        ggml_tensor * index = ggml_fasa_new_index(ctx, config.index_type, n_dim, n_kv, G, 1);
        // head by head, as the cache is seen
        auto rows = [&](ggml_type type, int64_t d) {
            ggml_tensor * t = ggml_new_tensor_2d(ctx, type, d*G, n_kv);
            return ggml_view_3d(ctx, t, d, n_kv, G, t->nb[1], ggml_row_size(type, d), 0);
        };

        ggml_tensor * write = ggml_fasa_index_write(ctx, ggml_new_tensor_2d(ctx, layer.k->type, d_k*G, n_kv),
                ggml_new_tensor_1d(ctx, GGML_TYPE_I64, 1), index, dims, config.index_type, hadamard);
        ggml_tensor * attn = ggml_fasa_attn(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_k, 1, hparams.n_head(il)),
                rows(layer.k->type, d_k), rows(layer.v->type, d_v), ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, 1), nullptr,
                index, dims, 1.0f, 0.0f, config.budget, config.index_type, hadamard);
        return ggml_backend_dev_supports_op(dev, write) && ggml_backend_dev_supports_op(dev, attn);
    }
};

static llama_fasa_index_cache * fasa_attach(llama_context & lctx) {
    const llama_model   & model   = lctx.get_model();
    const llama_cparams & cparams = lctx.get_cparams();

    const llama_fasa_params params = llama_fasa_get_params();
    if (params.mode == LLAMA_FASA_MODE_OFF) {
        return nullptr;
    }
    const bool must = params.mode == LLAMA_FASA_MODE_ON;

    const llama_fasa_metadata * md = model.fasa.get();
    const bool present = md && md->present;

    const char * refusal = llama_fasa_arch_refusal(model.arch);
    if (!refusal || *refusal) {
        const std::string reason = format("the architecture %s cannot run it: %s", llm_arch_name(model.arch),
                refusal ? refusal : "it is new to this version");
        if (must) {
            throw std::runtime_error("FASA: " + reason);
        }
        if (params.budget > 0 || present) {
            LLAMA_LOG_WARN("fasa: %s: decoding dense\n", reason.c_str());
        }
        return nullptr;
    }
    if (!present) {
        if (must) {
            throw std::runtime_error("FASA: the model is not calibrated, run fasa-calibrate on it first");
        }
        if (params.budget > 0) {
            LLAMA_LOG_WARN("fasa: the model is not calibrated, run fasa-calibrate on it first: decoding dense\n");
        }
        return nullptr;
    }
    if (!md->error.empty()) {
        throw std::runtime_error(md->error);
    }
    if (!must && params.budget == 0 && md->budget < 0) {
        LLAMA_LOG_INFO("fasa: the model is calibrated; give --fasa-budget to decode sparse\n");
        return nullptr;
    }

    const llama_fasa_config config = resolve(params, *md);

    llama_kv_cache * kv = full_attention_cache(lctx.get_memory());
    const std::string reason = llama_fasa_support::reason(model, cparams, kv, config);
    if (!reason.empty()) {
        if (must || llama_fasa_support::mapped(kv)) { // dense steps over mapped memory would crawl
            throw std::runtime_error("FASA: " + reason);
        }
        LLAMA_LOG_WARN("fasa: %s: decoding dense\n", reason.c_str());
        return nullptr;
    }

    if (params.variant == LLAMA_FASA_VARIANT_M && !llama_fasa_support::mapped(kv)) {
        throw std::runtime_error("FASA: mode m needs a CUDA device that serves sparse layers, their KV cache and flash "
                "attention over it (-ngl, no -nkvo)");
    }

    llama_fasa_index_cache * fasa = llama_fasa_support::attach(lctx, *kv, *md, config);

    const llama_fasa_info info = fasa->info();
    // a warning: see llama_fasa_log_stats
    LLAMA_LOG_WARN("fasa: %d layers sparse, %d dense, n_tip %d to %d, budget %d (%d %% of it in the first layer, %d sinks and %d recent "
            "forced), up to %d rows, %s index of %.2f MiB beside %.2f MiB of K and V, %.2f MiB of those in mapped host memory (FASA-%s)\n",
            info.n_layer_sparse, info.n_layer_dense, info.n_tip_min, info.n_tip_max, info.budget, info.budget_schedule, info.n_sink,
            info.n_recent, info.max_batch, ggml_fasa_index_type_name(config.index_type), info.index_bytes/1024.0/1024.0,
            info.kv_bytes/1024.0/1024.0, info.mapped_bytes/1024.0/1024.0,
            info.mapped_bytes > 0 ? "M" : "C");
    if (info.mapped_bytes > 0) {
        LLAMA_LOG_WARN("fasa: beside the index, devices hold %.2f MiB through which K and V are read densely, and %.2f MiB of "
                "rows selected last\n", info.staging_bytes/1024.0/1024.0, info.rows_bytes/1024.0/1024.0);
    }
    return fasa;
}

llama_fasa_index_cache * llama_fasa_attach(llama_context & lctx) {
    fasa_error.clear();
    try {
        return fasa_attach(lctx);
    } catch (const std::exception & e) {
        fasa_error = e.what();
        throw;
    }
}
