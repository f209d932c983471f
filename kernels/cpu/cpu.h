/*
 * SIMD versions of the kernels, behind kernels.h. NULL: this CPU lacks the instructions.
 * Thread: any.
 */
#pragma once

#include <kernels/kernels.h>

/* AVX2, FMA, F16C. */
const struct winnow_kernels *winnow_kernels_avx2(void);
/* AVX-512 F, BW, VL, DQ and VNNI. */
const struct winnow_kernels *winnow_kernels_avx512(void);

/* The tables themselves, in files that may use the instructions. */
extern const struct winnow_kernels winnow_avx2_table, winnow_avx512_table;
