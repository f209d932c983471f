/*
 * A fixed number of equal objects, named by index and generation, so that a late message about an
 * earlier use of a slot is recognised and dropped.
 *
 * A handle is (generation << 32 | index); generations begin at 1, so a handle is never 0. Objects
 * keep their bytes between uses: the taker initialises them. Thread: one owner.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct winnow_pool;

int winnow_pool_create(uint32_t n_items, size_t item_bytes,
                       struct winnow_pool **ret_pool); /* -ENOMEM */
void winnow_pool_destroy(struct winnow_pool *pool);    /* NULL is fine */

void *winnow_pool_take(struct winnow_pool *pool);            /* NULL: none free */
void winnow_pool_give(struct winnow_pool *pool, void *item); /* its handle is stale from here on */
uint64_t winnow_pool_handle(const struct winnow_pool *pool, const void *item); /* of a taken item */
void *winnow_pool_find(const struct winnow_pool *pool,
                       uint64_t handle); /* NULL: stale or unknown */
uint32_t winnow_pool_used(const struct winnow_pool *pool);
uint32_t winnow_pool_size(const struct winnow_pool *pool);
void *winnow_pool_at(const struct winnow_pool *pool, uint32_t item_idx); /* NULL: free */
