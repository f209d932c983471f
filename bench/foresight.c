/*
 * bench-foresight: how many of the blocks that a step misses in the device's cache are known before
 * its selection ends, on real attention. What is known can cross the link while the index is
 * scanned, when the link would be idle.
 *
 * Cache: least recently used of a share of the head's blocks. Blocks fetched early lie beside it
 * until the step ends; those selected then enter it as all selected do. Ways to know:
 *
 *   scan      key of this step's estimates over the last step's totals, above its threshold + m nat
 *   reserve   what stood next in line last step, up to mass P + (1 - P) / 2
 *   in cache  as scan + .25, but blocks fetched early take slots of the cache, those unused for
 *             longest, before selection, and leave first where they were not selected
 *
 * Figures are in % of the blocks selected: found in the cache; fetched early and selected; fetched
 * after selection; fetched early in vain.
 */
#include "trace.h"

#include <base/alloc.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_BLOCKS_MAX = 512, N_WARM = 32, N_SHARES = 2, N_MASSES = 3, N_WAYS = 8 };
static const float masses[N_MASSES] = {0.8f, 0.9f, 0.95f};
static const float cache_shares[N_SHARES] = {0.05f, 0.10f};
static const struct {
    const char *name;
    double margin; /* of the scan; NAN: it fetches nothing */
    bool with_reserve, in_cache;
} ways[N_WAYS] = {{"nothing", NAN, false, false},   {"scan - .5", -0.5, false, false},
                  {"scan + 0", 0, false, false},    {"scan + .25", 0.25, false, false},
                  {"scan + .5", 0.5, false, false}, {"scan + 1", 1, false, false},
                  {"reserve", NAN, true, false},    {"in cache", 0.25, false, true}};

struct tally {
    double n_selected, n_hits, n_early, n_late, n_vain;
};

struct key {
    double key;
    uint32_t block;
};

/* Of one mass. */
struct past {
    uint32_t n_steps;
    double ln_total[WINNOW_GQA_MAX], threshold;    /* of the last step */
    uint8_t reserve[N_BLOCKS_MAX];                 /* of the last step */
    uint32_t used[N_SHARES][N_WAYS][N_BLOCKS_MAX]; /* 0: not cached; last use: step + 2; 1: none */
};

struct foresight {
    struct past past[N_MASSES];
    struct tally tally[N_MASSES][N_SHARES][N_WAYS];
};

static double ln_estimate(const struct winnow_selection *sel, uint32_t b, uint32_t g)
{
    return (double)sel->ln_e[(size_t)b * sel->n_q + g];
}

static double key_over(const struct winnow_selection *sel, const double *ln_total, uint32_t b)
{
    double sum = 0;
    for (uint32_t g = 0; g < sel->n_q; g++)
        sum += exp(ln_estimate(sel, b, g) - ln_total[g]);
    return log(sum);
}

/* To n_slots blocks, those used longest ago first, none of kept. */
static void cache_trim(uint32_t *used, const bool *kept, uint32_t n_blocks, uint32_t n_slots)
{
    uint32_t n = 0;
    for (uint32_t b = 0; b < n_blocks; b++)
        n += used[b] != 0;
    for (; n > n_slots; n--) {
        uint32_t oldest = n_blocks;
        for (uint32_t b = 0; b < n_blocks; b++)
            if (used[b] && !kept[b] && (oldest == n_blocks || used[b] < used[oldest]))
                oldest = b;
        if (oldest == n_blocks)
            return;
        used[oldest] = 0;
    }
}

static void step(const struct past *past, uint32_t way, uint32_t n_slots, uint32_t *used,
                 const struct winnow_selection *sel, struct tally *tally)
{
    struct tally t = {0};
    bool early[N_BLOCKS_MAX] = {0}, none[N_BLOCKS_MAX] = {0};
    uint32_t n_early = 0;
    for (uint32_t b = 0; b < sel->n_blocks; b++) {
        bool is_known = (ways[way].with_reserve && past->reserve[b]) ||
                        key_over(sel, past->ln_total, b) >= past->threshold + ways[way].margin;
        early[b] = is_known && !used[b] && (!ways[way].in_cache || n_early < n_slots);
        n_early += early[b];
        if (early[b] && ways[way].in_cache)
            used[b] = 1;
    }
    if (ways[way].in_cache)
        cache_trim(used, early, sel->n_blocks, n_slots);
    for (uint32_t b = 0; b < sel->n_blocks; b++) {
        bool is_selected = sel->selected[b] != 0, is_cached = used[b] && !early[b];
        t.n_selected += is_selected;
        t.n_hits += is_selected && is_cached;
        t.n_early += is_selected && early[b];
        t.n_late += is_selected && !is_cached && !early[b];
        t.n_vain += !is_selected && early[b];
        if (is_selected)
            used[b] = past->n_steps + 2;
    }
    cache_trim(used, none, sel->n_blocks, n_slots);
    if (past->n_steps < N_WARM)
        return;
    tally->n_selected += t.n_selected;
    tally->n_hits += t.n_hits;
    tally->n_early += t.n_early;
    tally->n_late += t.n_late;
    tally->n_vain += t.n_vain;
}

static int descending(const void *a, const void *b)
{
    const struct key *x = a, *y = b;
    return x->key < y->key ? 1 : x->key > y->key ? -1 : 0;
}

static double mass_least(const struct winnow_selection *sel, const double *mass)
{
    double least = 1;
    for (uint32_t g = 0; g < sel->n_q; g++)
        least = fmin(least, mass[g]);
    return least;
}

/* What the next step knows of this one. */
static void past_update(struct past *past, const struct winnow_selection *sel)
{
    struct key row[N_BLOCKS_MAX];
    double mass[WINNOW_GQA_MAX];
    for (uint32_t g = 0; g < sel->n_q; g++) {
        double largest = (double)sel->ln_z[g];
        for (uint32_t b = 0; b < sel->n_blocks; b++)
            largest = fmax(largest, ln_estimate(sel, b, g));
        double sum = exp((double)sel->ln_z[g] - largest);
        for (uint32_t b = 0; b < sel->n_blocks; b++)
            sum += exp(ln_estimate(sel, b, g) - largest);
        past->ln_total[g] = largest + log(sum);
        mass[g] = exp((double)sel->ln_z[g] - past->ln_total[g]);
    }
    past->threshold = INFINITY;
    for (uint32_t b = 0; b < sel->n_blocks; b++) {
        row[b] = (struct key){key_over(sel, past->ln_total, b), b};
        if (sel->selected[b])
            past->threshold = fmin(past->threshold, row[b].key);
    }
    qsort(row, sel->n_blocks, sizeof *row, descending);
    memset(past->reserve, 0, sizeof past->reserve);
    for (uint32_t i = 0; i < sel->n_blocks; i++) {
        if (mass_least(sel, mass) >= ((double)sel->mass + 1) / 2)
            break;
        past->reserve[row[i].block] = 1;
        for (uint32_t g = 0; g < sel->n_q; g++)
            mass[g] += exp(ln_estimate(sel, row[i].block, g) - past->ln_total[g]);
    }
}

static void visit(void *arg, uint32_t case_idx, const struct winnow_selection *sel)
{
    struct foresight *foresight = arg;
    struct past *past = &foresight->past[case_idx];
    for (uint32_t s = 0; s < N_SHARES; s++)
        for (uint32_t w = 0; w < N_WAYS; w++)
            step(past, w, (uint32_t)(cache_shares[s] * (float)sel->n_blocks), past->used[s][w], sel,
                 &foresight->tally[case_idx][s][w]);
    past_update(past, sel);
    past->n_steps++;
}

static void print(const char *name, const struct tally tally[N_MASSES][N_SHARES][N_WAYS])
{
    printf("%s\n  P     cache  early by     cached  early   late    vain\n", name);
    for (int m = 0; m < N_MASSES; m++)
        for (int s = 0; s < N_SHARES; s++)
            for (int w = 0; w < N_WAYS; w++) {
                const struct tally *t = &tally[m][s][w];
                double percent = 100 / t->n_selected;
                printf("  %.2f  %2.0f %%   %-10s  %6.1f %6.1f %6.1f  %6.1f\n", (double)masses[m],
                       100 * (double)cache_shares[s], ways[w].name, t->n_hits * percent,
                       t->n_early * percent, t->n_late * percent, t->n_vain * percent);
            }
}

/* Adds the head's tally to the sum. 0 or -errno. */
static int run_head(const char *path, struct tally sum[N_MASSES][N_SHARES][N_WAYS])
{
    struct winnow_trace_case cases[N_MASSES];
    struct winnow_trace_result result[N_MASSES];
    struct winnow_trace trace;
    struct foresight *foresight = winnow_alloc(sizeof *foresight);
    int rc = foresight ? winnow_trace_open(path, &trace) : -ENOMEM;
    if (rc < 0) {
        winnow_alloc_free(foresight);
        return rc;
    }
    struct winnow_trace_options options = {.visit = visit, .visit_arg = foresight};
    for (int m = 0; m < N_MASSES; m++) {
        cases[m] = (struct winnow_trace_case){WINNOW_POLICY_CODES, masses[m]};
        foresight->past[m].threshold = INFINITY;
    }
    rc = winnow_trace_run(&trace, winnow_kernels_find(NULL), &options, N_MASSES, cases, result);
    if (rc == 0)
        print(trace.name, foresight->tally);
    for (int i = 0; i < N_MASSES * N_SHARES * N_WAYS && rc == 0; i++) {
        struct tally *to = &sum[0][0][0] + i, *of = &foresight->tally[0][0][0] + i;
        to->n_selected += of->n_selected;
        to->n_hits += of->n_hits;
        to->n_early += of->n_early;
        to->n_late += of->n_late;
        to->n_vain += of->n_vain;
    }
    winnow_trace_close(&trace);
    winnow_alloc_free(foresight);
    return rc;
}

int main(int argc, char **argv)
{
    static struct tally sum[N_MASSES][N_SHARES][N_WAYS];
    struct winnow_trace_list list;
    if (argc != 2) {
        fprintf(stderr, "usage: bench-foresight DIR   (of traces: tests/golden/traces)\n");
        return 2;
    }
    int rc = winnow_trace_list_open(argv[1], &list);
    if (rc < 0) {
        fprintf(stderr, "bench-foresight: %s: no traces: %s\n", argv[1], strerror(-rc));
        return 2;
    }
    for (uint32_t i = 0; i < list.n_paths && rc == 0; i++)
        rc = run_head(list.path[i], sum);
    winnow_trace_list_close(&list);
    if (rc < 0)
        fprintf(stderr, "bench-foresight: %s\n", strerror(-rc));
    else
        print("all heads", sum);
    return rc < 0;
}
