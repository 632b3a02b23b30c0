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

// Rows of K or V of one head.
struct cache_rows {
    const void * data;
    ggml_type    type;
    size_t       stride; // bytes from cell to cell
    int64_t      d;

    const void * row(int64_t cell) const { return (const char *) data + cell*stride; }

    // a row as floats, in scratch [d] unless it is of floats already
    const float * floats(int64_t cell, float * scratch) const;
};

// Multiplies x [d] by the orthonormal Walsh-Hadamard matrix of size n, block by block: its own inverse.
void hadamard(float * x, int64_t d, int64_t n);

// Work is cut into chunks of fixed size, whatever the number of threads, so that every thread count sums in the same
// order and gives the same bits.
constexpr int64_t TIP_CHUNK   = 512; // cells, a multiple of the tile
constexpr int64_t FAC_CHUNK   = 64;  // selected cells
constexpr int64_t DENSE_CHUNK = 256; // cells, a multiple of FAC_CHUNK

inline int64_t n_tip_chunk(int64_t n_kv)    { return (n_kv    + TIP_CHUNK   - 1)/TIP_CHUNK; }
inline int64_t n_fac_chunk(int64_t n_cells) { return (n_cells + FAC_CHUNK   - 1)/FAC_CHUNK; }
inline int64_t n_dense_chunk(int64_t n_kv)  { return (n_kv    + DENSE_CHUNK - 1)/DENSE_CHUNK; }

// The index of one KV head.
struct index_plane {
    ggml_fasa_index_type type;
    int64_t              n_dim;
    const void         * data;

    const char * tile(int64_t i) const { return (const char *) data + i*ggml_fasa_tile_size(type, n_dim); }
};

// 4-byte words of tip's query of one head: n_dim floats for an F16 index; for one of integers the factor (float) that
// makes S out of d * sum, what the sum starts from (int32), and the q' in fours, zeros beyond n_dim.
inline int64_t tip_query_size(int64_t n_dim) { return n_dim + 2; }

// Makes tip's queries [n_group][tip_query_size] out of floats [n_group][n_dim] that are multiplied by scale.
void tip_query(const float * q, int64_t n_group, int64_t n_dim, ggml_fasa_index_type type, float * query);

// What tip works on: the queries of one KV group (see tip_query), the group's index, and one row of the mask.
struct tip_input {
    const float * query;
    int64_t       n_group;
    index_plane   index;
    mask_row      mask;
    int64_t       n_kv;
    int64_t       budget;

    int64_t n_chunk() const { return n_tip_chunk(n_kv); }
    int64_t n_tile()  const { return (n_kv + GGML_FASA_TILE - 1)/GGML_FASA_TILE; }

    // Whether the weights of all cells are kept from tip_chunk to tip_combine. Where there are many tiles for each cell of
    // the budget, memory is slower than scoring once more the few tiles that can hold one of the best cells.
    bool keeps_weights() const { return n_tile() < 4*budget; }

    // Of a buffer of weights, [n_group][weight_stride]: all cells, or those of a chunk.
    int64_t weight_stride() const { return keeps_weights() ? GGML_PAD(n_kv, GGML_FASA_TILE) : TIP_CHUNK; }
};

// What is known of a chunk and head, [n_chunk][n_group], once tip_chunk has been there; and of a tile, [n_tile][n_group], where
// weights are not kept.
struct tip_sums {
    float * largest; // S_h, -inf if no cell is visible
    float * peak;    // exponent of the power of two nearest exp(largest)
    float * total;   // sum of weights
    float * top;     // largest weight, 0 if no cell is visible

    static size_t size(const tip_input & in) {
        return in.n_group*(3*in.n_chunk() + (in.keeps_weights() ? 0 : in.n_tile()));
    }
    tip_sums(const tip_input & in, float * data) :
        largest(data),
        peak (largest + in.n_group*in.n_chunk()),
        total(peak    + in.n_group*in.n_chunk()),
        top  (total   + in.n_group*in.n_chunk()) {}
};

// tip for one chunk of cells: weight[h][t] = exp(S_h(t)) / 2^peak, next to 0 where hidden.
void tip_chunk(const tip_input & in, int64_t chunk, float * weight, const tip_sums & sums);

// Once all chunks are done: the factors [n_chunk][n_group] that make weights softmax values.
void tip_factors(const tip_input & in, const tip_sums & sums, float * factor);

// A score that budget cells reach, 0 if weights are kept. keys: scratch [n_tile].
float tip_bound(const tip_input & in, const tip_sums & sums, const float * factor, uint32_t * keys);

// One chunk of scores[t] = sum_h factor * weight[h][t], or 0 in tiles that cannot reach the bound; -inf where hidden, +inf
// where forced. Writes whole tiles.
void tip_combine(
        const tip_input & in, int64_t chunk, float * weight, const tip_sums & sums, const float * factor, float bound,
        float * scores);

// Finds the budget-th largest of n > budget values >= 0, given by their bits, and how many of those equal to it are among
// the budget largest. Overwrites keys.
void select_threshold(uint32_t * keys, int64_t n, int64_t budget, float * threshold, int64_t * n_equal);

// What fac reads for one KV group and one query row.
struct fac_input {
    const float * q;        // [n_group][d_k]
    int64_t       n_group;
    int64_t       q_stride; // floats from head to head
    cache_rows    k;
    cache_rows    v;
    float         scale;
    float         softcap;
};

// A part of attention before division by the softmax sum, [n_group][d_v + 2]: for each head sum_t p * v, then the largest
// logit (-inf if there is no cell), then the sum of p.
inline int64_t fac_part_size(const fac_input & in) { return in.n_group*(in.v.d + 2); }

// Floats of scratch that one thread needs for the two below.
inline int64_t fac_thread_scratch(int64_t n_group, int64_t d) { return (n_group + d)*FAC_CHUNK; }

// Attention over one chunk of the selected cells, and over one chunk of all visible cells.
void fac_chunk  (const fac_input & in, const int32_t * cells, int64_t n_cells, int64_t chunk, float * scratch, float * part);
void dense_chunk(const fac_input & in, mask_row mask, int64_t n_kv, int64_t chunk, float * scratch, float * part);

// Once all chunks are done: attention output of one head, out[d_v]. part: [n_chunk] parts; sink: the head's attention sink
// or NULL.
void fac_merge(
        const float * part, int64_t n_group, int64_t d_v, int64_t n_chunk, int64_t head, const float * sink, float * out);

} // namespace fasa
