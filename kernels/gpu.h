/*
 * The contract of the GPU: a decode step in which the CPU takes no part.
 *
 * kernels.h's table is functions over plain host arrays; a GPU wants its data resident and one
 * launch for all heads of many sessions. So it has a contract of its own: device memory that holds
 * index, tails and a cache of blocks, filled once, and `decode`, which attends a batch of items of
 * one layer. Results are those of kernels.h, held against ref/ by tests/kernels, with tolerances
 * and one difference: selection goes by bins of 1/64 nat (below).
 *
 * winnow_cuda.so exports winnow_gpu_find; kernels/gpu.c loads it, so that one binary runs with and
 * without a driver. A **device** is opened once, with all the memory it may ever use; a **gpu** serves
 * one model shape and carves what it needs out of it; everything there is an index: slots, segment
 * slots, session slots.
 *
 * Device memory of a gpu
 *   index     segment slots: the index of S tokens, all layers and KV heads, device layout
 *   slots     the cache: blocks of layout 2, shared by layers, heads and sessions; a hand a layer
 *   tails     session slots: sinks, and a ring of tail blocks, of every layer and KV head
 *   scratch   estimates, lists and partials of one launch, and a stage for blocks that it fetches
 *             before it has selected
 *   builds    keys, values and results of the jobs that are out
 *   window    queries, outputs and sums of one window, blocks of two parts of it
 * Every sealed block has a **home**: its offset in the host arena in pages of 4,096 bytes, or
 * WINNOW_GPU_ON_DISK.
 *
 * Selection: the key of a block is ln of its summed share, as in kernels.h; the prefix ends at a
 * bin of 1/64 nat, so it is the shortest such prefix that serves every query head: a superset of
 * ref's by the rest of one bin (of real attention 1 % more blocks: test_gpu_scan).
 *
 * A **whole** item, mass 1, has no selection: all is attended, sinks and tail, then every sealed block
 * in list order. It finds blocks in slots and puts others into slots that are empty; it evicts none,
 * and what it puts there goes before anything else: a whole read that took its place like a sparse one
 * would sweep the cache. A launch's items are all whole or none is.
 *
 * Thread: one owner a gpu; calls return at once but where "waits" is said. After a call returned
 * -EIO (a sticky error: the context is lost) every further call but destroy returns -EIO.
 */
#pragma once

#include <kernels/kernels.h>
#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    WINNOW_GPU_ITEMS_MAX = 256,
    WINNOW_GPU_BUILDS_MAX = 4,        /* jobs out at once */
    WINNOW_GPU_ON_DISK = 0xffffffffu, /* a home: not in the host arena */
};

struct winnow_gpu_device; /* opaque */
struct winnow_gpu;

struct winnow_gpu_options {
    struct winnow_model_shape shape; /* fp16 or bf16 at rest, block_layout 2 */
    uint32_t segment_tokens;         /* S: a multiple of 128 */
    uint32_t n_sinks;                /* a multiple of 16, at most 64 */
    uint32_t n_segments_max;         /* segment slots */
    uint32_t n_sessions_max;         /* session slots */
    uint32_t n_session_segments_max; /* of one context */
    uint32_t n_slots;                /* the cache, in blocks; divided evenly over layers */
    uint32_t n_items_max;            /* of a launch, at most WINNOW_GPU_ITEMS_MAX */
    uint64_t n_launch_blocks_max;    /* sealed blocks a head, summed over the items of a launch */
    uint32_t n_fetchers;             /* thread blocks that fetch; 0: 16. No result depends on it */
    uint32_t n_window_positions;     /* of a window; 0: none is attended */
    uint32_t n_window_blocks;        /* of a part of one, a KV head */
};

/* What create would reserve. */
struct winnow_gpu_sizes {
    uint64_t index_bytes, tail_bytes, cache_bytes, scratch_bytes, build_bytes, window_bytes;
    uint64_t other_bytes;
    uint64_t segment_bytes, session_bytes; /* of one slot */
    uint64_t window_host_bytes;            /* pinned, not of the device */
};

/* Of one item, from the kernels: winnow_core_certificate's figures. */
struct winnow_gpu_certificate {
    uint32_t status;   /* 0, or a positive errno: EDOM (non-finite result), EIO (a bad index) */
    uint32_t n_rounds; /* 1, or 2: some head was short and read more */
    float mass_reached, mass_mean;           /* least over query heads; mean */
    uint32_t n_blocks_device, n_blocks_host; /* selected, by where they were found */
    uint32_t n_blocks_unfit; /* of those on the host, attended from there: no slot was free */
    uint32_t n_blocks_disk;  /* selected, on disk: compensated; a head with such has one round. Of a
                                whole item: left out, and the mass is 0 */
    uint32_t n_heads_spent;  /* KV heads whose selection is the budget */
};

/* One decode item. q, k, v are host memory of any kind, copied by decode; out, lse and certificate
 * are written by the poll that says the launch is complete. k, v of the new token NULL: nothing is
 * appended. Lengths are after the append. */
struct winnow_gpu_item {
    uint32_t session, layer;
    uint32_t n_segments;   /* in force in this layer */
    uint64_t n_tokens;     /* held by this layer */
    float mass;            /* 0 < P <= 1; 1: whole */
    uint32_t n_blocks_max; /* budget a KV head; 0: none, as of a whole item */
    const void *q, *k, *v; /* io_dtype, as a winnow_request's attend */
    void *out;             /* [Hq][v_width] io_dtype; NaN when status is not 0 */
    float *lse;            /* [Hq], or NULL */
    struct winnow_gpu_certificate *certificate;
    /* Written when n_blocks_disk is not 0: all selected that no slot holds, n_blocks_disk and
     * n_blocks_unfit of them, head x list + block, as many as fit; NULL: not wanted. Read those on
     * disk into the arena, keep the others there, set homes and decode again without k, v: the same
     * selection, all attended. */
    uint32_t *disk_block, n_disk_block_max;
};

static_assert(sizeof(struct winnow_gpu_certificate) == 36, "device and host agree on it");

struct winnow_gpu_home { /* of a block: (layer x n_kv_heads + head) x S/16 + its number */
    uint32_t segment_slot, block, home;
};

/* Where a window's queries stand before its first part, fp32, and its result after the last: host
 * memory of the gpu's. */
struct winnow_gpu_window_rows {
    float *q;   /* [n_kv_heads][n_window_positions][G][k_width] */
    float *out; /* [n_kv_heads][n_window_positions][G][v_width], in q's place */
    float *lse; /* [n_kv_heads][n_window_positions][G] */
};

/* A part of a window: blocks that its queries attend next. */
struct winnow_gpu_window_part {
    bool is_first, is_last;
    uint32_t n_pos; /* of the window: query positions first, first + 1, ... */
    uint64_t first;
    const uint32_t *n_blocks; /* [n_kv_heads]: whole groups of 8, but in the last part */
    const uint32_t *homes;    /* [n_kv_heads][n_window_blocks], in the arena */
    /* Of each block [n], rising, the same of all heads: its first token's position, seen causally,
     * and how many it has. NULL: full blocks sealed before the window, which all queries see. */
    const uint64_t *position;
    const uint32_t *n_tokens;
};

struct winnow_gpu_counters { /* since create, of one layer; whole items are not counted */
    uint64_t n_hits, n_misses, n_evictions, n_unfit;
    uint64_t n_ahead, n_ahead_used; /* fetched before selection; of them selected: misses too */
};

struct winnow_gpu_api {
    const char *name; /* "cuda" */

    /* 0, or -ENODEV (no driver, no device of that number), -ENOTSUP (compute capability below 8.0);
     * a line in text: the device's name, driver, memory, or what is missing. */
    int (*probe)(uint32_t device_ordinal, char text[256]);
    /* 0, or -EINVAL, -EOVERFLOW with a line in text. Touches no device. */
    int (*sizes)(const struct winnow_gpu_options *, struct winnow_gpu_sizes *, char text[256]);
    /* Reserves memory_bytes of the device and registers the host arena (a page, 4,096 bytes, is its
     * unit; at most 8 TiB), whose pages kernels read from here on: it stays mapped until close.
     * Waits. 0; -EINVAL, -ENODEV, -ENOTSUP, -ENOMEM (what was short in text), -EIO. */
    int (*open)(uint32_t device_ordinal, uint64_t memory_bytes, void *host_arena,
                uint64_t host_arena_bytes, struct winnow_gpu_device **ret_device, char text[256]);
    void (*close)(struct winnow_gpu_device *); /* its gpus are destroyed. NULL is fine */
    /* Out of the device's memory. Waits. 0; -EINVAL, -ENOMEM (the sum and what is left in text),
     * -EIO. */
    int (*create)(struct winnow_gpu_device *, const struct winnow_gpu_options *,
                  struct winnow_gpu **ret_gpu, char text[256]);
    /* Waits for what runs; its memory is the device's again. NULL is fine. */
    void (*destroy)(struct winnow_gpu *);

    /* Index of one layer of a segment slot, from views [n_kv_heads] in kernels.h's layout, and the
     * homes [n_kv_heads][S / 16] of its blocks; what the cache held of it is dropped. Waits for
     * the copy of the arguments only; later launches see it. 0; -EINVAL (an index out of range,
     * a home beyond the arena: nothing done), -EIO. So are the errors of the next four. */
    int (*segment_put)(struct winnow_gpu *, uint32_t segment_slot, uint32_t layer,
                       const struct winnow_index_view *views, const uint32_t *homes);
    /* New homes of n blocks of any segments, for later launches. Named twice: the same home. */
    int (*homes_set)(struct winnow_gpu *, uint32_t n, const struct winnow_gpu_home *homes);
    /* The cache forgets a segment whose slot is to be used anew. */
    int (*segment_drop)(struct winnow_gpu *, uint32_t segment_slot);
    /* Segment slots of a session's context, in order. */
    int (*session_set)(struct winnow_gpu *, uint32_t session, uint32_t n_segments,
                       const uint32_t *segment_slots);
    /* n blocks (layout 2) of the sinks and tail of one layer: block numbers [n] of the context
     * (position / 16), data [n][n_kv_heads] pointers to host memory. A tail of S + 512 tokens has
     * room; a later block takes the place of one that far before. */
    int (*tail_put)(struct winnow_gpu *, uint32_t session, uint32_t layer, uint32_t n,
                    const uint32_t *block_number, const void *const *data);

    /* Attends n items of any sessions and of one layer each (a session at most once), all whole or
     * none. `items` is copied. A ticket > 0; -EINVAL (an argument out of range, nothing done), -EBUSY (two
     * launches are out), -EIO. */
    int64_t (*decode)(struct winnow_gpu *, uint32_t n_items, const struct winnow_gpu_item *items);
    /* 1: that launch and all before it are complete, their certificates are written. 0: not yet.
     * -EIO. wait: waits for it. */
    int (*poll)(struct winnow_gpu *, int64_t ticket, bool wait);

    /*
     * A job: one layer's span of a segment is clustered and indexed, beside what decode does and
     * after it where both want the same (streams of the lowest priority).
     *   homes [n_kv_heads][S / 16]: the span's blocks in position order, full, finite, in the
     *     arena; the job reads them until it is complete
     * A ticket > 0; -EINVAL (a home beyond the arena or on disk), -EBUSY (BUILDS_MAX are out), -EIO.
     */
    int64_t (*build)(struct winnow_gpu *, const uint32_t *homes);
    /* 1: complete, the job is gone; written are, as kernels.h's build says,
     *   order [n_kv_heads] -> [S], views [n_kv_heads] of S / 16 blocks, host memory; var NULL
     * 0: not yet. Any order of jobs. wait: waits for it. -EINVAL (no such job, or views), -EIO:
     * nothing is written.
     * The same blocks give the same bits, which need not be those of another version: the promises
     * of ref's build hold (permutation, blocks of 16 in position order, index of its own members,
     * summed variance ref's: at most 1.03 times, 1.005 on average). */
    int (*build_poll)(struct winnow_gpu *, int64_t ticket, bool wait, uint16_t *const *order,
                      const struct winnow_index_view *views);

    /*
     * A window: exact attention of many query positions of one layer, as kernels.h's attend_window
     * and finish, over the blocks of its parts one after the other. One window at a time: a first
     * part begins it, whatever became of the one before; the rows stand when it is called.
     */
    void (*window_rows)(struct winnow_gpu *, struct winnow_gpu_window_rows *);
    /* Arguments are copied. A ticket > 0; -EINVAL (out of range, a home beyond the arena, a part
     * that does not go on where the one before ended: nothing done), -EBUSY (two parts are out),
     * -EIO. Where a window is cut into parts is in no bit of its result. */
    int64_t (*window)(struct winnow_gpu *, const struct winnow_gpu_window_part *);
    /* 1: that part and all before it have read their blocks; of a last part: rows hold the result.
     * 0: not yet. wait: waits for it. -EINVAL (no such part), -EIO. */
    int (*window_poll)(struct winnow_gpu *, int64_t ticket, bool wait);

    int (*counters)(struct winnow_gpu *, uint32_t layer, struct winnow_gpu_counters *); /* waits */
    /* The plain entries of kernels.h over host memory, each a launch that waits: tests, oracles. An
     * error of CUDA in one of them ends the program. */
    const struct winnow_kernels *(*kernels)(void);
};

/* Of winnow_cuda.so, by dlopen: path NULL: beside this program, then the loader's search. NULL with
 * a line in text: not there, or its contract is another version. The library stays loaded. */
const struct winnow_gpu_api *winnow_gpu_load(const char *path, char text[256]);

enum { WINNOW_GPU_API_VERSION = 3 };
/* The symbol that winnow_cuda.so exports; NULL: it has another version. */
const struct winnow_gpu_api *winnow_gpu_find(uint32_t version);

#ifdef __cplusplus
}
#endif
