#pragma once

#include "common.cuh"

void ggml_cuda_fasa_staged(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

bool ggml_cuda_fasa_staged_supported(int device, const ggml_tensor * op);
