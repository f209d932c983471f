/* The same bits (rule 6): whatever the pool's size, the disk's order, the builder's delay, for the
 * same calls. */
#include "outcome.h"

static struct outcome calm, other;

static const uint32_t policies[] = {WINNOW_POLICY_CODES, WINNOW_POLICY_MOMENT,
                                    WINNOW_POLICY_TACTIC};

/* Pools of 16, 18 and 64 MiB, the small ones over a disk whose completions are shuffled. */
static void test_bits__same_from_pools_of_three_sizes(void)
{
    struct winnow_model_shape shape = sim_shape(N_LAYERS, 2, 2, 256, WINNOW_FP32);
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
        struct sim_options options = {.seed = test_seed(), .host_pool_bytes = 64 << 20};
        outcome_of(&options, &shape, policies[i], &calm);
        CHECK_EQ(calm.n_disk, 0);
        for (uint64_t pool_mib = 16; pool_mib <= 18; pool_mib += 2) {
            options = shuffling(pool_mib, test_seed() + pool_mib);
            outcome_of(&options, &shape, policies[i], &other);
            CHECK(other.n_disk > 0);
            same_check(&calm, &other);
        }
    }
}

/* The builder is late by chance: who needs its span waits, and nobody else's bits change. */
static void test_bits__same_with_a_late_builder(void)
{
    struct winnow_model_shape shape = sim_shape(N_LAYERS, 2, 2, 256, WINNOW_FP32);
    struct sim_options options = {.seed = test_seed(), .host_pool_bytes = 64 << 20};
    outcome_of(&options, &shape, WINNOW_POLICY_CODES, &calm);
    for (uint64_t seed = test_seed(); seed < test_seed() + 4; seed++) {
        options = shuffling(16, seed);
        options.lazy = 1; /* the worker alone builds, and comes when it comes */
        options.builds_lazy = 0.98;
        outcome_of(&options, &shape, WINNOW_POLICY_CODES, &other);
        same_check(&calm, &other);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_bits__same_from_pools_of_three_sizes);
    TEST_RUN(test_bits__same_with_a_late_builder);
    return TEST_END();
}
