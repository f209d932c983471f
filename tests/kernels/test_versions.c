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
enum { GUARD_BYTES = 64, N_BLOCKS = 21 };

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

/* What `from_float` makes of every 16-bit number, and of numbers around what rounds to infinity. */
static void convert_check(uint32_t dtype, size_t n, const void *src)
{
    size_t element_bytes = dtype == WINNOW_FP32 ? 4 : 2;
    struct guarded in, a, b, back_a, back_b;
    void *from = guarded_copy(&in, src, n * element_bytes, element_bytes);
    float *to_a = guarded_init(&a, n * sizeof(float), 4);
    float *to_b = guarded_init(&b, n * sizeof(float), 0);
    void *to_back_a = guarded_init(&back_a, n * element_bytes, element_bytes);
    void *to_back_b = guarded_init(&back_b, n * element_bytes, 0);

    int rc = ref->to_float(dtype, n, from, to_b);
    CHECK_EQ(version->to_float(dtype, n, from, to_a), rc);
    if (rc == 0) {
        CHECK(!memcmp(to_a, to_b, n * sizeof(float)));
        rc = ref->from_float(dtype, n, to_b, to_back_b);
        CHECK_EQ(version->from_float(dtype, n, to_a, to_back_a), rc);
        if (rc == 0)
            CHECK(!memcmp(to_back_a, to_back_b, n * element_bytes));
    }
    guarded_finish(&in);
    guarded_finish(&a);
    guarded_finish(&b);
    guarded_finish(&back_a);
    guarded_finish(&back_b);
}

static void from_float_check(uint32_t dtype, size_t n, const float *src)
{
    struct guarded a, b;
    void *to_a = guarded_init(&a, n * 4, 4), *to_b = guarded_init(&b, n * 4, 0);

    int rc = ref->from_float(dtype, n, src, to_b);
    CHECK_EQ(version->from_float(dtype, n, src, to_a), rc);
    if (rc == 0)
        CHECK(!memcmp(to_a, to_b, n * (dtype == WINNOW_FP32 ? 4 : 2)));
    guarded_finish(&a);
    guarded_finish(&b);
}

/* Conversions have the reference's bits for every number of 16 bits and every count, and refuse
 * NaN, Inf and overflow at every place. */
static void test_convert(void)
{
    enum { N = 70 };
    static const uint32_t dtypes[] = {WINNOW_BF16, WINNOW_FP16, WINNOW_FP32};
    static const float edges[] = {65519.9f,        65520.0f, -65520.0f,      0x1.fefffep127f,
                                  0x1.ffp127f,     FLT_MAX,  INFINITY,       NAN,
                                  0x1p-149f,       -0.0f,    0x1.004p0f,     0x1.00cp0f,
                                  0x1.ffffffp-25f, 0x1p-25f, 0x1.000002p-25f};
    uint16_t half[N];
    float x[N];
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    for (uint32_t first = 0; first < 65536; first += 16) {
        for (uint32_t i = 0; i < 16; i++)
            half[i] = (uint16_t)(first + i);
        convert_check(WINNOW_FP16, 16, half);
        convert_check(WINNOW_BF16, 16, half);
    }
    for (size_t n = 0; n < N; n++)
        for (size_t c = 0; c < 3; c++) {
            for (size_t i = 0; i < n; i++)
                x[i] = (float)(winnow_rng_normal(&rng) * exp2(30 * winnow_rng_unit(&rng) - 20));
            from_float_check(dtypes[c], n, x);
            if (dtypes[c] == WINNOW_FP32)
                convert_check(WINNOW_FP32, n, x);
            for (size_t e = 0; n > 0 && e < sizeof edges / sizeof edges[0]; e++) {
                size_t at = winnow_rng_below(&rng, n);
                float kept = x[at];
                x[at] = edges[e];
                from_float_check(dtypes[c], n, x);
                x[at] = kept;
            }
        }
}

/* Packing any run of tokens has the reference's bytes, keeps the others, and saturates; unpacking
 * gives them back. */
static void test_block_pack(void)
{
    size_t k_bytes = (size_t)16 * data.shape.k_width * sizeof(float);
    size_t v_bytes = (size_t)16 * data.shape.v_width * sizeof(float);
    float *k = case_alloc(k_bytes), *v = case_alloc(v_bytes);
    struct guarded a, b, k_a, k_b, v_a, v_b;
    uint8_t *block_a = guarded_init(&a, data.block_bytes, 0);
    uint8_t *block_b = guarded_init(&b, data.block_bytes, 0);

    memset(block_a, 0x11, data.block_bytes);
    memset(block_b, 0x11, data.block_bytes);
    for (size_t i = 0; i < k_bytes / sizeof *k; i++)
        k[i] = data.k[i] * (i % 7 == 0 ? 1e38f / (1 + fabsf(data.k[i])) : 1.0f);
    for (size_t i = 0; i < v_bytes / sizeof *v; i++)
        v[i] = data.v[i] * 1.001f;
    for (uint32_t first = 0; first < 16; first += 3)
        for (uint32_t n = 0; first + n <= 16; n += 1 + first) {
            version->block_pack(&data.shape, first, n, k, v, block_a);
            ref->block_pack(&data.shape, first, n, k, v, block_b);
            CHECK(!memcmp(block_a, block_b, data.block_bytes));
        }
    float *to_k_a = guarded_init(&k_a, k_bytes, 4), *to_v_a = guarded_init(&v_a, v_bytes, 4);
    float *to_k_b = guarded_init(&k_b, k_bytes, 0), *to_v_b = guarded_init(&v_b, v_bytes, 0);
    version->block_unpack(&data.shape, block_a, to_k_a, to_v_a);
    ref->block_unpack(&data.shape, block_b, to_k_b, to_v_b);
    CHECK(!memcmp(to_k_a, to_k_b, k_bytes));
    CHECK(!memcmp(to_v_a, to_v_b, v_bytes));
    guarded_finish(&a);
    guarded_finish(&b);
    guarded_finish(&k_a);
    guarded_finish(&k_b);
    guarded_finish(&v_a);
    guarded_finish(&v_b);
    winnow_alloc_free(k);
    winnow_alloc_free(v);
}

/* Sum over blocks of the squared distance of keys to their mean. */
static double order_variance(uint32_t n_blocks, const uint16_t *order)
{
    uint32_t width = data.shape.k_width;
    double total = 0;

    for (uint32_t b = 0; b < n_blocks; b++)
        for (uint32_t d = 0; d < width; d++) {
            double sum = 0, square = 0;
            for (uint32_t t = 0; t < 16; t++) {
                double x = (double)data.k[(size_t)order[16 * b + t] * width + d];
                sum += x;
                square += x * x;
            }
            total += fmax(square - sum * sum / 16, 0);
        }
    return total;
}

static void order_check(uint32_t n_blocks, const uint16_t *order)
{
    uint8_t seen[16 * N_BLOCKS] = {0};

    for (uint32_t i = 0; i < 16 * n_blocks; i++) {
        CHECK(order[i] < 16 * n_blocks && !seen[order[i]]);
        seen[order[i]] = 1;
        CHECK(i % 16 == 0 || order[i - 1] < order[i]);
    }
}

static int code_at(const uint8_t *code, uint32_t b, uint32_t t, uint32_t d)
{
    uint8_t pair = code[(size_t)b * 8 * data.shape.k_width + (d / 8 * 16 + t) * 4 + d % 4];
    return (d % 8 < 4 ? pair & 15 : pair >> 4) - 8;
}

/* A stored number differs by what one step of its neighbour allows: codes and int8 by one. */
static void index_check(const struct winnow_index_view *a, const struct winnow_index_view *b)
{
    uint32_t width = data.shape.k_width, v_width = data.shape.v_width;
    double k_largest = 0, v_largest = value_largest();

    for (size_t i = 0; i < (size_t)16 * b->n_blocks * width; i++)
        k_largest = fmax(k_largest, fabs((double)data.k[i]));
    for (uint32_t i = 0; i < b->n_blocks; i++) {
        const struct winnow_block_head *x = a->head + i, *y = b->head + i;
        check_close("centroid_scale", i, (double)x->centroid_scale, (double)y->centroid_scale,
                    1e-6 * k_largest);
        check_close("vmean_scale", i, (double)x->vmean_scale, (double)y->vmean_scale,
                    1e-6 * v_largest);
        check_close("spread", i, (double)x->spread, (double)y->spread,
                    1e-5 * (double)y->spread + 1e-12 * k_largest * k_largest);
    }
    for (size_t i = 0; i < (size_t)b->n_blocks * width; i++) {
        CHECK(abs(a->centroid[i] - b->centroid[i]) <= 1);
        float x = winnow_ref_fp16_to_float(a->var[i]), y = winnow_ref_fp16_to_float(b->var[i]);
        check_close("var", i, (double)x, (double)y,
                    2e-3 * (double)y + 1e-12 * k_largest * k_largest + 0x1p-24);
    }
    for (size_t i = 0; i < (size_t)b->n_blocks * v_width; i++)
        CHECK(abs(a->vmean[i] - b->vmean[i]) <= 1);
    for (uint32_t d = 0; d < width; d++)
        check_close("mean_k", d, (double)a->mean_k[d], (double)b->mean_k[d], 2e-6 * k_largest);
    for (uint32_t d = 0; d < v_width; d++)
        check_close("mean_v", d, (double)a->mean_v[d], (double)b->mean_v[d], 2e-6 * v_largest);
    CHECK(*a->v_max >= *b->v_max * (1 - 1e-6f));
    check_close("v_max", 0, (double)*a->v_max, (double)*b->v_max,
                2e-5 * (double)*b->v_max + 16 * (double)FLT_MIN);
}

/* Keys, as centroid and code say them, within half a step of the code, and the rounding of all;
 * none farther from the centroid than radius. */
static void codes_check(uint32_t n_blocks, const uint16_t *order,
                        const struct winnow_index_view *view)
{
    uint32_t width = data.shape.k_width;

    for (uint32_t b = 0; b < n_blocks; b++) {
        double radius = 0;
        for (uint32_t t = 0; t < 16; t++) {
            double square = 0, a = (double)winnow_ref_fp16_to_float(view->code_scale[16 * b + t]);
            for (uint32_t d = 0; d < width; d++) {
                double mu = (double)view->centroid[(size_t)b * width + d] *
                            (double)view->head[b].centroid_scale;
                double k = (double)data.k[(size_t)order[16 * b + t] * width + d];
                int c = code_at(view->code, b, t, d);
                square += (k - mu) * (k - mu);
                CHECK(c >= -7 && c <= 7);
                if (isfinite(a))
                    check_close("code", d, mu + a * c, k,
                                0.51 * a + 1e-6 * fabs(mu) + 7 * 0x1p-24 /* a is fp16 */);
            }
            radius = fmax(radius, sqrt(square));
        }
        CHECK((double)view->head[b].radius >= radius * (1 - 1e-7));
        check_close("radius", b, (double)view->head[b].radius, radius,
                    2e-5 * radius + 16 * (double)FLT_MIN);
    }
}

static void build_check(uint32_t n_blocks)
{
    struct winnow_index_view a, b;
    uint16_t order[16 * N_BLOCKS], again[16 * N_BLOCKS], of_ref[16 * N_BLOCKS];
    size_t k_bytes = (size_t)16 * n_blocks * data.shape.k_width * sizeof(float);
    size_t v_bytes = (size_t)16 * n_blocks * data.shape.v_width * sizeof(float);
    struct guarded scratch, k, v;
    void *at = guarded_init(&scratch, version->scratch_bytes(&data.shape, n_blocks), 0);
    float *moved_k = guarded_copy(&k, data.k, k_bytes, 4);
    float *moved_v = guarded_copy(&v, data.v, v_bytes, 4);

    case_view_init(&a, &data.shape, n_blocks);
    case_view_init(&b, &data.shape, n_blocks);
    CHECK_EQ(ref->build(&data.shape, n_blocks, data.k, data.v, of_ref, &b, data.scratch), 0);
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &a, at), 0);
    CHECK_EQ(version->build(&data.shape, n_blocks, data.k, data.v, order, &a, at), 0);
    CHECK(!memcmp(order, again, 32 * (size_t)n_blocks));
    order_check(n_blocks, order);
    CHECK(order_variance(n_blocks, order) <= 1.01 * order_variance(n_blocks, of_ref) + 1e-30);
    if (data_input == INPUT_EQUAL || data_input == INPUT_STEPS)
        CHECK(!memcmp(order, of_ref, 32 * (size_t)n_blocks));
    winnow_ref_index_fill(&data.shape, n_blocks, data.k, data.v, order, &b);
    index_check(&a, &b);
    codes_check(n_blocks, order, &a);

    moved_v[n_blocks] = NAN;
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &a, at), -EDOM);
    moved_v[n_blocks] = 0;
    moved_k[k_bytes / sizeof(float) - 1] = -INFINITY;
    CHECK_EQ(version->build(&data.shape, n_blocks, moved_k, moved_v, again, &a, at), -EDOM);
    case_view_finish(&a);
    case_view_finish(&b);
    guarded_finish(&scratch);
    guarded_finish(&k);
    guarded_finish(&v);
}

/* Blocks are as tight as the reference's, hold each token once, in order of position, and the
 * index says of them what the reference would. */
static void test_build(void)
{
    build_check(1);
    build_check(2);
    build_check(13);
    build_check(N_BLOCKS);
}

/* A selection and its arrays, outputs poisoned. */
struct selected {
    struct winnow_selection sel;
    struct guarded key, idx, selected, scratch;
    void *at;
};

static void selected_init(struct selected *s, const struct winnow_kernels *kernels, uint32_t n,
                          uint32_t n_max, const float *ln_z, float *ln_e, const float *ln_m)
{
    s->sel = (struct winnow_selection){
        .n_q = data.n_q,
        .n_blocks = n,
        .n_blocks_max = n_max,
        .mass = 0.9f,
        .ln_z = ln_z,
        .ln_m = ln_m,
        .ln_e = ln_e,
        .ln_key = guarded_init(&s->key, n * sizeof(float), 4),
        .block_idx = guarded_init(&s->idx, n * sizeof(uint32_t), 4),
        .selected = guarded_init(&s->selected, n, 1),
    };
    s->at = guarded_init(&s->scratch, kernels->scratch_bytes(&data.shape, n), 0);
}

static void selected_finish(struct selected *s)
{
    guarded_finish(&s->key);
    guarded_finish(&s->idx);
    guarded_finish(&s->selected);
    guarded_finish(&s->scratch);
}

/* Keys alike; a list in order of its own keys, ties by number, that holds each block once. */
static void selected_check(const struct winnow_selection *a, const struct winnow_selection *b)
{
    uint8_t seen[N_BLOCKS] = {0};
    double largest = 0; /* T_g is as exact as its logarithm can be */

    for (uint32_t i = 0; i < a->n_blocks * a->n_q; i++)
        if (isfinite(a->ln_e[i]))
            largest = fmax(largest, fabs((double)a->ln_e[i]));
    for (uint32_t g = 0; g < a->n_q; g++)
        if (isfinite(a->ln_z[g]))
            largest = fmax(largest, fabs((double)a->ln_z[g]));
    for (uint32_t i = 0; i < a->n_blocks; i++) {
        uint32_t at = a->block_idx[i], before = i ? a->block_idx[i - 1] : 0;
        CHECK(at < a->n_blocks && !seen[at]);
        seen[at] = 1;
        CHECK(i == 0 || a->ln_key[before] > a->ln_key[at] ||
              (a->ln_key[before] == a->ln_key[at] && before < at));
        if (a->ln_key[i] > -80 || b->ln_key[i] > -80) /* below, each may have none */
            check_close("ln_key", i, (double)a->ln_key[i], (double)b->ln_key[i],
                        2e-6 + 4e-7 * largest);
    }
}

/* The first n of the list hold the mass, and one less would not (1e-5: rounding of e). */
static void prefix_check(const struct winnow_selection *sel, uint32_t n, double mass)
{
    for (int shorter = 0; shorter < 2; shorter++) {
        bool all_reach = true, has_unknown = false;
        for (uint32_t g = 0; g < sel->n_q; g++) {
            double sum = exp((double)sel->ln_z[g]), total = sum;
            for (uint32_t i = 0; i < sel->n_blocks; i++) {
                double ln_e = (double)sel->ln_e[(size_t)sel->block_idx[i] * sel->n_q + g];
                bool known = ln_e < INFINITY;
                has_unknown |= !known && i >= n - (uint32_t)shorter;
                total += known ? exp(ln_e) : 0;
                sum += known && i < n - (uint32_t)shorter ? exp(ln_e) : 0;
            }
            all_reach &= sum >= (mass + (shorter ? 1e-5 : -1e-5)) * total;
        }
        CHECK_EQ(shorter ? !all_reach || has_unknown || n == 0 : all_reach && !has_unknown, true);
        if (n == 0)
            break;
    }
}

static void select_check(uint32_t n, uint32_t n_max, const float *ln_z, float *ln_e,
                         const float *ln_m, bool is_plain)
{
    struct selected a, b;
    float rho_a[WINNOW_GQA_MAX], rho_b[WINNOW_GQA_MAX];
    float mass_a[WINNOW_GQA_MAX], mass_b[WINNOW_GQA_MAX];

    selected_init(&a, version, n, n_max, ln_z, ln_e, ln_m);
    selected_init(&b, ref, n, n_max, ln_z, ln_e, ln_m);
    version->select(WINNOW_POLICY_CODES, &a.sel, a.at);
    ref->select(WINNOW_POLICY_CODES, &b.sel, b.at);
    selected_check(&a.sel, &b.sel);
    CHECK(abs((int)a.sel.n_selected - (int)b.sel.n_selected) <= 1);
    if (is_plain) {
        prefix_check(&a.sel, a.sel.n_selected, 0.9);
        prefix_check(&a.sel, a.sel.n_selected + a.sel.n_reserve, 0.95);
    }
    for (uint32_t i = 0; i < n; i++)
        CHECK_EQ(a.sel.selected[a.sel.block_idx[i]], i < a.sel.n_selected);

    /* From here on both go from the same first round. */
    memcpy(a.sel.block_idx, b.sel.block_idx, n * sizeof *b.sel.block_idx);
    memcpy(a.sel.selected, b.sel.selected, n);
    a.sel.n_selected = b.sel.n_selected;
    a.sel.n_reserve = b.sel.n_reserve;
    for (int may_add = 1; may_add >= 0; may_add--) {
        uint32_t n_a = version->select_more(&a.sel, rho_a, mass_a, may_add, a.at);
        uint32_t n_b = ref->select_more(&b.sel, rho_b, mass_b, may_add, b.at);
        CHECK(abs((int)n_a - (int)n_b) <= 1);
        for (uint32_t g = 0; g < data.n_q; g++) {
            check_close("rho", g, (double)rho_a[g], (double)rho_b[g], 1e-4);
            if (n_a == n_b)
                check_close("mass", g, (double)mass_a[g], (double)mass_b[g], 2e-5);
        }
        if (n_a == n_b) {
            CHECK_EQ(a.sel.n_reserve, b.sel.n_reserve);
            CHECK(!memcmp(a.sel.selected, b.sel.selected, n));
        }
    }
    selected_finish(&a);
    selected_finish(&b);
}

/* Selects, certifies and adds as the reference does, with sinks and without, with estimates that
 * are equal, unknown or none, and with a budget that leaves unknown ones out. */
static void test_select(void)
{
    float ln_z[WINNOW_GQA_MAX], *ln_e, *ln_m;
    size_t n = (size_t)N_BLOCKS * data.n_q;
    struct guarded e, m;
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    ln_e = guarded_init(&e, n * sizeof(float), 4);
    ln_m = guarded_init(&m, n * sizeof(float), 4);
    for (int kind = 0; kind < 7; kind++)
        for (uint32_t n_blocks = kind == 0 ? 0 : 1; n_blocks <= N_BLOCKS; n_blocks += 12) {
            float spread = data_input == INPUT_HUGE   ? 1000.0f
                           : data_input == INPUT_TINY ? 1e-6f
                                                      : 3;
            for (size_t i = 0; i < n; i++) {
                ln_e[i] = spread * (float)winnow_rng_normal(&rng);
                ln_m[i] = ln_e[i] + 0.3f * (float)winnow_rng_normal(&rng);
            }
            for (uint32_t g = 0; g < data.n_q; g++)
                ln_z[g] = kind == 1 ? -INFINITY : kind == 2 ? 60.0f : 1.0f;
            for (size_t i = 0; kind == 3 && i < n; i++)
                ln_e[i] = ln_m[i] = 0.5f;
            for (size_t i = 0; kind == 4 && i < n; i += 5)
                ln_e[i] = i % 2 ? NAN : INFINITY;
            for (size_t i = 0; kind == 6 && i < n; i += 2)
                ln_e[i] = NAN;
            for (size_t i = 0; kind == 5 && i < n; i++)
                ln_e[i] = ln_m[i] = -INFINITY;
            select_check(n_blocks, kind == 6 ? 3 : n_blocks, ln_z, ln_e, ln_m,
                         kind < 4 && spread < 10);
        }
    guarded_finish(&e);
    guarded_finish(&m);
}

/* Adds unread blocks to a partial, near and far ones, from any block on, as the reference does. */
static void test_compensate(void)
{
    enum { BEFORE = 5 };
    uint32_t n = N_BLOCKS + BEFORE;
    size_t partial_bytes = data.n_partial * sizeof(float);
    float ln_z[WINNOW_GQA_MAX] = {0}, *ln_e = case_alloc(n * data.n_q * sizeof(float));
    struct winnow_selection sel;
    struct winnow_rng rng;
    double v_largest = value_largest();

    winnow_rng_init(&rng, test_seed());
    for (int kind = 0; kind < 4; kind++) {
        struct guarded a, b;
        float *to_a = guarded_init(&a, partial_bytes, 4),
              *to_b = guarded_init(&b, partial_bytes, 0);
        for (uint32_t i = 0; i < n * data.n_q; i++)
            ln_e[i] = kind == 3 ? -INFINITY : 5 * (float)winnow_rng_normal(&rng);
        for (uint32_t i = 0; kind == 2 && i < n * data.n_q; i += 7)
            ln_e[i] = NAN;
        for (uint32_t i = 0; i < data.n_partial; i++)
            to_b[i] = i % (data.shape.v_width + 2) == 1 ? 2.0f : 0.25f;
        for (uint32_t g = 0; g < data.n_q && kind == 1; g++) {
            memset(to_b + g * (data.shape.v_width + 2), 0, partial_bytes / data.n_q);
            to_b[g * (data.shape.v_width + 2)] = -INFINITY;
        }
        memcpy(to_a, to_b, partial_bytes);
        struct selected s;
        selected_init(&s, ref, n, n, ln_z, ln_e, ln_e);
        ref->select(WINNOW_POLICY_CODES, &s.sel, s.at);
        sel = s.sel;
        version->compensate(&data.shape, &data.view, &sel, BEFORE, to_a);
        ref->compensate(&data.shape, &data.view, &sel, BEFORE, to_b);
        for (uint32_t g = 0; g < data.n_q; g++)
            check_partial("compensate", to_a + g * (data.shape.v_width + 2),
                          to_b + g * (data.shape.v_width + 2), 0, fmax(v_largest, 0.25));
        selected_finish(&s);
        guarded_finish(&a);
        guarded_finish(&b);
    }
    winnow_alloc_free(ln_e);
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

/* Runs a check for every version and shape: the first two shapes with every input, the others with
 * random input and one of the hostile, which the seed chooses. */
static void each(void (*check)(void))
{
    static const char *const name[] = {"avx2", "avx512"};

    for (size_t c = 0; c < sizeof kernel_cases / sizeof kernel_cases[0]; c++)
        for (data_input = 0; data_input < N_INPUTS; data_input++) {
            if (c >= 2 && data_input != INPUT_RANDOM &&
                data_input != 1 + (test_seed() + c) % (N_INPUTS - 1))
                continue;
            case_data_init(&data, &kernel_cases[c], data_input, N_BLOCKS, CASE_POSITIONS,
                           test_seed() + c);
            for (int i = 0; i < 2; i++)
                if ((version = winnow_kernels_find(name[i])))
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

static void test_versions__convert(void)
{
    for (int i = 0; i < 2; i++)
        if ((version = winnow_kernels_find(i ? "avx512" : "avx2")))
            test_convert();
}

static void test_versions__block_pack(void)
{
    each(test_block_pack);
}

static void test_versions__build(void)
{
    each(test_build);
}

static void test_versions__select(void)
{
    each(test_select);
}

static void test_versions__compensate(void)
{
    each(test_compensate);
}

static void test_versions__merge(void)
{
    each(test_merge);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    ref = winnow_kernels_ref();
    if (!winnow_kernels_find("avx2"))
        TEST_SKIP("this CPU has no AVX2");
    TEST_RUN(test_versions__convert);
    TEST_RUN(test_versions__block_pack);
    TEST_RUN(test_versions__build);
    TEST_RUN(test_versions__attend_partial);
    TEST_RUN(test_versions__attend_window);
    TEST_RUN(test_versions__score);
    TEST_RUN(test_versions__select);
    TEST_RUN(test_versions__compensate);
    TEST_RUN(test_versions__merge);
    return TEST_END();
}
