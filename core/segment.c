#include <assert.h>
#include <base/assert.h>
#include <core/device.h>
#include <core/segment.h>
#include <errno.h>
#include <string.h>

static_assert(_Alignof(struct winnow_segment) <= 64, "it begins a page; block_crc follows it");
static_assert(_Alignof(struct winnow_block_head) <= 64, "arrays are cut at 64 bytes");
static_assert(WINNOW_BLOCK_TOKENS % 2 == 0, "two codes a byte");
static size_t align_64(size_t n_bytes)
{
    return (n_bytes + 63) & ~(size_t)63;
}

/* Sizes of one KV head's arrays, in the order in which they lie. */
struct layout {
    size_t head, centroid, vmean, code, code_scale, var, order, mean_k, mean_v, v_max, total;
};

static struct layout head_layout(const struct winnow_model_shape *shape, uint32_t n_blocks,
                                 bool with_var)
{
    struct layout layout = {0};
    size_t at = 0, n = n_blocks;
    layout.head = at, at += align_64(n * sizeof(struct winnow_block_head));
    layout.centroid = at, at += align_64(n * shape->k_width);
    layout.vmean = at, at += align_64(n * shape->v_width);
    layout.code = at, at += align_64(n * shape->k_width * WINNOW_BLOCK_TOKENS / 2);
    layout.code_scale = at, at += align_64(n * WINNOW_BLOCK_TOKENS * 2);
    layout.var = at, at += with_var ? align_64(n * shape->k_width * 2) : 0;
    layout.order = at, at += align_64(n * WINNOW_BLOCK_TOKENS * 2);
    layout.mean_k = at, at += align_64(shape->k_width * sizeof(float));
    layout.mean_v = at, at += align_64(shape->v_width * sizeof(float));
    layout.v_max = at, at += align_64(sizeof(float));
    layout.total = at;
    return layout;
}

size_t winnow_segment_piece_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks,
                                  bool with_var)
{
    size_t place_bytes = align_64((size_t)shape->n_kv_heads * n_blocks * sizeof(uint32_t));
    return head_layout(shape, n_blocks, with_var).total * shape->n_kv_heads + place_bytes;
}

static size_t crc_offset(const struct winnow_model_shape *shape)
{
    return align_64(sizeof(struct winnow_segment) +
                    shape->n_layers * sizeof(struct winnow_segment_layer));
}

size_t winnow_segment_header_bytes(const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    return crc_offset(shape) +
           (size_t)shape->n_layers * shape->n_kv_heads * n_blocks * sizeof(uint32_t);
}

void winnow_tiers_init(struct winnow_tiers *tiers)
{
    *tiers = (struct winnow_tiers){0};
    tiers->spill_last = &tiers->spill_first;
}

struct winnow_segment *winnow_segment_create(struct winnow_tiers *tiers,
                                             const struct winnow_model_shape *shape,
                                             uint32_t n_blocks, uint64_t first_token, bool with_var)
{
    winnow_assert(n_blocks > 0);
    winnow_assert(first_token % WINNOW_BLOCK_TOKENS == 0);
    size_t header_bytes = winnow_segment_header_bytes(shape, n_blocks);
    struct winnow_segment *segment = winnow_index_memory_take(tiers->index, header_bytes);
    if (!segment)
        return NULL;
    memset(segment, 0, header_bytes);
    segment->tiers = tiers;
    segment->shape = *shape;
    segment->n_refs = 1;
    segment->n_blocks = n_blocks;
    segment->block_bytes = winnow_block_bytes(shape);
    segment->with_var = with_var;
    segment->first_token = first_token;
    segment->block_crc = (uint32_t *)(void *)((uint8_t *)segment + crc_offset(shape));
    segment->header_bytes = header_bytes;
    segment->piece_bytes = winnow_segment_piece_bytes(shape, n_blocks, with_var);
    for (uint32_t layer = 0; layer < shape->n_layers; layer++)
        segment->layer[layer].segment = segment;
    return segment;
}

void winnow_segment_ref(struct winnow_segment *segment)
{
    winnow_assert(segment->n_refs > 0);
    segment->n_refs++;
}

static void spill_list_leave(struct winnow_tiers *tiers, struct winnow_segment_layer *layer)
{
    struct winnow_segment_layer **at = &tiers->spill_first;
    while (*at != layer) {
        winnow_assert(*at); /* it is in the list */
        at = &(*at)->next_spill;
    }
    *at = layer->next_spill;
    if (tiers->spill_last == &layer->next_spill)
        tiers->spill_last = at;
    layer->waits_to_spill = false;
}

void winnow_segment_layer_give(struct winnow_segment *segment, uint32_t layer)
{
    winnow_assert(layer < segment->shape.n_layers);
    winnow_index_memory_give(segment->tiers->index, segment->layer[layer].piece,
                             segment->piece_bytes);
    segment->layer[layer].piece = NULL;
}

static void layer_drop(struct winnow_segment *segment, uint32_t layer)
{
    struct winnow_segment_layer *state = &segment->layer[layer];
    winnow_assert(state->segment == segment);
    winnow_assert(state->n_writes == 0);
    if (state->waits_to_spill)
        spill_list_leave(segment->tiers, state);
    if (state->in_force) {
        uint32_t *place = winnow_segment_place(segment, layer);
        for (uint32_t i = 0; i < segment->shape.n_kv_heads * segment->n_blocks; i++)
            if (place[i]) {
                winnow_arena_drop(segment->tiers->arena, place[i] - 1);
                state->n_places--;
            }
        winnow_assert(state->n_places == 0);
    }
    winnow_segment_layer_give(segment, layer);
}

void winnow_segment_unref(struct winnow_segment *segment)
{
    winnow_assert(segment->n_refs > 0);
    if (--segment->n_refs > 0)
        return;
    for (uint32_t layer = 0; layer < segment->shape.n_layers; layer++)
        layer_drop(segment, layer);
    winnow_device_segment_end(segment->tiers->device, segment);
    if (segment->stored && segment->tiers->store) {
        winnow_store_segment_destroy(segment->tiers->store, segment->stored);
        segment->tiers->spill_refused = false;
    }
    winnow_index_memory_give(segment->tiers->index, segment, segment->header_bytes);
}

int winnow_segment_layer_take(struct winnow_segment *segment, uint32_t layer)
{
    winnow_assert(layer < segment->shape.n_layers);
    winnow_assert(!segment->layer[layer].in_force);
    winnow_assert(!segment->layer[layer].piece);
    uint8_t *piece = winnow_index_memory_take(segment->tiers->index, segment->piece_bytes);
    if (!piece)
        return -EDQUOT;
    segment->layer[layer].piece = piece;
    memset(winnow_segment_place(segment, layer), 0,
           (size_t)segment->shape.n_kv_heads * segment->n_blocks * sizeof(uint32_t));
    return 0;
}

static uint8_t *head_base(const struct winnow_segment *segment, uint32_t layer, uint32_t head,
                          struct layout *layout)
{
    winnow_assert(layer < segment->shape.n_layers);
    winnow_assert(head <= segment->shape.n_kv_heads);
    winnow_assert(segment->layer[layer].piece);
    *layout = head_layout(&segment->shape, segment->n_blocks, segment->with_var);
    return segment->layer[layer].piece + head * layout->total;
}

void winnow_segment_view(const struct winnow_segment *segment, uint32_t layer, uint32_t head,
                         struct winnow_index_view *view)
{
    winnow_assert(head < segment->shape.n_kv_heads);
    struct layout layout;
    uint8_t *base = head_base(segment, layer, head, &layout);
    *view = (struct winnow_index_view){
        .n_blocks = segment->n_blocks,
        .head = (void *)(base + layout.head),
        .centroid = (void *)(base + layout.centroid),
        .vmean = (void *)(base + layout.vmean),
        .code = base + layout.code,
        .code_scale = (void *)(base + layout.code_scale),
        .var = segment->with_var ? (void *)(base + layout.var) : NULL,
        .mean_k = (void *)(base + layout.mean_k),
        .mean_v = (void *)(base + layout.mean_v),
        .v_max = (void *)(base + layout.v_max),
    };
}

uint16_t *winnow_segment_order(const struct winnow_segment *segment, uint32_t layer, uint32_t head)
{
    winnow_assert(head < segment->shape.n_kv_heads);
    struct layout layout;
    uint8_t *base = head_base(segment, layer, head, &layout);
    return (void *)(base + layout.order);
}

uint32_t *winnow_segment_place(const struct winnow_segment *segment, uint32_t layer)
{
    struct layout layout;
    return (void *)head_base(segment, layer, segment->shape.n_kv_heads, &layout);
}

void winnow_segment_evicted(void *segment, uint32_t block_idx)
{
    struct winnow_segment *s = segment;
    uint32_t blocks_per_layer = s->shape.n_kv_heads * s->n_blocks;
    uint32_t *place = winnow_segment_place(s, block_idx / blocks_per_layer);
    winnow_assert(s->n_refs > 0);
    winnow_assert(s->layer[block_idx / blocks_per_layer].in_force);
    winnow_assert(s->layer[block_idx / blocks_per_layer].n_places > 0);
    winnow_assert(place[block_idx % blocks_per_layer] != 0);
    place[block_idx % blocks_per_layer] = 0;
    s->layer[block_idx / blocks_per_layer].n_places--;
    winnow_device_block_moved(s->tiers->device, s, block_idx);
}
