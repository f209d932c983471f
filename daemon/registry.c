#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/pool.h>
#include <daemon/registry.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/random.h>

enum { N_MODELS_MAX = 64 };

struct winnow_registry {
    struct winnow_pool *leases, *sessions;
    struct winnow_registry_session **bucket; /* by session id, whose bits are random */
    uint32_t n_buckets;                      /* a power of two */
    uint64_t last_lease_id;
    uint32_t last_model_number;
    struct winnow_model model[N_MODELS_MAX];
};

static_assert(sizeof((struct winnow_lease *)0)->token == 16, "the wire's tokens");
static_assert(sizeof((struct winnow_registry_session *)0)->request_id == 16, "the wire's ids");
static_assert(sizeof((struct winnow_registry_session *)0)->fingerprint == 32, "a SHA-256");

int winnow_registry_create(uint32_t n_leases_max, uint32_t n_sessions_max,
                           struct winnow_registry **ret_registry)
{
    winnow_assert(n_leases_max);
    winnow_assert(n_sessions_max);
    winnow_assert(n_sessions_max <= 1U << 31);
    struct winnow_registry *registry = winnow_alloc(sizeof *registry);
    if (!registry)
        return -ENOMEM;
    registry->n_buckets = 1;
    while (registry->n_buckets < n_sessions_max)
        registry->n_buckets *= 2;
    registry->bucket =
        winnow_alloc_array(registry->n_buckets, sizeof(struct winnow_registry_session *));
    if (!registry->bucket ||
        winnow_pool_create(n_leases_max, sizeof(struct winnow_lease), &registry->leases) < 0 ||
        winnow_pool_create(n_sessions_max, sizeof(struct winnow_registry_session),
                           &registry->sessions) < 0) {
        winnow_registry_destroy(registry);
        return -ENOMEM;
    }
    winnow_assert((registry->n_buckets & (registry->n_buckets - 1)) == 0);
    winnow_assert(registry->n_buckets >= n_sessions_max);
    *ret_registry = registry;
    return 0;
}

void winnow_registry_destroy(struct winnow_registry *registry)
{
    if (!registry)
        return;
    winnow_pool_destroy(registry->leases);
    winnow_pool_destroy(registry->sessions);
    winnow_alloc_free(registry->bucket);
    winnow_alloc_free(registry);
}

struct winnow_lease *winnow_lease_take(struct winnow_registry *registry)
{
    uint8_t token[16];
    if (getrandom(token, sizeof token, GRND_NONBLOCK) != sizeof token)
        return NULL;
    struct winnow_lease *lease = winnow_pool_take(registry->leases);
    if (!lease)
        return NULL;
    *lease = (struct winnow_lease){.id = ++registry->last_lease_id};
    memcpy(lease->token, token, sizeof token);
    winnow_assert(lease->id);
    return lease;
}

void winnow_lease_give(struct winnow_registry *registry, struct winnow_lease *lease)
{
    winnow_assert(lease->id);
    winnow_assert(lease->id <= registry->last_lease_id);
    winnow_assert(lease->n_sessions <= winnow_pool_used(registry->sessions));
    uint32_t n_places = winnow_pool_size(registry->sessions);
    for (uint32_t i = 0; i < n_places && lease->n_sessions; i++) {
        struct winnow_registry_session *session = winnow_pool_at(registry->sessions, i);
        if (session && session->lease == lease)
            winnow_registry_session_drop(registry, session);
    }
    winnow_assert(!lease->n_sessions);
    winnow_pool_give(registry->leases, lease);
}

struct winnow_lease *winnow_lease_find(struct winnow_registry *registry, const void *token,
                                       size_t n_bytes)
{
    winnow_assert(token || !n_bytes);
    if (n_bytes != sizeof((struct winnow_lease *)0)->token)
        return NULL;
    for (uint32_t i = 0; i < winnow_pool_size(registry->leases); i++) {
        struct winnow_lease *lease = winnow_pool_at(registry->leases, i);
        if (lease && !memcmp(lease->token, token, n_bytes))
            return lease;
    }
    return NULL;
}

struct winnow_lease *winnow_lease_of_id(struct winnow_registry *registry, uint64_t id)
{
    winnow_assert(id <= registry->last_lease_id);
    for (uint32_t i = 0; i < winnow_pool_size(registry->leases); i++) {
        struct winnow_lease *lease = winnow_pool_at(registry->leases, i);
        if (lease && lease->id == id)
            return lease;
    }
    return NULL;
}

uint32_t winnow_lease_count(const struct winnow_registry *registry)
{
    return winnow_pool_used(registry->leases);
}

static bool shape_equal(const struct winnow_model_shape *a, const struct winnow_model_shape *b)
{
    return a->n_layers == b->n_layers && a->n_q_heads == b->n_q_heads &&
           a->n_kv_heads == b->n_kv_heads && a->k_width == b->k_width && a->v_width == b->v_width &&
           !memcmp(&a->softmax_scale, &b->softmax_scale, sizeof a->softmax_scale) &&
           a->kv_dtype == b->kv_dtype && a->io_dtype == b->io_dtype &&
           a->block_layout == b->block_layout;
}

struct winnow_model *winnow_model_take(struct winnow_registry *registry,
                                       const struct winnow_model_shape *shape)
{
    struct winnow_model *oldest = NULL;
    for (uint32_t i = 0; i < N_MODELS_MAX; i++) {
        struct winnow_model *model = &registry->model[i];
        if (model->number && shape_equal(&model->shape, shape))
            return model;
        if (!model->n_sessions && (!oldest || model->number < oldest->number))
            oldest = model;
    }
    if (oldest)
        *oldest = (struct winnow_model){.number = ++registry->last_model_number, .shape = *shape};
    winnow_assert(!oldest || !oldest->n_sessions);
    return oldest;
}

struct winnow_model *winnow_model_find(struct winnow_registry *registry, uint32_t number)
{
    for (uint32_t i = 0; number && i < N_MODELS_MAX; i++)
        if (registry->model[i].number == number)
            return &registry->model[i];
    return NULL;
}

static struct winnow_registry_session **bucket_of(struct winnow_registry *registry, uint64_t id)
{
    winnow_assert(registry->n_buckets);
    return &registry->bucket[id & (registry->n_buckets - 1)];
}

struct winnow_registry_session *winnow_registry_session_add(struct winnow_registry *registry,
                                                            uint64_t id, struct winnow_lease *lease,
                                                            struct winnow_model *model)
{
    winnow_assert(lease->id);
    winnow_assert(model->number);
    struct winnow_registry_session *session = winnow_pool_take(registry->sessions);
    if (!session)
        return NULL;
    struct winnow_registry_session **bucket = bucket_of(registry, id);
    *session =
        (struct winnow_registry_session){.next = *bucket, .id = id, .lease = lease, .model = model};
    *bucket = session;
    lease->n_sessions++;
    model->n_sessions++;
    winnow_assert(lease->n_sessions <= winnow_pool_used(registry->sessions));
    winnow_assert(model->n_sessions);
    return session;
}

void winnow_registry_session_drop(struct winnow_registry *registry,
                                  struct winnow_registry_session *session)
{
    winnow_assert(session->lease->n_sessions);
    winnow_assert(session->model->n_sessions);
    struct winnow_registry_session **link = bucket_of(registry, session->id);
    while (*link != session) {
        winnow_assert(*link);
        link = &(*link)->next;
    }
    *link = session->next;
    session->lease->n_sessions--;
    session->model->n_sessions--;
    winnow_pool_give(registry->sessions, session);
}

struct winnow_registry_session *winnow_registry_session_find(struct winnow_registry *registry,
                                                             uint64_t id,
                                                             const struct winnow_lease *lease)
{
    for (struct winnow_registry_session *at = *bucket_of(registry, id); at; at = at->next)
        if (at->id == id)
            return lease && at->lease == lease ? at : NULL;
    return NULL;
}

struct winnow_registry_session *winnow_registry_session_of_request(struct winnow_registry *registry,
                                                                   const struct winnow_lease *lease,
                                                                   const uint8_t request_id[16])
{
    winnow_assert(lease->id);
    winnow_assert(request_id);
    for (uint32_t i = 0; i < winnow_pool_size(registry->sessions); i++) {
        struct winnow_registry_session *session = winnow_pool_at(registry->sessions, i);
        if (session && session->lease == lease && !memcmp(session->request_id, request_id, 16))
            return session;
    }
    return NULL;
}

struct winnow_registry_session *winnow_registry_session_at(struct winnow_registry *registry,
                                                           uint32_t idx)
{
    winnow_assert(idx < winnow_pool_size(registry->sessions));
    return winnow_pool_at(registry->sessions, idx);
}

uint32_t winnow_registry_session_places(const struct winnow_registry *registry)
{
    return winnow_pool_size(registry->sessions);
}

uint32_t winnow_registry_session_count(const struct winnow_registry *registry)
{
    return winnow_pool_used(registry->sessions);
}
