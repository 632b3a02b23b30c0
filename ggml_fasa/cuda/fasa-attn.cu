// GGML_OP_FASA_ATTN on CUDA: tip -> select -> fac in one kernel.
//
// A team of thread blocks serves one unit, a KV group of one query row, and its blocks wait for each other four times:
//
//   score the block's cells -> | softmax over all cells, keys, histogram -> | what is certainly selected, and what may be ->
//   | the block's share of the selected cells, attention over it -> | merge
//
// Weights and keys of cells stay in the block's shared memory where they fit, so that the index is read once and nothing
// else grows with n_kv. Nothing is allocated but pool memory, and the host never waits: valid inside CUDA graphs.

#include "fasa-cuda.cuh"

#include "fasa-fac.cuh"
#include "fasa-index-cache.cuh"
#include "fasa-select.cuh"
#include "fasa-stages.cuh"
#include "fasa-tip.cuh"

#include <mutex>
#include <unordered_map>

#ifdef FASA_CUDA_TRACE // clock cycles at the borders of the stages, of one block
__device__ long long fasa_trace[16];
#define FASA_TRACE(i) if (blockIdx.x == 5 && threadIdx.x == 0) { fasa_trace[i] = clock64(); }
#define FASA_TRACE_PRINT() if (blockIdx.x == 5 && threadIdx.x == 0) { \
    printf("trace n_kv %d type %d b %d team %d sync %d grid %d:", a.n_kv, a.index_type, a.budget, a.n_team, a.sync, gridDim.x); \
    for (int i = 1; i < 11; ++i) printf(" %lld", fasa_trace[i] - fasa_trace[i - 1]); printf("\n"); }
#else
#define FASA_TRACE(i)
#define FASA_TRACE_PRINT()
#endif

namespace fasa {

// Heads that fac serves at once: what the registers hold.
static __host__ __device__ constexpr int n_fac(int n_head, int parts) {
    return n_head*parts > 8 ? 8/parts : n_head;
}

// NH: heads that tip scores at once. PARTS: 128ths of a K or V row, rounded up.
template <int NH, int PARTS, bool F16>
__global__ void __launch_bounds__(N_THREAD, 1) fasa_attn(const attn_args a) {
    extern __shared__ float4 shared4[];
    float * shared = (float *) shared4;

    const team_layout  at(a);
    const block_layout in(a);

    const int team   = blockIdx.x/a.n_team;
    const int rank   = blockIdx.x%a.n_team;
    const int n_team = gridDim.x/a.n_team;
    const int cell0  = rank*a.n_cell;

    char     * scratch   = a.scratch + team*a.team_stride;
    float2   * softmax   = (float2 *)   (scratch + at.softmax);
    uint32_t * team_hist = (uint32_t *) (scratch + at.hist);
    uint32_t * count     = (uint32_t *) (scratch + at.count);
    int32_t  * sure      = (int32_t *)  (scratch + at.sure);
    uint32_t * cand_key  = (uint32_t *) (scratch + at.cand_key);
    int32_t  * cand_cell = (int32_t *)  (scratch + at.cand_cell);
    int32_t  * sel       = (int32_t *)  (scratch + at.sel);
    float    * part      = (float *)    (scratch + at.part);

    float    * q_rows = shared + in.q;
    float    * head   = shared + in.head;
    uint32_t * hist   = (uint32_t *) (shared + in.hist);
    uint32_t * small  = (uint32_t *) (shared + in.small);
    float    * block  = shared + in.block;
    float    * weight = a.w_shared ? block : (float *) (scratch + at.weight) + (size_t) rank*a.n_cell*a.n_group;

    select_shared sh;
    sh.sure   = small;
    sh.cand   = sh.sure + MAX_TEAM + 2;
    sh.warps  = sh.cand + MAX_TEAM + 2;
    sh.result = (int *) (sh.warps + N_WARP);

    tip_prefetch(a, unit(a, min(team, a.n_unit - 1)), cell0);
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc(); // what follows waits for this kernel's end before it reads
    FASA_TRACE(0);

    // all teams take equally many turns, since they may have to wait together
    for (int first = 0; first < a.n_unit; first += n_team) {
        const bool busy = first + team < a.n_unit;
        const unit u(a, busy ? first + team : 0);

        if (busy) {
            const tip_q q = tip_load_q(a, u, q_rows, shared + in.q_tip, head);
            tip_score<NH>(a, u, q, cell0, weight, softmax + rank*a.n_group, (float *) hist, (int *) hist + N_WARP*NH);
            for (int b = rank*N_THREAD + threadIdx.x; b < N_BIN; b += a.n_team*N_THREAD) {
                __stcg(team_hist + b, 0);
            }
        }
        FASA_TRACE(1);
        team_wait(a.sync);
        FASA_TRACE(2);
        if (busy) {
            tip_combine(a, rank, weight, softmax, head + 2*a.n_slot, hist);
            select_count(hist, team_hist);
        }
        FASA_TRACE(3);
        team_wait(a.sync);
        FASA_TRACE(4);
        int bin = -1;
        if (busy) {
            bin = select_filter(a, team_hist, (const uint32_t *) weight, cell0, sh, sure + (size_t) rank*a.budget,
                    cand_key + (size_t) rank*a.n_cell, cand_cell + (size_t) rank*a.n_cell, count + 2*rank);
        }
        FASA_TRACE(5);
        team_wait(a.sync);
        FASA_TRACE(6);
        if (busy) {
            const int2 r = select_share(a, rank, bin, count, sure, cand_key, cand_cell, sh, hist, sel);
            FASA_TRACE(7);
            for (int h = 0; h < a.n_group; h += n_fac(NH, PARTS)) {
                fac_heads<n_fac(NH, PARTS), PARTS, PARTS, F16>(a, u, q_rows, h, sel + r.x, r.y - r.x, block,
                        part + (size_t) rank*a.n_group*(a.d_v + 2));
            }
        }
        FASA_TRACE(8);
        team_wait(a.sync);
        FASA_TRACE(9);
        if (busy) {
            fac_merge(a, u, rank, part, (float *) hist);
        }
    }
    FASA_TRACE(10);
    FASA_TRACE_PRINT();
}

using attn_kernel = void (*)(attn_args);

template <int NH>
static attn_kernel pick_kernel(int parts, bool f16) {
    if (parts == 1) {
        return f16 ? fasa_attn<NH, 1, true> : fasa_attn<NH, 1, false>;
    }
    return f16 ? fasa_attn<NH, 2, true> : fasa_attn<NH, 2, false>;
}

static attn_kernel pick_kernel(const attn_args & a, int n_head, int parts) {
    const bool f16 = a.k_type == GGML_TYPE_F16 && a.v_type == GGML_TYPE_F16;
    switch (n_head) {
        case 1:  return pick_kernel<1>(parts, f16);
        case 2:  return pick_kernel<2>(parts, f16);
        case 4:  return pick_kernel<4>(parts, f16);
        default: return pick_kernel<8>(parts, f16);
    }
}

// How many teams of a size the device holds at once. Asked of the driver once for each shape of launch.
static int max_teams(int device, attn_kernel kernel, team_sync sync, int n_team, size_t shared) {
    struct key_hash {
        size_t operator()(const std::array<size_t, 5> & k) const {
            size_t h = 0;
            for (size_t x : k) {
                h = h*0x9E3779B97F4A7C15ull + x;
            }
            return h;
        }
    };
    static std::mutex mutex;
    static std::unordered_map<std::array<size_t, 5>, int, key_hash> known;

    const std::array<size_t, 5> key = { (size_t) device, (size_t) kernel, (size_t) sync, (size_t) n_team, shared };
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = known.find(key);
    if (it != known.end()) {
        return it->second;
    }

    CUDA_CHECK(cudaFuncSetAttribute((const void *) kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                (int) ggml_cuda_info().devices[device].smpbo));

    int n = 0;
#if defined(GGML_CUDA_USE_PDL)
    if (sync == TEAM_CLUSTER) {
        if (n_team > 8) { // more than every device with clusters has
            CUDA_CHECK(cudaFuncSetAttribute((const void *) kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        }
        cudaLaunchAttribute attr = {};
        attr.id = cudaLaunchAttributeClusterDimension;
        attr.val.clusterDim = { (unsigned) n_team, 1, 1 };
        cudaLaunchConfig_t config = {};
        config.gridDim          = dim3(n_team);
        config.blockDim         = dim3(N_THREAD);
        config.dynamicSmemBytes = shared;
        config.attrs            = &attr;
        config.numAttrs         = 1;
        if (cudaOccupancyMaxActiveClusters(&n, (const void *) kernel, &config) != cudaSuccess) {
            (void) cudaGetLastError();
            n = 0;
        }
    } else
#endif
    {
        int per_sm = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, (const void *) kernel, N_THREAD, shared));
        n = per_sm*ggml_cuda_info().devices[device].nsm/n_team;
    }
    known[key] = n;
    return n;
}

// The split of the cells over n_team blocks, and whether their weights stay in shared memory.
static void set_team(attn_args & a, team_sync sync, int n_team, size_t max_shared) {
    a.sync     = sync;
    a.n_team   = n_team;
    a.n_cell   = GGML_PAD((a.n_kv + n_team - 1)/n_team, BAND);
    a.w_shared = true;
    a.w_shared = block_layout(a).total*sizeof(float) <= max_shared;
}

// Chooses the team size; returns how many teams to launch.
static int plan_teams(attn_args & a, attn_kernel kernel, int device) {
    const auto & info = ggml_cuda_info().devices[device];

    // The time that a plan takes, in cells scored: every turn of the teams has a fixed part, which waiting makes larger, a
    // part that goes with the cells of a block, more if their weights lie in global memory, and one that goes with the cells
    // it attends to.
    int64_t   best_cost  = INT64_MAX;
    team_sync best_sync  = TEAM_ALONE;
    int       best_size  = 0;
    int       best_teams = 0;
    auto consider = [&](team_sync sync, int size, int64_t fixed) {
        set_team(a, sync, size, info.smpbo);
        const int n = std::min(a.n_unit, max_teams(device, kernel, sync, size, block_layout(a).total*sizeof(float)));
        if (n == 0) {
            return;
        }
        const int64_t turns = (a.n_unit + n - 1)/n;
        const int64_t cost  = turns*(fixed + (int64_t) a.n_cell*(a.w_shared ? 1 : 2) + 20*(int64_t) a.budget/size);
        if (cost < best_cost) {
            best_cost  = cost;
            best_sync  = sync;
            best_size  = size;
            best_teams = n;
        }
    };

    consider(TEAM_ALONE, 1, 3000);
#if defined(GGML_CUDA_USE_PDL)
    if (info.cc >= GGML_CUDA_CC_HOPPER && ggml_cuda_kernel_can_use_pdl((const void *) kernel)) {
        for (int size = 2; size <= 16; ++size) {
            consider(TEAM_CLUSTER, size, 4000);
        }
    }
#endif
    if (info.supports_cooperative_launch) {
        const int size = std::min(MAX_TEAM, info.nsm/std::max(1, a.n_unit));
        if (size > 1) {
            consider(TEAM_GRID, size, 12000);
        }
    }
    GGML_ASSERT(best_size > 0);
    set_team(a, best_sync, best_size, info.smpbo);
    return best_teams;
}

static void run_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[GGML_FASA_SRC_Q];
    const ggml_tensor * k     = dst->src[GGML_FASA_SRC_K];
    const ggml_tensor * v     = dst->src[GGML_FASA_SRC_V];
    const ggml_tensor * mask  = dst->src[GGML_FASA_SRC_MASK];
    const ggml_tensor * sinks = dst->src[GGML_FASA_SRC_SINKS];
    const ggml_tensor * index = dst->src[GGML_FASA_SRC_INDEX];
    const ggml_tensor * dims  = dst->src[GGML_FASA_SRC_DIMS];

    attn_args a = {};
    a.q     = (const char *)    q->data;
    a.k     = (const char *)    k->data;
    a.v     = (const char *)    v->data;
    a.mask  = (const char *)    mask->data;
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    a.index = (const char *)    index->data;
    a.dims  = (const int32_t *) dims->data;
    a.dst   = (float *)         dst->data;

    a.q_nb1 = q->nb[1]; a.q_nb2 = q->nb[2]; a.q_nb3 = q->nb[3];
    a.k_nb1 = k->nb[1]; a.k_nb2 = k->nb[2]; a.k_nb3 = k->nb[3];
    a.v_nb1 = v->nb[1]; a.v_nb2 = v->nb[2]; a.v_nb3 = v->nb[3];
    a.mask_nb1  = mask->nb[1];  a.mask_nb3  = mask->nb[3];
    a.index_nb2 = index->nb[2]; a.index_nb3 = index->nb[3];

    a.k_type     = k->type;
    a.v_type     = v->type;
    a.mask_f16   = mask->type == GGML_TYPE_F16;
    a.index_type = ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_INDEX_TYPE);
    a.tile_size  = index->nb[1];
    a.hadamard   = ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_HADAMARD);
    a.scale      = ggml_get_op_params_f32(dst, GGML_FASA_OP_PARAM_SCALE);
    a.softcap    = ggml_get_op_params_f32(dst, GGML_FASA_OP_PARAM_SOFTCAP);

    a.n_kv      = k->ne[1];
    a.n_row     = q->ne[1];
    a.n_head_kv = k->ne[2];
    a.n_group   = q->ne[2]/k->ne[2];
    a.d_k       = k->ne[0];
    a.d_v       = v->ne[0];
    a.n_dim     = dims->ne[0];
    a.n_unit    = a.n_row*a.n_head_kv*q->ne[3];
    a.budget    = std::min(ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_BUDGET), a.n_kv);

    const int n_head = a.n_group == 1 ? 1 : a.n_group == 2 ? 2 : a.n_group <= 4 ? 4 : 8;
    const int parts  = (std::max(a.d_k, a.d_v) + 127)/128;
    a.n_slot = GGML_PAD(a.n_group, n_head);
    a.n_fac  = n_fac(n_head, parts);

    const attn_kernel kernel = pick_kernel(a, n_head, parts);
    const int n_teams = plan_teams(a, kernel, ctx.device);

    a.team_stride = team_layout(a).total;
    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), n_teams*a.team_stride);
    a.scratch = scratch.get();

    launch(kernel, dim3(n_teams*a.n_team), dim3(N_THREAD), block_layout(a).total*sizeof(float), ctx.stream(), a.sync, a.n_team, a);
}

} // namespace fasa

void ggml_cuda_fasa_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_MODE)) {
        case GGML_FASA_MODE_ATTN:
            fasa::run_attn(ctx, dst);
            break;
        case GGML_FASA_MODE_INDEX_WRITE:
            ggml_cuda_fasa_index_write(ctx, dst);
            break;
        default:
            GGML_ABORT("FASA mode not on CUDA");
    }
}

bool ggml_cuda_fasa_supported(int device, const ggml_tensor * op) {
    if (ggml_cuda_info().devices[device].cc < GGML_CUDA_CC_VOLTA) {
        return false;
    }
    switch (ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_MODE)) {
        case GGML_FASA_MODE_INDEX_WRITE: {
            const ggml_tensor * k = op->src[GGML_FASA_WRITE_SRC_K];
            const int64_t       d = k->ne[0]/op->src[GGML_FASA_WRITE_SRC_DIMS]->ne[1];
            return fasa::cache_type_supported(k->type) && d%8 == 0 && d <= 512;
        }
        case GGML_FASA_MODE_ATTN: {
            const ggml_tensor * k = op->src[GGML_FASA_SRC_K];
            const ggml_tensor * v = op->src[GGML_FASA_SRC_V];
            const int64_t n_group = op->src[GGML_FASA_SRC_Q]->ne[2]/k->ne[2];
            return fasa::cache_type_supported(k->type) && fasa::cache_type_supported(v->type) &&
                k->ne[0]%8 == 0 && v->ne[0]%8 == 0 && k->ne[0] <= 256 && v->ne[0] <= 256 &&
                n_group <= 16 && op->src[GGML_FASA_SRC_DIMS]->ne[0] <= 256;
        }
        default:
            return false;
    }
}
