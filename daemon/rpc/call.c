// Calls: every batch that this daemon starts, and every completion that it gets.
//
// gRPC's C core punishes small mistakes with a hang or an abort, so all of its rules stand in this
// file: ops are zeroed, each batch has its own tag, a close watch is on every call, a call is
// unreferenced after its last completion, buffers are destroyed after theirs. Only the serving
// thread comes here; the core shares that thread, so its `done` may start batches.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <daemon/error.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Room comes back when a session ends, at most this long after its client. */
#define RETRY_AFTER_MS "100"

static_assert((int)WINNOW_CODE_OK == (int)GRPC_STATUS_OK, "gRPC's");
static_assert((int)WINNOW_CODE_CANCELLED == (int)GRPC_STATUS_CANCELLED, "gRPC's");
static_assert((int)WINNOW_CODE_INVALID_ARGUMENT == (int)GRPC_STATUS_INVALID_ARGUMENT, "gRPC's");
static_assert((int)WINNOW_CODE_DEADLINE_EXCEEDED == (int)GRPC_STATUS_DEADLINE_EXCEEDED, "gRPC's");
static_assert((int)WINNOW_CODE_NOT_FOUND == (int)GRPC_STATUS_NOT_FOUND, "gRPC's");
static_assert((int)WINNOW_CODE_PERMISSION_DENIED == (int)GRPC_STATUS_PERMISSION_DENIED, "gRPC's");
static_assert((int)WINNOW_CODE_RESOURCE_EXHAUSTED == (int)GRPC_STATUS_RESOURCE_EXHAUSTED, "gRPC's");
static_assert((int)WINNOW_CODE_FAILED_PRECONDITION == (int)GRPC_STATUS_FAILED_PRECONDITION,
              "gRPC's");
static_assert((int)WINNOW_CODE_ABORTED == (int)GRPC_STATUS_ABORTED, "gRPC's");
static_assert((int)WINNOW_CODE_UNIMPLEMENTED == (int)GRPC_STATUS_UNIMPLEMENTED, "gRPC's");
static_assert((int)WINNOW_CODE_INTERNAL == (int)GRPC_STATUS_INTERNAL, "gRPC's");
static_assert((int)WINNOW_CODE_UNAVAILABLE == (int)GRPC_STATUS_UNAVAILABLE, "gRPC's");
static_assert((int)WINNOW_CODE_DATA_LOSS == (int)GRPC_STATUS_DATA_LOSS, "gRPC's");
static_assert((int)WINNOW_CODE_UNAUTHENTICATED == (int)GRPC_STATUS_UNAUTHENTICATED, "gRPC's");

static void call_post(struct winnow_rpc *rpc, struct winnow_rpc_call *call)
{
    winnow_assert(!rpc->is_draining);
    winnow_assert(rpc->n_posted < rpc->limits->n_posted);
    memset(call, 0, sizeof *call);
    call->rpc = rpc;
    call->timer_ns = WINNOW_NEVER_NS;
    for (uint32_t kind = 0; kind < WINNOW_N_CALL_TAGS; kind++)
        call->tag[kind] = (struct winnow_rpc_tag){kind, call};
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    grpc_call_error error =
        grpc_server_request_call(rpc->server, &call->call, &call->details, &call->metadata,
                                 rpc->queue, rpc->queue, &call->tag[WINNOW_TAG_REQUEST]);
    winnow_assert(error == GRPC_CALL_OK);
    call->n_batches = 1;
    rpc->n_posted++;
}

void winnow_rpc_call_post(struct winnow_rpc *rpc)
{
    while (!rpc->is_draining && rpc->n_posted < rpc->limits->n_posted) {
        struct winnow_rpc_call *call = winnow_pool_take(rpc->calls);
        if (!call)
            return; /* the next release posts */
        call_post(rpc, call);
    }
}

static void call_release(struct winnow_rpc_call *call)
{
    struct winnow_rpc *rpc = call->rpc;
    winnow_assert(!call->is_open);
    winnow_assert(!call->n_batches);
    winnow_assert(!call->n_items);
    winnow_assert(!call->is_receiving);
    winnow_assert(!call->received);
    winnow_assert(!call->sending);
    winnow_assert(!call->range_bytes);
    if (call->method && call->method->release)
        call->method->release(call);
    for (size_t i = 0; i < sizeof call->trailer / sizeof *call->trailer; i++)
        grpc_slice_unref(call->trailer[i].value);
    grpc_slice_unref(call->status_text);
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    if (call->call)
        grpc_call_unref(call->call);
    winnow_pool_give(rpc->calls, call);
    winnow_rpc_call_post(rpc);
}

void winnow_rpc_call_release_if_over(struct winnow_rpc_call *call)
{
    if (!call->is_open && !call->n_batches && !call->n_items)
        call_release(call);
}

static void call_start(struct winnow_rpc_call *call, const grpc_op *ops, size_t n_ops,
                       enum winnow_rpc_tag_kind kind)
{
    winnow_assert(kind < WINNOW_N_CALL_TAGS);
    winnow_assert(kind != WINNOW_TAG_REQUEST);
    winnow_assert(n_ops);
    grpc_call_error error = grpc_call_start_batch(call->call, ops, n_ops, &call->tag[kind], NULL);
    winnow_assert(error == GRPC_CALL_OK);
    call->n_batches++;
    winnow_assert(call->n_batches <= WINNOW_N_CALL_TAGS);
}

static grpc_op op_receive(struct winnow_rpc_call *call)
{
    winnow_assert(!call->is_receiving);
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &call->received;
    call->is_receiving = true;
    return op;
}

/* The message's head and its tensor as one buffer of slices, sent by the batch of this kind; takes
 * `tensor`. */
static grpc_op op_send(struct winnow_rpc_call *call, const void *message, grpc_slice *tensor,
                       enum winnow_rpc_tag_kind kind)
{
    winnow_assert(!call->sending);
    size_t tensor_bytes = tensor ? GRPC_SLICE_LENGTH(*tensor) : 0;
    grpc_slice slice[2] = {grpc_slice_malloc(winnow_wire_head_bytes(message, tensor_bytes))};
    size_t n_head = winnow_wire_head(message, tensor_bytes, GRPC_SLICE_START_PTR(slice[0]));
    winnow_assert(n_head == GRPC_SLICE_LENGTH(slice[0]));
    if (tensor)
        slice[1] = *tensor;
    call->sending = grpc_raw_byte_buffer_create(slice, tensor ? 2 : 1);
    grpc_slice_unref(slice[0]);
    if (tensor)
        grpc_slice_unref(slice[1]);
    call->sending_kind = kind;

    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_SEND_MESSAGE;
    op.data.send_message.send_message = call->sending;
    return op;
}

void winnow_rpc_call_begin(struct winnow_rpc_call *call)
{
    winnow_assert(call->is_open);
    grpc_op op[2];
    memset(op, 0, sizeof op);
    op[0].op = GRPC_OP_RECV_CLOSE_ON_SERVER;
    op[0].data.recv_close_on_server.cancelled = &call->was_cancelled;
    call_start(call, op, 1, WINNOW_TAG_CLOSE);

    memset(op, 0, sizeof op);
    op[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    op[0].data.send_initial_metadata.count = 1;
    op[0].data.send_initial_metadata.metadata = &call->rpc->boot;
    op[1] = op_receive(call);
    call_start(call, op, 2, WINNOW_TAG_MESSAGE);
}

void winnow_rpc_call_receive(struct winnow_rpc_call *call)
{
    winnow_assert(call->is_open);
    grpc_op op = op_receive(call);
    call_start(call, &op, 1, WINNOW_TAG_MESSAGE);
}

void winnow_rpc_call_send(struct winnow_rpc_call *call, const void *message, grpc_slice *tensor,
                          bool then_receive)
{
    winnow_assert(call->is_open);
    enum winnow_rpc_tag_kind kind = then_receive ? WINNOW_TAG_MESSAGE : WINNOW_TAG_SENT;
    grpc_op op[2] = {op_send(call, message, tensor, kind)};
    if (then_receive)
        op[1] = op_receive(call);
    call_start(call, op, then_receive ? 2 : 1, kind);
}

static void call_close(struct winnow_rpc_call *call)
{
    winnow_assert(call->is_open);
    winnow_assert(call->rpc->n_open);
    call->is_open = false;
    call->rpc->n_open--;
    call->timer_ns = WINNOW_NEVER_NS;
    if (call->method->end)
        call->method->end(call);
    if (!call->n_items) /* else the core may be reading from it: winnow_rpc_submit's done */
        winnow_rpc_unreserve(call);
}

struct last_words {
    int error;
    const char *text;
    uint64_t truncate_to, n_held;
};

static void call_finish(struct winnow_rpc_call *call, const struct last_words *words,
                        const void *message)
{
    winnow_assert(call->is_open);
    winnow_assert(words->error <= 0);
    winnow_assert(!words->error || words->text);
    winnow_assert(!words->error || !message);
    grpc_op op[2];
    memset(op, 0, sizeof op);
    size_t n_ops = 0;
    if (message)
        op[n_ops++] = op_send(call, message, NULL, WINNOW_TAG_STATUS);

    grpc_op *status = &op[n_ops++];
    status->op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    status->data.send_status_from_server.status = (grpc_status_code)winnow_error_code(words->error);
    if (words->error) {
        char reason[16];
        snprintf(reason, sizeof reason, "%d", -words->error);
        call->status_text = grpc_slice_from_copied_string(words->text);
        status->data.send_status_from_server.status_details = &call->status_text;
        call->trailer[0].key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_REASON);
        call->trailer[0].value = grpc_slice_from_copied_string(reason);
        call->trailer[1].key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_TRUNCATE_TO);
        call->trailer[1].value =
            grpc_slice_from_copied_buffer((const char *)&words->truncate_to, 8);
        call->trailer[2].key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_HELD);
        call->trailer[2].value = grpc_slice_from_copied_buffer((const char *)&words->n_held, 8);
        call->trailer[3].key = grpc_slice_from_static_string(WINNOW_WIRE_KEY_RETRY);
        call->trailer[3].value = grpc_slice_from_static_string(RETRY_AFTER_MS);
        bool is_full = winnow_error_code(words->error) == WINNOW_CODE_RESOURCE_EXHAUSTED;
        status->data.send_status_from_server.trailing_metadata = call->trailer;
        status->data.send_status_from_server.trailing_metadata_count = is_full ? 4 : 3;
    }
    call_start(call, op, n_ops, WINNOW_TAG_STATUS);
    call_close(call);
}

void winnow_rpc_call_answer(struct winnow_rpc_call *call, const void *message)
{
    call_finish(call, &(struct last_words){0}, message);
}

void winnow_rpc_call_end(struct winnow_rpc_call *call)
{
    call_finish(call, &(struct last_words){0}, NULL);
}

void winnow_rpc_call_fail(struct winnow_rpc_call *call, int error, const char *format, ...)
{
    winnow_assert(error < 0);
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    call_finish(call, &(struct last_words){.error = error, .text = text}, NULL);
}

void winnow_rpc_call_fail_request(struct winnow_rpc_call *call,
                                  const struct winnow_request *request)
{
    winnow_assert(request->status < 0);
    const char *text = request->text;
    if (request->status == -ENOENT)
        text = WINNOW_NO_SUCH_SESSION;
    else if (!*text)
        text = strerrordesc_np(-request->status);
    call_finish(call,
                &(struct last_words){request->status, text, request->truncate_to, request->n_held},
                NULL);
}

void winnow_rpc_call_cancel(struct winnow_rpc_call *call)
{
    grpc_call_cancel(call->call, NULL);
    call_close(call);
}

void winnow_rpc_call_set_timer(struct winnow_rpc_call *call, int64_t when_ns)
{
    winnow_assert(call->is_open);
    call->timer_ns = when_ns;
    if (when_ns < call->rpc->next_timer_ns)
        call->rpc->next_timer_ns = when_ns;
}

int64_t winnow_rpc_call_deadline(const struct winnow_rpc_call *call, uint64_t deadline_us,
                                 int64_t default_ns)
{
    winnow_assert(default_ns > 0);
    int64_t relative_ns = default_ns;
    if (deadline_us && deadline_us < INT64_MAX / 4096)
        relative_ns = (int64_t)deadline_us * WINNOW_NS_PER_US;
    int64_t deadline_ns = winnow_clock_now_ns() + relative_ns;
    return deadline_ns < call->deadline_ns ? deadline_ns : call->deadline_ns;
}

static int64_t deadline_of(gpr_timespec when)
{
    gpr_timespec left = gpr_time_sub(gpr_convert_clock_type(when, GPR_CLOCK_MONOTONIC),
                                     gpr_now(GPR_CLOCK_MONOTONIC));
    if (left.tv_sec > 1000000000)
        return WINNOW_NEVER_NS;
    return winnow_clock_now_ns() + left.tv_sec * WINNOW_NS_PER_S + left.tv_nsec;
}

static void on_request(struct winnow_rpc_call *call, bool ok)
{
    struct winnow_rpc *rpc = call->rpc;
    winnow_assert(!call->is_open);
    winnow_assert(rpc->n_posted);
    rpc->n_posted--;
    if (!ok) /* the server shuts down; the call was never open */
        return;
    winnow_rpc_call_post(rpc);

    const grpc_slice path = call->details.method;
    call->method =
        winnow_rpc_method_find((const char *)GRPC_SLICE_START_PTR(path), GRPC_SLICE_LENGTH(path));
    call->deadline_ns = deadline_of(call->details.deadline);
    call->is_open = true;
    rpc->n_open++;
    winnow_assert(rpc->n_open + rpc->n_posted <= winnow_pool_used(rpc->calls));
    winnow_rpc_call_begin(call);
    uint32_t n_max = rpc->limits->n_calls_max;
    if (call->method->is_stream)
        n_max -= rpc->limits->n_calls_reserved;
    if (!call->method->message)
        winnow_rpc_call_fail(call, -ENOTSUP, "no such method");
    else if (rpc->is_draining)
        winnow_rpc_call_fail(call, -EHOSTDOWN, "the daemon is stopping. hint: run without");
    else if (rpc->n_open > n_max)
        winnow_rpc_call_fail(call, -EDQUOT, "%u calls are open, limit %u. hint: host_pool",
                             rpc->n_open, n_max);
    else if (call->method->begin)
        call->method->begin(call);
}

/* The received buffer as slices of ours; 0: it cannot be read. Many small ones are joined. */
static uint32_t slices_of(struct winnow_rpc *rpc, grpc_byte_buffer *buffer, grpc_slice *ret_joined)
{
    const uint32_t n_max = sizeof rpc->slice / sizeof *rpc->slice;
    grpc_slice_buffer *slices = &buffer->data.raw.slice_buffer;
    *ret_joined = grpc_empty_slice();
    if (slices->count > n_max || buffer->data.raw.compression != GRPC_COMPRESS_NONE) {
        grpc_byte_buffer_reader reader;
        if (!grpc_byte_buffer_reader_init(&reader, buffer))
            return 0;
        *ret_joined = grpc_byte_buffer_reader_readall(&reader);
        grpc_byte_buffer_reader_destroy(&reader);
        rpc->slice[0] = (struct winnow_wire_slice){GRPC_SLICE_START_PTR(*ret_joined),
                                                   GRPC_SLICE_LENGTH(*ret_joined)};
        return 1;
    }
    for (size_t i = 0; i < slices->count; i++)
        rpc->slice[i] = (struct winnow_wire_slice){GRPC_SLICE_START_PTR(slices->slices[i]),
                                                   GRPC_SLICE_LENGTH(slices->slices[i])};
    return (uint32_t)slices->count;
}

static void take_message(struct winnow_rpc_call *call, grpc_byte_buffer *buffer)
{
    winnow_assert(call->method->message);
    winnow_assert(call->method->request);
    struct winnow_rpc *rpc = call->rpc;
    grpc_slice joined;
    struct winnow_wire_message message;
    struct winnow_wire_input input = {
        .slice = rpc->slice,
        .n_slices = slices_of(rpc, buffer, &joined),
        .tensor_bytes_max = call->method->tensor_bytes_max,
        .is_request = true,
    };
    int rc = winnow_wire_decode(rpc->arena, call->method->request, &input, &message);
    if (!input.n_slices && grpc_byte_buffer_length(buffer))
        winnow_rpc_call_fail(call, -EINVAL, "the message cannot be decompressed");
    else if (rc < 0)
        winnow_rpc_call_fail(call, rc, "%s", message.text);
    else
        call->method->message(call, &message);
    winnow_wire_arena_reset(rpc->arena);
    grpc_slice_unref(joined);
}

static void on_message(struct winnow_rpc_call *call, bool ok)
{
    winnow_assert(call->is_receiving);
    grpc_byte_buffer *buffer = call->received;
    call->received = NULL;
    call->is_receiving = false;
    if (call->is_open && ok && buffer)
        take_message(call, buffer);
    else if (call->is_open && call->method->half_close)
        call->method->half_close(call);
    else if (call->is_open)
        winnow_rpc_call_end(call);
    if (buffer)
        grpc_byte_buffer_destroy(buffer);
}

void winnow_rpc_call_complete(struct winnow_rpc_tag *tag, bool ok)
{
    struct winnow_rpc_call *call = tag->call;
    winnow_assert(tag->kind < WINNOW_N_CALL_TAGS);
    winnow_assert(tag == &call->tag[tag->kind]);
    winnow_assert(call->n_batches);
    if (call->sending && call->sending_kind == tag->kind) {
        grpc_byte_buffer_destroy(call->sending);
        call->sending = NULL;
    }
    switch (tag->kind) {
    case WINNOW_TAG_REQUEST:
        on_request(call, ok);
        break;
    case WINNOW_TAG_MESSAGE:
        on_message(call, ok);
        break;
    case WINNOW_TAG_SENT:
        if (call->is_open && call->method->sent)
            call->method->sent(call);
        break;
    case WINNOW_TAG_CLOSE:
        if (call->was_cancelled && call->is_open)
            call_close(call);
        break;
    default:
        break;
    }
    call->n_batches--; /* last, so that nothing above releases the call */
    winnow_rpc_call_release_if_over(call);
}
