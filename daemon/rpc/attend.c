// Attend: a decode step of one layer, 30 times a token, so the path with the fewest stops.
//
// One message is in hand at a time. Its tensor is copied once (slices may split an item and are not
// aligned), every item becomes a request, and the core writes out and lse straight into the slice
// that gRPC sends. The last item's `done` runs on this same thread inside the core's step and starts
// one batch {send reply k, receive k + 1}. Rejected: handing the items' slices to the core uncopied;
// q of one item is 2 KiB, and alignment would be checked item by item.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <grpc/byte_buffer.h>
#include <stdio.h>
#include <string.h>

/* A reply's results fit one piece of an arena, whatever the items. */
static_assert(WINNOW_WIRE_N_ITEMS_MAX *
                      (sizeof(Winnow__V1__AttendResult) + sizeof(Winnow__V1__Certificate) +
                       sizeof(Winnow__V1__AttendResult *)) <=
                  WINNOW_WIRE_ARENA_BYTES - 64,
              "reply's three arrays");
static_assert((int)WINNOW_VERDICT_EXACT == (int)WINNOW__V1__VERDICT__VERDICT_EXACT, "the wire's");
static_assert((int)WINNOW_VERDICT_MET == (int)WINNOW__V1__VERDICT__VERDICT_MET, "the wire's");
static_assert((int)WINNOW_VERDICT_SHORT == (int)WINNOW__V1__VERDICT__VERDICT_SHORT, "the wire's");
static_assert((int)WINNOW_VERDICT_DEGRADED == (int)WINNOW__V1__VERDICT__VERDICT_DEGRADED,
              "the wire's");

/* Sizes of one item's tensors on the wire. */
struct item_bytes {
    size_t q, k, v, out, lse;
};

static struct item_bytes item_bytes_of(const struct winnow_model_shape *shape)
{
    winnow_assert(shape->io_dtype >= WINNOW_BF16);
    winnow_assert(shape->io_dtype <= WINNOW_FP32);
    size_t element_bytes = shape->io_dtype == WINNOW_FP32 ? 4 : 2;
    return (struct item_bytes){
        .q = (size_t)shape->n_q_heads * shape->k_width * element_bytes,
        .k = (size_t)shape->n_kv_heads * shape->k_width * element_bytes,
        .v = (size_t)shape->n_kv_heads * shape->v_width * element_bytes,
        .out = (size_t)shape->n_q_heads * shape->v_width * element_bytes,
        .lse = (size_t)shape->n_q_heads * sizeof(float),
    };
}

void winnow_rpc_certificate(const struct winnow_core_certificate *from, Winnow__V1__Certificate *to)
{
    winnow_assert(from->verdict <= WINNOW_VERDICT_DEGRADED);
    winnow__v1__certificate__init(to);
    to->verdict = (Winnow__V1__Verdict)from->verdict;
    to->reason = from->reason;
    to->mass_asked = from->mass_asked;
    to->mass_reached = from->mass_reached;
    to->mass_mean = from->mass_mean;
    to->rounds = from->n_rounds;
    to->blocks_total = from->n_blocks_total;
    to->blocks_device = from->n_blocks_device;
    to->blocks_host = from->n_blocks_host;
    to->blocks_disk = from->n_blocks_disk;
    to->blocks_remote = from->n_blocks_remote;
    to->blocks_missed = from->n_blocks_missed;
    to->bytes_read = from->bytes_read;
    to->micros = from->micros;
}

static void give_items(struct winnow_rpc_call *call)
{
    struct winnow_rpc_item *next;
    for (struct winnow_rpc_item *item = call->attend.first; item; item = next) {
        next = item->next;
        winnow_assert(!item->is_busy);
        winnow_pool_give(call->rpc->items, item);
    }
    call->attend.first = NULL;
}

static void give_out(struct winnow_rpc_call *call)
{
    if (call->attend.has_out)
        grpc_slice_unref(call->attend.out);
    call->attend.has_out = false;
}

/* A result a item, its text borrowed from the request. */
static void fill_result(const struct winnow_request *request, Winnow__V1__AttendResult *result,
                        Winnow__V1__Certificate *certificate)
{
    winnow_assert(request->status <= 0);
    winnow__v1__attend_result__init(result);
    result->status = request->status;
    result->tokens_held = request->n_held;
    result->truncate_to = request->truncate_to;
    if (request->status == -ENOENT)
        result->text = (char *)WINNOW_NO_SUCH_SESSION;
    else if (request->status < 0)
        result->text = (char *)(*request->text ? request->text : strerrordesc_np(-request->status));
    if (!request->status) {
        winnow_rpc_certificate(&request->attend.certificate, certificate);
        result->certificate = certificate;
    }
}

/* Failed items' outputs are zeros: what the core left there is nobody's result. */
static void clear_failed(struct winnow_rpc_attend *attend)
{
    winnow_assert(attend->has_out);
    winnow_assert(GRPC_SLICE_LENGTH(attend->out) ==
                  attend->n_items * (attend->out_item_bytes + attend->lse_item_bytes));
    uint8_t *out = GRPC_SLICE_START_PTR(attend->out);
    uint8_t *lse = out + attend->n_items * attend->out_item_bytes;
    for (struct winnow_rpc_item *item = attend->first; item; item = item->next) {
        if (item->request.status < 0)
            memset(out, 0, attend->out_item_bytes);
        if (item->request.status < 0 || !item->request.attend.lse)
            memset(lse, 0, attend->lse_item_bytes);
        out += attend->out_item_bytes;
        lse += attend->lse_item_bytes;
    }
}

static void reply(struct winnow_rpc_call *call)
{
    struct winnow_rpc_attend *attend = &call->attend;
    struct winnow_wire_arena *arena = call->rpc->reply_arena;
    size_t n = attend->n_items;
    winnow_assert(!attend->n_left);
    winnow_assert(n);
    winnow_assert(n <= WINNOW_WIRE_N_ITEMS_MAX);
    /* Sized so that WINNOW_WIRE_N_ITEMS_MAX of all three fit an arena. */
    Winnow__V1__AttendResult *result = winnow_wire_arena_take(arena, n * sizeof *result);
    Winnow__V1__Certificate *certificate = winnow_wire_arena_take(arena, n * sizeof *certificate);
    Winnow__V1__AttendResult **results = winnow_wire_arena_take(arena, n * sizeof *results);
    if (!result || !certificate || !results) {
        winnow_wire_arena_reset(arena);
        winnow_rpc_call_fail(call, -ENOMEM, "no memory for a reply");
        return;
    }
    struct winnow_rpc_item *item = attend->first;
    for (size_t i = 0; i < n; i++, item = item->next) {
        fill_result(&item->request, &result[i], &certificate[i]);
        results[i] = &result[i];
    }
    winnow_assert(!item); /* as many as were counted */
    clear_failed(attend);
    Winnow__V1__AttendReply message = WINNOW__V1__ATTEND_REPLY__INIT;
    message.seq = attend->seq;
    message.layer = attend->layer;
    message.part = attend->part;
    message.results = results;
    message.n_results = n;
    attend->has_out = false; /* the buffer takes it */
    winnow_rpc_call_send(call, &message, &attend->out, true);
    winnow_wire_arena_reset(arena);
    give_items(call);
}

static void attend_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    winnow_assert(item->call == call);
    winnow_assert(call->attend.n_left);
    if (--call->attend.n_left)
        return;
    if (call->is_open)
        reply(call);
    else
        give_items(call);
}

static int data_hold(struct winnow_rpc_attend *attend, size_t n_bytes)
{
    if (n_bytes <= attend->data_bytes_max)
        return 0;
    size_t n_wanted = n_bytes < 16384 ? 16384 : n_bytes;
    uint8_t *data = winnow_alloc(n_wanted);
    if (!data)
        return -ENOMEM;
    winnow_alloc_free(attend->data);
    attend->data = data;
    attend->data_bytes_max = n_wanted;
    return 0;
}

static int check_sizes(struct winnow_rpc_call *call, const Winnow__V1__AttendRequest *request,
                       const struct item_bytes *bytes, size_t n_data)
{
    size_t n_bytes = 0;
    if (!request->n_items || request->n_items > WINNOW_WIRE_N_ITEMS_MAX) {
        winnow_rpc_call_fail(call, -EMSGSIZE, "%zu items, limit 1 to %d", request->n_items,
                             WINNOW_WIRE_N_ITEMS_MAX);
        return -EMSGSIZE;
    }
    for (size_t i = 0; i < request->n_items; i++) {
        bool has_kv = request->items[i]->flags & WINNOW_WIRE_HAS_KV;
        n_bytes += bytes->q + (has_kv ? bytes->k + bytes->v : 0);
    }
    if (n_bytes != n_data) {
        winnow_rpc_call_fail(call, -EINVAL, "data has %zu bytes, %zu items of this model need %zu",
                             n_data, request->n_items, n_bytes);
        return -EINVAL;
    }
    size_t n_reply = request->n_items * (bytes->out + bytes->lse);
    if (n_reply > WINNOW_WIRE_ATTEND_BYTES_MAX) {
        winnow_rpc_call_fail(call, -EMSGSIZE,
                             "the reply would have %zu bytes, limit %d. hint: "
                             "fewer items",
                             n_reply, WINNOW_WIRE_ATTEND_BYTES_MAX);
        return -EMSGSIZE;
    }
    return 0;
}

static const struct winnow_model *model_of(struct winnow_rpc_call *call,
                                           const Winnow__V1__AttendRequest *request)
{
    struct winnow_rpc *rpc = call->rpc;
    if (request->token.len) {
        struct winnow_lease *lease =
            winnow_lease_find(rpc->registry, request->token.data, request->token.len);
        call->lease_id = lease ? lease->id : 0;
    }
    const struct winnow_model *model = winnow_model_find(rpc->registry, request->model);
    if (!model)
        winnow_rpc_call_fail(call, -ENOENT, WINNOW_NO_SUCH_SESSION);
    return model;
}

/* One item's request; its tensors lie at `data`. Returns a bad item's -errno. */
static int fill_item(struct winnow_rpc_call *call, struct winnow_rpc_item *item,
                     const Winnow__V1__AttendItem *from, const struct winnow_model *model)
{
    struct winnow_request *request = &item->request;
    const uint32_t known =
        WINNOW_WIRE_HAS_KV | WINNOW_WIRE_WANT_LSE | WINNOW_WIRE_EXACT | WINNOW_WIRE_ALLOW_DEGRADED;
    struct winnow_lease *lease = winnow_lease_of_id(call->rpc->registry, call->lease_id);
    struct winnow_registry_session *session =
        winnow_registry_session_find(call->rpc->registry, from->session, lease);
    if (!session)
        return -ENOENT;
    if (session->model != model) {
        snprintf(request->text, sizeof request->text, "a session of model %u, the step's is %u",
                 session->model->number, model->number);
        return -EINVAL;
    }
    if (from->flags & ~known) {
        snprintf(request->text, sizeof request->text, "unknown flags %#x", from->flags & ~known);
        return -EINVAL;
    }
    if (!(from->mass >= 0 && from->mass <= 1)) {
        snprintf(request->text, sizeof request->text, "mass %g lies outside 0 to 1",
                 (double)from->mass);
        return -EINVAL;
    }
    request->kind = WINNOW_REQUEST_ATTEND;
    request->owner = call->lease_id;
    request->session_id = from->session;
    request->epoch = from->epoch;
    request->attend.layer = call->attend.layer;
    request->attend.seq = call->attend.seq;
    request->attend.position = from->position;
    request->attend.mass = from->mass;
    request->attend.n_blocks_max = from->n_blocks_max;
    if (from->flags & WINNOW_WIRE_HAS_KV)
        request->attend.flags |= WINNOW_ITEM_HAS_KV;
    if (from->flags & WINNOW_WIRE_EXACT)
        request->attend.flags |= WINNOW_ITEM_EXACT;
    if (from->flags & WINNOW_WIRE_ALLOW_DEGRADED)
        request->attend.flags |= WINNOW_ITEM_ALLOW_DEGRADED;
    return 0;
}

static void point_item(struct winnow_rpc_attend *attend, struct winnow_rpc_item *item,
                       const struct item_bytes *bytes, uint32_t flags, size_t idx,
                       const uint8_t **data)
{
    winnow_assert(idx < attend->n_items);
    winnow_assert(attend->has_out);
    uint8_t *out = GRPC_SLICE_START_PTR(attend->out);
    uint8_t *lse = out + attend->n_items * bytes->out;
    item->request.attend.q = *data;
    *data += bytes->q;
    if (flags & WINNOW_WIRE_HAS_KV) {
        item->request.attend.k = *data;
        item->request.attend.v = *data + bytes->k;
        *data += bytes->k + bytes->v;
    }
    item->request.attend.out = out + idx * bytes->out;
    if (flags & WINNOW_WIRE_WANT_LSE)
        item->request.attend.lse = (float *)(void *)(lse + idx * bytes->lse);
}

static int take_items(struct winnow_rpc_call *call, size_t n)
{
    winnow_assert(!call->attend.first);
    struct winnow_rpc_item **link = &call->attend.first;
    for (size_t i = 0; i < n; i++) {
        struct winnow_rpc_item *item = winnow_pool_take(call->rpc->items);
        if (!item) {
            give_items(call);
            return -EDQUOT;
        }
        memset(item, 0, sizeof *item);
        item->call = call;
        *link = item;
        link = &item->next;
    }
    return 0;
}

/* All items are in hand; those that are good go to the core. */
static void submit_items(struct winnow_rpc_call *call, const Winnow__V1__AttendRequest *request,
                         const struct winnow_model *model, const struct item_bytes *bytes)
{
    const uint8_t *data = call->attend.data;
    call->attend.n_left = call->attend.n_items + 1; /* ours, until all are in */
    struct winnow_rpc_item *item = call->attend.first, *next;
    for (size_t i = 0; i < request->n_items; i++, item = next) {
        const Winnow__V1__AttendItem *from = request->items[i];
        next = item->next;
        item->request.status = fill_item(call, item, from, model);
        point_item(&call->attend, item, bytes, from->flags, i, &data);
        int64_t default_s =
            from->flags & WINNOW_WIRE_EXACT ? WINNOW_EXACT_DEFAULT_S : WINNOW_ATTEND_DEFAULT_S;
        item->request.deadline_ns =
            winnow_rpc_call_deadline(call, request->deadline_us, default_s * WINNOW_NS_PER_S);
        if (item->request.status < 0)
            call->attend.n_left--;
        else
            winnow_rpc_submit(item);
    }
    winnow_assert((size_t)(data - call->attend.data) <= call->attend.data_bytes_max);
    winnow_assert(call->attend.n_left);
    if (!--call->attend.n_left && call->is_open)
        reply(call);
}

static void attend_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__AttendRequest *request = message->message;
    struct winnow_rpc_attend *attend = &call->attend;
    winnow_assert(!attend->first); /* one message in hand */
    winnow_assert(!attend->n_left);
    winnow_assert(!attend->has_out);
    const struct winnow_model *model = model_of(call, request);
    if (!model)
        return;
    struct item_bytes bytes = item_bytes_of(&model->shape);
    if (check_sizes(call, request, &bytes, message->tensor.n_bytes) < 0)
        return;
    if (data_hold(attend, message->tensor.n_bytes) < 0 || take_items(call, request->n_items) < 0) {
        winnow_rpc_call_fail(call, -EDQUOT, "%u items are in the core, limit %u. hint: host_pool",
                             winnow_pool_used(call->rpc->items), call->rpc->limits->n_items_max);
        return;
    }
    winnow_wire_tensor_copy(&message->tensor, 0, attend->data, message->tensor.n_bytes);
    attend->seq = request->seq;
    attend->layer = request->layer;
    attend->part = request->part;
    attend->n_items = (uint32_t)request->n_items;
    attend->out_item_bytes = bytes.out;
    attend->lse_item_bytes = bytes.lse;
    attend->out = grpc_slice_malloc_large(request->n_items * (bytes.out + bytes.lse));
    attend->has_out = true;
    submit_items(call, request, model, &bytes);
}

static void attend_end(struct winnow_rpc_call *call)
{
    for (struct winnow_rpc_item *item = call->attend.first; item; item = item->next)
        if (item->is_busy)
            winnow_core_cancel(call->rpc->core, &item->request);
}

static void attend_release(struct winnow_rpc_call *call)
{
    winnow_assert(!call->attend.n_left);
    give_items(call);
    give_out(call);
    winnow_alloc_free(call->attend.data);
}

const struct winnow_rpc_method winnow_rpc_attend = {
    .path = "/winnow.v1.Winnow/Attend",
    .request = &winnow__v1__attend_request__descriptor,
    .tensor_bytes_max = WINNOW_WIRE_ATTEND_BYTES_MAX,
    .is_stream = true,
    .message = attend_message,
    .done = attend_done,
    .end = attend_end,
    .release = attend_release,
};
