/*
 * The world: core and store as winnowd runs them, without a thread, on a simulated disk and clock.
 *
 * Its actors are the bodies of the product's threads: the core's step, the store's two sides, a
 * worker of the team. Each says when it wants to run again; among those whose time has come one
 * seed chooses. When nobody wants to, the clock jumps. Equal options give equal runs: `hash` takes
 * in who ran when, and what the disk did.
 *
 * Time passes in jumps between actors, and inside the core as its kernels take it (block_ns a
 * block attended): meanwhile the store's sides go on, as other threads would.
 */
#pragma once

#include "gpu.h"

#include <base/clock.h>
#include <base/rng.h>
#include <base/team.h>
#include <core/core.h>
#include <errno.h>
#include <storage/io_sim.h>
#include <test.h>

enum sim_actor { SIM_IO, SIM_SYNC, SIM_CORE, SIM_WORKER, SIM_N_ACTORS };

struct sim_options {
    uint64_t seed;
    uint64_t host_pool_bytes, index_memory_bytes; /* 0: 16 MiB each */
    uint64_t disk_cap_bytes, data_file_bytes;     /* 0: no disk */
    uint32_t segment_tokens, dense_below;         /* 0: 128; 0 */
    uint32_t n_sessions_max, n_steps_max;         /* 0: 16 each */
    uint64_t n_tokens_max;                        /* 0: 65,536 */
    const char *kernels;                          /* NULL: the fastest */
    uint64_t gpu_memory_bytes;                    /* 0: no GPU; else one of the same kernels */
    uint64_t gpu_fails_after;                     /* calls until it is lost; 0: never */
    bool shuffled;                  /* actors and items in an order by chance; else a fixed one */
    int64_t jitter_ns;              /* an actor that is woken comes up to so much later */
    double builds_lazy;             /* chance that the worker leaves the builds for later */
    double lazy;                    /* chance that the core finds the team's items taken */
    int64_t block_ns;               /* virtual cost of a block attended by a step */
    struct winnow_sim_options disk; /* seed 0: winnow_sim_defaults of the seed above */
};

struct sim_world {
    struct sim_options options;
    struct winnow_rng rng;
    struct winnow_sim_disk *disk;
    struct winnow_team *team;
    struct winnow_core *core;
    struct winnow_store *store; /* NULL: no disk */
    struct winnow_kernels kernels;
    const struct winnow_kernels *real_kernels;
    int64_t wake_ns[SIM_N_ACTORS];
    bool working; /* the worker takes an item */
    bool builds_wait;
    uint64_t n_turns; /* not shuffled: the actors take turns */
    uint64_t hash;
};

#define SIM_HANG_NS (100 * WINNOW_NS_PER_S)

/* Whose kernels take time: the table of functions has no argument for it. */
static struct sim_world *sim_timed;

static inline uint64_t sim_mix(uint64_t hash, uint64_t value)
{
    return (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15) ^ hash >> 29;
}

static inline int64_t sim_world_now(const struct sim_world *world)
{
    return winnow_sim_disk_now(world->disk);
}

static inline int64_t sim_now_of(void *arg)
{
    return sim_world_now(arg);
}

static inline void sim_wake(struct sim_world *world, enum sim_actor actor)
{
    int64_t when_ns = sim_world_now(world);
    if (world->options.jitter_ns)
        when_ns += (int64_t)winnow_rng_below(&world->rng, (uint64_t)world->options.jitter_ns);
    if (when_ns < world->wake_ns[actor])
        world->wake_ns[actor] = when_ns;
}

/* Nobody builds until it is said again. */
static inline void sim_world_builders_wait(struct sim_world *world, bool wait)
{
    world->builds_wait = wait;
    sim_wake(world, SIM_WORKER);
}

static inline void sim_core_wake(void *arg)
{
    sim_wake(arg, SIM_CORE);
}

/* Which of n waiting items runs next; n: none now, another thread has them. */
static inline uint32_t sim_item_pick(void *arg, uint32_t n)
{
    struct sim_world *world = arg;
    if (!world->options.shuffled)
        return 0;
    if (!world->working && winnow_rng_unit(&world->rng) < world->options.lazy)
        return n;
    return (uint32_t)winnow_rng_below(&world->rng, n);
}

static inline int64_t sim_core_run(struct sim_world *world, int64_t now_ns)
{
    int64_t next_ns = winnow_core_step(world->core, now_ns);
    if (world->store) {
        sim_wake(world, SIM_IO);
        sim_wake(world, SIM_SYNC);
    }
    sim_wake(world, SIM_WORKER);
    return next_ns;
}

/* Takes an item of the lanes it is in the mood for; asks again while items wait. */
static inline int64_t sim_worker_run(struct sim_world *world)
{
    bool builds =
        !world->builds_wait && (world->options.builds_lazy <= 0 ||
                                winnow_rng_unit(&world->rng) >= world->options.builds_lazy);
    world->working = true;
    if (winnow_team_run_one(world->team, builds ? WINNOW_LANE_BUILD : WINNOW_LANE_EXACT)) {
        sim_wake(world, SIM_CORE);
        sim_wake(world, SIM_WORKER);
    } else if (!builds && !world->builds_wait) {
        sim_wake(world, SIM_WORKER);
    }
    world->working = false;
    return WINNOW_NEVER_NS;
}

static inline void sim_actor_run(struct sim_world *world, enum sim_actor actor)
{
    int64_t now_ns = sim_world_now(world);
    world->wake_ns[actor] = WINNOW_NEVER_NS;
    world->hash = sim_mix(world->hash, (uint64_t)now_ns * SIM_N_ACTORS + actor);
    int64_t next_ns = actor == SIM_IO     ? winnow_store_step(world->store, now_ns)
                      : actor == SIM_SYNC ? winnow_store_sync_step(world->store, now_ns)
                      : actor == SIM_CORE ? sim_core_run(world, now_ns)
                                          : sim_worker_run(world);
    if (next_ns < world->wake_ns[actor])
        world->wake_ns[actor] = next_ns;
}

static inline int64_t sim_next_event(const struct sim_world *world, enum sim_actor below)
{
    int64_t next_ns = winnow_sim_disk_next(world->disk);
    for (uint32_t actor = 0; actor < below; actor++)
        if (world->wake_ns[actor] < next_ns)
            next_ns = world->wake_ns[actor];
    return next_ns;
}

/* The clock goes on to when_ns; what the disk has completed by then is its owner's to take. */
static inline void sim_clock_set(struct sim_world *world, int64_t when_ns)
{
    if (when_ns > sim_world_now(world))
        winnow_sim_disk_now_set(world->disk, when_ns);
    if (world->store && winnow_sim_disk_next(world->disk) <= sim_world_now(world))
        world->wake_ns[SIM_IO] = world->wake_ns[SIM_SYNC] = sim_world_now(world);
}

/* Time that an item takes: the store's sides run meanwhile. */
static inline void sim_time_pass(int64_t n_ns)
{
    struct sim_world *world = sim_timed;
    int64_t until_ns = sim_world_now(world) + n_ns;
    if (world->store)
        sim_wake(world, SIM_IO); /* the core may have asked for reads */
    for (int64_t next_ns; (next_ns = sim_next_event(world, SIM_CORE)) <= until_ns;) {
        sim_clock_set(world, next_ns);
        for (enum sim_actor actor = SIM_IO; actor <= SIM_SYNC; actor++)
            if (world->wake_ns[actor] <= sim_world_now(world))
                sim_actor_run(world, actor);
    }
    sim_clock_set(world, until_ns);
}

static inline void sim_attend_partial(const struct winnow_model_shape *shape, const float *q,
                                      uint32_t n, const void *const *block,
                                      const uint32_t *n_tokens, float *partial, float *ln_m)
{
    sim_timed->real_kernels->attend_partial(shape, q, n, block, n_tokens, partial, ln_m);
    sim_time_pass(n * sim_timed->options.block_ns);
}

static inline void sim_team_init(struct sim_world *world)
{
    struct winnow_team_options team = {0};
    CHECK_EQ(winnow_team_create(&team, &world->team), 0);
    winnow_team_set_pick(world->team, sim_item_pick, world);
}

static inline void sim_core_init(struct sim_world *world)
{
    const struct sim_options *options = &world->options;
    char text[256] = "";
    struct winnow_core_options core = {.host_pool_bytes = options->host_pool_bytes,
                                       .index_memory_bytes = options->index_memory_bytes,
                                       .segment_tokens = options->segment_tokens,
                                       .dense_below = options->dense_below,
                                       .policy = WINNOW_POLICY_CODES,
                                       .mass = 0.9f,
                                       .n_sessions_max = options->n_sessions_max,
                                       .n_steps_max = options->n_steps_max,
                                       .n_tokens_max = options->n_tokens_max,
                                       .kernels = &world->kernels,
                                       .team = world->team,
                                       .notify = sim_core_wake,
                                       .notify_arg = world,
                                       .now = sim_now_of,
                                       .now_arg = world,
                                       .seed = options->seed};
    world->real_kernels = winnow_kernels_find(options->kernels);
    CHECK(world->real_kernels);
    world->kernels = *world->real_kernels;
    if (options->block_ns) {
        sim_timed = world;
        world->kernels.attend_partial = sim_attend_partial;
    }
    if (options->gpu_memory_bytes) {
        sim_gpu = (struct sim_gpu){.kernels = world->real_kernels,
                                   .rng = options->shuffled ? &world->rng : NULL,
                                   .fails_after = options->gpu_fails_after};
        core.gpu = &sim_gpu_api;
        core.n_gpu_sessions_max = 4;
        core.gpu_memory_bytes = options->gpu_memory_bytes;
    }
    if (winnow_core_create(&core, &world->core, text) < 0)
        test_fail(__FILE__, __LINE__, text);
}

static inline void sim_store_init(struct sim_world *world)
{
    char text[256] = "";
    struct winnow_store_options store = {.dir = "sim",
                                         .disk_cap_bytes = world->options.disk_cap_bytes,
                                         .data_file_bytes = world->options.data_file_bytes,
                                         .method = &winnow_io_sim,
                                         .method_arg = world->disk,
                                         .n_requests_max = WINNOW_STORE_REQUESTS,
                                         .n_segments_max = 1024,
                                         .notify = sim_core_wake,
                                         .notify_arg = world,
                                         .seed = world->options.seed};
    winnow_core_arena(world->core, &store.arena, &store.arena_bytes);
    int rc = -EIO; /* of a disk that fails by chance: an operator tries again */
    for (int i = 0; rc < 0 && i < 100; i++) {
        rc = winnow_store_open(&store, &world->store, text);
        if (rc < 0)
            winnow_sim_disk_abandon(world->disk);
    }
    if (rc < 0)
        test_fail(__FILE__, __LINE__, text);
    winnow_core_set_store(world->core, world->store);
}

static inline void sim_options_default(struct sim_options *options)
{
    if (!options->host_pool_bytes)
        options->host_pool_bytes = 16 << 20;
    if (!options->index_memory_bytes)
        options->index_memory_bytes = 16 << 20;
    if (!options->segment_tokens)
        options->segment_tokens = 128;
    if (!options->n_sessions_max)
        options->n_sessions_max = 16;
    if (!options->n_steps_max)
        options->n_steps_max = 16;
    if (!options->n_tokens_max)
        options->n_tokens_max = 1 << 16;
}

static inline void sim_world_init(struct sim_world *world, const struct sim_options *options)
{
    *world = (struct sim_world){.options = *options};
    sim_options_default(&world->options);
    winnow_rng_init(&world->rng, options->seed);
    for (uint32_t actor = 0; actor < SIM_N_ACTORS; actor++)
        world->wake_ns[actor] = WINNOW_NEVER_NS;
    struct winnow_sim_options disk =
        options->disk.seed ? options->disk : winnow_sim_defaults(options->seed + 1);
    if (options->data_file_bytes)
        disk.file_bytes_max = options->data_file_bytes;
    CHECK_EQ(winnow_sim_disk_create(&disk, &world->disk), 0);
    sim_team_init(world);
    sim_core_init(world);
    if (options->disk_cap_bytes)
        sim_store_init(world);
    sim_wake(world, SIM_CORE);
}

static inline bool sim_world_step(struct sim_world *world, int64_t until_ns)
{
    enum sim_actor ready[SIM_N_ACTORS];
    uint32_t n_ready = 0;
    sim_clock_set(world, sim_world_now(world));
    for (enum sim_actor actor = 0; actor < SIM_N_ACTORS; actor++)
        if (world->wake_ns[actor] <= sim_world_now(world))
            ready[n_ready++] = actor;
    if (n_ready) {
        uint64_t chosen = world->options.shuffled ? winnow_rng_below(&world->rng, n_ready)
                                                  : world->n_turns++ % n_ready;
        sim_actor_run(world, ready[chosen]);
        return true;
    }
    int64_t next_ns = sim_next_event(world, SIM_N_ACTORS);
    if (next_ns <= until_ns && next_ns != WINNOW_NEVER_NS) {
        sim_clock_set(world, next_ns);
        return true;
    }
    if (until_ns != WINNOW_NEVER_NS)
        sim_clock_set(world, until_ns);
    return false;
}

static inline void sim_world_settle(struct sim_world *world)
{
    int64_t give_up_ns = sim_world_now(world) + SIM_HANG_NS;
    sim_wake(world, SIM_CORE);
    while (sim_world_step(world, WINNOW_NEVER_NS))
        CHECK(sim_world_now(world) < give_up_ns);
}

static inline void sim_world_finish(struct sim_world *world)
{
    winnow_sim_disk_release(world->disk);
    sim_world_settle(world);
    CHECK_EQ(winnow_store_close(world->store), 0);
    winnow_core_destroy(world->core);
    winnow_team_destroy(world->team);
    winnow_sim_disk_destroy(world->disk);
    sim_timed = NULL;
}

static inline void sim_request_done(struct winnow_request *request)
{
    *(bool *)request->user = true;
}

static inline int sim_world_submit(struct sim_world *world, struct winnow_request *request)
{
    request->owner = request->owner ? request->owner : 1;
    return winnow_core_submit(world->core, request);
}

static inline void sim_world_cancel(struct sim_world *world, struct winnow_request *request)
{
    winnow_core_cancel(world->core, request);
}

static inline int sim_world_run(struct sim_world *world, struct winnow_request *request)
{
    bool done = false;
    int64_t give_up_ns = sim_world_now(world) + SIM_HANG_NS;
    request->user = &done;
    request->done = sim_request_done;
    request->deadline_ns = request->deadline_ns ? request->deadline_ns : WINNOW_NEVER_NS;
    CHECK_EQ(sim_world_submit(world, request), 0);
    while (!done)
        if (!sim_world_step(world, give_up_ns))
            test_fail(__FILE__, __LINE__, "a request does not end");
    return request->status;
}
