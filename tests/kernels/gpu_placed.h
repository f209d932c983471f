/*
 * A launch of the stages begin, tail, attend and more in device memory, with a selection placed by
 * hand: in slots, on the way, on the host without a slot, on disk.
 */
#pragma once

#include "gpu_units.h"

static uint32_t block_id(uint32_t item, uint32_t head, uint32_t b)
{
    uint32_t segment_slot = item * N_SEGMENTS_MAX + b / SPAN;
    return ((segment_slot * N_LAYERS + 1) * N_HEADS + head) * SPAN + b % SPAN;
}

/* Index, homes and the blocks' places in the host arena. */
static void segments_place(uint32_t item, uint32_t head)
{
    struct unit *unit = &scene.unit[item * N_HEADS + head];
    struct winnow_gpu_view *view = &scene.view;
    uint8_t *packed = case_alloc(view->unit_bytes);
    uint32_t homes[SPAN], pages = view->block_bytes / 4096;

    for (uint32_t b = 0; b < unit->n_blocks; b++)
        block_fragments(&unit->segment[b / SPAN], b % SPAN, 16,
                        scene.host + (size_t)block_id(item, head, b) * view->block_bytes);
    for (uint32_t s = 0; s < unit->n_blocks / SPAN; s++) {
        for (uint32_t b = 0; b < SPAN; b++)
            homes[b] = block_id(item, head, s * SPAN + b) * pages;
        winnow_gpu_index_pack(view, &unit->segment[s].view, homes, packed);
        to_device(view->index + (item * N_SEGMENTS_MAX + s) * view->segment_bytes +
                      (size_t)(N_HEADS + head) * view->unit_bytes,
                  packed, view->unit_bytes);
    }
    winnow_alloc_free(packed);
}

/* Sinks and tail but the newest token, which `tail` puts there. */
static void tail_place(uint32_t item, uint32_t head)
{
    const struct unit *unit = &scene.unit[item * N_HEADS + head];
    struct winnow_gpu_view *view = &scene.view;
    uint8_t *block = case_alloc(view->block_bytes);

    for (uint32_t i = 0; i < unit->n_tail_blocks; i++) {
        bool is_last = i + 1 == unit->n_tail_blocks;
        uint32_t number = i < N_SINK_BLOCKS ? i : i + unit->n_blocks, place = number;
        if (number >= N_SINK_BLOCKS)
            place = N_SINK_BLOCKS + (number - N_SINK_BLOCKS) % RING;
        memset(block, 0xff, view->block_bytes);
        block_fragments(&unit->tail, i, unit->n_tail_tokens[i] - is_last, block);
        to_device(view->tails + item * view->session_bytes +
                      ((size_t)(N_HEADS + head) * (N_SINK_BLOCKS + RING) + place) *
                          view->block_bytes,
                  block, view->block_bytes);
    }
    winnow_alloc_free(block);
}

static void view_init(void)
{
    const struct winnow_model_shape *shape = &scene.of.shape;
    struct winnow_gpu_view *view = &scene.view;
    struct cudaDeviceProp prop;
    size_t n_blocks = N_UNITS * N_BLOCKS_MAX, g = group();

    CUDA(cudaGetDeviceProperties(&prop, 0));
    *view = (struct winnow_gpu_view){.n_layers = N_LAYERS,
                                     .n_q_heads = N_HEADS * group(),
                                     .n_kv_heads = N_HEADS,
                                     .n_group = group(),
                                     .k_width = shape->k_width,
                                     .v_width = shape->v_width,
                                     .kv_dtype = shape->kv_dtype,
                                     .io_dtype = scene.io_dtype,
                                     .softmax_scale = 1.0f / sqrtf((float)shape->k_width),
                                     .span_blocks = SPAN,
                                     .n_sink_blocks = N_SINK_BLOCKS,
                                     .ring_blocks = RING,
                                     .block_bytes = winnow_block_bytes(shape),
                                     .n_slots_layer = N_SLOTS,
                                     .n_session_segments_max = N_SEGMENTS_MAX,
                                     .n_fetchers = 4};
    winnow_gpu_index_layout(view);
    view->segment_bytes = (uint64_t)N_LAYERS * N_HEADS * view->unit_bytes;
    view->session_bytes = (uint64_t)N_LAYERS * N_HEADS * (N_SINK_BLOCKS + RING) * view->block_bytes;
    view->index = device_alloc(N_ITEMS * N_SEGMENTS_MAX * view->segment_bytes, 0);
    view->slots = device_alloc((size_t)N_LAYERS * N_SLOTS * view->block_bytes, 0xff);
    view->slot_word = device_alloc(N_LAYERS * N_SLOTS * sizeof(uint64_t), 0);
    view->hand = device_alloc(N_LAYERS * sizeof(uint32_t), 0);
    view->counters = device_alloc(N_LAYERS * sizeof *view->counters, 0);
    view->tails = device_alloc(N_ITEMS * view->session_bytes, 0xff);
    view->session_segments = device_alloc(N_ITEMS * N_SEGMENTS_MAX * sizeof(uint32_t), 0);
    view->launch = device_alloc(sizeof *view->launch, 0);
    view->q_fragment =
        device_alloc(N_UNITS * winnow_gpu_q_fragment_words(view) * sizeof(uint32_t), 0xff);
    view->unit = device_alloc(N_UNITS * sizeof *view->unit, 0xff);
    view->tally = device_alloc(sizeof *view->tally, 0);
    view->queue = device_alloc(sizeof *view->queue, 0xff);
    view->ln_e = device_alloc(n_blocks * g * sizeof(float), 0xff);
    view->key = device_alloc(n_blocks * sizeof(float), 0xff);
    view->selected = device_alloc(n_blocks, 0xff);
    view->listed = device_alloc(n_blocks * sizeof *view->listed, 0xff);
    view->fetch = device_alloc(n_blocks * sizeof *view->fetch, 0xff);
    view->ready = device_alloc(n_blocks * sizeof *view->ready, 0xff);
    view->waiting = device_alloc(n_blocks * sizeof *view->waiting, 0xff);
    view->more = device_alloc((n_blocks + WINNOW_GPU_READY_SLACK) * sizeof *view->more, 0);
    view->bins = device_alloc(N_UNITS * (g + 1) * WINNOW_GPU_BINS * sizeof *view->bins, 0xff);
    view->partial =
        device_alloc(N_UNITS * PARTIALS * winnow_gpu_partial_floats(view) * sizeof(float), 0xff);
    size_t arena_bytes =
        (size_t)N_ITEMS * N_SEGMENTS_MAX * N_LAYERS * N_HEADS * SPAN * view->block_bytes;
    CUDA(cudaHostAlloc((void **)&scene.host, arena_bytes, cudaHostAllocMapped));
    memset(scene.host, 0xff, arena_bytes);
    CUDA(cudaHostGetDevicePointer((void **)&view->host, scene.host, 0));
    scene.grid = (struct winnow_gpu_grid){.n_units_max = N_UNITS,
                                          .n_multiprocessors = (uint32_t)prop.multiProcessorCount,
                                          .n_blocks_max = n_blocks};
    CUDA(winnow_gpu_stages_prepare(view));
}

static void view_finish(void)
{
    struct winnow_gpu_view *view = &scene.view;
    void *memory[] = {view->index,
                      view->slots,
                      view->slot_word,
                      view->hand,
                      view->counters,
                      view->tails,
                      view->session_segments,
                      view->launch,
                      view->q_fragment,
                      view->unit,
                      view->tally,
                      view->queue,
                      view->ln_e,
                      view->key,
                      view->selected,
                      view->listed,
                      view->fetch,
                      view->ready,
                      view->waiting,
                      view->more,
                      view->bins,
                      view->partial};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        CUDA(cudaFree(memory[i]));
    CUDA(cudaFreeHost(scene.host));
}

static size_t out_bytes(void)
{
    return (size_t)N_HEADS * group() * scene.of.shape.v_width * io_bytes();
}

/* q, k, v of an item to the device; its outputs. */
static void item_init(uint32_t i)
{
    struct winnow_gpu_item *item = &scene.launch->item[i];
    uint32_t k_width = scene.of.shape.k_width, v_width = scene.of.shape.v_width;
    size_t q_n = (size_t)group() * k_width;
    uint8_t *q = case_alloc(N_HEADS * q_n * 4), *k = case_alloc(N_HEADS * k_width * 4);
    uint8_t *v = case_alloc(N_HEADS * v_width * 4);

    for (uint32_t h = 0; h < N_HEADS; h++) {
        const struct unit *unit = &scene.unit[i * N_HEADS + h];
        size_t last = 16 * (unit->n_tail_blocks - 1) + (scene.n_tokens[i] - 1) % 16;
        for (size_t d = 0; d < q_n; d++)
            io_write(q, h * q_n + d, unit->q[d]);
        for (size_t d = 0; d < k_width; d++)
            io_write(k, h * k_width + d, unit->tail.k[last * k_width + d]);
        for (size_t d = 0; d < v_width; d++)
            io_write(v, h * v_width + d, unit->tail.v[last * v_width + d]);
    }
    scene.out[i] = device_alloc(out_bytes() + 2 * GUARD, 0xa5);
    scene.lse[i] = device_alloc(N_HEADS * group() * sizeof(float), 0xff);
    scene.certificate[i] = device_alloc(sizeof **scene.certificate, 0xff);
    scene.disk_block[i] = device_alloc(N_BLOCKS_MAX * sizeof(uint32_t), 0xff);
    *item = (struct winnow_gpu_item){.session = i,
                                     .layer = 1,
                                     .n_segments = scene.n_segments[i],
                                     .n_tokens = scene.n_tokens[i],
                                     .mass = scene.mass,
                                     .n_blocks_max = scene.n_blocks_max,
                                     .q = device_alloc(N_HEADS * q_n * 4, 0xff),
                                     .k = device_alloc(N_HEADS * k_width * 4, 0xff),
                                     .v = device_alloc(N_HEADS * v_width * 4, 0xff),
                                     .out = scene.out[i] + GUARD,
                                     .lse = scene.lse[i],
                                     .certificate = scene.certificate[i],
                                     .disk_block = scene.disk_block[i],
                                     .n_disk_block_max = N_BLOCKS_MAX};
    to_device((void *)(uintptr_t)item->q, q, N_HEADS * q_n * io_bytes());
    to_device((void *)(uintptr_t)item->k, k, N_HEADS * k_width * io_bytes());
    to_device((void *)(uintptr_t)item->v, v, N_HEADS * v_width * io_bytes());
    winnow_alloc_free(q);
    winnow_alloc_free(k);
    winnow_alloc_free(v);
}

static void scene_init(const struct kernel_case *of, enum kernel_input input, uint32_t io_dtype,
                       float mass, uint64_t seed)
{
    uint32_t segments[N_SEGMENTS_MAX * N_ITEMS], n_units = 0;

    scene.of = *of;
    scene.input = input;
    scene.io_dtype = io_dtype;
    scene.mass = mass;
    view_init();
    for (uint32_t i = 0; i < N_ITEMS; i++)
        for (uint32_t h = 0; h < N_HEADS; h++, n_units++) {
            unit_init(&scene.unit[n_units], i, seed + 1000 * n_units);
            segments_place(i, h);
            tail_place(i, h);
        }
    for (uint32_t i = 0; i < N_ITEMS * N_SEGMENTS_MAX; i++)
        segments[i] = i;
    to_device(scene.view.session_segments, segments, sizeof segments);
    scene.launch = case_alloc(sizeof *scene.launch);
    memset(scene.launch, 0, sizeof *scene.launch);
    scene.launch->n_items = N_ITEMS;
    scene.launch->n_units = N_UNITS;
    scene.launch->stamp = STAMP;
    for (uint32_t i = 0, at = 0; i < N_ITEMS; at += N_HEADS * SPAN * scene.n_segments[i++]) {
        item_init(i);
        scene.launch->block_first[i] = at;
        scene.launch->partial_first[i] = i * N_HEADS * PARTIALS;
        scene.launch->partials_of_head[i] = PARTIALS;
    }
    to_device(scene.view.launch, scene.launch, sizeof *scene.launch);
}

static void scene_finish(void)
{
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        struct winnow_gpu_item *item = &scene.launch->item[i];
        void *memory[] = {(void *)(uintptr_t)item->q,
                          (void *)(uintptr_t)item->k,
                          (void *)(uintptr_t)item->v,
                          scene.out[i],
                          scene.lse[i],
                          scene.certificate[i],
                          scene.disk_block[i]};
        for (size_t m = 0; m < sizeof memory / sizeof *memory; m++)
            CUDA(cudaFree(memory[m]));
    }
    for (uint32_t u = 0; u < N_UNITS; u++)
        unit_finish(&scene.unit[u]);
    winnow_alloc_free(scene.launch);
    view_finish();
}

/* How the selected blocks are found: in percent; the rest is in a slot. */
struct places {
    uint32_t missed, unfit, on_disk;
};

/* What select would have left, for all units of the launch. */
struct planted {
    struct winnow_gpu_queue queue;
    struct winnow_gpu_fetch fetch[N_UNITS * N_BLOCKS_MAX];
    struct winnow_gpu_work ready[N_UNITS * N_BLOCKS_MAX], waiting[N_UNITS * N_BLOCKS_MAX];
    uint64_t word[N_SLOTS];
    uint32_t n_slots;
};

static struct planted planted;

/* A place for block b of a unit; true: a group with it has to wait. */
static bool block_plant(struct unit *unit, uint32_t u, uint32_t b, const struct places *places,
                        struct winnow_rng *rng, struct winnow_gpu_unit *to, uint32_t *place)
{
    struct winnow_gpu_view *view = &scene.view;
    uint32_t id = block_id(u / N_HEADS, u % N_HEADS, b), pages = view->block_bytes / 4096;
    uint32_t chance = (uint32_t)winnow_rng_below(rng, 100), slot = N_SLOTS + planted.n_slots;

    if (chance < places->on_disk) {
        *place = WINNOW_GPU_ON_DISK;
        unit->selected[b] = 0;
        to->n_disk++;
        return false;
    }
    chance = (uint32_t)winnow_rng_below(rng, 100);
    if (chance < places->unfit) {
        *place = WINNOW_GPU_FROM_HOST | id * pages;
        to->n_host++;
        to->n_unfit++;
        return false;
    }
    *place = slot;
    planted.word[planted.n_slots] = (id + UINT64_C(1)) << 32 | STAMP;
    bool is_missed = chance < places->unfit + places->missed;
    if (is_missed) {
        to->n_host++;
        planted.word[planted.n_slots] |= WINNOW_GPU_FETCHING;
        planted.fetch[planted.queue.n_fetch++] =
            (struct winnow_gpu_fetch){.home = id * pages, .slot = slot};
    } else {
        to->n_device++;
        to_device(view->slots + (size_t)slot * view->block_bytes,
                  scene.host + (size_t)id * view->block_bytes, view->block_bytes);
    }
    planted.n_slots++;
    return is_missed;
}

static void unit_plant(uint32_t u, const struct places *places, struct winnow_rng *rng,
                       struct winnow_gpu_unit *to)
{
    struct unit *unit = &scene.unit[u];
    struct winnow_selection *sel = &unit->sel;
    struct winnow_gpu_queue *queue = &planted.queue;
    uint32_t n = 0, n_quarter = (sel->n_selected + 3) / 4 > 4 ? (sel->n_selected + 3) / 4 : 4;
    bool waits = false;

    for (uint32_t i = 0; i < to->n_chunks; i++)
        planted.ready[queue->n_ready++] = (struct winnow_gpu_work){u, WINNOW_GPU_WORK_CHUNK | i};
    for (uint32_t b = 0; b < unit->n_blocks; b++) {
        if (!unit->selected[b])
            continue;
        unit->listed[n].block = b;
        waits |= block_plant(unit, u, b, places, rng, to, &unit->listed[n].place);
        n++;
        if (n % 8 && n < sel->n_selected)
            continue;
        struct winnow_gpu_work work = {u, (n - 1) / 8};
        if (waits)
            planted.waiting[queue->n_waiting++] = work;
        else
            planted.ready[queue->n_ready++] = work;
        waits = false;
    }
    CHECK_EQ(n, sel->n_selected);
    to->n_selected = n;
    to->n_groups = (n + 7) / 8;
    to->key_largest = unit->n_blocks ? sel->ln_key[sel->block_idx[0]] : -INFINITY;
    to->key_threshold = n ? sel->ln_key[sel->block_idx[n - 1]] : to->key_largest;
    to->key_quarter = n > n_quarter ? sel->ln_key[sel->block_idx[n - n_quarter - 1]] : INFINITY;
    winnow_ref_largest(sel, false, to->largest);
}

/* How far a logit on the device may lie from the exact one: anywhere once sums overflow. */
static double logit_difference(const struct unit *unit, uint32_t g)
{
    uint32_t width = scene.of.shape.k_width;
    double largest = 0;

    for (uint32_t s = 0; s <= unit->n_blocks / SPAN; s++) {
        const struct kernel_data *data =
            s < unit->n_blocks / SPAN ? &unit->segment[s] : &unit->tail;
        for (size_t t = 0; t < 16 * (size_t)data->n_blocks; t++) {
            double sum = 0;
            for (uint32_t d = 0; d < width; d++)
                sum += fabs((double)unit->q[g * width + d] * (double)data->k[t * width + d]);
            largest = fmax(largest, sum);
        }
    }
    if (largest > (double)FLT_MAX)
        return INFINITY;
    return (scene.of.shape.kv_dtype == WINNOW_BF16 ? 0x1p-16 : 0x1p-20) *
           (double)scene.view.softmax_scale * largest;
}

/* Mass of sinks and tail for a query head, the ln of it, from the partials that tail left. */
static double tail_ln_z(const struct winnow_gpu_unit *unit, uint32_t g)
{
    uint32_t row = winnow_gpu_partial_floats(&scene.view);
    float of[WINNOW_GPU_TAIL_GROUPS_MAX][2];
    double largest = -INFINITY, sum = 0;

    for (uint32_t i = 0; i < unit->n_tail_groups; i++) {
        from_device(of[i], scene.view.partial + (size_t)(unit->partial_first + i) * row + 4 * g,
                    sizeof of[i]);
        largest = fmax(largest, (double)of[i][0]);
    }
    for (uint32_t i = 0; i < unit->n_tail_groups; i++)
        sum += (double)of[i][1] * exp((double)of[i][0] - largest);
    return largest + log(sum);
}

/* One launch: tail, the plan planted, attend. Poisons what is written. */
static void launch(const struct places *places, uint32_t n_fetchers, uint64_t seed)
{
    struct winnow_gpu_view *view = &scene.view;
    struct winnow_gpu_unit units[N_UNITS];
    struct winnow_rng rng;
    size_t g = group();

    winnow_rng_init(&rng, seed);
    view->n_fetchers = n_fetchers;
    CUDA(cudaMemset(view->slots + (size_t)N_SLOTS * view->block_bytes, 0xff,
                    (size_t)N_SLOTS * view->block_bytes));
    CUDA(cudaMemset(view->partial, 0xff,
                    N_UNITS * PARTIALS * winnow_gpu_partial_floats(view) * sizeof(float)));
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        CUDA(cudaMemset(scene.out[i] + GUARD, 0xa5, out_bytes()));
        CUDA(cudaMemset(scene.certificate[i], 0xff, sizeof **scene.certificate));
    }
    CUDA(winnow_gpu_stage_tail_first(view, &scene.grid, 0));
    CUDA(cudaDeviceSynchronize());
    from_device(units, view->unit, sizeof units);
    memset(&planted, 0, sizeof planted);
    for (uint32_t u = 0; u < N_UNITS; u++) {
        struct unit *unit = &scene.unit[u];
        if (units[u].status) {
            planted.ready[planted.queue.n_ready++] =
                (struct winnow_gpu_work){u, WINNOW_GPU_WORK_CHUNK};
            continue;
        }
        for (uint32_t i = 0; i < g; i++)
            CHECK_NEAR(tail_ln_z(&units[u], i), unit->ln_z[i], 1e-3 + logit_difference(unit, i));
        memset(unit->selected, 0, unit->n_blocks);
        for (uint32_t i = 0; i < unit->sel.n_selected; i++)
            unit->selected[unit->block_idx[i]] = 1;
        unit_plant(u, places, &rng, &units[u]);
        size_t at = units[u].block_first;
        to_device(view->ln_e + at * g, unit->ln_e, unit->n_blocks * g * sizeof(float));
        to_device(view->key + at, unit->ln_key, unit->n_blocks * sizeof(float));
        to_device(view->selected + at, unit->selected, unit->n_blocks);
        to_device(view->listed + at, unit->listed, unit->n_blocks * sizeof *unit->listed);
    }
    to_device(view->unit, units, sizeof units);
    to_device(view->queue, &planted.queue, sizeof planted.queue);
    to_device(view->fetch, planted.fetch, sizeof planted.fetch);
    to_device(view->ready, planted.ready, sizeof planted.ready);
    to_device(view->waiting, planted.waiting, sizeof planted.waiting);
    to_device(view->slot_word + N_SLOTS, planted.word, sizeof planted.word);
    CUDA(winnow_gpu_stage_attend(view, &scene.grid, 0));
    CUDA(cudaDeviceSynchronize());
}
