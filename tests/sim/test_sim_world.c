/* The world itself: it runs the product, it can be repeated, its time is virtual. */
#include "text.h"

static float out[8 * 256];

/* A context that was spilled to a slow, shuffled disk still answers like dense attention, and the
 * certificate says what was read and how long that took. */
static void test_world__decodes_from_the_simulated_disk(void)
{
    struct sim_world world;
    struct sim_options options = {
        .seed = test_seed(), .shuffled = true, .jitter_ns = 20 * WINNOW_NS_PER_US};
    static struct sim_text text;
    sim_text_spilled(&text, &world, &options);
    uint32_t n_disk = 0;
    for (uint32_t layer = 0; layer < 4; layer++) {
        int64_t begun_ns = sim_world_now(&world);
        CHECK_EQ(sim_text_step(&text, layer, 1500, 1, out), 0);
        const struct winnow_core_certificate *c = &text.last.attend.certificate;
        int64_t micros = (sim_world_now(&world) - begun_ns) / WINNOW_NS_PER_US;
        CHECK(sim_text_error(&text, layer, 1500, out) < 1e-4);
        CHECK_EQ(c->bytes_read, (uint64_t)c->n_blocks_disk * winnow_block_bytes(&text.model.shape));
        CHECK(c->micros <= micros && c->micros + 50 > micros);
        n_disk += c->n_blocks_disk;
    }
    CHECK(n_disk > 0);
    CHECK_EQ(sim_text_close(&text), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_world__decodes_from_the_simulated_disk);
    return TEST_END();
}
