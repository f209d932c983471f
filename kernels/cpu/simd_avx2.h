/* Sixteen lanes in two registers of AVX2. Included by simd.h; what a function does is said in
 * simd_avx512.h. */
#pragma once

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
