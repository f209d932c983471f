/* Exact attention, case after case drawn by chance, against dense attention in fp64. */
#include "drawn.h"

#include <kernels/ref/oracle.h>

enum { N_CASES = 10000, N_POS_MAX = 8 };

static float out[N_POS_MAX * WINNOW_GQA_MAX * WINNOW_WIDTH_MAX], lse[N_POS_MAX * WINNOW_GQA_MAX];
static double error_max[WINNOW_FP32 + 1]; /* by dtype */

/* The distance from what the oracle makes of the first n_seen tokens, relative to its length, or to
 * that of a mean of as many values as there can be: less is what chance cancelled. */
static double error_of(const struct drawn *drawn, uint32_t head, uint32_t n_seen, const float *got)
{
    static double logit[DRAWN_TOKENS_MAX], dense[WINNOW_WIDTH_MAX];
    uint32_t k_width = drawn->shape.k_width, v_width = drawn->shape.v_width;
    double difference = 0, square = 0;
    winnow_oracle_logits(k_width, (double)drawn->shape.softmax_scale, drawn->q + head * k_width,
                         n_seen, drawn->k, logit);
    winnow_oracle_attend(v_width, logit, n_seen, drawn->v, dense);
    for (uint32_t d = 0; d < v_width; d++) {
        difference += pow((double)got[d] - dense[d], 2);
        square += dense[d] * dense[d];
    }
    return sqrt(difference / fmax(square, (double)v_width / DRAWN_TOKENS_MAX));
}

static void case_check(struct winnow_rng *rng)
{
    struct drawn drawn;
    drawn_init(&drawn, rng, winnow_rng_below(rng, 8) ? 96 : WINNOW_WIDTH_MAX, DRAWN_TOKENS_MAX);
    uint32_t n_pos = (uint32_t)winnow_rng_below(rng, N_POS_MAX + 1);
    n_pos = n_pos < drawn.n_tokens ? n_pos : drawn.n_tokens;
    memset(out, 0xff, sizeof out);
    if (n_pos)
        drawn_window(&drawn, rng, n_pos, out, lse);
    else
        drawn_attend(&drawn, out, lse);
    uint32_t pos = n_pos ? (uint32_t)winnow_rng_below(rng, n_pos) : 0;
    uint32_t n_seen = n_pos ? drawn.n_tokens - n_pos + pos + 1 : drawn.n_tokens;
    for (uint32_t head = 0; head < drawn.n_q; head++) {
        const float *got = out + (pos * drawn.n_q + head) * drawn.shape.v_width;
        double error = error_of(&drawn, head, n_seen, got);
        error = isnan(error) ? INFINITY : error;
        error_max[drawn.shape.kv_dtype] = fmax(error_max[drawn.shape.kv_dtype], error);
    }
    drawn_finish(&drawn);
}

/* Any shape, any dtype at rest, any number of tokens, a step or a window, every version. */
static void test_exact__cases_by_chance_equal_dense(void)
{
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    for (uint32_t i = 0; i < N_CASES; i++)
        case_check(&rng);
    printf("%d cases: relative error at most %.1e (fp32), %.1e (fp16), %.1e (bf16)\n", N_CASES,
           error_max[WINNOW_FP32], error_max[WINNOW_FP16], error_max[WINNOW_BF16]);
    CHECK(error_max[WINNOW_FP32] <= 1e-5);
    CHECK(error_max[WINNOW_FP16] <= 2e-3);
    CHECK(error_max[WINNOW_BF16] <= 1.6e-2);
    TEST_ROW(F12, N_CASES);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_exact__cases_by_chance_equal_dense);
    return TEST_END();
}
