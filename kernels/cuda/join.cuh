/*
 * The end of a unit's round: the thread block that finishes its last partial joins them all in list
 * order, verifies, and writes the output; of a unit that is short it joins the masses alone.
 *
 * The masses {m, l} come first: largest, sums, verdict. The outputs come meanwhile, through shared
 * memory, in tiles, as many under way as fit: that takes few instructions and no registers. What is
 * run once by a thread block costs by its length, since its code comes from L2 too. A thread owns
 * four output columns; where there are fewer such than threads, they share the partials and add up
 * in a fixed order. Nothing depends on which thread block does it, or when.
 *
 * All of it is inline, as is all that takes the view: where a call hands its address on, the kernel's
 * parameters are loaded from memory, anew behind every barrier (128K x 8: 480 us a layer for 470, with the
 * fetch's registers kept out of local memory).
 *
 * What was read and what was not are the sums that the join forms anyway: the certificate costs no
 * pass over blocks. rho comes from quarter_m and quarter_e, integers that the attending warps added.
 */
#pragma once

#include <kernels/cuda/block.cuh>

constexpr int JOIN_SLOTS = 4; /* tiles: one is added, the others are under way */
constexpr int JOIN_BATCH = 4; /* masses that a thread loads at once */

template <class F> struct join_memory {
    static constexpr int ROW_FLOATS = F::HEADS * (F::WIDTH + 4), ROWS_FIT = 5808 / ROW_FLOATS;
    static constexpr int ROWS = ROWS_FIT < 16 ? ROWS_FIT : 16; /* partials of a tile */
    static constexpr int QUADS = F::HEADS * F::WIDTH / 4;
    static constexpr int PER_THREAD = QUADS > ATTEND_THREADS ? QUADS / ATTEND_THREADS : 1;

    float tile[JOIN_SLOTS][ROWS * ROW_FLOATS];
    float4 slice[ATTEND_THREADS];
    float2 of_warp[2][GROUP][F::HEADS];
    float largest[F::HEADS], sum[F::HEADS];
    uint32_t is_short, is_bad;
};

struct join_range {
    const float *partial; /* [n] of winnow_gpu_partial_floats */
    uint32_t n;
};

/* Mass of a head, relative to the largest m met: what was read and what was not. */
struct join_mass {
    float largest, read, rest;
};

/* Of values that thread t holds for head t % HEADS: over all threads, in a fixed order. */
template <class F, class Join>
__device__ inline float2 heads_reduce(float2 x, float2 (*of_warp)[F::HEADS], Join join)
{
    uint32_t lane = lane_id();

#pragma unroll
    for (int offset = 16; offset >= F::HEADS; offset /= 2)
        x = {join(x.x, __shfl_xor_sync(~0u, x.x, offset)),
             join(x.y, __shfl_xor_sync(~0u, x.y, offset))};
    if (lane < F::HEADS)
        of_warp[threadIdx.x / 32][lane] = x;
    __syncthreads();
    x = of_warp[0][lane % F::HEADS];
#pragma unroll
    for (int i = 1; i < GROUP; i++) {
        float2 y = of_warp[i][lane % F::HEADS];
        x = {join(x.x, y.x), join(x.y, y.y)};
    }
    return x;
}

/* Mass of head t % HEADS in partials first .. + step, .., by thread t; {-inf, } beyond the end. */
template <class F>
__device__ inline void masses_load(const winnow_gpu_view &view, const join_range &range,
                                   uint32_t first, float4 (&x)[JOIN_BATCH])
{
    uint32_t g = threadIdx.x % F::HEADS, row = winnow_gpu_partial_floats(&view);

    first += threadIdx.x / F::HEADS;
#pragma unroll
    for (int k = 0; k < JOIN_BATCH; k++) {
        uint32_t i = first + k * ATTEND_THREADS / F::HEADS;
        bool is_there = i < range.n && g < view.n_group;
        uint4 bits = load_if(is_there, (const uint4 *)(range.partial + (uint64_t)i * row) + g);
        x[k] = {is_there ? __uint_as_float(bits.x) : -INFINITY, __uint_as_float(bits.y),
                __uint_as_float(bits.z), 0};
    }
}

/* The mass of head t % HEADS, in thread t; x: the first ones' (masses_load). */
template <class F>
__device__ inline join_mass mass_join(const winnow_gpu_view &view, const join_range &range,
                                      float4 (&x)[JOIN_BATCH], float2 (*of_warp)[GROUP][F::HEADS])
{
    constexpr uint32_t STEP = ATTEND_THREADS / F::HEADS;
    join_mass mass = {-INFINITY, 0, 0};
    auto shrink_of = [](float m, float largest) {
        return m == -INFINITY ? 0 : exp_or_0(m - largest);
    };

    for (uint32_t first = 0; first < range.n; first += JOIN_BATCH * STEP) {
        float largest = mass.largest;
        if (first > 0)
            masses_load<F>(view, range, first, x);
#pragma unroll
        for (int k = 0; k < JOIN_BATCH; k++)
            largest = fmaxf(largest, x[k].x);
        float shrink = shrink_of(mass.largest, largest);
        mass = {largest, mass.read * shrink, mass.rest * shrink};
#pragma unroll
        for (int k = 0; k < JOIN_BATCH; k++) {
            float w = shrink_of(x[k].x, largest);
            mass.read += w * x[k].y;
            mass.rest += w * x[k].z;
        }
    }
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    float largest = heads_reduce<F>({mass.largest, 0}, of_warp[0], larger).x;
    float shrink = shrink_of(mass.largest, largest);
    auto add = [](float a, float b) { return a + b; };
    float2 sum = heads_reduce<F>({mass.read * shrink, mass.rest * shrink}, of_warp[1], add);
    return {largest, sum.x, sum.y};
}

/* Starts the loads of a tile; past the end nothing, but a group of them all the same. */
template <class F>
__device__ inline void tile_load(const winnow_gpu_view &view, const join_range &range,
                                 uint32_t tile, join_memory<F> *memory)
{
    uint32_t first = tile * memory->ROWS, row = winnow_gpu_partial_floats(&view);
    uint32_t n = first < range.n ? min(range.n - first, (uint32_t)memory->ROWS) * row / 4 : 0;
    const float4 *from = (const float4 *)(range.partial + (uint64_t)first * row);
    uint32_t to = shared_address(memory->tile[tile % JOIN_SLOTS]);

#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < n; i += ATTEND_THREADS)
        copy_start<16>(to + 16 * i, from + i);
    copies_group();
}

/* Output columns of a thread: quads p, p + ATTEND_THREADS, .. of [G][v_width / 4], and their heads. */
template <class F> struct join_output {
    float4 o[join_memory<F>::PER_THREAD];
    uint32_t g[join_memory<F>::PER_THREAD];
    uint32_t slice, n_slices, quad, n_quads;
};

template <class F> __device__ inline join_output<F> output_of(const winnow_gpu_view &view)
{
    join_output<F> to = {};

    to.n_quads = view.n_group * view.v_width / 4;
    to.n_slices = to.n_quads < ATTEND_THREADS ? ATTEND_THREADS / to.n_quads : 1;
    to.slice = to.n_slices == 1 ? 0 : threadIdx.x / to.n_quads;
    to.quad = threadIdx.x - to.slice * to.n_quads;
    if (to.slice >= to.n_slices)
        to.quad = to.n_quads;
    for (int k = 0; k < join_memory<F>::PER_THREAD; k++)
        to.g[k] = 4 * (to.quad + k * ATTEND_THREADS) / view.v_width;
    return to;
}

template <class F>
__device__ inline void tile_add(const winnow_gpu_view &view, const float *tile, uint32_t n,
                                const join_memory<F> *memory, join_output<F> &to)
{
    uint32_t row = winnow_gpu_partial_floats(&view);

#pragma unroll
    for (int k = 0; k < memory->PER_THREAD; k++) {
        uint32_t p = to.quad + k * ATTEND_THREADS;
        if (p >= to.n_quads)
            break;
        const float *at = tile + winnow_gpu_partial_at(&view) + 4 * p, *m = tile + 4 * to.g[k];
        float largest = memory->largest[to.g[k]];
        float4 o = to.o[k];
#pragma unroll 4
        for (uint32_t r = to.slice; r < n; r += to.n_slices) {
            float4 x = *(const float4 *)(at + r * row);
            float w = m[r * row] == -INFINITY ? 0 : exp_or_0(m[r * row] - largest);
            o.x += w * x.x, o.y += w * x.y, o.z += w * x.z, o.w += w * x.w;
        }
        to.o[k] = o;
    }
}

/* The weighed outputs, in the threads of slice 0. The first tiles are under way. */
template <class F>
__device__ inline void join_outputs(const winnow_gpu_view &view, const join_range &range,
                                    join_memory<F> *memory, join_output<F> &to)
{
#pragma unroll 1
    for (uint32_t tile = 0; tile * memory->ROWS < range.n; tile++) {
        uint32_t n = min(range.n - tile * memory->ROWS, (uint32_t)memory->ROWS);
        copies_wait<JOIN_SLOTS - 2>();
        __syncthreads(); /* and everyone is done with the tile before */
        tile_load<F>(view, range, tile + JOIN_SLOTS - 1, memory);
        tile_add<F>(view, memory->tile[tile % JOIN_SLOTS], n, memory, to);
    }
    if (to.n_slices == 1)
        return;
    memory->slice[threadIdx.x] = to.o[0];
    __syncthreads();
    if (to.slice > 0)
        to.quad = to.n_quads;
    for (uint32_t i = 1; to.quad < to.n_quads && i < to.n_slices; i++) {
        float4 x = memory->slice[i * to.n_quads + to.quad];
        to.o[0].x += x.x, to.o[0].y += x.y, to.o[0].z += x.z, to.o[0].w += x.w;
    }
}

/* What verification reads of a unit's head. */
struct join_estimates {
    uint64_t m, e;
    float rho, largest;
    uint32_t has_unknown;
};

__device__ inline join_estimates estimates_load(const winnow_gpu_unit *unit, uint32_t g)
{
    return {__ldcg(&unit->quarter_m[g]), __ldcg(&unit->quarter_e[g]), __ldcg(&unit->rho[g]),
            __ldcg(&unit->largest[g]), __ldcg(&unit->has_unknown)};
}

/* Verification of head g: the certificate, and what a second round would have to add. */
__device__ inline float join_verify(winnow_gpu_unit *unit, uint32_t g, const join_estimates &of,
                                    float mass, const join_mass &has, bool is_first_round)
{
    float rho = of.rho;

    if (is_first_round) {
        rho = of.m == 0 ? 1 : 8;
        if (of.e > 0)
            rho = fminf(fmaxf(__fdividef((float)of.m, (float)of.e), 1), 8);
    }
    float all = has.read + rho * has.rest;
    float need = fmaxf(__fdividef(mass * all - has.read, rho), 0);
    float reached = of.has_unknown ? 0 : all > 0 ? has.read / all : 1;
    unit->rho[g] = rho;
    unit->mass[g] = reached;
    if (is_first_round)
        unit->need[g] = need > 0 ? need * expf(has.largest - of.largest) : 0;
    return reached;
}

/* Numbers idx .. idx + 3, idx a multiple of 4, at once: over the link, a store is a packet. False if
 * one is not finite as stored. */
__device__ inline bool store_four(uint32_t dtype, void *at, uint64_t idx, float4 x)
{
    if (dtype == WINNOW_FP32) {
        ((float4 *)at)[idx / 4] = x;
        return isfinite(x.x) && isfinite(x.y) && isfinite(x.z) && isfinite(x.w);
    }
    uint32_t exponent = dtype == WINNOW_FP16 ? 0x7c00 : 0x7f80, high = exponent << 16;
    uint2 y;
    if (dtype == WINNOW_FP16)
        y = make_uint2(pack<WINNOW_FP16>(x.x, x.y), pack<WINNOW_FP16>(x.z, x.w));
    else
        y = make_uint2(pack<WINNOW_BF16>(x.x, x.y), pack<WINNOW_BF16>(x.z, x.w));
    ((uint2 *)at)[idx / 4] = y;
    return (y.x & exponent) != exponent && (y.x & high) != high && (y.y & exponent) != exponent &&
           (y.y & high) != high;
}

/* Writes out and lse of a head's queries, row head_first of the item's on; true if all of it is
 * finite. */
template <class F>
__device__ inline bool join_write(const winnow_gpu_view &view, void *out, float *lse,
                                  uint64_t head_first, const join_output<F> &of,
                                  const join_memory<F> *memory)
{
    uint32_t g = threadIdx.x;
    bool is_finite = true;

#pragma unroll
    for (int k = 0; k < memory->PER_THREAD; k++) {
        uint32_t p = of.quad + k * ATTEND_THREADS;
        if (p >= of.n_quads)
            break;
        float sum = memory->sum[of.g[k]], inverse = sum > 0 ? __fdividef(1, sum) : 0;
        float4 o = of.o[k];
        o = {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
        is_finite &= store_four(view.io_dtype, out, head_first * view.v_width + 4 * p, o);
    }
    if (g < view.n_group) {
        float sum = memory->sum[g];
        float y = sum > 0 ? memory->largest[g] + logf(sum) : -INFINITY;
        is_finite &= y < INFINITY;
        if (lse)
            lse[head_first + g] = y;
    }
    return is_finite;
}

/* Counts one more of `counter`; true in all threads when it was the last of n. What the thread
 * block wrote before is seen by the last, which sees what all others wrote. */
__device__ inline bool count_done(uint32_t *counter, uint32_t n, uint32_t *is_last)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t before;
        asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;"
                     : "=r"(before)
                     : "l"(counter)
                     : "memory");
        *is_last = before + 1 == n;
        if (before + 1 == n)
            __threadfence();
    }
    __syncthreads();
    return *is_last;
}

/* range: of the unit. False: it is short of P, nothing is written. */
template <class F>
__device__ inline bool unit_join(const winnow_gpu_view &view, uint32_t unit_idx, join_range range,
                                 bool is_first_round, join_memory<F> *memory)
{
    float4 masses[JOIN_BATCH];

    masses_load<F>(view, range, 0, masses);
#pragma unroll 1
    for (uint32_t tile = 0; tile < JOIN_SLOTS - 1; tile++)
        tile_load<F>(view, range, tile, memory);
    uint32_t item_idx = unit_idx / view.n_kv_heads, head = unit_idx % view.n_kv_heads;
    uint32_t g = min(threadIdx.x, view.n_group - 1);
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const winnow_gpu_item &item = view.launch->item[item_idx];
    join_estimates estimates = estimates_load(unit, g);
    uint32_t n_selected = __ldcg(&unit->n_selected), n_disk = __ldcg(&unit->n_disk);
    uint32_t n_max = item.n_blocks_max ? item.n_blocks_max : ~0u;
    bool is_more = n_selected < min(n_max, unit->n_blocks); /* to be selected */
    void *out = item.out;
    float *lse = item.lse, mass = item.mass;

    if (threadIdx.x == 0)
        memory->is_short = memory->is_bad = 0;
    join_output<F> output = output_of<F>(view);
    join_mass has = mass_join<F>(view, range, masses, memory->of_warp);
    if (threadIdx.x < view.n_group) {
        float reached = join_verify(unit, g, estimates, mass, has, is_first_round);
        memory->largest[g] = has.largest;
        memory->sum[g] = has.read + has.rest;
        /* What is missing on disk is no reason to read what was not selected. */
        if (is_first_round && reached < mass && is_more && n_disk == 0)
            memory->is_short = 1;
    }
    __syncthreads();
    if (memory->is_short) {
        copies_wait<0>();
        __syncthreads();
        return false;
    }
    join_outputs<F>(view, range, memory, output);
    if (!join_write<F>(view, out, lse, (uint64_t)head * view.n_group, output, memory))
        memory->is_bad = 1;
    __syncthreads();
    if (threadIdx.x == 0 && memory->is_bad)
        unit->status = EDOM_STATUS;
    return true;
}
