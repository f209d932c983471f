// The step loop. Nothing here waits: requests, finished items and finished reads are messages, each
// moves one op's state machine as far as it goes, and what cannot go on is tried again when memory
// was freed. Between messages the owner runs work items itself: two wake-ups fewer a layer.
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <core/session.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

enum {
    SPIN_ROUNDS =
        3000, /* of a pause each, about 50 us: less than a wake-up, more than an item's end */
};

static const int64_t GROW_WAIT_NS = 2 * WINNOW_NS_PER_MS; /* a data file is being allocated */

static bool items_poll(struct winnow_core *core);

int winnow_core_create(const struct winnow_core_options *options, struct winnow_core **ret_core,
                       char text[256])
{
    winnow_assert(options->kernels);
    winnow_assert(options->team);
    uint32_t S = options->segment_tokens;
    if (S % 128 || S > 8192) {
        snprintf(text, 256, "segment_tokens %u is not a multiple of 128 up to 8192. hint: 1024", S);
        return -EINVAL;
    }
    if (options->host_pool_bytes < 16 << 20) {
        snprintf(text, 256, "host_pool %.1f MiB is below 16 MiB. hint: host_pool = 32MiB",
                 (double)options->host_pool_bytes / (1 << 20));
        return -EINVAL;
    }
    snprintf(text, 256, "no memory for host_pool and index_memory");
    struct winnow_core *core = winnow_alloc(sizeof *core);
    if (!core)
        return -ENOMEM;
    core->options = *options;
    if (!S)
        core->options.segment_tokens = options->host_pool_bytes < 128 << 20 ? 512 : 1024;
    winnow_tiers_init(&core->tiers);
    winnow_rng_init(&core->rng, options->seed);
    core->wait_run_last = &core->wait_run_first;
    core->n_workers = winnow_team_size(options->team);
    winnow_assert(core->n_workers > 0);
    uint64_t n_runs = options->host_pool_bytes / (8 << 20);
    core->n_runs_max = n_runs < options->n_steps_max ? (uint32_t)n_runs : options->n_steps_max;
    core->run = winnow_alloc_array(core->n_runs_max, sizeof *core->run);
    core->active = winnow_alloc_array(options->n_sessions_max + 1, sizeof *core->active);
    if (!core->run || !core->active ||
        winnow_arena_create(options->host_pool_bytes, winnow_segment_evicted, &core->tiers.arena) <
            0 ||
        winnow_index_memory_create(options->index_memory_bytes, &core->tiers.index) < 0 ||
        winnow_requests_create(&core->requests) < 0 ||
        winnow_pool_create(options->n_sessions_max, sizeof(struct winnow_session),
                           &core->sessions) < 0 ||
        winnow_pool_create(WINNOW_N_ITEMS, sizeof(struct winnow_item), &core->items) < 0 ||
        winnow_pool_create(WINNOW_N_LOADS, sizeof(struct winnow_load), &core->loads) < 0) {
        winnow_core_destroy(core);
        return -ENOMEM;
    }
    core->spill_of_piece = winnow_alloc_array(winnow_arena_staging_pieces(core->tiers.arena),
                                              sizeof(struct winnow_segment_layer *));
    if (!core->spill_of_piece) {
        winnow_core_destroy(core);
        return -ENOMEM;
    }
    int rc = options->gpu ? winnow_device_create(core, &core->tiers.device, text) : 0;
    if (rc < 0) {
        winnow_core_destroy(core);
        return rc;
    }
    text[0] = 0;
    *ret_core = core;
    return 0;
}

void winnow_core_destroy(struct winnow_core *core)
{
    if (!core)
        return;
    core->tiers.store = NULL; /* closed: what it stored is gone */
    winnow_builds_poll(core, true);
    while (core->n_items_out > 0) /* they read what is freed below */
        if (!winnow_team_run_one(core->options.team, WINNOW_LANE_BUILD) && !items_poll(core))
            sched_yield();
    for (uint32_t i = 0; core->sessions && i < winnow_pool_size(core->sessions); i++) {
        struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (session)
            winnow_session_destroy(core, session);
    }
    winnow_assert(core->n_promises == 0);
    winnow_device_destroy(core->tiers.device);
    for (uint32_t i = 0; core->run && core->tiers.index && i < core->n_runs_max; i++)
        winnow_index_memory_give(core->tiers.index, core->run[i].memory, core->run[i].memory_bytes);
    for (uint32_t i = 0; i < WINNOW_N_PASSES; i++)
        winnow_alloc_free(core->pass[i].memory);
    winnow_core_scratch_free(core);
    winnow_alloc_free(core->run);
    winnow_alloc_free(core->active);
    winnow_alloc_free(core->spill_of_piece);
    winnow_ring_destroy(core->requests);
    winnow_pool_destroy(core->sessions);
    winnow_pool_destroy(core->items);
    winnow_pool_destroy(core->loads);
    winnow_arena_destroy(core->tiers.arena);
    winnow_index_memory_destroy(core->tiers.index);
    winnow_alloc_free(core);
}

void winnow_core_arena(const struct winnow_core *core, void **ret_arena, size_t *ret_bytes)
{
    *ret_arena = winnow_arena_base(core->tiers.arena, ret_bytes);
}

bool winnow_core_gpu_plan(const struct winnow_core *core, const struct winnow_model_shape *shape,
                          char text[256])
{
    return core->tiers.device && winnow_device_plan(core, shape, text);
}

const char *winnow_core_gpu_shape(const struct winnow_core *core, uint64_t *ret_n_shapes)
{
    const struct winnow_device *device = core->tiers.device;
    *ret_n_shapes = device ? device->n_shapes : 0;
    return *ret_n_shapes ? device->shape_text : NULL;
}

bool winnow_core_has_gpu(const struct winnow_core *core)
{
    return core->tiers.device;
}

bool winnow_core_gpu_lost(const struct winnow_core *core)
{
    return winnow_device_lost(core->tiers.device);
}

void winnow_core_set_store(struct winnow_core *core, struct winnow_store *store)
{
    core->tiers.store = store;
}

// --- items --------------------------------------------------------------------------------------

struct winnow_item *winnow_item_take(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_item *item = winnow_pool_take(core->items);
    if (!item)
        return NULL;
    winnow_assert(core->scratch);
    *item = (struct winnow_item){.kernels = core->options.kernels,
                                 .scratch = core->scratch,
                                 .session = session,
                                 .layer = session->op.layer};
    return item;
}

void winnow_item_run_here(struct winnow_core *core, struct winnow_item *item,
                          void (*run)(struct winnow_work *, uint32_t),
                          void (*done)(struct winnow_core *, struct winnow_item *))
{
    run(&item->work, core->n_workers - 1);
    done(core, item);
    winnow_pool_give(core->items, item);
}

void winnow_item_submit(struct winnow_core *core, struct winnow_item *item, uint32_t lane,
                        void (*run)(struct winnow_work *, uint32_t),
                        void (*done)(struct winnow_core *, struct winnow_item *))
{
    winnow_assert(lane < WINNOW_N_LANES);
    winnow_assert(item->session);
    winnow_assert(core->n_items_out < WINNOW_N_ITEMS);
    item->work.run = run;
    item->work.lane = lane;
    item->done = done;
    core->n_items_out++;
    winnow_team_submit(core->options.team, &item->work);
}

void winnow_item_done(struct winnow_core *core, struct winnow_item *item)
{
    struct winnow_op *op = &item->session->op;
    (void)core;
    winnow_assert(op->n_items > 0);
    winnow_assert(item->result <= 0);
    op->n_items--;
    if (item->result == -EDOM)
        winnow_op_fail(op, -EDOM, "NaN or Inf: layer %u. hint: the model's dtype", item->layer);
    else if (item->result < 0)
        winnow_op_fail(op, item->result, "layer %u: error %d", item->layer, -item->result);
}

static bool items_poll(struct winnow_core *core)
{
    bool any = false;
    for (struct winnow_work *work; (work = winnow_team_poll(core->options.team)); any = true) {
        struct winnow_item *item = (struct winnow_item *)work;
        winnow_assert(core->n_items_out > 0);
        core->n_items_out--;
        item->done(core, item);
        winnow_pool_give(core->items, item);
    }
    return any;
}

static bool store_poll(struct winnow_core *core)
{
    struct winnow_store_done done[64];
    bool any = false;
    if (!core->tiers.store)
        return false;
    for (uint32_t n = 64; n == 64;) {
        n = winnow_store_poll(core->tiers.store, done, 64);
        winnow_assert(n <= 64);
        for (uint32_t i = 0; i < n; i++) {
            if (done[i].tag >> 62)
                winnow_spill_done(core, &done[i]);
            else
                winnow_load_done(core, &done[i]);
        }
        any |= n > 0;
    }
    return any;
}

/* Somebody waits for a build, so that it is worth the owner's time. */
static bool build_awaited(const struct winnow_core *core)
{
    for (uint32_t i = 0; i < core->n_active; i++) {
        uint32_t state = core->active[i]->op.state;
        if (state == WINNOW_OP_BUILD || state == WINNOW_OP_SEAL || state == WINNOW_OP_BEGIN)
            return true;
    }
    return core->n_workers == 1;
}

static bool item_run(struct winnow_core *core)
{
    if (winnow_team_run_one(core->options.team, WINNOW_LANE_EXACT))
        return true;
    return build_awaited(core) && winnow_team_run_one(core->options.team, WINNOW_LANE_BUILD);
}

/* Short of a wake-up's price it pays to wait here for the last items of a decode step. */
static bool items_spin(struct winnow_core *core)
{
    int n_rounds = core->n_workers > 1 ? SPIN_ROUNDS : 1; /* alone nobody else ends one */
    for (int i = 0; core->n_decoding && core->n_items_out && i < n_rounds; i++) {
        if (winnow_team_run_one(core->options.team, WINNOW_LANE_DECODE) || items_poll(core))
            return true;
        __builtin_ia32_pause();
    }
    return false;
}

/* Workers spin between the phases of a step, but not while it waits for the disk: on a small
 * machine the I/O thread needs their core. */
static void team_warm(const struct winnow_core *core)
{
    winnow_team_hot(core->options.team, core->n_active > 0 && winnow_pool_used(core->loads) == 0);
}

int64_t winnow_core_step(struct winnow_core *core, int64_t now_ns)
{
    int64_t next_ns;
    team_warm(core);
    for (core->now_ns = now_ns;; core->now_ns = winnow_core_clock(core)) {
        core->progress = winnow_requests_poll(core);
        core->progress |= items_poll(core);
        core->progress |= store_poll(core);
        core->progress |= winnow_device_poll(core);
        winnow_spill_pump(core, false);
        next_ns = winnow_ops_advance(core);
        if (!core->progress && !items_spin(core) && !winnow_device_spin(core))
            break;
    }
    if (item_run(core) || winnow_device_busy(core->tiers.device))
        return now_ns; /* its end is a message; and time has passed */
    team_warm(core);
    if (core->spill_grows && next_ns > now_ns + GROW_WAIT_NS)
        next_ns = now_ns + GROW_WAIT_NS;
    return next_ns;
}
