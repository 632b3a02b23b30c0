// Kernel launches.

#pragma once

#include "common.cuh"

namespace fasa {

// Dynamic shared memory beyond this must be asked for: what the hardware gives unasked, less the static memory of kernels.
constexpr size_t SHARED_DEFAULT = 32*1024;

// Launches with an early start beside the tail of the kernel before, where the device has that: the kernel must call
// ggml_cuda_pdl_sync before it touches what another kernel writes. shared: bytes of dynamic shared memory. together: all
// blocks are on the device at once, or the launch fails.
template <typename Args>
void launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, bool together, Args args) {
    if (shared > SHARED_DEFAULT) {
        CUDA_CHECK(cudaFuncSetAttribute((const void *) kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) shared));
    }
#if defined(GGML_CUDA_USE_PDL)
    cudaLaunchAttribute attrs[2] = {};
    unsigned n_attr = 0;
    if (ggml_cuda_kernel_can_use_pdl((const void *) kernel)) {
        attrs[n_attr].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attrs[n_attr].val.programmaticStreamSerializationAllowed = 1;
        n_attr++;
    }
    if (together) {
        attrs[n_attr].id = cudaLaunchAttributeCooperative;
        attrs[n_attr].val.cooperative = 1;
        n_attr++;
    }

    cudaLaunchConfig_t config = {};
    config.gridDim          = grid;
    config.blockDim         = block;
    config.dynamicSmemBytes = shared;
    config.stream           = stream;
    config.attrs            = attrs;
    config.numAttrs         = n_attr;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
#else
    void * params[] = { &args };
    if (together) {
        CUDA_CHECK(cudaLaunchCooperativeKernel((const void *) kernel, grid, block, params, shared, stream));
    } else {
        CUDA_CHECK(cudaLaunchKernel((const void *) kernel, grid, block, params, shared, stream));
    }
#endif
}

} // namespace fasa
