/*
 * The thread team: n workers and the owner's own thread run small items of work (at most about
 * 5 ms each) from three lanes, lowest lane number first. The owner submits, runs items itself while
 * it has nothing better to do, and polls for finished ones; with 0 workers it runs everything, and
 * the simulator chooses which item runs next.
 *
 * Workers that find nothing spin for spin_us before they sleep, but only while the team is hot
 * (a decode step is between its phases): a futex wake-up costs 25-35 us on a small VM, a phase of a
 * small step less than that.
 *
 * Thread: create, submit, run_one, poll, hot, destroy: the owner. `run` of an item: any.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum winnow_lane { WINNOW_LANE_DECODE, WINNOW_LANE_EXACT, WINNOW_LANE_BUILD, WINNOW_N_LANES };

/* Intrusive: embed in the caller's item; the team holds it from submit until poll returns it. */
struct winnow_work {
    void (*run)(struct winnow_work *work, uint32_t worker_idx); /* owner's own thread: n_workers */
    uint32_t lane;
    struct winnow_work *next; /* the team's */
};

struct winnow_team_options {
    uint32_t n_workers;
    uint32_t spin_us;
    void (*notify)(void *arg); /* any worker: finished items wait in poll (edge: was none) */
    void *notify_arg;
};

struct winnow_team;

int winnow_team_create(const struct winnow_team_options *options, struct winnow_team **ret_team);
void winnow_team_destroy(struct winnow_team *team); /* no item may be held; NULL is fine */

void winnow_team_submit(struct winnow_team *team, struct winnow_work *work);
bool winnow_team_run_one(struct winnow_team *team,
                         uint32_t lane_max);                    /* false: none in lanes <= it */
struct winnow_work *winnow_team_poll(struct winnow_team *team); /* NULL: none finished */
void winnow_team_hot(struct winnow_team *team, bool hot);
uint32_t winnow_team_size(const struct winnow_team *team); /* n_workers + 1 */

/* The simulator's choice among n waiting items of all lanes, in submission order; n: none of them
 * now, as if workers had them; NULL = by lane. */
void winnow_team_set_pick(struct winnow_team *team, uint32_t (*pick)(void *arg, uint32_t n),
                          void *arg);
