/*
 * In flight: the bounded memory of uploads, whatever the number of streams. One mapping, taken in
 * contiguous ranges of 64 KiB units, first fit. Every taker reserves all it needs at once and gives
 * it back without taking more, so waiters in arrival order cannot dead-lock; fragmentation costs
 * waiting alone.
 *
 * Thread: the serving thread; the bytes of a range: whoever it is lent to.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct winnow_inflight;

int winnow_inflight_create(uint64_t n_bytes, struct winnow_inflight **ret_inflight); /* -ENOMEM */
void winnow_inflight_destroy(struct winnow_inflight *inflight);
/* 64-byte aligned, contents undefined. NULL: no room now, or (n_bytes above all of it) never. */
void *winnow_inflight_take(struct winnow_inflight *inflight, uint64_t n_bytes);
void winnow_inflight_give(struct winnow_inflight *inflight, void *range, uint64_t n_bytes);
uint64_t winnow_inflight_used_bytes(const struct winnow_inflight *inflight);
