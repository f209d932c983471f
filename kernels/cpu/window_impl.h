/*
 * Exact attention of a window of query positions: two matrix products a group of blocks, S = Q K^T
 * and O = P V, with a running maximum (flash attention).
 *
 * The window's n_pos x G query rows are the rows of Q as they lie. Eight blocks are widened to
 * fp32 once (64 KiB at d = 64: they stay in L2), then every tile of TILE_ROWS rows passes over
 * them: S of 128 tokens, exp, O. Both products are the same routine, TILE_ROWS x TILE_VECTORS
 * accumulators in registers, one load of B and a broadcast of A a step. B lies in panels, whose rows
 * follow each other.
 *
 * 512 positions, d 64 and G 3 (d 128 and G 4): 83 (88) % of a core's FMA peak with AVX-512, 85 (91)
 * with AVX2. With B's rows as far apart as the blocks' tokens, AVX2 reached 64. The rest is exp.
 *
 * Causality is a matter of blocks: those after the tile's last position are left out, those before
 * its first need no mask, and only the few between are masked, a prefix of tokens a row.
 */
#pragma once

#include <kernels/cpu/simd.h>

#ifdef __AVX512F__
enum { TILE_ROWS = 12, TILE_VECTORS = 2 };
#else
enum { TILE_ROWS = 6, TILE_VECTORS = 1 };
#endif
enum {
    PANEL = 16 * TILE_VECTORS, /* columns of B that a product takes at once */
    GROUP_TOKENS = WINNOW_GROUP_BLOCKS * WINNOW_BLOCK_TOKENS,
};

/* What one call needs, all fp32. Columns that fill a last panel up are computed, never read. */
struct window_scratch {
    float *k;       /* [GROUP_TOKENS / PANEL][k_width][PANEL] */
    float *v;       /* [o_width / PANEL][GROUP_TOKENS][PANEL] */
    float *s;       /* [TILE_ROWS][GROUP_TOKENS]: logits, then p */
    float *q_rest;  /* [TILE_ROWS][k_width]: the last tile's rows, filled up with zeros */
    float *o;       /* [TILE_ROWS][o_width] */
    size_t o_width; /* v_width in whole panels */
};

static size_t window_scratch_init(struct window_scratch *w, const struct winnow_model_shape *shape,
                                  float *scratch)
{
    size_t k_width = shape->k_width, o_width = (shape->v_width + PANEL - 1) / PANEL * PANEL;
    size_t v_at = GROUP_TOKENS * k_width, s_at = v_at + GROUP_TOKENS * o_width;
    size_t q_at = s_at + (size_t)TILE_ROWS * GROUP_TOKENS, o_at = q_at + TILE_ROWS * k_width;

    if (scratch)
        *w = (struct window_scratch){.k = scratch,
                                     .v = scratch + v_at,
                                     .s = scratch + s_at,
                                     .q_rest = scratch + q_at,
                                     .o = scratch + o_at,
                                     .o_width = o_width};
    return (o_at + TILE_ROWS * o_width) * sizeof(float);
}

static size_t window_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_pos)
{
    (void)n_pos;
    return window_scratch_init(NULL, shape, NULL);
}

/* C [TILE_ROWS][PANEL] = A [TILE_ROWS][depth] x B [depth][PANEL]; for logits times scale, clamped.
 * Rows of A and C are their strides apart. */
SIMD void tile_product(bool is_logits, float scale, size_t depth, const float *a, size_t a_stride,
                       const float *b, float *c, size_t c_stride)
{
    v16 sum[TILE_ROWS][TILE_VECTORS];

#pragma GCC unroll 16
    for (uint32_t r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (uint32_t j = 0; j < TILE_VECTORS; j++)
            sum[r][j] = v16_set1(0.0f);
    for (size_t i = 0; i < depth; i++, b += PANEL) {
        v16 row[TILE_VECTORS];
#pragma GCC unroll 2
        for (uint32_t j = 0; j < TILE_VECTORS; j++)
            row[j] = v16_load(b + 16 * j);
#pragma GCC unroll 16
        for (uint32_t r = 0; r < TILE_ROWS; r++) {
            v16 x = v16_set1(a[r * a_stride + i]);
#pragma GCC unroll 2
            for (uint32_t j = 0; j < TILE_VECTORS; j++)
                sum[r][j] = v16_fma(x, row[j], sum[r][j]);
        }
    }
#pragma GCC unroll 16
    for (uint32_t r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 2
        for (uint32_t j = 0; j < TILE_VECTORS; j++) {
            if (is_logits)
                sum[r][j] = v16_clamp(v16_mul(sum[r][j], v16_set1(scale)));
            v16_store(c + r * c_stride + 16 * j, sum[r][j]);
        }
}

/* s = scale x Q K^T. The two common widths are constants: the rows of Q then need one register. */
static void tile_scores(uint32_t n_tokens, size_t k_width, float scale, const float *q,
                        const float *k, float *s)
{
    for (uint32_t t = 0; t < n_tokens; t += PANEL, k += PANEL * k_width) {
        if (k_width == 64)
            tile_product(true, scale, 64, q, 64, k, s + t, GROUP_TOKENS);
        else if (k_width == 128)
            tile_product(true, scale, 128, q, 128, k, s + t, GROUP_TOKENS);
        else
            tile_product(true, scale, k_width, q, k_width, k, s + t, GROUP_TOKENS);
    }
}

/* o = P V */
static void tile_outputs(uint32_t n_tokens, size_t o_width, const float *p, const float *v,
                         float *o)
{
    for (size_t d = 0; d < o_width; d += PANEL, v += (size_t)GROUP_TOKENS * PANEL)
        tile_product(false, 0.0f, n_tokens, p, GROUP_TOKENS, v, o + d, o_width);
}

/* Widens block b_idx of a group into its columns of K and rows of V. Of tokens that are not there,
 * the logits are masked, the values 0. */
SIMD void block_widen_as(uint32_t dtype, const struct winnow_model_shape *shape, const void *block,
                         uint32_t n_tokens, const struct window_scratch *w, uint32_t b_idx)
{
    size_t k_width = shape->k_width, v_width = shape->v_width;
    const void *v_rows = element_at(dtype, block, WINNOW_BLOCK_TOKENS * k_width);
    float *k = w->k + b_idx / TILE_VECTORS * PANEL * k_width + b_idx % TILE_VECTORS * 16;
    v16 zero = v16_set1(0.0f);

    for (size_t d = 0; d < k_width; d++)
        v16_store(k + PANEL * d, v16_load_as(dtype, block, 16 * d));
    for (size_t t = 0; t < WINNOW_BLOCK_TOKENS; t++) {
        float *v = w->v + (16 * b_idx + t) * PANEL;
        for (size_t d = 0; d < v_width; d += 16)
            v16_store(v + d / PANEL * PANEL * GROUP_TOKENS + d % PANEL,
                      t < n_tokens ? v16_load_as(dtype, v_rows, t * v_width + d) : zero);
    }
}

static void block_widen(const struct winnow_model_shape *shape, const void *block,
                        uint32_t n_tokens, const struct window_scratch *w, uint32_t b_idx)
{
    uint16_t rows[ROWS_MAX];
    block = block_in_rows(shape, block, rows);
    if (shape->kv_dtype == WINNOW_FP16)
        block_widen_as(WINNOW_FP16, shape, block, n_tokens, w, b_idx);
    else if (shape->kv_dtype == WINNOW_BF16)
        block_widen_as(WINNOW_BF16, shape, block, n_tokens, w, b_idx);
    else
        block_widen_as(WINNOW_FP32, shape, block, n_tokens, w, b_idx);
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
    tile_outputs(n_tokens, w->o_width, w->s, w->v, w->o);

    for (uint32_t r = 0; r < n_rows; r++) {
        float *at = partial + r * stride;
        const float *o = w->o + r * w->o_width;
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
    struct window_scratch w;

    window_scratch_init(&w, shape, scratch);

    for (uint32_t b = 0; b < n; b += WINNOW_GROUP_BLOCKS) {
        struct window_group group = {
            .n = n - b < WINNOW_GROUP_BLOCKS ? n - b : WINNOW_GROUP_BLOCKS,
            .position = position + b,
            .n_tokens = n_tokens + b,
        };
        for (uint32_t i = 0; i < group.n; i++)
            block_widen(shape, block[b + i], n_tokens[b + i], &w, i);
        group_attend(shape, &w, &group, first * n_q, n_pos * n_q, q, partial);
    }
}
