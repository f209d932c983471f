/* Conversions, blocks and the index in every version. Rules and tolerances: versions.h. */
#include <errno.h>

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

/* Sum over blocks of the squared distance of keys to their mean. */
static double order_variance(uint32_t n_blocks, const uint16_t *order)
{
    uint32_t width = data.shape.k_width;
    double total = 0;

    for (uint32_t b = 0; b < n_blocks; b++)
        for (uint32_t d = 0; d < width; d++) {
            double sum = 0, square = 0;
            for (uint32_t t = 0; t < 16; t++) {
                double x = (double)data.k[(size_t)order[16 * b + t] * width + d];
                sum += x;
                square += x * x;
            }
            total += fmax(square - sum * sum / 16, 0);
        }
    return total;
}

static void order_check(uint32_t n_blocks, const uint16_t *order)
{
    uint8_t seen[16 * N_BLOCKS] = {0};

    for (uint32_t i = 0; i < 16 * n_blocks; i++) {
        CHECK(order[i] < 16 * n_blocks && !seen[order[i]]);
        seen[order[i]] = 1;
        CHECK(i % 16 == 0 || order[i - 1] < order[i]);
    }
}

static int code_at(const uint8_t *code, uint32_t b, uint32_t t, uint32_t d)
{
    uint8_t pair = code[(size_t)b * 8 * data.shape.k_width + (d / 8 * 16 + t) * 4 + d % 4];
    return (d % 8 < 4 ? pair & 15 : pair >> 4) - 8;
}

/* A stored number differs by what one step of its neighbour allows: codes and int8 by one. */
static void index_check(const struct winnow_index_view *a, const struct winnow_index_view *b)
{
    uint32_t width = data.shape.k_width, v_width = data.shape.v_width;
    double k_largest = 0, v_largest = value_largest();

    for (size_t i = 0; i < (size_t)16 * b->n_blocks * width; i++)
        k_largest = fmax(k_largest, fabs((double)data.k[i]));
    for (uint32_t i = 0; i < b->n_blocks; i++) {
        const struct winnow_block_head *x = a->head + i, *y = b->head + i;
        check_close("centroid_scale", i, (double)x->centroid_scale, (double)y->centroid_scale,
                    1e-6 * k_largest);
        check_close("vmean_scale", i, (double)x->vmean_scale, (double)y->vmean_scale,
                    1e-6 * v_largest);
        check_close("spread", i, (double)x->spread, (double)y->spread,
                    1e-5 * (double)y->spread + 1e-12 * k_largest * k_largest);
    }
    for (size_t i = 0; i < (size_t)b->n_blocks * width; i++) {
        CHECK(abs(a->centroid[i] - b->centroid[i]) <= 1);
        float x = winnow_ref_fp16_to_float(a->var[i]), y = winnow_ref_fp16_to_float(b->var[i]);
        check_close("var", i, (double)x, (double)y,
                    2e-3 * (double)y + 1e-12 * k_largest * k_largest + 0x1p-24);
    }
    for (size_t i = 0; i < (size_t)b->n_blocks * v_width; i++)
        CHECK(abs(a->vmean[i] - b->vmean[i]) <= 1);
    for (uint32_t d = 0; d < width; d++)
        check_close("mean_k", d, (double)a->mean_k[d], (double)b->mean_k[d], 2e-6 * k_largest);
    for (uint32_t d = 0; d < v_width; d++)
        check_close("mean_v", d, (double)a->mean_v[d], (double)b->mean_v[d], 2e-6 * v_largest);
    CHECK(*a->v_max >= *b->v_max * (1 - 1e-6f));
    check_close("v_max", 0, (double)*a->v_max, (double)*b->v_max,
                2e-5 * (double)*b->v_max + 16 * (double)FLT_MIN);
}

/* Keys, as centroid and code say them, within half a step of the code, and the rounding of all;
 * none farther from the centroid than radius. */
static void codes_check(uint32_t n_blocks, const uint16_t *order,
                        const struct winnow_index_view *view)
{
    uint32_t width = data.shape.k_width;

    for (uint32_t b = 0; b < n_blocks; b++) {
        double radius = 0;
        for (uint32_t t = 0; t < 16; t++) {
            double square = 0, a = (double)winnow_ref_fp16_to_float(view->code_scale[16 * b + t]);
            for (uint32_t d = 0; d < width; d++) {
                double mu = (double)view->centroid[(size_t)b * width + d] *
                            (double)view->head[b].centroid_scale;
                double k = (double)data.k[(size_t)order[16 * b + t] * width + d];
                int c = code_at(view->code, b, t, d);
                square += (k - mu) * (k - mu);
                CHECK(c >= -7 && c <= 7);
                if (isfinite(a))
                    check_close("code", d, mu + a * c, k,
                                0.51 * a + 1e-6 * fabs(mu) + 7 * 0x1p-24 /* a is fp16 */);
            }
            radius = fmax(radius, sqrt(square));
        }
        CHECK((double)view->head[b].radius >= radius * (1 - 1e-7));
        check_close("radius", b, (double)view->head[b].radius, radius,
                    2e-5 * radius + 16 * (double)FLT_MIN);
    }
}

static void build_check(uint32_t n_blocks)
{
    struct winnow_index_view a, b;
    uint16_t order[16 * N_BLOCKS], again[16 * N_BLOCKS], of_ref[16 * N_BLOCKS];
    size_t k_bytes = (size_t)16 * n_blocks * data.shape.k_width * sizeof(float);
    size_t v_bytes = (size_t)16 * n_blocks * data.shape.v_width * sizeof(float);
    struct guarded scratch, k, v;
    void *at = guarded_init(&scratch, version->scratch_bytes(&data.shape, n_blocks), 0);
    float *moved_k = guarded_copy(&k, data.k, k_bytes, 4);
    float *moved_v = guarded_copy(&v, data.v, v_bytes, 4);

    case_view_init(&a, &data.shape, n_blocks);
    case_view_init(&b, &data.shape, n_blocks);
    CHECK_EQ(ref->build(&data.shape, n_blocks, data.k, data.v, of_ref, &b, data.scratch), 0);
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &a, at), 0);
    CHECK_EQ(version->build(&data.shape, n_blocks, data.k, data.v, order, &a, at), 0);
    CHECK(!memcmp(order, again, 32 * (size_t)n_blocks));
    order_check(n_blocks, order);
    CHECK(order_variance(n_blocks, order) <= 1.01 * order_variance(n_blocks, of_ref) + 1e-30);
    if (data_input == INPUT_EQUAL || data_input == INPUT_STEPS)
        CHECK(!memcmp(order, of_ref, 32 * (size_t)n_blocks));
    winnow_ref_index_fill(&data.shape, n_blocks, data.k, data.v, order, &b);
    index_check(&a, &b);
    codes_check(n_blocks, order, &a);

    moved_v[n_blocks] = NAN;
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &a, at), -EDOM);
    moved_v[n_blocks] = 0;
    moved_k[k_bytes / sizeof(float) - 1] = -INFINITY;
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &a, at), -EDOM);
    case_view_finish(&a);
    case_view_finish(&b);
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
