// chat: a line from standard input is a turn; the answer is printed as it is made.
#include "context.h"
#include "fault.h"
#include "lists.h"
#include "verbs.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void print_piece(void *arg, uint32_t id, const float *logits)
{
    const struct engine *engine = arg;
    char piece[TOKENIZER_PIECE_BYTES_MAX];

    (void)logits;
    size_t n_bytes = tokenizer_piece(engine->tokenizer, id, piece);
    fwrite(piece, 1, n_bytes, stdout);
    fflush(stdout);
}

/* What precedes the next user's turn: what no step has sent of the answer (its last token, when it
 * ran into --tokens), the template's end token and a newline. */
static int close_turn(const struct engine *engine, const struct tokens *answer, uint32_t n_unsent,
                      struct tokens *turn)
{
    int rc = 0;

    turn->n_ids = 0;
    for (uint32_t i = answer->n_ids - n_unsent; rc == 0 && i < answer->n_ids; i++)
        rc = tokens_append(turn, answer->ids[i]);
    if (rc == 0)
        rc = tokens_append(turn, tokenizer_end_id(engine->tokenizer));
    if (rc == 0)
        rc = tokenizer_encode(engine->tokenizer, "\n", 1, false, turn);
    return rc;
}

/* `turn` holds what precedes the user's text, and is left with what precedes the next. */
static int turn_run(struct context *context, const char *line, size_t n_bytes, struct tokens *turn)
{
    struct engine *engine = context->engine;
    struct tokens answer = {0};

    int rc = lists_user_turn(engine->tokenizer, line, n_bytes, turn);
    if (rc == 0)
        rc = context_read(context, turn->ids, turn->n_ids, NULL, NULL, NULL);
    const uint32_t n_before = context->tokens.n_ids;
    if (rc == 0)
        rc = context_answer(context, forward_logits(engine->forward), engine->options->n_tokens,
                            print_piece, engine, &answer);
    if (rc == 0)
        rc = close_turn(engine, &answer, n_before + answer.n_ids - context->tokens.n_ids, turn);
    tokens_free(&answer);
    if (rc == 0)
        printf("\n[%u tokens, share read %.1f %%, mass %.3f]\n", context->tokens.n_ids,
               100 * tally_share_read(&context->tally), tally_mass_reached(&context->tally));
    return rc;
}

int verb_chat(struct engine *engine)
{
    const int is_terminal = isatty(STDIN_FILENO);
    struct context context;
    struct tokens turn = {0};
    char *line = NULL;
    size_t n_line_max = 0;
    ssize_t n_bytes;

    int rc = context_open(&context, engine);
    if (rc < 0)
        return rc;
    rc = lists_system_turn(engine->tokenizer, &turn);
    while (rc == 0) {
        if (is_terminal)
            fputs("> ", stdout);
        fflush(stdout);
        if ((n_bytes = getline(&line, &n_line_max, stdin)) < 0)
            break;
        if (n_bytes && line[n_bytes - 1] == '\n')
            n_bytes--;
        if (n_bytes)
            rc = turn_run(&context, line, (size_t)n_bytes, &turn);
    }
    free(line);
    tokens_free(&turn);
    context_close(&context);
    return rc;
}
