// The log of a daemon that runs: the hour's line, the disk's state, silence where nothing happens.
#include <test.h>

#include <base/clock.h>
#include <daemon/journal.h>
#include <errno.h>
#include <unistd.h>

static const int64_t hour_ns = 3600 * WINNOW_NS_PER_S;
static struct winnow_journal journal;

/* What is logged to stderr between begin and end. */
static int real_stderr, log_pipe[2];

static void log_begin(void)
{
    CHECK_EQ(pipe(log_pipe), 0);
    real_stderr = dup(2);
    dup2(log_pipe[1], 2);
    close(log_pipe[1]);
}

static const char *log_end(void)
{
    static char text[4096];
    dup2(real_stderr, 2);
    close(real_stderr);
    ssize_t n = read(log_pipe[0], text, sizeof text - 1);
    text[n > 0 ? n : 0] = 0;
    close(log_pipe[0]);
    return text;
}

/* One line an hour, over what was done in it; the next counts the hours in which nothing was. */
static void test_journal__hourly_line(void)
{
    struct winnow_core_stats stats = {.n_sessions = 14, .n_tokens_held = 1100000};
    char text[192];
    winnow_journal_init(&journal, 5);
    CHECK(!winnow_journal_hour_ends(&journal, hour_ns + 4));
    CHECK(winnow_journal_hour_ends(&journal, hour_ns + 5));
    CHECK(!winnow_journal_hour(&journal, &stats, text)); /* idle: silent */
    CHECK(!winnow_journal_hour_ends(&journal, 2 * hour_ns + 4));
    CHECK(winnow_journal_hour_ends(&journal, 2 * hour_ns + 5));
    stats.n_steps[2] = 1000;
    stats.n_blocks_total = 100000;
    stats.n_blocks_host = 3731;
    stats.n_blocks_disk = 369;
    stats.mass_sum_micro = 957000000;
    stats.n_mass = 1000;
    CHECK(winnow_journal_hour(&journal, &stats, text));
    CHECK_STR(text, "hours=2 sessions=14 tokens=1.1M read=4.1% mass=0.957 host_hit=91% refused=0");

    CHECK(winnow_journal_hour_ends(&journal, 3 * hour_ns + 5));
    stats.n_errors[EDQUOT] = 3; /* an hour of refusals alone; the blocks were the last one's */
    stats.n_tokens_held = 812;
    CHECK(winnow_journal_hour(&journal, &stats, text));
    CHECK_STR(text, "hours=1 sessions=14 tokens=812 read=0.0% mass=1.000 host_hit=0% refused=3");
}

/* A disk that stops answering, answers again, or takes no more writes is named, once each. */
static void test_journal__disk_changes_are_told_once(void)
{
    struct winnow_store_facts facts = {.timeouts = 12, .errors_io = 3};
    winnow_journal_init(&journal, 0);
    log_begin();
    winnow_journal_disk(&journal, &facts);
    facts.stuck = true;
    winnow_journal_disk(&journal, &facts);
    winnow_journal_disk(&journal, &facts);
    facts.stuck = false;
    winnow_journal_disk(&journal, &facts);
    facts.degraded = true;
    winnow_journal_disk(&journal, &facts);
    winnow_journal_disk(&journal, &facts);
    const char *text = log_end();
    const char *stuck = strstr(text, "warning disk_stuck disk=0 timeouts=12 ");
    const char *back = strstr(text, "notice disk_back disk=0 timeouts=12");
    const char *only = strstr(text, "error disk_readonly disk=0 errors=3 ");
    CHECK(stuck && back && only && stuck < back && back < only);
    uint32_t n_lines = 0;
    for (const char *at = text; *at; at++)
        n_lines += *at == '\n';
    CHECK_EQ(n_lines, 3);
}

/* Reads that take long are told by their p99 of the stretch, not by those before it. */
static void test_journal__slow_disk_is_told(void)
{
    struct winnow_latency reads = {0};
    winnow_journal_init(&journal, 0);
    log_begin();
    for (int i = 0; i < 1000; i++)
        winnow_latency_add(&reads, 9 * WINNOW_NS_PER_MS);
    winnow_journal_stretch(&journal, &reads, 10 * WINNOW_NS_PER_S);
    for (int i = 0; i < 200; i++)
        winnow_latency_add(&reads, 80 * WINNOW_NS_PER_MS);
    winnow_journal_stretch(&journal, &reads, 20 * WINNOW_NS_PER_S - 1); /* too early to say */
    const char *text = log_end();
    CHECK_STR(text, "");
    log_begin();
    winnow_journal_stretch(&journal, &reads, 20 * WINNOW_NS_PER_S);
    text = log_end();
    CHECK(strstr(text, "warning io_slow disk=0 p99_ms=81.9 reads=200"));
    CHECK_EQ(journal.last.took_ns, 10 * WINNOW_NS_PER_S);
}

/* Steps and tokens of the last ten seconds, not of those before. */
static void test_journal__pace_of_the_last_stretch(void)
{
    static const struct winnow_latency none;
    winnow_journal_init(&journal, 0);
    for (int i = 0; i < 300; i++)
        winnow_journal_step(&journal, (uint32_t)i % 3, WINNOW_NS_PER_MS);
    winnow_journal_stretch(&journal, &none, 10 * WINNOW_NS_PER_S);
    CHECK_NEAR(winnow_journal_tokens_per_s(&journal), 10, 1e-9);
    for (int i = 0; i < 60; i++)
        winnow_journal_step(&journal, (uint32_t)i % 3, 4 * WINNOW_NS_PER_MS);
    CHECK_NEAR(winnow_journal_tokens_per_s(&journal), 10, 1e-9); /* not over yet */
    winnow_journal_stretch(&journal, &none, 30 * WINNOW_NS_PER_S);
    CHECK_NEAR(winnow_journal_tokens_per_s(&journal), 1, 1e-9);
    CHECK(winnow_journal_step_ns(&journal, 0.01) >= 4 * WINNOW_NS_PER_MS);
    CHECK_EQ(winnow_journal_read_ns(&journal, 0.99), 0);
}

/* A quantile is right to a quarter of an octave, at every size, of an interval too. */
static void test_journal__quantiles(void)
{
    struct winnow_latency latency = {0}, before;
    CHECK_EQ(winnow_latency_quantile(&latency, NULL, 0.5), 0);
    for (int64_t ns = 1; ns < 30 * WINNOW_NS_PER_S; ns = ns * 3 / 2 + 1) {
        before = latency;
        winnow_latency_add(&latency, ns);
        int64_t is_ns = winnow_latency_quantile(&latency, &before, 0.5);
        CHECK(is_ns >= ns && is_ns <= (ns > WINNOW_NS_PER_US ? ns + ns / 4 : WINNOW_NS_PER_US));
    }
    winnow_latency_add(&latency, INT64_MAX); /* past the last bucket: in it */
    latency = (struct winnow_latency){0};
    for (int i = 0; i < 99; i++)
        winnow_latency_add(&latency, WINNOW_NS_PER_US);
    winnow_latency_add(&latency, WINNOW_NS_PER_S);
    CHECK_EQ(winnow_latency_quantile(&latency, NULL, 0.99), WINNOW_NS_PER_US);
    CHECK(winnow_latency_quantile(&latency, NULL, 0.995) >= WINNOW_NS_PER_S);
    CHECK_EQ(winnow_latency_count(&latency, NULL), 100);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_journal__hourly_line);
    TEST_RUN(test_journal__disk_changes_are_told_once);
    TEST_RUN(test_journal__slow_disk_is_told);
    TEST_RUN(test_journal__pace_of_the_last_stretch);
    TEST_RUN(test_journal__quantiles);
    return TEST_END();
}
