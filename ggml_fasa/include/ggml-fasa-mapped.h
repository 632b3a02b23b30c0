// Host memory that a device reads and writes in place: where FASA-M keeps K and V.

#pragma once

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// The buffer type of pinned host memory mapped into dev; NULL if dev's backend has none (only CUDA does). Each device has its
// own, so that the scheduler gives ops on it to that device, whose stream orders them. An allocation that cannot be pinned
// fails, with one sentence in the log; pageable memory is never used instead.
GGML_API ggml_backend_buffer_type_t ggml_fasa_mapped_buffer_type(ggml_backend_dev_t dev);

// Whether buft is what ggml_fasa_mapped_buffer_type returns, for any device.
GGML_API bool ggml_fasa_buft_is_mapped(ggml_backend_buffer_type_t buft);

// Whether buft is what ggml_fasa_mapped_buffer_type(dev) returns.
GGML_API bool ggml_fasa_buft_is_mapped_into(ggml_backend_buffer_type_t buft, ggml_backend_dev_t dev);

#ifdef __cplusplus
}
#endif
