// Decode steps: one open Attend stream a thread, message k + 1 after reply k.
//
// The cost of a step is the wait: a step is one gRPC batch {SEND, RECEIVE} on a stream that stays
// open, plucked by the thread that asked. Rejected: a unary call a layer (90 us against 50: every
// call builds a stream, headers and trailers).
//
// A sleeping thread wakes late, 25 us on a virtual machine with an H100, where a layer-step takes 70 to
// 300. So who waits for a GPU's answer does not sleep, for up to twice what the last one took; a
// step that the CPU answers may want the core on which we would spin.
//
// A step beyond the daemon's message limit goes in parts, all sent before the first reply, since
// the daemon plans when it has them all. Where the parts begin follows from the items alone, so
// submit and wait compute it apart.
#include <client/client.h>

#include <assert.h>
#include <errno.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct winnow_step {
    struct winnow_step *next; /* in link->idle or client->in_flight */
    struct winnow_link *link; /* a reference, while in flight */
    struct winnow_call *call;
    struct winnow_wire_arena *arena;
    bool greeted; /* the stream's first message, with the token, is out */
    pthread_t owner;
    uint32_t layer, n_items, n_parts;
    uint64_t seq;
    int64_t deadline_ns, begun_ns;
    int64_t spin_ns;           /* from its begin; 0: the stream's last step was no GPU's */
    bool is_alone;             /* of the client's steps in flight, when it began */
    winnow_attend_item *items; /* borrowed until wait */
};

/* Beyond it another thread's work is worth more than a wake-up. */
static const int64_t SPIN_NS_MAX = WINNOW_NS_PER_MS;

static_assert((WINNOW_ITEM_EXACT_ALL & WINNOW_ITEM_DEGRADED_OK) == 0, "flags of their own");
static_assert((WINNOW_WIRE_HAS_KV & WINNOW_WIRE_WANT_LSE) == 0, "flags of their own");
static_assert((WINNOW_WIRE_EXACT & WINNOW_WIRE_ALLOW_DEGRADED) == 0, "flags of their own");
static_assert(((WINNOW_WIRE_HAS_KV | WINNOW_WIRE_WANT_LSE) &
               (WINNOW_WIRE_EXACT | WINNOW_WIRE_ALLOW_DEGRADED)) == 0,
              "flags of their own");
static_assert(WINNOW_WIRE_N_ITEMS_MAX > 0, "a part takes at least one item, so that parts end");

static void step_destroy(struct winnow_step *step)
{
    winnow_call_finish(step->call, 0, NULL);
    winnow_wire_arena_destroy(step->arena);
    free(step);
}

void winnow_step_destroy_all(struct winnow_step *step)
{
    while (step) {
        struct winnow_step *next = step->next;
        step_destroy(step);
        step = next;
    }
}

/* ---- items and parts ---- */

static int items_fail(winnow_attend_item *items, uint32_t n_items, int error)
{
    for (uint32_t i = 0; i < n_items; i++)
        items[i].status = error;
    return error;
}

static int items_check(const struct winnow_client *client, uint32_t layer,
                       const winnow_attend_item *items, uint32_t n_items)
{
    if (!items || !n_items)
        return winnow_error_set(-EINVAL, "no items");
    for (uint32_t i = 0; i < n_items; i++) {
        const struct winnow_session *session = items[i].session;
        if (!session || session->client != client)
            return winnow_error_set(-EINVAL, "item %u: no session of this client", i);
        if (session->model_id != items[0].session->model_id ||
            session->generation != items[0].session->generation)
            return winnow_error_set(-EINVAL, "item %u: another model than item 0", i);
        if (layer >= session->model.layers)
            return winnow_error_set(-EINVAL, "layer %u, the model has %u", layer,
                                    session->model.layers);
        if (!items[i].q || !items[i].out || !items[i].k != !items[i].v)
            return winnow_error_set(-EINVAL, "item %u: q, out or one of k, v is NULL", i);
    }
    return 0;
}

/* Bytes that an item adds to the request or, if that is more, to the reply. */
static size_t item_bytes(const winnow_attend_item *item)
{
    const struct winnow_session *session = item->session;
    size_t asked = session->q_bytes + (item->k ? session->k_bytes + session->v_bytes : 0);
    size_t answered = session->out_bytes + session->lse_bytes;
    return asked > answered ? asked : answered;
}

/* The end of the part that begins at item `first`. */
static uint32_t part_end(const struct winnow_step *step, uint32_t first)
{
    uint32_t end = first;
    size_t n_bytes = 0;
    while (end < step->n_items && end - first < WINNOW_WIRE_N_ITEMS_MAX) {
        n_bytes += item_bytes(&step->items[end]);
        if (end > first && n_bytes > step->link->attend_bytes)
            break;
        end++;
    }
    return end;
}

static uint32_t item_flags(const winnow_attend_item *item)
{
    uint32_t flags = item->k ? WINNOW_WIRE_HAS_KV : 0;
    if (item->lse)
        flags |= WINNOW_WIRE_WANT_LSE;
    if (item->flags & WINNOW_ITEM_EXACT_ALL)
        flags |= WINNOW_WIRE_EXACT;
    if (item->flags & WINNOW_ITEM_DEGRADED_OK)
        flags |= WINNOW_WIRE_ALLOW_DEGRADED;
    return flags;
}

/* ---- submit ---- */

/* A part under construction; the arrays are in the step's arena. */
struct part {
    Winnow__V1__AttendItem *item, **list;
    struct iovec *tensor;
    uint32_t n_items, n_tensor;
};

static_assert(WINNOW_WIRE_N_ITEMS_MAX *
                      (sizeof(Winnow__V1__AttendItem) + sizeof(void *) + 3 * sizeof(struct iovec)) <
                  WINNOW_WIRE_ARENA_BYTES,
              "a step never grows its arena");
static_assert(alignof(Winnow__V1__AttendItem) <= 16, "what the arena aligns to");
static_assert(alignof(struct iovec) <= 16, "what the arena aligns to");

static int part_init(struct part *part, struct winnow_wire_arena *arena, uint32_t n_items)
{
    winnow_wire_arena_reset(arena);
    *part = (struct part){
        .item = winnow_wire_arena_take(arena, n_items * sizeof *part->item),
        .list = winnow_wire_arena_take(arena, n_items * sizeof(void *)),
        .tensor = winnow_wire_arena_take(arena, sizeof *part->tensor * 3 * n_items),
    };
    return part->item && part->list && part->tensor ? 0 : -ENOMEM;
}

static void part_add(struct part *part, const winnow_attend_item *from)
{
    const struct winnow_session *session = from->session;
    Winnow__V1__AttendItem *item = &part->item[part->n_items];
    *item = (Winnow__V1__AttendItem)WINNOW__V1__ATTEND_ITEM__INIT;
    item->session = session->id;
    item->position = from->position;
    item->epoch = session->epoch;
    item->flags = item_flags(from);
    item->mass = from->mass;
    item->n_blocks_max = from->n_blocks_max;
    part->list[part->n_items++] = item;
    part->tensor[part->n_tensor++] = (struct iovec){(void *)from->q, session->q_bytes};
    if (from->k) {
        part->tensor[part->n_tensor++] = (struct iovec){(void *)from->k, session->k_bytes};
        part->tensor[part->n_tensor++] = (struct iovec){(void *)from->v, session->v_bytes};
    }
}

/* Starts sending items [first, end); the step's last part receives the first reply too. */
static int step_send_part(struct winnow_step *step, uint32_t part_idx, uint32_t first, uint32_t end)
{
    struct part part;
    int rc = part_init(&part, step->arena, end - first);
    if (rc < 0)
        return rc;
    for (uint32_t i = first; i < end; i++)
        part_add(&part, &step->items[i]);

    Winnow__V1__AttendRequest request = WINNOW__V1__ATTEND_REQUEST__INIT;
    if (!step->greeted)
        request.token = (ProtobufCBinaryData){WINNOW_WIRE_ID_BYTES, step->link->token};
    request.seq = step->seq;
    request.model = step->items[0].session->model_id;
    request.layer = step->layer;
    request.part = part_idx;
    request.n_parts = step->n_parts;
    request.deadline_us = winnow_deadline_left_us(step->deadline_ns);
    request.n_items = part.n_items;
    request.items = part.list;
    uint32_t what = WINNOW_CALL_SEND | (end == step->n_items ? WINNOW_CALL_RECEIVE : 0);
    step->greeted = true;
    return winnow_message_start(step->call, what, &request, part.tensor, part.n_tensor);
}

static int step_send(struct winnow_step *step)
{
    uint32_t part_idx = 0;
    for (uint32_t first = 0; first < step->n_items; part_idx++) {
        uint32_t end = part_end(step, first);
        int rc = step_send_part(step, part_idx, first, end);
        if (!rc && end < step->n_items)
            rc = winnow_call_wait(step->call, step->deadline_ns + WINNOW_GRACE_NS, NULL, NULL);
        if (rc < 0)
            return rc;
        first = end;
    }
    return 0;
}

static int step_create(struct winnow_link *link, struct winnow_step **ret_step)
{
    struct winnow_step *step = calloc(1, sizeof *step);
    if (!step)
        return -ENOMEM;
    int rc = winnow_wire_arena_create(&step->arena);
    if (!rc)
        rc = winnow_call_open(link->control, "Attend", WINNOW_NEVER_NS, &step->call);
    if (rc < 0) {
        step_destroy(step);
        return rc;
    }
    *ret_step = step;
    return 0;
}

static struct winnow_step *client_find_step(struct winnow_client *client, bool take)
{
    pthread_t self = pthread_self();
    pthread_mutex_lock(&client->lock);
    struct winnow_step **at = &client->in_flight;
    while (*at && !pthread_equal((*at)->owner, self))
        at = &(*at)->next;
    struct winnow_step *step = *at;
    if (step && take)
        *at = step->next;
    pthread_mutex_unlock(&client->lock);
    return step;
}

/* An idle stream of the link, or a new one, in the list of those in flight. */
static int client_take_step(struct winnow_client *client, struct winnow_link *link,
                            struct winnow_step **ret_step)
{
    pthread_mutex_lock(&client->lock);
    struct winnow_step *step = link->idle;
    if (step)
        link->idle = step->next;
    pthread_mutex_unlock(&client->lock);
    int rc = step ? 0 : step_create(link, &step);
    if (rc < 0)
        return rc;
    step->owner = pthread_self();
    step->link = link;
    pthread_mutex_lock(&client->lock);
    step->is_alone = !client->in_flight;
    step->next = client->in_flight;
    client->in_flight = step;
    pthread_mutex_unlock(&client->lock);
    *ret_step = step;
    return 0;
}

/* The step is over: its stream is kept if it is whole. Drops the step's reference to the link. */
static void client_give_step(struct winnow_client *client, struct winnow_step *step, bool whole)
{
    struct winnow_link *link = step->link;
    step->link = NULL;
    if (whole) {
        pthread_mutex_lock(&client->lock);
        step->next = link->idle;
        link->idle = step;
        pthread_mutex_unlock(&client->lock);
    } else {
        step_destroy(step);
    }
    winnow_link_unref(link);
}

/* Why a stream broke, as the step's error. Frees the call. */
static int step_broke(struct winnow_client *client, struct winnow_step *step, int error)
{
    struct winnow_status status = {.error = error, .local = true};
    if (error == -EPIPE || error == -ETIMEDOUT) {
        winnow_call_finish(step->call, step->deadline_ns, &status);
        step->call = NULL;
    }
    if (!status.error) /* a stream is ended by us alone */
        status =
            (struct winnow_status){.error = -EPROTO, .text = "winnowd ended the Attend stream"};
    return winnow_client_note(client, &status);
}

static uint32_t count_parts(const struct winnow_step *step)
{
    uint32_t n_parts = 0;
    for (uint32_t first = 0; first < step->n_items; first = part_end(step, first))
        n_parts++;
    return n_parts;
}

int winnow_attend_submit(winnow_client *client, uint32_t layer, winnow_attend_item *items,
                         uint32_t n_items, int64_t deadline_ns)
{
    struct winnow_link *link;
    struct winnow_step *step;
    int rc = items_check(client, layer, items, n_items);
    if (!rc)
        rc = winnow_client_begin(client, items[0].session->generation, &deadline_ns,
                                 WINNOW_DEFAULT_ATTEND_NS, &link);
    if (rc)
        return items ? items_fail(items, n_items, rc) : rc;
    rc = -EINVAL;
    if (client_find_step(client, false))
        winnow_error_set(rc, "this thread has a step in flight. hint: winnow_attend_wait");
    else if ((rc = client_take_step(client, link, &step)) < 0)
        winnow_error_set(rc, "out of memory");
    if (rc < 0) {
        winnow_link_unref(link);
        return items_fail(items, n_items, rc);
    }

    step->layer = layer;
    step->items = items;
    step->n_items = n_items;
    step->deadline_ns = deadline_ns;
    step->begun_ns = winnow_clock_now_ns();
    step->seq = atomic_fetch_add(&client->seq, 1) + 1;
    step->n_parts = count_parts(step);
    rc = step_send(step);
    if (rc < 0) {
        client_find_step(client, true);
        rc = step_broke(client, step, rc);
        client_give_step(client, step, false);
        return items_fail(items, n_items, rc);
    }
    return 0;
}

/* ---- wait ---- */

/* One item's result; out and lse point into the message. */
static void item_take(winnow_attend_item *item, uint32_t layer,
                      const Winnow__V1__AttendResult *result, const uint8_t *out,
                      const uint8_t *lse)
{
    struct winnow_session *session = item->session;
    item->status = result->status > 0 ? -EPROTO : result->status;
    item->truncate_to = result->truncate_to;
    if (result->tokens_held)
        session->held[layer] = result->tokens_held;
    if (item->status < 0) {
        session->truncate_to = result->truncate_to;
        winnow_error_set(item->status, "%s", result->text);
        return;
    }
    if (item->k)
        session->held[layer] = item->position + 1;
    memcpy(item->out, out, session->out_bytes);
    if (item->lse)
        memcpy(item->lse, lse, session->lse_bytes);
    if (result->certificate)
        winnow_certificate_decode(result->certificate, &item->certificate);
}

static int reply_take(struct winnow_step *step, const Winnow__V1__AttendReply *reply,
                      const struct iovec *tensor)
{
    uint32_t first = 0;
    for (uint32_t part = 0; part < reply->part && first < step->n_items; part++)
        first = part_end(step, first);
    uint32_t n_here = first < step->n_items ? part_end(step, first) - first : 0;
    const struct winnow_session *session = step->items[0].session;
    size_t out_bytes = n_here * session->out_bytes;
    size_t lse_bytes = n_here * session->lse_bytes; /* there, asked for or not */
    if (reply->seq != step->seq || !n_here || reply->n_results != n_here ||
        tensor->iov_len != out_bytes + lse_bytes)
        return winnow_error_set(-EPROTO,
                                "answer of winnowd to step %llu, part %u: %zu results, %zu bytes, "
                                "expected %u, %zu",
                                (unsigned long long)step->seq, reply->part, reply->n_results,
                                tensor->iov_len, n_here, out_bytes + lse_bytes);
    const uint8_t *out = tensor->iov_base, *lse = out + out_bytes;
    for (uint32_t i = 0; i < n_here; i++)
        item_take(&step->items[first + i], step->layer, reply->results[i],
                  out + i * session->out_bytes, lse + i * session->lse_bytes);
    return 0;
}

static void step_spin(const struct winnow_step *step)
{
    int64_t end_ns = step->begun_ns + step->spin_ns;
    while (step->is_alone && winnow_clock_now_ns() < end_ns && !winnow_call_is_back(step->call))
        continue;
}

/* How long the stream's next step is awaited without sleep. */
static void step_pace(struct winnow_step *step)
{
    int64_t took_ns = winnow_clock_now_ns() - step->begun_ns;
    bool of_gpu = false;
    for (uint32_t i = 0; i < step->n_items; i++)
        of_gpu |= step->items[i].status == 0 && step->items[i].certificate.blocks_device > 0;
    step->spin_ns = !of_gpu ? 0 : 2 * took_ns < SPIN_NS_MAX ? 2 * took_ns : SPIN_NS_MAX;
}

/* Replies come a part each, in any order; RECEIVE of the first was started with the last part. */
static int step_receive(struct winnow_step *step)
{
    for (uint32_t part = 0; part < step->n_parts; part++) {
        const void *data;
        size_t n_bytes;
        void *message;
        struct iovec tensor;
        int rc = part ? winnow_call_start(step->call, WINNOW_CALL_RECEIVE, NULL, 0) : 0;
        if (!rc)
            step_spin(step);
        if (!rc)
            rc = winnow_call_wait(step->call, step->deadline_ns + WINNOW_GRACE_NS, &data, &n_bytes);
        if (rc < 0 || !data)
            return rc < 0 ? rc : -EPIPE;
        winnow_wire_arena_reset(step->arena);
        rc = winnow_message_decode(data, n_bytes, &winnow__v1__attend_reply__descriptor,
                                   step->arena, &message, &tensor);
        if (!rc)
            rc = reply_take(step, message, &tensor);
        if (rc < 0)
            return rc;
    }
    step_pace(step);
    return 0;
}

int winnow_attend_wait(winnow_client *client)
{
    if (!client)
        return winnow_error_set(-EINVAL, "client is NULL");
    if (winnow_rpc_forked())
        return winnow_error_set(-ECHILD, "the client belongs to the parent process");
    struct winnow_step *step = client_find_step(client, true);
    if (!step)
        return winnow_error_set(-EINVAL, "this thread has no step in flight");
    winnow_attend_item *items = step->items;
    uint32_t n_items = step->n_items;
    int rc = step_receive(step);
    if (rc == -EPIPE || rc == -ETIMEDOUT)
        rc = step_broke(client, step, rc);
    client_give_step(client, step, rc == 0);
    return rc < 0 ? items_fail(items, n_items, rc) : 0;
}

int winnow_attend(winnow_client *client, uint32_t layer, winnow_attend_item *items,
                  uint32_t n_items, int64_t deadline_ns)
{
    int rc = winnow_attend_submit(client, layer, items, n_items, deadline_ns);
    return rc < 0 ? rc : winnow_attend_wait(client);
}
