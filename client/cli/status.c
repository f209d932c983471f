// What a running winnowd looks like: state first, warnings last; --json is the contract.
#include <client/cli/cli.h>

#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <client/error.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <winnow/winnow.h>

enum { WATCH_MS = 1000, N_ROWS_A_HEAD = 20, BAR_WIDTH = 21, COLUMNS_FOR_BAR = 60, SLOW_US = 50000 };

static_assert(BAR_WIDTH + 2 < COLUMNS_FOR_BAR, "a bar and its brackets fit the narrowest terminal");
static_assert(WATCH_MS > 0, "watching waits between answers");
static_assert(CLI_N_WARNINGS_MAX >= 11, "room for each warning of cli_stats_warn");

const char *cli_bytes(uint64_t n_bytes, char text[16])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    winnow_assert(text);
    double value = (double)n_bytes;
    size_t unit = 0;
    for (; value >= 1000 && unit + 1 < sizeof units / sizeof *units; unit++)
        value /= 1024;
    winnow_assert(unit < sizeof units / sizeof *units);
    int n_chars =
        snprintf(text, 16, unit && value < 100 ? "%.1f %s" : "%.0f %s", value, units[unit]);
    winnow_assert(n_chars > 0);
    winnow_assert(n_chars < 16);
    return text;
}

const char *cli_duration(uint64_t n_s, char text[48])
{
    winnow_assert(text);
    uint64_t n_min = n_s / 60, n_h = n_min / 60, n_d = n_h / 24;
    if (n_d)
        snprintf(text, 48, "%" PRIu64 " d %" PRIu64 " h", n_d, n_h % 24);
    else if (n_h)
        snprintf(text, 48, "%" PRIu64 " h %" PRIu64 " min", n_h, n_min % 60);
    else if (n_min)
        snprintf(text, 48, "%" PRIu64 " min", n_min);
    else
        snprintf(text, 48, "%" PRIu64 " s", n_s);
    winnow_assert(text[0] >= '0' && text[0] <= '9');
    return text;
}

double cli_ratio(uint64_t a, uint64_t b)
{
    return b ? (double)a / (double)b : 0;
}

static uint64_t count_steps(const Winnow__V1__StatsReply *s)
{
    return s->steps_exact + s->steps_met + s->steps_short + s->steps_degraded;
}

static void warn(struct cli_warning *warning, uint32_t *n_warnings, const char *reason,
                 const char *hint, const char *format, ...) __attribute__((format(printf, 5, 6)));
static void warn(struct cli_warning *warning, uint32_t *n_warnings, const char *reason,
                 const char *hint, const char *format, ...)
{
    winnow_assert(reason);
    winnow_assert(hint);
    winnow_assert(*n_warnings <= CLI_N_WARNINGS_MAX);
    if (*n_warnings == CLI_N_WARNINGS_MAX)
        return;
    struct cli_warning *one = &warning[(*n_warnings)++];
    va_list args;
    va_start(args, format);
    one->reason = reason;
    vsnprintf(one->text, sizeof one->text, format, args);
    snprintf(one->hint, sizeof one->hint, "%s", hint);
    va_end(args);
}

uint32_t cli_stats_warn(const Winnow__V1__StatsReply *s,
                        struct cli_warning warning[CLI_N_WARNINGS_MAX])
{
    winnow_assert(s);
    winnow_assert(warning);
    char a[16], b[16];
    uint32_t n = 0;
    if (strcmp(s->state, "ready"))
        warn(warning, &n, "state", "winnow doctor", "winnowd is %s", s->state);
    if (!strcmp(s->gpu, "lost"))
        warn(warning, &n, "gpu_lost", "start winnowd anew; the kernel's log says what happened",
             "the GPU was lost: the CPU takes its steps");
    if (s->disk_stuck)
        warn(warning, &n, "disk_stuck", "look at the disk's own log (dmesg)",
             "the disk does not answer: %" PRIu64 " reads were not answered in time, contexts on "
             "it end with ETIMEDOUT until it does",
             s->io_timeouts);
    if (s->io_p99_us > SLOW_US)
        warn(warning, &n, "io_slow", "other users of the disk (iostat -x)", "disk p99 %.1f ms",
             (double)s->io_p99_us / 1e3);
    if (s->io_errors)
        warn(warning, &n, "io_errors", "look at the disk's own log (dmesg)",
             "%" PRIu64 " disk errors: blocks were read twice or lost", s->io_errors);
    if (*s->io_remedy)
        warn(warning, &n, "io_method", s->io_remedy, "disk I/O by %s", s->io_method);
    if (!s->io_direct && s->disk_cap_bytes)
        warn(warning, &n, "io_direct", "a data directory on a disk file system (not tmpfs)",
             "the data directory refuses direct I/O: reads pass through the page cache");
    if (s->steps_short > count_steps(s) / 100)
        warn(warning, &n, "short", "a larger n_blocks_max, or strict sessions",
             "%.1f %% of steps fell short of the mass asked",
             100 * cli_ratio(s->steps_short, count_steps(s)));
    if (cli_ratio(s->disk_used_bytes, s->disk_cap_bytes) > 0.95)
        warn(warning, &n, "disk_full", "a larger disk_cap, or fewer sessions", "disk %s of %s used",
             cli_bytes(s->disk_used_bytes, a), cli_bytes(s->disk_cap_bytes, b));
    if (cli_ratio(s->index_bytes, s->index_cap_bytes) > 0.95)
        warn(warning, &n, "index_full", "a larger index_memory, or fewer sessions",
             "index %s of %s used", cli_bytes(s->index_bytes, a), cli_bytes(s->index_cap_bytes, b));
    if (s->printed_bytes && s->rss_peak_bytes > s->printed_bytes)
        warn(warning, &n, "memory", "please report it", "peak RSS %s is above the printed %s",
             cli_bytes(s->rss_peak_bytes, a), cli_bytes(s->printed_bytes, b));
    winnow_assert(n <= CLI_N_WARNINGS_MAX);
    return n;
}

/* ---- for people ---- */

static void print_bar(const char *name, uint64_t used, uint64_t cap, bool bars)
{
    char a[16], b[16];
    printf("%-6s", name);
    if (bars) {
        int n_full = (int)(cli_ratio(used, cap) * BAR_WIDTH + 0.5);
        n_full = n_full > BAR_WIDTH ? BAR_WIDTH : n_full;
        fputs("[", stdout);
        for (int i = 0; i < BAR_WIDTH; i++)
            fputc(i < n_full ? '#' : '-', stdout);
        fputs("] ", stdout);
    }
    printf("%s of %s", cli_bytes(used, a), cli_bytes(cap, b));
}

static void print_sessions(const Winnow__V1__StatsReply *s)
{
    char kv[16];
    if (s->n_sessions)
        puts(
            "SESSION  LABEL             TOKENS         KV HOST DISK  MASS   READ      STEPS STATE");
    for (size_t i = 0; i < s->n_sessions; i++) {
        const Winnow__V1__SessionRow *row = s->sessions[i];
        for (size_t j = 0; j < row->name.len; j++)
            printf("%02x", row->name.data[j]);
        printf(" %-12.12s %11" PRIu64 " %10s %3.0f%% %3.0f%% %5.3f %5.1f%% %10" PRIu64 " %s\n",
               *row->label ? row->label : "-", row->tokens_held, cli_bytes(row->kv_bytes, kv),
               100 * cli_ratio(row->kv_host_bytes, row->kv_bytes),
               100 * cli_ratio(row->kv_disk_bytes, row->kv_bytes), (double)row->mass_mean,
               100 * (double)row->share_read, row->n_steps, row->state);
    }
    if (s->sessions_open > s->n_sessions)
        printf("and %" PRIu64 " more\n", s->sessions_open - s->n_sessions);
}

static void print_status(const struct winnow_link *link, const Winnow__V1__StatsReply *s, bool bars)
{
    char a[16], b[16], c[16], up[48];
    uint64_t n_errors = 0, n_here = s->blocks_device + s->blocks_host;
    uint64_t n_read = n_here + s->blocks_disk;
    for (size_t i = 0; i < s->n_errors; i++)
        n_errors += s->errors[i]->n;
    printf("* winnowd %s %s %s  refused %" PRIu64 "  kernels %s, %u threads\n", link->build,
           s->state, cli_duration(s->uptime_s, up), n_errors, s->kernels, s->threads);
    print_bar("host", s->pool_cap_bytes - s->pool_free_bytes, s->pool_cap_bytes, bars);
    printf("  hit %.0f %%  RSS %s, at most %s\n", 100 * cli_ratio(n_here, n_read),
           cli_bytes(s->rss_bytes, a), cli_bytes(s->printed_bytes, b));
    print_bar("index", s->index_bytes, s->index_cap_bytes, bars);
    putchar('\n');
    print_bar("disk", s->disk_used_bytes, s->disk_cap_bytes, bars);
    printf("  %s, %s  written %s\n", s->io_method,
           s->io_direct ? "direct" : "through the page cache", cli_bytes(s->written_bytes, a));
    printf("now    %" PRIu64 " sessions  %" PRIu64 " tokens, %s of KV: %s in memory, %s on disk\n",
           s->sessions_open, s->tokens_held, cli_bytes(s->kv_bytes, a),
           cli_bytes(s->kv_host_bytes, b), cli_bytes(s->kv_disk_bytes, c));
    printf("pace   %.1f tokens/s  a layer's step p50 %.1f p99 %.1f ms  disk p99 %.1f ms\n",
           (double)s->tokens_per_s, (double)s->step_p50_us / 1e3, (double)s->step_p99_us / 1e3,
           (double)s->io_p99_us / 1e3);
    printf(
        "read   %.1f %% of blocks  mass reached %.3f (mean of estimates)  short %.2f %% of %" PRIu64
        " steps\n",
        100 * cli_ratio(n_read, s->blocks_total), (double)s->mass_mean,
        100 * cli_ratio(s->steps_short, count_steps(s)), count_steps(s));
    if (strcmp(s->gpu, "off"))
        printf("gpu    %s  %" PRIu64 " steps in %" PRIu64 " launches, %" PRIu64
               " windows  %.1f %% of the blocks read "
               "found in its cache  evicted %" PRIu64 ", no slot for %" PRIu64 "\n",
               s->gpu, s->device_steps, s->device_launches, s->device_windows,
               100 * cli_ratio(s->blocks_device, n_read), s->device_evictions, s->device_unfit);
    print_sessions(s);
    struct cli_warning warning[CLI_N_WARNINGS_MAX];
    uint32_t n_warnings = cli_stats_warn(s, warning);
    for (uint32_t i = 0; i < n_warnings; i++)
        printf("! %s. hint: %s\n", warning[i].text, warning[i].hint);
}

/* A row of what went on since the one before. */
static void print_row(const Winnow__V1__StatsReply *s, const Winnow__V1__StatsReply *before,
                      double seconds)
{
    uint64_t n_host =
        s->blocks_device - before->blocks_device + s->blocks_host - before->blocks_host;
    uint64_t n_disk = s->blocks_disk - before->blocks_disk;
    uint64_t read_bytes = s->read_bytes_attend + s->read_bytes_exact + s->read_bytes_readahead;
    uint64_t read_before =
        before->read_bytes_attend + before->read_bytes_exact + before->read_bytes_readahead;
    printf("%8" PRIu64 " %11" PRIu64 " %9.0f %6.1f %5.0f %9.1f %9.1f %8.1f %8.1f\n",
           s->sessions_open, s->tokens_held,
           (double)(count_steps(s) - count_steps(before)) / seconds,
           100 * cli_ratio(n_host + n_disk, s->blocks_total - before->blocks_total),
           100 * cli_ratio(n_host, n_host + n_disk),
           (double)(read_bytes - read_before) / seconds / (1 << 20),
           (double)(s->written_bytes - before->written_bytes) / seconds / (1 << 20),
           (double)(s->pool_cap_bytes - s->pool_free_bytes) / (1 << 20),
           (double)s->disk_used_bytes / (1 << 20));
}

static void print_row_head(void)
{
    puts("sessions      tokens   steps/s   read   hit  disk read   written     host     disk\n"
         "                                     %     %     MiB/s     MiB/s      MiB      MiB");
}

/* ---- for scripts ---- */

static void print_json(const struct winnow_link *link, const Winnow__V1__StatsReply *s)
{
    winnow_assert(link->control);
    winnow_assert(s);
    struct cli_warning warning[CLI_N_WARNINGS_MAX];
    printf("{\"schema\": \"winnow.status/1\", \"winnowd\": ");
    cli_json_string(stdout, link->build);
    printf(", \"proto\": %u, \"pid\": %d, ", link->proto, winnow_channel_peer_pid(link->control));
    cli_json_fields(stdout, s);
    fputs(", ", stdout);
    cli_json_warnings(stdout, warning, cli_stats_warn(s, warning));
    puts("}");
}

/* ---- watch ---- */

enum look { LOOK_JSON, LOOK_SCREEN, LOOK_ROWS };

static void show(enum look look, const struct winnow_link *link, const struct cli_stats *now,
                 const struct cli_stats *before, uint64_t n_shown)
{
    winnow_assert(now != before);
    winnow_assert(now->reply);
    winnow_assert(before->reply || n_shown == 0);
    switch (look) {
    case LOOK_JSON:
        print_json(link, now->reply);
        break;
    case LOOK_SCREEN:
        fputs("\033[H\033[J", stdout);
        print_status(link, now->reply, true);
        break;
    case LOOK_ROWS:
        if (n_shown % N_ROWS_A_HEAD == 0)
            print_row_head();
        if (before->reply)
            print_row(now->reply, before->reply,
                      (double)(now->at_ns - before->at_ns) / (double)WINNOW_NS_PER_S);
        break;
    }
}

/* Until the daemon or the reader goes. Two answers are kept, each in its own arena. */
static int watch(struct winnow_link *link, enum look look)
{
    winnow_assert(link);
    winnow_assert(look <= LOOK_ROWS);
    struct cli_stats stats[2] = {{0}, {0}};
    int rc = 0;
    for (uint64_t n_shown = 0; !rc && !ferror(stdout); n_shown++) {
        struct cli_stats *now = &stats[n_shown % 2];
        rc = cli_stats_get(link, now);
        if (!rc)
            show(look, link, now, &stats[(n_shown + 1) % 2], n_shown);
        if (fflush(stdout) == EOF)
            break;
        if (!rc)
            poll(NULL, 0, WATCH_MS);
    }
    if (rc < 0)
        fprintf(stderr, "winnow: %s\n", winnow_error_text());
    cli_stats_finish(&stats[0]);
    cli_stats_finish(&stats[1]);
    return cli_exit_of(rc);
}

static bool terminal_is_wide(void)
{
    struct winsize size;
    return isatty(STDOUT_FILENO) &&
           (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) < 0 || size.ws_col >= COLUMNS_FOR_BAR);
}

int cli_status(const struct cli_options *options)
{
    int exit_status;
    struct winnow_link *link = cli_link_open(options, &exit_status);
    if (!link)
        return exit_status;
    if (options->watch) {
        exit_status = watch(link, options->json           ? LOOK_JSON
                                  : isatty(STDOUT_FILENO) ? LOOK_SCREEN
                                                          : LOOK_ROWS);
        winnow_link_unref(link);
        return exit_status;
    }
    struct cli_stats stats = {0};
    int rc = cli_stats_get(link, &stats);
    if (rc < 0) {
        fprintf(stderr, "winnow: %s\n", winnow_error_text());
    } else if (options->json) {
        print_json(link, stats.reply);
    } else {
        print_status(link, stats.reply, terminal_is_wide());
    }
    winnow_assert((rc == 0) == (stats.reply != NULL));
    exit_status = cli_exit_of(rc);
    if (!rc && strcmp(stats.reply->state, "ready"))
        exit_status = CLI_UNHEALTHY;
    cli_stats_finish(&stats);
    winnow_link_unref(link);
    return exit_status;
}
