/* Order over the wire: epochs, repeats, deadlines. Peers send what libwinnow never would. */
#include <base/clock.h>
#include <errno.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/raw.h>
#include <test.h>

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};
static struct daemon server;

/* One token of one layer, by each of the three ways in. */
static int append_one(struct raw *raw, uint64_t first, uint32_t layer, uint32_t epoch)
{
    Winnow__V1__AppendMessage header = WINNOW__V1__APPEND_MESSAGE__INIT, chunk = header;
    header.token = raw_token(raw);
    header.session = raw->session;
    header.layer = layer;
    header.epoch = epoch;
    chunk.first_token = first;
    chunk.n_tokens = 1;
    struct raw_message messages[] = {{&header, 0}, {&chunk, RAW_KV_BYTES}};
    return raw_send(raw, "Append", messages, 2, NULL, NULL).error;
}

static int exact_one(struct raw *raw, uint64_t first, uint32_t layer, uint32_t epoch)
{
    Winnow__V1__AttendExactMessage header = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
    Winnow__V1__AttendExactMessage kv = header, q = header;
    header.token = raw_token(raw);
    header.session = raw->session;
    header.layer = layer;
    header.epoch = epoch;
    header.first_token = first;
    header.n_tokens = kv.n_chunk = q.n_chunk = 1;
    kv.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_KV;
    q.part = WINNOW__V1__ATTEND_EXACT_MESSAGE__PART__PART_Q;
    struct raw_message messages[] = {{&header, 0}, {&kv, RAW_KV_BYTES}, {&q, RAW_Q_BYTES}};
    return raw_send(raw, "AttendExact", messages, 3, NULL, NULL).error;
}

struct attend {
    uint64_t position, seq, deadline_us;
    uint32_t epoch;
};

static int attend_one(struct raw *raw, const struct attend *attend, uint64_t *ret_held)
{
    Winnow__V1__AttendRequest request = WINNOW__V1__ATTEND_REQUEST__INIT;
    Winnow__V1__AttendItem item = WINNOW__V1__ATTEND_ITEM__INIT, *items[] = {&item};
    const Winnow__V1__AttendReply *reply = NULL;
    request.token = raw_token(raw);
    request.model = raw->model;
    request.seq = attend->seq;
    request.deadline_us = attend->deadline_us;
    request.n_items = 1;
    request.items = items;
    item.session = raw->session;
    item.position = attend->position;
    item.epoch = attend->epoch;
    item.flags = WINNOW_WIRE_HAS_KV;
    struct winnow_status status =
        raw_send(raw, "Attend", &(struct raw_message){&request, RAW_Q_BYTES + RAW_KV_BYTES}, 1,
                 &winnow__v1__attend_reply__descriptor, &reply);
    CHECK_EQ(status.error, 0);
    CHECK(reply && reply->n_results == 1);
    if (ret_held)
        *ret_held = reply->results[0]->tokens_held;
    return reply->results[0]->status;
}

static void session_begin(struct raw *raw)
{
    Winnow__V1__ModelShape shape = raw_shape();
    raw_open(raw, server.socket);
    CHECK_EQ(raw_open_session(raw, &shape, NULL, "").error, 0);
}

static uint32_t truncate_to(struct raw *raw, uint64_t n_tokens)
{
    Winnow__V1__TruncateRequest truncate = WINNOW__V1__TRUNCATE_REQUEST__INIT;
    const Winnow__V1__TruncateReply *reply = NULL;
    truncate.token = raw_token(raw);
    truncate.session = raw->session;
    truncate.n_tokens = n_tokens;
    CHECK_EQ(raw_send(raw, "Truncate", &(struct raw_message){&truncate, 0}, 1,
                      &winnow__v1__truncate_reply__descriptor, &reply)
                 .error,
             0);
    CHECK(reply);
    return reply->epoch;
}

/* Truncate makes a new epoch; what was sent for the old one is stale, by each way in, and adds
 * nothing. */
static void test_order__old_epochs_are_stale(void)
{
    struct raw raw;
    session_begin(&raw);
    uint32_t old = raw.epoch;
    for (uint32_t layer = 0; layer < 2; layer++) {
        CHECK_EQ(append_one(&raw, 0, layer, old), 0);
        CHECK_EQ(exact_one(&raw, 1, layer, old), 0);
    }
    uint32_t epoch = truncate_to(&raw, 1);
    CHECK(epoch > old);
    CHECK_EQ(append_one(&raw, 1, 0, old), -ESTALE);
    CHECK_EQ(exact_one(&raw, 1, 0, old), -ESTALE);
    CHECK_EQ(attend_one(&raw, &(struct attend){.position = 1, .seq = 1, .epoch = old}, NULL),
             -ESTALE);
    CHECK_EQ(append_one(&raw, 1, 0, epoch + 1), -ESTALE); /* nor is a future one known */
    CHECK_EQ(append_one(&raw, 1, 0, epoch), 0);
    CHECK_EQ(exact_one(&raw, 2, 0, epoch), 0);
    uint64_t n_held = 0;
    CHECK_EQ(attend_one(&raw, &(struct attend){.position = 3, .seq = 1, .epoch = epoch}, &n_held),
             0);
    CHECK_EQ(n_held, 4);
    raw_close(&raw);
}

/* A step that repeats its layer's last seq is answered again and appends nothing; another one at a
 * place that is taken is told how many tokens there are. */
static void test_order__a_repeated_step_appends_once(void)
{
    struct raw raw;
    uint64_t n_held = 0;
    session_begin(&raw);
    struct attend step = {.position = 0, .seq = 7, .epoch = raw.epoch};
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(attend_one(&raw, &step, &n_held), 0);
        CHECK_EQ(n_held, 1);
    }
    step.seq = 8;
    CHECK_EQ(attend_one(&raw, &step, &n_held), -EINVAL);
    CHECK_EQ(n_held, 1);
    step.position = 1;
    CHECK_EQ(attend_one(&raw, &step, &n_held), 0);
    step.position = 3; /* a gap */
    step.seq = 9;
    CHECK_EQ(attend_one(&raw, &step, &n_held), -EINVAL);
    CHECK_EQ(n_held, 2);
    raw_close(&raw);
}

/* A deadline that is over when the message comes is kept, the tokens held are told, and the same
 * step sent again is answered. */
static void test_order__a_deadline_that_is_over(void)
{
    struct raw raw;
    uint64_t n_held = 0;
    session_begin(&raw);
    struct attend step = {.position = 0, .seq = 1, .epoch = raw.epoch, .deadline_us = 1};
    CHECK_EQ(attend_one(&raw, &step, &n_held), -ETIMEDOUT);
    CHECK(n_held <= 1);
    step.deadline_us = 0;
    CHECK_EQ(attend_one(&raw, &step, &n_held), 0);
    CHECK_EQ(n_held, 1);
    raw_close(&raw);
}

/* Sends a header and then nothing; how the daemon ends it. */
static struct winnow_status silent_upload(struct raw *raw, const char *method, const void *header)
{
    struct winnow_call *call;
    struct winnow_status status;
    uint8_t head[256];
    struct iovec part = {head, winnow_wire_head(header, 0, head)};
    int64_t until_ns = winnow_clock_now_ns() + 9 * WINNOW_NS_PER_S;
    CHECK_EQ(winnow_call_open(raw->channel, method, WINNOW_NEVER_NS, &call), 0);
    CHECK_EQ(winnow_call_start(call, WINNOW_CALL_SEND, &part, 1), 0);
    CHECK_EQ(winnow_call_wait(call, until_ns, NULL, NULL), 0);
    winnow_call_finish(call, until_ns, &status);
    return status;
}

/* An upload whose peer falls silent ends by the deadline it named, is told how far it came, and has
 * appended nothing; the memory it held is the next one's. */
static void test_order__a_silent_upload_is_cut_off(void)
{
    struct raw raw;
    session_begin(&raw);
    for (uint32_t i = 0; i < 12; i++) { /* 8 MiB in flight, and each takes 1 MiB or more */
        Winnow__V1__AttendExactMessage exact = WINNOW__V1__ATTEND_EXACT_MESSAGE__INIT;
        exact.token = raw_token(&raw);
        exact.session = raw.session;
        exact.epoch = raw.epoch;
        exact.n_tokens = 512;
        exact.deadline_us = 20000;
        struct winnow_status status = silent_upload(&raw, "AttendExact", &exact);
        CHECK(!status.local);
        CHECK_EQ(status.error, -ETIMEDOUT);
        CHECK(strstr(status.text, "stalled after 0 tokens"));
    }
    Winnow__V1__AppendMessage append = WINNOW__V1__APPEND_MESSAGE__INIT;
    append.token = raw_token(&raw);
    append.session = raw.session;
    append.epoch = raw.epoch;
    append.deadline_us = 20000;
    struct winnow_status status = silent_upload(&raw, "Append", &append);
    CHECK_EQ(status.error, -ETIMEDOUT);
    CHECK_EQ(append_one(&raw, 0, 0, raw.epoch), 0);
    raw_close(&raw);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    daemon_init(&server, small);
    daemon_start(&server);
    TEST_RUN(test_order__old_epochs_are_stale);
    TEST_RUN(test_order__a_repeated_step_appends_once);
    TEST_RUN(test_order__a_deadline_that_is_over);
    TEST_RUN(test_order__a_silent_upload_is_cut_off);
    CHECK_EQ(daemon_stop(&server, SIGTERM), 0);
    daemon_remove(&server);
    return TEST_END();
}
