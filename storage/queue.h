/*
 * The queue: which requests become the next operation. Strict priorities, adjacent reads merged,
 * writes kept out of the way of decode. Decides only; no I/O, no clock. Thread: I/O.
 */
#pragma once

#include <storage/request.h>

enum { WINNOW_MERGE_PARTS_MAX = 32 };

struct winnow_queue_list {
    struct winnow_io_request *head, *tail;
};

struct winnow_queue {
    struct winnow_queue_list list[WINNOW_N_IO_PRIORITIES];
    uint32_t n_readahead_max;       /* operations in flight at once: half the window */
    uint32_t n_readahead, n_writes; /* in flight */
    int64_t last_decode_ns;         /* when one was last taken */
    int64_t write_due_ns;           /* when the next write goes though decode reads are there */
};

void winnow_queue_init(struct winnow_queue *queue, uint32_t window);

/* Takes a batch of one priority: sorts it by place, appends it. */
void winnow_queue_add(struct winnow_queue *queue, struct winnow_io_request *batch);
/* Takes one request that shall be read again, alone and before all of its priority. */
void winnow_queue_add_first(struct winnow_queue *queue, struct winnow_io_request *request);

/* The requests of the next operation, adjacent in the file and in at most WINNOW_MERGE_PARTS_MAX
 * pieces of memory, linked by `next`; NULL: none may go. Counts the operation until winnow_queue_ended. */
struct winnow_io_request *winnow_queue_take(struct winnow_queue *queue, int64_t now_ns);
void winnow_queue_ended(struct winnow_queue *queue, uint32_t priority);

/* When `take` may give what it holds back, though nothing else happens. */
int64_t winnow_queue_next(const struct winnow_queue *queue);

/* Unlinks those that are past their deadline; returns them as a list. */
struct winnow_io_request *winnow_queue_take_expired(struct winnow_queue *queue, int64_t now_ns);
/* Unlinks all reads; returns them as a list. */
struct winnow_io_request *winnow_queue_take_reads(struct winnow_queue *queue);
