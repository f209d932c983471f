/* Random runs: the bits of an undisturbed core, or a reason; and at the end nothing is left. */
#include "run.h"

static struct sim_swarm swarm, all;
static uint64_t n_faults;

static void counts_add(void)
{
    const struct sim_swarm_counts *one = &swarm.counts;
    struct sim_swarm_counts *sum = &all.counts;
    sum->n_calls += one->n_calls;
    sum->n_equal += one->n_equal;
    sum->n_oracle += one->n_oracle;
    sum->n_disk_blocks += one->n_disk_blocks;
    sum->n_forks += one->n_forks;
    sum->n_rot += one->n_rot;
    n_faults += sim_faults_met(&swarm);
    for (int i = 0; i < 134; i++)
        sum->n_failed[i] += one->n_failed[i];
    for (int i = 0; i < 5; i++)
        sum->n_verdict[i] += one->n_verdict[i];
}

static void counts_print(void)
{
    const struct sim_swarm_counts *sum = &all.counts;
    printf("   %" PRIu64 " calls, %" PRIu64 " equal, %" PRIu64 " against dense; exact %" PRIu64
           " met %" PRIu64 " short %" PRIu64 " degraded %" PRIu64 "; %" PRIu64
           " blocks from disk, %" PRIu64 " faults, %" PRIu64 " rotten places, %" PRIu64
           " forks\n   refused:",
           sum->n_calls, sum->n_equal, sum->n_oracle, sum->n_verdict[WINNOW_VERDICT_EXACT],
           sum->n_verdict[WINNOW_VERDICT_MET], sum->n_verdict[WINNOW_VERDICT_SHORT],
           sum->n_verdict[WINNOW_VERDICT_DEGRADED], sum->n_disk_blocks, n_faults, sum->n_rot,
           sum->n_forks);
    for (int i = 0; i < 134; i++)
        if (sum->n_failed[i])
            printf(" %s %" PRIu64, strerrorname_np(i), sum->n_failed[i]);
    printf("\n");
}

/* WINNOW_SIM_RUNS makes a long test of it. The seed that a failure prints is the run's own. */
static void runs(uint32_t n_runs, uint64_t n_calls, enum sim_manner manner)
{
    const char *from_env = getenv("WINNOW_SIM_RUNS");
    uint64_t first = test_seed();
    all.counts = (struct sim_swarm_counts){0};
    n_faults = 0;
    for (uint32_t i = 0; i < (from_env ? (uint32_t)atoi(from_env) : n_runs); i++) {
        sim_swarm_init(&swarm, test_seed(), manner);
        sim_swarm_run(&swarm, n_calls);
        counts_add();
        sim_swarm_finish(&swarm);
        test_seed_value++;
    }
    test_seed_value = first;
    counts_print();
}

/* Sessions of several shapes do all that engines do, with little memory, on a disk that fails. */
static void test_swarm__same_bits_or_a_reason(void)
{
    runs(20, 2000, SIM_AT_LEISURE);
}

/* Every few reads meet a fault, of every kind. */
static void test_swarm__storm_of_faults(void)
{
    runs(14, 2000, SIM_STORM);
    CHECK(n_faults > 5000);
    TEST_ROW(F5, n_faults);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_swarm__same_bits_or_a_reason);
    TEST_RUN(test_swarm__storm_of_faults);
    return TEST_END();
}
