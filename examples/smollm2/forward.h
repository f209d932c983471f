/*
 * The forward pass, all but attention: that is winnowd's.
 *
 * Two ways through the network. A window of up to 512 positions multiplies whole matrices (OpenBLAS)
 * and asks winnow_attend_exact once a layer; a decode step multiplies one vector with the quantised
 * weights and asks winnow_attend once a layer. Neither keeps K or V: memory does not grow with the
 * context.
 */
#pragma once

#include "model.h"

#include <winnow/winnow.h>

enum { FORWARD_WINDOW = 512 };

struct forward;

/* Borrows the model. -ENOMEM, -EAGAIN */
int forward_create(const struct model *model, uint32_t n_threads, struct forward **ret_forward);
void forward_destroy(struct forward *forward); /* NULL is fine */

/* Reads ids [n], n <= FORWARD_WINDOW, whose first has position `first` = tokens the session holds.
 * Errors are winnow_attend_exact's; after one the layers may differ in length. */
int forward_window(struct forward *forward, winnow_session *session, const uint32_t *ids,
                   uint64_t first, uint32_t n);

/* One decode step of one session. */
struct forward_step {
    winnow_session *session;
    uint32_t id;
    uint64_t position;
    float mass; /* 0: the session's */
    /* results */
    winnow_certificate *certificates; /* [n_layers], the caller's */
    uint64_t truncate_to;             /* with -ENODATA */
    int64_t attend_ns;                /* time in winnow_attend, of all layers */
};

/* Errors are winnow_attend's, the item's included. */
int forward_step(struct forward *forward, winnow_client *client, struct forward_step *step);

/* Raw logits [n_vocab] after the last position read; overwritten by the next call. */
const float *forward_logits(struct forward *forward);

/* After a window: logprobs[i] = ln p(next_ids[i] | everything up to row i of it), n <= its rows. */
void forward_logprobs(struct forward *forward, const uint32_t *next_ids, uint32_t n,
                      double *logprobs);
