// Stage select on the CPU: the budget best cells of one KV group and one query row.
//
// Scores are sums of softmax weights, so they are >= 0, or +inf (always selected), or -inf (hidden). For such values the
// IEEE bit pattern orders like the value, and the budget-th largest is found digit by digit without sorting.

#include "fasa-simd.h"
#include "fasa-stages.h"

#include <algorithm>

namespace fasa {

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

// Calls fn(cell, score) for the cells with score >= bound, in order; whole vectors below the bound cost one comparison.
template <typename F>
static void for_each_ge(const float * scores, int64_t n, float bound, F && fn) {
    const vec b = splat(bound);
    int64_t t = 0;
    for (; t + W <= n; t += W) {
        for (uint32_t bits = ge_bits(load(scores + t), b); bits; bits &= bits - 1) {
            const int64_t i = t + lowest_bit(bits);
            fn(i, scores[i]);
        }
    }
    for (; t < n; ++t) {
        if (scores[t] >= bound) {
            fn(t, scores[t]);
        }
    }
}

// A lower bound of the budget-th largest score, which keeps nearly all cells out of what follows. Cells are put into
// units that share no cell; where budget units reach a value, budget scores do. A unit is one lane of a run of vectors.
static float select_bound(const float * scores, int64_t n_kv, int64_t budget) {
    constexpr int64_t UNITS = 2; // wanted for each cell of the budget: more make a tighter bound and take longer
    constexpr int     SHIFT = 20;

    const int64_t run = n_kv/(UNITS*budget); // vectors, each of W cells of W units
    if (run < 2) {
        return 0.0f;
    }

    uint32_t count[1 << (31 - SHIFT)] = { 0 };
    int64_t n_unit = 0;
    for (int64_t t = 0; t + run*W <= n_kv; t += run*W) {
        vec top = load(scores + t);
        for (int64_t i = 1; i < run; ++i) {
            top = max(top, load(scores + t + i*W));
        }
        float lane[W];
        store(lane, top);
        for (float x : lane) {
            count[key_of(std::max(0.0f, x)) >> SHIFT]++;
            n_unit++;
        }
    }
    if (n_unit < budget) {
        return 0.0f;
    }

    uint32_t key = 1 << (31 - SHIFT);
    for (int64_t need = budget; need > 0;) {
        need -= count[--key];
    }
    return score_of(key << SHIFT);
}

// Finds the smallest selected score, and how many cells with exactly that score fit, from the keys of the n cells that can
// be among the best, of which there are at least budget. Overwrites keys.
static void select_threshold(uint32_t * keys, int64_t n, int64_t budget, float * threshold, int64_t * n_equal) {
    uint32_t key  = 0;      // digits of the threshold found so far
    int64_t  need = budget; // cells still to place among those that begin with them

    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t count[256] = { 0 };
        for (int64_t i = 0; i < n; ++i) {
            count[keys[i] >> shift & 255]++;
        }
        uint32_t digit = 255;
        for (; need > (int64_t) count[digit]; --digit) {
            need -= count[digit];
        }
        key |= digit << shift;

        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t k = keys[i];
            keys[kept] = k;
            kept += k >> shift == key >> shift;
        }
        n = kept;
    }

    *threshold = score_of(key);
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
    int64_t n         = 0;

    if (use_ref) {
        fasa::select_threshold_ref(scores, n_kv, budget, &threshold, &n_equal);
    } else {
        fasa::for_each_ge(scores, n_kv, fasa::select_bound(scores, n_kv, budget), [&](int64_t, float score) {
            scratch[n++] = fasa::key_of(score);
        });
        if (n >= budget) {
            fasa::select_threshold(scratch, n, budget, &threshold, &n_equal);
        }
    }

    n = 0;
    fasa::for_each_ge(scores, n_kv, threshold, [&](int64_t t, float score) {
        if (score > threshold || n_equal-- > 0) {
            cells[n++] = (int32_t) t;
        }
    });
    return n;
}
