/* Which of the x86-64 versions this CPU runs. */
#include <kernels/cpu/cpu.h>

const struct winnow_kernels *winnow_kernels_avx2(void)
{
    return NULL;
}

const struct winnow_kernels *winnow_kernels_avx512(void)
{
    return NULL;
}
