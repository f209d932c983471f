/* Merge: partial results into one, always in list order, so that it has one result. */
#include <base/assert.h>
#include <kernels/ref/ref.h>
#include <string.h>

float winnow_ref_partial_raise(uint32_t v_width, float *partial, float m)
{
    float scale;

    if (!(m > partial[0]))
        return partial[0];
    scale = winnow_ref_exp(partial[0] - m);
    partial[0] = m;
    for (uint32_t i = 1; i < v_width + 2; i++)
        partial[i] *= scale;
    return m;
}

static void merge_head(uint32_t v_width, const float *partial, float *acc)
{
    if (partial[0] == -INFINITY)
        return;
    float scale = winnow_ref_exp(partial[0] - winnow_ref_partial_raise(v_width, acc, partial[0]));
    for (uint32_t i = 1; i < v_width + 2; i++)
        acc[i] += scale * partial[i];
}

void winnow_ref_merge(const struct winnow_model_shape *shape, uint32_t n, const float *partial,
                      float *acc)
{
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads, stride = shape->v_width + 2;
    winnow_assert(n_q > 0);
    winnow_assert(n_q <= WINNOW_GQA_MAX);

    for (uint32_t i = 0; i < n; i++)
        for (uint32_t g = 0; g < n_q; g++)
            merge_head(shape->v_width, partial + ((size_t)i * n_q + g) * stride, acc + g * stride);
}

void winnow_ref_finish(const struct winnow_model_shape *shape, const float *acc, float *out,
                       float *lse)
{
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads, v_width = shape->v_width;
    winnow_assert(n_q > 0);
    winnow_assert(n_q <= WINNOW_GQA_MAX);

    for (uint32_t g = 0; g < n_q; g++) {
        const float *partial = acc + g * (v_width + 2), sum = partial[1];
        lse[g] = sum > 0 ? partial[0] + logf(sum) : -INFINITY;
        for (uint32_t d = 0; d < v_width; d++)
            out[g * v_width + d] = sum > 0 ? partial[2 + d] / sum : 0;
    }
}
