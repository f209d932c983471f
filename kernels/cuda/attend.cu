/*
 * tail: sinks and tail attended, so that selection knows the mass that is there already.
 * attend: everything else of the first round (work.cuh).
 *
 * A thread block attends a group of eight blocks: a warp loads a block's 8 KiB (d 128) at once, so
 * two thread blocks keep 128 KiB in flight on an SM, which is several times what latency times
 * bandwidth asks for, and while one joins the other loads.
 * Rejected: loading the next group's blocks before the join of this one (128K x 8, all hits: 215 us
 * for 171, with 540 bytes of spills; 287 with one thread block an SM and 216 registers).
 */
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/tail.cuh>
#include <kernels/cuda/work.cuh>

namespace
{

template <class F>
__device__ void tail_group(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t group,
                           group_memory<F> *memory)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const winnow_gpu_item &item = view.launch->item[unit->item];
    tail_blocks tail = tail_blocks_of(view, item);
    uint32_t i = GROUP * group + threadIdx.x / 32;
    block_registers<F> x;
    float ln_m[F::PER_LANE];

    if (i >= tail.n) {
        block_absent<F>(memory);
        return;
    }
    uint32_t number = tail_block_number(tail, i);
    block_load<F>(view, tail_block_at(view, item, unit->head, number), x);
    block_attend<F>(view, unit, unit_queries<F>(view, unit_idx), tail_block_tokens(item, number), x,
                    memory, ln_m);
}

template <class F>
__global__ void __launch_bounds__(ATTEND_THREADS, F::BLOCKS_PER_SM)
    tail_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    work_memory<F> *memory = (work_memory<F> *)dynamic;
    __shared__ uint32_t is_last;
    uint32_t unit_idx = blockIdx.x, row = view.n_group * (view.v_width + 2);

    later_kernel_launch();
    earlier_kernels_wait();
    if (unit_idx >= view.launch->n_units)
        return;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const float *partial = view.partial + (uint64_t)unit->partial_first * row;
    uint32_t n_groups = unit->n_tail_groups;
    for (uint32_t group = blockIdx.y; group < n_groups; group += gridDim.y) {
        tail_group<F>(view, unit_idx, group, &memory->group);
        __syncthreads();
        group_join<F>(view, &memory->group, (float *)partial + (uint64_t)group * row);
        if (!count_done(&unit->n_done, n_groups, &is_last))
            continue;
        join_sums<F>(view, {partial, n_groups, n_groups}, &memory->join);
        if (threadIdx.x < view.n_group)
            unit->ln_z[threadIdx.x] =
                memory->join.largest[threadIdx.x] + logf(memory->join.read[threadIdx.x]);
        if (threadIdx.x == 0)
            unit->n_done = 0;
    }
}

template <class F>
__global__ void __launch_bounds__(ATTEND_THREADS, F::BLOCKS_PER_SM)
    attend_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    later_kernel_launch();
    earlier_kernels_wait();
    work_run<F, true>(view, &view.queue[0], (work_memory<F> *)dynamic);
}

} // namespace

cudaError_t winnow_gpu_stage_tail(const struct winnow_gpu_view *view,
                                  const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        uint32_t n_groups = (view->n_sink_blocks + view->ring_blocks + GROUP - 1) / GROUP;
        dim3 n_blocks(grid->n_units_max, n_groups < 16 ? n_groups : 16);
        return launch_behind(tail_kernel<F>, n_blocks, sizeof(work_memory<F>), stream, *view);
    });
}

cudaError_t winnow_gpu_stage_attend(const struct winnow_gpu_view *view,
                                    const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        uint32_t n_blocks = grid->n_multiprocessors * F::BLOCKS_PER_SM;
        return launch_behind(attend_kernel<F>, n_blocks, sizeof(work_memory<F>), stream, *view);
    });
}

cudaError_t winnow_gpu_attend_prepare(const struct winnow_gpu_view *view)
{
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        int n_bytes = (int)sizeof(work_memory<F>);
        cudaError_t rc = cudaFuncSetAttribute(tail_kernel<F>,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
        if (rc != cudaSuccess)
            return rc;
        return cudaFuncSetAttribute(attend_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    n_bytes);
    });
}
