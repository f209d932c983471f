/* The same calls give the same bits, whatever the pool holds, however the disk is read, on however
 * many threads. */
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>

enum { N_TOKENS = 5000, N_STEPS = 30 };

struct result {
    uint64_t windows, steps;
    winnow_stats stats;
};

static struct result run(const char *io_method, const char *pool, const char *n_threads)
{
    const char *const args[] = {
        "--io-method", io_method, "--host-pool",      pool,  "--threads",      n_threads,
        "--disk-cap",  "512MiB",  "--segment-tokens", "512", "--index-memory", "48MiB",
        NULL};
    struct daemon daemon;
    struct engine engine;
    struct result result = {.stats = WINNOW_STATS};
    winnow_model model = engine_model(3, 6, 3, 64, 64, WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP32);
    daemon_init(&daemon, args);
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, 3, N_TOKENS + N_STEPS, NULL);
    result.steps = engine_converse(&engine, N_TOKENS, N_STEPS);
    result.windows = engine.hash_windows;
    ENGINE_OK(winnow_stats_get(engine.client, NULL, &result.stats, 0));
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
    printf("%-8s pool %-6s threads %s: windows %016" PRIx64 " steps %016" PRIx64 "  host %" PRIu64
           " disk %" PRIu64 " blocks\n",
           io_method, pool, n_threads, result.windows, result.steps, result.stats.blocks_host,
           result.stats.blocks_disk);
    return result;
}

static void test_same_bits__whatever_the_means(void)
{
    static const char *const variants[][3] = {
        {"auto", "16MiB", "2"},  {"pread", "16MiB", "1"}, {"auto", "64MiB", "1"},
        {"pread", "64MiB", "2"}, {"auto", "1GiB", "2"},
    };
    struct result first = run(variants[0][0], variants[0][1], variants[0][2]);
    CHECK(first.stats.blocks_disk > 0); /* else the pool made no difference */
    for (uint32_t i = 1; i < sizeof variants / sizeof *variants; i++) {
        struct result other = run(variants[i][0], variants[i][1], variants[i][2]);
        CHECK_EQ(other.windows, first.windows);
        CHECK_EQ(other.steps, first.steps);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_same_bits__whatever_the_means);
    return TEST_END();
}
