/*
 * Progress on stderr: a bar on a terminal, a line each ten seconds elsewhere, or nothing.
 */
#pragma once

#include <stdint.h>

enum progress_mode { PROGRESS_AUTO, PROGRESS_BAR, PROGRESS_LINES, PROGRESS_NONE };

struct progress {
    enum progress_mode mode; /* never AUTO after begin */
    const char *doing, *unit;
    uint64_t n_total;
    int64_t start_ns, shown_ns;
    int n_columns, is_shown;
};

/* doing: "read"; unit: "tokens". AUTO: a bar when stderr is a terminal that can and CI is unset. */
void progress_begin(struct progress *progress, enum progress_mode mode, const char *doing,
                    const char *unit, uint64_t n_total);
void progress_update(struct progress *progress, uint64_t n_done);
void progress_end(struct progress *progress);
