// The weights' places. Each tensor is looked up by name and its shape compared with what the
// metadata says, so the forward pass multiplies without a check.
#include "model.h"

#include "fault.h"
#include "quant.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_LAYERS_MAX = 256, WIDTH_MAX = 1 << 16, N_HEADS_MAX = 256 };

static const struct gguf_tensor *layer_tensor(const struct gguf *gguf, uint32_t layer,
                                              const char *part)
{
    char name[64];
    snprintf(name, sizeof name, "blk.%u.%s.weight", layer, part);
    const struct gguf_tensor *tensor = gguf_tensor_find(gguf, name);
    if (!tensor)
        fault_set(-ENOENT, "the model file has no tensor %s", name);
    return tensor;
}

static int matrix_view(const struct gguf_tensor *tensor, uint32_t n_rows, uint32_t n_columns,
                       struct matrix *matrix)
{
    if (!tensor)
        return -ENOENT;
    if (tensor->type == QUANT_F32 || tensor->shape[0] != n_columns || tensor->shape[1] != n_rows ||
        tensor->shape[2] != 1 || tensor->shape[3] != 1)
        return fault_set(-EBADMSG, "tensor %.*s is not a quantised matrix of %u x %u",
                         (int)(tensor->name.n_bytes & 63), tensor->name.bytes, n_rows, n_columns);
    *matrix = (struct matrix){tensor->type, n_rows, n_columns,
                              quant_row_bytes(tensor->type, n_columns), tensor->data};
    return 0;
}

static int vector_view(const struct gguf_tensor *tensor, uint32_t n_items, const float **vector)
{
    if (!tensor)
        return -ENOENT;
    if (tensor->type != QUANT_F32 || tensor->n_bytes != n_items * sizeof(float))
        return fault_set(-EBADMSG, "tensor %.*s is not an fp32 vector of %u",
                         (int)(tensor->name.n_bytes & 63), tensor->name.bytes, n_items);
    *vector = (const float *)(const void *)tensor->data;
    return 0;
}

static int layer_open(struct model *m, const struct gguf *gguf, uint32_t layer)
{
    const uint32_t n_q = m->n_q_heads * m->head_width, n_kv = m->n_kv_heads * m->head_width;
    struct model_layer *l = &m->layers[layer];
    const struct {
        const char *part;
        uint32_t n_rows, n_columns;
        struct matrix *matrix;
    } matrices[] = {
        {"attn_q", n_q, m->n_embed, &l->q},           {"attn_k", n_kv, m->n_embed, &l->k},
        {"attn_v", n_kv, m->n_embed, &l->v},          {"attn_output", m->n_embed, n_q, &l->o},
        {"ffn_gate", m->n_ffn, m->n_embed, &l->gate}, {"ffn_up", m->n_ffn, m->n_embed, &l->up},
        {"ffn_down", m->n_embed, m->n_ffn, &l->down},
    };

    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) {
        int rc = matrix_view(layer_tensor(gguf, layer, matrices[i].part), matrices[i].n_rows,
                             matrices[i].n_columns, matrices[i].matrix);
        if (rc < 0)
            return rc;
    }
    int rc = vector_view(layer_tensor(gguf, layer, "attn_norm"), m->n_embed, &l->attend_norm);
    if (rc == 0)
        rc = vector_view(layer_tensor(gguf, layer, "ffn_norm"), m->n_embed, &l->ffn_norm);
    return rc;
}

static int check_shape(const struct model *m, uint32_t rope_width)
{
    if (m->n_layers < 1 || m->n_layers > N_LAYERS_MAX || m->n_embed < 32 ||
        m->n_embed > WIDTH_MAX || m->n_embed % 32 || m->n_ffn < 32 || m->n_ffn > WIDTH_MAX ||
        m->n_ffn % 32 || m->n_context < 1 || m->n_q_heads < 1 || m->n_q_heads > N_HEADS_MAX ||
        m->n_kv_heads < 1 || m->n_kv_heads > m->n_q_heads || m->n_q_heads % m->n_kv_heads ||
        m->n_embed % m->n_q_heads || m->head_width % 2)
        return fault_set(-EBADMSG,
                         "a model of %u layers, width %u, ffn %u, %u query and %u KV heads",
                         m->n_layers, m->n_embed, m->n_ffn, m->n_q_heads, m->n_kv_heads);
    if (rope_width != m->head_width)
        return fault_set(-ENOTSUP, "rotary width %u of a head of %u; only equal is known",
                         rope_width, m->head_width);
    if (!(m->rope_base > 1) || !(m->norm_epsilon >= 0))
        return fault_set(-EBADMSG, "rotary base %g, norm epsilon %g", (double)m->rope_base,
                         (double)m->norm_epsilon);
    return 0;
}

static int shape_read(struct model *m, const struct gguf *gguf)
{
    struct gguf_text architecture;
    uint32_t rope_width;
    const struct {
        const char *key;
        uint32_t *value;
    } counts[] = {
        {"llama.block_count", &m->n_layers},
        {"llama.context_length", &m->n_context},
        {"llama.embedding_length", &m->n_embed},
        {"llama.feed_forward_length", &m->n_ffn},
        {"llama.attention.head_count", &m->n_q_heads},
        {"llama.attention.head_count_kv", &m->n_kv_heads},
        {"llama.rope.dimension_count", &rope_width},
    };

    int rc = gguf_text(gguf, "general.architecture", &architecture);
    if (rc < 0)
        return rc;
    if (architecture.n_bytes != 5 || memcmp(architecture.bytes, "llama", 5))
        return fault_set(-ENOTSUP, "architecture %.*s; known is llama",
                         (int)(architecture.n_bytes & 63), architecture.bytes);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if ((rc = gguf_u32(gguf, counts[i].key, counts[i].value)) < 0)
            return rc;
    rc = gguf_f32(gguf, "llama.rope.freq_base", &m->rope_base);
    if (rc == 0)
        rc = gguf_f32(gguf, "llama.attention.layer_norm_rms_epsilon", &m->norm_epsilon);
    if (rc < 0)
        return rc;
    m->head_width = m->n_q_heads ? m->n_embed / m->n_q_heads : 0;
    return check_shape(m, rope_width);
}

static int weights_view(struct model *m, const struct gguf *gguf)
{
    const struct gguf_tensor *embed = gguf_tensor_find(gguf, "token_embd.weight");
    const struct gguf_tensor *output = gguf_tensor_find(gguf, "output.weight");

    if (!embed || embed->shape[1] < 1)
        return fault_set(-ENOENT, "the model file has no tensor token_embd.weight");
    m->n_vocab = (uint32_t)embed->shape[1];
    int rc = matrix_view(embed, m->n_vocab, m->n_embed, &m->embed);
    if (rc == 0)
        rc = matrix_view(output ? output : embed, m->n_vocab, m->n_embed, &m->output);
    if (rc == 0)
        rc = vector_view(gguf_tensor_find(gguf, "output_norm.weight"), m->n_embed, &m->output_norm);
    for (uint32_t layer = 0; rc == 0 && layer < m->n_layers; layer++)
        rc = layer_open(m, gguf, layer);
    return rc;
}

int model_open(struct model *model, const struct gguf *gguf)
{
    *model = (struct model){0};
    int rc = shape_read(model, gguf);
    if (rc < 0)
        return rc;
    model->layers = calloc(model->n_layers, sizeof *model->layers);
    if (!model->layers)
        return fault_set(-ENOMEM, "no memory for %u layers", model->n_layers);
    rc = weights_view(model, gguf);
    if (rc < 0)
        model_close(model);
    return rc;
}

void model_close(struct model *model)
{
    free(model->layers);
    *model = (struct model){0};
}
