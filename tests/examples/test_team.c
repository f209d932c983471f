#include <examples/smollm2/team.h>
#include <test.h>

enum { N_THREADS = 3, N_ITEMS = 1000, N_RUNS = 2000 };

static uint32_t counts[N_ITEMS], by_thread[N_THREADS];
static uint64_t sum;

static void count_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    CHECK(arg == counts && item_idx < N_ITEMS && thread_idx < N_THREADS);
    counts[item_idx]++; /* plain: no item has two takers */
    __atomic_add_fetch(&by_thread[thread_idx], 1, __ATOMIC_RELAXED);
}

/* Every item of a run is done exactly once, and done when the run returns. */
static void test_team__each_item_once(void)
{
    struct team *team;

    CHECK_EQ(team_create(N_THREADS, &team), 0);
    CHECK_EQ(team_n_threads(team), N_THREADS);
    for (uint32_t run = 0; run < 50; run++) {
        memset(counts, 0, sizeof counts);
        team_run(team, count_item, counts, N_ITEMS);
        for (uint32_t i = 0; i < N_ITEMS; i++)
            CHECK_EQ(counts[i], 1);
        if (run % 3 == 0)
            team_rest(team);
    }
    team_destroy(team);
}

static void add_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    (void)thread_idx;
    __atomic_add_fetch(&sum, *(const uint64_t *)arg * (item_idx + 1), __ATOMIC_RELAXED);
}

/* Short runs in close succession, resting in between or not: no item meets another run's arg. */
static void test_team__runs_do_not_mix(void)
{
    struct team *team;
    uint64_t expected = 0;

    sum = 0;
    CHECK_EQ(team_create(N_THREADS, &team), 0);
    for (uint64_t run = 0; run < N_RUNS; run++) {
        const uint32_t n_items = (uint32_t)(run % 7);
        uint64_t factor = run;
        team_run(team, add_item, &factor, n_items);
        expected += run * n_items * (n_items + 1) / 2;
        if (run % 5 == 0)
            team_rest(team);
    }
    CHECK_EQ(sum, expected);
    team_destroy(team);
}

/* One thread needs no other, and a team that never ran ends. */
static void test_team__alone_and_idle(void)
{
    struct team *team;

    memset(counts, 0, sizeof counts);
    memset(by_thread, 0, sizeof by_thread);
    CHECK_EQ(team_create(1, &team), 0);
    team_run(team, count_item, counts, N_ITEMS);
    CHECK_EQ(by_thread[0], N_ITEMS);
    team_destroy(team);
    CHECK_EQ(team_create(N_THREADS, &team), 0);
    team_destroy(team);
    team_destroy(NULL);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_team__each_item_once);
    TEST_RUN(test_team__runs_do_not_mix);
    TEST_RUN(test_team__alone_and_idle);
    return TEST_END();
}
