#include "bed.h"
#include <fcntl.h>
#include <sys/stat.h>

static struct bed_model model_of(uint32_t n_layers)
{
    return (struct bed_model){.shape = {.n_layers = n_layers,
                                        .n_q_heads = 6,
                                        .n_kv_heads = 2,
                                        .k_width = 64,
                                        .v_width = 64,
                                        .softmax_scale = 0.125f,
                                        .kv_dtype = WINNOW_FP16,
                                        .io_dtype = WINNOW_FP32,
                                        .block_layout = WINNOW_BLOCK_LAYOUT},
                              .seed = test_seed(),
                              .spread = 4};
}

static const char *fresh_dir(void)
{
    static char dir[64];
    snprintf(dir, sizeof dir, "/var/tmp/winnow-core-XXXXXX");
    CHECK(mkdtemp(dir));
    return dir;
}

static void remove_dir(const char *dir)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    CHECK_EQ(system(command), 0);
}

struct outcome {
    float out[3][12][6 * 64];
    uint64_t n_disk, n_host, n_written;
};

/* Sixteen layers of 3,000 tokens (a pool of 16 MiB holds a part), then sparse and exact steps. */
static void outcome_of(const struct bed_options *options, struct outcome *outcome)
{
    struct bed bed;
    struct bed_model model = model_of(16);
    const char *dir = fresh_dir();
    struct bed_options with_dir = *options;
    if (options->disk_cap_bytes)
        with_dir.dir = dir;
    bed_init(&bed, &with_dir);
    *outcome = (struct outcome){0};
    uint64_t id = bed_open(&bed, &model, &(struct winnow_session_options){0});
    for (uint64_t first = 0; first < 3072; first += 256)
        CHECK_EQ(first % 1024 ? bed_append(&bed, &model, id, 1, first, 256)
                              : bed_window(&bed, &model, id, 1, first, 256, NULL),
                 0);
    for (int i = 0; i < 12; i++)
        for (uint32_t layer = 0; layer < 16; layer++) {
            struct winnow_request step;
            float *out = outcome->out[layer % 3][i];
            CHECK_EQ(bed_step(&bed, &model, id, 1, layer, 3072 + (uint64_t)i, i % 3 == 2 ? 1 : 0,
                              out, &step),
                     0);
            outcome->n_disk += step.attend.certificate.n_blocks_disk;
            outcome->n_host += step.attend.certificate.n_blocks_host;
            if (i == 2 && layer == 15)
                CHECK(bed_error(&model, layer, 3072 + (uint64_t)i, out) < 2e-3);
        }
    struct winnow_request stats = {.kind = WINNOW_REQUEST_STATS, .session_id = id};
    CHECK_EQ(bed_run(&bed, &stats), 0);
    struct winnow_request all = {.kind = WINNOW_REQUEST_STATS};
    CHECK_EQ(bed_run(&bed, &all), 0);
    outcome->n_written = all.stats.written_bytes;
    bed_finish(&bed);
    remove_dir(dir);
}

/* The same bits from memory and from disk, by io_uring and pread, with one thread and two, from
 * pools of three sizes. */
static void test_disk__same_bits_wherever_blocks_are(void)
{
    static struct outcome in_memory, on_disk;
    struct bed_options options = {
        .host_pool_bytes = 64 << 20, .n_threads = 2, .segment_tokens = 256};
    outcome_of(&options, &in_memory);
    CHECK_EQ(in_memory.n_disk, 0);
    options.disk_cap_bytes = 512 << 20;
    static const struct {
        uint64_t host_pool_bytes;
        uint32_t n_threads;
        const char *io_method;
    } ways[] = {{16 << 20, 2, "auto"}, {16 << 20, 1, "pread"}, {24 << 20, 2, "pread"}};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        options.host_pool_bytes = ways[i].host_pool_bytes;
        options.n_threads = ways[i].n_threads;
        options.io_method = ways[i].io_method;
        outcome_of(&options, &on_disk);
        printf("   pool %2llu MiB, %s, %u threads: disk %llu host %llu blocks, %.1f MiB written\n",
               (unsigned long long)(ways[i].host_pool_bytes >> 20), ways[i].io_method,
               ways[i].n_threads, (unsigned long long)on_disk.n_disk,
               (unsigned long long)on_disk.n_host, (double)on_disk.n_written / (1 << 20));
        CHECK(on_disk.n_disk > 0);
        CHECK_EQ(on_disk.n_disk + on_disk.n_host, in_memory.n_host);
        CHECK(!memcmp(on_disk.out, in_memory.out, sizeof in_memory.out));
    }
}

/* A byte changed on disk costs the steps that select its block, says where to truncate, and after
 * that and the tokens sent again the answers are those of an undisturbed context. */
static void test_disk__flipped_byte_is_lost_then_mended(void)
{
    struct bed bed;
    struct bed_model model = model_of(16);
    const char *dir = fresh_dir();
    static float out[6 * 64];
    char path[128];
    bed_init(&bed, &(struct bed_options){.host_pool_bytes = 16 << 20,
                                         .n_threads = 2,
                                         .segment_tokens = 256,
                                         .dir = dir,
                                         .disk_cap_bytes = 512 << 20});
    uint64_t id = bed_open(&bed, &model, &(struct winnow_session_options){0});
    for (uint64_t first = 0; first < 3072; first += 256)
        CHECK_EQ(bed_append(&bed, &model, id, 1, first, 256), 0);
    snprintf(path, sizeof path, "%s/data/00000000.dat", dir);
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    for (off_t at = 0; at < 2 << 20;
         at += 4096 * 16) { /* a block in sixteen of the first segment */
        uint8_t byte;
        CHECK_EQ(pread(fd, &byte, 1, at + 5), 1);
        byte ^= 0x40;
        CHECK_EQ(pwrite(fd, &byte, 1, at + 5), 1);
    }
    CHECK_EQ(fsync(fd), 0);
    close(fd);
    uint32_t epoch = 1, n_lost = 0;
    uint64_t position = 3072;
    for (uint32_t layer = 0; layer < 16; layer++) {
        struct winnow_request step;
        int rc = bed_step(&bed, &model, id, epoch, layer, position, 1, out, &step);
        if (rc == 0) {
            CHECK(bed_error(&model, layer, position, out) < 2e-3);
            continue;
        }
        CHECK_EQ(rc, -ENODATA);
        n_lost++;
        uint64_t to = step.truncate_to;
        CHECK(to < 3072 && (to - 16) % 256 == 0);
        struct winnow_request truncate = {
            .kind = WINNOW_REQUEST_TRUNCATE, .session_id = id, .truncate = {.n_tokens = to}};
        CHECK_EQ(bed_run(&bed, &truncate), 0);
        epoch = truncate.epoch;
        for (uint64_t first = to; first < 3072;) {
            uint32_t n = 3072 - first < 256 ? (uint32_t)(3072 - first) : 256;
            int again = bed_window(&bed, &model, id, epoch, first, n, NULL);
            CHECK_EQ(again, 0);
            first += n;
        }
        layer = UINT32_MAX; /* all layers again */
    }
    CHECK(n_lost > 0);
    bed_finish(&bed);
    remove_dir(dir);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_disk__same_bits_wherever_blocks_are);
    TEST_RUN(test_disk__flipped_byte_is_lost_then_mended);
    return TEST_END();
}
