/* Attention, and the joining of partials, in every version. Rules and tolerances: versions.h. */
#include "versions.h"

/* Blocks with NaN (moved: with large numbers) where tokens beyond n_tokens lie, at an alignment of
 * their own. */
static uint8_t *blocks_poisoned(uint32_t n, const uint32_t *n_tokens, size_t offset,
                                const void **block)
{
    int poison = offset ? 0x42 : 0xff;
    size_t element_bytes = data.shape.kv_dtype == WINNOW_FP32 ? 4 : 2, k_width = data.shape.k_width;
    uint8_t *copy = case_alloc(n * data.block_bytes + offset);

    memcpy(copy + offset, data.blocks, n * data.block_bytes);
    for (uint32_t b = 0; b < n; b++) {
        uint8_t *at = copy + offset + b * data.block_bytes;
        size_t v_row_bytes = data.shape.v_width * element_bytes;
        for (uint32_t t = n_tokens[b]; t < 16; t++) {
            for (uint32_t d = 0; d < k_width; d++)
                memset(at + (16 * d + t) * element_bytes, poison, element_bytes);
            memset(at + 16 * k_width * element_bytes + t * v_row_bytes, poison, v_row_bytes);
        }
        block[b] = at;
    }
    return copy;
}

static void attend_run(const struct winnow_kernels *kernels, uint32_t n, const uint32_t *n_tokens,
                       size_t offset, float *partial, float *ln_m)
{
    const void *block[WINNOW_GROUP_BLOCKS];
    size_t q_bytes = (size_t)data.n_q * data.shape.k_width * sizeof(float);
    size_t partial_bytes = data.n_partial * sizeof(float), m_bytes = n * data.n_q * sizeof(float);
    struct guarded q, out, out_m = {0};
    uint8_t *blocks = blocks_poisoned(n, n_tokens, offset / 2, block);

    kernels->attend_partial(&data.shape, guarded_copy(&q, data.q, q_bytes, offset), n, block,
                            n_tokens, guarded_init(&out, partial_bytes, offset),
                            ln_m ? guarded_init(&out_m, m_bytes, offset) : NULL);
    memcpy(partial, out.memory + GUARD_BYTES + offset, partial_bytes);
    if (ln_m) {
        memcpy(ln_m, out_m.memory + GUARD_BYTES + offset, m_bytes);
        guarded_finish(&out_m);
    }
    guarded_finish(&q);
    guarded_finish(&out);
    winnow_alloc_free(blocks);
}

static void attend_check(uint32_t n, const uint32_t *n_tokens)
{
    enum { N_MAX = WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2) };
    static float a[N_MAX], moved[N_MAX], b[N_MAX];
    float a_m[WINNOW_GROUP_BLOCKS * WINNOW_GQA_MAX], moved_m[WINNOW_GROUP_BLOCKS * WINNOW_GQA_MAX],
        b_m[WINNOW_GROUP_BLOCKS * WINNOW_GQA_MAX];
    uint32_t stride = data.shape.v_width + 2;
    double v_largest = value_largest();

    attend_run(version, n, n_tokens, 0, a, a_m);
    attend_run(version, n, n_tokens, 4, moved, moved_m);
    attend_run(ref, n, n_tokens, 0, b, b_m);
    CHECK(!memcmp(a, moved, data.n_partial * sizeof(float)));
    CHECK(!memcmp(a_m, moved_m, n * data.n_q * sizeof(float)));
    attend_run(version, n, n_tokens, 0, moved, NULL);
    CHECK(!memcmp(a, moved, data.n_partial * sizeof(float)));
    for (uint32_t g = 0; g < data.n_q; g++) {
        double tolerance = logit_tolerance(data.q + (size_t)g * data.shape.k_width, 16 * n);
        check_partial("attend", a + g * stride, b + g * stride, tolerance, v_largest);
        for (uint32_t i = 0; i < n; i++)
            check_close("ln_m", i * data.n_q + g, (double)a_m[i * data.n_q + g],
                        (double)b_m[i * data.n_q + g],
                        tolerance + SUM_TOLERANCE + 1e-7 * fabs((double)b_m[i * data.n_q + g]));
    }
}

/* Attends 0 to 8 blocks, full and part-filled, as the reference does. */
static void test_attend_partial(void)
{
    uint32_t n_tokens[WINNOW_GROUP_BLOCKS] = {0};

    for (uint32_t n = 0; n <= WINNOW_GROUP_BLOCKS; n++) {
        for (uint32_t b = 0; b < n; b++)
            n_tokens[b] = 16;
        attend_check(n, n_tokens);
        for (uint32_t b = 0; b < n; b++)
            n_tokens[b] = 1 + (7 * n + 5 * b) % 16;
        attend_check(n, n_tokens);
    }
}

struct window {
    uint32_t n_pos, n;
    uint64_t first;
    uint64_t position[N_BLOCKS];
    uint32_t n_tokens[N_BLOCKS];
};

static void window_run(const struct winnow_kernels *kernels, const struct window *window,
                       size_t offset, float *partial)
{
    const void *block[N_BLOCKS];
    size_t q_bytes = (size_t)window->n_pos * data.n_q * data.shape.k_width * sizeof(float);
    size_t partial_bytes = window->n_pos * data.n_partial * sizeof(float);
    struct guarded q, out, scratch;
    uint8_t *blocks = blocks_poisoned(window->n, window->n_tokens, offset / 2, block);
    float *at = guarded_copy(&out, partial, partial_bytes, offset);

    kernels->attend_window(
        &data.shape, window->n_pos, window->first, guarded_copy(&q, data.q, q_bytes, offset),
        window->n, block, window->position, window->n_tokens, at,
        guarded_init(&scratch, kernels->window_scratch_bytes(&data.shape, window->n_pos), 0));
    memcpy(partial, at, partial_bytes);
    guarded_finish(&q);
    guarded_finish(&out);
    guarded_finish(&scratch);
    winnow_alloc_free(blocks);
}

static float *window_partials(uint32_t n_pos)
{
    float *partial = case_alloc(n_pos * data.n_partial * sizeof(float));
    for (uint32_t i = 0; i < n_pos * data.n_q; i++)
        partial[i * (data.shape.v_width + 2)] = -INFINITY;
    return partial;
}

static void window_check(const struct window *window)
{
    float *a = window_partials(window->n_pos), *moved = window_partials(window->n_pos);
    float *b = window_partials(window->n_pos);
    uint32_t stride = data.shape.v_width + 2;
    double v_largest = value_largest();

    window_run(version, window, 0, a);
    window_run(version, window, 4, moved);
    window_run(ref, window, 0, b);
    CHECK(!memcmp(a, moved, window->n_pos * data.n_partial * sizeof(float)));
    for (uint32_t i = 0; i < window->n_pos * data.n_q; i++)
        check_partial("window", a + i * stride, b + i * stride,
                      logit_tolerance(data.q + (size_t)i * data.shape.k_width, 16 * window->n),
                      v_largest);
    window->n ? window_run(version, window, 0, a) : (void)0; /* continued */
    window->n ? window_run(ref, window, 0, b) : (void)0;
    for (uint32_t i = 0; i < window->n_pos * data.n_q; i++)
        check_partial("window", a + i * stride, b + i * stride,
                      logit_tolerance(data.q + (size_t)i * data.shape.k_width, 16 * window->n),
                      v_largest);
    winnow_alloc_free(a);
    winnow_alloc_free(moved);
    winnow_alloc_free(b);
}

/* Windows over sealed blocks, then open ones in order of position, the last part-filled: each
 * query sees what lies at or before it, however many blocks and positions there are. */
static void test_attend_window(void)
{
    static const struct {
        uint32_t n_pos, n_sealed, n_open;
        int ahead; /* how far the window stands before the end of the open blocks */
    } tries[] = {{1, 0, 1, 0},  {1, 9, 0, 0},  {7, 8, 3, 0},   {26, 3, 3, 0},
                 {9, 1, 3, 20}, {4, 17, 0, 0}, {17, 0, 2, 27}, {2, 0, 2, 30}};

    for (size_t i = 0; i < sizeof tries / sizeof tries[0]; i++) {
        struct window window = {.n_pos = tries[i].n_pos, .n = tries[i].n_sealed + tries[i].n_open};
        uint64_t n_open_tokens = 16 * tries[i].n_open - 5;
        for (uint32_t b = 0; b < window.n; b++) {
            bool is_open = b >= tries[i].n_sealed;
            window.n_tokens[b] = is_open && b + 1 == window.n ? 11 : 16;
            window.position[b] = is_open ? 1000 + 16 * (b - tries[i].n_sealed) : UINT64_MAX;
        }
        window.first = 1000 + n_open_tokens - window.n_pos - (uint64_t)tries[i].ahead;
        window_check(&window);
    }
}

/* Joins partials, empty ones too, and divides. */
static void test_merge(void)
{
    enum { N = 5 };
    uint32_t stride = data.shape.v_width + 2;
    size_t partial_bytes = data.n_partial * sizeof(float);
    size_t out_bytes = (size_t)data.n_q * data.shape.v_width * sizeof(float);
    float *partial = case_alloc(N * partial_bytes);
    float *out = case_alloc(out_bytes), lse[WINNOW_GQA_MAX];
    struct guarded acc_a, acc_b, to, to_lse;
    float *a = guarded_init(&acc_a, partial_bytes, 4), *b = guarded_init(&acc_b, partial_bytes, 0);
    float *out_a = guarded_init(&to, out_bytes, 4);
    float *lse_a = guarded_init(&to_lse, data.n_q * sizeof(float), 4);
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    for (uint32_t i = 0; i < N * data.n_q; i++) {
        bool is_empty = winnow_rng_below(&rng, 4) == 0;
        for (uint32_t d = 0; d < stride && !is_empty; d++)
            partial[i * stride + d] =
                (float)(d == 1 ? 1 + winnow_rng_unit(&rng) : 20 * winnow_rng_normal(&rng));
        if (is_empty)
            partial[i * stride] = -INFINITY;
    }
    memset(b, 0, partial_bytes);
    for (uint32_t g = 0; g < data.n_q; g++)
        b[g * stride] = -INFINITY;
    memcpy(a, b, partial_bytes);
    for (uint32_t n = 0; n <= N; n += N) {
        version->merge(&data.shape, n, partial, a);
        ref->merge(&data.shape, n, partial, b);
        for (uint32_t g = 0; g < data.n_q; g++)
            check_partial("merge", a + g * stride, b + g * stride, 0, 1000);
        version->finish(&data.shape, a, out_a, lse_a);
        ref->finish(&data.shape, a, out, lse);
        for (size_t i = 0; i < out_bytes / sizeof(float); i++)
            check_close("out", i, (double)out_a[i], (double)out[i], 1e-6 * fabs((double)out[i]));
        for (uint32_t g = 0; g < data.n_q; g++)
            check_close("lse", g, (double)lse_a[g], (double)lse[g], 1e-6 * fabs((double)lse[g]));
    }
    guarded_finish(&acc_a);
    guarded_finish(&acc_b);
    guarded_finish(&to);
    guarded_finish(&to_lse);
    winnow_alloc_free(partial);
    winnow_alloc_free(out);
}

/* Blocks in layout 2 give the bits that the same blocks give in layout 1, a part-filled one too, and
 * go in and out of every version alike. */
static void test_fragments(void)
{
    enum { N_MAX = WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2), N = 3 };
    static float a[N_MAX], b[N_MAX], k[16 * WINNOW_WIDTH_MAX], v[16 * WINNOW_WIDTH_MAX];
    static const uint32_t n_tokens[N] = {16, 16, 5};
    static const uint64_t position[N] = {UINT64_MAX, 64, 80};
    float a_m[N * WINNOW_GQA_MAX], b_m[N * WINNOW_GQA_MAX];
    struct winnow_model_shape shape = data.shape;
    const void *block[N];

    if (shape.kv_dtype == WINNOW_FP32)
        return;
    uint8_t *copy = case_alloc(N * data.block_bytes);
    shape.block_layout = WINNOW_BLOCK_FRAGMENTS;
    memset(copy, 0xff, N * data.block_bytes);
    for (uint32_t i = 0; i < N; i++) {
        block[i] = copy + i * data.block_bytes;
        ref->block_unpack(&data.shape, data.block[i], k, v);
        version->block_pack(&shape, 0, n_tokens[i], k, v, copy + i * data.block_bytes);
    }
    version->attend_partial(&shape, data.q, N, block, n_tokens, a, a_m);
    version->attend_partial(&data.shape, data.q, N, data.block, n_tokens, b, b_m);
    CHECK(!memcmp(a, b, data.n_partial * sizeof(float)));
    CHECK(!memcmp(a_m, b_m, N * data.n_q * sizeof(float)));

    float *scratch = case_alloc(version->window_scratch_bytes(&shape, 2));
    float *window_a = window_partials(2), *window_b = window_partials(2);
    version->attend_window(&shape, 2, 82, data.q, N, block, position, n_tokens, window_a, scratch);
    version->attend_window(&data.shape, 2, 82, data.q, N, data.block, position, n_tokens, window_b,
                           scratch);
    CHECK(!memcmp(window_a, window_b, 2 * data.n_partial * sizeof(float)));

    static float k_back[16 * WINNOW_WIDTH_MAX], v_back[16 * WINNOW_WIDTH_MAX];
    version->block_unpack(&shape, block[1], k_back, v_back);
    ref->block_unpack(&data.shape, data.block[1], k, v);
    CHECK(!memcmp(k, k_back, sizeof(float) * 16 * shape.k_width));
    CHECK(!memcmp(v, v_back, sizeof(float) * 16 * shape.v_width));
    winnow_alloc_free(copy);
    winnow_alloc_free(scratch);
    winnow_alloc_free(window_a);
    winnow_alloc_free(window_b);
}

static void test_versions__fragments(void)
{
    each(test_fragments);
}

static void test_versions__attend_partial(void)
{
    each(test_attend_partial);
}

static void test_versions__attend_window(void)
{
    each(test_attend_window);
}

static void test_versions__merge(void)
{
    each(test_merge);
}

int main(int argc, char **argv)
{
    versions_init(argc, argv);
    TEST_RUN(test_versions__attend_partial);
    TEST_RUN(test_versions__attend_window);
    TEST_RUN(test_versions__merge);
    TEST_RUN(test_versions__fragments);
    return TEST_END();
}
