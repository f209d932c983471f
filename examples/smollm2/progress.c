// A bar is drawn from half a second on and ten times a second at most: a short job shows none, and
// the terminal never slows the work. The time left is honest about what it knows: what is left at
// the mean rate so far.
#include "progress.h"

#include "clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static const int64_t SECOND_NS = 1000000000;

enum { BAR_CELLS = 20, BAR_COLUMNS_MIN = 60, COUNT_COLUMNS_MIN = 40 };

static enum progress_mode mode_choose(void)
{
    const char *terminal = getenv("TERM"), *ci = getenv("CI");
    if (!isatty(STDERR_FILENO) || (ci && *ci) || (terminal && !strcmp(terminal, "dumb")))
        return PROGRESS_LINES;
    return PROGRESS_BAR;
}

void progress_begin(struct progress *p, enum progress_mode mode, const char *doing,
                    const char *unit, uint64_t n_total)
{
    struct winsize size = {0};
    *p = (struct progress){
        .mode = mode == PROGRESS_AUTO ? mode_choose() : mode,
        .doing = doing,
        .unit = unit,
        .n_total = n_total,
        .start_ns = clock_now_ns(),
    };
    p->shown_ns = p->start_ns;
    p->n_columns = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
}

/* 3907 as "3,907". */
static void group(uint64_t value, char text[32])
{
    char digits[24];
    int n_digits = snprintf(digits, sizeof digits, "%llu", (unsigned long long)value), at = 0;
    for (int i = 0; i < n_digits; i++) {
        if (i && (n_digits - i) % 3 == 0)
            text[at++] = ',';
        text[at++] = digits[i];
    }
    text[at] = 0;
}

static void draw_bar(struct progress *p, uint64_t n_done, double rate, uint64_t left_s)
{
    char bar[BAR_CELLS + 1] = {0}, done[32], total[32];
    uint64_t n_full = p->n_total ? n_done * BAR_CELLS / p->n_total : 0;

    memset(bar, '-', BAR_CELLS);
    memset(bar, '#', n_full < BAR_CELLS ? n_full : BAR_CELLS);
    group(n_done, done);
    group(p->n_total, total);
    fprintf(stderr, "\r%s ", p->doing);
    if (p->n_columns >= BAR_COLUMNS_MIN)
        fprintf(stderr, "[%s] ", bar);
    fprintf(stderr, "%llu %%", (unsigned long long)(p->n_total ? n_done * 100 / p->n_total : 0));
    if (p->n_columns >= COUNT_COLUMNS_MIN)
        fprintf(stderr, "  %s of %s %s  %.0f/s", done, total, p->unit, rate);
    fprintf(stderr, "  %llu:%02llu left\033[K", (unsigned long long)(left_s / 60),
            (unsigned long long)(left_s % 60));
}

void progress_update(struct progress *p, uint64_t n_done)
{
    const int64_t now_ns = clock_now_ns(), elapsed_ns = now_ns - p->start_ns;
    const int is_bar = p->mode == PROGRESS_BAR;

    if (p->mode == PROGRESS_NONE || elapsed_ns < SECOND_NS / 2 ||
        now_ns - p->shown_ns < (is_bar ? SECOND_NS / 10 : 10 * SECOND_NS))
        return;
    double rate = (double)n_done / ((double)elapsed_ns / 1e9);
    uint64_t left_s = rate > 0 ? (uint64_t)((double)(p->n_total - n_done) / rate + .5) : 0;
    if (is_bar)
        draw_bar(p, n_done, rate, left_s);
    else
        fprintf(stderr, "%s %llu/%llu %s %.0f/s %llus left\n", p->doing, (unsigned long long)n_done,
                (unsigned long long)p->n_total, p->unit, rate, (unsigned long long)left_s);
    p->shown_ns = now_ns;
    p->is_shown = 1;
}

void progress_end(struct progress *p)
{
    if (p->mode == PROGRESS_BAR && p->is_shown)
        fputs("\r\033[K", stderr);
}
