/*
 * The registry: who may speak of what. A lease is a client's life; its token opens its sessions and
 * no others. A model is a shape in use, so that a decode message names it by a number. A session
 * here is the wire's side of a context in the core: the core owns tokens and epochs.
 *
 * Foreign, stale and unknown are one answer: NULL.
 *
 * Thread: the serving thread.
 */
#pragma once

#include <kernels/kernels.h>
#include <stddef.h>
#include <stdint.h>

struct winnow_lease {
    uint64_t id; /* owner of its sessions in the core; never reused */
    uint8_t token[16];
    uint32_t n_sessions;
};

struct winnow_model {
    uint32_t number; /* on the wire; never reused */
    uint32_t n_sessions;
    struct winnow_model_shape shape;
};

struct winnow_registry_session {
    struct winnow_registry_session *next; /* of the same bucket */
    uint64_t id;                          /* random, the core's */
    struct winnow_lease *lease;
    struct winnow_model *model;
    uint32_t epoch, segment_tokens, n_sinks, block_layout;
    uint64_t n_forked; /* tokens held when it was forked */
    uint8_t name[4], request_id[16], fingerprint[32];
    uint8_t append_id[16]; /* of the last Append stream */
    uint32_t append_layer;
    char label[65];
};

struct winnow_registry;

int winnow_registry_create(uint32_t n_leases_max, uint32_t n_sessions_max,
                           struct winnow_registry **ret_registry); /* -ENOMEM */
void winnow_registry_destroy(struct winnow_registry *registry);    /* NULL is fine */

/* NULL: n_leases_max are held, or the kernel has no random bytes. */
struct winnow_lease *winnow_lease_take(struct winnow_registry *registry);
/* Its sessions leave the registry with it. */
void winnow_lease_give(struct winnow_registry *registry, struct winnow_lease *lease);
struct winnow_lease *winnow_lease_find(struct winnow_registry *registry, const void *token,
                                       size_t n_bytes);
struct winnow_lease *winnow_lease_of_id(struct winnow_registry *registry, uint64_t id);
uint32_t winnow_lease_count(const struct winnow_registry *registry);

/* A model of this shape, its number kept while sessions use it and for some time after. NULL: 64
 * shapes are in use. */
struct winnow_model *winnow_model_take(struct winnow_registry *registry,
                                       const struct winnow_model_shape *shape);
struct winnow_model *winnow_model_find(struct winnow_registry *registry, uint32_t number);

/* A session of the lease; the caller fills the rest. NULL: n_sessions_max are held. */
struct winnow_registry_session *winnow_registry_session_add(struct winnow_registry *registry,
                                                            uint64_t id, struct winnow_lease *lease,
                                                            struct winnow_model *model);
void winnow_registry_session_drop(struct winnow_registry *registry,
                                  struct winnow_registry_session *session);
struct winnow_registry_session *winnow_registry_session_find(struct winnow_registry *registry,
                                                             uint64_t id,
                                                             const struct winnow_lease *lease);
/* The lease's session that was opened by this request id, for a repeated OpenSession or Fork. */
struct winnow_registry_session *winnow_registry_session_of_request(struct winnow_registry *registry,
                                                                   const struct winnow_lease *lease,
                                                                   const uint8_t request_id[16]);
/* Session number `idx` below winnow_registry_session_places, or NULL: none there. */
struct winnow_registry_session *winnow_registry_session_at(struct winnow_registry *registry,
                                                           uint32_t idx);
uint32_t winnow_registry_session_places(const struct winnow_registry *registry);
uint32_t winnow_registry_session_count(const struct winnow_registry *registry);
