/*
 * Times of tail and attend in the shape of Llama-3.1-8B (8 KV heads, G 4, d 128, bf16),
 * beside what bounds a launch that misses blocks: the copy engine, and a gather alone. What bounds
 * one that hits is dense attention (layer.cu).
 *
 *   bench-gpu-attend [n_fetchers ..]
 *
 * A selection is planted: a share f of the blocks, evenly spread, of which a share h lies in slots.
 * Every time is the difference of two graphs over LAYERS layers, with and without the stage, so
 * launch costs within a graph are in it; no unit is short. Outputs go to pinned
 * memory, as in the daemon. One in seven unselected blocks is far (of the traces that docs cite, 1 to
 * 60 in a hundred are, 12 in the middle).
 */
#include "card.cuh"

#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/work.cuh>

namespace
{

constexpr uint32_t HEADS = 8, G = 4, WIDTH = 128, SPAN = 64, BLOCK = 8192, LAYERS = 4;
constexpr uint32_t TAIL_TOKENS = 16 + 1024 + 64; /* sinks, and the longest tail before a seal */
constexpr uint32_t ARENA_BLOCKS = 65536;
constexpr float KEY_SPAN = NATS_NEAR * 7 / 6; /* unselected blocks end as far below the threshold */
constexpr double BUDGET_MS = 10;

/* What all setups share. */
struct {
    stopwatch watch;
    uint32_t n_multiprocessors;
    uint8_t *arena; /* pinned */
    uint32_t *done; /* pinned */
} card;

/* Memory of a setup: of the device, or pinned. */
std::vector<void *> owned, owned_pinned;

template <class T> T *zeroed(size_t n)
{
    T *memory = device_alloc<T>(n);
    ok(cudaMemset(memory, 0, n * sizeof(T)), "cudaMemset");
    owned.push_back(memory);
    return memory;
}

template <class T> T *pinned(size_t n)
{
    void *memory;
    ok(cudaHostAlloc(&memory, n * sizeof(T), cudaHostAllocMapped), "cudaHostAlloc");
    memset(memory, 0, n * sizeof(T));
    owned_pinned.push_back(memory);
    return (T *)memory;
}

void all_free()
{
    for (void *memory : owned)
        ok(cudaFree(memory), "cudaFree");
    for (void *memory : owned_pinned)
        ok(cudaFreeHost(memory), "cudaFreeHost");
    owned.clear();
    owned_pinned.clear();
}

template <class T> void vector_write(T *to, const std::vector<T> &from)
{
    device_write(to, from.data(), from.size());
}

__device__ uint32_t mix(uint64_t x)
{
    x = (x ^ x >> 31) * 0x7fb5d329728ea185u;
    x = (x ^ x >> 27) * 0x81dadef4bc2dd44du;
    return (uint32_t)(x >> 33);
}

/* bf16 between -1 and 1. */
__global__ void fill_bf16(__nv_bfloat16 *at, size_t n, uint64_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        at[i] = __float2bfloat16_rn((float)mix(i + seed * 0x9e3779b97f4a7c15u) * 0x1p-30f - 1);
}

__global__ void fill_float(float *at, size_t n, float low, float high, uint64_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        at[i] = low + (high - low) * ((float)mix(i + seed * 0x9e3779b97f4a7c15u) * 0x1p-31f);
}

/* Means, scales and mean values of all segments; the codes are not read here. */
__global__ void fill_index(const winnow_gpu_view view, size_t n_units)
{
    for (size_t u = blockIdx.x; u < n_units; u += gridDim.x) {
        uint8_t *at = view.index + u * view.unit_bytes;
        for (uint32_t i = threadIdx.x; i < SPAN * WIDTH; i += blockDim.x)
            at[view.vmean_at + i] = (uint8_t)mix(u * 100003 + i);
        for (uint32_t i = threadIdx.x; i < SPAN; i += blockDim.x)
            ((float *)(at + view.vmean_scale_at))[i] = 0.01f;
        for (uint32_t i = threadIdx.x; i < WIDTH; i += blockDim.x)
            ((float *)(at + view.mean_v_at))[i] = 0.1f;
    }
}

/* What select leaves: counters of the queue and of the units, and blocks that are on their way. */
struct plan {
    winnow_gpu_view view;
    const winnow_gpu_unit *unit; /* planted */
    winnow_gpu_queue queue;
    uint32_t n_units, n_ends; /* thread blocks that no unit's end tells to end */
};

__global__ void plant(const plan p)
{
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;

    if (i == 0)
        p.view.queue[0] = p.queue;
    if (i < p.n_ends)
        p.view.more[i] = WORK_END;
    if (i < p.n_units) {
        winnow_gpu_unit *to = p.view.unit + i;
        const winnow_gpu_unit *from = p.unit + i;
        to->n_groups = from->n_groups;
        to->n_selected = from->n_selected;
        to->n_device = from->n_device;
        to->n_host = from->n_host;
        to->key_threshold = from->key_threshold;
        to->key_quarter = from->key_quarter;
        for (uint32_t g = 0; g < G; g++)
            to->largest[g] = 0;
    }
    for (; i < p.queue.n_fetch; i += gridDim.x * blockDim.x)
        p.view.slot_word[p.view.fetch[i].slot] |= WINNOW_GPU_FETCHING;
}

enum { GROUPS = 1, CHUNKS = 2 }; /* what of the work is queued: without one of them, no unit ends */

struct setup {
    uint32_t n_tokens, batch;
    double f, h;
    uint32_t parts = GROUPS | CHUNKS;
};

struct layer {
    plan p;
    winnow_gpu_view view;
};

/* Everything of one setup in device memory. */
struct bench {
    setup of;
    uint32_t n_blocks, n_units; /* sealed, of a unit */
    winnow_gpu_grid grid;
    std::vector<layer> layers;
};

void launch_init(const bench &b, uint32_t l, winnow_gpu_view *view)
{
    std::vector<winnow_gpu_launch> launch(1);
    uint32_t n_partials = 16 + b.n_blocks / 8 + b.n_blocks / 512;
    __nv_bfloat16 *q = zeroed<__nv_bfloat16>((size_t)b.of.batch * HEADS * G * WIDTH);
    __nv_bfloat16 *k = zeroed<__nv_bfloat16>((size_t)b.of.batch * HEADS * WIDTH);
    __nv_bfloat16 *out = pinned<__nv_bfloat16>((size_t)b.of.batch * HEADS * G * WIDTH);
    float *lse = pinned<float>((size_t)b.of.batch * HEADS * G);
    winnow_gpu_certificate *certificate = pinned<winnow_gpu_certificate>(b.of.batch);

    fill_bf16<<<64, 256>>>(q, (size_t)b.of.batch * HEADS * G * WIDTH, 1 + l);
    fill_bf16<<<64, 256>>>(k, (size_t)b.of.batch * HEADS * WIDTH, 2 + l);
    launch[0].n_items = b.of.batch;
    launch[0].n_units = b.n_units;
    launch[0].n_blocks = b.n_units * b.n_blocks;
    launch[0].stamp = 1;
    for (uint32_t i = 0; i < b.of.batch; i++) {
        winnow_gpu_item *item = &launch[0].item[i];
        item->session = i;
        item->layer = l;
        item->n_segments = b.n_blocks / SPAN;
        item->n_tokens = (uint64_t)b.n_blocks * 16 + TAIL_TOKENS;
        item->mass = 1e-6f; /* never short */
        item->q = q + (size_t)i * HEADS * G * WIDTH;
        item->k = k + (size_t)i * HEADS * WIDTH;
        item->v = k + (size_t)i * HEADS * WIDTH;
        item->out = out + (size_t)i * HEADS * G * WIDTH;
        item->lse = lse + (size_t)i * HEADS * G;
        item->certificate = certificate + i;
        launch[0].block_first[i] = i * HEADS * b.n_blocks;
        launch[0].partial_first[i] = i * HEADS * n_partials;
        launch[0].partials_of_head[i] = n_partials;
    }
    view->launch = zeroed<winnow_gpu_launch>(1);
    vector_write(view->launch, launch);
    view->partial = zeroed<float>((size_t)b.n_units * n_partials * winnow_gpu_partial_floats(view));
    view->more = zeroed<uint64_t>(WINNOW_GPU_READY_SLACK); /* no second rounds */
}

/* The share f of the blocks, listed; a share h in slots. */
void selection_plant(const bench &b, uint32_t l, layer *to)
{
    uint32_t n_selected = (uint32_t)(b.of.f * b.n_blocks + .5);
    std::vector<winnow_gpu_unit> units(b.n_units);
    std::vector<winnow_gpu_listed> listed((size_t)b.n_units * b.n_blocks);
    std::vector<uint8_t> selected((size_t)b.n_units * b.n_blocks);
    std::vector<winnow_gpu_fetch> fetch;
    std::vector<winnow_gpu_work> ready, waiting;
    std::vector<uint64_t> word((size_t)b.n_units * n_selected, UINT64_C(1) << 32 | 1);
    winnow_gpu_view *view = &to->view;
    double missed = 0;
    uint32_t slot = 0;

    for (uint32_t u = 0; u < b.n_units; u++) {
        winnow_gpu_unit *unit = &units[u];
        for (uint32_t c = 0; b.of.parts & CHUNKS && c < (b.n_blocks + 511) / 512; c++)
            ready.push_back({u, WINNOW_GPU_WORK_CHUNK | c});
        bool waits = false;
        for (uint32_t i = 0; i < n_selected; i++, slot++) {
            uint32_t block = (uint32_t)((uint64_t)i * b.n_blocks / n_selected);
            listed[(size_t)u * b.n_blocks + i] = {block, l * view->n_slots_layer + slot};
            selected[(size_t)u * b.n_blocks + block] = 1;
            missed += 1 - b.of.h;
            if (missed >= 1) {
                missed -= 1;
                fetch.push_back({(uint32_t)((slot + l * 7919u) % ARENA_BLOCKS * 2),
                                 l * view->n_slots_layer + slot});
                waits = true;
                unit->n_host++;
            }
            if (!(b.of.parts & GROUPS) || (i % 8 != 7 && i + 1 < n_selected))
                continue;
            (waits ? waiting : ready).push_back({u, i / 8});
            waits = false;
        }
        unit->n_selected = n_selected;
        unit->n_groups = (n_selected + 7) / 8;
        unit->n_device = n_selected - unit->n_host;
        unit->key_threshold = 0;
        unit->key_quarter = -2.25;
    }
    view->listed = zeroed<winnow_gpu_listed>(listed.size());
    view->selected = zeroed<uint8_t>(selected.size());
    view->fetch = zeroed<winnow_gpu_fetch>(fetch.size() + 1);
    view->ready = zeroed<winnow_gpu_work>(ready.size() + WINNOW_GPU_READY_SLACK);
    view->waiting = zeroed<winnow_gpu_work>(waiting.size() + 1);
    winnow_gpu_unit *planted = zeroed<winnow_gpu_unit>(b.n_units);
    vector_write(view->listed, listed);
    vector_write(view->selected, selected);
    vector_write(view->fetch, fetch);
    vector_write(view->ready, ready);
    vector_write(view->waiting, waiting);
    vector_write(planted, units);
    vector_write(view->slot_word + (size_t)l * view->n_slots_layer, word);
    to->p = {};
    to->p.unit = planted;
    to->p.n_units = b.n_units;
    to->p.queue.n_fetch = (uint32_t)fetch.size();
    to->p.queue.n_ready = (uint32_t)ready.size();
    to->p.queue.n_waiting = (uint32_t)waiting.size();
    if (b.of.parts != (GROUPS | CHUNKS))
        to->p.n_ends = 2 * card.n_multiprocessors;
}

bench bench_init(const setup &of)
{
    bench b = {};
    winnow_gpu_view view = {};

    b.of = of;
    b.n_blocks = of.n_tokens / 16;
    b.n_units = of.batch * HEADS;
    b.grid = {b.n_units, card.n_multiprocessors, (uint64_t)b.n_units * b.n_blocks};
    view.n_layers = LAYERS;
    view.n_q_heads = HEADS * G;
    view.n_kv_heads = HEADS;
    view.n_group = G;
    view.k_width = view.v_width = WIDTH;
    view.kv_dtype = view.io_dtype = WINNOW_BF16;
    view.softmax_scale = 0.0883883476f;
    view.span_blocks = SPAN;
    view.n_sink_blocks = 1;
    view.ring_blocks = TAIL_TOKENS / 16 + 1;
    view.block_bytes = BLOCK;
    view.n_session_segments_max = b.n_blocks / SPAN;
    view.n_fetchers = 16;
    winnow_gpu_index_layout(&view);
    view.segment_bytes = (uint64_t)LAYERS * HEADS * view.unit_bytes;
    view.session_bytes = (uint64_t)LAYERS * HEADS * (1 + view.ring_blocks) * BLOCK;
    view.n_slots_layer = b.n_units * (uint32_t)(of.f * b.n_blocks + .5);
    size_t n_segments = (size_t)of.batch * b.n_blocks / SPAN;
    view.index = zeroed<uint8_t>(n_segments * view.segment_bytes);
    view.tails = zeroed<uint8_t>(of.batch * view.session_bytes);
    view.slots = zeroed<uint8_t>((size_t)LAYERS * view.n_slots_layer * BLOCK);
    view.slot_word = zeroed<uint64_t>((size_t)LAYERS * view.n_slots_layer);
    view.session_segments = zeroed<uint32_t>(n_segments);
    view.host = card.arena;
    view.done = card.done;
    std::vector<uint32_t> segments(n_segments);
    for (uint32_t i = 0; i < n_segments; i++)
        segments[i] = i;
    vector_write(view.session_segments, segments);
    fill_index<<<1024, 256>>>(view, n_segments * LAYERS * HEADS);
    fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)view.tails, of.batch * view.session_bytes / 2, 3);
    fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)view.slots,
                             (size_t)LAYERS * view.n_slots_layer * BLOCK / 2, 4);
    ok(winnow_gpu_tail_prepare(&view), "tail");
    ok(winnow_gpu_attend_prepare(&view), "attend");
    for (uint32_t l = 0; l < LAYERS; l++) {
        layer one = {};
        one.view = view;
        launch_init(b, l, &one.view);
        one.view.q_fragment =
            zeroed<uint32_t>((size_t)b.n_units * winnow_gpu_q_fragment_words(&view));
        one.view.unit = zeroed<winnow_gpu_unit>(b.n_units);
        one.view.tally = zeroed<winnow_gpu_tally>(1);
        one.view.queue = zeroed<winnow_gpu_queue>(1);
        size_t n = (size_t)b.n_units * b.n_blocks;
        one.view.ln_e = zeroed<float>(n * G);
        one.view.key = zeroed<float>(n);
        fill_float<<<1024, 256>>>(one.view.ln_e, n * G, -6, 0, l);
        fill_float<<<1024, 256>>>(one.view.key, n, -KEY_SPAN, 0, l + 10);
        selection_plant(b, l, &one);
        one.p.view = one.view;
        b.layers.push_back(one);
    }
    ok(cudaDeviceSynchronize(), "fill");
    return b;
}

enum { TAIL = 1, PLANT = 2, ATTEND = 4 };

/* Microseconds a layer. */
double stages_time(const bench &b, uint32_t stages)
{
    auto put = [&] {
        for (const layer &one : b.layers) {
            if (stages & TAIL)
                ok(winnow_gpu_stage_tail_first(&one.view, &b.grid, card.watch.stream), "tail");
            if (stages & PLANT)
                plant<<<64, 256, 0, card.watch.stream>>>(one.p);
            if (stages & ATTEND)
                ok(winnow_gpu_stage_attend(&one.view, &b.grid, card.watch.stream), "attend");
        }
    };

    return graph_time(card.watch, LAYERS, put, [] {}).us;
}

/* Fails unless every item's certificate says all is well. */
void certificates_check(const bench &b)
{
    for (const layer &one : b.layers) {
        std::vector<winnow_gpu_launch> launch = device_read(one.view.launch, 1);
        for (uint32_t i = 0; i < b.of.batch; i++) {
            const winnow_gpu_certificate &c = *launch[0].item[i].certificate;
            if (c.status || !(c.mass_reached > 0) || c.n_rounds != 1) {
                fprintf(stderr, "item %u: status %u, mass %g\n", i, c.status, c.mass_reached);
                exit(1);
            }
        }
    }
}

/* Attend with a part of its work. */
double part_time(setup of, uint32_t parts)
{
    of.parts = parts;
    bench b = bench_init(of);
    double us = stages_time(b, TAIL | PLANT | ATTEND) - stages_time(b, TAIL | PLANT);
    all_free();
    return us;
}

void setup_run(const setup &of, const std::vector<uint32_t> &fetchers)
{
    bench b = bench_init(of);
    double plant_us = stages_time(b, PLANT), tail = stages_time(b, TAIL | PLANT), attend = 0;
    double n_host = (double)b.layers[0].p.queue.n_fetch * BLOCK;

    printf("%4uK x %u, f %.3g %%, h %.2f: tail %.1f, attend", of.n_tokens / 1024, of.batch,
           of.f * 100, of.h, tail - plant_us);
    for (uint32_t n : fetchers) {
        for (layer &one : b.layers)
            one.view.n_fetchers = n;
        attend = stages_time(b, TAIL | PLANT | ATTEND);
        printf(" %.1f", attend - tail);
        if (n_host == 0)
            break;
        printf(" (%u fetchers, link %.1f GB/s)", n, n_host / (attend - tail) / 1e3);
    }
    certificates_check(b);
    all_free();
    if (of.h == 1)
        printf("; of attend: groups alone %.1f, chunks alone %.1f", part_time(of, GROUPS),
               part_time(of, CHUNKS));
    printf("\n");
    fflush(stdout);
}

/* The link: the copy engine, and a launch that does nothing but fetch. */
void gather_run(const std::vector<uint32_t> &fetchers)
{
    setup of = {32768, 1, .5, 0};
    bench b = bench_init(of);
    winnow_gpu_view view = b.layers[0].view;
    plan p = b.layers[0].p;
    size_t n_bytes = (size_t)p.queue.n_fetch * BLOCK;
    auto plant_put = [&] { plant<<<64, 256, 0, card.watch.stream>>>(p); };

    printf("copy engine: %.1f GB/s; gather alone:",
           card_copy_rate(card.watch, card.arena, n_bytes));
    p.queue.n_ready = p.queue.n_waiting = 0;
    p.n_ends = 2 * card.n_multiprocessors;
    double base = graph_time(card.watch, 1, plant_put, [] {}).us;
    for (uint32_t n : fetchers) {
        view.n_fetchers = n;
        auto put = [&] {
            plant_put();
            ok(winnow_gpu_stage_attend(&view, &b.grid, card.watch.stream), "attend");
        };
        double us = graph_time(card.watch, 1, put, [] {}).us - base;
        printf(" %.1f GB/s (%u fetchers)", (double)n_bytes / us / 1e3, n);
    }
    printf("\n");
    all_free();
}

void card_init()
{
    size_t n_bytes = (size_t)ARENA_BLOCKS * BLOCK;
    cudaDeviceProp prop;
    cudaStream_t stream;
    int driver;

    ok(cudaGetDeviceProperties(&prop, 0), "device");
    ok(cudaDriverGetVersion(&driver), "driver");
    ok(cudaStreamCreate(&stream), "stream");
    card.watch = stopwatch_init(stream, BUDGET_MS);
    card.n_multiprocessors = (uint32_t)prop.multiProcessorCount;
    ok(cudaHostAlloc((void **)&card.arena, n_bytes, cudaHostAllocMapped), "arena");
    ok(cudaHostAlloc((void **)&card.done, sizeof *card.done, cudaHostAllocMapped), "done");
    __nv_bfloat16 *random = zeroed<__nv_bfloat16>(n_bytes / 2);
    fill_bf16<<<1024, 256>>>(random, n_bytes / 2, 7);
    ok(cudaMemcpy(card.arena, random, n_bytes, cudaMemcpyDeviceToHost), "arena");
    all_free();
    printf("%s, %u SMs, CUDA driver %d; microseconds a layer\n", prop.name, card.n_multiprocessors,
           driver);
}

} // namespace

int main(int argc, char **argv)
{
    std::vector<uint32_t> fetchers;

    for (int i = 1; i < argc; i++)
        fetchers.push_back((uint32_t)atoi(argv[i]));
    if (fetchers.empty())
        fetchers.push_back(16);
    card_init();
    gather_run(fetchers);
    const uint32_t shapes[][2] = {{2048, 1}, {32768, 1}, {131072, 1}, {131072, 8}, {524288, 1}};
    for (const uint32_t(&shape)[2] : shapes)
        for (double h : {1.0, .9})
            setup_run({shape[0], shape[1], .02, h}, fetchers);
    return 0;
}
