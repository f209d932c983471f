// compare: each question answered twice on forks, at the mass asked and with everything read.
//
// The two are compared where they have the same history: over the question's tokens and the answer's
// up to where the answers part. There KL(everything || sparse) of the next token is what sparsity
// costs; past it, the two continue different texts. The sparse logits of one question are kept
// (200 KB a step), so that the two runs stay apart and each is timed alone.
#include "clock.h"
#include "context.h"
#include "fault.h"
#include "json.h"
#include "lists.h"
#include "verbs.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One way of answering; logits [n_steps][n_vocab] of one question: kept by the first side, read by
 * the second. */
struct side {
    struct tokens *answers; /* [n_questions] */
    struct tally tally;
    double duration_s;
    float mass;
};

struct comparison {
    struct engine *engine;
    struct lists lists;
    char *file; /* the questions', cut into lines and columns */
    const char *questions[OPTIONS_N_TEXTS_MAX], *expected[OPTIONS_N_TEXTS_MAX];
    uint32_t n_questions;
    struct side sparse, exact;
    /* of the question at hand */
    float *kept;
    uint32_t n_kept, n_kept_max, n_compared;
    const struct tokens *own, *other; /* the second side's answer so far, the first's */
    /* sums */
    double kl_sum, kl_max;
    uint64_t n_kl, n_equal, n_answer_ids;
    char first_difference[64];
    winnow_stats stats, all; /* of the context and of winnowd, when all is answered */
    uint32_t n_read;
    double read_s;
};

/* Lines: question TAB expected. Empty lines and lines that begin with '#' are skipped. */
static int questions_load(struct comparison *c, const char *path)
{
    size_t n_bytes;
    char *rest;
    int rc = engine_file_read(path, &c->file, &n_bytes);
    if (rc < 0)
        return rc;
    char *terminated = realloc(c->file, n_bytes + 1);
    if (!terminated)
        return fault_set(-ENOMEM, "no memory for the questions");
    c->file = terminated;
    c->file[n_bytes] = 0;
    for (char *line = strtok_r(c->file, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *tab = strchr(line, '\t');
        if (line[0] == '#')
            continue;
        if (!tab || c->n_questions == OPTIONS_N_TEXTS_MAX)
            return fault_set(-EINVAL,
                             "%s: line \"%.40s\" is not one of up to %d of question TAB "
                             "expected",
                             path, line, OPTIONS_N_TEXTS_MAX);
        *tab = 0;
        c->questions[c->n_questions] = line;
        c->expected[c->n_questions++] = tab + 1;
    }
    return c->n_questions ? 0 : fault_set(-EINVAL, "%s has no questions", path);
}

/* ln of the sum of exp. */
static double log_sum(const float *logits, uint32_t n)
{
    double sum = 0, top = (double)logits[context_greedy(logits, n)];
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - top);
    return top + log(sum);
}

static double divergence(const float *p, const float *q, uint32_t n)
{
    double log_p = log_sum(p, n), log_q = log_sum(q, n), sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        double ln_p = (double)p[i] - log_p;
        sum += exp(ln_p) * (ln_p - ((double)q[i] - log_q));
    }
    return sum > 0 ? sum : 0;
}

static int keep(struct comparison *c, const float *logits)
{
    const uint32_t n_vocab = c->engine->model.n_vocab;
    if (c->n_kept == c->n_kept_max) {
        uint32_t n_kept_max = c->n_kept_max ? c->n_kept_max * 2 : 64;
        float *kept = realloc(c->kept, (size_t)n_kept_max * n_vocab * sizeof *kept);
        if (!kept)
            return fault_set(-ENOMEM, "no memory for the logits of %u steps", n_kept_max);
        c->kept = kept;
        c->n_kept_max = n_kept_max;
    }
    memcpy(c->kept + (size_t)c->n_kept++ * n_vocab, logits, n_vocab * sizeof *logits);
    return 0;
}

/* The next step of the second side, while its history is the first's. */
static void compare_step(struct comparison *c, const float *logits)
{
    const uint32_t n_vocab = c->engine->model.n_vocab, n_own = c->own->n_ids;

    if (c->n_compared == c->n_kept || n_own > c->other->n_ids ||
        (n_own && memcmp(c->own->ids, c->other->ids, n_own * sizeof *c->own->ids)))
        return;
    double kl = divergence(logits, c->kept + (size_t)c->n_compared++ * n_vocab, n_vocab);
    c->kl_sum += kl;
    c->kl_max = fmax(c->kl_max, kl);
    c->n_kl++;
}

static int side_step(struct comparison *c, const float *logits, int is_second)
{
    if (!is_second)
        return keep(c, logits);
    compare_step(c, logits);
    return 0;
}

/* One answer: as context_answer, with a look at the logits of every step. */
static int side_answer(struct comparison *c, const struct context *read, uint32_t question,
                       struct side *side, int is_second)
{
    const struct tokens *list = &c->lists.lists[question];
    const uint32_t end_id = tokenizer_end_id(c->engine->tokenizer);
    struct tokens *answer = &side->answers[question];
    const float *logits = NULL;
    struct context fork;

    int rc = context_fork(read, side->mass, &fork);
    if (rc < 0)
        return rc;
    c->own = answer;
    for (uint32_t i = read->tokens.n_ids; rc == 0 && i < list->n_ids; i++) {
        rc = context_step(&fork, list->ids[i], &logits);
        if (rc == 0)
            rc = side_step(c, logits, is_second);
    }
    while (rc == 0 && answer->n_ids < c->engine->options->n_tokens && context_has_room(&fork)) {
        uint32_t id = context_greedy(logits, c->engine->model.n_vocab);
        if (id == end_id)
            break;
        rc = tokens_append(answer, id);
        if (rc == 0)
            rc = context_step(&fork, id, &logits);
        if (rc == 0)
            rc = side_step(c, logits, is_second);
    }
    if (rc == 0)
        rc = tally_merge(&side->tally, &fork.tally);
    context_close(&fork);
    return rc;
}

static void count_equal(struct comparison *c, uint32_t question)
{
    const struct tokens *a = &c->sparse.answers[question], *b = &c->exact.answers[question];
    const uint32_t n_longer = a->n_ids > b->n_ids ? a->n_ids : b->n_ids;
    const uint32_t n_shorter = a->n_ids > b->n_ids ? b->n_ids : a->n_ids;
    uint32_t n = 0;

    while (n < n_shorter && a->ids[n] == b->ids[n])
        n++;
    c->n_equal += n;
    c->n_answer_ids += n_longer;
    if (n < n_longer && !c->first_difference[0])
        snprintf(c->first_difference, sizeof c->first_difference, "question %u token %u",
                 question + 1, n + 1);
}

static int question_run(struct comparison *c, const struct context *read, uint32_t question)
{
    struct side *sides[] = {&c->sparse, &c->exact};
    int rc = 0;

    c->n_kept = c->n_compared = 0;
    c->other = &c->sparse.answers[question];
    for (int i = 0; rc == 0 && i < 2; i++) {
        int64_t start_ns = clock_now_ns();
        rc = side_answer(c, read, question, sides[i], i);
        sides[i]->duration_s += (double)(clock_now_ns() - start_ns) / 1e9;
    }
    if (rc == 0)
        count_equal(c, question);
    return rc;
}

static int comparison_run(struct comparison *c)
{
    const enum progress_mode mode = c->engine->options->progress;
    struct context read;
    struct progress progress;

    int rc = lists_check(&c->lists, c->engine->model.n_context);
    if (rc == 0)
        rc = context_open(&read, c->engine);
    if (rc < 0)
        return rc;
    c->n_read = c->lists.n_shared;
    progress_begin(&progress, mode, "read", "tokens", c->n_read);
    rc = context_read(&read, c->lists.lists[0].ids, c->n_read, NULL, NULL, &progress);
    progress_end(&progress);
    c->read_s = (double)(clock_now_ns() - progress.start_ns) / 1e9;

    progress_begin(&progress, mode, "answer", "questions", c->n_questions);
    for (uint32_t i = 0; rc == 0 && i < c->n_questions; i++) {
        rc = question_run(c, &read, i);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
    if (rc == 0) {
        rc = winnow_stats_get(c->engine->client, read.session, &c->stats, 0);
        if (rc == 0)
            rc = winnow_stats_get(c->engine->client, NULL, &c->all, 0);
        if (rc < 0)
            fault_set(rc, "%s", winnow_error_text());
    }
    context_close(&read);
    return rc;
}

static uint64_t block_bytes(const struct comparison *c)
{
    uint32_t item_bytes = c->engine->options->kv_dtype == WINNOW_DTYPE_FP32 ? 4 : 2;
    return 16ull * 2 * c->engine->model.head_width * item_bytes;
}

static void write_model(const struct comparison *c, struct json *json)
{
    static const char *const dtypes[] = {"", "bf16", "fp16", "fp32"};
    const struct model *m = &c->engine->model;
    const char *dtype = dtypes[c->engine->options->kv_dtype];
    struct gguf_text name = {"", 0};

    gguf_text(&c->engine->gguf, "general.name", &name);
    json_object_begin(json, "model");
    json_text(json, "name", name.bytes, name.n_bytes);
    json_text(json, "kv_dtype", dtype, strlen(dtype));
    json_text(json, "io_dtype", "fp32", 4);
    json_count(json, "layers", m->n_layers);
    json_count(json, "q_heads", m->n_q_heads);
    json_count(json, "kv_heads", m->n_kv_heads);
    json_count(json, "k_width", m->head_width);
    json_count(json, "v_width", m->head_width);
    json_object_end(json);
}

static void write_context(const struct comparison *c, struct json *json)
{
    const struct model *m = &c->engine->model;
    const uint64_t token_bytes = block_bytes(c) / 16 * m->n_layers * m->n_kv_heads;

    json_object_begin(json, "context");
    json_count(json, "tokens", c->n_read);
    json_count(json, "sealed_tokens", c->stats.tokens_sealed);
    json_count(json, "blocks", c->stats.tokens_sealed / 16 * m->n_layers * m->n_kv_heads);
    json_count(json, "kv_bytes", c->n_read * token_bytes);
    json_object_end(json);
    json_object_begin(json, "memory");
    json_count(json, "index_bytes", c->stats.index_bytes);
    json_count(json, "kv_host_bytes", c->stats.kv_host_bytes);
    json_count(json, "kv_disk_bytes", c->stats.kv_disk_bytes);
    json_count(json, "rss_peak_bytes", c->all.rss_peak_bytes);
    json_object_end(json);
}

static void write_phase(struct json *json, const char *name, double duration_s)
{
    json_object_begin(json, NULL);
    json_text(json, "name", name, strlen(name));
    json_number(json, "duration_s", duration_s);
    json_bool(json, "skipped", false);
    json_object_end(json);
}

static bool is_correct(const struct comparison *c, const struct side *side, uint32_t question,
                       char **ret_text, size_t *ret_n_bytes)
{
    *ret_text = tokenizer_text(c->engine->tokenizer, &side->answers[question], ret_n_bytes);
    return *ret_text &&
           memmem(*ret_text, *ret_n_bytes, c->expected[question], strlen(c->expected[question]));
}

static void write_side(const struct comparison *c, const char *key, const struct side *side,
                       struct json *json)
{
    json_object_begin(json, key);
    tally_write(&side->tally, json);
    tally_write_report(&side->tally, block_bytes(c), json);
    json_number(json, "prefill_tokens_per_s", c->read_s > 0 ? c->n_read / c->read_s : NAN);
    json_count(json, "written_bytes", c->all.written_bytes);
    json_array_begin(json, "answers");
    for (uint32_t i = 0; i < c->n_questions; i++) {
        const struct tokens *answer = &side->answers[i];
        size_t n_bytes;
        char *text;
        bool correct = is_correct(c, side, i, &text, &n_bytes);

        json_object_begin(json, NULL);
        json_text(json, "question", c->questions[i], strlen(c->questions[i]));
        json_text(json, "expected", c->expected[i], strlen(c->expected[i]));
        json_text(json, "text", text ? text : "", n_bytes);
        json_counts(json, "token_ids", answer->ids, answer->n_ids);
        json_bool(json, "correct", correct);
        json_object_end(json);
        free(text);
    }
    json_array_end(json);
    json_object_end(json);
}

static double side_rate(const struct side *side)
{
    return side->duration_s > 0 ? (double)side->tally.n_steps / side->duration_s : NAN;
}

static void write_comparison(const struct comparison *c)
{
    struct json json = {.stream = stdout};

    json_object_begin(&json, NULL);
    write_model(c, &json);
    write_context(c, &json);
    json_array_begin(&json, "phases");
    write_phase(&json, "read", c->read_s);
    write_phase(&json, "sparse", c->sparse.duration_s);
    write_phase(&json, "exact", c->exact.duration_s);
    json_array_end(&json);
    write_side(c, "sparse", &c->sparse, &json);
    write_side(c, "exact", &c->exact, &json);
    json_object_begin(&json, "compare");
    json_number(&json, "speed_ratio", side_rate(&c->sparse) / side_rate(&c->exact));
    json_number(&json, "kl_mean_nats", c->n_kl ? c->kl_sum / (double)c->n_kl : NAN);
    json_number(&json, "kl_max_nats", c->n_kl ? c->kl_max : NAN);
    json_count(&json, "tokens_equal", c->n_equal);
    json_count(&json, "tokens_total", c->n_answer_ids);
    if (c->first_difference[0])
        json_text(&json, "first_difference", c->first_difference, strlen(c->first_difference));
    else
        json_null(&json, "first_difference");
    json_object_end(&json);
    json_object_end(&json);
    putchar('\n');
}

static void print_comparison(const struct comparison *c)
{
    const struct side *sides[] = {&c->sparse, &c->exact};

    for (uint32_t i = 0; i < c->n_questions; i++) {
        printf("%s\n", c->questions[i]);
        for (int s = 0; s < 2; s++) {
            size_t n_bytes;
            char *text;
            bool correct = is_correct(c, sides[s], i, &text, &n_bytes);
            printf("  %-10s %-5s %.*s\n", s ? "everything" : "sparse", correct ? "ok" : "WRONG",
                   (int)n_bytes, text ? text : "");
            free(text);
        }
    }
    printf("same tokens %llu of %llu; KL %.4f nats, largest %.4f\n", (unsigned long long)c->n_equal,
           (unsigned long long)c->n_answer_ids, c->n_kl ? c->kl_sum / (double)c->n_kl : 0,
           c->kl_max);
    printf("share read %.1f %%, mass %.3f; tokens/s %.1f, everything %.1f\n",
           100 * tally_share_read(&c->sparse.tally), tally_mass_reached(&c->sparse.tally),
           side_rate(&c->sparse), side_rate(&c->exact));
}

static int side_create(struct comparison *c, struct side *side, float mass)
{
    side->mass = mass;
    side->answers = calloc(c->n_questions, sizeof *side->answers);
    if (!side->answers)
        return fault_set(-ENOMEM, "no memory for %u answers", c->n_questions);
    return tally_create(&side->tally, c->engine->model.n_layers);
}

static void side_destroy(const struct comparison *c, struct side *side)
{
    for (uint32_t i = 0; side->answers && i < c->n_questions; i++)
        tokens_free(&side->answers[i]);
    free(side->answers);
    tally_destroy(&side->tally);
}

int verb_compare(struct engine *engine)
{
    const struct options *options = engine->options;
    struct comparison *c = calloc(1, sizeof *c);
    if (!c)
        return fault_set(-ENOMEM, "no memory for the comparison");
    c->engine = engine;
    c->stats = c->all = (winnow_stats)WINNOW_STATS;

    int rc = questions_load(c, options->questions);
    if (rc == 0)
        rc = lists_ask(&c->lists, engine->tokenizer, options->document, c->questions,
                       c->n_questions);
    if (rc == 0)
        rc = side_create(c, &c->sparse, options->mass);
    if (rc == 0)
        rc = side_create(c, &c->exact, 1);
    if (rc == 0)
        rc = comparison_run(c);
    if (rc == 0 && options->json)
        write_comparison(c);
    else if (rc == 0)
        print_comparison(c);
    side_destroy(c, &c->sparse);
    side_destroy(c, &c->exact);
    lists_free(&c->lists);
    free(c->kept);
    free(c->file);
    free(c);
    return rc;
}
