/*
 * What ref/ makes of a sparse item, and how far the device may be from it.
 *
 * Tolerances. A logit of the device differs from ref's by at most 2^-16 (bf16; fp16 2^-20) of the
 * largest sum of |q_i k_i|, a query being taken to two 16-bit halves; weights are rounded to the
 * storage type before they meet the values: 2^-8 or 2^-11 of each. Selection goes by bins of 1/64
 * nat of keys that differ from ref's by their rounding; which blocks it read is known here from how
 * many it read, all being a prefix in key order.
 */
#pragma once

#include "gpu_item.h"

static struct scene scene;

/* A decode step as ref/ takes it: one KV head, the first n_selected blocks in key order read. */
struct expected {
    uint32_t n_q, n_blocks, n_ref; /* n_ref: what ref's first round would read */
    struct winnow_selection sel;
    float *ln_e, *key, *out, lse[WINNOW_GQA_MAX], ln_z[WINNOW_GQA_MAX];
    uint32_t *block_idx;
    uint8_t *selected;
    double logit_error, v_largest;
};

static void acc_clear(float *acc)
{
    uint32_t stride = scene.of.shape.v_width + 2;
    memset(acc, 0, scene.n_group * stride * sizeof *acc);
    for (uint32_t g = 0; g < scene.n_group; g++)
        acc[g * stride] = -INFINITY;
}

/* Attends n blocks of tokens, from `first` on or in `order`, into acc. */
static void acc_attend(const struct scene_head *head, const float *q, uint64_t first, uint32_t n,
                       const uint16_t *order, float *acc)
{
    static float partial[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    void *block = case_alloc(scene.block_bytes);
    const void *blocks[] = {block};

    scene_block(&scene, head, first, n, order, block);
    scene.ref->attend_partial(&scene.head_shape, q, 1, blocks, &n, partial, NULL);
    scene.ref->merge(&scene.head_shape, 1, partial, acc);
    winnow_alloc_free(block);
}

static void acc_attend_tail(const struct scene_head *head, uint32_t session, const float *q,
                            float *acc)
{
    uint64_t n_tokens = scene_n_tokens(&scene, session);
    uint64_t sealed = (uint64_t)scene.of.n_segments[session] * scene.of.segment_tokens;

    for (uint64_t at = 0; at < n_tokens; at += 16) {
        if (at == scene.of.n_sinks)
            at += sealed;
        if (at < n_tokens)
            acc_attend(head, q, at, n_tokens - at < 16 ? (uint32_t)(n_tokens - at) : 16, NULL, acc);
    }
}

/* Largest difference of logits, largest value. */
static void expect_errors(struct expected *e, const struct scene_head *head, const float *q)
{
    const struct winnow_model_shape *shape = &scene.head_shape;
    double largest = 0;

    e->v_largest = 0;
    for (uint32_t t = 0; t < 16 * head->data.n_blocks; t++) {
        for (uint32_t g = 0; g < e->n_q; g++) {
            double sum = 0;
            for (uint32_t d = 0; d < shape->k_width; d++)
                sum += fabs((double)q[g * shape->k_width + d] *
                            (double)head->data.k[(size_t)t * shape->k_width + d]);
            largest = fmax(largest, sum);
        }
        for (uint32_t d = 0; d < shape->v_width; d++)
            e->v_largest =
                fmax(e->v_largest, fabs((double)head->data.v[(size_t)t * shape->v_width + d]));
    }
    e->logit_error = (shape->kv_dtype == WINNOW_BF16 ? 0x1p-16 : 0x1p-20) * largest *
                         (double)shape->softmax_scale +
                     1e-5;
}

static void expect_select(struct expected *e, const struct scene_head *head, uint32_t session,
                          const float *q, float mass)
{
    void *scratch = case_alloc(scene.ref->scratch_bytes(&scene.head_shape, e->n_blocks + 1));

    for (uint32_t k = 0; k < scene.of.n_segments[session]; k++)
        scene.ref->score(&scene.head_shape, WINNOW_POLICY_CODES, &head->segment[k].view, q,
                         e->ln_e + (size_t)k * scene.span * e->n_q, scratch);
    e->sel = (struct winnow_selection){
        .n_q = e->n_q,
        .n_blocks = e->n_blocks,
        .n_blocks_max = e->n_blocks,
        .mass = mass,
        .ln_z = e->ln_z,
        .ln_e = e->ln_e,
        .ln_key = e->key,
        .block_idx = e->block_idx,
        .selected = e->selected,
    };
    scene.ref->select(WINNOW_POLICY_CODES, &e->sel, scratch);
    e->n_ref = e->sel.n_selected;
    winnow_alloc_free(scratch);
}

static void expect_init(struct expected *e, uint32_t session, uint32_t layer, uint32_t query,
                        float mass, uint32_t n_selected)
{
    const struct scene_head *head = scene_head(&scene, session, layer, 0);
    const float *q = head->data.q + (size_t)query * scene.n_group * scene.of.shape.k_width;
    uint32_t stride = scene.of.shape.v_width + 2, n;
    static float acc[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)], partial[sizeof acc / sizeof *acc];

    *e = (struct expected){.n_q = scene.n_group};
    e->n_blocks = n = scene.of.n_segments[session] * scene.span;
    e->ln_e = case_alloc((n + 1) * e->n_q * sizeof *e->ln_e);
    e->key = case_alloc((n + 1) * sizeof *e->key);
    e->block_idx = case_alloc((n + 1) * sizeof *e->block_idx);
    e->selected = case_alloc(n + 1);
    e->out = case_alloc(e->n_q * scene.of.shape.v_width * sizeof *e->out);
    acc_clear(acc);
    acc_attend_tail(head, session, q, acc);
    for (uint32_t g = 0; g < e->n_q; g++)
        e->ln_z[g] = acc[g * stride] + logf(acc[g * stride + 1]);
    expect_select(e, head, session, q, mass);
    expect_errors(e, head, q);
    CHECK(n_selected <= n);
    e->sel.n_selected = n_selected;
    for (uint32_t i = 0; i < n; i++)
        e->selected[e->block_idx[i]] = i < n_selected;
    for (uint32_t i = 0; i < n_selected; i++) {
        uint32_t b = e->block_idx[i], k = b / scene.span;
        acc_attend(head, q, scene.of.n_sinks + (uint64_t)k * scene.of.segment_tokens, 16,
                   head->segment[k].order + b % scene.span * 16, acc);
    }
    for (uint32_t k = 0; k < scene.of.n_segments[session]; k++) {
        acc_clear(partial);
        scene.ref->compensate(&scene.head_shape, &head->segment[k].view, &e->sel, k * scene.span,
                              partial);
        scene.ref->merge(&scene.head_shape, 1, partial, acc);
    }
    scene.ref->finish(&scene.head_shape, acc, e->out, e->lse);
}

static void expect_finish(struct expected *e)
{
    winnow_alloc_free(e->ln_e);
    winnow_alloc_free(e->key);
    winnow_alloc_free(e->block_idx);
    winnow_alloc_free(e->selected);
    winnow_alloc_free(e->out);
}

static const char *item_name(const struct scene_item *item)
{
    static char name[200];
    const struct winnow_gpu_certificate *c = &item->certificate;

    snprintf(name, sizeof name,
             "%s, width %u, %u, G %u, session %u, P %g: %u rounds, %u + %u blocks, mass %g",
             scene.of.trace ? "trace" : kernel_input_name[scene.of.input], scene.of.shape.k_width,
             scene.of.shape.v_width, scene.n_group, item->item.session, (double)item->item.mass,
             c->n_rounds, c->n_blocks_device, c->n_blocks_host, (double)c->mass_reached);
    return name;
}

static void close_check(const struct scene_item *item, const char *what, size_t i, double a,
                        double b, double tolerance)
{
    char text[400];

    if (a == b || fabs(a - b) <= tolerance)
        return;
    snprintf(text, sizeof text, "%s: %s[%zu] is %.9g, ref has %.9g (+-%.3g)", item_name(item), what,
             i, a, b, tolerance);
    test_fail(__FILE__, __LINE__, text);
}

/* How many were read, and that the first round read no more than the rest of a bin. */
static uint32_t selected_check(const struct scene_item *item, uint32_t layer, uint32_t query)
{
    const struct winnow_gpu_certificate *c = &item->certificate;
    uint32_t n = c->n_blocks_device + c->n_blocks_host, n_of_bin = 0;
    double key_error;
    struct expected e;

    expect_init(&e, item->item.session, layer, query, item->item.mass, 0);
    key_error = 2e-3 + 2 * e.logit_error;
    if (e.n_ref > 0) {
        double last = (double)e.key[e.block_idx[e.n_ref - 1]];
        uint32_t n_least = 0;
        for (uint32_t b = 0; b < e.n_blocks; b++) {
            n_of_bin += !((double)e.key[b] < last - 1.0 / 64 - key_error);
            n_least += (double)e.key[b] > last + key_error;
        }
        if (!(n >= n_least && (c->n_rounds == 2 || n <= n_of_bin)))
            fprintf(stderr, "%s: ref reads %u, to the end of the bin %u\n", item_name(item),
                    e.n_ref, n_of_bin);
        CHECK(n >= n_least);
        CHECK(c->n_rounds == 2 || n <= n_of_bin);
    }
    expect_finish(&e);
    return n;
}

/* One KV head: output and lse are ref's over as many blocks in key order. */
static void item_check(const struct scene_item *item, uint32_t layer, uint32_t query)
{
    uint32_t v_width = scene.of.shape.v_width, n = selected_check(item, layer, query);
    double eps = scene.of.shape.kv_dtype == WINNOW_BF16 ? 0x1p-8 : 0x1p-11;
    double io_eps = scene.of.shape.io_dtype == WINNOW_FP32   ? 0
                    : scene.of.shape.io_dtype == WINNOW_FP16 ? 0x1p-11
                                                             : 0x1p-8;
    struct expected e;

    CHECK_EQ(item->certificate.status, 0);
    CHECK(item->certificate.mass_reached >= 0 && item->certificate.mass_reached <= 1);
    expect_init(&e, item->item.session, layer, query, item->item.mass, n);
    for (uint32_t g = 0; g < e.n_q; g++) {
        close_check(item, "lse", g, (double)item->lse[g], (double)e.lse[g],
                    e.logit_error + 1e-4 + 1e-6 * fabs((double)e.lse[g]));
        for (uint32_t d = 0; d < v_width; d++) {
            size_t i = g * v_width + d;
            close_check(item, "out", i, (double)item->wide[i], (double)e.out[i],
                        (2 * fmin(e.logit_error, 1) + eps + 1e-4) * e.v_largest +
                            io_eps * fabs((double)e.out[i]) + 0x1p-24);
        }
    }
    expect_finish(&e);
}
