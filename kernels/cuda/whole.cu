/*
 * whole: in the place of scan and select, for launches that attend everything. Each block of a unit
 * is listed, in order, with its slot or its home, and all groups are ready: what a first round does
 * with a selection does the rest, in the same order, by the same code.
 *
 * The cache is looked at and left alone. Placing what is missing would sweep it for blocks that the
 * next sparse step does not want, and stamping what is there would make all of it equally recent.
 * What has no slot is read from the host by those who attend it: with nothing to place, fetchers
 * would only carry it twice. No estimate stands in for a block on disk: without it the certificate
 * is 0.
 */
#include <kernels/cuda/cache.cuh>
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/stage.h>

namespace
{

constexpr uint32_t PARTS_MAX = 16, PART_BLOCKS_MIN = 512; /* thread blocks a unit */

/* By one thread: the unit as select leaves one whose selection is everything. */
__device__ void unit_write(const winnow_gpu_view &view, uint32_t unit_idx)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;

    unit->n_selected = unit->n_blocks;
    unit->n_groups = unit->n_blocks / GROUP; /* spans are whole groups */
    unit->n_chunks = unit->n_blocks == 0;
    unit->key_quarter = -INFINITY; /* nothing is left for it to price */
    if (unit->n_chunks)
        view.ready[atomicAdd(&view.queue->n_ready, 1)] = {unit_idx, WINNOW_GPU_WORK_CHUNK};
}

/* A block a thread, from `first` on, up to the n of the unit. */
__device__ void blocks_list(const winnow_gpu_view &view, const winnow_gpu_place &place,
                            uint32_t unit_idx, uint32_t first, uint32_t n)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const uint32_t *slots = view.session_segments + place.session * view.n_session_segments_max;
    uint32_t block = first + threadIdx.x, n_here = min(n - first, (uint32_t)ATTEND_THREADS);
    bool is_device = false, is_disk = false;
    __shared__ uint32_t ready_first;

    if (block < n) {
        uint32_t at = winnow_gpu_look(view, place, slots[block / view.span_blocks], block);
        view.listed[unit->block_first + block] = {block, at};
        is_device = !(at & WINNOW_GPU_FROM_HOST);
        is_disk = at == WINNOW_GPU_ON_DISK;
    }
    uint32_t n_device = __syncthreads_count(is_device), n_disk = __syncthreads_count(is_disk);
    if (threadIdx.x == 0) {
        ready_first = atomicAdd(&view.queue->n_ready, n_here / GROUP);
        atomicAdd(&unit->n_device, n_device);
        atomicAdd(&unit->n_host, n_here - n_device - n_disk);
        atomicAdd(&unit->n_unfit, n_here - n_device - n_disk);
        atomicAdd(&unit->n_disk, n_disk);
        if (n_disk)
            atomicOr(&unit->has_unknown, 1);
    }
    __syncthreads();
    if (threadIdx.x < n_here / GROUP)
        view.ready[ready_first + threadIdx.x] = {unit_idx, first / GROUP + threadIdx.x};
}

__global__ void __launch_bounds__(ATTEND_THREADS)
    whole_kernel(const __grid_constant__ winnow_gpu_view view)
{
    uint32_t unit_idx = blockIdx.x;

    later_kernel_launch();
    earlier_kernels_wait();
    if (unit_idx >= view.launch->n_units || view.unit[unit_idx].status != 0)
        return;
    const winnow_gpu_unit *unit = view.unit + unit_idx;
    winnow_gpu_place place = {view.launch->item[unit->item].session, unit->layer, unit->head, 0};
    uint32_t n = unit->n_blocks;
    if (blockIdx.y == 0 && threadIdx.x == 0)
        unit_write(view, unit_idx);
    for (uint32_t first = blockIdx.y * ATTEND_THREADS; first < n;
         first += gridDim.y * ATTEND_THREADS)
        blocks_list(view, place, unit_idx, first, n);
}

} // namespace

cudaError_t winnow_gpu_stage_whole(const struct winnow_gpu_view *view,
                                   const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    uint64_t n_parts = grid->n_blocks_max / grid->n_units_max / PART_BLOCKS_MIN;

    n_parts = n_parts < 1 ? 1 : n_parts > PARTS_MAX ? PARTS_MAX : n_parts;
    return launch_behind(whole_kernel, dim3(grid->n_units_max, (uint32_t)n_parts), 0, stream,
                         *view);
}
