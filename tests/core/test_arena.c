/* The arena: grains go from one block size to another, what is chosen often is evicted last. */
#include <core/arena.h>
#include <errno.h>
#include <storage/store.h>
#include <test.h>

enum { N_SLOTS_MAX = 16384 };

static uint32_t n_evicted;
static bool is_evicted[N_SLOTS_MAX];

static void evicted(void *segment, uint32_t block_idx)
{
    CHECK(segment == &n_evicted && !is_evicted[block_idx]);
    is_evicted[block_idx] = true;
    n_evicted++;
}

static struct winnow_arena *arena_make(uint64_t pool_bytes)
{
    struct winnow_arena *arena;
    CHECK_EQ(winnow_arena_create(pool_bytes, evicted, &arena), 0);
    n_evicted = 0;
    memset(is_evicted, 0, sizeof is_evicted);
    return arena;
}

/* Takes slots one by one until none is left. */
static uint32_t take_all(struct winnow_arena *arena, uint32_t block_bytes, uint32_t *slot)
{
    uint32_t n = 0;
    while (winnow_arena_take(arena, block_bytes, 1, &slot[n], 0) == 0)
        n++;
    return n;
}

static void whole_check(struct winnow_arena *arena)
{
    struct winnow_arena_use use;
    winnow_arena_use(arena, &use);
    CHECK_EQ(use.held_bytes + use.cache_bytes + use.dirty_bytes, 0);
    CHECK_EQ(use.free_bytes, use.pool_bytes - use.staging_bytes);
    winnow_arena_destroy(arena);
}

/* What one block size leaves behind is another's before that one evicts a block of its own. */
static void test_arena__empty_grains_before_eviction(void)
{
    static uint32_t slot[N_SLOTS_MAX];
    struct winnow_arena *arena = arena_make(16 << 20);
    uint32_t n_small = take_all(arena, 4096, slot);
    CHECK_EQ(n_small, (14 << 20) / 4096);
    for (uint32_t i = 0; i < n_small; i++)
        winnow_arena_release(arena, slot[i]);
    uint32_t n_large = (14 << 20) / 8192;
    for (uint32_t i = 0; i < n_large; i++) {
        CHECK_EQ(winnow_arena_take(arena, 8192, 1, &slot[i], 0), 0);
        winnow_arena_cache(arena, slot[i], &n_evicted, i, true);
    }
    CHECK_EQ(n_evicted, 0);
    for (uint32_t i = 0; i < n_large; i++)
        winnow_arena_drop(arena, slot[i]);
    whole_check(arena);
}

/* A grain whose blocks can all be read again goes to a size that has none; one that holds a tail's
 * or a dirty block stays. */
static void test_arena__grain_is_taken_from_another_size(void)
{
    static uint32_t slot[N_SLOTS_MAX];
    struct winnow_arena *arena = arena_make(16 << 20);
    uint32_t n = take_all(arena, 4096, slot), large[256];
    for (uint32_t i = 0; i < n; i++)
        if (i % 1024) /* one held in every second grain */
            winnow_arena_cache(arena, slot[i], &n_evicted, i, i % 512 != 0);
    uint32_t n_large = take_all(arena, 8192, large);
    CHECK_EQ(n_large, 0); /* each grain has a held one or a dirty one */
    for (uint32_t i = 512; i < n; i += 1024)
        winnow_arena_clean(arena, slot[i]);
    n_large = take_all(arena, 1 << 20, large);
    CHECK_EQ(n_large, 2 * 3);
    CHECK_EQ(n_evicted, 3 * 512);
    for (uint32_t i = 0; i < n_large; i++)
        winnow_arena_release(arena, large[i]);
    for (uint32_t i = 0; i < n; i++)
        if (i % 1024 == 0)
            winnow_arena_release(arena, slot[i]);
        else if (!is_evicted[i])
            winnow_arena_drop(arena, slot[i]);
    whole_check(arena);
}

/* Pinned blocks stay where they are, and a dropped one until its last pin. */
static void test_arena__pins_outlast_eviction(void)
{
    static uint32_t slot[N_SLOTS_MAX];
    struct winnow_arena *arena = arena_make(16 << 20);
    uint32_t n = take_all(arena, 8192, slot), one;
    for (uint32_t i = 0; i < n; i++)
        winnow_arena_cache(arena, slot[i], &n_evicted, i, true);
    winnow_arena_pin(arena, slot[0]);
    CHECK_EQ(winnow_arena_take(arena, 8192, 1, &one, 0), 0);
    winnow_arena_release(arena, one);
    CHECK_EQ(n_evicted, 1);
    CHECK_EQ(take_all(arena, 8192, slot + 1), n - 1);
    CHECK_EQ(n_evicted, n - 1);
    CHECK(!is_evicted[0]);
    winnow_arena_drop(arena, slot[0]);
    CHECK_EQ(winnow_arena_take(arena, 8192, 1, &one, 0), -EAGAIN);
    winnow_arena_unpin(arena, slot[0]);
    CHECK_EQ(winnow_arena_take(arena, 8192, 1, &one, 0), 0);
    winnow_arena_release(arena, one);
    for (uint32_t i = 1; i < n; i++)
        winnow_arena_release(arena, slot[i]);
    whole_check(arena);
}

/* One visit of a step to a block: 1 if it was in memory. */
static uint32_t visit(struct winnow_arena *arena, uint32_t slot_of[], uint32_t block)
{
    if (slot_of[block] && !is_evicted[block]) {
        winnow_arena_pin(arena, slot_of[block] - 1);
        winnow_arena_touch(arena, slot_of[block] - 1);
        winnow_arena_unpin(arena, slot_of[block] - 1);
        return 1;
    }
    uint32_t slot;
    CHECK_EQ(winnow_arena_take(arena, 8192, 1, &slot, 0), 0);
    winnow_arena_cache(arena, slot, &n_evicted, block, true);
    is_evicted[block] = false;
    slot_of[block] = slot + 1;
    return 0;
}

/* Blocks of every round stay in memory though a round is longer than the pool; and when others take
 * their place, these do within 40 rounds. */
static void test_arena__chosen_often_outlast_a_circle(void)
{
    enum { N_OFTEN = 600, N_ROUND = 2800, N_ROUNDS = 40 };
    static uint32_t slot_of[N_SLOTS_MAX];
    struct winnow_arena *arena = arena_make(16 << 20);
    memset(slot_of, 0, sizeof slot_of);
    for (uint32_t phase = 0; phase < 2; phase++) {
        uint32_t n_hits = 0, seldom = 2 * N_OFTEN;
        for (uint32_t round = 0; round < N_ROUNDS; round++) {
            n_hits = 0;
            for (uint32_t i = 0; i < N_OFTEN; i++)
                n_hits += visit(arena, slot_of, phase * N_OFTEN + i);
            for (uint32_t i = N_OFTEN; i < N_ROUND; i++) {
                visit(arena, slot_of, seldom);
                seldom = seldom + 1 < N_SLOTS_MAX ? seldom + 1 : 2 * N_OFTEN;
            }
        }
        CHECK(n_hits > N_OFTEN / 10 * 9);
    }
    for (uint32_t i = 0; i < N_SLOTS_MAX; i++)
        if (slot_of[i] && !is_evicted[i])
            winnow_arena_drop(arena, slot_of[i] - 1);
    whole_check(arena);
}

/* What is kept for running steps is not given to others, and a call takes all or nothing. */
static void test_arena__keeps_what_steps_need(void)
{
    static uint32_t slot[N_SLOTS_MAX];
    struct winnow_arena *arena = arena_make(16 << 20);
    uint32_t n_all = (14 << 20) / 8192;
    CHECK_EQ(winnow_arena_take(arena, 8192, n_all - 63, slot, 64 * 8192), -EAGAIN);
    CHECK_EQ(winnow_arena_take(arena, 8192, n_all - 64, slot, 64 * 8192), 0);
    CHECK_EQ(winnow_arena_take(arena, 8192, 1, slot + n_all - 64, 64 * 8192), -EAGAIN);
    CHECK_EQ(winnow_arena_take(arena, 8192, 64, slot + n_all - 64, 0), 0);
    CHECK_EQ(winnow_arena_take(arena, 8192, 1, slot, 0), -EAGAIN);
    for (uint32_t i = 0; i < n_all; i++)
        winnow_arena_release(arena, slot[i]);
    whole_check(arena);
}

/* A pool is pressed by all it holds, so that sealed blocks are written on when clean ones fill it. */
static void test_arena__clean_blocks_press(void)
{
    static uint32_t slot[N_SLOTS_MAX];
    struct winnow_arena *arena = arena_make(16 << 20);
    uint32_t n = (14 << 20) / 5 * 4 / 4096;
    CHECK_EQ(winnow_arena_take(arena, 4096, n + 1, slot, 0), 0);
    for (uint32_t i = 0; i <= n; i++)
        winnow_arena_cache(arena, slot[i], &n_evicted, i, i > 0);
    CHECK(winnow_arena_pressed(arena));
    winnow_arena_drop(arena, slot[n]);
    CHECK(!winnow_arena_pressed(arena));
    for (uint32_t i = 0; i < n; i++)
        winnow_arena_drop(arena, slot[i]);
    whole_check(arena);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_arena__empty_grains_before_eviction);
    TEST_RUN(test_arena__grain_is_taken_from_another_size);
    TEST_RUN(test_arena__pins_outlast_eviction);
    TEST_RUN(test_arena__chosen_often_outlast_a_circle);
    TEST_RUN(test_arena__keeps_what_steps_need);
    TEST_RUN(test_arena__clean_blocks_press);
    return TEST_END();
}
