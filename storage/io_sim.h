/*
 * The simulated disk: winnow_io_sim under the product's own store, with a virtual clock, one seed
 * and faults. One thread drives everything; a disk may have several instances open (the store's
 * I/O and sync sides), which share its files, its clock and its channels.
 *
 *   struct winnow_sim_disk *disk;
 *   struct winnow_sim_options shape = winnow_sim_defaults(seed);
 *   winnow_sim_disk_create(&shape, &disk);
 *   struct winnow_store_options options = {.dir = "sim", .method = &winnow_io_sim,
 *                                          .method_arg = disk, ...};
 *   winnow_store_open(&options, &store, text);              // no winnow_store_start
 *   winnow_sim_disk_fail(disk, WINNOW_IO_READ, 3, 1, WINNOW_SIM_EIO); // the third read from here
 *   winnow_store_read(store, ...);
 *   for (;;) {
 *       int64_t now_ns = winnow_sim_disk_now(disk);
 *       int64_t next_ns = winnow_store_step(store, now_ns);
 *       int64_t sync_ns = winnow_store_sync_step(store, now_ns);
 *       ... winnow_store_poll, and what the caller does at this time; step again if it asked ...
 *       ... the earliest of next_ns, sync_ns, winnow_sim_disk_next(disk) and other events ...
 *       winnow_sim_disk_now_set(disk, earliest_ns);
 *   }
 *
 * Time: an operation takes a free channel at submit, or the one that is free first, and holds it
 * for per_op_ns + n_bytes x ns_per_byte, give or take jitter (a share of it). It completes when
 * the clock has reached its end: not before, and in an order that jitter shuffles. `wait` moves the
 * clock itself; only winnow_store_open and winnow_store_close call it when there are no threads.
 *
 * Memory: a read's buffer is filled with 0xa5 from submit to completion, and a write's source is
 * read at completion: memory touched too early, or given up too early, shows as wrong bytes.
 * Alignment to 4,096 bytes of offset, length and memory is asserted.
 */
#pragma once

#include <storage/io.h>

enum winnow_sim_fault {
    WINNOW_SIM_EIO = 1,
    WINNOW_SIM_ENOSPC,
    WINNOW_SIM_EAGAIN,
    WINNOW_SIM_EINTR,
    WINNOW_SIM_SHORT, /* half of it, to 512 bytes */
    WINNOW_SIM_EMPTY, /* 0 bytes */
    WINNOW_SIM_LATE,  /* late_ns more */
    WINNOW_SIM_STUCK, /* until winnow_sim_disk_release */
    WINNOW_N_SIM_FAULTS
};

struct winnow_sim_options {
    uint64_t seed;
    uint32_t n_channels; /* operations served at once */
    int64_t per_op_ns, late_ns;
    double ns_per_byte;            /* of one channel */
    double jitter;                 /* share of an operation's time: [1 - jitter, 1 + jitter] */
    uint64_t capacity_bytes;       /* ALLOCATE beyond it: -ENOSPC */
    uint64_t file_bytes_max;       /* per file, reserved in memory as it is written */
    uint32_t n_files_max;          /* names */
    double p[WINNOW_N_SIM_FAULTS]; /* chance of each fault an operation */
};

struct winnow_sim_counts {
    uint64_t n_ops[WINNOW_IO_ALLOCATE + 1]; /* submitted, by kind */
    uint64_t n_bytes[WINNOW_IO_ALLOCATE + 1];
    uint64_t n_faults[WINNOW_N_SIM_FAULTS];
    uint32_t in_flight, in_flight_max; /* over all instances */
    uint64_t event_hash; /* of every submit and completion: equal for equal seed and calls */
};

struct winnow_sim_disk;

/* 32 channels, 80 us + 0.7 ns a byte, jitter 0.5, 4 GiB, 64 files of 1 GiB, no faults. */
struct winnow_sim_options winnow_sim_defaults(uint64_t seed);
int winnow_sim_disk_create(const struct winnow_sim_options *options,
                           struct winnow_sim_disk **ret_disk); /* -ENOMEM */
void winnow_sim_disk_destroy(struct winnow_sim_disk *disk);    /* no instance may be open */

int64_t winnow_sim_disk_now(const struct winnow_sim_disk *disk);
void winnow_sim_disk_now_set(struct winnow_sim_disk *disk, int64_t now_ns); /* never back */
int64_t winnow_sim_disk_next(const struct winnow_sim_disk *disk); /* next completion; or NEVER */

/* The n-th (1 = the next) operation of a kind (0: any) meets a fault; so does each later one while
 * n_times lasts. At most 16 scripts wait at once. */
void winnow_sim_disk_fail(struct winnow_sim_disk *disk, int kind, uint64_t nth, uint64_t n_times,
                          enum winnow_sim_fault fault);
void winnow_sim_disk_heal(struct winnow_sim_disk *disk);    /* forgets what `fail` was told */
void winnow_sim_disk_release(struct winnow_sim_disk *disk); /* stuck operations end in EIO */
/* Whoever had the disk open was given up: what it left in flight ends nowhere. */
void winnow_sim_disk_abandon(struct winnow_sim_disk *disk);

/* The medium itself, by file name. False: no such file or place. */
bool winnow_sim_disk_flip(struct winnow_sim_disk *disk, const char *name, uint64_t offset_bytes);
bool winnow_sim_disk_swap(struct winnow_sim_disk *disk, const char *name, uint64_t a_bytes,
                          uint64_t b_bytes, uint64_t n_bytes);
bool winnow_sim_disk_truncate(struct winnow_sim_disk *disk, const char *name, uint64_t n_bytes);
/* Borrowed bytes of a file, NULL when there is none; to find a block and flip it. */
const uint8_t *winnow_sim_disk_file(const struct winnow_sim_disk *disk, const char *name,
                                    uint64_t *ret_bytes);
/* A file that was there before the store came. */
void winnow_sim_disk_put(struct winnow_sim_disk *disk, const char *name, uint64_t n_bytes);

void winnow_sim_disk_counts(const struct winnow_sim_disk *disk, struct winnow_sim_counts *counts);
