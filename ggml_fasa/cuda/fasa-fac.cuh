// Stage fac on CUDA: exact attention of one KV group over the selected cells, paper section 4.2.
//
// One kernel with select: its blocks each attend to the cells selected out of their share, and the block that finishes last
// merges, in a fixed order, so that results repeat bit by bit.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-select.cuh"
#include "fasa-stages.cuh"

namespace fasa {

// How rows are read: of any type; as F16; or as F16 by way of the row cache.
enum row_source { ROWS_ANY, ROWS_F16, ROWS_CACHED };

// Values 8 * l .. + 7 of a row, as they come from memory.
template <bool F16>
struct fac_row {
    uint4  bits;
    float4 values[F16 ? 1 : 2];

    __device__ __forceinline__ void load(const char * row, int l, int d, ggml_type type) {
        const bool in = 8*l < d;
        if constexpr (F16) {
            bits = in ? *(const uint4 *) (row + 16*l) : make_uint4(0, 0, 0, 0);
        } else {
            values[0] = in ? load4_any(row, 8*l,     type) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            values[1] = in ? load4_any(row, 8*l + 4, type) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    __device__ __forceinline__ void get(float * x) const {
        if constexpr (F16) {
            half4(make_uint2(bits.x, bits.y), x);
            half4(make_uint2(bits.z, bits.w), x + 4);
        } else {
            x[0] = values[0].x; x[1] = values[0].y; x[2] = values[0].z; x[3] = values[0].w;
            x[4] = values[1].x; x[5] = values[1].y; x[6] = values[1].z; x[7] = values[1].w;
        }
    }
};

// Dynamic shared memory of a block, in floats, each a multiple of 4.
struct fac_layout {
    size_t q, list, head, part, key, rows, total;

    __host__ __device__ fac_layout(const attn_args & a) {
        const size_t parts  = (size_t) FAC_WARP*a.n_fac*a.d_v;
        const size_t shares = (size_t) MAX_PART*a.n_group;
        const size_t work   = 2*a.n_fac*FAC_WARP + (parts > shares ? parts : shares);
        q     = 0;                                   // [n_slot][d_k]
        list  = q    + (size_t) a.n_slot*a.d_k;      // [list_len] cells
        head  = list + (size_t) (a.list_len + 3)/4*4; // [2][n_fac][FAC_WARP] largest logit and sum of each warp, then its share
        part  = head + (size_t) 2*a.n_fac*FAC_WARP;  // [FAC_WARP][n_fac][d_v]; or the shares of fac_merge
        key   = head;                                // [key_len] keys of select, before head and part are of use
        rows  = head + (work > (size_t) a.key_len ? work : a.key_len); // see row_shared
        total = rows + row_shared(a.rows, a.list_len);
    }
};

constexpr float LOGIT_NONE = -1e30f; // of no cell at all; finite, so that differences are numbers

static __device__ __noinline__ float fac_softcap(float s, float softcap) {
    return softcap*tanhf(s/softcap);
}

// Attention of heads [h0, h0 + NH) over cells list[0 .. n). LANES: of a warp for one row, 8 values each.
// out: [n_group][d_v + 2] of global memory: for each head sum of p * v, then the largest logit in powers of two, then the
// sum of p.
template <int NH, int LANES, row_source ROWS>
static __device__ void fac_heads(
        const attn_args & a, const unit & u, float * shared, row_cache & cache, int h0, const int32_t * list, int n, float * out) {
    constexpr bool F16 = ROWS != ROWS_ANY;
    constexpr int CELLS = WARP_SIZE/LANES; // of a warp at once
    constexpr int STEP  = FAC_WARP*CELLS;

    const int lane  = threadIdx.x%WARP_SIZE;
    const int warp  = threadIdx.x/WARP_SIZE;
    const int l     = lane%LANES;
    const int first = warp*CELLS;

    const fac_layout in(a);
    const float * q    = shared + in.q + h0*a.d_k;
    float       * head = shared + in.head;
    float       * part = shared + in.part;

    const char * k = a.k + u.s*a.k_nb3 + u.g*a.k_nb2;
    const char * v = a.v + u.s*a.v_nb3 + u.g*a.v_nb2;

    float acc[NH][8] = {};
    float top[NH];
    float sum[NH];
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        top[h] = LOGIT_NONE;
        sum[h] = 0.0f;
    }

    fac_row<F16> kr, vr;
    auto load = [&](int c) {
        if (c < n) {
            const size_t cell = list[c];
            const char * k_row = k + cell*a.k_nb1;
            const char * v_row = v + cell*a.v_nb1;
            if constexpr (ROWS == ROWS_CACHED) {
                cache.redirect(c, a.d_k, k_row, v_row);
            }
            kr.load(k_row, l, a.d_k, a.k_type);
            vr.load(v_row, l, a.d_v, a.v_type);
        }
    };
    load(first + lane/LANES);
    if constexpr (ROWS == ROWS_CACHED) {
        if (h0 == 0) {
            cache.place(list, n);
        }
    }
#pragma unroll 1
    for (int c0 = first; c0 < n; c0 += STEP) {
        const int c = c0 + lane/LANES;
        float x[8];
        float y[8];
        kr.get(x);
        vr.get(y);
        if constexpr (ROWS == ROWS_CACHED) {
            if (h0 == 0 && c < n) {
                cache.keep(c, l, a.d_k, a.d_v, kr.bits, vr.bits);
            }
        }
        load(c + STEP); // the next cell is on its way while this one is worked on

        float s[NH] = {};
        if (8*l < a.d_k) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                const float4 q0 = *(const float4 *) (q + h*a.d_k + 8*l);
                const float4 q1 = *(const float4 *) (q + h*a.d_k + 8*l + 4);
                s[h] = x[0]*q0.x + x[1]*q0.y + x[2]*q0.z + x[3]*q0.w + x[4]*q1.x + x[5]*q1.y + x[6]*q1.z + x[7]*q1.w;
            }
        }
#pragma unroll
        for (int o = LANES/2; o > 0; o /= 2) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                s[h] += __shfl_xor_sync(0xFFFFFFFFu, s[h], o);
            }
        }
        if (c < n) {
#pragma unroll
            for (int h = 0; h < NH; ++h) {
                float z = s[h]*a.scale;
                if (a.softcap != 0.0f) {
                    z = fac_softcap(z, a.softcap);
                }
                z *= LOG2E;
                const float m    = fmaxf(top[h], z);
                const float keep = exp2f(top[h] - m);
                const float p    = exp2f(z - m);
                top[h] = m;
                sum[h] = sum[h]*keep + p;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    acc[h][i] = acc[h][i]*keep + p*y[i];
                }
            }
        }
    }

    // the cells of a warp
    if (first < n) {
#pragma unroll
        for (int h = 0; h < NH; ++h) {
#pragma unroll
            for (int o = LANES; o < WARP_SIZE; o *= 2) {
                const float m = fmaxf(top[h], __shfl_xor_sync(0xFFFFFFFFu, top[h], o));
                const float f = exp2f(top[h] - m);
                top[h]  = m;
                sum[h] *= f;
                sum[h] += __shfl_xor_sync(0xFFFFFFFFu, sum[h], o);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    acc[h][i] *= f;
                    acc[h][i] += __shfl_xor_sync(0xFFFFFFFFu, acc[h][i], o);
                }
            }
            if (lane < LANES && 8*l < a.d_v) {
                float4 * to = (float4 *) (part + (warp*NH + h)*a.d_v + 8*l);
                to[0] = make_float4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
                to[1] = make_float4(acc[h][4], acc[h][5], acc[h][6], acc[h][7]);
            }
        }
    }
    if (lane == 0) {
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            head[h*FAC_WARP + warp]        = top[h];
            head[(NH + h)*FAC_WARP + warp] = sum[h];
        }
    }
    __syncthreads();

    // the warps of the block
    const int n_head = min(NH, a.n_group - h0);
    out += (size_t) h0*(a.d_v + 2);
    if (warp < n_head) {
        const float t = lane < FAC_WARP ? head[warp*FAC_WARP + lane]        : LOGIT_NONE;
        const float s = lane < FAC_WARP ? head[(NH + warp)*FAC_WARP + lane] : 0.0f;
        const float m = warp_max(t);
        const float f = exp2f(t - m);
        const float z = warp_sum(f*s);
        if (lane < FAC_WARP) {
            head[warp*FAC_WARP + lane] = f;
        }
        if (lane == 0) {
            __stcg(out + warp*(a.d_v + 2) + a.d_v,     n > 0 ? m : -INFINITY);
            __stcg(out + warp*(a.d_v + 2) + a.d_v + 1, z);
        }
    }
    __syncthreads();

    const int n_warp = min(FAC_WARP, (n + CELLS - 1)/CELLS);
#pragma unroll 1
    for (int i = threadIdx.x; i < n_head*a.d_v; i += FAC_THREAD) {
        const int h = i/a.d_v;
        float y = 0.0f;
#pragma unroll 4
        for (int w = 0; w < n_warp; ++w) {
            y += head[h*FAC_WARP + w]*part[w*NH*a.d_v + i];
        }
        __stcg(out + i + 2*h, y);
    }
    __syncthreads();
}

// The output of a unit from its n_part partial results part, each [n_group][d_v + 2] in global memory.
// share: [MAX_PART][n_group] of shared memory.
static __device__ void fac_merge(const attn_args & a, const unit & u, const float * part, float * share) {
    const int lane   = threadIdx.x%WARP_SIZE;
    const int width  = a.d_v + 2;
    const int stride = a.n_group*width; // from part to part
    const int n      = a.n_group*a.d_v;

    float * out = a.dst + (((int64_t) u.s*a.n_row + u.t)*a.n_head_kv + u.g)*n;

    float y[MAX_PART];
    auto load = [&](int i) {
        const float * from = part + i + i/a.d_v*2;
#pragma unroll
        for (int b = 0; b < MAX_PART; ++b) {
            y[b] = __ldcg(from + min(b, a.n_part - 1)*stride); // what comes twice has no share
        }
    };
    load(min((int) threadIdx.x, n - 1));

    // what each part weighs: a warp for a head, a lane for a part
#pragma unroll 1
    for (int h = threadIdx.x/WARP_SIZE; h < a.n_group; h += FAC_WARP) {
        const float * from = part + min(lane, a.n_part - 1)*stride + h*width + a.d_v;
        const float   top  = lane < a.n_part ? __ldcg(from)     : -INFINITY;
        const float   sum  = lane < a.n_part ? __ldcg(from + 1) : 0.0f;
        const float   sink = a.sinks ? a.sinks[u.g*a.n_group + h]*LOG2E : -INFINITY;

        const float all = warp_max(top);
        const float m   = fmaxf(all, sink);
        const float f   = all > -INFINITY ? exp2f(top - m) : 0.0f;
        const float z   = warp_sum(f*sum) + (all > -INFINITY ? exp2f(sink - m) : 1.0f);
        if (lane < MAX_PART) {
            share[lane*a.n_group + h] = f/z;
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += FAC_THREAD) {
        if (i >= FAC_THREAD) {
            load(i);
        }
        const float * s = share + i/a.d_v;
        float sum = 0.0f;
#pragma unroll
        for (int b = 0; b < MAX_PART; ++b) {
            sum += s[b*a.n_group]*y[b];
        }
        out[i] = sum;
    }
}

// grid: n_part blocks for each unit, all on the device together. NH: heads served at once.
template <int NH, int LANES, row_source ROWS>
__global__ void __launch_bounds__(FAC_THREAD, 1) fasa_select_fac(const attn_args a) {
    extern __shared__ float4 shared4[];
    __shared__ select_shared sh;
    __shared__ bool last;

    float * shared = (float *) shared4;
    const fac_layout in(a);

    const int rank = blockIdx.x;
    const int at_u = blockIdx.y;
    const unit u(a, a.unit0 + at_u);

    // q is older than the kernel before
#pragma unroll 1
    for (int i = 4*threadIdx.x; i < a.n_slot*a.d_k; i += 4*FAC_THREAD) {
        const int h = i/a.d_k;
        *(float4 *) (shared + in.q + i) = h < a.n_group ?
            *(const float4 *) ((const float *) (a.q + u.s*a.q_nb3 + u.t*a.q_nb1 + (u.g*a.n_group + h)*a.q_nb2) + i%a.d_k) :
            make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int b = threadIdx.x; b < N_BIN; b += FAC_THREAD) {
        sh.hist[b] = 0;
    }
    if (threadIdx.x < OFFER) {
        sh.cand[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) {
        sh.n_cand = 0;
    }
    row_cache cache;
    if constexpr (ROWS == ROWS_CACHED) { // what changes it is older than the kernel before, too
        cache.open(a.rows, u.s, u.g, (uint32_t *) (shared + in.rows), a.list_len);
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    const size_t block = (size_t) at_u*a.n_part + rank;
    uint32_t * key  = a.key_len  > 0 ? (uint32_t *) (shared + in.key)  : a.key  + block*a.n_run;
    int32_t  * list = a.list_len > 0 ? (int32_t *)  (shared + in.list) : a.list + block*a.budget;
    float    * part = a.part + (size_t) at_u*a.n_part*a.n_group*(a.d_v + 2);
    unit_sync * sync = a.sync + at_u;

    select_count(a, u, at_u, rank, sh, key);
    unit_arrive(a, sync);
    unit_wait(a, sync, 1);
    const int n = select_cells(a, u, at_u, rank, sh, key, list);

    if constexpr (ROWS == ROWS_CACHED) {
        cache.find(list, n);
    }
#pragma unroll 1
    for (int h = 0; h < a.n_group; h += NH) {
        fac_heads<NH, LANES, ROWS>(a, u, shared, cache, h, list, n, part + (size_t) rank*a.n_group*(a.d_v + 2));
    }
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&sync->n_done, 1) == a.n_part - 1;
        __threadfence();
    }
    __syncthreads();
    if (last) {
        if constexpr (ROWS == ROWS_CACHED) {
            if (threadIdx.x == 0) {
                cache.turn();
            }
        }
        fac_merge(a, u, part, shared + in.part);
    }
}

} // namespace fasa
