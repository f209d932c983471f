/*
 * Inside: what must hold in the core between two of its steps, looked up in its own tables.
 */
#pragma once

#include "content.h"
#include "world.h"

#include <core/session.h>

static inline struct winnow_session *sim_session(const struct winnow_core *core, uint64_t id)
{
    struct winnow_session *session = winnow_pool_at(core->sessions, (uint32_t)(id & 0xfffff));
    return session && session->id == id && !session->closing ? session : NULL;
}

static inline uint64_t sim_pages(size_t n_bytes)
{
    return (n_bytes + WINNOW_PAGE_BYTES - 1) / WINNOW_PAGE_BYTES * WINNOW_PAGE_BYTES;
}

/* A block's tokens are those of the content, at the places that the core has for them. */
static inline void sim_block_check(const struct sim_model *model,
                                   const struct winnow_model_shape *shape,
                                   const struct winnow_core *core, uint32_t layer, uint32_t head,
                                   const void *block, uint32_t n,
                                   const uint64_t token[WINNOW_BLOCK_TOKENS])
{
    static float k[WINNOW_BLOCK_TOKENS * WINNOW_WIDTH_MAX], v[sizeof k / sizeof *k];
    float row[WINNOW_WIDTH_MAX];
    core->options.kernels->block_unpack(shape, block, k, v);
    for (uint32_t j = 0; j < n; j++) {
        sim_row_at_rest(model, SIM_K, layer, head, token[j], row);
        CHECK(!memcmp(row, k + j * shape->k_width, shape->k_width * sizeof *row));
        sim_row_at_rest(model, SIM_V, layer, head, token[j], row);
        CHECK(!memcmp(row, v + j * shape->v_width, shape->v_width * sizeof *row));
    }
}

static inline void sim_segment_check(const struct sim_model *model, const struct winnow_core *core,
                                     const struct winnow_segment *segment, uint32_t layer,
                                     uint32_t head, const uint64_t *token)
{
    const uint32_t *place = winnow_segment_place(segment, layer) + head * segment->n_blocks;
    const uint16_t *order = winnow_segment_order(segment, layer, head);
    for (uint32_t b = 0; b < segment->n_blocks; b++) {
        uint64_t of_block[WINNOW_BLOCK_TOKENS];
        for (uint32_t j = 0; j < WINNOW_BLOCK_TOKENS; j++) {
            uint32_t at = order[b * WINNOW_BLOCK_TOKENS + j];
            CHECK(at < segment->n_blocks * WINNOW_BLOCK_TOKENS);
            CHECK(j == 0 || order[b * WINNOW_BLOCK_TOKENS + j - 1] < at);
            of_block[j] = token[segment->first_token + at];
        }
        if (place[b])
            sim_block_check(model, &segment->shape, core, layer, head,
                            winnow_arena_data(core->tiers.arena, place[b] - 1), WINNOW_BLOCK_TOKENS,
                            of_block);
    }
}

/* Every byte of one layer and head that lies in memory; the session must have no op under way. */
static inline void sim_bytes_check(const struct sim_model *model, const struct winnow_core *core,
                                   const struct winnow_session *session, uint32_t layer,
                                   uint32_t head, const uint64_t *token)
{
    const struct winnow_context *context = session->context;
    const struct winnow_context_layer *state = &context->layer[layer];
    CHECK_EQ(session->op.state, WINNOW_OP_NONE);
    for (uint32_t i = 0; i < state->n_blocks; i++) {
        uint64_t at = winnow_context_position_of(context, layer, i);
        CHECK(at < state->held);
        uint32_t n = state->held - at < WINNOW_BLOCK_TOKENS ? (uint32_t)(state->held - at)
                                                            : WINNOW_BLOCK_TOKENS;
        sim_block_check(model, &context->shape, core, layer, head,
                        winnow_context_block(context, layer, head, i), n, token + at);
    }
    for (uint32_t k = 0; k < state->n_segments; k++)
        sim_segment_check(model, core, context->segment[k], layer, head, token);
}

/* True when nothing is under way: no op, item, read or write. */
static inline bool sim_core_rests(const struct winnow_core *core)
{
    return core->n_active == 0 && core->n_items_out == 0 && core->n_spills == 0 &&
           winnow_pool_used(core->loads) == 0 && !winnow_device_busy(core->tiers.device);
}

struct sim_sums {
    uint64_t held_bytes, cache_bytes, index_bytes;
    const struct winnow_segment *seen[256];
    uint32_t n_seen;
};

static inline void sim_segment_count(struct sim_sums *sums, const struct winnow_segment *segment)
{
    for (uint32_t i = 0; i < sums->n_seen; i++)
        if (sums->seen[i] == segment)
            return;
    CHECK(sums->n_seen < 256);
    sums->seen[sums->n_seen++] = segment;
    sums->index_bytes += sim_pages(segment->header_bytes);
    for (uint32_t layer = 0; layer < segment->shape.n_layers; layer++) {
        const struct winnow_segment_layer *state = &segment->layer[layer];
        sums->index_bytes += state->piece ? sim_pages(segment->piece_bytes) : 0;
        sums->cache_bytes += (uint64_t)state->n_places * segment->block_bytes;
    }
}

/* Every slot of a tail is held once by each context that has it. */
static inline void sim_slots_count(struct sim_sums *sums, const struct winnow_core *core,
                                   const struct winnow_context *context, uint8_t *n_holders)
{
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
            for (uint32_t i = 0; i < context->layer[layer].n_blocks; i++) {
                uint32_t slot = *winnow_context_slot(context, layer, head, i);
                CHECK(!winnow_arena_is_cache(core->tiers.arena, slot));
                sums->held_bytes += n_holders[slot]++ ? 0 : winnow_block_bytes(&context->shape);
            }
}

/* At rest, what memory holds is what contexts hold: nothing is lost, nothing is held twice. */
static inline void sim_memory_check(const struct winnow_core *core)
{
    struct winnow_arena_use use;
    struct sim_sums sums = {0};
    CHECK(sim_core_rests(core));
    winnow_arena_use(core->tiers.arena, &use);
    size_t n_slots = (use.pool_bytes - use.staging_bytes) / WINNOW_PAGE_BYTES;
    uint8_t *n_holders = calloc(n_slots, 1);
    for (uint32_t i = 0; i < winnow_pool_size(core->sessions); i++) {
        const struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (!session)
            continue;
        sim_slots_count(&sums, core, session->context, n_holders);
        for (uint32_t k = 0; k < session->context->n_segments_max; k++)
            if (session->context->segment[k])
                sim_segment_count(&sums, session->context->segment[k]);
    }
    for (uint32_t slot = 0; slot < n_slots; slot++)
        if (n_holders[slot])
            CHECK_EQ(winnow_arena_holders(core->tiers.arena, slot), n_holders[slot]);
    for (uint32_t i = 0; i < core->n_runs_max; i++)
        sums.index_bytes += sim_pages(core->run[i].memory_bytes);
    CHECK_EQ(use.held_bytes, sums.held_bytes);
    CHECK_EQ(use.cache_bytes, sums.cache_bytes);
    CHECK_EQ(winnow_index_memory_used(core->tiers.index), sums.index_bytes);
    CHECK_EQ(winnow_arena_staging_free(core->tiers.arena),
             winnow_arena_staging_pieces(core->tiers.arena));
    CHECK_EQ(winnow_pool_used(core->items), 0);
    free(n_holders);
}

/* Every session is closed: memory and disk are as they were at the start. */
static inline void sim_baseline_check(const struct sim_world *world)
{
    const struct winnow_core *core = world->core;
    struct winnow_arena_use use;
    CHECK(sim_core_rests(core));
    CHECK_EQ(winnow_pool_used(core->sessions), 0);
    sim_memory_check(core);
    winnow_arena_use(core->tiers.arena, &use);
    CHECK_EQ(use.held_bytes + use.cache_bytes + use.dirty_bytes, 0);
    CHECK_EQ(use.free_bytes, use.pool_bytes - use.staging_bytes);
    CHECK(!core->tiers.spill_first);
    if (!world->store)
        return;
    struct winnow_store_facts facts;
    winnow_store_facts(world->store, &facts);
    CHECK_EQ(facts.used_bytes, 0);
    CHECK_EQ(facts.in_flight, 0);
    CHECK(facts.in_flight_max <= facts.window);
}
