// The stages of the CPU op, split so that threads can share one query row. Letters as in ggml-fasa.h.

#pragma once

#include "ggml-fasa-cpu.h"
#include "ggml-fasa.h"

namespace fasa {

// A mask row: element t says whether cell t is hidden, visible or forced (always selected).
struct mask_row {
    const void * data;
    bool         f16;

    bool hidden(int64_t t) const;
    bool forced(int64_t t) const;

    // what a whole tile is: lets the kernels skip per-cell tests
    enum tile_kind { ALL_PLAIN, ALL_HIDDEN, MIXED };
    tile_kind kind(int64_t t0, int64_t n) const;
};

// Work is cut into chunks of fixed size, whatever the number of threads, so that every thread count sums in the same
// order and gives the same bits.
constexpr int64_t TIP_CHUNK = 512; // cells, a multiple of the tile
constexpr int64_t FAC_CHUNK = 64;  // selected cells

inline int64_t n_tip_chunk(int64_t n_kv)    { return (n_kv    + TIP_CHUNK - 1)/TIP_CHUNK; }
inline int64_t n_fac_chunk(int64_t n_cells) { return (n_cells + FAC_CHUNK - 1)/FAC_CHUNK; }

// tip for one chunk of cells: weight[h][t] = exp(S_h(t)) / 2^peak, 0 where hidden. peak and total are [n_chunk][n_group]:
// the power of two nearest the chunk's largest exp(S_h), as an exponent (-inf if it shows no cell), and its sum of
// weights. Rows of weight are stride floats apart.
void tip_chunk(
        const float * q, int64_t n_group, int64_t n_dim, const ggml_fp16_t * index, mask_row mask, int64_t n_kv,
        int64_t chunk, float * weight, int64_t stride, float * peak, float * total);

// Once all chunks are done: turns peak into the factors that make weights softmax values, in place.
void tip_factors(int64_t n_group, int64_t n_chunk, float * peak, const float * total);

// scores[t] = sum_h factor * weight[h][t], -inf where hidden, +inf where forced.
void tip_combine(
        const float * weight, int64_t stride, int64_t n_group, const float * factor, mask_row mask, int64_t n_kv,
        float * scores);

// Attention over one chunk of selected cells, before division by the softmax sum. part is [n_chunk][n_group][d_v + 2]: for
// each head sum_t p * v, then the largest logit, then the sum of p. logits: scratch [n_group][FAC_CHUNK].
void fac_chunk(
        const float * q, int64_t n_group, int64_t q_stride, const void * k, size_t k_stride, const void * v, size_t v_stride,
        int64_t d_k, int64_t d_v, const int32_t * cells, int64_t n_cells, float scale, float softcap,
        int64_t chunk, float * logits, float * part);

// Once all chunks are done: attention output of one head, out[d_v]. sink: the head's attention sink or NULL.
void fac_merge(const float * part, int64_t n_group, int64_t d_v, int64_t n_chunk, int64_t head, const float * sink, float * out);

} // namespace fasa
