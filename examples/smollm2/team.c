// Threads that run one function side by side.
//
// A token has 30 runs with four barriers each. Waking a sleeper costs 5 to 50 us, so a run a matrix
// (210 a token) would cost more than the matrices; a run a layer costs thirty wake-ups, and its
// barriers spin. A spin that lasts (another process has the core) gives the core away.
#include "team.h"

#include <errno.h>
#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { N_THREADS_MAX = 64, N_SPINS = 4000 };

struct worker {
    struct team *team;
    pthread_t thread;
    uint32_t thread_idx;
};

/* fn and arg are written before run_id rises (release) and read after it was seen (acquire). */
struct team {
    uint32_t n_threads, n_started;
    team_fn *fn; /* NULL: the workers end */
    void *arg;
    _Atomic uint32_t run_id;
    _Alignas(64) _Atomic uint32_t n_arrived;
    _Alignas(64) _Atomic uint32_t barrier_id;
    struct worker workers[N_THREADS_MAX];
};

void team_barrier(struct team *team)
{
    uint32_t id = team->barrier_id;

    if (++team->n_arrived == team->n_threads) {
        team->n_arrived = 0;
        team->barrier_id = id + 1;
        return;
    }
    for (uint32_t n_spins = 0; team->barrier_id == id; n_spins++) {
        if (n_spins < N_SPINS)
            _mm_pause();
        else
            sched_yield();
    }
}

static void *worker_main(void *arg)
{
    struct worker *worker = arg;
    struct team *team = worker->team;

    for (uint32_t seen_id = 0;; seen_id++) {
        while (team->run_id == seen_id)
            syscall(SYS_futex, &team->run_id, FUTEX_WAIT_PRIVATE, seen_id, NULL, NULL, 0);
        if (!team->fn)
            return NULL;
        team->fn(team->arg, worker->thread_idx);
        team_barrier(team);
    }
}

static void start(struct team *team, team_fn *fn, void *arg)
{
    team->fn = fn;
    team->arg = arg;
    team->run_id++;
    syscall(SYS_futex, &team->run_id, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void team_run(struct team *team, team_fn *fn, void *arg)
{
    if (team->n_threads > 1)
        start(team, fn, arg);
    fn(arg, 0);
    team_barrier(team);
}

int team_create(uint32_t n_threads, struct team **ret_team)
{
    struct team *team = aligned_alloc(64, (sizeof *team + 63) / 64 * 64);
    if (!team)
        return -ENOMEM;
    *team = (struct team){.n_threads = n_threads < N_THREADS_MAX ? n_threads : N_THREADS_MAX};

    for (uint32_t i = 1; i < team->n_threads; i++) {
        struct worker *worker = &team->workers[i];
        worker->team = team;
        worker->thread_idx = i;
        int error = pthread_create(&worker->thread, NULL, worker_main, worker);
        if (error) {
            team_destroy(team);
            return -error;
        }
        team->n_started++;
    }
    *ret_team = team;
    return 0;
}

void team_destroy(struct team *team)
{
    if (!team)
        return;
    start(team, NULL, NULL);
    for (uint32_t i = 1; i <= team->n_started; i++)
        pthread_join(team->workers[i].thread, NULL);
    free(team);
}

uint32_t team_n_threads(const struct team *team)
{
    return team->n_threads;
}

void team_share(const struct team *team, uint32_t thread_idx, uint32_t n, uint32_t grain,
                uint32_t *first, uint32_t *end)
{
    uint32_t n_pieces = (n + grain - 1) / grain;
    uint64_t from = (uint64_t)n_pieces * thread_idx / team->n_threads * grain;
    uint64_t to = (uint64_t)n_pieces * (thread_idx + 1) / team->n_threads * grain;

    *first = from < n ? (uint32_t)from : n;
    *end = to < n ? (uint32_t)to : n;
}
