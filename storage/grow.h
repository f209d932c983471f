/*
 * Growing: the sync thread's side of the store. Makes data files, one at a time: fallocate, fsync
 * of the file, then of the directory; only then may it be written. A file that cannot be made
 * leaves nothing behind.
 *
 * Thread: sync, but for what its comments say.
 */
#pragma once

#include <base/ring.h>
#include <storage/request.h>

enum winnow_grow_state { WINNOW_GROW_IDLE, WINNOW_GROW_ALLOCATING, WINNOW_GROW_SYNCING };

struct winnow_grow {
    const struct winnow_io_method *method;
    void *io;                           /* an instance of one file and one operation */
    struct winnow_ring *asks, *answers; /* of struct winnow_message; owned */
    void (*notify)(void *arg);
    void *notify_arg;
    int dir_fd; /* where the file system's free space is asked for; -1: not */
    uint64_t file_bytes;

    enum winnow_grow_state state;
    uint32_t file_no, file_idx, n_again;
};

/* Owner, before any thread runs. Takes the instance unless it fails. -ENOMEM. */
int winnow_grow_init(struct winnow_grow *grow, const struct winnow_io_method *method, void *io,
                     int dir_fd, uint64_t file_bytes);
/* Owner, after the threads ended. Waits for a file under way, 10 s at most; -EBUSY: it never came,
 * and all is left alone. */
int winnow_grow_finish(struct winnow_grow *grow);

/* Does what can be done now; returns when to be called again at the latest. */
int64_t winnow_grow_step(struct winnow_grow *grow, int64_t now_ns);
/* Owner, before any thread runs: makes one file and waits for it, 10 s at most. -ENOSPC, -EIO,
 * -ETIMEDOUT, -errno. */
int winnow_grow_now(struct winnow_grow *grow, uint32_t file_no);
