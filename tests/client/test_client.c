/* libwinnow against a daemon that misbehaves on purpose (fake.h). The real one: tests/system. */
#include <base/clock.h>
#include <client/fake.h>
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <test.h>
#include <unistd.h>
#include <winnow/winnow.h>

enum { Q_HEADS = 4, KV_HEADS = 2, WIDTH = 32, LAYERS = 3 };

static char dir[64], path[96];

static winnow_session_options session_options(void)
{
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    options.model = (winnow_model){
        .layers = LAYERS,
        .q_heads = Q_HEADS,
        .kv_heads = KV_HEADS,
        .k_width = WIDTH,
        .v_width = WIDTH,
        .softmax_scale = 0.125F,
        .kv_dtype = WINNOW_DTYPE_FP16,
        .io_dtype = WINNOW_DTYPE_FP32,
    };
    options.label = "test";
    return options;
}

static winnow_client *client_open(void)
{
    winnow_client *client = NULL;
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;
    options.address = path;
    if (winnow_client_open(&options, &client) < 0)
        test_fail(__FILE__, __LINE__, winnow_error_text());
    return client;
}

static winnow_session *session_open(winnow_client *client)
{
    winnow_session *session = NULL;
    winnow_session_options options = session_options();
    if (winnow_session_open(client, &options, &session, 0) < 0)
        test_fail(__FILE__, __LINE__, winnow_error_text());
    return session;
}

struct step {
    float q[Q_HEADS * WIDTH], k[KV_HEADS * WIDTH], v[KV_HEADS * WIDTH], out[Q_HEADS * WIDTH];
    float lse[Q_HEADS];
};

static winnow_attend_item step_item(struct step *step, winnow_session *session, uint64_t position)
{
    for (uint32_t i = 0; i < Q_HEADS * WIDTH; i++) {
        step->q[i] = (float)(position * 1000 + i);
        step->out[i] = NAN;
    }
    return (winnow_attend_item){.session = session,
                                .position = position,
                                .q = step->q,
                                .k = step->k,
                                .v = step->v,
                                .out = step->out,
                                .lse = step->lse};
}

static int64_t in_ms(int64_t n_ms)
{
    return winnow_clock_now_ns() + n_ms * WINNOW_NS_PER_MS;
}

static bool text_has(const char *word)
{
    return strstr(winnow_error_text(), word) != NULL;
}

/* Without a daemon there is a clear refusal that names the path. */
static void test_client__no_daemon_is_hostdown(void)
{
    winnow_client *client = NULL;
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;
    options.address = path;
    CHECK_EQ(winnow_client_open(&options, &client), -EHOSTDOWN);
    CHECK(client == NULL);
    CHECK(text_has(path));
    options.struct_bytes--;
    CHECK_EQ(winnow_client_open(&options, &client), -EINVAL);
}

/* Without options the client looks in WINNOW_ADDRESS, then in the user's run-time directory. */
static void test_client__finds_the_socket(void)
{
    char user_dir[128], user_path[160];
    winnow_client *client;
    snprintf(user_dir, sizeof user_dir, "%s/winnow", dir);
    snprintf(user_path, sizeof user_path, "%s/winnow.sock", user_dir);
    CHECK_EQ(mkdir(user_dir, 0700), 0);
    struct fake *fake = fake_start(user_path, 1);
    setenv("XDG_RUNTIME_DIR", dir, 1);
    CHECK_EQ(winnow_client_open(NULL, &client), 0);
    winnow_client_close(client);
    setenv("WINNOW_ADDRESS", path, 1);
    CHECK_EQ(winnow_client_open(NULL, &client), -EHOSTDOWN);
    setenv("WINNOW_ADDRESS", user_path, 1);
    CHECK_EQ(winnow_client_open(NULL, &client), 0);
    winnow_client_close(client);
    unsetenv("WINNOW_ADDRESS");
    unsetenv("XDG_RUNTIME_DIR");
    fake_kill(fake);
    rmdir(user_dir);
}

/* A daemon of another protocol version is refused by name. */
static void test_client__other_version_is_proto(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client;
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;
    options.address = path;
    fake_set_script(fake, FAKE_OTHER_PROTO);
    CHECK_EQ(winnow_client_open(&options, &client), -EPROTO);
    CHECK(text_has("protocol 9"));
    fake_kill(fake);
}

/* A step comes back as sent: out, lse, certificate, tokens held; all over one stream. */
static void test_attend__answers_over_one_stream(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step step;
    for (uint64_t position = 0; position < 40; position++) {
        winnow_attend_item item = step_item(&step, session, position);
        CHECK_EQ(winnow_attend(client, 1, &item, 1, 0), 0);
        CHECK_EQ(item.status, 0);
        CHECK(!memcmp(step.out, step.q, sizeof step.q));
        CHECK(step.lse[Q_HEADS - 1] == 0.5F);
        CHECK_EQ(item.certificate.verdict, WINNOW_MET);
        CHECK_EQ(item.certificate.bytes_read, position);
        CHECK_EQ(item.certificate.blocks_device, position % 2);
        CHECK_EQ(winnow_session_held(session, 1), position + 1);
        CHECK_EQ(winnow_session_held(session, 0), 0);
    }
    CHECK_EQ(fake_n_streams(fake), 1);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* A step of more bytes or items than a message may have goes in parts, each item answered. */
static void test_attend__large_step_goes_in_parts(void)
{
    enum { N_ITEMS = 1000 };
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step *step = calloc(N_ITEMS, sizeof *step);
    winnow_attend_item *item = calloc(N_ITEMS, sizeof *item);
    for (uint32_t i = 0; i < N_ITEMS; i++)
        item[i] = step_item(&step[i], session, i);
    CHECK_EQ(winnow_attend(client, 0, item, N_ITEMS, 0), 0);
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        CHECK_EQ(item[i].status, 0);
        CHECK_EQ(item[i].certificate.bytes_read, i);
        CHECK(!memcmp(step[i].out, step[i].q, sizeof step[i].q));
    }
    CHECK_EQ(fake_n_messages(fake), 8); /* 1 KiB an item, 128 KiB a message */
    free(item);
    free(step);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* Between submit and wait the thread is free; a second submit in between is refused. */
static void test_attend__submit_and_wait_are_two_halves(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step step;
    winnow_attend_item item = step_item(&step, session, 0);
    CHECK_EQ(winnow_attend_wait(client), -EINVAL);
    CHECK_EQ(winnow_attend_submit(client, 0, &item, 1, 0), 0);
    winnow_attend_item second = item;
    CHECK_EQ(winnow_attend_submit(client, 0, &second, 1, 0), -EINVAL);
    CHECK_EQ(second.status, -EINVAL);
    CHECK_EQ(winnow_attend_wait(client), 0);
    CHECK(!memcmp(step.out, step.q, sizeof step.q));
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* An answer that does not fit the question is -EPROTO, leaves out untouched, and the next step
 * goes over a new stream. */
static void test_attend__unfit_answers_are_refused(void)
{
    static const enum fake_script scripts[] = {FAKE_SHORT_DATA, FAKE_FOREIGN_SEQ, FAKE_GARBAGE};
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step step;
    for (uint32_t i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        winnow_attend_item item = step_item(&step, session, 0);
        fake_set_script(fake, scripts[i]);
        CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), -EPROTO);
        CHECK_EQ(item.status, -EPROTO);
        CHECK(isnan(step.out[0]));
        fake_set_script(fake, FAKE_PLAIN);
        CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
        CHECK_EQ(fake_n_streams(fake), i + 2);
    }
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* An item that failed has its own status, text and place to truncate to; the call went through. */
static void test_attend__lost_block_says_where_to_truncate(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step step;
    winnow_attend_item item = step_item(&step, session, 0);
    fake_set_script(fake, FAKE_ITEM_LOST);
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
    CHECK_EQ(item.status, -ENODATA);
    CHECK_EQ(item.truncate_to, 48);
    CHECK_EQ(winnow_session_truncate_to(session), 48);
    CHECK(text_has("truncate_to 48"));
    CHECK(isnan(step.out[0]));
    CHECK_EQ(winnow_session_truncate(session, 48, 0), 0);
    CHECK_EQ(winnow_session_held(session, 0), 48);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* A long window is split to the daemon's limit and put together again. */
static void test_exact__long_window_is_split(void)
{
    enum { N_TOKENS = 150, N_FLOATS = N_TOKENS * Q_HEADS * WIDTH };
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    float *q = calloc(N_FLOATS, sizeof *q), *out = calloc(N_FLOATS, sizeof *out);
    float lse[N_TOKENS * Q_HEADS] = {0};
    winnow_certificate certificate;
    for (uint32_t i = 0; i < N_FLOATS; i++)
        q[i] = (float)i;
    CHECK_EQ(winnow_attend_exact(session, 2, 0, N_TOKENS, q, q, q, out, lse, &certificate, 0), 0);
    CHECK(!memcmp(q, out, N_FLOATS * sizeof *q));
    CHECK(lse[N_TOKENS * Q_HEADS - 1] == 0.5F);
    /* 64 KiB over q, k, v, out and lse of a token: 42 tokens a window. */
    CHECK_EQ(fake_n_windows(fake), 4);
    CHECK_EQ(certificate.bytes_read, 400);
    CHECK_NEAR(certificate.mass_mean, 1, 1e-6);
    CHECK_EQ(winnow_session_held(session, 2), N_TOKENS);

    fake_set_script(fake, FAKE_LOST);
    CHECK_EQ(winnow_attend_exact(session, 2, N_TOKENS, 1, q, q, q, out, NULL, NULL, 0), -ENODATA);
    CHECK_EQ(winnow_session_truncate_to(session), 80);
    free(q);
    free(out);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* Append sends whole tokens in chunks of at most 256 KiB and learns how many are held. */
static void test_append__counts_tokens(void)
{
    enum { N_TOKENS = 2000 };
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client), *fork;
    float *k = calloc(N_TOKENS * KV_HEADS * WIDTH, sizeof *k);
    CHECK_EQ(winnow_append(session, 0, 0, N_TOKENS, k, k, 0), 0);
    CHECK_EQ(winnow_session_held(session, 0), N_TOKENS);
    CHECK_EQ(winnow_append(session, LAYERS, 0, 1, k, k, 0), -EINVAL);
    CHECK_EQ(winnow_append(session, 0, 0, 0, k, k, 0), -EINVAL);
    CHECK_EQ(winnow_session_fork(session, "fork", &fork, 0), 0);
    CHECK_EQ(winnow_session_held(fork, LAYERS - 1), N_TOKENS);
    winnow_stats stats = WINNOW_STATS;
    CHECK_EQ(winnow_stats_get(client, NULL, &stats, 0), 0);
    CHECK_EQ(stats.tokens_held, N_TOKENS);
    CHECK(stats.mass_mean == 0.875F);
    free(k);
    winnow_session_close(fork);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* The daemon's reason and text reach the caller. */
static void test_session__refusal_keeps_reason_and_text(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session_options options = session_options();
    winnow_session *session = NULL;
    fake_set_script(fake, FAKE_REFUSED);
    CHECK_EQ(winnow_session_open(client, &options, &session, 0), -ENOSPC);
    CHECK(session == NULL);
    CHECK_STR(winnow_error_text(), "host_pool: no room");
    fake_set_script(fake, FAKE_GARBAGE);
    CHECK_EQ(winnow_session_open(client, &options, &session, 0), -EPROTO);
    CHECK(text_has("answer of winnowd"));
    options.model.kv_heads = 3;
    CHECK_EQ(winnow_session_open(client, &options, &session, 0), -EINVAL);
    winnow_client_close(client);
    fake_kill(fake);
}

/* A silent daemon: each call is back by its deadline, and after the third the breaker answers in
 * its stead until the daemon answers again; the session is still good then. */
static void test_client__silence_ends_at_the_deadline(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step step;
    winnow_attend_item item = step_item(&step, session, 1);
    float one[Q_HEADS * WIDTH] = {0};

    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0); /* a GPU's: the next is awaited awake */
    fake_set_script(fake, FAKE_SILENT);
    int64_t begin_ns = winnow_clock_now_ns();
    CHECK_EQ(winnow_attend(client, 0, &item, 1, in_ms(30)), -ETIMEDOUT);
    CHECK_EQ(winnow_session_truncate(session, 0, in_ms(30)), -ETIMEDOUT);
    CHECK_EQ(winnow_attend_exact(session, 0, 0, 1, one, one, one, one, NULL, NULL, in_ms(30)),
             -ETIMEDOUT);
    CHECK(winnow_clock_now_ns() - begin_ns >= 90 * WINNOW_NS_PER_MS);
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), -EHOSTDOWN);
    CHECK(text_has("unanswered"));
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 1), -EHOSTDOWN);

    fake_set_script(fake, FAKE_PLAIN);
    int64_t give_up_ns = in_ms(8000);
    int rc;
    while ((rc = winnow_attend(client, 0, &item, 1, 0)) == -EHOSTDOWN)
        CHECK(winnow_clock_now_ns() < give_up_ns);
    CHECK_EQ(rc, 0);
    /* A deadline that has passed is the caller's doing, not the daemon's. */
    for (uint32_t i = 0; i < 5; i++)
        CHECK_EQ(winnow_attend(client, 0, &item, 1, 1), -ETIMEDOUT);
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

struct late {
    winnow_client *client;
    winnow_session *session;
    int64_t late_ns[64];
    uint32_t n_calls;
};

enum { N_LATE_THREADS = 16, N_LATE_CALLS = 32 };

/* Calls of all kinds with a deadline of 10 ms; between them the breaker is waited out. */
static void *late_main(void *arg)
{
    struct late *late = arg;
    struct step step;
    float one[Q_HEADS * WIDTH] = {0};
    for (uint32_t i = 0; late->n_calls < N_LATE_CALLS; i++) {
        winnow_attend_item item = step_item(&step, late->session, 0);
        int64_t deadline_ns = in_ms(10);
        int rc = i % 3 == 0   ? winnow_attend(late->client, 0, &item, 1, deadline_ns)
                 : i % 3 == 1 ? winnow_session_truncate(late->session, 0, deadline_ns)
                              : winnow_attend_exact(late->session, 0, 0, 1, one, one, one, one,
                                                    NULL, NULL, deadline_ns);
        if (rc == -ETIMEDOUT) {
            late->late_ns[late->n_calls++] = winnow_clock_now_ns() - deadline_ns;
            continue;
        }
        CHECK_EQ(rc, -EHOSTDOWN);
        poll(NULL, 0, 5);
    }
    return NULL;
}

static int compare_ns(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* 512 calls to a silent daemon, 16 threads at once: none is more than a second past its deadline.
 * The promise is 50 ms; on a shared machine that is also the scheduler's, so it is printed. */
static void test_client__no_call_outlasts_its_deadline(void)
{
    struct fake *fake = fake_start(path, 1);
    static struct late late[N_LATE_THREADS];
    static int64_t late_ns[N_LATE_THREADS * N_LATE_CALLS];
    pthread_t thread[N_LATE_THREADS];
    uint32_t n_calls = 0, n_past = 0;
    for (uint32_t i = 0; i < N_LATE_THREADS; i++) {
        late[i] = (struct late){.client = client_open()};
        late[i].session = session_open(late[i].client);
    }
    fake_set_script(fake, FAKE_SILENT);
    for (uint32_t i = 0; i < N_LATE_THREADS; i++)
        CHECK_EQ(pthread_create(&thread[i], NULL, late_main, &late[i]), 0);
    for (uint32_t i = 0; i < N_LATE_THREADS; i++) {
        pthread_join(thread[i], NULL);
        memcpy(late_ns + n_calls, late[i].late_ns, late[i].n_calls * sizeof *late_ns);
        n_calls += late[i].n_calls;
    }
    qsort(late_ns, n_calls, sizeof *late_ns, compare_ns);
    for (uint32_t i = 0; i < n_calls; i++)
        n_past += late_ns[i] > 50 * WINNOW_NS_PER_MS;
    printf("%u calls: late by %.1f ms (median), %.1f (p99), %.1f (worst); %u past 50 ms\n", n_calls,
           (double)late_ns[n_calls / 2] / 1e6, (double)late_ns[n_calls * 99 / 100] / 1e6,
           (double)late_ns[n_calls - 1] / 1e6, n_past);
    CHECK(late_ns[n_calls - 1] < WINNOW_NS_PER_S);
    TEST_ROW(F21, n_calls);
    fake_set_script(fake, FAKE_PLAIN);
    for (uint32_t i = 0; i < N_LATE_THREADS; i++) {
        winnow_session_close(late[i].session);
        winnow_client_close(late[i].client);
    }
    fake_kill(fake);
}

static void *kill_later(void *arg)
{
    nanosleep(&(struct timespec){.tv_nsec = 50 * WINNOW_NS_PER_MS}, NULL);
    fake_kill(arg);
    return NULL;
}

/* The daemon dies under a call: -EHOSTDOWN long before the deadline; without one, at once; with a
 * new one the old session is stale and a new one works. */
static void test_client__death_and_return(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    winnow_session *session = session_open(client);
    struct step step;
    winnow_attend_item item = step_item(&step, session, 0);
    pthread_t killer;

    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
    fake_set_script(fake, FAKE_SILENT);
    CHECK_EQ(pthread_create(&killer, NULL, kill_later, fake), 0);
    int64_t deadline_ns = in_ms(20000);
    CHECK_EQ(winnow_attend(client, 0, &item, 1, deadline_ns), -EHOSTDOWN);
    CHECK(winnow_clock_now_ns() < deadline_ns - 10 * WINNOW_NS_PER_S);
    CHECK(text_has("gone"));
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), -EHOSTDOWN);
    CHECK_EQ(winnow_session_truncate(session, 0, 0), -EHOSTDOWN);
    pthread_join(killer, NULL);

    fake = fake_start(path, 2);
    int64_t give_up_ns = in_ms(8000);
    int rc;
    while ((rc = winnow_attend(client, 0, &item, 1, 0)) == -EHOSTDOWN)
        CHECK(winnow_clock_now_ns() < give_up_ns);
    CHECK_EQ(rc, -ESTALE);
    CHECK_EQ(winnow_session_close(session), -ESTALE);
    session = session_open(client);
    item.session = session;
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* A lease that ends takes its sessions with it, though the daemon lives. */
static void test_client__end_of_lease_is_stale(void)
{
    struct fake *fake = fake_start(path, 1);
    fake_set_script(fake, FAKE_END_OF_LEASE);
    winnow_client *client = client_open();
    fake_set_script(fake, FAKE_PLAIN);
    winnow_session_options options = session_options();
    winnow_session *session = NULL;
    int64_t give_up_ns = in_ms(8000);
    /* Opened on the lease that is ending, or on the next one: the first goes stale. */
    int rc = winnow_session_open(client, &options, &session, 0);
    while (rc < 0) {
        CHECK_EQ(rc, -EHOSTDOWN);
        CHECK(winnow_clock_now_ns() < give_up_ns);
        rc = winnow_session_open(client, &options, &session, 0);
    }
    while ((rc = winnow_session_truncate(session, 0, 0)) == -EHOSTDOWN)
        CHECK(winnow_clock_now_ns() < give_up_ns);
    CHECK(rc == 0 || rc == -ESTALE);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

/* In a child of fork the parent's handles are dead, say so, and close without harm; the parent
 * goes on. */
static void test_client__fork_leaves_handles_dead(void)
{
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open(), *other;
    winnow_session *session = session_open(client);
    struct step step;
    winnow_attend_item item = step_item(&step, session, 0);
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
    pid_t child = fork();
    if (child == 0) {
        int n_wrong = 0;
        n_wrong += winnow_attend(client, 0, &item, 1, 0) != -ECHILD;
        n_wrong += item.status != -ECHILD;
        n_wrong += winnow_session_truncate(session, 0, 0) != -ECHILD;
        n_wrong += winnow_attend_wait(client) != -ECHILD;
        n_wrong += winnow_client_open(NULL, &other) != -ECHILD;
        n_wrong += winnow_session_close(session) != -ECHILD;
        winnow_client_close(client);
        _exit(n_wrong);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
    item.position = 1;
    CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
    winnow_session_close(session);
    winnow_client_close(client);
    fake_kill(fake);
}

struct engine {
    winnow_client *client;
    uint32_t n_wrong;
};

static void *engine_main(void *arg)
{
    struct engine *engine = arg;
    winnow_session *session = session_open(engine->client);
    struct step step;
    for (uint64_t position = 0; position < 200; position++) {
        winnow_attend_item item = step_item(&step, session, position);
        int rc = winnow_attend(engine->client, 0, &item, 1, 0);
        engine->n_wrong += rc || item.status || memcmp(step.out, step.q, sizeof step.q) != 0;
    }
    winnow_session_close(session);
    return NULL;
}

/* Threads share a client; each has its own stream and its own answers. */
static void test_client__threads_do_not_mix(void)
{
    enum { N_THREADS = 8 };
    struct fake *fake = fake_start(path, 1);
    winnow_client *client = client_open();
    struct engine engine[N_THREADS];
    pthread_t thread[N_THREADS];
    for (uint32_t i = 0; i < N_THREADS; i++) {
        engine[i] = (struct engine){.client = client};
        CHECK_EQ(pthread_create(&thread[i], NULL, engine_main, &engine[i]), 0);
    }
    for (uint32_t i = 0; i < N_THREADS; i++) {
        pthread_join(thread[i], NULL);
        CHECK_EQ(engine[i].n_wrong, 0);
    }
    CHECK(fake_n_streams(fake) <= N_THREADS);
    winnow_client_close(client);
    fake_kill(fake);
}

static uint32_t count_fds(void)
{
    uint32_t n_fds = 0;
    DIR *fds = opendir("/proc/self/fd");
    while (readdir(fds))
        n_fds++;
    closedir(fds);
    return n_fds;
}

/* Opening and closing leaves no descriptor behind, whatever state the client is closed in. */
static void test_client__close_leaves_nothing(void)
{
    struct fake *fake = fake_start(path, 1);
    uint32_t n_before = 0;
    for (uint32_t round = 0; round < 20; round++) {
        winnow_client *client = client_open();
        winnow_session *session = session_open(client);
        struct step step;
        winnow_attend_item item = step_item(&step, session, 0);
        CHECK_EQ(winnow_attend(client, 0, &item, 1, 0), 0);
        if (round % 2)
            winnow_session_close(session);
        winnow_client_close(client);
        if (round % 2 == 0) {
            CHECK_EQ(winnow_session_close(session), -EINVAL);
        }
        if (round == 3)
            n_before = count_fds();
    }
    /* The server's side of a connection closes a moment after ours. */
    int64_t give_up_ns = in_ms(2000);
    while (count_fds() > n_before + 16 * 3) /* fake keeps a duplicate of each */
        CHECK(winnow_clock_now_ns() < give_up_ns);
    fake_kill(fake);
}

/* Certificates add up: worst verdict, least mass, sums of the rest. */
static void test_certificate__adds_up(void)
{
    winnow_certificate sum = {0};
    winnow_certificate_add(&sum, &(winnow_certificate){.verdict = WINNOW_SHORT,
                                                       .mass_reached = 0.8F,
                                                       .mass_mean = 0.9F,
                                                       .blocks_disk = 3,
                                                       .bytes_read = 10});
    winnow_certificate_add(&sum, &(winnow_certificate){.verdict = WINNOW_MET,
                                                       .mass_reached = 0.95F,
                                                       .mass_mean = 0.97F,
                                                       .blocks_disk = 4,
                                                       .bytes_read = 5});
    CHECK_EQ(sum.verdict, WINNOW_SHORT);
    CHECK_NEAR(sum.mass_reached, 0.8, 1e-6);
    CHECK_NEAR(sum.mass_mean, 1.87, 1e-6);
    CHECK_EQ(sum.blocks_disk, 7);
    CHECK_EQ(sum.bytes_read, 15);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    strcpy(dir, "/tmp/winnow-test-client-XXXXXX");
    CHECK(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/w.sock", dir);
    unsetenv("WINNOW_ADDRESS");
    unsetenv("XDG_RUNTIME_DIR");
    TEST_RUN(test_client__no_daemon_is_hostdown);
    TEST_RUN(test_client__finds_the_socket);
    TEST_RUN(test_client__other_version_is_proto);
    TEST_RUN(test_attend__answers_over_one_stream);
    TEST_RUN(test_attend__large_step_goes_in_parts);
    TEST_RUN(test_attend__submit_and_wait_are_two_halves);
    TEST_RUN(test_attend__unfit_answers_are_refused);
    TEST_RUN(test_attend__lost_block_says_where_to_truncate);
    TEST_RUN(test_exact__long_window_is_split);
    TEST_RUN(test_append__counts_tokens);
    TEST_RUN(test_session__refusal_keeps_reason_and_text);
    TEST_RUN(test_client__silence_ends_at_the_deadline);
    TEST_RUN(test_client__no_call_outlasts_its_deadline);
    TEST_RUN(test_client__death_and_return);
    TEST_RUN(test_client__end_of_lease_is_stale);
    TEST_RUN(test_client__fork_leaves_handles_dead);
    TEST_RUN(test_client__threads_do_not_mix);
    TEST_RUN(test_client__close_leaves_nothing);
    TEST_RUN(test_certificate__adds_up);
    rmdir(dir);
    return TEST_END();
}
