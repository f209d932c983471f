// The protocol's own rules, over the generated descriptors: what decoding and compatibility rest on.
//
// tests/proto/fields.txt lists every field that was ever released: a new field gets a line, a line
// never changes or goes. `test_rules --print` writes the list of this build.
#include <test.h>

#include <proto/wire.h>

enum { N_TYPES_MAX = 128, DEPTH_MAX = 8 };

static const ProtobufCMessageDescriptor *type[N_TYPES_MAX];
static uint32_t n_types;

static void visit(const ProtobufCMessageDescriptor *message, uint32_t depth)
{
    if (depth == DEPTH_MAX)
        printf("%s recurses\n", message->name);
    CHECK(depth < DEPTH_MAX);
    for (uint32_t i = 0; i < message->n_fields; i++)
        if (message->fields[i].type == PROTOBUF_C_TYPE_MESSAGE)
            visit(message->fields[i].descriptor, depth + 1);
    for (uint32_t i = 0; i < n_types; i++)
        if (type[i] == message)
            return;
    CHECK(n_types < N_TYPES_MAX);
    type[n_types++] = message;
}

static void collect(void)
{
    const ProtobufCServiceDescriptor *service[] = {&winnow__v1__winnow__descriptor,
                                                   &grpc__health__v1__health__descriptor};
    for (uint32_t s = 0; s < 2; s++) {
        for (uint32_t i = 0; i < service[s]->n_methods; i++) {
            visit(service[s]->methods[i].input, 0);
            visit(service[s]->methods[i].output, 0);
        }
    }
}

static bool is_ours(const ProtobufCMessageDescriptor *message)
{
    return !strncmp(message->name, "winnow.v1.", 10);
}

/* No recursion: a message's depth is bounded before a byte of it is read. */
static void test_rules__no_recursion(void)
{
    collect();
    CHECK(n_types > 25);
}

/* No maps (entries unpack without a bound of their own), no oneof, nothing proto2 or optional. */
static void test_rules__plain_fields(void)
{
    for (uint32_t t = 0; t < n_types; t++) {
        CHECK(!strstr(type[t]->short_name, "Entry"));
        for (uint32_t i = 0; i < type[t]->n_fields; i++) {
            const ProtobufCFieldDescriptor *field = &type[t]->fields[i];
            CHECK(field->label == PROTOBUF_C_LABEL_NONE ||
                  field->label == PROTOBUF_C_LABEL_REPEATED);
            CHECK(!(field->flags & PROTOBUF_C_FIELD_FLAG_ONEOF));
        }
    }
}

/* Field 15 is `data`, bytes, the last of a message; no other field is called so. */
static void test_rules__tensor_is_field_15_and_last(void)
{
    uint32_t n_tensors = 0;
    for (uint32_t t = 0; t < n_types; t++) {
        for (uint32_t i = 0; i < type[t]->n_fields; i++) {
            const ProtobufCFieldDescriptor *field = &type[t]->fields[i];
            bool is_tensor = field->id == WINNOW_WIRE_TENSOR_FIELD;
            CHECK_EQ(is_tensor, !strcmp(field->name, "data"));
            if (!is_tensor)
                continue;
            CHECK_EQ(field->type, PROTOBUF_C_TYPE_BYTES);
            CHECK_EQ(i, type[t]->n_fields - 1);
            n_tensors++;
        }
    }
    CHECK_EQ(n_tensors, 5);
}

/* Identities are bytes: a NUL would cut a string. */
static void test_rules__identities_are_bytes(void)
{
    static const char *const identity[] = {"token",     "boot_id",    "fingerprint", "branch",
                                           "append_id", "weights_id", "request_id"};
    uint32_t n_found = 0;
    for (uint32_t t = 0; t < n_types; t++)
        for (uint32_t i = 0; i < type[t]->n_fields; i++)
            for (size_t j = 0; j < sizeof identity / sizeof *identity; j++)
                if (!strcmp(type[t]->fields[i].name, identity[j])) {
                    CHECK_EQ(type[t]->fields[i].type, PROTOBUF_C_TYPE_BYTES);
                    n_found++;
                }
    CHECK(n_found >= 10);
}

/* An enum's 0 says that nothing was said. */
static void test_rules__enums_begin_unspecified(void)
{
    uint32_t n_enums = 0;
    for (uint32_t t = 0; t < n_types; t++) {
        for (uint32_t i = 0; is_ours(type[t]) && i < type[t]->n_fields; i++) {
            if (type[t]->fields[i].type != PROTOBUF_C_TYPE_ENUM)
                continue;
            const ProtobufCEnumDescriptor *values = type[t]->fields[i].descriptor;
            const ProtobufCEnumValue *zero = protobuf_c_enum_descriptor_get_value(values, 0);
            CHECK(zero && strstr(zero->name, "UNSPECIFIED"));
            n_enums++;
        }
    }
    CHECK(n_enums >= 7);
}

static void field_line(char line[160], const ProtobufCMessageDescriptor *message,
                       const ProtobufCFieldDescriptor *field)
{
    snprintf(line, 160, "%s.%s %u type %d%s\n", message->name, field->name, field->id,
             (int)field->type, field->label == PROTOBUF_C_LABEL_REPEATED ? " repeated" : "");
}

static void print_fields(void)
{
    char line[160];
    collect();
    for (uint32_t t = 0; t < n_types; t++)
        for (uint32_t i = 0; i < type[t]->n_fields; i++) {
            field_line(line, type[t], &type[t]->fields[i]);
            fputs(line, stdout);
        }
}

/* Numbers are never reused, types never change: this build's fields are those of the list. */
static void test_rules__fields_as_released(void)
{
    static char list[32768];
    FILE *file = fopen("tests/proto/fields.txt", "r");
    CHECK(file);
    list[0] = '\n';
    size_t n_bytes = fread(list + 1, 1, sizeof list - 2, file);
    fclose(file);
    CHECK(n_bytes < sizeof list - 2);
    uint32_t n_lines = 0, n_fields = 0;
    for (const char *c = list + 1; *c; c++)
        n_lines += *c == '\n';
    for (uint32_t t = 0; t < n_types; t++) {
        for (uint32_t i = 0; i < type[t]->n_fields; i++) {
            char line[162] = "\n";
            field_line(line + 1, type[t], &type[t]->fields[i]);
            if (!strstr(list, line))
                printf("not in tests/proto/fields.txt: %s", line + 1);
            CHECK(strstr(list, line));
            n_fields++;
        }
    }
    CHECK_EQ(n_fields, n_lines);
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "--print")) {
        print_fields();
        return 0;
    }
    test_init(1, argv); /* the tests share one walk: no filter */
    TEST_RUN(test_rules__no_recursion);
    TEST_RUN(test_rules__plain_fields);
    TEST_RUN(test_rules__tensor_is_field_15_and_last);
    TEST_RUN(test_rules__identities_are_bytes);
    TEST_RUN(test_rules__enums_begin_unspecified);
    TEST_RUN(test_rules__fields_as_released);
    return TEST_END();
}
