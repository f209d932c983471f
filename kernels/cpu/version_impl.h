/* The table of one level: avx2.c and avx512.c include this, and with it all kernels. */
#include <kernels/cpu/cpu.h>
#include <kernels/cpu/index_impl.h>
#include <kernels/cpu/merge_impl.h>
#include <kernels/cpu/score_impl.h>
#include <kernels/cpu/select_impl.h>
#include <kernels/cpu/window_impl.h>

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static size_t selection_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return larger(select_scratch_bytes(shape_n_q(shape), n_blocks),
                  winnow_kernels_ref()->select_scratch_bytes(shape, n_blocks));
}

static size_t scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return larger(bisect_scratch_bytes(shape->k_width, n_blocks),
                  selection_scratch_bytes(shape, n_blocks));
}

/* The policy `tactic` is there to be compared with: the reference's. */
static uint32_t probe(struct winnow_selection *sel, void *scratch)
{
    return winnow_kernels_ref()->probe(sel, scratch);
}

const struct winnow_kernels VERSION_TABLE = {
    .name = VERSION_NAME,
    .scratch_bytes = scratch_bytes,
    .select_scratch_bytes = selection_scratch_bytes,
    .to_float = to_float,
    .from_float = from_float,
    .build = build,
    .block_pack = block_pack,
    .block_unpack = block_unpack,
    .score = score,
    .probe = probe,
    .select = select_blocks,
    .select_more = select_more,
    .attend_partial = attend_partial,
    .attend_window = attend_window,
    .window_scratch_bytes = window_scratch_bytes,
    .compensate = compensate,
    .merge = merge,
    .finish = finish,
};
