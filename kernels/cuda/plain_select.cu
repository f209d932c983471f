/*
 * Select and select_more, plain: one thread block, ref's definitions. Sums are fixed point and take
 * any order; a prefix ends where a scan over runs of the sorted list says so. The stages `select`
 * and `attend` decide by bins and never sort.
 */
#include <kernels/cuda/plain.cuh>

namespace
{
/* Sums of the runs that the threads own, one a query head; then what stands before each run. */
struct runs {
    uint64_t sum[WINNOW_GQA_MAX][N_THREADS];
};

struct heads {
    float largest[WINNOW_GQA_MAX], ln_sum[WINNOW_GQA_MAX];
    uint64_t z[WINNOW_GQA_MAX], total[WINNOW_GQA_MAX];
};

__device__ float ln_at(const float *ln, const struct winnow_selection &sel, uint32_t b, uint32_t g)
{
    return ln[(size_t)b * sel.n_q + g];
}

__device__ bool block_is_known(const struct winnow_selection &sel, uint32_t b)
{
    for (uint32_t g = 0; g < sel.n_q; g++)
        if (!is_known(ln_at(sel.ln_e, sel, b, g)))
            return false;
    return true;
}

/* M_g, the largest of ln_z, of the known ln_e and of the ln_m of selected blocks. */
__device__ float largest_of(const struct winnow_selection &sel, uint32_t g, bool with_ln_m)
{
    float largest = sel.ln_z[g];

    for (uint32_t b = threadIdx.x; b < sel.n_blocks; b += N_THREADS) {
        float ln_e = ln_at(sel.ln_e, sel, b, g);
        if (is_known(ln_e))
            largest = fmaxf(largest, ln_e);
        if (with_ln_m && sel.selected[b])
            largest = fmaxf(largest, ln_at(sel.ln_m, sel, b, g));
    }
    return block_max(largest);
}

__device__ void heads_init(struct heads &heads, const struct winnow_selection &sel)
{
    for (uint32_t g = 0; g < sel.n_q; g++) {
        float largest = largest_of(sel, g, false);
        uint64_t sum = 0, z = fixed(sel.ln_z[g], largest);
        for (uint32_t b = threadIdx.x; b < sel.n_blocks; b += N_THREADS)
            sum = fixed_add(sum, fixed(ln_at(sel.ln_e, sel, b, g), largest));
        sum = fixed_add(z, block_fixed_sum(sum));
        if (threadIdx.x == 0) {
            heads.largest[g] = largest;
            heads.ln_sum[g] = (float)log((double)sum * 0x1p-40);
            heads.z[g] = z;
            heads.total[g] = sum;
        }
    }
    __syncthreads();
}

__device__ float block_key(const struct winnow_selection &sel, uint32_t b,
                           const struct heads &heads)
{
    float sum = 0;

    if (!block_is_known(sel, b))
        return INFINITY;
    for (uint32_t g = 0; g < sel.n_q; g++) {
        float ln_e = ln_at(sel.ln_e, sel, b, g);
        if (ln_e > -INFINITY)
            sum += exp_or_0(ln_e - heads.largest[g] - heads.ln_sum[g]);
    }
    return logf(sum);
}

/* Ascending; n a power of two. */
__device__ void sort(uint64_t *key, uint32_t n)
{
    for (uint32_t size = 2; size <= n; size *= 2)
        for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
            for (uint32_t i = threadIdx.x; i < n / 2; i += N_THREADS) {
                uint32_t a = 2 * i - i % stride, b = a + stride;
                uint64_t x = key[a], y = key[b];
                if ((x > y) == ((a & size) == 0)) {
                    key[a] = y;
                    key[b] = x;
                }
            }
            __syncthreads();
        }
}

/*
 * The first place i of [first, end) where `is_enough` holds of the sums over [first, i), else end.
 * `value(i, g)` is what place i adds to the sum of query head g.
 */
template <class Value, class Enough>
__device__ uint32_t prefix(struct runs &runs, uint32_t n_q, uint32_t first, uint32_t end,
                           Value value, Enough is_enough)
{
    uint32_t n_run = (end - first + N_THREADS - 1) / N_THREADS, found = end;
    uint32_t run = min(first + threadIdx.x * n_run, end), run_end = min(run + n_run, end);
    uint64_t sum[WINNOW_GQA_MAX] = {};

    for (uint32_t g = 0; g < n_q; g++) {
        for (uint32_t i = run; i < run_end; i++)
            sum[g] = fixed_add(sum[g], value(i, g));
        runs.sum[g][threadIdx.x] = sum[g];
    }
    __syncthreads();
    if (threadIdx.x < n_q) {
        uint64_t before = 0;
        for (uint32_t i = 0; i < N_THREADS; i++) {
            uint64_t of_run = runs.sum[threadIdx.x][i];
            runs.sum[threadIdx.x][i] = before;
            before = fixed_add(before, of_run);
        }
    }
    __syncthreads();
    for (uint32_t g = 0; g < n_q; g++)
        sum[g] = runs.sum[g][threadIdx.x];
    for (uint32_t i = run; i < run_end && found == end; i++) {
        if (is_enough(i, sum))
            found = i;
        for (uint32_t g = 0; g < n_q; g++)
            sum[g] = fixed_add(sum[g], value(i, g));
    }
    return block_min(found);
}

/* How many of block_idx, at least n, it takes until every query head holds the mass. */
__device__ uint32_t reach(struct runs &runs, const struct winnow_selection &sel,
                          const struct heads &heads, uint32_t n, double mass)
{
    return prefix(
        runs, sel.n_q, 0, sel.n_blocks,
        [&](uint32_t i, uint32_t g) {
            return fixed(ln_at(sel.ln_e, sel, sel.block_idx[i], g), heads.largest[g]);
        },
        [&](uint32_t i, const uint64_t *sum) {
            bool is_enough = i >= n && block_is_known(sel, sel.block_idx[i]);
            for (uint32_t g = 0; g < sel.n_q && is_enough; g++)
                is_enough = (double)fixed_add(heads.z[g], sum[g]) >= mass * (double)heads.total[g];
            return is_enough;
        });
}

__global__ void select_blocks(struct winnow_selection sel, uint64_t *key, uint32_t n_keys,
                              uint32_t *counts)
{
    __shared__ struct heads heads;
    __shared__ struct runs runs;

    heads_init(heads, sel);
    for (uint32_t b = threadIdx.x; b < n_keys; b += N_THREADS) {
        key[b] = UINT64_MAX;
        if (b >= sel.n_blocks)
            continue;
        sel.ln_key[b] = block_key(sel, b, heads);
        key[b] = (uint64_t)~rank_of(sel.ln_key[b]) << 32 | b;
    }
    __syncthreads();
    sort(key, n_keys);
    for (uint32_t i = threadIdx.x; i < sel.n_blocks; i += N_THREADS)
        sel.block_idx[i] = (uint32_t)key[i];
    __syncthreads();

    double mass = (double)sel.mass;
    uint32_t n = reach(runs, sel, heads, 0, mass);
    uint32_t n_with_reserve = reach(runs, sel, heads, n, mass + (1 - mass) / 2);
    n = min(n, sel.n_blocks_max);
    for (uint32_t i = threadIdx.x; i < sel.n_blocks; i += N_THREADS)
        sel.selected[sel.block_idx[i]] = i < n;
    if (threadIdx.x == 0) {
        counts[0] = n;
        counts[1] = n_with_reserve - n;
    }
}

/* What was read, and what is left by its estimate. */
struct tally {
    float largest[WINNOW_GQA_MAX], rho[WINNOW_GQA_MAX];
    double read[WINNOW_GQA_MAX], rest[WINNOW_GQA_MAX];
};

/* Returns whether an unselected block's estimate is not known. */
__device__ bool tally_init(struct tally &tally, const struct winnow_selection &sel)
{
    bool has_unknown = false;

    for (uint32_t g = 0; g < sel.n_q; g++) {
        float largest = largest_of(sel, g, true);
        uint64_t read = 0, rest = 0;
        for (uint32_t b = threadIdx.x; b < sel.n_blocks; b += N_THREADS) {
            if (sel.selected[b]) {
                read = fixed_add(read, fixed(ln_at(sel.ln_m, sel, b, g), largest));
                continue;
            }
            rest = fixed_add(rest, fixed(ln_at(sel.ln_e, sel, b, g), largest));
            has_unknown |= !is_known(ln_at(sel.ln_e, sel, b, g));
        }
        read = fixed_add(fixed(sel.ln_z[g], largest), block_fixed_sum(read));
        rest = block_fixed_sum(rest);
        if (threadIdx.x == 0) {
            tally.largest[g] = largest;
            tally.read[g] = (double)read;
            tally.rest[g] = (double)rest;
        }
    }
    __syncthreads();
    return block_min(!has_unknown) == 0;
}

/* Where the last quarter of the selected that carry an estimate begins. */
__device__ uint32_t quarter_first(const struct winnow_selection &sel)
{
    uint32_t first = sel.n_selected;

    for (uint32_t i = threadIdx.x; i < sel.n_selected; i += N_THREADS)
        if (sel.selected[sel.block_idx[i]] != 3)
            first = min(first, i);
    first = block_min(first);
    uint32_t n_estimated = sel.n_selected - first, n_quarter = max((n_estimated + 3) / 4, 4u);
    return n_quarter < n_estimated ? sel.n_selected - n_quarter : first;
}

__device__ float price(const struct tally &tally, const struct winnow_selection &sel, uint32_t g)
{
    uint64_t sum_m = 0, sum_e = 0;

    for (uint32_t i = quarter_first(sel) + threadIdx.x; i < sel.n_selected; i += N_THREADS) {
        uint32_t b = sel.block_idx[i];
        if (!sel.selected[b] || !is_known(ln_at(sel.ln_e, sel, b, g)))
            continue;
        sum_m = fixed_add(sum_m, fixed(ln_at(sel.ln_m, sel, b, g), tally.largest[g]));
        sum_e = fixed_add(sum_e, fixed(ln_at(sel.ln_e, sel, b, g), tally.largest[g]));
    }
    sum_m = block_fixed_sum(sum_m);
    sum_e = block_fixed_sum(sum_e);
    if (sum_e == 0)
        return sum_m == 0 ? 1 : 8;
    return (float)fmin(fmax((double)sum_m / (double)sum_e, 1.0), 8.0);
}

__device__ float certify(const struct tally &tally, bool has_unknown, float rho, uint32_t g)
{
    double all = tally.read[g] + (double)rho * tally.rest[g];

    if (has_unknown)
        return 0;
    return all > 0 ? (float)(tally.read[g] / all) : 1;
}

/* Goes on in key order until every query head is served, by estimate. */
__device__ uint32_t add_blocks(struct runs &runs, const struct winnow_selection &sel,
                               const struct tally &tally)
{
    uint32_t first = sel.n_selected, end = max(first, min(sel.n_blocks, sel.n_blocks_max));
    uint32_t n = prefix(
        runs, sel.n_q, first, end,
        [&](uint32_t i, uint32_t g) {
            return fixed(ln_at(sel.ln_e, sel, sel.block_idx[i], g), tally.largest[g]);
        },
        [&](uint32_t, const uint64_t *added) {
            for (uint32_t g = 0; g < sel.n_q; g++) {
                double rho = (double)tally.rho[g];
                if (tally.read[g] + rho * (double)added[g] <
                    (double)sel.mass * (tally.read[g] + rho * tally.rest[g]))
                    return false;
            }
            return true;
        });

    for (uint32_t i = first + threadIdx.x; i < n; i += N_THREADS)
        sel.selected[sel.block_idx[i]] = 2;
    return n - first;
}

__global__ void select_more(struct winnow_selection sel, float *rho, float *mass, int may_add,
                            uint32_t *counts)
{
    __shared__ struct tally tally;
    __shared__ struct runs runs;
    bool has_unknown = tally_init(tally, sel), is_short = false;
    uint32_t n_added = 0;

    for (uint32_t g = 0; g < sel.n_q; g++) {
        float of_head = may_add ? price(tally, sel, g) : rho[g];
        float reached = certify(tally, has_unknown, of_head, g);
        is_short |= reached < sel.mass;
        __syncthreads();
        if (threadIdx.x == 0) {
            tally.rho[g] = rho[g] = of_head;
            mass[g] = reached;
        }
    }
    __syncthreads();
    if (may_add && is_short)
        n_added = add_blocks(runs, sel, tally);
    if (threadIdx.x == 0)
        counts[0] = n_added;
}
} /* namespace */

uint32_t winnow_gpu_select_keys(uint32_t n_blocks)
{
    uint32_t n = 1;
    while (n < n_blocks)
        n *= 2;
    return n;
}

cudaError_t winnow_gpu_select(const struct winnow_selection *sel, uint64_t *key, uint32_t *counts,
                              cudaStream_t stream)
{
    select_blocks<<<1, N_THREADS, 0, stream>>>(*sel, key, winnow_gpu_select_keys(sel->n_blocks),
                                               counts);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_select_more(const struct winnow_selection *sel, float *rho, float *mass,
                                   int may_add, uint32_t *counts, cudaStream_t stream)
{
    select_more<<<1, N_THREADS, 0, stream>>>(*sel, rho, mass, may_add, counts);
    return cudaGetLastError();
}
