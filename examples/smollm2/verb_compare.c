// compare: each question answered on forks, with everything read and at each mass asked.
//
// A sparse answer is compared where it has the history of the full one: over the question's tokens
// and the answer's up to where the two part. There KL(everything || sparse) of the next token is what
// sparsity costs; past it, the two continue different texts. The full logits of one question are
// kept (200 KB a step), so that the runs stay apart and each is timed alone.
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

/* One way of answering, and how far its steps are from those with everything read. */
struct side {
    struct tokens *answers; /* [n_questions] */
    struct tally tally;
    double duration_s;
    float mass;
    double kl_sum, kl_max;
    uint64_t n_kl, n_equal, n_answer_ids;
    char first_difference[64];
};

struct comparison {
    struct engine *engine;
    struct lists lists;
    char *file; /* the questions', cut into lines and columns */
    const char *questions[OPTIONS_N_TEXTS_MAX], *expected[OPTIONS_N_TEXTS_MAX];
    uint32_t n_questions;
    struct side exact, sparse[OPTIONS_N_MASSES_MAX];
    uint32_t n_sparse;
    /* of the question at hand: logits [n_kept][n_vocab] with everything read, and how many of them
     * a sparse side has been compared with */
    float *kept;
    uint32_t n_kept, n_kept_max, n_compared;
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

/* The next step of a sparse side, while its history is the full one's. */
static void compare_step(struct comparison *c, struct side *side, uint32_t question,
                         const float *logits)
{
    const struct tokens *own = &side->answers[question], *full = &c->exact.answers[question];
    const uint32_t n_vocab = c->engine->model.n_vocab;

    if (c->n_compared == c->n_kept || own->n_ids > full->n_ids ||
        (own->n_ids && memcmp(own->ids, full->ids, own->n_ids * sizeof *own->ids)))
        return;
    double kl = divergence(c->kept + (size_t)c->n_compared++ * n_vocab, logits, n_vocab);
    side->kl_sum += kl;
    side->kl_max = fmax(side->kl_max, kl);
    side->n_kl++;
}

static int side_step(struct comparison *c, struct side *side, uint32_t question,
                     const float *logits)
{
    if (side == &c->exact)
        return keep(c, logits);
    compare_step(c, side, question, logits);
    return 0;
}

/* One answer: as context_answer, with a look at the logits of every step. */
static int side_answer(struct comparison *c, const struct context *read, uint32_t question,
                       struct side *side)
{
    const struct tokens *list = &c->lists.lists[question];
    const uint32_t end_id = tokenizer_end_id(c->engine->tokenizer);
    struct tokens *answer = &side->answers[question];
    const float *logits = NULL;
    struct context fork;

    int rc = context_fork(read, side->mass, &fork);
    if (rc < 0)
        return rc;
    for (uint32_t i = read->tokens.n_ids; rc == 0 && i < list->n_ids; i++) {
        rc = context_step(&fork, list->ids[i], &logits);
        if (rc == 0)
            rc = side_step(c, side, question, logits);
    }
    while (rc == 0 && answer->n_ids < c->engine->options->n_tokens && context_has_room(&fork)) {
        uint32_t id = context_greedy(logits, c->engine->model.n_vocab);
        if (id == end_id)
            break;
        rc = tokens_append(answer, id);
        if (rc == 0)
            rc = context_step(&fork, id, &logits);
        if (rc == 0)
            rc = side_step(c, side, question, logits);
    }
    if (rc == 0)
        rc = tally_merge(&side->tally, &fork.tally);
    context_close(&fork);
    return rc;
}

static void count_equal(const struct comparison *c, struct side *side, uint32_t question)
{
    const struct tokens *a = &side->answers[question], *b = &c->exact.answers[question];
    const uint32_t n_longer = a->n_ids > b->n_ids ? a->n_ids : b->n_ids;
    const uint32_t n_shorter = a->n_ids > b->n_ids ? b->n_ids : a->n_ids;
    uint32_t n = 0;

    while (n < n_shorter && a->ids[n] == b->ids[n])
        n++;
    side->n_equal += n;
    side->n_answer_ids += n_longer;
    if (n < n_longer && !side->first_difference[0])
        snprintf(side->first_difference, sizeof side->first_difference, "question %u token %u",
                 question + 1, n + 1);
}

static int side_run(struct comparison *c, const struct context *read, uint32_t question,
                    struct side *side)
{
    int64_t start_ns = clock_now_ns();
    int rc = side_answer(c, read, question, side);

    side->duration_s += (double)(clock_now_ns() - start_ns) / 1e9;
    return rc;
}

static int question_run(struct comparison *c, const struct context *read, uint32_t question)
{
    c->n_kept = 0;
    int rc = side_run(c, read, question, &c->exact);
    for (uint32_t i = 0; rc == 0 && i < c->n_sparse; i++) {
        c->n_compared = 0;
        rc = side_run(c, read, question, &c->sparse[i]);
        if (rc == 0)
            count_equal(c, &c->sparse[i], question);
    }
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

static double side_kl_mean(const struct side *side)
{
    return side->n_kl ? side->kl_sum / (double)side->n_kl : NAN;
}

static void write_difference(const struct side *side, struct json *json)
{
    json_number(json, "kl_mean_nats", side_kl_mean(side));
    json_number(json, "kl_max_nats", side->n_kl ? side->kl_max : NAN);
    json_count(json, "tokens_equal", side->n_equal);
    json_count(json, "tokens_total", side->n_answer_ids);
    if (side->first_difference[0])
        json_text(json, "first_difference", side->first_difference, strlen(side->first_difference));
    else
        json_null(json, "first_difference");
}

/* What each mass asked reads, and how far it is from everything. */
static void write_masses(const struct comparison *c, struct json *json)
{
    json_array_begin(json, "masses");
    for (uint32_t i = 0; i < c->n_sparse; i++) {
        const struct side *side = &c->sparse[i];
        json_object_begin(json, NULL);
        json_number(json, "mass_asked", (double)side->tally.mass_asked);
        tally_write(&side->tally, json);
        write_difference(side, json);
        json_object_end(json);
    }
    json_array_end(json);
}

static void write_comparison(const struct comparison *c)
{
    struct json json = {.stream = stdout};

    json_object_begin(&json, NULL);
    write_model(c, &json);
    write_context(c, &json);
    json_array_begin(&json, "phases");
    write_phase(&json, "read", c->read_s);
    write_phase(&json, "sparse", c->sparse[0].duration_s);
    write_phase(&json, "exact", c->exact.duration_s);
    json_array_end(&json);
    write_side(c, "sparse", &c->sparse[0], &json);
    write_side(c, "exact", &c->exact, &json);
    json_object_begin(&json, "compare");
    json_number(&json, "speed_ratio", side_rate(&c->sparse[0]) / side_rate(&c->exact));
    write_difference(&c->sparse[0], &json);
    json_object_end(&json);
    write_masses(c, &json);
    json_object_end(&json);
    putchar('\n');
}

static void print_comparison(const struct comparison *c)
{
    const struct side *sparse = &c->sparse[0], *sides[] = {sparse, &c->exact};

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
    printf("same tokens %llu of %llu; tokens/s %.1f, everything %.1f\n",
           (unsigned long long)sparse->n_equal, (unsigned long long)sparse->n_answer_ids,
           side_rate(sparse), side_rate(&c->exact));
    for (uint32_t i = 0; i < c->n_sparse; i++) {
        const struct side *side = &c->sparse[i];
        printf("P %.2f: share read %.1f %%, mass %.3f, KL %.4f nats, largest %.4f\n",
               (double)side->tally.mass_asked, 100 * tally_share_read(&side->tally),
               tally_mass_reached(&side->tally), side_kl_mean(side), side->kl_max);
    }
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
    c->n_sparse = options->n_masses ? options->n_masses : 1; /* masses[0] = 0: the default */
    c->stats = c->all = (winnow_stats)WINNOW_STATS;

    int rc = questions_load(c, options->questions);
    if (rc == 0)
        rc = lists_ask(&c->lists, engine->tokenizer, options->document, c->questions,
                       c->n_questions);
    for (uint32_t i = 0; rc == 0 && i < c->n_sparse; i++)
        rc = side_create(c, &c->sparse[i], options->masses[i]);
    if (rc == 0)
        rc = side_create(c, &c->exact, 1);
    if (rc == 0)
        rc = comparison_run(c);
    if (rc == 0 && options->json)
        write_comparison(c);
    else if (rc == 0)
        print_comparison(c);
    for (uint32_t i = 0; i < c->n_sparse; i++)
        side_destroy(c, &c->sparse[i]);
    side_destroy(c, &c->exact);
    lists_free(&c->lists);
    free(c->kept);
    free(c->file);
    free(c);
    return rc;
}
