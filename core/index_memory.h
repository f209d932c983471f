/*
 * index_memory: the one region that holds what stays resident of sealed tokens (index, token order,
 * sums, places) and the scratch of their selection, in pieces of whole 4 KiB pages, first fit. Pieces
 * of one model are of one size, so holes fit again.
 *
 * Thread: owner takes and gives; a piece's bytes are its holder's.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct winnow_index_memory;

int winnow_index_memory_create(uint64_t cap_bytes, struct winnow_index_memory **ret); /* -ENOMEM */
void winnow_index_memory_destroy(struct winnow_index_memory *memory); /* NULL is fine */

/* Not zeroed, page-aligned; NULL: no room. give takes the same n_bytes. */
void *winnow_index_memory_take(struct winnow_index_memory *memory, size_t n_bytes);
void winnow_index_memory_give(struct winnow_index_memory *memory, void *piece, size_t n_bytes);

uint64_t winnow_index_memory_used(const struct winnow_index_memory *memory);
uint64_t winnow_index_memory_cap(const struct winnow_index_memory *memory);
