// CRC32C by hardware: three independent streams hide the instruction's latency of 3 cycles; their
// sums are joined by advancing one over the other's length with tables (a CRC is linear: appending
// zeros is a matrix, here applied byte by byte). One stream alone reaches a third of the rate.
#include <assert.h>
#include <base/assert.h>
#include <base/crc32c.h>
#include <nmmintrin.h>
#include <pthread.h>
#include <string.h>

enum { STREAM_BYTES = 1024 }; /* of each of the three */
static_assert(STREAM_BYTES % sizeof(uint64_t) == 0, "a stream is whole words");

static uint32_t byte_table[256];
static uint32_t advance_table[4][256]; /* a sum, followed by STREAM_BYTES zeros */
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static uint32_t advance_by_zeros(uint32_t crc, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++)
        crc = (crc >> 8) ^ byte_table[crc & 0xff];
    return crc;
}

static void tables_fill(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? UINT32_C(0x82f63b78) : 0);
        byte_table[i] = crc;
    }
    for (int k = 0; k < 4; k++)
        for (uint32_t i = 0; i < 256; i++)
            advance_table[k][i] = advance_by_zeros(i << (8 * k), STREAM_BYTES);
}

uint32_t winnow_crc32c_table(uint32_t crc, const void *data, size_t n_bytes)
{
    winnow_assert(data || n_bytes == 0);
    pthread_once(&tables_once, tables_fill);
    const uint8_t *byte = data;
    crc = ~crc;
    for (size_t i = 0; i < n_bytes; i++)
        crc = (crc >> 8) ^ byte_table[(crc ^ byte[i]) & 0xff];
    return ~crc;
}

static uint32_t advance_stream(uint64_t crc)
{
    return advance_table[0][crc & 0xff] ^ advance_table[1][(crc >> 8) & 0xff] ^
           advance_table[2][(crc >> 16) & 0xff] ^ advance_table[3][(crc >> 24) & 0xff];
}

static uint64_t word_at(const uint8_t *byte)
{
    uint64_t word;
    memcpy(&word, byte, sizeof word);
    return word;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t crc, const uint8_t *byte,
                                                               size_t n_bytes)
{
    uint64_t a = ~crc;
    for (; n_bytes >= 3 * STREAM_BYTES; n_bytes -= 3 * STREAM_BYTES, byte += 3 * STREAM_BYTES) {
        uint64_t b = 0, c = 0;
        for (int i = 0; i < STREAM_BYTES; i += 8) {
            a = _mm_crc32_u64(a, word_at(byte + i));
            b = _mm_crc32_u64(b, word_at(byte + STREAM_BYTES + i));
            c = _mm_crc32_u64(c, word_at(byte + 2 * STREAM_BYTES + i));
        }
        a = advance_stream(a) ^ b;
        a = advance_stream(a) ^ c;
    }
    for (; n_bytes >= 8; n_bytes -= 8, byte += 8)
        a = _mm_crc32_u64(a, word_at(byte));
    for (; n_bytes; n_bytes--, byte++)
        a = _mm_crc32_u8((uint32_t)a, *byte);
    return ~(uint32_t)a;
}

uint32_t winnow_crc32c(uint32_t crc, const void *data, size_t n_bytes)
{
    if (!__builtin_cpu_supports("sse4.2"))
        return winnow_crc32c_table(crc, data, n_bytes);
    winnow_assert(data || n_bytes == 0);
    pthread_once(&tables_once, tables_fill);
    return crc32c_sse42(crc, data, n_bytes);
}
