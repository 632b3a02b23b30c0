// Entry points of GGML_OP_FASA_ATTN for ggml-cuda.

#pragma once

#include "common.cuh"
#include "ggml-fasa-mapped.h"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

inline void ggml_cuda_fasa_attn(ggml_backend_cuda_context &, ggml_tensor *) {
    GGML_ABORT("FASA has no kernels for this backend");
}

inline bool ggml_cuda_fasa_supported(int, const ggml_tensor *) {
    return false;
}

#else

void ggml_cuda_fasa_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Whether the device runs the op: modes attn and index_write, every index type, K and V of the types of ggml-fasa.h.
bool ggml_cuda_fasa_supported(int device, const ggml_tensor * op);

#endif
