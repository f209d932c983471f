/* Faults: every I/O of a scenario fails once in every way, and many fail at random. Whatever
 * happens, no wrong byte is called right, every request ends, and no grain is lost. */
#include "fixture.h"

#include <storage/inside.h>

enum { N_BLOCKS = 300, N_ALONE = 24, N_SEGMENTS = 3, N_DONES_MAX = 4 * N_BLOCKS };

struct scenario {
    struct fixture fixture;
    uint32_t block_crc[N_SEGMENTS][N_BLOCKS];
    struct winnow_stored *stored[N_SEGMENTS];
    bool written[N_SEGMENTS];
    uint32_t n_lost, n_late, n_refused;
};

static uint64_t n_faults; /* that operations met, over all tests */

static void faults_count(const struct fixture *fixture)
{
    struct winnow_sim_counts counts;
    winnow_sim_disk_counts(fixture->disk, &counts);
    for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++)
        n_faults += counts.n_faults[fault];
}

/* What holds at any time, whatever failed. */
static void invariants_check(struct scenario *scenario)
{
    struct winnow_store *store = scenario->fixture.store;
    struct winnow_sim_counts counts;
    winnow_sim_disk_counts(scenario->fixture.disk, &counts);
    CHECK(counts.in_flight_max <= store->facts.window + 1);
    const struct winnow_grains *grains = &store->grains;
    CHECK_EQ(grains->n_free + grains->n_used + grains->n_bad, store->n_files * grains->n_per_file);
    CHECK(store->n_files * store->data_file_bytes <= store->disk_cap_bytes);
}

/* Runs until nothing more happens, freeing what is stuck; counts results by tag. */
static void scenario_run(struct scenario *scenario, int32_t *result, uint32_t n_tags)
{
    static struct winnow_store_done done[N_DONES_MAX];
    uint8_t ended[N_DONES_MAX] = {0};
    uint32_t n_left = n_tags;
    while (n_left) {
        uint32_t n_done = fixture_run(&scenario->fixture, done, N_DONES_MAX, WINNOW_NEVER_NS);
        for (uint32_t i = 0; i < n_done; i++) {
            CHECK(done[i].tag < n_tags && !ended[done[i].tag]);
            if (done[i].held) {
                CHECK_EQ(done[i].result, -ETIMEDOUT);
                scenario->n_late++;
                continue;
            }
            ended[done[i].tag] = 1;
            result[done[i].tag] = done[i].result;
            n_left--;
        }
        if (!n_done)
            winnow_sim_disk_release(scenario->fixture.disk);
        invariants_check(scenario);
    }
}

static void segment_store(struct scenario *scenario, uint32_t segment)
{
    struct fixture *fixture = &scenario->fixture;
    int rc;
    for (uint32_t tries = 0;
         (rc = winnow_store_segment_create(fixture->store, 1, N_BLOCKS, SLOT_BYTES,
                                           scenario->block_crc[segment],
                                           &scenario->stored[segment])) == -EAGAIN;
         tries++) {
        CHECK(tries < 8);
        fixture_settle(fixture);
        winnow_sim_disk_release(fixture->disk);
    }
    if (rc < 0) {
        CHECK_EQ(rc, -ENOSPC);
        scenario->n_refused++;
        return;
    }
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        block_fill(slot(fixture, i), SLOT_BYTES, segment, i);
    int32_t result = -EIO;
    rc = winnow_store_write(fixture->store, scenario->stored[segment], 0, N_BLOCKS,
                            slot(fixture, 0), 0);
    if (!rc)
        scenario_run(scenario, &result, 1);
    else
        CHECK_EQ(rc, -EIO);
    CHECK(result == 0 || result == -EIO || result == -ENOSPC);
    scenario->written[segment] = result == 0;
}

/* Reads a segment: its first blocks backwards in memory, each into a place of its own, the rest in
 * order. */
static void segment_read(struct scenario *scenario, uint32_t segment)
{
    struct fixture *fixture = &scenario->fixture;
    static struct winnow_store_read read[N_BLOCKS];
    int32_t result[N_BLOCKS];
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        read[i] = (struct winnow_store_read){
            .stored = scenario->stored[segment],
            .block_idx = i,
            .data = slot(fixture, N_BLOCKS + (i < N_ALONE ? N_ALONE - 1 - i : i)),
            .tag = i};
    CHECK_EQ(winnow_store_read(fixture->store, read, N_BLOCKS,
                               segment % 2 ? WINNOW_IO_DECODE : WINNOW_IO_EXACT,
                               winnow_sim_disk_now(fixture->disk) + WINNOW_NS_PER_S),
             0);
    scenario_run(scenario, result, N_BLOCKS);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        CHECK(result[i] == 0 || result[i] == -ENODATA || result[i] == -ETIMEDOUT ||
              result[i] == -ECANCELED);
        scenario->n_lost += result[i] != 0;
        if (!result[i] && scenario->written[segment])
            CHECK(block_equal(read[i].data, SLOT_BYTES, segment, i));
    }
}

/* False: the store did not open, which the fault explains. */
static bool scenario_open(struct scenario *scenario, int fault)
{
    char text[256];
    struct winnow_store_options options = fixture_options(&scenario->fixture);
    options.disk_cap_bytes = 12 << 20;
    int rc = winnow_store_open(&options, &scenario->fixture.store, text);
    if (!rc)
        return true;
    CHECK(fault != 0 && !scenario->fixture.store && text[0]);
    CHECK(rc == -EIO || rc == -ENOSPC || rc == -ETIMEDOUT);
    return false;
}

static void scenario_play(struct scenario *scenario)
{
    for (uint32_t segment = 0; segment < N_SEGMENTS; segment++)
        segment_store(scenario, segment);
    for (uint32_t segment = 0; segment < N_SEGMENTS; segment++)
        if (scenario->stored[segment])
            segment_read(scenario, segment);
    for (uint32_t segment = 0; segment < N_SEGMENTS; segment++)
        if (scenario->stored[segment])
            winnow_store_segment_destroy(scenario->fixture.store, scenario->stored[segment]);
    fixture_settle(&scenario->fixture);
    invariants_check(scenario);
    CHECK_EQ(scenario->fixture.store->grains.n_used, 0);
    CHECK_EQ(scenario->fixture.store->n_moves, 0);
}

/* Plays with the n-th operation failing n_times in a row. False: the scenario has fewer. */
static bool scenario_fail(uint64_t nth, uint64_t n_times, enum winnow_sim_fault fault)
{
    static struct scenario scenario;
    struct winnow_sim_counts counts;
    struct winnow_sim_options shape = winnow_sim_defaults(5);
    scenario = (struct scenario){0};
    shape.file_bytes_max = 4 << 20;
    fixture_init_shape(&scenario.fixture, &shape);
    winnow_sim_disk_fail(scenario.fixture.disk, 0, nth, n_times, fault);
    bool open = scenario_open(&scenario, (int)fault);
    if (open)
        scenario_play(&scenario);
    winnow_sim_disk_counts(scenario.fixture.disk, &counts);
    bool met = counts.n_faults[fault] > 0;
    faults_count(&scenario.fixture);

    /* One failure is always made good, but for a disk that does not answer in time. */
    bool slow = fault == WINNOW_SIM_LATE || fault == WINNOW_SIM_STUCK;
    if (open && n_times == 1 && !slow)
        CHECK_EQ(scenario.n_lost, 0);
    winnow_sim_disk_release(scenario.fixture.disk);
    if (open)
        CHECK_EQ(winnow_store_close(scenario.fixture.store), 0);
    if (open || fault != WINNOW_SIM_STUCK) /* an open that never ended keeps its instance */
        winnow_sim_disk_destroy(scenario.fixture.disk);
    winnow_alloc_unmap(scenario.fixture.arena, (size_t)N_SLOTS * SLOT_BYTES);
    return met;
}

/* Each operation of the scenario fails once, in each way. */
static void test_fault__each_operation_fails_once(void)
{
    for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++) {
        uint64_t nth = 1;
        while (scenario_fail(nth, 1, (enum winnow_sim_fault)fault))
            nth++;
        CHECK(nth > 10);
    }
}

/* From each operation on, twenty fail: retries and second places fail too. */
static void test_fault__each_operation_fails_on(void)
{
    for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++)
        for (uint64_t nth = 1; scenario_fail(nth, 20, (enum winnow_sim_fault)fault);)
            nth++;
}

/* Eight refusals for want of resources are waited out, the ninth is an error. */
static void test_fault__again_is_bounded(void)
{
    for (uint32_t n_again = 8; n_again <= 18; n_again += 10) {
        struct fixture fixture;
        uint32_t block_crc[1];
        struct winnow_store_done done;
        fixture_init(&fixture, test_seed());
        struct winnow_stored *stored = segment_write(&fixture, 1, 1, block_crc);
        fixture_settle(&fixture);
        winnow_sim_disk_fail(fixture.disk, WINNOW_IO_READ, 1, n_again, WINNOW_SIM_EAGAIN);
        segment_ask(&fixture, stored, 1, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
        CHECK_EQ(fixture_run(&fixture, &done, 1, WINNOW_NEVER_NS), 1);
        CHECK_EQ(done.result, n_again == 8 ? 0 : -ENODATA);
        struct winnow_store_facts facts;
        winnow_store_facts(fixture.store, &facts);
        CHECK_EQ(facts.errors_io, n_again == 8 ? 0 : 2);
        fixture_finish(&fixture);
    }
}

/* An EIO on a merged read is read again block by block: a bad sector costs its own block. */
static void test_fault__merged_read_is_taken_apart(void)
{
    struct fixture fixture;
    static uint32_t block_crc[N_BLOCKS];
    static struct winnow_store_done done[N_BLOCKS];
    struct winnow_store_facts facts;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 1, 64, block_crc);
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_READ, 1, 2, WINNOW_SIM_EIO);
    segment_ask(&fixture, stored, 64, 64, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, 64, WINNOW_NEVER_NS), 64);
    uint32_t n_lost = 0;
    for (uint32_t i = 0; i < 64; i++)
        n_lost += done[i].result == -ENODATA;
    CHECK_EQ(n_lost, 1);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.retries, 64);
    CHECK_EQ(facts.errors_io, 65);
    fixture_finish(&fixture);
}

/* Reads that are tried again go alone, though they lie side by side: the next failure costs one. */
static void test_fault__retries_do_not_merge(void)
{
    struct fixture fixture;
    uint32_t block_crc[8];
    struct winnow_store_done done[2];
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 1, 8, block_crc);
    fixture_settle(&fixture);
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_READ, 1, 3, WINNOW_SIM_EIO);
    for (uint32_t i = 2; i-- > 0;) { /* block 5's failure is found last and stands first */
        struct winnow_store_read read = {
            .stored = stored, .block_idx = 5 + i, .data = slot(&fixture, 8 + i), .tag = i};
        CHECK_EQ(winnow_store_read(fixture.store, &read, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
        winnow_store_step(fixture.store, winnow_sim_disk_now(fixture.disk));
    }
    winnow_sim_disk_now_set(fixture.disk,
                            winnow_sim_disk_now(fixture.disk) + 10 * WINNOW_NS_PER_MS);
    CHECK_EQ(fixture_run(&fixture, done, 2, WINNOW_NEVER_NS), 2);
    CHECK_EQ((done[0].result == -ENODATA) + (done[1].result == -ENODATA), 1);
    fixture_finish(&fixture);
}

/* A failed write goes elsewhere and is read from there; its old grain is not used again. */
static void test_fault__failed_write_moves(void)
{
    struct fixture fixture;
    static uint32_t block_crc[N_BLOCKS];
    static struct winnow_store_done done[N_BLOCKS];
    struct winnow_store_facts facts;
    fixture_init(&fixture, test_seed());
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_WRITE, 2, 1, WINNOW_SIM_EIO);
    struct winnow_stored *stored = segment_make(&fixture, N_BLOCKS, block_crc);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        block_fill(slot(&fixture, i), SLOT_BYTES, 1, i);
    struct winnow_place before = winnow_stored_place(fixture.store, stored, N_BLOCKS - 1);
    CHECK_EQ(winnow_store_write(fixture.store, stored, 0, N_BLOCKS, slot(&fixture, 0), 0), 0);
    CHECK_EQ(fixture_run(&fixture, done, 1, WINNOW_NEVER_NS), 1);
    CHECK_EQ(done[0].result, 0);
    struct winnow_place after = winnow_stored_place(fixture.store, stored, N_BLOCKS - 1);
    CHECK(before.file_no != after.file_no || before.offset_bytes != after.offset_bytes);
    segment_ask(&fixture, stored, N_BLOCKS, N_BLOCKS, WINNOW_IO_EXACT, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, N_BLOCKS, WINNOW_NEVER_NS), N_BLOCKS);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        CHECK_EQ(done[i].result, 0);
        CHECK(block_equal(slot(&fixture, N_BLOCKS + i), SLOT_BYTES, 1, i));
    }
    winnow_store_segment_destroy(fixture.store, stored);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.bad_bytes, WINNOW_GRAIN_BYTES);
    CHECK_EQ(facts.used_bytes, 0);
    CHECK(!facts.degraded);
    fixture_finish(&fixture);
}

/* The third write error within a minute ends writing; what is on disk is read on. */
static void test_fault__three_write_errors_degrade(void)
{
    struct fixture fixture;
    static uint32_t block_crc[2][N_BLOCKS];
    static struct winnow_store_done done[64];
    struct winnow_store_facts facts;
    struct winnow_stored *none;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 1, 64, block_crc[0]);
    struct winnow_stored *other = segment_make(&fixture, 64, block_crc[1]);
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_WRITE, 1, 3, WINNOW_SIM_ENOSPC);
    for (uint32_t i = 0; i < 2; i++) { /* here and elsewhere; here */
        CHECK_EQ(winnow_store_write(fixture.store, other, 0, 64, slot(&fixture, 0), 0), 0);
        CHECK_EQ(fixture_run(&fixture, done, 1, WINNOW_NEVER_NS), 1);
        CHECK_EQ(done[0].result, -ENOSPC);
    }
    winnow_store_facts(fixture.store, &facts);
    CHECK(facts.degraded);
    CHECK_EQ(winnow_store_write(fixture.store, other, 0, 64, slot(&fixture, 0), 0), -EIO);
    CHECK_EQ(winnow_store_segment_create(fixture.store, 1, 1, SLOT_BYTES, block_crc[1], &none),
             -ENOSPC);
    segment_ask(&fixture, stored, 64, 64, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, 64, WINNOW_NEVER_NS), 64);
    for (uint32_t i = 0; i < 64; i++)
        CHECK_EQ(done[i].result, 0);
    fixture_finish(&fixture);
}

/* A block that is lost costs its grain; sixteen within a minute cost their file, which takes no
 * more segments and serves on with what it holds. */
static void test_fault__a_bad_file_is_left(void)
{
    struct fixture fixture;
    static uint32_t block_crc[N_BLOCKS];
    static struct winnow_store_done done[64];
    struct winnow_store_facts facts;
    for (uint32_t n_bad = 1; n_bad <= WINNOW_N_READ_ERRORS; n_bad += WINNOW_N_READ_ERRORS - 1) {
        fixture_init(&fixture, test_seed());
        fixture_settle(&fixture);
        struct winnow_stored *stored = segment_write(&fixture, 1, 64, block_crc);
        struct winnow_place place = winnow_stored_place(fixture.store, stored, 0);
        char name[16];
        snprintf(name, sizeof name, "%08x.dat", place.file_no);
        for (uint32_t i = 0; i < n_bad; i++)
            CHECK(winnow_sim_disk_flip(fixture.disk, name, place.offset_bytes + i * SLOT_BYTES));
        segment_ask(&fixture, stored, 64, 64, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
        CHECK_EQ(fixture_run(&fixture, done, 64, WINNOW_NEVER_NS), 64);
        uint32_t n_lost = 0;
        for (uint32_t i = 0; i < 64; i++)
            n_lost += done[i].result == -ENODATA;
        CHECK_EQ(n_lost, n_bad);
        winnow_store_segment_destroy(fixture.store, stored);
        winnow_store_facts(fixture.store, &facts);
        CHECK_EQ(facts.bad_bytes, n_bad == 1 ? WINNOW_GRAIN_BYTES : 4 << 20);
        CHECK_EQ(facts.used_bytes, 0);
        fixture_finish(&fixture);
    }
}

/* Random faults of all kinds at once, in three hundred lives: never a wrong byte. */
static void test_fault__random_faults_give_no_wrong_byte(void)
{
    uint32_t n_lost = 0, n_read = 0;
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    for (uint32_t life = 0; life < 300; life++) {
        static struct scenario scenario;
        struct winnow_sim_options shape = winnow_sim_defaults(winnow_rng_next(&rng));
        scenario = (struct scenario){0};
        shape.file_bytes_max = 4 << 20;
        for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++)
            shape.p[fault] = winnow_rng_below(&rng, 4) ? 0 : 0.2 * winnow_rng_unit(&rng);
        fixture_init_shape(&scenario.fixture, &shape);
        bool open = scenario_open(&scenario, 1);
        if (open) {
            scenario_play(&scenario);
            n_lost += scenario.n_lost;
            n_read += N_SEGMENTS * N_BLOCKS;
            while (winnow_store_close(scenario.fixture.store) == -EBUSY)
                winnow_sim_disk_release(scenario.fixture.disk);
        }
        struct winnow_sim_counts counts;
        faults_count(&scenario.fixture);
        winnow_sim_disk_counts(scenario.fixture.disk, &counts);
        if (!counts.in_flight)
            winnow_sim_disk_destroy(scenario.fixture.disk);
        winnow_alloc_unmap(scenario.fixture.arena, (size_t)N_SLOTS * SLOT_BYTES);
    }
    CHECK(n_lost > 0 && n_lost < n_read);
}

/* Each allocation of an open fails once, and then all from it on: an error, no leak, no file of
 * a former life lost. */
static void test_fault__each_allocation_of_open_fails(void)
{
    for (int onwards = 0; onwards < 2; onwards++) {
        bool opened = false;
        for (uint64_t nth = 1; !opened; nth++) {
            struct fixture fixture;
            char text[256];
            uint64_t n_bytes;
            struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
            fixture_init_shape(&fixture, &shape);
            winnow_sim_disk_put(fixture.disk, "00000001.dat", 4 << 20);
            struct winnow_store_options options = fixture_options(&fixture);
            winnow_alloc_fail_at(nth, onwards);
            int rc = winnow_store_open(&options, &fixture.store, text);
            winnow_alloc_fail_at(0, 0);
            CHECK(winnow_sim_disk_file(fixture.disk, "00000001.dat", &n_bytes));
            opened = rc == 0;
            if (!opened) {
                CHECK_EQ(rc, -ENOMEM);
                CHECK(!fixture.store && text[0]);
            }
            CHECK(nth < 100);
            fixture_finish(&fixture);
        }
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_fault__each_operation_fails_once);
    TEST_RUN(test_fault__each_operation_fails_on);
    TEST_RUN(test_fault__again_is_bounded);
    TEST_RUN(test_fault__merged_read_is_taken_apart);
    TEST_RUN(test_fault__retries_do_not_merge);
    TEST_RUN(test_fault__failed_write_moves);
    TEST_RUN(test_fault__three_write_errors_degrade);
    TEST_RUN(test_fault__a_bad_file_is_left);
    TEST_RUN(test_fault__random_faults_give_no_wrong_byte);
    TEST_RUN(test_fault__each_allocation_of_open_fails);
    TEST_ROW(F5, n_faults);
    return TEST_END();
}
