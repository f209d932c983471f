#include "fixture.h"

#include <storage/inside.h>

enum { N_BLOCKS = 64 };

/* Place of a block on the medium. */
static void block_place(const struct fixture *fixture, const struct winnow_stored *stored,
                        uint32_t block_idx, char name[16], uint64_t *ret_offset_bytes)
{
    struct winnow_place place = winnow_stored_place(fixture->store, stored, block_idx);
    snprintf(name, 16, "%08x.dat", place.file_no);
    *ret_offset_bytes = place.offset_bytes;
}

/* Reads all blocks and returns each one's result; whatever claims 0 must be right. */
static void segment_check(struct fixture *fixture, struct winnow_stored *stored, uint64_t segment,
                          uint32_t n_blocks, int32_t *result)
{
    struct winnow_store_done done[N_BLOCKS];
    segment_ask(fixture, stored, n_blocks, N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(fixture, done, n_blocks, WINNOW_NEVER_NS), n_blocks);
    for (uint32_t i = 0; i < n_blocks; i++) {
        CHECK(done[i].tag < n_blocks && !done[i].held);
        result[done[i].tag] = done[i].result;
        if (!done[i].result)
            CHECK(block_equal(slot(fixture, N_BLOCKS + (uint32_t)done[i].tag), SLOT_BYTES, segment,
                              done[i].tag));
    }
}

/* What was written is read, byte for byte, and every byte is accounted once. */
static void test_store__written_blocks_read_equal(void)
{
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS];
    int32_t result[N_BLOCKS];
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    segment_check(&fixture, stored, 3, N_BLOCKS, result);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        CHECK_EQ(result[i], 0);

    struct winnow_store_facts facts;
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.read_bytes[WINNOW_IO_DECODE], N_BLOCKS * SLOT_BYTES);
    CHECK_EQ(facts.written_bytes, N_BLOCKS * SLOT_BYTES);
    CHECK_EQ(facts.in_flight, 0);
    winnow_store_segment_destroy(fixture.store, stored);
    fixture_finish(&fixture);
}

/* A changed byte costs its own block: never a neighbour, never wrong data. */
static void test_store__flipped_byte_misses_one_block(void)
{
    enum { BAD = 17 };
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS];
    int32_t result[N_BLOCKS];
    char name[16];
    uint64_t offset_bytes;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    block_place(&fixture, stored, BAD, name, &offset_bytes);
    CHECK(winnow_sim_disk_flip(fixture.disk, name, offset_bytes + 1234));
    segment_check(&fixture, stored, 3, N_BLOCKS, result);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        CHECK_EQ(result[i], i == BAD ? -ENODATA : 0);
    winnow_store_segment_destroy(fixture.store, stored);
    fixture_finish(&fixture);
}

/* Two blocks that changed places are both missed. */
static void test_store__swapped_blocks_miss_both(void)
{
    enum { A = 5, B = 40 };
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS];
    int32_t result[N_BLOCKS];
    char name[16];
    uint64_t a_bytes, b_bytes;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    block_place(&fixture, stored, A, name, &a_bytes);
    block_place(&fixture, stored, B, name, &b_bytes);
    CHECK(winnow_sim_disk_swap(fixture.disk, name, a_bytes, b_bytes, SLOT_BYTES));
    segment_check(&fixture, stored, 3, N_BLOCKS, result);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        CHECK_EQ(result[i], i == A || i == B ? -ENODATA : 0);
    fixture_finish(&fixture);
}

/* A file that was cut short loses what lay behind the cut, and nothing before it. */
static void test_store__shortened_file_misses_its_end(void)
{
    enum { KEPT = 23 };
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS];
    int32_t result[N_BLOCKS];
    char name[16];
    uint64_t cut_bytes;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    block_place(&fixture, stored, KEPT, name, &cut_bytes);
    CHECK(winnow_sim_disk_truncate(fixture.disk, name, cut_bytes + 100));
    segment_check(&fixture, stored, 3, N_BLOCKS, result);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        CHECK_EQ(result[i], i < KEPT ? 0 : -ENODATA);
    fixture_finish(&fixture);
}

static uint64_t n_reads(const struct fixture *fixture)
{
    struct winnow_sim_counts counts;
    winnow_sim_disk_counts(fixture->disk, &counts);
    return counts.n_ops[WINNOW_IO_READ];
}

/* Neighbours in the file become one read: up to 256 KiB for decode, 1 MiB for exact, and into no more
 * than 32 places. */
static void test_store__adjacent_blocks_merge(void)
{
    enum { N = 512 };
    struct fixture fixture;
    static uint32_t block_crc[N];
    static struct winnow_store_done done[N];
    static struct winnow_store_read read[N];
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N, block_crc);

    uint64_t before = n_reads(&fixture);
    segment_ask(&fixture, stored, N, N, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), N);
    CHECK_EQ(n_reads(&fixture) - before, N * SLOT_BYTES / (256 << 10));
    for (uint32_t i = 0; i < N; i++) {
        CHECK_EQ(done[i].disk_bytes, SLOT_BYTES);
        CHECK(block_equal(slot(&fixture, N + i), SLOT_BYTES, 3, i));
    }

    before = n_reads(&fixture);
    segment_ask(&fixture, stored, N, N, WINNOW_IO_EXACT, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), N);
    CHECK_EQ(n_reads(&fixture) - before, N * SLOT_BYTES / (1 << 20));

    for (uint32_t i = 0; i < N; i++) /* backwards in memory, and asked in that order */
        read[i] = (struct winnow_store_read){
            .stored = stored, .block_idx = N - 1 - i, .data = slot(&fixture, N + i), .tag = i};
    before = n_reads(&fixture);
    CHECK_EQ(winnow_store_read(fixture.store, read, N, WINNOW_IO_EXACT, WINNOW_NEVER_NS), 0);
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), N);
    CHECK_EQ(n_reads(&fixture) - before, N / 32);
    for (uint32_t i = 0; i < N; i++)
        CHECK(block_equal(slot(&fixture, N + i), SLOT_BYTES, 3, N - 1 - i));
    fixture_finish(&fixture);
}

/* A batch in any order goes to the disk by place, so neighbours that were asked apart merge too. */
static void test_store__batch_is_sorted_by_place(void)
{
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS], order[N_BLOCKS] = {0};
    struct winnow_store_done done[N_BLOCKS];
    struct winnow_store_read read[N_BLOCKS];
    struct winnow_rng rng;
    fixture_init(&fixture, test_seed());
    winnow_rng_init(&rng, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        uint32_t j = (uint32_t)winnow_rng_below(&rng, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        read[i] = (struct winnow_store_read){.stored = stored,
                                             .block_idx = order[i],
                                             .data = slot(&fixture, N_BLOCKS + order[i]),
                                             .tag = order[i]};
    uint64_t before = n_reads(&fixture);
    CHECK_EQ(winnow_store_read(fixture.store, read, N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS),
             0);
    CHECK_EQ(fixture_run(&fixture, done, N_BLOCKS, WINNOW_NEVER_NS), N_BLOCKS);
    CHECK_EQ(n_reads(&fixture) - before, 1);
    fixture_finish(&fixture);
}

/* More reads than the window: it is filled to the brim, and never past it. */
static void test_store__window_is_filled_and_kept(void)
{
    enum { N = 1000 };
    struct fixture fixture;
    static uint32_t block_crc[N];
    static struct winnow_store_done done[N];
    static struct winnow_store_read read[N];
    struct winnow_sim_counts counts;
    struct winnow_store_facts facts;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N, block_crc);
    for (uint32_t i = 0; i < N; i++) /* no two neighbours */
        read[i] = (struct winnow_store_read){.stored = stored,
                                             .block_idx = 2 * (i % (N / 2)),
                                             .data = slot(&fixture, N + i),
                                             .tag = i};
    CHECK_EQ(winnow_store_read(fixture.store, read, N, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
    CHECK_EQ(winnow_store_read(fixture.store, read, 25, WINNOW_IO_DECODE, WINNOW_NEVER_NS),
             -EAGAIN);
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), N);
    winnow_sim_disk_counts(fixture.disk, &counts);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.window, 128);
    CHECK_EQ(facts.in_flight_max, 128);
    CHECK(counts.in_flight_max <= 128 + 1); /* and the sync side's one */
    fixture_finish(&fixture);
}

/* A later decode read overtakes exact reads and read-ahead that wait; read-ahead takes half the
 * window at most. */
static void test_store__decode_goes_first(void)
{
    enum { N = 600, N_DECODE = 8 };
    struct fixture fixture;
    static uint32_t block_crc[N];
    static struct winnow_store_done done[N + N_DECODE];
    struct winnow_store_read read;
    struct winnow_sim_counts counts;
    struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
    shape.file_bytes_max = 4 << 20;
    shape.jitter = 0;
    fixture_init_shape(&fixture, &shape);
    struct winnow_store_options options = fixture_options(&fixture);
    fixture_open(&fixture, &options);
    struct winnow_stored *stored = segment_write(&fixture, 3, N, block_crc);
    fixture_settle(&fixture);

    for (uint32_t i = 0; i < N; i++) {
        read = (struct winnow_store_read){
            .stored = stored, .block_idx = N - 1 - i, .data = slot(&fixture, N + i), .tag = 1};
        CHECK_EQ(winnow_store_read(fixture.store, &read, 1, WINNOW_IO_READAHEAD, WINNOW_NEVER_NS),
                 0);
    }
    winnow_store_step(fixture.store, winnow_sim_disk_now(fixture.disk));
    winnow_sim_disk_counts(fixture.disk, &counts);
    CHECK_EQ(counts.in_flight, 64);
    for (uint32_t i = 0; i < N_DECODE; i++) {
        read = (struct winnow_store_read){
            .stored = stored, .block_idx = 2 * i, .data = slot(&fixture, 2 * N + i), .tag = 2};
        CHECK_EQ(winnow_store_read(fixture.store, &read, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
    }
    CHECK_EQ(fixture_run(&fixture, done, N + N_DECODE, WINNOW_NEVER_NS), N + N_DECODE);
    uint32_t last_decode = 0;
    for (uint32_t i = 0; i < N + N_DECODE; i++)
        last_decode = done[i].tag == 2 ? i : last_decode;
    CHECK(last_decode < 64 + N_DECODE); /* behind what was in flight, before what waited */
    fixture_finish(&fixture);
}

/* Beside decode reads a spill goes on, a piece in ten milliseconds; without them at full speed. */
static void test_store__spill_yields_to_decode(void)
{
    enum { N = 1024, N_READ = 64 };
    struct fixture fixture;
    static uint32_t block_crc[2][N];
    struct winnow_store_done done[N_READ];
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_READ, block_crc[0]);
    struct winnow_stored *spilled = segment_make(&fixture, N, block_crc[1]); /* 4 pieces */
    fixture_settle(&fixture);

    segment_ask(&fixture, stored, N_READ, 1024, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(fixture_run(&fixture, done, N_READ, WINNOW_NEVER_NS), N_READ);
    int64_t begin_ns = winnow_sim_disk_now(fixture.disk);
    CHECK_EQ(winnow_store_write(fixture.store, spilled, 0, N, slot(&fixture, 0), 9), 0);
    bool written = false;
    while (!written) { /* decode steps, one after the other */
        segment_ask(&fixture, stored, N_READ, 1024, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
        for (uint32_t n = 0; n < N_READ;) {
            CHECK_EQ(fixture_run(&fixture, done, 1, WINNOW_NEVER_NS), 1);
            written |= done[0].tag == 9 && done[0].disk_bytes > SLOT_BYTES;
            n += done[0].disk_bytes == SLOT_BYTES;
        }
    }
    int64_t beside_ns = winnow_sim_disk_now(fixture.disk) - begin_ns;
    CHECK(beside_ns >= 20 * WINNOW_NS_PER_MS && beside_ns < 60 * WINNOW_NS_PER_MS);

    fixture_run(&fixture, done, 1, winnow_sim_disk_now(fixture.disk) + 200 * WINNOW_NS_PER_MS);
    winnow_sim_disk_now_set(fixture.disk,
                            winnow_sim_disk_now(fixture.disk) + 200 * WINNOW_NS_PER_MS);
    begin_ns = winnow_sim_disk_now(fixture.disk);
    CHECK_EQ(winnow_store_write(fixture.store, spilled, 0, N, slot(&fixture, 0), 9), 0);
    CHECK_EQ(fixture_run(&fixture, done, 1, WINNOW_NEVER_NS), 1);
    CHECK(winnow_sim_disk_now(fixture.disk) - begin_ns < 10 * WINNOW_NS_PER_MS);
    fixture_finish(&fixture);
}

/* A spill has two pieces in flight and no more, of 1 MiB at most, whatever waits behind them. */
static void test_store__spill_goes_two_at_a_time(void)
{
    enum { N = 1024 };
    struct fixture fixture;
    static uint32_t block_crc[N];
    struct winnow_store_done done;
    struct winnow_sim_counts counts;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_make(&fixture, N, block_crc);
    fixture_settle(&fixture);
    CHECK_EQ(winnow_store_write(fixture.store, stored, 0, N, slot(&fixture, 0), 9), 0);
    int64_t until_ns = winnow_sim_disk_now(fixture.disk);
    while (!fixture_run(&fixture, &done, 1, until_ns)) {
        winnow_sim_disk_counts(fixture.disk, &counts);
        CHECK(counts.in_flight <= 2);
        until_ns += 100 * WINNOW_NS_PER_US;
        winnow_sim_disk_now_set(fixture.disk, until_ns);
    }
    winnow_sim_disk_counts(fixture.disk, &counts);
    CHECK_EQ(counts.n_ops[WINNOW_IO_WRITE], N * SLOT_BYTES >> 20);
    fixture_finish(&fixture);
}

/* A read that is late is told so once, its memory comes back when the disk lets go of it, and its
 * bytes are counted then. */
static void test_store__late_read_holds_its_memory(void)
{
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS];
    struct winnow_store_done done[2];
    struct winnow_store_facts facts;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    fixture_settle(&fixture);
    int64_t now_ns = winnow_sim_disk_now(fixture.disk);
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_READ, 1, 1, WINNOW_SIM_LATE);
    segment_ask(&fixture, stored, 1, N_BLOCKS, WINNOW_IO_DECODE, now_ns + 5 * WINNOW_NS_PER_MS);

    CHECK_EQ(fixture_run(&fixture, done, 1, WINNOW_NEVER_NS), 1);
    CHECK_EQ(done[0].result, -ETIMEDOUT);
    CHECK(done[0].held && done[0].disk_bytes == 0);
    CHECK_EQ(winnow_sim_disk_now(fixture.disk) - now_ns, 5 * WINNOW_NS_PER_MS);
    CHECK(!block_equal(slot(&fixture, N_BLOCKS), SLOT_BYTES, 3, 0));

    CHECK_EQ(fixture_run(&fixture, done, 2, WINNOW_NEVER_NS), 1);
    CHECK_EQ(done[0].result, -ECANCELED);
    CHECK(!done[0].held && done[0].disk_bytes == SLOT_BYTES);
    CHECK(winnow_sim_disk_now(fixture.disk) - now_ns > WINNOW_NS_PER_S);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.timeouts, 1);
    CHECK_EQ(facts.in_flight, 0);
    fixture_finish(&fixture);
}

/* A read that never left the queue is late too, and its memory was never anyone else's. */
static void test_store__late_in_queue_is_not_held(void)
{
    enum { N = 200 };
    struct fixture fixture;
    static uint32_t block_crc[N];
    static struct winnow_store_done done[2 * N];
    struct winnow_store_read read;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N, block_crc);
    fixture_settle(&fixture);
    int64_t deadline_ns = winnow_sim_disk_now(fixture.disk) + 5 * WINNOW_NS_PER_MS;
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_READ, 1, N, WINNOW_SIM_STUCK);
    for (uint32_t i = 0; i < N; i++) { /* no two adjacent */
        read = (struct winnow_store_read){
            .stored = stored, .block_idx = N - 1 - i, .data = slot(&fixture, N + i), .tag = i};
        CHECK_EQ(winnow_store_read(fixture.store, &read, 1, WINNOW_IO_DECODE, deadline_ns), 0);
    }
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), N);
    uint32_t n_held = 0;
    for (uint32_t i = 0; i < N; i++) {
        CHECK_EQ(done[i].result, -ETIMEDOUT);
        n_held += done[i].held;
    }
    CHECK_EQ(n_held, 128);
    winnow_sim_disk_release(fixture.disk);
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), 128);
    for (uint32_t i = 0; i < 128; i++)
        CHECK_EQ(done[i].result, -ECANCELED);
    fixture_finish(&fixture);
}

/* The cap counts every byte of every file; past it a segment is refused, and room comes back. */
static void test_store__cap_is_kept(void)
{
    enum { N = 1024 }; /* 4 MiB: two grains */
    struct fixture fixture;
    static uint32_t block_crc[16][N];
    struct winnow_stored *stored[16];
    struct winnow_store_facts facts;
    uint32_t n_stored = 0;
    fixture_init(&fixture, test_seed());
    for (;;) {
        int rc = winnow_store_segment_create(fixture.store, 1, N, SLOT_BYTES, block_crc[n_stored],
                                             &stored[n_stored]);
        winnow_store_facts(fixture.store, &facts);
        CHECK(facts.allocated_bytes <= facts.disk_cap_bytes);
        if (rc == -ENOSPC)
            break;
        if (rc == -EAGAIN)
            fixture_settle(&fixture);
        else
            n_stored++;
    }
    CHECK_EQ(n_stored, 8); /* 32 MiB */
    CHECK_EQ(facts.used_bytes, facts.disk_cap_bytes);
    winnow_store_segment_destroy(fixture.store, stored[3]);
    CHECK_EQ(winnow_store_segment_create(fixture.store, 1, N, SLOT_BYTES, block_crc[3], &stored[3]),
             0);
    for (uint32_t i = 0; i < n_stored; i++)
        winnow_store_segment_destroy(fixture.store, stored[i]);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.used_bytes, 0);
    CHECK_EQ(facts.allocated_bytes, facts.disk_cap_bytes);
    fixture_finish(&fixture);
}

/* A disk that is full under its cap refuses the segment, and serves on with what it has. */
static void test_store__full_disk_refuses_growth(void)
{
    enum { N = 1024 };
    struct fixture fixture;
    static uint32_t block_crc[4][N];
    struct winnow_stored *stored[4];
    struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
    shape.file_bytes_max = 4 << 20;
    shape.capacity_bytes = 9 << 20; /* two files of the cap's eight */
    fixture_init_shape(&fixture, &shape);
    struct winnow_store_options options = fixture_options(&fixture);
    fixture_open(&fixture, &options);
    fixture_settle(&fixture);
    for (uint32_t i = 0; i < 2; i++)
        CHECK_EQ(
            winnow_store_segment_create(fixture.store, 1, N, SLOT_BYTES, block_crc[i], &stored[i]),
            0);
    fixture_settle(&fixture);
    CHECK_EQ(winnow_store_segment_create(fixture.store, 1, N, SLOT_BYTES, block_crc[2], &stored[2]),
             -ENOSPC);
    uint64_t n_bytes; /* the file that could not be made left nothing */
    CHECK(winnow_sim_disk_file(fixture.disk, "00000001.dat", &n_bytes));
    CHECK(!winnow_sim_disk_file(fixture.disk, "00000002.dat", &n_bytes));
    winnow_store_segment_destroy(fixture.store, stored[0]);
    CHECK_EQ(winnow_store_segment_create(fixture.store, 1, N, SLOT_BYTES, block_crc[2], &stored[2]),
             0);
    fixture_finish(&fixture);
}

/* A segment destroyed under its reads: each still ends, and its grains are free only then. */
static void test_store__destroy_waits_for_reads(void)
{
    enum { N = 300 };
    struct fixture fixture;
    static uint32_t block_crc[N];
    static struct winnow_store_done done[N];
    struct winnow_store_read read;
    struct winnow_store_facts facts;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N, block_crc);
    for (uint32_t i = 0; i < N; i++) {
        read = (struct winnow_store_read){
            .stored = stored, .block_idx = N - 1 - i, .data = slot(&fixture, N + i), .tag = i};
        CHECK_EQ(winnow_store_read(fixture.store, &read, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
    }
    winnow_store_step(fixture.store, winnow_sim_disk_now(fixture.disk));
    winnow_store_segment_destroy(fixture.store, stored);
    memset(block_crc, 0, sizeof block_crc);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.used_bytes, WINNOW_GRAIN_BYTES);
    CHECK_EQ(facts.in_flight, 128);
    CHECK_EQ(fixture_run(&fixture, done, N, WINNOW_NEVER_NS), N);
    uint32_t n_read = 0;
    for (uint32_t i = 0; i < N; i++) {
        CHECK(done[i].result == 0 || done[i].result == -ECANCELED);
        n_read += done[i].result == 0;
    }
    CHECK_EQ(n_read, 128); /* what was in flight; the rest cost no read */
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.used_bytes, 0);
    fixture_finish(&fixture);
}

/* A store that closes under reads and a spill ends them all, and leaves nothing in flight. */
static void test_store__close_drains(void)
{
    enum { N = 300 };
    struct fixture fixture;
    static uint32_t block_crc[2][N];
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N, block_crc[0]);
    struct winnow_stored *other = segment_make(&fixture, N, block_crc[1]);
    segment_ask(&fixture, stored, N, N, WINNOW_IO_EXACT, WINNOW_NEVER_NS);
    CHECK_EQ(winnow_store_write(fixture.store, other, 0, N, slot(&fixture, 0), 1), 0);
    winnow_store_step(fixture.store, winnow_sim_disk_now(fixture.disk));
    fixture_finish(&fixture);
}

/* A disk that never answers does not keep the store from closing; what it holds is left to it. */
static void test_store__stuck_disk_is_left(void)
{
    struct fixture fixture;
    uint32_t block_crc[N_BLOCKS];
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
    fixture_settle(&fixture);
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_READ, 1, 1, WINNOW_SIM_STUCK);
    segment_ask(&fixture, stored, N_BLOCKS, N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    winnow_store_step(fixture.store, winnow_sim_disk_now(fixture.disk));
    int64_t begin_ns = winnow_sim_disk_now(fixture.disk);
    CHECK_EQ(winnow_store_close(fixture.store), -EBUSY);
    CHECK_EQ(winnow_sim_disk_now(fixture.disk) - begin_ns, 10 * WINNOW_NS_PER_S);
    winnow_sim_disk_release(fixture.disk);
    fixture_finish(&fixture); /* a second try, for the leak checker */
}

/* Files of a former life are free space: kept when their size fits, else gone. */
static void test_store__own_files_are_free_space(void)
{
    struct fixture fixture;
    struct winnow_store_facts facts;
    uint64_t n_bytes;
    struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
    shape.file_bytes_max = 8 << 20;
    fixture_init_shape(&fixture, &shape);
    winnow_sim_disk_put(fixture.disk, "00000001.dat", 4 << 20);
    winnow_sim_disk_put(fixture.disk, "00000005.dat", 4 << 20);
    winnow_sim_disk_put(fixture.disk, "00000002.dat", 8 << 20); /* another size */
    winnow_sim_disk_put(fixture.disk, "00000008.dat", 4 << 20); /* above the cap */
    winnow_sim_disk_put(fixture.disk, "ffffffff.dat", 4 << 10); /* a probe's */
    struct winnow_store_options options = fixture_options(&fixture);
    fixture_open(&fixture, &options);
    winnow_store_facts(fixture.store, &facts);
    CHECK_EQ(facts.allocated_bytes, 8 << 20);
    CHECK_EQ(facts.used_bytes, 0);
    CHECK(!winnow_sim_disk_file(fixture.disk, "00000002.dat", &n_bytes));
    CHECK(!winnow_sim_disk_file(fixture.disk, "00000008.dat", &n_bytes));
    CHECK(!winnow_sim_disk_file(fixture.disk, "ffffffff.dat", &n_bytes));
    fixture_finish(&fixture);
}

/* Options that cannot work are refused with the number that would. */
static void test_store__bad_sizes_are_refused(void)
{
    struct fixture fixture;
    struct winnow_store *store = (void *)1;
    char text[256];
    struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
    fixture_init_shape(&fixture, &shape);
    struct winnow_store_options options = fixture_options(&fixture);
    options.disk_cap_bytes = 7 << 20;
    CHECK_EQ(winnow_store_open(&options, &store, text), -EINVAL);
    CHECK(!store && strstr(text, "raise disk_cap to 8 MiB"));
    options.disk_cap_bytes = 100 << 20; /* default files of 64 MiB */
    options.data_file_bytes = 0;
    CHECK_EQ(winnow_store_open(&options, &store, text), -EINVAL);
    CHECK(strstr(text, "raise disk_cap to 128 MiB"));
    options.data_file_bytes = 3 << 20;
    CHECK_EQ(winnow_store_open(&options, &store, text), -EINVAL);
    options.data_file_bytes = 4 << 20;
    options.disk_cap_bytes = 8 << 20;
    winnow_sim_disk_fail(fixture.disk, WINNOW_IO_ALLOCATE, 1, 1, WINNOW_SIM_ENOSPC);
    CHECK_EQ(winnow_store_open(&options, &store, text), -ENOSPC);
    CHECK(strstr(text, "no room for the first data file of 4 MiB"));
    winnow_sim_disk_destroy(fixture.disk);
    winnow_alloc_unmap(fixture.arena, (size_t)N_SLOTS * SLOT_BYTES);
}

/* The same seed and calls give the same events, another seed others. */
static void test_store__same_seed_same_events(void)
{
    uint64_t hash[3];
    for (uint32_t i = 0; i < 3; i++) {
        struct fixture fixture;
        uint32_t block_crc[N_BLOCKS];
        int32_t result[N_BLOCKS];
        struct winnow_sim_counts counts;
        fixture_init(&fixture, test_seed() + (i == 2));
        struct winnow_stored *stored = segment_write(&fixture, 3, N_BLOCKS, block_crc);
        fixture_settle(&fixture);
        for (uint32_t j = 0; j < 4; j++)
            segment_check(&fixture, stored, 3, N_BLOCKS - j, result);
        segment_ask(&fixture, stored, 1, 2 * N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
        segment_ask(&fixture, stored, 1, 2 * N_BLOCKS + 1, WINNOW_IO_EXACT, WINNOW_NEVER_NS);
        struct winnow_store_done done[2];
        CHECK_EQ(fixture_run(&fixture, done, 2, WINNOW_NEVER_NS), 2);
        winnow_sim_disk_counts(fixture.disk, &counts);
        hash[i] = counts.event_hash ^ (uint64_t)winnow_sim_disk_now(fixture.disk);
        fixture_finish(&fixture);
    }
    CHECK_EQ(hash[0], hash[1]);
    CHECK(hash[0] != hash[2]);
}

/* After open nothing allocates, whatever is created, written, read and destroyed. */
static void test_store__nothing_allocates_after_open(void)
{
    struct fixture fixture;
    static uint32_t block_crc[700];
    int32_t result[N_BLOCKS];
    struct winnow_sim_options shape = winnow_sim_defaults(test_seed());
    shape.file_bytes_max = 4 << 20;
    fixture_init_shape(&fixture, &shape);
    struct winnow_store_options options = fixture_options(&fixture);
    options.disk_cap_bytes = 8 << 20;
    fixture_open(&fixture, &options);
    fixture_settle(&fixture); /* all files of the simulated disk are there */
    uint64_t before = winnow_alloc_count();
    for (uint32_t i = 0; i < 100; i++) {
        struct winnow_stored *big = segment_make(&fixture, 600 + i, block_crc);
        struct winnow_stored *stored = segment_write(&fixture, i, N_BLOCKS, block_crc);
        segment_check(&fixture, stored, i, N_BLOCKS, result);
        winnow_store_segment_destroy(fixture.store, big);
        winnow_store_segment_destroy(fixture.store, stored);
    }
    CHECK_EQ(winnow_alloc_count(), before);
    fixture_finish(&fixture);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_store__written_blocks_read_equal);
    TEST_RUN(test_store__flipped_byte_misses_one_block);
    TEST_RUN(test_store__swapped_blocks_miss_both);
    TEST_RUN(test_store__shortened_file_misses_its_end);
    TEST_RUN(test_store__adjacent_blocks_merge);
    TEST_RUN(test_store__batch_is_sorted_by_place);
    TEST_RUN(test_store__window_is_filled_and_kept);
    TEST_RUN(test_store__decode_goes_first);
    TEST_RUN(test_store__spill_yields_to_decode);
    TEST_RUN(test_store__spill_goes_two_at_a_time);
    TEST_RUN(test_store__late_read_holds_its_memory);
    TEST_RUN(test_store__late_in_queue_is_not_held);
    TEST_RUN(test_store__cap_is_kept);
    TEST_RUN(test_store__full_disk_refuses_growth);
    TEST_RUN(test_store__destroy_waits_for_reads);
    TEST_RUN(test_store__close_drains);
    TEST_RUN(test_store__stuck_disk_is_left);
    TEST_RUN(test_store__own_files_are_free_space);
    TEST_RUN(test_store__bad_sizes_are_refused);
    TEST_RUN(test_store__same_seed_same_events);
    TEST_RUN(test_store__nothing_allocates_after_open);
    return TEST_END();
}
