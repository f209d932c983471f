/*
 * The end of a unit: the thread block that finishes its last partial joins them all in list order,
 * verifies, and writes the output, or leaves the unit to the second round. The last head of an item
 * writes the item's certificate.
 *
 * Joining is two passes over the partials: the largest m first, then weights of a tile of partials
 * in shared memory and the outputs weighed by them. A thread owns a pair of output columns; where
 * there are fewer pairs than threads, they share the partials and add up in a fixed order. Nothing
 * depends on which thread block does it, or when.
 *
 * What was read and what was not are the sums that the join forms anyway: the certificate costs no
 * pass over blocks. rho comes from quarter_m and quarter_e, integers that the attending warps added.
 */
#pragma once

#include <kernels/cuda/block.cuh>

constexpr int JOIN_TILE = 128; /* partials weighed at once */
constexpr int JOIN_BATCH = 16; /* partials whose loads are under way at once */
constexpr int EDOM_STATUS = 33;

template <class F> struct join_memory {
    float weight[JOIN_TILE][F::HEADS];
    float2 slice[ATTEND_THREADS];
    float of_warp[3][GROUP][F::HEADS];
    float largest[F::HEADS], read[F::HEADS], rest[F::HEADS];
    uint32_t is_short, is_bad, is_last;
};

/* Of a value that thread t holds for head t % HEADS: over all threads, in a fixed order. */
template <class F, class Join>
__device__ inline float heads_reduce(float x, float (*of_warp)[F::HEADS], Join join)
{
    uint32_t lane = lane_id();

    for (int offset = 16; offset >= F::HEADS; offset /= 2)
        x = join(x, __shfl_xor_sync(~0u, x, offset));
    if (lane < F::HEADS)
        of_warp[threadIdx.x / 32][lane] = x;
    __syncthreads();
    x = of_warp[0][lane % F::HEADS];
    for (int i = 1; i < GROUP; i++)
        x = join(x, of_warp[i][lane % F::HEADS]);
    return x;
}

struct join_range {
    const float *partial; /* [n][G][v_width + 2] */
    uint32_t n_read, n;   /* the first n_read were read, the others are estimates */
};

/* Thread t's head is t % HEADS. Fills largest, read and rest (relative to it), and the weights of
 * the first tile. What fits registers is loaded once. */
template <class F>
__device__ inline void join_sums(const winnow_gpu_view &view, const join_range &range,
                                 join_memory<F> *memory)
{
    constexpr uint32_t STEP = ATTEND_THREADS / F::HEADS, KEPT = JOIN_TILE / STEP;
    uint32_t g = threadIdx.x % F::HEADS, first = threadIdx.x / F::HEADS;
    uint32_t stride = view.v_width + 2;
    uint32_t end = g < view.n_group ? range.n : 0;
    float largest = -INFINITY, read = 0, rest = 0;
    float2 kept[KEPT];
    auto at = [&](uint32_t i) {
        return (const float2 *)(range.partial + ((uint64_t)i * view.n_group + g) * stride);
    };

#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        uint32_t i = first + k * STEP;
        uint2 x = load_if(i < end, (const uint2 *)at(i));
        kept[k] = i < end ? make_float2(__uint_as_float(x.x), __uint_as_float(x.y))
                          : make_float2(-INFINITY, 0);
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        largest = fmaxf(largest, kept[k].x);
    for (uint32_t i = first + KEPT * STEP; i < end; i += STEP)
        largest = fmaxf(largest, __ldcg(at(i)).x);
    largest =
        heads_reduce<F>(largest, memory->of_warp[0], [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        uint32_t i = first + k * STEP;
        float w = kept[k].x == -INFINITY ? 0 : exp_or_0(kept[k].x - largest);
        memory->weight[i][g] = w;
        (i < range.n_read ? read : rest) += w * kept[k].y;
    }
    for (uint32_t i = first + KEPT * STEP; i < end; i += STEP) {
        float2 x = __ldcg(at(i));
        float w = x.x == -INFINITY ? 0 : exp_or_0(x.x - largest);
        (i < range.n_read ? read : rest) += w * x.y;
    }
    auto add = [](float a, float b) { return a + b; };
    read = heads_reduce<F>(read, memory->of_warp[1], add);
    rest = heads_reduce<F>(rest, memory->of_warp[2], add);
    if (threadIdx.x < F::HEADS) {
        memory->largest[g] = largest;
        memory->read[g] = read;
        memory->rest[g] = rest;
    }
    __syncthreads();
}

/* Verification of head g: the certificate, and what a second round would have to add. */
__device__ inline float join_verify(winnow_gpu_unit *unit, uint32_t g, float mass, float largest,
                                    float read, float rest, bool is_first_round)
{
    uint64_t m = __ldcg(&unit->quarter_m[g]), e = __ldcg(&unit->quarter_e[g]);
    float rho = __ldcg(&unit->rho[g]), of_estimates = __ldcg(&unit->largest[g]);
    bool has_unknown = __ldcg(&unit->has_unknown);

    if (is_first_round) {
        rho = m == 0 ? 1 : 8;
        if (e > 0)
            rho = (float)fmin(fmax((double)m / (double)e, 1.0), 8.0);
    }
    float all = read + rho * rest, need = fmaxf((mass * all - read) / rho, 0.0f);
    float reached = has_unknown ? 0 : all > 0 ? read / all : 1;
    unit->rho[g] = rho;
    unit->mass[g] = reached;
    unit->need[g] = need > 0 ? need * expf(largest - of_estimates) : 0;
    return reached;
}

__device__ inline bool store_as(uint32_t dtype, void *at, uint64_t idx, float x)
{
    if (dtype == WINNOW_FP32) {
        ((float *)at)[idx] = x;
    } else if (dtype == WINNOW_FP16) {
        __half y = __float2half_rn(x);
        ((__half *)at)[idx] = y;
        x = __half2float(y);
    } else {
        __nv_bfloat16 y = __float2bfloat16_rn(x);
        ((__nv_bfloat16 *)at)[idx] = y;
        x = __bfloat162float(y);
    }
    return isfinite(x);
}

/* Writes out and lse of a unit; true if all of it is finite. */
template <class F>
__device__ inline bool join_write(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                  const join_range &range, join_memory<F> *memory)
{
    const winnow_gpu_item &item = view.launch->item[unit->item];
    constexpr int PAIRS = F::HEADS * F::WIDTH / 2;
    constexpr int PER_THREAD = PAIRS > ATTEND_THREADS ? PAIRS / ATTEND_THREADS : 1;
    uint32_t half = view.v_width / 2, n_pairs = view.n_group * half;
    uint32_t n_slices = n_pairs < ATTEND_THREADS ? ATTEND_THREADS / n_pairs : 1;
    uint32_t slice = n_slices == 1 ? 0 : threadIdx.x / n_pairs;
    uint32_t pair = n_slices == 1 ? threadIdx.x : threadIdx.x % n_pairs;
    uint32_t stride = view.v_width + 2, row = view.n_group * stride;
    uint64_t head_first = (uint64_t)unit->head * view.n_group;
    float2 o[PER_THREAD] = {};
    bool is_finite = true;

    if (slice >= n_slices)
        pair = n_pairs;
    for (uint32_t first = 0; first < range.n; first += JOIN_TILE) {
        uint32_t n = min(range.n - first, (uint32_t)JOIN_TILE);
        if (first > 0)
            __syncthreads();
        for (uint32_t i = threadIdx.x; first > 0 && i < n * F::HEADS; i += ATTEND_THREADS) {
            uint32_t g = i % F::HEADS;
            float m = -INFINITY;
            if (g < view.n_group)
                m = __ldcg(range.partial + (uint64_t)(first + i / F::HEADS) * row + g * stride);
            memory->weight[i / F::HEADS][g] = m == -INFINITY ? 0 : exp_or_0(m - memory->largest[g]);
        }
        if (first > 0)
            __syncthreads();
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            uint32_t p = pair + k * ATTEND_THREADS;
            if (p >= n_pairs)
                break;
            uint32_t g = p / half, d = 2 * (p % half);
            const float *at = range.partial + (uint64_t)first * row + g * stride + 2 + d;
            for (uint32_t i = slice; i < n; i += JOIN_BATCH * n_slices) {
                uint2 x[JOIN_BATCH];
#pragma unroll
                for (int j = 0; j < JOIN_BATCH; j++) {
                    uint32_t row_idx = i + j * n_slices;
                    x[j] = load_if(row_idx < n, (const uint2 *)(at + (uint64_t)row_idx * row));
                }
#pragma unroll
                for (int j = 0; j < JOIN_BATCH; j++) {
                    uint32_t row_idx = i + j * n_slices;
                    float w = row_idx < n ? memory->weight[row_idx][g] : 0;
                    o[k].x += w * __uint_as_float(x[j].x);
                    o[k].y += w * __uint_as_float(x[j].y);
                }
            }
        }
    }
    if (n_slices > 1) {
        __syncthreads();
        memory->slice[threadIdx.x] = o[0];
        __syncthreads();
        for (uint32_t i = 1; slice == 0 && pair < n_pairs && i < n_slices; i++) {
            o[0].x += memory->slice[i * n_pairs + pair].x;
            o[0].y += memory->slice[i * n_pairs + pair].y;
        }
        if (slice > 0)
            pair = n_pairs;
    }
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
        uint32_t p = pair + k * ATTEND_THREADS;
        if (p >= n_pairs)
            break;
        uint32_t g = p / half, d = 2 * (p % half);
        float l = memory->read[g] + memory->rest[g];
        uint64_t at = (head_first + g) * view.v_width + d;
        is_finite &= store_as(view.io_dtype, item.out, at, l > 0 ? o[k].x / l : 0);
        is_finite &= store_as(view.io_dtype, item.out, at + 1, l > 0 ? o[k].y / l : 0);
    }
    if (threadIdx.x < view.n_group) {
        float l = memory->read[threadIdx.x] + memory->rest[threadIdx.x];
        float lse = l > 0 ? memory->largest[threadIdx.x] + logf(l) : -INFINITY;
        is_finite &= lse < INFINITY;
        if (item.lse)
            item.lse[head_first + threadIdx.x] = lse;
    }
    return is_finite;
}

/* NaN into all of an item's output: in every type, all bits set. */
__device__ inline void item_poison(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    uint32_t n_words = view.n_q_heads * view.v_width / (view.io_dtype == WINNOW_FP32 ? 1 : 2);

    for (uint32_t i = threadIdx.x; i < n_words; i += blockDim.x)
        ((uint32_t *)item.out)[i] = ~0u;
    for (uint32_t i = threadIdx.x; item.lse && i < view.n_q_heads; i += blockDim.x)
        item.lse[i] = NAN;
}

/* The blocks of an item that no slot holds, by one warp, in order. */
__device__ inline void item_list_disk(const winnow_gpu_view &view, const winnow_gpu_item &item,
                                      const winnow_gpu_unit *units)
{
    uint32_t n = 0, lane = lane_id();

    for (uint32_t h = 0; h < view.n_kv_heads; h++) {
        const winnow_gpu_unit *unit = units + h;
        uint32_t n_listed = __ldcg(&unit->n_selected) + __ldcg(&unit->n_more);
        if (!__ldcg(&unit->n_disk) && !__ldcg(&unit->n_unfit))
            continue;
        for (uint32_t first = 0; first < n_listed; first += 32) {
            winnow_gpu_listed listed = {0, 0};
            if (first + lane < n_listed) {
                uint2 x = __ldcg((const uint2 *)(view.listed + unit->block_first + first + lane));
                listed = {x.x, x.y};
            }
            bool is_slotless = listed.place & WINNOW_GPU_FROM_HOST; /* or on disk: all bits */
            uint32_t all = __ballot_sync(~0u, is_slotless);
            uint32_t at = n + __popc(all & ((1u << lane) - 1));
            if (is_slotless && at < item.n_disk_block_max)
                item.disk_block[at] = h * unit->n_blocks + listed.block;
            n += __popc(all);
        }
    }
}

/* By the last head of an item, all threads. */
template <class F>
__device__ inline void item_finish(const winnow_gpu_view &view, uint32_t item_idx,
                                   join_memory<F> *memory)
{
    const winnow_gpu_item &item = view.launch->item[item_idx];
    const winnow_gpu_unit *units = view.unit + item_idx * view.n_kv_heads;
    uint32_t lane = lane_id();

    if (threadIdx.x < 32) {
        winnow_gpu_certificate c = {0, 1, INFINITY, 0, 0, 0, 0, 0};
        for (uint32_t i = lane; i < view.n_q_heads; i += 32) {
            float mass = __ldcg(&units[i / view.n_group].mass[i % view.n_group]);
            c.mass_reached = fminf(c.mass_reached, mass);
            c.mass_mean += mass;
        }
        for (uint32_t h = lane; h < view.n_kv_heads; h += 32) {
            const winnow_gpu_unit *unit = units + h;
            c.status = max(c.status, __ldcg(&unit->status));
            c.n_rounds = max(c.n_rounds, __ldcg(&unit->n_more) > 0 ? 2 : 1);
            c.n_blocks_device += __ldcg(&unit->n_device);
            c.n_blocks_host += __ldcg(&unit->n_host);
            c.n_blocks_unfit += __ldcg(&unit->n_unfit);
            c.n_blocks_disk += __ldcg(&unit->n_disk);
            c.n_heads_spent +=
                item.n_blocks_max &&
                __ldcg(&unit->n_selected) + __ldcg(&unit->n_more) >= item.n_blocks_max;
        }
        for (int offset = 1; offset < 32; offset *= 2) {
            c.status = max(c.status, __shfl_xor_sync(~0u, c.status, offset));
            c.n_rounds = max(c.n_rounds, __shfl_xor_sync(~0u, c.n_rounds, offset));
            c.mass_reached = fminf(c.mass_reached, __shfl_xor_sync(~0u, c.mass_reached, offset));
            c.mass_mean += __shfl_xor_sync(~0u, c.mass_mean, offset);
            c.n_blocks_device += __shfl_xor_sync(~0u, c.n_blocks_device, offset);
            c.n_blocks_host += __shfl_xor_sync(~0u, c.n_blocks_host, offset);
            c.n_blocks_unfit += __shfl_xor_sync(~0u, c.n_blocks_unfit, offset);
            c.n_blocks_disk += __shfl_xor_sync(~0u, c.n_blocks_disk, offset);
            c.n_heads_spent += __shfl_xor_sync(~0u, c.n_heads_spent, offset);
        }
        c.mass_mean /= (float)view.n_q_heads;
        if (lane == 0) {
            *item.certificate = c;
            memory->is_bad = c.status;
        }
        if (c.n_blocks_disk > 0 && item.disk_block)
            item_list_disk(view, item, units);
    }
    __syncthreads();
    if (memory->is_bad)
        item_poison(view, item);
}

/* Counts one more of `counter`; true in all threads when it was the last of n. What the thread
 * block wrote before is seen by whom it tells, what the others wrote by the last. */
__device__ inline bool count_done(uint32_t *counter, uint32_t n, uint32_t *is_last)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t before;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                     : "=r"(before)
                     : "l"(counter)
                     : "memory");
        *is_last = before + 1 == n;
    }
    __syncthreads();
    return *is_last;
}

template <class F, bool IS_FIRST>
__device__ __noinline__ void unit_join(const winnow_gpu_view &view, uint32_t unit_idx,
                                       join_memory<F> *memory)
{
    winnow_gpu_unit *unit = view.unit + unit_idx;
    const winnow_gpu_item &item = view.launch->item[unit->item];
    uint32_t n_tail = unit->n_tail_groups, n_groups = __ldcg(&unit->n_groups),
             n_more = IS_FIRST ? 0 : __ldcg(&unit->n_groups_more), g = threadIdx.x;
    uint32_t n_selected = __ldcg(&unit->n_selected);
    uint32_t n_max = item.n_blocks_max ? min(item.n_blocks_max, unit->n_blocks) : unit->n_blocks;
    join_range range;

    range.partial =
        view.partial + (uint64_t)unit->partial_first * view.n_group * (view.v_width + 2);
    range.n_read = n_tail + n_groups + n_more;
    range.n = range.n_read + unit->n_chunks;
    if (threadIdx.x == 0)
        memory->is_short = memory->is_bad = 0;
    join_sums<F>(view, range, memory);
    if (g < view.n_group) {
        float mass = join_verify(unit, g, item.mass, memory->largest[g], memory->read[g],
                                 memory->rest[g], IS_FIRST);
        /* What is missing on disk is no reason to read what was not selected. */
        if (IS_FIRST && mass < item.mass && n_selected < n_max && __ldcg(&unit->n_disk) == 0)
            memory->is_short = 1;
    }
    __syncthreads();
    if (memory->is_short) {
        if (threadIdx.x == 0) {
            unit->is_short = 1;
            unit->n_done = 0;
            atomicAdd(&view.queue[0].n_short, 1);
        }
        return;
    }
    if (!join_write<F>(view, unit, range, memory))
        memory->is_bad = 1;
    __syncthreads();
    if (threadIdx.x == 0 && memory->is_bad)
        unit->status = EDOM_STATUS;
    uint32_t first_head = unit_idx - unit->head;
    if (count_done(&view.unit[first_head].n_heads_done, view.n_kv_heads, &memory->is_last))
        item_finish<F>(view, unit->item, memory);
}
