/*
 * Blocks fetched beside the scan. While the index is scanned the link to the host would idle, and
 * what a step with misses waits for afterwards is the link.
 *
 * A block is **foreseen** when the key of its estimates over the totals of the session's last step
 * in this layer and head lies a margin above that step's threshold (winnow_gpu_past). The warp that
 * scored it looks it up, behind its load of the next record, and lists what no slot holds; the last
 * thread blocks of the scan bring entry i of the list to place i of the **stage**, a run of slots
 * behind those of the cache. Select finds what its cache misses there or not: it is attended from
 * there, and copied to the slot that its miss takes. So neither what the cache holds nor a bit of a
 * result depends on foresight. Scanning never waits for fetching; the kernel's end does, for blocks
 * under way, so none is begun when half of the thread blocks have scanned.
 *
 * About half of what is foreseen is selected. Rejected: slots of the cache instead of a stage: those
 * longest unused still hold much of what the step is about to select (bench-foresight: 14 of 60 hits
 * lost for 16 blocks foreseen). At 128K x 8, 439 us a layer: 4 or 6 thread blocks (450, 443), 8 warps
 * in each (442), bulk copies through shared memory (no faster).
 *
 * List and tally are zero between launches: a fetching warp clears its entries, the last one the rest.
 */
#pragma once

#include <kernels/cuda/cache.cuh>
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/record.cuh>

namespace
{

constexpr uint32_t AHEAD_BLOCKS_MIN = 65280; /* of a launch: a shorter scan ends too soon */
constexpr uint32_t AHEAD_WARPS = 16;         /* of a fetching thread block, at most */

/* Of a unit, for its pass. */
template <int NT> struct ahead_past {
    float log2_total[NT * 4];
    float share_least; /* of what is foreseen, summed over the heads; inf, NaN: nothing is */
};

/* Of the scan's thread blocks, those that fetch: the last. */
__device__ uint32_t ahead_n_fetching(const winnow_gpu_view &view)
{
    bool is_long = view.n_stage > 0 && view.launch->n_blocks >= AHEAD_BLOCKS_MIN;
    return is_long ? min(view.n_ahead, gridDim.x / 8) : 0;
}

/* What head g, below NT x 4, of a pass's unit needs of its last step. */
template <int NT>
__device__ void ahead_past_load(const winnow_gpu_view &view, uint32_t past_idx, uint32_t g,
                                ahead_past<NT> *to)
{
    if (ahead_n_fetching(view) == 0) {
        to->share_least = INFINITY;
        return;
    }
    const winnow_gpu_past &past = view.past[past_idx];
    to->log2_total[g] = g < view.n_group ? past.ln_total[g] * LOG2_E : INFINITY;
    if (g == 0)
        to->share_least = exp2_approx(past.key_foreseen * LOG2_E);
}

/* Of a record, lane 4 b + h with block b and head h of each tile: lanes 4 b of the foreseen. */
template <int NT>
__device__ uint32_t ahead_foreseen(const ahead_past<NT> &past, const float (&ln_e)[NT])
{
    uint32_t lane = threadIdx.x % 32;
    float sum = 0;

    if (!(past.share_least < INFINITY))
        return 0;
#pragma unroll
    for (int tile = 0; tile < NT; tile++)
        sum += exp2_approx(ln_e[tile] * LOG2_E - past.log2_total[tile * 4 + lane % 4]);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return __ballot_sync(~0u, lane % 4 == 0 && sum >= past.share_least);
}

/* A warp, for the lanes that have a foreseen block: lists those that are in no slot. */
__device__ __noinline__ void ahead_list(const winnow_gpu_view &view, bool is_there, uint32_t id)
{
    uint32_t lane = threadIdx.x % 32, first = 0, unit = id / view.span_blocks, home = 0;
    const uint8_t *index = view.index + (uint64_t)unit * view.unit_bytes;
    bool is_missing = false;

    if (is_there) {
        uint32_t loc = __ldcg((const uint32_t *)(index + view.loc_at) + id % view.span_blocks);
        uint32_t layer = unit / view.n_kv_heads % view.n_layers;
        home = __ldcg((const uint32_t *)(index + view.home_at) + id % view.span_blocks);
        is_missing = home != WINNOW_GPU_ON_DISK &&
                     (!winnow_gpu_cache::is_slot_of(view, layer, loc) ||
                      __ldcg(view.slot_word + loc - 1) >> 32 != id + UINT64_C(1));
    }
    uint32_t missing = __ballot_sync(~0u, is_missing);
    if (missing == 0)
        return;
    if (lane == 0)
        first = atomicAdd(&view.tally->n_foreseen, (uint32_t)__popc(missing));
    uint32_t at = __shfl_sync(~0u, first, 0) + __popc(missing & ((1u << lane) - 1));
    if (is_missing && at < view.n_stage)
        *(volatile uint64_t *)(view.ahead + at) = (id + UINT64_C(1)) << 32 | home;
}

/* A thread block has scanned all it will. All threads, behind a barrier. */
__device__ void ahead_scan_end(const winnow_gpu_view &view)
{
    if (threadIdx.x > 0 || ahead_n_fetching(view) == 0)
        return;
    __threadfence();
    atomicAdd(&view.tally->n_scanned, 1);
}

/* Entry i, which is cleared; 0: the scan has ended, and it was not listed. *is_late: too late to
 * fetch it. One lane. */
__device__ uint64_t ahead_take(const winnow_gpu_view &view, uint32_t i, uint32_t n_scanning,
                               bool *is_late)
{
    volatile uint64_t *entry = view.ahead + i;
    uint64_t x = 0;

    for (;;) {
        uint32_t n_scanned = *(volatile uint32_t *)&view.tally->n_scanned;
        bool is_over = n_scanned == n_scanning;
        if (is_over)
            __threadfence();
        x = i < view.n_stage ? *entry : 0;
        *is_late = n_scanned >= n_scanning / 2;
        if (x || is_over)
            break;
        __nanosleep(200);
    }
    if (x)
        *entry = 0;
    return x;
}

/* A block to place i of the stage, by one warp. */
__device__ void ahead_fetch(const winnow_gpu_view &view, uint64_t entry, uint32_t i)
{
    uint32_t id = (uint32_t)(entry >> 32) - 1, home = (uint32_t)entry, lane = threadIdx.x % 32;
    uint32_t slot = view.n_layers * view.n_slots_layer + i;
    const uint8_t *from = view.host + (uint64_t)home * 4096;
    uint8_t *to = view.slots + (uint64_t)slot * view.block_bytes;

    constexpr uint32_t N_ROWS = 8; /* of 512 bytes, at once */
    uint32_t n_rows = view.block_bytes / 512;
#pragma unroll 1
    for (uint32_t first = 0; first < n_rows; first += N_ROWS) {
        uint4 x[N_ROWS];
#pragma unroll
        for (uint32_t j = 0; j < N_ROWS; j++)
            if (first + j < n_rows)
                x[j] = __ldcg((const uint4 *)from + lane + 32 * (first + j));
#pragma unroll
        for (uint32_t j = 0; j < N_ROWS; j++)
            if (first + j < n_rows)
                __stcg((uint4 *)to + lane + 32 * (first + j), x[j]);
    }
    if (lane > 0)
        return;
    uint32_t unit = id / view.span_blocks, layer = unit / view.n_kv_heads % view.n_layers;
    uint8_t *index = view.index + (uint64_t)unit * view.unit_bytes;
    view.slot_word[slot] = (id + UINT64_C(1)) << 32 | view.launch->stamp;
    ((uint32_t *)(index + view.loc_at))[id % view.span_blocks] = slot + 1;
    atomicAdd((unsigned long long *)&view.counters[layer].n_ahead, 1ull);
}

/* The last warp that leaves has the tally as it was. One lane, when the scan has ended. */
__device__ void ahead_leave(const winnow_gpu_view &view, uint32_t n_all)
{
    if (atomicInc(&view.tally->n_left, n_all - 1) == n_all - 1)
        view.tally->n_foreseen = view.tally->n_scanned = 0;
}

/* A fetching thread block, until the n_scanning others have ended their scan. */
__device__ __noinline__ void ahead_run(const winnow_gpu_view &view, uint32_t n_scanning)
{
    uint32_t n_warps = min(AHEAD_WARPS, blockDim.x / 32), n_fetching = gridDim.x - n_scanning;
    uint32_t i = threadIdx.x / 32 * n_fetching + blockIdx.x - n_scanning;
    bool is_leader = threadIdx.x % 32 == 0, is_late = false;

    if (threadIdx.x / 32 >= n_warps)
        return;
#pragma unroll 1
    for (;; i += n_fetching * n_warps) {
        uint64_t entry = 0;
        if (is_leader)
            entry = ahead_take(view, i, n_scanning, &is_late);
        entry = __shfl_sync(~0u, entry, 0);
        if (entry == 0)
            break;
        if (!__shfl_sync(~0u, is_late, 0))
            ahead_fetch(view, entry, i);
    }
    if (is_leader)
        ahead_leave(view, n_fetching * n_warps);
}

} // namespace
