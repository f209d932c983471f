/*
 * The model: shape and weights of a Llama-like network, as views of the mapped GGUF.
 *
 * Nothing is copied or unpacked here; the file's pages are shared by every process that maps it.
 */
#pragma once

#include "gguf.h"

#include <stdint.h>

/* Row r holds the weights of output r. type: QUANT_Q4_1 or QUANT_Q8_0. */
struct matrix {
    uint32_t type, n_rows, n_columns;
    uint64_t row_bytes;
    const uint8_t *rows;
};

struct model_layer {
    const float *attend_norm; /* [n_embed] */
    struct matrix q, k, v, o;
    const float *ffn_norm; /* [n_embed] */
    struct matrix gate, up, down;
};

struct model {
    uint32_t n_layers, n_embed, n_ffn, n_q_heads, n_kv_heads, head_width, n_vocab, n_context;
    float rope_base, norm_epsilon;
    struct matrix embed, output; /* the same bytes when the file ties them */
    const float *output_norm;
    struct model_layer *layers;
};

/* Borrows the mapping. -ENOENT something is missing; -EBADMSG a shape does not fit; -ENOTSUP another
 * architecture; -ENOMEM. close is fine on a zeroed struct. */
int model_open(struct model *model, const struct gguf *gguf);
void model_close(struct model *model);
