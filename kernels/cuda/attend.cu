/*
 * attend: everything but sinks and tail (work.cuh), to the end of the launch (finish.cuh).
 *
 * A thread block attends a group of eight blocks: a warp loads a block's 8 KiB (d 128) at once, so
 * two thread blocks keep 128 KiB in flight on an SM, which is several times what latency times
 * bandwidth asks for, and while one joins the other loads.
 * Rejected (128K x 8, all hits): loading the next group's blocks before the join of this one (a
 * quarter slower, with 540 bytes of spills; worse with one thread block an SM and 216 registers);
 * blocks through shared memory, and two thread blocks an SM (groups alone 62 us for 45) or three (54).
 */
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/work.cuh>

namespace
{

template <class F>
__global__ void __launch_bounds__(ATTEND_THREADS, F::BLOCKS_PER_SM)
    attend_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    later_kernel_launch();
    work_run<F>(view, (work_memory<F> *)dynamic);
}

} // namespace

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
        return kernel_prepare(attend_kernel<F>, sizeof(work_memory<F>));
    });
}

cudaError_t winnow_gpu_stages_prepare(const struct winnow_gpu_view *view)
{
    cudaError_t (*const prepare[])(const struct winnow_gpu_view *) = {
        winnow_gpu_scan_prepare, winnow_gpu_tail_prepare, winnow_gpu_select_prepare,
        winnow_gpu_attend_prepare};

    for (auto one : prepare) {
        cudaError_t rc = one(view);
        if (rc != cudaSuccess)
            return rc;
    }
    return cudaSuccess;
}
