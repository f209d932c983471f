// The wire against protobuf-c's plain decoder, hostile bytes and failing memory.
#include <test.h>

#include <base/alloc.h>
#include <base/rng.h>
#include <errno.h>
#include <proto/wire.h>

enum { N_SLICES_MAX = 4096 };

static struct winnow_wire_slice slice[N_SLICES_MAX];
static struct winnow_wire_arena *arena;
static struct winnow_wire_message decoded;

/* Cuts bytes into slices of random sizes, empty ones too. */
static uint32_t cut(struct winnow_rng *rng, const uint8_t *data, size_t n_bytes)
{
    uint32_t n_slices = 0;
    for (size_t at = 0; at < n_bytes || !n_slices;) {
        size_t n = winnow_rng_below(rng, 1 + n_bytes / 3);
        if (n > n_bytes - at || n_slices == N_SLICES_MAX - 1)
            n = n_bytes - at;
        slice[n_slices++] = (struct winnow_wire_slice){data + at, n};
        at += n;
    }
    return n_slices;
}

static int decode(const ProtobufCMessageDescriptor *type, uint32_t n_slices, bool is_request)
{
    struct winnow_wire_input input = {slice, n_slices, WINNOW_WIRE_ATTEND_BYTES_MAX, is_request};
    winnow_wire_arena_reset(arena);
    memset(&decoded, 0, sizeof decoded);
    return winnow_wire_decode(arena, type, &input, &decoded);
}

static int decode_bytes(const ProtobufCMessageDescriptor *type, const void *data, size_t n_bytes,
                        bool is_request)
{
    slice[0] = (struct winnow_wire_slice){data, n_bytes};
    return decode(type, 1, is_request);
}

/* A random AttendRequest in `storage`, its data included. */
struct sample {
    Winnow__V1__AttendRequest request;
    Winnow__V1__AttendItem item[16], *items[16];
    uint8_t token[16], data[5000];
};

static void sample_init(struct sample *sample, struct winnow_rng *rng)
{
    winnow__v1__attend_request__init(&sample->request);
    for (size_t i = 0; i < sizeof sample->data; i++)
        sample->data[i] = (uint8_t)winnow_rng_next(rng);
    memcpy(sample->token, sample->data, sizeof sample->token);
    if (winnow_rng_below(rng, 2))
        sample->request.token = (ProtobufCBinaryData){16, sample->token};
    sample->request.seq = winnow_rng_next(rng) >> winnow_rng_below(rng, 64);
    sample->request.layer = (uint32_t)winnow_rng_below(rng, 300);
    sample->request.n_items = winnow_rng_below(rng, 17);
    sample->request.items = sample->items;
    for (size_t i = 0; i < sample->request.n_items; i++) {
        sample->items[i] = &sample->item[i];
        winnow__v1__attend_item__init(&sample->item[i]);
        sample->item[i].session = winnow_rng_next(rng);
        sample->item[i].position = winnow_rng_below(rng, 1 << 20);
        sample->item[i].mass = (float)winnow_rng_unit(rng);
        sample->item[i].flags = (uint32_t)winnow_rng_below(rng, 16);
    }
    size_t n_data = winnow_rng_below(rng, 3) ? winnow_rng_below(rng, sizeof sample->data) : 0;
    sample->request.data = (ProtobufCBinaryData){n_data, sample->data};
}

/* Whatever the slices, the message is the one that protobuf-c's own decoder sees. */
static void test_wire__scattered_is_plain(void)
{
    static struct sample sample;
    static uint8_t bytes[8192], again[8192];
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    for (uint32_t round = 0; round < 2000; round++) {
        sample_init(&sample, &rng);
        size_t n_bytes = winnow__v1__attend_request__pack(&sample.request, bytes);
        CHECK_EQ(decode(&winnow__v1__attend_request__descriptor, cut(&rng, bytes, n_bytes), true),
                 0);

        Winnow__V1__AttendRequest *plain = winnow__v1__attend_request__unpack(NULL, n_bytes, bytes);
        CHECK_EQ(decoded.tensor.n_bytes, plain->data.len);
        winnow_wire_tensor_copy(&decoded.tensor, 0, again, plain->data.len);
        CHECK(!memcmp(again, plain->data.data ? plain->data.data : again, plain->data.len));
        if (plain->data.len > 10) { /* from the middle, too */
            winnow_wire_tensor_copy(&decoded.tensor, 7, again, plain->data.len - 9);
            CHECK(!memcmp(again, plain->data.data + 7, plain->data.len - 9));
        }
        protobuf_c_message_free_unpacked(&plain->base, NULL);

        /* The rest, packed again behind what the encoder puts before a tensor. */
        size_t n_head = winnow_wire_head(decoded.message, decoded.tensor.n_bytes, again);
        CHECK_EQ(n_head, winnow_wire_head_bytes(decoded.message, decoded.tensor.n_bytes));
        winnow_wire_tensor_copy(&decoded.tensor, 0, again + n_head, decoded.tensor.n_bytes);
        CHECK_EQ(n_head + decoded.tensor.n_bytes, n_bytes);
        CHECK(!memcmp(again, bytes, n_bytes));
    }
}

/* A tensor in one slice is pointed at, not copied. */
static void test_wire__tensor_stays_in_place(void)
{
    static uint8_t bytes[4096];
    Winnow__V1__AttendReply reply = WINNOW__V1__ATTEND_REPLY__INIT;
    reply.seq = 300;
    size_t n_head = winnow_wire_head(&reply, 3000, bytes);
    CHECK_EQ(decode_bytes(&winnow__v1__attend_reply__descriptor, bytes, n_head + 3000, false), 0);
    CHECK_EQ(decoded.tensor.n_bytes, 3000);
    const uint8_t *data = (const uint8_t *)decoded.tensor.slice->data + decoded.tensor.offset_bytes;
    CHECK(data == bytes + n_head);
}

/* The tensor may stand anywhere, but once. */
static void test_wire__tensor_once_in_any_place(void)
{
    static const uint8_t first[] = {15 << 3 | 2, 2, 'a', 'b', 2 << 3, 5};
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, first, sizeof first, true), 0);
    CHECK_EQ(((Winnow__V1__AttendRequest *)decoded.message)->seq, 5);
    CHECK_EQ(decoded.tensor.n_bytes, 2);
    static const uint8_t twice[] = {15 << 3 | 2, 1, 'a', 15 << 3 | 2, 1, 'b'};
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, twice, sizeof twice, true),
             -EINVAL);
    CHECK_STR(decoded.text, "AttendRequest: field 15 occurs twice");
}

/* An option that this build does not know is refused by its number at every level, and ignored in
 * a reply. */
static void test_wire__unknown_fields(void)
{
    static const uint8_t top[] = {2 << 3, 1, 0x98, 0x06, 1};
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, top, sizeof top, true), -EINVAL);
    CHECK_STR(decoded.text, "AttendRequest: unknown field 99");
    static const uint8_t nested[] = {8 << 3 | 2, 2, 8, 1, 8 << 3 | 2, 4, 8, 1, 14 << 3, 1};
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, nested, sizeof nested, true),
             -EINVAL);
    CHECK_STR(decoded.text, "AttendRequest: unknown field 14");
    static const uint8_t tensor[] = {15 << 3 | 2, 1, 'a'};
    CHECK_EQ(decode_bytes(&winnow__v1__close_request__descriptor, tensor, sizeof tensor, true),
             -EINVAL);
    CHECK_STR(decoded.text, "CloseRequest: unknown field 15");
    CHECK_EQ(decode_bytes(&winnow__v1__attend_reply__descriptor, top, sizeof top, false), 0);
    CHECK_EQ(decode_bytes(&winnow__v1__close_reply__descriptor, tensor, sizeof tensor, false), 0);
    CHECK_EQ(decoded.tensor.n_bytes, 0);
}

/* Groups, field 0, endless and overlong numbers, wrong wire types: malformed. */
static void test_wire__malformed(void)
{
    static const struct {
        uint8_t bytes[12];
        size_t n_bytes;
    } bad[] = {
        {{2 << 3 | 3, 2 << 3 | 4}, 2}, /* a group */
        {{0, 1}, 2},                   /* field 0 */
        {{2 << 3 | 2, 200, 1}, 3},     /* longer than it is */
        {{15 << 3 | 2, 5, 'a'}, 3},    /* so is the tensor */
        {{15 << 3, 5}, 2},             /* a number as tensor */
        {{1 << 3, 5}, 2},              /* a number as token */
        {{2 << 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1}, 12}, /* no varint */
        {{255, 255, 255, 255, 255, 1, 0}, 7}, /* a tag above 32 bits */
        {{2 << 3 | 1, 1, 2}, 3},              /* 8 bytes, 2 there */
        {{2 << 3 | 7}, 1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int rc = decode_bytes(&winnow__v1__attend_request__descriptor, bad[i].bytes, bad[i].n_bytes,
                              true);
        if (rc != -EINVAL)
            printf("case %zu\n", i);
        CHECK_EQ(rc, -EINVAL);
    }
}

/* A bool under another wire type than a number's is malformed, in a request, in a reply and in a
 * message inside; as a number it is read. */
static void test_wire__bools_are_numbers(void)
{
    static const struct {
        uint8_t bytes[12];
        size_t n_bytes;
    } bad[] = {
        {{7 << 3 | 1, 1, 0, 0, 0, 0, 0, 0, 0}, 9}, /* want_lse in 8 bytes */
        {{7 << 3 | 2, 1, 1}, 3},                   /* as bytes */
        {{7 << 3 | 5, 1, 0, 0, 0}, 5},             /* in 4 bytes */
        {{7 << 3, 1, 7 << 3 | 2, 1, 1}, 5},        /* once right, once wrong */
        {{15 << 3 | 2, 1, 'a', 7 << 3 | 2, 0}, 5}, /* behind the tensor */
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_EQ(decode_bytes(&winnow__v1__attend_exact_message__descriptor, bad[i].bytes,
                              bad[i].n_bytes, true),
                 -EINVAL);
    static const uint8_t right[] = {15 << 3 | 2, 1, 'a', 7 << 3, 1};
    CHECK_EQ(decode_bytes(&winnow__v1__attend_exact_message__descriptor, right, sizeof right, true),
             0);
    CHECK(((Winnow__V1__AttendExactMessage *)decoded.message)->want_lse);

    static const uint8_t inside[] = {3 << 3 | 2, 3, 7 << 3 | 2, 1, 1}; /* options.strict */
    CHECK_EQ(
        decode_bytes(&winnow__v1__open_session_request__descriptor, inside, sizeof inside, true),
        -EINVAL);
    CHECK_STR(decoded.text, "OpenSessionRequest: malformed message");
    static const uint8_t inside_right[] = {3 << 3 | 2, 2, 7 << 3, 1};
    CHECK_EQ(decode_bytes(&winnow__v1__open_session_request__descriptor, inside_right,
                          sizeof inside_right, true),
             0);
    CHECK(((Winnow__V1__OpenSessionRequest *)decoded.message)->options->strict);
    static const uint8_t reply[] = {0x92, 0x02, 1, 1}; /* io_direct as bytes */
    CHECK_EQ(decode_bytes(&winnow__v1__stats_reply__descriptor, reply, sizeof reply, false),
             -EINVAL);
}

/* What exceeds a limit is refused before anything is unpacked. */
static void test_wire__sizes(void)
{
    static uint8_t bytes[WINNOW_WIRE_ATTEND_BYTES_MAX + 64];
    Winnow__V1__AttendRequest request = WINNOW__V1__ATTEND_REQUEST__INIT;
    size_t n_head = winnow_wire_head(&request, WINNOW_WIRE_ATTEND_BYTES_MAX, bytes);
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes,
                          n_head + WINNOW_WIRE_ATTEND_BYTES_MAX, true),
             0);
    n_head = winnow_wire_head(&request, WINNOW_WIRE_ATTEND_BYTES_MAX + 1, bytes);
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes,
                          n_head + WINNOW_WIRE_ATTEND_BYTES_MAX + 1, true),
             -EMSGSIZE);

    static char label[WINNOW_WIRE_REST_BYTES_MAX];
    memset(label, 'x', sizeof label - 1);
    Winnow__V1__ForkRequest fork = WINNOW__V1__FORK_REQUEST__INIT;
    fork.label = label;
    size_t n_bytes = winnow__v1__fork_request__pack(&fork, bytes);
    CHECK(n_bytes > WINNOW_WIRE_REST_BYTES_MAX);
    CHECK_EQ(decode_bytes(&winnow__v1__fork_request__descriptor, bytes, n_bytes, true), -EMSGSIZE);
    label[sizeof label - 8] = 0;
    n_bytes = winnow__v1__fork_request__pack(&fork, bytes);
    CHECK_EQ(decode_bytes(&winnow__v1__fork_request__descriptor, bytes, n_bytes, true), 0);
}

/* 30,000 empty items, 60 KiB on the wire, end at the arena's bound; the arena serves again. */
static void test_wire__empty_items_are_bounded(void)
{
    static uint8_t bytes[60000];
    for (size_t i = 0; i < sizeof bytes; i += 2)
        bytes[i] = 8 << 3 | 2;
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes, sizeof bytes, true),
             -ENOMEM);
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes,
                          2 * WINNOW_WIRE_N_ITEMS_MAX, true),
             0);
    CHECK_EQ(((Winnow__V1__AttendRequest *)decoded.message)->n_items, WINNOW_WIRE_N_ITEMS_MAX);
}

/* An arena says no at its bound in bytes, and at its bound in allocations. */
static void test_wire__arena_bounds(void)
{
    winnow_wire_arena_reset(arena);
    size_t n_bytes = 0;
    while (winnow_wire_arena_take(arena, 4096))
        n_bytes += 4096;
    CHECK(n_bytes > WINNOW_WIRE_ARENA_BYTES && n_bytes <= WINNOW_WIRE_ARENA_BYTES_MAX);
    winnow_wire_arena_reset(arena);
    uint32_t n = 0;
    for (uint8_t *last = NULL, *memory; (memory = winnow_wire_arena_take(arena, 1)); last = memory)
        n += memory != last && *memory == 0;
    CHECK_EQ(n, WINNOW_WIRE_N_ALLOCATIONS_MAX);
    winnow_wire_arena_reset(arena);
}

/* The tensor's length is right at every border of its encoding. */
static void test_wire__tensor_lengths(void)
{
    static uint8_t bytes[20000];
    static const size_t n_bytes[] = {1, 127, 128, 129, 16383, 16384, 16385};
    Winnow__V1__AttendReply reply = WINNOW__V1__ATTEND_REPLY__INIT;
    for (size_t i = 0; i < sizeof n_bytes / sizeof *n_bytes; i++) {
        size_t n_head = winnow_wire_head(&reply, n_bytes[i], bytes);
        CHECK_EQ(n_head, winnow_wire_head_bytes(&reply, n_bytes[i]));
        CHECK_EQ(
            decode_bytes(&winnow__v1__attend_reply__descriptor, bytes, n_head + n_bytes[i], false),
            0);
        CHECK_EQ(decoded.tensor.n_bytes, n_bytes[i]);
    }
}

/* Every allocation that can fail does: -ENOMEM, and nothing is lost. */
static void test_wire__each_allocation_fails(void)
{
    for (uint64_t n = 1; n <= 2; n++) {
        struct winnow_wire_arena *none = NULL;
        winnow_alloc_fail_at(n, 0);
        CHECK_EQ(winnow_wire_arena_create(&none), -ENOMEM);
        CHECK(!none);
    }
    winnow_alloc_fail_at(0, 0);

    static uint8_t bytes[1900]; /* grows the arena once */
    for (size_t i = 0; i < sizeof bytes; i += 2)
        bytes[i] = 8 << 3 | 2;
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes, sizeof bytes, true), 0);
    winnow_wire_arena_reset(arena);
    winnow_alloc_fail_at(1, 0);
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes, sizeof bytes, true),
             -ENOMEM);
    winnow_alloc_fail_at(0, 0);
    CHECK_EQ(decode_bytes(&winnow__v1__attend_request__descriptor, bytes, sizeof bytes, true), 0);
}

/* Changed and cut messages are decoded or refused; what is decoded lies inside its bounds. */
static void test_wire__mutations(void)
{
    static struct sample sample;
    static uint8_t bytes[8192], copy[8192];
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());
    uint32_t n_decoded = 0;
    for (uint32_t round = 0; round < 20000; round++) {
        sample_init(&sample, &rng);
        sample.request.data.len %= 64;
        size_t n_bytes = winnow__v1__attend_request__pack(&sample.request, bytes);
        for (uint64_t n = winnow_rng_below(&rng, 4); n_bytes && n; n--)
            bytes[winnow_rng_below(&rng, n_bytes)] ^= (uint8_t)(1u << winnow_rng_below(&rng, 8));
        if (!winnow_rng_below(&rng, 3))
            n_bytes = winnow_rng_below(&rng, n_bytes + 1);
        int rc = decode(&winnow__v1__attend_request__descriptor, cut(&rng, bytes, n_bytes), true);
        CHECK(rc == 0 || rc == -EINVAL || rc == -ENOMEM);
        if (rc < 0)
            continue;
        n_decoded++;
        CHECK(decoded.tensor.n_bytes <= n_bytes);
        winnow_wire_tensor_copy(&decoded.tensor, 0, copy, decoded.tensor.n_bytes);
    }
    CHECK(n_decoded > 2000 && n_decoded < 19000);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    CHECK_EQ(winnow_wire_arena_create(&arena), 0);
    TEST_RUN(test_wire__scattered_is_plain);
    TEST_RUN(test_wire__tensor_stays_in_place);
    TEST_RUN(test_wire__tensor_once_in_any_place);
    TEST_RUN(test_wire__unknown_fields);
    TEST_RUN(test_wire__malformed);
    TEST_RUN(test_wire__bools_are_numbers);
    TEST_RUN(test_wire__sizes);
    TEST_RUN(test_wire__empty_items_are_bounded);
    TEST_RUN(test_wire__arena_bounds);
    TEST_RUN(test_wire__tensor_lengths);
    TEST_RUN(test_wire__each_allocation_fails);
    TEST_RUN(test_wire__mutations);
    winnow_wire_arena_destroy(arena);
    return TEST_END();
}
