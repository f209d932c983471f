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
constexpr uint32_t N_KEPT = 8192; /* blocks of a thread block whose key is kept in shared memory */
constexpr uint32_t N_SEGMENTS = 1024; /* of a unit whose slots are kept */
constexpr uint32_t N_RANKS_MAX = 4;
constexpr float BINS_NAT = 64, FIXED_ONE = 0x1p40f;
constexpr float SHARE_ONE = 0x1p31f; /* T: shares in bins are words, added by one atomic */

struct team { /* thread blocks that share a unit */
    uint32_t rank, n_ranks;
};

/* Where listed blocks were found. */
enum { FOUND_DEVICE, FOUND_HOST, FOUND_UNFIT, FOUND_DISK, FOUND_EVICTION, N_FOUND };

struct memory {                        /* shared; the shares in bins follow: [G][N_BINS] */
    uint32_t total[2][WINNOW_GQA_MAX]; /* low and high words */
    float m[WINNOW_GQA_MAX];           /* largest of the unit */
    float to_share[WINNOW_GQA_MAX];    /* x exp(ln_e - m): share of T */
    uint32_t before[WINNOW_GQA_MAX], unknown[WINNOW_GQA_MAX]; /* share before bin 0; its part */
    uint32_t goal[WINNOW_GQA_MAX];
    float origin, ln_cut;
    uint32_t key_largest, key_smallest; /* ranks, in the team's rank 0; smallest: selected */
    uint32_t n_unknown;
    int32_t bin_last;
    uint32_t n_known;                               /* in the bins up to bin_last */
    uint32_t class_end, n_of_class_end, n_selected; /* the selection */
    uint32_t quarter_bin;                           /* the last quarter begins here; 0: all */
    uint32_t warp_sum[WINNOW_GQA_MAX + 1][32];      /* of shares in bins; last, of counts */
    uint32_t warp_sure[32], warp_maybe[32];         /* before each warp */
    uint32_t n_sure, n_maybe;                       /* of this thread block */
    uint32_t n_push[3], push_first[3];              /* fetches, ready, waiting */
    uint32_t n_found[N_FOUND];
    uint32_t count[N_BINS];
    uint32_t segment[N_SEGMENTS];
    float key_kept[N_KEPT];
};

static __device__ uint32_t *bin_shares(memory *memory, uint32_t g)
{
    return (uint32_t *)(memory + 1) + g * N_BINS;
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
    return winnow_gpu_rank(__float_as_uint(x));
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

/* A bin's word over the team. */
static __device__ uint32_t bin_sum(team team, uint32_t *bins, uint32_t i)
{
    uint32_t sum = bins[i];
#pragma unroll
    for (uint32_t r = 1; r < N_RANKS_MAX; r++)
        if (r < team.n_ranks)
            sum += team_at(team, bins, team.rank ^ r)[i]; /* n_ranks: a power of 2 */
    return sum;
}

struct bin_run { /* the bins of one thread */
    uint32_t first, n;
    uint32_t below, sum; /* of what is counted: before the run, in it */
};

/* From an inclusive scan over the warp to the run's place among all; after a barrier. */
static __device__ void bin_run_place(const uint32_t (&warp_sum)[32], uint32_t start,
                                     uint32_t inclusive, bin_run *run)
{
    uint32_t lane = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
    uint32_t exclusive = __shfl_up_sync(~0u, inclusive, 1);

    exclusive = lane ? exclusive : 0;
    run->below = start + __reduce_add_sync(~0u, lane < warp_idx ? warp_sum[lane] : 0) + exclusive;
    run->sum = inclusive - exclusive;
}

/* The bin of a run at which the sum reaches the goal, and the sum below it; N_BINS: elsewhere. */
static __device__ uint32_t bin_reaching(team team, uint32_t *bins, const bin_run &run,
                                        uint32_t goal, uint32_t *ret_below)
{
    uint32_t below = run.below, bin = run.first;

    if (below >= goal || below + run.sum < goal)
        return N_BINS;
    *ret_below = below;
    if (run.n == 1)
        return bin;
    for (uint32_t sum; (sum = bin_sum(team, bins, bin)), below + sum < goal; bin++)
        below += sum;
    *ret_below = below;
    return bin;
}

/* bin_last: where every head has reached its goal; -1: before bin 0. Ends with a barrier. */
template <int G>
static __device__ void threshold_find(team team, uint32_t n_group, const uint32_t (&inclusive)[G],
                                      bin_run run, memory *memory)
{
    uint32_t below;

#pragma unroll
    for (int g = 0; g < G; g++) {
        if (g >= (int)n_group)
            break;
        uint32_t start = memory->before[g], goal = memory->goal[g];
        bin_run_place(memory->warp_sum[g], start, inclusive[g], &run);
        uint32_t bin = bin_reaching(team, bin_shares(memory, g), run, goal, &below);
        if (threadIdx.x == blockDim.x - 1 && run.below + run.sum < goal)
            bin = N_BINS - 1; /* by rounding: all there is */
        if (start < goal && bin < N_BINS)
            atomicMax(&memory->bin_last, (int32_t)bin);
    }
    __syncthreads();
}

/* From bin_last to the selection: what the budget leaves, where the last quarter begins. run: of
 * counts. Ends with a barrier. */
static __device__ void selection_end(team team, uint32_t n_unknown, uint32_t n_max,
                                     const bin_run &run, memory *memory)
{
    uint32_t bin_last = (uint32_t)memory->bin_last, below, bin;

    if (bin_last - run.first < run.n) { /* -1 is in no run */
        uint32_t n_known = run.below - n_unknown + (run.n == 1 ? run.sum : 0);
        for (uint32_t i = run.first; run.n > 1 && i <= bin_last; i++)
            n_known += bin_sum(team, memory->count, i);
        memory->n_known = n_known;
    }
    __syncthreads();
    uint32_t n_all = n_unknown + memory->n_known, n = min(n_all, n_max);
    uint32_t n_quarter = max(4u, (n + 3) / 4);
    bool is_in_unknown = n_unknown >= n_max;
    if (threadIdx.x == 0) {
        memory->n_selected = n;
        if (n_all <= n_max || is_in_unknown) {
            memory->class_end = is_in_unknown ? 0 : bin_last + 2;
            memory->n_of_class_end = is_in_unknown ? n_max : 0;
        }
    }
    if (n_all > n_max && !is_in_unknown) {
        bin = bin_reaching(team, memory->count, run, n_max, &below);
        if (bin < N_BINS) {
            memory->class_end = 1 + bin;
            memory->n_of_class_end = n_max - below;
        }
    }
    if (n_quarter < n) {
        bin = bin_reaching(team, memory->count, run, n - n_quarter + 1, &below);
        if (bin < N_BINS)
            memory->quarter_bin = bin;
    }
    __syncthreads();
}

/* From the bins, n_unknown blocks before them, to the selection. All threads, RUN bins each; ends
 * with a barrier. */
template <int G, int RUN>
static __device__ void selection_find(team team, uint32_t n_group, uint32_t n_unknown,
                                      uint32_t n_max, memory *memory)
{
    bin_run run = {threadIdx.x * RUN, RUN, 0, 0};
    uint32_t inclusive[G] = {}, count = 0, warp_idx = threadIdx.x / 32;

    /* All loads before the first use: those from other thread blocks take long. */
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        count += bin_sum(team, memory->count, run.first + i);
#pragma unroll
        for (int g = 0; g < G; g++)
            inclusive[g] +=
                bin_sum(team, bin_shares(memory, min(g, (int)n_group - 1)), run.first + i);
    }
#pragma unroll
    for (int g = 0; g < G; g++)
        inclusive[g] = warp_scan(inclusive[g]);
    count = warp_scan(count);
    if (threadIdx.x % 32 == 31) {
#pragma unroll
        for (int g = 0; g < G; g++)
            memory->warp_sum[g][warp_idx] = inclusive[g];
        memory->warp_sum[WINNOW_GQA_MAX][warp_idx] = count;
    }
    __syncthreads();
    threshold_find<G>(team, n_group, inclusive, run, memory);
    bin_run_place(memory->warp_sum[WINNOW_GQA_MAX], n_unknown, count, &run);
    selection_end(team, n_unknown, n_max, run, memory);
}

/* The blocks [first, end) of a thread block as its warps see them: a run of rows of 32 each. */
struct rows {
    uint32_t block, n, end; /* this lane's block of row 0 */
};

static __device__ rows rows_of(uint32_t first, uint32_t n)
{
    uint32_t n_rows = (n + blockDim.x - 1) / blockDim.x;
    return {first + threadIdx.x / 32 * n_rows * 32 + threadIdx.x % 32, n_rows, first + n};
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

/* What a round lists. */
struct list {
    winnow_gpu_place unit;
    bool has_segments; /* in memory */
    uint32_t unit_idx, block_first, round;
    uint32_t first, group_first; /* of the unit's listed, and of its groups */
};

/* Slots of the unit's segments into memory, if they fit. Needs a barrier after it. */
static __device__ bool segments_load(const winnow_gpu_view &view, uint32_t session, uint32_t n,
                                     memory *memory)
{
    const uint32_t *table = view.session_segments + session * view.n_session_segments_max;

    if (n > N_SEGMENTS)
        return false;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
        memory->segment[i] = table[i];
    return true;
}

static __device__ uint32_t segment_slot(const winnow_gpu_view &view, const list &list,
                                        uint32_t block, const memory *memory)
{
    uint32_t i = block / view.span_blocks, table = list.unit.session * view.n_session_segments_max;
    return list.has_segments ? memory->segment[i] : view.session_segments[table + i];
}

/* Lists the selected of the unit's blocks [first, first + n) in list order and marks them;
 * key_at(block) is asked twice. Also the smallest key of all, into rank 0. Ends with the team's
 * barrier: the whole list is there. */
template <class KEY>
static __device__ void list_write(const winnow_gpu_view &view, team team, const list &list,
                                  uint32_t first, uint32_t n, memory *memory, KEY key_at)
{
    winnow_gpu_listed *listed = view.listed + list.block_first + list.first;
    uint32_t class_end = memory->class_end, n_max = memory->n_of_class_end;
    uint32_t n_sure = 0, n_maybe = 0, lanes_below = (1u << threadIdx.x % 32) - 1;
    float origin = memory->origin, ln_cut = memory->ln_cut;
    rows rows = rows_of(first, n);
    auto class_at = [&](uint32_t b, float *key) {
        *key = b < rows.end ? key_at(b) : -INFINITY;
        return b < rows.end ? class_of(*key, origin, ln_cut) : CLASS_NEVER;
    };

#pragma unroll 4
    for (uint32_t i = 0; i < rows.n; i++) {
        float key;
        uint32_t b = rows.block + 32 * i, class_b = class_at(b, &key);
        n_sure += __popc(__ballot_sync(~0u, class_b < class_end));
        n_maybe += __popc(__ballot_sync(~0u, class_b == class_end));
        if (class_b < class_end || (class_b == class_end && n_max))
            winnow_gpu_resolve_prefetch(view, list.unit, segment_slot(view, list, b, memory), b);
    }
    warp_counts_scan(n_sure, n_maybe, memory);
    team_sync(team);
    n_sure = memory->warp_sure[threadIdx.x / 32];
    n_maybe = memory->warp_maybe[threadIdx.x / 32];
    for (uint32_t r = 0; r < team.rank; r++) {
        n_sure += *team_at(team, &memory->n_sure, r);
        n_maybe += *team_at(team, &memory->n_maybe, r);
    }
#pragma unroll 4
    for (uint32_t i = 0; i < rows.n; i++) {
        float key;
        uint32_t b = rows.block + 32 * i, class_b = class_at(b, &key);
        uint32_t sure = __ballot_sync(~0u, class_b < class_end);
        uint32_t maybe = __ballot_sync(~0u, class_b == class_end);
        uint32_t n_maybe_before = n_maybe + __popc(maybe & lanes_below);
        bool is_selected = class_b < class_end || (class_b == class_end && n_maybe_before < n_max);
        if (is_selected) {
            listed[n_sure + __popc(sure & lanes_below) + min(n_maybe_before, n_max)].block = b;
            if (class_b + 1 >= class_end) /* in the last class, or that before it */
                atomicMin(team_at(team, &memory->key_smallest, 0), float_rank(key));
        }
        if (b < rows.end && (is_selected || list.round == 1))
            view.selected[list.block_first + b] = is_selected ? list.round : 0;
        n_sure += __popc(sure);
        n_maybe += __popc(maybe);
    }
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

/* Gives each of the n blocks of a list its place and pushes fetches and groups. Ends with a
 * barrier. */
static __device__ void list_resolve(const winnow_gpu_view &view, team team, const list &list,
                                    uint32_t n, memory *memory)
{
    winnow_gpu_listed *listed = view.listed + list.block_first + list.first;
    winnow_gpu_queue *queue = view.queue + list.round - 1;
    uint32_t *queue_n = threadIdx.x == 0   ? &queue->n_fetch
                        : threadIdx.x == 1 ? &queue->n_ready
                                           : &queue->n_waiting;

    for (uint32_t at = team.rank * blockDim.x; at < n; at += team.n_ranks * blockDim.x) {
        uint32_t i = at + threadIdx.x, block = 0;
        winnow_gpu_resolved is = {};
        if (threadIdx.x < 3)
            memory->n_push[threadIdx.x] = 0;
        if (i < n) {
            block = __ldcg(&listed[i].block);
            is =
                winnow_gpu_resolve(view, list.unit, segment_slot(view, list, block, memory), block);
            listed[i].place = is.place;
        }
        if (i < n && is.place == WINNOW_GPU_ON_DISK) {
            view.selected[list.block_first + block] = 0;
            if (__ldcg(&view.key[list.block_first + block]) == INFINITY)
                atomicOr(&view.unit[list.unit_idx].has_unknown, 1);
        }
        __syncthreads();
        uint32_t waits = __ballot_sync(~0u, is.has_to_wait) >> threadIdx.x % 32 / 8 * 8 & 0xff;
        bool is_group = threadIdx.x % 8 == 0 && i < n;
        bool is_pushed[3] = {is.has_to_fetch, is_group && !waits, is_group && waits};
        uint32_t place[3];
        for (int k = 0; k < 3; k++)
            place[k] = push_reserve(&memory->n_push[k], __ballot_sync(~0u, is_pushed[k]));
        __syncthreads();
        if (threadIdx.x < 3 && memory->n_push[threadIdx.x])
            memory->push_first[threadIdx.x] = atomicAdd(queue_n, memory->n_push[threadIdx.x]);
        resolved_count(is, i < n, memory);
        __syncthreads();
        winnow_gpu_work work = {list.unit_idx, list.group_first + i / 8};
        if (is_pushed[0])
            view.fetch[memory->push_first[0] + place[0]] = {is.home, is.place};
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
}

/* Queues all chunks of a unit. One warp. */
static __device__ void chunks_push(const winnow_gpu_view &view, uint32_t unit_idx, uint32_t round)
{
    winnow_gpu_queue *queue = view.queue + round - 1;
    uint32_t n = view.unit[unit_idx].n_chunks, lane = threadIdx.x % 32, first = 0;

    if (lane == 0)
        first = atomicAdd(&queue->n_ready, n);
    first = __shfl_sync(~0u, first, 0);
    for (uint32_t i = lane; i < n; i += 32)
        view.ready[first + i] = {unit_idx, WINNOW_GPU_WORK_CHUNK | i};
}

/* Clears what sums are added to. Needs a barrier after it. */
static __device__ void memory_clear(uint32_t n_group, memory *memory)
{
    uint32_t *words = (uint32_t *)memory, *shares = bin_shares(memory, 0);
    uint32_t n_words = offsetof(struct memory, segment) / 4;

    for (uint32_t i = threadIdx.x; i < n_words; i += blockDim.x)
        words[i] = 0;
    for (uint32_t i = threadIdx.x; i < n_group * N_BINS; i += blockDim.x)
        shares[i] = 0;
}

static __device__ uint32_t share_word(float share)
{
    return __float2uint_rn(__fmul_rn(fminf(share, 1), SHARE_ONE));
}

/* Adds an unselected block to the bins of the second round. */
static __device__ void more_add(const winnow_gpu_view &view, const winnow_gpu_unit &unit,
                                uint32_t block, uint32_t bin, memory *memory)
{
    const float *ln_e = view.ln_e + (size_t)(unit.block_first + block) * view.n_group;

    atomicAdd(memory->count + bin, 1);
    for (uint32_t g = 0; g < view.n_group; g++) {
        float e = exp_above(ln_e[g], unit.largest[g]);
        atomicAdd(bin_shares(memory, g) + bin, share_word(__fmul_rn(e, memory->to_share[g])));
    }
}

} // namespace winnow_gpu_select

enum { WINNOW_GPU_SELECT_MORE_THREADS = 256 };

/* Dynamic shared memory that winnow_gpu_select_more takes, 16-byte aligned. */
static inline __host__ __device__ uint32_t winnow_gpu_select_more_bytes(uint32_t n_group)
{
    return (uint32_t)sizeof(winnow_gpu_select::memory) + n_group * WINNOW_GPU_BINS * 4;
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
    bool has_segments = segments_load(view, item.session, item.n_segments, memory);
    __syncthreads();
    for (uint32_t b = threadIdx.x; b < n; b += blockDim.x) {
        uint32_t class_b = class_of(key_at(b), origin, -INFINITY);
        if (class_b != CLASS_NEVER)
            more_add(view, *unit, b, class_b - 1, memory);
    }
    __syncthreads();
    selection_find<WINNOW_GQA_MAX, N_BINS / WINNOW_GPU_SELECT_MORE_THREADS>(
        {0, 1}, view.n_group, 0, n_max - n_first, memory);
    list list = {{item.session, unit->layer, unit->head, view.launch->stamp},
                 has_segments,
                 unit_idx,
                 block_first,
                 2,
                 n_first,
                 unit->n_groups};
    list_write(view, {0, 1}, list, 0, n, memory, key_at);
    list_resolve(view, {0, 1}, list, memory->n_selected, memory);
    if (threadIdx.x == 0) {
        unit->n_more = memory->n_selected;
        unit->n_groups_more = (memory->n_selected + 7) / 8;
        if (memory->n_selected)
            unit->key_threshold = rank_float(memory->key_smallest);
        counts_write(view, unit, list.unit.layer, memory);
    }
    __syncthreads();
}
