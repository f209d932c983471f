/* The reference's table. */
#include <kernels/ref/ref.h>

/* A key and a class a block. */
static size_t select_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    (void)shape;
    return (size_t)n_blocks * (sizeof(uint64_t) + 1);
}

/* Build: C and a key a token, which is more than a selection needs. */
static size_t scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return winnow_ref_bisect_scratch_bytes(shape->k_width, n_blocks);
}

const struct winnow_kernels *winnow_kernels_ref(void)
{
    static const struct winnow_kernels ref = {
        .name = "ref",
        .scratch_bytes = scratch_bytes,
        .select_scratch_bytes = select_scratch_bytes,
        .to_float = winnow_ref_to_float,
        .from_float = winnow_ref_from_float,
        .build = winnow_ref_build,
        .block_pack = winnow_ref_block_pack,
        .block_unpack = winnow_ref_block_unpack,
        .score = winnow_ref_score,
        .probe = winnow_ref_probe,
        .select = winnow_ref_select,
        .select_more = winnow_ref_select_more,
        .attend_partial = winnow_ref_attend_partial,
        .attend_window = winnow_ref_attend_window,
        .window_scratch_bytes = winnow_ref_window_scratch_bytes,
        .compensate = winnow_ref_compensate,
        .merge = winnow_ref_merge,
        .finish = winnow_ref_finish,
    };
    return &ref;
}
