/*
 * Compensate: what was not read still counts, by its estimate: weight e_b, value the block's mean.
 * Halves the error of the output for no bytes read (at P 0.8: 0.092 -> 0.048), better than reading
 * twice as much. Blocks far below the last selected one are taken together, by the segment's mean.
 */
#include <base/assert.h>
#include <kernels/ref/ref.h>

static const float N_NATS_NEAR = 8;

static float near_key(const struct winnow_selection *sel)
{
    uint32_t last = sel->n_selected > 0 ? sel->n_selected - 1 : 0;
    winnow_assert(sel->n_selected <= sel->n_blocks);
    winnow_assert(sel->block_idx[last] < sel->n_blocks);
    return sel->ln_key[sel->block_idx[last]] - N_NATS_NEAR;
}

static void compensate_head(const struct winnow_model_shape *shape,
                            const struct winnow_index_view *view,
                            const struct winnow_selection *sel, uint32_t block_first, uint32_t g,
                            float *partial)
{
    const float *ln_e = sel->ln_e + (size_t)block_first * sel->n_q + g, near = near_key(sel);
    const uint8_t *selected = sel->selected + block_first;
    uint32_t v_width = shape->v_width;
    float largest = -INFINITY, far_sum = 0, *o = partial + 2;

    for (uint32_t b = 0; b < view->n_blocks; b++)
        if (!selected[b] && winnow_ref_is_known(ln_e[b * sel->n_q]))
            largest = fmaxf(largest, ln_e[b * sel->n_q]);
    if (largest == -INFINITY)
        return;
    float m = winnow_ref_partial_raise(v_width, partial, largest);
    for (uint32_t b = 0; b < view->n_blocks; b++) {
        if (selected[b] || !winnow_ref_is_known(ln_e[b * sel->n_q]))
            continue;
        float e = winnow_ref_exp(ln_e[b * sel->n_q] - m);
        partial[1] += e;
        if (sel->ln_key[block_first + b] < near) {
            far_sum += e;
            continue;
        }
        const int8_t *vmean = view->vmean + (size_t)b * v_width;
        for (uint32_t d = 0; d < v_width; d++)
            o[d] += e * view->head[b].vmean_scale * (float)vmean[d];
    }
    for (uint32_t d = 0; d < v_width; d++)
        o[d] += far_sum * view->mean_v[d];
}

void winnow_ref_compensate(const struct winnow_model_shape *shape,
                           const struct winnow_index_view *view, const struct winnow_selection *sel,
                           uint32_t block_first, float *partial)
{
    winnow_assert(sel->n_q == shape->n_q_heads / shape->n_kv_heads);
    winnow_assert(block_first <= sel->n_blocks);
    winnow_assert(view->n_blocks <= sel->n_blocks - block_first);
    for (uint32_t g = 0; g < sel->n_q && view->n_blocks > 0; g++)
        compensate_head(shape, view, sel, block_first, g, partial + g * (shape->v_width + 2));
}
