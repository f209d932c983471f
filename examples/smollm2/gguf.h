/*
 * GGUF: a model file, mapped and checked.
 *
 * The file is little-endian: magic, version, two counts, then the metadata (key, type, value), the
 * tensor table (name, dimensions, type, offset) and, aligned, the tensors' bytes. Everything here
 * points into the mapping: nothing is copied, and nothing lives longer than the struct gguf.
 *
 * The file is foreign input: every count, size and offset is checked against the mapping before it
 * is used, so a hostile file is refused and never read past its end. Once gguf_open has returned 0,
 * each tensor's bytes lie inside the mapping.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* Types of metadata values, as the file numbers them. */
enum gguf_value_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
};

/* Bytes in the mapping; not terminated by a zero. */
struct gguf_text {
    const char *bytes;
    size_t n_bytes;
};

/* type is the elements' type; n_items is 1 unless the value is an array. */
struct gguf_value {
    struct gguf_text key;
    uint32_t type;
    int is_array;
    uint64_t n_items;
    const uint8_t *data;
};

/* shape[0] is the innermost dimension: a row of shape[0] elements, shape[1] rows. */
struct gguf_tensor {
    struct gguf_text name;
    uint32_t type; /* quant.h */
    uint64_t shape[4];
    const uint8_t *data;
    uint64_t n_bytes;
};

struct gguf {
    const uint8_t *bytes;
    size_t n_bytes;
    size_t n_mapped_bytes; /* 0: the bytes are the caller's */
    struct gguf_value *values;
    uint32_t n_values;
    struct gguf_tensor *tensors;
    uint32_t n_tensors;
};

/* Maps and checks a file. 0; -ENOENT and the like from open; -EBADMSG not a GGUF this can read;
 * -ENOTSUP a version or tensor type that quant.h does not know; -ENOMEM. */
int gguf_open(struct gguf *gguf, const char *path);

/* The same over bytes of the caller's, which must outlive *gguf. */
int gguf_parse(struct gguf *gguf, const void *bytes, size_t n_bytes);

/* Fine on a zeroed or failed struct. */
void gguf_close(struct gguf *gguf);

/* NULL when there is none. */
const struct gguf_value *gguf_value_find(const struct gguf *gguf, const char *key);
const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name);

/* One metadata value of that type. -ENOENT no such key, -EBADMSG another type. */
int gguf_u32(const struct gguf *gguf, const char *key, uint32_t *value);
int gguf_f32(const struct gguf *gguf, const char *key, float *value);
int gguf_text(const struct gguf *gguf, const char *key, struct gguf_text *value);

/* Walks an array of texts: begin with *at = value->data, n_items calls. */
struct gguf_text gguf_text_next(const uint8_t **at);
