// Who gets FASA and with which settings: llama-fasa.h, and the decision at context creation.

#include "llama-fasa.h"

#include "fasa-graph.h"
#include "fasa-index-cache.h"
#include "ggml-fasa.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <cstring>
#include <mutex>
#include <stdexcept>

static std::mutex        fasa_mutex;
static llama_fasa_params fasa_params = llama_fasa_default_params();

static thread_local std::string fasa_error;

llama_fasa_params llama_fasa_default_params(void) {
    return { LLAMA_FASA_MODE_AUTO, /*.budget =*/ 0, /*.n_sink =*/ -1, /*.n_recent =*/ -1, /*.max_batch =*/ 0 };
}

int32_t llama_fasa_set_params(const llama_fasa_params * params) {
    fasa_error.clear();

    auto check = [](const char * name, int32_t value, int32_t lo, int32_t hi) {
        if (fasa_error.empty() && (value < lo || value > hi)) {
            fasa_error = format("FASA: %s is %d, outside [%d, %d]", name, value, lo, hi);
        }
    };
    check("mode",      params->mode,      LLAMA_FASA_MODE_OFF, LLAMA_FASA_MODE_ON);
    check("budget",    params->budget,     0, LLAMA_FASA_COUNT_MAX);
    check("n_sink",    params->n_sink,    -1, LLAMA_FASA_COUNT_MAX);
    check("n_recent",  params->n_recent,  -1, LLAMA_FASA_COUNT_MAX);
    check("max_batch", params->max_batch,  0, LLAMA_FASA_COUNT_MAX);
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

llama_fasa_info llama_fasa_get_info(const llama_context * ctx) {
    const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa;
    return fasa ? fasa->info() : llama_fasa_info {};
}

llama_fasa_stats llama_fasa_get_stats(const llama_context * ctx) {
    const llama_fasa_index_cache * fasa = ctx->get_cparams().fasa;
    return fasa ? fasa->stats : llama_fasa_stats {};
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

    if (config.n_sink + config.n_recent >= config.budget) {
        throw std::runtime_error(format("FASA: %d sinks and %d recent tokens leave no room in a budget of %d",
                    config.n_sink, config.n_recent, config.budget));
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

// Whether the device can run the op; asked with an op of the model's shape.
bool device_supports_fasa(ggml_backend_dev_t dev, const llama_hparams & hparams, uint32_t il) {
    ggml_init_params params = { 16*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
    ggml_context_ptr ctx(ggml_init(params));

    const int64_t n_kv = 256;
    const int64_t G    = hparams.n_head_kv(il);
    auto tensor = [&](ggml_type type, int64_t n0, int64_t n1, int64_t n2) {
        return ggml_new_tensor_3d(ctx.get(), type, n0, n1, n2);
    };
    ggml_tensor * op = ggml_fasa_attn(ctx.get(),
            tensor(GGML_TYPE_F32, hparams.n_embd_head_k(il), 1,    hparams.n_head(il)),
            tensor(GGML_TYPE_F16, hparams.n_embd_head_k(il), n_kv, G),
            tensor(GGML_TYPE_F16, hparams.n_embd_head_v(il), n_kv, G),
            tensor(GGML_TYPE_F16, n_kv, 1, 1), nullptr, ggml_fasa_new_index(ctx.get(), 2, n_kv, G, 1),
            tensor(GGML_TYPE_I32, 2, G, 1), 1.0f, 0.0f, 1);
    return ggml_backend_dev_supports_op(dev, op);
}

} // namespace

// Why this context cannot run FASA, "" if it can. Friend of llama_kv_cache.
struct llama_fasa_support {
    static std::string reason(const llama_model & model, const llama_cparams & cparams, const llama_kv_cache * kv) {
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
                if (!t || t->type != GGML_TYPE_F16) {
                    return format("the KV cache type %s is not supported yet, use f16", t ? ggml_type_name(t->type) : "none");
                }
            }
            const ggml_backend_dev_t dev = cparams.offload_kqv ? model.dev_layer(layer.il)
                                                               : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
            if (strncmp(ggml_backend_dev_name(dev), "RPC", 3) == 0 || !device_supports_fasa(dev, hparams, layer.il)) {
                return format("the backend %s cannot run FASA yet", ggml_backend_dev_name(dev));
            }
        }
        return "";
    }

    static llama_fasa_index_cache * attach(llama_kv_cache & kv, const llama_fasa_metadata & md, const llama_fasa_config & config) {
        kv.fasa = std::make_shared<llama_fasa_index_cache>(kv, md, config);
        return kv.fasa.get();
    }
};

static llama_fasa_index_cache * fasa_attach(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory) {
    const llama_fasa_params params = llama_fasa_get_params();
    if (params.mode == LLAMA_FASA_MODE_OFF) {
        return nullptr;
    }
    const bool must = params.mode == LLAMA_FASA_MODE_ON;

    const llama_fasa_metadata * md = model.fasa.get();
    if (!md || !md->present) {
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

    llama_kv_cache * kv = full_attention_cache(memory);
    const std::string reason = llama_fasa_support::reason(model, cparams, kv);
    if (!reason.empty()) {
        if (must) {
            throw std::runtime_error("FASA: " + reason);
        }
        LLAMA_LOG_WARN("fasa: %s: decoding dense\n", reason.c_str());
        return nullptr;
    }

    llama_fasa_index_cache * fasa = llama_fasa_support::attach(*kv, *md, resolve(params, *md));

    const llama_fasa_info info = fasa->info();
    // a warning: see llama_fasa_log_stats
    LLAMA_LOG_WARN("fasa: %d layers sparse, %d dense, n_tip %d to %d, budget %d (%d sinks and %d recent forced), up to %d rows, "
            "index %.2f MiB beside %.2f MiB of K and V\n", info.n_layer_sparse, info.n_layer_dense, info.n_tip_min, info.n_tip_max,
            info.budget, info.n_sink, info.n_recent, info.max_batch, info.index_bytes/1024.0/1024.0, info.kv_bytes/1024.0/1024.0);
    return fasa;
}

llama_fasa_index_cache * llama_fasa_attach(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory) {
    fasa_error.clear();
    try {
        return fasa_attach(model, cparams, memory);
    } catch (const std::exception & e) {
        fasa_error = e.what();
        throw;
    }
}
