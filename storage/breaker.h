/*
 * The breaker: once the disk has left eight operations unanswered, reads fail at once instead of
 * each at the end of its own deadline, and now and then one of them tries the disk.
 *
 *   closed --8 late within 10 s--> open --wait over: one operation goes--> probing
 *     ^                              ^                                        |
 *     |                              '--- no answer within 1 s: wait x 2 -----|
 *     '----------------------------------- any answer: wait = 1 s ------------'
 *
 * The wait is 1 s, doubling to 30. An error is an answer: what it means is the request's affair.
 * Decides only; no I/O, no clock. Thread: I/O, but for winnow_breaker_is_open (any).
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { WINNOW_N_LATE_OPENS = 8 };

struct winnow_breaker {
    int64_t late_ns[WINNOW_N_LATE_OPENS]; /* the last ones, a ring */
    uint32_t late_idx;
    int64_t wait_ns; /* before the next probe */
    int64_t due_ns;  /* open: when a probe may go; probing: when it has failed */
    bool is_probing;
    _Atomic bool is_open;
};

void winnow_breaker_init(struct winnow_breaker *breaker);
/* An operation is late that the disk has had for held_ns. True: it counts, once. */
bool winnow_breaker_late(struct winnow_breaker *breaker, int64_t held_ns, int64_t now_ns);
/* True when an operation may go: closed, or it is to be the probe. */
bool winnow_breaker_lets(struct winnow_breaker *breaker, int64_t now_ns);
/* An operation goes. True: it is the probe, and its end is to be told. */
bool winnow_breaker_sent(struct winnow_breaker *breaker, int64_t now_ns);
/* The disk has answered a probe, in time or not. */
void winnow_breaker_answered(struct winnow_breaker *breaker, int64_t now_ns);
/* When `lets` may change though nothing else happens; INT64_MIN: closed. */
int64_t winnow_breaker_next(const struct winnow_breaker *breaker);
bool winnow_breaker_is_open(const struct winnow_breaker *breaker);
