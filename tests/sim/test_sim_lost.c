/* Blocks that are lost on disk: who selects one is told, nobody else notices, and after a truncate and
 * the tokens sent again it is as if nothing had been. */
#include "text.h"

#include <storage/inside.h>

enum { LAYER = 2, N_TOKENS = 1500, N_LAYERS = 4, ROW = 4 * 256 };

static struct sim_text text;
static float calm[2][N_LAYERS][ROW], out[ROW];

static const char *damages[] = {"flip", "swap", "cut"};

/* A block of the layer that is on disk alone, in the segment given; UINT32_MAX: none is. */
static uint32_t block_find(const struct sim_world *world, uint32_t segment_idx, uint32_t from)
{
    const struct winnow_session *session = sim_session(world->core, text.id);
    const struct winnow_segment *segment = session->context->segment[segment_idx];
    uint32_t per_layer = segment->n_blocks * segment->shape.n_kv_heads;
    for (uint32_t i = from; segment->layer[LAYER].on_disk && i < per_layer; i++)
        if (!winnow_segment_place(segment, LAYER)[i])
            return i;
    return UINT32_MAX;
}

static struct winnow_place place_of(const struct sim_world *world, uint32_t segment_idx, uint32_t i,
                                    char name[16])
{
    const struct winnow_session *session = sim_session(world->core, text.id);
    const struct winnow_segment *segment = session->context->segment[segment_idx];
    uint32_t per_layer = segment->n_blocks * segment->shape.n_kv_heads;
    struct winnow_place place =
        winnow_stored_place(world->store, segment->stored, LAYER * per_layer + i);
    snprintf(name, 16, "%08x.dat", place.file_no);
    return place;
}

/* Does it to one block of the layer; returns its segment. */
static uint32_t damage_do(struct sim_world *world, const char *damage)
{
    uint32_t block_bytes = winnow_block_bytes(&text.model.shape);
    for (uint32_t k = 0; k < 11; k++) {
        char name[16];
        uint32_t a = block_find(world, k, 0), b = a == UINT32_MAX ? a : block_find(world, k, a + 1);
        if (b == UINT32_MAX)
            continue;
        uint64_t at = place_of(world, k, a, name).offset_bytes;
        uint64_t other = place_of(world, k, b, name).offset_bytes;
        if (!strcmp(damage, "flip"))
            CHECK(winnow_sim_disk_flip(world->disk, name, at + 12345));
        else if (!strcmp(damage, "swap"))
            CHECK(winnow_sim_disk_swap(world->disk, name, at, other, block_bytes));
        else
            CHECK(winnow_sim_disk_truncate(world->disk, name, at + 4096));
        return k;
    }
    test_fail(__FILE__, __LINE__, "no two blocks of the layer are on disk alone");
}

static void steps_run(float at[2][N_LAYERS][ROW])
{
    for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
        CHECK_EQ(sim_text_step(&text, layer, N_TOKENS, 0.9f, at[0][layer]), 0);
        CHECK_EQ(sim_text_step(&text, layer, N_TOKENS + 1, 1, at[1][layer]), 0);
    }
}

/* A byte flipped, two blocks that changed places, a file cut short. */
static void test_lost__truncate_and_resend_equals_undisturbed(void)
{
    static float again[2][N_LAYERS][ROW];
    struct sim_world world;
    struct sim_options options = {.seed = test_seed()};
    sim_text_spilled(&text, &world, &options);
    steps_run(calm);
    sim_world_finish(&world);
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        sim_text_spilled(&text, &world, &options);
        uint64_t first = 16 + 128 * (uint64_t)damage_do(&world, damages[i]);
        CHECK_EQ(sim_text_step(&text, LAYER, N_TOKENS, 1, out), -ENODATA);
        CHECK_EQ((text.last.truncate_to - 16) % 128, 0);
        CHECK_EQ(text.last.n_held, N_TOKENS + 1);
        if (strcmp(damages[i], "cut")) { /* which loses more than that */
            CHECK_EQ(text.last.truncate_to, first);
            CHECK_EQ(sim_text_step(&text, 0, N_TOKENS, 0.9f, out), 0);
            CHECK(!memcmp(out, calm[0][0], sizeof out));
        }
        for (int rc = -ENODATA; rc < 0;) { /* what the manual says, as often as it is said */
            uint64_t to = text.last.truncate_to;
            CHECK_EQ(sim_text_truncate(&text, to), 0);
            CHECK_EQ(sim_text_fill(&text, to, N_TOKENS, 128), 0);
            rc = 0;
            for (uint32_t layer = 0; rc == 0 && layer < N_LAYERS; layer++)
                rc = sim_text_step(&text, layer, N_TOKENS, 1, out);
            CHECK(rc == 0 || rc == -ENODATA);
        }
        CHECK_EQ(sim_text_truncate(&text, N_TOKENS), 0);
        steps_run(again);
        CHECK(!memcmp(calm, again, sizeof calm));
        sim_world_finish(&world);
    }
}

/* Every block of a layer that is on disk alone is lost: a step that may degrade answers with their
 * estimates, and says so; one that may not is refused. */
static void test_lost__estimates_instead_of_blocks(void)
{
    static struct sim_step step;
    struct sim_world world;
    sim_text_spilled(&text, &world, &(struct sim_options){.seed = test_seed()});
    for (uint32_t k = 0; k < 11; k++)
        for (uint32_t i = 0; (i = block_find(&world, k, i)) != UINT32_MAX; i++) {
            char name[16];
            uint64_t at = place_of(&world, k, i, name).offset_bytes;
            CHECK(winnow_sim_disk_flip(world.disk, name, at + i));
        }
    text.seq = 7;
    text.q_scale = 0.1f;
    sim_text_step_make(&text, &step, LAYER, N_TOKENS, 0.97f, out);
    CHECK_EQ(sim_text_run(&text, &step.request), -ENODATA);
    step.request.attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    CHECK_EQ(sim_text_run(&text, &step.request), 0);
    const struct winnow_core_certificate *c = &step.request.attend.certificate;
    CHECK_EQ(c->verdict, WINNOW_VERDICT_DEGRADED);
    CHECK_EQ(c->reason, ENODATA);
    CHECK(c->n_blocks_missed > 0 && c->n_blocks_missed <= c->n_blocks_disk);
    CHECK(c->mass_reached < 0.97f);
    uint64_t n_reads = c->n_blocks_disk + c->n_blocks_missed; /* each of those was tried twice */
    CHECK_EQ(c->bytes_read, n_reads * winnow_block_bytes(&text.model.shape));
    printf("   %u of %u blocks lost: mass %.3f\n", c->n_blocks_missed,
           c->n_blocks_disk + c->n_blocks_host, (double)c->mass_reached);
    for (uint32_t i = 0; i < ROW; i++)
        CHECK(isfinite(out[i]));
    step.request.attend.flags |= WINNOW_ITEM_EXACT; /* estimates are no exact answer */
    CHECK_EQ(sim_text_run(&text, &step.request), -ENODATA);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_lost__truncate_and_resend_equals_undisturbed);
    TEST_RUN(test_lost__estimates_instead_of_blocks);
    return TEST_END();
}
