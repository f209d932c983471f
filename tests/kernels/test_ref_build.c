/* Building: blocks are balanced and close, and the index says the truth of its own members. */
#include "fixture.h"

#include <errno.h>
#include <kernels/ref/ref.h>

static void segment_random(struct fixture_segment *segment, struct winnow_rng *rng,
                           uint32_t k_width, uint32_t v_width, uint32_t n_blocks)
{
    struct winnow_model_shape shape = fixture_shape(1, k_width, v_width, WINNOW_FP16);

    fixture_segment_init(segment, &shape, n_blocks);
    for (uint32_t i = 0; i < segment->n_tokens * k_width; i++)
        segment->k[i] = (float)winnow_rng_normal(rng);
    for (uint32_t i = 0; i < segment->n_tokens * v_width; i++)
        segment->v[i] = (float)winnow_rng_normal(rng);
}

static void check_permutation(const struct fixture_segment *segment)
{
    uint8_t seen[65536] = {0};

    for (uint32_t i = 0; i < segment->n_tokens; i++) {
        CHECK(segment->order[i] < segment->n_tokens);
        CHECK_EQ(seen[segment->order[i]]++, 0);
        if (i % 16 > 0)
            CHECK(segment->order[i] > segment->order[i - 1]);
    }
}

/* Every token is in one block of 16, in order of position, whatever the number of blocks. */
static void test_build__order_is_a_permutation(void)
{
    static const uint32_t n_blocks[] = {1, 2, 3, 5, 31, 64};
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (size_t i = 0; i < sizeof n_blocks / sizeof n_blocks[0]; i++) {
        struct fixture_segment segment;
        segment_random(&segment, &rng, i % 2 ? 64 : 16, 32, n_blocks[i]);
        CHECK_EQ(fixture_segment_build(&segment), 0);
        check_permutation(&segment);
        fixture_segment_finish(&segment);
    }
}

/* Equal keys have no direction: they stay in order of position. */
static void test_build__equal_keys_stay_in_order(void)
{
    struct fixture_segment segment;
    struct winnow_model_shape shape = fixture_shape(1, 64, 64, WINNOW_FP16);

    fixture_segment_init(&segment, &shape, 33);
    for (uint32_t i = 0; i < segment.n_tokens * 64; i++)
        segment.k[i] = 0.5f + (float)(i % 64);
    CHECK_EQ(fixture_segment_build(&segment), 0);
    for (uint32_t i = 0; i < segment.n_tokens; i++)
        CHECK_EQ(segment.order[i], i);
    CHECK_NEAR(segment.view.head[7].spread, 0, 1e-12);
    fixture_segment_finish(&segment);
}

/* Keys on a line are cut along it: each block is an interval, the lower half left; equal ones are
 * parted by position. */
static void test_build__cuts_along_the_widest_direction(void)
{
    struct fixture_segment segment;
    struct winnow_model_shape shape = fixture_shape(1, 32, 16, WINNOW_FP16);

    fixture_segment_init(&segment, &shape, 8);
    for (uint32_t t = 0; t < segment.n_tokens; t++)
        for (uint32_t d = 0; d < 32; d++)
            segment.k[t * 32 + d] = d == 9 ? (float)(t * 37 % 128 / 4) : 0.01f * (float)(t % 2);
    CHECK_EQ(fixture_segment_build(&segment), 0);
    check_permutation(&segment);
    for (uint32_t b = 0; b < 8; b++)
        for (uint32_t j = 0; j < 16; j++) {
            float x = segment.k[segment.order[16 * b + j] * 32 + 9];
            CHECK(x >= 4 * (float)b && x < 4 * (float)(b + 1));
        }
    fixture_segment_finish(&segment);
}

/* Of three blocks the left half gets two, and cuts them along its own widest direction. */
static void test_build__left_half_is_the_larger(void)
{
    struct fixture_segment segment;
    struct winnow_model_shape shape = fixture_shape(1, 16, 16, WINNOW_FP16);

    fixture_segment_init(&segment, &shape, 3);
    for (uint32_t t = 0; t < 48; t++) {
        segment.k[t * 16 + 3] = (float)t;
        segment.k[t * 16 + 8] = t >= 32 ? 0 : t % 2 ? 10 : -10;
    }
    CHECK_EQ(fixture_segment_build(&segment), 0);
    for (uint32_t j = 0; j < 16; j++) {
        CHECK_EQ(segment.order[j] % 2, segment.order[0] % 2);
        CHECK_EQ(segment.order[16 + j] % 2, 1 - segment.order[0] % 2);
        CHECK_EQ(segment.order[32 + j], 32 + j);
    }
    fixture_segment_finish(&segment);
}

/* Blocks of clustered keys vary less than runs of positions: the reason for building them. */
static void test_build__blocks_are_closer_than_positions(void)
{
    struct fixture_segment segment;
    struct winnow_rng rng;
    double inside = 0, runs = 0;
    winnow_rng_init(&rng, test_seed());

    segment_random(&segment, &rng, 64, 64, 64);
    for (uint32_t t = 0; t < segment.n_tokens; t++)
        segment.k[t * 64 + winnow_rng_below(&rng, 8)] += 12;
    CHECK_EQ(fixture_segment_build(&segment), 0);
    for (uint32_t b = 0; b < 64; b++) {
        inside += (double)segment.view.head[b].spread;
        for (uint32_t d = 0; d < 64; d++) {
            double sum = 0, square = 0;
            for (uint32_t t = 16 * b; t < 16 * b + 16; t++) {
                sum += (double)segment.k[t * 64 + d] / 16;
                square += (double)segment.k[t * 64 + d] * (double)segment.k[t * 64 + d] / 16;
            }
            runs += (square - sum * sum) / 64;
        }
    }
    CHECK(inside < 0.7 * runs);
    fixture_segment_finish(&segment);
}

/* A key is its centroid and its code, within half a step, at most seven steps of it a dimension. */
static void test_index__codes_round_trip(void)
{
    struct fixture_segment segment;
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    segment_random(&segment, &rng, 48, 16, 24);
    CHECK_EQ(fixture_segment_build(&segment), 0);

    for (uint32_t i = 0; i < segment.n_tokens; i++) {
        const float *k = segment.k + segment.order[i] * 48;
        double a = (double)winnow_ref_fp16_to_float(segment.view.code_scale[i]), largest = 0;
        for (uint32_t d = 0; d < 48; d++) {
            double x = (double)k[d] - (double)fixture_centroid(&segment, i / 16, d);
            int c = fixture_code(&segment, i / 16, i % 16, d);
            CHECK(c >= -7 && c <= 7);
            CHECK_NEAR(a * c, x, a * 0.5 + fabs(x) * 0x1p-10);
            largest = fmax(largest, fabs(x));
        }
        CHECK_NEAR(a, largest / 7, largest * 0x1p-10);
    }
    fixture_segment_finish(&segment);
}

/* Centroid, value mean, variance, radius and the segment's means are those of the members. */
static void test_index__tells_of_its_members(void)
{
    struct fixture_segment segment;
    struct winnow_rng rng;
    double length_max = 0;
    winnow_rng_init(&rng, test_seed());
    segment_random(&segment, &rng, 64, 32, 6);
    CHECK_EQ(fixture_segment_build(&segment), 0);

    for (uint32_t b = 0; b < 6; b++) {
        const struct winnow_block_head *head = &segment.view.head[b];
        double spread = 0, radius = 0;
        for (uint32_t d = 0; d < 64; d++) {
            double mean = 0, var = 0;
            for (uint32_t j = 0; j < 16; j++)
                mean += (double)segment.k[segment.order[16 * b + j] * 64 + d] / 16;
            for (uint32_t j = 0; j < 16; j++)
                var += pow((double)segment.k[segment.order[16 * b + j] * 64 + d] - mean, 2) / 16;
            CHECK_NEAR(fixture_centroid(&segment, b, d), mean,
                       0.501 * (double)head->centroid_scale);
            CHECK_NEAR(winnow_ref_fp16_to_float(segment.view.var[b * 64 + d]), var, var * 0x1p-10);
            spread += var / 64;
        }
        for (uint32_t j = 0; j < 16; j++) {
            double square = 0, length = 0;
            for (uint32_t d = 0; d < 64; d++)
                square += pow((double)segment.k[segment.order[16 * b + j] * 64 + d] -
                                  (double)fixture_centroid(&segment, b, d),
                              2);
            for (uint32_t d = 0; d < 32; d++)
                length += pow((double)segment.v[segment.order[16 * b + j] * 32 + d], 2);
            radius = fmax(radius, sqrt(square));
            length_max = fmax(length_max, sqrt(length));
        }
        for (uint32_t d = 0; d < 32; d++) {
            double mean = 0;
            for (uint32_t j = 0; j < 16; j++)
                mean += (double)segment.v[segment.order[16 * b + j] * 32 + d] / 16;
            CHECK_NEAR((float)segment.view.vmean[b * 32 + d] * head->vmean_scale, mean,
                       0.501 * (double)head->vmean_scale);
        }
        CHECK_NEAR(head->spread, spread, 1e-5);
        CHECK(radius <= (double)head->radius && (double)head->radius <= radius * 1.000001);
    }
    CHECK(length_max <= (double)*segment.view.v_max &&
          (double)*segment.view.v_max <= length_max * 1.000001);
    for (uint32_t d = 0; d < 64; d++) {
        double mean = 0;
        for (uint32_t t = 0; t < segment.n_tokens; t++)
            mean += (double)segment.k[t * 64 + d] / segment.n_tokens;
        CHECK_NEAR(segment.view.mean_k[d], mean, 1e-6);
    }
    fixture_segment_finish(&segment);
}

/* One NaN or Inf anywhere in K or V refuses the segment. */
static void test_build__refuses_what_is_not_finite(void)
{
    struct fixture_segment segment;
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    segment_random(&segment, &rng, 16, 16, 2);

    for (int i = 0; i < 64; i++) {
        float *x = i % 2 ? segment.k : segment.v;
        uint64_t at = winnow_rng_below(&rng, 32 * 16);
        float kept = x[at];
        x[at] = i % 3 ? NAN : -INFINITY;
        CHECK_EQ(fixture_segment_build(&segment), -EDOM);
        x[at] = kept;
    }
    CHECK_EQ(fixture_segment_build(&segment), 0);
    fixture_segment_finish(&segment);
}

/* Huge and tiny keys build too; where a code cannot hold a key, its block's estimate is unknown
 * and so the block is always read. */
static void test_build__survives_extremes(void)
{
    static const float scales[] = {0, 1e-44f, 1e-30f, 1e5f, 1e30f};
    struct fixture_segment segment;
    struct winnow_rng rng;
    float q[64], ln_e[4];
    winnow_rng_init(&rng, test_seed());

    for (size_t i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        segment_random(&segment, &rng, 64, 64, 4);
        for (uint32_t j = 0; j < segment.n_tokens * 64; j++)
            segment.k[j] *= scales[i];
        CHECK_EQ(fixture_segment_build(&segment), 0);
        check_permutation(&segment);
        for (uint32_t d = 0; d < 64; d++)
            q[d] = 1e-3f;
        winnow_kernels_ref()->score(&segment.shape, WINNOW_POLICY_CODES, &segment.view, q, ln_e,
                                    segment.scratch);
        for (uint32_t b = 0; b < 4; b++)
            CHECK(isfinite(ln_e[b]) == (scales[i] < 1e29f));
        fixture_segment_finish(&segment);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_build__order_is_a_permutation);
    TEST_RUN(test_build__equal_keys_stay_in_order);
    TEST_RUN(test_build__cuts_along_the_widest_direction);
    TEST_RUN(test_build__left_half_is_the_larger);
    TEST_RUN(test_build__blocks_are_closer_than_positions);
    TEST_RUN(test_index__codes_round_trip);
    TEST_RUN(test_index__tells_of_its_members);
    TEST_RUN(test_build__refuses_what_is_not_finite);
    TEST_RUN(test_build__survives_extremes);
    return TEST_END();
}
