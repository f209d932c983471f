/* The device's index in host memory: its layout and how it is packed. Needs no CUDA, so that every
 * machine tests it. */
#pragma once

#include <kernels/cuda/view.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Fills record_bytes, the places `.._at` and unit_bytes (a multiple of 128) from k_width, v_width
 * and span_blocks (a multiple of 8). */
void winnow_gpu_index_layout(struct winnow_gpu_view *);

/* One layer and KV head of a host index of span_blocks blocks into the device's layout, unit_bytes
 * at dst (host memory); homes [span_blocks]; loc is cleared. */
void winnow_gpu_index_pack(const struct winnow_gpu_view *, const struct winnow_index_view *,
                           const uint32_t *homes, uint8_t *dst);

#ifdef __cplusplus
}
#endif
