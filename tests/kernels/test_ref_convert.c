/* Conversions, packing and the shapes that are let in. */
#include "fixture.h"

#include <errno.h>
#include <kernels/ref/ref.h>

/* Every finite number of a 16-bit type survives the way to fp32 and back. */
static void test_convert__half_round_trip(void)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        float fp16 = winnow_ref_fp16_to_float((uint16_t)bits);
        float bf16 = winnow_ref_bf16_to_float((uint16_t)bits);
        if (!isnan(fp16))
            CHECK_EQ(winnow_ref_float_to_fp16(fp16), bits);
        if (!isnan(bf16))
            CHECK_EQ(winnow_ref_float_to_bf16(bf16), bits);
        CHECK(isnan(fp16) == ((bits & 0x7fff) > 0x7c00));
        CHECK(isnan(bf16) == ((bits & 0x7fff) > 0x7f80));
    }
}

/* Between two neighbours the nearer wins, and in the middle the even one. */
static void test_convert__rounds_to_nearest_even(void)
{
    for (uint32_t bits = 0; bits < 0x7bff; bits++) {
        float low = winnow_ref_fp16_to_float((uint16_t)bits);
        float high = winnow_ref_fp16_to_float((uint16_t)(bits + 1));
        float middle = (low + high) / 2; /* exact */
        CHECK_EQ(winnow_ref_float_to_fp16(middle), bits + (bits & 1));
        CHECK_EQ(winnow_ref_float_to_fp16(nextafterf(middle, 0)), bits);
        CHECK_EQ(winnow_ref_float_to_fp16(-nextafterf(middle, INFINITY)), (bits + 1) | 0x8000);
    }
    CHECK_EQ(winnow_ref_float_to_fp16(65519.996f), 0x7bff);
    CHECK_EQ(winnow_ref_float_to_fp16(65520), 0x7c00);
    CHECK_EQ(winnow_ref_float_to_bf16(0x1.01p0f), 0x3f80); /* tie: down to even */
    CHECK_EQ(winnow_ref_float_to_bf16(0x1.03p0f), 0x3f82); /* tie: up to even */
    CHECK_EQ(winnow_ref_float_to_bf16(0x1.010002p0f), 0x3f81);
}

/* NaN and Inf are refused at the door, at every place and in every type; so is overflow. */
static void test_convert__refuses_what_is_not_finite(void)
{
    static const uint16_t bad[][2] = {{0x7f80, 0xff81}, {0x7c00, 0xfe00}};
    const struct winnow_kernels *ref = winnow_kernels_ref();
    uint16_t half[33] = {0};
    float wide[33], hostile[] = {NAN, INFINITY, -INFINITY};

    for (uint32_t dtype = WINNOW_BF16; dtype <= WINNOW_FP16; dtype++)
        for (uint32_t at = 0; at < 33; at++)
            for (int i = 0; i < 2; i++) {
                CHECK_EQ(ref->to_float(dtype, 33, half, wide), 0);
                half[at] = bad[dtype - 1][i];
                CHECK_EQ(ref->to_float(dtype, 33, half, wide), -EDOM);
                half[at] = 0;
            }
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(ref->to_float(WINNOW_FP32, 1, &hostile[i], wide), -EDOM);
        for (uint32_t dtype = WINNOW_BF16; dtype <= WINNOW_FP32; dtype++)
            CHECK_EQ(ref->from_float(dtype, 1, &hostile[i], half), -EDOM);
    }
    wide[0] = 65520;
    CHECK_EQ(ref->from_float(WINNOW_FP16, 1, wide, half), -EDOM);
    CHECK_EQ(ref->from_float(WINNOW_BF16, 1, wide, half), 0);
    wide[0] = 3.4e38f;
    CHECK_EQ(ref->from_float(WINNOW_BF16, 1, wide, half), -EDOM);
    CHECK_EQ(ref->from_float(WINNOW_FP32, 1, wide, half), 0);
}

/* A block keeps its other tokens when some are written; what overflows saturates. */
static void test_block__pack_writes_only_its_tokens(void)
{
    const struct winnow_kernels *ref = winnow_kernels_ref();
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (uint32_t dtype = WINNOW_BF16; dtype <= WINNOW_FP32; dtype++) {
        struct winnow_model_shape shape = fixture_shape(1, 48, 32, dtype);
        char block[8192];
        float k[16 * 48], v[16 * 32], new_k[16 * 48], new_v[16 * 32];
        float *source = fixture_normal(&rng, 16 * 80, 1);
        CHECK(winnow_block_bytes(&shape) <= sizeof block);

        ref->block_pack(&shape, 0, 16, source, source + 16 * 48, block);
        ref->block_unpack(&shape, block, k, v);
        for (uint32_t i = 0; i < 16 * 48; i++)
            CHECK_NEAR(k[i], source[i], fabs((double)source[i]) * 0x1p-8);
        source[0] = 1e38f;
        source[16 * 48] = -1e38f;
        ref->block_pack(&shape, 5, 2, source, source + 16 * 48, block);
        ref->block_unpack(&shape, block, new_k, new_v);
        for (uint32_t t = 0; t < 16; t++) {
            CHECK(!memcmp(k + t * 48, new_k + t * 48, 192) == (t != 5 && t != 6));
            CHECK(!memcmp(v + t * 32, new_v + t * 32, 128) == (t != 5 && t != 6));
        }
        CHECK(dtype == WINNOW_FP16 ? new_k[5 * 48] == 65504.0f : new_k[5 * 48] > 9e37f);
        CHECK(isfinite(new_v[5 * 32]) && new_v[5 * 32] < -65503.0f);
        winnow_alloc_free(source);
    }
}

/* Layout 2 stands in the order of mma.m16n8k16's operand A, at every width: registers a0..a7 of
 * lane 4 r + c are rows r, r, r+8, r+8, and again, of columns 2c, 2c+1, .., then 8 further. */
static void test_block__fragments_are_in_order(void)
{
    static const uint32_t row_of[8] = {0, 0, 8, 8, 0, 0, 8, 8};
    static const uint32_t column_of[8] = {0, 1, 0, 1, 8, 9, 8, 9};
    const struct winnow_kernels *ref = winnow_kernels_ref();
    static float k[16 * 256], v[16 * 256], k_back[16 * 256], v_back[16 * 256];
    static uint16_t block[2 * 16 * 256];

    for (uint32_t width = 16; width <= 256; width += 16)
        for (uint32_t dtype = WINNOW_BF16; dtype <= WINNOW_FP16; dtype++) {
            struct winnow_model_shape shape = fixture_shape(1, width, 272 - width, dtype);
            shape.block_layout = WINNOW_BLOCK_FRAGMENTS;
            for (uint32_t t = 0; t < 16; t++) { /* numbers that both types hold, none twice */
                for (uint32_t d = 0; d < width; d++)
                    k[t * width + d] = ldexpf((float)(d % 128 + 128), (int)(t % 8)) *
                                       (t < 8 ? 1 : -1) * (d < 128 ? 1 : 0x1p-12f);
                for (uint32_t d = 0; d < 272 - width; d++)
                    v[t * (272 - width) + d] = ldexpf((float)(d % 128 + 128), (int)(t % 8)) *
                                               (t < 8 ? 1 : -1) * (d < 128 ? 1 : 0x1p-12f);
            }
            memset(block, 0xff, sizeof block);
            for (uint32_t t = 0; t < 16; t += 4)
                ref->block_pack(&shape, t, 4, k + t * width, v + t * (272 - width), block);
            for (uint32_t i = 0; i < 16 * 272; i++) {
                uint32_t lane = i / 8 % 32, tile = i / 256;
                uint32_t row = lane / 4 + row_of[i % 8], column = 2 * (lane % 4) + column_of[i % 8];
                float x = tile < width / 16 ? k[row * width + 16 * tile + column]
                                            : v[column * (272 - width) + 16 * tile - width + row];
                CHECK(x == (dtype == WINNOW_FP16 ? winnow_ref_fp16_to_float(block[i])
                                                 : winnow_ref_bf16_to_float(block[i])));
            }
            ref->block_unpack(&shape, block, k_back, v_back);
            CHECK(!memcmp(k, k_back, 16 * width * sizeof *k));
            CHECK(!memcmp(v, v_back, 16 * (272 - width) * sizeof *v));
        }
}

/* A shape that no version handles is refused, with its value and what is needed. */
static void test_shape__refusals_name_the_value(void)
{
    const struct winnow_model_shape good = fixture_shape(3, 64, 64, WINNOW_FP16);
    struct winnow_model_shape shape;
    char text[256];

    CHECK_EQ(winnow_model_shape_check(&good, text), 0);
#define REFUSED(field, value, word)                                                                \
    do {                                                                                           \
        shape = good;                                                                              \
        shape.field = value;                                                                       \
        CHECK_EQ(winnow_model_shape_check(&shape, text), -EINVAL);                                 \
        CHECK(strstr(text, word));                                                                 \
    } while (0)
    REFUSED(n_layers, 0, "n_layers 0");
    REFUSED(n_kv_heads, 0, "n_kv_heads 0");
    REFUSED(n_kv_heads, 2, "n_kv_heads 2");
    REFUSED(n_q_heads, 0, "n_q_heads 0");
    REFUSED(n_q_heads, 17, "n_q_heads 17");
    REFUSED(k_width, 8, "k_width 8");
    REFUSED(k_width, 272, "k_width 272");
    REFUSED(v_width, 72, "v_width 72");
    REFUSED(kv_dtype, 0, "kv_dtype 0");
    REFUSED(io_dtype, 4, "io_dtype 4");
    REFUSED(softmax_scale, 0, "softmax_scale 0");
    REFUSED(softmax_scale, NAN, "softmax_scale");
    REFUSED(block_layout, 3, "block_layout 3");
    shape = good;
    shape.block_layout = WINNOW_BLOCK_FRAGMENTS;
    CHECK_EQ(winnow_model_shape_check(&shape, text), 0);
    shape.kv_dtype = WINNOW_FP32;
    CHECK_EQ(winnow_model_shape_check(&shape, text), -EINVAL);
    CHECK(strstr(text, "fp32"));
}

/* Versions are found by name; the fastest is one of them. */
static void test_kernels__found_by_name(void)
{
    CHECK(winnow_kernels_find("ref") == winnow_kernels_ref());
    CHECK(winnow_kernels_find("no such version") == NULL);
    CHECK(winnow_kernels_find(NULL) != NULL);
    CHECK(winnow_kernels_find(winnow_kernels_find(NULL)->name) == winnow_kernels_find(NULL));
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_convert__half_round_trip);
    TEST_RUN(test_convert__rounds_to_nearest_even);
    TEST_RUN(test_convert__refuses_what_is_not_finite);
    TEST_RUN(test_block__pack_writes_only_its_tokens);
    TEST_RUN(test_block__fragments_are_in_order);
    TEST_RUN(test_shape__refusals_name_the_value);
    TEST_RUN(test_kernels__found_by_name);
    return TEST_END();
}
