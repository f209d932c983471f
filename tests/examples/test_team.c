#include <examples/smollm2/team.h>
#include <test.h>

enum { N_THREADS = 3, N_ROUNDS = 200, N_ITEMS = 1000 };

static struct team *team;
static uint32_t cells[N_THREADS], n_wrong, owners[N_ITEMS];

/* Each thread writes its cell, then checks that after the barrier it sees all the others'. */
static void exchange(void *arg, uint32_t thread_idx)
{
    (void)arg;
    for (uint32_t round = 1; round <= N_ROUNDS; round++) {
        cells[thread_idx] = round;
        team_barrier(team);
        for (uint32_t i = 0; i < N_THREADS; i++)
            if (cells[i] != round)
                __atomic_add_fetch(&n_wrong, 1, __ATOMIC_RELAXED);
        team_barrier(team);
    }
}

/* What was written before a barrier is seen after it, in every thread and every run. */
static void test_team__barriers_order_writes(void)
{
    CHECK_EQ(team_create(N_THREADS, &team), 0);
    for (int run = 0; run < 50; run++)
        team_run(team, exchange, NULL);
    CHECK_EQ(n_wrong, 0);
    team_destroy(team);
}

/* Shares cover every item once, whatever the grain. */
static void test_team__shares_cover_all(void)
{
    const uint32_t grains[] = {1, 7, 16, 2000};

    CHECK_EQ(team_create(N_THREADS, &team), 0);
    for (uint32_t g = 0; g < 4; g++) {
        memset(owners, 0, sizeof owners);
        for (uint32_t thread = 0; thread < N_THREADS; thread++) {
            uint32_t first, end;
            team_share(team, thread, N_ITEMS, grains[g], &first, &end);
            for (uint32_t i = first; i < end; i++)
                owners[i]++;
        }
        for (uint32_t i = 0; i < N_ITEMS; i++)
            CHECK_EQ(owners[i], 1);
    }
    team_destroy(team);
    team_destroy(NULL);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_team__barriers_order_writes);
    TEST_RUN(test_team__shares_cover_all);
    return TEST_END();
}
