/*
 * What an exact window costs on the GPU, in the shape of Llama-3.1-8B (32 query and 8 KV heads, d 128,
 * bf16), host to host through the contract: the queries up, every block over the link, the result
 * down.
 *
 *   window [tokens positions blocks]   of the past, of the window, of a part a KV head
 *
 * Without arguments the cells of bench/gpu/run. Prints the median, the rate of its arithmetic, the
 * time of the attention alone (its blocks on the device) and that of the link alone.
 */
#include "card.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <kernels/gpu.h>
#include <random>
#include <sys/mman.h>
#include <vector>
extern "C" {
#include <kernels/cuda/state.h>
}

namespace
{
constexpr uint32_t Q_HEADS = 32, HEADS = 8, WIDTH = 128, GROUP = Q_HEADS / HEADS;
constexpr uint32_t BLOCK_BYTES = 8192, N_TIMES = 7;

const winnow_gpu_api *api;
winnow_gpu *gpu;
uint8_t *arena;

template <class DO> double median_us(DO once)
{
    std::vector<double> us;

    once();
    for (uint32_t i = 0; i < N_TIMES; i++) {
        double from = now_us();
        once();
        us.push_back(now_us() - from);
    }
    return median(us);
}

struct cell {
    uint32_t n_tokens, n_pos, n_part; /* blocks of a part, a head */
};

/* Small numbers of bf16. */
void arena_fill(uint64_t n_bytes)
{
    std::mt19937 random(1);

    arena =
        (uint8_t *)mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        fail("arena", "no memory");
    madvise(arena, n_bytes, MADV_HUGEPAGE);
    for (uint64_t i = 0; i < n_bytes / 2; i++)
        ((uint16_t *)arena)[i] = i < (4 << 20) ? (uint16_t)(0x3d00 + (random() & 0x80ff))
                                               : ((uint16_t *)arena)[i - (4 << 20)];
}

/* The window's past in parts, nothing beyond it: every query sees every block. */
void window_run(const cell &of, const std::vector<uint32_t> &home)
{
    uint32_t n_blocks = of.n_tokens / 16;
    std::vector<uint32_t> n(HEADS), homes(HEADS * of.n_part);
    int64_t ticket = 0;

    for (uint32_t at = 0; at < n_blocks; at += of.n_part) {
        winnow_gpu_window_part part = {};
        part.is_first = at == 0;
        part.is_last = at + of.n_part >= n_blocks;
        part.n_pos = of.n_pos;
        part.first = of.n_tokens;
        part.n_blocks = n.data();
        part.homes = homes.data();
        for (uint32_t h = 0; h < HEADS; h++) {
            n[h] = std::min(of.n_part, n_blocks - at);
            memcpy(&homes[h * of.n_part], &home[h * n_blocks + at], n[h] * sizeof(uint32_t));
        }
        int64_t next;
        while ((next = api->window(gpu, &part)) == -EBUSY)
            api->window_poll(gpu, ticket, false);
        if (next < 0)
            fail("window", strerror((int)-next));
        ticket = next;
    }
    if (api->window_poll(gpu, ticket, true) != 1)
        fail("window", "lost");
}

/* The same kernels without the link: a stage attended again and again. */
void attend_run(const cell &of)
{
    const winnow_gpu_window_view *view = &gpu->layout.window;
    winnow_gpu_window_launch launch = {};
    cudaStream_t stream = gpu->windower.attend_stream;

    launch.n_rows = of.n_pos * GROUP;
    launch.first = of.n_tokens;
    for (uint32_t at = 0; at < of.n_tokens / 16; at += of.n_part) {
        launch.is_first = at == 0;
        launch.is_last = at + of.n_part >= of.n_tokens / 16;
        ok(winnow_gpu_window_attend(view, &launch, stream), "attend");
    }
    ok(cudaStreamSynchronize(stream), "attend");
}

void gather_run(const cell &of)
{
    const winnow_gpu_window_view *view = &gpu->layout.window;
    cudaStream_t stream = gpu->windower.gather_stream;

    for (uint32_t at = 0; at < of.n_tokens / 16; at += of.n_part)
        ok(winnow_gpu_window_gather(view, 1, &gpu->windower.list[0], of.n_part, false, stream),
           "gather");
    ok(cudaStreamSynchronize(stream), "gather");
}

void cell_run(const cell &of)
{
    uint32_t n = HEADS * of.n_tokens / 16;
    uint64_t n_bytes = (uint64_t)n * BLOCK_BYTES;
    std::vector<uint32_t> home(n);
    char text[256] = "";
    winnow_gpu_device *device;
    winnow_gpu_options options = {};
    struct winnow_gpu_window_rows rows;

    arena_fill(n_bytes);
    for (uint32_t i = 0; i < n; i++)
        home[i] = i * (BLOCK_BYTES / 4096);
    std::shuffle(home.begin(), home.end(), std::mt19937(2));
    options.shape = {1,           Q_HEADS,     HEADS,
                     WIDTH,       WIDTH,       0.0883883f,
                     WINNOW_BF16, WINNOW_BF16, WINNOW_BLOCK_FRAGMENTS};
    options.segment_tokens = 1024;
    options.n_sinks = 16;
    options.n_segments_max = options.n_sessions_max = options.n_session_segments_max = 1;
    options.n_items_max = 1;
    options.n_launch_blocks_max = 64;
    options.n_window_positions = of.n_pos;
    options.n_window_blocks = of.n_part;
    if (api->open(0, UINT64_C(2) << 30, arena, n_bytes, &device, text) < 0 ||
        api->create(device, &options, &gpu, text) < 0)
        fail("gpu", text);
    api->window_rows(gpu, &rows);
    std::fill(rows.q, rows.q + (uint64_t)of.n_pos * Q_HEADS * WIDTH, 0.5f);
    double us = median_us([&] { window_run(of, home); }); /* the result is the next one's query */
    double attend_us = median_us([&] { attend_run(of); });
    double gather_us = median_us([&] { gather_run(of); });
    double flop = 4.0 * of.n_pos * Q_HEADS * WIDTH * of.n_tokens;
    printf("window %7u past, %4u positions, parts of %3u: %9.1f us %6.1f TFLOP/s; alone: attention "
           "%9.1f us %6.1f TFLOP/s, link %9.1f us %5.1f GB/s\n",
           of.n_tokens, of.n_pos, of.n_part, us, flop / us / 1e6, attend_us, flop / attend_us / 1e6,
           gather_us, (double)n_bytes / gather_us / 1e3);
    fflush(stdout);
    api->destroy(gpu);
    api->close(device);
    munmap(arena, n_bytes);
}
} /* namespace */

int main(int argc, char **argv)
{
    static const cell cells[] = {
        {8 << 10, 2048, 128}, {32 << 10, 2048, 128}, {128 << 10, 512, 128}, {128 << 10, 2048, 128},
        {128 << 10, 64, 128}, {128 << 10, 2048, 64}, {128 << 10, 2048, 256}};
    char text[256];

    api = winnow_gpu_find(WINNOW_GPU_API_VERSION);
    if (api->probe(0, text) < 0) {
        printf("%s\n", text);
        return 77;
    }
    printf("# %s\n", text);
    if (argc == 4)
        cell_run({(uint32_t)atoi(argv[1]), (uint32_t)atoi(argv[2]), (uint32_t)atoi(argv[3])});
    else
        for (const cell &of : cells)
            cell_run(of);
    return 0;
}
