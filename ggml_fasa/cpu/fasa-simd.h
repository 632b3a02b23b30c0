// The few vector operations that the FASA kernels need, over the widest vector the build targets: AVX-512, AVX2 with FMA
// and F16C, NEON, or one float. Every kernel is written once on top of these.
//
// scale2 is a * 2^(t - ROUND), where t is of ROUND's binade and a and the result are normal.
//
// ivec holds W int32. dot4 and dot8 add to each the sum of four products of bytes of x and q, q being signed: dot4 of
// x in 0..15; dot8 of x - 128 + BIAS8, so that what one instruction computes is what is computed. dot4 may keep the products
// of the lower and of the upper two bytes apart, in 16 bits. It adds to a splat of dot4_start of -8 times the sum of the lower
// and of the upper bytes of all q that follow, DOT4_RUN times at most: what is on the way to a sum of q*(x - 8) is no larger
// than 2*16*127*8 then. In the end dot4_end adds either to acc.

#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#include <intrin.h>
#endif
#if (defined(__AVX512F__) && defined(__AVX512BW__)) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fasa {

constexpr float ROUND = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to an integer, which its lowest bits hold

// Asks for the cache line at p, which may lie beyond what is allocated; into L1.
inline void prefetch(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void) p;
#endif
}

// The same for the lines that hold size bytes, into L2, which takes in more at a time than L1.
inline void prefetch(const void * p, size_t size) {
#if defined(__GNUC__)
    const uintptr_t end = (uintptr_t) p + size;
    for (uintptr_t line = (uintptr_t) p & ~(uintptr_t) 63; line < end; line += 64) {
        __builtin_prefetch((const void *) line, 0, 2);
    }
    __asm__ volatile(""); // GCC drops calls of a function that does nothing else
#else
    (void) p;
    (void) size;
#endif
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

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
inline void  hsum4(vec a, vec b, vec c, vec d, float * out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 s  = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE)); // in every 128 bits
    const __m256 t  = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_castps512_ps256(_mm512_shuffle_f32x4(s, s, 0xEE)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
inline uint32_t ge_bits(vec a, vec b)              { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline vec   scale2(vec a, vec t) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}

using ivec = __m512i;

inline ivec  iload(const void * p)                 { return _mm512_loadu_si512(p); }
inline void  istore(void * p, ivec a)              { _mm512_storeu_si512(p, a); }
inline ivec  isplat(int32_t x)                     { return _mm512_set1_epi32(x); }
inline vec   to_float(ivec a)                      { return _mm512_cvtepi32_ps(a); }
inline ivec  low_nibbles(ivec x)                   { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline ivec  high_nibbles(ivec x)                  { return low_nibbles(_mm512_srli_epi16(x, 4)); }
#if defined(__AVX512VNNI__)
constexpr int BIAS8 = 128;
inline int32_t dot4_start(int32_t low, int32_t high) { return low + high; }
inline ivec  dot4_end(ivec acc, ivec sums)         { return _mm512_add_epi32(acc, sums); }
inline ivec  dot4(ivec acc, ivec x, ivec q)        { return _mm512_dpbusd_epi32(acc, x, q); }
inline ivec  dot8(ivec acc, ivec x, ivec q)        { return _mm512_dpbusd_epi32(acc, x, q); }
#else
constexpr int BIAS8 = 0;
inline ivec  pair_sums(ivec x)                     { return _mm512_madd_epi16(x, _mm512_set1_epi16(1)); }
inline int32_t dot4_start(int32_t low, int32_t high) { return (int32_t) ((uint32_t) high << 16 | (uint16_t) low); }
inline ivec  dot4_end(ivec acc, ivec pairs)        { return _mm512_add_epi32(acc, pair_sums(pairs)); }
inline ivec  dot4(ivec pairs, ivec x, ivec q)      { return _mm512_add_epi16(pairs, _mm512_maddubs_epi16(x, q)); }
inline ivec  dot8(ivec acc, ivec x, ivec q) { // |x - 128| times q with its sign: pairs fit 16 bits
    const ivec y = _mm512_xor_si512(x, _mm512_set1_epi8(-128));
    const ivec s = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(y), _mm512_setzero_si512(), q);
    return _mm512_add_epi32(acc, pair_sums(_mm512_maddubs_epi16(_mm512_abs_epi8(y), s)));
}
#endif

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
inline void  hsum4(vec a, vec b, vec c, vec d, float * out) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 s  = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE)); // in both halves
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
inline uint32_t ge_bits(vec a, vec b)              { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline vec   scale2(vec a, vec t) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}

using ivec = __m256i;

inline ivec  iload(const void * p)                 { return _mm256_loadu_si256((const __m256i *) p); }
inline void  istore(void * p, ivec a)              { _mm256_storeu_si256((__m256i *) p, a); }
inline ivec  isplat(int32_t x)                     { return _mm256_set1_epi32(x); }
inline vec   to_float(ivec a)                      { return _mm256_cvtepi32_ps(a); }
inline ivec  low_nibbles(ivec x)                   { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline ivec  high_nibbles(ivec x)                  { return low_nibbles(_mm256_srli_epi16(x, 4)); }
#if defined(__AVXVNNI__)
constexpr int BIAS8 = 128;
inline int32_t dot4_start(int32_t low, int32_t high) { return low + high; }
inline ivec  dot4_end(ivec acc, ivec sums)         { return _mm256_add_epi32(acc, sums); }
inline ivec  dot4(ivec acc, ivec x, ivec q)        { return _mm256_dpbusd_avx_epi32(acc, x, q); }
inline ivec  dot8(ivec acc, ivec x, ivec q)        { return _mm256_dpbusd_avx_epi32(acc, x, q); }
#else
constexpr int BIAS8 = 0;
inline ivec  pair_sums(ivec x)                     { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
inline int32_t dot4_start(int32_t low, int32_t high) { return (int32_t) ((uint32_t) high << 16 | (uint16_t) low); }
inline ivec  dot4_end(ivec acc, ivec pairs)        { return _mm256_add_epi32(acc, pair_sums(pairs)); }
inline ivec  dot4(ivec pairs, ivec x, ivec q) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x, q));
#if defined(__GNUC__)
    __asm__("" : "+x"(pairs)); // GCC sums in another order, which takes more registers than there are
#endif
    return pairs;
}
inline ivec  dot8(ivec acc, ivec x, ivec q) { // |x - 128| times q with its sign: pairs fit 16 bits
    const ivec y = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
    return _mm256_add_epi32(acc, pair_sums(_mm256_maddubs_epi16(_mm256_abs_epi8(y), _mm256_sign_epi8(q, y))));
}
#endif

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
inline void  hsum4(vec a, vec b, vec c, vec d, float * out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
inline uint32_t ge_bits(vec a, vec b) {
    const uint32_t bit[] = { 1, 2, 4, 8 };
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
}
inline vec   scale2(vec a, vec t) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vreinterpretq_s32_f32(t), 23)));
}

using ivec = int32x4_t;

inline ivec  iload(const void * p)                 { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *) p)); }
inline void  istore(void * p, ivec a)              { vst1q_s32((int32_t *) p, a); }
inline ivec  isplat(int32_t x)                     { return vdupq_n_s32(x); }
inline vec   to_float(ivec a)                      { return vcvtq_f32_s32(a); }
inline ivec  low_nibbles(ivec x)                   { return vandq_s32(x, vdupq_n_s32(0x0F0F0F0F)); }
inline ivec  high_nibbles(ivec x)                  { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }

constexpr int BIAS8 = 0;
inline int32_t dot4_start(int32_t low, int32_t high) { return low + high; }
inline ivec  dot4_end(ivec acc, ivec sums)         { return vaddq_s32(acc, sums); }
inline ivec  dot4(ivec acc, ivec x, ivec q) { // of any signed x
    const int8x16_t a = vreinterpretq_s8_s32(x);
    const int8x16_t b = vreinterpretq_s8_s32(q);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, a, b);
#else
    const int32x4_t lo = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t hi = vpaddlq_s16(vmull_high_s8(a, b));
    return vaddq_s32(acc, vpaddq_s32(lo, hi));
#endif
}
inline ivec  dot8(ivec acc, ivec x, ivec q)        { return dot4(acc, veorq_s32(x, vdupq_n_s32(0x80808080)), q); }

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
inline void  hsum4(vec a, vec b, vec c, vec d, float * out) { out[0] = a; out[1] = b; out[2] = c; out[3] = d; }
inline uint32_t ge_bits(vec a, vec b)              { return a >= b; }
inline vec   scale2(vec a, vec t)                  { return std::ldexp(a, (int) (t - ROUND)); }

using ivec = int32_t;

inline ivec  iload(const void * p)                 { ivec x; memcpy(&x, p, sizeof(x)); return x; }
inline void  istore(void * p, ivec x)              { memcpy(p, &x, sizeof(x)); }
inline ivec  isplat(int32_t x)                     { return x; }
inline vec   to_float(ivec a)                      { return (float) a; }
inline ivec  low_nibbles(ivec x)                   { return x & 0x0F0F0F0F; }
inline ivec  high_nibbles(ivec x)                  { return (x >> 4) & 0x0F0F0F0F; }

constexpr int BIAS8 = 128;
inline ivec  dot8(ivec acc, ivec x, ivec q) {
    for (int b = 0; b < 32; b += 8) {
        acc += (uint8_t) (x >> b)*(int8_t) (q >> b);
    }
    return acc;
}
inline int32_t dot4_start(int32_t low, int32_t high) { return low + high; }
inline ivec  dot4_end(ivec acc, ivec sums)         { return acc + sums; }
inline ivec  dot4(ivec acc, ivec x, ivec q)        { return dot8(acc, x, q); }

#endif

// a, which GCC reads from memory wherever it is used otherwise.
inline vec in_register(vec a) {
#if defined(__GNUC__) && defined(__AVX2__) && !defined(__AVX512F__)
    __asm__("" : "+x"(a));
#endif
    return a;
}

constexpr int DOT4_RUN = 16;

// Vector registers, which what a kernel adds up should not exceed.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int N_REG = 32;
#else
constexpr int N_REG = 16;
#endif

// The number of the lowest bit that is set, of which there must be one.
inline int lowest_bit(uint32_t bits) {
#if defined(_MSC_VER) && !defined(__clang__)
    unsigned long i;
    _BitScanForward(&i, bits);
    return (int) i;
#else
    return __builtin_ctz(bits);
#endif
}

#if defined(__AVX2__) && !(defined(__AVX512F__) && defined(__AVX512BW__))
// For each byte the numbers of its bits that are set, in order.
struct bit_numbers {
    uint8_t of[256][8];

    constexpr bit_numbers() : of() {
        for (int byte = 0; byte < 256; ++byte) {
            int n = 0;
            for (int i = 0; i < 8; ++i) {
                if (byte >> i & 1) {
                    of[byte][n++] = (uint8_t) i;
                }
            }
        }
    }
};
static constexpr bit_numbers BIT_NUMBERS;
#endif

// Writes first + i for every bit i that is set, of W, in order, and returns how many. May write W values. No branches, which
// nobody could predict.
inline int append(uint32_t bits, int32_t first, int32_t * out) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    const ivec lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16) bits, _mm512_add_epi32(lane, isplat(first))));
    return _mm_popcnt_u32(bits);
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    const ivec lane = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) BIT_NUMBERS.of[bits]));
    _mm256_storeu_si256((__m256i *) out, _mm256_add_epi32(lane, isplat(first)));
    return _mm_popcnt_u32(bits);
#else
    int n = 0;
    for (int i = 0; i < W; ++i) {
        out[n] = first + i;
        n += bits >> i & 1;
    }
    return n;
#endif
}

constexpr float LOG2_E = 1.44269504f;

constexpr float EXP_MAX = 2e6f; // magnitude of x below which the exponent of e^x is one of ROUND's integers
constexpr float EXP_MIN = 86.0f; // how far x may be below that of the largest result: e^-86 is a normal float

// The power of two nearest 2^y, as an exponent, for |y| <= EXP_MAX*LOG2_E.
inline float exp2_round(float y) {
    return y + ROUND - ROUND;
}

// 2^(x*c - n0), which must be normal, for an integer n0 as of exp2_round, given as round = ROUND - n0: a power of two times 2^r
// with |r| <= 1/2, which is 1 and a minimax polynomial, relative error about 2e-7. Results of one x for different n0 differ by a
// power of two, exactly.
inline vec exp2_scaled(vec x, vec c, vec round) {
    const vec t = fma(x, c, round);
    const vec r = fma(x, c, sub(round, t));
    // in pairs of terms, which do not wait for each other
    const vec r2 = mul(r, r);
    const vec p4 = fma(splat(0.00132647273f), r, splat(0.00967151299f));
    const vec p2 = fma(splat(0.0555073358f), r, splat(0.240222424f));
    const vec p0 = fma(splat(0.693147004f), r, splat(1.0f));
    const vec p  = fma(fma(p4, r2, p2), r2, p0);
    return scale2(p, t);
}

// exp for x <= 0, and near 4e-38 instead of 0 below -EXP_MIN, which no softmax can tell apart.
inline vec exp_neg(vec x) {
    return exp2_scaled(max(x, splat(-EXP_MIN)), splat(LOG2_E), splat(ROUND));
}

} // namespace fasa
