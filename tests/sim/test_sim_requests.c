/* The store's requests suffice for all that the core can have outstanding at once, so that it may
 * assert that a read is taken: WINNOW_STORE_REQUESTS. */
#include <core/arena.h>
#include <core/session.h>
#include <test.h>

static void evict_none(void *owner, uint32_t index)
{
    (void)owner;
    (void)index;
}

/* A request for each load, and for each piece of staging under a write two (tests/storage/
 * test_requests): whatever the pool, since staging stops growing with it. */
static void test_requests__suffice_for_every_pool(void)
{
    static const uint64_t pool_mib[] = {16, 32, 64, 256, 511, 512, 1024, 4096};
    uint32_t n_pieces_most = 0;
    for (size_t i = 0; i < sizeof pool_mib / sizeof *pool_mib; i++) {
        struct winnow_arena *arena;
        CHECK_EQ(winnow_arena_create(pool_mib[i] << 20, evict_none, &arena), 0);
        uint32_t n_pieces = winnow_arena_staging_pieces(arena);
        CHECK(n_pieces >= n_pieces_most);
        n_pieces_most = n_pieces;
        CHECK(WINNOW_N_LOADS + 2 * n_pieces <= WINNOW_STORE_REQUESTS);
        winnow_arena_destroy(arena);
    }
    CHECK_EQ(n_pieces_most, 128); /* of 512 MiB as of 4 GiB */
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_requests__suffice_for_every_pool);
    return TEST_END();
}
