/*
 * Bounded rings through which ownership moves between threads. Items are copied in and out.
 *
 * One consumer; one producer (SPSC) or many (MPSC: a slot is claimed by compare-and-swap and
 * published by its own sequence number, Vyukov's bounded queue). No ring blocks or allocates after
 * create. Waking the other side is the caller's: put returns 1 when the ring had been empty, so
 * that one wake-up serves a burst.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct winnow_ring;

/* Room for n_items_max items (rounded up to a power of two) of item_bytes. -ENOMEM. */
int winnow_ring_create(uint32_t n_items_max, uint32_t item_bytes, struct winnow_ring **ret_ring);
void winnow_ring_destroy(struct winnow_ring *ring); /* NULL is fine */

/* Any producer. 1: put into an empty ring (wake the consumer); 0: put; -EAGAIN: full. */
int winnow_ring_put(struct winnow_ring *ring, const void *item);
/* The consumer. 1: one taken; 0: empty. */
int winnow_ring_take(struct winnow_ring *ring, void *item);
