#include <assert.h>
#include <client/error.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <winnow/winnow.h>

static _Thread_local char text[512];

static_assert(sizeof text >= WINNOW_STATUS_TEXT_BYTES, "a status is told whole");

const char *winnow_error_text(void)
{
    return text;
}

int winnow_error_set(int error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return error;
}

int winnow_error_set_status(const struct winnow_status *status)
{
    return winnow_error_set(status->error, "%s",
                            status->text[0] ? status->text : strerror(-status->error));
}
