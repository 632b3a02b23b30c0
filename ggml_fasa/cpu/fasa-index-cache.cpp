// Stage index_cache on the CPU: copies the dominant dims of K rows into the tiled index.

#include "fasa-stages.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fasa {

static constexpr int64_t TILE = GGML_FASA_TILE;

const float * cache_rows::floats(int64_t cell, float * scratch) const {
    if (type == GGML_TYPE_F32) {
        return (const float *) row(cell);
    }
    if (type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row(cell), scratch, d);
    } else {
        ggml_get_type_traits(type)->to_float(row(cell), scratch, d);
    }
    return scratch;
}

void hadamard(float * x, int64_t d, int64_t n) {
    for (int64_t half = 1; half < n; half *= 2) {
        for (int64_t i = 0; i < d; i += 2*half) {
            for (int64_t j = i; j < i + half; ++j) {
                const float a = x[j];
                const float b = x[j + half];
                x[j]        = a + b;
                x[j + half] = a - b;
            }
        }
    }
    const float norm = 1.0f/sqrtf((float) n);
    for (int64_t i = 0; i < d; ++i) {
        x[i] *= norm;
    }
}

// The dims of a row that the index keeps, [n_dim]. scratch: [d].
static void indexed_dims(
        const cache_rows & k, int64_t hadamard_size, const int32_t * dims, int64_t n_dim, float * scratch, float * values) {
    const float * row = k.floats(0, scratch);
    if (hadamard_size) {
        if (row != scratch) {
            std::copy(row, row + k.d, scratch);
        }
        hadamard(scratch, k.d, hadamard_size);
        row = scratch;
    }
    for (int64_t j = 0; j < n_dim; ++j) {
        values[j] = row[dims[j]];
    }
}

// One cell of a tile of integers; see ggml_fasa_new_index.
static void write_integers(const float * k, int64_t n_dim, ggml_fasa_index_type type, int64_t cell, char * tile) {
    const bool    q8       = type == GGML_FASA_INDEX_Q8;
    const float   low      = q8 ? -127.0f : -8.0f;
    const float   high     = q8 ?  127.0f :  7.0f;
    const int     offset   = q8 ? 128 : 8;
    const int64_t per_word = q8 ? 4 : 8;

    float top = 0.0f;
    for (int64_t j = 0; j < n_dim; ++j) {
        top = fabsf(k[j]) > fabsf(top) ? k[j] : top;
    }
    const ggml_fp16_t scale   = ggml_fp32_to_fp16(q8 ? fabsf(top)/127.0f : top/-8.0f);
    const float       d       = ggml_fp16_to_fp32(scale);
    const float       inverse = d != 0.0f ? 1.0f/d : 0.0f;
    memcpy(tile + cell*sizeof(scale), &scale, sizeof(scale));

    uint8_t * words = (uint8_t *) tile + TILE*sizeof(scale);
    for (int64_t w = 0; w*per_word < n_dim; ++w) {
        uint8_t word[4] = { 0 };
        for (int64_t i = 0; i < std::min(per_word, n_dim - w*per_word); ++i) {
            const float x = std::min(high, std::max(low, rintf(k[w*per_word + i]*inverse)));
            word[i%4] |= ((int) x + offset) << (i/4*4);
        }
        memcpy(words + (w*TILE + cell)*sizeof(word), word, sizeof(word));
    }
}

} // namespace fasa

void ggml_fasa_cpu_index_write(
        const void * k, int type_k, int64_t d, int32_t hadamard, const int32_t * dims, const float * center, int64_t n_dim,
        int64_t cell, int index_type, void * index, float * scratch) {
    using namespace fasa;

    const ggml_fasa_index_type type = (ggml_fasa_index_type) index_type;

    char * tile = (char *) index + cell/TILE*ggml_fasa_tile_size(type, n_dim);
    cell %= TILE;

    if (type == GGML_FASA_INDEX_F16 && type_k == GGML_TYPE_F16 && !hadamard && !center) {
        for (int64_t j = 0; j < n_dim; ++j) {
            ((ggml_fp16_t *) tile)[j*TILE + cell] = ((const ggml_fp16_t *) k)[dims[j]];
        }
        return;
    }

    float * values = scratch + d;
    indexed_dims({ k, (ggml_type) type_k, 0, d, 0 }, hadamard, dims, n_dim, scratch, values);
    for (int64_t j = 0; center && j < n_dim; ++j) {
        values[j] -= center[j];
    }
    if (type == GGML_FASA_INDEX_F16) {
        for (int64_t j = 0; j < n_dim; ++j) {
            ((ggml_fp16_t *) tile)[j*TILE + cell] = ggml_fp32_to_fp16(values[j]);
        }
    } else {
        write_integers(values, n_dim, type, cell, tile);
    }
}
