/*
 * Units of a launch as the host knows them: their blocks, tails and queries, and what the reference
 * selects.
 */
#pragma once

#include <cuda_runtime_api.h>
#include <errno.h>
#include <float.h>
#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/stage.h>
#include <kernels/ref/ref.h>
#include <test.h>

#include "cases.h"

enum {
    N_HEADS = 2,
    SPAN = 40, /* blocks a segment: chunks and warps of a chunk cross segments */
    N_SEGMENTS_MAX = 14,
    N_ITEMS = 2,
    N_BLOCKS_MAX = SPAN * N_SEGMENTS_MAX,
    N_UNITS = N_ITEMS * N_HEADS,
    RING = 24,
    N_SINK_BLOCKS = 1,
    N_TAIL_BLOCKS_MAX = N_SINK_BLOCKS + RING,
    N_LAYERS = 2, /* the second one is attended */
    N_SLOTS = 8192,
    STAMP = 7,
    PARTIALS = 4 + N_TAIL_BLOCKS_MAX / 8 + N_BLOCKS_MAX / 8 + 8 + N_BLOCKS_MAX / 512,
    GUARD = 64,
};

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t cuda_rc = (call);                                                              \
        if (cuda_rc != cudaSuccess)                                                                \
            test_fail(__FILE__, __LINE__, cudaGetErrorString(cuda_rc));                            \
    } while (0)

static const struct winnow_kernels *ref;

/* A unit as the host knows it. */
struct unit {
    struct kernel_data segment[N_SEGMENTS_MAX], tail;
    uint32_t n_blocks, n_tail_blocks, n_tail_tokens[N_TAIL_BLOCKS_MAX];
    float *q; /* [G][k_width] as io_dtype holds it */
    float ln_z[WINNOW_GQA_MAX], *tail_acc, *ln_e, *ln_m, *ln_key;
    uint32_t *block_idx;
    uint8_t *selected, *scratch;
    struct winnow_selection sel;
    float rho[WINNOW_GQA_MAX];
    struct winnow_gpu_listed listed[N_BLOCKS_MAX];
};

struct scene {
    struct kernel_case of;
    enum kernel_input input;
    uint32_t io_dtype, n_segments[N_ITEMS];
    uint64_t n_tokens[N_ITEMS];
    float mass;
    uint32_t n_blocks_max;
    bool is_overrated; /* every tenth block by e^2 */
    struct unit unit[N_UNITS];
    struct winnow_gpu_view view;
    struct winnow_gpu_launch *launch; /* host's copy */
    struct winnow_gpu_grid grid;
    uint8_t *host; /* the arena */
    uint8_t *out[N_ITEMS];
    float *lse[N_ITEMS];
    struct winnow_gpu_certificate *certificate[N_ITEMS];
    uint32_t *disk_block[N_ITEMS];
};

static struct scene scene;

static void *device_alloc(size_t n_bytes, int fill)
{
    void *memory;
    CUDA(cudaMalloc(&memory, n_bytes));
    CUDA(cudaMemset(memory, fill, n_bytes));
    return memory;
}

static void to_device(void *to, const void *from, size_t n_bytes)
{
    CUDA(cudaMemcpy(to, from, n_bytes, cudaMemcpyHostToDevice));
}

static void from_device(void *to, const void *from, size_t n_bytes)
{
    CUDA(cudaMemcpy(to, from, n_bytes, cudaMemcpyDeviceToHost));
}

static size_t io_bytes(void)
{
    return scene.io_dtype == WINNOW_FP32 ? 4 : 2;
}

/* x as io_dtype holds it; what does not fit becomes the largest that does. */
static float io_round(float x)
{
    uint16_t bits;
    if (scene.io_dtype == WINNOW_FP32)
        return x;
    if (scene.io_dtype == WINNOW_FP16) {
        bits = winnow_ref_float_to_fp16(fmaxf(fminf(x, 65504.0f), -65504.0f));
        return winnow_ref_fp16_to_float(bits);
    }
    return winnow_ref_bf16_to_float(winnow_ref_float_to_bf16(fmaxf(fminf(x, 3e38f), -3e38f)));
}

static void io_write(uint8_t *at, size_t idx, float x)
{
    if (scene.io_dtype == WINNOW_FP32)
        ((float *)at)[idx] = x;
    else
        ((uint16_t *)at)[idx] = scene.io_dtype == WINNOW_FP16 ? winnow_ref_float_to_fp16(x)
                                                              : winnow_ref_float_to_bf16(x);
}

static float io_read(const uint8_t *at, size_t idx)
{
    float x;
    winnow_ref_widen(scene.io_dtype, 1, at + idx * io_bytes(), &x);
    return x;
}

static uint32_t group(void)
{
    return scene.of.shape.n_q_heads;
}

static uint32_t stride(void)
{
    return scene.of.shape.v_width + 2;
}

static struct winnow_model_shape fragments(const struct winnow_model_shape *shape)
{
    struct winnow_model_shape other = *shape;
    other.block_layout = WINNOW_BLOCK_FRAGMENTS;
    return other;
}

/* Block b of data in layout 2. */
static void block_fragments(const struct kernel_data *data, uint32_t b, uint32_t n_tokens,
                            uint8_t *to)
{
    struct winnow_model_shape shape = fragments(&data->shape);
    static float k[16 * WINNOW_WIDTH_MAX], v[16 * WINNOW_WIDTH_MAX];

    ref->block_unpack(&data->shape, data->block[b], k, v);
    ref->block_pack(&shape, 0, n_tokens, k, v, to);
}

/* Blocks of a segment hold its tokens in the order of the index. */
static void segment_order(struct kernel_data *data)
{
    uint32_t k_width = data->shape.k_width, v_width = data->shape.v_width;
    static float k[16 * WINNOW_WIDTH_MAX], v[16 * WINNOW_WIDTH_MAX];

    for (uint32_t b = 0; b < data->n_blocks; b++) {
        for (uint32_t t = 0; t < 16; t++) {
            memcpy(k + t * k_width, data->k + (size_t)data->order[16 * b + t] * k_width,
                   k_width * sizeof *k);
            memcpy(v + t * v_width, data->v + (size_t)data->order[16 * b + t] * v_width,
                   v_width * sizeof *v);
        }
        ref->block_pack(&data->shape, 0, 16, k, v, data->blocks + b * data->block_bytes);
    }
}

static const struct kernel_data *unit_block(const struct unit *unit, uint32_t b, uint32_t *ret_b)
{
    *ret_b = b % SPAN;
    return &unit->segment[b / SPAN];
}

static void partial_clear(float *acc)
{
    memset(acc, 0, sizeof *acc * group() * stride());
    for (uint32_t g = 0; g < group(); g++)
        acc[g * stride()] = -INFINITY;
}

static void unit_tail(struct unit *unit)
{
    float *partial = case_alloc(unit->tail.n_partial * sizeof(float));

    partial_clear(unit->tail_acc);
    for (uint32_t b = 0; b < unit->n_tail_blocks; b += 8) {
        uint32_t n = unit->n_tail_blocks - b < 8 ? unit->n_tail_blocks - b : 8;
        ref->attend_partial(&unit->tail.shape, unit->q, n, unit->tail.block + b,
                            unit->n_tail_tokens + b, partial, NULL);
        ref->merge(&unit->tail.shape, 1, partial, unit->tail_acc);
    }
    for (uint32_t g = 0; g < group(); g++)
        unit->ln_z[g] = unit->tail_acc[g * stride()] + logf(unit->tail_acc[g * stride() + 1]);
    winnow_alloc_free(partial);
}

/* The newest token has come through io_dtype. */
static void newest_round(struct unit *unit, uint32_t t)
{
    struct kernel_data *data = &unit->tail;
    uint32_t k_width = data->shape.k_width, v_width = data->shape.v_width;
    uint32_t b = unit->n_tail_blocks - 1;
    float *k = data->k + (16 * (size_t)b + t) * k_width,
          *v = data->v + (16 * (size_t)b + t) * v_width;

    for (uint32_t d = 0; d < k_width; d++)
        k[d] = io_round(k[d]);
    for (uint32_t d = 0; d < v_width; d++)
        v[d] = io_round(v[d]);
    ref->block_pack(&data->shape, t, 1, k, v, data->blocks + b * data->block_bytes);
}

static void unit_init(struct unit *unit, uint32_t item, uint64_t seed)
{
    const struct kernel_case *of = &scene.of;
    uint32_t n_segments = scene.n_segments[item], n = n_segments * SPAN;
    uint64_t n_all = (scene.n_tokens[item] + 15) / 16;

    *unit = (struct unit){.n_blocks = n};
    for (uint32_t s = 0; s < n_segments; s++) {
        case_data_init(&unit->segment[s], of, scene.input, SPAN, 1, seed + s);
        segment_order(&unit->segment[s]);
    }
    unit->n_tail_blocks = (uint32_t)(n_all - n);
    case_data_init(&unit->tail, of, scene.input, unit->n_tail_blocks, 1, seed + 100);
    for (uint32_t b = 0; b < unit->n_tail_blocks; b++)
        unit->n_tail_tokens[b] = 16;
    unit->n_tail_tokens[unit->n_tail_blocks - 1] = (uint32_t)(scene.n_tokens[item] - 1) % 16 + 1;
    newest_round(unit, (uint32_t)(scene.n_tokens[item] - 1) % 16);
    uint32_t n_q = group() * of->shape.k_width;
    unit->q = case_alloc(n_q * sizeof(float));
    for (uint32_t i = 0; i < n_q; i++)
        unit->q[i] = io_round(unit->segment[0].q ? unit->segment[0].q[i] : unit->tail.q[i]);
    unit->tail_acc = case_alloc(unit->tail.n_partial * sizeof(float));
    unit->ln_e = case_alloc((n + 1) * group() * sizeof(float));
    unit->ln_m = case_alloc((n + 1) * group() * sizeof(float));
    unit->ln_key = case_alloc((n + 1) * sizeof(float));
    unit->block_idx = case_alloc((n + 1) * sizeof(uint32_t));
    unit->selected = case_alloc(n + 1);
    unit->scratch = case_alloc(ref->scratch_bytes(&of->shape, n + 1));
    unit_tail(unit);
    for (uint32_t s = 0; s < n_segments; s++)
        ref->score(&unit->segment[s].shape, WINNOW_POLICY_CODES, &unit->segment[s].view, unit->q,
                   unit->ln_e + s * SPAN * group(), unit->scratch);
    for (uint64_t b = 0; scene.is_overrated && b < n; b += 10)
        for (uint32_t g = 0; g < group(); g++)
            unit->ln_e[b * group() + g] += 2;
    unit->sel =
        (struct winnow_selection){.n_q = group(),
                                  .n_blocks = n,
                                  .n_blocks_max = scene.n_blocks_max ? scene.n_blocks_max : n,
                                  .mass = scene.mass,
                                  .ln_z = unit->ln_z,
                                  .ln_m = unit->ln_m,
                                  .ln_e = unit->ln_e,
                                  .ln_key = unit->ln_key,
                                  .block_idx = unit->block_idx,
                                  .selected = unit->selected};
    if (unit->sel.n_blocks_max > n)
        unit->sel.n_blocks_max = n;
    ref->select(WINNOW_POLICY_CODES, &unit->sel, unit->scratch);
}

static void unit_finish(struct unit *unit)
{
    for (uint32_t s = 0; s < unit->n_blocks / SPAN; s++)
        case_data_finish(&unit->segment[s]);
    case_data_finish(&unit->tail);
    void *memory[] = {unit->q,      unit->tail_acc,  unit->ln_e,     unit->ln_m,
                      unit->ln_key, unit->block_idx, unit->selected, unit->scratch};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        winnow_alloc_free(memory[i]);
}
