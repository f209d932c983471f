#include <assert.h>
#include <base/assert.h>
#include <daemon/fingerprint.h>
#include <openssl/evp.h>
#include <string.h>

static void add(EVP_MD_CTX *context, uint8_t tag, const void *data, size_t n_bytes)
{
    winnow_assert(data || !n_bytes);
    winnow_assert(n_bytes <= UINT32_MAX);
    uint32_t length = (uint32_t)n_bytes; /* little-endian hosts only, as everything here */
    winnow_assert(EVP_DigestUpdate(context, &tag, 1));
    winnow_assert(EVP_DigestUpdate(context, &length, sizeof length));
    winnow_assert(EVP_DigestUpdate(context, data, n_bytes));
}

void winnow_fingerprint(const struct winnow_identity *identity, uint8_t fingerprint[32])
{
    static const char domain[] = "winnow/model/1";
    static_assert(sizeof identity->shape.softmax_scale == 4, "the hash has 4 bytes of it");
    const struct winnow_model_shape *shape = &identity->shape;
    winnow_assert(identity->weights_id_bytes <= 32);
    winnow_assert(identity->branch_bytes <= 32);
    const uint32_t number[] = {shape->n_layers,     shape->n_q_heads,         shape->n_kv_heads,
                               shape->k_width,      shape->v_width,           shape->kv_dtype,
                               shape->block_layout, identity->segment_tokens, identity->n_sinks};
    static_assert(sizeof number / sizeof *number < 32, "tags from 32 on are the others'");
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    winnow_assert(context);
    winnow_assert(EVP_DigestInit_ex(context, EVP_sha256(), NULL));
    add(context, 0, domain, sizeof domain - 1);
    for (uint8_t i = 0; i < sizeof number / sizeof *number; i++)
        add(context, (uint8_t)(i + 1), &number[i], sizeof *number);
    add(context, 32, &shape->softmax_scale, sizeof shape->softmax_scale);
    add(context, 33, identity->weights_id, identity->weights_id_bytes);
    add(context, 34, identity->branch, identity->branch_bytes);
    winnow_assert(EVP_DigestFinal_ex(context, fingerprint, NULL));
    EVP_MD_CTX_free(context);
}

void winnow_session_name(const uint8_t boot_id[16], uint64_t session_id, uint8_t name[4])
{
    uint8_t input[24], digest[32];
    static_assert(sizeof input == 16 + sizeof session_id, "boot id and session id");
    memcpy(input, boot_id, 16);
    memcpy(input + 16, &session_id, 8);
    winnow_assert(EVP_Digest(input, sizeof input, digest, NULL, EVP_sha256(), NULL));
    memcpy(name, digest, 4);
}
