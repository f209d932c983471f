/* Death on either side: what it leaves behind (nothing), and what the other side is told. */
#include <base/clock.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>
#include <unistd.h>

enum { N_KILLS = 200, N_ROUND = 24, SETTLE_MS = 5000 };

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "1GiB",
                                    "--threads",   "2",     NULL};

static winnow_model victim_model(void)
{
    return engine_model(2, 4, 2, 64, 64, WINNOW_DTYPE_FP16, WINNOW_DTYPE_FP32);
}

/* The victim: this program again (gRPC does not survive a fork), told the socket. It writes a byte
 * once it is in the middle of things, and goes on until it is killed. */
static int victim_main(const char *socket, uint64_t seed)
{
    struct engine engine;
    winnow_model model = victim_model();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    engine_open(&engine, socket, &model, seed, 100000, NULL);
    if (seed % 2) { /* killed in a window */
        if (write(STDOUT_FILENO, "w", 1) != 1)
            return 1;
        while (engine_window(&engine, 200, NULL) == 0 && engine.n_tokens < 90000)
            ;
    } else { /* killed in a step */
        ENGINE_OK(engine_window(&engine, 300, NULL));
        if (write(STDOUT_FILENO, "s", 1) != 1)
            return 1;
        while (engine_decode(&engine, &(struct engine_step){0}) == 0 && engine.n_tokens < 90000)
            ;
    }
    return 1;
}

static pid_t victim_start(const char *socket, uint64_t seed)
{
    char path[256], seed_text[24], byte;
    int pipe_fd[2];
    ssize_t n_bytes = readlink("/proc/self/exe", path, sizeof path - 1);
    CHECK(n_bytes > 0);
    path[n_bytes] = 0;
    snprintf(seed_text, sizeof seed_text, "%" PRIu64, seed);
    CHECK_EQ(pipe(pipe_fd), 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        setpgid(0, 0); /* a group of its own, with what it forks */
        dup2(pipe_fd[1], STDOUT_FILENO);
        close(pipe_fd[0]);
        close(pipe_fd[1]);
        execl(path, path, "--victim", socket, seed_text, (char *)NULL);
        _exit(127);
    }
    close(pipe_fd[1]);
    CHECK_EQ(read(pipe_fd[0], &byte, 1), 1);
    close(pipe_fd[0]);
    return pid;
}

struct neighbour {
    struct engine engine;
    _Atomic bool stop;
    uint32_t n_rounds;
    bool same;
};

/* Decodes the same 24 tokens over and over: the bits of each round must be those of the first. */
static void *neighbour_main(void *arg)
{
    struct neighbour *neighbour = arg;
    uint64_t first_hash = 0;
    neighbour->same = true;
    for (; !neighbour->stop || neighbour->n_rounds < 2; neighbour->n_rounds++) {
        uint64_t hash = 0;
        for (uint32_t i = 0; i < N_ROUND; i++)
            ENGINE_OK(engine_decode(&neighbour->engine, &(struct engine_step){.hash = &hash}));
        if (!neighbour->n_rounds)
            first_hash = hash;
        neighbour->same &= hash == first_hash;
        ENGINE_OK(engine_truncate(&neighbour->engine, 1500));
    }
    return NULL;
}

static int compare_ns(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static winnow_stats stats_of(winnow_client *client)
{
    winnow_stats stats = WINNOW_STATS;
    ENGINE_OK(winnow_stats_get(client, NULL, &stats, 0));
    return stats;
}

/* Asks Stats until no more tokens are held than at the baseline; `slack` of them are the
 * neighbour's, who is in the middle of a round. */
static int64_t await_settled(winnow_client *client, const winnow_stats *baseline, uint64_t slack)
{
    int64_t begin_ns = winnow_clock_now_ns();
    while (stats_of(client).tokens_held > baseline->tokens_held + slack) {
        CHECK(winnow_clock_now_ns() - begin_ns < SETTLE_MS * WINNOW_NS_PER_MS);
        poll(NULL, 0, 1);
    }
    return winnow_clock_now_ns() - begin_ns;
}

static void await_fds(pid_t pid, uint32_t n_fds)
{
    int64_t begin_ns = winnow_clock_now_ns();
    while (proc_n_fds(pid) > n_fds) {
        CHECK(winnow_clock_now_ns() - begin_ns < SETTLE_MS * WINNOW_NS_PER_MS);
        poll(NULL, 0, 1);
    }
}

/* 200 clients are killed in the middle of a window or a step. What they held is free again within
 * the wait (Stats asked until it is), descriptors are as before, and an engine beside them gets the
 * same bits throughout. */
static void test_killed__clients_leave_nothing(void)
{
    struct daemon daemon;
    struct neighbour neighbour = {0};
    pthread_t thread;
    winnow_model model = victim_model();
    static int64_t took_ns[N_KILLS];
    winnow_client *client;
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;

    daemon_init(&daemon, small);
    daemon_start(&daemon);
    options.address = daemon.socket;
    ENGINE_OK(winnow_client_open(&options, &client));
    engine_open(&neighbour.engine, daemon.socket, &model, 76, 1600, NULL);
    ENGINE_OK(engine_decode(&neighbour.engine, &(struct engine_step){0})); /* takes step scratch */
    engine_close(&neighbour.engine);
    winnow_stats idle = stats_of(client);
    engine_open(&neighbour.engine, daemon.socket, &model, 77, 1600, NULL);
    for (uint32_t i = 0; i < 3; i++)
        ENGINE_OK(engine_window(&neighbour.engine, 500, NULL));
    ENGINE_OK(engine_decode(&neighbour.engine, &(struct engine_step){0}));
    ENGINE_OK(engine_truncate(&neighbour.engine, 1500));
    winnow_stats baseline = stats_of(client);
    uint32_t n_fds = proc_n_fds(daemon.pid);
    CHECK_EQ(pthread_create(&thread, NULL, neighbour_main, &neighbour), 0);

    for (uint32_t i = 0; i < N_KILLS; i++) {
        pid_t victim = victim_start(daemon.socket, (uint32_t)test_seed() / 2 * 2 + i);
        CHECK_EQ(kill(victim, SIGKILL), 0);
        CHECK_EQ(waitpid(victim, NULL, 0), victim);
        took_ns[i] = await_settled(client, &baseline, N_ROUND);
    }
    neighbour.stop = true;
    pthread_join(thread, NULL);
    CHECK(neighbour.same);
    CHECK_EQ(stats_of(client).pool_tail_bytes, baseline.pool_tail_bytes);
    CHECK_EQ(stats_of(client).pool_staging_bytes, baseline.pool_staging_bytes);
    await_fds(daemon.pid, n_fds);
    qsort(took_ns, N_KILLS, sizeof *took_ns, compare_ns);
    printf("%d kills: free again after %.1f ms (median), %.1f (worst); neighbour %u rounds\n",
           N_KILLS, (double)took_ns[N_KILLS / 2] / 1e6, (double)took_ns[N_KILLS - 1] / 1e6,
           neighbour.n_rounds);
    engine_close(&neighbour.engine);
    await_settled(client, &idle, 0);
    CHECK_EQ(stats_of(client).pool_free_bytes, idle.pool_free_bytes);
    CHECK_EQ(stats_of(client).disk_used_bytes, 0);
    /* Scratch of steps that ran at once stays; a segment left by each kill would be 10 MiB. */
    CHECK(stats_of(client).index_bytes < idle.index_bytes + (4 << 20));
    winnow_client_close(client);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

static void *kill_daemon(void *arg)
{
    struct daemon *daemon = arg;
    daemon_stop(daemon, SIGKILL);
    return NULL;
}

/* What a refusal costs while there is no daemon: the median of 1,000. */
static double refusal_us(winnow_session *session)
{
    enum { N_CALLS = 1000 };
    static int64_t took_ns[N_CALLS];
    for (uint32_t i = 0; i < N_CALLS; i++) {
        int64_t begin_ns = winnow_clock_now_ns();
        CHECK_EQ(winnow_session_truncate(session, 0, 0), -EHOSTDOWN);
        took_ns[i] = winnow_clock_now_ns() - begin_ns;
    }
    qsort(took_ns, N_CALLS, sizeof *took_ns, compare_ns);
    return (double)took_ns[N_CALLS / 2] / 1e3;
}

/* Opens a session once the daemon is found; ms from now until then. */
static double find_again(struct engine *engine)
{
    int64_t begin_ns = winnow_clock_now_ns();
    int rc;
    while ((rc = winnow_session_truncate(engine->session, 0, 0)) == -EHOSTDOWN)
        CHECK(winnow_clock_now_ns() - begin_ns < 10 * WINNOW_NS_PER_S);
    CHECK_EQ(rc, -ESTALE);
    double took_ms = (double)(winnow_clock_now_ns() - begin_ns) / 1e6;
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    options.model = engine->model;
    CHECK_EQ(winnow_session_close(engine->session), -ESTALE);
    ENGINE_OK(winnow_session_open(engine->client, &options, &engine->session, 0));
    return took_ms;
}

/* The daemon dies under a running engine: -EHOSTDOWN before the deadline, and at once from then
 * on. Started again it answers -ESTALE to the old session; a new one takes the tokens again. Twenty
 * times over, in one engine process, every output is attention. */
static void test_killed__daemon_is_told_and_found_again(void)
{
    enum { N_ROUNDS = 20 };
    struct daemon daemon;
    struct engine engine;
    winnow_model model = victim_model();
    double told_ms = 0, back_ms = 0, error = 0, refused_us = 0;
    uint32_t n_steps = 0;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, 5, 20000, NULL);
    ENGINE_OK(engine_window(&engine, 400, NULL));
    for (uint32_t round = 0; round < N_ROUNDS; round++) {
        pthread_t killer;
        int rc = 0;
        int64_t begin_ns = 0;
        uint64_t n_before = test_seed() * (round + 1) % 30; /* steps, then the kill is on its way */
        for (uint64_t i = 0; rc == 0 && engine.n_tokens < engine.n_tokens_max; i++, n_steps++) {
            if (i == n_before)
                CHECK_EQ(pthread_create(&killer, NULL, kill_daemon, &daemon), 0);
            begin_ns = winnow_clock_now_ns();
            rc = engine_decode(&engine, &(struct engine_step){.mass = 1, .error = &error});
        }
        told_ms = fmax(told_ms, (double)(winnow_clock_now_ns() - begin_ns) / 1e6);
        CHECK_EQ(rc, -EHOSTDOWN);
        CHECK(told_ms < 2000); /* a step's deadline */
        pthread_join(killer, NULL);
        refused_us = fmax(refused_us, refusal_us(engine.session));
        daemon_start(&daemon);
        back_ms = fmax(back_ms, find_again(&engine));
        ENGINE_OK(engine_resend(&engine));
    }
    ENGINE_OK(engine_decode(&engine, &(struct engine_step){.mass = 1, .error = &error}));
    printf("%d kills of the daemon: told within %.1f ms, refused in %.2f us, found again within "
           "%.1f ms (worst); error %.1e in %u steps\n",
           N_ROUNDS, told_ms, refused_us, back_ms, error, n_steps);
    CHECK(error < 1e-5);
    TEST_ROW(F22, N_ROUNDS);
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* A stopped daemon answers nobody: calls are back by their deadline, the breaker answers, and once
 * it goes on the same session goes on. */
static void test_killed__stopped_daemon_keeps_its_sessions(void)
{
    struct daemon daemon;
    struct engine engine;
    winnow_model model = victim_model();
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    engine_open(&engine, daemon.socket, &model, 5, 1000, NULL);
    ENGINE_OK(engine_window(&engine, 400, NULL));
    int status;
    CHECK_EQ(kill(daemon.pid, SIGSTOP), 0);
    CHECK_EQ(waitpid(daemon.pid, &status, WUNTRACED), daemon.pid);
    CHECK(WIFSTOPPED(status));
    double late_ms = 0;
    for (uint32_t i = 0; i < 3; i++) {
        int64_t deadline_ns = winnow_clock_now_ns() + 100 * WINNOW_NS_PER_MS;
        CHECK_EQ(winnow_session_truncate(engine.session, 400, deadline_ns), -ETIMEDOUT);
        late_ms = fmax(late_ms, (double)(winnow_clock_now_ns() - deadline_ns) / 1e6);
    }
    printf("late by %.1f ms (worst of 3)\n", late_ms);
    CHECK(late_ms < 1000);
    CHECK_EQ(winnow_session_truncate(engine.session, 400, 0), -EHOSTDOWN);
    CHECK_EQ(kill(daemon.pid, SIGCONT), 0);
    int64_t begin_ns = winnow_clock_now_ns();
    int rc;
    while ((rc = winnow_session_truncate(engine.session, 400, 0)) == -EHOSTDOWN)
        CHECK(winnow_clock_now_ns() - begin_ns < 10 * WINNOW_NS_PER_S);
    CHECK_EQ(rc, 0);
    ENGINE_OK(engine_decode(&engine, &(struct engine_step){0}));
    engine_close(&engine);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* A child of fork may not use its parent's client, and its life keeps no lease of the parent's. */
static void test_killed__fork_keeps_no_lease(void)
{
    struct daemon daemon;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    winnow_client *client;
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;
    options.address = daemon.socket;
    ENGINE_OK(winnow_client_open(&options, &client));
    winnow_stats baseline = stats_of(client);

    /* An engine forks a child that holds every inherited descriptor, and is killed. */
    pid_t victim = victim_start(daemon.socket, 2 | UINT64_C(1) << 63);
    CHECK(stats_of(client).tokens_held > baseline.tokens_held);
    CHECK_EQ(kill(victim, SIGKILL), 0);
    CHECK_EQ(waitpid(victim, NULL, 0), victim);
    await_settled(client, &baseline, 0);
    CHECK_EQ(kill(-victim, SIGKILL), 0); /* its child was alive all the while */
    winnow_client_close(client);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* The engine of fork_keeps_no_lease: forks in the middle, the child only holds on. */
static int forking_victim_main(const char *socket)
{
    struct engine engine;
    winnow_model model = victim_model();
    engine_open(&engine, socket, &model, 9, 2000, NULL);
    ENGINE_OK(engine_window(&engine, 300, NULL));
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, 0);
        int rc = winnow_session_truncate(engine.session, 0, 0);
        if (write(STDOUT_FILENO, rc == -ECHILD ? "c" : "", rc == -ECHILD) < 0)
            _exit(1);
        alarm(60); /* should the test fail and not end it */
        pause();
    }
    pause();
    return 1;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "--victim")) {
        uint64_t seed = strtoull(argv[3], NULL, 10);
        return seed >> 63 ? forking_victim_main(argv[2]) : victim_main(argv[2], seed);
    }
    TEST_INIT(argc, argv);
    TEST_RUN(test_killed__fork_keeps_no_lease);
    TEST_RUN(test_killed__clients_leave_nothing);
    TEST_RUN(test_killed__daemon_is_told_and_found_again);
    TEST_RUN(test_killed__stopped_daemon_keeps_its_sessions);
    return TEST_END();
}
