/*
 * Rows of 16-bit or fp32 numbers, read eight at a time: a row by the lanes of a power of two that
 * hold all its dimensions, so that a warp takes whole rows and sums over lanes need no more than
 * shuffles. Lanes beyond the width take part with 0.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

template <class T> struct row_part { /* eight numbers as they lie in memory */
    uint4 word[sizeof(T) / 2];
};

template <class T> __device__ inline row_part<T> row_load(const T *at)
{
    row_part<T> part;
    for (uint32_t i = 0; i < sizeof(T) / 2; i++)
        part.word[i] = ((const uint4 *)at)[i];
    return part;
}

__device__ inline void row_widen(const row_part<float> &part, float (&x)[8])
{
    for (int i = 0; i < 2; i++) {
        x[4 * i] = __uint_as_float(part.word[i].x);
        x[4 * i + 1] = __uint_as_float(part.word[i].y);
        x[4 * i + 2] = __uint_as_float(part.word[i].z);
        x[4 * i + 3] = __uint_as_float(part.word[i].w);
    }
}

__device__ inline void row_widen(const row_part<__nv_bfloat16> &part, float (&x)[8])
{
    const uint32_t word[4] = {part.word[0].x, part.word[0].y, part.word[0].z, part.word[0].w};
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(word[i] << 16);
        x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}

__device__ inline void row_widen(const row_part<__half> &part, float (&x)[8])
{
    const uint32_t word[4] = {part.word[0].x, part.word[0].y, part.word[0].z, part.word[0].w};
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __half2float(__ushort_as_half((unsigned short)word[i]));
        x[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(word[i] >> 16)));
    }
}

/* This thread's place: rows first, first + stride, .. and dimensions 8 part .. 8 part + 7. */
struct row_place {
    uint32_t n_lanes, part, first, stride;
    bool has_part;
};

__device__ inline row_place row_place_of(uint32_t width)
{
    row_place place;
    for (place.n_lanes = 2; 8 * place.n_lanes < width;)
        place.n_lanes *= 2;
    place.part = threadIdx.x % place.n_lanes;
    place.first = threadIdx.x / place.n_lanes;
    place.stride = blockDim.x / place.n_lanes;
    place.has_part = 8 * place.part < width;
    return place;
}

template <class X> __device__ inline X row_sum(const row_place &place, X x)
{
    for (uint32_t offset = 1; offset < place.n_lanes; offset *= 2)
        x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

/* Sums of eight dimensions over all rows of the thread block, to sum [width] in shared memory, of
 * part [warps][width]. */
template <class X>
__device__ inline void row_columns(const row_place &place, uint32_t width, X (&x)[8], X *part,
                                   X *sum)
{
    uint32_t warp = threadIdx.x / 32, n_warps = blockDim.x / 32;

    for (int i = 0; i < 8; i++)
        for (uint32_t offset = place.n_lanes; offset < 32; offset *= 2)
            x[i] += __shfl_xor_sync(~0u, x[i], offset);
    if (threadIdx.x % 32 < place.n_lanes && place.has_part)
        for (int i = 0; i < 8; i++)
            part[warp * width + 8 * place.part + i] = x[i];
    __syncthreads();
    for (uint32_t d = threadIdx.x; d < width; d += blockDim.x) {
        X total = part[d];
        for (uint32_t i = 1; i < n_warps; i++)
            total += part[i * width + d];
        sum[d] = total;
    }
    __syncthreads();
}
