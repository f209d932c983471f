/*
 * Contexts for tests of the GPU through its contract: tokens, blocks in a host arena, an index a
 * segment, and what ref/ makes of a decode step over them. Everything a gpu gets comes from here,
 * so that one scene can be put on several gpus that differ in their cache, and results compared.
 */
#pragma once

#include <bench/trace.h>
#include <errno.h>
#include <kernels/gpu.h>
#include <kernels/ref/ref.h>
#include <test.h>

#include "cases.h"

enum { SCENE_SESSIONS_MAX = 256, SCENE_QUERIES = 4 };

#define SCENE_SHAPE(n_layers, n_q, n_kv, k_width, v_width, kv_dtype, io_dtype)                     \
    {                                                                                              \
        n_layers, n_q, n_kv, k_width, v_width, 1, kv_dtype, io_dtype, WINNOW_BLOCK_FRAGMENTS       \
    }

struct scene_options {
    struct winnow_model_shape shape; /* layout 2 */
    uint32_t segment_tokens, n_sinks, n_sessions;
    uint32_t n_segments[SCENE_SESSIONS_MAX], n_tail[SCENE_SESSIONS_MAX]; /* tail tokens */
    enum kernel_input input;
    uint64_t seed;
    const struct winnow_trace *trace; /* [layers]: real keys, values, queries of one session; NULL:
                                         random ones */
};

struct scene_segment { /* of one layer and KV head */
    struct winnow_index_view view;
    uint16_t *order;
    uint32_t *home; /* [span], in the arena, whatever the gpu is told */
};

struct scene_head { /* of one session, layer and KV head */
    struct kernel_data data;
    struct scene_segment *segment;
};

struct scene {
    struct scene_options of;
    struct winnow_model_shape head_shape; /* one KV head, layout 2 */
    uint32_t n_group, span, block_bytes, n_segment_slots;
    uint8_t *arena;
    uint64_t arena_bytes;
    struct scene_head *head; /* [session][layer][KV head] */
    const struct winnow_kernels *ref;
    struct winnow_gpu_device *device; /* opened over the arena by scene_open */
};

static const struct winnow_gpu_api *api;

/* WINNOW_TEST_SMALL: sizes for a sanitizer, which makes a launch a hundred times slower. */
static inline bool scene_is_small(void)
{
    return getenv("WINNOW_TEST_SMALL") != NULL;
}

/* The library of WINNOW_TEST_CUDA, or the one beside the program, and its first device; --require
 * cuda makes their absence a failure, else it is a skip. */
static inline void scene_api_init(int argc, char **argv)
{
    bool is_required = argc > 2 && !strcmp(argv[1], "--require") && !strcmp(argv[2], "cuda");
    char text[256];

    if (is_required)
        argc -= 2, argv += 2;
    TEST_INIT(argc, argv);
    api = winnow_gpu_load(getenv("WINNOW_TEST_CUDA"), text);
    if (api && api->probe(0, text) == 0)
        return;
    if (is_required)
        test_fail(__FILE__, __LINE__, text);
    printf("%s\n", text);
    TEST_SKIP("no cuda device, or no library for it");
}

static inline uint64_t scene_n_tokens(const struct scene *scene, uint32_t session)
{
    return scene->of.n_sinks + (uint64_t)scene->of.n_segments[session] * scene->of.segment_tokens +
           scene->of.n_tail[session];
}

static inline struct scene_head *scene_head(const struct scene *scene, uint32_t session,
                                            uint32_t layer, uint32_t head)
{
    return &scene->head[(session * scene->of.shape.n_layers + layer) * scene->of.shape.n_kv_heads +
                        head];
}

/* The segment slot of a session's segment. */
static inline uint32_t scene_slot(const struct scene *scene, uint32_t session, uint32_t segment)
{
    for (uint32_t s = 0; s < session; s++)
        segment += scene->of.n_segments[s];
    return segment;
}

/* fp32 as dtype holds it; what overflows becomes a large number that does not. */
static inline float scene_round(uint32_t dtype, float x)
{
    if (dtype == WINNOW_FP32)
        return x;
    if (dtype == WINNOW_BF16)
        return winnow_ref_bf16_to_float(winnow_ref_float_to_bf16(fmaxf(fminf(x, 3e38f), -3e38f)));
    return winnow_ref_fp16_to_float(winnow_ref_float_to_fp16(fmaxf(fminf(x, 65504.0f), -65504.0f)));
}

static inline void scene_round_all(uint32_t dtype, float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = scene_round(dtype, x[i]);
}

/* Tokens `first`, ... of a head as a block of layout 2; order NULL: as they come. */
static inline void scene_block(const struct scene *scene, const struct scene_head *head,
                               uint64_t first, uint32_t n, const uint16_t *order, void *block)
{
    static float k[16 * WINNOW_WIDTH_MAX], v[16 * WINNOW_WIDTH_MAX];
    uint32_t k_width = scene->of.shape.k_width, v_width = scene->of.shape.v_width;

    for (uint32_t t = 0; t < n; t++) {
        uint64_t token = first + (order ? order[t] : t);
        memcpy(k + t * k_width, head->data.k + token * k_width, k_width * sizeof *k);
        memcpy(v + t * v_width, head->data.v + token * v_width, v_width * sizeof *v);
    }
    scene->ref->block_pack(&scene->head_shape, 0, n, k, v, block);
}

static inline void scene_segment_init(struct scene *scene, struct scene_head *head,
                                      uint32_t segment, uint32_t home_first)
{
    const struct winnow_kernels *builder = winnow_kernels_find(NULL);
    uint32_t S = scene->of.segment_tokens;
    uint64_t first = scene->of.n_sinks + (uint64_t)segment * S;
    struct scene_segment *of = &head->segment[segment];
    void *scratch = case_alloc(builder->scratch_bytes(&scene->head_shape, scene->span));

    of->order = case_alloc(S * sizeof *of->order);
    of->home = case_alloc(scene->span * sizeof *of->home);
    case_view_init(&of->view, &scene->head_shape, scene->span);
    CHECK_EQ(builder->build(
                 &scene->head_shape, scene->span, head->data.k + first * scene->of.shape.k_width,
                 head->data.v + first * scene->of.shape.v_width, of->order, &of->view, scratch),
             0);
    for (uint32_t b = 0; b < scene->span; b++) {
        of->home[b] = (home_first + b) * (scene->block_bytes / 4096);
        scene_block(scene, head, first, 16, of->order + 16 * b,
                    scene->arena + (uint64_t)of->home[b] * 4096);
    }
    winnow_alloc_free(scratch);
}

/* Tokens of a trace; its queries, evenly spaced. */
static inline void scene_fill_trace(struct kernel_data *data, const struct winnow_trace *trace)
{
    size_t n = trace->n_tokens * (size_t)trace->width * sizeof(float);
    size_t n_query = trace->n_q * (size_t)trace->width;

    CHECK(trace->width == data->shape.k_width && trace->n_q == data->n_q);
    CHECK(trace->n_tokens <= 16 * data->n_blocks);
    memcpy(data->k, trace->k, n);
    memcpy(data->v, trace->v, n);
    for (uint32_t i = 0; i < SCENE_QUERIES; i++)
        memcpy(data->q + i * n_query,
               trace->q + (trace->n_steps - 1 - i * trace->n_steps / SCENE_QUERIES) * n_query,
               n_query * sizeof(float));
}

static inline void scene_head_init(struct scene *scene, uint32_t session, uint32_t idx,
                                   uint32_t home_first)
{
    struct scene_head *head = &scene->head[idx];
    struct kernel_data *data = &head->data;
    size_t k_width = scene->of.shape.k_width, v_width = scene->of.shape.v_width;
    struct winnow_rng rng;

    winnow_rng_init(&rng, scene->of.seed + idx);
    *data = (struct kernel_data){
        .shape = scene->head_shape,
        .n_q = scene->n_group,
        .n_blocks = (uint32_t)(scene_n_tokens(scene, session) + 15) / 16 + 1,
        .n_pos = SCENE_QUERIES,
    };
    data->k = case_alloc(16 * data->n_blocks * k_width * sizeof(float));
    data->v = case_alloc(16 * data->n_blocks * v_width * sizeof(float));
    data->q = case_alloc(SCENE_QUERIES * scene->n_group * k_width * sizeof(float));
    if (scene->of.trace) {
        scene_fill_trace(data, &scene->of.trace[idx]);
    } else {
        case_fill_random(data, &rng);
        case_fill_hostile(data, scene->of.input);
    }
    scene_round_all(scene->of.shape.kv_dtype, data->k, 16 * data->n_blocks * k_width);
    scene_round_all(scene->of.shape.kv_dtype, data->v, 16 * data->n_blocks * v_width);
    scene_round_all(scene->of.shape.io_dtype, data->q, SCENE_QUERIES * scene->n_group * k_width);
    head->segment = case_alloc((scene->of.n_segments[session] + 1) * sizeof *head->segment);
    for (uint32_t k = 0; k < scene->of.n_segments[session]; k++)
        scene_segment_init(scene, head, k, home_first + k * scene->span);
}

static inline void scene_init(struct scene *scene, const struct scene_options *options)
{
    uint32_t n_heads = options->shape.n_layers * options->shape.n_kv_heads, n_home = 0;

    *scene = (struct scene){.of = *options, .head_shape = options->shape};
    scene->ref = winnow_kernels_ref();
    scene->of.shape.softmax_scale = scene->head_shape.softmax_scale =
        1 / sqrtf((float)options->shape.k_width);
    scene->head_shape.n_q_heads = scene->n_group =
        options->shape.n_q_heads / options->shape.n_kv_heads;
    scene->head_shape.n_kv_heads = scene->head_shape.n_layers = 1;
    scene->span = options->segment_tokens / 16;
    scene->block_bytes = winnow_block_bytes(&scene->head_shape);
    scene->n_segment_slots = scene_slot(scene, options->n_sessions, 0);
    scene->arena_bytes =
        ((uint64_t)scene->n_segment_slots * n_heads * scene->span + 1) * scene->block_bytes;
    scene->arena = winnow_alloc_map(scene->arena_bytes);
    CHECK(scene->arena);
    memset(scene->arena, 0xff, scene->arena_bytes);
    scene->head = case_alloc(options->n_sessions * n_heads * sizeof *scene->head);
    for (uint32_t i = 0; i < options->n_sessions * n_heads; i++) {
        uint32_t session = i / n_heads;
        scene_head_init(scene, session, i, n_home);
        n_home += options->n_segments[session] * scene->span;
    }
}

static inline void scene_finish(struct scene *scene)
{
    uint32_t n_heads = scene->of.shape.n_layers * scene->of.shape.n_kv_heads;

    for (uint32_t i = 0; i < scene->of.n_sessions * n_heads; i++) {
        struct scene_head *head = &scene->head[i];
        for (uint32_t k = 0; k < scene->of.n_segments[i / n_heads]; k++) {
            case_view_finish(&head->segment[k].view);
            winnow_alloc_free(head->segment[k].order);
            winnow_alloc_free(head->segment[k].home);
        }
        winnow_alloc_free(head->segment);
        winnow_alloc_free(head->data.k);
        winnow_alloc_free(head->data.v);
        winnow_alloc_free(head->data.q);
    }
    winnow_alloc_free(scene->head);
    winnow_alloc_unmap(scene->arena, scene->arena_bytes);
}

/* A scene, and a device that reads its arena. */
static inline void scene_open(struct scene *scene, const struct scene_options *options)
{
    char text[256] = "";

    scene_init(scene, options);
    if (api->open(0, UINT64_C(3) << 30, scene->arena, scene->arena_bytes, &scene->device, text) < 0)
        test_fail(__FILE__, __LINE__, text);
}

static inline void scene_close(struct scene *scene)
{
    api->close(scene->device);
    scene_finish(scene);
}

/* The stored traces as a scene, a layer each: segments of 1,024 tokens, a tail of 1,008. */
struct scene_traces {
    struct winnow_trace_list list;
    struct winnow_trace trace[8];
};

static inline void scene_open_traces(struct scene *scene, struct scene_traces *traces)
{
    struct scene_options options = {
        .shape = SCENE_SHAPE(0, 3, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        .segment_tokens = 1024,
        .n_sinks = 16,
        .n_sessions = 1,
        .n_segments = {7},
        .n_tail = {1008},
        .trace = traces->trace,
    };

    CHECK_EQ(winnow_trace_list_open("tests/golden/traces", &traces->list), 0);
    for (uint32_t i = 0; i < traces->list.n_paths && i < 8; i++, options.shape.n_layers++)
        CHECK_EQ(winnow_trace_open(traces->list.path[i], &traces->trace[i]), 0);
    scene_open(scene, &options);
}

static inline void scene_close_traces(struct scene *scene, struct scene_traces *traces)
{
    scene_close(scene);
    for (uint32_t i = 0; i < scene->of.shape.n_layers; i++)
        winnow_trace_close(&traces->trace[i]);
    winnow_trace_list_close(&traces->list);
}

/* What differs between gpus of one scene. */
struct scene_gpu_options {
    uint32_t n_slots, n_fetchers;
    uint32_t disk_every; /* each so many-th block is on disk; 0: none */
};

static inline struct winnow_gpu_options scene_gpu_options(const struct scene *scene,
                                                          const struct scene_gpu_options *options)
{
    uint64_t n_launch_blocks = 1;
    uint32_t n_longest = 1;

    for (uint32_t s = 0; s < scene->of.n_sessions; s++) {
        n_launch_blocks += (uint64_t)scene->of.n_segments[s] * scene->span;
        if (scene->of.n_segments[s] > n_longest)
            n_longest = scene->of.n_segments[s];
    }
    return (struct winnow_gpu_options){
        .shape = scene->of.shape,
        .segment_tokens = scene->of.segment_tokens,
        .n_sinks = scene->of.n_sinks,
        .n_segments_max = scene->n_segment_slots + 1,
        .n_sessions_max = scene->of.n_sessions,
        .n_session_segments_max = n_longest,
        .n_slots = options->n_slots,
        .n_items_max = scene->of.n_sessions,
        .n_launch_blocks_max = n_launch_blocks,
        .n_fetchers = options->n_fetchers,
    };
}

/* Homes of a segment slot's layer as a gpu is told them. */
static inline void scene_homes(const struct scene *scene, uint32_t session, uint32_t layer,
                               uint32_t segment, uint32_t disk_every, uint32_t *home)
{
    for (uint32_t h = 0; h < scene->of.shape.n_kv_heads; h++)
        for (uint32_t b = 0; b < scene->span; b++) {
            uint32_t at = h * scene->span + b;
            home[at] = scene_head(scene, session, layer, h)->segment[segment].home[b];
            if (disk_every && at % disk_every == 0)
                home[at] = WINNOW_GPU_ON_DISK;
        }
}

/* Blocks [first, last] of a session's sinks and tail, by block number, all layers and heads. */
static inline void scene_tail_put(const struct scene *scene, struct winnow_gpu *gpu,
                                  uint32_t session, uint32_t layer, uint64_t n_tokens)
{
    uint32_t n_heads = scene->of.shape.n_kv_heads, n_sink_blocks = scene->of.n_sinks / 16;
    uint32_t n_skipped = scene->of.n_segments[session] * scene->span;
    uint32_t n_all = (uint32_t)((n_tokens + 15) / 16), n = 0;
    uint32_t *number = case_alloc((n_all + 1) * sizeof *number);
    const void **data = case_alloc(((size_t)n_all + 1) * n_heads * sizeof *data);

    for (uint32_t j = 0; j < n_all; j++) {
        uint64_t n_left = n_tokens - 16 * (uint64_t)j;
        if (j >= n_sink_blocks && j < n_sink_blocks + n_skipped)
            continue;
        for (uint32_t h = 0; h < n_heads; h++) {
            void *block = case_alloc(scene->block_bytes);
            memset(block, 0xff, scene->block_bytes);
            scene_block(scene, scene_head(scene, session, layer, h), 16 * (uint64_t)j,
                        n_left < 16 ? (uint32_t)n_left : 16, NULL, block);
            data[n * n_heads + h] = block;
        }
        number[n++] = j;
    }
    CHECK_EQ(api->tail_put(gpu, session, layer, n, number, data), 0);
    for (uint32_t i = 0; i < n * n_heads; i++)
        winnow_alloc_free((void *)(uintptr_t)data[i]);
    winnow_alloc_free(number);
    winnow_alloc_free(data);
}

/* A gpu that holds all of the scene. */
static inline struct winnow_gpu *scene_put(const struct scene *scene,
                                           const struct scene_gpu_options *options)
{
    struct winnow_gpu_options gpu_options = scene_gpu_options(scene, options);
    uint32_t n_heads = scene->of.shape.n_kv_heads;
    uint32_t *home = case_alloc(n_heads * scene->span * sizeof *home);
    uint32_t *slots = case_alloc(gpu_options.n_session_segments_max * sizeof *slots);
    struct winnow_index_view views[64];
    struct winnow_gpu *gpu;
    char text[256] = "";

    if (api->create(scene->device, &gpu_options, &gpu, text) < 0)
        test_fail(__FILE__, __LINE__, text);
    for (uint32_t s = 0; s < scene->of.n_sessions; s++) {
        for (uint32_t k = 0; k < scene->of.n_segments[s]; k++)
            slots[k] = scene_slot(scene, s, k);
        CHECK_EQ(api->session_set(gpu, s, scene->of.n_segments[s], slots), 0);
        for (uint32_t layer = 0; layer < scene->of.shape.n_layers; layer++) {
            for (uint32_t k = 0; k < scene->of.n_segments[s]; k++) {
                for (uint32_t h = 0; h < n_heads; h++)
                    views[h] = scene_head(scene, s, layer, h)->segment[k].view;
                scene_homes(scene, s, layer, k, options->disk_every, home);
                CHECK_EQ(api->segment_put(gpu, slots[k], layer, views, home), 0);
            }
            scene_tail_put(scene, gpu, s, layer, scene_n_tokens(scene, s));
        }
    }
    winnow_alloc_free(home);
    winnow_alloc_free(slots);
    return gpu;
}

/* Several KV heads, 32 sessions of different lengths. */
static const struct scene_options scene_crowd = {
    .shape = SCENE_SHAPE(2, 8, 2, 128, 64, WINNOW_BF16, WINNOW_FP16),
    .segment_tokens = 128,
    .n_sinks = 16,
    .n_sessions = 32,
    .n_segments = {9, 0, 1, 2, 3, 4, 5, 6, 30, 1, 2, 3, 4, 5, 6, 7,
                   7, 6, 5, 4, 3, 2, 1, 0, 2,  2, 2, 2, 2, 2, 2, 2},
    .n_tail = {5,  16, 100, 1, 7, 9, 33, 80, 640, 3,  17, 18, 19, 20, 21, 22,
               23, 24, 25,  1, 2, 3, 4,  5,  6,   64, 65, 66, 67, 68, 69, 70},
    .seed = 11,
};

/* Every ratio of query to KV heads, every head width of models and some odd ones, both types at
 * rest, every type of queries. */
static const struct winnow_model_shape scene_shapes[] = {
    SCENE_SHAPE(1, 4, 1, 128, 128, WINNOW_BF16, WINNOW_FP32),
    SCENE_SHAPE(1, 3, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
    SCENE_SHAPE(2, 1, 1, 256, 256, WINNOW_BF16, WINNOW_BF16),
    SCENE_SHAPE(1, 16, 1, 96, 64, WINNOW_FP16, WINNOW_FP16),
    SCENE_SHAPE(1, 7, 1, 192, 128, WINNOW_FP16, WINNOW_FP32),
    SCENE_SHAPE(1, 8, 1, 80, 112, WINNOW_BF16, WINNOW_FP32),
    SCENE_SHAPE(1, 5, 1, 16, 16, WINNOW_FP16, WINNOW_FP32),
    SCENE_SHAPE(1, 2, 1, 64, 256, WINNOW_BF16, WINNOW_FP16),
    SCENE_SHAPE(1, 6, 1, 96, 192, WINNOW_BF16, WINNOW_BF16),
    SCENE_SHAPE(1, 9, 1, 128, 96, WINNOW_FP16, WINNOW_BF16),
    SCENE_SHAPE(1, 10, 1, 192, 64, WINNOW_BF16, WINNOW_FP32),
    SCENE_SHAPE(1, 11, 1, 256, 128, WINNOW_FP16, WINNOW_FP16),
    SCENE_SHAPE(1, 12, 1, 64, 192, WINNOW_FP16, WINNOW_FP32),
    SCENE_SHAPE(1, 13, 1, 96, 96, WINNOW_BF16, WINNOW_FP32),
    SCENE_SHAPE(1, 14, 1, 128, 256, WINNOW_BF16, WINNOW_FP16),
    SCENE_SHAPE(1, 15, 1, 192, 192, WINNOW_BF16, WINNOW_FP32),
};
enum { SCENE_N_SHAPES = sizeof scene_shapes / sizeof scene_shapes[0] };

/* 256 sessions, none as long as its neighbour: most of a few segments, two of many, some of none. */
static inline struct scene_options scene_options_many(void)
{
    struct scene_options options = {
        .shape = SCENE_SHAPE(1, 8, 2, 64, 64, WINNOW_FP16, WINNOW_FP16),
        .segment_tokens = 128,
        .n_sinks = 16,
        .n_sessions = 256,
        .seed = test_seed(),
    };

    for (uint32_t s = 0; s < options.n_sessions; s++) {
        options.n_segments[s] = s % 9;
        options.n_tail[s] = 1 + s * 37 % 600;
    }
    options.n_segments[77] = 64;
    options.n_segments[200] = 200;
    return options;
}

/* One session of 1,048,576 tokens, of which a query likes few. */
static inline struct scene_options scene_options_million(void)
{
    return (struct scene_options){
        .shape = SCENE_SHAPE(1, 4, 1, 64, 64, WINNOW_BF16, WINNOW_FP32),
        .segment_tokens = 1024,
        .n_sinks = 16,
        .n_sessions = 1,
        .n_segments = {1023},
        .n_tail = {1008},
        .input = INPUT_NEEDLE,
        .seed = test_seed(),
    };
}
