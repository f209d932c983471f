#include <assert.h>
#include <base/assert.h>
#include <core/core.h>
#include <daemon/limits.h>
#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

#define MIB                     (UINT64_C(1) << 20)
#define GIB                     (UINT64_C(1) << 30)
#define ORIGIN(origins, member) winnow_origin(origins, offsetof(struct winnow_config, member))

/* What serving touches beyond what the start did: 3 MiB of code, and the heap's own. */
#define SERVING_BYTES (5 * MIB)
/* What a live stream costs gRPC: call, metadata, transport entry, unasked data. */
#define CALL_BYTES ((16 << 10) + WINNOW_LOOKAHEAD_BYTES)
/* A block read or written by the store: its request, and its places in three rings. */
#define IO_REQUEST_BYTES 224
/* The rest of the store: ring, tables, the stacks of up to 34 threads. */
#define IO_BYTES MIB

static_assert(sizeof((struct winnow_config *)0)->data_dir == WINNOW_PATH_BYTES, "the probe's copy");

static uint64_t clamp(uint64_t value, uint64_t least, uint64_t most)
{
    winnow_assert(least <= most);
    return value < least ? least : value > most ? most : value;
}

static uint64_t read_number(const char *path, const char *before)
{
    char line[256];
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, before, strlen(before)))
            continue;
        const char *digits = line + strlen(before);
        digits += strspn(digits, " \t");
        if (*digits >= '0' && *digits <= '9')
            value = strtoull(digits, NULL, 10);
        break;
    }
    if (file)
        fclose(file);
    return value;
}

/* The least memory.max of this process's cgroup and its parents (version 2). */
static uint64_t read_cgroup_bytes(void)
{
    char line[512] = "", path[1024];
    uint64_t least = UINT64_MAX;
    FILE *file = fopen("/proc/self/cgroup", "re");
    while (file && fgets(line, sizeof line, file) && strncmp(line, "0::/", 4))
        line[0] = 0;
    if (file)
        fclose(file);
    line[strcspn(line, "\n")] = 0;
    if (strncmp(line, "0::/", 4))
        return UINT64_MAX;
    char *group = line + 3;
    for (;;) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", group);
        uint64_t bytes = read_number(path, "");
        if (bytes < least)
            least = bytes;
        char *slash = strrchr(group, '/');
        if (!slash || !*group)
            return least;
        *slash = 0;
    }
}

void winnow_machine_probe(struct winnow_machine *machine, const char *data_dir)
{
    *machine = (struct winnow_machine){.n_cpus = 1};
    uint64_t available_kib = read_number("/proc/meminfo", "MemAvailable:");
    machine->memory_available_bytes =
        available_kib == UINT64_MAX ? UINT64_MAX : available_kib << 10;
    machine->cgroup_bytes = read_cgroup_bytes();
    cpu_set_t cpus;
    if (!sched_getaffinity(0, sizeof cpus, &cpus))
        machine->n_cpus = (uint32_t)CPU_COUNT(&cpus);

    char path[WINNOW_PATH_BYTES];
    struct statvfs fs;
    snprintf(path, sizeof path, "%s", *data_dir ? data_dir : ".");
    while (statvfs(path, &fs) < 0) {
        char *slash = strrchr(path, '/');
        if (!slash)
            snprintf(path, sizeof path, ".");
        else if (slash == path)
            path[1] = 0;
        else
            *slash = 0;
        if (!slash || slash == path) {
            if (statvfs(path, &fs) < 0)
                return;
            break;
        }
    }
    machine->disk_bytes = (uint64_t)fs.f_blocks * fs.f_frsize;
    machine->disk_free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
}

static uint64_t default_disk_cap(const struct winnow_machine *machine)
{
    uint64_t cap = machine->disk_bytes / 10;
    if (cap > machine->disk_free_bytes / 2)
        cap = machine->disk_free_bytes / 2;
    return clamp(cap & ~(64 * MIB - 1), 128 * MIB, 256 * GIB);
}

void winnow_limits_plan(const struct winnow_config *config, const struct winnow_origins *origins,
                        const struct winnow_machine *machine, struct winnow_limits *limits,
                        struct winnow_complaints *complaints)
{
    uint64_t pool = config->host_pool_bytes;
    if (!pool)
        pool = clamp((machine->memory_available_bytes / 4) & ~(2 * MIB - 1), 64 * MIB, 32 * GIB);
    uint64_t index = config->index_memory_bytes;
    if (!index)
        index = clamp(pool / 2, 48 * MIB, UINT64_MAX);

    *limits = (struct winnow_limits){
        .host_pool_bytes = pool,
        .index_memory_bytes = index,
        .disk_cap_bytes =
            config->disk_cap_bytes ? config->disk_cap_bytes : default_disk_cap(machine),
        .n_threads = config->n_threads ? config->n_threads : machine->n_cpus,
        .segment_tokens = config->segment_tokens ? config->segment_tokens
                          : pool < 128 * MIB     ? 512
                                                 : 1024,
        .in_flight_bytes = clamp(pool / 4, 4 * MIB, 64 * MIB),
        .n_posted = (uint32_t)clamp(pool / (64 * MIB), 2, 16),
        .n_calls_max = (uint32_t)clamp(pool / MIB, 128, 4096),
        .n_calls_reserved = 16,
        .n_clients_max = (uint32_t)clamp(pool / (4 * MIB), 32, 1024),
        .n_items_max = (uint32_t)clamp(pool / (64 << 10), 768, 4096),
        .n_steps_max = 16,
    };
    limits->window_bytes = limits->in_flight_bytes;
    limits->window_tokens = WINNOW_WINDOW_TOKENS_MAX;
    limits->n_segments_max = (uint32_t)clamp(limits->disk_cap_bytes / (2 * MIB), 64, 1 << 20);
    limits->io_bytes =
        IO_BYTES + WINNOW_STORE_REQUESTS * IO_REQUEST_BYTES + (uint64_t)limits->n_segments_max * 64;
    limits->rpc_bytes = (uint64_t)limits->n_calls_max * CALL_BYTES;

    winnow_assert(limits->window_bytes <= limits->in_flight_bytes);
    winnow_assert(limits->n_posted <= limits->n_calls_reserved);
    winnow_assert(limits->n_calls_reserved < limits->n_calls_max);
    winnow_assert(limits->n_steps_max <= limits->n_items_max);
    winnow_assert(limits->n_clients_max < limits->n_calls_max);
    winnow_assert(limits->n_threads);

    char value[24], limit[24], fits[24];
    if (limits->disk_cap_bytes > machine->disk_free_bytes && machine->disk_bytes)
        winnow_complain(
            complaints, "disk_cap %s exceeds the %s free. from: %s. hint: %s fits",
            winnow_size_text(limits->disk_cap_bytes, value),
            winnow_size_text(machine->disk_free_bytes, limit), ORIGIN(origins, disk_cap_bytes),
            winnow_size_typed(machine->disk_free_bytes / 20 * 19 & ~(64 * MIB - 1), fits));
}

int winnow_limits_measure(struct winnow_limits *limits)
{
    uint64_t kib = read_number("/proc/self/status", "VmRSS:");
    if (kib == UINT64_MAX)
        return -EIO;
    limits->process_bytes = (kib << 10) + SERVING_BYTES;
    return 0;
}

int winnow_limits_measure_gpu(struct winnow_limits *limits, uint64_t window_bytes)
{
    uint64_t kib = read_number("/proc/self/status", "VmRSS:");
    uint64_t known = limits->process_bytes - SERVING_BYTES + limits->host_pool_bytes;
    winnow_assert(limits->process_bytes >= SERVING_BYTES);
    if (kib == UINT64_MAX)
        return -EIO;
    limits->gpu_bytes = window_bytes + (kib << 10 > known ? (kib << 10) - known : 0);
    return 0;
}

static uint64_t sum_before_margin(const struct winnow_limits *limits)
{
    return limits->host_pool_bytes + limits->index_memory_bytes + limits->in_flight_bytes +
           limits->core_bytes + limits->io_bytes + limits->rpc_bytes + limits->process_bytes +
           limits->gpu_bytes;
}

uint64_t winnow_limits_sum_bytes(const struct winnow_limits *limits)
{
    return sum_before_margin(limits) / 10 * 11;
}

void winnow_limits_check_sum(const struct winnow_limits *limits,
                             const struct winnow_origins *origins,
                             const struct winnow_machine *machine,
                             struct winnow_complaints *complaints)
{
    bool is_cgroup = machine->cgroup_bytes < machine->memory_available_bytes;
    uint64_t most = is_cgroup ? machine->cgroup_bytes : machine->memory_available_bytes;
    uint64_t sum = winnow_limits_sum_bytes(limits);
    winnow_assert(sum >= limits->in_flight_bytes);
    if (sum <= most)
        return;
    /* index_memory by default is half of the pool; one that was given stays as it is. */
    bool is_index_given = strcmp(ORIGIN(origins, index_memory_bytes), "default");
    uint64_t fixed = sum_before_margin(limits) - limits->host_pool_bytes -
                     (is_index_given ? 0 : limits->index_memory_bytes);
    uint64_t room = most / 11 * 10 > fixed ? most / 11 * 10 - fixed : 0;
    uint64_t fits = is_index_given ? room : room / 3 * 2;
    fits &= ~(fits > GIB ? 64 * MIB - 1 : MIB - 1);
    winnow_assert(fits <= most);
    char pool[24], index[24], all[24], limit[24], hint[24];
    winnow_complain(complaints,
                    "host_pool %s and index_memory %s need %s with all else, this %s %s. from: "
                    "%s. hint: host_pool %s fits",
                    winnow_size_text(limits->host_pool_bytes, pool),
                    winnow_size_text(limits->index_memory_bytes, index), winnow_size_text(sum, all),
                    is_cgroup ? "cgroup allows" : "machine has", winnow_size_text(most, limit),
                    ORIGIN(origins, host_pool_bytes), winnow_size_typed(fits, hint));
}

void winnow_limits_print(const struct winnow_limits *limits, const struct winnow_config *config,
                         const struct winnow_origins *origins, const struct winnow_machine *machine,
                         FILE *file)
{
    char a[24], b[24], c[24], d[24], e[24], f[24], g[24], h[24], i[24], gpu[40] = "";
    uint64_t most = machine->cgroup_bytes < machine->memory_available_bytes
                        ? machine->cgroup_bytes
                        : machine->memory_available_bytes;
    fprintf(file, "host_pool %s from %s  threads %u from %s\n",
            winnow_size_text(limits->host_pool_bytes, a), ORIGIN(origins, host_pool_bytes),
            limits->n_threads, ORIGIN(origins, n_threads));
    fprintf(file, "index_memory %s from %s  mass %.3g from %s\n",
            winnow_size_text(limits->index_memory_bytes, a), ORIGIN(origins, index_memory_bytes),
            (double)config->mass, ORIGIN(origins, mass));
    fprintf(file, "disk_cap %s from %s, of %s free in %s\n",
            winnow_size_text(limits->disk_cap_bytes, a), ORIGIN(origins, disk_cap_bytes),
            winnow_size_text(machine->disk_free_bytes, b), config->data_dir);
    fprintf(file, "segment_tokens %u from %s  policy %s from %s  socket %s\n",
            limits->segment_tokens, ORIGIN(origins, segment_tokens), config->policy,
            ORIGIN(origins, policy), config->socket);
    if (limits->gpu_bytes)
        snprintf(gpu, sizeof gpu, "+ GPU %s ", winnow_size_text(limits->gpu_bytes, a));
    fprintf(file,
            "memory pool %s + index %s + in flight %s + core %s + I/O %s + RPC %s + process %s "
            "%s+ 10 %% = %s of %s\n",
            winnow_size_text(limits->host_pool_bytes, a),
            winnow_size_text(limits->index_memory_bytes, b),
            winnow_size_text(limits->in_flight_bytes, c), winnow_size_text(limits->core_bytes, d),
            winnow_size_text(limits->io_bytes, e), winnow_size_text(limits->rpc_bytes, f),
            winnow_size_text(limits->process_bytes, g), gpu,
            winnow_size_text(winnow_limits_sum_bytes(limits), h), winnow_size_text(most, i));
}
