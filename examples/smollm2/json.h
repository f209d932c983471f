/*
 * JSON writer: one object on a stream, commas and escapes kept right.
 *
 * Keys are literals. A text of any bytes becomes valid UTF-8: bytes that are not are written as
 * U+FFFD. Numbers that JSON lacks (NaN, infinite) are null.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct json {
    FILE *stream;
    bool needs_comma;
};

/* key NULL inside an array and for the outermost object. */
void json_object_begin(struct json *json, const char *key);
void json_object_end(struct json *json);
void json_array_begin(struct json *json, const char *key);
void json_array_end(struct json *json);
void json_text(struct json *json, const char *key, const char *bytes, size_t n_bytes);
void json_number(struct json *json, const char *key, double value);
void json_count(struct json *json, const char *key, uint64_t value);
void json_bool(struct json *json, const char *key, bool value);
void json_null(struct json *json, const char *key);
void json_counts(struct json *json, const char *key, const uint32_t *values, size_t n_values);
