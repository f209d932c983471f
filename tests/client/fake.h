/*
 * A winnowd that does what a test tells it: a gRPC server of the test's own process, so that
 * libwinnow meets answers no honest daemon gives (late, short, foreign, none at all).
 *
 * It answers Info, Lease, OpenSession, Truncate, Fork, Close and Stats plainly; Append counts
 * tokens; Attend and AttendExact answer with q as out (k_width = v_width in all tests here) and
 * 0.5 as every lse. `fake->script` bends that; tests set it between calls.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum fake_script {
    FAKE_PLAIN,
    FAKE_SILENT,       /* Attend, AttendExact, Truncate: never answered */
    FAKE_SHORT_DATA,   /* Attend: a byte of data too few */
    FAKE_FOREIGN_SEQ,  /* Attend: the answer to another step */
    FAKE_GARBAGE,      /* Attend and control calls: bytes that are no message */
    FAKE_ITEM_LOST,    /* Attend: every item -ENODATA, truncate_to 48 */
    FAKE_LOST,         /* AttendExact: DATA_LOSS, truncate_to 80 */
    FAKE_REFUSED,      /* OpenSession: RESOURCE_EXHAUSTED, whose reason ENOSPC decides */
    FAKE_OTHER_PROTO,  /* Info: a version from the future */
    FAKE_END_OF_LEASE, /* Lease: ends at once */
};

struct fake;

/* Listens at `path`; the boot id is `boot` 16 times. Never NULL: a failure ends the test. */
struct fake *fake_start(const char *path, uint8_t boot);
/* Closes every connection as a dying process does, and frees. */
void fake_kill(struct fake *fake);
void fake_set_script(struct fake *fake, enum fake_script script);
/* Attend requests that came with a token, and messages of Attend streams in all. */
uint32_t fake_n_streams(const struct fake *fake);
uint32_t fake_n_messages(const struct fake *fake);
uint32_t fake_n_windows(const struct fake *fake);
