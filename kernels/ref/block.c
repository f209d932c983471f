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

void winnow_ref_block_pack(const struct winnow_model_shape *shape, uint32_t first, uint32_t n,
                           const float *k, const float *v, void *block)
{
    uint32_t k_width = shape->k_width, v_width = shape->v_width;
    winnow_assert(first + n <= WINNOW_BLOCK_TOKENS);

    for (uint32_t t = 0; t < n; t++) {
        for (uint32_t d = 0; d < k_width; d++)
            store(shape->kv_dtype, k[t * k_width + d], block, d * 16 + first + t);
        for (uint32_t d = 0; d < v_width; d++)
            store(shape->kv_dtype, v[t * v_width + d], block,
                  16 * k_width + (first + t) * v_width + d);
    }
}

void winnow_ref_block_unpack(const struct winnow_model_shape *shape, const void *block, float *k,
                             float *v)
{
    uint32_t k_width = shape->k_width;
    float k_transposed[WINNOW_WIDTH_MAX * WINNOW_BLOCK_TOKENS];

    winnow_ref_block_widen(shape, block, k_transposed, v);
    for (uint32_t t = 0; t < WINNOW_BLOCK_TOKENS; t++)
        for (uint32_t d = 0; d < k_width; d++)
            k[t * k_width + d] = k_transposed[d * 16 + t];
}

void winnow_ref_block_widen(const struct winnow_model_shape *shape, const void *block,
                            float *k_transposed, float *v)
{
    size_t element_bytes = shape->kv_dtype == WINNOW_FP32 ? 4 : 2;
    const char *v_at = (const char *)block + 16 * shape->k_width * element_bytes;

    winnow_ref_widen(shape->kv_dtype, 16 * shape->k_width, block, k_transposed);
    winnow_ref_widen(shape->kv_dtype, 16 * shape->v_width, v_at, v);
}
