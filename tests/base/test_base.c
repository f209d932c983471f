#include <base/alloc.h>
#include <base/crc32c.h>
#include <base/pool.h>
#include <base/ring.h>
#include <base/rng.h>
#include <base/team.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <test.h>

/* Both versions give RFC 3720 B.4's sums, whatever the length, and continue over a cut. */
static void test_crc32c__hardware_equals_table_and_rfc(void)
{
    uint8_t data[8192];
    memset(data, 0, 32);
    CHECK_EQ(winnow_crc32c(0, data, 32), 0x8a9136aau);
    memset(data, 0xff, 32);
    CHECK_EQ(winnow_crc32c_table(0, data, 32), 0x62a8ab43u);
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)winnow_rng_next(&rng);
    for (int i = 0; i < 200; i++) {
        size_t n = winnow_rng_below(&rng, sizeof data), cut = winnow_rng_below(&rng, n + 1);
        uint32_t whole = winnow_crc32c(0, data, n);
        CHECK_EQ(whole, winnow_crc32c_table(0, data, n));
        CHECK_EQ(whole, winnow_crc32c(winnow_crc32c(0, data, cut), data + cut, n - cut));
    }
}

/* One seed gives one sequence; below() reaches every value and no other. */
static void test_rng__is_seeded_and_bounded(void)
{
    struct winnow_rng a, b;
    int seen[7] = {0};
    winnow_rng_init(&a, 42);
    winnow_rng_init(&b, 42);
    for (int i = 0; i < 1000; i++)
        CHECK_EQ(winnow_rng_next(&a), winnow_rng_next(&b));
    for (int i = 0; i < 1000; i++)
        seen[winnow_rng_below(&a, 7)]++;
    for (int i = 0; i < 7; i++)
        CHECK(seen[i] > 50);
}

/* A full ring refuses and keeps what it holds; an empty one says so; order is kept. */
static void test_ring__full_refuses_and_order_is_kept(void)
{
    struct winnow_ring *ring;
    uint64_t item;
    CHECK_EQ(winnow_ring_create(4, sizeof item, &ring), 0);
    CHECK_EQ(winnow_ring_take(ring, &item), 0);
    for (uint64_t round = 0; round < 10; round++) {
        for (uint64_t i = 0; i < 4; i++) {
            item = round * 10 + i;
            CHECK_EQ(winnow_ring_put(ring, &item), i == 0);
        }
        CHECK_EQ(winnow_ring_put(ring, &item), -EAGAIN);
        for (uint64_t i = 0; i < 4; i++) {
            CHECK_EQ(winnow_ring_take(ring, &item), 1);
            CHECK_EQ(item, round * 10 + i);
        }
        CHECK_EQ(winnow_ring_take(ring, &item), 0);
    }
    winnow_ring_destroy(ring);
}

enum { N_PRODUCERS = 3, N_EACH = 20000 };

static void *produce(void *arg)
{
    struct winnow_ring *ring = ((void **)arg)[0];
    uint64_t producer = (uint64_t)(uintptr_t)((void **)arg)[1];
    for (uint64_t i = 0; i < N_EACH; i++) {
        uint64_t item = producer << 32 | i;
        while (winnow_ring_put(ring, &item) < 0)
            sched_yield();
    }
    return NULL;
}

/* Many producers lose and double nothing, and each one's items stay in its order. */
static void test_ring__many_producers_lose_nothing(void)
{
    struct winnow_ring *ring;
    pthread_t thread[N_PRODUCERS];
    void *arg[N_PRODUCERS][2];
    uint64_t next[N_PRODUCERS] = {0}, item;
    CHECK_EQ(winnow_ring_create(64, sizeof item, &ring), 0);
    for (uint64_t p = 0; p < N_PRODUCERS; p++) {
        arg[p][0] = ring;
        arg[p][1] = (void *)(uintptr_t)p;
        CHECK_EQ(pthread_create(&thread[p], NULL, produce, arg[p]), 0);
    }
    for (uint64_t n = 0; n < N_PRODUCERS * N_EACH;) {
        if (!winnow_ring_take(ring, &item)) {
            sched_yield();
            continue;
        }
        CHECK_EQ((uint32_t)item, next[item >> 32]++);
        n++;
    }
    for (int p = 0; p < N_PRODUCERS; p++)
        pthread_join(thread[p], NULL);
    CHECK_EQ(winnow_ring_take(ring, &item), 0);
    winnow_ring_destroy(ring);
}

/* A handle of an earlier use of a slot finds nothing. */
static void test_pool__stale_handle_finds_nothing(void)
{
    struct winnow_pool *pool;
    CHECK_EQ(winnow_pool_create(2, 40, &pool), 0);
    void *a = winnow_pool_take(pool), *b = winnow_pool_take(pool);
    CHECK(a && b && a != b && !winnow_pool_take(pool));
    uint64_t handle = winnow_pool_handle(pool, a);
    CHECK(winnow_pool_find(pool, handle) == a);
    winnow_pool_give(pool, a);
    CHECK(!winnow_pool_find(pool, handle));
    CHECK(winnow_pool_take(pool) == a);
    CHECK(!winnow_pool_find(pool, handle));
    CHECK(!winnow_pool_find(pool, UINT64_C(1) << 32 | 77));
    CHECK_EQ(winnow_pool_used(pool), 2);
    winnow_pool_destroy(pool);
}

/* The n-th allocation fails, once or onwards, and nothing else does. */
static void test_alloc__nth_fails(void)
{
    winnow_alloc_fail_at(2, 0);
    void *a = winnow_alloc(1), *b = winnow_alloc(1), *c = winnow_alloc(1);
    CHECK(a && !b && c);
    winnow_alloc_free(a);
    winnow_alloc_free(c);
    winnow_alloc_fail_at(1, 1);
    CHECK(!winnow_alloc(1) && !winnow_alloc_array(1, 1));
    winnow_alloc_fail_at(0, 0);
    CHECK(!winnow_alloc_array(SIZE_MAX, 2));
    a = winnow_alloc(100);
    CHECK(a && (uintptr_t)a % 64 == 0);
    winnow_alloc_free(a);
}

struct counted {
    struct winnow_work work;
    _Atomic int *n_run;
    int order;
};

static int order_next;

static void counted_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct counted *item = (struct counted *)work;
    (void)worker_idx;
    item->order = order_next++;
    atomic_fetch_add(item->n_run, 1);
}

static void counted_run_anywhere(struct winnow_work *work, uint32_t worker_idx)
{
    CHECK(worker_idx <= 2);
    atomic_fetch_add(((struct counted *)work)->n_run, 1);
}

/* Without workers the owner runs everything, the decode lane first. */
static void test_team__lanes_run_in_order(void)
{
    struct winnow_team *team;
    _Atomic int n_run = 0;
    struct counted item[3] = {{{.run = counted_run, .lane = WINNOW_LANE_BUILD}, &n_run, 0},
                              {{.run = counted_run, .lane = WINNOW_LANE_EXACT}, &n_run, 0},
                              {{.run = counted_run, .lane = WINNOW_LANE_DECODE}, &n_run, 0}};
    CHECK_EQ(winnow_team_create(&(struct winnow_team_options){0}, &team), 0);
    for (int i = 0; i < 3; i++)
        winnow_team_submit(team, &item[i].work);
    CHECK(winnow_team_run_one(team, WINNOW_LANE_DECODE));
    CHECK(!winnow_team_run_one(team, WINNOW_LANE_DECODE));
    while (winnow_team_run_one(team, WINNOW_LANE_BUILD))
        ;
    CHECK(item[2].order < item[1].order && item[1].order < item[0].order);
    for (int i = 0; i < 3; i++)
        CHECK(winnow_team_poll(team) == &item[2 - i].work);
    CHECK(!winnow_team_poll(team));
    winnow_team_destroy(team);
}

static uint32_t pick_told(void *arg, uint32_t n)
{
    uint32_t *place = arg;
    return *place < n ? *place : n;
}

/* A pick takes the item it names, of the lanes that are asked for, or none. */
static void test_team__pick_chooses_one_or_none(void)
{
    struct winnow_team *team;
    _Atomic int n_run = 0;
    uint32_t place = 1;
    struct counted item[3] = {{{.run = counted_run, .lane = WINNOW_LANE_BUILD}, &n_run, 0},
                              {{.run = counted_run, .lane = WINNOW_LANE_EXACT}, &n_run, 0},
                              {{.run = counted_run, .lane = WINNOW_LANE_EXACT}, &n_run, 0}};
    CHECK_EQ(winnow_team_create(&(struct winnow_team_options){0}, &team), 0);
    winnow_team_set_pick(team, pick_told, &place);
    for (int i = 0; i < 3; i++)
        winnow_team_submit(team, &item[i].work);
    CHECK(winnow_team_run_one(team, WINNOW_LANE_BUILD));
    CHECK(winnow_team_poll(team) == &item[2].work);
    CHECK(!winnow_team_run_one(team, WINNOW_LANE_EXACT)); /* one is left there, place 1 is none */
    CHECK(winnow_team_run_one(team, WINNOW_LANE_BUILD));
    CHECK(winnow_team_poll(team) == &item[0].work);
    place = 0;
    CHECK(winnow_team_run_one(team, WINNOW_LANE_BUILD));
    CHECK(winnow_team_poll(team) == &item[1].work);
    winnow_team_destroy(team);
}

/* Every item is run once and comes back once, hot or not. */
static void test_team__workers_run_each_item_once(void)
{
    enum { N_ITEMS = 2000 };
    static struct counted item[N_ITEMS];
    struct winnow_team *team;
    _Atomic int n_run = 0;
    struct winnow_team_options options = {.n_workers = 2, .spin_us = 20};
    CHECK_EQ(winnow_team_create(&options, &team), 0);
    for (int round = 0; round < 2; round++) {
        int n_back = 0;
        winnow_team_hot(team, round);
        for (int i = 0; i < N_ITEMS; i++) {
            item[i] = (struct counted){
                {.run = counted_run_anywhere, .lane = (uint32_t)i % WINNOW_N_LANES}, &n_run, 0};
            winnow_team_submit(team, &item[i].work);
        }
        while (n_back < N_ITEMS) {
            bool ran = winnow_team_run_one(team, WINNOW_LANE_BUILD);
            while (winnow_team_poll(team))
                n_back++;
            if (!ran)
                sched_yield();
        }
        CHECK_EQ(n_run, (round + 1) * N_ITEMS);
    }
    winnow_team_destroy(team);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_crc32c__hardware_equals_table_and_rfc);
    TEST_RUN(test_rng__is_seeded_and_bounded);
    TEST_RUN(test_ring__full_refuses_and_order_is_kept);
    TEST_RUN(test_ring__many_producers_lose_nothing);
    TEST_RUN(test_pool__stale_handle_finds_nothing);
    TEST_RUN(test_alloc__nth_fails);
    TEST_RUN(test_team__lanes_run_in_order);
    TEST_RUN(test_team__pick_chooses_one_or_none);
    TEST_RUN(test_team__workers_run_each_item_once);
    return TEST_END();
}
