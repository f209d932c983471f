#include <base/assert.h>
#include <stdio.h>
#include <stdlib.h>

void winnow_assert_fail(const char *condition, const char *file, int line)
{
    fprintf(stderr, "<2>assertion failed: %s at %s:%d\n", condition, file, line);
    abort();
}
