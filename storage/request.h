/*
 * A request: one block to read, or one piece to write, and its way through the two sides.
 *
 *   free --read, write--> asked --> queued --> in an op --> answered --poll--> free
 *    owner                 ring      I/O thread             ring               owner
 *
 * Whoever holds it links it through `next`. The owner fills the first part before it asks, the
 * I/O side the second before it answers; the rings order the two.
 */
#pragma once

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <storage/store.h>

static_assert(WINNOW_N_IO_PRIORITIES <= UINT8_MAX, "a request holds one in a byte");

struct winnow_io_request {
    struct winnow_io_request *next;
    struct winnow_stored *stored;    /* the owner's */
    struct winnow_io_request *whole; /* of a piece of a write: the owner's count of pieces */
    const _Atomic bool *dropped;     /* set by the owner: not yet submitted requests may end */
    uint64_t tag;
    uint8_t *data;
    uint64_t offset_bytes; /* in its file */
    uint32_t file_no, n_bytes;
    uint32_t block_idx, n_blocks;
    uint32_t sum_seed, sum; /* of a read: begun with its place, expected of its bytes */
    int64_t deadline_ns;
    uint8_t kind, priority;
    bool moved; /* of a piece: this is its second place */

    uint32_t n_pieces; /* of a whole, three of the owner's: pieces not yet done, their sums */
    uint32_t whole_disk_bytes;
    int32_t whole_result;

    int64_t begun_ns, done_ns; /* with the disk from, to */
    int32_t result;
    uint32_t disk_bytes, n_retries, n_bad_sums, n_io_errors;
    bool timed_out, alone;
};

enum winnow_message_kind {
    WINNOW_MESSAGE_REQUESTS = 1, /* to I/O: a list to read or write */
    WINNOW_MESSAGE_FILE,         /* to sync: allocate; to I/O: open; back: result */
    WINNOW_MESSAGE_DONE,         /* back: the request is the owner's again */
    WINNOW_MESSAGE_LATE,         /* back: past its deadline, the kernel holds its memory still */
};

struct winnow_message {
    uint32_t kind, file_no;
    int32_t result;
    struct winnow_io_request *request;
};
