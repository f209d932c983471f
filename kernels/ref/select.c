/*
 * Select: the shortest list of blocks that reaches the asked mass for every query head.
 *
 * One list serves the G query heads that share a KV head, in the order of their summed shares; it
 * ends where the last of them is served. Rejected: the mean of the heads (2.9 % of blocks instead
 * of 5.05, but success 72 % instead of 88) and the union of a list a head (5.3 %).
 *
 * All sums are u64 fixed point, so no order of adding, number of threads or width of a vector can
 * move the place where a prefix ends.
 */
#include <base/assert.h>
#include <kernels/ref/ref.h>
#include <string.h>

uint64_t winnow_ref_fixed(float ln_x, float ln_max)
{
    double x = (double)ln_x - (double)ln_max;

    if (!(x >= -80) || !winnow_ref_is_known(ln_x))
        return 0;
    return x > 16 ? UINT64_MAX : (uint64_t)llrint(exp(x) * 0x1p40);
}

void winnow_ref_largest(const struct winnow_selection *sel, bool with_ln_m, float *largest)
{
    for (uint32_t g = 0; g < sel->n_q; g++) {
        largest[g] = sel->ln_z[g];
        for (uint32_t b = 0; b < sel->n_blocks; b++) {
            float ln_e = sel->ln_e[(size_t)b * sel->n_q + g];
            if (winnow_ref_is_known(ln_e))
                largest[g] = fmaxf(largest[g], ln_e);
            if (with_ln_m && sel->selected[b])
                largest[g] = fmaxf(largest[g], sel->ln_m[(size_t)b * sel->n_q + g]);
        }
    }
}

static bool block_is_known(const struct winnow_selection *sel, uint32_t b)
{
    for (uint32_t g = 0; g < sel->n_q; g++)
        if (!winnow_ref_is_known(sel->ln_e[(size_t)b * sel->n_q + g]))
            return false;
    return true;
}

/* T_g = exp(largest) x sum, kept apart: at huge logits fp32 has no room for ln sum beside them. */
struct total {
    float largest[WINNOW_GQA_MAX], ln_sum[WINNOW_GQA_MAX];
};

static void total_init(struct total *total, const struct winnow_selection *sel)
{
    winnow_ref_largest(sel, false, total->largest);
    for (uint32_t g = 0; g < sel->n_q; g++) {
        uint64_t sum = winnow_ref_fixed(sel->ln_z[g], total->largest[g]);
        for (uint32_t b = 0; b < sel->n_blocks; b++) {
            float ln_e = sel->ln_e[(size_t)b * sel->n_q + g];
            sum = winnow_ref_fixed_add(sum, winnow_ref_fixed(ln_e, total->largest[g]));
        }
        total->ln_sum[g] = (float)log((double)sum * 0x1p-40);
    }
}

static float block_key(const struct winnow_selection *sel, uint32_t b, const struct total *total)
{
    float sum = 0;

    if (!block_is_known(sel, b))
        return INFINITY;
    for (uint32_t g = 0; g < sel->n_q; g++) {
        float ln_e = sel->ln_e[(size_t)b * sel->n_q + g];
        if (ln_e > -INFINITY)
            sum += winnow_ref_exp(ln_e - total->largest[g] - total->ln_sum[g]);
    }
    return logf(sum);
}

void winnow_ref_key_sort(struct winnow_selection *sel, const uint8_t *class, void *scratch)
{
    struct total total;
    uint64_t *key = scratch;
    winnow_assert(sel->n_blocks < UINT32_C(1) << 28);
    winnow_assert((uintptr_t)scratch % _Alignof(uint64_t) == 0);

    /* class, then the key falling, then the number: 4, 32 and 28 bits */
    total_init(&total, sel);
    for (uint32_t b = 0; b < sel->n_blocks; b++) {
        sel->ln_key[b] = block_key(sel, b, &total);
        key[b] = (uint64_t)(class ? class[b] : 0) << 60 |
                 (uint64_t)(uint32_t)~winnow_ref_rank(sel->ln_key[b]) << 28 | b;
    }
    winnow_ref_sort(key, sel->n_blocks);
    for (uint32_t i = 0; i < sel->n_blocks; i++)
        sel->block_idx[i] = (uint32_t)key[i] & 0x0fffffff;
}

struct reach {
    uint64_t sum[WINNOW_GQA_MAX], total[WINNOW_GQA_MAX];
    float largest[WINNOW_GQA_MAX];
};

static bool reached(const struct winnow_selection *sel, const struct reach *reach, double mass)
{
    for (uint32_t g = 0; g < sel->n_q; g++)
        if ((double)reach->sum[g] < mass * (double)reach->total[g])
            return false;
    return true;
}

static void reach_add(const struct winnow_selection *sel, struct reach *reach, uint64_t *sum,
                      uint32_t b)
{
    for (uint32_t g = 0; g < sel->n_q; g++) {
        float ln_e = sel->ln_e[(size_t)b * sel->n_q + g];
        sum[g] = winnow_ref_fixed_add(sum[g], winnow_ref_fixed(ln_e, reach->largest[g]));
    }
}

/* How many of block_idx, from n on, it takes until every query head holds the mass. */
static uint32_t prefix(const struct winnow_selection *sel, struct reach *reach, uint32_t n,
                       double mass)
{
    while (n < sel->n_blocks &&
           (!block_is_known(sel, sel->block_idx[n]) || !reached(sel, reach, mass)))
        reach_add(sel, reach, reach->sum, sel->block_idx[n++]);
    return n;
}

static void select_all(struct winnow_selection *sel)
{
    for (uint32_t b = 0; b < sel->n_blocks; b++) {
        sel->block_idx[b] = b;
        sel->ln_key[b] = 0;
        sel->selected[b] = b < sel->n_blocks_max;
    }
    sel->n_selected = sel->n_blocks < sel->n_blocks_max ? sel->n_blocks : sel->n_blocks_max;
    sel->n_reserve = 0;
}

void winnow_ref_select(uint32_t policy, struct winnow_selection *sel, void *scratch)
{
    struct reach reach = {0};
    winnow_assert(sel->n_q > 0);
    winnow_assert(sel->n_q <= WINNOW_GQA_MAX);

    if (policy == WINNOW_POLICY_EXACT) {
        select_all(sel);
        return;
    }
    if (policy == WINNOW_POLICY_TACTIC) {
        winnow_ref_tactic_select(sel, scratch);
        return;
    }
    winnow_ref_key_sort(sel, NULL, scratch);
    winnow_ref_largest(sel, false, reach.largest);
    for (uint32_t g = 0; g < sel->n_q; g++)
        reach.total[g] = reach.sum[g] = winnow_ref_fixed(sel->ln_z[g], reach.largest[g]);
    for (uint32_t b = 0; b < sel->n_blocks; b++)
        reach_add(sel, &reach, reach.total, b);

    double mass = (double)sel->mass;
    winnow_assert(mass > 0);
    winnow_assert(mass < 1);
    uint32_t n = prefix(sel, &reach, 0, mass);
    uint32_t n_with_reserve = prefix(sel, &reach, n, mass + (1 - mass) / 2);
    winnow_assert(n <= n_with_reserve);
    winnow_assert(n_with_reserve <= sel->n_blocks);
    sel->n_selected = n < sel->n_blocks_max ? n : sel->n_blocks_max;
    sel->n_reserve = n_with_reserve - sel->n_selected;
    memset(sel->selected, 0, sel->n_blocks);
    for (uint32_t i = 0; i < sel->n_selected; i++)
        sel->selected[sel->block_idx[i]] = 1;
}
