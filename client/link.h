/*
 * A link: the connections to one life of winnowd, its limits and, if asked for, a lease. Links do
 * not reconnect; the client replaces a dead one (client.h).
 *
 * Three connections, so that a prompt's megabytes never stand before a decode step's kilobytes
 * (62 us became 265) and the lease thread has a socket of its own to watch: control and Attend,
 * bulk, lease.
 *
 * Threads: any; a link is freed with its last reference.
 */
#pragma once

#include <client/rpc.h>
#include <proto/wire.h>

struct winnow_step;

enum { WINNOW_LIMIT_BYTES_MIN = 4096 }; /* below it a daemon is not taken at its word */

struct winnow_link {
    _Atomic uint32_t n_refs;
    uint64_t generation;                           /* the client's count of links */
    struct winnow_channel *control, *bulk, *lease; /* the last two NULL without a lease */
    struct winnow_call *lease_call;                /* its next message is being received */
    uint8_t boot_id[WINNOW_WIRE_ID_BYTES], token[WINNOW_WIRE_ID_BYTES];
    char path[108]; /* where it was found */
    char build[32];
    uint32_t proto;
    uint64_t attend_bytes, chunk_bytes, window_bytes, window_tokens; /* the daemon's limits, or the
                                                                        wire's */
    struct winnow_step *idle; /* Attend streams; under the client's lock */
};

/*
 * Where winnowd may listen: `address` (a path, "unix:" before it allowed), else WINNOW_ADDRESS,
 * else $XDG_RUNTIME_DIR/winnow/winnow.sock, else /run/winnow/winnow.sock. Opens the first that
 * answers and agrees on a version.
 *   -EHOSTDOWN -EACCES -EPROTO -EINVAL -ENOMEM -ETIMEDOUT -ECHILD, with the thread's text
 */
int winnow_link_open(const char *address, bool with_lease, int64_t deadline_ns,
                     struct winnow_link **ret_link);
struct winnow_link *winnow_link_ref(struct winnow_link *link);
void winnow_link_unref(struct winnow_link *link); /* NULL is fine */

/* One control call: encodes `request`, decodes the reply as `type` into `arena`. Returns
 * status->error with the thread's text set. */
int winnow_link_call(struct winnow_link *link, const char *method, const void *request,
                     const ProtobufCMessageDescriptor *type, struct winnow_wire_arena *arena,
                     int64_t deadline_ns, void **ret_reply, struct winnow_status *status);

/* Asks Info: does the daemon answer? */
int winnow_link_ping(struct winnow_link *link, int64_t deadline_ns);
/* The lease: reads what has come. 0, or -EHOSTDOWN once it is over. */
int winnow_link_read_lease(struct winnow_link *link);

/* A received message: the rest goes into `arena`, the tensor is pointed at. -EPROTO -ENOMEM, with
 * the thread's text. */
int winnow_message_decode(const void *data, size_t n_bytes, const ProtobufCMessageDescriptor *type,
                          struct winnow_wire_arena *arena, void **ret_message,
                          struct iovec *ret_tensor);
/* Starts an exchange that sends `message` with `tensor` behind it. -ENOMEM -EPIPE -EMSGSIZE. */
int winnow_message_start(struct winnow_call *call, uint32_t what, const void *message,
                         const struct iovec *tensor, uint32_t n_tensor);
