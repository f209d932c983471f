/*
 * tail: sinks and tail attended, so that selection knows the mass that is there already.
 * attend: everything else of the first round (work.cuh).
 *
 * A thread block attends a group of eight blocks: a warp loads a block's 8 KiB (d 128) at once, so
 * two thread blocks keep 128 KiB in flight on an SM, which is several times what latency times
 * bandwidth asks for, and while one joins the other loads.
 * Rejected (128K x 8, all hits): loading the next group's blocks before the join of this one (a
 * quarter slower, with 540 bytes of spills; worse with one thread block an SM and 216 registers);
 * blocks through shared memory, and two thread blocks an SM (groups alone 62 us for 45) or three (54).
 *
 * tail loads what `begin` does not touch while that still runs.
 */
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/tail.cuh>
#include <kernels/cuda/work.cuh>

namespace
{

/* Loads the warp's block of a group, and waits for `begin` before, if that appends to it, or after;
 * true if there is one. */
template <class F>
__device__ bool tail_load(const winnow_gpu_view &view, const winnow_gpu_item &item, uint32_t head,
                          uint32_t group, uint32_t *n_tokens, block_registers<F> &x)
{
    tail_blocks tail = tail_blocks_of(view, item);
    uint32_t i = GROUP * group + threadIdx.x / 32, number = tail_block_number(tail, i);
    bool is_there = i < tail.n, is_new = i + 1 == tail.n && item.k;

    if (is_new)
        earlier_kernels_wait();
    if (is_there) {
        *n_tokens = tail_block_tokens(item, number);
        block_load<F>(view, tail_block_at(view, item, head, number), x);
    }
    if (!is_new)
        earlier_kernels_wait();
    return is_there;
}

template <class F>
__global__ void __launch_bounds__(ATTEND_THREADS, F::BLOCKS_PER_SM)
    tail_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    group_memory<F> *memory = (group_memory<F> *)dynamic;
    __shared__ float of_warp[3][GROUP][F::HEADS];
    __shared__ uint32_t is_last;
    uint32_t unit_idx = blockIdx.x, head = unit_idx % view.n_kv_heads;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    block_registers<F> x;
    float ln_m[F::PER_LANE];
    uint32_t n_tokens;

    if (unit_idx >= view.launch->n_units)
        return;
    const winnow_gpu_item &item = view.launch->item[unit_idx / view.n_kv_heads];
    bool is_valid = item_is_valid(view, item);
    for (uint32_t group = blockIdx.y;; group += gridDim.y) {
        bool is_there = is_valid && tail_load<F>(view, item, head, group, &n_tokens, x);
        earlier_kernels_wait();
        later_kernel_launch();
        uint32_t n_groups = unit->n_tail_groups, row = winnow_gpu_partial_floats(&view);
        if (group >= n_groups)
            return;
        if (is_there)
            block_attend<F>(view, unit, unit_queries<F>(view, unit_idx), n_tokens, x, memory, ln_m);
        else
            block_absent<F>(memory);
        __syncthreads();
        float *partial = view.partial + (uint64_t)unit->partial_first * row;
        group_join<F>(view, memory, partial + (uint64_t)group * row);
        if (count_done(&unit->n_done, n_groups, &is_last)) {
            join_range range = {partial, n_groups, n_groups};
            float2 masses[JOIN_BATCH];
            masses_load<F>(view, range, 0, masses);
            join_mass mass = mass_join<F>(view, range, masses, of_warp);
            if (threadIdx.x < view.n_group)
                unit->ln_z[threadIdx.x] = mass.largest + logf(mass.read);
            if (threadIdx.x == 0)
                unit->n_done = 0;
        }
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
        return launch_behind(tail_kernel<F>, n_blocks, sizeof(group_memory<F>), stream, *view);
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
        cudaError_t rc = kernel_prepare(tail_kernel<F>, sizeof(group_memory<F>));
        return rc == cudaSuccess ? kernel_prepare(attend_kernel<F>, sizeof(work_memory<F>)) : rc;
    });
}
