// The step loop. Nothing here waits: requests, finished items and finished reads are messages, each
// moves one op's state machine as far as it goes, and what cannot go on is tried again when memory
// was freed. Between messages the owner runs work items itself: two wake-ups fewer a layer.
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <core/session.h>
#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum {
    N_REQUESTS_MAX = 4096,
    SPIN_ROUNDS =
        3000, /* of a pause each, about 50 us: less than a wake-up, more than an item's end */
};

static const int64_t GROW_WAIT_NS = 2 * WINNOW_NS_PER_MS; /* a data file is being allocated */

struct message {
    struct winnow_request *request;
    bool cancel;
};

static bool items_poll(struct winnow_core *core);

int winnow_core_create(const struct winnow_core_options *options, struct winnow_core **ret_core,
                       char text[256])
{
    winnow_assert(options->kernels && options->team);
    uint32_t S = options->segment_tokens;
    if (S % 128 || S > 8192) {
        snprintf(text, 256, "segment_tokens %u is not a multiple of 128 up to 8192. hint: 1024", S);
        return -EINVAL;
    }
    if (options->host_pool_bytes < 16 << 20) {
        snprintf(text, 256, "host_pool %.1f MiB is below 16 MiB. hint: host_pool = 32MiB",
                 (double)options->host_pool_bytes / (1 << 20));
        return -EINVAL;
    }
    snprintf(text, 256, "no memory for host_pool and index_memory");
    struct winnow_core *core = winnow_alloc(sizeof *core);
    if (!core)
        return -ENOMEM;
    core->options = *options;
    if (!S)
        core->options.segment_tokens = options->host_pool_bytes < 128 << 20 ? 512 : 1024;
    winnow_tiers_init(&core->tiers);
    winnow_rng_init(&core->rng, options->seed);
    core->wait_run_last = &core->wait_run_first;
    core->n_workers = winnow_team_size(options->team);
    uint64_t n_runs = options->host_pool_bytes / (8 << 20);
    core->n_runs_max = n_runs < options->n_steps_max ? (uint32_t)n_runs : options->n_steps_max;
    core->run = winnow_alloc_array(core->n_runs_max, sizeof *core->run);
    core->active = winnow_alloc_array(options->n_sessions_max + 1, sizeof *core->active);
    if (!core->run || !core->active ||
        winnow_arena_create(options->host_pool_bytes, winnow_segment_evicted, &core->tiers.arena) <
            0 ||
        winnow_index_memory_create(options->index_memory_bytes, &core->tiers.index) < 0 ||
        winnow_ring_create(N_REQUESTS_MAX, sizeof(struct message), &core->requests) < 0 ||
        winnow_pool_create(options->n_sessions_max, sizeof(struct winnow_session),
                           &core->sessions) < 0 ||
        winnow_pool_create(WINNOW_N_ITEMS, sizeof(struct winnow_item), &core->items) < 0 ||
        winnow_pool_create(WINNOW_N_LOADS, sizeof(struct winnow_load), &core->loads) < 0) {
        winnow_core_destroy(core);
        return -ENOMEM;
    }
    core->spill_of_piece = winnow_alloc_array(winnow_arena_staging_pieces(core->tiers.arena),
                                              sizeof(struct winnow_segment_layer *));
    if (!core->spill_of_piece) {
        winnow_core_destroy(core);
        return -ENOMEM;
    }
    text[0] = 0;
    *ret_core = core;
    return 0;
}

void winnow_core_destroy(struct winnow_core *core)
{
    if (!core)
        return;
    core->tiers.store = NULL;     /* closed: what it stored is gone */
    while (core->n_items_out > 0) /* they read what is freed below */
        if (!winnow_team_run_one(core->options.team, WINNOW_LANE_BUILD) && !items_poll(core))
            sched_yield();
    for (uint32_t i = 0; core->sessions && i < winnow_pool_size(core->sessions); i++) {
        struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (session)
            winnow_session_destroy(core, session);
    }
    for (uint32_t i = 0; core->run && core->tiers.index && i < core->n_runs_max; i++)
        winnow_index_memory_give(core->tiers.index, core->run[i].memory, core->run[i].memory_bytes);
    for (uint32_t i = 0; i < WINNOW_N_PASSES; i++)
        winnow_alloc_free(core->pass[i].memory);
    winnow_core_scratch_free(core);
    winnow_alloc_free(core->run);
    winnow_alloc_free(core->active);
    winnow_alloc_free(core->spill_of_piece);
    winnow_ring_destroy(core->requests);
    winnow_pool_destroy(core->sessions);
    winnow_pool_destroy(core->items);
    winnow_pool_destroy(core->loads);
    winnow_arena_destroy(core->tiers.arena);
    winnow_index_memory_destroy(core->tiers.index);
    winnow_alloc_free(core);
}

void winnow_core_arena(const struct winnow_core *core, void **ret_arena, size_t *ret_bytes)
{
    *ret_arena = winnow_arena_base(core->tiers.arena, ret_bytes);
}

void winnow_core_set_store(struct winnow_core *core, struct winnow_store *store)
{
    core->tiers.store = store;
}

static int message_send(struct winnow_core *core, struct winnow_request *request, bool cancel)
{
    struct message message = {request, cancel};
    int rc = winnow_ring_put(core->requests, &message);
    if (rc == 1 && core->options.notify)
        core->options.notify(core->options.notify_arg);
    return rc < 0 ? rc : 0;
}

int winnow_core_submit(struct winnow_core *core, struct winnow_request *request)
{
    return message_send(core, request, false);
}

void winnow_core_cancel(struct winnow_core *core, struct winnow_request *request)
{
    message_send(core, request, true); /* a full ring: the deadline ends it */
}

// --- requests -----------------------------------------------------------------------------------

static void request_done(struct winnow_core *core, struct winnow_request *request)
{
    if (request->status < 0 && -request->status < 134)
        core->stats.n_errors[-request->status]++;
    request->done(request);
}

static void request_fail(struct winnow_core *core, struct winnow_request *request, int error,
                         const char *text)
{
    request->status = error;
    snprintf(request->text, sizeof request->text, "%s", text);
    request_done(core, request);
}

static struct winnow_session *session_find(struct winnow_core *core, uint64_t session_id,
                                           uint64_t owner)
{
    uint32_t slot = (uint32_t)(session_id & 0xfffff); /* the low bits place it, all bits name it */
    if (slot >= winnow_pool_size(core->sessions))
        return NULL;
    struct winnow_session *session = winnow_pool_at(core->sessions, slot);
    if (!session || session->id != session_id || session->owner != owner || session->closing)
        return NULL;
    return session;
}

/* Tokens held where the request points: of its layer, or of every layer. */
static uint64_t request_held(const struct winnow_session *session,
                             const struct winnow_request *request)
{
    const struct winnow_context *context = session->context;
    uint32_t layer = request->kind == WINNOW_REQUEST_ATTEND   ? request->attend.layer
                     : request->kind == WINNOW_REQUEST_APPEND ? request->append.layer
                     : request->kind == WINNOW_REQUEST_EXACT  ? request->exact.layer
                                                              : UINT32_MAX;
    return layer < context->shape.n_layers ? context->layer[layer].held
                                           : winnow_context_held(context);
}

static void queue_leave(struct winnow_session *session, struct winnow_request **at)
{
    struct winnow_request *request = *at;
    *at = request->next;
    if (session->queue_last == &request->next)
        session->queue_last = at;
}

/* Ends what waits behind another request and is late. Returns the nearest deadline of the rest. */
static int64_t queue_expire(struct winnow_core *core, struct winnow_session *session)
{
    int64_t next_ns = WINNOW_NEVER_NS;
    for (struct winnow_request **at = &session->queue_first; *at;) {
        struct winnow_request *request = *at;
        if (request->deadline_ns > core->now_ns) {
            next_ns = request->deadline_ns < next_ns ? request->deadline_ns : next_ns;
            at = &request->next;
            continue;
        }
        queue_leave(session, at);
        request->n_held = request_held(session, request);
        request_fail(
            core, request, -ETIMEDOUT,
            "the deadline passed behind the session's other requests. hint: one at a time");
    }
    return next_ns;
}

static void op_start_next(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_request *request = session->queue_first;
    if (!request || session->op.state != WINNOW_OP_NONE)
        return;
    queue_leave(session, &session->queue_first);
    session->op = (struct winnow_op){.request = request,
                                     .number = ++core->n_ops,
                                     .state = WINNOW_OP_BEGIN,
                                     .arrived_ns = (int64_t)request->core_private[0]};
    session->active_idx = core->n_active;
    core->active[core->n_active++] = session;
    core->progress = true;
}

static void session_close(struct winnow_core *core, struct winnow_session *session)
{
    session->closing = true;
    while (session->queue_first) {
        struct winnow_request *request = session->queue_first;
        queue_leave(session, &session->queue_first);
        request_fail(core, request, -ECANCELED, "the session was closed");
    }
    session->op.cancelled = true;
    core->progress = true;
    if (session->op.state == WINNOW_OP_NONE && session->n_builds == 0)
        winnow_session_destroy(core, session);
}

static void close_owner(struct winnow_core *core, uint64_t owner)
{
    for (uint32_t i = 0; i < winnow_pool_size(core->sessions); i++) {
        struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (session && session->owner == owner && !session->closing)
            session_close(core, session);
    }
}

static void request_queue(struct winnow_core *core, struct winnow_session *session,
                          struct winnow_request *request)
{
    request->next = NULL;
    *session->queue_last = request;
    session->queue_last = &request->next;
    op_start_next(core, session);
}

static void request_begin(struct winnow_core *core, struct winnow_request *request)
{
    request->status = 0;
    request->text[0] = 0;
    request->truncate_to = request->n_held = 0;
    request->core_private[0] = (uint64_t)core->now_ns;
    if (request->kind == WINNOW_REQUEST_OPEN) {
        winnow_open(core, request);
        request_done(core, request);
        return;
    }
    if (request->kind == WINNOW_REQUEST_CLOSE_OWNER) {
        close_owner(core, request->owner);
        request_done(core, request);
        return;
    }
    if (request->kind == WINNOW_REQUEST_STATS && request->session_id == 0) {
        winnow_stats_fill(core, request);
        request_done(core, request);
        return;
    }
    struct winnow_session *session = session_find(core, request->session_id, request->owner);
    if (!session) {
        request_fail(core, request, -ENOENT, "no such session. hint: open one");
        return;
    }
    if (request->kind == WINNOW_REQUEST_CLOSE) {
        session_close(core, session);
        request_done(core, request);
    } else if (request->kind == WINNOW_REQUEST_STATS) {
        winnow_stats_fill(core, request);
        request_done(core, request);
    } else {
        request_queue(core, session, request);
    }
}

static void request_cancel(struct winnow_core *core, const struct winnow_request *request)
{
    for (uint32_t i = 0; i < winnow_pool_size(core->sessions); i++) {
        struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (!session)
            continue;
        if (session->op.state != WINNOW_OP_NONE && session->op.request == request) {
            session->op.cancelled = true;
            core->progress = true;
            return;
        }
        for (struct winnow_request **at = &session->queue_first; *at; at = &(*at)->next) {
            struct winnow_request *waiting = *at;
            if (waiting != request)
                continue;
            queue_leave(session, at);
            waiting->n_held = request_held(session, waiting);
            request_fail(core, waiting, -ECANCELED, "cancelled");
            return;
        }
    }
}

// --- ops ----------------------------------------------------------------------------------------

void winnow_op_fail(struct winnow_op *op, int error, const char *format, ...)
{
    if (op->failure < 0)
        return;
    winnow_assert(error < 0);
    op->failure = error;
    if (!op->request)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(op->request->text, sizeof op->request->text, format, args);
    va_end(args);
}

/* What the op ran with goes back; reads still under way keep their own memory. */
static void op_release(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (op->run) {
        for (uint64_t g = op->group_first; g < op->group_next; g++)
            winnow_group_release(core, session, &op->run->group[g % WINNOW_N_GROUPS]);
        op->run->taken = false;
        op->run = NULL;
        core->n_decoding--;
    }
    bool is_window = op->request && (op->request->kind == WINNOW_REQUEST_APPEND ||
                                     op->request->kind == WINNOW_REQUEST_EXACT);
    if (op->pass && is_window) /* blocks of a window that failed */
        winnow_context_shrink(session->context, op->layer, session->context->layer[op->layer].held);
    if (op->pass) {
        for (uint32_t i = 0; i < 2; i++)
            winnow_chunk_release(core, session, &op->pass->chunk[i]);
        op->pass->taken = false;
        op->pass = NULL;
    }
    for (uint32_t i = 0; i < op->n_slots; i++)
        winnow_arena_release(core->tiers.arena, op->slot[i]);
    winnow_alloc_free(op->slot);
    op->slot = NULL;
    op->n_slots = 0;
}

void winnow_op_lost(struct winnow_op *op, const struct winnow_segment *segment, int result)
{
    if (result == -ETIMEDOUT) {
        winnow_op_fail(op, -ETIMEDOUT, "the disk is late: layer %u. hint: a later deadline",
                       op->layer);
        return;
    }
    op->request->truncate_to = segment->first_token;
    winnow_op_fail(op, -ENODATA,
                   "block lost: layer %u. hint: truncate to %llu, send the tokens again", op->layer,
                   (unsigned long long)segment->first_token);
}

bool winnow_op_slots_take(struct winnow_core *core, struct winnow_session *session, uint32_t n)
{
    struct winnow_op *op = &session->op;
    uint32_t block_bytes = winnow_block_bytes(&session->context->shape);
    if (!op->slot)
        op->slot = winnow_alloc_array(n, sizeof *op->slot);
    if (!op->slot || (n > 0 && winnow_arena_take(core->tiers.arena, block_bytes, n, op->slot,
                                                 core->keep_bytes) < 0))
        return false;
    op->n_slots = n;
    return true;
}

void winnow_op_end(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_request *request = op->request;
    winnow_assert(op->n_items == 0);
    op_release(core, session);
    op->state = WINNOW_OP_NONE;
    op->request = NULL;
    op->number = 0;
    core->active[session->active_idx] = core->active[--core->n_active];
    core->active[session->active_idx]->active_idx = session->active_idx;
    core->progress = true;
    if (request) {
        request->status = op->failure;
        request->n_held = request_held(session, request);
        request_done(core, request);
    }
    if (!session->closing)
        op_start_next(core, session);
    else if (session->n_builds == 0)
        winnow_session_destroy(core, session);
}

static void queue_for_run(struct winnow_core *core, struct winnow_session *session)
{
    session->op.state = WINNOW_OP_QUEUED;
    session->next_run = NULL;
    *core->wait_run_last = session;
    core->wait_run_last = &session->next_run;
}

static void leave_run_queue(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_session **at = &core->wait_run_first;
    while (*at != session)
        at = &(*at)->next_run;
    *at = session->next_run;
    if (core->wait_run_last == &session->next_run)
        core->wait_run_last = at;
}

static bool op_take_run(struct winnow_core *core, struct winnow_op *op)
{
    if (op->request->kind == WINNOW_REQUEST_ATTEND) {
        for (uint32_t i = 0; i < core->n_runs_max; i++) /* the largest: it need not grow */
            if (!core->run[i].taken &&
                (!op->run || core->run[i].memory_bytes > op->run->memory_bytes))
                op->run = &core->run[i];
        if (!op->run)
            return false;
        op->run->taken = true;
        op->group_first = op->group_next = 0;
        core->n_decoding++;
        return true;
    }
    for (uint32_t i = 0; i < WINNOW_N_PASSES; i++)
        if (!core->pass[i].taken) {
            op->pass = &core->pass[i];
            op->pass->taken = true;
            return true;
        }
    return false;
}

static void op_run(struct winnow_core *core, struct winnow_session *session)
{
    switch (session->op.request ? session->op.request->kind : WINNOW_REQUEST_EXACT) {
    case WINNOW_REQUEST_ATTEND:
        winnow_decode_advance(core, session);
        return;
    case WINNOW_REQUEST_APPEND:
    case WINNOW_REQUEST_EXACT:
        winnow_window_advance(core, session);
        return;
    case WINNOW_REQUEST_TRUNCATE:
        winnow_truncate_advance(core, session);
        return;
    case WINNOW_REQUEST_FORK:
        if (winnow_fork(core, session))
            winnow_op_end(core, session);
        else if (session->op.failure < 0)
            core->progress = true;
        return;
    default:
        winnow_op_fail(&session->op, -EINVAL, "unknown request %u", session->op.request->kind);
        winnow_op_end(core, session);
    }
}

static void op_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (op->cancelled)
        winnow_op_fail(op, -ECANCELED, "cancelled");
    else if (op->request && op->request->deadline_ns <= core->now_ns)
        winnow_op_fail(
            op, -ETIMEDOUT,
            "the deadline passed; layer %u holds %llu tokens. hint: truncate evens the layers",
            op->layer, (unsigned long long)session->context->layer[op->layer].held);
    if (op->failure < 0) {
        if (op->n_items > 0)
            return;
        if (op->state == WINNOW_OP_QUEUED)
            leave_run_queue(core, session);
        winnow_op_end(core, session);
        return;
    }
    if (op->state == WINNOW_OP_QUEUED)
        return;
    if (op->state == WINNOW_OP_BEGIN && !op->run && !op->pass &&
        op->request->kind != WINNOW_REQUEST_FORK && !op_take_run(core, op)) {
        queue_for_run(core, session);
        return;
    }
    op_run(core, session);
}

static void run_queue_serve(struct winnow_core *core)
{
    struct winnow_session **at = &core->wait_run_first;
    while (*at) {
        struct winnow_session *session = *at;
        if (!op_take_run(core, &session->op)) {
            at = &session->next_run;
            continue;
        }
        leave_run_queue(core, session);
        session->op.state = WINNOW_OP_BEGIN;
        core->progress = true;
    }
}

/* Every op goes as far as it can. Returns the nearest deadline. */
static int64_t ops_advance(struct winnow_core *core)
{
    int64_t next_ns = WINNOW_NEVER_NS;
    run_queue_serve(core);
    for (uint32_t i = core->n_active; i-- > 0;) { /* an op that ends leaves its place to the last */
        struct winnow_session *session = core->active[i];
        struct winnow_request *request = session->op.request;
        int64_t queue_ns = queue_expire(core, session);
        if (request && session->op.failure == 0 && request->deadline_ns < next_ns)
            next_ns = request->deadline_ns;
        next_ns = queue_ns < next_ns ? queue_ns : next_ns;
        op_advance(core, session);
    }
    return next_ns;
}

/* True when nothing under way can free memory. */
static bool is_stuck(const struct winnow_core *core)
{
    bool can_spill = core->tiers.store && core->tiers.spill_first && !core->tiers.spill_refused;
    return !core->progress && core->n_items_out == 0 && core->n_spills == 0 && !can_spill &&
           winnow_pool_used(core->loads) == 0;
}

void winnow_op_wait_room(struct winnow_core *core, struct winnow_op *op, const char *format, ...)
{
    char what[160];
    winnow_spill_pump(core, true);
    if (!is_stuck(core))
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    bool disk_full = core->tiers.spill_refused;
    winnow_op_fail(op, -EDQUOT, "no room for %s: host_pool %llu MiB%s. hint: a larger %s", what,
                   (unsigned long long)(core->options.host_pool_bytes >> 20),
                   disk_full ? ", and the disk takes no more" : "",
                   disk_full ? "disk_cap or host_pool" : "host_pool, fewer sessions");
}

// --- items --------------------------------------------------------------------------------------

struct winnow_item *winnow_item_take(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_item *item = winnow_pool_take(core->items);
    if (!item)
        return NULL;
    *item = (struct winnow_item){.kernels = core->options.kernels,
                                 .scratch = core->scratch,
                                 .session = session,
                                 .layer = session->op.layer};
    return item;
}

void winnow_item_run_here(struct winnow_core *core, struct winnow_item *item,
                          void (*run)(struct winnow_work *, uint32_t),
                          void (*done)(struct winnow_core *, struct winnow_item *))
{
    run(&item->work, core->n_workers - 1);
    done(core, item);
    winnow_pool_give(core->items, item);
}

void winnow_item_submit(struct winnow_core *core, struct winnow_item *item, uint32_t lane,
                        void (*run)(struct winnow_work *, uint32_t),
                        void (*done)(struct winnow_core *, struct winnow_item *))
{
    item->work.run = run;
    item->work.lane = lane;
    item->done = done;
    core->n_items_out++;
    winnow_team_submit(core->options.team, &item->work);
}

void winnow_item_done(struct winnow_core *core, struct winnow_item *item)
{
    struct winnow_op *op = &item->session->op;
    (void)core;
    winnow_assert(op->n_items > 0);
    op->n_items--;
    if (item->result == -EDOM)
        winnow_op_fail(op, -EDOM, "NaN or Inf: layer %u. hint: the model's dtype", item->layer);
    else if (item->result < 0)
        winnow_op_fail(op, item->result, "layer %u: error %d", item->layer, -item->result);
}

static bool items_poll(struct winnow_core *core)
{
    bool any = false;
    for (struct winnow_work *work; (work = winnow_team_poll(core->options.team)); any = true) {
        struct winnow_item *item = (struct winnow_item *)work;
        core->n_items_out--;
        item->done(core, item);
        winnow_pool_give(core->items, item);
    }
    return any;
}

static bool store_poll(struct winnow_core *core)
{
    struct winnow_store_done done[64];
    bool any = false;
    if (!core->tiers.store)
        return false;
    for (uint32_t n = 64; n == 64;) {
        n = winnow_store_poll(core->tiers.store, done, 64);
        for (uint32_t i = 0; i < n; i++) {
            if (done[i].tag >> 62)
                winnow_spill_done(core, &done[i]);
            else
                winnow_load_done(core, &done[i]);
        }
        any |= n > 0;
    }
    return any;
}

static bool requests_poll(struct winnow_core *core)
{
    struct message message;
    bool any = false;
    for (; winnow_ring_take(core->requests, &message) == 1; any = true) {
        if (message.cancel)
            request_cancel(core, message.request);
        else
            request_begin(core, message.request);
    }
    return any;
}

/* Somebody waits for a build, so that it is worth the owner's time. */
static bool build_awaited(const struct winnow_core *core)
{
    for (uint32_t i = 0; i < core->n_active; i++) {
        uint32_t state = core->active[i]->op.state;
        if (state == WINNOW_OP_BUILD || state == WINNOW_OP_SEAL || state == WINNOW_OP_BEGIN)
            return true;
    }
    return core->n_workers == 1;
}

static bool item_run(struct winnow_core *core)
{
    if (winnow_team_run_one(core->options.team, WINNOW_LANE_EXACT))
        return true;
    return build_awaited(core) && winnow_team_run_one(core->options.team, WINNOW_LANE_BUILD);
}

/* Short of a wake-up's price it pays to wait here for the last items of a decode step. */
static bool items_spin(struct winnow_core *core)
{
    int n_rounds = core->n_workers > 1 ? SPIN_ROUNDS : 1; /* alone nobody else ends one */
    for (int i = 0; core->n_decoding && core->n_items_out && i < n_rounds; i++) {
        if (winnow_team_run_one(core->options.team, WINNOW_LANE_DECODE) || items_poll(core))
            return true;
        __builtin_ia32_pause();
    }
    return false;
}

/* A step may run many items: deadlines and certificates want to know how late it is. */
static int64_t clock_now(const struct winnow_core *core)
{
    return core->options.now ? core->options.now(core->options.now_arg) : winnow_clock_now_ns();
}

/* Workers spin between the phases of a step, but not while it waits for the disk: on a small
 * machine the I/O thread needs their core. */
static void team_warm(const struct winnow_core *core)
{
    winnow_team_hot(core->options.team, core->n_active > 0 && winnow_pool_used(core->loads) == 0);
}

int64_t winnow_core_step(struct winnow_core *core, int64_t now_ns)
{
    int64_t next_ns;
    team_warm(core);
    for (core->now_ns = now_ns;; core->now_ns = clock_now(core)) {
        core->progress = requests_poll(core);
        core->progress |= items_poll(core);
        core->progress |= store_poll(core);
        winnow_spill_pump(core, false);
        next_ns = ops_advance(core);
        if (!core->progress && !items_spin(core))
            break;
    }
    if (item_run(core))
        return now_ns; /* its end is a message; and time has passed */
    team_warm(core);
    if (core->spill_grows && next_ns > now_ns + GROW_WAIT_NS)
        next_ns = now_ns + GROW_WAIT_NS;
    return next_ns;
}
