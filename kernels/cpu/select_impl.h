/*
 * Select and the second round (kernels/ref/select.c and verify.c have the rules).
 *
 * The estimates become e = exp(ln e - M) once, in order of memory: block by block, G heads each, so
 * that sixteen lanes are sixteen / G blocks and the shift of a lane repeats every G vectors. The
 * key needs no second exp: e_b,g / T_g. Sums are fp64 of multiples of 2^-40: exact, so the same in
 * any order, up to 8,192 blocks of the largest mass; the order is one in any case.
 *
 * Blocks are sorted by radix, four counting passes over the keys' ranks: the list is wanted whole,
 * and a stable sort settles ties by number. The reference's heap sort takes nine tenths of its
 * select; here it takes half.
 */
#pragma once

#include <kernels/cpu/simd.h>

/* Of one call; all arrays lie in scratch. */
struct select_scratch {
    float *e;             /* [n_blocks][G] exp(ln - M_g), 0 where it is unknown */
    float *mixed;         /* [n_blocks][G] the same of ln m for blocks that were read */
    uint64_t *key[2];     /* [n_blocks] rank and number, before and after a pass */
    float shift[16 * 16]; /* M of lane i % G, 16 G lanes */
};

/* n_floats arrays are rounded up to whole vectors. */
static size_t vector_floats(size_t n)
{
    return (n + 15) / 16 * 16;
}

static size_t select_scratch_bytes(size_t n_q, size_t n_blocks)
{
    return 2 * vector_floats(n_blocks * n_q) * sizeof(float) + 2 * n_blocks * sizeof(uint64_t);
}

static void select_scratch_init(struct select_scratch *s, const struct winnow_selection *sel,
                                void *scratch)
{
    size_t n = vector_floats((size_t)sel->n_blocks * sel->n_q);

    s->e = scratch;
    s->mixed = s->e + n;
    s->key[0] = (uint64_t *)(s->mixed + n);
    s->key[1] = s->key[0] + sel->n_blocks;
}

static bool is_known(float ln)
{
    return ln < INFINITY;
}

static void shift_init(struct select_scratch *s, uint32_t n_q, const float *largest)
{
    for (uint32_t i = 0; i < 16 * n_q; i++)
        s->shift[i] = largest[i % n_q] > -INFINITY ? largest[i % n_q] : 0.0f;
}

/* e = exp(ln - M) of every block and head, 0 where ln is unknown; e has room for whole vectors. */
static void exp_shifted(const struct select_scratch *s, const struct winnow_selection *sel,
                        const float *ln, float *e)
{
    size_t n = (size_t)sel->n_blocks * sel->n_q, n_shifts = 16 * sel->n_q;
    v16 endless = v16_set1(INFINITY), zero = v16_set1(0.0f);
    float rest[16] = {0};

    for (size_t i = 0, at = 0; i < n; i += 16, at = at + 16 < n_shifts ? at + 16 : 0) {
        if (n - i < 16)
            memcpy(rest, ln + i, (n - i) * sizeof(float));
        v16 x = v16_load(n - i < 16 ? rest : ln + i);
        v16 y = v16_exp(v16_sub(x, v16_load(s->shift + at)));
        v16_store(e + i, v16_less_choose(x, endless, y, zero));
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

/* Falling keys have rising ranks. */
static uint32_t rank_falling(float key)
{
    uint32_t bits;
    key += 0.0f; /* -0 is 0 */
    memcpy(&bits, &key, sizeof bits);
    return bits & UINT32_C(0x80000000) ? bits : ~(bits | UINT32_C(0x80000000));
}

/* ln_key of all blocks: +Inf where an estimate is unknown. */
static void key_fill(struct winnow_selection *sel, const float *e, const double *total)
{
    uint32_t n_q = sel->n_q, n = sel->n_blocks;
    float by[WINNOW_GQA_MAX];

    for (uint32_t g = 0; g < n_q; g++)
        by[g] = total[g] > 0 ? (float)(1 / total[g]) : 0.0f;
    for (uint32_t b = 0; b < n; b += 16) {
        float key[16] = {0};
        uint32_t n_here = n - b < 16 ? n - b : 16;
        for (uint32_t i = 0; i < n_here; i++)
            for (size_t g = 0, at = (size_t)(b + i) * n_q; g < n_q; g++)
                key[i] += is_known(sel->ln_e[at + g]) ? e[at + g] * by[g] : INFINITY;
        v16_store(key, v16_log(v16_load(key)));
        memcpy(sel->ln_key + b, key, n_here * sizeof(float));
    }
}

static void key_sort(struct winnow_selection *sel, uint64_t *const key[2])
{
    uint32_t n = sel->n_blocks;

    for (uint32_t b = 0; b < n; b++)
        key[0][b] = (uint64_t)rank_falling(sel->ln_key[b]) << 32 | b;
    for (int pass = 0; pass < 4; pass++) {
        const uint64_t *from = key[pass % 2];
        uint64_t *to = key[(pass + 1) % 2];
        uint32_t first[257] = {0}; /* place of each digit's first */
        int shift = 32 + 8 * pass;
        for (uint32_t i = 0; i < n; i++)
            first[(from[i] >> shift & 255) + 1]++;
        for (uint32_t digit = 1; digit < 256; digit++)
            first[digit] += first[digit - 1];
        for (uint32_t i = 0; i < n; i++)
            to[first[from[i] >> shift & 255]++] = from[i];
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

/* M_g over ln_z and ln_e, and, with_ln_m, what was read. */
static void selection_largest(const struct winnow_selection *sel, bool with_ln_m, float *largest)
{
    uint32_t n_q = sel->n_q;

    memcpy(largest, sel->ln_z, n_q * sizeof(float));
    for (uint32_t b = 0; b < sel->n_blocks; b++)
        for (size_t g = 0, at = (size_t)b * n_q; g < n_q; g++) {
            if (is_known(sel->ln_e[at + g]) && sel->ln_e[at + g] > largest[g])
                largest[g] = sel->ln_e[at + g];
            if (with_ln_m && sel->selected[b] && sel->ln_m[at + g] > largest[g])
                largest[g] = sel->ln_m[at + g];
        }
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
    selection_largest(sel, false, largest);
    shift_init(&s, sel->n_q, largest);
    exp_shifted(&s, sel, sel->ln_e, s.e);
    for (uint32_t g = 0; g < sel->n_q; g++)
        total[g] = sum[g] = fixed_exp(sel->ln_z[g], largest[g]);
    for (uint32_t b = 0; b < sel->n_blocks; b++)
        add_block(sel, s.e, b, total);
    key_fill(sel, s.e, total);
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

/* Fills e and mixed too. */
static void tally_init(struct tally *tally, const struct winnow_selection *sel,
                       struct select_scratch *s)
{
    uint32_t n_q = sel->n_q;
    float largest[WINNOW_GQA_MAX];

    *tally = (struct tally){0};
    selection_largest(sel, true, largest);
    shift_init(s, n_q, largest);
    for (uint32_t b = 0; b < sel->n_blocks; b++) {
        const float *ln = sel->selected[b] ? sel->ln_m : sel->ln_e;
        memcpy(s->mixed + (size_t)b * n_q, ln + (size_t)b * n_q, n_q * sizeof(float));
        for (size_t g = 0, at = (size_t)b * n_q; g < n_q && !sel->selected[b]; g++)
            tally->has_unknown |= !is_known(sel->ln_e[at + g]);
    }
    exp_shifted(s, sel, s->mixed, s->mixed);
    exp_shifted(s, sel, sel->ln_e, s->e);
    for (uint32_t g = 0; g < n_q; g++)
        tally->read[g] = fixed_exp(sel->ln_z[g], largest[g]);
    for (uint32_t b = 0; b < sel->n_blocks; b++)
        add_block(sel, s->mixed, b, sel->selected[b] ? tally->read : tally->rest);
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
