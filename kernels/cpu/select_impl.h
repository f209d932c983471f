/*
 * Select and the second round (kernels/ref/select.c and verify.c have the rules).
 *
 * The estimates lie block by block, G heads each. Sixteen blocks are G vectors, and lane i of them
 * belongs to head i % G: everything that is done to all of them (largest, exp, sum, key) is done a
 * vector at a time with a head's number repeated over the lanes. The key needs no second exp: it is
 * the sum of e_b,g / T_g.
 *
 * Sums are fp64 of multiples of 2^-40: exact, so the same in any order, up to 8,192 blocks of the
 * largest mass; the order is one in any case.
 *
 * Blocks are sorted by radix, four passes over the keys' ranks: the list is wanted whole, and a
 * stable sort settles ties by number. Of a selection's 3.5 us (416 blocks, G 3) it takes 2.
 */
#pragma once

#include <kernels/cpu/simd.h>

/* Of one call. Arrays [n_blocks][G] are filled up to whole sixteens of blocks. */
struct select_scratch {
    uint32_t n_q, n_blocks; /* filled up */
    float *ln;              /* ln e, -Inf where there is no block */
    float *e;               /* exp(ln - M_g), 0 where it is unknown */
    float *mixed;           /* the same of ln m for blocks that were read */
    uint64_t *key[2];       /* [n_blocks] rank and number, before and after a pass */
};

enum { N_LANES_MAX = 16 * WINNOW_GQA_MAX };

static size_t select_scratch_bytes(size_t n_q, size_t n_blocks)
{
    size_t n = (n_blocks + 15) / 16 * 16;
    return 3 * n * n_q * sizeof(float) + 2 * n * sizeof(uint64_t);
}

static void select_scratch_init(struct select_scratch *s, const struct winnow_selection *sel,
                                float *scratch)
{
    size_t n_floats = (size_t)sel->n_blocks * sel->n_q;

    s->n_q = sel->n_q;
    s->n_blocks = (sel->n_blocks + 15) / 16 * 16;
    size_t n_filled = (size_t)s->n_blocks * s->n_q;
    s->ln = scratch;
    s->e = s->ln + n_filled;
    s->mixed = s->e + n_filled;
    s->key[0] = (uint64_t *)(s->mixed + n_filled);
    s->key[1] = s->key[0] + s->n_blocks;
    memcpy(s->ln, sel->ln_e, n_floats * sizeof(float));
    for (size_t i = n_floats; i < n_filled; i++)
        s->ln[i] = -INFINITY;
}

/* x of a head, over the lanes of sixteen blocks. */
static void lanes_fill(uint32_t n_q, const float *x, float *lane)
{
    for (uint32_t i = 0; i < 16 * n_q; i++)
        lane[i] = x[i % n_q];
}

static bool is_known(float ln)
{
    return ln < INFINITY;
}

/* Raises largest [G] to the known of ln; returns whether one is unknown. */
static bool raise_largest(const struct select_scratch *s, const float *ln, float *largest)
{
    float top[N_LANES_MAX];
    v16 endless = v16_set1(INFINITY), never = v16_set1(-INFINITY), is_unknown = v16_set1(0.0f);

    lanes_fill(s->n_q, largest, top);
    for (uint32_t b = 0; b < s->n_blocks; b += 16, ln += 16 * s->n_q)
        for (uint32_t i = 0; i < 16 * s->n_q; i += 16) {
            v16 x = v16_load(ln + i);
            is_unknown = v16_less_choose(x, endless, is_unknown, v16_set1(1.0f));
            x = v16_less_choose(x, endless, x, never);
            v16_store(top + i, v16_max(v16_load(top + i), x));
        }
    for (uint32_t i = 0; i < 16 * s->n_q; i++)
        largest[i % s->n_q] = fmaxf(largest[i % s->n_q], top[i]);
    return v16_largest(is_unknown) > 0;
}

/* e = exp(ln - M), 0 where ln is unknown; may be ln itself. */
static void exp_shifted(const struct select_scratch *s, const float *largest, const float *ln,
                        float *e)
{
    float shift[N_LANES_MAX];
    v16 endless = v16_set1(INFINITY), lowest = v16_set1(-FLT_MAX), zero = v16_set1(0.0f);

    lanes_fill(s->n_q, largest, shift);
    for (uint32_t b = 0; b < s->n_blocks; b += 16, ln += 16 * s->n_q, e += 16 * s->n_q)
        for (uint32_t i = 0; i < 16 * s->n_q; i += 16) {
            v16 x = v16_load(ln + i), M = v16_load(shift + i);
            M = v16_less_choose(M, lowest, zero, M); /* -Inf - -Inf is NaN */
            v16_store(e + i, v16_less_choose(x, endless, v16_exp(v16_sub(x, M)), zero));
        }
}

/* To a multiple of 2^-40: below 2^-17 by the rounding of a sum, above it is one. e <= 1. */
static double to_fixed(float e)
{
    return (double)(e < 0x1p-17f ? (e + 0x1p-17f) - 0x1p-17f : e);
}

static double fixed_exp(float ln, float largest)
{
    return ln > -INFINITY ? to_fixed(v16_get1(v16_exp(v16_set1(ln - largest)))) : 0;
}

/* Adds e of all blocks to sum [G]. */
static void fixed_sum(const struct select_scratch *s, const float *e, double *sum)
{
    double lane[N_LANES_MAX] = {0};
    v16 step = v16_set1(0x1p-17f);

    for (uint32_t b = 0; b < s->n_blocks; b += 16, e += 16 * s->n_q)
        for (uint32_t i = 0; i < 16 * s->n_q; i += 16) {
            v16 x = v16_load(e + i), rounded = v16_sub(v16_add(x, step), step);
            v16_add_to(lane + i, v16_less_choose(x, step, rounded, x));
        }
    for (uint32_t i = 0; i < 16 * s->n_q; i++)
        sum[i % s->n_q] += lane[i];
}

/* Falling keys have rising ranks. */
static uint32_t rank_falling(float key)
{
    uint32_t bits;
    key += 0.0f; /* -0 is 0 */
    memcpy(&bits, &key, sizeof bits);
    return bits & UINT32_C(0x80000000) ? bits : ~(bits | UINT32_C(0x80000000));
}

/* ln_key of all blocks: +Inf where an estimate is unknown. */
static void key_fill(struct winnow_selection *sel, const struct select_scratch *s,
                     const double *total)
{
    float by_head[WINNOW_GQA_MAX], by[N_LANES_MAX], share[N_LANES_MAX];
    uint32_t n_q = sel->n_q;
    v16 endless = v16_set1(INFINITY);

    for (uint32_t g = 0; g < n_q; g++)
        by_head[g] = total[g] > 0 ? (float)(1 / total[g]) : 0.0f;
    lanes_fill(n_q, by_head, by);
    for (uint32_t b = 0; b < sel->n_blocks; b += 16) {
        uint32_t n = sel->n_blocks - b < 16 ? sel->n_blocks - b : 16;
        float key[16] = {0};
        for (size_t i = 0, at = (size_t)b * n_q; i < 16 * n_q; i += 16) {
            v16 x = v16_mul(v16_load(s->e + at + i), v16_load(by + i));
            v16_store(share + i, v16_less_choose(v16_load(s->ln + at + i), endless, x, endless));
        }
        for (uint32_t i = 0; i < 16; i++)
            for (uint32_t g = 0; g < n_q; g++)
                key[i] += share[i * n_q + g];
        v16_store(key, v16_log(v16_load(key)));
        memcpy(sel->ln_key + b, key, n * sizeof(float));
    }
}

static void key_sort(struct winnow_selection *sel, uint64_t *const key[2])
{
    uint32_t n = sel->n_blocks, place[4][256] = {{0}}; /* by digit: how many, then where */

    for (uint32_t b = 0; b < n; b++) {
        uint32_t rank = rank_falling(sel->ln_key[b]);
        key[0][b] = (uint64_t)rank << 32 | b;
        for (int pass = 0; pass < 4; pass++)
            place[pass][rank >> 8 * pass & 255]++;
    }
    for (int pass = 0; pass < 4; pass++) {
        const uint64_t *from = key[pass % 2];
        uint64_t *to = key[(pass + 1) % 2];
        uint32_t before = 0;
        for (uint32_t digit = 0; digit < 256; digit++) {
            uint32_t n_digit = place[pass][digit];
            place[pass][digit] = before;
            before += n_digit;
        }
        for (uint32_t i = 0; i < n; i++)
            to[place[pass][from[i] >> (32 + 8 * pass) & 255]++] = from[i];
    }
    for (uint32_t i = 0; i < n; i++)
        sel->block_idx[i] = (uint32_t)key[0][i];
}

static void add_block(const struct winnow_selection *sel, const float *e, uint32_t b, double *sum)
{
    for (uint32_t g = 0; g < sel->n_q; g++)
        sum[g] += to_fixed(e[(size_t)b * sel->n_q + g]);
}

/* How many of block_idx, from n on, it takes until every query head holds the mass. */
static uint32_t prefix(const struct winnow_selection *sel, const float *e, const double *total,
                       double mass, uint32_t n, double *sum)
{
    for (; n < sel->n_blocks; n++) {
        bool is_short = sel->ln_key[sel->block_idx[n]] == INFINITY;
        for (uint32_t g = 0; g < sel->n_q; g++)
            is_short |= sum[g] < mass * total[g];
        if (!is_short)
            break;
        add_block(sel, e, sel->block_idx[n], sum);
    }
    return n;
}

static void select_blocks(uint32_t policy, struct winnow_selection *sel, void *scratch)
{
    double sum[WINNOW_GQA_MAX], total[WINNOW_GQA_MAX], mass = (double)sel->mass;
    float largest[WINNOW_GQA_MAX];
    struct select_scratch s;

    if (policy == WINNOW_POLICY_TACTIC || policy == WINNOW_POLICY_EXACT) {
        winnow_kernels_ref()->select(policy, sel, scratch);
        return;
    }
    select_scratch_init(&s, sel, scratch);
    memcpy(largest, sel->ln_z, sel->n_q * sizeof(float));
    raise_largest(&s, s.ln, largest);
    exp_shifted(&s, largest, s.ln, s.e);
    for (uint32_t g = 0; g < sel->n_q; g++)
        total[g] = sum[g] = fixed_exp(sel->ln_z[g], largest[g]);
    fixed_sum(&s, s.e, total);
    key_fill(sel, &s, total);
    key_sort(sel, s.key);

    uint32_t n = prefix(sel, s.e, total, mass, 0, sum);
    uint32_t n_with_reserve = prefix(sel, s.e, total, mass + (1 - mass) / 2, n, sum);
    sel->n_selected = n < sel->n_blocks_max ? n : sel->n_blocks_max;
    sel->n_reserve = n_with_reserve - sel->n_selected;
    memset(sel->selected, 0, sel->n_blocks);
    for (uint32_t i = 0; i < sel->n_selected; i++)
        sel->selected[sel->block_idx[i]] = 1;
}

struct tally {
    double read[WINNOW_GQA_MAX]; /* Z + Z_S */
    double rest[WINNOW_GQA_MAX]; /* sum of e of the unselected */
    bool has_unknown;            /* an unselected block whose e is not known */
};

static bool has_unknown(const struct winnow_selection *sel)
{
    for (uint32_t b = 0; b < sel->n_blocks; b++)
        for (size_t g = 0, at = (size_t)b * sel->n_q; g < sel->n_q && !sel->selected[b]; g++)
            if (!is_known(sel->ln_e[at + g]))
                return true;
    return false;
}

/* Fills e and mixed too. */
static void tally_init(struct tally *tally, const struct winnow_selection *sel,
                       struct select_scratch *s)
{
    size_t n_q = sel->n_q;
    float largest[WINNOW_GQA_MAX];
    double z[WINNOW_GQA_MAX], read[WINNOW_GQA_MAX] = {0}, all[WINNOW_GQA_MAX] = {0};

    memcpy(s->mixed, s->ln, s->n_blocks * n_q * sizeof(float));
    for (uint32_t i = 0; i < sel->n_selected; i++) {
        size_t at = sel->block_idx[i] * n_q;
        if (sel->selected[sel->block_idx[i]])
            memcpy(s->mixed + at, sel->ln_m + at, n_q * sizeof(float));
    }
    memcpy(largest, sel->ln_z, n_q * sizeof(float));
    raise_largest(s, s->ln, largest);
    tally->has_unknown = raise_largest(s, s->mixed, largest) && has_unknown(sel);
    exp_shifted(s, largest, s->ln, s->e);
    exp_shifted(s, largest, s->mixed, s->mixed);
    for (uint32_t i = 0; i < sel->n_selected; i++)
        if (sel->selected[sel->block_idx[i]])
            add_block(sel, s->mixed, sel->block_idx[i], read);
    fixed_sum(s, s->mixed, all);
    for (uint32_t g = 0; g < n_q; g++) {
        z[g] = fixed_exp(sel->ln_z[g], largest[g]);
        tally->read[g] = z[g] + read[g];
        tally->rest[g] = fmax(all[g] - read[g], 0);
    }
}

/* rho: over the last quarter of the selected that carry an estimate (probes do not), at least
 * four. */
static void price(const struct winnow_selection *sel, const struct select_scratch *s, float *rho)
{
    uint32_t n_q = sel->n_q, first = 0;

    while (first < sel->n_selected && sel->selected[sel->block_idx[first]] == 3)
        first++;
    uint32_t n_quarter = (sel->n_selected - first + 3) / 4;
    n_quarter = n_quarter > 4 ? n_quarter : 4;
    if (n_quarter < sel->n_selected - first)
        first = sel->n_selected - n_quarter;
    for (uint32_t g = 0; g < n_q; g++) {
        double sum_m = 0, sum_e = 0;
        for (uint32_t i = first; i < sel->n_selected; i++) {
            size_t at = (size_t)sel->block_idx[i] * n_q + g;
            if (!sel->selected[sel->block_idx[i]] || !is_known(sel->ln_e[at]))
                continue;
            sum_m += to_fixed(s->mixed[at]);
            sum_e += to_fixed(s->e[at]);
        }
        if (sum_e > 0)
            rho[g] = (float)fmin(fmax(sum_m / sum_e, 1), 8);
        else
            rho[g] = sum_m > 0 ? 8 : 1;
    }
}

/* Goes on in key order until every query head is served, by estimate. */
static uint32_t add_blocks(struct winnow_selection *sel, const struct tally *tally, const float *e,
                           const float *rho)
{
    uint32_t n_max = sel->n_blocks < sel->n_blocks_max ? sel->n_blocks : sel->n_blocks_max;
    uint32_t n = sel->n_selected, n_before = n;
    double added[WINNOW_GQA_MAX] = {0}, mass = (double)sel->mass;

    for (; n < n_max; n++) {
        bool is_short = false;
        for (uint32_t g = 0; g < sel->n_q; g++) {
            double price = (double)rho[g];
            is_short |= tally->read[g] + price * added[g] <
                        mass * (tally->read[g] + price * tally->rest[g]);
        }
        if (!is_short)
            break;
        sel->selected[sel->block_idx[n]] = 2;
        add_block(sel, e, sel->block_idx[n], added);
    }
    sel->n_selected = n;
    sel->n_reserve -= n - n_before < sel->n_reserve ? n - n_before : sel->n_reserve;
    return n - n_before;
}

static uint32_t select_more(struct winnow_selection *sel, float *rho, float *mass, int may_add,
                            void *scratch)
{
    struct select_scratch s;
    struct tally tally;
    bool is_short = false;

    select_scratch_init(&s, sel, scratch);
    tally_init(&tally, sel, &s);
    if (may_add)
        price(sel, &s, rho);
    for (uint32_t g = 0; g < sel->n_q; g++) {
        double all = tally.read[g] + (double)rho[g] * tally.rest[g];
        mass[g] = all > 0 ? (float)(tally.read[g] / all) : 1.0f;
        mass[g] = tally.has_unknown ? 0.0f : mass[g];
        is_short |= mass[g] < sel->mass;
    }
    return may_add && is_short ? add_blocks(sel, &tally, s.e, rho) : 0;
}
