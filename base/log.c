#include <base/assert.h>
#include <base/clock.h>
#include <base/log.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { N_REASONS = 64, LINE_BYTES = 1024 };
static const int64_t repeat_ns = 10 * WINNOW_NS_PER_S;

/* What was said of an event last, to say it once in ten seconds. */
struct reason {
    char event[32];
    int64_t said_ns;
    uint64_t n_held; /* not said since */
};

static struct reason reasons[N_REASONS];
static pthread_mutex_t reasons_lock = PTHREAD_MUTEX_INITIALIZER; /* leaf: nothing is taken inside */

static struct reason *reason_find(const char *event)
{
    struct reason *oldest = &reasons[0];
    for (int i = 0; i < N_REASONS; i++) {
        if (!strncmp(reasons[i].event, event, sizeof reasons[i].event - 1))
            return &reasons[i];
        if (reasons[i].said_ns < oldest->said_ns)
            oldest = &reasons[i];
    }
    *oldest = (struct reason){.said_ns = INT64_MIN / 2};
    snprintf(oldest->event, sizeof oldest->event, "%s", event);
    return oldest;
}

/* True when the line is to be written; *n_held lines were kept back before it. */
static int reason_passes(const char *event, uint64_t *n_held)
{
    int64_t now_ns = winnow_clock_now_ns();
    pthread_mutex_lock(&reasons_lock);
    struct reason *reason = reason_find(event);
    int passes = now_ns - reason->said_ns >= repeat_ns;
    *n_held = reason->n_held;
    if (passes) {
        reason->said_ns = now_ns;
        reason->n_held = 0;
    } else {
        reason->n_held++;
    }
    pthread_mutex_unlock(&reasons_lock);
    return passes;
}

static int prefix_format(char *line, size_t line_bytes, enum winnow_log_level level)
{
    if (getenv("JOURNAL_STREAM"))
        return snprintf(line, line_bytes, "<%d>", (int)level);
    static const char *const names[] = {
        [3] = "error", [4] = "warning", [5] = "notice", [6] = "info"};
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    char stamp[32];
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &utc);
    return snprintf(line, line_bytes, "%s.%03ldZ %s ", stamp, now.tv_nsec / 1000000, names[level]);
}

void winnow_log(enum winnow_log_level level, const char *event, const char *format, ...)
{
    winnow_assert(level >= WINNOW_LOG_ERROR);
    winnow_assert(level <= WINNOW_LOG_INFO);
    winnow_assert(event[0]);
    uint64_t n_held = 0;
    if (level != WINNOW_LOG_NOTICE && !reason_passes(event, &n_held))
        return;
    char line[LINE_BYTES];
    int n = prefix_format(line, sizeof line, level);
    n += snprintf(line + n, sizeof line - (size_t)n, "%s ", event);
    winnow_assert(n < LINE_BYTES / 2); /* an event is a word: the rest is the text's */
    va_list args;
    va_start(args, format);
    int n_text = vsnprintf(line + n, sizeof line - (size_t)n - 40, format, args);
    va_end(args);
    if (n_text > 0)
        n += n_text < (int)(sizeof line - (size_t)n - 40) ? n_text
                                                          : (int)(sizeof line - (size_t)n) - 41;
    if (n_held)
        n += snprintf(line + n, sizeof line - (size_t)n, " repeated=%llu",
                      (unsigned long long)n_held);
    winnow_assert(n < LINE_BYTES);
    line[n++] = '\n';
    fwrite(line, 1, (size_t)n, stderr);
}
