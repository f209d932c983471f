/* Spans that a GPU builds (core/build.c): in force where the CPU's are, with the same bits, whatever
 * happens while a job is out. The simulated GPU builds with the CPU's kernels, when it is polled. */
#include "text.h"

/* FORCED: the position of the token that makes it END + 96. */
enum { S = 128, END = 16 + S, DUE = END + 64, FORCED = END + 95, LAST = FORCED + 10, ROW = 4 * 64 };

enum manner { PLAIN, TRUNCATED, FORKED, LOST, N_MANNERS };

static struct sim_text text, forked;
static struct sim_world world;

struct run {
    float of_text[LAST][6][ROW], of_fork[LAST][ROW];
};
static struct run cpu, gpu;

static void world_begin(uint64_t gpu_memory_bytes, uint32_t n_layers)
{
    struct winnow_model_shape shape = sim_shape(n_layers, 2, 2, 64, WINNOW_FP16);
    struct sim_options options = {.seed = test_seed(),
                                  .gpu_memory_bytes = gpu_memory_bytes,
                                  .host_pool_bytes = 64 << 20,
                                  .segment_tokens = S};
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_fill(&text, 0, DUE - 4, 100), 0);
}

static void world_end(void)
{
    CHECK_EQ(sim_text_close(&text), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

static void steps_run(struct run *run, uint64_t first, uint64_t end)
{
    for (uint64_t at = first; at < end; at++)
        for (uint32_t layer = 0; layer < text.model.shape.n_layers; layer++)
            CHECK_EQ(sim_text_step(&text, layer, at, 0.9f, run->of_text[at][layer]), 0);
}

/* The request waits for a job: it ends when the job may, and not before. */
static void request_waits(struct winnow_request *request)
{
    bool done;
    sim_text_send(&text, request, 0, &done);
    for (int i = 0; i < 300; i++)
        sim_world_step(&world, WINNOW_NEVER_NS);
    CHECK(!done || !sim_gpu.builds_held);
    sim_gpu.builds_held = false;
    sim_world_settle(&world);
    CHECK(done);
    CHECK_EQ(request->status, 0);
}

/* A context with a job out since DUE; then `manner` happens. */
static void script(uint64_t gpu_memory_bytes, enum manner manner, struct run *run)
{
    static struct sim_step step;
    uint32_t n_layers = manner == FORKED ? 1 : 6;
    struct winnow_request truncate = {.kind = WINNOW_REQUEST_TRUNCATE,
                                      .truncate = {.n_tokens = END - 20}};
    *run = (struct run){0};
    world_begin(gpu_memory_bytes, n_layers);
    sim_gpu.builds_held = gpu_memory_bytes > 0;
    steps_run(run, DUE - 4, FORCED);
    switch (manner) {
    case FORKED:
        CHECK_EQ(sim_text_fork(&text, &forked), 0);
        sim_gpu.builds_held = false;
        for (uint64_t at = FORCED; at < LAST; at++)
            CHECK_EQ(sim_text_step(&forked, 0, at, 0.9f, run->of_fork[at]), 0);
        CHECK_EQ(sim_text_close(&forked), 0);
        break;
    case TRUNCATED:
        request_waits(&truncate);
        text.epoch = truncate.epoch;
        CHECK_EQ(sim_text_fill(&text, END - 20, FORCED, 50), 0);
        break;
    case LOST:
        sim_gpu.fails_after = sim_gpu.n_calls + 1;
        break;
    default:
        sim_text_step_make(&text, &step, 0, FORCED, 0.9f, run->of_text[FORCED][0]);
        request_waits(&step.request);
        for (uint32_t layer = 1; layer < n_layers; layer++)
            CHECK_EQ(sim_text_step(&text, layer, FORCED, 0.9f, run->of_text[FORCED][layer]), 0);
    }
    steps_run(run, manner == PLAIN ? FORCED + 1 : FORCED, LAST);
    for (uint32_t layer = 0; layer < n_layers; layer++)
        CHECK_EQ(sim_session(world.core, text.id)->context->layer[layer].n_segments, 1);
    world_end();
}

/* More layers are due than jobs may be out, and the jobs do not end: steps go on up to 96 tokens past
 * the span's end, and wait there. A truncate waits; a fork does not, and builds its own; a device
 * that is lost leaves its jobs to the CPU. */
static void test_build__same_bits_whatever_comes_meanwhile(void)
{
    for (enum manner manner = 0; manner < N_MANNERS; manner++) {
        script(0, manner, &cpu);
        script(64 << 20, manner, &gpu);
        CHECK(!memcmp(&cpu, &gpu, sizeof cpu));
        CHECK_EQ(sim_gpu.failed, manner == LOST);
        CHECK_EQ(sim_gpu.n_builds, manner == LOST        ? 0
                                   : manner == FORKED    ? 2
                                   : manner == TRUNCATED ? 4 + 6
                                                         : 6);
    }
}

/* A session closed while its jobs are out is answered, and goes when they end. */
static void test_build__close_waits_for_jobs(void)
{
    struct winnow_request close = {.kind = WINNOW_REQUEST_CLOSE};
    world_begin(64 << 20, 2);
    sim_gpu.builds_held = true;
    steps_run(&gpu, DUE - 4, DUE + 1);
    bool done;
    sim_text_send(&text, &close, 0, &done);
    for (int i = 0; i < 300; i++)
        sim_world_step(&world, WINNOW_NEVER_NS);
    CHECK(done);
    CHECK_EQ(winnow_pool_used(world.core->sessions), 1);
    CHECK_EQ(sim_gpu.n_builds, 0);
    sim_gpu.builds_held = false;
    sim_world_settle(&world);
    CHECK_EQ(winnow_pool_used(world.core->sessions), 0);
    CHECK_EQ(sim_gpu.n_builds, 2);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* A core that is destroyed with sessions open waits for their jobs. */
static void test_build__core_ends_with_jobs_out(void)
{
    for (uint32_t is_lost = 0; is_lost < 2; is_lost++) {
        world_begin(64 << 20, 2);
        sim_gpu.builds_held = true;
        steps_run(&gpu, DUE - 4, DUE + 1);
        sim_gpu.fails_after = is_lost ? sim_gpu.n_calls + 1 : 0;
        winnow_core_destroy(world.core);
        CHECK_EQ(sim_gpu.n_builds, is_lost ? 0 : 2);
        winnow_team_destroy(world.team);
        winnow_sim_disk_destroy(world.disk);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_build__same_bits_whatever_comes_meanwhile);
    TEST_RUN(test_build__close_waits_for_jobs);
    TEST_RUN(test_build__core_ends_with_jobs_out);
    return TEST_END();
}
