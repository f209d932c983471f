/*
 * Select: from ln_e to a list of blocks, each with its place, and the work of the stage after.
 *
 * A unit is a cluster's: its estimates are read three times (largest, totals, keys), the last two
 * from L1, and its bins are added over the cluster's shared memory. The origin of the bins is the
 * sum of exp(largest) / T over the heads, which no key exceeds, so no pass is spent on the largest
 * key. Blocks whose key lies below .9 (1 - P) / n hold together less than 1 - P of any head: the
 * prefix ends before them and they skip the bins, which are atomics (of a long context nine in ten
 * blocks).
 *
 * Sums are integers and every key is one thread's, so the bits are the same for any cluster.
 * Rejected: refining the last bin (0.5 % fewer blocks, a pass more), counting by global atomics
 * (3-6 us).
 */
#include <kernels/cuda/select.cuh>
#include <kernels/cuda/stage.h>

using namespace winnow_gpu_select;

namespace
{

constexpr uint32_t N_THREADS = 1024, N_RANKS_MAX = 4, RANK_BLOCKS_MIN = 1024;

/* What a thread block works on. */
struct part {
    uint32_t unit_idx, n_group;
    uint32_t block_first, first, n; /* of the unit's list: [first, first + n) */
};

/* ln_e of a block; heads that are not there are -inf. */
template <int G>
__device__ void estimates_load(const winnow_gpu_view &view, const part &part, uint32_t b,
                               float (&ln_e)[G])
{
    const float *at = view.ln_e + (size_t)(part.block_first + b) * part.n_group;

    if constexpr (G % 4 == 0)
        if (part.n_group == G) {
#pragma unroll
            for (int i = 0; i < G / 4; i++)
                *(float4 *)&ln_e[4 * i] = ((const float4 *)at)[i];
            return;
        }
#pragma unroll
    for (int g = 0; g < G; g++)
        ln_e[g] = g < (int)part.n_group ? at[g] : -INFINITY;
}

/* m[g]: the largest of ln_z and the known ln_e. */
template <int G>
__device__ void largest_find(const winnow_gpu_view &view, team team, const part &part,
                             memory *memory)
{
    const winnow_gpu_unit *unit = view.unit + part.unit_idx;
    uint32_t end = part.first + part.n;
    float largest[G];

#pragma unroll
    for (int g = 0; g < G; g++)
        largest[g] = -INFINITY;
    each_block(part.first, part.n, [&](uint32_t b) {
        alignas(16) float ln_e[G];
        if (b >= end)
            return;
        estimates_load<G>(view, part, b, ln_e);
#pragma unroll
        for (int g = 0; g < G; g++)
            largest[g] = ln_e[g] < INFINITY ? fmaxf(largest[g], ln_e[g]) : largest[g];
    });
#pragma unroll
    for (int g = 0; g < G; g++) {
        uint32_t rank = __reduce_max_sync(~0u, float_rank(largest[g]));
        if (threadIdx.x % 32 == 0)
            atomicMax(&memory->largest[g], rank);
    }
    team_sync(team);
    if (threadIdx.x < part.n_group) {
        uint32_t rank = float_rank(unit->ln_z[threadIdx.x]);
        for (uint32_t r = 0; r < team.n_ranks; r++)
            rank = max(rank, *team_at(team, &memory->largest[threadIdx.x], r));
        memory->m[threadIdx.x] = rank_float(rank);
    }
    __syncthreads();
}

/* What follows from the totals: one lane a head, by warp 0. */
__device__ void totals_finish(const winnow_gpu_view &view, team team, const part &part,
                              memory *memory)
{
    winnow_gpu_unit *unit = view.unit + part.unit_idx;
    uint32_t g = threadIdx.x, n = unit->n_blocks;
    double mass = view.launch->item[unit->item].mass;
    float share = 0;

    if (g < part.n_group) {
        uint64_t z = fixed(exp_above(unit->ln_z[g], memory->m[g])), total = z;
        for (uint32_t r = 0; r < team.n_ranks; r++) {
            uint64_t high = *team_at(team, &memory->total[1][g], r);
            total += high << 32 | *team_at(team, &memory->total[0][g], r);
        }
        share = total ? __fdiv_rn(FIXED_ONE, __ull2float_rn(total)) : 0;
        memory->total_inverse[g] = share;
        memory->before[g] = z;
        memory->goal[g] = mass * (double)total;
        if (team.rank == 0) {
            unit->largest[g] = memory->m[g];
            unit->z[g] = z;
            unit->total[g] = total;
        }
    }
    for (uint32_t at = 16; at; at >>= 1)
        share = __fadd_rn(share, __shfl_xor_sync(~0u, share, at));
    if (g == 0) {
        memory->origin = __fmul_rn(log2_approx(share), 0.693147181f);
        memory->ln_cut = logf((float)(0.9 * (1 - mass) / n));
    }
}

template <int G>
__device__ void totals_find(const winnow_gpu_view &view, team team, const part &part,
                            memory *memory)
{
    uint32_t end = part.first + part.n;
    uint64_t total[G] = {};

    each_block(part.first, part.n, [&](uint32_t b) {
        alignas(16) float ln_e[G];
        if (b >= end)
            return;
        estimates_load<G>(view, part, b, ln_e);
#pragma unroll
        for (int g = 0; g < G; g++)
            total[g] += fixed(exp_above(ln_e[g], memory->m[g]));
    });
#pragma unroll
    for (int g = 0; g < G; g++) {
        /* In pieces of 20 bits: 32 of them fit a word, and a warp adds words in one instruction. */
        uint64_t sum = __reduce_add_sync(~0u, (uint32_t)total[g] & 0xfffff);
        sum += (uint64_t)__reduce_add_sync(~0u, (uint32_t)(total[g] >> 20) & 0xfffff) << 20;
        sum += (uint64_t)__reduce_add_sync(~0u, (uint32_t)(total[g] >> 40)) << 40;
        if (threadIdx.x % 32 == 0)
            words_add(&memory->total[0][g], &memory->total[1][g], sum);
    }
    team_sync(team);
    if (threadIdx.x < 32)
        totals_finish(view, team, part, memory);
    __syncthreads();
}

/* Of one block: its key, written, and its part of the bins. */
template <int G>
__device__ float block_key(const winnow_gpu_view &view, const part &part, uint32_t b,
                           memory *memory)
{
    alignas(16) float ln_e[G];
    float e[G], share = 0;
    bool is_known = true;

    estimates_load<G>(view, part, b, ln_e);
#pragma unroll
    for (int g = 0; g < G; g++) {
        e[g] = exp_above(ln_e[g], memory->m[g]);
        share = __fmaf_rn(e[g], memory->total_inverse[g], share);
        is_known &= ln_e[g] < INFINITY;
    }
    float key = is_known ? __fmul_rn(log2_approx(share), 0.693147181f) : INFINITY;
    uint32_t class_b = class_of(key, memory->origin, memory->ln_cut);
    view.key[part.block_first + b] = key;
    if (class_b == CLASS_NEVER)
        return key;
    atomicAdd(class_b ? memory->count + class_b - 1 : &memory->n_unknown, 1);
    for (uint32_t g = 0; g < part.n_group; g++) {
        uint32_t *low = class_b ? mass_low(memory, g) + class_b - 1 : &memory->unknown[0][g];
        uint32_t *high =
            class_b ? mass_high(memory, part.n_group, g) + class_b - 1 : &memory->unknown[1][g];
        words_add(low, high, fixed(e[g]));
    }
    return key;
}

/* Keys and bins, added over the team: unknown blocks stand before bin 0. Returns the unknown. */
template <int G>
__device__ uint32_t keys_find(const winnow_gpu_view &view, team team, const part &part,
                              memory *memory)
{
    uint32_t end = part.first + part.n, n_unknown = 0;
    float largest = -INFINITY;

    each_block(part.first, part.n, [&](uint32_t b) {
        if (b >= end)
            return;
        float key = block_key<G>(view, part, b, memory);
        largest = key < INFINITY ? fmaxf(largest, key) : largest;
    });
    uint32_t rank = __reduce_max_sync(~0u, float_rank(largest));
    if (threadIdx.x % 32 == 0)
        atomicMax(team_at(team, &memory->key_largest, 0), rank);
    team_sync(team);
    for (uint32_t r = 0; r < team.n_ranks; r++)
        n_unknown += *team_at(team, &memory->n_unknown, r);
    if (n_unknown && threadIdx.x < part.n_group)
        for (uint32_t r = 0; r < team.n_ranks; r++) {
            uint64_t high = *team_at(team, &memory->unknown[1][threadIdx.x], r);
            memory->before[threadIdx.x] +=
                high << 32 | *team_at(team, &memory->unknown[0][threadIdx.x], r);
        }
    if (n_unknown)
        __syncthreads();
    return n_unknown;
}

__device__ void unit_write(winnow_gpu_unit *unit, uint32_t n_unknown, const memory *memory)
{
    unit->n_selected = memory->n_selected;
    unit->n_groups = (memory->n_selected + 7) / 8;
    unit->key_largest = rank_float(memory->key_largest);
    unit->key_quarter = memory->key_quarter;
    unit->key_threshold = memory->n_selected ? rank_float(memory->key_smallest)
                          : n_unknown        ? INFINITY
                                             : unit->key_largest;
    if (memory->has_unknown)
        atomicOr(&unit->has_unknown, 1);
}

template <int G>
__global__ void __launch_bounds__(N_THREADS, 1)
    select_kernel(const __grid_constant__ winnow_gpu_view view, uint32_t n_ranks)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    memory *memory = (struct memory *)dynamic;
    team team = {blockIdx.x % n_ranks, n_ranks};
    part part = {blockIdx.x / n_ranks, view.n_group, 0, 0, 0};

    if (part.unit_idx >= view.launch->n_units)
        return;
    winnow_gpu_unit *unit = view.unit + part.unit_idx;
    if (unit->status != 0)
        return;
    uint32_t n = unit->n_blocks, n_max = view.launch->item[unit->item].n_blocks_max;
    part.block_first = unit->block_first;
    part.first = (uint32_t)((uint64_t)n * team.rank / n_ranks);
    part.n = (uint32_t)((uint64_t)n * (team.rank + 1) / n_ranks) - part.first;
    n_max = n_max == 0 || n_max > n ? n : n_max;

    memory_clear(view.n_group, memory);
    __syncthreads();
    if (threadIdx.x == 0) {
        memory->bin_last = -1;
        memory->key_smallest = ~0u;
    }
    if (team.rank == 0 && threadIdx.x < 32)
        chunks_push(view, part.unit_idx, 1);
    largest_find<G>(view, team, part, memory);
    totals_find<G>(view, team, part, memory);
    uint32_t n_unknown = keys_find<G>(view, team, part, memory);
    threshold_find(team, part.n_group, memory);
    if (threadIdx.x < 32)
        selection_end(team, n_unknown, n_max, memory);
    __syncthreads();
    list_write(view, team, part.block_first, part.first, part.n, 1, view.listed + part.block_first,
               memory, [&](uint32_t b) {
                   return class_of(view.key[part.block_first + b], memory->origin, memory->ln_cut);
               });
    if (team.rank == 0 && threadIdx.x == 0)
        unit_write(unit, n_unknown, memory);
    list_resolve(view, team, part.unit_idx, 1, 0, memory->n_selected, 0, memory);
    if (threadIdx.x == 0)
        counts_write(view, unit, memory);
}

typedef void select_function(winnow_gpu_view, uint32_t);

select_function *function_find(const winnow_gpu_view *view)
{
    return view->n_group == 1   ? select_kernel<1>
           : view->n_group == 2 ? select_kernel<2>
           : view->n_group <= 4 ? select_kernel<4>
           : view->n_group <= 8 ? select_kernel<8>
                                : select_kernel<16>;
}

uint32_t memory_bytes(const winnow_gpu_view *view)
{
    return winnow_gpu_select_more_bytes(view->n_group);
}

/* Thread blocks a unit, as the average unit fills them and the device holds them at once. */
cudaError_t ranks_find(const winnow_gpu_grid *grid, uint32_t *n_ranks)
{
    uint64_t n_blocks = grid->n_blocks_max / grid->n_units_max;
    int device, major;
    cudaError_t rc = cudaGetDevice(&device);

    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    *n_ranks = 1;
    while (rc == cudaSuccess && major >= 9 && *n_ranks < N_RANKS_MAX &&
           n_blocks / (2 * *n_ranks) >= RANK_BLOCKS_MIN &&
           2 * *n_ranks * grid->n_units_max <= grid->n_multiprocessors)
        *n_ranks *= 2;
    return rc;
}

} // namespace

cudaError_t winnow_gpu_select_prepare(const struct winnow_gpu_view *view)
{
    return cudaFuncSetAttribute(function_find(view), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)memory_bytes(view));
}

cudaError_t winnow_gpu_stage_select(const struct winnow_gpu_view *view,
                                    const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    uint32_t n_ranks;
    cudaError_t rc = ranks_find(grid, &n_ranks);
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};

    if (rc != cudaSuccess)
        return rc;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = n_ranks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(grid->n_units_max * n_ranks);
    config.blockDim = dim3(N_THREADS);
    config.dynamicSmemBytes = memory_bytes(view);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = n_ranks > 1;
    return cudaLaunchKernelEx(&config, function_find(view), *view, n_ranks);
}
