/* NaN and Inf: refused where they come in, without effect where nothing is or nothing counts. */
#include "drawn.h"

#include <errno.h>

enum { N_MASKED = 60000, N_REFUSED = 30000, N_UNKNOWN = 10000, WIDTH = 32, N_POS = 3 };

static void check_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        CHECK(isfinite(x[i]));
}

/* Poison behind the last token of a part-filled block, in scratch and in outputs. */
static void test_poison__where_no_token_is(void)
{
    static float out[N_POS * WINNOW_GQA_MAX * WIDTH], lse[N_POS * WINNOW_GQA_MAX];
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    for (uint32_t i = 0; i < N_MASKED; i++) {
        struct drawn drawn;
        drawn_init(&drawn, &rng, WIDTH, 40);
        uint32_t n_pos = i % 2 && drawn.n_tokens >= N_POS ? N_POS : 1;
        memset(out, 0xff, sizeof out);
        memset(lse, 0xff, sizeof lse);
        if (i % 2)
            drawn_window(&drawn, &rng, n_pos, out, lse);
        else
            drawn_attend(&drawn, out, lse);
        check_finite(out, (size_t)n_pos * drawn.n_q * drawn.shape.v_width);
        check_finite(lse, (size_t)n_pos * drawn.n_q);
        drawn_finish(&drawn);
    }
    TEST_ROW(F13, N_MASKED);
}

/* The bits of a number that is none, in a type of so many bytes. */
static uint32_t bad_bits(struct winnow_rng *rng, uint32_t dtype)
{
    uint32_t sign = (uint32_t)winnow_rng_below(rng, 2), fraction = (uint32_t)winnow_rng_next(rng);
    if (winnow_rng_below(rng, 3) == 0)
        fraction = 0; /* Inf */
    if (dtype == WINNOW_FP32)
        return sign << 31 | 0x7f800000 | (fraction & 0x7fffff);
    return sign << 15 |
           (dtype == WINNOW_FP16 ? 0x7c00 | (fraction & 0x3ff) : 0x7f80 | (fraction & 0x7f));
}

/* One such number anywhere among good ones of any type and length is refused, both ways. */
static void test_poison__is_refused_at_the_door(void)
{
    enum { N_MAX = 80 };
    uint8_t wire[4 * N_MAX];
    float number[N_MAX];
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    for (uint32_t i = 0; i < N_REFUSED; i++) {
        const struct winnow_kernels *kernels = drawn_kernels(&rng);
        uint32_t dtype = WINNOW_BF16 + (uint32_t)winnow_rng_below(&rng, 3);
        size_t element_bytes = dtype == WINNOW_FP32 ? 4 : 2;
        size_t n = 1 + winnow_rng_below(&rng, N_MAX), at = winnow_rng_below(&rng, n);
        for (size_t j = 0; j < n; j++)
            number[j] = (float)winnow_rng_normal(&rng);
        CHECK_EQ(kernels->from_float(dtype, n, number, wire), 0);
        CHECK_EQ(kernels->to_float(dtype, n, wire, number), 0);
        uint32_t bits = bad_bits(&rng, dtype), wide = bad_bits(&rng, WINNOW_FP32);
        memcpy(wire + at * element_bytes, &bits, element_bytes);
        memcpy(&number[at], &wide, sizeof wide);
        CHECK_EQ(kernels->from_float(dtype, n, number, (uint8_t[4 * N_MAX]){0}), -EDOM);
        CHECK_EQ(kernels->to_float(dtype, n, wire, number), -EDOM);
    }
    TEST_ROW(F13, N_REFUSED);
}

/* Estimates that are NaN or Inf are read first; what is then made of the rest stays finite. */
static void test_poison__of_an_estimate_reads_the_block(void)
{
    enum { N_BLOCKS = 12, N_Q = 2 };
    struct winnow_rng rng;
    struct fixture_segment segment;
    struct fixture_selection f;
    float acc[N_Q * (WIDTH + 2)], out[N_Q * WIDTH], lse[N_Q];
    struct winnow_model_shape shape = fixture_shape(N_Q, WIDTH, WIDTH, WINNOW_FP16);
    winnow_rng_init(&rng, test_seed());
    fixture_segment_init(&segment, &shape, N_BLOCKS);
    for (uint32_t i = 0; i < segment.n_tokens * WIDTH; i++) {
        segment.k[i] = (float)winnow_rng_normal(&rng);
        segment.v[i] = (float)winnow_rng_normal(&rng);
    }
    CHECK_EQ(fixture_segment_build(&segment), 0);
    fixture_selection_init(&f, N_Q, N_BLOCKS, 0.7f);
    f.ln_z[0] = f.ln_z[1] = -INFINITY;
    for (uint32_t i = 0; i < N_UNKNOWN; i++) {
        const struct winnow_kernels *kernels = drawn_kernels(&rng);
        uint32_t bad = (uint32_t)winnow_rng_below(&rng, N_BLOCKS);
        for (uint32_t j = 0; j < N_BLOCKS * N_Q; j++)
            f.sel.ln_e[j] = (float)(3 * winnow_rng_normal(&rng));
        f.sel.ln_e[bad * N_Q + i % N_Q] = i % 3 ? NAN : INFINITY;
        kernels->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
        CHECK_EQ(f.sel.block_idx[0], bad);
        CHECK_EQ(f.sel.selected[bad], 1);
        memset(acc, 0, sizeof acc);
        acc[0] = acc[WIDTH + 2] = -INFINITY;
        kernels->compensate(&shape, &segment.view, &f.sel, 0, acc);
        kernels->finish(&shape, acc, out, lse);
        check_finite(out, N_Q * WIDTH);
        CHECK(!isnan(lse[0]) && !isnan(lse[1]));
    }
    fixture_selection_finish(&f);
    fixture_segment_finish(&segment);
    TEST_ROW(F13, N_UNKNOWN);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_poison__where_no_token_is);
    TEST_RUN(test_poison__is_refused_at_the_door);
    TEST_RUN(test_poison__of_an_estimate_reads_the_block);
    return TEST_END();
}
