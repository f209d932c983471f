/* Deadlines on a disk that is late or never answers: every request ends within 50 ms of its own. */
#include "text.h"

#define LATE_NS (50 * WINNOW_NS_PER_MS)
#define SOON_NS (100 * WINNOW_NS_PER_MS)

static float out[8 * 256];
static struct sim_text text;
static struct sim_step first, second;

/* Steps until the flag is set; returns the time then. */
static int64_t wait_for(struct sim_world *world, const bool *done, int64_t until_ns)
{
    while (!*done && sim_world_step(world, until_ns))
        ;
    return sim_world_now(world);
}

/* Half on disk, and with heads that want nearly all of it. */
static void spilled(struct sim_world *world)
{
    sim_text_spilled(&text, world, &(struct sim_options){.seed = test_seed()});
    text.q_scale = 0.1f;
}

/* The disk goes on to be deaf, but lets go of what it has: each read is tried twice. */
static void release_all(struct sim_world *world)
{
    for (int i = 0; i < 2; i++) {
        winnow_sim_disk_release(world->disk);
        sim_world_settle(world);
    }
}

/* A disk that never answers: the step ends by its deadline, what the disk still owns comes back with
 * its completion and not before, and the context answers again. */
static void test_deadline__disk_that_never_answers(void)
{
    struct sim_world world;
    struct winnow_arena_use before, during;
    spilled(&world);
    winnow_arena_use(world.core->tiers.arena, &before);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_READ, 1, 1, WINNOW_SIM_STUCK);
    int64_t deadline_ns = sim_world_now(&world) + SOON_NS;
    text.within_ns = SOON_NS;
    text.seq = 1;
    CHECK_EQ(sim_text_step(&text, 0, 1500, 0.97f, out), -ETIMEDOUT);
    CHECK(sim_world_now(&world) <= deadline_ns + LATE_NS);
    CHECK_EQ(text.last.n_held, 1501);
    CHECK_EQ(text.last.truncate_to, 0); /* late is not lost */
    sim_world_settle(&world);
    CHECK(winnow_pool_used(world.core->loads) > 0);
    winnow_arena_use(world.core->tiers.arena, &during);
    CHECK(during.held_bytes > before.held_bytes);
    release_all(&world);
    sim_memory_check(world.core);
    text.within_ns = 0;
    CHECK_EQ(sim_text_step(&text, 0, 1500, 0.97f, out), 0); /* a repeat: its token is there */
    sim_world_finish(&world);
}

/* A request that waits behind another of its session has a deadline too. */
static void test_deadline__queued_request_ends_by_its_own(void)
{
    struct sim_world world;
    bool first_done, second_done;
    spilled(&world);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_READ, 1, 1 << 20, WINNOW_SIM_STUCK);
    sim_text_step_make(&text, &first, 0, 1500, 1, out);
    sim_text_step_make(&text, &second, 1, 1500, 1, out);
    int64_t begun_ns = sim_world_now(&world);
    sim_text_send(&text, &first.request, 10 * SOON_NS, &first_done);
    sim_text_send(&text, &second.request, SOON_NS, &second_done);
    int64_t ended_ns = wait_for(&world, &second_done, begun_ns + 20 * SOON_NS);
    CHECK(second_done && !first_done);
    CHECK_EQ(second.request.status, -ETIMEDOUT);
    CHECK_EQ(second.request.n_held, 1500);
    CHECK(second.request.text[0]);
    CHECK(ended_ns <= begun_ns + SOON_NS + LATE_NS);
    ended_ns = wait_for(&world, &first_done, begun_ns + 20 * SOON_NS);
    CHECK_EQ(first.request.status, -ETIMEDOUT);
    CHECK(ended_ns <= begun_ns + 10 * SOON_NS + LATE_NS);
    sim_world_finish(&world);
}

/* A lease that ends takes its waiting requests with it; nothing of them is left. */
static void test_deadline__closed_owner_leaves_no_request(void)
{
    struct sim_world world;
    bool first_done, second_done, closed;
    spilled(&world);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_READ, 1, 1 << 20, WINNOW_SIM_STUCK);
    sim_text_step_make(&text, &first, 0, 1500, 1, out);
    sim_text_step_make(&text, &second, 1, 1500, 1, out);
    sim_text_send(&text, &first.request, 0, &first_done);
    sim_text_send(&text, &second.request, SOON_NS, &second_done);
    sim_world_settle(&world);
    struct winnow_request close = {.kind = WINNOW_REQUEST_CLOSE_OWNER};
    sim_text_send(&text, &close, 0, &closed);
    sim_world_settle(&world);
    CHECK(closed && first_done && second_done);
    CHECK_EQ(first.request.status, -ECANCELED);
    CHECK_EQ(second.request.status, -ETIMEDOUT);
    CHECK_EQ(winnow_pool_used(world.core->sessions), 0);
    release_all(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* A step that may degrade answers before its deadline, with the late block's estimate. */
static void test_deadline__late_block_is_compensated_in_time(void)
{
    struct sim_world world;
    spilled(&world);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_READ, 1, 1 << 20, WINNOW_SIM_STUCK);
    sim_text_step_make(&text, &first, 0, 1500, 0.97f, out);
    first.request.attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    text.within_ns = SOON_NS;
    CHECK_EQ(sim_text_run(&text, &first.request), 0);
    const struct winnow_core_certificate *c = &first.request.attend.certificate;
    CHECK_EQ(c->verdict, WINNOW_VERDICT_DEGRADED);
    CHECK_EQ(c->reason, ETIMEDOUT);
    CHECK(c->n_blocks_missed > 0 && c->n_blocks_missed <= c->n_blocks_disk);
    CHECK(c->mass_reached < 0.97f);
    for (uint32_t i = 0; i < 4 * 256; i++)
        CHECK(isfinite(out[i]));
    sim_text_step_make(&text, &first, 1, 1500, 1, out); /* all is asked for */
    first.request.attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    int64_t deadline_ns = sim_world_now(&world) + SOON_NS;
    CHECK_EQ(sim_text_run(&text, &first.request), -ETIMEDOUT);
    CHECK(sim_world_now(&world) >= deadline_ns);
    sim_world_finish(&world);
}

/* What a step asked for counts as a step's bytes, also when it comes after the step's end. */
static void test_deadline__late_bytes_are_the_steps(void)
{
    struct sim_world world;
    struct winnow_request before = {.kind = WINNOW_REQUEST_STATS}, after = before;
    spilled(&world);
    CHECK_EQ(sim_text_run(&text, &before), 0);
    winnow_sim_disk_fail(world.disk, WINNOW_IO_READ, 1, 1 << 20, WINNOW_SIM_LATE);
    text.within_ns = SOON_NS;
    CHECK_EQ(sim_text_step(&text, 0, 1500, 0.97f, out), -ETIMEDOUT);
    sim_world_settle(&world);
    CHECK_EQ(sim_text_run(&text, &after), 0);
    CHECK(after.stats.read_bytes_attend > before.stats.read_bytes_attend);
    CHECK_EQ(after.stats.read_bytes_exact, before.stats.read_bytes_exact);
    sim_world_finish(&world);
}

/* A late request whose items still run waits for them: the core does not ask to be called again and
 * again meanwhile. */
static void test_deadline__late_op_waits_for_its_items(void)
{
    struct winnow_model_shape shape = sim_shape(1, 2, 1, 64, WINNOW_FP16);
    struct sim_world world;
    bool done;
    sim_world_init(&world, &(struct sim_options){.seed = test_seed(), .shuffled = true, .lazy = 1});
    sim_text_init(&text, &world, &shape, test_seed());
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    sim_text_step_make(&text, &first, 0, 0, 1, out);
    sim_text_send(&text, &first.request, SOON_NS, &done);
    while (!world.core->n_items_out)
        sim_world_step(&world, WINNOW_NEVER_NS);
    int64_t late_ns = sim_world_now(&world) + 2 * SOON_NS;
    winnow_sim_disk_now_set(world.disk, late_ns);
    winnow_core_step(world.core, late_ns);
    CHECK(winnow_core_step(world.core, late_ns) > late_ns);
    CHECK(!done);
    sim_world_settle(&world);
    CHECK(done);
    CHECK_EQ(first.request.status, -ETIMEDOUT);
    sim_world_finish(&world);
}

/* Reads of a step that was cancelled come when another step of the session runs: they are nobody's,
 * and their memory comes back. */
static void test_deadline__reads_of_a_cancelled_step_are_nobodys(void)
{
    struct sim_world world;
    bool done;
    sim_text_spilled(&text, &world, &(struct sim_options){.seed = test_seed()});
    for (uint32_t layer = 0; layer < 3; layer++) {
        sim_text_step_make(&text, &first, layer, 1500, 1, out);
        sim_text_send(&text, &first.request, 0, &done);
        while (winnow_pool_used(world.core->loads) < 16)
            sim_world_step(&world, WINNOW_NEVER_NS);
        sim_world_cancel(&world, &first.request);
        while (!done)
            sim_world_step(&world, WINNOW_NEVER_NS);
        CHECK_EQ(first.request.status, -ECANCELED);
        CHECK(winnow_pool_used(world.core->loads) > 0);
        CHECK_EQ(sim_text_step(&text, layer + 1, 1500, 1, out), 0);
        CHECK(sim_text_error(&text, layer + 1, 1500, out) < 1e-4);
        sim_world_settle(&world);
        sim_memory_check(world.core);
        CHECK_EQ(sim_text_truncate(&text, 1500), 0);
    }
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_deadline__disk_that_never_answers);
    TEST_RUN(test_deadline__queued_request_ends_by_its_own);
    TEST_RUN(test_deadline__closed_owner_leaves_no_request);
    TEST_RUN(test_deadline__late_block_is_compensated_in_time);
    TEST_RUN(test_deadline__late_bytes_are_the_steps);
    TEST_RUN(test_deadline__late_op_waits_for_its_items);
    TEST_RUN(test_deadline__reads_of_a_cancelled_step_are_nobodys);
    return TEST_END();
}
