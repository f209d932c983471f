/*
 * bench-gpu-traces: decode steps over real attention, one after the other, with what select chooses
 * and the cache holds; the share read and the hit rate are the result.
 *
 *   bench-gpu-traces DIR [--quick]       CSV to stdout; DIR: tests/golden/traces, or others like it
 *
 * A trace is one KV head of SmolLM2 (d 64, fp16, 3 query heads) over 8,192 tokens of a text, with
 * the queries of its last 128 positions. A context is the sinks, the seven sealed segments of a trace
 * over and over (**tiled**, each time with slots and homes of its own), and the tail up to the
 * query; eight KV heads are the traces in turn. Sessions of a batch decode the same text and share
 * nothing. 24 steps fill the cache, 101 are timed.
 *
 * Twenty tiles as they are would outweigh sinks and tail twenty times as much as the text does: the
 * share at P .9 then grows from 2 to 21 %. So sealed keys are moved against the head's mean queries,
 * by what takes ln of the number of tiles off their logits (+- .5 at 20 tiles): the sealed part
 * weighs what it does in the text, and the share is that of the text whatever the length.
 */
#include "stack.cuh"

#include <sys/mman.h>
extern "C" {
#include <bench/trace.h>
}

namespace
{

constexpr uint32_t N_LAYERS = 4, N_HEADS = 8, N_GROUP = 3, WIDTH = 64, BLOCK_BYTES = 4096;
constexpr uint32_t SPAN = STACK_SEGMENT / WINNOW_BLOCK_TOKENS;
constexpr uint32_t N_TILE = (WINNOW_TRACE_SEALED_END - STACK_SINKS) / STACK_SEGMENT;
constexpr uint32_t TAIL_FIRST = STACK_SINKS + N_TILE * STACK_SEGMENT;
constexpr uint32_t N_WARM = 24;
constexpr uint64_t ARENA_BYTES = (uint64_t)1 << 30;

/* A sealed segment of a trace, packed: a unit of the device's index, and its blocks. */
struct sealed {
    std::vector<uint8_t> unit, blocks;
};

struct traces {
    winnow_model_shape shape;
    std::vector<winnow_trace> trace;
    std::vector<sealed> tile; /* [segment of the tile][trace] */
    uint8_t *arena;           /* the tile's blocks over and over */
    uint32_t tile_blocks, n_copies;
};

winnow_model_shape shape_of_traces()
{
    return {N_LAYERS,    N_HEADS * N_GROUP,     N_HEADS, WIDTH, WIDTH, 0.125f, WINNOW_FP16,
            WINNOW_BF16, WINNOW_BLOCK_FRAGMENTS};
}

std::vector<winnow_trace> traces_open(const char *directory)
{
    winnow_trace_list list;
    std::vector<winnow_trace> all;

    stack_ok(winnow_trace_list_open(directory, &list), directory);
    for (uint32_t i = 0; i < list.n_paths; i++) {
        winnow_trace trace;
        stack_ok(winnow_trace_open(list.path[i], &trace), list.path[i]);
        all.push_back(trace);
    }
    winnow_trace_list_close(&list);
    return all;
}

/* The shortest vector that, added to a key, takes ln n_tiles off its logit with each query head's
 * mean query. */
std::vector<float> tile_shift(const winnow_trace &trace, float softmax_scale, double n_tiles)
{
    double mean[N_GROUP][WIDTH] = {}, a[N_GROUP][N_GROUP + 1];
    std::vector<float> shift(WIDTH);

    for (uint32_t i = 0; i < trace.n_steps * N_GROUP * WIDTH; i++)
        mean[i / WIDTH % N_GROUP][i % WIDTH] += trace.q[i] * softmax_scale / trace.n_steps;
    for (uint32_t g = 0; g < N_GROUP; g++) {
        for (uint32_t h = 0; h < N_GROUP; h++)
            a[g][h] = std::inner_product(mean[g], mean[g] + WIDTH, mean[h], 0.0);
        a[g][N_GROUP] = -log(n_tiles);
    }
    for (uint32_t g = 0; g < N_GROUP; g++) /* elimination: a is positive definite */
        for (uint32_t h = 0; h < N_GROUP; h++) {
            double by = a[h][g] / a[g][g];
            for (uint32_t i = g; h != g && i <= N_GROUP; i++)
                a[h][i] -= by * a[g][i];
        }
    for (uint32_t g = 0; g < N_GROUP; g++)
        for (uint32_t d = 0; d < WIDTH; d++)
            shift[d] += (float)(a[g][N_GROUP] / a[g][g] * mean[g][d]);
    return shift;
}

/* As core/seal.c does it. home: of the first block; shift: added to every key. */
sealed segment_seal(const winnow_model_shape &shape, const winnow_trace &trace, uint32_t first,
                    uint32_t home, const std::vector<float> &shift)
{
    const winnow_kernels *kernels = winnow_kernels_find(NULL);
    std::vector<float> keys(trace.k + (size_t)first * WIDTH,
                            trace.k + ((size_t)first + STACK_SEGMENT) * WIDTH);
    const float *k = keys.data(), *v = trace.v + (size_t)first * WIDTH;
    std::vector<winnow_block_head> head(SPAN);
    std::vector<int8_t> centroid(SPAN * WIDTH), vmean(SPAN * WIDTH);
    std::vector<uint8_t> code(SPAN * WIDTH * 8);
    std::vector<uint16_t> code_scale(SPAN * 16), order(SPAN * 16);
    std::vector<float> mean_k(WIDTH), mean_v(WIDTH);
    std::vector<uint32_t> homes(SPAN);
    float v_max;
    winnow_index_view index = {
        SPAN, head.data(),   centroid.data(), vmean.data(), code.data(), code_scale.data(),
        NULL, mean_k.data(), mean_v.data(),   &v_max};
    size_t scratch_bytes = (kernels->scratch_bytes(&shape, SPAN) + 63) / 64 * 64;
    void *scratch = aligned_alloc(64, scratch_bytes);
    winnow_gpu_view view = {};
    sealed to;

    for (size_t i = 0; i < keys.size(); i++)
        keys[i] += shift[i % WIDTH];
    stack_ok(kernels->build(&shape, SPAN, k, v, order.data(), &index, scratch), "build");
    free(scratch);
    view.k_width = view.v_width = WIDTH;
    view.span_blocks = SPAN;
    winnow_gpu_index_layout(&view);
    std::iota(homes.begin(), homes.end(), home);
    to.unit.resize(view.unit_bytes);
    winnow_gpu_index_pack(&view, &index, homes.data(), to.unit.data());
    to.blocks.resize(SPAN * BLOCK_BYTES);
    for (uint32_t i = 0; i < SPAN * 16; i++)
        kernels->block_pack(&shape, i % 16, 1, k + (size_t)order[i] * WIDTH,
                            v + (size_t)order[i] * WIDTH, &to.blocks[i / 16 * BLOCK_BYTES]);
    return to;
}

void traces_init(traces *t, const char *directory)
{
    t->shape = shape_of_traces();
    t->trace = traces_open(directory);
    uint32_t n_traces = (uint32_t)t->trace.size();
    for (const winnow_trace &trace : t->trace)
        if (trace.width != WIDTH || trace.n_q != N_GROUP || trace.n_steps < 128) {
            fprintf(stderr, "%s: 128 steps of 3 query heads, 64 wide, are needed\n", trace.name);
            exit(1);
        }
    t->tile_blocks = N_TILE * n_traces * SPAN;
    t->tile.resize(N_TILE * n_traces);
    t->n_copies = (uint32_t)(ARENA_BYTES / BLOCK_BYTES / t->tile_blocks);
    t->arena = (uint8_t *)mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (t->arena == MAP_FAILED) {
        perror("host memory");
        exit(1);
    }
}

/* For contexts of n_segments. */
void tiles_make(traces *t, uint32_t n_segments)
{
    uint32_t n_traces = (uint32_t)t->trace.size();

    for (uint32_t i = 0; i < N_TILE * n_traces; i++) {
        const winnow_trace &trace = t->trace[i % n_traces];
        std::vector<float> shift =
            tile_shift(trace, t->shape.softmax_scale, (double)n_segments / N_TILE);
        t->tile[i] = segment_seal(t->shape, trace, STACK_SINKS + i / n_traces * STACK_SEGMENT,
                                  i * SPAN, shift);
        for (uint32_t copy = 0; copy < t->n_copies; copy++)
            memcpy(t->arena + ((size_t)copy * t->tile_blocks + i * SPAN) * BLOCK_BYTES,
                   t->tile[i].blocks.data(), SPAN * BLOCK_BYTES);
    }
}

/* A thread block a unit of the index: copied from the tile, homes moved to the segment's copy of the
 * arena. place [segment slot]: its place in its session. */
__global__ void index_kernel(winnow_gpu_view view, const uint8_t *tile, const uint32_t *place,
                             uint32_t n_traces, uint32_t tile_blocks, uint32_t n_copies)
{
    uint32_t head = blockIdx.x % view.n_kv_heads,
             layer = blockIdx.x / view.n_kv_heads % view.n_layers;
    uint32_t slot = blockIdx.x / (view.n_kv_heads * view.n_layers);
    uint32_t of = place[slot] % N_TILE * n_traces + (head + layer) % n_traces;
    const uint32_t *from = (const uint32_t *)(tile + (size_t)of * view.unit_bytes);
    uint32_t *to = (uint32_t *)(view.index + (size_t)blockIdx.x * view.unit_bytes);

    for (uint32_t i = threadIdx.x; i < view.unit_bytes / 4; i += blockDim.x) {
        bool is_home = i - view.home_at / 4 < view.span_blocks;
        to[i] = from[i] + (is_home ? blockIdx.x % n_copies * tile_blocks : 0);
    }
}

void index_write(const traces &t, const stack &s)
{
    std::vector<uint8_t> units;
    std::vector<uint32_t> place(s.table.size());

    for (const sealed &one : t.tile)
        units.insert(units.end(), one.unit.begin(), one.unit.end());
    for (uint32_t i = 0; i < s.table.size(); i++)
        place[s.table[i]] = i % s.n_segments;
    uint8_t *tile = device_copy(units);
    uint32_t *of = device_copy(place);
    index_kernel<<<(uint32_t)place.size() * N_LAYERS * N_HEADS, 256>>>(
        s.gpu->layout.view, tile, of, (uint32_t)t.trace.size(), t.tile_blocks, t.n_copies);
    ok(cudaDeviceSynchronize(), "index");
    ok(cudaFree(tile), "cudaFree");
    ok(cudaFree(of), "cudaFree");
}

/* Sinks and all of the tail, of every session and layer. */
void tails_write(const traces &t, const stack &s)
{
    const winnow_kernels *kernels = winnow_kernels_find(NULL);
    uint32_t n = 1 + (8192 - TAIL_FIRST) / WINNOW_BLOCK_TOKENS, n_traces = (uint32_t)t.trace.size();
    std::vector<uint8_t> block((size_t)n * n_traces * BLOCK_BYTES);
    std::vector<uint32_t> number(n);
    std::vector<const void *> data(n * N_HEADS);

    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n_traces; j++) {
            size_t first = i == 0 ? 0 : TAIL_FIRST + (i - 1) * WINNOW_BLOCK_TOKENS;
            kernels->block_pack(&t.shape, 0, WINNOW_BLOCK_TOKENS, t.trace[j].k + first * WIDTH,
                                t.trace[j].v + first * WIDTH,
                                &block[(size_t)(i * n_traces + j) * BLOCK_BYTES]);
        }
    for (uint32_t i = 0; i < n; i++)
        number[i] = i == 0 ? 0 : i + s.n_blocks;
    for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
        for (uint32_t i = 0; i < n * N_HEADS; i++)
            data[i] = &block[(size_t)(i / N_HEADS * n_traces + (i % N_HEADS + layer) % n_traces) *
                             BLOCK_BYTES];
        for (uint32_t session = 0; session < s.batch; session++)
            stack_ok(s.api->tail_put(s.gpu, session, layer, n, number.data(), data.data()),
                     "tail_put");
    }
}

/* The next of the 128 queries, which sees the tail up to itself. */
void step_write(const traces &t, stack *s, uint32_t step)
{
    uint32_t n_traces = (uint32_t)t.trace.size();
    std::vector<float> q;

    for (uint32_t i = 0; i < N_LAYERS * s->batch * N_HEADS; i++) {
        const winnow_trace &of = t.trace[(i % N_HEADS + i / (s->batch * N_HEADS)) % n_traces];
        const float *from = of.q + (size_t)step * N_GROUP * WIDTH;
        q.insert(q.end(), from, from + N_GROUP * WIDTH);
    }
    stack_queries_write(*s, q, 1);
    for (stack_layer &layer : s->layer) {
        layer.launch.stamp = 1000 + step;
        for (uint32_t i = 0; i < s->batch; i++)
            layer.launch.item[i].n_tokens = s->n_tokens - 127 + step;
        stack_launch_write(layer);
    }
}

void run(traces *of, uint32_t n_tokens, uint32_t batch)
{
    const traces &t = *of;
    stack s;
    stack_seen seen;
    uint32_t n_steps = 0;
    char note[200];
    auto step = [&] {
        if (n_steps > N_WARM)
            stack_seen_add(&seen, s);
        step_write(t, &s, n_steps++);
    };

    stack_init(&s, t.shape, n_tokens, batch, t.arena, ARENA_BYTES);
    s.is_complete = true;
    tiles_make(of, s.n_segments);
    index_write(t, s);
    tails_write(t, s);
    stack_launches_make(&s);
    stack_cache_empty(s);
    stopwatch w = stopwatch_init(s.gpu->stream, 1e4);
    for (uint32_t i = 0; i < N_WARM; i++) {
        step();
        for (uint32_t l = 0; l < N_LAYERS; l++)
            stack_layer_put(s, l, STACK_N_STAGES);
        ok(cudaStreamSynchronize(s.gpu->stream), "step");
    }
    seen = stack_seen_begin(s);
    spread time = stack_time(s, w, STACK_N_STAGES, step);
    stack_seen_text(seen, s, note);
    printf("traces,%u,%u,0,0,%u,%.2f,%.2f,%.1f,%s\n", n_tokens, batch, N_LAYERS, time.us,
           time.us_p99, (double)stack_kv_bytes(t.shape, n_tokens, batch) / time.us / 1e3, note);
    fflush(stdout);
    stopwatch_finish(&w);
    stack_finish(&s);
}

} // namespace

int main(int argc, char **argv)
{
    const struct {
        uint32_t n_tokens, batch;
        bool is_quick;
    } cells[] = {{32768, 1, false}, {131072, 1, true}, {131072, 8, true}, {524288, 1, false}};
    bool is_quick = argc == 3 && !strcmp(argv[2], "--quick");
    traces t = {};

    if (argc < 2 || argc > 3 || (argc == 3 && !is_quick)) {
        fprintf(stderr, "usage: bench-gpu-traces DIR [--quick]\n");
        return 64;
    }
    traces_init(&t, argv[1]);
    printf("what,tokens,batch,share,hits,layers,us,us_p99,gbs,note\n");
    for (const auto &c : cells)
        if (c.is_quick || !is_quick)
            run(&t, c.n_tokens, c.batch);
    for (winnow_trace &trace : t.trace)
        winnow_trace_close(&trace);
    munmap(t.arena, ARENA_BYTES);
    return 0;
}
