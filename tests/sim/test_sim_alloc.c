/* Memory that runs out: whatever allocation fails, there is an errno, no crash, nothing lost and
 * nothing left; and a decode step makes none. */
#include "text.h"

#include <base/alloc.h>

enum { N_TOKENS = 700, ROW = 2 * 64 };

static struct sim_text text, forked;
static float out[ROW], window[100 * ROW];
static uint32_t n_refused;

/* Done, or refused for want of memory. */
static bool took(int rc)
{
    CHECK(rc == 0 || rc == -EDQUOT);
    n_refused += rc != 0;
    return rc == 0;
}

static bool text_begin(struct sim_world *world)
{
    struct winnow_model_shape shape = sim_shape(2, 2, 1, 64, WINNOW_FP16);
    sim_text_init(&text, world, &shape, test_seed());
    return took(sim_text_open(&text, NULL));
}

/* So many tokens in both layers, appended; how many there are. */
static uint64_t text_append(uint64_t n_tokens)
{
    uint64_t held = 0;
    while (held < n_tokens && took(sim_text_fill(&text, held, held + 100, 100)))
        held += 100;
    return held;
}

static bool window_take(uint64_t held)
{
    return took(sim_text_window(&text, 0, held, 100, window)) &&
           took(sim_text_window(&text, 1, held, 100, window));
}

static bool steps_take(uint64_t held, uint64_t n, float mass)
{
    for (uint64_t i = held; i < held + n; i++)
        if (!took(sim_text_step(&text, 0, i, mass, out)) ||
            !took(sim_text_step(&text, 1, i, mass, out)))
            return false;
    return true;
}

static void open_run(struct sim_world *world)
{
    text_begin(world);
}

static void append_run(struct sim_world *world)
{
    if (text_begin(world))
        text_append(500);
}

static void window_run(struct sim_world *world)
{
    if (text_begin(world))
        for (uint64_t held = 0; held < 500 && window_take(held); held += 100)
            ;
}

static void exact_step_run(struct sim_world *world)
{
    if (text_begin(world) && text_append(300) == 300)
        steps_take(300, 3, 1);
}

static void sparse_step_run(struct sim_world *world)
{
    if (text_begin(world) && text_append(500) == 500)
        steps_take(500, 3, 0.5f);
}

/* Decode from before the end of a span until it is in force. */
static void seal_run(struct sim_world *world)
{
    if (text_begin(world) && text_append(200) == 200)
        steps_take(200, 120, 0.9f);
}

static void fork_run(struct sim_world *world)
{
    if (!text_begin(world) || text_append(300) != 300 || !took(sim_text_fork(&text, &forked)))
        return;
    took(sim_text_step(&forked, 0, 300, 1, out));
    CHECK_EQ(sim_text_close(&forked), 0);
    steps_take(300, 1, 1);
}

/* Inside a segment: the survivors go back to the tail. */
static void truncate_run(struct sim_world *world)
{
    if (text_begin(world) && text_append(500) == 500 && took(sim_text_truncate(&text, 200)))
        steps_take(200, 1, 1);
}

static void again_run(struct sim_world *world)
{
    for (int i = 0; i < 3; i++)
        if (text_begin(world)) {
            text_append(300);
            CHECK_EQ(sim_text_close(&text), 0);
        }
}

/* All of it, one after another; what fails is left out. */
static void whole_run(struct sim_world *world)
{
    if (!text_begin(world))
        return;
    uint64_t held = text_append(400);
    if (took(sim_text_truncate(&text, held)) && window_take(held))
        held += 100;
    if (held % 100 == 0 && held > 0 && !steps_take(held, 10, 1))
        return;
    if (took(sim_text_fork(&text, &forked))) {
        took(sim_text_truncate(&forked, 100));
        took(sim_text_step(&forked, 0, forked.last.n_held, 1, out));
        CHECK_EQ(sim_text_close(&forked), 0);
    }
    took(sim_text_truncate(&text, 200));
}

static const struct scenario {
    const char *name;
    void (*run)(struct sim_world *world);
} scenarios[] = {{"open", open_run},
                 {"append", append_run},
                 {"window", window_run},
                 {"exact step", exact_step_run},
                 {"sparse step", sparse_step_run},
                 {"seal", seal_run},
                 {"fork", fork_run},
                 {"truncate", truncate_run},
                 {"again", again_run},
                 {"whole", whole_run}};
enum { N_SCENARIOS = sizeof scenarios / sizeof *scenarios };

/* Allocation n of a scenario fails, once or with all that follow, for every n. */
static uint64_t every_allocation(const struct scenario *scenario, int onwards)
{
    for (uint64_t n = 1;; n++) {
        struct sim_world world;
        sim_world_init(&world, &(struct sim_options){.seed = test_seed()});
        n_refused = 0;
        uint64_t before = winnow_alloc_count();
        winnow_alloc_fail_at(n, onwards);
        scenario->run(&world);
        winnow_alloc_fail_at(0, 0);
        uint64_t n_made = winnow_alloc_count() - before;
        struct winnow_request close = {.kind = WINNOW_REQUEST_CLOSE_OWNER};
        sim_text_run(&text, &close);
        sim_world_settle(&world);
        sim_baseline_check(&world);
        sim_world_finish(&world);
        if (n_made < n) {
            CHECK(n_refused == 0 && n_made > 0);
            return n_made;
        }
        CHECK(n_refused > 0 || !onwards); /* once: what waits for room may have tried again */
    }
}

static void test_alloc__nth_fails_in_each_scenario(void)
{
    for (uint32_t i = 0; i < N_SCENARIOS; i++) {
        uint64_t n_made = every_allocation(&scenarios[i], 0);
        CHECK_EQ(every_allocation(&scenarios[i], 1), n_made);
        printf("   %s: %" PRIu64 " allocations\n", scenarios[i].name, n_made);
    }
    TEST_ROW(F4, N_SCENARIOS);
}

/* A core that finds no memory at its start leaves none behind. */
static void test_alloc__core_is_whole_or_absent(void)
{
    struct winnow_team *team;
    char message[256];
    CHECK_EQ(winnow_team_create(&(struct winnow_team_options){0}, &team), 0);
    struct winnow_core_options options = {.host_pool_bytes = 16 << 20,
                                          .index_memory_bytes = 16 << 20,
                                          .policy = WINNOW_POLICY_CODES,
                                          .mass = 0.9f,
                                          .n_sessions_max = 16,
                                          .n_steps_max = 16,
                                          .n_tokens_max = 1 << 16,
                                          .kernels = winnow_kernels_find(NULL),
                                          .team = team};
    int rc = -ENOMEM;
    for (uint64_t n = 1; rc < 0; n++) {
        struct winnow_core *core = NULL;
        winnow_alloc_fail_at(n, 0);
        rc = winnow_core_create(&options, &core, message);
        winnow_alloc_fail_at(0, 0);
        CHECK(rc == 0 || rc == -ENOMEM);
        CHECK(!core == (rc < 0));
        CHECK(rc == 0 || message[0]);
        winnow_core_destroy(core);
    }
    winnow_team_destroy(team);
}

/* Steps, sparse and whole, over a seal and from disk, allocate nothing. */
static void test_alloc__none_in_a_step(void)
{
    struct sim_world world;
    static float wide[4 * 256];
    sim_text_spilled(&text, &world, &(struct sim_options){.seed = test_seed()});
    CHECK_EQ(sim_text_step(&text, 0, 1500, 1, wide), 0); /* a data file more, perhaps */
    sim_world_settle(&world);
    uint64_t before = winnow_alloc_count();
    for (uint64_t position = 1501; position < 1650; position++)
        CHECK_EQ(sim_text_step(&text, 0, position, position % 2 ? 0 : 1, wide), 0);
    CHECK_EQ(winnow_alloc_count(), before);
    CHECK_EQ(sim_session(world.core, text.id)->context->layer[0].n_segments, 12);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_alloc__nth_fails_in_each_scenario);
    TEST_RUN(test_alloc__core_is_whole_or_absent);
    TEST_RUN(test_alloc__none_in_a_step);
    return TEST_END();
}
