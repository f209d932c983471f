/* Small kernels between launches: what the host tells the device. Errors: a cudaError_t, 0 is
 * success. */
#pragma once

#include <cuda_runtime_api.h>
#include <kernels/cuda/view.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Slots of layers [layer, layer + n_layers) that hold blocks of a segment are free. */
cudaError_t winnow_gpu_slots_drop(const struct winnow_gpu_view *, uint32_t segment_slot,
                                  uint32_t layer, uint32_t n_layers, cudaStream_t);
/* homes [n]: memory that the device sees. */
cudaError_t winnow_gpu_homes_write(const struct winnow_gpu_view *, uint32_t n,
                                   const struct winnow_gpu_home *homes, cudaStream_t);

#ifdef __cplusplus
}
#endif
