/* Conversions, blocks and the index in every version. Rules and tolerances: versions.h. */
#include <errno.h>

#include "built.h"
#include "versions.h"

/* What `from_float` makes of every 16-bit number, and of numbers around what rounds to infinity. */
static void convert_check(uint32_t dtype, size_t n, const void *src)
{
    size_t element_bytes = dtype == WINNOW_FP32 ? 4 : 2;
    struct guarded in, a, b, back_a, back_b;
    void *from = guarded_copy(&in, src, n * element_bytes, element_bytes);
    float *to_a = guarded_init(&a, n * sizeof(float), 4);
    float *to_b = guarded_init(&b, n * sizeof(float), 0);
    void *to_back_a = guarded_init(&back_a, n * element_bytes, element_bytes);
    void *to_back_b = guarded_init(&back_b, n * element_bytes, 0);

    int rc = ref->to_float(dtype, n, from, to_b);
    CHECK_EQ(version->to_float(dtype, n, from, to_a), rc);
    if (rc == 0) {
        CHECK(!memcmp(to_a, to_b, n * sizeof(float)));
        rc = ref->from_float(dtype, n, to_b, to_back_b);
        CHECK_EQ(version->from_float(dtype, n, to_a, to_back_a), rc);
        if (rc == 0)
            CHECK(!memcmp(to_back_a, to_back_b, n * element_bytes));
    }
    guarded_finish(&in);
    guarded_finish(&a);
    guarded_finish(&b);
    guarded_finish(&back_a);
    guarded_finish(&back_b);
}

static void from_float_check(uint32_t dtype, size_t n, const float *src)
{
    struct guarded a, b;
    void *to_a = guarded_init(&a, n * 4, 4), *to_b = guarded_init(&b, n * 4, 0);

    int rc = ref->from_float(dtype, n, src, to_b);
    CHECK_EQ(version->from_float(dtype, n, src, to_a), rc);
    if (rc == 0)
        CHECK(!memcmp(to_a, to_b, n * (dtype == WINNOW_FP32 ? 4 : 2)));
    guarded_finish(&a);
    guarded_finish(&b);
}

/* Conversions have the reference's bits for every number of 16 bits and every count, and refuse
 * NaN, Inf and overflow at every place. */
static void test_convert(void)
{
    enum { N = 70 };
    static const uint32_t dtypes[] = {WINNOW_BF16, WINNOW_FP16, WINNOW_FP32};
    static const float edges[] = {65519.9f,        65520.0f, -65520.0f,      0x1.fefffep127f,
                                  0x1.ffp127f,     FLT_MAX,  INFINITY,       NAN,
                                  0x1p-149f,       -0.0f,    0x1.004p0f,     0x1.00cp0f,
                                  0x1.ffffffp-25f, 0x1p-25f, 0x1.000002p-25f};
    uint16_t half[N];
    float x[N];
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    for (uint32_t first = 0; first < 65536; first += 16) {
        for (uint32_t i = 0; i < 16; i++)
            half[i] = (uint16_t)(first + i);
        convert_check(WINNOW_FP16, 16, half);
        convert_check(WINNOW_BF16, 16, half);
    }
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < 3; c++) {
            for (size_t i = 0; i < n; i++)
                x[i] = (float)(winnow_rng_normal(&rng) * exp2(30 * winnow_rng_unit(&rng) - 20));
            from_float_check(dtypes[c], n, x);
            if (dtypes[c] == WINNOW_FP32)
                convert_check(WINNOW_FP32, n, x);
            for (size_t e = 0; n > 0 && e < sizeof edges / sizeof edges[0]; e++) {
                size_t at = winnow_rng_below(&rng, n);
                float kept = x[at];
                x[at] = edges[e];
                from_float_check(dtypes[c], n, x);
                x[at] = kept;
            }
        }
}

/* Packing any run of tokens has the reference's bytes, keeps the others, and saturates; unpacking
 * gives them back. */
static void test_block_pack(void)
{
    size_t k_bytes = (size_t)16 * data.shape.k_width * sizeof(float);
    size_t v_bytes = (size_t)16 * data.shape.v_width * sizeof(float);
    float *k = case_alloc(k_bytes), *v = case_alloc(v_bytes);
    struct guarded a, b, k_a, k_b, v_a, v_b;
    uint8_t *block_a = guarded_init(&a, data.block_bytes, 0);
    uint8_t *block_b = guarded_init(&b, data.block_bytes, 0);

    memset(block_a, 0x11, data.block_bytes);
    memset(block_b, 0x11, data.block_bytes);
    for (size_t i = 0; i < k_bytes / sizeof *k; i++)
        k[i] = data.k[i] * (i % 7 == 0 ? 1e38f / (1 + fabsf(data.k[i])) : 1.0f);
    for (size_t i = 0; i < v_bytes / sizeof *v; i++)
        v[i] = data.v[i] * 1.001f;
    for (uint32_t first = 0; first < 16; first += 3)
        for (uint32_t n = 0; first + n <= 16; n += 1 + first) {
            version->block_pack(&data.shape, first, n, k, v, block_a);
            ref->block_pack(&data.shape, first, n, k, v, block_b);
            CHECK(!memcmp(block_a, block_b, data.block_bytes));
        }
    float *to_k_a = guarded_init(&k_a, k_bytes, 4), *to_v_a = guarded_init(&v_a, v_bytes, 4);
    float *to_k_b = guarded_init(&k_b, k_bytes, 0), *to_v_b = guarded_init(&v_b, v_bytes, 0);
    version->block_unpack(&data.shape, block_a, to_k_a, to_v_a);
    ref->block_unpack(&data.shape, block_b, to_k_b, to_v_b);
    CHECK(!memcmp(to_k_a, to_k_b, k_bytes));
    CHECK(!memcmp(to_v_a, to_v_b, v_bytes));
    guarded_finish(&a);
    guarded_finish(&b);
    guarded_finish(&k_a);
    guarded_finish(&k_b);
    guarded_finish(&v_a);
    guarded_finish(&v_b);
    winnow_alloc_free(k);
    winnow_alloc_free(v);
}

static void build_check(uint32_t n_blocks)
{
    struct winnow_index_view view;
    uint16_t order[16 * N_BLOCKS], again[16 * N_BLOCKS];
    size_t k_bytes = (size_t)16 * n_blocks * data.shape.k_width * sizeof(float);
    size_t v_bytes = (size_t)16 * n_blocks * data.shape.v_width * sizeof(float);
    struct guarded scratch, k, v;
    void *at = guarded_init(&scratch, version->scratch_bytes(&data.shape, n_blocks), 0);
    float *moved_k = guarded_copy(&k, data.k, k_bytes, 4);
    float *moved_v = guarded_copy(&v, data.v, v_bytes, 4);
    struct built built = {
        .name = version->name,
        .shape = &data.shape,
        .n_blocks = n_blocks,
        .k = data.k,
        .v = data.v,
        .order = order,
        .view = &view,
        .is_ref_order = data_input == INPUT_EQUAL || data_input == INPUT_STEPS,
    };

    case_view_init(&view, &data.shape, n_blocks);
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &view, at), 0);
    CHECK_EQ(version->build(&data.shape, n_blocks, data.k, data.v, order, &view, at), 0);
    CHECK(!memcmp(order, again, 32 * (size_t)n_blocks));
    built_check(&built);

    moved_v[n_blocks] = NAN;
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &view, at), -EDOM);
    moved_v[n_blocks] = 0;
    moved_k[k_bytes / sizeof(float) - 1] = -INFINITY;
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &view, at), -EDOM);
    case_view_finish(&view);
    guarded_finish(&scratch);
    guarded_finish(&k);
    guarded_finish(&v);
}

/* Blocks are as tight as the reference's, hold each token once, in order of position, and the
 * index says of them what the reference would. */
static void test_build(void)
{
    bool is_small = getenv("WINNOW_TEST_SMALL") != NULL;

    build_check(1);
    build_check(is_small ? 3 : 2);
    if (is_small)
        return;
    build_check(13);
    build_check(N_BLOCKS);
}

static void test_versions__convert(void)
{
    for (int i = 0; i < N_VERSIONS; i++)
        if ((version = version_find(i)))
            test_convert();
}

static void test_versions__block_pack(void)
{
    each(test_block_pack);
}

static void test_versions__build(void)
{
    each(test_build);
}

int main(int argc, char **argv)
{
    versions_init(argc, argv);
    TEST_RUN(test_versions__convert);
    TEST_RUN(test_versions__block_pack);
    TEST_RUN(test_versions__build);
    return TEST_END();
}
