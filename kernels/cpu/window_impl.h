/*
 * Exact attention of a window of query positions: two matrix products a group of blocks, S = Q K^T
 * and O = P V, with a running maximum (flash attention).
 *
 * The window's n_pos x G query rows are the rows of Q as they lie. Eight blocks are widened to
 * fp32 once (64 KiB at d = 64: they stay in L2), then every tile of TILE_ROWS rows passes over
 * them: S of 128 tokens, exp, O. Both products are the same routine, TILE_ROWS x TILE_VECTORS
 * accumulators in registers, one load of B and a broadcast of A a step.
 *
 * Causality is a matter of blocks: those after the tile's last position are left out, those before
 * its first need no mask, and only the few between are masked, a prefix of tokens a row.
 */
#pragma once

#include <base/assert.h>
#include <kernels/cpu/simd.h>

#ifdef __AVX512F__
enum { TILE_ROWS = 12, TILE_VECTORS = 2 };
#else
enum { TILE_ROWS = 6, TILE_VECTORS = 1 };
#endif
enum { GROUP_TOKENS = WINNOW_GROUP_BLOCKS * WINNOW_BLOCK_TOKENS };

/* What one call needs, all fp32. */
struct window_scratch {
    float *k;      /* [k_width][GROUP_TOKENS] */
    float *v;      /* [GROUP_TOKENS][v_width] */
    float *q_rest; /* [TILE_ROWS][k_width]: the last tile's rows, filled up with zeros */
    float *o;      /* [TILE_ROWS][v_width] */
    float *s;      /* [TILE_ROWS][GROUP_TOKENS]: logits, then p */
};

static size_t window_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_pos)
{
    (void)n_pos;
    size_t n = (size_t)(GROUP_TOKENS + TILE_ROWS) * (shape->k_width + shape->v_width);
    return (n + (size_t)TILE_ROWS * GROUP_TOKENS) * sizeof(float);
}

static struct window_scratch window_scratch(const struct winnow_model_shape *shape, void *scratch)
{
    struct window_scratch w = {.k = scratch};
    w.v = w.k + (size_t)GROUP_TOKENS * shape->k_width;
    w.s = w.v + (size_t)GROUP_TOKENS * shape->v_width;
    w.q_rest = w.s + (size_t)TILE_ROWS * GROUP_TOKENS;
    w.o = w.q_rest + (size_t)TILE_ROWS * shape->k_width;
    return w;
}

/* C [TILE_ROWS][16 n_vectors] = A [TILE_ROWS][depth] x B [depth][16 n_vectors], rows apart by
 * their strides; for logits (scale > 0) times scale, and clamped. */
SIMD void tile_product(uint32_t n_vectors, float scale, uint32_t depth, const float *a,
                       size_t a_stride, const float *b, size_t b_stride, float *c, size_t c_stride)
{
    v16 sum[TILE_ROWS][TILE_VECTORS];

#pragma GCC unroll 16
    for (uint32_t r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (uint32_t j = 0; j < n_vectors; j++)
            sum[r][j] = v16_set1(0.0f);
    for (size_t i = 0; i < depth; i++, b += b_stride) {
        v16 row[TILE_VECTORS];
#pragma GCC unroll 2
        for (uint32_t j = 0; j < n_vectors; j++)
            row[j] = v16_load(b + 16 * j);
#pragma GCC unroll 16
        for (uint32_t r = 0; r < TILE_ROWS; r++) {
            v16 x = v16_set1(a[r * a_stride + i]);
#pragma GCC unroll 2
            for (uint32_t j = 0; j < n_vectors; j++)
                sum[r][j] = v16_fma(x, row[j], sum[r][j]);
        }
    }
#pragma GCC unroll 16
    for (uint32_t r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (uint32_t j = 0; j < n_vectors; j++) {
            if (scale > 0)
                sum[r][j] = v16_clamp(v16_mul(sum[r][j], v16_set1(scale)));
            v16_store(c + r * c_stride + 16 * j, sum[r][j]);
        }
}

/* The same for any number of columns, a multiple of 16; a_stride as a constant where it can be,
 * so that the rows of A need one register. */
SIMD void tile_columns(uint32_t n_columns, float scale, uint32_t depth, const float *a,
                       size_t a_stride, const float *b, size_t b_stride, float *c, size_t c_stride)
{
    uint32_t j = 0;

    for (; j + 16 * TILE_VECTORS <= n_columns; j += 16 * TILE_VECTORS)
        tile_product(TILE_VECTORS, scale, depth, a, a_stride, b + j, b_stride, c + j, c_stride);
    if (TILE_VECTORS > 1 && j < n_columns)
        tile_product(1, scale, depth, a, a_stride, b + j, b_stride, c + j, c_stride);
}

static void tile_scores(uint32_t n_tokens, uint32_t k_width, float scale, const float *q,
                        const float *k, float *s)
{
    if (k_width == 64)
        tile_columns(n_tokens, scale, 64, q, 64, k, GROUP_TOKENS, s, GROUP_TOKENS);
    else if (k_width == 128)
        tile_columns(n_tokens, scale, 128, q, 128, k, GROUP_TOKENS, s, GROUP_TOKENS);
    else
        tile_columns(n_tokens, scale, k_width, q, k_width, k, GROUP_TOKENS, s, GROUP_TOKENS);
}

static void tile_outputs(uint32_t n_tokens, uint32_t v_width, const float *p, const float *v,
                         float *o)
{
    tile_columns(v_width, 0.0f, n_tokens, p, GROUP_TOKENS, v, v_width, o, v_width);
}

/* Widens a block into columns [16 b_idx, 16 b_idx + 16) of K and rows of V; tokens that are not
 * there become 0. */
SIMD void block_widen_as(uint32_t dtype, const struct winnow_model_shape *shape, const void *block,
                         uint32_t n_tokens, float *k, float *v)
{
    uint32_t v_width = shape->v_width;
    const void *v_rows = element_at(dtype, block, (size_t)WINNOW_BLOCK_TOKENS * shape->k_width);
    v16 zero = v16_set1(0.0f);

    for (uint32_t d = 0; d < shape->k_width; d++)
        v16_store(k + (size_t)d * GROUP_TOKENS,
                  v16_first(n_tokens, v16_load_as(dtype, block, 16 * d), zero));
    for (uint32_t i = 0; i < n_tokens * v_width; i += 16)
        v16_store(v + i, v16_load_as(dtype, v_rows, i));
    for (uint32_t i = n_tokens * v_width; i < WINNOW_BLOCK_TOKENS * v_width; i += 16)
        v16_store(v + i, zero);
}

static void block_widen(const struct winnow_model_shape *shape, const void *block,
                        uint32_t n_tokens, float *k, float *v)
{
    if (shape->kv_dtype == WINNOW_FP16)
        block_widen_as(WINNOW_FP16, shape, block, n_tokens, k, v);
    else if (shape->kv_dtype == WINNOW_BF16)
        block_widen_as(WINNOW_BF16, shape, block, n_tokens, k, v);
    else
        block_widen_as(WINNOW_FP32, shape, block, n_tokens, k, v);
}

/* Tokens of a block that the query at `at` may see: a prefix. */
static uint32_t tokens_visible(uint64_t at, uint64_t position, uint32_t n_tokens)
{
    if (position == UINT64_MAX)
        return n_tokens;
    if (position > at)
        return 0;
    return at - position < n_tokens ? (uint32_t)(at - position) + 1 : n_tokens;
}

/* A group of blocks, as a tile sees it. */
struct window_group {
    uint32_t n; /* blocks */
    const uint64_t *position;
    const uint32_t *n_tokens;
};

/* Puts -inf where a row may not look. Query row r of the tile stands at (row_first + r) / G. */
static void tile_mask(const struct window_group *group, uint32_t n_blocks, uint64_t row_first,
                      uint32_t n_rows, uint32_t n_q, float *s)
{
    for (uint32_t b = 0; b < n_blocks; b++) {
        uint32_t of_first = tokens_visible(row_first / n_q, group->position[b], group->n_tokens[b]);
        if (of_first == WINNOW_BLOCK_TOKENS)
            continue;
        for (uint32_t r = 0; r < n_rows; r++) {
            uint32_t n_visible =
                tokens_visible((row_first + r) / n_q, group->position[b], group->n_tokens[b]);
            float *at = s + (size_t)r * GROUP_TOKENS + 16 * b;
            v16_store(at, v16_first(n_visible, v16_load(at), v16_set1(-INFINITY)));
        }
    }
}

/* Logits s of n_tokens to p = exp(s - m), with m raised to the tile's rows; returns for each row
 * m, sum p, and by what the row's earlier l and o shrink. */
SIMD void tile_exp(uint32_t n_tokens, float *s, const float m_before[16], float m[16],
                   float sum[16], float shrink[16])
{
    v16 row[16], lowest = v16_set1(-FLT_MAX), zero = v16_set1(0.0f);
    float shift[16];

    for (uint32_t r = 0; r < 16; r++)
        row[r] = zero;
    for (uint32_t r = 0; r < TILE_ROWS; r++) {
        const float *at = s + (size_t)r * GROUP_TOKENS;
        row[r] = v16_load(at);
        for (uint32_t t = 16; t < n_tokens; t += 16)
            row[r] = v16_max(row[r], v16_load(at + t));
    }
    v16 before = v16_load(m_before);
    v16 after = v16_max(v16_rows_largest(row), before);
    v16 by = v16_less_choose(after, lowest, zero, after); /* -inf - -inf is NaN */
    v16_store(m, after);
    v16_store(shift, by);
    v16_store(shrink, v16_exp(v16_sub(before, by)));

    for (uint32_t r = 0; r < TILE_ROWS; r++) {
        float *at = s + (size_t)r * GROUP_TOKENS;
        v16 total = zero, by_row = v16_set1(shift[r]);
        for (uint32_t t = 0; t < n_tokens; t += 16) {
            v16 p = v16_exp(v16_sub(v16_load(at + t), by_row));
            total = v16_add(total, p);
            v16_store(at + t, p);
        }
        row[r] = total;
    }
    v16_store(sum, v16_rows_sum(row));
}

/* n_rows <= TILE_ROWS query rows, the first of them row_first of the sequence, over a group. */
static void tile_attend(const struct winnow_model_shape *shape, const struct window_scratch *w,
                        const struct window_group *group, uint64_t row_first, uint32_t n_rows,
                        const float *q, float *partial)
{
    uint32_t n_q = shape_n_q(shape), v_width = shape->v_width;
    uint64_t at_last = (row_first + n_rows - 1) / n_q;
    uint32_t n_blocks = group->n;
    size_t stride = v_width + 2;
    float m_before[16] = {0}, m[16], sum[16], shrink[16];

    while (n_blocks && !tokens_visible(at_last, group->position[n_blocks - 1], 1))
        n_blocks--;
    if (!n_blocks)
        return;
    uint32_t n_tokens = WINNOW_BLOCK_TOKENS * n_blocks;
    for (uint32_t r = 0; r < n_rows; r++)
        m_before[r] = partial[r * stride];

    tile_scores(n_tokens, shape->k_width, shape->softmax_scale, q, w->k, w->s);
    tile_mask(group, n_blocks, row_first, n_rows, n_q, w->s);
    tile_exp(n_tokens, w->s, m_before, m, sum, shrink);
    tile_outputs(n_tokens, v_width, w->s, w->v, w->o);

    for (uint32_t r = 0; r < n_rows; r++) {
        float *at = partial + r * stride;
        const float *o = w->o + (size_t)r * v_width;
        v16 x = v16_set1(shrink[r]);
        at[0] = m[r];
        at[1] = at[1] * shrink[r] + sum[r];
        for (uint32_t d = 0; d < v_width; d += 16)
            v16_store(at + 2 + d, v16_fma(v16_load(at + 2 + d), x, v16_load(o + d)));
    }
}

static void group_attend(const struct winnow_model_shape *shape, const struct window_scratch *w,
                         const struct window_group *group, uint64_t row_first, uint32_t n_rows,
                         const float *q, float *partial)
{
    uint32_t k_width = shape->k_width;
    size_t stride = shape->v_width + 2;
    uint32_t r = 0;

    for (; r + TILE_ROWS <= n_rows; r += TILE_ROWS)
        tile_attend(shape, w, group, row_first + r, TILE_ROWS, q + (size_t)r * k_width,
                    partial + r * stride);
    if (r == n_rows)
        return;
    memset(w->q_rest, 0, (size_t)TILE_ROWS * k_width * sizeof(float));
    memcpy(w->q_rest, q + (size_t)r * k_width, (size_t)(n_rows - r) * k_width * sizeof(float));
    tile_attend(shape, w, group, row_first + r, n_rows - r, w->q_rest, partial + r * stride);
}

static void attend_window(const struct winnow_model_shape *shape, uint32_t n_pos, uint64_t first,
                          const float *q, uint32_t n, const void *const *block,
                          const uint64_t *position, const uint32_t *n_tokens, float *partial,
                          void *scratch)
{
    uint32_t n_q = shape_n_q(shape);
    struct window_scratch w = window_scratch(shape, scratch);

    for (uint32_t b = 0; b < n; b += WINNOW_GROUP_BLOCKS) {
        struct window_group group = {
            .n = n - b < WINNOW_GROUP_BLOCKS ? n - b : WINNOW_GROUP_BLOCKS,
            .position = position + b,
            .n_tokens = n_tokens + b,
        };
        for (uint32_t i = 0; i < group.n; i++)
            block_widen(shape, block[b + i], n_tokens[b + i], w.k + 16 * i,
                        w.v + (size_t)16 * i * shape->v_width);
        group_attend(shape, &w, &group, first * n_q, n_pos * n_q, q, partial);
    }
}
