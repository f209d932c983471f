/*
 * An engine of a test: a context whose keys, values and queries follow from a seed alone, and a
 * plain fp64 attention over them that shares no code with Winnow. Values are exact in the model's
 * kv_dtype, so that what is stored is what was sent and the oracle can be held tightly.
 *
 * Queries look for something: each is close to one earlier key of its head and a little to others.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <winnow/winnow.h>

struct engine {
    winnow_client *client;
    winnow_session *session;
    winnow_model model;
    uint64_t seed;
    uint32_t n_tokens, n_tokens_max; /* of the context, level over layers */
    uint64_t hash_windows;           /* FNV-1a over all out bytes of its windows */
    float *k, *v; /* [layers][n_tokens_max][kv_heads][width]: what was sent, exact in kv_dtype */
    void *q_io, *k_io, *v_io, *out_io; /* a window in io_dtype */
};

enum { ENGINE_WINDOW_MAX = 512 };

/* A failure prints where, and the library's text, and ends the test. */
#define ENGINE_OK(call)                                                                            \
    do {                                                                                           \
        int engine_rc = (call);                                                                    \
        if (engine_rc < 0)                                                                         \
            engine_fail(__FILE__, __LINE__, #call, engine_rc);                                     \
    } while (0)
_Noreturn void engine_fail(const char *file, int line, const char *call, int error);

winnow_model engine_model(uint32_t layers, uint32_t q_heads, uint32_t kv_heads, uint32_t k_width,
                          uint32_t v_width, uint32_t kv_dtype, uint32_t io_dtype);

/* Opens client and session at `socket`; n_tokens_max bounds the context. options may be NULL. */
void engine_open(struct engine *engine, const char *socket, const winnow_model *model,
                 uint64_t seed, uint32_t n_tokens_max, const winnow_session_options *options);
void engine_close(struct engine *engine);

/* Reads the next n tokens (at most ENGINE_WINDOW_MAX) in exact windows, layer by layer.
 * 0 or the first error. With `error`, the largest relative error of sampled positions is put in
 * *error: |out - oracle| over the largest |oracle| of the head. */
int engine_window(struct engine *engine, uint32_t n_tokens, double *error);

/* One decode step: the next token through every layer. mass 1: exactly. The certificates of the
 * layers are added into `sum` (may be NULL), the out bits into *hash (may be NULL). */
struct engine_step {
    float mass;              /* 0: the session's */
    double *error;           /* largest relative error; NULL: not compared */
    winnow_certificate *sum; /* zeroed by the caller; NULL: not wanted */
    uint64_t *hash;          /* FNV-1a over all out and lse bytes; NULL: not wanted */
    uint64_t truncate_to;    /* of a lost block */
};
int engine_decode(struct engine *engine, struct engine_step *step);

/* Windows until the context has n_tokens, then n_steps decode steps, one in ten exact and the others
 * at .9; the hash of the steps' bits. An error ends the test. */
uint64_t engine_converse(struct engine *engine, uint32_t n_tokens, uint32_t n_steps);

/* Sends all tokens again, into a session that is new and empty. */
int engine_resend(struct engine *engine);
/* Truncates context and bookkeeping. */
int engine_truncate(struct engine *engine, uint32_t n_tokens);
