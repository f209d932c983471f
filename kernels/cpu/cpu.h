/* The versions for x86-64, each NULL where this CPU or build does not run it. Thread: any. */
#pragma once

#include <kernels/kernels.h>

const struct winnow_kernels *winnow_kernels_avx2(void);
const struct winnow_kernels *winnow_kernels_avx512(void);
