#include "fault.h"

#include <stdarg.h>
#include <stdio.h>

static char text[512] = "no reason given";

int fault_set(int rc, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return rc;
}

const char *fault_text(void)
{
    return text;
}
