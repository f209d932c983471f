/*
 * Latency: how long things took, as a histogram of four buckets an octave from 1 us to 34 s. A
 * quantile is right to a fifth of itself, and of an interval by the histogram as it was before.
 * Plain memory: whoever adds also reads. Zeroed: empty.
 */
#pragma once

#include <stdint.h>

enum { WINNOW_N_LATENCIES = 102 };

struct winnow_latency {
    uint64_t n[WINNOW_N_LATENCIES];
};

void winnow_latency_add(struct winnow_latency *latency, int64_t took_ns);
uint64_t winnow_latency_count(const struct winnow_latency *latency,
                              const struct winnow_latency *before);
/* The time that `share` (0 to 1) of those in latency and not in before (NULL: empty) did not
 * exceed; 0: there is none. */
int64_t winnow_latency_quantile(const struct winnow_latency *latency,
                                const struct winnow_latency *before, double share);
