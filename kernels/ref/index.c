/*
 * The index of a segment: what selection knows of a block without reading it.
 *
 * Codes are taken from the *stored* (dequantised) centroid, so its rounding costs nothing: the code
 * takes it in. A scale beyond fp16's range becomes Inf, the estimate NaN, and the block is always
 * read: what cannot be coded is never guessed.
 */
#include <base/assert.h>
#include <float.h>
#include <kernels/ref/ref.h>
#include <string.h>

/* Rounds a length up: fp64 to the next fp32 that is not below it. */
static float round_up(double x)
{
    float y = (float)x;
    return (double)y < x ? nextafterf(y, INFINITY) : y;
}

static int clamp_round(float x, int largest)
{
    float y = nearbyintf(x);
    return y > (float)largest ? largest : y < (float)-largest ? -largest : (int)y;
}

/* x as int8 times the returned scale, absmax / 127. */
static float quantise(uint32_t width, const float *x, int8_t *dst)
{
    float largest = 0;
    for (uint32_t d = 0; d < width; d++)
        largest = fmaxf(largest, fabsf(x[d]));
    float scale = largest / 127.0f;
    for (uint32_t d = 0; d < width; d++)
        dst[d] = scale > 0 ? (int8_t)clamp_round(x[d] / scale, 127) : 0;
    return scale;
}

/* Mean of n rows, and, unless NULL, their variance a dimension. */
static void rows_mean(uint32_t width, uint32_t n, const float *const *row, float *mean, double *var)
{
    winnow_assert(n > 0);
    for (uint32_t d = 0; d < width; d++) {
        double sum = 0, square = 0;
        for (uint32_t i = 0; i < n; i++)
            sum += (double)row[i][d];
        sum /= n;
        mean[d] = (float)sum;
        if (!var)
            continue;
        for (uint32_t i = 0; i < n; i++)
            square += ((double)row[i][d] - sum) * ((double)row[i][d] - sum);
        var[d] = square / n;
    }
}

static void code_put(uint8_t *code, uint32_t t, uint32_t d, int c)
{
    uint8_t *at = code + (d / 8 * 16 + t) * 4 + d % 4;
    uint32_t shift = d % 8 < 4 ? 0 : 4;
    winnow_assert(c >= -7);
    winnow_assert(c <= 7);
    *at = (uint8_t)((*at & ~(15u << shift)) | (uint32_t)(c + 8) << shift);
}

/* Code of token t: x = k - mu, a = max|x| / 7 as fp16, c = x / a rounded. */
static uint16_t code_key(uint32_t width, uint32_t t, const float *k, const float *mu, uint8_t *code)
{
    float largest = 0;
    for (uint32_t d = 0; d < width; d++)
        largest = fmaxf(largest, fabsf(k[d] - mu[d]));
    uint16_t a_bits = winnow_ref_float_to_fp16(largest / 7.0f);
    float a = winnow_ref_fp16_to_float(a_bits);
    for (uint32_t d = 0; d < width; d++)
        code_put(code, t, d, a > 0 && isfinite(a) ? clamp_round((k[d] - mu[d]) / a, 7) : 0);
    return a_bits;
}

static double distance(uint32_t width, const float *x, const float *y)
{
    double square = 0;
    for (uint32_t d = 0; d < width; d++)
        square += ((double)x[d] - (double)y[d]) * ((double)x[d] - (double)y[d]);
    return sqrt(square);
}

static void fill_keys(uint32_t width, uint32_t b, const float *const *k,
                      struct winnow_index_view *view)
{
    float mu[WINNOW_WIDTH_MAX];
    double var[WINNOW_WIDTH_MAX], spread = 0, radius = 0;
    struct winnow_block_head *head = view->head + b;
    int8_t *centroid = view->centroid + (size_t)b * width;
    winnow_assert(b < view->n_blocks);
    winnow_assert(width % 8 == 0);

    rows_mean(width, 16, k, mu, var);
    head->centroid_scale = quantise(width, mu, centroid);
    for (uint32_t d = 0; d < width; d++) {
        mu[d] = (float)centroid[d] * head->centroid_scale;
        spread += var[d];
        if (view->var)
            view->var[(size_t)b * width + d] =
                winnow_ref_float_to_fp16((float)fmin(var[d], 65504.0));
    }
    head->spread = (float)fmin(spread / width, (double)FLT_MAX);
    for (uint32_t t = 0; t < 16; t++) {
        uint8_t *code = view->code + (size_t)b * 8 * width;
        view->code_scale[16 * (size_t)b + t] = code_key(width, t, k[t], mu, code);
        radius = fmax(radius, distance(width, k[t], mu));
    }
    head->radius = round_up(radius);
}

static void fill_segment(uint32_t width, uint32_t n_tokens, const float *x, float *mean)
{
    for (uint32_t d = 0; d < width; d++) {
        double sum = 0;
        for (uint32_t t = 0; t < n_tokens; t++)
            sum += (double)x[(size_t)t * width + d];
        mean[d] = (float)(sum / n_tokens);
    }
}

void winnow_ref_index_fill(const struct winnow_model_shape *shape, uint32_t n_blocks,
                           const float *k, const float *v, const uint16_t *order,
                           struct winnow_index_view *view)
{
    const float origin[WINNOW_WIDTH_MAX] = {0}, *k_row[16], *v_row[16];
    float mean[WINNOW_WIDTH_MAX];
    double v_max = 0;
    winnow_assert(n_blocks == view->n_blocks);
    winnow_assert(shape->k_width <= WINNOW_WIDTH_MAX);
    winnow_assert(shape->v_width <= WINNOW_WIDTH_MAX);

    for (uint32_t b = 0; b < n_blocks; b++) {
        for (uint32_t t = 0; t < 16; t++) {
            winnow_assert(order[16 * b + t] < 16 * n_blocks);
            k_row[t] = k + (size_t)order[16 * b + t] * shape->k_width;
            v_row[t] = v + (size_t)order[16 * b + t] * shape->v_width;
            v_max = fmax(v_max, distance(shape->v_width, v_row[t], origin));
        }
        fill_keys(shape->k_width, b, k_row, view);
        rows_mean(shape->v_width, 16, v_row, mean, NULL);
        view->head[b].vmean_scale =
            quantise(shape->v_width, mean, view->vmean + (size_t)b * shape->v_width);
    }
    fill_segment(shape->k_width, 16 * n_blocks, k, view->mean_k);
    fill_segment(shape->v_width, 16 * n_blocks, v, view->mean_v);
    *view->v_max = round_up(v_max);
}
