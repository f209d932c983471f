/*
 * The inside of the store, shared by its files of the owner's side: store.c (open, threads,
 * close), segment.c (places on disk), transfer.c (reads, writes, their ends). Thread: owner.
 */
#pragma once

#include <assert.h>
#include <base/latency.h>
#include <base/pool.h>
#include <pthread.h>
#include <storage/dir.h>
#include <storage/dispatch.h>
#include <storage/grain.h>
#include <storage/grow.h>

enum {
    WINNOW_PIECE_BYTES_MAX = 1 << 20, /* of a write in flight */
    WINNOW_N_MOVES_MAX = 64,
    WINNOW_N_WRITE_ERRORS = 3, /* within 60 s: no more writes */
    WINNOW_N_READ_ERRORS = 16, /* of a file within 60 s: it takes no more grains */
};

static_assert(WINNOW_GRAIN_BYTES % WINNOW_PAGE_BYTES == 0, "a grain begins at a page");
static_assert(WINNOW_PIECE_BYTES_MAX % WINNOW_PAGE_BYTES == 0, "so does a piece");
static_assert((int)WINNOW_PIECE_BYTES_MAX <= (int)WINNOW_GRAIN_BYTES, "a piece lies in one grain");

struct winnow_stored {
    uint32_t segment_idx, n_blocks, blocks_per_layer, block_bytes, blocks_per_grain;
    uint32_t sum_seed;   /* of uuid and the segment's id */
    uint32_t *block_crc; /* [n_blocks], the caller's until destroy */
    uint32_t n_requests; /* outstanding */
    uint32_t n_moves;
    _Atomic bool dropped; /* destroyed; the I/O thread reads it */
};

struct winnow_data_file {
    bool made;
    uint32_t n_errors;      /* reads that found no right bytes, since */
    int64_t errors_from_ns; /* this time */
};

/* Blocks that were written elsewhere after an error: the same bytes of another grain. */
struct winnow_move {
    const struct winnow_stored *stored;
    uint32_t block_idx, n_blocks, to_grain;
};

struct winnow_store {
    struct winnow_dir dir;
    struct winnow_dispatch dispatch;
    struct winnow_grow grow;
    struct winnow_grains grains;
    struct winnow_pool *stored; /* of struct winnow_stored */
    struct winnow_io_request *request, *free_request;
    uint32_t n_requests_max, n_free_requests;
    struct winnow_move move[WINNOW_N_MOVES_MAX];
    uint32_t n_moves;

    uint64_t disk_cap_bytes, data_file_bytes;
    uint32_t n_files, n_files_max;
    struct winnow_data_file *file; /* [n_files_max] */
    bool growing;
    int grow_error; /* of the last try; 0: it worked */

    uint8_t uuid[16];
    uint64_t n_segments_made;
    int64_t write_error_ns[WINNOW_N_WRITE_ERRORS]; /* the last ones, oldest first */
    struct winnow_store_facts facts;
    struct winnow_latency reads;

    pthread_t io_thread, sync_thread;
    pthread_mutex_t stop_lock; /* held from setting stop to the end of the wake-ups */
    _Atomic bool stop;
    bool started, io_leaked;
    struct winnow_store *next_left; /* list of those left to the kernel */
};

/* Where a block is. */
struct winnow_place {
    uint32_t file_no;
    uint64_t offset_bytes;
};
struct winnow_place winnow_stored_place(const struct winnow_store *store,
                                        const struct winnow_stored *stored, uint32_t block_idx);
/* Gives blocks of one grain a second place. -ENOSPC: no grain, or too many moves already. */
int winnow_stored_move(struct winnow_store *store, struct winnow_stored *stored, uint32_t block_idx,
                       uint32_t n_blocks);
/* Ends a request's claim; the last one of a destroyed segment frees its grains. */
void winnow_stored_release(struct winnow_store *store, struct winnow_stored *stored);
/* Asks for one more data file while less than two files are free and the cap allows it. */
void winnow_store_grow(struct winnow_store *store);
/* The sync thread made a file, or could not: the I/O side opens it next. */
void winnow_store_file_made(struct winnow_store *store, uint32_t file_no, int rc);
/* Nothing is written to the file again. */
void winnow_store_file_suspect(struct winnow_store *store, uint32_t file_no);
/* The I/O side opened it, or could not. */
void winnow_store_file_end(struct winnow_store *store, uint32_t file_no, int rc);
/* The file is allocated and open on the I/O side: its grains are free. */
void winnow_store_file_add(struct winnow_store *store, uint32_t file_no);
