#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <base/latency.h>
#include <stddef.h>

static_assert(WINNOW_N_LATENCIES % 4 == 2, "whole octaves, what is below and what is above");
static_assert(WINNOW_N_LATENCIES / 4 < 50, "the end of the last bucket fits nanoseconds");

/* Bucket 0 ends at 1 us; bucket 4 o + q + 1 ends at (1 + (q + 1) / 4) 2^o us. */
static int64_t bucket_end_ns(uint32_t bucket)
{
    winnow_assert(bucket < WINNOW_N_LATENCIES);
    if (bucket == 0)
        return WINNOW_NS_PER_US;
    uint32_t octave = (bucket - 1) / 4, quarter = (bucket - 1) % 4;
    return (WINNOW_NS_PER_US << octave) / 4 * (5 + (int64_t)quarter);
}

void winnow_latency_add(struct winnow_latency *latency, int64_t took_ns)
{
    uint32_t bucket = 0;
    if (took_ns > WINNOW_NS_PER_US) {
        uint64_t us = (uint64_t)(took_ns - 1) / WINNOW_NS_PER_US;
        bucket = 1 + 4 * (63 - (uint32_t)__builtin_clzll(us));
    }
    while (bucket + 1 < WINNOW_N_LATENCIES && took_ns > bucket_end_ns(bucket))
        bucket++;
    latency->n[bucket < WINNOW_N_LATENCIES ? bucket : WINNOW_N_LATENCIES - 1]++;
}

uint64_t winnow_latency_count(const struct winnow_latency *latency,
                              const struct winnow_latency *before)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < WINNOW_N_LATENCIES; i++)
        n += latency->n[i] - (before ? before->n[i] : 0);
    return n;
}

int64_t winnow_latency_quantile(const struct winnow_latency *latency,
                                const struct winnow_latency *before, double share)
{
    winnow_assert(share >= 0 && share <= 1);
    double n_under = share * (double)winnow_latency_count(latency, before);
    uint64_t n = 0;
    for (uint32_t i = 0; i < WINNOW_N_LATENCIES; i++) {
        n += latency->n[i] - (before ? before->n[i] : 0);
        if (n > 0 && (double)n >= n_under)
            return bucket_end_ns(i);
    }
    return 0;
}
