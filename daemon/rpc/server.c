// The server: one loop for gRPC and core.
//
// A decode step would cross threads twice a layer if messages went from an rpc thread to a core
// thread and back: 36 us a round trip instead of 24 (docs/decisions/0005). So both live on one
// thread: it waits in the completion queue alone, steps the core after every event, and encodes a
// reply where the core ends it. Whoever else finishes something (kernel workers, I/O thread) posts
// a tag to the queue, once until it is seen: an empty batch on a call to nowhere, the one door of
// the C API to do so from any thread. Rejected: registered methods, each with posted requests of
// its own; one kind of posted call cannot forget a method, and unknown ones are answered.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/log.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

/* Calls beyond n_calls_max that are being refused. */
enum { N_REFUSALS_MAX = 32 };

static const struct winnow_rpc_method no_method = {.path = ""};

static_assert(sizeof((struct winnow_rpc *)0)->boot_id == WINNOW_WIRE_ID_BYTES, "the wire's");
static_assert(WINNOW_TAG_WAKE >= WINNOW_N_CALL_TAGS, "no call's tag");
static_assert((int)WINNOW_LOOKAHEAD_BYTES <= (int)WINNOW_WIRE_CHUNK_BYTES_MAX,
              "less than a message");

const struct winnow_rpc_method *winnow_rpc_method_find(const char *path, size_t n_bytes)
{
    static const struct winnow_rpc_method *const methods[] = {
        &winnow_rpc_info,     &winnow_rpc_lease,        &winnow_rpc_open_session,
        &winnow_rpc_append,   &winnow_rpc_attend,       &winnow_rpc_attend_exact,
        &winnow_rpc_truncate, &winnow_rpc_fork,         &winnow_rpc_close,
        &winnow_rpc_stats,    &winnow_rpc_health_check, &winnow_rpc_health_watch,
    };
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (strlen(methods[i]->path) == n_bytes && !memcmp(methods[i]->path, path, n_bytes))
            return methods[i];
    return &no_method;
}

static grpc_server *server_create(void)
{
    const struct {
        const char *key;
        int value;
    } setting[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, WINNOW_WIRE_MESSAGE_BYTES_MAX},
        {GRPC_ARG_ALLOW_REUSEPORT, 0},
        {GRPC_ARG_ENABLE_CHANNELZ, 0},
        {GRPC_ARG_HTTP2_BDP_PROBE, 0},
        {GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, WINNOW_LOOKAHEAD_BYTES},
        {GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 1 << 20},
        {GRPC_ARG_MAX_METADATA_SIZE, WINNOW_WIRE_METADATA_BYTES_MAX},
        {GRPC_ARG_MAX_CONCURRENT_STREAMS, 256},
        {GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1},
        {GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000},
    };
    enum { N = sizeof setting / sizeof *setting };
    grpc_arg arg[N];
    for (size_t i = 0; i < N; i++) {
        arg[i].type = GRPC_ARG_INTEGER;
        arg[i].key = (char *)setting[i].key;
        arg[i].value.integer = setting[i].value;
    }
    grpc_channel_args args = {N, arg};
    return grpc_server_create(&args, NULL);
}

static int tables_create(struct winnow_rpc *rpc)
{
    const struct winnow_limits *limits = rpc->limits;
    winnow_assert(limits->n_posted);
    winnow_assert(limits->n_calls_reserved < limits->n_calls_max);
    winnow_assert(limits->n_calls_max <= WINNOW_CORE_REQUESTS);    /* winnow_rpc_submit */
    winnow_assert(limits->n_items_max >= WINNOW_WIRE_N_ITEMS_MAX); /* one message's fit */
    winnow_assert(limits->in_flight_bytes >= WINNOW_WIRE_CHUNK_BYTES_MAX);
    winnow_assert(limits->window_bytes <= limits->in_flight_bytes);
    uint32_t n_calls = limits->n_calls_max + limits->n_posted + N_REFUSALS_MAX;
    int rc = winnow_pool_create(n_calls, sizeof(struct winnow_rpc_call), &rpc->calls);
    if (!rc)
        rc = winnow_pool_create(limits->n_items_max, sizeof(struct winnow_rpc_item), &rpc->items);
    if (!rc)
        rc = winnow_registry_create(limits->n_clients_max, rpc->config->n_sessions_max,
                                    &rpc->registry);
    if (!rc)
        rc = winnow_inflight_create(limits->in_flight_bytes, &rpc->inflight);
    if (!rc)
        rc = winnow_wire_arena_create(&rpc->arena);
    if (!rc)
        rc = winnow_wire_arena_create(&rpc->reply_arena);
    if (!rc && getrandom(rpc->boot_id, sizeof rpc->boot_id, 0) != sizeof rpc->boot_id)
        rc = -EIO;
    return rc;
}

int winnow_rpc_create(const struct winnow_rpc_options *options, struct winnow_rpc **ret_rpc)
{
    winnow_assert(options->limits);
    winnow_assert(options->config);
    struct winnow_rpc *rpc = winnow_alloc(sizeof *rpc);
    if (!rpc)
        return -ENOMEM;
    rpc->limits = options->limits;
    rpc->config = options->config;
    rpc->kernels_name = options->kernels_name;
    rpc->waiting_end = &rpc->waiting;
    rpc->next_timer_ns = WINNOW_NEVER_NS;
    atomic_store(&rpc->drain_deadline_ns, WINNOW_NEVER_NS);
    int rc = tables_create(rpc);
    if (rc < 0) {
        winnow_rpc_destroy(rpc);
        return rc;
    }
    grpc_init();
    rpc->boot.key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_BOOT);
    rpc->boot.value = grpc_slice_from_static_buffer(rpc->boot_id, sizeof rpc->boot_id);
    rpc->wake_tag.kind = WINNOW_TAG_WAKE;
    rpc->shutdown_tag.kind = WINNOW_TAG_SHUTDOWN;
    rpc->queue = grpc_completion_queue_create_for_next(NULL);
    rpc->wake_channel = grpc_lame_client_channel_create("wake", GRPC_STATUS_UNAVAILABLE, "wake");
    rpc->wake_call = grpc_channel_create_call(rpc->wake_channel, NULL, 0, rpc->queue,
                                              grpc_slice_from_static_string("/wake"), NULL,
                                              gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    winnow_assert(rpc->wake_call);
    rpc->server = server_create();
    grpc_server_register_completion_queue(rpc->server, rpc->queue, NULL);
    grpc_server_start(rpc->server);
    *ret_rpc = rpc;
    return 0;
}

void winnow_rpc_wake(void *arg)
{
    struct winnow_rpc *rpc = arg;
    if (!atomic_exchange(&rpc->is_woken, true))
        winnow_assert(grpc_call_start_batch(rpc->wake_call, NULL, 0, &rpc->wake_tag, NULL) ==
                      GRPC_CALL_OK);
}

void winnow_rpc_add_connection(struct winnow_rpc *rpc, int fd)
{
    winnow_assert(fd >= 0);
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    grpc_server_add_channel_from_fd(rpc->server, fd, credentials);
    grpc_server_credentials_release(credentials);
}

void winnow_rpc_drain(struct winnow_rpc *rpc, int64_t deadline_ns)
{
    winnow_assert(deadline_ns != WINNOW_NEVER_NS);
    atomic_store(&rpc->drain_deadline_ns, deadline_ns);
    winnow_rpc_wake(rpc);
}

/* The core knows the time of its steps only, and a short one ends in the step that began it. */
static void micros_fill(struct winnow_rpc_item *item)
{
    int64_t took_ns = winnow_clock_now_ns() - item->submitted_ns;
    winnow_assert(took_ns >= 0);
    uint32_t micros = (uint32_t)(took_ns / WINNOW_NS_PER_US);
    if (item->request.kind == WINNOW_REQUEST_ATTEND) {
        item->request.attend.certificate.micros = micros;
        winnow_journal_step(&item->call->rpc->journal, item->request.attend.layer, took_ns);
    } else if (item->request.kind == WINNOW_REQUEST_EXACT)
        item->request.exact.certificate.micros = micros;
}

static void item_done(struct winnow_request *request)
{
    struct winnow_rpc_item *item = (struct winnow_rpc_item *)request;
    struct winnow_rpc_call *call = item->call;
    winnow_assert(item->request.user == item);
    winnow_assert(item->request.status <= 0);
    winnow_assert(item->is_busy);
    winnow_assert(call->n_items);
    winnow_assert(call->method->done);
    micros_fill(item);
    item->is_busy = false;
    call->n_items--;
    call->method->done(call, item);
    if (!call->is_open && !call->n_items)
        winnow_rpc_unreserve(call);
    winnow_rpc_call_release_if_over(call);
}

/* Not from inside a step, where every `done` runs. */
static int64_t step(struct winnow_rpc *rpc, int64_t now_ns)
{
    winnow_assert(!rpc->is_stepping);
    rpc->is_stepping = true;
    int64_t when_ns = winnow_core_step(rpc->core, now_ns);
    rpc->is_stepping = false;
    return when_ns;
}

/* The core has room. Within a step every `done` submits at most its own call's next request: while
 * the step takes requests each has freed a place before, and from then on the ring, empty, has a
 * place for every call. Outside of steps it may be full of what one event submitted and cancelled;
 * a step empties it. So no request ends in here, inside its call's `done`, which would go on with a
 * call that is released. */
void winnow_rpc_submit(struct winnow_rpc_item *item)
{
    struct winnow_rpc *rpc = item->call->rpc;
    winnow_assert(!item->is_busy);
    winnow_assert(item->request.kind >= WINNOW_REQUEST_OPEN);
    winnow_assert(item->request.kind <= WINNOW_REQUEST_STATS);
    item->is_busy = true;
    item->call->n_items++;
    item->request.done = item_done;
    item->request.user = item;
    item->submitted_ns = winnow_clock_now_ns();
    int rc = winnow_core_submit(rpc->core, &item->request);
    if (rc == -EAGAIN && !rpc->is_stepping) { /* the core takes requests only in its step */
        step(rpc, winnow_clock_now_ns());
        rc = winnow_core_submit(rpc->core, &item->request);
    }
    winnow_assert(rc == 0);
}

void winnow_rpc_cancel_items(struct winnow_rpc *rpc, uint64_t lease_id)
{
    winnow_assert(lease_id);
    for (uint32_t i = 0; i < winnow_pool_size(rpc->calls); i++) {
        struct winnow_rpc_call *call = winnow_pool_at(rpc->calls, i);
        if (call && call->lease_id == lease_id && call->own.is_busy)
            winnow_core_cancel(rpc->core, &call->own.request);
    }
    for (uint32_t i = 0; i < winnow_pool_size(rpc->items); i++) {
        struct winnow_rpc_item *item = winnow_pool_at(rpc->items, i);
        if (item && item->is_busy && item->request.owner == lease_id)
            winnow_core_cancel(rpc->core, &item->request);
    }
}

static void grant_waiting(struct winnow_rpc *rpc)
{
    winnow_assert((rpc->waiting == NULL) == (rpc->waiting_end == &rpc->waiting));
    winnow_assert(*rpc->waiting_end == NULL);
    while (rpc->waiting) {
        struct winnow_rpc_call *call = rpc->waiting;
        winnow_assert(call->is_open);
        winnow_assert(call->range_bytes);
        winnow_assert(!call->range);
        call->range = winnow_inflight_take(rpc->inflight, call->range_bytes);
        if (!call->range)
            return;
        rpc->waiting = call->next_waiting;
        if (!rpc->waiting)
            rpc->waiting_end = &rpc->waiting;
        call->method->reserved(call);
    }
}

void winnow_rpc_reserve(struct winnow_rpc_call *call, uint64_t n_bytes)
{
    winnow_assert(call->method->reserved);
    winnow_assert(!call->range_bytes);
    winnow_assert(n_bytes);
    winnow_assert(n_bytes <= call->rpc->limits->in_flight_bytes); /* or it waits for ever */
    call->range_bytes = n_bytes;
    call->next_waiting = NULL;
    *call->rpc->waiting_end = call;
    call->rpc->waiting_end = &call->next_waiting;
    grant_waiting(call->rpc);
}

void winnow_rpc_unreserve(struct winnow_rpc_call *call)
{
    struct winnow_rpc *rpc = call->rpc;
    if (!call->range_bytes)
        return;
    if (call->range) {
        winnow_inflight_give(rpc->inflight, call->range, call->range_bytes);
        call->range = NULL;
    } else {
        struct winnow_rpc_call **link = &rpc->waiting;
        while (*link != call) {
            winnow_assert(*link);
            link = &(*link)->next_waiting;
        }
        *link = call->next_waiting;
        if (!*link)
            rpc->waiting_end = link;
    }
    call->range_bytes = 0;
    grant_waiting(rpc);
}

struct winnow_registry_session *winnow_rpc_session(struct winnow_rpc_call *call,
                                                   const ProtobufCBinaryData *token,
                                                   uint64_t session_id)
{
    struct winnow_rpc *rpc = call->rpc;
    struct winnow_lease *lease = winnow_lease_find(rpc->registry, token->data, token->len);
    struct winnow_registry_session *session =
        lease ? winnow_registry_session_find(rpc->registry, session_id, lease) : NULL;
    if (!session) {
        winnow_rpc_call_fail(call, -ENOENT, WINNOW_NO_SUCH_SESSION);
        return NULL;
    }
    winnow_assert(session->lease == lease);
    winnow_assert(session->id == session_id);
    call->lease_id = lease->id;
    return session;
}

static void run_timers(struct winnow_rpc *rpc, int64_t now_ns)
{
    if (now_ns < rpc->next_timer_ns)
        return;
    rpc->next_timer_ns = WINNOW_NEVER_NS;
    for (uint32_t i = 0; i < winnow_pool_size(rpc->calls); i++) {
        struct winnow_rpc_call *call = winnow_pool_at(rpc->calls, i);
        if (!call || !call->is_open || call->timer_ns == WINNOW_NEVER_NS)
            continue;
        if (call->timer_ns > now_ns) {
            winnow_rpc_call_set_timer(call, call->timer_ns);
            continue;
        }
        winnow_assert(call->method->timeout);
        call->timer_ns = WINNOW_NEVER_NS;
        call->method->timeout(call);
    }
}

/* Tells every stream, then ends the calls that have nothing in the core. */
bool winnow_rpc_is_healthy(const struct winnow_rpc *rpc)
{
    return !rpc->is_draining && !rpc->is_gpu_lost;
}

static void push_watchers(struct winnow_rpc *rpc)
{
    for (uint32_t i = 0; i < winnow_pool_size(rpc->calls); i++) {
        struct winnow_rpc_call *call = winnow_pool_at(rpc->calls, i);
        if (call && call->is_open && call->method == &winnow_rpc_health_watch)
            winnow_rpc_watch_push(call);
    }
}

/* Its sessions go on with the CPU; who watches may send the next ones elsewhere. */
static void look_at_gpu(struct winnow_rpc *rpc)
{
    uint64_t n_shapes;
    const char *shape = winnow_core_gpu_shape(rpc->core, &n_shapes);
    if (n_shapes != rpc->n_gpu_shapes)
        winnow_log(WINNOW_LOG_NOTICE, "gpu_memory", "text=\"%s\"", shape);
    rpc->n_gpu_shapes = n_shapes;
    if (rpc->is_gpu_lost || !winnow_core_gpu_lost(rpc->core))
        return;
    rpc->is_gpu_lost = true;
    winnow_log(WINNOW_LOG_ERROR, "gpu_lost",
               "hint=\"steps are the CPU's from here on; only a new winnowd has the GPU again; see "
               "the kernel's log\"");
    push_watchers(rpc);
}

static void begin_drain(struct winnow_rpc *rpc)
{
    winnow_assert(!rpc->is_draining);
    winnow_assert(rpc->n_posted <= winnow_pool_used(rpc->calls));
    rpc->is_draining = true;
    winnow_log(WINNOW_LOG_NOTICE, "draining", "calls=%u sessions=%u",
               winnow_pool_used(rpc->calls) - rpc->n_posted,
               winnow_registry_session_count(rpc->registry));
    grpc_server_shutdown_and_notify(rpc->server, rpc->queue, &rpc->shutdown_tag);
    push_watchers(rpc);
    for (uint32_t i = 0; i < winnow_pool_size(rpc->calls); i++) {
        struct winnow_rpc_call *call = winnow_pool_at(rpc->calls, i);
        if (call && call->is_open && call->method == &winnow_rpc_lease)
            winnow_rpc_lease_drain(call);
    }
}

/* Streams end once nothing of theirs runs; leases last, since they hold the sessions. */
static void go_on_draining(struct winnow_rpc *rpc, int64_t now_ns)
{
    winnow_assert(rpc->is_draining);
    bool is_late = now_ns >= atomic_load(&rpc->drain_deadline_ns), is_working = false;
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < winnow_pool_size(rpc->calls); i++) {
            struct winnow_rpc_call *call = winnow_pool_at(rpc->calls, i);
            if (!call || !call->is_open || (call->method == &winnow_rpc_lease) != (pass == 1))
                continue;
            if (is_late)
                winnow_rpc_call_cancel(call);
            else if (call->n_items || call->sending || (pass == 1 && is_working))
                is_working = true;
            else
                winnow_rpc_call_fail(call, -EHOSTDOWN, "the daemon is stopping. hint: run without");
        }
    }
}

static void hour_done(struct winnow_request *request)
{
    struct winnow_rpc *rpc = request->user;
    winnow_assert(request == &rpc->hour);
    winnow_assert(rpc->is_hour_asked);
    char text[192];
    rpc->is_hour_asked = false;
    if (!request->status && winnow_journal_hour(&rpc->journal, &request->stats, text))
        winnow_log(WINNOW_LOG_INFO, "summary", "%s", text);
}

/* What the log and status say of the time since. */
static void keep_journal(struct winnow_rpc *rpc, int64_t now_ns)
{
    static const struct winnow_latency none;
    struct winnow_store_facts facts;
    if (rpc->store) {
        winnow_store_facts(rpc->store, &facts);
        winnow_journal_disk(&rpc->journal, &facts);
    }
    winnow_journal_stretch(&rpc->journal, rpc->store ? winnow_store_latency(rpc->store) : &none,
                           now_ns);
    if (rpc->is_hour_asked || !winnow_journal_hour_ends(&rpc->journal, now_ns))
        return;
    rpc->hour = (struct winnow_request){.kind = WINNOW_REQUEST_STATS,
                                        .deadline_ns = WINNOW_NEVER_NS,
                                        .done = hour_done,
                                        .user = rpc};
    rpc->is_hour_asked = winnow_core_submit(rpc->core, &rpc->hour) == 0;
}

static void take_event(struct winnow_rpc *rpc, const grpc_event *event)
{
    struct winnow_rpc_tag *tag = event->tag;
    if (tag->kind == WINNOW_TAG_WAKE)
        atomic_store(&rpc->is_woken, false);
    else if (tag->kind == WINNOW_TAG_SHUTDOWN)
        rpc->is_shut_down = true;
    else
        winnow_rpc_call_complete(tag, event->success != 0);
}

/* gRPC rounds deadlines up to milliseconds: what is due at once must lie in the past. */
static gpr_timespec timespec_of(int64_t when_ns, int64_t now_ns)
{
    if (when_ns == WINNOW_NEVER_NS)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (when_ns <= now_ns)
        return gpr_inf_past(GPR_CLOCK_MONOTONIC);
    gpr_timespec when = gpr_time_from_nanos(when_ns, GPR_TIMESPAN);
    when.clock_type = GPR_CLOCK_MONOTONIC;
    return when;
}

void winnow_rpc_run(struct winnow_rpc *rpc, struct winnow_core *core, struct winnow_store *store)
{
    winnow_assert(core);
    winnow_assert(!rpc->core);
    winnow_assert(!rpc->is_draining);
    rpc->core = core;
    rpc->store = store;
    rpc->started_ns = winnow_clock_now_ns();
    winnow_journal_init(&rpc->journal, rpc->started_ns);
    winnow_rpc_call_post(rpc);
    while (!rpc->is_shut_down || winnow_pool_used(rpc->calls) || rpc->is_hour_asked) {
        int64_t now_ns = winnow_clock_now_ns();
        if (!rpc->is_draining && atomic_load(&rpc->drain_deadline_ns) != WINNOW_NEVER_NS)
            begin_drain(rpc);
        if (rpc->is_draining)
            go_on_draining(rpc, now_ns);
        run_timers(rpc, now_ns);
        keep_journal(rpc, now_ns);
        int64_t when_ns = step(rpc, now_ns);
        look_at_gpu(rpc);
        if (rpc->next_timer_ns < when_ns)
            when_ns = rpc->next_timer_ns;
        if (rpc->journal.hour_ns < when_ns)
            when_ns = rpc->journal.hour_ns;
        if (rpc->is_draining && now_ns + 10 * WINNOW_NS_PER_MS < when_ns)
            when_ns = now_ns + 10 * WINNOW_NS_PER_MS;
        grpc_event event =
            grpc_completion_queue_next(rpc->queue, timespec_of(when_ns, now_ns), NULL);
        if (event.type == GRPC_OP_COMPLETE)
            take_event(rpc, &event);
    }
    winnow_assert(!rpc->n_open);
    winnow_assert(!rpc->n_posted);
    winnow_assert(!rpc->waiting);
    winnow_assert(!winnow_pool_used(rpc->items));
    winnow_assert(!winnow_inflight_used_bytes(rpc->inflight));
    winnow_assert(!winnow_lease_count(rpc->registry));
    winnow_assert(!winnow_registry_session_count(rpc->registry));
}

static void queue_drain(grpc_completion_queue *queue)
{
    grpc_completion_queue_shutdown(queue);
    gpr_timespec never = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    while (grpc_completion_queue_next(queue, never, NULL).type != GRPC_QUEUE_SHUTDOWN)
        continue;
    grpc_completion_queue_destroy(queue);
}

void winnow_rpc_destroy(struct winnow_rpc *rpc)
{
    if (!rpc)
        return;
    winnow_assert(!rpc->n_open);
    winnow_assert(!rpc->is_stepping);
    if (rpc->server) {
        if (!rpc->is_shut_down) {
            grpc_server_shutdown_and_notify(rpc->server, rpc->queue, &rpc->shutdown_tag);
            grpc_server_cancel_all_calls(rpc->server);
        }
        grpc_call_unref(rpc->wake_call);
        grpc_channel_destroy(rpc->wake_channel);
        queue_drain(rpc->queue);
        grpc_server_destroy(rpc->server);
        grpc_shutdown();
    }
    winnow_wire_arena_destroy(rpc->reply_arena);
    winnow_wire_arena_destroy(rpc->arena);
    winnow_inflight_destroy(rpc->inflight);
    winnow_registry_destroy(rpc->registry);
    winnow_pool_destroy(rpc->items);
    winnow_pool_destroy(rpc->calls);
    winnow_alloc_free(rpc);
}
