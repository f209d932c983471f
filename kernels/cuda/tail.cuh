/* The blocks of an item that are attended whole: sinks, then the tail by position. */
#pragma once

#include <kernels/cuda/view.h>

struct tail_blocks {
    uint32_t n_sinks, n; /* blocks that hold tokens */
    uint32_t skipped;    /* sealed blocks between them */
};

__device__ inline tail_blocks tail_blocks_of(const winnow_gpu_view &view,
                                             const winnow_gpu_item &item)
{
    uint32_t n_all = (uint32_t)((item.n_tokens + WINNOW_BLOCK_TOKENS - 1) / WINNOW_BLOCK_TOKENS);
    tail_blocks tail;

    tail.skipped = item.n_segments * view.span_blocks;
    tail.n_sinks = min(view.n_sink_blocks, n_all);
    tail.n = n_all > view.n_sink_blocks + tail.skipped ? n_all - tail.skipped : tail.n_sinks;
    return tail;
}

/* Their partials: of eight blocks each. */
__device__ inline uint32_t tail_groups_of(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    return (tail_blocks_of(view, item).n + WINNOW_GROUP_BLOCKS - 1) / WINNOW_GROUP_BLOCKS;
}

/* Number in the context of the i-th of them. */
__device__ inline uint32_t tail_block_number(const tail_blocks &tail, uint32_t i)
{
    return i < tail.n_sinks ? i : i + tail.skipped;
}

__device__ inline uint32_t tail_block_tokens(const winnow_gpu_item &item, uint32_t number)
{
    uint64_t n = item.n_tokens - (uint64_t)number * WINNOW_BLOCK_TOKENS;
    return n < WINNOW_BLOCK_TOKENS ? (uint32_t)n : WINNOW_BLOCK_TOKENS;
}

__device__ inline uint8_t *tail_block_at(const winnow_gpu_view &view, const winnow_gpu_item &item,
                                         uint32_t head, uint32_t number)
{
    uint32_t place = number;
    if (number >= view.n_sink_blocks)
        place = view.n_sink_blocks + (number - view.n_sink_blocks) % view.ring_blocks;
    uint64_t row = (uint64_t)item.layer * view.n_kv_heads + head;
    return view.tails + item.session * view.session_bytes +
           (row * (view.n_sink_blocks + view.ring_blocks) + place) * view.block_bytes;
}

/* What it names is there: a session's segments, a layer, tail blocks. */
__device__ inline bool item_is_valid(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    tail_blocks tail = tail_blocks_of(view, item);
    bool is_sealed = item.n_segments > 0 && tail.n == tail.n_sinks; /* where the token would go */

    return item.n_segments <= view.n_session_segments_max && item.layer < view.n_layers &&
           !(item.k && (is_sealed || tail.n == 0)) && tail.n - tail.n_sinks <= view.ring_blocks &&
           tail.n <= WINNOW_GROUP_BLOCKS * WINNOW_GPU_TAIL_GROUPS_MAX;
}
