/* Tokens into blocks and out of them; the layout is drawn in kernels.h. */
#include <base/assert.h>
#include <float.h>
#include <kernels/ref/ref.h>
#include <string.h>

static void store(uint32_t dtype, float x, void *dst, size_t idx)
{
    uint16_t *half = dst;

    if (dtype == WINNOW_FP32) {
        ((float *)dst)[idx] = x;
    } else if (dtype == WINNOW_FP16) {
        half[idx] = winnow_ref_float_to_fp16(fmaxf(fminf(x, 65504.0f), -65504.0f));
    } else {
        const float largest = 0x1.fep127f;
        half[idx] = winnow_ref_float_to_bf16(fmaxf(fminf(x, largest), -largest));
    }
}

/* Place in a tile of layout 2. */
static size_t fragment_idx(uint32_t row, uint32_t column)
{
    uint32_t lane = 4 * (row % 8) + column % 8 / 2;
    return 8 * lane + column % 2 + 2 * (row / 8) + 4 * (column / 8);
}

static size_t k_idx(const struct winnow_model_shape *shape, uint32_t t, uint32_t d)
{
    if (shape->block_layout == WINNOW_BLOCK_FRAGMENTS)
        return d / 16 * 256 + fragment_idx(t, d % 16);
    return d * 16 + t;
}

static size_t v_idx(const struct winnow_model_shape *shape, uint32_t t, uint32_t d)
{
    size_t v_at = 16 * (size_t)shape->k_width;

    if (shape->block_layout == WINNOW_BLOCK_FRAGMENTS)
        return v_at + d / 16 * 256 + fragment_idx(d % 16, t);
    return v_at + (size_t)t * shape->v_width + d;
}

void winnow_ref_block_pack(const struct winnow_model_shape *shape, uint32_t first, uint32_t n,
                           const float *k, const float *v, void *block)
{
    winnow_assert(first <= WINNOW_BLOCK_TOKENS);
    winnow_assert(n <= WINNOW_BLOCK_TOKENS - first);

    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t d = 0; d < shape->k_width; d++)
            store(shape->kv_dtype, k[t * shape->k_width + d], block, k_idx(shape, first + t, d));
        for (uint32_t d = 0; d < shape->v_width; d++)
            store(shape->kv_dtype, v[t * shape->v_width + d], block, v_idx(shape, first + t, d));
    }
}

void winnow_ref_block_unpack(const struct winnow_model_shape *shape, const void *block, float *k,
                             float *v)
{
    uint32_t k_width = shape->k_width;
    float k_transposed[WINNOW_WIDTH_MAX * WINNOW_BLOCK_TOKENS];
    winnow_assert(k_width <= WINNOW_WIDTH_MAX);

    winnow_ref_block_widen(shape, block, k_transposed, v);
    for (uint32_t t = 0; t < WINNOW_BLOCK_TOKENS; t++)
        for (uint32_t d = 0; d < k_width; d++)
            k[t * k_width + d] = k_transposed[d * 16 + t];
}

static void widen_fragments(const struct winnow_model_shape *shape, const void *block,
                            float *k_transposed, float *v)
{
    const uint16_t *half = block;
    winnow_assert(shape->kv_dtype != WINNOW_FP32);
    winnow_assert(shape->k_width % 16 == 0);
    winnow_assert(shape->v_width % 16 == 0);

    for (uint32_t t = 0; t < WINNOW_BLOCK_TOKENS; t++) {
        for (uint32_t d = 0; d < shape->k_width; d++)
            winnow_ref_widen(shape->kv_dtype, 1, half + k_idx(shape, t, d),
                             k_transposed + d * 16 + t);
        for (uint32_t d = 0; d < shape->v_width; d++)
            winnow_ref_widen(shape->kv_dtype, 1, half + v_idx(shape, t, d),
                             v + (size_t)t * shape->v_width + d);
    }
}

void winnow_ref_block_widen(const struct winnow_model_shape *shape, const void *block,
                            float *k_transposed, float *v)
{
    size_t element_bytes = shape->kv_dtype == WINNOW_FP32 ? 4 : 2;
    const char *v_at = (const char *)block + 16 * shape->k_width * element_bytes;

    if (shape->block_layout == WINNOW_BLOCK_FRAGMENTS) {
        widen_fragments(shape, block, k_transposed, v);
        return;
    }
    winnow_ref_widen(shape->kv_dtype, 16 * shape->k_width, block, k_transposed);
    winnow_ref_widen(shape->kv_dtype, 16 * shape->v_width, v_at, v);
}
