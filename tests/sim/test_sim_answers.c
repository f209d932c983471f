/* What a step answers when P is not reached, the budget ends, or a head wants nearly everything. */
#include "text.h"

enum { ROW = 4 * 64, N_TOKENS = 1500 };

static struct sim_text text, twin, forked;
static struct sim_step step;
static float out[ROW], other[ROW];

static void answers_init(struct sim_world *world, const struct winnow_session_options *options)
{
    struct winnow_model_shape shape = sim_shape(1, 2, 2, 64, WINNOW_FP16);
    sim_world_init(world, &(struct sim_options){.seed = test_seed(), .n_sessions_max = 3});
    sim_text_init(&text, world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, options), 0);
    CHECK_EQ(sim_text_fill(&text, 0, N_TOKENS, 500), 0);
}

/* A strict session gets the layer whole where another one hears SHORT; else both hear the same. */
static void test_answers__strict_reads_whole_what_stays_short(void)
{
    struct sim_world world;
    uint32_t n_short = 0;
    struct winnow_session_options options = {.policy = WINNOW_POLICY_TACTIC, .mass = 0.8f};
    answers_init(&world, &options);
    options.strict = true;
    sim_text_init(&twin, &world, &text.model.shape, test_seed());
    CHECK_EQ(sim_text_open(&twin, &options), 0);
    CHECK_EQ(sim_text_fill(&twin, 0, N_TOKENS, 500), 0);
    for (uint64_t position = N_TOKENS; position < N_TOKENS + 300; position++) {
        CHECK_EQ(sim_text_step(&text, 0, position, 0, out), 0);
        CHECK_EQ(sim_text_step(&twin, 0, position, 0, other), 0);
        const struct winnow_core_certificate *c = &text.last.attend.certificate;
        const struct winnow_core_certificate *strict = &twin.last.attend.certificate;
        CHECK(c->mass_reached < 0.8f ? c->verdict == WINNOW_VERDICT_SHORT
                                     : c->verdict <= WINNOW_VERDICT_MET);
        if (c->verdict != WINNOW_VERDICT_SHORT) {
            CHECK_EQ(strict->verdict, c->verdict);
            CHECK(!memcmp(out, other, sizeof out));
            continue;
        }
        n_short++;
        CHECK_EQ(strict->verdict, WINNOW_VERDICT_EXACT);
        CHECK(strict->mass_reached >= 1);
        CHECK(sim_text_error(&twin, 0, position, other) < 2e-3);
        if (n_short > 10)
            break;
    }
    printf("   %u steps stayed short\n", n_short);
    CHECK(n_short > 0);
    sim_world_finish(&world);
}

/* A budget that ends before P is refused with the number, or degrades when that is allowed. */
static void test_answers__budget_ends(void)
{
    struct sim_world world;
    answers_init(&world, NULL);
    text.seq = 1;
    sim_text_step_make(&text, &step, 0, N_TOKENS, 0.99f, out);
    step.request.attend.n_blocks_max = 3;
    CHECK_EQ(sim_text_run(&text, &step.request), -ERANGE);
    CHECK(strstr(step.request.text, "budget 3"));
    CHECK_EQ(step.request.n_held, N_TOKENS + 1);
    step.request.attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    CHECK_EQ(sim_text_run(&text, &step.request), 0);
    const struct winnow_core_certificate *c = &step.request.attend.certificate;
    CHECK_EQ(c->verdict, WINNOW_VERDICT_DEGRADED);
    CHECK_EQ(c->reason, ERANGE);
    CHECK(c->mass_reached < 0.99f);
    CHECK(c->n_blocks_host + c->n_blocks_disk <= 2 * 3);
    CHECK_EQ(sim_text_step(&text, 0, N_TOKENS, 0.99f, out), 0);
    CHECK(text.last.attend.certificate.verdict <= WINNOW_VERDICT_SHORT);
    sim_world_finish(&world);
}

/* A step whose attention is flat, or peaked. */
static void scaled_step(struct sim_text *of, uint64_t position, float scale)
{
    of->q_scale = scale;
    CHECK_EQ(sim_text_step(of, 0, position, 0.9f, out), 0);
}

static uint32_t heavy_count(const struct sim_text *of)
{
    const struct winnow_session *session = sim_session(of->world->core, of->id);
    CHECK_EQ(session->n_heavy, (uint32_t)session->heavy[0].heavy + session->heavy[1].heavy);
    return session->n_heavy;
}

/* Heads whose selection is large for long are read whole; they look again now and then, and come
 * back. A fork goes on with its origin's flags. */
static void test_answers__heavy_heads_come_and_go(void)
{
    struct sim_world world;
    answers_init(&world, NULL);
    uint64_t position = N_TOKENS;
    for (; position < N_TOKENS + 64; position++) {
        CHECK_EQ(heavy_count(&text), 0);
        scaled_step(&text, position, 0.02f);
    }
    CHECK_EQ(heavy_count(&text), 2);
    CHECK_EQ(sim_text_fork(&text, &forked), 0);
    CHECK_EQ(heavy_count(&forked), 2);
    for (uint64_t end = position + 63; position < end; position++) {
        scaled_step(&text, position, 20);
        CHECK_EQ(text.last.attend.certificate.verdict, WINNOW_VERDICT_EXACT);
        CHECK_EQ(heavy_count(&text), 2);
    }
    scaled_step(&text, position, 20); /* looks again */
    CHECK(text.last.attend.certificate.verdict != WINNOW_VERDICT_EXACT);
    CHECK_EQ(heavy_count(&text), 0);
    CHECK_EQ(heavy_count(&forked), 2);
    sim_world_finish(&world);
}

/* As many sessions as are allowed, and a place again after a close. */
static void test_answers__sessions_are_counted(void)
{
    struct sim_world world;
    answers_init(&world, NULL); /* at most three */
    sim_text_init(&twin, &world, &text.model.shape, test_seed());
    CHECK_EQ(sim_text_open(&twin, NULL), 0);
    CHECK_EQ(sim_text_fork(&text, &forked), 0);
    static struct sim_text fourth;
    sim_text_init(&fourth, &world, &text.model.shape, test_seed());
    CHECK_EQ(sim_text_open(&fourth, NULL), -EDQUOT);
    CHECK(strstr(fourth.last.text, "3 sessions") && strstr(fourth.last.text, "sessions_max"));
    CHECK_EQ(sim_text_fork(&text, &fourth), -EDQUOT);
    CHECK_EQ(sim_text_close(&twin), 0);
    CHECK_EQ(sim_text_fork(&text, &fourth), 0);
    CHECK_EQ(sim_text_step(&fourth, 0, N_TOKENS, 1, out), 0);
    CHECK(sim_text_error(&fourth, 0, N_TOKENS, out) < 2e-3);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_answers__strict_reads_whole_what_stays_short);
    TEST_RUN(test_answers__budget_ends);
    TEST_RUN(test_answers__heavy_heads_come_and_go);
    TEST_RUN(test_answers__sessions_are_counted);
    return TEST_END();
}
