/*
 * Every version of the kernels against the reference: every entry, every shape of cases.h, random
 * and hostile input. Outputs are poisoned with NaN and stand between guard bytes; inputs are given
 * at two alignments and must give the same bits; bytes of tokens that are not there are NaN.
 *
 * Tolerances. A logit is a sum of k_width products; two orders of adding them differ by a few
 * roundings of s x sum |q_i k_i|. Its exponential takes that difference as relative error; exp and
 * log add 2e-7, sums of a thousand weights in another order up to 2e-5 (SUM_TOLERANCE). So an
 * output, a weighted mean of values, differs by at most
 *     (2 x difference of logits + SUM_TOLERANCE) x largest |v|.
 */
#include <errno.h>
#include <float.h>
#include <kernels/ref/ref.h>
#include <test.h>

#include "cases.h"

static const struct winnow_kernels *ref, *version;
static struct kernel_data data;
static enum kernel_input data_input;

static const double SUM_TOLERANCE = 2e-5;
enum { GUARD_BYTES = 64, N_BLOCKS = 37 };

/* A poisoned output between guard bytes, or an input moved to another alignment. */
struct guarded {
    uint8_t *memory;
    size_t n_bytes, offset;
};

static void *guarded_init(struct guarded *guarded, size_t n_bytes, size_t offset)
{
    *guarded = (struct guarded){case_alloc(n_bytes + offset + 2 * GUARD_BYTES), n_bytes, offset};
    memset(guarded->memory, 0xa5, n_bytes + offset + 2 * GUARD_BYTES);
    memset(guarded->memory + GUARD_BYTES + offset, 0xff, n_bytes);
    return guarded->memory + GUARD_BYTES + offset;
}

static void *guarded_copy(struct guarded *guarded, const void *from, size_t n_bytes, size_t offset)
{
    return memcpy(guarded_init(guarded, n_bytes, offset), from, n_bytes);
}

static void guarded_finish(struct guarded *guarded)
{
    for (size_t i = 0; i < GUARD_BYTES + guarded->offset; i++)
        CHECK_EQ(guarded->memory[i], 0xa5);
    for (size_t i = 0; i < GUARD_BYTES; i++)
        CHECK_EQ(guarded->memory[GUARD_BYTES + guarded->offset + guarded->n_bytes + i], 0xa5);
    winnow_alloc_free(guarded->memory);
}

/* Says where, then fails, unless |a - b| <= tolerance (FLT_MIN: sums of denormals lose digits), or
 * both are the same infinity. */
static void check_close(const char *what, size_t i, double a, double b, double tolerance)
{
    char text[256];

    if (a == b || fabs(a - b) <= tolerance + (double)FLT_MIN)
        return;
    snprintf(text, sizeof text, "%s, width %u, G %u, %s: %s[%zu] is %.9g, ref has %.9g (+-%.3g)",
             version->name, data.shape.k_width, data.n_q, kernel_input_name[data_input], what, i, a,
             b, tolerance);
    test_fail(__FILE__, __LINE__, text);
}

/* How far apart two correct fp32 logits of a query head may lie: anywhere once sums overflow. */
static double logit_tolerance(const float *q, uint32_t n_tokens)
{
    uint32_t width = data.shape.k_width;
    double largest = 0;

    for (uint32_t t = 0; t < n_tokens; t++) {
        double sum = 0;
        for (uint32_t d = 0; d < width; d++)
            sum += fabs((double)q[d] * (double)data.k[(size_t)t * width + d]);
        largest = fmax(largest, sum);
    }
    if (largest > (double)FLT_MAX)
        return INFINITY;
    return 16 * 0x1p-24 * (double)data.shape.softmax_scale * largest;
}

static double value_largest(void)
{
    double largest = 0;
    for (size_t i = 0; i < (size_t)16 * data.n_blocks * data.shape.v_width; i++)
        largest = fmax(largest, fabs((double)data.v[i]));
    return largest;
}

/* Two partials of one query head say the same: log-sum-exp and mean value. */
static void check_partial(const char *what, const float *a, const float *b, double tolerance,
                          double v_largest)
{
    uint32_t v_width = data.shape.v_width;

    CHECK(!isnan(a[0]) && !isnan(a[1]));
    if (b[1] == 0) {
        CHECK_EQ(a[1] == 0, 1);
        for (uint32_t d = 0; d < v_width; d++)
            CHECK_EQ(a[2 + d] == 0, 1);
        return;
    }
    check_close(what, 0, (double)a[0], (double)b[0], tolerance);
    check_close(what, 1, (double)a[0] + log((double)a[1]), (double)b[0] + log((double)b[1]),
                tolerance + SUM_TOLERANCE + 1e-7 * fabs((double)b[0]));
    for (uint32_t d = 0; d < v_width; d++)
        check_close(what, 2 + d, (double)a[2 + d] / (double)a[1], (double)b[2 + d] / (double)b[1],
                    (2 * fmin(tolerance, 1) + SUM_TOLERANCE) * v_largest);
}

/* Blocks with NaN where tokens beyond n_tokens lie, at an alignment of their own. */
static uint8_t *blocks_poisoned(uint32_t n, const uint32_t *n_tokens, size_t offset,
                                const void **block)
{
    size_t element_bytes = data.shape.kv_dtype == WINNOW_FP32 ? 4 : 2, k_width = data.shape.k_width;
    uint8_t *copy = case_alloc(n * data.block_bytes + offset);

    memcpy(copy + offset, data.blocks, n * data.block_bytes);
    for (uint32_t b = 0; b < n; b++) {
        uint8_t *at = copy + offset + b * data.block_bytes;
        size_t v_row_bytes = data.shape.v_width * element_bytes;
        for (uint32_t t = n_tokens[b]; t < 16; t++) {
            for (uint32_t d = 0; d < k_width; d++)
                memset(at + (16 * d + t) * element_bytes, 0xff, element_bytes);
            memset(at + 16 * k_width * element_bytes + t * v_row_bytes, 0xff, v_row_bytes);
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
    struct guarded q, out, out_m;
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
    } tries[] = {{1, 0, 1, 0},   {1, 9, 0, 0},   {7, 8, 3, 0},   {40, 3, 3, 0},
                 {13, 1, 4, 20}, {40, 16, 0, 0}, {24, 0, 3, 40}, {2, 0, 2, 30}};

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

static void score_run(const struct winnow_kernels *kernels, uint32_t policy, bool with_var,
                      uint32_t n_blocks, size_t offset, float *ln_e)
{
    struct winnow_index_view view = data.view;
    size_t e_bytes = (size_t)n_blocks * data.n_q * sizeof(float);
    size_t k_width = data.shape.k_width, q_bytes = data.n_q * k_width * sizeof(float);
    struct guarded q, out, centroid, code, scale, var, scratch;

    view.n_blocks = n_blocks;
    view.centroid = guarded_copy(&centroid, view.centroid, n_blocks * k_width, offset);
    view.code = guarded_copy(&code, view.code, n_blocks * k_width * 8, offset);
    view.code_scale = guarded_copy(&scale, view.code_scale, n_blocks * 32, offset);
    view.var = guarded_copy(&var, view.var, n_blocks * k_width * 2, offset);
    if (!with_var)
        view.var = NULL;
    float *at = guarded_init(&out, e_bytes, offset);
    kernels->score(&data.shape, policy, &view, guarded_copy(&q, data.q, q_bytes, offset), at,
                   guarded_init(&scratch, kernels->scratch_bytes(&data.shape, n_blocks), 0));
    memcpy(ln_e, at, e_bytes);
    guarded_finish(&q);
    guarded_finish(&out);
    guarded_finish(&centroid);
    guarded_finish(&code);
    guarded_finish(&scale);
    guarded_finish(&var);
    guarded_finish(&scratch);
}

static void score_check(uint32_t policy, bool with_var, uint32_t n_blocks)
{
    float a[N_BLOCKS * WINNOW_GQA_MAX], moved[N_BLOCKS * WINNOW_GQA_MAX];
    float b[N_BLOCKS * WINNOW_GQA_MAX];

    score_run(version, policy, with_var, n_blocks, 0, a);
    score_run(version, policy, with_var, n_blocks, 4, moved);
    score_run(ref, policy, with_var, n_blocks, 0, b);
    CHECK(!memcmp(a, moved, n_blocks * data.n_q * sizeof(float)));
    for (uint32_t i = 0; i < n_blocks * data.n_q; i++) {
        double tolerance = logit_tolerance(data.q + (size_t)(i % data.n_q) * data.shape.k_width,
                                           16 * data.n_blocks);
        if (isinf(tolerance))
            continue;
        CHECK_EQ(winnow_ref_is_known(a[i]), winnow_ref_is_known(b[i]));
        if (winnow_ref_is_known(b[i]))
            check_close("ln_e", i, (double)a[i], (double)b[i],
                        tolerance + SUM_TOLERANCE + 2e-7 * fabs((double)b[i]));
    }
}

/* Estimates of all policies, for any number of blocks, with and without variances. */
static void test_score(void)
{
    static const uint32_t n_blocks[] = {1, 15, 16, 17, N_BLOCKS};

    for (size_t i = 0; i < sizeof n_blocks / sizeof n_blocks[0]; i++) {
        score_check(WINNOW_POLICY_CODES, false, n_blocks[i]);
        score_check(WINNOW_POLICY_MOMENT, true, n_blocks[i]);
        score_check(WINNOW_POLICY_MOMENT, false, n_blocks[i]);
        score_check(WINNOW_POLICY_TACTIC, false, n_blocks[i]);
    }
}

/* Runs a check for every version, shape and input. */
static void each(void (*check)(void))
{
    static const char *const name[] = {"avx2", "avx512"};

    for (int i = 0; i < 2; i++)
        for (size_t c = 0; c < sizeof kernel_cases / sizeof kernel_cases[0]; c++)
            for (data_input = 0; data_input < N_INPUTS; data_input++) {
                version = winnow_kernels_find(name[i]);
                if (!version)
                    continue;
                case_data_init(&data, &kernel_cases[c], data_input, N_BLOCKS, CASE_POSITIONS,
                               test_seed() + c);
                check();
                case_data_finish(&data);
            }
}

static void test_versions__attend_partial(void)
{
    each(test_attend_partial);
}

static void test_versions__attend_window(void)
{
    each(test_attend_window);
}

static void test_versions__score(void)
{
    each(test_score);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    ref = winnow_kernels_ref();
    if (!winnow_kernels_find("avx2"))
        TEST_SKIP("this CPU has no AVX2");
    TEST_RUN(test_versions__attend_partial);
    TEST_RUN(test_versions__attend_window);
    TEST_RUN(test_versions__score);
    return TEST_END();
}
