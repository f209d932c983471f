// io_uring: one ring, one thread that submits and reaps, the only file that includes liburing.
//
// The ring is made disabled by whoever opens the store, so that refusals are known at start, and
// belongs to the thread that first submits or waits: DEFER_TASKRUN and SINGLE_ISSUER bind it there.
// Each flag is dropped where the kernel answers EINVAL; all of them only save CPU.
//
// Per block read, the cost is the kernel's lookups: a registered file table saves the descriptor's,
// registered memory the page pinning (together 10 to 45 % of the CPU at 4 to 16 KiB). Reads into several
// places cannot use registered memory; a pair of 4 KiB read by one of them costs the ring 2.9 us of
// CPU and the disk 17 us, by two registered ones 4.4 and 28.
// Rejected: SQPOLL (a polling kernel thread beside two busy cores: 2 to 3 times slower), IOPOLL
// (refused by most drives' queues), ASYNC_CANCEL (stopped 0 of 200 reads that a drive already had).
//
// Other threads wake the ring through an eventfd that is read in the ring itself: one wait covers
// completions and wake-ups, and no call on a data file is made outside the ring.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <errno.h>
#include <liburing.h>
#include <stddef.h>
#include <stdio.h>
#include <storage/io_files.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

enum { SLICE_SHIFT = 30, N_SLICES_MAX = 16384, BATCH = 32 };

/* No op's: tags of ops stay below 2^63. */
#define WAKE_TAG UINT64_MAX

struct uring_io {
    struct winnow_io_files files; /* first: the table's calls on names take it */
    struct io_uring ring;
    bool ring_made, enabled, fixed_files;
    bool wake_armed; /* the ring holds a read of wake_fd */
    int wake_fd;
    uint64_t wake_count; /* where that read lands */
    uint32_t n_ops_max, n_in_flight;
    uint8_t *arena;
    uint32_t n_slices; /* registered, from the arena's start */
    size_t arena_bytes;
};
static_assert(offsetof(struct uring_io, files) == 0, "a pointer to one is one to the other");
static_assert(sizeof((struct uring_io *)0)->wake_count == 8, "an eventfd gives no fewer bytes");
static_assert(SLICE_SHIFT < 32, "a slice's bytes are 32 bits");

static const struct {
    unsigned flags;
    const char *name;
} ring_flags[] = {
    {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
     "defer_taskrun single_issuer"},
    {IORING_SETUP_COOP_TASKRUN, "coop_taskrun"},
    {IORING_SETUP_SUBMIT_ALL, "submit_all"},
};
enum { N_RING_FLAGS = sizeof ring_flags / sizeof *ring_flags };

static void facts_add(char *text, size_t n_bytes, const char *word)
{
    size_t used = strlen(text);
    winnow_assert(used < n_bytes);
    snprintf(text + used, n_bytes - used, "%s%s", used ? " " : "", word);
}

/* Room for every op and the wake-up; four completions an entry, so that none overflows. */
static int ring_make(struct uring_io *io, struct winnow_io_facts *facts)
{
    unsigned n_entries = 8;
    while (n_entries < io->n_ops_max + 1)
        n_entries *= 2;
    int rc = -EINVAL;
    uint32_t n_dropped = 0;
    for (; n_dropped <= N_RING_FLAGS && rc == -EINVAL; n_dropped++) {
        struct io_uring_params params = {.flags = IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE,
                                         .cq_entries = 4 * n_entries};
        for (uint32_t i = n_dropped; i < N_RING_FLAGS; i++)
            params.flags |= ring_flags[i].flags;
        rc = io_uring_queue_init_params(n_entries, &io->ring, &params);
    }
    if (rc < 0)
        return rc;
    io->ring_made = true;
    unsigned needed = IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG;
    if ((io->ring.features & needed) != needed)
        return -EOPNOTSUPP;
    for (uint32_t i = n_dropped - 1; i < N_RING_FLAGS; i++)
        facts_add(facts->flags, sizeof facts->flags, ring_flags[i].name);
    return 0;
}

static int file_table_register(struct uring_io *io, struct winnow_io_facts *facts)
{
    int *none = winnow_alloc_array(io->files.n_files_max, sizeof *none);
    if (!none)
        return -ENOMEM;
    for (uint32_t i = 0; i < io->files.n_files_max; i++)
        none[i] = -1;
    int rc = io_uring_register_files(&io->ring, none, io->files.n_files_max);
    winnow_alloc_free(none);
    io->fixed_files = rc == 0; /* without a table descriptors serve */
    if (rc < 0)
        snprintf(facts->remedy, sizeof facts->remedy,
                 "no table for %u data files (%s): a little more CPU a read; raise the limit of "
                 "open files (LimitNOFILE)",
                 io->files.n_files_max, strerror(-rc));
    return 0;
}

static void memlock_raise(void)
{
    struct rlimit limit;
    if (!getrlimit(RLIMIT_MEMLOCK, &limit)) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_MEMLOCK, &limit);
    }
}

static uint32_t slice_bytes(const struct uring_io *io, uint32_t slice_idx)
{
    winnow_assert((size_t)slice_idx << SLICE_SHIFT < io->arena_bytes);
    size_t offset_bytes = (size_t)slice_idx << SLICE_SHIFT, rest = io->arena_bytes - offset_bytes;
    return rest < (size_t)1 << SLICE_SHIFT ? (uint32_t)rest : UINT32_C(1) << SLICE_SHIFT;
}

/* Registers the arena in slices of 1 GiB, the most the kernel takes. Where the memlock limit ends
 * it, what is registered stays, and reads into the rest are plain ones. */
static void slices_register(struct uring_io *io, struct winnow_io_facts *facts)
{
    uint64_t n_slices = (io->arena_bytes + (UINT64_C(1) << SLICE_SHIFT) - 1) >> SLICE_SHIFT;
    if (!n_slices)
        return;
    n_slices = n_slices > N_SLICES_MAX ? N_SLICES_MAX : n_slices;
    memlock_raise();
    int rc = io_uring_register_buffers_sparse(&io->ring, (unsigned)n_slices);
    while (rc >= 0 && io->n_slices < n_slices) {
        struct iovec slice = {.iov_base = io->arena + ((size_t)io->n_slices << SLICE_SHIFT),
                              .iov_len = slice_bytes(io, io->n_slices)};
        __u64 tag = 0;
        rc = io_uring_register_buffers_update_tag(&io->ring, io->n_slices, &slice, &tag, 1);
        if (rc >= 0)
            io->n_slices++;
    }
    if (rc < 0)
        snprintf(facts->remedy, sizeof facts->remedy,
                 "%u of %llu slices of memory registered (%s): about 20 %% slower reads; raise "
                 "the memlock limit (LimitMEMLOCK=infinity)",
                 io->n_slices, (unsigned long long)n_slices, strerror(-rc));
    if (io->n_slices)
        facts_add(facts->flags, sizeof facts->flags, "fixed_buffers");
}

static void uring_free(struct uring_io *io)
{
    if (io->ring_made)
        io_uring_queue_exit(&io->ring);
    if (io->wake_fd >= 0)
        close(io->wake_fd);
    winnow_io_files_finish(&io->files);
    winnow_alloc_free(io);
}

static int uring_open(const struct winnow_io_open *options, void *arg, void **ret_io,
                      struct winnow_io_facts *facts)
{
    (void)arg;
    winnow_assert(options->n_ops_max > 0);
    winnow_assert(((uintptr_t)options->arena & 4095) == 0);
    struct uring_io *io = winnow_alloc(sizeof *io);
    if (!io)
        return -ENOMEM;
    io->n_ops_max = options->n_ops_max;
    io->arena = options->arena;
    io->arena_bytes = options->arena_bytes;
    *facts = (struct winnow_io_facts){.method = "io_uring"};

    io->wake_fd = -1;
    int rc = winnow_io_files_init(&io->files, options);
    if (!rc && (io->wake_fd = eventfd(0, EFD_CLOEXEC)) < 0)
        rc = -errno;
    if (!rc)
        rc = ring_make(io, facts);
    if (!rc)
        rc = file_table_register(io, facts);
    if (rc < 0) {
        uring_free(io);
        return rc;
    }
    slices_register(io, facts);
    if (io->fixed_files)
        facts_add(facts->flags, sizeof facts->flags, "fixed_files");
    facts->direct = io->files.direct;
    *ret_io = io;
    return 0;
}

/* The first call of the thread that owns the ring from here on. */
static void ring_enable(struct uring_io *io)
{
    if (io->enabled)
        return;
    /* By the raw call: liburing 2.3 declares io_uring_enable_rings and does not export it. */
    int rc = io_uring_register((unsigned)io->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
    winnow_assert(rc == 0);
    io_uring_register_ring_fd(&io->ring); /* saves the ring's own lookup; works without */
    io->enabled = true;
}

/* The kernel holds one read of the eventfd at all times. */
static void wake_arm(struct uring_io *io)
{
    if (io->wake_armed)
        return;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);
    if (!sqe)
        return; /* full: the next call finds room */
    io_uring_prep_read(sqe, io->wake_fd, &io->wake_count, sizeof io->wake_count, 0);
    io_uring_sqe_set_data64(sqe, WAKE_TAG);
    io->wake_armed = true;
}

/* The registered slice that holds all of the op's memory; -1: none does. */
static int op_slice(const struct uring_io *io, const struct winnow_io_op *op)
{
    size_t from = (size_t)((uint8_t *)op->data - io->arena);
    if ((uint8_t *)op->data < io->arena || from + op->n_bytes > io->arena_bytes)
        return -1;
    size_t slice_idx = from >> SLICE_SHIFT;
    bool inside = (from + op->n_bytes - 1) >> SLICE_SHIFT == slice_idx;
    return inside && slice_idx < io->n_slices ? (int)slice_idx : -1;
}

static void sqe_prep(struct uring_io *io, struct io_uring_sqe *sqe, const struct winnow_io_op *op)
{
    winnow_assert(op->file_idx < io->files.n_files_max);
    winnow_assert(io->files.fd[op->file_idx] >= 0);
    winnow_assert(op->offset_bytes % 4096 == 0);
    winnow_assert(op->tag <= INT64_MAX);
    int fd = io->fixed_files ? (int)op->file_idx : io->files.fd[op->file_idx];
    int slice_idx = op->data ? op_slice(io, op) : -1;
    switch (op->kind) {
    case WINNOW_IO_READ:
        if (!op->data)
            io_uring_prep_readv(sqe, fd, op->parts, op->n_parts, op->offset_bytes);
        else if (slice_idx >= 0)
            io_uring_prep_read_fixed(sqe, fd, op->data, op->n_bytes, op->offset_bytes, slice_idx);
        else
            io_uring_prep_read(sqe, fd, op->data, op->n_bytes, op->offset_bytes);
        break;
    case WINNOW_IO_WRITE:
        if (slice_idx >= 0)
            io_uring_prep_write_fixed(sqe, fd, op->data, op->n_bytes, op->offset_bytes, slice_idx);
        else
            io_uring_prep_write(sqe, fd, op->data, op->n_bytes, op->offset_bytes);
        break;
    case WINNOW_IO_SYNC:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
    default:
        winnow_assert(op->kind == WINNOW_IO_ALLOCATE);
        io_uring_prep_fallocate(sqe, fd, 0, (off_t)op->offset_bytes, (off_t)op->n_bytes * 4096);
    }
    if (io->fixed_files)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, op->tag);
}

static uint32_t uring_submit(void *arg, const struct winnow_io_op *op, uint32_t n_ops)
{
    struct uring_io *io = arg;
    ring_enable(io);
    wake_arm(io);
    uint32_t n_taken = 0;
    while (n_taken < n_ops && io->n_in_flight < io->n_ops_max) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);
        if (!sqe)
            break;
        sqe_prep(io, sqe, &op[n_taken++]);
        io->n_in_flight++;
    }
    winnow_assert(io->n_in_flight <= io->n_ops_max);
    int rc = io_uring_submit(&io->ring);
    /* What these left unconsumed stays in the ring for the next submit or wait. */
    winnow_assert(rc >= 0 || rc == -EINTR || rc == -EAGAIN || rc == -EBUSY);
    return n_taken;
}

static uint32_t uring_poll(void *arg, struct winnow_io_done *done, uint32_t n_done_max)
{
    struct uring_io *io = arg;
    struct io_uring_cqe *cqe[BATCH];
    uint32_t n_done = 0;
    if (!io->enabled)
        return 0;
    while (n_done < n_done_max) {
        unsigned n_wanted = n_done_max - n_done < BATCH ? n_done_max - n_done : BATCH;
        unsigned n_cqes = io_uring_peek_batch_cqe(&io->ring, cqe, n_wanted);
        if (!n_cqes)
            break;
        for (unsigned i = 0; i < n_cqes; i++) {
            if (cqe[i]->user_data == WAKE_TAG)
                io->wake_armed = false;
            else
                done[n_done++] = (struct winnow_io_done){cqe[i]->user_data, cqe[i]->res};
        }
        io_uring_cq_advance(&io->ring, n_cqes);
    }
    winnow_assert(!io_uring_cq_has_overflow(&io->ring));
    winnow_assert(n_done <= io->n_in_flight);
    io->n_in_flight -= n_done;
    return n_done;
}

/* Submits what is still in the ring, then sleeps until a completion: an op's or the wake-up's. */
static int uring_wait(void *arg, int64_t deadline_ns)
{
    struct uring_io *io = arg;
    ring_enable(io);
    wake_arm(io);
    for (;;) {
        int64_t left_ns = deadline_ns - winnow_clock_now_ns();
        left_ns = left_ns < 0 ? 0 : left_ns;
        struct __kernel_timespec timeout = {.tv_sec = left_ns / WINNOW_NS_PER_S,
                                            .tv_nsec = left_ns % WINNOW_NS_PER_S};
        struct io_uring_cqe *cqe;
        int rc = io_uring_submit_and_wait_timeout(
            &io->ring, &cqe, 1, deadline_ns == WINNOW_NEVER_NS ? NULL : &timeout, NULL);
        if (io_uring_cq_ready(&io->ring))
            return 0;
        if (rc == -ETIME)
            return -ETIMEDOUT;
        /* EINTR: again. EAGAIN, EBUSY: the kernel is out of requests until some complete. */
        winnow_assert(rc >= 0 || rc == -EINTR || rc == -EAGAIN || rc == -EBUSY);
    }
}

static void uring_wake(void *arg)
{
    struct uring_io *io = arg;
    uint64_t one = 1;
    ssize_t rc = write(io->wake_fd, &one, sizeof one);
    winnow_assert(rc == sizeof one);
}

/* The read of the eventfd is taken back by answering it, so that nothing lands after close. */
static int uring_close(void *arg)
{
    struct uring_io *io = arg;
    if (io->n_in_flight)
        return -EBUSY;
    struct winnow_io_done none;
    if (io->wake_armed) {
        uring_wake(io);
        while (io->wake_armed) {
            uring_wait(io, WINNOW_NEVER_NS);
            uring_poll(io, &none, 1);
        }
    }
    uring_free(io);
    return 0;
}

static int uring_file_open(void *arg, const char *name, int create, uint32_t *ret_file_idx,
                           uint64_t *ret_bytes)
{
    struct uring_io *io = arg;
    uint32_t file_idx;
    uint64_t n_bytes;
    int rc = winnow_io_files_open(&io->files, name, create, &file_idx, &n_bytes);
    if (rc < 0)
        return rc;
    if (io->fixed_files) {
        rc = io_uring_register_files_update(&io->ring, file_idx, &io->files.fd[file_idx], 1);
        if (rc < 0) {
            winnow_io_files_close(&io->files, file_idx);
            return rc;
        }
    }
    *ret_file_idx = file_idx;
    *ret_bytes = n_bytes;
    return 0;
}

static int uring_file_close(void *arg, uint32_t file_idx)
{
    struct uring_io *io = arg;
    int none = -1;
    if (io->fixed_files)
        io_uring_register_files_update(&io->ring, file_idx, &none, 1);
    return winnow_io_files_close(&io->files, file_idx);
}

const struct winnow_io_method winnow_io_uring = {
    .name = "io_uring",
    .open = uring_open,
    .submit = uring_submit,
    .poll = uring_poll,
    .wait = uring_wait,
    .now = winnow_io_files_now,
    .wake = uring_wake,
    .close = uring_close,
    .file_open = uring_file_open,
    .file_close = uring_file_close,
    .list = winnow_io_files_list,
    .rename = winnow_io_files_rename,
    .unlink = winnow_io_files_unlink,
    .dir_sync = winnow_io_files_dir_sync,
};
