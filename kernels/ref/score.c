/*
 * Score: the mass of every block, seen through the index.
 *
 * The query is taken to 15 bits a head, q = round(q / (absmax / 16256)), for the product with the
 * codes: two int8 halves on any machine, an exact integer on all, and it moves 0.02 % of the
 * selected blocks; one int8 (8 bits) moves 2 to 3 %. The centroid sees the query in fp32.
 */
#include <assert.h>
#include <base/assert.h>
#include <kernels/ref/ref.h>

enum { QUERY_LARGEST = 16256 };
static_assert(8 * QUERY_LARGEST <= INT32_MAX / WINNOW_WIDTH_MAX, "a dot product is exact");

struct query {
    const float *q;
    int32_t q_int[WINNOW_WIDTH_MAX];
    float scale;  /* q = scale x q_int */
    float square; /* |q|^2 */
};

static void query_init(struct query *query, uint32_t width, const float *q)
{
    float largest = 0;

    *query = (struct query){.q = q};
    for (uint32_t d = 0; d < width; d++) {
        largest = fmaxf(largest, fabsf(q[d]));
        query->square += q[d] * q[d];
    }
    query->scale = largest / (float)QUERY_LARGEST;
    for (uint32_t d = 0; d < width && query->scale > 0; d++) {
        float x = fminf(fmaxf(q[d] / query->scale, -QUERY_LARGEST), QUERY_LARGEST);
        query->q_int[d] = (int32_t)nearbyintf(x);
    }
}

static void unpack_codes(uint32_t width, const uint8_t *code, int8_t c[][WINNOW_WIDTH_MAX])
{
    for (uint32_t t = 0; t < 16; t++)
        for (uint32_t d = 0; d < width; d++) {
            uint8_t pair = code[(d / 8 * 16 + t) * 4 + d % 4];
            c[t][d] = (int8_t)((d % 8 < 4 ? pair & 15 : pair >> 4) - 8);
        }
}

static float centroid_dot(uint32_t width, const struct winnow_index_view *view, uint32_t b,
                          const float *q)
{
    const int8_t *centroid = view->centroid + (size_t)b * width;
    float sum = 0;

    for (uint32_t d = 0; d < width; d++)
        sum += q[d] * (float)centroid[d];
    return sum * view->head[b].centroid_scale;
}

/* ln e_b = ln sum over t of exp(s (q.mu_b + a_t q.c_t)) */
static float codes_mass(uint32_t width, float s, const struct query *query, float q_mu,
                        const uint16_t *code_scale, int8_t c[][WINNOW_WIDTH_MAX])
{
    float l[16], largest = -INFINITY, sum = 0;

    for (uint32_t t = 0; t < 16; t++) {
        int32_t dot = 0;
        for (uint32_t d = 0; d < width; d++)
            dot += c[t][d] * query->q_int[d];
        float a = winnow_ref_fp16_to_float(code_scale[t]);
        l[t] = s * (q_mu + a * query->scale * (float)dot);
        largest = fmaxf(largest, l[t]);
    }
    for (uint32_t t = 0; t < 16; t++)
        sum += winnow_ref_exp(l[t] - largest);
    return largest + logf(sum);
}

static void score_codes(const struct winnow_model_shape *shape,
                        const struct winnow_index_view *view, uint32_t n_q,
                        const struct query *query, float *ln_e)
{
    uint32_t width = shape->k_width;
    int8_t c[16][WINNOW_WIDTH_MAX];

    for (uint32_t b = 0; b < view->n_blocks; b++) {
        unpack_codes(width, view->code + (size_t)b * 8 * width, c);
        for (uint32_t g = 0; g < n_q; g++) {
            float q_mu = centroid_dot(width, view, b, query[g].q);
            ln_e[b * n_q + g] = codes_mass(width, shape->softmax_scale, &query[g], q_mu,
                                           view->code_scale + (size_t)b * 16, c);
        }
    }
}

/* ln e_b = s q.mu_b + min(s^2 / 2 x variance of q.k in the block, 2) + ln 16 */
static float moment_mass(const struct winnow_model_shape *shape,
                         const struct winnow_index_view *view, uint32_t b,
                         const struct query *query)
{
    float s = shape->softmax_scale, variance = 0;

    if (view->var)
        for (uint32_t d = 0; d < shape->k_width; d++)
            variance += query->q[d] * query->q[d] *
                        winnow_ref_fp16_to_float(view->var[(size_t)b * shape->k_width + d]);
    else
        variance = view->head[b].spread * query->square;
    return s * centroid_dot(shape->k_width, view, b, query->q) + fminf(s * s / 2 * variance, 2.0f) +
           logf(16.0f);
}

void winnow_ref_score(const struct winnow_model_shape *shape, uint32_t policy,
                      const struct winnow_index_view *view, const float *q, float *ln_e,
                      void *scratch)
{
    uint32_t n_q = shape->n_q_heads / shape->n_kv_heads, width = shape->k_width;
    struct query query[WINNOW_GQA_MAX];
    (void)scratch;
    winnow_assert(n_q > 0);
    winnow_assert(n_q <= WINNOW_GQA_MAX);
    winnow_assert(width <= WINNOW_WIDTH_MAX);
    winnow_assert(width % 8 == 0);
    winnow_assert(policy >= WINNOW_POLICY_CODES);
    winnow_assert(policy <= WINNOW_POLICY_MOMENT);

    for (uint32_t g = 0; g < n_q; g++)
        query_init(&query[g], width, q + g * width);
    if (policy == WINNOW_POLICY_CODES) {
        score_codes(shape, view, n_q, query, ln_e);
        return;
    }
    for (uint32_t b = 0; b < view->n_blocks; b++)
        for (uint32_t g = 0; g < n_q; g++)
            ln_e[b * n_q + g] =
                policy == WINNOW_POLICY_MOMENT
                    ? moment_mass(shape, view, b, &query[g])
                    : shape->softmax_scale * centroid_dot(width, view, b, query[g].q) + logf(16.0f);
}
