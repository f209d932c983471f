// Launches: steps that wait go to the device together, and come back with an answer, with blocks to
// read from disk, or not at all.
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <string.h>

enum {
    N_READS_MAX = 4,        /* of a step: two rounds want some, another step may take one's place */
    WHOLE_READS_MAX = 1024, /* blocks: rule 3 keeps whole reads out of the cache, but for so few */
};

/* Awaits a launch's end here: the way through the loop and its queue costs 5 us each time around.
 * Beyond it who connects or closes has waited long enough. */
static const int64_t SPIN_NS = 500 * WINNOW_NS_PER_US;

static bool is_launched(const struct winnow_device *device)
{
    return device && device->n_launches > 0;
}

/* The step goes on without the device, from its beginning. */
static void to_cpu(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_core_certificate *c = &op->certificate;
    winnow_assert(op->n_items == 0);
    winnow_assert(op->n_loads == 0);
    winnow_pins_release(core, session);
    c->n_blocks_device = c->n_blocks_host = c->n_blocks_disk = c->n_blocks_missed = 0;
    op->state = WINNOW_OP_BUILD;
    op->on_cpu = true;
    op->by_device = op->whole = false;
    core->progress = true;
}

void winnow_device_lose(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    device->lost = true;
    for (; device->n_launches; device->n_launches--) {
        struct winnow_launch *launch = &device->launch[device->launch_first];
        device->launch_first = (device->launch_first + 1) % WINNOW_N_LAUNCHES;
        for (uint32_t i = 0; i < launch->n; i++) {
            winnow_assert(launch->session[i]->op.n_items > 0);
            launch->session[i]->op.n_items--;
            to_cpu(core, launch->session[i]);
        }
    }
    while (device->n_waiting) {
        struct winnow_session *session = device->waiting[--device->n_waiting];
        winnow_assert(session->op.n_items > 0);
        session->op.n_items--;
        to_cpu(core, session);
    }
    winnow_parts_lose(core);
    winnow_builds_to_lane(core);
    winnow_arena_freeze(core->tiers.arena, false);
}

static void wait_for_launch(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_device *device = core->tiers.device;
    winnow_assert(session->device_slot > 0);
    winnow_assert(session->op.n_items == 0);
    winnow_assert(device->n_waiting < core->n_runs_max);
    session->op.state = WINNOW_OP_DEVICE;
    session->op.n_items++;
    device->waiting[device->n_waiting++] = session;
    core->progress = true;
}

/* Lists all blocks of the layer, in the order of the disk, as a launch does that finds some there. */
static uint32_t blocks_list(const struct winnow_session *session)
{
    const struct winnow_context *context = session->context;
    uint32_t n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS, n = 0;
    uint32_t *block = winnow_device_disk_blocks(session->op.run);
    for (uint32_t k = 0; k < context->layer[session->op.layer].n_segments; k++)
        for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
            for (uint32_t i = 0; i < n_span; i++)
                block[n++] = head * session->op.run->n_blocks + k * n_span + i;
    winnow_assert(n == context->shape.n_kv_heads * session->op.run->n_blocks);
    return n;
}

/* Everything is read. That it is not all at home is known before a launch would say so: the rest is
 * read first. False: that is more than a whole read may bring into the cache, and the CPU streams. */
static bool whole_begin(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    const struct winnow_context *context = session->context;
    uint32_t n_away = context->shape.n_kv_heads * op->run->n_blocks;
    for (uint32_t k = 0; k < context->layer[op->layer].n_segments; k++)
        n_away -= context->segment[k]->layer[op->layer].n_places;
    if (n_away > WHOLE_READS_MAX)
        return false;
    op->whole = true;
    if (n_away == 0) {
        wait_for_launch(core, session);
        return true;
    }
    op->certificate.n_blocks_disk += n_away;
    winnow_pins_begin(core, session, blocks_list(session));
    op->state = WINNOW_OP_DEVICE_READ;
    return true;
}

bool winnow_device_begin(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    const struct winnow_context *context = session->context;
    uint32_t n_blocks =
        context->layer[op->layer].n_segments * (context->segment_tokens / WINNOW_BLOCK_TOKENS);
    bool whole = n_blocks == 0 || winnow_decode_is_whole(core, session);
    if (!session->device_slot || core->tiers.device->lost || op->on_cpu ||
        (!whole && op->policy != WINNOW_POLICY_CODES))
        return false;
    if (winnow_run_prepare(core, op->run, session, n_blocks) < 0)
        return false; /* and the CPU's way says what is short */
    op->certificate.n_blocks_total = context->shape.n_kv_heads * n_blocks;
    if (whole)
        return whole_begin(core, session);
    wait_for_launch(core, session);
    return true;
}

void winnow_device_refuse(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    winnow_assert(op->by_device);
    winnow_assert(!op->whole);
    winnow_assert(op->state == WINNOW_OP_STRICT);
    op->mass = 1;
    op->by_device = false;
    op->n_device_reads = 0;
    if (core->tiers.device->lost || !whole_begin(core, session))
        to_cpu(core, session);
}

/* As many of those that wait as one launch takes, all whole or none. False: none, or the device is
 * lost. */
static bool launch_send(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_launch *launch =
        &device->launch[(device->launch_first + device->n_launches) % WINNOW_N_LAUNCHES];
    uint64_t n_blocks = 0;
    uint32_t n_sent = 0;
    winnow_assert(device->n_waiting > 0);
    winnow_assert(device->n_launches < WINNOW_N_LAUNCHES);
    launch->n = 0;
    for (; n_sent < device->n_waiting && launch->n < device->shape_options.n_items_max; n_sent++) {
        struct winnow_session *session = device->waiting[n_sent];
        winnow_assert(session->op.state == WINNOW_OP_DEVICE);
        winnow_assert(session->op.n_items > 0);
        n_blocks += session->op.run->n_blocks;
        if (launch->n && (n_blocks > device->shape_options.n_launch_blocks_max ||
                          session->op.whole != launch->session[0]->op.whole))
            break;
        int rc = winnow_device_sync(core, session, &device->item[launch->n],
                                    &launch->certificate[launch->n]);
        if (rc == -EIO) {
            winnow_device_lose(core);
            return false;
        }
        if (rc == 0) {
            launch->session[launch->n++] = session;
            continue;
        }
        session->op.n_items--;
        to_cpu(core, session);
    }
    device->n_waiting -= n_sent;
    memmove(device->waiting, device->waiting + n_sent, device->n_waiting * sizeof *device->waiting);
    if (launch->n == 0)
        return n_sent > 0;
    launch->ticket = device->api->decode(device->gpu, launch->n, device->item);
    winnow_assert(launch->ticket > 0 || launch->ticket == -EIO);
    device->n_launches++;
    core->stats.n_device_launches++;
    if (launch->ticket < 0) {
        winnow_device_lose(core);
        return false;
    }
    winnow_arena_freeze(core->tiers.arena, true);
    return true;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Each block stands where the step's first launch that selected it found it: what that one fetched
 * is the device's in the next. */
static void blocks_count(struct winnow_core_certificate *c,
                         const struct winnow_gpu_certificate *from)
{
    uint32_t n_here = c->n_blocks_device + c->n_blocks_host;
    uint32_t n_before = n_here + c->n_blocks_disk;
    uint32_t n = from->n_blocks_device + from->n_blocks_host + from->n_blocks_disk;
    uint32_t n_new = n > n_before ? n - n_before : 0;
    uint32_t n_disk = least(n_new, from->n_blocks_disk);
    uint32_t n_device = from->n_blocks_device > n_here ? from->n_blocks_device - n_here : 0;
    n_device = least(n_device, n_new - n_disk);
    c->n_blocks_disk += n_disk;
    c->n_blocks_device += n_device;
    c->n_blocks_host += n_new - n_disk - n_device;
}

static void step_done(struct winnow_core *core, struct winnow_session *session,
                      const struct winnow_gpu_certificate *from)
{
    struct winnow_op *op = &session->op;
    struct winnow_core_certificate *c = &op->certificate;
    winnow_assert(op->state == WINNOW_OP_DEVICE);
    winnow_assert(op->n_items > 0);
    op->n_items--;
    session->layer[op->layer].on_device = session->context->layer[op->layer].held;
    core->progress = true;
    if (from->status == EDOM)
        winnow_op_fail(op, -EDOM, "a result is not finite: layer %u. hint: the model's dtype",
                       op->layer);
    else if (from->status)
        winnow_op_fail(op, -EIO, "the device refused the step: layer %u", op->layer);
    if (op->failure < 0)
        return;
    blocks_count(c, from);
    if (from->n_blocks_disk > c->n_blocks_missed) {
        if (op->n_device_reads++ == N_READS_MAX) {
            to_cpu(core, session);
            return;
        }
        winnow_pins_begin(core, session, from->n_blocks_disk + from->n_blocks_unfit);
        op->state = WINNOW_OP_DEVICE_READ;
        return;
    }
    winnow_pins_release(core, session);
    op->budget_spent = from->n_heads_spent > 0;
    c->mass_reached = from->mass_reached;
    c->mass_mean = from->mass_mean;
    c->n_rounds = from->n_rounds;
    session->stats.n_second_rounds += from->n_rounds > 1;
    session->stats.n_device_steps++;
    op->by_device = true;
    op->state = WINNOW_OP_STRICT;
}

bool winnow_device_advance(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    if (op->state != WINNOW_OP_DEVICE_READ)
        return false;
    bool all_asked = winnow_pins_fill(core, session);
    if (op->n_loads > 0)
        return false;
    if (all_asked && !core->tiers.device->lost) /* all are in the cache, and pinned */
        wait_for_launch(core, session);
    else if (!is_launched(core->tiers.device)) /* then nothing is evicted */
        to_cpu(core, session);                 /* too many at once: it reads in waves */
    return op->state == WINNOW_OP_BUILD;
}

static bool launch_take(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_launch *launch = &device->launch[device->launch_first];
    int rc = device->n_launches ? device->api->poll(device->gpu, launch->ticket, false) : 0;
    if (rc < 0)
        winnow_device_lose(core);
    if (rc <= 0)
        return rc < 0; /* what it leaves is to be gone on with */
    winnow_assert(launch->n > 0);
    winnow_assert(launch->ticket > 0);
    device->launch_first = (device->launch_first + 1) % WINNOW_N_LAUNCHES;
    if (--device->n_launches == 0)
        winnow_arena_freeze(core->tiers.arena, false);
    for (uint32_t i = 0; i < launch->n; i++)
        step_done(core, launch->session[i], &launch->certificate[i]);
    return true;
}

bool winnow_device_poll(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    bool any = false;
    if (!device)
        return false;
    while (launch_take(core))
        any = true;
    while (device->n_waiting && device->n_launches < WINNOW_N_LAUNCHES && launch_send(core))
        any = true;
    any |= winnow_parts_poll(core);
    any |= winnow_builds_poll(core, false);
    winnow_device_shape_end(device);
    return any;
}

/* Every session of the device is in a launch, and the owner has no other work: nobody is kept. */
static bool nobody_else(const struct winnow_core *core)
{
    const struct winnow_device *device = core->tiers.device;
    uint32_t n_out = 0;
    for (uint32_t i = 0; i < device->n_launches; i++)
        n_out += device->launch[(device->launch_first + i) % WINNOW_N_LAUNCHES].n;
    return n_out == device->n_sessions && core->n_items_out == 0 &&
           winnow_pool_used(core->loads) == 0;
}

bool winnow_device_spin(struct winnow_core *core)
{
    if (!is_launched(core->tiers.device) || !nobody_else(core))
        return false;
    for (int64_t end_ns = winnow_core_clock(core) + SPIN_NS; winnow_core_clock(core) <= end_ns;)
        if (winnow_device_poll(core))
            return true;
    return false;
}

bool winnow_device_busy(const struct winnow_device *device)
{
    return device && (device->n_launches > 0 || device->n_builds > 0 || device->n_parts > 0);
}

bool winnow_device_lost(const struct winnow_device *device)
{
    return device && device->lost;
}
