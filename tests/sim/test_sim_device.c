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

/* Sparse steps are the device's, and say what the CPU's say. */
static void test_device__same_bits_as_the_cpu(void)
{
    struct winnow_model_shape shape = small_shape();
    struct sim_options options =
        with_gpu((struct sim_options){.seed = test_seed(), .host_pool_bytes = 64 << 20});
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &gpu);
    CHECK_EQ(sim_gpu.n_steps, N_LAYERS * N_STEPS * 3 / 4); /* mass 1 is read by the CPU */
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
    CHECK(sim_gpu.n_steps > N_LAYERS * N_STEPS * 3 / 4);
    same_check(&cpu, &gpu);
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
    TEST_RUN(test_device__lost_at_any_call);
    TEST_RUN(test_device__random_runs_have_the_same_bits);
    return TEST_END();
}
