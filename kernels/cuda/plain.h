/*
 * The plain kernels: kernels.h's entries over device memory, put into a stream. plain.c copies in
 * and out around them; build's are build.h's. Pointers are to device memory, results those of ref/
 * but for exp and log. Errors: a cudaError_t, 0 is success.
 */
#pragma once

#include <cuda_runtime_api.h>
#include <kernels/kernels.h>

#ifdef __cplusplus
extern "C" {
#endif

/* n elements of dtype to fp32; *is_bad becomes 1 where a result is not finite. */
cudaError_t winnow_gpu_widen(uint32_t dtype, size_t n, const void *src, float *dst,
                             uint32_t *is_bad, cudaStream_t);
/* fp32 to dtype; *is_bad becomes 1 where the source or the result is not finite. */
cudaError_t winnow_gpu_narrow(uint32_t dtype, size_t n, const float *src, void *dst,
                              uint32_t *is_bad, cudaStream_t);
cudaError_t winnow_gpu_block_pack(const struct winnow_model_shape *, uint32_t first, uint32_t n,
                                  const float *k, const float *v, void *block, cudaStream_t);
cudaError_t winnow_gpu_block_unpack(const struct winnow_model_shape *, const void *block, float *k,
                                    float *v, cudaStream_t);

/* As kernels.h says; view holds device pointers. */
cudaError_t winnow_gpu_score(const struct winnow_model_shape *, uint32_t policy,
                             const struct winnow_index_view *, const float *q, float *ln_e,
                             cudaStream_t);
/* Policies codes and moment. sel holds device pointers; counts [2]: n_selected, n_reserve.
 * key: winnow_gpu_select_keys(n_blocks) numbers of scratch. */
uint32_t winnow_gpu_select_keys(uint32_t n_blocks);
cudaError_t winnow_gpu_select(const struct winnow_selection *sel, uint64_t *key, uint32_t *counts,
                              cudaStream_t);
/* counts [1]: blocks added. */
cudaError_t winnow_gpu_select_more(const struct winnow_selection *sel, float *rho, float *mass,
                                   int may_add, uint32_t *counts, cudaStream_t);

/* blocks: [n] of block_bytes, one after the other. ln_m may be NULL. */
cudaError_t winnow_gpu_attend_partial(const struct winnow_model_shape *, const float *q, uint32_t n,
                                      const void *blocks, const uint32_t *n_tokens, float *partial,
                                      float *ln_m, cudaStream_t);
cudaError_t winnow_gpu_attend_window(const struct winnow_model_shape *, uint32_t n_pos,
                                     uint64_t first, const float *q, uint32_t n, const void *blocks,
                                     const uint64_t *position, const uint32_t *n_tokens,
                                     float *partial, cudaStream_t);
/* sel's ln_e, ln_key and selected begin at the segment's first block; near: the least key that goes
 * in by a mean of its own. */
cudaError_t winnow_gpu_compensate(const struct winnow_model_shape *,
                                  const struct winnow_index_view *, const struct winnow_selection *,
                                  float near, float *partial, cudaStream_t);
cudaError_t winnow_gpu_merge(const struct winnow_model_shape *, uint32_t n, const float *partial,
                             float *acc, cudaStream_t);
cudaError_t winnow_gpu_finish(const struct winnow_model_shape *, const float *acc, float *out,
                              float *lse, cudaStream_t);

/* The table over host memory (plain.c). */
const struct winnow_kernels *winnow_gpu_plain(void);

#ifdef __cplusplus
}
#endif
