/*
 * A team of threads that share out the items of one piece of work after another.
 *
 * Items go to whoever is there: a thread that wakes late or has lost its core to another process
 * delays nothing but the item it holds. Between runs the others wait close by (they spin) until
 * team_rest sends them to sleep: call it before a wait, since winnowd computes on the same cores.
 */
#pragma once

#include <stdint.h>

struct team;

/* thread_idx from 0 (the caller of team_run) to n_threads - 1: picks a thread's own memory. */
typedef void team_fn(void *arg, uint32_t item_idx, uint32_t thread_idx);

/* -ENOMEM, -EAGAIN no more threads. n_threads 1 to 64 (more: 64); 1 starts none. */
int team_create(uint32_t n_threads, struct team **ret_team);
void team_destroy(struct team *team); /* NULL is fine */

uint32_t team_n_threads(const struct team *team);
/* Calls fn for every item in [0, n_items), in any order and side by side; returns once all have
 * returned. From one thread only. */
void team_run(struct team *team, team_fn *fn, void *arg, uint32_t n_items);
void team_rest(struct team *team);
