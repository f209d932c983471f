/*
 * What a build promises, held against ref/ on the same tokens: a permutation in blocks of 16, each
 * in order of position, whose summed variance is ref's but for chance; and an index that says of its
 * own blocks what ref would say of them.
 *
 * Chance: where two halves part is decided by a rounding now and then, and all below it is another
 * tree. Of 3,200 builds by ref of random topics, keys changed by 2^-12 of themselves, 30 had above
 * 1.003 times the variance, 4 above 1.01, the worst 1.015; the average was 1.000.
 */
#pragma once

#include <float.h>
#include <kernels/ref/ref.h>
#include <test.h>

#include "cases.h"

struct built {
    const char *name; /* of the version, for what a failure says */
    const struct winnow_model_shape *shape;
    uint32_t n_blocks;
    const float *k, *v; /* as they were given: [16 n_blocks][width] */
    const uint16_t *order;
    const struct winnow_index_view *view; /* var may be NULL */
    bool is_ref_order;                    /* ties alone decide: ref's order, bit by bit */
};

/* Of all that was built: the sum of variances over ref's. */
static double built_ratios;
static uint32_t built_n_ratios;

static inline void built_close(const struct built *built, const char *what, size_t i, double a,
                               double b, double tolerance)
{
    char text[256];

    if (a == b || fabs(a - b) <= tolerance + (double)FLT_MIN)
        return;
    snprintf(text, sizeof text, "%s, width %u, %u blocks: %s[%zu] is %.9g, ref has %.9g (+-%.3g)",
             built->name, built->shape->k_width, built->n_blocks, what, i, a, b, tolerance);
    test_fail(__FILE__, __LINE__, text);
}

/* Sum over blocks of the squared distance of keys to their mean. */
static inline double built_variance(const struct built *built, const uint16_t *order)
{
    uint32_t width = built->shape->k_width;
    double total = 0;

    for (uint32_t b = 0; b < built->n_blocks; b++)
        for (uint32_t d = 0; d < width; d++) {
            double sum = 0, square = 0;
            for (uint32_t t = 0; t < 16; t++) {
                double x = (double)built->k[(size_t)order[16 * b + t] * width + d];
                sum += x;
                square += x * x;
            }
            total += fmax(square - sum * sum / 16, 0);
        }
    return total;
}

static inline void built_order_check(const struct built *built)
{
    uint8_t *seen = case_alloc((size_t)16 * built->n_blocks);

    for (uint32_t i = 0; i < 16 * built->n_blocks; i++) {
        CHECK(built->order[i] < 16 * built->n_blocks && !seen[built->order[i]]);
        seen[built->order[i]] = 1;
        CHECK(i % 16 == 0 || built->order[i - 1] < built->order[i]);
    }
    winnow_alloc_free(seen);
}

static inline double built_largest(const float *x, size_t n)
{
    double largest = 0;

    for (size_t i = 0; i < n; i++)
        largest = fmax(largest, fabs((double)x[i]));
    return largest;
}

/* A stored number differs by what one step of its neighbour allows: codes and int8 by one. */
static inline void built_index_check(const struct built *built, const struct winnow_index_view *b)
{
    const struct winnow_index_view *a = built->view;
    uint32_t width = built->shape->k_width, v_width = built->shape->v_width;
    double k_largest = built_largest(built->k, (size_t)16 * b->n_blocks * width);
    double v_largest = built_largest(built->v, (size_t)16 * b->n_blocks * v_width);

    for (uint32_t i = 0; i < b->n_blocks; i++) {
        const struct winnow_block_head *x = a->head + i, *y = b->head + i;
        built_close(built, "centroid_scale", i, (double)x->centroid_scale,
                    (double)y->centroid_scale, 1e-6 * k_largest);
        built_close(built, "vmean_scale", i, (double)x->vmean_scale, (double)y->vmean_scale,
                    1e-6 * v_largest);
        built_close(built, "spread", i, (double)x->spread, (double)y->spread,
                    1e-5 * (double)y->spread + 1e-12 * k_largest * k_largest);
    }
    for (size_t i = 0; i < (size_t)b->n_blocks * width; i++) {
        CHECK(abs(a->centroid[i] - b->centroid[i]) <= 1);
        if (!a->var)
            continue;
        float x = winnow_ref_fp16_to_float(a->var[i]), y = winnow_ref_fp16_to_float(b->var[i]);
        built_close(built, "var", i, (double)x, (double)y,
                    2e-3 * (double)y + 1e-12 * k_largest * k_largest + 0x1p-24);
    }
    for (size_t i = 0; i < (size_t)b->n_blocks * v_width; i++)
        CHECK(abs(a->vmean[i] - b->vmean[i]) <= 1);
    for (uint32_t d = 0; d < width; d++)
        built_close(built, "mean_k", d, (double)a->mean_k[d], (double)b->mean_k[d],
                    2e-6 * k_largest);
    for (uint32_t d = 0; d < v_width; d++)
        built_close(built, "mean_v", d, (double)a->mean_v[d], (double)b->mean_v[d],
                    2e-6 * v_largest);
    CHECK(*a->v_max >= *b->v_max * (1 - 1e-6f));
    built_close(built, "v_max", 0, (double)*a->v_max, (double)*b->v_max,
                2e-5 * (double)*b->v_max + 16 * (double)FLT_MIN);
}

static inline int built_code(const struct built *built, uint32_t b, uint32_t t, uint32_t d)
{
    uint8_t pair =
        built->view->code[(size_t)b * 8 * built->shape->k_width + (d / 8 * 16 + t) * 4 + d % 4];
    return (d % 8 < 4 ? pair & 15 : pair >> 4) - 8;
}

/* Keys, as centroid and code say them, within half a step of the code, and the rounding of all;
 * none farther from the centroid than radius. */
static inline void built_codes_check(const struct built *built)
{
    const struct winnow_index_view *view = built->view;
    uint32_t width = built->shape->k_width;

    for (uint32_t b = 0; b < built->n_blocks; b++) {
        double radius = 0;
        for (uint32_t t = 0; t < 16; t++) {
            double square = 0, a = (double)winnow_ref_fp16_to_float(view->code_scale[16 * b + t]);
            for (uint32_t d = 0; d < width; d++) {
                double mu = (double)view->centroid[(size_t)b * width + d] *
                            (double)view->head[b].centroid_scale;
                double k = (double)built->k[(size_t)built->order[16 * b + t] * width + d];
                int c = built_code(built, b, t, d);
                square += (k - mu) * (k - mu);
                CHECK(c >= -7 && c <= 7);
                if (isfinite(a))
                    built_close(built, "code", d, mu + a * c, k,
                                0.51 * a + 1e-6 * fabs(mu) + 7 * 0x1p-24 /* a is fp16 */);
            }
            radius = fmax(radius, sqrt(square));
        }
        CHECK((double)view->head[b].radius >= radius * (1 - 1e-7));
        built_close(built, "radius", b, (double)view->head[b].radius, radius,
                    2e-5 * radius + 16 * (double)FLT_MIN);
    }
}

/* A build may be unlucky, not many. */
static inline void built_variance_check(const struct built *built, const uint16_t *ref_order)
{
    double variance = built_variance(built, built->order),
           of_ref = built_variance(built, ref_order);

    if (variance > 1.03 * of_ref + 1e-30)
        built_close(built, "variance", 0, variance, of_ref, 0.03 * of_ref);
    if (of_ref < 1e-30)
        return;
    built_ratios += variance / of_ref;
    built_n_ratios++;
    if (built_n_ratios >= 8)
        CHECK(built_ratios / built_n_ratios < 1.005);
}

static inline void built_check(const struct built *built)
{
    const struct winnow_kernels *ref = winnow_kernels_ref();
    size_t n_tokens = (size_t)16 * built->n_blocks;
    uint16_t *order = case_alloc(n_tokens * sizeof *order);
    void *scratch = case_alloc(ref->scratch_bytes(built->shape, built->n_blocks));
    struct winnow_index_view view;

    case_view_init(&view, built->shape, built->n_blocks);
    CHECK_EQ(ref->build(built->shape, built->n_blocks, built->k, built->v, order, &view, scratch),
             0);
    built_order_check(built);
    built_variance_check(built, order);
    if (built->is_ref_order)
        CHECK(!memcmp(built->order, order, n_tokens * sizeof *order));
    winnow_ref_index_fill(built->shape, built->n_blocks, built->k, built->v, built->order, &view);
    built_index_check(built, &view);
    built_codes_check(built);
    case_view_finish(&view);
    winnow_alloc_free(order);
    winnow_alloc_free(scratch);
}
