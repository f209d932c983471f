#include <base/alloc.h>
#include <base/assert.h>
#include <base/pool.h>
#include <errno.h>
#include <stdbool.h>

struct slot {
    uint32_t generation; /* of the current or next use; from 1 */
    uint32_t next_free;  /* index, or UINT32_MAX */
    bool taken;
};

struct winnow_pool {
    uint32_t n_items, n_used, first_free;
    size_t item_bytes;
    struct slot *slot;
    uint8_t *items;
};

int winnow_pool_create(uint32_t n_items, size_t item_bytes, struct winnow_pool **ret_pool)
{
    winnow_assert(n_items > 0);
    winnow_assert(n_items < UINT32_MAX);
    winnow_assert(item_bytes > 0);
    struct winnow_pool *pool = winnow_alloc(sizeof *pool);
    if (!pool)
        return -ENOMEM;
    pool->n_items = n_items;
    pool->item_bytes = (item_bytes + 15) & ~(size_t)15;
    pool->slot = winnow_alloc_array(n_items, sizeof *pool->slot);
    pool->items = winnow_alloc_array(n_items, pool->item_bytes);
    if (!pool->slot || !pool->items) {
        winnow_pool_destroy(pool);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n_items; i++)
        pool->slot[i] = (struct slot){1, i + 1 < n_items ? i + 1 : UINT32_MAX, false};
    *ret_pool = pool;
    return 0;
}

void winnow_pool_destroy(struct winnow_pool *pool)
{
    if (!pool)
        return;
    winnow_alloc_free(pool->slot);
    winnow_alloc_free(pool->items);
    winnow_alloc_free(pool);
}

static uint32_t item_index(const struct winnow_pool *pool, const void *item)
{
    size_t offset_bytes = (size_t)((const uint8_t *)item - pool->items);
    winnow_assert(offset_bytes % pool->item_bytes == 0);
    winnow_assert(offset_bytes / pool->item_bytes < pool->n_items);
    return (uint32_t)(offset_bytes / pool->item_bytes);
}

void *winnow_pool_take(struct winnow_pool *pool)
{
    uint32_t item_idx = pool->first_free;
    if (item_idx == UINT32_MAX)
        return NULL;
    winnow_assert(item_idx < pool->n_items);
    struct slot *slot = &pool->slot[item_idx];
    winnow_assert(!slot->taken);
    winnow_assert(slot->generation > 0);
    winnow_assert(pool->n_used < pool->n_items);
    pool->first_free = slot->next_free;
    slot->taken = true;
    pool->n_used++;
    return pool->items + item_idx * pool->item_bytes;
}

void winnow_pool_give(struct winnow_pool *pool, void *item)
{
    uint32_t item_idx = item_index(pool, item);
    struct slot *slot = &pool->slot[item_idx];
    winnow_assert(slot->taken);
    winnow_assert(pool->n_used > 0);
    slot->taken = false;
    slot->generation = slot->generation == UINT32_MAX ? 1 : slot->generation + 1;
    slot->next_free = pool->first_free;
    pool->first_free = item_idx;
    pool->n_used--;
}

uint64_t winnow_pool_handle(const struct winnow_pool *pool, const void *item)
{
    uint32_t item_idx = item_index(pool, item);
    winnow_assert(pool->slot[item_idx].taken);
    return (uint64_t)pool->slot[item_idx].generation << 32 | item_idx;
}

void *winnow_pool_find(const struct winnow_pool *pool, uint64_t handle)
{
    uint32_t item_idx = (uint32_t)handle;
    if (item_idx >= pool->n_items || !pool->slot[item_idx].taken ||
        pool->slot[item_idx].generation != (uint32_t)(handle >> 32))
        return NULL;
    return pool->items + item_idx * pool->item_bytes;
}

uint32_t winnow_pool_used(const struct winnow_pool *pool)
{
    return pool->n_used;
}

uint32_t winnow_pool_size(const struct winnow_pool *pool)
{
    return pool->n_items;
}

void *winnow_pool_at(const struct winnow_pool *pool, uint32_t item_idx)
{
    winnow_assert(item_idx < pool->n_items);
    return pool->slot[item_idx].taken ? pool->items + item_idx * pool->item_bytes : NULL;
}
