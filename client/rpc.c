// The only client file that includes gRPC.
//
// The difficulty is the decode step: 30 exchanges a token, each a few KiB. gRPC's epoll1 engine has
// one polling thread a process at a time; whoever else waits is woken by it, 25-35 us each. So a
// call owns a pluck queue, the caller's thread polls in winnow_call_wait, and no thread of this
// library sits in a queue (the lease thread waits in poll(2) on its own descriptor). SEND and
// RECEIVE of an exchange are one batch: one completion, one pass through the queue.
//
// The socket is connected here and handed to gRPC, instead of naming it "unix:PATH" and letting
// gRPC connect: SO_SNDBUF and the peer's pid are ours, a refusal is an errno at once instead of a
// channel state, no client_channel filter stands in the path (no retries to switch off), and a
// channel cannot reconnect behind our back to another life of the daemon. Keepalive is off: the
// peer's death is the socket's end, and a daemon that was merely stopped must not lose its leases.
//
// Messages are copied into slices: gRPC may hold bytes after their batch is done (a cancelled
// call's, for seconds), when the caller's tensor is long gone. 8 KiB cost 0.3 us, 256 KiB 25.
//
// A cancelled call frees itself when its batches have come back. That takes microseconds, but
// depends on gRPC; a call whose batches have not come within 10 ms goes to the limbo list, so that
// no caller waits for it.
#include <client/rpc.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <limits.h>
#include <proto/wire.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    SOCKET_SEND_BYTES = 1 << 20,
    FRAME_BYTES_MAX = 1 << 20,
    LOOKAHEAD_BYTES = 8 << 20,
};
#define TEXT_TIMEDOUT "no answer from winnowd by the deadline"

static_assert(FRAME_BYTES_MAX >= 1 << 14, "HTTP/2 allows no smaller SETTINGS_MAX_FRAME_SIZE");
static_assert(FRAME_BYTES_MAX < 1 << 24, "HTTP/2 allows no larger SETTINGS_MAX_FRAME_SIZE");
static_assert((int)LOOKAHEAD_BYTES >= (int)WINNOW_WIRE_MESSAGE_BYTES_MAX,
              "a message waits for no window");
static_assert((WINNOW_CALL_SEND & WINNOW_CALL_LAST) == 0, "flags of their own");
static_assert((WINNOW_CALL_SEND & WINNOW_CALL_RECEIVE) == 0, "flags of their own");
static_assert((WINNOW_CALL_LAST & WINNOW_CALL_RECEIVE) == 0, "flags of their own");
static_assert(WINNOW_NS_PER_S <= INT32_MAX, "nanoseconds of a gpr_timespec are int32");
static_assert(sizeof(uid_t) == sizeof(int), "a peer's uid passes as int, -1: unknown");
static_assert(sizeof(pid_t) == sizeof(int), "a peer's pid passes as int");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "trailers and tensors are copied as is");
static_assert(WINNOW_WIRE_MESSAGE_BYTES_MAX <= INT_MAX, "gRPC's arguments are int");
static_assert(sizeof TEXT_TIMEDOUT <= WINNOW_STATUS_TEXT_BYTES, "told whole");

enum tag { TAG_OPEN, TAG_STATUS, TAG_EXCHANGE, N_TAGS };

struct winnow_channel {
    grpc_channel *channel;
    int watch_fd;
    int peer_pid, peer_uid;
};

struct winnow_call {
    grpc_call *call;
    grpc_completion_queue *queue;
    bool pending[N_TAGS]; /* a batch is with gRPC */
    bool ok[N_TAGS];      /* once it came back */
    grpc_byte_buffer *sent, *received;
    grpc_slice flat; /* of a message that came in pieces */
    bool has_flat;
    bool receives; /* the exchange under way */
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice details;
    struct winnow_call *next; /* in limbo */
};

static struct {
    pthread_once_t once;
    pthread_mutex_t lock;      /* limbo */
    struct winnow_call *limbo; /* cancelled, with batches still out */
    grpc_completion_queue *tend_queue;
    bool started, forked; /* forked: set in a child, before it has a second thread */
} rpc = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

static void on_fork_child(void)
{
    rpc.forked = rpc.started;
}

/* gRPC is started once and stays: its shutdown may wait for seconds, and would race the next open. */
static void rpc_start(void)
{
    grpc_init();
    rpc.tend_queue = grpc_completion_queue_create_for_next(NULL);
    rpc.started = true;
    pthread_atfork(NULL, NULL, on_fork_child);
}

bool winnow_rpc_forked(void)
{
    return rpc.forked;
}

static gpr_timespec rpc_time(int64_t deadline_ns)
{
    if (deadline_ns == WINNOW_NEVER_NS)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return (gpr_timespec){.tv_sec = deadline_ns / WINNOW_NS_PER_S,
                          .tv_nsec = (int32_t)(deadline_ns % WINNOW_NS_PER_S),
                          .clock_type = GPR_CLOCK_MONOTONIC};
}

/* A socket that is still in the listener's full backlog answers EAGAIN and cannot be polled. */
static int socket_connect(const char *path, int64_t deadline_ns, int *ret_fd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);

    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    while (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        int error = errno;
        if (error == EINTR)
            continue;
        if (error == EAGAIN && winnow_clock_now_ns() < deadline_ns) {
            nanosleep(&(struct timespec){.tv_nsec = WINNOW_NS_PER_MS}, NULL);
            continue;
        }
        close(fd);
        return error == EAGAIN ? -ETIMEDOUT : -error;
    }
    *ret_fd = fd;
    return 0;
}

static grpc_arg arg_int(const char *key, int value)
{
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

static grpc_channel *channel_from_fd(int fd)
{
    grpc_arg args[] = {
        arg_int(GRPC_ARG_ENABLE_RETRIES, 0),
        arg_int(GRPC_ARG_ENABLE_CHANNELZ, 0),
        arg_int(GRPC_ARG_HTTP2_BDP_PROBE, 0),
        arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, WINNOW_WIRE_MESSAGE_BYTES_MAX),
        arg_int(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, FRAME_BYTES_MAX),
        arg_int(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, LOOKAHEAD_BYTES),
        arg_int(GRPC_ARG_MAX_METADATA_SIZE, WINNOW_WIRE_METADATA_BYTES_MAX),
    };
    grpc_channel_args all = {.num_args = sizeof args / sizeof *args, .args = args};
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create_from_fd("winnow", fd, credentials, &all);
    grpc_channel_credentials_release(credentials);
    return channel;
}

int winnow_channel_open(const char *path, int64_t deadline_ns, struct winnow_channel **ret_channel)
{
    if (rpc.forked)
        return -ECHILD;
    pthread_once(&rpc.once, rpc_start);

    int fd = -1;
    int rc = socket_connect(path, deadline_ns, &fd);
    if (rc < 0)
        return rc;
    struct winnow_channel *channel = calloc(1, sizeof *channel);
    int watch_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (!channel || watch_fd < 0) {
        rc = channel ? -errno : -ENOMEM;
        goto fail_close;
    }
    struct ucred peer = {.uid = (uid_t)-1};
    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){sizeof peer});
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){SOCKET_SEND_BYTES}, sizeof(int));
    *channel = (struct winnow_channel){.channel = channel_from_fd(fd),
                                       .watch_fd = watch_fd,
                                       .peer_pid = peer.pid,
                                       .peer_uid = (int)peer.uid};
    *ret_channel = channel;
    return 0;

fail_close:
    if (watch_fd >= 0)
        close(watch_fd);
    free(channel);
    close(fd);
    return rc;
}

void winnow_channel_close(struct winnow_channel *channel)
{
    if (!channel)
        return;
    grpc_channel_destroy(channel->channel);
    close(channel->watch_fd);
    free(channel);
}

int winnow_channel_watch_fd(const struct winnow_channel *channel)
{
    return channel->watch_fd;
}

int winnow_channel_peer_pid(const struct winnow_channel *channel)
{
    return channel->peer_pid;
}

int winnow_channel_peer_uid(const struct winnow_channel *channel)
{
    return channel->peer_uid;
}

/* ---- calls ---- */

static void *call_tag(struct winnow_call *call, enum tag tag)
{
    return &call->pending[tag];
}

static int call_batch(struct winnow_call *call, enum tag tag, const grpc_op *ops, size_t n_ops)
{
    if (grpc_call_start_batch(call->call, ops, n_ops, call_tag(call, tag), NULL) != GRPC_CALL_OK)
        return -EPIPE;
    call->pending[tag] = true;
    return 0;
}

/* false: not back by the deadline. */
static bool call_pluck(struct winnow_call *call, enum tag tag, int64_t deadline_ns)
{
    if (!call->pending[tag])
        return true;
    grpc_event event =
        grpc_completion_queue_pluck(call->queue, call_tag(call, tag), rpc_time(deadline_ns), NULL);
    if (event.type != GRPC_OP_COMPLETE)
        return false;
    call->pending[tag] = false;
    call->ok[tag] = event.success != 0;
    return true;
}

static void call_drop_received(struct winnow_call *call)
{
    if (call->has_flat)
        grpc_slice_unref(call->flat);
    call->has_flat = false;
    if (call->received)
        grpc_byte_buffer_destroy(call->received);
    call->received = NULL;
}

/* Every batch is back. */
static void call_free(struct winnow_call *call)
{
    call_drop_received(call);
    if (call->sent)
        grpc_byte_buffer_destroy(call->sent);
    grpc_metadata_array_destroy(&call->initial);
    grpc_metadata_array_destroy(&call->trailing);
    grpc_slice_unref(call->details);
    grpc_call_unref(call->call);
    grpc_completion_queue_shutdown(call->queue);
    grpc_completion_queue_destroy(call->queue);
    free(call);
}

static bool call_drained(struct winnow_call *call, int64_t deadline_ns)
{
    bool drained = true;
    for (enum tag tag = TAG_OPEN; tag < N_TAGS; tag++)
        drained = call_pluck(call, tag, deadline_ns) && drained;
    return drained;
}

int winnow_call_open(struct winnow_channel *channel, const char *method, int64_t deadline_ns,
                     struct winnow_call **ret_call)
{
    struct winnow_call *call = calloc(1, sizeof *call);
    if (!call)
        return -ENOMEM;
    char path[80];
    int n_bytes = snprintf(path, sizeof path, "/winnow.v1.Winnow/%s", method);
    grpc_slice path_slice = grpc_slice_from_copied_buffer(path, (size_t)n_bytes);
    call->queue = grpc_completion_queue_create_for_pluck(NULL);
    call->call =
        grpc_channel_create_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS, call->queue,
                                 path_slice, NULL, rpc_time(deadline_ns), NULL);
    grpc_slice_unref(path_slice);
    grpc_metadata_array_init(&call->initial);
    grpc_metadata_array_init(&call->trailing);
    call->details = grpc_empty_slice();

    /* The daemon's initial metadata is received but never waited for. */
    grpc_op open[2] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                       {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    open[1].data.recv_initial_metadata.recv_initial_metadata = &call->initial;
    grpc_op status = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    status.data.recv_status_on_client.trailing_metadata = &call->trailing;
    status.data.recv_status_on_client.status = &call->code;
    status.data.recv_status_on_client.status_details = &call->details;
    if (call_batch(call, TAG_OPEN, open, 2) < 0 || call_batch(call, TAG_STATUS, &status, 1) < 0) {
        winnow_call_finish(call, 0, NULL);
        return -ENOMEM;
    }
    *ret_call = call;
    return 0;
}

static grpc_byte_buffer *message_copy(const struct iovec *parts, uint32_t n_parts)
{
    size_t n_bytes = 0;
    for (uint32_t i = 0; i < n_parts; i++)
        n_bytes += parts[i].iov_len;
    grpc_slice slice = grpc_slice_malloc(n_bytes);
    uint8_t *to = GRPC_SLICE_START_PTR(slice);
    for (uint32_t i = 0; i < n_parts; i++) {
        if (parts[i].iov_len)
            memcpy(to, parts[i].iov_base, parts[i].iov_len);
        to += parts[i].iov_len;
    }
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return message;
}

int winnow_call_start(struct winnow_call *call, uint32_t what, const struct iovec *parts,
                      uint32_t n_parts)
{
    call_drop_received(call);
    if (call->sent)
        grpc_byte_buffer_destroy(call->sent);
    call->sent = NULL;

    grpc_op ops[3];
    memset(ops, 0, sizeof ops);
    size_t n_ops = 0;
    if (what & WINNOW_CALL_SEND) {
        call->sent = message_copy(parts, n_parts);
        ops[n_ops].op = GRPC_OP_SEND_MESSAGE;
        ops[n_ops++].data.send_message.send_message = call->sent;
    }
    if (what & WINNOW_CALL_LAST)
        ops[n_ops++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    if (what & WINNOW_CALL_RECEIVE) {
        ops[n_ops].op = GRPC_OP_RECV_MESSAGE;
        ops[n_ops++].data.recv_message.recv_message = &call->received;
    }
    call->receives = (what & WINNOW_CALL_RECEIVE) != 0;
    return call_batch(call, TAG_EXCHANGE, ops, n_ops);
}

/* The message as one run of bytes, copied only if it came in several slices. */
static int call_message(struct winnow_call *call, const void **ret_data, size_t *ret_bytes)
{
    const grpc_slice *slice = &call->received->data.raw.slice_buffer.slices[0];
    if (call->received->data.raw.slice_buffer.count != 1) {
        grpc_byte_buffer_reader reader;
        if (!grpc_byte_buffer_reader_init(&reader, call->received))
            return -EPIPE;
        call->flat = grpc_byte_buffer_reader_readall(&reader);
        call->has_flat = true;
        grpc_byte_buffer_reader_destroy(&reader);
        slice = &call->flat;
    }
    *ret_data = GRPC_SLICE_START_PTR(*slice);
    *ret_bytes = GRPC_SLICE_LENGTH(*slice);
    return 0;
}

bool winnow_call_is_back(struct winnow_call *call)
{
    return call_pluck(call, TAG_EXCHANGE, 0);
}

int winnow_call_wait(struct winnow_call *call, int64_t deadline_ns, const void **ret_data,
                     size_t *ret_bytes)
{
    if (!call_pluck(call, TAG_EXCHANGE, deadline_ns))
        return -ETIMEDOUT;
    if (!call->ok[TAG_EXCHANGE])
        return -EPIPE;
    if (!call->receives)
        return 0;
    *ret_data = NULL;
    *ret_bytes = 0;
    return call->received ? call_message(call, ret_data, ret_bytes) : 0;
}

/* ---- how a call ended ---- */

/* Copies at most n_bytes of a trailer; 0: it is not there. */
static size_t trailer_find(const struct winnow_call *call, const char *key, void *value,
                           size_t n_bytes)
{
    for (size_t i = 0; i < call->trailing.count; i++) {
        const grpc_metadata *one = &call->trailing.metadata[i];
        if (grpc_slice_str_cmp(one->key, key))
            continue;
        size_t n_here = GRPC_SLICE_LENGTH(one->value);
        if (n_here > n_bytes)
            n_here = n_bytes;
        memcpy(value, GRPC_SLICE_START_PTR(one->value), n_here);
        return n_here;
    }
    return 0;
}

static int errno_of_code(grpc_status_code code)
{
    switch (code) {
    case GRPC_STATUS_OK:
        return 0;
    case GRPC_STATUS_INVALID_ARGUMENT:
        return -EINVAL;
    case GRPC_STATUS_NOT_FOUND:
        return -ENOENT;
    case GRPC_STATUS_PERMISSION_DENIED:
    case GRPC_STATUS_UNAUTHENTICATED:
        return -EACCES;
    case GRPC_STATUS_RESOURCE_EXHAUSTED:
        return -EDQUOT;
    case GRPC_STATUS_DATA_LOSS:
        return -ENODATA;
    case GRPC_STATUS_ABORTED:
        return -ERANGE;
    case GRPC_STATUS_FAILED_PRECONDITION:
        return -EPROTO;
    case GRPC_STATUS_DEADLINE_EXCEEDED:
        return -ETIMEDOUT;
    case GRPC_STATUS_UNAVAILABLE:
        return -EHOSTDOWN;
    case GRPC_STATUS_UNIMPLEMENTED:
        return -ENOTSUP;
    case GRPC_STATUS_CANCELLED:
        return -ECANCELED;
    default:
        return -EIO;
    }
}

static void status_read(const struct winnow_call *call, struct winnow_status *status)
{
    char reason[8] = "";
    bool said = trailer_find(call, WINNOW_WIRE_KEY_REASON, reason, sizeof reason - 1) > 0;
    long error = strtol(reason, NULL, 10);
    *status = (struct winnow_status){.error = errno_of_code(call->code), .local = !said};
    if (status->error < 0 && error > 0 && error < 4096)
        status->error = -(int)error;
    trailer_find(call, WINNOW_WIRE_KEY_TRUNCATE_TO, &status->truncate_to, sizeof(uint64_t));

    const char *text = NULL;
    if (!said && status->error == -EHOSTDOWN)
        text = "winnowd is gone: it closed the connection. hint: run without it; sessions have to "
               "be opened again once it is back";
    else if (!said && status->error == -ETIMEDOUT)
        text = TEXT_TIMEDOUT;
    if (text)
        snprintf(status->text, sizeof status->text, "%s", text);
    else
        snprintf(status->text, sizeof status->text, "%.*s", (int)GRPC_SLICE_LENGTH(call->details),
                 (const char *)GRPC_SLICE_START_PTR(call->details));
}

static void limbo_add(struct winnow_call *call)
{
    pthread_mutex_lock(&rpc.lock);
    call->next = rpc.limbo;
    rpc.limbo = call;
    pthread_mutex_unlock(&rpc.lock);
}

void winnow_call_finish(struct winnow_call *call, int64_t deadline_ns, struct winnow_status *status)
{
    if (!call)
        return;
    bool told = status && call->pending[TAG_STATUS] && call_pluck(call, TAG_STATUS, deadline_ns);
    if (!told)
        grpc_call_cancel(call->call, NULL);
    if (told) {
        status_read(call, status);
    } else if (status) {
        *status = (struct winnow_status){.error = -ETIMEDOUT, .local = true};
        snprintf(status->text, sizeof status->text, TEXT_TIMEDOUT);
    }
    if (call_drained(call, winnow_clock_now_ns() + WINNOW_LIMBO_AFTER_NS))
        call_free(call);
    else
        limbo_add(call);
}

static void limbo_reap(void)
{
    pthread_mutex_lock(&rpc.lock);
    struct winnow_call *all = rpc.limbo;
    rpc.limbo = NULL;
    pthread_mutex_unlock(&rpc.lock);
    while (all) {
        struct winnow_call *call = all;
        all = call->next;
        if (call_drained(call, 0))
            call_free(call);
        else
            limbo_add(call);
    }
}

void winnow_rpc_tend(void)
{
    enum { N_EVENTS = 4 }; /* one a pass */
    for (int i = 0; i < N_EVENTS; i++)
        grpc_completion_queue_next(rpc.tend_queue, rpc_time(0), NULL);
    limbo_reap();
}

int winnow_channel_call(struct winnow_channel *channel, const char *method,
                        const struct iovec *parts, uint32_t n_parts, int64_t deadline_ns,
                        void **ret_data, size_t *ret_bytes, struct winnow_status *status)
{
    struct winnow_call *call;
    const void *data = NULL;
    size_t n_bytes = 0;
    void *copy = NULL;

    *status = (struct winnow_status){.error = -ENOMEM, .local = true, .text = "out of memory"};
    int rc = winnow_call_open(channel, method, deadline_ns, &call);
    if (rc < 0)
        return rc;
    rc = winnow_call_start(call, WINNOW_CALL_SEND | WINNOW_CALL_LAST | WINNOW_CALL_RECEIVE, parts,
                           n_parts);
    if (!rc)
        rc = winnow_call_wait(call, deadline_ns, &data, &n_bytes);
    if (!rc && data) {
        copy = malloc(n_bytes + 1);
        if (copy)
            memcpy(copy, data, n_bytes);
    }
    winnow_call_finish(call, deadline_ns, status);
    if (!status->error && !copy) {
        status->error = data ? -ENOMEM : -EPROTO;
        snprintf(status->text, sizeof status->text, "winnowd sent an empty answer to %s", method);
    }
    if (status->error < 0) {
        free(copy);
        return status->error;
    }
    *ret_data = copy;
    *ret_bytes = n_bytes;
    return 0;
}
