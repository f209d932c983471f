/*
 * bench-gpu-layer: a decode step of one layer as the daemon runs it, beside dense attention with all
 * KV in device memory and beside the KV streamed from pinned memory. Shape of Llama-3.1-8B: 32 query
 * and 8 KV heads, d 128, bf16; 1,024 of the tokens are sinks and tail.
 *
 *   bench-gpu-layer [--quick | SIZE ..]   CSV to stdout; bench/gpu/run makes tables of it
 *                                         SIZE: 128Kx8 alone, and only `layer` and `upto` at 2 %;
 *                                         2Kx1: what a layer costs when there is nothing to do
 *
 * First the card's own rates. Then for every size, from graphs over several layers of rotated data
 * with the L2 cache flushed, medians of 7 to 101 replays:
 *   layer      all stages, at shares selected of 1, 2, 5 % and hit rates of 0 to 1 (plant.cuh)
 *   upto       the same at 2 %, .9, without the later stages: differences are a stage's time
 *   scan       of those the scan, and no thread block of it fetches: what it makes of the card
 *   steps      decode steps one after the other, the queries drifting, select and cache left alone
 *   dense      own kernel, the best of eight ways to split it; and how far Winnow's output is from it
 *   whole      everything read (P = 1), all but what is in slots over the link; and how far it is
 *   streamed   copies of whole heads, 16 MiB or more, double-buffered, the dense kernel behind them
 * Each row says how many layers were in turn: four, two of the sizes that take long, or what device
 * memory holds.
 */
#include "peer.cuh"

#include <chrono>
#include <sys/mman.h>

namespace
{

constexpr uint32_t N_ALIASES = 1u << 19;                 /* 4 GiB */
constexpr uint32_t N_LAYERS = 4, LONG_TOKENS = 1u << 22; /* of all sessions: half the layers */
constexpr size_t RESERVE_BYTES = (size_t)2 << 30; /* of device memory, for what is not a stack */

struct bench {
    uint8_t *arena;
    double budget_ms, read_rate, copy_rate; /* GB/s */
    bool is_quick, is_brief;
};

struct row {
    const char *what;
    uint32_t n_tokens, batch;
    double share, hits; /* asked */
    uint32_t n_layers;
    spread time;
    double rate; /* GB/s, 0: none */
    char note[200];
};

void print(const row &r)
{
    printf("%s,%u,%u,%g,%g,%u,%.2f,%.2f,%.1f,%s\n", r.what, r.n_tokens, r.batch, r.share, r.hits,
           r.n_layers, r.time.us, r.time.us_p99, r.rate, r.note);
    fflush(stdout);
}

uint64_t arena_bytes()
{
    return (uint64_t)N_ALIASES * MODEL_BLOCK_BYTES;
}

/* Host memory with the model's blocks, not pinned. */
uint8_t *arena_make()
{
    void *memory =
        mmap(NULL, arena_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    constexpr uint32_t N_PIECE = 1 << 17;
    uint8_t *piece = device_alloc<uint8_t>((size_t)N_PIECE * MODEL_BLOCK_BYTES);
    std::vector<uint32_t> alias(N_PIECE);

    if (memory == MAP_FAILED) {
        perror("host memory");
        exit(1);
    }
    madvise(memory, arena_bytes(), MADV_HUGEPAGE);
    for (uint32_t first = 0; first < N_ALIASES; first += N_PIECE) {
        std::iota(alias.begin(), alias.end(), first);
        model_blocks_write(piece, alias);
        ok(cudaMemcpy((uint8_t *)memory + (size_t)first * MODEL_BLOCK_BYTES, piece,
                      (size_t)N_PIECE * MODEL_BLOCK_BYTES, cudaMemcpyDeviceToHost),
           "arena");
    }
    ok(cudaFree(piece), "cudaFree");
    return (uint8_t *)memory;
}

/* What the card can: reads of its memory, and the copy engine. */
void rates_run(bench *b)
{
    constexpr size_t COPY_BYTES = (size_t)1 << 30;
    cudaStream_t stream;
    int n_multiprocessors;

    ok(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
    ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    stopwatch w = stopwatch_init(stream, b->budget_ms);
    b->read_rate = card_read_rate(w, (uint32_t)n_multiprocessors);
    ok(cudaHostRegister(b->arena, COPY_BYTES, cudaHostRegisterPortable), "register");
    b->copy_rate = card_copy_rate(w, b->arena, COPY_BYTES);
    ok(cudaHostUnregister(b->arena), "register");
    print({"read", 0, 0, 0, 0, 1, {}, b->read_rate, "loads of device memory"});
    print({"copy", 0, 0, 0, 0, 1, {}, b->copy_rate, "copy engine from pinned memory"});
    stopwatch_finish(&w);
    ok(cudaStreamDestroy(stream), "stream");
}

/* --- the link --- */

struct gather {
    const stack *s;
    winnow_gpu_queue *queue; /* as select would leave it: blocks to fetch, nothing to attend */
    uint32_t n;
};

/* No unit ends: that every thread block is to end is there from the start. */

void gather_plant(const gather &g)
{
    ok(cudaMemcpyAsync(g.s->layer[0].view.queue, g.queue, sizeof *g.queue, cudaMemcpyDeviceToDevice,
                       g.s->gpu->stream),
       "plant");
    ok(cudaMemsetAsync(g.s->layer[0].view.more, 0xff,
                       2 * sizeof(uint64_t) * g.s->grid.n_multiprocessors, g.s->gpu->stream),
       "plant");
}

void gather_put(const gather &g)
{
    ok(winnow_gpu_stage_attend(&g.s->layer[0].view, &g.s->grid, g.s->gpu->stream), "attend");
}

/* Both rates while the gather runs: the reader goes on after it, at the card's rate. */
void gather_beside(const bench &b, const gather &g, double *gather_rate, double *read_rate)
{
    constexpr size_t READ_BYTES = (size_t)4 << 30;
    constexpr int N_READS = 16, N_TIMES = 5;
    cudaStream_t stream = g.s->gpu->stream, other;
    uint8_t *from = device_alloc<uint8_t>(READ_BYTES);
    uint32_t *to = device_alloc<uint32_t>(1);
    cudaEvent_t begin, end, end_of_read;
    std::vector<float> gather_ms, read_ms;

    ok(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "stream");
    ok(cudaEventCreate(&begin), "event");
    ok(cudaEventCreate(&end), "event");
    ok(cudaEventCreate(&end_of_read), "event");
    for (int i = 0; i < N_TIMES; i++) {
        float ms;
        gather_plant(g);
        ok(cudaEventRecord(begin, stream), "event");
        ok(cudaStreamWaitEvent(other, begin, 0), "event");
        gather_put(g);
        ok(cudaEventRecord(end, stream), "event");
        for (int k = 0; k < N_READS; k++)
            card_read_kernel<<<g.s->grid.n_multiprocessors * 4, 512, 0, other>>>(
                (const uint4 *)from, READ_BYTES / 16, to);
        ok(cudaEventRecord(end_of_read, other), "event");
        ok(cudaDeviceSynchronize(), "gather");
        ok(cudaEventElapsedTime(&ms, begin, end), "event");
        gather_ms.push_back(ms);
        ok(cudaEventElapsedTime(&ms, begin, end_of_read), "event");
        read_ms.push_back(ms);
    }
    double gather_us = spread_of(gather_ms, 1).us, read_us = spread_of(read_ms, 1).us;
    *gather_rate = (double)g.n * MODEL_BLOCK_BYTES / gather_us / 1e3;
    *read_rate = (N_READS * (double)READ_BYTES - b.read_rate * 1e3 * (read_us - gather_us)) /
                 gather_us / 1e3;
    ok(cudaEventDestroy(begin), "event");
    ok(cudaEventDestroy(end), "event");
    ok(cudaEventDestroy(end_of_read), "event");
    ok(cudaStreamDestroy(other), "stream");
    ok(cudaFree(from), "cudaFree");
    ok(cudaFree(to), "cudaFree");
}

/* A launch that does nothing but fetch, alone and beside a reader of device memory. */
void gather_run(const bench &b)
{
    planted p;
    planted_init(&p, 131072, 1, N_LAYERS, b.arena, N_ALIASES);
    stack &s = p.s;
    const winnow_gpu_view &view = s.layer[0].view;
    uint32_t n = s.n_units * s.n_blocks, n_slots = view.n_slots_layer * view.n_layers;
    std::vector<winnow_gpu_fetch> fetch(n);
    winnow_gpu_queue queue = {};
    double gather_rate, read_rate;

    for (uint32_t i = 0; i < n; i++)
        fetch[i] = {(uint32_t)(s.random() % N_ALIASES) * 2, i % n_slots};
    device_write(view.fetch, fetch.data(), n);
    queue.n_fetch = n;
    gather g = {&s, device_copy(std::vector<winnow_gpu_queue>(1, queue)), n};
    stopwatch w = stopwatch_init(s.gpu->stream, b.budget_ms);
    spread alone = graph_time(
        w, 1, [&] { gather_put(g); }, [&] { gather_plant(g); });
    double rate = (double)n * MODEL_BLOCK_BYTES / alone.us / 1e3;
    print({"gather", 0, 0, 0, 0, 1, alone, rate, "alone"});
    gather_beside(b, g, &gather_rate, &read_rate);
    print({"gather_beside", 0, 0, 0, 0, 1, {}, gather_rate, "beside a reader of device memory"});
    print({"read_beside", 0, 0, 0, 0, 1, {}, read_rate, "that reader meanwhile"});
    ok(cudaFree(g.queue), "cudaFree");
    stopwatch_finish(&w);
    planted_finish(&p);
}

/* --- the layer --- */

void layer_run(planted *p, const stopwatch &w, double share, double hits, const char *what)
{
    const stack &s = p->s;
    row r = {what, s.n_tokens, s.batch, share, hits, s.n_layers, {}, 0, ""};

    planted_hits(p, hits);
    stack_seen seen = stack_seen_begin(s);
    r.time = stack_time(s, w, STACK_N_STAGES, [&] { planted_restore(*p); });
    stack_seen_add(&seen, s);
    stack_seen_text(seen, s, r.note);
    print(r);
}

static __global__ void nothing_kernel()
{
}

/* Time of the first n stages: the next row less this one is a stage's. The first row: what a step
 * costs whose only kernel does nothing. */
void stages_run(const planted &p, const stopwatch &w, double share, double hits)
{
    const stack &s = p.s;
    row launch = {"upto", s.n_tokens, s.batch, share, hits, s.n_layers, {}, 0, "launch"};

    launch.time = graph_time(
        w, s.n_layers,
        [&] {
            for (uint32_t l = 0; l < s.n_layers; l++)
                nothing_kernel<<<s.grid.n_multiprocessors, 256, 0, s.gpu->stream>>>();
        },
        [] {});
    print(launch);
    for (uint32_t n = 1; n <= STACK_N_STAGES; n++) {
        row r = {"upto", s.n_tokens, s.batch, share, hits, s.n_layers, {}, 0, ""};
        r.time = stack_time(s, w, n, [&] { planted_restore(p); });
        snprintf(r.note, sizeof r.note, "%s", STACK_STAGES[n - 1].name);
        print(r);
    }
    stack alone = s;
    for (stack_layer &layer : alone.layer)
        layer.view.n_ahead = 0;
    row r = {"scan", s.n_tokens, s.batch, share, hits, s.n_layers, {}, 0, ""};
    r.time = stack_time(alone, w, 1, [&] { planted_restore(p); });
    print(r);
}

/* The queries, tuned to a share, move on: q' = .95 q + .31 of a new one. */
void steps_run(planted *p, const stopwatch &w, double share)
{
    constexpr uint32_t N_WARM = 24; /* until the cache has seen what it will see */
    stack &s = p->s;
    const winnow_gpu_view &view = s.gpu->layout.view;
    row r = {"steps", s.n_tokens, s.batch, share, -1, s.n_layers, {}, 0, ""};
    stack_seen seen;
    uint32_t n_steps = 0;
    auto step = [&] {
        if (n_steps > N_WARM)
            stack_seen_add(&seen, s);
        std::vector<float> other = planted_queries(s.random, p->q.size(), view.n_group);
        for (size_t i = 0; i < p->q.size(); i++)
            p->q[i] = 0.95f * p->q[i] + 0.3122f * other[i];
        stack_queries_write(s, p->q, p->scale);
        n_steps++;
        for (stack_layer &layer : s.layer) {
            layer.launch.stamp = PLANTED_STAMP + n_steps;
            stack_launch_write(layer);
        }
    };

    stack_cache_empty(s);
    for (uint32_t i = 0; i < N_WARM; i++) {
        step();
        for (uint32_t l = 0; l < s.n_layers; l++)
            stack_layer_put(s, l, STACK_N_STAGES);
        ok(cudaStreamSynchronize(s.gpu->stream), "step");
    }
    seen = stack_seen_begin(s);
    r.time = stack_time(s, w, STACK_N_STAGES, step);
    stack_seen_text(seen, s, r.note);
    print(r);
}

void dense_run(const bench &b, peer *p, planted *of, bool is_alive)
{
    cudaStream_t stream;
    row r = {"dense", of->s.n_tokens, of->s.batch, 0, 0, 0, {}, 0, "own kernel"};

    peer_blocks_make(p, *of, RESERVE_BYTES / 4);
    if (p->n_layers == 0)
        return;
    ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    stopwatch w = stopwatch_init(stream, b.budget_ms / 4);
    r.time = peer_dense_time(*p, w);
    r.n_layers = p->n_layers;
    r.rate = (double)p->n_units * p->d.n_blocks * MODEL_BLOCK_BYTES / r.time.us / 1e3;
    if (is_alive)
        snprintf(r.note, sizeof r.note, "own kernel; Winnow's output lies %.2g from it",
                 peer_distance(p, *of, [&] { stack_layer_put(of->s, 0, STACK_N_STAGES); }));
    print(r);
    stopwatch_finish(&w);
    ok(cudaStreamDestroy(stream), "stream");
}

/* Layer 0 alone; the cache as planted. */
void whole_run(const bench &b, peer *p, planted *of)
{
    stack *s = &of->s;
    row r = {"whole", s->n_tokens, s->batch, 1, -1, 1, {}, 0, ""};
    stopwatch w = stopwatch_init(s->gpu->stream, b.budget_ms);

    planted_restore(*of);
    stack_mass_write(s, 0, 1);
    r.time = graph_time(
        w, 1, [&] { stack_whole_put(*s, 0); }, [] {});
    r.rate = (double)p->n_units * p->d.n_blocks * MODEL_BLOCK_BYTES / r.time.us / 1e3;
    snprintf(r.note, sizeof r.note, "its output lies %.2g from dense",
             peer_distance(p, *of, [&] { stack_whole_put(*s, 0); }));
    print(r);
    stack_mass_write(s, 0, STACK_MASS);
    stopwatch_finish(&w);
}

void streamed_run(const bench &b, const peer &p, const stack &s)
{
    size_t n_bytes = (size_t)p.n_units * p.d.n_blocks * MODEL_BLOCK_BYTES;

    spread time = peer_streamed_time(p, b.arena, arena_bytes());
    print({"streamed", s.n_tokens, s.batch, 0, 0, 1, time, (double)n_bytes / time.us / 1e3,
           "measured"});
}

struct cell {
    uint32_t n_tokens, batch;
    bool is_quick;
};

uint32_t layers_that_fit(const cell &c)
{
    size_t free_bytes, all_bytes;
    uint32_t n_layers = c.n_tokens * c.batch >= LONG_TOKENS ? N_LAYERS / 2 : N_LAYERS;
    auto bytes = [&] {
        return stack_bytes(stack_options(model_shape(n_layers), c.n_tokens, c.batch));
    };

    ok(cudaMemGetInfo(&free_bytes, &all_bytes), "memory");
    while (n_layers > 1 && bytes() + RESERVE_BYTES > free_bytes)
        n_layers /= 2;
    return n_layers;
}

void cell_run(const bench &b, const cell &c)
{
    planted p;
    peer rival;

    planted_init(&p, c.n_tokens, c.batch, layers_that_fit(c), b.arena, N_ALIASES);
    stopwatch w = stopwatch_init(p.s.gpu->stream, b.budget_ms);
    for (double share : {0.01, 0.05, 0.02}) {
        if ((b.is_quick || b.is_brief) && share != 0.02)
            continue;
        planted_tune(&p, share);
        for (double hits : {0.0, 0.8, 0.95, 1.0, 0.9})
            if (!(b.is_quick || b.is_brief) || hits >= 0.9)
                layer_run(&p, w, share, hits, "layer");
    }
    stages_run(p, w, 0.02, 0.9);
    if (b.is_brief) {
        stopwatch_finish(&w);
        planted_finish(&p);
        return;
    }
    peer_init(&rival, p);
    dense_run(b, &rival, &p, true);
    if (stack_kv_bytes(model_shape(1), c.n_tokens, c.batch) <= arena_bytes()) {
        streamed_run(b, rival, p.s);
        whole_run(b, &rival, &p);
    }
    steps_run(&p, w, 0.02);
    stopwatch_finish(&w);
    planted_finish(&p);
    if (rival.n_layers == 0)
        dense_run(b, &rival, &p, false);
    peer_finish(&rival);
}

/* What a layer costs when there is next to nothing to do; then with the host's part of it, from
 * decode to poll. */
void fixed_run(const bench &b)
{
    constexpr uint32_t N_CALLS = 200;
    std::vector<float> ms;
    planted p;

    planted_init(&p, 2048, 1, N_LAYERS, b.arena, N_ALIASES);
    stopwatch w = stopwatch_init(p.s.gpu->stream, b.budget_ms);
    planted_tune(&p, 0.05);
    layer_run(&p, w, 0.05, 1, "fixed");
    stages_run(p, w, 0.05, 1);
    std::vector<uint8_t> in = device_read(p.s.in, p.s.gpu->layout.in_bytes);
    for (uint32_t i = 0; i < N_CALLS; i++) {
        auto from = std::chrono::steady_clock::now();
        stack_decode(p.s, i % N_LAYERS, in);
        std::chrono::duration<float, std::milli> took = std::chrono::steady_clock::now() - from;
        ms.push_back(took.count());
    }
    print({"call", p.s.n_tokens, 1, 0, 1, N_LAYERS, spread_of(ms, 1), 0,
           "from decode to poll by the host's clock"});
    stopwatch_finish(&w);
    planted_finish(&p);
}

/* One size by its name; false, and a line on stderr: there is none of that name. */
template <size_t N> bool size_run(const bench &b, const char *name, const cell (&cells)[N])
{
    if (!strcmp(name, "2Kx1")) {
        fixed_run(b);
        return true;
    }
    for (const cell &c : cells) {
        char text[32];
        snprintf(text, sizeof text, "%uKx%u", c.n_tokens / 1024, c.batch);
        if (strcmp(name, text))
            continue;
        cell_run(b, c);
        return true;
    }
    fprintf(stderr, "%s: not measured\n", name);
    return false;
}

} // namespace

int main(int argc, char **argv)
{
    const cell cells[] = {{32768, 1, true},  {32768, 8, false},  {32768, 32, false},
                          {131072, 1, true}, {131072, 8, true},  {131072, 32, false},
                          {524288, 1, true}, {524288, 8, false}, {524288, 32, false}};
    cudaDeviceProp prop;
    int driver;
    bench b = {};

    b.is_quick = argc == 2 && !strcmp(argv[1], "--quick");
    b.is_brief = argc > 1 && !b.is_quick;
    if (b.is_brief && argv[1][0] == '-') {
        fprintf(stderr, "usage: bench-gpu-layer [--quick | SIZE ..]\n");
        return 64;
    }
    b.budget_ms = 50;
    ok(cudaGetDeviceProperties(&prop, 0), "device");
    ok(cudaDriverGetVersion(&driver), "driver");
    printf("what,tokens,batch,share,hits,layers,us,us_p99,gbs,note\n");
    printf("card,0,0,0,0,0,0,0,0,%s; %d SMs; CUDA driver %d\n", prop.name, prop.multiProcessorCount,
           driver);
    b.arena = arena_make();
    for (int i = 1; b.is_brief && i < argc; i++)
        if (!size_run(b, argv[i], cells))
            return 64;
    if (b.is_brief)
        return 0;
    rates_run(&b);
    gather_run(b);
    fixed_run(b);
    for (const cell &c : cells)
        if (c.is_quick || !b.is_quick)
            cell_run(b, c);
    return 0;
}
