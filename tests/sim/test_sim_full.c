/* Full: pool, index, disk, sessions. A clear refusal, nothing lost, and on it goes after a close. */
#include "text.h"

static float out[8 * 256];
static struct sim_text text, other;

/* Fills by windows until one is refused; returns the tokens that every layer holds. */
static uint64_t fill_up(struct sim_text *of, uint64_t first)
{
    int rc = 0;
    uint64_t at = first;
    while (rc == 0 && at + 128 < SIM_TEXT_TOKENS)
        rc = sim_text_fill(of, at, at + 128, 128), at += rc ? 0 : 128;
    CHECK_EQ(rc, -EDQUOT);
    return at;
}

/* What was held before the refusal is there and answers. Evening the layers may need room that is
 * not there; a seal needs none. */
static void whole_check(struct sim_text *of, uint64_t held)
{
    if (sim_text_truncate(of, --held) < 0) {
        CHECK_EQ(of->last.status, -EDQUOT);
        CHECK_EQ(of->last.n_held, held + 1);
        held -= (held - 16) % 128;
        CHECK_EQ(sim_text_truncate(of, held), 0);
    }
    for (uint32_t layer = 0; layer < of->model.shape.n_layers; layer++) {
        CHECK_EQ(sim_text_step(of, layer, held, 1, out), 0);
        CHECK(sim_text_error(of, layer, held, out) < 1e-4);
    }
}

static void full_text(struct sim_world *world, const struct sim_options *options)
{
    struct winnow_model_shape shape = sim_shape(2, 2, 2, 256, WINNOW_FP32);
    sim_world_init(world, options);
    sim_text_init(&text, world, &shape, test_seed());
    sim_text_init(&other, world, &shape, test_seed() + 1);
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_open(&other, NULL), 0);
}

/* Memory alone, and no more of it. */
static void test_full__pool_without_disk(void)
{
    struct sim_world world;
    full_text(&world, &(struct sim_options){.seed = test_seed()});
    CHECK_EQ(sim_text_fill(&other, 0, 300, 100), 0);
    uint64_t held = fill_up(&text, 0);
    CHECK(strstr(text.last.text, "host_pool"));
    whole_check(&text, held);
    CHECK_EQ(sim_text_close(&text), 0);
    CHECK(fill_up(&other, 300) > held);
    CHECK_EQ(sim_text_close(&other), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* The disk's cap is met in mid-prefill; a close frees grains, at the latest when the last write to
 * them has ended, and the other session's spills go on. */
static void test_full__disk_in_mid_prefill(void)
{
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .disk_cap_bytes = 12 << 20, .data_file_bytes = 4 << 20};
    full_text(&world, &options);
    CHECK_EQ(sim_text_fill(&other, 0, 300, 100), 0);
    uint64_t held = fill_up(&text, 0);
    CHECK(strstr(text.last.text, "host_pool"));
    CHECK(strstr(text.last.text, "disk_cap"));
    CHECK(held * 8192 > 12 << 20); /* 8 KiB a token: more than a step leaves of the pool */
    whole_check(&text, held);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_WRITE, 1, 1 << 20, WINNOW_SIM_LATE);
    CHECK_EQ(sim_text_truncate(&text, held - 300), 0);
    CHECK_EQ(sim_text_fill(&text, held - 300, held - 100, 128), 0);
    CHECK_EQ(sim_text_close(&text), 0); /* writes are under way, two seconds long */
    uint64_t n_more = fill_up(&other, 300);
    CHECK(n_more > held);
    whole_check(&other, n_more);
    CHECK_EQ(sim_text_close(&other), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* A disk that refuses every write is no disk: the pool is what there is, and says so. */
static void test_full__disk_that_takes_no_writes(void)
{
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .disk_cap_bytes = 64 << 20, .data_file_bytes = 4 << 20};
    full_text(&world, &options);
    CHECK_EQ(sim_text_fill(&text, 0, 256, 128), 0);
    CHECK_EQ(sim_text_fill(&other, 0, 1280, 128), 0); /* its first segments are on disk */
    winnow_sim_disk_fail(world.disk, WINNOW_IO_WRITE, 1, 1 << 20, WINNOW_SIM_EIO);
    uint64_t held = fill_up(&text, 256);
    CHECK(strstr(text.last.text, "disk"));
    whole_check(&text, held);
    CHECK_EQ(sim_text_close(&text), 0);
    held = fill_up(&other, 1280);
    whole_check(&other, held);
    CHECK_EQ(sim_text_close(&other), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* One write that fails twice costs nothing: the layer is written again. */
static void test_full__write_that_fails_is_repeated(void)
{
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .disk_cap_bytes = 64 << 20, .data_file_bytes = 4 << 20};
    full_text(&world, &options);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_WRITE, 1, 2, WINNOW_SIM_EIO);
    CHECK_EQ(sim_text_fill(&text, 0, 3000, 128), 0); /* 24 MiB through 14 */
    whole_check(&text, 3000);
    sim_world_finish(&world);
}

/* The least pool that a model is let into is enough for it: windows, steps, seals, a fork. */
static void test_full__smallest_legal_pool(void)
{
    static float window[512 * 4 * 256];
    struct winnow_model_shape shape = sim_shape(7, 2, 2, 256, WINNOW_FP32);
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .disk_cap_bytes = 96 << 20, .data_file_bytes = 4 << 20};
    uint64_t pool_mib = 16;
    for (int rc = -EDQUOT; rc < 0; pool_mib += 1) { /* not a multiple of a grain, too */
        char sum[256];
        options.host_pool_bytes = pool_mib << 20;
        sim_world_init(&world, &options);
        sim_text_init(&text, &world, &shape, test_seed());
        rc = sim_text_open(&text, NULL);
        uint64_t need_bytes = winnow_core_session_need_bytes(world.core, &shape, sum);
        CHECK_EQ(rc, need_bytes > (pool_mib & ~UINT64_C(1)) << 20 ? -EDQUOT : 0);
        if (rc < 0)
            sim_world_finish(&world);
    }
    CHECK(pool_mib > 17);
    for (uint64_t first = 0; first < 1536; first += 512)
        for (uint32_t layer = 0; layer < shape.n_layers; layer++) {
            CHECK_EQ(sim_text_window(&text, layer, first, 512, window), 0);
            if (layer == 3)
                CHECK(sim_text_error(&text, layer, first + 400, window + 400 * 4 * 256) < 1e-4);
        }
    for (uint64_t position = 1536; position < 1700; position++)
        for (uint32_t layer = 0; layer < shape.n_layers; layer++)
            CHECK_EQ(sim_text_step(&text, layer, position, position % 16 ? 0 : 1, out), 0);
    CHECK_EQ(sim_text_truncate(&text, 1691), 0);
    CHECK_EQ(sim_text_step(&text, 5, 1691, 1, out), 0);
    CHECK(sim_text_error(&text, 5, 1691, out) < 1e-4);
    CHECK_EQ(sim_text_close(&text), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* Index memory ends in mid-prefill: what is there can be decoded, and a close makes room. */
static void test_full__index_in_mid_prefill(void)
{
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .host_pool_bytes = 64 << 20, .index_memory_bytes = 1 << 20};
    full_text(&world, &options);
    CHECK_EQ(sim_text_fill(&other, 0, 300, 100), 0);
    uint64_t held = fill_up(&text, 0);
    CHECK(strstr(text.last.text, "index_memory"));
    whole_check(&text, held);
    for (uint64_t position = held; position < held + 20; position++) /* until a span is due */
        for (uint32_t layer = 0; layer < 2; layer++)
            CHECK_EQ(sim_text_step(&text, layer, position, 0, out), 0);
    CHECK_EQ(sim_text_close(&text), 0);
    CHECK(fill_up(&other, 300) > held);
    sim_world_finish(&world);
}

/* Index that was reserved at open is there when its tokens come, whatever others take meanwhile. */
static void test_full__reserved_index_is_kept(void)
{
    static struct sim_text third;
    struct winnow_session_options reserving = {.n_tokens_max = 1500};
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .host_pool_bytes = 64 << 20, .index_memory_bytes = 3 << 20};
    full_text(&world, &options);
    sim_text_init(&third, &world, &text.model.shape, test_seed() + 2);
    CHECK_EQ(sim_text_open(&third, &reserving), 0);
    CHECK_EQ(sim_text_fill(&third, 0, 500, 100), 0);
    fill_up(&text, 0);
    fill_up(&other, 0);
    CHECK_EQ(sim_text_open(&other, &reserving), -EDQUOT);
    CHECK(strstr(other.last.text, "index of 1500 tokens"));
    CHECK_EQ(sim_text_fill(&third, 500, 1500, 100), 0);
    CHECK_EQ(sim_text_window(&third, 0, 1500, 1, NULL), -EDQUOT); /* no more than it said */
    CHECK(strstr(third.last.text, "1500"));
    CHECK_EQ(sim_text_truncate(&third, 1400), 0);
    CHECK_EQ(sim_text_step(&third, 0, 1400, 0, out), 0);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_full__pool_without_disk);
    TEST_RUN(test_full__disk_in_mid_prefill);
    TEST_RUN(test_full__disk_that_takes_no_writes);
    TEST_RUN(test_full__write_that_fails_is_repeated);
    TEST_RUN(test_full__smallest_legal_pool);
    TEST_RUN(test_full__index_in_mid_prefill);
    TEST_RUN(test_full__reserved_index_is_kept);
    return TEST_END();
}
