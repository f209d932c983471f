/*
 * Content: every K, V and Q is a function of (model, layer, head, token), where a token is a random
 * 64-bit name. So a byte names its owner, and the dense oracle needs nothing of the core.
 *
 * Keys gather around eight topics that a token's low bits choose, so that blocks differ; `spread`
 * says how far topics lie apart.
 */
#pragma once

#include <base/rng.h>
#include <kernels/kernels.h>
#include <math.h>
#include <test.h>

enum sim_what { SIM_K, SIM_V, SIM_Q };

struct sim_model {
    struct winnow_model_shape shape;
    uint64_t seed;
    float spread;
};

static inline uint64_t sim_scramble(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* The next token of a text: topics last for some tokens. */
static inline uint64_t sim_token_make(struct winnow_rng *rng, uint64_t before)
{
    uint64_t token = winnow_rng_next(rng), topic = before & 7;
    if (winnow_rng_below(rng, 16) == 0)
        topic = token >> 8 & 7;
    return (token & ~UINT64_C(7)) | topic;
}

/* Four numbers in [-1, 1) of a counter. */
static inline void sim_four(uint64_t of, float four[4])
{
    uint64_t bits = sim_scramble(of);
    for (int i = 0; i < 4; i++)
        four[i] = (float)(int16_t)(bits >> 16 * i) / 32768;
}

static inline void sim_row(const struct sim_model *model, enum sim_what what, uint32_t layer,
                           uint32_t head, uint64_t token, float *row)
{
    const struct winnow_model_shape *shape = &model->shape;
    uint32_t width = what == SIM_V ? shape->v_width : shape->k_width;
    uint32_t kv_head = what == SIM_Q ? head / (shape->n_q_heads / shape->n_kv_heads) : head;
    uint64_t topic = what == SIM_Q ? token >> 3 & 7 : token & 7;
    uint64_t own = sim_scramble(token ^ sim_scramble(((uint64_t)what << 40 | layer << 16) + head));
    uint64_t shared = sim_scramble(model->seed ^ (topic << 40 | layer << 16 | kv_head));
    float topic_share = what == SIM_V ? 0 : model->spread;
    for (uint32_t i = 0; i < width; i += 4) {
        float noise[4], common[4];
        sim_four(own + i, noise);
        sim_four(shared + i, common);
        for (uint32_t j = 0; j < 4; j++)
            row[i + j] = topic_share * common[j] + noise[j];
    }
}

/* Rows of all heads of n tokens, [n][heads][width], in the model's io_dtype. */
static inline void sim_rows(const struct sim_model *model, enum sim_what what, uint32_t layer,
                            const uint64_t *token, uint32_t n, void *rows)
{
    const struct winnow_model_shape *shape = &model->shape;
    uint32_t n_heads = what == SIM_Q ? shape->n_q_heads : shape->n_kv_heads;
    uint32_t width = what == SIM_V ? shape->v_width : shape->k_width;
    size_t row_bytes = (size_t)width * (shape->io_dtype == WINNOW_FP32 ? 4 : 2);
    float row[WINNOW_WIDTH_MAX];
    uint8_t *at = rows;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t head = 0; head < n_heads; head++, at += row_bytes) {
            sim_row(model, what, layer, head, token[i], row);
            CHECK_EQ(winnow_kernels_ref()->from_float(shape->io_dtype, width, row, at), 0);
        }
}

/* What a number becomes in a dtype: to nearest even, as the wire and the blocks keep it. */
static inline float sim_rounded(uint32_t dtype, float x)
{
    uint32_t bits;
    if (dtype == WINNOW_FP16)
        return (float)(_Float16)x;
    if (dtype == WINNOW_FP32)
        return x;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void sim_row_at_rest(const struct sim_model *model, enum sim_what what,
                                   uint32_t layer, uint32_t head, uint64_t token, float *row)
{
    uint32_t width = what == SIM_V ? model->shape.v_width : model->shape.k_width;
    sim_row(model, what, layer, head, token, row);
    for (uint32_t i = 0; i < width; i++) {
        row[i] = sim_rounded(model->shape.io_dtype, row[i]);
        if (what != SIM_Q)
            row[i] = sim_rounded(model->shape.kv_dtype, row[i]);
    }
}

/* Dense attention of query head h of token[position] over tokens 0 .. position, in fp64. */
static inline void sim_oracle(const struct sim_model *model, uint32_t layer, uint32_t h,
                              const uint64_t *token, uint64_t position, double *out)
{
    const struct winnow_model_shape *shape = &model->shape;
    uint32_t head = h / (shape->n_q_heads / shape->n_kv_heads);
    float q[WINNOW_WIDTH_MAX], row[WINNOW_WIDTH_MAX];
    double largest = -INFINITY, sum = 0;
    double *logit = malloc((position + 1) * sizeof *logit);
    sim_row_at_rest(model, SIM_Q, layer, h, token[position], q);
    for (uint64_t t = 0; t <= position; t++) {
        sim_row_at_rest(model, SIM_K, layer, head, token[t], row);
        logit[t] = 0;
        for (uint32_t i = 0; i < shape->k_width; i++)
            logit[t] += (double)q[i] * (double)row[i];
        logit[t] *= (double)shape->softmax_scale;
        largest = fmax(largest, logit[t]);
    }
    memset(out, 0, shape->v_width * sizeof *out);
    for (uint64_t t = 0; t <= position; t++) {
        double p = exp(logit[t] - largest);
        sim_row_at_rest(model, SIM_V, layer, head, token[t], row);
        for (uint32_t i = 0; i < shape->v_width; i++)
            out[i] += p * (double)row[i];
        sum += p;
    }
    for (uint32_t i = 0; i < shape->v_width; i++)
        out[i] /= sum;
    free(logit);
}

/* Worst relative error over query heads of out [Hq][v_width] in io_dtype. */
static inline double sim_error(const struct sim_model *model, uint32_t layer, const uint64_t *token,
                               uint64_t position, const void *out)
{
    const struct winnow_model_shape *shape = &model->shape;
    size_t row_bytes = (size_t)shape->v_width * (shape->io_dtype == WINNOW_FP32 ? 4 : 2);
    double dense[WINNOW_WIDTH_MAX], worst = 0;
    float row[WINNOW_WIDTH_MAX];
    for (uint32_t h = 0; h < shape->n_q_heads; h++) {
        double d2 = 0, n2 = 0;
        sim_oracle(model, layer, h, token, position, dense);
        winnow_kernels_ref()->to_float(shape->io_dtype, shape->v_width,
                                       (const uint8_t *)out + h * row_bytes, row);
        for (uint32_t i = 0; i < shape->v_width; i++) {
            d2 += ((double)row[i] - dense[i]) * ((double)row[i] - dense[i]);
            n2 += dense[i] * dense[i];
        }
        worst = fmax(worst, sqrt(d2 / n2));
    }
    return worst;
}

/* Values are noise around 0, so that a dense output is small beside what was summed. */
static inline double sim_tolerance(const struct sim_model *model)
{
    uint32_t dtype = model->shape.io_dtype;
    return dtype == WINNOW_FP32 ? 1e-4 : dtype == WINNOW_FP16 ? 4e-3 : 3e-2;
}
