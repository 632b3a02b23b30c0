#include "fasa-index-cache.h"

#include "fasa-graph.h"
#include "ggml-fasa-mapped.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <map>
#include <stdexcept>

static constexpr int64_t N_PROMPT = 64; // tokens of a step from which on the write of their index is small beside it

static constexpr int32_t ROW_CACHE_MAX = 512; // rows of a KV head that the row cache keeps, however large the budget

int64_t llama_fasa_config::n_decode_rows(const llama_ubatch & ubatch) const {
    auto is_prompt = [&](llama_seq_id seq) { return std::find(prompts.begin(), prompts.end(), seq) != prompts.end(); };

    if (ubatch.equal_seqs()) {
        const bool dense = std::any_of(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq, is_prompt);
        return !dense && ubatch.n_seq_tokens <= (uint32_t) max_batch ? ubatch.n_tokens : 0;
    }
    std::unordered_map<llama_seq_id, int32_t> n_rows;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        n_rows[ubatch.seq_id[i][0]]++;
    }
    uint32_t n = 0;
    while (n < ubatch.n_tokens && n_rows[ubatch.seq_id[n][0]] <= max_batch && !is_prompt(ubatch.seq_id[n][0])) {
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

bool llama_fasa_config::exceeds_budget(int64_t n_kv) const {
    return budget > 0 && n_kv > GGML_PAD(smallest_budget(budget, budget_schedule), 256);
}

bool llama_fasa_config::writes_index(int64_t n_kv, int64_t n_tokens) const {
    return exceeds_budget(n_kv) || (budget > 0 && n_tokens >= N_PROMPT);
}

int64_t llama_fasa_config::n_sparse_rows(const llama_ubatch & ubatch, int64_t n_kv) const {
    return exceeds_budget(n_kv) ? n_decode_rows(ubatch) : 0;
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

ggml_backend_t llama_fasa_backend_of(ggml_backend_sched_t sched, const ggml_tensor * t) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        // what helps the CPU (BLAS) uses its memory, too, but runs few ops
        const bool helps = ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_ACCEL;
        if (!helps && ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(t->buffer))) {
            return backend;
        }
    }
    throw std::runtime_error(format("FASA: no backend can use %s", t->name));
}

llama_fasa_index_cache::llama_fasa_index_cache(
        llama_context & lctx, llama_kv_cache & kv, const llama_fasa_metadata & metadata, const llama_fasa_config & config) :
    lctx(lctx), kv(kv), config(config), hadamard(llama_fasa_hadamard(kv)), dirty(kv.n_stream) {

    const bool no_alloc = kv.hparams.no_alloc;

    // one context for each buffer type, since an index lives beside its K, or on the device that reads a mapped K
    struct buft_ctx {
        ggml_context_ptr    index;
        ggml_context_ptr    dims;
        uint64_t            index_size = 0;
        std::vector<size_t> mapped; // layers whose K is
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

        layer l = { (int32_t) cache.il, meta.n_tip, n_sparse, cache.k };
        layer_of_k[l.k] = layers.size();
        if (l.n_tip == 0) {
            layers.push_back(l);
            continue;
        }
        n_sparse++;

        buft_ctx & ctx = ctxs[mapped ? ggml_backend_dev_buffer_type(kv.model.dev_layer(cache.il))
                                         : ggml_backend_buffer_get_type(cache.k->buffer)];
        if (!ctx.index) {
            ctx.index = new_ctx(2*kv.layers.size() + 1); // and cached rows and staging
            ctx.dims  = new_ctx(3*kv.layers.size()); // and centers and states of row caches
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

        index_bytes    += ggml_nbytes(l.index);
        ctx.index_size += ggml_nbytes(l.index);
        if (mapped) {
            ctx.mapped.push_back(layers.size());
        }
        layers.push_back(l);
    }

    for (auto & [buft, ctx] : ctxs) {
        if (!ctx.mapped.empty()) {
            new_device_tensors(ctx.index.get(), ctx.dims.get(), ctx.mapped, ctx.index_size);
        }
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
        ggml_backend_buffer_clear(dims_buf.get(), 0);
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

// Bytes for the staging of K and V of layers, at most n_head_max heads at a time. n_head_max = 0: all heads at once.
size_t llama_fasa_index_cache::staging_size(const std::vector<size_t> & mapped, int64_t n_head_max) const {
    size_t size = 0;
    for (const size_t i : mapped) {
        const int64_t n_head_kv = kv.hparams.n_head_kv(layers[i].il);
        const int64_t n_head    = n_head_max == 0 ? n_head_kv : std::min(n_head_max, ggml_fasa_staged_heads_max(n_head_kv));
        const auto &  cache     = kv.layers[kv.map_layer_ids.at(layers[i].il)];
        size = std::max(size, ggml_fasa_staging_size(cache.k->type, kv.hparams.n_embd_head_k(layers[i].il), cache.v->type,
                kv.hparams.n_embd_head_v(layers[i].il), (int64_t) kv.get_size()*kv.n_stream, n_head, n_head_kv));
    }
    return size;
}

void llama_fasa_index_cache::new_device_tensors(
        ggml_context * ctx, ggml_context * ctx_small, const std::vector<size_t> & mapped, uint64_t index_size) {
    const uint64_t bound = config.vram > 0 ? (uint64_t) config.vram << 20 : UINT64_MAX;
    const uint64_t least = index_size + staging_size(mapped, 1);
    if (least > bound) {
        throw std::runtime_error(format("FASA: %d MiB of device memory (--fasa-vram) do not hold the index of %.1f MiB and the "
                "staging of K and V: give at least %.0f, or use a smaller context (-c) or index (--fasa-index-type)",
                config.vram, index_size/1024.0/1024.0, std::ceil(least/1024.0/1024.0)));
    }

    // beyond that, the row cache comes first
    struct cached {
        layer & of;
        int64_t n_rows, n_head_kv, row; // row: values of K and V
    };
    std::vector<cached> rows;
    uint64_t            rows_size = 0;
    for (const size_t i : mapped) {
        layer &      l     = layers[i];
        const auto & cache = kv.layers[kv.map_layer_ids.at(l.il)];
        if (cache.k->type == GGML_TYPE_F16 && cache.v->type == GGML_TYPE_F16) {
            rows.push_back({ l, std::min(budget(&l), ROW_CACHE_MAX), kv.hparams.n_head_kv(l.il),
                    kv.hparams.n_embd_head_k(l.il) + kv.hparams.n_embd_head_v(l.il) });
            const cached & c = rows.back();
            rows_size += (2*c.n_rows*(c.row*sizeof(ggml_fp16_t) + sizeof(int32_t)) + GGML_FASA_ROW_STATE*sizeof(int32_t))*
                c.n_head_kv*kv.n_stream;
        }
    }
    if (least + rows_size > bound) {
        rows.clear();
        rows_size = 0;
    }
    for (const cached & c : rows) {
        c.of.row_state = ggml_fasa_new_row_state(ctx_small, c.n_rows, c.n_head_kv, kv.n_stream);
        c.of.rows      = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 2*c.n_rows*c.row, 1, c.n_head_kv, kv.n_stream);
        ggml_format_name(c.of.row_state, "fasa_row_state_l%d", c.of.il);
        ggml_format_name(c.of.rows,      "fasa_rows_l%d",      c.of.il);
    }
    rows_bytes += rows_size;

    int64_t n_head = 1;
    while (staging_size(mapped, n_head + 1) > staging_size(mapped, n_head) &&
            index_size + rows_size + staging_size(mapped, n_head + 1) <= bound) {
        ++n_head;
    }
    size_t size = std::max(staging_size(mapped, n_head), std::min(staging_size(mapped, 0), GGML_FASA_STAGED_WHOLE));
    if (index_size + rows_size + size > bound) {
        size = staging_size(mapped, n_head);
    }
    ggml_tensor * staging = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, size);
    ggml_set_name(staging, "fasa_staging");
    staging_bytes += ggml_nbytes(staging);
    for (const size_t i : mapped) {
        layers[i].staging = staging;
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
    if (l.row_state) {
        ggml_fasa_index_write_set_row_state(cur, l.row_state);
    }
    return cur;
}

ggml_tensor * llama_fasa_index_cache::build_write(
        ggml_context * ctx, ggml_tensor * k_set, ggml_tensor * k_idxs, int64_t n_kv) const {
    const layer * l = find(k_set->view_src);
    if (!l || l->n_tip == 0) {
        return k_set;
    }
    l->write = nullptr;
    if (!config.writes_index(n_kv, k_idxs->ne[0])) {
        return k_set;
    }
    // reads the rows just written rather than K before rounding: a rebuild from K then gives the same bits, and
    // CUDA's fusion of RoPE with SET_ROWS keeps its only consumer
    ggml_tensor * cur = index_write(ctx, *l, k_set, k_idxs);
    ggml_format_name(cur, "fasa_index_cache-%d", l->il);
    l->write = cur;
    return cur;
}

void llama_fasa_index_cache::join_write(const layer * l, ggml_tensor * attn) const {
    ggml_tensor * write = l->write;
    if (!write || l->row_state || ggml_nelements(write->src[GGML_FASA_WRITE_SRC_CELLS]) > GGML_FASA_JOINED_MAX) {
        return;
    }
    ggml_backend_t backend = llama_fasa_backend_of(lctx.get_sched(), l->index);
    if (!ggml_backend_supports_op(backend, write) || !ggml_backend_supports_op(backend, attn)) {
        return;
    }
    ggml_fasa_attn_join_write(attn, write);
    ggml_backend_sched_set_tensor_backend(lctx.get_sched(), write, backend);
    ggml_backend_sched_set_tensor_backend(lctx.get_sched(), attn,  backend);
}

void llama_fasa_index_cache::mark_dirty(int32_t stream) {
    const cell_range all = { 0, kv.get_size() };
    if (stream < 0) {
        std::fill(dirty.begin(), dirty.end(), all);
    } else {
        dirty.at(stream) = all;
    }
}

bool llama_fasa_index_cache::is_dirty() const {
    return std::any_of(dirty.begin(), dirty.end(), [](const cell_range & range) { return !range.empty(); });
}

std::vector<int64_t> llama_fasa_index_cache::used_cells(bool is_dirty) const {
    std::vector<int64_t> ids;
    for (size_t s = 0; s < dirty.size(); ++s) {
        const auto & cells = kv.v_cells[s];
        const uint32_t begin = is_dirty ? dirty[s].begin : 0;
        const uint32_t end   = std::min(is_dirty ? dirty[s].end : UINT32_MAX, cells.used_max_p1());
        for (uint32_t i = begin; i < end; ++i) {
            if (!cells.is_empty(i) && dirty[s].has(i) == is_dirty) {
                ids.push_back((int64_t) s*kv.get_size() + i);
            }
        }
    }
    return ids;
}

void llama_fasa_index_cache::begin_step(
        const std::vector<llama_seq_id> & streams, const std::vector<std::vector<uint32_t>> & cells, int64_t n_kv) {
    size_t n_tokens = 0;
    for (const auto & of_stream : cells) {
        n_tokens += of_stream.size();
    }
    if (config.exceeds_budget(n_kv)) {
        rebuild();
    }
    if (config.writes_index(n_kv, n_tokens)) {
        return;
    }
    for (size_t i = 0; i < streams.size(); ++i) {
        cell_range & range = dirty.at(streams[i]);
        for (uint32_t cell : cells[i]) {
            range.begin = std::min(range.begin, cell);
            range.end   = std::max(range.end,   cell + 1);
        }
    }
}

// Runs on the backends of the context but beside its scheduler, whose graph lives on.
void llama_fasa_index_cache::rebuild() {
    if (!is_dirty()) {
        return;
    }
    const std::vector<int64_t> ids = used_cells(true);
    if (!ids.empty()) {
        std::map<ggml_backend_t, std::vector<const layer *>> of_backend;
        for (const layer & l : layers) {
            if (l.n_tip > 0) {
                of_backend[llama_fasa_backend_of(lctx.get_sched(), l.index)].push_back(&l);
            }
        }
        for (const auto & [backend, of] : of_backend) {
            rebuild(backend, of, ids);
        }
        stats.n_index_rebuild++;
    }
    dirty.assign(dirty.size(), {});
}

void llama_fasa_index_cache::rebuild(
        ggml_backend_t backend, const std::vector<const layer *> & of, const std::vector<int64_t> & ids) const {
    const size_t n_tensors = 6*(of.size() + 1); // a write and its sources
    ggml_init_params params = {
        (of.size() + 1)*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false), nullptr, /*.no_alloc =*/ true,
    };
    ggml_context_ptr ctx(ggml_init(params));

    ggml_tensor * cells = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, ids.size());
    ggml_cgraph * gf    = ggml_new_graph_custom(ctx.get(), n_tensors, false);
    for (const layer * l : of) {
        ggml_build_forward_expand(gf, index_write(ctx.get(), *l, l->k, cells));
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    if (!buffer) {
        throw std::runtime_error("FASA: no memory to rebuild the index cache");
    }
    ggml_backend_tensor_set(cells, ids.data(), 0, ggml_nbytes(cells));

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    if (auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(backend, lctx.n_threads());
    }
    // the pool that the last step left there, of a batch perhaps, may have fewer; every step sets its own
    if (auto set_threadpool = (decltype(ggml_backend_cpu_set_threadpool) *) ggml_backend_reg_get_proc_address(
                reg, "ggml_backend_cpu_set_threadpool")) {
        set_threadpool(backend, nullptr);
    }
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("FASA: failed to rebuild the index cache");
    }
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
    info.staging_bytes  = staging_bytes;
    info.rows_bytes     = rows_bytes;
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

llama_fasa_row_stats llama_fasa_index_cache::row_stats() const {
    struct counts { // of one KV head and stream, see ggml_fasa_new_row_state
        uint32_t turn[4];
        uint64_t n_hit, n_miss;
    };
    static_assert(sizeof(counts) == GGML_FASA_ROW_STATE*sizeof(int32_t), "not the words of a row cache's state");

    llama_fasa_row_stats all = {};
    for (const layer & l : layers) {
        if (!l.row_state || !l.row_state->data) { // the latter: only measuring memory
            continue;
        }
        std::vector<uint8_t> state(ggml_nbytes(l.row_state));
        ggml_backend_tensor_get(l.row_state, state.data(), 0, state.size());
        for (size_t at = 0; at < state.size(); at += l.row_state->nb[1]) {
            counts of;
            memcpy(&of, state.data() + at, sizeof(of));
            all.n_hit  += of.n_hit;
            all.n_miss += of.n_miss;
        }
    }
    return all;
}
