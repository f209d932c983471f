/*
 * The work of attend: blocks fetched, groups attended, chunks compensated, units ended, by one kernel.
 *
 * Thread blocks draw tickets. Where there is something to fetch, the first n_fetchers fetch, a warp a
 * block; every other ticket is a piece of work: what is ready, then what waits, then what second rounds
 * hand out (more.cuh), for which a thread block waits until the last unit's end tells all to end. A
 * warp waits for its own block alone, on the slot's word, which a fetcher releases. Who waits has a
 * higher ticket than whom it waits for, and that one runs: nothing depends on how many thread blocks fit
 * the device at once.
 *
 * Rejected: bringing in a unit at a time, each by one fetching thread block: 16 of them took 107 us
 * for 41 us of link time.
 */
#pragma once

#include <kernels/cuda/chunk.cuh>
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/fetch.cuh>
#include <kernels/cuda/finish.cuh>
#include <kernels/cuda/join.cuh>
#include <kernels/cuda/more.cuh>

template <class F> union work_memory {
    struct {
        chunk_memory<F> chunk;                    /* its group is everybody's */
        float read[2][F::HEADS * (F::WIDTH + 4)]; /* partials of what a chunk reads further */
    };
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

/* A warp's block of a group, where there is one. */
template <class F>
__device__ inline void listed_attend(const winnow_gpu_view &view, uint32_t unit_idx,
                                     winnow_gpu_listed listed, bool must_wait, bool is_first_round,
                                     group_memory<F> *memory)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    block_registers<F> x;
    float ln_m[F::PER_LANE];

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
    if (is_first_round)
        block_verify<F>(view, unit, listed.block, ln_m);
}

/* Of the warp's block of a group of the list. */
__device__ inline winnow_gpu_listed listed_load(const winnow_gpu_view &view,
                                                const winnow_gpu_unit *unit, uint32_t group)
{
    uint32_t i = GROUP * group + threadIdx.x / 32;

    if (i >= unit->n_selected)
        return {0, WINNOW_GPU_ON_DISK};
    uint2 pair = __ldcg((const uint2 *)(view.listed + unit->block_first + i));
    return {pair.x, pair.y};
}

/* A group, or a chunk: what it reads in the second round, eight blocks at a time, then the rest. */
template <class F>
__device__ inline void partial_make(const winnow_gpu_view &view, work_item work, bool must_wait,
                                    float *partial, work_memory<F> *memory)
{
    const winnow_gpu_unit *unit = view.unit + work.unit;
    uint32_t kind = work.idx & WINNOW_GPU_WORK_KINDS, chunk = work.idx & ~WINNOW_GPU_WORK_KINDS;
    group_memory<F> *group = &memory->chunk.group;
    more_block *more = (more_block *)memory->chunk.rows; /* used before these are */
    uint32_t n = kind == WINNOW_GPU_WORK_AGAIN ? more_list<F>(view, work.unit, chunk, more) : 0;
    uint32_t n_groups = kind ? (n + GROUP - 1) / GROUP : 1;
    const float *before = NULL;

#pragma unroll 1
    for (uint32_t i = 0; i < n_groups; i++) {
        winnow_gpu_listed listed = {0, WINNOW_GPU_ON_DISK};
        uint32_t at = GROUP * i + threadIdx.x / 32;
        float *to = kind ? memory->read[i % 2] : partial;
        if (!kind)
            listed = listed_load(view, unit, work.idx);
        else if (at < n)
            listed = {more[at].block, more[at].place};
        listed_attend<F>(view, work.unit, listed, must_wait || kind, !kind, group);
        __syncthreads();
        group_join<F>(view, group, true, before, to);
        if (kind) {
            before = to;
            __syncthreads();
        }
    }
    if (kind) {
        chunk_attend<F>(view, unit, chunk, &memory->chunk);
        __syncthreads();
        group_join<F>(view, group, false, before, partial);
    }
}

/* The unit's output is written: if it was the last, so is the launch's end. */
__device__ inline void unit_end(const winnow_gpu_view &view, uint32_t *is_last)
{
    winnow_gpu_queue *queue = view.queue;

    if (!count_done(&queue->n_ended, view.launch->n_units, is_last))
        return;
    launch_finish(view);
    for (uint32_t i = threadIdx.x; i < gridDim.x; i += ATTEND_THREADS)
        __stcg((unsigned long long *)view.more + __ldcg(&queue->n_more) + i, WORK_END);
}

/* One piece of work, by the whole thread block, and what follows if it was the unit's last. */
template <class F>
__device__ inline void work_do(const winnow_gpu_view &view, work_item work, bool must_wait,
                               work_memory<F> *memory, uint32_t *is_last)
{
    winnow_gpu_unit *unit = view.unit + work.unit;
    uint32_t kind = work.idx & WINNOW_GPU_WORK_KINDS, chunk = work.idx & ~WINNOW_GPU_WORK_KINDS;
    uint32_t n_read = unit->n_tail_groups + unit->n_groups, n_chunks = unit->n_chunks;
    uint32_t row = winnow_gpu_partial_floats(&view);
    float *partial = view.partial + (uint64_t)unit->partial_first * row;
    bool is_first_round = kind == 0 || kind == WINNOW_GPU_WORK_CHUNK;

    if (kind == WINNOW_GPU_WORK_FIND) {
        more_find(view, work.unit, chunk);
        if (count_done(&unit->n_done, n_chunks, is_last))
            more_choose(view, work.unit);
        return;
    }
    uint32_t i = kind ? n_read + chunk : unit->n_tail_groups + chunk;
    partial_make<F>(view, work, must_wait, partial + (uint64_t)i * row, memory);
    if (!count_done(&unit->n_done, n_chunks + (is_first_round ? unit->n_groups : 0), is_last))
        return;
    join_range range = {partial, n_read + n_chunks};
    if (unit_join<F>(view, work.unit, range, is_first_round, &memory->join))
        unit_end(view, is_last);
    else
        more_begin(view, work.unit);
}

/* Piece i of what second rounds hand out, when it is there: by one thread. */
__device__ inline uint64_t work_wait(uint64_t *more, uint32_t i)
{
    uint64_t x;

    for (;;) {
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(more + i) : "memory");
        if (x)
            break;
        __nanosleep(100);
    }
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    __stcg((unsigned long long *)more + i, 0ull);
    return x;
}

/* All work of the launch, by tickets; the first is drawn while `select` runs. */
template <class F>
__device__ inline void work_run(const winnow_gpu_view &view, work_memory<F> *memory)
{
    __shared__ uint32_t ticket, is_last;
    __shared__ uint64_t given;
    winnow_gpu_queue *queue = view.queue;
    auto draw = [&] {
        if (threadIdx.x == 0)
            ticket = atomicAdd(&view.tally->ticket_next, 1);
        __syncthreads();
        return ticket;
    };

    uint32_t first = draw();
    earlier_kernels_wait();
    uint32_t n_fetch = __ldcg(&queue->n_fetch), n_ready = __ldcg(&queue->n_ready),
             n_work = n_ready + __ldcg(&queue->n_waiting), n_fetchers = 0, i = first;
    work_item guess = work_load(view.ready + first); /* beyond n_ready there is room */
    if (n_fetch > 0) {
        n_fetchers = min(min(view.n_fetchers, (n_fetch + GROUP - 1) / GROUP), gridDim.x / 2);
        n_fetchers = max(n_fetchers, 1u);
        if (first < n_fetchers) {
            work_fetch<F>(view, queue, n_fetch);
            __syncthreads();
            first = draw();
        }
        i = first - n_fetchers;
    }
    for (;;) {
        work_item work = guess;
        if (i < n_work) {
            if (i != first || i >= n_ready)
                work = work_load(i < n_ready ? view.ready + i : view.waiting + (i - n_ready));
        } else {
            if (threadIdx.x == 0)
                given = work_wait(view.more, i - n_work);
            __syncthreads();
            if (given == WORK_END)
                break;
            work = {(uint32_t)given, (uint32_t)(given >> 32)};
        }
        work_do<F>(view, work, i >= n_ready && i < n_work, memory, &is_last);
        i = draw() - n_fetchers;
    }
    if (threadIdx.x == 0 && atomicAdd(&view.tally->n_gone, 1) + 1 == gridDim.x)
        view.tally->ticket_next = view.tally->n_gone = 0;
}
