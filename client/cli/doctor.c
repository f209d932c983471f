// Advice for what was seen, and only that: each check looks at one fact and is silent where it
// cannot look (another user's process, no /proc). It changes nothing.
#include <client/cli/cli.h>

#include <assert.h>
#include <base/assert.h>
#include <client/error.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>
#include <winnow/winnow.h>

enum level { LEVEL_OK, LEVEL_WARN, LEVEL_FAIL };
enum { N_FINDINGS_MAX = 24, N_FINDINGS_OWN = 12 }; /* own: of the checks here */

struct finding {
    enum level level;
    const char *check;
    char text[192], fix[192];
};

struct doctor {
    struct finding finding[N_FINDINGS_MAX];
    uint32_t n_findings;
    int pid; /* winnowd's; 0: unknown */
    const Winnow__V1__StatsReply *stats;
};

static_assert(N_FINDINGS_MAX >= N_FINDINGS_OWN + CLI_N_WARNINGS_MAX, "no finding is dropped");
static_assert(sizeof((struct finding *)0)->text >= sizeof((struct cli_warning *)0)->text,
              "a warning's text is told whole");
static_assert(sizeof((struct finding *)0)->fix >= sizeof((struct cli_warning *)0)->hint,
              "a warning's hint is told whole");

static void found(struct doctor *doctor, enum level level, const char *check, const char *fix,
                  const char *format, ...) __attribute__((format(printf, 5, 6)));
static void found(struct doctor *doctor, enum level level, const char *check, const char *fix,
                  const char *format, ...)
{
    winnow_assert(level <= LEVEL_FAIL);
    winnow_assert(check);
    winnow_assert(fix);
    winnow_assert(doctor->n_findings <= N_FINDINGS_MAX);
    if (doctor->n_findings == N_FINDINGS_MAX)
        return;
    struct finding *finding = &doctor->finding[doctor->n_findings++];
    va_list args;
    va_start(args, format);
    finding->level = level;
    finding->check = check;
    vsnprintf(finding->text, sizeof finding->text, format, args);
    snprintf(finding->fix, sizeof finding->fix, "%s", fix);
    va_end(args);
}

/* The number after `before` in a file of /proc or /sys; UINT64_MAX: not there, or no number. */
static uint64_t read_number(const char *path, const char *before)
{
    winnow_assert(path);
    winnow_assert(before);
    char line[256];
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "re");
    while (file && value == UINT64_MAX && fgets(line, sizeof line, file)) {
        size_t n_before = strlen(before);
        if (strncmp(line, before, n_before))
            continue;
        const char *digits = line + n_before + strspn(line + n_before, " \t");
        if (*digits >= '0' && *digits <= '9')
            value = strtoull(digits, NULL, 10);
    }
    if (file)
        fclose(file);
    return value;
}

/* ---- checks ---- */

static void check_version(struct doctor *doctor, const struct winnow_link *link)
{
    if (strcmp(link->build, winnow_version()))
        found(doctor, LEVEL_WARN, "versions", "install the same version of both",
              "winnow %s, winnowd %s", winnow_version(), link->build);
    else
        found(doctor, LEVEL_OK, "versions", "", "winnow and winnowd %s, protocol %u", link->build,
              link->proto);
}

static void check_io(struct doctor *doctor)
{
    winnow_assert(doctor->stats);
    const Winnow__V1__StatsReply *s = doctor->stats;
    if (*s->io_remedy)
        found(doctor, LEVEL_WARN, "io_method", s->io_remedy, "disk I/O by %s, not io_uring",
              s->io_method);
    else if (*s->io_method)
        found(doctor, LEVEL_OK, "io_method", "", "%s%s%s", s->io_method, *s->io_flags ? ": " : "",
              s->io_flags);
    if (!s->disk_cap_bytes)
        return;
    if (!s->io_direct)
        found(doctor, LEVEL_WARN, "direct_io",
              "a data_dir on a file system that knows O_DIRECT (ext4, xfs)",
              "reads pass through the page cache: memory beyond host_pool is used");
    else
        found(doctor, LEVEL_OK, "direct_io", "", "data files are read past the page cache");
    if (s->io_errors)
        found(doctor, LEVEL_FAIL, "disk_errors", "look at the kernel's log (dmesg) and the disk",
              "%" PRIu64 " disk errors since start", s->io_errors);
}

/* Registered buffers count against RLIMIT_MEMLOCK; a pool above it falls back to plain reads. */
static void check_memlock(struct doctor *doctor)
{
    winnow_assert(doctor->stats);
    char path[64], a[16], b[16];
    snprintf(path, sizeof path, "/proc/%d/limits", doctor->pid);
    uint64_t limit_bytes = doctor->pid ? read_number(path, "Max locked memory") : UINT64_MAX;
    uint64_t pool_bytes = doctor->stats->pool_cap_bytes;
    if (limit_bytes < pool_bytes && !strstr(doctor->stats->io_flags, "buffers"))
        found(doctor, LEVEL_WARN, "memlock", "LimitMEMLOCK=infinity, or ulimit -l unlimited",
              "memlock %s < host_pool %s", cli_bytes(limit_bytes, a), cli_bytes(pool_bytes, b));
}

/* memory.max of the daemon's cgroup; UINT64_MAX: none, or not to be seen. */
static uint64_t read_cgroup_bytes(int pid)
{
    winnow_assert(pid);
    char path[64], line[400] = "", file_path[512];
    snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file) && strncmp(line, "0::/", 4))
        line[0] = 0;
    if (file)
        fclose(file);
    if (strncmp(line, "0::/", 4))
        return UINT64_MAX;
    line[strcspn(line, "\n")] = 0;
    snprintf(file_path, sizeof file_path, "/sys/fs/cgroup%s/memory.max", line + 3);
    return read_number(file_path, "");
}

static void check_memory(struct doctor *doctor)
{
    winnow_assert(doctor->stats);
    const Winnow__V1__StatsReply *s = doctor->stats;
    char a[16], b[16];
    uint64_t available_kib = read_number("/proc/meminfo", "MemAvailable:");
    uint64_t cgroup_bytes = doctor->pid ? read_cgroup_bytes(doctor->pid) : UINT64_MAX;
    uint64_t left_bytes = s->printed_bytes - s->rss_bytes;
    if (s->rss_bytes > s->printed_bytes)
        left_bytes = 0;
    winnow_assert(left_bytes <= s->printed_bytes);
    if (s->rss_peak_bytes > s->printed_bytes)
        found(doctor, LEVEL_FAIL, "memory", "please report it: winnow status --json",
              "peak RSS %s is above the %s printed at start", cli_bytes(s->rss_peak_bytes, a),
              cli_bytes(s->printed_bytes, b));
    else if (available_kib != UINT64_MAX && left_bytes > available_kib << 10)
        found(doctor, LEVEL_WARN, "memory", "a smaller host_pool",
              "winnowd may take %s more, %s are available", cli_bytes(left_bytes, a),
              cli_bytes(available_kib << 10, b));
    else
        found(doctor, LEVEL_OK, "memory", "", "RSS %s, at most %s", cli_bytes(s->rss_bytes, a),
              cli_bytes(s->printed_bytes, b));
    if (cgroup_bytes < s->printed_bytes)
        found(doctor, LEVEL_WARN, "cgroup", "a larger memory.max, or a smaller host_pool",
              "the cgroup allows %s, winnowd printed %s", cli_bytes(cgroup_bytes, a),
              cli_bytes(s->printed_bytes, b));
}

/* A file of the data directory that winnowd holds open: its largest regular one. */
static bool find_data_file(int pid, char path[64])
{
    winnow_assert(pid);
    off_t size_bytes = 0;
    for (int fd = 0; fd < 256; fd++) {
        struct stat info;
        char one[64];
        snprintf(one, sizeof one, "/proc/%d/fd/%d", pid, fd);
        if (stat(one, &info) < 0 || !S_ISREG(info.st_mode) || info.st_size <= size_bytes)
            continue;
        size_bytes = info.st_size;
        memcpy(path, one, sizeof one);
    }
    return size_bytes > 0;
}

static void check_disk(struct doctor *doctor)
{
    winnow_assert(doctor->stats);
    const Winnow__V1__StatsReply *s = doctor->stats;
    char path[64], a[16], b[16];
    struct statfs fs;
    if (!doctor->pid || !s->disk_cap_bytes || !find_data_file(doctor->pid, path) ||
        statfs(path, &fs) < 0)
        return;
    uint64_t free_bytes = (uint64_t)fs.f_bavail * (uint64_t)fs.f_bsize;
    uint64_t wanted_bytes = s->disk_cap_bytes > s->disk_allocated_bytes
                                ? s->disk_cap_bytes - s->disk_allocated_bytes
                                : 0;
    if (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC)
        found(doctor, LEVEL_WARN, "disk", "data_dir on a disk",
              "the data directory is in memory (tmpfs)");
    if (wanted_bytes > free_bytes)
        found(doctor, LEVEL_WARN, "disk", "free space, or a smaller disk_cap",
              "disk_cap wants %s more, %s are free", cli_bytes(wanted_bytes, a),
              cli_bytes(free_bytes, b));
    else
        found(doctor, LEVEL_OK, "disk", "", "%s used of %s", cli_bytes(s->disk_used_bytes, a),
              cli_bytes(s->disk_cap_bytes, b));
}

static void check_state(struct doctor *doctor)
{
    winnow_assert(doctor->stats);
    struct cli_warning warning[CLI_N_WARNINGS_MAX];
    uint32_t n_warnings = cli_stats_warn(doctor->stats, warning);
    if (strcmp(doctor->stats->state, "ready"))
        found(doctor, LEVEL_FAIL, "state", "its log says why", "winnowd is %s",
              doctor->stats->state);
    /* What status warns of and no check above has. */
    static const char *const own[] = {"state", "io_errors", "io_method", "io_direct", "memory"};
    for (uint32_t i = 0; i < n_warnings; i++) {
        bool known = false;
        for (size_t j = 0; j < sizeof own / sizeof *own; j++)
            known |= !strcmp(warning[i].reason, own[j]);
        if (!known)
            found(doctor, LEVEL_WARN, warning[i].reason, warning[i].hint, "%s", warning[i].text);
    }
}

/* Who may reach the daemon: the socket's own rights. */
static void check_socket(struct doctor *doctor, const struct winnow_link *link)
{
    struct stat info;
    int uid = winnow_channel_peer_uid(link->control);
    if (stat(link->path, &info) < 0)
        return;
    if (info.st_mode & S_IWOTH)
        found(doctor, LEVEL_WARN, "socket", "chmod o-w, and allow_uids for others",
              "%s is open to every user", link->path);
    else if ((int)info.st_uid != uid)
        found(doctor, LEVEL_WARN, "socket", "start winnowd so that it makes its own socket",
              "%s belongs to uid %u, winnowd runs as %d", link->path, info.st_uid, uid);
    else
        found(doctor, LEVEL_OK, "socket", "", "%s, mode %04o, uid %d", link->path,
              info.st_mode & 07777U, uid);
}

/* Attention as an engine would ask for it. A daemon that is full says so: no fault. */
static void check_attach(struct doctor *doctor, const struct winnow_link *link)
{
    double error;
    int rc = cli_probe(link->path, &error);
    winnow_assert(rc <= 0);
    winnow_assert(error >= 0);
    if (!rc)
        found(doctor, LEVEL_OK, "attach", "", "32 tokens attended, error %.1e", error);
    else if (rc == -EPROTO)
        found(doctor, LEVEL_FAIL, "attach", "winnowd --kernels ref, and please report it",
              "attention is wrong by %.1e", error);
    else
        found(doctor, rc == -EDQUOT || rc == -ENOSPC ? LEVEL_WARN : LEVEL_FAIL, "attach", "", "%s",
              winnow_error_text());
}

/* ---- */

static int look(struct doctor *doctor, struct winnow_link *link, struct cli_stats *stats)
{
    winnow_assert(link->control);
    winnow_assert(!doctor->n_findings);
    doctor->pid = winnow_channel_peer_pid(link->control);
    check_version(doctor, link);
    check_socket(doctor, link);
    int rc = cli_stats_get(link, stats);
    if (rc < 0)
        return rc;
    doctor->stats = stats->reply;
    check_state(doctor);
    check_memory(doctor);
    check_memlock(doctor);
    check_io(doctor);
    check_disk(doctor);
    check_attach(doctor, link);
    return 0;
}

static void print_findings(const struct doctor *doctor, bool json)
{
    static const char *const names[] = {"ok", "warn", "FAIL"};
    static const char *const json_names[] = {"ok", "warn", "fail"};
    static_assert(sizeof names / sizeof *names == LEVEL_FAIL + 1, "a name for each level");
    static_assert(sizeof json_names == sizeof names, "a name for each level");
    winnow_assert(doctor->n_findings <= N_FINDINGS_MAX);
    if (json)
        fputs("{\"schema\": \"winnow.doctor/1\", \"checks\": [", stdout);
    for (uint32_t i = 0; i < doctor->n_findings; i++) {
        const struct finding *finding = &doctor->finding[i];
        winnow_assert(finding->level <= LEVEL_FAIL);
        if (json) {
            printf("%s{\"check\": \"%s\", \"level\": \"%s\", \"text\": ", i ? ", " : "",
                   finding->check, json_names[finding->level]);
            cli_json_string(stdout, finding->text);
            fputs(", \"fix\": ", stdout);
            cli_json_string(stdout, finding->fix);
            fputc('}', stdout);
        } else {
            printf("%-4s %-11s %s%s%s\n", names[finding->level], finding->check, finding->text,
                   *finding->fix ? "  fix: " : "", finding->fix);
        }
    }
    if (json)
        puts("]}");
}

int cli_doctor(const struct cli_options *options)
{
    struct doctor doctor = {0};
    struct cli_stats stats = {0};
    int exit_status;
    struct winnow_link *link = cli_link_open(options, &exit_status);
    if (!link)
        return exit_status;
    int rc = look(&doctor, link, &stats);
    if (rc < 0)
        found(&doctor, LEVEL_FAIL, "stats", "", "%s", winnow_error_text());
    winnow_assert(doctor.n_findings > 0); /* the versions at least */
    winnow_assert(rc < 0 || stats.reply);
    print_findings(&doctor, options->json);
    exit_status = CLI_OK;
    for (uint32_t i = 0; i < doctor.n_findings; i++)
        if (doctor.finding[i].level == LEVEL_FAIL)
            exit_status = CLI_UNHEALTHY;
    cli_stats_finish(&stats);
    winnow_link_unref(link);
    return exit_status;
}
