/* The table of one level: avx2.c and avx512.c include this, and with it all kernels. */
#include <kernels/cpu/attend_impl.h>
#include <kernels/cpu/cpu.h>
#include <kernels/cpu/score_impl.h>
#include <kernels/cpu/window_impl.h>

/* Entries that SIMD does not speed up are the reference's. */
static size_t scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return winnow_kernels_ref()->scratch_bytes(shape, n_blocks);
}

static uint32_t probe(struct winnow_selection *sel, void *scratch)
{
    return winnow_kernels_ref()->probe(sel, scratch);
}

static int to_float(uint32_t dtype, size_t n, const void *src, float *dst)
{
    return winnow_kernels_ref()->to_float(dtype, n, src, dst);
}

static int from_float(uint32_t dtype, size_t n, const float *src, void *dst)
{
    return winnow_kernels_ref()->from_float(dtype, n, src, dst);
}

static int build(const struct winnow_model_shape *shape, uint32_t n_blocks, const float *k,
                 const float *v, uint16_t *order, struct winnow_index_view *view, void *scratch)
{
    return winnow_kernels_ref()->build(shape, n_blocks, k, v, order, view, scratch);
}

static void block_pack(const struct winnow_model_shape *shape, uint32_t first, uint32_t n,
                       const float *k, const float *v, void *block)
{
    winnow_kernels_ref()->block_pack(shape, first, n, k, v, block);
}

static void block_unpack(const struct winnow_model_shape *shape, const void *block, float *k,
                         float *v)
{
    winnow_kernels_ref()->block_unpack(shape, block, k, v);
}

static void select_blocks(uint32_t policy, struct winnow_selection *sel, void *scratch)
{
    winnow_kernels_ref()->select(policy, sel, scratch);
}

static uint32_t select_more(struct winnow_selection *sel, float *rho, float *mass, int may_add,
                            void *scratch)
{
    return winnow_kernels_ref()->select_more(sel, rho, mass, may_add, scratch);
}

static void compensate(const struct winnow_model_shape *shape, const struct winnow_index_view *view,
                       const struct winnow_selection *sel, uint32_t block_first, float *partial)
{
    winnow_kernels_ref()->compensate(shape, view, sel, block_first, partial);
}

static void merge(const struct winnow_model_shape *shape, uint32_t n, const float *partial,
                  float *acc)
{
    winnow_kernels_ref()->merge(shape, n, partial, acc);
}

static void finish(const struct winnow_model_shape *shape, const float *acc, float *out, float *lse)
{
    winnow_kernels_ref()->finish(shape, acc, out, lse);
}

const struct winnow_kernels VERSION_TABLE = {
    .name = VERSION_NAME,
    .scratch_bytes = scratch_bytes,
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
