// The RPC layer on the wire: what is repeated, broken off, too much, out of range or in the way.
//
// Peers speak by client/rpc.h, so they can do what libwinnow never would.
#include <base/clock.h>
#include <base/rng.h>
#include <client/rpc.h>
#include <errno.h>
#include <proto/wire.h>
#include <signal.h>
#include <system/daemon.h>
#include <test.h>

enum {
    LAYERS = 2,
    Q_HEADS = 4,
    KV_HEADS = 2,
    WIDTH = 64,
    Q_BYTES = Q_HEADS * WIDTH * 4, /* of a token; out as much */
    KV_BYTES = 2 * KV_HEADS * WIDTH * 4,
    LSE_BYTES = Q_HEADS * 4,
    N_SMALL = 64,              /* tokens of a chunk */
    IN_FLIGHT_BYTES = 8 << 20, /* of a 32 MiB pool */
    N_CLIENTS_MAX = 32,
    N_CALLS_MAX = 128,
    N_CALLS_RESERVED = 16,
};

static const char *const args[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                   "--threads",   "1",     NULL};
static struct daemon server;
static struct winnow_wire_arena *arena;
static float zeros[N_SMALL * (Q_BYTES + KV_BYTES) / 4];

struct peer {
    struct winnow_channel *channel;
    struct winnow_call *lease;
    uint8_t token[16];
    uint64_t session;
    uint32_t model, epoch;
};

static int64_t in_ms(int64_t n)
{
    return winnow_clock_now_ns() + n * WINNOW_NS_PER_MS;
}

static void *decode(const ProtobufCMessageDescriptor *type, const void *data, size_t n_bytes,
                    struct winnow_wire_tensor *tensor)
{
    static struct winnow_wire_slice slice;
    static struct winnow_wire_message message;
    slice = (struct winnow_wire_slice){data, n_bytes};
    struct winnow_wire_input input = {&slice, 1, WINNOW_WIRE_MESSAGE_BYTES_MAX, false};
    winnow_wire_arena_reset(arena);
    CHECK_EQ(winnow_wire_decode(arena, type, &input, &message), 0);
    if (tensor)
        *tensor = message.tensor;
    return message.message;
}

/* One exchange of a stream; NULL: it has ended. */
static void *exchange(struct winnow_call *call, const void *message, const void *tensor,
                      size_t tensor_bytes, const ProtobufCMessageDescriptor *reply_type,
                      struct winnow_wire_tensor *reply_tensor)
{
    uint8_t head[4096];
    struct iovec part[2] = {{head, 0}, {(void *)tensor, tensor_bytes}};
    uint32_t what = (message ? WINNOW_CALL_SEND : 0) | (reply_type ? WINNOW_CALL_RECEIVE : 0);
    if (message)
        part[0].iov_len = winnow_wire_head(message, tensor_bytes, head);
    const void *data = NULL;
    size_t n_bytes = 0;
    if (winnow_call_start(call, what, part, tensor_bytes ? 2 : 1) < 0 ||
        winnow_call_wait(call, in_ms(5000), &data, &n_bytes) < 0 || !data || !reply_type)
        return NULL;
    return decode(reply_type, data, n_bytes, reply_tensor);
}

/* Waits for what was started, and drops what came. */
static int await(struct winnow_call *call, int64_t ms)
{
    const void *data;
    size_t n_bytes;
    return winnow_call_wait(call, in_ms(ms), &data, &n_bytes);
}

static struct winnow_status finish(struct winnow_call *call)
{
    struct winnow_status status;
    winnow_call_finish(call, in_ms(5000), &status);
    return status;
}

static struct winnow_call *open_call(struct peer *peer, const char *method)
{
    struct winnow_call *call;
    CHECK_EQ(winnow_call_open(peer->channel, method, WINNOW_NEVER_NS, &call), 0);
    return call;
}

/* One message each way; the reply (NULL: failed) lives until the next decode. */
static void *ask(struct peer *peer, const char *method, const void *message,
                 const ProtobufCMessageDescriptor *reply_type, struct winnow_status *status)
{
    static void *reply;
    uint8_t head[4096];
    size_t n_bytes;
    struct iovec part = {head, winnow_wire_head(message, 0, head)};
    free(reply);
    reply = NULL;
    if (winnow_channel_call(peer->channel, method, &part, 1, in_ms(5000), &reply, &n_bytes,
                            status) < 0)
        return NULL;
    return decode(reply_type, reply, n_bytes, NULL);
}

static ProtobufCBinaryData token_of(struct peer *peer)
{
    return (ProtobufCBinaryData){sizeof peer->token, peer->token};
}

/* A connection and a lease. 0, or how the lease was refused. */
static int peer_open(struct peer *peer)
{
    Winnow__V1__LeaseBeat beat = WINNOW__V1__LEASE_BEAT__INIT;
    *peer = (struct peer){0};
    CHECK_EQ(winnow_channel_open(server.socket, in_ms(5000), &peer->channel), 0);
    peer->lease = open_call(peer, "Lease");
    const Winnow__V1__LeaseEvent *event =
        exchange(peer->lease, &beat, NULL, 0, &winnow__v1__lease_event__descriptor, NULL);
    if (!event)
        return finish(peer->lease).error;
    CHECK_EQ(event->token.len, 16);
    memcpy(peer->token, event->token.data, 16);
    return 0;
}

static void peer_close(struct peer *peer)
{
    if (peer->lease)
        winnow_call_finish(peer->lease, 0, NULL);
    winnow_channel_close(peer->channel);
}

static uint64_t open_session(struct peer *peer, uint8_t request)
{
    Winnow__V1__ModelShape shape = WINNOW__V1__MODEL_SHAPE__INIT;
    Winnow__V1__OpenSessionRequest open = WINNOW__V1__OPEN_SESSION_REQUEST__INIT;
    uint8_t request_id[16] = {request};
    shape.layers = LAYERS;
    shape.q_heads = Q_HEADS;
    shape.kv_heads = KV_HEADS;
    shape.k_width = shape.v_width = WIDTH;
    shape.softmax_scale = 0.125F;
    shape.kv_dtype = WINNOW__V1__DTYPE__DTYPE_FP16;
    shape.io_dtype = WINNOW__V1__DTYPE__DTYPE_FP32;
    open.token = token_of(peer);
    open.model = &shape;
    open.request_id = (ProtobufCBinaryData){16, request_id};
    struct winnow_status status;
    const Winnow__V1__OpenSessionReply *reply =
        ask(peer, "OpenSession", &open, &winnow__v1__open_session_reply__descriptor, &status);
    CHECK(reply);
    peer->model = reply->model;
    peer->epoch = reply->epoch;
    return peer->session = reply->session;
}

static uint64_t n_sessions(struct peer *peer)
{
    Winnow__V1__StatsRequest request = WINNOW__V1__STATS_REQUEST__INIT;
    struct winnow_status status;
    const Winnow__V1__StatsReply *reply =
        ask(peer, "Stats", &request, &winnow__v1__stats_reply__descriptor, &status);
    if (!reply)
        printf("Stats: %d %s\n", status.error, status.text);
    CHECK(reply);
    return reply->sessions_open;
}

static Winnow__V1__AttendExactMessage window_header(struct peer *peer, uint64_t first, uint32_t n)
{
    Winnow__V1__AttendExactMessage header = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    header.token = token_of(peer);
    header.session = peer->session;
    header.epoch = peer->epoch;
    header.first_token = first;
    header.n_tokens = n;
    return header;
}

static void send_part(struct winnow_call *call, Winnow__V1__AttendExactMessage__Part part)
{
    Winnow__V1__AttendExactMessage chunk = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    bool is_kv = part == WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV;
    chunk.part = part;
    chunk.n_chunk = N_SMALL;
    exchange(call, &chunk, zeros, (size_t)N_SMALL * (is_kv ? KV_BYTES : Q_BYTES), NULL, NULL);
}

/* A window of N_SMALL zeros at `first`; the status, *ret_held what the layer holds after it. */
static struct winnow_status window(struct peer *peer, uint64_t first, uint64_t *ret_held)
{
    struct winnow_call *call = open_call(peer, "AttendExact");
    Winnow__V1__AttendExactMessage header = window_header(peer, first, N_SMALL);
    exchange(call, &header, NULL, 0, NULL, NULL);
    send_part(call, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV);
    send_part(call, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q);
    winnow_call_start(call, WINNOW_CALL_LAST, NULL, 0);
    await(call, 5000);
    const Winnow__V1__AttendExactReply *reply =
        exchange(call, NULL, NULL, 0, &winnow__v1__attend_exact_reply__descriptor, NULL);
    if (reply && ret_held)
        *ret_held = reply->tokens_held;
    return finish(call);
}

/* A window whose stream breaks, wherever it does, has not happened. */
static void test_rpc__broken_window_applies_nothing(void)
{
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    for (uint32_t n_parts = 0; n_parts < 3; n_parts++) {
        struct winnow_call *call = open_call(&peer, "AttendExact");
        Winnow__V1__AttendExactMessage header = window_header(&peer, 0, 2 * N_SMALL);
        exchange(call, &header, NULL, 0, NULL, NULL);
        if (n_parts > 0)
            send_part(call, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV);
        if (n_parts > 1)
            send_part(call, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q);
        if (n_parts == 2) { /* half closed: said so */
            winnow_call_start(call, WINNOW_CALL_LAST, NULL, 0);
            CHECK_EQ(finish(call).error, -EINVAL);
        } else {
            winnow_call_finish(call, 0, NULL); /* cancelled */
        }
    }
    uint64_t n_held = 0;
    CHECK_EQ(window(&peer, 0, &n_held).error, 0);
    CHECK_EQ(n_held, N_SMALL);
    struct winnow_status again = window(&peer, 0, NULL);
    CHECK_EQ(again.error, -EINVAL);
    CHECK(strstr(again.text, "64"));
    peer_close(&peer);
}

/* A stream may carry one window after another. */
static void test_rpc__windows_follow_on_a_stream(void)
{
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    struct winnow_call *call = open_call(&peer, "AttendExact");
    for (uint64_t first = 0; first < 3 * N_SMALL; first += N_SMALL) {
        Winnow__V1__AttendExactMessage header = window_header(&peer, first, N_SMALL);
        header.want_lse = true;
        exchange(call, &header, NULL, 0, NULL, NULL);
        send_part(call, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q);
        send_part(call, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV);
        struct winnow_wire_tensor tensor;
        const Winnow__V1__AttendExactReply *reply =
            exchange(call, NULL, NULL, 0, &winnow__v1__attend_exact_reply__descriptor, &tensor);
        CHECK(reply && reply->certificate);
        CHECK_EQ(reply->n_chunk, N_SMALL);
        CHECK_EQ(reply->tokens_held, first + N_SMALL);
        CHECK_EQ(tensor.n_bytes, (size_t)N_SMALL * (Q_BYTES + LSE_BYTES));
    }
    winnow_call_start(call, WINNOW_CALL_LAST, NULL, 0);
    CHECK_EQ(finish(call).error, 0);
    peer_close(&peer);
}

/* An Append of n_chunks chunks from `first` on under `id`; the status. */
static struct winnow_status append(struct peer *peer, uint8_t id, uint64_t first, uint32_t n_chunks,
                                   uint64_t *ret_held)
{
    struct winnow_call *call = open_call(peer, "Append");
    Winnow__V1__AppendMessage header = WINNOW__V1__APPEND_MESSAGE__INIT;
    uint8_t append_id[16] = {id};
    header.token = token_of(peer);
    header.session = peer->session;
    header.epoch = peer->epoch;
    header.append_id = (ProtobufCBinaryData){16, append_id};
    exchange(call, &header, NULL, 0, NULL, NULL);
    for (uint32_t i = 0; i < n_chunks; i++) {
        Winnow__V1__AppendMessage chunk = WINNOW__V1__APPEND_MESSAGE__INIT;
        chunk.first_token = first + i * N_SMALL;
        chunk.n_tokens = N_SMALL;
        exchange(call, &chunk, zeros, (size_t)N_SMALL * KV_BYTES, NULL, NULL);
    }
    winnow_call_start(call, WINNOW_CALL_LAST, NULL, 0);
    await(call, 5000);
    const Winnow__V1__AppendReply *reply =
        exchange(call, NULL, NULL, 0, &winnow__v1__append_reply__descriptor, NULL);
    if (reply && ret_held)
        *ret_held = reply->tokens_held;
    return finish(call);
}

/* The broken stream's id skips what is held, whole chunks and parts of one; any other is told. */
static void test_rpc__append_is_repeated_by_its_id(void)
{
    struct peer peer;
    uint64_t n_held = 0;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    CHECK_EQ(append(&peer, 1, 0, 2, &n_held).error, 0);
    CHECK_EQ(n_held, 2 * N_SMALL);
    CHECK_EQ(append(&peer, 1, 0, 3, &n_held).error, 0);
    CHECK_EQ(n_held, 3 * N_SMALL);
    CHECK_EQ(append(&peer, 1, N_SMALL / 2, 3, &n_held).error, 0);
    CHECK_EQ(n_held, 3 * N_SMALL + N_SMALL / 2);
    struct winnow_status other = append(&peer, 2, 0, 1, NULL);
    CHECK_EQ(other.error, -EINVAL);
    CHECK(strstr(other.text, "224"));
    CHECK_EQ(append(&peer, 2, 1000, 1, NULL).error, -EINVAL);
    peer_close(&peer);
}

/* OpenSession and Fork under the same request id answer the same session. */
static void test_rpc__open_and_fork_are_repeated(void)
{
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    uint64_t session = open_session(&peer, 9);
    CHECK_EQ(open_session(&peer, 9), session);
    CHECK(open_session(&peer, 10) != session);
    uint64_t n_before = n_sessions(&peer), forked = 0;
    for (uint32_t i = 0; i < 2; i++) {
        Winnow__V1__ForkRequest fork = WINNOW__V1__FORK_REQUEST__INIT;
        uint8_t request_id[16] = {11};
        struct winnow_status status;
        fork.token = token_of(&peer);
        fork.session = session;
        fork.request_id = (ProtobufCBinaryData){16, request_id};
        const Winnow__V1__ForkReply *reply =
            ask(&peer, "Fork", &fork, &winnow__v1__fork_reply__descriptor, &status);
        CHECK(reply && reply->session != session);
        CHECK(!forked || forked == reply->session);
        forked = reply->session;
    }
    CHECK_EQ(n_sessions(&peer), n_before + 1);
    peer_close(&peer);
}

/* Windows reserve their memory before their data: the one for which there is none waits, fails at
 * its deadline, and goes on when a holder breaks off. */
static void test_rpc__windows_wait_for_memory(void)
{
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    const uint32_t n_half = (uint32_t)(IN_FLIGHT_BYTES / 2 / (2 * Q_BYTES + KV_BYTES + LSE_BYTES));
    struct winnow_call *holder[2];
    for (uint32_t i = 0; i < 2; i++) {
        Winnow__V1__AttendExactMessage header = window_header(&peer, 0, n_half - 8);
        holder[i] = open_call(&peer, "AttendExact");
        exchange(holder[i], &header, NULL, 0, NULL, NULL);
        send_part(holder[i], WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV);
    }
    struct winnow_call *late = open_call(&peer, "AttendExact");
    Winnow__V1__AttendExactMessage header = window_header(&peer, 0, n_half - 8);
    header.deadline_us = 50000;
    exchange(late, &header, NULL, 0, NULL, NULL);
    struct winnow_status status = finish(late);
    CHECK_EQ(status.error, -EDQUOT);
    CHECK(strstr(status.text, "8388608"));

    late = open_call(&peer, "AttendExact");
    header = window_header(&peer, 0, N_SMALL);
    exchange(late, &header, NULL, 0, NULL, NULL);
    winnow_call_finish(holder[0], 0, NULL);
    send_part(late, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV);
    send_part(late, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q);
    CHECK(exchange(late, NULL, NULL, 0, &winnow__v1__attend_exact_reply__descriptor, NULL));
    winnow_call_start(late, WINNOW_CALL_LAST, NULL, 0);
    CHECK_EQ(finish(late).error, 0);
    winnow_call_finish(holder[1], 0, NULL);

    header = window_header(&peer, 0, 2 * n_half + 1);
    late = open_call(&peer, "AttendExact");
    exchange(late, &header, NULL, 0, NULL, NULL);
    status = finish(late);
    CHECK_EQ(status.error, -EMSGSIZE);
    CHECK(strstr(status.text, "tokens fit"));
    peer_close(&peer);
}

/* More leases than there may be are refused with the limit; one that ends makes room. */
static void test_rpc__leases_are_limited(void)
{
    static struct peer peer[N_CLIENTS_MAX + 1];
    for (uint32_t i = 0; i < N_CLIENTS_MAX; i++)
        CHECK_EQ(peer_open(&peer[i]), 0);
    CHECK_EQ(peer_open(&peer[N_CLIENTS_MAX]), -EDQUOT);
    peer[N_CLIENTS_MAX].lease = NULL;
    peer_close(&peer[N_CLIENTS_MAX]);
    open_session(&peer[0], 1);
    peer_close(&peer[0]);
    int64_t deadline_ns = in_ms(5000);
    int rc;
    while ((rc = peer_open(&peer[0])) == -EDQUOT && winnow_clock_now_ns() < deadline_ns) {
        peer[0].lease = NULL;
        peer_close(&peer[0]);
    }
    CHECK_EQ(rc, 0);
    CHECK_EQ(n_sessions(&peer[0]), 0);
    for (uint32_t i = 0; i < N_CLIENTS_MAX; i++)
        peer_close(&peer[i]);
}

/* Streams beyond the limit are refused, not left hanging, and control is served all the while. */
static void test_rpc__calls_are_limited(void)
{
    static struct winnow_call *call[N_CALLS_MAX];
    struct peer peer;
    uint32_t n_refused = 0;
    CHECK_EQ(peer_open(&peer), 0);
    for (uint32_t i = 0; i < N_CALLS_MAX; i++) { /* half open: a stream that says nothing */
        call[i] = open_call(&peer, "Attend");
        CHECK_EQ(winnow_call_start(call[i], WINNOW_CALL_RECEIVE, NULL, 0), 0);
    }
    CHECK_EQ(n_sessions(&peer), 0);
    for (uint32_t i = 0; i < N_CALLS_MAX; i++) {
        if (await(call[i], 0) == -ETIMEDOUT) {
            winnow_call_finish(call[i], 0, NULL);
            continue;
        }
        n_refused++;
        CHECK_EQ(finish(call[i]).error, -EDQUOT);
    }
    CHECK(n_refused >= N_CALLS_RESERVED && n_refused < N_CALLS_MAX / 2);
    peer_close(&peer);
}

/* A bad item fails alone, in its place, with zeros; a message whose sizes are off ends the stream. */
static void test_rpc__attend_items_fail_alone(void)
{
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    CHECK_EQ(window(&peer, 0, NULL).error, 0);
    struct winnow_call *call = open_call(&peer, "Attend");
    Winnow__V1__AttendItem item[3], *items[3] = {&item[0], &item[1], &item[2]};
    Winnow__V1__AttendRequest request = WINNOW__V1__ATTEND_REQUEST__INIT;
    for (uint32_t i = 0; i < 3; i++) {
        winnow__v1__attend_item__init(&item[i]);
        item[i].session = peer.session;
        item[i].epoch = peer.epoch;
        item[i].position = N_SMALL;
        item[i].flags = WINNOW_WIRE_WANT_LSE;
    }
    request.token = token_of(&peer);
    request.model = peer.model;
    request.part = 3;
    request.n_parts = 4;
    request.items = items;
    request.n_items = 3;
    for (uint64_t seq = 1; seq <= 3; seq++) { /* all good: its out and lse must not come again */
        struct winnow_wire_tensor tensor;
        request.seq = seq;
        item[0].session = seq == 1 ? peer.session : 12345;
        item[2].position = seq == 1 ? N_SMALL : 7;
        const Winnow__V1__AttendReply *reply =
            exchange(call, &request, zeros, (size_t)3 * Q_BYTES,
                     &winnow__v1__attend_reply__descriptor, &tensor);
        CHECK(reply);
        CHECK_EQ(reply->seq, seq);
        CHECK_EQ(reply->part, 3);
        CHECK_EQ(reply->n_results, 3);
        CHECK_EQ(reply->results[0]->status, seq == 1 ? 0 : -ENOENT);
        CHECK_EQ(reply->results[1]->status, 0);
        CHECK(reply->results[1]->certificate);
        CHECK_EQ(reply->results[2]->status, seq == 1 ? 0 : -EINVAL);
        CHECK_EQ(tensor.n_bytes, 3 * (Q_BYTES + LSE_BYTES));
        float lse[3][Q_HEADS];
        winnow_wire_tensor_copy(&tensor, (size_t)3 * Q_BYTES, lse, sizeof lse);
        CHECK(seq == 1 || (lse[0][0] == 0 && lse[2][Q_HEADS - 1] == 0));
        CHECK_NEAR(lse[1][0], log(N_SMALL), 1e-5); /* equal keys, logits 0 */
        request.token.len = 0;                     /* needed in a stream's first message alone */
    }
    request.seq = 4;
    CHECK(!exchange(call, &request, zeros, (size_t)3 * Q_BYTES - 4,
                    &winnow__v1__attend_reply__descriptor, NULL));
    CHECK_EQ(finish(call).error, -EINVAL);
    peer_close(&peer);
}

/* A message above gRPC's own limit ends its call; the connection serves on. */
static void test_rpc__oversized_message(void)
{
    struct peer peer;
    static uint8_t bytes[WINNOW_WIRE_MESSAGE_BYTES_MAX + 1];
    CHECK_EQ(peer_open(&peer), 0);
    struct winnow_call *call = open_call(&peer, "Attend");
    struct iovec part = {bytes, sizeof bytes};
    winnow_call_start(call, WINNOW_CALL_SEND | WINNOW_CALL_RECEIVE, &part, 1);
    await(call, 5000);
    CHECK(finish(call).error < 0);
    CHECK_EQ(n_sessions(&peer), 0);
    peer_close(&peer);
}

/* Every number of every message at its edges: an answer or an error of the table, no hang. */
static void test_rpc__numbers_at_their_edges(void)
{
    static const uint64_t edge[] = {
        0,         1,         2,     15,    16,        63,         64,
        127,       128,       65535, 65536, INT32_MAX, UINT32_MAX, UINT64_C(1) << 32,
        INT64_MAX, UINT64_MAX};
    static const struct {
        const char *method;
        const ProtobufCMessageDescriptor *type;
    } method[] = {
        {"Info", &winnow__v1__info_request__descriptor},
        {"OpenSession", &winnow__v1__open_session_request__descriptor},
        {"Append", &winnow__v1__append_message__descriptor},
        {"Attend", &winnow__v1__attend_request__descriptor},
        {"AttendExact", &winnow__v1__attend_exact_message__descriptor},
        {"Truncate", &winnow__v1__truncate_request__descriptor},
        {"Fork", &winnow__v1__fork_request__descriptor},
        {"Stats", &winnow__v1__stats_request__descriptor},
        {"Close", &winnow__v1__close_request__descriptor},
    };
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    uint32_t n_calls = 0;
    for (size_t m = 0; m < sizeof method / sizeof *method; m++) {
        for (uint32_t f = 0; f < method[m].type->n_fields; f++) {
            const ProtobufCFieldDescriptor *field = &method[m].type->fields[f];
            if (field->type == PROTOBUF_C_TYPE_MESSAGE || field->type == PROTOBUF_C_TYPE_STRING ||
                field->type == PROTOBUF_C_TYPE_BYTES)
                continue;
            for (size_t e = 0; e < sizeof edge / sizeof *edge; e++) {
                /* The token and session in front, then the field by hand. */
                uint8_t bytes[64] = {1 << 3 | 2, 16};
                size_t n = strcmp(method[m].method, "Info") ? 18 : 0;
                memcpy(bytes + 2, peer.token, n ? 16 : 0);
                if (n && field->id != 2 && strcmp(method[m].method, "Attend") &&
                    strcmp(method[m].method, "OpenSession")) {
                    Winnow__V1__CloseRequest session = WINNOW__V1__CLOSE_REQUEST__INIT;
                    session.session = peer.session;
                    n += winnow__v1__close_request__pack(&session, bytes + n);
                }
                bytes[n++] = (uint8_t)(field->id << 3);
                for (uint64_t value = edge[e]; value >= 128 || (bytes[n++] = (uint8_t)value, 0);
                     value >>= 7)
                    bytes[n++] = (uint8_t)(value | 128);
                struct winnow_status status;
                struct iovec part = {bytes, n};
                void *reply = NULL;
                size_t n_reply;
                if (!winnow_channel_call(peer.channel, method[m].method, &part, 1, in_ms(5000),
                                         &reply, &n_reply, &status))
                    free(reply);
                bool is_bad =
                    (status.error == -ETIMEDOUT && status.local) || status.error == -EHOSTDOWN;
                if (is_bad)
                    printf("%s.%s %" PRIu64 ": %d %s\n", method[m].method, field->name, edge[e],
                           status.error, status.text);
                CHECK(!is_bad);
                n_calls++;
            }
            if (!strcmp(method[m].method, "Close"))
                open_session(&peer, (uint8_t)(100 + f)); /* edges closed none, to be sure */
        }
    }
    CHECK(n_calls > 400);
    peer_close(&peer);
}

/* Random bytes and damaged messages to every method: the daemon answers each and lives. */
static void test_rpc__damaged_messages(void)
{
    static const char *const method[] = {"Info",        "OpenSession", "Append", "Attend",
                                         "AttendExact", "Truncate",    "Fork",   "Close",
                                         "Stats",       "Lease",       "Nothing"};
    struct winnow_rng rng;
    struct peer peer;
    winnow_rng_init(&rng, test_seed());
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    Winnow__V1__AttendExactMessage header = window_header(&peer, 0, 4);
    for (uint32_t i = 0; i < 2000; i++) {
        uint8_t bytes[256];
        size_t n = winnow__v1__attend_exact_message__pack(&header, bytes);
        for (uint64_t flips = 1 + winnow_rng_below(&rng, 6); flips; flips--)
            bytes[winnow_rng_below(&rng, n)] = (uint8_t)winnow_rng_next(&rng);
        if (winnow_rng_below(&rng, 4) == 0)
            n = winnow_rng_below(&rng, n);
        const char *to = method[winnow_rng_below(&rng, sizeof method / sizeof *method)];
        struct winnow_status status;
        struct iovec part = {bytes, n};
        void *reply = NULL;
        size_t n_reply;
        if (!strcmp(to, "Lease")) { /* granted whatever the beat: only its end is ours */
            struct winnow_call *call = open_call(&peer, to);
            winnow_call_start(call, WINNOW_CALL_SEND | WINNOW_CALL_RECEIVE, &part, 1);
            await(call, 5000);
            winnow_call_finish(call, 0, NULL);
            continue;
        }
        if (!winnow_channel_call(peer.channel, to, &part, 1, in_ms(5000), &reply, &n_reply,
                                 &status))
            free(reply);
        CHECK(!(status.error == -ETIMEDOUT && status.local) && status.error != -EHOSTDOWN);
    }
    open_session(&peer, 2); /* one that no damaged Truncate or Close has met */
    CHECK_EQ(window(&peer, 0, NULL).error, 0);
    peer_close(&peer);
}

/* SIGTERM with a lease, a silent stream and a window half sent: the lease is told first, all calls
 * end with -EHOSTDOWN, and the daemon is gone long before the ten seconds that it grants. */
static void test_rpc__drain_ends_streams(void)
{
    struct peer peer;
    CHECK_EQ(peer_open(&peer), 0);
    open_session(&peer, 1);
    struct winnow_call *attend = open_call(&peer, "Attend");
    CHECK_EQ(winnow_call_start(attend, WINNOW_CALL_RECEIVE, NULL, 0), 0);
    struct winnow_call *exact = open_call(&peer, "AttendExact");
    Winnow__V1__AttendExactMessage header = window_header(&peer, 0, 2 * N_SMALL);
    exchange(exact, &header, NULL, 0, NULL, NULL);
    send_part(exact, WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV);
    CHECK_EQ(n_sessions(&peer), 1);

    CHECK_EQ(kill(server.pid, SIGTERM), 0);
    const Winnow__V1__LeaseEvent *event;
    do {
        event = exchange(peer.lease, NULL, NULL, 0, &winnow__v1__lease_event__descriptor, NULL);
        CHECK(event);
    } while (event->kind == WINNOW__V1__LEASE_EVENT__KIND__KIND_BEAT);
    CHECK_EQ(event->kind, WINNOW__V1__LEASE_EVENT__KIND__KIND_DRAINING);
    await(attend, 5000);
    CHECK_EQ(finish(attend).error, -EHOSTDOWN);
    CHECK_EQ(finish(exact).error, -EHOSTDOWN);
    CHECK_EQ(finish(peer.lease).error, -EHOSTDOWN);
    peer.lease = NULL;
    peer_close(&peer);
    CHECK_EQ(daemon_stop(&server, 0), 0);
    daemon_start(&server);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    CHECK_EQ(winnow_wire_arena_create(&arena), 0);
    daemon_init(&server, args);
    daemon_start(&server);
    TEST_RUN(test_rpc__broken_window_applies_nothing);
    TEST_RUN(test_rpc__windows_follow_on_a_stream);
    TEST_RUN(test_rpc__append_is_repeated_by_its_id);
    TEST_RUN(test_rpc__open_and_fork_are_repeated);
    TEST_RUN(test_rpc__windows_wait_for_memory);
    TEST_RUN(test_rpc__leases_are_limited);
    TEST_RUN(test_rpc__calls_are_limited);
    TEST_RUN(test_rpc__attend_items_fail_alone);
    TEST_RUN(test_rpc__oversized_message);
    TEST_RUN(test_rpc__numbers_at_their_edges);
    TEST_RUN(test_rpc__damaged_messages);
    TEST_RUN(test_rpc__drain_ends_streams);
    CHECK_EQ(daemon_stop(&server, SIGTERM), 0);
    daemon_remove(&server);
    winnow_wire_arena_destroy(arena);
    return TEST_END();
}
