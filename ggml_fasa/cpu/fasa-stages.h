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

    // whether cells [t0, t0 + n) are all neither hidden nor forced; false where n is no number of whole tiles
    bool plain(int64_t t0, int64_t n) const;

    // the same for a chunk of tip
    bool plain_chunk(int64_t chunk, int64_t n_kv) const;

    // which of the n cells of the tile that begins at t0 are, bit by bit; cells beyond n count as hidden
    struct tile_bits { uint32_t hidden, forced; };
    tile_bits tile(int64_t t0, int64_t n) const;
};

// Rows of K or V of one head.
struct cache_rows {
    const void * data;
    ggml_type    type;
    size_t       stride; // bytes from cell to cell
    int64_t      d;
    size_t       size;   // bytes of a row

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

// 4-byte words of tip's query of one head: n_dim floats for an F16 index; for one of integers vectors whose lanes are all the
// same: the factor (float) that makes S out of d * sum, then, for a q4 index before every DOT4_RUN fours, what the sum starts
// from, and the q' in fours, zeros beyond n_dim.
int64_t tip_query_size(int64_t n_dim);

// Makes tip's queries [n_group][tip_query_size] out of floats [n_group][n_dim] that are multiplied by scale.
void tip_query(const float * q, int64_t n_group, int64_t n_dim, ggml_fasa_index_type type, float * query);

// tip for one chunk of cells: weight[h][t] = exp(S_h(t)) / 2^peak, 0 where hidden, [n_group][TIP_CHUNK]. plain: as of
// mask.plain_chunk. peak and total are [n_chunk][n_group]: the power of two nearest the chunk's largest exp(S_h), as an exponent
// (-inf if it shows no cell), and its sum of weights.
void tip_chunk(
        const float * query, int64_t n_group, const index_plane & index, mask_row mask, bool plain, int64_t n_kv, int64_t chunk,
        float * weight, float * peak, float * total);

// Once all chunks are done: the factors [n_chunk][n_group] that make weights softmax values.
void tip_factors(int64_t n_group, int64_t n_chunk, const float * peak, const float * total, float * factor);

// One chunk of scores[t] = sum_h factor * weight[h][t], -inf where hidden, +inf where forced. Writes whole tiles.
void tip_combine(
        const float * weight, int64_t n_group, const float * factor, mask_row mask, bool plain, int64_t n_kv, int64_t chunk,
        float * scores);

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

// KV groups side by side: the first, and what is between one and the next, in floats of q and bytes of K and V.
struct fac_groups {
    fac_input first;
    int64_t   n_groups;
    int64_t   q_step;
    size_t    k_step;
    size_t    v_step;

    fac_input group(int64_t g) const {
        fac_input in = first;
        in.q += g*q_step;
        in.k.data = (const char *) in.k.data + g*k_step;
        in.v.data = (const char *) in.v.data + g*v_step;
        return in;
    }
};

// A part of attention before division by the softmax sum, [n_group][d_v + 2]: for each head sum_t p * v, then the largest
// logit (-inf if there is no cell), then the sum of p.
inline int64_t fac_part_size(const fac_input & in) { return in.n_group*(in.v.d + 2); }

// Floats of scratch that one thread needs for the two below, for n_head heads of one or more groups.
inline int64_t fac_thread_scratch(int64_t n_head, int64_t d) { return (n_head + d)*FAC_CHUNK; }

// Attention over one chunk of the selected cells, and over one chunk of all visible cells, of several groups at once as
// their K rows lie side by side in memory: the part of each is part_stride floats behind the one before.
void fac_chunk  (const fac_input & in, const int32_t * cells, int64_t n_cells, int64_t chunk, float * scratch, float * part);
void dense_chunk(
        const fac_groups & all, mask_row mask, int64_t n_kv, int64_t chunk, float * scratch, float * part, size_t part_stride);

// Once all chunks are done: attention output of one head, out[d_v]. part: [n_chunk] parts; sink: the head's attention sink
// or NULL.
void fac_merge(const float * part, int64_t n_group, int64_t d_v, int64_t n_chunk, int64_t head, const float * sink, float * out);

} // namespace fasa
