/*
 * Blocks of layout 2 from the host arena to rows, a warp a block: 512 contiguous bytes a load, as
 * the link likes them, and so few warps that it is full while the multiprocessors stay free: 64
 * warps with 4 KiB on the way each are four times what 51 GB/s x 1.2 us need.
 */
#include <kernels/cuda/build.h>
#include <kernels/cuda/fragment.cuh>

namespace
{
constexpr uint32_t N_BLOCKS = 16, N_THREADS = 128;
constexpr int TILES_AT_ONCE = 8;

/* A tile of K is rows of tokens; one of V rows of dimensions, and is turned. */
template <bool IS_TURNED> __device__ void tiles_put(const uint4 *from, uint32_t width, uint32_t *to)
{
    uint32_t r = lane_id() / 4, c = lane_id() % 4, n_tiles = width / 16, stride = width / 2;

    for (uint32_t first = 0; first < n_tiles; first += TILES_AT_ONCE) {
        uint4 x[TILES_AT_ONCE];
#pragma unroll
        for (int j = 0; j < TILES_AT_ONCE; j++)
            x[j] = load_if(first + j < n_tiles, from + 32 * (first + j));
#pragma unroll
        for (int j = 0; j < TILES_AT_ONCE; j++) {
            if (first + j >= n_tiles)
                break;
            uint32_t *at = to + r * stride + 8 * (first + j) + c;
            at[0] = IS_TURNED ? turn(x[j].x) : x[j].x;
            at[4] = IS_TURNED ? turn(x[j].y) : x[j].z;
            at[8 * stride] = IS_TURNED ? turn(x[j].z) : x[j].y;
            at[8 * stride + 4] = IS_TURNED ? turn(x[j].w) : x[j].w;
        }
    }
}

__global__ void __launch_bounds__(N_THREADS)
    gather(const uint8_t *host, uint32_t k_width, uint32_t v_width, uint32_t n,
           const uint32_t *homes, uint32_t *k, uint32_t *v)
{
    uint32_t warp = (blockIdx.x * N_THREADS + threadIdx.x) / 32,
             n_warps = gridDim.x * N_THREADS / 32;

    for (uint32_t b = warp; b < n; b += n_warps) {
        const uint4 *from = (const uint4 *)(host + ((uint64_t)homes[b] << 12)) + lane_id();
        tiles_put<false>(from, k_width, k + (size_t)b * 8 * k_width);
        tiles_put<true>(from + 2 * k_width, v_width, v + (size_t)b * 8 * v_width);
    }
}
} /* namespace */

cudaError_t winnow_gpu_build_gather(const struct winnow_gpu_view *view, uint32_t n,
                                    const uint32_t *homes, void *k, void *v, cudaStream_t stream)
{
    gather<<<N_BLOCKS, N_THREADS, 0, stream>>>(view->host, view->k_width, view->v_width, n, homes,
                                               (uint32_t *)k, (uint32_t *)v);
    return cudaGetLastError();
}
