/*
 * The work of a round: blocks fetched, groups attended, chunks compensated, by one kernel.
 *
 * Where there is something to fetch, thread blocks take tickets: the first n_fetchers fetch, a warp
 * a block, the others attend. Work is taken one by one, what is ready before what waits. A warp
 * waits for its own block alone, on the slot's word, which a fetcher releases. A fetcher has a lower
 * ticket, so it runs: nothing depends on how many thread blocks fit the device at once.
 *
 * Rejected: bringing in a unit at a time, each by one fetching thread block: 16 of them took 107 us
 * for 41 us of link time.
 */
#pragma once

#include <kernels/cuda/chunk.cuh>
#include <kernels/cuda/join.cuh>

template <class F> union work_memory {
    chunk_memory<F> chunk; /* its group is everybody's */
    join_memory<F> join;
};

/* A group or a chunk, as every thread of a thread block knows it. */
struct work_item {
    uint32_t unit, idx;
};

__device__ inline work_item work_load(const winnow_gpu_work *work)
{
    uint2 x = __ldcg((const uint2 *)work);
    return {x.x, x.y};
}

/* Of the warp's block of a group: its place in the list; -1: the group has no such block. */
template <bool IS_FIRST>
__device__ inline int64_t work_listed(const winnow_gpu_unit *unit, uint32_t group)
{
    uint32_t n_groups = load<!IS_FIRST>(&unit->n_groups),
             n_selected = load<!IS_FIRST>(&unit->n_selected);
    uint32_t first = 0, n = n_selected;

    if (!IS_FIRST && group >= n_groups) {
        group -= n_groups;
        first = n_selected;
        n = __ldcg(&unit->n_more);
    }
    uint32_t i = GROUP * group + threadIdx.x / 32;
    return i < n ? (int64_t)unit->block_first + first + i : -1;
}

/* Asks now and then, without acquiring: that empties L1 each time, and slows the fetcher beside it
 * (128K x 8, one block in ten missed: 212 us for 187). */
__device__ inline void slot_wait(const uint64_t *word)
{
    if (lane_id() == 0) {
        uint64_t x;
        for (;;) {
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(word) : "memory");
            if (!(x & WINNOW_GPU_FETCHING))
                break;
            __nanosleep(100);
        }
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    __syncwarp();
}

__device__ inline uint64_t fixed_of(float ln_x, float largest)
{
    float x = ln_x - largest;
    if (!(x >= -80.0f) || !(ln_x < INFINITY))
        return 0;
    return __float2ull_rn(expf(fminf(x, 6.0f)) * 0x1p40f); /* rho ends at 8: above e^6 is alike */
}

/* Adds a block of the last quarter to what prices the rest. */
template <class F>
__device__ inline void block_verify(const winnow_gpu_view &view, winnow_gpu_unit *unit,
                                    uint32_t block, const float (&ln_m)[F::PER_LANE])
{
    uint64_t at = (uint64_t)unit->block_first + block;
    bool is_quarter = __ldg(view.key + at) < unit->key_quarter;

    if (lane_id() >= 4)
        return;
#pragma unroll
    for (int i = 0; i < F::PER_LANE; i++) {
        uint32_t g = lane_head<F>(lane_id(), i);
        if (g >= view.n_group)
            continue;
        float ln_e = __ldg(view.ln_e + at * view.n_group + g);
        if (!is_quarter || !(ln_e < INFINITY))
            continue;
        atomicAdd((unsigned long long *)&unit->quarter_m[g],
                  (unsigned long long)fixed_of(ln_m[i], unit->largest[g]));
        atomicAdd((unsigned long long *)&unit->quarter_e[g],
                  (unsigned long long)fixed_of(ln_e, unit->largest[g]));
    }
}

template <class F, bool IS_FIRST>
__device__ inline void group_attend(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t group,
                                    bool must_wait, group_memory<F> *memory)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    int64_t at = work_listed<IS_FIRST>(unit, group);
    winnow_gpu_listed listed = {0, WINNOW_GPU_ON_DISK};
    block_registers<F> x;
    float ln_m[F::PER_LANE];

    if (at >= 0) {
        uint2 pair = __ldcg((const uint2 *)(view.listed + at));
        listed = {pair.x, pair.y};
    }
    if (listed.place == WINNOW_GPU_ON_DISK) {
        block_absent<F>(memory);
        return;
    }
    const uint8_t *block;
    if (listed.place & WINNOW_GPU_FROM_HOST) {
        block = view.host + (uint64_t)(listed.place & ~WINNOW_GPU_FROM_HOST) * 4096;
    } else {
        if (must_wait)
            slot_wait(view.slot_word + listed.place);
        block = view.slots + (uint64_t)listed.place * view.block_bytes;
    }
    block_load<F>(view, block, x);
    block_attend<F>(view, unit->logit_scale, unit_queries<F>(view, unit_idx), WINNOW_BLOCK_TOKENS,
                    x, memory, ln_m);
    if (IS_FIRST)
        block_verify<F>(view, unit, listed.block, ln_m);
}

/* One piece of work, by the whole thread block, and the unit's end if it was the last. */
template <class F, bool IS_FIRST>
__device__ inline void work_do(const winnow_gpu_view &view, work_item work, bool must_wait,
                               work_memory<F> *memory, uint32_t *is_last)
{
    winnow_gpu_unit *unit = view.unit + work.unit;
    uint32_t n_groups = load<!IS_FIRST>(&unit->n_groups),
             n_more = IS_FIRST ? 0 : __ldcg(&unit->n_groups_more);
    uint32_t n_read = unit->n_tail_groups + n_groups + n_more,
             row = winnow_gpu_partial_floats(&view);
    float *partial = view.partial + (uint64_t)unit->partial_first * row;
    join_range range = {partial, n_read, n_read + unit->n_chunks};
    uint32_t n = (IS_FIRST ? n_groups : n_more) + unit->n_chunks;

    if (work.idx & WINNOW_GPU_WORK_CHUNK) {
        uint32_t chunk = work.idx & ~WINNOW_GPU_WORK_CHUNK;
        chunk_attend<F>(view, unit, chunk, &memory->chunk);
        partial += (uint64_t)(n_read + chunk) * row;
    } else {
        group_attend<F, IS_FIRST>(view, work.unit, work.idx, must_wait, &memory->chunk.group);
        partial += (uint64_t)(unit->n_tail_groups + work.idx) * row;
    }
    __syncthreads();
    group_join<F>(view, &memory->chunk.group, partial);
    if (count_done(&unit->n_done, n, is_last)) {
        unit_join<F, IS_FIRST>(view, work.unit, range, &memory->join);
        __syncthreads();
    }
}

/* Fetches blocks of the list, a warp one after the other, as long as there are any: no warp keeps
 * others' groups waiting. The next one is asked for while a block is under way. */
template <class F>
__device__ inline void work_fetch(const winnow_gpu_view &view, winnow_gpu_queue *queue,
                                  uint32_t n_fetch)
{
    uint32_t n_tiles = (view.k_width + view.v_width) / 16, lane = lane_id(), next = 0;
    auto take = [&] {
        if (lane == 0)
            next = atomicAdd(&queue->fetch_next, 1);
    };

    take();
    for (;;) {
        uint32_t i = __shfl_sync(~0u, next, 0);
        if (i >= n_fetch)
            return;
        uint2 fetch = __ldcg((const uint2 *)(view.fetch + i)); /* home, slot */
        uint32_t staged = fetch.x & ~WINNOW_GPU_FROM_STAGE;
        const uint8_t *block = fetch.x & WINNOW_GPU_FROM_STAGE
                                   ? view.slots + (uint64_t)staged * view.block_bytes
                                   : view.host + (uint64_t)fetch.x * 4096;
        const uint4 *from = (const uint4 *)block + lane;
        uint4 *to = (uint4 *)(view.slots + (uint64_t)fetch.y * view.block_bytes) + lane;
        uint4 x[2 * F::TILES];
#pragma unroll
        for (int j = 0; j < 2 * F::TILES; j++)
            if (j < n_tiles)
                x[j] = __ldcg(from + 32 * j);
        take();
#pragma unroll
        for (int j = 0; j < 2 * F::TILES; j++)
            if (j < n_tiles)
                __stcg(to + 32 * j, x[j]);
        __syncwarp();
        if (lane == 0) {
            uint64_t *word = view.slot_word + fetch.y;
            uint64_t x = __ldcg(word) & ~WINNOW_GPU_FETCHING;
            asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(x) : "memory");
        }
    }
}

/* All work of a round: what queue says is complete. */
template <class F, bool IS_FIRST>
__device__ inline void work_run(const winnow_gpu_view &view, winnow_gpu_queue *queue,
                                work_memory<F> *memory)
{
    __shared__ uint32_t taken, is_last;
    uint32_t n_fetch = __ldcg(&queue->n_fetch), n_ready = __ldcg(&queue->n_ready),
             n_work = n_ready + __ldcg(&queue->n_waiting);
    work_item guess = work_load(view.ready + blockIdx.x); /* beyond n_ready there is room */
    uint32_t n_fetchers = 0, i = blockIdx.x;
    auto take = [&] {
        if (threadIdx.x == 0)
            taken = gridDim.x - n_fetchers + atomicAdd(&queue->work_next, 1);
        __syncthreads();
        return taken;
    };

    if (n_fetch > 0) {
        n_fetchers = min(min(view.n_fetchers, (n_fetch + GROUP - 1) / GROUP), gridDim.x / 2);
        n_fetchers = max(n_fetchers, 1u);
        if (threadIdx.x == 0)
            taken = atomicAdd(&queue->ticket_next, 1);
        __syncthreads();
        i = taken - n_fetchers;
        if (taken < n_fetchers) {
            work_fetch<F>(view, queue, n_fetch);
            __syncthreads();
            i = take();
        }
    }
    while (i < n_work) {
        work_item work = guess;
        if (i != blockIdx.x || i >= n_ready)
            work = work_load(i < n_ready ? view.ready + i : view.waiting + (i - n_ready));
        work_do<F, IS_FIRST>(view, work, i >= n_ready, memory, &is_last);
        i = take();
    }
}
