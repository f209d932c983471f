// Requests: how they come in, which session they are for, how they wait there and leave.
#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <core/session.h>
#include <errno.h>
#include <stdio.h>

static_assert((WINNOW_CORE_REQUESTS & (WINNOW_CORE_REQUESTS - 1)) == 0,
              "the ring does not round it up");
static_assert(sizeof(((struct winnow_core_stats *)0)->n_errors) / sizeof(uint64_t) == 134,
              "winnow_request_done counts below it");

struct message {
    struct winnow_request *request;
    bool cancel;
};

int winnow_requests_create(struct winnow_ring **ret_ring)
{
    return winnow_ring_create(WINNOW_CORE_REQUESTS, sizeof(struct message), ret_ring);
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
    winnow_assert(request);
    winnow_assert(request->done);
    return message_send(core, request, false);
}

void winnow_core_cancel(struct winnow_core *core, struct winnow_request *request)
{
    message_send(core, request, true); /* a full ring: the deadline ends it */
}

void winnow_request_done(struct winnow_core *core, struct winnow_request *request)
{
    winnow_assert(request->status <= 0);
    if (request->status < 0 && -request->status < 134)
        core->stats.n_errors[-request->status]++;
    request->done(request);
}

static void request_fail(struct winnow_core *core, struct winnow_request *request, int error,
                         const char *text)
{
    winnow_assert(error < 0);
    request->status = error;
    snprintf(request->text, sizeof request->text, "%s", text);
    winnow_request_done(core, request);
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

uint64_t winnow_request_held(const struct winnow_session *session,
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

void winnow_queue_leave(struct winnow_session *session, struct winnow_request **at)
{
    struct winnow_request *request = *at;
    winnow_assert(request);
    winnow_assert(!*session->queue_last);
    *at = request->next;
    if (session->queue_last == &request->next)
        session->queue_last = at;
}

int64_t winnow_queue_expire(struct winnow_core *core, struct winnow_session *session)
{
    int64_t next_ns = WINNOW_NEVER_NS;
    for (struct winnow_request **at = &session->queue_first; *at;) {
        struct winnow_request *request = *at;
        if (request->deadline_ns > core->now_ns) {
            next_ns = request->deadline_ns < next_ns ? request->deadline_ns : next_ns;
            at = &request->next;
            continue;
        }
        winnow_queue_leave(session, at);
        request->n_held = winnow_request_held(session, request);
        request_fail(
            core, request, -ETIMEDOUT,
            "the deadline passed behind the session's other requests. hint: one at a time");
    }
    return next_ns;
}

static void session_close(struct winnow_core *core, struct winnow_session *session)
{
    winnow_assert(!session->closing);
    session->closing = true;
    while (session->queue_first) {
        struct winnow_request *request = session->queue_first;
        winnow_queue_leave(session, &session->queue_first);
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
    winnow_assert(!session->closing);
    winnow_assert(!*session->queue_last);
    request->next = NULL;
    *session->queue_last = request;
    session->queue_last = &request->next;
    winnow_op_start_next(core, session);
}

static void request_begin(struct winnow_core *core, struct winnow_request *request)
{
    request->status = 0;
    request->text[0] = 0;
    request->truncate_to = request->n_held = 0;
    request->core_private[0] = (uint64_t)core->now_ns;
    if (request->kind == WINNOW_REQUEST_OPEN) {
        winnow_open(core, request);
        winnow_request_done(core, request);
        return;
    }
    if (request->kind == WINNOW_REQUEST_CLOSE_OWNER) {
        close_owner(core, request->owner);
        winnow_request_done(core, request);
        return;
    }
    if (request->kind == WINNOW_REQUEST_STATS && request->session_id == 0) {
        winnow_stats_fill(core, request);
        winnow_request_done(core, request);
        return;
    }
    struct winnow_session *session = session_find(core, request->session_id, request->owner);
    if (!session) {
        request_fail(core, request, -ENOENT, "no such session. hint: open one");
        return;
    }
    if (request->kind == WINNOW_REQUEST_CLOSE) {
        session_close(core, session);
        winnow_request_done(core, request);
    } else if (request->kind == WINNOW_REQUEST_STATS) {
        winnow_stats_fill(core, request);
        winnow_request_done(core, request);
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
            winnow_queue_leave(session, at);
            waiting->n_held = winnow_request_held(session, waiting);
            request_fail(core, waiting, -ECANCELED, "cancelled");
            return;
        }
    }
}

bool winnow_requests_poll(struct winnow_core *core)
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
