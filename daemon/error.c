#include <base/assert.h>
#include <daemon/error.h>
#include <errno.h>
#include <stddef.h>

static const struct {
    int error;
    enum winnow_code code;
} table[] = {
    {0, WINNOW_CODE_OK},
    {EINVAL, WINNOW_CODE_INVALID_ARGUMENT},
    {EMSGSIZE, WINNOW_CODE_INVALID_ARGUMENT},
    {EDOM, WINNOW_CODE_INVALID_ARGUMENT},
    {ENOENT, WINNOW_CODE_NOT_FOUND},
    {EACCES, WINNOW_CODE_PERMISSION_DENIED},
    {EDQUOT, WINNOW_CODE_RESOURCE_EXHAUSTED},
    {ENOSPC, WINNOW_CODE_RESOURCE_EXHAUSTED},
    {ENOMEM, WINNOW_CODE_RESOURCE_EXHAUSTED},
    {ENODATA, WINNOW_CODE_DATA_LOSS},
    {ERANGE, WINNOW_CODE_ABORTED},
    {EPROTO, WINNOW_CODE_FAILED_PRECONDITION},
    {ESTALE, WINNOW_CODE_FAILED_PRECONDITION},
    {ETIMEDOUT, WINNOW_CODE_DEADLINE_EXCEEDED},
    {EHOSTDOWN, WINNOW_CODE_UNAVAILABLE},
    {ENOTSUP, WINNOW_CODE_UNIMPLEMENTED},
    {ECANCELED, WINNOW_CODE_CANCELLED},
    {EIO, WINNOW_CODE_INTERNAL},
};

enum winnow_code winnow_error_code(int error)
{
    winnow_assert(error <= 0);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].error == -error)
            return table[i].code;
    return WINNOW_CODE_INTERNAL;
}
