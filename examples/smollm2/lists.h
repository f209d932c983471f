/*
 * Token lists with a common beginning: a long text followed by each of several short ones.
 */
#pragma once

#include "tokenizer.h"

struct lists {
    struct tokens *lists; /* [n_lists], each the ids of the whole text */
    uint32_t n_lists;
    uint32_t n_shared; /* what all begin with, within the long text; less than each list has */
};

/* The prompt's file followed by each suffix's; special tokens are parsed. */
int lists_complete(struct lists *lists, struct tokenizer *tokenizer, const char *prompt_path,
                   const char *const *suffix_paths, uint32_t n_suffixes);

/* The chat template, in its user turn the document's file, an empty line and a question. Special
 * tokens are the template's only: document and question cannot forge a turn. */
int lists_ask(struct lists *lists, struct tokenizer *tokenizer, const char *document_path,
              const char *const *questions, uint32_t n_questions);

/* -EMSGSIZE when a list has no place in a context of n_tokens: said before anything is read. */
int lists_check(const struct lists *lists, uint32_t n_tokens);

void lists_free(struct lists *lists); /* fine on a zeroed or failed struct */

/* The template's parts, for a chat of turns. Append to tokens; -ENOMEM. */
int lists_system_turn(struct tokenizer *tokenizer, struct tokens *tokens);
int lists_user_turn(struct tokenizer *tokenizer, const char *text, size_t n_bytes,
                    struct tokens *tokens);
