/* How many requests a call takes: what WINNOW_STORE_REQUESTS of core.h rests on. */
#include "fixture.h"

#include <storage/inside.h>

enum { PIECE_BYTES = 256 << 10 }; /* as the core stages writes */

/* A write of 256 KiB within a layer is one request, or two where it crosses a grain: wherever it
 * begins, and for blocks that do not divide a grain too. */
static void test_requests__a_staged_write_takes_two_at_most(void)
{
    static const uint32_t block_bytes[] = {4096, 8192, 12288, 20480, 65536, 126976, PIECE_BYTES};
    static uint32_t block_crc[2048];
    for (size_t i = 0; i < sizeof block_bytes / sizeof *block_bytes; i++) {
        struct fixture fixture;
        struct winnow_stored *stored;
        struct winnow_store_done done;
        uint32_t n_blocks = (5 << 20) / block_bytes[i], n_piece = PIECE_BYTES / block_bytes[i];
        uint32_t n_most = 0;
        fixture_init(&fixture, test_seed());
        int rc;
        while ((rc = winnow_store_segment_create(fixture.store, 1, n_blocks, block_bytes[i],
                                                 block_crc, &stored)) == -EAGAIN)
            fixture_settle(&fixture);
        CHECK_EQ(rc, 0);
        for (uint32_t first = 0; first + n_piece <= n_blocks;
             first += n_piece > 7 ? n_piece / 7 : 1) {
            CHECK_EQ(winnow_store_write(fixture.store, stored, first, n_piece, fixture.arena, 1),
                     0);
            uint32_t n = fixture.store->n_requests_max - fixture.store->n_free_requests;
            n_most = n > n_most ? n : n_most;
            CHECK_EQ(fixture_run(&fixture, &done, 1, WINNOW_NEVER_NS), 1);
            CHECK_EQ(done.result, 0);
            CHECK_EQ(fixture.store->n_free_requests, fixture.store->n_requests_max);
        }
        CHECK_EQ(n_most, n_piece > 1 ? 2 : 1);
        winnow_store_segment_destroy(fixture.store, stored);
        fixture_finish(&fixture);
    }
}

/* All reads or none: what there is room for is taken to the last, one more is refused, and each
 * completion makes room for one. */
static void test_requests__reads_are_taken_to_the_last(void)
{
    enum { N_BLOCKS = 1024 };
    static uint32_t block_crc[N_BLOCKS];
    static struct winnow_store_done done[N_BLOCKS];
    struct fixture fixture;
    fixture_init(&fixture, test_seed());
    struct winnow_stored *stored = segment_write(&fixture, 1, N_BLOCKS, block_crc);
    struct winnow_store_read one = {
        .stored = stored, .block_idx = 0, .data = slot(&fixture, 0), .tag = 0};
    segment_ask(&fixture, stored, N_BLOCKS, N_BLOCKS, WINNOW_IO_DECODE, WINNOW_NEVER_NS);
    CHECK_EQ(winnow_store_read(fixture.store, &one, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS), -EAGAIN);
    CHECK_EQ(fixture_run(&fixture, done, 1, WINNOW_NEVER_NS), 1);
    CHECK_EQ(winnow_store_read(fixture.store, &one, 1, WINNOW_IO_DECODE, WINNOW_NEVER_NS), 0);
    CHECK_EQ(fixture_run(&fixture, done, N_BLOCKS, WINNOW_NEVER_NS), N_BLOCKS);
    fixture_finish(&fixture);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_requests__a_staged_write_takes_two_at_most);
    TEST_RUN(test_requests__reads_are_taken_to_the_last);
    return TEST_END();
}
