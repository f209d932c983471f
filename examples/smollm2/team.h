/*
 * A team of threads that run the same function side by side, with barriers in it.
 *
 * Between runs the others sleep in the kernel: winnowd computes attention on the same cores then.
 * Inside a run a barrier spins, since the stretches between two barriers are tens of microseconds.
 */
#pragma once

#include <stdint.h>

struct team;

/* Called once in each thread, thread_idx from 0 (the caller of team_run) to n_threads - 1. */
typedef void team_fn(void *arg, uint32_t thread_idx);

/* -ENOMEM, -EAGAIN no more threads. n_threads 1 to 64; 1 starts none. */
int team_create(uint32_t n_threads, struct team **ret_team);
void team_destroy(struct team *team); /* NULL is fine */

uint32_t team_n_threads(const struct team *team);
/* Returns once all have returned. One run at a time. */
void team_run(struct team *team, team_fn *fn, void *arg);
/* All threads call it the same number of times in a run. */
void team_barrier(struct team *team);

/* Thread thread_idx's part [*first, *end) of n items in pieces of `grain`. */
void team_share(const struct team *team, uint32_t thread_idx, uint32_t n, uint32_t grain,
                uint32_t *first, uint32_t *end);
