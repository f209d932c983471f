// Ops: a request under way. What it runs with, how far it goes now, how it ends.
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <core/session.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

void winnow_op_start_next(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_request *request = session->queue_first;
    if (!request || session->op.state != WINNOW_OP_NONE)
        return;
    winnow_assert(!session->closing);
    winnow_assert(core->n_active < winnow_pool_used(core->sessions));
    winnow_assert(!session->op.run);
    winnow_assert(!session->op.pass);
    winnow_queue_leave(session, &session->queue_first);
    session->op = (struct winnow_op){.request = request,
                                     .number = ++core->n_ops,
                                     .state = WINNOW_OP_BEGIN,
                                     .arrived_ns = (int64_t)request->core_private[0]};
    session->active_idx = core->n_active;
    core->active[core->n_active++] = session;
    core->progress = true;
}

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
    winnow_assert(op->n_items == 0);
    winnow_assert(!(op->run && op->pass));
    winnow_assert(op->n_slots == 0 || op->slot);
    if (op->run) {
        winnow_assert(op->run->taken);
        winnow_assert(core->n_decoding > 0);
        winnow_assert(op->group_first <= op->group_next);
        winnow_assert(op->group_next - op->group_first <= WINNOW_N_GROUPS);
        for (uint64_t g = op->group_first; g < op->group_next; g++)
            winnow_group_release(core, session, &op->run->group[g % WINNOW_N_GROUPS]);
        winnow_pins_release(core, session);
        op->run->taken = false;
        op->run = NULL;
        core->n_decoding--;
    }
    bool is_window = op->request && (op->request->kind == WINNOW_REQUEST_APPEND ||
                                     op->request->kind == WINNOW_REQUEST_EXACT);
    if (op->pass && is_window) /* blocks of a window that failed */
        winnow_context_shrink(session->context, op->layer, session->context->layer[op->layer].held);
    winnow_parts_give(core, session);
    if (op->pass) {
        winnow_assert(op->pass->taken);
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
    winnow_assert(result < 0);
    if (result == -ETIMEDOUT) {
        winnow_op_fail(op, -ETIMEDOUT, "the disk is late: layer %u. hint: a later deadline",
                       op->layer);
        return;
    }
    if (op->failure == -ENODATA && segment->first_token >= op->request->truncate_to)
        return;
    if (op->failure == -ENODATA) /* of several, the first of the context is what helps */
        op->failure = 0;
    op->request->truncate_to = segment->first_token;
    winnow_op_fail(op, -ENODATA,
                   "block lost: layer %u. hint: truncate to %llu, send the tokens again", op->layer,
                   (unsigned long long)segment->first_token);
}

bool winnow_op_slots_take(struct winnow_core *core, struct winnow_session *session, uint32_t n)
{
    struct winnow_op *op = &session->op;
    uint32_t block_bytes = winnow_block_bytes(&session->context->shape);
    winnow_assert(op->n_slots == 0);
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
    winnow_assert(op->state != WINNOW_OP_NONE);
    winnow_assert(core->n_active > 0);
    winnow_assert(core->active[session->active_idx] == session);
    op_release(core, session);
    op->state = WINNOW_OP_NONE;
    op->request = NULL;
    op->number = 0;
    core->active[session->active_idx] = core->active[--core->n_active];
    core->active[session->active_idx]->active_idx = session->active_idx;
    core->progress = true;
    if (request) {
        request->status = op->failure;
        request->n_held = winnow_request_held(session, request);
        winnow_request_done(core, request);
    }
    if (!session->closing)
        winnow_op_start_next(core, session);
    else if (session->n_builds == 0)
        winnow_session_destroy(core, session);
}

static void queue_for_run(struct winnow_core *core, struct winnow_session *session)
{
    winnow_assert(session->op.state == WINNOW_OP_BEGIN);
    winnow_assert(*core->wait_run_last == NULL);
    session->op.state = WINNOW_OP_QUEUED;
    session->next_run = NULL;
    *core->wait_run_last = session;
    core->wait_run_last = &session->next_run;
}

static void leave_run_queue(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_session **at = &core->wait_run_first;
    winnow_assert(session->op.state == WINNOW_OP_QUEUED);
    while (*at != session) {
        winnow_assert(*at); /* it is in the queue */
        at = &(*at)->next_run;
    }
    *at = session->next_run;
    if (core->wait_run_last == &session->next_run)
        core->wait_run_last = at;
}

static bool op_take_run(struct winnow_core *core, struct winnow_op *op)
{
    winnow_assert(!op->run);
    winnow_assert(!op->pass);
    if (op->request->kind == WINNOW_REQUEST_ATTEND) {
        for (uint32_t i = 0; i < core->n_runs_max; i++) /* the largest: it need not grow */
            if (!core->run[i].taken &&
                (!op->run || core->run[i].memory_bytes > op->run->memory_bytes))
                op->run = &core->run[i];
        if (!op->run)
            return false;
        winnow_assert(core->n_decoding < core->n_runs_max);
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
    winnow_assert(op->state != WINNOW_OP_NONE);
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
        winnow_assert(session->op.state == WINNOW_OP_QUEUED);
        if (!op_take_run(core, &session->op)) {
            at = &session->next_run;
            continue;
        }
        leave_run_queue(core, session);
        session->op.state = WINNOW_OP_BEGIN;
        core->progress = true;
    }
}

int64_t winnow_ops_advance(struct winnow_core *core)
{
    int64_t next_ns = WINNOW_NEVER_NS;
    run_queue_serve(core);
    for (uint32_t i = core->n_active; i-- > 0;) { /* an op that ends leaves its place to the last */
        struct winnow_session *session = core->active[i];
        winnow_assert(session->active_idx == i);
        struct winnow_request *request = session->op.request;
        int64_t queue_ns = winnow_queue_expire(core, session);
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
           winnow_pool_used(core->loads) == 0 && !winnow_device_busy(core->tiers.device);
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
