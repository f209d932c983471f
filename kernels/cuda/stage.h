/*
 * The stages of a decode step (view.h), each a kernel put into a stream. Nothing is allocated,
 * nothing waits. n_units_max and n_blocks_max are upper bounds known to the host; a stage reads the
 * launch itself from device memory, so that a captured graph serves every launch of its bucket.
 * Errors: a cudaError_t, 0 is success.
 */
#pragma once

#include <cuda_runtime_api.h>
#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/view.h>

#ifdef __cplusplus
extern "C" {
#endif

struct winnow_gpu_grid { /* of a bucket: what the grids are sized by */
    uint32_t n_units_max, n_multiprocessors;
    uint64_t n_blocks_max; /* blocks of all units together */
};

/* Begins a sparse step: waits for all before it. */
cudaError_t winnow_gpu_stage_scan(const struct winnow_gpu_view *, const struct winnow_gpu_grid *,
                                  cudaStream_t);
/* Runs beside scan, which has to be in front of it. */
cudaError_t winnow_gpu_stage_tail(const struct winnow_gpu_view *, const struct winnow_gpu_grid *,
                                  cudaStream_t);
/* The same without a scan: begins a whole step, waits for all before it. */
cudaError_t winnow_gpu_stage_tail_first(const struct winnow_gpu_view *,
                                        const struct winnow_gpu_grid *, cudaStream_t);
cudaError_t winnow_gpu_stage_select(const struct winnow_gpu_view *, const struct winnow_gpu_grid *,
                                    cudaStream_t);
cudaError_t winnow_gpu_stage_whole(const struct winnow_gpu_view *, const struct winnow_gpu_grid *,
                                   cudaStream_t);
cudaError_t winnow_gpu_stage_attend(const struct winnow_gpu_view *, const struct winnow_gpu_grid *,
                                    cudaStream_t);
/* Once, before the first launch: shared memory and other attributes of the kernels. Calls those of
 * the stages. */
cudaError_t winnow_gpu_stages_prepare(const struct winnow_gpu_view *);
cudaError_t winnow_gpu_scan_prepare(const struct winnow_gpu_view *);
cudaError_t winnow_gpu_select_prepare(const struct winnow_gpu_view *);
cudaError_t winnow_gpu_tail_prepare(const struct winnow_gpu_view *);
cudaError_t winnow_gpu_attend_prepare(const struct winnow_gpu_view *);

#ifdef __cplusplus
}
#endif
