/*
 * Balanced bisection: cuts the tokens of a segment into blocks of 16 that lie close together.
 *
 * A node is split along its widest direction v, the largest eigenvector of its covariance, into
 * two halves of whole blocks, down to single blocks. So every block is full, no centre drifts and
 * nothing is random. Rejected: k-means (the same share of blocks read, 9 times the operations,
 * padding) and positional pages (1.4 to 1.6 times the blocks).
 *
 * C and v are fp64: huge keys cannot overflow them, and 16 power iterations lose nothing. The
 * projections are rounded to fp32, and equal ones keep the order of position.
 */
#include <base/assert.h>
#include <kernels/ref/ref.h>
#include <string.h>

enum { N_POWER_ITERATIONS = 16 };

struct bisection {
    uint32_t width;
    const float *k;
    uint16_t *order;
    uint64_t *key; /* [tokens]: rank of the projection, place in the node */
    double *c;     /* [width][width] */
};

static const float *token_key(const struct bisection *b, uint32_t i)
{
    return b->k + (size_t)b->order[i] * b->width;
}

static void node_mean(const struct bisection *b, uint32_t first, uint32_t n_tokens, double *mean)
{
    memset(mean, 0, b->width * sizeof *mean);
    for (uint32_t i = first; i < first + n_tokens; i++)
        for (uint32_t d = 0; d < b->width; d++)
            mean[d] += (double)token_key(b, i)[d];
    for (uint32_t d = 0; d < b->width; d++)
        mean[d] /= n_tokens;
}

/* C = X^T X of X = keys - mean. */
static void node_covariance(const struct bisection *b, uint32_t first, uint32_t n_tokens,
                            const double *mean)
{
    uint32_t width = b->width;
    double x[WINNOW_WIDTH_MAX];

    memset(b->c, 0, (size_t)width * width * sizeof *b->c);
    for (uint32_t i = first; i < first + n_tokens; i++) {
        const float *k = token_key(b, i);
        for (uint32_t d = 0; d < width; d++)
            x[d] = (double)k[d] - mean[d];
        for (uint32_t row = 0; row < width; row++)
            for (uint32_t d = row; d < width; d++)
                b->c[row * width + d] += x[row] * x[d];
    }
    for (uint32_t row = 0; row < width; row++)
        for (uint32_t d = 0; d < row; d++)
            b->c[row * width + d] = b->c[d * width + row];
}

/* The largest eigenvector, by power iteration from the dimension of the largest variance. */
static void node_direction(const struct bisection *b, double *v)
{
    uint32_t width = b->width, largest = 0;
    double cv[WINNOW_WIDTH_MAX];

    for (uint32_t d = 1; d < width; d++)
        if (b->c[d * width + d] > b->c[largest * width + largest])
            largest = d;
    memset(v, 0, width * sizeof *v);
    v[largest] = 1;

    for (int i = 0; i < N_POWER_ITERATIONS; i++) {
        double square = 0;
        for (uint32_t row = 0; row < width; row++) {
            double sum = 0;
            for (uint32_t d = 0; d < width; d++)
                sum += b->c[row * width + d] * v[d];
            cv[row] = sum;
            square += sum * sum;
        }
        double length = sqrt(square);
        if (length < 1e-30)
            return;
        for (uint32_t d = 0; d < width; d++)
            v[d] = cv[d] / length;
    }
}

/* The n_left tokens of the smallest projections come first; both halves in order of position. */
static void node_split(const struct bisection *b, uint32_t first, uint32_t n_tokens,
                       uint32_t n_left, const double *mean, const double *v)
{
    for (uint32_t i = 0; i < n_tokens; i++) {
        const float *k = token_key(b, first + i);
        double sum = 0;
        for (uint32_t d = 0; d < b->width; d++)
            sum += ((double)k[d] - mean[d]) * v[d];
        b->key[i] = (uint64_t)winnow_ref_rank((float)sum) << 32 | i;
    }
    winnow_assert(n_left > 0);
    winnow_assert(n_left < n_tokens);
    winnow_ref_sort(b->key, n_tokens);
    for (uint32_t i = 0; i < n_tokens; i++)
        b->key[i] = b->order[first + (uint32_t)b->key[i]];
    winnow_ref_sort(b->key, n_left);
    winnow_ref_sort(b->key + n_left, n_tokens - n_left);
    for (uint32_t i = 0; i < n_tokens; i++)
        b->order[first + i] = (uint16_t)b->key[i];
}

/* Depth: log2 of n_blocks, rounded up, at most 12. */
static void bisect(const struct bisection *b, uint32_t block_first, uint32_t n_blocks)
{
    uint32_t first = 16 * block_first, n_tokens = 16 * n_blocks, n_left = (n_blocks + 1) / 2;

    if (n_blocks <= 1)
        return;
    double mean[WINNOW_WIDTH_MAX], v[WINNOW_WIDTH_MAX];
    node_mean(b, first, n_tokens, mean);
    node_covariance(b, first, n_tokens, mean);
    node_direction(b, v);
    node_split(b, first, n_tokens, 16 * n_left, mean, v);
    bisect(b, block_first, n_left);
    bisect(b, block_first + n_left, n_blocks - n_left);
}

size_t winnow_ref_bisect_scratch_bytes(uint32_t k_width, uint32_t n_blocks)
{
    return (size_t)k_width * k_width * sizeof(double) + (size_t)16 * n_blocks * sizeof(uint64_t);
}

void winnow_ref_bisect(uint32_t k_width, uint32_t n_blocks, const float *k, uint16_t *order,
                       void *scratch)
{
    winnow_assert(n_blocks <= (UINT16_MAX + 1) / 16);
    winnow_assert(k_width > 0);
    winnow_assert(k_width <= WINNOW_WIDTH_MAX);
    winnow_assert((uintptr_t)scratch % _Alignof(double) == 0);

    double *c = scratch;
    struct bisection b = {
        .width = k_width,
        .k = k,
        .order = order,
        .c = c,
        .key = (uint64_t *)(c + (size_t)k_width * k_width),
    };
    for (uint32_t t = 0; t < 16 * n_blocks; t++)
        order[t] = (uint16_t)t;
    bisect(&b, 0, n_blocks);
}
