/*
 * Select: from ln_e to a list of blocks, each with its place, and the work of the stage after.
 *
 * A unit is a team's, a cluster as large as the unit is long: its bins are added over the cluster's
 * shared memory. What estimates are relative to, the largest, the scan has left; the mass of sinks
 * and tail is added up from their partials beside the first loads of estimates. exp(ln_e - m) is
 * computed for the totals and kept in shared memory for the keys. The origin of the bins is the sum
 * of exp(largest) / T over the heads, which no key exceeds, so no pass is spent on the largest key.
 * Blocks whose key lies below .9 (1 - P) / n hold together less than 1 - P of any head: the prefix
 * ends before them and they skip the bins, which are atomics. Shares in bins are words of 2^-31 T:
 * one atomic without a carry, and a prefix within n 2^-32 of P.
 *
 * What hangs on the launch alone is read before the scan has ended; homes and locs of all the unit's
 * blocks are fetched into the L2 then, since most of their lines are read. A thread block on the
 * last SM that scan leaves is waited for meanwhile (3 us at 128K x 8): that has to be short.
 *
 * Time goes to latency: a unit of 128 blocks takes 9 us, mostly single warps that go from one
 * barrier to the next. So loops over rows are rolled (unrolled by four they took 2 us more), a
 * thread block more has to earn its barriers (2 us: from 2,048 blocks on), and keys go to memory
 * after the bins' barrier, which would wait for them.
 *
 * Sums are integers and every key is one thread's, so the bits are the same for any team.
 * Rejected: refining the last bin (0.5 % fewer blocks, a pass more), counting by global atomics
 * (3-6 us), 512 threads a thread block (2 us more from 4,096 blocks of one on), locs copied to
 * shared memory ahead of time (1 us before the wait for .3 after it), a barrier less by leaving
 * groups that two thread blocks share to wait (no gain).
 */
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/list.cuh>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/tail.cuh>

using namespace winnow_gpu_select;

namespace
{

constexpr uint32_t N_THREADS = 1024, N_THREADS_SHORT = 256;
constexpr uint32_t SHORT_BLOCKS_MAX = 512; /* of a unit: thread blocks share an SM */
constexpr uint32_t KEPT_BYTES = 98304, KEPT_BYTES_SHORT = 8192; /* of shares */
/* Nats above a step's threshold from which its next foresees a block (bench-foresight). */
constexpr float AHEAD_MARGIN = 0.25f;

/* What a thread block works on. */
struct part {
    winnow_gpu_unit *unit;
    winnow_gpu_unit_tally *tally;
    const float *tail; /* partials of n_tail_groups */
    uint32_t n_tail_groups, n_group, block_first;
    uint32_t first, n; /* of the unit's list: [first, first + n) */
    uint32_t n_kept;   /* of them whose shares are kept in shared memory */
    uint32_t goal;     /* P as a share */
};

/* A block's row of numbers, one a head; of heads that are not there `absent`. */
template <int G>
__device__ void row_load(const float *at, uint32_t n_group, float absent, float (&to)[G])
{
    if constexpr (G % 4 == 0)
        if (n_group == G) {
#pragma unroll
            for (int k = 0; k < G / 4; k++) {
                float4 x = ((const float4 *)at)[k];
                to[4 * k] = x.x;
                to[4 * k + 1] = x.y;
                to[4 * k + 2] = x.z;
                to[4 * k + 3] = x.w;
            }
            return;
        }
#pragma unroll
    for (int g = 0; g < G; g++)
        to[g] = g < (int)n_group ? at[g] : absent;
}

/* ln_e of a block. */
template <int G>
__device__ void estimates_load(const winnow_gpu_view &view, const part &part, uint32_t b,
                               float (&ln_e)[G])
{
    row_load<G>(view.ln_e + (size_t)(part.block_first + b) * part.n_group, part.n_group, -INFINITY,
                ln_e);
}

/* exp(ln_e - m); an unknown block has NaN in the first. */
template <int G> __device__ void estimates_exp(const float (&m)[G], float (&x)[G])
{
    bool is_known = true;

#pragma unroll
    for (int g = 0; g < G; g++) {
        is_known &= x[g] < INFINITY;
        x[g] = exp_above(x[g], m[g]);
    }
    if (!is_known)
        x[0] = __uint_as_float(__float_as_uint(x[0]) | 0x80000000u);
}

/* Shares of block i of a thread block, kept and read again. */
template <int G>
__device__ void shares_keep(const part &part, memory *memory, uint32_t i, const float (&e)[G])
{
    float *at = shares_of(memory, part.n_group) + i * part.n_group;

    if constexpr (G % 4 == 0)
        if (part.n_group == G) {
#pragma unroll
            for (int k = 0; k < G / 4; k++)
                ((float4 *)at)[k] = make_float4(e[4 * k], e[4 * k + 1], e[4 * k + 2], e[4 * k + 3]);
            return;
        }
#pragma unroll
    for (int g = 0; g < G; g++)
        if (g < (int)part.n_group)
            at[g] = e[g];
}

template <int G>
__device__ void shares_take(const part &part, memory *memory, uint32_t i, float (&e)[G])
{
    row_load<G>(shares_of(memory, part.n_group) + i * part.n_group, part.n_group, 0, e);
}

/* What follows from the totals: one lane a head, by warp 0. */
__device__ void totals_finish(team team, const part &part, memory *memory)
{
    uint32_t g = threadIdx.x;
    float share = 0;

    if (g < part.n_group) {
        uint64_t z = fixed(exp_above(memory->ln_z[g], memory->m[g])), total = z;
#pragma unroll 1
        for (uint32_t r = 0; r < team.n_ranks; r++)
            total += memory->total[r][g];
        share = total ? __fdiv_rn(FIXED_ONE, __ull2float_rn(total)) : 0;
        memory->to_share[g] = share;
        memory->before[g] = share_word(__fmul_rn(__ull2float_rn(z), __fmul_rn(share, 0x1p-40f)));
        memory->goal[g] = total ? part.goal : 0;
        if (team.rank == 0) {
            part.unit->z[g] = z;
            part.unit->total[g] = total;
            part.tally->largest[g] = 0; /* all have read it */
        }
    }
#pragma unroll 1
    for (uint32_t at = 16; at; at >>= 1)
        share = __fadd_rn(share, __shfl_xor_sync(~0u, share, at));
    if (g == 0)
        memory->origin = __fmul_rn(log2_approx(share), 0.693147181f);
}

/* Sums of the warps to a sum of the thread block, to all of the team. A warp a head. */
__device__ void totals_send(team team, uint32_t n_group, memory *memory)
{
    uint32_t lane = threadIdx.x % 32, n_warps = blockDim.x / 32;

#pragma unroll 1
    for (uint32_t g = threadIdx.x / 32; g < n_group; g += n_warps) {
        uint64_t sum = warp_sum(lane < n_warps ? memory->warp_total[g][lane] : 0);
        if (lane < team.n_ranks)
            *team_at(team, &memory->total[team.rank][g], lane) = sum;
    }
}

/* Mass of sinks and tail for head g, the ln of it, from their partials. One warp. */
__device__ float tail_mass(const winnow_gpu_view &view, const part &part, uint32_t g)
{
    const float *at = part.tail + 4 * g;
    uint32_t row = winnow_gpu_partial_floats(&view);
    float largest = -INFINITY, sum = 0;

#pragma unroll 1
    for (uint32_t i = threadIdx.x % 32; i < part.n_tail_groups; i += 32) {
        float2 x = *(const float2 *)(at + (size_t)i * row); /* m, l */
        float m = fmaxf(largest, x.x);
        sum = __fmaf_rn(sum, exp_above(largest, m), __fmul_rn(x.y, exp_above(x.x, m)));
        largest = m;
    }
    float m = rank_float(__reduce_max_sync(~0u, float_rank(largest)));
    sum = __fmul_rn(sum, exp_above(largest, m));
#pragma unroll 1
    for (uint32_t offset = 16; offset; offset >>= 1)
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, offset));
    return __fadd_rn(m, logf(sum));
}

/* m: the largest of ln_z and of the estimates, the rank of which the scan has left. A warp a head.
 * Ends with a barrier. */
__device__ void largest_find(const winnow_gpu_view &view, const part &part, memory *memory)
{
    if (threadIdx.x == 0) {
        memory->bin_last = -1;
        memory->key_smallest = ~0u;
    }
#pragma unroll 1
    for (uint32_t g = threadIdx.x / 32; g < part.n_group; g += blockDim.x / 32) {
        uint32_t rank = part.tally->largest[g];
        float ln_z = tail_mass(view, part, g);
        memory->ln_z[g] = ln_z;
        memory->m[g] = rank_float(max(rank, float_rank(ln_z)));
    }
    __syncthreads();
}

/* Keeps shares. Ends with a barrier. */
template <int G, int N>
__device__ void totals_find(const winnow_gpu_view &view, team team, const part &part,
                            memory *memory)
{
    rows rows = rows_of<N>(part.first, part.n);
    uint32_t warp_idx = threadIdx.x / 32;
    uint64_t total[G] = {};
    float next[G], m[G];

    if (rows.block < rows.end)
        estimates_load<G>(view, part, rows.block, next);
    largest_find(view, part, memory);
#pragma unroll
    for (int g = 0; g < G; g++)
        m[g] = memory->m[g];
#pragma unroll 1
    for (uint32_t i = 0; i < rows.n; i++) {
        uint32_t b = rows.block + 32 * i;
        float e[G];
        if (b >= rows.end)
            break;
#pragma unroll
        for (int g = 0; g < G; g++)
            e[g] = next[g];
        if (i + 1 < rows.n && b + 32 < rows.end)
            estimates_load<G>(view, part, b + 32, next);
        estimates_exp<G>(m, e);
        if (b - part.first < part.n_kept)
            shares_keep<G>(part, memory, b - part.first, e);
#pragma unroll
        for (int g = 0; g < G; g++)
            total[g] += fixed(g ? e[g] : fabsf(e[g]));
    }
    __syncwarp();
#pragma unroll
    for (int g = 0; g < G; g++) {
        total[g] = warp_sum(total[g]);
        if (threadIdx.x % 32 == 0)
            memory->warp_total[g][warp_idx] = total[g];
    }
    __syncthreads();
    team_wait(team); /* for them to be there */
    totals_send(team, part.n_group, memory);
    team_sync(team);
    if (warp_idx == 0)
        totals_finish(team, part, memory);
    __syncthreads();
}

/* Of one block: its key and its part of the bins. */
template <int G>
__device__ float block_key(const part &part, float (&e)[G], const float (&to_share)[G],
                           memory *memory)
{
    bool is_unknown = __float_as_uint(e[0]) >> 31;
    float sum = 0;

    e[0] = fabsf(e[0]);
#pragma unroll
    for (int g = 0; g < G; g++) {
        e[g] = __fmul_rn(e[g], to_share[g]);
        sum = __fadd_rn(sum, e[g]);
    }
    float key = is_unknown ? INFINITY : __fmul_rn(log2_approx(sum), 0.693147181f);
    uint32_t class_b = class_of(key, memory->origin, memory->ln_cut);
    if (class_b == CLASS_NEVER)
        return key;
    uint32_t *bins = class_b ? bins_of(memory, 0) + class_b - 1 : memory->unknown;
    uint32_t stride = class_b ? N_BINS : 1;
#pragma unroll
    for (int g = 0; g < G; g++)
        if (g < (int)part.n_group)
            atomicAdd(bins + g * stride, share_word(e[g]));
    atomicAdd(bins + part.n_group * stride, 1);
    return key;
}

/* Keys, kept as far as shares were, and bins of the thread block. */
template <int G, int N>
__device__ void keys_find(const winnow_gpu_view &view, team team, const part &part, memory *memory)
{
    rows rows = rows_of<N>(part.first, part.n);
    float largest = -INFINITY, to_share[G];

#pragma unroll
    for (int g = 0; g < G; g++)
        to_share[g] = memory->to_share[g];
#pragma unroll 1
    for (uint32_t i = 0; i < rows.n; i++) {
        uint32_t b = rows.block + 32 * i;
        float e[G];
        if (b >= rows.end)
            break;
        if (b - part.first < part.n_kept)
            shares_take<G>(part, memory, b - part.first, e);
        else {
            float m[G];
#pragma unroll
            for (int g = 0; g < G; g++)
                m[g] = memory->m[g];
            estimates_load<G>(view, part, b, e);
            estimates_exp<G>(m, e);
        }
        float key = block_key<G>(part, e, to_share, memory);
        if (b - part.first < part.n_kept)
            shares_of(memory, part.n_group)[(b - part.first) * part.n_group] = key;
        else
            view.key[part.block_first + b] = key;
        largest = key < INFINITY ? fmaxf(largest, key) : largest;
    }
    __syncwarp();
    uint32_t rank = __reduce_max_sync(~0u, float_rank(largest));
    if (threadIdx.x % 32 == 0)
        atomicMax(team_at(team, &memory->key_largest, 0), rank);
}

/* Kept keys to memory: not before the team's barrier, which waits for what threads have stored. */
template <int N>
__device__ void keys_write(const winnow_gpu_view &view, const part &part, memory *memory)
{
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < min(part.n, part.n_kept); i += N)
        view.key[part.block_first + part.first + i] =
            shares_of(memory, part.n_group)[i * part.n_group];
}

/* For the session's next step. One warp. */
__device__ void past_write(const winnow_gpu_view &view, const winnow_gpu_place &unit,
                           uint32_t n_group, const memory *memory)
{
    uint32_t lane = threadIdx.x % 32, layer = unit.session * view.n_layers + unit.layer;
    winnow_gpu_past *past = view.past + layer * view.n_kv_heads + unit.head;

    if (lane < n_group)
        past->ln_total[lane] = memory->m[lane] - logf(memory->to_share[lane]);
    if (lane > 0)
        return;
    past->key_foreseen =
        memory->n_selected ? rank_float(memory->key_smallest) + AHEAD_MARGIN : INFINITY;
}

/* One warp, after the team's last barrier. */
__device__ void unit_write(const winnow_gpu_view &view, const part &part, const list &list,
                           const memory *memory)
{
    winnow_gpu_unit *unit = part.unit;
    uint32_t n = memory->n_selected, lane = threadIdx.x % 32;
    float key_largest = rank_float(memory->key_largest);

    if (lane < part.n_group)
        unit->largest[lane] = memory->m[lane];
    if (view.n_ahead > 0)
        past_write(view, list.unit, part.n_group, memory);
    if (lane > 0)
        return;
    unit->n_selected = n;
    unit->n_groups = (n + 7) / 8;
    unit->key_largest = key_largest;
    unit->key_threshold = n                   ? rank_float(memory->key_smallest)
                          : memory->n_unknown ? INFINITY
                                              : key_largest;
    unit->key_quarter = memory->quarter_bin
                            ? __fmaf_rn((float)memory->quarter_bin, -1 / BINS_NAT, memory->origin)
                            : INFINITY;
    if (memory->n_unknown > n)
        atomicOr(&unit->has_unknown, 1);
}

/* Before the scan has ended: from the launch. */
__device__ void part_find(const winnow_gpu_view &view, team *team, part *part, list *list)
{
    const winnow_gpu_launch *launch = view.launch;
    const winnow_gpu_item &item = launch->item[blockIdx.z];
    uint32_t n = item.n_segments * view.span_blocks, ranks_log2 = team_ranks_log2(*team, n);

    team->n_ranks = 1u << ranks_log2;
    list->unit = {item.session, item.layer, blockIdx.y, 0};
    list->block_first = launch->block_first[blockIdx.z] + blockIdx.y * n;
    list->n_segments = item.n_segments;
    part->unit = view.unit + list->unit_idx;
    part->tally = view.unit_tally + list->unit_idx;
    part->tail = view.partial + (size_t)(launch->partial_first[blockIdx.z] +
                                         blockIdx.y * launch->partials_of_head[blockIdx.z]) *
                                    winnow_gpu_partial_floats(&view);
    part->n_tail_groups = tail_groups_of(view, item);
    part->n_group = view.n_group;
    part->block_first = list->block_first;
    part->first = n * team->rank >> ranks_log2;
    part->n = (n * (team->rank + 1) >> ranks_log2) - part->first;
    part->goal = (uint32_t)ceilf(item.mass * SHARE_ONE);
}

/* Clears, and brings near what the launch alone names. */
__device__ void part_prepare(const winnow_gpu_view &view, const part &part, const list &list,
                             uint32_t n, float mass, memory *memory)
{
    uint32_t span = view.span_blocks, first = part.first / span;
    uint32_t end = (part.first + part.n + span - 1) / span;
    const uint32_t *slots = view.session_segments + list.unit.session * view.n_session_segments_max;

    memory_clear(view.n_group, memory);
    segments_load(view, list, memory);
    winnow_gpu_resolve_prefetch(view, list.unit, slots + first, end - first);
    __syncthreads();
    if (threadIdx.x == 32)
        memory->ln_cut = logf(0.9f * (1 - mass) / (float)n);
}

template <int G, int N>
__global__ void __launch_bounds__(N, 1024 / N)
    select_kernel(const __grid_constant__ winnow_gpu_view view, uint32_t n_kept)
{
    extern __shared__ __align__(16) uint8_t dynamic[];
    memory *memory = (struct memory *)dynamic;
    team team = {blockIdx.x, gridDim.x};
    list list = {{}, blockIdx.z * view.n_kv_heads + blockIdx.y, 0, 0};
    part part;

    later_kernel_launch();
    part_find(view, &team, &part, &list); /* of no item: not used, but no load waits for n_items */
    bool is_there = blockIdx.z < view.launch->n_items && team.rank < team.n_ranks;
    const winnow_gpu_item &item = view.launch->item[blockIdx.z];
    uint32_t n = list.n_segments * view.span_blocks, n_max = item.n_blocks_max;
    n_max = n_max == 0 || n_max > n ? n : n_max;
    part.n_kept = n_kept;
    if (is_there) {
        part_prepare(view, part, list, n, item.mass, memory);
        team_arrive(team);
    }
    earlier_kernels_wait();
    if (!is_there)
        return;
    uint32_t status = part.unit->status;
    list.unit.stamp = view.launch->stamp;
    totals_find<G, N>(view, team, part, memory);
    if (status != 0) {
        if (team.rank == 0 && threadIdx.x < 32)
            chunks_push(view, list.unit_idx);
        return;
    }
    keys_find<G, N>(view, team, part, memory);
    selection_find(team, part.n_group, n_max, memory);
    keys_write<N>(view, part, memory);
    if (team.rank == 0 && threadIdx.x >= N - 32) {
        quarter_find(team, part.n_group, memory);
        chunks_push(view, list.unit_idx);
    }
    listed_run mine = list_write<N>(view, team, list, part.first, part.n, memory, [&](uint32_t b) {
        uint32_t i = b - part.first;
        return i < n_kept ? shares_of(memory, part.n_group)[i * part.n_group]
                          : view.key[part.block_first + b];
    });
    if (team.rank == 0 && threadIdx.x >= N - 32)
        unit_write(view, part, list, memory);
    list_resolve(view, list, mine, memory->n_selected, memory);
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

/* Blocks whose shares a thread block keeps. */
uint32_t kept_find(const winnow_gpu_view *view, bool is_short)
{
    return (is_short ? KEPT_BYTES_SHORT : KEPT_BYTES) / (4 * view->n_group);
}

} // namespace

cudaError_t winnow_gpu_select_prepare(const struct winnow_gpu_view *view)
{
    cudaError_t rc = cudaFuncSetAttribute(function_find<N_THREADS>(view->n_group),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          (int)memory_bytes(view->n_group, kept_find(view, false)));

    if (rc == cudaSuccess)
        rc = cudaFuncSetAttribute(function_find<N_THREADS_SHORT>(view->n_group),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  (int)memory_bytes(view->n_group, kept_find(view, true)));
    return rc;
}

cudaError_t winnow_gpu_stage_select(const struct winnow_gpu_view *view,
                                    const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    bool is_short = grid->n_blocks_max / grid->n_units_max <= SHORT_BLOCKS_MAX;
    uint32_t n_kept = kept_find(view, is_short);

    return team_launch(is_short ? function_find<N_THREADS_SHORT>(view->n_group)
                                : function_find<N_THREADS>(view->n_group),
                       grid, view->n_kv_heads, is_short ? N_THREADS_SHORT : N_THREADS,
                       memory_bytes(view->n_group, n_kept), stream, *view, n_kept);
}
