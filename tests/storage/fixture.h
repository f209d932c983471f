/*
 * A store over a simulated disk, driven by one thread: what the tests of storage/ share.
 *
 * Block contents are a function of (segment, block), so that a byte names its owner and any wrong
 * byte is seen. The arena holds n_slots of SLOT_BYTES.
 */
#pragma once

#include <base/alloc.h>
#include <base/clock.h>
#include <base/rng.h>
#include <errno.h>
#include <storage/io_sim.h>
#include <storage/store.h>
#include <test.h>

enum { SLOT_BYTES = 4096, N_SLOTS = 2048, N_DONES = 256 };

struct fixture {
    struct winnow_sim_disk *disk;
    struct winnow_store *store;
    uint8_t *arena;
    bool notified;
};

static inline void fixture_notify(void *arg)
{
    struct fixture *fixture = arg;
    fixture->notified = true;
}

static inline struct winnow_store_options fixture_options(struct fixture *fixture)
{
    return (struct winnow_store_options){.dir = "sim",
                                         .disk_cap_bytes = 32 << 20,
                                         .data_file_bytes = 4 << 20,
                                         .method = &winnow_io_sim,
                                         .method_arg = fixture->disk,
                                         .arena = fixture->arena,
                                         .arena_bytes = (size_t)N_SLOTS * SLOT_BYTES,
                                         .n_requests_max = 1024,
                                         .n_segments_max = 32,
                                         .notify = fixture_notify,
                                         .notify_arg = fixture,
                                         .seed = 7};
}

static inline void fixture_init_shape(struct fixture *fixture,
                                      const struct winnow_sim_options *shape)
{
    *fixture = (struct fixture){0};
    CHECK_EQ(winnow_sim_disk_create(shape, &fixture->disk), 0);
    fixture->arena = winnow_alloc_map((size_t)N_SLOTS * SLOT_BYTES);
    CHECK(fixture->arena);
}

static inline void fixture_open(struct fixture *fixture, const struct winnow_store_options *options)
{
    char text[256];
    int rc = winnow_store_open(options, &fixture->store, text);
    if (rc < 0)
        test_fail(__FILE__, __LINE__, text);
}

static inline void fixture_init(struct fixture *fixture, uint64_t seed)
{
    struct winnow_sim_options shape = winnow_sim_defaults(seed);
    shape.file_bytes_max = 4 << 20;
    fixture_init_shape(fixture, &shape);
    struct winnow_store_options options = fixture_options(fixture);
    fixture_open(fixture, &options);
}

static inline void fixture_finish(struct fixture *fixture)
{
    winnow_sim_disk_release(fixture->disk);
    CHECK_EQ(winnow_store_close(fixture->store), 0);
    winnow_sim_disk_destroy(fixture->disk);
    winnow_alloc_unmap(fixture->arena, (size_t)N_SLOTS * SLOT_BYTES);
}

static inline uint8_t *slot(const struct fixture *fixture, uint32_t slot_idx)
{
    CHECK(slot_idx < N_SLOTS);
    return fixture->arena + (size_t)slot_idx * SLOT_BYTES;
}

static inline void block_fill(uint8_t *data, uint32_t n_bytes, uint64_t segment, uint64_t block_idx)
{
    uint64_t *word = (uint64_t *)(void *)data;
    for (uint32_t i = 0; i < n_bytes / 8; i++)
        word[i] = (segment + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ block_idx << 32 ^ i;
}

static inline bool block_equal(const uint8_t *data, uint32_t n_bytes, uint64_t segment,
                               uint64_t block_idx)
{
    const uint64_t *word = (const uint64_t *)(const void *)data;
    for (uint32_t i = 0; i < n_bytes / 8; i++)
        if (word[i] != ((segment + 1) * UINT64_C(0x9e3779b97f4a7c15) ^ block_idx << 32 ^ i))
            return false;
    return true;
}

/* Steps both sides; returns when something happens next. */
static inline int64_t fixture_step(struct fixture *fixture)
{
    int64_t now_ns = winnow_sim_disk_now(fixture->disk);
    int64_t next_ns = winnow_store_step(fixture->store, now_ns);
    int64_t sync_ns = winnow_store_sync_step(fixture->store, now_ns);
    int64_t disk_ns = winnow_sim_disk_next(fixture->disk);
    next_ns = sync_ns < next_ns ? sync_ns : next_ns;
    next_ns = disk_ns < next_ns ? disk_ns : next_ns;
    return next_ns > now_ns ? next_ns : now_ns;
}

/* Runs until n completions came or nothing more happens by until_ns; returns how many came. Polls
 * when it is notified, as the owner's thread does, so that a lost notification is seen. */
static inline uint32_t fixture_run(struct fixture *fixture, struct winnow_store_done *done,
                                   uint32_t n_done_max, int64_t until_ns)
{
    uint32_t n_done = 0;
    fixture->notified = true; /* the last run may have left some */
    for (;;) {
        int64_t next_ns = fixture_step(fixture);
        if (fixture->notified) {
            fixture->notified = false;
            n_done += winnow_store_poll(fixture->store, done + n_done, n_done_max - n_done);
            if (n_done == n_done_max)
                return n_done;
        } else if (next_ns > until_ns || next_ns == WINNOW_NEVER_NS) {
            return n_done;
        } else {
            winnow_sim_disk_now_set(fixture->disk, next_ns);
        }
    }
}

/* Lets growth and what else is under way come to rest; no completion may be due. */
static inline void fixture_settle(struct fixture *fixture)
{
    struct winnow_store_done done;
    CHECK_EQ(fixture_run(fixture, &done, 1, WINNOW_NEVER_NS), 0);
}

/* Waits for a data file when the store has to make one. */
static inline struct winnow_stored *segment_make(struct fixture *fixture, uint32_t n_blocks,
                                                 uint32_t *block_crc)
{
    struct winnow_stored *stored;
    int rc;
    while ((rc = winnow_store_segment_create(fixture->store, 1, n_blocks, SLOT_BYTES, block_crc,
                                             &stored)) == -EAGAIN)
        fixture_settle(fixture);
    CHECK_EQ(rc, 0);
    return stored;
}

/* Makes a segment, fills slots [0, n_blocks) with its blocks and writes them. */
static inline struct winnow_stored *segment_write(struct fixture *fixture, uint64_t segment,
                                                  uint32_t n_blocks, uint32_t *block_crc)
{
    struct winnow_stored *stored = segment_make(fixture, n_blocks, block_crc);
    for (uint32_t i = 0; i < n_blocks; i++)
        block_fill(slot(fixture, i), SLOT_BYTES, segment, i);
    struct winnow_store_done done;
    CHECK_EQ(winnow_store_write(fixture->store, stored, 0, n_blocks, slot(fixture, 0), segment), 0);
    CHECK_EQ(fixture_run(fixture, &done, 1, WINNOW_NEVER_NS), 1);
    CHECK_EQ(done.tag, segment);
    CHECK_EQ(done.result, 0);
    CHECK_EQ(done.disk_bytes, n_blocks * SLOT_BYTES);
    return stored;
}

/* Asks for all blocks into slots [first_slot, ...), tag = block. */
static inline void segment_ask(struct fixture *fixture, struct winnow_stored *stored,
                               uint32_t n_blocks, uint32_t first_slot,
                               enum winnow_io_priority priority, int64_t deadline_ns)
{
    static struct winnow_store_read read[N_SLOTS];
    for (uint32_t i = 0; i < n_blocks; i++)
        read[i] = (struct winnow_store_read){
            .stored = stored, .block_idx = i, .data = slot(fixture, first_slot + i), .tag = i};
    CHECK_EQ(winnow_store_read(fixture->store, read, n_blocks, priority, deadline_ns), 0);
}
