/* The cache and what lies on the device between steps: whatever it holds, results have the same
 * bits; what is dropped, put anew or appended is seen by the next step. */
#include "gpu_item.h"

static struct scene scene;

static void crowd_items(struct scene_item *items, uint32_t layer, float mass)
{
    for (uint32_t s = 0; s < scene.of.n_sessions; s++)
        scene_item_init(&scene, &items[s], s, layer, layer, mass);
}

/* Results have the same bits over 100 runs, whatever the cache holds and however small it is, in a
 * batch of 32 or alone, with 2 to 32 fetching thread blocks; hits and misses add up. */
static void test_gpu_cache__same_bits(void)
{
    static const struct scene_gpu_options of_gpu[] = {
        {.n_slots = 4096, .n_fetchers = 32}, {.n_slots = 0, .n_fetchers = 8},
        {.n_slots = 64, .n_fetchers = 2},    {.n_slots = 600, .n_fetchers = 5},
        {.n_slots = 16, .n_fetchers = 16},
    };
    static struct scene_item first[2][SCENE_SESSIONS_MAX], again[SCENE_SESSIONS_MAX];
    uint64_t n_found[2] = {0};

    scene_open(&scene, &scene_crowd);
    for (size_t i = 0; i < sizeof of_gpu / sizeof of_gpu[0]; i++) {
        struct winnow_gpu *gpu = scene_put(&scene, &of_gpu[i]);
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
    scene_close(&scene);
}

/* Two sessions that share their segments want the same blocks in one launch: each gets what it gets
 * alone, from a cache of any size. */
static void test_gpu_cache__fork_shares_blocks(void)
{
    struct scene_options options = scene_crowd;
    struct scene_item alone[2], both[2];
    uint32_t slots[12];

    options.n_sessions = 2;
    options.n_segments[1] = options.n_segments[0] = 12;
    options.n_tail[1] = options.n_tail[0];
    scene_open(&scene, &options);
    for (uint32_t k = 0; k < 12; k++)
        slots[k] = scene_slot(&scene, 0, k);
    for (uint32_t n_slots = 32; n_slots <= 2048; n_slots *= 8)
        for (uint32_t run = 0; run < (scene_is_small() ? 1 : 3); run++) {
            struct scene_gpu_options of_gpu = {.n_slots = n_slots};
            struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
}

/* A segment slot that is given another segment forgets the first one's blocks, in every cache. */
static void test_gpu_cache__slot_used_anew(void)
{
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 1024};
    static struct scene_item before, own, item;
    struct winnow_index_view views[2];
    uint32_t home[16], slots[6];

    options.n_sessions = 2;
    options.n_segments[0] = options.n_segments[1] = 6;
    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
}

/* A segment that is dropped or put anew leaves its slots: whoever comes next evicts nobody. */
static void test_gpu_cache__drop_frees_slots(void)
{
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 16}; /* 8 a layer: all are looked at */
    struct winnow_gpu_counters first, last;
    struct winnow_index_view views[2];
    static struct scene_item item;
    uint32_t home[16];

    options.n_sessions = 2;
    options.n_segments[0] = options.n_segments[1] = 6;
    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
}

/* Tokens appended one by one by decode stand where tail_put would have put them. */
static void test_gpu_cache__append_is_tail_put(void)
{
    enum { N_APPENDED = 37 };
    static struct scene_item whole, item;
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 256};

    options.n_sessions = 2;
    options.n_tail[0] = 90;
    scene_open(&scene, &options);
    struct winnow_gpu *a = scene_put(&scene, &of_gpu);
    scene_item_init(&scene, &whole, 0, 1, 2, 0.8f);
    scene_decode(&scene, a, 1, &whole);
    scene.of.n_tail[0] -= N_APPENDED;
    struct winnow_gpu *b = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
}

/* A block on disk is compensated and named; once it has a home in the arena, the step has the bits
 * that it has when nothing was on disk. */
static void test_gpu_cache__disk_blocks_are_named(void)
{
    struct scene_gpu_options nowhere = {.n_slots = 256, .disk_every = 3}, here = {.n_slots = 256};
    struct winnow_gpu_home homes[9 * 8 * 2]; /* of session 0: segments, blocks, heads */
    struct scene_options options = scene_crowd;
    static struct scene_item all, item;
    uint32_t n_blocks, n_missing_first = 0;

    options.n_sessions = 1;
    scene_open(&scene, &options);
    struct winnow_gpu *a = scene_put(&scene, &here);
    struct winnow_gpu *b = scene_put(&scene, &nowhere);
    n_blocks = scene.of.n_segments[0] * scene.span;
    scene_item_init(&scene, &all, 0, 1, 3, 0.95f);
    scene_decode(&scene, a, 1, &all);
    for (int i = 0; i < 8; i++) {
        scene_item_init(&scene, &item, 0, 1, 3, 0.95f);
        scene_decode(&scene, b, 1, &item);
        CHECK_EQ(item.certificate.status, 0);
        uint32_t n = item.certificate.n_blocks_disk, n_unfit = item.certificate.n_blocks_unfit;
        uint32_t n_listed = n > 0 ? n + n_unfit : 0;
        n_missing_first += i == 0 ? n : 0;
        if (i == 0) /* each head lacks some: none reads more for it */
            CHECK_EQ(item.certificate.n_rounds, 1);
        for (uint32_t j = 0; j < n_listed; j++) {
            uint32_t head = item.disk_block[j] / n_blocks, b_idx = item.disk_block[j] % n_blocks;
            uint32_t segment = b_idx / scene.span, at = head * scene.span + b_idx % scene.span;
            CHECK(head < 2 && (at % 3 == 0 || n_unfit > 0));
            homes[j] = (struct winnow_gpu_home){
                scene_slot(&scene, 0, segment), 2 * scene.span + at, /* of layer 1 */
                scene_head(&scene, 0, 1, head)->segment[segment].home[at % scene.span]};
        }
        CHECK_EQ(api->homes_set(b, n_listed, homes), 0);
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
    scene_close(&scene);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_cache__same_bits);
    TEST_RUN(test_gpu_cache__fork_shares_blocks);
    TEST_RUN(test_gpu_cache__slot_used_anew);
    TEST_RUN(test_gpu_cache__drop_frees_slots);
    TEST_RUN(test_gpu_cache__append_is_tail_put);
    TEST_RUN(test_gpu_cache__disk_blocks_are_named);
    return TEST_END();
}
