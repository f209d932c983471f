// Bulk: Append and AttendExact, on a connection of their own.
//
// A window is sent whole (keys and values, then queries) and answered in chunks of out, so the
// daemon reads the KV once for all its queries. Chunks are 256 KiB: beside larger ones a decode
// step waited twice as long (265 us, 596 at 1 MiB), and smaller ones cost more calls than they save.
#include <client/client.h>

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/random.h>

static_assert(WINNOW_WIRE_ID_BYTES == sizeof(((struct winnow_link *)0)->token), "sent whole");

/* One bulk call of a session. */
struct upload {
    struct winnow_session *session;
    struct winnow_link *link;
    struct winnow_call *call;
    int64_t deadline_ns; /* what the daemon is told */
    int64_t wait_ns;     /* until when we wait: the grace included */
};

static int upload_open(struct upload *upload, const char *method)
{
    int rc = winnow_call_open(upload->link->bulk, method, upload->wait_ns, &upload->call);
    return rc < 0 ? winnow_error_set(rc, "out of memory") : 0;
}

static int upload_send(struct upload *upload, const void *message, const struct iovec *tensor,
                       uint32_t n_tensor, uint32_t last)
{
    int rc = winnow_message_start(upload->call, WINNOW_CALL_SEND | last, message, tensor, n_tensor);
    return rc < 0 ? rc : winnow_call_wait(upload->call, upload->wait_ns, NULL, NULL);
}

/* Ends the call. `error` is what the sending or receiving met (0: nothing); the daemon's word on
 * it, if there is one, counts more. */
static int upload_end(struct upload *upload, int error)
{
    struct winnow_status status;
    if (!upload->call)
        return error;
    bool broke = error == -EPIPE || error == -ETIMEDOUT;
    winnow_call_finish(upload->call, upload->wait_ns, error && !broke ? NULL : &status);
    if (error && !broke)
        return error;
    if (!status.error && broke)
        return winnow_error_set(-EPROTO, "winnowd ended the call before its answer");
    if (status.error == -ENODATA)
        upload->session->truncate_to = status.truncate_to;
    return winnow_client_note(upload->session->client, &status);
}

static uint32_t chunk_tokens(const struct winnow_link *link, size_t token_bytes, uint32_t n_left)
{
    uint64_t n_fit = link->chunk_bytes / token_bytes;
    return n_fit < n_left ? (uint32_t)n_fit : n_left;
}

static int tokens_check(const struct winnow_session *session, uint32_t layer, uint32_t n_tokens,
                        bool complete)
{
    if (!session)
        return winnow_error_set(-EINVAL, "session is NULL");
    if (layer >= session->model.layers)
        return winnow_error_set(-EINVAL, "layer %u, the model has %u", layer,
                                session->model.layers);
    if (!n_tokens || !complete)
        return winnow_error_set(-EINVAL, n_tokens ? "a tensor is NULL" : "no tokens");
    return 0;
}

static int upload_begin(struct upload *upload, struct winnow_session *session, int64_t deadline_ns,
                        int64_t default_ns)
{
    *upload = (struct upload){.session = session, .deadline_ns = deadline_ns};
    int rc = winnow_client_begin(session->client, session->generation, &upload->deadline_ns,
                                 default_ns, &upload->link);
    if (rc < 0)
        return rc;
    upload->wait_ns = upload->deadline_ns + WINNOW_GRACE_NS;
    size_t kv_bytes = session->k_bytes + session->v_bytes;
    size_t token_bytes = kv_bytes > session->q_bytes ? kv_bytes : session->q_bytes;
    if (token_bytes <= upload->link->chunk_bytes)
        return 0;
    uint64_t chunk_bytes = upload->link->chunk_bytes;
    winnow_link_unref(upload->link);
    return winnow_error_set(-EMSGSIZE, "a token of %zu bytes exceeds winnowd's chunk_bytes %llu",
                            token_bytes, (unsigned long long)chunk_bytes);
}

static ProtobufCBinaryData upload_token(const struct upload *upload)
{
    return (ProtobufCBinaryData){WINNOW_WIRE_ID_BYTES, upload->link->token};
}

/* ---- Append ---- */

static int append_send(struct upload *upload, uint32_t layer, uint64_t first, uint32_t n_tokens,
                       const uint8_t *k, const uint8_t *v)
{
    const struct winnow_session *session = upload->session;
    uint8_t append_id[WINNOW_WIRE_ID_BYTES];
    if (getrandom(append_id, sizeof append_id, 0) != sizeof append_id)
        return winnow_error_set(-EIO, "getrandom: %s", strerror(errno));
    Winnow__V1__AppendMessage head = WINNOW__V1__APPEND_MESSAGE__INIT;
    head.token = upload_token(upload);
    head.session = session->id;
    head.layer = layer;
    head.epoch = session->epoch;
    head.append_id = (ProtobufCBinaryData){sizeof append_id, append_id};
    head.deadline_us = winnow_deadline_left_us(upload->deadline_ns);
    int rc = upload_send(upload, &head, NULL, 0, 0);

    for (uint32_t n_sent = 0, n_chunk; !rc && n_sent < n_tokens; n_sent += n_chunk) {
        n_chunk =
            chunk_tokens(upload->link, session->k_bytes + session->v_bytes, n_tokens - n_sent);
        Winnow__V1__AppendMessage chunk = WINNOW__V1__APPEND_MESSAGE__INIT;
        chunk.first_token = first + n_sent;
        chunk.n_tokens = n_chunk;
        struct iovec tensor[2] = {
            {(void *)(k + n_sent * session->k_bytes), n_chunk * session->k_bytes},
            {(void *)(v + n_sent * session->v_bytes), n_chunk * session->v_bytes},
        };
        rc = upload_send(upload, &chunk, tensor, 2,
                         n_sent + n_chunk == n_tokens ? WINNOW_CALL_LAST : 0);
    }
    return rc;
}

/* The next message into `arena`; NULL at the end of the stream. */
static int upload_receive(struct upload *upload, struct winnow_wire_arena *arena,
                          const ProtobufCMessageDescriptor *type, void **ret_message,
                          struct iovec *ret_tensor)
{
    const void *data = NULL;
    size_t n_bytes;
    *ret_message = NULL;
    int rc = winnow_call_start(upload->call, WINNOW_CALL_RECEIVE, NULL, 0);
    if (!rc)
        rc = winnow_call_wait(upload->call, upload->wait_ns, &data, &n_bytes);
    if (rc < 0 || !data)
        return rc;
    winnow_wire_arena_reset(arena);
    return winnow_message_decode(data, n_bytes, type, arena, ret_message, ret_tensor);
}

int winnow_append(winnow_session *session, uint32_t layer, uint64_t first, uint32_t n,
                  const void *k, const void *v, int64_t deadline_ns)
{
    struct upload upload;
    struct winnow_wire_arena *arena;
    int rc = tokens_check(session, layer, n, k && v);
    if (!rc)
        rc = upload_begin(&upload, session, deadline_ns, WINNOW_DEFAULT_APPEND_NS);
    if (rc < 0)
        return rc;
    rc = winnow_wire_arena_create(&arena);
    if (rc < 0) {
        winnow_link_unref(upload.link);
        return winnow_error_set(rc, "out of memory");
    }
    void *message = NULL;
    rc = upload_open(&upload, "Append");
    if (!rc)
        rc = append_send(&upload, layer, first, n, k, v);
    if (!rc)
        rc = upload_receive(&upload, arena, &winnow__v1__append_reply__descriptor, &message, NULL);
    uint64_t n_held = message ? ((const Winnow__V1__AppendReply *)message)->tokens_held : 0;
    rc = upload_end(&upload, !rc && !message ? -EPIPE : rc);
    if (!rc)
        session->held[layer] = n_held;
    winnow_wire_arena_destroy(arena);
    winnow_link_unref(upload.link);
    return rc;
}

/* ---- AttendExact ---- */

/* A window of one layer: what is sent, and where the answer goes. */
struct window {
    uint32_t layer, n_tokens;
    uint64_t first;
    const uint8_t *q, *k, *v;
    uint8_t *out;
    uint8_t *lse; /* NULL: not wanted */
    winnow_certificate *certificate;
};

static int window_send_head(struct upload *upload, const struct window *window)
{
    Winnow__V1__AttendExactMessage head = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    head.token = upload_token(upload);
    head.session = upload->session->id;
    head.layer = window->layer;
    head.epoch = upload->session->epoch;
    head.first_token = window->first;
    head.n_tokens = window->n_tokens;
    head.want_lse = window->lse != NULL;
    head.deadline_us = winnow_deadline_left_us(upload->deadline_ns);
    return upload_send(upload, &head, NULL, 0, 0);
}

static int window_send_kv(struct upload *upload, const struct window *window)
{
    const struct winnow_session *session = upload->session;
    int rc = 0;
    for (uint32_t n_sent = 0, n_chunk; !rc && n_sent < window->n_tokens; n_sent += n_chunk) {
        n_chunk = chunk_tokens(upload->link, session->k_bytes + session->v_bytes,
                               window->n_tokens - n_sent);
        Winnow__V1__AttendExactMessage chunk = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
        chunk.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV;
        chunk.n_chunk = n_chunk;
        struct iovec tensor[2] = {
            {(void *)(window->k + n_sent * session->k_bytes), n_chunk * session->k_bytes},
            {(void *)(window->v + n_sent * session->v_bytes), n_chunk * session->v_bytes},
        };
        rc = upload_send(upload, &chunk, tensor, 2, 0);
    }
    return rc;
}

static int window_send_q(struct upload *upload, const struct window *window)
{
    size_t q_bytes = upload->session->q_bytes;
    int rc = 0;
    for (uint32_t n_sent = 0, n_chunk; !rc && n_sent < window->n_tokens; n_sent += n_chunk) {
        n_chunk = chunk_tokens(upload->link, q_bytes, window->n_tokens - n_sent);
        Winnow__V1__AttendExactMessage chunk = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
        chunk.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q;
        chunk.n_chunk = n_chunk;
        struct iovec tensor = {(void *)(window->q + n_sent * q_bytes), n_chunk * q_bytes};
        rc = upload_send(upload, &chunk, &tensor, 1,
                         n_sent + n_chunk == window->n_tokens ? WINNOW_CALL_LAST : 0);
    }
    return rc;
}

/* Takes one chunk of the answer; *n_done tokens came before. */
static int window_take(const struct upload *upload, const struct window *window,
                       const Winnow__V1__AttendExactReply *reply, const struct iovec *tensor,
                       uint32_t *n_done)
{
    struct winnow_session *session = upload->session;
    size_t lse_bytes = window->lse ? session->lse_bytes : 0;
    if (reply->n_chunk > window->n_tokens - *n_done ||
        tensor->iov_len != reply->n_chunk * (session->out_bytes + lse_bytes))
        return winnow_error_set(-EPROTO, "answer of winnowd: %u tokens in %zu bytes, %u expected",
                                reply->n_chunk, tensor->iov_len, window->n_tokens - *n_done);
    size_t out_bytes = reply->n_chunk * session->out_bytes;
    if (out_bytes)
        memcpy(window->out + *n_done * session->out_bytes, tensor->iov_base, out_bytes);
    if (out_bytes && window->lse)
        memcpy(window->lse + *n_done * lse_bytes, (uint8_t *)tensor->iov_base + out_bytes,
               reply->n_chunk * lse_bytes);
    *n_done += reply->n_chunk;
    if (reply->certificate) {
        winnow_certificate one;
        winnow_certificate_decode(reply->certificate, &one);
        winnow_certificate_add(window->certificate, &one);
    }
    return 0;
}

static int window_receive(struct upload *upload, const struct window *window)
{
    struct winnow_wire_arena *arena;
    int rc = winnow_wire_arena_create(&arena);
    if (rc < 0)
        return winnow_error_set(rc, "out of memory");
    uint32_t n_done = 0;
    for (;;) {
        void *message;
        struct iovec tensor;
        rc = upload_receive(upload, arena, &winnow__v1__attend_exact_reply__descriptor, &message,
                            &tensor);
        if (rc < 0 || !message)
            break;
        rc = window_take(upload, window, message, &tensor, &n_done);
        if (rc < 0)
            break;
    }
    winnow_wire_arena_destroy(arena);
    return !rc && n_done < window->n_tokens ? -EPIPE : rc;
}

static int window_run(struct upload *upload, const struct window *window)
{
    int rc = upload_open(upload, "AttendExact");
    if (rc < 0)
        return rc;
    rc = window_send_head(upload, window);
    if (!rc)
        rc = window_send_kv(upload, window);
    if (!rc)
        rc = window_send_q(upload, window);
    if (!rc)
        rc = window_receive(upload, window);
    rc = upload_end(upload, rc);
    if (!rc)
        upload->session->held[window->layer] = window->first + window->n_tokens;
    return rc;
}

/* Tokens that one window may have: their q, k, v, out and lse are in the daemon's memory at once,
 * each of the five padded there. */
static uint32_t window_tokens(const struct upload *upload)
{
    const struct winnow_session *session = upload->session;
    size_t token_bytes = session->q_bytes + session->out_bytes + session->k_bytes +
                         session->v_bytes + session->lse_bytes;
    enum { PADDING_BYTES = 5 * 64 };
    static_assert((int)PADDING_BYTES < (int)WINNOW_LIMIT_BYTES_MIN, "window_bytes is larger");
    uint64_t n_tokens = (upload->link->window_bytes - PADDING_BYTES) / token_bytes;
    if (n_tokens > upload->link->window_tokens)
        n_tokens = upload->link->window_tokens;
    return n_tokens ? (uint32_t)n_tokens : 1;
}

int winnow_attend_exact(winnow_session *session, uint32_t layer, uint64_t first, uint32_t n,
                        const void *q, const void *k, const void *v, void *out, float *lse,
                        winnow_certificate *certificate, int64_t deadline_ns)
{
    struct upload upload;
    winnow_certificate sum = {0};
    int rc = tokens_check(session, layer, n, q && k && v && out);
    if (!rc)
        rc = upload_begin(&upload, session, deadline_ns, WINNOW_DEFAULT_EXACT_NS);
    if (rc < 0)
        return rc;
    uint32_t n_window_max = window_tokens(&upload), n_windows = 0;
    for (uint32_t n_done = 0, n_window; !rc && n_done < n; n_done += n_window, n_windows++) {
        n_window = n - n_done < n_window_max ? n - n_done : n_window_max;
        rc = window_run(&upload,
                        &(struct window){
                            .layer = layer,
                            .n_tokens = n_window,
                            .first = first + n_done,
                            .q = (const uint8_t *)q + n_done * session->q_bytes,
                            .k = (const uint8_t *)k + n_done * session->k_bytes,
                            .v = (const uint8_t *)v + n_done * session->v_bytes,
                            .out = (uint8_t *)out + n_done * session->out_bytes,
                            .lse = lse ? (uint8_t *)lse + n_done * session->lse_bytes : NULL,
                            .certificate = &sum,
                        });
    }
    winnow_link_unref(upload.link);
    if (!rc && certificate) {
        sum.mass_mean /= (float)n_windows;
        *certificate = sum;
    }
    return rc;
}
