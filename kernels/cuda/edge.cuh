/* Programmatic edges between the kernels of a step: a kernel launched with one may start while the
 * one before still runs, and waits here before it touches anything of that. */
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

static __device__ inline void earlier_kernels_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The kernel behind may take what room there is, once all thread blocks have come here. */
static __device__ inline void later_kernel_launch()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Once, before the first launch of a kernel that runs beside another: its shared memory. Both want
 * an SM set up for as much as it has, or one would wait for the other to leave. */
template <class Kernel> cudaError_t kernel_beside_prepare(Kernel kernel, uint32_t n_bytes)
{
    cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared);

    return rc != cudaSuccess
               ? rc
               : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)n_bytes);
}
