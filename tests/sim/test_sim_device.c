/* A GPU beside the core (gpu.h): the same bits, whatever it takes, lacks or loses. */
#include "outcome.h"
#include "run.h"

static struct outcome cpu, gpu;
static struct sim_swarm swarm;

static struct winnow_model_shape small_shape(void)
{
    return sim_shape(N_LAYERS, 2, 2, 64, WINNOW_FP16);
}

static struct sim_options with_gpu(struct sim_options options)
{
    options.gpu_memory_bytes = 64 << 20;
    return options;
}

static void cpu_outcome(void)
{
    struct winnow_model_shape shape = small_shape();
    struct sim_options options = {.seed = test_seed(), .host_pool_bytes = 64 << 20};
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &cpu);
}

/* All steps are the device's, sparse and whole, and say what the CPU's say. */
static void test_device__same_bits_as_the_cpu(void)
{
    struct winnow_model_shape shape = small_shape();
    struct sim_options options =
        with_gpu((struct sim_options){.seed = test_seed(), .host_pool_bytes = 64 << 20});
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &gpu);
    CHECK_EQ(sim_gpu.n_steps, N_LAYERS * N_STEPS);
    CHECK_EQ(sim_gpu.n_whole, N_LAYERS * N_STEPS / 4);
    same_check(&cpu, &gpu);
}

/* A pool that holds a part: what the device wants of the rest is read, and it answers again. */
static void test_device__blocks_on_disk_are_read_for_it(void)
{
    struct winnow_model_shape shape = sim_shape(N_LAYERS, 4, 1, 256, WINNOW_FP16);
    struct sim_options options = {.seed = test_seed(), .host_pool_bytes = 64 << 20};
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &cpu);
    options = with_gpu(shuffling(16, test_seed()));
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &gpu);
    CHECK(sim_gpu.n_disk > 0 && gpu.n_disk > 0);
    CHECK(sim_gpu.n_steps > N_LAYERS * N_STEPS);
    same_check(&cpu, &gpu);
}

/* One step of a flat head over a text that lies mostly on disk. */
static struct winnow_core_certificate flat_step(uint64_t gpu_memory_bytes, float *out)
{
    enum { N = 4000 };
    static struct sim_text text;
    struct winnow_model_shape shape = sim_shape(4, 8, 1, 64, WINNOW_FP16);
    struct sim_options options = {.seed = test_seed(),
                                  .gpu_memory_bytes = gpu_memory_bytes,
                                  .disk_cap_bytes = 64 << 20,
                                  .data_file_bytes = 4 << 20};
    struct sim_world world;
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    text.q_scale = 0.1f;
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_fill(&text, 0, N, 500), 0);
    sim_world_settle(&world);
    CHECK_EQ(sim_text_step(&text, 0, N, 0.95f, out), 0);
    struct winnow_core_certificate certificate = text.last.attend.certificate;
    CHECK_EQ(sim_text_close(&text), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
    return certificate;
}

/* However many blocks one step lacks, they are read at once: a launch that finds them on disk, one
 * that answers, and one between where the second round lacks some too. */
static void test_device__one_more_launch_for_any_number_of_blocks(void)
{
    float of_cpu[8 * 64], of_device[8 * 64];
    flat_step(0, of_cpu);
    struct winnow_core_certificate c = flat_step(64 << 20, of_device);
    CHECK(c.n_blocks_disk > WINNOW_N_GROUPS * WINNOW_GROUP_BLOCKS);
    CHECK(c.n_blocks_host > 0);
    CHECK_EQ(sim_gpu.n_launches, 1 + c.n_rounds);
    CHECK(!memcmp(of_cpu, of_device, sizeof of_cpu));
}

/* Steps of sessions that come together go in one launch, with the bits that each has alone. */
static void test_device__sessions_share_launches(void)
{
    enum { N = 600, N_SESSIONS = 4, N_ALONE = 8 };
    static struct sim_text text[N_SESSIONS];
    static struct sim_step step[N_SESSIONS];
    struct winnow_model_shape shape = small_shape();
    struct sim_options options =
        with_gpu((struct sim_options){.seed = test_seed(), .host_pool_bytes = 64 << 20});
    float alone[4 * 64], out[N_SESSIONS][4 * 64];
    bool done[N_SESSIONS];
    struct sim_world world;
    sim_world_init(&world, &options);
    sim_text_init(&text[0], &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text[0], NULL), 0);
    CHECK_EQ(sim_text_fill(&text[0], 0, N, 200), 0);
    for (int i = 1; i < N_SESSIONS; i++)
        CHECK_EQ(sim_text_fork(&text[0], &text[i]), 0);
    for (uint64_t i = 0; i < N_ALONE; i++) {
        CHECK_EQ(sim_text_step(&text[0], 0, N + i, 0.9f, alone), 0);
        uint64_t n_launches = sim_gpu.n_launches, n_steps = sim_gpu.n_steps;
        for (int k = 1; k < N_SESSIONS; k++) {
            sim_text_step_make(&text[k], &step[k], 0, N + i, 0.9f, out[k]);
            sim_text_send(&text[k], &step[k].request, 0, &done[k]);
        }
        sim_world_settle(&world);
        for (int k = 1; k < N_SESSIONS; k++) {
            CHECK(done[k]);
            CHECK_EQ(step[k].request.status, 0);
            CHECK(!memcmp(out[k], alone, sizeof alone));
        }
        CHECK_EQ(sim_gpu.n_steps - n_steps, N_SESSIONS - 1);
        CHECK_EQ(sim_gpu.n_launches - n_launches, 1);
    }
    for (int i = 0; i < N_SESSIONS; i++)
        CHECK_EQ(sim_text_close(&text[i]), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* The index of what is sealed is on the device before a step asks for it: the first one waits for
 * no copies but the tail's. */
static void test_device__segments_are_put_as_they_come(void)
{
    enum { N = 1500 };
    static struct sim_text text;
    struct winnow_model_shape shape = small_shape();
    struct sim_options options =
        with_gpu((struct sim_options){.seed = test_seed(), .host_pool_bytes = 64 << 20});
    float out[4 * 64];
    struct sim_world world;
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_fill(&text, 0, N, 300), 0);
    const struct winnow_context *context = sim_session(world.core, text.id)->context;
    for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
        CHECK(context->layer[layer].n_segments > 5);
        for (uint32_t k = 0; k < context->layer[layer].n_segments; k++)
            CHECK(context->segment[k]->layer[layer].on_device);
    }
    CHECK_EQ(sim_text_step(&text, 0, N, 0.9f, out), 0);
    CHECK_EQ(sim_text_close(&text), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

static struct winnow_gpu_options options_of(uint64_t gpu_memory_bytes, uint64_t index_memory_bytes)
{
    static struct sim_text text;
    struct winnow_model_shape shape = small_shape();
    struct sim_options options = {.seed = test_seed(),
                                  .gpu_memory_bytes = gpu_memory_bytes,
                                  .index_memory_bytes = index_memory_bytes};
    struct sim_world world;
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    struct winnow_gpu_options chosen = world.core->tiers.device->shape_options;
    CHECK_EQ(sim_text_close(&text), 0);
    sim_world_settle(&world);
    sim_world_finish(&world);
    return chosen;
}

/* The device indexes what the host does. Memory beyond that is cache, until every block has a slot;
 * where it is short, segments go before the cache falls under a twentieth. */
static void test_device__memory_is_index_then_cache(void)
{
    struct winnow_gpu_options large = options_of(256 << 20, 4 << 20);
    struct winnow_gpu_options middle = options_of(24 << 20, 4 << 20);
    struct winnow_gpu_options small = options_of(6 << 20, 4 << 20);
    uint32_t n_of_segment = N_LAYERS * 2 * 128 / WINNOW_BLOCK_TOKENS;
    CHECK_EQ(large.n_slots, large.n_segments_max * n_of_segment);
    CHECK_EQ(middle.n_segments_max, large.n_segments_max);
    CHECK(middle.n_slots < large.n_slots && middle.n_slots > large.n_slots / 20);
    CHECK(small.n_segments_max < large.n_segments_max);
    CHECK(small.n_slots >= small.n_segments_max * n_of_segment / 20);
    CHECK(small.n_slots < small.n_segments_max * n_of_segment / 10);
}

/* Whichever call finds it lost: the step under way and all that follow are the CPU's, with the same
 * bits, and nothing is left behind. */
static void test_device__lost_at_any_call(void)
{
    struct winnow_model_shape shape = small_shape();
    struct sim_options options =
        with_gpu((struct sim_options){.seed = test_seed(), .host_pool_bytes = 64 << 20});
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &gpu);
    uint64_t n_calls = sim_gpu.n_calls, n_each = n_calls / 7;
    cpu_outcome();
    for (uint64_t at = 1; at <= n_calls; at += at < 8 ? 1 : n_each) {
        options.gpu_fails_after = at;
        outcome_of(&options, &shape, WINNOW_POLICY_CODES, &gpu);
        CHECK(sim_gpu.failed);
        same_check(&cpu, &gpu);
    }
}

/* All that engines do, on a device of little memory over a disk that fails. */
static void test_device__random_runs_have_the_same_bits(void)
{
    uint64_t n_steps = 0, n_disk = 0, n_lost = 0, first = test_seed();
    for (int i = 0; i < 10; i++, test_seed_value++) {
        sim_swarm_init(&swarm, test_seed(), SIM_BY_GPU);
        sim_swarm_run(&swarm, 1500);
        n_steps += sim_gpu.n_steps;
        n_disk += sim_gpu.n_disk;
        n_lost += sim_gpu.failed;
        sim_swarm_finish(&swarm);
    }
    test_seed_value = first;
    printf("   %" PRIu64 " steps by the device, %" PRIu64 " blocks from disk, lost %" PRIu64
           " times\n",
           n_steps, n_disk, n_lost);
    CHECK(n_steps > 500);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    cpu_outcome();
    TEST_RUN(test_device__same_bits_as_the_cpu);
    TEST_RUN(test_device__blocks_on_disk_are_read_for_it);
    TEST_RUN(test_device__one_more_launch_for_any_number_of_blocks);
    TEST_RUN(test_device__sessions_share_launches);
    TEST_RUN(test_device__segments_are_put_as_they_come);
    TEST_RUN(test_device__memory_is_index_then_cache);
    TEST_RUN(test_device__lost_at_any_call);
    TEST_RUN(test_device__random_runs_have_the_same_bits);
    return TEST_END();
}
