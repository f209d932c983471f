// Spill: sealed layers go to disk when the pool passes 80 %, oldest first, so that their slots can be
// reused. All of them: a rejected rule, to write only while what cannot be evicted passes 80 %, left
// 14 MiB of a 30 MiB pool to dirty blocks, and a token's steps missed 1,350 blocks instead of 660. A layer's blocks are copied into staging in disk order and written from there: one
// sequential write serves slots that lie anywhere. Only when every write of a layer has completed are
// its blocks clean, and only clean blocks are ever evicted.
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <string.h>

enum { N_SPILLS_MAX = 2 };
static const uint64_t SPILL_TAG = UINT64_C(1)
                                  << 62; /* tells writes from reads; the rest: address */

void winnow_spill_queue(struct winnow_core *core, struct winnow_segment *segment, uint32_t layer)
{
    struct winnow_segment_layer *state = &segment->layer[layer];
    winnow_assert(state->in_force);
    winnow_assert(!state->on_disk);
    winnow_assert(!state->waits_to_spill);
    winnow_assert(state->n_written == 0);
    winnow_assert(state->n_writes == 0);
    winnow_assert(state->n_places == segment->shape.n_kv_heads * segment->n_blocks);
    winnow_assert(*core->tiers.spill_last == NULL);
    state->waits_to_spill = true;
    state->next_spill = NULL;
    *core->tiers.spill_last = state;
    core->tiers.spill_last = &state->next_spill;
}

/* A write under way: a piece of staging and the layer whose blocks it holds. */
static uint64_t spill_tag(const struct winnow_core *core, const void *piece)
{
    size_t n_bytes;
    uint64_t offset = (uint64_t)((const uint8_t *)piece -
                                 (uint8_t *)winnow_arena_base(core->tiers.arena, &n_bytes));
    winnow_assert(offset % WINNOW_STAGING_BYTES == 0);
    winnow_assert(offset / WINNOW_STAGING_BYTES < winnow_arena_staging_pieces(core->tiers.arena));
    return SPILL_TAG | offset / WINNOW_STAGING_BYTES;
}

static int stored_prepare(struct winnow_core *core, struct winnow_segment *segment)
{
    if (segment->stored)
        return 0;
    return winnow_store_segment_create(core->tiers.store, segment->shape.n_layers,
                                       segment->shape.n_kv_heads * segment->n_blocks,
                                       segment->block_bytes, segment->block_crc, &segment->stored);
}

/* Copies blocks [first, first + n) of the layer into the piece and writes them. */
static int piece_write(struct winnow_core *core, struct winnow_segment_layer *state, uint32_t first,
                       uint32_t n, uint8_t *piece)
{
    struct winnow_segment *segment = state->segment;
    uint32_t layer = (uint32_t)(state - segment->layer);
    uint32_t blocks_per_layer = segment->shape.n_kv_heads * segment->n_blocks;
    winnow_assert(first + n <= blocks_per_layer);
    winnow_assert((size_t)n * segment->block_bytes <= WINNOW_STAGING_BYTES);
    const uint32_t *place = winnow_segment_place(segment, layer);
    for (uint32_t i = 0; i < n; i++) {
        winnow_assert(place[first + i]); /* dirty: not evicted */
        memcpy(piece + (size_t)i * segment->block_bytes,
               winnow_arena_data(core->tiers.arena, place[first + i] - 1), segment->block_bytes);
    }
    int rc = winnow_store_write(core->tiers.store, segment->stored,
                                layer * blocks_per_layer + first, n, piece, spill_tag(core, piece));
    if (rc < 0)
        return rc;
    core->spill_of_piece[spill_tag(core, piece) & ~SPILL_TAG] = state;
    if (state->n_writes++ == 0) {
        winnow_segment_ref(segment);
        core->n_spills++;
    }
    return 0;
}

static void layer_clean(struct winnow_core *core, struct winnow_segment_layer *state)
{
    struct winnow_segment *segment = state->segment;
    winnow_assert(!state->on_disk);
    winnow_assert(state->n_places == segment->shape.n_kv_heads * segment->n_blocks);
    uint32_t *place = winnow_segment_place(segment, (uint32_t)(state - segment->layer));
    state->on_disk = true;
    for (uint32_t i = 0; i < segment->shape.n_kv_heads * segment->n_blocks; i++)
        winnow_arena_clean(core->tiers.arena, place[i] - 1);
}

/* Sends the layer's next pieces. 0: all are sent; -EAGAIN: staging is out; -errno: writes refused. */
static int layer_write(struct winnow_core *core, struct winnow_segment_layer *state)
{
    struct winnow_segment *segment = state->segment;
    uint32_t n_all = segment->shape.n_kv_heads * segment->n_blocks;
    uint32_t n_piece = WINNOW_STAGING_BYTES / segment->block_bytes;
    winnow_assert(n_piece > 0);
    winnow_assert(state->n_written <= n_all);
    while (state->n_written < n_all) {
        uint8_t *piece = winnow_arena_staging_take(core->tiers.arena);
        if (!piece)
            return -EAGAIN;
        uint32_t n = n_all - state->n_written < n_piece ? n_all - state->n_written : n_piece;
        int rc = piece_write(core, state, state->n_written, n, piece);
        if (rc < 0) {
            winnow_arena_staging_give(core->tiers.arena, piece);
            return rc;
        }
        state->n_written += n;
    }
    return 0;
}

void winnow_spill_pump(struct winnow_core *core, bool wanted)
{
    struct winnow_tiers *tiers = &core->tiers;
    core->spill_grows = false;
    if (!tiers->store || tiers->spill_refused)
        return;
    while (tiers->spill_first &&
           (wanted || tiers->spill_first->n_written || winnow_arena_pressed(tiers->arena))) {
        struct winnow_segment_layer *state = tiers->spill_first;
        winnow_assert(state->waits_to_spill);
        winnow_assert(!state->on_disk);
        if (state->n_written == 0 && core->n_spills >= N_SPILLS_MAX)
            return;
        int rc = stored_prepare(core, state->segment);
        core->spill_grows = rc == -EAGAIN;
        if (rc == 0)
            rc = layer_write(core, state);
        if (rc < 0) { /* at the cap, or degraded: until a segment gives its grains back */
            tiers->spill_refused = rc != -EAGAIN;
            return;
        }
        tiers->spill_first = state->next_spill;
        if (!tiers->spill_first)
            tiers->spill_last = &tiers->spill_first;
        state->waits_to_spill = false;
        wanted = false;
    }
}

/* A layer that could not be written waits for its turn again; the store gives up, not the core. */
static void layer_again(struct winnow_core *core, struct winnow_segment_layer *state)
{
    state->write_failed = false;
    state->n_written = 0;
    winnow_spill_queue(core, state->segment, (uint32_t)(state - state->segment->layer));
}

void winnow_spill_done(struct winnow_core *core, const struct winnow_store_done *done)
{
    size_t n_bytes;
    uint64_t piece_idx = done->tag & ~SPILL_TAG;
    uint8_t *base = winnow_arena_base(core->tiers.arena, &n_bytes);
    winnow_assert(piece_idx < winnow_arena_staging_pieces(core->tiers.arena));
    struct winnow_segment_layer *state = core->spill_of_piece[piece_idx];
    struct winnow_segment *segment = state->segment;
    winnow_assert(state->n_writes > 0);
    winnow_assert(core->n_spills > 0);
    winnow_assert(segment->n_refs > 0);
    winnow_assert(!done->held); /* a write has no deadline */
    core->stats.written_bytes += done->disk_bytes;
    winnow_arena_staging_give(core->tiers.arena, base + piece_idx * WINNOW_STAGING_BYTES);
    state->write_failed |= done->result < 0;
    if (--state->n_writes > 0)
        return;
    core->n_spills--;
    bool complete = state->n_written == segment->shape.n_kv_heads * segment->n_blocks;
    if (complete && state->write_failed)
        layer_again(core, state);
    else if (complete)
        layer_clean(core, state);
    winnow_segment_unref(segment);
}
