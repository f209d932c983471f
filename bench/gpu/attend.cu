/*
 * Times of tail, attend and more in the shape of Llama-3.1-8B (8 KV heads, G 4, d 128, bf16), beside
 * what bounds them, measured in the same run: the card's read rate, the copy engine, and dense
 * attention over everything in device memory with the same matrix instructions.
 *
 *   nvcc -std=c++17 -arch=sm_90 -O3 -I. -o attend bench/gpu/attend.cu, with kernels/cuda's objects
 *   attend [n_fetchers ..]
 *
 * A selection is planted: a share f of the blocks, evenly spread, of which a share h lies in slots.
 * Every time is the difference of two graphs over LAYERS layers, with and without the stage, the L2
 * cache flushed before, median of N_TIMES; so launch costs within a graph are in it. All unselected
 * blocks are near, the dearest case of compensation.
 */
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/work.cuh>
#include <vector>

namespace
{

constexpr uint32_t HEADS = 8, G = 4, WIDTH = 128, SPAN = 64, BLOCK = 8192, LAYERS = 4;
constexpr uint32_t TAIL_TOKENS = 16 + 1024 + 64; /* sinks, and the longest tail before a seal */
constexpr int N_TIMES = 21;
constexpr size_t FLUSH_BYTES = 256u << 20;
using llama = form<WIDTH, G, WINNOW_BF16>;

void check(cudaError_t rc, const char *what)
{
    if (rc == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(rc));
    exit(1);
}
#define CUDA(call) check(call, #call)

std::vector<void *> owned;

template <class T> T *device_alloc(size_t n)
{
    void *memory;
    CUDA(cudaMalloc(&memory, n * sizeof(T)));
    CUDA(cudaMemset(memory, 0, n * sizeof(T)));
    owned.push_back(memory);
    return (T *)memory;
}

void all_free()
{
    for (void *memory : owned)
        CUDA(cudaFree(memory));
    owned.clear();
}

template <class T> void to_device(T *to, const std::vector<T> &from)
{
    CUDA(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
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

__global__ void read_all(const uint4 *at, size_t n, uint32_t *sink)
{
    uint32_t x = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x * 4) {
        size_t step = (size_t)gridDim.x * blockDim.x;
        uint4 a = {}, b = {}, c = {}, d = {};
        a = __ldcs(at + i);
        if (i + step < n)
            b = __ldcs(at + i + step);
        if (i + 2 * step < n)
            c = __ldcs(at + i + 2 * step);
        if (i + 3 * step < n)
            d = __ldcs(at + i + 3 * step);
        x ^= a.x ^ b.y ^ c.z ^ d.w;
    }
    if (x == 0x12345678)
        *sink = x;
}

/* What select leaves: counters of the queue and of the units, and blocks that are on their way. */
struct plan {
    winnow_gpu_view view;
    const winnow_gpu_unit *unit; /* planted */
    winnow_gpu_queue queue;
    uint32_t n_units;
};

__global__ void plant(const plan p)
{
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;

    if (i == 0)
        p.view.queue[0] = p.queue;
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

/* Dense attention over units' blocks that lie one after the other, split over gridDim.y. */
struct dense {
    const uint8_t *blocks;
    uint32_t n_blocks; /* of a unit */
    float *partial;    /* [unit][split][G][WIDTH + 2] */
    uint32_t *n_done;
    float *out; /* [unit][G][WIDTH] */
};

template <int PER_SM>
__global__ void __launch_bounds__(ATTEND_THREADS, PER_SM)
    dense_kernel(const __grid_constant__ winnow_gpu_view view, const dense d)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    group_memory<llama> *memory = (group_memory<llama> *)dynamic;
    __shared__ uint32_t is_last;
    constexpr int TILES = llama::TILES;
    uint32_t unit = blockIdx.x, lane = lane_id(), warp = threadIdx.x / 32;
    uint32_t n_split = (d.n_blocks + gridDim.y - 1) / gridDim.y, first = blockIdx.y * n_split;
    uint32_t end = min(first + n_split, d.n_blocks), b = first + warp;
    const uint8_t *base = d.blocks + (size_t)unit * d.n_blocks * BLOCK;
    const uint2 *q = unit_queries<llama>(view, unit);
    const float *logit_scale = view.unit[unit].logit_scale;
    float o[TILES][4] = {}, m = -INFINITY, l = 0;
    block_registers<llama> x;

    if (b < end)
        block_load<llama>(view, base + (size_t)b * BLOCK, x);
    for (; b < end; b += GROUP) {
        const uint4 *next = (const uint4 *)(base + (size_t)(b + GROUP) * BLOCK) + lane;
        bool is_more = b + GROUP < end;
        float s[2][1], block_m[1], block_l[1];
        block_products<llama>(view, x, q, s);
#pragma unroll
        for (int j = 0; j < TILES; j++)
            if (is_more)
                x.k[j] = __ldcs(next + 32 * j);
        block_weights<llama>(logit_scale, G, 16, s, block_m, block_l);
        float largest = fmaxf(m, block_m[0]);
        float shrink = exp_or_0(m - largest), weight = exp_or_0(block_m[0] - largest);
        l = l * shrink + block_l[0] * weight;
        m = largest;
        float p0 = s[0][0] * weight, p1 = s[1][0] * weight;
        uint2 p = {turn(pack<WINNOW_BF16>(p0, rest_of<WINNOW_BF16>(p0))),
                   turn(pack<WINNOW_BF16>(p1, rest_of<WINNOW_BF16>(p1)))};
#pragma unroll
        for (int j = 0; j < TILES; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                o[j][i] *= shrink;
            mma<WINNOW_BF16>(o[j], x.v[j], p);
            if (is_more)
                x.v[j] = __ldcs(next + 32 * (TILES + j));
        }
    }
    if (m == -INFINITY)
        block_absent<llama>(memory);
    if (m > -INFINITY) {
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                memory->o[warp][lane % 4][16 * j + lane / 4 + 8 * half] =
                    o[j][2 * half] + o[j][2 * half + 1];
        if (lane < 4) {
            memory->m[warp][lane] = m;
            memory->l[warp][lane] = l;
        }
    }
    __syncthreads();
    float *partial = d.partial + (size_t)unit * gridDim.y * G * (WIDTH + 2);
    group_join<llama>(view, memory, partial + (size_t)blockIdx.y * G * (WIDTH + 2));
    if (!count_done(d.n_done + unit, gridDim.y, &is_last))
        return;
    for (uint32_t i = threadIdx.x; i < G * WIDTH; i += ATTEND_THREADS) {
        const float *at = partial + i / WIDTH * (WIDTH + 2);
        float largest = -INFINITY, sum = 0, y = 0;
        for (uint32_t k = 0; k < gridDim.y; k++)
            largest = fmaxf(largest, __ldcg(at + k * G * (WIDTH + 2)));
#pragma unroll 8
        for (uint32_t k = 0; k < gridDim.y; k++) {
            const float *part = at + k * G * (WIDTH + 2);
            float w = exp_or_0(__ldcg(part) - largest);
            sum += w * __ldcg(part + 1);
            y += w * __ldcg(part + 2 + i % WIDTH);
        }
        d.out[(size_t)unit * G * WIDTH + i] = y / sum;
    }
    if (threadIdx.x == 0)
        d.n_done[unit] = 0;
}

uint8_t *flush;
cudaStream_t stream;
uint32_t n_multiprocessors;

/* Microseconds of what `put` puts into the stream, as a graph. */
double time_of(const std::function<void()> &put)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    std::vector<float> times;

    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    put();
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreate(&to));
    for (int i = 0; i < N_TIMES + 3; i++) {
        float ms;
        CUDA(cudaMemsetAsync(flush, i, FLUSH_BYTES, stream));
        CUDA(cudaEventRecord(from, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(to, stream));
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaEventElapsedTime(&ms, from, to));
        if (i >= 3)
            times.push_back(ms * 1000);
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaEventDestroy(from));
    CUDA(cudaEventDestroy(to));
    std::sort(times.begin(), times.end());
    return times[N_TIMES / 2];
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

uint8_t *arena;
size_t arena_blocks;

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
    __nv_bfloat16 *q = device_alloc<__nv_bfloat16>((size_t)b.of.batch * HEADS * G * WIDTH);
    __nv_bfloat16 *k = device_alloc<__nv_bfloat16>((size_t)b.of.batch * HEADS * WIDTH);
    __nv_bfloat16 *out = device_alloc<__nv_bfloat16>((size_t)b.of.batch * HEADS * G * WIDTH);
    float *lse = device_alloc<float>((size_t)b.of.batch * HEADS * G);
    winnow_gpu_certificate *certificate = device_alloc<winnow_gpu_certificate>(b.of.batch);

    fill_bf16<<<64, 256>>>(q, (size_t)b.of.batch * HEADS * G * WIDTH, 1 + l);
    fill_bf16<<<64, 256>>>(k, (size_t)b.of.batch * HEADS * WIDTH, 2 + l);
    launch[0].n_items = b.of.batch;
    launch[0].n_units = b.n_units;
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
    view->launch = device_alloc<winnow_gpu_launch>(1);
    to_device(view->launch, launch);
    view->partial = device_alloc<float>((size_t)b.n_units * n_partials * G * (WIDTH + 2));
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
                fetch.push_back({(uint32_t)((slot + l * 7919u) % arena_blocks * 2),
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
    view->listed = device_alloc<winnow_gpu_listed>(listed.size());
    view->selected = device_alloc<uint8_t>(selected.size());
    view->fetch = device_alloc<winnow_gpu_fetch>(fetch.size() + 1);
    view->ready = device_alloc<winnow_gpu_work>(ready.size() + 1);
    view->waiting = device_alloc<winnow_gpu_work>(waiting.size() + 1);
    winnow_gpu_unit *planted = device_alloc<winnow_gpu_unit>(b.n_units);
    to_device(view->listed, listed);
    to_device(view->selected, selected);
    to_device(view->fetch, fetch);
    to_device(view->ready, ready);
    to_device(view->waiting, waiting);
    to_device(planted, units);
    CUDA(cudaMemcpy(view->slot_word + (size_t)l * view->n_slots_layer, word.data(),
                    word.size() * sizeof(uint64_t), cudaMemcpyHostToDevice));
    to->p = {};
    to->p.unit = planted;
    to->p.n_units = b.n_units;
    to->p.queue.n_fetch = (uint32_t)fetch.size();
    to->p.queue.n_ready = (uint32_t)ready.size();
    to->p.queue.n_waiting = (uint32_t)waiting.size();
}

bench bench_init(const setup &of)
{
    bench b = {};
    winnow_gpu_view view = {};

    b.of = of;
    b.n_blocks = of.n_tokens / 16;
    b.n_units = of.batch * HEADS;
    b.grid = {b.n_units, n_multiprocessors, (uint64_t)b.n_units * b.n_blocks};
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
    view.n_fetchers = 32;
    winnow_gpu_index_layout(&view);
    view.segment_bytes = (uint64_t)LAYERS * HEADS * view.unit_bytes;
    view.session_bytes = (uint64_t)LAYERS * HEADS * (1 + view.ring_blocks) * BLOCK;
    view.n_slots_layer = b.n_units * (uint32_t)(of.f * b.n_blocks + .5);
    size_t n_segments = (size_t)of.batch * b.n_blocks / SPAN;
    view.index = device_alloc<uint8_t>(n_segments * view.segment_bytes);
    view.tails = device_alloc<uint8_t>(of.batch * view.session_bytes);
    view.slots = device_alloc<uint8_t>((size_t)LAYERS * view.n_slots_layer * BLOCK);
    view.slot_word = device_alloc<uint64_t>((size_t)LAYERS * view.n_slots_layer);
    view.session_segments = device_alloc<uint32_t>(n_segments);
    CUDA(cudaHostGetDevicePointer((void **)&view.host, arena, 0));
    std::vector<uint32_t> segments(n_segments);
    for (uint32_t i = 0; i < n_segments; i++)
        segments[i] = i;
    to_device(view.session_segments, segments);
    fill_index<<<1024, 256>>>(view, n_segments * LAYERS * HEADS);
    fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)view.tails, of.batch * view.session_bytes / 2, 3);
    fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)view.slots,
                             (size_t)LAYERS * view.n_slots_layer * BLOCK / 2, 4);
    CUDA(winnow_gpu_attend_prepare(&view));
    CUDA(winnow_gpu_more_prepare(&view));
    for (uint32_t l = 0; l < LAYERS; l++) {
        layer one = {};
        one.view = view;
        launch_init(b, l, &one.view);
        one.view.q_fragment =
            device_alloc<uint32_t>((size_t)b.n_units * winnow_gpu_q_fragment_words(&view));
        one.view.unit = device_alloc<winnow_gpu_unit>(b.n_units);
        one.view.queue = device_alloc<winnow_gpu_queue>(2);
        size_t n = (size_t)b.n_units * b.n_blocks;
        one.view.ln_e = device_alloc<float>(n * G);
        one.view.key = device_alloc<float>(n);
        fill_float<<<1024, 256>>>(one.view.ln_e, n * G, -6, 0, l);
        fill_float<<<1024, 256>>>(one.view.key, n, -3, 0, l + 10);
        selection_plant(b, l, &one);
        one.p.view = one.view;
        b.layers.push_back(one);
    }
    CUDA(cudaDeviceSynchronize());
    return b;
}

enum { BEGIN = 1, TAIL = 2, PLANT = 4, ATTEND = 8, MORE = 16 };

double stages_time(const bench &b, uint32_t stages)
{
    return time_of([&] {
               for (const layer &one : b.layers) {
                   if (stages & BEGIN)
                       CUDA(winnow_gpu_stage_begin(&one.view, &b.grid, stream));
                   if (stages & TAIL)
                       CUDA(winnow_gpu_stage_tail(&one.view, &b.grid, stream));
                   if (stages & PLANT)
                       plant<<<64, 256, 0, stream>>>(one.p);
                   if (stages & ATTEND)
                       CUDA(winnow_gpu_stage_attend(&one.view, &b.grid, stream));
                   if (stages & MORE)
                       CUDA(winnow_gpu_stage_more(&one.view, &b.grid, stream));
               }
           }) /
           LAYERS;
}

/* Fails unless every item's certificate says all is well. */
void certificates_check(const bench &b)
{
    for (const layer &one : b.layers) {
        std::vector<winnow_gpu_launch> launch(1);
        CUDA(cudaMemcpy(launch.data(), one.view.launch, sizeof launch[0], cudaMemcpyDeviceToHost));
        for (uint32_t i = 0; i < b.of.batch; i++) {
            winnow_gpu_certificate c;
            CUDA(cudaMemcpy(&c, launch[0].item[i].certificate, sizeof c, cudaMemcpyDeviceToHost));
            if (c.status || !(c.mass_reached > 0) || c.n_rounds != 1) {
                fprintf(stderr, "item %u: status %u, mass %g\n", i, c.status, c.mass_reached);
                exit(1);
            }
        }
    }
}

template <int PER_SM>
double dense_time_of(const bench &b, uint32_t n_layers, dense d, uint32_t n_waves)
{
    uint32_t n_split = std::max(1u, PER_SM * n_multiprocessors * n_waves / b.n_units);
    size_t layer_bytes = (size_t)b.n_units * b.n_blocks * BLOCK;
    const uint8_t *blocks = d.blocks;

    d.partial = device_alloc<float>((size_t)b.n_units * n_split * G * (WIDTH + 2));
    CUDA(cudaFuncSetAttribute(dense_kernel<PER_SM>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              (int)sizeof(group_memory<llama>)));
    return time_of([&] {
               for (uint32_t l = 0; l < n_layers; l++) {
                   d.blocks = blocks + l * layer_bytes;
                   dense_kernel<PER_SM>
                       <<<dim3(b.n_units, n_split), ATTEND_THREADS, sizeof(group_memory<llama>),
                          stream>>>(b.layers[l].view, d);
               }
           }) /
           n_layers;
}

/* The best of several splits. */
double dense_time(const bench &b)
{
    size_t layer_bytes = (size_t)b.n_units * b.n_blocks * BLOCK;
    uint32_t n_layers = layer_bytes > (size_t)8 << 30 ? 1 : layer_bytes > (1u << 30) ? 2 : LAYERS;
    dense d = {device_alloc<uint8_t>(n_layers * layer_bytes), b.n_blocks, nullptr,
               device_alloc<uint32_t>(b.n_units),
               device_alloc<float>((size_t)b.n_units * G * WIDTH)};
    double best = 1e30;

    fill_bf16<<<2048, 256>>>((__nv_bfloat16 *)d.blocks, n_layers * layer_bytes / 2, 5);
    for (uint32_t n_waves = 1; n_waves <= 4; n_waves++)
        best = std::min({best, dense_time_of<1>(b, n_layers, d, n_waves),
                         dense_time_of<2>(b, n_layers, d, n_waves)});
    return best;
}

/* Attend with a part of its work. */
double part_time(setup of, uint32_t parts)
{
    of.parts = parts;
    bench b = bench_init(of);
    double us =
        stages_time(b, BEGIN | TAIL | PLANT | ATTEND) - stages_time(b, BEGIN | TAIL | PLANT);
    all_free();
    return us;
}

void setup_run(const setup &of, const std::vector<uint32_t> &fetchers, bool with_dense)
{
    bench b = bench_init(of);
    double base = stages_time(b, BEGIN | PLANT);
    double tail = stages_time(b, BEGIN | TAIL | PLANT);
    double n_host = (double)b.layers[0].p.queue.n_fetch * BLOCK;

    printf("%4uK x %u, f %.3g %%, h %.2f: begin + plant %.1f, tail %.1f", of.n_tokens / 1024,
           of.batch, of.f * 100, of.h, base, tail - base);
    for (uint32_t n : fetchers) {
        for (layer &one : b.layers)
            one.view.n_fetchers = n;
        double attend = stages_time(b, BEGIN | TAIL | PLANT | ATTEND) - tail;
        printf(", attend %.1f (%u fetchers", attend, n);
        if (n_host > 0)
            printf(", link %.1f GB/s", n_host / attend / 1e3);
        printf(")");
        certificates_check(b);
        if (n_host == 0)
            break;
    }
    double all = stages_time(b, BEGIN | TAIL | PLANT | ATTEND);
    printf(", more %.1f", stages_time(b, BEGIN | TAIL | PLANT | ATTEND | MORE) - all);
    if (with_dense) {
        double dense = dense_time(b);
        printf(", dense %.1f (%.0f GB/s)", dense,
               (double)b.n_units * b.n_blocks * BLOCK / dense / 1e3);
    }
    all_free();
    if (of.h == 1)
        printf(", of attend: groups alone %.1f, chunks alone %.1f", part_time(of, GROUPS),
               part_time(of, CHUNKS));
    printf("\n");
}

/* The link: the copy engine, and a launch that does nothing but fetch. */
void gather_run(const std::vector<uint32_t> &fetchers)
{
    setup of = {32768, 1, .5, 0};
    bench b = bench_init(of);
    winnow_gpu_view view = b.layers[0].view;
    plan p = b.layers[0].p;
    size_t n_bytes = (size_t)p.queue.n_fetch * BLOCK;
    uint8_t *to = device_alloc<uint8_t>(n_bytes);
    double copy =
        time_of([&] { CUDA(cudaMemcpyAsync(to, arena, n_bytes, cudaMemcpyHostToDevice, stream)); });

    printf("copy engine, %zu MiB: %.1f GB/s; gather alone:", n_bytes >> 20, n_bytes / copy / 1e3);
    p.queue.n_ready = p.queue.n_waiting = 0;
    double base = time_of([&] { plant<<<64, 256, 0, stream>>>(p); });
    for (uint32_t n : fetchers) {
        view.n_fetchers = n;
        double us = time_of([&] {
            plant<<<64, 256, 0, stream>>>(p);
            CUDA(winnow_gpu_stage_attend(&view, &b.grid, stream));
        });
        printf(" %.1f GB/s (%u fetchers, %.1f %%)", n_bytes / (us - base) / 1e3, n,
               100 * copy / (us - base));
    }
    printf("\n");
    all_free();
}

void read_run()
{
    size_t n_bytes = (size_t)8 << 30;
    uint4 *at = device_alloc<uint4>(n_bytes / 16);
    uint32_t *sink = device_alloc<uint32_t>(1);
    double best = 1e30;

    fill_bf16<<<2048, 256>>>((__nv_bfloat16 *)at, n_bytes / 2, 6);
    for (uint32_t n = 4; n <= 16; n *= 2)
        best = std::min(best, time_of([&] {
                            read_all<<<n_multiprocessors * n, 256, 0, stream>>>(at, n_bytes / 16,
                                                                                sink);
                        }));
    printf("read ceiling of device memory: %.0f GB/s\n", n_bytes / best / 1e3);
    all_free();
}

} // namespace

int main(int argc, char **argv)
{
    cudaDeviceProp prop;
    int driver;
    std::vector<uint32_t> fetchers;

    for (int i = 1; i < argc; i++)
        fetchers.push_back((uint32_t)atoi(argv[i]));
    if (fetchers.empty())
        fetchers.push_back(32);
    CUDA(cudaGetDeviceProperties(&prop, 0));
    CUDA(cudaDriverGetVersion(&driver));
    n_multiprocessors = (uint32_t)prop.multiProcessorCount;
    printf("%s, %u SMs, CUDA driver %d; microseconds a layer\n", prop.name, n_multiprocessors,
           driver);
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaMalloc(&flush, FLUSH_BYTES));
    arena_blocks = 65536;
    CUDA(cudaHostAlloc((void **)&arena, arena_blocks * BLOCK, cudaHostAllocMapped));
    __nv_bfloat16 *random = device_alloc<__nv_bfloat16>(arena_blocks * BLOCK / 2);
    fill_bf16<<<1024, 256>>>(random, arena_blocks * BLOCK / 2, 7);
    CUDA(cudaMemcpy(arena, random, arena_blocks * BLOCK, cudaMemcpyDeviceToHost));
    all_free();

    read_run();
    gather_run(fetchers);
    const setup shapes[] = {
        {32768, 1, .02, 0}, {131072, 1, .02, 0}, {131072, 8, .02, 0}, {524288, 1, .02, 0}};
    for (setup of : shapes)
        for (double h : {1.0, .9}) {
            of.h = h;
            setup_run(of, fetchers, h == 1);
        }
    return 0;
}
