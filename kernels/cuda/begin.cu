/*
 * begin: a thread block a unit looks at what came in (a number that is not finite fails the item),
 * puts its head's part of the new token into the tail block, splits its queries into operand order,
 * and clears the unit. Each looks at all of the item, so that none has to wait for another.
 */
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/fragment.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/tail.cuh>

namespace
{

constexpr int BEGIN_THREADS = 256;

template <uint32_t DTYPE> __device__ float load_as(const void *at, uint64_t idx)
{
    if constexpr (DTYPE == WINNOW_FP32)
        return ((const float *)at)[idx];
    else if constexpr (DTYPE == WINNOW_FP16)
        return __half2float(((const __half *)at)[idx]);
    else
        return __bfloat162float(((const __nv_bfloat16 *)at)[idx]);
}

/* The exponents of what a word of an input holds are not all ones. */
template <uint32_t DTYPE> __device__ bool word_is_finite(uint32_t x)
{
    constexpr uint32_t EXPONENT = DTYPE == WINNOW_FP16 ? 0x7c00 : 0x7f80;

    if constexpr (DTYPE == WINNOW_FP32)
        return (x & 0x7f800000u) != 0x7f800000u;
    return (x & EXPONENT) != EXPONENT && (x >> 16 & EXPONENT) != EXPONENT;
}

/* q, k and v of an item: of the thread's part all is finite. */
template <uint32_t DTYPE>
__device__ bool inputs_are_finite(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    constexpr uint32_t PER_LOAD = DTYPE == WINNOW_FP32 ? 4 : 8, N_LOADS = 4;
    uint32_t q_end = view.n_q_heads * view.k_width / PER_LOAD;
    uint32_t k_end = q_end + (item.k ? view.n_kv_heads * view.k_width / PER_LOAD : 0);
    uint32_t v_end = k_end + (item.v ? view.n_kv_heads * view.v_width / PER_LOAD : 0);
    bool is_finite = true;

    for (uint32_t first = threadIdx.x; first < v_end; first += N_LOADS * BEGIN_THREADS) {
        uint4 x[N_LOADS];
#pragma unroll
        for (int j = 0; j < N_LOADS; j++) {
            uint32_t i = first + j * BEGIN_THREADS;
            const uint4 *at = i < q_end   ? (const uint4 *)item.q + i
                              : i < k_end ? (const uint4 *)item.k + (i - q_end)
                                          : (const uint4 *)item.v + (i - k_end);
            x[j] = load_if(i < v_end, at);
        }
#pragma unroll
        for (int j = 0; j < N_LOADS; j++)
            is_finite &= word_is_finite<DTYPE>(x[j].x) && word_is_finite<DTYPE>(x[j].y) &&
                         word_is_finite<DTYPE>(x[j].z) && word_is_finite<DTYPE>(x[j].w);
    }
    return is_finite;
}

template <uint32_t DTYPE>
__device__ uint32_t item_status(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    if (!item_is_valid(view, item))
        return EIO_STATUS;
    return __syncthreads_or(!inputs_are_finite<DTYPE>(view, item)) ? EDOM_STATUS : 0;
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

    x = fminf(fmaxf(x, -largest), largest);
    if (dtype == WINNOW_FP16)
        ((__half *)block)[idx] = __float2half_rn(x);
    else
        ((__nv_bfloat16 *)block)[idx] = __float2bfloat16_rn(x);
}

template <uint32_t DTYPE>
__device__ void token_append(const winnow_gpu_view &view, const winnow_gpu_item &item,
                             uint32_t head)
{
    uint32_t number = (uint32_t)((item.n_tokens - 1) / WINNOW_BLOCK_TOKENS);
    uint32_t t = (uint32_t)((item.n_tokens - 1) % WINNOW_BLOCK_TOKENS);
    uint8_t *block = tail_block_at(view, item, head, number);

    for (uint32_t i = threadIdx.x; i < view.k_width + view.v_width; i += BEGIN_THREADS) {
        bool is_key = i < view.k_width;
        uint32_t d = is_key ? i : i - view.k_width;
        uint32_t at = is_key ? fragment_idx(t, d % 16) : fragment_idx(d % 16, t);
        float x = is_key ? load_as<DTYPE>(item.k, head * view.k_width + d)
                         : load_as<DTYPE>(item.v, head * view.v_width + d);
        store_saturated(view.kv_dtype, block, i / 16 * 256 + at, x);
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

__device__ float power_of_2(int exponent) /* between -126 and 127 */
{
    return __uint_as_float((uint32_t)(127 + exponent) << 23);
}

/* The power of 2 that brings a head's largest number to 2^14 or above: fp16 then holds the low half
 * of all that matters. */
__device__ int head_exponent(const query_head &q)
{
    float largest = 0;

#pragma unroll
    for (int k = 0; k < LANE_PAIRS; k++)
        largest = fmaxf(largest, fmaxf(fabsf(q.x[k].x), fabsf(q.x[k].y)));
    uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(largest));
    return bits > 0 ? min(max(14 + 127 - (int)(bits >> 23), -100), 100) : 0;
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
                              winnow_gpu_unit *unit, uint32_t *words)
{
    uint32_t n_columns = view.n_group <= 4 ? 4 : view.n_group <= 8 ? 8 : 16;
    uint32_t n_parts = n_columns == 4 ? 1 : n_columns / 4;

    for (uint32_t g = threadIdx.x / 32; g < n_columns; g += BEGIN_THREADS / 32) {
        /* [part][lane 4 n + c][2]: part and n of the high half, and from there to the low half */
        uint32_t *high = words + (n_columns == 4 ? 2 * g * 8 : g / 8 * 128 + g % 8 * 8);
        uint32_t *low = high + (n_columns == 4 ? 8 : 64);
        query_head q = {};
        int exponent = 0;
        if (g < view.n_group) {
            q = head_load<DTYPE>(view, item.q, blockIdx.y * view.n_group + g);
            exponent = head_exponent(q);
            if (lane_id() == 0)
                unit->logit_scale[g] = view.softmax_scale * power_of_2(-exponent);
        }
        if (view.kv_dtype == WINNOW_BF16)
            head_split<WINNOW_BF16>(view, q, power_of_2(exponent), high, low, n_parts * 64);
        else
            head_split<WINNOW_FP16>(view, q, power_of_2(exponent), high, low, n_parts * 64);
    }
}

__device__ void words_zero(void *at, uint32_t n_bytes)
{
    for (uint32_t i = threadIdx.x; i < n_bytes / 4; i += BEGIN_THREADS)
        ((uint32_t *)at)[i] = 0;
}

/* A unit that is zero. */
__device__ void unit_begin(const winnow_gpu_view &view, const winnow_gpu_item &item,
                           uint32_t status, winnow_gpu_unit *unit)
{
    const winnow_gpu_launch *launch = view.launch;
    uint32_t item_idx = blockIdx.x, head = blockIdx.y;
    uint32_t n_blocks = item.n_segments * view.span_blocks;

    if (threadIdx.x < view.n_group)
        unit->ln_z[threadIdx.x] = -INFINITY;
    if (threadIdx.x > 0)
        return;
    unit->item = item_idx;
    unit->head = head;
    unit->layer = item.layer;
    unit->session = item.session;
    unit->status = status;
    unit->n_blocks = n_blocks;
    unit->block_first = launch->block_first[item_idx] + head * n_blocks;
    unit->partial_first =
        launch->partial_first[item_idx] + head * launch->partials_of_head[item_idx];
    if (!status)
        unit->n_tail_groups = (tail_blocks_of(view, item).n + GROUP - 1) / GROUP;
    unit->n_chunks = max(1u, (n_blocks + WINNOW_GPU_CHUNK_BLOCKS - 1) / WINNOW_GPU_CHUNK_BLOCKS);
}

template <uint32_t DTYPE>
__global__ void __launch_bounds__(BEGIN_THREADS)
    begin_kernel(const __grid_constant__ winnow_gpu_view view)
{
    uint32_t unit_idx = blockIdx.x * view.n_kv_heads + blockIdx.y;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const winnow_gpu_item &item = view.launch->item[blockIdx.x];

    later_kernel_launch();
    if (unit_idx == 0)
        words_zero(view.queue, 2 * sizeof *view.queue);
    if (blockIdx.x >= view.launch->n_items)
        return;
    words_zero(unit, sizeof *unit);
    uint32_t status = item_status<DTYPE>(view, item);
    __syncthreads(); /* of what item_status refuses, the unit is zero too */
    unit_begin(view, item, status, unit);
    if (status)
        return;
    queries_split<DTYPE>(view, item, unit,
                         view.q_fragment + (uint64_t)unit_idx * winnow_gpu_q_fragment_words(&view));
    if (item.k)
        token_append<DTYPE>(view, item, blockIdx.y);
}

} // namespace

cudaError_t winnow_gpu_stage_begin(const struct winnow_gpu_view *view,
                                   const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    auto kernel = view->io_dtype == WINNOW_FP32   ? begin_kernel<WINNOW_FP32>
                  : view->io_dtype == WINNOW_FP16 ? begin_kernel<WINNOW_FP16>
                                                  : begin_kernel<WINNOW_BF16>;
    dim3 n_blocks(grid->n_units_max / view->n_kv_heads, view->n_kv_heads);

    kernel<<<n_blocks, BEGIN_THREADS, 0, stream>>>(*view);
    return cudaGetLastError();
}
