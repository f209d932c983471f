/*
 * Attend: exact attention over blocks, one pass: a running maximum m, a sum l and an output o, all
 * rescaled when a larger logit comes.
 */
#include <base/assert.h>
#include <float.h>
#include <kernels/ref/ref.h>
#include <string.h>

static float clamp_logit(float x)
{
    return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

/*
 * Takes the first n tokens of a widened block into one query head's partial {m, l, o}; n > 0.
 * Returns ln of their mass.
 */
static float absorb(const struct winnow_model_shape *shape, const float *q,
                    const float *k_transposed, const float *v, uint32_t n, float *partial)
{
    float l[WINNOW_BLOCK_TOKENS] = {0}, largest = -INFINITY, block_sum = 0;
    winnow_assert(n > 0);
    winnow_assert(n <= WINNOW_BLOCK_TOKENS);

    for (uint32_t d = 0; d < shape->k_width; d++)
        for (uint32_t t = 0; t < n; t++)
            l[t] += q[d] * k_transposed[d * 16 + t];
    for (uint32_t t = 0; t < n; t++) {
        l[t] = clamp_logit(shape->softmax_scale * l[t]);
        largest = fmaxf(largest, l[t]);
    }
    for (uint32_t t = 0; t < n; t++)
        block_sum += winnow_ref_exp(l[t] - largest);

    float m = winnow_ref_partial_raise(shape->v_width, partial, largest), *o = partial + 2;
    for (uint32_t t = 0; t < n; t++) {
        float p = winnow_ref_exp(l[t] - m);
        partial[1] += p;
        for (uint32_t d = 0; d < shape->v_width; d++)
            o[d] += p * v[t * shape->v_width + d];
    }
    return largest + logf(block_sum);
}

void winnow_ref_attend_partial(const struct winnow_model_shape *shape, const float *q, uint32_t n,
                               const void *const *block, const uint32_t *n_tokens, float *partial,
                               float *ln_m)
{
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads, stride = shape->v_width + 2;
    float k_transposed[WINNOW_WIDTH_MAX * 16], v[WINNOW_WIDTH_MAX * 16];
    winnow_assert(n <= WINNOW_GROUP_BLOCKS);
    winnow_assert(n_q > 0);
    winnow_assert(shape->k_width <= WINNOW_WIDTH_MAX);
    winnow_assert(shape->v_width <= WINNOW_WIDTH_MAX);

    memset(partial, 0, sizeof *partial * n_q * stride);
    for (uint32_t g = 0; g < n_q; g++)
        partial[g * stride] = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        winnow_assert(n_tokens[i] > 0);
        winnow_assert(n_tokens[i] <= WINNOW_BLOCK_TOKENS);
        winnow_ref_block_widen(shape, block[i], k_transposed, v);
        for (uint32_t g = 0; g < n_q; g++) {
            float ln = absorb(shape, q + g * shape->k_width, k_transposed, v, n_tokens[i],
                              partial + g * stride);
            if (ln_m)
                ln_m[i * n_q + g] = ln;
        }
    }
}

/* How many of a block's tokens a query at `at` sees. */
static uint32_t n_visible(uint64_t position, uint32_t n_tokens, uint64_t at)
{
    if (position == UINT64_MAX)
        return n_tokens;
    if (position > at)
        return 0;
    return at - position + 1 < n_tokens ? (uint32_t)(at - position + 1) : n_tokens;
}

void winnow_ref_attend_window(const struct winnow_model_shape *shape, uint32_t n_pos,
                              uint64_t first, const float *q, uint32_t n, const void *const *block,
                              const uint64_t *position, const uint32_t *n_tokens, float *partial,
                              void *scratch)
{
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads;
    float k_transposed[WINNOW_WIDTH_MAX * 16], v[WINNOW_WIDTH_MAX * 16];
    (void)scratch;
    winnow_assert(shape->k_width <= WINNOW_WIDTH_MAX);
    winnow_assert(shape->v_width <= WINNOW_WIDTH_MAX);

    for (uint32_t i = 0; i < n; i++) {
        winnow_assert(n_tokens[i] <= WINNOW_BLOCK_TOKENS);
        winnow_ref_block_widen(shape, block[i], k_transposed, v);
        for (uint32_t pos = 0; pos < n_pos; pos++) {
            uint32_t n_seen = n_visible(position[i], n_tokens[i], first + pos);
            for (size_t row = (size_t)pos * n_q; n_seen && row < ((size_t)pos + 1) * n_q; row++)
                absorb(shape, q + row * shape->k_width, k_transposed, v, n_seen,
                       partial + row * (shape->v_width + 2));
        }
    }
}

size_t winnow_ref_window_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_pos)
{
    (void)shape;
    (void)n_pos;
    return 0;
}
