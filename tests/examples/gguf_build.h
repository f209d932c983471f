/* Writes GGUF files into memory, well-formed or not, for tests. */
#pragma once

#include <examples/smollm2/gguf.h>
#include <stdint.h>
#include <string.h>

struct gguf_build {
    uint8_t bytes[1 << 20] __attribute__((aligned(64)));
    size_t n_bytes;
};

static inline void build_bytes(struct gguf_build *build, const void *bytes, size_t n_bytes)
{
    memcpy(build->bytes + build->n_bytes, bytes, n_bytes);
    build->n_bytes += n_bytes;
}

static inline void build_u32(struct gguf_build *build, uint32_t value)
{
    build_bytes(build, &value, sizeof value);
}

static inline void build_u64(struct gguf_build *build, uint64_t value)
{
    build_bytes(build, &value, sizeof value);
}

static inline void build_text(struct gguf_build *build, const char *text)
{
    build_u64(build, strlen(text));
    build_bytes(build, text, strlen(text));
}

static inline void build_header(struct gguf_build *build, uint64_t n_tensors, uint64_t n_values)
{
    build->n_bytes = 0;
    build_bytes(build, "GGUF", 4);
    build_u32(build, 3);
    build_u64(build, n_tensors);
    build_u64(build, n_values);
}

static inline void build_value_u32(struct gguf_build *build, const char *key, uint32_t value)
{
    build_text(build, key);
    build_u32(build, GGUF_U32);
    build_u32(build, value);
}

static inline void build_value_text(struct gguf_build *build, const char *key, const char *value)
{
    build_text(build, key);
    build_u32(build, GGUF_STRING);
    build_text(build, value);
}

/* The head of an array; its items follow. */
static inline void build_array(struct gguf_build *build, const char *key, uint32_t type,
                               uint64_t n_items)
{
    build_text(build, key);
    build_u32(build, GGUF_ARRAY);
    build_u32(build, type);
    build_u64(build, n_items);
}

static inline void build_tensor(struct gguf_build *build, const char *name, uint32_t type,
                                uint64_t n_columns, uint64_t n_rows, uint64_t offset)
{
    build_text(build, name);
    build_u32(build, 2);
    build_u64(build, n_columns);
    build_u64(build, n_rows);
    build_u32(build, type);
    build_u64(build, offset);
}

static inline void build_pad(struct gguf_build *build, size_t alignment)
{
    while (build->n_bytes % alignment)
        build->bytes[build->n_bytes++] = 0;
}
