// Leases, models, sessions and the identity of a model; and the table of errors.
#include <test.h>

#include <daemon/error.h>
#include <daemon/fingerprint.h>
#include <daemon/registry.h>
#include <errno.h>

static const struct winnow_model_shape shape = {30, 9, 3, 64, 64, 0.125F, 2, 3, 1};

/* A session answers its own lease alone; foreign, stale and unknown are one answer. */
static void test_registry__foreign_is_unknown(void)
{
    struct winnow_registry *registry;
    CHECK_EQ(winnow_registry_create(2, 8, &registry), 0);
    struct winnow_lease *mine = winnow_lease_take(registry), *other = winnow_lease_take(registry);
    CHECK(mine && other && mine->id != other->id);
    CHECK(memcmp(mine->token, other->token, 16));
    CHECK(!winnow_lease_take(registry));
    CHECK(winnow_lease_find(registry, mine->token, 16) == mine);
    CHECK(!winnow_lease_find(registry, mine->token, 15));
    CHECK(!winnow_lease_find(registry, "0123456789abcdef", 16));

    struct winnow_model *model = winnow_model_take(registry, &shape);
    struct winnow_registry_session *session =
        winnow_registry_session_add(registry, 77, mine, model);
    CHECK(winnow_registry_session_find(registry, 77, mine) == session);
    CHECK(!winnow_registry_session_find(registry, 77, other));
    CHECK(!winnow_registry_session_find(registry, 77, NULL));
    CHECK(!winnow_registry_session_find(registry, 78, mine));
    uint64_t id = mine->id;
    winnow_lease_give(registry, mine);
    CHECK_EQ(winnow_registry_session_count(registry), 0);
    CHECK_EQ(model->n_sessions, 0);
    CHECK(!winnow_lease_of_id(registry, id));
    struct winnow_lease *again = winnow_lease_take(registry);
    CHECK(again->id != id); /* never reused */
    winnow_lease_give(registry, again);
    winnow_lease_give(registry, other);
    winnow_registry_destroy(registry);
}

/* Sessions that share a bucket are told apart, in whatever order they go. */
static void test_registry__buckets(void)
{
    enum { N = 64 };
    struct winnow_registry *registry;
    CHECK_EQ(winnow_registry_create(1, N, &registry), 0);
    struct winnow_lease *lease = winnow_lease_take(registry);
    struct winnow_model *model = winnow_model_take(registry, &shape);
    for (uint64_t i = 1; i <= N; i++)
        CHECK(winnow_registry_session_add(registry, i << 32, lease, model));
    CHECK(!winnow_registry_session_add(registry, 1, lease, model));
    for (uint64_t i = N / 2; i <= N; i++)
        winnow_registry_session_drop(registry,
                                     winnow_registry_session_find(registry, i << 32, lease));
    for (uint64_t i = 1; i <= N; i++) {
        struct winnow_registry_session *session =
            winnow_registry_session_find(registry, i << 32, lease);
        CHECK_EQ(session ? session->id : 0, i < N / 2 ? i << 32 : 0);
    }
    CHECK_EQ(lease->n_sessions, N / 2 - 1);
    winnow_lease_give(registry, lease);
    winnow_registry_destroy(registry);
}

/* A repeated OpenSession finds its session by the request id, its lease's alone. */
static void test_registry__repeats(void)
{
    struct winnow_registry *registry;
    static const uint8_t request_id[16] = {1, 2, 3};
    CHECK_EQ(winnow_registry_create(2, 4, &registry), 0);
    struct winnow_lease *mine = winnow_lease_take(registry), *other = winnow_lease_take(registry);
    struct winnow_model *model = winnow_model_take(registry, &shape);
    struct winnow_registry_session *session = winnow_registry_session_add(registry, 5, mine, model);
    memcpy(session->request_id, request_id, 16);
    CHECK(winnow_registry_session_of_request(registry, mine, request_id) == session);
    CHECK(!winnow_registry_session_of_request(registry, other, request_id));
    winnow_lease_give(registry, mine);
    winnow_lease_give(registry, other);
    winnow_registry_destroy(registry);
}

/* Equal shapes share a number; a number in use is never given away, and none returns. */
static void test_registry__models(void)
{
    struct winnow_registry *registry;
    CHECK_EQ(winnow_registry_create(1, 4, &registry), 0);
    struct winnow_lease *lease = winnow_lease_take(registry);
    struct winnow_model *model = winnow_model_take(registry, &shape);
    uint32_t number = model->number;
    CHECK(number && winnow_model_take(registry, &shape) == model);
    CHECK(winnow_registry_session_add(registry, 1, lease, model));
    struct winnow_model_shape other = shape;
    for (other.n_layers = 100; other.n_layers < 300; other.n_layers++)
        CHECK(winnow_model_take(registry, &other)->number != number);
    CHECK(winnow_model_find(registry, number) == model);
    CHECK(!winnow_model_find(registry, 0));
    CHECK(!winnow_model_find(registry, number + 1)); /* its slot went to another */
    winnow_lease_give(registry, lease);
    winnow_registry_destroy(registry);
}

/* Every field that shapes stored bytes changes the fingerprint; io_dtype does not; and bytes that
 * move from one field to its neighbour are not the same. */
static void test_registry__fingerprint(void)
{
    enum { N_NUMBERS = 9 };
    struct winnow_identity identity = {.shape = shape, .segment_tokens = 512, .n_sinks = 16};
    uint32_t *const number[N_NUMBERS] = {
        &identity.shape.n_layers,     &identity.shape.n_q_heads, &identity.shape.n_kv_heads,
        &identity.shape.k_width,      &identity.shape.v_width,   &identity.shape.kv_dtype,
        &identity.shape.block_layout, &identity.segment_tokens,  &identity.n_sinks};
    uint8_t base[32], changed[32];
    winnow_fingerprint(&identity, base);
    for (uint32_t i = 0; i < N_NUMBERS; i++) {
        ++*number[i];
        winnow_fingerprint(&identity, changed);
        CHECK(memcmp(base, changed, 32));
        --*number[i];
    }
    identity.shape.softmax_scale *= 2;
    winnow_fingerprint(&identity, changed);
    CHECK(memcmp(base, changed, 32));
    identity.shape.softmax_scale /= 2;
    identity.shape.io_dtype = 1;
    winnow_fingerprint(&identity, changed);
    CHECK(!memcmp(base, changed, 32));

    static const uint8_t tag_of_branch[1] = {34}; /* lengths tell it from the tag */
    identity.weights_id = identity.branch = tag_of_branch;
    identity.weights_id_bytes = 1;
    winnow_fingerprint(&identity, base);
    identity.weights_id_bytes = 0;
    identity.branch_bytes = 1;
    winnow_fingerprint(&identity, changed);
    CHECK(memcmp(base, changed, 32));
}

/* A session's shown name depends on the daemon's life and on the id, and is not the id. */
static void test_registry__names(void)
{
    uint8_t boot[16] = {1}, a[4], b[4];
    winnow_session_name(boot, 0x01020304, a);
    winnow_session_name(boot, 0x01020305, b);
    CHECK(memcmp(a, b, 4));
    boot[15] = 1;
    winnow_session_name(boot, 0x01020304, b);
    CHECK(memcmp(a, b, 4));
}

/* The errors that docs/rpc.md lists have its codes; an unlisted one is the daemon's own fault. */
static void test_registry__error_codes(void)
{
    static const struct {
        int error;
        enum winnow_code code;
    } row[] = {
        {0, WINNOW_CODE_OK},
        {-EINVAL, WINNOW_CODE_INVALID_ARGUMENT},
        {-EMSGSIZE, WINNOW_CODE_INVALID_ARGUMENT},
        {-EDOM, WINNOW_CODE_INVALID_ARGUMENT},
        {-ENOENT, WINNOW_CODE_NOT_FOUND},
        {-EACCES, WINNOW_CODE_PERMISSION_DENIED},
        {-EDQUOT, WINNOW_CODE_RESOURCE_EXHAUSTED},
        {-ENOSPC, WINNOW_CODE_RESOURCE_EXHAUSTED},
        {-ENOMEM, WINNOW_CODE_RESOURCE_EXHAUSTED},
        {-ENODATA, WINNOW_CODE_DATA_LOSS},
        {-ERANGE, WINNOW_CODE_ABORTED},
        {-EPROTO, WINNOW_CODE_FAILED_PRECONDITION},
        {-ESTALE, WINNOW_CODE_FAILED_PRECONDITION},
        {-ETIMEDOUT, WINNOW_CODE_DEADLINE_EXCEEDED},
        {-EHOSTDOWN, WINNOW_CODE_UNAVAILABLE},
        {-ENOTSUP, WINNOW_CODE_UNIMPLEMENTED},
        {-ECANCELED, WINNOW_CODE_CANCELLED},
        {-EIO, WINNOW_CODE_INTERNAL},
        {-EXDEV, WINNOW_CODE_INTERNAL},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++)
        CHECK_EQ(winnow_error_code(row[i].error), row[i].code);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_registry__foreign_is_unknown);
    TEST_RUN(test_registry__buckets);
    TEST_RUN(test_registry__repeats);
    TEST_RUN(test_registry__models);
    TEST_RUN(test_registry__fingerprint);
    TEST_RUN(test_registry__names);
    TEST_RUN(test_registry__error_codes);
    return TEST_END();
}
