#include <base/alloc.h>
#include <base/assert.h>
#include <core/index_memory.h>
#include <errno.h>
#include <stdbool.h>
#include <storage/store.h>

struct winnow_index_memory {
    uint8_t *base;
    uint64_t n_pages, n_used, first_maybe; /* no page below first_maybe is free */
    uint64_t *taken;                       /* a bit a page */
};

static bool page_taken(const struct winnow_index_memory *memory, uint64_t page)
{
    return memory->taken[page / 64] >> (page % 64) & 1;
}

static void pages_mark(struct winnow_index_memory *memory, uint64_t first, uint64_t n, bool taken)
{
    for (uint64_t page = first; page < first + n; page++) {
        winnow_assert(page_taken(memory, page) != taken);
        memory->taken[page / 64] ^= UINT64_C(1) << (page % 64);
    }
}

static uint64_t pages_of(size_t n_bytes)
{
    return (n_bytes + WINNOW_PAGE_BYTES - 1) / WINNOW_PAGE_BYTES;
}

int winnow_index_memory_create(uint64_t cap_bytes, struct winnow_index_memory **ret)
{
    struct winnow_index_memory *memory = winnow_alloc(sizeof *memory);
    if (!memory)
        return -ENOMEM;
    memory->n_pages = cap_bytes / WINNOW_PAGE_BYTES;
    memory->taken = winnow_alloc_array(memory->n_pages / 64 + 1, sizeof *memory->taken);
    memory->base = winnow_alloc_map(memory->n_pages * WINNOW_PAGE_BYTES);
    if (!memory->taken || !memory->base) {
        winnow_index_memory_destroy(memory);
        return -ENOMEM;
    }
    winnow_assert((uintptr_t)memory->base % WINNOW_PAGE_BYTES == 0);
    *ret = memory;
    return 0;
}

void winnow_index_memory_destroy(struct winnow_index_memory *memory)
{
    if (!memory)
        return;
    winnow_alloc_unmap(memory->base, memory->n_pages * WINNOW_PAGE_BYTES);
    winnow_alloc_free(memory->taken);
    winnow_alloc_free(memory);
}

void *winnow_index_memory_take(struct winnow_index_memory *memory, size_t n_bytes)
{
    uint64_t n = pages_of(n_bytes), run = 0;
    winnow_assert(n > 0);
    winnow_assert(memory->n_used <= memory->n_pages);
    winnow_assert(memory->first_maybe <= memory->n_pages);
    if (memory->n_used + n > memory->n_pages)
        return NULL;
    for (uint64_t page = memory->first_maybe; page < memory->n_pages; page++) {
        run = page_taken(memory, page) ? 0 : run + 1;
        if (run < n)
            continue;
        uint64_t first = page + 1 - n;
        pages_mark(memory, first, n, true);
        memory->n_used += n;
        if (first == memory->first_maybe)
            memory->first_maybe = page + 1;
        return memory->base + first * WINNOW_PAGE_BYTES;
    }
    return NULL;
}

void winnow_index_memory_give(struct winnow_index_memory *memory, void *piece, size_t n_bytes)
{
    if (!piece)
        return;
    size_t offset_bytes = (size_t)((uint8_t *)piece - memory->base);
    uint64_t first = offset_bytes / WINNOW_PAGE_BYTES, n = pages_of(n_bytes);
    winnow_assert(n > 0);
    winnow_assert(offset_bytes % WINNOW_PAGE_BYTES == 0);
    winnow_assert(first + n <= memory->n_pages);
    winnow_assert(memory->n_used >= n);
    pages_mark(memory, first, n, false);
    memory->n_used -= n;
    if (first < memory->first_maybe)
        memory->first_maybe = first;
}

uint64_t winnow_index_memory_used(const struct winnow_index_memory *memory)
{
    return memory->n_used * WINNOW_PAGE_BYTES;
}

uint64_t winnow_index_memory_cap(const struct winnow_index_memory *memory)
{
    return memory->n_pages * WINNOW_PAGE_BYTES;
}
