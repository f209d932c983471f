/* Programmatic edges between the kernels of a step: a kernel launched with one may start while the
 * one before still runs, and waits here before it touches anything of that. */
#pragma once

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
