// The unary methods about sessions: Info, OpenSession, Fork, Truncate, Close. Each is one message,
// at most one request in the core, one answer.
#include <assert.h>
#include <base/assert.h>
#include <base/log.h>
#include <ctype.h>
#include <daemon/fingerprint.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <grpc/byte_buffer.h>
#include <stdio.h>
#include <string.h>

enum { N_LAYERS_MAX = 256, N_HEADS_MAX = 1024, BRANCH_BYTES_MAX = 32 };

static_assert((int)WINNOW_POLICY_CODES == (int)WINNOW__V1__POLICY__POLICY_CODES, "the wire's");
static_assert((int)WINNOW_POLICY_TACTIC == (int)WINNOW__V1__POLICY__POLICY_TACTIC, "the wire's");
static_assert((int)WINNOW_POLICY_MOMENT == (int)WINNOW__V1__POLICY__POLICY_MOMENT, "the wire's");
static_assert((int)WINNOW_POLICY_EXACT == (int)WINNOW__V1__POLICY__POLICY_EXACT, "the wire's");
static_assert((int)WINNOW_BF16 == (int)WINNOW__V1__DTYPE__DTYPE_BF16, "the wire's");
static_assert((int)WINNOW_FP16 == (int)WINNOW__V1__DTYPE__DTYPE_FP16, "the wire's");
static_assert((int)WINNOW_FP32 == (int)WINNOW__V1__DTYPE__DTYPE_FP32, "the wire's");
static_assert(sizeof((struct winnow_rpc_open *)0)->branch == BRANCH_BYTES_MAX, "its room");
static_assert(sizeof((struct winnow_request *)0)->open.label == WINNOW_WIRE_LABEL_BYTES_MAX + 1,
              "and a NUL");
static_assert(sizeof((struct winnow_registry_session *)0)->label == WINNOW_WIRE_LABEL_BYTES_MAX + 1,
              "and a NUL");
static_assert(sizeof((struct winnow_registry_session *)0)->fingerprint ==
                  WINNOW_WIRE_FINGERPRINT_BYTES,
              "the wire's");

static void fail_without_message(struct winnow_rpc_call *call)
{
    winnow_rpc_call_fail(call, -EINVAL, "a request message is missing");
}

static void give_back(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    if (call->is_open)
        winnow_rpc_call_fail_request(call, &item->request);
}

/* Readies the call's own request; the caller fills its union. */
static struct winnow_request *own_request(struct winnow_rpc_call *call, uint32_t kind,
                                          uint64_t session_id)
{
    winnow_assert(!call->own.is_busy);
    struct winnow_request *request = &call->own.request;
    memset(request, 0, sizeof *request);
    request->kind = kind;
    request->owner = call->lease_id;
    request->session_id = session_id;
    request->deadline_ns =
        winnow_rpc_call_deadline(call, 0, WINNOW_CONTROL_DEFAULT_S * WINNOW_NS_PER_S);
    call->own.call = call;
    return request;
}

static bool copy_label(const char *label, char to[65])
{
    size_t n = strlen(label);
    if (n > WINNOW_WIRE_LABEL_BYTES_MAX)
        return false;
    for (const char *c = label; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("._-", *c))
            return false;
    strcpy(to, label);
    return true;
}

/* --- Info --- */

static void info_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__InfoRequest *request = message->message;
    const struct winnow_rpc *rpc = call->rpc;
    uint32_t proto_max = request->proto_max ? request->proto_max : UINT32_MAX;
    if (request->proto_min > WINNOW_WIRE_PROTO || proto_max < WINNOW_WIRE_PROTO) {
        winnow_rpc_call_fail(call, -EPROTO,
                             "the client speaks protocol %u to %u, this daemon %d. hint: install "
                             "the same version of both",
                             request->proto_min, proto_max, WINNOW_WIRE_PROTO);
        return;
    }
    const struct winnow_limits *limits = rpc->limits;
    const struct {
        const char *name;
        uint64_t value;
        const char *origin;
    } table[] = {
        {"host_pool_bytes", limits->host_pool_bytes, "host_pool"},
        {"index_memory_bytes", limits->index_memory_bytes, "index_memory"},
        {"disk_cap_bytes", limits->disk_cap_bytes, "disk_cap"},
        {"segment_tokens", limits->segment_tokens, "segment_tokens"},
        {"tokens", rpc->config->n_tokens_max, "tokens_max"},
        {"sessions", rpc->config->n_sessions_max, "sessions_max"},
        {"clients", limits->n_clients_max, "host_pool / 4 MiB, 32 to 1,024"},
        {"calls", limits->n_calls_max, "host_pool / 1 MiB, 128 to 4,096"},
        {"in_flight_bytes", limits->in_flight_bytes, "host_pool / 4, 4 to 64 MiB"},
        {"window_bytes", limits->window_bytes, "in_flight_bytes: q, k, v, out, lse"},
        {"window_tokens", limits->window_tokens, "protocol"},
        {"attend_bytes", WINNOW_WIRE_ATTEND_BYTES_MAX, "protocol"},
        {"chunk_bytes", WINNOW_WIRE_CHUNK_BYTES_MAX, "protocol"},
        {"items", WINNOW_WIRE_N_ITEMS_MAX, "protocol"},
        {"layers", N_LAYERS_MAX, "protocol"},
        {"heads", N_HEADS_MAX, "protocol"},
        {"label_bytes", WINNOW_WIRE_LABEL_BYTES_MAX, "protocol"},
    };
    enum { N = sizeof table / sizeof *table };
    Winnow__V1__Limit limit[N], *limits_list[N];
    for (size_t i = 0; i < N; i++) {
        winnow__v1__limit__init(&limit[i]);
        limit[i].name = (char *)table[i].name;
        limit[i].value = table[i].value;
        limit[i].origin = (char *)table[i].origin;
        limits_list[i] = &limit[i];
    }
    char *features[] = {(char *)"append", (char *)"attend", (char *)"attend_exact", (char *)"fork"};
    Winnow__V1__InfoReply reply = WINNOW__V1__INFO_REPLY__INIT;
    reply.proto = WINNOW_WIRE_PROTO;
    reply.boot_id = (ProtobufCBinaryData){16, (uint8_t *)rpc->boot_id};
    reply.build = (char *)WINNOW_VERSION;
    reply.limits = limits_list;
    reply.n_limits = N;
    reply.features = features;
    reply.n_features = sizeof features / sizeof *features;
    winnow_rpc_call_answer(call, &reply);
}

const struct winnow_rpc_method winnow_rpc_info = {
    .path = "/winnow.v1.Winnow/Info",
    .request = &winnow__v1__info_request__descriptor,
    .message = info_message,
    .half_close = fail_without_message,
};

/* --- OpenSession --- */

static void open_answer(struct winnow_rpc_call *call, const struct winnow_registry_session *session)
{
    winnow_assert(session->lease);
    winnow_assert(session->model->n_sessions);
    Winnow__V1__OpenSessionReply reply = WINNOW__V1__OPEN_SESSION_REPLY__INIT;
    reply.session = session->id;
    reply.model = session->model->number;
    reply.fingerprint = (ProtobufCBinaryData){32, (uint8_t *)session->fingerprint};
    reply.block_layout = session->block_layout;
    reply.segment_tokens = session->segment_tokens;
    reply.n_sinks = session->n_sinks;
    reply.epoch = session->epoch;
    winnow_rpc_call_answer(call, &reply);
}

/* The shape as the core knows it; -EINVAL or -EPROTO with a line in text. */
static int shape_of(const Winnow__V1__ModelShape *model, struct winnow_model_shape *shape,
                    char text[256])
{
    snprintf(text, 256, "a model shape is missing");
    if (!model)
        return -EINVAL;
    *shape = (struct winnow_model_shape){
        .n_layers = model->layers,
        .n_q_heads = model->q_heads,
        .n_kv_heads = model->kv_heads,
        .k_width = model->k_width,
        .v_width = model->v_width,
        .softmax_scale = model->softmax_scale,
        .kv_dtype = model->kv_dtype,
        .io_dtype = model->io_dtype,
        .block_layout = model->block_layout,
    };
    if (!model->layers || model->layers > N_LAYERS_MAX) {
        snprintf(text, 256, "%u layers lie outside 1 to %d", model->layers, N_LAYERS_MAX);
        return -EINVAL;
    }
    if (!model->q_heads || !model->kv_heads || model->q_heads > N_HEADS_MAX ||
        model->kv_heads > N_HEADS_MAX) {
        snprintf(text, 256, "%u query and %u KV heads lie outside 1 to %d", model->q_heads,
                 model->kv_heads, N_HEADS_MAX);
        return -EINVAL;
    }
    if (shape->block_layout > WINNOW_BLOCK_FRAGMENTS) {
        snprintf(text, 256, "block layout %u is unknown, this build has %d and %d",
                 shape->block_layout, WINNOW_BLOCK_LAYOUT, WINNOW_BLOCK_FRAGMENTS);
        return -EPROTO;
    }
    if ((model->weights_id.len && model->weights_id.len != 32) ||
        model->branch.len > BRANCH_BYTES_MAX) {
        snprintf(text, 256, "weights_id has 32 bytes or none, branch at most %d", BRANCH_BYTES_MAX);
        return -EINVAL;
    }
    struct winnow_model_shape chosen = *shape; /* 0: the core chooses */
    if (!chosen.block_layout)
        chosen.block_layout = WINNOW_BLOCK_LAYOUT;
    return winnow_model_shape_check(&chosen, text);
}

static bool options_of(struct winnow_rpc_call *call, const Winnow__V1__SessionOptions *options,
                       struct winnow_session_options *to)
{
    *to = (struct winnow_session_options){0};
    if (!options)
        return true;
    if (options->mode == WINNOW__V1__MODE__MODE_MERGE ||
        options->mode == WINNOW__V1__MODE__MODE_READ) {
        winnow_rpc_call_fail(call, -ENOTSUP, "mode %d is not served, own-all is", options->mode);
        return false;
    }
    if ((uint32_t)options->mode > WINNOW__V1__MODE__MODE_READ ||
        (uint32_t)options->policy > WINNOW__V1__POLICY__POLICY_EXACT ||
        !(options->mass >= 0 && options->mass <= 1)) {
        winnow_rpc_call_fail(call, -EINVAL, "mode %d, policy %d, mass %g: one is out of range",
                             options->mode, options->policy, (double)options->mass);
        return false;
    }
    *to = (struct winnow_session_options){
        .policy = options->policy,
        .mass = options->mass,
        .n_blocks_max = options->n_blocks_max,
        .n_sinks = options->n_sinks,
        .n_tokens_max = options->n_tokens_max,
        .strict = options->strict,
        .allow_degraded = options->allow_degraded,
        .admit_nonfinite = options->admit_nonfinite,
    };
    return true;
}

static bool is_repeat(struct winnow_rpc_call *call, const struct winnow_lease *lease,
                      const ProtobufCBinaryData *request_id)
{
    if (request_id->len == 16)
        memcpy(call->open.request_id, request_id->data, 16);
    static const uint8_t none[16];
    if (!memcmp(call->open.request_id, none, 16))
        return false;
    struct winnow_registry_session *session =
        winnow_registry_session_of_request(call->rpc->registry, lease, call->open.request_id);
    if (session)
        call->open.session_id = session->id;
    return session;
}

static struct winnow_lease *lease_of(struct winnow_rpc_call *call, const ProtobufCBinaryData *token)
{
    struct winnow_lease *lease = winnow_lease_find(call->rpc->registry, token->data, token->len);
    if (lease)
        call->lease_id = call->open.lease_id = lease->id;
    else
        winnow_rpc_call_fail(call, -ESTALE, "no such lease. hint: take one and open again");
    return lease;
}

static void open_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__OpenSessionRequest *open = message->message;
    struct winnow_lease *lease = lease_of(call, &open->token);
    if (!lease)
        return;
    if (is_repeat(call, lease, &open->request_id)) {
        open_answer(
            call, winnow_registry_session_find(call->rpc->registry, call->open.session_id, lease));
        return;
    }
    struct winnow_request *request = own_request(call, WINNOW_REQUEST_OPEN, 0);
    char text[256];
    int rc = shape_of(open->model, &request->open.shape, text);
    if (rc < 0) {
        winnow_rpc_call_fail(call, rc, "%s", text);
        return;
    }
    if (!copy_label(open->label, request->open.label)) {
        winnow_rpc_call_fail(call, -EINVAL, "a label has at most %d of A-Z a-z 0-9 . _ -",
                             WINNOW_WIRE_LABEL_BYTES_MAX);
        return;
    }
    if (!options_of(call, open->options, &request->open.options))
        return;
    call->open.weights_id_bytes = open->model->weights_id.len;
    call->open.branch_bytes = open->model->branch.len;
    if (open->model->weights_id.len)
        memcpy(call->open.weights_id, open->model->weights_id.data, open->model->weights_id.len);
    if (open->model->branch.len)
        memcpy(call->open.branch, open->model->branch.data, open->model->branch.len);
    call->open.model = winnow_model_take(call->rpc->registry, &request->open.shape);
    if (!call->open.model) {
        winnow_rpc_call_fail(call, -EDQUOT, "64 model shapes are in use. hint: close sessions");
        return;
    }
    call->open.model->n_sessions++; /* held while the core opens */
    winnow_rpc_submit(&call->own);
}

/* Closes a session that nobody was told of. */
static void close_untold(struct winnow_rpc_call *call, uint64_t session_id)
{
    winnow_assert(session_id);
    winnow_assert(call->open.lease_id);
    own_request(call, WINNOW_REQUEST_CLOSE, session_id)->owner = call->open.lease_id;
    call->own.request.deadline_ns = WINNOW_NEVER_NS;
    winnow_rpc_submit(&call->own);
}

/* The session that the core has made, in the registry; NULL when its lease has ended meanwhile. */
static struct winnow_registry_session *register_session(struct winnow_rpc_call *call,
                                                        uint64_t session_id, const char *label)
{
    struct winnow_rpc *rpc = call->rpc;
    struct winnow_lease *lease = winnow_lease_of_id(rpc->registry, call->open.lease_id);
    struct winnow_registry_session *session =
        lease && call->is_open
            ? winnow_registry_session_add(rpc->registry, session_id, lease, call->open.model)
            : NULL;
    if (!session)
        return NULL;
    winnow_assert(session->lease->id == call->open.lease_id);
    winnow_assert(strlen(label) < sizeof session->label);
    memcpy(session->request_id, call->open.request_id, 16);
    strcpy(session->label, label);
    winnow_session_name(rpc->boot_id, session_id, session->name);
    return session;
}

static void open_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    struct winnow_request *request = &item->request;
    winnow_assert(call->open.lease_id);
    if (request->kind == WINNOW_REQUEST_CLOSE) {
        if (call->is_open)
            winnow_rpc_call_fail(call, -ESTALE, "the lease has ended. hint: take one");
        return;
    }
    winnow_assert(call->open.model->n_sessions);
    call->open.model->n_sessions--;
    if (request->status < 0) {
        give_back(call, item);
        return;
    }
    uint64_t session_id = request->open.ret_session_id;
    struct winnow_registry_session *session =
        register_session(call, session_id, request->open.label);
    if (!session) {
        close_untold(call, session_id);
        return;
    }
    session->epoch = request->epoch;
    session->segment_tokens = request->open.ret_segment_tokens;
    session->n_sinks = request->open.ret_n_sinks;
    winnow_assert(session->segment_tokens);
    session->block_layout = request->open.shape.block_layout; /* the core's choice */
    struct winnow_identity identity = {
        .shape = request->open.shape,
        .segment_tokens = session->segment_tokens,
        .n_sinks = session->n_sinks,
        .weights_id = call->open.weights_id,
        .branch = call->open.branch,
        .weights_id_bytes = call->open.weights_id_bytes,
        .branch_bytes = call->open.branch_bytes,
    };
    winnow_fingerprint(&identity, session->fingerprint);
    open_answer(call, session);
}

const struct winnow_rpc_method winnow_rpc_open_session = {
    .path = "/winnow.v1.Winnow/OpenSession",
    .request = &winnow__v1__open_session_request__descriptor,
    .message = open_message,
    .half_close = fail_without_message,
    .done = open_done,
};

/* --- Fork --- */

static void fork_answer(struct winnow_rpc_call *call, const struct winnow_registry_session *session,
                        uint64_t n_held)
{
    Winnow__V1__ForkReply reply = WINNOW__V1__FORK_REPLY__INIT;
    reply.session = session->id;
    reply.epoch = session->epoch;
    reply.tokens_held = n_held;
    winnow_rpc_call_answer(call, &reply);
}

static void fork_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__ForkRequest *fork = message->message;
    struct winnow_registry_session *parent = winnow_rpc_session(call, &fork->token, fork->session);
    if (!parent)
        return;
    call->open.lease_id = parent->lease->id;
    if (!copy_label(fork->label, call->open.label)) {
        winnow_rpc_call_fail(call, -EINVAL, "a label has at most %d of A-Z a-z 0-9 . _ -",
                             WINNOW_WIRE_LABEL_BYTES_MAX);
        return;
    }
    if (is_repeat(call, parent->lease, &fork->request_id)) {
        struct winnow_registry_session *session =
            winnow_registry_session_find(call->rpc->registry, call->open.session_id, parent->lease);
        winnow_assert(session);
        fork_answer(call, session, session->n_forked);
        return;
    }
    winnow_assert(parent->model->n_sessions);
    call->open.model = parent->model;
    call->open.model->n_sessions++;
    call->open.parent = *parent;
    own_request(call, WINNOW_REQUEST_FORK, parent->id);
    winnow_rpc_submit(&call->own);
}

static void fork_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    struct winnow_request *request = &item->request;
    if (request->kind == WINNOW_REQUEST_CLOSE) {
        open_done(call, item);
        return;
    }
    winnow_assert(call->open.model->n_sessions);
    call->open.model->n_sessions--;
    if (request->status < 0) {
        give_back(call, item);
        return;
    }
    uint64_t session_id = request->fork.ret_session_id;
    struct winnow_registry_session *session = register_session(call, session_id, call->open.label);
    if (!session) {
        close_untold(call, session_id);
        return;
    }
    session->epoch = request->epoch;
    winnow_assert(session->model == call->open.parent.model);
    session->n_forked = request->n_held;
    session->segment_tokens = call->open.parent.segment_tokens;
    session->block_layout = call->open.parent.block_layout;
    session->n_sinks = call->open.parent.n_sinks;
    memcpy(session->fingerprint, call->open.parent.fingerprint, sizeof session->fingerprint);
    fork_answer(call, session, request->n_held);
}

const struct winnow_rpc_method winnow_rpc_fork = {
    .path = "/winnow.v1.Winnow/Fork",
    .request = &winnow__v1__fork_request__descriptor,
    .message = fork_message,
    .half_close = fail_without_message,
    .done = fork_done,
};

/* --- Truncate --- */

static void truncate_message(struct winnow_rpc_call *call,
                             const struct winnow_wire_message *message)
{
    const Winnow__V1__TruncateRequest *truncate = message->message;
    if (!winnow_rpc_session(call, &truncate->token, truncate->session))
        return;
    own_request(call, WINNOW_REQUEST_TRUNCATE, truncate->session)->truncate.n_tokens =
        truncate->n_tokens;
    winnow_rpc_submit(&call->own);
}

static void truncate_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    if (item->request.status < 0 || !call->is_open) {
        give_back(call, item);
        return;
    }
    Winnow__V1__TruncateReply reply = WINNOW__V1__TRUNCATE_REPLY__INIT;
    reply.epoch = item->request.epoch;
    reply.tokens_held = item->request.n_held;
    winnow_rpc_call_answer(call, &reply);
}

const struct winnow_rpc_method winnow_rpc_truncate = {
    .path = "/winnow.v1.Winnow/Truncate",
    .request = &winnow__v1__truncate_request__descriptor,
    .message = truncate_message,
    .half_close = fail_without_message,
    .done = truncate_done,
};

/* --- Close --- */

static void close_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__CloseRequest *close = message->message;
    struct winnow_registry_session *session =
        winnow_rpc_session(call, &close->token, close->session);
    if (!session)
        return;
    own_request(call, WINNOW_REQUEST_CLOSE, close->session)->deadline_ns = WINNOW_NEVER_NS;
    winnow_registry_session_drop(call->rpc->registry, session);
    winnow_rpc_submit(&call->own);
}

static void close_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    if (item->request.status < 0 || !call->is_open) {
        give_back(call, item);
        return;
    }
    Winnow__V1__CloseReply reply = WINNOW__V1__CLOSE_REPLY__INIT;
    winnow_rpc_call_answer(call, &reply);
}

const struct winnow_rpc_method winnow_rpc_close = {
    .path = "/winnow.v1.Winnow/Close",
    .request = &winnow__v1__close_request__descriptor,
    .message = close_message,
    .half_close = fail_without_message,
    .done = close_done,
};
