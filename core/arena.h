/*
 * The arena: `host_pool`, the one memory that holds KV. Its first part is staging (pieces of
 * 256 KiB through which exact reads and spills pass), the rest are grains of 2 MiB, each carved into
 * slots of one block size while it holds any (models differ in block size).
 *
 * A slot is named by u32: grain x 512 + place. It is
 *   HELD   pinned by its holders (tails; a read under way): n_holders counts them
 *   CACHE  of a sealed segment: named in the segment's place table; evictable when it is clean
 *          (its bytes are on disk too) and has no pins
 * Evicted is, of a sample of the clean, unpinned cache slots of the size wanted, the one that steps
 * chose least (of late: arena.c); the owner is told by `evict`.
 *
 * Thread: owner.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    WINNOW_STAGING_BYTES = 256 << 10, /* a piece */
    WINNOW_SLOT_NONE = 0,             /* slot numbers in tables are stored + 1 */
};

struct winnow_arena;

/* The cache slot's block leaves memory: block_idx of `segment` has no place any more. */
typedef void winnow_arena_evict(void *segment, uint32_t block_idx);

/* -ENOMEM; -EINVAL: under 16 MiB. */
int winnow_arena_create(uint64_t pool_bytes, winnow_arena_evict *evict,
                        struct winnow_arena **ret_arena);
void winnow_arena_destroy(struct winnow_arena *arena); /* NULL is fine */
void *winnow_arena_base(const struct winnow_arena *arena, size_t *ret_bytes);

/*
 * Takes n slots of block_bytes into slot[], one holder each, or none: free ones, then a free grain's,
 * then evicted ones. Slots of one call lie side by side where that costs nothing.
 *   -EAGAIN  not so many now.   keep_bytes of the pool stay free or evictable (the running steps')
 */
int winnow_arena_take(struct winnow_arena *arena, uint32_t block_bytes, uint32_t n, uint32_t slot[],
                      uint64_t keep_bytes);
void *winnow_arena_data(const struct winnow_arena *arena, uint32_t slot);

void winnow_arena_hold(struct winnow_arena *arena, uint32_t slot); /* one holder more */
/* One holder less; the last one frees a HELD slot. */
void winnow_arena_release(struct winnow_arena *arena, uint32_t slot);
bool winnow_arena_is_cache(const struct winnow_arena *arena, uint32_t slot);
uint32_t winnow_arena_holders(const struct winnow_arena *arena, uint32_t slot);

/* HELD by one -> CACHE without pins. */
void winnow_arena_cache(struct winnow_arena *arena, uint32_t slot, void *segment,
                        uint32_t block_idx, bool clean);
void winnow_arena_clean(struct winnow_arena *arena, uint32_t slot); /* its bytes are on disk too */
/* While frozen nothing is evicted: a device may be reading any block. */
void winnow_arena_freeze(struct winnow_arena *arena, bool frozen);
/* Pinned slots are not evicted. */
void winnow_arena_pin(struct winnow_arena *arena, uint32_t slot);
void winnow_arena_unpin(struct winnow_arena *arena, uint32_t slot);
/* A step chose the cache slot's block: counted. Steps that read everything choose none. */
void winnow_arena_touch(struct winnow_arena *arena, uint32_t slot);
/* Its segment ends: the slot is free once its pins are gone. */
void winnow_arena_drop(struct winnow_arena *arena, uint32_t slot);

/* One staging piece with one holder, or NULL. hold and give take any address inside it; the last
 * holder's give frees it. */
void *winnow_arena_staging_take(struct winnow_arena *arena);
void winnow_arena_staging_hold(struct winnow_arena *arena, const void *address);
void winnow_arena_staging_give(struct winnow_arena *arena, const void *address);
uint32_t winnow_arena_staging_free(const struct winnow_arena *arena);
uint32_t winnow_arena_staging_pieces(const struct winnow_arena *arena);

struct winnow_arena_use {
    uint64_t pool_bytes, staging_bytes;
    uint64_t held_bytes, cache_bytes; /* slots, in bytes */
    uint64_t dirty_bytes;             /* part of cache: not evictable */
    uint64_t free_bytes;              /* the rest */
};
void winnow_arena_use(const struct winnow_arena *arena, struct winnow_arena_use *use);
/* True when what the pool holds passes 80 % of its grains. Clean blocks count: from the first
 * spill on the pool stays full, and a dirty block there displaces one that steps ask for. */
bool winnow_arena_pressed(const struct winnow_arena *arena);
