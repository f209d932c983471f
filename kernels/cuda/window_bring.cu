/*
 * What a window's attention reads, brought where it reads it: queries into operand order, blocks from
 * the host arena to a stage.
 *
 * A block crosses the link once for all rows that see it, a warp a block, 512 contiguous bytes a
 * load, 4 KiB of each under way. The warps stand on few multiprocessors, whose registers they fill:
 * what attends the part before fills those of all others, twice over for 2,048 positions of Llama-3.1-8B,
 * and thread blocks that find no place come last (16 x 128 threads: 20.9 ms for 128K tokens, 4 x 1,024:
 * 18.8).
 */
#include <kernels/cuda/fragment.cuh>
#include <kernels/cuda/window.h>

namespace
{
constexpr uint32_t GATHER_BLOCKS = 4, GATHER_THREADS = 1024;
constexpr int TILES_AT_ONCE = 8;

__device__ float power_of_2(int exponent)
{
    return __uint_as_float((uint32_t)(127 + exponent) << 23);
}

/* The power of 2 by which a row is split. fp16: brings the largest number to 2^14 or above, so that
 * it holds the low half of all that matters. bf16: keeps the largest of fp32 from rounding to Inf. */
template <uint32_t DTYPE> __device__ int row_exponent(float largest)
{
    uint32_t bits = __float_as_uint(largest);

    if (DTYPE == WINNOW_BF16)
        return bits >> 23 == 254 ? -1 : 0;
    return bits > 0 ? min(max(14 + 127 - (int)(bits >> 23), -126), 126) : 0;
}

__device__ float4 row_load(const float *q, bool is_there, uint32_t tile)
{
    const float *at = q + 16 * tile + 2 * (lane_id() % 4);

    if (!is_there)
        return make_float4(0, 0, 0, 0);
    float2 low = *(const float2 *)at, high = *(const float2 *)(at + 8);
    return make_float4(low.x, low.y, high.x, high.y);
}

/* Over the four lanes that hold a row. */
__device__ float row_largest(const float *q, bool is_there, uint32_t n_tiles)
{
    float largest = 0;

    for (uint32_t j = 0; j < n_tiles; j++) {
        float4 x = row_load(q, is_there, j);
        largest =
            fmaxf(fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))), fmaxf(fabsf(x.z), fabsf(x.w)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
}

/* Thread block: a warp, 16 rows of a head. Lane 4 r + c holds of rows r and r + 8 what it does of a
 * fragment. */
template <uint32_t DTYPE>
__global__ void __launch_bounds__(32)
    queries_split(const __grid_constant__ winnow_gpu_window_view view, const float *q,
                  uint64_t q_stride, uint32_t n_rows)
{
    uint32_t head = blockIdx.y, r = 16 * blockIdx.x + lane_id() / 4, n_tiles = view.k_width / 16;
    uint64_t row = (uint64_t)head * view.n_rows_max + r;
    uint4 *to = view.query + (row / 16 * view.n_parts * n_tiles) * 32 + lane_id();
    const float *from[2];
    bool is_there[2];
    float scale[2] = {1, 1};

    for (int half = 0; half < 2; half++) {
        int exponent = 0;
        is_there[half] = r + 8 * half < n_rows;
        from[half] = q + head * q_stride + (uint64_t)(r + 8 * half) * view.k_width;
        if (view.n_parts > 1)
            exponent = row_exponent<DTYPE>(row_largest(from[half], is_there[half], n_tiles));
        scale[half] = power_of_2(exponent);
        if (lane_id() % 4 == 0)
            view.row_scale[row + 8 * half] = view.softmax_scale * LOG2_E * power_of_2(-exponent);
    }
    for (uint32_t j = 0; j < n_tiles; j++, to += 32) {
        float x[2][4];
        for (int half = 0; half < 2; half++) {
            float4 y = row_load(from[half], is_there[half], j);
            x[half][0] = scale[half] * y.x;
            x[half][1] = scale[half] * y.y;
            x[half][2] = scale[half] * y.z;
            x[half][3] = scale[half] * y.w;
        }
        *to = make_uint4(pack<DTYPE>(x[0][0], x[0][1]), pack<DTYPE>(x[1][0], x[1][1]),
                         pack<DTYPE>(x[0][2], x[0][3]), pack<DTYPE>(x[1][2], x[1][3]));
        if (view.n_parts == 1)
            continue;
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 4; i++)
                x[half][i] = rest_of<DTYPE>(x[half][i]);
        to[32 * n_tiles] = make_uint4(pack<DTYPE>(x[0][0], x[0][1]), pack<DTYPE>(x[1][0], x[1][1]),
                                      pack<DTYPE>(x[0][2], x[0][3]), pack<DTYPE>(x[1][2], x[1][3]));
    }
}

/* By a warp: a block's tiles from `from` (NULL: zeros); of tokens from n_tokens on the values become
 * 0, whatever they are. */
__device__ void block_copy(const winnow_gpu_window_view &view, const uint4 *from, uint32_t n_tokens,
                           uint4 *to)
{
    uint32_t n_k = view.k_width / 16, n_tiles = n_k + view.v_width / 16, mask[2];

    for (int half = 0; half < 2; half++) {
        uint32_t t = 2 * (lane_id() % 4) + 8 * half;
        mask[half] = (t < n_tokens ? 0xffffu : 0) | (t + 1 < n_tokens ? 0xffff0000u : 0);
    }
    for (uint32_t first = 0; first < n_tiles; first += TILES_AT_ONCE) {
        uint4 x[TILES_AT_ONCE];
#pragma unroll
        for (int j = 0; j < TILES_AT_ONCE; j++)
            x[j] = load_if(from && first + j < n_tiles, from + 32 * (first + j));
#pragma unroll
        for (int j = 0; j < TILES_AT_ONCE; j++) {
            if (first + j >= n_tiles)
                break;
            if (first + j >= n_k) {
                x[j].x &= mask[0];
                x[j].y &= mask[0];
                x[j].z &= mask[1];
                x[j].w &= mask[1];
            }
            __stcg(to + 32 * (first + j), x[j]);
        }
    }
}

__global__ void __launch_bounds__(GATHER_THREADS)
    gather(const __grid_constant__ winnow_gpu_window_view view, uint32_t stage_idx,
           const __grid_constant__ winnow_gpu_window_list list, uint32_t n_most, bool has_positions)
{
    const winnow_gpu_window_stage &stage = view.stage[stage_idx];
    uint32_t warp = (blockIdx.x * GATHER_THREADS + threadIdx.x) / 32,
             n_warps = gridDim.x * GATHER_THREADS / 32;
    uint32_t n_words = (view.k_width + view.v_width) * 2;

    for (uint32_t i = warp; i < view.n_kv_heads * n_most; i += n_warps) {
        uint32_t head = i % view.n_kv_heads, b = i / view.n_kv_heads;
        uint32_t n = list.n_blocks[head], n_tokens = WINNOW_BLOCK_TOKENS;
        uint64_t at = (uint64_t)head * view.n_blocks_max + b;
        if (b == 0)
            stage.list.n_blocks[head] = n;
        if (has_positions) {
            n_tokens = b < n ? list.n_tokens[b] : 0;
            stage.list.n_tokens[b] = n_tokens;
            stage.list.position[b] = b < n ? list.position[b] : UINT64_MAX;
        }
        if (b >= (n + WINNOW_GPU_WINDOW_STEP - 1) / WINNOW_GPU_WINDOW_STEP * WINNOW_GPU_WINDOW_STEP)
            continue;
        const uint4 *from = nullptr;
        if (b < n)
            from = (const uint4 *)(view.host + ((uint64_t)list.home[at] << 12)) + lane_id();
        block_copy(view, from, n_tokens, stage.block + at * n_words + lane_id());
    }
}
} /* namespace */

cudaError_t winnow_gpu_window_queries(const struct winnow_gpu_window_view *view, const float *q,
                                      uint64_t q_stride, uint32_t n_rows, cudaStream_t stream)
{
    uint32_t n_tile = winnow_gpu_window_tile_rows(view->k_width, view->v_width);
    dim3 grid((n_rows + n_tile - 1) / n_tile * (n_tile / 16), view->n_kv_heads);

    if (view->kv_dtype == WINNOW_BF16)
        queries_split<WINNOW_BF16><<<grid, 32, 0, stream>>>(*view, q, q_stride, n_rows);
    else
        queries_split<WINNOW_FP16><<<grid, 32, 0, stream>>>(*view, q, q_stride, n_rows);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_window_gather(const struct winnow_gpu_window_view *view, uint32_t stage_idx,
                                     const struct winnow_gpu_window_list *list, uint32_t n_most,
                                     bool has_positions, cudaStream_t stream)
{
    n_most = n_most > 0 ? n_most : 1; /* without a block there is a list */
    n_most =
        (n_most + WINNOW_GPU_WINDOW_STEP - 1) / WINNOW_GPU_WINDOW_STEP * WINNOW_GPU_WINDOW_STEP;
    gather<<<GATHER_BLOCKS, GATHER_THREADS, 0, stream>>>(*view, stage_idx, *list, n_most,
                                                         has_positions);
    return cudaGetLastError();
}
