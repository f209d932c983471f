#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <daemon/inflight.h>
#include <errno.h>
#include <string.h>

enum { UNIT_BYTES = 64 << 10 };

struct winnow_inflight {
    uint8_t *memory;
    uint32_t n_units, n_used;
    uint8_t is_used[]; /* [n_units] */
};

static_assert(UNIT_BYTES % 64 == 0, "ranges are aligned to 64");
static_assert((UNIT_BYTES & (UNIT_BYTES - 1)) == 0, "a power of two");

static uint32_t units(uint64_t n_bytes)
{
    return (uint32_t)((n_bytes + UNIT_BYTES - 1) / UNIT_BYTES);
}

int winnow_inflight_create(uint64_t n_bytes, struct winnow_inflight **ret_inflight)
{
    winnow_assert(n_bytes);
    winnow_assert(n_bytes / UNIT_BYTES < UINT32_MAX);
    uint32_t n_units = units(n_bytes);
    struct winnow_inflight *inflight = winnow_alloc(sizeof *inflight + n_units);
    if (!inflight)
        return -ENOMEM;
    inflight->n_units = n_units;
    inflight->memory = winnow_alloc_map((size_t)n_units * UNIT_BYTES);
    if (!inflight->memory) {
        winnow_alloc_free(inflight);
        return -ENOMEM;
    }
    winnow_assert((uintptr_t)inflight->memory % 64 == 0);
    *ret_inflight = inflight;
    return 0;
}

void winnow_inflight_destroy(struct winnow_inflight *inflight)
{
    if (!inflight)
        return;
    winnow_assert(!inflight->n_used);
    winnow_alloc_unmap(inflight->memory, (size_t)inflight->n_units * UNIT_BYTES);
    winnow_alloc_free(inflight);
}

void *winnow_inflight_take(struct winnow_inflight *inflight, uint64_t n_bytes)
{
    winnow_assert(inflight->n_used <= inflight->n_units);
    if (n_bytes > (uint64_t)inflight->n_units * UNIT_BYTES)
        return NULL;
    uint32_t n_wanted = units(n_bytes), n_free = 0;
    for (uint32_t i = 0; i < inflight->n_units; i++) {
        n_free = inflight->is_used[i] ? 0 : n_free + 1;
        if (n_free < n_wanted || !n_wanted)
            continue;
        uint32_t first = i + 1 - n_wanted;
        memset(inflight->is_used + first, 1, n_wanted);
        inflight->n_used += n_wanted;
        winnow_assert(first + n_wanted <= inflight->n_units);
        winnow_assert(inflight->n_used <= inflight->n_units);
        return inflight->memory + (size_t)first * UNIT_BYTES;
    }
    return NULL;
}

void winnow_inflight_give(struct winnow_inflight *inflight, void *range, uint64_t n_bytes)
{
    winnow_assert((uint8_t *)range >= inflight->memory);
    size_t offset_bytes = (size_t)((uint8_t *)range - inflight->memory);
    winnow_assert(offset_bytes % UNIT_BYTES == 0);
    size_t first = offset_bytes / UNIT_BYTES;
    uint32_t n_units = units(n_bytes);
    winnow_assert(n_units);
    winnow_assert(n_units <= inflight->n_used);
    winnow_assert(first + n_units <= inflight->n_units);
    for (uint32_t i = 0; i < n_units; i++) {
        winnow_assert(inflight->is_used[first + i]);
        inflight->is_used[first + i] = 0;
    }
    inflight->n_used -= n_units;
}

uint64_t winnow_inflight_used_bytes(const struct winnow_inflight *inflight)
{
    winnow_assert(inflight->n_used <= inflight->n_units);
    return (uint64_t)inflight->n_used * UNIT_BYTES;
}
