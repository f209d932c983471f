/* Chooses a version of the kernels, and refuses the shapes that none of them handles. */
#include <assert.h>
#include <base/assert.h>
#include <errno.h>
#include <kernels/cpu/cpu.h>
#include <kernels/kernels.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static int refuse_width(const char *name, uint32_t width, char text[256])
{
    if (width >= WINNOW_WIDTH_MIN && width <= WINNOW_WIDTH_MAX && width % 16 == 0)
        return 0;
    snprintf(text, 256, "%s %u: a multiple of 16 from %d to %d is needed", name, width,
             WINNOW_WIDTH_MIN, WINNOW_WIDTH_MAX);
    return -EINVAL;
}

static_assert(WINNOW_FP16 == WINNOW_BF16 + 1, "a range without a gap");
static_assert(WINNOW_FP32 == WINNOW_FP16 + 1, "a range without a gap");

static int refuse_dtype(const char *name, uint32_t dtype, char text[256])
{
    if (dtype >= WINNOW_BF16 && dtype <= WINNOW_FP32)
        return 0;
    snprintf(text, 256, "%s %u: bf16 (1), fp16 (2) or fp32 (3) is needed", name, dtype);
    return -EINVAL;
}

static int refuse_heads(const struct winnow_model_shape *shape, char text[256])
{
    uint32_t n_q = shape->n_q_heads, n_kv = shape->n_kv_heads;
    if (n_kv > 0 && n_q > 0 && n_q % n_kv == 0 && n_q / n_kv <= WINNOW_GQA_MAX)
        return 0;
    snprintf(text, 256, "n_q_heads %u, n_kv_heads %u: a ratio of 1, 2, ... %d is needed", n_q, n_kv,
             WINNOW_GQA_MAX);
    return -EINVAL;
}

static int refuse_layout(const struct winnow_model_shape *shape, char text[256])
{
    uint32_t layout = shape->block_layout;

    if (layout != WINNOW_BLOCK_LAYOUT && layout != WINNOW_BLOCK_FRAGMENTS) {
        snprintf(text, 256, "block_layout %u: %d or %d is needed", layout, WINNOW_BLOCK_LAYOUT,
                 WINNOW_BLOCK_FRAGMENTS);
        return -EINVAL;
    }
    if (layout == WINNOW_BLOCK_FRAGMENTS && shape->kv_dtype == WINNOW_FP32) {
        snprintf(text, 256, "block_layout %d, kv_dtype fp32: fp16 or bf16 is needed", layout);
        return -EINVAL;
    }
    return 0;
}

int winnow_model_shape_check(const struct winnow_model_shape *shape, char text[256])
{
    text[0] = 0;
    if (shape->n_layers == 0) {
        snprintf(text, 256, "n_layers 0: at least 1 is needed");
        return -EINVAL;
    }
    if (refuse_heads(shape, text) || refuse_width("k_width", shape->k_width, text) ||
        refuse_width("v_width", shape->v_width, text) ||
        refuse_dtype("kv_dtype", shape->kv_dtype, text) ||
        refuse_dtype("io_dtype", shape->io_dtype, text))
        return -EINVAL;
    if (!(isfinite(shape->softmax_scale) && shape->softmax_scale > 0)) {
        snprintf(text, 256, "softmax_scale %g: a positive number is needed",
                 (double)shape->softmax_scale);
        return -EINVAL;
    }
    return refuse_layout(shape, text);
}

const struct winnow_kernels *winnow_kernels_find(const char *name)
{
    const struct winnow_kernels *fastest_first[] = {winnow_kernels_avx512(), winnow_kernels_avx2(),
                                                    winnow_kernels_ref()};

    for (size_t i = 0; i < sizeof fastest_first / sizeof fastest_first[0]; i++)
        if (fastest_first[i] && (!name || !strcmp(fastest_first[i]->name, name)))
            return fastest_first[i];
    winnow_assert(name); /* ref runs anywhere */
    return NULL;
}
