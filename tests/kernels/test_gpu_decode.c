/*
 * The decode path of the GPU through its contract, against ref/ and against itself: sparse items;
 * test_gpu_whole.c has the others.
 *
 * Tolerances. A logit of the device differs from ref's by at most 2^-16 (bf16; fp16 2^-20) of the
 * largest sum of |q_i k_i|, a query being taken to two 16-bit halves; weights are rounded to the
 * storage type before they meet the values: 2^-8 or 2^-11 of each. Selection goes by bins of 1/64
 * nat of keys that differ from ref's by their rounding; which blocks it read is known here from how
 * many it read, all being a prefix in key order.
 */
#include "gpu_scene.h"

static struct winnow_gpu_device *device;
static struct scene scene;

#define SHAPE(n_layers, n_q, n_kv, k_width, v_width, kv_dtype, io_dtype)                           \
    {                                                                                              \
        n_layers, n_q, n_kv, k_width, v_width, 1, kv_dtype, io_dtype, WINNOW_BLOCK_FRAGMENTS       \
    }

static void scene_open(const struct scene_options *options)
{
    char text[256] = "";

    scene_init(&scene, options);
    if (api->open(0, UINT64_C(3) << 30, scene.arena, scene.arena_bytes, &device, text) < 0)
        test_fail(__FILE__, __LINE__, text);
}

static void scene_close(void)
{
    api->close(device);
    scene_finish(&scene);
}

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

/* Decodes every session at once at several P, and checks each item. */
static void scene_check(struct winnow_gpu *gpu)
{
    static const float mass[] = {0.5f, 0.8f, 0.95f, 0.9999f};
    struct scene_item items[SCENE_SESSIONS_MAX];

    for (uint32_t p = scene_is_small() ? 2 : 0; p < (scene_is_small() ? 3 : 4); p++)
        for (uint32_t layer = 0; layer < scene.of.shape.n_layers; layer++) {
            uint32_t query = (p + layer) % SCENE_QUERIES;
            for (uint32_t s = 0; s < scene.of.n_sessions; s++)
                scene_item_init(&scene, &items[s], s, layer, query, mass[p]);
            scene_decode(&scene, gpu, scene.of.n_sessions, items);
            for (uint32_t s = 0; s < scene.of.n_sessions; s++) {
                item_check(&items[s], layer, query);
                scene_item_finish(&scene, &items[s]);
            }
        }
}

/* Every width, ratio and type gives what ref gives, on random and hostile input, for contexts
 * without a segment, with a few, and with a tail that ends anywhere. */
static void test_gpu_decode__as_ref(void)
{
    static const struct winnow_model_shape shapes[] = {
        SHAPE(1, 4, 1, 128, 128, WINNOW_BF16, WINNOW_FP32),
        SHAPE(1, 3, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        SHAPE(2, 1, 1, 256, 256, WINNOW_BF16, WINNOW_BF16),
        SHAPE(1, 16, 1, 96, 64, WINNOW_FP16, WINNOW_FP16),
        SHAPE(1, 7, 1, 192, 128, WINNOW_FP16, WINNOW_FP32),
        SHAPE(1, 8, 1, 80, 112, WINNOW_BF16, WINNOW_FP32),
        SHAPE(1, 5, 1, 16, 16, WINNOW_FP16, WINNOW_FP32),
    };
    static const enum kernel_input hostile[] = {INPUT_NEEDLE, INPUT_EQUAL, INPUT_STEPS, INPUT_TINY};

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int is_hostile = 0; is_hostile < 2; is_hostile++) {
            struct scene_options options = {
                .shape = shapes[i],
                .segment_tokens = 128,
                .n_sinks = i % 2 ? 16 : 64,
                .n_sessions = 4,
                .n_segments = {0, 1, 4, 19},
                .n_tail = {1, 40, 128, 639},
                .input = is_hostile ? hostile[(test_seed() + i) % 4] : INPUT_RANDOM,
                .seed = test_seed() + 100 * i,
            };
            if (scene_is_small() && (is_hostile || i > 2))
                continue;
            scene_open(&options);
            struct scene_gpu_options of_gpu = {.n_slots = 512};
            struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
            scene_check(gpu);
            api->destroy(gpu);
            scene_close();
        }
}

/* Real keys, values and queries: segments of 1,024 tokens, a tail of 1,008. */
static void test_gpu_decode__traces_as_ref(void)
{
    struct winnow_trace_list list;
    struct winnow_trace trace[8];
    struct scene_options options = {
        .shape = SHAPE(0, 3, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        .segment_tokens = 1024,
        .n_sinks = 16,
        .n_sessions = 1,
        .n_segments = {7},
        .n_tail = {1008},
        .trace = trace,
    };

    CHECK_EQ(winnow_trace_list_open("tests/golden/traces", &list), 0);
    for (uint32_t i = 0; i < list.n_paths && i < 8; i++, options.shape.n_layers++)
        CHECK_EQ(winnow_trace_open(list.path[i], &trace[i]), 0);
    scene_open(&options);
    struct scene_gpu_options of_gpu = {.n_slots = 96};
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    scene_check(gpu);
    api->destroy(gpu);
    scene_close();
    for (uint32_t i = 0; i < options.shape.n_layers; i++)
        winnow_trace_close(&trace[i]);
    winnow_trace_list_close(&list);
}

/* Several KV heads, 32 sessions of different lengths. */
static const struct scene_options crowd = {
    .shape = SHAPE(2, 8, 2, 128, 64, WINNOW_BF16, WINNOW_FP16),
    .segment_tokens = 128,
    .n_sinks = 16,
    .n_sessions = 32,
    .n_segments = {9, 0, 1, 2, 3, 4, 5, 6, 30, 1, 2, 3, 4, 5, 6, 7,
                   7, 6, 5, 4, 3, 2, 1, 0, 2,  2, 2, 2, 2, 2, 2, 2},
    .n_tail = {5,  16, 100, 1, 7, 9, 33, 80, 640, 3,  17, 18, 19, 20, 21, 22,
               23, 24, 25,  1, 2, 3, 4,  5,  6,   64, 65, 66, 67, 68, 69, 70},
    .seed = 11,
};

static void crowd_items(struct scene_item *items, uint32_t layer, float mass)
{
    for (uint32_t s = 0; s < scene.of.n_sessions; s++)
        scene_item_init(&scene, &items[s], s, layer, layer, mass);
}

/* Results have the same bits over 100 runs, whatever the cache holds and however small it is, in a
 * batch of 32 or alone, with 2 to 32 fetching thread blocks; hits and misses add up. */
static void test_gpu_decode__same_bits(void)
{
    static const struct scene_gpu_options of_gpu[] = {
        {.n_slots = 4096, .n_fetchers = 32}, {.n_slots = 0, .n_fetchers = 8},
        {.n_slots = 64, .n_fetchers = 2},    {.n_slots = 600, .n_fetchers = 5},
        {.n_slots = 16, .n_fetchers = 16},
    };
    static struct scene_item first[2][SCENE_SESSIONS_MAX], again[SCENE_SESSIONS_MAX];
    uint64_t n_found[2] = {0};

    scene_open(&crowd);
    for (size_t i = 0; i < sizeof of_gpu / sizeof of_gpu[0]; i++) {
        struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu[i]);
        for (uint32_t run = 0; run < 20; run++) {
            uint32_t layer = run % 2, step = run % 5 == 4 ? 1 : run % 5 == 3 ? 7 : 32;
            bool is_first = i == 0 && run < 2;
            struct scene_item *items = is_first ? first[layer] : again;
            crowd_items(items, layer, 0.9f);
            for (uint32_t s = 0; s < 32; s += step)
                scene_decode(&scene, gpu, 32 - s < step ? 32 - s : step, items + s);
            for (uint32_t s = 0; s < 32; s++) {
                CHECK_EQ(items[s].certificate.status, 0);
                if (i == 0 && layer == 1) {
                    n_found[0] += items[s].certificate.n_blocks_device;
                    n_found[1] += items[s].certificate.n_blocks_host;
                }
                if (is_first)
                    continue;
                scene_same(&scene, &first[layer][s], &items[s]);
                scene_item_finish(&scene, &items[s]);
            }
        }
        struct winnow_gpu_counters counters;
        CHECK_EQ(api->counters(gpu, 1, &counters), 0);
        if (i == 0) {
            CHECK_EQ(counters.n_hits, n_found[0]);
            CHECK_EQ(counters.n_misses, n_found[1]);
            CHECK(n_found[0] > 0 && n_found[1] > 0);
        }
        CHECK(counters.n_evictions + counters.n_unfit <= counters.n_misses);
        CHECK(of_gpu[i].n_slots > 0 || counters.n_hits == 0);
        api->destroy(gpu);
    }
    for (uint32_t layer = 0; layer < 2; layer++)
        for (uint32_t s = 0; s < 32; s++)
            scene_item_finish(&scene, &first[layer][s]);
    scene_close();
}

/* Two sessions that share their segments want the same blocks in one launch: each gets what it gets
 * alone, from a cache of any size. */
static void test_gpu_decode__fork_shares_blocks(void)
{
    struct scene_options options = crowd;
    struct scene_item alone[2], both[2];
    uint32_t slots[12];

    options.n_sessions = 2;
    options.n_segments[1] = options.n_segments[0] = 12;
    options.n_tail[1] = options.n_tail[0];
    scene_open(&options);
    for (uint32_t k = 0; k < 12; k++)
        slots[k] = scene_slot(&scene, 0, k);
    for (uint32_t n_slots = 32; n_slots <= 2048; n_slots *= 8)
        for (uint32_t run = 0; run < (scene_is_small() ? 1 : 3); run++) {
            struct scene_gpu_options of_gpu = {.n_slots = n_slots};
            struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
            CHECK_EQ(api->session_set(gpu, 1, 12, slots), 0);
            for (uint32_t s = 0; s < 2; s++) {
                scene_item_init(&scene, &both[s], s, 0, 1, 0.95f);
                scene_item_init(&scene, &alone[s], s, 0, 1, 0.95f);
            }
            scene_decode(&scene, gpu, 2, both);
            for (uint32_t s = 0; s < 2; s++) {
                CHECK_EQ(api->segment_drop(gpu, slots[run]), 0);
                scene_decode(&scene, gpu, 1, &alone[s]);
                scene_same(&scene, &alone[s], &both[s]);
                scene_item_finish(&scene, &alone[s]);
                scene_item_finish(&scene, &both[s]);
            }
            api->destroy(gpu);
        }
    scene_close();
}

/* A segment slot that is given another segment forgets the first one's blocks, in every cache. */
static void test_gpu_decode__slot_used_anew(void)
{
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 1024};
    static struct scene_item before, own, item;
    struct winnow_index_view views[2];
    uint32_t home[16], slots[6];

    options.n_sessions = 2;
    options.n_segments[0] = options.n_segments[1] = 6;
    scene_open(&options);
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    scene_item_init(&scene, &before, 0, 1, 0, 0.95f);
    scene_decode(&scene, gpu, 1, &before);
    scene_item_init(&scene, &own, 1, 1, 0, 0.95f);
    scene_decode(&scene, gpu, 1, &own);
    for (uint32_t k = 0; k < 6; k++) {
        slots[k] = scene_slot(&scene, 0, k);
        for (uint32_t h = 0; h < 2; h++)
            views[h] = scene_head(&scene, 1, 1, h)->segment[k].view;
        scene_homes(&scene, 1, 1, k, 0, home);
        CHECK_EQ(api->segment_put(gpu, slots[k], 1, views, home), 0);
    }
    CHECK_EQ(api->session_set(gpu, 1, 6, slots), 0);
    scene_item_init(&scene, &item, 1, 1, 0, 0.95f);
    scene_decode(&scene, gpu, 1, &item);
    scene_same(&scene, &own, &item);
    CHECK(own.certificate.n_blocks_host > 0);
    CHECK_EQ(item.certificate.n_blocks_device, 0);
    scene_item_finish(&scene, &before);
    scene_item_finish(&scene, &own);
    scene_item_finish(&scene, &item);
    api->destroy(gpu);
    scene_close();
}

/* A segment that is dropped or put anew leaves its slots: whoever comes next evicts nobody. */
static void test_gpu_decode__drop_frees_slots(void)
{
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 16}; /* 8 a layer: all are looked at */
    struct winnow_gpu_counters first, last;
    struct winnow_index_view views[2];
    static struct scene_item item;
    uint32_t home[16];

    options.n_sessions = 2;
    options.n_segments[0] = options.n_segments[1] = 6;
    scene_open(&options);
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    for (uint32_t step = 0; step < 3; step++) {
        scene_item_init(&scene, &item, step % 2, 1, 0, 0.95f);
        scene_decode(&scene, gpu, 1, &item);
        CHECK(item.certificate.n_blocks_host >= 8);
        scene_item_finish(&scene, &item);
        CHECK_EQ(api->counters(gpu, 1, step == 0 ? &first : &last), 0);
        for (uint32_t k = 0; k < 6; k++) {
            for (uint32_t h = 0; h < 2; h++)
                views[h] = scene_head(&scene, step % 2, 1, h)->segment[k].view;
            scene_homes(&scene, step % 2, 1, k, 0, home);
            uint32_t slot = scene_slot(&scene, step % 2, k);
            CHECK_EQ(step == 0 ? api->segment_drop(gpu, slot)
                               : api->segment_put(gpu, slot, 1, views, home),
                     0);
        }
    }
    CHECK(last.n_misses > first.n_misses);
    CHECK_EQ(last.n_evictions, first.n_evictions);
    api->destroy(gpu);
    scene_close();
}

/* Tokens appended one by one by decode stand where tail_put would have put them. */
static void test_gpu_decode__append_is_tail_put(void)
{
    enum { N_APPENDED = 37 };
    static struct scene_item whole, item;
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 256};

    options.n_sessions = 2;
    options.n_tail[0] = 90;
    scene_open(&options);
    struct winnow_gpu *a = scene_put(&scene, device, &of_gpu);
    scene_item_init(&scene, &whole, 0, 1, 2, 0.8f);
    scene_decode(&scene, a, 1, &whole);
    scene.of.n_tail[0] -= N_APPENDED;
    struct winnow_gpu *b = scene_put(&scene, device, &of_gpu);
    for (uint32_t i = 0; i < N_APPENDED; i++) {
        scene.of.n_tail[0]++;
        scene_item_init(&scene, &item, 0, 1, 2, 0.8f);
        item.item.k = item.k;
        item.item.v = item.v;
        scene_decode(&scene, b, 1, &item);
        CHECK_EQ(item.certificate.status, 0);
        if (i + 1 == N_APPENDED)
            scene_same(&scene, &whole, &item);
        scene_item_finish(&scene, &item);
    }
    scene_item_finish(&scene, &whole);
    api->destroy(a);
    api->destroy(b);
    scene_close();
}

/* A block on disk is compensated and named; once it has a home in the arena, the step has the bits
 * that it has when nothing was on disk. */
static void test_gpu_decode__disk_blocks_are_named(void)
{
    struct scene_gpu_options nowhere = {.n_slots = 256, .disk_every = 3}, here = {.n_slots = 256};
    static struct scene_item all, item;
    uint32_t n_blocks, n_missing_first = 0;

    scene_open(&crowd);
    struct winnow_gpu *a = scene_put(&scene, device, &here);
    struct winnow_gpu *b = scene_put(&scene, device, &nowhere);
    n_blocks = scene.of.n_segments[0] * scene.span;
    scene_item_init(&scene, &all, 0, 1, 3, 0.95f);
    scene_decode(&scene, a, 1, &all);
    for (int i = 0; i < 8; i++) {
        scene_item_init(&scene, &item, 0, 1, 3, 0.95f);
        scene_decode(&scene, b, 1, &item);
        CHECK_EQ(item.certificate.status, 0);
        uint32_t n = item.certificate.n_blocks_disk, n_unfit = item.certificate.n_blocks_unfit;
        n_missing_first += i == 0 ? n : 0;
        if (i == 0) /* each head lacks some: none reads more for it */
            CHECK_EQ(item.certificate.n_rounds, 1);
        for (uint32_t j = 0; n > 0 && j < n + n_unfit; j++) {
            uint32_t head = item.disk_block[j] / n_blocks, b_idx = item.disk_block[j] % n_blocks;
            uint32_t segment = b_idx / scene.span, at = head * scene.span + b_idx % scene.span;
            CHECK(head < 2 && (at % 3 == 0 || n_unfit > 0));
            struct winnow_gpu_home home = {
                scene_slot(&scene, 0, segment), 2 * scene.span + at, /* of layer 1 */
                scene_head(&scene, 0, 1, head)->segment[segment].home[at % scene.span]};
            CHECK_EQ(api->homes_set(b, 1, &home), 0);
        }
        if (n == 0)
            scene_same(&scene, &all, &item);
        scene_item_finish(&scene, &item);
        if (n == 0)
            break;
        CHECK(i < 7);
    }
    CHECK(n_missing_first > 0);
    scene_item_finish(&scene, &all);
    api->destroy(a);
    api->destroy(b);
    scene_close();
}

/* A query or token that is not finite fails its item alone: NaN, EDOM. */
static void test_gpu_decode__not_finite_fails_one(void)
{
    static struct scene_item items[3], good;
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 256};

    options.n_sessions = 3;
    scene_open(&options);
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    for (uint32_t s = 0; s < 3; s++)
        scene_item_init(&scene, &items[s], s, 0, 0, 0.9f);
    scene_item_init(&scene, &good, 0, 0, 0, 0.9f);
    scene_decode(&scene, gpu, 1, &good);
    ((uint16_t *)items[1].q)[5] = 0x7e00;
    items[2].item.k = items[2].k;
    items[2].item.v = items[2].v;
    ((uint16_t *)items[2].v)[1] = 0x7c00;
    scene_decode(&scene, gpu, 3, items);
    scene_same(&scene, &good, &items[0]);
    for (uint32_t s = 1; s < 3; s++) {
        CHECK_EQ(items[s].certificate.status, EDOM);
        for (uint32_t i = 0; i < scene.of.shape.n_q_heads * scene.of.shape.v_width; i++)
            CHECK(isnan(items[s].wide[i]));
    }
    for (uint32_t s = 0; s < 3; s++)
        scene_item_finish(&scene, &items[s]);
    scene_item_finish(&scene, &good);
    api->destroy(gpu);
    scene_close();
}

/* Estimates that say twice what the logits are: the blocks chosen first promise more than they hold. */
static void index_double(void)
{
    uint32_t n_heads = scene.of.shape.n_layers * scene.of.shape.n_kv_heads;

    for (uint32_t i = 0; i < scene.of.n_sessions * n_heads; i++)
        for (uint32_t k = 0; k < scene.of.n_segments[i / n_heads]; k++) {
            struct winnow_index_view *view = &scene.head[i].segment[k].view;
            for (uint32_t b = 0; b < scene.span; b++)
                view->head[b].centroid_scale *= 2;
            for (uint32_t t = 0; t < 16 * scene.span; t++)
                if (view->code_scale[t] >= 0x400) /* fp16: one more in the exponent */
                    view->code_scale[t] += 0x400;
        }
}

/* The least mass of a KV head's query heads when its first n blocks in key order are read, by ref;
 * *ret_n_more: what ref's own second round would read after its first. */
static float ref_mass(const struct scene_item *item, uint32_t query, uint32_t n,
                      uint32_t *ret_n_more)
{
    const struct scene_head *head = scene_head(&scene, item->item.session, item->item.layer, 0);
    const float *q = head->data.q + (size_t)query * scene.n_group * scene.of.shape.k_width;
    float rho[WINNOW_GQA_MAX], mass[WINNOW_GQA_MAX], least = 1;
    static float partial[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    void *block = case_alloc(scene.block_bytes);
    const void *blocks[] = {block};
    const uint32_t n_tokens = 16;
    struct expected e;

    expect_init(&e, item->item.session, item->item.layer, query, item->item.mass, n);
    float *ln_m = case_alloc((e.n_blocks + 1) * e.n_q * sizeof *ln_m);
    e.sel.ln_m = ln_m;
    for (uint32_t b = 0; b < e.n_blocks; b++) {
        uint32_t k = b / scene.span;
        scene_block(&scene, head, scene.of.n_sinks + (uint64_t)k * scene.of.segment_tokens, 16,
                    head->segment[k].order + b % scene.span * 16, block);
        scene.ref->attend_partial(&scene.head_shape, q, 1, blocks, &n_tokens, partial,
                                  ln_m + (size_t)b * e.n_q);
    }
    e.sel.n_selected = e.n_ref;
    for (uint32_t i = 0; i < e.n_blocks; i++)
        e.selected[e.block_idx[i]] = i < e.n_ref;
    *ret_n_more = scene.ref->select_more(&e.sel, rho, mass, 1, NULL);
    e.sel.n_selected = n;
    for (uint32_t i = 0; i < e.n_blocks; i++)
        e.selected[e.block_idx[i]] = i < n;
    scene.ref->select_more(&e.sel, rho, mass, 0, NULL);
    for (uint32_t g = 0; g < e.n_q; g++)
        least = fminf(least, mass[g]);
    winnow_alloc_free(ln_m);
    winnow_alloc_free(block);
    expect_finish(&e);
    return least;
}

/* Where the blocks of the first round hold less than their estimates promised, every unit reads on:
 * two rounds, with ref's result and mass over as many blocks, and the same bits from any cache. */
static void test_gpu_decode__second_round_reads_more(void)
{
    static const struct winnow_model_shape shapes[] = {
        SHAPE(1, 4, 1, 128, 128, WINNOW_BF16, WINNOW_FP32),
        SHAPE(1, 3, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        SHAPE(1, 16, 1, 96, 64, WINNOW_FP16, WINNOW_FP16),
    };
    static struct scene_item first[4], item[4];

    for (uint32_t i = 0; i < 3; i++) {
        struct scene_options options = {.shape = shapes[i],
                                        .segment_tokens = 128,
                                        .n_sinks = 16,
                                        .n_sessions = 4,
                                        .n_segments = {0, 4, 9, 19},
                                        .n_tail = {40, 1, 128, 300},
                                        .seed = test_seed() + 100 * i};
        scene_open(&options);
        index_double();
        for (uint32_t run = 0; run < 6; run++) {
            struct scene_gpu_options of_gpu = {.n_slots = run % 3 == 0   ? 512
                                                          : run % 3 == 1 ? 0
                                                                         : 32};
            struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
            struct scene_item *items = run == 0 ? first : item;
            for (uint32_t s = 0; s < 4; s++)
                scene_item_init(&scene, &items[s], s, 0, 1, 0.8f);
            for (uint32_t s = 0; s < 4; s += run < 3 ? 4 : 1)
                scene_decode(&scene, gpu, run < 3 ? 4 : 1, items + s);
            for (uint32_t s = 0; s < 4; s++) {
                const struct winnow_gpu_certificate *c = &items[s].certificate;
                uint32_t n_more, n = c->n_blocks_device + c->n_blocks_host;
                CHECK_EQ(c->n_rounds, s == 0 ? 1 : 2);
                if (run > 0) {
                    scene_same(&scene, &first[s], &item[s]);
                    scene_item_finish(&scene, &item[s]);
                    continue;
                }
                item_check(&first[s], 0, 1);
                CHECK_NEAR(c->mass_reached, ref_mass(&first[s], 1, n, &n_more), 2e-3);
                CHECK_EQ(n_more > 0, s > 0);
            }
            api->destroy(gpu);
        }
        for (uint32_t s = 0; s < 4; s++)
            scene_item_finish(&scene, &first[s]);
        scene_close();
    }
}

/* A budget holds, and what it leaves out shows in the certificate. */
static void test_gpu_decode__budget_holds(void)
{
    static struct scene_item item;
    struct scene_gpu_options of_gpu = {.n_slots = 256};

    scene_open(&crowd);
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    scene_item_init(&scene, &item, 8, 0, 0, 0.999f);
    item.item.n_blocks_max = 7;
    scene_decode(&scene, gpu, 1, &item);
    CHECK_EQ(item.certificate.n_blocks_device + item.certificate.n_blocks_host, 14);
    CHECK_EQ(item.certificate.n_heads_spent, 2);
    CHECK(item.certificate.mass_reached < 0.999f);
    scene_item_finish(&scene, &item);
    api->destroy(gpu);
    scene_close();
}

/* Every index is looked at before anything is done; a refused call leaves no trace. */
static void test_gpu_decode__refuses_arguments(void)
{
    static struct scene_item item, before, after;
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 64};
    const uint32_t out_of_range = 1u << 20, zero = 0, on_disk = WINNOW_GPU_ON_DISK;
    uint32_t home[64], beyond = (uint32_t)(UINT64_C(1) << 30);
    struct winnow_gpu_counters counters;

    options.n_sessions = 2;
    scene_open(&options);
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    scene_item_init(&scene, &before, 0, 0, 0, 0.9f);
    scene_decode(&scene, gpu, 1, &before);
    for (int i = 0; i < 11; i++) {
        struct winnow_gpu_item list[2];
        scene_item_init(&scene, &item, 0, 0, 0, 0.9f);
        struct winnow_gpu_item *bad = &item.item;
        i == 0 ? (void)(bad->session = 2) : (void)0;
        i == 1 ? (void)(bad->layer = 2) : (void)0;
        if (i == 2) { /* more than session_set said, all else in order */
            bad->session = bad->n_segments = 1;
            bad->n_tokens = scene_n_tokens(&scene, 1) + scene.of.segment_tokens;
        }
        i == 3 ? (void)(bad->n_tokens += 16 * 48) : (void)0;
        i == 4 ? (void)(bad->n_tokens = 100) : (void)0;
        i == 5 ? (void)(bad->mass = 1.5f) : (void)0;
        i == 6 ? (void)(bad->mass = NAN) : (void)0;
        i == 7 ? (void)(bad->q = NULL) : (void)0;
        i == 8 ? (void)(bad->k = item.k) : (void)0;
        i == 9 ? (void)(bad->certificate = NULL) : (void)0;
        list[0] = list[1] = *bad;
        CHECK_EQ(api->decode(gpu, i == 10 ? 2 : 1, list), -EINVAL); /* 10: a session twice */
        CHECK_EQ(api->decode(gpu, 0, list), -EINVAL);
        scene_item_finish(&scene, &item);
    }
    scene_homes(&scene, 0, 0, 0, 0, home);
    struct winnow_index_view views[2] = {scene_head(&scene, 0, 0, 0)->segment[0].view,
                                         scene_head(&scene, 0, 0, 1)->segment[0].view};
    CHECK_EQ(api->segment_put(gpu, out_of_range, 0, views, home), -EINVAL);
    CHECK_EQ(api->segment_put(gpu, 0, 2, views, home), -EINVAL);
    home[3] = beyond;
    CHECK_EQ(api->segment_put(gpu, 0, 0, views, home), -EINVAL);
    CHECK_EQ(api->homes_set(gpu, 1, &(struct winnow_gpu_home){0, 0, beyond}), -EINVAL);
    CHECK_EQ(api->homes_set(gpu, 1, &(struct winnow_gpu_home){0, out_of_range, on_disk}), -EINVAL);
    CHECK_EQ(api->homes_set(gpu, 1, &(struct winnow_gpu_home){out_of_range, 0, on_disk}), -EINVAL);
    CHECK_EQ(api->segment_drop(gpu, out_of_range), -EINVAL);
    CHECK_EQ(api->session_set(gpu, 2, 1, &zero), -EINVAL);
    CHECK_EQ(api->session_set(gpu, 0, 1, &out_of_range), -EINVAL);
    CHECK_EQ(api->session_set(gpu, 0, 1000, &zero), -EINVAL);
    CHECK_EQ(api->tail_put(gpu, 2, 0, 0, NULL, NULL), -EINVAL);
    CHECK_EQ(api->tail_put(gpu, 0, 2, 0, NULL, NULL), -EINVAL);
    CHECK_EQ(api->counters(gpu, 2, &counters), -EINVAL);
    CHECK_EQ(api->poll(gpu, 2, false), -EINVAL);
    CHECK_EQ(api->poll(gpu, 0, true), -EINVAL);
    scene_item_init(&scene, &after, 0, 0, 0, 0.9f);
    scene_decode(&scene, gpu, 1, &after);
    scene_same(&scene, &before, &after);
    scene_item_finish(&scene, &before);
    scene_item_finish(&scene, &after);
    api->destroy(gpu);
    scene_close();
}

/* Two launches may be out, a third waits its turn; results come in order, each its own. */
static void test_gpu_decode__two_are_out(void)
{
    static struct scene_item items[4], alone[2];
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 64};

    options.n_sessions = 2;
    scene_open(&options);
    struct winnow_gpu *gpu = scene_put(&scene, device, &of_gpu);
    for (uint32_t i = 0; i < 2; i++) {
        scene_item_init(&scene, &alone[i], i, 0, i, 0.9f);
        scene_decode(&scene, gpu, 1, &alone[i]);
    }
    for (uint32_t i = 0; i < 4; i++)
        scene_item_init(&scene, &items[i], i % 2, 0, i % 2, 0.9f);
    int64_t first = api->decode(gpu, 1, &items[0].item),
            second = api->decode(gpu, 1, &items[1].item);
    CHECK_EQ(second, first + 1);
    CHECK_EQ(api->decode(gpu, 1, &items[2].item), -EBUSY);
    while (api->poll(gpu, first, false) == 0)
        ;
    int64_t third = api->decode(gpu, 1, &items[2].item);
    CHECK_EQ(third, second + 1);
    CHECK_EQ(api->poll(gpu, third, true), 1);
    CHECK_EQ(api->poll(gpu, first, true), 1);
    int64_t fourth = api->decode(gpu, 1, &items[3].item);
    CHECK_EQ(api->poll(gpu, fourth, true), 1);
    for (uint32_t i = 0; i < 4; i++) {
        scene_same(&scene, &alone[i % 2], &items[i]);
        scene_item_finish(&scene, &items[i]);
    }
    scene_item_finish(&scene, &alone[0]);
    scene_item_finish(&scene, &alone[1]);
    api->destroy(gpu);
    scene_close();
}

/* What a device does not have is refused with what is left; a destroyed gpu's memory comes back. */
static void test_gpu_decode__memory_is_bounded(void)
{
    struct scene_options options = crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 64};
    struct winnow_gpu *gpu[3];
    char text[256] = "";

    options.n_sessions = 2;
    scene_open(&options);
    struct winnow_gpu_options large = scene_gpu_options(&scene, &of_gpu);
    large.n_slots = 1 << 20;
    CHECK_EQ(api->create(device, &large, &gpu[0], text), -ENOMEM);
    CHECK(strstr(text, "GiB") && !gpu[0]);
    large.n_slots = 140000; /* 1.07 of 3 GiB */
    for (int i = 0; i < 2; i++)
        CHECK_EQ(api->create(device, &large, &gpu[i], text), 0);
    CHECK_EQ(api->create(device, &large, &gpu[2], text), -ENOMEM);
    api->destroy(gpu[0]);
    CHECK_EQ(api->create(device, &large, &gpu[2], text), 0);
    api->destroy(gpu[1]);
    api->destroy(gpu[2]);
    api->destroy(NULL);
    scene_close();
    struct winnow_gpu_device *none;
    CHECK_EQ(api->open(0, UINT64_C(1) << 44, NULL, 0, &none, text), -ENOMEM);
    CHECK_EQ(api->open(1000, 1 << 20, NULL, 0, &none, text), -ENODEV);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_decode__memory_is_bounded);
    TEST_RUN(test_gpu_decode__two_are_out);
    TEST_RUN(test_gpu_decode__refuses_arguments);
    TEST_RUN(test_gpu_decode__budget_holds);
    TEST_RUN(test_gpu_decode__second_round_reads_more);
    TEST_RUN(test_gpu_decode__not_finite_fails_one);
    TEST_RUN(test_gpu_decode__slot_used_anew);
    TEST_RUN(test_gpu_decode__drop_frees_slots);
    TEST_RUN(test_gpu_decode__append_is_tail_put);
    TEST_RUN(test_gpu_decode__fork_shares_blocks);
    TEST_RUN(test_gpu_decode__disk_blocks_are_named);
    TEST_RUN(test_gpu_decode__same_bits);
    TEST_RUN(test_gpu_decode__as_ref);
    TEST_RUN(test_gpu_decode__traces_as_ref);
    return TEST_END();
}
