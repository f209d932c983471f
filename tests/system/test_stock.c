/* A stock gRPC client: what it may count on, and what it may get wrong. No code of libwinnow's is
 * used but to bring a daemon where it is asked, so a fault that both of our sides share is seen. */
#include <errno.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <proto/wire.h>
#include <signal.h>
#include <string.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>
#include <unistd.h>

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};
static struct daemon server;
static grpc_channel *channel;
static grpc_completion_queue *queue;

/* A call as it went. */
struct stock {
    grpc_call *call;
    grpc_metadata_array initial, trailing;
    grpc_status_code code;
    grpc_slice text;
    uint8_t reply[4096];
    size_t reply_bytes;
    bool has_reply;
};

/* Runs a batch to its end; false: it failed, or is not back in time. */
static bool run(grpc_call *call, grpc_op *ops, size_t n_ops)
{
    gpr_timespec until =
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(5, GPR_TIMESPAN));
    CHECK_EQ(grpc_call_start_batch(call, ops, n_ops, ops, NULL), GRPC_CALL_OK);
    grpc_event event = grpc_completion_queue_next(queue, until, NULL);
    CHECK(event.type == GRPC_OP_COMPLETE && event.tag == ops);
    return event.success != 0;
}

static void stock_open(struct stock *stock, const char *path)
{
    *stock = (struct stock){0};
    grpc_slice slice = grpc_slice_from_copied_string(path);
    gpr_timespec deadline =
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(5, GPR_TIMESPAN));
    stock->call = grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue, slice,
                                           NULL, deadline, NULL);
    grpc_slice_unref(slice);
    grpc_metadata_array_init(&stock->initial);
    grpc_metadata_array_init(&stock->trailing);
}

static void stock_close(struct stock *stock)
{
    grpc_metadata_array_destroy(&stock->initial);
    grpc_metadata_array_destroy(&stock->trailing);
    grpc_slice_unref(stock->text);
    grpc_call_unref(stock->call);
}

static void reply_take(struct stock *stock, grpc_byte_buffer *buffer)
{
    grpc_byte_buffer_reader reader;
    if (!buffer)
        return;
    CHECK(grpc_byte_buffer_reader_init(&reader, buffer));
    grpc_slice flat = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    stock->has_reply = true;
    stock->reply_bytes = GRPC_SLICE_LENGTH(flat);
    CHECK(stock->reply_bytes <= sizeof stock->reply);
    memcpy(stock->reply, GRPC_SLICE_START_PTR(flat), stock->reply_bytes);
    grpc_slice_unref(flat);
    grpc_byte_buffer_destroy(buffer);
}

/* A unary call in one batch: n_bytes as the message (data NULL: none), `extra` more metadata. */
static void stock_call(struct stock *stock, const char *path, const void *data, size_t n_bytes,
                       grpc_metadata *extra)
{
    grpc_byte_buffer *received = NULL, *sent = NULL;
    grpc_op ops[6];
    size_t n = 0;
    memset(ops, 0, sizeof ops);
    stock_open(stock, path);
    ops[n].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[n].data.send_initial_metadata.metadata = extra;
    ops[n++].data.send_initial_metadata.count = extra ? 1 : 0;
    if (data) {
        grpc_slice slice = grpc_slice_from_copied_buffer(data, n_bytes);
        sent = grpc_raw_byte_buffer_create(&slice, 1);
        grpc_slice_unref(slice);
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = sent;
    }
    ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    ops[n].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[n++].data.recv_initial_metadata.recv_initial_metadata = &stock->initial;
    ops[n].op = GRPC_OP_RECV_MESSAGE;
    ops[n++].data.recv_message.recv_message = &received;
    ops[n].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[n].data.recv_status_on_client.trailing_metadata = &stock->trailing;
    ops[n].data.recv_status_on_client.status = &stock->code;
    ops[n++].data.recv_status_on_client.status_details = &stock->text;
    run(stock->call, ops, n);
    reply_take(stock, received);
    if (sent)
        grpc_byte_buffer_destroy(sent);
}

/* The value under `key`, NUL-ended; NULL: it is not there. */
static const char *metadata_find(const grpc_metadata_array *array, const char *key,
                                 size_t *ret_bytes)
{
    static char value[256];
    for (size_t i = 0; i < array->count; i++) {
        if (grpc_slice_str_cmp(array->metadata[i].key, key))
            continue;
        size_t n_bytes = GRPC_SLICE_LENGTH(array->metadata[i].value);
        CHECK(n_bytes < sizeof value);
        memcpy(value, GRPC_SLICE_START_PTR(array->metadata[i].value), n_bytes);
        value[n_bytes] = 0;
        if (ret_bytes)
            *ret_bytes = n_bytes;
        return value;
    }
    return NULL;
}

static void expect(const struct stock *stock, grpc_status_code code, int error)
{
    char number[16];
    snprintf(number, sizeof number, "%d", error);
    const char *reason = metadata_find(&stock->trailing, WINNOW_WIRE_KEY_REASON, NULL);
    CHECK_EQ(stock->code, code);
    CHECK(reason && !strcmp(reason, number));
    CHECK(GRPC_SLICE_LENGTH(stock->text) > 0);
}

/* The boot id is there before a word is said: a client that waits for it is not left waiting. */
static void test_stock__metadata_comes_unasked(void)
{
    static const char *const paths[] = {"/winnow.v1.Winnow/Lease", "/winnow.v1.Winnow/Attend",
                                        "/winnow.v1.Winnow/Append", "/grpc.health.v1.Health/Watch"};
    uint8_t boot[2][16];
    for (uint32_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        struct stock stock;
        grpc_op ops[2];
        size_t n_bytes = 0;
        memset(ops, 0, sizeof ops);
        stock_open(&stock, paths[i]);
        ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
        ops[1].op = GRPC_OP_RECV_INITIAL_METADATA;
        ops[1].data.recv_initial_metadata.recv_initial_metadata = &stock.initial;
        CHECK(run(stock.call, ops, 2));
        const char *id = metadata_find(&stock.initial, WINNOW_WIRE_KEY_BOOT, &n_bytes);
        CHECK(id);
        CHECK_EQ(n_bytes, 16);
        memcpy(boot[i > 0], id, 16);
        CHECK(!memcmp(boot[0], boot[i > 0], 16));
        grpc_call_cancel(stock.call, NULL);
        stock_close(&stock);
    }
}

/* A unary call that ends without its message is told so; it does not hang. */
static void test_stock__a_message_is_missing(void)
{
    static const char *const methods[] = {"Info", "OpenSession", "Truncate",
                                          "Fork", "Close",       "Stats"};
    for (uint32_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        struct stock stock;
        char path[64];
        snprintf(path, sizeof path, "/winnow.v1.Winnow/%s", methods[i]);
        stock_call(&stock, path, NULL, 0, NULL);
        expect(&stock, GRPC_STATUS_INVALID_ARGUMENT, EINVAL);
        CHECK(!stock.has_reply);
        stock_close(&stock);
    }
}

/* An empty message is a message: Info answers it, health says SERVING of what it knows. */
static void test_stock__empty_messages_are_answered(void)
{
    struct stock stock;
    stock_call(&stock, "/winnow.v1.Winnow/Info", "", 0, NULL);
    CHECK_EQ(stock.code, GRPC_STATUS_OK);
    CHECK(stock.reply_bytes > 200); /* limits, each with its origin */
    stock_close(&stock);
    stock_call(&stock, "/grpc.health.v1.Health/Check", "", 0, NULL);
    CHECK_EQ(stock.code, GRPC_STATUS_OK);
    CHECK(stock.reply_bytes == 2 && !memcmp(stock.reply, "\010\001", 2)); /* SERVING */
    stock_close(&stock);
    stock_call(&stock, "/grpc.health.v1.Health/Check", "\012\021winnow.v1.Winnow\000", 18, NULL);
    CHECK_EQ(stock.code, GRPC_STATUS_INVALID_ARGUMENT); /* its length is past the end */
    stock_close(&stock);
    stock_call(&stock, "/grpc.health.v1.Health/Check", "\012\020winnow.v1.Winnow", 18, NULL);
    CHECK_EQ(stock.code, GRPC_STATUS_OK);
    stock_close(&stock);
    stock_call(&stock, "/grpc.health.v1.Health/Check", "\012\005other", 7, NULL);
    expect(&stock, GRPC_STATUS_NOT_FOUND, ENOENT);
    stock_close(&stock);
}

/* Methods and services that nobody serves, and paths that are none. */
static void test_stock__unknown_methods_are_unimplemented(void)
{
    static const char *const paths[] = {"/winnow.v1.Winnow/Everything", "/winnow.v1.Winnow/",
                                        "/winnow.v1.Winnow/Inf",        "/winnow.v1.Winnow/Info/",
                                        "/winnow.v2.Winnow/Info",       "/"};
    for (uint32_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        struct stock stock;
        stock_call(&stock, paths[i], "", 0, NULL);
        expect(&stock, GRPC_STATUS_UNIMPLEMENTED, ENOTSUP);
        stock_close(&stock);
    }
}

/* Versions: ours within the client's range is spoken; a range without it is refused, both named. */
static void test_stock__versions(void)
{
    static const struct {
        uint8_t message[4];
        size_t n_bytes;
        grpc_status_code code;
    } cases[] = {
        {{0x10, 1, 0x18, 1}, 4, GRPC_STATUS_OK},                  /* ours alone */
        {{0x10, 0, 0x18, 2}, 4, GRPC_STATUS_OK},                  /* N - 1 to N + 1 */
        {{0x10, 1}, 2, GRPC_STATUS_OK},                           /* from ours on */
        {{0x10, 2, 0x18, 3}, 4, GRPC_STATUS_FAILED_PRECONDITION}, /* newer alone */
        {{0x10, 2}, 2, GRPC_STATUS_FAILED_PRECONDITION},
    };
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct stock stock;
        stock_call(&stock, "/winnow.v1.Winnow/Info", cases[i].message, cases[i].n_bytes, NULL);
        CHECK_EQ(stock.code, cases[i].code);
        if (stock.code) {
            expect(&stock, GRPC_STATUS_FAILED_PRECONDITION, EPROTO);
            char *text = grpc_slice_to_c_string(stock.text);
            CHECK(strstr(text, "protocol 2 to ") && strstr(text, "this daemon 1"));
            gpr_free(text);
        }
        stock_close(&stock);
    }
}

/* What is refused for want of room says when to come again, what is refused for good does not. The
 * 33rd lease of a 32 MiB pool is one too many. */
static void test_stock__no_room_says_when_to_retry(void)
{
    enum { N_CLIENTS = 32 };
    static struct stock lease[N_CLIENTS + 1];
    grpc_slice empty = grpc_empty_slice();
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        grpc_byte_buffer *received = NULL, *sent = grpc_raw_byte_buffer_create(&empty, 1);
        grpc_op ops[4];
        memset(ops, 0, sizeof ops);
        stock_open(&lease[i], "/winnow.v1.Winnow/Lease");
        ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
        ops[1].op = GRPC_OP_SEND_MESSAGE;
        ops[1].data.send_message.send_message = sent;
        ops[2].op = GRPC_OP_RECV_INITIAL_METADATA;
        ops[2].data.recv_initial_metadata.recv_initial_metadata = &lease[i].initial;
        ops[3].op = GRPC_OP_RECV_MESSAGE;
        ops[3].data.recv_message.recv_message = &received;
        CHECK(run(lease[i].call, ops, 4));
        reply_take(&lease[i], received);
        CHECK(lease[i].has_reply);
        grpc_byte_buffer_destroy(sent);
    }
    stock_call(&lease[N_CLIENTS], "/winnow.v1.Winnow/Lease", "", 0, NULL);
    expect(&lease[N_CLIENTS], GRPC_STATUS_RESOURCE_EXHAUSTED, EDQUOT);
    const char *ms = metadata_find(&lease[N_CLIENTS].trailing, WINNOW_WIRE_KEY_RETRY, NULL);
    CHECK(ms && !strcmp(ms, "100"));
    for (uint32_t i = 0; i <= N_CLIENTS; i++) {
        grpc_call_cancel(lease[i].call, NULL);
        stock_close(&lease[i]);
    }
    struct stock stock;
    stock_call(&stock, "/winnow.v1.Winnow/Everything", "", 0, NULL);
    CHECK(stock.trailing.count > 0 && !metadata_find(&stock.trailing, WINNOW_WIRE_KEY_RETRY, NULL));
    stock_close(&stock);
}

/* Metadata beyond 8 KiB does not get in. It may cost the peer its connection (the state of the two
 * ends' compression may part there), never the daemon: less is taken, at the second try at last. */
static void test_stock__metadata_is_limited(void)
{
    enum { LARGE_BYTES = 9 << 10 };
    static char large[LARGE_BYTES + 1], fair[LARGE_BYTES / 2 + 1];
    struct stock stock;
    memset(large, 'x', LARGE_BYTES);
    memset(fair, 'x', LARGE_BYTES / 2);
    grpc_metadata extra = {.key = grpc_slice_from_static_string("x-large"),
                           .value = grpc_slice_from_static_string(large)};
    stock_call(&stock, "/winnow.v1.Winnow/Info", "", 0, &extra);
    CHECK_EQ(stock.code, GRPC_STATUS_RESOURCE_EXHAUSTED);
    CHECK(!stock.has_reply);
    stock_close(&stock);
    extra.value = grpc_slice_from_static_string(fair);
    stock_call(&stock, "/winnow.v1.Winnow/Info", "", 0, &extra);
    if (stock.code == GRPC_STATUS_UNAVAILABLE) {
        stock_close(&stock);
        stock_call(&stock, "/winnow.v1.Winnow/Info", "", 0, &extra);
    }
    CHECK_EQ(stock.code, GRPC_STATUS_OK);
    stock_close(&stock);
}

static void server_open(void)
{
    char target[128];
    daemon_start(&server);
    snprintf(target, sizeof target, "unix:%s", server.socket);
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    channel = grpc_channel_create(target, credentials, NULL);
    grpc_channel_credentials_release(credentials);
    queue = grpc_completion_queue_create_for_next(NULL);
}

static void server_close(void)
{
    grpc_channel_destroy(channel);
    grpc_completion_queue_shutdown(queue);
    while (grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        continue;
    grpc_completion_queue_destroy(queue);
    CHECK_EQ(daemon_stop(&server, SIGTERM), 0);
    daemon_remove(&server);
}

static void expect_health(const char reply[2])
{
    struct stock stock;
    stock_call(&stock, "/grpc.health.v1.Health/Check", "", 0, NULL);
    CHECK_EQ(stock.code, GRPC_STATUS_OK);
    CHECK(stock.reply_bytes == 2 && !memcmp(stock.reply, reply, 2));
    stock_close(&stock);
}

/* A daemon that lost its GPU serves on, and says to who watches that it should not be chosen. */
static void test_stock__a_lost_gpu_is_not_serving(void)
{
    static const char *const with_gpu[] = {"--gpu",       "required", "--gpu-memory",     "64MiB",
                                           "--host-pool", "64MiB",    "--disk-cap",       "512MiB",
                                           "--threads",   "2",        "--segment-tokens", "512",
                                           NULL};
    enum { N_TOKENS = 1500, N_STEPS = 20 };
    static char library[300];
    char path[256];
    struct engine engine;
    winnow_model model = engine_model(2, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
    if (access(program_path("winnow_cuda.so", path), F_OK) == 0)
        TEST_SKIP("winnowd would load the real GPU's library, which lies beside it");
    snprintf(library, sizeof library, "LD_LIBRARY_PATH=%s", program_path("gpu", path));
    daemon_init(&server, with_gpu);
    server.env[0] = library;
    server.env[1] = "SIM_GPU_FAILS_AFTER=60";
    server_open();
    engine_open(&engine, server.socket, &model, 5, N_TOKENS + N_STEPS, NULL);
    while (engine.n_tokens < N_TOKENS)
        ENGINE_OK(engine_window(&engine, 500, NULL));
    expect_health("\010\001");
    for (uint32_t i = 0; i < N_STEPS; i++)
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 0.9F}));
    expect_health("\010\002");
    engine_close(&engine);
    server_close();
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    grpc_init();
    daemon_init(&server, small);
    server_open();
    TEST_RUN(test_stock__metadata_comes_unasked);
    TEST_RUN(test_stock__a_message_is_missing);
    TEST_RUN(test_stock__empty_messages_are_answered);
    TEST_RUN(test_stock__unknown_methods_are_unimplemented);
    TEST_RUN(test_stock__versions);
    TEST_RUN(test_stock__no_room_says_when_to_retry);
    TEST_RUN(test_stock__metadata_is_limited);
    server_close();
    TEST_RUN(test_stock__a_lost_gpu_is_not_serving);
    grpc_shutdown_blocking();
    return TEST_END();
}
