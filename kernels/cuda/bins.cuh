/*
 * Bins of keys, and the prefix of them that reaches what every query head asks for.
 *
 * Keys go into bins of 1/64 nat, class 1 + bin; class 0 are the unknown, which come first. A
 * selection is all classes below one, and, when the budget ends it, so many blocks of that class by
 * block number. Bins instead of a sort: at most 0.65 % more blocks, and no thread waits for another's
 * comparison.
 *
 * Every thread block of a team has bins of its own. Sums of 32 bins, its own, go to all others
 * before one barrier; a warp a head then finds the 32 bins in question among those and reads but
 * these from the others. Rejected: all bins of all others read by everybody (4,500 cycles with two
 * of them, and it grows with their number's square).
 */
#pragma once

#include <kernels/cuda/team.cuh>
#include <kernels/cuda/view.h>

namespace winnow_gpu_select
{

constexpr uint32_t N_BINS = WINNOW_GPU_BINS, CLASS_NEVER = N_BINS + 1;
constexpr uint32_t N_LISTED = 1024;   /* of a thread block: kept in shared memory */
constexpr uint32_t N_SEGMENTS = 1024; /* of a unit whose slots are kept */
constexpr float BINS_NAT = 64, FIXED_ONE = 0x1p40f;
constexpr float SHARE_ONE = 0x1p31f; /* T: shares in bins are words, added by one atomic */
static_assert(N_BINS == 32 * 32, "two levels of a warp");

/* Where listed blocks were found. */
enum { FOUND_DEVICE, FOUND_HOST, FOUND_UNFIT, FOUND_DISK, FOUND_EVICTION, FOUND_AHEAD, N_FOUND };

/* Shared, of a thread block. Rows: one a query head, of shares of T; the last, of counts. */
struct alignas(16) memory {
    uint64_t total[N_RANKS_MAX][WINNOW_GQA_MAX]; /* each thread block's, written by it */
    uint64_t warp_total[WINNOW_GQA_MAX][32];
    float m[WINNOW_GQA_MAX];         /* largest of the unit */
    float ln_z[WINNOW_GQA_MAX];      /* mass of its sinks and tail */
    float to_share[WINNOW_GQA_MAX];  /* x exp(ln_e - m): share of T */
    uint32_t before[WINNOW_GQA_MAX]; /* share before any block */
    uint32_t goal[WINNOW_GQA_MAX];
    float origin, ln_cut;
    uint32_t key_largest, key_smallest; /* ranks, in the team's rank 0; smallest: selected */
    int32_t bin_last;
    uint32_t n_unknown;
    uint32_t class_end, n_of_class_end, n_selected; /* the selection */
    uint32_t n_sure_before, n_maybe_before;         /* in the thread blocks before this one */
    uint32_t quarter_bin;                           /* the last quarter begins here; 0: all */
    uint32_t warp_sure[32], warp_maybe[32];
    uint32_t n_push[3], push_first[3]; /* fetches, ready, waiting */
    uint32_t n_found[N_FOUND];
    uint32_t unknown[WINNOW_GQA_MAX + 1]; /* class 0, by rows */
    uint32_t segment[N_SEGMENTS];
    uint32_t listed[N_LISTED];
    uint32_t unknown_of[N_RANKS_MAX][WINNOW_GQA_MAX + 1]; /* each thread block's, written by it */
    /* bins [rows][N_BINS]; folded [N_RANKS_MAX][rows][32]; shares */
};

static __device__ uint32_t *bins_of(memory *memory, uint32_t row)
{
    return (uint32_t *)(memory + 1) + row * N_BINS;
}

/* Sums of 32 bins each, of every thread block and written by it. */
static __device__ uint32_t *folded_of(memory *memory, uint32_t n_group, uint32_t rank, uint32_t row)
{
    return bins_of(memory, n_group + 1) + (rank * (n_group + 1) + row) * 32;
}

/* Of the first blocks of a thread block, while it makes its keys: [block][n_group] exp(ln_e - m),
 * the first of which the key then takes the place of. */
static __device__ float *shares_of(memory *memory, uint32_t n_group)
{
    return (float *)folded_of(memory, n_group, N_RANKS_MAX, 0);
}

static inline __host__ __device__ uint32_t memory_bytes(uint32_t n_group, uint32_t n_kept)
{
    uint32_t n_words = (n_group + 1) * (N_BINS + N_RANKS_MAX * 32) + n_kept * n_group;
    return (uint32_t)sizeof(struct memory) + 4 * n_words;
}

/* Clears what is added to. Needs a barrier after it. */
static __device__ void memory_clear(uint32_t n_group, memory *memory)
{
    uint32_t *words = (uint32_t *)memory, *bins = bins_of(memory, 0);
    uint32_t first = offsetof(struct memory, m) / 4, end = offsetof(struct memory, segment) / 4;

#pragma unroll 1
    for (uint32_t i = first + threadIdx.x; i < end; i += blockDim.x)
        words[i] = 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < (n_group + 1) * N_BINS / 4; i += blockDim.x)
        ((uint4 *)bins)[i] = make_uint4(0, 0, 0, 0);
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

static __device__ uint32_t share_word(float share)
{
    return __float2uint_rn(__fmul_rn(fminf(share, 1), SHARE_ONE));
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

/* Sums of 32 bins of a row, a lane each, to every thread block of the team. One warp. */
static __device__ void row_fold(team team, uint32_t n_group, uint32_t row, memory *memory)
{
    uint32_t lane = threadIdx.x % 32, sum = 0;
    const uint32_t *bins = bins_of(memory, row) + 32 * lane;

#pragma unroll 8
    for (uint32_t i = 0; i < 32; i++)
        sum += bins[(i + lane) % 32]; /* a bank a lane */
#pragma unroll 1
    for (uint32_t r = 0; r < team.n_ranks; r++) {
        team_at(team, folded_of(memory, n_group, team.rank, row), r)[lane] = sum;
        if (lane == 0)
            *team_at(team, &memory->unknown_of[team.rank][row], r) = memory->unknown[row];
    }
}

/* The lane at which the sum over lanes, from below on, reaches the goal: the last if none does.
 * *below: before that lane. */
static __device__ uint32_t lane_reaching(uint32_t sum, uint32_t goal, uint32_t *below)
{
    uint32_t inclusive = warp_scan(sum);
    uint32_t reached = __ballot_sync(~0u, *below + inclusive >= goal);
    uint32_t lane = reached ? __ffs(reached) - 1 : 31;

    *below += __shfl_sync(~0u, inclusive - sum, lane);
    return lane;
}

/* A bin's word of every other thread block of the team, all asked for at once. */
static __device__ void bins_ask(team team, uint32_t *bin, uint32_t (&of)[N_RANKS_MAX])
{
#pragma unroll
    for (uint32_t r = 1; r < N_RANKS_MAX; r++)
        of[r] = r < team.n_ranks ? *team_at(team, bin, team.rank ^ r) : 0;
}

struct bin_place {
    uint32_t bin, below; /* and the row's sum before it */
};

/* The bin at which a row reaches the goal, which it had not before bin 0, where it had `below`. One
 * warp. */
static __device__ __noinline__ bin_place bin_reaching(team team, uint32_t n_group, uint32_t row,
                                                      uint32_t below, uint32_t goal, memory *memory)
{
    uint32_t lane = threadIdx.x % 32, sum = 0;

#pragma unroll 1
    for (uint32_t r = 0; r < team.n_ranks; r++)
        sum += folded_of(memory, n_group, r, row)[lane];
    uint32_t first = 32 * lane_reaching(sum, goal, &below);
    uint32_t *bin = bins_of(memory, row) + first + lane, of[N_RANKS_MAX];
    sum = *bin;
    if (team.n_ranks > 1) {
        bins_ask(team, bin, of);
#pragma unroll
        for (uint32_t r = 1; r < N_RANKS_MAX; r++)
            sum += of[r];
    }
    uint32_t bin_idx = first + lane_reaching(sum, goal, &below);
    return {bin_idx, below};
}

struct bin_counts {
    uint32_t all, before; /* of the team; of the thread blocks before this one */
};

/* Blocks in the bins before bin_end. One warp. */
static __device__ __noinline__ bin_counts bins_count(team team, uint32_t n_group, uint32_t bin_end,
                                                     memory *memory)
{
    uint32_t lane = threadIdx.x % 32, first = bin_end / 32 * 32;
    uint32_t *bin = bins_of(memory, n_group) + first + lane, of[N_RANKS_MAX];
    bool is_there = first + lane < bin_end;
    bin_counts n = {is_there ? *bin : 0, 0};

    if (team.n_ranks > 1 && is_there) {
        bins_ask(team, bin, of);
#pragma unroll
        for (uint32_t r = 1; r < N_RANKS_MAX; r++) {
            n.all += of[r];
            n.before += (team.rank ^ r) < team.rank ? of[r] : 0;
        }
    }
#pragma unroll 1
    for (uint32_t r = 0; r < team.n_ranks; r++) {
        uint32_t sum = lane < first / 32 ? folded_of(memory, n_group, r, n_group)[lane] : 0;
        n.all += sum;
        n.before += r < team.rank ? sum : 0;
    }
    __syncwarp();
    return {__reduce_add_sync(~0u, n.all), __reduce_add_sync(~0u, n.before)};
}

/* From bin_last to the selection, within the budget. One warp. */
static __device__ void selection_end(team team, uint32_t n_group, uint32_t n_max, memory *memory)
{
    uint32_t n_unknown = 0, unknown_before = 0, bin_end = (uint32_t)(memory->bin_last + 1);
    bin_counts sure = bins_count(team, n_group, bin_end, memory), maybe = {0, 0};

#pragma unroll 1
    for (uint32_t r = 0; r < team.n_ranks; r++) {
        uint32_t n = memory->unknown_of[r][n_group];
        n_unknown += n;
        unknown_before += r < team.rank ? n : 0;
    }
    uint32_t n_all = n_unknown + sure.all, class_end = 1 + bin_end, n_of_class_end = 0;
    sure.before += unknown_before;
    if (n_unknown >= n_max) {
        class_end = 0;
        n_of_class_end = n_max;
        sure.before = 0;
        maybe.before = unknown_before;
    } else if (n_all > n_max) {
        bin_place last = bin_reaching(team, n_group, n_group, n_unknown, n_max, memory);
        class_end = 1 + last.bin;
        n_of_class_end = n_max - last.below;
        sure = bins_count(team, n_group, last.bin, memory);
        maybe = bins_count(team, n_group, last.bin + 1, memory);
        maybe.before -= sure.before;
        sure.before += unknown_before;
    }
    if (threadIdx.x % 32)
        return;
    memory->n_unknown = n_unknown;
    memory->n_selected = min(n_all, n_max);
    memory->class_end = class_end;
    memory->n_of_class_end = n_of_class_end;
    memory->n_sure_before = sure.before;
    memory->n_maybe_before = maybe.before;
}

/* From the bins to the selection. All threads; ends with a barrier. */
static __device__ void selection_find(team team, uint32_t n_group, uint32_t n_max, memory *memory)
{
    uint32_t n_warps = blockDim.x / 32, warp_idx = threadIdx.x / 32;

    __syncthreads();
#pragma unroll 1
    for (uint32_t row = warp_idx; row <= n_group; row += n_warps)
        row_fold(team, n_group, row, memory);
    team_sync(team);
#pragma unroll 1
    for (uint32_t g = warp_idx; g < n_group; g += n_warps) {
        uint32_t below = memory->before[g];
#pragma unroll 1
        for (uint32_t r = 0; r < team.n_ranks; r++)
            below += memory->unknown_of[r][g];
        if (below >= memory->goal[g])
            continue;
        bin_place last = bin_reaching(team, n_group, g, below, memory->goal[g], memory);
        if (threadIdx.x % 32 == 0)
            atomicMax(&memory->bin_last, (int32_t)last.bin);
    }
    __syncthreads();
    if (warp_idx == 0)
        selection_end(team, n_group, n_max, memory);
    __syncthreads();
}

/* Where the last quarter of the selection begins, at least 4 blocks of it. One warp, before the
 * team's next barrier. */
static __device__ void quarter_find(team team, uint32_t n_group, memory *memory)
{
    uint32_t n = memory->n_selected, n_quarter = max(4u, (n + 3) / 4);
    uint32_t goal = n - n_quarter + 1;

    if (n_quarter >= n || memory->n_unknown >= goal)
        return;
    bin_place first = bin_reaching(team, n_group, n_group, memory->n_unknown, goal, memory);
    if (threadIdx.x % 32 == 0)
        memory->quarter_bin = first.bin;
}

} // namespace winnow_gpu_select
