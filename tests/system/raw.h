/* A lease and calls of our own over client/rpc.h, to send what libwinnow would not. */
#pragma once

#include <client/rpc.h>
#include <proto/wire.h>

struct raw {
    struct winnow_channel *channel;
    struct winnow_call *lease;
    struct winnow_wire_arena *arena;
    uint8_t token[WINNOW_WIRE_ID_BYTES];
    uint64_t session; /* of raw_open_session */
    uint32_t model, epoch;
};

/* A message of a stream, with tensor_bytes zeros behind it. */
struct raw_message {
    void *message;
    size_t tensor_bytes;
};

void raw_open(struct raw *raw, const char *socket); /* a failure ends the test */
void raw_close(struct raw *raw);
ProtobufCBinaryData raw_token(struct raw *raw);

/* Sends the messages, ends the sending, receives until the daemon ends too; its status. In
 * `raw->arena`, if reply_type is given, the first reply as *ret_reply (NULL: none came). */
struct winnow_status raw_send(struct raw *raw, const char *method,
                              const struct raw_message *messages, uint32_t n_messages,
                              const ProtobufCMessageDescriptor *reply_type, void *ret_reply);
/* One message without a tensor, the reply dropped. */
struct winnow_status raw_call(struct raw *raw, const char *method, void *message);
/* Bytes as they are. */
struct winnow_status raw_send_bytes(struct raw *raw, const char *method, const void *data,
                                    size_t n_bytes);

/* A small model: 2 layers, 4 q heads, 2 KV heads of width 64, fp16 at rest, fp32 here. */
Winnow__V1__ModelShape raw_shape(void);
/* Sets raw->session, model and epoch. Each call has a request id of its own. */
struct winnow_status raw_open_session(struct raw *raw, Winnow__V1__ModelShape *shape,
                                      Winnow__V1__SessionOptions *options, const char *label);
enum {
    RAW_Q_BYTES = 4 * 64 * 4,
    RAW_KV_BYTES = 2 * 2 * 64 * 4,
};
