// Sealing: a span of S tokens becomes a layer of a segment. Its S / 16 full tail blocks a KV head are
// exactly the slots the segment needs, so the build computes order and index only, and the blocks are
// repacked in place when the segment comes into force. Rejected: new slots beside the tail's; in
// decode all layers become due within 32 tokens, and S tokens of every layer would lie in the pool
// twice.
//
// The builder is a lane of the team, or the session's device (build.c).
//
// A build reads blocks that nothing writes (full tail blocks are never written again); truncate and
// close wait for it. Whoever comes to end + 96 in decode waits for it too: by position, never by time.
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <string.h>

bool winnow_seal_due(const struct winnow_session *session, uint32_t layer, uint32_t n_beyond)
{
    const struct winnow_context *context = session->context;
    uint64_t end = winnow_context_span_end(context, layer);
    return context->layer[layer].held >= end + n_beyond || end <= session->layer[layer].sealed_to;
}

void winnow_seal_owe(struct winnow_session *session, uint32_t layer)
{
    uint64_t held = session->context->layer[layer].held;
    uint64_t *sealed_to = &session->layer[layer].sealed_to;
    if (held >= *sealed_to + WINNOW_RECENT_TOKENS)
        *sealed_to = held - WINNOW_RECENT_TOKENS;
    winnow_assert(*sealed_to <= held);
}

static uint32_t span_first(const struct winnow_context *context)
{
    return context->n_sinks / WINNOW_BLOCK_TOKENS;
}

/* fp32 K and V of the span's blocks of one head, then room for the build's scratch. */
struct span {
    float *k, *v;
    void *scratch;
};

static struct span span_unpack(const struct winnow_item *item, uint32_t worker_idx)
{
    const struct winnow_context *context = item->session->context;
    const struct winnow_model_shape *shape = &context->shape;
    uint32_t n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    winnow_assert(item->scratch[worker_idx]);
    winnow_assert(item->head < shape->n_kv_heads);
    struct span span = {.k = (float *)(void *)item->scratch[worker_idx]};
    span.v = span.k + (size_t)context->segment_tokens * shape->k_width;
    span.scratch = span.v + (size_t)context->segment_tokens * shape->v_width;
    for (uint32_t i = 0; i < n_span; i++)
        item->kernels->block_unpack(
            shape, winnow_context_block(context, item->layer, item->head, span_first(context) + i),
            span.k + (size_t)i * WINNOW_BLOCK_TOKENS * shape->k_width,
            span.v + (size_t)i * WINNOW_BLOCK_TOKENS * shape->v_width);
    return span;
}

static void build_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    struct span span = span_unpack(item, worker_idx);
    struct winnow_index_view view;
    winnow_segment_view(item->segment, item->layer, item->head, &view);
    item->result = item->kernels->build(
        &item->segment->shape, view.n_blocks, span.k, span.v,
        winnow_segment_order(item->segment, item->layer, item->head), &view, span.scratch);
}

static void build_done(struct winnow_core *core, struct winnow_item *item)
{
    struct winnow_session *session = item->session;
    struct winnow_session_layer *layer = &session->layer[item->layer];
    winnow_assert(item->result == 0); /* tail blocks are finite: checked at the door */
    winnow_assert(layer->seal_state == WINNOW_SEAL_BUILDING);
    winnow_assert(layer->n_builds > 0);
    winnow_assert(session->n_builds >= layer->n_builds);
    session->n_builds--;
    if (--layer->n_builds == 0)
        layer->seal_state = WINNOW_SEAL_BUILT;
    core->progress = true;
    if (session->closing && session->n_builds == 0 && session->op.state == WINNOW_OP_NONE)
        winnow_session_destroy(core, session);
}

static int segment_prepare(struct winnow_core *core, struct winnow_session *session, uint32_t layer)
{
    struct winnow_context *context = session->context;
    uint32_t k = context->layer[layer].n_segments;
    uint32_t n_blocks = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    size_t need_bytes = winnow_segment_piece_bytes(&context->shape, n_blocks, context->with_var);
    if (k >= context->n_segments_max || need_bytes > winnow_index_left(core, session))
        return -EDQUOT;
    if (!context->segment[k]) {
        uint64_t first = context->n_sinks + (uint64_t)k * context->segment_tokens;
        context->segment[k] = winnow_segment_create(&core->tiers, &context->shape, n_blocks, first,
                                                    context->with_var);
        if (!context->segment[k])
            return -EDQUOT;
    }
    winnow_assert(context->segment[k]->n_blocks == n_blocks);
    winnow_assert(context->segment[k]->first_token ==
                  winnow_context_span_end(context, layer) - context->segment_tokens);
    return winnow_segment_layer_take(context->segment[k], layer);
}

/* To the job, or NULL: to the team's lane. */
static void build_submit(struct winnow_core *core, struct winnow_build *build,
                         struct winnow_item *item, uint32_t lane)
{
    item->work.lane = lane;
    item->work.run = build_run;
    item->done = build_done;
    if (build)
        winnow_build_add(build, item);
    else
        winnow_item_submit(core, item, lane, build_run, build_done);
}

int winnow_seal_start(struct winnow_core *core, struct winnow_session *session, uint32_t layer,
                      uint32_t lane)
{
    struct winnow_context *context = session->context;
    struct winnow_session_layer *state = &session->layer[layer];
    uint32_t n_heads = context->shape.n_kv_heads;
    if (state->seal_state != WINNOW_SEAL_NONE)
        return 0;
    if (winnow_pool_size(core->items) - winnow_pool_used(core->items) < n_heads)
        return 0; /* the next call tries again; who waits for the build calls again */
    bool by_device = winnow_builds_by_device(core, session);
    struct winnow_build *build = by_device ? winnow_build_take(core) : NULL;
    if (by_device && !build)
        return 0;
    winnow_assert(state->n_builds == 0);
    winnow_assert(context->layer[layer].held >= winnow_context_span_end(context, layer));
    int rc = segment_prepare(core, session, layer);
    if (rc < 0)
        return rc;
    state->seal_state = WINNOW_SEAL_BUILDING;
    for (uint32_t head = 0; head < n_heads; head++) {
        struct winnow_item *item = winnow_item_take(core, session);
        winnow_assert(item);
        item->layer = layer;
        item->head = head;
        item->segment = context->segment[context->layer[layer].n_segments];
        state->n_builds++;
        session->n_builds++;
        build_submit(core, build, item, lane);
    }
    if (build)
        winnow_build_send(core, build);
    return 0;
}

static void permute_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    const struct winnow_context *context = item->session->context;
    const struct winnow_model_shape *shape = &context->shape;
    const uint16_t *order = winnow_segment_order(item->segment, item->layer, item->head);
    struct span span = span_unpack(item, worker_idx);
    float k[WINNOW_BLOCK_TOKENS * WINNOW_WIDTH_MAX], v[WINNOW_BLOCK_TOKENS * WINNOW_WIDTH_MAX];
    for (uint32_t b = 0; b < item->segment->n_blocks; b++) {
        for (uint32_t j = 0; j < WINNOW_BLOCK_TOKENS; j++) {
            size_t from = order[b * WINNOW_BLOCK_TOKENS + j];
            winnow_assert(from < context->segment_tokens);
            memcpy(k + j * shape->k_width, span.k + from * shape->k_width,
                   shape->k_width * sizeof *k);
            memcpy(v + j * shape->v_width, span.v + from * shape->v_width,
                   shape->v_width * sizeof *v);
        }
        item->kernels->block_pack(
            shape, 0, WINNOW_BLOCK_TOKENS, k, v,
            winnow_context_block(context, item->layer, item->head, span_first(context) + b));
    }
}

/* What forks share of the span is copied: they keep their tails. 0; -EAGAIN. */
static int span_own(struct winnow_core *core, struct winnow_session *session, uint32_t layer)
{
    struct winnow_context *context = session->context;
    uint32_t n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        for (uint32_t i = 0; i < n_span; i++)
            if (winnow_context_own(context, layer, head, span_first(context) + i,
                                   core->keep_bytes) < 0)
                return -EAGAIN;
    return 0;
}

/* Half a span in the builder's order is neither tail nor segment: the last item's end publishes,
 * even when its op has failed meanwhile. */
static void permute_done(struct winnow_core *core, struct winnow_item *item)
{
    struct winnow_session *session = item->session;
    struct winnow_session_layer *state = &session->layer[item->layer];
    winnow_item_done(core, item);
    winnow_assert(state->seal_state == WINNOW_SEAL_PERMUTING);
    winnow_assert(state->n_builds > 0);
    if (--state->n_builds > 0)
        return;
    winnow_context_seal(session->context, item->layer);
    state->seal_state = WINNOW_SEAL_NONE;
    winnow_spill_queue(core, item->segment, item->layer);
    winnow_device_segment_ready(core, session, item->segment, item->layer);
}

void winnow_seal_permute(struct winnow_core *core, struct winnow_session *session, uint32_t layer)
{
    struct winnow_context *context = session->context;
    struct winnow_session_layer *state = &session->layer[layer];
    uint32_t n_heads = context->shape.n_kv_heads;
    winnow_assert(state->seal_state == WINNOW_SEAL_BUILT);
    winnow_assert(state->n_builds == 0);
    winnow_assert(context->segment[context->layer[layer].n_segments]);
    if (winnow_pool_size(core->items) - winnow_pool_used(core->items) < n_heads)
        return;
    if (span_own(core, session, layer) < 0) {
        winnow_op_wait_room(core, &session->op, "a span of layer %u that forks share", layer);
        return;
    }
    state->seal_state = WINNOW_SEAL_PERMUTING;
    for (uint32_t head = 0; head < n_heads; head++) {
        struct winnow_item *item = winnow_item_take(core, session);
        winnow_assert(item);
        item->layer = layer;
        item->head = head;
        item->segment = context->segment[context->layer[layer].n_segments];
        state->n_builds++;
        session->op.n_items++;
        winnow_item_submit(core, item, WINNOW_LANE_DECODE, permute_run, permute_done);
    }
}

void winnow_seal_forget(struct winnow_session *session, uint32_t layer)
{
    struct winnow_context *context = session->context;
    struct winnow_session_layer *state = &session->layer[layer];
    winnow_assert(state->n_builds == 0);
    winnow_assert(state->seal_state == WINNOW_SEAL_NONE || state->seal_state == WINNOW_SEAL_BUILT);
    if (state->seal_state == WINNOW_SEAL_BUILT)
        winnow_segment_layer_give(context->segment[context->layer[layer].n_segments], layer);
    state->seal_state = WINNOW_SEAL_NONE;
}
