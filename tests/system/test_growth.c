/* Hundreds of sessions come and go: all that the daemon counts is at its end what it was. */
#include <base/clock.h>
#include <errno.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <system/raw.h>
#include <test.h>

enum { N_WARM = 3, N_SESSIONS = 100, N_TOKENS = 700, SETTLE_MS = 5000 };

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};

/* A client, a session with a sealed segment, a step, a fork, a cut; some end without a close. */
static void live_once(const char *socket, uint64_t seed)
{
    winnow_model model = engine_model(2, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
    struct engine engine;
    winnow_session *fork;
    engine_open(&engine, socket, &model, seed, N_TOKENS + 1, NULL);
    for (uint32_t i = 0; i < 2; i++)
        ENGINE_OK(engine_window(&engine, N_TOKENS / 2, NULL));
    ENGINE_OK(engine_decode(&engine, &(struct engine_step){0}));
    ENGINE_OK(winnow_session_fork(engine.session, "fork", &fork, 0));
    ENGINE_OK(engine_truncate(&engine, 100));
    winnow_session_close(fork);
    if (seed % 2) { /* the end of its lease closes it */
        struct raw raw;
        Winnow__V1__ModelShape shape = raw_shape();
        raw_open(&raw, socket);
        CHECK_EQ(raw_open_session(&raw, &shape, NULL, "left").error, 0);
        raw_close(&raw);
    }
    engine_close(&engine);
}

struct counts {
    winnow_stats stats;
    uint64_t n_fds, n_threads, rss_bytes;
};

static struct counts counts_of(winnow_client *client, pid_t pid)
{
    struct counts counts = {.stats = WINNOW_STATS};
    ENGINE_OK(winnow_stats_get(client, NULL, &counts.stats, 0));
    counts.n_fds = proc_n_fds(pid);
    counts.n_threads = proc_number(pid, "status", "Threads:");
    counts.rss_bytes = proc_number(pid, "status", "VmRSS:") * 1024;
    return counts;
}

/* The ends of leases are seen a little later: asks until they are, or the time is up. */
static struct counts counts_settled(winnow_client *client, pid_t pid, uint64_t n_fds)
{
    int64_t give_up_ns = winnow_clock_now_ns() + SETTLE_MS * WINNOW_NS_PER_MS;
    for (;;) {
        struct counts counts = counts_of(client, pid);
        if ((!counts.stats.tokens_held && counts.n_fds <= n_fds) ||
            winnow_clock_now_ns() > give_up_ns)
            return counts;
    }
}

static void test_growth__counts_are_at_their_baseline(void)
{
    struct daemon daemon;
    winnow_client *client;
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    options.address = daemon.socket;
    ENGINE_OK(winnow_client_open(&options, &client));
    uint32_t n_fds = proc_n_fds(daemon.pid);
    for (uint64_t i = 0; i < N_WARM; i++)
        live_once(daemon.socket, test_seed() + i);
    struct counts before = counts_settled(client, daemon.pid, n_fds);
    for (uint64_t i = 0; i < N_SESSIONS; i++)
        live_once(daemon.socket, test_seed() + i);
    struct counts after = counts_settled(client, daemon.pid, n_fds);
    printf("%d sessions: %" PRIu64 " descriptors, %" PRIu64 " threads; RSS %.1f MiB, was %.1f\n",
           N_SESSIONS, after.n_fds, after.n_threads, (double)after.rss_bytes / (1 << 20),
           (double)before.rss_bytes / (1 << 20));
    CHECK(before.n_fds <= n_fds && after.n_fds <= n_fds);
    CHECK(after.n_threads < before.n_threads + N_SESSIONS / 10); /* gRPC keeps some of its own */
    CHECK_EQ(after.stats.tokens_held, 0);
    CHECK_EQ(after.stats.index_bytes, before.stats.index_bytes);
    CHECK_EQ(after.stats.disk_used_bytes, before.stats.disk_used_bytes);
    CHECK_EQ(after.stats.pool_free_bytes, before.stats.pool_free_bytes);
    CHECK_EQ(after.stats.pool_tail_bytes, before.stats.pool_tail_bytes);
    CHECK_EQ(after.stats.pool_staging_bytes, before.stats.pool_staging_bytes);
    TEST_ROW(F20, N_SESSIONS);
    winnow_client_close(client);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_growth__counts_are_at_their_baseline);
    return TEST_END();
}
