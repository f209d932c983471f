/*
 * I/O methods: submit / poll / wait over {read, write, sync, allocate}, and the calls on names that
 * a store needs. io_uring, pread pool and simulated disk stand behind one table; storage/io.c
 * chooses by probing, unless the caller names one.
 *
 * Offsets, lengths and memory are multiples of 4,096 bytes (O_DIRECT on any drive). Memory of an
 * operation belongs to the method from submit until its completion is polled, whatever deadline
 * the caller has. Thread: one at a time for the calls on names before the first submit; from then
 * on the submitting one alone, `close` included; `wake`: any.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum winnow_io_kind { WINNOW_IO_READ = 1, WINNOW_IO_WRITE, WINNOW_IO_SYNC, WINNOW_IO_ALLOCATE };

struct winnow_io_op {
    uint8_t kind;
    uint32_t file_idx;
    uint32_t n_bytes; /* ALLOCATE: in units of 4,096 */
    uint64_t offset_bytes;
    void *data;
    /* READ with data NULL: filled in this order, n_bytes together; the caller's until polled */
    const struct iovec *parts;
    uint32_t n_parts;
    uint64_t tag; /* below 2^63 */
};

struct winnow_io_done {
    uint64_t tag;
    int32_t result; /* bytes (may be short), 0 of SYNC and ALLOCATE, or -errno */
};

struct winnow_io_open {
    const char *dir; /* data directory; exists */
    void *arena; /* read destinations and write sources lie here, or anywhere else unregistered */
    size_t arena_bytes;
    uint32_t n_ops_max; /* in flight at once */
    uint32_t n_files_max;
    bool refuse_direct; /* buffered, for file systems without O_DIRECT */
};

/* Filled by `open`: what was chosen and what was refused, for the start line and `doctor`. */
struct winnow_io_facts {
    char method[16];
    char flags[128];  /* those in force, by name, blanks between them */
    char remedy[160]; /* what was refused, its errno and what to do; "" when nothing was */
    int direct;       /* O_DIRECT in force */
};

/*
 * open       0, or -errno of what refused (-ENOSYS, -EPERM, -ENOMEM, -ENOENT ...); *ret_io untouched
 * submit     takes the first ops that have room, in order; returns how many
 * poll       returns how many completions were written to done, in any order
 * wait       0: something to poll, or woken since the last poll; -ETIMEDOUT: neither by then
 * close      0; -EBUSY: operations are in flight, poll and try again (the object stays whole)
 * file_open  0 with an index for ops and the size in bytes; -ENOENT, -ENFILE: no index left, -errno
 * list       calls each for every name but "." and ".."; 0 or -errno
 */
struct winnow_io_method {
    const char *name;
    bool virtual_dir; /* `dir` is no place in the file system: nothing to check or to lock there */
    int (*open)(const struct winnow_io_open *options, void *arg, void **ret_io,
                struct winnow_io_facts *facts);
    uint32_t (*submit)(void *io, const struct winnow_io_op *op, uint32_t n_ops);
    uint32_t (*poll)(void *io, struct winnow_io_done *done, uint32_t n_done_max);
    int (*wait)(void *io, int64_t deadline_ns);
    int64_t (*now)(void *io); /* the clock that `wait` obeys */
    void (*wake)(void *io);
    int (*close)(void *io);

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

/*
 * Chooses a method for a directory by writing and reading a page there: io_uring where that works,
 * else the pread pool; buffered where O_DIRECT is refused. name: "auto", or the one to insist on.
 * 0 with remedy as in winnow_io_facts ("" when nothing was refused), or with the cause in remedy
 *   -EINVAL   unknown name, or the named method is refused
 *   -errno    of the directory
 */
int winnow_io_choose(const char *name, const char *dir, const struct winnow_io_method **ret_method,
                     bool *ret_refuse_direct, char remedy[160]);
/* Runs one operation to its end on an otherwise idle instance. The op's result, or -ETIMEDOUT:
 * it is still in flight. */
int winnow_io_run(const struct winnow_io_method *method, void *io, const struct winnow_io_op *op,
                  int64_t deadline_ns);
