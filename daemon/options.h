/*
 * The options: one table behind command line, environment, configuration file, --help, the example
 * file and docs/operations.md. An option `host_pool` is --host-pool, WINNOW_HOST_POOL and the key
 * host_pool. A new option is a line here and a member of struct winnow_config.
 *
 * Thread: any.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

enum {
    WINNOW_PATH_BYTES = 1024,
    WINNOW_SOCKET_BYTES = 108, /* of a UNIX socket's name */
    WINNOW_WORD_BYTES = 16,
    WINNOW_N_UIDS_MAX = 16,
};

struct winnow_uids {
    uint32_t n;
    uid_t uid[WINNOW_N_UIDS_MAX];
};

/* Values as given; 0 = not given, and winnow_limits_plan decides (sizes, threads, segment). */
struct winnow_config {
    char socket[WINNOW_PATH_BYTES]; /* checked to fit WINNOW_SOCKET_BYTES */
    char data_dir[WINNOW_PATH_BYTES];
    uint64_t host_pool_bytes, index_memory_bytes, disk_cap_bytes;
    uint32_t n_threads;
    float mass;
    char policy[WINNOW_WORD_BYTES];
    uint32_t segment_tokens, dense_below;
    uint32_t n_sessions_max, n_tokens_max;
    char io_method[WINNOW_WORD_BYTES], kernels[WINNOW_WORD_BYTES];
    char gpu[WINNOW_WORD_BYTES];
    uint64_t gpu_memory_bytes;
    uint32_t gpu_device, n_gpu_sessions;
    struct winnow_uids allow_uids;
};

enum winnow_option_kind {
    WINNOW_OPTION_PATH,
    WINNOW_OPTION_SIZE,  /* u64 bytes: 48MiB; K, KB and KiB are 1,024 */
    WINNOW_OPTION_COUNT, /* u32 */
    WINNOW_OPTION_SHARE, /* float */
    WINNOW_OPTION_WORD,  /* one of `words` */
    WINNOW_OPTION_UIDS,  /* 1000,1001 */
};

struct winnow_option {
    const char *name;
    enum winnow_option_kind kind;
    size_t offset;        /* in struct winnow_config */
    uint64_t min, max;    /* of SIZE and COUNT */
    const char *words;    /* of WORD, separated by spaces */
    const char *fallback; /* the default, as people read it */
    const char *about;
};

enum { WINNOW_N_OPTIONS = 19 };
extern const struct winnow_option winnow_options[WINNOW_N_OPTIONS];

/* NULL: no such option. `name` as in the file; '-' stands for '_' too. */
const struct winnow_option *winnow_option_find(const char *name);
/* The nearest name within 3 edits, or NULL. */
const char *winnow_option_nearest(const char *name);

/* 0, or -EINVAL with what is allowed in text; then *config is as before. */
int winnow_option_set(const struct winnow_option *option, const char *value,
                      struct winnow_config *config, char text[160]);
/* "48MiB" to bytes. -EINVAL. */
int winnow_size_parse(const char *text, uint64_t *ret_bytes);
/* Bytes as people read them ("48 MiB", "1.5 GiB"); returns text. */
const char *winnow_size_text(uint64_t n_bytes, char text[24]);
/* The same as it is typed: exact, in the largest unit that divides it ("9728MiB"). */
const char *winnow_size_typed(uint64_t n_bytes, char text[24]);

void winnow_options_print_help(FILE *file);
void winnow_options_print_example(FILE *file); /* winnow.conf, all commented out */
void winnow_options_print_table(FILE *file);   /* docs/operations.md's */
