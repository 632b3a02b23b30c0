// GGML_OP_FASA_ATTN on the CPU: runs the stages index_cache, or tip -> select -> fac, or fac over all cells,
// over the threads of the graph.

#include "fasa-attn.h"

#include "fasa-stages.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <atomic>

static std::atomic<uint64_t> fasa_n_attn        { 0 };
static std::atomic<uint64_t> fasa_n_index_write { 0 };
static std::atomic<uint64_t> fasa_n_dense       { 0 };

uint64_t ggml_fasa_cpu_n_attn(void) {
    return fasa_n_attn;
}

uint64_t ggml_fasa_cpu_n_index_write(void) {
    return fasa_n_index_write;
}

uint64_t ggml_fasa_cpu_n_dense(void) {
    return fasa_n_dense;
}

namespace {

ggml_fasa_mode op_mode(const ggml_tensor * op) {
    return (ggml_fasa_mode) ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_MODE);
}

ggml_fasa_index_type op_index_type(const ggml_tensor * op) {
    return (ggml_fasa_index_type) ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_INDEX_TYPE);
}

// The op's tensors and sizes, read once, in mode attn or dense.
struct attn_op {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * index;
    const ggml_tensor * dims;
    const ggml_tensor * dst;

    bool    dense;
    int64_t d_k, d_v, n_kv, n_row, n_stream, n_head, n_head_kv, n_group, n_dim, n_sel, stride;
    size_t  k_size, v_size; // bytes of a row of one head
    int64_t hadamard;
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
        dense     = op_mode(op) == GGML_FASA_MODE_DENSE;
        d_k       = k->ne[0];
        d_v       = v->ne[0];
        n_kv      = k->ne[1];
        n_row     = q->ne[1];
        n_stream  = q->ne[3];
        n_head    = q->ne[2];
        n_head_kv = k->ne[2];
        n_group   = n_head/n_head_kv;
        n_dim     = dense ? 0 : dims->ne[0];
        n_sel     = dense ? n_kv : std::min<int64_t>(ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_BUDGET), n_kv);
        stride    = GGML_PAD(n_kv, GGML_FASA_TILE);
        k_size    = ggml_row_size(k->type, d_k);
        v_size    = ggml_row_size(v->type, d_v);
        hadamard  = ggml_get_op_params_i32(op, GGML_FASA_OP_PARAM_HADAMARD);
        scale     = ggml_get_op_params_f32(op, GGML_FASA_OP_PARAM_SCALE);
        softcap   = ggml_get_op_params_f32(op, GGML_FASA_OP_PARAM_SOFTCAP);
    }

    // What a thread can work on alone: a group of a row; in dense all groups, whose K rows lie side by side in memory.
    int64_t unit_groups() const {
        return dense ? n_head_kv : 1;
    }
    int64_t n_unit() const {
        return n_row*n_stream*n_head_kv/unit_groups();
    }
    const float * q_row(int64_t h, int64_t t, int64_t s) const {
        return (const float *) ((const char *) q->data + t*q->nb[1] + h*q->nb[2] + s*q->nb[3]);
    }
    fasa::fac_input fac_input(int64_t g, int64_t t, int64_t s) const {
        auto rows = [&](const ggml_tensor * x, size_t size) {
            return fasa::cache_rows{ (const char *) x->data + g*x->nb[2] + s*x->nb[3], x->type, x->nb[1], x->ne[0], size };
        };
        return { q_row(g*n_group, t, s), n_group, (int64_t) (q->nb[2]/sizeof(float)), rows(k, k_size), rows(v, v_size), scale, softcap };
    }
    fasa::fac_groups fac_groups(int64_t g, int64_t n_groups, int64_t t, int64_t s) const {
        return { fac_input(g, t, s), n_groups, (int64_t) (n_group*q->nb[2]/sizeof(float)), k->nb[2], v->nb[2] };
    }
    fasa::index_plane index_plane(int64_t g, int64_t s) const {
        return { op_index_type(dst), n_dim, (const char *) index->data + g*index->nb[2] + s*index->nb[3] };
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

    // the dominant dims of the group's queries before rotation, times scale: [n_group][n_dim]; scratch [d_k]
    void gather_q(int64_t g, int64_t t, int64_t s, float * scratch, float * q_tip) const {
        const int32_t * dim = (const int32_t *) dims->data + g*n_dim;
        for (int64_t h = 0; h < n_group; ++h) {
            const float * qh = q_row(g*n_group + h, t, s);
            if (hadamard) {
                std::copy(qh, qh + d_k, scratch);
                fasa::hadamard(scratch, d_k, hadamard);
                qh = scratch;
            }
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

constexpr size_t LINE = 64; // bytes of a cache line

// The work buffer from its first whole cache line on: a vector that lies across two lines takes twice as long.
float * aligned(void * wdata) {
    return (float *) GGML_PAD((uintptr_t) wdata, LINE);
}

// Hands out parts of a buffer, in floats from its start, each on cache lines of its own.
struct layout {
    size_t size = 0;

    size_t take(size_t n) {
        const size_t at = size;
        size += GGML_PAD(n, 16);
        return at;
    }
};

// Scratch of a team for the groups of one row.
struct row_scratch {
    layout all;
    size_t weight, peak, sum, scores, part;
    size_t own, q_tip, query, factor, plain, keys, cells, fac, total; // of each thread, from own + ith*total

    row_scratch(const attn_op & op, int64_t n_groups, int nth) {
        const int64_t R       = op.n_group;
        const int64_t n_chunk = fasa::n_tip_chunk(op.n_kv);

        weight  = all.take(n_groups*n_chunk*R*fasa::TIP_CHUNK);
        peak    = all.take(n_groups*R*n_chunk);
        sum     = all.take(n_groups*R*n_chunk);
        scores  = all.take(n_groups*op.stride);
        part    = all.take(n_groups*R*fasa::n_fac_chunk(op.n_sel)*(op.d_v + 2));

        layout mine;
        q_tip   = mine.take(R*op.n_dim + op.d_k);
        query   = mine.take(R*fasa::tip_query_size(op.n_dim));
        factor  = mine.take(R*n_chunk);
        plain   = mine.take((n_chunk + 3)/4);
        keys    = mine.take(2*op.n_kv);
        cells   = mine.take(op.n_sel);
        fac     = mine.take(fasa::fac_thread_scratch(R, std::max(op.d_k, op.d_v)));
        total   = mine.size;
        own     = all.take(nth*total);
    }
};

// tip -> select -> fac for groups [g0, g0 + n_groups) of one row, by a team.
void attn_row(const attn_op & op, int64_t t, int64_t s, int64_t g0, int64_t n_groups, float * scratch, const team & team) {
    const row_scratch at(op, n_groups, team.nth);

    const int64_t R         = op.n_group;
    const int64_t tip_chunk = fasa::n_tip_chunk(op.n_kv);
    const int64_t fac_chunk = fasa::n_fac_chunk(op.n_sel);
    const size_t  part_size = R*(op.d_v + 2);

    float * peak   = scratch + at.peak;
    float * sum    = scratch + at.sum;
    float * scores = scratch + at.scores;
    float * part   = scratch + at.part;

    float    * own    = scratch + at.own + team.ith*at.total;
    float    * q_tip  = own + at.q_tip;
    float    * query  = own + at.query;
    float    * factor = own + at.factor;
    bool     * plain  = (bool *) (own + at.plain); // [tip_chunk]
    uint32_t * keys   = (uint32_t *) (own + at.keys);
    int32_t  * cells  = (int32_t *) (own + at.cells);

    const fasa::mask_row mask = op.mask_at(t, s);

    const int64_t first = team.first(n_groups*tip_chunk);
    const int64_t last  = team.last (n_groups*tip_chunk);

    for (int64_t i = first; i < std::min(last, first + tip_chunk); ++i) {
        plain[i%tip_chunk] = mask.plain_chunk(i%tip_chunk, op.n_kv); // for all groups
    }
    auto weight = [&](int64_t g, int64_t chunk) { // [R][TIP_CHUNK]
        return scratch + at.weight + (g*tip_chunk + chunk)*R*fasa::TIP_CHUNK;
    };

    // calls fn(group, chunk, whether the group is another than in the call before) for this thread's chunks
    auto for_tip_chunks = [&](auto && fn) {
        for (int64_t i = first; i < last; ++i) {
            fn(i/tip_chunk, i%tip_chunk, i == first || i%tip_chunk == 0);
        }
    };

    for_tip_chunks([&](int64_t g, int64_t chunk, bool new_group) {
        if (new_group) {
            op.gather_q(g0 + g, t, s, q_tip + R*op.n_dim, q_tip);
            fasa::tip_query(q_tip, R, op.n_dim, op_index_type(op.dst), query);
        }
        fasa::tip_chunk(query, R, op.index_plane(g0 + g, s), mask, plain[chunk], op.n_kv, chunk,
                weight(g, chunk), peak + g*R*tip_chunk, sum + g*R*tip_chunk);
    });
    team.wait();

    for_tip_chunks([&](int64_t g, int64_t chunk, bool new_group) {
        if (new_group) {
            fasa::tip_factors(R, tip_chunk, peak + g*R*tip_chunk, sum + g*R*tip_chunk, factor);
        }
        fasa::tip_combine(weight(g, chunk), R, factor, mask, plain[chunk], op.n_kv, chunk, scores + g*op.stride);
    });
    team.wait();

    // each thread selects for every group that it attends to: what two share, neither has to wait for
    int64_t n_cells  = 0;
    int64_t selected = -1;
    for (int64_t i = team.first(n_groups*fac_chunk); i < team.last(n_groups*fac_chunk); ++i) {
        const int64_t g = i/fac_chunk;
        if (g != selected) {
            n_cells  = ggml_fasa_cpu_select(scores + g*op.stride, op.n_kv, op.n_sel, keys, cells, false);
            selected = g;
        }
        fasa::fac_chunk(op.fac_input(g0 + g, t, s), cells, n_cells, i%fac_chunk, own + at.fac, part + i*part_size);
    }
    team.wait();

    for (int64_t h = team.first(n_groups*R); h < team.last(n_groups*R); ++h) {
        const int64_t g = h/R;
        fasa::fac_merge(part + g*fac_chunk*part_size, R, op.d_v, fac_chunk, h%R, op.sink_of(g0*R + h), op.out(g0*R + h, t, s));
    }
}

struct dense_scratch {
    layout all;
    size_t part, own, total;

    dense_scratch(const attn_op & op, int64_t n_groups, int nth) {
        part  = all.take(n_groups*op.n_group*fasa::n_dense_chunk(op.n_kv)*(op.d_v + 2));
        total = GGML_PAD(fasa::fac_thread_scratch(n_groups*op.n_group, std::max(op.d_k, op.d_v)), 16);
        own   = all.take(nth*total);
    }
};

// fac over all cells for groups [g0, g0 + n_groups) of one row, by a team.
void dense_row(const attn_op & op, int64_t t, int64_t s, int64_t g0, int64_t n_groups, float * scratch, const team & team) {
    const dense_scratch at(op, n_groups, team.nth);

    const int64_t R         = op.n_group;
    const int64_t n_chunk   = fasa::n_dense_chunk(op.n_kv);
    const size_t  part_size = R*(op.d_v + 2);

    float * part = scratch + at.part;
    float * own  = scratch + at.own + team.ith*at.total;

    // the heads of a cell lie side by side: finish a run of cells before the next
    const int64_t last = team.last(n_chunk*n_groups);
    for (int64_t i = team.first(n_chunk*n_groups); i < last;) {
        const int64_t g     = i%n_groups;
        const int64_t chunk = i/n_groups;
        const int64_t n     = std::min(n_groups - g, last - i);
        fasa::dense_chunk(op.fac_groups(g0 + g, n, t, s), op.mask_at(t, s), op.n_kv, chunk, own,
                part + (g*n_chunk + chunk)*part_size, n_chunk*part_size);
        i += n;
    }
    team.wait();

    for (int64_t h = team.first(n_groups*R); h < team.last(n_groups*R); ++h) {
        fasa::fac_merge(part + h/R*n_chunk*part_size, R, op.d_v, n_chunk, h%R, op.sink_of(g0*R + h), op.out(g0*R + h, t, s));
    }
    team.wait(); // part is written again for the next row
}

// Scratch of the scalar reference of one row and group.
struct ref_scratch {
    layout all;
    size_t work, q_tip, scores, cells;

    explicit ref_scratch(const attn_op & op) {
        work   = all.take(std::max(op.dense ? 0 : ggml_fasa_cpu_tip_scratch(op.n_group, op.n_dim, op.n_kv),
                ggml_fasa_cpu_fac_scratch(op.n_group, op.n_sel, std::max(op.d_k, op.d_v))));
        q_tip  = all.take(op.n_group*op.n_dim + op.d_k);
        scores = all.take(op.stride);
        cells  = all.take(op.n_sel);
    }
};

// The same as attn_row and dense_row by the scalar reference of each stage. Dense is: select every visible cell.
void ref_row(const attn_op & op, int64_t t, int64_t s, int64_t g, float * scratch) {
    const ref_scratch at(op);

    float   * work   = scratch + at.work;
    float   * q_tip  = scratch + at.q_tip;
    float   * scores = scratch + at.scores;
    int32_t * cells  = (int32_t *) (scratch + at.cells);

    const fasa::mask_row mask = op.mask_at(t, s);

    if (op.dense) {
        for (int64_t i = 0; i < op.n_kv; ++i) {
            scores[i] = mask.hidden(i) ? -INFINITY : 0.0f;
        }
    } else {
        const fasa::index_plane index = op.index_plane(g, s);
        op.gather_q(g, t, s, q_tip + op.n_group*op.n_dim, q_tip);
        ggml_fasa_cpu_tip(q_tip, op.n_group, op.n_dim, index.type, index.data, mask.data, mask.f16, op.n_kv, work, scores, true);
    }
    const int64_t n = ggml_fasa_cpu_select(scores, op.n_kv, op.n_sel, nullptr, cells, true);

    const fasa::fac_input in = op.fac_input(g, t, s);
    ggml_fasa_cpu_fac(in.q, in.n_group, in.q_stride, in.k.data, in.k.type, in.k.stride, in.v.data, in.v.type, in.v.stride,
            in.k.d, in.v.d, cells, n, in.scale, in.softcap, op.sink_of(g*op.n_group), work,
            op.out(g*op.n_group, t, s), op.dst->nb[1]/sizeof(float), true);
}

// All threads share each row where units do not go round evenly.
bool shares_rows(const attn_op & op, int nth) {
    return op.n_unit()%nth != 0 && op.n_unit() < 16*nth;
}

size_t team_scratch(const attn_op & op, int64_t n_groups, int nth) {
    return op.dense ? dense_scratch(op, n_groups, nth).all.size : row_scratch(op, n_groups, nth).all.size;
}

void forward_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const attn_op op(dst);

    float * scratch = aligned(params->wdata);

    const int64_t G   = op.n_head_kv;
    const int     ith = params->ith;
    const int     nth = params->nth;

    if (params->use_ref) {
        scratch += ith*ref_scratch(op).all.size;
        for (int64_t u = ith; u < op.n_row*op.n_stream*G; u += nth) {
            const int64_t r = u/G;
            ref_row(op, r%op.n_row, r/op.n_row, u%G, scratch);
        }
        return;
    }

    const auto run_row = op.dense ? dense_row : attn_row;

    // fewer threads may run than were asked for, and those not share a row as planned
    if (shares_rows(op, nth) && team_scratch(op, G, nth)*sizeof(float) <= params->wsize) {
        for (int64_t r = 0; r < op.n_row*op.n_stream; ++r) {
            run_row(op, r%op.n_row, r/op.n_row, 0, G, scratch, { ith, nth, params });
        }
        return;
    }

    const int64_t unit = op.unit_groups();
    scratch += ith*team_scratch(op, unit, 1);
    for (int64_t u = op.n_unit()*ith/nth; u < op.n_unit()*(ith + 1)/nth; ++u) {
        const int64_t r = u*unit/G;
        run_row(op, r%op.n_row, r/op.n_row, u*unit%G, unit, scratch, { 0, 1, params });
    }
}

// Floats of scratch of one thread.
size_t write_scratch(const ggml_tensor * op) {
    const ggml_tensor * dims = op->src[GGML_FASA_WRITE_SRC_DIMS];
    return GGML_PAD(op->src[GGML_FASA_WRITE_SRC_K]->ne[0]/dims->ne[1] + dims->ne[0], 16);
}

void forward_index_write(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * k      = dst->src[GGML_FASA_WRITE_SRC_K];
    const ggml_tensor * cells  = dst->src[GGML_FASA_WRITE_SRC_CELLS];
    const ggml_tensor * index  = dst->src[GGML_FASA_WRITE_SRC_INDEX];
    const ggml_tensor * dims   = dst->src[GGML_FASA_WRITE_SRC_DIMS];
    const ggml_tensor * center = dst->src[GGML_FASA_WRITE_SRC_CENTER];

    const int64_t n_dim   = dims->ne[0];
    const int64_t G       = dims->ne[1];
    const int64_t n_cells = index->ne[1]*GGML_FASA_TILE;
    const int64_t d       = k->ne[0]/G;
    const int64_t n       = cells->ne[0];

    const ggml_fasa_index_type type     = op_index_type(dst);
    const int32_t              hadamard = ggml_get_op_params_i32(dst, GGML_FASA_OP_PARAM_HADAMARD);

    float * scratch = aligned(params->wdata) + params->ith*write_scratch(dst);

    // neighbouring cells of a head share cache lines of the index: give each thread a run of them
    const int64_t u1 = G*n*(params->ith + 1)/params->nth;
    for (int64_t u = G*n*params->ith/params->nth; u < u1; ++u) {
        const int64_t g    = u/n;
        const int64_t id   = ((const int64_t *) cells->data)[u%n];
        const int64_t s    = id/n_cells;
        const int64_t cell = id%n_cells;
        GGML_ASSERT(id >= 0 && s < index->ne[3]);

        ggml_fasa_cpu_index_write(
                (const char *) k->data + id*k->nb[1] + g*ggml_row_size(k->type, d), k->type, d, hadamard,
                (const int32_t *) dims->data + g*n_dim, center ? (const float *) center->data + g*n_dim : nullptr, n_dim, cell,
                type, (char *) index->data + g*index->nb[2] + s*index->nb[3], scratch);
    }
}

} // namespace

void ggml_compute_forward_fasa_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (op_mode(dst)) {
        case GGML_FASA_MODE_ATTN:
            fasa_n_attn += params->ith == 0;
            forward_attn(params, dst);
            break;
        case GGML_FASA_MODE_INDEX_WRITE:
            fasa_n_index_write += params->ith == 0;
            forward_index_write(params, dst);
            break;
        case GGML_FASA_MODE_DENSE:
            fasa_n_dense += params->ith == 0;
            forward_attn(params, dst);
            break;
        default:
            GGML_ABORT("FASA mode not on the CPU");
    }
}

size_t ggml_fasa_cpu_work_size(const ggml_tensor * dst, int n_threads) {
    if (op_mode(dst) == GGML_FASA_MODE_INDEX_WRITE) {
        return n_threads*write_scratch(dst)*sizeof(float) + LINE;
    }
    const attn_op op(dst);

    // whether use_ref is set is not known here: make room for each way
    const size_t alone  = std::max(team_scratch(op, op.unit_groups(), 1), ref_scratch(op).all.size)*n_threads;
    const size_t shared = shares_rows(op, n_threads) ? team_scratch(op, op.n_head_kv, n_threads) : 0;
    return std::max(alone, shared)*sizeof(float) + LINE;
}
