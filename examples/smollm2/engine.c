#include "engine.h"

#include "fault.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int engine_open(struct engine *engine, const struct options *options)
{
    *engine = (struct engine){.options = options};
    int rc = gguf_open(&engine->gguf, options->model);
    if (rc == 0)
        rc = model_open(&engine->model, &engine->gguf);
    if (rc == 0)
        rc = tokenizer_create(&engine->gguf, &engine->tokenizer);
    if (rc == 0 && tokenizer_n_tokens(engine->tokenizer) != engine->model.n_vocab)
        rc = fault_set(-EBADMSG, "%u tokens in the vocabulary, %u rows in the embedding",
                       tokenizer_n_tokens(engine->tokenizer), engine->model.n_vocab);
    if (rc < 0)
        engine_close(engine);
    return rc;
}

int engine_attach(struct engine *engine)
{
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;

    options.address = engine->options->socket;
    int rc = winnow_client_open(&options, &engine->client);
    if (rc < 0)
        return fault_set(rc, "%s", winnow_error_text());
    rc = forward_create(&engine->model, engine->options->n_threads, &engine->forward);
    if (rc < 0)
        return fault_set(rc, "no memory or threads for the forward pass: %s", strerror(-rc));
    return 0;
}

void engine_close(struct engine *engine)
{
    forward_destroy(engine->forward);
    winnow_client_close(engine->client);
    tokenizer_destroy(engine->tokenizer);
    model_close(&engine->model);
    gguf_close(&engine->gguf);
    *engine = (struct engine){0};
}

static int read_all(FILE *stream, char **ret_bytes, size_t *ret_n_bytes)
{
    char *bytes = NULL;
    size_t n_bytes = 0, n_max = 0;

    do {
        if (n_bytes == n_max) {
            char *grown = realloc(bytes, n_max = n_max ? n_max * 2 : 65536);
            if (!grown) {
                free(bytes);
                return -ENOMEM;
            }
            bytes = grown;
        }
        n_bytes += fread(bytes + n_bytes, 1, n_max - n_bytes, stream);
    } while (!feof(stream) && !ferror(stream));
    if (ferror(stream)) {
        int rc = -errno;
        free(bytes);
        return rc;
    }
    *ret_bytes = bytes;
    *ret_n_bytes = n_bytes;
    return 0;
}

int engine_file_read(const char *path, char **ret_bytes, size_t *ret_n_bytes)
{
    FILE *stream = fopen(path, "rb");
    if (!stream)
        return fault_set(-errno, "%s: %s", path, strerror(errno));
    int rc = read_all(stream, ret_bytes, ret_n_bytes);
    fclose(stream);
    return rc < 0 ? fault_set(rc, "%s: %s", path, strerror(-rc)) : 0;
}
