/* Every number, flag and identity of every request, set to values at the edges of its type, one at
 * a time in an otherwise good call: each is answered, with whatever status, and the daemon is as it
 * was. Fields are found by their descriptors: a new one is tried without a line here, and a request
 * that no call below makes fails the test. */
#include <base/clock.h>
#include <errno.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <system/raw.h>
#include <test.h>

enum { N_MESSAGES_MAX = 3, N_EDGES = 16, N_FIELDS_MAX = 256 };

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};

static const uint64_t integers[N_EDGES] = {
    0,
    1,
    2,
    15,
    127,
    255,
    256,
    65535,
    65536,
    INT32_MAX,
    UINT64_C(1) << 31,
    UINT32_MAX,
    UINT64_C(1) << 32,
    INT64_MAX,
    UINT64_C(1) << 63,
    UINT64_MAX,
};
static const float floats[N_EDGES] = {
    0,        -0.0F,  1,         -1,  0.5F, 1.0000001F, 1e-45F, 1e38F,
    INFINITY, -1e38F, -INFINITY, NAN, -NAN, 2,          255,    1e-6F,
};

/* A good call, before one of its fields is bent. */
struct call {
    const char *method;
    struct raw_message message[N_MESSAGES_MAX];
    uint32_t n_messages;
    uint8_t *fresh_id;     /* an id to be another one in each call; NULL: none */
    uint32_t *fresh_epoch; /* the session is emptied before each call, its epoch goes here */
};

struct edges {
    struct raw raw;
    const struct call *call;
    uint32_t n_calls, n_ok;
    const ProtobufCFieldDescriptor *tried[N_FIELDS_MAX];
    uint32_t n_tried;
};

static void edge_try(struct edges *edges, const char *field, uint32_t edge)
{
    const struct call *call = edges->call;
    struct winnow_status status =
        raw_send(&edges->raw, call->method, call->message, call->n_messages, NULL, NULL);
    edges->n_calls++;
    edges->n_ok += !status.error;
    if (status.local && status.error) {
        fprintf(stderr, "%s with edge %u of %s: %d %s\n", call->method, edge, field, status.error,
                status.text);
        CHECK(!"the daemon answers");
    }
}

/* Before a field is bent: as if no call had been made before. */
static void edge_prepare(struct edges *edges)
{
    const struct call *call = edges->call;
    struct raw *raw = &edges->raw;
    if (call->fresh_id)
        memcpy(call->fresh_id, &edges->n_calls, sizeof edges->n_calls);
    if (!call->fresh_epoch)
        return;
    Winnow__V1__TruncateRequest truncate = WINNOW__V1__TRUNCATE_REQUEST__INIT;
    const Winnow__V1__TruncateReply *reply;
    truncate.token = raw_token(raw);
    truncate.session = raw->session;
    CHECK_EQ(raw_send(raw, "Truncate", &(struct raw_message){&truncate, 0}, 1,
                      &winnow__v1__truncate_reply__descriptor, &reply)
                 .error,
             0);
    *call->fresh_epoch = reply->epoch;
}

static void edge_number(struct edges *edges, const ProtobufCFieldDescriptor *field, void *value)
{
    size_t n_bytes = field->type == PROTOBUF_C_TYPE_UINT64 ? 8 : 4;
    uint8_t good[8];
    memcpy(good, value, n_bytes);
    for (uint32_t edge = 0; edge < N_EDGES; edge++) {
        edge_prepare(edges);
        const void *bent =
            field->type == PROTOBUF_C_TYPE_FLOAT ? (const void *)&floats[edge] : &integers[edge];
        memcpy(value, bent, n_bytes); /* little-endian: the low bytes of a wider one */
        edge_try(edges, field->name, edge);
        memcpy(value, good, n_bytes);
    }
}

static void edge_bytes(struct edges *edges, const ProtobufCFieldDescriptor *field, void *value)
{
    static uint8_t long_bytes[4096];
    static const size_t lengths[] = {0, 1, 15, 16, 17, 33, 64, sizeof long_bytes};
    ProtobufCBinaryData good = *(ProtobufCBinaryData *)value;
    for (uint32_t edge = 0; edge < sizeof lengths / sizeof *lengths; edge++) {
        edge_prepare(edges);
        *(ProtobufCBinaryData *)value = (ProtobufCBinaryData){lengths[edge], long_bytes};
        edge_try(edges, field->name, edge);
        *(ProtobufCBinaryData *)value = good;
    }
}

static bool field_is_tried(const struct edges *edges, const ProtobufCFieldDescriptor *field)
{
    for (uint32_t i = 0; i < edges->n_tried; i++)
        if (edges->tried[i] == field)
            return true;
    return false;
}

static void edge_message(struct edges *edges, ProtobufCMessage *message);

static void edge_field(struct edges *edges, ProtobufCMessage *message,
                       const ProtobufCFieldDescriptor *field)
{
    void *value = (uint8_t *)message + field->offset;
    if (!field_is_tried(edges, field)) {
        CHECK(edges->n_tried < N_FIELDS_MAX);
        edges->tried[edges->n_tried++] = field;
    }
    if (field->label == PROTOBUF_C_LABEL_REPEATED) {
        size_t n_values = *(size_t *)((uint8_t *)message + field->quantifier_offset);
        for (size_t i = 0; i < n_values; i++)
            edge_message(edges, (*(ProtobufCMessage ***)value)[i]);
        return;
    }
    switch (field->type) {
    case PROTOBUF_C_TYPE_MESSAGE:
        if (*(ProtobufCMessage **)value)
            edge_message(edges, *(ProtobufCMessage **)value);
        break;
    case PROTOBUF_C_TYPE_BYTES:
        if (field->id != WINNOW_WIRE_TENSOR_FIELD)
            edge_bytes(edges, field, value);
        break;
    case PROTOBUF_C_TYPE_STRING: /* labels: test_denied */
        break;
    case PROTOBUF_C_TYPE_BOOL:
        edge_prepare(edges);
        *(protobuf_c_boolean *)value = !*(protobuf_c_boolean *)value;
        edge_try(edges, field->name, 0);
        *(protobuf_c_boolean *)value = !*(protobuf_c_boolean *)value;
        break;
    default:
        edge_number(edges, field, value);
    }
}

static void edge_message(struct edges *edges, ProtobufCMessage *message)
{
    for (uint32_t i = 0; i < message->descriptor->n_fields; i++)
        edge_field(edges, message, &message->descriptor->fields[i]);
}

/* Every field of a request, and of the messages in it, was bent in some call. */
static void edge_check_all(const struct edges *edges, const ProtobufCMessageDescriptor *type)
{
    for (uint32_t i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
        if (field->type == PROTOBUF_C_TYPE_MESSAGE) {
            edge_check_all(edges, field->descriptor);
        } else if (!field_is_tried(edges, field)) {
            fprintf(stderr, "%s.%s\n", type->name, field->name);
            CHECK(!"every field of every request is tried");
        }
    }
}

static void edge_call(struct edges *edges, const struct call *call)
{
    uint32_t n_before = edges->n_calls, n_ok_before = edges->n_ok;
    edges->call = call;
    edge_prepare(edges);
    edge_try(edges, "(nothing)", 0); /* unbent it is good, or all that follows proves little */
    if (edges->n_ok == n_ok_before) {
        edge_prepare(edges);
        struct winnow_status status =
            raw_send(&edges->raw, call->method, call->message, call->n_messages, NULL, NULL);
        fprintf(stderr, "%s: %d %s\n", call->method, status.error, status.text);
        CHECK(!"the call is good before it is bent");
    }
    for (uint32_t i = 0; i < call->n_messages; i++)
        edge_message(edges, call->message[i].message);
    printf("%-12s %4u calls, %u accepted\n", call->method, edges->n_calls - n_before,
           edges->n_ok - n_ok_before);
}

static void edge_session_calls(struct edges *edges)
{
    struct raw *raw = &edges->raw;
    Winnow__V1__ModelShape shape = raw_shape();
    CHECK_EQ(raw_open_session(raw, &shape, NULL, "edges").error, 0);
    uint8_t id[WINNOW_WIRE_ID_BYTES] = {9};
    ProtobufCBinaryData token = raw_token(raw), some_id = {sizeof id, id};

    Winnow__V1__TruncateRequest truncate = WINNOW__V1__TRUNCATE_REQUEST__INIT;
    truncate.token = token;
    truncate.session = raw->session;
    edge_call(edges, &(struct call){"Truncate", {{&truncate, 0}}, 1, NULL, NULL});

    Winnow__V1__StatsRequest stats = WINNOW__V1__STATS_REQUEST__INIT;
    stats.token = token;
    stats.session = raw->session;
    edge_call(edges, &(struct call){"Stats", {{&stats, 0}}, 1, NULL, NULL});

    Winnow__V1__ForkRequest fork = WINNOW__V1__FORK_REQUEST__INIT;
    fork.token = token;
    fork.session = raw->session;
    fork.request_id = some_id;
    edge_call(edges, &(struct call){"Fork", {{&fork, 0}}, 1, id, NULL});

    CHECK_EQ(raw_open_session(raw, &shape, NULL, "edges").error, 0);
    Winnow__V1__AppendMessage append_head = WINNOW__V1__APPEND_MESSAGE__INIT;
    Winnow__V1__AppendMessage append_chunk = WINNOW__V1__APPEND_MESSAGE__INIT;
    append_head.token = token;
    append_head.session = raw->session;
    append_head.epoch = raw->epoch;
    append_head.append_id = some_id;
    append_chunk.n_tokens = 3;
    edge_call(edges, &(struct call){"Append",
                                    {{&append_head, 0}, {&append_chunk, 3 * RAW_KV_BYTES}},
                                    2,
                                    id,
                                    &append_head.epoch});

    CHECK_EQ(raw_open_session(raw, &shape, NULL, "edges").error, 0);
    Winnow__V1__AttendRequest attend = WINNOW__V1__ATTEND_REQUEST__INIT;
    Winnow__V1__AttendItem item = WINNOW__V1__ATTEND_ITEM__INIT, *items[] = {&item};
    attend.token = token;
    attend.seq = 1;
    attend.model = raw->model;
    attend.n_items = 1;
    attend.items = items;
    item.session = raw->session;
    item.epoch = raw->epoch;
    item.flags = WINNOW_WIRE_HAS_KV;
    edge_call(edges, &(struct call){
                         "Attend", {{&attend, RAW_Q_BYTES + RAW_KV_BYTES}}, 1, NULL, &item.epoch});

    CHECK_EQ(raw_open_session(raw, &shape, NULL, "edges").error, 0);
    Winnow__V1__AttendExactMessage head = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    Winnow__V1__AttendExactMessage kv = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    Winnow__V1__AttendExactMessage q = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    head.token = token;
    head.session = raw->session;
    head.epoch = raw->epoch;
    head.n_tokens = kv.n_chunk = q.n_chunk = 2;
    kv.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV;
    q.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q;
    edge_call(edges, &(struct call){"AttendExact",
                                    {{&head, 0}, {&kv, 2 * RAW_KV_BYTES}, {&q, 2 * RAW_Q_BYTES}},
                                    3,
                                    NULL,
                                    &head.epoch});

    CHECK_EQ(raw_open_session(raw, &shape, NULL, "edges").error, 0);
    Winnow__V1__CloseRequest close_request = WINNOW__V1__CLOSE_REQUEST__INIT;
    close_request.token = token;
    close_request.session = raw->session;
    edge_call(edges, &(struct call){"Close", {{&close_request, 0}}, 1, NULL, NULL});
}

static void edge_open_calls(struct edges *edges)
{
    Winnow__V1__InfoRequest info = WINNOW__V1__INFO_REQUEST__INIT;
    info.client = (char *)"edges";
    info.proto_min = info.proto_max = WINNOW_WIRE_PROTO;
    edge_call(edges, &(struct call){"Info", {{&info, 0}}, 1, NULL, NULL});

    Winnow__V1__LeaseBeat beat = WINNOW__V1__LEASE_BEAT__INIT;
    edge_call(edges, &(struct call){"Lease", {{&beat, 0}}, 1, NULL, NULL});

    Winnow__V1__ModelShape shape = raw_shape();
    Winnow__V1__SessionOptions options = WINNOW__V1__SESSION_OPTIONS__INIT;
    Winnow__V1__OpenSessionRequest open = WINNOW__V1__OPEN_SESSION_REQUEST__INIT;
    uint8_t id[WINNOW_WIRE_ID_BYTES] = {7}, weights_id[32] = {1}, branch[4] = {1};
    open.token = raw_token(&edges->raw);
    open.model = &shape;
    open.options = &options;
    open.label = (char *)"edges";
    open.request_id = (ProtobufCBinaryData){sizeof id, id};
    shape.weights_id = (ProtobufCBinaryData){sizeof weights_id, weights_id};
    shape.branch = (ProtobufCBinaryData){sizeof branch, branch};
    edge_call(edges, &(struct call){"OpenSession", {{&open, 0}}, 1, id, NULL});
}

static void test_edges__each_is_answered_and_leaves_nothing(void)
{
    struct daemon daemon;
    struct edges edges = {0};
    struct engine engine;
    double error = 0;
    winnow_model model = engine_model(2, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, 1, 800, NULL);
    ENGINE_OK(engine_window(&engine, 400, NULL));
    raw_open(&edges.raw, daemon.socket);
    edge_session_calls(&edges);
    edge_open_calls(&edges);
    raw_close(&edges.raw);
    for (uint32_t i = 0; i < winnow__v1__winnow__descriptor.n_methods; i++)
        edge_check_all(&edges, winnow__v1__winnow__descriptor.methods[i].input);
    TEST_ROW(F15, edges.n_calls);

    /* A neighbour was not touched, and with its own lease all that edges opened has gone. */
    ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 1, .error = &error}));
    CHECK(error < 1e-5);
    winnow_stats stats = WINNOW_STATS;
    int64_t give_up_ns = winnow_clock_now_ns() + 5 * WINNOW_NS_PER_S;
    do {
        CHECK(winnow_clock_now_ns() < give_up_ns);
        ENGINE_OK(winnow_stats_get(engine.client, NULL, &stats, 0));
    } while (stats.tokens_held != 401);
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_edges__each_is_answered_and_leaves_nothing);
    return TEST_END();
}
