// fasa-server: what llama-server adds for FASA. A request may bring a budget of its own, and /props, /metrics and the timings
// of a request say what ran. A process serves one model at a time, so this is process-wide, as are the parameters.

#pragma once

#include "llama-fasa.h"

#include "json.h"

#include <algorithm>
#include <cstdint>
#include <iosfwd>
#include <vector>

// From now on ctx is the context that is served. Contexts made later are those of draft models, which run FASA if they can.
void fasa_server_start(llama_context * ctx);

// The budget of a request that gave this one, -1 if it gave none.
int32_t fasa_server_budget(int32_t given);

// Counts what ran since the last call: returns how many rows of it were sparse.
uint64_t fasa_server_count(const llama_context * ctx);

// What is served and what ran, as of the last count: an object for /props, counters and gauges for /metrics.
common_json fasa_server_props();
void fasa_server_metrics(std::ostream & out);

// Tokens of a request that were decoded sparse and dense, for its timings; nothing if there are none.
void fasa_server_timings(common_json & timings, uint64_t n_sparse, uint64_t n_dense);

// Before tokens [first, first + n) of a batch are decoded: the largest budget of their requests, 0 if one of them wants 0; and
// whose tokens are of a prompt. Of one there may be few left: llama-server reads its end apart, if the model's cache cannot be
// rolled back, and what an earlier request has read is not read again.
template <typename Tokens, typename Slots>
void fasa_server_begin(llama_context * ctx, const Tokens & tokens, const Slots & slots, int32_t first, int32_t n) {
    int32_t budget = -1;
    std::vector<llama_seq_id> prompts;
    for (int32_t i = first; i < first + n; ++i) {
        const llama_seq_id slot = tokens[i].id_slot;
        const int32_t      own  = fasa_server_budget(slots[slot].task->params.fasa_budget);
        budget = own == 0 || budget == 0 ? 0 : std::max(budget, own);
        if (tokens[i].is_prompt && (prompts.empty() || prompts.back() != slot)) {
            prompts.push_back(slot);
        }
    }
    if (budget >= 0) {
        llama_fasa_set_budget(ctx, budget);
    }
    llama_fasa_set_prompts(ctx, prompts.data(), prompts.size());
}

// After they were: counts those that were not of a prompt for their requests. The sparse ones come first in a batch; with a
// cache of streams, which llama.cpp splits by itself, it is their number that is right.
template <typename Tokens, typename Slots>
void fasa_server_end(const llama_context * ctx, const Tokens & tokens, Slots & slots, int32_t first, int32_t n) {
    if (!llama_fasa_get_info(ctx).active) {
        return;
    }
    uint64_t n_sparse = fasa_server_count(ctx);
    for (int32_t i = first; i < first + n; ++i) {
        if (tokens[i].is_prompt) {
            continue;
        }
        auto & stats = slots[tokens[i].id_slot].stats;
        if (stats.is_set()) {
            (n_sparse > 0 ? stats.n_fasa_sparse : stats.n_fasa_dense)++;
        }
        n_sparse -= n_sparse > 0;
    }
}
