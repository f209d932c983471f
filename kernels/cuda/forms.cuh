/* From a view to the form that its kernels are compiled for. */
#pragma once

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
