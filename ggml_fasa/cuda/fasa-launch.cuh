// Kernel launches, and teams: groups of thread blocks that work on the same rows and wait for each other.

#pragma once

#include "common.cuh"

#include <cooperative_groups.h>

namespace fasa {

enum team_sync {
    TEAM_ALONE,   // a team is one block
    TEAM_CLUSTER, // a team is a thread block cluster (compute capability 9.0 and newer)
    TEAM_GRID,    // all teams wait together, in a cooperative launch
};

// Waits for the team; what its blocks wrote to global memory is visible afterwards, to loads that bypass L1 (__ldcg).
// All threads of all blocks must call it equally often.
static __device__ __forceinline__ void team_wait(team_sync sync) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    if (sync == TEAM_CLUSTER) {
        cooperative_groups::this_cluster().sync();
        return;
    }
#endif
    if (sync == TEAM_GRID) {
        cooperative_groups::this_grid().sync();
        return;
    }
    __syncthreads();
}

// Launches with what the device has: clusters of n_team blocks, or all blocks at once, and an early start beside the
// tail of the kernel before (the kernel must call ggml_cuda_pdl_sync before it reads or writes memory).
template <typename Args>
void launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, team_sync sync, int n_team, Args args) {
#if defined(GGML_CUDA_USE_PDL)
    cudaLaunchAttribute attrs[2] = {};
    int n_attr = 0;
    if (sync == TEAM_CLUSTER) {
        attrs[n_attr].id = cudaLaunchAttributeClusterDimension;
        attrs[n_attr].val.clusterDim = { (unsigned) n_team, 1, 1 };
        n_attr++;
    }
    if (sync == TEAM_GRID) {
        attrs[n_attr].id = cudaLaunchAttributeCooperative;
        attrs[n_attr].val.cooperative = 1;
        n_attr++;
    } else if (ggml_cuda_kernel_can_use_pdl((const void *) kernel)) {
        attrs[n_attr].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attrs[n_attr].val.programmaticStreamSerializationAllowed = 1;
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
    if (sync == TEAM_GRID) {
        CUDA_CHECK(cudaLaunchCooperativeKernel((const void *) kernel, grid, block, params, shared, stream));
    } else {
        CUDA_CHECK(cudaLaunchKernel((const void *) kernel, grid, block, params, shared, stream));
    }
    GGML_UNUSED(n_team);
#endif
}

} // namespace fasa
