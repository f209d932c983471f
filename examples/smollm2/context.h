/*
 * A context: tokens that a session of winnowd holds, and how to send them again.
 *
 * The ids are all that this program keeps of a context. When winnowd has lost a block (-ENODATA) the
 * session is cut back to the start of its segment and the tokens from there are sent again, in the
 * way they were sent first, so that the continuation is the same.
 */
#pragma once

#include "engine.h"
#include "progress.h"
#include "tally.h"

struct context {
    struct engine *engine;
    winnow_session *session;
    struct tokens tokens;
    uint32_t n_exact;   /* tokens below are read in exact windows, the others by decode steps */
    uint32_t n_sent;    /* tokens the session holds */
    float mass;         /* of decode steps; 0: the daemon's default */
    struct tally tally; /* of the decode steps */
    winnow_certificate *certificates; /* [n_layers] of the last one */
    double attend_s;                  /* that one's time in winnow_attend */
};

/* Opens a session with the options' policy, mass and dtype. The errors of winnow_session_open. */
int context_open(struct context *context, struct engine *engine);
/* A second context that shares all tokens sent; its tally starts empty. */
int context_fork(const struct context *context, float mass, struct context *fork);
void context_close(struct context *context); /* fine on a zeroed struct */

/* Reads ids [n] in exact windows; after_window, if given, runs after each with its first position
 * and row count. progress may be NULL. The errors of winnow_attend_exact; -EMSGSIZE over the model's
 * context. */
typedef void context_window_fn(void *arg, uint64_t first, uint32_t n);
int context_read(struct context *context, const uint32_t *ids, uint32_t n,
                 context_window_fn *after_window, void *arg, struct progress *progress);

/* One decode step; then forward_logits is the next token's. The errors of winnow_attend. */
int context_step(struct context *context, uint32_t id, const float **ret_logits);

/* Whether the model's context has a place for one more. */
bool context_has_room(const struct context *context);

/* Greedy continuation after `logits` (from a step or a read): up to n_max ids, up to the end token,
 * which is not among them, or until the context is full. on_token, if given, runs after each choice
 * with the logits it was made from. */
typedef void context_token_fn(void *arg, uint32_t id, const float *logits);
int context_answer(struct context *context, const float *logits, uint32_t n_max,
                   context_token_fn *on_token, void *arg, struct tokens *answer);

/* The id of the largest logit, the lowest among equals. */
uint32_t context_greedy(const float *logits, uint32_t n_logits);
