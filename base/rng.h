/* Seeded random numbers (xoshiro256**, Blackman and Vigna 2018), the only source of chance in
 * tests, the simulator and everything below daemon/. Not for secrets. Thread: one owner. */
#pragma once

#include <stdint.h>

struct winnow_rng {
    uint64_t state[4];
};

void winnow_rng_init(struct winnow_rng *rng, uint64_t seed);
uint64_t winnow_rng_next(struct winnow_rng *rng);
uint64_t winnow_rng_below(struct winnow_rng *rng, uint64_t n); /* [0, n), n > 0, unbiased */
double winnow_rng_unit(struct winnow_rng *rng);                /* [0, 1) */
double winnow_rng_normal(struct winnow_rng *rng);              /* mean 0, variance 1 */
