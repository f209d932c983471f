/* The kernels with AVX-512 F, BW, VL, DQ and VNNI. */
#define VERSION_TABLE winnow_avx512_table
#define VERSION_NAME  "avx512"
#include <kernels/cpu/version_impl.h>
