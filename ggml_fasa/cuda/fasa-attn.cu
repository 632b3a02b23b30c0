// GGML_OP_FASA_ATTN on CUDA: one kernel. It works on many units at a time, a unit being a KV group of one query row, and a
// unit's blocks go through the stages together:
//
//   tip    : index -> scores of all cells, for each head; softmax sums
//   select : scores -> keys -> selected cells
//   fac    : attention over the selected cells
//
// Nothing is allocated but pool memory, the host never waits, and the order of every sum is fixed: valid inside CUDA graphs,
// and a run repeats bit by bit.

#include "fasa-cuda.cuh"

#include "fasa-fac.cuh"
#include "fasa-index-cache.cuh"
#include "fasa-select.cuh"
#include "fasa-staged.cuh"
#include "fasa-stages.cuh"
#include "fasa-tip.cuh"
#include "ggml-fasa-mapped.h"

#include <map>
#include <mutex>

namespace fasa {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_VOLTA
#define FASA_KERNEL_ARG const attn_args
#else
#define FASA_KERNEL_ARG const __grid_constant__ attn_args // functions that are not inlined take its address
#endif

// Stage index_cache for the cells that this step wrote K to and that are the block's, by one warp. written: [n_write] of shared
// memory, those cells, else -1. ids: of lane i that of cell i.
static __device__ __forceinline__ void write_cells(
        const attn_args & a, const unit & u, const held_dims<2> & held, uint32_t ids, int * written) {
    const int lane = threadIdx.x%WARP_SIZE;
#pragma unroll 1
    for (int i = 0; i < a.write.n_write; ++i) {
        const uint32_t id   = __shfl_sync(0xFFFFFFFFu, ids, i);
        const uint32_t s    = id/(uint32_t) a.write.n_cells;
        const uint32_t cell = id - s*(uint32_t) a.write.n_cells;
        const bool     mine = s == u.s + a.write_stream && cell/GGML_FASA_TILE%a.n_part == u.rank;
        if (lane == 0) {
            written[i] = mine ? (int) cell : -1;
        }
        if (mine) {
            const half * row = (const half *) (a.write.k + id*a.write.k_nb1 + u.g*a.write.k_head);
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                x[e] = lane + e*WARP_SIZE < a.n_dim ? __fsub_rn(__half2float(row[held.dim[e]]), held.center[e]) : 0.0f;
            }
            char * tile = a.write.index + s*a.index_nb3 + u.g*a.index_nb2 + (size_t) (cell/GGML_FASA_TILE)*a.tile_size;
            index_put(a.write, tile, cell%GGML_FASA_TILE, x, lane);
        }
    }
}

// Whether one of the cells t .. t + 3 was written, t a multiple of 4.
static __device__ __forceinline__ bool is_written(const attn_args & a, const int * written, int t) {
    bool is = false;
#pragma unroll 1
    for (int i = 0; i < a.write.n_write; ++i) {
        is = is || (written[i] & ~3) == t;
    }
    return is;
}

// By one thread of each block of a unit, at its end: whether it is the last one.
static __device__ __forceinline__ bool is_last(const attn_args & a, const unit & u) {
    if (a.n_part == 1) {
        return true;
    }
    unit_sync & sync = a.sync[u.at];
    if (atomicAdd(&sync.n_done, 1) < a.n_part - 1) {
        return false;
    }
    sync.n_done = 0;
    return true;
}

// grid: n_part blocks for each KV head and query row, those of a unit on the device together. NH: heads served at once.
template <int NH, int LANES, row_source ROWS>
__global__ void __launch_bounds__(FAC_THREAD, 1) fasa_attn(FASA_KERNEL_ARG a) {
    extern __shared__ float4 shared4[];
    __shared__ select_shared sh;

    stage_clock clock;
    clock.mark();

    const unit u(a);
    float * shared = (float *) shared4;

    // no kernel writes dims and ids, and the index but for few cells is older than the kernel before
    const char * plane = a.index + u.s*a.index_nb3 + u.g*a.index_nb2;
    tip_prefetch(a, u, plane, threadIdx.x/WARP_SIZE*(TIP_AHEAD/FAC_WARP), TIP_AHEAD/FAC_WARP);
    held_dims<2> dims;
    dims.load(a.dims, a.write.center, a.n_dim, u.g, threadIdx.x%WARP_SIZE);
    const uint32_t ids = threadIdx.x%WARP_SIZE < a.write.n_write ? a.write.cells[threadIdx.x%WARP_SIZE] : 0;
    ((uint4 *) sh.hist)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
        sh.n_own = sh.n_cand = sh.n_all = sh.bound = 0;
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    const size_t block = (size_t) u.at*a.n_part + u.rank;
    float   * score = a.score_len > 0 ? shared + a.at.score : a.score + block*a.n_group*a.n_run;
    int32_t * list  = a.list_len  > 0 ? (int32_t *) (shared + a.at.list) : a.list + block*a.budget;
    const uint32_t * key = (const uint32_t *) score;

    const char * mask = a.mask + u.s*a.mask_nb3 + u.t*a.mask_nb1;
    const int t = cell_of(a, u, first_cell(a));
    tip_held  first;
    const tip_q q = tip_load_q(a, u, dims.dim, shared + a.at.q, shared + a.at.tip, shared + a.at.score, [&] {
        first.load(a, plane, mask, t);
        if (a.write.n_write > 0 && threadIdx.x/WARP_SIZE == FAC_WARP - 1) {
            write_cells(a, u, dims, ids, sh.written);
        }
    });
    if (is_written(a, sh.written, t)) {
        first.load(a, plane, mask, t);
    }
    tip_scores<NH>(a, u, q, plane, mask, first, sh.sums, sh.softmax, score);
    clock.mark();
    row_cache cache;
    if constexpr (ROWS == ROWS_CACHED) {
        cache.open(a.rows, u.s, u.g, (uint32_t *) (shared + a.at.rows), a.list_len);
    }
    select_keys<NH>(a, u, sh, score);
    int  n     = -1;
    bool added = false; // whether counts were added up
    if (a.n_offer > 0) {
        n = select_by_offers(a, u, sh, key, list, [&](int n_listed) {
            if (threadIdx.x < min(n_listed, max(a.budget/a.n_part*3/2, WARP_SIZE))) { // many of them will be selected
                prefetch_cell(a, u, list[threadIdx.x]);
            }
        });
    }
    if (n < 0) {
        if (a.n_offer > 0) {
            select_recount(a, u, sh, key);
        }
        const select_state offered = select_offer(a, u, sh, key, list);
        n     = select_cells(a, u, sh, offered, key, list);
        added = a.n_part > 1;
    }
    if (a.n_part > 1 && threadIdx.x < a.n_group) { // all have read it
        put_word(letter_of(a, u, u.rank).softmax + threadIdx.x, 0);
    }
    clock.mark();
    if constexpr (ROWS == ROWS_CACHED) {
        cache.find(list, n);
    }
#pragma unroll 1
    for (int h = 0; h < a.n_group; h += NH) {
        const float * q_heads = shared + a.at.q + h*a.d_k;
        if constexpr (ROWS != ROWS_ANY && FASA_MMA) {
            fac_heads_f16<NH, LANES, ROWS>(a, u, q_heads, cache, h, list, n, shared + a.at.score);
        } else {
            fac_heads<NH, LANES, ROWS>(a, u, q_heads, cache, h, list, n, shared + a.at.score);
        }
    }
    __syncthreads();
    fac_merge(a, u, shared + a.at.score);
    clock.mark();
    clock.print(a);
    // none looks any more at what was there before the parts
    if (threadIdx.x < a.n_offer) {
        put_word(letter_of(a, u, u.rank).offers + threadIdx.x, 0);
    }
    if (a.n_offer > 0 && threadIdx.x == 0) {
        put_word(&letter_of(a, u, u.rank).bound, 0);
    }
    if (added) {
#pragma unroll 1
        for (int b = u.rank*FAC_THREAD + threadIdx.x; b < N_BIN; b += a.n_part*FAC_THREAD) {
            put_word(hist_of(a, u) + b, 0);
        }
        if (threadIdx.x == 0) {
            put_word(a.sync[u.at].turn + u.rank, 0);
        }
    }
    if constexpr (ROWS == ROWS_CACHED) {
        if (threadIdx.x == 0 && is_last(a, u)) {
            cache.turn();
        }
    }
}

using attn_kernel = void (*)(attn_args);

template <int NH, int LANES>
static attn_kernel pick_kernel(row_source rows) {
    switch (rows) {
        case ROWS_ANY: return fasa_attn<NH, LANES, ROWS_ANY>;
        case ROWS_F16: return fasa_attn<NH, LANES, ROWS_F16>;
        default:       return fasa_attn<NH, LANES, ROWS_CACHED>;
    }
}

template <int NH>
static attn_kernel pick_kernel(int lanes, row_source rows) {
    switch (lanes) {
        case 8:  return pick_kernel<NH, 8>(rows);
        case 16: return pick_kernel<NH, 16>(rows);
        default: return pick_kernel<NH, 32>(rows);
    }
}

static bool all_f16(const attn_args & a) {
    return a.k_type == GGML_TYPE_F16 && a.v_type == GGML_TYPE_F16;
}

static attn_kernel pick_kernel(const attn_args & a) {
    const int        lanes = fac_lanes(a);
    const row_source rows  = a.rows.state ? ROWS_CACHED : all_f16(a) ? ROWS_F16 : ROWS_ANY;
    switch (a.n_fac) {
        case 1:  return pick_kernel<1>(lanes, rows);
        case 2:  return pick_kernel<2>(lanes, rows);
        case 4:  return pick_kernel<4>(lanes, rows);
        default: return pick_kernel<8>(lanes, rows);
    }
}

// The row cache of an op that has one and can use it; else one without state.
static row_args rows_of(const attn_args & a, const ggml_tensor * state, const ggml_tensor * rows) {
    row_args r = {};
    if (state && all_f16(a) && a.n_row == 1) {
        r.state     = (char *) state->data;
        r.rows      = (char *) rows->data;
        r.state_nb2 = state->nb[2];
        r.state_nb3 = state->nb[3];
        r.rows_nb2  = rows->nb[2];
        r.rows_nb3  = rows->nb[3];
        r.n_rows    = (state->ne[0] - GGML_FASA_ROW_STATE)/2;
        r.d_k       = a.d_k;
        r.d_v       = a.d_v;
        r.n_slot    = 2;
        while (r.n_slot < 2*r.n_rows) {
            r.n_slot *= 2;
        }
    }
    return r;
}

static attn_layout layout_of(const attn_args & a) {
    const int tip = std::max(a.score_len*a.n_group, a.n_slot*a.d_k);
    const int fac = fac_shared(a);

    attn_layout l;
    l.q     = 0;
    l.tip   = l.q    + a.n_slot*a.d_k;
    l.list  = l.tip  + GGML_PAD(a.n_slot*(a.n_dim_pad + 2), 4);
    l.rows  = l.list + GGML_PAD(a.list_len, 4);
    l.score = l.rows + row_shared(a.rows, a.list_len);
    l.total = l.score + std::max(tip, fac);
    return l;
}

// Lays out the scratch of n_unit units from base on; returns its size in bytes.
static size_t set_scratch(attn_args & a, char * base, size_t n_unit) {
    size_t at = 0;
    auto take = [&](auto *& p, size_t n) {
        p   = (std::remove_reference_t<decltype(p)>) (base + at);
        at += (n_unit*n*sizeof(*p) + 255)/256*256;
    };
    take(a.sync,  a.n_part > 1 ? 0 : 1);
    take(a.cand,  (size_t) a.n_part*a.n_run);
    take(a.score, a.score_len > 0 ? 0 : (size_t) a.n_part*a.n_group*a.n_run);
    take(a.list,  a.list_len  > 0 ? 0 : (size_t) a.n_part*a.budget);
    take(a.part,  a.n_part > 1 ? 0 : (size_t) a.n_group*(a.d_v + 2));
    return at;
}

// Memory of a stream where blocks meet: for as many units of several blocks as fit on the device. It stays: a stream that comes
// later under the same handle takes it over.
static void set_meeting_place(attn_args & a, int device, cudaStream_t stream) {
    static std::mutex mutex;
    static std::map<std::pair<int, cudaStream_t>, block_letter *> places;

    const size_t n_block = ggml_cuda_info().devices[device].nsm;

    const std::lock_guard<std::mutex> lock(mutex);
    block_letter * & place = places[{ device, stream }];
    if (!place) {
        const size_t size = n_block*sizeof(block_letter) + n_block/2*(sizeof(unit_sync) + N_BIN*sizeof(uint32_t));
        CUDA_CHECK(cudaMalloc(&place, size));
        CUDA_CHECK(cudaMemsetAsync(place, 0, size, stream));
    }
    a.letters = place;
    a.sync    = (unit_sync *) (place + n_block);
    a.hist    = (uint32_t *) (a.sync + n_block/2);
}

static void run_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[GGML_FASA_SRC_Q];
    const ggml_tensor * k     = dst->src[GGML_FASA_SRC_K];
    const ggml_tensor * v     = dst->src[GGML_FASA_SRC_V];
    const ggml_tensor * mask  = dst->src[GGML_FASA_SRC_MASK];
    const ggml_tensor * sinks = dst->src[GGML_FASA_SRC_SINKS];
    const ggml_tensor * index = dst->src[GGML_FASA_SRC_INDEX];
    const ggml_tensor * dims  = dst->src[GGML_FASA_SRC_DIMS];
    const ggml_tensor * write = dst->src[GGML_FASA_SRC_WRITE];

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
    a.mask_four  = a.mask_f16 && k->ne[1]%4 == 0;
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
    a.budget    = std::min(ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_BUDGET), a.n_kv);

    if (write && index_write_joins(write)) {
        a.write        = index_write_of(write);
        a.write_stream = (a.index - a.write.index)/a.index_nb3;
    }

    a.n_fac     = a.n_group == 1 ? 1 : a.n_group == 2 ? 2 : a.n_group <= 4 ? 4 : 8;
    a.n_slot    = GGML_PAD(a.n_group, a.n_fac);
    a.n_dim_pad = GGML_PAD(a.n_dim, 8);
    a.n_word    = a.index_type == GGML_FASA_INDEX_Q4 ? a.n_dim_pad/8 : (a.n_dim + 3)/4;
    a.div_d_v   = init_fastdiv_values(a.d_v);

    // query rows of one launch: what a bounded scratch and a grid hold
    constexpr size_t MAX_SCRATCH = 256u << 20;
    const int n_row    = a.n_row*q->ne[3];
    const int n_tile   = (a.n_kv + GGML_FASA_TILE - 1)/GGML_FASA_TILE;
    const size_t size  = (size_t) n_tile*GGML_FASA_TILE*a.n_head_kv*(a.n_group + 3)*sizeof(float);
    const int per_pass = std::clamp<size_t>(MAX_SCRATCH/size, 1, std::min(n_row, 65535));

    // blocks of a unit: enough to fill the device, and since they wait for each other, not more than it holds
    const auto & info = ggml_cuda_info().devices[ctx.device];
    a.n_part = info.supports_cooperative_launch ?
        std::clamp(info.nsm/(per_pass*a.n_head_kv), 1, std::min(MAX_PART, n_tile)) : 1;
    a.part_log2 = 0;
    while (1 << a.part_log2 < a.n_part) {
        a.part_log2++;
    }
    a.n_run = (n_tile + a.n_part - 1)/a.n_part*GGML_FASA_TILE;

    const int rest = a.n_run%(4*FAC_THREAD);
    a.n_even   = a.n_run - (rest*a.n_group <= 4*FAC_THREAD ? rest : 0);
    a.div_rest = init_fastdiv_values(std::max(rest/4, 1));

    // a block that has twice its share of the selected cells still offers them all
    a.n_offer = a.n_part > 1 ? MIN_OFFER : 0;
    while (a.n_offer > 0 && a.n_offer*a.n_part < 2*a.budget) {
        a.n_offer *= 2;
    }
    if (a.n_offer > MAX_OFFER || a.n_offer*a.n_part > ALL_OFFER) {
        a.n_offer = 0;
    }

    a.row_size = ggml_fasa_buft_is_mapped(ggml_backend_buffer_get_type(k->buffer)) ? 0 :
        std::max(ggml_row_size(a.k_type, a.d_k), ggml_row_size(a.v_type, a.d_v));
    auto fits = [&] {
        a.at = layout_of(a);
        return a.at.total*sizeof(float) + sizeof(select_shared) <= info.smpbo;
    };
    a.score_len = a.n_run;
    a.list_len  = a.budget;
    a.rows      = rows_of(a, dst->src[GGML_FASA_SRC_ROW_STATE], dst->src[GGML_FASA_SRC_ROWS]);
    if (!fits()) {
        a.score_len = 0;
    }
    if (!fits()) {
        a.list_len = 0;
        a.rows     = {};
        a.at       = layout_of(a);
    }

    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), set_scratch(a, nullptr, (size_t) per_pass*a.n_head_kv));
    set_scratch(a, scratch.get(), (size_t) per_pass*a.n_head_kv);
    if (a.n_part > 1) {
        set_meeting_place(a, ctx.device, ctx.stream());
    }

    const attn_kernel kernel = pick_kernel(a);
    const size_t      shared = a.at.total*sizeof(float);
    for (a.row0 = 0; a.row0 < n_row; a.row0 += per_pass) {
        const unsigned n = std::min(per_pass, n_row - a.row0);
        launch(kernel, dim3(a.n_part, a.n_head_kv, n), dim3(FAC_THREAD), shared, ctx.stream(), a.n_part > 1, a);
    }
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
        case GGML_FASA_MODE_STAGED:
            ggml_cuda_fasa_staged(ctx, dst);
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
            return fasa::cache_type_supported(k->type) && d%8 == 0 && d <= 512 &&
                op->src[GGML_FASA_WRITE_SRC_DIMS]->ne[0] <= fasa::INDEX_DIM_MAX;
        }
        case GGML_FASA_MODE_ATTN: {
            const ggml_tensor * k = op->src[GGML_FASA_SRC_K];
            const ggml_tensor * v = op->src[GGML_FASA_SRC_V];
            const int64_t n_group = op->src[GGML_FASA_SRC_Q]->ne[2]/k->ne[2];
            return fasa::cache_type_supported(k->type) && fasa::cache_type_supported(v->type) &&
                k->ne[0]%8 == 0 && v->ne[0]%8 == 0 && k->ne[0] <= 256 && v->ne[0] <= 256 &&
                n_group <= fasa::MAX_GROUP && op->src[GGML_FASA_SRC_DIMS]->ne[0] <= fasa::INDEX_DIM_MAX;
        }
        case GGML_FASA_MODE_STAGED:
            return ggml_cuda_fasa_staged_supported(device, op);
        default:
            return false;
    }
}
