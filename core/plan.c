// Plan: from blocks wanted to blocks at hand. The cursor walks what a step wants in list order; every
// eight blocks of one head's list are a group, which takes pins on what is resident and slots for
// what is not, asks for the reads, and is ready when they have come.
//
// A plan larger than the pool needs no waves with barriers: at most WINNOW_N_GROUPS groups are filled
// and not yet merged, each gives back what it held once it is attended, and the next is filled. A
// step that finds no slot stops filling; what it holds it will give back by itself.
//
// Blocks that everything-reads bring in go through staging and are not admitted to the cache: one
// such step would flush it.
#include <base/assert.h>
#include <base/clock.h>
#include <core/session.h>
#include <errno.h>
#include <string.h>

enum { N_READS_ONCE = 256 };

void winnow_plan_begin(struct winnow_session *session, uint8_t wanted, bool exact_too)
{
    struct winnow_op *op = &session->op;
    const struct winnow_run *run = op->run;
    winnow_assert(run->taken);
    winnow_assert(wanted >= 1);
    winnow_assert(wanted <= 3);
    winnow_assert(op->n_loads == 0);
    bool all_exact = true;
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++)
        all_exact &= run->exact[head] != 0;
    op->cursor = (struct winnow_cursor){
        .wanted = wanted, .exact_too = exact_too, .disk_order = all_exact && exact_too};
    op->fill_done = false;
}

static bool cursor_wants(const struct winnow_session *session, const struct winnow_cursor *cursor)
{
    const struct winnow_run *run = session->op.run;
    uint32_t n_span = session->context->segment_tokens / WINNOW_BLOCK_TOKENS;
    if (run->exact[cursor->head])
        return cursor->exact_too;
    return run->selection[cursor->head]
               .selected[cursor->segment_idx * n_span + cursor->block_idx] == cursor->wanted;
}

/* One block further in the cursor's order; false at the end. */
static bool cursor_step(const struct winnow_session *session, struct winnow_cursor *cursor)
{
    const struct winnow_context *context = session->context;
    uint32_t n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    uint32_t n_segments = context->layer[session->op.layer].n_segments;
    if (++cursor->block_idx < n_span)
        return true;
    cursor->block_idx = 0;
    uint32_t *inner = cursor->disk_order ? &cursor->head : &cursor->segment_idx;
    uint32_t *outer = cursor->disk_order ? &cursor->segment_idx : &cursor->head;
    if (++*inner < (cursor->disk_order ? context->shape.n_kv_heads : n_segments))
        return true;
    *inner = 0;
    return ++*outer < (cursor->disk_order ? n_segments : context->shape.n_kv_heads);
}

static bool cursor_at_end(const struct winnow_session *session, const struct winnow_cursor *cursor)
{
    const struct winnow_context *context = session->context;
    return cursor->head >= context->shape.n_kv_heads ||
           cursor->segment_idx >= context->layer[session->op.layer].n_segments;
}

/* The next eight wanted blocks of one head (fewer at a list's end). False: none is left. */
static bool group_choose(const struct winnow_session *session, struct winnow_cursor *cursor,
                         struct winnow_group *group)
{
    uint32_t n_span = session->context->segment_tokens / WINNOW_BLOCK_TOKENS;
    *group = (struct winnow_group){.state = WINNOW_GROUP_READING};
    while (group->n < WINNOW_GROUP_BLOCKS && !cursor_at_end(session, cursor)) {
        if (group->n && cursor->head != group->head)
            break;
        if (cursor_wants(session, cursor)) {
            group->head = cursor->head;
            group->block[group->n++] = cursor->segment_idx * n_span + cursor->block_idx;
            winnow_assert(group->block[group->n - 1] < session->op.run->n_blocks);
        }
        if (!cursor_step(session, cursor))
            break;
    }
    return group->n > 0;
}

struct winnow_load *winnow_load_take(struct winnow_core *core, struct winnow_session *session,
                                     struct winnow_segment *segment, uint32_t block_idx)
{
    uint32_t n_of_layer = segment->shape.n_kv_heads * segment->n_blocks;
    struct winnow_load *load = winnow_pool_take(core->loads);
    if (!load)
        return NULL;
    winnow_assert(block_idx < segment->shape.n_layers * n_of_layer);
    winnow_assert(segment->stored);
    winnow_assert(segment->layer[block_idx / n_of_layer].on_disk);
    winnow_segment_ref(segment);
    *load = (struct winnow_load){.segment = segment,
                                 .session_handle = winnow_pool_handle(core->sessions, session),
                                 .op_number = session->op.number,
                                 .block_idx = block_idx,
                                 .kind = session->op.request->kind};
    return load;
}

/* Memory for a block to be read: a slot of the cache, or the next place of staging. */
static bool load_place(struct winnow_core *core, struct winnow_session *session, bool staged,
                       struct winnow_stage *stage, uint32_t *ret_slot, void **ret_data)
{
    uint32_t block_bytes = winnow_block_bytes(&session->context->shape);
    if (staged) {
        *ret_data = winnow_stage_take(core, stage, block_bytes);
        *ret_slot = 0;
        return *ret_data != NULL;
    }
    uint32_t slot;
    if (winnow_arena_take(core->tiers.arena, block_bytes, 1, &slot, 0) < 0)
        return false;
    *ret_slot = slot + 1;
    *ret_data = winnow_arena_data(core->tiers.arena, slot);
    return true;
}

void *winnow_stage_take(struct winnow_core *core, struct winnow_stage *stage, uint32_t block_bytes)
{
    winnow_assert(block_bytes > 0);
    winnow_assert(block_bytes <= WINNOW_STAGING_BYTES);
    if (stage->piece && stage->used_bytes + block_bytes > WINNOW_STAGING_BYTES)
        winnow_stage_finish(core, stage);
    if (!stage->piece) {
        stage->piece = winnow_arena_staging_take(core->tiers.arena);
        stage->used_bytes = 0;
        if (!stage->piece)
            return NULL;
    }
    void *data = stage->piece + stage->used_bytes;
    stage->used_bytes += block_bytes;
    winnow_assert(stage->used_bytes <= WINNOW_STAGING_BYTES);
    winnow_arena_staging_hold(core->tiers.arena, data);
    return data;
}

void winnow_stage_finish(struct winnow_core *core, struct winnow_stage *stage)
{
    if (stage->piece)
        winnow_arena_staging_give(core->tiers.arena, stage->piece);
    stage->piece = NULL;
}

void winnow_load_abandon(struct winnow_core *core, struct winnow_load *load)
{
    winnow_assert(load->segment);
    winnow_assert(load->data);
    if (load->slot)
        winnow_arena_release(core->tiers.arena, load->slot - 1);
    else
        winnow_arena_staging_give(core->tiers.arena, load->data);
    winnow_segment_unref(load->segment);
    winnow_pool_give(core->loads, load);
}

/* Reads that are decided on but not yet asked for: one call to the store serves many. */
struct batch {
    uint32_t n;
    struct winnow_load *load[N_READS_ONCE];
    struct winnow_store_read read[N_READS_ONCE];
};

/* What may be answered without a late block must know in time that it is late. */
static int64_t read_deadline(const struct winnow_core *core, const struct winnow_session *session)
{
    int64_t deadline_ns = session->op.request->deadline_ns;
    if (deadline_ns == WINNOW_NEVER_NS || session->op.whole || !winnow_op_may_degrade(session))
        return deadline_ns;
    return deadline_ns - (deadline_ns - core->now_ns) / 4;
}

static void batch_send(struct winnow_core *core, struct winnow_session *session,
                       struct batch *batch, enum winnow_io_priority priority)
{
    if (batch->n == 0)
        return;
    winnow_assert(core->tiers.store);
    winnow_assert(batch->n <= N_READS_ONCE);
    winnow_assert(session->op.n_loads + batch->n <= winnow_pool_used(core->loads));
    int rc = winnow_store_read(core->tiers.store, batch->read, batch->n, priority,
                               read_deadline(core, session));
    winnow_assert(rc == 0); /* WINNOW_STORE_REQUESTS: one for each load, and for each spill */
    session->op.n_loads += batch->n;
    batch->n = 0;
}

void winnow_group_release(struct winnow_core *core, struct winnow_session *session,
                          struct winnow_group *group)
{
    winnow_assert(group->n <= WINNOW_GROUP_BLOCKS);
    (void)session;
    for (uint32_t i = 0; i < group->n; i++) {
        if (group->source[i] == WINNOW_FROM_CACHE)
            winnow_arena_unpin(core->tiers.arena, group->slot[i]);
        else if (group->source[i] == WINNOW_FROM_SLOT)
            winnow_arena_release(core->tiers.arena, group->slot[i]);
        else if (group->source[i] == WINNOW_FROM_STAGING)
            winnow_arena_staging_give(core->tiers.arena, group->data[i]);
        group->source[i] = WINNOW_FROM_NOWHERE;
    }
}

static struct winnow_segment *block_segment(const struct winnow_session *session, uint32_t head,
                                            uint32_t block, uint32_t *ret_of_layer)
{
    const struct winnow_context *context = session->context;
    uint32_t n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    winnow_assert(head < context->shape.n_kv_heads);
    winnow_assert(block / n_span < context->layer[session->op.layer].n_segments);
    *ret_of_layer = head * n_span + block % n_span;
    return context->segment[block / n_span];
}

/* True when the head's blocks are not admitted to the cache: everything is read, or the heavy heads
 * do not fit in a quarter of the pool. */
static bool reads_staged(const struct winnow_core *core, const struct winnow_session *session,
                         uint32_t head)
{
    const struct winnow_run *run = session->op.run;
    uint64_t heavy_bytes =
        (uint64_t)session->n_heavy * run->n_blocks * winnow_block_bytes(&session->context->shape);
    if (!run->exact[head])
        return false;
    return session->op.whole || heavy_bytes > core->options.host_pool_bytes / 4;
}

/* Pins or places every block of the group. False: something is short; nothing is held. */
static bool group_place(struct winnow_core *core, struct winnow_session *session,
                        struct winnow_group *group, uint32_t group_idx, struct batch *batch,
                        struct winnow_stage *stage)
{
    struct winnow_op *op = &session->op;
    bool staged = reads_staged(core, session, group->head);
    uint32_t n_before = batch->n;
    winnow_assert(group->n > 0);
    winnow_assert(group->n_missing == 0);
    winnow_assert(batch->n + group->n <= N_READS_ONCE);
    memset(group->source, WINNOW_FROM_NOWHERE, sizeof group->source);
    for (uint32_t i = 0; i < group->n; i++) {
        uint32_t of_layer, slot;
        struct winnow_segment *segment =
            block_segment(session, group->head, group->block[i], &of_layer);
        winnow_assert(segment->layer[op->layer].in_force);
        uint32_t place = winnow_segment_place(segment, op->layer)[of_layer];
        if (place) {
            winnow_arena_pin(core->tiers.arena, place - 1);
            if (!staged)
                winnow_arena_touch(core->tiers.arena, place - 1);
            group->source[i] = WINNOW_FROM_CACHE;
            group->slot[i] = place - 1;
            group->data[i] = winnow_arena_data(core->tiers.arena, place - 1);
            continue;
        }
        void *data;
        uint32_t in_segment = op->layer * segment->shape.n_kv_heads * segment->n_blocks + of_layer;
        if (!load_place(core, session, staged, stage, &slot, &data))
            goto fail_give_all;
        struct winnow_load *load = winnow_load_take(core, session, segment, in_segment);
        if (!load) {
            if (slot)
                winnow_arena_release(core->tiers.arena, slot - 1);
            else
                winnow_arena_staging_give(core->tiers.arena, data);
            goto fail_give_all;
        }
        load->slot = slot;
        load->data = data;
        load->group = group_idx;
        load->place = i;
        batch->load[batch->n] = load;
        batch->read[batch->n++] = (struct winnow_store_read){segment->stored, in_segment, data,
                                                             winnow_pool_handle(core->loads, load)};
        group->n_missing++;
    }
    winnow_assert(batch->n - n_before == group->n_missing);
    return true;

fail_give_all:
    winnow_group_release(core, session, group);
    while (batch->n > n_before)
        winnow_load_abandon(core, batch->load[--batch->n]);
    group->n_missing = 0;
    return false;
}

void winnow_plan_fill(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct batch batch = {0};
    struct winnow_stage stage = {0};
    enum winnow_io_priority priority = WINNOW_IO_DECODE;
    while (!op->fill_done && op->group_next - op->group_first < WINNOW_N_GROUPS) {
        uint32_t group_idx = (uint32_t)(op->group_next % WINNOW_N_GROUPS);
        struct winnow_group *group = &op->run->group[group_idx];
        struct winnow_cursor cursor = op->cursor;
        if (!group_choose(session, &cursor, group)) {
            op->fill_done = true;
            break;
        }
        enum winnow_io_priority of_group =
            reads_staged(core, session, group->head) ? WINNOW_IO_EXACT : WINNOW_IO_DECODE;
        if (batch.n + WINNOW_GROUP_BLOCKS > N_READS_ONCE || of_group != priority)
            batch_send(core, session, &batch, priority);
        priority = of_group;
        if (!group_place(core, session, group, group_idx, &batch, &stage))
            break;
        op->certificate.n_blocks_host += group->n - group->n_missing;
        op->certificate.n_blocks_disk += group->n_missing;
        if (group->n_missing == 0)
            group->state = WINNOW_GROUP_READY;
        op->cursor = cursor;
        op->group_next++;
    }
    winnow_assert(op->group_first <= op->group_next);
    winnow_assert(op->group_next - op->group_first <= WINNOW_N_GROUPS);
    winnow_stage_finish(core, &stage);
    batch_send(core, session, &batch, priority);
}

// --- what no slot of the device holds ----------------------------------------------------------

static uint32_t wanted_place(const struct winnow_session *session, uint32_t wanted,
                             struct winnow_segment **ret_segment, uint32_t *ret_of_layer)
{
    uint32_t n_blocks = session->op.run->n_blocks;
    *ret_segment = block_segment(session, wanted / n_blocks, wanted % n_blocks, ret_of_layer);
    return winnow_segment_place(*ret_segment, session->op.layer)[*ret_of_layer];
}

static void pin_take(struct winnow_core *core, struct winnow_op *op, uint32_t place)
{
    winnow_assert(place);
    winnow_arena_pin(core->tiers.arena, place - 1);
    if (!op->whole)
        winnow_arena_touch(core->tiers.arena, place - 1);
    op->run->pin[op->n_pins++] = place;
}

void winnow_pins_begin(struct winnow_core *core, struct winnow_session *session, uint32_t n_listed)
{
    struct winnow_op *op = &session->op;
    uint32_t *wanted = winnow_device_disk_blocks(op->run), of_layer;
    struct winnow_segment *segment;
    winnow_assert(op->run->pin);
    winnow_assert(op->n_loads == 0);
    winnow_assert(n_listed <= session->context->shape.n_kv_heads * op->run->n_blocks);
    winnow_pins_release(core, session); /* nothing is evicted before what is at home is pinned */
    op->n_wanted = op->n_asked = 0;
    for (uint32_t i = 0; i < n_listed; i++) {
        uint32_t place = wanted_place(session, wanted[i], &segment, &of_layer);
        if (place)
            pin_take(core, op, place);
        else
            wanted[op->n_wanted++] = wanted[i];
    }
}

/* Adds the wanted block's read to the batch, or pins what another step has read meanwhile. False:
 * something is short. */
static bool block_want(struct winnow_core *core, struct winnow_session *session, uint32_t wanted,
                       struct batch *batch)
{
    struct winnow_op *op = &session->op;
    struct winnow_segment *segment;
    uint32_t of_layer, slot, place = wanted_place(session, wanted, &segment, &of_layer);
    uint32_t in_segment = op->layer * segment->shape.n_kv_heads * segment->n_blocks + of_layer;
    void *data;
    if (place) {
        pin_take(core, op, place);
        return true;
    }
    if (!load_place(core, session, false, NULL, &slot, &data))
        return false;
    struct winnow_load *load = winnow_load_take(core, session, segment, in_segment);
    if (!load) {
        winnow_arena_release(core->tiers.arena, slot - 1);
        return false;
    }
    load->slot = slot;
    load->data = data;
    batch->load[batch->n] = load;
    batch->read[batch->n++] = (struct winnow_store_read){segment->stored, in_segment, data,
                                                         winnow_pool_handle(core->loads, load)};
    return true;
}

bool winnow_pins_fill(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    const uint32_t *wanted = winnow_device_disk_blocks(op->run);
    struct batch batch = {0};
    for (; op->n_asked < op->n_wanted; op->n_asked++) {
        if (batch.n == N_READS_ONCE)
            batch_send(core, session, &batch, WINNOW_IO_DECODE);
        if (!block_want(core, session, wanted[op->n_asked], &batch))
            break;
    }
    batch_send(core, session, &batch, WINNOW_IO_DECODE);
    return op->n_asked == op->n_wanted;
}

/* In the cache by this load, or by another's that was faster. */
static void pin_loaded(struct winnow_core *core, struct winnow_session *session,
                       const struct winnow_load *load, int result)
{
    struct winnow_op *op = &session->op;
    struct winnow_segment *segment = load->segment;
    if (result == 0) {
        uint32_t of_layer = load->block_idx % (segment->shape.n_kv_heads * segment->n_blocks);
        uint32_t place = winnow_segment_place(segment, op->layer)[of_layer];
        pin_take(core, op, place);
        if (!load->cached)
            winnow_arena_release(core->tiers.arena, load->slot - 1);
    } else if (winnow_op_may_degrade(session) && !op->whole) { /* the device compensates it */
        op->certificate.n_blocks_missed++;
        op->certificate.reason = (uint32_t)-result;
    } else {
        winnow_op_lost(op, segment, result);
    }
}

void winnow_pins_release(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    while (op->n_pins > 0)
        winnow_arena_unpin(core->tiers.arena, op->run->pin[--op->n_pins] - 1);
}

// --- reads that have come -----------------------------------------------------------------------

/* A verified block: into the cache, unless another step has put it there meanwhile. */
static void load_admit(struct winnow_core *core, struct winnow_load *load)
{
    struct winnow_segment *segment = load->segment;
    uint32_t blocks_per_layer = segment->shape.n_kv_heads * segment->n_blocks;
    uint32_t layer = load->block_idx / blocks_per_layer;
    winnow_assert(layer < segment->shape.n_layers);
    winnow_assert(segment->layer[layer].on_disk);
    if (!segment->layer[layer].in_force)
        return;
    uint32_t *place = &winnow_segment_place(segment, layer)[load->block_idx % blocks_per_layer];
    if (*place)
        return;
    winnow_arena_cache(core->tiers.arena, load->slot - 1, segment, load->block_idx, true);
    *place = load->slot;
    segment->layer[layer].n_places++;
    winnow_assert(segment->layer[layer].n_places <= blocks_per_layer);
    winnow_device_block_moved(core->tiers.device, segment, load->block_idx);
}

static void bytes_count(struct winnow_core *core, struct winnow_session *session,
                        const struct winnow_load *load, uint32_t n_bytes)
{
    struct winnow_core_stats *stats = session ? &session->stats : &core->stats;
    if (load->kind == WINNOW_REQUEST_ATTEND)
        stats->read_bytes_attend += n_bytes;
    else if (load->kind == WINNOW_REQUEST_TRUNCATE)
        stats->read_bytes_truncate += n_bytes;
    else
        stats->read_bytes_exact += n_bytes;
    if (session && session->op.number == load->op_number)
        session->op.certificate.bytes_read += n_bytes;
}

void winnow_load_done(struct winnow_core *core, const struct winnow_store_done *done)
{
    struct winnow_load *load = winnow_pool_find(core->loads, done->tag);
    winnow_assert(load);
    winnow_assert(!(load->told && done->held));
    struct winnow_session *session = winnow_pool_find(core->sessions, load->session_handle);
    bool waits = session && session->op.number == load->op_number && !load->told;
    bytes_count(core, session, load, done->disk_bytes);
    bool cached = false;
    if (done->result == 0 && load->slot && !load->told) {
        load_admit(core, load);
        cached = winnow_arena_is_cache(core->tiers.arena, load->slot - 1);
    }
    if (waits) {
        winnow_assert(session->op.n_loads > 0);
        winnow_assert(session->op.pass || session->op.run);
        session->op.n_loads--;
        load->cached = cached;
        if (session->op.pass)
            winnow_chunk_loaded(core, session, load, done->result);
        else if (session->op.state == WINNOW_OP_DEVICE_READ)
            pin_loaded(core, session, load, done->result);
        else
            winnow_decode_loaded(core, session, load, done->result);
    }
    load->told = true;
    if (done->held)
        return; /* late: the kernel still owns the memory; a second message gives it back */
    bool taken_over = waits && done->result == 0;
    if (!taken_over && !cached) {
        winnow_load_abandon(core, load);
        return;
    }
    winnow_segment_unref(load->segment);
    winnow_pool_give(core->loads, load);
}
