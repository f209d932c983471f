// A link is opened by asking, not by trusting a file to exist: every candidate path is connected,
// and the first that answers is taken. The boot ids of the Info answer and of the lease must agree:
// the three connections might otherwise meet two lives of the daemon.
#include <client/client.h>

#include <assert.h>
#include <client/error.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>
#include <winnow/winnow.h>

#define LEASE_POLL_NS (10 * WINNOW_NS_PER_MS)

/* ---- messages ---- */

enum { N_TENSOR_PARTS_MAX = 3 * WINNOW_WIRE_N_ITEMS_MAX, HEAD_BYTES_MAX = 32 << 10 };

static_assert((int)HEAD_BYTES_MAX <= (int)WINNOW_WIRE_REST_BYTES_MAX,
              "the daemon decodes what we encode");
static_assert(HEAD_BYTES_MAX + WINNOW_WIRE_ATTEND_BYTES_MAX <= WINNOW_WIRE_MESSAGE_BYTES_MAX,
              "a full part of a step passes gRPC's limit");
static_assert(HEAD_BYTES_MAX + WINNOW_WIRE_CHUNK_BYTES_MAX <= WINNOW_WIRE_MESSAGE_BYTES_MAX,
              "a full chunk passes gRPC's limit");
static_assert((int)WINNOW_LIMIT_BYTES_MIN <= (int)WINNOW_WIRE_ATTEND_BYTES_MAX,
              "some limit is allowed");
static_assert((int)WINNOW_LIMIT_BYTES_MIN <= (int)WINNOW_WIRE_CHUNK_BYTES_MAX,
              "some limit is allowed");
static_assert(sizeof(((struct winnow_link *)0)->path) ==
                  sizeof(((struct sockaddr_un *)0)->sun_path),
              "a path that connects is kept whole");
static_assert(sizeof(((struct winnow_wire_message *)0)->text) + sizeof "answer of winnowd: " <=
                  WINNOW_STATUS_TEXT_BYTES,
              "why an answer was refused is told whole");

int winnow_message_decode(const void *data, size_t n_bytes, const ProtobufCMessageDescriptor *type,
                          struct winnow_wire_arena *arena, void **ret_message,
                          struct iovec *ret_tensor)
{
    struct winnow_wire_slice slice = {data, n_bytes};
    struct winnow_wire_input input = {
        .slice = &slice, .n_slices = 1, .tensor_bytes_max = WINNOW_WIRE_MESSAGE_BYTES_MAX};
    struct winnow_wire_message message;
    int rc = winnow_wire_decode(arena, type, &input, &message);
    if (rc < 0)
        return winnow_error_set(rc == -ENOMEM ? rc : -EPROTO, "answer of winnowd: %s",
                                message.text);
    *ret_message = message.message;
    if (ret_tensor)
        *ret_tensor =
            (struct iovec){(uint8_t *)data + message.tensor.offset_bytes, message.tensor.n_bytes};
    return 0;
}

int winnow_message_start(struct winnow_call *call, uint32_t what, const void *message,
                         const struct iovec *tensor, uint32_t n_tensor)
{
    uint8_t head[HEAD_BYTES_MAX];
    struct iovec parts[1 + N_TENSOR_PARTS_MAX];
    size_t tensor_bytes = 0;
    for (uint32_t i = 0; i < n_tensor; i++)
        tensor_bytes += tensor[i].iov_len;
    if (n_tensor > N_TENSOR_PARTS_MAX ||
        winnow_wire_head_bytes(message, tensor_bytes) > sizeof head)
        return -EMSGSIZE;
    parts[0] = (struct iovec){head, winnow_wire_head(message, tensor_bytes, head)};
    if (n_tensor)
        memcpy(parts + 1, tensor, n_tensor * sizeof *tensor);
    return winnow_call_start(call, what, parts, 1 + n_tensor);
}

static int channel_call(struct winnow_channel *channel, const char *method, const void *request,
                        const ProtobufCMessageDescriptor *type, struct winnow_wire_arena *arena,
                        int64_t deadline_ns, void **ret_reply, struct winnow_status *status)
{
    uint8_t head[HEAD_BYTES_MAX];
    void *data = NULL;
    size_t n_bytes = 0;

    *status = (struct winnow_status){.error = -EMSGSIZE, .local = true, .text = "request too long"};
    if (winnow_wire_head_bytes(request, 0) > sizeof head)
        return winnow_error_set_status(status);
    struct iovec part = {head, winnow_wire_head(request, 0, head)};
    if (winnow_channel_call(channel, method, &part, 1, deadline_ns, &data, &n_bytes, status) < 0)
        return winnow_error_set_status(status);
    status->error = winnow_message_decode(data, n_bytes, type, arena, ret_reply, NULL);
    if (status->error < 0)
        snprintf(status->text, sizeof status->text, "%s", winnow_error_text());
    free(data);
    return status->error;
}

int winnow_link_call(struct winnow_link *link, const char *method, const void *request,
                     const ProtobufCMessageDescriptor *type, struct winnow_wire_arena *arena,
                     int64_t deadline_ns, void **ret_reply, struct winnow_status *status)
{
    return channel_call(link->control, method, request, type, arena, deadline_ns, ret_reply,
                        status);
}

/* ---- life ---- */

struct winnow_link *winnow_link_ref(struct winnow_link *link)
{
    atomic_fetch_add(&link->n_refs, 1);
    return link;
}

static void link_destroy(struct winnow_link *link)
{
    winnow_step_destroy_all(link->idle);
    winnow_call_finish(link->lease_call, 0, NULL);
    winnow_channel_close(link->lease);
    winnow_channel_close(link->bulk);
    winnow_channel_close(link->control);
    free(link);
}

void winnow_link_unref(struct winnow_link *link)
{
    if (link && atomic_fetch_sub(&link->n_refs, 1) == 1)
        link_destroy(link);
}

static void link_take_limits(struct winnow_link *link, const Winnow__V1__InfoReply *info)
{
    const struct {
        const char *name;
        uint64_t *value, least;
    } known[] = {{"attend_bytes", &link->attend_bytes, WINNOW_LIMIT_BYTES_MIN},
                 {"chunk_bytes", &link->chunk_bytes, WINNOW_LIMIT_BYTES_MIN},
                 {"window_bytes", &link->window_bytes, WINNOW_LIMIT_BYTES_MIN},
                 {"window_tokens", &link->window_tokens, 1}};
    for (size_t i = 0; i < info->n_limits; i++)
        for (size_t j = 0; j < sizeof known / sizeof *known; j++)
            if (!strcmp(info->limits[i]->name, known[j].name) &&
                info->limits[i]->value >= known[j].least &&
                info->limits[i]->value < *known[j].value)
                *known[j].value = info->limits[i]->value;
}

static int link_ask_info(struct winnow_link *link, struct winnow_wire_arena *arena,
                         int64_t deadline_ns)
{
    Winnow__V1__InfoRequest request = WINNOW__V1__INFO_REQUEST__INIT;
    request.client = (char *)"libwinnow " WINNOW_VERSION;
    request.proto_min = request.proto_max = WINNOW_WIRE_PROTO;
    struct winnow_status status;
    void *reply;
    int rc = winnow_link_call(link, "Info", &request, &winnow__v1__info_reply__descriptor, arena,
                              deadline_ns, &reply, &status);
    if (rc < 0)
        return rc;
    const Winnow__V1__InfoReply *info = reply;
    if (info->proto != WINNOW_WIRE_PROTO || info->boot_id.len != sizeof link->boot_id)
        return winnow_error_set(-EPROTO,
                                "winnowd %s speaks protocol %u, this libwinnow %d. hint: install "
                                "the same version of both",
                                info->build, info->proto, WINNOW_WIRE_PROTO);
    memcpy(link->boot_id, info->boot_id.data, sizeof link->boot_id);
    snprintf(link->build, sizeof link->build, "%s", info->build);
    link->proto = info->proto;
    link_take_limits(link, info);
    return 0;
}

int winnow_link_ping(struct winnow_link *link, int64_t deadline_ns)
{
    Winnow__V1__InfoRequest request = WINNOW__V1__INFO_REQUEST__INIT;
    request.proto_min = request.proto_max = WINNOW_WIRE_PROTO;
    struct winnow_wire_arena *arena;
    struct winnow_status status;
    void *reply;
    if (winnow_wire_arena_create(&arena) < 0)
        return -ENOMEM;
    int rc = winnow_link_call(link, "Info", &request, &winnow__v1__info_reply__descriptor, arena,
                              deadline_ns, &reply, &status);
    winnow_wire_arena_destroy(arena);
    return rc;
}

/* The status of a lease that never began. */
static int lease_refused(struct winnow_link *link, int64_t deadline_ns)
{
    struct winnow_status status;
    winnow_call_finish(link->lease_call, deadline_ns, &status);
    link->lease_call = NULL;
    if (!status.error)
        return winnow_error_set(-EPROTO, "winnowd ended the lease before it began");
    return winnow_error_set_status(&status);
}

static int link_take_lease(struct winnow_link *link, struct winnow_wire_arena *arena,
                           int64_t deadline_ns)
{
    Winnow__V1__LeaseBeat beat = WINNOW__V1__LEASE_BEAT__INIT;
    beat.beat = 1;
    int rc = winnow_call_open(link->lease, "Lease", WINNOW_NEVER_NS, &link->lease_call);
    if (rc < 0)
        return winnow_error_set(rc, "out of memory");
    rc = winnow_message_start(link->lease_call, WINNOW_CALL_SEND | WINNOW_CALL_RECEIVE, &beat, NULL,
                              0);
    const void *data = NULL;
    size_t n_bytes;
    if (!rc)
        rc = winnow_call_wait(link->lease_call, deadline_ns, &data, &n_bytes);
    if (rc < 0 || !data)
        return lease_refused(link, deadline_ns);

    void *message;
    rc = winnow_message_decode(data, n_bytes, &winnow__v1__lease_event__descriptor, arena, &message,
                               NULL);
    if (rc < 0)
        return rc;
    const Winnow__V1__LeaseEvent *event = message;
    if (event->token.len != sizeof link->token || event->boot_id.len != sizeof link->boot_id)
        return winnow_error_set(-EPROTO, "winnowd granted a lease without a token");
    if (memcmp(event->boot_id.data, link->boot_id, sizeof link->boot_id))
        return winnow_error_set(-EHOSTDOWN, "winnowd was restarted just now. hint: try again");
    memcpy(link->token, event->token.data, sizeof link->token);
    rc = winnow_call_start(link->lease_call, WINNOW_CALL_RECEIVE, NULL, 0);
    return rc < 0 ? lease_refused(link, deadline_ns) : 0;
}

int winnow_link_read_lease(struct winnow_link *link)
{
    const void *data;
    size_t n_bytes;
    int rc =
        winnow_call_wait(link->lease_call, winnow_clock_now_ns() + LEASE_POLL_NS, &data, &n_bytes);
    if (rc == -ETIMEDOUT)
        return 0;
    /* Beats, and news that the calls concerned say themselves (draining, a session lost). */
    if (rc < 0 || !data || winnow_call_start(link->lease_call, WINNOW_CALL_RECEIVE, NULL, 0) < 0)
        return -EHOSTDOWN;
    return 0;
}

static int link_connect(struct winnow_link *link, const char *path, bool with_lease,
                        int64_t deadline_ns)
{
    int rc = winnow_channel_open(path, deadline_ns, &link->control);
    if (!rc && with_lease)
        rc = winnow_channel_open(path, deadline_ns, &link->bulk);
    if (!rc && with_lease)
        rc = winnow_channel_open(path, deadline_ns, &link->lease);
    switch (rc) {
    case 0:
        return 0;
    case -ENOENT:
    case -ECONNREFUSED:
        return winnow_error_set(-EHOSTDOWN,
                                "could not reach winnowd: %s %s. hint: start winnowd, or set "
                                "WINNOW_ADDRESS to its socket",
                                rc == -ENOENT ? "no socket at" : "nobody listens at", path);
    case -EACCES:
    case -EPERM:
        return winnow_error_set(-EACCES,
                                "uid %u may not open %s. hint: ask the operator (allow_uids), or "
                                "start your own winnowd",
                                (unsigned)geteuid(), path);
    case -ETIMEDOUT:
        return winnow_error_set(-EHOSTDOWN, "winnowd at %s accepts no connection", path);
    case -ECHILD:
        return winnow_error_set(rc, "this process was forked from one that used winnow. hint: "
                                    "fork before the first winnow_client_open, or exec");
    case -ENAMETOOLONG:
        return winnow_error_set(-EINVAL, "socket path of %zu bytes exceeds %zu", strlen(path),
                                sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
    default:
        return winnow_error_set(rc, "could not connect to %s: %s", path, strerror(-rc));
    }
}

/* The daemon hung up before it said a word. On another user's that is what allow_uids looks like:
 * foreign uids do not get as far as an answer. */
static int link_denied(const struct winnow_link *link)
{
    int uid = winnow_channel_peer_uid(link->control);
    if (uid < 0 || (uid_t)uid == geteuid())
        return -EHOSTDOWN;
    return winnow_error_set(-EACCES,
                            "winnowd of uid %d hung up on uid %u. hint: ask its operator "
                            "(allow_uids), or start your own",
                            uid, (unsigned)geteuid());
}

static int link_open_path(const char *path, bool with_lease, int64_t deadline_ns,
                          struct winnow_link **ret_link)
{
    struct winnow_wire_arena *arena;
    struct winnow_link *link = calloc(1, sizeof *link);
    int rc = link ? winnow_wire_arena_create(&arena) : -ENOMEM;
    if (rc < 0) {
        free(link);
        return winnow_error_set(-ENOMEM, "out of memory");
    }
    link->n_refs = 1;
    snprintf(link->path, sizeof link->path, "%s", path);
    link->attend_bytes = WINNOW_WIRE_ATTEND_BYTES_MAX;
    link->chunk_bytes = WINNOW_WIRE_CHUNK_BYTES_MAX;
    link->window_bytes = 64 << 20;
    link->window_tokens = UINT32_MAX;

    rc = link_connect(link, path, with_lease, deadline_ns);
    if (!rc)
        rc = link_ask_info(link, arena, deadline_ns);
    if (rc == -EHOSTDOWN && link->control)
        rc = link_denied(link);
    winnow_wire_arena_reset(arena);
    if (!rc && with_lease)
        rc = link_take_lease(link, arena, deadline_ns);
    winnow_wire_arena_destroy(arena);
    if (rc < 0) {
        winnow_link_unref(link);
        return rc;
    }
    *ret_link = link;
    return 0;
}

int winnow_link_open(const char *address, bool with_lease, int64_t deadline_ns,
                     struct winnow_link **ret_link)
{
    char user_path[256] = "";
    const char *runtime_dir = getenv("XDG_RUNTIME_DIR");
    const char *path = address ? address : getenv("WINNOW_ADDRESS");
    if (path && *path) {
        if (!strncmp(path, "unix:", 5))
            path += 5;
        return link_open_path(path, with_lease, deadline_ns, ret_link);
    }
    int rc = -EHOSTDOWN;
    if (runtime_dir && *runtime_dir) {
        snprintf(user_path, sizeof user_path, "%s/winnow/winnow.sock", runtime_dir);
        rc = link_open_path(user_path, with_lease, deadline_ns, ret_link);
    }
    if (rc == -EHOSTDOWN)
        rc = link_open_path("/run/winnow/winnow.sock", with_lease, deadline_ns, ret_link);
    return rc;
}
