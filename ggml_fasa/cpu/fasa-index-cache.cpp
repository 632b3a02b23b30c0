// Stage index_cache on the CPU: copies the dominant dims of K rows into the tiled index.

#include "ggml-fasa-cpu.h"
#include "ggml-fasa.h"

void ggml_fasa_cpu_index_write(
        const ggml_fp16_t * k, const int32_t * dims, int64_t n_dim, int64_t cell, ggml_fp16_t * index) {
    ggml_fp16_t * dst = index + (cell/GGML_FASA_TILE)*n_dim*GGML_FASA_TILE + cell % GGML_FASA_TILE;

    for (int64_t j = 0; j < n_dim; ++j) {
        dst[j*GGML_FASA_TILE] = k[dims[j]];
    }
}
