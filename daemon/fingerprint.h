/*
 * The fingerprint: what must be equal for two contexts' blocks to be interchangeable. SHA-256 over
 * every field of the model that shapes stored bytes, each as {tag byte, u32 length, bytes}, so that
 * no two models give the same input. io_dtype is left out: it shapes the wire alone.
 */
#pragma once

#include <kernels/kernels.h>
#include <stddef.h>
#include <stdint.h>

struct winnow_identity {
    struct winnow_model_shape shape;
    uint32_t segment_tokens, n_sinks;
    const uint8_t *weights_id, *branch; /* borrowed */
    size_t weights_id_bytes, branch_bytes;
};

void winnow_fingerprint(const struct winnow_identity *identity, uint8_t fingerprint[32]);
/* The first 4 bytes of SHA-256 over boot id and session id: what logs and status show of a session,
 * whose id is a key and stays secret. */
void winnow_session_name(const uint8_t boot_id[16], uint64_t session_id, uint8_t name[4]);
