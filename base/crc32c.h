/*
 * CRC32C (Castagnoli, reflected, as in iSCSI RFC 3720 B.4), by SSE4.2 where the CPU has it, else
 * by table; both give the same sum. `crc` is the sum so far (0 to begin), so that
 * winnow_crc32c(winnow_crc32c(0, a), b) is the sum of a followed by b. Thread: any.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

uint32_t winnow_crc32c(uint32_t crc, const void *data, size_t n_bytes);
uint32_t winnow_crc32c_table(uint32_t crc, const void *data, size_t n_bytes); /* the definition */
