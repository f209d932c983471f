/* What is refused: foreign handles, odd shapes and values, messages no honest client sends. Each
 * has its own errno, and the daemon serves on afterwards. */
#include <errno.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <system/raw.h>
#include <test.h>

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};
static struct daemon daemon_all;

/* One message with a tensor. */
static struct winnow_status send_one(struct raw *raw, const char *method, void *message,
                                     size_t tensor_bytes)
{
    return raw_send(raw, method, &(struct raw_message){message, tensor_bytes}, 1, NULL, NULL);
}

static winnow_model plain_model(void)
{
    return engine_model(2, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
}

/* The same for the three streams: Append and AttendExact by status, an Attend item by its own. */
static void deny_streams(struct raw *raw, uint64_t session, const char *text)
{
    Winnow__V1__AppendMessage append = WINNOW__V1__APPEND_MESSAGE__INIT;
    Winnow__V1__AttendExactMessage exact = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    Winnow__V1__AttendRequest attend = WINNOW__V1__ATTEND_REQUEST__INIT;
    Winnow__V1__AttendItem item = WINNOW__V1__ATTEND_ITEM__INIT, *items[] = {&item};
    const Winnow__V1__AttendReply *reply;
    append.token = exact.token = attend.token = raw_token(raw);
    append.session = exact.session = item.session = session;
    exact.n_tokens = 1;
    attend.model = raw->model;
    attend.n_items = 1;
    attend.items = items;
    struct winnow_status status = raw_call(raw, "Append", &append);
    CHECK_EQ(status.error, -ENOENT);
    CHECK_STR(status.text, text);
    status = raw_call(raw, "AttendExact", &exact);
    CHECK_EQ(status.error, -ENOENT);
    CHECK_STR(status.text, text);
    status = raw_send(raw, "Attend", &(struct raw_message){&attend, RAW_Q_BYTES}, 1,
                      &winnow__v1__attend_reply__descriptor, &reply);
    CHECK_EQ(status.error, 0);
    CHECK(reply && reply->n_results == 1);
    CHECK_EQ(reply->results[0]->status, -ENOENT);
    CHECK_STR(reply->results[0]->text, text);
}

/* What is tried below; a request that names a session and is not here fails the test. */
static const char *const denied[] = {"Truncate", "Fork",   "Stats",      "Close",
                                     "Append",   "Attend", "AttendExact"};

static bool names_session(const ProtobufCMessageDescriptor *type)
{
    for (uint32_t i = 0; i < type->n_fields; i++)
        if (!strcmp(type->fields[i].name, "session") ||
            (type->fields[i].type == PROTOBUF_C_TYPE_MESSAGE &&
             names_session(type->fields[i].descriptor)))
            return true;
    return false;
}

static void denied_check_all(void)
{
    uint32_t n_found = 0;
    for (uint32_t i = 0; i < winnow__v1__winnow__descriptor.n_methods; i++) {
        const ProtobufCMethodDescriptor *method = &winnow__v1__winnow__descriptor.methods[i];
        bool is_listed = false;
        for (uint32_t j = 0; j < sizeof denied / sizeof *denied; j++)
            is_listed |= !strcmp(method->name, denied[j]);
        CHECK_EQ(is_listed, names_session(method->input));
        n_found += is_listed;
    }
    CHECK_EQ(n_found, sizeof denied / sizeof *denied);
}

/* Another client's session, a made-up one, one closed, and one under a made-up token are denied in
 * the same words: nobody learns which ids exist. */
static void test_denied__foreign_handles_all_look_alike(void)
{
    struct raw mine, other;
    Winnow__V1__ModelShape shape = raw_shape();
    raw_open(&mine, daemon_all.socket);
    raw_open(&other, daemon_all.socket);
    CHECK_EQ(raw_open_session(&mine, &shape, NULL, "mine").error, 0);
    CHECK_EQ(raw_open_session(&other, &shape, NULL, "other").error, 0);

    struct raw ended; /* its lease goes while its session is still there, or has gone */
    raw_open(&ended, daemon_all.socket);
    CHECK_EQ(raw_open_session(&ended, &shape, NULL, "ended").error, 0);
    raw_close(&ended);
    uint64_t ids[] = {mine.session, 0, 1, mine.session + 1, UINT64_MAX, other.session,
                      ended.session};
    char text[WINNOW_STATUS_TEXT_BYTES] = "";
    Winnow__V1__CloseRequest close_request = WINNOW__V1__CLOSE_REQUEST__INIT;
    close_request.token = raw_token(&other);
    close_request.session = other.session;
    CHECK_EQ(raw_call(&other, "Close", &close_request).error, 0);
    other.model = mine.model;
    for (uint32_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        Winnow__V1__TruncateRequest truncate = WINNOW__V1__TRUNCATE_REQUEST__INIT;
        Winnow__V1__ForkRequest fork = WINNOW__V1__FORK_REQUEST__INIT;
        Winnow__V1__StatsRequest stats = WINNOW__V1__STATS_REQUEST__INIT;
        uint8_t request_id[16] = {(uint8_t)(i + 1)};
        truncate.token = fork.token = stats.token = close_request.token = raw_token(&other);
        truncate.session = fork.session = stats.session = close_request.session = ids[i];
        fork.request_id = (ProtobufCBinaryData){sizeof request_id, request_id};
        const struct {
            const char *method;
            void *message;
        } calls[] = {
            {"Truncate", &truncate}, {"Fork", &fork}, {"Stats", &stats}, {"Close", &close_request}};
        for (uint32_t j = 0; j < 4; j++) {
            if (j == 2 && !ids[i])
                continue; /* Stats of session 0: all of the lease's own */
            struct winnow_status status = raw_call(&other, calls[j].method, calls[j].message);
            CHECK_EQ(status.error, -ENOENT);
            if (!*text)
                strcpy(text, status.text);
            CHECK_STR(status.text, text);
        }
        deny_streams(&other, ids[i], text);
    }
    Winnow__V1__TruncateRequest forged = WINNOW__V1__TRUNCATE_REQUEST__INIT;
    uint8_t token[WINNOW_WIRE_ID_BYTES] = {1, 2, 3};
    forged.token = (ProtobufCBinaryData){sizeof token, token};
    forged.session = mine.session;
    struct winnow_status status = raw_call(&other, "Truncate", &forged);
    CHECK_EQ(status.error, -ENOENT);
    CHECK_STR(status.text, text);
    denied_check_all();
    TEST_ROW(F16, sizeof ids / sizeof *ids * (sizeof denied / sizeof *denied));
    raw_close(&mine);
    raw_close(&other);
}

/* Impossible models and options are refused at the door, with a word on what and why. */
static void test_denied__impossible_sessions(void)
{
    struct raw raw;
    raw_open(&raw, daemon_all.socket);
    for (uint32_t i = 0; i < 16; i++) {
        Winnow__V1__ModelShape shape = raw_shape();
        Winnow__V1__SessionOptions options = WINNOW__V1__SESSION_OPTIONS__INIT;
        char label[80] = "label";
        uint32_t *const fields[] = {&shape.layers, &shape.q_heads, &shape.kv_heads, &shape.k_width,
                                    &shape.v_width};
        if (i < 5)
            *fields[i] = 0;
        else if (i < 10)
            *fields[i - 5] = UINT32_MAX;
        else if (i == 10)
            shape.softmax_scale = NAN;
        else if (i == 11)
            shape.kv_dtype = 9;
        else if (i == 12)
            options.mass = 1.5F;
        else if (i == 13)
            options.policy = 99;
        else if (i == 14)
            strcpy(label, "no spaces");
        else
            memset(label, 'x', WINNOW_WIRE_LABEL_BYTES_MAX + 1);
        struct winnow_status status = raw_open_session(&raw, &shape, &options, label);
        if (status.error != -EINVAL || !*status.text || status.local) {
            fprintf(stderr, "case %u: %d %s\n", i, status.error, status.text);
            CHECK(!"an impossible session is -EINVAL with a text");
        }
    }
    Winnow__V1__ModelShape shape = raw_shape();
    Winnow__V1__SessionOptions options = WINNOW__V1__SESSION_OPTIONS__INIT;
    options.mode = WINNOW__V1__MODE__MODE_MERGE;
    CHECK_EQ(raw_open_session(&raw, &shape, &options, "").error, -ENOTSUP);
    options = (Winnow__V1__SessionOptions)WINNOW__V1__SESSION_OPTIONS__INIT;
    options.n_tokens_max = UINT64_C(1) << 60; /* its index fits nowhere */
    int error = raw_open_session(&raw, &shape, &options, "").error;
    CHECK(error == -EDQUOT || error == -EINVAL);
    shape.layers = 128; /* 128 layers of 512 + 96 tokens do not fit 32 MiB */
    shape.kv_heads = shape.q_heads = 32;
    options.n_tokens_max = 0;
    struct winnow_status status = raw_open_session(&raw, &shape, &options, "");
    CHECK_EQ(status.error, -EDQUOT);
    CHECK(strstr(status.text, "host_pool"));
    raw_close(&raw);
}

/* Bytes that are no message, fields nobody knows, methods nobody serves. */
static void test_denied__malformed_messages(void)
{
    static const char *const methods[] = {"Info",        "OpenSession", "Truncate", "Fork",
                                          "Close",       "Stats",       "Append",   "Attend",
                                          "AttendExact", "Lease"};
    struct raw raw;
    raw_open(&raw, daemon_all.socket);
    for (uint32_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        struct winnow_status status = raw_send_bytes(&raw, methods[i], "\377\377\377\377\377", 5);
        CHECK_EQ(status.error, -EINVAL);
        status = raw_send_bytes(&raw, methods[i], "\352\006\001x", 4); /* field 109 */
        CHECK_EQ(status.error, -EINVAL);
        CHECK(strstr(status.text, "109"));
    }
    CHECK_EQ(raw_send_bytes(&raw, "Everything", "", 0).error, -ENOTSUP);

    /* Far more than a message may have. */
    size_t n_bytes = 3 << 20;
    uint8_t *large = calloc(1, n_bytes);
    struct winnow_status status = raw_send_bytes(&raw, "Attend", large, n_bytes);
    CHECK(status.error == -EMSGSIZE || status.error == -EDQUOT);
    free(large);
    raw_close(&raw);
}

/* Attend and Append streams out of order: data before the header, tokens that leave a gap, another
 * layer's count, chunks of a wrong size. */
static void test_denied__streams_out_of_order(void)
{
    struct raw raw;
    Winnow__V1__ModelShape shape = raw_shape();
    raw_open(&raw, daemon_all.socket);
    CHECK_EQ(raw_open_session(&raw, &shape, NULL, "").error, 0);

    Winnow__V1__AppendMessage chunk = WINNOW__V1__APPEND_MESSAGE__INIT;
    chunk.n_tokens = 1;
    CHECK_EQ(send_one(&raw, "Append", &chunk, RAW_KV_BYTES).error, -ENOENT);
    Winnow__V1__AttendExactMessage part = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    part.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q;
    part.n_chunk = 1;
    CHECK_EQ(send_one(&raw, "AttendExact", &part, RAW_Q_BYTES).error, -ENOENT);

    Winnow__V1__AttendRequest attend = WINNOW__V1__ATTEND_REQUEST__INIT;
    Winnow__V1__AttendItem item = WINNOW__V1__ATTEND_ITEM__INIT, *items[] = {&item};
    attend.token = raw_token(&raw);
    attend.model = raw.model;
    attend.n_items = 1;
    attend.items = items;
    item.session = raw.session;
    CHECK_EQ(send_one(&raw, "Attend", &attend, 17).error, -EINVAL);
    attend.n_items = 0;
    CHECK_EQ(raw_call(&raw, "Attend", &attend).error, -EMSGSIZE);
    attend.n_items = 1;
    attend.model = raw.model + 1000;
    CHECK_EQ(send_one(&raw, "Attend", &attend, RAW_Q_BYTES).error, -ENOENT);
    raw_close(&raw);

    struct engine engine;
    winnow_model model = plain_model();
    engine_open(&engine, daemon_all.socket, &model, 1, 600, NULL);
    ENGINE_OK(engine_window(&engine, 100, NULL));
    float zeros[4 * 64] = {0}, out[4 * 64];
    CHECK_EQ(winnow_append(engine.session, 0, 101, 1, zeros, zeros, 0), -EINVAL);
    CHECK(strstr(winnow_error_text(), "100"));
    CHECK_EQ(winnow_append(engine.session, 0, 99, 1, zeros, zeros, 0), -EINVAL);
    CHECK_EQ(winnow_attend_exact(engine.session, 1, 90, 1, zeros, zeros, zeros, out, NULL, NULL, 0),
             -EINVAL);
    winnow_attend_item odd = {
        .session = engine.session, .position = 99, .q = zeros, .k = zeros, .v = zeros, .out = out};
    CHECK_EQ(winnow_attend(engine.client, 0, &odd, 1, 0), 0);
    CHECK_EQ(odd.status, -EINVAL);
    /* Layers of different length cannot fork; truncated to the shorter one they can. */
    winnow_session *fork;
    ENGINE_OK(winnow_append(engine.session, 0, 100, 1, zeros, zeros, 0));
    CHECK_EQ(winnow_session_fork(engine.session, "", &fork, 0), -EINVAL);
    ENGINE_OK(engine_truncate(&engine, 100));
    ENGINE_OK(winnow_session_fork(engine.session, "", &fork, 0));
    winnow_session_close(fork);
    engine_close(&engine);
}

/* NaN and Inf in q, k or v are -EDOM, in each call and dtype, and append nothing. */
static void test_denied__nonfinite_values(void)
{
    static const uint32_t dtypes[] = {WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP16, WINNOW_DTYPE_BF16};
    static const uint32_t nan_bits[] = {0x7fc00000, 0x7e00, 0x7fc0};
    static const uint32_t inf_bits[] = {0xff800000, 0xfc00, 0xff80};
    for (uint32_t i = 0; i < 3; i++) {
        struct engine engine;
        winnow_model model = engine_model(1, 2, 1, 64, 64, WINNOW_DTYPE_FP16, dtypes[i]);
        engine_open(&engine, daemon_all.socket, &model, 1, 600, NULL);
        ENGINE_OK(engine_window(&engine, 50, NULL));
        uint8_t good[2 * 64 * 4] = {0}, bad[2 * 64 * 4] = {0}, out[2 * 64 * 4];
        size_t n_bytes = dtypes[i] == WINNOW_DTYPE_FP32 ? 4 : 2;
        for (uint32_t j = 0; j < 2; j++) {
            memcpy(bad + 37 * n_bytes, j ? &inf_bits[i] : &nan_bits[i], n_bytes);
            CHECK_EQ(winnow_append(engine.session, 0, 50, 1, bad, good, 0), -EDOM);
            CHECK_EQ(winnow_append(engine.session, 0, 50, 1, good, bad, 0), -EDOM);
            CHECK_EQ(
                winnow_attend_exact(engine.session, 0, 50, 1, good, good, bad, out, NULL, NULL, 0),
                -EDOM);
            winnow_attend_item item = {.session = engine.session,
                                       .position = 50,
                                       .q = good,
                                       .k = bad,
                                       .v = good,
                                       .out = out};
            CHECK_EQ(winnow_attend(engine.client, 0, &item, 1, 0), 0);
            CHECK_EQ(item.status, -EDOM);
            CHECK(*winnow_error_text());
        }
        double error = 0;
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 1, .error = &error}));
        CHECK(error < 1.6e-2);
        engine_close(&engine);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    daemon_init(&daemon_all, small);
    daemon_start(&daemon_all);
    TEST_RUN(test_denied__foreign_handles_all_look_alike);
    TEST_RUN(test_denied__impossible_sessions);
    TEST_RUN(test_denied__malformed_messages);
    TEST_RUN(test_denied__streams_out_of_order);
    TEST_RUN(test_denied__nonfinite_values);
    CHECK_EQ(daemon_stop(&daemon_all, SIGTERM), 0); /* after all that */
    daemon_remove(&daemon_all);
    return TEST_END();
}
