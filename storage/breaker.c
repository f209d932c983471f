// What counts is the difficulty. A deadline belongs to the caller, and one who gives the disk 1 ms
// says nothing about it: only an operation that the disk has had for half a second, four times what
// a full window of 1 MiB takes at 1 GB/s, is the disk's own failure. Counted are operations, not
// blocks: a merged read of 64 blocks is one answer that did not come.
//
// The probe is a read that somebody asked for. One of the store's own would keep idle disks busy,
// and if it never came back would take its buffer, and every later probe, with it.
#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <storage/breaker.h>

static const int64_t late_within_ns = 10 * WINNOW_NS_PER_S;
static const int64_t held_least_ns = 500 * WINNOW_NS_PER_MS;
static const int64_t wait_first_ns = WINNOW_NS_PER_S;
static const int64_t wait_most_ns = 30 * WINNOW_NS_PER_S;
static const int64_t probe_ns = WINNOW_NS_PER_S;

static_assert((WINNOW_N_LATE_OPENS & (WINNOW_N_LATE_OPENS - 1)) == 0, "late_idx may wrap");

void winnow_breaker_init(struct winnow_breaker *breaker)
{
    breaker->late_idx = 0;
    for (uint32_t i = 0; i < WINNOW_N_LATE_OPENS; i++)
        breaker->late_ns[i] = INT64_MIN / 2;
    breaker->wait_ns = wait_first_ns;
    breaker->is_probing = false;
    atomic_store(&breaker->is_open, false);
}

bool winnow_breaker_is_open(const struct winnow_breaker *breaker)
{
    return atomic_load_explicit(&breaker->is_open, memory_order_relaxed);
}

bool winnow_breaker_late(struct winnow_breaker *breaker, int64_t held_ns, int64_t now_ns)
{
    if (held_ns < held_least_ns)
        return false;
    if (winnow_breaker_is_open(breaker))
        return true;
    winnow_assert(!breaker->is_probing);
    winnow_assert(breaker->wait_ns == wait_first_ns);
    breaker->late_ns[breaker->late_idx++ % WINNOW_N_LATE_OPENS] = now_ns;
    if (now_ns - breaker->late_ns[breaker->late_idx % WINNOW_N_LATE_OPENS] >= late_within_ns)
        return true;
    breaker->due_ns = now_ns + breaker->wait_ns;
    atomic_store(&breaker->is_open, true);
    return true;
}

bool winnow_breaker_lets(struct winnow_breaker *breaker, int64_t now_ns)
{
    if (!winnow_breaker_is_open(breaker))
        return true;
    if (now_ns < breaker->due_ns)
        return false;
    if (!breaker->is_probing)
        return true;
    breaker->is_probing = false;
    breaker->wait_ns = breaker->wait_ns < wait_most_ns / 2 ? 2 * breaker->wait_ns : wait_most_ns;
    winnow_assert(breaker->wait_ns > wait_first_ns);
    winnow_assert(breaker->wait_ns <= wait_most_ns);
    breaker->due_ns += breaker->wait_ns;
    return now_ns >= breaker->due_ns;
}

bool winnow_breaker_sent(struct winnow_breaker *breaker, int64_t now_ns)
{
    if (!winnow_breaker_is_open(breaker))
        return false;
    winnow_assert(!breaker->is_probing);
    winnow_assert(now_ns >= breaker->due_ns);
    breaker->is_probing = true;
    breaker->due_ns = now_ns + probe_ns;
    return true;
}

void winnow_breaker_answered(struct winnow_breaker *breaker, int64_t now_ns)
{
    winnow_assert(!breaker->is_probing || winnow_breaker_is_open(breaker));
    if (breaker->is_probing && now_ns < breaker->due_ns)
        winnow_breaker_init(breaker);
}

int64_t winnow_breaker_next(const struct winnow_breaker *breaker)
{
    return winnow_breaker_is_open(breaker) ? breaker->due_ns : INT64_MIN;
}
