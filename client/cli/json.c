// JSON from the message's own descriptor: every field of the wire is in --json by its name, so the
// contract grows with the .proto and cannot drift from it.
#include <client/cli/cli.h>

#include <assert.h>
#include <base/assert.h>
#include <math.h>
#include <string.h>

static_assert(sizeof(Winnow__V1__Verdict) == sizeof(uint32_t), "an enum prints as uint32");

void cli_json_string(FILE *file, const char *text)
{
    winnow_assert(file);
    winnow_assert(text);
    fputc('"', file);
    for (const unsigned char *at = (const unsigned char *)text; *at; at++) {
        if (*at == '"' || *at == '\\')
            fprintf(file, "\\%c", *at);
        else if (*at < 0x20)
            fprintf(file, "\\u%04x", *at);
        else
            fputc(*at, file);
    }
    fputc('"', file);
}

static void json_bytes(FILE *file, const ProtobufCBinaryData *bytes)
{
    winnow_assert(bytes->data || !bytes->len);
    fputc('"', file);
    for (size_t i = 0; i < bytes->len; i++)
        fprintf(file, "%02x", bytes->data[i]);
    fputc('"', file);
}

static void json_number(FILE *file, double value)
{
    if (isfinite(value))
        fprintf(file, "%.9g", value);
    else
        fputs("null", file);
}

static void json_value(FILE *file, const ProtobufCFieldDescriptor *field, const void *value)
{
    winnow_assert(field);
    winnow_assert(value);
    switch (field->type) {
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_ENUM:
        fprintf(file, "%u", *(const uint32_t *)value);
        break;
    case PROTOBUF_C_TYPE_INT32:
        fprintf(file, "%d", *(const int32_t *)value);
        break;
    case PROTOBUF_C_TYPE_UINT64:
        fprintf(file, "%llu", (unsigned long long)*(const uint64_t *)value);
        break;
    case PROTOBUF_C_TYPE_FLOAT:
        json_number(file, (double)*(const float *)value);
        break;
    case PROTOBUF_C_TYPE_BOOL:
        fputs(*(const protobuf_c_boolean *)value ? "true" : "false", file);
        break;
    case PROTOBUF_C_TYPE_STRING:
        cli_json_string(file, *(char *const *)value);
        break;
    case PROTOBUF_C_TYPE_BYTES:
        json_bytes(file, value);
        break;
    case PROTOBUF_C_TYPE_MESSAGE:
        winnow_assert(*(const void *const *)value); /* NULL: the caller's null */
        fputc('{', file);
        cli_json_fields(file, *(const void *const *)value);
        fputc('}', file);
        break;
    default: /* no other type is in winnow.proto */
        fputs("null", file);
    }
}

static size_t json_value_bytes(const ProtobufCFieldDescriptor *field)
{
    winnow_assert(field->type == PROTOBUF_C_TYPE_UINT64 || field->type == PROTOBUF_C_TYPE_STRING ||
                  field->type == PROTOBUF_C_TYPE_MESSAGE);
    return field->type == PROTOBUF_C_TYPE_UINT64 ? sizeof(uint64_t) : sizeof(void *);
}

static void json_array(FILE *file, const ProtobufCFieldDescriptor *field, const uint8_t *values,
                       size_t n_values)
{
    winnow_assert(field->label == PROTOBUF_C_LABEL_REPEATED);
    winnow_assert(values || !n_values);
    fputc('[', file);
    for (size_t i = 0; i < n_values; i++) {
        fputs(i ? ", " : "", file);
        json_value(file, field, values + i * json_value_bytes(field));
    }
    fputc(']', file);
}

void cli_json_fields(FILE *file, const void *message)
{
    winnow_assert(message);
    const ProtobufCMessageDescriptor *type = ((const ProtobufCMessage *)message)->descriptor;
    winnow_assert(type->magic == PROTOBUF_C__MESSAGE_DESCRIPTOR_MAGIC);
    for (uint32_t i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
        winnow_assert(field->offset < type->sizeof_message);
        winnow_assert(!(field->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)); /* winnow.proto has none */
        const uint8_t *member = (const uint8_t *)message + field->offset;
        fprintf(file, "%s\"%s\": ", i ? ", " : "", field->name);
        if (field->label == PROTOBUF_C_LABEL_REPEATED) {
            size_t n_values =
                *(const size_t *)((const uint8_t *)message + field->quantifier_offset);
            json_array(file, field, *(uint8_t *const *)member, n_values);
        } else if (field->type == PROTOBUF_C_TYPE_MESSAGE && !*(void *const *)member) {
            fputs("null", file);
        } else {
            json_value(file, field, member);
        }
    }
}

void cli_json_warnings(FILE *file, const struct cli_warning *warning, uint32_t n_warnings)
{
    winnow_assert(warning);
    winnow_assert(n_warnings <= CLI_N_WARNINGS_MAX);
    fputs("\"warnings\": [", file);
    for (uint32_t i = 0; i < n_warnings; i++) {
        fprintf(file, "%s{\"reason\": ", i ? ", " : "");
        cli_json_string(file, warning[i].reason);
        fputs(", \"text\": ", file);
        cli_json_string(file, warning[i].text);
        fputs(", \"hint\": ", file);
        cli_json_string(file, warning[i].hint);
        fputc('}', file);
    }
    fputc(']', file);
}
