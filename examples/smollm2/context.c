// A context and its recovery. `catch_up` is the only place that sends tokens: a read and a step add
// ids to the list and let it close the gap between what the list has and what the session holds. A
// lost block widens the gap, and the same loop closes it.
//
// Windows end at multiples of 512 whatever position they start from, so tokens that are sent again
// fall into the same windows as before.
#include "context.h"

#include "clock.h"
#include "fault.h"

#include <errno.h>
#include <stdlib.h>

enum { N_LOSSES_MAX = 16 };

static int open_error(int rc)
{
    return fault_set(rc, "%s", winnow_error_text());
}

static int memory_create(struct context *context, struct engine *engine)
{
    *context = (struct context){.engine = engine};
    context->certificates = calloc(engine->model.n_layers, sizeof *context->certificates);
    if (!context->certificates)
        return fault_set(-ENOMEM, "no memory for a context");
    return tally_create(&context->tally, engine->model.n_layers);
}

int context_open(struct context *context, struct engine *engine)
{
    const struct model *m = &engine->model;
    winnow_session_options options = WINNOW_SESSION_OPTIONS;

    int rc = memory_create(context, engine);
    if (rc < 0) {
        context_close(context);
        return rc;
    }
    options.model = (winnow_model){
        .layers = m->n_layers,
        .q_heads = m->n_q_heads,
        .kv_heads = m->n_kv_heads,
        .k_width = m->head_width,
        .v_width = m->head_width,
        .softmax_scale = 1.0f / __builtin_sqrtf((float)m->head_width),
        .kv_dtype = engine->options->kv_dtype,
        .io_dtype = WINNOW_DTYPE_FP32,
    };
    options.label = "smollm2";
    options.policy = engine->options->policy;
    options.mass = engine->options->mass;
    rc = winnow_session_open(engine->client, &options, &context->session, 0);
    if (rc < 0) {
        context_close(context);
        return open_error(rc);
    }
    context->mass = engine->options->mass;
    return 0;
}

int context_fork(const struct context *context, float mass, struct context *fork)
{
    int rc = memory_create(fork, context->engine);
    for (uint32_t i = 0; rc == 0 && i < context->tokens.n_ids; i++)
        rc = tokens_append(&fork->tokens, context->tokens.ids[i]);
    if (rc == 0) {
        rc = winnow_session_fork(context->session, "smollm2-fork", &fork->session, 0);
        if (rc < 0)
            open_error(rc);
    }
    if (rc < 0) {
        context_close(fork);
        return rc;
    }
    fork->n_exact = context->n_exact;
    fork->n_sent = context->n_sent;
    fork->mass = mass;
    return 0;
}

void context_close(struct context *context)
{
    winnow_session_close(context->session);
    tokens_free(&context->tokens);
    tally_destroy(&context->tally);
    free(context->certificates);
    *context = (struct context){0};
}

/* The window from n_sent on, to the next multiple of 512 or to the end of what is read so. */
static uint32_t window_tokens(const struct context *context)
{
    uint32_t end = (context->n_sent / FORWARD_WINDOW + 1) * FORWARD_WINDOW;
    return (end < context->n_exact ? end : context->n_exact) - context->n_sent;
}

static int send_window(struct context *context, uint64_t *truncate_to)
{
    const uint32_t n = window_tokens(context);
    int rc = forward_window(context->engine->forward, context->session,
                            context->tokens.ids + context->n_sent, context->n_sent, n);
    if (rc == 0)
        context->n_sent += n;
    else
        *truncate_to = winnow_session_truncate_to(context->session);
    return rc;
}

static int send_step(struct context *context, uint64_t *truncate_to)
{
    struct forward_step step = {
        .session = context->session,
        .id = context->tokens.ids[context->n_sent],
        .position = context->n_sent,
        .mass = context->mass,
        .certificates = context->certificates,
    };
    int rc = forward_step(context->engine->forward, context->engine->client, &step);
    if (rc == 0)
        context->n_sent++;
    *truncate_to = step.truncate_to;
    context->attend_s = (double)step.attend_ns / 1e9;
    return rc;
}

static int cut_back(struct context *context, uint64_t truncate_to)
{
    if (truncate_to > context->n_sent)
        return fault_set(-EPROTO, "asked to cut back to token %llu of %u",
                         (unsigned long long)truncate_to, context->n_sent);
    int rc = winnow_session_truncate(context->session, truncate_to, 0);
    if (rc < 0)
        return open_error(rc);
    context->n_sent = (uint32_t)truncate_to;
    return 0;
}

/* Sends every token that the session does not hold. */
static int catch_up(struct context *context, context_window_fn *after_window, void *arg,
                    struct progress *progress)
{
    for (uint32_t n_losses = 0; context->n_sent < context->tokens.n_ids;) {
        const uint32_t first = context->n_sent;
        const int is_window = first < context->n_exact;
        uint64_t truncate_to = 0;
        int rc = is_window ? send_window(context, &truncate_to) : send_step(context, &truncate_to);
        if (rc == -ENODATA && n_losses++ < N_LOSSES_MAX)
            rc = cut_back(context, truncate_to);
        else if (rc < 0)
            return open_error(rc);
        else if (is_window && after_window)
            after_window(arg, first, context->n_sent - first);
        if (rc < 0)
            return rc;
        if (progress)
            progress_update(progress, context->n_sent);
    }
    return 0;
}

bool context_has_room(const struct context *context)
{
    return context->tokens.n_ids < context->engine->model.n_context;
}

static int append(struct context *context, const uint32_t *ids, uint32_t n)
{
    const uint32_t n_context = context->engine->model.n_context;

    if (n > n_context - context->tokens.n_ids)
        return fault_set(-EMSGSIZE, "%u tokens; the model's context is %u",
                         context->tokens.n_ids + n, n_context);
    for (uint32_t i = 0; i < n; i++) {
        int rc = tokens_append(&context->tokens, ids[i]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int context_read(struct context *context, const uint32_t *ids, uint32_t n,
                 context_window_fn *after_window, void *arg, struct progress *progress)
{
    int rc = append(context, ids, n);
    if (rc < 0)
        return rc;
    context->n_exact = context->tokens.n_ids;
    return catch_up(context, after_window, arg, progress);
}

int context_step(struct context *context, uint32_t id, const float **ret_logits)
{
    int64_t start_ns = clock_now_ns();
    int rc = append(context, &id, 1);
    if (rc == 0)
        rc = catch_up(context, NULL, NULL, NULL);
    if (rc < 0)
        return rc;
    *ret_logits = forward_logits(context->engine->forward);
    return tally_add(&context->tally, context->certificates,
                     (double)(clock_now_ns() - start_ns) / 1e9, context->attend_s);
}

uint32_t context_greedy(const float *logits, uint32_t n_logits)
{
    uint32_t best = 0;
    for (uint32_t id = 1; id < n_logits; id++)
        if (logits[id] > logits[best])
            best = id;
    return best;
}

int context_answer(struct context *context, const float *logits, uint32_t n_max,
                   context_token_fn *on_token, void *arg, struct tokens *answer)
{
    const struct engine *engine = context->engine;
    const uint32_t end_id = tokenizer_end_id(engine->tokenizer);

    for (uint32_t n = 0; n < n_max; n++) {
        uint32_t id = context_greedy(logits, engine->model.n_vocab);
        if (on_token)
            on_token(arg, id, logits);
        if (id == end_id)
            return 0;
        int rc = tokens_append(answer, id);
        if (rc < 0 || n + 1 == n_max || !context_has_room(context))
            return rc;
        rc = context_step(context, id, &logits);
        if (rc < 0)
            return rc;
    }
    return 0;
}
