/*
 * The command `winnow`: what an operator asks a running winnowd. Speaks over a link of its own
 * without a lease, so it works while clients are refused.
 *
 * Exit: 0; 1 unhealthy; 64 usage; 69 no daemon; 77 not allowed. A closed pipe is 0.
 */
#pragma once

#include <client/link.h>
#include <stdio.h>

enum {
    CLI_OK = 0,
    CLI_UNHEALTHY = 1,
    CLI_USAGE = 64,
    CLI_NO_DAEMON = 69,
    CLI_NOT_ALLOWED = 77,
};

struct cli_options {
    const char *command;
    const char *socket; /* NULL: as libwinnow looks for it */
    bool json, watch;
};

/* Commands: each returns the exit status. */
int cli_status(const struct cli_options *options);
int cli_ping(const struct cli_options *options);
int cli_version(const struct cli_options *options);
int cli_doctor(const struct cli_options *options);

/* An open link, or NULL with the reason printed and the exit status set. */
struct winnow_link *cli_link_open(const struct cli_options *options, int *ret_exit);
int cli_exit_of(int error);

/* One Stats answer and what it hangs on. */
struct cli_stats {
    struct winnow_wire_arena *arena;
    const Winnow__V1__StatsReply *reply;
    int64_t at_ns;
};
/* 0 or -errno with the thread's text; finish in either case. Begin with a zeroed struct. */
int cli_stats_get(struct winnow_link *link, struct cli_stats *stats);
void cli_stats_finish(struct cli_stats *stats);

/* What is worth a look, by what was seen alone. */
struct cli_warning {
    const char *reason;
    char text[160], hint[160];
};
enum { CLI_N_WARNINGS_MAX = 12 };
uint32_t cli_stats_warn(const Winnow__V1__StatsReply *stats,
                        struct cli_warning warning[CLI_N_WARNINGS_MAX]);

/* A window of a small session of our own, as an engine sends it, against plain attention; the
 * largest relative error. 0, -EPROTO: it is wrong, or the call's -errno with the thread's text. */
int cli_probe(const char *path, double *ret_error);

/* "27.1 GiB": at most 4 significant places, binary units. text holds 16 bytes. */
const char *cli_bytes(uint64_t n_bytes, char text[16]);
/* "3 d 4 h", "12 min", "40 s". */
const char *cli_duration(uint64_t n_s, char text[48]);
/* a / b, 0 when there is nothing. */
double cli_ratio(uint64_t a, uint64_t b);

/* JSON (json.c): strings escaped, NaN and Inf as null. */
void cli_json_string(FILE *file, const char *text);
/* The fields of a message as `"name": value` pairs, without the braces; bytes as hex. */
void cli_json_fields(FILE *file, const void *message);
void cli_json_warnings(FILE *file, const struct cli_warning *warning, uint32_t n_warnings);
