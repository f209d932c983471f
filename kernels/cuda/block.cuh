/*
 * A group: up to eight blocks attended by a thread block, a warp a block, and joined in list order
 * to one partial. Shared memory holds what the warps made: {m, l, o} of every block and head.
 */
#pragma once

#include <float.h>
#include <kernels/cuda/fragment.cuh>

template <class F> struct group_memory {
    float o[GROUP][F::HEADS][F::STRIDE];
    float m[GROUP][F::HEADS], l[GROUP][F::HEADS]; /* m -inf: nothing there, o is 0 */
};

/* A block in a warp's registers: tiles that the shape has not are 0. */
template <class F> struct block_registers {
    uint4 k[F::TILES], v[F::TILES];
};

template <class F>
__device__ inline void block_load(const winnow_gpu_view &view, const uint8_t *block,
                                  block_registers<F> &x)
{
    const uint4 *at = (const uint4 *)block + lane_id();
    uint32_t n_k = view.k_width / 16, n_v = view.v_width / 16;

#pragma unroll
    for (int j = 0; j < F::TILES; j++)
        x.k[j] = load_if(j < n_k, at + 32 * j);
#pragma unroll
    for (int j = 0; j < F::TILES; j++)
        x.v[j] = load_if(j < n_v, at + 32 * (n_k + j));
}

/* Of a query that earlier kernels wrote, or (IS_OWN) this thread block, into shared memory. */
template <bool IS_OWN, class T> __device__ inline T query_load(const T *at)
{
    if constexpr (IS_OWN)
        return *at;
    else
        return __ldg(at);
}

/* A lane's logits of tokens r and r + 8 (token): raw products, unscaled. */
template <class F, bool IS_OWN = false>
__device__ inline void block_products(const winnow_gpu_view &view, const block_registers<F> &x,
                                      const uint2 *q, float (&s)[2][F::PER_LANE])
{
    float sum[2][F::SUMS][4] = {}; /* two chains: a product waits for its sum */
    uint32_t n_tiles = view.k_width / 16;

#pragma unroll
    for (int j = 0; j < F::TILES; j++)
#pragma unroll
        for (int part = 0; part < F::PARTS; part++) {
            uint2 b = {0, 0};
            if (j < n_tiles)
                b = query_load<IS_OWN>(q + (j * F::PARTS + part) * 32 + lane_id());
            mma<F::DTYPE>(sum[j % 2][part / 2], x.k[j], b);
        }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++) {
            if constexpr (F::HEADS == 4)
                s[half][i] = (sum[0][0][2 * half] + sum[1][0][2 * half]) +
                             (sum[0][0][2 * half + 1] + sum[1][0][2 * half + 1]);
            else
                s[half][i] = sum[0][i / 2][2 * half + i % 2] + sum[1][i / 2][2 * half + i % 2];
        }
}

/* Over the lanes of one c: the 16 tokens of a head. */
__device__ inline float tokens_max(float x)
{
    for (int offset = 4; offset < 32; offset *= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

__device__ inline float tokens_sum(float x)
{
    for (int offset = 4; offset < 32; offset *= 2)
        x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

/* Logits to weights relative to the block's largest; every lane of a head gets its m and l. */
template <class F, bool IS_OWN = false>
__device__ inline void block_weights(const float *logit_scale, uint32_t n_group, uint32_t n_tokens,
                                     float (&s)[2][F::PER_LANE], float (&m)[F::PER_LANE],
                                     float (&l)[F::PER_LANE])
{
    uint32_t lane = lane_id();

#pragma unroll
    for (int i = 0; i < F::PER_LANE; i++) {
        uint32_t g = lane_head<F>(lane, i);
        float scale = g < n_group ? query_load<IS_OWN>(logit_scale + g) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = fminf(fmaxf(scale * s[half][i], -FLT_MAX), FLT_MAX);
            s[half][i] = lane / 4 + 8 * half < n_tokens ? x : -INFINITY;
        }
        m[i] = tokens_max(fmaxf(s[0][i], s[1][i]));
        s[0][i] = exp_or_0(s[0][i] - m[i]);
        s[1][i] = exp_or_0(s[1][i] - m[i]);
        l[i] = tokens_sum(s[0][i] + s[1][i]);
    }
}

/* Of a part-filled block: the values of tokens that are not there count as 0, whatever they are. */
template <class F> __device__ inline void block_mask(uint32_t n_tokens, block_registers<F> &x)
{
    uint32_t mask[2];

    for (int half = 0; half < 2; half++) {
        uint32_t t = 2 * (lane_id() % 4) + 8 * half;
        mask[half] = (t < n_tokens ? 0xffffu : 0) | (t + 1 < n_tokens ? 0xffff0000u : 0);
    }
#pragma unroll
    for (int j = 0; j < F::TILES; j++) {
        x.v[j].x &= mask[0];
        x.v[j].y &= mask[0];
        x.v[j].z &= mask[1];
        x.v[j].w &= mask[1];
    }
}

/* o [heads][STRIDE] = P V. p are a lane's weights, as block_weights leaves them. */
template <class F>
__device__ inline void block_outputs(const winnow_gpu_view &view, const block_registers<F> &x,
                                     const float (&p)[2][F::PER_LANE], float (*o)[F::STRIDE])
{
    uint32_t lane = lane_id(), n_tiles = view.v_width / 16;
    uint2 b[F::PARTS];

#pragma unroll
    for (int sum = 0; sum < F::SUMS; sum++) {
        if constexpr (F::HEADS == 4) {
            b[0].x = turn(pack<F::DTYPE>(p[0][0], rest_of<F::DTYPE>(p[0][0])));
            b[0].y = turn(pack<F::DTYPE>(p[1][0], rest_of<F::DTYPE>(p[1][0])));
        } else {
            const float *p0 = &p[0][2 * sum], *p1 = &p[1][2 * sum];
            b[2 * sum].x = turn(pack<F::DTYPE>(p0[0], p0[1]));
            b[2 * sum].y = turn(pack<F::DTYPE>(p1[0], p1[1]));
            b[2 * sum + 1].x =
                turn(pack<F::DTYPE>(rest_of<F::DTYPE>(p0[0]), rest_of<F::DTYPE>(p0[1])));
            b[2 * sum + 1].y =
                turn(pack<F::DTYPE>(rest_of<F::DTYPE>(p1[0]), rest_of<F::DTYPE>(p1[1])));
        }
    }
#pragma unroll
    for (int j = 0; j < F::TILES; j++) {
        if (j >= n_tiles)
            break;
        float sum[F::SUMS][4] = {};
#pragma unroll
        for (int part = 0; part < F::PARTS; part++)
            mma<F::DTYPE>(sum[part / 2], x.v[j], b[part]);
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float y = F::HEADS == 4 ? sum[0][2 * half] + sum[0][2 * half + 1]
                                        : sum[i / 2][2 * half + i % 2];
                o[lane_head<F>(lane, i)][16 * j + lane / 4 + 8 * half] = y;
            }
    }
}

/* Attends the block in x; ln_m gets the ln of its mass, of the lane's heads. */
template <class F, bool IS_OWN = false>
__device__ inline void block_attend(const winnow_gpu_view &view, const float *logit_scale,
                                    const uint2 *q, uint32_t n_tokens, block_registers<F> &x,
                                    group_memory<F> *memory, float (&ln_m)[F::PER_LANE])
{
    uint32_t lane = lane_id(), warp = threadIdx.x / 32;
    float s[2][F::PER_LANE], m[F::PER_LANE], l[F::PER_LANE];

    block_products<F, IS_OWN>(view, x, q, s);
    block_weights<F, IS_OWN>(logit_scale, view.n_group, n_tokens, s, m, l);
    if (n_tokens < WINNOW_BLOCK_TOKENS)
        block_mask<F>(n_tokens, x);
    block_outputs<F>(view, x, s, memory->o[warp]);
#pragma unroll
    for (int i = 0; i < F::PER_LANE; i++) {
        ln_m[i] = m[i] + logf(l[i]);
        if (lane < 4) {
            memory->m[warp][lane_head<F>(lane, i)] = m[i];
            memory->l[warp][lane_head<F>(lane, i)] = l[i];
        }
    }
}

/* A warp without a block. */
template <class F> __device__ inline void block_absent(group_memory<F> *memory)
{
    uint32_t warp = threadIdx.x / 32;

    if (lane_id() < F::HEADS) {
        memory->m[warp][lane_id()] = -INFINITY;
        memory->l[warp][lane_id()] = 0;
    }
#pragma unroll 1
    for (uint32_t i = lane_id(); i < F::HEADS * F::STRIDE; i += 32)
        memory->o[warp][0][i] = 0;
}

/* Joins what the eight warps left, in their order, behind the partial `before` (NULL: nothing) and
 * stores it as a partial, another one. Between barriers. */
template <class F>
__device__ inline void group_join(const winnow_gpu_view &view, const group_memory<F> *memory,
                                  bool is_read, const float *before, float *partial)
{
    uint32_t n_pairs = view.v_width / 2;

#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < view.n_group * n_pairs; i += ATTEND_THREADS) {
        uint32_t g = i / n_pairs, d = 2 * (i % n_pairs);
        float m[GROUP], largest = -INFINITY, l = 0;
        float2 o = {0, 0};
        float4 mass = {-INFINITY, 0, 0, 0};
        if (before) {
            mass = *(const float4 *)(before + 4 * g);
            o = *(const float2 *)(before + winnow_gpu_partial_at(&view) + g * view.v_width + d);
            largest = mass.x;
        }
#pragma unroll
        for (int b = 0; b < GROUP; b++) {
            m[b] = memory->m[b][g];
            largest = fmaxf(largest, m[b]);
        }
        float from = largest == -INFINITY ? 0 : largest;
        if (before) {
            float w = exp_or_0(mass.x - from);
            mass.y *= w;
            o = {w * o.x, w * o.y};
        }
#pragma unroll
        for (int b = 0; b < GROUP; b++) {
            float w = exp_or_0(m[b] - from);
            float2 x = *(const float2 *)&memory->o[b][g][d];
            l += w * memory->l[b][g];
            o.x += w * x.x;
            o.y += w * x.y;
        }
        *(float2 *)(partial + winnow_gpu_partial_at(&view) + g * view.v_width + d) = o;
        if (d == 0)
            *(float4 *)(partial + 4 * g) = {largest, mass.y + (is_read ? l : 0), is_read ? 0 : l,
                                            0};
    }
}
