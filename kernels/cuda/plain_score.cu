/*
 * Score, plain: a thread block a block of 16 tokens, a thread a token and query head. The stage
 * `scan` computes the same from codes in load order; this one reads kernels.h's layout and knows
 * every policy.
 */
#include <kernels/cuda/plain.cuh>

namespace
{
constexpr float QUERY_LARGEST = 16256;

/* q to 15 bits a head, by the 16 threads that share it. */
__device__ float query_scale(uint32_t width, const float *q)
{
    float largest = 0;
    for (uint32_t d = 0; d < width; d++)
        largest = fmaxf(largest, fabsf(q[d]));
    return largest / QUERY_LARGEST;
}

__device__ int32_t query_int(float x, float scale)
{
    x = fminf(fmaxf(x / scale, -QUERY_LARGEST), QUERY_LARGEST);
    return scale > 0 ? (int32_t)rintf(x) : 0;
}

__device__ float centroid_dot(uint32_t width, const struct winnow_index_view &view, uint32_t b,
                              const float *q)
{
    const int8_t *centroid = view.centroid + (size_t)b * width;
    float sum = 0;

    for (uint32_t d = 0; d < width; d++)
        sum += q[d] * (float)centroid[d];
    return sum * view.head[b].centroid_scale;
}

/* ln e_b = ln sum over t of exp(s (q.mu_b + a_t q.c_t)) */
__global__ void score_codes(struct winnow_model_shape shape, struct winnow_index_view view,
                            const float *q_all, float *ln_e)
{
    __shared__ float logit[WINNOW_GQA_MAX][16];
    uint32_t b = blockIdx.x, t = threadIdx.x, g = threadIdx.y, width = shape.k_width;
    const float *q = q_all + g * width;
    const uint8_t *code = view.code + (size_t)b * 8 * width;
    float scale = query_scale(width, q), q_mu = centroid_dot(width, view, b, q);
    int32_t dot = 0;

    for (uint32_t d = 0; d < width; d++) {
        uint8_t pair = code[(d / 8 * 16 + t) * 4 + d % 4];
        dot += ((d % 8 < 4 ? pair & 15 : pair >> 4) - 8) * query_int(q[d], scale);
    }
    float a = fp16_to_float(view.code_scale[16 * (size_t)b + t]);
    logit[g][t] = shape.softmax_scale * (q_mu + a * scale * (float)dot);
    __syncthreads();
    if (t > 0)
        return;
    float largest = -INFINITY, sum = 0;
    for (uint32_t i = 0; i < 16; i++)
        largest = fmaxf(largest, logit[g][i]);
    for (uint32_t i = 0; i < 16; i++)
        sum += exp_or_0(logit[g][i] - largest);
    ln_e[(size_t)b * blockDim.y + g] = largest + logf(sum);
}

/* s q.mu + ln 16, and for `moment` min(s^2 / 2 x variance of q.k in the block, 2). */
__global__ void score_centroids(struct winnow_model_shape shape, uint32_t policy,
                                struct winnow_index_view view, const float *q_all, float *ln_e)
{
    uint32_t b = blockIdx.x, g = threadIdx.x, width = shape.k_width;
    const float *q = q_all + g * width;
    float s = shape.softmax_scale, variance = 0, square = 0;
    float ln = s * centroid_dot(width, view, b, q);

    for (uint32_t d = 0; d < width; d++) {
        square += q[d] * q[d];
        if (view.var)
            variance += q[d] * q[d] * fp16_to_float(view.var[(size_t)b * width + d]);
    }
    if (!view.var)
        variance = view.head[b].spread * square;
    if (policy == WINNOW_POLICY_MOMENT)
        ln += fminf(s * s / 2 * variance, 2.0f);
    ln_e[(size_t)b * blockDim.x + g] = ln + logf(16.0f);
}
} /* namespace */

cudaError_t winnow_gpu_score(const struct winnow_model_shape *shape, uint32_t policy,
                             const struct winnow_index_view *view, const float *q, float *ln_e,
                             cudaStream_t stream)
{
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads;

    if (view->n_blocks == 0)
        return cudaSuccess;
    if (policy == WINNOW_POLICY_CODES)
        score_codes<<<view->n_blocks, dim3(16, n_q), 0, stream>>>(*shape, *view, q, ln_e);
    else
        score_centroids<<<view->n_blocks, n_q, 0, stream>>>(*shape, policy, *view, q, ln_e);
    return cudaGetLastError();
}
