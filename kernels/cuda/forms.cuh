/* From a view to the form that its kernels are compiled for. */
#pragma once

#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/fragment.cuh>

template <int WIDTH, int HEADS, class Call>
cudaError_t form_call_dtype(const winnow_gpu_view &view, Call call)
{
    if (view.kv_dtype == WINNOW_BF16)
        return call(form<WIDTH, HEADS, WINNOW_BF16>());
    return call(form<WIDTH, HEADS, WINNOW_FP16>());
}

template <int WIDTH, class Call> cudaError_t form_call_heads(const winnow_gpu_view &view, Call call)
{
    if (view.n_group <= 4)
        return form_call_dtype<WIDTH, 4>(view, call);
    if (view.n_group <= 8)
        return form_call_dtype<WIDTH, 8>(view, call);
    return form_call_dtype<WIDTH, 16>(view, call);
}

/* call(form<...>()), its result returned. */
template <class Call> cudaError_t form_call(const winnow_gpu_view &view, Call call)
{
    uint32_t width = view.k_width > view.v_width ? view.k_width : view.v_width;

    if (width <= 64)
        return form_call_heads<64>(view, call);
    if (width <= 128)
        return form_call_heads<128>(view, call);
    return form_call_heads<256>(view, call);
}

/* Once, before a kernel's first launch. */
template <class Kernel> cudaError_t kernel_prepare(Kernel kernel, size_t n_bytes)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)n_bytes);
}

/* Launches a kernel of the view that may start while the one before it still runs, where the device
 * can; the kernel waits itself (edge.cuh). */
inline cudaError_t launch_behind(void (*kernel)(winnow_gpu_view), dim3 n_blocks, uint32_t n_bytes,
                                 cudaStream_t stream, const winnow_gpu_view &view)
{
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    int device, major;
    cudaError_t rc = cudaGetDevice(&device);

    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (rc != cudaSuccess)
        return rc;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = n_blocks;
    config.blockDim = dim3(ATTEND_THREADS);
    config.dynamicSmemBytes = n_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = major >= 9;
    return cudaLaunchKernelEx(&config, kernel, view);
}
