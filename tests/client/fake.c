// A thread a call, each with its own queue, in blocking style: slow, and easy to bend.
#include <client/fake.h>

#include <errno.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <proto/wire.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { N_CONNECTIONS_MAX = 256 };

/* A fault of the fake, not of what it tests. */
#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct fake {
    grpc_server *server;
    grpc_completion_queue *queue;
    pthread_t accept_thread, call_thread;
    int listen_fd;
    int connection[N_CONNECTIONS_MAX]; /* duplicates, to break them by; accept thread's */
    uint32_t n_connections;
    uint8_t boot;
    _Atomic int script;
    _Atomic uint32_t n_streams, n_messages, n_windows;
    _Atomic uint32_t n_calls;                            /* threads alive */
    _Atomic uint64_t q_bytes, kv_bytes, lse_bytes, held; /* of the session opened last */
};

struct fake_call {
    struct fake *fake;
    grpc_call *call;
    grpc_completion_queue *queue;
    grpc_call_details details;
    grpc_metadata_array metadata;
    struct winnow_wire_arena *arena;
    grpc_slice flat; /* the message received last */
    struct winnow_wire_slice slice;
    int cancelled;
};

static bool is_script(const struct fake_call *call, enum fake_script script)
{
    return atomic_load(&call->fake->script) == (int)script;
}

/* ---- blocking gRPC ---- */

static bool call_run(struct fake_call *call, grpc_op *ops, size_t n_ops)
{
    if (grpc_call_start_batch(call->call, ops, n_ops, ops, NULL) != GRPC_CALL_OK)
        return false;
    return grpc_completion_queue_pluck(call->queue, ops, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL)
               .success != 0;
}

/* The next message; false: there is none. */
static bool call_receive(struct fake_call *call, const ProtobufCMessageDescriptor *type,
                         struct winnow_wire_message *message)
{
    grpc_byte_buffer *buffer = NULL;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &buffer;
    if (!call_run(call, &op, 1) || !buffer)
        return false;
    grpc_byte_buffer_reader reader;
    MUST(grpc_byte_buffer_reader_init(&reader, buffer));
    grpc_slice_unref(call->flat);
    call->flat = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);

    call->slice =
        (struct winnow_wire_slice){GRPC_SLICE_START_PTR(call->flat), GRPC_SLICE_LENGTH(call->flat)};
    struct winnow_wire_input input = {.slice = &call->slice,
                                      .n_slices = 1,
                                      .tensor_bytes_max = WINNOW_WIRE_MESSAGE_BYTES_MAX,
                                      .is_request = true};
    winnow_wire_arena_reset(call->arena);
    MUST(winnow_wire_decode(call->arena, type, &input, message) == 0);
    return true;
}

static void call_send_slice(struct fake_call *call, grpc_slice slice)
{
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};
    op.data.send_message.send_message = buffer;
    call_run(call, &op, 1);
    grpc_byte_buffer_destroy(buffer);
    grpc_slice_unref(slice);
}

static void call_send(struct fake_call *call, const void *message, const void *tensor,
                      size_t tensor_bytes)
{
    size_t head_bytes = winnow_wire_head_bytes(message, tensor_bytes);
    grpc_slice slice = grpc_slice_malloc(head_bytes + tensor_bytes);
    winnow_wire_head(message, tensor_bytes, GRPC_SLICE_START_PTR(slice));
    if (tensor_bytes)
        memcpy(GRPC_SLICE_START_PTR(slice) + head_bytes, tensor, tensor_bytes);
    call_send_slice(call, slice);
}

static void call_end(struct fake_call *call, grpc_status_code code, int reason, const char *text,
                     uint64_t truncate_to)
{
    char reason_text[16];
    snprintf(reason_text, sizeof reason_text, "%d", reason);
    grpc_metadata trailers[2] = {
        {.key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_REASON),
         .value = grpc_slice_from_copied_string(reason_text)},
        {.key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_TRUNCATE_TO),
         .value = grpc_slice_from_copied_buffer((char *)&truncate_to, sizeof truncate_to)},
    };
    grpc_slice details = grpc_slice_from_copied_string(text);
    grpc_op op = {.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    op.data.send_status_from_server.trailing_metadata_count = reason ? 2 : 0;
    op.data.send_status_from_server.trailing_metadata = trailers;
    op.data.send_status_from_server.status = code;
    op.data.send_status_from_server.status_details = &details;
    call_run(call, &op, 1);
    grpc_slice_unref(details);
    grpc_slice_unref(trailers[0].value);
    grpc_slice_unref(trailers[1].value);
}

/* Holds the call until the client lets go of it. */
static void call_stay_silent(struct fake_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op.data.recv_close_on_server.cancelled = &call->cancelled;
    call_run(call, &op, 1);
}

static void call_reply(struct fake_call *call, const void *message)
{
    if (is_script(call, FAKE_GARBAGE))
        call_send_slice(call, grpc_slice_from_static_string("\377\377\377\377\377"));
    else
        call_send(call, message, NULL, 0);
    call_end(call, GRPC_STATUS_OK, 0, "", 0);
}

/* ---- methods ---- */

static void on_info(struct fake_call *call)
{
    struct winnow_wire_message message;
    uint8_t boot_id[WINNOW_WIRE_ID_BYTES];
    memset(boot_id, call->fake->boot, sizeof boot_id);
    call_receive(call, &winnow__v1__info_request__descriptor, &message);
    Winnow__V1__Limit window = WINNOW__V1__LIMIT__INIT, attend = WINNOW__V1__LIMIT__INIT;
    Winnow__V1__Limit *limits[] = {&window, &attend};
    window.name = "window_bytes";
    window.value = 64 << 10;
    attend.name = "attend_bytes";
    attend.value = 128 << 10;
    Winnow__V1__InfoReply reply = WINNOW__V1__INFO_REPLY__INIT;
    reply.proto = is_script(call, FAKE_OTHER_PROTO) ? 9 : WINNOW_WIRE_PROTO;
    reply.boot_id = (ProtobufCBinaryData){sizeof boot_id, boot_id};
    reply.build = (char *)"fake";
    reply.n_limits = 2;
    reply.limits = limits;
    call_reply(call, &reply);
}

static void on_lease(struct fake_call *call)
{
    struct winnow_wire_message message;
    uint8_t id[WINNOW_WIRE_ID_BYTES];
    memset(id, call->fake->boot, sizeof id);
    if (!call_receive(call, &winnow__v1__lease_beat__descriptor, &message))
        return;
    Winnow__V1__LeaseEvent event = WINNOW__V1__LEASE_EVENT__INIT;
    event.token = event.boot_id = (ProtobufCBinaryData){sizeof id, id};
    event.kind = WINNOW__V1__LEASE_EVENT__KIND__KIND_GRANTED;
    call_send(call, &event, NULL, 0);
    if (is_script(call, FAKE_END_OF_LEASE))
        call_end(call, GRPC_STATUS_UNAVAILABLE, EHOSTDOWN, "draining", 0);
    else
        call_stay_silent(call);
}

static void on_open_session(struct fake_call *call)
{
    struct winnow_wire_message message;
    if (!call_receive(call, &winnow__v1__open_session_request__descriptor, &message))
        return;
    if (is_script(call, FAKE_REFUSED)) {
        call_end(call, GRPC_STATUS_RESOURCE_EXHAUSTED, ENOSPC, "host_pool: no room", 0);
        return;
    }
    const Winnow__V1__OpenSessionRequest *request = message.message;
    size_t n_bytes = request->model->io_dtype == WINNOW__V1__DTYPE__DTYPE_FP32 ? 4 : 2;
    call->fake->q_bytes = n_bytes * request->model->q_heads * request->model->k_width;
    call->fake->kv_bytes = 2 * n_bytes * request->model->kv_heads * request->model->k_width;
    call->fake->lse_bytes = 4 * request->model->q_heads;
    call->fake->held = 0;
    Winnow__V1__OpenSessionReply reply = WINNOW__V1__OPEN_SESSION_REPLY__INIT;
    reply.session = 0x51;
    reply.model = 3;
    reply.epoch = 1;
    call_reply(call, &reply);
}

static void on_truncate(struct fake_call *call)
{
    struct winnow_wire_message message;
    if (!call_receive(call, &winnow__v1__truncate_request__descriptor, &message))
        return;
    if (is_script(call, FAKE_SILENT)) {
        call_stay_silent(call);
        return;
    }
    Winnow__V1__TruncateReply reply = WINNOW__V1__TRUNCATE_REPLY__INIT;
    reply.epoch = 2;
    reply.tokens_held = ((const Winnow__V1__TruncateRequest *)message.message)->n_tokens;
    call->fake->held = reply.tokens_held;
    call_reply(call, &reply);
}

static void on_fork(struct fake_call *call)
{
    struct winnow_wire_message message;
    if (!call_receive(call, &winnow__v1__fork_request__descriptor, &message))
        return;
    Winnow__V1__ForkReply reply = WINNOW__V1__FORK_REPLY__INIT;
    reply.session = 0x52;
    reply.epoch = 1;
    reply.tokens_held = call->fake->held;
    call_reply(call, &reply);
}

static void on_close(struct fake_call *call)
{
    struct winnow_wire_message message;
    Winnow__V1__CloseReply reply = WINNOW__V1__CLOSE_REPLY__INIT;
    if (call_receive(call, &winnow__v1__close_request__descriptor, &message))
        call_reply(call, &reply);
}

static void on_stats(struct fake_call *call)
{
    struct winnow_wire_message message;
    Winnow__V1__StatsReply reply = WINNOW__V1__STATS_REPLY__INIT;
    reply.tokens_held = call->fake->held;
    reply.mass_mean = 0.875F;
    if (call_receive(call, &winnow__v1__stats_request__descriptor, &message))
        call_reply(call, &reply);
}

static void on_append(struct fake_call *call)
{
    struct winnow_wire_message message;
    uint64_t n_tokens = 0;
    while (call_receive(call, &winnow__v1__append_message__descriptor, &message)) {
        const Winnow__V1__AppendMessage *chunk = message.message;
        n_tokens += chunk->n_tokens;
        if (chunk->n_tokens && message.tensor.n_bytes != chunk->n_tokens * call->fake->kv_bytes) {
            call_end(call, GRPC_STATUS_INVALID_ARGUMENT, EINVAL, "chunk of a wrong size", 0);
            return;
        }
    }
    Winnow__V1__AppendReply reply = WINNOW__V1__APPEND_REPLY__INIT;
    reply.tokens_held = call->fake->held += n_tokens;
    call_reply(call, &reply);
}

static void attend_reply(struct fake_call *call, const Winnow__V1__AttendRequest *request,
                         const struct winnow_wire_tensor *tensor)
{
    struct fake *fake = call->fake;
    enum { N_MAX = WINNOW_WIRE_N_ITEMS_MAX };
    static _Thread_local Winnow__V1__AttendResult result[N_MAX], *results[N_MAX];
    static _Thread_local Winnow__V1__Certificate certificate[N_MAX];
    static _Thread_local uint8_t data[WINNOW_WIRE_MESSAGE_BYTES_MAX];
    size_t from_bytes = 0, n_bytes = 0;
    Winnow__V1__AttendReply reply = WINNOW__V1__ATTEND_REPLY__INIT;
    reply.seq = request->seq + (is_script(call, FAKE_FOREIGN_SEQ) ? 1 : 0);
    reply.layer = request->layer;
    reply.part = request->part;
    reply.n_results = request->n_items;
    reply.results = results;
    for (size_t i = 0; i < request->n_items; i++) {
        const Winnow__V1__AttendItem *item = request->items[i];
        result[i] = (Winnow__V1__AttendResult)WINNOW__V1__ATTEND_RESULT__INIT;
        certificate[i] = (Winnow__V1__Certificate)WINNOW__V1__CERTIFICATE__INIT;
        certificate[i].verdict = WINNOW__V1__VERDICT__VERDICT_MET;
        certificate[i].bytes_read = item->position;
        certificate[i].blocks_device = item->position % 2; /* a GPU's: the next is awaited awake */
        results[i] = &result[i];
        result[i].certificate = &certificate[i];
        if (is_script(call, FAKE_ITEM_LOST)) {
            result[i].status = -ENODATA;
            result[i].truncate_to = 48;
            result[i].text = (char *)"block lost: layer 0, disk sum. truncate_to 48";
        }
        winnow_wire_tensor_copy(tensor, from_bytes, data + n_bytes, fake->q_bytes);
        n_bytes += fake->q_bytes;
        from_bytes += fake->q_bytes + (item->flags & WINNOW_WIRE_HAS_KV ? fake->kv_bytes : 0);
    }
    for (size_t i = 0; i < request->n_items * fake->lse_bytes / 4; i++, n_bytes += 4)
        memcpy(data + n_bytes, &(float){0.5F}, 4);
    call_send(call, &reply, data, is_script(call, FAKE_SHORT_DATA) ? n_bytes - 1 : n_bytes);
}

static void on_attend(struct fake_call *call)
{
    struct winnow_wire_message message;
    call->fake->n_streams++;
    while (call_receive(call, &winnow__v1__attend_request__descriptor, &message)) {
        call->fake->n_messages++;
        if (is_script(call, FAKE_SILENT)) {
            call_stay_silent(call);
            return;
        }
        if (is_script(call, FAKE_GARBAGE)) {
            call_reply(call, message.message);
            return;
        }
        attend_reply(call, message.message, &message.tensor);
    }
    call_end(call, GRPC_STATUS_OK, 0, "", 0);
}

static void on_attend_exact(struct fake_call *call)
{
    struct winnow_wire_message message;
    Winnow__V1__Certificate certificate = WINNOW__V1__CERTIFICATE__INIT;
    certificate.verdict = WINNOW__V1__VERDICT__VERDICT_EXACT;
    certificate.mass_reached = certificate.mass_mean = 1;
    certificate.bytes_read = 100;
    size_t q_bytes = 0;
    bool want_lse = false;
    uint8_t *q = NULL;
    call->fake->n_windows++;
    while (call_receive(call, &winnow__v1__attend_exact_message__descriptor, &message)) {
        const Winnow__V1__AttendExactMessage *chunk = message.message;
        want_lse |= chunk->want_lse;
        if (chunk->part != WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q)
            continue;
        q = realloc(q, q_bytes + message.tensor.n_bytes);
        winnow_wire_tensor_copy(&message.tensor, 0, q + q_bytes, message.tensor.n_bytes);
        q_bytes += message.tensor.n_bytes;
    }
    if (is_script(call, FAKE_SILENT)) {
        call_stay_silent(call);
    } else if (is_script(call, FAKE_LOST)) {
        call_end(call, GRPC_STATUS_DATA_LOSS, ENODATA, "block lost: layer 0, disk sum", 80);
    } else {
        /* One token a chunk, so that the answer is put together. */
        for (size_t at = 0; at < q_bytes; at += call->fake->q_bytes) {
            uint8_t data[4096];
            size_t n_bytes = call->fake->q_bytes;
            memcpy(data, q + at, n_bytes);
            for (size_t i = 0; want_lse && i < call->fake->lse_bytes / 4; i++, n_bytes += 4)
                memcpy(data + n_bytes, &(float){0.5F}, 4);
            Winnow__V1__AttendExactReply reply = WINNOW__V1__ATTEND_EXACT_REPLY__INIT;
            reply.n_chunk = 1;
            if (at + call->fake->q_bytes == q_bytes)
                reply.certificate = &certificate;
            call_send(call, &reply, data, n_bytes);
        }
        call_end(call, GRPC_STATUS_OK, 0, "", 0);
    }
    free(q);
}

/* ---- the server ---- */

static const struct {
    const char *path;
    void (*run)(struct fake_call *call);
} methods[] = {
    {"/winnow.v1.Winnow/Info", on_info},
    {"/winnow.v1.Winnow/Lease", on_lease},
    {"/winnow.v1.Winnow/OpenSession", on_open_session},
    {"/winnow.v1.Winnow/Truncate", on_truncate},
    {"/winnow.v1.Winnow/Fork", on_fork},
    {"/winnow.v1.Winnow/Close", on_close},
    {"/winnow.v1.Winnow/Stats", on_stats},
    {"/winnow.v1.Winnow/Append", on_append},
    {"/winnow.v1.Winnow/Attend", on_attend},
    {"/winnow.v1.Winnow/AttendExact", on_attend_exact},
};

static void call_free(struct fake_call *call)
{
    grpc_call_cancel(call->call, NULL);
    grpc_call_unref(call->call);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_completion_queue_shutdown(call->queue);
    grpc_completion_queue_destroy(call->queue);
    grpc_slice_unref(call->flat);
    winnow_wire_arena_destroy(call->arena);
    free(call);
}

static void *call_main(void *arg)
{
    struct fake_call *call = arg;
    struct fake *fake = call->fake;
    grpc_op op = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    if (call_run(call, &op, 1))
        for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
            if (!grpc_slice_str_cmp(call->details.method, methods[i].path))
                methods[i].run(call);
    call_free(call);
    fake->n_calls--;
    return NULL;
}

static struct fake_call *call_await(struct fake *fake)
{
    struct fake_call *call = calloc(1, sizeof *call);
    call->fake = fake;
    call->queue = grpc_completion_queue_create_for_pluck(NULL);
    call->flat = grpc_empty_slice();
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    MUST(winnow_wire_arena_create(&call->arena) == 0);
    MUST(grpc_server_request_call(fake->server, &call->call, &call->details, &call->metadata,
                                  call->queue, fake->queue, call) == GRPC_CALL_OK);
    return call;
}

static void *calls_main(void *arg)
{
    struct fake *fake = arg;
    struct fake_call *awaited = call_await(fake);
    for (;;) {
        grpc_event event =
            grpc_completion_queue_next(fake->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type != GRPC_OP_COMPLETE || event.tag == NULL)
            break;
        if (!event.success)
            continue; /* the awaited one, at shutdown */
        pthread_t thread;
        fake->n_calls++;
        MUST(pthread_create(&thread, NULL, call_main, awaited) == 0);
        pthread_detach(thread);
        awaited = call_await(fake);
    }
    winnow_wire_arena_destroy(awaited->arena);
    grpc_completion_queue_destroy(awaited->queue);
    grpc_call_details_destroy(&awaited->details);
    grpc_metadata_array_destroy(&awaited->metadata);
    free(awaited);
    return NULL;
}

static void *accept_main(void *arg)
{
    struct fake *fake = arg;
    int fd;
    while ((fd = accept4(fake->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
        MUST(fake->n_connections < N_CONNECTIONS_MAX);
        fake->connection[fake->n_connections++] = dup(fd);
        grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
        grpc_server_add_channel_from_fd(fake->server, fd, credentials);
        grpc_server_credentials_release(credentials);
    }
    return NULL;
}

struct fake *fake_start(const char *path, uint8_t boot)
{
    struct fake *fake = calloc(1, sizeof *fake);
    fake->boot = boot;
    grpc_init();
    grpc_arg limit = {.type = GRPC_ARG_INTEGER,
                      .key = (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
                      .value.integer = WINNOW_WIRE_MESSAGE_BYTES_MAX};
    grpc_channel_args args = {1, &limit};
    fake->server = grpc_server_create(&args, NULL);
    fake->queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(fake->server, fake->queue, NULL);
    grpc_server_start(fake->server);

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    MUST(strlen(path) < sizeof address.sun_path);
    strcpy(address.sun_path, path);
    fake->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    MUST(bind(fake->listen_fd, (struct sockaddr *)&address, sizeof address) == 0);
    MUST(listen(fake->listen_fd, 64) == 0);
    MUST(pthread_create(&fake->accept_thread, NULL, accept_main, fake) == 0);
    MUST(pthread_create(&fake->call_thread, NULL, calls_main, fake) == 0);
    return fake;
}

void fake_kill(struct fake *fake)
{
    struct sockaddr_un address;
    socklen_t n_bytes = sizeof address;
    getsockname(fake->listen_fd, (struct sockaddr *)&address, &n_bytes);
    unlink(address.sun_path);
    shutdown(fake->listen_fd, SHUT_RDWR);
    pthread_join(fake->accept_thread, NULL);
    close(fake->listen_fd);
    for (uint32_t i = 0; i < fake->n_connections; i++) {
        shutdown(fake->connection[i], SHUT_RDWR);
        close(fake->connection[i]);
    }
    /* The queue's last event, after the calls thread has seen the awaited call fail: tag NULL. */
    grpc_server_shutdown_and_notify(fake->server, fake->queue, NULL);
    grpc_server_cancel_all_calls(fake->server);
    pthread_join(fake->call_thread, NULL);
    while (fake->n_calls)
        sched_yield();
    grpc_server_destroy(fake->server);
    grpc_completion_queue_shutdown(fake->queue);
    while (
        grpc_completion_queue_next(fake->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
        GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(fake->queue);
    free(fake);
}

void fake_set_script(struct fake *fake, enum fake_script script)
{
    fake->script = (int)script;
}

uint32_t fake_n_streams(const struct fake *fake)
{
    return fake->n_streams;
}

uint32_t fake_n_messages(const struct fake *fake)
{
    return fake->n_messages;
}

uint32_t fake_n_windows(const struct fake *fake)
{
    return fake->n_windows;
}
