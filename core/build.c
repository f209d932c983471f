// Builds by the device: a span's items are taken as for the lane, but wait here while one job does
// the work of all. So a job ends as a lane's builds do, item by item, and what a lost device does
// not finish goes to the lane as it is.
//
// Whose builds are the device's is decided by its slot alone, never by what is free: the device's
// order of tokens need not be the CPU's. When all jobs are out the span waits for the next call.
//
// The device only builds. It could repack the blocks too, but not before the span comes into force,
// and then the step that waits would wait for a way there and back: the CPU's repacking stays.
#include <base/alloc.h>
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>

bool winnow_builds_by_device(const struct winnow_core *core, const struct winnow_session *session)
{
    return session->device_slot && !core->tiers.device->lost;
}

struct winnow_build *winnow_build_take(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++)
        if (device->build[i].n_items == 0)
            return &device->build[i];
    return NULL;
}

void winnow_build_add(struct winnow_build *build, struct winnow_item *item)
{
    winnow_assert(build->n_items == item->head);
    winnow_assert(item->work.run);
    winnow_assert(item->done);
    build->item[build->n_items++] = item;
}

static void homes_fill(struct winnow_core *core, const struct winnow_item *item)
{
    const struct winnow_context *context = item->session->context;
    uint32_t n_span = context->segment_tokens / WINNOW_BLOCK_TOKENS;
    uint32_t *home = core->tiers.device->homes;
    winnow_assert(!context->with_var);
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        for (uint32_t i = 0; i < n_span; i++) {
            uint32_t block_idx = context->n_sinks / WINNOW_BLOCK_TOKENS + i;
            uint32_t slot = *winnow_context_slot(context, item->layer, head, block_idx);
            *home++ = winnow_device_home(core->tiers.arena, slot + 1);
        }
}

void winnow_build_send(struct winnow_core *core, struct winnow_build *build)
{
    struct winnow_device *device = core->tiers.device;
    winnow_assert(build->n_items == device->shape_options.shape.n_kv_heads);
    homes_fill(core, build->item[0]);
    device->n_builds++;
    build->ticket = device->api->build(device->gpu, device->homes);
    winnow_assert(build->ticket > 0 || build->ticket == -EIO);
    if (build->ticket < 0)
        winnow_device_lose(core);
}

/* The job's place is free; its items are the caller's. */
static uint32_t build_give(struct winnow_device *device, struct winnow_build *build)
{
    uint32_t n_items = build->n_items;
    winnow_assert(n_items > 0);
    winnow_assert(device->n_builds > 0);
    build->n_items = 0;
    device->n_builds--;
    return n_items;
}

static void build_done(struct winnow_core *core, struct winnow_build *build)
{
    uint32_t n_items = build_give(core->tiers.device, build);
    for (uint32_t i = 0; i < n_items; i++) {
        struct winnow_item *item = build->item[i];
        item->done(core, item); /* the last may end its session */
        winnow_pool_give(core->items, item);
    }
}

void winnow_builds_to_lane(struct winnow_core *core)
{
    struct winnow_device *device = core->tiers.device;
    winnow_assert(device->lost);
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++) {
        struct winnow_build *build = &device->build[i];
        uint32_t n_items = build->n_items ? build_give(device, build) : 0;
        for (uint32_t k = 0; k < n_items; k++) {
            struct winnow_item *item = build->item[k];
            winnow_item_submit(core, item, item->work.lane, item->work.run, item->done);
        }
    }
}

/* 1: it was complete, 0: not yet; -EIO. */
static int build_poll(struct winnow_core *core, struct winnow_build *build, bool wait)
{
    struct winnow_device *device = core->tiers.device;
    const struct winnow_item *item = build->item[0];
    for (uint32_t head = 0; head < build->n_items; head++) {
        winnow_segment_view(item->segment, item->layer, head, &device->views[head]);
        device->order[head] = winnow_segment_order(item->segment, item->layer, head);
    }
    int rc =
        device->api->build_poll(device->gpu, build->ticket, wait, device->order, device->views);
    winnow_assert(rc >= 0 || rc == -EIO);
    if (rc == 1)
        build_done(core, build);
    return rc;
}

bool winnow_builds_poll(struct winnow_core *core, bool wait)
{
    struct winnow_device *device = core->tiers.device;
    bool any = false;
    for (uint32_t i = 0; device && i < WINNOW_GPU_BUILDS_MAX; i++) {
        int rc = device->build[i].n_items ? build_poll(core, &device->build[i], wait) : 0;
        any |= rc != 0;
        if (rc < 0)
            winnow_device_lose(core); /* none is left */
    }
    return any;
}
