/*
 * Inside libwinnow: the structs behind the handles of winnow/winnow.h.
 *
 * A client replaces its link when the daemon dies and comes back; `generation` counts them. A
 * session belongs to the link it was opened on: with another one it answers -ESTALE. The lease
 * thread alone replaces links; every call takes a reference for as long as it runs.
 */
#pragma once

#include <assert.h>
#include <base/clock.h>
#include <client/error.h>
#include <client/link.h>
#include <pthread.h>
#include <winnow/winnow.h>

struct winnow_client {
    _Atomic uint32_t n_refs;  /* the handle, each session, the lease thread */
    char *address;            /* as given, or NULL */
    pthread_mutex_t lock;     /* all below; the only lock, never held over a wait */
    struct winnow_link *link; /* NULL: the daemon is gone, or the client is closed */
    uint64_t generation;      /* of the newest link */
    struct winnow_step *in_flight;
    bool closed;
    int64_t timeout_ns[2]; /* when the two calls before ended without an answer */
    _Atomic bool broken;   /* the breaker is open: calls answer without a lock or a system call */
    _Atomic uint64_t seq;  /* of Attend requests */
    int wake_fd;           /* eventfd: the lease thread should look */
    pthread_t lease_thread;
};

struct winnow_session {
    struct winnow_client *client;
    uint64_t generation;
    uint64_t id, truncate_to;
    uint32_t model_id, epoch, segment_tokens;
    winnow_model model;
    size_t q_bytes, k_bytes, v_bytes, out_bytes, lse_bytes; /* of one token */
    uint64_t held[];                                        /* [model.layers] */
};

/* Waits for an answer outlast the deadline by this much: the daemon, told the deadline, says more
 * about its passing than we know, and a word from it is no sign of its silence (the breaker's). */
#define WINNOW_GRACE_NS (20 * WINNOW_NS_PER_MS)

#define WINNOW_DEFAULT_CONTROL_NS (5 * WINNOW_NS_PER_S)
#define WINNOW_DEFAULT_ATTEND_NS  (2 * WINNOW_NS_PER_S)
#define WINNOW_DEFAULT_APPEND_NS  (10 * WINNOW_NS_PER_S)
#define WINNOW_DEFAULT_EXACT_NS   (60 * WINNOW_NS_PER_S)

static_assert(WINNOW_GRACE_NS + WINNOW_LIMBO_AFTER_NS < 50 * WINNOW_NS_PER_MS,
              "every call is back by deadline + 50 ms (winnow.h)");

/* Microseconds left, as the wire says them; at least 1. */
uint64_t winnow_deadline_left_us(int64_t deadline_ns);

/*
 * Begins a call: turns *deadline_ns 0 into the default from now on and takes a reference to the
 * link; generation 0: any. -EINVAL (closed, NULL) -ECHILD -EHOSTDOWN -ESTALE -ETIMEDOUT (already
 * past), with the thread's text.
 */
int winnow_client_begin(struct winnow_client *client, uint64_t generation, int64_t *deadline_ns,
                        int64_t default_ns, struct winnow_link **ret_link);
/* How a call ended: time-outs of our own open the breaker. Sets the thread's text, returns error. */
int winnow_client_note(struct winnow_client *client, const struct winnow_status *status);
void winnow_client_unref(struct winnow_client *client);

/* Frees a list of idle Attend streams (attend.c). */
void winnow_step_destroy_all(struct winnow_step *step);

void winnow_certificate_decode(const Winnow__V1__Certificate *from, winnow_certificate *to);
