/* A disk that stops answering: one step pays for it with its deadline, those after it are told at
 * once, and once it answers again so do the contexts. */
#include "text.h"

#define LATE_NS (50 * WINNOW_NS_PER_MS)

static float out[8 * 256];
static struct sim_text text;
static struct sim_step step;

/* Half on disk, the heads want nearly all of it, and the disk has left a step without an answer. */
static void stuck_begin(struct sim_world *world)
{
    struct winnow_store_facts facts;
    sim_text_spilled(&text, world, &(struct sim_options){.seed = test_seed()});
    text.q_scale = 0.1f;
    text.within_ns = WINNOW_NS_PER_S;
    winnow_sim_disk_fail(world->disk, WINNOW_IO_READ, 1, 1 << 20, WINNOW_SIM_STUCK);
    int64_t deadline_ns = sim_world_now(world) + text.within_ns;
    CHECK_EQ(sim_text_step(&text, 0, 1500, 0.97f, out), -ETIMEDOUT);
    CHECK(sim_world_now(world) >= deadline_ns && sim_world_now(world) <= deadline_ns + LATE_NS);
    sim_world_settle(world);
    winnow_store_facts(world->store, &facts);
    CHECK(facts.stuck);
}

/* The next step does not wait for its deadline, and asks the disk for nothing. */
static void test_stuck__later_steps_are_told_at_once(void)
{
    struct sim_world world;
    struct winnow_sim_counts before, after;
    stuck_begin(&world);
    winnow_sim_disk_counts(world.disk, &before);
    int64_t begun_ns = sim_world_now(&world);
    CHECK_EQ(sim_text_step(&text, 1, 1500, 0.97f, out), -ETIMEDOUT);
    CHECK(sim_world_now(&world) < begun_ns + LATE_NS);
    CHECK_EQ(text.last.truncate_to, 0); /* nothing is lost */
    CHECK(text.last.text[0]);
    winnow_sim_disk_counts(world.disk, &after);
    CHECK_EQ(after.n_ops[WINNOW_IO_READ], before.n_ops[WINNOW_IO_READ]);
    sim_world_finish(&world);
}

/* A step that may degrade has its answer at once, marked with the reason. */
static void test_stuck__a_step_that_may_degrade_is_answered(void)
{
    struct sim_world world;
    stuck_begin(&world);
    sim_text_step_make(&text, &step, 1, 1500, 0.97f, out);
    step.request.attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    int64_t begun_ns = sim_world_now(&world);
    CHECK_EQ(sim_text_run(&text, &step.request), 0);
    CHECK(sim_world_now(&world) < begun_ns + LATE_NS);
    CHECK_EQ(step.request.attend.certificate.verdict, WINNOW_VERDICT_DEGRADED);
    CHECK_EQ(step.request.attend.certificate.reason, ETIMEDOUT);
    sim_world_finish(&world);
}

/* The disk is back: within two tries the step has its answer, and memory is as it was. */
static void test_stuck__a_disk_that_is_back_is_used(void)
{
    struct sim_world world;
    struct winnow_store_facts facts;
    stuck_begin(&world);
    winnow_sim_disk_release(world.disk);
    sim_world_settle(&world);
    winnow_sim_disk_heal(world.disk);
    sim_memory_check(world.core);
    sim_clock_set(&world, sim_world_now(&world) + WINNOW_NS_PER_S);
    CHECK_EQ(sim_text_step(&text, 1, 1500, 0.97f, out), -ETIMEDOUT); /* with it goes the probe */
    sim_world_settle(&world);
    CHECK_EQ(sim_text_step(&text, 2, 1500, 0.97f, out), 0);
    winnow_store_facts(world.store, &facts);
    CHECK(!facts.stuck);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_stuck__later_steps_are_told_at_once);
    TEST_RUN(test_stuck__a_step_that_may_degrade_is_answered);
    TEST_RUN(test_stuck__a_disk_that_is_back_is_used);
    return TEST_END();
}
