// Listener: who may connect, and whether they still live.
//
// gRPC owns an accepted socket and closes it when it likes, so this file keeps a duplicate to shut
// down and to hear the end by. A connection's record has two watched descriptors, the duplicate and
// the peer's pidfd, under one generation-checked handle: whichever fires first ends both.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/log.h>
#include <base/pool.h>
#include <daemon/listener.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD /* Linux 6.5; Debian 12's headers are older */
#define SO_PEERPIDFD 77
#endif

enum { SEND_BYTES = 1 << 20, N_BACKLOG = 128 };
#define HANDLE_LISTEN UINT64_C(0) /* pool handles are neither */
#define HANDLE_SIGNAL UINT64_MAX

struct connection {
    int socket_fd, pid_fd; /* -1: the kernel gave none */
};

struct winnow_listener {
    struct winnow_listener_options options;
    char lock_path[WINNOW_SOCKET_BYTES + 8];
    int lock_fd, listen_fd, epoll_fd, reserve_fd;
    bool is_bound;
    struct winnow_pool *connections;
};

static_assert(sizeof((struct sockaddr_un *)0)->sun_path == WINNOW_SOCKET_BYTES, "Linux's");
static_assert(sizeof ".lock" <= 8, "lock_path has room for it");

static int fail(char text[256], const char *what, const char *path)
{
    int error = errno;
    winnow_assert(error > 0);
    snprintf(text, 256, "cannot %s %.160s: %s", what, path, strerror(error));
    return -error;
}

static int make_directory(const char *path, char text[256])
{
    char dir[WINNOW_SOCKET_BYTES];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (!slash || slash == dir)
        return 0;
    *slash = 0;
    if (mkdir(dir, 0750) < 0 && errno != EEXIST)
        return fail(text, "create the directory", dir);
    return 0;
}

/* The file that is locked must still be the one at the path: its last holder removes it. */
static int take_lock(struct winnow_listener *listener, char text[256])
{
    winnow_assert(listener->lock_fd < 0);
    for (;;) {
        struct stat held, named;
        int fd = open(listener->lock_path, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0)
            return fail(text, "create", listener->lock_path);
        if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
            close(fd);
            snprintf(text, 256, "another daemon serves %.160s. hint: winnow status",
                     listener->options.path);
            return -EBUSY;
        }
        if (!fstat(fd, &held) && !stat(listener->lock_path, &named) &&
            held.st_ino == named.st_ino && held.st_dev == named.st_dev) {
            listener->lock_fd = fd;
            return 0;
        }
        close(fd);
    }
}

static int bind_socket(struct winnow_listener *listener, char text[256])
{
    winnow_assert(listener->lock_fd >= 0);
    winnow_assert(listener->listen_fd < 0);
    winnow_assert(!listener->is_bound);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = listener->options.path;
    int n = snprintf(address.sun_path, sizeof address.sun_path, "%s.new", path);
    if (n < 0 || (size_t)n >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return fail(text, "bind", path);
    }
    listener->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener->listen_fd < 0)
        return fail(text, "create", path);
    unlink(address.sun_path);
    if (bind(listener->listen_fd, (struct sockaddr *)&address, sizeof address) < 0 ||
        chmod(address.sun_path, 0660) < 0 || listen(listener->listen_fd, N_BACKLOG) < 0)
        return fail(text, "listen on", path);
    if (rename(address.sun_path, path) < 0) {
        int rc = fail(text, "create", path);
        unlink(address.sun_path);
        return rc;
    }
    listener->is_bound = true;
    return 0;
}

static int watch(struct winnow_listener *listener, int fd, uint32_t events, uint64_t handle)
{
    winnow_assert(fd >= 0);
    struct epoll_event event = {.events = events, .data.u64 = handle};
    return epoll_ctl(listener->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int winnow_listener_open(const struct winnow_listener_options *options,
                         struct winnow_listener **ret_listener, char text[256])
{
    winnow_assert(options->path);
    winnow_assert(options->uids);
    winnow_assert(options->uids->n <= WINNOW_N_UIDS_MAX);
    winnow_assert(options->n_connections_max);
    winnow_assert(options->signal_fd >= 0);
    winnow_assert(options->accepted);
    struct winnow_listener *listener = winnow_alloc(sizeof *listener);
    snprintf(text, 256, "no memory for the listener");
    if (!listener)
        return -ENOMEM;
    listener->options = *options;
    listener->lock_fd = listener->listen_fd = -1;
    snprintf(listener->lock_path, sizeof listener->lock_path, "%s.lock", options->path);
    listener->reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    listener->epoll_fd = epoll_create1(EPOLL_CLOEXEC);

    int rc = winnow_pool_create(options->n_connections_max, sizeof(struct connection),
                                &listener->connections);
    if (!rc)
        rc = make_directory(options->path, text);
    if (!rc)
        rc = take_lock(listener, text);
    if (!rc)
        rc = bind_socket(listener, text);
    if (!rc)
        rc = watch(listener, listener->listen_fd, EPOLLIN, HANDLE_LISTEN);
    if (!rc)
        rc = watch(listener, options->signal_fd, EPOLLIN, HANDLE_SIGNAL);
    if (rc < 0) {
        winnow_listener_close(listener);
        return rc;
    }
    winnow_assert(listener->is_bound);
    *ret_listener = listener;
    return 0;
}

static void connection_end(struct winnow_listener *listener, struct connection *connection)
{
    shutdown(connection->socket_fd, SHUT_RDWR);
    close(connection->socket_fd);
    if (connection->pid_fd >= 0)
        close(connection->pid_fd);
    winnow_pool_give(listener->connections, connection);
}

static bool is_allowed(const struct winnow_listener *listener, int fd, struct ucred *peer)
{
    winnow_assert(listener->options.uids->n <= WINNOW_N_UIDS_MAX);
    socklen_t n_bytes = sizeof *peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, peer, &n_bytes) < 0)
        return false;
    for (uint32_t i = 0; i < listener->options.uids->n; i++)
        if (listener->options.uids->uid[i] == peer->uid)
            return true;
    winnow_log(WINNOW_LOG_WARNING, "refused_uid", "uid=%u hint=allow_uids", peer->uid);
    return false;
}

/* Of the process that connected; before Linux 6.5 found by its number, which another process may
 * have by now: then that one's end is watched too, and the socket's own end still counts. */
static int peer_pidfd(int fd, pid_t pid)
{
    int pid_fd;
    socklen_t n_bytes = sizeof pid_fd;
    if (!getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pid_fd, &n_bytes))
        return pid_fd;
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

/* Watches a connection by its duplicate and its peer's pidfd; false: there is no room for it. */
static bool connection_begin(struct winnow_listener *listener, int fd, pid_t pid)
{
    winnow_assert(fd >= 0);
    struct connection *connection = winnow_pool_take(listener->connections);
    if (!connection)
        return false;
    connection->pid_fd = peer_pidfd(fd, pid);
    connection->socket_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    uint64_t handle = winnow_pool_handle(listener->connections, connection);
    winnow_assert(handle != HANDLE_LISTEN);
    winnow_assert(handle != HANDLE_SIGNAL);
    if (connection->socket_fd < 0 ||
        watch(listener, connection->socket_fd, EPOLLRDHUP, handle) < 0 ||
        (connection->pid_fd >= 0 && watch(listener, connection->pid_fd, EPOLLIN, handle) < 0)) {
        connection_end(listener, connection);
        return false;
    }
    return true;
}

static void take_connection(struct winnow_listener *listener, int fd)
{
    winnow_assert(fd >= 0);
    struct ucred peer;
    int n_bytes = SEND_BYTES;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &n_bytes, sizeof n_bytes);
    if (!is_allowed(listener, fd, &peer)) {
        close(fd);
    } else if (!connection_begin(listener, fd, peer.pid)) {
        winnow_log(WINNOW_LOG_WARNING, "refused_connection", "limit=%u hint=host_pool",
                   listener->options.n_connections_max);
        close(fd);
    } else {
        listener->options.accepted(listener->options.arg, fd);
    }
}

static void accept_some(struct winnow_listener *listener)
{
    winnow_assert(listener->listen_fd >= 0);
    for (uint32_t i = 0; i < N_BACKLOG; i++) {
        int fd = accept4(listener->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            take_connection(listener, fd);
            continue;
        }
        if (errno != EMFILE && errno != ENFILE)
            return; /* EAGAIN, or a peer that has gone: the next event tells */
        winnow_log(WINNOW_LOG_WARNING, "refused_connection", "errno=%d hint=\"ulimit -n\"", errno);
        close(listener->reserve_fd);
        fd = accept4(listener->listen_fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0)
            close(fd);
        listener->reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
}

int winnow_listener_run(struct winnow_listener *listener)
{
    winnow_assert(listener->is_bound);
    winnow_assert(listener->epoll_fd >= 0);
    for (;;) {
        struct epoll_event event[32];
        int n = epoll_wait(listener->epoll_fd, event, 32, -1);
        if (n < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < n; i++) {
            uint64_t handle = event[i].data.u64;
            if (handle == HANDLE_SIGNAL)
                return 0;
            if (handle == HANDLE_LISTEN) {
                accept_some(listener);
                continue;
            }
            struct connection *connection = winnow_pool_find(listener->connections, handle);
            if (connection)
                connection_end(listener, connection);
        }
    }
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

void winnow_listener_close(struct winnow_listener *listener)
{
    if (!listener)
        return;
    if (listener->is_bound)
        unlink(listener->options.path);
    if (listener->lock_fd >= 0)
        unlink(listener->lock_path);
    for (uint32_t i = 0; listener->connections && i < winnow_pool_size(listener->connections);
         i++) {
        struct connection *connection = winnow_pool_at(listener->connections, i);
        if (!connection)
            continue;
        winnow_assert(connection->socket_fd >= 0);
        close(connection->socket_fd);
        close_fd(connection->pid_fd);
    }
    winnow_pool_destroy(listener->connections);
    close_fd(listener->lock_fd);
    close_fd(listener->listen_fd);
    close_fd(listener->epoll_fd);
    close_fd(listener->reserve_fd);
    winnow_alloc_free(listener);
}
