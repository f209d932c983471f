/*
 * Balanced bisection on the device, as ref/bisect.c defines it: a kernel a level, a thread block a
 * node. So a level's nodes of all units fill the card, and no thread block stays long enough to
 * stand in the way of a decode step of higher priority.
 *
 * Keys are scaled by a power of 2 to at most 1 in their unit; x = key - mean is fp32. Up to 128
 * dimensions the covariance goes through the tensor cores, of x in fp16 relative to the node's
 * largest: it decides a direction, not a sum, and 2^-11 of x moves the variance of the halves by
 * less than the 16 power iterations leave open. C stays in the registers it was summed in; an
 * iteration is 64 products a thread, and nothing is normalised on the way: C / (12 C_jj) has its
 * largest eigenvalue between 1/12 and 256/12, whose 16th powers fp32 holds. Wider keys multiply by
 * X^T X without making it.
 *
 * A node is never sorted: up to 256 tokens each counts those before it; above, four histograms of 8
 * bits find the projection that parts the halves. Prefix sums keep the order of position. No sum
 * depends on which thread comes first.
 *
 * Rejected: a thread block a unit (its nodes one after the other, and 8 of 132 multiprocessors busy
 * in a layer's span); fp64 and fp32 products for C (29 us a unit of 1,024 x 128 on a full H100, where
 * this takes 7.4).
 */
#include <float.h>
#include <kernels/cuda/build.h>
#include <kernels/cuda/fragment.cuh>
#include <kernels/cuda/reduce.cuh>
#include <kernels/cuda/rows.cuh>

namespace
{
constexpr uint32_t N_POWER_ITERATIONS = 16, N_WARPS = N_THREADS / 32;
constexpr uint32_t NARROW = 128;         /* widths up to it: C is made */
constexpr uint32_t TILE_TOKENS = 64;     /* of x in shared memory at once */
constexpr uint32_t SHARED_TOKENS = 1024; /* nodes up to it: order and ranks in shared memory */
constexpr uint32_t COUNTED_TOKENS = 256; /* nodes up to it: a thread a token */
constexpr uint32_t TILE_STRIDE = NARROW + 8;

struct node {
    float mean[WINNOW_WIDTH_MAX], v[2][WINNOW_WIDTH_MAX], part[N_WARPS * WINNOW_WIDTH_MAX];
    __align__(16) uint32_t rank[SHARED_TOKENS];
    uint16_t order[SHARED_TOKENS];
    uint32_t histogram[256], of_warp[N_WARPS], digit, n_below;
};

/* A node's tokens; order and rank in shared memory or in scratch. */
template <class T> struct tokens {
    uint32_t n, width;
    const T *k; /* of the unit */
    const uint16_t *order;
    uint32_t *rank;
    float scale; /* of the unit: a power of 2 that makes its keys at most 1 */
    row_place place;
};

template <class T> __device__ const T *token_key(const tokens<T> &of, uint32_t i)
{
    return of.k + (size_t)of.order[i] * of.width + 8 * of.place.part;
}

/* x = k scale - mean, this thread's eight dimensions; 0 beyond the width. */
template <class T>
__device__ void centred(const tokens<T> &of, const float (&mean)[8], const row_part<T> &part,
                        float (&x)[8])
{
    row_widen(part, x);
    for (int i = 0; i < 8; i++)
        x[i] = of.place.has_part ? fmaf(x[i], of.scale, -mean[i]) : 0;
}

template <class T> __device__ row_part<T> token_load(const tokens<T> &of, uint32_t i)
{
    return of.place.has_part ? row_load(token_key(of, i)) : row_part<T>();
}

__device__ void part_of(const row_place &place, const float *v, float (&x)[8])
{
    for (int i = 0; i < 8; i++)
        x[i] = place.has_part ? v[8 * place.part + i] : 0;
}

/* 2^-e with |x| <= 2^e for the largest; within fp32's normal range. */
__device__ float scale_below(float largest)
{
    int exponent = largest > 0 ? ilogbf(fminf(largest, FLT_MAX)) + 1 : 0;
    return ldexpf(1, -max(exponent, -126));
}

/* Of the unit, whose root this is. */
template <class T> __device__ float unit_scale(const tokens<T> &of)
{
    float largest = 0, x[8];

#pragma unroll 4
    for (uint32_t i = of.place.first; i < of.n; i += of.place.stride) {
        row_widen(token_load(of, i), x);
        for (int j = 0; j < 8; j++)
            largest = fmaxf(largest, fabsf(x[j]));
    }
    return scale_below(block_max(largest));
}

/* The mean of every dimension, as the first key and what the others differ from it; returns a power
 * of 2 that makes those differences at most 1, or 0 when there are none. */
template <class T> __device__ float node_mean(node &node, const tokens<T> &of)
{
    const float zero[8] = {};
    float first[8], sum[8] = {}, x[8], largest = 0;

    centred(of, zero, token_load(of, 0), first);
#pragma unroll 4
    for (uint32_t i = of.place.first; i < of.n; i += of.place.stride) {
        centred(of, first, token_load(of, i), x);
        for (int j = 0; j < 8; j++) {
            sum[j] += x[j];
            largest = fmaxf(largest, fabsf(x[j]));
        }
    }
    row_columns(of.place, of.width, sum, node.part, node.mean);
    if (threadIdx.x < of.place.n_lanes && of.place.has_part)
        for (int j = 0; j < 8; j++) {
            float &mean = node.mean[8 * of.place.part + j];
            mean = first[j] + mean / (float)of.n;
        }
    largest = block_max(largest); /* and a barrier behind the means */
    return largest > 0 ? scale_below(largest) : 0;
}

// --- up to 128 dimensions: C in registers -------------------------------------------------------

/* C: warp w holds rows 16 w + r and 16 w + r + 8 of columns 8 j + 2 c and 8 j + 2 c + 1 (lane
 * 4 r + c) in c[j]. */
using covariance = float[NARROW / 8][4];

/* 16 tokens from `token` on by 16 dimensions from `d` on, as operand A (a row a dimension); its
 * halves {x, z} and {y, w} are operand B of the same dimensions. */
__device__ uint4 tile_fragment(const uint16_t *tile, uint32_t token, uint32_t d)
{
    uint32_t lane = lane_id();
    const uint16_t *at =
        tile + (token + lane % 8 + lane / 16 * 8) * TILE_STRIDE + d + lane / 8 % 2 * 8;
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"((uint32_t)__cvta_generic_to_shared(at)));
    return x;
}

__device__ void tile_multiply(const uint16_t *tile, uint32_t width, uint32_t n_tokens,
                              covariance &c)
{
    uint32_t warp = threadIdx.x / 32;

    if (16 * warp >= width)
        return;
    for (uint32_t token = 0; token < n_tokens; token += 16) {
        uint4 a = tile_fragment(tile, token, 16 * warp);
#pragma unroll
        for (uint32_t j = 0; j < NARROW / 16; j++)
            if (16 * j < width) {
                uint4 b = tile_fragment(tile, token, 16 * j);
                mma<WINNOW_FP16>(c[2 * j], a, make_uint2(b.x, b.z));
                mma<WINNOW_FP16>(c[2 * j + 1], a, make_uint2(b.y, b.w));
            }
    }
}

constexpr uint32_t TILE_ROWS = TILE_TOKENS * NARROW / 8 / N_THREADS; /* of a thread, at most */

template <class T>
__device__ void tile_load(const tokens<T> &of, uint32_t first, row_part<T> (&part)[TILE_ROWS])
{
#pragma unroll
    for (uint32_t i = 0; i < TILE_ROWS; i++) {
        uint32_t t = of.place.first + i * of.place.stride;
        if (t < TILE_TOKENS && first + t < of.n)
            part[i] = token_load(of, first + t);
    }
}

template <class T>
__device__ void tile_store(const node &node, const tokens<T> &of, float scale,
                           const row_part<T> (&part)[TILE_ROWS], uint16_t *tile)
{
    float mean[8];

    part_of(of.place, node.mean, mean);
#pragma unroll
    for (uint32_t i = 0; i < TILE_ROWS; i++) {
        uint32_t t = of.place.first + i * of.place.stride;
        float x[8];
        if (t >= TILE_TOKENS || !of.place.has_part)
            continue;
        centred(of, mean, part[i], x);
        for (int j = 0; j < 8; j++)
            x[j] *= scale;
        *(uint4 *)(tile + t * TILE_STRIDE + 8 * of.place.part) =
            make_uint4(pack<WINNOW_FP16>(x[0], x[1]), pack<WINNOW_FP16>(x[2], x[3]),
                       pack<WINNOW_FP16>(x[4], x[5]), pack<WINNOW_FP16>(x[6], x[7]));
    }
}

/* C = X^T X, X = (keys - mean) x scale; the next tile is on its way while one is multiplied. */
template <class T>
__device__ void node_covariance(node &node, const tokens<T> &of, float scale, uint16_t *tile,
                                covariance &c)
{
    row_part<T> part[TILE_ROWS] = {};

    tile_load(of, 0, part);
    for (uint32_t first = 0; first < of.n; first += TILE_TOKENS) {
        __syncthreads();
        tile_store(node, of, scale, part, tile);
        __syncthreads();
        tile_load(of, first + TILE_TOKENS, part);
        tile_multiply(tile, of.width, min(TILE_TOKENS, of.n - first), c);
    }
}

/* The diagonal to shared memory. */
__device__ void covariance_diagonal(const covariance &c, uint32_t width, float *diagonal)
{
    uint32_t warp = threadIdx.x / 32, r = lane_id() / 4;

    if (16 * warp >= width || lane_id() % 4 != r / 2)
        return;
#pragma unroll
    for (uint32_t j = 0; j < NARROW / 16; j++)
        if (j == warp) {
            diagonal[16 * j + r] = r % 2 ? c[2 * j][1] : c[2 * j][0];
            diagonal[16 * j + r + 8] = r % 2 ? c[2 * j + 1][3] : c[2 * j + 1][2];
        }
}

/* y = C v x factor. */
__device__ void covariance_times(const covariance &c, uint32_t width, const float *v, float factor,
                                 float *y)
{
    uint32_t row = threadIdx.x / 32 * 16 + lane_id() / 4, column = 2 * (lane_id() % 4);
    float sum[2][2] = {};

#pragma unroll
    for (uint32_t j = 0; j < NARROW / 8; j++)
        if (8 * j < width) {
            float2 x = *(const float2 *)(v + 8 * j + column);
            sum[j % 2][0] = fmaf(c[j][0], x.x, fmaf(c[j][1], x.y, sum[j % 2][0]));
            sum[j % 2][1] = fmaf(c[j][2], x.x, fmaf(c[j][3], x.y, sum[j % 2][1]));
        }
    for (int i = 0; i < 2; i++) {
        float x = sum[0][i] + sum[1][i];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        if (column == 0 && row + 8 * i < width)
            y[row + 8 * i] = x * factor;
    }
    __syncthreads();
}

// --- more: X^T (X v) ----------------------------------------------------------------------------

/* y = X^T X v x factor; v NULL: the diagonal of X^T X. A warp a token. */
template <class T>
__device__ void wide_times(node &node, const tokens<T> &of, float scale, const float *v,
                           float factor, float *y)
{
    float mean[8], of_v[8], sum[8] = {}, x[8];

    part_of(of.place, node.mean, mean);
    if (v)
        part_of(of.place, v, of_v);
#pragma unroll 4
    for (uint32_t i = of.place.first; i < of.n; i += of.place.stride) {
        float product = 0;
        centred(of, mean, token_load(of, i), x);
        for (int j = 0; j < 8; j++) {
            x[j] *= scale;
            if (v)
                product = fmaf(x[j], of_v[j], product);
        }
        if (v)
            product = row_sum(of.place, product);
        for (int j = 0; j < 8; j++)
            sum[j] = fmaf(v ? product * factor : x[j], x[j], sum[j]);
    }
    row_columns(of.place, of.width, sum, node.part, y);
}

// --- a node -------------------------------------------------------------------------------------

/* v[0] becomes the unit vector of the largest variance, the first of equals; returns that. */
__device__ float direction_begin(node &node, uint32_t width, const float *diagonal)
{
    uint32_t d = threadIdx.x;
    float mine = d < width ? diagonal[d] : -1, largest = block_max(mine);
    uint32_t widest = block_min(mine == largest ? d : width);

    if (d < width)
        node.v[0][d] = d == widest ? 1 : 0;
    __syncthreads();
    return largest;
}

/* v[0]: the widest direction, its largest coordinate 1. */
template <class T, bool IS_NARROW>
__device__ void node_direction(node &node, const tokens<T> &of, float scale, uint16_t *tile)
{
    covariance c = {};
    float *diagonal = node.v[1];

    if constexpr (IS_NARROW) {
        node_covariance(node, of, scale, tile, c);
        covariance_diagonal(c, of.width, diagonal);
        __syncthreads();
    } else {
        wide_times(node, of, scale, NULL, 1, diagonal);
    }
    float largest = direction_begin(node, of.width, diagonal);
    float factor = 1 / (12 * largest);
    for (uint32_t i = 0; i < N_POWER_ITERATIONS && largest > FLT_MIN; i++) {
        if constexpr (IS_NARROW)
            covariance_times(c, of.width, node.v[i % 2], factor, node.v[(i + 1) % 2]);
        else
            wide_times(node, of, scale, node.v[i % 2], factor, node.v[(i + 1) % 2]);
    }
    uint32_t d = threadIdx.x;
    largest = block_max(d < of.width ? fabsf(node.v[0][d]) : 0);
    if (d < of.width)
        node.v[0][d] /= largest;
    __syncthreads();
}

/* Ranks of the projections. */
template <class T> __device__ void node_project(const node &node, const tokens<T> &of)
{
    float mean[8], v[8], x[8];

    part_of(of.place, node.mean, mean);
    part_of(of.place, node.v[0], v);
#pragma unroll 4
    for (uint32_t i = of.place.first; i < of.n; i += of.place.stride) {
        float sum = 0;
        centred(of, mean, token_load(of, i), x);
        for (int j = 0; j < 8; j++)
            sum = fmaf(x[j], v[j], sum);
        sum = row_sum(of.place, sum);
        if (of.place.part == 0)
            of.rank[i] = rank_of(sum);
    }
    __syncthreads();
}

/* Exclusive sum over the thread block; *total is the sum of all. */
__device__ uint32_t block_scan(node &node, uint32_t x, uint32_t *total)
{
    uint32_t lane = lane_id(), warp = threadIdx.x / 32, sum = x, before = 0;

    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        uint32_t y = __shfl_up_sync(~0u, sum, offset);
        sum += lane >= offset ? y : 0;
    }
    __syncthreads();
    if (lane == 31)
        node.of_warp[warp] = sum;
    __syncthreads();
    *total = 0;
    for (uint32_t i = 0; i < N_WARPS; i++) {
        before += i < warp ? node.of_warp[i] : 0;
        *total += node.of_warp[i];
    }
    return before + sum - x;
}

/* At most COUNTED_TOKENS: each token counts those of a smaller projection, equals by position. */
__device__ void split_counted(node &node, uint32_t n_tokens, uint32_t n_left, uint16_t *to)
{
    uint32_t i = threadIdx.x, mine = i < n_tokens ? node.rank[i] : 0, n_before = 0, total;

    for (uint32_t j = 0; j < n_tokens && i < n_tokens; j += 4) {
        uint4 of = *(const uint4 *)(node.rank + j);
        n_before += (of.x < mine || (of.x == mine && j < i));
        n_before += (of.y < mine || (of.y == mine && j + 1 < i));
        n_before += (of.z < mine || (of.z == mine && j + 2 < i));
        n_before += (of.w < mine || (of.w == mine && j + 3 < i));
    }
    bool is_left = i < n_tokens && n_before < n_left;
    uint32_t before = block_scan(node, is_left, &total);
    if (i < n_tokens)
        to[is_left ? before : n_left + i - before] = node.order[i];
}

/* The rank of the n-th smallest, n >= 1; *n_equal becomes how many of its equals are among them. */
__device__ uint32_t node_threshold(node &node, const uint32_t *rank, uint32_t n_tokens, uint32_t n,
                                   uint32_t *n_equal)
{
    uint32_t found = 0, total;

    for (int shift = 24; shift >= 0; shift -= 8) {
        node.histogram[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n_tokens; i += N_THREADS)
            if (shift == 24 || rank[i] >> (shift + 8) == found)
                atomicAdd(&node.histogram[rank[i] >> shift & 255], 1);
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
template <class T>
__device__ void node_split(node &node, const tokens<T> &of, uint32_t n_left, uint16_t *to)
{
    if (of.n <= COUNTED_TOKENS) {
        split_counted(node, of.n, n_left, to);
        return;
    }
    uint32_t n_equal_left, threshold = node_threshold(node, of.rank, of.n, n_left, &n_equal_left);
    uint32_t n_less = 0, n_equal = 0, total;

    for (uint32_t first = 0; first < of.n; first += N_THREADS) {
        uint32_t i = first + threadIdx.x;
        bool is_less = i < of.n && of.rank[i] < threshold;
        bool is_equal = i < of.n && of.rank[i] == threshold;
        uint32_t before = block_scan(node, (uint32_t)is_equal << 16 | is_less, &total);
        uint32_t equal_before = n_equal + (before >> 16);
        uint32_t left_before = n_less + (before & 0xffff) + min(equal_before, n_equal_left);
        bool is_left = is_less || (is_equal && equal_before < n_equal_left);
        if (i < of.n)
            to[is_left ? left_before : n_left + i - left_before] = of.order[i];
        n_less += total & 0xffff;
        n_equal += total >> 16;
    }
}

/* Of a unit: its scale, ranks and places of nodes too large for shared memory. */
struct unit_scratch {
    float *scale;
    uint32_t *rank;
    uint16_t *order;
};

__device__ unit_scratch unit_scratch_of(void *scratch, uint32_t n_blocks)
{
    uint8_t *at =
        (uint8_t *)scratch + (size_t)blockIdx.y * winnow_gpu_build_scratch_bytes(n_blocks);
    unit_scratch of = {(float *)at, (uint32_t *)(at + 16), NULL};
    of.order = (uint16_t *)(of.rank + 16 * n_blocks);
    return of;
}

/* Blocks of node `idx` of a level: the bits of idx, from the top, say left or right. */
__device__ void node_blocks(uint32_t level, uint32_t idx, uint32_t *first, uint32_t *n)
{
    while (level-- > 0) {
        uint32_t n_left = (*n + 1) / 2;
        bool is_right = idx >> level & 1;
        *first += is_right ? n_left : 0;
        *n = is_right ? *n - n_left : n_left;
    }
}

/* Thread block (node, unit). */
template <class T, bool IS_NARROW>
__global__ void __launch_bounds__(N_THREADS, 2)
    bisect(const __grid_constant__ winnow_gpu_build build, uint32_t level)
{
    __shared__ struct node node;
    __shared__ __align__(16) uint16_t tile[IS_NARROW ? TILE_TOKENS * TILE_STRIDE : 1];
    uint32_t n_blocks = build.index.n_blocks, first = 0, n = n_blocks;
    unit_scratch scratch = unit_scratch_of(build.scratch, n_blocks);
    uint16_t *order = build.order + (size_t)blockIdx.y * 16 * n_blocks;
    tokens<T> of = {};

    node_blocks(level, blockIdx.x, &first, &n);
    if (n <= 1 && level > 0)
        return;
    of.n = 16 * n;
    of.width = build.k_width;
    of.k = (const T *)build.k + (size_t)blockIdx.y * 16 * n_blocks * build.k_width;
    of.place = row_place_of(build.k_width);
    of.rank = of.n <= SHARED_TOKENS ? node.rank : scratch.rank + 16 * first;
    uint16_t *places = of.n <= SHARED_TOKENS ? node.order : scratch.order + 16 * first;
    order += 16 * first;
    for (uint32_t i = threadIdx.x; i < of.n; i += N_THREADS)
        places[i] = level > 0 ? order[i] : (uint16_t)i;
    __syncthreads();
    of.order = places;
    if (n == 1) {
        if (threadIdx.x < 16)
            order[threadIdx.x] = (uint16_t)threadIdx.x;
        return;
    }
    of.scale = level > 0 ? *scratch.scale : unit_scale(of);
    if (level == 0 && threadIdx.x == 0)
        *scratch.scale = of.scale;
    float scale = node_mean(node, of);
    if (scale > 0)
        node_direction<T, IS_NARROW>(node, of, scale, tile);
    else if (threadIdx.x < of.width)
        node.v[0][threadIdx.x] = 0;
    __syncthreads();
    node_project(node, of);
    node_split(node, of, 16 * ((n + 1) / 2), order);
}

template <class T> void bisect_launch(const winnow_gpu_build &build, cudaStream_t stream)
{
    auto kernel = build.k_width <= NARROW ? bisect<T, true> : bisect<T, false>;

    for (uint32_t level = 0; level == 0 || 1u << level < build.index.n_blocks; level++)
        kernel<<<dim3(1u << level, build.n_units), N_THREADS, 0, stream>>>(build, level);
}
} /* namespace */

cudaError_t winnow_gpu_build_launch(const struct winnow_gpu_build *build, cudaStream_t stream)
{
    if (build->dtype == WINNOW_FP32)
        bisect_launch<float>(*build, stream);
    else if (build->dtype == WINNOW_FP16)
        bisect_launch<__half>(*build, stream);
    else
        bisect_launch<__nv_bfloat16>(*build, stream);
    cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : winnow_gpu_build_index(build, stream);
}
