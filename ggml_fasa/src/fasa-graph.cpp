#include "fasa-graph.h"

#include "fasa-index-cache.h"
#include "ggml-fasa.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"

ggml_tensor * llama_fasa_build_attn(
        const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il) {
    const llama_cparams & cparams = graph.cparams;

    const llama_fasa_index_cache * fasa = cparams.fasa;
    const auto * layer = fasa ? fasa->find(k->view_src) : nullptr;

    // only facts that a reused graph shares may decide here: rows, sequences, n_kv and fixed settings of the context
    if (!layer || !fasa->config.is_sparse(graph.ubatch, k->ne[2]) || kq_b || v_mla || !kq_mask || cparams.auto_fa) {
        return nullptr;
    }

    const bool on_host = ggml_backend_buffer_is_host(layer->k->buffer);
    // a layer that attends to another one's K has no FCs of its own
    const bool sparse = layer->n_tip > 0 && layer->il == il;
    if (!sparse && !on_host) {
        return nullptr; // a GPU's flash attention serves a KV group at once, too
    }

    ggml_context * ctx = graph.ctx0;

    const int64_t n_stream = k->ne[3];
    const int64_t n_rows   = q->ne[2]/n_stream;

    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_rows, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_rows, 0);

    q = ggml_permute(ctx, q, 0, 2, 1, 3);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);
    v = ggml_permute(ctx, v, 0, 2, 1, 3);

    const float softcap = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;

    ggml_tensor * cur;
    if (sparse) {
        const ggml_tensor * all = layer->index;
        const size_t stream0 = k->view_offs/layer->k->nb[2];
        ggml_tensor * index = ggml_view_4d(ctx, layer->index, all->ne[0], all->ne[1], all->ne[2], n_stream,
                all->nb[1], all->nb[2], all->nb[3], stream0*all->nb[3]);

        cur = ggml_fasa_attn(ctx, q, k, v, kq_mask, sinks, index, layer->dims, kq_scale, softcap,
                fasa->config.budget, fasa->config.index_type, fasa->hadamard);
        graph.cb(cur, "fasa_attn", il);
    } else {
        cur = ggml_fasa_dense(ctx, q, k, v, kq_mask, sinks, kq_scale, softcap);
        graph.cb(cur, "fasa_dense", il);
    }
    if (on_host) {
        // with the rest of the layer on a GPU (--no-kv-offload), the scheduler would have all of K copied there
        ggml_backend_sched_set_tensor_backend(graph.sched, cur, graph.backend_cpu);
    }

    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}

ggml_tensor * llama_fasa_build_write(
        const llama_fasa_index_cache * fasa, ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_set, ggml_tensor * k_idxs) {
    return fasa ? fasa->build_write(ctx, k, k_set, k_idxs) : k_set;
}

void llama_fasa_mark_forced(llama_fasa_index_cache * fasa, ggml_tensor * mask, const llama_ubatch & ubatch) {
    if (fasa) {
        fasa->mark_forced(mask, ubatch);
    }
}

void llama_fasa_mark_dirty(llama_fasa_index_cache * fasa, int32_t stream) {
    if (fasa) {
        fasa->mark_dirty(stream);
    }
}

bool llama_fasa_dirty(const llama_fasa_index_cache * fasa) {
    return fasa && fasa->dirty();
}

bool llama_fasa_rebuild(llama_fasa_index_cache * fasa, llama_context * lctx) {
    return llama_fasa_dirty(fasa) && fasa->rebuild(*lctx);
}

llama_fasa_restore_guard::~llama_fasa_restore_guard() {
    if (!llama_fasa_dirty(lctx.get_cparams().fasa)) {
        return;
    }
    try {
        lctx.memory_update(false);
    } catch (const std::exception & e) {
        // the index stays marked, and the next decode tries again and reports
        LLAMA_LOG_WARN("%s: %s\n", __func__, e.what());
    }
}

void llama_fasa_log_stats(const llama_fasa_index_cache & fasa) {
    const llama_fasa_stats & s = fasa.stats;
    if (s.n_step_sparse + s.n_step_dense + s.n_step_prefill == 0) {
        return; // a context that only measured memory
    }
    // a warning, because the tools hide libllama's information by default and nobody should decode sparse unawares
    LLAMA_LOG_WARN("fasa: %llu decode steps sparse (%llu rows), %llu dense within the budget, %llu prefill steps dense, "
            "index rebuilt %llu times\n", (unsigned long long) s.n_step_sparse, (unsigned long long) s.n_row_sparse,
            (unsigned long long) s.n_step_dense, (unsigned long long) s.n_step_prefill, (unsigned long long) s.n_index_rebuild);
}
