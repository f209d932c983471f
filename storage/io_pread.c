// The pread pool: threads that each run one operation at a time by plain calls. Where io_uring is
// refused (seccomp, sysctl), and on tmpfs; an instance of one operation serves the sync thread.
//
// A disk wants many reads in flight, and a thread holds one: 32 threads read 256 blocks of 4 KiB in
// 4.2 ms, 8 in 5.9, io_uring in 3.3. The price is CPU: a queue, a wake-up and a thread switch a
// block. With one operation at most there is no thread: submit runs it.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <storage/io_files.h>
#include <unistd.h>

enum { N_THREADS_MAX = 32, STACK_BYTES = 256 << 10, PAGE_BYTES = 4096, N_INTERRUPTS_MAX = 8 };

struct pread_io {
    struct winnow_io_files files; /* first: the table's calls on names take it */
    uint32_t n_ops_max, n_threads;
    pthread_t thread[N_THREADS_MAX];

    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t work, ready;
    struct winnow_io_op *op; /* [n_ops_max] ring of what waits */
    struct winnow_io_done *done;
    uint64_t op_head, op_tail, done_head, done_tail;
    uint32_t n_in_flight; /* submitted, not yet polled */
    bool woken, stop;
};

static_assert(offsetof(struct pread_io, files) == 0, "a pointer to one is one to the other");

static int32_t op_run(struct pread_io *io, const struct winnow_io_op *op)
{
    winnow_assert(op->file_idx < io->files.n_files_max);
    winnow_assert(op->offset_bytes % PAGE_BYTES == 0);
    int fd = io->files.fd[op->file_idx];
    winnow_assert(fd >= 0);
    off_t offset = (off_t)op->offset_bytes;
    ssize_t rc;
    uint32_t n_tries = 0;
    do {
        switch (op->kind) {
        case WINNOW_IO_READ:
            rc = op->data ? pread(fd, op->data, op->n_bytes, offset)
                          : preadv(fd, op->parts, (int)op->n_parts, offset);
            break;
        case WINNOW_IO_WRITE:
            rc = pwrite(fd, op->data, op->n_bytes, offset);
            break;
        case WINNOW_IO_SYNC:
            rc = fdatasync(fd);
            break;
        default:
            winnow_assert(op->kind == WINNOW_IO_ALLOCATE);
            rc = fallocate(fd, 0, offset, (off_t)op->n_bytes * PAGE_BYTES);
        }
    } while (rc < 0 && errno == EINTR && ++n_tries < N_INTERRUPTS_MAX);
    return rc < 0 ? -errno : (int32_t)rc;
}

/* With the lock held. Signals once a burst: a waiter takes all there is. */
static void done_put(struct pread_io *io, uint64_t tag, int32_t result)
{
    winnow_assert(io->done_tail - io->done_head < io->n_ops_max);
    io->done[io->done_tail++ % io->n_ops_max] = (struct winnow_io_done){tag, result};
    if (io->done_tail - io->done_head == 1)
        pthread_cond_signal(&io->ready);
}

static void *worker(void *arg)
{
    struct pread_io *io = arg;
    pthread_mutex_lock(&io->lock);
    for (;;) {
        while (io->op_head == io->op_tail && !io->stop)
            pthread_cond_wait(&io->work, &io->lock);
        if (io->op_head == io->op_tail)
            break;
        winnow_assert(io->op_tail - io->op_head <= io->n_ops_max);
        struct winnow_io_op op = io->op[io->op_head++ % io->n_ops_max];
        pthread_mutex_unlock(&io->lock);
        int32_t result = op_run(io, &op);
        pthread_mutex_lock(&io->lock);
        done_put(io, op.tag, result);
    }
    pthread_mutex_unlock(&io->lock);
    return NULL;
}

/* As many threads as the system gives; none is -EAGAIN. Signals stay the main thread's. */
static int workers_start(struct pread_io *io)
{
    uint32_t n_wanted = io->n_ops_max == 1              ? 0
                        : io->n_ops_max < N_THREADS_MAX ? io->n_ops_max
                                                        : N_THREADS_MAX;
    pthread_attr_t attr;
    sigset_t all, old;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (io->n_threads < n_wanted &&
           !pthread_create(&io->thread[io->n_threads], &attr, worker, io))
        io->n_threads++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return n_wanted && !io->n_threads ? -EAGAIN : 0;
}

static int pread_open(const struct winnow_io_open *options, void *arg, void **ret_io,
                      struct winnow_io_facts *facts)
{
    (void)arg;
    winnow_assert(options->n_ops_max > 0);
    struct pread_io *io = winnow_alloc(sizeof *io);
    if (!io)
        return -ENOMEM;
    io->n_ops_max = options->n_ops_max;
    pthread_mutex_init(&io->lock, NULL);
    pthread_cond_init(&io->work, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&io->ready, &monotonic);
    pthread_condattr_destroy(&monotonic);

    int rc = winnow_io_files_init(&io->files, options);
    if (rc < 0)
        goto fail;
    rc = -ENOMEM;
    io->op = winnow_alloc_array(io->n_ops_max, sizeof *io->op);
    io->done = winnow_alloc_array(io->n_ops_max, sizeof *io->done);
    if (!io->op || !io->done)
        goto fail;
    rc = workers_start(io);
    if (rc < 0)
        goto fail;

    *facts = (struct winnow_io_facts){.method = "pread", .direct = io->files.direct};
    snprintf(facts->flags, sizeof facts->flags, "%u threads", io->n_threads);
    *ret_io = io;
    return 0;

fail:
    winnow_alloc_free(io->done);
    winnow_alloc_free(io->op);
    winnow_io_files_finish(&io->files);
    winnow_alloc_free(io);
    return rc;
}

static uint32_t pread_submit(void *arg, const struct winnow_io_op *op, uint32_t n_ops)
{
    struct pread_io *io = arg;
    pthread_mutex_lock(&io->lock);
    winnow_assert(io->n_in_flight <= io->n_ops_max);
    uint32_t n_room = io->n_ops_max - io->n_in_flight;
    uint32_t n_taken = n_ops < n_room ? n_ops : n_room;
    io->n_in_flight += n_taken;
    for (uint32_t i = 0; i < n_taken; i++) {
        if (io->n_threads) {
            io->op[io->op_tail++ % io->n_ops_max] = op[i];
            pthread_cond_signal(&io->work);
        } else {
            pthread_mutex_unlock(&io->lock); /* `wake` must not wait for a disk */
            int32_t result = op_run(io, &op[i]);
            pthread_mutex_lock(&io->lock);
            done_put(io, op[i].tag, result);
        }
    }
    pthread_mutex_unlock(&io->lock);
    return n_taken;
}

static uint32_t pread_poll(void *arg, struct winnow_io_done *done, uint32_t n_done_max)
{
    struct pread_io *io = arg;
    uint32_t n_done = 0;
    pthread_mutex_lock(&io->lock);
    io->woken = false;
    while (n_done < n_done_max && io->done_head < io->done_tail)
        done[n_done++] = io->done[io->done_head++ % io->n_ops_max];
    winnow_assert(n_done <= io->n_in_flight);
    io->n_in_flight -= n_done;
    pthread_mutex_unlock(&io->lock);
    return n_done;
}

static int pread_wait(void *arg, int64_t deadline_ns)
{
    struct pread_io *io = arg;
    struct timespec until = {.tv_sec = deadline_ns / WINNOW_NS_PER_S,
                             .tv_nsec = deadline_ns % WINNOW_NS_PER_S};
    int rc = 0;
    pthread_mutex_lock(&io->lock);
    while (io->done_head == io->done_tail && !io->woken && !rc)
        rc = deadline_ns == WINNOW_NEVER_NS ? pthread_cond_wait(&io->ready, &io->lock)
                                            : pthread_cond_timedwait(&io->ready, &io->lock, &until);
    pthread_mutex_unlock(&io->lock);
    return -rc;
}

static void pread_wake(void *arg)
{
    struct pread_io *io = arg;
    pthread_mutex_lock(&io->lock);
    io->woken = true;
    pthread_cond_signal(&io->ready);
    pthread_mutex_unlock(&io->lock);
}

static int pread_close(void *arg)
{
    struct pread_io *io = arg;
    pthread_mutex_lock(&io->lock);
    bool busy = io->n_in_flight > 0;
    io->stop = !busy;
    pthread_cond_broadcast(&io->work);
    pthread_mutex_unlock(&io->lock);
    if (busy)
        return -EBUSY;
    for (uint32_t i = 0; i < io->n_threads; i++)
        pthread_join(io->thread[i], NULL);
    winnow_assert(io->op_head == io->op_tail);
    winnow_assert(io->done_head == io->done_tail);
    pthread_cond_destroy(&io->ready);
    pthread_cond_destroy(&io->work);
    pthread_mutex_destroy(&io->lock);
    winnow_io_files_finish(&io->files);
    winnow_alloc_free(io->done);
    winnow_alloc_free(io->op);
    winnow_alloc_free(io);
    return 0;
}

const struct winnow_io_method winnow_io_pread = {
    .name = "pread",
    .open = pread_open,
    .submit = pread_submit,
    .poll = pread_poll,
    .wait = pread_wait,
    .now = winnow_io_files_now,
    .wake = pread_wake,
    .close = pread_close,
    .file_open = winnow_io_files_open,
    .file_close = winnow_io_files_close,
    .list = winnow_io_files_list,
    .rename = winnow_io_files_rename,
    .unlink = winnow_io_files_unlink,
    .dir_sync = winnow_io_files_dir_sync,
};
