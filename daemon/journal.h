/*
 * Journal: what the log says of a daemon that runs, and the figures of its last seconds.
 *
 *   summary     each hour in which something was asked for
 *   disk_stuck, disk_back, disk_readonly      when the store's state changes
 *   io_slow     the disk's p99 of ten seconds is above 50 ms
 *
 * An idle daemon is silent. Times are passed in; who calls also asks for what is due.
 * Thread: serving.
 */
#pragma once

#include <base/latency.h>
#include <core/core.h>

/* The figures of a stretch of at least ten seconds, of which the last complete one is shown. */
struct winnow_stretch {
    int64_t begun_ns, took_ns;
    struct winnow_latency steps, reads; /* as they stood at its end */
    uint64_t n_tokens;
};

struct winnow_journal {
    struct winnow_latency steps; /* of decode, since start: from submit to done */
    uint64_t n_tokens;           /* decoded, since start */
    struct winnow_stretch before, last;

    int64_t hour_ns;                    /* when the next hour ends */
    uint32_t n_hours;                   /* since the last summary */
    struct winnow_core_stats summed_up; /* as of the last summary */
    bool was_stuck, was_degraded;
};

void winnow_journal_init(struct winnow_journal *journal, int64_t now_ns);
/* A decode step of a layer has ended; layer 0 counts the tokens. */
void winnow_journal_step(struct winnow_journal *journal, uint32_t layer, int64_t took_ns);
/* Logs what has changed. To be called whenever something happens. */
void winnow_journal_disk(struct winnow_journal *journal, const struct winnow_store_facts *facts);
/* Ends the stretch if it is long enough; logs io_slow. */
void winnow_journal_stretch(struct winnow_journal *journal, const struct winnow_latency *reads,
                            int64_t now_ns);

/* The last stretch's; 0: none. */
int64_t winnow_journal_step_ns(const struct winnow_journal *journal, double share);
int64_t winnow_journal_read_ns(const struct winnow_journal *journal, double share);
double winnow_journal_tokens_per_s(const struct winnow_journal *journal);

/* True once an hour has passed: the caller then gets stats and calls winnow_journal_hour. */
bool winnow_journal_hour_ends(struct winnow_journal *journal, int64_t now_ns);
/* The hour's line, without its event's name. False: nothing was asked for, there is none. */
bool winnow_journal_hour(struct winnow_journal *journal, const struct winnow_core_stats *stats,
                         char text[192]);
