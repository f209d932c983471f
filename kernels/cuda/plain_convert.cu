/* Numbers in and out, tokens into blocks and out of them: a thread an element. */
#include <kernels/cuda/plain.cuh>

namespace
{
__device__ bool is_finite(float x)
{
    return fabsf(x) < INFINITY;
}

__global__ void widen(uint32_t dtype, size_t n, const void *src, float *dst, uint32_t *is_bad)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    dst[i] = element_load(dtype, src, i);
    if (!is_finite(dst[i]))
        *is_bad = 1;
}

__global__ void narrow(uint32_t dtype, size_t n, const float *src, void *dst, uint32_t *is_bad)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    float x = src[i];
    if (dtype == WINNOW_FP32)
        ((float *)dst)[i] = x;
    else
        ((uint16_t *)dst)[i] = dtype == WINNOW_FP16 ? float_to_fp16(x) : float_to_bf16(x);
    if (!is_finite(x) || !is_finite(element_load(dtype, dst, i)))
        *is_bad = 1;
}

__device__ void store_saturated(uint32_t dtype, float x, void *dst, size_t idx)
{
    const float largest = dtype == WINNOW_FP16 ? 65504.0f : 0x1.fep127f;

    if (dtype == WINNOW_FP32) {
        ((float *)dst)[idx] = x;
        return;
    }
    x = fmaxf(fminf(x, largest), -largest);
    ((uint16_t *)dst)[idx] = dtype == WINNOW_FP16 ? float_to_fp16(x) : float_to_bf16(x);
}

/* Thread block: a token. */
__global__ void block_pack(struct winnow_model_shape shape, uint32_t first, const float *k,
                           const float *v, void *block)
{
    uint32_t t = blockIdx.x, d = threadIdx.x;

    if (d < shape.k_width)
        store_saturated(shape.kv_dtype, k[t * shape.k_width + d], block, k_at(shape, first + t, d));
    if (d < shape.v_width)
        store_saturated(shape.kv_dtype, v[t * shape.v_width + d], block, v_at(shape, first + t, d));
}

__global__ void block_unpack(struct winnow_model_shape shape, const void *block, float *k, float *v)
{
    uint32_t t = blockIdx.x, d = threadIdx.x;

    if (d < shape.k_width)
        k[t * shape.k_width + d] = element_load(shape.kv_dtype, block, k_at(shape, t, d));
    if (d < shape.v_width)
        v[t * shape.v_width + d] = element_load(shape.kv_dtype, block, v_at(shape, t, d));
}

unsigned grid_of(size_t n)
{
    return (unsigned)((n + N_THREADS - 1) / N_THREADS);
}
} /* namespace */

cudaError_t winnow_gpu_widen(uint32_t dtype, size_t n, const void *src, float *dst,
                             uint32_t *is_bad, cudaStream_t stream)
{
    if (n > 0)
        widen<<<grid_of(n), N_THREADS, 0, stream>>>(dtype, n, src, dst, is_bad);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_narrow(uint32_t dtype, size_t n, const float *src, void *dst,
                              uint32_t *is_bad, cudaStream_t stream)
{
    if (n > 0)
        narrow<<<grid_of(n), N_THREADS, 0, stream>>>(dtype, n, src, dst, is_bad);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_block_pack(const struct winnow_model_shape *shape, uint32_t first,
                                  uint32_t n, const float *k, const float *v, void *block,
                                  cudaStream_t stream)
{
    if (n > 0)
        block_pack<<<n, WINNOW_WIDTH_MAX, 0, stream>>>(*shape, first, k, v, block);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_block_unpack(const struct winnow_model_shape *shape, const void *block,
                                    float *k, float *v, cudaStream_t stream)
{
    block_unpack<<<WINNOW_BLOCK_TOKENS, WINNOW_WIDTH_MAX, 0, stream>>>(*shape, block, k, v);
    return cudaGetLastError();
}
