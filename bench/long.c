// bench-long: a long context end to end, as an engine meets it: K and V of a stated model go to a
// running winnowd (WINNOW_ADDRESS or the usual sockets) by Append, then tokens are decoded at P through
// every layer, from every session at once. Shape: heads of Llama-3.1-8B (Hq 32, Hkv 8, d 128, bf16).
//
// The model. Each KV head of each layer has 1,024 topics: unit vectors u in a random subspace of 48
// dimensions, each with a value w of N(0, 1). A token belongs to the topic of its predecessor with
// probability 15/16 (text stays with its subject), else to any. key = 11 u + noise / 2, value = w +
// noise / 2. A query head asks 12 u + noise / 2 of the topic of an earlier token, another one with
// probability 1/8 a step: logits spread by 2 nats with a bump of 12 on the topic, so that 0.9 of the
// mass lies on a percent or two of the blocks, and what a step reads the next one mostly reads again
// (traces: 75-89 % are found in a cache of 5-10 %). Noise is a piece of a table of normals.
//
// Needles: at stated positions a token's key is 11 n, n a random unit vector, its value 4 m, m of +1
// and -1. Every eighth step one query head of each layer asks 24 n: 23 nats for one token of all. It
// is found when the output is m's direction.
//
// Sampled steps are asked again at P = 1, which appends nothing. The program fails when a needle is
// missed, an item fails, mass is short of P by more than 0.02 or an output is far from P = 1's.
#include <base/clock.h>
#include <base/rng.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <winnow/winnow.h>

enum {
    HQ = 32,
    HKV = 8,
    G = HQ / HKV,
    D = 128,
    N_TOPICS = 1024,
    SUBSPACE = 48,
    N_NOISE = 1 << 20,
    N_NEEDLES = 64,
    NEEDLE_EVERY = 8, /* steps */
    WINDOW = 4096,
    N_LAYERS_MAX = 80,
    N_SESSIONS_MAX = 64,
};

struct head { /* of a layer's KV heads */
    float key[N_TOPICS][D], value[N_TOPICS][D];
    uint32_t current, n_tokens[N_TOPICS], n_tokens_most;
};

struct engine {
    winnow_client *client;
    winnow_session *session[N_SESSIONS_MAX];
    uint32_t n_sessions, n_layers, n_steps, n_exact;
    uint64_t n_tokens;
    float mass;
    struct winnow_rng rng;
    float *noise;      /* [N_NOISE + D] */
    struct head *head; /* [n_layers][HKV] */
    uint64_t needle_at[N_NEEDLES];
    float needle[N_NEEDLES][D]; /* unit */
    float sign[N_NEEDLES][D];   /* +1, -1 */
    uint32_t topic[N_SESSIONS_MAX][N_LAYERS_MAX][HQ];
    uint16_t *k, *v; /* [WINDOW][HKV][D] */
    uint16_t q[N_SESSIONS_MAX][HQ][D], out[N_SESSIONS_MAX][HQ][D], exact[HQ][D];
};

/* Tokens [first, first + n) of a layer, made by a thread of their own. */
struct window {
    struct engine *engine;
    uint32_t layer, n;
    uint64_t first;
    uint16_t *k, *v;
};

struct figures {
    double *us; /* of each layer-step, host to host */
    uint32_t n_steps;
    uint64_t n_total, n_device, n_host, n_disk, read_bytes, micros, n_items, n_short;
    double mass_sum, mass_least, cosine_least, error_sum, error_most;
    uint32_t n_asked, n_found, n_compared;
};

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "bench-long: %s: %s\n", what, winnow_error_text());
    exit(1);
}

static void *array(size_t n, size_t item_bytes)
{
    void *memory = calloc(n, item_bytes);
    if (!memory)
        die("memory");
    return memory;
}

static double now_s(void)
{
    return (double)winnow_clock_now_ns() / 1e9;
}

static uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float bf16_to(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

// --- the model ----------------------------------------------------------------------------------

static void unit_make(float *x)
{
    double square = 0;
    for (int i = 0; i < D; i++)
        square += (double)x[i] * (double)x[i];
    for (int i = 0; i < D; i++)
        x[i] /= (float)sqrt(square);
}

static void normals_make(struct winnow_rng *rng, float *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] = (float)winnow_rng_normal(rng);
}

static void head_init(struct winnow_rng *rng, struct head *head)
{
    static float direction[SUBSPACE][D];
    normals_make(rng, direction[0], SUBSPACE * D);
    for (int j = 0; j < N_TOPICS; j++) {
        for (int s = 0; s < SUBSPACE; s++) {
            float weight = (float)winnow_rng_normal(rng);
            for (int i = 0; i < D; i++)
                head->key[j][i] += weight * direction[s][i];
        }
        unit_make(head->key[j]);
    }
    normals_make(rng, head->value[0], N_TOPICS * D);
}

static void model_init(struct engine *engine, uint64_t seed)
{
    winnow_rng_init(&engine->rng, seed);
    engine->noise = array(N_NOISE + D, sizeof(float));
    engine->head = array((size_t)engine->n_layers * HKV, sizeof *engine->head);
    engine->k = array((size_t)WINDOW * HKV * D, sizeof *engine->k);
    engine->v = array((size_t)WINDOW * HKV * D, sizeof *engine->v);
    normals_make(&engine->rng, engine->noise, N_NOISE + D);
    for (uint32_t i = 0; i < engine->n_layers * HKV; i++)
        head_init(&engine->rng, &engine->head[i]);
    for (uint32_t i = 0; i < N_NEEDLES; i++) {
        engine->needle_at[i] = (2 * i + 1) * engine->n_tokens / (2 * N_NEEDLES);
        normals_make(&engine->rng, engine->needle[i], D);
        unit_make(engine->needle[i]);
        for (int d = 0; d < D; d++)
            engine->sign[i][d] = winnow_rng_below(&engine->rng, 2) ? 1 : -1;
    }
}

/* scale x + a piece of noise / 2 */
static void row_make(struct engine *engine, float scale, const float *x, uint16_t *row)
{
    const float *noise = engine->noise + winnow_rng_below(&engine->rng, N_NOISE);
    for (int i = 0; i < D; i++)
        row[i] = bf16_of(scale * x[i] + 0.5F * noise[i]);
}

static uint32_t needle_find(const struct engine *engine, uint64_t position)
{
    uint32_t i = (uint32_t)(position * N_NEEDLES / engine->n_tokens);
    return i < N_NEEDLES && engine->needle_at[i] == position ? i : UINT32_MAX;
}

static void token_make(struct engine *engine, uint32_t layer, uint64_t position, uint16_t *k,
                       uint16_t *v)
{
    uint32_t needle = needle_find(engine, position);
    for (uint32_t h = 0; h < HKV; h++, k += D, v += D) {
        struct head *head = &engine->head[layer * HKV + h];
        if (position == 0 || winnow_rng_below(&engine->rng, 16) == 0)
            head->current = (uint32_t)winnow_rng_below(&engine->rng, N_TOPICS);
        uint32_t n = ++head->n_tokens[head->current];
        head->n_tokens_most = n > head->n_tokens_most ? n : head->n_tokens_most;
        row_make(engine, 11, needle < N_NEEDLES ? engine->needle[needle] : head->key[head->current],
                 k);
        row_make(engine, needle < N_NEEDLES ? 4 : 1,
                 needle < N_NEEDLES ? engine->sign[needle] : head->value[head->current], v);
    }
}

/* The topic of a random earlier token. */
static uint32_t topic_draw(struct engine *engine, const struct head *head)
{
    uint32_t topic;
    do
        topic = (uint32_t)winnow_rng_below(&engine->rng, N_TOPICS);
    while (winnow_rng_below(&engine->rng, head->n_tokens_most) >= head->n_tokens[topic]);
    return topic;
}

static void query_make(struct engine *engine, uint32_t session, uint32_t layer, uint32_t step,
                       uint16_t q[HQ][D])
{
    for (uint32_t h = 0; h < HQ; h++) {
        uint32_t *topic = &engine->topic[session][layer][h];
        const struct head *head = &engine->head[layer * HKV + h / G];
        if (step == 0 || winnow_rng_below(&engine->rng, 8) == 0)
            *topic = topic_draw(engine, head);
        row_make(engine, 12, head->key[*topic], q[h]);
    }
}

static double cosine(const uint16_t *out, const float *x)
{
    double dot = 0, oo = 0, xx = 0;
    for (int i = 0; i < D; i++) {
        double o = (double)bf16_to(out[i]), y = (double)x[i];
        dot += o * y;
        oo += o * o;
        xx += y * y;
    }
    return oo > 0 ? dot / sqrt(oo * xx) : 0;
}

// --- the context --------------------------------------------------------------------------------

static void context_open(struct engine *engine)
{
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    options.model = (winnow_model){.layers = engine->n_layers,
                                   .q_heads = HQ,
                                   .kv_heads = HKV,
                                   .k_width = D,
                                   .v_width = D,
                                   .softmax_scale = 0.0883883476F,
                                   .kv_dtype = WINNOW_DTYPE_BF16,
                                   .io_dtype = WINNOW_DTYPE_BF16};
    options.label = "long";
    options.mass = engine->mass;
    if (winnow_client_open(NULL, &engine->client) < 0 ||
        winnow_session_open(engine->client, &options, &engine->session[0], 0) < 0)
        die("open");
}

static void *window_make(void *arg)
{
    struct window *window = arg;
    for (uint32_t i = 0; i < window->n; i++)
        token_make(window->engine, window->layer, window->first + i,
                   window->k + (size_t)i * HKV * D, window->v + (size_t)i * HKV * D);
    return NULL;
}

/* The next of the windows, layer by layer; n 0: there is none. */
static void window_next(struct window *window, const struct window *before)
{
    const struct engine *engine = before->engine;
    uint16_t *k = window->k, *v = window->v;
    *window = *before;
    window->k = k;
    window->v = v;
    if (++window->layer == engine->n_layers) {
        window->layer = 0;
        window->first += before->n;
        uint64_t left = engine->n_tokens - window->first;
        window->n = left < WINDOW ? (uint32_t)left : WINDOW;
    }
}

static void context_fill(struct engine *engine)
{
    struct window window[2] = {{.engine = engine, .n = WINDOW, .k = engine->k, .v = engine->v}};
    uint32_t turn = 0;
    double begin_s = now_s(), calls_s = 0;
    if (engine->n_tokens < WINDOW)
        window[0].n = (uint32_t)engine->n_tokens;
    window[1].k = array((size_t)WINDOW * HKV * D, sizeof *window[1].k);
    window[1].v = array((size_t)WINDOW * HKV * D, sizeof *window[1].v);
    window_make(&window[0]);
    for (; window[turn].n; turn = !turn) {
        struct window *one = &window[turn], *next = &window[!turn];
        pthread_t maker;
        if (one->layer == 0 && one->first % (16 * WINDOW) == 0)
            fprintf(stderr, "%llu tokens after %.1f s\n", (unsigned long long)one->first,
                    now_s() - begin_s);
        window_next(next, one);
        if (pthread_create(&maker, NULL, window_make, next) != 0)
            die("thread");
        double call_s = now_s();
        if (winnow_append(engine->session[0], one->layer, one->first, one->n, one->k, one->v,
                          winnow_clock_now_ns() + 60 * WINNOW_NS_PER_S) < 0)
            die("append");
        calls_s += now_s() - call_s;
        pthread_join(maker, NULL);
    }
    double s = now_s() - begin_s,
           gib = (double)engine->n_tokens * engine->n_layers * HKV * D * 4 / (1 << 30);
    printf("appended and built %.2f GiB in %.2f s, %.2f of them in the calls: %.2f GiB/s\n", gib, s,
           calls_s, gib / calls_s);
    free(window[1].k);
    free(window[1].v);
    for (uint32_t i = 1; i < engine->n_sessions; i++)
        if (winnow_session_fork(engine->session[0], "fork", &engine->session[i], 0) < 0)
            die("fork");
    fflush(stdout);
}

// --- decode -------------------------------------------------------------------------------------

static void certificate_count(struct figures *figures, const winnow_certificate *c, float mass)
{
    figures->n_items++;
    figures->n_total += c->blocks_total;
    figures->n_device += c->blocks_device;
    figures->n_host += c->blocks_host;
    figures->n_disk += c->blocks_disk;
    figures->read_bytes += c->bytes_read;
    figures->micros += c->micros;
    figures->n_short += c->verdict == WINNOW_SHORT;
    figures->mass_sum += (double)c->mass_mean;
    figures->mass_least = fmin(figures->mass_least, (double)c->mass_reached);
    if (c->verdict == WINNOW_DEGRADED || c->mass_reached < mass - 0.02F) {
        fprintf(stderr, "bench-long: verdict %u, mass %.3f\n", c->verdict, (double)c->mass_reached);
        exit(1);
    }
}

/* The first session's step of the layer once more, with everything read. */
static void exact_compare(struct engine *engine, uint32_t layer, uint64_t held,
                          struct figures *figures)
{
    winnow_attend_item item = {.session = engine->session[0],
                               .position = held,
                               .mass = 1,
                               .q = engine->q[0],
                               .out = engine->exact};
    if (winnow_attend(engine->client, layer, &item, 1, winnow_clock_now_ns() + 60000000000) < 0 ||
        item.status < 0)
        die("everything");
    for (uint32_t h = 0; h < HQ; h++) {
        float exact[D];
        double square = 0, difference = 0;
        for (int i = 0; i < D; i++) {
            exact[i] = bf16_to(engine->exact[h][i]);
            double by = (double)bf16_to(engine->out[0][h][i]) - (double)exact[i];
            square += (double)exact[i] * (double)exact[i];
            difference += by * by;
        }
        double error = sqrt(difference / square);
        figures->cosine_least = fmin(figures->cosine_least, cosine(engine->out[0][h], exact));
        figures->error_most = fmax(figures->error_most, error);
        figures->error_sum += error;
        figures->n_compared++;
    }
}

static void layer_step(struct engine *engine, uint32_t step, uint32_t layer,
                       struct figures *figures)
{
    winnow_attend_item item[N_SESSIONS_MAX];
    uint64_t held = winnow_session_held(engine->session[0], layer);
    bool asks = step % NEEDLE_EVERY == NEEDLE_EVERY - 1;
    uint32_t needle = (uint32_t)winnow_rng_below(&engine->rng, N_NEEDLES);
    uint32_t asker = (uint32_t)winnow_rng_below(&engine->rng, HQ);
    for (uint32_t i = 0; i < engine->n_sessions; i++) {
        size_t row = (size_t)i * HKV * D;
        token_make(engine, layer, held, engine->k + row, engine->v + row);
        query_make(engine, i, layer, step, engine->q[i]);
        if (asks)
            row_make(engine, 24, engine->needle[needle], engine->q[i][asker]);
        item[i] = (winnow_attend_item){.session = engine->session[i],
                                       .position = held,
                                       .q = engine->q[i],
                                       .k = engine->k + row,
                                       .v = engine->v + row,
                                       .out = engine->out[i]};
    }
    int64_t begin_ns = winnow_clock_now_ns();
    if (winnow_attend(engine->client, layer, item, engine->n_sessions, 0) < 0)
        die("step");
    figures->us[figures->n_steps++] = (double)(winnow_clock_now_ns() - begin_ns) / 1e3;
    for (uint32_t i = 0; i < engine->n_sessions; i++) {
        if (item[i].status < 0)
            die("item");
        certificate_count(figures, &item[i].certificate, engine->mass);
        figures->n_asked += asks;
        figures->n_found += asks && cosine(engine->out[i][asker], engine->sign[needle]) > 0.9;
    }
    uint32_t n_steps_all = engine->n_steps * engine->n_layers;
    if (engine->n_exact &&
        (step * engine->n_layers + layer) * engine->n_exact % n_steps_all < engine->n_exact)
        exact_compare(engine, layer, held + 1, figures);
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void steps_print(const struct engine *engine, struct figures *figures)
{
    double n = (double)figures->n_items, s = 0;
    uint32_t n_steps = figures->n_steps;
    uint64_t n_read = figures->n_device + figures->n_host + figures->n_disk;
    for (uint32_t i = 0; i < n_steps; i++)
        s += figures->us[i] / 1e6;
    qsort(figures->us, n_steps, sizeof *figures->us, compare_double);
    printf("decoded %u tokens of %u sessions, P %.3g: %.1f tokens/s; a layer-step %.1f us (p50), "
           "%.1f (p99), %.1f (mean), %.1f of it in winnowd\n",
           engine->n_steps, engine->n_sessions, (double)engine->mass,
           (double)engine->n_steps * engine->n_sessions / s, figures->us[n_steps / 2],
           figures->us[n_steps * 99 / 100], 1e6 * s / n_steps, (double)figures->micros / n);
    printf("selected %.2f %% of the blocks: of a layer-step and session %.1f blocks, on the device "
           "%.1f (%.1f %%), host %.1f, disk %.1f (%.1f KiB)\n",
           100 * (double)n_read / (double)figures->n_total, (double)n_read / n,
           (double)figures->n_device / n, 100 * (double)figures->n_device / (double)n_read,
           (double)figures->n_host / n, (double)figures->n_disk / n,
           (double)figures->read_bytes / n / 1024);
    printf(
        "mass %.4f (mean), %.4f (least), short %llu of %llu; needles %u of %u; against P = 1, %u "
        "heads: error %.4f (mean), %.4f (most), cosine %.5f (least)\n",
        figures->mass_sum / n, figures->mass_least, (unsigned long long)figures->n_short,
        (unsigned long long)figures->n_items, figures->n_found, figures->n_asked,
        figures->n_compared, figures->error_sum / fmax(figures->n_compared, 1), figures->error_most,
        figures->cosine_least);
}

static void daemon_print(const struct engine *engine)
{
    winnow_stats stats = WINNOW_STATS;
    const double gib = 0x1p-30;
    if (winnow_stats_get(engine->client, NULL, &stats, 0) < 0)
        die("stats");
    printf("winnowd: RSS %.2f GiB, peak %.2f; KV %.2f GiB, host %.2f, disk %.2f; index %.2f; "
           "written %.2f, read by steps %.2f, by P = 1 and windows %.2f\n",
           (double)stats.rss_bytes * gib, (double)stats.rss_peak_bytes * gib,
           (double)stats.kv_bytes * gib, (double)stats.kv_host_bytes * gib,
           (double)stats.kv_disk_bytes * gib, (double)stats.index_bytes * gib,
           (double)stats.written_bytes * gib, (double)stats.read_bytes_attend * gib,
           (double)stats.read_bytes_exact * gib);
    printf("gpu: %llu steps in %llu launches, which found %.1f %% of %llu blocks in its cache, "
           "evicted "
           "%llu and had no slot for %llu\n",
           (unsigned long long)stats.device_steps, (unsigned long long)stats.device_launches,
           100 * (double)stats.device_hits /
               fmax((double)(stats.device_hits + stats.device_misses), 1),
           (unsigned long long)(stats.device_hits + stats.device_misses),
           (unsigned long long)stats.device_evictions, (unsigned long long)stats.device_unfit);
}

static void options_parse(int argc, char **argv, struct engine *engine, uint64_t *seed)
{
    for (int c; (c = getopt(argc, argv, "n:l:t:p:s:x:r:")) != -1;) {
        if (c == 'n')
            engine->n_tokens = strtoull(optarg, NULL, 0);
        else if (c == 'l')
            engine->n_layers = (uint32_t)strtoul(optarg, NULL, 0);
        else if (c == 't')
            engine->n_steps = (uint32_t)strtoul(optarg, NULL, 0);
        else if (c == 'p')
            engine->mass = strtof(optarg, NULL);
        else if (c == 's')
            engine->n_sessions = (uint32_t)strtoul(optarg, NULL, 0);
        else if (c == 'x')
            engine->n_exact = (uint32_t)strtoul(optarg, NULL, 0);
        else if (c == 'r')
            *seed = strtoull(optarg, NULL, 0);
        else
            exit(64);
    }
    if (optind < argc || engine->n_tokens < N_NEEDLES || !engine->n_steps || !engine->n_layers ||
        engine->n_layers > N_LAYERS_MAX || !engine->n_sessions ||
        engine->n_sessions > N_SESSIONS_MAX || !(engine->mass > 0 && engine->mass < 1)) {
        fprintf(stderr, "bench-long [-n tokens] [-l layers] [-t decoded] [-p mass] [-s sessions] "
                        "[-x steps compared with P = 1] [-r seed]\n");
        exit(64);
    }
}

int main(int argc, char **argv)
{
    static struct engine engine = {.n_sessions = 1,
                                   .n_layers = 8,
                                   .n_steps = 200,
                                   .n_exact = 8,
                                   .n_tokens = 512 << 10,
                                   .mass = 0.9F};
    uint64_t seed = 1;
    options_parse(argc, argv, &engine, &seed);
    printf("bench-long: %llu tokens x %u layers (Hq %d, Hkv %d, d %d, bf16), seed %llu\n",
           (unsigned long long)engine.n_tokens, engine.n_layers, HQ, HKV, D,
           (unsigned long long)seed);
    model_init(&engine, seed);
    context_open(&engine);
    context_fill(&engine);
    struct figures figures = {.us = array((size_t)engine.n_steps * engine.n_layers, sizeof(double)),
                              .mass_least = 1,
                              .cosine_least = 1};
    for (uint32_t step = 0; step < engine.n_steps; step++)
        for (uint32_t layer = 0; layer < engine.n_layers; layer++)
            layer_step(&engine, step, layer, &figures);
    steps_print(&engine, &figures);
    daemon_print(&engine);
    winnow_client_close(engine.client);
    free(figures.us);
    bool is_right = figures.n_found == figures.n_asked && figures.cosine_least > 0.9;
    printf("%s\n", is_right ? "ok" : "wrong: a needle is missed, or an output is far from P = 1's");
    return !is_right;
}
