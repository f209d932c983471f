/*
 * more: the second round. What short units read further is listed (list_more.cu), then the round's
 * work is done as the first one's was. Without a short unit a thread block reads a word and ends. The
 * last one writes the items' certificates and completes the launch.
 */
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/work.cuh>

namespace
{

/* NaN into all of an item's output, by one warp: in every type, all bits set. */
__device__ void item_poison(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    uint32_t n_words = view.n_q_heads * view.v_width / (view.io_dtype == WINNOW_FP32 ? 1 : 2);

    for (uint32_t i = lane_id(); i < n_words; i += 32)
        ((uint32_t *)item.out)[i] = ~0u;
    for (uint32_t i = lane_id(); item.lse && i < view.n_q_heads; i += 32)
        item.lse[i] = NAN;
}

/* The blocks of an item that no slot holds, by one warp, in order. */
__device__ void item_list_disk(const winnow_gpu_view &view, const winnow_gpu_item &item,
                               const winnow_gpu_unit *units)
{
    uint32_t n = 0, lane = lane_id();

    for (uint32_t h = 0; h < view.n_kv_heads; h++) {
        const winnow_gpu_unit *unit = units + h;
        uint32_t n_listed = __ldcg(&unit->n_selected) + __ldcg(&unit->n_more);
        if (!__ldcg(&unit->n_disk) && !__ldcg(&unit->n_unfit))
            continue;
        for (uint32_t first = 0; first < n_listed; first += 32) {
            winnow_gpu_listed listed = {0, 0};
            if (first + lane < n_listed) {
                uint2 x = __ldcg((const uint2 *)(view.listed + unit->block_first + first + lane));
                listed = {x.x, x.y};
            }
            /* from the host, on disk (all bits), or staged: none of the cache's slots */
            bool is_slotless = listed.place >= view.n_layers * view.n_slots_layer;
            uint32_t all = __ballot_sync(~0u, is_slotless);
            uint32_t at = n + __popc(all & ((1u << lane) - 1));
            if (is_slotless && at < item.n_disk_block_max)
                item.disk_block[at] = h * unit->n_blocks + listed.block;
            n += __popc(all);
        }
    }
}

/* An item's certificate, by one warp. */
__device__ void item_finish(const winnow_gpu_view &view, uint32_t item_idx)
{
    const winnow_gpu_item &item = view.launch->item[item_idx];
    const winnow_gpu_unit *units = view.unit + item_idx * view.n_kv_heads;
    winnow_gpu_certificate c = {0, 1, INFINITY, 0, 0, 0, 0, 0, 0}, *to = item.certificate;
    uint32_t lane = lane_id();

    for (uint32_t i = lane; i < view.n_q_heads; i += 32) {
        float mass = __ldcg(&units[i / view.n_group].mass[i % view.n_group]);
        c.mass_reached = fminf(c.mass_reached, mass);
        c.mass_mean += mass;
    }
    for (uint32_t h = lane; h < view.n_kv_heads; h += 32) {
        const winnow_gpu_unit *unit = units + h;
        c.status = max(c.status, __ldcg(&unit->status));
        c.n_rounds = max(c.n_rounds, __ldcg(&unit->n_more) > 0 ? 2 : 1);
        c.n_blocks_device += __ldcg(&unit->n_device);
        c.n_blocks_host += __ldcg(&unit->n_host);
        if (view.n_ahead > 0 && __ldcg(&unit->n_host) == 0)
            view.past[(item.session * view.n_layers + item.layer) * view.n_kv_heads + h]
                .key_foreseen = INFINITY; /* nothing is missing: nothing to look for */
        c.n_blocks_unfit += __ldcg(&unit->n_unfit);
        c.n_blocks_disk += __ldcg(&unit->n_disk);
        c.n_heads_spent += item.n_blocks_max &&
                           __ldcg(&unit->n_selected) + __ldcg(&unit->n_more) >= item.n_blocks_max;
    }
    for (int offset = 1; offset < 32; offset *= 2) {
        c.mass_reached = fminf(c.mass_reached, __shfl_xor_sync(~0u, c.mass_reached, offset));
        c.mass_mean += __shfl_xor_sync(~0u, c.mass_mean, offset);
    }
    c.mass_mean /= (float)view.n_q_heads;
    c.status = __reduce_max_sync(~0u, c.status);
    c.n_rounds = __reduce_max_sync(~0u, c.n_rounds);
    c.n_blocks_device = __reduce_add_sync(~0u, c.n_blocks_device);
    c.n_blocks_host = __reduce_add_sync(~0u, c.n_blocks_host);
    c.n_blocks_unfit = __reduce_add_sync(~0u, c.n_blocks_unfit);
    c.n_blocks_disk = __reduce_add_sync(~0u, c.n_blocks_disk);
    c.n_heads_spent = __reduce_add_sync(~0u, c.n_heads_spent);
    if (c.status) {
        c = {c.status, 1};
        item_poison(view, item);
    }
    if (lane == 0)
        *to = c;
    if (c.n_blocks_disk > 0 && item.disk_block)
        item_list_disk(view, item, units);
}

/* When all units are done, by one thread block: a warp an item. */
__device__ void launch_finish(const winnow_gpu_view &view, uint32_t n_items)
{
    uint32_t stamp = view.launch->stamp;

    for (uint32_t i = threadIdx.x / 32; i < n_items; i += GROUP)
        item_finish(view, i);
    __syncthreads();
    if (threadIdx.x == 0 && view.done) {
        __threadfence_system();
        *view.done = stamp;
    }
}

template <class F>
__global__ void __launch_bounds__(ATTEND_THREADS, F::BLOCKS_PER_SM)
    more_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    __shared__ uint32_t is_last;

    uint32_t n_items = view.launch->n_items; /* of before this launch's kernels */
    earlier_kernels_wait();
    uint32_t n_short = view.queue[0].n_short;
    if (n_short > 0)
        work_run<F, false>(view, &view.queue[1], (work_memory<F> *)dynamic);
    if (n_short > 0 ? count_done(&view.queue[1].n_ended, gridDim.x, &is_last) : blockIdx.x == 0)
        launch_finish(view, n_items);
}

} // namespace

cudaError_t winnow_gpu_stage_more(const struct winnow_gpu_view *view,
                                  const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    cudaError_t rc = winnow_gpu_list_more_put(view, grid, stream);
    if (rc != cudaSuccess)
        return rc;
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        uint32_t n_blocks = grid->n_multiprocessors * F::BLOCKS_PER_SM;
        return launch_behind(more_kernel<F>, n_blocks, sizeof(work_memory<F>), stream, *view);
    });
}

cudaError_t winnow_gpu_more_prepare(const struct winnow_gpu_view *view)
{
    cudaError_t rc = winnow_gpu_list_more_prepare(view);
    if (rc != cudaSuccess)
        return rc;
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        return kernel_prepare(more_kernel<F>, sizeof(work_memory<F>));
    });
}

cudaError_t winnow_gpu_stages_prepare(const struct winnow_gpu_view *view)
{
    cudaError_t (*const prepare[])(const struct winnow_gpu_view *) = {
        winnow_gpu_scan_prepare, winnow_gpu_tail_prepare, winnow_gpu_select_prepare,
        winnow_gpu_attend_prepare, winnow_gpu_more_prepare};

    for (auto one : prepare) {
        cudaError_t rc = one(view);
        if (rc != cudaSuccess)
            return rc;
    }
    return cudaSuccess;
}
