#include "fasa-graph.h"

#include "fasa-index-cache.h"
#include "ggml-fasa.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"

namespace {

float softcap_of(const llm_graph_context & graph) {
    return graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
}

// Part of every graph, so that one is reused only for steps that it would have been built for.
class input_step : public llm_graph_input_i {
public:
    input_step(const llama_fasa_index_cache & fasa, const llama_ubatch & ubatch) :
        fasa(fasa), budget(fasa.config.budget), n_rows(fasa.config.n_decode_rows(ubatch)) {}

    void set_input(const llama_ubatch *) override {}

    bool can_reuse(const llm_graph_params & params) override {
        return fasa.config.budget == budget && fasa.config.n_decode_rows(params.ubatch) == n_rows;
    }

private:
    const llama_fasa_index_cache & fasa;
    const int32_t                  budget;
    const int64_t                  n_rows;
};

// Flash attention over all cells, of K and V in mapped memory; else llama.cpp's own.
ggml_tensor * build_dense(
        const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int il) {
    const auto * layer = graph.cparams.fasa->find(k->view_src);
    if (!layer->staging) {
        return graph.build_attn_mha(q, k, v, nullptr, kq_mask, sinks, nullptr, 0, kq_scale, il);
    }
    ggml_context * ctx = graph.ctx0;

    const int64_t n_stream = k->ne[3];
    const int64_t n_rows   = q->ne[2]/n_stream;

    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_rows, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_rows, 0);

    ggml_tensor * cur = ggml_fasa_staged(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3),
            ggml_permute(ctx, v, 0, 2, 1, 3), kq_mask, sinks, layer->staging, kq_scale, softcap_of(graph));
    graph.cb(cur, "fasa_staged", il);
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}

// The rows from n on of a step whose first n are sparse, by llama.cpp's attention.
ggml_tensor * build_rest(
        const llm_graph_context & graph, int64_t n, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int il) {
    q = ggml_view_3d(graph.ctx0, q, q->ne[0], q->ne[1], q->ne[2] - n, q->nb[1], q->nb[2], n*q->nb[2]);
    kq_mask = ggml_view_4d(graph.ctx0, kq_mask, kq_mask->ne[0], kq_mask->ne[1] - n, 1, 1,
            kq_mask->nb[1], kq_mask->nb[2], kq_mask->nb[3], n*kq_mask->nb[1]);
    return build_dense(graph, q, k, v, kq_mask, sinks, kq_scale, il);
}

} // namespace

ggml_tensor * llama_fasa_build_attn(
        const llm_graph_context & graph, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il) {
    const llama_cparams & cparams = graph.cparams;

    const llama_fasa_index_cache * fasa = cparams.fasa;
    const auto * layer = fasa ? fasa->find(k->view_src) : nullptr;

    if (!layer || kq_b || v_mla || !kq_mask || cparams.auto_fa || q->ne[2] < graph.n_tokens) {
        return nullptr; // the last is build_rest
    }
    if (fasa->is_first(layer)) {
        graph.res->add_input(std::make_unique<input_step>(*fasa, graph.ubatch));
    }

    // only facts that a reused graph shares may decide here: n_kv, and what input_step compares
    const int64_t n_sparse = fasa->config.n_sparse_rows(graph.ubatch, k->ne[2]);
    if (n_sparse == 0) {
        return layer->staging ? build_dense(graph, q, k, v, kq_mask, sinks, kq_scale, il) : nullptr;
    }
    const bool whole = n_sparse == graph.n_tokens;

    const bool on_host = ggml_backend_buffer_is_host(layer->k->buffer) && !layer->staging;
    // a layer that attends to another one's K has no FCs of its own
    const bool sparse = layer->n_tip > 0 && layer->il == il;
    if (!sparse && !on_host) { // a GPU's flash attention serves a KV group at once, too
        return layer->staging ? build_dense(graph, q, k, v, kq_mask, sinks, kq_scale, il) : nullptr;
    }

    ggml_tensor * rest = whole ? nullptr : build_rest(graph, n_sparse, q, k, v, kq_mask, sinks, kq_scale, il);

    ggml_context * ctx = graph.ctx0;

    const int64_t n_stream = k->ne[3];
    const int64_t n_rows   = n_sparse/n_stream;

    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_rows, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_rows, 0);

    if (!whole) { // of one stream: those of several bring as many rows each
        kq_mask = ggml_view_4d(ctx, kq_mask, kq_mask->ne[0], n_rows, 1, 1, kq_mask->nb[1], kq_mask->nb[2], kq_mask->nb[3], 0);
    }

    q = ggml_permute(ctx, q, 0, 2, 1, 3);
    k = ggml_permute(ctx, k, 0, 2, 1, 3);
    v = ggml_permute(ctx, v, 0, 2, 1, 3);

    ggml_tensor * cur;
    if (sparse) {
        const size_t stream0 = k->view_offs/layer->k->nb[2];
        auto streams = [&](ggml_tensor * all) { // those that k shows
            return ggml_view_4d(ctx, all, all->ne[0], all->ne[1], all->ne[2], n_stream,
                    all->nb[1], all->nb[2], all->nb[3], stream0*all->nb[3]);
        };
        cur = ggml_fasa_attn(ctx, q, k, v, kq_mask, sinks, streams(layer->index), layer->dims, kq_scale, softcap_of(graph),
                fasa->budget(layer), fasa->config.index_type, fasa->hadamard);
        if (layer->row_state) {
            ggml_fasa_attn_set_row_cache(cur, streams(layer->row_state), streams(layer->rows));
        }
        if (whole) {
            fasa->join_write(layer, cur);
        }
        graph.cb(cur, "fasa_attn", il);
    } else {
        cur = ggml_fasa_dense(ctx, q, k, v, kq_mask, sinks, kq_scale, softcap_of(graph));
        graph.cb(cur, "fasa_dense", il);
    }
    if (on_host) {
        // with the rest of the layer on a GPU (--no-kv-offload), the scheduler would have all of K copied there
        ggml_backend_sched_set_tensor_backend(graph.sched, cur, graph.backend_cpu);
    }

    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    if (rest) {
        cur = ggml_concat(ctx, cur, rest, 1);
    }
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}

ggml_tensor * llama_fasa_build_write(
        const llama_fasa_index_cache * fasa, ggml_context * ctx, ggml_tensor * k_set, ggml_tensor * k_idxs, int64_t n_kv) {
    return fasa ? fasa->build_write(ctx, k_set, k_idxs, n_kv) : k_set;
}

bool llama_fasa_set_mask(llama_fasa_index_cache * fasa, ggml_tensor * mask, const llama_ubatch & ubatch, bool causal) {
    return fasa && fasa->set_mask(mask, ubatch, causal);
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

bool llama_fasa_begin_step(llama_fasa_index_cache * fasa, const std::vector<llama_seq_id> & streams,
        const std::vector<std::vector<uint32_t>> & cells, int64_t n_kv) {
    try {
        if (fasa) {
            fasa->begin_step(streams, cells, n_kv);
        }
        return true;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return false;
    }
}

llama_fasa_restore_guard::~llama_fasa_restore_guard() {
    try {
        if (llama_fasa_index_cache * fasa = lctx.get_cparams().fasa) {
            fasa->rebuild();
        }
    } catch (const std::exception & e) {
        // the index stays marked, and the next decode tries again and reports
        LLAMA_LOG_WARN("%s: %s\n", __func__, e.what());
    }
}

void llama_fasa_log_stats(const llama_fasa_index_cache & fasa) {
    const llama_fasa_stats & s = fasa.stats;
    if (s.n_step_sparse + s.n_step_dense + s.n_step_prefill + s.n_step_mixed == 0) {
        return; // a context that only measured memory
    }
    // a warning, because the tools hide libllama's information by default and nobody should decode sparse unawares
    LLAMA_LOG_WARN("fasa: %llu decode steps sparse, %llu with a prompt beside (%llu rows), %llu dense within the budget, "
            "%llu prefill steps dense, index rebuilt %llu times\n", (unsigned long long) s.n_step_sparse,
            (unsigned long long) s.n_step_mixed, (unsigned long long) s.n_row_sparse, (unsigned long long) s.n_step_dense,
            (unsigned long long) s.n_step_prefill, (unsigned long long) s.n_index_rebuild);
    const llama_fasa_row_stats rows = fasa.row_stats();
    if (rows.n_hit + rows.n_miss > 0) {
        LLAMA_LOG_WARN("fasa: %llu of %llu selected rows of K and V were in the row cache\n", (unsigned long long) rows.n_hit,
                (unsigned long long) (rows.n_hit + rows.n_miss));
    }
}
