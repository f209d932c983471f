/*
 * Sixteen fp32 lanes, one for each token of a block: a zmm register with AVX-512, two ymm with
 * AVX2. The kernels (*_impl.h) are written once on these and compiled once a level, by avx512.c
 * and avx2.c; only what differs in kind (reductions, integer dot products, tile sizes) is written
 * twice, here.
 *
 * Loads and stores take any alignment. Reductions have one fixed order, so results do not depend
 * on alignment or on a lane's place among others.
 */
#pragma once

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <kernels/kernels.h>

#define SIMD static inline __attribute__((always_inline))

#ifdef __AVX512F__

typedef __m512 v16;
typedef __m512i v16i;

SIMD v16 v16_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

SIMD void v16_store(float *p, v16 a)
{
    _mm512_storeu_ps(p, a);
}

SIMD v16 v16_set1(float a)
{
    return _mm512_set1_ps(a);
}

SIMD v16 v16_add(v16 a, v16 b)
{
    return _mm512_add_ps(a, b);
}

SIMD v16 v16_sub(v16 a, v16 b)
{
    return _mm512_sub_ps(a, b);
}

SIMD v16 v16_mul(v16 a, v16 b)
{
    return _mm512_mul_ps(a, b);
}

SIMD v16 v16_div(v16 a, v16 b)
{
    return _mm512_div_ps(a, b);
}

SIMD v16 v16_sqrt(v16 a)
{
    return _mm512_sqrt_ps(a);
}

SIMD v16 v16_max(v16 a, v16 b)
{
    return _mm512_max_ps(a, b);
}

SIMD v16 v16_min(v16 a, v16 b)
{
    return _mm512_min_ps(a, b);
}

/* a b + c, rounded once. */
SIMD v16 v16_fma(v16 a, v16 b, v16 c)
{
    return _mm512_fmadd_ps(a, b, c);
}

SIMD v16 v16_abs(v16 a)
{
    return _mm512_abs_ps(a);
}

SIMD v16 v16_round(v16 a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* a < b ? x : y, a lane each; false when a or b is NaN. */
SIMD v16 v16_less_choose(v16 a, v16 b, v16 x, v16 y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

/* The first n lanes (0..16) of a, the others of b. */
SIMD v16 v16_first(uint32_t n, v16 a, v16 b)
{
    return _mm512_mask_blend_ps((__mmask16)((UINT32_C(1) << n) - 1), b, a);
}

/* a 2^n for whole n in [-126, 127]. */
SIMD v16 v16_scale(v16 a, v16 n)
{
    return _mm512_scalef_ps(a, n);
}

SIMD v16i v16_bits(v16 a)
{
    return _mm512_castps_si512(a);
}

SIMD v16 v16_from_bits(v16i a)
{
    return _mm512_castsi512_ps(a);
}

SIMD v16i v16i_set1(int32_t a)
{
    return _mm512_set1_epi32(a);
}

SIMD v16i v16i_add(v16i a, v16i b)
{
    return _mm512_add_epi32(a, b);
}

SIMD v16i v16i_sub(v16i a, v16i b)
{
    return _mm512_sub_epi32(a, b);
}

SIMD v16i v16i_and(v16i a, v16i b)
{
    return _mm512_and_si512(a, b);
}

SIMD v16i v16i_or(v16i a, v16i b)
{
    return _mm512_or_si512(a, b);
}

SIMD v16i v16i_xor(v16i a, v16i b)
{
    return _mm512_xor_si512(a, b);
}

SIMD v16i v16i_shift_right(v16i a, int n) /* arithmetic */
{
    return _mm512_srai_epi32(a, (unsigned)n);
}

SIMD v16i v16i_shift_left(v16i a, int n)
{
    return _mm512_slli_epi32(a, (unsigned)n);
}

SIMD v16 v16_from_i32(v16i a)
{
    return _mm512_cvtepi32_ps(a);
}

SIMD v16i v16_to_i32(v16 a) /* rounds half to even */
{
    return _mm512_cvtps_epi32(a);
}

SIMD v16i v16i_load(const int32_t *p)
{
    return _mm512_loadu_si512(p);
}

SIMD void v16i_store(int32_t *p, v16i a)
{
    _mm512_storeu_si512(p, a);
}

SIMD v16i v16i_from_i8(const int8_t *p)
{
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}

SIMD void v16i_to_i8(int8_t *p, v16i a) /* lanes within -128..127 */
{
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a));
}

SIMD v16i v16i_from_u16(const uint16_t *p)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}

SIMD void v16i_to_u16(uint16_t *p, v16i a) /* lanes within 0..65535 */
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a));
}

SIMD v16 v16_from_fp16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

SIMD void v16_to_fp16(uint16_t *p, v16 a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

/* Bit i: lane i of a is equal to lane i of b. */
SIMD uint32_t v16i_equal_bits(v16i a, v16i b)
{
    return _mm512_cmpeq_epi32_mask(a, b);
}

SIMD float v16_get1(v16 a) /* lane 0 */
{
    return _mm512_cvtss_f32(a);
}

SIMD void v16_add_to(double sum[16], v16 a) /* lane i to sum[i] */
{
    __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    __m512d hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), lo));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), hi));
}

SIMD float v16_sum(v16 a)
{
    return _mm512_reduce_add_ps(a);
}

SIMD float v16_largest(v16 a)
{
    return _mm512_reduce_max_ps(a);
}

/*
 * Lane i of the result is the sum (or maximum) of the lanes of row[i]: sixteen reductions in the
 * time of three. Four rows at a time fold into one register, then the four 128-bit quarters; of
 * four rows alone (_4), lanes 0 to 3 count.
 */
#define ROWS_REDUCE(name, op)                                                                      \
    SIMD v16 name##_fold(const v16 *row)                                                           \
    {                                                                                              \
        v16 a = op(_mm512_unpacklo_ps(row[0], row[1]), _mm512_unpackhi_ps(row[0], row[1]));        \
        v16 b = op(_mm512_unpacklo_ps(row[2], row[3]), _mm512_unpackhi_ps(row[2], row[3]));        \
        return op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));                   \
    }                                                                                              \
    SIMD v16 name(const v16 row[16])                                                               \
    {                                                                                              \
        v16 a = name##_fold(row), b = name##_fold(row + 4);                                        \
        v16 c = name##_fold(row + 8), d = name##_fold(row + 12);                                   \
        a = op(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));                \
        c = op(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));                \
        return op(_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd));             \
    }                                                                                              \
    SIMD v16 name##_4(const v16 row[4])                                                            \
    {                                                                                              \
        v16 a = name##_fold(row);                                                                  \
        a = op(a, _mm512_shuffle_f32x4(a, a, 0x4e));                                               \
        return op(a, _mm512_shuffle_f32x4(a, a, 0xb1));                                            \
    }

#else /* AVX2 */

typedef struct {
    __m256 lo, hi;
} v16;
typedef struct {
    __m256i lo, hi;
} v16i;

SIMD v16 v16_load(const float *p)
{
    return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

SIMD void v16_store(float *p, v16 a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

SIMD v16 v16_set1(float a)
{
    return (v16){_mm256_set1_ps(a), _mm256_set1_ps(a)};
}

SIMD v16 v16_add(v16 a, v16 b)
{
    return (v16){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}

SIMD v16 v16_sub(v16 a, v16 b)
{
    return (v16){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}

SIMD v16 v16_mul(v16 a, v16 b)
{
    return (v16){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}

SIMD v16 v16_div(v16 a, v16 b)
{
    return (v16){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}

SIMD v16 v16_sqrt(v16 a)
{
    return (v16){_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)};
}

SIMD v16 v16_max(v16 a, v16 b)
{
    return (v16){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}

SIMD v16 v16_min(v16 a, v16 b)
{
    return (v16){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}

/* a b + c, rounded once. */
SIMD v16 v16_fma(v16 a, v16 b, v16 c)
{
    return (v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

SIMD v16 v16_abs(v16 a)
{
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (v16){_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}

SIMD v16 v16_round(v16 a)
{
    return (v16){_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                 _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

/* a < b ? x : y, a lane each; false when a or b is NaN. */
SIMD v16 v16_less_choose(v16 a, v16 b, v16 x, v16 y)
{
    return (v16){_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
                 _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}

/* The first n lanes (0..16) of a, the others of b. */
SIMD v16 v16_first(uint32_t n, v16 a, v16 b)
{
    __m256i last = _mm256_set1_epi32((int)n);
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i in_lo = _mm256_cmpgt_epi32(last, lane);
    __m256i in_hi = _mm256_cmpgt_epi32(last, _mm256_add_epi32(lane, _mm256_set1_epi32(8)));
    return (v16){_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(in_lo)),
                 _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(in_hi))};
}

SIMD v16i v16_bits(v16 a)
{
    return (v16i){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}

SIMD v16 v16_from_bits(v16i a)
{
    return (v16){_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}

SIMD v16i v16i_set1(int32_t a)
{
    return (v16i){_mm256_set1_epi32(a), _mm256_set1_epi32(a)};
}

SIMD v16i v16i_add(v16i a, v16i b)
{
    return (v16i){_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}

SIMD v16i v16i_sub(v16i a, v16i b)
{
    return (v16i){_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}

SIMD v16i v16i_and(v16i a, v16i b)
{
    return (v16i){_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}

SIMD v16i v16i_or(v16i a, v16i b)
{
    return (v16i){_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}

SIMD v16i v16i_xor(v16i a, v16i b)
{
    return (v16i){_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}

SIMD v16i v16i_shift_right(v16i a, int n) /* arithmetic */
{
    return (v16i){_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
}

SIMD v16i v16i_shift_left(v16i a, int n)
{
    return (v16i){_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}

SIMD v16 v16_from_i32(v16i a)
{
    return (v16){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}

SIMD v16i v16_to_i32(v16 a) /* rounds half to even */
{
    return (v16i){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}

/* a 2^n for whole n in [-126, 127]. */
SIMD v16 v16_scale(v16 a, v16 n)
{
    v16i exponent = v16i_add(v16_to_i32(n), v16i_set1(127));
    return v16_mul(a, v16_from_bits(v16i_shift_left(exponent, 23)));
}

SIMD v16i v16i_load(const int32_t *p)
{
    return (v16i){_mm256_loadu_si256((const __m256i *)p),
                  _mm256_loadu_si256((const __m256i *)(p + 8))};
}

SIMD void v16i_store(int32_t *p, v16i a)
{
    _mm256_storeu_si256((__m256i *)p, a.lo);
    _mm256_storeu_si256((__m256i *)(p + 8), a.hi);
}

SIMD v16i v16i_from_i8(const int8_t *p)
{
    __m128i a = _mm_loadu_si128((const __m128i *)p);
    return (v16i){_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))};
}

SIMD void v16i_to_i8(int8_t *p, v16i a) /* lanes within -128..127 */
{
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}

SIMD v16i v16i_from_u16(const uint16_t *p)
{
    __m256i a = _mm256_loadu_si256((const __m256i *)p);
    return (v16i){_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                  _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}

SIMD void v16i_to_u16(uint16_t *p, v16i a) /* lanes within 0..65535 */
{
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
    _mm256_storeu_si256((__m256i *)p, pairs);
}

SIMD v16 v16_from_fp16(const uint16_t *p)
{
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

SIMD void v16_to_fp16(uint16_t *p, v16 a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

/* Bit i: lane i of a is equal to lane i of b. */
SIMD uint32_t v16i_equal_bits(v16i a, v16i b)
{
    __m256i lo = _mm256_cmpeq_epi32(a.lo, b.lo), hi = _mm256_cmpeq_epi32(a.hi, b.hi);
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(lo)) |
           (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(hi)) << 8;
}

SIMD float v16_get1(v16 a) /* lane 0 */
{
    return _mm256_cvtss_f32(a.lo);
}

SIMD void v4_add_to(double sum[4], __m128 a)
{
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), _mm256_cvtps_pd(a)));
}

SIMD void v16_add_to(double sum[16], v16 a) /* lane i to sum[i] */
{
    v4_add_to(sum, _mm256_castps256_ps128(a.lo));
    v4_add_to(sum + 4, _mm256_extractf128_ps(a.lo, 1));
    v4_add_to(sum + 8, _mm256_castps256_ps128(a.hi));
    v4_add_to(sum + 12, _mm256_extractf128_ps(a.hi, 1));
}

SIMD float v16_sum(v16 a)
{
    __m256 b = _mm256_add_ps(a.lo, a.hi);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

SIMD float v16_largest(v16 a)
{
    __m256 b = _mm256_max_ps(a.lo, a.hi);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

SIMD __m256 v8_add(__m256 a, __m256 b)
{
    return _mm256_add_ps(a, b);
}

SIMD __m256 v8_max(__m256 a, __m256 b)
{
    return _mm256_max_ps(a, b);
}

/*
 * Lane i of the result is the sum (or maximum) of the lanes of row[i]: sixteen reductions in the
 * time of three. Four rows at a time fold into one register, then its two halves; of four rows
 * alone (_4), lanes 0 to 3 count.
 */
#define ROWS_REDUCE(name, op)                                                                      \
    SIMD __m256 name##_fold(const v16 *row)                                                        \
    {                                                                                              \
        __m256 r0 = op##8(row[0].lo, row[0].hi), r1 = op##8(row[1].lo, row[1].hi);                 \
        __m256 r2 = op##8(row[2].lo, row[2].hi), r3 = op##8(row[3].lo, row[3].hi);                 \
        __m256 a = op##8(_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));                  \
        __m256 b = op##8(_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));                  \
        return op##8(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));                \
    }                                                                                              \
    SIMD __m256 name##_8(const v16 *row)                                                           \
    {                                                                                              \
        __m256 a = name##_fold(row), b = name##_fold(row + 4);                                     \
        return op##8(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));      \
    }                                                                                              \
    SIMD v16 name(const v16 row[16])                                                               \
    {                                                                                              \
        return (v16){name##_8(row), name##_8(row + 8)};                                            \
    }                                                                                              \
    SIMD v16 name##_4(const v16 row[4])                                                            \
    {                                                                                              \
        __m256 a = name##_fold(row);                                                               \
        a = op##8(a, _mm256_permute2f128_ps(a, a, 1));                                             \
        return (v16){a, a};                                                                        \
    }
#define v16_add8 v8_add
#define v16_max8 v8_max

#endif

ROWS_REDUCE(v16_rows_sum, v16_add)
ROWS_REDUCE(v16_rows_largest, v16_max)

/* A type that no block has, beside enum winnow_dtype: stored means. */
enum { DTYPE_INT8 = 16 };

SIMD size_t dtype_bytes(uint32_t dtype)
{
    return dtype == WINNOW_FP32 ? 4 : dtype == DTYPE_INT8 ? 1 : 2;
}

/* Sixteen numbers of dtype, from its element idx on. */
SIMD v16 v16_load_as(uint32_t dtype, const void *p, size_t idx)
{
    if (dtype == DTYPE_INT8)
        return v16_from_i32(v16i_from_i8((const int8_t *)p + idx));
    if (dtype == WINNOW_FP16)
        return v16_from_fp16((const uint16_t *)p + idx);
    if (dtype == WINNOW_BF16)
        return v16_from_bits(v16i_shift_left(v16i_from_u16((const uint16_t *)p + idx), 16));
    return v16_load((const float *)p + idx);
}

/* Rounds to nearest even; what overflows becomes Inf. Not for NaN. */
SIMD void v16_store_as(uint32_t dtype, void *p, size_t idx, v16 a)
{
    if (dtype == WINNOW_FP16) {
        v16_to_fp16((uint16_t *)p + idx, a);
    } else if (dtype == WINNOW_BF16) {
        v16i bits = v16_bits(a), one = v16i_set1(1);
        v16i odd = v16i_and(v16i_shift_right(bits, 16), one);
        bits = v16i_add(bits, v16i_add(odd, v16i_set1(0x7fff)));
        bits = v16i_and(v16i_shift_right(bits, 16), v16i_set1(0xffff));
        v16i_to_u16((uint16_t *)p + idx, bits);
    } else {
        v16_store((float *)p + idx, a);
    }
}

/* A logit that overflowed becomes the largest or lowest number; NaN (Inf - Inf) the lowest. */
SIMD v16 v16_clamp(v16 a)
{
    return v16_min(v16_max(a, v16_set1(-FLT_MAX)), v16_set1(FLT_MAX));
}

/*
 * exp for x <= 88: below -80 it is 0, NaN stays NaN. Relative error below 1.5e-7. x = n ln 2 + r,
 * exp r = 1 + r + r^2 q(r) with q of degree 4, fitted at the Chebyshev points of |r| <= ln 2 / 2.
 */
SIMD v16 v16_exp(v16 x)
{
    v16 n = v16_round(v16_mul(x, v16_set1(1.44269504f)));
    v16 r = v16_fma(n, v16_set1(-0.693145752f), x); /* ln 2 in two parts, the first exact */
    r = v16_fma(n, v16_set1(-1.42860677e-6f), r);
    v16 q = v16_fma(r, v16_set1(0.0013926376f), v16_set1(0.00836333308f));
    q = v16_fma(q, r, v16_set1(0.0416665535f));
    q = v16_fma(q, r, v16_set1(0.166665761f));
    q = v16_fma(q, r, v16_set1(0.5f));
    q = v16_add(v16_fma(v16_mul(r, r), q, r), v16_set1(1.0f));
    return v16_less_choose(x, v16_set1(-80.0f), v16_set1(0.0f), v16_scale(q, n));
}

/*
 * ln x for x normal and positive; 0 gives -inf, Inf and NaN stay. x = 2^e (1 + f), and with
 * s = f / (2 + f): ln (1 + f) = f - s (f - R), R = 2/3 s^2 + 2/5 s^4 + ..., the series of atanh.
 */
SIMD v16 v16_log(v16 x)
{
    v16i root_half = v16i_set1(0x3f3504f3);
    v16i bits = v16i_sub(v16_bits(x), root_half);
    v16 e = v16_from_i32(v16i_shift_right(bits, 23));
    v16i mantissa = v16i_and(bits, v16i_set1(0x7fffff));
    v16 f = v16_sub(v16_from_bits(v16i_add(mantissa, root_half)), v16_set1(1.0f));
    v16 s = v16_div(f, v16_add(f, v16_set1(2.0f)));
    v16 z = v16_mul(s, s);
    v16 R = v16_fma(z, v16_set1(2.0f / 9), v16_set1(2.0f / 7));
    R = v16_fma(R, z, v16_set1(2.0f / 5));
    R = v16_mul(v16_fma(R, z, v16_set1(2.0f / 3)), z);
    v16 ln = v16_sub(f, v16_mul(s, v16_sub(f, R)));
    ln = v16_fma(e, v16_set1(1.42860677e-6f), ln);
    ln = v16_fma(e, v16_set1(0.693145752f), ln);
    ln = v16_less_choose(x, v16_set1(FLT_MIN), v16_set1(-INFINITY), ln);
    return v16_less_choose(x, v16_set1(INFINITY), ln, v16_add(x, x));
}

/* Sixteen rows of sixteen logits, in place to exp(logit - largest of its row); `largest` and `sum`
 * are those of each row. */
SIMD void v16_rows_exp(v16 row[16], v16 *largest, v16 *sum)
{
    float shift[16];

    *largest = v16_rows_largest(row);
    v16_store(shift, *largest);
#pragma GCC unroll 16
    for (uint32_t i = 0; i < 16; i++)
        row[i] = v16_exp(v16_sub(row[i], v16_set1(shift[i])));
    *sum = v16_rows_sum(row);
}
