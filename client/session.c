// Sessions: what a handle knows of its context (how far each layer is, the epoch), and the control
// calls. The daemon decides; the handle's count is there so that an engine can ask where it stands
// after a failure.
#include <client/client.h>

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { N_LAYERS_MAX = 4096 }; /* for the handle's array; the daemon has its own limit */

static_assert((int)WINNOW_DTYPE_BF16 == (int)WINNOW__V1__DTYPE__DTYPE_BF16, "as on the wire");
static_assert((int)WINNOW_DTYPE_FP16 == (int)WINNOW__V1__DTYPE__DTYPE_FP16, "as on the wire");
static_assert((int)WINNOW_DTYPE_FP32 == (int)WINNOW__V1__DTYPE__DTYPE_FP32, "as on the wire");
static_assert((int)WINNOW_BY_DEFAULT == (int)WINNOW__V1__POLICY__POLICY_UNSPECIFIED,
              "as on the wire");
static_assert((int)WINNOW_BY_CODES == (int)WINNOW__V1__POLICY__POLICY_CODES, "as on the wire");
static_assert((int)WINNOW_BY_TACTIC == (int)WINNOW__V1__POLICY__POLICY_TACTIC, "as on the wire");
static_assert((int)WINNOW_BY_MOMENT == (int)WINNOW__V1__POLICY__POLICY_MOMENT, "as on the wire");
static_assert((int)WINNOW_BY_EXACT == (int)WINNOW__V1__POLICY__POLICY_EXACT, "as on the wire");
static_assert(WINNOW_WIRE_LABEL_BYTES_MAX == 64, "what winnow.h allows");
static_assert(WINNOW_WIRE_ID_BYTES <= 256, "getrandom(2) fills up to 256 bytes or fails");
static_assert(sizeof(float) == 4, "lse is f32 on the wire");
static_assert(sizeof(size_t) >= sizeof(uint64_t), "heads x width x dtype is a size_t");

/* A control call of a session or, with session NULL, of a client: link, arena and status in one. */
struct control {
    struct winnow_client *client;
    struct winnow_link *link;
    struct winnow_wire_arena *arena;
    struct winnow_status status;
    int64_t deadline_ns;
};

static int control_begin(struct control *control, struct winnow_client *client, uint64_t generation,
                         int64_t deadline_ns)
{
    *control = (struct control){.client = client, .deadline_ns = deadline_ns};
    int rc = winnow_client_begin(client, generation, &control->deadline_ns,
                                 WINNOW_DEFAULT_CONTROL_NS, &control->link);
    if (rc < 0)
        return rc;
    rc = winnow_wire_arena_create(&control->arena);
    if (rc < 0) {
        winnow_link_unref(control->link);
        return winnow_error_set(rc, "out of memory");
    }
    return 0;
}

static int control_call(struct control *control, const char *method, const void *request,
                        const ProtobufCMessageDescriptor *type, void *ret_reply)
{
    int rc = winnow_link_call(control->link, method, request, type, control->arena,
                              control->deadline_ns, ret_reply, &control->status);
    if (control->status.error < 0)
        rc = winnow_client_note(control->client, &control->status);
    return rc;
}

static void control_end(struct control *control)
{
    winnow_wire_arena_destroy(control->arena);
    winnow_link_unref(control->link);
}

static ProtobufCBinaryData wire_bytes(const uint8_t *data, size_t n_bytes)
{
    return (ProtobufCBinaryData){.data = (uint8_t *)data, .len = n_bytes};
}

static ProtobufCBinaryData link_token(const struct winnow_link *link)
{
    return wire_bytes(link->token, sizeof link->token);
}

/* A request id, by which the daemon knows a repeated request. */
static int id_draw(uint8_t id[WINNOW_WIRE_ID_BYTES])
{
    if (getrandom(id, WINNOW_WIRE_ID_BYTES, 0) != WINNOW_WIRE_ID_BYTES)
        return winnow_error_set(-EIO, "getrandom: %s", strerror(errno));
    return 0;
}

static size_t dtype_bytes(uint32_t dtype)
{
    return dtype == WINNOW_DTYPE_FP32                                 ? 4
           : dtype == WINNOW_DTYPE_FP16 || dtype == WINNOW_DTYPE_BF16 ? 2
                                                                      : 0;
}

/* What the handle's own arithmetic needs; the daemon checks the rest. */
static int model_check(const winnow_model *model)
{
    if (!model->layers || model->layers > N_LAYERS_MAX)
        return winnow_error_set(-EINVAL, "model.layers %u, allowed 1 to %d", model->layers,
                                N_LAYERS_MAX);
    if (!model->q_heads || !model->kv_heads || model->q_heads % model->kv_heads)
        return winnow_error_set(-EINVAL, "model.q_heads %u is no multiple of kv_heads %u",
                                model->q_heads, model->kv_heads);
    if (!dtype_bytes(model->io_dtype))
        return winnow_error_set(-EINVAL, "model.io_dtype %u is none of WINNOW_DTYPE_*",
                                model->io_dtype);
    return 0;
}

static struct winnow_session *session_create(struct winnow_client *client,
                                             const winnow_model *model, uint64_t generation)
{
    struct winnow_session *session =
        calloc(1, sizeof *session + model->layers * sizeof *session->held);
    if (!session)
        return NULL;
    size_t n_bytes = dtype_bytes(model->io_dtype);
    session->model = *model;
    session->generation = generation;
    session->q_bytes = (size_t)model->q_heads * model->k_width * n_bytes;
    session->k_bytes = (size_t)model->kv_heads * model->k_width * n_bytes;
    session->v_bytes = (size_t)model->kv_heads * model->v_width * n_bytes;
    session->out_bytes = (size_t)model->q_heads * model->v_width * n_bytes;
    session->lse_bytes = (size_t)model->q_heads * sizeof(float);
    session->client = client;
    atomic_fetch_add(&client->n_refs, 1);
    return session;
}

static void session_free(struct winnow_session *session)
{
    winnow_client_unref(session->client);
    free(session);
}

/* The two messages borrow from `options`. */
static void options_encode(const winnow_session_options *options, Winnow__V1__ModelShape *model,
                           Winnow__V1__SessionOptions *session)
{
    *model = (Winnow__V1__ModelShape)WINNOW__V1__MODEL_SHAPE__INIT;
    model->layers = options->model.layers;
    model->q_heads = options->model.q_heads;
    model->kv_heads = options->model.kv_heads;
    model->k_width = options->model.k_width;
    model->v_width = options->model.v_width;
    model->softmax_scale = options->model.softmax_scale;
    model->kv_dtype = (Winnow__V1__DType)options->model.kv_dtype;
    model->io_dtype = (Winnow__V1__DType)options->model.io_dtype;
    *session = (Winnow__V1__SessionOptions)WINNOW__V1__SESSION_OPTIONS__INIT;
    session->mode = WINNOW__V1__MODE__MODE_OWN_ALL;
    session->policy = (Winnow__V1__Policy)options->policy;
    session->mass = options->mass;
    session->n_blocks_max = options->n_blocks_max;
    session->n_sinks = options->n_sinks;
    session->n_tokens_max = options->n_tokens_max;
    session->strict = options->strict != 0;
    session->allow_degraded = options->allow_degraded != 0;
    session->admit_nonfinite = options->admit_nonfinite != 0;
}

static int session_open(struct control *control, const winnow_session_options *options,
                        struct winnow_session *session)
{
    Winnow__V1__ModelShape model;
    Winnow__V1__SessionOptions session_options;
    Winnow__V1__OpenSessionRequest request = WINNOW__V1__OPEN_SESSION_REQUEST__INIT;
    Winnow__V1__OpenSessionReply *reply;
    uint8_t request_id[WINNOW_WIRE_ID_BYTES];

    options_encode(options, &model, &session_options);
    request.token = link_token(control->link);
    request.model = &model;
    request.options = &session_options;
    request.label = (char *)(options->label ? options->label : "");
    request.request_id = wire_bytes(request_id, sizeof request_id);
    int rc = id_draw(request_id);
    if (!rc)
        rc = control_call(control, "OpenSession", &request,
                          &winnow__v1__open_session_reply__descriptor, &reply);
    if (rc < 0)
        return rc;
    session->id = reply->session;
    session->model_id = reply->model;
    session->epoch = reply->epoch;
    session->segment_tokens = reply->segment_tokens;
    return 0;
}

int winnow_session_open(winnow_client *client, const winnow_session_options *options,
                        winnow_session **session, int64_t deadline_ns)
{
    if (!options || options->struct_bytes != sizeof *options || !session)
        return winnow_error_set(-EINVAL, "options of winnow_session_open: begin with "
                                         "WINNOW_SESSION_OPTIONS");
    int rc = model_check(&options->model);
    if (rc < 0)
        return rc;
    struct control control;
    rc = control_begin(&control, client, 0, deadline_ns);
    if (rc < 0)
        return rc;
    struct winnow_session *new_session =
        session_create(client, &options->model, control.link->generation);
    rc = new_session ? session_open(&control, options, new_session)
                     : winnow_error_set(-ENOMEM, "out of memory");
    control_end(&control);
    if (rc < 0) {
        if (new_session)
            session_free(new_session);
        return rc;
    }
    *session = new_session;
    return 0;
}

int winnow_session_close(winnow_session *session)
{
    if (!session)
        return 0;
    struct control control;
    int rc = control_begin(&control, session->client, session->generation, 0);
    if (!rc) {
        Winnow__V1__CloseRequest request = WINNOW__V1__CLOSE_REQUEST__INIT;
        void *reply;
        request.token = link_token(control.link);
        request.session = session->id;
        rc =
            control_call(&control, "Close", &request, &winnow__v1__close_reply__descriptor, &reply);
        control_end(&control);
    }
    if (rc != -ECHILD) /* the parent's lock may be held for ever in a child */
        session_free(session);
    return rc;
}

int winnow_session_truncate(winnow_session *session, uint64_t n_tokens, int64_t deadline_ns)
{
    if (!session)
        return winnow_error_set(-EINVAL, "session is NULL");
    struct control control;
    int rc = control_begin(&control, session->client, session->generation, deadline_ns);
    if (rc < 0)
        return rc;
    Winnow__V1__TruncateRequest request = WINNOW__V1__TRUNCATE_REQUEST__INIT;
    Winnow__V1__TruncateReply *reply;
    request.token = link_token(control.link);
    request.session = session->id;
    request.n_tokens = n_tokens;
    rc = control_call(&control, "Truncate", &request, &winnow__v1__truncate_reply__descriptor,
                      &reply);
    if (!rc) {
        session->epoch = reply->epoch;
        /* Layers that a broken call had taken further than this client saw end at n_tokens too. */
        for (uint32_t layer = 0; layer < session->model.layers; layer++)
            if (session->held[layer] > n_tokens || reply->tokens_held == n_tokens)
                session->held[layer] = n_tokens;
    }
    control_end(&control);
    return rc;
}

static int session_fork(struct control *control, struct winnow_session *session, const char *label,
                        struct winnow_session *fork)
{
    Winnow__V1__ForkRequest request = WINNOW__V1__FORK_REQUEST__INIT;
    Winnow__V1__ForkReply *reply;
    uint8_t request_id[WINNOW_WIRE_ID_BYTES];
    request.token = link_token(control->link);
    request.session = session->id;
    request.request_id = wire_bytes(request_id, sizeof request_id);
    request.label = (char *)(label ? label : "");
    int rc = id_draw(request_id);
    if (!rc)
        rc = control_call(control, "Fork", &request, &winnow__v1__fork_reply__descriptor, &reply);
    if (rc < 0)
        return rc;
    fork->id = reply->session;
    fork->epoch = reply->epoch;
    fork->model_id = session->model_id;
    fork->segment_tokens = session->segment_tokens;
    for (uint32_t layer = 0; layer < fork->model.layers; layer++)
        fork->held[layer] = reply->tokens_held;
    return 0;
}

int winnow_session_fork(winnow_session *session, const char *label, winnow_session **fork,
                        int64_t deadline_ns)
{
    if (!session || !fork)
        return winnow_error_set(-EINVAL, "session or fork is NULL");
    struct control control;
    int rc = control_begin(&control, session->client, session->generation, deadline_ns);
    if (rc < 0)
        return rc;
    struct winnow_session *new_session =
        session_create(session->client, &session->model, session->generation);
    rc = new_session ? session_fork(&control, session, label, new_session)
                     : winnow_error_set(-ENOMEM, "out of memory");
    control_end(&control);
    if (rc < 0) {
        if (new_session)
            session_free(new_session);
        return rc;
    }
    *fork = new_session;
    return 0;
}

uint64_t winnow_session_held(const winnow_session *session, uint32_t layer)
{
    return session && layer < session->model.layers ? session->held[layer] : 0;
}

uint64_t winnow_session_truncate_to(const winnow_session *session)
{
    return session ? session->truncate_to : 0;
}

/* ---- stats ---- */

static void stats_take(const Winnow__V1__StatsReply *reply, winnow_stats *stats)
{
#define TAKE(name) stats->name = reply->name
    TAKE(tokens_held);
    TAKE(tokens_sealed);
    TAKE(kv_bytes);
    TAKE(kv_host_bytes);
    TAKE(kv_disk_bytes);
    TAKE(pool_tail_bytes);
    TAKE(pool_cache_bytes);
    TAKE(pool_staging_bytes);
    TAKE(pool_free_bytes);
    TAKE(pool_cap_bytes);
    TAKE(index_bytes);
    TAKE(index_cap_bytes);
    TAKE(disk_used_bytes);
    TAKE(disk_cap_bytes);
    TAKE(steps_exact);
    TAKE(steps_met);
    TAKE(steps_short);
    TAKE(steps_degraded);
    TAKE(second_rounds);
    TAKE(exact_windows);
    TAKE(blocks_total);
    TAKE(blocks_device);
    TAKE(blocks_host);
    TAKE(blocks_disk);
    TAKE(read_bytes_attend);
    TAKE(read_bytes_exact);
    TAKE(read_bytes_readahead);
    TAKE(read_bytes_truncate);
    TAKE(written_bytes);
    TAKE(rss_bytes);
    TAKE(rss_peak_bytes);
    TAKE(printed_bytes);
    TAKE(mass_mean);
    TAKE(device_steps);
    TAKE(device_launches);
    TAKE(device_hits);
    TAKE(device_misses);
    TAKE(device_evictions);
    TAKE(device_unfit);
    TAKE(device_windows);
#undef TAKE
}

int winnow_stats_get(winnow_client *client, winnow_session *session, winnow_stats *stats,
                     int64_t deadline_ns)
{
    if (!stats || stats->struct_bytes != sizeof *stats)
        return winnow_error_set(-EINVAL, "stats of winnow_stats_get: begin with WINNOW_STATS");
    struct control control;
    int rc = control_begin(&control, client, session ? session->generation : 0, deadline_ns);
    if (rc < 0)
        return rc;
    Winnow__V1__StatsRequest request = WINNOW__V1__STATS_REQUEST__INIT;
    Winnow__V1__StatsReply *reply;
    if (session) {
        request.token = link_token(control.link);
        request.session = session->id;
    }
    rc = control_call(&control, "Stats", &request, &winnow__v1__stats_reply__descriptor, &reply);
    if (!rc)
        stats_take(reply, stats);
    control_end(&control);
    return rc;
}
