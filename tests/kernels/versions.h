/*
 * What the tests of the kernels' versions share: test_versions_*.c hold every entry of every
 * version against the reference, over every shape of cases.h, random and hostile input. Outputs are
 * poisoned with NaN and stand between guard bytes; inputs are given at two alignments and must give
 * the same bits; bytes of tokens that are not there are NaN, or large.
 *
 * Tolerances. A logit is a sum of k_width products; two orders of adding them differ by a few
 * roundings of s x sum |q_i k_i|. Its exponential takes that difference as relative error; exp and
 * log add 2e-7, sums of a thousand weights in another order up to 2e-5 (SUM_TOLERANCE). So an
 * output, a weighted mean of values, differs by at most
 *     (2 x difference of logits + SUM_TOLERANCE) x largest |v|.
 */
#pragma once

#include <float.h>
#include <kernels/gpu.h>
#include <kernels/ref/ref.h>
#include <test.h>

#include "cases.h"

static const struct winnow_kernels *ref, *version, *cuda; /* cuda: NULL where no GPU is */
static const char *const version_name[] = {"avx2", "avx512", "cuda"};
enum { N_VERSIONS = 3 };
static struct kernel_data data;
static enum kernel_input data_input;

static const double SUM_TOLERANCE = 2e-5;
enum { GUARD_BYTES = 64, N_BLOCKS = 21 };

/* A poisoned output between guard bytes, or an input moved to another alignment. */
struct guarded {
    uint8_t *memory;
    size_t n_bytes, offset;
};

static inline void *guarded_init(struct guarded *guarded, size_t n_bytes, size_t offset)
{
    *guarded = (struct guarded){case_alloc(n_bytes + offset + 2 * GUARD_BYTES), n_bytes, offset};
    memset(guarded->memory, 0xa5, n_bytes + offset + 2 * GUARD_BYTES);
    memset(guarded->memory + GUARD_BYTES + offset, 0xff, n_bytes);
    return guarded->memory + GUARD_BYTES + offset;
}

static inline void *guarded_copy(struct guarded *guarded, const void *from, size_t n_bytes,
                                 size_t offset)
{
    return memcpy(guarded_init(guarded, n_bytes, offset), from, n_bytes);
}

static inline void guarded_finish(struct guarded *guarded)
{
    for (size_t i = 0; i < GUARD_BYTES + guarded->offset; i++)
        CHECK_EQ(guarded->memory[i], 0xa5);
    for (size_t i = 0; i < GUARD_BYTES; i++)
        CHECK_EQ(guarded->memory[GUARD_BYTES + guarded->offset + guarded->n_bytes + i], 0xa5);
    winnow_alloc_free(guarded->memory);
}

/* Says where, then fails, unless |a - b| <= tolerance (FLT_MIN: sums of denormals lose digits), or
 * both are the same infinity. */
static inline void check_close(const char *what, size_t i, double a, double b, double tolerance)
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
static inline double logit_tolerance(const float *q, uint32_t n_tokens)
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

static inline double value_largest(void)
{
    double largest = 0;
    for (size_t i = 0; i < (size_t)16 * data.n_blocks * data.shape.v_width; i++)
        largest = fmax(largest, fabs((double)data.v[i]));
    return largest;
}

/* Two partials of one query head say the same: log-sum-exp and mean value. */
static inline void check_partial(const char *what, const float *a, const float *b, double tolerance,
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

/* NULL: not here. */
static inline const struct winnow_kernels *version_find(int i)
{
    return strcmp(version_name[i], "cuda") ? winnow_kernels_find(version_name[i]) : cuda;
}

/* Runs a check for every version and shape: the first two shapes with every input, the others with
 * random input and one of the hostile, which the seed chooses. WINNOW_TEST_SMALL, for a sanitizer:
 * random input alone, on the GPU alone. */
static inline void each(void (*check)(void))
{
    bool is_small = getenv("WINNOW_TEST_SMALL") != NULL;

    for (size_t c = 0; c < sizeof kernel_cases / sizeof kernel_cases[0]; c++)
        for (data_input = 0; data_input < N_INPUTS; data_input++) {
            if (c >= 2 && data_input != INPUT_RANDOM &&
                data_input != 1 + (test_seed() + c) % (N_INPUTS - 1))
                continue;
            if (is_small && data_input != INPUT_RANDOM)
                continue;
            case_data_init(&data, &kernel_cases[c], data_input, N_BLOCKS, CASE_POSITIONS,
                           test_seed() + c);
            for (int i = 0; i < N_VERSIONS; i++)
                if ((version = version_find(i)) && !(is_small && version != cuda))
                    check();
            case_data_finish(&data);
        }
}

/* The library of WINNOW_TEST_CUDA, or the one beside this program. --require cuda (before the
 * others): it has to be there, with a GPU. */
static inline void versions_init(int argc, char **argv)
{
    const struct winnow_gpu_api *gpu;
    bool is_required = argc > 2 && !strcmp(argv[1], "--require") && !strcmp(argv[2], "cuda");
    char text[256];

    if (is_required)
        argc -= 2, argv += 2;
    TEST_INIT(argc, argv);
    ref = winnow_kernels_ref();
    gpu = winnow_gpu_load(getenv("WINNOW_TEST_CUDA"), text);
    if (gpu && gpu->probe(0, text) == 0)
        cuda = gpu->kernels();
    printf("%s cuda: %s\n", cuda ? "with" : "without", text);
    if (is_required && !cuda)
        test_fail(__FILE__, __LINE__, text);
    if (!winnow_kernels_find("avx2") && !cuda)
        TEST_SKIP("this machine has neither AVX2 nor a GPU");
}
