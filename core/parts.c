// Parts: an exact window (window.c) by the device. Its queries are put into the device's rows, its
// chunks and then its resident blocks are sent as parts, one attended while the next one's blocks
// cross the link, and the rows are its result.
//
// One window at a time: a second waits, whichever is longer, so that load is in no bit. What a lost
// device leaves is the CPU's from the window's beginning: its chunks are released and filled again.
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>

bool winnow_parts_taken(const struct winnow_core *core, const struct winnow_session *session)
{
    return core->tiers.device && core->tiers.device->window == session;
}

bool winnow_parts_take(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_device *device = core->tiers.device;
    if (!session->device_slot || device->lost || device->shape_options.n_window_positions == 0 ||
        session->op.request->kind != WINNOW_REQUEST_EXACT)
        return true;
    if (device->window)
        return false;
    winnow_assert(device->n_parts == 0);
    device->window = session;
    return true;
}

void winnow_parts_give(struct winnow_core *core, struct winnow_session *session)
{
    if (!winnow_parts_taken(core, session))
        return;
    winnow_assert(core->tiers.device->n_parts == 0);
    core->tiers.device->window = NULL;
    core->progress = true; /* another window may wait for it */
}

/* The blocks of a chunk that is ready. */
static void chunk_list(struct winnow_device *device, const struct winnow_session *session,
                       const struct winnow_chunk *chunk, struct winnow_gpu_window_part *part)
{
    const struct winnow_arena *arena = session->context->tiers->arena;
    uint32_t cap = session->op.pass->chunk_blocks_max;
    winnow_assert(cap == device->shape_options.n_window_blocks);
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++) {
        device->part_blocks[head] = chunk->n_of_head[head];
        for (uint32_t i = 0; i < chunk->n_of_head[head]; i++)
            device->part_home[head * cap + i] =
                winnow_device_home_of(arena, chunk->data[head * cap + i]);
    }
    part->n_blocks = device->part_blocks;
}

/* The resident blocks from op->n_sent on, as many as a part takes; those beyond the pass's last
 * position are left out. True: these are the last. */
static bool resident_list(struct winnow_device *device, const struct winnow_session *session,
                          struct winnow_gpu_window_part *part)
{
    const struct winnow_op *op = &session->op;
    const struct winnow_context *context = session->context;
    const struct winnow_context_layer *layer = &context->layer[op->layer];
    uint32_t cap = device->shape_options.n_window_blocks, n = 0;
    uint64_t last = op->at + op->n_pass - 1;
    bool is_end = false;
    winnow_assert(last < layer->held);
    while (n < cap && !is_end) {
        uint32_t block_idx = op->n_sent + n;
        uint64_t at = winnow_context_position_of(context, op->layer, block_idx);
        uint64_t left = layer->held - at;
        winnow_assert(at <= last);
        for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
            device->part_home[head * cap + n] = winnow_device_home_of(
                context->tiers->arena, winnow_context_block(context, op->layer, head, block_idx));
        device->part_position[n] = at;
        device->part_tokens[n++] =
            left < WINNOW_BLOCK_TOKENS ? (uint32_t)left : WINNOW_BLOCK_TOKENS;
        is_end = block_idx + 1 == layer->n_blocks ||
                 winnow_context_position_of(context, op->layer, block_idx + 1) > last;
    }
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        device->part_blocks[head] = n;
    part->n_blocks = device->part_blocks;
    part->position = device->part_position;
    part->n_tokens = device->part_tokens;
    return is_end;
}

/* False: the device is lost. */
static bool part_send(struct winnow_core *core, struct winnow_session *session,
                      struct winnow_gpu_window_part *part)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_op *op = &session->op;
    part->is_first = op->chunk_sent == 0 && op->n_sent == 0;
    part->n_pos = op->n_pass;
    part->first = op->at;
    part->homes = device->part_home;
    winnow_assert(device->n_parts < WINNOW_N_PARTS);
    int64_t ticket = device->api->window(device->gpu, part);
    winnow_assert(ticket > 0 || ticket == -EIO);
    core->progress = true;
    if (ticket < 0) {
        winnow_device_lose(core);
        return false;
    }
    device->part[device->n_parts++] = ticket;
    op->n_items++;
    return true;
}

static bool parts_send(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_op *op = &session->op;
    while (device->n_parts < WINNOW_N_PARTS && op->chunk_sent < op->chunk_next) {
        struct winnow_chunk *chunk = &op->pass->chunk[op->chunk_sent % 2];
        struct winnow_gpu_window_part part = {0};
        if (chunk->state != WINNOW_CHUNK_READY)
            return true;
        chunk_list(device, session, chunk, &part);
        if (!part_send(core, session, &part))
            return false;
        chunk->state = WINNOW_CHUNK_RUNNING;
        op->chunk_sent++;
    }
    bool all_sealed = op->chunk_sent == op->chunk_next &&
                      op->cursor.segment_idx >= session->context->layer[op->layer].n_segments;
    while (device->n_parts < WINNOW_N_PARTS && all_sealed && !op->all_sent) {
        struct winnow_gpu_window_part part = {0};
        part.is_last = resident_list(device, session, &part);
        if (!part_send(core, session, &part))
            return false;
        op->n_sent += part.n_blocks[0];
        op->all_sent = part.is_last;
    }
    return true;
}

bool winnow_parts_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    uint32_t n_segments = session->context->layer[op->layer].n_segments;
    winnow_assert(winnow_parts_taken(core, session));
    winnow_assert(op->chunk_first <= op->chunk_sent);
    winnow_assert(op->chunk_sent <= op->chunk_next);
    if (core->tiers.device->lost)
        return false;
    while (op->chunk_next < op->chunk_first + 2 && op->cursor.segment_idx < n_segments) {
        uint32_t chunk_idx = (uint32_t)(op->chunk_next % 2);
        if (!winnow_chunk_fill(core, session, &op->pass->chunk[chunk_idx], chunk_idx, false))
            break;
        op->chunk_next++;
    }
    return parts_send(core, session) && op->all_sent && core->tiers.device->n_parts == 0;
}

/* The oldest part has read its blocks. */
static void part_done(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    winnow_assert(op->n_items > 0);
    op->n_items--;
    core->progress = true;
    if (op->chunk_first == op->chunk_sent)
        return; /* residents stay */
    winnow_chunk_release(core, session, &op->pass->chunk[op->chunk_first % 2]);
    op->chunk_first++;
}

bool winnow_parts_poll(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    bool any = false;
    while (device->n_parts > 0) {
        int rc = device->api->window_poll(device->gpu, device->part[0], false);
        if (rc < 0)
            winnow_device_lose(core);
        if (rc <= 0)
            return any || rc < 0;
        device->n_parts--;
        device->part[0] = device->part[1];
        part_done(core, device->window);
        any = true;
    }
    return any;
}

void winnow_parts_lose(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    for (; device->n_parts > 0; device->n_parts--) {
        winnow_assert(device->window->op.n_items > 0);
        device->window->op.n_items--;
        core->progress = true;
    }
}
