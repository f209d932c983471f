/*
 * The reason of the last failure, one line for the person at the terminal.
 *
 * Functions of this program return 0 or -errno; whoever finds the fault writes it down on the way:
 *   return fault_set(-EBADMSG, "%s: tensor %u lies outside the file", path, i);
 */
#pragma once

/* Keeps the text (cut at 511 bytes) and returns rc. */
int fault_set(int rc, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Never NULL. One text a process: this program fails on its main thread only. */
const char *fault_text(void);
