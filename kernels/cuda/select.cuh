/*
 * What both rounds of selection share, and the second round as a device function for the stage
 * `more`. Static device functions: kernels are linked file by file.
 *
 * A thread block, or a cluster of them (a team), works on one unit. Keys go into bins of 1/64 nat,
 * class 1 + bin; class 0 are the unknown, which come first. A selection is all classes below one,
 * and, when the budget ends it, so many blocks of that class by block number. Bins instead of a sort:
 * at most 0.65 % more blocks, and no thread waits for another's comparison.
 *
 * Every warp has a run of a thread block's blocks, so that list order needs one count a warp.
 */
#pragma once

#include <kernels/cuda/cache.cuh>

namespace winnow_gpu_select
{

constexpr uint32_t N_BINS = WINNOW_GPU_BINS, CLASS_NEVER = N_BINS + 1;
constexpr float BINS_NAT = 64, FIXED_ONE = 0x1p40f;

struct team { /* thread blocks that share a unit */
    uint32_t rank, n_ranks;
};

/* Where listed blocks were found. */
enum { FOUND_DEVICE, FOUND_HOST, FOUND_UNFIT, FOUND_DISK, FOUND_EVICTION, N_FOUND };

struct memory { /* shared; the mass of bins follows: [G][N_BINS] low words, then high words */
    uint32_t largest[WINNOW_GQA_MAX];                              /* as a rank: see float_rank */
    uint32_t total[2][WINNOW_GQA_MAX], unknown[2][WINNOW_GQA_MAX]; /* low, high words */
    float m[WINNOW_GQA_MAX], total_inverse[WINNOW_GQA_MAX];
    uint64_t before[WINNOW_GQA_MAX]; /* mass that is there before bin 0 */
    double goal[WINNOW_GQA_MAX];
    float origin, ln_cut;
    uint32_t key_largest,
        key_smallest; /* ranks; smallest: of the selected, at rank 0 of the team */
    uint32_t n_unknown;
    int32_t bin_last;
    uint32_t class_end, n_of_class_end, n_selected; /* the selection */
    float key_quarter;
    uint32_t has_unknown;
    uint32_t warp_sure[32], warp_maybe[32], n_sure, n_maybe; /* before each warp; of the block */
    uint32_t n_push[3], push_first[3];                       /* fetches, ready, waiting */
    uint32_t n_found[N_FOUND];
    uint32_t count[N_BINS];
};

static __device__ uint32_t *mass_low(memory *memory, uint32_t g)
{
    return (uint32_t *)(memory + 1) + g * N_BINS;
}

static __device__ uint32_t *mass_high(memory *memory, uint32_t n_group, uint32_t g)
{
    return (uint32_t *)(memory + 1) + (n_group + g) * N_BINS;
}

static __device__ void team_sync(team team)
{
#if __CUDA_ARCH__ >= 900
    if (team.n_ranks > 1) {
        asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

/* p of another thread block's shared memory. */
template <class T> static __device__ T *team_at(team team, T *p, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    if (team.n_ranks > 1)
        return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#endif
    return p;
}

/* Orders as floats do, NaN apart; and back. */
static __device__ uint32_t float_rank(float x)
{
    uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ float rank_float(uint32_t rank)
{
    return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

static __device__ float log2_approx(float x)
{
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* exp(x - m), 0 below -80 as in ref and for x unknown or -inf. */
static __device__ float exp_above(float x, float m)
{
    float y, difference = __fsub_rn(x, m);
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fmul_rn(difference, 1.44269504f)));
    return difference >= -80.0f && x < INFINITY ? y : 0;
}

static __device__ uint64_t fixed(float e)
{
    return __float2ull_rn(__fmul_rn(e, FIXED_ONE));
}

/* A 64-bit sum in two words: shared memory adds 32 bits at once. */
static __device__ void words_add(uint32_t *low, uint32_t *high, uint64_t x)
{
    uint32_t x_low = (uint32_t)x, x_high = (uint32_t)(x >> 32);
    if (x_low && atomicAdd(low, x_low) + x_low < x_low)
        x_high++;
    if (x_high)
        atomicAdd(high, x_high);
}

static __device__ uint32_t class_of(float key, float origin, float ln_cut)
{
    if (key == INFINITY)
        return 0;
    if (!(key >= ln_cut))
        return CLASS_NEVER;
    float bin = __fmul_rn(__fsub_rn(origin, key), BINS_NAT);
    return 1 + (uint32_t)fminf(fmaxf(bin, 0), N_BINS - 1);
}

template <class T> static __device__ T warp_scan(T x) /* inclusive */
{
    for (uint32_t at = 1; at < 32; at <<= 1) {
        T below = __shfl_up_sync(~0u, x, at);
        x += threadIdx.x % 32 >= at ? below : 0;
    }
    return x;
}

/* The first bin at which before + the sum of load(bin) up to it reaches the goal; the last bin when
 * none does. By a warp. */
template <class LOAD>
static __device__ uint32_t bin_reaching(uint64_t before, double goal, LOAD load)
{
    uint32_t lane = threadIdx.x % 32, run = N_BINS / 32;
    uint64_t sum = 0;

    for (uint32_t i = 0; i < run; i++) /* lanes a bank apart */
        sum += load(lane * run + (i + lane) % run);
    uint64_t up_to = before + warp_scan(sum);
    uint32_t reached = __ballot_sync(~0u, (double)up_to >= goal);
    if (!reached)
        return N_BINS - 1;
    uint32_t first = (uint32_t)__ffs((int)reached) - 1;
    uint64_t start = __shfl_sync(~0u, up_to - sum, first);
    up_to = start + warp_scan(load(first * run + lane));
    reached = __ballot_sync(~0u, (double)up_to >= goal);
    return first * run + (uint32_t)__ffs((int)reached) - 1;
}

/* bin_last: where every head has reached its goal; -1: before bin 0. By all warps. */
static __device__ void threshold_find(team team, uint32_t n_group, memory *memory)
{
    uint32_t n_warps = blockDim.x / 32;

    for (uint32_t g = threadIdx.x / 32; g < n_group; g += n_warps) {
        if ((double)memory->before[g] >= memory->goal[g])
            continue;
        uint32_t bin = bin_reaching(memory->before[g], memory->goal[g], [&](uint32_t i) {
            uint64_t sum = 0;
            for (uint32_t r = 0; r < team.n_ranks; r++) {
                uint64_t high = team_at(team, mass_high(memory, n_group, g), r)[i];
                sum += high << 32 | team_at(team, mass_low(memory, g), r)[i];
            }
            return sum;
        });
        if (threadIdx.x % 32 == 0)
            atomicMax(&memory->bin_last, (int32_t)bin);
    }
    __syncthreads();
}

/* From bin_last to the selection: how many, what the budget leaves, the last quarter. Warp 0. */
static __device__ void selection_end(team team, uint32_t n_unknown, uint32_t n_max, memory *memory)
{
    auto load = [&](uint32_t i) {
        uint64_t sum = 0;
        for (uint32_t r = 0; r < team.n_ranks; r++)
            sum += team_at(team, memory->count, r)[i];
        return sum;
    };
    auto count_below = [&](int32_t end) { /* bins */
                                          uint32_t n = 0;
                                          for (int32_t i = threadIdx.x % 32; i < end; i += 32)
                                              n += (uint32_t)load((uint32_t)i);
                                          return __reduce_add_sync(~0u, n);
    };
    uint32_t class_end = (uint32_t)(memory->bin_last + 2), n_of_class_end = 0;
    uint32_t n = n_unknown + count_below(memory->bin_last + 1);

    if (n > n_max) {
        bool is_in_unknown = n_unknown > n_max;
        uint32_t bin = is_in_unknown ? 0 : bin_reaching(n_unknown, n_max + 1.0, load);
        class_end = is_in_unknown ? 0 : 1 + bin;
        n_of_class_end = is_in_unknown ? n_max : n_max - n_unknown - count_below((int32_t)bin);
        n = n_max;
    }
    uint32_t n_quarter = max(4u, (n + 3) / 4), quarter_bin = 0;
    if (n_quarter < n)
        quarter_bin = bin_reaching(n_unknown, n - n_quarter + 1.0, load);
    if (threadIdx.x % 32 == 0) {
        memory->class_end = class_end;
        memory->n_of_class_end = n_of_class_end;
        memory->n_selected = n;
        memory->key_quarter =
            quarter_bin ? __fmaf_rn((float)quarter_bin, -1 / BINS_NAT, memory->origin) : INFINITY;
        memory->has_unknown = class_end == 0;
    }
}

/* Runs body(block) for the blocks [first, first + n) of a thread block, all lanes of a warp
 * together, a run of blocks a warp; block >= first + n: none for this lane. */
template <class BODY> static __device__ void each_block(uint32_t first, uint32_t n, BODY body)
{
    uint32_t n_warps = blockDim.x / 32, rows = (n + 32 * n_warps - 1) / (32 * n_warps);
    uint32_t block = first + threadIdx.x / 32 * rows * 32 + threadIdx.x % 32;

#pragma unroll 4
    for (uint32_t i = 0; i < rows; i++)
        body(block + 32 * i);
}

/* Exclusive sums over the warps of this thread block and its sums. All threads. */
static __device__ void warp_counts_scan(uint32_t n_sure, uint32_t n_maybe, memory *memory)
{
    uint32_t lane = threadIdx.x % 32, n_warps = blockDim.x / 32;

    if (lane == 0) {
        memory->warp_sure[threadIdx.x / 32] = n_sure;
        memory->warp_maybe[threadIdx.x / 32] = n_maybe;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        uint32_t sure = lane < n_warps ? memory->warp_sure[lane] : 0;
        uint32_t maybe = lane < n_warps ? memory->warp_maybe[lane] : 0;
        uint32_t sure_sum = warp_scan(sure), maybe_sum = warp_scan(maybe);
        memory->warp_sure[lane] = sure_sum - sure;
        memory->warp_maybe[lane] = maybe_sum - maybe;
        if (lane == 31) {
            memory->n_sure = sure_sum;
            memory->n_maybe = maybe_sum;
        }
    }
}

/* Lists the selected of [first, first + n) in list order from listed on, marks them as of `round`;
 * class_at(block) is asked twice. Also the smallest key of all, into rank 0. Ends with the team's
 * barrier: the whole list is there. */
template <class CLASS>
static __device__ void list_write(const winnow_gpu_view &view, team team, uint32_t block_first,
                                  uint32_t first, uint32_t n, uint32_t round,
                                  winnow_gpu_listed *listed, memory *memory, CLASS class_at)
{
    uint32_t class_end = memory->class_end, n_max = memory->n_of_class_end;
    uint32_t end = first + n, n_sure = 0, n_maybe = 0, smallest = ~0u;
    uint32_t lanes_below = (1u << threadIdx.x % 32) - 1;

    each_block(first, n, [&](uint32_t b) {
        uint32_t class_b = b < end ? class_at(b) : CLASS_NEVER;
        n_sure += __popc(__ballot_sync(~0u, class_b < class_end));
        n_maybe += __popc(__ballot_sync(~0u, class_b == class_end));
    });
    warp_counts_scan(n_sure, n_maybe, memory);
    team_sync(team);
    n_sure = memory->warp_sure[threadIdx.x / 32];
    n_maybe = memory->warp_maybe[threadIdx.x / 32];
    for (uint32_t r = 0; r < team.rank; r++) {
        n_sure += *team_at(team, &memory->n_sure, r);
        n_maybe += *team_at(team, &memory->n_maybe, r);
    }
    each_block(first, n, [&](uint32_t b) {
        uint32_t class_b = b < end ? class_at(b) : CLASS_NEVER;
        uint32_t sure = __ballot_sync(~0u, class_b < class_end);
        uint32_t maybe = __ballot_sync(~0u, class_b == class_end);
        uint32_t n_maybe_before = n_maybe + __popc(maybe & lanes_below);
        bool is_selected = class_b < class_end || (class_b == class_end && n_maybe_before < n_max);
        if (is_selected) {
            listed[n_sure + __popc(sure & lanes_below) + min(n_maybe_before, n_max)].block = b;
            smallest = min(smallest, float_rank(view.key[block_first + b]));
        }
        if (b < end && (is_selected || round == 1))
            view.selected[block_first + b] = is_selected ? round : 0;
        n_sure += __popc(sure);
        n_maybe += __popc(maybe);
    });
    smallest = __reduce_min_sync(~0u, smallest);
    if (threadIdx.x % 32 == 0 && smallest != ~0u)
        atomicMin(team_at(team, &memory->key_smallest, 0), smallest);
    team_sync(team);
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
    bool is[N_FOUND] = {block.is_hit, !block.is_hit && !is_disk, block.is_unfit, is_disk,
                        block.is_eviction};

    for (int k = 0; k < N_FOUND; k++) {
        uint32_t lanes = __ballot_sync(~0u, is_there && is[k]);
        if (threadIdx.x % 32 == 0 && lanes)
            atomicAdd(&memory->n_found[k], (uint32_t)__popc(lanes));
    }
}

/* Gives each of n listed blocks its place and pushes fetches and groups. `first` of the unit's
 * list, a multiple of 8 after the round's first. Ends with a barrier. */
static __device__ void list_resolve(const winnow_gpu_view &view, team team, uint32_t unit_idx,
                                    uint32_t round, uint32_t list_first, uint32_t n,
                                    uint32_t group_first, memory *memory)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    winnow_gpu_listed *listed = view.listed + unit->block_first + list_first;
    winnow_gpu_queue *queue = view.queue + round - 1;
    uint32_t session = view.launch->item[unit->item].session, stamp = view.launch->stamp;
    uint32_t *queue_n[3] = {&queue->n_fetch, &queue->n_ready, &queue->n_waiting};

    for (uint32_t at = team.rank * blockDim.x; at < n; at += team.n_ranks * blockDim.x) {
        uint32_t i = at + threadIdx.x, block = 0;
        winnow_gpu_resolved is = {};
        if (threadIdx.x < 3)
            memory->n_push[threadIdx.x] = 0;
        if (i < n) {
            block = __ldcg(&listed[i].block);
            is = winnow_gpu_resolve(view, *unit, session, stamp, block);
            listed[i].place = is.place;
        }
        if (i < n && is.place == WINNOW_GPU_ON_DISK) {
            view.selected[unit->block_first + block] = 0;
            if (__ldcg(&view.key[unit->block_first + block]) == INFINITY)
                atomicOr(&unit->has_unknown, 1);
        }
        __syncthreads();
        resolved_count(is, i < n, memory);
        uint32_t waits = __ballot_sync(~0u, is.has_to_wait) >> threadIdx.x % 32 / 8 * 8 & 0xff;
        bool is_group = threadIdx.x % 8 == 0 && i < n;
        bool is_pushed[3] = {is.has_to_fetch, is_group && !waits, is_group && waits};
        uint32_t place[3];
        for (int k = 0; k < 3; k++)
            place[k] = push_reserve(&memory->n_push[k], __ballot_sync(~0u, is_pushed[k]));
        __syncthreads();
        if (threadIdx.x < 3)
            memory->push_first[threadIdx.x] =
                memory->n_push[threadIdx.x]
                    ? atomicAdd(queue_n[threadIdx.x], memory->n_push[threadIdx.x])
                    : 0;
        __syncthreads();
        if (is_pushed[0])
            view.fetch[memory->push_first[0] + place[0]] = {is.home, is.place};
        if (is_pushed[1])
            view.ready[memory->push_first[1] + place[1]] = {unit_idx, group_first + i / 8};
        if (is_pushed[2])
            view.waiting[memory->push_first[2] + place[2]] = {unit_idx, group_first + i / 8};
    }
    __syncthreads();
}

/* This thread block's part of the unit's and the layer's counts. One thread, after list_resolve. */
static __device__ void counts_write(const winnow_gpu_view &view, winnow_gpu_unit *unit,
                                    const memory *memory)
{
    winnow_gpu_counters *counters = view.counters + unit->layer;
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
}

/* Queues all chunks of a unit. Any number of threads, from the first warp's. */
static __device__ void chunks_push(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t round)
{
    winnow_gpu_queue *queue = view.queue + round - 1;
    uint32_t n = view.unit[unit_idx].n_chunks, first = 0;

    if (threadIdx.x == 0)
        first = atomicAdd(&queue->n_ready, n);
    first = __shfl_sync(~0u, first, 0);
    for (uint32_t i = threadIdx.x; i < n; i += 32)
        view.ready[first + i] = {unit_idx, WINNOW_GPU_WORK_CHUNK | i};
}

/* Clears what sums are added to. Needs a barrier after it. */
static __device__ void memory_clear(uint32_t n_group, memory *memory)
{
    uint32_t *words = (uint32_t *)memory, n = sizeof(*memory) / 4 + 2 * n_group * N_BINS;

    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
        words[i] = 0;
}

/* Adds an unselected block to the bins of the second round. */
static __device__ void more_add(const winnow_gpu_view &view, const winnow_gpu_unit &unit,
                                uint32_t block, uint32_t bin, memory *memory)
{
    const float *ln_e = view.ln_e + (size_t)(unit.block_first + block) * view.n_group;

    atomicAdd(memory->count + bin, 1);
    for (uint32_t g = 0; g < view.n_group; g++)
        words_add(mass_low(memory, g) + bin, mass_high(memory, view.n_group, g) + bin,
                  fixed(exp_above(ln_e[g], unit.largest[g])));
}

} // namespace winnow_gpu_select

/* Dynamic shared memory that winnow_gpu_select_more takes, 16-byte aligned. */
static inline __host__ __device__ uint32_t winnow_gpu_select_more_bytes(uint32_t n_group)
{
    return (uint32_t)sizeof(winnow_gpu_select::memory) + 2 * n_group * WINNOW_GPU_BINS * 4;
}

/*
 * Called by all threads (whole warps) of a thread block, for one short unit. Goes on by bins of
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
    uint32_t n_max = view.launch->item[unit->item].n_blocks_max;
    float origin = n_first ? unit->key_threshold : unit->key_largest;
    bool is_first_in = n_first == 0;
    /* What the first round listed, on disk or not, has a key of key_threshold or more. */
    auto class_at = [&](uint32_t b) {
        float key = view.key[block_first + b];
        bool is_new = key < origin || (is_first_in && key == origin);
        return is_new ? class_of(key, origin, -INFINITY) : CLASS_NEVER;
    };

    n_max = n_max == 0 || n_max > n ? n : n_max;
    __syncthreads();
    memory_clear(view.n_group, memory);
    __syncthreads();
    if (threadIdx.x < view.n_group)
        memory->goal[threadIdx.x] = (double)unit->need[threadIdx.x] * 0x1p40;
    if (threadIdx.x == 0) {
        memory->bin_last = -1;
        memory->origin = origin;
        memory->key_smallest = ~0u;
    }
    if (threadIdx.x < 32)
        chunks_push(view, unit_idx, 2);
    each_block(0, n, [&](uint32_t b) {
        uint32_t class_b = b < n ? class_at(b) : CLASS_NEVER;
        if (class_b != CLASS_NEVER)
            more_add(view, *unit, b, class_b - 1, memory);
    });
    __syncthreads();
    threshold_find({0, 1}, view.n_group, memory);
    if (threadIdx.x < 32)
        selection_end({0, 1}, 0, n_max - n_first, memory);
    __syncthreads();
    list_write(view, {0, 1}, block_first, 0, n, 2, view.listed + block_first + n_first, memory,
               class_at);
    list_resolve(view, {0, 1}, unit_idx, 2, n_first, memory->n_selected, unit->n_groups, memory);
    if (threadIdx.x == 0) {
        unit->n_more = memory->n_selected;
        unit->n_groups_more = (memory->n_selected + 7) / 8;
        if (memory->n_selected)
            unit->key_threshold = rank_float(memory->key_smallest);
        counts_write(view, unit, memory);
    }
    __syncthreads();
}
