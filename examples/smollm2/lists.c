#include "lists.h"

#include "engine.h"
#include "fault.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char system_turn[] =
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
static const char user_begin[] = "<|im_start|>user\n";
static const char user_end[] = "<|im_end|>\n<|im_start|>assistant\n";

static int encode_frame(struct tokenizer *tokenizer, const char *frame, struct tokens *tokens)
{
    return tokenizer_encode(tokenizer, frame, strlen(frame), true, tokens);
}

/* a followed by b; the caller frees. NULL without memory. */
static char *join(const char *a, size_t n_a, const char *b, size_t n_b)
{
    char *joint = malloc(n_a + n_b + 1);
    if (!joint)
        return NULL;
    memcpy(joint, a, n_a);
    memcpy(joint + n_a, b, n_b);
    return joint;
}

static int encode_joint(struct tokenizer *tokenizer, const char *a, size_t n_a, const char *b,
                        size_t n_b, bool parse_special, struct tokens *tokens)
{
    char *joint = join(a, n_a, b, n_b);
    if (!joint)
        return fault_set(-ENOMEM, "no memory for a text of %zu bytes", n_a + n_b);
    int rc = tokenizer_encode(tokenizer, joint, n_a + n_b, parse_special, tokens);
    free(joint);
    return rc;
}

int lists_system_turn(struct tokenizer *tokenizer, struct tokens *tokens)
{
    return encode_frame(tokenizer, system_turn, tokens);
}

/* The turn's name and its text are one ordinary text between special tokens. */
static int user_turn_open(struct tokenizer *tokenizer, const char *text, size_t n_bytes,
                          struct tokens *tokens)
{
    const char *name = strchr(user_begin, '>') + 1;
    char mark[32] = {0};

    memcpy(mark, user_begin, (size_t)(name - user_begin));
    int rc = encode_frame(tokenizer, mark, tokens);
    if (rc == 0)
        rc = encode_joint(tokenizer, name, strlen(name), text, n_bytes, false, tokens);
    return rc;
}

int lists_user_turn(struct tokenizer *tokenizer, const char *text, size_t n_bytes,
                    struct tokens *tokens)
{
    int rc = user_turn_open(tokenizer, text, n_bytes, tokens);
    if (rc == 0)
        rc = encode_frame(tokenizer, user_end, tokens);
    return rc;
}

/* Sets n_shared: `base` is the long text alone. */
static int find_shared(struct lists *lists, const struct tokens *base)
{
    uint32_t n_shared = base->n_ids;
    for (uint32_t i = 0; i < lists->n_lists; i++) {
        const struct tokens *list = &lists->lists[i];
        uint32_t n = 0;
        if (list->n_ids == 0)
            return fault_set(-EINVAL, "text %u is empty", i + 1);
        while (n < n_shared && n + 1 < list->n_ids && list->ids[n] == base->ids[n])
            n++;
        n_shared = n;
    }
    lists->n_shared = n_shared;
    return 0;
}

static int lists_create(struct lists *lists, uint32_t n_lists)
{
    *lists = (struct lists){.lists = calloc(n_lists, sizeof *lists->lists), .n_lists = n_lists};
    if (!lists->lists)
        return fault_set(-ENOMEM, "no memory for %u lists", n_lists);
    return 0;
}

static int complete_one(struct tokenizer *tokenizer, const char *prompt, size_t n_prompt,
                        const char *suffix_path, struct tokens *list)
{
    char *suffix;
    size_t n_suffix;
    int rc = engine_file_read(suffix_path, &suffix, &n_suffix);
    if (rc < 0)
        return rc;
    rc = encode_joint(tokenizer, prompt, n_prompt, suffix, n_suffix, true, list);
    free(suffix);
    return rc;
}

int lists_complete(struct lists *lists, struct tokenizer *tokenizer, const char *prompt_path,
                   const char *const *suffix_paths, uint32_t n_suffixes)
{
    struct tokens base = {0};
    char *prompt = NULL;
    size_t n_prompt = 0;

    int rc = lists_create(lists, n_suffixes);
    if (rc == 0)
        rc = engine_file_read(prompt_path, &prompt, &n_prompt);
    if (rc == 0)
        rc = tokenizer_encode(tokenizer, prompt, n_prompt, true, &base);
    for (uint32_t i = 0; rc == 0 && i < n_suffixes; i++)
        rc = complete_one(tokenizer, prompt, n_prompt, suffix_paths[i], &lists->lists[i]);
    if (rc == 0)
        rc = find_shared(lists, &base);
    tokens_free(&base);
    free(prompt);
    return rc;
}

static int ask_one(struct tokenizer *tokenizer, const char *document, size_t n_document,
                   const char *question, struct tokens *list)
{
    char *joint = join(document, n_document, question, strlen(question));
    if (!joint)
        return fault_set(-ENOMEM, "no memory for a text of %zu bytes", n_document);
    int rc = lists_system_turn(tokenizer, list);
    if (rc == 0)
        rc = lists_user_turn(tokenizer, joint, n_document + strlen(question), list);
    free(joint);
    return rc;
}

int lists_ask(struct lists *lists, struct tokenizer *tokenizer, const char *document_path,
              const char *const *questions, uint32_t n_questions)
{
    struct tokens base = {0};
    char *file = NULL, *document = NULL;
    size_t n_file = 0;

    int rc = lists_create(lists, n_questions);
    if (rc == 0)
        rc = engine_file_read(document_path, &file, &n_file);
    if (rc == 0 && !(document = join(file, n_file, "\n\n", 2)))
        rc = fault_set(-ENOMEM, "no memory for a text of %zu bytes", n_file);
    if (rc == 0)
        rc = lists_system_turn(tokenizer, &base);
    if (rc == 0)
        rc = user_turn_open(tokenizer, document, n_file + 2, &base);
    for (uint32_t i = 0; rc == 0 && i < n_questions; i++)
        rc = ask_one(tokenizer, document, n_file + 2, questions[i], &lists->lists[i]);
    if (rc == 0)
        rc = find_shared(lists, &base);
    tokens_free(&base);
    free(document);
    free(file);
    return rc;
}

int lists_check(const struct lists *lists, uint32_t n_tokens)
{
    for (uint32_t i = 0; i < lists->n_lists; i++)
        if (lists->lists[i].n_ids > n_tokens)
            return fault_set(-EMSGSIZE, "text %u has %u tokens; the model's context is %u", i + 1,
                             lists->lists[i].n_ids, n_tokens);
    return 0;
}

void lists_free(struct lists *lists)
{
    for (uint32_t i = 0; lists->lists && i < lists->n_lists; i++)
        tokens_free(&lists->lists[i]);
    free(lists->lists);
    *lists = (struct lists){0};
}
