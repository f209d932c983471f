/* Values of all threads of a thread block made one, in the same order every time. */
#pragma once

#include <math.h>
#include <stdint.h>

constexpr uint32_t N_THREADS = 256; /* of a thread block that reduces */

/* A number that orders as x does, -0 and +0 alike; NaN last. */
__device__ inline uint32_t rank_of(float x)
{
    uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & UINT32_C(0x80000000) ? ~bits : bits | UINT32_C(0x80000000);
}

/* A value of every thread reduced over the block by `join`; all threads get it. */
template <class T, class Join> __device__ T block_reduce(T x, Join join)
{
    __shared__ T of_warp[N_THREADS / 32];

    for (int offset = 16; offset > 0; offset /= 2)
        x = join(x, __shfl_xor_sync(~0u, x, offset));
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[0];
    for (uint32_t i = 1; i < blockDim.x / 32; i++)
        x = join(x, of_warp[i]);
    return x;
}

__device__ inline float block_max(float x)
{
    return block_reduce(x, [](float a, float b) { return fmaxf(a, b); });
}

__device__ inline uint32_t block_min(uint32_t x)
{
    return block_reduce(x, [](uint32_t a, uint32_t b) { return min(a, b); });
}
