// The simulated disk. An operation is decided when it is submitted (its end, its fault), and takes
// effect when it is polled: until then a read's memory is poison and a write's is still needed.
//
// Operations in flight lie in one unordered array, as few as a window holds; each poll looks at all
// of them. A heap would be faster and would hide that completions come in any order.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <base/rng.h>
#include <errno.h>
#include <stdio.h>
#include <storage/io_sim.h>
#include <string.h>

enum {
    PAGE_BYTES = 4096,
    SECTOR_BYTES = 512,
    POISON = 0xa5,
    NAME_BYTES = 32,
    N_SCRIPTS = 16,
    N_CHANNELS_MAX = 256,
    N_FLYING_MAX = 1024
};

static_assert(PAGE_BYTES % SECTOR_BYTES == 0, "a short transfer ends at a sector");

struct sim_file {
    char name[NAME_BYTES]; /* "": none */
    uint8_t *bytes;        /* [file_bytes_max], mapped */
    uint64_t n_bytes, allocated_bytes;
};

struct sim_script { /* counts down: the operation that finds skip at 0 meets the fault */
    int kind, fault;
    uint64_t skip, n_times;
};

struct sim_io;

struct sim_flying {
    struct winnow_io_op op;
    struct sim_io *io;
    struct sim_file *file;
    int64_t end_ns; /* WINNOW_NEVER_NS: stuck */
    int fault;      /* 0: none */
};

struct winnow_sim_disk {
    struct winnow_sim_options shape;
    struct winnow_rng rng;
    int64_t now_ns;
    int64_t channel_ns[N_CHANNELS_MAX]; /* each channel is busy until */
    struct sim_file *file;              /* [n_files_max] */
    struct sim_script script[N_SCRIPTS];
    uint32_t n_scripts;
    struct sim_flying flying[N_FLYING_MAX]; /* [in_flight], unordered */
    struct winnow_sim_counts counts;
    uint32_t n_instances;
};

struct sim_io {
    struct winnow_sim_disk *disk;
    uint32_t n_ops_max, n_in_flight, n_files_max;
    bool woken;
    struct sim_file *open_file[]; /* [n_files_max] */
};

/* FNV-1a over the numbers that tell an event. */
static void event_add(struct winnow_sim_disk *disk, uint64_t a, uint64_t b)
{
    uint64_t hash = disk->counts.event_hash;
    hash = (hash ^ a) * UINT64_C(0x100000001b3);
    disk->counts.event_hash = (hash ^ b) * UINT64_C(0x100000001b3);
}

static struct sim_file *file_find(const struct winnow_sim_disk *disk, const char *name)
{
    for (uint32_t i = 0; i < disk->shape.n_files_max; i++)
        if (!strcmp(disk->file[i].name, name))
            return &disk->file[i];
    return NULL;
}

static struct sim_file *file_make(struct winnow_sim_disk *disk, const char *name)
{
    winnow_assert(name[0]);
    winnow_assert(strlen(name) < NAME_BYTES);
    struct sim_file *file = file_find(disk, ""); /* a free one */
    if (!file)
        return NULL;
    file->bytes = winnow_alloc_map(disk->shape.file_bytes_max);
    if (!file->bytes)
        return NULL;
    snprintf(file->name, sizeof file->name, "%s", name);
    return file;
}

static void file_drop(struct winnow_sim_disk *disk, struct sim_file *file)
{
    winnow_assert(file->name[0]);
    winnow_alloc_unmap(file->bytes, disk->shape.file_bytes_max);
    *file = (struct sim_file){0};
}

struct winnow_sim_options winnow_sim_defaults(uint64_t seed)
{
    return (struct winnow_sim_options){.seed = seed,
                                       .n_channels = 32,
                                       .per_op_ns = 80 * WINNOW_NS_PER_US,
                                       .late_ns = 2 * WINNOW_NS_PER_S,
                                       .ns_per_byte = 0.7,
                                       .jitter = 0.5,
                                       .capacity_bytes = UINT64_C(4) << 30,
                                       .file_bytes_max = UINT64_C(1) << 30,
                                       .n_files_max = 64};
}

int winnow_sim_disk_create(const struct winnow_sim_options *options,
                           struct winnow_sim_disk **ret_disk)
{
    winnow_assert(options->n_channels > 0);
    winnow_assert(options->n_channels <= N_CHANNELS_MAX);
    winnow_assert(options->jitter >= 0);
    winnow_assert(options->jitter <= 1);
    struct winnow_sim_disk *disk = winnow_alloc(sizeof *disk);
    if (!disk)
        return -ENOMEM;
    disk->file = winnow_alloc_array(options->n_files_max, sizeof *disk->file);
    if (!disk->file) {
        winnow_alloc_free(disk);
        return -ENOMEM;
    }
    disk->shape = *options;
    disk->counts.event_hash = UINT64_C(0xcbf29ce484222325);
    winnow_rng_init(&disk->rng, options->seed);
    *ret_disk = disk;
    return 0;
}

void winnow_sim_disk_destroy(struct winnow_sim_disk *disk)
{
    if (!disk)
        return;
    winnow_assert(disk->n_instances == 0);
    for (uint32_t i = 0; i < disk->shape.n_files_max; i++)
        if (disk->file[i].name[0])
            file_drop(disk, &disk->file[i]);
    winnow_alloc_free(disk->file);
    winnow_alloc_free(disk);
}

int64_t winnow_sim_disk_now(const struct winnow_sim_disk *disk)
{
    return disk->now_ns;
}

void winnow_sim_disk_now_set(struct winnow_sim_disk *disk, int64_t now_ns)
{
    winnow_assert(now_ns >= disk->now_ns);
    disk->now_ns = now_ns;
}

int64_t winnow_sim_disk_next(const struct winnow_sim_disk *disk)
{
    int64_t next_ns = WINNOW_NEVER_NS;
    for (uint32_t i = 0; i < disk->counts.in_flight; i++)
        if (disk->flying[i].end_ns < next_ns)
            next_ns = disk->flying[i].end_ns;
    return next_ns;
}

void winnow_sim_disk_fail(struct winnow_sim_disk *disk, int kind, uint64_t nth, uint64_t n_times,
                          enum winnow_sim_fault fault)
{
    winnow_assert(kind <= WINNOW_IO_ALLOCATE);
    winnow_assert(nth > 0);
    winnow_assert(n_times > 0);
    winnow_assert(fault < WINNOW_N_SIM_FAULTS);
    winnow_assert(disk->n_scripts < N_SCRIPTS);
    disk->script[disk->n_scripts++] =
        (struct sim_script){.kind = kind, .fault = fault, .skip = nth - 1, .n_times = n_times};
}

void winnow_sim_disk_heal(struct winnow_sim_disk *disk)
{
    disk->n_scripts = 0;
}

void winnow_sim_disk_release(struct winnow_sim_disk *disk)
{
    for (uint32_t i = 0; i < disk->counts.in_flight; i++) {
        struct sim_flying *flying = &disk->flying[i];
        if (flying->fault == WINNOW_SIM_STUCK) {
            flying->fault = WINNOW_SIM_EIO;
            flying->end_ns = disk->now_ns;
        }
    }
}

void winnow_sim_disk_abandon(struct winnow_sim_disk *disk)
{
    disk->counts.in_flight = 0;
    disk->n_instances = 0;
}

/* The fault of the operation being submitted: a script's, else chance's; 0: none. */
static int fault_draw(struct winnow_sim_disk *disk, int kind)
{
    int fault = 0;
    for (uint32_t i = 0; i < disk->n_scripts; i++) {
        struct sim_script *script = &disk->script[i];
        if (script->kind && script->kind != kind)
            continue;
        if (script->skip) {
            script->skip--;
            continue;
        }
        fault = script->fault;
        if (--script->n_times == 0)
            disk->script[i--] = disk->script[--disk->n_scripts];
    }
    for (int f = 1; f < WINNOW_N_SIM_FAULTS && !fault; f++)
        if (disk->shape.p[f] > 0 && winnow_rng_unit(&disk->rng) < disk->shape.p[f])
            fault = f;
    disk->counts.n_faults[fault] += fault != 0;
    return fault;
}

/* Takes the channel that is free first. A stuck operation holds none: a drive has many queues. */
static int64_t end_draw(struct winnow_sim_disk *disk, const struct winnow_io_op *op, int fault)
{
    uint32_t first = 0;
    for (uint32_t i = 1; i < disk->shape.n_channels; i++)
        if (disk->channel_ns[i] < disk->channel_ns[first])
            first = i;
    bool moves_bytes = op->kind == WINNOW_IO_READ || op->kind == WINNOW_IO_WRITE;
    double work_ns = (double)disk->shape.per_op_ns +
                     (moves_bytes ? disk->shape.ns_per_byte * (double)op->n_bytes : 0);
    work_ns *= 1 + disk->shape.jitter * (2 * winnow_rng_unit(&disk->rng) - 1);
    if (fault == WINNOW_SIM_STUCK)
        return WINNOW_NEVER_NS;
    int64_t start_ns =
        disk->channel_ns[first] > disk->now_ns ? disk->channel_ns[first] : disk->now_ns;
    disk->channel_ns[first] = start_ns + (int64_t)work_ns;
    return disk->channel_ns[first] + (fault == WINNOW_SIM_LATE ? disk->shape.late_ns : 0);
}

static void op_check(const struct sim_io *io, const struct winnow_io_op *op)
{
    winnow_assert(op->kind >= WINNOW_IO_READ);
    winnow_assert(op->kind <= WINNOW_IO_ALLOCATE);
    winnow_assert(op->file_idx < io->n_files_max);
    winnow_assert(io->open_file[op->file_idx]);
    winnow_assert(op->offset_bytes % PAGE_BYTES == 0);
    if (op->kind == WINNOW_IO_READ || op->kind == WINNOW_IO_WRITE) {
        winnow_assert(op->n_bytes > 0);
        winnow_assert(op->n_bytes % PAGE_BYTES == 0);
        winnow_assert((uintptr_t)op->data % PAGE_BYTES == 0);
    }
    if (op->kind != WINNOW_IO_READ || op->data)
        return;
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < op->n_parts; i++) {
        winnow_assert(((uintptr_t)op->parts[i].iov_base | op->parts[i].iov_len) % PAGE_BYTES == 0);
        n_bytes += op->parts[i].iov_len;
    }
    winnow_assert(n_bytes == op->n_bytes);
}

/* Puts the first n_bytes of what was read, or (from NULL) poison, where the operation wants it. */
static void read_put(const struct winnow_io_op *op, const uint8_t *from, uint32_t n_bytes)
{
    struct iovec whole = {.iov_base = op->data, .iov_len = op->n_bytes};
    const struct iovec *part = op->data ? &whole : op->parts;
    for (; n_bytes; part++) {
        uint32_t n = part->iov_len < n_bytes ? (uint32_t)part->iov_len : n_bytes;
        if (from)
            memcpy(part->iov_base, from, n);
        else
            memset(part->iov_base, POISON, n);
        from = from ? from + n : NULL;
        n_bytes -= n;
    }
}

static uint32_t sim_submit(void *arg, const struct winnow_io_op *op, uint32_t n_ops)
{
    struct sim_io *io = arg;
    struct winnow_sim_disk *disk = io->disk;
    struct winnow_sim_counts *counts = &disk->counts;
    uint32_t n_taken = 0;
    for (; n_taken < n_ops && io->n_in_flight < io->n_ops_max; n_taken++, op++) {
        winnow_assert(counts->in_flight < N_FLYING_MAX);
        op_check(io, op);
        int fault = fault_draw(disk, op->kind);
        disk->flying[counts->in_flight++] =
            (struct sim_flying){.op = *op,
                                .io = io,
                                .file = io->open_file[op->file_idx],
                                .fault = fault,
                                .end_ns = end_draw(disk, op, fault)};
        if (op->kind == WINNOW_IO_READ)
            read_put(op, NULL, op->n_bytes);
        io->n_in_flight++;
        counts->n_ops[op->kind]++;
        counts->n_bytes[op->kind] += op->n_bytes;
        if (counts->in_flight > counts->in_flight_max)
            counts->in_flight_max = counts->in_flight;
        event_add(disk, op->offset_bytes, (uint64_t)op->kind << 32 | op->n_bytes);
    }
    return n_taken;
}

static int32_t allocate(struct winnow_sim_disk *disk, struct sim_file *file,
                        const struct winnow_io_op *op)
{
    uint64_t end_bytes = op->offset_bytes + (uint64_t)op->n_bytes * PAGE_BYTES, used_bytes = 0;
    for (uint32_t i = 0; i < disk->shape.n_files_max; i++)
        used_bytes += disk->file[i].allocated_bytes;
    winnow_assert(end_bytes <= disk->shape.file_bytes_max);
    if (end_bytes <= file->allocated_bytes)
        return 0;
    if (used_bytes + end_bytes - file->allocated_bytes > disk->shape.capacity_bytes)
        return -ENOSPC;
    file->allocated_bytes = end_bytes;
    if (file->n_bytes < end_bytes)
        file->n_bytes = end_bytes;
    return 0;
}

/* What a healthy disk does with the first n_bytes of an operation. */
static int32_t op_apply(struct winnow_sim_disk *disk, const struct sim_flying *flying,
                        uint32_t n_bytes)
{
    struct sim_file *file = flying->file;
    const struct winnow_io_op *op = &flying->op;
    switch (op->kind) {
    case WINNOW_IO_READ:
        if (op->offset_bytes >= file->n_bytes)
            return 0;
        if (n_bytes > file->n_bytes - op->offset_bytes)
            n_bytes = (uint32_t)(file->n_bytes - op->offset_bytes);
        read_put(op, file->bytes + op->offset_bytes, n_bytes);
        return (int32_t)n_bytes;
    case WINNOW_IO_WRITE:
        winnow_assert(op->offset_bytes + op->n_bytes <= disk->shape.file_bytes_max);
        memcpy(file->bytes + op->offset_bytes, op->data, n_bytes);
        if (file->n_bytes < op->offset_bytes + n_bytes)
            file->n_bytes = op->offset_bytes + n_bytes;
        return (int32_t)n_bytes;
    case WINNOW_IO_SYNC:
        return 0;
    default:
        return allocate(disk, file, op);
    }
}

static int32_t op_end(struct winnow_sim_disk *disk, const struct sim_flying *flying)
{
    uint32_t n_bytes = flying->op.n_bytes;
    bool moves_bytes = flying->op.kind == WINNOW_IO_READ || flying->op.kind == WINNOW_IO_WRITE;
    switch (flying->fault) {
    case WINNOW_SIM_EIO:
        return -EIO;
    case WINNOW_SIM_ENOSPC:
        return -ENOSPC;
    case WINNOW_SIM_EAGAIN:
        return -EAGAIN;
    case WINNOW_SIM_EINTR:
        return -EINTR;
    case WINNOW_SIM_EMPTY:
        return moves_bytes ? 0 : -EIO;
    case WINNOW_SIM_SHORT:
        n_bytes = moves_bytes ? n_bytes / 2 / SECTOR_BYTES * SECTOR_BYTES : n_bytes;
        break;
    }
    return op_apply(disk, flying, n_bytes);
}

static uint32_t sim_poll(void *arg, struct winnow_io_done *done, uint32_t n_done_max)
{
    struct sim_io *io = arg;
    struct winnow_sim_disk *disk = io->disk;
    uint32_t n_done = 0;
    io->woken = false;
    for (uint32_t i = 0; i < disk->counts.in_flight && n_done < n_done_max;) {
        struct sim_flying flying = disk->flying[i];
        if (flying.io != io || flying.end_ns > disk->now_ns) {
            i++;
            continue;
        }
        disk->flying[i] = disk->flying[--disk->counts.in_flight];
        winnow_assert(io->n_in_flight > 0);
        io->n_in_flight--;
        int32_t result = op_end(disk, &flying);
        done[n_done++] = (struct winnow_io_done){flying.op.tag, result};
        event_add(disk, flying.op.offset_bytes, (uint64_t)(uint32_t)result);
    }
    return n_done;
}

/* True when a poll of this instance would return something by then; *ret_ns: when. */
static bool ends_by(const struct sim_io *io, int64_t deadline_ns, int64_t *ret_ns)
{
    const struct winnow_sim_disk *disk = io->disk;
    int64_t next_ns = WINNOW_NEVER_NS;
    for (uint32_t i = 0; i < disk->counts.in_flight; i++)
        if (disk->flying[i].io == io && disk->flying[i].end_ns < next_ns)
            next_ns = disk->flying[i].end_ns;
    *ret_ns = next_ns;
    return next_ns != WINNOW_NEVER_NS && next_ns <= deadline_ns;
}

static int sim_wait(void *arg, int64_t deadline_ns)
{
    struct sim_io *io = arg;
    int64_t next_ns;
    if (io->woken)
        return 0;
    bool ends = ends_by(io, deadline_ns, &next_ns);
    winnow_assert(ends || deadline_ns != WINNOW_NEVER_NS);
    int64_t until_ns = ends ? next_ns : deadline_ns;
    if (until_ns > io->disk->now_ns)
        io->disk->now_ns = until_ns;
    return ends ? 0 : -ETIMEDOUT;
}

static int64_t sim_now(void *arg)
{
    const struct sim_io *io = arg;
    return io->disk->now_ns;
}

static void sim_wake(void *arg)
{
    struct sim_io *io = arg;
    io->woken = true;
}

static int sim_open(const struct winnow_io_open *options, void *arg, void **ret_io,
                    struct winnow_io_facts *facts)
{
    struct winnow_sim_disk *disk = arg;
    winnow_assert(disk);
    struct sim_io *io = winnow_alloc(sizeof *io + options->n_files_max * sizeof(struct sim_file *));
    if (!io)
        return -ENOMEM;
    io->disk = disk;
    io->n_ops_max = options->n_ops_max;
    io->n_files_max = options->n_files_max;
    disk->n_instances++;
    *facts = (struct winnow_io_facts){.method = "simulated", .direct = 1};
    *ret_io = io;
    return 0;
}

static int sim_close(void *arg)
{
    struct sim_io *io = arg;
    if (io->n_in_flight)
        return -EBUSY;
    winnow_assert(io->disk->n_instances > 0);
    io->disk->n_instances--;
    winnow_alloc_free(io);
    return 0;
}

static int sim_file_open(void *arg, const char *name, int create, uint32_t *ret_file_idx,
                         uint64_t *ret_bytes)
{
    struct sim_io *io = arg;
    uint32_t file_idx = 0;
    while (file_idx < io->n_files_max && io->open_file[file_idx])
        file_idx++;
    if (file_idx == io->n_files_max)
        return -ENFILE;
    struct sim_file *file = file_find(io->disk, name);
    if (!file && !create)
        return -ENOENT;
    if (!file && !(file = file_make(io->disk, name)))
        return -ENOSPC;
    io->open_file[file_idx] = file;
    *ret_file_idx = file_idx;
    *ret_bytes = file->n_bytes;
    return 0;
}

static int sim_file_close(void *arg, uint32_t file_idx)
{
    struct sim_io *io = arg;
    winnow_assert(file_idx < io->n_files_max);
    winnow_assert(io->open_file[file_idx]);
    io->open_file[file_idx] = NULL;
    return 0;
}

static int sim_list(void *arg, void (*each)(void *arg, const char *name), void *each_arg)
{
    struct sim_io *io = arg;
    for (uint32_t i = 0; i < io->disk->shape.n_files_max; i++)
        if (io->disk->file[i].name[0])
            each(each_arg, io->disk->file[i].name);
    return 0;
}

static int sim_rename(void *arg, const char *from, const char *to)
{
    struct sim_io *io = arg;
    struct sim_file *file = file_find(io->disk, from), *old = file_find(io->disk, to);
    if (!file)
        return -ENOENT;
    if (old && old != file)
        file_drop(io->disk, old);
    snprintf(file->name, sizeof file->name, "%s", to);
    return 0;
}

static int sim_unlink(void *arg, const char *name)
{
    struct sim_io *io = arg;
    struct sim_file *file = file_find(io->disk, name);
    if (!file)
        return -ENOENT;
    file_drop(io->disk, file);
    return 0;
}

static int sim_dir_sync(void *arg)
{
    (void)arg;
    return 0;
}

bool winnow_sim_disk_flip(struct winnow_sim_disk *disk, const char *name, uint64_t offset_bytes)
{
    struct sim_file *file = file_find(disk, name);
    if (!file || offset_bytes >= file->n_bytes)
        return false;
    file->bytes[offset_bytes] ^= 1;
    return true;
}

bool winnow_sim_disk_swap(struct winnow_sim_disk *disk, const char *name, uint64_t a_bytes,
                          uint64_t b_bytes, uint64_t n_bytes)
{
    struct sim_file *file = file_find(disk, name);
    if (!file || a_bytes + n_bytes > file->n_bytes || b_bytes + n_bytes > file->n_bytes)
        return false;
    for (uint64_t i = 0; i < n_bytes; i++) {
        uint8_t byte = file->bytes[a_bytes + i];
        file->bytes[a_bytes + i] = file->bytes[b_bytes + i];
        file->bytes[b_bytes + i] = byte;
    }
    return true;
}

bool winnow_sim_disk_truncate(struct winnow_sim_disk *disk, const char *name, uint64_t n_bytes)
{
    struct sim_file *file = file_find(disk, name);
    if (!file || n_bytes > file->n_bytes)
        return false;
    file->n_bytes = n_bytes;
    return true;
}

const uint8_t *winnow_sim_disk_file(const struct winnow_sim_disk *disk, const char *name,
                                    uint64_t *ret_bytes)
{
    struct sim_file *file = file_find(disk, name);
    if (!file)
        return NULL;
    *ret_bytes = file->n_bytes;
    return file->bytes;
}

void winnow_sim_disk_put(struct winnow_sim_disk *disk, const char *name, uint64_t n_bytes)
{
    struct sim_file *file = file_make(disk, name);
    winnow_assert(file);
    winnow_assert(n_bytes <= disk->shape.file_bytes_max);
    file->n_bytes = n_bytes;
    file->allocated_bytes = n_bytes;
}

void winnow_sim_disk_counts(const struct winnow_sim_disk *disk, struct winnow_sim_counts *counts)
{
    *counts = disk->counts;
}

const struct winnow_io_method winnow_io_sim = {
    .name = "simulated",
    .virtual_dir = true,
    .open = sim_open,
    .submit = sim_submit,
    .poll = sim_poll,
    .wait = sim_wait,
    .now = sim_now,
    .wake = sim_wake,
    .close = sim_close,
    .file_open = sim_file_open,
    .file_close = sim_file_close,
    .list = sim_list,
    .rename = sim_rename,
    .unlink = sim_unlink,
    .dir_sync = sim_dir_sync,
};
