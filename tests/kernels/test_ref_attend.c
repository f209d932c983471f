/* Attention over blocks, windows, merging and compensation against dense attention in fp64. */
#include "fixture.h"

#include <kernels/ref/oracle.h>

enum { N_TOKENS_MAX = 400, WIDTH_MAX = 256 };

/* K and V of a context, and their blocks in order of position. */
struct context {
    struct winnow_model_shape shape;
    uint32_t n_q, n_tokens, n_blocks;
    float *k, *v;
    char *block;
    const void *block_at[N_TOKENS_MAX / 16];
    uint64_t position[N_TOKENS_MAX / 16];
    uint32_t n_in_block[N_TOKENS_MAX / 16];
};

static void context_init(struct context *c, struct winnow_rng *rng,
                         const struct winnow_model_shape *shape, uint32_t n_tokens)
{
    *c = (struct context){.shape = *shape, .n_q = shape->n_q_heads, .n_tokens = n_tokens};
    c->n_blocks = (n_tokens + 15) / 16;
    c->k = fixture_normal(rng, (size_t)n_tokens * shape->k_width, 1);
    c->v = fixture_normal(rng, (size_t)n_tokens * shape->v_width, 1);
    c->block = winnow_alloc_array(c->n_blocks, winnow_block_bytes(shape));
    memset(c->block, 0xff, (size_t)c->n_blocks * winnow_block_bytes(shape)); /* NaN */
    for (uint32_t i = 0; i < c->n_blocks; i++) {
        char *block = c->block + (size_t)i * winnow_block_bytes(shape);
        uint32_t n = n_tokens - 16 * i < 16 ? n_tokens - 16 * i : 16;
        winnow_kernels_ref()->block_pack(shape, 0, n, c->k + 16 * i * shape->k_width,
                                         c->v + 16 * i * shape->v_width, block);
        c->block_at[i] = block;
        c->position[i] = 16 * i;
        c->n_in_block[i] = n;
    }
}

static void context_finish(struct context *c)
{
    winnow_alloc_free(c->k);
    winnow_alloc_free(c->v);
    winnow_alloc_free(c->block);
}

static void clear(const struct context *c, uint32_t n, float *acc)
{
    memset(acc, 0, n * winnow_partial_floats(&c->shape) * sizeof *acc);
    for (uint32_t row = 0; row < n * c->n_q; row++)
        acc[row * (c->shape.v_width + 2)] = -INFINITY;
}

/* The oracle over the first n_seen tokens, against out and lse of one query head. */
static void check_against_oracle(const struct context *c, const float *q, uint32_t n_seen,
                                 const float *out, float lse, double tolerance)
{
    double l[N_TOKENS_MAX], dense[WIDTH_MAX], difference = 0, square = 0;

    winnow_oracle_logits(c->shape.k_width, (double)c->shape.softmax_scale, q, n_seen, c->k, l);
    double dense_lse = winnow_oracle_attend(c->shape.v_width, l, n_seen, c->v, dense);
    for (uint32_t d = 0; d < c->shape.v_width; d++) {
        difference += pow((double)out[d] - dense[d], 2);
        square += dense[d] * dense[d];
    }
    CHECK(sqrt(difference / square) <= tolerance);
    CHECK_NEAR(lse, dense_lse, tolerance * 2);
}

/* All blocks in groups of eight, merged in list order. */
static void attend_all(const struct context *c, const float *q, float *acc, float *ln_m)
{
    const struct winnow_kernels *ref = winnow_kernels_ref();
    float partial[16 * (WIDTH_MAX + 2)];

    clear(c, 1, acc);
    for (uint32_t first = 0; first < c->n_blocks; first += 8) {
        uint32_t n = c->n_blocks - first < 8 ? c->n_blocks - first : 8;
        memset(partial, 0xff, sizeof partial);
        ref->attend_partial(&c->shape, q, n, c->block_at + first, c->n_in_block + first, partial,
                            ln_m ? ln_m + first * c->n_q : NULL);
        ref->merge(&c->shape, 1, partial, acc);
    }
}

static const struct {
    uint32_t n_q, k_width, v_width;
} shapes[] = {{1, 64, 64}, {3, 64, 64}, {7, 128, 128}, {4, 128, 64}, {16, 16, 16}, {2, 256, 256}};
static const double tolerances[] = {
    [WINNOW_BF16] = 1.6e-2, [WINNOW_FP16] = 2e-3, [WINNOW_FP32] = 1e-5};

/* Attend and merge give dense attention, for every type at rest, width and ratio of heads. */
static void test_attend__equals_the_oracle(void)
{
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (uint32_t dtype = WINNOW_BF16; dtype <= WINNOW_FP32; dtype++) {
            struct winnow_model_shape shape =
                fixture_shape(shapes[i].n_q, shapes[i].k_width, shapes[i].v_width, dtype);
            struct context c;
            float acc[16 * (WIDTH_MAX + 2)], out[16 * WIDTH_MAX], lse[16];
            context_init(&c, &rng, &shape, 1 + (uint32_t)winnow_rng_below(&rng, N_TOKENS_MAX));
            float *q = fixture_normal(&rng, c.n_q * shape.k_width, 1.5);
            attend_all(&c, q, acc, NULL);
            winnow_kernels_ref()->finish(&shape, acc, out, lse);
            for (uint32_t g = 0; g < c.n_q; g++)
                check_against_oracle(&c, q + g * shape.k_width, c.n_tokens, out + g * shape.v_width,
                                     lse[g], tolerances[dtype]);
            winnow_alloc_free(q);
            context_finish(&c);
        }
}

/* The mass of each block is told as it is attended, part-filled ones too. */
static void test_attend__tells_the_mass_of_each_block(void)
{
    struct winnow_model_shape shape = fixture_shape(3, 64, 64, WINNOW_FP32);
    struct winnow_rng rng;
    struct context c;
    float acc[3 * 66], ln_m[3 * N_TOKENS_MAX / 16];
    double l[N_TOKENS_MAX];
    winnow_rng_init(&rng, test_seed());
    context_init(&c, &rng, &shape, 333);
    float *q = fixture_normal(&rng, 3 * 64, 3);

    attend_all(&c, q, acc, ln_m);
    for (uint32_t g = 0; g < 3; g++) {
        winnow_oracle_logits(64, 0.125, q + g * 64, 333, c.k, l);
        for (uint32_t b = 0; b < c.n_blocks; b++)
            CHECK_NEAR(ln_m[b * 3 + g], winnow_oracle_ln_mass(l + 16 * b, c.n_in_block[b], NULL),
                       1e-5);
    }
    winnow_alloc_free(q);
    context_finish(&c);
}

/* Nothing attended: output 0, log-sum-exp -inf; and merging nothing changes nothing. */
static void test_attend__nothing_is_nothing(void)
{
    struct winnow_model_shape shape = fixture_shape(2, 16, 16, WINNOW_FP32);
    struct winnow_rng rng;
    struct context c;
    float acc[2 * 18], empty[2 * 18], before[2 * 18], out[32], lse[2];
    winnow_rng_init(&rng, test_seed());
    context_init(&c, &rng, &shape, 20);
    float *q = fixture_normal(&rng, 32, 1);

    winnow_kernels_ref()->attend_partial(&shape, q, 0, NULL, NULL, empty, NULL);
    winnow_kernels_ref()->finish(&shape, empty, out, lse);
    for (uint32_t g = 0; g < 2; g++) {
        CHECK(lse[g] == -INFINITY);
        for (uint32_t d = 0; d < 16; d++)
            CHECK(out[g * 16 + d] == 0);
    }
    attend_all(&c, q, acc, NULL);
    memcpy(before, acc, sizeof acc);
    winnow_kernels_ref()->merge(&shape, 1, empty, acc);
    CHECK(!memcmp(before, acc, sizeof acc));
    winnow_kernels_ref()->merge(&shape, 1, acc, empty);
    CHECK(!memcmp(empty, acc, sizeof acc));
    winnow_alloc_free(q);
    context_finish(&c);
}

/* One logit far above all others takes all of the weight; equal logits share it. */
static void test_attend__extreme_logits(void)
{
    struct winnow_model_shape shape = fixture_shape(1, 16, 16, WINNOW_FP32);
    struct winnow_rng rng;
    struct context c;
    float acc[18], out[16], lse, q[16] = {0};
    winnow_rng_init(&rng, test_seed());
    context_init(&c, &rng, &shape, 160);

    attend_all(&c, q, acc, NULL); /* all logits 0 */
    winnow_kernels_ref()->finish(&shape, acc, out, &lse);
    CHECK_NEAR(lse, log(160), 1e-5);
    check_against_oracle(&c, q, 160, out, lse, 1e-5);
    for (uint32_t d = 0; d < 16; d++)
        q[d] = copysignf(1e38f, c.k[77 * 16 + d]);
    attend_all(&c, q, acc, NULL);
    winnow_kernels_ref()->finish(&shape, acc, out, &lse);
    for (uint32_t d = 0; d < 16; d++)
        CHECK(isfinite(out[d]));
    CHECK(isfinite(lse) && lse > 1e38f); /* the logit itself is beyond fp32 */
    context_finish(&c);
}

/* A window sees what lies before each of its positions, no more, and sealed blocks whole; given in
 * pieces it goes on from where it was. */
static void test_window__is_causal(void)
{
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (uint32_t dtype = WINNOW_BF16; dtype <= WINNOW_FP32; dtype++) {
        enum { N_POS = 37, FIRST = 90, N_SEALED = 3 };
        struct winnow_model_shape shape = fixture_shape(3, 64, 32, dtype);
        struct context c;
        static float acc[N_POS * 3 * 34];
        float out[3 * 32], lse[3];
        context_init(&c, &rng, &shape, FIRST + N_POS);
        float *q = fixture_normal(&rng, N_POS * 3 * 64, 1.5);
        for (uint32_t i = 0; i < N_SEALED; i++)
            c.position[i] = UINT64_MAX;
        clear(&c, N_POS, acc);
        for (uint32_t first = 0; first < c.n_blocks; first += 4) {
            uint32_t n = c.n_blocks - first < 4 ? c.n_blocks - first : 4;
            winnow_kernels_ref()->attend_window(&shape, N_POS, FIRST, q, n, c.block_at + first,
                                                c.position + first, c.n_in_block + first, acc,
                                                NULL);
        }
        for (uint32_t pos = 0; pos < N_POS; pos++) {
            winnow_kernels_ref()->finish(&shape, acc + pos * 3 * 34, out, lse);
            for (uint32_t g = 0; g < 3; g++)
                check_against_oracle(&c, q + (pos * 3 + g) * 64, FIRST + pos + 1, out + g * 32,
                                     lse[g], tolerances[dtype]);
        }
        winnow_alloc_free(q);
        context_finish(&c);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_attend__equals_the_oracle);
    TEST_RUN(test_attend__tells_the_mass_of_each_block);
    TEST_RUN(test_attend__nothing_is_nothing);
    TEST_RUN(test_attend__extreme_logits);
    TEST_RUN(test_window__is_causal);
    return TEST_END();
}
