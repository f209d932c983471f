/*
 * The second round of a unit that fell short of P, as soon as it is known to: in `attend`, while
 * other units are still at their first.
 *
 *   more_begin   its bins are cleared, WORK_FIND of every chunk handed out
 *   more_find    of a chunk's blocks that were not selected, the shares into the unit's bins
 *   more_choose  by the last of them: from the first round's threshold down, so many bins of 1/64 nat
 *                that every query head gets need[g] by estimate, or that the budget ends; WORK_AGAIN of
 *                every chunk handed out
 *   more_list    of a chunk, the blocks in those bins: marked selected 2, listed, resolved, brought in
 *
 * The thread block then attends them, compensates the rest of the chunk anew (what is far has changed
 * with the threshold), and puts both into the chunk's partial. The last joins the unit again. Bins are
 * sums of integers, and what a chunk reads depends on them alone, so nothing depends on who does it
 * or when.
 *
 * Rejected: two kernels behind `attend`, one listing by clusters, one attending and compensating all
 * of a unit anew: 25 to 40 us behind the last unit, and 6 us where none was short.
 */
#pragma once

#include <kernels/cuda/bins.cuh>
#include <kernels/cuda/cache.cuh>
#include <kernels/cuda/fetch.cuh>

constexpr uint64_t WORK_END = ~UINT64_C(0);
constexpr uint32_t MORE_HALVES = WINNOW_GPU_CHUNK_BLOCKS / ATTEND_THREADS; /* blocks of a thread */

/* A block that the second round reads of a chunk. */
struct more_block {
    uint32_t block, place, home, slot; /* slot ~0: nothing to fetch */
};

/* What the second round chooses from: keys below the first round's. */
struct more_range {
    float threshold, origin; /* origin: of the bins */
    bool has_threshold;      /* that key itself was not selected */
};

__device__ inline more_range more_range_of(const winnow_gpu_unit *unit)
{
    float threshold = __ldcg(&unit->more_threshold);
    return {threshold, fminf(threshold, unit->key_largest), unit->n_selected == 0};
}

/* The bin of a block, or ~0: the first round had it. */
__device__ inline uint32_t more_bin(const more_range &range, float key)
{
    using namespace winnow_gpu_select;
    bool is_new = key < range.threshold || (range.has_threshold && key == range.threshold);
    return is_new && key < INFINITY ? class_of(key, range.origin, -INFINITY) - 1 : ~0u;
}

__device__ inline uint32_t *more_bins(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t row)
{
    return view.bins + ((uint64_t)unit_idx * (view.n_group + 1) + row) * WINNOW_GPU_BINS;
}

__device__ inline float more_to_share(const winnow_gpu_unit *unit, uint32_t g)
{
    uint64_t total = unit->total[g];
    return total ? __fdiv_rn(winnow_gpu_select::FIXED_ONE, __ull2float_rn(total)) : 0;
}

/* Hands out a kind of work for every chunk of a unit. All threads; what they wrote is seen. */
__device__ inline void more_hand_out(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t kind)
{
    uint32_t n = view.unit[unit_idx].n_chunks, first = 0;

    __syncthreads();
    if (threadIdx.x >= 32)
        return;
    if (lane_id() == 0)
        first = atomicAdd(&view.queue->n_more, n);
    first = __shfl_sync(~0u, first, 0);
    for (uint32_t i = lane_id(); i < n; i += 32) {
        uint64_t work = (uint64_t)(kind | i) << 32 | unit_idx;
        asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(view.more + first + i), "l"(work)
                     : "memory");
    }
}

__device__ inline void more_begin(const winnow_gpu_view &view, uint32_t unit_idx)
{
    uint4 *bins = (uint4 *)more_bins(view, unit_idx, 0);

    for (uint32_t i = threadIdx.x; i < (view.n_group + 1) * WINNOW_GPU_BINS / 4;
         i += ATTEND_THREADS)
        __stcg(bins + i, make_uint4(0, 0, 0, 0));
    if (threadIdx.x == 0) {
        view.unit[unit_idx].more_threshold = view.unit[unit_idx].key_threshold;
        view.unit[unit_idx].n_done = 0;
    }
    more_hand_out(view, unit_idx, WINNOW_GPU_WORK_FIND);
}

__device__ inline void more_find(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t chunk)
{
    using namespace winnow_gpu_select;
    constexpr int N_LOADS = 4;
    __shared__ float to_share[WINNOW_GQA_MAX], largest[WINNOW_GQA_MAX];
    const winnow_gpu_unit *unit = view.unit + unit_idx;
    uint64_t first = (uint64_t)unit->block_first + WINNOW_GPU_CHUNK_BLOCKS * chunk + threadIdx.x;
    uint64_t end = (uint64_t)unit->block_first + unit->n_blocks;
    more_range range = more_range_of(unit);
    uint32_t bin[MORE_HALVES];

#pragma unroll
    for (uint32_t half = 0; half < MORE_HALVES; half++) {
        uint64_t at = first + ATTEND_THREADS * half;
        bin[half] = more_bin(range, at < end ? __ldg(view.key + at) : NAN);
    }
    if (threadIdx.x < view.n_group) {
        to_share[threadIdx.x] = more_to_share(unit, threadIdx.x);
        largest[threadIdx.x] = unit->largest[threadIdx.x];
    }
    __syncthreads();
#pragma unroll
    for (uint32_t half = 0; half < MORE_HALVES; half++) {
        const float *ln_e = view.ln_e + (first + ATTEND_THREADS * half) * view.n_group;
        uint32_t *bins = more_bins(view, unit_idx, 0) + bin[half];
        if (bin[half] == ~0u)
            continue;
        atomicAdd(bins + view.n_group * WINNOW_GPU_BINS, 1);
#pragma unroll 1
        for (uint32_t g_first = 0; g_first < view.n_group; g_first += N_LOADS) {
            float x[N_LOADS];
#pragma unroll
            for (uint32_t k = 0; k < N_LOADS; k++)
                x[k] = __ldg(ln_e + min(g_first + k, view.n_group - 1));
#pragma unroll
            for (uint32_t k = 0; k < N_LOADS; k++) {
                uint32_t g = g_first + k;
                if (g < view.n_group)
                    atomicAdd(bins + g * WINNOW_GPU_BINS,
                              share_word(__fmul_rn(exp_above(x[k], largest[g]), to_share[g])));
            }
        }
    }
}

/* The bin at which a row reaches the goal, the last if it does not, and its sum before. One warp. */
__device__ inline winnow_gpu_select::bin_place more_reach(const uint32_t *row, uint32_t goal)
{
    using namespace winnow_gpu_select;
    uint32_t sum = 0, below = 0;

#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        uint4 x = __ldcg((const uint4 *)row + 8 * lane_id() + i);
        sum += x.x + x.y + x.z + x.w;
    }
    uint32_t first = 32 * lane_reaching(sum, goal, &below);
    uint32_t bin = first + lane_reaching(__ldcg(row + first + lane_id()), goal, &below);
    return {bin, below};
}

__device__ inline void more_choose(const winnow_gpu_view &view, uint32_t unit_idx)
{
    using namespace winnow_gpu_select;
    __shared__ int32_t bin_last;
    __shared__ bin_place of_budget;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    uint32_t n_max = view.launch->item[unit->item].n_blocks_max;

    n_max = n_max ? min(n_max, unit->n_blocks) : unit->n_blocks;
    n_max -= unit->n_selected;
    if (threadIdx.x == 0)
        bin_last = -1;
    __syncthreads();
#pragma unroll 1
    for (uint32_t row = threadIdx.x / 32; row <= view.n_group; row += GROUP) {
        bool is_count = row == view.n_group;
        uint32_t goal = n_max;
        if (!is_count)
            goal = share_word(__fmul_rn(__ldcg(&unit->need[row]), more_to_share(unit, row)));
        if (goal == 0)
            continue;
        bin_place place = more_reach(more_bins(view, unit_idx, row), goal);
        if (lane_id() == 0 && is_count)
            of_budget = place;
        else if (lane_id() == 0)
            atomicMax(&bin_last, (int32_t)place.bin);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        bool is_budget = (int32_t)of_budget.bin <= bin_last;
        uint32_t end = is_budget ? of_budget.bin : (uint32_t)(bin_last + 1),
                 n_bins = end + is_budget;
        unit->more_end = end;
        unit->more_of = is_budget ? n_max - of_budget.below : 0;
        if (n_bins > 0)
            unit->key_threshold =
                __fmaf_rn((float)n_bins, -1 / BINS_NAT, more_range_of(unit).origin);
        unit->n_done = 0;
    }
    more_hand_out(view, unit_idx, WINNOW_GPU_WORK_AGAIN);
}

/* Blocks of a bin before `end`. All threads get it. */
__device__ inline uint32_t more_count(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                      uint32_t bin, uint32_t end)
{
    __shared__ uint32_t n_all;
    more_range range = more_range_of(unit);
    uint32_t n = 0;

    if (threadIdx.x == 0)
        n_all = 0;
    __syncthreads();
    for (uint32_t b = threadIdx.x; b < end; b += ATTEND_THREADS)
        n += more_bin(range, __ldg(view.key + unit->block_first + b)) == bin;
    n = __reduce_add_sync(~0u, n);
    if (lane_id() == 0)
        atomicAdd(&n_all, n);
    __syncthreads();
    return n_all;
}

/* The blocks of a chunk that the bins chose, in list order, into listed: how many. */
__device__ inline uint32_t more_pick(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                     uint32_t chunk, more_block *listed)
{
    __shared__ uint32_t of_warp[2][MORE_HALVES * GROUP]; /* sure, maybe */
    uint32_t first = WINNOW_GPU_CHUNK_BLOCKS * chunk, warp = threadIdx.x / 32, lane = lane_id();
    uint32_t end = __ldcg(&unit->more_end), n_of_end = __ldcg(&unit->more_of);
    uint32_t below = (1u << lane) - 1, lanes[2][MORE_HALVES];
    uint32_t n_before = n_of_end ? more_count(view, unit, end, first) : 0;
    uint32_t taken_before = min(n_before, n_of_end);
    more_range range = more_range_of(unit);

#pragma unroll
    for (uint32_t half = 0; half < MORE_HALVES; half++) {
        uint32_t b = first + ATTEND_THREADS * half + threadIdx.x, bin = ~0u;
        if (b < unit->n_blocks)
            bin = more_bin(range, __ldg(view.key + unit->block_first + b));
        lanes[0][half] = __ballot_sync(~0u, bin < end);
        lanes[1][half] = __ballot_sync(~0u, bin == end && n_of_end > 0);
        if (lane == 0) {
            of_warp[0][GROUP * half + warp] = __popc(lanes[0][half]);
            of_warp[1][GROUP * half + warp] = __popc(lanes[1][half]);
        }
    }
    __syncthreads();
    uint32_t n[2], before[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        n[k] = lane < MORE_HALVES * GROUP ? of_warp[k][lane] : 0;
        before[k] = winnow_gpu_select::warp_scan(n[k]) - n[k];
        n[k] = __reduce_add_sync(~0u, n[k]);
    }
#pragma unroll
    for (uint32_t half = 0; half < MORE_HALVES; half++) {
        uint32_t cell = GROUP * half + warp;
        uint32_t sure = __shfl_sync(~0u, before[0], cell) + __popc(lanes[0][half] & below);
        uint32_t maybe = __shfl_sync(~0u, before[1], cell) + __popc(lanes[1][half] & below);
        bool is_sure = lanes[0][half] >> lane & 1;
        bool is_maybe = lanes[1][half] >> lane & 1 && n_before + maybe < n_of_end;
        if (is_sure || is_maybe)
            listed[sure + min(n_before + maybe, n_of_end) - taken_before].block =
                first + ATTEND_THREADS * half + threadIdx.x;
    }
    return n[0] + min(n_before + n[1], n_of_end) - taken_before;
}

/* Counts the lanes of a warp. */
template <class T> __device__ inline void lanes_count(T *n, bool is_mine)
{
    uint32_t lanes = __ballot_sync(~0u, is_mine);
    if (lane_id() == 0 && lanes)
        atomicAdd(n, (T)__popc(lanes));
}

/* Gives the n blocks of listed their places, the unit's list a copy. */
__device__ inline void more_resolve(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t n,
                                    more_block *listed)
{
    __shared__ uint32_t at_first;
    winnow_gpu_unit *unit = view.unit + unit_idx;
    winnow_gpu_counters *counters = view.counters + unit->layer;
    const uint32_t *slots = view.session_segments + unit->session * view.n_session_segments_max;
    winnow_gpu_place place = {unit->session, unit->layer, unit->head, view.launch->stamp, false};

    if (threadIdx.x == 0)
        at_first = unit->n_selected + atomicAdd(&unit->n_more, n);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i / 32 * 32 < n; i += ATTEND_THREADS) {
        bool is_there = i < n;
        uint32_t block = is_there ? listed[i].block : 0;
        winnow_gpu_resolved is = {};
        if (is_there) {
            is = winnow_gpu_resolve(view, place, slots[block / view.span_blocks], block);
            listed[i] = {block, is.place, is.home, is.has_to_fetch ? is.slot : ~0u};
            view.listed[unit->block_first + at_first + i] = {block, is.place};
        }
        bool is_disk = is_there && is.place == WINNOW_GPU_ON_DISK;
        if (is_there && !is_disk)
            view.selected[unit->block_first + block] = 2;
        lanes_count(&unit->n_device, is.is_hit);
        lanes_count(&unit->n_host, is_there && !is.is_hit && !is_disk);
        lanes_count(&unit->n_unfit, is.is_unfit);
        lanes_count(&unit->n_disk, is_disk);
        lanes_count((unsigned long long *)&counters->n_hits, is.is_hit);
        lanes_count((unsigned long long *)&counters->n_misses, is_there && !is.is_hit);
        lanes_count((unsigned long long *)&counters->n_unfit, is.is_unfit);
        lanes_count((unsigned long long *)&counters->n_evictions, is.is_eviction);
        lanes_count((unsigned long long *)&counters->n_ahead_used, is.is_ahead);
    }
    __syncthreads();
}

/* A chunk's blocks of the second round, into listed [WINNOW_GPU_CHUNK_BLOCKS], shared: how many.
 * What they miss is brought in before anyone waits for what others bring: they may be waiting too. */
template <class F>
__device__ inline uint32_t more_list(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t chunk,
                                     more_block *listed)
{
    uint32_t n = more_pick(view, view.unit + unit_idx, chunk, listed);

    if (n == 0)
        return 0;
    more_resolve(view, unit_idx, n, listed);
    for (uint32_t i = threadIdx.x / 32; i < n; i += GROUP)
        if (listed[i].slot != ~0u)
            slot_fill<F>(view, {listed[i].home, listed[i].slot}, [] {});
    __syncthreads();
    return n;
}
