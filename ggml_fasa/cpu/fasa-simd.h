// The few vector operations that the FASA kernels need, over the widest float vector the build targets:
// AVX-512, AVX2 with FMA and F16C, NEON, or one float. Every kernel is written once on top of these.

#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fasa {

#if defined(__AVX512F__)

constexpr int W = 16;
using vec = __m512;

inline vec   zero()                                { return _mm512_setzero_ps(); }
inline vec   splat(float x)                        { return _mm512_set1_ps(x); }
inline vec   load(const float * p)                 { return _mm512_loadu_ps(p); }
inline vec   load(const ggml_fp16_t * p)           { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline void  store(float * p, vec a)               { _mm512_storeu_ps(p, a); }
inline vec   add(vec a, vec b)                     { return _mm512_add_ps(a, b); }
inline vec   sub(vec a, vec b)                     { return _mm512_sub_ps(a, b); }
inline vec   mul(vec a, vec b)                     { return _mm512_mul_ps(a, b); }
inline vec   fma(vec a, vec b, vec c)              { return _mm512_fmadd_ps(a, b, c); }
inline vec   max(vec a, vec b)                     { return _mm512_max_ps(a, b); }
inline float hsum(vec a)                           { return _mm512_reduce_add_ps(a); }
inline float hmax(vec a)                           { return _mm512_reduce_max_ps(a); }
inline bool  any_ge(vec a, vec b)                  { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ) != 0; }
inline vec   round(vec a)                          { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline vec   ldexp(vec a, vec n)                   { return _mm512_scalef_ps(a, n); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr int W = 8;
using vec = __m256;

inline vec   zero()                                { return _mm256_setzero_ps(); }
inline vec   splat(float x)                        { return _mm256_set1_ps(x); }
inline vec   load(const float * p)                 { return _mm256_loadu_ps(p); }
inline vec   load(const ggml_fp16_t * p)           { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline void  store(float * p, vec a)               { _mm256_storeu_ps(p, a); }
inline vec   add(vec a, vec b)                     { return _mm256_add_ps(a, b); }
inline vec   sub(vec a, vec b)                     { return _mm256_sub_ps(a, b); }
inline vec   mul(vec a, vec b)                     { return _mm256_mul_ps(a, b); }
inline vec   fma(vec a, vec b, vec c)              { return _mm256_fmadd_ps(a, b, c); }
inline vec   max(vec a, vec b)                     { return _mm256_max_ps(a, b); }
inline float hsum(vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float hmax(vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline bool  any_ge(vec a, vec b)                  { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)) != 0; }
inline vec   round(vec a)                          { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vec   ldexp(vec a, vec n) { // n in [-126, 127]
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

constexpr int W = 4;
using vec = float32x4_t;

inline vec   zero()                                { return vdupq_n_f32(0.0f); }
inline vec   splat(float x)                        { return vdupq_n_f32(x); }
inline vec   load(const float * p)                 { return vld1q_f32(p); }
inline vec   load(const ggml_fp16_t * p)           { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void  store(float * p, vec a)               { vst1q_f32(p, a); }
inline vec   add(vec a, vec b)                     { return vaddq_f32(a, b); }
inline vec   sub(vec a, vec b)                     { return vsubq_f32(a, b); }
inline vec   mul(vec a, vec b)                     { return vmulq_f32(a, b); }
inline vec   fma(vec a, vec b, vec c)              { return vfmaq_f32(c, a, b); }
inline vec   max(vec a, vec b)                     { return vmaxq_f32(a, b); }
inline float hsum(vec a)                           { return vaddvq_f32(a); }
inline float hmax(vec a)                           { return vmaxvq_f32(a); }
inline bool  any_ge(vec a, vec b)                  { return vmaxvq_u32(vcgeq_f32(a, b)) != 0; }
inline vec   round(vec a)                          { return vrndnq_f32(a); }
inline vec   ldexp(vec a, vec n) { // n in [-126, 127]
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}

#else

constexpr int W = 1;
using vec = float;

inline vec   zero()                                { return 0.0f; }
inline vec   splat(float x)                        { return x; }
inline vec   load(const float * p)                 { return *p; }
inline vec   load(const ggml_fp16_t * p)           { return ggml_fp16_to_fp32(*p); }
inline void  store(float * p, vec a)               { *p = a; }
inline vec   add(vec a, vec b)                     { return a + b; }
inline vec   sub(vec a, vec b)                     { return a - b; }
inline vec   mul(vec a, vec b)                     { return a*b; }
inline vec   fma(vec a, vec b, vec c)              { return a*b + c; }
inline vec   max(vec a, vec b)                     { return a > b ? a : b; }
inline float hsum(vec a)                           { return a; }
inline float hmax(vec a)                           { return a; }
inline bool  any_ge(vec a, vec b)                  { return a >= b; }
inline vec   round(vec a)                          { return std::nearbyint(a); }
inline vec   ldexp(vec a, vec n)                   { return std::ldexp(a, (int) n); }

#endif

// The power of two nearest e^x, as an exponent.
inline vec exp2_round(vec x) {
    return round(mul(x, splat(1.44269504f)));
}

// 2^-n0 * e^x for n0 = exp2_round of some x0 >= x: 2^(n - n0) times the Taylor series of e^r with |r| <= ln(2)/2, relative
// error about 2e-7. Results of one x for different n0 differ by a power of two, exactly. Below x0 - 87 the result stays
// near 1e-38 instead of 0, which no softmax can tell apart.
inline vec exp_scaled(vec x, vec x0, vec n0) {
    x = max(x, sub(x0, splat(87.0f)));
    const vec n = exp2_round(x);
    vec r = fma(n, splat(-0.693359375f), x);
    r     = fma(n, splat(2.12194440e-4f), r);
    vec p = splat(1.0f/720.0f);
    p = fma(p, r, splat(1.0f/120.0f));
    p = fma(p, r, splat(1.0f/24.0f));
    p = fma(p, r, splat(1.0f/6.0f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return ldexp(p, max(sub(n, n0), splat(-126.0f)));
}

// exp for x <= 0.
inline vec exp_neg(vec x) {
    return exp_scaled(x, zero(), zero());
}

} // namespace fasa
