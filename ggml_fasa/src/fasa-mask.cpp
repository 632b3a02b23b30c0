// The attention mask of a step, and the marks of the forced cells in it.
//
// llama.cpp asks every cell for its sequence and position: at depth that takes longer than tip. Here only the cells behind
// the first position of the batch are asked, and not even the others' sequence where one sequence has the cache for itself.

#include "fasa-index-cache.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

template <typename T>
struct mask_values {
    T visible, hidden, forced;
};

// Calls fn with the values of a mask and its data, of the type that it has.
template <typename Fn>
void of_type(ggml_tensor * mask, Fn && fn) {
    GGML_ASSERT(mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
    if (mask->type == GGML_TYPE_F16) {
        const mask_values<ggml_fp16_t> values = {
            ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY), ggml_fp32_to_fp16(-0.0f),
        };
        fn(values, (ggml_fp16_t *) mask->data);
    } else {
        fn(mask_values<float> { 0.0f, -INFINITY, -0.0f }, (float *) mask->data);
    }
}

// A row that shows all cells of a sequence.
template <typename T>
void show(const llama_kv_cells & cells, llama_seq_id seq, const mask_values<T> & values, T * row, int64_t n_kv) {
    const uint32_t n = cells.used_max_p1();
    GGML_ASSERT(n <= n_kv);

    if (cells.get_used() == n && cells.seq_pos_get(seq).size() == n) {
        std::fill(row, row + n, values.visible); // no holes, no other sequence's cells
    } else {
        for (uint32_t i = 0; i < n; ++i) {
            row[i] = cells.seq_has(i, seq) ? values.visible : values.hidden;
        }
    }
    std::fill(row + n, row + n_kv, values.hidden);
}

using pos_cell = std::pair<llama_pos, uint32_t>;

// What the rows of a sequence share.
template <typename T>
struct sequence_rows {
    const T *             first; // the first row
    std::vector<pos_cell> late;  // cells that some row may not see
};

template <typename T>
void set_rows(const llama_kv_cells_vec & v_cells, const std::vector<uint32_t> & seq_to_stream, const llama_ubatch & ubatch,
        const mask_values<T> & values, T * mask, int64_t n_kv) {
    std::unordered_map<llama_seq_id, llama_pos> start; // first position in the batch
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        llama_pos & pos = start.try_emplace(ubatch.seq_id[i][0], ubatch.pos[i]).first->second;
        pos = std::min(pos, ubatch.pos[i]);
    }

    std::unordered_map<llama_seq_id, sequence_rows<T>> done;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq = ubatch.seq_id[i][0];
        T * row = mask + i*n_kv;

        auto [it, is_first] = done.try_emplace(seq);
        sequence_rows<T> & rows = it->second;
        if (is_first) {
            const auto & cells = v_cells[seq_to_stream[seq]];
            const auto & all   = cells.seq_pos_get(seq);
            show(cells, seq, values, row, n_kv);
            rows.first = row;
            rows.late.assign(all.upper_bound({ start[seq], UINT32_MAX }), all.end());
        } else {
            std::copy(rows.first, rows.first + n_kv, row);
        }
        for (const auto & [pos, cell] : rows.late) {
            row[cell] = pos > ubatch.pos[i] ? values.hidden : values.visible;
        }
    }
}

template <typename T>
void mark_rows(const llama_fasa_config & config, const llama_kv_cells_vec & v_cells,
        const std::vector<uint32_t> & seq_to_stream, const llama_ubatch & ubatch, int64_t n_rows, const mask_values<T> & values,
        T * mask, int64_t n_kv) {
    auto mark = [&](T * row, uint32_t cell) {
        if ((int64_t) cell < n_kv && memcmp(&row[cell], &values.hidden, sizeof(T)) != 0) {
            row[cell] = values.forced;
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

} // namespace

bool llama_fasa_index_cache::set_mask(ggml_tensor * mask, const llama_ubatch & ubatch, bool causal) {
    if (!causal || kv.swa_type != LLAMA_SWA_TYPE_NONE || ubatch.is_pos_2d()) {
        return false; // nor ALiBi, but that has no FASA
    }
    of_type(mask, [&](const auto & values, auto * data) {
        set_rows(kv.v_cells, kv.seq_to_stream, ubatch, values, data, mask->ne[0]);
    });
    if (llama_fasa_verifies()) {
        const uint8_t * bytes = (const uint8_t *) mask->data;
        mask_to_verify.assign(bytes, bytes + ubatch.n_tokens*mask->nb[1]);
        return false;
    }
    mark_forced(mask, ubatch);
    return true;
}

void llama_fasa_index_cache::mark_forced(ggml_tensor * mask, const llama_ubatch & ubatch) {
    verify_mask(mask);

    const int64_t n_kv = mask->ne[0];

    const int64_t n_rows = config.n_sparse_rows(ubatch, n_kv);
    const bool    whole  = config.n_decode_rows(ubatch) == ubatch.n_tokens;
    if (n_rows == 0) {
        (whole ? stats.n_step_dense : stats.n_step_prefill)++;
        return;
    }
    (whole ? stats.n_step_sparse : stats.n_step_mixed)++;
    stats.n_row_sparse += n_rows;

    of_type(mask, [&](const auto & values, auto * data) {
        mark_rows(config, kv.v_cells, kv.seq_to_stream, ubatch, n_rows, values, data, n_kv);
    });
}
