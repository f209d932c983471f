/* What comes back is attention: held against a plain fp64 one (engine.c), several models at once. */
#include <pthread.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "1GiB",
                                    "--threads",   "2",     NULL};

struct run {
    const char *socket;
    winnow_model model;
    double tolerance;
    uint32_t n_tokens;
    double error_window, error_exact, error_sparse; /* results */
    winnow_certificate sum;
    uint32_t n_steps;
};

static void *run_main(void *arg)
{
    struct run *run = arg;
    struct engine engine;
    double error;
    engine_open(&engine, run->socket, &run->model, run->model.q_heads, run->n_tokens + 64, NULL);
    while (engine.n_tokens < run->n_tokens) {
        uint32_t n_left = run->n_tokens - engine.n_tokens;
        ENGINE_OK(engine_window(&engine, n_left < 300 ? n_left : 300, &error));
        run->error_window = fmax(run->error_window, error);
    }
    for (run->n_steps = 0; run->n_steps < 40; run->n_steps++) {
        bool exact = run->n_steps % 2;
        struct engine_step step = {.mass = exact ? 1 : 0.9F,
                                   .error = exact ? &run->error_exact : &run->error_sparse,
                                   .sum = exact ? NULL : &run->sum};
        ENGINE_OK(engine_decode(&engine, &step));
    }
    engine_close(&engine);
    return NULL;
}

/* Windows and exact steps of three engines at once equal the oracle to the model's precision;
 * sparse steps say MET and are close. One has 7 query heads a KV head of width 128. */
static void test_exact__three_engines_equal_the_oracle(void)
{
    enum { N = 3 };
    struct daemon daemon;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    struct run run[N] = {
        {.model = engine_model(2, 8, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32),
         .tolerance = 1e-5,
         .n_tokens = 2500},
        {.model = engine_model(2, 14, 2, 128, 128, WINNOW_DTYPE_BF16, WINNOW_DTYPE_BF16),
         .tolerance = 1.6e-2,
         .n_tokens = 1700},
        {.model = engine_model(3, 4, 4, 96, 64, WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP16),
         .tolerance = 2e-3,
         .n_tokens = 1300},
    };
    pthread_t thread[N];
    for (uint32_t i = 0; i < N; i++) {
        run[i].socket = daemon.socket;
        CHECK_EQ(pthread_create(&thread[i], NULL, run_main, &run[i]), 0);
    }
    for (uint32_t i = 0; i < N; i++) {
        pthread_join(thread[i], NULL);
        printf("width %u: window %.1e, exact step %.1e, sparse step %.1e; read %.1f %% for mass "
               "%.3f\n",
               run[i].model.k_width, run[i].error_window, run[i].error_exact, run[i].error_sparse,
               100.0 * (run[i].sum.blocks_host + run[i].sum.blocks_disk) / run[i].sum.blocks_total,
               (double)run[i].sum.mass_reached);
        CHECK(run[i].error_window < run[i].tolerance);
        CHECK(run[i].error_exact < run[i].tolerance);
        CHECK(run[i].error_sparse < 0.3);
        CHECK(run[i].sum.verdict == WINNOW_MET || run[i].sum.verdict == WINNOW_EXACT);
        CHECK(run[i].sum.mass_reached >= 0.9F);
    }
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* A fork goes on from the shared tokens as if it had read them itself, and the original does not
 * notice; truncated back, it gives the same outputs again. */
static void test_exact__fork_and_truncate_keep_the_context(void)
{
    struct daemon daemon;
    struct engine engine, twin;
    winnow_model model = engine_model(2, 6, 3, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, test_seed(), 2200, NULL);
    while (engine.n_tokens < 2000)
        ENGINE_OK(engine_window(&engine, 500, NULL));

    twin = engine; /* the same tokens through another session */
    ENGINE_OK(winnow_session_fork(engine.session, "twin", &twin.session, 0));
    uint64_t hash[3] = {0};
    double error = 0;
    for (uint32_t i = 0; i < 20; i++) {
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.hash = &hash[0]}));
        ENGINE_OK(engine_decode(&twin, &(struct engine_step){.hash = &hash[1]}));
    }
    CHECK_EQ(hash[0], hash[1]);
    ENGINE_OK(engine_truncate(&engine, 2000));
    for (uint32_t i = 0; i < 20; i++)
        ENGINE_OK(engine_decode(&engine, &(struct engine_step){.hash = &hash[2]}));
    CHECK_EQ(hash[0], hash[2]);

    /* Inside a segment: the survivors go back to the tail. */
    ENGINE_OK(engine_truncate(&engine, 700));
    ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 1, .error = &error}));
    CHECK(error < 1e-5);
    ENGINE_OK(winnow_session_close(twin.session));
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* A window of a shape so small that the daemon's limit of tokens, not of bytes, splits it. */
static void test_exact__long_window_of_a_narrow_model_is_split(void)
{
    enum { N = 6000, WIDTH = 16 };
    static float row[N * WIDTH], out[N * WIDTH];
    struct daemon daemon;
    struct engine engine;
    winnow_model model = engine_model(1, 1, 1, WIDTH, WIDTH, WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP32);
    for (uint32_t i = 0; i < N * WIDTH; i++)
        row[i] = (float)(i * 2654435761u % 1024) / 1024;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, test_seed(), 16, NULL);
    ENGINE_OK(winnow_attend_exact(engine.session, 0, 0, N, row, row, row, out, NULL, NULL, 0));
    CHECK_EQ(winnow_session_held(engine.session, 0), N);
    for (uint32_t i = 0; i < WIDTH; i++) /* the first sees itself alone, the last a mean of all */
        CHECK(fabs((double)out[i] - (double)row[i]) < 1e-6 && out[(N - 1) * WIDTH + i] > 0.3f);
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_exact__three_engines_equal_the_oracle);
    TEST_RUN(test_exact__fork_and_truncate_keep_the_context);
    TEST_RUN(test_exact__long_window_of_a_narrow_model_is_split);
    return TEST_END();
}
