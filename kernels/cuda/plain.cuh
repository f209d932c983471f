/*
 * What the plain kernels share: numbers as ref/ takes them, and sums over a thread block.
 *
 * The files that include this are compiled without contraction (--fmad=false) and keep ref's order
 * of adding wherever a result shows it, so that they differ from ref by exp and log alone.
 */
#pragma once

#include <cuda_fp16.h>
#include <kernels/cuda/plain.h>
#include <kernels/cuda/reduce.cuh>

/* exp, but 0 below -80, as in ref. */
__device__ inline float exp_or_0(float x)
{
    return x < -80.0f ? 0.0f : expf(x);
}

__device__ inline bool is_known(float ln_e)
{
    return ln_e < INFINITY;
}

__device__ inline uint64_t fixed_add(uint64_t a, uint64_t b)
{
    uint64_t sum = a + b;
    return sum < a ? UINT64_MAX : sum;
}

/* exp(ln_x - ln_max) as fixed point 2^-40. */
__device__ inline uint64_t fixed(float ln_x, float ln_max)
{
    double x = (double)ln_x - (double)ln_max;

    if (!(x >= -80) || !is_known(ln_x))
        return 0;
    return x > 16 ? UINT64_MAX : (uint64_t)llrint(exp(x) * 0x1p40);
}

__device__ inline float fp16_to_float(uint16_t bits)
{
    return __half2float(__ushort_as_half(bits));
}

__device__ inline uint16_t float_to_fp16(float x)
{
    return __half_as_ushort(__float2half_rn(x));
}

__device__ inline uint16_t float_to_bf16(float x)
{
    uint32_t bits = __float_as_uint(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ inline float element_load(uint32_t dtype, const void *src, size_t idx)
{
    if (dtype == WINNOW_FP32)
        return ((const float *)src)[idx];
    uint16_t bits = ((const uint16_t *)src)[idx];
    return dtype == WINNOW_FP16 ? fp16_to_float(bits) : __uint_as_float((uint32_t)bits << 16);
}

/* Place in a tile of layout 2 (kernels.h). */
__device__ inline uint32_t fragment_at(uint32_t row, uint32_t column)
{
    uint32_t lane = 4 * (row % 8) + column % 8 / 2;
    return 8 * lane + column % 2 + 2 * (row / 8) + 4 * (column / 8);
}

/* Place of dimension d of token t among the elements of a block. */
__device__ inline uint32_t k_at(const struct winnow_model_shape &shape, uint32_t t, uint32_t d)
{
    if (shape.block_layout == WINNOW_BLOCK_FRAGMENTS)
        return d / 16 * 256 + fragment_at(t, d % 16);
    return d * 16 + t;
}

__device__ inline uint32_t v_at(const struct winnow_model_shape &shape, uint32_t t, uint32_t d)
{
    uint32_t first = 16 * shape.k_width;
    if (shape.block_layout == WINNOW_BLOCK_FRAGMENTS)
        return first + d / 16 * 256 + fragment_at(d % 16, t);
    return first + t * shape.v_width + d;
}

__device__ inline uint64_t block_fixed_sum(uint64_t x)
{
    return block_reduce(x, [](uint64_t a, uint64_t b) { return fixed_add(a, b); });
}
