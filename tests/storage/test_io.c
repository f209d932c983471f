/* Each I/O method through the same cases, and the choice among them. */
#include "place.h"

#include <base/alloc.h>
#include <base/clock.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <storage/io_sim.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <test.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, N_OPS_MAX = 16, ARENA_BYTES = 1 << 20 };

struct rig {
    const struct winnow_io_method *method;
    char dir[64];
    struct winnow_sim_disk *disk;
    void *io;
    uint8_t *arena;
    struct winnow_io_facts facts;
    uint32_t file_idx;
};

static void dir_make(char dir[64])
{
    snprintf(dir, 64, "%s/winnow-io-XXXXXX", test_dir());
    CHECK(mkdtemp(dir));
}

static void dir_remove(const char *dir)
{
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", dir);
    CHECK_EQ(system(command), 0);
}

/* One file "00000000.dat" of 1 MiB, open. */
static void rig_init(struct rig *rig, const struct winnow_io_method *method)
{
    *rig = (struct rig){.method = method};
    struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
    CHECK_EQ(winnow_sim_disk_create(&shape, &rig->disk), 0);
    dir_make(rig->dir);
    rig->arena = winnow_alloc_map(ARENA_BYTES);
    struct winnow_io_open options = {.dir = rig->dir,
                                     .arena = rig->arena,
                                     .arena_bytes = ARENA_BYTES,
                                     .n_ops_max = N_OPS_MAX,
                                     .n_files_max = 4};
    CHECK_EQ(method->open(&options, rig->disk, &rig->io, &rig->facts), 0);
    uint64_t n_bytes;
    CHECK_EQ(method->file_open(rig->io, "00000000.dat", 1, &rig->file_idx, &n_bytes), 0);
    CHECK_EQ(n_bytes, 0);
    struct winnow_io_op op = {
        .kind = WINNOW_IO_ALLOCATE, .file_idx = rig->file_idx, .n_bytes = (1 << 20) / PAGE_BYTES};
    CHECK_EQ(winnow_io_run(method, rig->io, &op, WINNOW_NEVER_NS), 0);
}

static void rig_finish(struct rig *rig)
{
    CHECK_EQ(rig->method->close(rig->io), 0);
    winnow_sim_disk_destroy(rig->disk);
    winnow_alloc_unmap(rig->arena, ARENA_BYTES);
    dir_remove(rig->dir);
}

static const struct winnow_io_method *const methods[] = {&winnow_io_uring, &winnow_io_pread,
                                                         &winnow_io_sim};
enum { N_METHODS = 3 };
static uint32_t first_method; /* 1: io_uring is refused here */

static void page_fill(uint8_t *page, uint32_t value)
{
    for (uint32_t i = 0; i < PAGE_BYTES; i++)
        page[i] = (uint8_t)(value * 31 + i);
}

static bool page_equal(const uint8_t *page, uint32_t value)
{
    for (uint32_t i = 0; i < PAGE_BYTES; i++)
        if (page[i] != (uint8_t)(value * 31 + i))
            return false;
    return true;
}

/* Submits n ops and polls until all are done; every one must give n_bytes. */
static void ops_run(struct rig *rig, struct winnow_io_op *op, uint32_t n)
{
    CHECK_EQ(rig->method->submit(rig->io, op, n), n);
    CHECK_EQ(rig->method->close(rig->io), -EBUSY);
    uint64_t seen = 0;
    for (uint32_t n_done = 0; n_done < n;) {
        struct winnow_io_done done[4];
        uint32_t n_polled = rig->method->poll(rig->io, done, 4);
        for (uint32_t i = 0; i < n_polled; i++) {
            CHECK(done[i].tag < n && !(seen >> done[i].tag & 1));
            seen |= UINT64_C(1) << done[i].tag;
            CHECK_EQ(done[i].result, (int32_t)op[done[i].tag].n_bytes);
        }
        n_done += n_polled;
        if (n_done < n && !n_polled)
            CHECK_EQ(rig->method->wait(rig->io, rig->method->now(rig->io) + 5 * WINNOW_NS_PER_S),
                     0);
    }
}

/* What status prints of a method: words with one blank between them. */
static void test_io__flags_are_words(void)
{
    for (uint32_t i = first_method; i < N_METHODS; i++) {
        struct rig rig;
        rig_init(&rig, methods[i]);
        size_t n = strlen(rig.facts.flags);
        CHECK(!strstr(rig.facts.flags, "  "));
        CHECK(n == 0 || (rig.facts.flags[0] != ' ' && rig.facts.flags[n - 1] != ' '));
        CHECK(n > 0 || methods[i] == &winnow_io_sim);
        rig_finish(&rig);
    }
}

/* Sixteen pages written and read back, each to its own place; memory inside and outside the
 * registered arena. */
static void test_io__pages_round_trip(void)
{
    for (uint32_t m = first_method; m < N_METHODS; m++) {
        struct rig rig;
        struct winnow_io_op op[N_OPS_MAX];
        rig_init(&rig, methods[m]);
        uint8_t *outside = winnow_alloc_map(N_OPS_MAX * PAGE_BYTES);
        for (uint32_t i = 0; i < N_OPS_MAX; i++) {
            page_fill(rig.arena + i * PAGE_BYTES, i);
            op[i] = (struct winnow_io_op){.kind = WINNOW_IO_WRITE,
                                          .file_idx = rig.file_idx,
                                          .offset_bytes = (uint64_t)(N_OPS_MAX - i) * PAGE_BYTES,
                                          .data = rig.arena + i * PAGE_BYTES,
                                          .n_bytes = PAGE_BYTES,
                                          .tag = i};
        }
        ops_run(&rig, op, N_OPS_MAX);
        for (uint32_t i = 0; i < N_OPS_MAX; i++) {
            op[i].kind = WINNOW_IO_READ;
            op[i].data = i % 2 ? outside + i * PAGE_BYTES : rig.arena + (64 + i) * PAGE_BYTES;
        }
        ops_run(&rig, op, N_OPS_MAX);
        for (uint32_t i = 0; i < N_OPS_MAX; i++)
            CHECK(page_equal(op[i].data, i));
        struct winnow_io_op sync = {.kind = WINNOW_IO_SYNC, .file_idx = rig.file_idx};
        CHECK_EQ(winnow_io_run(rig.method, rig.io, &sync, WINNOW_NEVER_NS), 0);
        CHECK_EQ(rig.method->submit(rig.io, op, 0), 0);
        winnow_alloc_unmap(outside, N_OPS_MAX * PAGE_BYTES);
        rig_finish(&rig);
    }
}

/* One read fills several places, inside the registered arena and outside, in their order; past the
 * end of the file it is short. */
static void test_io__read_into_parts(void)
{
    for (uint32_t m = first_method; m < N_METHODS; m++) {
        struct rig rig;
        rig_init(&rig, methods[m]);
        uint8_t *outside = winnow_alloc_map(2 * PAGE_BYTES);
        struct iovec part[3] = {{rig.arena + 8 * PAGE_BYTES, PAGE_BYTES},
                                {outside, 2 * PAGE_BYTES},
                                {rig.arena + 6 * PAGE_BYTES, PAGE_BYTES}};
        for (uint32_t i = 0; i < 4; i++)
            page_fill(rig.arena + i * PAGE_BYTES, i);
        struct winnow_io_op op = {.kind = WINNOW_IO_WRITE,
                                  .file_idx = rig.file_idx,
                                  .offset_bytes = (1 << 20) - 4 * PAGE_BYTES,
                                  .data = rig.arena,
                                  .n_bytes = 4 * PAGE_BYTES};
        ops_run(&rig, &op, 1);
        op.kind = WINNOW_IO_READ;
        op.data = NULL;
        op.parts = part;
        op.n_parts = 3;
        ops_run(&rig, &op, 1);
        CHECK(page_equal(part[0].iov_base, 0) && page_equal(outside, 1));
        CHECK(page_equal(outside + PAGE_BYTES, 2) && page_equal(part[2].iov_base, 3));
        op.offset_bytes += 2 * PAGE_BYTES;
        CHECK_EQ(winnow_io_run(rig.method, rig.io, &op, WINNOW_NEVER_NS), 2 * PAGE_BYTES);
        CHECK(page_equal(part[0].iov_base, 2) && page_equal(outside, 3));
        winnow_alloc_unmap(outside, 2 * PAGE_BYTES);
        rig_finish(&rig);
    }
}

/* No more is taken than fits; what was refused can be submitted later. */
static void test_io__submit_takes_what_fits(void)
{
    for (uint32_t m = first_method; m < N_METHODS; m++) {
        struct rig rig;
        struct winnow_io_op op[N_OPS_MAX + 4];
        struct winnow_io_done done[N_OPS_MAX + 4];
        rig_init(&rig, methods[m]);
        for (uint32_t i = 0; i < N_OPS_MAX + 4; i++)
            op[i] = (struct winnow_io_op){.kind = WINNOW_IO_READ,
                                          .file_idx = rig.file_idx,
                                          .offset_bytes = (uint64_t)i * PAGE_BYTES,
                                          .data = rig.arena + i * PAGE_BYTES,
                                          .n_bytes = PAGE_BYTES,
                                          .tag = i};
        CHECK_EQ(rig.method->submit(rig.io, op, N_OPS_MAX + 4), N_OPS_MAX);
        uint32_t n_done = 0;
        while (n_done < N_OPS_MAX) {
            rig.method->wait(rig.io, WINNOW_NEVER_NS);
            n_done += rig.method->poll(rig.io, done, N_OPS_MAX);
        }
        CHECK_EQ(rig.method->submit(rig.io, op + N_OPS_MAX, 4), 4);
        for (n_done = 0; n_done < 4;) {
            rig.method->wait(rig.io, WINNOW_NEVER_NS);
            n_done += rig.method->poll(rig.io, done, N_OPS_MAX);
        }
        rig_finish(&rig);
    }
}

/* A read past the end of a file is short or empty, never filled up. */
static void test_io__read_past_the_end_is_short(void)
{
    for (uint32_t m = first_method; m < N_METHODS; m++) {
        struct rig rig;
        rig_init(&rig, methods[m]);
        struct winnow_io_op op = {.kind = WINNOW_IO_READ,
                                  .file_idx = rig.file_idx,
                                  .offset_bytes = (1 << 20) - PAGE_BYTES,
                                  .data = rig.arena,
                                  .n_bytes = 4 * PAGE_BYTES};
        CHECK_EQ(winnow_io_run(rig.method, rig.io, &op, WINNOW_NEVER_NS), PAGE_BYTES);
        op.offset_bytes = 2 << 20;
        CHECK_EQ(winnow_io_run(rig.method, rig.io, &op, WINNOW_NEVER_NS), 0);
        rig_finish(&rig);
    }
}

static void *waker(void *arg)
{
    struct rig *rig = arg;
    usleep(2000); /* most likely while the other sleeps; before it serves as well */
    rig->method->wake(rig->io);
    return NULL;
}

/* wake ends a wait, from another thread, once and again; without it the wait ends in time. */
static void test_io__wake_ends_a_wait(void)
{
    for (uint32_t m = first_method; m < 2; m++) {
        struct rig rig;
        struct winnow_io_done done;
        rig_init(&rig, methods[m]);
        for (uint32_t i = 0; i < 3; i++) {
            pthread_t thread;
            CHECK_EQ(pthread_create(&thread, NULL, waker, &rig), 0);
            CHECK_EQ(rig.method->wait(rig.io, winnow_clock_now_ns() + 10 * WINNOW_NS_PER_S), 0);
            pthread_join(thread, NULL);
            CHECK_EQ(rig.method->poll(rig.io, &done, 1), 0);
            int64_t begin_ns = winnow_clock_now_ns();
            CHECK_EQ(rig.method->wait(rig.io, begin_ns + WINNOW_NS_PER_MS), -ETIMEDOUT);
            CHECK(winnow_clock_now_ns() - begin_ns >= WINNOW_NS_PER_MS);
        }
        rig_finish(&rig);
    }
}

static void name_count(void *arg, const char *name)
{
    uint32_t *n_names = arg;
    CHECK(strcmp(name, ".") && strcmp(name, ".."));
    ++*n_names;
}

/* Names: listed, renamed, removed; no more files open at once than were asked for. */
static void test_io__names(void)
{
    for (uint32_t m = first_method; m < N_METHODS; m++) {
        struct rig rig;
        uint32_t file_idx[4], n_names = 0;
        uint64_t n_bytes;
        rig_init(&rig, methods[m]);
        const struct winnow_io_method *method = rig.method;
        CHECK_EQ(method->file_open(rig.io, "none", 0, &file_idx[0], &n_bytes), -ENOENT);
        CHECK_EQ(method->file_open(rig.io, "00000000.dat", 0, &file_idx[0], &n_bytes), 0);
        CHECK_EQ(n_bytes, 1 << 20);
        CHECK_EQ(method->file_open(rig.io, "a", 1, &file_idx[1], &n_bytes), 0);
        CHECK_EQ(method->file_open(rig.io, "b", 1, &file_idx[2], &n_bytes), 0);
        CHECK_EQ(method->file_open(rig.io, "c", 1, &file_idx[3], &n_bytes), -ENFILE);
        CHECK_EQ(method->file_close(rig.io, file_idx[2]), 0);
        CHECK_EQ(method->rename(rig.io, "a", "b"), 0);
        CHECK_EQ(method->dir_sync(rig.io), 0);
        CHECK_EQ(method->list(rig.io, name_count, &n_names), 0);
        CHECK_EQ(n_names, 2);
        CHECK_EQ(method->unlink(rig.io, "a"), -ENOENT);
        CHECK_EQ(method->unlink(rig.io, "b"), 0);
        rig_finish(&rig);
    }
}

/* Refuses one system call in this process, for good. */
static void syscall_refuse(uint32_t number)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    CHECK_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

/* Runs a body in a child, where a filter may be set, and passes its failure on. */
static void in_child(void (*body)(const char *dir))
{
    char dir[64];
    dir_make(dir);
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        CHECK_EQ(chmod(dir, 01777), 0); /* the child may be another user */
        body(dir);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    dir_remove(dir);
}

static void choose_without_uring(const char *dir)
{
    const struct winnow_io_method *method = NULL;
    bool refuse_direct;
    char remedy[160];
    syscall_refuse(SYS_io_uring_setup);
    CHECK_EQ(winnow_io_choose("auto", dir, &method, &refuse_direct, remedy), 0);
    CHECK_STR(method->name, "pread");
    CHECK(strstr(remedy, "io_uring refused (Operation not permitted)"));
    CHECK(strstr(remedy, "kernel.io_uring_disabled=0"));
    CHECK_EQ(winnow_io_choose("io_uring", dir, &method, &refuse_direct, remedy), -EINVAL);
}

/* Where a filter refuses io_uring the pread pool serves, and the facts say what to do. */
static void test_io__refused_uring_falls_back(void)
{
    in_child(choose_without_uring);
}

static void choose_without_pread(const char *dir)
{
    const struct winnow_io_method *method = NULL;
    bool refuse_direct;
    char remedy[160];
    syscall_refuse(SYS_pread64);
    CHECK_EQ(winnow_io_choose("auto", dir, &method, &refuse_direct, remedy), 0);
    CHECK_STR(method->name, "io_uring");
    CHECK_STR(remedy, "");
    CHECK_EQ(winnow_io_choose("pread", dir, &method, &refuse_direct, remedy), -EPERM);
}

/* io_uring reads without a read call, so a filter against pread does not touch it. */
static void test_io__uring_makes_no_pread(void)
{
    in_child(choose_without_pread);
}

/* As a user whose locked memory is limited: reads work, and the facts name the limit. */
static void open_with_little_memlock(const char *dir)
{
    struct rlimit limit = {.rlim_cur = 64 << 10, .rlim_max = 64 << 10};
    struct winnow_io_facts facts;
    struct winnow_io_open options = {.dir = dir,
                                     .arena = winnow_alloc_map(8 << 20),
                                     .arena_bytes = 8 << 20,
                                     .n_ops_max = 2,
                                     .n_files_max = 1};
    void *io;
    uint32_t file_idx;
    uint64_t n_bytes;
    CHECK_EQ(setrlimit(RLIMIT_MEMLOCK, &limit), 0);
    CHECK_EQ(setresuid(65534, 65534, 65534), 0);
    CHECK_EQ(winnow_io_uring.open(&options, NULL, &io, &facts), 0);
    CHECK(strstr(facts.remedy, "0 of 1 slices of memory registered") &&
          strstr(facts.remedy, "LimitMEMLOCK"));
    CHECK(!strstr(facts.flags, "fixed_buffers"));
    CHECK_EQ(winnow_io_uring.file_open(io, "00000000.dat", 1, &file_idx, &n_bytes), 0);
    struct winnow_io_op op = {.kind = WINNOW_IO_WRITE,
                              .file_idx = file_idx,
                              .data = options.arena,
                              .n_bytes = PAGE_BYTES};
    CHECK_EQ(winnow_io_run(&winnow_io_uring, io, &op, WINNOW_NEVER_NS), PAGE_BYTES);
    op.kind = WINNOW_IO_READ;
    CHECK_EQ(winnow_io_run(&winnow_io_uring, io, &op, WINNOW_NEVER_NS), PAGE_BYTES);
    CHECK_EQ(winnow_io_uring.close(io), 0);
}

static void test_io__little_memlock_is_told(void)
{
    in_child(open_with_little_memlock);
}

/* In memory there is no disk to wait for: the pool, and no warning about direct I/O. */
static void test_io__tmpfs_takes_the_pool(void)
{
    const struct winnow_io_method *method = NULL;
    bool refuse_direct;
    char remedy[160];
    char dir[] = "/dev/shm/winnow-io-XXXXXX";
    if (!mkdtemp(dir))
        TEST_SKIP("no tmpfs at /dev/shm");
    CHECK_EQ(winnow_io_choose("auto", dir, &method, &refuse_direct, remedy), 0);
    CHECK_STR(method->name, "pread");
    CHECK_STR(remedy, "");
    CHECK_EQ(rmdir(dir), 0); /* the probe left nothing */
}

/* A name nobody knows, and a directory that is not there. */
static void test_io__bad_choices_are_refused(void)
{
    const struct winnow_io_method *method = NULL;
    bool refuse_direct;
    char remedy[160];
    CHECK_EQ(winnow_io_choose("aio", "/var/tmp", &method, &refuse_direct, remedy), -EINVAL);
    CHECK(strstr(remedy, "one of auto, io_uring, pread"));
    CHECK_EQ(winnow_io_choose("auto", "/nowhere", &method, &refuse_direct, remedy), -ENOENT);
    CHECK(!method);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    const struct winnow_io_method *method;
    bool refuse_direct;
    char remedy[160];
    first_method = winnow_io_choose("io_uring", test_dir(), &method, &refuse_direct, remedy) < 0;
    TEST_RUN(test_io__flags_are_words);
    TEST_RUN(test_io__pages_round_trip);
    TEST_RUN(test_io__read_into_parts);
    TEST_RUN(test_io__submit_takes_what_fits);
    TEST_RUN(test_io__read_past_the_end_is_short);
    TEST_RUN(test_io__wake_ends_a_wait);
    TEST_RUN(test_io__names);
    TEST_RUN(test_io__tmpfs_takes_the_pool);
    TEST_RUN(test_io__bad_choices_are_refused);
    if (first_method)
        TEST_SKIP(remedy);
    if (test_dir_is_tmpfs())
        TEST_SKIP("on tmpfs io_uring is not chosen");
    TEST_RUN(test_io__refused_uring_falls_back);
    TEST_RUN(test_io__uring_makes_no_pread);
    if (geteuid())
        TEST_SKIP("the memlock limit is tested by root, who may be another user");
    TEST_RUN(test_io__little_memlock_is_told);
    return TEST_END();
}
