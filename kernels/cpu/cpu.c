/* What the CPU can do. Compiled without the instructions that it asks for. */
#include <kernels/cpu/cpu.h>

const struct winnow_kernels *winnow_kernels_avx2(void)
{
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return &winnow_avx2_table;
    return NULL;
}

const struct winnow_kernels *winnow_kernels_avx512(void)
{
    if (winnow_kernels_avx2() && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return &winnow_avx512_table;
    return NULL;
}
