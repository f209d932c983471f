/*
 * A GPU in host memory: struct winnow_gpu_api by the CPU's kernels, for tests of what stands on it.
 * It computes when a launch is found complete, which is late: whoever lets go of a block too soon
 * sees wrong bits. It fails on demand, as a device does: once and for all.
 *
 * One device at a time; its tables are plain memory, its caches are none: every block is read at
 * its home.
 */
#pragma once

#include <base/rng.h>
#include <errno.h>
#include <kernels/gpu.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <test.h>

enum { SIM_GPU_LAUNCHES = 2, SIM_GPU_PARTS = 2 };

struct winnow_gpu_device {
    const uint8_t *arena;
    uint64_t memory_bytes, used_bytes;
};

struct sim_gpu_index {              /* of a segment slot's layer */
    struct winnow_index_view *view; /* [n_kv_heads]; NULL: not put */
    uint32_t *home;
};

struct sim_gpu_launch {
    int64_t ticket;
    uint32_t n, n_polls; /* until it is complete */
    struct winnow_gpu_item item[WINNOW_GPU_ITEMS_MAX];
    void *input[WINNOW_GPU_ITEMS_MAX]; /* q, k, v as they were */
};

struct sim_gpu_build {
    int64_t ticket; /* 0: free */
    uint32_t n_polls;
    uint32_t *homes;
};

struct sim_gpu_part {
    struct winnow_gpu_window_part part; /* its arrays are copies */
    uint32_t n_polls;
};

struct winnow_gpu {
    struct winnow_gpu_device *device;
    struct winnow_gpu_options options;
    uint64_t bytes;
    struct sim_gpu_index *index; /* [segment slot][layer] */
    uint32_t *segments;          /* [session][n_session_segments_max] */
    uint32_t *n_segments;        /* [session] */
    uint8_t *tails;              /* [session][layer][head][n_tail_blocks] */
    uint32_t n_tail_blocks;
    struct winnow_gpu_counters counters[256]; /* [layer] */
    struct sim_gpu_launch launch[SIM_GPU_LAUNCHES];
    uint32_t n_launches;
    struct sim_gpu_build build[WINNOW_GPU_BUILDS_MAX];
    int64_t n_tickets;
    struct winnow_gpu_window_rows rows;
    float *window_q, *window_partial; /* [n_kv_heads][n_window_positions][G] */
    struct sim_gpu_part part[SIM_GPU_PARTS];
    int64_t n_parts_sent, n_parts_done;
};

static struct sim_gpu {
    const struct winnow_kernels *kernels;
    struct winnow_rng *rng;       /* how many polls a launch or a job takes; NULL: one */
    uint64_t fails_after;         /* calls until it is lost; 0: never */
    uint64_t n_calls, n_launches; /* since it was opened */
    uint64_t n_steps, n_whole;    /* items attended; those of mass 1 among them */
    uint64_t n_disk;              /* blocks reported on disk */
    uint64_t n_builds;            /* jobs done */
    uint64_t n_windows, n_parts;  /* windows attended; parts of them */
    bool builds_held;             /* no job is complete before a poll that waits */
    bool is_open, failed;
} sim_gpu;

static inline bool sim_gpu_fails(void)
{
    sim_gpu.n_calls++;
    sim_gpu.failed |= sim_gpu.fails_after && sim_gpu.n_calls >= sim_gpu.fails_after;
    return sim_gpu.failed;
}

static int sim_gpu_probe(uint32_t device_ordinal, char text[256])
{
    snprintf(text, 256, "simulated device %u", device_ordinal);
    return 0;
}

static int sim_gpu_sizes(const struct winnow_gpu_options *options, struct winnow_gpu_sizes *sizes,
                         char text[256])
{
    const struct winnow_model_shape *shape = &options->shape;
    uint64_t n_heads = (uint64_t)shape->n_layers * shape->n_kv_heads;
    uint32_t n_span = options->segment_tokens / WINNOW_BLOCK_TOKENS;
    *sizes = (struct winnow_gpu_sizes){0};
    sizes->segment_bytes = n_heads * n_span * (10ull * shape->k_width + shape->v_width);
    sizes->session_bytes = n_heads * (n_span + 36) * winnow_block_bytes(shape);
    sizes->index_bytes = sizes->segment_bytes * options->n_segments_max;
    sizes->tail_bytes = sizes->session_bytes * options->n_sessions_max;
    sizes->cache_bytes = (uint64_t)options->n_slots * winnow_block_bytes(shape);
    sizes->build_bytes = (uint64_t)WINNOW_GPU_BUILDS_MAX * shape->n_kv_heads *
                         options->segment_tokens * (shape->k_width + shape->v_width) * 2;
    sizes->window_bytes = (uint64_t)shape->n_q_heads * options->n_window_positions *
                          (shape->k_width + shape->v_width + 4) * sizeof(float);
    sizes->window_host_bytes = sizes->window_bytes;
    snprintf(text, 256, "index %u segments, cache %u slots", options->n_segments_max,
             options->n_slots);
    return 0;
}

static int sim_gpu_open(uint32_t device_ordinal, uint64_t memory_bytes, void *host_arena,
                        uint64_t host_arena_bytes, struct winnow_gpu_device **ret_device,
                        char text[256])
{
    (void)device_ordinal, (void)host_arena_bytes, (void)text;
    CHECK(!sim_gpu.is_open);
    struct winnow_gpu_device *device = calloc(1, sizeof *device);
    *device = (struct winnow_gpu_device){.arena = host_arena, .memory_bytes = memory_bytes};
    sim_gpu.is_open = true;
    *ret_device = device;
    return 0;
}

static void sim_gpu_close(struct winnow_gpu_device *device)
{
    if (!device)
        return;
    CHECK_EQ(device->used_bytes, 0);
    sim_gpu.is_open = false;
    free(device);
}

static int sim_gpu_create(struct winnow_gpu_device *device,
                          const struct winnow_gpu_options *options, struct winnow_gpu **ret_gpu,
                          char text[256])
{
    const struct winnow_model_shape *shape = &options->shape;
    struct winnow_gpu_sizes sizes;
    sim_gpu_sizes(options, &sizes, text);
    if (sim_gpu_fails())
        return -EIO;
    uint64_t n_bytes = sizes.index_bytes + sizes.tail_bytes + sizes.cache_bytes +
                       sizes.build_bytes + sizes.window_bytes;
    CHECK(device->used_bytes + n_bytes <= device->memory_bytes);
    struct winnow_gpu *gpu = calloc(1, sizeof *gpu);
    gpu->device = device;
    gpu->options = *options;
    gpu->bytes = n_bytes;
    device->used_bytes += n_bytes;
    gpu->n_tail_blocks = (options->n_sinks + options->segment_tokens + 512) / WINNOW_BLOCK_TOKENS;
    gpu->index = calloc((size_t)options->n_segments_max * shape->n_layers, sizeof *gpu->index);
    gpu->segments = calloc((size_t)options->n_sessions_max * options->n_session_segments_max,
                           sizeof *gpu->segments);
    gpu->n_segments = calloc(options->n_sessions_max, sizeof *gpu->n_segments);
    gpu->tails = malloc((size_t)options->n_sessions_max * shape->n_layers * shape->n_kv_heads *
                        gpu->n_tail_blocks * winnow_block_bytes(shape));
    size_t n_rows = (size_t)shape->n_q_heads * options->n_window_positions;
    gpu->rows.q = calloc(n_rows * shape->k_width + 1, sizeof(float));
    gpu->rows.out = calloc(n_rows * shape->v_width + 1, sizeof(float));
    gpu->rows.lse = calloc(n_rows + 1, sizeof(float));
    gpu->window_q = calloc(n_rows * shape->k_width + 1, sizeof(float));
    gpu->window_partial = calloc(n_rows * (shape->v_width + 2) + 1, sizeof(float));
    *ret_gpu = gpu;
    return 0;
}

static void sim_gpu_view_free(struct winnow_index_view *view)
{
    free(view->head);
    free(view->centroid);
    free(view->vmean);
    free(view->code);
    free(view->code_scale);
    free(view->mean_k);
    free(view->mean_v);
    free(view->v_max);
}

static void sim_gpu_index_free(struct winnow_gpu *gpu, uint32_t segment_slot, uint32_t layer)
{
    struct sim_gpu_index *index =
        &gpu->index[(size_t)segment_slot * gpu->options.shape.n_layers + layer];
    for (uint32_t head = 0; index->view && head < gpu->options.shape.n_kv_heads; head++)
        sim_gpu_view_free(&index->view[head]);
    free(index->view);
    free(index->home);
    *index = (struct sim_gpu_index){0};
}

static void sim_gpu_part_free(struct sim_gpu_part *part)
{
    free((void *)(uintptr_t)part->part.n_blocks);
    free((void *)(uintptr_t)part->part.homes);
    free((void *)(uintptr_t)part->part.position);
    free((void *)(uintptr_t)part->part.n_tokens);
    *part = (struct sim_gpu_part){0};
}

static void sim_gpu_destroy(struct winnow_gpu *gpu)
{
    if (!gpu)
        return;
    for (uint32_t i = 0; i < SIM_GPU_PARTS; i++)
        sim_gpu_part_free(&gpu->part[i]);
    free(gpu->rows.q);
    free(gpu->rows.out);
    free(gpu->rows.lse);
    free(gpu->window_q);
    free(gpu->window_partial);
    for (uint32_t i = 0; i < SIM_GPU_LAUNCHES; i++)
        for (uint32_t k = 0; k < gpu->launch[i].n; k++)
            free(gpu->launch[i].input[k]);
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++)
        free(gpu->build[i].homes);
    for (uint32_t slot = 0; slot < gpu->options.n_segments_max; slot++)
        for (uint32_t layer = 0; layer < gpu->options.shape.n_layers; layer++)
            sim_gpu_index_free(gpu, slot, layer);
    gpu->device->used_bytes -= gpu->bytes;
    free(gpu->index);
    free(gpu->segments);
    free(gpu->n_segments);
    free(gpu->tails);
    free(gpu);
}

static void *sim_gpu_copy(const void *from, size_t n_bytes)
{
    return memcpy(malloc(n_bytes), from, n_bytes);
}

static int sim_gpu_segment_put(struct winnow_gpu *gpu, uint32_t segment_slot, uint32_t layer,
                               const struct winnow_index_view *views, const uint32_t *homes)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    size_t n = gpu->options.segment_tokens / WINNOW_BLOCK_TOKENS;
    if (sim_gpu_fails())
        return -EIO;
    CHECK(segment_slot < gpu->options.n_segments_max && layer < shape->n_layers);
    sim_gpu_index_free(gpu, segment_slot, layer);
    struct sim_gpu_index *index = &gpu->index[(size_t)segment_slot * shape->n_layers + layer];
    index->view = calloc(shape->n_kv_heads, sizeof *index->view);
    index->home = sim_gpu_copy(homes, shape->n_kv_heads * n * sizeof *homes);
    for (uint32_t head = 0; head < shape->n_kv_heads; head++) {
        const struct winnow_index_view *from = &views[head];
        CHECK_EQ(from->n_blocks, n);
        index->view[head] = (struct winnow_index_view){
            .n_blocks = from->n_blocks,
            .head = sim_gpu_copy(from->head, n * sizeof *from->head),
            .centroid = sim_gpu_copy(from->centroid, n * shape->k_width),
            .vmean = sim_gpu_copy(from->vmean, n * shape->v_width),
            .code = sim_gpu_copy(from->code, n * shape->k_width * 8),
            .code_scale = sim_gpu_copy(from->code_scale, n * 32),
            .mean_k = sim_gpu_copy(from->mean_k, shape->k_width * sizeof(float)),
            .mean_v = sim_gpu_copy(from->mean_v, shape->v_width * sizeof(float)),
            .v_max = sim_gpu_copy(from->v_max, sizeof(float)),
        };
    }
    return 0;
}

static int sim_gpu_homes_set(struct winnow_gpu *gpu, uint32_t n,
                             const struct winnow_gpu_home *homes)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    uint32_t n_of_layer = shape->n_kv_heads * (gpu->options.segment_tokens / WINNOW_BLOCK_TOKENS);
    if (sim_gpu_fails())
        return -EIO;
    for (uint32_t i = 0; i < n; i++) {
        struct sim_gpu_index *index = &gpu->index[(size_t)homes[i].segment_slot * shape->n_layers +
                                                  homes[i].block / n_of_layer];
        CHECK(index->view);
        index->home[homes[i].block % n_of_layer] = homes[i].home;
    }
    return 0;
}

static int sim_gpu_segment_drop(struct winnow_gpu *gpu, uint32_t segment_slot)
{
    if (sim_gpu_fails())
        return -EIO;
    for (uint32_t layer = 0; layer < gpu->options.shape.n_layers; layer++)
        sim_gpu_index_free(gpu, segment_slot, layer);
    return 0;
}

static int sim_gpu_session_set(struct winnow_gpu *gpu, uint32_t session, uint32_t n_segments,
                               const uint32_t *segment_slots)
{
    if (sim_gpu_fails())
        return -EIO;
    CHECK(session < gpu->options.n_sessions_max);
    CHECK(n_segments <= gpu->options.n_session_segments_max);
    gpu->n_segments[session] = n_segments;
    memcpy(gpu->segments + (size_t)session * gpu->options.n_session_segments_max, segment_slots,
           n_segments * sizeof *segment_slots);
    return 0;
}

/* Sinks stand at their number, tail blocks in a ring. */
static uint8_t *sim_gpu_tail(const struct winnow_gpu *gpu, uint32_t session, uint32_t layer,
                             uint32_t head, uint64_t block_number)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    uint32_t n_sinks = gpu->options.n_sinks / WINNOW_BLOCK_TOKENS;
    uint64_t at = block_number < n_sinks
                      ? block_number
                      : n_sinks + (block_number - n_sinks) % (gpu->n_tail_blocks - n_sinks);
    size_t row = ((size_t)session * shape->n_layers + layer) * shape->n_kv_heads + head;
    return gpu->tails + (row * gpu->n_tail_blocks + at) * winnow_block_bytes(shape);
}

static int sim_gpu_tail_put(struct winnow_gpu *gpu, uint32_t session, uint32_t layer, uint32_t n,
                            const uint32_t *block_number, const void *const *data)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    if (sim_gpu_fails())
        return -EIO;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t head = 0; head < shape->n_kv_heads; head++)
            memcpy(sim_gpu_tail(gpu, session, layer, head, block_number[i]),
                   data[i * shape->n_kv_heads + head], winnow_block_bytes(shape));
    return 0;
}

static size_t sim_gpu_element(const struct winnow_gpu *gpu)
{
    return gpu->options.shape.io_dtype == WINNOW_FP32 ? 4 : 2;
}

static int64_t sim_gpu_decode(struct winnow_gpu *gpu, uint32_t n_items,
                              const struct winnow_gpu_item *items)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    size_t q_bytes = (size_t)shape->n_q_heads * shape->k_width * sim_gpu_element(gpu);
    size_t k_bytes = (size_t)shape->n_kv_heads * shape->k_width * sim_gpu_element(gpu);
    size_t v_bytes = (size_t)shape->n_kv_heads * shape->v_width * sim_gpu_element(gpu);
    CHECK(n_items > 0 && n_items <= gpu->options.n_items_max);
    for (uint32_t i = 0; i < n_items; i++) {
        CHECK(items[i].mass > 0 && items[i].mass <= 1);
        CHECK_EQ(items[i].mass == 1, items[0].mass == 1);
        CHECK(items[i].mass < 1 || items[i].n_blocks_max == 0);
    }
    if (sim_gpu_fails())
        return -EIO;
    if (gpu->n_launches == SIM_GPU_LAUNCHES)
        return -EBUSY;
    struct sim_gpu_launch *launch = &gpu->launch[gpu->n_launches++];
    *launch = (struct sim_gpu_launch){.ticket = ++gpu->n_tickets, .n = n_items};
    sim_gpu.n_launches++;
    launch->n_polls = sim_gpu.rng ? (uint32_t)winnow_rng_below(sim_gpu.rng, 4) : 0;
    for (uint32_t i = 0; i < n_items; i++) {
        struct winnow_gpu_item *item = &launch->item[i];
        *item = items[i];
        uint8_t *copy = launch->input[i] = malloc(q_bytes + k_bytes + v_bytes);
        item->q = memcpy(copy, item->q, q_bytes);
        if (!item->k)
            continue;
        item->k = memcpy(copy + q_bytes, item->k, k_bytes);
        item->v = memcpy(copy + q_bytes + k_bytes, item->v, v_bytes);
    }
    return launch->ticket;
}

/* One KV head of one item. */
struct sim_gpu_unit {
    const struct winnow_gpu *gpu;
    const struct winnow_gpu_item *item;
    struct winnow_gpu_certificate *certificate;
    uint32_t head, n_q, n_span, n_blocks;
    const float *q;
    float *acc, *ln_m, ln_z[WINNOW_GQA_MAX];
    struct winnow_selection selection;
    void *scratch;
};

static const struct sim_gpu_index *sim_gpu_unit_index(const struct sim_gpu_unit *unit,
                                                      uint32_t segment_idx)
{
    const struct winnow_gpu *gpu = unit->gpu;
    uint32_t slot =
        gpu->segments[(size_t)unit->item->session * gpu->options.n_session_segments_max +
                      segment_idx];
    const struct sim_gpu_index *index =
        &gpu->index[(size_t)slot * gpu->options.shape.n_layers + unit->item->layer];
    CHECK(index->view);
    return index;
}

static void sim_gpu_attend(struct sim_gpu_unit *unit, uint32_t n, const void **block,
                           const uint32_t *n_tokens, float *ln_m)
{
    const struct winnow_model_shape *shape = &unit->gpu->options.shape;
    float partial[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    if (n == 0)
        return;
    sim_gpu.kernels->attend_partial(shape, unit->q, n, block, n_tokens, partial, ln_m);
    sim_gpu.kernels->merge(shape, 1, partial, unit->acc);
}

static void sim_gpu_attend_tail(struct sim_gpu_unit *unit)
{
    const struct winnow_gpu *gpu = unit->gpu;
    const struct winnow_gpu_item *item = unit->item;
    const void *block[WINNOW_GROUP_BLOCKS];
    uint32_t n_tokens[WINNOW_GROUP_BLOCKS], n = 0;
    uint64_t sealed_end =
        gpu->options.n_sinks + (uint64_t)item->n_segments * gpu->options.segment_tokens;
    for (uint64_t at = 0; at < item->n_tokens; at += WINNOW_BLOCK_TOKENS) {
        if (at >= gpu->options.n_sinks && at < sealed_end)
            continue;
        uint64_t left = item->n_tokens - at;
        block[n] =
            sim_gpu_tail(gpu, item->session, item->layer, unit->head, at / WINNOW_BLOCK_TOKENS);
        n_tokens[n++] = left < WINNOW_BLOCK_TOKENS ? (uint32_t)left : WINNOW_BLOCK_TOKENS;
        if (n < WINNOW_GROUP_BLOCKS)
            continue;
        sim_gpu_attend(unit, n, block, n_tokens, NULL);
        n = 0;
    }
    sim_gpu_attend(unit, n, block, n_tokens, NULL);
    for (uint32_t g = 0; g < unit->n_q; g++) {
        const float *partial = unit->acc + g * (gpu->options.shape.v_width + 2);
        unit->ln_z[g] = partial[0] + logf(partial[1]);
    }
}

/* Blocks of one round, in groups of eight, each at its home. */
static void sim_gpu_attend_selected(struct sim_gpu_unit *unit, uint8_t round)
{
    const void *block[WINNOW_GROUP_BLOCKS];
    uint32_t of[WINNOW_GROUP_BLOCKS], n_tokens[WINNOW_GROUP_BLOCKS], n = 0;
    float ln_m[WINNOW_GROUP_BLOCKS * WINNOW_GQA_MAX];
    for (uint32_t b = 0; b <= unit->n_blocks; b++) {
        if (n == WINNOW_GROUP_BLOCKS || (b == unit->n_blocks && n)) {
            sim_gpu_attend(unit, n, block, n_tokens, ln_m);
            for (uint32_t i = 0; i < n; i++)
                memcpy(unit->ln_m + (size_t)of[i] * unit->n_q, ln_m + i * unit->n_q,
                       unit->n_q * sizeof *ln_m);
            n = 0;
        }
        if (b == unit->n_blocks || unit->selection.selected[b] != round)
            continue;
        const struct sim_gpu_index *index = sim_gpu_unit_index(unit, b / unit->n_span);
        uint32_t home = index->home[unit->head * unit->n_span + b % unit->n_span];
        struct winnow_gpu_certificate *c = unit->certificate;
        if (c->n_blocks_disk + c->n_blocks_unfit < unit->item->n_disk_block_max)
            unit->item->disk_block[c->n_blocks_disk + c->n_blocks_unfit] =
                unit->head * unit->n_blocks + b;
        if (home == WINNOW_GPU_ON_DISK) {
            c->n_blocks_disk++;
            sim_gpu.n_disk++;
            if (unit->item->mass < 1)
                unit->selection.selected[b] = 0;
            continue;
        }
        c->n_blocks_host++;
        c->n_blocks_unfit++;
        block[n] = unit->gpu->device->arena + (size_t)home * 4096;
        n_tokens[n] = WINNOW_BLOCK_TOKENS;
        of[n++] = b;
    }
}

/* Out and lse; what was not selected is compensated, of a whole item nothing. */
static void sim_gpu_unit_finish(struct sim_gpu_unit *unit)
{
    const struct winnow_model_shape *shape = &unit->gpu->options.shape;
    size_t first = (size_t)unit->head * unit->n_q;
    float out[WINNOW_GQA_MAX * WINNOW_WIDTH_MAX], lse[WINNOW_GQA_MAX];
    for (uint32_t k = 0; unit->item->mass < 1 && k < unit->item->n_segments; k++)
        sim_gpu.kernels->compensate(shape, &sim_gpu_unit_index(unit, k)->view[unit->head],
                                    &unit->selection, k * unit->n_span, unit->acc);
    sim_gpu.kernels->finish(shape, unit->acc, out, lse);
    if (unit->item->lse)
        memcpy(unit->item->lse + first, lse, unit->n_q * sizeof *lse);
    if (sim_gpu.kernels->from_float(shape->io_dtype, (size_t)unit->n_q * shape->v_width, out,
                                    (uint8_t *)unit->item->out +
                                        first * shape->v_width * sim_gpu_element(unit->gpu)) < 0)
        unit->certificate->status = EDOM;
}

/* Two rounds; mass [n_q]. */
static void sim_gpu_unit_sparse(struct sim_gpu_unit *unit, float *mass)
{
    const struct winnow_model_shape *shape = &unit->gpu->options.shape;
    struct winnow_gpu_certificate *c = unit->certificate;
    float rho[WINNOW_GQA_MAX] = {0};
    uint32_t n_disk = c->n_blocks_disk; /* of the heads before */
    for (uint32_t k = 0; k < unit->item->n_segments; k++)
        sim_gpu.kernels->score(
            shape, WINNOW_POLICY_CODES, &sim_gpu_unit_index(unit, k)->view[unit->head], unit->q,
            unit->selection.ln_e + (size_t)k * unit->n_span * unit->n_q, unit->scratch);
    sim_gpu.kernels->select(WINNOW_POLICY_CODES, &unit->selection, unit->scratch);
    sim_gpu_attend_selected(unit, 1);
    if (sim_gpu.kernels->select_more(&unit->selection, rho, mass, c->n_blocks_disk == n_disk,
                                     unit->scratch)) {
        c->n_rounds = 2;
        sim_gpu_attend_selected(unit, 2);
        sim_gpu.kernels->select_more(&unit->selection, rho, mass, 0, unit->scratch);
    }
    c->n_heads_spent +=
        unit->item->n_blocks_max && unit->selection.n_selected >= unit->item->n_blocks_max;
}

static void sim_gpu_unit_run(struct sim_gpu_unit *unit)
{
    struct winnow_gpu_certificate *c = unit->certificate;
    float mass[WINNOW_GQA_MAX];
    for (uint32_t g = 0; g < unit->n_q; g++)
        unit->acc[g * (unit->gpu->options.shape.v_width + 2)] = -INFINITY;
    sim_gpu_attend_tail(unit);
    if (unit->item->mass < 1) {
        sim_gpu_unit_sparse(unit, mass);
    } else {
        uint32_t n_disk = c->n_blocks_disk;
        memset(unit->selection.selected, 1, unit->n_blocks);
        sim_gpu_attend_selected(unit, 1);
        for (uint32_t g = 0; g < unit->n_q; g++)
            mass[g] = c->n_blocks_disk == n_disk;
    }
    sim_gpu_unit_finish(unit);
    for (uint32_t g = 0; g < unit->n_q; g++) {
        c->mass_reached = fminf(c->mass_reached, mass[g]);
        c->mass_mean += mass[g];
    }
}

static void sim_gpu_append(struct winnow_gpu *gpu, const struct winnow_gpu_item *item)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    uint64_t at = item->n_tokens - 1;
    float k[WINNOW_WIDTH_MAX], v[WINNOW_WIDTH_MAX];
    for (uint32_t head = 0; head < shape->n_kv_heads; head++) {
        sim_gpu.kernels->to_float(
            shape->io_dtype, shape->k_width,
            (const uint8_t *)item->k + (size_t)head * shape->k_width * sim_gpu_element(gpu), k);
        sim_gpu.kernels->to_float(
            shape->io_dtype, shape->v_width,
            (const uint8_t *)item->v + (size_t)head * shape->v_width * sim_gpu_element(gpu), v);
        sim_gpu.kernels->block_pack(
            shape, (uint32_t)(at % WINNOW_BLOCK_TOKENS), 1, k, v,
            sim_gpu_tail(gpu, item->session, item->layer, head, at / WINNOW_BLOCK_TOKENS));
    }
}

static void sim_gpu_item_run(struct winnow_gpu *gpu, const struct winnow_gpu_item *item)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads;
    uint32_t n_span = gpu->options.segment_tokens / WINNOW_BLOCK_TOKENS;
    size_t n_blocks = (size_t)item->n_segments * n_span;
    CHECK(item->n_segments <= gpu->n_segments[item->session]);
    *item->certificate = (struct winnow_gpu_certificate){.n_rounds = 1, .mass_reached = 1};
    if (item->k)
        sim_gpu_append(gpu, item);
    float *q = malloc((size_t)shape->n_q_heads * shape->k_width * sizeof *q);
    CHECK_EQ(sim_gpu.kernels->to_float(shape->io_dtype, (size_t)shape->n_q_heads * shape->k_width,
                                       item->q, q),
             0);
    for (uint32_t head = 0; head < shape->n_kv_heads; head++) {
        struct sim_gpu_unit unit = {.gpu = gpu,
                                    .item = item,
                                    .certificate = item->certificate,
                                    .head = head,
                                    .n_q = n_q,
                                    .n_span = n_span,
                                    .n_blocks = (uint32_t)n_blocks,
                                    .q = q + (size_t)head * n_q * shape->k_width};
        unit.acc = calloc(winnow_partial_floats(shape), sizeof(float));
        unit.ln_m = calloc(n_blocks * n_q, sizeof(float));
        unit.scratch = aligned_alloc(
            64, (sim_gpu.kernels->select_scratch_bytes(shape, (uint32_t)n_blocks) + 64) / 64 * 64);
        unit.selection = (struct winnow_selection){
            .n_q = n_q,
            .n_blocks = (uint32_t)n_blocks,
            .n_blocks_max = item->n_blocks_max ? item->n_blocks_max : (uint32_t)n_blocks,
            .mass = item->mass,
            .ln_z = unit.ln_z,
            .ln_m = unit.ln_m,
            .ln_e = calloc(n_blocks * n_q, sizeof(float)),
            .ln_key = calloc(n_blocks, sizeof(float)),
            .block_idx = calloc(n_blocks, 4),
            .selected = calloc(n_blocks, 1)};
        sim_gpu_unit_run(&unit);
        free(unit.acc);
        free(unit.ln_m);
        free(unit.scratch);
        free(unit.selection.ln_e);
        free(unit.selection.ln_key);
        free(unit.selection.block_idx);
        free(unit.selection.selected);
    }
    free(q);
    item->certificate->mass_mean /= (float)shape->n_q_heads;
    gpu->counters[item->layer].n_misses += item->certificate->n_blocks_host;
    gpu->counters[item->layer].n_unfit += item->certificate->n_blocks_unfit;
    sim_gpu.n_steps++;
    sim_gpu.n_whole += item->mass == 1;
}

static int sim_gpu_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait)
{
    struct sim_gpu_launch *launch = &gpu->launch[0];
    if (sim_gpu_fails())
        return -EIO;
    CHECK(gpu->n_launches > 0 && launch->ticket == ticket); /* the owner takes them in order */
    if (!wait && launch->n_polls-- > 0)
        return 0;
    for (uint32_t i = 0; i < launch->n; i++) {
        sim_gpu_item_run(gpu, &launch->item[i]);
        free(launch->input[i]);
    }
    gpu->n_launches--;
    memmove(&gpu->launch[0], &gpu->launch[1], sizeof gpu->launch[0]);
    gpu->launch[1].n = 0;
    return 1;
}

static struct sim_gpu_build *sim_gpu_build_of(struct winnow_gpu *gpu, int64_t ticket)
{
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++)
        if (gpu->build[i].ticket == ticket)
            return &gpu->build[i];
    return NULL;
}

static int64_t sim_gpu_build(struct winnow_gpu *gpu, const uint32_t *homes)
{
    size_t n = (size_t)gpu->options.shape.n_kv_heads * gpu->options.segment_tokens / 16;
    struct sim_gpu_build *build = sim_gpu_build_of(gpu, 0);
    if (sim_gpu_fails())
        return -EIO;
    if (!build)
        return -EBUSY;
    *build = (struct sim_gpu_build){
        .ticket = ++gpu->n_tickets,
        .n_polls = sim_gpu.rng ? (uint32_t)winnow_rng_below(sim_gpu.rng, 40) : 0,
        .homes = sim_gpu_copy(homes, n * sizeof *homes),
    };
    return build->ticket;
}

static void sim_gpu_build_head(const struct winnow_gpu *gpu, const uint32_t *homes, uint16_t *order,
                               struct winnow_index_view *view)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    uint32_t n = gpu->options.segment_tokens / WINNOW_BLOCK_TOKENS;
    size_t k_floats = (size_t)WINNOW_BLOCK_TOKENS * shape->k_width;
    size_t v_floats = (size_t)WINNOW_BLOCK_TOKENS * shape->v_width;
    float *k = malloc(n * k_floats * sizeof *k), *v = malloc(n * v_floats * sizeof *v);
    void *scratch = aligned_alloc(64, (sim_gpu.kernels->scratch_bytes(shape, n) + 63) / 64 * 64);
    for (uint32_t b = 0; b < n; b++)
        sim_gpu.kernels->block_unpack(shape, gpu->device->arena + (size_t)homes[b] * 4096,
                                      k + b * k_floats, v + b * v_floats);
    CHECK_EQ(view->n_blocks, n);
    CHECK(!view->var);
    CHECK_EQ(sim_gpu.kernels->build(shape, n, k, v, order, view, scratch), 0);
    free(k);
    free(v);
    free(scratch);
}

static int sim_gpu_build_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait,
                              uint16_t *const *order, const struct winnow_index_view *views)
{
    uint32_t n_span = gpu->options.segment_tokens / WINNOW_BLOCK_TOKENS;
    struct sim_gpu_build *build = sim_gpu_build_of(gpu, ticket);
    if (sim_gpu_fails())
        return -EIO;
    CHECK(ticket > 0 && build);
    if (!wait && (sim_gpu.builds_held || build->n_polls > 0)) {
        build->n_polls -= build->n_polls > 0;
        return 0;
    }
    for (uint32_t head = 0; head < gpu->options.shape.n_kv_heads; head++) {
        struct winnow_index_view view = views[head];
        sim_gpu_build_head(gpu, build->homes + head * n_span, order[head], &view);
    }
    free(build->homes);
    *build = (struct sim_gpu_build){0};
    sim_gpu.n_builds++;
    return 1;
}

static void sim_gpu_window_rows(struct winnow_gpu *gpu, struct winnow_gpu_window_rows *rows)
{
    *rows = gpu->rows;
}

static int64_t sim_gpu_window(struct winnow_gpu *gpu, const struct winnow_gpu_window_part *part)
{
    const struct winnow_gpu_options *options = &gpu->options;
    size_t n_heads = options->shape.n_kv_heads, n = options->n_window_blocks;
    uint32_t n_most = 0;
    for (uint32_t head = 0; head < n_heads; head++) {
        CHECK(part->n_blocks[head] <= n);
        CHECK(part->is_last || part->n_blocks[head] % WINNOW_GROUP_BLOCKS == 0);
        CHECK(!part->position || part->n_blocks[head] == part->n_blocks[0]);
        n_most = part->n_blocks[head] > n_most ? part->n_blocks[head] : n_most;
    }
    CHECK(part->n_pos > 0 && part->n_pos <= options->n_window_positions);
    CHECK(gpu->n_parts_sent - gpu->n_parts_done < SIM_GPU_PARTS);
    if (sim_gpu_fails())
        return -EIO;
    struct sim_gpu_part *to = &gpu->part[gpu->n_parts_sent % SIM_GPU_PARTS];
    *to = (struct sim_gpu_part){
        .part = *part, .n_polls = sim_gpu.rng ? (uint32_t)winnow_rng_below(sim_gpu.rng, 4) : 0};
    to->part.n_blocks = sim_gpu_copy(part->n_blocks, n_heads * sizeof *part->n_blocks);
    to->part.homes = sim_gpu_copy(part->homes, n_heads * n * sizeof *part->homes);
    to->part.position =
        part->position ? sim_gpu_copy(part->position, n_most * sizeof *part->position) : NULL;
    to->part.n_tokens =
        part->position ? sim_gpu_copy(part->n_tokens, n_most * sizeof *part->n_tokens) : NULL;
    return ++gpu->n_parts_sent;
}

/* One head of a part. */
static void sim_gpu_part_head(struct winnow_gpu *gpu, const struct winnow_gpu_window_part *part,
                              uint32_t head)
{
    const struct winnow_model_shape *shape = &gpu->options.shape;
    size_t G = shape->n_q_heads / shape->n_kv_heads, n_pos = gpu->options.n_window_positions;
    size_t row = head * n_pos * G, stride = shape->v_width + 2;
    float *q = gpu->window_q + row * shape->k_width, *partial = gpu->window_partial + row * stride;
    size_t scratch_bytes = sim_gpu.kernels->window_scratch_bytes(shape, part->n_pos);
    void *scratch = aligned_alloc(64, (scratch_bytes + 64) / 64 * 64);
    if (part->is_first) {
        memcpy(q, gpu->rows.q + row * shape->k_width, part->n_pos * G * shape->k_width * sizeof *q);
        memset(partial, 0, part->n_pos * G * stride * sizeof *partial);
        for (uint32_t i = 0; i < part->n_pos * G; i++)
            partial[i * stride] = -INFINITY;
    }
    for (uint32_t i = 0; i < part->n_blocks[head]; i += WINNOW_GROUP_BLOCKS) {
        const void *block[WINNOW_GROUP_BLOCKS];
        uint64_t position[WINNOW_GROUP_BLOCKS];
        uint32_t n_tokens[WINNOW_GROUP_BLOCKS], n = 0;
        for (; n < WINNOW_GROUP_BLOCKS && i + n < part->n_blocks[head]; n++) {
            size_t at = head * (size_t)gpu->options.n_window_blocks + i + n;
            block[n] = gpu->device->arena + (size_t)part->homes[at] * 4096;
            position[n] = part->position ? part->position[i + n] : UINT64_MAX;
            n_tokens[n] = part->position ? part->n_tokens[i + n] : WINNOW_BLOCK_TOKENS;
        }
        sim_gpu.kernels->attend_window(shape, part->n_pos, part->first, q, n, block, position,
                                       n_tokens, partial, scratch);
    }
    for (size_t pos = 0; part->is_last && pos < part->n_pos; pos++)
        sim_gpu.kernels->finish(shape, partial + pos * G * stride,
                                gpu->rows.out + (row + pos * G) * shape->v_width,
                                gpu->rows.lse + row + pos * G);
    free(scratch);
}

static int sim_gpu_window_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait)
{
    if (sim_gpu_fails())
        return -EIO;
    CHECK(ticket > 0 && ticket <= gpu->n_parts_sent);
    while (gpu->n_parts_done < ticket) {
        struct sim_gpu_part *part = &gpu->part[gpu->n_parts_done % SIM_GPU_PARTS];
        if (!wait && part->n_polls-- > 0)
            return 0;
        for (uint32_t head = 0; head < gpu->options.shape.n_kv_heads; head++)
            sim_gpu_part_head(gpu, &part->part, head);
        sim_gpu.n_parts++;
        sim_gpu.n_windows += part->part.is_last;
        sim_gpu_part_free(part);
        gpu->n_parts_done++;
    }
    return 1;
}

static int sim_gpu_counters(struct winnow_gpu *gpu, uint32_t layer,
                            struct winnow_gpu_counters *counters)
{
    *counters = gpu->counters[layer];
    return sim_gpu.failed ? -EIO : 0;
}

static const struct winnow_kernels *sim_gpu_kernels(void)
{
    return sim_gpu.kernels;
}

static const struct winnow_gpu_api sim_gpu_api = {
    .name = "simulated",
    .probe = sim_gpu_probe,
    .sizes = sim_gpu_sizes,
    .open = sim_gpu_open,
    .close = sim_gpu_close,
    .create = sim_gpu_create,
    .destroy = sim_gpu_destroy,
    .segment_put = sim_gpu_segment_put,
    .homes_set = sim_gpu_homes_set,
    .segment_drop = sim_gpu_segment_drop,
    .session_set = sim_gpu_session_set,
    .tail_put = sim_gpu_tail_put,
    .decode = sim_gpu_decode,
    .poll = sim_gpu_poll,
    .build = sim_gpu_build,
    .build_poll = sim_gpu_build_poll,
    .window_rows = sim_gpu_window_rows,
    .window = sim_gpu_window,
    .window_poll = sim_gpu_window_poll,
    .counters = sim_gpu_counters,
    .kernels = sim_gpu_kernels,
};
