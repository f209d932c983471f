/*
 * What the benches of the GPU share: errors that end the program, memory, graphs timed with the L2
 * cache flushed, and the rates of the card itself.
 */
#pragma once

#include <algorithm>
#include <chrono>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

[[noreturn]] inline void fail(const char *what, const char *text)
{
    fprintf(stderr, "%s: %s\n", what, text);
    exit(1);
}

inline void ok(cudaError_t rc, const char *what)
{
    if (rc != cudaSuccess)
        fail(what, cudaGetErrorString(rc));
}

/* By the host's clock. */
inline double now_us()
{
    using namespace std::chrono;
    return (double)duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count() / 1e3;
}

inline double median(std::vector<double> x)
{
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

template <class T> T *device_alloc(size_t n)
{
    void *memory;
    ok(cudaMalloc(&memory, n * sizeof(T)), "cudaMalloc");
    ok(cudaMemset(memory, 0xff, n * sizeof(T)), "cudaMemset");
    ok(cudaDeviceSynchronize(), "cudaMemset"); /* other streams do not wait for it */
    return (T *)memory;
}

template <class T> std::vector<T> device_read(const T *memory, size_t n)
{
    std::vector<T> host(n);
    ok(cudaMemcpy(host.data(), memory, n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
}

template <class T> void device_write(T *memory, const T *from, size_t n)
{
    ok(cudaMemcpy(memory, from, n * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    ok(cudaDeviceSynchronize(), "cudaMemcpy"); /* it returns before pageable bytes are there */
}

template <class T> T *device_copy(const std::vector<T> &from)
{
    T *memory = device_alloc<T>(from.size() + 1);
    device_write(memory, from.data(), from.size());
    return memory;
}

/* Of many replays: the median, and what 1 in 100 is above (the largest of fewer than 100). */
struct spread {
    double us, us_p99;
};

inline spread spread_of(std::vector<float> ms, double n_layers)
{
    size_t n = ms.size();
    std::sort(ms.begin(), ms.end());
    return {1e3 * ms[n / 2] / n_layers, 1e3 * ms[n - 1 - n / 100] / n_layers};
}

/* Times graphs on one stream. */
struct stopwatch {
    static constexpr size_t FLUSH_BYTES = (size_t)256 << 20;
    static constexpr uint32_t N_MIN = 7, N_MAX = 101, N_WARM = 2;
    cudaStream_t stream;
    cudaEvent_t from, to;
    uint8_t *flush;
    double budget_ms; /* of all replays of a graph: sets their number */
};

inline stopwatch stopwatch_init(cudaStream_t stream, double budget_ms)
{
    stopwatch w = {stream, NULL, NULL, device_alloc<uint8_t>(stopwatch::FLUSH_BYTES), budget_ms};
    ok(cudaEventCreate(&w.from), "event");
    ok(cudaEventCreate(&w.to), "event");
    return w;
}

inline void stopwatch_finish(stopwatch *w)
{
    ok(cudaEventDestroy(w->from), "event");
    ok(cudaEventDestroy(w->to), "event");
    ok(cudaFree(w->flush), "cudaFree");
}

/* put(): into the stream, as one graph of n_layers layers; before(): before each replay, untimed. */
template <class PUT, class BEFORE>
spread graph_time(const stopwatch &w, uint32_t n_layers, PUT put, BEFORE before)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    std::vector<float> ms;
    uint32_t n = stopwatch::N_MIN;

    ok(cudaStreamBeginCapture(w.stream, cudaStreamCaptureModeGlobal), "capture");
    put();
    ok(cudaStreamEndCapture(w.stream, &graph), "capture");
    ok(cudaGraphInstantiate(&exec, graph, 0), "graph");
    for (uint32_t i = 0; i < stopwatch::N_WARM + n; i++) {
        float x;
        before();
        ok(cudaMemsetAsync(w.flush, (int)i, stopwatch::FLUSH_BYTES, w.stream), "flush");
        ok(cudaEventRecord(w.from, w.stream), "event");
        ok(cudaGraphLaunch(exec, w.stream), "launch");
        ok(cudaEventRecord(w.to, w.stream), "event");
        ok(cudaStreamSynchronize(w.stream), "graph");
        ok(cudaEventElapsedTime(&x, w.from, w.to), "event");
        if (i < stopwatch::N_WARM)
            n = std::min(std::max((uint32_t)(w.budget_ms / x), stopwatch::N_MIN), stopwatch::N_MAX);
        else
            ms.push_back(x);
    }
    ok(cudaGraphExecDestroy(exec), "graph");
    ok(cudaGraphDestroy(graph), "graph");
    return spread_of(ms, n_layers);
}

/* Reads n 16-byte words, eight loads of a thread under way. */
static __global__ void __launch_bounds__(512)
    card_read_kernel(const uint4 *from, size_t n, uint32_t *to)
{
    size_t stride = (size_t)gridDim.x * blockDim.x;
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum = 0;

    for (; i + 7 * stride < n; i += 8 * stride) {
        uint4 x[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            x[k] = __ldcs(from + i + k * stride);
#pragma unroll
        for (int k = 0; k < 8; k++)
            sum ^= x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
    }
    if (sum == 0x12345678)
        *to = 1;
}

/* GB/s that plain loads reach of device memory: the best of several grids. */
inline double card_read_rate(const stopwatch &w, uint32_t n_multiprocessors)
{
    size_t n_bytes = (size_t)4 << 30;
    uint8_t *from = device_alloc<uint8_t>(n_bytes);
    uint32_t *to = device_alloc<uint32_t>(1);
    double best = 0;

    for (uint32_t n = 2; n <= 16; n *= 2) {
        spread s = graph_time(
            w, 1,
            [&] {
                card_read_kernel<<<n_multiprocessors * n, 512, 0, w.stream>>>((const uint4 *)from,
                                                                              n_bytes / 16, to);
            },
            [] {});
        best = std::max(best, (double)n_bytes / s.us / 1e3);
    }
    ok(cudaFree(from), "cudaFree");
    ok(cudaFree(to), "cudaFree");
    return best;
}

/* GB/s of the copy engine out of pinned memory. */
inline double card_copy_rate(const stopwatch &w, const uint8_t *pinned, size_t n_bytes)
{
    uint8_t *to = device_alloc<uint8_t>(n_bytes);
    spread s = graph_time(
        w, 1,
        [&] { ok(cudaMemcpyAsync(to, pinned, n_bytes, cudaMemcpyHostToDevice, w.stream), "copy"); },
        [] {});

    ok(cudaFree(to), "cudaFree");
    return (double)n_bytes / s.us / 1e3;
}
