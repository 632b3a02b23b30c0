// Stage select on the CPU: the budget best cells of one KV group and one query row.
//
// Scores are sums of softmax weights, so they are >= 0, or +inf (always selected), or -inf (hidden). For such values the
// IEEE bit pattern orders like the value, and the budget-th largest is found digit by digit without sorting.

#include "fasa-simd.h"
#include "fasa-stages.h"

#include <algorithm>

namespace fasa {

static constexpr uint32_t KEY_FORCED = 0x7F800000; // of +inf

static uint32_t key_of(float score) {
    uint32_t u;
    memcpy(&u, &score, sizeof(u));
    return u & 0x7FFFFFFF; // -0.0 is 0.0
}

static float score_of(uint32_t key) {
    float f;
    memcpy(&f, &key, sizeof(f));
    return f;
}

// The cells with score >= bound, in order: [n_kv]. Returns how many.
static int64_t cells_ge(const float * scores, int64_t n_kv, float bound, int32_t * cells) {
    int64_t n = 0;
    int64_t t = 0;
    for (; t + W <= n_kv; t += W) {
        n += append(ge_bits(load(scores + t), splat(bound)), (int32_t) t, cells + n);
    }
    for (; t < n_kv; ++t) {
        if (scores[t] >= bound) {
            cells[n++] = (int32_t) t;
        }
    }
    return n;
}

// A lower bound of the budget-th largest score, which keeps nearly all cells out of what follows. Cells are put into
// units that share no cell; where budget units reach a value, budget scores do. A unit is every n_unit-th cell: the best
// cells lie side by side, and the bound is tight only if they are of many units. scratch: [n_kv].
static float select_bound(const float * scores, int64_t n_kv, int64_t budget, float * scratch) {
    constexpr int64_t UNITS = 2; // wanted for each cell of the budget: more make a tighter bound and take longer
    constexpr int     SHIFT = 20;
    constexpr int     N_BIN = (0x47800000 >> SHIFT) + 1; // up to 65536, which no score reaches but that of a forced cell

    const int64_t n_unit = GGML_PAD(UNITS*budget, W) + W; // no power of two, with which text might repeat itself
    if (n_kv < 2*n_unit) {
        return 0.0f;
    }

    float * top = scratch;
    std::copy(scores, scores + n_unit, top);
    for (int64_t t = n_unit; t < n_kv; t += n_unit) {
        for (int64_t i = 0; i < n_unit && t + i + W <= n_kv; i += W) {
            store(top + i, max(load(top + i), load(scores + t + i)));
        }
    }

    uint32_t count[N_BIN] = { 0 };
    for (int64_t i = 0; i < n_unit; ++i) {
        count[std::min<uint32_t>(key_of(std::max(0.0f, top[i])) >> SHIFT, N_BIN - 1)]++;
    }
    uint32_t key = N_BIN;
    for (int64_t need = budget; need > 0;) {
        need -= count[--key];
    }
    return score_of(key << SHIFT);
}

// Finds the smallest selected score, and how many cells with exactly that score fit, from the keys of the n cells that can
// be among the best, of which there are more than budget. Overwrites keys.
static void select_threshold(uint32_t * keys, int64_t n, int64_t budget, float * threshold, int64_t * n_equal) {
    constexpr int BITS = 8; // of a digit

    uint32_t least = KEY_FORCED;
    uint32_t most  = 0; // of those that are not forced
    for (int64_t i = 0; i < n; ++i) {
        least = std::min(least, keys[i]);
        most  = std::max(most, keys[i] == KEY_FORCED ? 0 : keys[i]);
    }
    most = std::max(least, most);

    // digits of what keys are above the least, only as high as these need; forced ones are above them all
    int shift = 0;
    while ((most - least) >> shift >> BITS) {
        ++shift;
    }
    const uint32_t forced = 1u << BITS << shift;
    for (int64_t i = 0; i < n; ++i) {
        keys[i] = keys[i] == KEY_FORCED ? forced : keys[i] - least;
    }

    uint32_t key  = 0;      // digits of the threshold found so far
    int64_t  need = budget; // cells still to place among those that begin with them
    while (true) {
        uint32_t count[(1 << BITS) + 1] = { 0 };
        for (int64_t i = 0; i < n; ++i) {
            count[(keys[i] - key) >> shift]++;
        }
        uint32_t digit = 1 << BITS;
        for (; need > (int64_t) count[digit]; --digit) {
            need -= count[digit];
        }
        key += digit << shift;
        if (shift == 0 || key == forced) {
            break;
        }

        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t k = keys[i];
            keys[kept] = k;
            kept += (k - key) >> shift == 0;
        }
        n     = kept;
        shift = std::max(shift - BITS, 0);
    }

    *threshold = score_of(key == forced ? KEY_FORCED : key + least);
    *n_equal   = need;
}

// The oracle of the fast path: bisects over all bit patterns.
static void select_threshold_ref(const float * scores, int64_t n_kv, int64_t budget, float * threshold, int64_t * n_equal) {
    auto count_ge = [&](uint32_t key) {
        int64_t n = 0;
        for (int64_t t = 0; t < n_kv; ++t) {
            n += scores[t] >= score_of(key) ? 1 : 0;
        }
        return n;
    };

    uint32_t lo = 0;          // count_ge(lo) >= budget
    uint32_t hi = 0x7F800001; // count_ge(hi) <  budget: above +inf
    if (count_ge(lo) < budget) {
        return; // all visible cells fit
    }
    while (hi - lo > 1) {
        const uint32_t mid = lo + (hi - lo)/2;
        (count_ge(mid) >= budget ? lo : hi) = mid;
    }

    int64_t greater = 0;
    for (int64_t t = 0; t < n_kv; ++t) {
        greater += scores[t] > score_of(lo) ? 1 : 0;
    }
    *threshold = score_of(lo);
    *n_equal   = budget - greater;
}

} // namespace fasa

int64_t ggml_fasa_cpu_select(
        const float * scores, int64_t n_kv, int64_t budget, uint32_t * scratch, int32_t * cells, bool use_ref) {
    float   threshold = 0.0f; // every visible score is >= 0
    int64_t n_equal   = n_kv;
    int64_t n_kept    = 0;

    if (use_ref) {
        fasa::select_threshold_ref(scores, n_kv, budget, &threshold, &n_equal);
        for (int64_t t = 0; t < n_kv; ++t) {
            if (scores[t] > threshold || (scores[t] == threshold && n_equal-- > 0)) {
                cells[n_kept++] = (int32_t) t;
            }
        }
        return n_kept;
    }

    int32_t * candidates = (int32_t *) scratch;
    uint32_t * keys      = scratch + n_kv;

    const int64_t n = fasa::cells_ge(scores, n_kv, fasa::select_bound(scores, n_kv, budget, (float *) keys), candidates);
    if (n <= budget) {
        std::copy(candidates, candidates + n, cells);
        return n;
    }
    for (int64_t i = 0; i < n; ++i) {
        keys[i] = fasa::key_of(scores[candidates[i]]);
    }
    fasa::select_threshold(keys, n, budget, &threshold, &n_equal);
    const uint32_t least = fasa::key_of(threshold);
    for (int64_t i = 0; i < n; ++i) { // no branches, which nobody could predict
        const uint32_t key = fasa::key_of(scores[candidates[i]]);
        candidates[n_kept] = candidates[i];
        n_kept  += (key > least) | ((key == least) & (n_equal > 0));
        n_equal -= key == least;
    }
    std::copy(candidates, candidates + n_kept, cells);
    return n_kept;
}
