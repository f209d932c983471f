#include "json.h"

#include <math.h>
#include <string.h>

/* Comma and key of the next value. */
static void lead(struct json *json, const char *key)
{
    if (json->needs_comma)
        fputs(", ", json->stream);
    if (key)
        fprintf(json->stream, "\"%s\": ", key);
    json->needs_comma = true;
}

static void begin(struct json *json, const char *key, char bracket)
{
    lead(json, key);
    fputc(bracket, json->stream);
    json->needs_comma = false;
}

static void end(struct json *json, char bracket)
{
    fputc(bracket, json->stream);
    json->needs_comma = true;
}

void json_object_begin(struct json *json, const char *key)
{
    begin(json, key, '{');
}

void json_object_end(struct json *json)
{
    end(json, '}');
}

void json_array_begin(struct json *json, const char *key)
{
    begin(json, key, '[');
}

void json_array_end(struct json *json)
{
    end(json, ']');
}

/* Bytes of the well-formed UTF-8 character at the front (no surrogates, nothing overlong), or 0. */
static size_t character_bytes(const uint8_t *at, size_t n_bytes)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t n = at[0] < 0x80       ? 1
               : at[0] >> 5 == 6  ? 2
               : at[0] >> 4 == 14 ? 3
               : at[0] >> 3 == 30 ? 4
                                  : 0;
    uint32_t point = n == 1 ? at[0] : at[0] & (0x7fu >> n);

    if (n == 0 || n > n_bytes)
        return 0;
    for (size_t i = 1; i < n; i++) {
        if ((at[i] & 0xc0) != 0x80)
            return 0;
        point = point << 6 | (at[i] & 0x3f);
    }
    return point < least[n] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000) ? 0 : n;
}

static void escape(FILE *stream, uint8_t byte)
{
    static const char named[] = "\"\"\\\\\nn\tt\rr\bb\ff";
    for (size_t i = 0; i < sizeof named - 1; i += 2) {
        if (byte == (uint8_t)named[i]) {
            fprintf(stream, "\\%c", named[i + 1]);
            return;
        }
    }
    if (byte < 0x20 || byte == 0x7f)
        fprintf(stream, "\\u%04x", byte);
    else
        fputc(byte, stream);
}

void json_text(struct json *json, const char *key, const char *bytes, size_t n_bytes)
{
    const uint8_t *at = (const uint8_t *)bytes;

    lead(json, key);
    fputc('"', json->stream);
    for (size_t i = 0; i < n_bytes;) {
        size_t n = character_bytes(at + i, n_bytes - i);
        if (n == 0)
            fputs("\\ufffd", json->stream);
        else if (n == 1)
            escape(json->stream, at[i]);
        else
            fwrite(at + i, 1, n, json->stream);
        i += n ? n : 1;
    }
    fputc('"', json->stream);
}

void json_number(struct json *json, const char *key, double value)
{
    if (!isfinite(value)) {
        json_null(json, key);
        return;
    }
    lead(json, key);
    fprintf(json->stream, "%.9g", value);
}

void json_count(struct json *json, const char *key, uint64_t value)
{
    lead(json, key);
    fprintf(json->stream, "%llu", (unsigned long long)value);
}

void json_bool(struct json *json, const char *key, bool value)
{
    lead(json, key);
    fputs(value ? "true" : "false", json->stream);
}

void json_null(struct json *json, const char *key)
{
    lead(json, key);
    fputs("null", json->stream);
}

void json_counts(struct json *json, const char *key, const uint32_t *values, size_t n_values)
{
    json_array_begin(json, key);
    for (size_t i = 0; i < n_values; i++)
        json_count(json, NULL, values[i]);
    json_array_end(json);
}
