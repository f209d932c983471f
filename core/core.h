/*
 * The core: what is kept where and what is read. A library with no socket, no config file and no
 * argv: the daemon wraps it, a C engine embeds it, the simulator drives it with a fake disk and a
 * fake clock.
 *
 * Work comes as requests and ends with their `done`. One thread (the owner) calls everything here
 * but winnow_core_submit, winnow_core_cancel and winnow_core_wake, which any thread may call.
 * winnow_core_step does what can be done now: takes requests, polls finished work items and reads,
 * advances every step's state machine, runs items itself while nothing else waits.
 *
 * Rules: architecture.md section 5 (docs/architecture.md numbers them): two caps, sealing by
 * position, waves, same bits whatever is resident.
 */
#pragma once

#include <kernels/gpu.h>
#include <kernels/kernels.h>
#include <stdbool.h>
#include <stdint.h>
#include <storage/store.h>

struct winnow_team;

enum {
    WINNOW_WINDOW_TOKENS_MAX = 4096, /* of one APPEND or EXACT */
    WINNOW_STORE_REQUESTS = 4608,    /* n_requests_max that the core's store must be opened with */
    WINNOW_CORE_REQUESTS = 4096,     /* submitted and cancelled, not yet taken by a step */
};

enum winnow_request_kind {
    WINNOW_REQUEST_OPEN = 1,
    WINNOW_REQUEST_APPEND, /* tokens of one layer */
    WINNOW_REQUEST_EXACT,  /* a window: append, then attend everything causally, one layer */
    WINNOW_REQUEST_ATTEND, /* one decode item of one layer: append its token, then attend */
    WINNOW_REQUEST_TRUNCATE,
    WINNOW_REQUEST_FORK,
    WINNOW_REQUEST_CLOSE,
    WINNOW_REQUEST_CLOSE_OWNER, /* all sessions of a lease */
    WINNOW_REQUEST_STATS,
};

enum winnow_verdict { /* ordered: the worse is the larger */
                      WINNOW_VERDICT_EXACT = 1,
                      WINNOW_VERDICT_MET,
                      WINNOW_VERDICT_SHORT,
                      WINNOW_VERDICT_DEGRADED,
};

/* What a reply says of itself: of one item and layer (architecture.md 8). */
struct winnow_core_certificate {
    uint32_t verdict, reason; /* reason: -errno of a DEGRADED item, as a positive number */
    float mass_asked, mass_reached, mass_mean; /* reached: least over query heads; an estimate */
    uint32_t n_rounds;
    uint32_t n_blocks_total; /* sealed blocks over all KV heads */
    uint32_t n_blocks_device, n_blocks_host, n_blocks_disk, n_blocks_remote; /* where the plan found
                                                                       those that were read */
    uint32_t n_blocks_missed; /* lost or late, compensated */
    uint64_t bytes_read;      /* disk bytes caused: holes and retries too */
    uint32_t micros;          /* since the core took the request */
};

struct winnow_session_options {
    uint32_t policy;       /* 0: the daemon's default */
    float mass;            /* 0: the daemon's default; 1: everything */
    uint32_t n_blocks_max; /* budget a layer and KV head; 0: none */
    uint32_t n_sinks;      /* 0: 16; a multiple of 16, at most 64 */
    uint64_t
        n_tokens_max; /* index reserved at open, else EDQUOT; 0: as tokens come. Forks have none
                              reserved */
    bool strict;      /* short of P after round 2: the layer exactly instead */
    bool
        allow_degraded; /* a lost block, or one later than 3/4 of the time left, compensated instead
                              of an error; not where everything is read (mass 1, short contexts) */
    bool admit_nonfinite; /* no EDOM scan at the door; default false */
};

enum {                                 /* flags of an ATTEND item */
       WINNOW_ITEM_HAS_KV = 1,         /* k, v of the new token are appended first */
       WINNOW_ITEM_EXACT = 2,          /* everything, whatever the policy */
       WINNOW_ITEM_ALLOW_DEGRADED = 4, /* for this item */
};

struct winnow_core_stats {
    uint64_t n_sessions;
    uint64_t n_tokens_held, n_tokens_sealed; /* of level layers: the least over layers */
    uint64_t kv_bytes;                       /* of all tokens held, at rest */
    uint64_t kv_host_bytes,
        kv_disk_bytes; /* of sealed and tail blocks, by where they can be found */
    uint64_t pool_tail_bytes, pool_cache_bytes, pool_staging_bytes, pool_free_bytes, pool_cap_bytes;
    uint64_t index_bytes, index_cap_bytes;
    uint64_t n_steps[5]; /* by verdict */
    uint64_t n_second_rounds, n_exact_windows;
    uint64_t n_blocks_total, n_blocks_device, n_blocks_host, n_blocks_disk;
    uint64_t n_device_steps, n_device_windows, n_device_launches; /* answered by the GPU; launches:
                                                                     not of one session */
    struct winnow_gpu_counters device; /* its cache, of the shape that it serves */
    uint64_t read_bytes_attend, read_bytes_exact, read_bytes_readahead, read_bytes_truncate;
    uint64_t written_bytes;
    uint64_t n_errors[134];          /* by errno */
    uint64_t mass_sum_micro, n_mass; /* mean of mass_mean = mass_sum_micro / 1e6 / n_mass */
};

struct winnow_request {
    uint32_t kind;
    uint64_t owner; /* lease; a session answers its own alone, others see -ENOENT */
    uint64_t
        session_id; /* not OPEN, CLOSE_OWNER; STATS: 0 = all of the owner's sessions, plus pool figures */
    int64_t deadline_ns; /* absolute; WINNOW_NEVER_NS: none */
    void (*done)(
        struct winnow_request *request); /* owner thread; the request is the caller's again */
    void *user;

    /* Results: 0 or
     *   -EINVAL (shape, position, layer)  -EDOM (NaN, Inf)  -ENOENT (no such session)
     *   -EDQUOT (no room; knob named)  -ENODATA (lost block: truncate_to)  -ERANGE (budget cap)
     *   -ESTALE (epoch)  -ETIMEDOUT  -ECANCELED  -EIO  -ENOTSUP
     */
    int status;
    char text[256];       /* what, value, limit; hint */
    uint64_t truncate_to; /* -ENODATA */
    uint64_t n_held;      /* tokens the layer (TRUNCATE, FORK: every layer) holds after the call */
    uint32_t epoch;       /* in: ATTEND, APPEND, EXACT (as the session's); out: TRUNCATE */

    union {
        struct {
            struct winnow_model_shape shape;
            struct winnow_session_options options;
            char label[65];
            uint64_t ret_session_id;
            uint32_t ret_segment_tokens, ret_n_sinks;
        } open;
        struct { /* k [n][Hkv][k_width], v [n][Hkv][v_width] in io_dtype, borrowed until done */
            uint32_t layer, n_tokens;
            uint64_t first; /* = tokens held by the layer */
            const void *k, *v;
        } append;
        struct { /* q [n][Hq][k_width]; out [n][Hq][v_width] io_dtype; lse f32 [n][Hq] or NULL */
            uint32_t layer, n_tokens;
            uint64_t first;
            const void *q, *k, *v;
            void *out;
            float *lse;
            struct winnow_core_certificate certificate;
        } exact;
        struct { /* q [Hq][k_width], k [Hkv][k_width], v [Hkv][v_width]; out [Hq][v_width] */
            uint32_t layer, flags;
            uint64_t position; /* tokens held before */
            uint64_t seq; /* a repeat of the layer's last one is answered again, appends nothing;
                                  0: not checked */
            float mass;   /* 0: the session's */
            uint32_t n_blocks_max; /* 0: the session's */
            const void *q, *k, *v;
            void *out;
            float *lse;
            struct winnow_core_certificate certificate;
        } attend;
        struct {
            uint64_t n_tokens; /* each layer is cut to min(held, n_tokens) */
        } truncate;
        struct {
            uint64_t ret_session_id;
        } fork;
        struct winnow_core_stats stats;
    };
    struct winnow_request *next; /* the core's */
    uint64_t core_private[4];    /* the core's: when it arrived */
};

struct winnow_core_options {
    uint64_t host_pool_bytes, index_memory_bytes; /* the two caps */
    uint32_t segment_tokens; /* S: a multiple of 128; 0: 512 under a 128 MiB pool, else 1,024 */
    uint32_t dense_below;    /* sealed tokens read whole below it: 1,024 */
    uint32_t policy;         /* default of sessions */
    float mass;              /* default of sessions: 0.9 */
    uint32_t n_sessions_max;
    uint32_t n_steps_max;  /* steps that run at once; the rest queue */
    uint64_t n_tokens_max; /* of a context */
    const struct winnow_kernels *kernels;
    struct winnow_team *team;         /* borrowed */
    const struct winnow_gpu_api *gpu; /* NULL: none. Takes decode steps of policy codes */
    uint32_t gpu_ordinal, n_gpu_sessions_max;
    uint64_t gpu_memory_bytes;
    /* The store is opened by the caller over the core's arena: create, winnow_core_arena, open the
     * store, winnow_core_set_store. Without one, contexts live in memory alone. */
    void (*notify)(void *arg); /* winnow_core_submit, any thread: the owner should step (edge) */
    void *notify_arg;
    int64_t (*now)(void *arg); /* the clock while a step goes on; NULL: winnow_clock_now_ns */
    void *now_arg;
    uint64_t seed; /* session ids */
};

struct winnow_core;

/* 0; or with a line in text -ENOMEM; -EINVAL: a cap below the smallest legal one, S not a multiple;
 * what gpu.open returns. */
int winnow_core_create(const struct winnow_core_options *options, struct winnow_core **ret_core,
                       char text[256]);
/* Every request must be done and the store closed. Sessions still open end. NULL is fine. */
void winnow_core_destroy(struct winnow_core *core);
void winnow_core_arena(const struct winnow_core *core, void **ret_arena, size_t *ret_bytes);
/* How the GPU's memory would be divided for sessions of this shape, a line. False: it has no room,
 * or there is no GPU. */
bool winnow_core_gpu_plan(const struct winnow_core *core, const struct winnow_model_shape *shape,
                          char text[256]);
/* The same of the shape that it serves, NULL: none yet; the number of shapes that it has served. */
const char *winnow_core_gpu_shape(const struct winnow_core *core, uint64_t *ret_n_shapes);
/* Host memory that the GPU may pin for windows beside the pool, once it knows a model; 0 without. */
uint64_t winnow_core_gpu_window_bytes(const struct winnow_core *core);
bool winnow_core_has_gpu(const struct winnow_core *core); /* a lost one too */
/* The GPU was lost: its sessions go on with the CPU's kernels. */
bool winnow_core_gpu_lost(const struct winnow_core *core);
void winnow_core_set_store(struct winnow_core *core, struct winnow_store *store); /* borrowed */

/* Any thread. The request is the core's until done. -EAGAIN: the request ring is full. */
int winnow_core_submit(struct winnow_core *core, struct winnow_request *request);
/* Any thread. The request ends at its next item with -ECANCELED (or as it would have). */
void winnow_core_cancel(struct winnow_core *core, struct winnow_request *request);

/* Owner. Returns when it wants to be called again at the latest, if nothing notifies before; now_ns
 * or less: at once. */
int64_t winnow_core_step(struct winnow_core *core, int64_t now_ns);

/* All that is reserved at start, in bytes, for the printed sum. */
uint64_t winnow_core_fixed_bytes(const struct winnow_core *core);
/* What a session of this shape needs of the pool at least; the arithmetic in text. */
uint64_t winnow_core_session_need_bytes(const struct winnow_core *core,
                                        const struct winnow_model_shape *shape, char text[256]);
/* Index bytes of one sealed token of this shape. */
double winnow_core_index_bytes_per_token(const struct winnow_model_shape *shape);
