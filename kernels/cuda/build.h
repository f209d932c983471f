/*
 * Building segments on the device: blocks gathered from the host arena, tokens clustered, the index
 * filled; kernels put into a stream, a job of n_units segments (each of a layer and KV head) at a
 * time. Pointers are to memory that the device sees. Errors: a cudaError_t, 0 is success.
 */
#pragma once

#include <cuda_runtime_api.h>
#include <kernels/cuda/view.h>

#ifdef __cplusplus
extern "C" {
#endif

struct winnow_gpu_build {
    uint32_t k_width, v_width, dtype, n_units;
    const void *k, *v;              /* [unit][16 n_blocks][width] of dtype, finite */
    uint16_t *order;                /* [unit][16 n_blocks] */
    struct winnow_index_view index; /* kernels.h's arrays, one unit after the other */
    void *scratch;                  /* [unit] of winnow_gpu_build_scratch_bytes */
};

/* As kernels.h's build: order, then the index. */
cudaError_t winnow_gpu_build_launch(const struct winnow_gpu_build *, cudaStream_t);
/* The second half. */
cudaError_t winnow_gpu_build_index(const struct winnow_gpu_build *, cudaStream_t);

/* Blocks of layout 2 at homes [n] of the view's host arena to rows: k [16 n][k_width],
 * v [16 n][v_width] in kv_dtype. homes: memory that the device sees. */
cudaError_t winnow_gpu_build_gather(const struct winnow_gpu_view *, uint32_t n,
                                    const uint32_t *homes, void *k, void *v, cudaStream_t);

#ifdef __cplusplus
}
#endif
