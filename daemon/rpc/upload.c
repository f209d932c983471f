// Append and AttendExact: bulk data in chunks, in memory reserved before the first of them.
//
// A stream's first message says where and how much. The next message is asked for only once there
// is in-flight memory for it: an unasked one stays with the sender (HTTP/2 flow control), so memory
// is flat whatever clients send. Every chunk is copied once, from gRPC's slices to its place.
//
//   Append       each chunk is one request in the core; the next is asked for when it is done
//   AttendExact  chunks fill the window's k, v, q; whole, it is one request; out leaves in chunks.
//                A broken stream therefore applies nothing. Another window may follow on the stream
#include <assert.h>
#include <base/assert.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <grpc/byte_buffer.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Bytes of one token's tensors on the wire. */
struct token_bytes {
    uint64_t q, k, v, out, lse;
};

static struct token_bytes token_bytes_of(const struct winnow_model_shape *shape)
{
    winnow_assert(shape->io_dtype >= WINNOW_BF16);
    winnow_assert(shape->io_dtype <= WINNOW_FP32);
    uint64_t element_bytes = shape->io_dtype == WINNOW_FP32 ? 4 : 2;
    return (struct token_bytes){
        .q = (uint64_t)shape->n_q_heads * shape->k_width * element_bytes,
        .k = (uint64_t)shape->n_kv_heads * shape->k_width * element_bytes,
        .v = (uint64_t)shape->n_kv_heads * shape->v_width * element_bytes,
        .out = (uint64_t)shape->n_q_heads * shape->v_width * element_bytes,
        .lse = (uint64_t)shape->n_q_heads * sizeof(float),
    };
}

static int64_t stall_time(void)
{
    return winnow_clock_now_ns() + WINNOW_STALL_S * WINNOW_NS_PER_S;
}

/* Asks for the next message; one that does not come in time ends the stream. */
static void receive(struct winnow_rpc_call *call)
{
    winnow_assert(call->upload.has_header);
    winnow_assert(call->range);
    int64_t stall_ns = stall_time();
    int64_t deadline_ns = call->own.request.deadline_ns;
    winnow_rpc_call_set_timer(call, stall_ns < deadline_ns ? stall_ns : deadline_ns);
    winnow_rpc_call_receive(call);
}

static void timeout(struct winnow_rpc_call *call)
{
    struct winnow_rpc_upload *upload = &call->upload;
    if (upload->n_sent)
        winnow_rpc_call_fail(call, -ETIMEDOUT, "layer %u: out was not read for %d s", upload->layer,
                             WINNOW_STALL_S);
    else if (call->range_bytes && !call->range)
        winnow_rpc_call_fail(call, -EDQUOT,
                             "%" PRIu64 " bytes in flight were not free in time, limit %" PRIu64
                             ". hint: host_pool, or smaller windows",
                             call->range_bytes, call->rpc->limits->in_flight_bytes);
    else
        winnow_rpc_call_fail(call, -ETIMEDOUT,
                             "layer %u: the deadline passed or the stream stalled after %u tokens",
                             upload->layer, upload->is_exact ? upload->n_kv : upload->n_tokens);
}

static void end(struct winnow_rpc_call *call)
{
    if (call->own.is_busy)
        winnow_core_cancel(call->rpc->core, &call->own.request);
}

/* Begins the call's request of `kind`; its deadline is the stream's. */
static void set_request(struct winnow_rpc_call *call, uint32_t kind, int64_t deadline_ns)
{
    winnow_assert(!call->own.is_busy);
    winnow_assert(call->lease_id);
    struct winnow_request *request = &call->own.request;
    memset(request, 0, sizeof *request);
    request->kind = kind;
    request->owner = call->lease_id;
    request->session_id = call->upload.session_id;
    request->epoch = call->upload.epoch;
    request->deadline_ns = deadline_ns;
    call->own.call = call;
}

static bool check_chunk(struct winnow_rpc_call *call, uint32_t n_tokens, uint64_t n_bytes,
                        uint64_t n_wanted)
{
    if (n_tokens && n_bytes == n_wanted)
        return true;
    winnow_rpc_call_fail(call, -EINVAL,
                         "a chunk of %u tokens has %" PRIu64 " bytes of data, needs %" PRIu64,
                         n_tokens, n_bytes, n_wanted);
    return false;
}

/* --- Append --- */

static void append_header(struct winnow_rpc_call *call, const Winnow__V1__AppendMessage *header)
{
    struct winnow_registry_session *session =
        winnow_rpc_session(call, &header->token, header->session);
    struct winnow_rpc_upload *upload = &call->upload;
    if (!session)
        return;
    if (header->layer >= session->model->shape.n_layers || header->n_tokens) {
        winnow_rpc_call_fail(call, -EINVAL, "layer %u of %u, and no tokens in the first message",
                             header->layer, session->model->shape.n_layers);
        return;
    }
    upload->has_header = true;
    upload->shape = session->model->shape;
    upload->session_id = session->id;
    upload->layer = header->layer;
    upload->epoch = header->epoch;
    upload->n_held = UINT64_MAX;
    if (header->append_id.len == 16) {
        memcpy(upload->append_id, header->append_id.data, 16);
        upload->is_repeat = session->append_layer == header->layer &&
                            !memcmp(session->append_id, upload->append_id, 16);
        memcpy(session->append_id, upload->append_id, 16);
        session->append_layer = header->layer;
    }
    set_request(call, WINNOW_REQUEST_APPEND,
                winnow_rpc_call_deadline(call, header->deadline_us,
                                         WINNOW_EXACT_DEFAULT_S * WINNOW_NS_PER_S));
    winnow_rpc_call_set_timer(call, call->own.request.deadline_ns);
    winnow_rpc_reserve(call, WINNOW_WIRE_CHUNK_BYTES_MAX);
}

static void append_submit(struct winnow_rpc_call *call, uint64_t first, uint32_t n_tokens)
{
    winnow_assert(n_tokens);
    winnow_assert(call->upload.k >= call->range);
    winnow_assert(call->upload.v >= call->upload.k);
    struct winnow_rpc_upload *upload = &call->upload;
    set_request(call, WINNOW_REQUEST_APPEND, call->own.request.deadline_ns);
    struct winnow_request *request = &call->own.request;
    request->append.layer = upload->layer;
    request->append.first = first;
    request->append.n_tokens = n_tokens;
    request->append.k = upload->k;
    request->append.v = upload->v;
    winnow_rpc_submit(&call->own);
}

static void append_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__AppendMessage *chunk = message->message;
    struct winnow_rpc_upload *upload = &call->upload;
    call->timer_ns = WINNOW_NEVER_NS;
    if (!upload->has_header) {
        append_header(call, chunk);
        return;
    }
    struct token_bytes bytes = token_bytes_of(&upload->shape);
    uint64_t n_k = chunk->n_tokens * bytes.k, n_v = chunk->n_tokens * bytes.v;
    if (!check_chunk(call, chunk->n_tokens, message->tensor.n_bytes, n_k + n_v))
        return;
    winnow_assert(call->range);
    winnow_assert(n_k + n_v <= call->range_bytes);
    upload->k = call->range;
    upload->v = call->range + n_k;
    winnow_wire_tensor_copy(&message->tensor, 0, call->range, n_k + n_v);
    append_submit(call, chunk->first_token, chunk->n_tokens);
}

static void append_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    struct winnow_request *request = &item->request;
    struct winnow_rpc_upload *upload = &call->upload;
    winnow_assert(request->kind == WINNOW_REQUEST_APPEND);
    if (!call->is_open)
        return;
    uint64_t first = request->append.first, n_held = request->n_held;
    uint32_t n_tokens = request->append.n_tokens;
    bool is_below = request->status == -EINVAL && upload->is_repeat && n_held > first;
    if (is_below && n_held < first + n_tokens) { /* the broken stream got this far */
        struct token_bytes bytes = token_bytes_of(&upload->shape);
        uint32_t n_skip = (uint32_t)(n_held - first);
        winnow_assert(n_skip < n_tokens);
        upload->k += n_skip * bytes.k;
        upload->v += n_skip * bytes.v;
        append_submit(call, n_held, n_tokens - n_skip);
        return;
    }
    if (request->status < 0 && !is_below) {
        winnow_rpc_call_fail_request(call, request);
        return;
    }
    upload->n_held = n_held;
    upload->n_tokens += n_tokens;
    receive(call);
}

static void append_half_close(struct winnow_rpc_call *call)
{
    Winnow__V1__AppendReply reply = WINNOW__V1__APPEND_REPLY__INIT;
    if (call->upload.n_held == UINT64_MAX || !call->upload.has_header) {
        winnow_rpc_call_fail(call, -EINVAL, "the stream ended before its first chunk");
        return;
    }
    reply.tokens_held = call->upload.n_held;
    winnow_rpc_call_answer(call, &reply);
}

const struct winnow_rpc_method winnow_rpc_append = {
    .path = "/winnow.v1.Winnow/Append",
    .request = &winnow__v1__append_message__descriptor,
    .tensor_bytes_max = WINNOW_WIRE_CHUNK_BYTES_MAX,
    .is_stream = true,
    .message = append_message,
    .half_close = append_half_close,
    .done = append_done,
    .reserved = receive,
    .timeout = timeout,
    .end = end,
};

/* --- AttendExact --- */

static_assert(WINNOW_WIRE_CHUNK_BYTES_MAX % 64 == 0, "a chunk is a whole number of paddings");

static uint64_t pad(uint64_t n_bytes)
{
    return (n_bytes + 63) & ~UINT64_C(63);
}

static void exact_header(struct winnow_rpc_call *call, const Winnow__V1__AttendExactMessage *header)
{
    struct winnow_registry_session *session =
        winnow_rpc_session(call, &header->token, header->session);
    struct winnow_rpc_upload *upload = &call->upload;
    if (!session)
        return;
    const struct winnow_model_shape *shape = &session->model->shape;
    if (header->layer >= shape->n_layers || !header->n_tokens ||
        header->n_tokens > call->rpc->limits->window_tokens) {
        winnow_rpc_call_fail(call, -EINVAL, "a window of %u tokens (limit %u) in layer %u of %u",
                             header->n_tokens, call->rpc->limits->window_tokens, header->layer,
                             shape->n_layers);
        return;
    }
    struct token_bytes bytes = token_bytes_of(shape);
    uint64_t n = header->n_tokens;
    uint64_t n_bytes = pad(n * bytes.q) + pad(n * bytes.k) + pad(n * bytes.v) + pad(n * bytes.out) +
                       pad(n * bytes.lse);
    uint64_t n_max = call->rpc->limits->window_bytes;
    if (n_bytes > n_max) {
        winnow_rpc_call_fail(call, -EMSGSIZE,
                             "a window of %u tokens needs %" PRIu64 " bytes, limit %" PRIu64
                             ". hint: %" PRIu64 " tokens fit",
                             header->n_tokens, n_bytes, n_max, n_max / (n_bytes / n + 1));
        return;
    }
    *upload = (struct winnow_rpc_upload){
        .has_header = true,
        .is_exact = true,
        .want_lse = header->want_lse,
        .session_id = session->id,
        .first = header->first_token,
        .layer = header->layer,
        .epoch = header->epoch,
        .n_tokens = header->n_tokens,
        .shape = *shape,
    };
    set_request(call, WINNOW_REQUEST_EXACT,
                winnow_rpc_call_deadline(call, header->deadline_us,
                                         WINNOW_EXACT_DEFAULT_S * WINNOW_NS_PER_S));
    winnow_rpc_call_set_timer(call, call->own.request.deadline_ns);
    winnow_rpc_reserve(call, n_bytes);
}

static void exact_reserved(struct winnow_rpc_call *call)
{
    winnow_assert(call->range);
    winnow_assert(call->upload.is_exact);
    winnow_assert(!call->upload.n_kv);
    struct winnow_rpc_upload *upload = &call->upload;
    struct token_bytes bytes = token_bytes_of(&upload->shape);
    uint64_t n = upload->n_tokens;
    upload->q = call->range;
    upload->k = upload->q + pad(n * bytes.q);
    upload->v = upload->k + pad(n * bytes.k);
    upload->out = upload->v + pad(n * bytes.v);
    upload->lse = (float *)(void *)(upload->out + pad(n * bytes.out));
    winnow_assert((uint8_t *)upload->lse + pad(n * bytes.lse) == call->range + call->range_bytes);
    receive(call);
}

static void exact_submit(struct winnow_rpc_call *call)
{
    struct winnow_rpc_upload *upload = &call->upload;
    winnow_assert(upload->n_kv == upload->n_tokens);
    winnow_assert(upload->n_q == upload->n_tokens);
    set_request(call, WINNOW_REQUEST_EXACT, call->own.request.deadline_ns);
    struct winnow_request *request = &call->own.request;
    request->exact.layer = upload->layer;
    request->exact.first = upload->first;
    request->exact.n_tokens = upload->n_tokens;
    request->exact.q = upload->q;
    request->exact.k = upload->k;
    request->exact.v = upload->v;
    request->exact.out = upload->out;
    request->exact.lse = upload->want_lse ? upload->lse : NULL;
    winnow_rpc_submit(&call->own);
}

/* Copies a chunk to its place; false: the call has failed. */
static bool exact_chunk(struct winnow_rpc_call *call, const Winnow__V1__AttendExactMessage *chunk,
                        const struct winnow_wire_tensor *tensor)
{
    struct winnow_rpc_upload *upload = &call->upload;
    struct token_bytes bytes = token_bytes_of(&upload->shape);
    bool is_kv = chunk->part == WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV;
    bool is_q = chunk->part == WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q;
    uint32_t *n_got = is_kv ? &upload->n_kv : &upload->n_q;
    winnow_assert(*n_got <= upload->n_tokens);
    uint64_t n_k = chunk->n_chunk * bytes.k, n_v = chunk->n_chunk * bytes.v;
    if ((!is_kv && !is_q) || chunk->n_chunk > upload->n_tokens - *n_got) {
        winnow_rpc_call_fail(call, -EINVAL,
                             "part %u of %u tokens: the window has %u, %u of them came",
                             (unsigned)chunk->part, chunk->n_chunk, upload->n_tokens, *n_got);
        return false;
    }
    if (!check_chunk(call, chunk->n_chunk, tensor->n_bytes,
                     is_kv ? n_k + n_v : chunk->n_chunk * bytes.q))
        return false;
    if (is_kv) {
        winnow_wire_tensor_copy(tensor, 0, upload->k + upload->n_kv * bytes.k, n_k);
        winnow_wire_tensor_copy(tensor, n_k, upload->v + upload->n_kv * bytes.v, n_v);
    } else {
        winnow_wire_tensor_copy(tensor, 0, upload->q + upload->n_q * bytes.q, tensor->n_bytes);
    }
    *n_got += chunk->n_chunk;
    winnow_assert(*n_got <= upload->n_tokens);
    return true;
}

static void exact_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    struct winnow_rpc_upload *upload = &call->upload;
    call->timer_ns = WINNOW_NEVER_NS;
    if (!upload->has_header) {
        exact_header(call, message->message);
        return;
    }
    if (!exact_chunk(call, message->message, &message->tensor))
        return;
    if (upload->n_kv == upload->n_tokens && upload->n_q == upload->n_tokens)
        exact_submit(call);
    else
        receive(call);
}

/* Sends the next chunk of out and lse; the last one says how it went and asks for a new window. */
static void exact_send(struct winnow_rpc_call *call)
{
    struct winnow_rpc_upload *upload = &call->upload;
    struct token_bytes bytes = token_bytes_of(&upload->shape);
    uint64_t n_lse = upload->want_lse ? bytes.lse : 0;
    winnow_assert(call->range);
    winnow_assert(upload->n_sent < upload->n_tokens);
    uint32_t n_left = upload->n_tokens - upload->n_sent;
    uint32_t n = (uint32_t)(WINNOW_WIRE_CHUNK_BYTES_MAX / (bytes.out + n_lse));
    n = n > n_left ? n_left : n ? n : 1;

    grpc_slice slice = grpc_slice_malloc_large(n * (bytes.out + n_lse));
    uint8_t *to = GRPC_SLICE_START_PTR(slice);
    memcpy(to, upload->out + upload->n_sent * bytes.out, n * bytes.out);
    if (n_lse)
        memcpy(to + n * bytes.out, (uint8_t *)upload->lse + upload->n_sent * bytes.lse,
               n * bytes.lse);
    upload->n_sent += n;
    winnow_assert(upload->n_sent <= upload->n_tokens);

    Winnow__V1__AttendExactReply reply = WINNOW__V1__ATTEND_EXACT_REPLY__INIT;
    Winnow__V1__Certificate certificate;
    reply.n_chunk = n;
    bool is_last = upload->n_sent == upload->n_tokens;
    winnow_rpc_call_set_timer(call, is_last ? WINNOW_NEVER_NS : stall_time());
    if (is_last) {
        winnow_rpc_certificate(&upload->certificate, &certificate);
        reply.certificate = &certificate;
        reply.tokens_held = upload->n_held;
        upload->has_header = false;
        winnow_rpc_unreserve(call);
    }
    winnow_rpc_call_send(call, &reply, &slice, is_last);
}

static void exact_sent(struct winnow_rpc_call *call)
{
    winnow_assert(call->upload.has_header);
    exact_send(call); /* the last chunk's batch receives, and so does not come here */
}

static void exact_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    if (!call->is_open)
        return;
    if (item->request.status < 0) {
        winnow_rpc_call_fail_request(call, &item->request);
        return;
    }
    winnow_assert(item->request.kind == WINNOW_REQUEST_EXACT);
    winnow_assert(!call->upload.n_sent);
    call->upload.certificate = item->request.exact.certificate;
    call->upload.n_held = item->request.n_held;
    exact_send(call);
}

static void exact_half_close(struct winnow_rpc_call *call)
{
    if (call->upload.has_header)
        winnow_rpc_call_fail(call, -EINVAL, "the stream ended inside a window: %u KV, %u Q of %u",
                             call->upload.n_kv, call->upload.n_q, call->upload.n_tokens);
    else
        winnow_rpc_call_end(call);
}

const struct winnow_rpc_method winnow_rpc_attend_exact = {
    .path = "/winnow.v1.Winnow/AttendExact",
    .request = &winnow__v1__attend_exact_message__descriptor,
    .tensor_bytes_max = WINNOW_WIRE_CHUNK_BYTES_MAX,
    .is_stream = true,
    .message = exact_message,
    .half_close = exact_half_close,
    .sent = exact_sent,
    .done = exact_done,
    .reserved = exact_reserved,
    .timeout = timeout,
    .end = end,
};
