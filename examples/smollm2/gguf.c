// GGUF reader: one cursor walks the mapping, and only `take` moves it.
//
// The difficulty is trust: counts and sizes in the file are 64-bit and can be anything. `take`
// compares a size with what is left before it gives a pointer, so a sum never wraps, and the two
// tables are bounded (65,536 rows) and by the file's own size before they are allocated: a row takes
// 12 bytes or more, so a file of 100 bytes cannot ask for a table of gigabytes.
#include "gguf.h"

#include "fault.h"
#include "quant.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_ROWS_MAX = 65536, ROW_BYTES_MIN = 12, ALIGNMENT_DEFAULT = 32, ALIGNMENT_MAX = 1 << 20 };

struct cursor {
    const uint8_t *at, *end;
};

/* The next n bytes, or NULL when fewer are left. */
static const uint8_t *take(struct cursor *cursor, uint64_t n_bytes)
{
    if ((uint64_t)(cursor->end - cursor->at) < n_bytes)
        return NULL;
    const uint8_t *bytes = cursor->at;
    cursor->at += n_bytes;
    return bytes;
}

static int take_u32(struct cursor *cursor, uint32_t *value)
{
    const uint8_t *bytes = take(cursor, sizeof *value);
    if (!bytes)
        return -EBADMSG;
    memcpy(value, bytes, sizeof *value);
    return 0;
}

static int take_u64(struct cursor *cursor, uint64_t *value)
{
    const uint8_t *bytes = take(cursor, sizeof *value);
    if (!bytes)
        return -EBADMSG;
    memcpy(value, bytes, sizeof *value);
    return 0;
}

static int take_text(struct cursor *cursor, struct gguf_text *text)
{
    uint64_t n_bytes;
    if (take_u64(cursor, &n_bytes) < 0)
        return -EBADMSG;
    const uint8_t *bytes = take(cursor, n_bytes);
    if (!bytes)
        return -EBADMSG;
    text->bytes = (const char *)bytes;
    text->n_bytes = n_bytes;
    return 0;
}

/* Bytes of one value of a fixed size; 0 for texts, arrays and unknown types. */
static uint64_t value_bytes(uint32_t type)
{
    switch (type) {
    case GGUF_U8:
    case GGUF_I8:
    case GGUF_BOOL:
        return 1;
    case GGUF_U16:
    case GGUF_I16:
        return 2;
    case GGUF_U32:
    case GGUF_I32:
    case GGUF_F32:
        return 4;
    case GGUF_U64:
    case GGUF_I64:
    case GGUF_F64:
        return 8;
    default:
        return 0;
    }
}

/* An array of arrays is refused: no model here has one. */
static int take_value(struct cursor *cursor, struct gguf_value *value)
{
    value->n_items = 1;
    if (take_text(cursor, &value->key) < 0 || take_u32(cursor, &value->type) < 0)
        return -EBADMSG;
    if (value->type == GGUF_ARRAY) {
        value->is_array = 1;
        if (take_u32(cursor, &value->type) < 0 || take_u64(cursor, &value->n_items) < 0)
            return -EBADMSG;
    }
    value->data = cursor->at;
    if (value->type == GGUF_STRING) {
        struct gguf_text text;
        for (uint64_t i = 0; i < value->n_items; i++)
            if (take_text(cursor, &text) < 0)
                return -EBADMSG;
        return 0;
    }
    uint64_t item_bytes = value_bytes(value->type);
    if (!item_bytes || value->n_items > UINT64_MAX / item_bytes)
        return -EBADMSG;
    return take(cursor, value->n_items * item_bytes) ? 0 : -EBADMSG;
}

/* Leaves the tensor's offset in n_bytes: where the data begin is known after the table. */
static int take_tensor(struct cursor *cursor, struct gguf_tensor *tensor)
{
    uint32_t n_dims;
    if (take_text(cursor, &tensor->name) < 0 || take_u32(cursor, &n_dims) < 0)
        return -EBADMSG;
    if (n_dims < 1 || n_dims > 4)
        return -EBADMSG;
    for (uint32_t i = 0; i < 4; i++)
        tensor->shape[i] = 1;
    for (uint32_t i = 0; i < n_dims; i++)
        if (take_u64(cursor, &tensor->shape[i]) < 0)
            return -EBADMSG;
    if (take_u32(cursor, &tensor->type) < 0 || take_u64(cursor, &tensor->n_bytes) < 0)
        return -EBADMSG;
    return 0;
}

static int tensor_place(struct gguf_tensor *tensor, const uint8_t *data, uint64_t n_data_bytes,
                        uint32_t alignment)
{
    uint64_t offset = tensor->n_bytes, n_rows = 1;
    int n_name = tensor->name.n_bytes < 64 ? (int)tensor->name.n_bytes : 64;

    if (!quant_type_known(tensor->type))
        return fault_set(-ENOTSUP, "tensor %.*s has type %u; known are F32, Q4_1 and Q8_0", n_name,
                         tensor->name.bytes, tensor->type);
    for (uint32_t i = 0; i < 4; i++)
        if (tensor->shape[i] < 1 || tensor->shape[i] > (1u << 24))
            return fault_set(-EBADMSG, "tensor %.*s has a dimension of %llu", n_name,
                             tensor->name.bytes, (unsigned long long)tensor->shape[i]);
    for (uint32_t i = 1; i < 4; i++)
        if (__builtin_mul_overflow(n_rows, tensor->shape[i], &n_rows))
            return fault_set(-EBADMSG, "tensor %.*s has too many rows", n_name, tensor->name.bytes);
    if (tensor->shape[0] % quant_block_items(tensor->type))
        return fault_set(-EBADMSG, "tensor %.*s has rows of part blocks", n_name,
                         tensor->name.bytes);

    uint64_t row_bytes = quant_row_bytes(tensor->type, (uint32_t)tensor->shape[0]), n_bytes;
    if (__builtin_mul_overflow(row_bytes, n_rows, &n_bytes) || offset % alignment ||
        offset > n_data_bytes || n_bytes > n_data_bytes - offset)
        return fault_set(-EBADMSG, "tensor %.*s lies outside the file", n_name, tensor->name.bytes);
    tensor->data = data + offset;
    tensor->n_bytes = n_bytes;
    return 0;
}

static int parse_header(struct gguf *gguf, struct cursor *cursor)
{
    const uint8_t *magic = take(cursor, 4);
    uint32_t version;
    uint64_t n_tensors, n_values;

    if (!magic || memcmp(magic, "GGUF", 4) || take_u32(cursor, &version) < 0)
        return fault_set(-EBADMSG, "not a GGUF file");
    if (version != 2 && version != 3)
        return fault_set(-ENOTSUP, "GGUF version %u; this reads 2 and 3", version);
    if (take_u64(cursor, &n_tensors) < 0 || take_u64(cursor, &n_values) < 0)
        return fault_set(-EBADMSG, "the GGUF header is cut short");

    uint64_t n_rows_max = (uint64_t)(cursor->end - cursor->at) / ROW_BYTES_MIN;
    if (n_tensors > N_ROWS_MAX || n_values > N_ROWS_MAX || n_tensors > n_rows_max ||
        n_values > n_rows_max)
        return fault_set(-EBADMSG, "%llu tensors and %llu values do not fit this file",
                         (unsigned long long)n_tensors, (unsigned long long)n_values);
    gguf->values = calloc(n_values + 1, sizeof *gguf->values);
    gguf->tensors = calloc(n_tensors + 1, sizeof *gguf->tensors);
    if (!gguf->values || !gguf->tensors)
        return fault_set(-ENOMEM, "no memory for the tables of the model file");
    gguf->n_values = (uint32_t)n_values;
    gguf->n_tensors = (uint32_t)n_tensors;
    return 0;
}

static int parse_tables(struct gguf *gguf, struct cursor *cursor)
{
    uint32_t alignment = ALIGNMENT_DEFAULT;

    for (uint32_t i = 0; i < gguf->n_values; i++)
        if (take_value(cursor, &gguf->values[i]) < 0)
            return fault_set(-EBADMSG, "metadata value %u is damaged", i);
    for (uint32_t i = 0; i < gguf->n_tensors; i++)
        if (take_tensor(cursor, &gguf->tensors[i]) < 0)
            return fault_set(-EBADMSG, "row %u of the tensor table is damaged", i);

    if (gguf_u32(gguf, "general.alignment", &alignment) == -EBADMSG || alignment < 8 ||
        alignment > ALIGNMENT_MAX || (alignment & (alignment - 1)))
        return fault_set(-EBADMSG, "general.alignment is not a power of two from 8 to 1 MiB");
    uint64_t past = (uint64_t)(cursor->at - gguf->bytes) % alignment;
    if (gguf->n_tensors && past && !take(cursor, alignment - past))
        return fault_set(-EBADMSG, "the file ends before its tensors");

    for (uint32_t i = 0; i < gguf->n_tensors; i++) {
        int rc = tensor_place(&gguf->tensors[i], cursor->at, (uint64_t)(cursor->end - cursor->at),
                              alignment);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int gguf_parse(struct gguf *gguf, const void *bytes, size_t n_bytes)
{
    struct cursor cursor = {bytes, (const uint8_t *)bytes + n_bytes};

    *gguf = (struct gguf){.bytes = bytes, .n_bytes = n_bytes};
    int rc = parse_header(gguf, &cursor);
    if (rc == 0)
        rc = parse_tables(gguf, &cursor);
    if (rc < 0)
        gguf_close(gguf);
    return rc;
}

int gguf_open(struct gguf *gguf, const char *path)
{
    struct stat stat;

    *gguf = (struct gguf){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &stat) < 0) {
        int rc = fault_set(-errno, "model %s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return rc;
    }
    if (!S_ISREG(stat.st_mode) || stat.st_size < 24) {
        close(fd);
        return fault_set(-EBADMSG, "model %s: not a GGUF file", path);
    }
    size_t n_bytes = (size_t)stat.st_size;
    void *bytes = mmap(NULL, n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    int map_errno = errno;
    close(fd);
    if (bytes == MAP_FAILED)
        return fault_set(-map_errno, "model %s: %s", path, strerror(map_errno));

    int rc = gguf_parse(gguf, bytes, n_bytes);
    if (rc < 0) {
        munmap(bytes, n_bytes);
        return rc;
    }
    gguf->n_mapped_bytes = n_bytes;
    return 0;
}

void gguf_close(struct gguf *gguf)
{
    free(gguf->values);
    free(gguf->tensors);
    if (gguf->n_mapped_bytes)
        munmap((void *)(uintptr_t)gguf->bytes, gguf->n_mapped_bytes);
    *gguf = (struct gguf){0};
}

static int text_is(const struct gguf_text *text, const char *name)
{
    return text->n_bytes == strlen(name) && !memcmp(text->bytes, name, text->n_bytes);
}

const struct gguf_value *gguf_value_find(const struct gguf *gguf, const char *key)
{
    for (uint32_t i = 0; i < gguf->n_values; i++)
        if (text_is(&gguf->values[i].key, key))
            return &gguf->values[i];
    return NULL;
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *gguf, const char *name)
{
    for (uint32_t i = 0; i < gguf->n_tensors; i++)
        if (text_is(&gguf->tensors[i].name, name))
            return &gguf->tensors[i];
    return NULL;
}

static int scalar_find(const struct gguf *gguf, const char *key, uint32_t type,
                       const struct gguf_value **ret_value)
{
    const struct gguf_value *value = gguf_value_find(gguf, key);
    if (!value)
        return fault_set(-ENOENT, "the model file has no %s", key);
    if (value->type != type || value->is_array)
        return fault_set(-EBADMSG, "%s of the model file has type %u", key, value->type);
    *ret_value = value;
    return 0;
}

int gguf_u32(const struct gguf *gguf, const char *key, uint32_t *value)
{
    const struct gguf_value *found = NULL;
    int rc = scalar_find(gguf, key, GGUF_U32, &found);
    if (rc == 0)
        memcpy(value, found->data, sizeof *value);
    return rc;
}

int gguf_f32(const struct gguf *gguf, const char *key, float *value)
{
    const struct gguf_value *found = NULL;
    int rc = scalar_find(gguf, key, GGUF_F32, &found);
    if (rc == 0)
        memcpy(value, found->data, sizeof *value);
    return rc;
}

int gguf_text(const struct gguf *gguf, const char *key, struct gguf_text *value)
{
    const struct gguf_value *found = NULL;
    int rc = scalar_find(gguf, key, GGUF_STRING, &found);
    if (rc == 0) {
        const uint8_t *at = found->data;
        *value = gguf_text_next(&at);
    }
    return rc;
}

struct gguf_text gguf_text_next(const uint8_t **at)
{
    uint64_t n_bytes;
    memcpy(&n_bytes, *at, sizeof n_bytes);
    struct gguf_text text = {(const char *)*at + sizeof n_bytes, n_bytes};
    *at += sizeof n_bytes + n_bytes;
    return text;
}
