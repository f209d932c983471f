/* A device that is lost under a gpu: holds the library's objects itself, to break the context by a
 * store to an address that nobody has. */
#include "gpu_item.h"

#include <kernels/cuda/control.h>
#include <kernels/cuda/state.h>

/* After a sticky error every call says EIO and touches nothing; gpu and device still close, and the
 * item that was out gets no result. */
static void test_gpu_lost__all_calls_say_so(void)
{
    struct scene_options options = {
        .shape = SCENE_SHAPE(2, 4, 2, 64, 64, WINNOW_FP16, WINNOW_FP32),
        .segment_tokens = 128,
        .n_sinks = 16,
        .n_sessions = 2,
        .n_segments = {3, 1},
        .n_tail = {20, 30},
        .seed = test_seed(),
    };
    struct scene_gpu_options of_gpu = {.n_slots = 64};
    struct winnow_gpu_device *none;
    struct winnow_gpu_counters counters;
    struct winnow_index_view views[2];
    struct winnow_gpu *other;
    static struct scene scene;
    static struct scene_item item;
    uint32_t home[16] = {0}, zero = 0;
    uint16_t of_head[2][128], *order[] = {of_head[0], of_head[1]};
    char text[256] = "";

    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
    scene_item_init(&scene, &item, 0, 0, 0, 0.9f);
    scene_decode(&scene, gpu, 1, &item);
    memset(item.out, 0xa5, scene_out_bytes(&scene));
    for (uint32_t h = 0; h < 2; h++) {
        views[h] = scene_head(&scene, 0, 0, h)->segment[0].view;
        views[h].var = NULL;
        memset(order[h], 0xa5, 128 * sizeof **order);
    }
    int64_t job = api->build(gpu, home);
    CHECK(job > 0);

    CHECK_EQ(winnow_gpu_homes_write(&gpu->layout.view, 1, (const struct winnow_gpu_home *)16,
                                    gpu->stream),
             0);
    int64_t ticket = api->decode(gpu, 1, &item.item);
    CHECK(ticket > 0 || ticket == -EIO);
    if (ticket > 0)
        CHECK_EQ(api->poll(gpu, ticket, true), -EIO);
    CHECK_EQ(api->decode(gpu, 1, &item.item), -EIO);
    CHECK_EQ(api->poll(gpu, 1, false), -EIO);
    CHECK_EQ(api->segment_put(gpu, 0, 0, views, home), -EIO);
    CHECK_EQ(api->homes_set(gpu, 1, &(struct winnow_gpu_home){0}), -EIO);
    CHECK_EQ(api->segment_drop(gpu, 0), -EIO);
    CHECK_EQ(api->session_set(gpu, 0, 1, &zero), -EIO);
    CHECK_EQ(api->tail_put(gpu, 0, 0, 0, NULL, NULL), -EIO);
    CHECK_EQ(api->build(gpu, home), -EIO);
    CHECK_EQ(api->build_poll(gpu, job, true, order, views), -EIO);
    for (uint32_t i = 0; i < 2 * 128; i++)
        CHECK_EQ(order[i / 128][i % 128], 0xa5a5);
    CHECK_EQ(api->counters(gpu, 0, &counters), -EIO);
    struct winnow_gpu_options again = scene_gpu_options(&scene, &of_gpu);
    CHECK_EQ(api->create(scene.device, &again, &other, text), -EIO);
    for (size_t i = 0; i < scene_out_bytes(&scene); i++)
        CHECK_EQ(item.out[i], 0xa5);
    api->destroy(gpu);
    api->close(scene.device);
    CHECK(api->open(0, 1 << 20, NULL, 0, &none, text) < 0); /* only a new process has a context */
    scene_item_finish(&scene, &item);
    scene_finish(&scene);
}

int main(int argc, char **argv)
{
    char text[256];

    TEST_INIT(argc, argv);
    api = winnow_gpu_find(WINNOW_GPU_API_VERSION);
    if (api->probe(0, text) < 0) {
        printf("%s\n", text);
        TEST_SKIP("no cuda device");
    }
    TEST_RUN(test_gpu_lost__all_calls_say_so);
    return TEST_END();
}
