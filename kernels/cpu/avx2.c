/* The kernels with AVX2, FMA and F16C. */
#define VERSION_TABLE winnow_avx2_table
#define VERSION_NAME  "avx2"
#include <kernels/cpu/version_impl.h>
