/*
 * The wire: bounded decoding and encoding of proto/winnow.proto and proto/health.proto, used by
 * both sides. The only door to protobuf-c; knows nothing of gRPC: messages come as slices and leave
 * as an encoded head that the caller sends before its tensor's slices.
 *
 * Decoding takes memory from an **arena** that is bounded in bytes and in allocations, so that a
 * hostile message costs at most what was printed at start. The **tensor** (field 15, `data`) is
 * never copied: it is a view into the received slices; the rest of the message is unpacked from a
 * copy of at most 64 KiB.
 *
 * Thread: one owner an arena; decode and encode: any.
 */
#pragma once

#include <proto/health.pb-c.h>
#include <proto/winnow.pb-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    WINNOW_WIRE_PROTO = 1, /* version: this build speaks it alone */
    WINNOW_WIRE_TENSOR_FIELD = 15,

    WINNOW_WIRE_ARENA_BYTES = 64 << 10,      /* held by an arena between messages */
    WINNOW_WIRE_ARENA_BYTES_MAX = 256 << 10, /* during one */
    WINNOW_WIRE_N_ALLOCATIONS_MAX = 1024,

    WINNOW_WIRE_REST_BYTES_MAX = 64 << 10,   /* of a message without its tensor */
    WINNOW_WIRE_CHUNK_BYTES_MAX = 256 << 10, /* tensor of Append and AttendExact messages */
    WINNOW_WIRE_ATTEND_BYTES_MAX = 1 << 20,  /* tensor of Attend messages */
    WINNOW_WIRE_MESSAGE_BYTES_MAX = (1 << 20) + (64 << 10), /* gRPC's receive limit, both sides */
    WINNOW_WIRE_METADATA_BYTES_MAX = 8 << 10,

    WINNOW_WIRE_ID_BYTES = 16, /* token, boot_id, request_id, append_id */
    WINNOW_WIRE_FINGERPRINT_BYTES = 32,
    WINNOW_WIRE_LABEL_BYTES_MAX = 64,
    WINNOW_WIRE_N_ITEMS_MAX = 256, /* of an Attend message */
    WINNOW_WIRE_N_ROWS_MAX = 128,  /* of a StatsReply */
};

enum { /* flags of an AttendItem on the wire */
       WINNOW_WIRE_HAS_KV = 1,
       WINNOW_WIRE_WANT_LSE = 2,
       WINNOW_WIRE_EXACT = 4,
       WINNOW_WIRE_ALLOW_DEGRADED = 8,
};

/* Metadata keys: initial metadata of every call; trailers of a failed one (docs/rpc.md). */
#define WINNOW_WIRE_KEY_BOOT        "winnow-boot-bin"        /* 16 bytes */
#define WINNOW_WIRE_KEY_REASON      "winnow-reason"          /* errno, decimal, positive */
#define WINNOW_WIRE_KEY_TRUNCATE_TO "winnow-truncate-to-bin" /* u64, little-endian */
#define WINNOW_WIRE_KEY_HELD        "winnow-held-bin"        /* u64: tokens the layer holds */
#define WINNOW_WIRE_KEY_RETRY       "winnow-retry-after-ms"  /* decimal; with RESOURCE_EXHAUSTED */

struct winnow_wire_slice {
    const void *data;
    size_t n_bytes;
};

/* A tensor inside received slices: n_bytes from offset_bytes of slice[0] on. Valid as long as the
 * slices are. */
struct winnow_wire_tensor {
    const struct winnow_wire_slice *slice;
    size_t offset_bytes, n_bytes;
};

/* Copies [from_bytes, from_bytes + n_bytes) of the tensor; the range must lie inside. */
void winnow_wire_tensor_copy(const struct winnow_wire_tensor *tensor, size_t from_bytes, void *dst,
                             size_t n_bytes);

struct winnow_wire_arena;

int winnow_wire_arena_create(struct winnow_wire_arena **ret_arena); /* -ENOMEM */
void winnow_wire_arena_destroy(struct winnow_wire_arena *arena);    /* NULL is fine */
void winnow_wire_arena_reset(struct winnow_wire_arena *arena);      /* what was taken is gone */
/* Zeroed, aligned to 16; for messages to be encoded. NULL: a bound is reached. */
void *winnow_wire_arena_take(struct winnow_wire_arena *arena, size_t n_bytes);

struct winnow_wire_input {
    const struct winnow_wire_slice *slice;
    uint32_t n_slices;
    uint32_t tensor_bytes_max;
    bool is_request; /* unknown fields are refused, at any depth; in replies they are ignored */
};

struct winnow_wire_message {
    void *message; /* the generated struct of the type asked for, in the arena; `data` is empty */
    struct winnow_wire_tensor tensor; /* n_bytes 0: none, or none in this type */
    char text[192];                   /* of a failure: what, value, limit */
};

/*
 * Decodes one message of `type` (&winnow__v1__attend_request__descriptor, ...). 0, or with only
 * ret_message->text written
 *   -EINVAL    malformed, a wrong wire type, an unknown field of a request, field 15 twice
 *   -EMSGSIZE  tensor above tensor_bytes_max, or the rest above 64 KiB
 *   -ENOMEM    a bound of the arena, or no memory
 */
int winnow_wire_decode(struct winnow_wire_arena *arena, const ProtobufCMessageDescriptor *type,
                       const struct winnow_wire_input *input,
                       struct winnow_wire_message *ret_message);

/*
 * Encodes all of a message before its tensor bytes; the caller sends them behind it, in as many
 * slices as it likes. `message` is a generated struct whose `data` is empty; tensor_bytes 0: no
 * tensor. head_bytes gives the size that head writes.
 */
size_t winnow_wire_head_bytes(const void *message, size_t tensor_bytes);
size_t winnow_wire_head(const void *message, size_t tensor_bytes, void *dst);
