/*
 * The configuration: flags over environment over file over defaults, with the origin of every
 * value, and all that is wrong with it at once.
 *
 * Thread: main, before anything else starts.
 */
#pragma once

#include <daemon/options.h>
#include <stdbool.h>
#include <stdint.h>

/* What is wrong, a line each: what, value, limit. from: origin. hint: a number that works. */
struct winnow_complaints {
    uint32_t n;
    size_t n_bytes;
    char text[8192];
};

void winnow_complain(struct winnow_complaints *complaints, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

enum winnow_verb {
    WINNOW_VERB_SERVE,
    WINNOW_VERB_CHECK,   /* --check: print the plan */
    WINNOW_VERB_HELP,    /* --help */
    WINNOW_VERB_VERSION, /* --version */
    WINNOW_VERB_EXAMPLE, /* --example-config */
    WINNOW_VERB_TABLE,   /* --options-table */
};

struct winnow_origins {
    char text[WINNOW_N_OPTIONS][48]; /* "default", "--host-pool", "WINNOW_HOST_POOL", "FILE:12" */
};

/*
 * Reads flags, environment and the file named by --config. Bad values and unknown keys are
 * complaints. 0, or -EINVAL: a flag this program does not have, or one without its value
 * (exit 64), the line in complaints.
 */
int winnow_config_read(int argc, char **argv, char **environment, struct winnow_config *config,
                       struct winnow_origins *origins, enum winnow_verb *ret_verb,
                       struct winnow_complaints *complaints);

/* Where the value of `member` (offsetof) of struct winnow_config comes from. */
const char *winnow_origin(const struct winnow_origins *origins, size_t offset);
