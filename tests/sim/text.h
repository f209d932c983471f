/*
 * A text: one session of a world, driven by one hand, for tests that know what they want to see.
 */
#pragma once

#include "inside.h"

#include <errno.h>

enum { SIM_TEXT_TOKENS = 4096 };

struct sim_text {
    struct sim_world *world;
    struct sim_model model;
    uint64_t token[SIM_TEXT_TOKENS];
    uint64_t id;
    uint32_t epoch;
    int64_t within_ns;          /* deadline of each request from its start; 0: none */
    uint64_t seq;               /* of decode steps; 0: not told */
    float q_scale;              /* of their queries: small ones make flat heads, which want much */
    struct winnow_request last; /* as it ended */
};

static inline struct winnow_model_shape sim_shape(uint32_t n_layers, uint32_t n_kv_heads,
                                                  uint32_t group, uint32_t width, uint32_t kv_dtype)
{
    return (struct winnow_model_shape){.n_layers = n_layers,
                                       .n_kv_heads = n_kv_heads,
                                       .n_q_heads = n_kv_heads * group,
                                       .k_width = width,
                                       .v_width = width,
                                       .softmax_scale = 1 / sqrtf((float)width),
                                       .kv_dtype = kv_dtype,
                                       .io_dtype = WINNOW_FP32};
}

static inline void sim_text_init(struct sim_text *text, struct sim_world *world,
                                 const struct winnow_model_shape *shape, uint64_t seed)
{
    struct winnow_rng rng;
    *text = (struct sim_text){.world = world, .q_scale = 1, .model = {*shape, seed, 2}};
    winnow_rng_init(&rng, seed);
    for (uint32_t i = 0; i < SIM_TEXT_TOKENS; i++)
        text->token[i] = sim_token_make(&rng, i ? text->token[i - 1] : 0);
}

static inline int sim_text_run(struct sim_text *text, struct winnow_request *request)
{
    request->session_id = text->id;
    request->epoch = text->epoch;
    request->deadline_ns =
        text->within_ns ? sim_world_now(text->world) + text->within_ns : WINNOW_NEVER_NS;
    int rc = sim_world_run(text->world, request);
    text->last = *request;
    if (rc < 0)
        CHECK(request->text[0]);
    return rc;
}

static inline int sim_text_open(struct sim_text *text, const struct winnow_session_options *options)
{
    struct winnow_request open = {.kind = WINNOW_REQUEST_OPEN};
    open.open.shape = text->model.shape;
    if (options)
        open.open.options = *options;
    int rc = sim_text_run(text, &open);
    text->id = open.open.ret_session_id;
    text->epoch = open.epoch;
    return rc;
}

/* A window of one layer; out [n][Hq][v_width] fp32, or NULL: an Append. */
static inline int sim_text_window(struct sim_text *text, uint32_t layer, uint64_t first, uint32_t n,
                                  float *out)
{
    const struct winnow_model_shape *shape = &text->model.shape;
    float *q = malloc(sizeof(float) * n * shape->n_q_heads * shape->k_width);
    float *k = malloc(sizeof(float) * n * shape->n_kv_heads * shape->k_width);
    float *v = malloc(sizeof(float) * n * shape->n_kv_heads * shape->v_width);
    sim_rows(&text->model, SIM_Q, layer, text->token + first, n, q);
    sim_rows(&text->model, SIM_K, layer, text->token + first, n, k);
    sim_rows(&text->model, SIM_V, layer, text->token + first, n, v);
    struct winnow_request exact = {
        .kind = WINNOW_REQUEST_EXACT,
        .exact = {
            .layer = layer, .n_tokens = n, .first = first, .q = q, .k = k, .v = v, .out = out}};
    struct winnow_request append = {
        .kind = WINNOW_REQUEST_APPEND,
        .append = {.layer = layer, .n_tokens = n, .first = first, .k = k, .v = v}};
    int rc = sim_text_run(text, out ? &exact : &append);
    free(q), free(k), free(v);
    return rc;
}

/* Tokens [first, end) of all layers by Appends of at most n. The first error, or 0. */
static inline int sim_text_fill(struct sim_text *text, uint64_t first, uint64_t end, uint32_t n)
{
    int rc = 0;
    for (uint64_t at = first; rc == 0 && at < end; at += n)
        for (uint32_t layer = 0; rc == 0 && layer < text->model.shape.n_layers; layer++)
            rc = sim_text_window(text, layer, at, end - at < n ? (uint32_t)(end - at) : n, NULL);
    return rc;
}

struct sim_step {
    struct winnow_request request;
    float q[64 * 256], k[64 * 256], v[64 * 256];
};

static inline void sim_text_step_make(struct sim_text *text, struct sim_step *step, uint32_t layer,
                                      uint64_t position, float mass, float *out)
{
    uint32_t n_q = text->model.shape.n_q_heads * text->model.shape.k_width;
    sim_rows(&text->model, SIM_Q, layer, text->token + position, 1, step->q);
    for (uint32_t i = 0; i < n_q; i++)
        step->q[i] *= text->q_scale;
    sim_rows(&text->model, SIM_K, layer, text->token + position, 1, step->k);
    sim_rows(&text->model, SIM_V, layer, text->token + position, 1, step->v);
    step->request = (struct winnow_request){.kind = WINNOW_REQUEST_ATTEND,
                                            .session_id = text->id,
                                            .epoch = text->epoch,
                                            .deadline_ns = WINNOW_NEVER_NS,
                                            .attend = {.layer = layer,
                                                       .flags = WINNOW_ITEM_HAS_KV,
                                                       .position = position,
                                                       .seq = text->seq,
                                                       .mass = mass,
                                                       .q = step->q,
                                                       .k = step->k,
                                                       .v = step->v,
                                                       .out = out}};
}

/* A decode step of one layer; out [Hq][v_width]. */
static inline int sim_text_step(struct sim_text *text, uint32_t layer, uint64_t position,
                                float mass, float *out)
{
    static struct sim_step step;
    sim_text_step_make(text, &step, layer, position, mass, out);
    return sim_text_run(text, &step.request);
}

static inline int sim_text_truncate(struct sim_text *text, uint64_t n_tokens)
{
    struct winnow_request truncate = {.kind = WINNOW_REQUEST_TRUNCATE,
                                      .truncate = {.n_tokens = n_tokens}};
    int rc = sim_text_run(text, &truncate);
    if (rc == 0)
        text->epoch = truncate.epoch;
    return rc;
}

static inline int sim_text_close(struct sim_text *text)
{
    struct winnow_request close = {.kind = WINNOW_REQUEST_CLOSE};
    return sim_text_run(text, &close);
}

static inline int sim_text_fork(struct sim_text *text, struct sim_text *fork)
{
    struct winnow_request request = {.kind = WINNOW_REQUEST_FORK};
    int rc = sim_text_run(text, &request);
    if (rc == 0) {
        *fork = *text;
        fork->id = request.fork.ret_session_id;
        fork->epoch = request.epoch;
    }
    return rc;
}

/* A request under way: sent, not waited for. */
static inline void sim_text_send(struct sim_text *text, struct winnow_request *request,
                                 int64_t within_ns, bool *done)
{
    *done = false;
    request->session_id = text->id;
    request->epoch = text->epoch;
    request->deadline_ns = within_ns ? sim_world_now(text->world) + within_ns : WINNOW_NEVER_NS;
    request->done = sim_request_done;
    request->user = done;
    CHECK_EQ(sim_world_submit(text->world, request), 0);
}

/* A world with a disk, and a text of 24 MiB in a pool of 16. */
static inline void sim_text_spilled(struct sim_text *text, struct sim_world *world,
                                    const struct sim_options *options)
{
    struct winnow_model_shape shape = sim_shape(4, 2, 2, 256, WINNOW_FP32);
    struct sim_options with_disk = *options;
    with_disk.disk_cap_bytes = options->disk_cap_bytes ? options->disk_cap_bytes : 64 << 20;
    with_disk.data_file_bytes = 4 << 20;
    sim_world_init(world, &with_disk);
    sim_text_init(text, world, &shape, options->seed);
    CHECK_EQ(sim_text_open(text, NULL), 0);
    CHECK_EQ(sim_text_fill(text, 0, 1500, 128), 0);
    sim_world_settle(world);
}

static inline double sim_text_error(const struct sim_text *text, uint32_t layer, uint64_t position,
                                    const float *out)
{
    return sim_error(&text->model, layer, text->token, position, out);
}
