// The listener alone: who gets in, and what becomes of those whose process is gone.
#include <test.h>

#include <base/clock.h>
#include <daemon/listener.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N_CONNECTIONS_MAX = 4 };

static char dir[32], path[64];
static struct winnow_uids uids;
static struct winnow_listener *listener;
static pthread_t thread;
static int stop_fd, accepted[2]; /* a pipe: each accepted descriptor */

static void take(void *arg, int fd)
{
    CHECK(arg == &uids);
    CHECK_EQ(write(accepted[1], &fd, sizeof fd), sizeof fd);
}

static int open_listener(struct winnow_listener **ret_listener, char text[256])
{
    struct winnow_listener_options options = {
        .path = path,
        .uids = &uids,
        .n_connections_max = N_CONNECTIONS_MAX,
        .signal_fd = stop_fd,
        .accepted = take,
        .arg = &uids,
    };
    return winnow_listener_open(&options, ret_listener, text);
}

static void *run(void *arg)
{
    (void)arg;
    CHECK_EQ(winnow_listener_run(listener), 0);
    return NULL;
}

static void start(uid_t uid)
{
    char text[256];
    strcpy(dir, "/tmp/winnow-test-XXXXXX");
    CHECK(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/run/s", dir);
    uids = (struct winnow_uids){1, {uid}};
    stop_fd = eventfd(0, EFD_CLOEXEC);
    CHECK_EQ(pipe2(accepted, O_CLOEXEC), 0);
    CHECK_EQ(open_listener(&listener, text), 0);
    CHECK_EQ(pthread_create(&thread, NULL, run, NULL), 0);
}

static void stop(void)
{
    uint64_t one = 1;
    CHECK_EQ(write(stop_fd, &one, sizeof one), sizeof one);
    pthread_join(thread, NULL);
    winnow_listener_close(listener);
    close(stop_fd);
    close(accepted[0]);
    close(accepted[1]);
    char run_dir[40];
    snprintf(run_dir, sizeof run_dir, "%s/run", dir);
    CHECK_EQ(rmdir(run_dir), 0); /* nothing was left in it */
    CHECK_EQ(rmdir(dir), 0);
}

static int connect_to(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0);
    strcpy(address.sun_path, path);
    CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

/* The next accepted descriptor; -1: none within ms. */
static int next_accepted(int ms)
{
    struct pollfd waits = {accepted[0], POLLIN, 0};
    int fd;
    if (poll(&waits, 1, ms) != 1)
        return -1;
    CHECK_EQ(read(accepted[0], &fd, sizeof fd), sizeof fd);
    return fd;
}

/* The other side has closed within five seconds. */
static bool is_closed(int fd)
{
    char byte;
    struct pollfd waits = {fd, POLLIN, 0};
    return poll(&waits, 1, 5000) == 1 && read(fd, &byte, 1) <= 0;
}

/* A user who is allowed is handed on; the directory and socket have their modes. */
static void test_listener__own_user_gets_in(void)
{
    struct stat st;
    start(geteuid());
    CHECK(!stat(path, &st) && S_ISSOCK(st.st_mode));
    CHECK_EQ(st.st_mode & 0777, 0660);
    int fd = connect_to(), other = next_accepted(5000);
    CHECK(other >= 0);
    CHECK_EQ(write(fd, "x", 1), 1);
    char byte;
    struct pollfd waits = {other, POLLIN, 0};
    CHECK_EQ(poll(&waits, 1, 5000), 1);
    CHECK_EQ(read(other, &byte, 1), 1);
    CHECK(fcntl(other, F_GETFL) & O_NONBLOCK);
    close(fd);
    close(other);
    stop();
}

/* A user who is not allowed is cut off, and nobody is told of him. */
static void test_listener__foreign_user_is_cut_off(void)
{
    start(geteuid() + 1);
    int fd = connect_to();
    CHECK(is_closed(fd));
    CHECK_EQ(next_accepted(0), -1);
    close(fd);
    stop();
}

/* Connections beyond the limit are closed; one that ends makes room. */
static void test_listener__connections_are_limited(void)
{
    int fd[N_CONNECTIONS_MAX], other[N_CONNECTIONS_MAX];
    start(geteuid());
    for (uint32_t i = 0; i < N_CONNECTIONS_MAX; i++) {
        fd[i] = connect_to();
        other[i] = next_accepted(5000);
        CHECK(other[i] >= 0);
    }
    int more = connect_to();
    CHECK(is_closed(more));
    close(more);
    close(fd[0]);
    CHECK(is_closed(other[0]));
    int64_t deadline_ns = winnow_clock_now_ns() + 5 * WINNOW_NS_PER_S;
    int again = -1, in = -1;
    while (in < 0 && winnow_clock_now_ns() < deadline_ns) {
        again = connect_to();
        in = next_accepted(20);
        if (in < 0)
            close(again);
    }
    CHECK(in >= 0);
    close(again);
    close(in);
    for (uint32_t i = 0; i < N_CONNECTIONS_MAX; i++) {
        if (i)
            close(fd[i]);
        close(other[i]);
    }
    stop();
}

/* A process that dies is noticed although a child of it holds on to the socket. */
static void test_listener__dead_process_is_noticed(void)
{
    start(geteuid());
    int life[2];
    CHECK_EQ(pipe(life), 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        int fd = connect_to();
        if (!fork()) { /* holds the socket until the test lets go of the pipe */
            char byte;
            close(life[1]);
            prctl(PR_SET_PDEATHSIG, 0);
            _exit(read(life[0], &byte, 1) < 0 || fd < 0);
        }
        pause();
    }
    close(life[0]);
    int other = next_accepted(5000);
    CHECK(other >= 0);
    struct pollfd waits = {other, POLLIN, 0};
    CHECK_EQ(poll(&waits, 1, 50), 0); /* alive: silent */
    CHECK_EQ(kill(pid, SIGKILL), 0);
    CHECK_EQ(waitpid(pid, NULL, 0), pid);
    CHECK(is_closed(other));
    close(other);
    close(life[1]);
    stop();
}

/* One daemon a socket: a second one is told; a socket left by a crash is taken over. */
static void test_listener__one_a_socket(void)
{
    char text[256];
    struct winnow_listener *second = NULL;
    start(geteuid());
    CHECK_EQ(open_listener(&second, text), -EBUSY);
    CHECK(strstr(text, "another daemon serves"));
    CHECK(!second);
    CHECK_EQ(access(path, F_OK), 0); /* and its failure took nothing away */
    int fd = connect_to();
    int other = next_accepted(5000);
    CHECK(other >= 0);
    close(fd);
    close(other);
    stop();

    CHECK(mkdtemp(strcpy(dir, "/tmp/winnow-test-XXXXXX")));
    char run_dir[40];
    snprintf(run_dir, sizeof run_dir, "%s/run", dir);
    CHECK_EQ(mkdir(run_dir, 0750), 0);
    snprintf(path, sizeof path, "%s/s", run_dir);
    int stale = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(stale >= 0);
    close(stale);
    stop_fd = eventfd(0, EFD_CLOEXEC);
    CHECK_EQ(open_listener(&second, text), 0);
    fd = connect_to();
    close(fd);
    winnow_listener_close(second);
    close(stop_fd);
    CHECK_EQ(rmdir(run_dir), 0);
    CHECK_EQ(rmdir(dir), 0);
}

/* Without a free descriptor a peer is refused at once instead of waiting in the backlog. */
static void test_listener__no_descriptors(void)
{
    start(geteuid());
    int fd = connect_to(), other = next_accepted(5000);
    CHECK(other >= 0);
    struct rlimit limit, little;
    CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
    int waiting = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    little = (struct rlimit){64, limit.rlim_max};
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &little), 0);
    int filler[64];
    uint32_t n_filler = 0;
    while ((filler[n_filler] = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0)
        n_filler++;
    CHECK_EQ(connect(waiting, (struct sockaddr *)&address, sizeof address), 0);
    CHECK(is_closed(waiting));
    while (n_filler)
        close(filler[--n_filler]);
    CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
    close(waiting);
    waiting = connect_to(); /* and those who come later get in */
    int late = next_accepted(5000);
    CHECK(late >= 0);
    close(late);
    close(waiting);
    close(fd);
    close(other);
    stop();
}

/* A path that cannot be: its errno and a line that names it. */
static void test_listener__impossible_paths(void)
{
    char text[256];
    struct winnow_listener *none = NULL;
    stop_fd = eventfd(0, EFD_CLOEXEC);
    strcpy(path, "/proc/none/s");
    CHECK(open_listener(&none, text) < 0);
    CHECK(strstr(text, "/proc/none"));
    strcpy(path, "/nonexistent/directory/s");
    CHECK_EQ(open_listener(&none, text), -ENOENT);
    CHECK(!none);
    close(stop_fd);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_listener__own_user_gets_in);
    TEST_RUN(test_listener__foreign_user_is_cut_off);
    TEST_RUN(test_listener__connections_are_limited);
    TEST_RUN(test_listener__dead_process_is_noticed);
    TEST_RUN(test_listener__one_a_socket);
    TEST_RUN(test_listener__no_descriptors);
    TEST_RUN(test_listener__impossible_paths);
    return TEST_END();
}
