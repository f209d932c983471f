/*
 * The second round of selection, as a device function for the stage `more`. Static device
 * functions: kernels are linked file by file.
 */
#pragma once

#include <kernels/cuda/list.cuh>

namespace winnow_gpu_select
{

/* Adds an unselected block to the bins of the second round. */
static __device__ void more_add(const winnow_gpu_view &view, const winnow_gpu_unit &unit,
                                uint32_t block, uint32_t bin, memory *memory)
{
    const float *ln_e = view.ln_e + (size_t)(unit.block_first + block) * view.n_group;

    atomicAdd(bins_of(memory, view.n_group) + bin, 1);
    for (uint32_t g = 0; g < view.n_group; g++) {
        float e = exp_above(ln_e[g], unit.largest[g]);
        atomicAdd(bins_of(memory, g) + bin, share_word(__fmul_rn(e, memory->to_share[g])));
    }
}

} // namespace winnow_gpu_select

enum { WINNOW_GPU_SELECT_MORE_THREADS = 256 };

/* Dynamic shared memory that winnow_gpu_select_more takes, 16-byte aligned. */
static inline __host__ __device__ uint32_t winnow_gpu_select_more_bytes(uint32_t n_group)
{
    return winnow_gpu_select::memory_bytes(n_group, 0);
}

/*
 * Called by all WINNOW_GPU_SELECT_MORE_THREADS threads of a thread block, for one short unit. Goes on by bins of
 * 1/64 nat below the first round until every query head has got need[g] by estimate, or the budget
 * ends it. Then: selected = 2; listed [n_selected, + n_more) in list order, each with its place;
 * n_more, n_groups_more, key_threshold, has_unknown, n_device, n_host, n_unfit, n_disk brought up
 * to date; queue[1]: fetches, groups and all chunks pushed (view.fetch, ready, waiting from 0).
 * n_done, n_listed are the caller's. Ends with a barrier; other thread blocks see it after the
 * caller's fence. memory: winnow_gpu_select_more_bytes, shared; free afterwards.
 */
static __device__ void winnow_gpu_select_more(const winnow_gpu_view &view, uint32_t unit_idx,
                                              void *shared)
{
    using namespace winnow_gpu_select;
    memory *memory = (struct memory *)shared;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    uint32_t n = unit->n_blocks, n_first = unit->n_selected, block_first = unit->block_first;
    const winnow_gpu_item &item = view.launch->item[unit->item];
    uint32_t n_max = item.n_blocks_max;
    float origin = n_first ? unit->key_threshold : unit->key_largest;
    bool is_first_in = n_first == 0;
    /* What the first round listed, on disk or not, has a key of key_threshold or more. */
    auto key_at = [&](uint32_t b) {
        float key = view.key[block_first + b];
        bool is_new = key < origin || (is_first_in && key == origin);
        return is_new ? key : NAN;
    };

    n_max = n_max == 0 || n_max > n ? n : n_max;
    __syncthreads();
    memory_clear(view.n_group, memory);
    __syncthreads();
    if (threadIdx.x < view.n_group) {
        uint64_t total = unit->total[threadIdx.x];
        float to_share = total ? __fdiv_rn(FIXED_ONE, __ull2float_rn(total)) : 0;
        memory->to_share[threadIdx.x] = to_share;
        memory->goal[threadIdx.x] = share_word(fmaxf(unit->need[threadIdx.x], 0) * to_share);
    }
    if (threadIdx.x == 0) {
        memory->bin_last = -1;
        memory->origin = origin;
        memory->ln_cut = -INFINITY;
        memory->key_smallest = ~0u;
    }
    if (threadIdx.x < 32)
        chunks_push(view, unit_idx, 2);
    list list = {{item.session, unit->layer, unit->head, view.launch->stamp},
                 unit_idx,
                 block_first,
                 2,
                 n_first,
                 unit->n_groups,
                 item.n_segments};
    segments_load(view, list, memory);
    __syncthreads();
    for (uint32_t b = threadIdx.x; b < n; b += blockDim.x) {
        uint32_t class_b = class_of(key_at(b), origin, -INFINITY);
        if (class_b != CLASS_NEVER)
            more_add(view, *unit, b, class_b - 1, memory);
    }
    selection_find({0, 1}, view.n_group, n_max - n_first, memory);
    listed_run mine =
        list_write<WINNOW_GPU_SELECT_MORE_THREADS>(view, {0, 1}, list, 0, n, memory, key_at);
    list_resolve(view, list, mine, memory->n_selected, memory);
    if (threadIdx.x == 0) {
        unit->n_more = memory->n_selected;
        unit->n_groups_more = (memory->n_selected + 7) / 8;
        if (memory->n_selected)
            unit->key_threshold = rank_float(memory->key_smallest);
        counts_write(view, unit, list.unit.layer, memory);
    }
    __syncthreads();
}
