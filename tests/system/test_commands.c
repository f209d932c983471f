/* What people type: winnowd's start and end, winnow, hello; exit statuses and output. */
#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <system/daemon.h>
#include <test.h>
#include <unistd.h>
#include <winnow/winnow.h>

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "2",     NULL};

/* The daemon serves, and ends on SIGTERM with 0 and without its socket. */
static void test_winnowd__sigterm_ends_it_cleanly(void)
{
    struct daemon daemon;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    CHECK(access(daemon.socket, F_OK) < 0);
    daemon_start(&daemon); /* and starts again on what it left */
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* A second daemon on the same socket, or on the same data, goes away with 75 and says who is
 * there; the first one goes on. */
static void test_winnowd__second_one_exits_75(void)
{
    struct daemon first, second;
    daemon_init(&first, small);
    daemon_start(&first);
    daemon_init(&second, small);
    strcpy(second.data_dir, first.data_dir);
    CHECK_EQ(daemon_start_failing(&second), 75);
    char *output = daemon_output(&second), pid[16];
    snprintf(pid, sizeof pid, "%d", first.pid);
    CHECK(strstr(output, pid));
    free(output);

    char socket[sizeof second.socket];
    strcpy(socket, second.socket);
    snprintf(second.data_dir, sizeof second.data_dir, "%s/data", second.dir);
    strcpy(second.socket, first.socket);
    CHECK_EQ(daemon_start_failing(&second), 75);

    char path[256], *ping;
    const char *argv[] = {program_path("winnow", path), "ping", NULL};
    CHECK_EQ(program_run(argv, first.socket, &ping), 0);
    free(ping);
    daemon_remove(&second);
    CHECK_EQ(daemon_stop(&first, SIGTERM), 0);
    daemon_remove(&first);
}

/* hello finds its tokens, and its exact step equals plain attention (it exits 1 if not). */
static void test_hello__works(void)
{
    struct daemon daemon;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    char path[256], *output;
    const char *argv[] = {program_path("hello", path), NULL};
    int status = program_run(argv, daemon.socket, &output);
    printf("%s", output);
    CHECK_EQ(status, 0);
    CHECK(strstr(output, "exact: EXACT, mass 1.000"));
    CHECK(strstr(output, "sparse: MET"));
    free(output);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

struct command {
    const char *argv[4];
    int status;
    const char *output; /* a piece of it */
};

static void run(const struct daemon *daemon, const struct command *command)
{
    char path[256], *output;
    const char *argv[8] = {program_path("winnow", path)};
    for (uint32_t i = 0; i < 4 && command->argv[i]; i++)
        argv[i + 1] = command->argv[i];
    int status = program_run(argv, daemon->socket, &output);
    if (status != command->status || !strstr(output, command->output)) {
        fprintf(stderr, "winnow %s: exit %d, expected %d with \"%s\":\n%s\n", argv[1], status,
                command->status, command->output, output);
        exit(1);
    }
    free(output);
}

/* Each command says what it saw and exits by it, with a daemon and without one. */
static void test_winnow__exit_status_and_output(void)
{
    static const struct command there[] = {
        {{"status"}, 0, "* winnowd 0.1.0 ready"},
        {{"status", "--json"}, 0, "\"schema\": \"winnow.status/1\""},
        {{"status", "--json"}, 0, "\"state\": \"ready\""},
        {{"status", "--json"}, 0, "\"pool_cap_bytes\": 33554432"},
        {{"ping"}, 0, "winnowd 0.1.0 answers in"},
        {{"--json", "ping"}, 0, "\"schema\": \"winnow.ping/1\""},
        {{"version"}, 0, "winnowd 0.1.0"},
        {{"version", "--json"}, 0, "\"winnowd\": \"0.1.0\""},
        {{"doctor"}, 0, "ok   versions"},
        {{"doctor", "--json"}, 0, "\"check\": \"memory\", \"level\": \"ok\""},
        {{"doctor", "--json"}, 0, "\"check\": \"attach\", \"level\": \"ok\""},
        {{"stat"}, 64, "no command \"stat\""},
        {{"status", "--bars"}, 64, "unrecognized argument \"--bars\""},
    };
    static const struct command gone[] = {
        {{"status"}, 69, "could not reach winnowd"},
        {{"ping", "--json"}, 69, "could not reach winnowd"},
        {{"doctor"}, 69, "hint: start winnowd"},
        {{"version", "--json"}, 0, "\"winnowd\": null"},
    };
    struct daemon daemon;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    for (uint32_t i = 0; i < sizeof there / sizeof *there; i++)
        run(&daemon, &there[i]);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    for (uint32_t i = 0; i < sizeof gone / sizeof *gone; i++)
        run(&daemon, &gone[i]);
    daemon_remove(&daemon);
}

/* status --watch without a terminal: names and units, then rows; a reader that leaves ends it
 * without an error. */
static void test_winnow__watch_writes_rows(void)
{
    struct daemon daemon;
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    char path[256], command[512], *output;
    program_path("winnow", path);
    snprintf(command, sizeof command, "set -o pipefail; %s status --watch | head -3", path);
    const char *argv[] = {"/bin/bash", "-c", command, NULL};
    CHECK_EQ(program_run(argv, daemon.socket, &output), 0);
    CHECK(strstr(output, "sessions"));
    CHECK(strstr(output, "MiB/s"));
    uint32_t n_lines = 0;
    for (const char *at = output; *at; at++)
        n_lines += *at == '\n';
    CHECK_EQ(n_lines, 3);
    free(output);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

/* A user who is not in allow_uids does not get past the connection, even where the socket's own
 * rights would let him, and is told so. */
static void test_winnowd__foreign_uid_is_denied(void)
{
    enum { FOREIGN_UID = 65534 };
    struct daemon daemon;
    int status;
    if (geteuid() != 0)
        TEST_SKIP("only root can be another user");
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    CHECK_EQ(chmod(daemon.dir, 0711), 0);
    CHECK_EQ(chmod(daemon.socket, 0666), 0);
    pid_t pid = fork(); /* this process has not used the library yet */
    if (pid == 0) {
        winnow_client *client;
        winnow_client_options options = WINNOW_CLIENT_OPTIONS;
        options.address = daemon.socket;
        if (setresuid(FOREIGN_UID, FOREIGN_UID, FOREIGN_UID) < 0)
            _exit(1);
        int rc = winnow_client_open(&options, &client);
        fprintf(stderr, "%s\n", winnow_error_text());
        _exit(rc == -EACCES && strstr(winnow_error_text(), "allow_uids") ? 0 : 2);
    }
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);

    char path[256], *output;
    const char *argv[] = {"/usr/bin/setpriv",
                          "--reuid=65534",
                          "--clear-groups",
                          "--",
                          program_path("winnow", path),
                          "ping",
                          NULL};
    status = program_run(argv, daemon.socket, &output);
    if (status == 126 || status == 127) /* that user does not reach the build folder */
        printf("not tried: %s", output);
    else if (status != 77 || !strstr(output, "allow_uids"))
        fprintf(stderr, "winnow ping: exit %d, %s", status, output), exit(1);
    free(output);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_winnowd__sigterm_ends_it_cleanly);
    TEST_RUN(test_winnowd__second_one_exits_75);
    TEST_RUN(test_hello__works);
    TEST_RUN(test_winnow__exit_status_and_output);
    TEST_RUN(test_winnow__watch_writes_rows);
    TEST_RUN(test_winnowd__foreign_uid_is_denied);
    return TEST_END();
}
