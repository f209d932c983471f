/*
 * Score: the estimated mass of every block of a segment, from the centroid and the 4-bit codes.
 *
 * A group of eight dimensions of sixteen codes is one 64-byte load; its low and its high nibbles
 * are unsigned bytes, four a token, that multiply four signed bytes of the query. The 15-bit query
 * q_int = 128 hi + lo is two such products; the codes' bias of 8 is 8 x sum q_int, taken off once.
 * All of it is exact. AVX-512 has vpdpbusd for this; AVX2 adds pairs in 16 bits (at most 15 x 127
 * x 2 x 8 = 30,480) and widens every four groups.
 *
 * Sixteen blocks at a time: their 16 x 16 logits then need three steps a block for maximum and sum
 * (v16_rows_exp), where one block alone needs eight each. A block of d 64 takes G 3 heads 31 ns with
 * AVX-512, 67 with AVX2. Rejected: the query as 16-bit pairs (vpdpwssd, vpmaddwd), one product
 * where the halves take two, of half as many dimensions: no fewer instructions, and the codes
 * need four shifts where bytes need one.
 */
#pragma once

#include <kernels/cpu/attend_impl.h>

enum { QUERY_LARGEST = 127 * 128 };

/* One query head. */
struct query {
    const float *q;
    float scale;  /* q = scale x q_int */
    float square; /* |q|^2 */
    int32_t bias; /* 8 x sum q_int */
    /* Four dimensions a word: word 2 j the low nibbles' of group j, 2 j + 1 the high ones'. */
    int8_t hi[WINNOW_WIDTH_MAX], lo[WINNOW_WIDTH_MAX];
};

static void query_init(struct query *query, uint32_t width, const float *q)
{
    v16 largest = v16_set1(0.0f), square = v16_set1(0.0f), sum = v16_set1(0.0f);

    for (uint32_t d = 0; d < width; d += 16) {
        v16 x = v16_load(q + d);
        largest = v16_max(largest, v16_abs(x));
        square = v16_fma(x, x, square);
    }
    query->q = q;
    query->square = v16_sum(square);
    query->scale = v16_largest(largest) / (float)QUERY_LARGEST;
    for (uint32_t d = 0; d < width; d += 16) {
        v16 limit = v16_set1((float)QUERY_LARGEST), zero = v16_set1(0.0f);
        v16 x = v16_div(v16_load(q + d), v16_set1(query->scale > 0 ? query->scale : INFINITY));
        x = v16_round(v16_min(v16_max(x, v16_sub(zero, limit)), limit));
        v16 hi = v16_round(v16_mul(x, v16_set1(1.0f / 128)));
        sum = v16_add(sum, x);
        v16i_to_i8(query->hi + d, v16_to_i32(hi));
        v16i_to_i8(query->lo + d, v16_to_i32(v16_fma(hi, v16_set1(-128.0f), x)));
    }
    query->bias = 8 * (int32_t)v16_sum(sum); /* whole numbers below 2^24: exact */
}

SIMD int32_t query_word(const int8_t *half, uint32_t word_idx)
{
    int32_t word;
    memcpy(&word, half + 4 * word_idx, sizeof word);
    return word;
}

/* dot [n_q]: for each token the exact sum over d of (c + 8) q_int of query head g. */
#ifdef __AVX512F__

SIMD void code_dots(uint32_t n_q, uint32_t n_groups, const uint8_t *code, const struct query *query,
                    v16i *dot)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i hi[HEADS_TILE], lo[HEADS_TILE];

#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
        hi[g] = lo[g] = _mm512_setzero_si512();
    for (uint32_t j = 0; j < n_groups; j++) {
        __m512i c = _mm512_loadu_si512(code + 64 * j);
        __m512i first = _mm512_and_si512(c, nibble);
        __m512i second = _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble);
#pragma GCC unroll 4
        for (uint32_t g = 0; g < n_q; g++) {
            const int8_t *q_hi = query[g].hi, *q_lo = query[g].lo;
            hi[g] = _mm512_dpbusd_epi32(hi[g], first, _mm512_set1_epi32(query_word(q_hi, 2 * j)));
            lo[g] = _mm512_dpbusd_epi32(lo[g], first, _mm512_set1_epi32(query_word(q_lo, 2 * j)));
            hi[g] =
                _mm512_dpbusd_epi32(hi[g], second, _mm512_set1_epi32(query_word(q_hi, 2 * j + 1)));
            lo[g] =
                _mm512_dpbusd_epi32(lo[g], second, _mm512_set1_epi32(query_word(q_lo, 2 * j + 1)));
        }
    }
#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
        dot[g] = _mm512_add_epi32(_mm512_slli_epi32(hi[g], 7), lo[g]);
}

#else

SIMD __m256i pair_dot(__m256i code, const int8_t *half, uint32_t word_idx)
{
    return _mm256_maddubs_epi16(code, _mm256_set1_epi32(query_word(half, word_idx)));
}

/* Eight tokens: the low or the high half of every group. */
SIMD void code_dots_half(uint32_t n_q, uint32_t n_groups, const uint8_t *code,
                         const struct query *query, __m256i *dot)
{
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    __m256i hi[HEADS_TILE], lo[HEADS_TILE];

#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
        hi[g] = lo[g] = _mm256_setzero_si256();
    for (uint32_t j = 0; j < n_groups;) {
        uint32_t end = j + 4 < n_groups ? j + 4 : n_groups;
        __m256i pair_hi[HEADS_TILE], pair_lo[HEADS_TILE];
#pragma GCC unroll 4
        for (uint32_t g = 0; g < n_q; g++)
            pair_hi[g] = pair_lo[g] = _mm256_setzero_si256();
        for (; j < end; j++) {
            __m256i c = _mm256_loadu_si256((const __m256i *)(code + 64 * j));
            __m256i first = _mm256_and_si256(c, nibble);
            __m256i second = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibble);
#pragma GCC unroll 4
            for (uint32_t g = 0; g < n_q; g++) {
                const int8_t *q_hi = query[g].hi, *q_lo = query[g].lo;
                pair_hi[g] = _mm256_add_epi16(pair_hi[g], pair_dot(first, q_hi, 2 * j));
                pair_lo[g] = _mm256_add_epi16(pair_lo[g], pair_dot(first, q_lo, 2 * j));
                pair_hi[g] = _mm256_add_epi16(pair_hi[g], pair_dot(second, q_hi, 2 * j + 1));
                pair_lo[g] = _mm256_add_epi16(pair_lo[g], pair_dot(second, q_lo, 2 * j + 1));
            }
        }
#pragma GCC unroll 4
        for (uint32_t g = 0; g < n_q; g++) {
            hi[g] = _mm256_add_epi32(hi[g], _mm256_madd_epi16(pair_hi[g], one));
            lo[g] = _mm256_add_epi32(lo[g], _mm256_madd_epi16(pair_lo[g], one));
        }
    }
#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
        dot[g] = _mm256_add_epi32(_mm256_slli_epi32(hi[g], 7), lo[g]);
}

SIMD void code_dots(uint32_t n_q, uint32_t n_groups, const uint8_t *code, const struct query *query,
                    v16i *dot)
{
    __m256i lo[HEADS_TILE], hi[HEADS_TILE];

    code_dots_half(n_q, n_groups, code, query, lo);
    code_dots_half(n_q, n_groups, code + 32, query, hi);
#pragma GCC unroll 4
    for (uint32_t g = 0; g < n_q; g++)
        dot[g] = (v16i){lo[g], hi[g]};
}

#endif

/* Query heads of a tile, and up to sixteen blocks from block_first on. */
struct score_tile {
    const struct winnow_index_view *view;
    const struct query *query;
    uint32_t width, block_first, n;
    float s;
};

/* q_mu [n_q][16]: q . mu_b; blocks that are not there get 0. */
SIMD void tile_centroid_dots(const struct score_tile *tile, uint32_t n_q, float q_mu[][16])
{
    float row[HEADS_TILE][16][16], scale[16] = {0};

    for (uint32_t b = 0; b < 16; b++) {
        v16 sum[HEADS_TILE];
        size_t at = tile->block_first + b;
#pragma GCC unroll 4
        for (uint32_t g = 0; g < n_q; g++)
            sum[g] = v16_set1(0.0f);
        for (uint32_t d = 0; b < tile->n && d < tile->width; d += 16) {
            v16 mu = v16_from_i32(v16i_from_i8(tile->view->centroid + at * tile->width + d));
#pragma GCC unroll 4
            for (uint32_t g = 0; g < n_q; g++)
                sum[g] = v16_fma(v16_load(tile->query[g].q + d), mu, sum[g]);
        }
        if (b < tile->n)
            scale[b] = tile->view->head[at].centroid_scale;
#pragma GCC unroll 4
        for (uint32_t g = 0; g < n_q; g++)
            v16_store(row[g][b], sum[g]);
    }
    for (uint32_t g = 0; g < n_q; g++) {
        v16 rows[16];
        for (uint32_t b = 0; b < 16; b++)
            rows[b] = v16_load(row[g][b]);
        v16_store(q_mu[g], v16_mul(v16_rows_sum(rows), v16_load(scale)));
    }
}

/* ln_e [n][stride] of the tile's heads, from their centroid's dot products and the codes. */
SIMD void tile_codes(const struct score_tile *tile, uint32_t n_q, float q_mu[][16], float *ln_e,
                     size_t stride)
{
    const v16 s = v16_set1(tile->s);
    float l[HEADS_TILE][16][16];

    for (uint32_t b = 0; b < tile->n; b++) {
        size_t at = tile->block_first + b;
        v16i dot[HEADS_TILE];
        code_dots(n_q, tile->width / 8, tile->view->code + at * 8 * tile->width, tile->query, dot);
        v16 a = v16_from_fp16(tile->view->code_scale + at * 16);
#pragma GCC unroll 4
        for (uint32_t g = 0; g < n_q; g++) {
            v16 x = v16_from_i32(v16i_sub(dot[g], v16i_set1(tile->query[g].bias)));
            v16 q_code = v16_mul(v16_mul(a, v16_set1(tile->query[g].scale)), x);
            v16_store(l[g][b], v16_mul(s, v16_add(v16_set1(q_mu[g][b]), q_code)));
        }
    }
    for (uint32_t g = 0; g < n_q; g++) {
        v16 row[16], largest, sum;
        float ln[16];
        for (uint32_t b = 0; b < 16; b++)
            row[b] = b < tile->n ? v16_load(l[g][b]) : v16_set1(0.0f);
        v16_rows_exp(row, &largest, &sum);
        v16_store(ln, v16_add(largest, v16_log(sum)));
        for (uint32_t b = 0; b < tile->n; b++)
            ln_e[b * stride + g] = ln[b];
    }
}

SIMD void tile_score(const struct score_tile *tile, uint32_t n_q, float *ln_e, size_t stride)
{
    float q_mu[HEADS_TILE][16];

    tile_centroid_dots(tile, n_q, q_mu);
    tile_codes(tile, n_q, q_mu, ln_e, stride);
}

/* q . mu alone, and for `moment` the normal fitted to the block. */
static float block_variance(const struct score_tile *tile, uint32_t b, const struct query *query)
{
    size_t at = tile->block_first + b;
    v16 sum = v16_set1(0.0f);

    if (!tile->view->var)
        return tile->view->head[at].spread * query->square;
    for (uint32_t d = 0; d < tile->width; d += 16) {
        v16 x = v16_load(query->q + d);
        sum = v16_fma(v16_mul(x, x), v16_from_fp16(tile->view->var + at * tile->width + d), sum);
    }
    return v16_sum(sum);
}

SIMD void tile_moment(const struct score_tile *tile, uint32_t n_q, bool with_variance, float *ln_e,
                      size_t stride)
{
    float q_mu[HEADS_TILE][16], s = tile->s;

    tile_centroid_dots(tile, n_q, q_mu);
    for (uint32_t b = 0; b < tile->n; b++)
        for (uint32_t g = 0; g < n_q; g++) {
            float variance = with_variance ? block_variance(tile, b, tile->query + g) : 0.0f;
            ln_e[b * stride + g] =
                s * q_mu[g][b] + fminf(s * s / 2 * variance, 2.0f) + 2.77258872f /* ln 16 */;
        }
}

static void score(const struct winnow_model_shape *shape, uint32_t policy,
                  const struct winnow_index_view *view, const float *q, float *ln_e, void *scratch)
{
    uint32_t n_q = shape_n_q(shape), width = shape->k_width;
    struct query query[WINNOW_GQA_MAX];
    (void)scratch;

    for (uint32_t g = 0; g < n_q; g++)
        query_init(&query[g], width, q + (size_t)g * width);
    for (uint32_t b = 0; b < view->n_blocks; b += 16)
        for (uint32_t g = 0; g < n_q; g += HEADS_TILE) {
            struct score_tile tile = {
                .view = view,
                .query = query + g,
                .width = width,
                .block_first = b,
                .n = view->n_blocks - b < 16 ? view->n_blocks - b : 16,
                .s = shape->softmax_scale,
            };
            uint32_t n_tile = heads_in_tile(n_q, g);
            float *at = ln_e + (size_t)b * n_q + g;
            bool is_moment = policy == WINNOW_POLICY_MOMENT;
            if (policy == WINNOW_POLICY_CODES) {
                TILE_HEADS(&tile, n_tile, tile_score, at, n_q)
            } else {
                TILE_HEADS(&tile, n_tile, tile_moment, is_moment, at, n_q)
            }
        }
}
