// GGML_OP_FASA_ATTN on the CPU: runs the stages index_cache, or tip -> select -> fac, over the threads of the graph.

#include "fasa-attn.h"

#include "fasa-stages.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <atomic>

static std::atomic<uint64_t> fasa_n_attn        { 0 };
static std::atomic<uint64_t> fasa_n_index_write { 0 };

uint64_t ggml_fasa_cpu_n_attn(void) {
    return fasa_n_attn;
}

uint64_t ggml_fasa_cpu_n_index_write(void) {
    return fasa_n_index_write;
}

namespace {

// The op's tensors and sizes, read once.
struct attn_op {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * index;
    const ggml_tensor * dims;
    const ggml_tensor * dst;

    int64_t d_k, d_v, n_kv, n_row, n_stream, n_head, n_head_kv, n_group, n_dim, n_sel, stride;
    float   scale, softcap;

    explicit attn_op(const ggml_tensor * op) :
        q    (op->src[GGML_FASA_SRC_Q]),
        k    (op->src[GGML_FASA_SRC_K]),
        v    (op->src[GGML_FASA_SRC_V]),
        mask (op->src[GGML_FASA_SRC_MASK]),
        sinks(op->src[GGML_FASA_SRC_SINKS]),
        index(op->src[GGML_FASA_SRC_INDEX]),
        dims (op->src[GGML_FASA_SRC_DIMS]),
        dst  (op) {
        d_k       = k->ne[0];
        d_v       = v->ne[0];
        n_kv      = k->ne[1];
        n_row     = q->ne[1];
        n_stream  = q->ne[3];
        n_head    = q->ne[2];
        n_head_kv = k->ne[2];
        n_group   = n_head/n_head_kv;
        n_dim     = dims->ne[0];
        n_sel     = std::min<int64_t>(ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_BUDGET), n_kv);
        stride    = GGML_PAD(n_kv, GGML_FASA_TILE);
        scale     = ggml_get_op_params_f32(op, GGML_FASA_OP_PARAM_SCALE);
        softcap   = ggml_get_op_params_f32(op, GGML_FASA_OP_PARAM_SOFTCAP);
    }

    const float * q_row(int64_t h, int64_t t, int64_t s) const {
        return (const float *) ((const char *) q->data + t*q->nb[1] + h*q->nb[2] + s*q->nb[3]);
    }
    int64_t q_stride() const {
        return q->nb[2]/sizeof(float);
    }
    const void * k_head(int64_t g, int64_t s) const {
        return (const char *) k->data + g*k->nb[2] + s*k->nb[3];
    }
    const void * v_head(int64_t g, int64_t s) const {
        return (const char *) v->data + g*v->nb[2] + s*v->nb[3];
    }
    const ggml_fp16_t * index_head(int64_t g, int64_t s) const {
        return (const ggml_fp16_t *) ((const char *) index->data + g*index->nb[2] + s*index->nb[3]);
    }
    fasa::mask_row mask_at(int64_t t, int64_t s) const {
        return { (const char *) mask->data + t*mask->nb[1] + s*mask->nb[3], mask->type == GGML_TYPE_F16 };
    }
    const float * sink_of(int64_t h) const {
        return sinks ? (const float *) sinks->data + h : nullptr;
    }
    float * out(int64_t h, int64_t t, int64_t s) const {
        return (float *) ((char *) dst->data + h*dst->nb[1] + t*dst->nb[2] + s*dst->nb[3]);
    }

    // the dominant dims of the group's queries, times scale: [n_group][n_dim]
    void gather_q(int64_t g, int64_t t, int64_t s, float * q_tip) const {
        const int32_t * dim = (const int32_t *) dims->data + g*n_dim;
        for (int64_t h = 0; h < n_group; ++h) {
            const float * qh = q_row(g*n_group + h, t, s);
            for (int64_t j = 0; j < n_dim; ++j) {
                q_tip[h*n_dim + j] = qh[dim[j]]*scale;
            }
        }
    }
};

// Threads that work on the same rows. A team of one never waits.
struct team {
    int                         ith;
    int                         nth;
    const ggml_compute_params * params;

    void wait() const {
        if (nth > 1) {
            ggml_barrier(params->threadpool);
        }
    }
    // this thread's part of n items
    int64_t first(int64_t n) const { return n* ith     /nth; }
    int64_t last (int64_t n) const { return n*(ith + 1)/nth; }
};

// Scratch of a team for the groups of one row, in floats from its start.
struct row_scratch {
    size_t q_tip, weight, peak, sum, scores, cells, n_cells, part, logits, total;

    row_scratch(const attn_op & op, int64_t n_groups, int nth) {
        const size_t n_head = n_groups*op.n_group;
        size_t at = 0;
        auto take = [&at](size_t n) { const size_t was = at; at += GGML_PAD(n, 16); return was; };

        q_tip   = take(n_head*op.n_dim*nth); // a copy for each thread: cheaper than a barrier
        weight  = take(n_head*op.stride);
        peak    = take(n_head*fasa::n_tip_chunk(op.n_kv));
        sum     = take(n_head*fasa::n_tip_chunk(op.n_kv));
        scores  = take(n_groups*op.stride);
        cells   = take(n_groups*op.n_sel);
        n_cells = take(n_groups);
        part    = take(n_head*fasa::n_fac_chunk(op.n_sel)*(op.d_v + 2));
        logits  = take(op.n_group*fasa::FAC_CHUNK*nth);
        total   = at;
    }
};

// tip -> select -> fac for groups [g0, g0 + n_groups) of one row, by a team.
void attn_row(const attn_op & op, int64_t t, int64_t s, int64_t g0, int64_t n_groups, float * scratch, const team & team) {
    const row_scratch at(op, n_groups, team.nth);

    const int64_t R         = op.n_group;
    const int64_t tip_chunk = fasa::n_tip_chunk(op.n_kv);
    const int64_t fac_chunk = fasa::n_fac_chunk(op.n_sel);
    const size_t  part_size = R*fac_chunk*(op.d_v + 2);

    float   * q_tip   = scratch + at.q_tip + team.ith*n_groups*R*op.n_dim;
    float   * weight  = scratch + at.weight;
    float   * peak    = scratch + at.peak;
    float   * sum     = scratch + at.sum;
    float   * scores  = scratch + at.scores;
    int32_t * cells   = (int32_t *) (scratch + at.cells);
    int32_t * n_cells = (int32_t *) (scratch + at.n_cells);
    float   * part    = scratch + at.part;
    float   * logits  = scratch + at.logits + team.ith*R*fasa::FAC_CHUNK;

    const fasa::mask_row mask = op.mask_at(t, s);

    for (int64_t i = team.first(n_groups*tip_chunk), gathered = -1; i < team.last(n_groups*tip_chunk); ++i) {
        const int64_t g = i/tip_chunk;
        if (gathered != g) {
            op.gather_q(g0 + g, t, s, q_tip + g*R*op.n_dim);
            gathered = g;
        }
        fasa::tip_chunk(q_tip + g*R*op.n_dim, R, op.n_dim, op.index_head(g0 + g, s), mask, op.n_kv, i%tip_chunk,
                weight + g*R*op.stride, op.stride, peak + g*R*tip_chunk, sum + g*R*tip_chunk);
    }
    team.wait();

    for (int64_t g = team.ith; g < n_groups; g += team.nth) {
        fasa::tip_factors(R, tip_chunk, peak + g*R*tip_chunk, sum + g*R*tip_chunk);
        fasa::tip_combine(weight + g*R*op.stride, op.stride, R, peak + g*R*tip_chunk, mask, op.n_kv, scores + g*op.stride);
        n_cells[g] = (int32_t) ggml_fasa_cpu_select(scores + g*op.stride, op.n_kv, op.n_sel, cells + g*op.n_sel, false);
    }
    team.wait();

    for (int64_t i = team.first(n_groups*fac_chunk); i < team.last(n_groups*fac_chunk); ++i) {
        const int64_t g = i/fac_chunk;
        if (i%fac_chunk >= fasa::n_fac_chunk(n_cells[g])) {
            continue;
        }
        fasa::fac_chunk(op.q_row((g0 + g)*R, t, s), R, op.q_stride(), op.k_head(g0 + g, s), op.k->nb[1],
                op.v_head(g0 + g, s), op.v->nb[1], op.d_k, op.d_v, cells + g*op.n_sel, n_cells[g], op.scale, op.softcap,
                i%fac_chunk, logits, part + g*part_size);
    }
    team.wait();

    for (int64_t h = team.first(n_groups*R); h < team.last(n_groups*R); ++h) {
        const int64_t g = h/R;
        fasa::fac_merge(part + g*part_size, R, op.d_v, fasa::n_fac_chunk(n_cells[g]), h%R, op.sink_of(g0*R + h),
                op.out(g0*R + h, t, s));
    }
}

// The same by the scalar reference of each stage.
void attn_row_ref(const attn_op & op, int64_t t, int64_t s, int64_t g, float * scratch) {
    float   * q_tip  = scratch;
    float   * scores = q_tip + op.n_group*op.n_dim;
    int32_t * cells  = (int32_t *) (scores + op.stride);
    float   * work   = (float *) (cells + op.n_sel);

    const fasa::mask_row mask = op.mask_at(t, s);

    op.gather_q(g, t, s, q_tip);
    ggml_fasa_cpu_tip(q_tip, op.n_group, op.n_dim, op.index_head(g, s), mask.data, mask.f16, op.n_kv, work, scores, true);
    const int64_t n = ggml_fasa_cpu_select(scores, op.n_kv, op.n_sel, cells, true);
    ggml_fasa_cpu_fac(op.q_row(g*op.n_group, t, s), op.n_group, op.q_stride(), op.k_head(g, s), op.k->nb[1],
            op.v_head(g, s), op.v->nb[1], op.d_k, op.d_v, cells, n, op.scale, op.softcap, op.sink_of(g*op.n_group), work,
            op.out(g*op.n_group, t, s), op.dst->nb[1]/sizeof(float), true);
}

size_t ref_scratch(const attn_op & op) {
    return op.n_group*op.n_dim + op.stride + op.n_sel +
        std::max(ggml_fasa_cpu_tip_scratch(op.n_group, op.n_kv), ggml_fasa_cpu_fac_scratch(op.n_group, op.n_sel, op.d_v));
}

// All threads share each row when there are too few (row, group) units to go round evenly.
bool shares_rows(const attn_op & op, int nth) {
    return nth > 1 && op.n_row*op.n_stream*op.n_head_kv < 4*nth;
}

void forward_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const attn_op op(dst);

    float * scratch = (float *) params->wdata;

    const int64_t G   = op.n_head_kv;
    const int     ith = params->ith;
    const int     nth = params->nth;

    if (shares_rows(op, nth) && !params->use_ref) {
        for (int64_t r = 0; r < op.n_row*op.n_stream; ++r) {
            attn_row(op, r%op.n_row, r/op.n_row, 0, G, scratch, { ith, nth, params });
        }
        return;
    }

    for (int64_t u = ith; u < op.n_row*op.n_stream*G; u += nth) {
        const int64_t r = u/G;
        if (params->use_ref) {
            attn_row_ref(op, r%op.n_row, r/op.n_row, u%G, scratch + ith*ref_scratch(op));
        } else {
            attn_row(op, r%op.n_row, r/op.n_row, u%G, 1, scratch + ith*row_scratch(op, 1, 1).total, { 0, 1, params });
        }
    }
}

void forward_index_write(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k     = dst->src[GGML_FASA_WRITE_SRC_K];
    const ggml_tensor * cells = dst->src[GGML_FASA_WRITE_SRC_CELLS];
    const ggml_tensor * index = dst->src[GGML_FASA_WRITE_SRC_INDEX];
    const ggml_tensor * dims  = dst->src[GGML_FASA_WRITE_SRC_DIMS];

    const int64_t n_dim     = dims->ne[0];
    const int64_t n_head_kv = dims->ne[1];
    const int64_t n_cells   = index->ne[1]*GGML_FASA_TILE;
    const int64_t d         = k->ne[0]/n_head_kv;

    // neighbouring cells share cache lines of the index: give each thread a run of them
    const int64_t n  = cells->ne[0];
    const int64_t i0 = n* params->ith     /params->nth;
    const int64_t i1 = n*(params->ith + 1)/params->nth;

    for (int64_t i = i0; i < i1; ++i) {
        const int64_t id   = ((const int64_t *) cells->data)[i];
        const int64_t s    = id/n_cells;
        const int64_t cell = id%n_cells;
        GGML_ASSERT(id >= 0 && s < index->ne[3]);

        const ggml_fp16_t * row = (const ggml_fp16_t *) ((const char *) k->data + id*k->nb[1]);
        for (int64_t g = 0; g < n_head_kv; ++g) {
            ggml_fasa_cpu_index_write(row + g*d, (const int32_t *) dims->data + g*n_dim, n_dim, cell,
                    (ggml_fp16_t *) ((char *) index->data + g*index->nb[2] + s*index->nb[3]));
        }
    }
}

} // namespace

void ggml_compute_forward_fasa_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_MODE)) {
        case GGML_FASA_MODE_ATTN:
            fasa_n_attn += params->ith == 0;
            forward_attn(params, dst);
            break;
        case GGML_FASA_MODE_INDEX_WRITE:
            fasa_n_index_write += params->ith == 0;
            forward_index_write(params, dst);
            break;
        default:
            GGML_ABORT("unknown FASA mode");
    }
}

size_t ggml_fasa_cpu_work_size(const ggml_tensor * dst, int n_threads) {
    if (ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_MODE) != GGML_FASA_MODE_ATTN) {
        return 0;
    }
    const attn_op op(dst);

    // whether use_ref is set is not known here: make room for each way
    const size_t alone  = std::max(row_scratch(op, 1, 1).total, ref_scratch(op))*n_threads;
    const size_t shared = shares_rows(op, n_threads) ? row_scratch(op, op.n_head_kv, n_threads).total : 0;
    return std::max(alone, shared)*sizeof(float);
}
