/*
 * The dispatcher: the I/O thread's side of the store. Takes requests from the owner's ring, keeps
 * at most a window of operations in flight, checks what was read, answers. One method instance.
 *
 * Thread: I/O, but for what its comments say.
 */
#pragma once

#include <base/ring.h>
#include <storage/breaker.h>
#include <storage/queue.h>

struct winnow_flight;

struct winnow_dispatch {
    const struct winnow_io_method *method;
    void *io;
    struct winnow_ring *asks, *answers; /* of struct winnow_message; owned */
    void (*notify)(void *arg);
    void *notify_arg;
    bool answered; /* an empty ring of answers was filled since the last notify */

    struct winnow_queue queue;
    struct winnow_breaker breaker;
    uint32_t window;
    struct winnow_flight *flight;      /* [window] */
    struct iovec *parts;               /* [window][WINNOW_MERGE_PARTS_MAX]: the flights' */
    struct winnow_flight *free_flight; /* list */
    struct winnow_flight *ready;       /* list of those to hand to the method, first first */
    struct winnow_flight **ready_end;
    int64_t next_deadline_ns; /* no request is past its deadline before */
    uint32_t *file_idx;       /* [n_files_max] by file number; UINT32_MAX: not open */
    bool stopping;            /* submits nothing more */
    _Atomic uint32_t n_in_flight, n_in_flight_max; /* read by any */
};

/* Owner, before any thread runs. Takes the method instance unless it fails. -ENOMEM. */
int winnow_dispatch_init(struct winnow_dispatch *dispatch, const struct winnow_io_method *method,
                         void *io, uint32_t window, uint32_t n_requests_max, uint32_t n_files_max);
/* Closes the instance. -EBUSY: operations never completed; leave the dispatcher and their memory
 * alone for ever. */
int winnow_dispatch_close(struct winnow_dispatch *dispatch);
/* Owner, after close, or without an instance: frees the rest. */
void winnow_dispatch_finish(struct winnow_dispatch *dispatch);

/* Opens a data file for requests: the owner before any thread runs, else by message. -errno. */
int winnow_dispatch_file_open(struct winnow_dispatch *dispatch, uint32_t file_no);

/* Does what can be done now; returns when to be called again at the latest. */
int64_t winnow_dispatch_step(struct winnow_dispatch *dispatch, int64_t now_ns);
/* Begins nothing more; true once nothing is in flight. What waits is never answered. */
bool winnow_dispatch_drain(struct winnow_dispatch *dispatch, int64_t now_ns);
