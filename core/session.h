/*
 * Inside the core: sessions, the operation each has under way, and what an operation runs with.
 *
 * A session does one request at a time, the others wait in its queue. A request under way is an
 * **op**: a state machine that its kind's file advances (decode.c, window.c, truncate.c) whenever a
 * work item or a read of it ends. An op ends only when none of its items runs; reads that outlive it
 * keep their memory by themselves (struct winnow_load).
 *
 * Included by core/ alone. Thread: owner, but for what an item is handed.
 */
#pragma once

#include <assert.h>
#include <base/clock.h>
#include <base/pool.h>
#include <base/ring.h>
#include <base/rng.h>
#include <base/team.h>
#include <core/context.h>
#include <core/core.h>
#include <core/device.h>

enum {
    WINNOW_RECENT_TOKENS = 64, /* a span is due when the layer holds this much more than its end */
    WINNOW_SEAL_TOKENS = 96,   /* in decode it is in force from here on */
    WINNOW_WINDOW_POSITIONS = 512, /* of one pass of an exact window */
    WINNOW_TILE_POSITIONS = 64,    /* of one work item of it */
    WINNOW_N_GROUPS = 128,         /* of one step in flight: filled, not yet merged */
    WINNOW_ITEM_GROUPS = 16,       /* of one work item */
    WINNOW_STEP_SLOTS = 64,        /* every running step owns */
    WINNOW_N_LOADS = 4096,         /* reads outstanding */
    WINNOW_N_ITEMS = 1024,
    WINNOW_N_PASSES = 2, /* exact windows at once */
    WINNOW_LAYERS_MAX = 256,
    WINNOW_KV_HEADS_MAX =
        128, /* a phase of a window sends 8 items a head: WINNOW_N_ITEMS of them */
    WINNOW_HEAVY_STEPS = 64,
    WINNOW_N_RETIRED = 64, /* growths of the workers' scratch */
};

static_assert((int)WINNOW_SEAL_TOKENS > (int)WINNOW_RECENT_TOKENS, "a build has steps to run in");
static_assert(WINNOW_SEAL_TOKENS == 96, "context.c's n_blocks_max has room for it twice");
static_assert(WINNOW_WINDOW_POSITIONS % WINNOW_TILE_POSITIONS == 0, "a pass is whole tiles");
static_assert(WINNOW_KV_HEADS_MAX * (WINNOW_WINDOW_POSITIONS / WINNOW_TILE_POSITIONS) <=
                  WINNOW_N_ITEMS,
              "a phase of a window can be sent");
static_assert(WINNOW_ITEM_GROUPS <= WINNOW_N_GROUPS, "an item's groups are one step's");
static_assert(WINNOW_N_GROUPS <= UINT16_MAX, "a group's number in an item");
static_assert((int)WINNOW_STEP_SLOTS >= (int)WINNOW_GROUP_BLOCKS, "every running step can go on");
static_assert((int)WINNOW_N_LOADS < (int)WINNOW_STORE_REQUESTS, "the store takes every load");
struct winnow_session;

/* A piece of work for the team, on behalf of a session. */
struct winnow_item {
    struct winnow_work work;
    const struct winnow_kernels *kernels;
    uint8_t **scratch; /* [worker] */
    struct winnow_session *session;
    void (*done)(struct winnow_core *core, struct winnow_item *item); /* owner, after run */
    struct winnow_segment *segment;
    uint32_t layer, head, first, n;
    uint16_t group[WINNOW_ITEM_GROUPS];
    int result;
};

static_assert(offsetof(struct winnow_item, work) == 0, "a work is cast to its item");
/* A block on its way from disk into a slot of the cache (slot) or into staging. It outlives its op
 * when the op ends first: then it only puts its memory back. */
struct winnow_load {
    struct winnow_segment *segment; /* one reference */
    uint64_t session_handle;
    uint64_t op_number;
    uint32_t block_idx; /* of the segment */
    uint32_t slot;      /* + 1; 0: staged */
    void *data;
    uint32_t group, place; /* of the op: which waits for it */
    uint32_t kind; /* enum winnow_request_kind: whose bytes they are, when the op is over too */
    bool told;     /* its op knows the result */
    bool cached;   /* its slot is the cache's: pin it instead of holding it */
};

/* Staging that a batch of loads fills from its front: neighbours on disk are neighbours there. */
struct winnow_stage {
    uint8_t *piece;
    uint32_t used_bytes;
};

enum winnow_group_state {
    WINNOW_GROUP_READING,
    WINNOW_GROUP_READY,
    WINNOW_GROUP_RUNNING,
    WINNOW_GROUP_DONE
};

/* Where a group's block is, and what to give back once it is attended. */
enum winnow_source {
    WINNOW_FROM_CACHE,
    WINNOW_FROM_SLOT,
    WINNOW_FROM_STAGING,
    WINNOW_FROM_NOWHERE
};

struct winnow_group {
    uint8_t state, n, n_missing;
    uint8_t source[WINNOW_GROUP_BLOCKS];
    uint32_t head;
    uint32_t block[WINNOW_GROUP_BLOCKS]; /* number in the head's list: segment x n_blocks + block */
    uint32_t slot[WINNOW_GROUP_BLOCKS];
    const void *data[WINNOW_GROUP_BLOCKS];
};

/* Walks the blocks that a step wants, in list order a head. */
struct winnow_cursor {
    uint32_t segment_idx, head, block_idx;
    uint8_t wanted;  /* value of `selected` */
    bool disk_order; /* segment, head, block: everything is wanted; else head, then its list */
    bool exact_too;  /* heads that are read whole are walked (first round only) */
};

/* What a decode step computes with; sized when it starts, from index_memory. */
struct winnow_run {
    bool taken;
    void *memory;
    size_t memory_bytes;
    float *q;                           /* [n_q_heads][k_width] */
    float *kv;                          /* [n_kv_heads][k_width], then [n_kv_heads][v_width] */
    float *acc;                         /* [n_kv_heads] partials, joined so far */
    float *base;                        /* [n_kv_heads] partials of the resident blocks alone */
    float *partial;                     /* [WINNOW_N_GROUPS] partials */
    float *out;                         /* [n_q_heads][v_width] */
    float *lse, *ln_z, *rho, *mass;     /* [n_q_heads] */
    uint32_t *n_more;                   /* [n_kv_heads] of the second round */
    uint8_t *exact;                     /* [n_kv_heads] read whole */
    struct winnow_selection *selection; /* [n_kv_heads] */
    float *ln_m;                        /* [n_kv_heads][n_blocks][G]: what the selections read */
    uint8_t *scratch;                   /* [n_kv_heads] of scratch_bytes */
    size_t scratch_bytes;
    uint32_t *pin;     /* [n_kv_heads][n_blocks] slots + 1 that a step of the device holds */
    uint32_t n_blocks; /* a head's list */
    struct winnow_group group[WINNOW_N_GROUPS];
};

enum winnow_chunk_state {
    WINNOW_CHUNK_FREE,
    WINNOW_CHUNK_READING,
    WINNOW_CHUNK_READY,
    WINNOW_CHUNK_RUNNING
};

/* Blocks of an exact window that are attended together: a list a KV head. */
struct winnow_chunk {
    uint8_t state; /* enum winnow_chunk_state */
    uint32_t n_missing, n_blocks;
    uint32_t *n_of_head; /* [n_kv_heads] */
    const void **data;   /* [n_kv_heads][chunk_blocks_max] */
    uint32_t *slot;      /* the same places */
    uint8_t *source;
};

/* What an exact window computes with. */
struct winnow_pass {
    bool taken;
    void *memory;
    size_t memory_bytes;
    float *partial;            /* [n_kv_heads][WINNOW_WINDOW_POSITIONS] partials */
    uint32_t chunk_blocks_max; /* a head */
    struct winnow_chunk chunk[2];
};

enum winnow_op_state {
    WINNOW_OP_NONE, /* no request */
    WINNOW_OP_QUEUED,
    WINNOW_OP_BEGIN,
    WINNOW_OP_ROOM, /* waits for slots of its tokens */
    WINNOW_OP_CONVERT,
    WINNOW_OP_BUILD,
    WINNOW_OP_DEVICE,      /* waits for a launch, or for its end */
    WINNOW_OP_DEVICE_READ, /* selected blocks on disk are read, to be launched again */
    WINNOW_OP_SCORE,
    WINNOW_OP_PROBE,
    WINNOW_OP_SELECT,
    WINNOW_OP_READ,
    WINNOW_OP_VERIFY,
    WINNOW_OP_READ_MORE,
    WINNOW_OP_CERTIFY,
    WINNOW_OP_STRICT,
    WINNOW_OP_QUERIES,     /* window: the device's are put where it takes them */
    WINNOW_OP_SEALED_KEYS, /* blocks of segments; all of them where the device attends */
    WINNOW_OP_RESIDENT_KEYS,
    WINNOW_OP_FINISH,
    WINNOW_OP_SEAL,
};

struct winnow_op {
    struct winnow_request *request;
    uint64_t number; /* rises with every op of the core */
    uint32_t state;
    uint32_t n_items, n_loads; /* running, outstanding */
    int failure;
    bool cancelled;
    int64_t arrived_ns; /* its request did */
    uint32_t layer;

    struct winnow_run *run; /* decode */
    struct winnow_cursor cursor;
    uint64_t group_first, group_next; /* merged up to; filled up to */
    bool fill_done, appended, whole;
    uint32_t n_device_reads, n_wanted, n_asked; /* blocks that the device lacks; seen to */
    uint32_t n_pins;
    bool by_device, on_cpu; /* the device answered; the device does not take it */
    bool budget_spent;      /* so says the device */
    uint32_t policy;
    float mass;
    uint32_t n_blocks_max;
    struct winnow_core_certificate certificate;

    struct winnow_pass *pass; /* window, truncate */
    uint64_t at;              /* window: first position of the pass; truncate: layer's progress */
    uint32_t n_pass;
    uint64_t chunk_first, chunk_next;
    uint64_t chunk_sent; /* to the device */
    uint32_t n_sent;     /* resident blocks of the pass that were */
    bool all_sent;
    uint32_t *slot; /* truncate, fork: new resident blocks of all layers */
    uint32_t n_slots;
    uint32_t cut, n_cut; /* truncate: the segment cut through; layers restored before this one */
    bool restored;       /* truncate: `layer` is one of those */
    uint32_t chunk_head, chunk_block; /* truncate: what the chunk begins with */
};

enum winnow_seal_state {
    WINNOW_SEAL_NONE,
    WINNOW_SEAL_BUILDING,
    WINNOW_SEAL_BUILT,
    WINNOW_SEAL_PERMUTING
};

struct winnow_session_layer {
    uint8_t seal_state; /* of span n_segments */
    uint32_t n_builds;  /* items running: it is built or permuted */
    uint64_t sealed_to; /* spans that end by here are in force for the layer's next call */
    uint64_t last_seq;
    uint64_t on_device;   /* resident tokens before this one are the device's too */
    uint32_t n_on_device; /* so are segments before this one, and the session's list has them */
};

struct winnow_heavy { /* of a layer and KV head: selection.md's rule for heads read whole */
    float share_sum;
    uint16_t n_steps;
    bool heavy;
};

struct winnow_session {
    uint64_t id, owner;
    struct winnow_session_options options;
    char label[65];
    uint32_t epoch;
    struct winnow_context *context;
    struct winnow_session_layer *layer;
    struct winnow_heavy *heavy; /* [n_layers][n_kv_heads] */
    struct winnow_request *queue_first, **queue_last;
    struct winnow_op op;
    uint32_t active_idx;                          /* in the core's list of ops under way */
    struct winnow_session *next_run;              /* in the core's queue for a run or pass */
    uint32_t n_heavy;                             /* flags set in `heavy` */
    uint32_t device_slot;                         /* + 1; 0: the CPU takes its steps */
    uint32_t n_device_segments, *device_segments; /* [n_segments_max] slots the device was told */
    uint64_t promised_bytes;                      /* of index_memory, reserved at open; 0: none */
    uint32_t n_builds;                            /* items of it in the team, beyond op.n_items */
    bool closing;
    struct winnow_core_stats stats;
};

struct winnow_core {
    struct winnow_core_options options;
    struct winnow_tiers tiers;
    struct winnow_ring *requests;
    struct winnow_pool *sessions, *items, *loads;
    struct winnow_rng rng;
    int64_t now_ns;
    uint64_t n_ops;

    uint32_t n_runs_max;
    struct winnow_run *run;
    struct winnow_pass pass[WINNOW_N_PASSES];
    struct winnow_session **active; /* ops under way */
    struct winnow_session *wait_run_first, **wait_run_last;

    uint32_t n_workers; /* team size */
    uint8_t **scratch;  /* [n_workers]; an item keeps the one it was taken with */
    uint8_t **retired[WINNOW_N_RETIRED];
    uint32_t n_retired;
    size_t scratch_bytes;
    uint64_t keep_bytes; /* of the pool, for running steps */

    uint32_t n_items_out, n_decoding, n_spills, n_active;
    uint32_t n_promises; /* sessions with index reserved */
    bool spill_grows;    /* a spill waits for a data file */
    bool progress;       /* something happened in this round of the step loop */
    struct winnow_segment_layer *
        *spill_of_piece;            /* [staging pieces] whose blocks a write carries */
    struct winnow_core_stats stats; /* of closed sessions, and of what belongs to none */
};

/* --- request.c --- */
int winnow_requests_create(struct winnow_ring **ret_ring);
/* Takes what has come in. True: something had. */
bool winnow_requests_poll(struct winnow_core *core);
/* Takes the request at `at` out of the session's queue. */
void winnow_queue_leave(struct winnow_session *session, struct winnow_request **at);
/* Ends what waits behind another request and is late. Returns the nearest deadline of the rest. */
int64_t winnow_queue_expire(struct winnow_core *core, struct winnow_session *session);
/* Tokens held where the request points: of its layer, or of every layer. */
uint64_t winnow_request_held(const struct winnow_session *session,
                             const struct winnow_request *request);
void winnow_request_done(struct winnow_core *core, struct winnow_request *request);

/* --- op.c --- */
/* The session's next request becomes its op, when it has none. */
void winnow_op_start_next(struct winnow_core *core, struct winnow_session *session);
/* Every op goes as far as it can. Returns the nearest deadline. */
int64_t winnow_ops_advance(struct winnow_core *core);
void winnow_op_fail(struct winnow_op *op, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void winnow_op_end(struct winnow_core *core, struct winnow_session *session);
/* A block of the segment did not come: -ENODATA with truncate_to; -ETIMEDOUT: it is late, not lost. */
void winnow_op_lost(struct winnow_op *op, const struct winnow_segment *segment, int result);
/* n slots, all or none, of the session's block size into op->slot; given back with the op while
 * n_slots says so. */
bool winnow_op_slots_take(struct winnow_core *core, struct winnow_session *session, uint32_t n);
/* There is no room now for what the format names: spills more; when nothing under way can free
 * memory, the op fails with -EDQUOT. */
void winnow_op_wait_room(struct winnow_core *core, struct winnow_op *op, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void winnow_session_destroy(struct winnow_core *core, struct winnow_session *session);
void winnow_core_scratch_free(struct winnow_core *core);
int winnow_core_scratch_grow(struct winnow_core *core, const struct winnow_model_shape *shape,
                             uint32_t segment_tokens);

/* --- core.c: items --- */
/* An item of the session's op; NULL: all are out, try again when one ends. */
struct winnow_item *winnow_item_take(struct winnow_core *core, struct winnow_session *session);
void winnow_item_submit(struct winnow_core *core, struct winnow_item *item, uint32_t lane,
                        void (*run)(struct winnow_work *, uint32_t),
                        void (*done)(struct winnow_core *, struct winnow_item *));
/* Runs it on the owner at once: for work that is less than the wake-up of a worker. */
void winnow_item_run_here(struct winnow_core *core, struct winnow_item *item,
                          void (*run)(struct winnow_work *, uint32_t),
                          void (*done)(struct winnow_core *, struct winnow_item *));
/* The common end of an item: its error becomes the op's. */
void winnow_item_done(struct winnow_core *core, struct winnow_item *item);

/* --- the kinds --- */
void winnow_decode_advance(struct winnow_core *core, struct winnow_session *session);
/* The step reads all blocks: it was asked to, or the context is short. */
bool winnow_decode_is_whole(const struct winnow_core *core, const struct winnow_session *session);
void winnow_window_advance(struct winnow_core *core, struct winnow_session *session);
void winnow_truncate_advance(struct winnow_core *core, struct winnow_session *session);
/* Index bytes that the session may take: what is free and not promised to others. NULL: a new one. */
uint64_t winnow_index_left(const struct winnow_core *core, const struct winnow_session *session);
void winnow_open(struct winnow_core *core, struct winnow_request *request);
/* True: forked, the op may end. False: it has failed, or waits for room. */
bool winnow_fork(struct winnow_core *core, struct winnow_session *session);
void winnow_stats_fill(struct winnow_core *core, struct winnow_request *request);

/* --- run.c --- */
/* Sizes the run for the session's context. 0; -EDQUOT. */
int winnow_run_prepare(struct winnow_core *core, struct winnow_run *run,
                       const struct winnow_session *session, uint32_t n_blocks);
/* Bytes of index_memory that a step over n_blocks would have to take, beyond what runs hold. */
size_t winnow_run_wants(const struct winnow_core *core, const struct winnow_session *session,
                        uint32_t n_blocks);
/* Blocks a KV head that a chunk holds at most, n_span of a segment. */
uint32_t winnow_chunk_blocks_max(uint32_t n_kv_heads, uint32_t n_span);
/* Sizes the pass. 0; -ENOMEM. */
int winnow_pass_prepare(struct winnow_pass *pass, const struct winnow_session *session);

/* --- plan.c: from blocks wanted to blocks at hand --- */
void winnow_plan_begin(struct winnow_session *session, uint8_t wanted, bool exact_too);
/* Fills groups while there is room, starts reads. */
void winnow_plan_fill(struct winnow_core *core, struct winnow_session *session);
/* Pins or places are given back. */
void winnow_group_release(struct winnow_core *core, struct winnow_session *session,
                          struct winnow_group *group);
/* Where block `i` of a layer's segment can be had. */
struct winnow_load *winnow_load_take(struct winnow_core *core, struct winnow_session *session,
                                     struct winnow_segment *segment, uint32_t block_idx);
void winnow_load_abandon(struct winnow_core *core,
                         struct winnow_load *load); /* nothing was asked */
void *winnow_stage_take(struct winnow_core *core, struct winnow_stage *stage, uint32_t block_bytes);
void winnow_stage_finish(struct winnow_core *core, struct winnow_stage *stage);
void winnow_load_done(struct winnow_core *core, const struct winnow_store_done *done);
/* Blocks that no slot of the device holds (winnow_device_disk_blocks) into the cache, pinned until
 * they are released: no groups, so their number is bounded by the pool alone. */
void winnow_pins_begin(struct winnow_core *core, struct winnow_session *session, uint32_t n_listed);
/* Starts reads while there is room. True: all are asked for. */
bool winnow_pins_fill(struct winnow_core *core, struct winnow_session *session);
void winnow_pins_release(struct winnow_core *core, struct winnow_session *session);
/* A chunk or group of an op got a block, or lost it. */
void winnow_decode_loaded(struct winnow_core *core, struct winnow_session *session,
                          const struct winnow_load *load, int result);
void winnow_chunk_loaded(struct winnow_core *core, struct winnow_session *session,
                         const struct winnow_load *load, int result);

/* --- chunk.c: blocks of a pass --- */
/* Fills a free chunk with all blocks from the op's cursor on that fit (one_head: of the cursor's KV
 * head alone), and moves the cursor. False: none fits now. */
bool winnow_chunk_fill(struct winnow_core *core, struct winnow_session *session,
                       struct winnow_chunk *chunk, uint32_t chunk_idx, bool one_head);
void winnow_chunk_release(struct winnow_core *core, struct winnow_session *session,
                          struct winnow_chunk *chunk);

/* --- seal.c --- */
/* Starts the build of the layer's due span if there is one and none runs. 0; -EDQUOT. */
int winnow_seal_start(struct winnow_core *core, struct winnow_session *session, uint32_t layer,
                      uint32_t lane);
/* Built: repacks its blocks (items of the op); with the last of them it is in force, whatever
 * becomes of the op. Nothing is begun when there are no items or slots now. */
void winnow_seal_permute(struct winnow_core *core, struct winnow_session *session, uint32_t layer);
/* A built span that lost its tokens is forgotten. No build of the layer may run. */
void winnow_seal_forget(struct winnow_session *session, uint32_t layer);
/* The layer's next span must be in force: it holds n_beyond tokens more, or a window made it due. */
bool winnow_seal_due(const struct winnow_session *session, uint32_t layer, uint32_t n_beyond);
/* A window has joined: what it made due is in force for the next call, whatever fails meanwhile. */
void winnow_seal_owe(struct winnow_session *session, uint32_t layer);

/* --- spill.c --- */
void winnow_spill_queue(struct winnow_core *core, struct winnow_segment *segment, uint32_t layer);
/* Starts writes while the pool is pressed or `wanted`, as staging allows. */
void winnow_spill_pump(struct winnow_core *core, bool wanted);
void winnow_spill_done(struct winnow_core *core, const struct winnow_store_done *done);

/* --- certificate.c --- */
void winnow_certificate_close(struct winnow_core *core, struct winnow_session *session);

/* A step may run many items: deadlines and certificates want to know how late it is. */
static inline int64_t winnow_core_clock(const struct winnow_core *core)
{
    return core->options.now ? core->options.now(core->options.now_arg) : winnow_clock_now_ns();
}

/* A decode step that may answer with the estimate of a block that is lost or late. */
static inline bool winnow_op_may_degrade(const struct winnow_session *session)
{
    return session->options.allow_degraded ||
           (session->op.request->attend.flags & WINNOW_ITEM_ALLOW_DEGRADED);
}

/* Where a launch lists blocks that have to be at home: a step of the device has no other use for ln_m. */
static inline uint32_t *winnow_device_disk_blocks(const struct winnow_run *run)
{
    return (uint32_t *)(void *)run->ln_m;
}

static inline uint32_t winnow_group_heads(const struct winnow_model_shape *shape)
{
    return shape->n_q_heads / shape->n_kv_heads;
}

static inline size_t winnow_dtype_bytes(uint32_t dtype)
{
    return dtype == WINNOW_FP32 ? 4 : 2;
}
