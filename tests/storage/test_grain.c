/* Grains against a plain model: none is given twice, none is lost, runs survive their moving. */
#include <base/rng.h>
#include <errno.h>
#include <storage/grain.h>
#include <test.h>

enum { N_FILES = 3, N_PER_FILE = 40, N_GRAINS = N_FILES * N_PER_FILE, N_SEGMENTS = 12 };

struct model {
    uint32_t owner[N_GRAINS]; /* segment + 1; 0: free; UINT32_MAX: bad */
    uint32_t run[N_SEGMENTS][N_GRAINS], n_grains[N_SEGMENTS];
};

static void model_check(const struct winnow_grains *grains, const struct model *model)
{
    uint32_t n_free = 0, n_bad = 0;
    for (uint32_t i = 0; i < N_GRAINS; i++) {
        n_free += model->owner[i] == 0;
        n_bad += model->owner[i] == UINT32_MAX;
    }
    CHECK_EQ(grains->n_free, n_free);
    CHECK_EQ(grains->n_bad, n_bad);
    CHECK_EQ(grains->n_used, N_GRAINS - n_free - n_bad);
    for (uint32_t s = 0; s < N_SEGMENTS; s++) {
        if (!model->n_grains[s])
            continue;
        for (uint32_t i = 0; i < model->n_grains[s]; i++)
            CHECK_EQ(winnow_grains_of(grains, s, i), model->run[s][i]);
    }
}

static void segment_take(struct winnow_grains *grains, struct model *model, uint32_t s, uint32_t n)
{
    uint32_t n_free = grains->n_free;
    int rc = winnow_grains_take_run(grains, s, n);
    CHECK_EQ(rc, n <= n_free ? 0 : -ENOSPC);
    if (rc < 0)
        return;
    model->n_grains[s] = n;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t grain = winnow_grains_of(grains, s, i);
        CHECK(grain < N_GRAINS && model->owner[grain] == 0);
        model->owner[grain] = s + 1;
        model->run[s][i] = grain;
    }
}

static void segment_drop(struct winnow_grains *grains, struct model *model, uint32_t s,
                         bool suspect)
{
    if (suspect)
        winnow_grains_suspect(grains, model->run[s][0]);
    winnow_grains_give_run(grains, s);
    for (uint32_t i = 0; i < model->n_grains[s]; i++)
        model->owner[model->run[s][i]] = suspect && i == 0 ? UINT32_MAX : 0;
    model->n_grains[s] = 0;
}

/* Thousands of segments of every size come and go in random order. */
static void test_grain__random_lives_match_the_model(void)
{
    static struct model model;
    struct winnow_grains grains;
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    CHECK_EQ(winnow_grains_init(&grains, N_FILES, N_PER_FILE, N_SEGMENTS), 0);
    for (uint32_t i = 0; i < N_FILES; i++)
        winnow_grains_add_file(&grains, i);
    for (uint32_t step = 0; step < 20000; step++) {
        uint32_t s = (uint32_t)winnow_rng_below(&rng, N_SEGMENTS);
        if (model.n_grains[s])
            segment_drop(&grains, &model, s, step % 2000 == 0);
        else
            segment_take(&grains, &model, s, 1 + (uint32_t)winnow_rng_below(&rng, 30));
        if (step % 16 == 0)
            model_check(&grains, &model);
    }
    model_check(&grains, &model);
    winnow_grains_finish(&grains);
}

/* A free grain that is suspected is gone at once, and suspecting it twice changes nothing. */
static void test_grain__a_suspect_is_not_taken(void)
{
    struct winnow_grains grains;
    CHECK_EQ(winnow_grains_init(&grains, 1, 3, 1), 0);
    winnow_grains_add_file(&grains, 0);
    winnow_grains_suspect(&grains, 1);
    winnow_grains_suspect(&grains, 1);
    CHECK_EQ(grains.n_bad, 1);
    CHECK_EQ(winnow_grains_take(&grains), 0);
    CHECK_EQ(winnow_grains_take(&grains), 2);
    CHECK_EQ(winnow_grains_take(&grains), UINT32_MAX);
    winnow_grains_finish(&grains);
}

/* An empty disk gives a segment neighbours. */
static void test_grain__a_fresh_run_is_contiguous(void)
{
    struct winnow_grains grains;
    CHECK_EQ(winnow_grains_init(&grains, N_FILES, N_PER_FILE, N_SEGMENTS), 0);
    CHECK_EQ(winnow_grains_take(&grains), UINT32_MAX);
    CHECK_EQ(winnow_grains_take_run(&grains, 0, 1), -ENOSPC);
    winnow_grains_add_file(&grains, 1);
    CHECK_EQ(winnow_grains_take_run(&grains, 0, 10), 0);
    CHECK_EQ(winnow_grains_take_run(&grains, 1, 20), 0);
    for (uint32_t i = 0; i < 10; i++)
        CHECK_EQ(winnow_grains_of(&grains, 0, i), N_PER_FILE + i);
    for (uint32_t i = 0; i < 20; i++)
        CHECK_EQ(winnow_grains_of(&grains, 1, i), N_PER_FILE + 10 + i);
    winnow_grains_finish(&grains);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_grain__random_lives_match_the_model);
    TEST_RUN(test_grain__a_suspect_is_not_taken);
    TEST_RUN(test_grain__a_fresh_run_is_contiguous);
    return TEST_END();
}
