/* What a start says, takes and leaves: --check, exit codes, modes of what is made, signals. */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <sys/stat.h>
#include <system/daemon.h>
#include <test.h>
#include <unistd.h>

static const char *const small[] = {"--host-pool", "16MiB",      "--index-memory",
                                    "16MiB",       "--disk-cap", "512MiB",
                                    "--threads",   "1",          NULL};

struct attempt {
    const char *args[8];
    const char *variable; /* NULL: none */
    int status;
    const char *words[3]; /* of what it says */
};

/* A start that ends by itself: its status and words; it makes neither socket nor data. */
static void attempt_run(const struct attempt *attempt)
{
    struct daemon daemon;
    daemon_init(&daemon, attempt->args);
    daemon.env[0] = attempt->variable;
    int status = daemon_start_failing(&daemon);
    char *output = daemon_output(&daemon);
    bool said = true;
    for (uint32_t i = 0; i < 3 && attempt->words[i]; i++)
        said &= strstr(output, attempt->words[i]) != NULL;
    if (status != attempt->status || !said)
        fprintf(stderr, "%s %s: exit %d, said:\n%s\n", attempt->args[0],
                attempt->args[1] ? attempt->args[1] : "", status, output);
    CHECK_EQ(status, attempt->status);
    CHECK(said);
    CHECK(access(daemon.socket, F_OK) < 0 && access(daemon.data_dir, F_OK) < 0);
    free(output);
    daemon_remove(&daemon);
}

/* --check prints the whole sum and what fits, exits 0, and leaves the machine as it was. */
static void test_start__check_touches_nothing(void)
{
    attempt_run(&(struct attempt){
        {"--check", "--host-pool", "32MiB", "--index-memory", "28MiB", "--disk-cap", "512MiB"},
        NULL,
        0,
        {"host_pool 32 MiB from --host-pool", "memory pool 32 MiB + index 28 MiB + in flight 8 MiB",
         "tokens of an 8B model (index_memory)"}});
}

/* Faults of the command line exit 64, of the configuration 78, all of them at once, each with
 * where it came from and what would do. */
static void test_start__faults_have_their_exit(void)
{
    static const struct attempt attempts[] = {
        {{"--host-pol", "1GiB"},
         NULL,
         64,
         {"unrecognized option \"--host-pol\". hint: --host-pool"}},
        {{"serve"}, NULL, 64, {"unexpected argument \"serve\". hint: --help"}},
        {{"--mass", "2"},
         "WINNOW_HOST_POL=1GiB",
         78,
         {"unrecognized variable \"host_pol\". from: WINNOW_HOST_POL. hint: host_pool",
          "mass \"2\" is not a share above 0 and up to 1. from: --mass"}},
        {{"--config", "/tmp"}, NULL, 78, {"cannot read /tmp: Is a directory. from: --config"}},
        {{"--host-pool", "1000GiB"}, NULL, 78, {"from: --host-pool. hint: host_pool ", " fits"}},
        {{"--host-pool", "16MiB", "--disk-cap", "1000TiB"},
         NULL,
         78,
         {"disk_cap 1000 TiB exceeds the ", "from: --disk-cap. hint: ", " fits"}},
        {{"--host-pool", "16MiB", "--gpu", "required", "--gpu-device", "255"},
         NULL,
         78,
         {"gpu = required, but no ", "from: --gpu. hint: gpu = auto"}},
        {{"--index-memory", "1MiB", "--host-pool", "4MiB"},
         NULL,
         78,
         {"host_pool \"4MiB\" lies outside 16 MiB to "}},
    };
    for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++)
        attempt_run(&attempts[i]);
}

static unsigned mode_of(const char *format, const char *dir)
{
    char path[160];
    struct stat info;
    snprintf(path, sizeof path, format, dir);
    CHECK_EQ(stat(path, &info), 0);
    return info.st_mode & 07777;
}

/* Only the daemon's user reads its data; its group may connect. */
static void test_start__modes_of_what_is_made(void)
{
    struct daemon daemon;
    char pattern[160];
    glob_t files;
    mode_t mask = umask(0);
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    CHECK_EQ(mode_of("%s", daemon.socket), 0660);
    CHECK_EQ(mode_of("%s.lock", daemon.socket), 0600);
    CHECK_EQ(mode_of("%s", daemon.data_dir), 0700);
    CHECK_EQ(mode_of("%s/LOCK", daemon.data_dir), 0600);
    CHECK_EQ(mode_of("%s/data", daemon.data_dir), 0700);
    snprintf(pattern, sizeof pattern, "%s/data/*.dat", daemon.data_dir);
    CHECK_EQ(glob(pattern, 0, NULL, &files), 0);
    for (size_t i = 0; i < files.gl_pathc; i++)
        CHECK_EQ(mode_of("%s", files.gl_pathv[i]), 0600);
    globfree(&files);
    umask(mask);
    CHECK_EQ(daemon_stop(&daemon, SIGINT), 0); /* as SIGTERM */
    CHECK(access(daemon.socket, F_OK) < 0);
    char *log = daemon_output(&daemon);
    CHECK(strstr(log, "notice signal name=SIGINT ") && strstr(log, "notice stopped "));
    free(log);
    daemon_remove(&daemon);
}

/* A data directory that others may write to, or that holds strangers' files, is not touched. */
static void test_start__foreign_directories_are_refused(void)
{
    struct daemon daemon;
    char path[160];
    daemon_init(&daemon, small);
    CHECK_EQ(mkdir(daemon.data_dir, 0700), 0);
    CHECK_EQ(chmod(daemon.data_dir, 0777), 0);
    CHECK_EQ(daemon_start_failing(&daemon), 78);
    CHECK_EQ(chmod(daemon.data_dir, 0700), 0);
    snprintf(path, sizeof path, "%s/SUPER", daemon.data_dir);
    int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    close(fd);
    CHECK_EQ(daemon_start_failing(&daemon), 78);
    CHECK_EQ(access(path, F_OK), 0);
    CHECK_EQ(unlink(path), 0);
    daemon_start(&daemon);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_start__check_touches_nothing);
    TEST_RUN(test_start__faults_have_their_exit);
    TEST_RUN(test_start__modes_of_what_is_made);
    TEST_RUN(test_start__foreign_directories_are_refused);
    return TEST_END();
}
