/*
 * The limits: everything the daemon may use, decided from configuration and machine before any of
 * it is taken, and printed with its arithmetic. All scale with host_pool, so that a 32 MiB pool
 * makes a small daemon.
 *
 * Thread: main, at start; read-only afterwards.
 */
#pragma once

#include <daemon/config.h>
#include <stdint.h>
#include <stdio.h>

struct winnow_machine {
    uint64_t memory_available_bytes;      /* MemAvailable */
    uint64_t cgroup_bytes;                /* memory.max; UINT64_MAX: none */
    uint64_t disk_bytes, disk_free_bytes; /* of data_dir's file system */
    uint32_t n_cpus;                      /* this process may use */
};

/* Looks; data_dir need not exist yet (its nearest existing parent counts). */
void winnow_machine_probe(struct winnow_machine *machine, const char *data_dir);

/* Data of a stream that gRPC takes before we ask; an upload is no slower than with 1 MiB, since a
 * message that was asked for widens the window to its size. */
enum { WINNOW_LOOKAHEAD_BYTES = 32 << 10 };

struct winnow_limits {
    uint64_t host_pool_bytes, index_memory_bytes, disk_cap_bytes; /* the three caps */
    uint32_t n_threads, segment_tokens;

    uint64_t in_flight_bytes; /* Append and AttendExact data, all streams together */
    uint64_t window_bytes;    /* q, k, v, out, lse of one AttendExact window */
    uint32_t window_tokens;   /* of one window or Append chunk */
    uint32_t n_posted;        /* calls awaited at once */
    uint32_t n_calls_max;     /* calls at once; the last n_calls_reserved are no streams' */
    uint32_t n_calls_reserved;
    uint32_t n_clients_max;  /* leases */
    uint32_t n_items_max;    /* requests in the core at once */
    uint32_t n_steps_max;    /* of them steps that run */
    uint32_t n_segments_max; /* on disk */

    /* Of the printed sum, beside the caps and in flight. */
    uint64_t core_bytes;    /* the core's own reserve; set once it exists */
    uint64_t io_bytes;      /* store and its rings */
    uint64_t rpc_bytes;     /* what gRPC holds of streams */
    uint64_t process_bytes; /* code, libraries, stacks, the server's tables; set once measured */
    uint64_t gpu_bytes;     /* of host memory: its driver's, measured, and windows' */
};

/* Fills *limits. A value that does not fit the machine is a complaint. */
void winnow_limits_plan(const struct winnow_config *config, const struct winnow_origins *origins,
                        const struct winnow_machine *machine, struct winnow_limits *limits,
                        struct winnow_complaints *complaints);

/* Sets process_bytes from what is resident: once the RPC server stands with all its tables, and
 * before any of the caps is taken. A constant would be wrong on the next machine: libraries, page
 * sizes and sanitizers differ. -EIO: /proc does not tell. */
int winnow_limits_measure(struct winnow_limits *limits);
/* Sets gpu_bytes from what has become resident since then, once a core with a GPU stands, which pins
 * the pool, and what it will pin beside it. -EIO. */
int winnow_limits_measure_gpu(struct winnow_limits *limits, uint64_t window_bytes);

/* The sum that the resident set stays under: all of the above and 10 %. */
uint64_t winnow_limits_sum_bytes(const struct winnow_limits *limits);
/* Complains when the sum exceeds the machine. */
void winnow_limits_check_sum(const struct winnow_limits *limits,
                             const struct winnow_origins *origins,
                             const struct winnow_machine *machine,
                             struct winnow_complaints *complaints);
/* The plan as `winnowd --check` and the start show it. */
void winnow_limits_print(const struct winnow_limits *limits, const struct winnow_config *config,
                         const struct winnow_origins *origins, const struct winnow_machine *machine,
                         FILE *file);
