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
    return u;
}

static float score_of(uint32_t key) {
    float f;
    memcpy(&f, &key, sizeof(f));
    return f;
}

// Digits of a non-negative float's 31 bits, most significant first.
struct digit { int shift; int bits; };
static constexpr digit DIGITS[] = { { 20, 11 }, { 10, 10 }, { 0, 10 } };

// Calls fn(cell, score) for the cells with score >= bound, in order; whole vectors below the bound are skipped.
template <typename F>
static void for_each_ge(const float * scores, int64_t n, float bound, F && fn) {
    const vec b = splat(bound);
    int64_t t = 0;
    for (; t + W <= n; t += W) {
        if (!any_ge(load(scores + t), b)) {
            continue;
        }
        for (int64_t i = t; i < t + W; ++i) {
            if (scores[i] >= bound) {
                fn(i, scores[i]);
            }
        }
    }
    for (; t < n; ++t) {
        if (scores[t] >= bound) {
            fn(t, scores[t]);
        }
    }
}

// A lower bound of the budget-th largest score, from the largest score of every vector: where enough of those reach a
// value, enough scores do. Only its first digit is found. It lets the passes below skip nearly everything.
static float select_bound(const float * scores, int64_t n_kv, int64_t budget) {
    const int64_t n_vec = n_kv/W;
    if (W == 1 || n_vec < budget) {
        return 0.0f;
    }

    uint32_t count[1 << 11] = { 0 };
    for (int64_t i = 0; i < n_vec; ++i) {
        const float top = hmax(load(scores + i*W));
        if (top >= 0.0f) {
            count[key_of(top) >> DIGITS[0].shift]++;
        }
    }
    int64_t need = budget;
    for (int digit_value = (1 << 11) - 1; digit_value >= 0; --digit_value) {
        need -= count[digit_value];
        if (need <= 0) {
            return score_of((uint32_t) digit_value << DIGITS[0].shift);
        }
    }
    return 0.0f;
}

// Finds the smallest selected score and how many cells with exactly that score fit. False: all visible cells fit.
static bool select_threshold(const float * scores, int64_t n_kv, int64_t budget, float * threshold, int64_t * n_equal) {
    uint32_t prefix = 0;      // digits of the threshold found so far
    int64_t  need   = budget; // cells still to place at or below the prefix

    const float bound = select_bound(scores, n_kv, budget);

    for (const digit & d : DIGITS) {
        uint32_t count[1 << 11] = { 0 };
        const uint32_t above = (uint32_t) ((1ull << (d.shift + d.bits)) - 1); // digits after the prefix

        for_each_ge(scores, n_kv, std::max(bound, score_of(prefix)), [&](int64_t, float score) {
            const uint32_t key = key_of(score);
            if ((key & ~above) == prefix) {
                count[(key >> d.shift) & ((1u << d.bits) - 1)]++;
            }
        });

        int digit_value = (1 << d.bits) - 1;
        while (digit_value >= 0 && need > (int64_t) count[digit_value]) {
            need -= count[digit_value--];
        }
        if (digit_value < 0) {
            return false; // only the first digit can get here: later ones know that their prefix holds enough
        }
        prefix |= (uint32_t) digit_value << d.shift;
    }

    *threshold = score_of(prefix);
    *n_equal   = need;
    return true;
}

// The oracle of the fast path: bisects over all bit patterns.
static bool select_threshold_ref(const float * scores, int64_t n_kv, int64_t budget, float * threshold, int64_t * n_equal) {
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
        return false;
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
    return true;
}

} // namespace fasa

int64_t ggml_fasa_cpu_select(const float * scores, int64_t n_kv, int64_t budget, int32_t * cells, bool use_ref) {
    float   threshold = 0.0f;
    int64_t n_equal   = 0;

    const bool full = use_ref ? fasa::select_threshold_ref(scores, n_kv, budget, &threshold, &n_equal)
                              : fasa::select_threshold    (scores, n_kv, budget, &threshold, &n_equal);
    if (!full) {
        threshold = 0.0f; // every visible score is >= 0
        n_equal   = n_kv;
    }

    int64_t n = 0;
    fasa::for_each_ge(scores, n_kv, threshold, [&](int64_t t, float score) {
        if (score > threshold || n_equal-- > 0) {
            cells[n++] = (int32_t) t;
        }
    });
    return n;
}
