#include "options.h"

#include "fault.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <winnow/winnow.h>

const char options_help[] =
    "usage: smollm2 --model FILE [options] VERB\n"
    "\n"
    "verbs\n"
    "  tokenize FILE      the ids of a text\n"
    "  logits FILE        the likeliest next tokens   --top N (20), --generate N (0)\n"
    "  perplexity FILE    ln p of every token given all before it\n"
    "  complete           --prompt FILE, --suffix FILE (one or more), --tokens N (64)\n"
    "  ask                --document FILE, --question TEXT (one or more), --tokens N (64)\n"
    "  compare            --document FILE, --questions FILE (lines: question TAB expected):\n"
    "                     each question answered with everything read and sparse, at\n"
    "                     each --mass P (one or more)\n"
    "  chat               lines from standard input\n"
    "\n"
    "options\n"
    "  --model FILE       GGUF of the llama architecture, Q4_1 and Q8_0\n"
    "  --socket PATH      winnowd's socket (WINNOW_ADDRESS, then the user's, then the system's)\n"
    "  --mass P           share of the attention mass to read, 1 = everything (the daemon's)\n"
    "  --policy NAME      codes, tactic, moment or exact (the daemon's)\n"
    "  --kv-dtype NAME    KV at rest: fp16, fp32 or bf16 (fp16)\n"
    "  --special          text such as <|im_start|> becomes its token\n"
    "  --threads N        (online cores)\n"
    "  --progress WHICH   auto, bar, lines or none, on standard error (auto)\n"
    "  --json             one object on standard output\n";

struct choice {
    const char *name;
    uint32_t value;
};

static const struct choice policies[] = {{"codes", WINNOW_BY_CODES},
                                         {"tactic", WINNOW_BY_TACTIC},
                                         {"moment", WINNOW_BY_MOMENT},
                                         {"exact", WINNOW_BY_EXACT},
                                         {0}};
static const struct choice kv_dtypes[] = {
    {"fp16", WINNOW_DTYPE_FP16}, {"fp32", WINNOW_DTYPE_FP32}, {"bf16", WINNOW_DTYPE_BF16}, {0}};
static const struct choice progress_modes[] = {{"auto", PROGRESS_AUTO},
                                               {"bar", PROGRESS_BAR},
                                               {"lines", PROGRESS_LINES},
                                               {"none", PROGRESS_NONE},
                                               {0}};

enum kind { KIND_FLAG, KIND_TEXT, KIND_TEXTS, KIND_COUNT, KIND_MASS, KIND_CHOICE };

static const struct option {
    const char *name;
    enum kind kind;
    size_t offset;
    const struct choice *choices;
    uint32_t least;
} table[] = {
    {"model", KIND_TEXT, offsetof(struct options, model), NULL, 0},
    {"socket", KIND_TEXT, offsetof(struct options, socket), NULL, 0},
    {"prompt", KIND_TEXT, offsetof(struct options, prompt), NULL, 0},
    {"document", KIND_TEXT, offsetof(struct options, document), NULL, 0},
    {"questions", KIND_TEXT, offsetof(struct options, questions), NULL, 0},
    {"suffix", KIND_TEXTS, 0, NULL, 0},
    {"question", KIND_TEXTS, 0, NULL, 0},
    {"tokens", KIND_COUNT, offsetof(struct options, n_tokens), NULL, 1},
    {"top", KIND_COUNT, offsetof(struct options, n_top), NULL, 1},
    {"generate", KIND_COUNT, offsetof(struct options, n_generate), NULL, 0},
    {"threads", KIND_COUNT, offsetof(struct options, n_threads), NULL, 1},
    {"mass", KIND_MASS, 0, NULL, 0},
    {"policy", KIND_CHOICE, offsetof(struct options, policy), policies, 0},
    {"kv-dtype", KIND_CHOICE, offsetof(struct options, kv_dtype), kv_dtypes, 0},
    {"progress", KIND_CHOICE, offsetof(struct options, progress), progress_modes, 0},
    {"special", KIND_FLAG, offsetof(struct options, parse_special), NULL, 0},
    {"json", KIND_FLAG, offsetof(struct options, json), NULL, 0},
    {"help", KIND_FLAG, offsetof(struct options, help), NULL, 0},
};

static const struct option *find(const char *name, size_t n_bytes)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strlen(table[i].name) == n_bytes && !memcmp(table[i].name, name, n_bytes))
            return &table[i];
    return NULL;
}

static int set_count(const struct option *option, const char *value, uint32_t *field)
{
    char *end;
    errno = 0;
    unsigned long long count = strtoull(value, &end, 10);
    if (errno || end == value || *end || *value == '-' || count < option->least || count > 1000000)
        return fault_set(-EINVAL, "--%s %s is not a number from %u to 1000000", option->name, value,
                         option->least);
    *field = (uint32_t)count;
    return 0;
}

static int set_mass(struct options *options, const char *value)
{
    char *end;
    float mass = strtof(value, &end);
    if (end == value || *end || !(mass > 0 && mass <= 1))
        return fault_set(-EINVAL, "--mass %s is not a share above 0 and up to 1", value);
    if (options->n_masses == OPTIONS_N_MASSES_MAX)
        return fault_set(-EINVAL, "more than %d times --mass", OPTIONS_N_MASSES_MAX);
    options->masses[options->n_masses++] = mass;
    options->mass = options->masses[0];
    return 0;
}

static int set_choice(const struct option *option, const char *value, uint32_t *field)
{
    char known[128] = "";
    for (const struct choice *choice = option->choices; choice->name; choice++) {
        if (!strcmp(choice->name, value)) {
            *field = choice->value;
            return 0;
        }
        strcat(strcat(known, known[0] ? ", " : ""), choice->name);
    }
    return fault_set(-EINVAL, "--%s %s; known are %s", option->name, value, known);
}

static int set(struct options *options, const struct option *option, const char *value)
{
    void *field = (char *)options + option->offset;

    switch (option->kind) {
    case KIND_FLAG:
        *(bool *)field = true;
        return 0;
    case KIND_TEXT:
        *(const char **)field = value;
        return 0;
    case KIND_TEXTS:
        if (options->n_texts == OPTIONS_N_TEXTS_MAX)
            return fault_set(-EINVAL, "more than %d times --%s", OPTIONS_N_TEXTS_MAX, option->name);
        if (options->texts_name && options->texts_name != option->name)
            return fault_set(-EINVAL, "--%s beside --%s", option->name, options->texts_name);
        options->texts_name = option->name;
        options->texts[options->n_texts++] = value;
        return 0;
    case KIND_COUNT:
        return set_count(option, value, field);
    case KIND_MASS:
        return set_mass(options, value);
    case KIND_CHOICE:
        return set_choice(option, value, field);
    }
    return -EINVAL;
}

/* argv[*at] is an option: sets it, and moves *at over a value that stands apart. */
static int parse_option(struct options *options, int argc, char **argv, int *at)
{
    const char *name = argv[*at] + 2, *equals = strchr(name, '=');
    size_t n_bytes = equals ? (size_t)(equals - name) : strlen(name);
    const struct option *option = find(name, n_bytes);

    if (!option)
        return fault_set(-EINVAL, "unknown option %s", argv[*at]);
    if (option->kind == KIND_FLAG)
        return equals ? fault_set(-EINVAL, "--%s takes no value", option->name)
                      : set(options, option, NULL);
    if (equals)
        return set(options, option, equals + 1);
    if (*at + 1 == argc)
        return fault_set(-EINVAL, "--%s needs a value", option->name);
    return set(options, option, argv[++*at]);
}

int options_parse(struct options *options, int argc, char **argv)
{
    long n_cores = sysconf(_SC_NPROCESSORS_ONLN);

    *options = (struct options){
        .n_tokens = 64,
        .n_top = 20,
        .n_threads = n_cores > 0 ? (uint32_t)n_cores : 1,
        .kv_dtype = WINNOW_DTYPE_FP16,
    };
    for (int at = 1; at < argc; at++) {
        int rc = 0;
        if (!strncmp(argv[at], "--", 2))
            rc = parse_option(options, argc, argv, &at);
        else if (!options->verb)
            options->verb = argv[at];
        else if (!options->file)
            options->file = argv[at];
        else
            rc = fault_set(-EINVAL, "one argument too many: %s", argv[at]);
        if (rc < 0)
            return rc;
    }
    return 0;
}
