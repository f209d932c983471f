#include <base/alloc.h>
#include <base/assert.h>
#include <core/context.h>
#include <errno.h>
#include <string.h>

struct winnow_context *winnow_context_create(struct winnow_tiers *tiers,
                                             const struct winnow_model_shape *shape,
                                             uint32_t segment_tokens, uint32_t n_sinks,
                                             uint64_t n_tokens_max, uint32_t n_window_max,
                                             bool with_var)
{
    winnow_assert(tiers);
    winnow_assert(segment_tokens > 0);
    winnow_assert(segment_tokens % WINNOW_BLOCK_TOKENS == 0);
    winnow_assert(n_sinks % WINNOW_BLOCK_TOKENS == 0);
    winnow_assert(shape->n_layers > 0);
    winnow_assert(shape->n_kv_heads > 0);
    struct winnow_context *context =
        winnow_alloc(sizeof *context + shape->n_layers * sizeof *context->layer);
    if (!context)
        return NULL;
    context->tiers = tiers;
    context->shape = *shape;
    context->segment_tokens = segment_tokens;
    context->n_sinks = n_sinks;
    context->n_tokens_max = n_tokens_max;
    context->with_var = with_var;
    /* the most before a seal: sinks, a span, its recent window twice, and one window more */
    context->n_blocks_max =
        (n_sinks + segment_tokens + 2 * 96 + n_window_max) / WINNOW_BLOCK_TOKENS + 2;
    context->n_segments_max = (uint32_t)(n_tokens_max / segment_tokens) + 1;
    context->segment = winnow_alloc_array(context->n_segments_max, sizeof *context->segment);
    bool complete = context->segment;
    for (uint32_t layer = 0; complete && layer < shape->n_layers; layer++) {
        context->layer[layer].slot =
            winnow_alloc_array((size_t)shape->n_kv_heads * context->n_blocks_max, sizeof(uint32_t));
        complete = context->layer[layer].slot;
    }
    if (!complete) {
        winnow_context_destroy(context);
        return NULL;
    }
    return context;
}

void winnow_context_destroy(struct winnow_context *context)
{
    if (!context)
        return;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++) {
        if (context->layer[layer].slot)
            winnow_context_shrink(context, layer, 0);
        winnow_alloc_free(context->layer[layer].slot);
    }
    for (uint32_t k = 0; context->segment && k < context->n_segments_max; k++)
        if (context->segment[k])
            winnow_segment_unref(context->segment[k]);
    winnow_alloc_free(context->segment);
    winnow_alloc_free(context);
}

uint64_t winnow_context_held(const struct winnow_context *context)
{
    uint64_t least = UINT64_MAX;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        if (context->layer[layer].held < least)
            least = context->layer[layer].held;
    return least;
}

uint64_t winnow_context_sealed(const struct winnow_context *context)
{
    uint32_t least = UINT32_MAX;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        if (context->layer[layer].n_segments < least)
            least = context->layer[layer].n_segments;
    return (uint64_t)least * context->segment_tokens;
}

static uint64_t sealed_tokens(const struct winnow_context *context, uint32_t layer)
{
    winnow_assert(layer < context->shape.n_layers);
    winnow_assert(context->layer[layer].n_segments <= context->n_segments_max);
    return (uint64_t)context->layer[layer].n_segments * context->segment_tokens;
}

uint32_t winnow_context_block_of(const struct winnow_context *context, uint32_t layer,
                                 uint64_t position)
{
    uint64_t sealed = sealed_tokens(context, layer);
    uint64_t place = position < context->n_sinks ? position : position - sealed;
    winnow_assert(position < context->n_sinks || position + 1 >= context->n_sinks + sealed);
    winnow_assert(place / WINNOW_BLOCK_TOKENS < context->n_blocks_max);
    return (uint32_t)(place / WINNOW_BLOCK_TOKENS);
}

uint64_t winnow_context_position_of(const struct winnow_context *context, uint32_t layer,
                                    uint32_t block_idx)
{
    winnow_assert(block_idx < context->n_blocks_max);
    uint64_t place = (uint64_t)block_idx * WINNOW_BLOCK_TOKENS;
    return place < context->n_sinks ? place : place + sealed_tokens(context, layer);
}

uint32_t *winnow_context_slot(const struct winnow_context *context, uint32_t layer, uint32_t head,
                              uint32_t block_idx)
{
    winnow_assert(layer < context->shape.n_layers);
    winnow_assert(head < context->shape.n_kv_heads);
    winnow_assert(block_idx < context->n_blocks_max);
    return &context->layer[layer].slot[(size_t)head * context->n_blocks_max + block_idx];
}

void *winnow_context_block(const struct winnow_context *context, uint32_t layer, uint32_t head,
                           uint32_t block_idx)
{
    return winnow_arena_data(context->tiers->arena,
                             *winnow_context_slot(context, layer, head, block_idx));
}

uint64_t winnow_context_span_end(const struct winnow_context *context, uint32_t layer)
{
    return context->n_sinks + sealed_tokens(context, layer) + context->segment_tokens;
}

static uint32_t blocks_for(const struct winnow_context *context, uint32_t layer, uint64_t held)
{
    if (held == 0)
        return 0;
    return winnow_context_block_of(context, layer, held - 1) + 1;
}

int winnow_context_own(struct winnow_context *context, uint32_t layer, uint32_t head,
                       uint32_t block_idx, uint64_t keep_bytes)
{
    struct winnow_arena *arena = context->tiers->arena;
    uint32_t block_bytes = winnow_block_bytes(&context->shape), own;
    uint32_t *slot = winnow_context_slot(context, layer, head, block_idx);
    winnow_assert(block_idx < context->layer[layer].n_blocks);
    winnow_assert(!winnow_arena_is_cache(arena, *slot));
    winnow_assert(winnow_arena_holders(arena, *slot) > 0);
    if (winnow_arena_holders(arena, *slot) == 1)
        return 0;
    if (winnow_arena_take(arena, block_bytes, 1, &own, keep_bytes) < 0)
        return -EAGAIN;
    memcpy(winnow_arena_data(arena, own), winnow_arena_data(arena, *slot), block_bytes);
    winnow_arena_release(arena, *slot);
    *slot = own;
    return 0;
}

/* The last block of every KV head, when tokens will join it. */
static int last_own(struct winnow_context *context, uint32_t layer, uint64_t keep_bytes)
{
    uint64_t held = context->layer[layer].held;
    if (held % WINNOW_BLOCK_TOKENS == 0)
        return 0;
    uint32_t block_idx = winnow_context_block_of(context, layer, held);
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        if (winnow_context_own(context, layer, head, block_idx, keep_bytes) < 0)
            return -EAGAIN;
    return 0;
}

int winnow_context_grow(struct winnow_context *context, uint32_t layer, uint32_t n_tokens,
                        uint64_t keep_bytes)
{
    struct winnow_context_layer *state = &context->layer[layer];
    uint32_t n_after = blocks_for(context, layer, state->held + n_tokens);
    winnow_assert(n_after <= context->n_blocks_max);
    winnow_assert(state->n_blocks >= blocks_for(context, layer, state->held));
    uint32_t n_new = n_after > state->n_blocks ? n_after - state->n_blocks : 0;
    uint32_t block_bytes = winnow_block_bytes(&context->shape);
    if (last_own(context, layer, keep_bytes) < 0)
        return -EAGAIN;
    for (uint32_t head = 0; n_new && head < context->shape.n_kv_heads; head++) {
        uint32_t *slot = winnow_context_slot(context, layer, head, state->n_blocks);
        if (winnow_arena_take(context->tiers->arena, block_bytes, n_new, slot, keep_bytes) == 0)
            continue;
        while (head-- > 0)
            for (uint32_t i = 0; i < n_new; i++)
                winnow_arena_release(
                    context->tiers->arena,
                    *winnow_context_slot(context, layer, head, state->n_blocks + i));
        return -EAGAIN;
    }
    state->n_blocks += n_new;
    return 0;
}

void winnow_context_shrink(struct winnow_context *context, uint32_t layer, uint64_t n_held)
{
    struct winnow_context_layer *state = &context->layer[layer];
    uint32_t n_keep = blocks_for(context, layer, n_held);
    winnow_assert(n_held <= state->held);
    winnow_assert(state->n_blocks <= context->n_blocks_max);
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        for (uint32_t i = n_keep; i < state->n_blocks; i++)
            winnow_arena_release(context->tiers->arena,
                                 *winnow_context_slot(context, layer, head, i));
    if (state->n_blocks > n_keep)
        state->n_blocks = n_keep;
}

void winnow_context_seal(struct winnow_context *context, uint32_t layer)
{
    struct winnow_context_layer *state = &context->layer[layer];
    struct winnow_segment *segment = context->segment[state->n_segments];
    winnow_assert(state->n_segments < context->n_segments_max);
    winnow_assert(segment);
    uint32_t n_span = segment->n_blocks, first = context->n_sinks / WINNOW_BLOCK_TOKENS;
    uint32_t *place = winnow_segment_place(segment, layer);
    winnow_assert(state->held >= winnow_context_span_end(context, layer));
    winnow_assert(n_span * WINNOW_BLOCK_TOKENS == context->segment_tokens);
    winnow_assert(state->n_blocks >= first + n_span);
    winnow_assert(!segment->layer[layer].in_force);
    winnow_assert(segment->layer[layer].n_places == 0);
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++) {
        uint32_t *slot = winnow_context_slot(context, layer, head, first);
        for (uint32_t i = 0; i < n_span; i++) {
            uint32_t block_idx = head * n_span + i;
            uint32_t in_segment = layer * context->shape.n_kv_heads * n_span + block_idx;
            winnow_arena_cache(context->tiers->arena, slot[i], segment, in_segment, false);
            place[block_idx] = slot[i] + 1;
        }
        memmove(slot, slot + n_span, (state->n_blocks - first - n_span) * sizeof *slot);
    }
    state->n_blocks -= n_span;
    state->n_segments++;
    segment->layer[layer].in_force = true;
    segment->layer[layer].n_places = context->shape.n_kv_heads * n_span;
}

/* Drops the layer's last segment and every token after it. */
static void pop_segment(struct winnow_context *context, uint32_t layer)
{
    struct winnow_context_layer *state = &context->layer[layer];
    winnow_assert(state->n_segments > 0);
    winnow_assert(context->segment[state->n_segments - 1]);
    winnow_assert(state->held >= context->n_sinks + sealed_tokens(context, layer));
    winnow_context_shrink(context, layer, context->n_sinks);
    state->n_segments--;
    state->held = context->n_sinks + sealed_tokens(context, layer);
}

void winnow_context_unseal(struct winnow_context *context, uint32_t layer, uint64_t n_tokens,
                           const uint32_t *slot)
{
    struct winnow_context_layer *state = &context->layer[layer];
    pop_segment(context, layer);
    winnow_assert(n_tokens > state->held);
    winnow_assert(n_tokens < winnow_context_span_end(context, layer));
    winnow_assert(state->n_blocks == context->n_sinks / WINNOW_BLOCK_TOKENS);
    uint32_t first = state->n_blocks;
    state->held = n_tokens;
    state->n_blocks = blocks_for(context, layer, n_tokens);
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        for (uint32_t i = first; i < state->n_blocks; i++)
            *winnow_context_slot(context, layer, head, i) = *slot++;
}

void winnow_context_cut(struct winnow_context *context, uint64_t n_tokens)
{
    uint32_t n_segments_most = 0;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++) {
        struct winnow_context_layer *state = &context->layer[layer];
        while (state->n_segments > 0 && context->n_sinks + sealed_tokens(context, layer) > n_tokens)
            pop_segment(context, layer);
        if (state->held > n_tokens) {
            winnow_context_shrink(context, layer, n_tokens);
            state->held = n_tokens;
        }
        if (state->n_segments > n_segments_most)
            n_segments_most = state->n_segments;
    }
    for (uint32_t k = n_segments_most; k < context->n_segments_max; k++)
        if (context->segment[k]) {
            winnow_segment_unref(context->segment[k]);
            context->segment[k] = NULL;
        }
}

bool winnow_context_is_level(const struct winnow_context *context)
{
    for (uint32_t layer = 1; layer < context->shape.n_layers; layer++)
        if (context->layer[layer].held != context->layer[0].held ||
            context->layer[layer].n_segments != context->layer[0].n_segments)
            return false;
    return true;
}

uint32_t winnow_context_fork_copies(const struct winnow_context *context)
{
    bool has_part = context->layer[0].held % WINNOW_BLOCK_TOKENS != 0;
    return has_part ? context->shape.n_layers * context->shape.n_kv_heads : 0;
}

/* Blocks of one layer: full ones shared, the part-filled one copied into the slot given. */
static void layer_fork(const struct winnow_context *from, struct winnow_context *to, uint32_t layer,
                       const uint32_t *copy)
{
    const struct winnow_context_layer *source = &from->layer[layer];
    struct winnow_arena *arena = from->tiers->arena;
    bool has_part = source->held % WINNOW_BLOCK_TOKENS != 0;
    for (uint32_t head = 0; head < from->shape.n_kv_heads; head++)
        for (uint32_t i = 0; i < source->n_blocks; i++) {
            uint32_t slot = *winnow_context_slot(from, layer, head, i);
            if (has_part && i + 1 == source->n_blocks) {
                memcpy(winnow_arena_data(arena, copy[head]), winnow_arena_data(arena, slot),
                       winnow_block_bytes(&from->shape));
                slot = copy[head];
            } else {
                winnow_arena_hold(arena, slot);
            }
            *winnow_context_slot(to, layer, head, i) = slot;
        }
    to->layer[layer].held = source->held;
    to->layer[layer].n_segments = source->n_segments;
    to->layer[layer].n_blocks = source->n_blocks;
}

void winnow_context_fork(const struct winnow_context *from, struct winnow_context *to,
                         const uint32_t *slot)
{
    winnow_assert(to->layer[0].held == 0);
    winnow_assert(to->layer[0].n_blocks == 0);
    winnow_assert(to->layer[0].n_segments == 0);
    winnow_assert(winnow_context_is_level(from));
    winnow_assert(from->tiers == to->tiers);
    winnow_assert(from->n_sinks == to->n_sinks);
    winnow_assert(from->segment_tokens == to->segment_tokens);
    winnow_assert(from->n_blocks_max == to->n_blocks_max);
    winnow_assert(from->layer[0].n_segments <= to->n_segments_max);
    for (uint32_t layer = 0; layer < from->shape.n_layers; layer++)
        layer_fork(from, to, layer, slot + (size_t)layer * from->shape.n_kv_heads);
    for (uint32_t k = 0; k < from->layer[0].n_segments; k++) {
        to->segment[k] = from->segment[k];
        winnow_segment_ref(to->segment[k]);
    }
}
