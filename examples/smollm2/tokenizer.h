/*
 * Byte-level BPE: text to the model's token ids and back.
 *
 * Every byte of a text stands for itself, so no text is refused and decoding gives the bytes back;
 * only the 21 bytes that this vocabulary lacks (6 control characters, and bytes that UTF-8 hardly or
 * never uses) are left out, as llama.cpp does. Vocabulary, merges and the pre-split rule come from the GGUF ("gpt2" model, "smollm" rule).
 * Special tokens (<|im_start|> and the like) are recognised in a text only when asked.
 */
#pragma once

#include "gguf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* A growing list of ids. Begin zeroed; tokens_free is fine on it. */
struct tokens {
    uint32_t *ids;
    uint32_t n_ids, n_ids_max;
};
int tokens_append(struct tokens *tokens, uint32_t id); /* -ENOMEM */
void tokens_free(struct tokens *tokens);

/* Borrows the gguf's mapping. -ENOENT -EBADMSG not this kind of vocabulary; -ENOTSUP another rule;
 * -ENOMEM. */
int tokenizer_create(const struct gguf *gguf, struct tokenizer **ret_tokenizer);
void tokenizer_destroy(struct tokenizer *tokenizer);

uint32_t tokenizer_n_tokens(const struct tokenizer *tokenizer);
/* The token that ends an answer. */
uint32_t tokenizer_end_id(const struct tokenizer *tokenizer);

/* Appends the ids of a text. Not for two threads at once. -ENOMEM; -EMSGSIZE over 64 MiB */
int tokenizer_encode(struct tokenizer *tokenizer, const char *text, size_t n_bytes,
                     bool parse_special, struct tokens *tokens);

enum { TOKENIZER_PIECE_BYTES_MAX = 512 };
/* The bytes of one token; returns their count. Special tokens and unknown ids have none. */
size_t tokenizer_piece(const struct tokenizer *tokenizer, uint32_t id,
                       char piece[TOKENIZER_PIECE_BYTES_MAX]);

/* The joined pieces of a list; the caller frees. NULL without memory (*ret_n_bytes is 0). */
char *tokenizer_text(const struct tokenizer *tokenizer, const struct tokens *tokens,
                     size_t *ret_n_bytes);
