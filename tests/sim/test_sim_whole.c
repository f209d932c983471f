/* What a GPU (gpu.h) answers beside sparse steps: budgets that end, whole reads, strict sessions. */
#include "text.h"

#include <storage/inside.h>

enum { N_TOKENS = 1500, ROW = 4 * 64 };

static struct sim_text text[2]; /* the same, without a GPU and with one */
static struct sim_step step;

static struct sim_options with_gpu(struct sim_options options)
{
    options.gpu_memory_bytes = 64 << 20;
    return options;
}

static void pair_init(struct sim_world world[2], const struct sim_options *options,
                      const struct winnow_session_options *session)
{
    struct winnow_model_shape shape = sim_shape(1, 2, 2, 64, WINNOW_FP16);
    for (int i = 0; i < 2; i++) {
        struct sim_options of = i ? with_gpu(*options) : *options;
        sim_world_init(&world[i], &of);
        sim_text_init(&text[i], &world[i], &shape, test_seed());
        CHECK_EQ(sim_text_open(&text[i], session), 0);
        CHECK_EQ(sim_text_fill(&text[i], 0, N_TOKENS, 500), 0);
    }
}

/* One step of both: the same status, bits and certificate. Returns the GPU's. */
static const struct winnow_core_certificate *
pair_step(uint64_t position, float mass, uint32_t flags, uint32_t n_blocks_max, int rc)
{
    static struct winnow_core_certificate c[2];
    static float out[2][ROW];
    memset(c, 0, sizeof c);
    memset(out, 0, sizeof out);
    for (int i = 0; i < 2; i++) {
        sim_text_step_make(&text[i], &step, 0, position, mass, out[i]);
        step.request.attend.flags |= flags;
        step.request.attend.n_blocks_max = n_blocks_max;
        CHECK_EQ(sim_text_run(&text[i], &step.request), rc);
        if (rc == 0)
            c[i] = step.request.attend.certificate;
    }
    CHECK(!memcmp(out[0], out[1], sizeof out[0]));
    CHECK_EQ(c[0].verdict, c[1].verdict);
    CHECK_EQ(c[0].reason, c[1].reason);
    CHECK_EQ(c[0].n_rounds, c[1].n_rounds);
    CHECK(c[0].mass_reached == c[1].mass_reached && c[0].mass_mean == c[1].mass_mean);
    return &c[1];
}

static void pair_finish(struct sim_world world[2])
{
    for (int i = 0; i < 2; i++)
        sim_world_finish(&world[i]);
}

/* A budget is the device's too: what it leaves short is refused, or degraded where that is allowed. */
static void test_whole__budget_ends(void)
{
    struct sim_world world[2];
    pair_init(world, &(struct sim_options){.seed = test_seed()}, NULL);
    const struct winnow_core_certificate *c;
    pair_step(N_TOKENS, 0.99f, 0, 3, -ERANGE);
    CHECK(strstr(step.request.text, "budget 3"));
    c = pair_step(N_TOKENS + 1, 0.99f, WINNOW_ITEM_ALLOW_DEGRADED, 3, 0);
    CHECK_EQ(c->verdict, WINNOW_VERDICT_DEGRADED);
    CHECK_EQ(c->n_blocks_host, 2 * 3);
    c = pair_step(N_TOKENS + 2, 0.5f, 0, 60, 0);
    CHECK_EQ(c->verdict, WINNOW_VERDICT_MET);
    c = pair_step(N_TOKENS + 3, 1, 0, 3, 0);
    CHECK_EQ(c->verdict, WINNOW_VERDICT_EXACT);
    CHECK_EQ(sim_gpu.n_steps, 4);
    pair_finish(world);
}

/* Short contexts, from the first token on, and what is asked for exactly are read whole by it. */
static void test_whole__asked_for_or_short(void)
{
    struct sim_world world[2];
    pair_init(world, &(struct sim_options){.seed = test_seed(), .dense_below = 1024}, NULL);
    const struct winnow_core_certificate *c = pair_step(N_TOKENS, 0.5f, WINNOW_ITEM_EXACT, 0, 0);
    CHECK_EQ(c->verdict, WINNOW_VERDICT_EXACT);
    CHECK_EQ(c->n_blocks_host, c->n_blocks_total);
    uint64_t at[] = {1000, 300, 100, 0}; /* from one segment on, none; nothing at all */
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 2; k++)
            CHECK_EQ(sim_text_truncate(&text[k], at[i]), 0);
        c = pair_step(at[i], 0.5f, 0, 0, 0);
        CHECK_EQ(c->verdict, WINNOW_VERDICT_EXACT);
        CHECK(c->mass_reached == 1);
        CHECK_EQ(c->n_blocks_host, c->n_blocks_total);
    }
    CHECK_EQ(sim_gpu.n_whole, 5);
    CHECK_EQ(sim_gpu.n_steps, 5);
    pair_finish(world);
}

/* A session that reads everything by policy has its steps taken like one that asks for it. */
static void test_whole__by_policy(void)
{
    struct winnow_session_options options = {.policy = WINNOW_POLICY_EXACT};
    struct sim_world world[2];
    pair_init(world, &(struct sim_options){.seed = test_seed()}, &options);
    for (uint64_t i = 0; i < 3; i++)
        CHECK_EQ(pair_step(N_TOKENS + i, 0.5f, 0, 0, 0)->verdict, WINNOW_VERDICT_EXACT);
    CHECK_EQ(sim_gpu.n_whole, 3);
    pair_finish(world);
}

/* A strict session's short step is launched again, whole. */
static void test_whole__strict_and_short_of_p(void)
{
    struct winnow_session_options options = {.strict = true};
    struct sim_world world[2];
    uint64_t n_steps = 0;
    pair_init(world, &(struct sim_options){.seed = test_seed()}, &options);
    text[0].q_scale = text[1].q_scale = 50; /* a score's error is as large as its gap to others */
    for (; sim_gpu.n_whole < 3 && n_steps < 2000; n_steps++) {
        const struct winnow_core_certificate *c = pair_step(N_TOKENS + n_steps, 0.9f, 0, 0, 0);
        CHECK(c->verdict <= WINNOW_VERDICT_MET);
    }
    printf("   3 of %" PRIu64 " steps stayed short\n", n_steps);
    CHECK_EQ(sim_gpu.n_whole, 3);
    CHECK_EQ(sim_gpu.n_steps, n_steps + 3);
    pair_finish(world);
}

/* Blocks of the layer that are on disk alone; flip: a byte of each there. */
static uint32_t on_disk(const struct sim_world *world, bool flip)
{
    const struct winnow_session *session = sim_session(world->core, text[0].id);
    uint32_t n = 0;
    for (uint32_t k = 0; k < session->context->layer[0].n_segments; k++) {
        const struct winnow_segment *segment = session->context->segment[k];
        uint32_t n_blocks = segment->n_blocks * segment->shape.n_kv_heads;
        for (uint32_t i = 0; i < n_blocks; i++) {
            if (winnow_segment_place(segment, 0)[i])
                continue;
            n++;
            struct winnow_place place = winnow_stored_place(world->store, segment->stored, i);
            char name[16];
            snprintf(name, sizeof name, "%08x.dat", place.file_no);
            CHECK(!flip || winnow_sim_disk_flip(world->disk, name, place.offset_bytes));
        }
    }
    return n;
}

/* What a whole read lacks is read before it is launched, once; what is much is the CPU's; and no
 * estimate stands in for what is lost. */
static void test_whole__blocks_on_disk(void)
{
    struct winnow_model_shape shape = sim_shape(1, 8, 1, 256, WINNOW_FP16);
    struct sim_world world;
    struct sim_options options = with_gpu((struct sim_options){.seed = test_seed(),
                                                               .host_pool_bytes = 40 << 20,
                                                               .disk_cap_bytes = 128 << 20,
                                                               .data_file_bytes = 4 << 20});
    float *out = malloc(8 * 256 * sizeof *out);
    sim_world_init(&world, &options);
    for (int i = 0; i < 2; i++) { /* 31 MiB each: the second drives out the first */
        sim_text_init(&text[i], &world, &shape, test_seed());
        CHECK_EQ(sim_text_open(&text[i], NULL), 0);
        CHECK_EQ(sim_text_fill(&text[i], 0, 4000, 128), 0);
    }
    sim_world_settle(&world);
    CHECK(on_disk(&world, false) > 1024);
    CHECK_EQ(sim_text_step(&text[0], 0, 4000, 1, out), 0);
    CHECK_EQ(sim_gpu.n_steps, 0);
    CHECK_EQ(sim_text_truncate(&text[0], 1500), 0);
    uint32_t n = on_disk(&world, true);
    CHECK(n > 0);
    sim_text_step_make(&text[0], &step, 0, 1500, 1, out);
    step.request.attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    CHECK_EQ(sim_text_run(&text[0], &step.request), -ENODATA);
    CHECK_EQ(sim_gpu.n_steps, 0);
    sim_world_settle(&world);
    CHECK_EQ(on_disk(&world, true), n);
    CHECK_EQ(sim_text_truncate(&text[0], 1500), 0);
    CHECK_EQ(sim_text_step(&text[0], 0, 1500, 1, out), 0);
    CHECK_EQ(text[0].last.attend.certificate.n_blocks_disk, n);
    CHECK_EQ(text[0].last.attend.certificate.verdict, WINNOW_VERDICT_EXACT);
    CHECK_EQ(sim_gpu.n_whole, 1);
    CHECK_EQ(sim_gpu.n_disk, 0);
    CHECK(sim_text_error(&text[0], 0, 1500, out) < 2e-3);
    CHECK_EQ(on_disk(&world, false), 0);
    free(out);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_whole__budget_ends);
    TEST_RUN(test_whole__asked_for_or_short);
    TEST_RUN(test_whole__by_policy);
    TEST_RUN(test_whole__strict_and_short_of_p);
    TEST_RUN(test_whole__blocks_on_disk);
    return TEST_END();
}
