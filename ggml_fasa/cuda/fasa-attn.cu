// GGML_OP_FASA_ATTN on CUDA: a kernel of tip, then one of select and fac.
//
// Both work on many units at a time, a unit being a KV group of one query row:
//
//   tip         : index -> scores of all cells, for each head; softmax sums
//   select, fac : scores -> keys -> selected cells -> attention over them
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

namespace fasa {

using attn_kernel = void (*)(attn_args);

template <int NH>
static attn_kernel pick_tip(int index_type) {
    switch (index_type) {
        case GGML_FASA_INDEX_F16: return fasa_tip<NH, GGML_FASA_INDEX_F16>;
        case GGML_FASA_INDEX_Q8:  return fasa_tip<NH, GGML_FASA_INDEX_Q8>;
        default:                  return fasa_tip<NH, GGML_FASA_INDEX_Q4>;
    }
}

static attn_kernel pick_tip(int n_head, int index_type) {
    switch (n_head) {
        case 1:  return pick_tip<1>(index_type);
        case 2:  return pick_tip<2>(index_type);
        case 4:  return pick_tip<4>(index_type);
        default: return pick_tip<8>(index_type);
    }
}

template <int NH, int LANES>
static attn_kernel pick_fac(row_source rows) {
    switch (rows) {
        case ROWS_ANY: return fasa_select_fac<NH, LANES, ROWS_ANY>;
        case ROWS_F16: return fasa_select_fac<NH, LANES, ROWS_F16>;
        default:       return fasa_select_fac<NH, LANES, ROWS_CACHED>;
    }
}

template <int NH>
static attn_kernel pick_fac(int d, row_source rows) {
    return d <= 64 ? pick_fac<NH, 8>(rows) : d <= 128 ? pick_fac<NH, 16>(rows) : pick_fac<NH, 32>(rows);
}

static bool all_f16(const attn_args & a) {
    return a.k_type == GGML_TYPE_F16 && a.v_type == GGML_TYPE_F16;
}

static attn_kernel pick_fac(const attn_args & a) {
    const int        d    = std::max(a.d_k, a.d_v);
    const row_source rows = a.rows.state ? ROWS_CACHED : all_f16(a) ? ROWS_F16 : ROWS_ANY;
    switch (a.n_fac) {
        case 1:  return pick_fac<1>(d, rows);
        case 2:  return pick_fac<2>(d, rows);
        case 4:  return pick_fac<4>(d, rows);
        default: return pick_fac<8>(d, rows);
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

// Lays out the scratch of n_unit units from base on; returns its size in bytes.
static size_t set_scratch(attn_args & a, char * base, size_t n_unit) {
    size_t at = 0;
    auto take = [&](auto *& p, size_t n) {
        p   = (std::remove_reference_t<decltype(p)>) (base + at);
        at += (n_unit*n*sizeof(*p) + 255)/256*256;
    };
    take(a.score,   (size_t) a.n_group*a.n_pad);
    take(a.softmax, (size_t) a.n_scan*a.n_group);
    take(a.hist,    N_BIN);
    take(a.sync,    1);
    take(a.cand,    (size_t) a.n_part*a.n_run);
    take(a.key,     a.key_len  > 0 ? 0 : (size_t) a.n_part*a.n_run);
    take(a.list,    a.list_len > 0 ? 0 : (size_t) a.n_part*a.budget);
    take(a.part,    (size_t) a.n_part*a.n_group*(a.d_v + 2));
    return at;
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
    a.budget    = std::min(ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_BUDGET), a.n_kv);

    a.n_fac  = a.n_group == 1 ? 1 : a.n_group == 2 ? 2 : a.n_group <= 4 ? 4 : 8;
    a.n_slot = GGML_PAD(a.n_group, a.n_fac);
    a.n_pad  = GGML_PAD(a.n_kv, BAND);

    // units of one launch: what a bounded scratch and a grid hold
    constexpr size_t MAX_SCRATCH = 256u << 20;
    const int n_unit   = a.n_row*a.n_head_kv*q->ne[3];
    const int per_pass = std::clamp<size_t>(MAX_SCRATCH/(4*(size_t) a.n_pad*(a.n_group + 3)), 1, std::min(n_unit, 65535));

    // blocks for a unit: enough to fill the device, and for select and fac, which wait for each other, not more than it holds
    const auto & info = ggml_cuda_info().devices[ctx.device];
    const int n_band = a.n_pad/BAND;
    a.n_scan = std::clamp(3*info.nsm/per_pass, 1, (n_band + TIP_WARP - 1)/TIP_WARP);
    a.n_part = info.supports_cooperative_launch ? std::clamp(info.nsm/per_pass, 1, std::min(MAX_PART, n_band)) : 1;
    a.share  = SHARE;
    a.n_run  = (((a.n_pad - 1) >> a.share)/a.n_part + 1) << a.share;

    a.row_size = ggml_fasa_buft_is_mapped(ggml_backend_buffer_get_type(k->buffer)) ? 0 :
        std::max(ggml_row_size(a.k_type, a.d_k), ggml_row_size(a.v_type, a.d_v));
    auto fits = [&] { return fac_layout(a).total*sizeof(float) + sizeof(select_shared) + 64 <= info.smpbo; };
    a.key_len  = a.n_run;
    a.list_len = a.budget;
    a.rows     = rows_of(a, dst->src[GGML_FASA_SRC_ROW_STATE], dst->src[GGML_FASA_SRC_ROWS]);
    if (!fits()) {
        a.key_len = 0;
    }
    if (!fits()) {
        a.list_len = 0;
        a.rows     = {};
    }

    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), set_scratch(a, nullptr, per_pass));
    set_scratch(a, scratch.get(), per_pass);

    const attn_kernel tip = pick_tip(a.n_fac, a.index_type);
    const attn_kernel fac = pick_fac(a);
    const size_t tip_size = tip_shared(a)*sizeof(float);
    const size_t fac_size = fac_layout(a).total*sizeof(float);

    for (a.unit0 = 0; a.unit0 < n_unit; a.unit0 += per_pass) {
        const unsigned n = std::min(per_pass, n_unit - a.unit0);
        launch(tip, dim3(a.n_scan, n), dim3(TIP_WARP*WARP_SIZE), tip_size, ctx.stream(), false,        a);
        launch(fac, dim3(a.n_part, n), dim3(FAC_THREAD),         fac_size, ctx.stream(), a.n_part > 1, a);
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
        case GGML_FASA_MODE_STAGED:
            return ggml_cuda_fasa_staged_supported(device, op);
        default:
            return false;
    }
}
