/*
 * The engine: a model loaded and, for all but tokenize, a connection to winnowd.
 */
#pragma once

#include "forward.h"
#include "gguf.h"
#include "model.h"
#include "options.h"
#include "tokenizer.h"

struct engine {
    const struct options *options;
    struct gguf gguf;
    struct model model;
    struct tokenizer *tokenizer;
    struct forward *forward; /* NULL until attach */
    winnow_client *client;   /* NULL until attach */
};

/* Maps the model and makes its tokenizer. The errors of gguf.h, model.h and tokenizer.h. */
int engine_open(struct engine *engine, const struct options *options);
/* Connects to winnowd. -EHOSTDOWN and the others of winnow_client_open; -ENOMEM. */
int engine_attach(struct engine *engine);
void engine_close(struct engine *engine); /* fine on a zeroed struct */

/* Reads a whole text file; the caller frees *ret_bytes. -errno of open or read. */
int engine_file_read(const char *path, char **ret_bytes, size_t *ret_n_bytes);
