#include <assert.h>
#include <base/assert.h>
#include <ctype.h>
#include <daemon/options.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define AT(member) offsetof(struct winnow_config, member)
#define KIB        (UINT64_C(1) << 10)
#define MIB        (UINT64_C(1) << 20)
#define GIB        (UINT64_C(1) << 30)

static_assert(sizeof((struct winnow_config *)0)->policy == WINNOW_WORD_BYTES, "a WORD's size");
static_assert(sizeof((struct winnow_config *)0)->kernels == WINNOW_WORD_BYTES, "a WORD's size");
static_assert(sizeof((struct winnow_config *)0)->gpu == WINNOW_WORD_BYTES, "a WORD's size");
static_assert(sizeof((struct winnow_config *)0)->io_method == WINNOW_WORD_BYTES, "a WORD's size");

/* Most asked first: the order of --help and of the example file. */
const struct winnow_option winnow_options[WINNOW_N_OPTIONS] = {
    {"host_pool", WINNOW_OPTION_SIZE, AT(host_pool_bytes), 16 * MIB, 1024 * GIB, NULL,
     "25 % of available memory, 64 MiB to 32 GiB",
     "All keys and values held in memory: cache, newest tokens, staging. At least 16 MiB."},
    {"index_memory", WINNOW_OPTION_SIZE, AT(index_memory_bytes), 1 * MIB, 1024 * GIB, NULL,
     "half of host_pool, at least 48 MiB",
     "The index of all open contexts: about 17 % of their 16-bit keys and values."},
    {"disk_cap", WINNOW_OPTION_SIZE, AT(disk_cap_bytes), 128 * MIB, 1024 * 1024 * GIB, NULL,
     "10 % of the file system, at most half of what is free and 256 GiB",
     "Hard limit of the data files together."},
    {"data_dir", WINNOW_OPTION_PATH, AT(data_dir), 0, 0, NULL,
     "$XDG_CACHE_HOME/winnow; as root /var/lib/winnow",
     "Directory of the data files, created if missing; not writable by others."},
    {"socket", WINNOW_OPTION_PATH, AT(socket), 0, 0, NULL,
     "$XDG_RUNTIME_DIR/winnow/winnow.sock; as root /run/winnow/winnow.sock",
     "The UNIX socket clients connect to, at most 107 bytes long."},
    {"mass", WINNOW_OPTION_SHARE, AT(mass), 0, 0, NULL, "0.9",
     "Share of the attention mass a session reaches unless it asks for another; 1 reads all."},
    {"policy", WINNOW_OPTION_WORD, AT(policy), 0, 0, "codes tactic moment exact", "codes",
     "How the mass of a block is estimated, unless a session asks for another policy."},
    {"threads", WINNOW_OPTION_COUNT, AT(n_threads), 1, 256, NULL, "the processors there are",
     "Threads that compute, the serving thread included."},
    {"segment_tokens", WINNOW_OPTION_COUNT, AT(segment_tokens), 128, 8192, NULL,
     "512 for a host_pool under 128 MiB, else 1024",
     "Tokens clustered and written together, a multiple of 128. Part of a context's identity."},
    {"dense_below", WINNOW_OPTION_COUNT, AT(dense_below), 0, 1 << 20, NULL, "1024",
     "A context with fewer sealed tokens is read whole."},
    {"sessions_max", WINNOW_OPTION_COUNT, AT(n_sessions_max), 1, 131072, NULL, "4096",
     "Sessions open at once."},
    {"tokens_max", WINNOW_OPTION_COUNT, AT(n_tokens_max), 1024, 1 << 24, NULL, "1048576",
     "Tokens of one context."},
    {"io_method", WINNOW_OPTION_WORD, AT(io_method), 0, 0, "auto io_uring pread", "auto",
     "How the disk is read; auto takes io_uring where the kernel allows it."},
    {"kernels", WINNOW_OPTION_WORD, AT(kernels), 0, 0, "auto ref avx2 avx512", "auto",
     "Version of the numeric kernels; auto takes the fastest this processor runs."},
    {"gpu", WINNOW_OPTION_WORD, AT(gpu), 0, 0, "auto off required", "auto",
     "Whether a GPU takes decode steps; required: no start without one."},
    {"gpu_memory", WINNOW_OPTION_SIZE, AT(gpu_memory_bytes), 64 * MIB, 1024 * GIB, NULL, "4GiB",
     "GPU memory reserved at start: index, newest tokens, a cache of blocks, scratch."},
    {"gpu_device", WINNOW_OPTION_COUNT, AT(gpu_device), 0, 255, NULL, "0",
     "Which GPU, by its number among those the process sees."},
    {"gpu_sessions", WINNOW_OPTION_COUNT, AT(n_gpu_sessions), 1, 4096, NULL, "8",
     "Sessions whose newest tokens have room on the GPU; steps of others are the CPU's."},
    {"allow_uids", WINNOW_OPTION_UIDS, AT(allow_uids), 0, 0, NULL, "the daemon's own",
     "Users who may connect, by number, separated by commas. They trust each other."},
};

const struct winnow_option *winnow_option_find(const char *name)
{
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++) {
        const char *a = winnow_options[i].name, *b = name;
        while (*a && (*a == *b || (*a == '_' && *b == '-')))
            a++, b++;
        if (!*a && !*b)
            return &winnow_options[i];
    }
    return NULL;
}

/* Edits between two names: insert, drop, replace. Names longer than the row are far. */
static uint32_t edits(const char *a, const char *b)
{
    enum { N = 32 };
    uint32_t row[N + 1];
    size_t n_a = strlen(a), n_b = strlen(b);
    if (n_a > N || n_b > N)
        return UINT32_MAX;
    for (uint32_t j = 0; j <= n_b; j++)
        row[j] = j;
    for (uint32_t i = 1; i <= n_a; i++) {
        uint32_t diagonal = row[0];
        row[0] = i;
        for (uint32_t j = 1; j <= n_b; j++) {
            uint32_t replace = diagonal + (a[i - 1] != b[j - 1]);
            uint32_t other = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = replace < other ? replace : other;
        }
    }
    winnow_assert(row[n_b] <= N);
    return row[n_b];
}

const char *winnow_option_nearest(const char *name)
{
    const char *nearest = NULL;
    uint32_t n_least = 4;
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++) {
        uint32_t n = edits(winnow_options[i].name, name);
        if (n < n_least) {
            n_least = n;
            nearest = winnow_options[i].name;
        }
    }
    return nearest;
}

int winnow_size_parse(const char *text, uint64_t *ret_bytes)
{
    static const char units[] = "KMGT";
    char *end;
    if (!isdigit((unsigned char)*text))
        return -EINVAL;
    errno = 0;
    uint64_t n = strtoull(text, &end, 10);
    if (errno)
        return -EINVAL;
    end += strspn(end, " ");
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    uint32_t shift = 0;
    if (unit) {
        shift = 10 * (uint32_t)(unit - units + 1);
        end++;
        if (*end == 'i' && end[1] == 'B')
            end++;
    }
    if (*end == 'B')
        end++;
    winnow_assert(shift <= 40);
    if (*end || n > UINT64_MAX >> shift)
        return -EINVAL;
    *ret_bytes = n << shift;
    return 0;
}

const char *winnow_size_text(uint64_t n_bytes, char text[24])
{
    static const char *const unit[] = {"KiB", "MiB", "GiB", "TiB"};
    uint32_t i = 0;
    double value = (double)n_bytes / 1024;
    for (; value >= 1024 && i < 3; i++)
        value /= 1024;
    bool is_whole = value == (double)(uint64_t)value || value >= 100;
    snprintf(text, 24, is_whole ? "%.0f %s" : "%.1f %s", value, unit[i]);
    return text;
}

const char *winnow_size_typed(uint64_t n_bytes, char text[24])
{
    static const char *const unit[] = {"", "KiB", "MiB", "GiB", "TiB"};
    uint32_t i = 0;
    for (; i < 4 && n_bytes && n_bytes % 1024 == 0; i++)
        n_bytes /= 1024;
    snprintf(text, 24, "%ju%s", (uintmax_t)n_bytes, unit[i]);
    return text;
}

static int set_number(const struct winnow_option *option, const char *value, uint64_t *ret_number,
                      char text[160])
{
    uint64_t n;
    char least[24], most[24];
    if (winnow_size_parse(value, &n) < 0) {
        snprintf(text, 160, "is not a %s",
                 option->kind == WINNOW_OPTION_SIZE ? "size such as 48MiB" : "whole number");
        return -EINVAL;
    }
    if (n >= option->min && n <= option->max) {
        *ret_number = n;
        return 0;
    }
    if (option->kind == WINNOW_OPTION_SIZE)
        snprintf(text, 160, "lies outside %s to %s", winnow_size_text(option->min, least),
                 winnow_size_text(option->max, most));
    else
        snprintf(text, 160, "lies outside %ju to %ju", (uintmax_t)option->min,
                 (uintmax_t)option->max);
    return -EINVAL;
}

static bool has_word(const char *words, const char *word)
{
    size_t n = strlen(word);
    for (const char *at = words; n && (at = strstr(at, word)); at += n)
        if ((at == words || at[-1] == ' ') && (at[n] == ' ' || !at[n]))
            return true;
    return false;
}

static int parse_uids(const char *value, struct winnow_uids *uids)
{
    *uids = (struct winnow_uids){0};
    do {
        char *end;
        errno = 0;
        unsigned long uid = strtoul(value, &end, 10);
        if (!isdigit((unsigned char)*value) || errno || uid >= UINT32_MAX ||
            (*end && *end != ',') || uids->n == WINNOW_N_UIDS_MAX)
            return -EINVAL;
        uids->uid[uids->n++] = (uid_t)uid;
        value = *end ? end + 1 : NULL;
    } while (value);
    return 0;
}

int winnow_option_set(const struct winnow_option *option, const char *value,
                      struct winnow_config *config, char text[160])
{
    winnow_assert(option->offset < sizeof *config);
    void *member = (char *)config + option->offset;
    uint64_t number;
    struct winnow_uids uids;
    int rc;
    switch (option->kind) {
    case WINNOW_OPTION_PATH:
        snprintf(text, 160, "is empty or longer than %d bytes", WINNOW_PATH_BYTES - 1);
        if (!*value || strlen(value) >= WINNOW_PATH_BYTES)
            return -EINVAL;
        winnow_assert(option->offset + WINNOW_PATH_BYTES <= sizeof *config);
        strcpy(member, value);
        return 0;
    case WINNOW_OPTION_SIZE:
        rc = set_number(option, value, &number, text);
        winnow_assert(option->offset % sizeof number == 0);
        if (!rc)
            *(uint64_t *)member = number;
        return rc;
    case WINNOW_OPTION_COUNT:
        rc = set_number(option, value, &number, text);
        winnow_assert(option->max <= UINT32_MAX);
        winnow_assert(option->offset % sizeof(uint32_t) == 0);
        if (!rc)
            *(uint32_t *)member = (uint32_t)number;
        return rc;
    case WINNOW_OPTION_SHARE: {
        char *end;
        float share = strtof(value, &end);
        snprintf(text, 160, "is not a share above 0 and up to 1");
        if (end == value || *end || !(share > 0 && share <= 1))
            return -EINVAL;
        *(float *)member = share;
        return 0;
    }
    case WINNOW_OPTION_WORD:
        winnow_assert(option->words);
        snprintf(text, 160, "is none of: %s", option->words);
        if (strchr(value, ' ') || !has_word(option->words, value))
            return -EINVAL;
        winnow_assert(strlen(value) < WINNOW_WORD_BYTES);
        strcpy(member, value);
        return 0;
    case WINNOW_OPTION_UIDS:
        snprintf(text, 160, "is not a list of up to %d user numbers", WINNOW_N_UIDS_MAX);
        rc = parse_uids(value, &uids);
        if (!rc)
            *(struct winnow_uids *)member = uids;
        return rc;
    }
    return -EINVAL;
}

static const char *kind_text(const struct winnow_option *option)
{
    switch (option->kind) {
    case WINNOW_OPTION_PATH:
        return "PATH";
    case WINNOW_OPTION_SIZE:
        return "SIZE";
    case WINNOW_OPTION_COUNT:
        return "N";
    case WINNOW_OPTION_SHARE:
        return "SHARE";
    case WINNOW_OPTION_WORD:
        return option->words;
    case WINNOW_OPTION_UIDS:
        return "UID,...";
    }
    return "";
}

static void print_flag(FILE *file, const struct winnow_option *option)
{
    fputs("--", file);
    for (const char *c = option->name; *c; c++)
        fputc(*c == '_' ? '-' : *c, file);
}

void winnow_options_print_help(FILE *file)
{
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++) {
        const struct winnow_option *option = &winnow_options[i];
        fputs("  ", file);
        print_flag(file, option);
        fprintf(file, " %s\n        %s\n        Default: %s.\n", kind_text(option), option->about,
                option->fallback);
    }
}

void winnow_options_print_example(FILE *file)
{
    fputs("# winnow.conf: key = value. A flag (--host-pool) wins over the environment\n"
          "# (WINNOW_HOST_POOL), which wins over this file. K, KB and KiB are 1,024.\n",
          file);
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++) {
        const struct winnow_option *option = &winnow_options[i];
        fprintf(file, "\n# %s\n# %s. Default: %s.\n#%s =\n", option->about, kind_text(option),
                option->fallback, option->name);
    }
}

void winnow_options_print_table(FILE *file)
{
    fputs("| key | value | default | meaning |\n| --- | --- | --- | --- |\n", file);
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++) {
        const struct winnow_option *option = &winnow_options[i];
        fprintf(file, "| `%s` | %s | %s | %s |\n", option->name, kind_text(option),
                option->fallback, option->about);
    }
}
