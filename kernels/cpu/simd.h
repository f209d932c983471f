/*
 * Sixteen fp32 lanes, one for each token of a block: a zmm register with AVX-512, two ymm with
 * AVX2. The kernels (*_impl.h) are written once on these and compiled once a level, by avx512.c
 * and avx2.c. simd_avx512.h and simd_avx2.h hold the same functions; this file what is made of them.
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
#include <kernels/cpu/simd_avx512.h>
#else
#include <kernels/cpu/simd_avx2.h>
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
