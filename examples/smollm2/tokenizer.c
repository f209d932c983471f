// Byte-level BPE in three steps: special tokens cut the text, PCRE2 splits the parts into words, and
// each word's bytes are merged, best rank first and leftmost among equals.
//
// Merging is where it can go wrong: looking for the best pair again after each merge is quadratic,
// and a file of 100,000 letters without a space is one word. A heap of candidate pairs makes it
// n log n; a pair whose halves have been merged since is recognised by its ids (a merged symbol has
// another id, the one it swallowed has none) and dropped.
//
// Splitting works on one part at a time as the whole subject, because the rule's lookahead must not
// see past the digit at which an earlier rule has split.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer.h"

#include "fault.h"

#include <errno.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum { TYPE_NORMAL = 1, TYPE_CONTROL = 3, N_TOKENS_MAX = 1 << 20, NONE = -1 };
enum { TEXT_BYTES_MAX = 64 << 20 };

static const char digit_rule[] = "\\p{N}";
static const char word_rule[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
                                "|\\s+(?!\\S)|\\s+";

/* Open addressing; a slot holds index + 1. Vocabulary: by text. Merges: by pair of ids. */
struct table {
    uint32_t *slots;
    uint32_t mask;
};

struct merge {
    uint32_t left_id, right_id, merged_id; /* its place in the array is its rank */
};

/* A word while it is merged: a list of symbols, neighbours by index. */
struct symbol {
    uint32_t id;
    int32_t previous, next;
};

struct candidate {
    uint32_t rank;
    int32_t left, right;
};

struct tokenizer {
    struct gguf_text *texts; /* [n_tokens] */
    const uint8_t *types;    /* [n_tokens] int32, unaligned */
    uint32_t *special_ids;   /* all begin with '<' */
    struct merge *merges;
    uint32_t n_tokens, n_specials, n_merges, end_id;
    struct table by_text, by_pair;
    int32_t id_of_byte[256];
    int16_t byte_of_point[324]; /* code points of the byte alphabet, all below 324 */
    pcre2_code *digit, *word;
    pcre2_match_data *match;
    struct symbol *symbols; /* scratch of one word */
    struct candidate *heap;
    uint32_t n_symbols_max, n_heap;
};

int tokens_append(struct tokens *tokens, uint32_t id)
{
    if (tokens->n_ids == tokens->n_ids_max) {
        uint32_t n_ids_max = tokens->n_ids_max ? tokens->n_ids_max * 2 : 256;
        uint32_t *ids = realloc(tokens->ids, n_ids_max * sizeof *ids);
        if (!ids)
            return fault_set(-ENOMEM, "no memory for %u tokens", n_ids_max);
        tokens->ids = ids;
        tokens->n_ids_max = n_ids_max;
    }
    tokens->ids[tokens->n_ids++] = id;
    return 0;
}

void tokens_free(struct tokens *tokens)
{
    free(tokens->ids);
    *tokens = (struct tokens){0};
}

static uint32_t hash_text(const char *bytes, size_t n_bytes)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n_bytes; i++)
        hash = (hash ^ (uint8_t)bytes[i]) * 0x100000001b3u;
    return (uint32_t)(hash ^ (hash >> 32));
}

static uint32_t hash_pair(uint32_t left_id, uint32_t right_id)
{
    uint64_t hash = (((uint64_t)left_id << 32) | right_id) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(hash >> 32);
}

/* Room for n_items at a load of at most one half. */
static int table_create(struct table *table, uint32_t n_items)
{
    uint32_t n_slots = 16;
    while (n_slots < n_items * 2)
        n_slots *= 2;
    table->mask = n_slots - 1;
    table->slots = calloc(n_slots, sizeof *table->slots);
    return table->slots ? 0 : fault_set(-ENOMEM, "no memory for the tokenizer");
}

static void table_put(struct table *table, uint32_t hash, uint32_t item_idx)
{
    uint32_t slot = hash & table->mask;
    while (table->slots[slot])
        slot = (slot + 1) & table->mask;
    table->slots[slot] = item_idx + 1;
}

static int32_t text_find(const struct tokenizer *t, const char *bytes, size_t n_bytes)
{
    uint32_t slot = hash_text(bytes, n_bytes) & t->by_text.mask, found;
    for (; (found = t->by_text.slots[slot]) != 0; slot = (slot + 1) & t->by_text.mask) {
        const struct gguf_text *text = &t->texts[found - 1];
        if (text->n_bytes == n_bytes && !memcmp(text->bytes, bytes, n_bytes))
            return (int32_t)found - 1;
    }
    return NONE;
}

/* The rank of a pair, NONE when it does not merge. */
static int32_t pair_find(const struct tokenizer *t, uint32_t left_id, uint32_t right_id)
{
    uint32_t slot = hash_pair(left_id, right_id) & t->by_pair.mask, found;
    for (; (found = t->by_pair.slots[slot]) != 0; slot = (slot + 1) & t->by_pair.mask) {
        const struct merge *merge = &t->merges[found - 1];
        if (merge->left_id == left_id && merge->right_id == right_id)
            return (int32_t)found - 1;
    }
    return NONE;
}

static int32_t token_type(const struct tokenizer *t, uint32_t id)
{
    int32_t type;
    memcpy(&type, t->types + (size_t)id * sizeof type, sizeof type);
    return type;
}

static int create_vocabulary(struct tokenizer *t, const struct gguf *gguf)
{
    const struct gguf_value *texts = gguf_value_find(gguf, "tokenizer.ggml.tokens");
    const struct gguf_value *types = gguf_value_find(gguf, "tokenizer.ggml.token_type");

    if (!texts || !texts->is_array || texts->type != GGUF_STRING || !types || !types->is_array ||
        types->type != GGUF_I32 || texts->n_items != types->n_items)
        return fault_set(-EBADMSG, "the model file has no vocabulary with types");
    if (texts->n_items < 1 || texts->n_items > N_TOKENS_MAX)
        return fault_set(-EBADMSG, "a vocabulary of %llu tokens; from 1 to %d can be read",
                         (unsigned long long)texts->n_items, N_TOKENS_MAX);
    t->n_tokens = (uint32_t)texts->n_items;
    t->types = types->data;
    t->texts = calloc(t->n_tokens, sizeof *t->texts);
    t->special_ids = calloc(t->n_tokens, sizeof *t->special_ids);
    if (!t->texts || !t->special_ids)
        return fault_set(-ENOMEM, "no memory for the tokenizer");
    int rc = table_create(&t->by_text, t->n_tokens);
    if (rc < 0)
        return rc;

    const uint8_t *at = texts->data;
    for (uint32_t id = 0; id < t->n_tokens; id++) {
        t->texts[id] = gguf_text_next(&at);
        if (token_type(t, id) == TYPE_CONTROL && t->texts[id].n_bytes &&
            t->texts[id].bytes[0] == '<')
            t->special_ids[t->n_specials++] = id;
        if (text_find(t, t->texts[id].bytes, t->texts[id].n_bytes) == NONE)
            table_put(&t->by_text, hash_text(t->texts[id].bytes, t->texts[id].n_bytes), id);
    }
    return 0;
}

/* A merge is "left right"; both and their joint text are tokens. */
static int merge_parse(const struct tokenizer *t, struct gguf_text text, struct merge *merge)
{
    char joint[TOKENIZER_PIECE_BYTES_MAX];
    const char *space = text.n_bytes > 2 ? memchr(text.bytes + 1, ' ', text.n_bytes - 1) : NULL;

    if (!space || text.n_bytes > sizeof joint)
        return -EBADMSG;
    size_t n_left = (size_t)(space - text.bytes), n_right = text.n_bytes - n_left - 1;
    memcpy(joint, text.bytes, n_left);
    memcpy(joint + n_left, space + 1, n_right);
    int32_t left = text_find(t, text.bytes, n_left), right = text_find(t, space + 1, n_right);
    int32_t merged = text_find(t, joint, n_left + n_right);
    if (left < 0 || right < 0 || merged < 0)
        return -EBADMSG;
    *merge = (struct merge){(uint32_t)left, (uint32_t)right, (uint32_t)merged};
    return 0;
}

static int create_merges(struct tokenizer *t, const struct gguf *gguf)
{
    const struct gguf_value *merges = gguf_value_find(gguf, "tokenizer.ggml.merges");

    if (!merges || !merges->is_array || merges->type != GGUF_STRING ||
        merges->n_items > N_TOKENS_MAX)
        return fault_set(-EBADMSG, "the model file has no list of merges");
    t->n_merges = (uint32_t)merges->n_items;
    t->merges = calloc(t->n_merges + 1, sizeof *t->merges);
    if (!t->merges)
        return fault_set(-ENOMEM, "no memory for the tokenizer");
    int rc = table_create(&t->by_pair, t->n_merges);
    if (rc < 0)
        return rc;

    const uint8_t *at = merges->data;
    for (uint32_t rank = 0; rank < t->n_merges; rank++) {
        struct merge *merge = &t->merges[rank];
        if (merge_parse(t, gguf_text_next(&at), merge) < 0)
            return fault_set(-EBADMSG, "merge %u of the model file joins no tokens", rank);
        table_put(&t->by_pair, hash_pair(merge->left_id, merge->right_id), rank);
    }
    return 0;
}

/* The byte alphabet: printable Latin-1 bytes stand for themselves, the others for the code points
 * from 256 on, in order. */
static void create_alphabet(struct tokenizer *t)
{
    uint32_t next_point = 256;

    memset(t->byte_of_point, 0xff, sizeof t->byte_of_point);
    for (uint32_t byte = 0; byte < 256; byte++) {
        bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
        uint32_t point = printable ? byte : next_point++;
        char text[2] = {(char)(point < 128 ? point : 0xc0 | (point >> 6)),
                        (char)(0x80 | (point & 63))};
        t->byte_of_point[point] = (int16_t)byte;
        t->id_of_byte[byte] = text_find(t, text, point < 128 ? 1 : 2);
    }
}

static int create_rules(struct tokenizer *t)
{
    const uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF;
    int error;
    size_t offset;

    t->digit = pcre2_compile((PCRE2_SPTR)digit_rule, PCRE2_ZERO_TERMINATED, options, &error,
                             &offset, NULL);
    t->word =
        pcre2_compile((PCRE2_SPTR)word_rule, PCRE2_ZERO_TERMINATED, options, &error, &offset, NULL);
    if (!t->digit || !t->word)
        return fault_set(-ENOTSUP, "PCRE2 refuses the split rule: error %d", error);
    pcre2_jit_compile(t->digit, PCRE2_JIT_COMPLETE); /* optional: faster where it exists */
    pcre2_jit_compile(t->word, PCRE2_JIT_COMPLETE);
    t->match = pcre2_match_data_create(1, NULL);
    return t->match ? 0 : fault_set(-ENOMEM, "no memory for the tokenizer");
}

static int check_kind(const struct gguf *gguf)
{
    struct gguf_text model, pre;
    int rc = gguf_text(gguf, "tokenizer.ggml.model", &model);
    if (rc == 0)
        rc = gguf_text(gguf, "tokenizer.ggml.pre", &pre);
    if (rc < 0)
        return rc;
    if (model.n_bytes != 4 || memcmp(model.bytes, "gpt2", 4) || pre.n_bytes != 6 ||
        memcmp(pre.bytes, "smollm", 6))
        return fault_set(-ENOTSUP, "tokenizer %.*s with rule %.*s; known is gpt2 with smollm",
                         (int)(model.n_bytes & 63), model.bytes, (int)(pre.n_bytes & 63),
                         pre.bytes);
    return 0;
}

int tokenizer_create(const struct gguf *gguf, struct tokenizer **ret_tokenizer)
{
    int rc = check_kind(gguf);
    if (rc < 0)
        return rc;
    struct tokenizer *t = calloc(1, sizeof *t);
    if (!t)
        return fault_set(-ENOMEM, "no memory for the tokenizer");

    rc = create_vocabulary(t, gguf);
    if (rc == 0)
        rc = create_merges(t, gguf);
    if (rc == 0)
        rc = create_rules(t);
    if (rc == 0)
        rc = gguf_u32(gguf, "tokenizer.ggml.eos_token_id", &t->end_id);
    if (rc < 0) {
        tokenizer_destroy(t);
        return rc;
    }
    create_alphabet(t);
    *ret_tokenizer = t;
    return 0;
}

void tokenizer_destroy(struct tokenizer *t)
{
    if (!t)
        return;
    pcre2_match_data_free(t->match);
    pcre2_code_free(t->digit);
    pcre2_code_free(t->word);
    free(t->by_text.slots);
    free(t->by_pair.slots);
    free(t->texts);
    free(t->special_ids);
    free(t->merges);
    free(t->symbols);
    free(t->heap);
    free(t);
}

uint32_t tokenizer_n_tokens(const struct tokenizer *t)
{
    return t->n_tokens;
}

uint32_t tokenizer_end_id(const struct tokenizer *t)
{
    return t->end_id;
}

static bool candidate_before(struct candidate a, struct candidate b)
{
    return a.rank < b.rank || (a.rank == b.rank && a.left < b.left);
}

static void heap_put(struct tokenizer *t, struct candidate candidate)
{
    uint32_t at = t->n_heap++;
    for (; at > 0 && candidate_before(candidate, t->heap[(at - 1) / 2]); at = (at - 1) / 2)
        t->heap[at] = t->heap[(at - 1) / 2];
    t->heap[at] = candidate;
}

static struct candidate heap_take(struct tokenizer *t)
{
    struct candidate best = t->heap[0], last = t->heap[--t->n_heap];
    uint32_t at = 0, child;
    while ((child = at * 2 + 1) < t->n_heap) {
        if (child + 1 < t->n_heap && candidate_before(t->heap[child + 1], t->heap[child]))
            child++;
        if (!candidate_before(t->heap[child], last))
            break;
        t->heap[at] = t->heap[child];
        at = child;
    }
    t->heap[at] = last;
    return best;
}

static void pair_offer(struct tokenizer *t, int32_t left, int32_t right)
{
    if (left < 0 || right < 0)
        return;
    int32_t rank = pair_find(t, t->symbols[left].id, t->symbols[right].id);
    if (rank >= 0)
        heap_put(t, (struct candidate){(uint32_t)rank, left, right});
}

/* A merge puts at most two candidates in place of one, so 3 n of them is the most there can be. */
static int reserve_symbols(struct tokenizer *t, size_t n_symbols)
{
    if (n_symbols <= t->n_symbols_max)
        return 0;
    uint32_t n_symbols_max = (uint32_t)n_symbols * 2;
    struct symbol *symbols = realloc(t->symbols, n_symbols_max * sizeof *symbols);
    if (symbols)
        t->symbols = symbols;
    struct candidate *heap = realloc(t->heap, 3 * (size_t)n_symbols_max * sizeof *heap);
    if (heap)
        t->heap = heap;
    if (!symbols || !heap)
        return fault_set(-ENOMEM, "no memory for a word of %zu bytes", n_symbols);
    t->n_symbols_max = n_symbols_max;
    return 0;
}

static int32_t load_symbols(struct tokenizer *t, const char *word, size_t n_bytes)
{
    int32_t n_symbols = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        int32_t id = t->id_of_byte[(uint8_t)word[i]];
        if (id < 0)
            continue;
        t->symbols[n_symbols] = (struct symbol){(uint32_t)id, n_symbols - 1, n_symbols + 1};
        n_symbols++;
    }
    if (n_symbols)
        t->symbols[n_symbols - 1].next = NONE;
    return n_symbols;
}

static int encode_word(struct tokenizer *t, const char *word, size_t n_bytes, struct tokens *tokens)
{
    int rc = reserve_symbols(t, n_bytes);
    if (rc < 0)
        return rc;
    int32_t n_symbols = load_symbols(t, word, n_bytes);

    t->n_heap = 0;
    for (int32_t i = 0; i + 1 < n_symbols; i++)
        pair_offer(t, i, i + 1);
    while (t->n_heap) {
        struct candidate best = heap_take(t);
        const struct merge *merge = &t->merges[best.rank];
        struct symbol *left = &t->symbols[best.left], *right = &t->symbols[best.right];
        if (left->id != merge->left_id || right->id != merge->right_id)
            continue;
        left->id = merge->merged_id;
        left->next = right->next;
        right->id = UINT32_MAX;
        if (left->next >= 0)
            t->symbols[left->next].previous = best.left;
        pair_offer(t, left->previous, best.left);
        pair_offer(t, best.left, left->next);
    }
    for (int32_t i = n_symbols ? 0 : NONE; i >= 0 && rc == 0; i = t->symbols[i].next)
        rc = tokens_append(tokens, t->symbols[i].id);
    return rc;
}

typedef int part_fn(struct tokenizer *t, const char *part, size_t n_bytes, struct tokens *tokens);

/* Cuts a text into the rule's matches and what lies between them; each goes to its function. */
static int split(struct tokenizer *t, const pcre2_code *rule, const char *text, size_t n_bytes,
                 part_fn *on_gap, part_fn *on_match, struct tokens *tokens)
{
    size_t at = 0;
    while (at < n_bytes) {
        size_t start = n_bytes, end = n_bytes;
        int n_found = pcre2_match(rule, (PCRE2_SPTR)text, n_bytes, at, 0, t->match, NULL);
        if (n_found < 0 && n_found != PCRE2_ERROR_NOMATCH)
            return fault_set(-EBADMSG, "the split rule fails at byte %zu: PCRE2 error %d", at,
                             n_found);
        if (n_found > 0) {
            const size_t *place = pcre2_get_ovector_pointer(t->match);
            start = place[0];
            end = place[1];
        }
        int rc = start > at ? on_gap(t, text + at, start - at, tokens) : 0;
        if (rc == 0 && end > start)
            rc = on_match(t, text + start, end - start, tokens);
        if (rc < 0)
            return rc;
        at = end;
    }
    return 0;
}

static int encode_words(struct tokenizer *t, const char *text, size_t n_bytes,
                        struct tokens *tokens)
{
    return split(t, t->word, text, n_bytes, encode_word, encode_word, tokens);
}

static int encode_ordinary(struct tokenizer *t, const char *text, size_t n_bytes,
                           struct tokens *tokens)
{
    return split(t, t->digit, text, n_bytes, encode_words, encode_word, tokens);
}

/* The longest special token that the text begins with, or NONE. */
static int32_t special_at(const struct tokenizer *t, const char *text, size_t n_bytes)
{
    int32_t best = NONE;
    for (uint32_t i = 0; i < t->n_specials; i++) {
        const struct gguf_text *special = &t->texts[t->special_ids[i]];
        if (special->n_bytes <= n_bytes && !memcmp(special->bytes, text, special->n_bytes) &&
            (best < 0 || special->n_bytes > t->texts[best].n_bytes))
            best = (int32_t)t->special_ids[i];
    }
    return best;
}

int tokenizer_encode(struct tokenizer *t, const char *text, size_t n_bytes, bool parse_special,
                     struct tokens *tokens)
{
    size_t start = 0;

    if (n_bytes > TEXT_BYTES_MAX)
        return fault_set(-EMSGSIZE, "a text of %zu bytes; at most %d", n_bytes, TEXT_BYTES_MAX);
    for (size_t at = 0; parse_special && at < n_bytes;) {
        const char *mark = memchr(text + at, '<', n_bytes - at);
        if (!mark)
            break;
        at = (size_t)(mark - text);
        int32_t id = special_at(t, mark, n_bytes - at);
        if (id < 0) {
            at++;
            continue;
        }
        int rc = encode_ordinary(t, text + start, at - start, tokens);
        if (rc == 0)
            rc = tokens_append(tokens, (uint32_t)id);
        if (rc < 0)
            return rc;
        at += t->texts[id].n_bytes;
        start = at;
    }
    return encode_ordinary(t, text + start, n_bytes - start, tokens);
}

size_t tokenizer_piece(const struct tokenizer *t, uint32_t id,
                       char piece[TOKENIZER_PIECE_BYTES_MAX])
{
    if (id >= t->n_tokens || token_type(t, id) != TYPE_NORMAL)
        return 0;
    const uint8_t *text = (const uint8_t *)t->texts[id].bytes;
    size_t n_text = t->texts[id].n_bytes, n_piece = 0;

    for (size_t i = 0; i < n_text && n_piece < TOKENIZER_PIECE_BYTES_MAX; i++) {
        uint32_t point = text[i];
        if (point >= 0xc0 && i + 1 < n_text)
            point = (point & 31) << 6 | (text[++i] & 63u);
        if (point < sizeof t->byte_of_point / sizeof *t->byte_of_point &&
            t->byte_of_point[point] >= 0)
            piece[n_piece++] = (char)t->byte_of_point[point];
    }
    return n_piece;
}

char *tokenizer_text(const struct tokenizer *t, const struct tokens *tokens, size_t *ret_n_bytes)
{
    char *text = malloc((size_t)tokens->n_ids * TOKENIZER_PIECE_BYTES_MAX + 1);

    *ret_n_bytes = 0;
    for (uint32_t i = 0; text && i < tokens->n_ids; i++)
        *ret_n_bytes += tokenizer_piece(t, tokens->ids[i], text + *ret_n_bytes);
    return text;
}
