/* Finds devices. */
#include <cuda_runtime_api.h>
#include <errno.h>
#include <kernels/cuda/device.h>
#include <stdio.h>

int winnow_gpu_probe(uint32_t device_ordinal, char text[256])
{
    struct cudaDeviceProp properties;
    int n_devices = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&n_devices);

    if (error != cudaSuccess || device_ordinal >= (uint32_t)n_devices) {
        snprintf(text, 256, "no GPU %u: %.200s", device_ordinal,
                 error != cudaSuccess ? cudaGetErrorString(error) : "the driver lists fewer");
        return -ENODEV;
    }
    error = cudaGetDeviceProperties(&properties, (int)device_ordinal);
    if (error != cudaSuccess) {
        snprintf(text, 256, "GPU %u: %.200s", device_ordinal, cudaGetErrorString(error));
        return -ENODEV;
    }
    cudaDriverGetVersion(&driver);
    snprintf(text, 256, "%.99s, compute capability %d.%d, %d multiprocessors, %.1f GiB, CUDA %d.%d",
             properties.name, properties.major, properties.minor, properties.multiProcessorCount,
             (double)properties.totalGlobalMem / (1 << 30), driver / 1000, driver % 1000 / 10);
    return properties.major >= 8 ? 0 : -ENOTSUP;
}
