/*
 * Grains: which 2 MiB pieces of the data files are free, and which stored segment has which.
 * Grain number = file number x grains per file + place in the file. Thread: owner.
 *
 *   FREE --take--> USED --give--> FREE
 *   FREE --suspect--> BAD;  USED --suspect, give--> BAD, for the life of the store
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct winnow_grains {
    uint32_t n_per_file, n_files_max;
    uint32_t n_free, n_used, n_bad;
    uint32_t cursor;     /* next-fit: the word where the last search ended */
    uint64_t *free_bits; /* [words of n_files_max x n_per_file] */
    uint64_t *suspect_bits;

    /* Runs, each {segment index, n_grains, grain[n_grains]}, appended; see grain.c. */
    uint32_t *run;
    uint32_t run_end, run_max;
    uint32_t *run_of; /* [n_segments_max] place of a segment's run; UINT32_MAX: none */
    uint32_t n_segments_max;
};

int winnow_grains_init(struct winnow_grains *grains, uint32_t n_files_max, uint32_t n_per_file,
                       uint32_t n_segments_max); /* -ENOMEM */
void winnow_grains_finish(struct winnow_grains *grains);

void winnow_grains_add_file(struct winnow_grains *grains, uint32_t file_no);

/* One grain, UINT32_MAX: none is free. */
uint32_t winnow_grains_take(struct winnow_grains *grains);
void winnow_grains_give(struct winnow_grains *grains, uint32_t grain);
/* Bytes of this grain came back wrong, or would not be written: it is not taken again. */
void winnow_grains_suspect(struct winnow_grains *grains, uint32_t grain);

/* n grains for a segment, neighbours where they are free, all or none. -ENOSPC. */
int winnow_grains_take_run(struct winnow_grains *grains, uint32_t segment_idx, uint32_t n_grains);
/* Gives all of them. */
void winnow_grains_give_run(struct winnow_grains *grains, uint32_t segment_idx);
uint32_t winnow_grains_of(const struct winnow_grains *grains, uint32_t segment_idx, uint32_t i);
