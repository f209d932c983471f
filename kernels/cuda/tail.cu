/*
 * tail: a unit made out of what came in, and its sinks and tail attended, so that selection knows the
 * mass that is there already: it adds up the groups' masses itself.
 *
 * It runs beside the scan, which needs nothing of it: scan is launched first and fills each SM once,
 * these thread blocks take what room that leaves (registers: 96 a thread up to d 128), and `select`
 * waits for both, because a thread block here ends no sooner than the scan. So the step has one
 * launch, one chain of loads and the tail's reads (8 MiB a 1,000 tokens at 8 KV heads) less to wait
 * for. What both count in is 0 when a launch begins.
 *
 * A thread block attends groups of eight blocks, a warp a block. Each looks at all of the item (a
 * number that is not finite fails it) and splits the unit's queries into operand order for itself,
 * while its blocks are on their way: nobody waits for another. The first of a unit also writes the
 * unit, the one that has the tail's last block appends the new token there.
 */
#include <kernels/cuda/block.cuh>
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/tail.cuh>

namespace
{

template <class F> struct tail_memory {
    group_memory<F> group;
    alignas(16) uint32_t q_fragment[F::TILES * F::PARTS * 64];
    float logit_scale[F::HEADS];
};

__device__ float load_as(uint32_t dtype, const void *at, uint32_t idx)
{
    if (dtype == WINNOW_FP32)
        return ((const float *)at)[idx];
    if (dtype == WINNOW_FP16)
        return __half2float(((const __half *)at)[idx]);
    return __bfloat162float(((const __nv_bfloat16 *)at)[idx]);
}

/* q, k and v of an item: of the thread's part all is finite, which is to say that no exponent is all
 * ones. They are near from then on. */
__device__ bool inputs_are_finite(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    constexpr uint32_t N_LOADS = 4;
    uint32_t per_load = view.io_dtype == WINNOW_FP32 ? 4 : 8;
    uint32_t high = view.io_dtype == WINNOW_FP32   ? 0x7f800000u
                    : view.io_dtype == WINNOW_FP16 ? 0x7c000000u
                                                   : 0x7f800000u;
    uint32_t low = view.io_dtype == WINNOW_FP32 ? high : high >> 16;
    uint32_t q_end = view.n_q_heads * view.k_width / per_load;
    uint32_t k_end = q_end + (item.k ? view.n_kv_heads * view.k_width / per_load : 0);
    uint32_t v_end = k_end + (item.v ? view.n_kv_heads * view.v_width / per_load : 0);
    bool is_finite = true;

    for (uint32_t first = threadIdx.x; first < v_end; first += N_LOADS * ATTEND_THREADS) {
        uint4 x[N_LOADS];
#pragma unroll
        for (int j = 0; j < N_LOADS; j++) {
            uint32_t i = first + j * ATTEND_THREADS;
            const uint4 *at = i < k_end && i >= q_end ? (const uint4 *)item.k + (i - q_end)
                              : i < v_end && i >= k_end
                                  ? (const uint4 *)item.v + (i - k_end)
                                  : (const uint4 *)item.q + (i < q_end ? i : 0);
            x[j] = *at;
        }
#pragma unroll
        for (int j = 0; j < N_LOADS; j++)
            for (uint32_t word : {x[j].x, x[j].y, x[j].z, x[j].w})
                is_finite &= (word & high) != high && (word & low) != low;
    }
    return is_finite;
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

__device__ void token_append(const winnow_gpu_view &view, const winnow_gpu_item &item,
                             uint32_t head)
{
    uint32_t number = (uint32_t)((item.n_tokens - 1) / WINNOW_BLOCK_TOKENS);
    uint32_t t = (uint32_t)((item.n_tokens - 1) % WINNOW_BLOCK_TOKENS);
    uint8_t *block = tail_block_at(view, item, head, number);

    for (uint32_t i = threadIdx.x; i < view.k_width + view.v_width; i += ATTEND_THREADS) {
        bool is_key = i < view.k_width;
        uint32_t d = is_key ? i : i - view.k_width;
        uint32_t at = is_key ? fragment_idx(t, d % 16) : fragment_idx(d % 16, t);
        float x = is_key ? load_as(view.io_dtype, item.k, head * view.k_width + d)
                         : load_as(view.io_dtype, item.v, head * view.v_width + d);
        store_saturated(view.kv_dtype, block, i / 16 * 256 + at, x);
    }
}

/* A query head in a warp's registers: pairs of numbers lane, lane + 32, .. */
template <class F> struct query_head {
    float2 x[(F::WIDTH + 63) / 64];
};

template <class F>
__device__ query_head<F> head_load(const winnow_gpu_view &view, const void *q, uint32_t head)
{
    uint32_t first = head * view.k_width, k = 0;
    query_head<F> to;

#pragma unroll
    for (float2 &x : to.x) {
        uint32_t p = lane_id() + 32 * k++;
        x = make_float2(0, 0);
        if (p < view.k_width / 2)
            x = make_float2(load_as(view.io_dtype, q, first + 2 * p),
                            load_as(view.io_dtype, q, first + 2 * p + 1));
    }
    return to;
}

__device__ float power_of_2(int exponent) /* between -126 and 127 */
{
    return __uint_as_float((uint32_t)(127 + exponent) << 23);
}

/* The power of 2 that brings a head's largest number to 2^14 or above: fp16 then holds the low half
 * of all that matters. */
template <class F> __device__ int head_exponent(const query_head<F> &q)
{
    float largest = 0;

    for (float2 x : q.x)
        largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
    uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(largest));
    return bits > 0 ? min(max(14 + 127 - (int)(bits >> 23), -100), 100) : 0;
}

template <class F>
__device__ void head_split(const winnow_gpu_view &view, const query_head<F> &q, float scale,
                           uint32_t *high, uint32_t *low)
{
    uint32_t p = lane_id();

    for (float2 pair : q.x) {
        uint32_t at = p / 8 * (F::PARTS * 64) + p % 4 * 2 + p % 8 / 4;
        float x = scale * pair.x, y = scale * pair.y;
        if (p >= view.k_width / 2)
            break;
        high[at] = pack<F::DTYPE>(x, y);
        low[at] = pack<F::DTYPE>(rest_of<F::DTYPE>(x), rest_of<F::DTYPE>(y));
        p += 32;
    }
}

/* Fills q_fragment and logit_scale, a warp a column; columns without a head are 0. */
template <class F>
__device__ void queries_split(const winnow_gpu_view &view, const winnow_gpu_item &item,
                              uint32_t head, tail_memory<F> *memory)
{
    for (uint32_t g = threadIdx.x / 32; g < F::HEADS; g += GROUP) {
        /* [part][lane 4 n + c][2]: part and n of the high half, and from there to the low half */
        uint32_t *high = memory->q_fragment;
        high += F::HEADS == 4 ? 2 * g * 8 : g / 8 * 128 + g % 8 * 8;
        uint32_t *low = high + (F::HEADS == 4 ? 8 : 64);
        query_head<F> q = {};
        int exponent = 0;
        if (g < view.n_group) {
            q = head_load<F>(view, item.q, head * view.n_group + g);
            exponent = head_exponent<F>(q);
        }
        if (lane_id() == 0)
            memory->logit_scale[g] = view.softmax_scale * power_of_2(-exponent);
        head_split<F>(view, q, power_of_2(exponent), high, low);
    }
}

__device__ void words_zero(void *at, uint32_t n_bytes)
{
    for (uint32_t i = threadIdx.x; i < n_bytes / 4; i += ATTEND_THREADS)
        ((uint32_t *)at)[i] = 0;
}

/* The place of a unit's partials. */
__device__ uint32_t partial_first(const winnow_gpu_launch *launch, uint32_t item_idx, uint32_t head)
{
    return launch->partial_first[item_idx] + head * launch->partials_of_head[item_idx];
}

/* All threads, behind a barrier that follows the unit's clearing. */
template <class F>
__device__ void unit_write(const winnow_gpu_view &view, const winnow_gpu_item &item,
                           uint32_t unit_idx, uint32_t status, const tail_memory<F> &memory)
{
    const winnow_gpu_launch *launch = view.launch;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    uint32_t item_idx = unit_idx / view.n_kv_heads, head = unit_idx % view.n_kv_heads;
    uint32_t n_of_item = item.n_segments * view.span_blocks, n_blocks = status ? 0 : n_of_item;
    uint32_t n_words = view.k_width / 16 * F::PARTS * 64;
    uint32_t *q_fragment = view.q_fragment + (uint64_t)unit_idx * n_words;

    for (uint32_t i = threadIdx.x; !status && i < n_words; i += ATTEND_THREADS)
        q_fragment[i] = memory.q_fragment[i];
    if (threadIdx.x < view.n_group)
        unit->logit_scale[threadIdx.x] = status ? 0 : memory.logit_scale[threadIdx.x];
    if (threadIdx.x > 0)
        return;
    unit->item = item_idx;
    unit->head = head;
    unit->layer = item.layer;
    unit->session = item.session;
    unit->status = status;
    unit->n_blocks = n_blocks;
    unit->block_first = launch->block_first[item_idx] + head * n_of_item;
    unit->partial_first = partial_first(launch, item_idx, head);
    if (!status)
        unit->n_tail_groups = tail_groups_of(view, item);
    unit->n_chunks = max(1u, (n_blocks + WINNOW_GPU_CHUNK_BLOCKS - 1) / WINNOW_GPU_CHUNK_BLOCKS);
}

/* The warp's block of a group. */
struct tail_place {
    const uint8_t *block;
    uint32_t n_tokens; /* 0: there is none */
    bool is_new;       /* the new token's */
};

__device__ tail_place tail_place_of(const winnow_gpu_view &view, const winnow_gpu_item &item,
                                    uint32_t head, uint32_t group)
{
    tail_blocks tail = tail_blocks_of(view, item);
    uint32_t i = GROUP * group + threadIdx.x / 32, number = tail_block_number(tail, i);

    if (i >= tail.n)
        return {};
    return {tail_block_at(view, item, head, number), tail_block_tokens(item, number),
            i + 1 == tail.n && item.k};
}

/* A thread block's groups of a unit: blockIdx.y, + gridDim.y, .. */
template <class F>
__device__ void unit_attend(const winnow_gpu_view &view, const winnow_gpu_item &item,
                            uint32_t unit_idx, tail_memory<F> *memory)
{
    uint32_t item_idx = unit_idx / view.n_kv_heads, head = unit_idx % view.n_kv_heads;
    bool is_valid = item_is_valid(view, item), is_first = blockIdx.y == 0;
    uint32_t n_groups = is_valid ? tail_groups_of(view, item) : 0;
    uint32_t row = winnow_gpu_partial_floats(&view);
    float *partial = view.partial + (uint64_t)partial_first(view.launch, item_idx, head) * row;
    block_registers<F> x;
    float ln_m[F::PER_LANE];

    if (!is_first && blockIdx.y >= n_groups)
        return;
    tail_place place = {};
    if (is_valid)
        place = tail_place_of(view, item, head, blockIdx.y);
    if (place.n_tokens && !place.is_new)
        block_load<F>(view, place.block, x);
    if (is_first)
        words_zero(view.unit + unit_idx, sizeof *view.unit);
    bool is_bad = __syncthreads_or(is_valid && !inputs_are_finite(view, item));
    uint32_t status = !is_valid ? EIO_STATUS : is_bad ? EDOM_STATUS : 0;
    if (!status) {
        queries_split<F>(view, item, head, memory);
        if (item.k && (n_groups - 1) % gridDim.y == blockIdx.y)
            token_append(view, item, head);
    }
    __syncthreads();
    if (is_first)
        unit_write<F>(view, item, unit_idx, status, *memory);
    if (status)
        return;
    for (uint32_t group = blockIdx.y; group < n_groups; group += gridDim.y) {
        if (group != blockIdx.y)
            place = tail_place_of(view, item, head, group);
        if (place.n_tokens && (place.is_new || group != blockIdx.y))
            block_load<F>(view, place.block, x);
        if (place.n_tokens)
            block_attend<F, true>(view, memory->logit_scale, (const uint2 *)memory->q_fragment,
                                  place.n_tokens, x, &memory->group, ln_m);
        else
            block_absent<F>(&memory->group);
        __syncthreads();
        group_join<F>(view, &memory->group, true, NULL, partial + (uint64_t)group * row);
        __syncthreads();
    }
}

template <class F>
__global__ void __launch_bounds__(F::TAIL_THREADS, F::BLOCKS_PER_SM)
    tail_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    bool is_first = blockIdx.x == 0 && blockIdx.y == 0;

    later_kernel_launch();
    if (is_first)
        words_zero(view.queue, sizeof *view.queue);
    /* asked for beside n_units; read where there is none, not used */
    winnow_gpu_item item = view.launch->item[blockIdx.x / view.n_kv_heads];
    if (blockIdx.x < view.launch->n_units)
        unit_attend<F>(view, item, blockIdx.x, (tail_memory<F> *)dynamic);
    if (is_first)
        earlier_kernels_wait();
}

template <class F>
cudaError_t tail_put(const struct winnow_gpu_view *view, const struct winnow_gpu_grid *grid,
                     bool is_beside, cudaStream_t stream)
{
    uint32_t n_groups = (view->n_sink_blocks + view->ring_blocks + GROUP - 1) / GROUP;
    dim3 n_blocks(grid->n_units_max, n_groups < 16 ? n_groups : 16);

    if (is_beside)
        return launch_behind(tail_kernel<F>, n_blocks, sizeof(tail_memory<F>), stream, *view);
    tail_kernel<F><<<n_blocks, ATTEND_THREADS, sizeof(tail_memory<F>), stream>>>(*view);
    return cudaGetLastError();
}

} // namespace

cudaError_t winnow_gpu_stage_tail(const struct winnow_gpu_view *view,
                                  const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    return form_call(*view,
                     [&](auto of) { return tail_put<decltype(of)>(view, grid, true, stream); });
}

cudaError_t winnow_gpu_stage_tail_first(const struct winnow_gpu_view *view,
                                        const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    return form_call(*view,
                     [&](auto of) { return tail_put<decltype(of)>(view, grid, false, stream); });
}

cudaError_t winnow_gpu_tail_prepare(const struct winnow_gpu_view *view)
{
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        return kernel_beside_prepare(tail_kernel<F>, sizeof(tail_memory<F>));
    });
}
