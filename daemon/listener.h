/*
 * The listener: our own UNIX socket, so that a foreign user never reaches the HTTP/2 parser and a
 * dead engine is noticed even when a child of it still holds the socket.
 *
 * open takes PATH.lock (one daemon a socket), makes the directory (0750) if it is missing, binds
 * under another name, listens, and renames: PATH exists once it can be connected to.
 * run accepts, checks the peer's uid, and watches each peer's process; when that ends, the
 * connection is shut down, and gRPC sees its calls cancelled.
 *
 * Thread: main.
 */
#pragma once

#include <daemon/options.h>
#include <stdint.h>

struct winnow_listener_options {
    const char *path;
    const struct winnow_uids *uids; /* borrowed until close */
    uint32_t n_connections_max;
    int signal_fd;                       /* readable: run returns */
    void (*accepted)(void *arg, int fd); /* takes the socket */
    void *arg;
};

struct winnow_listener;

/*
 * 0, or with a line in text
 *   -EBUSY   another daemon holds the lock
 *   -EACCES -ENOENT -EADDRINUSE ... the directory or socket cannot be made
 *   -ENOMEM
 */
int winnow_listener_open(const struct winnow_listener_options *options,
                         struct winnow_listener **ret_listener, char text[256]);
int winnow_listener_run(struct winnow_listener *listener); /* 0 at a signal, -errno of epoll */
/* Connections live on, unwatched; PATH and PATH.lock are removed. NULL is fine. */
void winnow_listener_close(struct winnow_listener *listener);
