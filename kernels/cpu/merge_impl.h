/*
 * What is added to a partial, and its end: compensation, other partials, the division.
 *
 * Compensation is attention once more: sixteen unread blocks are sixteen tokens, their estimates
 * the logits, their stored means the values. It takes attend's tiles, with int8 rows for V and the
 * rows' scale in p; blocks that do not take part get p = 0.
 */
#pragma once

#include <kernels/cpu/attend_impl.h>

static const float N_NATS_NEAR = 8;

/* Up to sixteen blocks of a segment, for all query heads: row g of e holds ln e_b,g, -inf for
 * blocks that were selected or are not there, or whose estimate is unknown. */
struct unread {
    float e[WINNOW_GQA_MAX][16];
    float key[16], scale[16];
};

static void unread_load(struct unread *unread, const struct winnow_index_view *view,
                        const struct winnow_selection *sel, uint32_t block_first, uint32_t b,
                        uint32_t n)
{
    const float *ln_e = sel->ln_e + (size_t)(block_first + b) * sel->n_q;
    v16 never = v16_set1(-INFINITY), endless = v16_set1(INFINITY);

    for (uint32_t i = 0; i < 16; i++) {
        bool is_unread = i < n && !sel->selected[block_first + b + i];
        unread->key[i] = is_unread ? sel->ln_key[block_first + b + i] : -INFINITY;
        unread->scale[i] = is_unread ? view->head[b + i].vmean_scale : 0.0f;
        for (uint32_t g = 0; g < sel->n_q; g++)
            unread->e[g][i] = is_unread ? ln_e[i * sel->n_q + g] : -INFINITY;
    }
    for (uint32_t g = 0; g < sel->n_q; g++) {
        v16 e = v16_load(unread->e[g]);
        v16_store(unread->e[g], v16_less_choose(e, endless, e, never));
    }
}

/* One head's row of e to p: raises the partial's m and l; what is far goes into far_sum, which
 * shrinks as o does. Returns by how much that is. */
static float head_absorb(const struct unread *unread, float near, float *e, float *partial,
                         float *far_sum)
{
    v16 zero = v16_set1(0.0f), row = v16_load(e);
    float m = fmaxf(partial[0], v16_largest(row));

    if (m == -INFINITY) {
        v16_store(e, zero);
        return 1.0f;
    }
    float shrink = v16_get1(v16_exp(v16_set1(partial[0] - m)));
    v16 p = v16_exp(v16_sub(row, v16_set1(m)));
    v16 far = v16_less_choose(v16_load(unread->key), v16_set1(near), p, zero);
    partial[0] = m;
    partial[1] = partial[1] * shrink + v16_sum(p);
    *far_sum = *far_sum * shrink + v16_sum(far);
    v16_store(e, v16_mul(v16_sub(p, far), v16_load(unread->scale)));
    return shrink;
}

static void compensate(const struct winnow_model_shape *shape, const struct winnow_index_view *view,
                       const struct winnow_selection *sel, uint32_t block_first, float *partial)
{
    uint32_t n_q = sel->n_q, last = sel->n_selected > 0 ? sel->n_selected - 1 : 0;
    size_t v_width = shape->v_width, stride = v_width + 2;
    float far_sum[WINNOW_GQA_MAX] = {0}, shrink[WINNOW_GQA_MAX];
    struct unread unread;

    if (view->n_blocks == 0)
        return;
    float near = sel->ln_key[sel->block_idx[last]] - N_NATS_NEAR;
    for (uint32_t b = 0; b < view->n_blocks; b += 16) {
        uint32_t n = view->n_blocks - b < 16 ? view->n_blocks - b : 16;
        unread_load(&unread, view, sel, block_first, b, n);
        for (uint32_t g = 0; g < n_q; g++)
            shrink[g] = head_absorb(&unread, near, unread.e[g], partial + g * stride, &far_sum[g]);
        for (uint32_t g = 0; g < n_q; g += HEADS_TILE) {
            TILE_HEADS(DTYPE_INT8, heads_in_tile(n_q, g), tile_values, shape->v_width,
                       view->vmean + b * v_width, 0, n, unread.e[g], shrink + g,
                       partial + g * stride + 2, stride)
        }
    }
    for (uint32_t g = 0; g < n_q; g++)
        for (size_t d = 0; d < v_width; d += 16) {
            float *o = partial + g * stride + 2 + d;
            v16_store(o, v16_fma(v16_load(view->mean_v + d), v16_set1(far_sum[g]), v16_load(o)));
        }
}

static void merge_head(size_t v_width, const float *partial, float *acc)
{
    float m = fmaxf(partial[0], acc[0]);

    if (partial[0] == -INFINITY)
        return;
    v16 of_acc = v16_exp(v16_set1(acc[0] - m)), of_partial = v16_exp(v16_set1(partial[0] - m));
    acc[0] = m;
    acc[1] = acc[1] * v16_get1(of_acc) + partial[1] * v16_get1(of_partial);
    for (size_t d = 2; d < v_width + 2; d += 16) {
        v16 o = v16_mul(v16_load(acc + d), of_acc);
        v16_store(acc + d, v16_fma(v16_load(partial + d), of_partial, o));
    }
}

static void merge(const struct winnow_model_shape *shape, uint32_t n, const float *partial,
                  float *acc)
{
    uint32_t n_q = shape_n_q(shape);
    size_t stride = shape->v_width + 2;

    for (uint32_t i = 0; i < n * n_q; i++)
        merge_head(shape->v_width, partial + i * stride, acc + i % n_q * stride);
}

static void finish(const struct winnow_model_shape *shape, const float *acc, float *out, float *lse)
{
    size_t v_width = shape->v_width;

    for (uint32_t g = 0; g < shape_n_q(shape); g++, acc += v_width + 2, out += v_width) {
        float sum = acc[1];
        lse[g] = sum > 0 ? acc[0] + logf(sum) : -INFINITY;
        for (size_t d = 0; d < v_width; d += 16)
            v16_store(out + d,
                      sum > 0 ? v16_div(v16_load(acc + 2 + d), v16_set1(sum)) : v16_set1(0.0f));
    }
}
