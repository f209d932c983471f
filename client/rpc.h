/*
 * The client's door to gRPC: connected channels, and calls as streams of byte messages. What the
 * bytes mean is proto/wire.h's; nothing outside rpc.c sees a grpc_ type.
 *
 * A channel is one connection to one life of winnowd: it never reconnects, so all calls of a
 * channel meet the same boot id, and its end is the daemon's. A call owns its completion queue,
 * and the thread that waits is the thread that polls the socket.
 *
 * Errors are 0 or -errno; winnow_call_finish turns the daemon's status into one.
 * Threads: a channel, any; a call, one at a time.
 */
#pragma once

#include <base/clock.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct winnow_channel;
struct winnow_call;

enum { WINNOW_STATUS_TEXT_BYTES = 384 };

/* What winnow_call_finish waits beyond its deadline, at most. */
#define WINNOW_LIMBO_AFTER_NS (10 * WINNOW_NS_PER_MS)

/* How a call ended. error 0: the daemon said OK. */
struct winnow_status {
    int error;            /* 0 or -errno */
    bool local;           /* the daemon did not say it: our deadline, or a broken connection */
    uint64_t truncate_to; /* with -ENODATA */
    char text[WINNOW_STATUS_TEXT_BYTES];
};

/* Connects to the socket at `path`. -ENOENT, -ECONNREFUSED (nobody there), -EACCES, -ENAMETOOLONG,
 * -ETIMEDOUT (its backlog is full), -ENOMEM, -EMFILE and socket(2)'s. */
int winnow_channel_open(const char *path, int64_t deadline_ns, struct winnow_channel **ret_channel);
/* Every call must be closed. NULL is fine. */
void winnow_channel_close(struct winnow_channel *channel);
/* Readable when bytes arrive, POLLRDHUP when the daemon is gone. The channel's, for poll alone. */
int winnow_channel_watch_fd(const struct winnow_channel *channel);
/* Of the process that listens, as the kernel tells it; 0 when it cannot. */
int winnow_channel_peer_pid(const struct winnow_channel *channel);
int winnow_channel_peer_uid(const struct winnow_channel *channel);

/* Begins a call of /winnow.v1.Winnow/`method`. The daemon is told `deadline_ns`; WINNOW_NEVER_NS
 * for a stream without end. -ENOMEM. */
int winnow_call_open(struct winnow_channel *channel, const char *method, int64_t deadline_ns,
                     struct winnow_call **ret_call);

enum {
    WINNOW_CALL_SEND = 1,    /* the message of `parts`, copied before start returns */
    WINNOW_CALL_LAST = 2,    /* and no more after it */
    WINNOW_CALL_RECEIVE = 4, /* the next message */
};
/* One exchange: starts it; the earlier one must have been waited for. -ENOMEM, -EPIPE. */
int winnow_call_start(struct winnow_call *call, uint32_t what, const struct iovec *parts,
                      uint32_t n_parts);
/* Waits for it. With RECEIVE, *ret_data is the message, the call's until its next start, or NULL
 * at the end of the stream. -EPIPE: the stream broke, winnow_call_finish knows why.
 * -ETIMEDOUT: it still runs, and all that is left to do is wait again or finish. */
int winnow_call_wait(struct winnow_call *call, int64_t deadline_ns, const void **ret_data,
                     size_t *ret_bytes);
/* Looks for its end without sleeping. True: winnow_call_wait returns at once. */
bool winnow_call_is_back(struct winnow_call *call);
/* Ends the call, frees it and says how it ended: waits for the daemon's status until the deadline,
 * else cancels (error -ETIMEDOUT). `status` NULL: cancelled at once. NULL call is fine. */
void winnow_call_finish(struct winnow_call *call, int64_t deadline_ns,
                        struct winnow_status *status);

/* One message each way. The reply is copied: free(*ret_data). Returns status->error. */
int winnow_channel_call(struct winnow_channel *channel, const char *method,
                        const struct iovec *parts, uint32_t n_parts, int64_t deadline_ns,
                        void **ret_data, size_t *ret_bytes, struct winnow_status *status);

/* Lets gRPC read what waits on idle connections (pings), and frees cancelled calls whose last
 * completion came late. For the lease thread, about once a second. */
void winnow_rpc_tend(void);
/* This process is a child of one in which gRPC ran: no handle works, none can be opened. */
bool winnow_rpc_forked(void);
