/*
 * Attention and the joining of partials, plain: a warp a query. Lane t holds the logit of token t,
 * lane i the outputs i, i + 32, ...; both are added in ref's order.
 */
#include <float.h>
#include <kernels/cuda/plain.cuh>

namespace
{
constexpr uint32_t N_LANE_OUT = WINNOW_WIDTH_MAX / 32;

struct accumulator {
    float m, l, o[N_LANE_OUT];
};

__device__ void accumulator_raise(struct accumulator &acc, float m)
{
    if (!(m > acc.m))
        return;
    float scale = exp_or_0(acc.m - m);
    acc.m = m;
    acc.l *= scale;
    for (uint32_t i = 0; i < N_LANE_OUT; i++)
        acc.o[i] *= scale;
}

__device__ void accumulator_load(struct accumulator &acc, uint32_t v_width, const float *partial)
{
    acc.m = partial[0];
    acc.l = partial[1];
    for (uint32_t i = 0; i < N_LANE_OUT; i++) {
        uint32_t d = threadIdx.x + 32 * i;
        acc.o[i] = d < v_width ? partial[2 + d] : 0;
    }
}

__device__ void accumulator_store(const struct accumulator &acc, uint32_t v_width, float *partial)
{
    __syncwarp();
    if (threadIdx.x == 0) {
        partial[0] = acc.m;
        partial[1] = acc.l;
    }
    for (uint32_t i = 0; i < N_LANE_OUT; i++) {
        uint32_t d = threadIdx.x + 32 * i;
        if (d < v_width)
            partial[2 + d] = acc.o[i];
    }
}

__device__ float logit_of(const struct winnow_model_shape &shape, const float *q, const void *block,
                          uint32_t t)
{
    float sum = 0;
    for (uint32_t d = 0; d < shape.k_width; d++)
        sum += q[d] * element_load(shape.kv_dtype, block, k_at(shape, t, d));
    return fminf(fmaxf(shape.softmax_scale * sum, -FLT_MAX), FLT_MAX);
}

/* Takes the first n > 0 tokens of a block in; returns ln of their mass. */
__device__ float absorb(const struct winnow_model_shape &shape, const float *q, const void *block,
                        uint32_t n, struct accumulator &acc)
{
    uint32_t lane = threadIdx.x;
    float l = lane < n ? logit_of(shape, q, block, lane) : -INFINITY, largest = l, block_sum = 0;

    for (int offset = 16; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    accumulator_raise(acc, largest);
    float e = exp_or_0(l - largest), p = exp_or_0(l - acc.m);
    for (uint32_t t = 0; t < n; t++) {
        float p_t = __shfl_sync(~0u, p, t);
        block_sum += __shfl_sync(~0u, e, t);
        acc.l += p_t;
        for (uint32_t i = 0; i < N_LANE_OUT; i++) {
            uint32_t d = lane + 32 * i;
            if (d < shape.v_width)
                acc.o[i] += p_t * element_load(shape.kv_dtype, block, v_at(shape, t, d));
        }
    }
    return largest + logf(block_sum);
}

/* Thread block: a query head. */
__global__ void attend_partial(struct winnow_model_shape shape, uint32_t block_bytes,
                               const float *q, uint32_t n, const uint8_t *blocks,
                               const uint32_t *n_tokens, float *partial, float *ln_m)
{
    uint32_t g = blockIdx.x;
    struct accumulator acc = {-INFINITY, 0, {}};

    for (uint32_t i = 0; i < n; i++) {
        float ln = absorb(shape, q + g * shape.k_width, blocks + (size_t)i * block_bytes,
                          n_tokens[i], acc);
        if (ln_m && threadIdx.x == 0)
            ln_m[i * gridDim.x + g] = ln;
    }
    accumulator_store(acc, shape.v_width, partial + (size_t)g * (shape.v_width + 2));
}

/* How many of a block's tokens a query at `at` sees. */
__device__ uint32_t n_visible(uint64_t position, uint32_t n_tokens, uint64_t at)
{
    if (position == UINT64_MAX)
        return n_tokens;
    if (position > at)
        return 0;
    return at - position + 1 < n_tokens ? (uint32_t)(at - position + 1) : n_tokens;
}

/* Thread block: a query head of a position. */
__global__ void attend_window(struct winnow_model_shape shape, uint32_t block_bytes, uint64_t first,
                              const float *q, uint32_t n, const uint8_t *blocks,
                              const uint64_t *position, const uint32_t *n_tokens, float *partial)
{
    size_t row = blockIdx.x;
    uint64_t at = first + row / (shape.n_q_heads / shape.n_kv_heads);
    struct accumulator acc;

    partial += row * (shape.v_width + 2);
    accumulator_load(acc, shape.v_width, partial);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t n_seen = n_visible(position[i], n_tokens[i], at);
        if (n_seen > 0)
            absorb(shape, q + row * shape.k_width, blocks + (size_t)i * block_bytes, n_seen, acc);
    }
    accumulator_store(acc, shape.v_width, partial);
}

/* Thread block: a query head. Unselected blocks by their estimate, near ones by their mean. */
__global__ void compensate(struct winnow_model_shape shape, struct winnow_index_view view,
                           struct winnow_selection sel, float near, float *partial)
{
    uint32_t g = blockIdx.x, v_width = shape.v_width;
    const float *ln_e = sel.ln_e + g;
    struct accumulator acc;
    float largest = -INFINITY, far_sum = 0;

    partial += (size_t)g * (v_width + 2);
    for (uint32_t b = 0; b < view.n_blocks; b++)
        if (!sel.selected[b] && is_known(ln_e[(size_t)b * sel.n_q]))
            largest = fmaxf(largest, ln_e[(size_t)b * sel.n_q]);
    if (largest == -INFINITY)
        return;
    accumulator_load(acc, v_width, partial);
    accumulator_raise(acc, largest);
    for (uint32_t b = 0; b < view.n_blocks; b++) {
        if (sel.selected[b] || !is_known(ln_e[(size_t)b * sel.n_q]))
            continue;
        float e = exp_or_0(ln_e[(size_t)b * sel.n_q] - acc.m);
        bool is_far = sel.ln_key[b] < near;
        acc.l += e;
        far_sum += is_far ? e : 0;
        for (uint32_t i = 0; i < N_LANE_OUT && !is_far; i++) {
            uint32_t d = threadIdx.x + 32 * i;
            if (d < v_width)
                acc.o[i] +=
                    e * view.head[b].vmean_scale * (float)view.vmean[(size_t)b * v_width + d];
        }
    }
    for (uint32_t i = 0; i < N_LANE_OUT; i++) {
        uint32_t d = threadIdx.x + 32 * i;
        if (d < v_width)
            acc.o[i] += far_sum * view.mean_v[d];
    }
    accumulator_store(acc, v_width, partial);
}

/* Thread block: a query head. */
__global__ void merge(uint32_t v_width, uint32_t n, const float *partial, float *acc_at)
{
    uint32_t g = blockIdx.x, stride = v_width + 2;
    struct accumulator acc, part;

    accumulator_load(acc, v_width, acc_at + g * stride);
    for (uint32_t i = 0; i < n; i++) {
        accumulator_load(part, v_width, partial + ((size_t)i * gridDim.x + g) * stride);
        if (part.m == -INFINITY)
            continue;
        accumulator_raise(acc, part.m);
        float scale = exp_or_0(part.m - acc.m);
        acc.l += scale * part.l;
        for (uint32_t j = 0; j < N_LANE_OUT; j++)
            acc.o[j] += scale * part.o[j];
    }
    accumulator_store(acc, v_width, acc_at + g * stride);
}

__global__ void finish(uint32_t v_width, const float *acc_at, float *out, float *lse)
{
    uint32_t g = blockIdx.x;
    struct accumulator acc;

    accumulator_load(acc, v_width, acc_at + g * (v_width + 2));
    if (threadIdx.x == 0)
        lse[g] = acc.l > 0 ? acc.m + logf(acc.l) : -INFINITY;
    for (uint32_t i = 0; i < N_LANE_OUT; i++) {
        uint32_t d = threadIdx.x + 32 * i;
        if (d < v_width)
            out[g * v_width + d] = acc.l > 0 ? acc.o[i] / acc.l : 0;
    }
}

uint32_t group_heads(const struct winnow_model_shape *shape)
{
    return shape->n_q_heads / shape->n_kv_heads;
}
} /* namespace */

cudaError_t winnow_gpu_attend_partial(const struct winnow_model_shape *shape, const float *q,
                                      uint32_t n, const void *blocks, const uint32_t *n_tokens,
                                      float *partial, float *ln_m, cudaStream_t stream)
{
    attend_partial<<<group_heads(shape), 32, 0, stream>>>(
        *shape, winnow_block_bytes(shape), q, n, (const uint8_t *)blocks, n_tokens, partial, ln_m);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_attend_window(const struct winnow_model_shape *shape, uint32_t n_pos,
                                     uint64_t first, const float *q, uint32_t n, const void *blocks,
                                     const uint64_t *position, const uint32_t *n_tokens,
                                     float *partial, cudaStream_t stream)
{
    if (n_pos > 0)
        attend_window<<<n_pos * group_heads(shape), 32, 0, stream>>>(
            *shape, winnow_block_bytes(shape), first, q, n, (const uint8_t *)blocks, position,
            n_tokens, partial);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_compensate(const struct winnow_model_shape *shape,
                                  const struct winnow_index_view *view,
                                  const struct winnow_selection *sel, float near, float *partial,
                                  cudaStream_t stream)
{
    compensate<<<sel->n_q, 32, 0, stream>>>(*shape, *view, *sel, near, partial);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_merge(const struct winnow_model_shape *shape, uint32_t n,
                             const float *partial, float *acc, cudaStream_t stream)
{
    merge<<<group_heads(shape), 32, 0, stream>>>(shape->v_width, n, partial, acc);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_finish(const struct winnow_model_shape *shape, const float *acc, float *out,
                              float *lse, cudaStream_t stream)
{
    finish<<<group_heads(shape), 32, 0, stream>>>(shape->v_width, acc, out, lse);
    return cudaGetLastError();
}
