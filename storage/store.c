// The store's life: what is checked and reserved at open, the two threads, the end.
//
//   owner --asks--> I/O thread (dispatch.c) --answers--> owner          reads, writes
//   owner --asks--> sync thread (grow.c) ----answers--> owner           a data file more
//
// Everything is sized at open from the options: requests, rings, tables of grains. After it the
// store allocates nothing.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <base/rng.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <storage/inside.h>
#include <storage/text.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum {
    WINDOW_MAX = 128,   /* more in flight gains nothing on a disk queue of 256 */
    WINDOW_SPARED = 16, /* of the disk's own queue, for everyone else: past it submit sleeps */
    N_FILES_MAX = 1 << 14,
};
static_assert(WINDOW_SPARED < WINDOW_MAX, "a disk of short queue has a window too");

static const uint64_t data_file_bytes_min = UINT64_C(64) << 20;
static const uint64_t data_file_bytes_max = UINT64_C(1) << 30;
static const int64_t drain_ns = 10 * WINNOW_NS_PER_S;

/* Stores whose open met a disk that does not answer: nobody's, and not to be freed. */
static struct winnow_store *left_to_kernel;

static int sizes_check(struct winnow_store *store, const struct winnow_store_options *options,
                       char text[WINNOW_TEXT_BYTES])
{
    uint64_t file_bytes = options->data_file_bytes;
    if (!file_bytes) {
        file_bytes = data_file_bytes_min;
        while (file_bytes < data_file_bytes_max && file_bytes * 2 <= options->disk_cap_bytes / 16)
            file_bytes *= 2;
    }
    if (file_bytes % WINNOW_GRAIN_BYTES || file_bytes == 0 || file_bytes > data_file_bytes_max)
        return winnow_text_refuse(-EINVAL, text,
                                  "data_file_bytes %llu: a multiple of 2 MiB, at most 1 GiB",
                                  (unsigned long long)file_bytes);
    uint64_t n_files = options->disk_cap_bytes / file_bytes;
    if (n_files < 2)
        return winnow_text_refuse(-EINVAL, text,
                                  "disk_cap %llu MiB is less than two data files of %llu MiB: "
                                  "raise disk_cap to %llu MiB",
                                  (unsigned long long)options->disk_cap_bytes >> 20,
                                  (unsigned long long)file_bytes >> 20,
                                  (unsigned long long)file_bytes >> 19);
    store->disk_cap_bytes = options->disk_cap_bytes;
    store->data_file_bytes = file_bytes;
    store->n_files_max = (uint32_t)(n_files > N_FILES_MAX ? N_FILES_MAX : n_files);
    winnow_assert(store->n_files_max * file_bytes <= store->disk_cap_bytes);
    return 0;
}

static int tables_init(struct winnow_store *store, const struct winnow_store_options *options)
{
    int rc = winnow_grains_init(&store->grains, store->n_files_max,
                                (uint32_t)(store->data_file_bytes / WINNOW_GRAIN_BYTES),
                                options->n_segments_max);
    if (!rc)
        rc = winnow_pool_create(options->n_segments_max, sizeof(struct winnow_stored),
                                &store->stored);
    if (rc < 0)
        return rc;
    store->n_requests_max = store->n_free_requests = options->n_requests_max;
    store->file = winnow_alloc_array(store->n_files_max, sizeof *store->file);
    store->request = winnow_alloc_array(store->n_requests_max, sizeof *store->request);
    if (!store->file || !store->request)
        return -ENOMEM;
    for (uint32_t i = 0; i < store->n_requests_max; i++) {
        store->request[i].next = store->free_request;
        store->free_request = &store->request[i];
    }
    static_assert(sizeof store->uuid == 2 * sizeof(uint64_t), "two words fill it");
    struct winnow_rng rng;
    winnow_rng_init(&rng, options->seed);
    for (uint32_t i = 0; i < 2; i++) {
        uint64_t word = winnow_rng_next(&rng);
        memcpy(store->uuid + 8 * i, &word, sizeof word);
    }
    for (uint32_t i = 0; i < WINNOW_N_WRITE_ERRORS; i++)
        store->write_error_ns[i] = INT64_MIN / 2;
    return 0;
}

/* Past the disk's own queue depth a submit sleeps until something completes. */
static uint32_t window_of(int dir_fd)
{
    char path[96], text[16] = "";
    struct stat st;
    uint32_t window = WINDOW_MAX;
    if (dir_fd < 0 || fstat(dir_fd, &st) < 0)
        return window;
    static const char *const place[] = {"", "../"}; /* a disk's own, a partition's disk's */
    for (uint32_t i = 0; i < 2 && !text[0]; i++) {
        snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%squeue/nr_requests", major(st.st_dev),
                 minor(st.st_dev), place[i]);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t n_bytes = read(fd, text, sizeof text - 1);
        text[n_bytes > 0 ? n_bytes : 0] = '\0';
        close(fd);
    }
    int n_requests = 0;
    if (sscanf(text, "%d", &n_requests) == 1 && n_requests < WINDOW_MAX + WINDOW_SPARED)
        window =
            n_requests > 2 * WINDOW_SPARED ? (uint32_t)n_requests - WINDOW_SPARED : WINDOW_SPARED;
    winnow_assert(window >= WINDOW_SPARED);
    winnow_assert(window <= WINDOW_MAX);
    return window;
}

static int io_open(struct winnow_store *store, const struct winnow_store_options *options,
                   char text[WINNOW_TEXT_BYTES])
{
    const struct winnow_io_method *method = options->method, *sync_method;
    bool refuse_direct = false;
    char remedy[160] = "";
    const char *dir = store->dir.fd < 0 ? options->dir : store->dir.data_path;
    if (!method) {
        int rc = winnow_io_choose(options->io_method ? options->io_method : "auto", dir, &method,
                                  &refuse_direct, remedy);
        if (rc < 0)
            return winnow_text_refuse(rc, text, "%s", remedy);
    }
    winnow_assert(method->virtual_dir == (store->dir.fd < 0));
    sync_method = method->virtual_dir ? method : &winnow_io_pread;
    struct winnow_io_open io_options = {
        .dir = dir, .n_ops_max = 1, .n_files_max = 1, .refuse_direct = refuse_direct};
    struct winnow_io_facts *facts = &store->facts.io;
    void *io;
    int rc = sync_method->open(&io_options, options->method_arg, &io, facts);
    if (!rc && (rc = winnow_grow_init(&store->grow, sync_method, io, store->dir.fd,
                                      store->data_file_bytes)) < 0)
        sync_method->close(io);
    if (rc < 0)
        return winnow_text_refuse(rc, text, "sync thread: %s", strerror(-rc));

    uint32_t window = window_of(store->dir.fd);
    io_options.n_ops_max = window;
    io_options.n_files_max = store->n_files_max;
    io_options.arena = options->arena;
    io_options.arena_bytes = options->arena_bytes;
    rc = method->open(&io_options, options->method_arg, &io, facts);
    if (!rc && (rc = winnow_dispatch_init(&store->dispatch, method, io, window,
                                          store->n_requests_max, store->n_files_max)) < 0)
        method->close(io);
    if (rc < 0)
        return winnow_text_refuse(rc, text, "io_method %s: %s", method->name, strerror(-rc));
    static_assert(sizeof remedy == sizeof facts->remedy, "copied whole");
    if (remedy[0])
        memcpy(facts->remedy, remedy, sizeof facts->remedy);
    store->dispatch.notify = store->grow.notify = options->notify;
    store->dispatch.notify_arg = store->grow.notify_arg = options->notify_arg;
    store->facts.window = window;
    return 0;
}

struct names {
    struct winnow_store *store;
    bool *found; /* [n_files_max] */
    int rc;
};

/* Notes a data file of a former life; one whose number the cap has no room for goes. */
static void name_take(void *arg, const char *name)
{
    struct names *names = arg;
    struct winnow_grow *grow = &names->store->grow;
    long file_no = winnow_dir_file_no(name);
    if (file_no < 0)
        names->rc = -ENOTSUP;
    else if (file_no < names->store->n_files_max)
        names->found[file_no] = true;
    else
        grow->method->unlink(grow->io, name);
}

/* Keeps a file of the right size, with all its bytes allocated; else it goes. */
static int file_keep(struct winnow_store *store, uint32_t file_no)
{
    struct winnow_grow *grow = &store->grow;
    char name[16];
    winnow_assert(!store->file[file_no].made);
    uint32_t file_idx;
    uint64_t n_bytes;
    snprintf(name, sizeof name, "%08x.dat", file_no);
    int rc = grow->method->file_open(grow->io, name, 0, &file_idx, &n_bytes);
    if (rc < 0)
        return rc;
    grow->method->file_close(grow->io, file_idx);
    if (n_bytes == store->data_file_bytes)
        rc = winnow_grow_now(grow, file_no);
    else
        rc = grow->method->unlink(grow->io, name);
    if (rc == -ENOSPC) /* it was sparse: gone, and its place is free */
        return 0;
    if (rc < 0 || n_bytes != store->data_file_bytes)
        return rc;
    rc = winnow_dispatch_file_open(&store->dispatch, file_no);
    if (!rc)
        winnow_store_file_add(store, file_no);
    return rc;
}

static int first_file_make(struct winnow_store *store, char text[WINNOW_TEXT_BYTES])
{
    int rc = winnow_grow_now(&store->grow, 0);
    if (!rc)
        rc = winnow_dispatch_file_open(&store->dispatch, 0);
    if (!rc)
        winnow_store_file_add(store, 0);
    if (rc < 0)
        return winnow_text_refuse(
            rc, text,
            "no room for the first data file of %llu MiB (5 %% of the file system stay "
            "free): %s; lower disk_cap or use another data_dir",
            (unsigned long long)store->data_file_bytes >> 20, strerror(-rc));
    return 0;
}

static int files_take(struct winnow_store *store, char text[WINNOW_TEXT_BYTES])
{
    struct winnow_grow *grow = &store->grow;
    struct names names = {.store = store,
                          .found = winnow_alloc_array(store->n_files_max, sizeof(bool))};
    if (!names.found)
        return winnow_text_refuse(-ENOMEM, text, "store: out of memory");
    int rc = grow->method->list(grow->io, name_take, &names);
    rc = rc < 0 ? rc : names.rc;
    for (uint32_t file_no = 0; !rc && file_no < store->n_files_max; file_no++)
        if (names.found[file_no])
            rc = file_keep(store, file_no);
    winnow_alloc_free(names.found);
    if (rc < 0)
        return winnow_text_refuse(rc, text, "data files: %s", strerror(-rc));
    if (!store->n_files)
        rc = first_file_make(store, text);
    if (!rc)
        winnow_store_grow(store);
    winnow_assert(rc < 0 || store->n_files > 0);
    return rc;
}

static void store_free(struct winnow_store *store)
{
    winnow_assert(!store->started);
    winnow_assert(!store->grow.io);
    winnow_dispatch_finish(&store->dispatch);
    winnow_dir_close(&store->dir);
    winnow_alloc_free(store->request);
    winnow_alloc_free(store->file);
    winnow_pool_destroy(store->stored);
    winnow_grains_finish(&store->grains);
    pthread_mutex_destroy(&store->stop_lock);
    winnow_alloc_free(store);
}

int winnow_store_open(const struct winnow_store_options *options, struct winnow_store **ret_store,
                      char text[WINNOW_TEXT_BYTES])
{
    winnow_assert(options->dir);
    winnow_assert(options->n_requests_max > 0);
    winnow_assert(options->n_segments_max > 0);
    winnow_assert(options->arena || options->arena_bytes == 0);
    *ret_store = NULL;
    text[0] = '\0';
    struct winnow_store *store = winnow_alloc(sizeof *store);
    if (!store)
        return winnow_text_refuse(-ENOMEM, text, "store: out of memory");
    store->dir.fd = store->dir.lock_fd = -1;
    pthread_mutex_init(&store->stop_lock, NULL);
    int rc = sizes_check(store, options, text);
    if (!rc && !(options->method && options->method->virtual_dir))
        rc = winnow_dir_open(&store->dir, options->dir, text);
    if (!rc && (rc = tables_init(store, options)) < 0)
        winnow_text_refuse(rc, text, "store: out of memory for %u requests and %u segments",
                           options->n_requests_max, options->n_segments_max);
    if (!rc)
        rc = io_open(store, options, text);
    if (!rc)
        rc = files_take(store, text);
    if (rc < 0) {
        if (winnow_store_close(store) == -EBUSY) {
            store->next_left = left_to_kernel;
            left_to_kernel = store;
        }
        return rc;
    }
    *ret_store = store;
    return 0;
}

int64_t winnow_store_step(struct winnow_store *store, int64_t now_ns)
{
    return winnow_dispatch_step(&store->dispatch, now_ns);
}

int64_t winnow_store_sync_step(struct winnow_store *store, int64_t now_ns)
{
    return winnow_grow_step(&store->grow, now_ns);
}

/* Ends what is in flight within ten seconds, then the instance. The thread that submitted calls. */
static int io_close(struct winnow_dispatch *dispatch)
{
    const struct winnow_io_method *method = dispatch->method;
    int64_t until_ns = method->now(dispatch->io) + drain_ns;
    while (!winnow_dispatch_drain(dispatch, method->now(dispatch->io)))
        if (method->now(dispatch->io) >= until_ns)
            return -EBUSY;
        else
            method->wait(dispatch->io, until_ns);
    return winnow_dispatch_close(dispatch);
}

static void *io_thread(void *arg)
{
    struct winnow_store *store = arg;
    struct winnow_dispatch *dispatch = &store->dispatch;
    while (!atomic_load(&store->stop)) {
        int64_t now_ns = winnow_clock_now_ns();
        int64_t next_ns = winnow_dispatch_step(dispatch, now_ns);
        if (next_ns > now_ns && !atomic_load(&store->stop))
            dispatch->method->wait(dispatch->io, next_ns);
    }
    pthread_mutex_lock(&store->stop_lock); /* until the wake-up that told of it has returned */
    pthread_mutex_unlock(&store->stop_lock);
    store->io_leaked = io_close(dispatch) < 0;
    return NULL;
}

static void *sync_thread(void *arg)
{
    struct winnow_store *store = arg;
    struct winnow_grow *grow = &store->grow;
    while (!atomic_load(&store->stop)) {
        int64_t next_ns = winnow_grow_step(grow, winnow_clock_now_ns());
        if (!atomic_load(&store->stop))
            grow->method->wait(grow->io, next_ns);
    }
    return NULL;
}

/* With the lock: the I/O thread frees what is woken here. */
static void threads_stop(struct winnow_store *store)
{
    pthread_mutex_lock(&store->stop_lock);
    atomic_store(&store->stop, true);
    store->dispatch.method->wake(store->dispatch.io);
    store->grow.method->wake(store->grow.io);
    pthread_mutex_unlock(&store->stop_lock);
}

int winnow_store_start(struct winnow_store *store)
{
    winnow_assert(!store->started);
    winnow_assert(store->dispatch.io);
    winnow_assert(store->grow.io);
    sigset_t all, old;
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&store->sync_thread, NULL, sync_thread, store);
    if (!rc && (rc = pthread_create(&store->io_thread, NULL, io_thread, store))) {
        threads_stop(store);
        pthread_join(store->sync_thread, NULL);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        return -EAGAIN;
    pthread_setname_np(store->io_thread, "winnow-io");
    pthread_setname_np(store->sync_thread, "winnow-sync");
    store->started = true;
    return 0;
}

int winnow_store_close(struct winnow_store *store)
{
    if (!store)
        return 0;
    if (store->started) {
        store->started = false;
        threads_stop(store);
        pthread_join(store->io_thread, NULL);
        pthread_join(store->sync_thread, NULL);
    } else if (store->dispatch.io) {
        store->io_leaked = io_close(&store->dispatch) < 0;
    }
    if (store->io_leaked || winnow_grow_finish(&store->grow) == -EBUSY)
        return -EBUSY; /* the kernel may still touch what the store holds */
    store_free(store);
    return 0;
}

void winnow_store_facts(struct winnow_store *store, struct winnow_store_facts *facts)
{
    const struct winnow_grains *grains = &store->grains;
    winnow_assert(store->n_files <= store->n_files_max);
    winnow_assert(grains->n_free + grains->n_used + grains->n_bad ==
                  store->n_files * grains->n_per_file);
    *facts = store->facts;
    facts->disk_cap_bytes = store->disk_cap_bytes;
    facts->data_file_bytes = store->data_file_bytes;
    facts->allocated_bytes = store->n_files * store->data_file_bytes;
    facts->used_bytes = (uint64_t)grains->n_used * WINNOW_GRAIN_BYTES;
    facts->bad_bytes = (uint64_t)grains->n_bad * WINNOW_GRAIN_BYTES;
    facts->stuck = winnow_breaker_is_open(&store->dispatch.breaker);
    facts->in_flight = atomic_load_explicit(&store->dispatch.n_in_flight, memory_order_relaxed);
    facts->in_flight_max =
        atomic_load_explicit(&store->dispatch.n_in_flight_max, memory_order_relaxed);
    winnow_assert(facts->allocated_bytes <= facts->disk_cap_bytes);
    winnow_assert(facts->in_flight <= facts->window);
    winnow_assert(facts->in_flight_max <= facts->window);
}

const struct winnow_latency *winnow_store_latency(const struct winnow_store *store)
{
    return &store->reads;
}
