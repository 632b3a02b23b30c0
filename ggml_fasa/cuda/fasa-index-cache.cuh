// Stage index_cache on CUDA: puts the dominant dims of K rows into the tiled index. See ggml-fasa.h for its layout.

#pragma once

#include "common.cuh"

void ggml_cuda_fasa_index_write(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
