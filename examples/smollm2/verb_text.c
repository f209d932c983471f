// tokenize, logits, perplexity: what the model makes of one text.
#include "context.h"
#include "fault.h"
#include "json.h"
#include "verbs.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

static int file_tokens(struct engine *engine, struct tokens *tokens)
{
    char *text;
    size_t n_bytes;
    int rc = engine_file_read(engine->options->file, &text, &n_bytes);
    if (rc < 0)
        return rc;
    rc = tokenizer_encode(engine->tokenizer, text, n_bytes, engine->options->parse_special, tokens);
    free(text);
    return rc;
}

int verb_tokenize(struct engine *engine)
{
    struct tokens tokens = {0};
    struct json json = {.stream = stdout};

    int rc = file_tokens(engine, &tokens);
    if (rc == 0 && engine->options->json) {
        json_object_begin(&json, NULL);
        json_counts(&json, "tokens", tokens.ids, tokens.n_ids);
        json_object_end(&json);
        putchar('\n');
    } else if (rc == 0) {
        for (uint32_t i = 0; i < tokens.n_ids; i++)
            printf("%u\n", tokens.ids[i]);
    }
    tokens_free(&tokens);
    return rc;
}

/* Reads the file's tokens into a fresh context, with progress. */
static int file_read(struct engine *engine, struct context *context,
                     context_window_fn *after_window, void *arg, struct tokens *tokens)
{
    struct progress progress;

    int rc = file_tokens(engine, tokens);
    if (rc == 0 && tokens->n_ids == 0)
        rc = fault_set(-EINVAL, "%s has no tokens", engine->options->file);
    if (rc == 0)
        rc = context_open(context, engine);
    if (rc < 0)
        return rc;
    progress_begin(&progress, engine->options->progress, "read", "tokens", tokens->n_ids);
    rc = context_read(context, tokens->ids, tokens->n_ids, after_window, arg, &progress);
    progress_end(&progress);
    return rc;
}

/* ids [n_top] of the largest logits, largest first, the lower id first among equals. */
static uint32_t top_ids(const float *logits, uint32_t n_logits, uint32_t n_top, uint32_t *ids)
{
    uint32_t n = 0;
    for (uint32_t id = 0; id < n_logits; id++) {
        if (n == n_top && logits[id] <= logits[ids[n - 1]])
            continue;
        uint32_t at = n < n_top ? n++ : n - 1;
        for (; at > 0 && logits[id] > logits[ids[at - 1]]; at--)
            ids[at] = ids[at - 1];
        ids[at] = id;
    }
    return n;
}

struct top {
    uint32_t *ids;
    float *logits;
    uint32_t n;
};

static void print_token(const struct engine *engine, uint32_t id)
{
    char piece[TOKENIZER_PIECE_BYTES_MAX];
    size_t n_bytes = tokenizer_piece(engine->tokenizer, id, piece);
    fwrite(piece, 1, n_bytes, stdout);
}

static void write_logits(const struct engine *engine, const struct tokens *tokens,
                         const struct top *top, const struct tokens *generated)
{
    struct json json = {.stream = stdout};

    if (!engine->options->json) {
        for (uint32_t i = 0; i < top->n; i++) {
            printf("%8u %9.4f  ", top->ids[i], (double)top->logits[i]);
            print_token(engine, top->ids[i]);
            putchar('\n');
        }
        for (uint32_t i = 0; i < generated->n_ids; i++)
            print_token(engine, generated->ids[i]);
        putchar('\n');
        return;
    }
    json_object_begin(&json, NULL);
    json_counts(&json, "tokens", tokens->ids, tokens->n_ids);
    json_array_begin(&json, "top");
    for (uint32_t i = 0; i < top->n; i++) {
        json_array_begin(&json, NULL);
        json_count(&json, NULL, top->ids[i]);
        json_number(&json, NULL, (double)top->logits[i]);
        json_array_end(&json);
    }
    json_array_end(&json);
    json_counts(&json, "generated", generated->ids, generated->n_ids);
    json_object_end(&json);
    putchar('\n');
}

int verb_logits(struct engine *engine)
{
    const uint32_t n_vocab = engine->model.n_vocab;
    struct tokens tokens = {0}, generated = {0};
    struct context context = {0};
    struct top top = {.n = engine->options->n_top < n_vocab ? engine->options->n_top : n_vocab};

    top.ids = malloc(top.n * sizeof *top.ids);
    top.logits = malloc(top.n * sizeof *top.logits);
    int rc = top.ids && top.logits ? 0 : fault_set(-ENOMEM, "no memory for %u logits", top.n);
    if (rc == 0)
        rc = file_read(engine, &context, NULL, NULL, &tokens);
    if (rc == 0) {
        const float *logits = forward_logits(engine->forward);
        top.n = top_ids(logits, n_vocab, top.n, top.ids);
        for (uint32_t i = 0; i < top.n; i++)
            top.logits[i] = logits[top.ids[i]];
        rc = context_answer(&context, logits, engine->options->n_generate, NULL, NULL, &generated);
    }
    if (rc == 0)
        write_logits(engine, &tokens, &top, &generated);
    context_close(&context);
    tokens_free(&tokens);
    tokens_free(&generated);
    free(top.ids);
    free(top.logits);
    return rc;
}

struct perplexity {
    struct engine *engine;
    const struct tokens *tokens;
    double *logprobs; /* [n_tokens]; of token 0 unused */
};

static void score_window(void *arg, uint64_t first, uint32_t n)
{
    struct perplexity *p = arg;
    uint64_t n_next = p->tokens->n_ids - first - 1;

    forward_logprobs(p->engine->forward, p->tokens->ids + first + 1,
                     n < n_next ? n : (uint32_t)n_next, p->logprobs + first + 1);
}

static void write_perplexity(const struct perplexity *p, int is_json)
{
    struct json json = {.stream = stdout};
    const uint32_t n_tokens = p->tokens->n_ids;
    double sum = 0;

    for (uint32_t i = 1; i < n_tokens; i++)
        sum += p->logprobs[i];
    double perplexity = n_tokens > 1 ? exp(-sum / (n_tokens - 1)) : NAN;
    if (!is_json) {
        printf("%u tokens, perplexity %.4f\n", n_tokens, perplexity);
        return;
    }
    json_object_begin(&json, NULL);
    json_count(&json, "n_tokens", n_tokens);
    json_array_begin(&json, "logprob");
    for (uint32_t i = 0; i < n_tokens; i++)
        json_number(&json, NULL, i ? p->logprobs[i] : NAN);
    json_array_end(&json);
    json_number(&json, "ppl", perplexity);
    json_object_end(&json);
    putchar('\n');
}

int verb_perplexity(struct engine *engine)
{
    struct tokens tokens = {0};
    struct context context = {0};
    struct perplexity p = {.engine = engine, .tokens = &tokens};

    p.logprobs = malloc((engine->model.n_context + 1) * sizeof *p.logprobs);
    int rc = p.logprobs ? 0 : fault_set(-ENOMEM, "no memory for the probabilities");
    if (rc == 0)
        rc = file_read(engine, &context, score_window, &p, &tokens);
    if (rc == 0)
        write_perplexity(&p, engine->options->json);
    context_close(&context);
    tokens_free(&tokens);
    free(p.logprobs);
    return rc;
}
