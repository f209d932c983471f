/*
 * Decode items of a scene: their memory, one launch of them, and whether two results have the same
 * bits.
 */
#pragma once

#include "gpu_scene.h"

/* A decode item and its memory, poisoned, between guards. */
struct scene_item {
    struct winnow_gpu_item item;
    struct winnow_gpu_certificate certificate;
    uint8_t *memory, *q, *k, *v, *out;
    float *lse, *wide; /* wide: out as fp32 */
    uint32_t *disk_block, n_disk_block_max;
};

enum { SCENE_GUARD_BYTES = 64 };

static inline size_t scene_io_bytes(const struct scene *scene)
{
    return scene->of.shape.io_dtype == WINNOW_FP32 ? 4 : 2;
}

static inline size_t scene_out_bytes(const struct scene *scene)
{
    return (size_t)scene->of.shape.n_q_heads * scene->of.shape.v_width * scene_io_bytes(scene);
}

static inline void scene_item_init(const struct scene *scene, struct scene_item *item,
                                   uint32_t session, uint32_t layer, uint32_t query, float mass)
{
    const struct winnow_model_shape *shape = &scene->of.shape;
    size_t io = scene_io_bytes(scene), n_group_k = scene->n_group * shape->k_width;
    size_t out_bytes = scene_out_bytes(scene);

    *item = (struct scene_item){0};
    item->n_disk_block_max = scene->of.n_segments[session] * scene->span * shape->n_kv_heads;
    item->q = case_alloc(shape->n_q_heads * shape->k_width * io);
    item->k = case_alloc(shape->n_kv_heads * shape->k_width * io);
    item->v = case_alloc(shape->n_kv_heads * shape->v_width * io);
    item->lse = case_alloc(shape->n_q_heads * sizeof(float));
    item->wide = case_alloc((size_t)shape->n_q_heads * shape->v_width * sizeof(float));
    item->disk_block = case_alloc((item->n_disk_block_max + 1) * sizeof(uint32_t));
    item->memory = case_alloc(out_bytes + 2 * SCENE_GUARD_BYTES);
    memset(item->memory, 0xa5, out_bytes + 2 * SCENE_GUARD_BYTES);
    item->out = item->memory + SCENE_GUARD_BYTES;
    for (uint32_t h = 0; h < shape->n_kv_heads; h++) {
        const struct kernel_data *data = &scene_head(scene, session, layer, h)->data;
        size_t last = scene_n_tokens(scene, session) - 1;
        scene->ref->from_float(shape->io_dtype, n_group_k, data->q + query * n_group_k,
                               item->q + h * n_group_k * io);
        scene->ref->from_float(shape->io_dtype, shape->k_width, data->k + last * shape->k_width,
                               item->k + h * shape->k_width * io);
        scene->ref->from_float(shape->io_dtype, shape->v_width, data->v + last * shape->v_width,
                               item->v + h * shape->v_width * io);
    }
    item->item = (struct winnow_gpu_item){
        .session = session,
        .layer = layer,
        .n_segments = scene->of.n_segments[session],
        .n_tokens = scene_n_tokens(scene, session),
        .mass = mass,
        .q = item->q,
        .out = item->out,
        .lse = item->lse,
        .certificate = &item->certificate,
        .disk_block = item->disk_block,
        .n_disk_block_max = item->n_disk_block_max,
    };
}

static inline void scene_item_finish(const struct scene *scene, struct scene_item *item)
{
    for (size_t i = 0; i < SCENE_GUARD_BYTES; i++) {
        CHECK_EQ(item->memory[i], 0xa5);
        CHECK_EQ(item->out[scene_out_bytes(scene) + i], 0xa5);
    }
    winnow_alloc_free(item->q);
    winnow_alloc_free(item->k);
    winnow_alloc_free(item->v);
    winnow_alloc_free(item->lse);
    winnow_alloc_free(item->wide);
    winnow_alloc_free(item->disk_block);
    winnow_alloc_free(item->memory);
}

/* One launch of n items, waited for. */
static inline void scene_decode(const struct scene *scene, struct winnow_gpu *gpu, uint32_t n,
                                struct scene_item *items)
{
    struct winnow_gpu_item list[SCENE_SESSIONS_MAX];

    for (uint32_t i = 0; i < n; i++)
        list[i] = items[i].item;
    int64_t ticket = api->decode(gpu, n, list);
    CHECK(ticket > 0);
    CHECK_EQ(api->poll(gpu, ticket, true), 1);
    for (uint32_t i = 0; i < n; i++)
        winnow_ref_widen(scene->of.shape.io_dtype,
                         (size_t)scene->of.shape.n_q_heads * scene->of.shape.v_width, items[i].out,
                         items[i].wide);
}

/* The same bits: output, lse and certificate but for where blocks were found. */
static inline void scene_same(const struct scene *scene, const struct scene_item *a,
                              const struct scene_item *b)
{
    const struct winnow_gpu_certificate *x = &a->certificate, *y = &b->certificate;

    CHECK_EQ(x->status, y->status);
    CHECK_EQ(x->n_rounds, y->n_rounds);
    CHECK_EQ(x->n_blocks_device + x->n_blocks_host + x->n_blocks_disk,
             y->n_blocks_device + y->n_blocks_host + y->n_blocks_disk);
    CHECK(!memcmp(a->out, b->out, scene_out_bytes(scene)));
    CHECK(!memcmp(a->lse, b->lse, scene->of.shape.n_q_heads * sizeof(float)));
    CHECK(!memcmp(&x->mass_reached, &y->mass_reached, sizeof(float)));
}
