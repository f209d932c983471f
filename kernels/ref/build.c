/* A segment's layer and KV head: refused, or cut into blocks and indexed. */
#include <base/assert.h>
#include <errno.h>
#include <kernels/ref/ref.h>

int winnow_ref_build(const struct winnow_model_shape *shape, uint32_t n_blocks, const float *k,
                     const float *v, uint16_t *order, struct winnow_index_view *view, void *scratch)
{
    size_t n_tokens = (size_t)16 * n_blocks;
    winnow_assert(n_blocks == view->n_blocks);

    if (!winnow_ref_all_finite(n_tokens * shape->k_width, k) ||
        !winnow_ref_all_finite(n_tokens * shape->v_width, v))
        return -EDOM;
    winnow_ref_bisect(shape->k_width, n_blocks, k, order, scratch);
    winnow_ref_index_fill(shape, n_blocks, k, v, order, view);
    return 0;
}
