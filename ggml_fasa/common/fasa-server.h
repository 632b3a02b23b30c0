// fasa-server: what llama-server adds for FASA. A request may bring a budget of its own, and /props, /metrics and the timings
// of a request say what ran. A process serves one model at a time, so this is process-wide, as are the parameters.

#pragma once

#include "llama-fasa.h"

#include "json.h"

#include <algorithm>
#include <cstdint>
#include <iosfwd>

// From now on ctx is the context that is served. Contexts made later are those of draft models, which run FASA if they can.
void fasa_server_start(llama_context * ctx);

// The budget of a request that gave this one, -1 if it gave none.
int32_t fasa_server_budget(int32_t given);

// Counts what ran since the last call; true if decode rows of it were sparse.
bool fasa_server_count(const llama_context * ctx);

// What is served and what ran, as of the last count: an object for /props, counters and gauges for /metrics.
common_json fasa_server_props();
void fasa_server_metrics(std::ostream & out);

// Tokens of a request that were decoded sparse and dense, for its timings; nothing if there are none.
void fasa_server_timings(common_json & timings, uint64_t n_sparse, uint64_t n_dense);

// Before tokens [first, first + n) of a batch are decoded: the largest budget of their requests, 0 if one of them wants 0.
template <typename Tokens, typename Slots>
void fasa_server_begin(llama_context * ctx, const Tokens & tokens, const Slots & slots, int32_t first, int32_t n) {
    int32_t budget = -1;
    for (int32_t i = first; i < first + n && budget != 0; ++i) {
        const int32_t own = fasa_server_budget(slots[tokens[i].id_slot].task->params.fasa_budget);
        budget = own == 0 ? 0 : std::max(budget, own);
    }
    if (budget >= 0) {
        llama_fasa_set_budget(ctx, budget);
    }
}

// After they were: counts them for their requests.
template <typename Tokens, typename Slots>
void fasa_server_end(const llama_context * ctx, const Tokens & tokens, Slots & slots, int32_t first, int32_t n) {
    if (!llama_fasa_get_info(ctx).active) {
        return;
    }
    const bool sparse = fasa_server_count(ctx);
    for (int32_t i = first; i < first + n; ++i) {
        auto & stats = slots[tokens[i].id_slot].stats;
        if (!tokens[i].is_prompt && stats.is_set()) {
            (sparse ? stats.n_fasa_sparse : stats.n_fasa_dense)++;
        }
    }
}
