/* Faults of real calls: the n-th pread, pwrite, fallocate or fdatasync of a store's life fails in
 * every way, once or from then on. This program's own definitions of the four stand before libc's,
 * as a preloaded library's would. */
#include "fixture.h"
#include "place.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

enum { N_BLOCKS = 96, STRIDE = 8, LATE_US = 2000, FOR_EVER = 1 << 30 };
enum fault {
    FAULT_EIO,
    FAULT_ENOSPC,
    FAULT_EINTR,
    FAULT_EAGAIN,
    FAULT_SHORT,
    FAULT_LATE,
    N_FAULTS
};

static const char *const fault_name[] = {"EIO", "ENOSPC", "EINTR", "EAGAIN", "short", "late"};
static _Atomic int64_t n_before, n_fail; /* calls until the first that fails; calls that fail */
static _Atomic uint32_t n_failed;
static enum fault fault;

/* True when this call is to fail. */
static bool is_failing(void)
{
    if (atomic_fetch_sub(&n_before, 1) > 0 || atomic_fetch_sub(&n_fail, 1) <= 0)
        return false;
    n_failed++;
    if (fault == FAULT_LATE)
        usleep(LATE_US); /* a slow disk */
    return fault != FAULT_LATE;
}

static int fail(void)
{
    static const int error[] = {EIO, ENOSPC, EINTR, EAGAIN, EIO, EIO};
    errno = error[fault];
    return -1;
}

#define REAL(name) ((__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name))

ssize_t pread(int fd, void *data, size_t n_bytes, off_t offset)
{
    bool failing = is_failing();
    if (failing && fault != FAULT_SHORT)
        return fail();
    return REAL(pread)(fd, data, failing ? n_bytes / 1024 * 512 : n_bytes, offset);
}

ssize_t preadv(int fd, const struct iovec *part, int n_parts, off_t offset)
{
    bool failing = is_failing();
    if (failing && fault != FAULT_SHORT)
        return fail();
    return REAL(preadv)(fd, part, failing ? (n_parts + 1) / 2 : n_parts, offset);
}

ssize_t pwrite(int fd, const void *data, size_t n_bytes, off_t offset)
{
    bool failing = is_failing();
    if (failing && fault != FAULT_SHORT)
        return fail();
    return REAL(pwrite)(fd, data, failing ? n_bytes / 1024 * 512 : n_bytes, offset);
}

int fallocate(int fd, int mode, off_t offset, off_t n_bytes)
{
    return is_failing() ? fail() : REAL(fallocate)(fd, mode, offset, n_bytes);
}

int fdatasync(int fd)
{
    return is_failing() ? fail() : REAL(fdatasync)(fd);
}

struct life {
    char dir[64];
    int notify_fd;
    uint8_t *arena;
    struct winnow_store *store;
    uint32_t n_lost, n_read;
};

static void life_notify(void *arg)
{
    const struct life *life = arg;
    uint64_t one = 1;
    CHECK_EQ(write(life->notify_fd, &one, sizeof one), sizeof one);
}

/* False: the store did not open, with a word why. */
static bool life_open(struct life *life)
{
    char text[256] = "";
    struct winnow_store_options options = {.dir = life->dir,
                                           .disk_cap_bytes = 12 << 20,
                                           .data_file_bytes = 4 << 20,
                                           .io_method = "pread",
                                           .arena = life->arena,
                                           .arena_bytes = (size_t)2 * N_BLOCKS * SLOT_BYTES,
                                           .n_requests_max = 1024,
                                           .n_segments_max = 16,
                                           .notify = life_notify,
                                           .notify_arg = life,
                                           .seed = 11};
    int rc = winnow_store_open(&options, &life->store, text);
    if (rc < 0) {
        CHECK(n_failed > 0 && !life->store && text[0]);
        return false;
    }
    CHECK_EQ(winnow_store_start(life->store), 0);
    return true;
}

/* The next completion; sleeps until the store has notified. */
static struct winnow_store_done life_wait(struct life *life)
{
    struct winnow_store_done done;
    while (!winnow_store_poll(life->store, &done, 1)) {
        struct pollfd ready = {.fd = life->notify_fd, .events = POLLIN};
        uint64_t count;
        CHECK_EQ(poll(&ready, 1, 20000), 1);
        CHECK_EQ(read(life->notify_fd, &count, sizeof count), sizeof count);
    }
    return done;
}

static struct winnow_stored *life_write(struct life *life, uint32_t *block_crc)
{
    struct winnow_stored *stored;
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        block_fill(life->arena + (size_t)i * SLOT_BYTES, SLOT_BYTES, 5, i);
    int rc = winnow_store_segment_create(life->store, 1, N_BLOCKS, SLOT_BYTES, block_crc, &stored);
    if (rc < 0) { /* the first file is there once the store is open */
        CHECK(rc == -ENOSPC && n_failed > 0);
        return NULL;
    }
    rc = winnow_store_write(life->store, stored, 0, N_BLOCKS, life->arena, 9);
    if (rc == 0)
        rc = life_wait(life).result;
    CHECK(rc == 0 || (n_failed > 0 && (rc == -EIO || rc == -ENOSPC)));
    return rc == 0 ? stored : NULL;
}

/* One block in eight, then all: reads that stand alone and reads that merge. */
static void life_read(struct life *life, struct winnow_stored *stored)
{
    for (uint32_t stride = STRIDE; stride > 0; stride -= STRIDE - 1) {
        uint8_t *to = life->arena + (size_t)N_BLOCKS * SLOT_BYTES;
        static struct winnow_store_read read_of[N_BLOCKS];
        uint32_t n = 0;
        memset(to, 0xff, (size_t)N_BLOCKS * SLOT_BYTES);
        for (uint32_t i = 0; i < N_BLOCKS; i += stride)
            read_of[n++] = (struct winnow_store_read){
                .stored = stored, .block_idx = i, .data = to + i * SLOT_BYTES, .tag = i};
        CHECK_EQ(winnow_store_read(life->store, read_of, n, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
        for (life->n_read += n; n > 0; n--) {
            struct winnow_store_done done = life_wait(life);
            CHECK(done.result == 0 || done.result == -ENODATA);
            life->n_lost += done.result != 0;
            if (!done.result)
                CHECK(block_equal(to + done.tag * SLOT_BYTES, SLOT_BYTES, 5, done.tag));
        }
        if (stride == 1)
            return;
    }
}

/* A store's life in which n_times calls fail, from the nth on. False: it has fewer. */
static bool life_run(int64_t nth, int64_t n_times, enum fault of)
{
    static uint32_t block_crc[N_BLOCKS];
    struct life life = {.notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    char command[128];
    snprintf(life.dir, sizeof life.dir, "%s/winnow-fault-XXXXXX", test_dir());
    CHECK(mkdtemp(life.dir));
    life.arena = winnow_alloc_map((size_t)2 * N_BLOCKS * SLOT_BYTES);
    CHECK(life.arena && life.notify_fd >= 0);
    fault = of;
    n_failed = 0;
    n_fail = n_times;
    n_before = nth - 1;
    if (life_open(&life)) {
        struct winnow_stored *stored = life_write(&life, block_crc);
        if (stored)
            life_read(&life, stored);
        CHECK_EQ(winnow_store_close(life.store), 0);
        if (n_times == 1) /* one failure is made good */
            CHECK(life.n_lost == 0);
    }
    n_fail = 0;
    winnow_alloc_unmap(life.arena, (size_t)2 * N_BLOCKS * SLOT_BYTES);
    close(life.notify_fd);
    snprintf(command, sizeof command, "rm -r '%s'", life.dir);
    CHECK_EQ(system(command), 0);
    return n_failed > 0;
}

static void test_io_fault__any_call_fails_in_any_way(void)
{
    uint32_t n_lives = 0;
    for (int of = 0; of < N_FAULTS; of++) {
        uint32_t n_of = 0;
        for (int64_t nth = 1; life_run(nth, 1, (enum fault)of); nth++)
            n_of++;
        for (int64_t nth = 1; life_run(nth, FOR_EVER, (enum fault)of); nth += 2)
            n_of++;
        CHECK(n_of > 15);
        printf("   %s: %u\n", fault_name[of], n_of);
        n_lives += n_of;
    }
    CHECK(n_lives >= 200);
    TEST_ROW(F5, n_lives);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_io_fault__any_call_fails_in_any_way);
    return TEST_END();
}
