// Stage fac on CUDA: exact attention of one KV group over the selected cells, paper section 4.2.
//
// A warp owns a cell at a time: its lanes read the K and V rows, four values each, and keep a running softmax. The results
// of warps and blocks are merged in a fixed order, so that results repeat bit by bit.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-stages.cuh"

namespace fasa {

// The part of a row that a lane holds: values 4 * lane .. + 3 of every 128.
template <int PARTS, bool F16>
struct fac_row {
    uint2 bits[F16 ? PARTS : 1];
    float4 values[F16 ? 1 : PARTS];

    __device__ __forceinline__ void load(const char * row, int d, ggml_type type) {
        const int lane = threadIdx.x%WARP_SIZE;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            const int i = 4*(p*WARP_SIZE + lane);
            if constexpr (F16) {
                bits[p] = i < d ? *(const uint2 *) (row + 2*i) : make_uint2(0, 0);
            } else {
                values[p] = i < d ? load4_any(row, i, type) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        }
    }

    __device__ __forceinline__ void get(int p, float * x) const {
        if constexpr (F16) {
            half4(bits[p], x);
        } else {
            x[0] = values[p].x; x[1] = values[p].y; x[2] = values[p].z; x[3] = values[p].w;
        }
    }
};

static __device__ __forceinline__ float fac_softcap(float s, float softcap) {
    return softcap != 0.0f ? softcap*tanhf(s/softcap) : s;
}

// Attention of heads [h0, h0 + NH) over the block's cells cells[0 .. n). PK, PV: 128ths of a K and a V row.
// q: [n_group][d_k] of shared memory. part: [N_WARP][NH][d_v + 2] of shared memory. out: [n_group][d_v + 2] of global memory:
// for each head sum of p * v, then the largest logit, then the sum of p.
template <int NH, int PK, int PV, bool F16>
static __device__ void fac_heads(
        const attn_args & a, const unit & u, const float * q, int h0, const int32_t * cells, int n, float * part, float * out) {
    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;

    const char * k = a.k + u.s*a.k_nb3 + u.g*a.k_nb2;
    const char * v = a.v + u.s*a.v_nb3 + u.g*a.v_nb2;

    float acc[NH][PV][4] = {};
    float top[NH];
    float sum[NH];
#pragma unroll
    for (int h = 0; h < NH; ++h) {
        top[h] = -INFINITY;
        sum[h] = 0.0f;
    }

    fac_row<PK, F16> kr;
    fac_row<PV, F16> vr;
    if (warp < n) {
        kr.load(k + cells[warp]*a.k_nb1, a.d_k, a.k_type);
        vr.load(v + cells[warp]*a.v_nb1, a.d_v, a.v_type);
    }
#pragma unroll 1
    for (int c = warp; c < n; c += N_WARP) {
        const fac_row<PK, F16> k_now = kr;
        const fac_row<PV, F16> v_now = vr;
        if (c + N_WARP < n) { // ask for the next cell before this one is used
            kr.load(k + cells[c + N_WARP]*a.k_nb1, a.d_k, a.k_type);
            vr.load(v + cells[c + N_WARP]*a.v_nb1, a.d_v, a.v_type);
        }

        float s[NH] = {};
#pragma unroll
        for (int p = 0; p < PK; ++p) {
            const int i = 4*(p*WARP_SIZE + lane);
            if (i < a.d_k) {
                float x[4];
                k_now.get(p, x);
#pragma unroll
                for (int h = 0; h < NH; ++h) {
                    const float4 y = *(const float4 *) (q + (h0 + h)*a.d_k + i);
                    s[h] += x[0]*y.x + x[1]*y.y + x[2]*y.z + x[3]*y.w;
                }
            }
        }
        float x[PV][4];
#pragma unroll
        for (int p = 0; p < PV; ++p) {
            v_now.get(p, x[p]);
        }
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            const float z    = fac_softcap(warp_sum(s[h])*a.scale, a.softcap);
            const float m    = fmaxf(top[h], z);
            const float keep = __expf(top[h] - m);
            const float w    = __expf(z - m);
            top[h] = m;
            sum[h] = sum[h]*keep + w;
#pragma unroll
            for (int p = 0; p < PV; ++p) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[h][p][i] = acc[h][p][i]*keep + w*x[p][i];
                }
            }
        }
    }

    const int width = (a.d_v + 2 + 3)/4*4;
    if (warp < n) {
#pragma unroll
        for (int h = 0; h < NH; ++h) {
            float * to = part + (warp*NH + h)*width;
#pragma unroll
            for (int p = 0; p < PV; ++p) {
                const int i = 4*(p*WARP_SIZE + lane);
                if (i < a.d_v) {
                    *(float4 *) (to + i) = make_float4(acc[h][p][0], acc[h][p][1], acc[h][p][2], acc[h][p][3]);
                }
            }
            if (lane == 0) {
                to[a.d_v + 0] = top[h];
                to[a.d_v + 1] = sum[h];
            }
        }
    }
    __syncthreads();

    // the warps of the block
    const int n_warp = min(N_WARP, n);
#pragma unroll 1
    for (int i = threadIdx.x; i < NH*width; i += N_THREAD) {
        const int h = i/width;
        const int at = i%width;
        if (h0 + h >= a.n_group || at >= a.d_v + 2) {
            continue;
        }
        const float * from = part + h*width;
        float m = -INFINITY;
#pragma unroll 4
        for (int w = 0; w < n_warp; ++w) {
            m = fmaxf(m, from[w*NH*width + a.d_v]);
        }
        float y = 0.0f;
#pragma unroll 4
        for (int w = 0; w < n_warp; ++w) {
            y += __expf(from[w*NH*width + a.d_v] - m)*from[w*NH*width + at];
        }
        __stcg(out + (h0 + h)*(a.d_v + 2) + at, at == a.d_v ? m : y);
    }
    __syncthreads();
}

// This block's share of the outputs of a unit. part: [n_team][n_group][d_v + 2] of global memory.
// share: [n_team][n_group] of shared memory.
static __device__ void fac_merge(const attn_args & a, const unit & u, int rank, const float * part, float * share) {
    const int lane   = threadIdx.x%WARP_SIZE;
    const int width  = a.d_v + 2;
    const int stride = a.n_group*width; // from block to block

    // what each block's sum weighs: a warp for a head, a lane for a block
#pragma unroll 1
    for (int h = threadIdx.x/WARP_SIZE; h < a.n_group; h += N_WARP) {
        const float * from = part + lane*stride + h*width + a.d_v;
        const float   top  = lane < a.n_team ? __ldcg(from)     : -INFINITY;
        const float   sum  = lane < a.n_team ? __ldcg(from + 1) : 0.0f;
        const float   sink = a.sinks ? a.sinks[u.g*a.n_group + h] : -INFINITY;

        const float all = warp_max(top);
        const float m   = fmaxf(all, sink);
        const float f   = all > -INFINITY ? __expf(top - m) : 0.0f;
        const float z   = warp_sum(f*sum) + (all > -INFINITY ? __expf(sink - m) : 1.0f);
        if (lane < a.n_team) {
            share[lane*a.n_group + h] = f/z;
        }
    }
    __syncthreads();

    const int n  = a.n_group*a.d_v;
    const int i0 = (int) ((int64_t) n* rank     /a.n_team);
    const int i1 = (int) ((int64_t) n*(rank + 1)/a.n_team);

    float * out = a.dst + (((int64_t) u.s*a.n_row + u.t)*a.n_head_kv + u.g)*n;

#pragma unroll 1
    for (int i = i0 + threadIdx.x; i < i1; i += N_THREAD) {
        const int     h    = i/a.d_v;
        const float * from = part + h*width + i%a.d_v;
        float y = 0.0f;
#pragma unroll 8
        for (int b = 0; b < a.n_team; ++b) {
            y += share[b*a.n_group + h]*__ldcg(from + b*stride);
        }
        out[i] = y;
    }
    __syncthreads();
}

} // namespace fasa
