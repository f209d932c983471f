/*
 * smollm2: a small inference engine that keeps no KV cache. winnowd holds it and computes every
 * attention output; this program has the weights, the tokens and everything between two attentions.
 */
#include "fault.h"
#include "verbs.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum { EXIT_FAILED = 1, EXIT_USAGE = 64, EXIT_NO_DAEMON = 69 };

/* What a verb needs on the command line, and whether it talks to winnowd. */
static const struct verb {
    const char *name;
    int (*run)(struct engine *engine);
    bool needs_daemon, needs_file, needs_prompt, needs_document, needs_questions;
    const char *texts_name; /* of the option that it needs once or more */
} verbs[] = {
    {"tokenize", verb_tokenize, .needs_file = true},
    {"logits", verb_logits, .needs_daemon = true, .needs_file = true},
    {"perplexity", verb_perplexity, .needs_daemon = true, .needs_file = true},
    {"complete", verb_complete, .needs_daemon = true, .needs_prompt = true, .texts_name = "suffix"},
    {"ask", verb_ask, .needs_daemon = true, .needs_document = true, .texts_name = "question"},
    {"compare", verb_compare, .needs_daemon = true, .needs_document = true,
     .needs_questions = true},
    {"chat", verb_chat, .needs_daemon = true},
};

static const struct verb *verb_find(const struct options *options)
{
    if (!options->verb) {
        fault_set(0, "no verb");
        return NULL;
    }
    for (size_t i = 0; i < sizeof verbs / sizeof *verbs; i++)
        if (!strcmp(verbs[i].name, options->verb))
            return &verbs[i];
    fault_set(0, "unknown verb %s", options->verb);
    return NULL;
}

static int verb_check(const struct verb *verb, const struct options *options)
{
    const char *missing = !options->model                                ? "--model FILE"
                          : verb->needs_file && !options->file           ? "a FILE"
                          : verb->needs_prompt && !options->prompt       ? "--prompt FILE"
                          : verb->needs_document && !options->document   ? "--document FILE"
                          : verb->needs_questions && !options->questions ? "--questions FILE"
                          : verb->texts_name && !options->n_texts
                              ? (verb->needs_prompt ? "--suffix FILE" : "--question TEXT")
                              : NULL;
    if (missing)
        return fault_set(-EINVAL, "%s needs %s", verb->name, missing);
    if (options->file && !verb->needs_file)
        return fault_set(-EINVAL, "%s takes no file: %s", verb->name, options->file);
    if (options->n_texts && (!verb->texts_name || strcmp(verb->texts_name, options->texts_name)))
        return fault_set(-EINVAL, "%s takes no --%s", verb->name, options->texts_name);
    if (options->n_masses > 1 && !verb->needs_questions)
        return fault_set(-EINVAL, "%s takes one --mass", verb->name);
    return 0;
}

static int fail(int status)
{
    fprintf(stderr, "smollm2: %s\n", fault_text());
    if (status == EXIT_USAGE)
        fputs("hint: smollm2 --help\n", stderr);
    return status;
}

static int run(const struct verb *verb, const struct options *options)
{
    struct engine engine;

    int rc = engine_open(&engine, options);
    if (rc < 0)
        return fail(EXIT_FAILED);
    if (verb->needs_daemon)
        rc = engine_attach(&engine);
    if (rc == 0)
        rc = verb->run(&engine);
    engine_close(&engine);
    if (rc < 0)
        return fail(rc == -EHOSTDOWN ? EXIT_NO_DAEMON : EXIT_FAILED);
    if (fflush(stdout) == EOF) {
        fault_set(-errno, "standard output: %s", strerror(errno));
        return fail(EXIT_FAILED);
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct options options;

    if (options_parse(&options, argc, argv) < 0)
        return fail(EXIT_USAGE);
    if (options.help) {
        fputs(options_help, stdout);
        return 0;
    }
    const struct verb *verb = verb_find(&options);
    if (!verb || verb_check(verb, &options) < 0)
        return fail(EXIT_USAGE);
    return run(verb, &options);
}
