/* Exact windows by a GPU (gpu.h): the bits of a core without one, in one part or many, beside another
 * window, given up, lost. */
#include "text.h"

enum { N_PAST = 2500, N_WINDOW = 700, ROW = 8 * 64 };

static struct sim_text text[2];
static float out[2][(size_t)N_WINDOW * ROW];

static struct sim_options with_gpu(struct sim_options options)
{
    options.gpu_memory_bytes = 64 << 20;
    return options;
}

static struct sim_options in_memory(void)
{
    return (struct sim_options){.seed = test_seed(), .host_pool_bytes = 64 << 20};
}

/* A pool that holds half of the text, over a disk. */
static struct sim_options on_disk(void)
{
    return (struct sim_options){.seed = test_seed(),
                                .disk_cap_bytes = 64 << 20,
                                .data_file_bytes = 4 << 20,
                                .shuffled = true};
}

/* A text of N_PAST tokens, then a window of N_WINDOW in layer 0. */
static int window_of(struct sim_world *world, const struct sim_options *options,
                     const struct winnow_model_shape *shape, float *to)
{
    sim_world_init(world, options);
    sim_text_init(&text[0], world, shape, test_seed());
    CHECK_EQ(sim_text_open(&text[0], NULL), 0);
    CHECK_EQ(sim_text_fill(&text[0], 0, N_PAST, 300), 0);
    sim_world_settle(world);
    return sim_text_window(&text[0], 0, N_PAST, N_WINDOW, to);
}

static void world_end(struct sim_world *world)
{
    CHECK_EQ(sim_text_close(&text[0]), 0);
    sim_world_settle(world);
    sim_baseline_check(world);
    sim_world_finish(world);
}

static uint32_t n_positions(const struct sim_world *world)
{
    return world->core->tiers.device->shape_options.n_window_positions;
}

/* A window longer than the device takes at once, over segments in memory and on disk. */
static void test_window__same_bits_as_the_cpu(void)
{
    struct winnow_model_shape shape = sim_shape(4, 8, 1, 64, WINNOW_FP16);
    for (int is_on_disk = 0; is_on_disk < 2; is_on_disk++) {
        struct sim_options options = is_on_disk ? on_disk() : in_memory();
        struct winnow_core_certificate c[2];
        struct sim_world world;
        for (int i = 0; i < 2; i++) {
            struct sim_options of = i ? with_gpu(options) : options;
            CHECK_EQ(window_of(&world, &of, &shape, out[i]), 0);
            c[i] = text[0].last.exact.certificate;
            if (i) {
                uint32_t n = n_positions(&world);
                CHECK(n >= 128 && n < N_WINDOW);
                CHECK_EQ(sim_gpu.n_windows, (N_WINDOW + n - 1) / n);
                CHECK(sim_gpu.n_parts > 2 * sim_gpu.n_windows);
            }
            world_end(&world);
        }
        CHECK(!memcmp(out[0], out[1], sizeof out[0]));
        CHECK_EQ(c[0].n_blocks_total, c[1].n_blocks_total);
        CHECK(c[1].n_blocks_host > 0 && (c[1].n_blocks_disk > 0) == is_on_disk);
    }
}

/* Types that it does not serve, and a device without room for it, leave windows to the CPU. */
static void test_window__not_for_it(void)
{
    struct winnow_model_shape shape = sim_shape(4, 8, 1, 64, WINNOW_FP32);
    struct sim_options options = with_gpu(in_memory());
    struct sim_world world;
    CHECK_EQ(window_of(&world, &options, &shape, out[0]), 0);
    CHECK(!sim_session(world.core, text[0].id)->device_slot);
    world_end(&world);
    CHECK_EQ(sim_gpu.n_windows, 0);
    shape = sim_shape(1, 2, 16, 64, WINNOW_FP16);
    options.gpu_memory_bytes = 8 << 20;
    sim_world_init(&world, &options);
    sim_text_init(&text[0], &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text[0], NULL), 0);
    CHECK_EQ(sim_text_window(&text[0], 0, 0, 150, out[1]), 0);
    CHECK(sim_session(world.core, text[0].id)->device_slot);
    CHECK_EQ(n_positions(&world), 0);
    world_end(&world);
    CHECK_EQ(sim_gpu.n_windows, 0);
}

struct exact {
    struct winnow_request request;
    float q[300 * ROW], k[300 * ROW], v[300 * ROW], out[300 * ROW];
};

static void exact_make(struct sim_text *of, struct exact *exact, uint32_t layer, uint64_t first)
{
    sim_rows(&of->model, SIM_Q, layer, of->token + first, 300, exact->q);
    sim_rows(&of->model, SIM_K, layer, of->token + first, 300, exact->k);
    sim_rows(&of->model, SIM_V, layer, of->token + first, 300, exact->v);
    exact->request = (struct winnow_request){.kind = WINNOW_REQUEST_EXACT,
                                             .exact = {.layer = layer,
                                                       .n_tokens = 300,
                                                       .first = first,
                                                       .q = exact->q,
                                                       .k = exact->k,
                                                       .v = exact->v,
                                                       .out = exact->out}};
}

/* Two sessions' windows: one waits for the other, and both are the device's. */
static void test_window__one_after_the_other(void)
{
    static struct exact exact[2];
    struct winnow_model_shape shape = sim_shape(1, 8, 1, 64, WINNOW_FP16);
    for (int i = 0; i < 2; i++) {
        struct sim_options options = i ? with_gpu(in_memory()) : in_memory();
        struct sim_world world;
        bool done[2];
        sim_world_init(&world, &options);
        for (int k = 0; k < 2; k++) {
            sim_text_init(&text[k], &world, &shape, test_seed() + (uint64_t)k);
            CHECK_EQ(sim_text_open(&text[k], NULL), 0);
            CHECK_EQ(sim_text_fill(&text[k], 0, N_PAST, 300), 0);
            exact_make(&text[k], &exact[k], 0, N_PAST);
        }
        for (int k = 0; k < 2; k++)
            sim_text_send(&text[k], &exact[k].request, 0, &done[k]);
        sim_world_settle(&world);
        CHECK_EQ(sim_gpu.n_windows, 2 * (uint64_t)i);
        for (int k = 0; k < 2; k++) {
            CHECK(done[k]);
            CHECK_EQ(exact[k].request.status, 0);
            memcpy(out[i] + (size_t)k * 300 * ROW, exact[k].out, sizeof exact[k].out);
        }
        CHECK_EQ(sim_text_close(&text[1]), 0);
        world_end(&world);
    }
    CHECK(!memcmp(out[0], out[1], 2 * sizeof exact[0].out));
}

/* Whichever call of a window finds the device lost, the CPU begins it anew. */
static void test_window__lost_at_any_call(void)
{
    struct winnow_model_shape shape = sim_shape(4, 8, 1, 64, WINNOW_FP16);
    struct sim_options options = on_disk();
    struct sim_world world;
    CHECK_EQ(window_of(&world, &options, &shape, out[0]), 0);
    world_end(&world);
    options = with_gpu(options);
    uint64_t n_windows = 0, n_lost = 0;
    for (uint64_t at = 0; n_windows == 0; at += 1 + at / 3) {
        sim_world_init(&world, &options);
        sim_text_init(&text[0], &world, &shape, test_seed());
        CHECK_EQ(sim_text_open(&text[0], NULL), 0);
        CHECK_EQ(sim_text_fill(&text[0], 0, N_PAST, 300), 0);
        sim_world_settle(&world);
        sim_gpu.fails_after = sim_gpu.n_calls + 1 + at;
        memset(out[1], 0xff, sizeof out[1]);
        CHECK_EQ(sim_text_window(&text[0], 0, N_PAST, N_WINDOW, out[1]), 0);
        CHECK(!memcmp(out[0], out[1], sizeof out[0]));
        n_windows = sim_gpu.failed ? 0 : sim_gpu.n_windows;
        n_lost += sim_gpu.failed;
        world_end(&world);
    }
    CHECK(n_lost > 5);
}

/* A window whose deadline passes, or whose numbers are none, leaves the device to the next one. */
static void test_window__given_up(void)
{
    static struct exact exact;
    struct winnow_model_shape shape = sim_shape(4, 8, 1, 64, WINNOW_FP16);
    struct sim_options options = with_gpu(on_disk());
    struct sim_world world;
    bool done;
    CHECK_EQ(window_of(&world, &options, &shape, out[0]), 0);
    sim_world_settle(&world);
    uint64_t first = N_PAST + N_WINDOW, n_windows = sim_gpu.n_windows;
    exact_make(&text[0], &exact, 0, first);
    exact.q[77] = NAN;
    CHECK_EQ(sim_text_run(&text[0], &exact.request), -EDOM);
    exact_make(&text[0], &exact, 0, first);
    sim_text_send(&text[0], &exact.request, 30 * WINNOW_NS_PER_US, &done);
    sim_world_settle(&world);
    CHECK(done);
    CHECK_EQ(exact.request.status, -ETIMEDOUT);
    CHECK_EQ(sim_gpu.n_windows, n_windows);
    CHECK_EQ(exact.request.n_held, first + 300); /* its tokens had joined */
    exact_make(&text[0], &exact, 0, first + 300);
    CHECK_EQ(sim_text_run(&text[0], &exact.request), 0);
    CHECK(sim_gpu.n_windows > n_windows);
    CHECK(sim_text_error(&text[0], 0, first + 599, exact.out + 299 * ROW) < 2e-3);
    world_end(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_window__same_bits_as_the_cpu);
    TEST_RUN(test_window__not_for_it);
    TEST_RUN(test_window__one_after_the_other);
    TEST_RUN(test_window__lost_at_any_call);
    TEST_RUN(test_window__given_up);
    return TEST_END();
}
