// Stage fac on CUDA: exact attention of one KV group over the selected cells, paper section 4.2.
//
// The blocks of a unit each attend to the cells selected out of their own, then each merges a piece of the output, in a fixed
// order, so that results repeat bit by bit.

#pragma once

#include "fasa-cache.cuh"
#include "fasa-select.cuh"
#include "fasa-stages.cuh"
#include "fasa-tip.cuh"

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

    // To values 8 * l .. + 7 of a row in shared memory: F16 as they are, else F32.
    template <typename T>
    __device__ __forceinline__ void put(T * to) const {
        if constexpr (F16) {
            *(uint4 *) to = bits;
        } else {
            ((float4 *) to)[0] = values[0];
            ((float4 *) to)[1] = values[1];
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

// What a thread holds of the K and V row of a cell. LANES: threads of a row, 8 values each.
template <int LANES, row_source ROWS>
struct fac_cell {
    fac_row<ROWS != ROWS_ANY> k, v;

    // Asks for cell c of the list; zeros if it has not so many. cache: of ROWS_CACHED.
    __device__ __forceinline__ void load(
            const attn_args & a, const unit & u, const row_cache * cache, const int32_t * list, int n, int c) {
        const int l = threadIdx.x%LANES;
        const size_t cell = c < n ? list[c] : 0;
        const char * k_row = a.k + u.s*a.k_nb3 + u.g*a.k_nb2 + cell*a.k_nb1;
        const char * v_row = a.v + u.s*a.v_nb3 + u.g*a.v_nb2 + cell*a.v_nb1;
        if constexpr (ROWS == ROWS_CACHED) {
            if (c < n) {
                cache->redirect(c, a.d_k, k_row, v_row);
            }
        }
        k.load(k_row, l, c < n ? a.d_k : 0, a.k_type);
        v.load(v_row, l, c < n ? a.d_v : 0, a.v_type);
    }
};

constexpr int FAC_VALUES = 16384; // of K, and of V, that fac_heads_f16 has in shared memory

// Threads for a row.
static int fac_lanes(const attn_args & a) {
    const int d = std::max(a.d_k, a.d_v);
    return d <= 64 ? 8 : d <= 128 ? 16 : 32;
}

// Shared memory of fac_heads and of fac_merge, in floats.
static int fac_shared(const attn_args & a) {
    const int n_cell = 2*FAC_THREAD/fac_lanes(a); // see there
    const int d      = 8*fac_lanes(a);
    const int n_f16  = FAC_VALUES/d;              // see fac_rows
    return std::max({ n_cell*(d + a.n_fac), n_f16*(d + 8 + a.n_fac), FAC_THREAD + MAX_PART*a.n_group });
}

// Sums x[0 .. N) over LANES neighbouring lanes. Lane l gets the sum of x[l*N/LANES].
template <int N, int LANES>
static __device__ __forceinline__ float sum_lanes(float (&x)[N], int l) {
    static_assert(N <= LANES);
    int o = LANES/2;
#pragma unroll
    for (int n = N/2; n > 0; n /= 2) {
        const bool high = l & o;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float other = __shfl_xor_sync(0xFFFFFFFFu, high ? x[i] : x[i + n], o);
            x[i] = (high ? x[i + n] : x[i]) + other;
        }
        o /= 2;
    }
#pragma unroll
    for (; o > 0; o /= 2) {
        x[0] += __shfl_xor_sync(0xFFFFFFFFu, x[0], o);
    }
    return x[0];
}

// Output d of a head, as far as the block has it, to the block's letter, or to a.part of a unit's only block.
static __device__ __forceinline__ void fac_put(const attn_args & a, const unit & u, int head, int d, float y) {
    if (a.n_part > 1) {
        const uint32_t bits = ~__float_as_uint(y);
        put_word(letter_of(a, u, u.rank).part + head*a.d_v + d, bits != 0 ? bits : ~0x7FFFFFFFu);
    } else {
        a.part[((size_t) u.at*a.n_group + head)*(a.d_v + 2) + d] = y;
    }
}

// The largest logit m of a head and the sum of 2^(logit - m), likewise, by several threads, of which this is the one at first.
static __device__ __forceinline__ void fac_put_top(
        const attn_args & a, const unit & u, int head, int first, int n_thread, float m, float z) {
    if (a.n_part > 1) {
        for (int to = first; to < a.n_part; to += n_thread) {
            put_word(letter_of(a, u, u.rank).tops[to] + head, pack(m, z));
        }
    } else if (first == 0) {
        float * out = a.part + ((size_t) u.at*a.n_group + head)*(a.d_v + 2) + a.d_v;
        out[0] = m;
        out[1] = z;
    }
}

// N neighbouring values of V in shared memory.
template <int N, typename T>
static __device__ __forceinline__ void load_values(const T * p, float * x) {
    struct alignas(N*sizeof(T)) { T value[N]; } v;
    v = *(const decltype(v) *) p;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = (float) v.value[i];
    }
}

// Attention of heads [h0, h0 + NH) over cells list[0 .. n). work: of fac_shared.
// To the block's letter, or to a.part of a unit's only block: for each head sum of p * v, then the largest logit in powers of two,
// then the sum of p.
//
// LANES threads multiply K of a cell with the queries and put its V into shared memory; then a thread has OUT outputs of its own.
template <int NH, int LANES, row_source ROWS>
static __device__ __forceinline__ void fac_heads(
        const attn_args & a, const unit & u, const float * q, row_cache & cache, int h0, const int32_t * list, int n,
        float * work) {
    using value_t = std::conditional_t<ROWS == ROWS_ANY, float, half>;
    constexpr int D    = 8*LANES;
    constexpr int STEP = FAC_THREAD/LANES;                          // cells at once
    constexpr int OUT  = NH*D > FAC_THREAD ? NH*D/FAC_THREAD : 1;
    constexpr int SOME = STEP < WARP_SIZE ? STEP : WARP_SIZE;       // cells that a warp weighs at once
    constexpr int N    = 4;                                         // cells that it adds up at once

    const int lane = threadIdx.x%WARP_SIZE;
    const int l    = threadIdx.x%LANES;
    const int mine = threadIdx.x/LANES;       // cell
    const int h    = threadIdx.x*OUT/D;       // that of the thread's outputs, the same for a warp
    const int d    = threadIdx.x*OUT%D;
    const int n_head = min(NH, a.n_group - h0);

    value_t * values = (value_t *) work;      // [2][STEP][D]
    float   * logits = work + 2*STEP*D;       // [2][NH][STEP]

    fac_cell<LANES, ROWS> held;
    held.load(a, u, &cache, list, n, mine);
    if constexpr (ROWS == ROWS_CACHED) {
        if (h0 == 0) {
            cache.place(list, n);
        }
    }
    if (h0 > 0) {
        __syncthreads(); // work may still be read
    }
    float acc[OUT] = {};
    float z = 0.0f; // of the lane's cells
    float m = SCORE_NONE;
#pragma unroll 1
    for (int base = 0; base < n; base += STEP) {
        const int c = base + mine;
        float x[8];
        held.k.get(x);
        held.v.put(values + mine*D + 8*l);
        if constexpr (ROWS == ROWS_CACHED) {
            if (h0 == 0 && c < n) {
                cache.keep(c, l, a.d_k, a.d_v, held.k.bits, held.v.bits);
            }
        }
        if (base + STEP < n) {
            held.load(a, u, &cache, list, n, c + STEP); // the next cell is on its way while this one is worked on
        }
        float s[NH] = {};
        if (8*l < a.d_k) {
#pragma unroll
            for (int i = 0; i < NH; ++i) {
                const float4 q0 = *(const float4 *) (q + i*a.d_k + 8*l);
                const float4 q1 = *(const float4 *) (q + i*a.d_k + 8*l + 4);
                s[i] = x[0]*q0.x + x[1]*q0.y + x[2]*q0.z + x[3]*q0.w + x[4]*q1.x + x[5]*q1.y + x[6]*q1.z + x[7]*q1.w;
            }
        }
        float logit = sum_lanes<NH, LANES>(s, l)*a.scale;
        if (a.softcap != 0.0f) {
            logit = a.softcap*tanhf(logit/a.softcap);
        }
        if (l%(LANES/NH) == 0) {
            logits[l/(LANES/NH)*STEP + mine] = c < n ? logit*LOG2E : SCORE_NONE;
        }
        __syncthreads();
        if (h < n_head) {
#pragma unroll 1
            for (int first = 0; first < STEP && base + first < n; first += SOME) {
                const int   some = min(n - base - first, SOME);
                const float top  = lane < some ? logits[h*STEP + first + lane] : SCORE_NONE;
                const float now  = fmaxf(m, warp_max(top));
                const float f    = exp2f(m - now);
                const float p    = lane < some ? exp2f(top - now) : 0.0f;
                m = now;
                z = z*f + p;
#pragma unroll
                for (int e = 0; e < OUT; ++e) {
                    acc[e] *= f;
                }
                const value_t * from = values + first*D + d;
#pragma unroll 1
                for (int i = 0; i < some; i += N) { // rows beyond are 0
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                        float v[OUT];
                        load_values<OUT>(from + (i + j)*D, v);
                        const float p_cell = __shfl_sync(0xFFFFFFFFu, p, i + j);
#pragma unroll
                        for (int e = 0; e < OUT; ++e) {
                            acc[e] += p_cell*v[e];
                        }
                    }
                }
            }
        }
        // the other half: this one is read until all have met again
        const int half_of = base/STEP%2 == 0 ? 1 : -1;
        values += half_of*STEP*D;
        logits += half_of*STEP*NH;
    }
    if (h >= n_head) {
        return;
    }
    z = warp_sum(z);
    if (d < WARP_SIZE*OUT) { // a warp for each head
        fac_put_top(a, u, h0 + h, lane, WARP_SIZE, m, z);
    }
#pragma unroll
    for (int e = 0; e < OUT; ++e) {
        if (d + e < a.d_v) {
            fac_put(a, u, h0 + h, d + e, acc[e]);
        }
    }
}

// --- fac of F16 rows by matrix instructions ---

// Where fac_heads_f16 has rows of K and V in shared memory. A row is longer than it need be, so that rows lie in different banks.
template <int LANES>
struct fac_rows {
    static constexpr int D      = 8*LANES;
    static constexpr int LEN    = D + 8;
    static constexpr int N_CELL = FAC_VALUES/D; // at once
    static constexpr int STEP   = FAC_THREAD/LANES;

    half * k; // [N_CELL][LEN]
    half * v;

    __device__ __forceinline__ explicit fac_rows(float * work) : k((half *) work), v(k + N_CELL*LEN) {}

    static constexpr int SIZE = N_CELL*LEN; // of both, in floats

    // Loads cells of the list from first on, N_CELL or as many as there are, and 0 for more up to a multiple of 16. cache: of
    // ROWS_CACHED; keep: whether it gets the rows.
    template <row_source ROWS>
    __device__ __forceinline__ void load(
            const attn_args & a, const unit & u, row_cache & cache, const int32_t * list, int n, int first, bool keep) const {
        const int l     = threadIdx.x%LANES;
        const int n_pad = min((n - first + 15)/16*16, N_CELL);
        const char * k_rows = a.k + u.s*a.k_nb3 + u.g*a.k_nb2;
        const char * v_rows = a.v + u.s*a.v_nb3 + u.g*a.v_nb2;
#pragma unroll 1
        for (int c = threadIdx.x/LANES; c < n_pad; c += STEP) {
            const bool   in    = first + c < n;
            const size_t cell  = in ? list[first + c] : 0;
            const char * k_row = k_rows + cell*a.k_nb1;
            const char * v_row = v_rows + cell*a.v_nb1;
            if constexpr (ROWS == ROWS_CACHED) {
                if (in) {
                    cache.redirect(first + c, a.d_k, k_row, v_row);
                }
            }
            copy(k + c*LEN + 8*l, k_row + 16*l, in && 8*l < a.d_k);
            copy(v + c*LEN + 8*l, v_row + 16*l, in && 8*l < a.d_v);
        }
        if constexpr (ROWS == ROWS_CACHED) {
            if (keep && first == 0) {
                cache.place(list, n);
            }
        }
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
        if constexpr (ROWS == ROWS_CACHED) {
#pragma unroll 1
            for (int c = threadIdx.x/LANES; keep && c < min(n - first, N_CELL); c += STEP) { // what the thread itself has copied
                cache.keep(first + c, l, a.d_k, a.d_v, *(const uint4 *) (k + c*LEN + 8*l), *(const uint4 *) (v + c*LEN + 8*l));
            }
        }
        __syncthreads();
    }

private:
    static __device__ __forceinline__ void copy(half * to, const char * from, bool in) {
        if (!in) {
            *(uint4 *) to = make_uint4(0, 0, 0, 0);
            return;
        }
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
        const uint32_t at = __cvta_generic_to_shared(to);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
#else
        *(uint4 *) to = *(const uint4 *) from;
#endif
    }
};

// d += x * y, x [16][16], y [16][8]. x: of lane l rows l/4 and l/4 + 8 (odd registers), columns 2*(l%4) and the next, and those 8
// further (x[2], x[3]). y: of lane l column l/4, rows 2*(l%4) and the next, and those 8 further. d: rows as x, columns 2*(l%4) and
// the next.
static __device__ __forceinline__ void multiply_half(float (&d)[4], const uint32_t (&x)[4], const uint32_t (&y)[2]) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_AMPERE
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
#else
    GGML_UNUSED_VARS(d, x, y);
    NO_DEVICE_CODE;
#endif
}

// Matrix x of multiply_half: [16][16] values at p, rows of len values.
static __device__ __forceinline__ void load_x(uint32_t (&x)[4], const half * p, int len) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_TURING
    const int      lane = threadIdx.x%WARP_SIZE;
    const uint32_t at   = __cvta_generic_to_shared(p + lane%16*len + lane/16*8);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
#else
    GGML_UNUSED_VARS(x, p, len);
#endif
}

// Matrix y of multiply_half: [16][8] values at p, rows of len values.
static __device__ __forceinline__ void load_y(uint32_t (&y)[2], const half * p, int len) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_TURING
    const uint32_t at = __cvta_generic_to_shared(p + threadIdx.x%16*len);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(at) : "memory");
#else
    GGML_UNUSED_VARS(y, p, len);
#endif
}

// Two numbers as the sum of two halves each: what a half of them leaves goes into the other, so that nothing to speak of is lost.
static __device__ __forceinline__ void split(float x, float y, uint32_t & high, uint32_t & low) {
    const half2  h = __floats2half2_rn(x, y);
    const float2 f = __half22float2(h);
    const half2  l = __floats2half2_rn(x - f.x, y - f.y);
    high = *(const uint32_t *) &h;
    low  = *(const uint32_t *) &l;
}

// As fac_heads, of F16 rows on devices with matrix instructions.
template <int NH, int LANES, row_source ROWS>
static __device__ __forceinline__ void fac_heads_f16(
        const attn_args & a, const unit & u, const float * q, row_cache & cache, int h0, const int32_t * list, int n,
        float * work) {
    using rows_t = fac_rows<LANES>;
    constexpr int LEN    = rows_t::LEN;
    constexpr int N_CELL = rows_t::N_CELL;
    constexpr int N_OUT  = (rows_t::D/8 + FAC_WARP - 1)/FAC_WARP; // eights of outputs that a warp has

    const int lane = threadIdx.x%WARP_SIZE;
    const int warp = threadIdx.x/WARP_SIZE;
    const int n_head = min(NH, a.n_group - h0);
    const int r = lane/4;   // the lane's head
    const int c = 2*(lane%4);

    const rows_t rows(work);
    float * logits = work + rows_t::SIZE; // [NH][N_CELL]

    float acc[N_OUT][4] = {};
    float z = 0.0f;
    float m = SCORE_NONE;
#pragma unroll 1
    for (int base = 0; base < n; base += N_CELL) {
        const int some = min(n - base, N_CELL);
        if (base > 0 || h0 > 0) {
            __syncthreads(); // work may still be read
        }
        rows.template load<ROWS>(a, u, cache, list, n, base, h0 == 0);

        // a warp for 16 cells
        if (16*warp < some) {
            float high[4] = {};
            float low[4]  = {};
            const float * row = q + min(r, NH - 1)*a.d_k + c;
#pragma unroll 1
            for (int d = 0; d < a.d_k; d += 16) {
                uint32_t x[4];
                load_x(x, rows.k + 16*warp*LEN + d, LEN);
                const float2 q0 = *(const float2 *) (row + d);
                const float2 q1 = d + 8 < a.d_k ? *(const float2 *) (row + d + 8) : make_float2(0.0f, 0.0f);
                uint32_t y[2];
                uint32_t rest[2];
                split(q0.x*a.scale, q0.y*a.scale, y[0], rest[0]);
                split(q1.x*a.scale, q1.y*a.scale, y[1], rest[1]);
                multiply_half(high, x, y);
                multiply_half(low, x, rest);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int h    = c + i%2;
                const int cell = 16*warp + r + i/2*8;
                float logit = high[i] + low[i];
                if (a.softcap != 0.0f) {
                    logit = a.softcap*tanhf(logit/a.softcap);
                }
                if (h < NH) {
                    logits[h*N_CELL + cell] = cell < some ? logit*LOG2E : SCORE_NONE;
                }
            }
        }
        __syncthreads();

        // a warp for outputs; each weighs the cells for itself
        if (8*warp < a.d_v) {
            const float * mine = logits + min(r, NH - 1)*N_CELL + c;
            float now = m;
#pragma unroll 1
            for (int i = 0; i < some; i += 16) {
                const float2 l0 = *(const float2 *) (mine + i);
                const float2 l1 = *(const float2 *) (mine + i + 8);
                now = fmaxf(now, fmaxf(fmaxf(l0.x, l0.y), fmaxf(l1.x, l1.y)));
            }
            now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xFFFFFFFFu, now, 2));
            const float f = exp2f(m - now);
            m = now;
            z *= f;
#pragma unroll
            for (int o = 0; o < N_OUT; ++o) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[o][i] *= f;
                }
            }
#pragma unroll 1
            for (int i = 0; i < some; i += 16) {
                const float2 l0 = *(const float2 *) (mine + i);
                const float2 l1 = *(const float2 *) (mine + i + 8);
                const float p[4] = { exp2f(l0.x - m), exp2f(l0.y - m), exp2f(l1.x - m), exp2f(l1.y - m) };
                z += (p[0] + p[1]) + (p[2] + p[3]);
                uint32_t x[4]; // rows of heads, 8 further what is left of them
                split(p[0], p[1], x[0], x[1]);
                split(p[2], p[3], x[2], x[3]);
#pragma unroll
                for (int o = 0; o < N_OUT; ++o) {
                    if (8*(warp + o*FAC_WARP) < a.d_v) {
                        uint32_t y[2];
                        load_y(y, rows.v + i*LEN + 8*(warp + o*FAC_WARP), LEN);
                        multiply_half(acc[o], x, y);
                    }
                }
            }
        }
    }
    z += __shfl_xor_sync(0xFFFFFFFFu, z, 1);
    z += __shfl_xor_sync(0xFFFFFFFFu, z, 2);
    if (r < n_head) {
        if (warp == 0) {
            fac_put_top(a, u, h0 + r, lane%4, 4, m, z);
        }
#pragma unroll
        for (int o = 0; o < N_OUT; ++o) {
            const int d = 8*(warp + o*FAC_WARP) + c;
            if (d < a.d_v) {
                fac_put(a, u, h0 + r, d,     acc[o][0] + acc[o][2]);
                fac_put(a, u, h0 + r, d + 1, acc[o][1] + acc[o][3]);
            }
        }
    }
}

// This block's piece of the output of a unit, from what fac_heads of its blocks left; waits for it. work: [n_group][MAX_PART] +
// [FAC_THREAD] floats of shared memory.
static __device__ __forceinline__ void fac_merge(const attn_args & a, const unit & u, float * work) {
    const int lane  = threadIdx.x%WARP_SIZE;
    const int n     = a.n_group*a.d_v;
    const int width = FAC_THREAD >> a.part_log2; // outputs of a block at once
    const int b     = threadIdx.x/width;         // a thread for an output and part
    float * share = work;
    float * sums  = work + a.n_group*MAX_PART;

    const float * part = a.part + (size_t) u.at*a.n_group*(a.d_v + 2); // of a unit's only block
    float       * out  = a.dst + (((int64_t) u.s*a.n_row + u.t)*a.n_head_kv + u.g)*n;

    auto at = [&](int i) -> uint32_t * { // where a part of output i is, nullptr if it is not the thread's
        return a.n_part > 1 && b < a.n_part && i < n ? letter_of(a, u, b).part + i : nullptr;
    };
    auto value = [&](uint32_t * at, uint32_t bits, int i) {
        if (at) {
            put_word(at, 0u); // nobody else reads it
            return __uint_as_float(~bits);
        }
        return a.n_part == 1 && b == 0 && i < n ? part[i + 2*fastdiv(i, a.div_d_v)] : 0.0f;
    };

    // the first output and, a warp for a head, a lane for a part, what each part weighs: asked for together
    const int  h    = threadIdx.x/WARP_SIZE;
    int        i    = u.rank*width + threadIdx.x%width;
    uint32_t * mine = at(i);
    uint64_t * top  = a.n_part > 1 && h < a.n_group && lane < a.n_part ? letter_of(a, u, lane).tops[u.rank] + h : nullptr;
    uint32_t   bits = 0;
    uint64_t   top_bits = 0;
    while ((mine && bits == 0) || (top && top_bits == 0)) {
        if (mine) {
            bits = look_at_word(mine);
        }
        if (top) {
            top_bits = look_at_word(top);
        }
    }
    float y = value(mine, bits, i);
    if (h < a.n_group) {
        float2 x = make_float2(SCORE_NONE, 0.0f);
        if (top) {
            put_word(top, uint64_t(0));
            x = unpack(top_bits);
        } else if (a.n_part == 1 && lane == 0) {
            const float * from = part + h*(a.d_v + 2) + a.d_v;
            x = make_float2(from[0], from[1]);
        }
        const float2 all  = softmax_sum(x);
        const float  sink = a.sinks ? a.sinks[u.g*a.n_group + h]*LOG2E : SCORE_NONE;
        const float  m    = fmaxf(all.x, sink);
        const float  z    = all.y*exp2f(all.x - m) + (a.sinks ? exp2f(sink - m) : 0.0f);
        if (lane < MAX_PART) {
            share[h*MAX_PART + lane] = x.y > 0.0f ? exp2f(x.x - m)/z : 0.0f;
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int base = u.rank*width; base < n; base += a.n_part*width) {
        const int h_out = min((int) fastdiv(i, a.div_d_v), a.n_group - 1);
        sums[threadIdx.x] = b < a.n_part ? y*share[h_out*MAX_PART + b] : 0.0f;
        __syncthreads();
        if (threadIdx.x < width && i < n) {
            float sum = 0.0f;
#pragma unroll 4
            for (int at = threadIdx.x; at < FAC_THREAD; at += width) {
                sum += sums[at];
            }
            out[i] = sum;
        }
        i += a.n_part*width;
        mine = at(i);
        y = value(mine, mine ? read_word(mine) : 0, i);
        __syncthreads();
    }
}

} // namespace fasa
