#include "fasa-server.h"

#include <mutex>
#include <ostream>

using json = common_json;

// The server's loop writes, threads that answer /props and /metrics read.
static std::mutex       mutex;
static llama_fasa_info  served = {}; // as at the start, with the budget of requests that give none
static llama_fasa_stats ran    = {};

void fasa_server_start(llama_context * ctx) {
    std::lock_guard<std::mutex> lock(mutex);
    served = llama_fasa_get_info(ctx);
    ran    = llama_fasa_get_stats(ctx);

    llama_fasa_params params = llama_fasa_get_params();
    if (params.mode == LLAMA_FASA_MODE_ON) {
        params.mode = LLAMA_FASA_MODE_AUTO;
        params.budget = served.budget;
        llama_fasa_set_params(&params);
    }
}

int32_t fasa_server_budget(int32_t given) {
    return given >= 0 ? given : served.budget;
}

uint64_t fasa_server_count(const llama_context * ctx) {
    const llama_fasa_stats now = llama_fasa_get_stats(ctx);
    std::lock_guard<std::mutex> lock(mutex);
    const uint64_t n_sparse = now.n_row_sparse - ran.n_row_sparse;
    ran = now;
    return n_sparse;
}

json fasa_server_props() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!served.active) {
        return { { "active", false } };
    }
    return {
        { "active",          true },
        { "budget",          served.budget },
        { "n_sink",          served.n_sink },
        { "n_recent",        served.n_recent },
        { "max_batch",       served.max_batch },
        { "index_type",      ggml_fasa_index_type_name((ggml_fasa_index_type) served.index_type) },
        { "n_layer_sparse",  served.n_layer_sparse },
        { "n_layer_dense",   served.n_layer_dense },
        { "index_bytes",     served.index_bytes },
        { "kv_bytes",        served.kv_bytes },
        { "mapped_bytes",    served.mapped_bytes },
        { "staging_bytes",   served.staging_bytes },
        { "rows_bytes",      served.rows_bytes },
        { "n_step_sparse",   ran.n_step_sparse },
        { "n_step_mixed",    ran.n_step_mixed },
        { "n_step_dense",    ran.n_step_dense },
        { "n_step_prefill",  ran.n_step_prefill },
        { "n_row_sparse",    ran.n_row_sparse },
        { "n_index_rebuild", ran.n_index_rebuild },
    };
}

void fasa_server_metrics(std::ostream & out) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!served.active) {
        return;
    }
    auto add = [&](const char * type, const char * name, const char * help, uint64_t value) {
        out << "# HELP llamacpp:" << name << " " << help << "\n# TYPE llamacpp:" << name << " " << type << "\n"
            << "llamacpp:" << name << " " << value << "\n";
    };
    add("counter", "fasa_steps_sparse_total",   "Decode steps through FASA",                                  ran.n_step_sparse);
    add("counter", "fasa_steps_mixed_total",    "Steps that decoded through FASA and read prompts densely",   ran.n_step_mixed);
    add("counter", "fasa_steps_dense_total",    "Decode steps left dense",                                    ran.n_step_dense);
    add("counter", "fasa_steps_prefill_total",  "Steps that read prompts, dense",                             ran.n_step_prefill);
    add("counter", "fasa_rows_sparse_total",    "Tokens decoded through FASA",                                ran.n_row_sparse);
    add("counter", "fasa_index_rebuilds_total", "Times the index was rebuilt from K",                         ran.n_index_rebuild);
    add("gauge",   "fasa_budget",               "Tokens kept per query and KV head unless a request says so", served.budget);
    add("gauge",   "fasa_index_bytes",          "Size of the index cache",                                    served.index_bytes);
}

void fasa_server_timings(json & timings, uint64_t n_sparse, uint64_t n_dense) {
    if (n_sparse + n_dense > 0) {
        timings["fasa_sparse_n"] = n_sparse;
        timings["fasa_dense_n"]  = n_dense;
    }
}
