/* Requests that are no messages: every field of every request, and of the messages in it, under
 * each wrong wire type, as a group, cut short, endless. The daemon refuses each as malformed. */
#include <errno.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/raw.h>
#include <test.h>

enum { N_BYTES_MAX = 64, N_WIRE_TYPES = 8 };
enum wire_type { VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 };

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};
static struct daemon server;
static struct raw raw;
static uint32_t n_sent;

/* A message being written, and the fields of its parents that it lies in. */
struct bytes {
    uint8_t data[N_BYTES_MAX];
    size_t n_bytes;
};

static enum wire_type wire_type_of(const ProtobufCFieldDescriptor *field)
{
    switch (field->type) {
    case PROTOBUF_C_TYPE_MESSAGE:
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
        return BYTES;
    case PROTOBUF_C_TYPE_FLOAT:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
        return FIXED32;
    case PROTOBUF_C_TYPE_DOUBLE:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
        return FIXED64;
    default:
        return VARINT;
    }
}

static void add(struct bytes *bytes, const void *data, size_t n_bytes)
{
    CHECK(bytes->n_bytes + n_bytes <= N_BYTES_MAX);
    memcpy(bytes->data + bytes->n_bytes, data, n_bytes);
    bytes->n_bytes += n_bytes;
}

static void add_tag(struct bytes *bytes, uint32_t id, uint32_t wire_type)
{
    CHECK(id < 16);
    add(bytes, &(uint8_t){(uint8_t)(id << 3 | wire_type)}, 1);
}

/* Sends the field's bytes, wrapped into the field of its parent if it has one. */
static void send_malformed(const char *method, uint32_t parent_id, const struct bytes *inner,
                           const char *field, const char *how)
{
    struct bytes whole = *inner;
    if (parent_id) {
        whole.n_bytes = 0;
        add_tag(&whole, parent_id, BYTES);
        add(&whole, &(uint8_t){(uint8_t)inner->n_bytes}, 1);
        add(&whole, inner->data, inner->n_bytes);
    }
    struct winnow_status status = raw_send_bytes(&raw, method, whole.data, whole.n_bytes);
    n_sent++;
    if (status.error != -EINVAL || status.local || !*status.text) {
        fprintf(stderr, "%s, %s %s: %d %s\n", method, field, how, status.error, status.text);
        CHECK(!"a malformed request is -EINVAL, with a text");
    }
}

static void try_field(const char *method, uint32_t parent_id, const ProtobufCFieldDescriptor *field)
{
    enum wire_type right = wire_type_of(field);
    for (uint32_t wire_type = 0; wire_type < N_WIRE_TYPES; wire_type++) {
        static const struct bytes plausible[N_WIRE_TYPES] = {[VARINT] = {{1}, 1},
                                                             [FIXED64] = {{0}, 8},
                                                             [BYTES] = {{1, 'x'}, 2},
                                                             [FIXED32] = {{0}, 4}};
        struct bytes bytes = {0};
        if (wire_type == right)
            continue;
        add_tag(&bytes, field->id, wire_type);
        add(&bytes, plausible[wire_type].data, plausible[wire_type].n_bytes);
        send_malformed(method, parent_id, &bytes, field->name, "under a wrong wire type");
    }
    static const struct bytes cut[N_WIRE_TYPES] = {[VARINT] = {{0x80}, 1},
                                                   [FIXED64] = {{0}, 7},
                                                   [BYTES] = {{100, 'x'}, 2},
                                                   [FIXED32] = {{0}, 3}};
    struct bytes bytes = {0};
    add_tag(&bytes, field->id, right);
    send_malformed(method, parent_id, &bytes, field->name, "without a value");
    add(&bytes, cut[right].data, cut[right].n_bytes);
    send_malformed(method, parent_id, &bytes, field->name, "cut short");
    if (right == VARINT || right == BYTES) { /* eleven bytes of a number, or of a length */
        bytes.n_bytes = 1;
        add(&bytes, "\377\377\377\377\377\377\377\377\377\377\1", 11);
        send_malformed(method, parent_id, &bytes, field->name, "endless");
    }
}

static void try_message(const char *method, uint32_t parent_id,
                        const ProtobufCMessageDescriptor *type)
{
    for (uint32_t i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
        try_field(method, parent_id, field);
        if (field->type == PROTOBUF_C_TYPE_MESSAGE) {
            CHECK(!parent_id); /* one deep: file rules */
            try_message(method, field->id, field->descriptor);
        }
    }
}

static void test_malformed__each_is_refused_as_such(void)
{
    const ProtobufCServiceDescriptor *service = &winnow__v1__winnow__descriptor;
    for (uint32_t i = 0; i < service->n_methods; i++)
        try_message(service->methods[i].name, 0, service->methods[i].input);
    TEST_ROW(F14, n_sent);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    daemon_init(&server, small);
    daemon_start(&server);
    raw_open(&raw, server.socket);
    TEST_RUN(test_malformed__each_is_refused_as_such);
    raw_close(&raw);
    CHECK_EQ(daemon_stop(&server, SIGTERM), 0);
    daemon_remove(&server);
    return TEST_END();
}
