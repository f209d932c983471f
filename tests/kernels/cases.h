/*
 * The case list that tests/kernels/test_versions_*.c check and bench/kernels.c times: shapes of
 * models, kinds of input, and one KV head's data made of both. Data is packed and indexed by the
 * reference, so that every version gets the same.
 */
#pragma once

#include <base/alloc.h>
#include <base/assert.h>
#include <base/rng.h>
#include <kernels/kernels.h>
#include <math.h>
#include <string.h>

struct kernel_case {
    const char *name;
    struct winnow_model_shape shape;
};

#define KERNEL_CASE(name, n_q, k_width, v_width, dtype)                                            \
    {                                                                                              \
        name,                                                                                      \
        {                                                                                          \
            1, n_q, 1, k_width, v_width, 0, dtype, WINNOW_FP32, WINNOW_BLOCK_LAYOUT                \
        }                                                                                          \
    }

/* The first two are the shapes whose times are goals: SmolLM2-135M and Llama 3 8B. */
static const struct kernel_case kernel_cases[] = {
    KERNEL_CASE("smollm2", 3, 64, 64, WINNOW_FP16),
    KERNEL_CASE("llama", 4, 128, 128, WINNOW_BF16),
    KERNEL_CASE("qwen", 7, 128, 128, WINNOW_FP16),
    KERNEL_CASE("narrow-v", 2, 192, 112, WINNOW_FP32),
    KERNEL_CASE("one-to-one", 1, 256, 256, WINNOW_BF16),
    KERNEL_CASE("one-to-16", 16, 80, 48, WINNOW_FP16),
    KERNEL_CASE("smallest", 1, 16, 16, WINNOW_FP32),
};

enum kernel_input {
    INPUT_RANDOM,   /* topics: keys that lie in clusters, as real ones do */
    INPUT_NEEDLE,   /* sharp queries, one key 30 nats above the rest */
    INPUT_EQUAL,    /* all keys one, all values one */
    INPUT_STEPS,    /* keys of three kinds: ties wherever a half ends */
    INPUT_HUGE,     /* the largest numbers fp16 holds; logits beyond any exp */
    INPUT_OVERFLOW, /* logits beyond fp32 */
    INPUT_TINY,     /* products below fp32's normal range */
    INPUT_DENORMAL, /* numbers below the type's normal range */
    N_INPUTS
};
static const char *const kernel_input_name[N_INPUTS] = {"random", "needle",   "equal", "steps",
                                                        "huge",   "overflow", "tiny",  "denormal"};

enum { CASE_POSITIONS = 26 }; /* query positions of a window in the test */

struct kernel_data {
    struct winnow_model_shape shape;
    uint32_t n_q, n_blocks, n_pos;
    size_t block_bytes, n_partial; /* floats of one partial [G] */
    float *k, *v;                  /* [16 n_blocks][width], position order */
    float *q;                      /* [n_pos][G][k_width] */
    uint8_t *blocks;               /* [n_blocks], tokens in position order */
    const void **block;
    uint16_t *order;
    struct winnow_index_view view;
    void *scratch;
};

static inline void *case_alloc(size_t n_bytes)
{
    void *memory = winnow_alloc(n_bytes);
    winnow_assert(memory);
    return memory;
}

static inline void case_view_init(struct winnow_index_view *view,
                                  const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    *view = (struct winnow_index_view){
        .n_blocks = n_blocks,
        .head = case_alloc(n_blocks * sizeof *view->head),
        .centroid = case_alloc((size_t)n_blocks * shape->k_width),
        .vmean = case_alloc((size_t)n_blocks * shape->v_width),
        .code = case_alloc((size_t)n_blocks * shape->k_width * 8),
        .code_scale = case_alloc((size_t)n_blocks * 32),
        .var = case_alloc((size_t)n_blocks * shape->k_width * 2),
        .mean_k = case_alloc(shape->k_width * sizeof(float)),
        .mean_v = case_alloc(shape->v_width * sizeof(float)),
        .v_max = case_alloc(sizeof(float)),
    };
}

static inline void case_view_finish(struct winnow_index_view *view)
{
    winnow_alloc_free(view->head);
    winnow_alloc_free(view->centroid);
    winnow_alloc_free(view->vmean);
    winnow_alloc_free(view->code);
    winnow_alloc_free(view->code_scale);
    winnow_alloc_free(view->var);
    winnow_alloc_free(view->mean_k);
    winnow_alloc_free(view->mean_v);
    winnow_alloc_free(view->v_max);
}

/* Keys and values of 8 topics, in runs of about 16; queries that like one topic each. */
static inline void case_fill_random(struct kernel_data *data, struct winnow_rng *rng)
{
    enum { N_TOPICS = 8 };
    uint32_t k_width = data->shape.k_width, v_width = data->shape.v_width, topic = 0;
    float *centre = case_alloc(sizeof(float) * N_TOPICS * k_width);

    for (uint32_t i = 0; i < N_TOPICS * k_width; i++)
        centre[i] = (float)winnow_rng_normal(rng);
    for (uint32_t t = 0; t < 16 * data->n_blocks; t++) {
        if (winnow_rng_below(rng, 16) == 0)
            topic = (uint32_t)winnow_rng_below(rng, N_TOPICS);
        for (uint32_t d = 0; d < k_width; d++)
            data->k[(size_t)t * k_width + d] =
                centre[topic * k_width + d] + 0.5f * (float)winnow_rng_normal(rng);
        for (uint32_t d = 0; d < v_width; d++)
            data->v[(size_t)t * v_width + d] = (float)winnow_rng_normal(rng);
    }
    for (uint32_t i = 0; i < data->n_pos * data->n_q; i++) {
        topic = (uint32_t)winnow_rng_below(rng, N_TOPICS);
        for (uint32_t d = 0; d < k_width; d++)
            data->q[(size_t)i * k_width + d] =
                0.5f * centre[topic * k_width + d] + (float)winnow_rng_normal(rng);
    }
    winnow_alloc_free(centre);
}

static inline void case_scale(float *x, size_t n, float by)
{
    for (size_t i = 0; i < n; i++)
        x[i] *= by;
}

/* From the random data to the hostile. */
static inline void case_fill_hostile(struct kernel_data *data, enum kernel_input input)
{
    uint32_t k_width = data->shape.k_width, v_width = data->shape.v_width;
    size_t n_k = (size_t)16 * data->n_blocks * k_width, n_v = (size_t)16 * data->n_blocks * v_width;
    size_t n_q = (size_t)data->n_pos * data->n_q * k_width;
    size_t needle = n_k / k_width / 3;
    float norm = 0;

    switch (input) {
    case INPUT_NEEDLE:
        case_scale(data->q, n_q, 4);
        for (uint32_t d = 0; d < k_width; d++)
            norm += data->q[d] * data->q[d];
        for (uint32_t d = 0; d < k_width; d++)
            data->k[needle * k_width + d] +=
                30.0f / (data->shape.softmax_scale * norm) * data->q[d];
        break;
    case INPUT_EQUAL:
        for (size_t i = k_width; i < n_k; i++)
            data->k[i] = data->k[i - k_width];
        for (size_t i = v_width; i < n_v; i++)
            data->v[i] = data->v[i - v_width];
        break;
    case INPUT_STEPS:
        for (size_t i = 3 * k_width; i < n_k; i++)
            data->k[i] = data->k[i / k_width * 7 % 11 % 3 * k_width + i % k_width];
        break;
    case INPUT_HUGE:
        case_scale(data->k, n_k, 1e4f);
        case_scale(data->v, n_v, 1e4f);
        case_scale(data->q, n_q, 1e4f);
        break;
    case INPUT_OVERFLOW:
        case_scale(data->k, n_k, 1e4f);
        case_scale(data->q, n_q, 1e36f);
        break;
    case INPUT_TINY:
        case_scale(data->k, n_k, data->shape.kv_dtype == WINNOW_FP16 ? 1e-3f : 1e-20f);
        case_scale(data->q, n_q, 1e-25f);
        break;
    case INPUT_DENORMAL:
        case_scale(data->k, n_k, data->shape.kv_dtype == WINNOW_FP16 ? 1e-6f : 1e-40f);
        case_scale(data->v, n_v, data->shape.kv_dtype == WINNOW_FP16 ? 1e-6f : 1e-40f);
        break;
    default:
        break;
    }
}

/* Keys and values become what the blocks hold. */
static inline void case_pack(struct kernel_data *data)
{
    const struct winnow_kernels *ref = winnow_kernels_ref();
    size_t k_width = data->shape.k_width, v_width = data->shape.v_width;

    for (uint32_t b = 0; b < data->n_blocks; b++) {
        uint8_t *block = data->blocks + b * data->block_bytes;
        float *k = data->k + 16 * b * k_width, *v = data->v + 16 * b * v_width;
        ref->block_pack(&data->shape, 0, 16, k, v, block);
        ref->block_unpack(&data->shape, block, k, v);
        data->block[b] = block;
    }
}

static inline void case_data_init(struct kernel_data *data, const struct kernel_case *of,
                                  enum kernel_input input, uint32_t n_blocks, uint32_t n_pos,
                                  uint64_t seed)
{
    const struct winnow_kernels *ref = winnow_kernels_ref();
    struct winnow_rng rng;
    uint32_t n_q = of->shape.n_q_heads;

    *data = (struct kernel_data){
        .shape = of->shape,
        .n_q = n_q,
        .n_blocks = n_blocks,
        .n_pos = n_pos,
        .block_bytes = winnow_block_bytes(&of->shape),
        .n_partial = winnow_partial_floats(&of->shape),
        .k = case_alloc((size_t)16 * n_blocks * of->shape.k_width * sizeof(float)),
        .v = case_alloc((size_t)16 * n_blocks * of->shape.v_width * sizeof(float)),
        .q = case_alloc((size_t)n_pos * n_q * of->shape.k_width * sizeof(float)),
        .blocks = case_alloc((size_t)n_blocks * winnow_block_bytes(&of->shape)),
        .block = case_alloc(n_blocks * sizeof *data->block),
        .order = case_alloc((size_t)16 * n_blocks * sizeof *data->order),
    };
    data->shape.softmax_scale = 1.0f / sqrtf((float)of->shape.k_width);
    data->scratch = case_alloc(ref->scratch_bytes(&data->shape, n_blocks));
    winnow_rng_init(&rng, seed);
    case_fill_random(data, &rng);
    case_fill_hostile(data, input);
    case_pack(data);
    case_view_init(&data->view, &data->shape, n_blocks);
    int rc = ref->build(&data->shape, n_blocks, data->k, data->v, data->order, &data->view,
                        data->scratch);
    winnow_assert(rc == 0);
}

static inline void case_data_finish(struct kernel_data *data)
{
    case_view_finish(&data->view);
    winnow_alloc_free(data->k);
    winnow_alloc_free(data->v);
    winnow_alloc_free(data->q);
    winnow_alloc_free(data->blocks);
    winnow_alloc_free(data->block);
    winnow_alloc_free(data->order);
    winnow_alloc_free(data->scratch);
}
