/*
 * begin, tail, attend and more on the device against ref/, with selection made by ref/ and placed by
 * hand: blocks in slots, on their way, on the host without a slot, on disk.
 *
 * Logits on the device are as exact as a query in two 16-bit halves: 2^-16 of the largest sum of
 * |q_i k_i| (bf16; fp16 2^-20); outputs may differ by twice that, as in versions.h.
 */
#include <cuda_runtime_api.h>
#include <errno.h>
#include <float.h>
#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/stage.h>
#include <kernels/ref/ref.h>
#include <test.h>

#include "cases.h"

enum {
    N_HEADS = 2,
    SPAN = 40, /* blocks a segment: chunks and warps of a chunk cross segments */
    N_SEGMENTS_MAX = 14,
    N_ITEMS = 2,
    N_BLOCKS_MAX = SPAN * N_SEGMENTS_MAX,
    N_UNITS = N_ITEMS * N_HEADS,
    RING = 24,
    N_SINK_BLOCKS = 1,
    N_TAIL_BLOCKS_MAX = N_SINK_BLOCKS + RING,
    N_LAYERS = 2, /* the second one is attended */
    N_SLOTS = 8192,
    STAMP = 7,
    PARTIALS = 4 + N_TAIL_BLOCKS_MAX / 8 + N_BLOCKS_MAX / 8 + 8 + N_BLOCKS_MAX / 512,
    GUARD = 64,
};

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t cuda_rc = (call);                                                              \
        if (cuda_rc != cudaSuccess)                                                                \
            test_fail(__FILE__, __LINE__, cudaGetErrorString(cuda_rc));                            \
    } while (0)

static const struct winnow_kernels *ref;

/* A unit as the host knows it. */
struct unit {
    struct kernel_data segment[N_SEGMENTS_MAX], tail;
    uint32_t n_blocks, n_tail_blocks, n_tail_tokens[N_TAIL_BLOCKS_MAX];
    float *q; /* [G][k_width] as io_dtype holds it */
    float ln_z[WINNOW_GQA_MAX], *tail_acc, *ln_e, *ln_m, *ln_key;
    uint32_t *block_idx;
    uint8_t *selected, *scratch;
    struct winnow_selection sel;
    float rho[WINNOW_GQA_MAX];
    struct winnow_gpu_listed listed[N_BLOCKS_MAX];
};

struct scene {
    struct kernel_case of;
    enum kernel_input input;
    uint32_t io_dtype, n_segments[N_ITEMS];
    uint64_t n_tokens[N_ITEMS];
    float mass;
    uint32_t n_blocks_max;
    struct unit unit[N_UNITS];
    struct winnow_gpu_view view;
    struct winnow_gpu_launch *launch; /* host's copy */
    struct winnow_gpu_grid grid;
    uint8_t *host; /* the arena */
    uint8_t *out[N_ITEMS];
    float *lse[N_ITEMS];
    struct winnow_gpu_certificate *certificate[N_ITEMS];
    uint32_t *disk_block[N_ITEMS];
};

static struct scene scene;

static void *device_alloc(size_t n_bytes, int fill)
{
    void *memory;
    CUDA(cudaMalloc(&memory, n_bytes));
    CUDA(cudaMemset(memory, fill, n_bytes));
    return memory;
}

static void to_device(void *to, const void *from, size_t n_bytes)
{
    CUDA(cudaMemcpy(to, from, n_bytes, cudaMemcpyHostToDevice));
}

static void from_device(void *to, const void *from, size_t n_bytes)
{
    CUDA(cudaMemcpy(to, from, n_bytes, cudaMemcpyDeviceToHost));
}

static size_t io_bytes(void)
{
    return scene.io_dtype == WINNOW_FP32 ? 4 : 2;
}

/* x as io_dtype holds it; what does not fit becomes the largest that does. */
static float io_round(float x)
{
    uint16_t bits;
    if (scene.io_dtype == WINNOW_FP32)
        return x;
    if (scene.io_dtype == WINNOW_FP16) {
        bits = winnow_ref_float_to_fp16(fmaxf(fminf(x, 65504.0f), -65504.0f));
        return winnow_ref_fp16_to_float(bits);
    }
    return winnow_ref_bf16_to_float(winnow_ref_float_to_bf16(fmaxf(fminf(x, 3e38f), -3e38f)));
}

static void io_write(uint8_t *at, size_t idx, float x)
{
    if (scene.io_dtype == WINNOW_FP32)
        ((float *)at)[idx] = x;
    else
        ((uint16_t *)at)[idx] = scene.io_dtype == WINNOW_FP16 ? winnow_ref_float_to_fp16(x)
                                                              : winnow_ref_float_to_bf16(x);
}

static float io_read(const uint8_t *at, size_t idx)
{
    float x;
    winnow_ref_widen(scene.io_dtype, 1, at + idx * io_bytes(), &x);
    return x;
}

static uint32_t group(void)
{
    return scene.of.shape.n_q_heads;
}

static uint32_t stride(void)
{
    return scene.of.shape.v_width + 2;
}

static struct winnow_model_shape fragments(const struct winnow_model_shape *shape)
{
    struct winnow_model_shape other = *shape;
    other.block_layout = WINNOW_BLOCK_FRAGMENTS;
    return other;
}

/* Block b of data in layout 2. */
static void block_fragments(const struct kernel_data *data, uint32_t b, uint32_t n_tokens,
                            uint8_t *to)
{
    struct winnow_model_shape shape = fragments(&data->shape);
    static float k[16 * WINNOW_WIDTH_MAX], v[16 * WINNOW_WIDTH_MAX];

    ref->block_unpack(&data->shape, data->block[b], k, v);
    ref->block_pack(&shape, 0, n_tokens, k, v, to);
}

/* Blocks of a segment hold its tokens in the order of the index. */
static void segment_order(struct kernel_data *data)
{
    uint32_t k_width = data->shape.k_width, v_width = data->shape.v_width;
    static float k[16 * WINNOW_WIDTH_MAX], v[16 * WINNOW_WIDTH_MAX];

    for (uint32_t b = 0; b < data->n_blocks; b++) {
        for (uint32_t t = 0; t < 16; t++) {
            memcpy(k + t * k_width, data->k + (size_t)data->order[16 * b + t] * k_width,
                   k_width * sizeof *k);
            memcpy(v + t * v_width, data->v + (size_t)data->order[16 * b + t] * v_width,
                   v_width * sizeof *v);
        }
        ref->block_pack(&data->shape, 0, 16, k, v, data->blocks + b * data->block_bytes);
    }
}

static const struct kernel_data *unit_block(const struct unit *unit, uint32_t b, uint32_t *ret_b)
{
    *ret_b = b % SPAN;
    return &unit->segment[b / SPAN];
}

static void partial_clear(float *acc)
{
    memset(acc, 0, sizeof *acc * group() * stride());
    for (uint32_t g = 0; g < group(); g++)
        acc[g * stride()] = -INFINITY;
}

static void unit_tail(struct unit *unit)
{
    float *partial = case_alloc(unit->tail.n_partial * sizeof(float));

    partial_clear(unit->tail_acc);
    for (uint32_t b = 0; b < unit->n_tail_blocks; b += 8) {
        uint32_t n = unit->n_tail_blocks - b < 8 ? unit->n_tail_blocks - b : 8;
        ref->attend_partial(&unit->tail.shape, unit->q, n, unit->tail.block + b,
                            unit->n_tail_tokens + b, partial, NULL);
        ref->merge(&unit->tail.shape, 1, partial, unit->tail_acc);
    }
    for (uint32_t g = 0; g < group(); g++)
        unit->ln_z[g] = unit->tail_acc[g * stride()] + logf(unit->tail_acc[g * stride() + 1]);
    winnow_alloc_free(partial);
}

/* The newest token has come through io_dtype. */
static void newest_round(struct unit *unit, uint32_t t)
{
    struct kernel_data *data = &unit->tail;
    uint32_t k_width = data->shape.k_width, v_width = data->shape.v_width;
    uint32_t b = unit->n_tail_blocks - 1;
    float *k = data->k + (16 * (size_t)b + t) * k_width,
          *v = data->v + (16 * (size_t)b + t) * v_width;

    for (uint32_t d = 0; d < k_width; d++)
        k[d] = io_round(k[d]);
    for (uint32_t d = 0; d < v_width; d++)
        v[d] = io_round(v[d]);
    ref->block_pack(&data->shape, t, 1, k, v, data->blocks + b * data->block_bytes);
}

static void unit_init(struct unit *unit, uint32_t item, uint64_t seed)
{
    const struct kernel_case *of = &scene.of;
    uint32_t n_segments = scene.n_segments[item], n = n_segments * SPAN;
    uint64_t n_all = (scene.n_tokens[item] + 15) / 16;

    *unit = (struct unit){.n_blocks = n};
    for (uint32_t s = 0; s < n_segments; s++) {
        case_data_init(&unit->segment[s], of, scene.input, SPAN, 1, seed + s);
        segment_order(&unit->segment[s]);
    }
    unit->n_tail_blocks = (uint32_t)(n_all - n);
    case_data_init(&unit->tail, of, scene.input, unit->n_tail_blocks, 1, seed + 100);
    for (uint32_t b = 0; b < unit->n_tail_blocks; b++)
        unit->n_tail_tokens[b] = 16;
    unit->n_tail_tokens[unit->n_tail_blocks - 1] = (uint32_t)(scene.n_tokens[item] - 1) % 16 + 1;
    newest_round(unit, (uint32_t)(scene.n_tokens[item] - 1) % 16);
    uint32_t n_q = group() * of->shape.k_width;
    unit->q = case_alloc(n_q * sizeof(float));
    for (uint32_t i = 0; i < n_q; i++)
        unit->q[i] = io_round(unit->segment[0].q ? unit->segment[0].q[i] : unit->tail.q[i]);
    unit->tail_acc = case_alloc(unit->tail.n_partial * sizeof(float));
    unit->ln_e = case_alloc((n + 1) * group() * sizeof(float));
    unit->ln_m = case_alloc((n + 1) * group() * sizeof(float));
    unit->ln_key = case_alloc((n + 1) * sizeof(float));
    unit->block_idx = case_alloc((n + 1) * sizeof(uint32_t));
    unit->selected = case_alloc(n + 1);
    unit->scratch = case_alloc(ref->scratch_bytes(&of->shape, n + 1));
    unit_tail(unit);
    for (uint32_t s = 0; s < n_segments; s++)
        ref->score(&unit->segment[s].shape, WINNOW_POLICY_CODES, &unit->segment[s].view, unit->q,
                   unit->ln_e + s * SPAN * group(), unit->scratch);
    unit->sel =
        (struct winnow_selection){.n_q = group(),
                                  .n_blocks = n,
                                  .n_blocks_max = scene.n_blocks_max ? scene.n_blocks_max : n,
                                  .mass = scene.mass,
                                  .ln_z = unit->ln_z,
                                  .ln_m = unit->ln_m,
                                  .ln_e = unit->ln_e,
                                  .ln_key = unit->ln_key,
                                  .block_idx = unit->block_idx,
                                  .selected = unit->selected};
    if (unit->sel.n_blocks_max > n)
        unit->sel.n_blocks_max = n;
    ref->select(WINNOW_POLICY_CODES, &unit->sel, unit->scratch);
}

static void unit_finish(struct unit *unit)
{
    for (uint32_t s = 0; s < unit->n_blocks / SPAN; s++)
        case_data_finish(&unit->segment[s]);
    case_data_finish(&unit->tail);
    void *memory[] = {unit->q,      unit->tail_acc,  unit->ln_e,     unit->ln_m,
                      unit->ln_key, unit->block_idx, unit->selected, unit->scratch};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        winnow_alloc_free(memory[i]);
}

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

/* Sinks and tail but the newest token, which `begin` puts there. */
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
    view->queue = device_alloc(2 * sizeof *view->queue, 0xff);
    view->ln_e = device_alloc(n_blocks * g * sizeof(float), 0xff);
    view->key = device_alloc(n_blocks * sizeof(float), 0xff);
    view->selected = device_alloc(n_blocks, 0xff);
    view->listed = device_alloc(n_blocks * sizeof *view->listed, 0xff);
    view->ln_m = device_alloc(n_blocks * g * sizeof(float), 0xff);
    view->fetch = device_alloc(n_blocks * sizeof *view->fetch, 0xff);
    view->ready = device_alloc(n_blocks * sizeof *view->ready, 0xff);
    view->waiting = device_alloc(n_blocks * sizeof *view->waiting, 0xff);
    view->partial = device_alloc(N_UNITS * PARTIALS * g * stride() * sizeof(float), 0xff);
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
                      view->queue,
                      view->ln_e,
                      view->key,
                      view->selected,
                      view->listed,
                      view->ln_m,
                      view->fetch,
                      view->ready,
                      view->waiting,
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
    struct winnow_gpu_queue queue[2];
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
        planted.fetch[planted.queue[0].n_fetch++] =
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
    struct winnow_gpu_queue *queue = &planted.queue[0];
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

/* One launch: begin and tail, the plan planted, attend and more. Poisons what is written. */
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
    CUDA(cudaMemset(view->partial, 0xff, N_UNITS * PARTIALS * g * stride() * sizeof(float)));
    CUDA(cudaMemset(view->ln_m, 0xff, N_UNITS * N_BLOCKS_MAX * g * sizeof(float)));
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        CUDA(cudaMemset(scene.out[i] + GUARD, 0xa5, out_bytes()));
        CUDA(cudaMemset(scene.certificate[i], 0xff, sizeof **scene.certificate));
    }
    CUDA(winnow_gpu_stage_begin(view, &scene.grid, 0));
    CUDA(winnow_gpu_stage_tail(view, &scene.grid, 0));
    CUDA(cudaDeviceSynchronize());
    from_device(units, view->unit, sizeof units);
    memset(&planted, 0, sizeof planted);
    for (uint32_t u = 0; u < N_UNITS; u++) {
        struct unit *unit = &scene.unit[u];
        if (units[u].status)
            continue;
        for (uint32_t i = 0; i < g; i++)
            CHECK_NEAR(units[u].ln_z[i], unit->ln_z[i], 1e-3 + logit_difference(unit, i));
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
    to_device(view->queue, planted.queue, sizeof planted.queue);
    to_device(view->fetch, planted.fetch, sizeof planted.fetch);
    to_device(view->ready, planted.ready, sizeof planted.ready);
    to_device(view->waiting, planted.waiting, sizeof planted.waiting);
    to_device(view->slot_word + N_SLOTS, planted.word, sizeof planted.word);
    CUDA(winnow_gpu_stage_attend(view, &scene.grid, 0));
    CUDA(winnow_gpu_stage_more(view, &scene.grid, 0));
    CUDA(cudaDeviceSynchronize());
}

static double values_largest(const struct unit *unit)
{
    double largest = 0;
    uint32_t width = scene.of.shape.v_width;

    for (uint32_t s = 0; s <= unit->n_blocks / SPAN; s++) {
        const struct kernel_data *data =
            s < unit->n_blocks / SPAN ? &unit->segment[s] : &unit->tail;
        for (size_t i = 0; i < 16 * (size_t)data->n_blocks * width; i++)
            largest = fmax(largest, fabs((double)data->v[i]));
    }
    return largest;
}

/* What ref says of the blocks marked in unit->selected; last_key: of the last one selected. */
static void unit_expect(struct unit *unit, float last_key, float *out, float *lse)
{
    const struct winnow_model_shape *shape = &unit->tail.shape;
    float *acc = case_alloc(unit->tail.n_partial * sizeof(float));
    float *partial = case_alloc(unit->tail.n_partial * sizeof(float));
    struct winnow_selection sel = unit->sel;
    uint32_t last = 0;

    memcpy(acc, unit->tail_acc, unit->tail.n_partial * sizeof(float));
    for (uint32_t b = 0; b < unit->n_blocks; b++) {
        uint32_t in_segment, n_tokens = 16;
        const struct kernel_data *data = unit_block(unit, b, &in_segment);
        if (!unit->selected[b])
            continue;
        ref->attend_partial(shape, unit->q, 1, data->block + in_segment, &n_tokens, partial,
                            unit->ln_m + b * group());
        ref->merge(shape, 1, partial, acc);
    }
    for (uint32_t b = 0; b < unit->n_blocks; b++)
        if (unit->ln_key[b] == last_key)
            last = b;
    sel.block_idx = &last;
    sel.n_selected = 1;
    for (uint32_t s = 0; s < unit->n_blocks / SPAN; s++) {
        partial_clear(partial);
        ref->compensate(shape, &unit->segment[s].view, &sel, s * SPAN, partial);
        ref->merge(shape, 1, partial, acc);
    }
    ref->finish(shape, acc, out, lse);
    winnow_alloc_free(acc);
    winnow_alloc_free(partial);
}

static double error_largest;

static void unit_check(uint32_t u, const uint8_t *out_item, const float *lse_item,
                       const struct winnow_gpu_unit *of)
{
    struct unit *unit = &scene.unit[u];
    uint32_t v_width = scene.of.shape.v_width, head = u % N_HEADS;
    float *out = case_alloc(group() * v_width * sizeof(float)), lse[WINNOW_GQA_MAX];
    float mass[WINNOW_GQA_MAX], ln_m_device[WINNOW_GQA_MAX];
    double v_largest = values_largest(unit);
    double io_eps = scene.io_dtype == WINNOW_FP32   ? 0
                    : scene.io_dtype == WINNOW_FP16 ? 0x1p-11
                                                    : 0x1p-8;

    unit_expect(unit, of->key_threshold, out, lse);
    for (uint32_t g = 0; g < group(); g++) {
        double difference = logit_difference(unit, g);
        double tolerance = (2 * fmin(difference, 1) + 1e-4) * v_largest;
        size_t row = head * group() + g;
        CHECK_NEAR(lse_item[row], lse[g], difference + 1e-4 + 1e-6 * fabs((double)lse[g]));
        for (uint32_t d = 0; d < v_width; d++) {
            double x = (double)io_read(out_item, row * v_width + d),
                   y = (double)out[g * v_width + d];
            if (fabs(x - y) > tolerance + io_eps * fabs(y) + 0x1p-24)
                fprintf(stderr, "%s, %s, unit %u, g %u, d %u: %.9g, ref has %.9g\n", scene.of.name,
                        kernel_input_name[scene.input], u, g, d, x, y);
            CHECK(fabs(x - y) <= tolerance + io_eps * fabs(y) + 0x1p-24);
            if (scene.input == INPUT_RANDOM && scene.io_dtype == WINNOW_FP32)
                error_largest = fmax(error_largest, fabs(x - y) / v_largest);
        }
        for (uint32_t b = 0; b < unit->n_blocks; b++)
            if (unit->selected[b] == 1) {
                from_device(ln_m_device, scene.view.ln_m + (of->block_first + b) * group() + g, 4);
                CHECK_NEAR(ln_m_device[0], unit->ln_m[b * group() + g],
                           difference + 1e-4 + 1e-6 * fabs((double)unit->ln_m[b * group() + g]));
                break;
            }
    }
    if (scene.input == INPUT_RANDOM || scene.input == INPUT_NEEDLE) {
        struct winnow_selection sel = unit->sel;
        memcpy(unit->rho, of->rho, sizeof unit->rho);
        ref->select_more(&sel, unit->rho, mass, 0, unit->scratch);
        for (uint32_t g = 0; g < group(); g++)
            CHECK_NEAR(of->mass[g], mass[g], 2e-3);
    }
    winnow_alloc_free(out);
}

/* rho of a unit that was selected and attended whole, as ref prices it. */
static void rho_check(uint32_t u, const struct winnow_gpu_unit *of)
{
    struct unit *unit = &scene.unit[u];
    struct winnow_selection sel = unit->sel;
    uint8_t *selected = case_alloc(unit->n_blocks + 1);
    float rho[WINNOW_GQA_MAX], mass[WINNOW_GQA_MAX];

    memcpy(selected, unit->selected, unit->n_blocks);
    for (uint32_t b = 0; b < unit->n_blocks; b++)
        selected[b] = selected[b] == 1; /* before the second round */
    sel.selected = selected;
    ref->select_more(&sel, rho, mass, 1, unit->scratch);
    for (uint32_t g = 0; g < group(); g++)
        CHECK_NEAR(of->rho[g], rho[g], 2e-3 * (double)rho[g]);
    winnow_alloc_free(selected);
}

static void certificate_check(uint32_t i, const struct winnow_gpu_unit *units)
{
    struct winnow_gpu_certificate c;
    uint32_t n_device = 0, n_host = 0, n_unfit = 0, n_disk = 0, n_rounds = 1;
    float least = INFINITY;

    from_device(&c, scene.certificate[i], sizeof c);
    for (uint32_t h = 0; h < N_HEADS; h++) {
        const struct winnow_gpu_unit *unit = units + i * N_HEADS + h;
        for (uint32_t g = 0; g < group(); g++)
            least = fminf(least, unit->mass[g]);
        n_device += unit->n_device;
        n_host += unit->n_host;
        n_unfit += unit->n_unfit;
        n_disk += unit->n_disk;
        if (unit->n_more)
            n_rounds = 2;
    }
    CHECK_EQ(c.status, 0);
    CHECK_EQ(c.n_rounds, n_rounds);
    CHECK(c.mass_reached == least && c.mass_mean >= least && c.mass_mean <= 1);
    CHECK_EQ(c.n_blocks_device, n_device);
    CHECK_EQ(c.n_blocks_host, n_host);
    CHECK_EQ(c.n_blocks_unfit, n_unfit);
    CHECK_EQ(c.n_blocks_disk, n_disk);
}

static void scene_check(bool is_rho_known)
{
    struct winnow_gpu_unit units[N_UNITS];
    uint8_t *out = case_alloc(out_bytes() + 2 * GUARD);
    float *lse = case_alloc(N_HEADS * group() * sizeof(float));

    from_device(units, scene.view.unit, sizeof units);
    for (uint32_t u = 0; u < N_UNITS; u++)
        from_device(scene.unit[u].selected, scene.view.selected + units[u].block_first,
                    scene.unit[u].n_blocks);
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        from_device(out, scene.out[i], out_bytes() + 2 * GUARD);
        from_device(lse, scene.lse[i], N_HEADS * group() * sizeof(float));
        for (uint32_t at = 0; at < GUARD; at++)
            CHECK(out[at] == 0xa5 && out[GUARD + out_bytes() + at] == 0xa5);
        for (uint32_t h = 0; h < N_HEADS; h++) {
            unit_check(i * N_HEADS + h, out + GUARD, lse, &units[i * N_HEADS + h]);
            if (is_rho_known)
                rho_check(i * N_HEADS + h, &units[i * N_HEADS + h]);
        }
        certificate_check(i, units);
    }
    winnow_alloc_free(out);
    winnow_alloc_free(lse);
}

#define CASE(name, n_q, k_width, v_width, dtype) KERNEL_CASE(name, n_q, k_width, v_width, dtype)

static const struct kernel_case cases[] = {
    CASE("llama", 4, 128, 128, WINNOW_BF16),      CASE("smollm2", 3, 64, 64, WINNOW_FP16),
    CASE("qwen", 7, 128, 128, WINNOW_FP16),       CASE("narrow-v", 2, 192, 112, WINNOW_BF16),
    CASE("one-to-one", 1, 256, 256, WINNOW_FP16), CASE("one-to-16", 16, 80, 48, WINNOW_FP16),
    CASE("widest", 16, 256, 256, WINNOW_BF16),    CASE("smallest", 1, 16, 16, WINNOW_BF16),
    CASE("eight", 8, 64, 128, WINNOW_BF16),       CASE("narrow-16", 9, 48, 64, WINNOW_BF16),
};

static void lengths(uint32_t a, uint64_t a_tail, uint32_t b, uint64_t b_tail)
{
    scene.n_segments[0] = a;
    scene.n_segments[1] = b;
    scene.n_tokens[0] = (uint64_t)a * SPAN * 16 + a_tail;
    scene.n_tokens[1] = (uint64_t)b * SPAN * 16 + b_tail;
}

/* Every form, every input, whatever the blocks' places: outputs, ln z, ln m, certificate and rho are
 * the reference's. */
static void test_attend__is_as_ref(void)
{
    static const uint32_t io[] = {WINNOW_FP32, WINNOW_BF16, WINNOW_FP16};
    static const struct places places[] = {{0, 0, 0}, {40, 10, 0}, {100, 0, 0}};

    for (uint32_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int input = 0; input < N_INPUTS; input++) {
            if (c >= 2 && input != INPUT_RANDOM &&
                input != 1 + (int)(test_seed() + c) % (N_INPUTS - 1))
                continue;
            lengths(c == 0 ? 14 : 3, 16 + 301, 2, 16 + 48);
            scene.n_blocks_max = 0;
            bool is_wide = input == INPUT_HUGE || input == INPUT_OVERFLOW;
            scene_init(&cases[c], (enum kernel_input)input, is_wide ? WINNOW_FP32 : io[c % 3], 0.9f,
                       test_seed() + 17 * c);
            launch(&places[(c + (uint32_t)input) % 3], 1 + c, test_seed());
            scene_check(input == INPUT_RANDOM);
            scene_finish();
        }
    printf("largest error, fp32 out, random input: %.3g of the largest value\n", error_largest);
}

/* Nothing sealed, no block selected, everything selected, a budget: the ends of every range. */
static void test_attend__ends_of_ranges(void)
{
    static const struct places places = {50, 10, 0};
    static const struct {
        uint32_t a, b, n_blocks_max;
        uint64_t a_tail, b_tail;
        float mass;
    } tries[] = {{0, 0, 0, 5, 16, 0.9f},    {0, 1, 0, 330, 17, 0.9f},  {2, 1, 0, 17, 33, 0.9999f},
                 {3, 1, 0, 100, 77, 1e-6f}, {14, 13, 5, 64, 17, 0.9f}, {5, 6, 1, 300, 31, 0.5f}};

    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        lengths(tries[i].a, tries[i].a_tail, tries[i].b, tries[i].b_tail);
        scene.n_blocks_max = tries[i].n_blocks_max;
        scene_init(&cases[i % 2], INPUT_RANDOM, WINNOW_FP32, tries[i].mass, test_seed() + i);
        launch(&places, 32, test_seed());
        scene_check(false);
        scene_finish();
    }
    scene.n_blocks_max = 0;
}

/* Hits, misses and blocks without a slot in any mixture, 1 to 64 fetching thread blocks: one result,
 * to the bit. */
static void test_attend__bits_do_not_depend_on_places(void)
{
    enum { N_RUNS = 100 };
    struct winnow_gpu_unit units[N_UNITS], units_again[N_UNITS];
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    lengths(14, 16 + 301, 9, 16 + 48);
    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP32, 0.9f, test_seed());
    uint8_t *first = case_alloc(N_ITEMS * out_bytes()), *again = case_alloc(N_ITEMS * out_bytes());
    for (uint32_t run = 0; run < N_RUNS; run++) {
        struct places places = {(uint32_t)winnow_rng_below(&rng, 90),
                                (uint32_t)winnow_rng_below(&rng, 10), 0};
        launch(&places, 1 + (uint32_t)winnow_rng_below(&rng, 64), test_seed() + run);
        for (uint32_t i = 0; i < N_ITEMS; i++)
            from_device(again + i * out_bytes(), scene.out[i] + GUARD, out_bytes());
        from_device(units_again, scene.view.unit, sizeof units_again);
        if (run == 0) {
            memcpy(first, again, N_ITEMS * out_bytes());
            memcpy(units, units_again, sizeof units);
        }
        CHECK(!memcmp(first, again, N_ITEMS * out_bytes()));
        for (uint32_t u = 0; u < N_UNITS; u++)
            CHECK(!memcmp(units[u].mass, units_again[u].mass, sizeof units[u].mass) &&
                  !memcmp(units[u].rho, units_again[u].rho, group() * sizeof(float)));
    }
    scene_check(true);
    scene_finish();
    winnow_alloc_free(first);
    winnow_alloc_free(again);
}

/* A block on disk is compensated, counted and named. */
static void test_attend__compensates_what_is_on_disk(void)
{
    static const struct places places = {30, 5, 25};
    struct winnow_gpu_unit units[N_UNITS];
    uint32_t disk_block[N_BLOCKS_MAX * N_HEADS];

    lengths(9, 16 + 30, 3, 16 + 48);
    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP32, 0.9f, test_seed());
    launch(&places, 8, test_seed());
    scene_check(false);
    from_device(units, scene.view.unit, sizeof units);
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        uint32_t n = 0;
        from_device(disk_block, scene.disk_block[i], N_BLOCKS_MAX * sizeof *disk_block);
        for (uint32_t h = 0; h < N_HEADS; h++) {
            const struct unit *unit = &scene.unit[i * N_HEADS + h];
            for (uint32_t l = 0; l < unit->sel.n_selected; l++)
                if (unit->listed[l].place == WINNOW_GPU_ON_DISK)
                    CHECK_EQ(disk_block[n++], h * unit->n_blocks + unit->listed[l].block);
        }
        CHECK(n > 0);
    }
    scene_finish();
}

static void out_check_nan(uint32_t i, uint32_t status)
{
    struct winnow_gpu_certificate c;
    uint8_t *out = case_alloc(out_bytes());

    from_device(&c, scene.certificate[i], sizeof c);
    from_device(out, scene.out[i] + GUARD, out_bytes());
    CHECK_EQ(c.status, status);
    for (size_t at = 0; at < out_bytes() / io_bytes(); at++)
        CHECK(isnan(io_read(out, at)));
    winnow_alloc_free(out);
}

/* Values of sinks and tail become 1.2e30, beyond fp16. */
static void values_enlarge(void)
{
    const struct winnow_gpu_view *view = &scene.view;
    size_t v_at = (size_t)32 * view->k_width;

    for (size_t at = 0; at < N_ITEMS * view->session_bytes; at += view->block_bytes)
        CUDA(cudaMemset(view->tails + at + v_at, 0x71, view->block_bytes - v_at));
}

/* NaN in q, k or v, or an output that overflows, fails its item, and no other. */
static void test_attend__not_finite_fails_its_item(void)
{
    static const struct places places = {30, 5, 0};
    const float hostile[] = {NAN, INFINITY, -INFINITY};
    struct winnow_gpu_unit units[N_UNITS];

    lengths(2, 16 + 30, 3, 16 + 48);
    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP32, 0.9f, test_seed());
    for (uint32_t what = 0; what < 3; what++) {
        const void *of[] = {scene.launch->item[0].q, scene.launch->item[0].k,
                            scene.launch->item[0].v};
        float *at = (float *)(uintptr_t)of[what] + 5, kept;
        from_device(&kept, at, sizeof kept);
        to_device(at, &hostile[what], sizeof kept);
        launch(&places, 8, test_seed());
        out_check_nan(0, EDOM);
        from_device(units, scene.view.unit, sizeof units);
        certificate_check(1, units);
        to_device(at, &kept, sizeof kept);
    }
    launch(&places, 8, test_seed());
    scene_check(true);
    scene_finish();

    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP16, 0.9f, test_seed());
    values_enlarge();
    launch(&places, 8, test_seed());
    out_check_nan(0, EDOM);
    out_check_nan(1, EDOM);
    scene_finish();
}

int main(int argc, char **argv)
{
    int n_devices = 0;

    TEST_INIT(argc, argv);
    ref = winnow_kernels_ref();
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0)
        TEST_SKIP("no CUDA device");
    TEST_RUN(test_attend__is_as_ref);
    TEST_RUN(test_attend__ends_of_ranges);
    TEST_RUN(test_attend__bits_do_not_depend_on_places);
    TEST_RUN(test_attend__compensates_what_is_on_disk);
    TEST_RUN(test_attend__not_finite_fails_its_item);
    return TEST_END();
}
