// The grains of a segment stand in a run, and the runs in one array that is twice as large as all
// grains need: a new run is appended, and when the end is reached the live runs slide together.
// So a segment of any size is created without an allocation, at the price of a copy of a few
// thousand words every time as many grains as the disk has were handed out.
#include <base/alloc.h>
#include <base/assert.h>
#include <errno.h>
#include <stdbool.h>
#include <storage/grain.h>
#include <string.h>

enum { RUN_HEAD = 2, WORD_BITS = 64 };
static const uint32_t NO_RUN = UINT32_MAX;

static uint32_t n_grains_max(const struct winnow_grains *grains)
{
    return grains->n_files_max * grains->n_per_file;
}

static uint32_t n_words(const struct winnow_grains *grains)
{
    return (n_grains_max(grains) + WORD_BITS - 1) / WORD_BITS;
}

static bool bit_test(const uint64_t *bits, uint32_t grain)
{
    return bits[grain / WORD_BITS] >> grain % WORD_BITS & 1;
}

static void bit_set(uint64_t *bits, uint32_t grain)
{
    bits[grain / WORD_BITS] |= UINT64_C(1) << grain % WORD_BITS;
}

static void bit_clear(uint64_t *bits, uint32_t grain)
{
    bits[grain / WORD_BITS] &= ~(UINT64_C(1) << grain % WORD_BITS);
}

static void free_add(struct winnow_grains *grains, uint32_t grain)
{
    winnow_assert(!bit_test(grains->free_bits, grain));
    winnow_assert(!bit_test(grains->suspect_bits, grain));
    bit_set(grains->free_bits, grain);
    grains->n_free++;
}

int winnow_grains_init(struct winnow_grains *grains, uint32_t n_files_max, uint32_t n_per_file,
                       uint32_t n_segments_max)
{
    winnow_assert(n_files_max > 0);
    winnow_assert(n_per_file > 0);
    winnow_assert(n_per_file <= UINT32_MAX / n_files_max);
    *grains = (struct winnow_grains){
        .n_per_file = n_per_file,
        .n_files_max = n_files_max,
        .n_segments_max = n_segments_max,
        .run_max = 2 * (n_files_max * n_per_file + RUN_HEAD * n_segments_max)};
    grains->free_bits = winnow_alloc_array(n_words(grains), sizeof *grains->free_bits);
    grains->suspect_bits = winnow_alloc_array(n_words(grains), sizeof *grains->suspect_bits);
    grains->run = winnow_alloc_array(grains->run_max, sizeof *grains->run);
    grains->run_of = winnow_alloc_array(n_segments_max, sizeof *grains->run_of);
    if (!grains->free_bits || !grains->suspect_bits || !grains->run || !grains->run_of) {
        winnow_grains_finish(grains);
        return -ENOMEM;
    }
    memset(grains->run_of, 0xff, n_segments_max * sizeof *grains->run_of);
    return 0;
}

void winnow_grains_finish(struct winnow_grains *grains)
{
    winnow_alloc_free(grains->run_of);
    winnow_alloc_free(grains->run);
    winnow_alloc_free(grains->suspect_bits);
    winnow_alloc_free(grains->free_bits);
    *grains = (struct winnow_grains){0};
}

void winnow_grains_add_file(struct winnow_grains *grains, uint32_t file_no)
{
    winnow_assert(file_no < grains->n_files_max);
    for (uint32_t i = 0; i < grains->n_per_file; i++)
        free_add(grains, file_no * grains->n_per_file + i);
}

uint32_t winnow_grains_take(struct winnow_grains *grains)
{
    if (!grains->n_free)
        return UINT32_MAX;
    while (!grains->free_bits[grains->cursor])
        grains->cursor = (grains->cursor + 1) % n_words(grains);
    uint64_t *word = &grains->free_bits[grains->cursor];
    uint32_t bit = (uint32_t)__builtin_ctzll(*word);
    *word &= *word - 1;
    grains->n_free--;
    grains->n_used++;
    winnow_assert(grains->cursor * WORD_BITS + bit < n_grains_max(grains));
    return grains->cursor * WORD_BITS + bit;
}

void winnow_grains_give(struct winnow_grains *grains, uint32_t grain)
{
    winnow_assert(grain < n_grains_max(grains));
    winnow_assert(grains->n_used > 0);
    winnow_assert(!bit_test(grains->free_bits, grain));
    grains->n_used--;
    if (bit_test(grains->suspect_bits, grain))
        grains->n_bad++;
    else
        free_add(grains, grain);
}

void winnow_grains_suspect(struct winnow_grains *grains, uint32_t grain)
{
    winnow_assert(grain < n_grains_max(grains));
    bit_set(grains->suspect_bits, grain);
    if (bit_test(grains->free_bits, grain)) {
        winnow_assert(grains->n_free > 0);
        bit_clear(grains->free_bits, grain);
        grains->n_free--;
        grains->n_bad++;
    }
}

/* Slides the live runs to the front. */
static void runs_compact(struct winnow_grains *grains)
{
    uint32_t to = 0;
    for (uint32_t from = 0; from < grains->run_end;) {
        uint32_t segment_idx = grains->run[from], n_entries = RUN_HEAD + grains->run[from + 1];
        winnow_assert(segment_idx < grains->n_segments_max);
        winnow_assert(n_entries <= grains->run_end - from);
        bool live = grains->run_of[segment_idx] == from;
        if (live) {
            memmove(grains->run + to, grains->run + from, n_entries * sizeof *grains->run);
            grains->run_of[segment_idx] = to;
            to += n_entries;
        }
        from += n_entries;
    }
    grains->run_end = to;
}

int winnow_grains_take_run(struct winnow_grains *grains, uint32_t segment_idx, uint32_t n_grains)
{
    winnow_assert(segment_idx < grains->n_segments_max);
    winnow_assert(grains->run_of[segment_idx] == NO_RUN);
    if (n_grains > grains->n_free)
        return -ENOSPC;
    if (grains->run_max - grains->run_end < RUN_HEAD + n_grains)
        runs_compact(grains);
    winnow_assert(grains->run_max - grains->run_end >= RUN_HEAD + n_grains);
    uint32_t *run = grains->run + grains->run_end;
    run[0] = segment_idx;
    run[1] = n_grains;
    for (uint32_t i = 0; i < n_grains; i++)
        run[RUN_HEAD + i] = winnow_grains_take(grains);
    grains->run_of[segment_idx] = grains->run_end;
    grains->run_end += RUN_HEAD + n_grains;
    return 0;
}

void winnow_grains_give_run(struct winnow_grains *grains, uint32_t segment_idx)
{
    winnow_assert(segment_idx < grains->n_segments_max);
    winnow_assert(grains->run_of[segment_idx] != NO_RUN);
    const uint32_t *run = grains->run + grains->run_of[segment_idx];
    winnow_assert(run[0] == segment_idx);
    for (uint32_t i = 0; i < run[1]; i++)
        winnow_grains_give(grains, run[RUN_HEAD + i]);
    grains->run_of[segment_idx] = NO_RUN;
}

uint32_t winnow_grains_of(const struct winnow_grains *grains, uint32_t segment_idx, uint32_t i)
{
    winnow_assert(segment_idx < grains->n_segments_max);
    winnow_assert(grains->run_of[segment_idx] != NO_RUN);
    const uint32_t *run = grains->run + grains->run_of[segment_idx];
    winnow_assert(run[0] == segment_idx);
    winnow_assert(i < run[1]);
    return run[RUN_HEAD + i];
}
