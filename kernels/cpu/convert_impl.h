/*
 * Numbers between the wire, fp32 and blocks at rest. What is not finite is found in the same pass.
 *
 * Packing writes a token's key as a column of K: sixteen stores of one number for one of sixteen.
 * Rejected: transposing 16 x 16 in registers; a token of decode fills one column only, and a whole
 * prompt's blocks take 20 ms of its seconds.
 */
#pragma once

#include <errno.h>
#include <kernels/cpu/attend_impl.h>

/* Lanes of `bad` become 1 where |x| is not below the limit; NaN is below none. */
SIMD v16 mark_bad(v16 bad, v16 x, v16 limit)
{
    return v16_less_choose(v16_abs(x), limit, bad, v16_set1(1.0f));
}

SIMD int to_float_as(uint32_t dtype, size_t n, const void *src, float *dst)
{
    v16 bad = v16_set1(0.0f), limit = v16_set1(INFINITY);
    float rest[16] = {0};
    size_t i = 0, element_bytes = dtype_bytes(dtype);

    for (; i + 16 <= n; i += 16) {
        v16 x = v16_load_as(dtype, src, i);
        bad = mark_bad(bad, x, limit);
        v16_store(dst + i, x);
    }
    memcpy(rest, element_at(dtype, src, i), (n - i) * element_bytes);
    v16 x = v16_load_as(dtype, rest, 0);
    bad = mark_bad(bad, x, limit);
    v16_store(rest, x);
    memcpy(dst + i, rest, (n - i) * sizeof(float));
    return v16_largest(bad) > 0 ? -EDOM : 0;
}

static int to_float(uint32_t dtype, size_t n, const void *src, float *dst)
{
    if (dtype == WINNOW_FP16)
        return to_float_as(WINNOW_FP16, n, src, dst);
    if (dtype == WINNOW_BF16)
        return to_float_as(WINNOW_BF16, n, src, dst);
    return to_float_as(WINNOW_FP32, n, src, dst);
}

/* The smallest number that rounds to infinity. */
static float dtype_limit(uint32_t dtype)
{
    return dtype == WINNOW_FP16 ? 65520.0f : dtype == WINNOW_BF16 ? 0x1.ffp127f : INFINITY;
}

SIMD int from_float_as(uint32_t dtype, size_t n, const float *src, void *dst)
{
    v16 bad = v16_set1(0.0f), limit = v16_set1(dtype_limit(dtype));
    float rest[16] = {0};
    size_t i = 0, element_bytes = dtype_bytes(dtype);

    for (; i + 16 <= n; i += 16) {
        v16 x = v16_load(src + i);
        bad = mark_bad(bad, x, limit);
        v16_store_as(dtype, dst, i, x);
    }
    memcpy(rest, src + i, (n - i) * sizeof(float));
    v16 x = v16_load(rest);
    bad = mark_bad(bad, x, limit);
    v16_store_as(dtype, rest, 0, x);
    memcpy((char *)dst + i * element_bytes, rest, (n - i) * element_bytes);
    return v16_largest(bad) > 0 ? -EDOM : 0;
}

static int from_float(uint32_t dtype, size_t n, const float *src, void *dst)
{
    if (dtype == WINNOW_FP16)
        return from_float_as(WINNOW_FP16, n, src, dst);
    if (dtype == WINNOW_BF16)
        return from_float_as(WINNOW_BF16, n, src, dst);
    return from_float_as(WINNOW_FP32, n, src, dst);
}

/* Sixteen numbers as dtype, saturated. */
SIMD void store_saturated(uint32_t dtype, void *p, size_t idx, v16 x)
{
    float largest = dtype == WINNOW_FP16 ? 65504.0f : 0x1.fep127f;

    if (dtype != WINNOW_FP32)
        x = v16_min(v16_max(x, v16_set1(-largest)), v16_set1(largest));
    v16_store_as(dtype, p, idx, x);
}

SIMD void block_pack_as(uint32_t dtype, const struct winnow_model_shape *shape, uint32_t first,
                        uint32_t n, const float *k, const float *v, void *block)
{
    size_t k_width = shape->k_width, v_width = shape->v_width;
    union {
        uint32_t word[16];
        uint16_t half[16];
    } column;

    for (uint32_t t = first; t < first + n; t++, k += k_width, v += v_width) {
        for (size_t d = 0; d < k_width; d += 16) {
            store_saturated(dtype, &column, 0, v16_load(k + d));
#pragma GCC unroll 16
            for (size_t i = 0; i < 16; i++)
                if (dtype == WINNOW_FP32)
                    ((uint32_t *)block)[16 * (d + i) + t] = column.word[i];
                else
                    ((uint16_t *)block)[16 * (d + i) + t] = column.half[i];
        }
        for (size_t d = 0; d < v_width; d += 16)
            store_saturated(dtype, block, 16 * k_width + t * v_width + d, v16_load(v + d));
    }
}

static void block_pack(const struct winnow_model_shape *shape, uint32_t first, uint32_t n,
                       const float *k, const float *v, void *block)
{
    bool fragments = shape->block_layout == WINNOW_BLOCK_FRAGMENTS;
    uint16_t rows[ROWS_MAX];
    void *at = fragments ? rows : block;
    if (fragments && n < WINNOW_BLOCK_TOKENS)
        fragments_to_rows(shape, block, rows);
    if (shape->kv_dtype == WINNOW_FP16)
        block_pack_as(WINNOW_FP16, shape, first, n, k, v, at);
    else if (shape->kv_dtype == WINNOW_BF16)
        block_pack_as(WINNOW_BF16, shape, first, n, k, v, at);
    else
        block_pack_as(WINNOW_FP32, shape, first, n, k, v, at);
    if (fragments)
        rows_to_fragments(shape, rows, block);
}

SIMD void block_unpack_as(uint32_t dtype, const struct winnow_model_shape *shape, const void *block,
                          float *k, float *v)
{
    size_t k_width = shape->k_width, n_v = WINNOW_BLOCK_TOKENS * (size_t)shape->v_width;
    float column[16];

    for (size_t d = 0; d < k_width; d++) {
        v16_store(column, v16_load_as(dtype, block, 16 * d));
#pragma GCC unroll 16
        for (size_t t = 0; t < 16; t++)
            k[t * k_width + d] = column[t];
    }
    for (size_t i = 0; i < n_v; i += 16)
        v16_store(v + i, v16_load_as(dtype, block, 16 * k_width + i));
}

static void block_unpack(const struct winnow_model_shape *shape, const void *block, float *k,
                         float *v)
{
    uint16_t rows[ROWS_MAX];
    block = block_in_rows(shape, block, rows);
    if (shape->kv_dtype == WINNOW_FP16)
        block_unpack_as(WINNOW_FP16, shape, block, k, v);
    else if (shape->kv_dtype == WINNOW_BF16)
        block_unpack_as(WINNOW_BF16, shape, block, k, v);
    else
        block_unpack_as(WINNOW_FP32, shape, block, k, v);
}
