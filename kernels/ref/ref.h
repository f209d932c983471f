/*
 * The reference's functions, one noun a file, in the order of a decode step: convert, block, bisect
 * and build (once a segment), score, select, tactic, verify, attend, compensate, merge. The other
 * versions borrow from here whatever they do not speed up. Contracts: kernels.h.
 *
 * Letters, here and in the other versions: d a dimension of k_width or v_width, t a token, b a
 * block, g one of the G query heads of the KV head, s the softmax scale, l_t = s q.k_t a logit,
 * mu_b the stored centroid, a_t and c_t scale and code of a key, m_b and e_b exact and estimated
 * mass of a block, Z the mass of sinks and tail, T = Z + sum e_b, M the largest logarithm of all.
 */
#pragma once

#include <kernels/kernels.h>
#include <math.h>
#include <stdbool.h>

/* An element of dtype, from and to fp32. to_fp16 and to_bf16 round to nearest even and give Inf
 * beyond the type's range. */
float winnow_ref_fp16_to_float(uint16_t bits);
float winnow_ref_bf16_to_float(uint16_t bits);
uint16_t winnow_ref_float_to_fp16(float x);
uint16_t winnow_ref_float_to_bf16(float x);
/* n elements, unchecked. */
void winnow_ref_widen(uint32_t dtype, size_t n, const void *src, float *dst);
static inline bool winnow_ref_all_finite(size_t n, const float *x)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return false;
    return true;
}

int winnow_ref_to_float(uint32_t dtype, size_t n, const void *src, float *dst);
int winnow_ref_from_float(uint32_t dtype, size_t n, const float *src, void *dst);

void winnow_ref_block_pack(const struct winnow_model_shape *shape, uint32_t first, uint32_t n,
                           const float *k, const float *v, void *block);
void winnow_ref_block_unpack(const struct winnow_model_shape *shape, const void *block, float *k,
                             float *v);

/* A block as fp32 in its own order: k_transposed [k_width][16], v [16][v_width]. */
void winnow_ref_block_widen(const struct winnow_model_shape *shape, const void *block,
                            float *k_transposed, float *v);

/* A number that orders as x does, -0 and +0 alike; NaN last. */
static inline uint32_t winnow_ref_rank(float x)
{
    union {
        float x;
        uint32_t bits;
    } u = {.x = x + 0.0f};
    return u.bits & UINT32_C(0x80000000) ? ~u.bits : u.bits | UINT32_C(0x80000000);
}
/* Ascending, in place; keys differ. */
void winnow_ref_sort(uint64_t *key, size_t n);

/* Balanced bisection: fills order [16 n_blocks], one leaf of 16 places a block. Finite k. */
size_t winnow_ref_bisect_scratch_bytes(uint32_t k_width, uint32_t n_blocks);
void winnow_ref_bisect(uint32_t k_width, uint32_t n_blocks, const float *k, uint16_t *order,
                       void *scratch);
/* The index of blocks whose tokens are known. */
void winnow_ref_index_fill(const struct winnow_model_shape *shape, uint32_t n_blocks,
                           const float *k, const float *v, const uint16_t *order,
                           struct winnow_index_view *view);
int winnow_ref_build(const struct winnow_model_shape *shape, uint32_t n_blocks, const float *k,
                     const float *v, uint16_t *order, struct winnow_index_view *view,
                     void *scratch);

void winnow_ref_score(const struct winnow_model_shape *shape, uint32_t policy,
                      const struct winnow_index_view *view, const float *q, float *ln_e,
                      void *scratch);

/* exp, but 0 below -80: what no sum in fixed point can see, no version has to compute. */
static inline float winnow_ref_exp(float x)
{
    return x < -80.0f ? 0.0f : expf(x);
}
/* An estimate that is a number: not NaN, not +Inf. */
static inline bool winnow_ref_is_known(float ln_e)
{
    return ln_e < INFINITY;
}
/* exp(ln_x - ln_max) as fixed point 2^-40; 0 when ln_x is unknown or -Inf. */
uint64_t winnow_ref_fixed(float ln_x, float ln_max);
static inline uint64_t winnow_ref_fixed_add(uint64_t a, uint64_t b)
{
    uint64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}
/* Writes ln_key and sorts block_idx by class [n_blocks] (NULL: all alike), then key falling, then
 * number. scratch: n_blocks u64. */
void winnow_ref_key_sort(struct winnow_selection *sel, const uint8_t *class, void *scratch);
/* M [G], the largest of ln_z, of the known ln_e and of the ln_m of selected blocks. */
void winnow_ref_largest(const struct winnow_selection *sel, bool with_ln_m, float *largest);

uint32_t winnow_ref_probe(struct winnow_selection *sel, void *scratch);
void winnow_ref_tactic_select(struct winnow_selection *sel, void *scratch);
void winnow_ref_select(uint32_t policy, struct winnow_selection *sel, void *scratch);
uint32_t winnow_ref_select_more(struct winnow_selection *sel, float *rho, float *mass, int may_add,
                                void *scratch);

void winnow_ref_attend_partial(const struct winnow_model_shape *shape, const float *q, uint32_t n,
                               const void *const *block, const uint32_t *n_tokens, float *partial,
                               float *ln_m);
void winnow_ref_attend_window(const struct winnow_model_shape *shape, uint32_t n_pos,
                              uint64_t first, const float *q, uint32_t n, const void *const *block,
                              const uint64_t *position, const uint32_t *n_tokens, float *partial,
                              void *scratch);
size_t winnow_ref_window_scratch_bytes(const struct winnow_model_shape *shape, uint32_t n_pos);

void winnow_ref_compensate(const struct winnow_model_shape *shape,
                           const struct winnow_index_view *view, const struct winnow_selection *sel,
                           uint32_t block_first, float *partial);

/* Raises one query head's partial to the maximum m: what it holds is scaled. Returns its m. */
float winnow_ref_partial_raise(uint32_t v_width, float *partial, float m);
void winnow_ref_merge(const struct winnow_model_shape *shape, uint32_t n, const float *partial,
                      float *acc);
void winnow_ref_finish(const struct winnow_model_shape *shape, const float *acc, float *out,
                       float *lse);
