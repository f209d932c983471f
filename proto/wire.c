// Wire: protobuf from strangers, in bounded memory.
//
// protobuf-c trusts its input: 4 MiB of empty sub-messages make it allocate 352 MiB, and it copies
// every `bytes` field. So its allocator is a bump arena that says no, and the tensor never reaches
// it: a walk over the top-level tags cuts field 15 out of the slices (0.1 us against 274 us for a
// 4 MiB copy) and hands protobuf-c the small rest. Rejected: a hand-written decoder a message; it
// saves 1 us of 90 and must be kept equal to the .proto by hand.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <errno.h>
#include <proto/wire.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct arena_piece {
    struct arena_piece *next;
    size_t n_bytes, n_used;
    _Alignas(16) uint8_t data[];
};

struct winnow_wire_arena {
    ProtobufCAllocator allocator;
    struct arena_piece *piece; /* newest first; the last one stays over a reset */
    size_t n_bytes;            /* of all pieces */
    uint32_t n_allocations;
    bool is_spent; /* something was refused since the reset */
};

static_assert(offsetof(struct arena_piece, data) % 16 == 0, "what is taken is aligned to 16");
static_assert(WINNOW_WIRE_ARENA_BYTES % 16 == 0, "a piece holds whole paddings");
static_assert(WINNOW_WIRE_REST_BYTES_MAX <= WINNOW_WIRE_ARENA_BYTES, "the rest fits one piece");
static_assert(WINNOW_WIRE_CHUNK_BYTES_MAX <= WINNOW_WIRE_ATTEND_BYTES_MAX, "the larger tensor");
static_assert(WINNOW_WIRE_MESSAGE_BYTES_MAX >=
                  WINNOW_WIRE_ATTEND_BYTES_MAX + WINNOW_WIRE_REST_BYTES_MAX,
              "gRPC lets through what the decoder takes");
static_assert(WINNOW_WIRE_TENSOR_FIELD < 16, "its tag is one byte");

static struct arena_piece *arena_grow(struct winnow_wire_arena *arena, size_t n_bytes_wanted)
{
    size_t n_bytes = arena->n_bytes ? arena->n_bytes : WINNOW_WIRE_ARENA_BYTES;
    if (arena->n_bytes + n_bytes > WINNOW_WIRE_ARENA_BYTES_MAX || n_bytes_wanted > n_bytes)
        return NULL;
    struct arena_piece *piece = winnow_alloc(sizeof *piece + n_bytes);
    if (!piece)
        return NULL;
    piece->n_bytes = n_bytes;
    piece->next = arena->piece;
    arena->piece = piece;
    arena->n_bytes += n_bytes;
    winnow_assert(arena->n_bytes <= WINNOW_WIRE_ARENA_BYTES_MAX);
    return piece;
}

static void *arena_bump(struct winnow_wire_arena *arena, size_t n_bytes)
{
    if (n_bytes > WINNOW_WIRE_ARENA_BYTES_MAX)
        return NULL;
    size_t n_padded = (n_bytes + 15) & ~(size_t)15;
    struct arena_piece *piece = arena->piece;
    winnow_assert(piece->n_used <= piece->n_bytes);
    winnow_assert(piece->n_used % 16 == 0);
    if (piece->n_used + n_padded > piece->n_bytes)
        piece = arena_grow(arena, n_padded);
    if (!piece)
        return NULL;
    void *memory = piece->data + piece->n_used;
    piece->n_used += n_padded;
    winnow_assert(piece->n_used <= piece->n_bytes);
    winnow_assert((uintptr_t)memory % 16 == 0);
    return memory;
}

static void *arena_allocate(void *user, size_t n_bytes)
{
    struct winnow_wire_arena *arena = user;
    void *memory = NULL;
    if (arena->n_allocations < WINNOW_WIRE_N_ALLOCATIONS_MAX)
        memory = arena_bump(arena, n_bytes);
    arena->n_allocations++;
    if (!memory)
        arena->is_spent = true;
    return memory;
}

static void arena_release(void *user, void *memory) /* all at once, in reset */
{
    (void)user;
    (void)memory;
}

int winnow_wire_arena_create(struct winnow_wire_arena **ret_arena)
{
    struct winnow_wire_arena *arena = winnow_alloc(sizeof *arena);
    if (!arena)
        return -ENOMEM;
    arena->allocator = (ProtobufCAllocator){arena_allocate, arena_release, arena};
    if (!arena_grow(arena, 0)) {
        winnow_alloc_free(arena);
        return -ENOMEM;
    }
    *ret_arena = arena;
    return 0;
}

void winnow_wire_arena_reset(struct winnow_wire_arena *arena)
{
    winnow_assert(arena->piece);
    while (arena->piece->next) {
        struct arena_piece *piece = arena->piece;
        arena->piece = piece->next;
        arena->n_bytes -= piece->n_bytes;
        winnow_alloc_free(piece);
    }
    winnow_assert(arena->n_bytes == WINNOW_WIRE_ARENA_BYTES);
    arena->piece->n_used = 0;
    arena->n_allocations = 0;
    arena->is_spent = false;
}

void winnow_wire_arena_destroy(struct winnow_wire_arena *arena)
{
    if (!arena)
        return;
    winnow_wire_arena_reset(arena);
    winnow_alloc_free(arena->piece);
    winnow_alloc_free(arena);
}

void *winnow_wire_arena_take(struct winnow_wire_arena *arena, size_t n_bytes)
{
    void *memory = arena_allocate(arena, n_bytes);
    return memory ? memset(memory, 0, n_bytes) : NULL;
}

void winnow_wire_tensor_copy(const struct winnow_wire_tensor *tensor, size_t from_bytes, void *dst,
                             size_t n_bytes)
{
    winnow_assert(from_bytes <= tensor->n_bytes);
    winnow_assert(n_bytes <= tensor->n_bytes - from_bytes);
    const struct winnow_wire_slice *slice = tensor->slice;
    size_t offset_bytes = tensor->offset_bytes + from_bytes;
    for (uint8_t *to = dst; n_bytes;) {
        if (offset_bytes >= slice->n_bytes) {
            offset_bytes -= slice++->n_bytes;
            continue;
        }
        size_t n_here = slice->n_bytes - offset_bytes;
        if (n_here > n_bytes)
            n_here = n_bytes;
        memcpy(to, (const uint8_t *)slice->data + offset_bytes, n_here);
        to += n_here;
        n_bytes -= n_here;
        offset_bytes += n_here;
    }
}

/* A place in the received slices. Kept so that offset_bytes < slice->n_bytes unless at the end. */
struct cursor {
    const struct winnow_wire_slice *slice, *end;
    size_t offset_bytes;
    size_t position_bytes, n_bytes; /* of the whole message */
};

static void cursor_settle(struct cursor *cursor)
{
    while (cursor->slice != cursor->end && cursor->offset_bytes >= cursor->slice->n_bytes)
        cursor->offset_bytes -= cursor->slice++->n_bytes;
}

static bool cursor_skip(struct cursor *cursor, uint64_t n_bytes)
{
    winnow_assert(cursor->position_bytes <= cursor->n_bytes);
    if (n_bytes > cursor->n_bytes - cursor->position_bytes)
        return false;
    cursor->position_bytes += n_bytes;
    cursor->offset_bytes += n_bytes;
    cursor_settle(cursor);
    return true;
}

static bool cursor_varint(struct cursor *cursor, uint64_t *ret_value)
{
    uint64_t value = 0;
    for (uint32_t shift = 0; shift < 64; shift += 7) {
        if (cursor->position_bytes == cursor->n_bytes)
            return false;
        winnow_assert(cursor->slice != cursor->end);
        winnow_assert(cursor->offset_bytes < cursor->slice->n_bytes);
        uint64_t byte = ((const uint8_t *)cursor->slice->data)[cursor->offset_bytes];
        cursor_skip(cursor, 1);
        value |= (byte & 127) << shift;
        if (byte < 128) {
            *ret_value = value;
            return true;
        }
    }
    return false;
}

/* Skips a field's value; *ret_length is that of a length-delimited one. */
static bool cursor_field(struct cursor *cursor, uint64_t tag, uint64_t *ret_length)
{
    uint64_t value;
    *ret_length = 0;
    switch (tag & 7) {
    case 0:
        return cursor_varint(cursor, &value);
    case 1:
        return cursor_skip(cursor, 8);
    case 2:
        return cursor_varint(cursor, ret_length) && cursor_skip(cursor, *ret_length);
    case 5:
        return cursor_skip(cursor, 4);
    default: /* groups */
        return false;
    }
}

/* The three parts of a message: before the tensor's field, the tensor, behind it. */
struct cut {
    size_t n_before, n_behind;
    size_t behind_bytes; /* where the part behind begins */
    struct winnow_wire_tensor tensor;
    bool has_tensor;
};

static int cut_message(const struct winnow_wire_input *input, struct cut *cut,
                       const char **ret_what)
{
    struct cursor cursor = {.slice = input->slice, .end = input->slice + input->n_slices};
    for (uint32_t i = 0; i < input->n_slices; i++)
        cursor.n_bytes += input->slice[i].n_bytes;
    cursor_settle(&cursor);

    *cut = (struct cut){.n_before = cursor.n_bytes};
    while (cursor.position_bytes < cursor.n_bytes) {
        size_t begin_bytes = cursor.position_bytes;
        uint64_t tag, n_bytes;
        *ret_what = "malformed message";
        if (!cursor_varint(&cursor, &tag) || tag >> 32 || !(tag >> 3))
            return -EINVAL;
        struct cursor value = cursor;
        if (!cursor_field(&cursor, tag, &n_bytes))
            return -EINVAL;
        if (tag != (WINNOW_WIRE_TENSOR_FIELD << 3 | 2))
            continue;
        *ret_what = "field 15 occurs twice";
        if (cut->has_tensor)
            return -EINVAL;
        uint64_t length;
        cursor_varint(&value, &length);
        winnow_assert(length == n_bytes);
        *cut = (struct cut){
            .n_before = begin_bytes,
            .n_behind = cursor.n_bytes - cursor.position_bytes,
            .behind_bytes = cursor.position_bytes,
            .tensor = {value.slice, value.offset_bytes, n_bytes},
            .has_tensor = true,
        };
    }
    winnow_assert(cursor.slice == cursor.end);
    winnow_assert(cut->n_before + cut->tensor.n_bytes + cut->n_behind <= cursor.n_bytes);
    return 0;
}

static void copy_range(const struct winnow_wire_input *input, size_t from_bytes, void *dst,
                       size_t n_bytes)
{
    struct winnow_wire_tensor whole = {input->slice, 0, from_bytes + n_bytes};
    winnow_wire_tensor_copy(&whole, from_bytes, dst, n_bytes);
}

/* The number of the first unknown field at any depth, 0: none. Our messages do not recurse. */
static uint32_t find_unknown(const ProtobufCMessage *message)
{
    if (message->n_unknown_fields)
        return message->unknown_fields[0].tag;
    for (uint32_t i = 0; i < message->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &message->descriptor->fields[i];
        if (field->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        const void *member = (const uint8_t *)message + field->offset;
        bool is_repeated = field->label == PROTOBUF_C_LABEL_REPEATED;
        const ProtobufCMessage *const *children = is_repeated ? *(void *const *)member : member;
        size_t n_children = 1;
        if (is_repeated)
            n_children = *(const size_t *)((const uint8_t *)message + field->quantifier_offset);
        for (size_t j = 0; j < n_children; j++) {
            uint32_t unknown = children[j] ? find_unknown(children[j]) : 0;
            if (unknown)
                return unknown;
        }
    }
    return 0;
}

static int fail(struct winnow_wire_message *message, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static int fail(struct winnow_wire_message *message, int error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message->text, sizeof message->text, format, args);
    va_end(args);
    return error;
}

static bool has_bool(const ProtobufCMessageDescriptor *type)
{
    for (uint32_t i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
        if (field->type == PROTOBUF_C_TYPE_BOOL ||
            (field->type == PROTOBUF_C_TYPE_MESSAGE && has_bool(field->descriptor)))
            return true;
    }
    return false;
}

/* protobuf-c checks every wire type but a bool's, which it reads from any: this checks that one, at
 * every depth. Messages that hold no bool, as those of Attend, are not walked. */
static bool are_bools_varints(const ProtobufCMessageDescriptor *type, const uint8_t *data,
                              size_t n_bytes)
{
    struct winnow_wire_slice slice = {data, n_bytes};
    struct cursor cursor = {.slice = &slice, .end = &slice + 1, .n_bytes = n_bytes};
    bool is_walked = has_bool(type);
    while (is_walked && cursor.position_bytes < n_bytes) {
        uint64_t tag, n_value;
        if (!cursor_varint(&cursor, &tag) || !cursor_field(&cursor, tag, &n_value))
            return false;
        const ProtobufCFieldDescriptor *field =
            protobuf_c_message_descriptor_get_field(type, (unsigned)(tag >> 3));
        if (!field)
            continue;
        if (field->type == PROTOBUF_C_TYPE_BOOL && (tag & 7) != PROTOBUF_C_WIRE_TYPE_VARINT)
            return false;
        winnow_assert(n_value <= cursor.position_bytes);
        if (field->type == PROTOBUF_C_TYPE_MESSAGE &&
            !are_bools_varints(field->descriptor, data + cursor.position_bytes - n_value, n_value))
            return false;
    }
    return true;
}

/* Unpacks all but the tensor. NULL: malformed, or the arena is spent. */
static ProtobufCMessage *unpack_rest(struct winnow_wire_arena *arena,
                                     const ProtobufCMessageDescriptor *type,
                                     const struct winnow_wire_input *input, const struct cut *cut)
{
    uint8_t *rest = arena_allocate(arena, cut->n_before + cut->n_behind);
    if (!rest)
        return NULL;
    copy_range(input, 0, rest, cut->n_before);
    copy_range(input, cut->behind_bytes, rest + cut->n_before, cut->n_behind);
    if (!are_bools_varints(type, rest, cut->n_before + cut->n_behind))
        return NULL;
    return protobuf_c_message_unpack(type, &arena->allocator, cut->n_before + cut->n_behind, rest);
}

int winnow_wire_decode(struct winnow_wire_arena *arena, const ProtobufCMessageDescriptor *type,
                       const struct winnow_wire_input *input,
                       struct winnow_wire_message *ret_message)
{
    winnow_assert(input->slice || !input->n_slices);
    winnow_assert(!arena->piece->next || arena->n_allocations);
    const char *name = type->short_name;
    struct cut cut;
    const char *what;
    int rc = cut_message(input, &cut, &what);
    if (rc < 0)
        return fail(ret_message, rc, "%s: %s", name, what);

    size_t n_rest = cut.n_before + cut.n_behind;
    if (n_rest > WINNOW_WIRE_REST_BYTES_MAX)
        return fail(ret_message, -EMSGSIZE, "%s: %zu bytes without data, limit %d", name, n_rest,
                    WINNOW_WIRE_REST_BYTES_MAX);
    if (cut.tensor.n_bytes > input->tensor_bytes_max)
        return fail(ret_message, -EMSGSIZE, "%s: data of %zu bytes, limit %u", name,
                    cut.tensor.n_bytes, input->tensor_bytes_max);
    bool may_have_tensor = protobuf_c_message_descriptor_get_field(type, WINNOW_WIRE_TENSOR_FIELD);
    if (cut.has_tensor && input->is_request && !may_have_tensor)
        return fail(ret_message, -EINVAL, "%s: unknown field %d", name, WINNOW_WIRE_TENSOR_FIELD);

    ProtobufCMessage *message = unpack_rest(arena, type, input, &cut);
    if (arena->is_spent)
        return fail(ret_message, -ENOMEM, "%s: too many parts, limit %d", name,
                    WINNOW_WIRE_N_ALLOCATIONS_MAX);
    if (!message)
        return fail(ret_message, -EINVAL, "%s: malformed message", name);
    winnow_assert(message->descriptor == type);
    uint32_t unknown = input->is_request ? find_unknown(message) : 0;
    if (unknown)
        return fail(ret_message, -EINVAL, "%s: unknown field %u", name, unknown);

    ret_message->message = message;
    ret_message->tensor = may_have_tensor ? cut.tensor : (struct winnow_wire_tensor){0};
    return 0;
}

/* Bytes that encode `value` as a varint. */
static size_t varint_bytes(uint64_t value)
{
    size_t n_bytes = 1;
    for (; value >= 128; value >>= 7)
        n_bytes++;
    return n_bytes;
}

size_t winnow_wire_head_bytes(const void *message, size_t tensor_bytes)
{
    size_t n_bytes = protobuf_c_message_get_packed_size(message);
    return tensor_bytes ? n_bytes + 1 + varint_bytes(tensor_bytes) : n_bytes;
}

size_t winnow_wire_head(const void *message, size_t tensor_bytes, void *dst)
{
    uint8_t *to = (uint8_t *)dst + protobuf_c_message_pack(message, dst);
    if (tensor_bytes) {
        *to++ = WINNOW_WIRE_TENSOR_FIELD << 3 | 2;
        for (; tensor_bytes >= 128; tensor_bytes >>= 7)
            *to++ = (uint8_t)(tensor_bytes | 128);
        *to++ = (uint8_t)tensor_bytes;
    }
    return (size_t)(to - (uint8_t *)dst);
}
