// bench-io: is io_uring worth having beside the pread pool, and what does the store add?
//
//   bench-io [DIRECTORY]        default /var/tmp; needs 600 MiB there
//
// Two stores, one over each method, are read in turn, so that a noisy disk treats both alike. Each
// figure is a median over the repetitions: time from the first ask to the last completion, and CPU
// of the whole process (pool and I/O threads, sums) a block. The machine's own figures come first:
// one read at a time by plain pread, and memory.
#include <base/alloc.h>
#include <base/clock.h>
#include <base/crc32c.h>
#include <base/rng.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <storage/store.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum {
    SEGMENT_BYTES = 128 << 20,
    ARENA_BYTES = 32 << 20,
    N_REPEATS = 31,
    N_BLOCKS_MAX = SEGMENT_BYTES / 4096,
    N_METHODS = 2
};

struct side { /* a store over one method */
    const char *io_method;
    char dir[256];
    struct winnow_store *store;
    struct winnow_stored *stored;
    uint32_t *block_crc;
    uint8_t *arena;
    int notify_fd;
};

struct figure {
    double time_us[N_REPEATS], cpu_us[N_REPEATS];
};

static void die(const char *what)
{
    fprintf(stderr, "bench-io: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void notify(void *arg)
{
    struct side *side = arg;
    uint64_t one = 1;
    if (write(side->notify_fd, &one, sizeof one) < 0)
        die("eventfd");
}

static double cpu_us(void)
{
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b)
{
    double difference = *(const double *)a - *(const double *)b;
    return difference > 0 ? 1 : difference < 0 ? -1 : 0;
}

static double median(double *value)
{
    qsort(value, N_REPEATS, sizeof *value, by_value);
    return value[N_REPEATS / 2];
}

static void notify_wait(struct side *side)
{
    uint64_t count;
    if (read(side->notify_fd, &count, sizeof count) < 0)
        die("eventfd");
}

static void wait_for(struct side *side, uint32_t n_blocks)
{
    struct winnow_store_done done[64];
    while (n_blocks) {
        uint32_t n_done = winnow_store_poll(side->store, done, n_blocks < 64 ? n_blocks : 64);
        for (uint32_t i = 0; i < n_done; i++)
            if (done[i].result < 0) {
                errno = -done[i].result;
                die(side->io_method);
            }
        n_blocks -= n_done;
        if (!n_done)
            notify_wait(side);
    }
}

static void side_open(struct side *side, const char *parent, const char *io_method)
{
    char text[256];
    *side = (struct side){.io_method = io_method, .notify_fd = eventfd(0, EFD_CLOEXEC)};
    snprintf(side->dir, sizeof side->dir, "%s/winnow-bench-XXXXXX", parent);
    if (side->notify_fd < 0 || !mkdtemp(side->dir))
        die(side->dir);
    side->arena = winnow_alloc_map(ARENA_BYTES);
    side->block_crc = winnow_alloc_array(N_BLOCKS_MAX, sizeof *side->block_crc);
    if (!side->arena || !side->block_crc)
        die("memory");
    struct winnow_store_options options = {.dir = side->dir,
                                           .disk_cap_bytes = 2 * SEGMENT_BYTES,
                                           .data_file_bytes = SEGMENT_BYTES,
                                           .io_method = io_method,
                                           .arena = side->arena,
                                           .arena_bytes = ARENA_BYTES,
                                           .n_requests_max = ARENA_BYTES / 4096,
                                           .n_segments_max = 1,
                                           .notify = notify,
                                           .notify_arg = side,
                                           .seed = 1};
    int rc = winnow_store_open(&options, &side->store, text);
    if (!rc)
        rc = winnow_store_start(side->store);
    if (rc < 0) {
        fprintf(stderr, "bench-io: %s\n", text);
        exit(1);
    }
}

static void side_close(struct side *side)
{
    char command[300];
    winnow_store_close(side->store);
    snprintf(command, sizeof command, "rm -r '%s'", side->dir);
    if (system(command))
        die(side->dir);
    winnow_alloc_unmap(side->arena, ARENA_BYTES);
    winnow_alloc_free(side->block_crc);
}

/* Fills the disk with blocks of one size; GB/s. */
static double side_write(struct side *side, uint32_t block_bytes)
{
    uint32_t n_blocks = SEGMENT_BYTES / block_bytes, n_arena = ARENA_BYTES / block_bytes;
    struct winnow_rng rng;
    winnow_rng_init(&rng, block_bytes);
    for (size_t i = 0; i < ARENA_BYTES / 8; i++)
        ((uint64_t *)(void *)side->arena)[i] = winnow_rng_next(&rng);
    if (side->stored)
        winnow_store_segment_destroy(side->store, side->stored);
    if (winnow_store_segment_create(side->store, 1, n_blocks, block_bytes, side->block_crc,
                                    &side->stored) < 0)
        die("segment");
    int64_t begin_ns = winnow_clock_now_ns();
    for (uint32_t i = 0; i < n_blocks; i += n_arena) {
        winnow_store_write(side->store, side->stored, i, n_arena, side->arena, 0);
        wait_for(side, 1);
    }
    return SEGMENT_BYTES / (double)(winnow_clock_now_ns() - begin_ns);
}

/* One measurement: n_blocks from random places, or from one random place on, in memory order. */
static void read_measure(struct side *side, uint32_t block_bytes, uint32_t n_blocks, bool stream,
                         uint64_t seed, double *ret_time_us, double *ret_cpu_us)
{
    static struct winnow_store_read read[ARENA_BYTES / 4096];
    uint32_t n_all = SEGMENT_BYTES / block_bytes;
    struct winnow_rng rng;
    winnow_rng_init(&rng, seed);
    uint32_t first = (uint32_t)winnow_rng_below(&rng, n_all - n_blocks);
    for (uint32_t i = 0; i < n_blocks; i++)
        read[i] = (struct winnow_store_read){
            .stored = side->stored,
            .block_idx = stream ? first + i : (uint32_t)winnow_rng_below(&rng, n_all),
            .data = side->arena + (size_t)i * block_bytes};
    double cpu = cpu_us();
    int64_t begin_ns = winnow_clock_now_ns();
    if (winnow_store_read(side->store, read, n_blocks, stream ? WINNOW_IO_EXACT : WINNOW_IO_DECODE,
                          WINNOW_NEVER_NS) < 0)
        die("read");
    wait_for(side, n_blocks);
    *ret_time_us = (double)(winnow_clock_now_ns() - begin_ns) / 1e3;
    *ret_cpu_us = cpu_us() - cpu;
}

static void row_measure(struct side *side, uint32_t block_bytes, uint32_t n_blocks, bool stream)
{
    static struct figure figure[N_METHODS];
    double time_us[N_METHODS];
    for (uint32_t i = 0; i < N_REPEATS; i++)
        for (uint32_t m = 0; m < N_METHODS; m++)
            read_measure(&side[m], block_bytes, n_blocks, stream, i, &figure[m].time_us[i],
                         &figure[m].cpu_us[i]);
    for (uint32_t m = 0; m < N_METHODS; m++) {
        time_us[m] = median(figure[m].time_us);
        printf("| %2u KiB x %4u %s | %-8s | %8.0f | %5.2f | %14.2f |\n", block_bytes >> 10,
               n_blocks, stream ? "in order " : "at random", side[m].io_method, time_us[m],
               (double)n_blocks * block_bytes / time_us[m] / 1e3,
               median(figure[m].cpu_us) / n_blocks);
    }
    printf("|   pread / io_uring      |          | %8.2f |       | %14.2f |\n",
           time_us[1] / time_us[0], median(figure[1].cpu_us) / median(figure[0].cpu_us));
}

/* One read at a time from a data file that was written before; median us. */
static double raw_read_us(const struct side *side, uint32_t n_bytes)
{
    char path[300];
    static double time_us[N_REPEATS];
    struct winnow_rng rng;
    winnow_rng_init(&rng, n_bytes);
    snprintf(path, sizeof path, "%s/data/00000000.dat", side->dir);
    int fd = open(path, O_RDONLY | O_DIRECT);
    if (fd < 0 && (fd = open(path, O_RDONLY)) < 0)
        die(path);
    for (uint32_t i = 0; i < N_REPEATS; i++) {
        off_t offset = (off_t)winnow_rng_below(&rng, SEGMENT_BYTES / n_bytes) * n_bytes;
        int64_t begin_ns = winnow_clock_now_ns();
        if (pread(fd, side->arena, n_bytes, offset) != (ssize_t)n_bytes)
            die(path);
        time_us[i] = (double)(winnow_clock_now_ns() - begin_ns) / 1e3;
    }
    close(fd);
    return median(time_us);
}

static void machine_print(const struct side *side)
{
    struct utsname name;
    uname(&name);
    double page_us = raw_read_us(side, 4096), piece_us = raw_read_us(side, 1 << 20);
    int64_t begin_ns = winnow_clock_now_ns();
    uint32_t sum = winnow_crc32c(0, side->arena, ARENA_BYTES);
    double sum_gbs = ARENA_BYTES / (double)(winnow_clock_now_ns() - begin_ns);
    printf("machine: Linux %s, %ld CPUs; %s\n", name.release, sysconf(_SC_NPROCESSORS_ONLN),
           side->dir);
    printf("raw: pread of 4 KiB %.0f us, of 1 MiB %.0f us (%.2f GB/s), one at a time; crc32c of %u "
           "MiB %.1f GB/s (%08x)\n",
           page_us, piece_us, (1 << 20) / piece_us / 1e3, ARENA_BYTES >> 20, sum_gbs, sum);
}

int main(int argc, char **argv)
{
    static struct side side[N_METHODS];
    static const uint32_t block_bytes[] = {4096, 16384};
    const char *parent = argc > 1 ? argv[1] : "/var/tmp";
    side_open(&side[0], parent, "io_uring");
    side_open(&side[1], parent, "pread");
    for (uint32_t i = 0; i < 2; i++) {
        double write_gbs[N_METHODS];
        for (uint32_t m = 0; m < N_METHODS; m++)
            write_gbs[m] = side_write(&side[m], block_bytes[i]);
        if (!i) {
            struct winnow_store_facts facts;
            winnow_store_facts(side[0].store, &facts);
            machine_print(&side[0]);
            printf("io_uring: %s; O_DIRECT %s; window %u\n\n", facts.io.flags,
                   facts.io.direct ? "yes" : "no", facts.window);
            printf("| verified reads          | method   |       us |  GB/s | CPU us a block |\n"
                   "| --- | --- | ---: | ---: | ---: |\n");
        }
        row_measure(side, block_bytes[i], 8, false);
        row_measure(side, block_bytes[i], 256, false);
        row_measure(side, block_bytes[i], (16 << 20) / block_bytes[i], true);
        printf("|   spilled before, GB/s  | io_uring |          | %5.2f |                |\n",
               write_gbs[0]);
        printf("|                         | pread    |          | %5.2f |                |\n",
               write_gbs[1]);
    }
    side_close(&side[0]);
    side_close(&side[1]);
    return 0;
}
