#include <assert.h>
#include <base/assert.h>
#include <ctype.h>
#include <daemon/config.h>
#include <errno.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Variables of other programs of this project, by name or, ending in '_', by prefix. */
static const char *const other_variables[] = {"WINNOW_ADDRESS", "WINNOW_MODEL", "WINNOW_TRACES",
                                              "WINNOW_TEST_"};

struct reader {
    struct winnow_config *config;
    struct winnow_origins *origins;
    struct winnow_complaints *complaints;
};

static_assert(sizeof "default" <= sizeof((struct winnow_origins *)0)->text[0], "fits");
static_assert(sizeof "/run/winnow/winnow.sock" <= WINNOW_SOCKET_BYTES, "fits a UNIX socket");
static_assert(sizeof((struct winnow_config *)0)->socket == WINNOW_PATH_BYTES, "a PATH's size");
static_assert(WINNOW_SOCKET_BYTES < WINNOW_PATH_BYTES, "a name too long is told, not cut");

void winnow_complain(struct winnow_complaints *complaints, const char *format, ...)
{
    winnow_assert(complaints->n_bytes < sizeof complaints->text);
    size_t n_left = sizeof complaints->text - complaints->n_bytes;
    va_list args;
    va_start(args, format);
    int n = vsnprintf(complaints->text + complaints->n_bytes, n_left, format, args);
    va_end(args);
    complaints->n++;
    if (n < 0 || (size_t)n + 1 >= n_left)
        return; /* counted, but there is no room to say it */
    complaints->n_bytes += (size_t)n;
    complaints->text[complaints->n_bytes++] = '\n';
    winnow_assert(complaints->n_bytes < sizeof complaints->text);
    complaints->text[complaints->n_bytes] = 0;
}

static void set(struct reader *reader, const struct winnow_option *option, const char *value,
                const char *origin)
{
    winnow_assert(option >= winnow_options);
    winnow_assert(option < winnow_options + WINNOW_N_OPTIONS);
    char text[160];
    if (winnow_option_set(option, value, reader->config, text) < 0)
        winnow_complain(reader->complaints, "%s \"%s\" %s. from: %s", option->name, value, text,
                        origin);
    snprintf(reader->origins->text[option - winnow_options], sizeof reader->origins->text[0], "%s",
             origin);
}

static void complain_unknown(struct reader *reader, const char *what, const char *name,
                             const char *origin)
{
    const char *nearest = winnow_option_nearest(name);
    winnow_complain(reader->complaints, "unrecognized %s \"%s\". from: %s%s%s", what, name, origin,
                    nearest ? ". hint: " : "", nearest ? nearest : "");
}

static char *trim(char *text)
{
    text += strspn(text, " \t\r\n");
    for (size_t n = strlen(text); n && strchr(" \t\r\n", text[n - 1]); n--)
        text[n - 1] = 0;
    return text;
}

/* A comment begins the line or follows a blank: paths may have a '#' in them. */
static void cut_comment(char *line)
{
    for (char *c = line; (c = strchr(c, '#')); c++)
        if (c == line || strchr(" \t", c[-1])) {
            *c = 0;
            return;
        }
}

static void read_line(struct reader *reader, char *line, const char *origin)
{
    cut_comment(line);
    char *key = trim(line);
    if (!*key)
        return;
    char *equals = strchr(key, '=');
    if (!equals) {
        winnow_complain(reader->complaints, "\"%s\" is not key = value. from: %s", key, origin);
        return;
    }
    *equals = 0;
    key = trim(key);
    const struct winnow_option *option = winnow_option_find(key);
    if (option)
        set(reader, option, trim(equals + 1), origin);
    else
        complain_unknown(reader, "key", key, origin);
}

static void read_file(struct reader *reader, const char *path)
{
    FILE *file = fopen(path, "re");
    if (!file) {
        winnow_complain(reader->complaints, "cannot read %s: %s. from: --config", path,
                        strerror(errno));
        return;
    }
    const char *slash = strrchr(path, '/');
    char line[2048], origin[48];
    static_assert(sizeof line > WINNOW_PATH_BYTES + 64, "a key and the longest path");
    for (uint32_t line_no = 1; fgets(line, sizeof line, file); line_no++) {
        snprintf(origin, sizeof origin, "%.32s:%u", slash ? slash + 1 : path, line_no);
        if (!strchr(line, '\n') && !feof(file)) { /* or a NUL is in it: no text of ours */
            winnow_complain(reader->complaints,
                            "a line is longer than %zu bytes or no text. from: %s", sizeof line - 2,
                            origin);
            break;
        }
        read_line(reader, line, origin);
    }
    if (ferror(file))
        winnow_complain(reader->complaints, "cannot read %s: %s. from: --config", path,
                        strerror(errno));
    fclose(file);
}

static bool is_other(const char *name)
{
    for (size_t i = 0; i < sizeof other_variables / sizeof *other_variables; i++) {
        size_t n = strlen(other_variables[i]);
        bool is_prefix = other_variables[i][n - 1] == '_';
        if (!strncmp(name, other_variables[i], n) && (is_prefix || !name[n]))
            return true;
    }
    return false;
}

static void read_environment(struct reader *reader, char **environment)
{
    for (; *environment; environment++) {
        char variable[64], name[64];
        size_t n_name = strcspn(*environment, "=");
        if (strncmp(*environment, "WINNOW_", 7) || !(*environment)[n_name])
            continue;
        snprintf(variable, sizeof variable, "%.*s", (int)n_name, *environment);
        if (is_other(variable))
            continue;
        snprintf(name, sizeof name, "%s", variable + 7);
        for (char *c = name; *c; c++)
            *c = (char)tolower((unsigned char)*c);
        bool is_upper = !strpbrk(variable, "abcdefghijklmnopqrstuvwxyz-");
        const struct winnow_option *option = is_upper ? winnow_option_find(name) : NULL;
        if (option)
            set(reader, option, *environment + n_name + 1, variable);
        else
            complain_unknown(reader, "variable", name, variable);
    }
}

static void set_paths(struct winnow_config *config)
{
    const char *runtime = getenv("XDG_RUNTIME_DIR"), *cache = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    if (geteuid() == 0) {
        strcpy(config->socket, "/run/winnow/winnow.sock");
        strcpy(config->data_dir, "/var/lib/winnow");
        return;
    }
    if (runtime && *runtime)
        snprintf(config->socket, sizeof config->socket, "%s/winnow/winnow.sock", runtime);
    if (cache && *cache)
        snprintf(config->data_dir, sizeof config->data_dir, "%s/winnow", cache);
    else if (home && *home)
        snprintf(config->data_dir, sizeof config->data_dir, "%s/.cache/winnow", home);
}

static void set_defaults(struct reader *reader)
{
    struct winnow_config *config = reader->config;
    *config = (struct winnow_config){
        .mass = 0.9F,
        .policy = "codes",
        .dense_below = 1024,
        .n_sessions_max = 4096,
        .n_tokens_max = 1 << 20,
        .io_method = "auto",
        .kernels = "auto",
        .gpu = "auto",
        .gpu_memory_bytes = UINT64_C(4) << 30,
        .n_gpu_sessions = 8,
        .allow_uids = {.n = 1, .uid = {geteuid()}},
    };
    set_paths(config);
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++)
        strcpy(reader->origins->text[i], "default");
}

static bool find_verb(const char *flag, enum winnow_verb *ret_verb)
{
    static const struct {
        const char *flag;
        enum winnow_verb verb;
    } verbs[] = {
        {"--check", WINNOW_VERB_CHECK},         {"--help", WINNOW_VERB_HELP},
        {"--version", WINNOW_VERB_VERSION},     {"--example-config", WINNOW_VERB_EXAMPLE},
        {"--options-table", WINNOW_VERB_TABLE},
    };
    for (size_t i = 0; i < sizeof verbs / sizeof *verbs; i++) {
        if (strcmp(flag, verbs[i].flag))
            continue;
        *ret_verb = verbs[i].verb;
        return true;
    }
    return false;
}

/* A flag's name as it is typed. */
static const char *dashed(const char *name, char text[64])
{
    winnow_assert(strlen(name) + 2 < 64);
    snprintf(text, 64, "--%s", name);
    for (char *c = text; *c; c++)
        *c = *c == '_' ? '-' : *c;
    return text;
}

/* One flag and its value, from argv[*i] on: sets it when `reader` is given, and always *ret_file
 * when it is --config. */
static int read_flag(char **argv, int argc, int *i, struct reader *reader, bool is_first_pass,
                     const char **ret_file)
{
    winnow_assert(*i < argc);
    const char *flag = argv[*i];
    char name[60];
    if (strncmp(flag, "--", 2)) {
        winnow_complain(reader->complaints, "unexpected argument \"%s\". hint: --help", flag);
        return -EINVAL;
    }
    const char *equals = strchr(flag, '=');
    size_t n_name = equals ? (size_t)(equals - flag - 2) : strlen(flag) - 2;
    snprintf(name, sizeof name, "%.*s", (int)n_name, flag + 2);
    const struct winnow_option *option = winnow_option_find(name);
    bool is_file = !strcmp(name, "config");
    if (!option && !is_file) {
        char hint[64];
        for (char *c = name; *c; c++)
            *c = *c == '-' ? '_' : *c;
        const char *nearest = winnow_option_nearest(name);
        winnow_complain(reader->complaints, "unrecognized option \"%.*s\". hint: %s",
                        (int)n_name + 2, flag, dashed(nearest ? nearest : "help", hint));
        return -EINVAL;
    }
    const char *value = equals ? equals + 1 : *i + 1 < argc ? argv[++*i] : NULL;
    if (!value) {
        winnow_complain(reader->complaints, "--%s needs a value. hint: --help", name);
        return -EINVAL;
    }
    char origin[64];
    dashed(name, origin);
    if (is_file)
        *ret_file = value;
    else if (!is_first_pass)
        set(reader, option, value, origin);
    return 0;
}

static void check_paths(struct reader *reader)
{
    const struct winnow_config *config = reader->config;
    if (!*config->socket)
        winnow_complain(reader->complaints, "socket has no default without XDG_RUNTIME_DIR. "
                                            "hint: --socket PATH");
    if (strlen(config->socket) >= WINNOW_SOCKET_BYTES - 4)
        winnow_complain(reader->complaints,
                        "socket of %zu bytes exceeds the %d that a UNIX socket "
                        "may have. from: %s. hint: a shorter path",
                        strlen(config->socket), WINNOW_SOCKET_BYTES - 5,
                        winnow_origin(reader->origins, offsetof(struct winnow_config, socket)));
    if (!*config->data_dir)
        winnow_complain(reader->complaints, "data_dir has no default without HOME. "
                                            "hint: --data-dir PATH");
    if (config->segment_tokens % 128)
        winnow_complain(
            reader->complaints,
            "segment_tokens %u is no multiple of 128. from: %s. "
            "hint: %u",
            config->segment_tokens,
            winnow_origin(reader->origins, offsetof(struct winnow_config, segment_tokens)),
            (config->segment_tokens + 127) / 128 * 128);
}

int winnow_config_read(int argc, char **argv, char **environment, struct winnow_config *config,
                       struct winnow_origins *origins, enum winnow_verb *ret_verb,
                       struct winnow_complaints *complaints)
{
    struct reader reader = {config, origins, complaints};
    const char *file = NULL;
    *ret_verb = WINNOW_VERB_SERVE;
    set_defaults(&reader);
    for (int i = 1; i < argc; i++)
        if (!find_verb(argv[i], ret_verb) && read_flag(argv, argc, &i, &reader, true, &file) < 0)
            return -EINVAL;
    if (file)
        read_file(&reader, file);
    read_environment(&reader, environment);
    for (int i = 1; i < argc; i++)
        if (!find_verb(argv[i], ret_verb))
            read_flag(argv, argc, &i, &reader, false, &file);
    check_paths(&reader);
    return 0;
}

const char *winnow_origin(const struct winnow_origins *origins, size_t offset)
{
    winnow_assert(offset < sizeof(struct winnow_config));
    for (uint32_t i = 0; i < WINNOW_N_OPTIONS; i++)
        if (winnow_options[i].offset == offset)
            return origins->text[i];
    return "default";
}
