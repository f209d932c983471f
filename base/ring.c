// Vyukov's bounded queue. Each slot carries a sequence number: `position` when it is free for that
// position's producer, `position + 1` when it holds that position's item. A producer claims a
// position by compare-and-swap on `tail`, the consumer needs none: it is alone.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/ring.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

enum { LINE_BYTES = 64 };

struct winnow_ring {
    uint64_t mask;
    uint32_t item_bytes, slot_bytes;
    _Alignas(LINE_BYTES) _Atomic uint64_t tail; /* producers claim here */
    _Alignas(
        LINE_BYTES) _Atomic uint64_t head; /* the consumer writes, producers read for "empty" */
    _Alignas(LINE_BYTES) uint8_t slot[];   /* {_Atomic uint64_t sequence, item} */
};

static_assert(offsetof(struct winnow_ring, slot) % LINE_BYTES == 0, "no slot beside head");
static_assert(sizeof(_Atomic uint64_t) == 8, "slots are sized for it");

static _Atomic uint64_t *slot_sequence(struct winnow_ring *ring, uint64_t position)
{
    return (_Atomic uint64_t *)(void *)(ring->slot + (position & ring->mask) * ring->slot_bytes);
}

static void *slot_item(struct winnow_ring *ring, uint64_t position)
{
    return slot_sequence(ring, position) + 1;
}

int winnow_ring_create(uint32_t n_items_max, uint32_t item_bytes, struct winnow_ring **ret_ring)
{
    winnow_assert(n_items_max > 0);
    winnow_assert(n_items_max <= UINT32_C(1) << 24);
    winnow_assert(item_bytes > 0);
    winnow_assert(item_bytes <= 4096);
    uint64_t n_slots = 2;
    while (n_slots < n_items_max)
        n_slots *= 2;
    uint32_t slot_bytes = (uint32_t)(8 + (item_bytes + 7) / 8 * 8);
    struct winnow_ring *ring = winnow_alloc(sizeof *ring + n_slots * slot_bytes);
    if (!ring)
        return -ENOMEM;
    ring->mask = n_slots - 1;
    ring->item_bytes = item_bytes;
    ring->slot_bytes = slot_bytes;
    for (uint64_t i = 0; i < n_slots; i++)
        atomic_store_explicit(slot_sequence(ring, i), i, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    *ret_ring = ring;
    return 0;
}

void winnow_ring_destroy(struct winnow_ring *ring)
{
    winnow_alloc_free(ring);
}

int winnow_ring_put(struct winnow_ring *ring, const void *item)
{
    uint64_t position = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    for (;;) {
        uint64_t sequence =
            atomic_load_explicit(slot_sequence(ring, position), memory_order_acquire);
        if (sequence < position)
            return -EAGAIN; /* still holds the item of one round before */
        if (sequence > position)
            position = atomic_load_explicit(&ring->tail, memory_order_relaxed);
        else if (atomic_compare_exchange_weak_explicit(&ring->tail, &position, position + 1,
                                                       memory_order_relaxed, memory_order_relaxed))
            break;
    }
    memcpy(slot_item(ring, position), item, ring->item_bytes);
    /* seq_cst with the load of head: either this producer sees the consumer past its item's
     * predecessor and reports "was empty", or the consumer sees the item before it sleeps. */
    atomic_store(slot_sequence(ring, position), position + 1);
    return atomic_load(&ring->head) == position ? 1 : 0;
}

int winnow_ring_take(struct winnow_ring *ring, void *item)
{
    uint64_t position = atomic_load_explicit(&ring->head, memory_order_relaxed);
    if (atomic_load(slot_sequence(ring, position)) != position + 1)
        return 0;
    memcpy(item, slot_item(ring, position), ring->item_bytes);
    atomic_store_explicit(slot_sequence(ring, position), position + ring->mask + 1,
                          memory_order_release);
    atomic_store(&ring->head, position + 1);
    return 1;
}
