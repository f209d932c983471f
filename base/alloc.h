/*
 * The seam for memory: every allocation of base, kernels, storage and core goes through here, so
 * that a test can make the n-th one fail and count those made in a decode step (none).
 *
 * Thread: any.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* Zeroed memory, aligned to 64 bytes; NULL when there is none. n_bytes 0 gives a pointer too. */
void *winnow_alloc(size_t n_bytes);
void *winnow_alloc_array(size_t n_items, size_t item_bytes); /* NULL on overflow */
void winnow_alloc_free(void *memory);                        /* NULL is fine */

/* Page-aligned anonymous memory for arenas: reserved and zero, huge pages advised, not copied by
 * fork. NULL when there is none. `give` takes the same n_bytes. */
void *winnow_alloc_map(size_t n_bytes);
void winnow_alloc_unmap(void *memory, size_t n_bytes);

/* Allocations made since the process began. */
uint64_t winnow_alloc_count(void);

/* Allocation number `n` from now (1 = the next) fails; 0 = none. With `onwards`, all after it
 * fail too. For tests of failure paths. */
void winnow_alloc_fail_at(uint64_t n, int onwards);
