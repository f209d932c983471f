/* Sealing, forks and truncates that something comes between: what a context holds stays its own. */
#include "text.h"

static float out[8 * 256];
static struct sim_text text, forked;

static void bytes_check(const struct sim_text *of)
{
    const struct winnow_core *core = of->world->core;
    const struct winnow_session *session = sim_session(core, of->id);
    for (uint32_t layer = 0; layer < of->model.shape.n_layers; layer++)
        for (uint32_t head = 0; head < of->model.shape.n_kv_heads; head++)
            sim_bytes_check(&of->model, core, session, layer, head, of->token);
}

/* A step that is cancelled while its span comes into force leaves it a span or a segment, nothing
 * between; truncated inside it, the context has the tokens in their places. */
static void test_context__cancelled_step_leaves_whole_spans(void)
{
    static struct sim_step step;
    struct winnow_model_shape shape = sim_shape(1, 2, 1, 64, WINNOW_FP16);
    for (uint32_t n_before = 0; n_before < 60; n_before++) {
        struct sim_world world;
        struct sim_options options = {
            .seed = test_seed() + n_before, .shuffled = true, .lazy = 0.9};
        bool done = false;
        sim_world_init(&world, &options);
        sim_text_init(&text, &world, &shape, test_seed());
        CHECK_EQ(sim_text_open(&text, NULL), 0);
        CHECK_EQ(sim_text_fill(&text, 0, 16 + 128 + 63, 1000), 0);
        for (uint64_t position = 16 + 128 + 63; position < 16 + 128 + 95; position++)
            CHECK_EQ(sim_text_step(&text, 0, position, 1, out), 0);
        sim_text_step_make(&text, &step, 0, 16 + 128 + 95, 1, out);
        step.request.done = sim_request_done;
        step.request.user = &done;
        CHECK_EQ(sim_world_submit(&world, &step.request), 0);
        for (uint32_t i = 0; i < n_before && !done; i++)
            sim_world_step(&world, WINNOW_NEVER_NS);
        if (!done)
            sim_world_cancel(&world, &step.request);
        sim_world_settle(&world);
        CHECK(done);
        bytes_check(&text);
        sim_memory_check(world.core);
        uint64_t held = step.request.n_held;
        CHECK_EQ(sim_text_step(&text, 0, held, 1, out), 0);
        CHECK(sim_text_error(&text, 0, held, out) < 2e-3);
        CHECK_EQ(sim_text_truncate(&text, 16 + 77), 0);
        bytes_check(&text);
        sim_world_finish(&world);
    }
}

/* Cut inside a block that a fork shares, a context goes on in a copy: the other's tokens stay. */
static void test_context__shared_block_is_cut_by_one_alone(void)
{
    struct winnow_model_shape shape = sim_shape(2, 2, 1, 64, WINNOW_FP16);
    struct sim_world world;
    struct sim_options options = {.seed = test_seed()};
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_fill(&text, 0, 100, 1000), 0);
    CHECK_EQ(sim_text_fork(&text, &forked), 0);
    CHECK_EQ(sim_text_truncate(&forked, 85), 0);
    for (uint32_t i = 85; i < 200; i++)
        forked.token[i] ^= 1 << 20;
    CHECK_EQ(sim_text_step(&forked, 0, 85, 1, out), 0);
    CHECK_EQ(sim_text_window(&forked, 1, 85, 115, NULL), 0);
    bytes_check(&text);
    bytes_check(&forked);
    sim_memory_check(world.core);
    sim_world_finish(&world);
}

/* While the index has no room for a span, steps are refused and the tail does not grow. */
static void test_context__full_index_stops_the_tail(void)
{
    struct winnow_model_shape shape = sim_shape(1, 2, 1, 64, WINNOW_FP16);
    struct sim_world world;
    struct sim_options options = {.seed = test_seed(), .index_memory_bytes = 128 << 10};
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    int rc = 0;
    uint64_t position = 0;
    for (; rc == 0; position++) {
        text.seq = position + 1;
        rc = sim_text_step(&text, 0, position, 1, out);
    }
    CHECK_EQ(rc, -EDQUOT);
    CHECK_EQ(text.last.n_held, position);
    CHECK_EQ((position - 16 - 96) % 128, 0);
    for (uint32_t i = 0; i < 5000; i++) { /* whatever an engine tries */
        text.seq = position + 1;
        CHECK_EQ(sim_text_step(&text, 0, position, 1, out), -EDQUOT);
        CHECK_EQ(text.last.n_held, position);
    }
    CHECK_EQ(sim_text_truncate(&text, 100), 0);
    CHECK_EQ(sim_text_step(&text, 0, 100, 1, out), 0);
    CHECK(sim_text_error(&text, 0, 100, out) < 2e-3);
    sim_world_finish(&world);
}

/* A window that could not be sealed is sealed before the next call, by whoever makes it: what that
 * call answers does not tell when there was room. */
static void test_context__owed_span_is_in_force_for_the_next_call(void)
{
    struct winnow_model_shape shape = sim_shape(1, 2, 1, 64, WINNOW_FP16);
    struct sim_world world;
    struct sim_options options = {.seed = test_seed(), .index_memory_bytes = 512 << 10};
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    struct winnow_index_memory *index = world.core->tiers.index;
    CHECK_EQ(sim_text_fill(&text, 0, 200, 200), 0);
    static float row[10 * 2 * 64];
    struct winnow_request window = {.kind = WINNOW_REQUEST_APPEND,
                                    .session_id = text.id,
                                    .epoch = text.epoch,
                                    .deadline_ns = WINNOW_NEVER_NS,
                                    .append = {.n_tokens = 10, .first = 200, .k = row, .v = row}};
    bool done = false;
    window.done = sim_request_done;
    window.user = &done;
    world.options.shuffled = true;
    world.options.lazy = 1;
    CHECK_EQ(sim_world_submit(&world, &window), 0);
    while (!world.core->n_items_out)
        sim_world_step(&world, WINNOW_NEVER_NS);
    void *taken[129]; /* the window has passed its check; another session is faster */
    uint32_t n = 0;
    while ((taken[n] = winnow_index_memory_take(index, 4096)))
        n++;
    sim_world_settle(&world);
    CHECK(done && window.status == 0);
    CHECK_EQ(sim_session(world.core, text.id)->context->layer[0].n_segments, 0);
    CHECK_EQ(sim_text_step(&text, 0, 210, 1, out), -EDQUOT);
    CHECK_EQ(text.last.n_held, 210);
    while (n > 0)
        winnow_index_memory_give(index, taken[--n], 4096);
    CHECK_EQ(sim_text_fork(&text, &forked), 0);
    CHECK_EQ(sim_text_step(&text, 0, 210, 1, out), 0);
    CHECK_EQ(sim_session(world.core, text.id)->context->layer[0].n_segments, 1);
    CHECK_EQ(sim_text_window(&forked, 0, 210, 1, out), 0);
    CHECK_EQ(forked.last.exact.certificate.n_blocks_total, 2 * 8);
    sim_world_finish(&world);
}

/* Layers that differ, in tokens or by a segment, cannot be forked; the refusal says which truncate
 * helps, and it does. */
static void test_context__uneven_layers_are_not_forked(void)
{
    struct winnow_model_shape shape = sim_shape(2, 2, 1, 64, WINNOW_FP16);
    struct sim_world world;
    unsigned long long to;
    sim_world_init(&world, &(struct sim_options){.seed = test_seed()});
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_fill(&text, 0, 160, 200), 0);
    CHECK_EQ(sim_text_window(&text, 0, 160, 100, NULL), 0); /* sealed there, and not in layer 1 */
    CHECK_EQ(sim_text_fork(&text, &forked), -EINVAL);
    CHECK_EQ(sscanf(strstr(text.last.text, "truncate to"), "truncate to %llu", &to), 1);
    CHECK_EQ(to, 143);
    CHECK_EQ(sim_text_truncate(&text, 160), 0); /* even in tokens alone */
    CHECK_EQ(sim_text_fork(&text, &forked), -EINVAL);
    CHECK_EQ(sim_text_truncate(&text, to), 0);
    CHECK_EQ(sim_text_fork(&text, &forked), 0);
    CHECK_EQ(forked.last.n_held, to);
    bytes_check(&text);
    bytes_check(&forked);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_context__cancelled_step_leaves_whole_spans);
    TEST_RUN(test_context__shared_block_is_cut_by_one_alone);
    TEST_RUN(test_context__full_index_stops_the_tail);
    TEST_RUN(test_context__owed_span_is_in_force_for_the_next_call);
    TEST_RUN(test_context__uneven_layers_are_not_forked);
    return TEST_END();
}
