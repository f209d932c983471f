/* The table that winnow_cuda.so gives out. */
#include <kernels/cuda/device.h>
#include <kernels/cuda/plain.h>

__attribute__((visibility("default"))) const struct winnow_gpu_api *
winnow_gpu_find(uint32_t version)
{
    static const struct winnow_gpu_api api = {
        .name = "cuda",
        .probe = winnow_gpu_probe,
        .kernels = winnow_gpu_plain,
    };
    return version == WINNOW_GPU_API_VERSION ? &api : NULL;
}
