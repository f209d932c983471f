// The plan's arithmetic: defaults, scaling, sums, and what does not fit.
#include <test.h>

#include <core/core.h>
#include <daemon/inflight.h>
#include <daemon/limits.h>

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)

static struct winnow_complaints complaints;
static struct winnow_origins origins;
static struct winnow_limits limits;

static const struct winnow_machine machine = {
    .memory_available_bytes = 16 * GIB,
    .cgroup_bytes = UINT64_MAX,
    .disk_bytes = 1000 * GIB,
    .disk_free_bytes = 500 * GIB,
    .n_cpus = 6,
};

static void plan(const struct winnow_config *config, const struct winnow_machine *on)
{
    memset(&complaints, 0, sizeof complaints);
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++)
        strcpy(origins.text[i], "default");
    winnow_limits_plan(config, &origins, on, &limits, &complaints);
}

/* Without a config: a quarter of memory, half of it for the index, a tenth of the disk. */
static void test_limits__defaults(void)
{
    struct winnow_config config = {.n_sessions_max = 4096};
    plan(&config, &machine);
    CHECK_EQ(limits.host_pool_bytes, 4 * GIB);
    CHECK_EQ(limits.index_memory_bytes, 2 * GIB);
    CHECK_EQ(limits.disk_cap_bytes, 100 * GIB);
    CHECK_EQ(limits.n_threads, 6);
    CHECK_EQ(limits.segment_tokens, 1024);
    CHECK_EQ(limits.in_flight_bytes, 64 * MIB);
    CHECK_EQ(complaints.n, 0);

    struct winnow_machine small = machine;
    small.memory_available_bytes = 128 * MIB;
    small.disk_free_bytes = 20 * GIB;
    plan(&config, &small);
    CHECK_EQ(limits.host_pool_bytes, 64 * MIB);
    CHECK_EQ(limits.index_memory_bytes, 48 * MIB);
    CHECK_EQ(limits.disk_cap_bytes, 10 * GIB);

    struct winnow_machine large = machine;
    large.memory_available_bytes = 1024 * GIB;
    large.disk_bytes = large.disk_free_bytes = 100 * 1024 * GIB;
    plan(&config, &large);
    CHECK_EQ(limits.host_pool_bytes, 32 * GIB);
    CHECK_EQ(limits.disk_cap_bytes, 256 * GIB);
}

/* A small pool makes a small daemon: all that is beside the caps scales with it. */
static void test_limits__small_pool_is_small(void)
{
    struct winnow_config config = {
        .host_pool_bytes = 32 * MIB,
        .index_memory_bytes = 32 * MIB,
        .disk_cap_bytes = 512 * MIB,
        .n_sessions_max = 4096,
    };
    plan(&config, &machine);
    CHECK_EQ(limits.in_flight_bytes, 8 * MIB);
    CHECK_EQ(limits.segment_tokens, 512);
    CHECK(winnow_limits_sum_bytes(&limits) < 96 * MIB);
    uint64_t small_rpc_bytes = limits.rpc_bytes;
    config.host_pool_bytes = 4 * GIB;
    plan(&config, &machine);
    CHECK(limits.rpc_bytes > small_rpc_bytes);
    CHECK(limits.n_calls_max <= WINNOW_CORE_REQUESTS && limits.n_posted <= 16);
}

/* The sum is that of its parts and a tenth. */
static void test_limits__sum(void)
{
    struct winnow_limits parts = {
        .host_pool_bytes = 100,
        .index_memory_bytes = 200,
        .in_flight_bytes = 300,
        .core_bytes = 400,
        .io_bytes = 500,
        .rpc_bytes = 600,
        .process_bytes = 900,
    };
    CHECK_EQ(winnow_limits_sum_bytes(&parts), 3300);
}

/* The process's own share is what it has, and some more to run: it follows what it is linked to. */
static void test_limits__process_is_measured(void)
{
    enum { MORE_BYTES = 32 << 20 };
    struct winnow_limits before = {0}, after = {0};
    CHECK_EQ(winnow_limits_measure(&before), 0);
    CHECK(before.process_bytes > MIB);
    volatile uint8_t *more = malloc(MORE_BYTES);
    for (size_t i = 0; i < MORE_BYTES; i += 4096)
        more[i] = 1;
    CHECK_EQ(winnow_limits_measure(&after), 0);
    CHECK(after.process_bytes >= before.process_bytes + MORE_BYTES);
    CHECK(after.process_bytes < before.process_bytes + MORE_BYTES + 2 * MIB);
    free((void *)more);
}

/* What becomes resident with a GPU's core, beyond the pool that it pins, is in the sum; so is what
 * windows will pin. */
static void test_limits__gpu_is_measured(void)
{
    struct winnow_limits with = {.host_pool_bytes = 16 * MIB};
    CHECK_EQ(winnow_limits_measure(&with), 0);
    uint64_t sum = winnow_limits_sum_bytes(&with);
    size_t n_bytes = 80 * MIB;
    uint8_t *taken = malloc(n_bytes);
    CHECK(taken);
    memset(taken, 1, n_bytes);
    CHECK_EQ(winnow_limits_measure_gpu(&with, 3 * MIB), 0);
    CHECK_EQ(taken[n_bytes - 1], 1);
    CHECK(with.gpu_bytes > 63 * MIB && with.gpu_bytes < 71 * MIB);
    CHECK(winnow_limits_sum_bytes(&with) > sum + 60 * MIB);
    free(taken);
}

/* More than the machine has, or its cgroup allows, is refused with a pool that fits. */
static void test_limits__memory_that_is_not_there(void)
{
    struct winnow_config config = {.host_pool_bytes = 12 * GIB, .n_sessions_max = 4096};
    plan(&config, &machine);
    winnow_limits_check_sum(&limits, &origins, &machine, &complaints);
    CHECK_EQ(complaints.n, 1);
    char *hint = strstr(complaints.text, "hint: host_pool ");
    CHECK(hint && strstr(complaints.text, "this machine has 16 GiB"));
    hint += strlen("hint: host_pool ");
    hint[strcspn(hint, " ")] = 0;
    CHECK_EQ(winnow_size_parse(hint, &config.host_pool_bytes), 0);
    CHECK(config.host_pool_bytes > 8 * GIB);
    plan(&config, &machine);
    winnow_limits_check_sum(&limits, &origins, &machine, &complaints);
    CHECK_EQ(complaints.n, 0); /* the hint is one that works */

    struct winnow_machine caged = machine;
    caged.cgroup_bytes = 2 * GIB;
    winnow_limits_check_sum(&limits, &origins, &caged, &complaints);
    CHECK(strstr(complaints.text, "this cgroup allows 2 GiB"));
}

/* A disk_cap above what is free is refused with one that fits. */
static void test_limits__disk_that_is_not_there(void)
{
    struct winnow_config config = {.disk_cap_bytes = 1024 * GIB, .n_sessions_max = 1};
    plan(&config, &machine);
    CHECK_EQ(complaints.n, 1);
    CHECK(strstr(complaints.text, "disk_cap 1 TiB exceeds the 500 GiB free. from: default. hint: "
                                  "475GiB fits"));
}

/* The machine is looked at even when the data directory is yet to be made. */
static void test_limits__probe(void)
{
    struct winnow_machine here;
    winnow_machine_probe(&here, "/tmp/no/such/directory");
    CHECK(here.n_cpus > 0);
    CHECK(here.disk_bytes > 0 && here.disk_free_bytes <= here.disk_bytes);
    CHECK(here.memory_available_bytes > MIB && here.memory_available_bytes < UINT64_MAX);
    winnow_machine_probe(&here, "relative/not/there");
    CHECK(here.disk_bytes > 0);
}

/* In-flight ranges never overlap, and all of it comes back. */
static void test_limits__inflight_ranges(void)
{
    enum { UNIT = 64 << 10 };
    struct winnow_inflight *inflight;
    CHECK_EQ(winnow_inflight_create(8 * UNIT, &inflight), 0);
    uint8_t *a = winnow_inflight_take(inflight, 3 * UNIT);
    uint8_t *b = winnow_inflight_take(inflight, 2 * UNIT + 1);
    CHECK(a && b && b - a == 3 * UNIT);
    CHECK_EQ(winnow_inflight_used_bytes(inflight), 6 * UNIT);
    CHECK(!winnow_inflight_take(inflight, 3 * UNIT));
    uint8_t *c = winnow_inflight_take(inflight, 2 * UNIT);
    CHECK(c && c - b == 3 * UNIT);
    winnow_inflight_give(inflight, b, 2 * UNIT + 1);
    CHECK(!winnow_inflight_take(inflight, 4 * UNIT)); /* contiguous or not at all */
    CHECK(winnow_inflight_take(inflight, 3 * UNIT) == b);
    winnow_inflight_give(inflight, a, 3 * UNIT);
    winnow_inflight_give(inflight, b, 3 * UNIT);
    winnow_inflight_give(inflight, c, 2 * UNIT);
    CHECK_EQ(winnow_inflight_used_bytes(inflight), 0);
    CHECK(!winnow_inflight_take(inflight, 8 * UNIT + 1));
    CHECK(winnow_inflight_take(inflight, 8 * UNIT) == a);
    winnow_inflight_give(inflight, a, 8 * UNIT);
    winnow_inflight_destroy(inflight);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_limits__defaults);
    TEST_RUN(test_limits__small_pool_is_small);
    TEST_RUN(test_limits__sum);
    TEST_RUN(test_limits__process_is_measured);
    TEST_RUN(test_limits__gpu_is_measured);
    TEST_RUN(test_limits__memory_that_is_not_there);
    TEST_RUN(test_limits__disk_that_is_not_there);
    TEST_RUN(test_limits__probe);
    TEST_RUN(test_limits__inflight_ranges);
    return TEST_END();
}
