/*
 * The peer in device memory: dense attention over all blocks, with the matrix instructions and the
 * block layout of Winnow's kernels, the blocks of a unit split over thread blocks and joined by the
 * last. A warp loads its next block while it works on this one; joins are once a split, not once a
 * group, so that memory alone bounds it.
 */
#pragma once

#include "card.cuh"

#include <kernels/cuda/work.cuh>

struct dense {
    const uint8_t *blocks; /* [unit][n_blocks] */
    uint32_t n_blocks;     /* of a unit */
    float *partial;        /* [unit][split] of winnow_gpu_partial_floats */
    uint32_t *n_done;      /* [unit], 0 */
    float *out;            /* [unit][G][width] */
};

template <class F> struct dense_state { /* of a warp */
    float o[F::TILES][4], m, l;
};

/* One block more; x is loaded anew from next meanwhile (NULL: there is none). */
template <class F>
__device__ inline void dense_block(const winnow_gpu_view &view, const float *logit_scale,
                                   const uint2 *q, const uint4 *next, block_registers<F> &x,
                                   dense_state<F> *state)
{
    float s[2][1], block_m[1], block_l[1];

    block_products<F>(view, x, q, s);
#pragma unroll
    for (int j = 0; j < F::TILES; j++)
        if (next)
            x.k[j] = __ldcs(next + 32 * j);
    block_weights<F>(logit_scale, F::HEADS, WINNOW_BLOCK_TOKENS, s, block_m, block_l);
    float largest = fmaxf(state->m, block_m[0]);
    float shrink = exp_or_0(state->m - largest), weight = exp_or_0(block_m[0] - largest);
    state->l = state->l * shrink + block_l[0] * weight;
    state->m = largest;
    float p0 = s[0][0] * weight, p1 = s[1][0] * weight;
    uint2 p = {turn(pack<F::DTYPE>(p0, rest_of<F::DTYPE>(p0))),
               turn(pack<F::DTYPE>(p1, rest_of<F::DTYPE>(p1)))};
#pragma unroll
    for (int j = 0; j < F::TILES; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            state->o[j][i] *= shrink;
        mma<F::DTYPE>(state->o[j], x.v[j], p);
        if (next)
            x.v[j] = __ldcs(next + 32 * (F::TILES + j));
    }
}

template <class F>
__device__ inline void dense_store(const dense_state<F> &state, group_memory<F> *memory)
{
    uint32_t lane = lane_id(), warp = threadIdx.x / 32;

    if (state.m == -INFINITY) {
        block_absent<F>(memory);
        return;
    }
#pragma unroll
    for (int j = 0; j < F::TILES; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            memory->o[warp][lane % 4][16 * j + lane / 4 + 8 * half] =
                state.o[j][2 * half] + state.o[j][2 * half + 1];
    if (lane < 4) {
        memory->m[warp][lane] = state.m;
        memory->l[warp][lane] = state.l;
    }
}

template <class F>
__device__ inline void dense_join(const winnow_gpu_view &view, const float *partial,
                                  uint32_t n_splits, float *out)
{
    uint32_t stride = winnow_gpu_partial_floats(&view), at_output = winnow_gpu_partial_at(&view);

    for (uint32_t i = threadIdx.x; i < F::HEADS * view.v_width; i += ATTEND_THREADS) {
        const float *at = partial + 4 * (i / view.v_width);
        float largest = -INFINITY, sum = 0, y = 0;
        for (uint32_t k = 0; k < n_splits; k++)
            largest = fmaxf(largest, __ldcg(at + k * stride));
#pragma unroll 8
        for (uint32_t k = 0; k < n_splits; k++) {
            float w = exp_or_0(__ldcg(at + k * stride) - largest);
            sum += w * __ldcg(at + k * stride + 1);
            y += w * __ldcg(partial + k * stride + at_output + i);
        }
        out[i] = y / sum;
    }
}

/* Four query heads a unit, widths alike. Grid: units x splits. */
template <class F, int PER_SM>
__global__ void __launch_bounds__(ATTEND_THREADS, PER_SM)
    dense_kernel(const __grid_constant__ winnow_gpu_view view, const dense d)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    group_memory<F> *memory = (group_memory<F> *)dynamic;
    __shared__ uint32_t is_last;
    uint32_t unit = blockIdx.x;
    uint32_t n_split = (d.n_blocks + gridDim.y - 1) / gridDim.y, first = blockIdx.y * n_split;
    uint32_t end = min(first + n_split, d.n_blocks), b = first + threadIdx.x / 32;
    const uint8_t *base = d.blocks + (size_t)unit * d.n_blocks * view.block_bytes;
    float *partial = d.partial + (size_t)unit * gridDim.y * winnow_gpu_partial_floats(&view);
    dense_state<F> state = {};
    block_registers<F> x;

    state.m = -INFINITY;
    if (b < end)
        block_load<F>(view, base + (size_t)b * view.block_bytes, x);
    for (; b < end; b += GROUP) {
        const uint8_t *next = base + (size_t)(b + GROUP) * view.block_bytes;
        dense_block<F>(view, view.unit[unit].logit_scale, unit_queries<F>(view, unit),
                       b + GROUP < end ? (const uint4 *)next + lane_id() : NULL, x, &state);
    }
    dense_store<F>(state, memory);
    __syncthreads();
    group_join<F>(view, memory, true, NULL,
                  partial + (size_t)blockIdx.y * winnow_gpu_partial_floats(&view));
    if (!count_done(d.n_done + unit, gridDim.y, &is_last))
        return;
    dense_join<F>(view, partial, gridDim.y, d.out + (size_t)unit * F::HEADS * view.v_width);
    if (threadIdx.x == 0)
        d.n_done[unit] = 0;
}

template <class F, int PER_SM> void dense_prepare()
{
    ok(cudaFuncSetAttribute(dense_kernel<F, PER_SM>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                            (int)sizeof(group_memory<F>)),
       "dense");
}

/* n_splits: at most what partial holds. */
template <class F, int PER_SM>
void dense_put(const winnow_gpu_view &view, const dense &d, uint32_t n_units, uint32_t n_splits,
               cudaStream_t stream)
{
    dense_kernel<F, PER_SM>
        <<<dim3(n_units, n_splits), ATTEND_THREADS, sizeof(group_memory<F>), stream>>>(view, d);
    ok(cudaGetLastError(), "dense");
}
