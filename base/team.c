// One short lock around three queues. Items are 10 us to 5 ms long, so the lock (about 20 ns when
// free) is no cost; a lock-free deque a worker was not worth its proof. What costs is the wake-up:
// 25-35 us on a small VM, more than a phase of a decode step at 7,000 tokens. So idle workers of a
// hot team spin on `n_waiting` before they sleep, and submit wakes one sleeper an item, none when
// a spinner will see it.
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <base/team.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

struct queue {
    struct winnow_work *first, **last;
};

struct worker {
    struct winnow_team *team;
    pthread_t thread;
    uint32_t worker_idx;
};

struct winnow_team {
    struct winnow_team_options options;
    struct worker *worker;
    uint32_t n_started;

    pthread_mutex_t lock; /* leaf: lanes, finished, n_sleeping, stopping */
    pthread_cond_t work_came;
    struct queue lane[WINNOW_N_LANES];
    struct queue finished;
    uint32_t n_sleeping;
    bool stopping;

    _Atomic uint32_t n_waiting;  /* items in lanes; written under the lock, read by spinners */
    _Atomic uint32_t n_spinning; /* workers that will look at n_waiting before they sleep */
    _Atomic bool hot;
    _Atomic bool any_finished; /* written under the lock; the owner's quick look */

    uint32_t (*pick)(void *arg, uint32_t n);
    void *pick_arg;
};

static void queue_init(struct queue *queue)
{
    queue->first = NULL;
    queue->last = &queue->first;
}

static void queue_put(struct queue *queue, struct winnow_work *work)
{
    winnow_assert(!*queue->last);
    work->next = NULL;
    *queue->last = work;
    queue->last = &work->next;
}

static struct winnow_work *queue_take(struct queue *queue, uint32_t place)
{
    struct winnow_work **at = &queue->first;
    while (place--)
        at = &(*at)->next;
    struct winnow_work *work = *at;
    winnow_assert(work);
    *at = work->next;
    if (queue->last == &work->next)
        queue->last = at;
    return work;
}

/* The next item by lane, under the lock. */
static struct winnow_work *take_by_lane(struct winnow_team *team, uint32_t lane_max)
{
    for (uint32_t lane = 0; lane <= lane_max; lane++)
        if (team->lane[lane].first) {
            uint32_t n_waiting = atomic_fetch_sub(&team->n_waiting, 1);
            winnow_assert(n_waiting > 0);
            return queue_take(&team->lane[lane], 0);
        }
    return NULL;
}

/* The simulator's choice among all items, under the lock. */
static struct winnow_work *take_by_pick(struct winnow_team *team, uint32_t lane_max)
{
    uint32_t n = 0, place;
    for (uint32_t lane = 0; lane <= lane_max; lane++)
        for (struct winnow_work *work = team->lane[lane].first; work; work = work->next)
            n++;
    if (n == 0)
        return NULL;
    place = team->pick(team->pick_arg, n);
    winnow_assert(place <= n);
    if (place == n)
        return NULL;
    for (uint32_t lane = 0; lane <= lane_max; lane++) {
        n = 0;
        for (struct winnow_work *work = team->lane[lane].first; work; work = work->next)
            n++;
        if (place < n) {
            atomic_fetch_sub(&team->n_waiting, 1);
            return queue_take(&team->lane[lane], place);
        }
        place -= n;
    }
    return NULL;
}

static struct winnow_work *take(struct winnow_team *team, uint32_t lane_max)
{
    return team->pick ? take_by_pick(team, lane_max) : take_by_lane(team, lane_max);
}

static void finish(struct winnow_team *team, struct winnow_work *work, bool notify)
{
    pthread_mutex_lock(&team->lock);
    bool was_none = !team->finished.first;
    queue_put(&team->finished, work);
    atomic_store(&team->any_finished, true);
    pthread_mutex_unlock(&team->lock);
    if (was_none && notify && team->options.notify)
        team->options.notify(team->options.notify_arg);
}

/* Looks for work without sleeping while the team is hot, for spin_us at most. */
static void spin(struct winnow_team *team)
{
    if (!team->options.spin_us || !atomic_load(&team->hot))
        return;
    int64_t until_ns = winnow_clock_now_ns() + team->options.spin_us * WINNOW_NS_PER_US;
    atomic_fetch_add(&team->n_spinning, 1);
    while (!atomic_load_explicit(&team->n_waiting, memory_order_relaxed) &&
           atomic_load_explicit(&team->hot, memory_order_relaxed) &&
           winnow_clock_now_ns() < until_ns)
        for (int i = 0; i < 16; i++)
            __builtin_ia32_pause();
    atomic_fetch_sub(&team->n_spinning, 1);
}

static void *worker_run(void *arg)
{
    struct worker *worker = arg;
    struct winnow_team *team = worker->team;
    pthread_mutex_lock(&team->lock);
    for (;;) {
        struct winnow_work *work = take(team, WINNOW_N_LANES - 1);
        if (work) {
            pthread_mutex_unlock(&team->lock);
            work->run(work, worker->worker_idx);
            finish(team, work, true);
            pthread_mutex_lock(&team->lock);
            continue;
        }
        if (team->stopping)
            break;
        pthread_mutex_unlock(&team->lock);
        spin(team);
        pthread_mutex_lock(&team->lock);
        if (!atomic_load(&team->n_waiting) && !team->stopping) {
            team->n_sleeping++;
            pthread_cond_wait(&team->work_came, &team->lock);
            team->n_sleeping--;
        }
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

static int workers_start(struct winnow_team *team)
{
    for (; team->n_started < team->options.n_workers; team->n_started++) {
        struct worker *worker = &team->worker[team->n_started];
        *worker = (struct worker){.team = team, .worker_idx = team->n_started};
        int rc = pthread_create(&worker->thread, NULL, worker_run, worker);
        if (rc)
            return -rc;
    }
    return 0;
}

int winnow_team_create(const struct winnow_team_options *options, struct winnow_team **ret_team)
{
    winnow_assert(options->n_workers < 1024);
    struct winnow_team *team = winnow_alloc(sizeof *team);
    if (!team)
        return -ENOMEM;
    team->options = *options;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->work_came, NULL);
    for (int lane = 0; lane < WINNOW_N_LANES; lane++)
        queue_init(&team->lane[lane]);
    queue_init(&team->finished);
    team->worker = winnow_alloc_array(options->n_workers, sizeof *team->worker);
    int rc = team->worker ? workers_start(team) : -ENOMEM;
    if (rc < 0) {
        winnow_team_destroy(team);
        return rc;
    }
    *ret_team = team;
    return 0;
}

void winnow_team_destroy(struct winnow_team *team)
{
    if (!team)
        return;
    pthread_mutex_lock(&team->lock);
    winnow_assert(!atomic_load(&team->n_waiting));
    team->stopping = true;
    pthread_cond_broadcast(&team->work_came);
    pthread_mutex_unlock(&team->lock);
    for (uint32_t i = 0; i < team->n_started; i++)
        pthread_join(team->worker[i].thread, NULL);
    winnow_assert(team->n_sleeping == 0);
    pthread_cond_destroy(&team->work_came);
    pthread_mutex_destroy(&team->lock);
    winnow_alloc_free(team->worker);
    winnow_alloc_free(team);
}

void winnow_team_submit(struct winnow_team *team, struct winnow_work *work)
{
    winnow_assert(work->run);
    winnow_assert(work->lane < WINNOW_N_LANES);
    pthread_mutex_lock(&team->lock);
    winnow_assert(!team->stopping);
    queue_put(&team->lane[work->lane], work);
    uint32_t n_waiting = atomic_fetch_add(&team->n_waiting, 1) + 1;
    bool wake = team->n_sleeping && n_waiting > atomic_load(&team->n_spinning);
    pthread_mutex_unlock(&team->lock);
    if (wake)
        pthread_cond_signal(&team->work_came);
}

bool winnow_team_run_one(struct winnow_team *team, uint32_t lane_max)
{
    winnow_assert(lane_max < WINNOW_N_LANES);
    if (!atomic_load_explicit(&team->n_waiting, memory_order_relaxed))
        return false;
    pthread_mutex_lock(&team->lock);
    struct winnow_work *work = take(team, lane_max);
    pthread_mutex_unlock(&team->lock);
    if (!work)
        return false;
    work->run(work, team->options.n_workers);
    finish(team, work, false);
    return true;
}

struct winnow_work *winnow_team_poll(struct winnow_team *team)
{
    if (!atomic_load(&team->any_finished))
        return NULL;
    pthread_mutex_lock(&team->lock);
    struct winnow_work *work = queue_take(&team->finished, 0);
    atomic_store(&team->any_finished, team->finished.first != NULL);
    pthread_mutex_unlock(&team->lock);
    return work;
}

void winnow_team_hot(struct winnow_team *team, bool hot)
{
    atomic_store_explicit(&team->hot, hot, memory_order_relaxed);
}

uint32_t winnow_team_size(const struct winnow_team *team)
{
    return team->options.n_workers + 1;
}

void winnow_team_set_pick(struct winnow_team *team, uint32_t (*pick)(void *arg, uint32_t n),
                          void *arg)
{
    winnow_assert(team->options.n_workers == 0);
    team->pick = pick;
    team->pick_arg = arg;
}
