// complete and ask: a long text read once, then several short ones, each on a fork of it.
//
// Every answer's ids are made from the whole text, since tokens may join over the seam. What all
// lists begin with, up to where the long text ends, is read in exact windows; the rest of each list
// and its greedy answer are decode steps on a fork, so that a question is asked the way an answer is
// made. At least one token is left for a step: it makes the first logits.
#include "context.h"
#include "fault.h"
#include "json.h"
#include "lists.h"
#include "verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct answer {
    struct tokens ids;
    struct tally tally;
};

static int answer_make(const struct context *read, const struct tokens *list, struct answer *answer)
{
    const struct options *options = read->engine->options;
    const float *logits = NULL;
    struct context fork;

    int rc = context_fork(read, options->mass, &fork);
    if (rc < 0)
        return rc;
    for (uint32_t i = read->tokens.n_ids; rc == 0 && i < list->n_ids; i++)
        rc = context_step(&fork, list->ids[i], &logits);
    if (rc == 0)
        rc = context_answer(&fork, logits, options->n_tokens, NULL, NULL, &answer->ids);
    if (rc == 0)
        rc = tally_merge(&answer->tally, &fork.tally);
    context_close(&fork);
    return rc;
}

static int answers_make(struct engine *engine, const struct lists *lists, struct answer *answers)
{
    struct context read;
    struct progress progress;

    int rc = lists_check(lists, engine->model.n_context);
    if (rc == 0)
        rc = context_open(&read, engine);
    if (rc < 0)
        return rc;
    progress_begin(&progress, engine->options->progress, "read", "tokens", lists->n_shared);
    rc = context_read(&read, lists->lists[0].ids, lists->n_shared, NULL, NULL, &progress);
    progress_end(&progress);
    progress_begin(&progress, engine->options->progress, "answer", "texts", lists->n_lists);
    for (uint32_t i = 0; rc == 0 && i < lists->n_lists; i++) {
        rc = tally_create(&answers[i].tally, engine->model.n_layers);
        if (rc == 0)
            rc = answer_make(&read, &lists->lists[i], &answers[i]);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
    context_close(&read);
    return rc;
}

static void write_answer(const struct engine *engine, const struct answer *answer,
                         struct json *json)
{
    size_t n_bytes;
    char *text = tokenizer_text(engine->tokenizer, &answer->ids, &n_bytes);

    json_text(json, "text", text ? text : "", n_bytes);
    json_counts(json, "token_ids", answer->ids.ids, answer->ids.n_ids);
    tally_write(&answer->tally, json);
    free(text);
}

static void print_answer(const struct engine *engine, const char *lead, const struct answer *answer)
{
    size_t n_bytes;
    char *text = tokenizer_text(engine->tokenizer, &answer->ids, &n_bytes);

    printf("%s\n", lead);
    fwrite(text ? text : "", 1, n_bytes, stdout);
    printf("\n[share read %.1f %%, mass %.3f]\n\n", 100 * tally_share_read(&answer->tally),
           tally_mass_reached(&answer->tally));
    free(text);
}

/* is_ask: answers with their questions, else completions. */
static void write_answers(const struct engine *engine, const struct answer *answers, int is_ask)
{
    const struct options *options = engine->options;
    struct json json = {.stream = stdout};

    for (uint32_t i = 0; !options->json && i < options->n_texts; i++)
        print_answer(engine, options->texts[i], &answers[i]);
    if (!options->json)
        return;
    json_object_begin(&json, NULL);
    json_array_begin(&json, is_ask ? "answers" : "completions");
    for (uint32_t i = 0; i < options->n_texts; i++) {
        json_object_begin(&json, NULL);
        if (is_ask)
            json_text(&json, "question", options->texts[i], strlen(options->texts[i]));
        write_answer(engine, &answers[i], &json);
        json_object_end(&json);
    }
    json_array_end(&json);
    json_object_end(&json);
    putchar('\n');
}

static int answer_all(struct engine *engine, const struct lists *lists, int is_ask)
{
    struct answer *answers = calloc(lists->n_lists, sizeof *answers);
    if (!answers)
        return fault_set(-ENOMEM, "no memory for %u answers", lists->n_lists);

    int rc = answers_make(engine, lists, answers);
    if (rc == 0)
        write_answers(engine, answers, is_ask);
    for (uint32_t i = 0; i < lists->n_lists; i++) {
        tokens_free(&answers[i].ids);
        tally_destroy(&answers[i].tally);
    }
    free(answers);
    return rc;
}

int verb_complete(struct engine *engine)
{
    const struct options *options = engine->options;
    struct lists lists;

    int rc = lists_complete(&lists, engine->tokenizer, options->prompt, options->texts,
                            options->n_texts);
    if (rc == 0)
        rc = answer_all(engine, &lists, 0);
    lists_free(&lists);
    return rc;
}

int verb_ask(struct engine *engine)
{
    const struct options *options = engine->options;
    struct lists lists;

    int rc =
        lists_ask(&lists, engine->tokenizer, options->document, options->texts, options->n_texts);
    if (rc == 0)
        rc = answer_all(engine, &lists, 1);
    lists_free(&lists);
    return rc;
}
