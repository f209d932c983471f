/*
 * Device: decode steps that a GPU takes (kernels/gpu.h). The host keeps all it keeps without one,
 * index and blocks; the device gets copies, lazily, before the launch that needs them:
 *
 *   index of a segment's layer   when it comes into force; else when a step first sees it
 *   homes of its blocks          those that the cache admitted or evicted since the last launch
 *   tail blocks                  those that tokens joined without the device (windows, truncate, fork)
 *
 * So a lost device loses nothing: its sessions' steps, the one under way too, are the CPU's from
 * then on (same blocks, block layout 2, same index). The CPU also takes what launches do not: sparse
 * steps of other policies than `codes`. Heavy heads are its notion: a launch selects
 * theirs like any other's.
 *
 * Whole reads (mass 1, short contexts, a strict step that stayed short) are launches of their own,
 * which evict nothing from the device's cache. Few of their blocks may be away: those are read before the
 * launch; of many the CPU's way streams past the cache (rule 3).
 *
 * Exact windows go there in parts (parts.c): every block, pinned or staged, crosses the link once for all
 * the positions of a pass, and no slot is asked or filled: attending 2,048 positions takes longer than
 * the link does. One window at a time, of as many positions as a sixteenth of the memory holds.
 *
 * Spans of its sessions are built there too (build.c), while steps go on; the index comes back to
 * the host's place for it. Jobs that a lost device leaves are the lane's.
 *
 * A step is launched as soon as the loop sees it; what waits together goes together. Selected blocks
 * that lie on disk are reported, read into the cache and pinned, and the step is launched again: its
 * selection is the same, so are its bits. Rejected: a mailbox that kernels fill (decisions/0007): it
 * saves a second scan and selection, 25 us at 32K tokens, for a thread that never sleeps.
 *
 * While a launch is out it may read any block at home: the arena evicts nothing then.
 *
 * One model shape at a time, that of the first session; the device's memory is carved anew when the
 * last of them has gone. Thread: owner.
 */
#pragma once

#include <core/core.h>

struct winnow_session;
struct winnow_segment;
struct winnow_item;
struct winnow_arena;

enum { WINNOW_N_LAUNCHES = 2, WINNOW_N_PARTS = 2 }; /* out at once */

struct winnow_launch {
    int64_t ticket; /* 0: none */
    uint32_t n;
    struct winnow_session *session[WINNOW_GPU_ITEMS_MAX];
    struct winnow_gpu_certificate certificate[WINNOW_GPU_ITEMS_MAX];
};

/* A layer's span that the device builds. */
struct winnow_build {
    int64_t ticket;
    uint32_t n_items;          /* 0: free */
    struct winnow_item **item; /* [n_kv_heads] one a head, in order */
};

/* Numbers below n that are taken and given back. */
struct winnow_slots {
    uint32_t n_free;
    uint32_t *free; /* [n] */
};

struct winnow_device {
    const struct winnow_gpu_api *api;
    struct winnow_gpu_device *device;
    struct winnow_gpu *gpu; /* NULL: no session is open */
    struct winnow_gpu_options shape_options;
    uint64_t n_shapes;    /* served, this one included */
    char shape_text[256]; /* how memory is divided for it */
    uint64_t memory_bytes;
    bool lost;
    uint32_t n_sessions;
    struct winnow_slots session_slots, segment_slots;
    struct winnow_launch launch[WINNOW_N_LAUNCHES];
    uint32_t launch_first, n_launches; /* oldest out */
    struct winnow_build build[WINNOW_GPU_BUILDS_MAX];
    uint32_t n_builds;             /* out */
    struct winnow_session *window; /* whose window is attended; NULL: none is */
    struct winnow_gpu_window_rows rows;
    uint32_t n_parts; /* out, oldest first */
    int64_t part[WINNOW_N_PARTS];
    struct winnow_session **waiting; /* [n_runs_max] */
    uint32_t n_waiting;
    struct winnow_gpu_item item[WINNOW_GPU_ITEMS_MAX];
    struct winnow_index_view *views; /* [n_kv_heads] */
    uint16_t **order;                /* the same */
    uint32_t *homes;                 /* [n_kv_heads][S / 16] */
    struct winnow_segment **segment; /* [n_segments_max] that has the slot */
    struct winnow_gpu_home *moved; /* [n of one call] blocks whose home the device has not heard */
    uint32_t n_moved;
    const void **tail;       /* [blocks put at once][n_kv_heads] */
    uint32_t *part_home;     /* [n_kv_heads][n_window_blocks] of the part that is sent */
    uint32_t *part_blocks;   /* [n_kv_heads] */
    uint64_t *part_position; /* [n_window_blocks] */
    uint32_t *part_tokens;   /* the same */
};

/* --- device.c --- */
/* With the options' gpu, over the core's arena. 0; or with a line in text what gpu.open returns. */
int winnow_device_create(struct winnow_core *core, struct winnow_device **ret_device,
                         char text[256]);
void winnow_device_destroy(struct winnow_device *device); /* NULL is fine */

/* A new session of this shape would have its steps taken: its blocks are of layout 2. */
bool winnow_device_wants(const struct winnow_core *core, const struct winnow_model_shape *shape,
                         const struct winnow_session_options *options);
/* How memory would be divided for such sessions, a line; false: there is no room. */
bool winnow_device_plan(const struct winnow_core *core, const struct winnow_model_shape *shape,
                        char text[256]);
/* Takes a slot for the session, as far as there is one. */
void winnow_device_join(struct winnow_core *core, struct winnow_session *session);
void winnow_device_leave(struct winnow_core *core, struct winnow_session *session);
/* The segment's layer is in force: the session's steps will ask for it. */
void winnow_device_segment_ready(struct winnow_core *core, struct winnow_session *session,
                                 struct winnow_segment *segment, uint32_t layer);
/* The segment's last holder goes. device: NULL is fine where the segment has no slot. */
void winnow_device_segment_end(struct winnow_device *device, struct winnow_segment *segment);
/* A block got a place in the arena or lost it. device: NULL is fine. */
void winnow_device_block_moved(struct winnow_device *device, struct winnow_segment *segment,
                               uint32_t block_idx);

/* Of all layers of the shape it serves; zeros where there is none. Waits for launches. */
void winnow_device_counters(struct winnow_device *device, struct winnow_gpu_counters *sum);

/* Everything that the step's launch reads is brought there; the item says what is left to append.
 * 0; -EDQUOT: the device has no room; -EIO. */
int winnow_device_sync(struct winnow_core *core, struct winnow_session *session,
                       struct winnow_gpu_item *item, struct winnow_gpu_certificate *certificate);
/* Of a place (segment.h) in the arena, and of a block's bytes there. */
uint32_t winnow_device_home(const struct winnow_arena *arena, uint32_t place);
uint32_t winnow_device_home_of(const struct winnow_arena *arena, const void *data);
/* When the last session has gone, its segments with it, the memory is for the next shape. */
void winnow_device_shape_end(struct winnow_device *device);

/* --- launch.c --- */
/* The step, its token appended: true when the device takes it. */
bool winnow_device_begin(struct winnow_core *core, struct winnow_session *session);
/* The device's answer will not do (strict, and short): the layer is read whole, by it or the CPU. */
void winnow_device_refuse(struct winnow_core *core, struct winnow_session *session);
/* A step in WINNOW_OP_DEVICE or WINNOW_OP_DEVICE_READ. True: the CPU goes on with it. */
bool winnow_device_advance(struct winnow_core *core, struct winnow_session *session);
/* Launches what waits, takes what is complete. True: something was. */
bool winnow_device_poll(struct winnow_core *core);
/* Nothing that is out will come back: the CPU takes all of it. */
void winnow_device_lose(struct winnow_core *core);
/* Polls for as long as a launch may take whose end is worth waiting for here. True: something was. */
bool winnow_device_spin(struct winnow_core *core);
/* Launches or builds are out: the loop should come again at once. */
bool winnow_device_busy(const struct winnow_device *device); /* NULL is fine */
bool winnow_device_lost(const struct winnow_device *device); /* NULL is fine */

/* --- parts.c: exact windows --- */
/* The window is the device's, if it takes any. False: it has another; it will be free. */
bool winnow_parts_take(struct winnow_core *core, struct winnow_session *session);
bool winnow_parts_taken(const struct winnow_core *core, const struct winnow_session *session);
/* The window has ended, or goes on without the device. Nothing where it was not taken. */
void winnow_parts_give(struct winnow_core *core, struct winnow_session *session);
/* The pass's queries stand in the device's rows: sends what can be sent; each part is one of the op's
 * items. True: the rows hold the result. */
bool winnow_parts_advance(struct winnow_core *core, struct winnow_session *session);
/* Takes what is complete. True: something was, or the device is lost. */
bool winnow_parts_poll(struct winnow_core *core);
void winnow_parts_lose(struct winnow_core *core); /* nothing that is out will come back */

/* --- build.c --- */
/* The session's spans are built by the device. */
bool winnow_builds_by_device(const struct winnow_core *core, const struct winnow_session *session);
/* A job that is free; NULL: all are out. It is taken with the first item added. */
struct winnow_build *winnow_build_take(struct winnow_core *core);
/* The next head's item, with lane, run and done as it would be submitted with: its done is called
 * when the job is complete, or it is submitted when the device is lost. */
void winnow_build_add(struct winnow_build *build, struct winnow_item *item);
/* Every head's item was added. */
void winnow_build_send(struct winnow_core *core, struct winnow_build *build);
/* Takes what is complete; wait: all of it. True: something was, or the device is lost. */
bool winnow_builds_poll(struct winnow_core *core, bool wait);
void winnow_builds_to_lane(struct winnow_core *core); /* the device is lost */
