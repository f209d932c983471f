/*
 * Assertions for our own mistakes, on in release too. What comes from disk, wire, config or GPU
 * is checked and refused with an errno, never asserted.
 */
#pragma once

#include <stdbool.h>

/* Prints the condition and its place to stderr, then aborts. Never returns. */
_Noreturn void winnow_assert_fail(const char *condition, const char *file, int line);

#define winnow_assert(condition)                                                                   \
    (__builtin_expect(!!(condition), 1) ? (void)0                                                  \
                                        : winnow_assert_fail(#condition, __FILE__, __LINE__))
