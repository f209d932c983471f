/*
 * The index on the device, as ref/index.c defines it: a thread block a block, and one a unit for
 * the means of a segment. Means, variances and lengths are fp64, as ref's.
 */
#include <float.h>
#include <kernels/cuda/build.h>
#include <kernels/cuda/plain.cuh>
#include <kernels/cuda/rows.cuh>

namespace
{
constexpr uint32_t WIDTH_MAX = WINNOW_WIDTH_MAX, N_WARPS = N_THREADS / 32;

__device__ float to_float(float x)
{
    return x;
}

__device__ float to_float(__half x)
{
    return __half2float(x);
}

__device__ float to_float(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

/* fp64 to the next fp32 that is not below it. */
__device__ float round_up(double x)
{
    return __double2float_ru(x);
}

__device__ int clamp_round(float x, int largest)
{
    float y = rintf(x);
    return y > (float)largest ? largest : y < (float)-largest ? -largest : (int)y;
}

/* x of this thread's dimension as int8 times the returned scale, absmax / 127. */
__device__ float quantise(float x, int8_t *ret)
{
    float scale = block_max(fabsf(x)) / 127.0f;
    *ret = scale > 0 ? (int8_t)clamp_round(x / scale, 127) : 0;
    return scale;
}

/* The tokens of one block, in shared memory. */
struct members {
    float k[16][WIDTH_MAX], v[16][WIDTH_MAX];
    float mu[WIDTH_MAX]; /* the stored centroid */
    double exact_mu[WIDTH_MAX], var[WIDTH_MAX], distance[16];
};

template <class T> __device__ void members_load(const winnow_gpu_build &build, members &members)
{
    const uint16_t *order = build.order + (size_t)blockIdx.y * 16 * build.index.n_blocks;
    size_t unit = (size_t)blockIdx.y * 16 * build.index.n_blocks;

    for (uint32_t t = threadIdx.x / 32; t < 16; t += N_WARPS) {
        size_t token = unit + order[16 * blockIdx.x + t];
        const T *k = (const T *)build.k + token * build.k_width;
        const T *v = (const T *)build.v + token * build.v_width;
        for (uint32_t d = threadIdx.x % 32; d < build.k_width; d += 32)
            members.k[t][d] = to_float(k[d]);
        for (uint32_t d = threadIdx.x % 32; d < build.v_width; d += 32)
            members.v[t][d] = to_float(v[d]);
    }
    __syncthreads();
}

/* Mean of dimension d of 16 rows; *var is their variance. */
__device__ double rows_mean(const float (*row)[WIDTH_MAX], uint32_t d, double *var)
{
    double sum = 0, square = 0;

    for (uint32_t i = 0; i < 16; i++)
        sum += (double)row[i][d];
    sum /= 16;
    for (uint32_t i = 0; i < 16; i++)
        square += ((double)row[i][d] - sum) * ((double)row[i][d] - sum);
    *var = square / 16;
    return sum;
}

__device__ double warp_sum(double x)
{
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

/* Of each row to y; NULL: to 0. A warp a row. */
__device__ void distances(const float (*row)[WIDTH_MAX], uint32_t width, const double *y,
                          double *distance)
{
    for (uint32_t t = threadIdx.x / 32; t < 16; t += N_WARPS) {
        double square = 0;
        for (uint32_t d = threadIdx.x % 32; d < width; d += 32) {
            double difference = (double)row[t][d] - (y ? y[d] : 0);
            square += difference * difference;
        }
        square = warp_sum(square);
        if (threadIdx.x % 32 == 0)
            distance[t] = sqrt(square);
    }
    __syncthreads();
}

/* The largest of distance [16]; every thread of the first warp gets it. */
__device__ double largest_of(const double *distance)
{
    double x = distance[threadIdx.x % 16];
    for (int offset = 8; offset > 0; offset /= 2)
        x = fmax(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

/* Codes of this warp's tokens: x = k - mu, a = max|x| / 7 as fp16, c = x / a rounded. */
__device__ void code_keys(const members &members, uint32_t width, uint8_t *code,
                          uint16_t *code_scale)
{
    uint32_t lane = threadIdx.x % 32;

    for (uint32_t t = threadIdx.x / 32; t < 16; t += N_WARPS) {
        const float *k = members.k[t];
        float largest = 0;
        for (uint32_t d = lane; d < width; d += 32)
            largest = fmaxf(largest, fabsf(k[d] - members.mu[d]));
        for (int offset = 16; offset > 0; offset /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        uint16_t a_bits = float_to_fp16(largest / 7.0f);
        float a = fp16_to_float(a_bits);
        bool is_codable = a > 0 && a < INFINITY;
        if (lane == 0)
            code_scale[t] = a_bits;
        for (uint32_t byte = lane; byte < width / 2; byte += 32) {
            uint32_t low = byte / 4 * 8 + byte % 4, high = low + 4;
            int c_low = is_codable ? clamp_round((k[low] - members.mu[low]) / a, 7) : 0;
            int c_high = is_codable ? clamp_round((k[high] - members.mu[high]) / a, 7) : 0;
            code[(byte / 4 * 16 + t) * 4 + byte % 4] = (uint8_t)((c_low + 8) | (c_high + 8) << 4);
        }
    }
}

__device__ void fill_keys(members &members, uint32_t width, size_t b, const winnow_index_view &view)
{
    uint32_t d = threadIdx.x;
    struct winnow_block_head *head = view.head + b;
    double mean = 0, spread = 0;
    int8_t q;

    if (d < width) {
        mean = rows_mean(members.k, d, &members.var[d]);
        if (view.var)
            view.var[b * width + d] = float_to_fp16((float)fmin(members.var[d], 65504.0));
    }
    float scale = quantise((float)mean, &q);
    if (d < width) {
        view.centroid[b * width + d] = q;
        members.mu[d] = (float)q * scale;
        members.exact_mu[d] = (double)q * (double)scale;
    }
    __syncthreads();
    distances(members.k, width, members.exact_mu, members.distance);
    code_keys(members, width, view.code + b * 8 * width, view.code_scale + 16 * b);
    if (d >= 32)
        return;
    for (uint32_t i = d; i < width; i += 32)
        spread += members.var[i];
    spread = warp_sum(spread);
    double radius = largest_of(members.distance);
    if (d > 0)
        return;
    head->centroid_scale = scale;
    head->spread = (float)fmin(spread / width, (double)FLT_MAX);
    head->radius = round_up(radius);
}

__device__ void fill_values(members &members, uint32_t width, size_t b,
                            const winnow_index_view &view)
{
    uint32_t d = threadIdx.x;
    double var, mean = d < width ? rows_mean(members.v, d, &var) : 0;
    int8_t q;
    float scale = quantise((float)mean, &q);

    if (d < width)
        view.vmean[b * width + d] = q;
    if (d == 0)
        view.head[b].vmean_scale = scale;
    distances(members.v, width, NULL, members.distance);
    if (d >= 32)
        return;
    double length = largest_of(members.distance);
    if (d == 0) /* lengths are positive: as integers they order as they do */
        atomicMax((unsigned *)view.v_max + blockIdx.y, __float_as_uint(round_up(length)));
}

/* Thread block (b, unit): a block of a unit. */
template <class T>
__global__ void __launch_bounds__(N_THREADS)
    index_fill(const __grid_constant__ winnow_gpu_build build)
{
    __shared__ struct members members;
    size_t b = (size_t)blockIdx.y * build.index.n_blocks + blockIdx.x;

    members_load<T>(build, members);
    fill_keys(members, build.k_width, b, build.index);
    __syncthreads();
    fill_values(members, build.v_width, b, build.index);
}

/* Thread block (unit, K or V): the mean of a segment. */
template <class T>
__global__ void __launch_bounds__(N_THREADS)
    segment_mean(const __grid_constant__ winnow_gpu_build build)
{
    __shared__ double part[N_WARPS * WIDTH_MAX], total[WIDTH_MAX];
    uint32_t width = blockIdx.y ? build.v_width : build.k_width;
    uint32_t n_tokens = 16 * build.index.n_blocks;
    const T *x =
        (const T *)(blockIdx.y ? build.v : build.k) + (size_t)blockIdx.x * n_tokens * width;
    float *mean = (blockIdx.y ? build.index.mean_v : build.index.mean_k) + blockIdx.x * width;
    row_place place = row_place_of(width);
    double sum[8] = {};

#pragma unroll 4
    for (uint32_t t = place.first; t < n_tokens && place.has_part; t += place.stride) {
        float of[8];
        row_widen(row_load(x + (size_t)t * width + 8 * place.part), of);
        for (int i = 0; i < 8; i++)
            sum[i] += (double)of[i];
    }
    row_columns(place, width, sum, part, total);
    if (threadIdx.x < width)
        mean[threadIdx.x] = (float)(total[threadIdx.x] / n_tokens);
}

template <class T> void index_launch(const winnow_gpu_build &build, cudaStream_t stream)
{
    segment_mean<T><<<dim3(build.n_units, 2), N_THREADS, 0, stream>>>(build);
    index_fill<T><<<dim3(build.index.n_blocks, build.n_units), N_THREADS, 0, stream>>>(build);
}
} /* namespace */

cudaError_t winnow_gpu_build_index(const struct winnow_gpu_build *build, cudaStream_t stream)
{
    cudaError_t error =
        cudaMemsetAsync(build->index.v_max, 0, build->n_units * sizeof(float), stream);

    if (error != cudaSuccess)
        return error;
    if (build->dtype == WINNOW_FP32)
        index_launch<float>(*build, stream);
    else if (build->dtype == WINNOW_FP16)
        index_launch<__half>(*build, stream);
    else
        index_launch<__nv_bfloat16>(*build, stream);
    return cudaGetLastError();
}
