/* Reads and attention of one step overlap: what it takes is the longer of the two, not their sum. */
#include "text.h"

enum { N_TOKENS = 16 + 23 * 128 + 64, N_HEADS = 8, LAYER = 0 };

struct timing {
    int64_t step_ns;
    uint32_t n_disk, in_flight_max;
};

static struct sim_text text;
static float out[N_HEADS * 64];

/* One step of a context that is half on disk, with virtual costs of the disk and of a block. */
static struct timing timing_of(int64_t per_op_ns, int64_t block_ns)
{
    struct sim_options options = {.seed = test_seed(),
                                  .disk_cap_bytes = 64 << 20,
                                  .data_file_bytes = 4 << 20,
                                  .block_ns = block_ns,
                                  .disk = winnow_sim_defaults(test_seed() + 1)};
    struct winnow_model_shape shape = sim_shape(4, N_HEADS, 1, 64, WINNOW_FP16);
    struct winnow_store_facts facts;
    struct sim_world world;
    struct timing timing;
    options.disk.per_op_ns = per_op_ns;
    options.disk.ns_per_byte = 0;
    options.disk.n_channels = 8;
    sim_world_init(&world, &options);
    sim_text_init(&text, &world, &shape, test_seed());
    text.q_scale = 0.1f;
    CHECK_EQ(sim_text_open(&text, NULL), 0);
    CHECK_EQ(sim_text_fill(&text, 0, N_TOKENS, 250), 0);
    sim_world_settle(&world);
    winnow_store_facts(world.store, &facts);
    CHECK(facts.in_flight_max < 32); /* nothing was read yet */
    int64_t begun_ns = sim_world_now(&world);
    CHECK_EQ(sim_text_step(&text, LAYER, N_TOKENS, 0.7f, out), 0);
    timing.step_ns = sim_world_now(&world) - begun_ns;
    timing.n_disk = text.last.attend.certificate.n_blocks_disk;
    winnow_store_facts(world.store, &facts);
    timing.in_flight_max = facts.in_flight_max;
    sim_world_finish(&world);
    return timing;
}

/* With a disk as slow as the attention, half as slow, and twice as slow. */
static void test_overlap__step_takes_the_longer_of_both(void)
{
    struct timing read = timing_of(80 * WINNOW_NS_PER_US, 0);
    struct timing attend = timing_of(1, WINNOW_NS_PER_US);
    CHECK(read.n_disk >= 64);
    CHECK(read.in_flight_max >= 32);
    double per_block_ns = (double)read.step_ns / ((double)attend.step_ns / WINNOW_NS_PER_US);
    for (int i = 0; i < 3; i++) {
        int64_t block_ns = (int64_t)(per_block_ns * (i == 0 ? 1 : i == 1 ? 0.5 : 2));
        attend = timing_of(1, block_ns);
        struct timing both = timing_of(80 * WINNOW_NS_PER_US, block_ns);
        int64_t longer_ns = read.step_ns > attend.step_ns ? read.step_ns : attend.step_ns;
        printf("   %u blocks from disk: read %.0f us, attend %.0f us, both %.0f us, %u in flight\n",
               both.n_disk, (double)read.step_ns / 1e3, (double)attend.step_ns / 1e3,
               (double)both.step_ns / 1e3, both.in_flight_max);
        CHECK((double)both.step_ns <= 1.15 * (double)longer_ns);
        CHECK_EQ(both.n_disk, read.n_disk);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_overlap__step_takes_the_longer_of_both);
    return TEST_END();
}
