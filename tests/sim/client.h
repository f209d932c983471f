/*
 * Clients: what they send, and what becomes of it.
 *
 * A client has one session and works at one thing: a window or some decode steps, layer by layer.
 * Now and then it sends two layers at once. When a request fails it repeats the step, or syncs:
 * truncates to where all layers (and the calm world's) are the same, and goes on from there.
 */
#pragma once

#include "swarm.h"

static inline void sim_client_open(struct sim_client *client)
{
    struct sim_swarm *swarm = client->swarm;
    static const float mass[] = {0, 0.5f, 0.8f, 0.97f, 1};
    client->owner = 1 + sim_below(swarm, 2);
    client->model = (struct sim_model){.shape = swarm->shape[sim_below(swarm, swarm->n_shapes)],
                                       .seed = sim_below(swarm, 1 << 20),
                                       .spread = (float)sim_below(swarm, 6)};
    client->options = (struct winnow_session_options){
        .policy = swarm->by_gpu && sim_chance(swarm, 0.8) ? WINNOW_POLICY_CODES
                                                          : 1 + (uint32_t)sim_below(swarm, 4),
        .mass = mass[sim_below(swarm, 5)],
        .n_sinks = 16 * (1 + (uint32_t)sim_below(swarm, 4)),
        .strict = sim_chance(swarm, 0.2),
        .allow_degraded = sim_chance(swarm, 0.2)};
    struct sim_call *call = sim_call_make(client, WINNOW_REQUEST_OPEN);
    call->request.open.shape = client->model.shape;
    call->request.open.options = client->options;
    client->opening = true;
    sim_call_send(call);
}

/* The session ends: what it has under way may end as cancelled. */
static inline void sim_client_closes(struct sim_client *client)
{
    client->closing = true;
    for (struct sim_call *call = client->swarm->out; call; call = call->next)
        call->cancelled |= call->client == client;
}

static inline void sim_client_close(struct sim_client *client)
{
    sim_client_closes(client);
    sim_call_send(sim_call_make(client, WINNOW_REQUEST_CLOSE));
}

static inline void sim_client_truncate(struct sim_client *client, uint64_t n_tokens)
{
    struct sim_call *call = sim_call_make(client, WINNOW_REQUEST_TRUNCATE);
    call->request.truncate.n_tokens = n_tokens;
    sim_call_send(call);
}

/* A fork goes to a client that has no session. */
static inline void sim_client_fork(struct sim_client *client)
{
    struct sim_swarm *swarm = client->swarm;
    for (uint32_t i = 0; i < swarm->n_clients; i++)
        if (!swarm->client[i].open && !swarm->client[i].opening && !swarm->client[i].n_out) {
            swarm->client[i].opening = true;
            struct sim_call *call = sim_call_make(client, WINNOW_REQUEST_FORK);
            call->request.user = &swarm->client[i];
            sim_call_send(call);
            return;
        }
}

/* Tokens beyond those held: some of them may have been sent before, and are sent again. */
static inline void sim_tokens_make(struct sim_client *client, uint32_t n)
{
    struct sim_swarm *swarm = client->swarm;
    uint64_t first = client->n_tokens;
    if (first + n > SIM_TOKENS_MAX)
        return;
    for (uint64_t i = first; i < first + n; i++)
        if (client->token[i] == 0 || sim_chance(swarm, 0.5))
            client->token[i] = sim_token_make(&swarm->rng, i ? client->token[i - 1] : 0);
}

static inline void sim_window_send(struct sim_client *client)
{
    uint32_t kind = client->append ? WINNOW_REQUEST_APPEND : WINNOW_REQUEST_EXACT;
    struct sim_call *call = sim_call_make(client, kind);
    sim_call_fill(call, client->layer, client->token + client->n_tokens, client->n_window);
    if (client->append) {
        call->request.append.layer = client->layer;
        call->request.append.n_tokens = client->n_window;
        call->request.append.first = client->n_tokens;
        call->request.append.k = call->data[1];
        call->request.append.v = call->data[2];
    } else {
        call->request.exact.layer = client->layer;
        call->request.exact.n_tokens = client->n_window;
        call->request.exact.first = client->n_tokens;
        call->request.exact.q = call->data[0];
        call->request.exact.k = call->data[1];
        call->request.exact.v = call->data[2];
        call->request.exact.out = call->data[3];
        call->request.exact.lse = (float *)(void *)call->data[4];
    }
    sim_call_send(call);
}

static inline void sim_step_send(struct sim_client *client, uint32_t layer)
{
    struct sim_call *call = sim_call_make(client, WINNOW_REQUEST_ATTEND);
    sim_call_fill(call, layer, client->token + client->n_tokens, 1);
    call->request.attend.layer = layer;
    call->request.attend.flags = WINNOW_ITEM_HAS_KV | client->flags;
    call->request.attend.position = client->n_tokens;
    call->request.attend.seq = client->n_tokens + 1;
    call->request.attend.mass = client->mass;
    call->request.attend.n_blocks_max = client->n_blocks_max;
    call->request.attend.q = call->data[0];
    call->request.attend.k = call->data[1];
    call->request.attend.v = call->data[2];
    call->request.attend.out = call->data[3];
    call->request.attend.lse = (float *)(void *)call->data[4];
    sim_call_send(call);
}

/* A request that is wrong: it must be refused, and change nothing. */
static inline void sim_mistake_send(struct sim_client *client)
{
    struct sim_swarm *swarm = client->swarm;
    uint64_t held = client->n_tokens;
    uint32_t what = (uint32_t)sim_below(swarm, 5);
    struct sim_call *call = sim_call_make(client, WINNOW_REQUEST_ATTEND);
    uint64_t token = 8;
    sim_call_fill(call, 0, &token, 1);
    call->request.attend.flags = WINNOW_ITEM_HAS_KV;
    call->request.attend.position = held;
    call->request.attend.q = call->data[0];
    call->request.attend.k = call->data[1];
    call->request.attend.v = call->data[2];
    call->request.attend.out = call->data[3];
    call->wrong = -EINVAL;
    if (what == 0) {
        call->request.attend.layer = client->model.shape.n_layers;
    } else if (what == 1) {
        call->request.attend.position = held + 1;
    } else if (what == 2) {
        call->request.owner = 3;
        call->wrong = -ENOENT;
    } else if (what == 3) {
        call->request.epoch += 7;
        call->wrong = -ESTALE;
    } else {
        memset(call->data[sim_below(swarm, 3)], 0xff, 2 * sizeof(float)); /* a NaN in any dtype */
        call->wrong = -EDOM;
    }
    sim_call_send(call);
}

/* Where both worlds' sessions are the same: no further than the least layer holds, and before the
 * end of the first segment that is not in force in every layer of both. */
static inline uint64_t sim_sync_point(const struct sim_client *client)
{
    uint64_t held = UINT64_MAX;
    uint32_t least = UINT32_MAX, most = 0;
    const struct winnow_context *context = NULL;
    for (int side = 0; side < 2; side++) {
        const struct sim_world *world = side ? &client->swarm->calm : &client->swarm->world;
        const struct winnow_session *session = sim_session(world->core, client->id[side]);
        CHECK(session);
        context = session->context;
        for (uint32_t layer = 0; layer < context->shape.n_layers; layer++) {
            const struct winnow_context_layer *state = &context->layer[layer];
            uint32_t n_segments = state->n_segments;
            while (context->n_sinks + (n_segments + 1ull) * context->segment_tokens <=
                   session->layer[layer].sealed_to)
                n_segments++; /* owed */
            held = state->held < held ? state->held : held;
            least = n_segments < least ? n_segments : least;
            most = n_segments > most ? n_segments : most;
        }
    }
    uint64_t end = context->n_sinks + ((uint64_t)least + 1) * context->segment_tokens;
    return least < most && held >= end ? end - 1 : held;
}

static inline void sim_client_sync(struct sim_client *client)
{
    struct sim_swarm *swarm = client->swarm;
    uint64_t to = sim_sync_point(client);
    to = client->sync_to < to ? client->sync_to : to;
    if (client->n_sync_tries++ == SIM_SYNC_TRIES) {
        sim_client_close(client);
        return;
    }
    if (client->n_sync_tries > 1 &&
        sim_chance(swarm, 0.5)) /* no room, perhaps: a seal needs none */
        to = to > client->options.n_sinks
                 ? to - (to - client->options.n_sinks) % swarm->world.options.segment_tokens
                 : 0;
    sim_client_truncate(client, to);
}

static inline void sim_client_choose(struct sim_client *client)
{
    struct sim_swarm *swarm = client->swarm;
    static const float mass[] = {0, 0, 0.3f, 0.9f, 0.99f, 1};
    uint64_t dice = sim_below(swarm, 100), left = SIM_TOKENS_MAX - client->n_tokens;
    bool full = left < 2 * SIM_WINDOW_MAX, young = client->n_tokens < SIM_TOKENS_MAX / 2;
    if (full || dice < 12) {
        uint64_t n_back = sim_chance(swarm, full ? 0.5 : 0.1) ? client->n_tokens : 200;
        n_back = sim_below(swarm, n_back + 1);
        sim_client_truncate(client, n_back < client->n_tokens ? client->n_tokens - n_back : 0);
    } else if (dice < 20) {
        sim_client_fork(client);
    } else if (dice < 22) {
        sim_client_close(client);
    } else if (dice < (young ? 80 : 40)) {
        client->task = SIM_WINDOW;
        client->append = sim_chance(swarm, 0.3);
        client->n_window = 1 + (uint32_t)sim_below(swarm, swarm->window_max);
        sim_tokens_make(client, client->n_window);
    } else {
        client->task = SIM_DECODE;
        client->n_steps = 1 + (uint32_t)sim_below(swarm, sim_chance(swarm, 0.05) ? 160 : 12);
        client->mass = mass[sim_below(swarm, 6)];
        client->flags = sim_chance(swarm, 0.1)   ? WINNOW_ITEM_EXACT
                        : sim_chance(swarm, 0.1) ? WINNOW_ITEM_ALLOW_DEGRADED
                                                 : 0;
        client->n_blocks_max = sim_chance(swarm, 0.1) ? 1 + (uint32_t)sim_below(swarm, 8) : 0;
        sim_tokens_make(client, client->n_steps);
    }
    client->layer = 0;
    client->n_retries = 0;
}

/* Sends what comes next; sometimes two layers at once. */
static inline void sim_client_next(struct sim_client *client)
{
    struct sim_swarm *swarm = client->swarm;
    if (client->n_out || client->opening || client->closing)
        return;
    if (!client->open) {
        if (sim_chance(swarm, client == swarm->client ? 0.1 : swarm->trouble.opens))
            sim_client_open(client);
        return;
    }
    if (client->sync) {
        sim_client_sync(client);
        return;
    }
    if (client->task == SIM_IDLE)
        sim_client_choose(client);
    if (client->task == SIM_WINDOW) {
        sim_window_send(client);
    } else if (client->task == SIM_DECODE) {
        sim_step_send(client, client->layer);
        if (client->layer + 1 < client->model.shape.n_layers && sim_chance(swarm, 0.1))
            sim_step_send(client, client->layer + 1);
    }
}

// --- ends ---------------------------------------------------------------------------------------

/* A span is in force in one layer and owed in another, for want of room: that is not forked. */
static inline bool sim_layers_differ(const struct sim_client *client)
{
    const struct winnow_session *session = sim_session(client->swarm->world.core, client->id[0]);
    bool differ = false;
    for (uint32_t i = 1; session && i < session->context->shape.n_layers; i++)
        differ |= session->context->layer[i].n_segments != session->context->layer[0].n_segments;
    return differ;
}

static inline void sim_reason_check(const struct sim_call *call)
{
    const struct sim_client *client = call->client;
    const struct sim_trouble *trouble = &client->swarm->trouble;
    const struct winnow_request *request = &call->request;
    int64_t now_ns = sim_world_now(&client->swarm->world);
    bool allowed = false;
    switch (-request->status) {
    case ETIMEDOUT:
        allowed = request->deadline_ns <= now_ns;
        break;
    case ECANCELED:
    case ENOENT:
        allowed = call->cancelled || client->closing;
        break;
    case EDQUOT:
        allowed = trouble->quota;
        break;
    case ENODATA:
        allowed = trouble->lossy;
        CHECK_EQ((request->truncate_to - client->options.n_sinks) %
                     client->swarm->world.options.segment_tokens,
                 0);
        CHECK(request->truncate_to >= client->options.n_sinks &&
              request->truncate_to < SIM_TOKENS_MAX);
        break;
    case ERANGE:
        allowed = request->attend.n_blocks_max > 0;
        break;
    case EINVAL:
        allowed = request->kind == WINNOW_REQUEST_FORK && sim_layers_differ(client);
        break;
    }
    if (!allowed || !request->text[0]) {
        char text[400];
        snprintf(text, sizeof text, "request %u fails with %d: \"%s\"", request->kind,
                 request->status, request->text);
        test_fail(__FILE__, __LINE__, text);
    }
}

static inline void sim_step_end(struct sim_client *client)
{
    if (++client->layer < client->model.shape.n_layers)
        return;
    client->layer = 0;
    client->n_tokens += client->task == SIM_WINDOW ? client->n_window : 1;
    if (client->task == SIM_WINDOW || --client->n_steps == 0)
        client->task = SIM_IDLE;
}

static inline void sim_client_fail(struct sim_client *client, const struct sim_call *call)
{
    struct sim_swarm *swarm = client->swarm;
    bool again = call->request.kind == WINNOW_REQUEST_ATTEND && client->n_out == 0 &&
                 client->n_retries < 3 && !client->sync && sim_chance(swarm, 0.5);
    if (again) { /* the same step: it may have appended its token, or not */
        client->n_retries++;
        return;
    }
    if (!client->sync)
        client->sync_to = UINT64_MAX;
    client->sync = true;
    client->task = SIM_IDLE;
    if (call->request.status == -ENODATA && call->request.truncate_to < client->sync_to)
        client->sync_to = call->request.truncate_to;
}

static inline void sim_fork_end(struct sim_client *client, const struct sim_call *call)
{
    struct sim_client *fork = call->request.user;
    struct winnow_request twin;
    fork->opening = false;
    if (call->request.status < 0)
        return;
    CHECK_EQ(sim_call_again(call, &twin, NULL, NULL), 0);
    CHECK_EQ(twin.n_held, call->request.n_held);
    CHECK_EQ(twin.n_held, client->n_tokens);
    struct sim_swarm *swarm = client->swarm;
    *fork = *client;
    fork->swarm = swarm;
    fork->open = true;
    fork->closing = swarm->closing_owner == fork->owner;
    fork->sync = false;
    fork->task = SIM_IDLE;
    fork->n_out = 0;
    fork->id[0] = call->request.fork.ret_session_id;
    fork->id[1] = twin.fork.ret_session_id;
    fork->epoch[0] = call->request.epoch;
    fork->epoch[1] = twin.epoch;
    swarm->counts.n_forks++;
}

static inline void sim_truncate_end(struct sim_client *client, const struct sim_call *call)
{
    struct winnow_request twin;
    if (call->request.status < 0) {
        sim_client_fail(client, call);
        return;
    }
    CHECK_EQ(sim_call_again(call, &twin, NULL, NULL), 0);
    CHECK_EQ(twin.n_held, call->request.n_held);
    client->epoch[0] = call->request.epoch;
    client->epoch[1] = twin.epoch;
    client->n_tokens = call->request.n_held;
    client->sync = false;
    client->n_sync_tries = 0;
    client->task = SIM_IDLE;
}

static inline void sim_open_end(struct sim_client *client, const struct sim_call *call)
{
    struct winnow_request twin;
    client->opening = false;
    if (call->request.status < 0)
        return;
    CHECK_EQ(sim_call_again(call, &twin, NULL, NULL), 0);
    client->options = call->request.open.options;
    client->id[0] = call->request.open.ret_session_id;
    client->id[1] = twin.open.ret_session_id;
    client->epoch[0] = client->epoch[1] = call->request.epoch;
    client->open = true;
    client->closing = client->swarm->closing_owner == client->owner;
    client->sync = false;
    client->n_tokens = client->n_sync_tries = 0;
    client->task = SIM_IDLE;
    memset(client->token, 0, sizeof client->token);
}

static inline void sim_client_ended(struct sim_client *client)
{
    struct winnow_request twin = {
        .kind = WINNOW_REQUEST_CLOSE, .owner = client->owner, .session_id = client->id[1]};
    if (client->open)
        CHECK_EQ(sim_world_run(&client->swarm->calm, &twin), 0);
    client->closing = client->open = false;
}

/* A lease ends: all sessions of an owner are closed, whatever they are at. */
static inline void sim_owner_close(struct sim_swarm *swarm, uint64_t owner)
{
    struct sim_call *call = sim_call_make(&swarm->client[0], WINNOW_REQUEST_CLOSE_OWNER);
    call->request.owner = owner;
    swarm->closing_owner = owner;
    for (uint32_t i = 0; i < swarm->n_clients; i++)
        if (swarm->client[i].open && swarm->client[i].owner == owner)
            sim_client_closes(&swarm->client[i]);
    sim_call_send(call);
}

static inline void sim_owner_end(struct sim_swarm *swarm, uint64_t owner)
{
    swarm->closing_owner = 0;
    for (uint32_t i = 0; i < swarm->n_clients; i++)
        if (swarm->client[i].open && swarm->client[i].owner == owner)
            sim_client_ended(&swarm->client[i]);
}

static inline void sim_work_end(struct sim_client *client, struct sim_call *call)
{
    int status = call->request.status;
    if (!client->open)
        return;
    if (status < 0 && status != -ERANGE) {
        sim_client_fail(client, call);
        return;
    }
    if (client->closing && !sim_session(client->swarm->world.core, client->id[0]))
        return;
    sim_call_compare(call);
    if (status == 0 && !client->sync && client->task != SIM_IDLE)
        sim_step_end(client);
    else if (status < 0)
        sim_client_fail(client, call);
}

/* A line of what ended, and of what each layer holds in both worlds: held/segments/owed. */
static inline void sim_trace(const struct sim_call *call)
{
    const struct sim_client *client = call->client;
    fprintf(stderr, "%10.6f client %u request %u layer %u: %d, held %llu",
            (double)sim_world_now(&client->swarm->world) / 1e9,
            (uint32_t)(client - client->swarm->client), call->request.kind,
            call->request.attend.layer, call->request.status,
            (unsigned long long)call->request.n_held);
    for (int side = 0; client->open && side < 2; side++) {
        const struct sim_world *world = side ? &client->swarm->calm : &client->swarm->world;
        const struct winnow_session *session = sim_session(world->core, client->id[side]);
        for (uint32_t i = 0; session && i < client->model.shape.n_layers; i++)
            fprintf(stderr, "%s%llu/%u/%llu", i ? " " : " | ",
                    (unsigned long long)session->context->layer[i].held,
                    session->context->layer[i].n_segments,
                    (unsigned long long)session->layer[i].sealed_to);
    }
    fprintf(stderr, "\n");
}

static inline void sim_call_end(struct sim_call *call)
{
    struct sim_client *client = call->client;
    struct sim_swarm *swarm = client->swarm;
    int status = call->request.status;
    client->n_out--;
    swarm->hash = sim_mix(swarm->hash, (uint64_t)call->request.kind << 32 | (uint32_t)status);
    for (size_t i = 0; i + sizeof(uint64_t) <= call->out_bytes && status == 0; i += 64) {
        uint64_t word;
        memcpy(&word, call->data[3] + i, sizeof word);
        swarm->hash = sim_mix(swarm->hash, word);
    }
    if (swarm->trace)
        sim_trace(call);
    if (call->wrong && status != -ECANCELED && status != -ETIMEDOUT && !client->closing)
        CHECK_EQ(status, call->wrong);
    if (status < 0) {
        swarm->counts.n_failed[-status]++;
        if (!call->wrong)
            sim_reason_check(call);
    }
    if (call->wrong)
        return;
    switch (call->request.kind) {
    case WINNOW_REQUEST_OPEN:
        sim_open_end(client, call);
        break;
    case WINNOW_REQUEST_CLOSE: /* its lease may have ended before */
        sim_client_ended(client);
        break;
    case WINNOW_REQUEST_CLOSE_OWNER:
        sim_owner_end(swarm, call->request.owner);
        break;
    case WINNOW_REQUEST_FORK:
        sim_fork_end(client, call);
        break;
    case WINNOW_REQUEST_TRUNCATE:
        sim_truncate_end(client, call);
        break;
    default:
        sim_work_end(client, call);
    }
}
