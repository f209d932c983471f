// Quantised weights. A decode step reads every weight once: 96 MB a token for SmolLM2-135M, 2.9 ms
// at 33 GB/s, so the product must keep up with memory: about 4 cycles for a block of 32 weights.
//
// Rejected: unpacking to fp32 and multiplying (twice the instructions, and matrices kept as fp32
// cost 16 ms a token); 8-bit activations (one instruction less, but logits move by .1 to .5).
// With 16-bit activations a block is one widening, one multiply-add of pairs, one conversion and
// one fused multiply-add, and the vector's own rounding is lost in that of fp32.
//
// Version "avx512" takes a block in one register, "avx2" in two halves; "plain" defines the result.
// They differ by the order of fp32 sums only.
#include "quant.h"

#include <errno.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { Q4_1_BYTES = 20, Q8_0_BYTES = 34 };

int quant_type_known(uint32_t type)
{
    return type == QUANT_F32 || type == QUANT_Q4_1 || type == QUANT_Q8_0;
}

uint32_t quant_block_items(uint32_t type)
{
    return type == QUANT_F32 ? 1 : QUANT_BLOCK_ITEMS;
}

uint64_t quant_row_bytes(uint32_t type, uint32_t n_items)
{
    if (type == QUANT_F32)
        return (uint64_t)n_items * sizeof(float);
    return (uint64_t)n_items / QUANT_BLOCK_ITEMS * (type == QUANT_Q4_1 ? Q4_1_BYTES : Q8_0_BYTES);
}

/* IEEE binary16, subnormals too, without the F16C instructions. */
static float half_to_float(const uint8_t *bytes)
{
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff, bits;
    float value;

    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000u | (magnitude << 13);
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    bits = magnitude << 13;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f; /* the exponent's bias: 127 - 15 */
    return sign ? -value : value;
}

void quant_row_unpack(uint32_t type, const uint8_t *row, uint32_t n_items, float *out)
{
    if (type == QUANT_F32) {
        memcpy(out, row, n_items * sizeof(float));
        return;
    }
    for (uint32_t i = 0; i < n_items; i += QUANT_BLOCK_ITEMS, out += QUANT_BLOCK_ITEMS) {
        float d = half_to_float(row);
        if (type == QUANT_Q4_1) {
            float m = half_to_float(row + 2);
            for (uint32_t j = 0; j < 16; j++) {
                out[j] = d * (float)(row[4 + j] & 15) + m;
                out[j + 16] = d * (float)(row[4 + j] >> 4) + m;
            }
            row += Q4_1_BYTES;
        } else {
            for (uint32_t j = 0; j < 32; j++)
                out[j] = d * (float)(int8_t)row[2 + j];
            row += Q8_0_BYTES;
        }
    }
}

int quant_vector_create(struct quant_vector *vector, uint32_t n_items_max)
{
    size_t n_blocks = n_items_max / QUANT_BLOCK_ITEMS;
    *vector = (struct quant_vector){
        .items = aligned_alloc(64, n_blocks * QUANT_BLOCK_ITEMS * sizeof(int16_t)),
        .scales = calloc(n_blocks, 2 * sizeof(float)),
    };
    if (vector->items && vector->scales)
        return 0;
    quant_vector_destroy(vector);
    return -ENOMEM;
}

void quant_vector_destroy(struct quant_vector *vector)
{
    free(vector->items);
    free(vector->scales);
    *vector = (struct quant_vector){0};
}

/* Rounds to nearest by adding 1.5 * 2^23, which leaves the integer in the low bits; unlike lrintf
 * this becomes vector code. |x| < 2^22. */
static inline int16_t round_near(float x)
{
    const float shifted = x + 0x1.8p23f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (int16_t)(bits - 0x4b400000);
}

void quant_vector_pack(struct quant_vector *vector, const float *x, uint32_t n_items)
{
    vector->n_items = n_items;
    for (uint32_t i = 0; i < n_items; i += QUANT_BLOCK_ITEMS) {
        float largest = 0, sum = 0;
        for (uint32_t j = i; j < i + QUANT_BLOCK_ITEMS; j++) {
            float size = fabsf(x[j]);
            largest = size > largest ? size : largest;
            sum += x[j];
        }
        float inverse = largest > 0 ? 32767.0f / largest : 0;
        for (uint32_t j = i; j < i + QUANT_BLOCK_ITEMS; j++)
            vector->items[j] = round_near(x[j] * inverse);
        vector->scales[i / QUANT_BLOCK_ITEMS * 2] = largest / 32767.0f;
        vector->scales[i / QUANT_BLOCK_ITEMS * 2 + 1] = sum;
    }
}

static void dot_plain(uint32_t type, const uint8_t *rows, uint32_t n_rows,
                      const struct quant_vector *vector, float *out)
{
    for (uint32_t r = 0; r < n_rows; r++) {
        float total = 0;
        for (uint32_t b = 0; b < vector->n_items / QUANT_BLOCK_ITEMS; b++) {
            const int16_t *items = vector->items + b * QUANT_BLOCK_ITEMS;
            const float *scale = vector->scales + b * 2;
            int32_t sum = 0;
            if (type == QUANT_Q4_1) {
                for (uint32_t j = 0; j < 16; j++)
                    sum += (rows[4 + j] & 15) * items[j] + (rows[4 + j] >> 4) * items[j + 16];
                total += half_to_float(rows + 2) * scale[1];
            } else {
                for (uint32_t j = 0; j < 32; j++)
                    sum += (int8_t)rows[2 + j] * items[j];
            }
            total += half_to_float(rows) * scale[0] * (float)sum;
            rows += type == QUANT_Q4_1 ? Q4_1_BYTES : Q8_0_BYTES;
        }
        out[r] = total;
    }
}

#define AVX2   __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))

/* Lane 0: d * scale; lane 1, of Q4_1: m * sum of the block. */
AVX2 static inline __m128 block_scales(const uint8_t *block, const float *scale)
{
    int32_t halves;
    memcpy(&halves, block, sizeof halves);
    __m128 pair = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)scale));
    return _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(halves)), pair);
}

AVX2 static inline float lanes_sum(__m256 lanes)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

AVX2 static inline __m256i half_products(__m128i weights, const int16_t *items, int is_signed)
{
    __m256i wide = is_signed ? _mm256_cvtepi8_epi16(weights) : _mm256_cvtepu8_epi16(weights);
    return _mm256_madd_epi16(wide, _mm256_load_si256((const __m256i *)(const void *)items));
}

AVX2 static void dot_avx2(uint32_t type, const uint8_t *rows, uint32_t n_rows,
                          const struct quant_vector *vector, float *out)
{
    const __m128i low_nibbles = _mm_set1_epi8(15);
    const uint32_t n_blocks = vector->n_items / QUANT_BLOCK_ITEMS;
    const int is_q4_1 = type == QUANT_Q4_1;

    for (uint32_t r = 0; r < n_rows; r++) {
        __m256 total = _mm256_setzero_ps();
        __m128 offsets = _mm_setzero_ps();
        for (uint32_t b = 0; b < n_blocks; b++) {
            const int16_t *items = vector->items + b * QUANT_BLOCK_ITEMS;
            __m128 scales = block_scales(rows, vector->scales + b * 2);
            __m256i low, high;
            if (is_q4_1) {
                __m128i nibbles = _mm_loadu_si128((const __m128i *)(const void *)(rows + 4));
                low = half_products(_mm_and_si128(nibbles, low_nibbles), items, 0);
                high = half_products(_mm_and_si128(_mm_srli_epi16(nibbles, 4), low_nibbles),
                                     items + 16, 0);
                offsets = _mm_add_ps(offsets, scales);
                rows += Q4_1_BYTES;
            } else {
                const __m128i *bytes = (const __m128i *)(const void *)(rows + 2);
                low = half_products(_mm_loadu_si128(bytes), items, 1);
                high = half_products(_mm_loadu_si128(bytes + 1), items + 16, 1);
                rows += Q8_0_BYTES;
            }
            total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)),
                                    _mm256_broadcastss_ps(scales), total);
        }
        out[r] = lanes_sum(total) + _mm_cvtss_f32(_mm_movehdup_ps(offsets));
    }
}

AVX512 static inline __m512 block_products(__m256i weights, const int16_t *items, int is_signed)
{
    __m512i wide = is_signed ? _mm512_cvtepi8_epi16(weights) : _mm512_cvtepu8_epi16(weights);
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(wide, _mm512_load_si512(items)));
}

AVX512 static inline float lanes_sum_512(__m512 lanes)
{
    return lanes_sum(
        _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1)));
}

/* The next page's first touch costs a page walk that the processor's own prefetch does not begin:
 * asked for a page ahead, all matrices of a token take 2.65 ms in place of 2.9. */
AVX512 static inline void prefetch_ahead(const uint8_t *row)
{
    _mm_prefetch((const char *)row + 4096, _MM_HINT_T0);
}

AVX512 static float row_q4_1_avx512(const uint8_t *row, const struct quant_vector *vector,
                                    uint32_t n_blocks)
{
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    __m512 total = _mm512_setzero_ps();
    __m128 offsets = _mm_setzero_ps();

    for (uint32_t b = 0; b < n_blocks; b++, row += Q4_1_BYTES) {
        prefetch_ahead(row);
        __m128 scales = block_scales(row, vector->scales + b * 2);
        __m128i low = _mm_loadu_si128((const __m128i *)(const void *)(row + 4));
        __m256i both =
            _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_srli_epi16(low, 4), 1);
        __m512 products = block_products(_mm256_and_si256(both, low_nibbles),
                                         vector->items + b * QUANT_BLOCK_ITEMS, 0);
        total = _mm512_fmadd_ps(products, _mm512_broadcastss_ps(scales), total);
        offsets = _mm_add_ps(offsets, scales);
    }
    return lanes_sum_512(total) + _mm_cvtss_f32(_mm_movehdup_ps(offsets));
}

AVX512 static float row_q8_0_avx512(const uint8_t *row, const struct quant_vector *vector,
                                    uint32_t n_blocks)
{
    __m512 total = _mm512_setzero_ps();

    for (uint32_t b = 0; b < n_blocks; b++, row += Q8_0_BYTES) {
        prefetch_ahead(row);
        __m128 scales = block_scales(row, vector->scales + b * 2);
        __m256i weights = _mm256_loadu_si256((const __m256i *)(const void *)(row + 2));
        __m512 products = block_products(weights, vector->items + b * QUANT_BLOCK_ITEMS, 1);
        total = _mm512_fmadd_ps(products, _mm512_broadcastss_ps(scales), total);
    }
    return lanes_sum_512(total);
}

AVX512 static void dot_avx512(uint32_t type, const uint8_t *rows, uint32_t n_rows,
                              const struct quant_vector *vector, float *out)
{
    const uint32_t n_blocks = vector->n_items / QUANT_BLOCK_ITEMS;
    const uint64_t row_bytes = quant_row_bytes(type, vector->n_items);

    for (uint32_t r = 0; r < n_rows; r++, rows += row_bytes)
        out[r] = type == QUANT_Q4_1 ? row_q4_1_avx512(rows, vector, n_blocks)
                                    : row_q8_0_avx512(rows, vector, n_blocks);
}

quant_dot_fn *quant_dot_version(uint32_t version, const char **name)
{
    static const char *const names[] = {"plain", "avx2", "avx512"};
    static quant_dot_fn *const versions[] = {dot_plain, dot_avx2, dot_avx512};
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int has_avx512 = has_avx2 && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");

    if (version > 2 || (version >= 1 && !has_avx2) || (version == 2 && !has_avx512))
        return NULL;
    *name = names[version];
    return versions[version];
}

void quant_rows_dot(uint32_t type, const uint8_t *rows, uint32_t n_rows,
                    const struct quant_vector *vector, float *out)
{
    static quant_dot_fn *_Atomic best;
    quant_dot_fn *dot = best;

    if (!dot) {
        const char *name;
        dot = dot_plain;
        for (uint32_t version = 1; quant_dot_version(version, &name); version++)
            dot = quant_dot_version(version, &name);
        best = dot;
    }
    dot(type, rows, n_rows, vector, out);
}
