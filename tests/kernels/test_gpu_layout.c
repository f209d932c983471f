/* What a gpu reserves, and what it refuses to; and what is said where no library of GPU kernels is.
 * Runs on every machine. */
#include <errno.h>
#include <kernels/cuda/layout.h>
#include <test.h>

static const struct winnow_gpu_options llama = {
    .shape = {32, 32, 8, 128, 128, 0.088f, WINNOW_BF16, WINNOW_BF16, WINNOW_BLOCK_FRAGMENTS},
    .segment_tokens = 1024,
    .n_sinks = 16,
    .n_segments_max = 128,
    .n_sessions_max = 4,
    .n_session_segments_max = 128,
    .n_slots = 32 * 6400,
    .n_items_max = 8,
    .n_launch_blocks_max = 128 * 64,
    .n_window_positions = 2048,
    .n_window_blocks = 128,
};

/* Sizes are the design's: 1,336 bytes of index a block, 128 KiB of tail a token, slots of 8 KiB. */
static void test_gpu_layout__sizes_of_llama(void)
{
    struct winnow_gpu_sizes sizes;
    char text[256] = "";

    CHECK_EQ(winnow_gpu_sizes(&llama, &sizes, text), 0);
    uint64_t n_blocks = UINT64_C(128) * 64 * 8 * 32;
    CHECK_NEAR((double)sizes.index_bytes / (double)n_blocks, 1336, 15);
    CHECK_EQ(sizes.segment_bytes * 128, sizes.index_bytes);
    CHECK_EQ(sizes.session_bytes, (UINT64_C(16) + 1024 + 512) * 128 * 1024);
    uint64_t n_stage = llama.n_launch_blocks_max * 8 / 256;
    CHECK_NEAR((double)sizes.cache_bytes, (double)(32 * 6400 + n_stage) * 8200.0, 256);
    CHECK(strstr(text, "index 128 segments") && strstr(text, "GiB"));
}

/* No area overlaps another, all lie in what is reserved, aligned to 256 bytes. */
static void test_gpu_layout__areas_are_apart(void)
{
    struct winnow_gpu_layout layout;
    char text[256];
    uint8_t *memory = (uint8_t *)(uintptr_t)4096, *next = memory;

    CHECK_EQ(winnow_gpu_layout_init(&layout, &llama, text), 0);
    winnow_gpu_layout_place(&layout, memory);
    CHECK(layout.n_areas > 10 && layout.n_areas <= WINNOW_GPU_AREAS_MAX);
    for (uint32_t i = 0; i < layout.n_areas; i++) {
        CHECK(*(uint8_t **)layout.area[i].pointer == next);
        CHECK_EQ((uintptr_t)next % 256, 0);
        next += layout.area[i].n_bytes;
    }
    CHECK_EQ(next - memory, layout.n_bytes);
    CHECK(layout.view.partial && layout.view.index && layout.view.launch);
}

/* Of a gpu for one item too, the launch has room for all items: kernels load each before they ask
 * how many there are. */
static void test_gpu_layout__launch_is_whole(void)
{
    struct winnow_gpu_options options = llama;
    struct winnow_gpu_layout layout;
    char text[256];

    options.n_items_max = 1;
    CHECK_EQ(winnow_gpu_layout_init(&layout, &options, text), 0);
    winnow_gpu_layout_place(&layout, (uint8_t *)(uintptr_t)4096);
    CHECK((uint8_t *)layout.view.q_fragment - (uint8_t *)layout.view.launch >=
          (ptrdiff_t)sizeof *layout.view.launch);
}

/* Partials have room for both rounds, however the blocks are split over the items. */
static void test_gpu_layout__partials_suffice(void)
{
    struct winnow_gpu_layout layout;
    char text[256];
    uint64_t n_partials, stride_bytes = 4 * (128 + 2) * sizeof(float);

    CHECK_EQ(winnow_gpu_layout_init(&layout, &llama, text), 0);
    winnow_gpu_layout_place(&layout, (uint8_t *)(uintptr_t)4096);
    n_partials = layout.area[layout.n_areas - 1].n_bytes / stride_bytes;
    for (uint32_t n_first = 0; n_first <= 8192; n_first += 64) {
        uint32_t n_rest = (8192 - n_first) / 7 / 64 * 64;
        uint64_t n = winnow_gpu_layout_partials(&layout.view, n_first) +
                     7 * (uint64_t)winnow_gpu_layout_partials(&layout.view, n_rest);
        CHECK(8 * n <= n_partials);
    }
}

/* Each impossible option is named. */
static void test_gpu_layout__refuses_by_name(void)
{
    struct winnow_gpu_options bad[16];
    const char *name[16];
    struct winnow_gpu_sizes sizes;
    char text[256];
    int n = 0;

    for (int i = 0; i < 16; i++)
        bad[i] = llama;
    bad[n].shape.kv_dtype = WINNOW_FP32, name[n++] = "kv_dtype";
    bad[n].shape.block_layout = WINNOW_BLOCK_LAYOUT, name[n++] = "block_layout";
    bad[n].shape.n_q_heads = 33, name[n++] = "n_q_heads";
    bad[n].segment_tokens = 1000, name[n++] = "segment_tokens";
    bad[n].segment_tokens = 0, name[n++] = "segment_tokens";
    bad[n].segment_tokens = 32768, name[n++] = "segment_tokens";
    bad[n].n_sinks = 24, name[n++] = "n_sinks";
    bad[n].n_sinks = 80, name[n++] = "n_sinks";
    bad[n].n_segments_max = 0, name[n++] = "n_segments_max";
    bad[n].n_sessions_max = 0, name[n++] = "n_sessions_max";
    bad[n].n_session_segments_max = 0, name[n++] = "n_session_segments_max";
    bad[n].n_items_max = 0, name[n++] = "n_items_max";
    bad[n].n_items_max = 257, name[n++] = "n_items_max";
    bad[n].n_launch_blocks_max = 0, name[n++] = "n_launch_blocks_max";
    for (int i = 0; i < n; i++) {
        CHECK_EQ(winnow_gpu_sizes(&bad[i], &sizes, text), -EINVAL);
        CHECK(strstr(text, name[i]));
    }
    n = 0;
    bad[n] = llama, bad[n].n_segments_max = 1 << 24, name[n++] = "n_segments_max";
    bad[n] = llama, bad[n].n_slots = 1u << 31, name[n++] = "n_slots";
    bad[n] = llama, bad[n].n_launch_blocks_max = UINT64_MAX, name[n++] = "n_launch_blocks_max";
    bad[n] = llama, bad[n].n_sessions_max = UINT32_MAX, name[n++] = "n_sessions_max";
    for (int i = 0; i < n; i++) {
        CHECK_EQ(winnow_gpu_sizes(&bad[i], &sizes, text), -EOVERFLOW);
        CHECK(strstr(text, name[i]));
    }
}

/* Without a library, or with a file that is none, a line says so and nothing else happens. */
static void test_gpu_load__says_what_is_missing(void)
{
    char text[256];

    CHECK(!winnow_gpu_load("/nonexistent/winnow_cuda.so", text));
    CHECK(strstr(text, "no GPU kernels") && strstr(text, "nonexistent"));
    CHECK(!winnow_gpu_load("/proc/self/exe", text));
    CHECK(text[0]);
    CHECK(!winnow_gpu_load("libm.so.6", text));
    CHECK(strstr(text, "version"));
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_gpu_layout__sizes_of_llama);
    TEST_RUN(test_gpu_layout__areas_are_apart);
    TEST_RUN(test_gpu_layout__launch_is_whole);
    TEST_RUN(test_gpu_layout__partials_suffice);
    TEST_RUN(test_gpu_layout__refuses_by_name);
    TEST_RUN(test_gpu_load__says_what_is_missing);
    return TEST_END();
}
