// Parses the command line and runs one command. One table makes parser and help.
#include <client/cli/cli.h>

#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <client/error.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sysexits.h>
#include <winnow/winnow.h>

#define CALL_NS (5 * WINNOW_NS_PER_S)

static const struct {
    const char *name;
    int (*run)(const struct cli_options *options);
    const char *help;
} commands[] = {
    {"status", cli_status, "what winnowd holds, reads and serves; --watch: every second"},
    {"ping", cli_ping, "is it there, and how fast does it answer"},
    {"version", cli_version, "of this command and of winnowd"},
    {"doctor", cli_doctor, "what is wrong on this machine, and the remedy; changes nothing"},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static_assert(CLI_USAGE == EX_USAGE, "what sysexits.h calls it");
static_assert(CLI_NO_DAEMON == EX_UNAVAILABLE, "what sysexits.h calls it");
static_assert(CLI_NOT_ALLOWED == EX_NOPERM, "what sysexits.h calls it");

static int usage(FILE *file)
{
    winnow_assert(file == stdout || file == stderr);
    fputs("usage: winnow COMMAND [--socket PATH] [--json]\n\n", file);
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(file, "  %-8s %s\n", commands[i].name, commands[i].help);
    fputs("\n"
          "  --socket PATH  winnowd's socket; else WINNOW_ADDRESS, the user's, the system's\n"
          "  --json         one object on stdout; with --watch one a line\n"
          "  --watch        of status: redraw, or without a terminal a row a second\n"
          "\n"
          "exit: 0; 1 unhealthy; 64 usage; 69 no winnowd; 77 not allowed\n",
          file);
    return file == stdout ? CLI_OK : CLI_USAGE;
}

int cli_exit_of(int error)
{
    winnow_assert(error <= 0);
    switch (error) {
    case 0:
        return CLI_OK;
    case -EHOSTDOWN:
    case -ETIMEDOUT:
        return CLI_NO_DAEMON;
    case -EACCES:
        return CLI_NOT_ALLOWED;
    default:
        return CLI_UNHEALTHY;
    }
}

struct winnow_link *cli_link_open(const struct cli_options *options, int *ret_exit)
{
    winnow_assert(options);
    winnow_assert(ret_exit);
    struct winnow_link *link = NULL;
    int rc = winnow_link_open(options->socket, false, winnow_clock_now_ns() + CALL_NS, &link);
    *ret_exit = cli_exit_of(rc);
    if (rc < 0)
        fprintf(stderr, "winnow: %s\n", winnow_error_text());
    winnow_assert((link != NULL) == (*ret_exit == CLI_OK));
    winnow_assert(!link || !link->lease_call); /* no lease: see cli.h */
    return link;
}

int cli_stats_get(struct winnow_link *link, struct cli_stats *stats)
{
    winnow_assert(link);
    winnow_assert(stats);
    winnow_assert(stats->arena || !stats->reply);
    Winnow__V1__StatsRequest request = WINNOW__V1__STATS_REQUEST__INIT;
    struct winnow_status status;
    void *reply = NULL;
    if (!stats->arena && winnow_wire_arena_create(&stats->arena) < 0)
        return winnow_error_set(-ENOMEM, "out of memory");
    winnow_wire_arena_reset(stats->arena);
    int rc = winnow_link_call(link, "Stats", &request, &winnow__v1__stats_reply__descriptor,
                              stats->arena, winnow_clock_now_ns() + CALL_NS, &reply, &status);
    if (rc < 0)
        return rc;
    winnow_assert(reply);
    stats->reply = reply;
    stats->at_ns = winnow_clock_now_ns();
    return 0;
}

void cli_stats_finish(struct cli_stats *stats)
{
    winnow_assert(stats);
    winnow_assert(stats->arena || !stats->reply);
    winnow_wire_arena_destroy(stats->arena);
    *stats = (struct cli_stats){0};
}

int cli_ping(const struct cli_options *options)
{
    enum { N_PINGS = 5 };
    int exit_status;
    struct winnow_link *link = cli_link_open(options, &exit_status);
    if (!link)
        return exit_status;
    int64_t best_ns = WINNOW_NEVER_NS;
    int rc = 0;
    for (int i = 0; i < N_PINGS && !rc; i++) {
        int64_t begin_ns = winnow_clock_now_ns();
        rc = winnow_link_ping(link, begin_ns + CALL_NS);
        int64_t took_ns = winnow_clock_now_ns() - begin_ns;
        best_ns = took_ns < best_ns ? took_ns : best_ns;
    }
    winnow_assert(rc < 0 || best_ns < WINNOW_NEVER_NS);
    double best_us = (double)best_ns / (double)WINNOW_NS_PER_US;
    if (rc < 0)
        fprintf(stderr, "winnow: %s\n", winnow_error_text());
    else if (options->json)
        printf("{\"schema\": \"winnow.ping/1\", \"winnowd\": \"%s\", \"proto\": %u, \"pid\": %d, "
               "\"answer_us\": %.1f}\n",
               link->build, link->proto, winnow_channel_peer_pid(link->control), best_us);
    else
        printf("winnowd %s answers in %.0f us (best of %d)\n", link->build, best_us, N_PINGS);
    winnow_link_unref(link);
    return cli_exit_of(rc);
}

int cli_version(const struct cli_options *options)
{
    struct winnow_link *link = NULL;
    int rc = winnow_link_open(options->socket, false, winnow_clock_now_ns() + CALL_NS, &link);
    winnow_assert((link != NULL) == (rc == 0));
    const char *daemon_build = link ? link->build : NULL;
    if (options->json) {
        printf(
            "{\"schema\": \"winnow.version/1\", \"winnow\": \"%s\", \"proto\": %d, \"winnowd\": ",
            winnow_version(), WINNOW_WIRE_PROTO);
        if (daemon_build)
            cli_json_string(stdout, daemon_build);
        else
            fputs("null", stdout);
        puts("}");
    } else {
        printf("winnow %s, protocol %d\n", winnow_version(), WINNOW_WIRE_PROTO);
        if (daemon_build)
            printf("winnowd %s\n", daemon_build);
        else if (rc != -EHOSTDOWN)
            printf("winnowd: %s\n", winnow_error_text());
    }
    winnow_link_unref(link);
    return CLI_OK;
}

/* The value of --name VALUE or --name=VALUE at argv[*at]; NULL: another argument. */
static const char *option_value(const char *name, int argc, char **argv, int *at)
{
    winnow_assert(*at > 0);
    winnow_assert(*at < argc);
    size_t n_bytes = strlen(name);
    if (strncmp(argv[*at], name, n_bytes))
        return NULL;
    if (argv[*at][n_bytes] == '=')
        return argv[*at] + n_bytes + 1;
    return argv[*at][n_bytes] == 0 && *at + 1 < argc ? argv[++*at] : NULL;
}

/* false: a word that means nothing, named on stderr. */
static bool parse(int argc, char **argv, struct cli_options *options)
{
    for (int i = 1; i < argc; i++) {
        const char *value = option_value("--socket", argc, argv, &i);
        if (value)
            options->socket = value;
        else if (!strcmp(argv[i], "--json"))
            options->json = true;
        else if (!strcmp(argv[i], "--watch"))
            options->watch = true;
        else if (argv[i][0] != '-' && !options->command)
            options->command = argv[i];
        else {
            fprintf(stderr, "winnow: unrecognized argument \"%s\"\n", argv[i]);
            return false;
        }
        winnow_assert(i < argc); /* an option's value was there */
    }
    return true;
}

int main(int argc, char **argv)
{
    struct cli_options options = {0};
    signal(SIGPIPE, SIG_IGN); /* who reads us has seen enough: no error */
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
            return usage(stdout);
    if (!parse(argc, argv, &options))
        return usage(stderr);
    for (size_t i = 0; options.command && i < N_COMMANDS; i++) {
        if (strcmp(options.command, commands[i].name))
            continue;
        if (options.watch && commands[i].run != cli_status)
            break;
        int exit_status = commands[i].run(&options);
        winnow_assert(exit_status != CLI_USAGE); /* words are judged here alone */
        return fflush(stdout) == EOF || ferror(stdout) ? CLI_OK : exit_status;
    }
    if (options.command)
        fprintf(stderr, "winnow: no command \"%s\"%s\n", options.command,
                options.watch ? " with --watch" : "");
    return usage(stderr);
}
