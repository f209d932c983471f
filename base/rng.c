#include <base/assert.h>
#include <base/rng.h>
#include <math.h>

/* SplitMix64 (Steele, Lea, Flood 2014): spreads a small seed over the whole state. */
static uint64_t splitmix_next(uint64_t *x)
{
    uint64_t z = (*x += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static uint64_t rotate_left(uint64_t x, int k)
{
    return (x << k) | (x >> (64 - k));
}

void winnow_rng_init(struct winnow_rng *rng, uint64_t seed)
{
    for (int i = 0; i < 4; i++)
        rng->state[i] = splitmix_next(&seed);
    winnow_assert(rng->state[0] | rng->state[1]); /* a state of zeros would stay so */
}

uint64_t winnow_rng_next(struct winnow_rng *rng)
{
    uint64_t *s = rng->state;
    uint64_t result = rotate_left(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

uint64_t winnow_rng_below(struct winnow_rng *rng, uint64_t n)
{
    winnow_assert(n > 0);
    uint64_t reject_below = -n % n, x; /* 2^64 mod n: what would favour small results */
    do
        x = winnow_rng_next(rng);
    while (x < reject_below);
    return x % n;
}

double winnow_rng_unit(struct winnow_rng *rng)
{
    return (double)(winnow_rng_next(rng) >> 11) * 0x1p-53;
}

double winnow_rng_normal(struct winnow_rng *rng)
{
    double u = 1.0 - winnow_rng_unit(rng), v = winnow_rng_unit(rng); /* Box and Muller 1958 */
    winnow_assert(u > 0);
    return sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * v);
}
