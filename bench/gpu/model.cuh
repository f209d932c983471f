/*
 * The stated model of keys and values: what index, blocks and queries of the synthetic cells hold.
 *
 *   key    centroid + residual, which the index holds exactly: the centroid int8, uniform, RMS 3.3 a
 *          dimension, the residual 4 bits, uniform, RMS 1.0
 *   value  mean of its block + a residual, both uniform in -1.3 .. 1.3; the mean int8
 *   query  normal; the heads of a group share .9 of it; scaled, which tunes the share selected
 *
 * So logits are normal over the context, with 3.3 times the spread between blocks that they have
 * within one, and no token is special: sinks and tail are as the rest. Real heads have a few heavy
 * blocks and much mass in sinks and tail; bench/gpu/traces.cu has such.
 *
 * Content is a function of an **alias**: block id modulo the n_aliases blocks of the host arena. So a
 * host of 128 GiB serves contexts of any size, and every block's bytes agree with its index, whether
 * they are read from a slot, the host or a dense copy. Within a launch a block of the arena is read
 * twice about as often as two of the selected are equal modulo n_aliases (5 % at worst).
 */
#pragma once

#include "card.cuh"

#include <cuda_bf16.h>
#include <kernels/cuda/view.h>

constexpr uint32_t MODEL_WIDTH = 128, MODEL_BLOCK_BYTES = 2 * 16 * MODEL_WIDTH * 2;
constexpr uint32_t MODEL_CODE_WORDS = 256, MODEL_WIDTH_WORDS = MODEL_WIDTH / 4; /* of a block */
constexpr uint32_t MODEL_NO_BLOCK = 0xffffffffu;
constexpr float MODEL_CENTROID_SCALE = 0.045f, MODEL_CODE_SCALE = 0.21875f; /* 0x3300 in fp16 */
constexpr float MODEL_VALUE_SCALE = 0.01f;

/* Llama-3.1-8B's. */
inline winnow_model_shape model_shape(uint32_t n_layers)
{
    return {n_layers,     32,          8,           MODEL_WIDTH,           MODEL_WIDTH,
            0.088388348f, WINNOW_BF16, WINNOW_BF16, WINNOW_BLOCK_FRAGMENTS};
}

enum { MODEL_CODE, MODEL_CENTROID, MODEL_VMEAN, MODEL_VALUE };

static __device__ uint32_t model_word(uint32_t alias, uint32_t kind, uint32_t word)
{
    uint64_t x = ((uint64_t)alias << 12 | kind << 10 | word) * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 31) * 0x7fb5d329728ea185u;
    x = (x ^ x >> 27) * 0x81dadef4bc2dd44du;
    return (uint32_t)(x >> 32);
}

/* Eight codes + 8; codes are -7 to 7. */
static __device__ uint32_t model_codes(uint32_t alias, uint32_t word)
{
    uint32_t x = model_word(alias, MODEL_CODE, word);
    return x | (~(x | x >> 1 | x >> 2 | x >> 3) & 0x11111111u);
}

/* Four int8 between -127 and 127. */
static __device__ uint32_t model_bytes(uint32_t alias, uint32_t kind, uint32_t word)
{
    uint32_t x = model_word(alias, kind, word);
    return __vmaxs4(x, 0x81818181u);
}

static __device__ float model_byte(uint32_t alias, uint32_t kind, uint32_t d)
{
    return (float)(int8_t)(model_bytes(alias, kind, d / 4) >> 8 * (d % 4));
}

/* Where view.h's index has dimension d of token t. */
static __device__ float model_key(uint32_t alias, uint32_t t, uint32_t d)
{
    uint32_t lane = t % 8 * 4 + d % 16 / 4, i = t / 8 + d % 32 / 16 * 2;
    uint32_t word = model_codes(alias, (d % 64 / 32 * 32 + lane) * 4 + i);
    float code = (float)(word >> (8 * (d % 4) + 4 * (d / 64)) & 15) - 8;
    return MODEL_CENTROID_SCALE * model_byte(alias, MODEL_CENTROID, d) + MODEL_CODE_SCALE * code;
}

static __device__ float model_value(uint32_t alias, uint32_t t, uint32_t d)
{
    float rest = (float)(int8_t)model_word(alias, MODEL_VALUE, t / 2 * MODEL_WIDTH + d);
    float mean = model_byte(alias, MODEL_VMEAN, d);
    return MODEL_VALUE_SCALE * (mean + (t % 2 ? -rest : rest));
}

/* Blocks in layout 2 at to[i]: that of alias[i], a thread block each. */
static __global__ void model_blocks_kernel(uint8_t *to, const uint32_t *alias)
{
    uint32_t of = alias[blockIdx.x];
    __nv_bfloat16 *block = (__nv_bfloat16 *)(to + (size_t)blockIdx.x * MODEL_BLOCK_BYTES);

    if (of == MODEL_NO_BLOCK)
        return;
    for (uint32_t i = threadIdx.x; i < 16 * MODEL_WIDTH; i += blockDim.x) {
        uint32_t lane = i % 256 / 8, tile = i / 256;
        uint32_t row = lane / 4 + 8 * (i / 2 % 2),
                 column = 2 * (lane % 4) + i % 2 + 8 * (i / 4 % 2);
        block[i] = __float2bfloat16_rn(model_key(of, row, 16 * tile + column));
        block[16 * MODEL_WIDTH + i] = __float2bfloat16_rn(model_value(of, column, 16 * tile + row));
    }
}

inline void model_blocks_write(uint8_t *to, const std::vector<uint32_t> &alias)
{
    uint32_t *of = device_copy(alias);
    model_blocks_kernel<<<(uint32_t)alias.size(), 256>>>(to, of);
    ok(cudaDeviceSynchronize(), "blocks");
    ok(cudaFree(of), "cudaFree");
}

/* The index of every (segment, layer, head): a thread block each. */
static __global__ void model_index_kernel(winnow_gpu_view view, uint32_t n_aliases)
{
    uint8_t *at = view.index + (size_t)blockIdx.x * view.unit_bytes;
    uint32_t n = view.span_blocks, id = blockIdx.x * n, record_words = view.record_bytes / 4;
    constexpr uint32_t CODES = 8 * MODEL_CODE_WORDS, CENTROIDS = CODES + 8 * MODEL_WIDTH_WORDS;
    constexpr uint32_t CODE_SCALES = CENTROIDS + 8 * 8;

    for (uint32_t i = threadIdx.x; i < n / 8 * record_words; i += blockDim.x) {
        uint32_t block = id + i / record_words * 8, w = i % record_words, word;
        if (w < CODES)
            word = model_codes((block + w / MODEL_CODE_WORDS) % n_aliases, w % MODEL_CODE_WORDS);
        else if (w < CENTROIDS)
            word = model_bytes((block + (w - CODES) / MODEL_WIDTH_WORDS) % n_aliases,
                               MODEL_CENTROID, (w - CODES) % MODEL_WIDTH_WORDS);
        else
            word = w < CODE_SCALES ? 0x33003300u : __float_as_uint(MODEL_CENTROID_SCALE);
        ((uint32_t *)at)[i] = word;
    }
    for (uint32_t i = threadIdx.x; i < n * MODEL_WIDTH_WORDS; i += blockDim.x)
        ((uint32_t *)(at + view.vmean_at))[i] = model_bytes(
            (id + i / MODEL_WIDTH_WORDS) % n_aliases, MODEL_VMEAN, i % MODEL_WIDTH_WORDS);
    for (uint32_t i = threadIdx.x; i < MODEL_WIDTH; i += blockDim.x)
        ((float *)(at + view.mean_v_at))[i] = 0;
    for (uint32_t b = threadIdx.x; b < n; b += blockDim.x) {
        ((float *)(at + view.vmean_scale_at))[b] = MODEL_VALUE_SCALE;
        ((uint32_t *)(at + view.home_at))[b] = (id + b) % n_aliases * (MODEL_BLOCK_BYTES / 4096);
        ((uint32_t *)(at + view.loc_at))[b] = 0;
    }
}

inline void model_index_write(const winnow_gpu_view &view, uint32_t n_segments, uint32_t n_aliases)
{
    model_index_kernel<<<n_segments * view.n_layers * view.n_kv_heads, 256>>>(view, n_aliases);
    ok(cudaDeviceSynchronize(), "index");
}
