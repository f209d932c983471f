/* The table that winnow_cuda.so gives out. */
#include <kernels/cuda/plain.h>
#include <kernels/cuda/state.h>

__attribute__((visibility("default"))) const struct winnow_gpu_api *
winnow_gpu_find(uint32_t version)
{
    static const struct winnow_gpu_api api = {
        .name = "cuda",
        .probe = winnow_gpu_probe,
        .sizes = winnow_gpu_sizes,
        .open = winnow_gpu_device_open,
        .close = winnow_gpu_device_close,
        .create = winnow_gpu_create,
        .destroy = winnow_gpu_destroy,
        .segment_put = winnow_gpu_segment_put,
        .homes_set = winnow_gpu_homes_set,
        .segment_drop = winnow_gpu_segment_drop,
        .session_set = winnow_gpu_session_set,
        .tail_put = winnow_gpu_tail_put,
        .decode = winnow_gpu_decode,
        .poll = winnow_gpu_poll,
        .build = winnow_gpu_build,
        .build_poll = winnow_gpu_build_poll,
        .window_rows = winnow_gpu_window_rows,
        .window = winnow_gpu_window,
        .window_poll = winnow_gpu_window_poll,
        .counters = winnow_gpu_counters,
        .kernels = winnow_gpu_plain,
    };
    return version == WINNOW_GPU_API_VERSION ? &api : NULL;
}
