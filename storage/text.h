/* The line that goes with a refusal: what, value, limit, hint. */
#pragma once

#include <stdarg.h>
#include <stdio.h>

enum { WINNOW_TEXT_BYTES = 256 };

/* Writes the line and returns rc, so that a refusal is one statement. */
__attribute__((format(printf, 3, 4))) static inline int
winnow_text_refuse(int rc, char text[WINNOW_TEXT_BYTES], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(text, WINNOW_TEXT_BYTES, format, args);
    va_end(args);
    return rc;
}
