/* The store with its threads, over real files: every method gives the same bytes, sleeps when
 * there is nothing to do, and counts what the kernel counts. */
#include "fixture.h"

#include <fcntl.h>
#include <poll.h>
#include <storage/inside.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_BLOCKS = 512, BLOCK_BYTES = 8192 };

struct real {
    char dir[64];
    int notify_fd;
    uint8_t *arena;
    struct winnow_store *store;
};

static void notify(void *arg)
{
    struct real *real = arg;
    uint64_t one = 1;
    CHECK_EQ(write(real->notify_fd, &one, sizeof one), sizeof one);
}

static struct winnow_store_options real_options(struct real *real, const char *io_method)
{
    return (struct winnow_store_options){.dir = real->dir,
                                         .disk_cap_bytes = 64 << 20,
                                         .data_file_bytes = 8 << 20,
                                         .io_method = io_method,
                                         .arena = real->arena,
                                         .arena_bytes = (size_t)N_BLOCKS * BLOCK_BYTES,
                                         .n_requests_max = 2048,
                                         .n_segments_max = 16,
                                         .notify = notify,
                                         .notify_arg = real,
                                         .seed = 11};
}

static void real_init(struct real *real)
{
    *real = (struct real){.notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    const char *base = getenv("WINNOW_TEST_DIR");
    snprintf(real->dir, sizeof real->dir, "%s/winnow-store-XXXXXX", base ? base : "/var/tmp");
    CHECK(mkdtemp(real->dir));
    real->arena = winnow_alloc_map((size_t)N_BLOCKS * BLOCK_BYTES);
    CHECK(real->arena && real->notify_fd >= 0);
}

static void real_finish(struct real *real)
{
    char command[128];
    CHECK_EQ(winnow_store_close(real->store), 0);
    winnow_alloc_unmap(real->arena, (size_t)N_BLOCKS * BLOCK_BYTES);
    close(real->notify_fd);
    snprintf(command, sizeof command, "rm -r '%s'", real->dir);
    CHECK_EQ(system(command), 0);
}

static void real_open(struct real *real, const char *io_method)
{
    char text[256];
    struct winnow_store_options options = real_options(real, io_method);
    if (winnow_store_open(&options, &real->store, text) < 0)
        test_fail(__FILE__, __LINE__, text);
    CHECK_EQ(winnow_store_start(real->store), 0);
}

/* Waits for n completions, all of them good; returns their disk bytes. */
static uint64_t real_wait(struct real *real, uint32_t n)
{
    uint64_t disk_bytes = 0;
    while (n) {
        struct winnow_store_done done[64];
        uint32_t n_done = winnow_store_poll(real->store, done, n < 64 ? n : 64);
        for (uint32_t i = 0; i < n_done; i++) {
            CHECK_EQ(done[i].result, 0);
            disk_bytes += done[i].disk_bytes;
        }
        n -= n_done;
        if (n && !n_done) {
            uint64_t count;
            struct pollfd ready = {.fd = real->notify_fd, .events = POLLIN};
            CHECK_EQ(poll(&ready, 1, 10000), 1);
            CHECK_EQ(read(real->notify_fd, &count, sizeof count), sizeof count);
        }
    }
    return disk_bytes;
}

static struct winnow_stored *real_write(struct real *real, uint32_t *block_crc)
{
    struct winnow_stored *stored;
    CHECK_EQ(winnow_store_segment_create(real->store, 1, N_BLOCKS, BLOCK_BYTES, block_crc, &stored),
             0);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        block_fill(real->arena + (size_t)i * BLOCK_BYTES, BLOCK_BYTES, 5, i);
    CHECK_EQ(winnow_store_write(real->store, stored, 0, N_BLOCKS, real->arena, 9), 0);
    CHECK_EQ(real_wait(real, 1), N_BLOCKS * BLOCK_BYTES);
    return stored;
}

/* Every second block into every second slot, then all of them: few and many adjacent ones. */
static uint64_t real_read_check(struct real *real, struct winnow_stored *stored)
{
    static struct winnow_store_read read[N_BLOCKS];
    uint64_t disk_bytes = 0;
    for (uint32_t step = 2; step > 0; step--) {
        uint32_t n = 0;
        memset(real->arena, 0, (size_t)N_BLOCKS * BLOCK_BYTES);
        for (uint32_t i = 0; i < N_BLOCKS; i += step)
            read[n++] = (struct winnow_store_read){.stored = stored,
                                                   .block_idx = i,
                                                   .data = real->arena + (size_t)i * BLOCK_BYTES,
                                                   .tag = i};
        CHECK_EQ(winnow_store_read(real->store, read, n, WINNOW_IO_DECODE,
                                   winnow_clock_now_ns() + 10 * WINNOW_NS_PER_S),
                 0);
        disk_bytes += real_wait(real, n);
        for (uint32_t i = 0; i < N_BLOCKS; i += step)
            CHECK(block_equal(real->arena + (size_t)i * BLOCK_BYTES, BLOCK_BYTES, 5, i));
    }
    return disk_bytes;
}

static void method_round_trip(const char *io_method)
{
    struct real real;
    static uint32_t block_crc[N_BLOCKS];
    real_init(&real);
    real_open(&real, io_method);
    struct winnow_store_facts facts;
    winnow_store_facts(real.store, &facts);
    CHECK_STR(facts.io.method, io_method);
    struct winnow_stored *stored = real_write(&real, block_crc);
    CHECK_EQ(real_read_check(&real, stored), (N_BLOCKS + N_BLOCKS / 2) * BLOCK_BYTES);
    winnow_store_facts(real.store, &facts);
    printf("# %s: %s, direct %d, window %u, at most %u in flight; %s\n", io_method, facts.io.flags,
           facts.io.direct, facts.window, facts.in_flight_max, facts.io.remedy);
    real_finish(&real);
}

/* io_uring gives back what was written, from many small reads and few large ones. */
static void test_store_real__io_uring_round_trip(void)
{
    method_round_trip("io_uring");
}

/* The pread pool gives the same. */
static void test_store_real__pread_round_trip(void)
{
    method_round_trip("pread");
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_store_real__io_uring_round_trip);
    TEST_RUN(test_store_real__pread_round_trip);
    return TEST_END();
}
