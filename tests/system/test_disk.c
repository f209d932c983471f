/* What is on disk: read once and counted, kept out of the page cache, under the memory that was
 * printed, and never trusted. A context larger than the pool. */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>
#include <unistd.h>

enum { N_TOKENS = 5000, N_STEPS = 24, PAGE = 4096, SEGMENT = 512, SINKS = 16 };

static const char *const small[] = {
    "--host-pool",      "24MiB", "--disk-cap",     "512MiB", "--threads", "2",
    "--segment-tokens", "512",   "--index-memory", "32MiB",  NULL};

/* 8 KiB a token at rest: 40 MiB at N_TOKENS. */
static winnow_model large_model(void)
{
    return engine_model(4, 4, 4, 64, 64, WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP32);
}

static void start_filled(struct daemon *daemon, struct engine *engine)
{
    winnow_model model = large_model();
    daemon_init(daemon, small);
    daemon_start(daemon);
    engine_open(engine, daemon->socket, &model, 11, N_TOKENS + 600, NULL);
    while (engine->n_tokens < N_TOKENS)
        ENGINE_OK(engine_window(engine, 500, NULL));
}

static void end(struct daemon *daemon, struct engine *engine)
{
    engine_close(engine);
    CHECK_EQ(daemon_stop(daemon, SIGTERM), 0);
    daemon_remove(daemon);
}

static winnow_stats stats_of(const struct engine *engine)
{
    winnow_stats stats = WINNOW_STATS;
    ENGINE_OK(winnow_stats_get(engine->client, NULL, &stats, 0));
    return stats;
}

static uint64_t read_bytes_of(const winnow_stats *stats)
{
    return stats->read_bytes_attend + stats->read_bytes_exact + stats->read_bytes_readahead +
           stats->read_bytes_truncate;
}

static void skip_tmpfs(const struct daemon *daemon)
{
    struct statfs fs;
    CHECK_EQ(statfs(daemon->dir, &fs), 0);
    if (fs.f_type == 0x01021994)
        TEST_SKIP("the temporary folder is a tmpfs (TMPDIR on a disk file system)");
}

/* Bytes that the kernel read for the daemon = bytes that Stats has = bytes in the certificates. */
static void test_disk__every_read_is_counted(void)
{
    struct daemon daemon;
    struct engine engine;
    start_filled(&daemon, &engine);
    skip_tmpfs(&daemon);
    winnow_stats before = stats_of(&engine);
    uint64_t kernel_before = proc_number(daemon.pid, "io", "read_bytes: ");
    winnow_certificate sum = {0};
    for (uint32_t i = 0; i < N_STEPS; i++)
        ENGINE_OK(
            engine_decode(&engine, &(struct engine_step){.mass = i % 8 ? 0.9F : 1, .sum = &sum}));
    winnow_stats after = stats_of(&engine);
    double kernel = (double)(proc_number(daemon.pid, "io", "read_bytes: ") - kernel_before);
    double counted = (double)(read_bytes_of(&after) - read_bytes_of(&before));
    double certified = (double)sum.bytes_read;
    double readahead = (double)(after.read_bytes_readahead - before.read_bytes_readahead);
    printf("%d steps: kernel %.1f MiB, Stats %.1f, certificates %.1f, read-ahead %.1f\n", N_STEPS,
           kernel / 0x1p20, counted / 0x1p20, certified / 0x1p20, readahead / 0x1p20);
    CHECK(counted > 1e6);
    CHECK_NEAR(kernel / counted, 1, 0.02);
    CHECK_NEAR((certified + readahead) / counted, 1, 0.02);
    end(&daemon, &engine);
}

/* A folder's data files, each mapped and asked which pages the page cache has. */
static double cached_share(const char *data_dir, uint64_t *ret_bytes)
{
    char pattern[128];
    glob_t files;
    uint64_t n_cached = 0, n_pages = 0;
    snprintf(pattern, sizeof pattern, "%s/data/*.dat", data_dir);
    CHECK_EQ(glob(pattern, 0, NULL, &files), 0);
    for (size_t i = 0; i < files.gl_pathc; i++) {
        struct stat info;
        int fd = open(files.gl_pathv[i], O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0);
        CHECK_EQ(fstat(fd, &info), 0);
        if (S_ISREG(info.st_mode) && info.st_size >= (1 << 20)) {
            size_t n_here = (size_t)info.st_size / PAGE;
            uint8_t *resident = calloc(n_here, 1);
            void *map = mmap(NULL, n_here * PAGE, PROT_READ, MAP_SHARED, fd, 0);
            CHECK(map != MAP_FAILED);
            CHECK_EQ(mincore(map, n_here * PAGE, resident), 0);
            for (size_t page = 0; page < n_here; page++)
                n_cached += resident[page] & 1;
            munmap(map, n_here * PAGE);
            free(resident);
            n_pages += n_here;
        }
        close(fd);
    }
    globfree(&files);
    *ret_bytes = n_pages * PAGE;
    return n_pages ? (double)n_cached / (double)n_pages : 0;
}

/* Peak memory stays under the sum printed at start, and nothing hides in the page cache. */
static void test_disk__memory_is_what_was_printed(void)
{
    struct daemon daemon;
    struct engine engine;
    uint64_t file_bytes;
    start_filled(&daemon, &engine);
    skip_tmpfs(&daemon);
    for (uint32_t i = 0; i < N_STEPS; i++)
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 1}));
    winnow_stats stats = stats_of(&engine);
    uint64_t peak_bytes = proc_number(daemon.pid, "status", "VmHWM:") << 10;
    double share = cached_share(daemon.data_dir, &file_bytes);
    printf("peak RSS %.1f MiB, printed %.1f; data files %.0f MiB, %.2f %% in the page cache; "
           "KV %.1f MiB, on disk %.1f\n",
           (double)peak_bytes / 0x1p20, (double)stats.printed_bytes / 0x1p20,
           (double)file_bytes / 0x1p20, 100 * share, (double)stats.kv_bytes / 0x1p20,
           (double)stats.kv_disk_bytes / 0x1p20);
#ifndef __SANITIZE_ADDRESS__ /* whose shadow memory counts too */
    CHECK(peak_bytes <= stats.printed_bytes);
#endif
    CHECK(stats.kv_bytes > stats.pool_cap_bytes);
    CHECK(file_bytes >= stats.kv_disk_bytes);
    CHECK(share < 0.01);
    end(&daemon, &engine);
}

/* Flips a byte of the n-th megabyte that holds data; false: there is none. */
static bool flip_byte(const char *data_dir, uint32_t n)
{
    char pattern[128];
    glob_t files;
    bool flipped = false;
    snprintf(pattern, sizeof pattern, "%s/data/*.dat", data_dir);
    CHECK_EQ(glob(pattern, 0, NULL, &files), 0);
    for (size_t i = 0; !flipped && i < files.gl_pathc; i++) {
        struct stat info;
        int fd = open(files.gl_pathv[i], O_RDWR | O_CLOEXEC);
        CHECK(fd >= 0);
        CHECK_EQ(fstat(fd, &info), 0);
        for (off_t at = (1 << 20) - 20000; !flipped && at < info.st_size; at += 1 << 20) {
            uint8_t bytes[64] = {0}, zeros[64] = {0};
            if (pread(fd, bytes, sizeof bytes, at) != sizeof bytes ||
                !memcmp(bytes, zeros, sizeof bytes) || n-- > 0)
                continue;
            bytes[7] ^= 0x20;
            CHECK_EQ(pwrite(fd, bytes, sizeof bytes, at), sizeof bytes);
            CHECK_EQ(fdatasync(fd), 0);
            flipped = true;
        }
        /* What this look left in the page cache is not the daemon's. */
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
    globfree(&files);
    return flipped;
}

/* A byte changed on disk is found by the step that reads it: -ENODATA and where to truncate to.
 * Truncated there and sent again, the context gives the outputs of an undamaged one. */
static void test_disk__flipped_byte_is_found_and_mended(void)
{
    struct daemon daemon;
    struct engine engine;
    struct engine_step step;
    uint64_t hash = 0, hash_mended = 0;
    int rc = 0;
    start_filled(&daemon, &engine);
    for (uint32_t i = 0; i < N_STEPS; i++)
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.hash = &hash}));
    ENGINE_OK(engine_truncate(&engine, N_TOKENS));

    uint32_t n_flips = 0;
    while (rc == 0 && n_flips < 16) {
        CHECK(flip_byte(daemon.data_dir, n_flips++));
        step = (struct engine_step){.mass = 1};
        rc = engine_decode(&engine, &step);
        if (rc == 0)
            ENGINE_OK(engine_truncate(&engine, N_TOKENS));
    }
    CHECK_EQ(rc, -ENODATA);
    printf("found after %u flips: %s\n", n_flips, winnow_error_text());
    CHECK(step.truncate_to >= SINKS && step.truncate_to < N_TOKENS);
    CHECK_EQ((step.truncate_to - SINKS) % SEGMENT, 0);
    CHECK(strstr(winnow_error_text(), "truncate"));

    /* Every flip so far is in the file: mend until a read of everything finds none. */
    for (uint32_t round = 0; rc == -ENODATA; round++) {
        CHECK(round < 2 * n_flips);
        uint32_t truncate_to = (uint32_t)step.truncate_to;
        ENGINE_OK(engine_truncate(&engine, truncate_to));
        while (engine.n_tokens < N_TOKENS) {
            uint32_t n_left = N_TOKENS - engine.n_tokens;
            rc = engine_window(&engine, n_left < 500 ? n_left : 500, NULL);
            if (rc < 0)
                break;
        }
        if (rc == -ENODATA)
            step.truncate_to = winnow_session_truncate_to(engine.session);
        else
            rc = engine_decode(&engine, &step);
    }
    CHECK_EQ(rc, 0);
    ENGINE_OK(engine_truncate(&engine, N_TOKENS));
    for (uint32_t i = 0; i < N_STEPS; i++)
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.hash = &hash_mended}));
    CHECK_EQ(hash, hash_mended);
    end(&daemon, &engine);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_disk__every_read_is_counted);
    TEST_RUN(test_disk__memory_is_what_was_printed);
    TEST_RUN(test_disk__flipped_byte_is_found_and_mended);
    return TEST_END();
}
