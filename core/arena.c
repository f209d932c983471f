// Which block leaves memory? A decode step visits its layer's blocks, the next step those of the next
// layer: a circle as long as a token. Whatever prefers what was used last, CLOCK too, drops a block
// just before its layer's turn when one token's blocks do not fit. So slots count their uses, and
// the least used of a sample goes. Blocks missed a token, 242 tokens of a real model (3,128 blocks
// each), and in the ten tokens after another session with a like trace took over from that one:
//
//   cache of        CLOCK   S3-FIFO   here   counted for ever   best possible   here, 10 to 20 after
//   5,960 blocks      677       561    545                455             279                  1,814
//   2,369 blocks    3,005     1,761  1,761              1,434           1,156                  1,931
//
// Counts end at 7 and halve while the cache turns over 4 times. Counts to 255 that halve in 8 gain
// 2 % and keep a session that ended its turn in memory for 80 tokens of the next instead of 20.
// Rejected: counts that outlive the block in memory (10 % fewer misses for a byte a block of
// index_memory and its upkeep); admission by chance (as good, and slower to follow).
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/rng.h>
#include <core/arena.h>
#include <errno.h>
#include <storage/store.h>

enum {
    SLOTS_PER_GRAIN = 512,
    N_CLASSES = 64,
    POOL_BYTES_MIN = 16 << 20,
    N_SAMPLED = 16, /* of which the least used is evicted */
    N_DRAWN_MAX = 64,
    N_USES_MAX = 7,
    N_TURNOVERS_HALVING = 4, /* times the pool's bytes evicted until a count is worth half */
};

static_assert(WINNOW_GRAIN_BYTES % WINNOW_STAGING_BYTES == 0, "staging is whole grains");
static_assert(WINNOW_STAGING_BYTES % WINNOW_PAGE_BYTES == 0, "pieces are read into directly");
static_assert(SLOTS_PER_GRAIN * WINNOW_PAGE_BYTES == WINNOW_GRAIN_BYTES,
              "a slot is a page or more");
static_assert(POOL_BYTES_MIN / WINNOW_GRAIN_BYTES > 1, "staging leaves grains");
static_assert(N_SAMPLED <= N_DRAWN_MAX, "a sample is drawn");
static_assert(N_USES_MAX <= UINT8_MAX, "n_uses");
enum slot_kind { SLOT_FREE, SLOT_HELD, SLOT_CACHE, SLOT_DROPPED };

struct slot {
    void *segment;
    uint32_t block_idx;
    uint32_t next_free; /* slot + 1 */
    uint32_t n_holders; /* HELD: holders; CACHE, DROPPED: pins */
    uint8_t kind;
    bool clean;
    uint8_t n_uses, of_epoch; /* CACHE: its uses, as they stood in that epoch */
};

static_assert(sizeof(struct slot) <= 40, "winnow_core_fixed_bytes counts so many a page");
struct grain {
    uint32_t class_idx; /* UINT32_MAX: free */
    uint32_t n_used;
};

struct class
{
    uint32_t block_bytes, slots_per_grain;
    uint32_t first_free; /* slot + 1 */
    uint32_t n_empty;    /* grains none of whose slots is used */
};

struct winnow_arena {
    winnow_arena_evict *evict;
    uint8_t *base;
    size_t n_bytes;
    uint32_t n_pieces, n_pieces_free;
    uint32_t *piece_free; /* stack of pieces */
    uint32_t *piece_holders;
    uint8_t *grain_base;
    uint32_t n_grains, n_grains_free, n_grains_empty, hand; /* empty: carved, of all classes */
    struct grain *grain;
    struct slot *slot;
    struct class class[N_CLASSES];
    uint32_t n_classes;
    bool frozen;                                                 /* nothing is evicted */
    uint64_t held_bytes, cache_bytes, dirty_bytes, pinned_bytes; /* pinned: of clean cache slots */
    struct winnow_rng rng;                                       /* whom the sample meets */
    uint64_t evicted_bytes;                                      /* in this epoch */
    uint8_t epoch;
};

static uint64_t grains_bytes(const struct winnow_arena *arena)
{
    return (uint64_t)arena->n_grains * WINNOW_GRAIN_BYTES;
}

static uint32_t slot_bytes(const struct winnow_arena *arena, uint32_t slot)
{
    winnow_assert(slot / SLOTS_PER_GRAIN < arena->n_grains);
    winnow_assert(arena->grain[slot / SLOTS_PER_GRAIN].class_idx < arena->n_classes);
    return arena->class[arena->grain[slot / SLOTS_PER_GRAIN].class_idx].block_bytes;
}

int winnow_arena_create(uint64_t pool_bytes, winnow_arena_evict *evict,
                        struct winnow_arena **ret_arena)
{
    winnow_assert(evict);
    pool_bytes -= pool_bytes % WINNOW_GRAIN_BYTES;
    if (pool_bytes < POOL_BYTES_MIN ||
        pool_bytes / WINNOW_GRAIN_BYTES > UINT32_MAX / SLOTS_PER_GRAIN)
        return -EINVAL;
    struct winnow_arena *arena = winnow_alloc(sizeof *arena);
    if (!arena)
        return -ENOMEM;
    uint64_t staging_grains = pool_bytes / WINNOW_GRAIN_BYTES / 16;
    staging_grains = staging_grains < 1 ? 1 : staging_grains > 16 ? 16 : staging_grains;
    winnow_rng_init(&arena->rng, 1);
    arena->evict = evict;
    arena->n_bytes = pool_bytes;
    arena->n_grains = (uint32_t)(pool_bytes / WINNOW_GRAIN_BYTES - staging_grains);
    arena->n_grains_free = arena->n_grains;
    arena->n_pieces = (uint32_t)(staging_grains * WINNOW_GRAIN_BYTES / WINNOW_STAGING_BYTES);
    winnow_assert(grains_bytes(arena) + (uint64_t)arena->n_pieces * WINNOW_STAGING_BYTES ==
                  pool_bytes);
    arena->base = winnow_alloc_map(pool_bytes);
    arena->piece_free = winnow_alloc_array(arena->n_pieces, sizeof *arena->piece_free);
    arena->piece_holders = winnow_alloc_array(arena->n_pieces, sizeof *arena->piece_holders);
    arena->grain = winnow_alloc_array(arena->n_grains, sizeof *arena->grain);
    arena->slot =
        winnow_alloc_array((size_t)arena->n_grains * SLOTS_PER_GRAIN, sizeof *arena->slot);
    if (!arena->base || !arena->piece_free || !arena->piece_holders || !arena->grain ||
        !arena->slot) {
        winnow_arena_destroy(arena);
        return -ENOMEM;
    }
    arena->grain_base = arena->base + staging_grains * WINNOW_GRAIN_BYTES;
    winnow_assert((uintptr_t)arena->grain_base % WINNOW_PAGE_BYTES == 0);
    for (uint32_t i = 0; i < arena->n_grains; i++)
        arena->grain[i].class_idx = UINT32_MAX;
    for (uint32_t i = 0; i < arena->n_pieces; i++)
        arena->piece_free[arena->n_pieces_free++] = arena->n_pieces - 1 - i;
    *ret_arena = arena;
    return 0;
}

void winnow_arena_destroy(struct winnow_arena *arena)
{
    if (!arena)
        return;
    winnow_alloc_unmap(arena->base, arena->n_bytes);
    winnow_alloc_free(arena->piece_free);
    winnow_alloc_free(arena->piece_holders);
    winnow_alloc_free(arena->grain);
    winnow_alloc_free(arena->slot);
    winnow_alloc_free(arena);
}

void *winnow_arena_base(const struct winnow_arena *arena, size_t *ret_bytes)
{
    *ret_bytes = arena->n_bytes;
    return arena->base;
}

void *winnow_arena_data(const struct winnow_arena *arena, uint32_t slot)
{
    uint32_t grain_idx = slot / SLOTS_PER_GRAIN, place = slot % SLOTS_PER_GRAIN;
    winnow_assert(grain_idx < arena->n_grains);
    winnow_assert(((size_t)place + 1) * slot_bytes(arena, slot) <= WINNOW_GRAIN_BYTES);
    return arena->grain_base + (size_t)grain_idx * WINNOW_GRAIN_BYTES +
           (size_t)place * slot_bytes(arena, slot);
}

static uint32_t class_find(struct winnow_arena *arena, uint32_t block_bytes)
{
    for (uint32_t i = 0; i < arena->n_classes; i++)
        if (arena->class[i].block_bytes == block_bytes)
            return i;
    winnow_assert(arena->n_classes < N_CLASSES); /* block sizes are few: widths x dtypes of OPEN */
    winnow_assert(WINNOW_GRAIN_BYTES / block_bytes <= SLOTS_PER_GRAIN);
    arena->class[arena->n_classes] = (struct class){
        .block_bytes = block_bytes, .slots_per_grain = WINNOW_GRAIN_BYTES / block_bytes};
    return arena->n_classes++;
}

/* Carves a free grain for the class: its slots go on the class's free list in rising order. */
static bool grain_carve(struct winnow_arena *arena, uint32_t class_idx)
{
    struct class *class = &arena->class[class_idx];
    for (uint32_t g = 0; arena->n_grains_free && g < arena->n_grains; g++) {
        if (arena->grain[g].class_idx != UINT32_MAX)
            continue;
        arena->grain[g] = (struct grain){.class_idx = class_idx};
        arena->n_grains_free--;
        arena->n_grains_empty++;
        class->n_empty++;
        for (uint32_t place = class->slots_per_grain; place-- > 0;) {
            uint32_t slot = g * SLOTS_PER_GRAIN + place;
            arena->slot[slot] = (struct slot){.kind = SLOT_FREE, .next_free = class->first_free};
            class->first_free = slot + 1;
        }
        return true;
    }
    winnow_assert(arena->n_grains_free == 0);
    return false;
}

/* An empty grain is any class's again: its slots leave the free list. */
static void grain_empty(struct winnow_arena *arena, uint32_t grain_idx)
{
    struct class *class = &arena->class[arena->grain[grain_idx].class_idx];
    winnow_assert(arena->grain[grain_idx].n_used == 0);
    winnow_assert(class->n_empty > 0);
    winnow_assert(arena->n_grains_empty >= class->n_empty);
    uint32_t *at = &class->first_free;
    while (*at)
        if ((*at - 1) / SLOTS_PER_GRAIN == grain_idx)
            *at = arena->slot[*at - 1].next_free;
        else
            at = &arena->slot[*at - 1].next_free;
    arena->grain[grain_idx].class_idx = UINT32_MAX;
    arena->n_grains_free++;
    arena->n_grains_empty--;
    class->n_empty--;
}

static void slot_free(struct winnow_arena *arena, uint32_t slot)
{
    uint32_t grain_idx = slot / SLOTS_PER_GRAIN;
    struct class *class = &arena->class[arena->grain[grain_idx].class_idx];
    winnow_assert(arena->slot[slot].kind != SLOT_FREE);
    winnow_assert(arena->slot[slot].n_holders == 0);
    arena->slot[slot] = (struct slot){.kind = SLOT_FREE, .next_free = class->first_free};
    class->first_free = slot + 1;
    winnow_assert(arena->grain[grain_idx].n_used > 0);
    if (--arena->grain[grain_idx].n_used == 0) {
        arena->n_grains_empty++;
        class->n_empty++;
    }
}

static bool evictable(const struct slot *slot)
{
    return slot->kind == SLOT_CACHE && slot->clean && slot->n_holders == 0;
}

static void slot_evict(struct winnow_arena *arena, uint32_t slot_idx)
{
    struct slot *slot = &arena->slot[slot_idx];
    winnow_assert(evictable(slot));
    winnow_assert(!arena->frozen);
    winnow_assert(arena->cache_bytes >= slot_bytes(arena, slot_idx));
    arena->evict(slot->segment, slot->block_idx);
    arena->cache_bytes -= slot_bytes(arena, slot_idx);
    slot_free(arena, slot_idx);
}

/* Its uses as they count in this epoch. */
static uint8_t slot_uses(const struct winnow_arena *arena, const struct slot *slot)
{
    uint8_t n_epochs = (uint8_t)(arena->epoch - slot->of_epoch);
    return (uint8_t)(n_epochs < 3 ? slot->n_uses >> n_epochs : 0);
}

static void epoch_advance(struct winnow_arena *arena, uint32_t n_bytes)
{
    arena->evicted_bytes += n_bytes;
    if (arena->evicted_bytes < N_TURNOVERS_HALVING * grains_bytes(arena))
        return;
    arena->evicted_bytes = 0;
    arena->epoch++;
}

/* A slot drawn by chance; UINT32_MAX: it is none of the class that can be evicted. */
static uint32_t slot_draw(struct winnow_arena *arena, uint32_t class_idx)
{
    uint64_t chance = winnow_rng_next(&arena->rng);
    uint32_t grain_idx = (uint32_t)((chance >> 32) * arena->n_grains >> 32);
    if (arena->grain[grain_idx].class_idx != class_idx)
        return UINT32_MAX;
    uint64_t n_places = arena->class[class_idx].slots_per_grain;
    uint32_t slot = grain_idx * SLOTS_PER_GRAIN + (uint32_t)((uint32_t)chance * n_places >> 32);
    return evictable(&arena->slot[slot]) ? slot : UINT32_MAX;
}

/* Where chance finds none: the next from the last one found on. UINT32_MAX: there is none. */
static uint32_t slot_search(struct winnow_arena *arena, uint32_t class_idx)
{
    for (uint32_t i = 0; i <= arena->n_grains; i++) {
        uint32_t g = (arena->hand + i) % arena->n_grains;
        if (arena->grain[g].class_idx != class_idx)
            continue;
        for (uint32_t place = 0; place < arena->class[class_idx].slots_per_grain; place++)
            if (evictable(&arena->slot[g * SLOTS_PER_GRAIN + place])) {
                arena->hand = g;
                return g * SLOTS_PER_GRAIN + place;
            }
    }
    return UINT32_MAX;
}

/* The least used of a sample of the class's slots that can be evicted. */
static bool evict_one(struct winnow_arena *arena, uint32_t class_idx)
{
    uint32_t victim = UINT32_MAX, n_uses = UINT32_MAX, n_sampled = 0;
    winnow_assert(arena->cache_bytes >= arena->dirty_bytes + arena->pinned_bytes);
    if (arena->cache_bytes == arena->dirty_bytes + arena->pinned_bytes)
        return false;
    for (uint32_t n = 0; n < N_DRAWN_MAX && n_sampled < N_SAMPLED; n++) {
        uint32_t slot = slot_draw(arena, class_idx);
        if (slot == UINT32_MAX)
            continue;
        n_sampled++;
        if (slot_uses(arena, &arena->slot[slot]) >= n_uses)
            continue;
        victim = slot;
        n_uses = slot_uses(arena, &arena->slot[slot]);
    }
    if (!n_sampled && (victim = slot_search(arena, class_idx)) == UINT32_MAX)
        return false;
    slot_evict(arena, victim);
    epoch_advance(arena, arena->class[class_idx].block_bytes);
    return true;
}

/* Empties a grain of another class whose every used slot is evictable. */
static bool grain_steal(struct winnow_arena *arena, uint32_t class_idx)
{
    for (uint32_t g = 0; g < arena->n_grains; g++) {
        uint32_t other = arena->grain[g].class_idx, first = g * SLOTS_PER_GRAIN, n_evictable = 0;
        if (other == UINT32_MAX || other == class_idx)
            continue;
        for (uint32_t place = 0; place < arena->class[other].slots_per_grain; place++)
            n_evictable += evictable(&arena->slot[first + place]);
        winnow_assert(n_evictable <= arena->grain[g].n_used);
        if (n_evictable < arena->grain[g].n_used)
            continue;
        for (uint32_t place = 0; place < arena->class[other].slots_per_grain; place++)
            if (arena->slot[first + place].kind == SLOT_CACHE)
                slot_evict(arena, first + place);
        grain_empty(arena, g);
        return true;
    }
    return false;
}

/* An empty grain of another class: free memory, so it goes before anything is evicted. */
static bool grain_reclaim(struct winnow_arena *arena, uint32_t class_idx)
{
    winnow_assert(arena->n_grains_empty >= arena->class[class_idx].n_empty);
    if (arena->n_grains_empty == arena->class[class_idx].n_empty)
        return false;
    for (uint32_t g = 0; g < arena->n_grains; g++)
        if (arena->grain[g].class_idx != UINT32_MAX && arena->grain[g].class_idx != class_idx &&
            arena->grain[g].n_used == 0) {
            grain_empty(arena, g);
            return true;
        }
    winnow_assert(!"an empty grain of another class");
    return false;
}

static bool slot_take(struct winnow_arena *arena, uint32_t class_idx, uint32_t *ret_slot)
{
    struct class *class = &arena->class[class_idx];
    if (!class->first_free && !arena->n_grains_free && !grain_reclaim(arena, class_idx) &&
        !arena->frozen && !evict_one(arena, class_idx))
        grain_steal(arena, class_idx);
    if (!class->first_free && !grain_carve(arena, class_idx))
        return false;
    uint32_t slot_idx = class->first_free - 1;
    winnow_assert(arena->slot[slot_idx].kind == SLOT_FREE);
    winnow_assert(arena->grain[slot_idx / SLOTS_PER_GRAIN].class_idx == class_idx);
    class->first_free = arena->slot[slot_idx].next_free;
    arena->slot[slot_idx] = (struct slot){.kind = SLOT_HELD, .n_holders = 1};
    if (arena->grain[slot_idx / SLOTS_PER_GRAIN].n_used++ == 0) {
        winnow_assert(class->n_empty > 0);
        winnow_assert(arena->n_grains_empty >= class->n_empty);
        arena->n_grains_empty--;
        class->n_empty--;
    }
    arena->held_bytes += class->block_bytes;
    *ret_slot = slot_idx;
    return true;
}

static uint64_t unevictable_bytes(const struct winnow_arena *arena)
{
    winnow_assert(arena->held_bytes + arena->cache_bytes <= grains_bytes(arena));
    return arena->held_bytes + arena->dirty_bytes + arena->pinned_bytes;
}

int winnow_arena_take(struct winnow_arena *arena, uint32_t block_bytes, uint32_t n, uint32_t slot[],
                      uint64_t keep_bytes)
{
    winnow_assert(block_bytes > 0);
    winnow_assert(block_bytes % WINNOW_PAGE_BYTES == 0);
    winnow_assert(block_bytes <= WINNOW_GRAIN_BYTES);
    uint32_t class_idx = class_find(arena, block_bytes);
    if (unevictable_bytes(arena) + (uint64_t)n * block_bytes + keep_bytes > grains_bytes(arena))
        return -EAGAIN;
    for (uint32_t i = 0; i < n; i++) {
        if (slot_take(arena, class_idx, &slot[i]))
            continue;
        while (i-- > 0)
            winnow_arena_release(arena, slot[i]);
        return -EAGAIN;
    }
    return 0;
}

void winnow_arena_freeze(struct winnow_arena *arena, bool frozen)
{
    arena->frozen = frozen;
}

void winnow_arena_hold(struct winnow_arena *arena, uint32_t slot)
{
    winnow_assert(arena->slot[slot].kind == SLOT_HELD);
    winnow_assert(arena->slot[slot].n_holders > 0);
    arena->slot[slot].n_holders++;
}

void winnow_arena_release(struct winnow_arena *arena, uint32_t slot)
{
    winnow_assert(arena->slot[slot].kind == SLOT_HELD);
    winnow_assert(arena->slot[slot].n_holders > 0);
    winnow_assert(arena->held_bytes >= slot_bytes(arena, slot));
    if (--arena->slot[slot].n_holders == 0) {
        arena->held_bytes -= slot_bytes(arena, slot);
        slot_free(arena, slot);
    }
}

bool winnow_arena_is_cache(const struct winnow_arena *arena, uint32_t slot)
{
    winnow_assert(slot / SLOTS_PER_GRAIN < arena->n_grains);
    return arena->slot[slot].kind == SLOT_CACHE;
}

uint32_t winnow_arena_holders(const struct winnow_arena *arena, uint32_t slot)
{
    winnow_assert(slot / SLOTS_PER_GRAIN < arena->n_grains);
    return arena->slot[slot].n_holders;
}

void winnow_arena_cache(struct winnow_arena *arena, uint32_t slot, void *segment,
                        uint32_t block_idx, bool clean)
{
    struct slot *s = &arena->slot[slot];
    winnow_assert(segment);
    winnow_assert(s->kind == SLOT_HELD);
    winnow_assert(s->n_holders == 1);
    winnow_assert(arena->held_bytes >= slot_bytes(arena, slot));
    *s = (struct slot){.kind = SLOT_CACHE,
                       .segment = segment,
                       .block_idx = block_idx,
                       .clean = clean,
                       .n_uses = 1,
                       .of_epoch = arena->epoch};
    arena->held_bytes -= slot_bytes(arena, slot);
    arena->cache_bytes += slot_bytes(arena, slot);
    if (!clean)
        arena->dirty_bytes += slot_bytes(arena, slot);
}

void winnow_arena_clean(struct winnow_arena *arena, uint32_t slot)
{
    struct slot *s = &arena->slot[slot];
    winnow_assert(s->kind == SLOT_CACHE);
    winnow_assert(!s->clean);
    winnow_assert(arena->dirty_bytes >= slot_bytes(arena, slot));
    s->clean = true;
    arena->dirty_bytes -= slot_bytes(arena, slot);
    if (s->n_holders)
        arena->pinned_bytes += slot_bytes(arena, slot);
}

void winnow_arena_pin(struct winnow_arena *arena, uint32_t slot)
{
    struct slot *s = &arena->slot[slot];
    winnow_assert(s->kind == SLOT_CACHE);
    if (s->n_holders++ == 0 && s->clean)
        arena->pinned_bytes += slot_bytes(arena, slot);
}

void winnow_arena_touch(struct winnow_arena *arena, uint32_t slot)
{
    struct slot *s = &arena->slot[slot];
    winnow_assert(s->kind == SLOT_CACHE);
    uint8_t n_uses = slot_uses(arena, s);
    winnow_assert(n_uses <= N_USES_MAX);
    s->n_uses = (uint8_t)(n_uses + (n_uses < N_USES_MAX));
    s->of_epoch = arena->epoch;
}

static void slot_drop(struct winnow_arena *arena, uint32_t slot)
{
    winnow_assert(arena->slot[slot].kind == SLOT_DROPPED);
    winnow_assert(arena->cache_bytes >= slot_bytes(arena, slot));
    arena->cache_bytes -= slot_bytes(arena, slot);
    slot_free(arena, slot);
}

void winnow_arena_unpin(struct winnow_arena *arena, uint32_t slot)
{
    struct slot *s = &arena->slot[slot];
    winnow_assert(s->kind == SLOT_CACHE || s->kind == SLOT_DROPPED);
    winnow_assert(s->kind == SLOT_CACHE || s->clean);
    winnow_assert(s->n_holders > 0);
    if (--s->n_holders > 0)
        return;
    if (s->clean) {
        winnow_assert(arena->pinned_bytes >= slot_bytes(arena, slot));
        arena->pinned_bytes -= slot_bytes(arena, slot);
    }
    if (s->kind == SLOT_DROPPED)
        slot_drop(arena, slot);
}

void winnow_arena_drop(struct winnow_arena *arena, uint32_t slot)
{
    struct slot *s = &arena->slot[slot];
    winnow_assert(s->kind == SLOT_CACHE);
    if (!s->clean) {
        winnow_assert(arena->dirty_bytes >= slot_bytes(arena, slot));
        s->clean = true;
        arena->dirty_bytes -= slot_bytes(arena, slot);
        if (s->n_holders)
            arena->pinned_bytes += slot_bytes(arena, slot);
    }
    s->kind = SLOT_DROPPED;
    if (s->n_holders == 0)
        slot_drop(arena, slot);
}

void *winnow_arena_staging_take(struct winnow_arena *arena)
{
    if (!arena->n_pieces_free)
        return NULL;
    uint32_t piece = arena->piece_free[--arena->n_pieces_free];
    winnow_assert(piece < arena->n_pieces);
    winnow_assert(arena->piece_holders[piece] == 0);
    arena->piece_holders[piece] = 1;
    return arena->base + (size_t)piece * WINNOW_STAGING_BYTES;
}

static uint32_t piece_of(const struct winnow_arena *arena, const void *address)
{
    size_t offset_bytes = (size_t)((const uint8_t *)address - arena->base);
    winnow_assert(offset_bytes < (size_t)arena->n_pieces * WINNOW_STAGING_BYTES);
    return (uint32_t)(offset_bytes / WINNOW_STAGING_BYTES);
}

void winnow_arena_staging_hold(struct winnow_arena *arena, const void *address)
{
    winnow_assert(arena->piece_holders[piece_of(arena, address)] > 0);
    arena->piece_holders[piece_of(arena, address)]++;
}

void winnow_arena_staging_give(struct winnow_arena *arena, const void *address)
{
    uint32_t piece = piece_of(arena, address);
    winnow_assert(arena->piece_holders[piece] > 0);
    winnow_assert(arena->n_pieces_free < arena->n_pieces);
    if (--arena->piece_holders[piece] == 0)
        arena->piece_free[arena->n_pieces_free++] = piece;
}

uint32_t winnow_arena_staging_free(const struct winnow_arena *arena)
{
    return arena->n_pieces_free;
}

uint32_t winnow_arena_staging_pieces(const struct winnow_arena *arena)
{
    return arena->n_pieces;
}

void winnow_arena_use(const struct winnow_arena *arena, struct winnow_arena_use *use)
{
    uint64_t used_bytes = arena->held_bytes + arena->cache_bytes;
    winnow_assert(used_bytes <= grains_bytes(arena));
    winnow_assert(arena->dirty_bytes <= arena->cache_bytes);
    *use = (struct winnow_arena_use){
        .pool_bytes = arena->n_bytes,
        .staging_bytes = arena->n_bytes - grains_bytes(arena),
        .held_bytes = arena->held_bytes,
        .cache_bytes = arena->cache_bytes,
        .dirty_bytes = arena->dirty_bytes,
        .free_bytes = grains_bytes(arena) - used_bytes,
    };
}

bool winnow_arena_pressed(const struct winnow_arena *arena)
{
    return arena->held_bytes + arena->cache_bytes > grains_bytes(arena) / 5 * 4;
}
