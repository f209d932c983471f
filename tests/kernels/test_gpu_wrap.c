/* The cache's stamps around their end, 2^31 launches on: holds the library's objects itself, to be
 * there at once. */
#include "gpu_item.h"

#include <kernels/cuda/state.h>

enum { N_SLOTS = 8, BUDGET = 3, BUDGET_OTHER = 4 }; /* one window: who looks for a slot sees all */

static struct scene scene;

/* The next launch is number n + 1, as if n had been taken. */
static void launches_skip(struct winnow_gpu *gpu, int64_t n)
{
    gpu->n_launched = gpu->n_taken = n;
    *gpu->layout.view.done = (uint32_t)n & (uint32_t)WINNOW_GPU_STAMP_MASK;
}

static void session_decode(struct winnow_gpu *gpu, struct scene_item *item, uint32_t session)
{
    scene_item_init(&scene, item, session, 0, 0, 0.9999f);
    item->item.n_blocks_max = session == 2 ? BUDGET_OTHER : BUDGET;
    scene_decode(&scene, gpu, 1, item);
    CHECK_EQ(item->certificate.status, 0);
}

/* Sessions 0 and 1 leave two slots; 0 is used again, then 2 takes four: the empty ones, and two of
 * those longest unused, so 0 stays, wherever in it the stamps end. Results are those of a gpu without
 * a slot. */
static void test_gpu_wrap__longest_unused_goes(void)
{
    static const uint32_t order[] = {0, 1, 0, 2, 0, 2};
    static const uint32_t n_host[] = {BUDGET, BUDGET, 0, BUDGET_OTHER, 0, 0};
    struct winnow_gpu_counters counters;
    static struct scene_item item, expected[3];

    struct winnow_gpu *none = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 0});
    for (uint32_t s = 0; s < 3; s++)
        session_decode(none, &expected[s], s);
    for (int64_t before = 0; before < 7; before++) {
        struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = N_SLOTS});
        launches_skip(gpu, (INT64_C(1) << 31) - before);
        for (uint32_t i = 0; i < 6; i++) {
            session_decode(gpu, &item, order[i]);
            CHECK_EQ(item.certificate.n_blocks_host, n_host[i]);
            CHECK_EQ(item.certificate.n_blocks_unfit, 0);
            scene_same(&scene, &expected[order[i]], &item);
            scene_item_finish(&scene, &item);
        }
        CHECK_EQ(api->counters(gpu, 0, &counters), 0);
        CHECK_EQ(counters.n_hits, 2 * BUDGET + BUDGET_OTHER);
        CHECK_EQ(counters.n_evictions, 2 * BUDGET + BUDGET_OTHER - N_SLOTS);
        api->destroy(gpu);
    }
    for (uint32_t s = 0; s < 3; s++)
        scene_item_finish(&scene, &expected[s]);
    api->destroy(none);
}

/* Two launches are out while the number ends: each is complete when its own work is. */
static void test_gpu_wrap__two_are_out(void)
{
    static struct scene_item items[2], expected[2];
    struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = N_SLOTS});

    for (uint32_t s = 0; s < 2; s++)
        session_decode(gpu, &expected[s], s);
    for (int64_t before = 0; before < 4; before++) {
        int64_t ticket = 0;
        launches_skip(gpu, (INT64_C(1) << 31) - before);
        for (uint32_t s = 0; s < 2; s++) {
            scene_item_init(&scene, &items[s], s, 0, 0, 0.9999f);
            items[s].item.n_blocks_max = BUDGET;
            ticket = api->decode(gpu, 1, &items[s].item);
            CHECK_EQ(ticket, (INT64_C(1) << 31) - before + 1 + s);
        }
        while (api->poll(gpu, ticket, false) == 0)
            ;
        for (uint32_t s = 0; s < 2; s++) {
            scene_same(&scene, &expected[s], &items[s]);
            scene_item_finish(&scene, &items[s]);
        }
    }
    for (uint32_t s = 0; s < 2; s++)
        scene_item_finish(&scene, &expected[s]);
    api->destroy(gpu);
}

int main(int argc, char **argv)
{
    struct scene_options options = {
        .shape = SCENE_SHAPE(1, 2, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        .segment_tokens = 128,
        .n_sinks = 16,
        .n_sessions = 3,
        .n_segments = {9, 9, 9},
        .n_tail = {20, 30, 40},
    };
    char text[256];

    TEST_INIT(argc, argv);
    api = winnow_gpu_find(WINNOW_GPU_API_VERSION);
    if (api->probe(0, text) < 0) {
        printf("%s\n", text);
        TEST_SKIP("no cuda device");
    }
    options.seed = test_seed();
    scene_open(&scene, &options);
    TEST_RUN(test_gpu_wrap__longest_unused_goes);
    TEST_RUN(test_gpu_wrap__two_are_out);
    scene_close(&scene);
    return TEST_END();
}
