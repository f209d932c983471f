// Truncate: inside the tail it drops; at a seal it unreferences; inside a segment the survivors are
// read back into the tail by token order and the segment is dropped. Dead tokens are never masked:
// they would live on in centroids and means.
//
// Nothing of the context changes before every survivor is at hand: a lost block or a full pool leaves
// it as it was.
#include <base/alloc.h>
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <string.h>

/* The segment that n_tokens cuts through, or UINT32_MAX. */
static uint32_t segment_cut(const struct winnow_context *context, uint64_t n_tokens)
{
    uint32_t most = 0;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        if (context->layer[layer].n_segments > most)
            most = context->layer[layer].n_segments;
    if (n_tokens <= context->n_sinks ||
        (n_tokens - context->n_sinks) % context->segment_tokens == 0)
        return UINT32_MAX;
    uint64_t k = (n_tokens - context->n_sinks) / context->segment_tokens;
    return k < most ? (uint32_t)k : UINT32_MAX;
}

static uint32_t survivors(const struct winnow_context *context, uint64_t n_tokens)
{
    winnow_assert(n_tokens > context->n_sinks);
    return (uint32_t)((n_tokens - context->n_sinks) % context->segment_tokens);
}

static uint32_t survivor_blocks(const struct winnow_context *context, uint64_t n_tokens)
{
    return (survivors(context, n_tokens) + WINNOW_BLOCK_TOKENS - 1) / WINNOW_BLOCK_TOKENS;
}

static bool layer_is_cut(const struct winnow_session *session, uint32_t layer)
{
    winnow_assert(session->op.cut != UINT32_MAX);
    return session->context->layer[layer].n_segments > session->op.cut;
}

/* Slots for the survivors of all layers that have the segment in force. */
static bool slots_take(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    const struct winnow_context *context = session->context;
    uint32_t n_layers = 0;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        n_layers += layer_is_cut(session, layer);
    uint32_t n = n_layers * context->shape.n_kv_heads *
                 survivor_blocks(context, op->request->truncate.n_tokens);
    winnow_assert(n > 0);
    if (winnow_op_slots_take(core, session, n))
        return true;
    winnow_op_wait_room(
        core, op, "the %u tokens kept of a segment (a truncate to %llu needs none)",
        survivors(context, op->request->truncate.n_tokens),
        (unsigned long long)(context->n_sinks + (uint64_t)op->cut * context->segment_tokens));
    return false;
}

/* Tokens of the chunk's blocks (item->first and on) go to their places among the new slots. */
static void restore_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    const struct winnow_context *context = item->session->context;
    const struct winnow_model_shape *shape = &context->shape;
    const struct winnow_op *op = &item->session->op;
    const struct winnow_chunk *chunk = &op->pass->chunk[0];
    uint32_t n_kept = survivors(context, op->request->truncate.n_tokens);
    uint32_t n_blocks = survivor_blocks(context, op->request->truncate.n_tokens);
    const uint16_t *order = winnow_segment_order(item->segment, item->layer, item->head);
    const uint32_t *slot =
        op->slot + ((size_t)op->n_cut * shape->n_kv_heads + item->head) * n_blocks;
    winnow_assert(item->head < shape->n_kv_heads);
    winnow_assert(item->first + item->n <= item->segment->n_blocks);
    winnow_assert((op->n_cut * shape->n_kv_heads + item->head + 1) * n_blocks <= op->n_slots);
    float *k = (float *)(void *)item->scratch[worker_idx],
          *v = k + WINNOW_BLOCK_TOKENS * shape->k_width;
    for (uint32_t i = 0; i < item->n; i++) {
        uint32_t b = item->first + i;
        item->kernels->block_unpack(
            shape, chunk->data[(size_t)item->head * op->pass->chunk_blocks_max + i], k, v);
        for (uint32_t j = 0; j < WINNOW_BLOCK_TOKENS; j++) {
            uint32_t at = order[b * WINNOW_BLOCK_TOKENS + j];
            if (at >= n_kept)
                continue;
            item->kernels->block_pack(
                shape, at % WINNOW_BLOCK_TOKENS, 1, k + (size_t)j * shape->k_width,
                v + (size_t)j * shape->v_width,
                winnow_arena_data(item->segment->tiers->arena, slot[at / WINNOW_BLOCK_TOKENS]));
        }
    }
}

/* Sees to it that the cursor is at blocks with survivors; false: all are restored. */
static bool restore_next(struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (op->restored && op->cursor.segment_idx == op->cut)
        return true; /* the layer has more */
    for (uint32_t layer = op->restored ? op->layer + 1 : 0;
         layer < session->context->shape.n_layers; layer++) {
        if (!layer_is_cut(session, layer))
            continue;
        op->n_cut += op->restored;
        op->restored = true;
        op->layer = layer;
        op->cursor = (struct winnow_cursor){.segment_idx = op->cut};
        return true;
    }
    return false;
}

static void commit(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_context *context = session->context;
    uint64_t n_tokens = op->request->truncate.n_tokens;
    const uint32_t *slot = op->slot;
    winnow_assert(session->n_builds == 0);
    winnow_assert(op->n_items == 0);
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        winnow_seal_forget(session, layer);
    if (op->cut != UINT32_MAX) {
        uint32_t n = context->shape.n_kv_heads * survivor_blocks(context, n_tokens);
        winnow_context_cut(context,
                           context->n_sinks + ((uint64_t)op->cut + 1) * context->segment_tokens);
        for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
            if (layer_is_cut(session, layer)) {
                winnow_context_unseal(context, layer, n_tokens, slot);
                slot += n;
            }
        winnow_assert(slot == op->slot + op->n_slots);
    }
    winnow_context_cut(context, n_tokens);
    op->n_slots = 0; /* the context's */
    session->epoch++;
    op->request->epoch = session->epoch;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++) {
        session->layer[layer].last_seq = 0;
        session->layer[layer].on_device = 0;
        session->layer[layer].n_on_device = 0;
        if (session->layer[layer].sealed_to > n_tokens)
            session->layer[layer].sealed_to = n_tokens;
    }
    winnow_op_end(core, session);
}

static bool advance_once(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_chunk *chunk = op->pass ? &op->pass->chunk[0] : NULL;
    switch (op->state) {
    case WINNOW_OP_BEGIN:
        if (session->n_builds > 0)
            return false; /* they read blocks that may go */
        op->cut = segment_cut(session->context, op->request->truncate.n_tokens);
        if (op->cut != UINT32_MAX && winnow_pass_prepare(op->pass, session) < 0) {
            winnow_op_fail(op, -EDQUOT, "no memory to truncate inside a segment");
            return false;
        }
        op->state = op->cut == UINT32_MAX ? WINNOW_OP_FINISH : WINNOW_OP_ROOM;
        return true;
    case WINNOW_OP_ROOM:
        if (!slots_take(core, session))
            return false;
        op->state = WINNOW_OP_READ;
        return true;
    case WINNOW_OP_READ: {
        if (chunk->state == WINNOW_CHUNK_FREE) {
            if (!restore_next(session)) {
                op->state = WINNOW_OP_FINISH;
                return true;
            }
            op->chunk_head = op->cursor.head;
            op->chunk_block = op->cursor.block_idx;
            return winnow_chunk_fill(core, session, chunk, 0, true);
        }
        if (chunk->state != WINNOW_CHUNK_READY)
            return false;
        struct winnow_item *item = winnow_item_take(core, session);
        if (!item)
            return false;
        item->segment = session->context->segment[op->cut];
        item->head = op->chunk_head;
        item->first = op->chunk_block;
        item->n = chunk->n_blocks;
        chunk->state = WINNOW_CHUNK_RUNNING;
        op->n_items++;
        winnow_item_submit(core, item, WINNOW_LANE_EXACT, restore_run, winnow_item_done);
        op->state = WINNOW_OP_CONVERT;
        return true;
    }
    case WINNOW_OP_CONVERT:
        winnow_assert(chunk->state == WINNOW_CHUNK_RUNNING);
        winnow_chunk_release(core, session, chunk);
        op->state = WINNOW_OP_READ;
        return true;
    case WINNOW_OP_FINISH:
        commit(core, session);
        return false;
    default:
        winnow_assert(!"a state of truncate");
        return false;
    }
}

void winnow_truncate_advance(struct winnow_core *core, struct winnow_session *session)
{
    winnow_assert(session->op.pass);
    while (session->op.n_items == 0)
        if (!advance_once(core, session))
            break;
    if (session->op.failure < 0)
        core->progress = true;
}
