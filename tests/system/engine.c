#include <system/engine.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Noreturn void engine_fail(const char *file, int line, const char *call, int error)
{
    fprintf(stderr, "%s:%d: %s: %s (%s)\n", file, line, call, strerror(-error),
            winnow_error_text());
    exit(1);
}

/* ---- numbers ---- */

static uint64_t mix(uint64_t x) /* splitmix64's finaliser */
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* Multiples of 1/64 in [-2, 2): exact in fp16 and in bf16. */
static float draw(uint64_t seed, uint64_t what, uint64_t layer, uint64_t token, uint64_t i)
{
    uint64_t bits = mix(mix(mix(mix(seed ^ what << 56) + layer) + token) + i);
    return (float)((int)(bits & 255) - 128) / 64.0F;
}

static size_t dtype_bytes(uint32_t dtype)
{
    return dtype == WINNOW_DTYPE_FP32 ? 4 : 2;
}

static uint16_t to_fp16(float value)
{
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

static uint16_t to_bf16(float value) /* round to nearest even; finite values */
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_io(const void *data, size_t i, uint32_t dtype)
{
    uint16_t half;
    float value;
    if (dtype == WINNOW_DTYPE_FP32) {
        memcpy(&value, (const char *)data + 4 * i, 4);
        return value;
    }
    memcpy(&half, (const char *)data + 2 * i, 2);
    if (dtype == WINNOW_DTYPE_BF16) {
        uint32_t bits = (uint32_t)half << 16;
        memcpy(&value, &bits, 4);
        return value;
    }
    _Float16 fp16;
    memcpy(&fp16, &half, 2);
    return (float)fp16;
}

static void to_io(const float *from, size_t n_values, uint32_t dtype, void *to)
{
    for (size_t i = 0; i < n_values; i++) {
        uint16_t half = dtype == WINNOW_DTYPE_BF16 ? to_bf16(from[i]) : to_fp16(from[i]);
        if (dtype == WINNOW_DTYPE_FP32)
            memcpy((char *)to + 4 * i, &from[i], 4);
        else
            memcpy((char *)to + 2 * i, &half, 2);
    }
}

static uint64_t fnv1a(uint64_t hash, const void *data, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++)
        hash = (hash ^ ((const uint8_t *)data)[i]) * UINT64_C(0x100000001b3);
    return hash;
}

/* ---- the context ---- */

static float *k_at(const struct engine *engine, uint32_t layer, uint32_t token)
{
    size_t row = (size_t)engine->model.kv_heads * engine->model.k_width;
    return engine->k + ((size_t)layer * engine->n_tokens_max + token) * row;
}

static float *v_at(const struct engine *engine, uint32_t layer, uint32_t token)
{
    size_t row = (size_t)engine->model.kv_heads * engine->model.v_width;
    return engine->v + ((size_t)layer * engine->n_tokens_max + token) * row;
}

static void draw_token(struct engine *engine, uint32_t layer, uint32_t token)
{
    const winnow_model *model = &engine->model;
    for (uint32_t i = 0; i < model->kv_heads * model->k_width; i++)
        k_at(engine, layer, token)[i] = draw(engine->seed, 1, layer, token, i);
    for (uint32_t i = 0; i < model->kv_heads * model->v_width; i++)
        v_at(engine, layer, token)[i] = draw(engine->seed, 2, layer, token, i);
}

/* q of all heads at a position: near an earlier key, whose logit then stands out by about 11. */
static void draw_query(const struct engine *engine, uint32_t layer, uint32_t position, float *q)
{
    const winnow_model *model = &engine->model;
    uint32_t group = model->q_heads / model->kv_heads;
    float share = 11.0F / (model->softmax_scale * (float)model->k_width * 4.0F / 3.0F);
    for (uint32_t h = 0; h < model->q_heads; h++) {
        uint64_t pick = mix(engine->seed + mix(layer + mix(position + mix(h))));
        const float *k =
            k_at(engine, layer, (uint32_t)(pick % (position + 1))) + h / group * model->k_width;
        for (uint32_t i = 0; i < model->k_width; i++)
            q[h * model->k_width + i] =
                share * k[i] + 0.125F * draw(engine->seed, 3, layer, position, h * 1000 + i);
    }
    /* Rounded as the wire rounds it, so that the oracle sees the same q. */
    size_t n_values = (size_t)model->q_heads * model->k_width;
    to_io(q, n_values, model->io_dtype, engine->q_io);
    for (size_t i = 0; i < n_values; i++)
        q[i] = from_io(engine->q_io, i, model->io_dtype);
}

/* Softmax attention of one query head over tokens [0, n_tokens), all in fp64. */
static void attend_dense(const struct engine *engine, uint32_t layer, uint32_t n_tokens,
                         uint32_t head, const float *q, double *out)
{
    const winnow_model *model = &engine->model;
    uint32_t kv_head = head / (model->q_heads / model->kv_heads);
    double *weight = malloc(n_tokens * sizeof *weight), largest = -INFINITY, sum = 0;
    for (uint32_t t = 0; t < n_tokens; t++) {
        const float *k = k_at(engine, layer, t) + (size_t)kv_head * model->k_width;
        double dot = 0;
        for (uint32_t i = 0; i < model->k_width; i++)
            dot += (double)q[i] * (double)k[i];
        weight[t] = dot * (double)model->softmax_scale;
        largest = fmax(largest, weight[t]);
    }
    memset(out, 0, model->v_width * sizeof *out);
    for (uint32_t t = 0; t < n_tokens; t++) {
        const float *v = v_at(engine, layer, t) + (size_t)kv_head * model->v_width;
        double share = exp(weight[t] - largest);
        sum += share;
        for (uint32_t i = 0; i < model->v_width; i++)
            out[i] += share * (double)v[i];
    }
    for (uint32_t i = 0; i < model->v_width; i++)
        out[i] /= sum;
    free(weight);
}

/* Holds out of one position (in io_dtype) against the oracle; NaN counts as infinite error. */
static double compare(const struct engine *engine, uint32_t layer, uint32_t position,
                      const float *q, const void *out_io)
{
    const winnow_model *model = &engine->model;
    double *dense = malloc(model->v_width * sizeof *dense), worst = 0;
    for (uint32_t h = 0; h < model->q_heads; h++) {
        double largest = 0, difference = 0;
        attend_dense(engine, layer, position + 1, h, q + (size_t)h * model->k_width, dense);
        for (uint32_t i = 0; i < model->v_width; i++) {
            float out = from_io(out_io, (size_t)h * model->v_width + i, model->io_dtype);
            difference = isfinite(out) ? fmax(difference, fabs((double)out - dense[i])) : INFINITY;
            largest = fmax(largest, fabs(dense[i]));
        }
        worst = fmax(worst, difference / largest);
    }
    free(dense);
    return worst;
}

/* ---- calls ---- */

winnow_model engine_model(uint32_t layers, uint32_t q_heads, uint32_t kv_heads, uint32_t k_width,
                          uint32_t v_width, uint32_t kv_dtype, uint32_t io_dtype)
{
    return (winnow_model){.layers = layers,
                          .q_heads = q_heads,
                          .kv_heads = kv_heads,
                          .k_width = k_width,
                          .v_width = v_width,
                          .softmax_scale = 1 / sqrtf((float)k_width),
                          .kv_dtype = kv_dtype,
                          .io_dtype = io_dtype};
}

static void *room(size_t n_values, size_t value_bytes)
{
    void *memory = calloc(n_values, value_bytes);
    if (!memory) {
        fprintf(stderr, "no room for %zu values\n", n_values);
        exit(1);
    }
    return memory;
}

void engine_open(struct engine *engine, const char *socket, const winnow_model *model,
                 uint64_t seed, uint32_t n_tokens_max, const winnow_session_options *options)
{
    winnow_client_options client_options = WINNOW_CLIENT_OPTIONS;
    winnow_session_options session_options = WINNOW_SESSION_OPTIONS;
    *engine = (struct engine){.model = *model, .seed = seed, .n_tokens_max = n_tokens_max};
    size_t n_rows = (size_t)model->layers * n_tokens_max;
    engine->k = room(n_rows * model->kv_heads * model->k_width, sizeof(float));
    engine->v = room(n_rows * model->kv_heads * model->v_width, sizeof(float));
    engine->q_io = room((size_t)ENGINE_WINDOW_MAX * model->q_heads * model->k_width, 4);
    engine->k_io = room((size_t)ENGINE_WINDOW_MAX * model->kv_heads * model->k_width, 4);
    engine->v_io = room((size_t)ENGINE_WINDOW_MAX * model->kv_heads * model->v_width, 4);
    engine->out_io = room((size_t)ENGINE_WINDOW_MAX * model->q_heads * model->v_width, 4);

    client_options.address = socket;
    ENGINE_OK(winnow_client_open(&client_options, &engine->client));
    if (options)
        session_options = *options;
    session_options.model = *model;
    ENGINE_OK(winnow_session_open(engine->client, &session_options, &engine->session, 0));
}

void engine_close(struct engine *engine)
{
    winnow_session_close(engine->session);
    winnow_client_close(engine->client);
    free(engine->k);
    free(engine->v);
    free(engine->q_io);
    free(engine->k_io);
    free(engine->v_io);
    free(engine->out_io);
    *engine = (struct engine){0};
}

/* One layer of a window: fills the tensors, calls, compares a few positions. */
static int window_layer(struct engine *engine, uint32_t layer, uint32_t n_tokens, float *q,
                        double *error)
{
    const winnow_model *model = &engine->model;
    size_t q_row = (size_t)model->q_heads * model->k_width;
    size_t out_row = (size_t)model->q_heads * model->v_width * dtype_bytes(model->io_dtype);
    uint32_t first = engine->n_tokens;
    for (uint32_t t = first; t < first + n_tokens; t++)
        draw_token(engine, layer, t);
    for (uint32_t i = 0; i < n_tokens; i++)
        draw_query(engine, layer, first + i, q + i * q_row);
    to_io(q, n_tokens * q_row, model->io_dtype, engine->q_io);
    to_io(k_at(engine, layer, first), (size_t)n_tokens * model->kv_heads * model->k_width,
          model->io_dtype, engine->k_io);
    to_io(v_at(engine, layer, first), (size_t)n_tokens * model->kv_heads * model->v_width,
          model->io_dtype, engine->v_io);
    memset(engine->out_io, 0xff, n_tokens * out_row); /* NaN in each dtype */
    int rc = winnow_attend_exact(engine->session, layer, first, n_tokens, engine->q_io,
                                 engine->k_io, engine->v_io, engine->out_io, NULL, NULL, 0);
    if (rc < 0)
        return rc;
    engine->hash_windows = fnv1a(engine->hash_windows, engine->out_io, n_tokens * out_row);
    uint32_t samples[] = {0, n_tokens / 2, n_tokens - 1};
    for (uint32_t i = 0; error && i < sizeof samples / sizeof *samples; i++)
        *error = fmax(*error, compare(engine, layer, first + samples[i], q + samples[i] * q_row,
                                      (char *)engine->out_io + samples[i] * out_row));
    return 0;
}

int engine_window(struct engine *engine, uint32_t n_tokens, double *error)
{
    const winnow_model *model = &engine->model;
    float *q = room((size_t)n_tokens * model->q_heads * model->k_width, sizeof *q);
    int rc = 0;
    if (error)
        *error = 0;
    for (uint32_t layer = 0; !rc && layer < model->layers; layer++)
        rc = window_layer(engine, layer, n_tokens, q, error);
    free(q);
    if (!rc)
        engine->n_tokens += n_tokens;
    return rc;
}

static int decode_layer(struct engine *engine, uint32_t layer, float *q, float *lse,
                        struct engine_step *step)
{
    const winnow_model *model = &engine->model;
    uint32_t position = engine->n_tokens;
    size_t out_bytes = (size_t)model->q_heads * model->v_width * dtype_bytes(model->io_dtype);
    draw_token(engine, layer, position);
    draw_query(engine, layer, position, q); /* leaves q_io filled */
    to_io(k_at(engine, layer, position), (size_t)model->kv_heads * model->k_width, model->io_dtype,
          engine->k_io);
    to_io(v_at(engine, layer, position), (size_t)model->kv_heads * model->v_width, model->io_dtype,
          engine->v_io);
    memset(engine->out_io, 0xff, out_bytes);
    winnow_attend_item item = {.session = engine->session,
                               .position = position,
                               .mass = step->mass,
                               .q = engine->q_io,
                               .k = engine->k_io,
                               .v = engine->v_io,
                               .out = engine->out_io,
                               .lse = lse};
    int rc = winnow_attend(engine->client, layer, &item, 1, 0);
    if (!rc)
        rc = item.status;
    step->truncate_to = item.truncate_to;
    if (rc < 0)
        return rc;
    if (step->sum)
        winnow_certificate_add(step->sum, &item.certificate);
    if (step->hash) {
        *step->hash = fnv1a(*step->hash, engine->out_io, out_bytes);
        *step->hash = fnv1a(*step->hash, lse, model->q_heads * sizeof *lse);
    }
    if (step->error)
        *step->error = fmax(*step->error, compare(engine, layer, position, q, engine->out_io));
    return 0;
}

int engine_decode(struct engine *engine, struct engine_step *step)
{
    const winnow_model *model = &engine->model;
    float *q = room((size_t)model->q_heads * model->k_width, sizeof *q);
    float *lse = room(model->q_heads, sizeof *lse);
    int rc = 0;
    for (uint32_t layer = 0; !rc && layer < model->layers; layer++)
        rc = decode_layer(engine, layer, q, lse, step);
    free(q);
    free(lse);
    if (!rc)
        engine->n_tokens++;
    return rc;
}

uint64_t engine_converse(struct engine *engine, uint32_t n_tokens, uint32_t n_steps)
{
    uint64_t hash = 0;

    while (engine->n_tokens < n_tokens)
        ENGINE_OK(engine_window(engine, 500, NULL));
    for (uint32_t i = 0; i < n_steps; i++)
        ENGINE_OK(
            engine_decode(engine, &(struct engine_step){.mass = i % 10 ? 0.9F : 1, .hash = &hash}));
    return hash;
}

int engine_resend(struct engine *engine)
{
    uint32_t n_tokens = engine->n_tokens;
    int rc = 0;
    for (engine->n_tokens = 0; !rc && engine->n_tokens < n_tokens;) {
        uint32_t n_left = n_tokens - engine->n_tokens;
        rc = engine_window(engine, n_left < ENGINE_WINDOW_MAX ? n_left : ENGINE_WINDOW_MAX, NULL);
    }
    return rc;
}

int engine_truncate(struct engine *engine, uint32_t n_tokens)
{
    int rc = winnow_session_truncate(engine->session, n_tokens, 0);
    if (!rc && engine->n_tokens > n_tokens)
        engine->n_tokens = n_tokens;
    return rc;
}
