/* The text behind winnow_error_text, one a thread. */
#pragma once

#include <client/rpc.h>

/* Sets this thread's text and returns `error` (0 or -errno) again. */
int winnow_error_set(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
int winnow_error_set_status(const struct winnow_status *status);
