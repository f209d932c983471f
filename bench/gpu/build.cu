/*
 * What it costs to build segments on the GPU, in the shape of Llama-3.1-8B (8 KV heads, G 4, d 128,
 * bf16, S 1,024): a layer of 128K tokens is 128 jobs, each a layer's span.
 *
 *   nvcc -std=c++17 -arch=sm_90 -O3 -I. -o build bench/gpu/build.cu, with kernels/cuda's objects
 *   build [layers]          layers of 128K tokens to build one after the other: 4
 *
 * First each stage of one job alone, between events, and the link's ceiling. Then layers through the
 * contract, four jobs out, host to host; then beside decode steps over 128K tokens, and beside matrix
 * products that fill the card as a prefill's do, both timed without and with jobs beside them: what
 * the products lose is a build's price. Shares are of a prefill at 400 TFLOP/s:
 *   2 x 8.0e9 weights x 128K + 4 x (128K)^2 / 2 x 4,096 x 32 layers (attention, causal)
 */
#include "card.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <kernels/cuda/build.h>
#include <kernels/cuda/fragment.cuh>
#include <kernels/cuda/layout.h>
#include <kernels/gpu.h>
#include <random>
#include <sys/mman.h>
#include <vector>

namespace
{
constexpr uint32_t HEADS = 8, GROUP = 4, WIDTH = 128, SPAN = 64, BLOCK_BYTES = 8192;
constexpr uint32_t N_SPANS = 128, N_DISTINCT = 8, N_STEPS = 200, N_TIMES = 21;
constexpr uint64_t SPAN_BLOCKS = HEADS * SPAN;
constexpr double N_TOKENS = 131072, FLOP_RATE = 400e12;
constexpr double PREFILL_S =
    (2 * 8.0e9 * N_TOKENS + 4 * N_TOKENS * N_TOKENS / 2 * 4096 * 32) / FLOP_RATE;

const winnow_gpu_api *api;
winnow_gpu *gpu;
uint8_t *arena;
uint64_t arena_bytes;
std::vector<uint32_t> home; /* [span][head][block] */

void expect(bool is_true, const char *what)
{
    if (!is_true)
        fail(what, "not as expected");
}

uint16_t bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Blocks of keys in 64 clusters of a span, in random places; the spans beyond N_DISTINCT repeat. */
void arena_fill()
{
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    uint64_t n_blocks = N_SPANS * SPAN_BLOCKS;
    size_t n_of_block = BLOCK_BYTES / sizeof(uint16_t);

    arena_bytes = n_blocks * BLOCK_BYTES;
    arena = (uint8_t *)mmap(NULL, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                            -1, 0);
    expect(arena != MAP_FAILED, "mmap");
    madvise(arena, arena_bytes, MADV_HUGEPAGE);
    home.resize(n_blocks);
    for (uint64_t i = 0; i < n_blocks; i++)
        home[i] = (uint32_t)(i * BLOCK_BYTES / 4096);
    std::shuffle(home.begin(), home.end(), random);
    std::vector<float> centre(64 * WIDTH);
    for (float &x : centre)
        x = normal(random);
    for (uint64_t i = 0; i < n_blocks; i++) {
        uint16_t *block = (uint16_t *)(arena + ((uint64_t)home[i] << 12));
        if (i >= N_DISTINCT * SPAN_BLOCKS) {
            uint64_t same = i % (N_DISTINCT * SPAN_BLOCKS);
            memcpy(block, arena + ((uint64_t)home[same] << 12), BLOCK_BYTES);
            continue;
        }
        const float *of = &centre[random() % 64 * WIDTH];
        for (size_t j = 0; j < n_of_block; j++)
            block[j] = bf16(of[j % WIDTH] + 0.7f * normal(random));
    }
}

winnow_gpu_options options_of()
{
    winnow_gpu_options options = {};
    options.shape = {2,           HEADS * GROUP, HEADS,
                     WIDTH,       WIDTH,         0.08838835f,
                     WINNOW_BF16, WINNOW_BF16,   WINNOW_BLOCK_FRAGMENTS};
    options.segment_tokens = 16 * SPAN;
    options.n_sinks = 16;
    options.n_segments_max = N_SPANS;
    options.n_sessions_max = 1;
    options.n_session_segments_max = N_SPANS;
    options.n_slots = 2 * N_SPANS * SPAN_BLOCKS / 10;
    options.n_items_max = 1;
    options.n_launch_blocks_max = N_SPANS * SPAN;
    return options;
}

/* The index and order of one span in host memory. */
struct result {
    std::vector<uint8_t> memory;
    std::vector<winnow_index_view> views;
    std::vector<uint16_t *> order;
};

void result_init(result *of, const winnow_gpu_view &view)
{
    winnow_gpu_result at;

    of->memory.resize(winnow_gpu_layout_result(&view, NULL, &at) + 16);
    winnow_gpu_layout_result(&view, of->memory.data(), &at);
    for (uint32_t h = 0; h < HEADS; h++) {
        winnow_index_view head = at.index;
        head.head += h * SPAN;
        head.centroid += h * SPAN * WIDTH;
        head.vmean += h * SPAN * WIDTH;
        head.code += h * SPAN * WIDTH * 8;
        head.code_scale += h * SPAN * 16;
        head.mean_k += h * WIDTH;
        head.mean_v += h * WIDTH;
        head.v_max += h;
        of->views.push_back(head);
        of->order.push_back(at.order + h * SPAN * 16);
    }
}

// --- stages of one job --------------------------------------------------------------------------

template <class Put> double stage_us(cudaStream_t stream, Put put)
{
    std::vector<double> us;
    cudaEvent_t begin, end;

    ok(cudaEventCreate(&begin), "event");
    ok(cudaEventCreate(&end), "event");
    for (uint32_t i = 0; i < N_TIMES + 3; i++) {
        float ms;
        ok(cudaEventRecord(begin, stream), "record");
        put();
        ok(cudaEventRecord(end, stream), "record");
        ok(cudaEventSynchronize(end), "stage");
        ok(cudaEventElapsedTime(&ms, begin, end), "time");
        if (i >= 3)
            us.push_back(ms * 1e3);
    }
    ok(cudaEventDestroy(begin), "event");
    ok(cudaEventDestroy(end), "event");
    return median(us);
}

/* n_units segments at once: 8 are a job, 1,056 fill the card. */
void stages_time(const winnow_gpu_view &view, uint32_t n_units)
{
    size_t n_blocks = (size_t)n_units * SPAN, row_bytes = n_blocks * 16 * WIDTH * 2;
    std::vector<uint32_t> homes(n_blocks);
    winnow_gpu_view wide = view;
    winnow_gpu_result at;
    uint8_t *rows, *result;
    uint32_t *homes_at;
    void *scratch;
    cudaStream_t stream;

    for (size_t i = 0; i < n_blocks; i++)
        homes[i] = home[i % home.size()];
    wide.n_kv_heads = n_units;
    size_t result_bytes = winnow_gpu_layout_result(&wide, NULL, &at);
    ok(cudaStreamCreate(&stream), "stream");
    ok(cudaMalloc(&rows, 2 * row_bytes), "rows");
    ok(cudaMalloc(&result, result_bytes), "result");
    ok(cudaMalloc(&scratch, n_units * winnow_gpu_build_scratch_bytes(SPAN)), "scratch");
    ok(cudaMalloc(&homes_at, n_blocks * 4), "homes");
    ok(cudaMemcpy(homes_at, homes.data(), n_blocks * 4, cudaMemcpyHostToDevice), "homes");
    winnow_gpu_layout_result(&wide, result, &at);
    winnow_gpu_build build = {};
    build.k_width = build.v_width = WIDTH;
    build.dtype = WINNOW_BF16;
    build.n_units = n_units;
    build.k = rows;
    build.v = rows + row_bytes;
    build.order = at.order;
    build.index = at.index;
    build.scratch = scratch;
    double gather = stage_us(stream, [&] {
        ok(winnow_gpu_build_gather(&view, (uint32_t)n_blocks, homes_at, rows, rows + row_bytes,
                                   stream),
           "gather");
    });
    double all = stage_us(stream, [&] { ok(winnow_gpu_build_launch(&build, stream), "build"); });
    double index = stage_us(stream, [&] { ok(winnow_gpu_build_index(&build, stream), "index"); });
    printf("%5u units: gather %.1f us (%.1f GB/s), order %.1f us, index %.1f us; order + index "
           "%.2f us a unit\n",
           n_units, gather, (double)n_blocks * BLOCK_BYTES / gather / 1e3, all - index, index,
           all / n_units);
    ok(cudaFree(rows), "free");
    ok(cudaFree(result), "free");
    ok(cudaFree(scratch), "free");
    ok(cudaFree(homes_at), "free");
    ok(cudaStreamDestroy(stream), "stream");
}

/* The copy engine, 64 MiB up from the registered arena. */
void link_time()
{
    size_t n_bytes = 64u << 20;
    void *to;
    cudaStream_t stream;

    ok(cudaStreamCreate(&stream), "stream");
    ok(cudaMalloc(&to, n_bytes), "memory");
    double us = stage_us(stream, [&] {
        ok(cudaMemcpyAsync(to, arena, n_bytes, cudaMemcpyHostToDevice, stream), "copy");
    });
    printf("copy engine %.1f GB/s\n", (double)n_bytes / us / 1e3);
    ok(cudaFree(to), "free");
    ok(cudaStreamDestroy(stream), "stream");
}

// --- through the contract -----------------------------------------------------------------------

/* Jobs kept out, and what the owner's calls took. */
struct pipeline {
    result of[WINNOW_GPU_BUILDS_MAX];
    int64_t ticket[WINNOW_GPU_BUILDS_MAX];
    uint64_t n_begun, n_done;
    double begin_us, take_us;
};

/* Takes what is complete and begins up to n_jobs in all. */
void pipeline_turn(pipeline *p, uint64_t n_jobs)
{
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++) {
        if (p->ticket[i]) {
            double before = now_us();
            int rc = api->build_poll(gpu, p->ticket[i], false, p->of[i].order.data(),
                                     p->of[i].views.data());
            expect(rc >= 0, "build_poll");
            if (rc == 0)
                continue;
            p->take_us += now_us() - before;
            p->ticket[i] = 0;
            p->n_done++;
        }
        if (p->n_begun == n_jobs)
            continue;
        double before = now_us();
        p->ticket[i] = api->build(gpu, &home[p->n_begun++ % N_SPANS * SPAN_BLOCKS]);
        p->begin_us += now_us() - before;
        expect(p->ticket[i] > 0, "build");
    }
}

void pipeline_init(pipeline *p, const winnow_gpu_view &view)
{
    for (result &of : p->of)
        result_init(&of, view);
}

void share_print(const char *what, double layer_us)
{
    printf("%s: %.0f us a layer of 128K, 32 layers %.3f s = %.2f %% of a prefill of %.1f s\n", what,
           layer_us, 32 * layer_us / 1e6, 100 * 32 * layer_us / 1e6 / PREFILL_S, PREFILL_S);
}

void layers_time(const winnow_gpu_view &view, uint64_t n_layers)
{
    pipeline *p = new pipeline();

    pipeline_init(p, view);
    while (p->n_done < N_SPANS)
        pipeline_turn(p, N_SPANS);
    p->n_begun = p->n_done = 0;
    p->begin_us = p->take_us = 0;
    double before = now_us();
    while (p->n_done < n_layers * N_SPANS)
        pipeline_turn(p, n_layers * N_SPANS);
    share_print("alone", (now_us() - before) / (double)n_layers);
    printf("owner, a job: begin %.1f us, take %.1f us\n", p->begin_us / (double)p->n_done,
           p->take_us / (double)p->n_done);
    delete p;
}

/* One job at a time, host to host. */
void job_time(const winnow_gpu_view &view)
{
    std::vector<double> us;
    result of;

    result_init(&of, view);
    for (uint32_t i = 0; i < N_TIMES; i++) {
        double before = now_us();
        int64_t ticket = api->build(gpu, &home[i % N_SPANS * SPAN_BLOCKS]);
        expect(ticket > 0 &&
                   api->build_poll(gpu, ticket, true, of.order.data(), of.views.data()) == 1,
               "job");
        us.push_back(now_us() - before);
    }
    printf("one job, host to host: %.0f us\n", median(us));
}

/* 128K tokens of layer 0: built by the device, put, and attended at their unpermuted homes. */
void context_put(const winnow_gpu_view &view)
{
    std::vector<uint32_t> slots(N_SPANS);
    const void *sinks[HEADS];
    uint32_t number = 0;
    result of;

    for (uint32_t h = 0; h < HEADS; h++)
        sinks[h] = arena + ((uint64_t)home[h] << 12);
    expect(api->tail_put(gpu, 0, 0, 1, &number, sinks) == 0, "tail_put");

    result_init(&of, view);
    for (uint32_t i = 0; i < N_SPANS; i++) {
        const uint32_t *homes = &home[i * SPAN_BLOCKS];
        int64_t ticket = api->build(gpu, homes);
        expect(api->build_poll(gpu, ticket, true, of.order.data(), of.views.data()) == 1, "build");
        expect(api->segment_put(gpu, i, 0, of.views.data(), homes) == 0, "segment_put");
        slots[i] = i;
    }
    expect(api->session_set(gpu, 0, N_SPANS, slots.data()) == 0, "session_set");
}

void steps_time(const winnow_gpu_view &view)
{
    pipeline *p = new pipeline();
    std::vector<uint16_t> q(HEADS * GROUP * WIDTH), out(q.size());
    winnow_gpu_certificate certificate;
    winnow_gpu_item item = {};
    std::vector<double> us[2];
    std::mt19937 random(2);
    std::normal_distribution<float> normal;

    pipeline_init(p, view);
    item.n_segments = N_SPANS;
    item.n_tokens = 16 + 1024 * N_SPANS;
    item.mass = 0.9f;
    item.q = q.data();
    item.out = out.data();
    item.certificate = &certificate;
    for (int beside = 0; beside < 2; beside++) {
        double before_all = now_us();
        for (uint32_t step = 0; step < N_STEPS; step++) {
            for (uint16_t &x : q)
                x = bf16(3 * normal(random));
            if (beside)
                pipeline_turn(p, UINT64_MAX);
            double before = now_us();
            int64_t ticket = api->decode(gpu, 1, &item);
            expect(ticket > 0, "decode");
            for (int rc = 0; rc == 0;) {
                rc = api->poll(gpu, ticket, false);
                expect(rc >= 0, "poll");
            }
            us[beside].push_back(now_us() - before);
            expect(certificate.status == 0, "step");
        }
        std::sort(us[beside].begin(), us[beside].end());
        printf("steps %s: p50 %.0f, p90 %.0f, p99 %.0f us (%u + %u blocks)\n",
               beside ? "beside jobs" : "alone", us[beside][N_STEPS / 2],
               us[beside][N_STEPS * 9 / 10], us[beside][N_STEPS * 99 / 100],
               certificate.n_blocks_device, certificate.n_blocks_host);
        if (beside)
            share_print("beside steps", (now_us() - before_all) / (double)p->n_done * N_SPANS);
    }
    while (p->n_done < p->n_begun)
        pipeline_turn(p, p->n_begun);
    delete p;
}
// --- beside a prefill ---------------------------------------------------------------------------

constexpr uint32_t N_PRODUCTS = 40, N_ROUNDS = 12000, PRODUCT_BYTES = 160u << 10;

/* A thread block a multiprocessor, tensor cores busy, for about 0.1 ms. */
__global__ void __launch_bounds__(256, 1) products(float *sink)
{
    float sum[8][4] = {};
    uint4 a = make_uint4(threadIdx.x, 1, 2, 3);
    uint2 b = make_uint2(blockIdx.x, 5);

    for (uint32_t i = 0; i < N_ROUNDS / 8; i++)
#pragma unroll
        for (uint32_t j = 0; j < 8; j++)
            mma<WINNOW_FP16>(sum[j], a, b);
    for (uint32_t j = 1; j < 8; j++)
        sum[0][0] += sum[j][0];
    if (sum[0][0] == 12345)
        *sink = sum[0][0];
}

/* us of the products; with p: jobs are kept out meanwhile. */
double products_us(cudaStream_t stream, float *sink, pipeline *p)
{
    cudaEvent_t begin, end;
    float ms;

    ok(cudaEventCreate(&begin), "event");
    ok(cudaEventCreate(&end), "event");
    ok(cudaEventRecord(begin, stream), "record");
    for (uint32_t i = 0; i < N_PRODUCTS; i++)
        products<<<132 * 8, 256, PRODUCT_BYTES, stream>>>(sink);
    ok(cudaEventRecord(end, stream), "record");
    while (p && cudaEventQuery(end) == cudaErrorNotReady)
        pipeline_turn(p, UINT64_MAX);
    ok(cudaEventSynchronize(end), "products");
    ok(cudaEventElapsedTime(&ms, begin, end), "time");
    ok(cudaEventDestroy(begin), "event");
    ok(cudaEventDestroy(end), "event");
    return ms * 1e3;
}

void prefill_time(const winnow_gpu_view &view)
{
    int least, greatest;
    cudaStream_t stream;
    float *sink;
    pipeline *p = new pipeline();

    pipeline_init(p, view);
    ok(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
    ok(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "stream");
    ok(cudaMalloc(&sink, sizeof *sink), "sink");
    ok(cudaFuncSetAttribute(products, cudaFuncAttributeMaxDynamicSharedMemorySize, PRODUCT_BYTES),
       "shared memory");
    products_us(stream, sink, NULL);
    double alone = products_us(stream, sink, NULL);
    double beside = products_us(stream, sink, p);
    double n_jobs = (double)p->n_done;
    printf("products: %.1f ms alone, %.1f ms beside %.0f jobs\n", alone / 1e3, beside / 1e3,
           n_jobs);
    share_print("price beside products", (beside - alone) / n_jobs * N_SPANS);
    while (p->n_done < p->n_begun)
        pipeline_turn(p, p->n_begun);
    ok(cudaFree(sink), "free");
    ok(cudaStreamDestroy(stream), "stream");
    delete p;
}
} /* namespace */

int main(int argc, char **argv)
{
    uint64_t n_layers = argc > 1 ? strtoull(argv[1], NULL, 10) : 4;
    winnow_gpu_options options = options_of();
    winnow_gpu_device *device;
    winnow_gpu_layout layout;
    char text[256] = "";

    api = winnow_gpu_find(WINNOW_GPU_API_VERSION);
    if (api->probe(0, text) < 0)
        fail("probe", text);
    printf("%s\n", text);
    arena_fill();
    expect(winnow_gpu_layout_init(&layout, &options, text) == 0, "layout");
    if (api->open(0, layout.n_bytes + (UINT64_C(64) << 20), arena, arena_bytes, &device, text) <
            0 ||
        api->create(device, &options, &gpu, text) < 0)
        fail("create", text);
    layout.view.host = arena;
    link_time();
    stages_time(layout.view, HEADS);
    stages_time(layout.view, 132 * HEADS);
    job_time(layout.view);
    layers_time(layout.view, n_layers);
    context_put(layout.view);
    steps_time(layout.view);
    prefill_time(layout.view);
    api->destroy(gpu);
    api->close(device);
    return 0;
}
