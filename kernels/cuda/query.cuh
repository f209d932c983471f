/*
 * A unit's query as operands of the scan's integer matrix instructions: 15 bits in two int8 halves
 * for the codes, 28 bits in four digits for the centroids.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <kernels/cuda/view.h>

namespace
{

constexpr int QUERY_LARGEST = 16256; /* as ref: 15 bits */
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* Query of a unit as operands. KT = coded width / 64, NT = query heads / 4, rounded up. */
template <int KT, int NT> struct query_operands {
    uint2 code[NT][2 * KT][32];        /* B of mma (j, low or high nibbles), by lane */
    uint2 centroid[NT][2][2 * KT][32]; /* digits 3 and 2, then 1 and 0 */
    int4 start[NT][4];                 /* accumulators: low nibbles' halves, then the high's */
    float2 factor[NT][4];              /* of a_t x 16 dot, and of q'.mu: logits to base 2 */
};

/* A head in a warp's registers as it stands in memory: elements lane, lane + 32, .. */
template <int KT> struct head_bits {
    uint32_t x[2 * KT];
};

/* Head g of a unit whose heads stand at q; one that is not there, or a unit without q, is zero. */
template <int KT>
__device__ head_bits<KT> head_load(const winnow_gpu_view &view, const void *q, uint32_t g)
{
    uint32_t first = g * view.k_width;
    head_bits<KT> to;

#pragma unroll
    for (int i = 0; i < 2 * KT; i++) {
        uint32_t d = threadIdx.x % 32 + 32 * i;
        to.x[i] = 0;
        if (!q || d >= view.k_width || g >= view.n_group)
            continue;
        if (view.io_dtype == WINNOW_FP32)
            to.x[i] = ((const uint32_t *)q)[first + d];
        else
            to.x[i] = ((const uint16_t *)q)[first + d];
    }
    return to;
}

__device__ float bits_float(uint32_t dtype, uint32_t bits)
{
    if (dtype == WINNOW_FP16)
        return __half2float(__ushort_as_half((uint16_t)bits));
    return __uint_as_float(dtype == WINNOW_BF16 ? bits << 16 : bits);
}

__device__ int digit_take(int *x) /* x = 128 x' + digit, -64 <= digit < 64 */
{
    int digit = ((*x + 64) & 127) - 64;
    *x = (*x - digit) >> 7;
    return digit;
}

/* Element d of head g, as 15 and as 28 bits, to its places. */
template <int KT, int NT>
__device__ void query_store(query_operands<KT, NT> *query, uint32_t g, uint32_t d, int hi, int lo,
                            int x)
{
    uint32_t half = 32 * KT, low = d % half, column = g % 4 * 2;
    uint32_t byte = low % 32 / 16 * 4 + low % 4, lane = column * 4 + low % 16 / 4;
    int8_t *code = (int8_t *)query->code[g / 4][low / 32 * 2 + d / half];

    code[lane * 8 + byte] = (int8_t)hi;
    code[(lane + 4) * 8 + byte] = (int8_t)lo;
    lane = column * 4 + d % 64 / 16;
    byte = d % 8;
    for (int tile = 1; tile >= 0; tile--) {
        int8_t *centroid = (int8_t *)query->centroid[g / 4][tile][d / 64 * 2 + d % 16 / 8];
        centroid[(lane + 4) * 8 + byte] = (int8_t)digit_take(&x);
        centroid[lane * 8 + byte] = (int8_t)(tile == 1 ? digit_take(&x) : x);
    }
}

/* Head g of a unit by one warp. */
template <int KT, int NT>
__device__ void query_prepare(const winnow_gpu_view &view, const head_bits<KT> &head, uint32_t g,
                              query_operands<KT, NT> *query)
{
    constexpr int N = 2 * KT; /* elements of a lane */
    uint32_t lane = threadIdx.x % 32;
    float x[N], largest = 0, bad = 0;
    int sum[4] = {0, 0, 0, 0};

    for (int i = 0; i < N; i++) {
        x[i] = bits_float(view.io_dtype, head.x[i]);
        largest = fmaxf(largest, fabsf(x[i]));
        bad += x[i] - x[i]; /* NaN for what is not finite */
    }
    for (int at = 16; at; at >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, at));
        bad += __shfl_xor_sync(~0u, bad, at);
    }
    float scale = __fdiv_rn(largest, QUERY_LARGEST);
    int exponent = largest > 0 ? ilogbf(largest) : 0;
    for (int i = 0; i < N; i++) {
        float part = scale > 0 ? __fdiv_rn(x[i], scale) : 0;
        int lo = (int)rintf(fminf(fmaxf(part, -QUERY_LARGEST), QUERY_LARGEST)), hi, low;
        hi = lo;
        low = digit_take(&hi);
        query_store(query, g, lane + 32 * i, hi, low, (int)rintf(scalbnf(x[i], 26 - exponent)));
        sum[i < KT ? 0 : 2] += hi;
        sum[i < KT ? 1 : 3] += low;
    }
    for (int i = 0; i < 4; i++)
        sum[i] = __reduce_add_sync(~0u, sum[i]) * (i < 2 ? -8 : -128);
    if (lane == 0) {
        float base2 = __fmul_rn(view.softmax_scale, LOG2_E);
        query->start[g / 4][g % 4] = make_int4(sum[0], sum[1], sum[2], sum[3]);
        query->factor[g / 4][g % 4] = make_float2(__fmul_rn(__fmul_rn(base2, scale), 0.0625f),
                                                  __fmul_rn(scalbnf(base2, exponent), 1 + bad));
    }
}

} // namespace
