/*
 * Thread blocks that work on one unit together: a cluster, or one alone. And what warps do in one
 * go.
 */
#pragma once

#include <cooperative_groups.h>
#include <kernels/cuda/stage.h>
#include <stdint.h>

namespace winnow_gpu_select
{

constexpr uint32_t N_RANKS_MAX = 8;
constexpr uint32_t RANK_BLOCKS = 2048; /* of a thread block, while there are ranks left */

struct team {
    uint32_t rank,
        n_ranks; /* n_ranks: a power of 2; the cluster's other thread blocks have ended */
};

/* How many of the cluster a unit of n_blocks has use for. */
static __device__ uint32_t team_ranks_log2(team cluster, uint32_t n_blocks)
{
    uint32_t ranks_log2 = 0;
    while (1u << ranks_log2 < cluster.n_ranks && n_blocks >> ranks_log2 > RANK_BLOCKS)
        ranks_log2++;
    return ranks_log2;
}

/* Thread blocks a unit: as many as the device holds at once and the longest unit may fill. */
static inline cudaError_t team_ranks_find(const winnow_gpu_grid *grid, uint32_t *n_ranks)
{
    int device, major;
    cudaError_t rc = cudaGetDevice(&device);

    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    *n_ranks = 1;
    while (rc == cudaSuccess && major >= 9 && *n_ranks < N_RANKS_MAX &&
           grid->n_blocks_max / grid->n_units_max / *n_ranks > RANK_BLOCKS &&
           2 * *n_ranks * grid->n_units_max <= grid->n_multiprocessors)
        *n_ranks *= 2;
    return rc;
}

/* Launches a kernel of teams: a thread block a unit, or a cluster of them, that may begin while the
 * kernel before it ends. */
template <class... PARAMETER, class... ARGUMENT>
static cudaError_t team_launch(void (*kernel)(PARAMETER...), const winnow_gpu_grid *grid,
                               uint32_t n_kv_heads, uint32_t n_threads, size_t shared_bytes,
                               cudaStream_t stream, ARGUMENT... argument)
{
    uint32_t n_ranks;
    cudaError_t rc = team_ranks_find(grid, &n_ranks);
    cudaLaunchAttribute attribute[2] = {};
    cudaLaunchConfig_t config = {};

    if (rc != cudaSuccess)
        return rc;
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    attribute[1].id = cudaLaunchAttributeClusterDimension;
    attribute[1].val.clusterDim.x = n_ranks;
    attribute[1].val.clusterDim.y = attribute[1].val.clusterDim.z = 1;
    config.gridDim = dim3(n_ranks, n_kv_heads, grid->n_units_max / n_kv_heads);
    config.blockDim = dim3(n_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = n_ranks > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, argument...);
}

/* All threads. What was written to the team's shared memory before is seen after. */
static __device__ void team_arrive(team team)
{
#if __CUDA_ARCH__ >= 900
    if (team.n_ranks > 1)
        asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

static __device__ void team_wait(team team)
{
#if __CUDA_ARCH__ >= 900
    if (team.n_ranks > 1)
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

static __device__ void team_sync(team team)
{
    if (team.n_ranks == 1) {
        __syncthreads();
        return;
    }
    team_arrive(team);
    team_wait(team);
}

/* p of another thread block's shared memory, or of this one's. */
template <class T> static __device__ T *team_at(team team, T *p, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    if (team.n_ranks > 1)
        return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#endif
    return p;
}

static __device__ uint32_t warp_scan(uint32_t x) /* inclusive */
{
#pragma unroll
    for (uint32_t at = 1; at < 32; at <<= 1) {
        uint32_t below = __shfl_up_sync(~0u, x, at);
        x += threadIdx.x % 32 >= at ? below : 0;
    }
    return x;
}

/* Of numbers below 2^59: in pieces of 20 bits, 32 of which fit a word. */
static __device__ uint64_t warp_sum(uint64_t x)
{
    uint64_t sum = __reduce_add_sync(~0u, (uint32_t)x & 0xfffff);
    sum += (uint64_t)__reduce_add_sync(~0u, (uint32_t)(x >> 20) & 0xfffff) << 20;
    return sum + ((uint64_t)__reduce_add_sync(~0u, (uint32_t)(x >> 40)) << 40);
}

} // namespace winnow_gpu_select
