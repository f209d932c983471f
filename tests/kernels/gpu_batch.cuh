/*
 * Items whose segments, indexes and queries are drawn at random and lie in device memory: what scan
 * and select work on.
 */
#pragma once

#include "gpu_stages.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <kernels/kernels.h>
#include <random>
#include <test.h>

#define EXPECT(condition, ...)                                                                     \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            char expect_text[300];                                                                 \
            snprintf(expect_text, sizeof expect_text, __VA_ARGS__);                                \
            test_fail(__FILE__, __LINE__, expect_text);                                            \
        }                                                                                          \
    } while (0)

enum check_input { RANDOM, NEEDLE, EQUAL, HUGE_NUMBERS, OVERFLOWING, TINY, DENORMAL, N_INPUTS };
static const char *const check_input_name[N_INPUTS] = {"random",   "needle", "equal",   "huge",
                                                       "overflow", "tiny",   "denormal"};

typedef std::mt19937_64 random_source;

static float normal(random_source &random)
{
    return std::normal_distribution<float>()(random);
}

/* A host index and its memory. */
struct host_index {
    std::vector<winnow_block_head> head;
    std::vector<int8_t> centroid, vmean;
    std::vector<uint8_t> code;
    std::vector<uint16_t> code_scale;
    std::vector<float> mean_k, mean_v;
    float v_max;
    std::vector<uint32_t> home;

    winnow_index_view view()
    {
        return {(uint32_t)head.size(), head.data(), centroid.data(), vmean.data(),  code.data(),
                code_scale.data(),     nullptr,     mean_k.data(),   mean_v.data(), &v_max};
    }
};

static winnow_model_shape model_shape(const scene &s)
{
    return {s.view.n_layers, s.view.n_q_heads, s.view.n_kv_heads,
            s.view.k_width,  s.view.v_width,   s.view.softmax_scale,
            s.view.kv_dtype, s.view.io_dtype,  WINNOW_BLOCK_LAYOUT};
}

static void index_build(const scene &s, const std::vector<float> &k, const std::vector<float> &v,
                        host_index *index)
{
    const winnow_kernels *ref = winnow_kernels_ref();
    winnow_model_shape shape = model_shape(s);
    uint32_t n = s.view.span_blocks;
    std::vector<uint16_t> order(16 * n);
    void *scratch = aligned_alloc(64, (ref->scratch_bytes(&shape, n) + 63) / 64 * 64);

    index->head.resize(n);
    index->centroid.resize((size_t)n * shape.k_width);
    index->vmean.resize((size_t)n * shape.v_width);
    index->code.resize((size_t)n * shape.k_width * 8);
    index->code_scale.resize(n * 16);
    index->mean_k.resize(shape.k_width);
    index->mean_v.resize(shape.v_width);
    index->home.resize(n);
    winnow_index_view view = index->view();
    int rc = ref->build(&shape, n, k.data(), v.data(), order.data(), &view, scratch);
    EXPECT(rc == 0, "build %d", rc);
    free(scratch);
}

static void index_write(const scene &s, uint32_t segment, uint32_t layer, uint32_t head,
                        host_index *index)
{
    std::vector<uint8_t> packed(s.view.unit_bytes);
    winnow_index_view view = index->view();

    winnow_gpu_index_pack(&s.view, &view, index->home.data(), packed.data());
    device_write(s.view.index + segment * s.view.segment_bytes +
                     (size_t)(layer * s.view.n_kv_heads + head) * s.view.unit_bytes,
                 packed.data(), packed.size());
}

/* The numbers of q as the wire's type holds them, and the bytes. */
static std::vector<uint8_t> query_bytes(uint32_t dtype, std::vector<float> *q)
{
    std::vector<uint8_t> bytes(q->size() * 4);

    for (size_t i = 0; i < q->size(); i++)
        if (dtype == WINNOW_FP16) {
            __half x = __float2half_rn((*q)[i]);
            memcpy(&bytes[2 * i], &x, 2);
            (*q)[i] = __half2float(x);
        } else if (dtype == WINNOW_BF16) {
            __nv_bfloat16 x = __float2bfloat16_rn((*q)[i]);
            memcpy(&bytes[2 * i], &x, 2);
            (*q)[i] = __bfloat162float(x);
        } else
            memcpy(&bytes[4 * i], &(*q)[i], 4);
    return bytes;
}

/* A batch: sessions with lists of segments, one KV index a (segment, head) of layer `layer`. */
struct batch {
    scene s;
    uint32_t layer, n_items;
    std::vector<std::vector<uint32_t>> segments; /* [session] */
    std::vector<host_index> index;               /* [segment][head] */
    std::vector<std::vector<float>> q;           /* [item][Hq x d] */
    std::vector<void *> q_device;
    std::vector<float> ln_z; /* [unit][G] */
};

static uint32_t batch_block(const batch &b, uint32_t unit, uint32_t block, uint32_t *segment)
{
    *segment = b.segments[unit / b.s.view.n_kv_heads][block / b.s.view.span_blocks];
    return block % b.s.view.span_blocks;
}

static uint32_t batch_home(batch &b, uint32_t unit, uint32_t block, uint32_t *ret_id)
{
    uint32_t segment, i = batch_block(b, unit, block, &segment), heads = b.s.view.n_kv_heads;
    uint32_t head = unit % heads;
    *ret_id = ((segment * b.s.view.n_layers + b.layer) * heads + head) * b.s.view.span_blocks + i;
    return b.index[segment * heads + head].home[i];
}

/* Keys of topics, so that blocks differ; hostile ones on top. */
static void keys_fill(random_source &random, check_input input, uint32_t width,
                      const std::vector<float> &centre, std::vector<float> *k)
{
    size_t n = k->size() / width, topic = 0;

    for (size_t t = 0; t < n; t++) {
        if (random() % 16 == 0)
            topic = random() % 8;
        for (uint32_t d = 0; d < width; d++) {
            float x = centre[topic * width + d] + 0.5f * normal(random);
            x = input == EQUAL ? centre[d] : x;
            x *= input == HUGE_NUMBERS || input == OVERFLOWING ? 1e4f : 1;
            x *= input == TINY ? 1e-3f : input == DENORMAL ? 1e-6f : 1;
            (*k)[t * width + d] = x;
        }
    }
}

static void queries_fill(batch *b, random_source &random, check_input input,
                         const std::vector<float> &centre)
{
    uint32_t width = b->s.view.k_width;

    for (uint32_t i = 0; i < b->n_items; i++) {
        uint32_t topic = (uint32_t)(random() % 8);
        for (uint32_t j = 0; j < b->s.view.n_q_heads * width; j++) {
            float x = 0.5f * centre[topic * width + j % width] + normal(random);
            x *= input == NEEDLE ? 8 : input == HUGE_NUMBERS ? 1e3f : 1;
            x *= input == OVERFLOWING ? 1e36f : input == TINY ? 1e-25f : 1;
            b->q[i][j] = x;
        }
        std::vector<uint8_t> bytes = query_bytes(b->s.view.io_dtype, &b->q[i]);
        device_write((uint8_t *)b->q_device[i], bytes.data(), bytes.size());
    }
}

static void batch_init(batch *b, const scene_options &options, random_source &random,
                       check_input input, const std::vector<uint32_t> &n_segments,
                       std::vector<float> *centre)
{
    const winnow_gpu_view *v = &b->s.view;
    uint32_t tokens = options.span_blocks * 16, max = options.n_session_segments_max;

    scene_init(&b->s, options);
    b->layer = options.n_layers - 1;
    b->n_items = (uint32_t)n_segments.size();
    centre->resize(8 * options.k_width);
    for (float &x : *centre)
        x = normal(random);
    b->index.resize(options.n_segments * options.n_kv_heads);
    std::vector<float> k(tokens * v->k_width), values(tokens * v->v_width);
    for (uint32_t i = 0; i < b->index.size(); i++) {
        keys_fill(random, input, v->k_width, *centre, &k);
        for (float &x : values)
            x = normal(random);
        index_build(b->s, k, values, &b->index[i]);
        for (uint32_t j = 0; j < options.span_blocks; j++)
            b->index[i].home[j] = random() % 8 ? i * options.span_blocks + j : WINNOW_GPU_ON_DISK;
        index_write(b->s, i / v->n_kv_heads, b->layer, i % v->n_kv_heads, &b->index[i]);
    }
    for (uint32_t i = 0; i < b->n_items; i++) {
        std::vector<uint32_t> all(options.n_segments);
        for (uint32_t j = 0; j < all.size(); j++)
            all[j] = j;
        std::shuffle(all.begin(), all.end(), random);
        all.resize(n_segments[i]);
        b->segments.push_back(all);
        device_write(v->session_segments + i * max, all.data(), all.size());
        b->q.push_back(std::vector<float>(v->n_q_heads * v->k_width));
        b->q_device.push_back(device_alloc<float>(v->n_q_heads * v->k_width));
        winnow_gpu_item *item = &b->s.launch->item[i];
        *item = winnow_gpu_item();
        item->session = i;
        item->layer = b->layer;
        item->n_segments = n_segments[i];
        item->mass = 0.9f;
        item->q = b->q_device[i];
    }
    b->ln_z.resize((size_t)b->n_items * v->n_kv_heads * v->n_group, -INFINITY);
}

static void batch_finish(batch *b)
{
    for (void *q : b->q_device)
        ok(cudaFree(q), "cudaFree");
    scene_finish(&b->s);
}

static std::vector<float> batch_scan(batch *b, uint32_t n_multiprocessors)
{
    size_t n = (size_t)b->s.launch->n_blocks * b->s.view.n_group;
    winnow_gpu_grid grid = b->s.grid;

    grid.n_multiprocessors = n_multiprocessors;
    ok(cudaMemset(b->s.view.ln_e, 0xff, (n + 64) * 4), "poison");
    scene_begin(b->s, 0, 0);
    ok(winnow_gpu_stage_scan(&b->s.view, &grid, 0), "scan");
    ok(cudaDeviceSynchronize(), "scan");
    std::vector<float> ln_e = device_read(b->s.view.ln_e, n + 64);
    for (size_t i = 0; i < 64; i++)
        EXPECT(!memcmp(&ln_e[n + i], "\xff\xff\xff\xff", 4), "written behind the end");
    return ln_e;
}
