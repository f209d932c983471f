/* fp16 and bf16 to fp32 and back, exact and rounded to nearest even, by bits alone. */
#include <assert.h>
#include <base/assert.h>
#include <errno.h>
#include <kernels/ref/ref.h>
#include <string.h>

static_assert(sizeof(float) == sizeof(uint32_t), "a float is its bits");

static uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

float winnow_ref_fp16_to_float(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;

    if (rest >= 0x7c00) /* Inf, NaN */
        return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x0400) /* zero, subnormal */
        return bits_float(sign | float_bits((float)rest * 0x1p-24f));
    return bits_float(sign | ((rest << 13) + 0x38000000));
}

float winnow_ref_bf16_to_float(uint16_t bits)
{
    return bits_float((uint32_t)bits << 16);
}

uint16_t winnow_ref_float_to_fp16(float x)
{
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;

    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x47800000) /* 65,536 and more */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* below 2^-14: a multiple of 2^-24; the product is exact */
        return (uint16_t)(sign | (uint32_t)lrintf(bits_float(rest) * 0x1p24f));
    rest += 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - 0x38000000) >> 13);
}

uint16_t winnow_ref_float_to_bf16(float x)
{
    uint32_t bits = float_bits(x);

    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void winnow_ref_widen(uint32_t dtype, size_t n, const void *src, float *dst)
{
    const uint16_t *half = src;
    winnow_assert(dtype >= WINNOW_BF16);
    winnow_assert(dtype <= WINNOW_FP32);

    if (dtype == WINNOW_FP32) {
        memcpy(dst, src, n * sizeof *dst);
    } else if (dtype == WINNOW_FP16) {
        for (size_t i = 0; i < n; i++)
            dst[i] = winnow_ref_fp16_to_float(half[i]);
    } else {
        for (size_t i = 0; i < n; i++)
            dst[i] = winnow_ref_bf16_to_float(half[i]);
    }
}

int winnow_ref_to_float(uint32_t dtype, size_t n, const void *src, float *dst)
{
    winnow_ref_widen(dtype, n, src, dst);
    return winnow_ref_all_finite(n, dst) ? 0 : -EDOM;
}

int winnow_ref_from_float(uint32_t dtype, size_t n, const float *src, void *dst)
{
    uint16_t *half = dst;
    winnow_assert(dtype >= WINNOW_BF16);
    winnow_assert(dtype <= WINNOW_FP32);

    if (!winnow_ref_all_finite(n, src))
        return -EDOM;
    if (dtype == WINNOW_FP32) {
        memcpy(dst, src, n * sizeof *src);
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        bool fp16 = dtype == WINNOW_FP16;
        half[i] = fp16 ? winnow_ref_float_to_fp16(src[i]) : winnow_ref_float_to_bf16(src[i]);
        if ((half[i] & 0x7fff) >= (fp16 ? 0x7c00 : 0x7f80))
            return -EDOM;
    }
    return 0;
}
