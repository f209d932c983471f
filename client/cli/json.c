// JSON from the message's own descriptor: every field of the wire is in --json by its name, so the
// contract grows with the .proto and cannot drift from it.
#include <client/cli/cli.h>

#include <math.h>
#include <string.h>

void cli_json_string(FILE *file, const char *text)
{
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
    return field->type == PROTOBUF_C_TYPE_UINT64 ? sizeof(uint64_t) : sizeof(void *);
}

static void json_array(FILE *file, const ProtobufCFieldDescriptor *field, const uint8_t *values,
                       size_t n_values)
{
    fputc('[', file);
    for (size_t i = 0; i < n_values; i++) {
        fputs(i ? ", " : "", file);
        json_value(file, field, values + i * json_value_bytes(field));
    }
    fputc(']', file);
}

void cli_json_fields(FILE *file, const void *message)
{
    const ProtobufCMessageDescriptor *type = ((const ProtobufCMessage *)message)->descriptor;
    for (uint32_t i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
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
