/*
 * The little that a test needs: checks that print what they saw, a printed seed, a run list.
 *
 *   static void test_ring__full_refuses(void) { CHECK_EQ(winnow_ring_put(...), -EAGAIN); }
 *   int main(int argc, char **argv)
 *   {
 *       TEST_INIT(argc, argv);
 *       TEST_RUN(test_ring__full_refuses);
 *       return TEST_END();
 *   }
 *
 * A failed check prints file, line and both values, and ends the program with 1. TEST_RUN(name)
 * runs all tests, or those whose names contain the first argument. TEST_SKIP(reason) ends the
 * program with 77 and says why. --seed N (or WINNOW_TEST_SEED) brings a failure back: every
 * random choice of a test comes from test_seed(), which is printed on failure.
 *
 * TEST_ROW(F12, n) says that n cases of row F12 of tests/README.md have been run: the program gets
 * the ctest label F12, and tests/rows adds the cases up.
 */
#pragma once

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char *test_filter, *test_name = "(start)";
static uint64_t test_seed_value;
static int test_count;

static inline uint64_t test_seed(void)
{
    return test_seed_value;
}

static inline void test_init(int argc, char **argv)
{
    const char *from_env = getenv("WINNOW_TEST_SEED");
    test_seed_value = from_env ? strtoull(from_env, NULL, 0) : (uint64_t)time(NULL);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seed") && i + 1 < argc)
            test_seed_value = strtoull(argv[++i], NULL, 0);
        else
            test_filter = argv[i];
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
}

__attribute__((noreturn)) static inline void test_fail(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: %s: %s (--seed 0x%" PRIx64 ")\n", file, line, test_name, what,
            test_seed_value);
    exit(1);
}

#define TEST_INIT(argc, argv) test_init(argc, argv)
#define TEST_RUN(fn)                                                                               \
    do {                                                                                           \
        if (!test_filter || strstr(#fn, test_filter)) {                                            \
            test_name = #fn;                                                                       \
            fn();                                                                                  \
            test_count++;                                                                          \
            printf("ok %s\n", #fn);                                                                \
        }                                                                                          \
    } while (0)
#define TEST_END() (test_count ? 0 : (fprintf(stderr, "no test matches '%s'\n", test_filter), 1))
#define TEST_SKIP(reason)                                                                          \
    do {                                                                                           \
        printf("SKIP %s: %s\n", test_name, reason);                                                \
        exit(77);                                                                                  \
    } while (0)

#define TEST_ROW(row, n_cases) printf("row " #row " %llu cases\n", (unsigned long long)(n_cases))

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond))                                                                               \
            test_fail(__FILE__, __LINE__, #cond);                                                  \
    } while (0)
#define CHECK_EQ(a, b)                                                                             \
    do {                                                                                           \
        long long check_a = (long long)(a), check_b = (long long)(b);                              \
        if (check_a != check_b) {                                                                  \
            char check_text[512];                                                                  \
            snprintf(check_text, sizeof check_text, "%s is %lld, expected %s = %lld", #a, check_a, \
                     #b, check_b);                                                                 \
            test_fail(__FILE__, __LINE__, check_text);                                             \
        }                                                                                          \
    } while (0)
#define CHECK_STR(a, b)                                                                            \
    do {                                                                                           \
        const char *check_a = (a), *check_b = (b);                                                 \
        if (strcmp(check_a, check_b)) {                                                            \
            char check_text[1024];                                                                 \
            snprintf(check_text, sizeof check_text, "%s is \"%s\", expected \"%s\"", #a, check_a,  \
                     check_b);                                                                     \
            test_fail(__FILE__, __LINE__, check_text);                                             \
        }                                                                                          \
    } while (0)
#define CHECK_NEAR(a, b, tolerance)                                                                \
    do {                                                                                           \
        double check_a = (a), check_b = (b), check_t = (tolerance);                                \
        if (!(fabs(check_a - check_b) <= check_t)) {                                               \
            char check_text[512];                                                                  \
            snprintf(check_text, sizeof check_text, "%s is %.9g, expected %s = %.9g within %.3g",  \
                     #a, check_a, #b, check_b, check_t);                                           \
            test_fail(__FILE__, __LINE__, check_text);                                             \
        }                                                                                          \
    } while (0)
