/* The store with its threads, over real files: every method gives the same bytes, sleeps when
 * there is nothing to do, and counts what the kernel counts. */
#include "fixture.h"
#include "place.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <storage/inside.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
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
    snprintf(real->dir, sizeof real->dir, "%s/winnow-store-XXXXXX", test_dir());
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

/* Sleeps until the store has notified. */
static void notify_wait(struct real *real)
{
    uint64_t count;
    struct pollfd ready = {.fd = real->notify_fd, .events = POLLIN};
    CHECK_EQ(poll(&ready, 1, 10000), 1);
    CHECK_EQ(read(real->notify_fd, &count, sizeof count), sizeof count);
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
        if (n && !n_done)
            notify_wait(real);
    }
    return disk_bytes;
}

static struct winnow_stored *real_write(struct real *real, uint32_t *block_crc)
{
    struct winnow_stored *stored;
    int rc;
    while ((rc = winnow_store_segment_create(real->store, 1, N_BLOCKS, BLOCK_BYTES, block_crc,
                                             &stored)) == -EAGAIN) {
        struct winnow_store_done none;
        CHECK_EQ(winnow_store_poll(real->store, &none, 1),
                 0); /* to the end: the file may be there */
        rc = winnow_store_segment_create(real->store, 1, N_BLOCKS, BLOCK_BYTES, block_crc, &stored);
        if (rc != -EAGAIN)
            break;
        notify_wait(real);
    }
    CHECK_EQ(rc, 0);
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

static void round_trip(struct real *real, const char *io_method)
{
    static uint32_t block_crc[N_BLOCKS];
    real_open(real, io_method);
    struct winnow_store_facts facts;
    winnow_store_facts(real->store, &facts);
    CHECK_STR(facts.io.method, io_method);
    struct winnow_stored *stored = real_write(real, block_crc);
    CHECK_EQ(real_read_check(real, stored), (N_BLOCKS + N_BLOCKS / 2) * BLOCK_BYTES);
    winnow_store_facts(real->store, &facts);
    printf("# %s: %s, direct %d, window %u, at most %u in flight; %s\n", io_method, facts.io.flags,
           facts.io.direct, facts.window, facts.in_flight_max, facts.io.remedy);
}

/* io_uring gives back what was written, from many small reads and few large ones. */
static void test_store_real__io_uring_round_trip(void)
{
    struct real real;
    real_init(&real);
    round_trip(&real, "io_uring");
    real_finish(&real);
}

/* The pread pool gives the same. */
static void test_store_real__pread_round_trip(void)
{
    struct real real;
    real_init(&real);
    round_trip(&real, "pread");
    real_finish(&real);
}

static uint64_t kernel_read_bytes(void)
{
    FILE *file = fopen("/proc/self/io", "r");
    char line[128];
    unsigned long long n_bytes = 0;
    CHECK(file);
    while (fgets(line, sizeof line, file))
        sscanf(line, "read_bytes: %llu", &n_bytes);
    fclose(file);
    return n_bytes;
}

static void method_accounts(const char *io_method)
{
    struct real real;
    static uint32_t block_crc[N_BLOCKS];
    real_init(&real);
    real_open(&real, io_method);
    struct winnow_stored *stored = real_write(&real, block_crc);
    struct winnow_store_facts facts;
    winnow_store_facts(real.store, &facts);
    uint64_t before = kernel_read_bytes();
    uint64_t disk_bytes = real_read_check(&real, stored);
    uint64_t kernel_bytes = kernel_read_bytes() - before;
    printf("# %s: %" PRIu64 " bytes told, %" PRIu64 " by the kernel\n", io_method, disk_bytes,
           kernel_bytes);
    if (facts.io.direct)
        CHECK_NEAR((double)disk_bytes, (double)kernel_bytes, 0.02 * (double)kernel_bytes);
    real_finish(&real);
}

/* The bytes that completions tell are those that the kernel accounts to the process. */
static void test_store_real__bytes_are_the_kernels(void)
{
    method_accounts("io_uring");
    method_accounts("pread");
}

/* Pages of all data files that the page cache holds. */
static uint64_t cached_pages(const struct real *real)
{
    char path[256];
    uint64_t n_cached = 0;
    snprintf(path, sizeof path, "%s/data", real->dir);
    DIR *dir = opendir(path);
    CHECK(dir);
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (entry->d_name[0] == '.')
            continue;
        static unsigned char resident[(8 << 20) / 4096];
        int fd = openat(dirfd(dir), entry->d_name, O_RDONLY);
        void *memory = mmap(NULL, 8 << 20, PROT_READ, MAP_SHARED, fd, 0);
        CHECK(fd >= 0 && memory != MAP_FAILED);
        CHECK_EQ(mincore(memory, 8 << 20, resident), 0);
        for (uint32_t i = 0; i < sizeof resident; i++)
            n_cached += resident[i] & 1;
        munmap(memory, 8 << 20);
        close(fd);
    }
    closedir(dir);
    return n_cached;
}

static bool direct_refused;

/* With O_DIRECT no block is kept a second time, in the page cache. */
static void test_store_real__blocks_bypass_the_page_cache(void)
{
    static const char *const method[] = {"io_uring", "pread"};
    for (uint32_t i = 0; i < 2; i++) {
        struct real real;
        static uint32_t block_crc[N_BLOCKS];
        struct winnow_store_facts facts;
        real_init(&real);
        real_open(&real, method[i]);
        real_read_check(&real, real_write(&real, block_crc));
        winnow_store_facts(real.store, &facts);
        if (facts.io.direct)
            CHECK_EQ(cached_pages(&real), 0);
        else
            direct_refused = true;
        real_finish(&real);
    }
}

/* Refuses every call that reads at an offset, in this process, for good. */
static void reads_refuse(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_pread64, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_preadv, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_preadv2, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_readv, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    CHECK_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

/* With io_uring the whole store works where no pread does. */
static void test_store_real__io_uring_needs_no_pread(void)
{
    struct real real;
    real_init(&real);
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        real.arena = winnow_alloc_map((size_t)N_BLOCKS * BLOCK_BYTES); /* forks have none */
        reads_refuse();
        round_trip(&real, "io_uring");
        CHECK_EQ(winnow_store_close(real.store), 0);
        fflush(NULL);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    real_finish(&real);
}

static uint64_t n_switches(void)
{
    char path[300], line[128];
    uint64_t n_all = 0;
    DIR *dir = opendir("/proc/self/task");
    CHECK(dir);
    for (struct dirent *entry; (entry = readdir(dir));) {
        unsigned long long n;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
        while (file && fgets(line, sizeof line, file))
            if (sscanf(line, "voluntary_ctxt_switches: %llu", &n) == 1)
                n_all += n;
        if (file)
            fclose(file);
    }
    closedir(dir);
    return n_all;
}

/* Threads with nothing to do sleep: in 50 ms none of them wakes. */
static void test_store_real__idle_threads_sleep(void)
{
    static const char *const method[] = {"io_uring", "pread"};
    for (uint32_t i = 0; i < 2; i++) {
        struct real real;
        static uint32_t block_crc[N_BLOCKS];
        struct timespec time = {.tv_nsec = 50 * WINNOW_NS_PER_MS};
        real_init(&real);
        real_open(&real, method[i]);
        real_write(&real, block_crc);
        nanosleep(&time, NULL); /* growth comes to rest */
        uint64_t before = n_switches();
        nanosleep(&time, NULL);
        CHECK(n_switches() - before <= 4); /* our own sleep, and reading /proc */
        real_finish(&real);
    }
}

/* Requests that are outstanding when the store closes are the kernel's no more afterwards. */
static void test_store_real__close_under_load(void)
{
    static const char *const method[] = {"io_uring", "pread"};
    for (uint32_t i = 0; i < 2; i++) {
        struct real real;
        static uint32_t block_crc[N_BLOCKS];
        static struct winnow_store_read read[N_BLOCKS];
        real_init(&real);
        real_open(&real, method[i]);
        struct winnow_stored *stored = real_write(&real, block_crc);
        for (uint32_t j = 0; j < N_BLOCKS; j++)
            read[j] = (struct winnow_store_read){.stored = stored,
                                                 .block_idx = N_BLOCKS - 1 - j,
                                                 .data = real.arena + (size_t)j * BLOCK_BYTES};
        CHECK_EQ(winnow_store_read(real.store, read, N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS),
                 0);
        real_finish(&real);
    }
}

/* Segments come and go, files are made on the way, and all of it is read back, many times. */
static void test_store_real__files_grow_under_load(void)
{
    static const char *const method[] = {"io_uring", "pread"};
    for (uint32_t i = 0; i < 2; i++) {
        struct real real;
        static uint32_t block_crc[12][N_BLOCKS];
        struct winnow_stored *stored[12];
        struct winnow_store_facts facts;
        real_init(&real);
        real_open(&real, method[i]);
        for (uint32_t j = 0; j < 12; j++) /* 4 MiB each, of a cap of 64 */
            stored[j] = real_write(&real, block_crc[j]);
        for (uint32_t j = 0; j < 12; j++)
            real_read_check(&real, stored[j]);
        winnow_store_facts(real.store, &facts);
        CHECK_EQ(facts.used_bytes, 48 << 20);
        CHECK(facts.allocated_bytes >= 48 << 20 && facts.allocated_bytes <= 64 << 20);
        for (uint32_t j = 0; j < 12; j++)
            winnow_store_segment_destroy(real.store, stored[j]);
        real_finish(&real);
    }
}

static uint32_t n_open_files(void)
{
    uint32_t n_names = 0;
    DIR *dir = opendir("/proc/self/fd");
    CHECK(dir);
    while (readdir(dir))
        n_names++;
    closedir(dir);
    return n_names;
}

/* Each allocation of an open over real files fails once: it is refused, or does with less, and no
 * descriptor, thread or lock stays behind. */
static void test_store_real__each_allocation_of_open_fails(void)
{
    struct real real;
    real_init(&real);
    uint32_t before = n_open_files();
    bool complete = false;
    for (uint64_t nth = 1; !complete; nth++) {
        char text[256];
        struct winnow_store_options options = real_options(&real, "auto");
        uint64_t count = winnow_alloc_count();
        winnow_alloc_fail_at(nth, 0);
        int rc = winnow_store_open(&options, &real.store, text);
        winnow_alloc_fail_at(0, 0);
        complete = winnow_alloc_count() - count < nth;
        CHECK(rc == 0 || (rc == -ENOMEM && !real.store));
        CHECK(rc == 0 || !complete);
        CHECK_EQ(winnow_store_close(real.store), 0);
        CHECK_EQ(n_open_files(), before);
        real.store = NULL;
    }
    real_finish(&real);
}

static bool mount_refused;

/* Growth leaves a twentieth of the file system to others, though the cap would allow more. */
static void test_store_real__five_percent_stay_free(void)
{
    struct real real;
    static uint32_t block_crc[5 * 256];
    struct winnow_stored *stored;
    struct winnow_store_facts facts;
    int rc;
    real_init(&real);
    /* Two files of 8 MiB would fit, and leave 3 %. */
    mount_refused = mount("tmpfs", real.dir, "tmpfs", 0, "size=16896k,mode=0700") < 0;
    if (!mount_refused) {
        real_open(&real, "pread");
        while ((rc = winnow_store_segment_create(real.store, 1, 5 * 256, BLOCK_BYTES, block_crc,
                                                 &stored)) == -EAGAIN) {
            struct winnow_store_done none;
            notify_wait(&real);
            CHECK_EQ(winnow_store_poll(real.store, &none, 1), 0);
        }
        CHECK_EQ(rc, -ENOSPC);
        winnow_store_facts(real.store, &facts);
        CHECK_EQ(facts.allocated_bytes, 8 << 20);
        CHECK_EQ(winnow_store_close(real.store), 0);

        real_open(&real, "pread"); /* what it has, it has, however full the rest is */
        winnow_store_facts(real.store, &facts);
        CHECK_EQ(facts.allocated_bytes, 8 << 20);
        CHECK_EQ(winnow_store_close(real.store), 0);
        CHECK_EQ(umount(real.dir), 0);
        real.store = NULL;
    }
    real_finish(&real);
}

/* Two stores in one directory: the second is refused, and works once the first is gone. */
static void test_store_real__second_store_is_refused(void)
{
    struct real real;
    char text[256];
    struct winnow_store *second;
    real_init(&real);
    real_open(&real, "pread");
    struct winnow_store_options options = real_options(&real, "pread");
    CHECK_EQ(winnow_store_open(&options, &second, text), -EBUSY);
    CHECK(!second && strstr(text, "in use by process"));
    CHECK_EQ(winnow_store_close(real.store), 0);
    CHECK_EQ(winnow_store_open(&options, &real.store, text), 0);
    real_finish(&real);
}

/* A file cut short, a byte changed and two blocks swapped on the real disk cost their own blocks. */
static void test_store_real__damage_costs_its_own_block(void)
{
    struct real real;
    static uint32_t block_crc[N_BLOCKS];
    static struct winnow_store_read read[N_BLOCKS];
    char path[256];
    uint8_t byte, block[2][BLOCK_BYTES];
    real_init(&real);
    real_open(&real, "pread");
    struct winnow_stored *stored = real_write(&real, block_crc);
    struct winnow_place place = winnow_stored_place(real.store, stored, 0);
    snprintf(path, sizeof path, "%s/data/%08x.dat", real.dir, place.file_no);
    int fd = open(path, O_RDWR);
    off_t at = (off_t)place.offset_bytes;
    CHECK(fd >= 0);
    CHECK_EQ(pread(fd, &byte, 1, at + 7 * BLOCK_BYTES + 99), 1); /* of block 7 */
    byte ^= 0x10;
    CHECK_EQ(pwrite(fd, &byte, 1, at + 7 * BLOCK_BYTES + 99), 1);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pread(fd, block[i], BLOCK_BYTES, at + (20 + i) * BLOCK_BYTES), BLOCK_BYTES);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pwrite(fd, block[i], BLOCK_BYTES, at + (21 - i) * BLOCK_BYTES), BLOCK_BYTES);
    CHECK_EQ(fsync(fd), 0);
    CHECK_EQ(ftruncate(fd, at + 500 * BLOCK_BYTES + 100), 0); /* 500 and what follows */
    close(fd);
    memset(real.arena, 0, (size_t)N_BLOCKS * BLOCK_BYTES);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        read[i] = (struct winnow_store_read){.stored = stored,
                                             .block_idx = i,
                                             .data = real.arena + (size_t)i * BLOCK_BYTES,
                                             .tag = i};
    CHECK_EQ(winnow_store_read(real.store, read, N_BLOCKS, WINNOW_IO_EXACT, WINNOW_NEVER_NS), 0);
    for (uint32_t n_left = N_BLOCKS; n_left;) {
        struct winnow_store_done done;
        if (!winnow_store_poll(real.store, &done, 1)) {
            notify_wait(&real);
            continue;
        }
        n_left--;
        uint32_t i = (uint32_t)done.tag;
        bool bad = i == 7 || i == 20 || i == 21 || i >= 500;
        CHECK_EQ(done.result, bad ? -ENODATA : 0);
        CHECK(bad || block_equal(real.arena + (size_t)i * BLOCK_BYTES, BLOCK_BYTES, 5, i));
    }
    real_finish(&real);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    const struct winnow_io_method *method;
    bool refuse_direct;
    char remedy[160];
    TEST_RUN(test_store_real__pread_round_trip);
    TEST_RUN(test_store_real__damage_costs_its_own_block);
    TEST_RUN(test_store_real__each_allocation_of_open_fails);
    TEST_RUN(test_store_real__second_store_is_refused);
    TEST_RUN(test_store_real__five_percent_stay_free);
    if (winnow_io_choose("io_uring", test_dir(), &method, &refuse_direct, remedy) < 0)
        TEST_SKIP(remedy);
    TEST_RUN(test_store_real__io_uring_round_trip);
    TEST_RUN(test_store_real__io_uring_needs_no_pread);
    TEST_RUN(test_store_real__idle_threads_sleep);
    TEST_RUN(test_store_real__close_under_load);
    TEST_RUN(test_store_real__files_grow_under_load);
    if (test_dir_is_tmpfs())
        TEST_SKIP("on tmpfs the kernel accounts no reads, and the page cache is the disk");
    TEST_RUN(test_store_real__bytes_are_the_kernels);
    TEST_RUN(test_store_real__blocks_bypass_the_page_cache);
    if (mount_refused)
        TEST_SKIP("no right to mount a small file system");
    if (direct_refused)
        TEST_SKIP("the file system refuses O_DIRECT: blocks stay in the page cache");
    return TEST_END();
}
