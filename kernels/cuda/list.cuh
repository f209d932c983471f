/*
 * From classes to a list: the selected blocks of a unit in list order, each with its place, and the
 * work and fetches that follow from it.
 *
 * Every warp has a run of a thread block's blocks, so that list order needs one count a warp; how
 * many the thread blocks before have follows from their bins, without a barrier. A group of 8 is
 * resolved by one thread block, which reads what others listed of it from global memory.
 */
#pragma once

#include <kernels/cuda/bins.cuh>
#include <kernels/cuda/cache.cuh>

namespace winnow_gpu_select
{

/* The blocks [first, end) of a thread block as its warps see them: a run of rows of 32 each. */
struct rows {
    uint32_t block, n, end; /* this lane's block of row 0 */
};

template <int N_THREADS> static __device__ rows rows_of(uint32_t first, uint32_t n)
{
    uint32_t n_rows = (n + N_THREADS - 1) / N_THREADS;
    return {first + threadIdx.x / 32 * n_rows * 32 + threadIdx.x % 32, n_rows, first + n};
}

/* Whose list it is. */
struct list {
    winnow_gpu_place unit;
    uint32_t unit_idx, block_first, n_segments;
};

/* Of the list, what a thread block has listed. */
struct listed_run {
    uint32_t first, end;
};

/* Slots of the unit's segments, as many as fit, into memory. Needs a barrier after it. */
static __device__ void segments_load(const winnow_gpu_view &view, const list &list, memory *memory)
{
    const uint32_t *table = view.session_segments + list.unit.session * view.n_session_segments_max;

#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < min(list.n_segments, N_SEGMENTS); i += blockDim.x)
        memory->segment[i] = table[i];
}

static __device__ uint32_t segment_slot(const winnow_gpu_view &view, const list &list,
                                        uint32_t block, const memory *memory)
{
    uint32_t i = block / view.span_blocks, table = list.unit.session * view.n_session_segments_max;
    return i < N_SEGMENTS ? memory->segment[i] : view.session_segments[table + i];
}

/* Over the warps of this thread block and its sums: how many before this warp, and in all. */
struct warp_counts {
    uint32_t sure_before, maybe_before, sure, maybe;
};

static __device__ warp_counts warp_counts_find(uint32_t n_sure, uint32_t n_maybe, memory *memory)
{
    uint32_t lane = threadIdx.x % 32, warp_idx = threadIdx.x / 32, n_warps = blockDim.x / 32;

    if (lane == 0) {
        memory->warp_sure[warp_idx] = n_sure;
        memory->warp_maybe[warp_idx] = n_maybe;
    }
    __syncthreads();
    uint32_t sure = lane < n_warps ? memory->warp_sure[lane] : 0;
    uint32_t maybe = lane < n_warps ? memory->warp_maybe[lane] : 0;
    return {__reduce_add_sync(~0u, lane < warp_idx ? sure : 0),
            __reduce_add_sync(~0u, lane < warp_idx ? maybe : 0), __reduce_add_sync(~0u, sure),
            __reduce_add_sync(~0u, maybe)};
}

/* Lists the selected of the unit's blocks [first, first + n) in list order and marks them;
 * key_at(block) is asked twice. Also the smallest key of all, into rank 0. Ends with the team's
 * barrier: the whole list is there. */
template <int N_THREADS, class KEY>
static __device__ listed_run list_write(const winnow_gpu_view &view, team team, const list &list,
                                        uint32_t first, uint32_t n, memory *memory, KEY key_at)
{
    winnow_gpu_listed *listed = view.listed + list.block_first;
    uint32_t class_end = memory->class_end, n_max = memory->n_of_class_end;
    uint32_t n_sure = 0, n_maybe = 0, lanes_below = (1u << threadIdx.x % 32) - 1, smallest = ~0u;
    float origin = memory->origin, ln_cut = memory->ln_cut;
    rows rows = rows_of<N_THREADS>(first, n);
    auto class_at = [&](uint32_t b, float *key) {
        *key = b < rows.end ? key_at(b) : -INFINITY;
        return b < rows.end ? class_of(*key, origin, ln_cut) : CLASS_NEVER;
    };

#pragma unroll 1
    for (uint32_t i = 0; i < rows.n; i++) {
        float key;
        uint32_t class_b = class_at(rows.block + 32 * i, &key);
        n_sure += __popc(__ballot_sync(~0u, class_b < class_end));
        n_maybe += __popc(__ballot_sync(~0u, class_b == class_end));
    }
    warp_counts counts = warp_counts_find(n_sure, n_maybe, memory);
    uint32_t sure_first = memory->n_sure_before, maybe_first = memory->n_maybe_before;
    listed_run mine = {sure_first + min(maybe_first, n_max),
                       sure_first + counts.sure + min(maybe_first + counts.maybe, n_max)};
    n_sure = sure_first + counts.sure_before;
    n_maybe = maybe_first + counts.maybe_before;
#pragma unroll 1
    for (uint32_t i = 0; i < rows.n; i++) {
        float key;
        uint32_t b = rows.block + 32 * i, class_b = class_at(b, &key);
        uint32_t sure = __ballot_sync(~0u, class_b < class_end);
        uint32_t maybe = __ballot_sync(~0u, class_b == class_end);
        uint32_t n_maybe_before = n_maybe + __popc(maybe & lanes_below);
        bool is_selected = class_b < class_end || (class_b == class_end && n_maybe_before < n_max);
        if (is_selected) {
            uint32_t at = n_sure + __popc(sure & lanes_below) + min(n_maybe_before, n_max);
            listed[at].block = b;
            if (at - mine.first < N_LISTED)
                memory->listed[at - mine.first] = b;
            smallest = min(smallest, float_rank(key));
        }
        if (b < rows.end)
            view.selected[list.block_first + b] = is_selected;
        n_sure += __popc(sure);
        n_maybe += __popc(maybe);
    }
    smallest = __reduce_min_sync(~0u, smallest);
    if (threadIdx.x % 32 == 0 && smallest != ~0u)
        atomicMin(team_at(team, &memory->key_smallest, 0), smallest);
    team_sync(team);
    return mine;
}

/* The warp's place among what the thread block pushes. */
static __device__ uint32_t push_reserve(uint32_t *n, uint32_t lanes)
{
    uint32_t first = 0;
    if (threadIdx.x % 32 == 0 && lanes)
        first = atomicAdd(n, (uint32_t)__popc(lanes));
    return __shfl_sync(~0u, first, 0) + __popc(lanes & ((1u << threadIdx.x % 32) - 1));
}

static __device__ void resolved_count(const winnow_gpu_resolved &block, bool is_there,
                                      memory *memory)
{
    bool is_disk = block.place == WINNOW_GPU_ON_DISK;
    bool is[N_FOUND] = {block.is_hit, !block.is_hit && !is_disk, block.is_unfit,
                        is_disk,      block.is_eviction,         block.is_ahead};

    for (int k = 0; k < N_FOUND; k++) {
        uint32_t lanes = __ballot_sync(~0u, is_there && is[k]);
        if (threadIdx.x % 32 == 0 && lanes)
            atomicAdd(&memory->n_found[k], (uint32_t)__popc(lanes));
    }
}

/* Gives the groups of n listed blocks that begin in `mine` their places and pushes fetches and
 * groups. Ends with a barrier. */
static __device__ void list_resolve(const winnow_gpu_view &view, const list &list,
                                    const listed_run &mine, uint32_t n, memory *memory)
{
    winnow_gpu_listed *listed = view.listed + list.block_first;
    uint32_t n_kept = min(N_LISTED, mine.end - mine.first);
    uint32_t first = (mine.first + 7) / 8 * 8, end = min((mine.end + 7) / 8 * 8, n);
    winnow_gpu_queue *queue = view.queue;
    uint32_t *queue_n = threadIdx.x == 0   ? &queue->n_fetch
                        : threadIdx.x == 1 ? &queue->n_ready
                                           : &queue->n_waiting;

#pragma unroll 1
    for (uint32_t at = first; at < end; at += blockDim.x) {
        uint32_t i = at + threadIdx.x, block = 0;
        winnow_gpu_resolved is = {};
        if (threadIdx.x < 3)
            memory->n_push[threadIdx.x] = 0;
        if (i < end) {
            block =
                i - mine.first < n_kept ? memory->listed[i - mine.first] : __ldcg(&listed[i].block);
            is =
                winnow_gpu_resolve(view, list.unit, segment_slot(view, list, block, memory), block);
            listed[i].place = is.place;
        }
        if (i < end && is.place == WINNOW_GPU_ON_DISK) {
            view.selected[list.block_first + block] = 0;
            if (__ldcg(&view.key[list.block_first + block]) == INFINITY)
                atomicOr(&view.unit[list.unit_idx].has_unknown, 1);
        }
        __syncthreads();
        uint32_t waits = __ballot_sync(~0u, is.has_to_wait) >> threadIdx.x % 32 / 8 * 8 & 0xff;
        bool is_group = threadIdx.x % 8 == 0 && i < end;
        bool is_pushed[3] = {is.has_to_fetch, is_group && !waits, is_group && waits};
        uint32_t place[3];
        for (int k = 0; k < 3; k++)
            place[k] = push_reserve(&memory->n_push[k], __ballot_sync(~0u, is_pushed[k]));
        __syncthreads();
        if (threadIdx.x < 3 && memory->n_push[threadIdx.x])
            memory->push_first[threadIdx.x] = atomicAdd(queue_n, memory->n_push[threadIdx.x]);
        resolved_count(is, i < end, memory);
        __syncthreads();
        winnow_gpu_work work = {list.unit_idx, i / 8};
        if (is_pushed[0])
            view.fetch[memory->push_first[0] + place[0]] = {is.home, is.slot};
        if (is_pushed[1])
            view.ready[memory->push_first[1] + place[1]] = work;
        if (is_pushed[2])
            view.waiting[memory->push_first[2] + place[2]] = work;
    }
    __syncthreads();
}

/* This thread block's part of the unit's and the layer's counts. One thread, after list_resolve. */
static __device__ void counts_write(const winnow_gpu_view &view, winnow_gpu_unit *unit,
                                    uint32_t layer, const memory *memory)
{
    winnow_gpu_counters *counters = view.counters + layer;
    const uint32_t *n = memory->n_found;
    auto add = [](uint64_t *at, uint32_t by) {
        if (by)
            atomicAdd((unsigned long long *)at, (unsigned long long)by);
    };

    atomicAdd(&unit->n_device, n[FOUND_DEVICE]);
    atomicAdd(&unit->n_host, n[FOUND_HOST]);
    atomicAdd(&unit->n_unfit, n[FOUND_UNFIT]);
    atomicAdd(&unit->n_disk, n[FOUND_DISK]);
    add(&counters->n_hits, n[FOUND_DEVICE]);
    add(&counters->n_misses, n[FOUND_HOST] + n[FOUND_DISK]);
    add(&counters->n_evictions, n[FOUND_EVICTION]);
    add(&counters->n_unfit, n[FOUND_UNFIT]);
    add(&counters->n_ahead_used, n[FOUND_AHEAD]);
}

/* Queues all chunks of a unit. One warp. */
static __device__ void chunks_push(const winnow_gpu_view &view, uint32_t unit_idx)
{
    uint32_t n = view.unit[unit_idx].n_chunks, lane = threadIdx.x % 32, first = 0;

    if (lane == 0)
        first = atomicAdd(&view.queue->n_ready, n);
    first = __shfl_sync(~0u, first, 0);
#pragma unroll 1
    for (uint32_t i = lane; i < n; i += 32)
        view.ready[first + i] = {unit_idx, WINNOW_GPU_WORK_CHUNK | i};
}

} // namespace winnow_gpu_select
