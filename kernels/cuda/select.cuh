/*
 * The second round's part of selection, for the stage `more`: which further blocks a short unit
 * reads. Static device functions: kernels are linked file by file.
 */
#pragma once

#include <kernels/cuda/view.h>

enum { WINNOW_GPU_SELECT_MORE_THREADS = 256 }; /* of the calling thread block */

/* Shared memory of one call; no content outlives it. */
struct winnow_gpu_select_more_memory;

/*
 * Called by all WINNOW_GPU_SELECT_MORE_THREADS threads of a thread block, for one short unit. Goes
 * on by bins of 1/64 nat below the first round until every query head has got need[g] by estimate,
 * or the budget ends it. Then: selected = 2; listed [n_selected, + n_more) in list order, each with
 * its place; n_more, n_groups_more, has_unknown, n_device, n_host, n_unfit, n_disk brought up to
 * date; queue[1]: fetches, groups and all chunks pushed (view->fetch, ready, waiting from 0).
 * n_done, n_listed are the caller's. Ends with a barrier; other thread blocks see it after the
 * caller's fence.
 */
static __device__ void winnow_gpu_select_more(const struct winnow_gpu_view &view, uint32_t unit_idx,
                                              struct winnow_gpu_select_more_memory *memory);
