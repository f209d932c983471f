/*
 * A context: sinks, sealed segments, tail. Per layer it knows how many tokens it holds, how many
 * segments are in force, and the **resident** blocks of each KV head: sinks first, then the tail, in
 * position order, full but for the last.
 *
 *   tokens  [0, sinks) | segment 0 | segment 1 | ... | tail          (sinks + k S: segment k)
 *   resident block i starts at position 16 i, and past the sinks at 16 i + n_segments x S
 *
 * Full resident blocks may be shared with forks (their slots have several holders). A block is
 * written while this context alone holds it: before tokens join the last, part-filled one, and
 * before a span is repacked, what is shared is copied (a truncate may have cut a shared block).
 *
 * Thread: owner; work items write into blocks beyond `held`, which nobody reads.
 */
#pragma once

#include <core/segment.h>

struct winnow_context_layer {
    uint64_t held;       /* tokens */
    uint32_t n_segments; /* in force */
    uint32_t n_blocks;   /* resident, a KV head */
    uint32_t *slot;      /* [n_kv_heads][n_blocks_max] */
};

struct winnow_context {
    struct winnow_tiers *tiers;
    struct winnow_model_shape shape;
    uint32_t segment_tokens, n_sinks, n_blocks_max, n_segments_max;
    uint64_t n_tokens_max;
    bool with_var;
    struct winnow_segment **segment; /* [n_segments_max]; one reference each */
    struct winnow_context_layer layer[];
};

/* n_blocks_max: resident blocks a layer and KV head. NULL: no memory. */
struct winnow_context *winnow_context_create(struct winnow_tiers *tiers,
                                             const struct winnow_model_shape *shape,
                                             uint32_t segment_tokens, uint32_t n_sinks,
                                             uint64_t n_tokens_max, uint32_t n_window_max,
                                             bool with_var);
void winnow_context_destroy(struct winnow_context *context); /* NULL is fine */

/* Least of the layers' held, and of their sealed tokens. */
uint64_t winnow_context_held(const struct winnow_context *context);
uint64_t winnow_context_sealed(const struct winnow_context *context);

/* Makes a resident block that forks share this context's own, by copy. 0; -EAGAIN: no room now. */
int winnow_context_own(struct winnow_context *context, uint32_t layer, uint32_t head,
                       uint32_t block_idx, uint64_t keep_bytes);
/* Takes resident blocks for n more tokens, every KV head; a part-filled last block becomes the
 * context's own. 0; -EAGAIN: no room now. keep_bytes: winnow_arena_take. */
int winnow_context_grow(struct winnow_context *context, uint32_t layer, uint32_t n_tokens,
                        uint64_t keep_bytes);
/* Gives back resident blocks beyond what n_held tokens need. */
void winnow_context_shrink(struct winnow_context *context, uint32_t layer, uint64_t n_held);

/* Place of a position among the layer's resident blocks. */
uint32_t winnow_context_block_of(const struct winnow_context *context, uint32_t layer,
                                 uint64_t position);
uint64_t winnow_context_position_of(const struct winnow_context *context, uint32_t layer,
                                    uint32_t block_idx);
void *winnow_context_block(const struct winnow_context *context, uint32_t layer, uint32_t head,
                           uint32_t block_idx);
uint32_t *winnow_context_slot(const struct winnow_context *context, uint32_t layer, uint32_t head,
                              uint32_t block_idx);

/* First token after span k (the one that is not in force yet): sinks + (n_segments + 1) S. */
uint64_t winnow_context_span_end(const struct winnow_context *context, uint32_t layer);

/* The S / 16 blocks of the span leave the layer's resident ones for segment n_segments, which is in
 * force from here on: places are set, slots become dirty cache. */
void winnow_context_seal(struct winnow_context *context, uint32_t layer);

/* The layer's last segment is out of force; its first tokens, up to n_tokens, are resident again:
 * slot [n_kv_heads][blocks of them], one holder each, taken over. Later tokens are dropped. */
void winnow_context_unseal(struct winnow_context *context, uint32_t layer, uint64_t n_tokens,
                           const uint32_t *slot);

/* Cuts every layer to min(held, n_tokens): a segment that ends beyond goes whole (unseal it first
 * to keep its first tokens). Segments no layer has in force are unreferenced. */
void winnow_context_cut(struct winnow_context *context, uint64_t n_tokens);

/* All layers hold the same tokens and have the same segments in force: the context can be forked. */
bool winnow_context_is_level(const struct winnow_context *context);
/* Slots that a fork takes: for each layer and KV head, when the last block is part-filled. */
uint32_t winnow_context_fork_copies(const struct winnow_context *context);
/* Of a level context into an empty one of its shape: shares segments and full resident blocks,
 * copies the part-filled ones into slot [fork_copies], one holder each, taken over. */
void winnow_context_fork(const struct winnow_context *from, struct winnow_context *to,
                         const uint32_t *slot);
