/*
 * What the tests of ref share: a shape, a segment with its memory, a selection with its memory.
 * Random values come from the rng given; nothing here judges.
 */
#pragma once

#include "test.h"

#include <base/alloc.h>
#include <base/rng.h>
#include <kernels/kernels.h>

static inline struct winnow_model_shape fixture_shape(uint32_t n_q, uint32_t k_width,
                                                      uint32_t v_width, uint32_t dtype)
{
    return (struct winnow_model_shape){
        .n_layers = 1,
        .n_q_heads = n_q,
        .n_kv_heads = 1,
        .k_width = k_width,
        .v_width = v_width,
        .softmax_scale = 1 / sqrtf((float)k_width),
        .kv_dtype = dtype,
        .io_dtype = WINNOW_FP32,
        .block_layout = WINNOW_BLOCK_LAYOUT,
    };
}

static inline float *fixture_normal(struct winnow_rng *rng, size_t n, double scale)
{
    float *x = winnow_alloc_array(n, sizeof *x);
    CHECK(x);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(scale * winnow_rng_normal(rng));
    return x;
}

struct fixture_segment {
    struct winnow_model_shape shape;
    uint32_t n_tokens;
    float *k, *v; /* [n_tokens][width] */
    uint16_t *order;
    struct winnow_index_view view;
    void *scratch;
};

/* Memory of a segment and its index, poisoned; k and v are filled by the caller. */
static inline void fixture_segment_init(struct fixture_segment *segment,
                                        const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    struct winnow_index_view *view = &segment->view;
    size_t n = n_blocks, k_width = shape->k_width, v_width = shape->v_width;

    *segment = (struct fixture_segment){.shape = *shape, .n_tokens = 16 * n_blocks};
    segment->k = winnow_alloc_array(16 * n * k_width, sizeof(float));
    segment->v = winnow_alloc_array(16 * n * v_width, sizeof(float));
    segment->order = winnow_alloc_array(16 * n, sizeof *segment->order);
    segment->scratch = winnow_alloc(winnow_kernels_ref()->scratch_bytes(shape, n_blocks));
    *view = (struct winnow_index_view){
        .n_blocks = n_blocks,
        .head = winnow_alloc_array(n, sizeof *view->head),
        .centroid = winnow_alloc(n * k_width),
        .vmean = winnow_alloc(n * v_width),
        .code = winnow_alloc(n * 8 * k_width),
        .code_scale = winnow_alloc_array(n * 16, sizeof *view->code_scale),
        .var = winnow_alloc_array(n * k_width, sizeof *view->var),
        .mean_k = winnow_alloc_array(k_width, sizeof *view->mean_k),
        .mean_v = winnow_alloc_array(v_width, sizeof *view->mean_v),
        .v_max = winnow_alloc(sizeof *view->v_max),
    };
    memset(view->code, 0x5a, n * 8 * k_width);
    memset(view->centroid, 0x5a, n * k_width);
    memset(segment->order, 0xff, 16 * n * sizeof *segment->order);
}

static inline void fixture_segment_finish(struct fixture_segment *segment)
{
    struct winnow_index_view *view = &segment->view;
    void *owned[] = {segment->k,     segment->v,   segment->order, segment->scratch, view->head,
                     view->centroid, view->vmean,  view->code,     view->code_scale, view->var,
                     view->mean_k,   view->mean_v, view->v_max};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
        winnow_alloc_free(owned[i]);
}

static inline int fixture_segment_build(struct fixture_segment *segment)
{
    return winnow_kernels_ref()->build(&segment->shape, segment->view.n_blocks, segment->k,
                                       segment->v, segment->order, &segment->view,
                                       segment->scratch);
}

/* The stored centroid of block b, and what the code keeps of its token t. */
static inline float fixture_centroid(const struct fixture_segment *segment, uint32_t b, uint32_t d)
{
    const struct winnow_index_view *view = &segment->view;
    return (float)view->centroid[b * segment->shape.k_width + d] * view->head[b].centroid_scale;
}

static inline int fixture_code(const struct fixture_segment *segment, uint32_t b, uint32_t t,
                               uint32_t d)
{
    const uint8_t *code = segment->view.code + (size_t)b * 8 * segment->shape.k_width;
    uint8_t pair = code[(d / 8 * 16 + t) * 4 + d % 4];
    return (d % 8 < 4 ? pair & 15 : pair >> 4) - 8;
}

struct fixture_selection {
    struct winnow_selection sel;
    float *ln_z, *ln_m;
    void *scratch;
};

static inline void fixture_selection_init(struct fixture_selection *f, uint32_t n_q,
                                          uint32_t n_blocks, float mass)
{
    struct winnow_model_shape shape = fixture_shape(n_q, 64, 64, WINNOW_FP16);
    size_t n = n_blocks;

    f->ln_z = winnow_alloc_array(n_q, sizeof(float));
    f->ln_m = winnow_alloc_array(n * n_q, sizeof(float));
    f->scratch = winnow_alloc(winnow_kernels_ref()->scratch_bytes(&shape, n_blocks));
    f->sel = (struct winnow_selection){
        .n_q = n_q,
        .n_blocks = n_blocks,
        .n_blocks_max = n_blocks,
        .n_selected = UINT32_MAX,
        .n_reserve = UINT32_MAX,
        .mass = mass,
        .ln_z = f->ln_z,
        .ln_m = f->ln_m,
        .ln_e = winnow_alloc_array(n * n_q, sizeof(float)),
        .ln_key = winnow_alloc_array(n, sizeof(float)),
        .block_idx = winnow_alloc_array(n, sizeof(uint32_t)),
        .selected = winnow_alloc(n),
    };
    memset(f->sel.selected, 0xff, n);
    memset(f->sel.block_idx, 0xff, n * sizeof(uint32_t));
}

static inline void fixture_selection_finish(struct fixture_selection *f)
{
    void *owned[] = {f->ln_z,       f->ln_m,          f->scratch,     f->sel.ln_e,
                     f->sel.ln_key, f->sel.block_idx, f->sel.selected};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
        winnow_alloc_free(owned[i]);
}
