/*
 * Needles: one token 8 nats above all others, in a block whose centroid tells nothing of it.
 *
 * A segment has topics, tight clusters of keys. A query asks for one topic, whose blocks every
 * policy finds, and for one token of any other block by what sets that token apart from its topic.
 */
#include "fixture.h"

#include <kernels/ref/oracle.h>

enum { N_BLOCKS = 64, N_TOKENS = 16 * N_BLOCKS, WIDTH = 64, N_TOPICS = 16, N_NEEDLES = 10000 };
enum { NEEDLES_PER_SEGMENT = 1000 };
static const float mass = 0.9f;

struct haystack {
    struct fixture_segment segment;
    struct fixture_selection f;
    float topic[N_TOPICS][WIDTH]; /* unit vectors */
    uint32_t topic_of[N_TOKENS];
    uint32_t token[N_TOKENS]; /* by block */
    uint32_t worst_block;     /* largest radius */
    double logit[N_TOKENS];
};

static void normalise(float *x)
{
    double square = 0;
    for (uint32_t d = 0; d < WIDTH; d++)
        square += (double)x[d] * (double)x[d];
    for (uint32_t d = 0; d < WIDTH; d++)
        x[d] = (float)((double)x[d] / sqrt(square));
}

static void haystack_init(struct haystack *h, struct winnow_rng *rng)
{
    struct winnow_model_shape shape = fixture_shape(1, WIDTH, WIDTH, WINNOW_FP16);

    fixture_segment_init(&h->segment, &shape, N_BLOCKS);
    fixture_selection_init(&h->f, 1, N_BLOCKS, mass);
    for (uint32_t j = 0; j < N_TOPICS; j++) {
        for (uint32_t d = 0; d < WIDTH; d++)
            h->topic[j][d] = (float)winnow_rng_normal(rng);
        normalise(h->topic[j]);
    }
    for (uint32_t t = 0; t < N_TOKENS; t++) {
        h->topic_of[t] = (uint32_t)winnow_rng_below(rng, N_TOPICS);
        for (uint32_t d = 0; d < WIDTH; d++)
            h->segment.k[t * WIDTH + d] =
                6 * h->topic[h->topic_of[t]][d] + (float)winnow_rng_normal(rng);
    }
    CHECK_EQ(fixture_segment_build(&h->segment), 0);
    for (uint32_t i = 0; i < N_TOKENS; i++)
        h->token[i] = h->segment.order[i];
    h->worst_block = 0;
    for (uint32_t b = 1; b < N_BLOCKS; b++)
        if (h->segment.view.head[b].radius > h->segment.view.head[h->worst_block].radius)
            h->worst_block = b;
    h->f.ln_z[0] = -INFINITY;
}

static void haystack_finish(struct haystack *h)
{
    fixture_segment_finish(&h->segment);
    fixture_selection_finish(&h->f);
}

/* q = topic part + c x (what sets the needle apart), c such that the needle's logit is 8 nats above
 * the largest of the others. False: another token is too much like it. */
static bool query_for(struct haystack *h, struct winnow_rng *rng, uint32_t block, uint32_t j,
                      float *q)
{
    static double topic_logit[N_TOKENS], apart_logit[N_TOKENS];
    uint32_t needle = h->token[16 * block + j], topic;
    float part[WIDTH], apart[WIDTH];
    double low = 0, high = 256;

    do
        topic = (uint32_t)winnow_rng_below(rng, N_TOPICS);
    while (topic == h->topic_of[needle]);
    for (uint32_t d = 0; d < WIDTH; d++) {
        part[d] = 8 * h->topic[topic][d];
        apart[d] = h->segment.k[needle * WIDTH + d] - 6 * h->topic[h->topic_of[needle]][d];
    }
    normalise(apart);
    winnow_oracle_logits(WIDTH, 0.125, part, N_TOKENS, h->segment.k, topic_logit);
    winnow_oracle_logits(WIDTH, 0.125, apart, N_TOKENS, h->segment.k, apart_logit);
    for (int i = 0; i < 20; i++) {
        double c = (low + high) / 2, largest = -INFINITY;
        for (uint32_t t = 0; t < N_TOKENS; t++)
            if (t != needle)
                largest = fmax(largest, topic_logit[t] + c * apart_logit[t]);
        if (topic_logit[needle] + c * apart_logit[needle] < largest + 8)
            low = c;
        else
            high = c;
    }
    if (high == 256)
        return false;
    for (uint32_t d = 0; d < WIDTH; d++)
        q[d] = part[d] + (float)high * apart[d];
    winnow_oracle_logits(WIDTH, 0.125, q, N_TOKENS, h->segment.k, h->logit);
    return true;
}

/* True mass of what the policy selects in its first round. */
static double true_mass(struct haystack *h, uint32_t policy, const float *q)
{
    struct winnow_selection *sel = &h->f.sel;
    double lse = winnow_oracle_ln_mass(h->logit, N_TOKENS, NULL), sum = 0;

    winnow_kernels_ref()->score(&h->segment.shape, policy, &h->segment.view, q, sel->ln_e,
                                h->f.scratch);
    winnow_kernels_ref()->select(policy, sel, h->f.scratch);
    for (uint32_t i = 0; i < sel->n_selected; i++)
        sum += exp(winnow_oracle_ln_mass(h->logit, 16, h->token + 16 * sel->block_idx[i]) - lse);
    return sum;
}

/* Codes find each of 10,000 needles, a tenth of them in the block of the worst centroid; the moment
 * of the same blocks loses most, so the needles are no easy ones. */
static void test_needle__codes_find_what_moments_lose(void)
{
    static struct haystack h;
    struct winnow_rng rng;
    uint32_t n_lost = 0, n_lost_in_worst = 0;
    double n_read = 0;
    float q[WIDTH];
    winnow_rng_init(&rng, test_seed());

    for (uint32_t i = 0; i < N_NEEDLES; i++) {
        if (i % NEEDLES_PER_SEGMENT == 0)
            haystack_init(&h, &rng);
        bool in_worst = i % 10 == 0;
        uint32_t block = in_worst ? h.worst_block : (uint32_t)winnow_rng_below(&rng, N_BLOCKS);
        while (!query_for(&h, &rng, block, (uint32_t)winnow_rng_below(&rng, 16), q))
            ;
        CHECK(true_mass(&h, WINNOW_POLICY_CODES, q) >= (double)mass);
        n_read += h.f.sel.n_selected;
        bool lost = true_mass(&h, WINNOW_POLICY_MOMENT, q) < (double)mass;
        n_lost += lost;
        n_lost_in_worst += lost && in_worst;
        if (i % NEEDLES_PER_SEGMENT == NEEDLES_PER_SEGMENT - 1)
            haystack_finish(&h);
    }
    printf("  %d needles: codes read %.2f blocks of %d and lose none; moment loses %u, %u of %d in "
           "the worst block\n",
           N_NEEDLES, n_read / N_NEEDLES, N_BLOCKS, n_lost, n_lost_in_worst, N_NEEDLES / 10);
    CHECK(n_lost > N_NEEDLES / 2);
    CHECK(n_lost_in_worst > 0);
    TEST_ROW(F11, N_NEEDLES);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_needle__codes_find_what_moments_lose);
    return TEST_END();
}
