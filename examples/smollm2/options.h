/*
 * The command line: `smollm2 [options] VERB [FILE]`, options anywhere, `--name value` or
 * `--name=value`.
 */
#pragma once

#include "progress.h"

#include <stdbool.h>
#include <stdint.h>

enum { OPTIONS_N_TEXTS_MAX = 256, OPTIONS_N_MASSES_MAX = 8 };

struct options {
    const char *verb, *file; /* file NULL: none given */
    const char *model, *socket;
    const char *prompt, *document, *questions;
    const char *texts[OPTIONS_N_TEXTS_MAX]; /* --suffix and --question, in order */
    uint32_t n_texts;
    const char *texts_name; /* "suffix" or "question"; NULL: neither was given */
    uint32_t n_tokens, n_top, n_generate, n_threads;
    float mass;                         /* the first --mass; 0: the daemon's default */
    float masses[OPTIONS_N_MASSES_MAX]; /* in order */
    uint32_t n_masses;
    uint32_t policy;   /* WINNOW_BY_* */
    uint32_t kv_dtype; /* WINNOW_DTYPE_*, at rest */
    enum progress_mode progress;
    bool parse_special, json, help;
};

/* Texts are borrowed from argv. 0, or -EINVAL with fault_text() saying what is wrong. */
int options_parse(struct options *options, int argc, char **argv);

/* The text of --help. */
extern const char options_help[];
