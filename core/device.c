// What the device has: memory for one shape, and copies of what the host keeps, brought up to date
// before a launch.
#include <base/alloc.h>
#include <base/assert.h>
#include <core/device.h>
#include <core/session.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    CACHE_OF_KV = 20, /* one block in so many of those indexed has a slot, at least */
    WINDOW_POSITIONS = 2048,
    WINDOW_BLOCKS = 1024,  /* of a part: its attention outlasts what begins and ends it */
    WINDOW_OF_MEMORY = 16, /* the share that a window may have of the device's memory */
    WINDOW_OF_POOL = 16,   /* and, pinned beside it, of the pool's, */
    WINDOW_HOST_MIB = 64,  /* at most */
    TAIL_AT_ONCE = 32,     /* blocks of every head that one call puts */
    MOVED_AT_ONCE = 4096,
};

// --- slots --------------------------------------------------------------------------------------

static int slots_init(struct winnow_slots *slots, uint32_t n)
{
    slots->free = winnow_alloc_array(n, sizeof *slots->free);
    if (!slots->free)
        return -ENOMEM;
    for (slots->n_free = 0; slots->n_free < n; slots->n_free++)
        slots->free[slots->n_free] = n - 1 - slots->n_free;
    return 0;
}

/* Number + 1; 0: all are taken. */
static uint32_t slots_take(struct winnow_slots *slots)
{
    return slots->n_free ? slots->free[--slots->n_free] + 1 : 0;
}

static void slots_give(struct winnow_slots *slots, uint32_t number_plus_1)
{
    winnow_assert(number_plus_1 > 0);
    slots->free[slots->n_free++] = number_plus_1 - 1;
}

// --- one shape at a time ------------------------------------------------------------------------

static uint64_t sizes_sum(const struct winnow_gpu_sizes *sizes)
{
    return sizes->index_bytes + sizes->tail_bytes + sizes->cache_bytes + sizes->scratch_bytes +
           sizes->build_bytes + sizes->window_bytes + sizes->other_bytes;
}

static uint64_t blocks_of(const struct winnow_gpu_options *options, uint64_t n_segments)
{
    const struct winnow_model_shape *shape = &options->shape;
    return n_segments * (options->segment_tokens / WINNOW_BLOCK_TOKENS) * shape->n_kv_heads *
           shape->n_layers;
}

static bool options_fit(const struct winnow_device *device, struct winnow_gpu_options *options,
                        uint32_t n_segments, uint64_t n_slots)
{
    struct winnow_gpu_sizes sizes;
    char text[256];
    if (n_slots > INT32_MAX || blocks_of(options, n_segments) > UINT32_MAX)
        return false;
    options->n_segments_max = n_segments;
    options->n_slots = (uint32_t)n_slots;
    options->n_launch_blocks_max =
        (uint64_t)n_segments * (options->segment_tokens / WINNOW_BLOCK_TOKENS);
    return device->api->sizes(options, &sizes, text) == 0 &&
           sizes_sum(&sizes) <= device->memory_bytes;
}

uint64_t winnow_core_gpu_window_bytes(const struct winnow_core *core)
{
    uint64_t share = core->options.host_pool_bytes / WINDOW_OF_POOL;
    uint64_t most = (uint64_t)WINDOW_HOST_MIB << 20;
    return !core->tiers.device ? 0 : share < most ? share : most;
}

/* A window of as many positions as find room; none, and windows are the CPU's. */
static void window_choose(const struct winnow_core *core, struct winnow_gpu_options *options)
{
    const struct winnow_device *device = core->tiers.device;
    struct winnow_gpu_options one = *options;
    struct winnow_gpu_sizes sizes;
    char text[256];
    one.n_segments_max = 1;
    one.n_launch_blocks_max = one.segment_tokens / WINNOW_BLOCK_TOKENS;
    one.n_window_blocks = winnow_chunk_blocks_max(options->shape.n_kv_heads,
                                                  options->segment_tokens / WINNOW_BLOCK_TOKENS);
    uint64_t part_bytes = (uint64_t)WINDOW_BLOCKS * winnow_block_bytes(&options->shape);
    uint32_t n_large =
        WINDOW_BLOCKS / options->shape.n_kv_heads / WINNOW_GROUP_BLOCKS * WINNOW_GROUP_BLOCKS;
    if (n_large > one.n_window_blocks && /* two are pinned */
        2 * part_bytes <= core->options.host_pool_bytes / WINDOW_OF_POOL)
        one.n_window_blocks = n_large;
    for (one.n_window_positions = WINDOW_POSITIONS; one.n_window_positions >= WINNOW_TILE_POSITIONS;
         one.n_window_positions /= 2) {
        if (device->api->sizes(&one, &sizes, text) < 0)
            return;
        if (sizes.window_bytes > device->memory_bytes / WINDOW_OF_MEMORY ||
            sizes.window_host_bytes > winnow_core_gpu_window_bytes(core))
            continue;
        options->n_window_positions = one.n_window_positions;
        options->n_window_blocks = one.n_window_blocks;
        return;
    }
}

/* As many segments as the host's index can hold; fewer where one block in CACHE_OF_KV of theirs
 * would have no slot. What the index leaves is the cache, up to a slot for every block. */
static bool options_choose(const struct winnow_core *core, const struct winnow_model_shape *shape,
                           uint32_t n_sinks, struct winnow_gpu_options *options)
{
    const struct winnow_device *device = core->tiers.device;
    uint32_t n_segments = 0, S = core->options.segment_tokens;
    uint64_t n_of_context = core->options.n_tokens_max / S + 1;
    double segment_bytes = winnow_core_index_bytes_per_token(shape) * S;
    uint64_t n_of_index = (uint64_t)((double)core->options.index_memory_bytes / segment_bytes) + 1;
    *options = (struct winnow_gpu_options){
        .shape = *shape,
        .segment_tokens = S,
        .n_sinks = n_sinks,
        .n_sessions_max = core->options.n_gpu_sessions_max,
        .n_session_segments_max = (uint32_t)n_of_context,
        .n_items_max =
            core->n_runs_max < WINNOW_GPU_ITEMS_MAX ? core->n_runs_max : WINNOW_GPU_ITEMS_MAX,
    };
    options->shape.block_layout = WINNOW_BLOCK_FRAGMENTS;
    window_choose(core, options);
    for (uint32_t bit = UINT32_C(1) << 24; bit; bit /= 2) {
        uint64_t n_blocks = blocks_of(options, n_segments + bit);
        if (n_segments + bit <= n_of_index &&
            options_fit(device, options, n_segments + bit, n_blocks / CACHE_OF_KV))
            n_segments += bit;
    }
    uint64_t n_blocks = blocks_of(options, n_segments), n_slots = n_blocks / CACHE_OF_KV;
    for (uint64_t bit = UINT64_C(1) << 31; bit; bit /= 2)
        if (n_slots + bit <= n_blocks && options_fit(device, options, n_segments, n_slots + bit))
            n_slots += bit;
    return n_segments > 0 && options_fit(device, options, n_segments, n_slots);
}

static void gpu_destroy(struct winnow_device *device)
{
    device->api->destroy(device->gpu);
    device->gpu = NULL;
    winnow_alloc_free(device->session_slots.free);
    winnow_alloc_free(device->segment_slots.free);
    winnow_alloc_free(device->views);
    winnow_alloc_free(device->order);
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++) {
        winnow_assert(device->build[i].n_items == 0);
        winnow_alloc_free(device->build[i].item);
        device->build[i].item = NULL;
    }
    winnow_alloc_free(device->homes);
    winnow_alloc_free(device->segment);
    winnow_alloc_free(device->moved);
    winnow_alloc_free(device->tail);
    winnow_alloc_free(device->part_home);
    winnow_alloc_free(device->part_blocks);
    winnow_alloc_free(device->part_position);
    winnow_alloc_free(device->part_tokens);
    device->session_slots = device->segment_slots = (struct winnow_slots){0};
    device->views = NULL;
    device->order = NULL;
    device->homes = NULL;
    device->segment = NULL;
    device->moved = NULL;
    device->tail = NULL;
    device->part_home = device->part_blocks = device->part_tokens = NULL;
    device->part_position = NULL;
    device->n_moved = 0;
}

/* What a part is listed in. */
static bool part_create(struct winnow_device *device)
{
    size_t n_heads = device->shape_options.shape.n_kv_heads;
    size_t n = device->shape_options.n_window_blocks;
    device->part_home = winnow_alloc_array(n_heads * n + 1, sizeof *device->part_home);
    device->part_blocks = winnow_alloc_array(n_heads, sizeof *device->part_blocks);
    device->part_position = winnow_alloc_array(n + 1, sizeof *device->part_position);
    device->part_tokens = winnow_alloc_array(n + 1, sizeof *device->part_tokens);
    return device->part_home && device->part_blocks && device->part_position && device->part_tokens;
}

static bool gpu_create(struct winnow_core *core, const struct winnow_model_shape *shape,
                       uint32_t n_sinks)
{
    struct winnow_device *device = core->tiers.device;
    winnow_assert(!device->gpu);
    winnow_assert(device->n_sessions == 0);
    char text[256];
    if (!options_choose(core, shape, n_sinks, &device->shape_options))
        return false;
    const struct winnow_gpu_options *options = &device->shape_options;
    size_t n_heads = shape->n_kv_heads;
    size_t n_blocks = n_heads * (options->segment_tokens / WINNOW_BLOCK_TOKENS);
    device->views = winnow_alloc_array(n_heads, sizeof *device->views);
    device->order = winnow_alloc_array(n_heads, sizeof *device->order);
    bool complete = device->views && device->order;
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++) {
        device->build[i].item = winnow_alloc_array(n_heads, sizeof(struct winnow_item *));
        complete &= device->build[i].item != NULL;
    }
    device->homes = winnow_alloc_array(n_blocks, sizeof *device->homes);
    device->segment = winnow_alloc_array(options->n_segments_max, sizeof(struct winnow_segment *));
    device->moved = winnow_alloc_array(MOVED_AT_ONCE, sizeof *device->moved);
    device->tail = winnow_alloc_array(n_heads * TAIL_AT_ONCE, sizeof *device->tail);
    complete &= part_create(device);
    if (!complete || !device->homes || !device->segment || !device->moved || !device->tail ||
        slots_init(&device->session_slots, options->n_sessions_max) < 0 ||
        slots_init(&device->segment_slots, options->n_segments_max) < 0) {
        gpu_destroy(device);
        return false;
    }
    int rc = device->api->create(device->device, options, &device->gpu, text);
    if (rc < 0) {
        device->lost = rc == -EIO;
        gpu_destroy(device);
        return false;
    }
    device->api->window_rows(device->gpu, &device->rows);
    struct winnow_gpu_sizes sizes;
    device->n_shapes += device->api->sizes(options, &sizes, device->shape_text) == 0;
    return true;
}

int winnow_device_create(struct winnow_core *core, struct winnow_device **ret_device,
                         char text[256])
{
    size_t arena_bytes;
    winnow_assert(core->options.gpu);
    void *arena = winnow_arena_base(core->tiers.arena, &arena_bytes);
    snprintf(text, 256, "no memory for the device's tables");
    struct winnow_device *device = winnow_alloc(sizeof *device);
    if (!device)
        return -ENOMEM;
    device->api = core->options.gpu;
    device->memory_bytes = core->options.gpu_memory_bytes;
    device->waiting = winnow_alloc_array(core->n_runs_max, sizeof(struct winnow_session *));
    int rc = device->waiting ? device->api->open(core->options.gpu_ordinal, device->memory_bytes,
                                                 arena, arena_bytes, &device->device, text)
                             : -ENOMEM;
    if (rc < 0) {
        winnow_device_destroy(device);
        return rc;
    }
    *ret_device = device;
    return 0;
}

void winnow_device_destroy(struct winnow_device *device)
{
    if (!device)
        return;
    winnow_assert(device->n_sessions == 0);
    gpu_destroy(device);
    device->api->close(device->device);
    winnow_alloc_free(device->waiting);
    winnow_alloc_free(device);
}

static bool same_shape(const struct winnow_model_shape *a, const struct winnow_model_shape *b)
{
    return a->n_layers == b->n_layers && a->n_q_heads == b->n_q_heads &&
           a->n_kv_heads == b->n_kv_heads && a->k_width == b->k_width && a->v_width == b->v_width &&
           a->softmax_scale == b->softmax_scale && a->kv_dtype == b->kv_dtype &&
           a->io_dtype == b->io_dtype;
}

bool winnow_device_wants(const struct winnow_core *core, const struct winnow_model_shape *shape,
                         const struct winnow_session_options *options)
{
    const struct winnow_device *device = core->tiers.device;
    struct winnow_gpu_options chosen;
    if (!device || device->lost || shape->kv_dtype == WINNOW_FP32 ||
        (options->policy != WINNOW_POLICY_CODES && options->policy != WINNOW_POLICY_EXACT))
        return false;
    if (device->gpu)
        return device->session_slots.n_free > 0 &&
               device->shape_options.n_sinks == options->n_sinks &&
               same_shape(&device->shape_options.shape, shape);
    return options_choose(core, shape, options->n_sinks, &chosen);
}

bool winnow_device_plan(const struct winnow_core *core, const struct winnow_model_shape *shape,
                        char text[256])
{
    struct winnow_gpu_options options;
    struct winnow_gpu_sizes sizes;
    return options_choose(core, shape, WINNOW_BLOCK_TOKENS, &options) &&
           core->tiers.device->api->sizes(&options, &sizes, text) == 0;
}

void winnow_device_join(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_device *device = core->tiers.device;
    const struct winnow_context *context = session->context;
    winnow_assert(session->device_slot == 0);
    if (!device || device->lost || context->shape.block_layout != WINNOW_BLOCK_FRAGMENTS)
        return;
    if (!device->gpu && !gpu_create(core, &context->shape, context->n_sinks))
        return;
    if (!same_shape(&device->shape_options.shape, &context->shape) ||
        device->shape_options.n_sinks != context->n_sinks)
        return;
    session->device_segments =
        winnow_alloc_array(context->n_segments_max, sizeof *session->device_segments);
    if (session->device_segments)
        session->device_slot = slots_take(&device->session_slots);
    device->n_sessions += session->device_slot != 0;
    winnow_assert(device->n_sessions <= device->shape_options.n_sessions_max);
}

void winnow_device_leave(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_device *device = core->tiers.device;
    winnow_alloc_free(session->device_segments);
    session->device_segments = NULL;
    if (!session->device_slot)
        return;
    winnow_assert(device->n_sessions > 0);
    winnow_assert(device->session_slots.n_free < device->shape_options.n_sessions_max);
    slots_give(&device->session_slots, session->device_slot);
    session->device_slot = 0;
    device->n_sessions--;
}

void winnow_device_segment_end(struct winnow_device *device, struct winnow_segment *segment)
{
    if (!segment->device_slot)
        return;
    winnow_assert(device->gpu);
    winnow_assert(device->segment_slots.n_free < device->shape_options.n_segments_max);
    if (!device->lost && device->api->segment_drop(device->gpu, segment->device_slot - 1) < 0)
        device->lost = true;
    device->segment[segment->device_slot - 1] = NULL;
    slots_give(&device->segment_slots, segment->device_slot);
    segment->device_slot = 0;
}

void winnow_device_counters(struct winnow_device *device, struct winnow_gpu_counters *sum)
{
    *sum = (struct winnow_gpu_counters){0};
    uint32_t n_layers = device && device->gpu ? device->shape_options.shape.n_layers : 0;
    for (uint32_t layer = 0; layer < n_layers && !device->lost; layer++) {
        struct winnow_gpu_counters one;
        if (device->api->counters(device->gpu, layer, &one) < 0)
            return; /* the next launch finds it lost */
        sum->n_hits += one.n_hits;
        sum->n_misses += one.n_misses;
        sum->n_evictions += one.n_evictions;
        sum->n_unfit += one.n_unfit;
        sum->n_ahead += one.n_ahead;
        sum->n_ahead_used += one.n_ahead_used;
    }
}

void winnow_device_shape_end(struct winnow_device *device)
{
    if (device->gpu && device->n_sessions == 0 && device->n_launches == 0 &&
        device->n_builds == 0 &&
        device->segment_slots.n_free == device->shape_options.n_segments_max)
        gpu_destroy(device);
}

// --- what the device has is brought up to date --------------------------------------------------

uint32_t winnow_device_home_of(const struct winnow_arena *arena, const void *data)
{
    size_t arena_bytes;
    const uint8_t *base = winnow_arena_base(arena, &arena_bytes), *at = data;
    winnow_assert(at >= base);
    winnow_assert((size_t)(at - base) < arena_bytes);
    winnow_assert((size_t)(at - base) % WINNOW_PAGE_BYTES == 0);
    return (uint32_t)((size_t)(at - base) / WINNOW_PAGE_BYTES);
}

uint32_t winnow_device_home(const struct winnow_arena *arena, uint32_t place)
{
    return place ? winnow_device_home_of(arena, winnow_arena_data(arena, place - 1))
                 : WINNOW_GPU_ON_DISK;
}

/* Homes as they are when the device hears of them; a segment that went meanwhile has none. */
static int moved_send(struct winnow_device *device)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < device->n_moved; i++) {
        struct winnow_gpu_home home = device->moved[i];
        const struct winnow_segment *segment = device->segment[home.segment_slot];
        uint32_t n_of_layer = segment ? segment->shape.n_kv_heads * segment->n_blocks : 1;
        if (!segment || !segment->layer[home.block / n_of_layer].on_device)
            continue;
        const uint32_t *place = winnow_segment_place(segment, home.block / n_of_layer);
        home.home = winnow_device_home(segment->tiers->arena, place[home.block % n_of_layer]);
        device->moved[n++] = home;
    }
    device->n_moved = 0;
    return n > 0 ? device->api->homes_set(device->gpu, n, device->moved) : 0;
}

void winnow_device_block_moved(struct winnow_device *device, struct winnow_segment *segment,
                               uint32_t block_idx)
{
    uint32_t n_of_layer = segment->shape.n_kv_heads * segment->n_blocks;
    if (!device || device->lost || !segment->layer[block_idx / n_of_layer].on_device)
        return;
    winnow_assert(device->n_moved < MOVED_AT_ONCE);
    winnow_assert(device->segment[segment->device_slot - 1] == segment);
    device->moved[device->n_moved++] =
        (struct winnow_gpu_home){segment->device_slot - 1, block_idx, WINNOW_GPU_ON_DISK};
    if (device->n_moved == MOVED_AT_ONCE && moved_send(device) < 0)
        device->lost = true; /* and the next launch finds it so */
}

static int segment_sync(struct winnow_core *core, struct winnow_segment *segment, uint32_t layer)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_segment_layer *state = &segment->layer[layer];
    uint32_t n_heads = segment->shape.n_kv_heads, n = n_heads * segment->n_blocks;
    const uint32_t *place = winnow_segment_place(segment, layer);
    winnow_assert(state->in_force);
    winnow_assert(n_heads == device->shape_options.shape.n_kv_heads);
    winnow_assert(segment->n_blocks * WINNOW_BLOCK_TOKENS == device->shape_options.segment_tokens);
    if (!segment->device_slot)
        segment->device_slot = slots_take(&device->segment_slots);
    if (!segment->device_slot)
        return -EDQUOT;
    device->segment[segment->device_slot - 1] = segment;
    if (state->on_device)
        return 0;
    for (uint32_t i = 0; i < n; i++)
        device->homes[i] = winnow_device_home(core->tiers.arena, place[i]);
    for (uint32_t head = 0; head < n_heads; head++)
        winnow_segment_view(segment, layer, head, &device->views[head]);
    int rc = device->api->segment_put(device->gpu, segment->device_slot - 1, layer, device->views,
                                      device->homes);
    state->on_device = rc == 0;
    return rc;
}

void winnow_device_segment_ready(struct winnow_core *core, struct winnow_session *session,
                                 struct winnow_segment *segment, uint32_t layer)
{
    struct winnow_device *device = core->tiers.device;
    if (session->device_slot && !device->lost && segment_sync(core, segment, layer) == -EIO)
        device->lost = true; /* and the next launch finds it so */
}

/* The layer's segments, from the first that the device has not seen on. */
static int segments_sync(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_context *context = session->context;
    struct winnow_session_layer *state = &session->layer[session->op.layer];
    uint32_t n = context->layer[session->op.layer].n_segments,
             n_listed = session->n_device_segments;
    winnow_assert(session->device_slot > 0);
    winnow_assert(n <= context->n_segments_max);
    winnow_assert(n_listed <= context->n_segments_max);
    bool same = n <= n_listed;
    for (uint32_t k = state->n_on_device; k < n; k++) {
        int rc = segment_sync(core, context->segment[k], session->op.layer);
        if (rc < 0)
            return rc;
        uint32_t slot = context->segment[k]->device_slot - 1;
        same &= k < n_listed && session->device_segments[k] == slot;
        session->device_segments[k] = slot;
    }
    int rc = same ? 0
                  : device->api->session_set(device->gpu, session->device_slot - 1, n,
                                             session->device_segments);
    if (rc == 0)
        state->n_on_device = n;
    if (rc == 0 && !same)
        session->n_device_segments = n;
    return rc;
}

/* Resident blocks with tokens from on_device up to n_tokens. */
static int tail_sync(struct winnow_core *core, struct winnow_session *session, uint64_t n_tokens)
{
    struct winnow_device *device = core->tiers.device;
    struct winnow_context *context = session->context;
    uint32_t layer = session->op.layer;
    struct winnow_session_layer *state = &session->layer[layer];
    uint32_t number[TAIL_AT_ONCE], n = 0, n_heads = context->shape.n_kv_heads;
    winnow_assert(n_tokens <= context->layer[layer].held);
    winnow_assert(state->on_device <= context->layer[layer].held);
    int rc = 0;
    for (uint32_t i = 0; i < context->layer[layer].n_blocks && rc == 0; i++) {
        uint64_t at = winnow_context_position_of(context, layer, i);
        if (at + WINNOW_BLOCK_TOKENS <= state->on_device || at >= n_tokens)
            continue;
        for (uint32_t head = 0; head < n_heads; head++)
            device->tail[n * n_heads + head] = winnow_context_block(context, layer, head, i);
        number[n++] = (uint32_t)(at / WINNOW_BLOCK_TOKENS);
        if (n < TAIL_AT_ONCE)
            continue;
        rc = device->api->tail_put(device->gpu, session->device_slot - 1, layer, n, number,
                                   device->tail);
        n = 0;
    }
    if (rc == 0 && n > 0)
        rc = device->api->tail_put(device->gpu, session->device_slot - 1, layer, n, number,
                                   device->tail);
    if (rc == 0 && n_tokens > state->on_device)
        state->on_device = n_tokens;
    return rc;
}

int winnow_device_sync(struct winnow_core *core, struct winnow_session *session,
                       struct winnow_gpu_item *item, struct winnow_gpu_certificate *certificate)
{
    const struct winnow_op *op = &session->op;
    const struct winnow_request *request = op->request;
    const struct winnow_context_layer *layer = &session->context->layer[op->layer];
    bool appends = (request->attend.flags & WINNOW_ITEM_HAS_KV) &&
                   session->layer[op->layer].on_device < layer->held;
    winnow_assert(op->run->taken);
    winnow_assert(request->kind == WINNOW_REQUEST_ATTEND);
    int rc = segments_sync(core, session);
    if (rc == 0)
        rc = moved_send(core->tiers.device);
    if (rc == 0)
        rc = tail_sync(core, session, layer->held - appends);
    *item = (struct winnow_gpu_item){
        .session = session->device_slot - 1,
        .layer = op->layer,
        .n_segments = layer->n_segments,
        .n_tokens = layer->held,
        .mass = op->whole ? 1 : op->mass,
        .n_blocks_max = op->whole ? 0 : op->n_blocks_max,
        .q = request->attend.q,
        .k = appends ? request->attend.k : NULL,
        .v = appends ? request->attend.v : NULL,
        .out = request->attend.out,
        .lse = request->attend.lse,
        .certificate = certificate,
        .disk_block = winnow_device_disk_blocks(op->run),
        .n_disk_block_max = op->run->n_blocks * session->context->shape.n_kv_heads,
    };
    return rc;
}
