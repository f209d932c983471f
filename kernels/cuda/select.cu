/*
 * Select: from ln_e to a list of blocks, each with its place, and the work of the stage after.
 *
 * A unit is a cluster's: its estimates are read twice (totals, keys), the second time from L1, and
 * its bins are added over the cluster's shared memory. What they are relative to, the largest, the
 * scan has left. The origin of the bins is the sum of exp(largest) / T over the heads, which no key
 * exceeds, so no pass is spent on the largest key. Blocks whose key lies below .9 (1 - P) / n hold
 * together less than 1 - P of any head: the prefix ends before them and they skip the bins, which
 * are atomics. Shares in bins are words of 2^-31 T: one atomic without a carry, and a prefix within
 * n 2^-32 of P.
 *
 * Sums are integers and every key is one thread's, so the bits are the same for any cluster.
 * Rejected: refining the last bin (0.5 % fewer blocks, a pass more), counting by global atomics
 * (3-6 us), a warp that searches the bins (10-30 us: each of its loads waits for the one before).
 */
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/select.cuh>
#include <kernels/cuda/stage.h>

using namespace winnow_gpu_select;

namespace
{

constexpr uint32_t N_THREADS = 1024, N_THREADS_SHORT = 256, RANK_BLOCKS_MIN = 2048;
constexpr uint32_t SHORT_BLOCKS_MAX = 512; /* of a unit: thread blocks share an SM */

/* What a thread block works on. */
struct part {
    winnow_gpu_unit *unit;
    uint32_t unit_idx, n_group, block_first;
    uint32_t first, n; /* of the unit's list: [first, first + n) */
    uint32_t goal;     /* P as a share */
    float ln_z;        /* of the head that is the thread's number */
};

/* Rows of blocks that are loaded at once: four loads wait no longer than one. */
template <int G> constexpr int ROWS = G <= 4 ? 4 : 16 / G;

/* ln_e of rows i .. of this lane; blocks and heads that are not there are -inf. */
template <int G>
__device__ void estimates_load(const winnow_gpu_view &view, const part &part, const rows &rows,
                               uint32_t i, float (&ln_e)[ROWS<G>][G])
{
    float4 none = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);

#pragma unroll
    for (int r = 0; r < ROWS<G>; r++) {
        uint32_t b = rows.block + 32 * (i + r);
        bool is_there = i + r < rows.n && b < rows.end;
        const float *at = view.ln_e + (size_t)(part.block_first + b) * part.n_group;
        if constexpr (G % 4 == 0)
            if (part.n_group == G) {
#pragma unroll
                for (int k = 0; k < G / 4; k++) {
                    float4 x = is_there ? ((const float4 *)at)[k] : none;
                    ln_e[r][4 * k] = x.x;
                    ln_e[r][4 * k + 1] = x.y;
                    ln_e[r][4 * k + 2] = x.z;
                    ln_e[r][4 * k + 3] = x.w;
                }
                continue;
            }
#pragma unroll
        for (int g = 0; g < G; g++)
            ln_e[r][g] = is_there && g < (int)part.n_group ? at[g] : -INFINITY;
    }
}

/* What follows from the totals: one lane a head, by warp 0. */
__device__ void totals_finish(team team, const part &part, memory *memory)
{
    uint32_t g = threadIdx.x;
    float share = 0;

    if (g < part.n_group) {
        uint64_t z = fixed(exp_above(part.ln_z, memory->m[g])), total = z;
        for (uint32_t r = 0; r < team.n_ranks; r++) {
            uint64_t high = *team_at(team, &memory->total[1][g], r);
            total += high << 32 | *team_at(team, &memory->total[0][g], r);
        }
        share = total ? __fdiv_rn(FIXED_ONE, __ull2float_rn(total)) : 0;
        memory->to_share[g] = share;
        memory->before[g] = share_word(__fmul_rn(__ull2float_rn(z), __fmul_rn(share, 0x1p-40f)));
        memory->goal[g] = total ? part.goal : 0;
        if (team.rank == 0) {
            part.unit->z[g] = z;
            part.unit->total[g] = total;
        }
    }
    for (uint32_t at = 16; at; at >>= 1)
        share = __fadd_rn(share, __shfl_xor_sync(~0u, share, at));
    if (g == 0) {
        memory->origin = __fmul_rn(log2_approx(share), 0.693147181f);
    }
}

template <int G>
__device__ void totals_find(const winnow_gpu_view &view, team team, const part &part,
                            memory *memory)
{
    rows rows = rows_of(part.first, part.n);
    uint64_t total[G] = {};

    for (uint32_t i = 0; i < rows.n; i += ROWS<G>) {
        float ln_e[ROWS<G>][G];
        estimates_load<G>(view, part, rows, i, ln_e);
#pragma unroll
        for (int r = 0; r < ROWS<G>; r++)
#pragma unroll
            for (int g = 0; g < G; g++)
                total[g] += fixed(exp_above(ln_e[r][g], memory->m[g]));
    }
    uint64_t mine = 0; /* lane g adds head g's */
#pragma unroll
    for (int g = 0; g < G; g++) {
        /* In pieces of 20 bits: 32 of them fit a word, and a warp adds words in one instruction. */
        uint64_t sum = __reduce_add_sync(~0u, (uint32_t)total[g] & 0xfffff);
        sum += (uint64_t)__reduce_add_sync(~0u, (uint32_t)(total[g] >> 20) & 0xfffff) << 20;
        sum += (uint64_t)__reduce_add_sync(~0u, (uint32_t)(total[g] >> 40)) << 40;
        mine = (int)(threadIdx.x % 32) == g ? sum : mine;
    }
    if (mine)
        words_add(&memory->total[0][threadIdx.x % 32], &memory->total[1][threadIdx.x % 32], mine);
    team_sync(team);
    if (threadIdx.x < 32)
        totals_finish(team, part, memory);
    __syncthreads();
}

/* Of one block: its key, written and kept, and its part of the bins. */
template <int G>
__device__ float block_key(const winnow_gpu_view &view, const part &part, uint32_t b,
                           const float (&ln_e)[G], memory *memory)
{
    float share[G], sum = 0;
    bool is_known = true;

#pragma unroll
    for (int g = 0; g < G; g++) {
        share[g] = __fmul_rn(exp_above(ln_e[g], memory->m[g]), memory->to_share[g]);
        sum = __fadd_rn(sum, share[g]);
        is_known &= ln_e[g] < INFINITY;
    }
    float key = is_known ? __fmul_rn(log2_approx(sum), 0.693147181f) : INFINITY;
    uint32_t class_b = class_of(key, memory->origin, memory->ln_cut);
    view.key[part.block_first + b] = key;
    if (b - part.first < N_KEPT)
        memory->key_kept[b - part.first] = key;
    if (class_b == CLASS_NEVER)
        return key;
    atomicAdd(class_b ? memory->count + class_b - 1 : &memory->n_unknown, 1);
#pragma unroll
    for (int g = 0; g < G; g++)
        if (g < (int)part.n_group)
            atomicAdd(class_b ? bin_shares(memory, g) + class_b - 1 : &memory->unknown[g],
                      share_word(share[g]));
    return key;
}

/* Keys and bins of the team. Returns the number of unknown blocks, which stand before bin 0. */
template <int G>
__device__ uint32_t keys_find(const winnow_gpu_view &view, team team, const part &part,
                              memory *memory)
{
    rows rows = rows_of(part.first, part.n);
    uint32_t n_unknown = 0;
    float largest = -INFINITY;

    for (uint32_t i = 0; i < rows.n; i += ROWS<G>) {
        float ln_e[ROWS<G>][G];
        estimates_load<G>(view, part, rows, i, ln_e);
#pragma unroll
        for (int r = 0; r < ROWS<G>; r++) {
            uint32_t b = rows.block + 32 * (i + r);
            if (i + r >= rows.n || b >= rows.end)
                continue;
            float key = block_key<G>(view, part, b, ln_e[r], memory);
            largest = key < INFINITY ? fmaxf(largest, key) : largest;
        }
    }
    uint32_t rank = __reduce_max_sync(~0u, float_rank(largest));
    if (threadIdx.x % 32 == 0)
        atomicMax(team_at(team, &memory->key_largest, 0), rank);
    team_sync(team);
    for (uint32_t r = 0; r < team.n_ranks; r++)
        n_unknown += *team_at(team, &memory->n_unknown, r);
    if (n_unknown && threadIdx.x < part.n_group)
        for (uint32_t r = 0; r < team.n_ranks; r++)
            memory->before[threadIdx.x] += *team_at(team, &memory->unknown[threadIdx.x], r);
    if (n_unknown)
        __syncthreads();
    return n_unknown;
}

/* One warp. The rank of the largest estimate was read long before. */
__device__ void unit_write(const part &part, uint32_t n_unknown, const memory *memory)
{
    winnow_gpu_unit *unit = part.unit;
    uint32_t n = memory->n_selected;
    float key_largest = rank_float(memory->key_largest);

    if (threadIdx.x < part.n_group)
        unit->largest[threadIdx.x] = memory->m[threadIdx.x];
    if (threadIdx.x > 0)
        return;
    unit->n_selected = n;
    unit->n_groups = (n + 7) / 8;
    unit->key_largest = key_largest;
    unit->key_threshold = n ? rank_float(memory->key_smallest) : n_unknown ? INFINITY : key_largest;
    unit->key_quarter = memory->quarter_bin
                            ? __fmaf_rn((float)memory->quarter_bin, -1 / BINS_NAT, memory->origin)
                            : INFINITY;
    if (n_unknown > n)
        atomicOr(&unit->has_unknown, 1);
}

/* m: the largest of ln_z and of the estimates, the rank of which the scan has left. Ends with a
 * barrier. */
__device__ void part_begin(team team, part *part, memory *memory)
{
    uint32_t g = threadIdx.x;

    if (g == 0) {
        memory->bin_last = -1;
        memory->key_smallest = ~0u;
    }
    if (g < part->n_group) {
        part->ln_z = part->unit->ln_z[g];
        uint32_t rank = __float_as_uint(part->unit->largest[g]);
        memory->m[g] = rank_float(max(rank, float_rank(part->ln_z)));
    }
    __syncthreads();
}

template <int G, int N>
__global__ void __launch_bounds__(N, 1024 / N)
    select_kernel(const __grid_constant__ winnow_gpu_view view, uint32_t n_ranks)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    memory *memory = (struct memory *)dynamic;
    team team = {blockIdx.x % n_ranks, n_ranks};
    uint32_t unit_idx = blockIdx.x / n_ranks;
    part part = {view.unit + unit_idx, unit_idx, view.n_group, 0, 0, 0, 0, 0};

    memory_clear(view.n_group, memory);
    earlier_kernels_wait();
    const winnow_gpu_item &item = view.launch->item[unit_idx / view.n_kv_heads];
    uint32_t n = part.unit->n_blocks, n_max = item.n_blocks_max;
    float mass = item.mass;
    list list = {{item.session, item.layer, unit_idx % view.n_kv_heads, view.launch->stamp},
                 false,
                 unit_idx,
                 part.unit->block_first,
                 1,
                 0,
                 0};
    if (unit_idx >= view.launch->n_units || part.unit->status != 0)
        return;
    part.block_first = list.block_first;
    part.first = (uint32_t)((uint64_t)n * team.rank / n_ranks);
    part.n = (uint32_t)((uint64_t)n * (team.rank + 1) / n_ranks) - part.first;
    part.goal = (uint32_t)ceilf(mass * SHARE_ONE);
    n_max = n_max == 0 || n_max > n ? n : n_max;
    __syncthreads();
    list.has_segments = segments_load(view, item.session, item.n_segments, memory);
    if (threadIdx.x == 32)
        memory->ln_cut = logf(0.9f * (1 - mass) / (float)n);
    part_begin(team, &part, memory);
    totals_find<G>(view, team, part, memory);
    uint32_t n_unknown = keys_find<G>(view, team, part, memory);
    selection_find<G, N_BINS / N>(team, part.n_group, n_unknown, n_max, memory);
    list_write(view, team, list, part.first, part.n, memory, [&](uint32_t b) {
        return b - part.first < N_KEPT ? memory->key_kept[b - part.first]
                                       : view.key[part.block_first + b];
    });
    if (team.rank == 0 && threadIdx.x < 32)
        unit_write(part, n_unknown, memory);
    list_resolve(view, team, list, memory->n_selected, memory);
    if (team.rank == 0 && threadIdx.x >= N - 32)
        chunks_push(view, unit_idx, 1);
    if (threadIdx.x == 0)
        counts_write(view, part.unit, list.unit.layer, memory);
}

typedef void select_function(winnow_gpu_view, uint32_t);

template <int N> select_function *function_find(uint32_t n_group)
{
    return n_group == 1   ? select_kernel<1, N>
           : n_group == 2 ? select_kernel<2, N>
           : n_group <= 4 ? select_kernel<4, N>
           : n_group <= 8 ? select_kernel<8, N>
                          : select_kernel<16, N>;
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
    select_function *functions[] = {function_find<N_THREADS>(view->n_group),
                                    function_find<N_THREADS_SHORT>(view->n_group)};
    cudaError_t rc = cudaSuccess;

    for (int i = 0; i < 2 && rc == cudaSuccess; i++)
        rc = cudaFuncSetAttribute(functions[i], cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)memory_bytes(view));
    return rc;
}

cudaError_t winnow_gpu_stage_select(const struct winnow_gpu_view *view,
                                    const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    uint32_t n_ranks;
    cudaError_t rc = ranks_find(grid, &n_ranks);
    bool is_short = grid->n_blocks_max / grid->n_units_max <= SHORT_BLOCKS_MAX;
    cudaLaunchAttribute attribute[2] = {};
    cudaLaunchConfig_t config = {};

    if (rc != cudaSuccess)
        return rc;
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    attribute[1].id = cudaLaunchAttributeClusterDimension;
    attribute[1].val.clusterDim.x = n_ranks;
    attribute[1].val.clusterDim.y = attribute[1].val.clusterDim.z = 1;
    config.gridDim = dim3(grid->n_units_max * n_ranks);
    config.blockDim = dim3(is_short ? N_THREADS_SHORT : N_THREADS);
    config.dynamicSmemBytes = memory_bytes(view);
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = n_ranks > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config,
                              is_short ? function_find<N_THREADS_SHORT>(view->n_group)
                                       : function_find<N_THREADS>(view->n_group),
                              *view, n_ranks);
}
