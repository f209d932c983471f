/*
 * bench-gpu-scan: is the scan as fast as memory, and what does selection cost beside it?
 *
 * First both are checked (scan_check.cuh), then timed: one layer of Llama-3.1-8B's shape (8 KV
 * heads, G 4, width 128), several layers' data in turn from a CUDA graph, L2 flushed before each
 * replay, median of 21; "2K of 128": 2K tokens where a launch has room for 128K. The read ceiling of the card comes from the same run. `check` or `time` as
 * the argument does one of the two; `traces DIR` holds real attention against ref.
 *
 *   nvcc -std=c++17 -O3 -arch=sm_90 -I. -o bench-gpu-scan bench/gpu/scan.cu kernels/cuda/scan.cu \
 *     kernels/cuda/select.cu kernels/cuda/index_pack.c build/dev/lib/libwinnow_{trace,kernels,base}.a
 */
extern "C" {
#include <bench/trace.h>
}
#include "scan_check.cuh"

static const uint32_t N_REPLAYS = 21, HEADS = 8, G = 4, WIDTH = 128;

/* --- time --- */

static __global__ void __launch_bounds__(512) read_kernel(const uint4 *from, size_t n, uint32_t *to)
{
    size_t stride = (size_t)gridDim.x * blockDim.x,
           i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint4 sum = make_uint4(0, 0, 0, 0);

    for (; i + 7 * stride < n; i += 8 * stride) {
        uint4 x[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            x[k] = __ldcs(from + i + k * stride);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            sum.x ^= x[k].x;
            sum.y ^= x[k].y;
            sum.z ^= x[k].z;
            sum.w ^= x[k].w;
        }
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678)
        *to = 1;
}

static __device__ uint32_t hash(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* Indexes out of nothing: codes and centroids at random, their scales such that logits spread as
 * those of a context of which some percent are selected. A thread block a unit. */
static __global__ void fill_kernel(winnow_gpu_view view, uint32_t n_units)
{
    uint32_t unit = blockIdx.x, n = view.span_blocks;
    uint8_t *index = view.index + (size_t)unit * view.unit_bytes;
    uint32_t code_bytes = 512 * ((view.k_width + 63) / 64),
             centroids_end = 8 * (code_bytes + view.k_width);

    if (unit >= n_units)
        return;
    for (uint32_t i = threadIdx.x; i < n / 8 * view.record_bytes / 4; i += blockDim.x) {
        uint32_t at = i * 4 % view.record_bytes, *word = (uint32_t *)index + i;
        if (at < centroids_end)
            *word = hash(unit * 0x9e3779b9u + i);
        else if (at < centroids_end + 8 * 32)
            *word = 0x33003300u; /* .22 */
        else
            *word = __float_as_uint(0.045f);
    }
    for (uint32_t b = threadIdx.x; b < n; b += blockDim.x) {
        ((uint32_t *)(index + view.home_at))[b] = unit * n + b;
        ((uint32_t *)(index + view.loc_at))[b] = 0;
    }
}

struct timing {
    scene s;
    std::vector<winnow_gpu_launch *> launch; /* of each layer */
    uint8_t *flush;
    size_t flush_bytes;
    cudaStream_t stream;
    cudaEvent_t begin, end;
};

/* room: what a launch could hold, in multiples of what it does. */
static void timing_init(timing *t, uint32_t n_tokens, uint32_t n_items, uint32_t n_layers,
                        uint32_t room)
{
    uint32_t n_segments = n_tokens / 1024, n_blocks = n_tokens / 16 * n_items * HEADS;
    scene_options options = {n_layers,    HEADS,       G,       WIDTH,
                             WIDTH,       WINNOW_BF16, 64,      n_segments * n_items,
                             n_items,     n_segments,  n_items, n_blocks * room,
                             n_blocks / 4};
    random_source random(7);

    scene_init(&t->s, options);
    uint32_t n_units = n_segments * n_items * n_layers * HEADS;
    fill_kernel<<<n_units, 256>>>(t->s.view, n_units);
    ok(cudaDeviceSynchronize(), "fill");
    std::vector<uint32_t> table(n_segments * n_items);
    for (uint32_t i = 0; i < table.size(); i++)
        table[i] = i;
    std::shuffle(table.begin(), table.end(), random);
    device_write(t->s.view.session_segments, table.data(), table.size());
    std::vector<float> ln_z((size_t)n_items * HEADS * G, 4.0f);
    device_write(t->s.ln_z, ln_z.data(), ln_z.size());
    for (uint32_t layer = 0; layer < n_layers; layer++) {
        for (uint32_t i = 0; i < n_items; i++) {
            std::vector<float> q(HEADS * G * WIDTH);
            for (uint32_t j = 0; j < HEADS * WIDTH; j++) {
                float shared = 0.9f * normal(random);
                for (uint32_t g = 0; g < G; g++)
                    q[(j / WIDTH * G + g) * WIDTH + j % WIDTH] = shared + 0.43f * normal(random);
            }
            std::vector<uint8_t> bytes = query_bytes(WINNOW_BF16, &q);
            uint8_t *device = device_alloc<uint8_t>(bytes.size());
            device_write(device, bytes.data(), bytes.size());
            winnow_gpu_item item = {};
            item.session = i;
            item.layer = layer;
            item.n_segments = n_segments;
            item.mass = 0.9f;
            item.q = device;
            t->s.launch->item[i] = item;
        }
        t->s.view.launch = device_alloc<winnow_gpu_launch>(1);
        t->launch.push_back(t->s.view.launch);
        scene_launch_write(&t->s, n_items, 1);
    }
    t->flush_bytes = 256u << 20;
    t->flush = device_alloc<uint8_t>(t->flush_bytes);
    ok(cudaStreamCreate(&t->stream), "stream");
    ok(cudaEventCreate(&t->begin), "event");
    ok(cudaEventCreate(&t->end), "event");
}

static void timing_finish(timing *t)
{
    for (winnow_gpu_launch *launch : t->launch)
        ok(cudaFree(launch), "cudaFree");
    t->s.view.launch = nullptr;
    ok(cudaFree(t->flush), "cudaFree");
    scene_finish(&t->s);
}

/* us a layer, median over replays of a graph that runs body for every layer. */
template <class BODY> static double layer_us(timing *t, BODY body)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    std::vector<float> ms(N_REPLAYS);

    ok(cudaStreamBeginCapture(t->stream, cudaStreamCaptureModeGlobal), "capture");
    for (winnow_gpu_launch *launch : t->launch) {
        t->s.view.launch = launch;
        body();
    }
    ok(cudaStreamEndCapture(t->stream, &graph), "capture");
    ok(cudaGraphInstantiate(&exec, graph, 0), "graph");
    for (int i = -2; i < (int)N_REPLAYS; i++) {
        float x;
        /* By reading: what a write leaves in the L2 would go to memory in the time measured. */
        read_kernel<<<4 * 132, 512, 0, t->stream>>>((const uint4 *)t->flush, t->flush_bytes / 16,
                                                    (uint32_t *)t->flush);
        ok(cudaEventRecord(t->begin, t->stream), "event");
        ok(cudaGraphLaunch(exec, t->stream), "launch");
        ok(cudaEventRecord(t->end, t->stream), "event");
        ok(cudaStreamSynchronize(t->stream), "graph");
        ok(cudaEventElapsedTime(&x, t->begin, t->end), "event");
        ms[std::max(i, 0)] = x;
    }
    ok(cudaGraphExecDestroy(exec), "graph");
    ok(cudaGraphDestroy(graph), "graph");
    std::nth_element(ms.begin(), ms.begin() + N_REPLAYS / 2, ms.end());
    return 1e3 * ms[N_REPLAYS / 2] / (double)t->launch.size();
}

/* GB/s that plain loads reach. */
static double read_ceiling(void)
{
    size_t n_bytes = (size_t)2 << 30;
    uint4 *from = (uint4 *)device_alloc<uint8_t>(n_bytes);
    uint32_t *to = device_alloc<uint32_t>(1);
    cudaEvent_t begin, end;
    double best = 0;

    ok(cudaEventCreate(&begin), "event");
    ok(cudaEventCreate(&end), "event");
    for (uint32_t grid : {132 * 2, 132 * 4, 132 * 8, 132 * 16}) {
        std::vector<float> ms(N_REPLAYS);
        for (float &x : ms) {
            ok(cudaEventRecord(begin), "event");
            read_kernel<<<grid, 512>>>(from, n_bytes / 16, to);
            ok(cudaEventRecord(end), "event");
            ok(cudaDeviceSynchronize(), "read");
            ok(cudaEventElapsedTime(&x, begin, end), "event");
        }
        std::nth_element(ms.begin(), ms.begin() + N_REPLAYS / 2, ms.end());
        best = std::max(best, (double)n_bytes / ms[N_REPLAYS / 2] / 1e6);
    }
    ok(cudaFree(from), "cudaFree");
    ok(cudaFree(to), "cudaFree");
    return best;
}

static double selected_share(timing *t)
{
    std::vector<winnow_gpu_unit> units = device_read(t->s.view.unit, t->s.grid.n_units_max);
    double n = 0, n_blocks = 0;
    for (const winnow_gpu_unit &unit : units) {
        n += unit.n_selected;
        n_blocks += unit.n_blocks;
    }
    return n / n_blocks;
}

static void time_one(const char *name, uint32_t n_tokens, uint32_t n_items, uint32_t n_layers,
                     double ceiling, uint32_t room = 1)
{
    timing t = {};
    timing_init(&t, n_tokens, n_items, n_layers, room);
    const scene &s = t.s;
    auto begin = [&] { scene_begin(s, 1, t.stream); };
    auto scan = [&] { ok(winnow_gpu_stage_scan(&s.view, &s.grid, t.stream), "scan"); };
    auto select = [&] { ok(winnow_gpu_stage_select(&s.view, &s.grid, t.stream), "select"); };
    auto fetched = [&] { scene_fetched(s, t.stream); };

    /* Everything selected gets its slot; from then on all are hits. */
    layer_us(&t, [&] { begin(), scan(), select(), fetched(); });
    double only_begin = layer_us(&t, begin);
    double begin_scan = layer_us(&t, [&] { begin(), scan(); });
    double all = layer_us(&t, [&] { begin(), scan(), select(); });
    double share = selected_share(&t), scan_us = begin_scan - only_begin;
    double bytes = (double)n_tokens / 128 * n_items * HEADS * s.view.record_bytes;
    t.s.view.n_slots_layer = 0;
    double unfit = layer_us(&t, [&] { begin(), scan(), select(); });
    printf("%-9s %6.1f MB  scan %7.2f us, %5.0f GB/s, %5.1f %%  select %6.2f us (no slots %6.2f)  "
           "both %7.2f  begin %5.2f  selected %5.2f %%\n",
           name, bytes / 1e6, scan_us, bytes / scan_us / 1e3, 100 * bytes / scan_us / 1e3 / ceiling,
           all - begin_scan, unfit - begin_scan, all - only_begin, only_begin, 100 * share);
    timing_finish(&t);
}

static void time_all(void)
{
    cudaDeviceProp prop;
    int driver;
    double ceiling = read_ceiling();

    ok(cudaGetDeviceProperties(&prop, 0), "device");
    ok(cudaDriverGetVersion(&driver), "driver");
    printf("%s, %d SMs, CUDA driver %d; read ceiling %.0f GB/s; us a layer, median of %u\n",
           prop.name, prop.multiProcessorCount, driver, ceiling, N_REPLAYS);
    time_one("2K x 1", 2048, 1, 8, ceiling);
    time_one("2K of 128", 2048, 1, 8, ceiling, 64);
    time_one("32K x 1", 32768, 1, 8, ceiling);
    time_one("128K x 1", 131072, 1, 4, ceiling);
    time_one("32K x 8", 32768, 8, 4, ceiling);
    time_one("128K x 8", 131072, 8, 4, ceiling);
    time_one("512K x 1", 524288, 1, 4, ceiling);
    time_one("1K x 256", 1024, 256, 4, ceiling);
}

/* --- real attention --- */

/* Segments of 1,024 tokens after the sinks; the queries of several steps, a launch each. */
static void check_trace(const winnow_trace &trace)
{
    uint32_t n_segments = (trace.n_tokens - 16) / 1024, width = trace.width;
    scene_options options = {1,          1, trace.n_q,  width, width,           WINNOW_FP32,    64,
                             n_segments, 1, n_segments, 1,     n_segments * 64, n_segments * 64};
    random_source random(1);
    batch b;
    double n_selected = 0, n_ref = 0;
    std::vector<float> centre;

    batch_init(&b, options, random, RANDOM, {n_segments}, &centre);
    for (uint32_t i = 0; i < n_segments; i++) {
        const float *k = trace.k + (size_t)(16 + 1024 * i) * width;
        const float *v = trace.v + (size_t)(16 + 1024 * i) * width;
        b.index[i] = host_index();
        index_build(b.s, std::vector<float>(k, k + 1024 * width),
                    std::vector<float>(v, v + 1024 * width), &b.index[i]);
        index_write(b.s, i, 0, 0, &b.index[i]);
    }
    for (uint32_t step = 0; step < trace.n_steps; step += 8) {
        const float *q = trace.q + (size_t)step * trace.n_q * width;
        b.q[0].assign(q, q + trace.n_q * width);
        device_write((float *)b.q_device[0], q, trace.n_q * width);
        check_scan(&b, trace.name);
        scene_launch_write(&b.s, 1, step + 1);
        std::vector<float> ln_e = batch_scan(&b, b.s.grid.n_multiprocessors);
        b.ln_z.assign(trace.n_q, -INFINITY);
        downloaded d = batch_select(&b, step + 1);
        check_unit_select(b, d, 0, trace.name);
        uint32_t n = b.s.launch->n_blocks;
        std::vector<float> key(n);
        std::vector<uint32_t> idx(n);
        std::vector<uint8_t> selected(n);
        std::vector<uint64_t> scratch(2 * n);
        winnow_selection sel = {};
        sel.n_q = trace.n_q;
        sel.n_blocks = sel.n_blocks_max = n;
        sel.mass = 0.9f;
        sel.ln_z = b.ln_z.data();
        sel.ln_e = ln_e.data();
        sel.ln_key = key.data();
        sel.block_idx = idx.data();
        sel.selected = selected.data();
        winnow_kernels_ref()->select(WINNOW_POLICY_CODES, &sel, scratch.data());
        EXPECT(d.unit[0].n_selected >= sel.n_selected, "%s, step %u: %u, ref %u", trace.name, step,
               d.unit[0].n_selected, sel.n_selected);
        n_selected += d.unit[0].n_selected;
        n_ref += sel.n_selected;
        scene_fetched(b.s, 0);
    }
    printf("  %s: %.2f %% more blocks than ref: %s\n", trace.name, 100 * (n_selected / n_ref - 1),
           n_failures ? "FAILED" : "ok");
    batch_finish(&b);
}

static void check_traces(const char *directory)
{
    winnow_trace_list list;
    int rc = winnow_trace_list_open(directory, &list);

    EXPECT(rc == 0, "%s: %s", directory, strerror(-rc));
    for (uint32_t i = 0; rc == 0 && i < list.n_paths; i++) {
        winnow_trace trace;
        rc = winnow_trace_open(list.path[i], &trace);
        EXPECT(rc == 0, "%s: %s", list.path[i], strerror(-rc));
        if (rc != 0)
            break;
        check_trace(trace);
        winnow_trace_close(&trace);
    }
    winnow_trace_list_close(&list);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!*what || !strcmp(what, "check"))
        check_all();
    if (!*what || !strcmp(what, "traces"))
        check_traces(argc > 2 ? argv[2] : "tests/golden/traces");
    if (n_failures)
        printf("%d checks failed\n", n_failures);
    if (!*what || !strcmp(what, "time"))
        time_all();
    return n_failures != 0;
}
