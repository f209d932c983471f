/*
 * What the kernels of a decode step see of device memory. Included by kernels/cuda alone, by C and
 * CUDA files; gpu.h is the contract outwards.
 *
 * A launch attends n_items items of one layer each. Item i and KV head h are **unit**
 * u = i x n_kv_heads + h. Stages, in stream order, each a kernel (stage.h):
 *
 *   scan    the index streamed once: ln_e of every block. Of the launch and the index alone.
 *           The last thread blocks meanwhile fetch what will probably be selected (ahead.cuh)
 *   tail    beside it: the units made; the new token joins its tail block; sinks and tail attended:
 *           partials 0 .. n_tail_groups - 1
 *   select  keys, histogram, threshold; selected blocks listed in list order; each resolved to a
 *           place (slot, stage, host) and the missing handed to the fetchers; groups queued
 *   attend  the first thread blocks fetch, the others attend groups and compensate chunks; the
 *           last of a unit joins its partials in order, verifies, and writes out; or, short of P,
 *           begins the unit's second round (more.cuh). The last of all writes the items'
 *           certificates, and the word that says the launch is complete
 *
 * A launch of whole items (mass 1) has no scan, and `whole` in select's place; no unit is short:
 *   whole   every block listed in order, resolved without an eviction; fetches and groups queued
 *
 * Partials of a unit stand in one order, which is the order of joining:
 *   tail groups (8 blocks: sinks, then tail by position), groups of 8 selected in list order,
 *   chunks of 512 unselected blocks compensated, with what the second round read of them
 * Which thread block made a partial, and whether a block came from a slot or from the host, is in
 * no bit of it.
 *
 * Index of a segment slot: [layer][KV head] of `unit_bytes`, n = S / 16 blocks:
 *   record [n / 8] of record_bytes: 8 blocks' codes (8 d' bytes each), centroids (d each), code
 *     scales (fp16 x 16 each), centroid scales (f32 each); d = k_width, d' = d rounded up to 64
 *     Codes in the order of mma.m16n8k32's A operand, u8 = code + 8, half = d' / 2:
 *     word (j, lane, i), j < d' / 64: key lane / 4 + 8 (i & 1); byte t holds dimension
 *     D + t in its low and half + D + t in its high nibble, D = 32 j + 16 (i >> 1) + 4 (lane & 3);
 *     dimensions from d on are code 0. Code scales: word g holds those of keys g and g + 8.
 *   vmean i8 [n][v_width], vmean_scale f32 [n], mean_v f32 [v_width],
 *   home u32 [n], loc u32 [n] (slot + 1, of the stage too, a hint; 0: none)
 * Block id, dense: ((segment slot x n_layers + layer) x n_kv_heads + head) x n + block.
 *
 * Slot word u64, the truth about a slot: block id + 1 in the high half, WINNOW_GPU_FETCHING, a
 * 31-bit stamp (number of the launch that used it last). Behind the cache's slots lie those of the
 * stage, in use for one launch: block id + 1 and the launch's stamp.
 *
 * Blocks are in layout 2 (kernels.h). Tail blocks: [session][layer][KV head][n_sink_blocks +
 * ring_blocks]; block number j of the context stands at j if it is a sink, else at
 * n_sink_blocks + (j - n_sink_blocks) % ring_blocks.
 */
#pragma once

#include <kernels/gpu.h>

enum {
    WINNOW_GPU_BINS = 1024,        /* of 1/64 nat, from the largest key down; the last is open */
    WINNOW_GPU_CHUNK_BLOCKS = 512, /* unselected blocks of one compensation partial */
    WINNOW_GPU_TAIL_GROUPS_MAX = 160,
    WINNOW_GPU_SCAN_RUNS_MAX = 64,
    WINNOW_GPU_READY_SLACK = 1024, /* ready is longer: attend looks where it may have work */
};
#define WINNOW_GPU_FETCHING   UINT64_C(0x80000000)
#define WINNOW_GPU_STAMP_MASK UINT64_C(0x7fffffff)
#define WINNOW_GPU_FROM_HOST  0x80000000u /* winnow_gpu_listed.place: a home, else a slot */
#define WINNOW_GPU_FROM_STAGE 0x80000000u /* winnow_gpu_fetch.home: a slot, else a home */

/* A selected block, in list order. A block found on disk stays listed, and selected is 0 again: it
 * is compensated. Slots are counted over all layers: layer x n_slots_layer + place in the layer. */
struct winnow_gpu_listed {
    uint32_t block; /* in the unit's list: segment x n + block */
    uint32_t place; /* slot, or WINNOW_GPU_FROM_HOST | home; WINNOW_GPU_ON_DISK: neither */
};

/* A block on its way from the host into a slot. */
struct winnow_gpu_fetch {
    uint32_t home, slot; /* from, to */
};

/* A group of a unit's list: listed 8 i .. 8 i + 7; or a chunk to compensate: its blocks 512 i ..
 * 512 i + 511; or what the second round does with a chunk. */
struct winnow_gpu_work {
    uint32_t unit;
    uint32_t idx; /* group, or one of these | chunk */
};
#define WINNOW_GPU_WORK_CHUNK 0x80000000u /* set in the next two as well */
#define WINNOW_GPU_WORK_FIND  0xc0000000u /* its unread blocks into the unit's bins */
#define WINNOW_GPU_WORK_AGAIN 0xa0000000u /* what the bins chose read, the rest compensated anew */
#define WINNOW_GPU_WORK_KINDS 0xe0000000u

/* Sums are u64 fixed point 2^-40 of exp(. - largest[g]), saturating, as in ref. */
struct winnow_gpu_unit {
    uint32_t item, head, layer, session;
    uint32_t status;        /* 0, or a positive errno: no stage works on it (of all its item's) */
    uint32_t n_blocks;      /* sealed, of its list */
    uint32_t block_first;   /* of its ln_e, key, selected, listed: view arrays at this block */
    uint32_t partial_first; /* of its partials */
    uint32_t n_tail_groups, n_groups;
    uint32_t n_chunks; /* set by tail, 1 at least; select queues them all. Whole: 1 if no block */
    uint32_t n_selected, n_more; /* of listed: the first round's, then the second's */
    uint32_t n_device, n_host, n_unfit, n_disk;
    uint32_t n_done;            /* partials of this round finished: the last joins */
    uint32_t more_end, more_of; /* second round: bins before this one, and so many blocks of it */
    float more_threshold;       /* and key_threshold before it */
    uint32_t has_unknown;       /* an unread block of unknown estimate: the certificate is 0 */
    /* Of the last selected (none: of the first), after a second round to a bin: 8 nats below is far. */
    float key_threshold;
    float key_quarter; /* the last quarter of the selected, at least 4: key < this, known */
    float key_largest; /* of the known; -inf: none is */
    float largest[WINNOW_GQA_MAX]; /* of ln_z, the mass of sinks and tail, and the known ln_e */
    uint64_t z[WINNOW_GQA_MAX], total[WINNOW_GQA_MAX]; /* exp(ln_z), and with all ln_e */
    uint64_t quarter_m[WINNOW_GQA_MAX], quarter_e[WINNOW_GQA_MAX]; /* of the last quarter: rho */
    float rho[WINNOW_GQA_MAX], mass[WINNOW_GQA_MAX];
    float logit_scale[WINNOW_GQA_MAX]; /* softmax_scale / the power of 2 in q_fragment */
    float need[WINNOW_GQA_MAX]; /* short: exp(ln_e - largest) that the second round has to add */
};

/* What is counted in before anything is cleared: 0 between launches, as who counts last or reads
 * leaves it. */
struct winnow_gpu_tally {
    uint32_t ticket_next, n_gone; /* of attend: tickets drawn; thread blocks that have ended */
    uint32_t scan_next[WINNOW_GPU_SCAN_RUNS_MAX]; /* records of each run that scan has taken */
    /* Beside it (ahead.cuh): blocks listed; thread blocks that have scanned; warps that have left */
    uint32_t n_foreseen, n_scanned, n_left;
};
struct winnow_gpu_unit_tally {
    uint32_t largest[WINNOW_GQA_MAX]; /* rank of the known ln_e: for select */
};

/*
 * Counters that stages hand each other; cleared by tail. Filled by select: blocks to fetch; ready
 * work, which is groups without a missing block and all chunks; and groups that wait for a block.
 */
struct winnow_gpu_queue {
    uint32_t n_fetch, n_ready, n_waiting;
    uint32_t fetch_next; /* taken by attend */
    uint32_t n_more;     /* work of second rounds, handed out by attend */
    uint32_t n_ended;    /* units whose output is written */
};

/* What a step leaves for its session's next in this layer and head. */
struct winnow_gpu_past {
    float ln_total[WINNOW_GQA_MAX];
    float key_foreseen; /* over these totals: a block from here on is foreseen; inf, NaN: none is */
};

struct winnow_gpu_launch {
    uint32_t n_items, n_units, stamp;
    uint32_t n_blocks; /* of all units together */
    /* Of the item's head 0; head h: + h x n_blocks. Dense: item 0 at 0, each begins where the last
     * ended, so that a block number of the launch names its unit. */
    uint32_t block_first[WINNOW_GPU_ITEMS_MAX];
    uint32_t partial_first[WINNOW_GPU_ITEMS_MAX]; /* likewise, in partials; a head takes the same */
    uint32_t partials_of_head[WINNOW_GPU_ITEMS_MAX];
    struct winnow_gpu_item item[WINNOW_GPU_ITEMS_MAX]; /* n_items of them are copied */
};

#ifdef __CUDACC__
#define WINNOW_GPU_ANYWHERE __host__ __device__
#else
#define WINNOW_GPU_ANYWHERE
#endif

/* Bits of a float that is a number to a rank that orders as it does; 0 is below all. */
WINNOW_GPU_ANYWHERE static inline uint32_t winnow_gpu_rank(uint32_t bits)
{
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Scratch of a unit that is built: the scale of its keys, ranks and places of its tokens. */
WINNOW_GPU_ANYWHERE static inline uint64_t winnow_gpu_build_scratch_bytes(uint32_t n_blocks)
{
    return 16 + UINT64_C(16) * n_blocks * (sizeof(uint32_t) + sizeof(uint16_t));
}

/* By value to every kernel. */
struct winnow_gpu_view {
    uint32_t n_layers, n_q_heads, n_kv_heads, n_group; /* n_group = G */
    uint32_t k_width, v_width, kv_dtype, io_dtype;
    float softmax_scale;
    uint32_t span_blocks, n_sink_blocks, ring_blocks, block_bytes;

    uint8_t *index;
    uint64_t segment_bytes;
    uint32_t unit_bytes, record_bytes, vmean_at, vmean_scale_at, mean_v_at, home_at, loc_at;

    uint8_t *slots;
    uint64_t *slot_word; /* [n_layers][n_slots_layer] */
    uint32_t n_slots_layer;
    uint32_t *hand;                       /* [n_layers] */
    struct winnow_gpu_counters *counters; /* [n_layers] */
    const uint8_t *host;                  /* the host arena as the device sees it; home x 4,096 */

    uint8_t *tails;
    uint64_t session_bytes;
    uint32_t *session_segments; /* [session][n_session_segments_max] segment slots */
    uint32_t n_session_segments_max;
    struct winnow_gpu_past *past; /* [session][layer][KV head] */
    uint64_t *ahead;           /* [n_stage] block id + 1, home: foreseen and in no slot; 0: none */
    uint32_t n_ahead, n_stage; /* thread blocks that fetch beside the scan, 0: none; slots */

    struct winnow_gpu_launch *launch;
    uint32_t *q_fragment; /* [unit] of winnow_gpu_q_fragment_words, written by tail */
    struct winnow_gpu_unit *unit;
    struct winnow_gpu_tally *tally;
    struct winnow_gpu_unit_tally *unit_tally; /* [unit] */
    struct winnow_gpu_queue *queue;
    float *ln_e;                      /* [block][G] */
    float *key;                       /* [block] */
    uint8_t *selected;                /* [block]: 0, 1, 2 (second round) */
    struct winnow_gpu_listed *listed; /* [block] */
    struct winnow_gpu_fetch *fetch;
    struct winnow_gpu_work *ready, *waiting;
    uint64_t *more; /* work of second rounds, 0: not there yet; all 0 between launches */
    uint32_t *bins; /* [unit][G + 1][WINNOW_GPU_BINS] second round: shares of T a head, counts */
    float *partial; /* [partial] of winnow_gpu_partial_floats */
    uint32_t n_fetchers;
    volatile uint32_t *done; /* pinned; gets the launch's stamp when all is written; or NULL */
};

/* The query heads of a unit as operand B of mma.m16n8k16, in kv_dtype, each head scaled by a power
 * of 2, in two halves that add up to it: [k_width / 16][part][32 lanes][2 words]. Up to 4 heads:
 * one part, column 2 g the high half of head g and 2 g + 1 the low; up to 8: part 0 the high
 * halves, a column a head, part 1 the low; up to 16: parts 2 and 3 of heads 8 to 15. */
WINNOW_GPU_ANYWHERE static inline uint32_t
winnow_gpu_q_fragment_words(const struct winnow_gpu_view *view)
{
    uint32_t n_parts = view->n_group <= 4 ? 1 : view->n_group <= 8 ? 2 : 4;
    return view->k_width / 16 * n_parts * 64;
}

/* A partial: {m, l of what was read, l of estimates, 0} of every head, then o [G][v_width]. */
WINNOW_GPU_ANYWHERE static inline uint32_t winnow_gpu_partial_at(const struct winnow_gpu_view *view)
{
    return 4 * view->n_group;
}

WINNOW_GPU_ANYWHERE static inline uint32_t
winnow_gpu_partial_floats(const struct winnow_gpu_view *view)
{
    return winnow_gpu_partial_at(view) + view->n_group * view->v_width;
}
