/*
 * A context drawn by chance, one KV head: shape, dtype, keys, values, and their blocks as some
 * version of the kernels packed them. Bytes of blocks that hold no token are poison: NaN, Inf, or
 * what another context left there.
 */
#pragma once

#include "fixture.h"

enum { DRAWN_TOKENS_MAX = 256, DRAWN_BLOCKS_MAX = DRAWN_TOKENS_MAX / 16 };

struct drawn {
    const struct winnow_kernels *kernels;
    struct winnow_model_shape shape;
    uint32_t n_q, n_tokens, n_blocks;
    float *k, *v, *q; /* [n_tokens][width]; q [n_q][k_width] */
    uint8_t *blocks;
    const void *block[DRAWN_BLOCKS_MAX];
    uint64_t position[DRAWN_BLOCKS_MAX];
    uint32_t n_in_block[DRAWN_BLOCKS_MAX];
};

/* The versions that this CPU runs, one by chance. */
static inline const struct winnow_kernels *drawn_kernels(struct winnow_rng *rng)
{
    static const char *const name[] = {"ref", "avx2", "avx512"};
    const struct winnow_kernels *kernels;
    do
        kernels = winnow_kernels_find(name[winnow_rng_below(rng, 3)]);
    while (!kernels);
    return kernels;
}

static inline void drawn_poison(struct winnow_rng *rng, void *memory, size_t n_bytes)
{
    static const uint32_t word[] = {0xffffffff, 0x7f800000, 0xff800000, 0x7c007c00,
                                    0xfc00fc00, 0x7fc07fc0, 0x7f7fffff};
    uint32_t one = word[winnow_rng_below(rng, sizeof word / sizeof *word)];
    uint8_t *byte = memory;
    for (size_t i = 0; i < n_bytes; i++)
        byte[i] = (uint8_t)(one >> 8 * (i % 4));
}

static inline void drawn_init(struct drawn *drawn, struct winnow_rng *rng, uint32_t width_max,
                              uint32_t n_tokens_max)
{
    uint32_t n_widths = width_max / 16;
    drawn->kernels = drawn_kernels(rng);
    drawn->n_q = 1 + (uint32_t)winnow_rng_below(rng, winnow_rng_below(rng, 8) ? 4 : 16);
    drawn->shape = fixture_shape(drawn->n_q, 16 * (1 + (uint32_t)winnow_rng_below(rng, n_widths)),
                                 16 * (1 + (uint32_t)winnow_rng_below(rng, n_widths)),
                                 WINNOW_BF16 + (uint32_t)winnow_rng_below(rng, 3));
    uint32_t k_width = drawn->shape.k_width, v_width = drawn->shape.v_width;
    size_t block_bytes = winnow_block_bytes(&drawn->shape);
    drawn->n_tokens = 1 + (uint32_t)winnow_rng_below(rng, n_tokens_max);
    drawn->n_blocks = (drawn->n_tokens + 15) / 16;
    drawn->k = fixture_normal(rng, (size_t)drawn->n_tokens * k_width, 1);
    drawn->v = fixture_normal(rng, (size_t)drawn->n_tokens * v_width, 1);
    drawn->q = fixture_normal(rng, (size_t)drawn->n_q * k_width, winnow_rng_unit(rng));
    drawn->blocks = winnow_alloc_array(drawn->n_blocks, block_bytes);
    CHECK(drawn->blocks);
    drawn_poison(rng, drawn->blocks, drawn->n_blocks * block_bytes);
    for (uint32_t b = 0; b < drawn->n_blocks; b++) {
        uint32_t n = drawn->n_tokens - 16 * b < 16 ? drawn->n_tokens - 16 * b : 16;
        drawn->kernels->block_pack(&drawn->shape, 0, n, drawn->k + 16 * b * k_width,
                                   drawn->v + 16 * b * v_width, drawn->blocks + b * block_bytes);
        drawn->block[b] = drawn->blocks + b * block_bytes;
        drawn->position[b] = 16 * b;
        drawn->n_in_block[b] = n;
    }
}

static inline void drawn_finish(struct drawn *drawn)
{
    winnow_alloc_free(drawn->k);
    winnow_alloc_free(drawn->v);
    winnow_alloc_free(drawn->q);
    winnow_alloc_free(drawn->blocks);
}

/* Nothing attended yet, of n query positions. */
static inline void drawn_clear(const struct drawn *drawn, uint32_t n, float *acc)
{
    uint32_t stride = drawn->shape.v_width + 2;
    for (uint32_t row = 0; row < n * drawn->n_q; row++) {
        memset(acc + row * stride, 0, stride * sizeof *acc);
        acc[row * stride] = -INFINITY;
    }
}

/* One query position over all blocks, in groups of eight, merged in list order. */
static inline void drawn_attend(const struct drawn *drawn, float *out, float *lse)
{
    static float acc[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    static float partial[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    drawn_clear(drawn, 1, acc);
    for (uint32_t b = 0; b < drawn->n_blocks; b += WINNOW_GROUP_BLOCKS) {
        uint32_t n_left = drawn->n_blocks - b;
        memset(partial, 0xff, sizeof partial);
        drawn->kernels->attend_partial(&drawn->shape, drawn->q,
                                       n_left < WINNOW_GROUP_BLOCKS ? n_left : WINNOW_GROUP_BLOCKS,
                                       drawn->block + b, drawn->n_in_block + b, partial, NULL);
        drawn->kernels->merge(&drawn->shape, 1, partial, acc);
    }
    drawn->kernels->finish(&drawn->shape, acc, out, lse);
}

/* The last n_pos tokens' queries, all with drawn->q, causally over all blocks. out, lse [n_pos]. */
static inline void drawn_window(const struct drawn *drawn, struct winnow_rng *rng, uint32_t n_pos,
                                float *out, float *lse)
{
    size_t q_floats = (size_t)drawn->n_q * drawn->shape.k_width;
    size_t out_floats = (size_t)drawn->n_q * drawn->shape.v_width;
    size_t scratch_bytes = drawn->kernels->window_scratch_bytes(&drawn->shape, n_pos);
    float *q = winnow_alloc_array(n_pos * q_floats, sizeof *q);
    float *acc = winnow_alloc_array(n_pos * winnow_partial_floats(&drawn->shape), sizeof *acc);
    void *scratch = winnow_alloc(scratch_bytes);
    CHECK(q && acc && scratch);
    drawn_poison(rng, scratch, scratch_bytes);
    for (uint32_t i = 0; i < n_pos; i++)
        memcpy(q + i * q_floats, drawn->q, q_floats * sizeof *q);
    drawn_clear(drawn, n_pos, acc);
    drawn->kernels->attend_window(&drawn->shape, n_pos, drawn->n_tokens - n_pos, q, drawn->n_blocks,
                                  drawn->block, drawn->position, drawn->n_in_block, acc, scratch);
    for (uint32_t i = 0; i < n_pos; i++)
        drawn->kernels->finish(&drawn->shape, acc + i * winnow_partial_floats(&drawn->shape),
                               out + i * out_floats, lse + i * drawn->n_q);
    winnow_alloc_free(q);
    winnow_alloc_free(acc);
    winnow_alloc_free(scratch);
}
