/*
 * The plain table: kernels.h's entries over host memory, each copied to the device, launched and
 * copied back before it returns. For tests, as a second opinion on the stages, and for whoever has
 * few numbers to work on; `tactic` is ref's, being there to be compared with.
 *
 * Memory comes from the device's pool, which keeps what it once took; the stream is the calling
 * thread's. The contract knows no error but EDOM, so one of CUDA ends the program.
 */
#include <base/assert.h>
#include <errno.h>
#include <kernels/cuda/build.h>
#include <kernels/cuda/plain.h>
#include <kernels/ref/ref.h>
#include <pthread.h>

enum { N_BUFFERS_MAX = 24 };

static const cudaStream_t STREAM = cudaStreamPerThread;

struct call {
    void *buffer[N_BUFFERS_MAX];
    uint32_t n_buffers;
};

static void must(cudaError_t error)
{
    if (error != cudaSuccess)
        winnow_assert_fail(cudaGetErrorString(error), __FILE__, __LINE__);
}

static void pool_init(void)
{
    uint64_t keep_bytes = UINT64_MAX;
    cudaMemPool_t pool;
    int device;

    must(cudaGetDevice(&device));
    must(cudaDeviceGetDefaultMemPool(&pool, device));
    must(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_bytes));
}

static void call_init(struct call *call)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, pool_init);
    call->n_buffers = 0;
}

/* Device memory until the call is finished. */
static void *call_new(struct call *call, size_t n_bytes)
{
    winnow_assert(call->n_buffers < N_BUFFERS_MAX);

    void **buffer = &call->buffer[call->n_buffers++];
    must(cudaMallocAsync(buffer, n_bytes > 0 ? n_bytes : 1, STREAM));
    return *buffer;
}

static void *call_in(struct call *call, const void *src, size_t n_bytes)
{
    void *dst = call_new(call, n_bytes);
    if (n_bytes > 0)
        must(cudaMemcpyAsync(dst, src, n_bytes, cudaMemcpyHostToDevice, STREAM));
    return dst;
}

static void call_out(void *dst, const void *src, size_t n_bytes)
{
    if (n_bytes > 0)
        must(cudaMemcpyAsync(dst, src, n_bytes, cudaMemcpyDeviceToHost, STREAM));
}

static void call_finish(struct call *call)
{
    for (uint32_t i = 0; i < call->n_buffers; i++)
        must(cudaFreeAsync(call->buffer[i], STREAM));
    must(cudaStreamSynchronize(STREAM));
}

static uint32_t group_heads(const struct winnow_model_shape *shape)
{
    return shape->n_q_heads / shape->n_kv_heads;
}

static size_t element_bytes(uint32_t dtype)
{
    return dtype == WINNOW_FP32 ? 4 : 2;
}

static int to_float(uint32_t dtype, size_t n, const void *src, float *dst)
{
    struct call call;
    uint32_t is_bad = 0;

    call_init(&call);
    const void *from = call_in(&call, src, n * element_bytes(dtype));
    float *to = call_new(&call, n * sizeof *dst);
    uint32_t *bad = call_in(&call, &is_bad, sizeof is_bad);
    must(winnow_gpu_widen(dtype, n, from, to, bad, STREAM));
    call_out(dst, to, n * sizeof *dst);
    call_out(&is_bad, bad, sizeof is_bad);
    call_finish(&call);
    return is_bad ? -EDOM : 0;
}

static int from_float(uint32_t dtype, size_t n, const float *src, void *dst)
{
    struct call call;
    uint32_t is_bad = 0;

    call_init(&call);
    const float *from = call_in(&call, src, n * sizeof *src);
    void *to = call_new(&call, n * element_bytes(dtype));
    uint32_t *bad = call_in(&call, &is_bad, sizeof is_bad);
    must(winnow_gpu_narrow(dtype, n, from, to, bad, STREAM));
    call_out(dst, to, n * element_bytes(dtype));
    call_out(&is_bad, bad, sizeof is_bad);
    call_finish(&call);
    return is_bad ? -EDOM : 0;
}

/* An array of a view on the device, and back. */
struct view_array {
    void **device;
    void *host;
    size_t n_bytes;
};

enum { N_VIEW_ARRAYS = 9 };

static void view_arrays(const struct winnow_model_shape *shape,
                        const struct winnow_index_view *host, struct winnow_index_view *device,
                        struct view_array array[N_VIEW_ARRAYS])
{
    size_t n = host->n_blocks, k_width = shape->k_width, v_width = shape->v_width;
    const struct view_array of_view[N_VIEW_ARRAYS] = {
        {(void **)&device->head, host->head, n * sizeof *host->head},
        {(void **)&device->centroid, host->centroid, n * k_width},
        {(void **)&device->vmean, host->vmean, n * v_width},
        {(void **)&device->code, host->code, n * k_width * 8},
        {(void **)&device->code_scale, host->code_scale, n * 32},
        {(void **)&device->var, host->var, n * k_width * 2},
        {(void **)&device->mean_k, host->mean_k, k_width * sizeof(float)},
        {(void **)&device->mean_v, host->mean_v, v_width * sizeof(float)},
        {(void **)&device->v_max, host->v_max, sizeof(float)},
    };

    *device = (struct winnow_index_view){.n_blocks = host->n_blocks};
    for (int i = 0; i < N_VIEW_ARRAYS; i++)
        array[i] = of_view[i];
}

static struct winnow_index_view view_in(struct call *call, const struct winnow_model_shape *shape,
                                        const struct winnow_index_view *view)
{
    struct winnow_index_view device;
    struct view_array array[N_VIEW_ARRAYS];

    view_arrays(shape, view, &device, array);
    for (int i = 0; i < N_VIEW_ARRAYS; i++)
        if (array[i].host)
            *array[i].device = call_in(call, array[i].host, array[i].n_bytes);
    return device;
}

static bool all_finite(size_t n, float *x, uint32_t *bad)
{
    uint32_t is_bad;

    must(winnow_gpu_narrow(WINNOW_FP32, n, x, x, bad, STREAM));
    call_out(&is_bad, bad, sizeof is_bad);
    must(cudaStreamSynchronize(STREAM));
    return !is_bad;
}

static int build(const struct winnow_model_shape *shape, uint32_t n_blocks, const float *k,
                 const float *v, uint16_t *order, struct winnow_index_view *view, void *scratch)
{
    struct winnow_index_view device;
    struct view_array array[N_VIEW_ARRAYS];
    struct call call;
    uint32_t is_bad = 0;
    size_t n_tokens = (size_t)16 * n_blocks, n_k = n_tokens * shape->k_width;
    size_t n_v = n_tokens * shape->v_width;
    (void)scratch;
    winnow_assert(n_blocks == view->n_blocks && n_blocks <= (UINT16_MAX + 1) / 16);

    call_init(&call);
    float *k_at = call_in(&call, k, n_k * sizeof *k), *v_at = call_in(&call, v, n_v * sizeof *v);
    uint32_t *bad = call_in(&call, &is_bad, sizeof is_bad);
    bool is_finite = all_finite(n_k, k_at, bad) && all_finite(n_v, v_at, bad);
    view_arrays(shape, view, &device, array);
    for (int i = 0; i < N_VIEW_ARRAYS && is_finite; i++)
        if (array[i].host)
            *array[i].device = call_new(&call, array[i].n_bytes);
    if (is_finite && n_blocks > 0) {
        size_t scratch_bytes = winnow_gpu_build_scratch_bytes(n_blocks);
        struct winnow_gpu_build launch = {
            .k_width = shape->k_width,
            .v_width = shape->v_width,
            .dtype = WINNOW_FP32,
            .n_units = 1,
            .k = k_at,
            .v = v_at,
            .order = call_new(&call, n_tokens * sizeof *order),
            .index = device,
            .scratch = call_new(&call, scratch_bytes),
        };
        must(winnow_gpu_build_launch(&launch, STREAM));
        call_out(order, launch.order, n_tokens * sizeof *order);
        for (int i = 0; i < N_VIEW_ARRAYS; i++)
            if (array[i].host)
                call_out(array[i].host, *array[i].device, array[i].n_bytes);
    }
    call_finish(&call);
    return is_finite ? 0 : -EDOM;
}

static void block_pack(const struct winnow_model_shape *shape, uint32_t first, uint32_t n,
                       const float *k, const float *v, void *block)
{
    struct call call;
    size_t n_bytes = winnow_block_bytes(shape);
    winnow_assert(first + n <= WINNOW_BLOCK_TOKENS);

    call_init(&call);
    const float *k_at = call_in(&call, k, (size_t)n * shape->k_width * sizeof *k);
    const float *v_at = call_in(&call, v, (size_t)n * shape->v_width * sizeof *v);
    void *at = call_in(&call, block, n_bytes);
    must(winnow_gpu_block_pack(shape, first, n, k_at, v_at, at, STREAM));
    call_out(block, at, n_bytes);
    call_finish(&call);
}

static void block_unpack(const struct winnow_model_shape *shape, const void *block, float *k,
                         float *v)
{
    struct call call;
    size_t k_bytes = (size_t)16 * shape->k_width * sizeof *k;
    size_t v_bytes = (size_t)16 * shape->v_width * sizeof *v;

    call_init(&call);
    const void *at = call_in(&call, block, winnow_block_bytes(shape));
    float *k_at = call_new(&call, k_bytes), *v_at = call_new(&call, v_bytes);
    must(winnow_gpu_block_unpack(shape, at, k_at, v_at, STREAM));
    call_out(k, k_at, k_bytes);
    call_out(v, v_at, v_bytes);
    call_finish(&call);
}

static void score(const struct winnow_model_shape *shape, uint32_t policy,
                  const struct winnow_index_view *view, const float *q, float *ln_e, void *scratch)
{
    struct call call;
    size_t n_q = group_heads(shape), e_bytes = view->n_blocks * n_q * sizeof *ln_e;
    (void)scratch;

    call_init(&call);
    struct winnow_index_view device = view_in(&call, shape, view);
    const float *q_at = call_in(&call, q, n_q * shape->k_width * sizeof *q);
    float *e_at = call_new(&call, e_bytes);
    must(winnow_gpu_score(shape, policy, &device, q_at, e_at, STREAM));
    call_out(ln_e, e_at, e_bytes);
    call_finish(&call);
}

/* The arrays of a selection that both rounds read; outputs are allocated. */
static struct winnow_selection selection_in(struct call *call, const struct winnow_selection *sel)
{
    struct winnow_selection device = *sel;
    size_t n = sel->n_blocks, e_bytes = n * sel->n_q * sizeof *sel->ln_e;

    device.ln_z = call_in(call, sel->ln_z, sel->n_q * sizeof *sel->ln_z);
    device.ln_e = call_in(call, sel->ln_e, e_bytes);
    device.ln_m = NULL;
    device.ln_key = call_new(call, n * sizeof *sel->ln_key);
    device.block_idx = call_new(call, n * sizeof *sel->block_idx);
    device.selected = call_new(call, n);
    return device;
}

static uint32_t probe(struct winnow_selection *sel, void *scratch)
{
    return winnow_ref_probe(sel, scratch);
}

static void select_blocks(uint32_t policy, struct winnow_selection *sel, void *scratch)
{
    struct call call;
    uint32_t counts[2], n = sel->n_blocks;

    if (policy == WINNOW_POLICY_TACTIC || policy == WINNOW_POLICY_EXACT) {
        winnow_ref_select(policy, sel, scratch);
        return;
    }
    call_init(&call);
    struct winnow_selection device = selection_in(&call, sel);
    uint64_t *key = call_new(&call, winnow_gpu_select_keys(n) * sizeof *key);
    uint32_t *counts_at = call_new(&call, sizeof counts);
    must(winnow_gpu_select(&device, key, counts_at, STREAM));
    call_out(sel->ln_key, device.ln_key, n * sizeof *sel->ln_key);
    call_out(sel->block_idx, device.block_idx, n * sizeof *sel->block_idx);
    call_out(sel->selected, device.selected, n);
    call_out(counts, counts_at, sizeof counts);
    call_finish(&call);
    sel->n_selected = counts[0];
    sel->n_reserve = counts[1];
}

static uint32_t select_more(struct winnow_selection *sel, float *rho, float *mass, int may_add,
                            void *scratch)
{
    struct call call;
    uint32_t n_added, n = sel->n_blocks;
    size_t head_bytes = sel->n_q * sizeof *rho;
    (void)scratch;

    call_init(&call);
    struct winnow_selection device = selection_in(&call, sel);
    device.ln_m = call_in(&call, sel->ln_m, n * sel->n_q * sizeof *sel->ln_m);
    device.block_idx = call_in(&call, sel->block_idx, n * sizeof *sel->block_idx);
    device.selected = call_in(&call, sel->selected, n);
    float *rho_at = call_in(&call, rho, head_bytes), *mass_at = call_new(&call, head_bytes);
    uint32_t *added_at = call_new(&call, sizeof n_added);
    must(winnow_gpu_select_more(&device, rho_at, mass_at, may_add, added_at, STREAM));
    call_out(rho, rho_at, head_bytes);
    call_out(mass, mass_at, head_bytes);
    call_out(sel->selected, device.selected, n);
    call_out(&n_added, added_at, sizeof n_added);
    call_finish(&call);
    sel->n_selected += n_added;
    sel->n_reserve -= n_added < sel->n_reserve ? n_added : sel->n_reserve;
    return n_added;
}

/* Blocks from anywhere, one after the other. */
static void *blocks_in(struct call *call, const struct winnow_model_shape *shape, uint32_t n,
                       const void *const *block)
{
    size_t n_bytes = winnow_block_bytes(shape);
    uint8_t *at = call_new(call, n * n_bytes);

    for (uint32_t i = 0; i < n; i++)
        must(cudaMemcpyAsync(at + i * n_bytes, block[i], n_bytes, cudaMemcpyHostToDevice, STREAM));
    return at;
}

static void attend_partial(const struct winnow_model_shape *shape, const float *q, uint32_t n,
                           const void *const *block, const uint32_t *n_tokens, float *partial,
                           float *ln_m)
{
    struct call call;
    size_t n_q = group_heads(shape), partial_bytes = winnow_partial_floats(shape) * sizeof *partial;
    winnow_assert(n <= WINNOW_GROUP_BLOCKS);

    call_init(&call);
    const float *q_at = call_in(&call, q, n_q * shape->k_width * sizeof *q);
    const void *blocks = blocks_in(&call, shape, n, block);
    const uint32_t *tokens = call_in(&call, n_tokens, n * sizeof *n_tokens);
    float *at = call_new(&call, partial_bytes), *m_at = call_new(&call, n * n_q * sizeof *ln_m);
    must(winnow_gpu_attend_partial(shape, q_at, n, blocks, tokens, at, m_at, STREAM));
    call_out(partial, at, partial_bytes);
    if (ln_m)
        call_out(ln_m, m_at, n * n_q * sizeof *ln_m);
    call_finish(&call);
}

static void attend_window(const struct winnow_model_shape *shape, uint32_t n_pos, uint64_t first,
                          const float *q, uint32_t n, const void *const *block,
                          const uint64_t *position, const uint32_t *n_tokens, float *partial,
                          void *scratch)
{
    struct call call;
    size_t partial_bytes = n_pos * winnow_partial_floats(shape) * sizeof *partial;
    (void)scratch;

    call_init(&call);
    const float *q_at =
        call_in(&call, q, (size_t)n_pos * group_heads(shape) * shape->k_width * sizeof *q);
    const void *blocks = blocks_in(&call, shape, n, block);
    const uint64_t *positions = call_in(&call, position, n * sizeof *position);
    const uint32_t *tokens = call_in(&call, n_tokens, n * sizeof *n_tokens);
    float *at = call_in(&call, partial, partial_bytes);
    must(winnow_gpu_attend_window(shape, n_pos, first, q_at, n, blocks, positions, tokens, at,
                                  STREAM));
    call_out(partial, at, partial_bytes);
    call_finish(&call);
}

static size_t window_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_pos)
{
    return winnow_ref_window_scratch_bytes(shape, n_pos);
}

static void compensate(const struct winnow_model_shape *shape, const struct winnow_index_view *view,
                       const struct winnow_selection *sel, uint32_t block_first, float *partial)
{
    const float N_NATS_NEAR = 8; /* as in ref/compensate.c */
    struct call call;
    struct winnow_selection device = *sel;
    size_t n = view->n_blocks, partial_bytes = winnow_partial_floats(shape) * sizeof *partial;

    if (n == 0)
        return;
    uint32_t last = sel->n_selected > 0 ? sel->n_selected - 1 : 0;
    float near = sel->ln_key[sel->block_idx[last]] - N_NATS_NEAR;
    call_init(&call);
    struct winnow_index_view view_at = view_in(&call, shape, view);
    device.ln_e = call_in(&call, sel->ln_e + (size_t)block_first * sel->n_q,
                          n * sel->n_q * sizeof *sel->ln_e);
    device.ln_key = call_in(&call, sel->ln_key + block_first, n * sizeof *sel->ln_key);
    device.selected = call_in(&call, sel->selected + block_first, n);
    float *at = call_in(&call, partial, partial_bytes);
    must(winnow_gpu_compensate(shape, &view_at, &device, near, at, STREAM));
    call_out(partial, at, partial_bytes);
    call_finish(&call);
}

static void merge(const struct winnow_model_shape *shape, uint32_t n, const float *partial,
                  float *acc)
{
    struct call call;
    size_t partial_bytes = winnow_partial_floats(shape) * sizeof *partial;

    call_init(&call);
    const float *from = call_in(&call, partial, n * partial_bytes);
    float *at = call_in(&call, acc, partial_bytes);
    must(winnow_gpu_merge(shape, n, from, at, STREAM));
    call_out(acc, at, partial_bytes);
    call_finish(&call);
}

static void finish(const struct winnow_model_shape *shape, const float *acc, float *out, float *lse)
{
    struct call call;
    size_t n_q = group_heads(shape), out_bytes = n_q * shape->v_width * sizeof *out;

    call_init(&call);
    const float *at = call_in(&call, acc, winnow_partial_floats(shape) * sizeof *acc);
    float *out_at = call_new(&call, out_bytes), *lse_at = call_new(&call, n_q * sizeof *lse);
    must(winnow_gpu_finish(shape, at, out_at, lse_at, STREAM));
    call_out(out, out_at, out_bytes);
    call_out(lse, lse_at, n_q * sizeof *lse);
    call_finish(&call);
}

/* Of host scratch only ref's part is used. */
static size_t scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return winnow_kernels_ref()->scratch_bytes(shape, n_blocks);
}

static size_t select_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return winnow_kernels_ref()->select_scratch_bytes(shape, n_blocks);
}

const struct winnow_kernels *winnow_gpu_plain(void)
{
    static const struct winnow_kernels cuda = {
        .name = "cuda",
        .scratch_bytes = scratch_bytes,
        .select_scratch_bytes = select_scratch_bytes,
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
    return &cuda;
}
