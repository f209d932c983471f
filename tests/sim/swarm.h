/*
 * The swarm: clients that open sessions of different shapes and do to them, by chance, all that an
 * engine can do: windows, appends, decode steps, truncates, forks, cancels, closes, mistakes.
 *
 * Every request that succeeds is done again, in the order of its end, in a **calm** world: the same
 * core with much memory, no disk, no chance. What both answer must be equal to the bit (rule 6). A
 * request that fails must have a reason that this run has; then the client does what the manual
 * says: it truncates and sends again.
 */
#pragma once

#include "inside.h"

#include <errno.h>

enum {
    SIM_N_CLIENTS_MAX = 6,
    SIM_TOKENS_MAX = 1536, /* of a context */
    SIM_WINDOW_MAX = 224,
    SIM_SYNC_TRIES = 12,
};
#define SIM_LATE_NS (50 * WINNOW_NS_PER_MS) /* after its deadline a request must have ended */

enum sim_task { SIM_IDLE, SIM_WINDOW, SIM_DECODE };

struct sim_swarm;

struct sim_call {
    struct winnow_request request; /* first: `done` is given it */
    struct sim_client *client;
    struct sim_call *next;
    bool ended, cancelled;
    int wrong;        /* a mistake on purpose: the errno it must get */
    uint8_t *data[5]; /* q, k, v, out, lse */
    size_t out_bytes, lse_bytes;
};

struct sim_client {
    struct sim_swarm *swarm;
    bool open, opening, closing;
    uint64_t owner, id[2]; /* sessions of the world and of the calm */
    uint32_t epoch[2];
    struct sim_model model;
    struct winnow_session_options options;
    uint64_t token[SIM_TOKENS_MAX];
    uint64_t n_tokens; /* of them every layer holds so many */

    enum sim_task task;
    uint32_t layer, n_window, n_steps; /* layers done of this step; tokens; steps left */
    float mass;
    uint32_t flags, n_blocks_max, n_retries;
    bool append;

    bool sync; /* something failed: layers must be evened before it goes on */
    uint64_t sync_to;
    uint32_t n_sync_tries;
    uint32_t n_out;
};

/* What may go wrong in this run; anything else that does is a failure of the test. */
struct sim_trouble {
    bool quota;       /* little memory or disk */
    bool lossy;       /* the disk loses blocks */
    double deadlines; /* chance that a request has one */
    int64_t deadline_ns;
    double opens; /* chance a step that a client without a session opens one; else forks take it */
    double cancels, closes, mistakes, rot, storm; /* chance a step */
};

struct sim_swarm_counts {
    uint64_t n_calls, n_equal, n_oracle, n_disk_blocks, n_failed[134], n_verdict[5], n_forks, n_rot;
};

struct sim_swarm {
    struct sim_world world, calm;
    struct sim_trouble trouble;
    struct winnow_rng rng;
    struct sim_client client[SIM_N_CLIENTS_MAX];
    uint32_t n_clients, n_idle, window_max;
    uint64_t hash;    /* of what requests answered */
    uint64_t n_armed; /* faults that reads have met when these have been */
    bool trace, by_gpu;
    uint64_t closing_owner;
    struct sim_call *out, *ended_first, **ended_last;
    struct sim_swarm_counts counts;
    uint64_t n_shapes;
    struct winnow_model_shape shape[4];
};

static inline bool sim_chance(struct sim_swarm *swarm, double p)
{
    return winnow_rng_unit(&swarm->rng) < p;
}

static inline uint64_t sim_below(struct sim_swarm *swarm, uint64_t n)
{
    return winnow_rng_below(&swarm->rng, n);
}

// --- calls --------------------------------------------------------------------------------------

static inline void sim_call_done(struct winnow_request *request)
{
    struct sim_call *call = (struct sim_call *)request;
    struct sim_swarm *swarm = call->client->swarm;
    CHECK(!call->ended);
    call->ended = true;
    for (struct sim_call **at = &swarm->out;; at = &(*at)->next)
        if (*at == call) {
            *at = call->next;
            break;
        }
    call->next = NULL;
    *swarm->ended_last = call;
    swarm->ended_last = &call->next;
}

static inline struct sim_call *sim_call_make(struct sim_client *client, uint32_t kind)
{
    struct sim_call *call = calloc(1, sizeof *call);
    call->client = client;
    call->request.kind = kind;
    call->request.done = sim_call_done;
    call->request.owner = client->owner;
    call->request.session_id = client->id[0];
    call->request.epoch = client->epoch[0];
    call->request.deadline_ns = WINNOW_NEVER_NS;
    return call;
}

static inline void sim_call_free(struct sim_call *call)
{
    for (int i = 0; i < 5; i++)
        free(call->data[i]);
    free(call);
}

/* q, k, v of n tokens of a layer, and room for out and lse filled with what no result is. */
static inline void sim_call_fill(struct sim_call *call, uint32_t layer, const uint64_t *token,
                                 uint32_t n)
{
    const struct sim_model *model = &call->client->model;
    const struct winnow_model_shape *shape = &model->shape;
    size_t number_bytes = shape->io_dtype == WINNOW_FP32 ? 4 : 2;
    size_t q_bytes = n * number_bytes * shape->n_q_heads * shape->k_width;
    size_t k_bytes = n * number_bytes * shape->n_kv_heads * shape->k_width;
    size_t v_bytes = n * number_bytes * shape->n_kv_heads * shape->v_width;
    call->out_bytes = n * number_bytes * shape->n_q_heads * shape->v_width;
    call->lse_bytes = n * sizeof(float) * shape->n_q_heads;
    size_t n_bytes[5] = {q_bytes, k_bytes, v_bytes, call->out_bytes, call->lse_bytes};
    for (int i = 0; i < 5; i++) {
        call->data[i] = malloc(n_bytes[i]);
        memset(call->data[i], 0xff, n_bytes[i]);
    }
    sim_rows(model, SIM_Q, layer, token, n, call->data[0]);
    sim_rows(model, SIM_K, layer, token, n, call->data[1]);
    sim_rows(model, SIM_V, layer, token, n, call->data[2]);
}

static inline void sim_call_send(struct sim_call *call)
{
    struct sim_client *client = call->client;
    struct sim_swarm *swarm = client->swarm;
    if (sim_chance(swarm, swarm->trouble.deadlines))
        call->request.deadline_ns = sim_world_now(&swarm->world) +
                                    (int64_t)sim_below(swarm, (uint64_t)swarm->trouble.deadline_ns);
    call->next = swarm->out;
    swarm->out = call;
    client->n_out++;
    swarm->counts.n_calls++;
    CHECK_EQ(sim_world_submit(&swarm->world, &call->request), 0);
}

/* The same request in the calm world, into memory of its own. */
static inline int sim_call_again(const struct sim_call *call, struct winnow_request *twin,
                                 void *out, void *lse)
{
    const struct sim_client *client = call->client;
    *twin = call->request;
    twin->session_id = client->id[1];
    twin->epoch = client->epoch[1];
    twin->deadline_ns = WINNOW_NEVER_NS;
    if (twin->kind == WINNOW_REQUEST_OPEN)
        twin->open.shape.block_layout = 0; /* each core's own */
    else if (twin->kind == WINNOW_REQUEST_EXACT)
        twin->exact.out = out, twin->exact.lse = lse;
    else if (twin->kind == WINNOW_REQUEST_ATTEND)
        twin->attend.out = out, twin->attend.lse = lse;
    return sim_world_run(&client->swarm->calm, twin);
}

static inline void sim_certificates_compare(const struct winnow_core_certificate *a,
                                            const struct winnow_core_certificate *b)
{
    CHECK_EQ(a->verdict, b->verdict);
    CHECK_EQ(a->n_rounds, b->n_rounds);
    CHECK_EQ(a->n_blocks_total, b->n_blocks_total);
    if (a->verdict != WINNOW_VERDICT_EXACT) /* a strict one may have read more before */
        CHECK_EQ(a->n_blocks_device + a->n_blocks_host + a->n_blocks_disk, b->n_blocks_host);
    CHECK(!memcmp(&a->mass_asked, &b->mass_asked, sizeof(float)));
    CHECK(!memcmp(&a->mass_reached, &b->mass_reached, sizeof(float)));
    CHECK(!memcmp(&a->mass_mean, &b->mass_mean, sizeof(float)));
}

/* Once in a while what was read whole is held against dense attention. */
static inline void sim_oracle_compare(struct sim_call *call, uint32_t layer, uint64_t position,
                                      uint32_t i)
{
    const struct sim_client *client = call->client;
    size_t row_bytes = call->lse_bytes / sizeof(float) / client->model.shape.n_q_heads;
    row_bytes = call->out_bytes / row_bytes;
    double error =
        sim_error(&client->model, layer, client->token, position, call->data[3] + i * row_bytes);
    if (error > sim_tolerance(&client->model)) {
        char text[128];
        snprintf(text, sizeof text, "layer %u, position %llu: %g from dense", layer,
                 (unsigned long long)position, error);
        test_fail(__FILE__, __LINE__, text);
    }
    client->swarm->counts.n_oracle++;
}

/* A window, an append or a step that succeeded. */
static inline void sim_call_compare(struct sim_call *call)
{
    struct sim_client *client = call->client;
    struct sim_swarm *swarm = client->swarm;
    struct winnow_request twin, *mine = &call->request;
    void *out = malloc(call->out_bytes), *lse = malloc(call->lse_bytes);
    memset(out, 0xff, call->out_bytes);
    memset(lse, 0xff, call->lse_bytes);
    CHECK_EQ(sim_call_again(call, &twin, out, lse), mine->status);
    CHECK_EQ(mine->n_held, twin.n_held);
    bool attend = mine->kind == WINNOW_REQUEST_ATTEND;
    const struct winnow_core_certificate *certificate =
        attend ? &mine->attend.certificate : &mine->exact.certificate;
    bool lost = attend && certificate->n_blocks_missed;
    if (lost || swarm->by_gpu) { /* the calm world lost nothing, and a GPU counts no heavy heads */
        struct winnow_session *from = sim_session(swarm->world.core, client->id[0]);
        struct winnow_session *to = sim_session(swarm->calm.core, client->id[1]);
        size_t n_heads = (size_t)client->model.shape.n_layers * client->model.shape.n_kv_heads;
        CHECK(!lost || certificate->verdict == WINNOW_VERDICT_DEGRADED);
        if (swarm->by_gpu) { /* which knows none: none ever comes to be */
            memset(from->heavy, 0, n_heads * sizeof *from->heavy);
            from->n_heavy = 0;
        }
        memcpy(to->heavy, from->heavy, n_heads * sizeof *to->heavy);
        to->n_heavy = from->n_heavy;
    }
    if (!lost) {
        CHECK(!memcmp(out, call->data[3], call->out_bytes));
        CHECK(!memcmp(lse, call->data[4], call->lse_bytes));
        swarm->counts.n_equal++;
    }
    if (attend)
        swarm->counts.n_verdict[certificate->verdict]++;
    if (mine->kind != WINNOW_REQUEST_APPEND && mine->status == 0 && !lost)
        sim_certificates_compare(certificate,
                                 attend ? &twin.attend.certificate : &twin.exact.certificate);
    if (mine->kind != WINNOW_REQUEST_APPEND)
        swarm->counts.n_disk_blocks += certificate->n_blocks_disk;
    free(out);
    free(lse);
    if (mine->status < 0 || mine->kind == WINNOW_REQUEST_APPEND ||
        certificate->verdict != WINNOW_VERDICT_EXACT || !sim_chance(swarm, 0.02))
        return;
    uint32_t i = attend ? 0 : (uint32_t)sim_below(swarm, mine->exact.n_tokens);
    sim_oracle_compare(call, attend ? mine->attend.layer : mine->exact.layer,
                       attend ? mine->attend.position : mine->exact.first + i, i);
}
