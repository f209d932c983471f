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

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_store__written_blocks_read_equal);
    TEST_RUN(test_store__flipped_byte_misses_one_block);
    return TEST_END();
}
