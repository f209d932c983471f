#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGN_BYTES = 64, PAGE_BYTES = 4096 };
static_assert((ALIGN_BYTES & (ALIGN_BYTES - 1)) == 0, "rounded up by a mask");

static _Atomic uint64_t n_allocations;
static _Atomic uint64_t fail_at; /* value of n_allocations that fails; 0: none */
static _Atomic int fail_onwards;

/* True when this allocation is the one that a test wants to fail. */
static int allocation_fails(void)
{
    uint64_t n = atomic_fetch_add_explicit(&n_allocations, 1, memory_order_relaxed) + 1;
    uint64_t at = atomic_load_explicit(&fail_at, memory_order_relaxed);
    return at && (n == at || (n > at && atomic_load_explicit(&fail_onwards, memory_order_relaxed)));
}

void *winnow_alloc(size_t n_bytes)
{
    if (allocation_fails() || n_bytes > SIZE_MAX - ALIGN_BYTES)
        return NULL;
    size_t padded_bytes = (n_bytes + ALIGN_BYTES) & ~(size_t)(ALIGN_BYTES - 1);
    void *memory = aligned_alloc(ALIGN_BYTES, padded_bytes);
    if (memory)
        memset(memory, 0, padded_bytes);
    return memory;
}

void *winnow_alloc_array(size_t n_items, size_t item_bytes)
{
    size_t n_bytes;
    return __builtin_mul_overflow(n_items, item_bytes, &n_bytes) ? NULL : winnow_alloc(n_bytes);
}

void winnow_alloc_free(void *memory)
{
    winnow_assert((uintptr_t)memory % ALIGN_BYTES == 0);
    free(memory);
}

void *winnow_alloc_map(size_t n_bytes)
{
    if (allocation_fails())
        return NULL;
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, n_bytes, MADV_HUGEPAGE); /* advice: small pages work too */
    madvise(memory, n_bytes, MADV_DONTFORK);
    return memory;
}

void winnow_alloc_unmap(void *memory, size_t n_bytes)
{
    winnow_assert((uintptr_t)memory % PAGE_BYTES == 0);
    if (memory)
        munmap(memory, n_bytes);
}

uint64_t winnow_alloc_count(void)
{
    return atomic_load_explicit(&n_allocations, memory_order_relaxed);
}

void winnow_alloc_fail_at(uint64_t n, int onwards)
{
    atomic_store_explicit(&fail_onwards, onwards, memory_order_relaxed);
    atomic_store_explicit(&fail_at, n ? winnow_alloc_count() + n : 0, memory_order_relaxed);
}
