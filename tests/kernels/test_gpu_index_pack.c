/* The device's index holds what the host's does, in the order that view.h promises. */
#include "cases.h"

#include <kernels/cuda/index_pack.h>
#include <test.h>

enum { N_BLOCKS = 24 };

static struct winnow_gpu_view view;
static struct kernel_data data;
static uint32_t homes[N_BLOCKS];
static uint8_t *packed;

static void scene_init(uint32_t k_width, uint32_t v_width)
{
    struct kernel_case of = KERNEL_CASE("pack", 2, k_width, v_width, WINNOW_FP16);

    case_data_init(&data, &of, INPUT_RANDOM, N_BLOCKS, 1, test_seed() + k_width);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        homes[b] = b % 5 ? 1000 + b : WINNOW_GPU_ON_DISK;
    view =
        (struct winnow_gpu_view){.k_width = k_width, .v_width = v_width, .span_blocks = N_BLOCKS};
    winnow_gpu_index_layout(&view);
    packed = case_alloc(view.unit_bytes + 64);
    memset(packed, 0xa5, view.unit_bytes + 64);
    winnow_gpu_index_pack(&view, &data.view, homes, packed);
}

static void scene_finish(void)
{
    for (uint32_t i = 0; i < 64; i++)
        CHECK_EQ(packed[view.unit_bytes + i], 0xa5);
    winnow_alloc_free(packed);
    case_data_finish(&data);
}

/* A nibble of the device's order, by the formula of view.h. */
static uint32_t device_code(uint32_t b, uint32_t key, uint32_t d)
{
    uint32_t coded = (view.k_width + 63) / 64 * 64, half = coded / 2, low = d % half;
    uint32_t j = low / 32, i = low % 32 / 16 * 2 + key / 8, lane = key % 8 * 4 + low % 16 / 4;
    const uint8_t *code = packed + b / 8 * view.record_bytes + b % 8 * 8 * coded;
    uint8_t byte = code[((j * 32 + lane) * 4 + i) * 4 + low % 4];
    return d < half ? byte & 15 : byte >> 4;
}

static uint32_t host_code(uint32_t b, uint32_t key, uint32_t d)
{
    uint8_t pair = data.view.code[b * 8 * view.k_width + (d / 8 * 16 + key) * 4 + d % 4];
    return d % 8 < 4 ? pair & 15 : pair >> 4;
}

/* Every code stands where the scan's load expects it, and is 0 beyond the width. */
static void test_index_pack__codes_stand_in_load_order(void)
{
    for (uint32_t width = 16; width <= 256; width += 16) {
        scene_init(width, 16);
        for (uint32_t b = 0; b < N_BLOCKS; b++)
            for (uint32_t key = 0; key < 16; key++)
                for (uint32_t d = 0; d < (width + 63) / 64 * 64; d++)
                    CHECK_EQ(device_code(b, key, d), d < width ? host_code(b, key, d) : 8);
        scene_finish();
    }
}

/* Centroids and scales follow the codes in each record, keys g and g + 8 in one word. */
static void test_index_pack__records_hold_centroids_and_scales(void)
{
    for (uint32_t width = 16; width <= 256; width += 16) {
        scene_init(width, 32);
        for (uint32_t b = 0; b < N_BLOCKS; b++) {
            const uint8_t *at = packed + b / 8 * view.record_bytes + (width + 63) / 64 * 64 * 64;
            CHECK(!memcmp(at + b % 8 * width, data.view.centroid + b * width, width));
            at += 8 * width;
            for (uint32_t key = 0; key < 16; key++)
                CHECK(!memcmp(at + b % 8 * 32 + key % 8 * 4 + key / 8 * 2,
                              &data.view.code_scale[b * 16 + key], 2));
            at += 8 * 32;
            CHECK(!memcmp(at + b % 8 * 4, &data.view.head[b].centroid_scale, 4));
        }
        scene_finish();
    }
}

/* Means, scales and homes are copied, places cleared, and every array is aligned for its loads. */
static void test_index_pack__what_follows_the_records(void)
{
    for (uint32_t width = 16; width <= 256; width += 16) {
        scene_init(272 - width, width);
        CHECK(!memcmp(packed + view.vmean_at, data.view.vmean, N_BLOCKS * width));
        CHECK(!memcmp(packed + view.mean_v_at, data.view.mean_v, 4 * width));
        CHECK(!memcmp(packed + view.home_at, homes, sizeof homes));
        for (uint32_t b = 0; b < N_BLOCKS; b++) {
            uint32_t loc;
            memcpy(&loc, packed + view.loc_at + 4 * b, 4);
            CHECK_EQ(loc, 0);
            CHECK(!memcmp(packed + view.vmean_scale_at + 4 * b, &data.view.head[b].vmean_scale, 4));
        }
        CHECK_EQ(view.record_bytes % 16, 0);
        CHECK_EQ(view.vmean_at % 16 | view.mean_v_at % 16 | view.home_at % 16, 0);
        CHECK_EQ(view.unit_bytes % 128, 0);
        scene_finish();
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_index_pack__codes_stand_in_load_order);
    TEST_RUN(test_index_pack__records_hold_centroids_and_scales);
    TEST_RUN(test_index_pack__what_follows_the_records);
    return TEST_END();
}
