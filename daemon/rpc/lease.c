// The two streams that only tell: Lease, whose end closes its sessions, and health's Watch.
//
// A lease ends when its stream does: by the client, with its connection, or with its process (the
// listener shuts a dead peer's connection down). The core then closes every session of the owner;
// the call stays until that is done, so a drained server holds nothing.
#include <assert.h>
#include <base/assert.h>
#include <base/log.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <string.h>

static_assert(sizeof((struct winnow_lease *)0)->token == WINNOW_WIRE_ID_BYTES, "the wire's");
static_assert(GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__UNKNOWN == 0,
              "a watcher that was told nothing");

static void lease_send(struct winnow_rpc_call *call, Winnow__V1__LeaseEvent__Kind kind)
{
    winnow_assert(!call->sending);
    winnow_assert(call->lease.lease);
    Winnow__V1__LeaseEvent event = WINNOW__V1__LEASE_EVENT__INIT;
    event.kind = kind;
    if (kind == WINNOW__V1__LEASE_EVENT__KIND__KIND_GRANTED) {
        event.token = (ProtobufCBinaryData){16, call->lease.lease->token};
        event.boot_id = (ProtobufCBinaryData){16, call->rpc->boot_id};
    }
    winnow_rpc_call_send(call, &event, NULL, false);
}

static void lease_begin(struct winnow_rpc_call *call)
{
    winnow_assert(!call->lease.lease);
    winnow_assert(!call->lease_id);
    struct winnow_rpc *rpc = call->rpc;
    call->lease.lease = winnow_lease_take(rpc->registry);
    if (!call->lease.lease) {
        winnow_rpc_call_fail(call, -EDQUOT, "%u clients hold leases, limit %u. hint: host_pool",
                             winnow_lease_count(rpc->registry), rpc->limits->n_clients_max);
        return;
    }
    call->lease_id = call->lease.lease->id;
    lease_send(call, WINNOW__V1__LEASE_EVENT__KIND__KIND_GRANTED);
}

/* One event at a time is on its way; what came up meanwhile follows. */
static void lease_push(struct winnow_rpc_call *call)
{
    winnow_assert(call->is_open);
    if (call->sending)
        return;
    if (call->lease.is_draining_wanted) {
        call->lease.is_draining_wanted = false;
        lease_send(call, WINNOW__V1__LEASE_EVENT__KIND__KIND_DRAINING);
    } else if (call->lease.is_beat_wanted) {
        call->lease.is_beat_wanted = false;
        lease_send(call, WINNOW__V1__LEASE_EVENT__KIND__KIND_BEAT);
    }
}

static void lease_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    (void)message;
    call->lease.is_beat_wanted = true;
    lease_push(call);
    winnow_rpc_call_receive(call);
}

static void lease_end(struct winnow_rpc_call *call)
{
    struct winnow_lease *lease = call->lease.lease;
    if (!lease)
        return;
    winnow_assert(!call->is_open);
    winnow_assert(!call->own.is_busy);
    winnow_assert(call->lease_id == lease->id);
    struct winnow_request *request = &call->own.request;
    memset(request, 0, sizeof *request);
    request->kind = WINNOW_REQUEST_CLOSE_OWNER;
    request->owner = lease->id;
    request->deadline_ns = WINNOW_NEVER_NS;
    call->own.call = call;
    call->lease.lease = NULL;
    call->lease_id = 0; /* this request is not cancelled with the lease's others */
    winnow_rpc_cancel_items(call->rpc, lease->id);
    winnow_lease_give(call->rpc->registry, lease);
    winnow_rpc_submit(&call->own);
}

static void lease_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    winnow_assert(!call->is_open);
    winnow_assert(item->request.kind == WINNOW_REQUEST_CLOSE_OWNER);
    if (item->request.status < 0)
        winnow_log(WINNOW_LOG_ERROR, "lease_close", "errno=%d text=\"%s\"", -item->request.status,
                   item->request.text);
}

void winnow_rpc_lease_drain(struct winnow_rpc_call *call)
{
    winnow_assert(call->method == &winnow_rpc_lease);
    call->lease.is_draining_wanted = true;
    lease_push(call);
}

const struct winnow_rpc_method winnow_rpc_lease = {
    .path = "/winnow.v1.Winnow/Lease",
    .request = &winnow__v1__lease_beat__descriptor,
    .is_stream = true,
    .begin = lease_begin,
    .message = lease_message,
    .sent = lease_push,
    .done = lease_done,
    .end = lease_end,
};

static bool is_known_service(const char *service)
{
    return !*service || !strcmp(service, "winnow.v1.Winnow");
}

static void check_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Grpc__Health__V1__HealthCheckRequest *request = message->message;
    if (!is_known_service(request->service)) {
        winnow_rpc_call_fail(call, -ENOENT, "no such service");
        return;
    }
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    reply.status = winnow_rpc_is_healthy(call->rpc)
                       ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
                       : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
    winnow_rpc_call_answer(call, &reply); /* a draining daemon refuses the call itself */
}

static void check_half_close(struct winnow_rpc_call *call)
{
    winnow_rpc_call_fail(call, -EINVAL, "a request message is missing");
}

const struct winnow_rpc_method winnow_rpc_health_check = {
    .path = "/grpc.health.v1.Health/Check",
    .request = &grpc__health__v1__health_check_request__descriptor,
    .message = check_message,
    .half_close = check_half_close,
};

void winnow_rpc_watch_push(struct winnow_rpc_call *call)
{
    winnow_assert(call->method == &winnow_rpc_health_watch);
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    reply.status = winnow_rpc_is_healthy(call->rpc)
                       ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
                       : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
    if (call->watch.is_unknown)
        reply.status = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
    if (!call->watch.is_asked || call->sending || call->watch.told == reply.status)
        return;
    call->watch.told = reply.status;
    winnow_rpc_call_send(call, &reply, NULL, false);
}

static void watch_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Grpc__Health__V1__HealthCheckRequest *request = message->message;
    call->watch.is_asked = true;
    call->watch.is_unknown = !is_known_service(request->service);
    winnow_rpc_watch_push(call);
}

const struct winnow_rpc_method winnow_rpc_health_watch = {
    .path = "/grpc.health.v1.Health/Watch",
    .request = &grpc__health__v1__health_check_request__descriptor,
    .is_stream = true,
    .message = watch_message,
    .half_close = check_half_close,
    .sent = winnow_rpc_watch_push,
};
