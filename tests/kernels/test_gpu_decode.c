/* Sparse items through the GPU's contract, against ref/: output, logsumexp, what was read, the
 * certificate. */
#include "gpu_expected.h"

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

/* Every width, ratio and type gives what ref gives, on random and hostile input, for contexts of 16
 * tokens and more: without a segment, with a few, and with a tail that ends anywhere. */
static void test_gpu_decode__as_ref(void)
{
    static const enum kernel_input hostile[] = {INPUT_NEEDLE, INPUT_EQUAL, INPUT_STEPS, INPUT_TINY};

    for (uint32_t i = 0; i < SCENE_N_SHAPES; i++)
        for (int is_hostile = 0; is_hostile < 2; is_hostile++) {
            struct scene_options options = {
                .shape = scene_shapes[i],
                .segment_tokens = 128,
                .n_sinks = i % 2 ? 16 : 64,
                .n_sessions = 4,
                .n_segments = {0, 1, 4, 19},
                .n_tail = {i % 2 ? 0 : 1, 40, 128, 639},
                .input = is_hostile ? hostile[(test_seed() + i) % 4] : INPUT_RANDOM,
                .seed = test_seed() + 100 * i,
            };
            if (scene_is_small() && (is_hostile || i > 2))
                continue;
            scene_open(&scene, &options);
            struct scene_gpu_options of_gpu = {.n_slots = 512};
            struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
            scene_check(gpu);
            api->destroy(gpu);
            scene_close(&scene);
        }
}

/* Real keys, values and queries. */
static void test_gpu_decode__traces_as_ref(void)
{
    static struct scene_traces traces;

    scene_open_traces(&scene, &traces);
    struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 96});
    scene_check(gpu);
    api->destroy(gpu);
    scene_close_traces(&scene, &traces);
}

/* 256 sessions of different lengths in one launch: each has the bits that it has alone. */
static void test_gpu_decode__256_sessions(void)
{
    static struct scene_item many[SCENE_SESSIONS_MAX], alone;
    struct scene_options options = scene_options_many();

    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 4096});
    for (uint32_t s = 0; s < options.n_sessions; s++)
        scene_item_init(&scene, &many[s], s, 0, s % SCENE_QUERIES, 0.9f);
    scene_decode(&scene, gpu, options.n_sessions, many);
    for (uint32_t s = 0; s < options.n_sessions; s++) {
        scene_item_init(&scene, &alone, s, 0, s % SCENE_QUERIES, 0.9f);
        scene_decode(&scene, gpu, 1, &alone);
        scene_same(&scene, &many[s], &alone);
        scene_item_finish(&scene, &alone);
        scene_item_finish(&scene, &many[s]);
    }
    api->destroy(gpu);
    scene_close(&scene);
}

/* A session of 1,048,576 tokens as ref, and with the same bits from a cache that holds nothing. */
static void test_gpu_decode__a_million_tokens(void)
{
    static struct scene_item first, again;
    struct scene_options options = scene_options_million();

    scene_open(&scene, &options);
    CHECK_EQ(scene_n_tokens(&scene, 0), 1 << 20);
    for (uint32_t i = 0; i < 2; i++) {
        struct winnow_gpu *gpu =
            scene_put(&scene, &(struct scene_gpu_options){.n_slots = i == 0 ? 16384 : 0});
        scene_item_init(&scene, i == 0 ? &first : &again, 0, 0, 1, 0.9f);
        scene_decode(&scene, gpu, 1, i == 0 ? &first : &again);
        api->destroy(gpu);
    }
    item_check(&first, 0, 1);
    scene_same(&scene, &first, &again);
    printf("   %u of %u blocks read\n",
           first.certificate.n_blocks_device + first.certificate.n_blocks_host,
           options.n_segments[0] * scene.span);
    scene_item_finish(&scene, &first);
    scene_item_finish(&scene, &again);
    scene_close(&scene);
}

/* A query or token that is not finite fails its item alone: NaN, EDOM. */
static void test_gpu_decode__not_finite_fails_one(void)
{
    static struct scene_item items[3], good;
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 256};

    options.n_sessions = 3;
    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
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
        SCENE_SHAPE(1, 4, 1, 128, 128, WINNOW_BF16, WINNOW_FP32),
        SCENE_SHAPE(1, 3, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        SCENE_SHAPE(1, 16, 1, 96, 64, WINNOW_FP16, WINNOW_FP16),
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
        scene_open(&scene, &options);
        index_double();
        for (uint32_t run = 0; run < 6; run++) {
            struct scene_gpu_options of_gpu = {.n_slots = run % 3 == 0   ? 512
                                                          : run % 3 == 1 ? 0
                                                                         : 32};
            struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
        scene_close(&scene);
    }
}

/* A budget holds, and what it leaves out shows in the certificate. */
static void test_gpu_decode__budget_holds(void)
{
    static struct scene_item item;
    struct scene_gpu_options of_gpu = {.n_slots = 256};

    scene_open(&scene, &scene_crowd);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
    scene_item_init(&scene, &item, 8, 0, 0, 0.999f);
    item.item.n_blocks_max = 7;
    scene_decode(&scene, gpu, 1, &item);
    CHECK_EQ(item.certificate.n_blocks_device + item.certificate.n_blocks_host, 14);
    CHECK_EQ(item.certificate.n_heads_spent, 2);
    CHECK(item.certificate.mass_reached < 0.999f);
    scene_item_finish(&scene, &item);
    api->destroy(gpu);
    scene_close(&scene);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_decode__as_ref);
    TEST_RUN(test_gpu_decode__traces_as_ref);
    TEST_RUN(test_gpu_decode__256_sessions);
    TEST_RUN(test_gpu_decode__a_million_tokens);
    TEST_RUN(test_gpu_decode__not_finite_fails_one);
    TEST_RUN(test_gpu_decode__second_round_reads_more);
    TEST_RUN(test_gpu_decode__budget_holds);
    return TEST_END();
}
