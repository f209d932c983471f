#include <base/assert.h>
#include <base/clock.h>
#include <base/log.h>
#include <daemon/journal.h>
#include <inttypes.h>
#include <stdio.h>

enum { N_READS_LEAST = 100 }; /* below which a p99 says nothing */

static const int64_t hour_ns = 3600 * WINNOW_NS_PER_S;
static const int64_t stretch_ns = 10 * WINNOW_NS_PER_S;
static const int64_t slow_ns = 50 * WINNOW_NS_PER_MS;

void winnow_journal_init(struct winnow_journal *journal, int64_t now_ns)
{
    *journal = (struct winnow_journal){.hour_ns = now_ns + hour_ns};
    journal->last.begun_ns = journal->before.begun_ns = now_ns;
}

void winnow_journal_step(struct winnow_journal *journal, uint32_t layer, int64_t took_ns)
{
    winnow_assert(took_ns >= 0);
    winnow_latency_add(&journal->steps, took_ns);
    journal->n_tokens += layer == 0;
}

void winnow_journal_disk(struct winnow_journal *journal, const struct winnow_store_facts *facts)
{
    if (facts->stuck && !journal->was_stuck)
        winnow_log(WINNOW_LOG_WARNING, "disk_stuck",
                   "disk=0 timeouts=%" PRIu64 " hint=\"contexts on it end with ETIMEDOUT until it "
                   "answers; see the kernel's log\"",
                   facts->timeouts);
    else if (!facts->stuck && journal->was_stuck)
        winnow_log(WINNOW_LOG_NOTICE, "disk_back", "disk=0 timeouts=%" PRIu64, facts->timeouts);
    if (facts->degraded && !journal->was_degraded)
        winnow_log(WINNOW_LOG_ERROR, "disk_readonly",
                   "disk=0 errors=%" PRIu64 " hint=\"nothing more is written to it; see the "
                   "kernel's log\"",
                   facts->errors_io);
    journal->was_stuck = facts->stuck;
    journal->was_degraded = facts->degraded;
}

int64_t winnow_journal_step_ns(const struct winnow_journal *journal, double share)
{
    winnow_assert(share > 0);
    winnow_assert(share <= 1);
    return winnow_latency_quantile(&journal->last.steps, &journal->before.steps, share);
}

int64_t winnow_journal_read_ns(const struct winnow_journal *journal, double share)
{
    winnow_assert(share > 0);
    winnow_assert(share <= 1);
    return winnow_latency_quantile(&journal->last.reads, &journal->before.reads, share);
}

double winnow_journal_tokens_per_s(const struct winnow_journal *journal)
{
    const struct winnow_stretch *last = &journal->last;
    winnow_assert(last->took_ns >= 0);
    winnow_assert(last->n_tokens >= journal->before.n_tokens);
    return last->took_ns ? (double)(last->n_tokens - journal->before.n_tokens) *
                               (double)WINNOW_NS_PER_S / (double)last->took_ns
                         : 0;
}

void winnow_journal_stretch(struct winnow_journal *journal, const struct winnow_latency *reads,
                            int64_t now_ns)
{
    struct winnow_stretch *last = &journal->last;
    int64_t begun_ns = last->begun_ns + last->took_ns;
    if (now_ns - begun_ns < stretch_ns)
        return;
    journal->before = *last;
    *last = (struct winnow_stretch){.begun_ns = begun_ns,
                                    .took_ns = now_ns - begun_ns,
                                    .steps = journal->steps,
                                    .reads = *reads,
                                    .n_tokens = journal->n_tokens};
    winnow_assert(last->took_ns >= stretch_ns);
    winnow_assert(last->begun_ns >= journal->before.begun_ns);
    winnow_assert(last->n_tokens >= journal->before.n_tokens);
    int64_t p99_ns = winnow_journal_read_ns(journal, 0.99);
    uint64_t n_reads = winnow_latency_count(reads, &journal->before.reads);
    if (n_reads >= N_READS_LEAST && p99_ns > slow_ns)
        winnow_log(WINNOW_LOG_WARNING, "io_slow", "disk=0 p99_ms=%.1f reads=%" PRIu64,
                   (double)p99_ns / (double)WINNOW_NS_PER_MS, n_reads);
}

bool winnow_journal_hour_ends(struct winnow_journal *journal, int64_t now_ns)
{
    if (now_ns < journal->hour_ns)
        return false;
    while (journal->hour_ns <= now_ns) {
        journal->hour_ns += hour_ns;
        journal->n_hours++;
    }
    winnow_assert(journal->n_hours);
    winnow_assert(journal->hour_ns - now_ns <= hour_ns);
    return true;
}

static double percent(uint64_t part, uint64_t all)
{
    return all ? 100.0 * (double)part / (double)all : 0;
}

/* 812, 1.1M: as people say it. */
static const char *count_text(uint64_t n, char text[24])
{
    static const char units[] = " kMGT";
    double value = (double)n;
    uint32_t unit = 0;
    for (; value >= 1000 && unit + 2 < sizeof units; unit++)
        value /= 1000;
    if (unit)
        snprintf(text, 24, "%.1f%c", value, units[unit]);
    else
        snprintf(text, 24, "%" PRIu64, n);
    return text;
}

bool winnow_journal_hour(struct winnow_journal *journal, const struct winnow_core_stats *stats,
                         char text[192])
{
    winnow_assert(journal->n_hours);
    const struct winnow_core_stats *before = &journal->summed_up;
    uint64_t n_refused = 0, n_steps = stats->n_exact_windows - before->n_exact_windows;
    for (size_t i = 0; i < sizeof stats->n_errors / sizeof *stats->n_errors; i++)
        n_refused += stats->n_errors[i] - before->n_errors[i];
    for (uint32_t i = 0; i < 5; i++)
        n_steps += stats->n_steps[i] - before->n_steps[i];
    if (!n_steps && !n_refused)
        return false;
    uint64_t n_host = stats->n_blocks_device - before->n_blocks_device + stats->n_blocks_host -
                      before->n_blocks_host;
    uint64_t n_read = n_host + stats->n_blocks_disk - before->n_blocks_disk;
    uint64_t n_mass = stats->n_mass - before->n_mass;
    double mass =
        n_mass ? (double)(stats->mass_sum_micro - before->mass_sum_micro) / 1e6 / (double)n_mass
               : 1;
    char tokens[24];
    snprintf(text, 192,
             "hours=%u sessions=%" PRIu64 " tokens=%s read=%.1f%% mass=%.3f host_hit=%.0f%% "
             "refused=%" PRIu64,
             journal->n_hours, stats->n_sessions, count_text(stats->n_tokens_held, tokens),
             percent(n_read, stats->n_blocks_total - before->n_blocks_total), mass,
             percent(n_host, n_read), n_refused);
    journal->n_hours = 0;
    journal->summed_up = *stats;
    return true;
}
