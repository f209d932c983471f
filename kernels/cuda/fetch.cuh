/* Blocks on their way from the host into slots: who brings them, and who waits for them. */
#pragma once

#include <kernels/cuda/fragment.cuh>

/* Asks now and then, without acquiring: that empties L1 each time, and slows the fetcher beside it
 * (128K x 8, one block in ten missed: 212 us for 187). */
__device__ inline void slot_wait(const uint64_t *word)
{
    if (lane_id() == 0) {
        uint64_t x;
        for (;;) {
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(word) : "memory");
            if (!(x & WINNOW_GPU_FETCHING))
                break;
            __nanosleep(100);
        }
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    __syncwarp();
}

/* Brings a block into its slot, by a warp; meanwhile() is called while it is under way. */
template <class F, class Meanwhile>
__device__ inline void slot_fill(const winnow_gpu_view &view, winnow_gpu_fetch fetch,
                                 Meanwhile meanwhile)
{
    uint32_t n_tiles = (view.k_width + view.v_width) / 16, lane = lane_id();
    uint32_t staged = fetch.home & ~WINNOW_GPU_FROM_STAGE;
    const uint8_t *block = fetch.home & WINNOW_GPU_FROM_STAGE
                               ? view.slots + (uint64_t)staged * view.block_bytes
                               : view.host + (uint64_t)fetch.home * 4096;
    const uint4 *from = (const uint4 *)block + lane;
    uint4 *to = (uint4 *)(view.slots + (uint64_t)fetch.slot * view.block_bytes) + lane;
    uint4 x[2 * F::TILES];

#pragma unroll
    for (int j = 0; j < 2 * F::TILES; j++)
        x[j] = load_if(j < n_tiles, from + 32 * j);
    meanwhile();
#pragma unroll
    for (int j = 0; j < 2 * F::TILES; j++)
        if (j < n_tiles)
            __stcg(to + 32 * j, x[j]);
    __syncwarp();
    if (lane == 0) {
        uint64_t *word = view.slot_word + fetch.slot;
        uint64_t filled = __ldcg(word) & ~WINNOW_GPU_FETCHING;
        asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(filled) : "memory");
    }
}

/* Fetches blocks of the list, a warp one after the other, as long as there are any: no warp keeps
 * others' groups waiting. The next one is asked for while a block is under way. */
template <class F>
__device__ inline void work_fetch(const winnow_gpu_view &view, winnow_gpu_queue *queue,
                                  uint32_t n_fetch)
{
    uint32_t next = 0;
    auto take = [&] {
        if (lane_id() == 0)
            next = atomicAdd(&queue->fetch_next, 1);
    };

    take();
    for (;;) {
        uint32_t i = __shfl_sync(~0u, next, 0);
        if (i >= n_fetch)
            return;
        uint2 fetch = __ldcg((const uint2 *)(view.fetch + i)); /* home, slot */
        slot_fill<F>(view, {fetch.x, fetch.y}, take);
    }
}
