/*
 * Balanced bisection (kernels/ref/bisect.c has the idea), in fp32.
 *
 * The covariance matrix is never made: a power iteration is y = X^T (X v), 4 d operations a token
 * where the upper half of C takes d^2. Sixteen of them cost as much as C at d = 64, a quarter at
 * 256, and go by the same two routines at every width. A segment of 1,024 tokens takes 0.35 ms at d
 * 64. Keys are scaled by a power of two to at most 1: huge and tiny ones neither overflow nor vanish.
 *
 * A half is chosen by radix selection: the rank of its last projection in four counting passes,
 * then one stable pass that keeps the order of position. Rejected: sorting, which orders what
 * nobody asks about.
 *
 * Projections differ from the reference's by rounding, so a token between two halves may fall to
 * the other side; equal keys have equal projections wherever they lie.
 */
#pragma once

#include <kernels/cpu/simd.h>

enum { N_POWER_ITERATIONS = 16 };

struct bisection {
    size_t width;
    const float *k;
    float scale; /* a power of two */
    uint16_t *order;
    float *x;        /* [n_tokens][width]: keys of a node x scale - their mean */
    uint32_t *rank;  /* [n_tokens] of the projections */
    uint16_t *right; /* [n_tokens]: tokens of the right half */
};

static size_t bisect_scratch_bytes(size_t width, size_t n_blocks)
{
    return 16 * n_blocks *
           (width * sizeof(float) + sizeof(float) + sizeof(uint32_t) + sizeof(uint16_t));
}

/* Fills x; returns the dimension of the largest variance, the first of equals. */
static uint32_t node_center(const struct bisection *b, uint32_t first, uint32_t n_tokens)
{
    float square[WINNOW_WIDTH_MAX];
    uint32_t largest = 0;
    v16 scale = v16_set1(b->scale);

    for (size_t d = 0; d < b->width; d += 16) {
        v16 sum = v16_set1(0.0f), sum_square = sum;
        for (uint32_t i = 0; i < n_tokens; i++) {
            const float *k = b->k + (size_t)b->order[first + i] * b->width;
            v16 x = v16_mul(v16_load(k + d), scale);
            sum = v16_add(sum, x);
            v16_store(b->x + i * b->width + d, x);
        }
        v16 mean = v16_div(sum, v16_set1((float)n_tokens));
        for (uint32_t i = 0; i < n_tokens; i++) {
            float *at = b->x + i * b->width + d;
            v16 x = v16_sub(v16_load(at), mean);
            sum_square = v16_fma(x, x, sum_square);
            v16_store(at, x);
        }
        v16_store(square + d, sum_square);
    }
    for (uint32_t d = 1; d < b->width; d++)
        if (square[d] > square[largest])
            largest = d;
    return largest;
}

/* Projections of sixteen tokens on v. */
SIMD v16 rows_project(size_t width, const float *x, const float *v)
{
    v16 row[16];

#pragma GCC unroll 16
    for (uint32_t t = 0; t < 16; t++)
        row[t] = v16_mul(v16_load(x + t * width), v16_load(v));
    for (size_t d = 16; d < width; d += 16) {
        v16 of_v = v16_load(v + d);
#pragma GCC unroll 16
        for (uint32_t t = 0; t < 16; t++)
            row[t] = v16_fma(v16_load(x + t * width + d), of_v, row[t]);
    }
    return v16_rows_sum(row);
}

/* n_vectors x 16 dimensions of y += w [16] x X [16][width] */
SIMD void rows_gather(uint32_t n_vectors, size_t width, const float *x, const float *w, float *y)
{
    v16 sum[4];

#pragma GCC unroll 4
    for (uint32_t c = 0; c < n_vectors; c++)
        sum[c] = v16_load(y + 16 * c);
#pragma GCC unroll 16
    for (uint32_t t = 0; t < 16; t++) {
        v16 of_w = v16_set1(w[t]);
#pragma GCC unroll 4
        for (uint32_t c = 0; c < n_vectors; c++)
            sum[c] = v16_fma(of_w, v16_load(x + t * width + 16 * c), sum[c]);
    }
#pragma GCC unroll 4
    for (uint32_t c = 0; c < n_vectors; c++)
        v16_store(y + 16 * c, sum[c]);
}

/* y = X^T (X v), one pass over X. */
static void node_multiply(const struct bisection *b, uint32_t n_tokens, const float *v, float *y)
{
    float w[16];

    memset(y, 0, b->width * sizeof *y);
    for (uint32_t i = 0; i < n_tokens; i += 16) {
        const float *x = b->x + i * b->width;
        size_t d = 0;
        v16_store(w, rows_project(b->width, x, v));
        for (; d + 64 <= b->width; d += 64)
            rows_gather(4, b->width, x + d, w, y + d);
        for (; d < b->width; d += 16)
            rows_gather(1, b->width, x + d, w, y + d);
    }
}

/* The widest direction, by power iteration from a dimension. */
static void node_direction(const struct bisection *b, uint32_t n_tokens, uint32_t dimension,
                           float *v)
{
    float y[WINNOW_WIDTH_MAX];

    memset(v, 0, b->width * sizeof *v);
    v[dimension] = 1;
    for (int i = 0; i < N_POWER_ITERATIONS; i++) {
        v16 square = v16_set1(0.0f);
        node_multiply(b, n_tokens, v, y);
        for (size_t d = 0; d < b->width; d += 16)
            square = v16_fma(v16_load(y + d), v16_load(y + d), square);
        float length = sqrtf(v16_sum(square));
        if (!(length >= FLT_MIN))
            return;
        for (size_t d = 0; d < b->width; d += 16)
            v16_store(v + d, v16_div(v16_load(y + d), v16_set1(length)));
    }
}

/* Ranks of the projections on v: as unsigned numbers they order as those do, -0 and 0 alike. */
static void node_rank(const struct bisection *b, uint32_t n_tokens, const float *v)
{
    for (uint32_t i = 0; i < n_tokens; i += 16) {
        v16 w = rows_project(b->width, b->x + i * b->width, v);
        v16i bits = v16_bits(v16_add(w, v16_set1(0.0f)));
        v16i flip = v16i_or(v16i_shift_right(bits, 31), v16i_set1(INT32_MIN));
        v16i_store((int32_t *)b->rank + i, v16i_xor(bits, flip));
    }
}

/* The n-th smallest rank (n >= 1), and how many of those equal to it are among the first n. */
static uint32_t rank_select(const uint32_t *rank, uint32_t n_tokens, uint32_t n, uint32_t *n_equal)
{
    uint32_t found = 0, mask = 0;

    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t count[256] = {0}, digit = 0;
        for (uint32_t i = 0; i < n_tokens; i++)
            count[rank[i] >> shift & 255] += (rank[i] & mask) == found;
        while (count[digit] < n)
            n -= count[digit++];
        found |= digit << shift;
        mask |= UINT32_C(255) << shift;
    }
    *n_equal = n;
    return found;
}

/* The n_left tokens of the smallest projections first, both halves in order of position. */
static void node_split(const struct bisection *b, uint16_t *order, uint32_t n_tokens,
                       uint32_t n_left)
{
    uint32_t n_equal, left = 0, right = 0;
    uint32_t last = rank_select(b->rank, n_tokens, n_left, &n_equal);
    for (uint32_t i = 0; i < n_tokens; i++) {
        uint32_t is_equal = b->rank[i] == last && n_equal > 0;
        uint32_t is_left = b->rank[i] < last || is_equal;
        uint16_t token = order[i];
        n_equal -= is_equal;
        order[left] = token; /* left <= i: overwritten or already read */
        b->right[right] = token;
        left += is_left;
        right += !is_left;
    }
    memcpy(order + left, b->right, right * sizeof *order);
}

/* Depth: log2 of n_blocks, rounded up, at most 12. */
static void bisect_node(const struct bisection *b, uint32_t block_first, uint32_t n_blocks)
{
    uint32_t first = 16 * block_first, n_tokens = 16 * n_blocks, n_left = (n_blocks + 1) / 2;

    if (n_blocks <= 1)
        return;
    float v[WINNOW_WIDTH_MAX];
    node_direction(b, n_tokens, node_center(b, first, n_tokens), v);
    node_rank(b, n_tokens, v);
    node_split(b, b->order + first, n_tokens, 16 * n_left);
    bisect_node(b, block_first, n_left);
    bisect_node(b, block_first + n_left, n_blocks - n_left);
}

/* Fills order [16 n_blocks]. largest: of |k|. */
static void bisect(size_t width, uint32_t n_blocks, const float *k, float largest, uint16_t *order,
                   void *scratch)
{
    size_t n_tokens = (size_t)16 * n_blocks;
    int exponent = 0;
    struct bisection b = {.width = width, .k = k, .order = order, .x = scratch};

    frexpf(largest, &exponent);
    b.scale = ldexpf(1.0f, exponent < -126 ? 126 : -exponent);
    b.rank = (uint32_t *)(b.x + n_tokens * width);
    b.right = (uint16_t *)(b.rank + n_tokens);
    for (size_t t = 0; t < n_tokens; t++)
        order[t] = (uint16_t)t;
    bisect_node(&b, 0, n_blocks);
}
