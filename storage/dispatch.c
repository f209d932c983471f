// An operation in flight (a flight) carries one request or a run of merged ones:
//
//   free --flight_make--> ready --flights_submit--> in flight --flight_end--> free
//                           ^                           |
//                           '--- EAGAIN, short: the rest'
//
// A flight that fails is taken apart: each of its reads goes once more, alone, so that a bad
// sector costs its own block and not its neighbours. A second failure, or a sum that is wrong
// twice, is -ENODATA. The rejected way, to retry the merged operation, would lose up to 64 blocks to
// one.
//
// Deadlines do not stop anything: no kernel gives a buffer back early (of 200 cancelled reads none
// was stopped). A late request is answered at once, and its memory comes back with the completion.
// While the breaker is open (breaker.h) reads end where they would be submitted, late and not held.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <base/clock.h>
#include <base/crc32c.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <storage/dispatch.h>
#include <string.h>

enum {
    SUBMIT_MAX = 32, /* then reap: a completion is not left to wait for a long submit */
    N_AGAIN_MAX = 8,
    N_PASSES_MAX = 16, /* of a step, so that its time stays true */
};

static_assert(WINNOW_MERGE_PARTS_MAX <= IOV_MAX, "one call takes all parts of a flight");

struct winnow_flight {
    struct winnow_flight *next;
    struct winnow_io_request *requests;
    struct iovec
        *parts; /* [WINNOW_MERGE_PARTS_MAX]: where what is still to be read or written lies */
    uint64_t offset_bytes;
    uint32_t file_no, n_bytes, n_done_bytes;
    uint32_t n_again;
    int64_t made_ns;
    uint8_t kind, priority;
    bool is_late, is_probe; /* told to the breaker; to be told to it */
};

int winnow_dispatch_init(struct winnow_dispatch *dispatch, const struct winnow_io_method *method,
                         void *io, uint32_t window, uint32_t n_requests_max, uint32_t n_files_max)
{
    winnow_assert(io);
    winnow_assert(window > 0);
    winnow_assert(n_files_max > 0);
    *dispatch = (struct winnow_dispatch){.method = method, .window = window};
    dispatch->next_deadline_ns = WINNOW_NEVER_NS;
    dispatch->ready_end = &dispatch->ready;
    winnow_queue_init(&dispatch->queue, window);
    winnow_breaker_init(&dispatch->breaker);
    dispatch->flight = winnow_alloc_array(window, sizeof *dispatch->flight);
    dispatch->parts =
        winnow_alloc_array((size_t)window * WINNOW_MERGE_PARTS_MAX, sizeof *dispatch->parts);
    dispatch->file_idx = winnow_alloc_array(n_files_max, sizeof *dispatch->file_idx);
    int rc = winnow_ring_create(n_requests_max + n_files_max, sizeof(struct winnow_message),
                                &dispatch->asks);
    if (!rc) /* a late request answers twice */
        rc = winnow_ring_create(2 * n_requests_max + n_files_max, sizeof(struct winnow_message),
                                &dispatch->answers);
    if (rc < 0 || !dispatch->flight || !dispatch->parts || !dispatch->file_idx) {
        winnow_dispatch_finish(dispatch);
        return -ENOMEM;
    }
    memset(dispatch->file_idx, 0xff, n_files_max * sizeof *dispatch->file_idx);
    for (uint32_t i = 0; i < window; i++) {
        dispatch->flight[i].parts = dispatch->parts + (size_t)i * WINNOW_MERGE_PARTS_MAX;
        dispatch->flight[i].next = dispatch->free_flight;
        dispatch->free_flight = &dispatch->flight[i];
    }
    dispatch->io = io;
    return 0;
}

int winnow_dispatch_close(struct winnow_dispatch *dispatch)
{
    winnow_assert(dispatch->io);
    int rc = dispatch->method->close(dispatch->io);
    winnow_assert(rc < 0 || atomic_load(&dispatch->n_in_flight) == 0);
    if (!rc)
        dispatch->io = NULL;
    return rc;
}

void winnow_dispatch_finish(struct winnow_dispatch *dispatch)
{
    winnow_assert(!dispatch->io);
    winnow_ring_destroy(dispatch->answers);
    winnow_ring_destroy(dispatch->asks);
    winnow_alloc_free(dispatch->file_idx);
    winnow_alloc_free(dispatch->parts);
    winnow_alloc_free(dispatch->flight);
    *dispatch = (struct winnow_dispatch){0};
}

int winnow_dispatch_file_open(struct winnow_dispatch *dispatch, uint32_t file_no)
{
    char name[16];
    uint64_t n_bytes;
    winnow_assert(dispatch->file_idx[file_no] == UINT32_MAX);
    snprintf(name, sizeof name, "%08x.dat", file_no);
    return dispatch->method->file_open(dispatch->io, name, 0, &dispatch->file_idx[file_no],
                                       &n_bytes);
}

static void answer(struct winnow_dispatch *dispatch, const struct winnow_message *message)
{
    int rc = winnow_ring_put(dispatch->answers, message);
    winnow_assert(rc >= 0); /* sized for all that can be outstanding */
    dispatch->answered |= rc == 1;
}

static void request_end(struct winnow_dispatch *dispatch, struct winnow_io_request *request,
                        int32_t result, int64_t now_ns)
{
    winnow_assert(result <= 0);
    request->result = request->timed_out ? -ECANCELED : result;
    request->done_ns = now_ns;
    answer(dispatch, &(struct winnow_message){.kind = WINNOW_MESSAGE_DONE, .request = request});
}

/* A read that failed or whose bytes are wrong: once more, unless nobody waits for it. */
static void request_retry(struct winnow_dispatch *dispatch, struct winnow_io_request *request,
                          int64_t now_ns)
{
    winnow_assert(request->kind == WINNOW_IO_READ);
    if (request->n_retries || request->timed_out || dispatch->stopping) {
        request_end(dispatch, request, -ENODATA, now_ns);
        return;
    }
    request->n_retries++;
    winnow_queue_add_first(&dispatch->queue, request);
}

static void request_check(struct winnow_dispatch *dispatch, struct winnow_io_request *request,
                          int64_t now_ns)
{
    if (request->kind == WINNOW_IO_READ &&
        winnow_crc32c(request->sum_seed, request->data, request->n_bytes) != request->sum) {
        request->n_bad_sums++;
        request_retry(dispatch, request, now_ns);
        return;
    }
    request_end(dispatch, request, 0, now_ns);
}

static void flight_ready(struct winnow_dispatch *dispatch, struct winnow_flight *flight)
{
    winnow_assert(flight->requests);
    winnow_assert(flight->n_done_bytes < flight->n_bytes);
    winnow_assert(!*dispatch->ready_end);
    flight->next = NULL;
    *dispatch->ready_end = flight;
    dispatch->ready_end = &flight->next;
}

/* NULL: the window is full, or nothing may go. */
static struct winnow_flight *flight_make(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    if (!dispatch->free_flight)
        return NULL;
    struct winnow_io_request *first = winnow_queue_take(&dispatch->queue, now_ns);
    if (!first)
        return NULL;
    struct winnow_flight *flight = dispatch->free_flight;
    winnow_assert(!flight->requests);
    dispatch->free_flight = flight->next;
    *flight = (struct winnow_flight){.requests = first,
                                     .parts = flight->parts,
                                     .offset_bytes = first->offset_bytes,
                                     .file_no = first->file_no,
                                     .made_ns = now_ns,
                                     .kind = first->kind,
                                     .priority = first->priority};
    for (struct winnow_io_request *request = first; request; request = request->next) {
        request->begun_ns = now_ns;
        flight->n_bytes += request->n_bytes;
    }
    uint32_t n_in_flight = atomic_fetch_add(&dispatch->n_in_flight, 1) + 1;
    winnow_assert(n_in_flight <= dispatch->window);
    if (n_in_flight > atomic_load_explicit(&dispatch->n_in_flight_max, memory_order_relaxed))
        atomic_store_explicit(&dispatch->n_in_flight_max, n_in_flight, memory_order_relaxed);
    return flight;
}

static void flight_end(struct winnow_dispatch *dispatch, struct winnow_flight *flight,
                       int64_t now_ns)
{
    winnow_queue_ended(&dispatch->queue, flight->priority);
    if (flight->is_probe)
        winnow_breaker_answered(&dispatch->breaker, now_ns);
    flight->requests = NULL;
    flight->next = dispatch->free_flight;
    dispatch->free_flight = flight;
    uint32_t n_in_flight = atomic_fetch_sub(&dispatch->n_in_flight, 1);
    winnow_assert(n_in_flight > 0);
}

/* Shares out n_bytes that the disk moved from `from` of the flight on. */
static void flight_account(struct winnow_flight *flight, uint32_t from, uint32_t n_bytes)
{
    uint32_t at = 0;
    for (struct winnow_io_request *request = flight->requests; request; request = request->next) {
        uint32_t begin = at > from ? at : from;
        uint32_t end =
            at + request->n_bytes < from + n_bytes ? at + request->n_bytes : from + n_bytes;
        request->disk_bytes += end > begin ? end - begin : 0;
        at += request->n_bytes;
    }
    winnow_assert(at == flight->n_bytes);
}

static void flight_fail(struct winnow_dispatch *dispatch, struct winnow_flight *flight,
                        int32_t error, int64_t now_ns)
{
    struct winnow_io_request *next;
    for (struct winnow_io_request *request = flight->requests; request; request = next) {
        next = request->next;
        request->n_io_errors++;
        if (request->kind == WINNOW_IO_READ)
            request_retry(dispatch, request, now_ns);
        else
            request_end(dispatch, request, error == -ENOSPC ? -ENOSPC : -EIO, now_ns);
    }
    flight_end(dispatch, flight, now_ns);
}

static void flight_done(struct winnow_dispatch *dispatch, struct winnow_flight *flight,
                        int32_t result, int64_t now_ns)
{
    winnow_assert(flight->requests); /* it was in flight */
    if ((result == -EAGAIN || result == -EINTR) && flight->n_again++ < N_AGAIN_MAX) {
        flight_ready(dispatch, flight);
        return;
    }
    if (result <= 0) {
        flight_fail(dispatch, flight, result, now_ns);
        return;
    }
    flight_account(flight, flight->n_done_bytes, (uint32_t)result);
    uint32_t reached = flight->n_done_bytes + (uint32_t)result;
    winnow_assert(reached <= flight->n_bytes);
    if (reached < flight->n_bytes) { /* short: on from the last page boundary, if it moved */
        reached -= reached % WINNOW_PAGE_BYTES;
        if (reached == flight->n_done_bytes) {
            flight_fail(dispatch, flight, -EIO, now_ns);
            return;
        }
        flight->n_done_bytes = reached;
        flight_ready(dispatch, flight);
        return;
    }
    struct winnow_io_request *next;
    for (struct winnow_io_request *request = flight->requests; request; request = next) {
        next = request->next;
        request_check(dispatch, request, now_ns);
    }
    flight_end(dispatch, flight, now_ns);
}

static bool completions_take(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    struct winnow_io_done done[SUBMIT_MAX];
    uint32_t n_done = dispatch->method->poll(dispatch->io, done, SUBMIT_MAX);
    for (uint32_t i = 0; i < n_done; i++) {
        winnow_assert(done[i].tag < dispatch->window);
        flight_done(dispatch, &dispatch->flight[done[i].tag], done[i].result, now_ns);
    }
    return n_done > 0;
}

static void requests_add(struct winnow_dispatch *dispatch, struct winnow_io_request *batch)
{
    for (const struct winnow_io_request *request = batch; request; request = request->next)
        if (request->deadline_ns < dispatch->next_deadline_ns)
            dispatch->next_deadline_ns = request->deadline_ns;
    winnow_queue_add(&dispatch->queue, batch);
}

static bool asks_take(struct winnow_dispatch *dispatch)
{
    struct winnow_message message;
    bool took = false;
    while (winnow_ring_take(dispatch->asks, &message)) {
        took = true;
        if (message.kind == WINNOW_MESSAGE_REQUESTS) {
            requests_add(dispatch, message.request);
        } else {
            winnow_assert(message.kind == WINNOW_MESSAGE_FILE);
            message.result = winnow_dispatch_file_open(dispatch, message.file_no);
            answer(dispatch, &message);
        }
    }
    return took;
}

static void list_end(struct winnow_dispatch *dispatch, struct winnow_io_request *list,
                     int32_t result, int64_t now_ns)
{
    for (struct winnow_io_request *next; list; list = next) {
        next = list->next;
        request_end(dispatch, list, result, now_ns);
    }
}

/* Answers what is late, and finds the earliest deadline of what is not. */
static void deadlines_check(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    if (now_ns < dispatch->next_deadline_ns)
        return;
    int64_t next_ns = WINNOW_NEVER_NS;
    list_end(dispatch, winnow_queue_take_expired(&dispatch->queue, now_ns), -ETIMEDOUT, now_ns);
    for (uint32_t i = 0; i < WINNOW_N_IO_PRIORITIES; i++)
        for (const struct winnow_io_request *request = dispatch->queue.list[i].head; request;
             request = request->next)
            next_ns = request->deadline_ns < next_ns ? request->deadline_ns : next_ns;
    for (uint32_t i = 0; i < dispatch->window; i++) {
        struct winnow_flight *flight = &dispatch->flight[i];
        for (struct winnow_io_request *request = flight->requests; request;
             request = request->next) {
            if (request->timed_out)
                continue;
            if (request->deadline_ns > now_ns) {
                next_ns = request->deadline_ns < next_ns ? request->deadline_ns : next_ns;
                continue;
            }
            request->timed_out = true;
            if (!flight->is_late)
                flight->is_late =
                    winnow_breaker_late(&dispatch->breaker, now_ns - flight->made_ns, now_ns);
            answer(dispatch,
                   &(struct winnow_message){.kind = WINNOW_MESSAGE_LATE, .request = request});
        }
    }
    dispatch->next_deadline_ns = next_ns;
}

/* Requests of a segment that is gone end here, before they cost a read. */
static bool flight_dropped(struct winnow_dispatch *dispatch, struct winnow_flight *flight,
                           int64_t now_ns)
{
    for (const struct winnow_io_request *request = flight->requests; request;
         request = request->next)
        if (!atomic_load_explicit(request->dropped, memory_order_relaxed))
            return false;
    list_end(dispatch, flight->requests, -ECANCELED, now_ns);
    flight_end(dispatch, flight, now_ns);
    return true;
}

static void flights_fill(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    uint32_t n_ready = 0;
    for (const struct winnow_flight *flight = dispatch->ready; flight; flight = flight->next)
        n_ready++;
    while (n_ready < SUBMIT_MAX && !dispatch->stopping &&
           winnow_breaker_lets(&dispatch->breaker, now_ns)) {
        struct winnow_flight *flight = flight_make(dispatch, now_ns);
        if (!flight)
            break;
        if (flight_dropped(dispatch, flight, now_ns))
            continue;
        flight->is_probe = winnow_breaker_sent(&dispatch->breaker, now_ns);
        flight_ready(dispatch, flight);
        n_ready++;
    }
    if (winnow_breaker_is_open(&dispatch->breaker))
        list_end(dispatch, winnow_queue_take_reads(&dispatch->queue), -ETIMEDOUT, now_ns);
}

/* The flight's memory from n_done_bytes on, neighbours joined. */
static uint32_t flight_parts(const struct winnow_flight *flight)
{
    uint32_t n_parts = 0, n_skip = flight->n_done_bytes;
    const uint8_t *end = NULL;
    for (const struct winnow_io_request *request = flight->requests; request;
         request = request->next) {
        if (n_skip >= request->n_bytes) {
            n_skip -= request->n_bytes;
            continue;
        }
        uint8_t *data = request->data + n_skip;
        if (data != end) {
            winnow_assert(n_parts < WINNOW_MERGE_PARTS_MAX);
            flight->parts[n_parts++] = (struct iovec){.iov_base = data};
        }
        flight->parts[n_parts - 1].iov_len += request->n_bytes - n_skip;
        end = request->data + request->n_bytes;
        n_skip = 0;
    }
    winnow_assert(n_parts > 0);
    return n_parts;
}

static struct winnow_io_op flight_op(const struct winnow_dispatch *dispatch,
                                     const struct winnow_flight *flight)
{
    uint32_t n_parts = flight_parts(flight);
    winnow_assert(dispatch->file_idx[flight->file_no] != UINT32_MAX);
    return (struct winnow_io_op){.kind = flight->kind,
                                 .file_idx = dispatch->file_idx[flight->file_no],
                                 .offset_bytes = flight->offset_bytes + flight->n_done_bytes,
                                 .data = n_parts == 1 ? flight->parts->iov_base : NULL,
                                 .parts = flight->parts,
                                 .n_parts = n_parts,
                                 .n_bytes = flight->n_bytes - flight->n_done_bytes,
                                 .tag = (uint64_t)(flight - dispatch->flight)};
}

static bool flights_submit(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    struct winnow_io_op op[SUBMIT_MAX];
    uint32_t n_ops = 0;
    flights_fill(dispatch, now_ns);
    for (struct winnow_flight *flight = dispatch->ready; flight && n_ops < SUBMIT_MAX;
         flight = flight->next)
        op[n_ops++] = flight_op(dispatch, flight);
    if (!n_ops)
        return false;
    uint32_t n_taken = dispatch->method->submit(dispatch->io, op, n_ops);
    winnow_assert(n_taken <= n_ops);
    for (uint32_t i = 0; i < n_taken; i++)
        dispatch->ready = dispatch->ready->next;
    if (!dispatch->ready)
        dispatch->ready_end = &dispatch->ready;
    return n_taken > 0;
}

static void owner_notify(struct winnow_dispatch *dispatch)
{
    if (!dispatch->answered)
        return;
    dispatch->answered = false;
    if (dispatch->notify)
        dispatch->notify(dispatch->notify_arg);
}

int64_t winnow_dispatch_step(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    winnow_assert(dispatch->io);
    bool moved = true;
    for (uint32_t i = 0; moved && i < N_PASSES_MAX; i++) {
        moved = completions_take(dispatch, now_ns);
        moved |= asks_take(dispatch); /* after poll, which may have taken their wake-up */
        deadlines_check(dispatch, now_ns);
        moved |= flights_submit(dispatch, now_ns);
        owner_notify(dispatch);
    }
    if (moved)
        return now_ns;
    int64_t next_ns = winnow_queue_next(&dispatch->queue);
    if (next_ns < winnow_breaker_next(&dispatch->breaker))
        next_ns = winnow_breaker_next(&dispatch->breaker);
    next_ns = dispatch->free_flight ? next_ns : WINNOW_NEVER_NS;
    return dispatch->next_deadline_ns < next_ns ? dispatch->next_deadline_ns : next_ns;
}

bool winnow_dispatch_drain(struct winnow_dispatch *dispatch, int64_t now_ns)
{
    dispatch->stopping = true;
    winnow_dispatch_step(dispatch, now_ns);
    return atomic_load(&dispatch->n_in_flight) == 0;
}
