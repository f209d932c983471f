/* A segment of 256 KiB, damaged at every byte and in every sector, one place at a time: the block
 * that holds the place is lost, and is itself again once the place is. No wrong byte is called
 * right. */
#include "fixture.h"

#include <storage/inside.h>

enum { N_BLOCKS = 64, SECTOR_BYTES = 512, N_BYTES = N_BLOCKS * SLOT_BYTES };

struct damaged {
    struct fixture fixture;
    struct winnow_stored *stored;
    uint32_t block_crc[N_BLOCKS];
    uint8_t *medium; /* the segment's bytes, where they lie */
};

static void damaged_init(struct damaged *damaged)
{
    char name[16];
    uint64_t n_bytes;
    fixture_init(&damaged->fixture, test_seed());
    damaged->stored = segment_write(&damaged->fixture, 1, N_BLOCKS, damaged->block_crc);
    fixture_settle(&damaged->fixture);
    struct winnow_place first = winnow_stored_place(damaged->fixture.store, damaged->stored, 0);
    struct winnow_place last =
        winnow_stored_place(damaged->fixture.store, damaged->stored, N_BLOCKS - 1);
    CHECK_EQ(last.offset_bytes - first.offset_bytes, N_BYTES - SLOT_BYTES);
    snprintf(name, sizeof name, "%08x.dat", first.file_no);
    const uint8_t *file = winnow_sim_disk_file(damaged->fixture.disk, name, &n_bytes);
    CHECK(file && n_bytes >= first.offset_bytes + N_BYTES);
    damaged->medium = (uint8_t *)(uintptr_t)(file + first.offset_bytes);
}

/* What a read of the one block ends with; 0 is held against what was written. */
static int block_read(struct damaged *damaged, uint32_t block_idx)
{
    struct fixture *fixture = &damaged->fixture;
    struct winnow_store_done done;
    struct winnow_store_read read = {
        .stored = damaged->stored, .block_idx = block_idx, .data = slot(fixture, N_BLOCKS)};
    CHECK_EQ(winnow_store_read(fixture->store, &read, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
    CHECK_EQ(fixture_run(fixture, &done, 1, WINNOW_NEVER_NS), 1);
    if (!done.result)
        CHECK(block_equal(read.data, SLOT_BYTES, 1, block_idx));
    return done.result;
}

static void test_damage__of_any_byte_loses_its_block(void)
{
    struct damaged damaged;
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    damaged_init(&damaged);
    for (uint32_t at = 0; at < N_BYTES; at++) {
        uint8_t change = (uint8_t)(1 + winnow_rng_below(&rng, 255));
        damaged.medium[at] ^= change;
        CHECK_EQ(block_read(&damaged, at / SLOT_BYTES), -ENODATA);
        damaged.medium[at] ^= change;
    }
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        CHECK_EQ(block_read(&damaged, i), 0);
    TEST_ROW(F9, N_BYTES);
    fixture_finish(&damaged.fixture);
}

/* Zeros, the sector that stands elsewhere in the segment, what an earlier segment left there. */
static void test_damage__of_any_sector_loses_its_block(void)
{
    enum { N_SECTORS = N_BYTES / SECTOR_BYTES };
    struct damaged damaged;
    damaged_init(&damaged);
    for (uint32_t i = 0; i < 3 * N_SECTORS; i++) {
        static uint8_t other[SLOT_BYTES];
        uint8_t good[SECTOR_BYTES], *sector = damaged.medium + i / 3 * SECTOR_BYTES;
        uint32_t in_block = i / 3 * SECTOR_BYTES % SLOT_BYTES;
        memcpy(good, sector, SECTOR_BYTES);
        block_fill(other, SLOT_BYTES, 7, i / 3 * SECTOR_BYTES / SLOT_BYTES); /* an older one's */
        if (i % 3 == 0)
            memset(sector, 0, SECTOR_BYTES);
        else if (i % 3 == 1)
            memcpy(sector, damaged.medium + (i / 3 + 1) % N_SECTORS * SECTOR_BYTES, SECTOR_BYTES);
        else
            memcpy(sector, other + in_block, SECTOR_BYTES);
        CHECK_EQ(block_read(&damaged, i / 3 * SECTOR_BYTES / SLOT_BYTES), -ENODATA);
        memcpy(sector, good, SECTOR_BYTES);
    }
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        CHECK_EQ(block_read(&damaged, i), 0);
    TEST_ROW(F9, 3 * N_SECTORS);
    fixture_finish(&damaged.fixture);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_damage__of_any_byte_loses_its_block);
    TEST_RUN(test_damage__of_any_sector_loses_its_block);
    return TEST_END();
}
