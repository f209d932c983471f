#include <examples/smollm2/quant.h>
#include <test.h>

enum { N_ITEMS = 576, N_ROWS = 37, ROW_BYTES_MAX = N_ITEMS / 32 * 34 };

static uint8_t rows[N_ROWS * ROW_BYTES_MAX];
static uint64_t state;

static uint32_t draw(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static float draw_float(void)
{
    return (float)(int32_t)draw() / 0x1p31f;
}

static void put_half(uint8_t *bytes, float value)
{
    _Float16 half = (_Float16)value;
    memcpy(bytes, &half, sizeof half);
}

static void fill_rows(uint32_t type)
{
    const uint32_t block_bytes = type == QUANT_Q4_1 ? 20 : 34;
    for (uint32_t i = 0; i < N_ROWS * N_ITEMS / 32; i++) {
        uint8_t *block = rows + i * block_bytes;
        for (uint32_t j = 0; j < block_bytes; j++)
            block[j] = (uint8_t)draw();
        put_half(block, 0.02f * draw_float());
        if (type == QUANT_Q4_1)
            put_half(block + 2, 0.1f * draw_float());
    }
}

static void check_version(uint32_t type, quant_dot_fn *dot, const char *name, float scale)
{
    struct quant_vector vector;
    float x[N_ITEMS], row[N_ITEMS], out[N_ROWS + 1];

    CHECK_EQ(quant_vector_create(&vector, N_ITEMS), 0);
    for (uint32_t i = 0; i < N_ITEMS; i++)
        x[i] = scale * draw_float() * (i % 97 ? 1 : 30);
    quant_vector_pack(&vector, x, N_ITEMS);
    out[N_ROWS] = 77;
    dot(type, rows, N_ROWS, &vector, out);
    CHECK(out[N_ROWS] == 77);
    for (uint32_t r = 0; r < N_ROWS; r++) {
        double sum = 0, size = 0;
        quant_row_unpack(type, rows + r * quant_row_bytes(type, N_ITEMS), N_ITEMS, row);
        for (uint32_t i = 0; i < N_ITEMS; i++) {
            sum += (double)row[i] * (double)x[i];
            size += fabs((double)row[i] * (double)x[i]);
        }
        if (!(fabs((double)out[r] - sum) <= 5e-5 * size)) {
            printf("%s: row %u: %g, expected %g\n", name, r, (double)out[r], sum);
            CHECK(!"a product differs");
        }
    }
    quant_vector_destroy(&vector);
}

/* Every version's product equals that of the unpacked weights to 5e-5 of the sum of magnitudes. */
static void test_quant__products_equal_unpacked_ones(void)
{
    const uint32_t types[] = {QUANT_Q4_1, QUANT_Q8_0};
    const char *name;
    quant_dot_fn *dot;

    state = test_seed();
    for (uint32_t t = 0; t < 2; t++) {
        fill_rows(types[t]);
        for (uint32_t version = 0; (dot = quant_dot_version(version, &name)) != NULL; version++) {
            check_version(types[t], dot, name, 1);
            check_version(types[t], dot, name, 1e-20f);
            check_version(types[t], dot, name, 0);
        }
    }
}

/* Integer sums hold at the largest weights and items: nothing saturates or wraps. */
static void test_quant__extremes_do_not_overflow(void)
{
    const char *name;
    quant_dot_fn *dot;
    struct quant_vector vector;
    float x[32], out[1];
    uint8_t q8[34], q4[20];

    put_half(q8, 1);
    memset(q8 + 2, 0x80, 32); /* -128 */
    put_half(q4, 1);
    put_half(q4 + 2, -3);
    memset(q4 + 4, 0xff, 16);
    for (uint32_t i = 0; i < 32; i++)
        x[i] = -5;
    CHECK_EQ(quant_vector_create(&vector, 32), 0);
    quant_vector_pack(&vector, x, 32);
    for (uint32_t version = 0; (dot = quant_dot_version(version, &name)) != NULL; version++) {
        dot(QUANT_Q8_0, q8, 1, &vector, out);
        CHECK_NEAR(out[0], 32 * 128 * 5, 0.01);
        dot(QUANT_Q4_1, q4, 1, &vector, out);
        CHECK_NEAR(out[0], 32 * (15 - 3) * -5, 0.01);
    }
    quant_vector_destroy(&vector);
}

/* A nibble's place in the block: low ones first, high ones 16 later; halves decode exactly. */
static void test_quant__blocks_unpack_in_order(void)
{
    uint8_t block[34] = {0};
    float out[32];

    put_half(block, 0.5f);
    put_half(block + 2, -2);
    block[4] = 0x3f;
    quant_row_unpack(QUANT_Q4_1, block, 32, out);
    CHECK_NEAR(out[0], 15 * 0.5 - 2, 0);
    CHECK_NEAR(out[16], 3 * 0.5 - 2, 0);
    CHECK_NEAR(out[1], -2, 0);

    put_half(block, 0x1p-24f); /* the smallest subnormal half */
    block[2] = (uint8_t)-7;
    quant_row_unpack(QUANT_Q8_0, block, 32, out);
    CHECK_NEAR(out[0], -7 * 0x1p-24, 0);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_quant__products_equal_unpacked_ones);
    TEST_RUN(test_quant__extremes_do_not_overflow);
    TEST_RUN(test_quant__blocks_unpack_in_order);
    return TEST_END();
}
