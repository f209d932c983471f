/*
 * The layout of a gpu's memory, computed from its options; sizes are those of view.h.
 *
 * Arithmetic saturates, so that a size too large is seen once, at the end.
 */
#include <base/assert.h>
#include <errno.h>
#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/layout.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum {
    ALIGNMENT = 256,
    SEGMENT_TOKENS_MAX = 16384,
    WINDOW_POSITIONS_MAX = 65536,
    WINDOW_BLOCKS_MAX = 65536,
    STAGE_EACH = 256, /* blocks of a launch for a place on the stage */
};

static uint64_t times(uint64_t a, uint64_t b)
{
    uint64_t product;
    return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

static uint64_t plus(uint64_t a, uint64_t b)
{
    uint64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t aligned(uint64_t n_bytes)
{
    return plus(n_bytes, ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int refuse(char text[256], const char *name, uint64_t value, const char *needed)
{
    snprintf(text, 256, "%s %llu: %s is needed", name, (unsigned long long)value, needed);
    return -EINVAL;
}

static int check_options(const struct winnow_gpu_options *o, char text[256])
{
    if (winnow_model_shape_check(&o->shape, text) < 0)
        return -EINVAL;
    if (o->shape.kv_dtype == WINNOW_FP32)
        return refuse(text, "kv_dtype", o->shape.kv_dtype, "bf16 (1) or fp16 (2)");
    if (o->shape.block_layout != WINNOW_BLOCK_FRAGMENTS)
        return refuse(text, "block_layout", o->shape.block_layout, "2, of fragments,");
    if (o->segment_tokens == 0 || o->segment_tokens % 128 || o->segment_tokens > SEGMENT_TOKENS_MAX)
        return refuse(text, "segment_tokens", o->segment_tokens, "a multiple of 128 up to 16384");
    if (o->n_sinks % 16 || o->n_sinks > 64)
        return refuse(text, "n_sinks", o->n_sinks, "0, 16, 32, 48 or 64");
    if (o->n_segments_max == 0)
        return refuse(text, "n_segments_max", 0, "at least 1");
    if (o->n_sessions_max == 0)
        return refuse(text, "n_sessions_max", 0, "at least 1");
    if (o->n_session_segments_max == 0)
        return refuse(text, "n_session_segments_max", 0, "at least 1");
    if (o->n_items_max == 0 || o->n_items_max > WINNOW_GPU_ITEMS_MAX)
        return refuse(text, "n_items_max", o->n_items_max, "1 to 256");
    if (o->n_launch_blocks_max == 0)
        return refuse(text, "n_launch_blocks_max", 0, "at least 1");
    if (o->n_window_positions > WINDOW_POSITIONS_MAX)
        return refuse(text, "n_window_positions", o->n_window_positions, "at most 65536");
    if (o->n_window_positions > 0 &&
        (o->n_window_blocks == 0 || o->n_window_blocks % WINNOW_GROUP_BLOCKS ||
         o->n_window_blocks > WINDOW_BLOCKS_MAX))
        return refuse(text, "n_window_blocks", o->n_window_blocks, "a multiple of 8 up to 65536");
    return 0;
}

/* Numbers that kernels hold in 32 bits. */
static int check_ranges(const struct winnow_gpu_options *o, char text[256])
{
    uint64_t n_heads = times(o->shape.n_layers, o->shape.n_kv_heads);
    uint64_t n_ids = times(times(o->n_segments_max, n_heads), o->segment_tokens / 16);

    if (n_ids >= UINT32_MAX) {
        snprintf(text, 256, "n_segments_max %u: %llu blocks, at most 2^32 - 2 can be numbered",
                 o->n_segments_max, (unsigned long long)n_ids);
        return -EOVERFLOW;
    }
    if (times(o->n_launch_blocks_max, o->shape.n_kv_heads) >= UINT32_C(1) << 31) {
        snprintf(text, 256, "n_launch_blocks_max %llu: above 2^31 over %u KV heads",
                 (unsigned long long)o->n_launch_blocks_max, o->shape.n_kv_heads);
        return -EOVERFLOW;
    }
    if (o->n_slots > INT32_MAX - times(o->n_launch_blocks_max, o->shape.n_kv_heads) / STAGE_EACH) {
        snprintf(text, 256, "n_slots %u: above 2^31, with the stage", o->n_slots);
        return -EOVERFLOW;
    }
    return 0;
}

static struct winnow_gpu_view view_of(const struct winnow_gpu_options *o)
{
    const struct winnow_model_shape *shape = &o->shape;
    struct winnow_gpu_view view = {
        .n_layers = shape->n_layers,
        .n_q_heads = shape->n_q_heads,
        .n_kv_heads = shape->n_kv_heads,
        .n_group = shape->n_q_heads / shape->n_kv_heads,
        .k_width = shape->k_width,
        .v_width = shape->v_width,
        .kv_dtype = shape->kv_dtype,
        .io_dtype = shape->io_dtype,
        .softmax_scale = shape->softmax_scale,
        .span_blocks = o->segment_tokens / WINNOW_BLOCK_TOKENS,
        .n_sink_blocks = o->n_sinks / WINNOW_BLOCK_TOKENS,
        .ring_blocks = o->segment_tokens / WINNOW_BLOCK_TOKENS + WINNOW_GPU_RING_SLACK_BLOCKS,
        .block_bytes = winnow_block_bytes(shape),
        .n_slots_layer = o->n_slots / shape->n_layers,
        .n_session_segments_max = o->n_session_segments_max,
        .n_fetchers = o->n_fetchers ? o->n_fetchers : 16,
        .n_ahead = 8,
    };

    winnow_gpu_index_layout(&view);
    return view;
}

uint32_t winnow_gpu_layout_partials(const struct winnow_gpu_view *view, uint32_t n_blocks)
{
    uint32_t n_tail = (view->n_sink_blocks + view->ring_blocks + 7) / WINNOW_GROUP_BLOCKS;
    uint32_t n_chunks = (n_blocks + WINNOW_GPU_CHUNK_BLOCKS - 1) / WINNOW_GPU_CHUNK_BLOCKS;

    return n_tail + n_blocks / WINNOW_GROUP_BLOCKS + (n_chunks > 0 ? n_chunks : 1);
}

static void area_add(struct winnow_gpu_layout *layout, void *pointer, uint64_t n_bytes,
                     uint64_t *of)
{
    winnow_assert(layout->n_areas < WINNOW_GPU_AREAS_MAX);
    n_bytes = aligned(n_bytes);
    layout->area[layout->n_areas++] = (struct winnow_gpu_area){(void **)pointer, n_bytes, of};
    layout->n_bytes = plus(layout->n_bytes, n_bytes);
    *of = plus(*of, n_bytes);
}

uint64_t winnow_gpu_layout_in_at(uint32_t n_items)
{
    return aligned(offsetof(struct winnow_gpu_launch, item) +
                   n_items * sizeof(struct winnow_gpu_item));
}

uint64_t winnow_gpu_layout_launch_bytes(const struct winnow_gpu_layout *layout, uint32_t n_items)
{
    return plus(winnow_gpu_layout_in_at(n_items), times(n_items, layout->in_bytes));
}

static void resident_areas(struct winnow_gpu_layout *layout, const struct winnow_gpu_options *o)
{
    struct winnow_gpu_view *view = &layout->view;
    struct winnow_gpu_sizes *sizes = &layout->sizes;
    uint64_t n_heads = times(view->n_layers, view->n_kv_heads);
    uint64_t n_slots = (uint64_t)view->n_slots_layer * view->n_layers + view->n_stage;

    view->segment_bytes = times(n_heads, view->unit_bytes);
    view->session_bytes =
        times(n_heads, times(view->n_sink_blocks + view->ring_blocks, view->block_bytes));
    sizes->segment_bytes = view->segment_bytes;
    sizes->session_bytes = view->session_bytes;
    area_add(layout, &view->index, times(o->n_segments_max, view->segment_bytes),
             &sizes->index_bytes);
    area_add(layout, &view->tails, times(o->n_sessions_max, view->session_bytes),
             &sizes->tail_bytes);
    area_add(layout, &view->slots, times(n_slots, view->block_bytes), &sizes->cache_bytes);
    area_add(layout, &view->slot_word, times(n_slots, sizeof *view->slot_word),
             &sizes->cache_bytes);
    area_add(layout, &view->hand, view->n_layers * sizeof *view->hand, &sizes->other_bytes);
    area_add(layout, &view->counters, view->n_layers * sizeof *view->counters, &sizes->other_bytes);
    area_add(
        layout, &view->session_segments,
        times(times(o->n_sessions_max, o->n_session_segments_max), sizeof *view->session_segments),
        &sizes->other_bytes);
    area_add(layout, &view->past, times(o->n_sessions_max, n_heads * sizeof *view->past),
             &sizes->other_bytes);
}

static void launch_areas(struct winnow_gpu_layout *layout, const struct winnow_gpu_options *o)
{
    struct winnow_gpu_view *view = &layout->view;
    uint64_t *of = &layout->sizes.scratch_bytes, n = layout->n_blocks_max;
    uint64_t n_units = (uint64_t)o->n_items_max * view->n_kv_heads;
    /* of an item without blocks, and what blocks add to it; each unit may round up */
    uint64_t n_partials = plus(times(n_units, winnow_gpu_layout_partials(view, 0) + 1),
                               n / WINNOW_GROUP_BLOCKS + n / WINNOW_GPU_CHUNK_BLOCKS);
    uint64_t partial_floats = winnow_gpu_partial_floats(view);

    /* Threads load the item of their number before they know whether the launch has it. */
    area_add(layout, &view->launch,
             larger(sizeof *view->launch, winnow_gpu_layout_launch_bytes(layout, o->n_items_max)),
             of);
    area_add(layout, &view->q_fragment,
             times(n_units, winnow_gpu_q_fragment_words(view) * sizeof *view->q_fragment), of);
    area_add(layout, &view->unit, times(n_units, sizeof *view->unit), of);
    area_add(layout, &view->tally, sizeof *view->tally, of);
    area_add(layout, &view->unit_tally, times(n_units, sizeof *view->unit_tally), of);
    area_add(layout, &view->queue, sizeof *view->queue, of);
    area_add(layout, &view->ln_e, times(n, view->n_group * sizeof *view->ln_e), of);
    area_add(layout, &view->key, times(n, sizeof *view->key), of);
    area_add(layout, &view->selected, n, of);
    area_add(layout, &view->listed, times(n, sizeof *view->listed), of);
    area_add(layout, &view->ahead, times(view->n_stage, sizeof *view->ahead), of);
    area_add(layout, &view->fetch, times(n, sizeof *view->fetch), of);
    area_add(layout, &view->ready,
             times(plus(n_partials, WINNOW_GPU_READY_SLACK), sizeof *view->ready), of);
    area_add(layout, &view->waiting, times(n_partials, sizeof *view->waiting), of);
    /* two passes over the chunks, and a word for each thread block to end by */
    layout->n_more = plus(times(2, plus(n / WINNOW_GPU_CHUNK_BLOCKS, n_units)),
                          WINNOW_GPU_READY_SLACK);
    area_add(layout, &view->more, times(layout->n_more, sizeof *view->more), of);
    area_add(layout, &view->bins,
             times(times(n_units, view->n_group + 1), WINNOW_GPU_BINS * sizeof *view->bins), of);
    area_add(layout, &view->partial, times(n_partials, partial_floats * sizeof *view->partial), of);
}

/* An array after those before it. */
static void *array_place(uint8_t *memory, uint64_t *at, uint64_t n_bytes)
{
    void *place = (void *)((uintptr_t)memory + *at);
    *at = plus(*at, (n_bytes + 15) / 16 * 16);
    return place;
}

uint64_t winnow_gpu_layout_result(const struct winnow_gpu_view *view, uint8_t *memory,
                                  struct winnow_gpu_result *ret_result)
{
    uint64_t at = 0, n_heads = view->n_kv_heads, n = n_heads * view->span_blocks;
    struct winnow_index_view *index = &ret_result->index;

    *ret_result = (struct winnow_gpu_result){0};
    ret_result->order = array_place(memory, &at, 16 * n * sizeof *ret_result->order);
    index->n_blocks = view->span_blocks;
    index->head = array_place(memory, &at, n * sizeof *index->head);
    index->centroid = array_place(memory, &at, n * view->k_width);
    index->vmean = array_place(memory, &at, n * view->v_width);
    index->code = array_place(memory, &at, 8 * n * view->k_width);
    index->code_scale = array_place(memory, &at, 16 * n * sizeof *index->code_scale);
    index->mean_k = array_place(memory, &at, n_heads * view->k_width * sizeof *index->mean_k);
    index->mean_v = array_place(memory, &at, n_heads * view->v_width * sizeof *index->mean_v);
    index->v_max = array_place(memory, &at, n_heads * sizeof *index->v_max);
    return at;
}

static void build_areas(struct winnow_gpu_layout *layout)
{
    const struct winnow_gpu_view *view = &layout->view;
    uint64_t n_tokens = (uint64_t)view->n_kv_heads * view->span_blocks * WINNOW_BLOCK_TOKENS;
    uint64_t *of = &layout->sizes.build_bytes;
    struct winnow_gpu_result result;

    layout->build_keys_bytes = aligned(n_tokens * view->k_width * 2);
    layout->build_rows_bytes = layout->build_keys_bytes + aligned(n_tokens * view->v_width * 2);
    layout->build_result_bytes = aligned(winnow_gpu_layout_result(view, NULL, &result));
    layout->build_scratch_bytes =
        aligned(view->n_kv_heads * winnow_gpu_build_scratch_bytes(view->span_blocks));
    area_add(layout, &layout->build_rows, WINNOW_GPU_BUILDS_MAX * layout->build_rows_bytes, of);
    area_add(layout, &layout->build_result, WINNOW_GPU_BUILDS_MAX * layout->build_result_bytes, of);
    area_add(layout, &layout->build_scratch, WINNOW_GPU_BUILDS_MAX * layout->build_scratch_bytes,
             of);
}

uint64_t winnow_gpu_layout_window(const struct winnow_gpu_window_view *view, uint32_t n_pos,
                                  uint8_t *memory, struct winnow_gpu_window_rows *ret_rows,
                                  struct winnow_gpu_window_list *ret_list)
{
    uint64_t at = 0, n_rows = (uint64_t)view->n_kv_heads * n_pos * view->n_group;
    uint64_t n_heads = view->n_kv_heads, n = view->n_blocks_max;
    uint32_t width = view->k_width > view->v_width ? view->k_width : view->v_width;

    ret_rows->q = ret_rows->out = array_place(memory, &at, n_rows * width * sizeof(float));
    ret_rows->lse = array_place(memory, &at, n_rows * sizeof(float));
    for (uint32_t i = 0; i < WINNOW_GPU_WINDOW_STAGES; i++) {
        ret_list[i].n_blocks = array_place(memory, &at, n_heads * sizeof(uint32_t));
        ret_list[i].n_tokens = array_place(memory, &at, n * sizeof(uint32_t));
        ret_list[i].position = array_place(memory, &at, n * sizeof(uint64_t));
        ret_list[i].home = array_place(memory, &at, n_heads * n * sizeof(uint32_t));
    }
    return at;
}

static void window_areas(struct winnow_gpu_layout *layout, const struct winnow_gpu_options *o)
{
    const struct winnow_gpu_view *view = &layout->view;
    struct winnow_gpu_window_view *window = &layout->window;
    uint64_t *of = &layout->sizes.window_bytes, n_tile, n_rows;

    n_tile = winnow_gpu_window_tile_rows(view->k_width, view->v_width);
    n_rows = (o->n_window_positions * view->n_group + n_tile - 1) / n_tile * n_tile;
    *window = (struct winnow_gpu_window_view){
        .n_kv_heads = view->n_kv_heads,
        .n_group = view->n_group,
        .k_width = view->k_width,
        .v_width = view->v_width,
        .kv_dtype = view->kv_dtype,
        .n_parts = view->io_dtype == view->kv_dtype ? 1 : 2,
        .softmax_scale = view->softmax_scale,
        .n_rows_max = (uint32_t)n_rows,
        .n_blocks_max = o->n_window_blocks,
    };
    if (o->n_window_positions == 0)
        return;
    n_rows *= view->n_kv_heads;
    area_add(layout, &window->query, n_rows * window->n_parts * view->k_width * 2, of);
    area_add(layout, &window->row_scale, n_rows * sizeof *window->row_scale, of);
    area_add(layout, &window->lse, n_rows * sizeof *window->lse, of);
    area_add(layout, &window->sum, n_rows * WINNOW_GPU_WINDOW_SUM_BYTES, of);
    area_add(layout, &window->output,
             n_rows * winnow_gpu_window_width(view->k_width, view->v_width) * sizeof(float), of);
    for (uint32_t i = 0; i < WINNOW_GPU_WINDOW_STAGES; i++) {
        struct winnow_gpu_window_stage *stage = &window->stage[i];
        uint64_t n = o->n_window_blocks;
        area_add(layout, &stage->list.n_blocks, view->n_kv_heads * sizeof(uint32_t), of);
        area_add(layout, &stage->list.n_tokens, n * sizeof(uint32_t), of);
        area_add(layout, &stage->list.position, n * sizeof(uint64_t), of);
        area_add(layout, &stage->block, n * view->n_kv_heads * (view->k_width + view->v_width) * 32,
                 of);
    }
    struct winnow_gpu_window_rows rows;
    struct winnow_gpu_window_list list[WINNOW_GPU_WINDOW_STAGES];
    layout->sizes.window_host_bytes =
        winnow_gpu_layout_window(window, o->n_window_positions, NULL, &rows, list);
}

static void item_layout(struct winnow_gpu_layout *layout)
{
    const struct winnow_gpu_view *view = &layout->view;
    uint64_t element_bytes = view->io_dtype == WINNOW_FP32 ? 4 : 2;
    uint64_t q_bytes = aligned(times(view->n_q_heads, view->k_width * element_bytes));
    uint64_t k_bytes = aligned(times(view->n_kv_heads, view->k_width * element_bytes));
    uint64_t v_bytes = aligned(times(view->n_kv_heads, view->v_width * element_bytes));

    layout->k_at = q_bytes;
    layout->v_at = plus(q_bytes, k_bytes);
    layout->in_bytes = plus(layout->v_at, v_bytes);
    layout->lse_at = aligned(times(view->n_q_heads, view->v_width * element_bytes));
    layout->certificate_at = plus(layout->lse_at, aligned(view->n_q_heads * sizeof(float)));
    layout->out_bytes =
        plus(layout->certificate_at, aligned(sizeof(struct winnow_gpu_certificate)));
}

int winnow_gpu_layout_init(struct winnow_gpu_layout *layout,
                           const struct winnow_gpu_options *options, char text[256])
{
    int rc = check_options(options, text);

    *layout = (struct winnow_gpu_layout){0};
    if (rc == 0)
        rc = check_ranges(options, text);
    if (rc < 0)
        return rc;
    layout->view = view_of(options);
    layout->n_blocks_max = options->n_launch_blocks_max * options->shape.n_kv_heads;
    layout->view.n_stage = (uint32_t)(layout->n_blocks_max / STAGE_EACH);
    item_layout(layout);
    resident_areas(layout, options);
    build_areas(layout);
    window_areas(layout, options);
    launch_areas(layout, options);
    if (layout->n_bytes > UINT64_C(1) << 48) {
        snprintf(text, 256,
                 "n_segments_max %u, n_sessions_max %u, n_slots %u: together above "
                 "256 TiB",
                 options->n_segments_max, options->n_sessions_max, options->n_slots);
        return -EOVERFLOW;
    }
    return 0;
}

void winnow_gpu_layout_place(struct winnow_gpu_layout *layout, uint8_t *memory)
{
    for (uint32_t i = 0; i < layout->n_areas; i++) {
        *layout->area[i].pointer = memory;
        memory += layout->area[i].n_bytes;
    }
}

int winnow_gpu_sizes(const struct winnow_gpu_options *options, struct winnow_gpu_sizes *sizes,
                     char text[256])
{
    struct winnow_gpu_layout layout;
    int rc = winnow_gpu_layout_init(&layout, options, text);

    if (rc < 0)
        return rc;
    *sizes = layout.sizes;
    const double mib = 0x1p-20;
    snprintf(
        text, 256,
        "index %u segments x %.2f MiB, cache %u slots x %u bytes, tails %u sessions x %.2f "
        "MiB, launch %.2f MiB, builds %.2f MiB, window %u positions %.2f MiB, tables %.2f MiB: "
        "%.2f GiB",
        options->n_segments_max, (double)sizes->segment_bytes * mib, options->n_slots,
        layout.view.block_bytes, options->n_sessions_max, (double)sizes->session_bytes * mib,
        (double)sizes->scratch_bytes * mib, (double)sizes->build_bytes * mib,
        options->n_window_positions, (double)sizes->window_bytes * mib,
        (double)sizes->other_bytes * mib, (double)layout.n_bytes * 0x1p-30);
    return 0;
}
