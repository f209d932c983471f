/*
 * Blocks of layout 2, the GPU's, on the CPU: their elements are put into the order of layout 1 and
 * go the same way from there, so both layouts give the same bits. For sessions whose GPU is gone,
 * for prefill beside one. 4,096 elements are moved in about 2 us, a tenth of what a window computes
 * with them.
 */
#pragma once

#include <kernels/ref/ref.h>
#include <string.h>

enum { ROWS_MAX = 2 * WINNOW_BLOCK_TOKENS * WINNOW_WIDTH_MAX };

/* A tile of 16 x 16: element e of lane l is at this row and column. */
static inline uint32_t fragment_row(uint32_t lane, uint32_t e)
{
    return lane / 4 + (e & 2) * 4;
}
static inline uint32_t fragment_column(uint32_t lane, uint32_t e)
{
    return lane % 4 * 2 + (e & 1) + (e & 4) * 2;
}

/* K [k_width][16], then V [16][v_width], from a block of layout 2. */
static void fragments_to_rows(const struct winnow_model_shape *shape, const uint16_t *block,
                              uint16_t *rows)
{
    for (uint32_t first = 0; first < shape->k_width; first += 16)
        for (uint32_t lane = 0; lane < 32; lane++)
#pragma GCC unroll 8
            for (uint32_t e = 0; e < 8; e++)
                rows[16 * (first + fragment_column(lane, e)) + fragment_row(lane, e)] = *block++;
    rows += 16 * shape->k_width;
    for (uint32_t first = 0; first < shape->v_width; first += 16)
        for (uint32_t lane = 0; lane < 32; lane++)
#pragma GCC unroll 8
            for (uint32_t e = 0; e < 8; e++)
                rows[shape->v_width * fragment_column(lane, e) + first + fragment_row(lane, e)] =
                    *block++;
}

static void rows_to_fragments(const struct winnow_model_shape *shape, const uint16_t *rows,
                              uint16_t *block)
{
    for (uint32_t first = 0; first < shape->k_width; first += 16)
        for (uint32_t lane = 0; lane < 32; lane++)
#pragma GCC unroll 8
            for (uint32_t e = 0; e < 8; e++)
                *block++ = rows[16 * (first + fragment_column(lane, e)) + fragment_row(lane, e)];
    rows += 16 * shape->k_width;
    for (uint32_t first = 0; first < shape->v_width; first += 16)
        for (uint32_t lane = 0; lane < 32; lane++)
#pragma GCC unroll 8
            for (uint32_t e = 0; e < 8; e++)
                *block++ =
                    rows[shape->v_width * fragment_column(lane, e) + first + fragment_row(lane, e)];
}

/* The block in layout 1: itself, or put in order into rows [ROWS_MAX]. */
static inline const void *block_in_rows(const struct winnow_model_shape *shape, const void *block,
                                        uint16_t *rows)
{
    if (shape->block_layout != WINNOW_BLOCK_FRAGMENTS)
        return block;
    fragments_to_rows(shape, block, rows);
    return rows;
}
