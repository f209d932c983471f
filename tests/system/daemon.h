/*
 * A real winnowd of a test: the binary beside the test's own, with a socket and a data directory in
 * a temporary folder, its environment empty but for PATH and
 * what a test adds. Waits are for events (the socket appears,
 * the process ends) and have a deadline; a daemon that does not come or go ends the test.
 *
 * The process dies with the test (PR_SET_PDEATHSIG), the folder goes with daemon_remove.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum { DAEMON_N_ARGS_MAX = 24 };

struct daemon {
    char dir[64], socket[80], data_dir[80], log[80];
    const char *args[DAEMON_N_ARGS_MAX]; /* after --socket and --data-dir; NULL ends them */
    const char *env[4];                  /* "NAME=VALUE", beside PATH and LC_ALL; NULL ends them */
    pid_t pid;                           /* 0: not running */
    int pidfd;
};

/* Makes the folder; starts nothing. `args`: "--host-pool", "32MiB", ..., NULL; at most 20. */
void daemon_init(struct daemon *daemon, const char *const *args);
/* Starts it and returns once the socket accepts. */
void daemon_start(struct daemon *daemon);
/* Starts a process that is to end by itself; its exit status. */
int daemon_start_failing(struct daemon *daemon);
/* Sends the signal and waits for the end: exit status, or 256 + the signal that ended it. */
int daemon_stop(struct daemon *daemon, int signal);
/* What it wrote to stdout and stderr, over all starts; the caller frees. */
char *daemon_output(const struct daemon *daemon);
/* Stops what runs (SIGKILL) and removes the folder. */
void daemon_remove(struct daemon *daemon);

/* A program beside the test's own; its exit status as above, its stdout and stderr in *ret_output
 * (the caller frees). `socket` becomes WINNOW_ADDRESS. */
int program_run(const char *const *argv, const char *socket, char **ret_output);
/* The path of a program beside the test's own. */
const char *program_path(const char *name, char path[256]);

/* A number of /proc/PID/FILE after `key`; ends the test when it is not there. */
uint64_t proc_number(pid_t pid, const char *file, const char *key);
uint32_t proc_n_fds(pid_t pid);
