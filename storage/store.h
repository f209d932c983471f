/*
 * The store: opaque blocks of immutable segments in preallocated data files under one hard byte
 * cap. A read returns verified bytes or an error, never unchecked bytes. It knows extents, not
 * tensors: a stored segment is n_layers x blocks_per_layer blocks of block_bytes.
 *
 *   block b = layer x blocks_per_layer + i lies in the segment's grain b / g at byte
 *   (b % g) x block_bytes, g = 2 MiB / block_bytes (floor): no block crosses a grain
 *
 * Threads: the owner (core) calls everything here but `step` and `sync_step`. winnow_store_step is
 * the body of the I/O thread, winnow_store_sync_step that of the sync thread (fallocate, fsync,
 * file calls); `start` runs both as real threads, the simulator calls them itself. Requests and
 * completions cross in bounded rings. See storage.md sections 2-6 for the protocol it follows:
 * merging, priorities, in-flight window, retries, deadlines.
 *
 * Durability: none yet. At open the store's own data files are free space.
 */
#pragma once

#include <base/latency.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <storage/io.h>

enum {
    WINNOW_GRAIN_BYTES = 2 << 20,
    WINNOW_PAGE_BYTES = 4096,
};

/* Strict priorities, most urgent first. */
enum winnow_io_priority {
    WINNOW_IO_DECODE,
    WINNOW_IO_EXACT,
    WINNOW_IO_READAHEAD,
    WINNOW_IO_SPILL,
    WINNOW_N_IO_PRIORITIES
};

struct winnow_store_options {
    const char *dir; /* created 0700 if missing; not writable by others, no symlink */
    uint64_t disk_cap_bytes;
    uint64_t data_file_bytes; /* 0: disk_cap / 16 within 64 MiB .. 1 GiB, a power of two */
    const char *io_method;    /* "auto", "io_uring", "pread"; ignored when method is set */
    const struct winnow_io_method *method; /* NULL: by io_method */
    void *method_arg;
    void *arena; /* registered once with io_uring; reads and writes from elsewhere work too */
    size_t arena_bytes;
    uint32_t n_requests_max; /* blocks read or writes outstanding at once */
    uint32_t n_segments_max;
    void (*notify)(void *arg); /* store threads: completions wait in poll (edge) */
    void *notify_arg;
    uint64_t seed; /* uuid of this store's life, in every block's sum */
};

struct winnow_store;
struct winnow_stored; /* a segment's place on disk */

/*
 * 0, or with *ret_store NULL and a line in text (what, value, limit, hint)
 *   -EBUSY    another daemon holds the lock; text names its pid
 *   -EACCES   directory foreign, writable by others, or reached through a symlink
 *   -ENOTSUP  the directory holds files of a newer format (SUPER) or of strangers: untouched
 *   -EINVAL   disk_cap below 2 data files, or a bad io_method
 *   -ENOSPC   the file system has less than the first data file
 *   -ETIMEDOUT  the disk did not answer within 10 s
 *   -ENOMEM -EIO -errno
 */
int winnow_store_open(const struct winnow_store_options *options, struct winnow_store **ret_store,
                      char text[256]);
int winnow_store_start(struct winnow_store *store); /* I/O and sync threads; -EAGAIN */
/* Drains for at most 10 s, stops the threads, closes. NULL is fine. 0, or
 *   -EBUSY  operations never completed: the store and the memory they were given (the arena) are the
 *           kernel's and must not be freed or reused while the process lives (without threads the
 *           call may be tried again) */
int winnow_store_close(struct winnow_store *store);

/*
 * Takes grains for a whole segment. block_crc [n_layers x blocks_per_layer] is the caller's memory
 * and belongs to the store until destroy.
 *   -EAGAIN  a data file is being allocated: poll, then try again
 *   -ENOSPC  the cap is reached (or writes are refused after errors: facts.degraded)
 */
int winnow_store_segment_create(struct winnow_store *store, uint32_t n_layers,
                                uint32_t blocks_per_layer, uint32_t block_bytes,
                                uint32_t *block_crc, struct winnow_stored **ret_stored);
/* Its grains are free again once the operations in flight on them have completed. Requests that are
 * outstanding still end with their done: -ECANCELED when they had not begun. block_crc is the
 * caller's again at once. */
void winnow_store_segment_destroy(struct winnow_store *store, struct winnow_stored *stored);

struct winnow_store_read {
    struct winnow_stored *stored;
    uint32_t block_idx;
    void *data; /* block_bytes; the caller's slot, invisible until done */
    uint64_t tag;
};

/* Asks for n blocks, all or none; -EAGAIN: more than n_requests_max would be outstanding. Blocks
 * adjacent on disk are merged, wherever they go in memory. deadline_ns WINNOW_NEVER_NS: none. */
int winnow_store_read(struct winnow_store *store, const struct winnow_store_read *read, uint32_t n,
                      enum winnow_io_priority priority, int64_t deadline_ns);

/*
 * Writes blocks [block_idx, + n_blocks) of one layer from contiguous memory, which stays the
 * store's until done. Sums are taken from it before the write. On done with result 0 the blocks may
 * be read. A write that fails is retried elsewhere once. -EAGAIN as above; -EIO: writes are refused after
 * errors (facts.degraded).
 */
int winnow_store_write(struct winnow_store *store, struct winnow_stored *stored, uint32_t block_idx,
                       uint32_t n_blocks, const void *data, uint64_t tag);

struct winnow_store_done {
    uint64_t tag;
    int32_t result;      /* 0, -ENODATA (bad sum or EIO after one retry), -ETIMEDOUT (late, or the
                            disk is known not to answer: facts.stuck), -EIO (write),
                            -ENOSPC (write), -ECANCELED (segment destroyed) */
    uint32_t disk_bytes; /* this request's share of what was read or written, retries too */
    bool held;           /* -ETIMEDOUT only: the kernel still owns `data`; a second done with the
                            same tag and held = false, result -ECANCELED gives it back */
};

/* Until it returns less than n_done_max: `notify` tells of the first completion alone. */
uint32_t winnow_store_poll(struct winnow_store *store, struct winnow_store_done *done,
                           uint32_t n_done_max);

/* Bodies of the two threads: do what can be done, return when to be called again at the latest.
 * For real threads, wait on the method; the simulator passes its own time. */
int64_t winnow_store_step(struct winnow_store *store, int64_t now_ns);
int64_t winnow_store_sync_step(struct winnow_store *store, int64_t now_ns);

struct winnow_store_facts {
    struct winnow_io_facts io;
    uint64_t disk_cap_bytes, allocated_bytes, used_bytes; /* used: grains of live segments */
    uint64_t bad_bytes; /* grains that refused a write: not used again */
    uint64_t data_file_bytes;
    uint64_t read_bytes[WINNOW_N_IO_PRIORITIES], written_bytes;
    uint64_t errors_crc, errors_io, retries, timeouts;
    uint32_t window, in_flight, in_flight_max;
    bool degraded; /* no more writes after repeated errors */
    bool stuck;    /* the disk does not answer: reads end with -ETIMEDOUT at once, writes wait */
};
void winnow_store_facts(struct winnow_store *store, struct winnow_store_facts *facts);
/* How long the disk had the reads of decode that it has answered. Borrowed, the owner's. */
const struct winnow_latency *winnow_store_latency(const struct winnow_store *store);
