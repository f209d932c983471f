/* Sixteen lanes in a register of AVX-512. Included by simd.h. */
#pragma once

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
