// Sessions: what opens, forks and ends them, what each of a shape needs, and what Stats say.
#include <base/alloc.h>
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

double winnow_core_index_bytes_per_token(const struct winnow_model_shape *shape)
{
    uint32_t n_blocks = 1024 / WINNOW_BLOCK_TOKENS;
    size_t layer_bytes = winnow_segment_piece_bytes(shape, n_blocks, false) +
                         shape->n_kv_heads * n_blocks * sizeof(uint32_t);
    return (double)layer_bytes * shape->n_layers / 1024;
}

uint64_t winnow_core_session_need_bytes(const struct winnow_core *core,
                                        const struct winnow_model_shape *shape, char text[256])
{
    uint64_t block_bytes = winnow_block_bytes(shape), n_heads = shape->n_kv_heads;
    uint64_t n_tail = shape->n_layers * n_heads *
                      ((64 + core->options.segment_tokens + WINNOW_SEAL_TOKENS) / 16 + 1);
    uint64_t n_window = n_heads * (WINNOW_WINDOW_POSITIONS / WINNOW_BLOCK_TOKENS + 1);
    uint64_t n_steps = (uint64_t)WINNOW_STEP_SLOTS * core->n_runs_max;
    uint64_t n_of_grain = WINNOW_GRAIN_BYTES / block_bytes;
    uint64_t n_grains = (n_tail + n_window + n_steps + n_of_grain - 1) / n_of_grain;
    struct winnow_arena_use use;
    winnow_arena_use(core->tiers.arena, &use);
    uint64_t need_bytes = n_grains * WINNOW_GRAIN_BYTES + use.staging_bytes;
    double mib = (double)block_bytes / (1 << 20);
    snprintf(text, 256, "tails %.1f + window %.1f + steps %.1f + staging %.1f = %.1f MiB",
             (double)n_tail * mib, (double)n_window * mib, (double)n_steps * mib,
             (double)use.staging_bytes / (1 << 20), (double)need_bytes / (1 << 20));
    return need_bytes;
}

uint64_t winnow_core_fixed_bytes(const struct winnow_core *core)
{
    uint64_t n_slots = core->options.host_pool_bytes / WINNOW_PAGE_BYTES;
    return sizeof *core + n_slots * 40 +
           winnow_index_memory_cap(core->tiers.index) / WINNOW_PAGE_BYTES / 8 +
           core->n_runs_max * sizeof(struct winnow_run) +
           winnow_pool_size(core->sessions) * sizeof(struct winnow_session) +
           WINNOW_N_ITEMS * sizeof(struct winnow_item) +
           WINNOW_N_LOADS * sizeof(struct winnow_load);
}

static uint64_t pages_bytes(size_t n_bytes)
{
    return (n_bytes + WINNOW_PAGE_BYTES - 1) / WINNOW_PAGE_BYTES * WINNOW_PAGE_BYTES;
}

/* Index of all the tokens that a session may come to hold, when it says how many; else 0. */
static uint64_t promise_bytes(const struct winnow_core *core,
                              const struct winnow_model_shape *shape,
                              const struct winnow_session_options *options)
{
    uint32_t S = core->options.segment_tokens, n_blocks = S / WINNOW_BLOCK_TOKENS;
    bool with_var = options->policy == WINNOW_POLICY_MOMENT;
    uint64_t layer_bytes = pages_bytes(winnow_segment_piece_bytes(shape, n_blocks, with_var));
    return options->n_tokens_max / S *
           (shape->n_layers * layer_bytes +
            pages_bytes(winnow_segment_header_bytes(shape, n_blocks)));
}

/* What the session has not yet taken of what it was promised. */
static uint64_t promise_left(const struct winnow_session *session)
{
    const struct winnow_context *context = session->context;
    uint64_t taken_bytes = 0;
    for (uint32_t k = 0; k < context->n_segments_max && context->segment[k]; k++) {
        const struct winnow_segment *segment = context->segment[k];
        taken_bytes += pages_bytes(segment->header_bytes);
        for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
            taken_bytes += segment->layer[layer].piece ? pages_bytes(segment->piece_bytes) : 0;
    }
    return session->promised_bytes > taken_bytes ? session->promised_bytes - taken_bytes : 0;
}

uint64_t winnow_index_left(const struct winnow_core *core, const struct winnow_session *session)
{
    winnow_assert(winnow_index_memory_used(core->tiers.index) <=
                  winnow_index_memory_cap(core->tiers.index));
    uint64_t left_bytes =
        winnow_index_memory_cap(core->tiers.index) - winnow_index_memory_used(core->tiers.index);
    for (uint32_t i = 0; core->n_promises && i < winnow_pool_size(core->sessions); i++) {
        const struct winnow_session *other = winnow_pool_at(core->sessions, i);
        if (!other || other == session || !other->promised_bytes)
            continue;
        uint64_t promised_bytes = promise_left(other);
        left_bytes = left_bytes > promised_bytes ? left_bytes - promised_bytes : 0;
    }
    return left_bytes;
}

static int options_check(struct winnow_core *core, struct winnow_request *request)
{
    struct winnow_session_options *options = &request->open.options;
    char *text = request->text;
    if (!options->n_sinks)
        options->n_sinks = 16;
    if (!options->policy)
        options->policy = core->options.policy;
    if (!(options->mass > 0))
        options->mass = core->options.mass;
    if (options->n_sinks % WINNOW_BLOCK_TOKENS || options->n_sinks > 64)
        snprintf(text, 256, "n_sinks %u is not 16, 32, 48 or 64", options->n_sinks);
    else if (options->policy > WINNOW_POLICY_EXACT)
        snprintf(text, 256, "policy %u is none of codes, tactic, moment, exact", options->policy);
    else if (options->mass > 1)
        snprintf(text, 256, "mass %g is not in (0, 1]", (double)options->mass);
    else if (options->n_tokens_max > core->options.n_tokens_max)
        snprintf(text, 256, "n_tokens_max %llu exceeds %llu",
                 (unsigned long long)options->n_tokens_max,
                 (unsigned long long)core->options.n_tokens_max);
    else
        return options->admit_nonfinite ? -ENOTSUP : 0;
    return -EINVAL;
}

static int shape_check(struct winnow_core *core, struct winnow_request *request)
{
    struct winnow_model_shape *shape = &request->open.shape;
    char sum[256];
    if (!shape->block_layout)
        shape->block_layout = winnow_device_wants(core, shape, &request->open.options)
                                  ? WINNOW_BLOCK_FRAGMENTS
                                  : WINNOW_BLOCK_LAYOUT;
    int rc = winnow_model_shape_check(shape, request->text);
    if (rc < 0)
        return rc;
    if (shape->n_layers > WINNOW_LAYERS_MAX || shape->n_kv_heads > WINNOW_KV_HEADS_MAX) {
        snprintf(request->text, sizeof request->text,
                 "n_layers %u, n_kv_heads %u: at most %d and %d are served", shape->n_layers,
                 shape->n_kv_heads, WINNOW_LAYERS_MAX, WINNOW_KV_HEADS_MAX);
        return -EINVAL;
    }
    uint64_t need_bytes = winnow_core_session_need_bytes(core, shape, sum);
    struct winnow_arena_use use;
    winnow_arena_use(core->tiers.arena, &use);
    if (need_bytes > use.pool_bytes) {
        snprintf(
            request->text, sizeof request->text,
            "host_pool %llu MiB is below the %.130s this model needs. hint: host_pool = %lluMiB",
            (unsigned long long)(core->options.host_pool_bytes >> 20), sum,
            (unsigned long long)(need_bytes / (1 << 20) + 2));
        return -EDQUOT;
    }
    uint64_t n_tokens = request->open.options.n_tokens_max;
    uint64_t index_bytes = promise_bytes(core, shape, &request->open.options);
    uint64_t left_bytes = winnow_index_left(core, NULL);
    if (index_bytes > left_bytes) {
        snprintf(request->text, sizeof request->text,
                 "index of %llu tokens needs %.1f MiB, index_memory has %.1f MiB left. hint: a "
                 "larger index_memory",
                 (unsigned long long)n_tokens, (double)index_bytes / (1 << 20),
                 (double)left_bytes / (1 << 20));
        return -EDQUOT;
    }
    return 0;
}

static uint64_t session_id_make(struct winnow_core *core, const struct winnow_session *session)
{
    uint64_t slot = winnow_pool_handle(core->sessions, session) & 0xfffff, id;
    do
        id = (winnow_rng_next(&core->rng) & ~UINT64_C(0xfffff)) | slot;
    while (id >> 20 == 0);
    return id;
}

/* An empty session; NULL: no slot or no memory. */
static struct winnow_session *session_create(struct winnow_core *core, uint64_t owner,
                                             const struct winnow_model_shape *shape,
                                             const struct winnow_session_options *options)
{
    winnow_assert(options->n_sinks > 0);
    winnow_assert(options->n_sinks % WINNOW_BLOCK_TOKENS == 0);
    winnow_assert(shape->n_layers <= WINNOW_LAYERS_MAX);
    winnow_assert(shape->n_kv_heads <= WINNOW_KV_HEADS_MAX);
    struct winnow_session *session = winnow_pool_take(core->sessions);
    if (!session)
        return NULL;
    *session = (struct winnow_session){.owner = owner, .options = *options, .epoch = 1};
    session->queue_last = &session->queue_first;
    session->id = session_id_make(core, session);
    uint64_t n_tokens_max =
        options->n_tokens_max ? options->n_tokens_max : core->options.n_tokens_max;
    session->context = winnow_context_create(
        &core->tiers, shape, core->options.segment_tokens, options->n_sinks, n_tokens_max,
        WINNOW_WINDOW_TOKENS_MAX, options->policy == WINNOW_POLICY_MOMENT);
    session->layer = winnow_alloc_array(shape->n_layers, sizeof *session->layer);
    session->heavy =
        winnow_alloc_array((size_t)shape->n_layers * shape->n_kv_heads, sizeof *session->heavy);
    if (!session->context || !session->layer || !session->heavy ||
        winnow_core_scratch_grow(core, shape, core->options.segment_tokens) < 0) {
        winnow_session_destroy(core, session);
        return NULL;
    }
    winnow_device_join(core, session);
    return session;
}

static void stats_add(struct winnow_core_stats *sum, const struct winnow_core_stats *one)
{
    for (int i = 0; i < 5; i++)
        sum->n_steps[i] += one->n_steps[i];
    sum->n_device_steps += one->n_device_steps;
    sum->n_device_windows += one->n_device_windows;
    sum->n_second_rounds += one->n_second_rounds;
    sum->n_exact_windows += one->n_exact_windows;
    sum->n_blocks_total += one->n_blocks_total;
    sum->n_blocks_device += one->n_blocks_device;
    sum->n_blocks_host += one->n_blocks_host;
    sum->n_blocks_disk += one->n_blocks_disk;
    sum->read_bytes_attend += one->read_bytes_attend;
    sum->read_bytes_exact += one->read_bytes_exact;
    sum->read_bytes_readahead += one->read_bytes_readahead;
    sum->read_bytes_truncate += one->read_bytes_truncate;
    sum->mass_sum_micro += one->mass_sum_micro;
    sum->n_mass += one->n_mass;
}

/* Slots for every step that may run, of the largest blocks that are open. */
static void keep_update(struct winnow_core *core)
{
    uint64_t block_bytes = 0;
    for (uint32_t i = 0; i < winnow_pool_size(core->sessions); i++) {
        const struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (session && winnow_block_bytes(&session->context->shape) > block_bytes)
            block_bytes = winnow_block_bytes(&session->context->shape);
    }
    core->keep_bytes = WINNOW_STEP_SLOTS * block_bytes * core->n_runs_max;
}

void winnow_session_destroy(struct winnow_core *core, struct winnow_session *session)
{
    winnow_assert(session->n_builds == 0);
    winnow_assert(session->promised_bytes == 0 || core->n_promises > 0);
    if (session->context && session->layer)
        for (uint32_t layer = 0; layer < session->context->shape.n_layers; layer++)
            winnow_seal_forget(session, layer);
    stats_add(&core->stats, &session->stats);
    core->n_promises -= session->promised_bytes > 0;
    winnow_context_destroy(session->context);
    winnow_device_leave(core, session);
    winnow_alloc_free(session->layer);
    winnow_alloc_free(session->heavy);
    winnow_pool_give(core->sessions, session);
    keep_update(core);
    core->progress = true;
}

void winnow_open(struct winnow_core *core, struct winnow_request *request)
{
    request->status = options_check(core, request);
    if (request->status == -ENOTSUP)
        snprintf(request->text, sizeof request->text,
                 "admit_nonfinite: an index of NaN finds nothing. hint: leave it out");
    if (request->status == 0)
        request->status = shape_check(core, request);
    if (request->status < 0)
        return;
    struct winnow_session *session =
        session_create(core, request->owner, &request->open.shape, &request->open.options);
    if (!session) {
        request->status = -EDQUOT;
        snprintf(request->text, sizeof request->text,
                 "%u sessions are open, or memory is out. hint: sessions_max",
                 winnow_pool_used(core->sessions));
        return;
    }
    memcpy(session->label, request->open.label, sizeof session->label);
    session->promised_bytes = promise_bytes(core, &request->open.shape, &request->open.options);
    core->n_promises += session->promised_bytes > 0;
    keep_update(core);
    request->open.ret_session_id = session->id;
    request->open.ret_segment_tokens = core->options.segment_tokens;
    request->open.ret_n_sinks = request->open.options.n_sinks;
    request->epoch = session->epoch;
    request->n_held = 0;
}

/* Layers differ: in tokens, or in a segment that one has in force and another has not. */
static void unlevel_fail(struct winnow_session *session)
{
    const struct winnow_context *context = session->context;
    uint64_t held = winnow_context_held(context), end = UINT64_MAX;
    for (uint32_t layer = 0; layer < context->shape.n_layers; layer++)
        if (winnow_context_span_end(context, layer) < end)
            end = winnow_context_span_end(context, layer);
    winnow_op_fail(&session->op, -EINVAL,
                   "layers differ in tokens or segments. hint: truncate to %llu evens them",
                   (unsigned long long)(held < end ? held : end - 1));
}

static void fork_fill(const struct winnow_session *session, struct winnow_session *fork)
{
    const struct winnow_model_shape *shape = &session->context->shape;
    size_t n_heads = (size_t)shape->n_layers * shape->n_kv_heads;
    winnow_context_fork(session->context, fork->context, session->op.slot);
    memcpy(fork->heavy, session->heavy, n_heads * sizeof *fork->heavy);
    fork->n_heavy = session->n_heavy;
    for (uint32_t layer = 0; layer < shape->n_layers; layer++)
        fork->layer[layer].sealed_to = session->layer[layer].sealed_to;
    memcpy(fork->label, session->label, sizeof fork->label);
}

bool winnow_fork(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (!winnow_context_is_level(session->context)) {
        unlevel_fail(session);
        return false;
    }
    uint32_t n = winnow_context_fork_copies(session->context);
    if (!winnow_op_slots_take(core, session, n)) {
        winnow_op_wait_room(core, op, "the fork's last blocks");
        return false;
    }
    struct winnow_session *fork =
        session_create(core, session->owner, &session->context->shape, &session->options);
    if (!fork) {
        winnow_op_fail(op, -EDQUOT, "%u sessions are open, or memory is out. hint: sessions_max",
                       winnow_pool_used(core->sessions));
        return false;
    }
    fork_fill(session, fork);
    op->n_slots = 0; /* the fork's */
    op->request->fork.ret_session_id = fork->id;
    op->request->epoch = fork->epoch;
    return true;
}

// --- stats --------------------------------------------------------------------------------------

static void session_add(const struct winnow_session *session, struct winnow_core_stats *stats)
{
    const struct winnow_context *context = session->context;
    const struct winnow_model_shape *shape = &context->shape;
    uint64_t token_bytes = winnow_block_bytes(shape) / WINNOW_BLOCK_TOKENS * shape->n_kv_heads;
    stats->n_sessions++;
    stats->n_tokens_held += winnow_context_held(context);
    stats->n_tokens_sealed += winnow_context_sealed(context);
    for (uint32_t layer = 0; layer < shape->n_layers; layer++) {
        const struct winnow_context_layer *state = &context->layer[layer];
        winnow_assert(state->held >= (uint64_t)state->n_segments * context->segment_tokens);
        stats->kv_bytes += state->held * token_bytes;
        stats->kv_host_bytes +=
            (state->held - (uint64_t)state->n_segments * context->segment_tokens) * token_bytes;
        for (uint32_t k = 0; k < state->n_segments; k++) {
            const struct winnow_segment_layer *sealed = &context->segment[k]->layer[layer];
            winnow_assert(sealed->in_force);
            winnow_assert(sealed->n_places <= shape->n_kv_heads * context->segment[k]->n_blocks);
            stats->kv_host_bytes += (uint64_t)sealed->n_places * context->segment[k]->block_bytes;
            if (sealed->on_disk)
                stats->kv_disk_bytes += context->segment_tokens * token_bytes;
        }
    }
    stats_add(stats, &session->stats);
}

void winnow_stats_fill(struct winnow_core *core, struct winnow_request *request)
{
    struct winnow_core_stats *stats = &request->stats;
    struct winnow_arena_use use;
    uint64_t session_id = request->session_id;
    *stats = session_id ? (struct winnow_core_stats){0} : core->stats;
    for (uint32_t i = 0; i < winnow_pool_size(core->sessions); i++) {
        const struct winnow_session *session = winnow_pool_at(core->sessions, i);
        if (session && !session->closing && (!session_id || session->id == session_id) &&
            (!request->owner || session->owner == request->owner))
            session_add(session, stats);
    }
    if (!session_id) { /* it waits for the device: not for every row of a list */
        stats->n_device_launches = core->stats.n_device_launches;
        winnow_device_counters(core->tiers.device, &stats->device);
    }
    winnow_arena_use(core->tiers.arena, &use);
    stats->pool_tail_bytes = use.held_bytes;
    stats->pool_cache_bytes = use.cache_bytes;
    stats->pool_staging_bytes = use.staging_bytes;
    stats->pool_free_bytes = use.free_bytes;
    stats->pool_cap_bytes = use.pool_bytes;
    stats->index_bytes = winnow_index_memory_used(core->tiers.index);
    stats->index_cap_bytes = winnow_index_memory_cap(core->tiers.index);
}
