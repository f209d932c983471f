/*
 * The device's index out of the host's (view.h, kernels.h): the same numbers in the order in which
 * the scan's matrix instructions load them.
 *
 * Dimensions D .. D + 3 and half + D .. half + D + 3 of one key share a word, so that one AND gives
 * the operand of the first, another, 16 times too large, that of the second.
 */
#include <base/assert.h>
#include <kernels/cuda/index_pack.h>
#include <string.h>

static uint32_t round_up(uint32_t n, uint32_t to)
{
    return (n + to - 1) / to * to;
}

void winnow_gpu_index_layout(struct winnow_gpu_view *view)
{
    uint32_t n = view->span_blocks, coded_width = round_up(view->k_width, 64);
    winnow_assert(n % 8 == 0);

    view->record_bytes = 8 * (8 * coded_width + view->k_width + 32 + 4);
    view->vmean_at = n / 8 * view->record_bytes;
    view->vmean_scale_at = view->vmean_at + n * view->v_width;
    view->mean_v_at = view->vmean_scale_at + n * 4;
    view->home_at = view->mean_v_at + view->v_width * 4;
    view->loc_at = view->home_at + n * 4;
    view->unit_bytes = round_up(view->loc_at + n * 4, 128);
}

/* Codes of dimensions d .. d + 3 of token t, a byte each, as code + 8; beyond the width: code 0. */
static uint32_t codes_at(uint32_t width, const uint8_t *code, uint32_t t, uint32_t d)
{
    uint32_t pairs;
    if (d >= width)
        return 0x08080808;
    memcpy(&pairs, code + (d / 8 * 16 + t) * 4, sizeof pairs);
    return (d % 8 < 4 ? pairs : pairs >> 4) & 0x0f0f0f0f;
}

static void pack_codes(uint32_t width, const uint8_t *code, uint8_t *dst)
{
    uint32_t half = round_up(width, 64) / 2;

    for (uint32_t j = 0; j < half / 32; j++)
        for (uint32_t lane = 0; lane < 32; lane++)
            for (uint32_t i = 0; i < 4; i++, dst += 4) {
                uint32_t key = lane / 4 + 8 * (i & 1);
                uint32_t d = 32 * j + 16 * (i >> 1) + 4 * (lane & 3);
                uint32_t word = codes_at(width, code, key, d) | codes_at(width, code, key, half + d)
                                                                    << 4;
                memcpy(dst, &word, sizeof word);
            }
}

static void pack_record(uint32_t width, const struct winnow_index_view *index, uint32_t first,
                        uint8_t *dst)
{
    uint32_t code_bytes = 8 * round_up(width, 64);

    for (uint32_t b = 0; b < 8; b++)
        pack_codes(width, index->code + (size_t)(first + b) * 8 * width, dst + b * code_bytes);
    dst += 8 * code_bytes;
    memcpy(dst, index->centroid + (size_t)first * width, 8 * width);
    dst += 8 * width;
    for (uint32_t i = 0; i < 8 * 16; i++) {
        uint32_t b = first + i / 16, key = i % 16 / 2 + i % 2 * 8;
        memcpy(dst + 2 * i, &index->code_scale[b * 16 + key], 2);
    }
    dst += 8 * 32;
    for (uint32_t b = 0; b < 8; b++)
        memcpy(dst + 4 * b, &index->head[first + b].centroid_scale, 4);
}

void winnow_gpu_index_pack(const struct winnow_gpu_view *view,
                           const struct winnow_index_view *index, const uint32_t *homes,
                           uint8_t *dst)
{
    uint32_t n = view->span_blocks;
    winnow_assert(index->n_blocks == n);

    memset(dst, 0, view->unit_bytes);
    for (uint32_t i = 0; i < n / 8; i++)
        pack_record(view->k_width, index, 8 * i, dst + (size_t)i * view->record_bytes);
    memcpy(dst + view->vmean_at, index->vmean, (size_t)n * view->v_width);
    for (uint32_t b = 0; b < n; b++)
        memcpy(dst + view->vmean_scale_at + 4 * (size_t)b, &index->head[b].vmean_scale, 4);
    memcpy(dst + view->mean_v_at, index->mean_v, 4 * (size_t)view->v_width);
    memcpy(dst + view->home_at, homes, 4 * (size_t)n);
}
