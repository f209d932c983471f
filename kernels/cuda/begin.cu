/*
 * begin: a thread block an item looks at what came in (a number that is not finite fails the item),
 * puts the new token into its tail block, splits the queries into operand order, and clears the
 * item's units, output and counters.
 */
#include <kernels/cuda/join.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/tail.cuh>

namespace
{

constexpr int BEGIN_THREADS = 512;
constexpr uint32_t EIO_STATUS = 5;

__device__ float load_as(uint32_t dtype, const void *at, uint64_t idx)
{
    if (dtype == WINNOW_FP32)
        return ((const float *)at)[idx];
    if (dtype == WINNOW_FP16)
        return __half2float(((const __half *)at)[idx]);
    return __bfloat162float(((const __nv_bfloat16 *)at)[idx]);
}

__device__ bool all_finite(uint32_t dtype, const void *at, uint32_t n)
{
    bool is_finite = true;
    for (uint32_t i = threadIdx.x; at && i < n; i += BEGIN_THREADS)
        is_finite &= isfinite(load_as(dtype, at, i));
    return is_finite;
}

__device__ uint32_t item_status(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    tail_blocks tail = tail_blocks_of(view, item);

    if (item.n_segments > view.n_session_segments_max || item.layer >= view.n_layers ||
        tail.n - tail.n_sinks > view.ring_blocks || tail.n > GROUP * WINNOW_GPU_TAIL_GROUPS_MAX)
        return EIO_STATUS;
    bool is_finite = all_finite(view.io_dtype, item.q, view.n_q_heads * view.k_width) &&
                     all_finite(view.io_dtype, item.k, view.n_kv_heads * view.k_width) &&
                     all_finite(view.io_dtype, item.v, view.n_kv_heads * view.v_width);
    return __syncthreads_or(!is_finite) ? EDOM_STATUS : 0;
}

/* Place in a tile of layout 2. */
__device__ uint32_t fragment_idx(uint32_t row, uint32_t column)
{
    uint32_t lane = 4 * (row % 8) + column % 8 / 2;
    return 8 * lane + column % 2 + 2 * (row / 8) + 4 * (column / 8);
}

/* Into kv_dtype; what overflows becomes its largest. */
__device__ void store_saturated(uint32_t dtype, uint8_t *block, uint32_t idx, float x)
{
    float largest = dtype == WINNOW_FP16 ? 65504.0f : 0x1.fep127f;
    store_as(dtype, block, idx, fminf(fmaxf(x, -largest), largest));
}

__device__ void token_append(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    uint32_t number = (uint32_t)((item.n_tokens - 1) / WINNOW_BLOCK_TOKENS);
    uint32_t t = (uint32_t)((item.n_tokens - 1) % WINNOW_BLOCK_TOKENS);

    for (uint32_t i = threadIdx.x; i < view.n_kv_heads * view.k_width; i += BEGIN_THREADS) {
        uint32_t d = i % view.k_width;
        store_saturated(view.kv_dtype, tail_block_at(view, item, i / view.k_width, number),
                        d / 16 * 256 + fragment_idx(t, d % 16), load_as(view.io_dtype, item.k, i));
    }
    for (uint32_t i = threadIdx.x; i < view.n_kv_heads * view.v_width; i += BEGIN_THREADS) {
        uint32_t d = i % view.v_width;
        store_saturated(view.kv_dtype, tail_block_at(view, item, i / view.v_width, number),
                        16 * view.k_width + d / 16 * 256 + fragment_idx(d % 16, t),
                        load_as(view.io_dtype, item.v, i));
    }
}

/* The power of 2 that brings a head's largest number to 2^14 or above: fp16 then holds the low half
 * of all that matters. */
__device__ int head_exponent(const winnow_gpu_view &view, const winnow_gpu_item &item,
                             uint32_t head)
{
    float largest = 0;

    for (uint32_t d = lane_id(); d < view.k_width; d += 32)
        largest = fmaxf(largest,
                        fabsf(load_as(view.io_dtype, item.q, (uint64_t)head * view.k_width + d)));
    for (int offset = 1; offset < 32; offset *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    return largest > 0 ? min(max(14 - ilogbf(largest), -100), 100) : 0;
}

template <uint32_t DTYPE>
__device__ void head_split(const winnow_gpu_view &view, const void *q, uint64_t first, float scale,
                           uint32_t *high, uint32_t *low, uint32_t tile_words)
{
    for (uint32_t p = lane_id(); p < view.k_width / 2; p += 32) {
        float x = q ? scale * load_as(view.io_dtype, q, first + 2 * p) : 0;
        float y = q ? scale * load_as(view.io_dtype, q, first + 2 * p + 1) : 0;
        uint32_t at = p / 8 * tile_words + p % 4 * 2 + p % 8 / 4;
        high[at] = pack<DTYPE>(x, y);
        low[at] = pack<DTYPE>(rest_of<DTYPE>(x), rest_of<DTYPE>(y));
    }
}

/* Fills q_fragment, a warp a column; columns without a head are 0. */
__device__ void queries_split(const winnow_gpu_view &view, const winnow_gpu_item &item,
                              uint32_t unit_first)
{
    uint32_t n_columns = view.n_group <= 4 ? 4 : view.n_group <= 8 ? 8 : 16;
    uint32_t n_parts = n_columns == 4 ? 1 : n_columns / 4;

    for (uint32_t i = threadIdx.x / 32; i < view.n_kv_heads * n_columns; i += BEGIN_THREADS / 32) {
        uint32_t unit = unit_first + i / n_columns, g = i % n_columns;
        uint32_t head = i / n_columns * view.n_group + g;
        uint32_t *words = view.q_fragment + (uint64_t)unit * (view.k_width / 16 * n_parts * 64);
        /* [part][lane 4 n + c][2]: part and n of the high half, and from there to the low half */
        uint32_t high = n_columns == 4 ? 2 * g * 8 : g / 8 * 128 + g % 8 * 8;
        uint32_t to_low = n_columns == 4 ? 8 : 64;
        const void *q = g < view.n_group ? item.q : nullptr;
        int exponent = q ? head_exponent(view, item, head) : 0;
        if (q && lane_id() == 0)
            view.unit[unit].logit_scale[g] = ldexpf(view.softmax_scale, -exponent);
        if (view.kv_dtype == WINNOW_BF16)
            head_split<WINNOW_BF16>(view, q, (uint64_t)head * view.k_width, ldexpf(1, exponent),
                                    words + high, words + high + to_low, n_parts * 64);
        else
            head_split<WINNOW_FP16>(view, q, (uint64_t)head * view.k_width, ldexpf(1, exponent),
                                    words + high, words + high + to_low, n_parts * 64);
    }
}

__device__ void unit_clear(const winnow_gpu_view &view, uint32_t item_idx, uint32_t head,
                           uint32_t status)
{
    const winnow_gpu_launch *launch = view.launch;
    const winnow_gpu_item &item = launch->item[item_idx];
    winnow_gpu_unit unit = {};

    unit.item = item_idx;
    unit.head = head;
    unit.layer = item.layer;
    unit.status = status;
    unit.n_blocks = item.n_segments * view.span_blocks;
    unit.block_first = launch->block_first[item_idx] + head * unit.n_blocks;
    unit.partial_first =
        launch->partial_first[item_idx] + head * launch->partials_of_head[item_idx];
    if (!status)
        unit.n_tail_groups = (tail_blocks_of(view, item).n + GROUP - 1) / GROUP;
    unit.n_chunks =
        max(1u, (unit.n_blocks + WINNOW_GPU_CHUNK_BLOCKS - 1) / WINNOW_GPU_CHUNK_BLOCKS);
    for (int g = 0; g < WINNOW_GQA_MAX; g++)
        unit.ln_z[g] = -INFINITY;
    view.unit[item_idx * view.n_kv_heads + head] = unit;
}

__global__ void __launch_bounds__(BEGIN_THREADS)
    begin_kernel(const __grid_constant__ winnow_gpu_view view)
{
    uint32_t i = blockIdx.x;

    if (i == 0 && threadIdx.x < 2)
        view.queue[threadIdx.x] = {};
    if (i >= view.launch->n_items)
        return;
    const winnow_gpu_item &item = view.launch->item[i];
    uint32_t status = item_status(view, item);
    for (uint32_t h = threadIdx.x; h < view.n_kv_heads; h += BEGIN_THREADS)
        unit_clear(view, i, h, status);
    item_poison(view, item);
    if (status) {
        if (threadIdx.x == 0)
            *item.certificate = {status, 1};
        return;
    }
    __syncthreads(); /* units are cleared before logit_scale is written */
    queries_split(view, item, i * view.n_kv_heads);
    if (item.k)
        token_append(view, item);
}

} // namespace

cudaError_t winnow_gpu_stage_begin(const struct winnow_gpu_view *view,
                                   const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    begin_kernel<<<grid->n_units_max / view->n_kv_heads, BEGIN_THREADS, 0, stream>>>(*view);
    return cudaGetLastError();
}
