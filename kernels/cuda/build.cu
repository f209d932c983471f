/*
 * Build on the device: balanced bisection and the index, a thread block a unit (segment, layer, KV
 * head), as ref/bisect.c and ref/index.c define them.
 *
 * Means and projections are fp64, as ref's; the covariance is fp32 of keys relative to the unit's
 * largest difference from its mean, so that no key is too large: it decides a direction, not a
 * sum. 8 x 8 products a thread, by interleaved dimensions, each unordered pair once.
 * A node is never sorted: its tokens stand in order of position, so the threshold of the split is
 * found by four histograms of 8 bits, and two prefix sums keep the order. Rejected: a sort a level
 * (45 steps over 1,024 keys where 4 + 4 do), float atomics (another result every run), and fp64
 * products (twice the registers and shared memory: 6.5 ms a unit of 1,024 x 128).
 */
#include <float.h>
#include <kernels/cuda/plain.cuh>

namespace
{
constexpr uint32_t N_POWER_ITERATIONS = 16, N_TILE = 8, CHUNK_FLOATS = 4096;
constexpr uint32_t WIDTH_MAX = WINNOW_WIDTH_MAX;

/* Of one unit, in shared memory; behind it C, its lower triangle. */
struct node {
    double mean[WIDTH_MAX], sum[N_THREADS];
    float x[CHUNK_FLOATS], v[WIDTH_MAX], part[N_THREADS];
    uint32_t histogram[256], of_warp[N_THREADS / 32], digit, n_below;
};

struct unit {
    uint32_t width;
    const float *k;
    uint16_t *order, *moved; /* of the node's first token on; moved: scratch */
    uint32_t *rank;
    float *c;     /* see c_at */
    double scale; /* 1 / the unit's largest |k - mean|, 0 when there is none */
};

__device__ const float *token_key(const struct unit &unit, uint32_t i)
{
    return unit.k + (size_t)unit.order[i] * unit.width;
}

/* Exclusive sum over the thread block; *total is the sum of all. */
__device__ uint32_t block_scan(struct node &node, uint32_t x, uint32_t *total)
{
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = x, before = 0;

    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        uint32_t y = __shfl_up_sync(~0u, sum, offset);
        sum += lane >= offset ? y : 0;
    }
    __syncthreads();
    if (lane == 31)
        node.of_warp[warp] = sum;
    __syncthreads();
    *total = 0;
    for (uint32_t i = 0; i < N_THREADS / 32; i++) {
        before += i < warp ? node.of_warp[i] : 0;
        *total += node.of_warp[i];
    }
    return before + sum - x;
}

/* The mean of every dimension; where threads are left over, they share the tokens. */
__device__ void node_mean(struct node &node, const struct unit &unit, uint32_t n_tokens)
{
    uint32_t width = unit.width, n_parts = N_THREADS / width, d = threadIdx.x % width,
             part = threadIdx.x / width;
    double sum = 0;

    if (part < n_parts) {
#pragma unroll 16
        for (uint32_t i = part; i < n_tokens; i += n_parts)
            sum += (double)token_key(unit, i)[d];
    }
    node.sum[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0) {
        for (uint32_t i = 1; i < n_parts; i++)
            sum += node.sum[i * width + d];
        node.mean[d] = sum / n_tokens;
    }
    __syncthreads();
}

/* 1 / the largest |k - mean| of all tokens; 0 when all are one. */
__device__ double unit_scale(struct node &node, const struct unit &unit, uint32_t n_tokens)
{
    double largest = 0;

    node_mean(node, unit, n_tokens);
    for (uint32_t i = threadIdx.x; i < n_tokens * unit.width; i += N_THREADS)
        largest = fmax(largest, fabs((double)unit.k[i] - node.mean[i % unit.width]));
    largest = block_reduce(largest, [](double a, double b) { return fmax(a, b); });
    return largest > 0 ? 1 / largest : 0;
}

/* X = (keys - mean) x scale of up to n tokens, the rest 0. */
__device__ void chunk_load(struct node &node, const struct unit &unit, uint32_t first, uint32_t n,
                           uint32_t n_tokens)
{
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < n * unit.width; i += N_THREADS) {
        uint32_t t = i / unit.width, d = i % unit.width;
        node.x[i] =
            first + t < n_tokens
                ? (float)(((double)token_key(unit, first + t)[d] - node.mean[d]) * unit.scale)
                : 0;
    }
    __syncthreads();
}

/* Tile (row, column), row <= column, of n x n: of dimensions row + n i and column + n j. */
__device__ void tile_at(uint32_t idx, uint32_t n, uint32_t *row, uint32_t *column)
{
    for (*row = 0; idx >= n - *row; ++*row)
        idx -= n - *row;
    *column = *row + idx;
}

/* Triangular numbers are all different modulo 32 for 32 rows: neither a row nor a column of the
 * triangle, a thread an element, meets a bank twice. */
__device__ uint32_t c_at(uint32_t p, uint32_t q)
{
    return p >= q ? p * (p + 1) / 2 + q : q * (q + 1) / 2 + p;
}

/* C = X^T X. */
__device__ void node_covariance(struct node &node, const struct unit &unit, uint32_t n_tokens)
{
    uint32_t n = unit.width / N_TILE, n_tiles = n * (n + 1) / 2;
    uint32_t n_chunk = CHUNK_FLOATS / unit.width;

    for (uint32_t first = 0; first < n_tiles; first += N_THREADS) {
        uint32_t idx = first + threadIdx.x, row = 0, column = 0;
        bool has_tile = idx < n_tiles;
        float c[N_TILE][N_TILE] = {};

        if (has_tile)
            tile_at(idx, n, &row, &column);
        for (uint32_t token = 0; token < n_tokens; token += n_chunk) {
            uint32_t n_here = min(n_chunk, n_tokens - token);
            chunk_load(node, unit, token, n_here, n_tokens);
            for (uint32_t t = 0; t < n_here && has_tile; t++) {
                const float *x = node.x + t * unit.width;
                float a[N_TILE], b[N_TILE];
                for (uint32_t i = 0; i < N_TILE; i++) {
                    a[i] = x[row + n * i];
                    b[i] = x[column + n * i];
                }
                for (uint32_t i = 0; i < N_TILE; i++)
                    for (uint32_t j = 0; j < N_TILE; j++)
                        c[i][j] = fmaf(a[i], b[j], c[i][j]);
            }
        }
        for (uint32_t i = 0; i < N_TILE && has_tile; i++)
            for (uint32_t j = 0; j < N_TILE; j++) {
                uint32_t p = row + n * i, q = column + n * j;
                unit.c[c_at(p, q)] = c[i][j];
            }
    }
    __syncthreads();
}

/* The dimension of the largest variance, the first of equals; its variance. */
__device__ uint32_t node_widest(const struct unit &unit, float *largest)
{
    uint32_t d = threadIdx.x;
    float mine = d < unit.width ? unit.c[c_at(d, d)] : -1;

    *largest = block_max(mine);
    return block_min(mine == *largest ? d : unit.width);
}

/* v becomes C v / |C v|, C relative to its largest; several threads share a row. */
__device__ void power_step(struct node &node, const struct unit &unit, float inverse)
{
    uint32_t width = unit.width, n_parts = N_THREADS / width, row = threadIdx.x % width,
             part = threadIdx.x / width;
    float sum = 0;

    if (part < n_parts) {
#pragma unroll 8
        for (uint32_t d = part; d < width; d += n_parts)
            sum = fmaf(unit.c[c_at(row, d)], node.v[d], sum);
        sum *= inverse;
    }
    node.part[threadIdx.x] = sum;
    __syncthreads();
    for (uint32_t i = 1; i < n_parts && part == 0; i++)
        sum += node.part[i * width + row];
    float square = block_reduce(part == 0 ? sum * sum : 0, [](float a, float b) { return a + b; });
    if (part == 0)
        node.v[row] = sum / sqrtf(square);
    __syncthreads();
}

/* The widest direction, by power iteration from the dimension of the largest variance. */
__device__ void node_direction(struct node &node, const struct unit &unit, uint32_t n_tokens)
{
    float largest;

    node_covariance(node, unit, n_tokens);
    uint32_t widest = node_widest(unit, &largest);
    if (threadIdx.x < unit.width)
        node.v[threadIdx.x] = threadIdx.x == widest ? 1 : 0;
    __syncthreads();
    for (uint32_t i = 0; i < N_POWER_ITERATIONS && largest > FLT_MIN; i++)
        power_step(node, unit, 1 / largest);
}

/* Ranks of the projections: a warp a token. */
__device__ void node_project(const struct node &node, const struct unit &unit, uint32_t n_tokens)
{
    uint32_t lane = threadIdx.x % 32;

#pragma unroll 2
    for (uint32_t i = threadIdx.x / 32; i < n_tokens; i += N_THREADS / 32) {
        const float *k = token_key(unit, i);
        double sum = 0;
        for (uint32_t d = lane; d < unit.width; d += 32)
            sum = fma((double)k[d] - node.mean[d], (double)node.v[d], sum);
        for (int offset = 16; offset > 0; offset /= 2)
            sum += __shfl_xor_sync(~0u, sum, offset);
        if (lane == 0)
            unit.rank[i] = rank_of((float)sum);
    }
    __syncthreads();
}

/* The rank of the n-th smallest, n >= 1; *n_below becomes how many of its equals are among them. */
__device__ uint32_t node_threshold(struct node &node, const struct unit &unit, uint32_t n_tokens,
                                   uint32_t n, uint32_t *n_equal)
{
    uint32_t found = 0, total;

    for (int shift = 24; shift >= 0; shift -= 8) {
        node.histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n_tokens; i += N_THREADS)
            if (shift == 24 || unit.rank[i] >> (shift + 8) == found)
                atomicAdd(&node.histogram[unit.rank[i] >> shift & 255], 1);
        __syncthreads();
        uint32_t count = node.histogram[threadIdx.x], before = block_scan(node, count, &total);
        if (before < n && n <= before + count) {
            node.digit = threadIdx.x;
            node.n_below = before;
        }
        __syncthreads();
        found = found << 8 | node.digit;
        n -= node.n_below;
        __syncthreads();
    }
    *n_equal = n;
    return found;
}

/* The n_left tokens of the smallest projections first, equals by position; both in its order. */
__device__ void node_split(struct node &node, const struct unit &unit, uint32_t n_tokens,
                           uint32_t n_left)
{
    uint32_t n_equal_left, threshold = node_threshold(node, unit, n_tokens, n_left, &n_equal_left);
    uint32_t n_less = 0, n_equal = 0, total;

    for (uint32_t first = 0; first < n_tokens; first += N_THREADS) {
        uint32_t i = first + threadIdx.x;
        bool is_less = i < n_tokens && unit.rank[i] < threshold;
        bool is_equal = i < n_tokens && unit.rank[i] == threshold;
        uint32_t before = block_scan(node, (uint32_t)is_equal << 16 | is_less, &total);
        uint32_t equal_before = n_equal + (before >> 16);
        uint32_t left_before = n_less + (before & 0xffff) + min(equal_before, n_equal_left);
        bool is_left = is_less || (is_equal && equal_before < n_equal_left);
        if (i < n_tokens)
            unit.moved[is_left ? left_before : n_left + i - left_before] = unit.order[i];
        n_less += total & 0xffff;
        n_equal += total >> 16;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n_tokens; i += N_THREADS)
        unit.order[i] = unit.moved[i];
    __syncthreads();
}

__host__ __device__ size_t unit_scratch_bytes(uint32_t n_blocks)
{
    return (size_t)16 * n_blocks * (sizeof(uint32_t) + sizeof(uint16_t));
}

__global__ void __launch_bounds__(N_THREADS, 2)
    bisect(uint32_t width, uint32_t n_blocks, const float *k, uint16_t *order, uint8_t *scratch)
{
    extern __shared__ double memory[];
    struct node &node = *(struct node *)memory;
    uint32_t n_tokens = 16 * n_blocks, depth = 1;
    uint32_t stack[16] = {n_blocks}; /* first block << 16 | blocks; the right half waits below */
    uint32_t *rank = (uint32_t *)(scratch + blockIdx.x * unit_scratch_bytes(n_blocks));
    struct unit unit = {};

    unit.width = width;
    unit.k = k + (size_t)blockIdx.x * n_tokens * width;
    unit.c = (float *)(&node + 1);
    order += (size_t)blockIdx.x * n_tokens;
    for (uint32_t t = threadIdx.x; t < n_tokens; t += N_THREADS)
        order[t] = (uint16_t)t;
    __syncthreads();
    unit.order = order;
    unit.scale = unit_scale(node, unit, n_tokens);
    while (depth > 0) {
        uint32_t first = stack[--depth] >> 16, n = stack[depth] & 0xffff, n_left = (n + 1) / 2;
        if (n <= 1)
            continue;
        unit.order = order + 16 * first;
        unit.rank = rank + 16 * first;
        unit.moved = (uint16_t *)(rank + n_tokens) + 16 * first;
        node_mean(node, unit, 16 * n);
        node_direction(node, unit, 16 * n);
        node_project(node, unit, 16 * n);
        node_split(node, unit, 16 * n, 16 * n_left);
        stack[depth++] = (first + n_left) << 16 | (n - n_left);
        stack[depth++] = first << 16 | n_left;
    }
}

/* fp64 to the next fp32 that is not below it. */
__device__ float round_up(double x)
{
    return __double2float_ru(x);
}

__device__ int clamp_round(float x, int largest)
{
    float y = rintf(x);
    return y > (float)largest ? largest : y < (float)-largest ? -largest : (int)y;
}

/* x of this thread's dimension as int8 times the returned scale, absmax / 127. */
__device__ float quantise(float x, int8_t *ret)
{
    float scale = block_max(fabsf(x)) / 127.0f;
    *ret = scale > 0 ? (int8_t)clamp_round(x / scale, 127) : 0;
    return scale;
}

/* Of the tokens of one block, in shared memory. */
struct members {
    const float *k[16], *v[16];
    float mu[WIDTH_MAX]; /* the stored centroid */
    double exact_mu[WIDTH_MAX], var[WIDTH_MAX], distance[16];
};

/* Mean of dimension d of 16 rows; *var is their variance. */
__device__ double rows_mean(const float *const *row, uint32_t d, double *var)
{
    double sum = 0, square = 0;

    for (uint32_t i = 0; i < 16; i++)
        sum += (double)row[i][d];
    sum /= 16;
    for (uint32_t i = 0; i < 16; i++)
        square += ((double)row[i][d] - sum) * ((double)row[i][d] - sum);
    *var = square / 16;
    return sum;
}

/* Of x to y; NULL: to 0. */
__device__ double distance(uint32_t width, const float *x, const double *y)
{
    double square = 0;
#pragma unroll 16
    for (uint32_t d = 0; d < width; d++) {
        double difference = (double)x[d] - (y ? y[d] : 0);
        square += difference * difference;
    }
    return sqrt(square);
}

/* Codes of this warp's tokens: x = k - mu, a = max|x| / 7 as fp16, c = x / a rounded. */
__device__ void code_keys(const struct members &members, uint32_t width, uint8_t *code,
                          uint16_t *code_scale)
{
    uint32_t lane = threadIdx.x % 32;

    for (uint32_t t = threadIdx.x / 32; t < 16; t += N_THREADS / 32) {
        const float *k = members.k[t];
        float largest = 0;
        for (uint32_t d = lane; d < width; d += 32)
            largest = fmaxf(largest, fabsf(k[d] - members.mu[d]));
        for (int offset = 16; offset > 0; offset /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        uint16_t a_bits = float_to_fp16(largest / 7.0f);
        float a = fp16_to_float(a_bits);
        bool is_codable = a > 0 && a < INFINITY;
        if (lane == 0)
            code_scale[t] = a_bits;
        for (uint32_t byte = lane; byte < width / 2; byte += 32) {
            uint32_t low = byte / 4 * 8 + byte % 4, high = low + 4;
            int c_low = is_codable ? clamp_round((k[low] - members.mu[low]) / a, 7) : 0;
            int c_high = is_codable ? clamp_round((k[high] - members.mu[high]) / a, 7) : 0;
            code[(byte / 4 * 16 + t) * 4 + byte % 4] = (uint8_t)((c_low + 8) | (c_high + 8) << 4);
        }
    }
}

__device__ void fill_keys(struct members &members, uint32_t width, size_t b,
                          const struct winnow_index_view &view)
{
    uint32_t d = threadIdx.x;
    struct winnow_block_head *head = view.head + b;
    double mean = 0, spread = 0, radius = 0;
    int8_t q;

    if (d < width) {
        mean = rows_mean(members.k, d, &members.var[d]);
        if (view.var)
            view.var[b * width + d] = float_to_fp16((float)fmin(members.var[d], 65504.0));
    }
    float scale = quantise((float)mean, &q);
    if (d < width) {
        view.centroid[b * width + d] = q;
        members.mu[d] = (float)q * scale;
        members.exact_mu[d] = (double)q * (double)scale;
    }
    __syncthreads();
    if (d < 16)
        members.distance[d] = distance(width, members.k[d], members.exact_mu);
    code_keys(members, width, view.code + b * 8 * width, view.code_scale + 16 * b);
    __syncthreads();
    if (d > 0)
        return;
    for (uint32_t i = 0; i < width; i++)
        spread += members.var[i];
    for (uint32_t t = 0; t < 16; t++)
        radius = fmax(radius, members.distance[t]);
    head->centroid_scale = scale;
    head->spread = (float)fmin(spread / width, (double)FLT_MAX);
    head->radius = round_up(radius);
}

/* Thread block (b, unit): a block of a unit. */
__global__ void __launch_bounds__(N_THREADS) index_fill(struct winnow_gpu_build build)
{
    __shared__ struct members members;
    uint32_t n_blocks = build.index.n_blocks, d = threadIdx.x;
    size_t unit = blockIdx.y, b = unit * n_blocks + blockIdx.x;
    int8_t q;
    double var;

    if (d < 16) {
        size_t token = unit * 16 * n_blocks + build.order[16 * b + d];
        members.k[d] = build.k + token * build.k_width;
        members.v[d] = build.v + token * build.v_width;
    }
    __syncthreads();
    fill_keys(members, build.k_width, b, build.index);
    double mean = d < build.v_width ? rows_mean(members.v, d, &var) : 0;
    float scale = quantise((float)mean, &q);
    if (d < build.v_width)
        build.index.vmean[b * build.v_width + d] = q;
    if (d == 0)
        build.index.head[b].vmean_scale = scale;
    if (d < 16) /* lengths are positive: as integers they order as they do */
        atomicMax((unsigned *)build.index.v_max + unit,
                  __float_as_uint(round_up(distance(build.v_width, members.v[d], NULL))));
}

/* Thread block (unit, K or V): the mean of a segment, a thread a dimension. */
__global__ void segment_mean(struct winnow_gpu_build build)
{
    uint32_t width = blockIdx.y ? build.v_width : build.k_width, d = threadIdx.x;
    uint32_t n_tokens = 16 * build.index.n_blocks;
    const float *x = (blockIdx.y ? build.v : build.k) + (size_t)blockIdx.x * n_tokens * width;
    float *mean = (blockIdx.y ? build.index.mean_v : build.index.mean_k) + blockIdx.x * width;
    double sum = 0;

    if (d >= width)
        return;
#pragma unroll 8
    for (uint32_t t = 0; t < n_tokens; t++)
        sum += (double)x[(size_t)t * width + d];
    mean[d] = (float)(sum / n_tokens);
}
} /* namespace */

size_t winnow_gpu_build_scratch_bytes(uint32_t n_blocks)
{
    return unit_scratch_bytes(n_blocks);
}

cudaError_t winnow_gpu_build_launch(const struct winnow_gpu_build *build, cudaStream_t stream)
{
    uint32_t n_blocks = build->index.n_blocks, width = build->k_width;
    size_t shared_bytes = sizeof(struct node) + (size_t)width * (width + 1) / 2 * sizeof(float);
    cudaError_t error = cudaFuncSetAttribute(bisect, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)shared_bytes);
    if (error != cudaSuccess)
        return error;
    error = cudaMemsetAsync(build->index.v_max, 0, build->n_units * sizeof(float), stream);
    if (error != cudaSuccess)
        return error;
    bisect<<<build->n_units, N_THREADS, shared_bytes, stream>>>(
        width, n_blocks, build->k, build->order, (uint8_t *)build->scratch);
    index_fill<<<dim3(n_blocks, build->n_units), N_THREADS, 0, stream>>>(*build);
    segment_mean<<<dim3(build->n_units, 2), WIDTH_MAX, 0, stream>>>(*build);
    return cudaGetLastError();
}
