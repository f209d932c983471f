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

template <uint32_t DTYPE> __device__ float load_as(const void *at, uint64_t idx)
{
    if constexpr (DTYPE == WINNOW_FP32)
        return ((const float *)at)[idx];
    else if constexpr (DTYPE == WINNOW_FP16)
        return __half2float(((const __half *)at)[idx]);
    else
        return __bfloat162float(((const __nv_bfloat16 *)at)[idx]);
}

/* n numbers, an even number of them. NULL is fine. */
template <uint32_t DTYPE> __device__ bool all_finite(const void *at, uint32_t n)
{
    constexpr uint32_t EXPONENT = DTYPE == WINNOW_FP16 ? 0x7c00 : 0x7f80;
    uint32_t n_words = DTYPE == WINNOW_FP32 ? n : n / 2;
    bool is_finite = true;

#pragma unroll 4
    for (uint32_t i = threadIdx.x; at && i < n_words; i += BEGIN_THREADS) {
        uint32_t x = ((const uint32_t *)at)[i];
        if constexpr (DTYPE == WINNOW_FP32)
            is_finite &= (x & 0x7f800000u) != 0x7f800000u;
        else
            is_finite &= (x & EXPONENT) != EXPONENT && (x >> 16 & EXPONENT) != EXPONENT;
    }
    return is_finite;
}

template <uint32_t DTYPE>
__device__ uint32_t item_status(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    tail_blocks tail = tail_blocks_of(view, item);

    bool is_sealed = item.n_segments > 0 && tail.n == tail.n_sinks; /* where the token would go */
    if (item.n_segments > view.n_session_segments_max || (item.k && (is_sealed || tail.n == 0)) ||
        item.layer >= view.n_layers || tail.n - tail.n_sinks > view.ring_blocks ||
        tail.n > GROUP * WINNOW_GPU_TAIL_GROUPS_MAX)
        return EIO_STATUS;
    bool is_finite = all_finite<DTYPE>(item.q, view.n_q_heads * view.k_width);
    is_finite &= all_finite<DTYPE>(item.k, view.n_kv_heads * view.k_width);
    is_finite &= all_finite<DTYPE>(item.v, view.n_kv_heads * view.v_width);
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

template <uint32_t DTYPE>
__device__ void token_append(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    uint32_t number = (uint32_t)((item.n_tokens - 1) / WINNOW_BLOCK_TOKENS);
    uint32_t t = (uint32_t)((item.n_tokens - 1) % WINNOW_BLOCK_TOKENS);

    for (uint32_t i = threadIdx.x; i < view.n_kv_heads * view.k_width; i += BEGIN_THREADS) {
        uint32_t d = i % view.k_width;
        store_saturated(view.kv_dtype, tail_block_at(view, item, i / view.k_width, number),
                        d / 16 * 256 + fragment_idx(t, d % 16), load_as<DTYPE>(item.k, i));
    }
    for (uint32_t i = threadIdx.x; i < view.n_kv_heads * view.v_width; i += BEGIN_THREADS) {
        uint32_t d = i % view.v_width;
        store_saturated(view.kv_dtype, tail_block_at(view, item, i / view.v_width, number),
                        16 * view.k_width + d / 16 * 256 + fragment_idx(d % 16, t),
                        load_as<DTYPE>(item.v, i));
    }
}

/* A query head in a warp's registers: pairs of numbers lane, lane + 32, .. */
constexpr int LANE_PAIRS = WINNOW_WIDTH_MAX / 64;
struct query_head {
    float2 x[LANE_PAIRS];
};

template <uint32_t DTYPE>
__device__ query_head head_load(const winnow_gpu_view &view, const void *q, uint32_t head)
{
    uint64_t first = (uint64_t)head * view.k_width;
    query_head to;

#pragma unroll
    for (int k = 0; k < LANE_PAIRS; k++) {
        uint32_t p = lane_id() + 32 * k;
        to.x[k] = make_float2(0, 0);
        if (p < view.k_width / 2)
            to.x[k] =
                make_float2(load_as<DTYPE>(q, first + 2 * p), load_as<DTYPE>(q, first + 2 * p + 1));
    }
    return to;
}

/* The power of 2 that brings a head's largest number to 2^14 or above: fp16 then holds the low half
 * of all that matters. */
__device__ int head_exponent(const query_head &q)
{
    float largest = 0;

#pragma unroll
    for (int k = 0; k < LANE_PAIRS; k++)
        largest = fmaxf(largest, fmaxf(fabsf(q.x[k].x), fabsf(q.x[k].y)));
    largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
    return largest > 0 ? min(max(14 - ilogbf(largest), -100), 100) : 0;
}

template <uint32_t KV>
__device__ void head_split(const winnow_gpu_view &view, const query_head &q, float scale,
                           uint32_t *high, uint32_t *low, uint32_t tile_words)
{
#pragma unroll
    for (int k = 0; k < LANE_PAIRS; k++) {
        uint32_t p = lane_id() + 32 * k, at = p / 8 * tile_words + p % 4 * 2 + p % 8 / 4;
        float x = scale * q.x[k].x, y = scale * q.x[k].y;
        if (p >= view.k_width / 2)
            break;
        high[at] = pack<KV>(x, y);
        low[at] = pack<KV>(rest_of<KV>(x), rest_of<KV>(y));
    }
}

/* Fills q_fragment, a warp a column; columns without a head are 0. */
template <uint32_t DTYPE>
__device__ void queries_split(const winnow_gpu_view &view, const winnow_gpu_item &item,
                              uint32_t unit_first)
{
    uint32_t n_columns = view.n_group <= 4 ? 4 : view.n_group <= 8 ? 8 : 16;
    uint32_t n_parts = n_columns == 4 ? 1 : n_columns / 4;

    for (uint32_t i = threadIdx.x / 32; i < view.n_kv_heads * n_columns; i += BEGIN_THREADS / 32) {
        uint32_t unit = unit_first + i / n_columns, g = i % n_columns;
        uint32_t *words = view.q_fragment + (uint64_t)unit * (view.k_width / 16 * n_parts * 64);
        /* [part][lane 4 n + c][2]: part and n of the high half, and from there to the low half */
        uint32_t *high = words + (n_columns == 4 ? 2 * g * 8 : g / 8 * 128 + g % 8 * 8);
        uint32_t *low = high + (n_columns == 4 ? 8 : 64);
        query_head q = {};
        int exponent = 0;
        if (g < view.n_group) {
            q = head_load<DTYPE>(view, item.q, i / n_columns * view.n_group + g);
            exponent = head_exponent(q);
            if (lane_id() == 0)
                view.unit[unit].logit_scale[g] = ldexpf(view.softmax_scale, -exponent);
        }
        if (view.kv_dtype == WINNOW_BF16)
            head_split<WINNOW_BF16>(view, q, ldexpf(1, exponent), high, low, n_parts * 64);
        else
            head_split<WINNOW_FP16>(view, q, ldexpf(1, exponent), high, low, n_parts * 64);
    }
}

/* Units were zeroed. */
__device__ void unit_clear(const winnow_gpu_view &view, uint32_t item_idx, uint32_t head,
                           uint32_t status)
{
    const winnow_gpu_launch *launch = view.launch;
    const winnow_gpu_item &item = launch->item[item_idx];
    winnow_gpu_unit &unit = view.unit[item_idx * view.n_kv_heads + head];

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
    for (uint32_t g = 0; g < view.n_group; g++)
        unit.ln_z[g] = -INFINITY;
}

__device__ void units_zero(const winnow_gpu_view &view, uint32_t item_idx)
{
    constexpr uint32_t WORDS = sizeof(winnow_gpu_unit) / 4;
    uint32_t *words = (uint32_t *)(view.unit + item_idx * view.n_kv_heads);

    for (uint32_t i = threadIdx.x; i < WORDS * view.n_kv_heads; i += BEGIN_THREADS)
        words[i] = 0;
}

template <uint32_t DTYPE>
__global__ void __launch_bounds__(BEGIN_THREADS)
    begin_kernel(const __grid_constant__ winnow_gpu_view view)
{
    uint32_t i = blockIdx.x;

    if (i == 0 && threadIdx.x < 2)
        view.queue[threadIdx.x] = {};
    if (i >= view.launch->n_items)
        return;
    const winnow_gpu_item &item = view.launch->item[i];
    units_zero(view, i);
    uint32_t status = item_status<DTYPE>(view, item);
    __syncthreads(); /* of what item_status refuses, the units are zero too */
    for (uint32_t h = threadIdx.x; h < view.n_kv_heads; h += BEGIN_THREADS)
        unit_clear(view, i, h, status);
    item_poison(view, item);
    if (status) {
        if (threadIdx.x == 0)
            *item.certificate = {status, 1};
        return;
    }
    __syncthreads(); /* units are cleared before logit_scale is written */
    queries_split<DTYPE>(view, item, i * view.n_kv_heads);
    if (item.k)
        token_append<DTYPE>(view, item);
}

} // namespace

cudaError_t winnow_gpu_stage_begin(const struct winnow_gpu_view *view,
                                   const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    auto kernel = view->io_dtype == WINNOW_FP32   ? begin_kernel<WINNOW_FP32>
                  : view->io_dtype == WINNOW_FP16 ? begin_kernel<WINNOW_FP16>
                                                  : begin_kernel<WINNOW_BF16>;

    kernel<<<grid->n_units_max / view->n_kv_heads, BEGIN_THREADS, 0, stream>>>(*view);
    return cudaGetLastError();
}
