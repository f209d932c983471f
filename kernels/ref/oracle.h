/*
 * The oracle: dense attention in fp64, from the definition, for tests and benches to judge by.
 * Shares no code with any version of the kernels. One query head a call; nothing is allocated.
 */
#pragma once

#include <stdint.h>

/* l [n_tokens] = scale x q.k, of q [width] and k [n_tokens][width]. */
void winnow_oracle_logits(uint32_t width, double scale, const float *q, uint32_t n_tokens,
                          const float *k, double *l);

/* ln of the sum of exp(l) over the tokens idx [n], or the first n (idx NULL); -inf when n is 0. */
double winnow_oracle_ln_mass(const double *l, uint32_t n, const uint32_t *idx);

/* out [width] = softmax(l) v over the first n tokens of v [n][width]; returns the log-sum-exp. */
double winnow_oracle_attend(uint32_t width, const double *l, uint32_t n, const float *v,
                            double *out);
