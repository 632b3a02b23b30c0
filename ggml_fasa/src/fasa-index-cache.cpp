#include "fasa-index-cache.h"

#include "fasa-graph.h"
#include "ggml-fasa-mapped.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

int64_t llama_fasa_config::n_decode_rows(const llama_ubatch & ubatch) const {
    if (ubatch.equal_seqs()) {
        return ubatch.n_seq_tokens <= (uint32_t) max_batch ? ubatch.n_tokens : 0;
    }
    std::unordered_map<llama_seq_id, int32_t> n_rows;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        n_rows[ubatch.seq_id[i][0]]++;
    }
    uint32_t n = 0;
    while (n < ubatch.n_tokens && n_rows[ubatch.seq_id[n][0]] <= max_batch) {
        ++n;
    }
    return n;
}

// In opposite places of the order the differences are opposite, so that the mean stays what it is.
static int32_t scheduled(int64_t budget, int32_t schedule, int32_t i, int32_t n) {
    return n < 2 ? budget : budget + budget*(schedule - 100)*(n - 1 - 2*i)/(100*(n - 1));
}

static int32_t smallest_budget(int32_t budget, int32_t schedule) {
    return std::min(scheduled(budget, schedule, 0, 2), scheduled(budget, schedule, 1, 2));
}

int32_t llama_fasa_config::layer_budget(int32_t i, int32_t n) const {
    return scheduled(budget, budget_schedule, i, n);
}

int64_t llama_fasa_config::n_sparse_rows(const llama_ubatch & ubatch, int64_t n_kv) const {
    return budget > 0 && n_kv > GGML_PAD(smallest_budget(budget, budget_schedule), 256) ? n_decode_rows(ubatch) : 0;
}

std::string llama_fasa_budget_error(const llama_fasa_config & config, int32_t budget) {
    const int32_t least = smallest_budget(budget, config.budget_schedule);
    if (config.n_sink + config.n_recent < least) {
        return "";
    }
    return format("FASA: %d sinks and %d recent tokens leave no room in a budget of %d%s", config.n_sink, config.n_recent, least,
            least < budget ? ", the smallest of a layer" : "");
}

int32_t llama_fasa_hadamard(const llama_kv_cache & kv) {
    ggml_init_params params = { ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
    ggml_context_ptr ctx(ggml_init(params));
    const ggml_tensor * rotation = kv.build_input_k_rot(ctx.get());
    return rotation ? (int32_t) rotation->ne[0] : 0;
}

llama_fasa_index_cache::llama_fasa_index_cache(
        llama_kv_cache & kv, const llama_fasa_metadata & metadata, const llama_fasa_config & config) :
    kv(kv), config(config), hadamard(llama_fasa_hadamard(kv)), stream_dirty(kv.n_stream, false) {

    const bool no_alloc = kv.hparams.no_alloc;

    // one context for each buffer type, since an index lives beside its K, or on the device that reads a mapped K
    struct buft_ctx {
        ggml_context_ptr index;
        ggml_context_ptr dims;
    };
    std::map<ggml_backend_buffer_type_t, buft_ctx> ctxs;

    auto new_ctx = [&](size_t n_tensors) {
        ggml_init_params params = { n_tensors*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
        ggml_context * ctx = ggml_init(params);
        if (!ctx) {
            throw std::runtime_error("FASA: no memory for the index cache");
        }
        return ggml_context_ptr(ctx);
    };

    for (const auto & cache : kv.layers) {
        const bool     mapped = ggml_fasa_buft_is_mapped(ggml_backend_buffer_get_type(cache.k->buffer));
        const uint64_t bytes  = ggml_nbytes(cache.k) + (cache.v ? ggml_nbytes(cache.v) : 0);
        kv_bytes     += bytes;
        mapped_bytes += mapped ? bytes : 0;

        const llama_fasa_layer meta = metadata.layer(cache.il);

        layer l = { (int32_t) cache.il, meta.n_tip, n_sparse, mapped, cache.k, nullptr, nullptr, nullptr };
        layer_of_k[l.k] = layers.size();
        if (l.n_tip == 0) {
            layers.push_back(l);
            continue;
        }
        n_sparse++;

        buft_ctx & ctx = ctxs[mapped ? ggml_backend_dev_buffer_type(kv.model.dev_layer(cache.il))
                                         : ggml_backend_buffer_get_type(cache.k->buffer)];
        if (!ctx.index) {
            ctx.index = new_ctx(kv.layers.size());
            ctx.dims  = new_ctx(2*kv.layers.size()); // and centers
        }

        l.index = ggml_fasa_new_index(ctx.index.get(), config.index_type,
                2*meta.n_tip, kv.get_size(), meta.n_head_kv, kv.n_stream);
        l.dims  = ggml_new_tensor_2d(ctx.dims.get(), GGML_TYPE_I32, 2*meta.n_tip, meta.n_head_kv);
        ggml_format_name(l.index, "fasa_index_cache_l%d", l.il);
        ggml_format_name(l.dims,  "fasa_dims_l%d",        l.il);
        if (!meta.center.empty()) {
            l.center = ggml_new_tensor_2d(ctx.dims.get(), GGML_TYPE_F32, 2*meta.n_tip, meta.n_head_kv);
            ggml_format_name(l.center, "fasa_center_l%d", l.il);
        }

        index_bytes += ggml_nbytes(l.index);
        layers.push_back(l);
    }

    auto alloc = [&](ggml_context * ctx, ggml_backend_buffer_type_t buft) {
        ggml_backend_buffer_t buf = no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0)
                                             : ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (!buf) {
            throw std::runtime_error(format("FASA: failed to allocate %.1f MiB for the index cache", index_bytes/1024.0/1024.0));
        }
        if (no_alloc) {
            for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
                t->buffer = buf;
            }
        }
        return ggml_backend_buffer_ptr(buf);
    };

    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr index_buf = alloc(ctx.index.get(), buft);
        ggml_backend_buffer_clear(index_buf.get(), 0);
        // handed to the KV cache: counted in its memory breakdown and zeroed when its data are cleared
        kv.ctxs_bufs.emplace_back(std::move(ctx.index), std::move(index_buf));

        ggml_backend_buffer_ptr dims_buf = alloc(ctx.dims.get(), buft);
        dims_bufs.emplace_back(std::move(ctx.dims), std::move(dims_buf));
    }

    if (!no_alloc) {
        for (const layer & l : layers) {
            if (l.n_tip == 0) {
                continue;
            }
            const std::vector<int32_t> dims = metadata.dims(l.il);
            ggml_backend_tensor_set(l.dims, dims.data(), 0, ggml_nbytes(l.dims));
            if (l.center) {
                ggml_backend_tensor_set(l.center, metadata.layers[l.il].center.data(), 0, ggml_nbytes(l.center));
            }
        }
    }
}

llama_fasa_index_cache::~llama_fasa_index_cache() {
    llama_fasa_log_stats(*this);
}

const llama_fasa_index_cache::layer * llama_fasa_index_cache::find(const ggml_tensor * k) const {
    const auto it = layer_of_k.find(k);
    return it == layer_of_k.end() ? nullptr : &layers[it->second];
}

ggml_tensor * llama_fasa_index_cache::index_write(
        ggml_context * ctx, const layer & l, ggml_tensor * k, ggml_tensor * cells) const {
    ggml_tensor * cur = ggml_fasa_index_write(ctx, k, cells, l.index, l.dims, config.index_type, hadamard);
    if (l.center) {
        ggml_fasa_index_write_set_center(cur, l.center);
    }
    return cur;
}

ggml_tensor * llama_fasa_index_cache::build_write(
        ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_set, ggml_tensor * k_idxs) const {
    const layer * l = find(k);
    if (!l || l->n_tip == 0) {
        return k_set;
    }
    // reads the rows just written rather than K before rounding: a rebuild from K then gives the same bits, and
    // CUDA's fusion of RoPE with SET_ROWS keeps its only consumer
    ggml_tensor * cur = index_write(ctx, *l, k_set, k_idxs);
    ggml_format_name(cur, "fasa_index_cache-%d", l->il);
    return cur;
}

template <typename T>
static void mark_forced_rows(
        const llama_fasa_config & config, const llama_kv_cells_vec & v_cells, const std::vector<uint32_t> & seq_to_stream,
        const llama_ubatch & ubatch, int64_t n_rows, T * mask, int64_t n_kv, T hidden, T forced) {
    auto mark = [&](T * row, uint32_t cell) {
        if ((int64_t) cell < n_kv && memcmp(&row[cell], &hidden, sizeof(T)) != 0) {
            row[cell] = forced;
        }
    };

    for (int64_t i = 0; i < n_rows; ++i) {
        const llama_seq_id seq = ubatch.seq_id[i][0];
        const llama_pos    pos = ubatch.pos[i];

        // (pos, cell) of the sequence, ordered: cells need not lie in the order of positions
        const auto & cells = v_cells[seq_to_stream[seq]].seq_pos_get(seq);
        T * row = mask + i*n_kv;

        auto first = cells.begin();
        for (int32_t n = 0; n < config.n_sink && first != cells.end() && first->first <= pos; ++n, ++first) {
            mark(row, first->second);
        }
        auto last = cells.upper_bound({ pos, UINT32_MAX });
        for (int32_t n = 0; n < config.n_recent && last != cells.begin(); ++n) {
            mark(row, (--last)->second);
        }
    }
}

void llama_fasa_index_cache::mark_forced(ggml_tensor * mask, const llama_ubatch & ubatch) {
    const int64_t n_kv = mask->ne[0];

    const int64_t n_rows = config.n_sparse_rows(ubatch, n_kv);
    const bool    whole  = config.n_decode_rows(ubatch) == ubatch.n_tokens;
    if (n_rows == 0) {
        (whole ? stats.n_step_dense : stats.n_step_prefill)++;
        return;
    }
    (whole ? stats.n_step_sparse : stats.n_step_mixed)++;
    stats.n_row_sparse += n_rows;

    if (mask->type == GGML_TYPE_F16) {
        mark_forced_rows<ggml_fp16_t>(config, kv.v_cells, kv.seq_to_stream, ubatch, n_rows, (ggml_fp16_t *) mask->data, n_kv,
                ggml_fp32_to_fp16(-INFINITY), ggml_fp32_to_fp16(-0.0f));
    } else {
        mark_forced_rows<float>(config, kv.v_cells, kv.seq_to_stream, ubatch, n_rows, (float *) mask->data, n_kv,
                -INFINITY, -0.0f);
    }
}

void llama_fasa_index_cache::mark_dirty(int32_t stream) {
    if (stream < 0) {
        std::fill(stream_dirty.begin(), stream_dirty.end(), true);
    } else {
        stream_dirty.at(stream) = true;
    }
}

bool llama_fasa_index_cache::dirty() const {
    return std::find(stream_dirty.begin(), stream_dirty.end(), true) != stream_dirty.end();
}

namespace {

// The ids of all used cells of the dirty streams.
class input_cells : public llm_graph_input_i {
public:
    input_cells(ggml_tensor * cells, std::vector<int64_t> ids) : cells(cells), ids(std::move(ids)) {}

    void set_input(const llama_ubatch *) override {
        ggml_backend_tensor_set(cells, ids.data(), 0, ids.size()*sizeof(int64_t));
    }

private:
    ggml_tensor *        cells;
    std::vector<int64_t> ids;
};

} // namespace

bool llama_fasa_index_cache::rebuild(llama_context & lctx) {
    std::vector<int64_t> ids;
    for (size_t s = 0; s < stream_dirty.size(); ++s) {
        const int64_t n_used = stream_dirty[s] ? kv.v_cells[s].used_max_p1() : 0;
        for (int64_t i = 0; i < n_used; ++i) {
            ids.push_back((int64_t) s*kv.get_size() + i);
        }
    }
    if (ids.empty()) {
        stream_dirty.assign(stream_dirty.size(), false);
        return false;
    }

    ggml_backend_sched_t sched = lctx.get_sched();
    ggml_backend_sched_reset(sched);

    llm_graph_result * res = lctx.get_gf_res_reserve();
    res->reset();

    ggml_context * ctx = res->get_ctx();
    ggml_cgraph  * gf  = res->get_gf();

    ggml_tensor * cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ids.size());
    ggml_set_input(cells);
    for (const layer & l : layers) {
        if (l.n_tip > 0) {
            ggml_build_forward_expand(gf, index_write(ctx, l, l.k, cells));
        }
    }
    res->add_input(std::make_unique<input_cells>(cells, std::move(ids)));

    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        throw std::runtime_error("FASA: failed to allocate the graph that rebuilds the index cache");
    }
    res->set_inputs(nullptr);
    if (lctx.graph_compute(gf, false) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("FASA: failed to rebuild the index cache");
    }

    stream_dirty.assign(stream_dirty.size(), false);
    stats.n_index_rebuild++;
    return true;
}

llama_fasa_info llama_fasa_index_cache::info() const {
    llama_fasa_info info = {};
    info.active         = 1;
    info.budget         = config.budget;
    info.n_sink         = config.n_sink;
    info.n_recent       = config.n_recent;
    info.max_batch      = config.max_batch;
    info.index_type     = config.index_type;
    info.index_bytes    = index_bytes;
    info.kv_bytes       = kv_bytes;
    info.mapped_bytes   = mapped_bytes;
    info.budget_schedule = config.budget_schedule;
    for (const layer & l : layers) {
        if (l.n_tip == 0) {
            info.n_layer_dense++;
            continue;
        }
        info.n_layer_sparse++;
        info.n_tip_min = info.n_tip_min == 0 ? l.n_tip : std::min(info.n_tip_min, l.n_tip);
        info.n_tip_max = std::max(info.n_tip_max, l.n_tip);
    }
    return info;
}
