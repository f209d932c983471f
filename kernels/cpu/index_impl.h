/*
 * The index of a segment (kernels/ref/index.c has the reasons), sixteen dimensions at a time, and
 * `build`: refused, or cut into blocks and indexed.
 *
 * Sums are fp32 where the reference's are fp64: means, scales and codes may differ in their last
 * place. Lengths (radius, v_max) are raised by 1e-5 to stay upper bounds, and squared relative to
 * their largest component, so that none overflows.
 */
#pragma once

#include <kernels/cpu/bisect_impl.h>
#include <kernels/cpu/convert_impl.h>

/* Mean of sixteen rows. */
SIMD v16 rows_mean(const float *const row[16], size_t d)
{
    v16 sum = v16_set1(0.0f), share = v16_set1(1.0f / 16);

    for (uint32_t t = 0; t < 16; t++)
        sum = v16_fma(v16_load(row[t] + d), share, sum);
    return sum;
}

/* x [width] as int8 times the returned scale, absmax / 127. */
static float quantise(size_t width, const float *x, int8_t *dst)
{
    v16 largest = v16_set1(0.0f);

    for (size_t d = 0; d < width; d += 16)
        largest = v16_max(largest, v16_abs(v16_load(x + d)));
    float scale = v16_largest(largest) / 127.0f;
    v16 by = v16_set1(scale > 0 ? scale : INFINITY), limit = v16_set1(127.0f);
    for (size_t d = 0; d < width; d += 16) {
        v16 y = v16_round(v16_div(v16_load(x + d), by));
        y = v16_max(v16_min(y, limit), v16_sub(v16_set1(0.0f), limit));
        v16i_to_i8(dst + d, v16_to_i32(y));
    }
    return scale;
}

/* Lengths of sixteen rows x - origin (NULL: 0), a lane each, no shorter than they are; in largest
 * those of their components. */
static v16 rows_length(size_t width, const float *const row[16], const float *origin, v16 *largest)
{
    v16 zero = v16_set1(0.0f), top[16], square[16];
    float by[16];

    for (uint32_t t = 0; t < 16; t++) {
        top[t] = square[t] = zero;
        for (size_t d = 0; d < width; d += 16) {
            v16 x = v16_sub(v16_load(row[t] + d), origin ? v16_load(origin + d) : zero);
            top[t] = v16_max(top[t], v16_abs(x));
        }
    }
    *largest = v16_rows_largest(top);
    v16 one = v16_set1(1.0f), tiny = v16_set1(FLT_MIN);
    v16_store(by, v16_less_choose(*largest, tiny, zero, v16_div(one, *largest)));
    for (uint32_t t = 0; t < 16; t++)
        for (size_t d = 0; d < width; d += 16) {
            v16 x = v16_sub(v16_load(row[t] + d), origin ? v16_load(origin + d) : zero);
            x = v16_mul(x, v16_set1(by[t]));
            square[t] = v16_fma(x, x, square[t]);
        }
    v16 length = v16_mul(v16_sqrt(v16_rows_sum(square)), v16_mul(*largest, v16_set1(1.00001f)));
    v16 longest = v16_set1(16 * FLT_MIN); /* of 256 components below FLT_MIN */
    return v16_less_choose(*largest, tiny, v16_less_choose(zero, *largest, longest, zero), length);
}

/* Sixteen codes of token t, dimensions d to d + 15: two groups of four bytes. */
SIMD void code_store(uint8_t *code, uint32_t t, size_t d, v16i c)
{
    uint32_t word[4];
    int8_t biased[16];

    v16i_to_i8(biased, v16i_add(c, v16i_set1(8)));
    memcpy(word, biased, sizeof word);
    word[0] |= word[1] << 4;
    word[2] |= word[3] << 4;
    memcpy(code + (d / 8 * 16 + t) * 4, &word[0], 4);
    memcpy(code + ((d / 8 + 1) * 16 + t) * 4, &word[2], 4);
}

/* Codes of sixteen keys: x = k - mu, a = max|x| / 7 as fp16, c = x / a rounded. */
static void code_keys(size_t width, const float *const k[16], const float *mu, v16 largest,
                      uint16_t *code_scale, uint8_t *code)
{
    v16 limit = v16_set1(7.0f), lowest = v16_set1(-7.0f), endless = v16_set1(INFINITY);
    float by[16];

    v16_to_fp16(code_scale, v16_div(largest, limit));
    v16 a = v16_from_fp16(code_scale);
    v16_store(by, v16_less_choose(v16_set1(0.0f), a, a, endless)); /* a = 0, Inf: zeros */
    for (uint32_t t = 0; t < 16; t++)
        for (size_t d = 0; d < width; d += 16) {
            v16 x = v16_sub(v16_load(k[t] + d), v16_load(mu + d));
            x = v16_round(v16_div(x, v16_set1(by[t])));
            code_store(code, t, d, v16_to_i32(v16_max(v16_min(x, limit), lowest)));
        }
}

/* Variances about the mean; writes them unless var is NULL, returns their mean. */
static float rows_spread(size_t width, const float *const row[16], const float *mean, uint16_t *var)
{
    v16 spread = v16_set1(0.0f), share = v16_set1(1.0f / 16);

    for (size_t d = 0; d < width; d += 16) {
        v16 sum = v16_set1(0.0f);
        for (uint32_t t = 0; t < 16; t++) {
            v16 x = v16_sub(v16_load(row[t] + d), v16_load(mean + d));
            sum = v16_fma(v16_mul(x, share), x, sum);
        }
        if (var)
            v16_to_fp16(var + d, v16_min(sum, v16_set1(65504.0f)));
        spread = v16_fma(sum, v16_set1(1.0f / (float)width), spread);
    }
    return fminf(v16_sum(spread), FLT_MAX);
}

static void add_scaled(size_t width, float *sum, const float *x, float by)
{
    for (size_t d = 0; d < width; d += 16)
        v16_store(sum + d, v16_fma(v16_load(x + d), v16_set1(by), v16_load(sum + d)));
}

static void fill_keys(size_t width, uint32_t b, const float *const k[16],
                      struct winnow_index_view *view)
{
    struct winnow_block_head *head = view->head + b;
    float mean[WINNOW_WIDTH_MAX];
    int8_t *centroid = view->centroid + b * width;
    v16 largest;

    for (size_t d = 0; d < width; d += 16)
        v16_store(mean + d, rows_mean(k, d));
    head->centroid_scale = quantise(width, mean, centroid);
    head->spread = rows_spread(width, k, mean, view->var ? view->var + b * width : NULL);
    add_scaled(width, view->mean_k, mean, 1.0f / (float)view->n_blocks);
    for (size_t d = 0; d < width; d += 16) /* the stored centroid, from here on */
        v16_store(mean + d, v16_mul(v16_from_i32(v16i_from_i8(centroid + d)),
                                    v16_set1(head->centroid_scale)));
    head->radius = v16_largest(rows_length(width, k, mean, &largest));
    code_keys(width, k, mean, largest, view->code_scale + (size_t)16 * b,
              view->code + b * 8 * width);
}

static void fill_values(size_t width, uint32_t b, const float *const v[16],
                        struct winnow_index_view *view)
{
    float mean[WINNOW_WIDTH_MAX];
    v16 largest;

    for (size_t d = 0; d < width; d += 16)
        v16_store(mean + d, rows_mean(v, d));
    view->head[b].vmean_scale = quantise(width, mean, view->vmean + b * width);
    add_scaled(width, view->mean_v, mean, 1.0f / (float)view->n_blocks);
    *view->v_max = fmaxf(*view->v_max, v16_largest(rows_length(width, v, NULL, &largest)));
}

static void index_fill(const struct winnow_model_shape *shape, const float *k, const float *v,
                       const uint16_t *order, struct winnow_index_view *view)
{
    const float *k_row[16], *v_row[16];

    memset(view->mean_k, 0, shape->k_width * sizeof(float));
    memset(view->mean_v, 0, shape->v_width * sizeof(float));
    *view->v_max = 0;
    for (uint32_t b = 0; b < view->n_blocks; b++) {
        for (uint32_t t = 0; t < 16; t++) {
            k_row[t] = k + (size_t)order[16 * b + t] * shape->k_width;
            v_row[t] = v + (size_t)order[16 * b + t] * shape->v_width;
        }
        fill_keys(shape->k_width, b, k_row, view);
        fill_values(shape->v_width, b, v_row, view);
    }
}

/* Largest |x| of n numbers, a multiple of 16; false: one is NaN or Inf. */
static bool largest_finite(size_t n, const float *x, float *largest)
{
    v16 top = v16_set1(0.0f), bad = top, limit = v16_set1(INFINITY);

    for (size_t i = 0; i < n; i += 16) {
        v16 y = v16_load(x + i);
        top = v16_max(top, v16_abs(y));
        bad = mark_bad(bad, y, limit);
    }
    *largest = v16_largest(top);
    return v16_largest(bad) == 0;
}

static int build(const struct winnow_model_shape *shape, uint32_t n_blocks, const float *k,
                 const float *v, uint16_t *order, struct winnow_index_view *view, void *scratch)
{
    size_t n_tokens = (size_t)16 * n_blocks;
    float k_largest, v_largest;

    if (!largest_finite(n_tokens * shape->k_width, k, &k_largest) ||
        !largest_finite(n_tokens * shape->v_width, v, &v_largest))
        return -EDOM;
    bisect(shape->k_width, n_blocks, k, k_largest, order, scratch);
    index_fill(shape, k, v, order, view);
    return 0;
}
