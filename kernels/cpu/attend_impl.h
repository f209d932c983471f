/*
 * Exact attention of up to eight blocks by the query heads of one KV head.
 *
 * K lies transposed, so a dimension of sixteen tokens is one load and a logit needs no horizontal
 * sum: per dimension one load and conversion, and an FMA a query head with q broadcast. Then exp,
 * then V by rows with p broadcast. A block is 4 to 8 KiB and the step reads it once: the time is
 * memory's, so the next block is asked for while this one is computed.
 *
 * Each block's exponentials are relative to its own maximum, and weighed by exp(its maximum - m)
 * before V: so ln m_b of a block far below the others is as exact as theirs, at one exp a key.
 */
#pragma once

#include <kernels/cpu/simd.h>

enum { HEADS_TILE = 4 }; /* query heads that share a load of K or V */

/* Chains of dependent FMAs a head, and V vectors a pass: enough to hide an FMA's latency, few
 * enough for 32 (AVX2: 16) registers. By heads in the tile. */
#ifdef __AVX512F__
static const uint32_t logit_chains[HEADS_TILE + 1] = {0, 4, 4, 2, 2};
static const uint32_t value_vectors[HEADS_TILE + 1] = {0, 4, 4, 4, 4};
#else
static const uint32_t logit_chains[HEADS_TILE + 1] = {0, 4, 2, 1, 1};
static const uint32_t value_vectors[HEADS_TILE + 1] = {0, 4, 2, 1, 1};
#endif

static inline uint32_t shape_n_q(const struct winnow_model_shape *shape)
{
    return shape->n_q_heads / shape->n_kv_heads;
}

SIMD const void *element_at(uint32_t dtype, const void *p, size_t idx)
{
    return (const char *)p + idx * (dtype == WINNOW_FP32 ? 4 : 2);
}

/* l [n_q] rows of 16, l_stride apart = scale x q [n_q][k_width] . K [k_width][16] */
SIMD void tile_logits(uint32_t dtype, uint32_t n_q, uint32_t k_width, float scale, const void *k,
                      const float *q, float *l, size_t l_stride)
{
    const uint32_t n_chains = logit_chains[n_q];
    v16 sum[HEADS_TILE][4];

#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_chains; c++)
            sum[g][c] = v16_set1(0.0f);
    for (uint32_t d = 0; d < k_width; d += n_chains) {
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_chains; c++) {
            v16 x = v16_load_as(dtype, k, 16 * (d + c));
#pragma GCC unroll 4
            for (uint32_t g = 0; g < n_q; g++)
                sum[g][c] = v16_fma(v16_set1(q[g * k_width + d + c]), x, sum[g][c]);
        }
    }
#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++) {
#pragma GCC unroll 4
        for (uint32_t c = 1; c < n_chains; c++)
            sum[g][0] = v16_add(sum[g][0], sum[g][c]);
        v16_store(l + g * l_stride, v16_clamp(v16_mul(sum[g][0], v16_set1(scale))));
    }
}

/* n_vectors x 16 columns of o [n_q], o_stride apart, += p [n_q][n_tokens] x V */
SIMD void tile_value_columns(uint32_t dtype, uint32_t n_q, uint32_t n_vectors, uint32_t v_width,
                             const void *v, uint32_t n_tokens, const float *p, size_t p_stride,
                             float *o, size_t o_stride)
{
    v16 sum[HEADS_TILE][4];

#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++)
            sum[g][c] = v16_load(o + g * o_stride + 16 * c);
    for (uint32_t t = 0; t < n_tokens; t++) {
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++) {
            v16 x = v16_load_as(dtype, v, (size_t)t * v_width + 16 * c);
#pragma GCC unroll 4
            for (uint32_t g = 0; g < n_q; g++)
                sum[g][c] = v16_fma(v16_set1(p[g * p_stride + t]), x, sum[g][c]);
        }
    }
#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++)
            v16_store(o + g * o_stride + 16 * c, sum[g][c]);
}

SIMD void tile_values(uint32_t dtype, uint32_t n_q, uint32_t v_width, const void *v,
                      uint32_t n_tokens, const float *p, size_t p_stride, float *o, size_t o_stride)
{
    const uint32_t n_vectors = value_vectors[n_q];
    uint32_t d = 0;

    for (; d + 16 * n_vectors <= v_width; d += 16 * n_vectors)
        tile_value_columns(dtype, n_q, n_vectors, v_width, element_at(dtype, v, d), n_tokens, p,
                           p_stride, o + d, o_stride);
    for (; d < v_width; d += 16)
        tile_value_columns(dtype, n_q, 1, v_width, element_at(dtype, v, d), n_tokens, p, p_stride,
                           o + d, o_stride);
}

/* Calls fn(dtype, n_q, ...) with both as constants. */
#define TILE_HEADS(dtype, n_q, fn, ...)                                                            \
    switch (n_q) {                                                                                 \
    case 1:                                                                                        \
        fn(dtype, 1, __VA_ARGS__);                                                                 \
        break;                                                                                     \
    case 2:                                                                                        \
        fn(dtype, 2, __VA_ARGS__);                                                                 \
        break;                                                                                     \
    case 3:                                                                                        \
        fn(dtype, 3, __VA_ARGS__);                                                                 \
        break;                                                                                     \
    default:                                                                                       \
        fn(dtype, 4, __VA_ARGS__);                                                                 \
    }
#define TILE_CALL(dtype, n_q, fn, ...)                                                             \
    if (dtype == WINNOW_FP16) {                                                                    \
        TILE_HEADS(WINNOW_FP16, n_q, fn, __VA_ARGS__)                                              \
    } else if (dtype == WINNOW_BF16) {                                                             \
        TILE_HEADS(WINNOW_BF16, n_q, fn, __VA_ARGS__)                                              \
    } else {                                                                                       \
        TILE_HEADS(WINNOW_FP32, n_q, fn, __VA_ARGS__)                                              \
    }

static uint32_t heads_in_tile(uint32_t n_q, uint32_t g)
{
    return n_q - g < HEADS_TILE ? n_q - g : HEADS_TILE;
}

static void block_prefetch(const struct winnow_model_shape *shape, const void *block)
{
    size_t n_bytes = winnow_block_bytes(shape);
    for (size_t i = 0; i < n_bytes; i += 64)
        _mm_prefetch((const char *)block + i, _MM_HINT_T0);
}

/* Logits of one block for all heads; tokens that are not there get -inf. */
static void block_logits(const struct winnow_model_shape *shape, const float *q, const void *block,
                         uint32_t n_tokens, float *l, size_t l_stride)
{
    uint32_t n_q = shape_n_q(shape), k_width = shape->k_width, dtype = shape->kv_dtype;

    for (uint32_t g = 0; g < n_q; g += HEADS_TILE) {
        TILE_CALL(dtype, heads_in_tile(n_q, g), tile_logits, k_width, shape->softmax_scale, block,
                  q + (size_t)g * k_width, l + g * l_stride, l_stride)
    }
    if (n_tokens == WINNOW_BLOCK_TOKENS)
        return;
    for (uint32_t g = 0; g < n_q; g++) {
        float *row = l + g * l_stride;
        v16_store(row, v16_first(n_tokens, v16_load(row), v16_set1(-INFINITY)));
    }
}

static void block_values(const struct winnow_model_shape *shape, const void *block,
                         uint32_t n_tokens, const float *p, size_t p_stride, float *partial)
{
    uint32_t n_q = shape_n_q(shape), v_width = shape->v_width, dtype = shape->kv_dtype;
    const void *v = element_at(dtype, block, (size_t)WINNOW_BLOCK_TOKENS * shape->k_width);
    size_t stride = v_width + 2;

    for (uint32_t g = 0; g < n_q; g += HEADS_TILE) {
        TILE_CALL(dtype, heads_in_tile(n_q, g), tile_values, v_width, v, n_tokens, p + g * p_stride,
                  p_stride, partial + g * stride + 2, stride)
    }
}

/* The rows of logits of one head's n blocks, already exp(l - largest of the row), to
 * exp(l - m) of all; starts the partial with m, l and zeros. */
static void head_weigh(uint32_t v_width, uint32_t n, const float *largest, const float *sum,
                       float *p, float *partial)
{
    float weight[16];
    v16 zero = v16_set1(0.0f);
    v16 top = v16_first(n, v16_load(largest), v16_set1(-INFINITY));
    float m = v16_largest(top);
    v16 w = m > -INFINITY ? v16_exp(v16_sub(top, v16_set1(m))) : zero;

    partial[0] = m;
    partial[1] = v16_sum(v16_first(n, v16_mul(w, v16_load(sum)), zero));
    for (uint32_t d = 0; d < v_width; d += 16)
        v16_store(partial + 2 + d, zero);
    v16_store(weight, w);
    for (uint32_t b = 0; b < n; b++)
        v16_store(p + 16 * b, v16_mul(v16_load(p + 16 * b), v16_set1(weight[b])));
}

static void attend_partial(const struct winnow_model_shape *shape, const float *q, uint32_t n,
                           const void *const *block, const uint32_t *n_tokens, float *partial,
                           float *ln_m)
{
    enum { N_ROWS_MAX = WINNOW_GQA_MAX * WINNOW_GROUP_BLOCKS };
    uint32_t n_q = shape_n_q(shape), n_rows = n_q * n;
    /* Row g n + b: head g, block b. Rounded up to sixteen rows, and one more vector to read over. */
    float p[N_ROWS_MAX * 16], largest[N_ROWS_MAX + 16], sum[N_ROWS_MAX + 16];

    for (uint32_t b = 0; b < n; b++) {
        if (b + 1 < n)
            block_prefetch(shape, block[b + 1]);
        block_logits(shape, q, block[b], n_tokens[b], p + 16 * b, 16 * n);
    }
    for (uint32_t first = 0; first < n_rows; first += 16) {
        v16 row[16], row_largest, row_sum;
        for (uint32_t i = 0; i < 16; i++)
            row[i] = first + i < n_rows ? v16_load(p + 16 * (first + i)) : v16_set1(0.0f);
        v16_rows_exp(row, &row_largest, &row_sum);
        for (uint32_t i = 0; i < 16; i++)
            v16_store(p + 16 * (first + i), row[i]);
        v16_store(largest + first, row_largest);
        v16_store(sum + first, row_sum);
    }
    for (uint32_t g = 0; ln_m && g < n_q; g++) {
        float ln[16];
        v16_store(ln, v16_add(v16_load(largest + g * n), v16_log(v16_load(sum + g * n))));
        for (uint32_t b = 0; b < n; b++)
            ln_m[b * n_q + g] = ln[b];
    }
    for (uint32_t g = 0; g < n_q; g++)
        head_weigh(shape->v_width, n, largest + g * n, sum + g * n, p + (size_t)16 * g * n,
                   partial + (size_t)g * (shape->v_width + 2));
    for (uint32_t b = 0; b < n; b++)
        block_values(shape, block[b], n_tokens[b], p + 16 * b, 16 * n, partial);
}
