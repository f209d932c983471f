/*
 * Exact windows on the device (gpu.h): the kernels of a part, put into a stream, and what they see.
 * Errors: a cudaError_t, 0 is success.
 *
 * Query row r of a KV head is query head r % G of position first + r / G. Rows go by tiles, one a
 * thread block, of as many as winnow_gpu_window_tile_rows says: their scale, queries, sums and outputs
 * stand one tile behind the other, n_rows_max of a head, whole tiles.
 *
 * A part's blocks are copied from the host arena to a **stage** once, without what pads them, for all
 * the tiles to read; a head's are filled up with zeros to whole steps of WINNOW_GPU_WINDOW_STEP.
 */
#pragma once

#include <cuda_runtime_api.h>
#include <kernels/cuda/view.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    WINNOW_GPU_WINDOW_STAGES = 2,
    WINNOW_GPU_WINDOW_STEP = 4,       /* blocks */
    WINNOW_GPU_WINDOW_SUM_BYTES = 32, /* of a row */
};

/* Blocks of a part: in pinned memory as the host wrote it, and on the device. */
struct winnow_gpu_window_list {
    uint32_t *n_blocks; /* [n_kv_heads] */
    uint32_t *n_tokens; /* [n_blocks_max] */
    uint64_t *position; /* [n_blocks_max] */
    uint32_t *home;     /* [n_kv_heads][n_blocks_max]; on the device NULL */
};

struct winnow_gpu_window_stage {
    struct winnow_gpu_window_list list;
    uint4 *block; /* [n_kv_heads][n_blocks_max] of (k_width + v_width) x 32 bytes */
};

/* By value to every kernel. */
struct winnow_gpu_window_view {
    uint32_t n_kv_heads, n_group, k_width, v_width, kv_dtype;
    uint32_t n_parts; /* 2: a query is the sum of two numbers of kv_dtype, 1: it is one */
    float softmax_scale;
    uint32_t n_rows_max, n_blocks_max; /* of a head */
    const uint8_t *host;
    uint4 *query;     /* [row / 16][n_parts][k_width / 16][lane]: operand A of mma.m16n8k16 */
    float *row_scale; /* [row]: of its logits, in powers of 2 */
    float *lse;       /* [row] */
    float4 *sum; /* [tile][row tile of a warp][thread]: m, l of two rows, l of the thread alone */
    float4 *output; /* [tile][fragment][thread]; after the last part [row][width] fp32 */
    struct winnow_gpu_window_stage stage[WINNOW_GPU_WINDOW_STAGES];
};

/* One part, on stage stage_idx. */
struct winnow_gpu_window_launch {
    uint32_t n_rows, stage_idx; /* rows of a head */
    uint64_t first;
    bool is_first, is_last;
    bool has_positions; /* else all queries see all blocks */
};

/* Numbers of a row of `output`. */
static inline uint32_t winnow_gpu_window_width(uint32_t k_width, uint32_t v_width)
{
    uint32_t width = k_width > v_width ? k_width : v_width;
    return width <= 64 ? 64 : width <= 128 ? 128 : 256;
}

/* Rows of a tile. */
static inline uint32_t winnow_gpu_window_tile_rows(uint32_t k_width, uint32_t v_width)
{
    return winnow_gpu_window_width(k_width, v_width) == 256 ? 64 : 128;
}

/* Rows q [n_kv_heads][n_rows][k_width] fp32, heads q_stride numbers apart, to `query`; those up to a
 * whole tile become 0. */
cudaError_t winnow_gpu_window_queries(const struct winnow_gpu_window_view *, const float *q,
                                      uint64_t q_stride, uint32_t n_rows, cudaStream_t);
/* A stage from a list of the host's, that the device sees; n_most: the longest of its heads'. */
cudaError_t winnow_gpu_window_gather(const struct winnow_gpu_window_view *, uint32_t stage_idx,
                                     const struct winnow_gpu_window_list *, uint32_t n_most,
                                     bool has_positions, cudaStream_t);
cudaError_t winnow_gpu_window_attend(const struct winnow_gpu_window_view *,
                                     const struct winnow_gpu_window_launch *, cudaStream_t);
/* Once, before the first. */
cudaError_t winnow_gpu_window_prepare(const struct winnow_gpu_window_view *);

#ifdef __cplusplus
}
#endif
