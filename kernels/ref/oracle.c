#include <kernels/ref/oracle.h>
#include <math.h>
#include <string.h>

void winnow_oracle_logits(uint32_t width, double scale, const float *q, uint32_t n_tokens,
                          const float *k, double *l)
{
    for (uint32_t t = 0; t < n_tokens; t++) {
        double sum = 0;
        for (uint32_t d = 0; d < width; d++)
            sum += (double)q[d] * (double)k[(size_t)t * width + d];
        l[t] = scale * sum;
    }
}

double winnow_oracle_ln_mass(const double *l, uint32_t n, const uint32_t *idx)
{
    double largest = -INFINITY, sum = 0;

    for (uint32_t i = 0; i < n; i++)
        largest = fmax(largest, l[idx ? idx[i] : i]);
    for (uint32_t i = 0; i < n; i++)
        sum += exp(l[idx ? idx[i] : i] - largest);
    return largest + log(sum);
}

double winnow_oracle_attend(uint32_t width, const double *l, uint32_t n, const float *v,
                            double *out)
{
    double lse = winnow_oracle_ln_mass(l, n, NULL);

    memset(out, 0, width * sizeof *out);
    for (uint32_t t = 0; t < n; t++) {
        double p = exp(l[t] - lse);
        for (uint32_t d = 0; d < width; d++)
            out[d] += p * (double)v[(size_t)t * width + d];
    }
    return lse;
}
