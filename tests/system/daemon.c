#include <system/daemon.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { START_MS = 20000, STOP_MS = 20000 };

#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, strerror(errno));   \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

const char *program_path(const char *name, char path[256])
{
    ssize_t n_bytes = readlink("/proc/self/exe", path, 255);
    MUST(n_bytes > 0);
    path[n_bytes] = 0;
    char *slash = strrchr(path, '/');
    snprintf(slash + 1, (size_t)(path + 256 - slash - 1), "%s", name);
    return path;
}

void daemon_init(struct daemon *daemon, const char *const *args)
{
    *daemon = (struct daemon){.pidfd = -1};
    const char *base = getenv("TMPDIR");
    snprintf(daemon->dir, sizeof daemon->dir, "%.30s/winnow-test-XXXXXX", base ? base : "/tmp");
    MUST(mkdtemp(daemon->dir));
    snprintf(daemon->socket, sizeof daemon->socket, "%s/w.sock", daemon->dir);
    snprintf(daemon->data_dir, sizeof daemon->data_dir, "%s/data", daemon->dir);
    snprintf(daemon->log, sizeof daemon->log, "%s/log", daemon->dir);
    for (uint32_t i = 0; args && args[i]; i++) {
        MUST(i + 1 < DAEMON_N_ARGS_MAX);
        daemon->args[i] = args[i];
    }
}

/* In the child. */
static _Noreturn void become(const char *const *argv, const char *const *env, int output_fd)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
    dup2(output_fd, STDOUT_FILENO);
    dup2(output_fd, STDERR_FILENO);
    execve(argv[0], (char *const *)argv, (char *const *)env);
    fprintf(stderr, "exec %s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

static void daemon_spawn(struct daemon *daemon)
{
    const char *env[7] = {"PATH=/usr/bin:/bin", "LC_ALL=C"};
    memcpy(env + 2, daemon->env, sizeof daemon->env);
    char path[256];
    const char *argv[6 + DAEMON_N_ARGS_MAX] = {program_path("winnowd", path), "--socket",
                                               daemon->socket, "--data-dir", daemon->data_dir};
    memcpy(argv + 5, daemon->args, sizeof daemon->args);
    int log_fd = open(daemon->log, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
    MUST(log_fd >= 0);
    MUST(!daemon->pid);
    daemon->pid = fork();
    MUST(daemon->pid >= 0);
    if (daemon->pid == 0)
        become(argv, env, log_fd);
    close(log_fd);
    daemon->pidfd = (int)syscall(SYS_pidfd_open, daemon->pid, 0);
    MUST(daemon->pidfd >= 0);
}

/* Waits for the end: exit status, or 256 + signal; -1: not by the deadline. */
static int daemon_wait(struct daemon *daemon, int64_t deadline_ms)
{
    struct pollfd end = {.fd = daemon->pidfd, .events = POLLIN};
    int64_t left_ms;
    int n_ready = 0;
    while (n_ready <= 0 && (left_ms = deadline_ms - now_ms()) > 0)
        n_ready = poll(&end, 1, (int)left_ms);
    if (n_ready <= 0)
        return -1;
    int status;
    MUST(waitpid(daemon->pid, &status, 0) == daemon->pid);
    close(daemon->pidfd);
    daemon->pidfd = -1;
    daemon->pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

static _Noreturn void daemon_fail(struct daemon *daemon, const char *what)
{
    char *output = daemon_output(daemon);
    fprintf(stderr, "winnowd %s. It said:\n%s\n", what, output);
    if (daemon->pid)
        kill(daemon->pid, SIGABRT);
    exit(1);
}

static bool socket_accepts(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool accepts = connect(fd, (struct sockaddr *)&address, sizeof address) == 0;
    close(fd);
    return accepts;
}

/* The folder is watched before the look at the socket: its creation is not missed. It may exist a
 * moment before it listens, which no event tells: then the wait is 10 ms long. */
void daemon_start(struct daemon *daemon)
{
    int64_t deadline_ms = now_ms() + START_MS;
    int watch_fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    MUST(watch_fd >= 0);
    MUST(inotify_add_watch(watch_fd, daemon->dir, IN_CREATE | IN_MOVED_TO | IN_ATTRIB) >= 0);
    daemon_spawn(daemon);
    while (!socket_accepts(daemon->socket)) {
        struct pollfd events[2] = {{.fd = watch_fd, .events = POLLIN},
                                   {.fd = daemon->pidfd, .events = POLLIN}};
        bool exists = access(daemon->socket, F_OK) == 0;
        poll(events, 2, exists ? 10 : START_MS);
        char drain[4096];
        while (read(watch_fd, drain, sizeof drain) > 0)
            ;
        if (events[1].revents)
            daemon_fail(daemon, "ended at its start");
        if (now_ms() > deadline_ms)
            daemon_fail(daemon, "made no socket");
    }
    close(watch_fd);
}

int daemon_start_failing(struct daemon *daemon)
{
    daemon_spawn(daemon);
    int status = daemon_wait(daemon, now_ms() + START_MS);
    if (status < 0)
        daemon_fail(daemon, "did not end");
    return status;
}

int daemon_stop(struct daemon *daemon, int signal)
{
    MUST(daemon->pid);
    MUST(kill(daemon->pid, signal) == 0);
    int status = daemon_wait(daemon, now_ms() + STOP_MS);
    if (status < 0)
        daemon_fail(daemon, "did not stop");
    return status;
}

/* All that comes, up to 1 MiB. */
static char *fd_read_all(int fd)
{
    enum { N_BYTES_MAX = 1 << 20 };
    char *text = malloc(N_BYTES_MAX + 1);
    size_t n_bytes = 0;
    ssize_t n_here;
    MUST(text);
    while (n_bytes < N_BYTES_MAX && (n_here = read(fd, text + n_bytes, N_BYTES_MAX - n_bytes)) > 0)
        n_bytes += (size_t)n_here;
    text[n_bytes] = 0;
    return text;
}

char *daemon_output(const struct daemon *daemon)
{
    int fd = open(daemon->log, O_RDONLY | O_CLOEXEC);
    char *text = fd < 0 ? strdup("") : fd_read_all(fd);
    if (fd >= 0)
        close(fd);
    return text;
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *place)
{
    (void)info;
    (void)type;
    (void)place;
    return remove(path);
}

void daemon_remove(struct daemon *daemon)
{
    if (daemon->pid)
        daemon_stop(daemon, SIGKILL);
    nftw(daemon->dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

int program_run(const char *const *argv, const char *socket, char **ret_output)
{
    char address[128];
    const char *env[] = {"PATH=/usr/bin:/bin", "LC_ALL=C", address, NULL};
    int pipe_fd[2], status;
    snprintf(address, sizeof address, "WINNOW_ADDRESS=%s", socket);
    MUST(pipe2(pipe_fd, O_CLOEXEC) == 0);
    pid_t pid = fork();
    MUST(pid >= 0);
    if (pid == 0)
        become(argv, env, pipe_fd[1]);
    close(pipe_fd[1]);
    *ret_output = fd_read_all(pipe_fd[0]);
    close(pipe_fd[0]);
    MUST(waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
}

uint64_t proc_number(pid_t pid, const char *file, const char *key)
{
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    FILE *from = fopen(path, "re");
    MUST(from);
    while (fgets(line, sizeof line, from)) {
        if (strncmp(line, key, strlen(key)))
            continue;
        fclose(from);
        return strtoull(line + strlen(key), NULL, 10);
    }
    fprintf(stderr, "%s has no %s\n", path, key);
    exit(1);
}

uint32_t proc_n_fds(pid_t pid)
{
    char path[64];
    uint32_t n_fds = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", pid);
    DIR *fds = opendir(path);
    MUST(fds);
    while (readdir(fds))
        n_fds++;
    closedir(fds);
    return n_fds - 2;
}
