// Threads that share out items.
//
// A token has 120 pieces of work of 5 to 40 us. Rejected: a fixed share for each thread with a
// barrier after it. Waking a sleeper takes 5 to 50 us and 30 times a token everyone waited for it;
// and where another process has one of the cores, each barrier waited for its time slice (20 ms a
// token in place of 5). Here the caller starts at once and does alone what nobody else takes.
//
// Each thread begins with a stretch of items of its own and goes up in it; done with that, it takes
// what is left of the others'. Rejected: one common count. Neighbouring rows then go to different
// threads, the processor's prefetch follows neither, and two threads are no faster than one.
//
// Taking an item is a compare-and-swap on its stretch's count of items left. What a run is (fn, arg,
// each stretch's end) is written before the counts (release) and read after an item was taken
// (acquire); it cannot change while an item is out, since the caller waits for all.
#include "team.h"

#include <errno.h>
#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { N_THREADS_MAX = 64, N_SPINS = 2000 };
enum { RESTING, WORKING, ENDING };

struct worker {
    struct team *team;
    pthread_t thread;
    uint32_t thread_idx;
};

struct stretch {
    _Alignas(64) _Atomic uint32_t n_left;
    uint32_t end; /* the item after its last */
};

struct team {
    uint32_t n_threads, n_started;
    team_fn *fn;
    void *arg;
    _Alignas(64) _Atomic uint32_t n_done;
    _Alignas(64) _Atomic uint32_t state; /* the futex that resting workers sleep on */
    struct stretch stretches[N_THREADS_MAX];
    struct worker workers[N_THREADS_MAX];
};

static void pause_briefly(uint32_t *n_spins)
{
    if (++*n_spins % N_SPINS)
        _mm_pause();
    else
        sched_yield();
}

static bool item_take(struct stretch *stretch, uint32_t *item_idx)
{
    uint32_t n_left = atomic_load_explicit(&stretch->n_left, memory_order_acquire);
    do {
        if (n_left == 0)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&stretch->n_left, &n_left, n_left - 1,
                                                    memory_order_acquire, memory_order_acquire));
    *item_idx = stretch->end - n_left;
    return true;
}

/* Does one item, if there is one left: of the thread's own stretch, else of the next that has one. */
static bool item_do(struct team *team, uint32_t thread_idx)
{
    uint32_t item_idx;

    for (uint32_t i = 0; i < team->n_threads; i++) {
        if (!item_take(&team->stretches[(thread_idx + i) % team->n_threads], &item_idx))
            continue;
        team->fn(team->arg, item_idx, thread_idx);
        atomic_fetch_add_explicit(&team->n_done, 1, memory_order_release);
        return true;
    }
    return false;
}

static void *worker_main(void *arg)
{
    const struct worker *worker = arg;
    struct team *team = worker->team;

    for (uint32_t n_spins = 0;;) {
        if (item_do(team, worker->thread_idx))
            continue;
        uint32_t state = atomic_load_explicit(&team->state, memory_order_acquire);
        if (state == ENDING)
            return NULL;
        if (state == RESTING)
            syscall(SYS_futex, &team->state, FUTEX_WAIT_PRIVATE, RESTING, NULL, NULL, 0);
        else
            pause_briefly(&n_spins);
    }
}

static void state_set(struct team *team, uint32_t state)
{
    if (atomic_exchange(&team->state, state) == RESTING && team->n_started)
        syscall(SYS_futex, &team->state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void stretch_set(struct stretch *stretch, uint32_t first, uint32_t end)
{
    stretch->end = end;
    atomic_store_explicit(&stretch->n_left, end - first, memory_order_release);
}

void team_run(struct team *team, team_fn *fn, void *arg, uint32_t n_items)
{
    uint32_t n_spins = 0;

    team->fn = fn;
    team->arg = arg;
    atomic_store_explicit(&team->n_done, 0, memory_order_relaxed);
    for (uint32_t i = 0, first = 0; i < team->n_threads; i++, first = team->stretches[i - 1].end)
        stretch_set(&team->stretches[i], first,
                    (uint32_t)((uint64_t)n_items * (i + 1) / team->n_threads));
    if (atomic_load_explicit(&team->state, memory_order_relaxed) == RESTING)
        state_set(team, WORKING);
    while (item_do(team, 0))
        ;
    while (atomic_load_explicit(&team->n_done, memory_order_acquire) != n_items)
        pause_briefly(&n_spins);
}

void team_rest(struct team *team)
{
    atomic_store_explicit(&team->state, RESTING, memory_order_release);
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
    state_set(team, ENDING);
    for (uint32_t i = 1; i <= team->n_started; i++)
        pthread_join(team->workers[i].thread, NULL);
    free(team);
}

uint32_t team_n_threads(const struct team *team)
{
    return team->n_threads;
}
