/*
 * Exact attention of up to eight blocks by the query heads of one KV head.
 *
 * K lies transposed, so a dimension of sixteen tokens is one load and a logit needs no horizontal
 * sum: per dimension one load and conversion, and an FMA a query head with q broadcast. Then exp,
 * then V by rows with p broadcast. A block is 4 to 8 KiB from anywhere and a step reads it once: the
 * time is memory's. So a block is finished, K, exp and V, before the next, and every load asks for
 * the same place of that next one: memory never waits for arithmetic.
 *
 * 4 KiB blocks in random order, one core: 17 GB/s, as plain reads of them; without asking ahead 9;
 * asking for the whole next block at once, 10. Two blocks ahead, or into L2 only, gains nothing.
 * From cache 36 GB/s; all K first and then all V was 41 there, and slower where it counts.
 *
 * A block's exponentials are relative to its own maximum, and weighed by exp(that - m) before V: ln
 * m_b of a block far below the others is as exact as theirs, at one exp a key.
 */
#pragma once

#include <kernels/cpu/fragments_impl.h>
#include <kernels/cpu/simd.h>

enum { HEADS_TILE = 4 }; /* query heads that share a load of K or V */

/* Chains of dependent FMAs a head, and V vectors a pass: enough to hide an FMA's latency, few
 * enough for 32 (AVX2: 16) registers. By heads in the tile. */
#ifdef __AVX512F__
static const uint32_t logit_chains[HEADS_TILE + 1] = {0, 4, 4, 4, 4};
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
    return (const char *)p + idx * dtype_bytes(dtype);
}

/* Asks for what lies `ahead` bytes further on: the same place of the block to come. */
SIMD void prefetch_ahead(const void *p, ptrdiff_t ahead, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i += 64)
        _mm_prefetch((const char *)p + ahead + i, _MM_HINT_T0);
}

/* l [n_q][16] = scale x q [n_q][k_width] . K [k_width][16] */
SIMD void tile_logits(uint32_t dtype, uint32_t n_q, size_t k_width, float scale, const void *k,
                      ptrdiff_t ahead, const float *q, float *l)
{
    const uint32_t n_chains = logit_chains[n_q];
    v16 sum[HEADS_TILE][4];

#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_chains; c++)
            sum[g][c] = v16_set1(0.0f);
    for (size_t d = 0; d < k_width; d += n_chains) {
        prefetch_ahead(element_at(dtype, k, 16 * d), ahead, 16 * n_chains * dtype_bytes(dtype));
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
        v16_store(l + 16 * g, v16_clamp(v16_mul(sum[g][0], v16_set1(scale))));
    }
}

/* n_vectors x 16 columns of o [n_q], o_stride apart, = shrink [n_q] x o + p [n_q][16] x V */
SIMD void tile_value_columns(uint32_t dtype, uint32_t n_q, uint32_t n_vectors, size_t v_width,
                             const void *v, ptrdiff_t ahead, uint32_t n_tokens, const float *p,
                             const float *shrink, float *o, size_t o_stride)
{
    v16 sum[HEADS_TILE][4];

#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++)
            sum[g][c] = v16_mul(v16_load(o + g * o_stride + 16 * c), v16_set1(shrink[g]));
    for (size_t t = 0; t < n_tokens; t++) {
        prefetch_ahead(element_at(dtype, v, t * v_width), ahead,
                       16 * n_vectors * dtype_bytes(dtype));
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++) {
            v16 x = v16_load_as(dtype, v, t * v_width + 16 * c);
#pragma GCC unroll 4
            for (uint32_t g = 0; g < n_q; g++)
                sum[g][c] = v16_fma(v16_set1(p[16 * g + t]), x, sum[g][c]);
        }
    }
#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++)
            v16_store(o + g * o_stride + 16 * c, sum[g][c]);
}

SIMD void tile_values(uint32_t dtype, uint32_t n_q, uint32_t v_width, const void *v,
                      ptrdiff_t ahead, uint32_t n_tokens, const float *p, const float *shrink,
                      float *o, size_t o_stride)
{
    const uint32_t n_vectors = value_vectors[n_q];
    uint32_t d = 0;

    for (; d + 16 * n_vectors <= v_width; d += 16 * n_vectors)
        tile_value_columns(dtype, n_q, n_vectors, v_width, element_at(dtype, v, d), ahead, n_tokens,
                           p, shrink, o + d, o_stride);
    for (; d < v_width; d += 16)
        tile_value_columns(dtype, n_q, 1, v_width, element_at(dtype, v, d), ahead, n_tokens, p,
                           shrink, o + d, o_stride);
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

/* Logits of one block for all heads; tokens that are not there get -inf. */
static void block_logits(const struct winnow_model_shape *shape, const float *q, const void *block,
                         ptrdiff_t ahead, uint32_t n_tokens, float *l)
{
    uint32_t n_q = shape_n_q(shape), k_width = shape->k_width, dtype = shape->kv_dtype;

    for (uint32_t g = 0; g < n_q; g += HEADS_TILE, ahead = 0) {
        TILE_CALL(dtype, heads_in_tile(n_q, g), tile_logits, k_width, shape->softmax_scale, block,
                  ahead, q + (size_t)g * k_width, l + 16 * g)
    }
    for (uint32_t g = 0; g < n_q && n_tokens < WINNOW_BLOCK_TOKENS; g++)
        v16_store(l + 16 * g, v16_first(n_tokens, v16_load(l + 16 * g), v16_set1(-INFINITY)));
}

static void block_values(const struct winnow_model_shape *shape, const void *block, ptrdiff_t ahead,
                         uint32_t n_tokens, const float *p, const float *shrink, float *partial)
{
    uint32_t n_q = shape_n_q(shape), v_width = shape->v_width, dtype = shape->kv_dtype;
    const void *v = element_at(dtype, block, (size_t)WINNOW_BLOCK_TOKENS * shape->k_width);
    size_t stride = v_width + 2;

    for (uint32_t g = 0; g < n_q; g += HEADS_TILE, ahead = 0) {
        TILE_CALL(dtype, heads_in_tile(n_q, g), tile_values, v_width, v, ahead, n_tokens,
                  p + 16 * g, shrink + g, partial + g * stride + 2, stride)
    }
}

/* Lane g: query head g. */
struct running {
    v16 m, l;
};

/* Rows of logits, a query head each, to exp(logit - m) with m raised to them; returns what the
 * earlier l and o shrink by, and in ln_m the ln of the rows' own mass. */
SIMD v16 rows_absorb(uint32_t n_rows, float *p, struct running *running, v16 *ln_m)
{
    float shift[16], weight[16];
    v16 row[16], largest, sum;

#pragma GCC unroll 16
    for (uint32_t g = 0; g < n_rows; g++)
        row[g] = v16_load(p + 16 * g);
    largest = n_rows == 4 ? v16_rows_largest_4(row) : v16_rows_largest(row);
    v16_store(shift, largest);
#pragma GCC unroll 16
    for (uint32_t g = 0; g < n_rows; g++)
        row[g] = v16_exp(v16_sub(row[g], v16_set1(shift[g])));
    sum = n_rows == 4 ? v16_rows_sum_4(row) : v16_rows_sum(row);

    v16 m = v16_max(running->m, largest);
    v16 shrink = v16_exp(v16_sub(running->m, m)), w = v16_exp(v16_sub(largest, m));
    running->m = m;
    running->l = v16_fma(sum, w, v16_mul(running->l, shrink));
    *ln_m = v16_add(largest, v16_log(sum));
    v16_store(weight, w);
#pragma GCC unroll 16
    for (uint32_t g = 0; g < n_rows; g++)
        v16_store(p + 16 * g, v16_mul(row[g], v16_set1(weight[g])));
    return shrink;
}

static void attend_partial(const struct winnow_model_shape *shape, const float *q, uint32_t n,
                           const void *const *block, const uint32_t *n_tokens, float *partial,
                           float *ln_m)
{
    uint32_t n_q = shape_n_q(shape);
    size_t stride = shape->v_width + 2;
    float p[WINNOW_GQA_MAX][16] = {{0}}, m[16], l[16], ln[16], shrink[16];
    struct running running = {.m = v16_set1(-INFINITY), .l = v16_set1(0.0f)};
    uint16_t rows[ROWS_MAX];

    memset(partial, 0, n_q * stride * sizeof(float));
    for (uint32_t b = 0; b < n; b++) {
        ptrdiff_t ahead = b + 1 < n ? (const char *)block[b + 1] - (const char *)block[b] : 0;
        const void *at = block_in_rows(shape, block[b], rows);
        v16 by, ln_b;
        block_logits(shape, q, at, ahead, n_tokens[b], p[0]);
        by = n_q <= 4 ? rows_absorb(4, p[0], &running, &ln_b)
                      : rows_absorb(16, p[0], &running, &ln_b);
        v16_store(shrink, by);
        v16_store(ln, ln_b);
        block_values(shape, at, ahead, n_tokens[b], p[0], shrink, partial);
        if (ln_m)
            memcpy(ln_m + b * n_q, ln, n_q * sizeof(float));
    }
    v16_store(m, running.m);
    v16_store(l, running.l);
    for (uint32_t g = 0; g < n_q; g++) {
        partial[g * stride] = m[g];
        partial[g * stride + 1] = l[g];
    }
}
