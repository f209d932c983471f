// winnowd: reads its configuration, takes all that it will ever hold, serves, and drains.
//
//   main thread     signals, listener, dead peers
//   serving thread  gRPC and core (rpc/server.c)
//   the team's workers; the store's I/O and sync threads
#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <base/log.h>
#include <base/team.h>
#include <core/core.h>
#include <daemon/config.h>
#include <daemon/limits.h>
#include <daemon/listener.h>
#include <daemon/rpc/rpc.h>
#include <errno.h>
#include <inttypes.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
    EXIT_USAGE = 64,
    EXIT_SOFTWARE = 70, /* memory, threads, I/O */
    EXIT_CANTCREATE = 73,
    EXIT_SECOND = 75, /* another daemon has the socket or the data directory */
    EXIT_CONFIG = 78,
};

enum { DRAIN_S = 10, CONNECTIONS_A_CLIENT = 3, TEAM_SPIN_US = 50 };

struct daemon {
    struct winnow_config config;
    struct winnow_origins origins;
    struct winnow_machine machine;
    struct winnow_limits limits;
    struct winnow_complaints complaints;
    const struct winnow_kernels *kernels;
    struct winnow_rpc *rpc;
    struct winnow_team *team;
    struct winnow_core *core;
    struct winnow_store *store;
    struct winnow_listener *listener;
    int signal_fd;
    int served_fd;                    /* eventfd: the serving thread has ended */
    const struct winnow_gpu_api *gpu; /* NULL: none */
};

extern char **environ;

static void print_help(void)
{
    puts("winnowd [--config FILE] [--OPTION VALUE]...   serve until SIGTERM\n"
         "winnowd --check            print what would be taken, and from where; then exit\n"
         "winnowd --example-config   print a configuration file\n"
         "winnowd --options-table    print the options as docs/operations.md has them\n"
         "winnowd --version, --help\n\n"
         "Options are also keys of the file (host_pool = 4GiB) and variables (WINNOW_HOST_POOL).\n"
         "Flags win over variables, variables over the file.\n");
    winnow_options_print_help(stdout);
    puts("\nExit: 0; 64 usage; 70 system; 73 cannot create; 75 another daemon; 78 configuration.");
}

static int complain(const struct daemon *daemon)
{
    fputs(daemon->complaints.text, stderr);
    return EXIT_CONFIG;
}

static_assert(WINNOW_POLICY_CODES == 1, "policies are numbered as policy_of names them");
static_assert(WINNOW_POLICY_TACTIC == 2, "its second");
static_assert(WINNOW_POLICY_MOMENT == 3, "its third");
static_assert(WINNOW_POLICY_EXACT == 4, "its last");

static uint32_t policy_of(const char *word)
{
    static const char *const words[] = {"codes", "tactic", "moment", "exact"};
    uint32_t policy = WINNOW_POLICY_CODES;
    for (uint32_t i = 0; i < 4; i++)
        if (!strcmp(words[i], word))
            policy = i + 1;
    return policy;
}

/* Pages of big messages come back to us instead of to the kernel; small daemons stay small. */
static void tune_malloc(const struct winnow_limits *limits)
{
    if (limits->host_pool_bytes >= UINT64_C(1) << 30) {
        mallopt(M_MMAP_THRESHOLD, 256 << 20);
        mallopt(M_TRIM_THRESHOLD, 1 << 30);
        mallopt(M_TOP_PAD, 64 << 20);
    } else {
        mallopt(M_ARENA_MAX, 2);
    }
}

/* What fits, in tokens of a model that people know. */
static void print_room(const struct daemon *daemon, FILE *file)
{
    const struct winnow_model_shape shape = {
        .n_layers = 32,
        .n_q_heads = 32,
        .n_kv_heads = 8,
        .k_width = 128,
        .v_width = 128,
        .kv_dtype = WINNOW_FP16,
        .io_dtype = WINNOW_FP32,
        .block_layout = WINNOW_BLOCK_LAYOUT,
    };
    double kv_bytes = (double)shape.n_layers * shape.n_kv_heads * winnow_block_bytes(&shape) /
                      WINNOW_BLOCK_TOKENS;
    double index_bytes = winnow_core_index_bytes_per_token(&shape);
    char gpu[256];
    if (winnow_core_gpu_plan(daemon->core, &shape, gpu))
        fprintf(file, "gpu    of an 8B model: %s\n", gpu);
    fprintf(file,
            "room   %.0f tokens of an 8B model (index_memory), %.0f of them in memory (host_pool), "
            "%.0f on disk (disk_cap)\n",
            (double)daemon->limits.index_memory_bytes / index_bytes,
            (double)daemon->limits.host_pool_bytes / kv_bytes,
            (double)daemon->limits.disk_cap_bytes / kv_bytes);
}

/* A connection needs three descriptors. */
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static int block_signals(struct daemon *daemon)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    daemon->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return daemon->signal_fd < 0 ? -errno : 0;
}

/* Finds the GPU, or that there is none. Before anything is measured: its driver takes memory too. */
static int find_gpu(struct daemon *daemon)
{
    const struct winnow_config *config = &daemon->config;
    bool is_required = !strcmp(config->gpu, "required");
    char text[256] = "gpu = off";
    const struct winnow_gpu_api *gpu =
        strcmp(config->gpu, "off") ? winnow_gpu_load(NULL, text) : NULL;
    if (gpu && gpu->probe(config->gpu_device, text) < 0)
        gpu = NULL;
    if (!gpu && is_required) {
        fprintf(stderr, "gpu = required, but %s. from: %s. hint: gpu = auto\n", text,
                winnow_origin(&daemon->origins, offsetof(struct winnow_config, gpu)));
        return EXIT_CONFIG;
    }
    daemon->gpu = gpu;
    winnow_log(WINNOW_LOG_NOTICE, "gpu", "used=%d text=\"%s\"", gpu != NULL, text);
    return 0;
}

/* Team, core: all memory is reserved here. */
static int make_core(struct daemon *daemon)
{
    winnow_assert(daemon->rpc);
    winnow_assert(daemon->kernels);
    winnow_assert(daemon->limits.n_threads);
    winnow_assert(!daemon->core);
    struct winnow_team_options team = {
        .n_workers = daemon->limits.n_threads - 1,
        .spin_us = TEAM_SPIN_US,
        .notify = winnow_rpc_wake,
        .notify_arg = daemon->rpc,
    };
    if (winnow_team_create(&team, &daemon->team) < 0) {
        fprintf(stderr, "no memory or threads for %u workers. hint: threads\n", team.n_workers);
        return EXIT_SOFTWARE;
    }
    struct winnow_core_options core = {
        .host_pool_bytes = daemon->limits.host_pool_bytes,
        .index_memory_bytes = daemon->limits.index_memory_bytes,
        .segment_tokens = daemon->limits.segment_tokens,
        .dense_below = daemon->config.dense_below,
        .policy = policy_of(daemon->config.policy),
        .mass = daemon->config.mass,
        .n_sessions_max = daemon->config.n_sessions_max,
        .n_steps_max = daemon->limits.n_steps_max,
        .n_tokens_max = daemon->config.n_tokens_max,
        .kernels = daemon->kernels,
        .team = daemon->team,
        .gpu = daemon->gpu,
        .gpu_ordinal = daemon->config.gpu_device,
        .gpu_memory_bytes = daemon->config.gpu_memory_bytes,
        .n_gpu_sessions_max = daemon->config.n_gpu_sessions,
    };
    if (getrandom(&core.seed, sizeof core.seed, 0) != sizeof core.seed)
        return EXIT_SOFTWARE;
    char text[256] = "no memory";
    int rc = winnow_core_create(&core, &daemon->core, text);
    if (rc < 0 && core.gpu && strcmp(daemon->config.gpu, "required")) {
        winnow_log(WINNOW_LOG_WARNING, "gpu", "used=0 text=\"%s\"", text);
        core.gpu = NULL;
        rc = winnow_core_create(&core, &daemon->core, text);
    }
    if (rc < 0)
        fprintf(stderr, "%s\n", text);
    return !rc ? 0 : rc == -EINVAL ? EXIT_CONFIG : EXIT_SOFTWARE;
}

static int exit_of_store(int rc)
{
    switch (rc) {
    case -EBUSY:
        return EXIT_SECOND;
    case -ENOSPC:
    case -EROFS:
        return EXIT_CANTCREATE;
    case -EACCES:
    case -ENOTSUP:
    case -EINVAL:
        return EXIT_CONFIG;
    default:
        return EXIT_SOFTWARE;
    }
}

static int open_store(struct daemon *daemon)
{
    winnow_assert(daemon->core);
    winnow_assert(!daemon->store);
    void *arena;
    size_t arena_bytes;
    winnow_core_arena(daemon->core, &arena, &arena_bytes);
    winnow_assert(arena_bytes);
    struct winnow_store_options options = {
        .dir = daemon->config.data_dir,
        .disk_cap_bytes = daemon->limits.disk_cap_bytes,
        .io_method = daemon->config.io_method,
        .arena = arena,
        .arena_bytes = arena_bytes,
        .n_requests_max = WINNOW_STORE_REQUESTS,
        .n_segments_max = daemon->limits.n_segments_max,
        .notify = winnow_rpc_wake,
        .notify_arg = daemon->rpc,
    };
    char text[256] = "cannot start the store's threads";
    int rc = -EIO;
    if (getrandom(&options.seed, sizeof options.seed, 0) == sizeof options.seed)
        rc = winnow_store_open(&options, &daemon->store, text);
    if (!rc)
        rc = winnow_store_start(daemon->store);
    if (rc < 0) {
        fprintf(stderr, "%s\n", text);
        return exit_of_store(rc);
    }
    winnow_core_set_store(daemon->core, daemon->store);
    struct winnow_store_facts facts;
    winnow_store_facts(daemon->store, &facts);
    winnow_log(*facts.io.remedy ? WINNOW_LOG_WARNING : WINNOW_LOG_NOTICE, "store",
               "method=%s flags=\"%s\" direct=%d remedy=\"%s\"", facts.io.method, facts.io.flags,
               facts.io.direct, facts.io.remedy);
    return 0;
}

static void take_connection(void *rpc, int fd)
{
    winnow_rpc_add_connection(rpc, fd);
}

static int open_listener(struct daemon *daemon)
{
    winnow_assert(daemon->rpc);
    winnow_assert(!daemon->listener);
    winnow_assert(daemon->signal_fd >= 0);
    struct winnow_listener_options options = {
        .path = daemon->config.socket,
        .uids = &daemon->config.allow_uids,
        .n_connections_max = CONNECTIONS_A_CLIENT * daemon->limits.n_clients_max,
        .signal_fd = daemon->signal_fd,
        .accepted = take_connection,
        .arg = daemon->rpc,
    };
    char text[256];
    int rc = winnow_listener_open(&options, &daemon->listener, text);
    if (rc < 0)
        fprintf(stderr, "%s\n", text);
    return !rc ? 0 : rc == -EBUSY ? EXIT_SECOND : EXIT_CANTCREATE;
}

static void *serve(void *arg)
{
    struct daemon *daemon = arg;
    pthread_setname_np(pthread_self(), "winnow-serve");
    winnow_rpc_run(daemon->rpc, daemon->core, daemon->store);
    eventfd_write(daemon->served_fd, 1);
    return NULL;
}

static void take_signals(const struct daemon *daemon)
{
    struct signalfd_siginfo signal;
    while (read(daemon->signal_fd, &signal, sizeof signal) == sizeof signal)
        winnow_log(WINNOW_LOG_NOTICE, "signal", "name=SIG%s pid=%u uid=%u",
                   sigabbrev_np((int)signal.ssi_signo), signal.ssi_pid, signal.ssi_uid);
}

/* Running calls have their time; who cannot wait sends a second signal. */
static void drain(struct daemon *daemon)
{
    winnow_assert(!daemon->listener);
    struct pollfd events[2] = {{.fd = daemon->served_fd, .events = POLLIN},
                               {.fd = daemon->signal_fd, .events = POLLIN}};
    take_signals(daemon);
    winnow_rpc_drain(daemon->rpc, winnow_clock_now_ns() + DRAIN_S * WINNOW_NS_PER_S);
    while (!(events[0].revents & POLLIN)) {
        if (poll(events, 2, -1) < 0 || !(events[1].revents & POLLIN))
            continue;
        take_signals(daemon);
        winnow_rpc_drain(daemon->rpc, winnow_clock_now_ns());
    }
}

static int serve_until_signal(struct daemon *daemon)
{
    winnow_assert(daemon->listener);
    winnow_assert(daemon->core);
    pthread_t thread;
    daemon->served_fd = eventfd(0, EFD_CLOEXEC);
    if (daemon->served_fd < 0) {
        fprintf(stderr, "cannot make an eventfd: %s. hint: ulimit -n\n", strerror(errno));
        return EXIT_SOFTWARE;
    }
    int rc = pthread_create(&thread, NULL, serve, daemon);
    if (rc) {
        fprintf(stderr, "cannot start the serving thread: %s\n", strerror(rc));
        return EXIT_SOFTWARE;
    }
    winnow_log(WINNOW_LOG_NOTICE, "serving", "version=%s socket=%s threads=%u kernels=%s",
               WINNOW_VERSION, daemon->config.socket, daemon->limits.n_threads,
               daemon->kernels->name);
    rc = winnow_listener_run(daemon->listener);
    winnow_listener_close(daemon->listener);
    daemon->listener = NULL;
    drain(daemon);
    pthread_join(thread, NULL);
    winnow_log(WINNOW_LOG_NOTICE, "stopped", "listener=%d", rc);
    return rc ? EXIT_SOFTWARE : 0;
}

static int run(struct daemon *daemon, enum winnow_verb verb)
{
    winnow_assert(daemon->kernels);
    winnow_assert(!daemon->complaints.n);
    struct winnow_rpc_options rpc = {
        .limits = &daemon->limits,
        .config = &daemon->config,
        .kernels_name = daemon->kernels->name,
    };
    if (winnow_rpc_create(&rpc, &daemon->rpc) < 0) {
        fprintf(stderr, "no memory for the RPC server. hint: a smaller host_pool\n");
        return EXIT_SOFTWARE;
    }
    int code = find_gpu(daemon);
    if (code)
        return code;
    if (winnow_limits_measure(&daemon->limits) < 0) {
        fprintf(stderr, "cannot read /proc/self/status. hint: mount /proc\n");
        return EXIT_SOFTWARE;
    }
    /* Once without the core's own part, so that what cannot fit is not even reserved. */
    winnow_limits_check_sum(&daemon->limits, &daemon->origins, &daemon->machine,
                            &daemon->complaints);
    if (daemon->complaints.n)
        return complain(daemon);
    code = make_core(daemon);
    if (code)
        return code;
    daemon->limits.core_bytes = winnow_core_fixed_bytes(daemon->core);
    if (winnow_core_has_gpu(daemon->core) &&
        winnow_limits_measure_gpu(&daemon->limits, winnow_core_gpu_window_bytes(daemon->core)) <
            0) {
        fprintf(stderr, "cannot read /proc/self/status. hint: mount /proc\n");
        return EXIT_SOFTWARE;
    }
    winnow_limits_check_sum(&daemon->limits, &daemon->origins, &daemon->machine,
                            &daemon->complaints);
    if (daemon->complaints.n)
        return complain(daemon);
    FILE *plan = verb == WINNOW_VERB_CHECK ? stdout : stderr;
    winnow_limits_print(&daemon->limits, &daemon->config, &daemon->origins, &daemon->machine, plan);
    print_room(daemon, plan);
    if (verb == WINNOW_VERB_CHECK)
        return 0;
    code = open_store(daemon);
    if (!code)
        code = open_listener(daemon);
    if (!code)
        code = serve_until_signal(daemon);
    return code;
}

/* Gives all back. Memory that the disk was given and never returned cannot be: the kernel may write
 * into it still, so the process ends with all that it holds, its threads too. */
static void finish(struct daemon *daemon)
{
    winnow_listener_close(daemon->listener);
    int rc = winnow_store_close(daemon->store);
    if (rc < 0) {
        winnow_log(WINNOW_LOG_ERROR, "disk_held", "errno=%d text=\"%s\"", -rc,
                   "reads or writes never came back from the disk; see the kernel's log");
        fflush(NULL);
        _exit(EXIT_SOFTWARE);
    }
    winnow_core_destroy(daemon->core);
    winnow_team_destroy(daemon->team);
    winnow_rpc_destroy(daemon->rpc);
}

/* Prints what a verb asks for; -1: it asks for more. */
static int print_verb(enum winnow_verb verb)
{
    switch (verb) {
    case WINNOW_VERB_HELP:
        print_help();
        return 0;
    case WINNOW_VERB_VERSION:
        puts("winnowd " WINNOW_VERSION);
        return 0;
    case WINNOW_VERB_EXAMPLE:
        winnow_options_print_example(stdout);
        return 0;
    case WINNOW_VERB_TABLE:
        winnow_options_print_table(stdout);
        return 0;
    default:
        return -1;
    }
}

int main(int argc, char **argv)
{
    static struct daemon daemon;
    enum winnow_verb verb;
    if (winnow_config_read(argc, argv, environ, &daemon.config, &daemon.origins, &verb,
                           &daemon.complaints) < 0) {
        fputs(daemon.complaints.text, stderr);
        return EXIT_USAGE;
    }
    int code = print_verb(verb);
    if (code >= 0)
        return code;
    winnow_machine_probe(&daemon.machine, daemon.config.data_dir);
    winnow_limits_plan(&daemon.config, &daemon.origins, &daemon.machine, &daemon.limits,
                       &daemon.complaints);
    const char *kernels = daemon.config.kernels;
    daemon.kernels = winnow_kernels_find(strcmp(kernels, "auto") ? kernels : NULL);
    if (!daemon.kernels)
        winnow_complain(&daemon.complaints, "this processor does not run kernels \"%s\". from: %s",
                        kernels,
                        winnow_origin(&daemon.origins, offsetof(struct winnow_config, kernels)));
    if (daemon.complaints.n)
        return complain(&daemon);
    if (block_signals(&daemon) < 0)
        return EXIT_SOFTWARE;
    raise_file_limit();
    tune_malloc(&daemon.limits);
    code = run(&daemon, verb);
    finish(&daemon);
    return code;
}
