/* Scores against their formulas in fp64, over what the index stores. */
#include "fixture.h"

#include <kernels/ref/oracle.h>
#include <kernels/ref/ref.h>

enum { N_BLOCKS = 12, N_Q = 4 };

struct scene {
    struct fixture_segment segment;
    float *q, ln_e[N_BLOCKS * N_Q];
};

static void scene_init(struct scene *s, struct winnow_rng *rng, uint32_t width, double q_scale)
{
    struct winnow_model_shape shape = fixture_shape(N_Q, width, 32, WINNOW_FP16);

    fixture_segment_init(&s->segment, &shape, N_BLOCKS);
    for (uint32_t i = 0; i < s->segment.n_tokens * width; i++)
        s->segment.k[i] = (float)(winnow_rng_normal(rng) * (1 + i % 3) + i % 5);
    CHECK_EQ(fixture_segment_build(&s->segment), 0);
    s->q = fixture_normal(rng, N_Q * width, q_scale);
}

static void scene_finish(struct scene *s)
{
    fixture_segment_finish(&s->segment);
    winnow_alloc_free(s->q);
}

static void score(struct scene *s, uint32_t policy)
{
    memset(s->ln_e, 0xff, sizeof s->ln_e);
    winnow_kernels_ref()->score(&s->segment.shape, policy, &s->segment.view, s->q, s->ln_e,
                                s->segment.scratch);
}

/* s q.mu of a block, or with a token, s q.(mu + a c). */
static double stored_logit(const struct scene *s, const float *q, uint32_t b, int t)
{
    double sum = 0, a = 0;

    if (t >= 0)
        a = (double)winnow_ref_fp16_to_float(s->segment.view.code_scale[16 * b + (uint32_t)t]);
    for (uint32_t d = 0; d < s->segment.shape.k_width; d++) {
        double k = (double)fixture_centroid(&s->segment, b, d);
        if (t >= 0)
            k += a * fixture_code(&s->segment, b, (uint32_t)t, d);
        sum += (double)q[d] * k;
    }
    return sum * (double)s->segment.shape.softmax_scale;
}

static const uint32_t widths[] = {16, 64, 128, 256};
static const double q_scales[] = {0.3, 2, 30};

/* codes: ln of the sum over the sixteen coded keys; what the query loses at 15 bits is less than a
 * thousandth of a nat for common logits. */
static void test_score__codes_sum_the_coded_keys(void)
{
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (size_t i = 0; i < 12; i++) {
        struct scene s;
        scene_init(&s, &rng, widths[i / 3], q_scales[i % 3]);
        score(&s, WINNOW_POLICY_CODES);
        for (uint32_t b = 0; b < N_BLOCKS; b++)
            for (uint32_t g = 0; g < N_Q; g++) {
                double l[16];
                for (int t = 0; t < 16; t++)
                    l[t] = stored_logit(&s, s.q + g * widths[i / 3], b, t);
                CHECK_NEAR(s.ln_e[b * N_Q + g], winnow_oracle_ln_mass(l, 16, NULL),
                           1e-4 + 1e-3 * q_scales[i % 3]);
            }
        scene_finish(&s);
    }
}

/* The codes tell the mass of a block far better than its centroid does. */
static void test_score__codes_are_near_the_true_mass(void)
{
    struct winnow_rng rng;
    struct scene s;
    double codes = 0, centroid = 0;
    winnow_rng_init(&rng, test_seed());
    scene_init(&s, &rng, 64, 2);

    for (int policy = WINNOW_POLICY_CODES; policy <= WINNOW_POLICY_TACTIC; policy++) {
        score(&s, (uint32_t)policy);
        for (uint32_t g = 0; g < N_Q; g++) {
            double l[16 * N_BLOCKS];
            winnow_oracle_logits(64, 0.125, s.q + g * 64, 16 * N_BLOCKS, s.segment.k, l);
            for (uint32_t b = 0; b < N_BLOCKS; b++) {
                uint32_t idx[16];
                for (uint32_t t = 0; t < 16; t++)
                    idx[t] = s.segment.order[16 * b + t];
                double error =
                    fabs((double)s.ln_e[b * N_Q + g] - winnow_oracle_ln_mass(l, 16, idx));
                *(policy == WINNOW_POLICY_CODES ? &codes : &centroid) += error / (N_Q * N_BLOCKS);
            }
        }
    }
    CHECK(codes < 0.5);
    CHECK(centroid > 4 * codes);
    scene_finish(&s);
}

/* moment: centroid, ln 16 and half the variance of the logit, at most 2; without var the spread. */
static void test_score__moment_and_tactic(void)
{
    struct winnow_rng rng;
    uint32_t n_capped = 0, n_free = 0;
    winnow_rng_init(&rng, test_seed());

    for (size_t i = 0; i < 12; i++) {
        struct scene s;
        uint32_t width = widths[i / 3];
        scene_init(&s, &rng, width, q_scales[i % 3] / 2);
        uint16_t *var = s.segment.view.var;
        for (int kind = 0; kind < 3; kind++) { /* var, no var, tactic */
            s.segment.view.var = kind == 0 ? var : NULL;
            score(&s, kind == 2 ? WINNOW_POLICY_TACTIC : WINNOW_POLICY_MOMENT);
            for (uint32_t b = 0; b < N_BLOCKS; b++)
                for (uint32_t g = 0; g < N_Q; g++) {
                    const float *q = s.q + g * width;
                    double variance = 0, logit = stored_logit(&s, q, b, -1);
                    for (uint32_t d = 0; d < width; d++)
                        variance +=
                            pow((double)q[d], 2) *
                            (double)(kind == 0 ? winnow_ref_fp16_to_float(var[b * width + d])
                                               : s.segment.view.head[b].spread);
                    double half = variance / width / 2; /* s^2 = 1 / width */
                    n_capped += half > 2;
                    n_free += half < 2;
                    CHECK_NEAR(s.ln_e[b * N_Q + g],
                               logit + log(16) + (kind == 2 ? 0 : fmin(half, 2)),
                               1e-4 + 1e-5 * fabs(logit));
                }
        }
        s.segment.view.var = var;
        scene_finish(&s);
    }
    CHECK(n_capped > 0 && n_free > 0);
}

/* A query of zeros sees sixteen equal keys in every block. */
static void test_score__zero_query(void)
{
    struct winnow_rng rng;
    struct scene s;
    winnow_rng_init(&rng, test_seed());
    scene_init(&s, &rng, 64, 0);

    for (int policy = WINNOW_POLICY_CODES; policy <= WINNOW_POLICY_MOMENT; policy++) {
        score(&s, (uint32_t)policy);
        for (uint32_t i = 0; i < N_BLOCKS * N_Q; i++)
            CHECK_NEAR(s.ln_e[i], log(16), 1e-6);
    }
    scene_finish(&s);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_score__codes_sum_the_coded_keys);
    TEST_RUN(test_score__codes_are_near_the_true_mass);
    TEST_RUN(test_score__moment_and_tactic);
    TEST_RUN(test_score__zero_query);
    return TEST_END();
}
