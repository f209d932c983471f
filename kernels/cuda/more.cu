/*
 * more: the second round. Thread blocks take the units one by one and list what the short ones read
 * further; when all lists are there, the round's work is done as the first one's was. Who waits for
 * a list waits for a running thread block. Without a short unit a thread block reads a word and ends.
 */
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/select.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/work.cuh>

namespace
{

__device__ void units_list(const winnow_gpu_view &view, uint8_t *memory)
{
    winnow_gpu_queue *queue = &view.queue[1];
    uint32_t n_units = view.launch->n_units;
    __shared__ uint32_t taken;

    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0)
            taken = atomicAdd(&queue->unit_next, 1);
        __syncthreads();
        if (taken >= n_units)
            return;
        if (!view.unit[taken].is_short)
            continue;
        winnow_gpu_select_more(view, taken, memory);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&queue->n_listed, 1);
        }
    }
}

__device__ void lists_wait(const winnow_gpu_queue *queue, uint32_t n_short)
{
    if (threadIdx.x == 0) {
        uint32_t n;
        do
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                         : "=r"(n)
                         : "l"(&queue->n_listed)
                         : "memory");
        while (n < n_short);
    }
    __syncthreads();
}

template <class F>
__global__ void __launch_bounds__(ATTEND_THREADS, F::BLOCKS_PER_SM)
    more_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    earlier_kernels_wait();
    uint32_t n_short = view.queue[0].n_short;

    if (n_short == 0)
        return;
    units_list(view, dynamic);
    lists_wait(&view.queue[1], n_short);
    work_run<F, false>(view, &view.queue[1], (work_memory<F> *)dynamic);
}

template <class F> uint32_t memory_bytes(const winnow_gpu_view *view)
{
    uint32_t n_bytes = winnow_gpu_select_more_bytes(view->n_group);
    return n_bytes > sizeof(work_memory<F>) ? n_bytes : (uint32_t)sizeof(work_memory<F>);
}

} // namespace

cudaError_t winnow_gpu_stage_more(const struct winnow_gpu_view *view,
                                  const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        uint32_t n_blocks = grid->n_multiprocessors * F::BLOCKS_PER_SM;
        return launch_behind(more_kernel<F>, n_blocks, memory_bytes<F>(view), stream, *view);
    });
}

cudaError_t winnow_gpu_more_prepare(const struct winnow_gpu_view *view)
{
    return form_call(*view, [&](auto of) {
        using F = decltype(of);
        return cudaFuncSetAttribute(more_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)memory_bytes<F>(view));
    });
}

cudaError_t winnow_gpu_stages_prepare(const struct winnow_gpu_view *view)
{
    cudaError_t (*const prepare[])(const struct winnow_gpu_view *) = {
        winnow_gpu_scan_prepare, winnow_gpu_select_prepare, winnow_gpu_attend_prepare,
        winnow_gpu_more_prepare};

    for (auto one : prepare) {
        cudaError_t rc = one(view);
        if (rc != cudaSuccess)
            return rc;
    }
    return cudaSuccess;
}
