/*
 * I/O methods: submit / poll / wait over {read, write, sync, allocate}, and the calls on names that
 * a store needs. io_uring, pread pool and simulated disk stand behind one table; storage/io.c
 * chooses by probing, unless the caller names one.
 *
 * Offsets, lengths and memory are multiples of 4,096 bytes (O_DIRECT on any drive). Memory of an
 * operation belongs to the method from submit until its completion is polled, whatever deadline
 * the caller has. Thread: one owner, but for `wake`.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum winnow_io_kind { WINNOW_IO_READ = 1, WINNOW_IO_WRITE, WINNOW_IO_SYNC, WINNOW_IO_ALLOCATE };

struct winnow_io_op {
    uint8_t kind;
    uint16_t slice_idx; /* of the registered arena, as told by `open`; UINT16_MAX: not registered */
    uint32_t file_idx;
    uint64_t offset_bytes;
    void *data;
    uint32_t n_bytes; /* ALLOCATE: in units of 4,096 */
    uint64_t tag;
};

struct winnow_io_done {
    uint64_t tag;
    int32_t result; /* bytes, or -errno */
};

struct winnow_io_open {
    const char *dir; /* data directory; exists */
    void *arena; /* read destinations and write sources lie here, or anywhere else unregistered */
    size_t arena_bytes;
    uint32_t n_ops_max; /* in flight at once */
    uint32_t n_files_max;
    int refuse_direct; /* buffered, for file systems without O_DIRECT */
};

/* Filled by `open`: what was chosen and what was refused, for the start line and `doctor`. */
struct winnow_io_facts {
    char method[16];
    char flags[128];  /* those in force, by name */
    char remedy[160]; /* what was refused, its errno and what to do; "" when nothing was */
    int direct;       /* O_DIRECT in force */
};

struct winnow_io_method {
    const char *name;
    int (*open)(const struct winnow_io_open *options, void *arg, void **ret_io,
                struct winnow_io_facts *facts);
    uint32_t (*submit)(void *io, const struct winnow_io_op *op,
                       uint32_t n_ops); /* taken, in order */
    uint32_t (*poll)(void *io, struct winnow_io_done *done, uint32_t n_done_max);
    int (*wait)(void *io, int64_t deadline_ns); /* 0: something to poll or woken; -ETIMEDOUT */
    void (*wake)(void *io);                     /* any thread */
    int (*close)(void *io);                     /* -EBUSY: operations in flight */

    int (*file_open)(void *io, const char *name, int create, uint32_t *ret_file_idx,
                     uint64_t *ret_bytes);
    int (*file_close)(void *io, uint32_t file_idx);
    int (*list)(void *io, void (*each)(void *arg, const char *name), void *arg);
    int (*rename)(void *io, const char *from, const char *to);
    int (*unlink)(void *io, const char *name);
    int (*dir_sync)(void *io);
};

extern const struct winnow_io_method winnow_io_uring; /* arg: NULL */
extern const struct winnow_io_method winnow_io_pread; /* arg: NULL */
extern const struct winnow_io_method winnow_io_sim;   /* arg: struct winnow_sim_disk * (io_sim.h) */
