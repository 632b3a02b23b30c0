// Reading rows of the K and V cache, whatever their type.

#pragma once

#include "common.cuh"

namespace fasa {

inline bool cache_type_supported(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_F32:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
            return true;
        default:
            return false;
    }
}

static __device__ __forceinline__ void half4(const uint2 & u, float * x) {
    const float2 lo = __half22float2(*(const half2 *) &u.x);
    const float2 hi = __half22float2(*(const half2 *) &u.y);
    x[0] = lo.x; x[1] = lo.y; x[2] = hi.x; x[3] = hi.y;
}

// Four integers of 4 or 5 bits of a block: elements o .. o + 3, o a multiple of 4. qh: the fifth bits, or 0.
static __device__ __forceinline__ void nibbles4(const uint8_t * qs, uint32_t qh, int o, int * v) {
    const int shift = o < 16 ? 0 : 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[i] = ((qs[o % 16 + i] >> shift) & 0x0F) | (((qh >> (o + i)) & 1) << 4);
    }
}

static __device__ __forceinline__ uint32_t unaligned32(const uint8_t * p) {
    return p[0] | (p[1] << 8) | (p[2] << 16) | ((uint32_t) p[3] << 24);
}

// Values i .. i + 3 of a row, i a multiple of 4.
static __device__ __noinline__ float4 load4_any(const char * row, int i, ggml_type type) {
    const int b = i/32;
    const int o = i%32;
    float d = 1.0f;
    float m = 0.0f;
    int   v[4];
    switch (type) {
        case GGML_TYPE_F16: {
            float x[4];
            half4(*(const uint2 *) (row + 2*i), x);
            return make_float4(x[0], x[1], x[2], x[3]);
        }
        case GGML_TYPE_BF16: {
            const uint2 u = *(const uint2 *) (row + 2*i);
            return make_float4(__uint_as_float(u.x << 16), __uint_as_float(u.x & 0xFFFF0000u),
                               __uint_as_float(u.y << 16), __uint_as_float(u.y & 0xFFFF0000u));
        }
        case GGML_TYPE_F32: {
            return *(const float4 *) (row + 4*i);
        }
        case GGML_TYPE_Q8_0: {
            const block_q8_0 * q = (const block_q8_0 *) row + b;
            d = __half2float(q->d);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] = q->qs[o + j];
            }
        } break;
        case GGML_TYPE_Q5_1: {
            const block_q5_1 * q = (const block_q5_1 *) row + b;
            const float2 dm = __half22float2(q->dm);
            d = dm.x;
            m = dm.y;
            nibbles4(q->qs, unaligned32(q->qh), o, v);
        } break;
        case GGML_TYPE_Q5_0: {
            const block_q5_0 * q = (const block_q5_0 *) row + b;
            d = __half2float(q->d);
            nibbles4(q->qs, unaligned32(q->qh), o, v);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] -= 16;
            }
        } break;
        case GGML_TYPE_Q4_1: {
            const block_q4_1 * q = (const block_q4_1 *) row + b;
            const float2 dm = __half22float2(q->dm);
            d = dm.x;
            m = dm.y;
            nibbles4(q->qs, 0, o, v);
        } break;
        case GGML_TYPE_Q4_0: {
            const block_q4_0 * q = (const block_q4_0 *) row + b;
            d = __half2float(q->d);
            nibbles4(q->qs, 0, o, v);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] -= 8;
            }
        } break;
        default:
            NO_DEVICE_CODE;
    }
    return make_float4(__fadd_rn(__fmul_rn(d, v[0]), m), __fadd_rn(__fmul_rn(d, v[1]), m),
                       __fadd_rn(__fmul_rn(d, v[2]), m), __fadd_rn(__fmul_rn(d, v[3]), m));
}

// Undoes the Walsh-Hadamard rotation of n values in shared memory, blocks of size block, by the lanes of a warp.
static __device__ __forceinline__ void unrotate_warp(float * x, int n, int block, int lane) {
    for (int len = 1; len < block; len *= 2) {
        for (int i = lane; i < n/2; i += WARP_SIZE) {
            const int at = (i/len)*2*len + i%len;
            const float a = x[at];
            const float b = x[at + len];
            x[at]       = a + b;
            x[at + len] = a - b;
        }
        __syncwarp();
    }
    const float scale = __frsqrt_rn((float) block);
    for (int i = lane; i < n; i += WARP_SIZE) {
        x[i] = __fmul_rn(x[i], scale);
    }
    __syncwarp();
}

} // namespace fasa
