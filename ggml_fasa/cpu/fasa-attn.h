// Entry points of GGML_OP_FASA_ATTN for ggml-cpu.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void   ggml_compute_forward_fasa_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_fasa_cpu_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}
#endif
