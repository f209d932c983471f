// An exact window of one layer (Append is one without queries):
//
//   BEGIN          checks; a span left due by an earlier call is sealed first
//   ROOM           the window's blocks, all heads                     (waits for slots)
//   CONVERT        K, V into them; NaN and Inf refused                items: head x tokens
//   QUERIES        of a window that the device attends, to it         items: head x tile
//   SEALED_KEYS    512 positions at a time over what is sealed        items: head x tile, chunk.c
//                  the device: chunks, then sinks and tail            items: parts, parts.c
//   RESIDENT_KEYS  then over sinks and tail, causally; out, lse       items: head x tile
//   reply
//   SEAL           every span that is due is built and in force for the layer's next call
//
// A tile of 64 positions keeps one running partial a query, continued over sealed blocks in list
// order, then residents by position: chunk sizes and residency cannot change a bit.
#include <assert.h>
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <math.h>
#include <string.h>

enum {
    CONVERT_TOKENS = 128,
    SEALED_AT_ONCE = 64,
    TILES_MAX = WINNOW_WINDOW_POSITIONS / WINNOW_TILE_POSITIONS, /* of a pass, a head */
};
static_assert(CONVERT_TOKENS % WINNOW_BLOCK_TOKENS == 0, "a block belongs to one item");
static_assert(SEALED_AT_ONCE % WINNOW_GROUP_BLOCKS == 0, "the same eight meet in every run");

static uint32_t window_tokens(const struct winnow_request *request)
{
    return request->kind == WINNOW_REQUEST_EXACT ? request->exact.n_tokens
                                                 : request->append.n_tokens;
}

static uint64_t window_first(const struct winnow_request *request)
{
    return request->kind == WINNOW_REQUEST_EXACT ? request->exact.first : request->append.first;
}

// --- BEGIN, ROOM --------------------------------------------------------------------------------

/* Index memory of the spans that this window makes due, and of a step over all that is sealed then:
 * a context that cannot be decoded is of no use. */
static bool index_has_room(struct winnow_core *core, const struct winnow_session *session,
                           uint32_t n_tokens)
{
    const struct winnow_context *context = session->context;
    uint32_t layer = session->op.layer, n_blocks = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    uint64_t end = winnow_context_span_end(context, layer), need_bytes = 0;
    uint64_t held = context->layer[layer].held + n_tokens;
    uint32_t k = context->layer[layer].n_segments;
    for (; end + WINNOW_RECENT_TOKENS <= held; end += context->segment_tokens, k++) {
        if (k >= context->n_segments_max)
            return false;
        need_bytes += winnow_segment_piece_bytes(&context->shape, n_blocks, context->with_var) +
                      WINNOW_PAGE_BYTES;
        if (!context->segment[k])
            need_bytes +=
                winnow_segment_header_bytes(&context->shape, n_blocks) + WINNOW_PAGE_BYTES;
    }
    if (need_bytes > 0)
        need_bytes += winnow_run_wants(core, session, k * n_blocks);
    return need_bytes <= winnow_index_left(core, session);
}

static void begin_check(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_request *request = op->request;
    const struct winnow_context *context = session->context;
    bool exact = request->kind == WINNOW_REQUEST_EXACT;
    uint32_t layer = exact ? request->exact.layer : request->append.layer;
    uint32_t n_tokens = window_tokens(request);
    if (request->epoch != session->epoch) {
        winnow_op_fail(op, -ESTALE,
                       "epoch %u is old, the session's is %u. hint: a truncate raised it",
                       request->epoch, session->epoch);
        return;
    }
    if (layer >= context->shape.n_layers) {
        winnow_op_fail(op, -EINVAL, "layer %u of a model with %u", layer, context->shape.n_layers);
        return;
    }
    op->layer = layer;
    uint64_t held = context->layer[layer].held;
    if (window_first(request) != held)
        winnow_op_fail(
            op, -EINVAL, "layer %u holds %llu tokens, append starts at %llu. hint: %s %llu", layer,
            (unsigned long long)held, (unsigned long long)window_first(request),
            window_first(request) > held ? "resend from" : "truncate first, to",
            (unsigned long long)(window_first(request) > held ? held : window_first(request)));
    else if (n_tokens == 0 || n_tokens > WINNOW_WINDOW_TOKENS_MAX)
        winnow_op_fail(op, n_tokens ? -EMSGSIZE : -EINVAL,
                       "a window of %u tokens; 1 to %d are taken", n_tokens,
                       WINNOW_WINDOW_TOKENS_MAX);
    else if (held + n_tokens > context->n_tokens_max)
        winnow_op_fail(op, -EDQUOT, "%llu tokens exceed the %llu a context may hold",
                       (unsigned long long)(held + n_tokens),
                       (unsigned long long)context->n_tokens_max);
    else if (!index_has_room(core, session, n_tokens))
        winnow_op_fail(op, -EDQUOT,
                       "index_memory %llu MiB is full: %llu tokens sealed. hint: a larger "
                       "index_memory, fewer sessions",
                       (unsigned long long)(core->options.index_memory_bytes >> 20),
                       (unsigned long long)winnow_context_sealed(context));
    else if (winnow_pass_prepare(op->pass, session) < 0)
        winnow_op_fail(op, -EDQUOT, "no memory for a window");
    op->certificate = (struct winnow_core_certificate){.verdict = WINNOW_VERDICT_EXACT,
                                                       .mass_asked = 1,
                                                       .mass_reached = 1,
                                                       .mass_mean = 1,
                                                       .n_rounds = 1};
}

static bool room_take(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_context *context = session->context;
    op->certificate.n_blocks_total = context->layer[op->layer].n_segments *
                                     context->shape.n_kv_heads *
                                     (context->segment_tokens / WINNOW_BLOCK_TOKENS);
    if (winnow_context_grow(context, op->layer, window_tokens(op->request), core->keep_bytes) == 0)
        return true;
    winnow_op_wait_room(core, op, "%u tokens of layer %u", window_tokens(op->request), op->layer);
    return false;
}

// --- CONVERT ------------------------------------------------------------------------------------

/* Rows [first, first + n) of one head, of `width` numbers, out of an array of all heads. */
static int rows_convert(const struct winnow_item *item, const void *all, uint32_t n_heads,
                        uint32_t width, uint32_t head, uint32_t first, uint32_t n, float *row)
{
    const struct winnow_model_shape *shape = &item->session->context->shape;
    winnow_assert(head < n_heads);
    size_t row_bytes = (size_t)n_heads * width * winnow_dtype_bytes(shape->io_dtype);
    const uint8_t *from = (const uint8_t *)all + first * row_bytes +
                          (size_t)head * width * winnow_dtype_bytes(shape->io_dtype);
    for (uint32_t i = 0; i < n; i++, from += row_bytes) {
        int rc = item->kernels->to_float(shape->io_dtype, width, from, row + (size_t)i * width);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* Tokens [item->first, + n) of the window, one head: K and V packed; its queries looked at. */
static void convert_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    const struct winnow_context *context = item->session->context;
    const struct winnow_model_shape *shape = &context->shape;
    const struct winnow_request *request = item->session->op.request;
    bool exact = request->kind == WINNOW_REQUEST_EXACT;
    const void *all_k = exact ? request->exact.k : request->append.k;
    const void *all_v = exact ? request->exact.v : request->append.v;
    uint32_t G = winnow_group_heads(shape);
    float *k = (float *)(void *)item->scratch[worker_idx],
          *v = k + WINNOW_BLOCK_TOKENS * shape->k_width;
    for (uint32_t at = item->first; at < item->first + item->n && item->result == 0;) {
        uint64_t position = window_first(request) + at;
        winnow_assert(position >= context->layer[item->layer].held);
        uint32_t in_block = (uint32_t)(position % WINNOW_BLOCK_TOKENS);
        uint32_t n = WINNOW_BLOCK_TOKENS - in_block;
        if (n > item->first + item->n - at)
            n = item->first + item->n - at;
        item->result =
            rows_convert(item, all_k, shape->n_kv_heads, shape->k_width, item->head, at, n, k);
        if (item->result == 0)
            item->result =
                rows_convert(item, all_v, shape->n_kv_heads, shape->v_width, item->head, at, n, v);
        uint32_t block_idx = winnow_context_block_of(context, item->layer, position);
        winnow_assert(block_idx < context->layer[item->layer].n_blocks);
        if (item->result == 0)
            item->kernels->block_pack(
                shape, in_block, n, k, v,
                winnow_context_block(context, item->layer, item->head, block_idx));
        for (uint32_t i = 0; exact && i < n && item->result == 0; i++)
            item->result = rows_convert(item, request->exact.q, shape->n_kv_heads,
                                        G * shape->k_width, item->head, at + i, 1, k);
        at += n;
    }
}

static bool convert_submit(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    uint32_t n_tokens = window_tokens(op->request), in_block;
    in_block = (uint32_t)(window_first(op->request) % WINNOW_BLOCK_TOKENS);
    /* op->at counts what was handed out: items are bounded; a block belongs to one item */
    while (op->at < (uint64_t)n_tokens * session->context->shape.n_kv_heads) {
        struct winnow_item *item = winnow_item_take(core, session);
        if (!item)
            return false;
        item->head = (uint32_t)(op->at / n_tokens);
        item->first = (uint32_t)(op->at % n_tokens);
        uint32_t n = item->first ? CONVERT_TOKENS : CONVERT_TOKENS - in_block;
        item->n = n < n_tokens - item->first ? n : n_tokens - item->first;
        winnow_assert(item->n > 0);
        op->at += item->n;
        op->n_items++;
        winnow_item_submit(core, item, WINNOW_LANE_EXACT, convert_run, winnow_item_done);
    }
    winnow_assert(op->at == (uint64_t)n_tokens * session->context->shape.n_kv_heads);
    return true;
}

// --- keys ---------------------------------------------------------------------------------------

static float *tile_partial(const struct winnow_session *session, uint32_t head, uint32_t pos)
{
    size_t partial_floats = winnow_partial_floats(&session->context->shape);
    winnow_assert(head < session->context->shape.n_kv_heads);
    winnow_assert(pos < WINNOW_WINDOW_POSITIONS);
    return session->op.pass->partial +
           ((size_t)head * WINNOW_WINDOW_POSITIONS + pos) * partial_floats;
}

/* fp32 queries of the item's tile, [pos][G][k_width]; they were looked at in CONVERT. */
static float *tile_queries(const struct winnow_item *item, uint32_t worker_idx, void **ret_scratch)
{
    const struct winnow_model_shape *shape = &item->session->context->shape;
    const struct winnow_op *op = &item->session->op;
    uint32_t G = winnow_group_heads(shape);
    float *q = (float *)(void *)item->scratch[worker_idx];
    winnow_assert(item->n <= WINNOW_TILE_POSITIONS);
    winnow_assert(op->at >= window_first(op->request));
    uint32_t first = (uint32_t)(op->at - window_first(op->request)) + item->first;
    rows_convert(item, op->request->exact.q, shape->n_kv_heads, G * shape->k_width, item->head,
                 first, item->n, q);
    size_t q_bytes =
        (size_t)WINNOW_TILE_POSITIONS * G * (shape->k_width + shape->v_width) * sizeof(float);
    *ret_scratch = item->scratch[worker_idx] + ((q_bytes + 63) & ~(size_t)63);
    return q;
}

static void sealed_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    struct winnow_session *session = item->session;
    const struct winnow_op *op = &session->op;
    const struct winnow_chunk *chunk = &op->pass->chunk[op->chunk_first % 2];
    uint64_t position[SEALED_AT_ONCE];
    uint32_t n_tokens[SEALED_AT_ONCE];
    void *scratch;
    float *q = tile_queries(item, worker_idx, &scratch);
    for (uint32_t i = 0; i < SEALED_AT_ONCE; i++) {
        position[i] = UINT64_MAX;
        n_tokens[i] = WINNOW_BLOCK_TOKENS;
    }
    const void **data = chunk->data + (size_t)item->head * op->pass->chunk_blocks_max;
    for (uint32_t i = 0; i < chunk->n_of_head[item->head]; i += SEALED_AT_ONCE) {
        uint32_t n = chunk->n_of_head[item->head] - i;
        item->kernels->attend_window(&session->context->shape, item->n, op->at + item->first, q,
                                     n < SEALED_AT_ONCE ? n : SEALED_AT_ONCE, data + i, position,
                                     n_tokens, tile_partial(session, item->head, item->first),
                                     scratch);
    }
}

/* out and lse [G] of one position of the pass, to where the caller wants them. */
static int position_write(const struct winnow_item *item, const struct winnow_op *op, uint32_t pos,
                          const float *out, const float *lse)
{
    const struct winnow_model_shape *shape = &item->session->context->shape;
    uint32_t G = winnow_group_heads(shape);
    size_t row = (size_t)(op->at - window_first(op->request)) + pos;
    size_t head_first = row * shape->n_q_heads + (size_t)item->head * G;
    if (op->request->exact.lse)
        memcpy(op->request->exact.lse + head_first, lse, G * sizeof(float));
    uint8_t *target = op->request->exact.out;
    target += head_first * shape->v_width * winnow_dtype_bytes(shape->io_dtype);
    return item->kernels->from_float(shape->io_dtype, (size_t)G * shape->v_width, out, target);
}

static int position_finish(const struct winnow_item *item, uint32_t pos, float *out)
{
    const struct winnow_session *session = item->session;
    float lse[WINNOW_GQA_MAX];
    item->kernels->finish(&session->context->shape, tile_partial(session, item->head, pos), out,
                          lse);
    return position_write(item, &session->op, pos, out, lse);
}

static void resident_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    const struct winnow_context *context = item->session->context;
    const struct winnow_model_shape *shape = &context->shape;
    const struct winnow_context_layer *layer = &context->layer[item->layer];
    const struct winnow_op *op = &item->session->op;
    uint64_t last = op->at + item->first + item->n - 1;
    winnow_assert(last < layer->held);
    void *scratch;
    float *q = tile_queries(item, worker_idx, &scratch);
    for (uint32_t i = 0; i < layer->n_blocks;) {
        const void *block[SEALED_AT_ONCE];
        uint64_t position[SEALED_AT_ONCE];
        uint32_t n_tokens[SEALED_AT_ONCE], n = 0;
        for (; i < layer->n_blocks && n < SEALED_AT_ONCE; i++) {
            uint64_t at = winnow_context_position_of(context, item->layer, i);
            if (at > last)
                break;
            block[n] = winnow_context_block(context, item->layer, item->head, i);
            position[n] = at;
            n_tokens[n++] = layer->held - at < WINNOW_BLOCK_TOKENS ? (uint32_t)(layer->held - at)
                                                                   : WINNOW_BLOCK_TOKENS;
        }
        if (n == 0)
            break;
        item->kernels->attend_window(shape, item->n, op->at + item->first, q, n, block, position,
                                     n_tokens, tile_partial(item->session, item->head, item->first),
                                     scratch);
    }
    for (uint32_t pos = item->first; pos < item->first + item->n && item->result == 0; pos++)
        item->result = position_finish(item, pos, q);
}

// --- the device's rows --------------------------------------------------------------------------

/* Of the item's position pos, among the rows of all heads and positions: the first of G. */
static size_t device_row(const struct winnow_item *item, const struct winnow_device *device,
                         uint32_t pos)
{
    winnow_assert(pos < device->shape_options.n_window_positions);
    return ((size_t)item->head * device->shape_options.n_window_positions + pos) *
           winnow_group_heads(&device->shape_options.shape);
}

static void queries_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    const struct winnow_op *op = &item->session->op;
    const struct winnow_model_shape *shape = &item->session->context->shape;
    const struct winnow_device *device = item->session->context->tiers->device;
    uint32_t first = (uint32_t)(op->at - window_first(op->request)) + item->first;
    (void)worker_idx;
    item->result =
        rows_convert(item, op->request->exact.q, shape->n_kv_heads,
                     winnow_group_heads(shape) * shape->k_width, item->head, first, item->n,
                     device->rows.q + device_row(item, device, item->first) * shape->k_width);
}

static void outputs_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    const struct winnow_op *op = &item->session->op;
    const struct winnow_device *device = item->session->context->tiers->device;
    uint32_t v_width = item->session->context->shape.v_width;
    (void)worker_idx;
    for (uint32_t pos = item->first; pos < item->first + item->n && item->result == 0; pos++) {
        size_t row = device_row(item, device, pos);
        item->result =
            position_write(item, op, pos, device->rows.out + row * v_width, device->rows.lse + row);
    }
}

/* An item for every (head, tile) with something to do. False: items are out, nothing is sent. */
static bool tiles_submit(struct winnow_core *core, struct winnow_session *session,
                         const struct winnow_chunk *chunk,
                         void (*run)(struct winnow_work *, uint32_t))
{
    struct winnow_op *op = &session->op;
    uint32_t n_heads = session->context->shape.n_kv_heads;
    winnow_assert(op->n_items == 0);
    winnow_assert(op->n_pass > 0);
    uint32_t n_tile = (op->n_pass + TILES_MAX - 1) / TILES_MAX;
    n_tile = n_tile < WINNOW_TILE_POSITIONS ? WINNOW_TILE_POSITIONS : n_tile;
    uint32_t n_tiles = (op->n_pass + n_tile - 1) / n_tile;
    winnow_assert(n_tiles <= TILES_MAX);
    if (winnow_pool_size(core->items) - winnow_pool_used(core->items) < n_heads * n_tiles)
        return false;
    for (uint32_t i = 0; i < n_heads * n_tiles; i++) {
        uint32_t head = i / n_tiles, first = i % n_tiles * n_tile;
        if (chunk && chunk->n_of_head[head] == 0)
            continue;
        struct winnow_item *item = winnow_item_take(core, session);
        winnow_assert(item);
        item->head = head;
        item->first = first;
        item->n = op->n_pass - first < n_tile ? op->n_pass - first : n_tile;
        op->n_items++;
        winnow_item_submit(core, item, WINNOW_LANE_EXACT, run, winnow_item_done);
    }
    return true;
}

static void pass_begin(const struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    const struct winnow_model_shape *shape = &session->context->shape;
    uint64_t left = window_first(op->request) + window_tokens(op->request) - op->at;
    bool by_device = winnow_parts_taken(core, session);
    winnow_assert(left > 0);
    winnow_assert(left <= window_tokens(op->request));
    uint32_t stride = shape->v_width + 2, G = winnow_group_heads(shape);
    uint32_t n_most =
        by_device ? core->tiers.device->shape_options.n_window_positions : WINNOW_WINDOW_POSITIONS;
    op->n_pass = left < n_most ? (uint32_t)left : n_most;
    op->cursor = (struct winnow_cursor){0};
    op->chunk_first = op->chunk_next = op->chunk_sent = 0;
    op->n_sent = 0;
    op->all_sent = false;
    op->state = by_device ? WINNOW_OP_QUERIES : WINNOW_OP_SEALED_KEYS;
    if (by_device)
        return;
    for (uint32_t head = 0; head < shape->n_kv_heads; head++) {
        float *partial = tile_partial(session, head, 0);
        memset(partial, 0, (size_t)op->n_pass * G * stride * sizeof(float));
        for (uint32_t row = 0; row < op->n_pass * G; row++)
            partial[(size_t)row * stride] = -INFINITY;
    }
}

/* True when every sealed block is attended. The items of chunk_first have all ended. */
static bool sealed_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_chunk *chunk = &op->pass->chunk[op->chunk_first % 2];
    uint32_t n_segments = session->context->layer[op->layer].n_segments;
    winnow_assert(op->chunk_first <= op->chunk_next);
    winnow_assert(op->chunk_next - op->chunk_first <= 2);
    if (chunk->state == WINNOW_CHUNK_RUNNING) {
        winnow_chunk_release(core, session, chunk);
        op->chunk_first++;
        chunk = &op->pass->chunk[op->chunk_first % 2];
    }
    while (op->chunk_next < op->chunk_first + 2 && op->cursor.segment_idx < n_segments) {
        uint32_t chunk_idx = (uint32_t)(op->chunk_next % 2);
        if (!winnow_chunk_fill(core, session, &op->pass->chunk[chunk_idx], chunk_idx, false))
            break;
        op->chunk_next++;
    }
    if (op->chunk_first == op->chunk_next)
        return op->cursor.segment_idx >= n_segments;
    if (chunk->state == WINNOW_CHUNK_READY && tiles_submit(core, session, chunk, sealed_run))
        chunk->state = WINNOW_CHUNK_RUNNING;
    return false;
}

/* True when every block is attended. */
static bool keys_advance(struct winnow_core *core, struct winnow_session *session)
{
    if (winnow_parts_taken(core, session))
        return winnow_parts_advance(core, session) &&
               tiles_submit(core, session, NULL, outputs_run);
    return sealed_advance(core, session) && tiles_submit(core, session, NULL, resident_run);
}

/* The device was lost with the window: the CPU begins it anew, once no read of it is out. */
static bool window_restart(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (op->n_items > 0 || op->n_loads > 0)
        return false;
    for (uint32_t i = 0; i < 2; i++)
        winnow_chunk_release(core, session, &op->pass->chunk[i]);
    winnow_parts_give(core, session);
    op->certificate.n_blocks_host = op->certificate.n_blocks_disk = 0;
    op->at = window_first(op->request);
    pass_begin(core, session);
    return true;
}

// --- the machine --------------------------------------------------------------------------------

/* The caller has its answer; what follows is the layer's next call's business. */
static void reply(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_request *request = op->request;
    int64_t us = (core->now_ns - op->arrived_ns) / 1000;
    op->certificate.micros = us > 0 ? (uint32_t)us : 0;
    session->stats.n_exact_windows += request->kind == WINNOW_REQUEST_EXACT;
    if (request->kind == WINNOW_REQUEST_EXACT)
        request->exact.certificate = op->certificate;
    request->status = 0;
    request->n_held = session->context->layer[op->layer].held;
    winnow_assert(request->n_held == window_first(request) + window_tokens(request));
    winnow_assert(request->n_held <= session->context->n_tokens_max);
    op->request = NULL;
    request->done(request);
}

/* One stage of sealing further; true when nothing is due. */
static bool seal_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    uint8_t seal_state = session->layer[op->layer].seal_state;
    if (!winnow_seal_due(session, op->layer, WINNOW_RECENT_TOKENS))
        return true;
    if (seal_state == WINNOW_SEAL_NONE) {
        if (winnow_seal_start(core, session, op->layer, WINNOW_LANE_EXACT) < 0)
            winnow_op_fail(op, -EDQUOT,
                           "index_memory is full: layer %u. hint: a larger index_memory",
                           op->layer);
    } else if (seal_state == WINNOW_SEAL_BUILT) {
        winnow_seal_permute(core, session, op->layer);
    }
    return false;
}

static bool advance_once(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    switch (op->state) {
    case WINNOW_OP_BEGIN:
        begin_check(core, session);
        if (op->failure < 0)
            return false;
        op->state = WINNOW_OP_ROOM;
        return true;
    case WINNOW_OP_ROOM:
        if (!seal_advance(core, session))
            return false;
        if (!room_take(core, session))
            return false;
        op->at = 0;
        op->state = WINNOW_OP_CONVERT;
        return true;
    case WINNOW_OP_CONVERT:
        if (!convert_submit(core, session) || op->n_items > 0 || !winnow_parts_take(core, session))
            return false;
        session->context->layer[op->layer].held += window_tokens(op->request);
        winnow_seal_owe(session, op->layer);
        op->at = window_first(op->request);
        if (op->request->kind == WINNOW_REQUEST_EXACT) {
            pass_begin(core, session);
        } else {
            reply(core, session);
            op->state = WINNOW_OP_SEAL;
        }
        return true;
    case WINNOW_OP_QUERIES:
        if (!tiles_submit(core, session, NULL, queries_run))
            return false;
        op->state = WINNOW_OP_SEALED_KEYS;
        return true;
    case WINNOW_OP_SEALED_KEYS:
        if (winnow_parts_taken(core, session) && core->tiers.device->lost)
            return window_restart(core, session);
        if (!keys_advance(core, session))
            return false;
        op->state = WINNOW_OP_RESIDENT_KEYS;
        return true;
    case WINNOW_OP_RESIDENT_KEYS:
        op->at += op->n_pass;
        if (op->at < window_first(op->request) + window_tokens(op->request)) {
            pass_begin(core, session);
        } else {
            session->stats.n_device_windows += winnow_parts_taken(core, session);
            winnow_parts_give(core, session);
            reply(core, session);
            op->state = WINNOW_OP_SEAL;
        }
        return true;
    case WINNOW_OP_SEAL:
        if (!seal_advance(core, session))
            return false;
        winnow_op_end(core, session);
        return false;
    default:
        winnow_assert(!"a state of a window");
        return false;
    }
}

/* Of the op's items: what is sent next does not wait for them. */
static uint32_t parts_out(const struct winnow_core *core, const struct winnow_session *session)
{
    return winnow_parts_taken(core, session) ? core->tiers.device->n_parts : 0;
}

void winnow_window_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    winnow_assert(op->pass);
    while (op->n_items == parts_out(core, session) || op->state == WINNOW_OP_CONVERT)
        if (!advance_once(core, session))
            break;
    if (op->failure < 0)
        core->progress = true;
}
