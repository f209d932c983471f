/* The breaker: a disk that answers nothing costs its readers one deadline, not each of them one,
 * and is tried now and then until it answers. */
#include "fixture.h"

#include <storage/breaker.h>

enum { N_BLOCKS = 64, N_ALONE = 12 };

static const int64_t second_ns = WINNOW_NS_PER_S;

/* Eight late operations within ten seconds open it; seven do not, nor eight over a longer time. */
static void test_breaker__opens_at_eight_in_ten_seconds(void)
{
    struct winnow_breaker breaker;
    winnow_breaker_init(&breaker);
    for (int64_t i = 0; i < 7; i++)
        CHECK(winnow_breaker_late(&breaker, second_ns, i * second_ns));
    CHECK(!winnow_breaker_is_open(&breaker) && winnow_breaker_lets(&breaker, 7 * second_ns));
    winnow_breaker_late(&breaker, second_ns, 10 * second_ns);
    CHECK(!winnow_breaker_is_open(&breaker));
    winnow_breaker_late(&breaker, second_ns, 11 * second_ns - 1);
    CHECK(winnow_breaker_is_open(&breaker) && !winnow_breaker_lets(&breaker, 11 * second_ns));
}

/* A caller's own short deadline says nothing about the disk. */
static void test_breaker__short_deadlines_do_not_count(void)
{
    struct winnow_breaker breaker;
    winnow_breaker_init(&breaker);
    for (int64_t i = 0; i < 100; i++)
        CHECK(!winnow_breaker_late(&breaker, 499 * WINNOW_NS_PER_MS, i));
    CHECK(!winnow_breaker_is_open(&breaker));
}

/* One operation goes after 1 s; unanswered, the wait doubles up to 30 s. */
static void test_breaker__probes_after_doubling_waits(void)
{
    static const int64_t wait_s[] = {1, 2, 4, 8, 16, 30, 30, 30};
    struct winnow_breaker breaker;
    int64_t now_ns = 0;
    winnow_breaker_init(&breaker);
    for (int i = 0; i < WINNOW_N_LATE_OPENS; i++)
        winnow_breaker_late(&breaker, second_ns, now_ns);
    for (size_t i = 0; i < sizeof wait_s / sizeof *wait_s; i++) {
        now_ns += wait_s[i] * second_ns;
        CHECK(!winnow_breaker_lets(&breaker, now_ns - 1));
        CHECK_EQ(winnow_breaker_next(&breaker), now_ns);
        CHECK(winnow_breaker_lets(&breaker, now_ns));
        CHECK(winnow_breaker_sent(&breaker, now_ns));
        CHECK(!winnow_breaker_lets(&breaker, now_ns));
        now_ns += second_ns; /* in which nothing comes */
        CHECK(!winnow_breaker_lets(&breaker, now_ns));
        winnow_breaker_answered(&breaker, now_ns); /* too late */
        CHECK(winnow_breaker_is_open(&breaker));
    }
}

/* An answer to the probe closes it, and what was counted before is forgotten. */
static void test_breaker__an_answer_closes(void)
{
    struct winnow_breaker breaker;
    winnow_breaker_init(&breaker);
    for (int i = 0; i < WINNOW_N_LATE_OPENS; i++)
        winnow_breaker_late(&breaker, second_ns, 0);
    CHECK(winnow_breaker_lets(&breaker, second_ns) && winnow_breaker_sent(&breaker, second_ns));
    winnow_breaker_answered(&breaker, second_ns + 1);
    CHECK(!winnow_breaker_is_open(&breaker));
    CHECK_EQ(winnow_breaker_next(&breaker), INT64_MIN);
    CHECK(winnow_breaker_lets(&breaker, second_ns + 2));
    CHECK(!winnow_breaker_sent(&breaker, second_ns + 2));
    for (int i = 0; i < WINNOW_N_LATE_OPENS - 1; i++)
        winnow_breaker_late(&breaker, second_ns, second_ns + 3);
    CHECK(!winnow_breaker_is_open(&breaker));
}

/* Asks for n blocks, no two of which merge, with a deadline `after_ns` from now. */
static void blocks_ask(struct fixture *fixture, struct winnow_stored *stored, uint32_t n,
                       uint32_t first_slot, int64_t after_ns)
{
    struct winnow_store_read read[N_BLOCKS];
    CHECK(2 * n <= N_BLOCKS);
    for (uint32_t i = 0; i < n; i++)
        read[i] = (struct winnow_store_read){
            .stored = stored, .block_idx = 2 * i, .data = slot(fixture, first_slot + i), .tag = i};
    CHECK_EQ(winnow_store_read(fixture->store, read, n, WINNOW_IO_DECODE,
                               winnow_sim_disk_now(fixture->disk) + after_ns),
             0);
}

static bool is_stuck(struct fixture *fixture)
{
    struct winnow_store_facts facts;
    winnow_store_facts(fixture->store, &facts);
    return facts.stuck;
}

static uint64_t n_reads(struct fixture *fixture)
{
    struct winnow_sim_counts counts;
    winnow_sim_disk_counts(fixture->disk, &counts);
    return counts.n_ops[WINNOW_IO_READ];
}

/* Writes a segment; its first readers wait for an answer in vain. */
static struct winnow_stored *stuck_begin(struct fixture *fixture, uint32_t *block_crc)
{
    static struct winnow_store_done done[N_DONES];
    fixture_init(fixture, test_seed());
    struct winnow_stored *stored = segment_write(fixture, 1, N_BLOCKS, block_crc);
    fixture_settle(fixture);
    winnow_sim_disk_fail(fixture->disk, WINNOW_IO_READ, 1, N_ALONE, WINNOW_SIM_STUCK);
    blocks_ask(fixture, stored, N_ALONE, N_BLOCKS, second_ns);
    CHECK_EQ(fixture_run(fixture, done, N_ALONE, WINNOW_NEVER_NS), N_ALONE);
    for (uint32_t i = 0; i < N_ALONE; i++)
        CHECK(done[i].result == -ETIMEDOUT && done[i].held);
    CHECK(is_stuck(fixture));
    return stored;
}

/* With the disk stuck a read ends at once: late, nothing held, nothing asked of the disk. */
static void test_breaker__reads_of_a_stuck_disk_end_at_once(void)
{
    static struct winnow_store_done done[N_DONES];
    uint32_t block_crc[N_BLOCKS];
    struct fixture fixture;
    struct winnow_stored *stored = stuck_begin(&fixture, block_crc);
    int64_t now_ns = winnow_sim_disk_now(fixture.disk);
    uint64_t n_asked = n_reads(&fixture);

    blocks_ask(&fixture, stored, N_ALONE, 2 * N_BLOCKS, 60 * second_ns);
    CHECK_EQ(fixture_run(&fixture, done, N_ALONE, now_ns), N_ALONE);
    for (uint32_t i = 0; i < N_ALONE; i++)
        CHECK(done[i].result == -ETIMEDOUT && !done[i].held && !done[i].disk_bytes);
    CHECK_EQ(n_reads(&fixture), n_asked);
    fixture_finish(&fixture);
}

/* Once the disk answers again, one read finds it out and all that follow are right. */
static void test_breaker__a_disk_that_answers_is_used_again(void)
{
    static struct winnow_store_done done[N_DONES];
    uint32_t block_crc[N_BLOCKS];
    struct fixture fixture;
    struct winnow_stored *stored = stuck_begin(&fixture, block_crc);
    winnow_sim_disk_release(fixture.disk); /* what was held comes back, as errors */
    CHECK_EQ(fixture_run(&fixture, done, N_ALONE, WINNOW_NEVER_NS), N_ALONE);
    CHECK(is_stuck(&fixture)); /* of those none was a probe */

    winnow_sim_disk_now_set(fixture.disk, winnow_sim_disk_now(fixture.disk) + second_ns);
    uint64_t n_asked = n_reads(&fixture);
    blocks_ask(&fixture, stored, N_ALONE, 2 * N_BLOCKS, second_ns);
    CHECK_EQ(fixture_run(&fixture, done, N_ALONE, WINNOW_NEVER_NS), N_ALONE);
    uint32_t n_right = 0;
    for (uint32_t i = 0; i < N_ALONE; i++)
        n_right += !done[i].result;
    CHECK_EQ(n_right, 1);
    CHECK_EQ(n_reads(&fixture), n_asked + 1);
    CHECK(!is_stuck(&fixture));

    segment_ask(&fixture, stored, N_BLOCKS, 2 * N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, N_BLOCKS, WINNOW_NEVER_NS), N_BLOCKS);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        CHECK_EQ(done[i].result, 0);
        CHECK(block_equal(slot(&fixture, 2 * N_BLOCKS + i), SLOT_BYTES, 1, i));
    }
    fixture_finish(&fixture);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_breaker__opens_at_eight_in_ten_seconds);
    TEST_RUN(test_breaker__short_deadlines_do_not_count);
    TEST_RUN(test_breaker__probes_after_doubling_waits);
    TEST_RUN(test_breaker__an_answer_closes);
    TEST_RUN(test_breaker__reads_of_a_stuck_disk_end_at_once);
    TEST_RUN(test_breaker__a_disk_that_answers_is_used_again);
    return TEST_END();
}
