/* Replay: a seed is all there is to know of a run. */
#include "run.h"

enum { N_SEEDS = 100, N_CALLS = 80 };

static struct sim_swarm swarm;

/* Who ran when, what the disk did, what requests answered. */
static uint64_t hash_of(uint64_t seed)
{
    struct winnow_sim_counts disk;
    sim_swarm_init(&swarm, seed, SIM_SMALL);
    sim_swarm_run(&swarm, N_CALLS);
    winnow_sim_disk_counts(swarm.world.disk, &disk);
    uint64_t hash = sim_mix(sim_mix(swarm.world.hash, disk.event_hash), swarm.hash);
    sim_swarm_finish(&swarm);
    return hash;
}

/* The same seed twice is the same run twice; another seed is another. */
static void test_replay__same_seed_same_events(void)
{
    uint64_t hash[N_SEEDS];
    for (uint32_t i = 0; i < N_SEEDS; i++, test_seed_value++) {
        hash[i] = hash_of(test_seed());
        CHECK_EQ(hash_of(test_seed()), hash[i]);
        for (uint32_t j = 0; j < i; j++)
            CHECK(hash[j] != hash[i]);
    }
    TEST_ROW(F30, N_SEEDS);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_replay__same_seed_same_events);
    return TEST_END();
}
