#include <system/raw.h>

#include <base/clock.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static int64_t in_5_s(void)
{
    return winnow_clock_now_ns() + 5 * WINNOW_NS_PER_S;
}

static struct iovec encode(const void *message, size_t tensor_bytes)
{
    size_t head_bytes = winnow_wire_head_bytes(message, tensor_bytes);
    struct iovec part = {calloc(1, head_bytes + tensor_bytes + 1), head_bytes + tensor_bytes};
    MUST(part.iov_base);
    winnow_wire_head(message, tensor_bytes, part.iov_base);
    return part;
}

static void *decode(struct raw *raw, const ProtobufCMessageDescriptor *type, const void *data,
                    size_t n_bytes)
{
    struct winnow_wire_slice slice = {data, n_bytes};
    struct winnow_wire_input input = {&slice, 1, WINNOW_WIRE_MESSAGE_BYTES_MAX, false};
    struct winnow_wire_message message;
    winnow_wire_arena_reset(raw->arena);
    MUST(winnow_wire_decode(raw->arena, type, &input, &message) == 0);
    return message.message;
}

ProtobufCBinaryData raw_token(struct raw *raw)
{
    return (ProtobufCBinaryData){sizeof raw->token, raw->token};
}

void raw_open(struct raw *raw, const char *socket)
{
    Winnow__V1__LeaseBeat beat = WINNOW__V1__LEASE_BEAT__INIT;
    const void *data;
    size_t n_bytes;
    *raw = (struct raw){0};
    MUST(winnow_wire_arena_create(&raw->arena) == 0);
    MUST(winnow_channel_open(socket, in_5_s(), &raw->channel) == 0);
    MUST(winnow_call_open(raw->channel, "Lease", WINNOW_NEVER_NS, &raw->lease) == 0);
    struct iovec part = encode(&beat, 0);
    MUST(winnow_call_start(raw->lease, WINNOW_CALL_SEND | WINNOW_CALL_RECEIVE, &part, 1) == 0);
    MUST(winnow_call_wait(raw->lease, in_5_s(), &data, &n_bytes) == 0 && data);
    const Winnow__V1__LeaseEvent *event =
        decode(raw, &winnow__v1__lease_event__descriptor, data, n_bytes);
    MUST(event->token.len == sizeof raw->token);
    memcpy(raw->token, event->token.data, sizeof raw->token);
    free(part.iov_base);
}

void raw_close(struct raw *raw)
{
    winnow_call_finish(raw->lease, 0, NULL);
    winnow_channel_close(raw->channel);
    winnow_wire_arena_destroy(raw->arena);
}

struct winnow_status raw_send(struct raw *raw, const char *method,
                              const struct raw_message *messages, uint32_t n_messages,
                              const ProtobufCMessageDescriptor *reply_type, void *ret_reply)
{
    struct winnow_call *call;
    struct winnow_status status;
    const void *data = NULL;
    size_t n_bytes;
    bool first = true;
    int rc = 0;
    MUST(winnow_call_open(raw->channel, method, in_5_s(), &call) == 0);
    for (uint32_t i = 0; rc == 0 && i < n_messages; i++) {
        struct iovec part = encode(messages[i].message, messages[i].tensor_bytes);
        rc = winnow_call_start(
            call, WINNOW_CALL_SEND | (i + 1 == n_messages ? WINNOW_CALL_LAST : 0), &part, 1);
        if (rc == 0)
            rc = winnow_call_wait(call, in_5_s(), NULL, NULL);
        free(part.iov_base);
    }
    if (reply_type)
        *(void **)ret_reply = NULL;
    while (rc == 0) {
        rc = winnow_call_start(call, WINNOW_CALL_RECEIVE, NULL, 0);
        if (rc == 0)
            rc = winnow_call_wait(call, in_5_s(), &data, &n_bytes);
        if (rc < 0 || !data)
            break;
        if (first && reply_type)
            *(void **)ret_reply = decode(raw, reply_type, data, n_bytes);
        first = false;
    }
    winnow_call_finish(call, in_5_s(), &status);
    return status;
}

struct winnow_status raw_call(struct raw *raw, const char *method, void *message)
{
    return raw_send(raw, method, &(struct raw_message){message, 0}, 1, NULL, NULL);
}

struct winnow_status raw_send_bytes(struct raw *raw, const char *method, const void *data,
                                    size_t n_bytes)
{
    struct winnow_status status;
    struct iovec part = {(void *)data, n_bytes};
    void *reply = NULL;
    size_t n_reply;
    if (winnow_channel_call(raw->channel, method, &part, 1, in_5_s(), &reply, &n_reply, &status) ==
        0)
        free(reply);
    return status;
}

Winnow__V1__ModelShape raw_shape(void)
{
    Winnow__V1__ModelShape shape = WINNOW__V1__MODEL_SHAPE__INIT;
    shape.layers = 2;
    shape.q_heads = 4;
    shape.kv_heads = 2;
    shape.k_width = shape.v_width = 64;
    shape.softmax_scale = 0.125F;
    shape.kv_dtype = WINNOW__V1__DTYPE__DTYPE_FP16;
    shape.io_dtype = WINNOW__V1__DTYPE__DTYPE_FP32;
    return shape;
}

struct winnow_status raw_open_session(struct raw *raw, Winnow__V1__ModelShape *shape,
                                      Winnow__V1__SessionOptions *options, const char *label)
{
    static uint64_t n_requests;
    uint8_t id[WINNOW_WIRE_ID_BYTES] = {0};
    Winnow__V1__OpenSessionRequest request = WINNOW__V1__OPEN_SESSION_REQUEST__INIT;
    const Winnow__V1__OpenSessionReply *reply;
    n_requests++;
    memcpy(id, &n_requests, sizeof n_requests);
    request.token = raw_token(raw);
    request.model = shape;
    request.options = options;
    request.label = (char *)label;
    request.request_id = (ProtobufCBinaryData){sizeof id, id};
    struct winnow_status status = raw_send(raw, "OpenSession", &(struct raw_message){&request, 0},
                                           1, &winnow__v1__open_session_reply__descriptor, &reply);
    if (!status.error) {
        MUST(reply);
        raw->session = reply->session;
        raw->model = reply->model;
        raw->epoch = reply->epoch;
    }
    return status;
}
