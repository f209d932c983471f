#include "bed.h"

static struct bed_model small_model(uint32_t kv_dtype)
{
    return (struct bed_model){.shape = {.n_layers = 2,
                                        .n_q_heads = 6,
                                        .n_kv_heads = 2,
                                        .k_width = 64,
                                        .v_width = 64,
                                        .softmax_scale = 0.125f,
                                        .kv_dtype = kv_dtype,
                                        .io_dtype = WINNOW_FP32,
                                        .block_layout = WINNOW_BLOCK_LAYOUT},
                              .seed = test_seed(),
                              .spread = 2};
}

static const struct winnow_session_options by_default = {0};

/* Windows and decode steps of a context that is only a tail equal dense attention. */
static void test_core__tail_alone_is_dense(void)
{
    struct bed bed;
    struct bed_model model = small_model(WINNOW_FP32);
    static float out[40 * 6 * 64];
    bed_init(&bed, &(struct bed_options){.n_threads = 2});
    uint64_t id = bed_open(&bed, &model, &by_default);
    CHECK_EQ(bed_window(&bed, &model, id, 1, 0, 37, out), 0);
    for (uint32_t i = 0; i < 37; i += 9)
        CHECK(bed_error(&model, 1, i, out + i * 6 * 64) < 1e-5);
    for (uint64_t position = 37; position < 60; position++)
        for (uint32_t layer = 0; layer < 2; layer++) {
            struct winnow_request step;
            CHECK_EQ(bed_step(&bed, &model, id, 1, layer, position, 0, out, &step), 0);
            CHECK(bed_error(&model, layer, position, out) < 1e-5);
            CHECK_EQ(step.attend.certificate.verdict, WINNOW_VERDICT_EXACT);
            CHECK_EQ(step.n_held, position + 1);
        }
    bed_finish(&bed);
}

/* Sealed segments change the order of sums, not the result: windows and P = 1 stay dense. */
static void test_core__everything_read_is_dense(void)
{
    struct bed bed;
    struct bed_model model = small_model(WINNOW_FP16);
    static float out[300 * 6 * 64];
    bed_init(&bed, &(struct bed_options){.n_threads = 2});
    uint64_t id = bed_open(&bed, &model, &by_default);
    for (uint64_t first = 0; first < 1500; first += 300) {
        CHECK_EQ(bed_window(&bed, &model, id, 1, first, 300, out), 0);
        CHECK(bed_error(&model, 1, first + 299, out + 299 * 6 * 64) < 2e-3);
        CHECK(bed_error(&model, 1, first + 100, out + 100 * 6 * 64) < 2e-3);
    }
    for (uint64_t position = 1500; position < 1900; position++)
        for (uint32_t layer = 0; layer < 2; layer++) {
            struct winnow_request step;
            CHECK_EQ(bed_step(&bed, &model, id, 1, layer, position, 1, out, &step), 0);
            if (position % 37 == 0)
                CHECK(bed_error(&model, layer, position, out) < 2e-3);
            CHECK_EQ(step.attend.certificate.verdict, WINNOW_VERDICT_EXACT);
        }
    struct winnow_request stats = {.kind = WINNOW_REQUEST_STATS, .session_id = id};
    CHECK_EQ(bed_run(&bed, &stats), 0);
    CHECK_EQ(stats.stats.n_tokens_held, 1900);
    CHECK_EQ(stats.stats.n_tokens_sealed, (1900 - 16 - 96) / 256 * 256);
    bed_finish(&bed);
}

/* At P 0.9 a part is read, the certificate says at least P, and the output is near dense. */
static void test_core__sparse_reads_less_and_stays_near(void)
{
    struct bed bed;
    struct bed_model model = small_model(WINNOW_FP16);
    static float out[512 * 6 * 64];
    double n_read = 0, n_total = 0, error = 0; /* values are noise: the dense output is small */
    int n_met = 0, n_steps = 0;
    model.spread = 4;
    bed_init(&bed, &(struct bed_options){.n_threads = 2, .dense_below = 0});
    uint64_t id = bed_open(&bed, &model, &by_default);
    for (uint64_t first = 0; first < 4096; first += 512)
        CHECK_EQ(bed_window(&bed, &model, id, 1, first, 512, NULL), 0);
    for (uint64_t position = 4096; position < 4128; position++)
        for (uint32_t layer = 0; layer < 2; layer++, n_steps++) {
            struct winnow_request step;
            CHECK_EQ(bed_step(&bed, &model, id, 1, layer, position, 0, out, &step), 0);
            const struct winnow_core_certificate *c = &step.attend.certificate;
            n_read += c->n_blocks_host + c->n_blocks_disk;
            n_total += c->n_blocks_total;
            n_met += c->verdict == WINNOW_VERDICT_MET && c->mass_reached >= 0.9f;
            error += bed_error(&model, layer, position, out);
        }
    printf("   read %.1f %%, met %d of %d, mean error %.3f\n", 100 * n_read / n_total, n_met,
           n_steps, error / n_steps);
    CHECK(n_read < 0.7 * n_total);
    CHECK(n_met >= n_steps * 95 / 100);
    CHECK(error / n_steps < 0.35);
    bed_finish(&bed);
}

/* A fork answers like its origin, and each goes its own way. */
static void test_core__fork_shares_and_parts(void)
{
    struct bed bed;
    struct bed_model model = small_model(WINNOW_FP16), other = model;
    static float out[2][600 * 6 * 64];
    bed_init(&bed, &(struct bed_options){.n_threads = 2});
    uint64_t id = bed_open(&bed, &model, &by_default);
    CHECK_EQ(bed_window(&bed, &model, id, 1, 0, 600, NULL), 0);
    struct winnow_request fork = {.kind = WINNOW_REQUEST_FORK, .session_id = id};
    CHECK_EQ(bed_run(&bed, &fork), 0);
    CHECK_EQ(fork.n_held, 600);
    other.seed++;
    for (uint64_t position = 600; position < 1000; position++) {
        for (uint32_t layer = 0; layer < 2; layer++) {
            CHECK_EQ(bed_step(&bed, &model, id, 1, layer, position, 1, out[0], NULL), 0);
            CHECK_EQ(bed_step(&bed, position < 700 ? &model : &other, fork.fork.ret_session_id,
                              fork.epoch, layer, position, 1, out[1], NULL),
                     0);
        }
        if (position % 50 == 0)
            CHECK(bed_error(&model, 1, position, out[0]) < 2e-3);
        CHECK_EQ(!memcmp(out[0], out[1], 6 * 64 * 4), position < 700);
    }
    bed_finish(&bed);
}

/* Truncated anywhere and sent again, a context answers as one that never was truncated. */
static void test_core__truncate_restores_survivors(void)
{
    struct bed bed;
    struct bed_model model = small_model(WINNOW_FP16);
    static const uint64_t cuts[] = {1490, 1400, 1296, 1295, 1000, 529, 528, 300, 272, 20, 16, 7, 0};
    static float out[1500 * 6 * 64];
    bed_init(&bed, &(struct bed_options){.n_threads = 2});
    uint64_t id = bed_open(&bed, &model, &by_default);
    uint32_t epoch = 1;
    CHECK_EQ(bed_window(&bed, &model, id, epoch, 0, 1500, NULL), 0);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        struct winnow_request truncate = {
            .kind = WINNOW_REQUEST_TRUNCATE, .session_id = id, .truncate = {.n_tokens = cuts[i]}};
        CHECK_EQ(bed_run(&bed, &truncate), 0);
        CHECK_EQ(truncate.n_held, cuts[i]);
        CHECK_EQ(bed_step(&bed, &model, id, epoch, 0, cuts[i], 1, out, NULL), -ESTALE);
        epoch = truncate.epoch;
        uint32_t n = (uint32_t)(1500 - cuts[i]);
        CHECK_EQ(bed_window(&bed, &model, id, epoch, cuts[i], n, out), 0);
        CHECK(bed_error(&model, 1, 1499, out + (size_t)(n - 1) * 6 * 64) < 2e-3);
        CHECK(bed_error(&model, 1, cuts[i], out) < 2e-3);
    }
    bed_finish(&bed);
}

/* Wrong layers, positions, owners, NaN: each its errno, and the context as before. */
static void test_core__bad_requests_change_nothing(void)
{
    struct bed bed;
    struct bed_model model = small_model(WINNOW_FP16);
    static float out[64 * 6 * 64], bad[64 * 6 * 64];
    bed_init(&bed, &(struct bed_options){.n_threads = 1});
    uint64_t id = bed_open(&bed, &model, &by_default);
    CHECK_EQ(bed_window(&bed, &model, id, 1, 0, 50, NULL), 0);
    CHECK_EQ(bed_step(&bed, &model, id, 1, 2, 50, 0, out, NULL), -EINVAL);
    CHECK_EQ(bed_step(&bed, &model, id, 1, 0, 49, 0, out, NULL), -EINVAL);
    CHECK_EQ(bed_step(&bed, &model, id ^ 1 << 21, 1, 0, 50, 0, out, NULL), -ENOENT);
    struct winnow_request foreign = {.kind = WINNOW_REQUEST_CLOSE, .owner = 7, .session_id = id};
    CHECK_EQ(bed_run(&bed, &foreign), -ENOENT);
    bad[5] = NAN;
    struct winnow_request window = {
        .kind = WINNOW_REQUEST_EXACT,
        .session_id = id,
        .epoch = 1,
        .exact = {
            .layer = 0, .n_tokens = 20, .first = 50, .q = out, .k = bad, .v = out, .out = out}};
    CHECK_EQ(bed_run(&bed, &window), -EDOM);
    window.exact.k = out;
    window.exact.q = bad;
    CHECK_EQ(bed_run(&bed, &window), -EDOM);
    CHECK_EQ(bed_step(&bed, &model, id, 1, 0, 50, 1, out, NULL), 0);
    CHECK(bed_error(&model, 0, 50, out) < 2e-3);
    bed_finish(&bed);
}

/* Shapes at the edge of what is served work; one beyond is refused. */
static void test_core__edges_of_shapes(void)
{
    struct bed bed;
    static const struct {
        uint32_t n_layers, n_q_heads, n_kv_heads, k_width, v_width;
        int rc;
    } edge[] = {{1, 128, 128, 256, 16, 0},
                {1, 16, 1, 16, 256, 0},
                {256, 1, 1, 16, 16, 0},
                {1, 129, 129, 16, 16, -EINVAL},
                {257, 1, 1, 16, 16, -EINVAL}};
    static float out[128 * 256];
    bed_init(&bed, &(struct bed_options){.host_pool_bytes = 128 << 20, .segment_tokens = 128});
    for (size_t i = 0; i < sizeof edge / sizeof *edge; i++) {
        struct bed_model model = small_model(WINNOW_FP16);
        model.shape.n_layers = edge[i].n_layers;
        model.shape.n_q_heads = edge[i].n_q_heads;
        model.shape.n_kv_heads = edge[i].n_kv_heads;
        model.shape.k_width = edge[i].k_width;
        model.shape.v_width = edge[i].v_width;
        struct winnow_request open = {.kind = WINNOW_REQUEST_OPEN, .open = {.shape = model.shape}};
        CHECK_EQ(bed_run(&bed, &open), edge[i].rc);
        if (edge[i].rc < 0)
            continue;
        uint64_t id = open.open.ret_session_id;
        for (uint64_t position = 0; position < 3; position++)
            CHECK_EQ(bed_step(&bed, &model, id, 1, 0, position, 0, out, NULL), 0);
        CHECK(bed_error(&model, 0, 2, out) < 2e-3);
        struct winnow_request close = {.kind = WINNOW_REQUEST_CLOSE, .session_id = id};
        CHECK_EQ(bed_run(&bed, &close), 0);
    }
    bed_finish(&bed);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_core__tail_alone_is_dense);
    TEST_RUN(test_core__everything_read_is_dense);
    TEST_RUN(test_core__sparse_reads_less_and_stays_near);
    TEST_RUN(test_core__fork_shares_and_parts);
    TEST_RUN(test_core__truncate_restores_survivors);
    TEST_RUN(test_core__bad_requests_change_nothing);
    TEST_RUN(test_core__edges_of_shapes);
    return TEST_END();
}
