/* Blocks fetched beside the scan: they are found on the stage, and change nothing but that. */
#include "gpu_item.h"

static struct scene scene;

static uint64_t n_of(const struct winnow_gpu_counters *after, const struct winnow_gpu_counters *of)
{
    return after->n_ahead - of->n_ahead;
}

/* A step of the session; what it added to the layer's counters. */
static struct winnow_gpu_counters step(struct winnow_gpu *gpu, struct scene_item *item,
                                       uint32_t query)
{
    struct winnow_gpu_counters before, after;

    CHECK_EQ(api->counters(gpu, 0, &before), 0);
    scene_item_init(&scene, item, 0, 0, query, 0.9f);
    scene_decode(&scene, gpu, 1, item);
    CHECK_EQ(item->certificate.status, 0);
    CHECK_EQ(api->counters(gpu, 0, &after), 0);
    return (struct winnow_gpu_counters){
        .n_hits = after.n_hits - before.n_hits,
        .n_misses = after.n_misses - before.n_misses,
        .n_ahead = n_of(&after, &before),
        .n_ahead_used = after.n_ahead_used - before.n_ahead_used,
    };
}

static void cache_empty(struct winnow_gpu *gpu)
{
    for (uint32_t k = 0; k < scene.of.n_segments[0]; k++)
        CHECK_EQ(api->segment_drop(gpu, k), 0);
}

/* A step foresees what the last one tells it, misses as much as it would without, and gives the same
 * bits, whether its blocks find slots or none; a session that is set anew foresees nothing. */
static void test_gpu_ahead__same_bits(void)
{
    static const uint32_t n_slots[] = {16384, 256, 0};
    struct scene_options options = scene_options_million();
    uint32_t slots[1024];

    scene_open(&scene, &options);
    for (uint32_t k = 0; k < options.n_segments[0]; k++)
        slots[k] = scene_slot(&scene, 0, k);
    for (uint32_t i = 0; i < 3; i++) {
        struct winnow_gpu *gpu =
            scene_put(&scene, &(struct scene_gpu_options){.n_slots = n_slots[i]});
        struct scene_item blind, seeing, again;
        struct winnow_gpu_counters n = step(gpu, &blind, 1);
        uint64_t n_misses = n.n_misses;
        CHECK_EQ(n.n_ahead, 0);
        cache_empty(gpu);
        n = step(gpu, &seeing, 1);
        printf("   %u slots: %lu misses, %lu ahead, %lu used\n", n_slots[i],
               (unsigned long)n.n_misses, (unsigned long)n.n_ahead, (unsigned long)n.n_ahead_used);
        CHECK_EQ(n.n_misses, n_misses);
        CHECK(n.n_ahead > 0 && n.n_ahead_used > 0 && n.n_ahead_used <= n.n_ahead);
        scene_same(&scene, &blind, &seeing);
        cache_empty(gpu);
        CHECK_EQ(api->session_set(gpu, 0, options.n_segments[0], slots), 0);
        n = step(gpu, &again, 1);
        CHECK_EQ(n.n_ahead, 0);
        CHECK_EQ(n.n_misses, n_misses);
        scene_same(&scene, &blind, &again);
        scene_item_finish(&scene, &blind);
        scene_item_finish(&scene, &seeing);
        scene_item_finish(&scene, &again);
        api->destroy(gpu);
    }
    scene_close(&scene);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_ahead__same_bits);
    return TEST_END();
}
