/*
 * list_more: what short units read further, the first kernel of the second round.
 *
 * A unit is a team's, as in select; one that is not short costs its thread blocks a look. Goes on by
 * bins of 1/64 nat below the first round until every query head has got need[g] by estimate, or the
 * budget ends it. Then: selected = 2; listed [n_selected, + n_more) in list order, each with its
 * place; n_more, n_groups_more, key_threshold, has_unknown, n_device, n_host, n_unfit, n_disk
 * brought up to date; queue[1]: fetches, groups and all chunks pushed (view.fetch, ready, waiting
 * from 0).
 *
 * Rejected: one thread block of `more` a unit, 256 threads over all its blocks: 100 us at 8,192
 * blocks, 130 at 32,704, for four layer-steps in ten.
 */
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/list.cuh>
#include <kernels/cuda/stage.h>

using namespace winnow_gpu_select;

namespace
{

constexpr int N_THREADS = 1024;

/* What a thread block works on. */
struct part {
    winnow_gpu_unit *unit;
    uint32_t first, n; /* of the unit's list: [first, first + n) */
    float origin;      /* keys from here on were listed by the first round */
    bool is_origin_new;
};

/* Of a block that the first round did not list, on disk or not; NaN of others. */
__device__ float key_new(const winnow_gpu_view &view, const part &part, uint32_t block_first,
                         uint32_t b)
{
    float key = view.key[block_first + b];
    return key < part.origin || (part.is_origin_new && key == part.origin) ? key : NAN;
}

__device__ part part_find(const winnow_gpu_view &view, winnow_gpu_unit *unit, team *team)
{
    uint32_t n = unit->n_blocks, ranks_log2 = team_ranks_log2(*team, n);
    bool has_first = unit->n_selected > 0;

    team->n_ranks = 1u << ranks_log2;
    uint32_t first = n * team->rank >> ranks_log2;
    return {unit, first, (n * (team->rank + 1) >> ranks_log2) - first,
            has_first ? unit->key_threshold : unit->key_largest, !has_first};
}

/* Ends with the team's barrier: no bin is added to before all are clear. */
__device__ void memory_begin(const winnow_gpu_view &view, team team, const part &part,
                             const list &list, memory *memory)
{
    memory_clear(view.n_group, memory);
    segments_load(view, list, memory);
    __syncthreads();
    if (threadIdx.x < view.n_group) {
        uint64_t total = part.unit->total[threadIdx.x];
        float to_share = total ? __fdiv_rn(FIXED_ONE, __ull2float_rn(total)) : 0;
        memory->to_share[threadIdx.x] = to_share;
        memory->goal[threadIdx.x] = share_word(fmaxf(part.unit->need[threadIdx.x], 0) * to_share);
        memory->m[threadIdx.x] = part.unit->largest[threadIdx.x];
    }
    if (threadIdx.x == 0) {
        memory->bin_last = -1;
        memory->origin = part.origin;
        memory->ln_cut = -INFINITY;
        memory->key_smallest = ~0u;
    }
    team_sync(team);
}

__device__ void block_add(const winnow_gpu_view &view, uint32_t block, uint32_t bin, memory *memory)
{
    const float *ln_e = view.ln_e + (size_t)block * view.n_group;

    atomicAdd(bins_of(memory, view.n_group) + bin, 1);
    for (uint32_t g = 0; g < view.n_group; g++) {
        float e = exp_above(ln_e[g], memory->m[g]);
        atomicAdd(bins_of(memory, g) + bin, share_word(__fmul_rn(e, memory->to_share[g])));
    }
}

__global__ void __launch_bounds__(N_THREADS, 1)
    list_more_kernel(const __grid_constant__ winnow_gpu_view view)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    memory *memory = (struct memory *)dynamic;
    team team = {blockIdx.x, gridDim.x};
    uint32_t unit_idx = blockIdx.z * view.n_kv_heads + blockIdx.y;
    winnow_gpu_unit *unit = view.unit + unit_idx;

    later_kernel_launch();
    earlier_kernels_wait();
    if (view.queue[0].n_short == 0 || unit_idx >= view.launch->n_units || !unit->is_short)
        return;
    part part = part_find(view, unit, &team);
    if (team.rank >= team.n_ranks)
        return;
    const winnow_gpu_item &item = view.launch->item[unit->item];
    uint32_t n = unit->n_blocks, n_first = unit->n_selected, block_first = unit->block_first;
    uint32_t n_max = item.n_blocks_max == 0 || item.n_blocks_max > n ? n : item.n_blocks_max;
    list list = {{item.session, unit->layer, unit->head, view.launch->stamp},
                 unit_idx,
                 block_first,
                 2,
                 n_first,
                 unit->n_groups,
                 item.n_segments};
    memory_begin(view, team, part, list, memory);
    if (team.rank == 0 && threadIdx.x < 32)
        chunks_push(view, unit_idx, 2);
    for (uint32_t b = part.first + threadIdx.x; b < part.first + part.n; b += N_THREADS) {
        float key = key_new(view, part, block_first, b);
        uint32_t class_b = class_of(key, part.origin, -INFINITY);
        if (class_b != CLASS_NEVER)
            block_add(view, block_first + b, class_b - 1, memory);
    }
    selection_find(team, view.n_group, n_max - n_first, memory);
    listed_run mine =
        list_write<N_THREADS>(view, team, list, part.first, part.n, memory,
                              [&](uint32_t b) { return key_new(view, part, block_first, b); });
    list_resolve(view, list, mine, memory->n_selected, memory);
    if (threadIdx.x > 0)
        return;
    counts_write(view, unit, list.unit.layer, memory);
    if (team.rank > 0)
        return;
    unit->n_more = memory->n_selected;
    unit->n_groups_more = (memory->n_selected + 7) / 8;
    if (memory->n_selected)
        unit->key_threshold = rank_float(memory->key_smallest);
}

} // namespace

cudaError_t winnow_gpu_list_more_prepare(const struct winnow_gpu_view *view)
{
    return cudaFuncSetAttribute(list_more_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)memory_bytes(view->n_group, 0));
}

cudaError_t winnow_gpu_list_more_put(const struct winnow_gpu_view *view,
                                     const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    return team_launch(list_more_kernel, grid, view->n_kv_heads, N_THREADS,
                       memory_bytes(view->n_group, 0), stream, *view);
}
