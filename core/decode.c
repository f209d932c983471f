// One decode step of one layer, top to bottom:
//
//   BEGIN   checks; q, k, v to fp32
//   BUILD   a span that is due comes into force: seal.c          (waits for its build)
//           append: the token joins the tail                     (waits for slots)
//   SCORE   resident blocks attended, blocks scored, selected    an item a KV head
//   PROBE   policy tactic: exact masses of samples, then SELECT
//   READ    groups of eight: plan.c fills, items attend, partials join in list order
//   VERIFY  certificate; short of P: READ_MORE, CERTIFY          an item a KV head
//   STRICT  still short in a strict session: the layer exactly
//
// The order in which partials join is fixed: resident, selected, second round, compensation. What is
// resident, which thread runs what and when reads come back cannot change a bit.
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static float *head_partial(const struct winnow_session *session, float *partials, uint32_t head)
{
    return partials + head * winnow_partial_floats(&session->context->shape);
}

static void partial_clear(const struct winnow_model_shape *shape, float *partial)
{
    uint32_t stride = shape->v_width + 2;
    memset(partial, 0, winnow_partial_floats(shape) * sizeof(float));
    for (uint32_t g = 0; g < winnow_group_heads(shape); g++)
        partial[g * stride] = -INFINITY;
}

// --- BEGIN --------------------------------------------------------------------------------------

static bool is_repeat(const struct winnow_session *session, const struct winnow_request *request)
{
    uint32_t layer = request->attend.layer;
    return request->attend.seq != 0 && session->layer[layer].last_seq == request->attend.seq &&
           request->attend.position + 1 == session->context->layer[layer].held;
}

static void begin_check(struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_request *request = op->request;
    const struct winnow_context *context = session->context;
    winnow_assert(request->kind == WINNOW_REQUEST_ATTEND);
    if (request->epoch != session->epoch) {
        winnow_op_fail(op, -ESTALE,
                       "epoch %u is old, the session's is %u. hint: a truncate raised it",
                       request->epoch, session->epoch);
        return;
    }
    if (request->attend.layer >= context->shape.n_layers) {
        winnow_op_fail(op, -EINVAL, "layer %u of a model with %u", request->attend.layer,
                       context->shape.n_layers);
        return;
    }
    op->layer = request->attend.layer;
    uint64_t held = context->layer[op->layer].held;
    op->appended = is_repeat(session, request) || !(request->attend.flags & WINNOW_ITEM_HAS_KV);
    if (!is_repeat(session, request) && request->attend.position != held)
        winnow_op_fail(op, -EINVAL,
                       "layer %u holds %llu tokens, the item says %llu. hint: resend from %llu",
                       op->layer, (unsigned long long)held,
                       (unsigned long long)request->attend.position, (unsigned long long)held);
    if (!op->appended && held >= context->n_tokens_max)
        winnow_op_fail(op, -EDQUOT,
                       "the context holds %llu tokens, all it may. hint: a larger context limit",
                       (unsigned long long)held);
    op->mass = request->attend.mass > 0 ? request->attend.mass : session->options.mass;
    op->policy = session->options.policy;
    op->n_blocks_max =
        request->attend.n_blocks_max ? request->attend.n_blocks_max : session->options.n_blocks_max;
    if (!(op->mass > 0) || op->mass > 1)
        winnow_op_fail(op, -EINVAL, "mass %g is not in (0, 1]", (double)op->mass);
    op->certificate.mass_asked = op->mass;
}

static uint32_t list_blocks(const struct winnow_session *session)
{
    const struct winnow_context *context = session->context;
    return context->layer[session->op.layer].n_segments *
           (context->segment_tokens / WINNOW_BLOCK_TOKENS);
}

static int query_convert(struct winnow_core *core, struct winnow_session *session)
{
    const struct winnow_model_shape *shape = &session->context->shape;
    struct winnow_op *op = &session->op;
    int rc =
        core->options.kernels->to_float(shape->io_dtype, (size_t)shape->n_q_heads * shape->k_width,
                                        op->request->attend.q, op->run->q);
    if (rc < 0)
        winnow_op_fail(op, rc, "q has NaN or Inf: layer %u, token %llu. hint: the model's dtype",
                       op->layer, (unsigned long long)op->request->attend.position);
    return rc;
}

/* The new token's K and V as fp32. */
static int token_convert(struct winnow_core *core, struct winnow_session *session, float **k,
                         float **v)
{
    const struct winnow_model_shape *shape = &session->context->shape;
    const struct winnow_kernels *kernels = core->options.kernels;
    struct winnow_op *op = &session->op;
    size_t n_k = (size_t)shape->n_kv_heads * shape->k_width;
    size_t n_v = (size_t)shape->n_kv_heads * shape->v_width;
    *k = op->run->kv;
    *v = op->run->kv + n_k;
    if (kernels->to_float(shape->io_dtype, n_k, op->request->attend.k, *k) == 0 &&
        kernels->to_float(shape->io_dtype, n_v, op->request->attend.v, *v) == 0)
        return 0;
    winnow_op_fail(op, -EDOM,
                   "K or V has NaN or Inf: layer %u, token %llu. hint: the model's dtype",
                   op->layer, (unsigned long long)op->request->attend.position);
    return -EDOM;
}

/* True when the token is in the tail. */
static bool token_append(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_context *context = session->context;
    const struct winnow_model_shape *shape = &context->shape;
    struct winnow_context_layer *layer = &context->layer[op->layer];
    float *k, *v;
    winnow_assert(!op->appended);
    winnow_assert(layer->held == op->request->attend.position);
    winnow_assert(layer->held < context->n_tokens_max);
    if (token_convert(core, session, &k, &v) < 0)
        return false;
    if (winnow_context_grow(context, op->layer, 1, core->keep_bytes) < 0) {
        winnow_op_wait_room(core, op, "a token of layer %u", op->layer);
        return false;
    }
    uint32_t block_idx = winnow_context_block_of(context, op->layer, layer->held);
    winnow_assert(block_idx < layer->n_blocks);
    for (uint32_t head = 0; head < shape->n_kv_heads; head++)
        core->options.kernels->block_pack(
            shape, (uint32_t)(layer->held % WINNOW_BLOCK_TOKENS), 1,
            k + (size_t)head * shape->k_width, v + (size_t)head * shape->v_width,
            winnow_context_block(context, op->layer, head, block_idx));
    layer->held++;
    session->layer[op->layer].last_seq = op->request->attend.seq;
    return true;
}

// --- SCORE --------------------------------------------------------------------------------------

/* Sinks and tail, in groups of eight, into `base`. */
static void attend_resident(const struct winnow_item *item)
{
    struct winnow_session *session = item->session;
    const struct winnow_context *context = session->context;
    const struct winnow_model_shape *shape = &context->shape;
    const struct winnow_context_layer *layer = &context->layer[item->layer];
    struct winnow_run *run = session->op.run;
    uint32_t G = winnow_group_heads(shape), stride = shape->v_width + 2;
    const float *q = run->q + (size_t)item->head * G * shape->k_width;
    float *base = head_partial(session, run->base, item->head);
    float partial[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    partial_clear(shape, base);
    for (uint32_t first = 0; first < layer->n_blocks; first += WINNOW_GROUP_BLOCKS) {
        const void *block[WINNOW_GROUP_BLOCKS];
        uint32_t n_tokens[WINNOW_GROUP_BLOCKS], n = 0;
        for (uint32_t i = first; i < layer->n_blocks && n < WINNOW_GROUP_BLOCKS; i++) {
            uint64_t left = layer->held - winnow_context_position_of(context, item->layer, i);
            winnow_assert(left <= layer->held);
            winnow_assert(left > 0);
            block[n] = winnow_context_block(context, item->layer, item->head, i);
            n_tokens[n++] = left < WINNOW_BLOCK_TOKENS ? (uint32_t)left : WINNOW_BLOCK_TOKENS;
        }
        item->kernels->attend_partial(shape, q, n, block, n_tokens, partial, NULL);
        item->kernels->merge(shape, 1, partial, base);
    }
    for (uint32_t g = 0; g < G; g++)
        run->ln_z[item->head * G + g] = base[g * stride] + logf(base[g * stride + 1]);
}

static void score_segments(const struct winnow_item *item)
{
    struct winnow_session *session = item->session;
    const struct winnow_context *context = session->context;
    const struct winnow_model_shape *shape = &context->shape;
    struct winnow_run *run = session->op.run;
    uint32_t G = winnow_group_heads(shape), n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    winnow_assert(run->n_blocks == context->layer[item->layer].n_segments * n_span);
    uint8_t *scratch = run->scratch + item->head * run->scratch_bytes;
    for (uint32_t k = 0; k < context->layer[item->layer].n_segments; k++) {
        struct winnow_index_view view;
        winnow_segment_view(context->segment[k], item->layer, item->head, &view);
        item->kernels->score(shape, session->op.policy, &view,
                             run->q + (size_t)item->head * G * shape->k_width,
                             run->selection[item->head].ln_e + (size_t)k * n_span * G, scratch);
    }
}

static void score_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    struct winnow_op *op = &item->session->op;
    struct winnow_run *run = op->run;
    struct winnow_selection *selection = &run->selection[item->head];
    uint8_t *scratch = run->scratch + item->head * run->scratch_bytes;
    (void)worker_idx;
    attend_resident(item);
    memcpy(head_partial(item->session, run->acc, item->head),
           head_partial(item->session, run->base, item->head),
           winnow_partial_floats(&item->session->context->shape) * sizeof(float));
    if (run->exact[item->head])
        return;
    score_segments(item);
    winnow_assert(op->mass < 1);
    winnow_assert(selection->n_blocks == run->n_blocks);
    selection->mass = op->mass;
    selection->n_blocks_max = op->n_blocks_max ? op->n_blocks_max : selection->n_blocks;
    if (op->policy == WINNOW_POLICY_TACTIC)
        item->kernels->probe(selection, scratch);
    else
        item->kernels->select(op->policy, selection, scratch);
    winnow_assert(selection->n_selected + selection->n_reserve <= selection->n_blocks);
}

static void select_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    struct winnow_run *run = item->session->op.run;
    (void)worker_idx;
    if (!run->exact[item->head])
        item->kernels->select(item->session->op.policy, &run->selection[item->head],
                              run->scratch + item->head * run->scratch_bytes);
}

/* Blocks of all lists together below which a phase is done before a worker would be awake (25-35 us
 * on a small VM): scoring a block takes about 100 ns, judging a selected list 10. */
enum { SCORE_HERE_BLOCKS = 256, JUDGE_HERE_BLOCKS = 2560, ATTEND_HERE_GROUPS = 12 };

/* An item for every KV head, by the team, or here when the lists are short. False: items are out
 * (their number is bounded), nothing is done. */
static bool heads_submit(struct winnow_core *core, struct winnow_session *session,
                         void (*run)(struct winnow_work *, uint32_t), uint32_t n_here_blocks)
{
    bool here = core->n_workers > 1 &&
                session->op.run->n_blocks * session->context->shape.n_kv_heads < n_here_blocks;
    uint32_t n_heads = session->context->shape.n_kv_heads;
    winnow_assert(session->op.n_items == 0);
    if (winnow_pool_size(core->items) - winnow_pool_used(core->items) < n_heads)
        return false;
    for (uint32_t head = 0; head < n_heads; head++) {
        struct winnow_item *item = winnow_item_take(core, session);
        winnow_assert(item);
        item->head = head;
        session->op.n_items++;
        if (here)
            winnow_item_run_here(core, item, run, winnow_item_done);
        else
            winnow_item_submit(core, item, WINNOW_LANE_DECODE, run, winnow_item_done);
    }
    return true;
}

bool winnow_decode_is_whole(const struct winnow_core *core, const struct winnow_session *session)
{
    const struct winnow_op *op = &session->op;
    const struct winnow_context *context = session->context;
    uint64_t n_sealed = (uint64_t)context->layer[op->layer].n_segments * context->segment_tokens;
    return op->mass >= 1 || op->policy == WINNOW_POLICY_EXACT ||
           (op->request->attend.flags & WINNOW_ITEM_EXACT) || n_sealed < core->options.dense_below;
}

/* Which heads are read whole: all, or the heavy ones. */
static void exact_choose(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    uint32_t n_heads = session->context->shape.n_kv_heads;
    bool may_degrade = winnow_op_may_degrade(session); /* by estimates: whole heads have none */
    op->whole = winnow_decode_is_whole(core, session);
    for (uint32_t head = 0; head < n_heads; head++) {
        const struct winnow_heavy *heavy = &session->heavy[op->layer * n_heads + head];
        bool looks_again = heavy->n_steps % WINNOW_HEAVY_STEPS == WINNOW_HEAVY_STEPS - 1;
        op->run->exact[head] = op->whole || (heavy->heavy && !looks_again && !may_degrade);
    }
    op->certificate.n_blocks_total = n_heads * op->run->n_blocks;
}

static void score_begin(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    winnow_assert(op->appended);
    if (winnow_run_prepare(core, op->run, session, list_blocks(session)) < 0) {
        winnow_op_fail(
            op, -EDQUOT,
            "index_memory %llu MiB has no room for a step's lists. hint: a larger index_memory",
            (unsigned long long)(core->options.index_memory_bytes >> 20));
        return;
    }
    if (query_convert(core, session) < 0)
        return;
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++)
        memset(op->run->selection[head].selected, 0, op->run->n_blocks);
    exact_choose(core, session);
    if (heads_submit(core, session, score_run, SCORE_HERE_BLOCKS))
        op->state = WINNOW_OP_SCORE;
}

// --- BUILD --------------------------------------------------------------------------------------

/* What is due is in force before the token joins, and again after: where the index has no room for
 * a span, no step appends more than the token that made it due. */
static bool build_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    uint32_t layer = op->layer;
    if (winnow_seal_due(session, layer, WINNOW_RECENT_TOKENS)) {
        int rc = winnow_seal_start(core, session, layer, WINNOW_LANE_BUILD);
        if (rc < 0 && winnow_seal_due(session, layer, WINNOW_SEAL_TOKENS)) {
            winnow_op_fail(op, -EDQUOT,
                           "index_memory %llu MiB is full: layer %u. hint: a larger "
                           "index_memory, fewer sessions",
                           (unsigned long long)(core->options.index_memory_bytes >> 20), layer);
            return false;
        }
    }
    if (winnow_seal_due(session, layer, WINNOW_SEAL_TOKENS)) {
        if (session->layer[layer].seal_state == WINNOW_SEAL_BUILT)
            winnow_seal_permute(core, session, layer);
        return false;
    }
    if (!op->appended) {
        op->appended = token_append(core, session);
        return op->appended;
    }
    if (winnow_device_begin(core, session))
        return true;
    score_begin(core, session);
    return op->state == WINNOW_OP_SCORE;
}

// --- READ ---------------------------------------------------------------------------------------

void winnow_decode_loaded(struct winnow_core *core, struct winnow_session *session,
                          const struct winnow_load *load, int result)
{
    struct winnow_op *op = &session->op;
    struct winnow_group *group = &op->run->group[load->group];
    uint32_t i = load->place;
    winnow_assert(load->group < WINNOW_N_GROUPS);
    winnow_assert(i < group->n);
    winnow_assert(group->state == WINNOW_GROUP_READING);
    winnow_assert(group->source[i] == WINNOW_FROM_NOWHERE);
    if (result == 0) {
        group->data[i] = load->data;
        group->slot[i] = load->slot ? load->slot - 1 : 0;
        group->source[i] = load->cached ? WINNOW_FROM_CACHE
                           : load->slot ? WINNOW_FROM_SLOT
                                        : WINNOW_FROM_STAGING;
        if (load->cached)
            winnow_arena_pin(core->tiers.arena, load->slot - 1);
    } else if (winnow_op_may_degrade(session) && !op->run->exact[group->head]) {
        struct winnow_selection *selection = &op->run->selection[group->head];
        uint32_t G = selection->n_q, block = group->block[i];
        group->data[i] = NULL; /* compensated like one that was not selected */
        selection->selected[block] = 0;
        float *ln_m = op->run->ln_m + (size_t)group->head * selection->n_blocks * G;
        memcpy(ln_m + (size_t)block * G, selection->ln_e + (size_t)block * G, G * sizeof(float));
        op->certificate.n_blocks_missed++;
        op->certificate.reason = (uint32_t)-result;
    } else {
        winnow_op_lost(op, load->segment, result);
    }
    winnow_assert(group->n_missing > 0);
    if (--group->n_missing == 0)
        group->state = WINNOW_GROUP_READY;
}

static void attend_group(const struct winnow_item *item, uint32_t group_idx)
{
    struct winnow_session *session = item->session;
    const struct winnow_model_shape *shape = &session->context->shape;
    struct winnow_run *run = session->op.run;
    struct winnow_group *group = &run->group[group_idx];
    winnow_assert(group->state == WINNOW_GROUP_RUNNING);
    winnow_assert(group->n_missing == 0);
    winnow_assert(group->head < shape->n_kv_heads);
    uint32_t G = winnow_group_heads(shape), n = 0, block[WINNOW_GROUP_BLOCKS];
    uint32_t n_tokens[WINNOW_GROUP_BLOCKS];
    const void *data[WINNOW_GROUP_BLOCKS];
    float ln_m[WINNOW_GROUP_BLOCKS * WINNOW_GQA_MAX];
    for (uint32_t i = 0; i < group->n; i++) {
        if (!group->data[i])
            continue;
        data[n] = group->data[i];
        block[n] = group->block[i];
        n_tokens[n++] = WINNOW_BLOCK_TOKENS;
    }
    item->kernels->attend_partial(shape, run->q + (size_t)group->head * G * shape->k_width, n, data,
                                  n_tokens, head_partial(session, run->partial, group_idx),
                                  run->exact[group->head] ? NULL : ln_m);
    for (uint32_t i = 0; !run->exact[group->head] && i < n; i++)
        memcpy(run->ln_m + ((size_t)group->head * run->n_blocks + block[i]) * G, ln_m + i * G,
               G * sizeof(float));
}

static void attend_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    (void)worker_idx;
    for (uint32_t i = 0; i < item->n; i++)
        attend_group(item, item->group[i]);
}

/* Partials join in list order, as far as they are there. */
static void groups_merge(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    winnow_assert(op->group_next - op->group_first <= WINNOW_N_GROUPS);
    for (; op->group_first < op->group_next; op->group_first++) {
        uint32_t group_idx = (uint32_t)(op->group_first % WINNOW_N_GROUPS);
        struct winnow_group *group = &op->run->group[group_idx];
        if (group->state != WINNOW_GROUP_DONE)
            return;
        core->options.kernels->merge(&session->context->shape, 1,
                                     head_partial(session, op->run->partial, group_idx),
                                     head_partial(session, op->run->acc, group->head));
    }
}

static void attend_done(struct winnow_core *core, struct winnow_item *item)
{
    struct winnow_op *op = &item->session->op;
    for (uint32_t i = 0; i < item->n; i++) {
        struct winnow_group *group = &op->run->group[item->group[i]];
        winnow_assert(group->state == WINNOW_GROUP_RUNNING);
        winnow_group_release(core, item->session, group);
        group->state = WINNOW_GROUP_DONE;
    }
    winnow_item_done(core, item);
    if (op->failure == 0)
        groups_merge(core, item->session);
    core->progress = true;
}

static void item_send(struct winnow_core *core, struct winnow_session *session,
                      struct winnow_item *item, bool here)
{
    winnow_assert(item->n > 0);
    winnow_assert(item->n <= WINNOW_ITEM_GROUPS);
    session->op.n_items++;
    if (here)
        winnow_item_run_here(core, item, attend_run, attend_done);
    else
        winnow_item_submit(core, item, WINNOW_LANE_DECODE, attend_run, attend_done);
}

/* Ready groups to the team, in items that leave every thread some; a few are attended here. */
static void groups_submit(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    uint32_t n_ready = 0;
    uint64_t group_next = op->group_next;
    for (uint64_t g = op->group_first; g < group_next; g++)
        n_ready += op->run->group[g % WINNOW_N_GROUPS].state == WINNOW_GROUP_READY;
    bool here = core->n_workers > 1 && n_ready <= ATTEND_HERE_GROUPS;
    uint32_t n_each = here ? n_ready : (n_ready + core->n_workers - 1) / core->n_workers;
    if (n_each > WINNOW_ITEM_GROUPS)
        n_each = WINNOW_ITEM_GROUPS;
    struct winnow_item *item = NULL;
    for (uint64_t g = op->group_first; g < group_next; g++) {
        struct winnow_group *group = &op->run->group[g % WINNOW_N_GROUPS];
        if (group->state != WINNOW_GROUP_READY)
            continue;
        if (!item && !(item = winnow_item_take(core, session)))
            return;
        group->state = WINNOW_GROUP_RUNNING;
        item->group[item->n++] = (uint16_t)(g % WINNOW_N_GROUPS);
        if (item->n < n_each)
            continue;
        item_send(core, session, item, here);
        item = NULL;
    }
    if (item)
        item_send(core, session, item, here);
}

/* True when every wanted block is attended and joined. */
static bool read_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (!op->fill_done)
        winnow_plan_fill(core, session);
    groups_submit(core, session);
    if (op->fill_done && op->group_first == op->group_next)
        return true;
    if (!op->fill_done && op->n_items == 0 && op->n_loads == 0 && op->group_first == op->group_next)
        winnow_op_wait_room(core, op, "the blocks of a step");
    return false;
}

// --- VERIFY -------------------------------------------------------------------------------------

/* Unread blocks by their estimate, then out and lse of the head. */
static int head_finish(const struct winnow_item *item)
{
    struct winnow_session *session = item->session;
    const struct winnow_context *context = session->context;
    const struct winnow_model_shape *shape = &context->shape;
    struct winnow_op *op = &session->op;
    struct winnow_run *run = op->run;
    uint32_t G = winnow_group_heads(shape), n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    float *acc = head_partial(session, run->acc, item->head);
    for (uint32_t k = 0; !run->exact[item->head] && k < context->layer[item->layer].n_segments;
         k++) {
        struct winnow_index_view view;
        winnow_segment_view(context->segment[k], item->layer, item->head, &view);
        item->kernels->compensate(shape, &view, &run->selection[item->head], k * n_span, acc);
    }
    float *out = run->out + (size_t)item->head * G * shape->v_width;
    item->kernels->finish(shape, acc, out, run->lse + item->head * G);
    uint8_t *target = op->request->attend.out;
    target += (size_t)item->head * G * shape->v_width * winnow_dtype_bytes(shape->io_dtype);
    if (op->request->attend.lse)
        memcpy(op->request->attend.lse + item->head * G, run->lse + item->head * G,
               G * sizeof(float));
    return item->kernels->from_float(shape->io_dtype, (size_t)G * shape->v_width, out, target);
}

static void verify_run(struct winnow_work *work, uint32_t worker_idx)
{
    struct winnow_item *item = (struct winnow_item *)work;
    struct winnow_op *op = &item->session->op;
    struct winnow_run *run = op->run;
    uint32_t G = winnow_group_heads(&item->session->context->shape);
    float *mass = run->mass + item->head * G, *rho = run->rho + item->head * G;
    bool first = op->state == WINNOW_OP_VERIFY;
    winnow_assert(first || op->state == WINNOW_OP_CERTIFY);
    (void)worker_idx;
    if (run->exact[item->head]) {
        for (uint32_t g = 0; g < G; g++)
            mass[g] = 1;
        run->n_more[item->head] = 0;
        if (first)
            item->result = head_finish(item);
        return;
    }
    if (!first && run->n_more[item->head] == 0)
        return; /* finished in the first round */
    uint32_t n_more = item->kernels->select_more(&run->selection[item->head], rho, mass, first,
                                                 run->scratch + item->head * run->scratch_bytes);
    winnow_assert(n_more <= run->n_blocks);
    if (first)
        run->n_more[item->head] = n_more;
    if (!first || n_more == 0)
        item->result = head_finish(item);
}

static bool any_more(const struct winnow_session *session)
{
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++)
        if (session->op.run->n_more[head])
            return true;
    return false;
}

/* A strict session gets exactly what stayed short: everything again, from the resident blocks on. */
static void strict_begin(struct winnow_session *session)
{
    const struct winnow_model_shape *shape = &session->context->shape;
    struct winnow_run *run = session->op.run;
    winnow_assert(!session->op.whole);
    winnow_assert(session->op.n_items == 0);
    memset(run->exact, 1, shape->n_kv_heads);
    memcpy(run->acc, run->base, shape->n_kv_heads * winnow_partial_floats(shape) * sizeof(float));
    session->op.whole = true;
    winnow_plan_begin(session, 1, true);
    session->op.state = WINNOW_OP_READ;
}

// --- the machine --------------------------------------------------------------------------------

/* What follows a state whose items have all ended; false: nothing more can be done now. */
static bool advance_once(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    switch (op->state) {
    case WINNOW_OP_BEGIN:
        begin_check(session);
        if (op->failure == 0 && winnow_run_prepare(core, op->run, session, 0) < 0)
            winnow_op_fail(op, -EDQUOT,
                           "index_memory has no room for a step. hint: a larger index_memory");
        if (op->failure == 0 && query_convert(core, session) == 0)
            op->state = WINNOW_OP_BUILD;
        return op->failure == 0;
    case WINNOW_OP_BUILD:
        return build_advance(core, session);
    case WINNOW_OP_DEVICE:
    case WINNOW_OP_DEVICE_READ:
        return winnow_device_advance(core, session);
    case WINNOW_OP_SCORE: {
        bool tactic = op->policy == WINNOW_POLICY_TACTIC && !op->whole;
        winnow_plan_begin(session, tactic ? 3 : 1, !tactic);
        op->state = tactic ? WINNOW_OP_PROBE : WINNOW_OP_READ;
        return true;
    }
    case WINNOW_OP_PROBE:
        if (!read_advance(core, session) ||
            !heads_submit(core, session, select_run, JUDGE_HERE_BLOCKS))
            return false;
        op->state = WINNOW_OP_SELECT;
        return true;
    case WINNOW_OP_SELECT:
        winnow_plan_begin(session, 1, true);
        op->state = WINNOW_OP_READ;
        return true;
    case WINNOW_OP_READ:
        if (!read_advance(core, session))
            return false;
        op->state = WINNOW_OP_VERIFY;
        op->certificate.n_rounds = 1;
        if (!heads_submit(core, session, verify_run, JUDGE_HERE_BLOCKS))
            op->state = WINNOW_OP_READ; /* items are out: the next round tries again */
        return op->state == WINNOW_OP_VERIFY;
    case WINNOW_OP_VERIFY:
        if (any_more(session)) {
            session->stats.n_second_rounds++;
            op->certificate.n_rounds = 2;
            winnow_plan_begin(session, 2, false);
            op->state = WINNOW_OP_READ_MORE;
            return true;
        }
        op->state = WINNOW_OP_STRICT;
        return true;
    case WINNOW_OP_READ_MORE:
        if (!read_advance(core, session))
            return false;
        op->state = WINNOW_OP_CERTIFY;
        if (!heads_submit(core, session, verify_run, JUDGE_HERE_BLOCKS))
            op->state = WINNOW_OP_READ_MORE;
        return op->state == WINNOW_OP_CERTIFY;
    case WINNOW_OP_CERTIFY:
        op->state = WINNOW_OP_STRICT;
        return true;
    case WINNOW_OP_STRICT:
        winnow_certificate_close(core, session);
        if (op->failure == 0 && session->options.strict && !op->whole &&
            op->certificate.verdict == WINNOW_VERDICT_SHORT) {
            if (op->by_device)
                winnow_device_refuse(core, session);
            else
                strict_begin(session);
            return true;
        }
        winnow_op_end(core, session);
        return false;
    default:
        winnow_assert(!"a state of decode");
        return false;
    }
}

void winnow_decode_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    winnow_assert(op->run);
    winnow_assert(!op->pass);
    for (;;) {
        bool reads = op->state == WINNOW_OP_READ || op->state == WINNOW_OP_READ_MORE ||
                     op->state == WINNOW_OP_PROBE || op->state == WINNOW_OP_DEVICE_READ;
        if (op->n_items > 0 && !reads)
            return;
        if (!advance_once(core, session))
            break;
    }
    if (op->failure < 0)
        core->progress = true;
}
