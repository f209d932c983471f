/* winnow_cuda.so for a winnowd of a test: the simulator's GPU (sim/gpu.h) behind the product's door.
 * SIM_GPU_FAILS_AFTER names the call that finds it lost. */
#include <sim/gpu.h>

__attribute__((visibility("default"))) const struct winnow_gpu_api *
winnow_gpu_find(uint32_t version)
{
    const char *fails_after = getenv("SIM_GPU_FAILS_AFTER");
    sim_gpu.kernels = winnow_kernels_find(NULL);
    sim_gpu.fails_after = fails_after ? strtoull(fails_after, NULL, 10) : 0;
    return version == WINNOW_GPU_API_VERSION ? &sim_gpu_api : NULL;
}
