/*
 * A segment: S consecutive tokens of a context at fixed positions, all layers and KV heads, cut into
 * blocks. Immutable once a layer is in force; shared by forks through n_refs; a place for each block:
 *
 *   block i of a layer = KV head x n_blocks + builder's number (order on disk too)
 *   place[i]: pool slot + 1, or 0: not in memory
 *
 * The index of a (segment, layer) is one piece of index_memory; its header (this struct, layers,
 * sums) another.
 *
 * Thread: owner; work items read views of layers in force, write those being built.
 */
#pragma once

#include <core/arena.h>
#include <core/index_memory.h>
#include <kernels/kernels.h>
#include <stdbool.h>
#include <storage/store.h>

struct winnow_device;

/* What the core keeps blocks and index in; borrowed by every segment. */
struct winnow_tiers {
    struct winnow_arena *arena;
    struct winnow_index_memory *index;
    struct winnow_store *store;   /* NULL: memory alone */
    struct winnow_device *device; /* NULL: no GPU */
    bool spill_refused; /* the disk takes no more, until a segment gives its grains back */
    struct winnow_segment_layer *spill_first,
        **spill_last; /* in force, not on disk, oldest first */
};

struct winnow_segment;

struct winnow_segment_layer {
    struct winnow_segment *segment;
    struct winnow_segment_layer *next_spill;
    uint8_t *piece;      /* NULL: not built */
    bool in_force;       /* blocks have places */
    bool on_disk;        /* every block is written: clean */
    bool waits_to_spill; /* in the tiers' list */
    uint32_t n_places;   /* blocks in memory */
    uint32_t n_written;  /* blocks that a spill has sent, in disk order */
    uint32_t n_writes;   /* under way; while there are any, they hold a reference to the segment */
    bool write_failed;
    bool on_device; /* its index is; device.h */
};

struct winnow_segment {
    struct winnow_tiers *tiers;
    struct winnow_model_shape shape;
    uint32_t n_refs;
    uint32_t n_blocks; /* a layer and KV head: S / 16 */
    uint32_t block_bytes;
    bool with_var;
    uint64_t first_token;
    uint32_t device_slot;         /* + 1; 0: none */
    struct winnow_stored *stored; /* NULL: nothing spilled yet */
    uint32_t *block_crc; /* [n_layers][n_kv_heads x n_blocks]; the store's once it is stored */
    size_t header_bytes, piece_bytes;
    struct winnow_segment_layer layer[];
};

void winnow_tiers_init(struct winnow_tiers *tiers);

/* One reference. NULL: index_memory has no room. */
struct winnow_segment *winnow_segment_create(struct winnow_tiers *tiers,
                                             const struct winnow_model_shape *shape,
                                             uint32_t n_blocks, uint64_t first_token,
                                             bool with_var);
void winnow_segment_ref(struct winnow_segment *segment);
void winnow_segment_unref(struct winnow_segment *segment); /* the last frees slots, grains, index */

/* Takes the layer's piece of index_memory. 0; -EDQUOT. */
int winnow_segment_layer_take(struct winnow_segment *segment, uint32_t layer);
/* A build that came to nothing: gives the piece back. */
void winnow_segment_layer_give(struct winnow_segment *segment, uint32_t layer);

void winnow_segment_view(const struct winnow_segment *segment, uint32_t layer, uint32_t head,
                         struct winnow_index_view *view);
uint16_t *winnow_segment_order(const struct winnow_segment *segment, uint32_t layer, uint32_t head);
/* place [n_kv_heads x n_blocks] of the layer */
uint32_t *winnow_segment_place(const struct winnow_segment *segment, uint32_t layer);

/* Bytes of index_memory of one (segment, layer), and of a segment's header. */
size_t winnow_segment_piece_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks,
                                  bool with_var);
size_t winnow_segment_header_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks);

/* The arena's evict callback. */
void winnow_segment_evicted(void *segment, uint32_t block_idx);
