/* Calls of the GPU's contract: refused by what they name, two launches out, memory bounded. */
#include "gpu_item.h"

static struct scene scene;

/* Every index is looked at before anything is done; a refused call leaves no trace. */
static void test_gpu_calls__refuses_arguments(void)
{
    static struct scene_item item, before, after;
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 64};
    const uint32_t out_of_range = 1u << 20, zero = 0, on_disk = WINNOW_GPU_ON_DISK;
    uint32_t home[64], beyond = (uint32_t)(UINT64_C(1) << 30);
    struct winnow_gpu_counters counters;

    options.n_sessions = 2;
    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
}

/* Two launches may be out, a third waits its turn; results come in order, each its own. */
static void test_gpu_calls__two_are_out(void)
{
    static struct scene_item items[4], alone[2];
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 64};

    options.n_sessions = 2;
    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
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
    scene_close(&scene);
}

/* What a device does not have is refused with what is left; a destroyed gpu's memory comes back. */
static void test_gpu_calls__memory_is_bounded(void)
{
    struct scene_options options = scene_crowd;
    struct scene_gpu_options of_gpu = {.n_slots = 64};
    struct winnow_gpu *gpu[3];
    char text[256] = "";

    options.n_sessions = 2;
    scene_open(&scene, &options);
    struct winnow_gpu_options large = scene_gpu_options(&scene, &of_gpu);
    large.n_slots = 1 << 20;
    CHECK_EQ(api->create(scene.device, &large, &gpu[0], text), -ENOMEM);
    CHECK(strstr(text, "GiB") && !gpu[0]);
    large.n_slots = 140000; /* 1.07 of 3 GiB */
    for (int i = 0; i < 2; i++)
        CHECK_EQ(api->create(scene.device, &large, &gpu[i], text), 0);
    CHECK_EQ(api->create(scene.device, &large, &gpu[2], text), -ENOMEM);
    api->destroy(gpu[0]);
    CHECK_EQ(api->create(scene.device, &large, &gpu[2], text), 0);
    api->destroy(gpu[1]);
    api->destroy(gpu[2]);
    api->destroy(NULL);
    scene_close(&scene);
    struct winnow_gpu_device *none;
    CHECK_EQ(api->open(0, UINT64_C(1) << 44, NULL, 0, &none, text), -ENOMEM);
    CHECK_EQ(api->open(1000, 1 << 20, NULL, 0, &none, text), -ENODEV);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_calls__refuses_arguments);
    TEST_RUN(test_gpu_calls__two_are_out);
    TEST_RUN(test_gpu_calls__memory_is_bounded);
    return TEST_END();
}
