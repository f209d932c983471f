/*
 * whole: in the place of scan and select, for launches that attend everything. Each block of a unit
 * is listed, in order, with its slot or its home, and all groups are ready: what a first round does
 * with a selection does the rest, in the same order, by the same code.
 *
 * The cache changes where it was empty alone (cache.cuh). What gets no slot is read from the host by
 * those who attend it. 32K tokens, 8 KV heads, d 128 (130 MB), H100: 2.67 ms without a slot, 49 GB/s
 * of the link; 2.85 when all go into empty ones, .12 the next time; 2.68 beside a full cache. Rejected:
 * no slot at all, which brings the same blocks over at every step. No estimate stands in for a block
 * on disk: without it the certificate is 0.
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

/* Counts the lanes that are meant; a lane's place behind what *n was, in the order of lanes. */
__device__ uint32_t lanes_add(uint32_t *n, bool is_mine)
{
    uint32_t lanes = __ballot_sync(~0u, is_mine), first = 0;

    if (lane_id() == 0 && lanes)
        first = atomicAdd(n, (uint32_t)__popc(lanes));
    return __shfl_sync(~0u, first, 0) + __popc(lanes & ((1u << lane_id()) - 1));
}

/* By a warp: 32 blocks of a unit from `first` on, as far as there are. */
__device__ void blocks_list(const winnow_gpu_view &view, const winnow_gpu_place &place,
                            uint32_t unit_idx, uint32_t first)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const uint32_t *slots = view.session_segments + place.session * view.n_session_segments_max;
    uint32_t block = first + lane_id();
    bool is_there = block < unit->n_blocks, is_group = is_there && block % GROUP == 0;
    winnow_gpu_resolved is = {};

    if (is_there) {
        is = winnow_gpu_resolve(view, place, slots[block / view.span_blocks], block);
        view.listed[unit->block_first + block] = {block, is.place};
    }
    bool is_disk = is_there && is.place == WINNOW_GPU_ON_DISK;
    bool waits = __ballot_sync(~0u, is.has_to_wait) >> lane_id() / GROUP * GROUP & 0xff;
    lanes_add(&unit->n_device, is.is_hit);
    lanes_add(&unit->n_host, is_there && !is.is_hit && !is_disk);
    lanes_add(&unit->n_unfit, is.is_unfit);
    lanes_add(&unit->n_disk, is_disk);
    if (is_disk)
        atomicOr(&unit->has_unknown, 1);
    uint32_t fetch = lanes_add(&view.queue->n_fetch, is.has_to_fetch);
    uint32_t ready = lanes_add(&view.queue->n_ready, is_group && !waits);
    uint32_t waiting = lanes_add(&view.queue->n_waiting, is_group && waits);
    if (is.has_to_fetch)
        view.fetch[fetch] = {is.home, is.place};
    if (is_group)
        *(waits ? view.waiting + waiting : view.ready + ready) = {unit_idx, block / GROUP};
}

__global__ void __launch_bounds__(ATTEND_THREADS)
    whole_kernel(const __grid_constant__ winnow_gpu_view view)
{
    uint32_t unit_idx = blockIdx.x;

    later_kernel_launch();
    earlier_kernels_wait();
    if (unit_idx >= view.launch->n_units)
        return;
    const winnow_gpu_unit *unit = view.unit + unit_idx;
    winnow_gpu_place place = {view.launch->item[unit->item].session, unit->layer, unit->head,
                              view.launch->stamp, true};
    if (blockIdx.y == 0 && threadIdx.x == 0)
        unit_write(view, unit_idx);
    for (uint32_t first = blockIdx.y * ATTEND_THREADS + threadIdx.x / 32 * 32;
         first < unit->n_blocks; first += gridDim.y * ATTEND_THREADS)
        blocks_list(view, place, unit_idx, first);
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
