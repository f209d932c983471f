// Winnow in one page: keep a context's keys and values in winnowd, ask what a query sees of them.
//
//   winnowd & hello          (or WINNOW_ADDRESS=/path/of/winnow.sock hello)
//
// 8,192 random tokens go in. Each query head then looks for one of them: a sparse step reads the
// blocks that matter, an exact step reads all, and the exact one is held against plain attention
// computed here.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <winnow/winnow.h>

enum { N_TOKENS = 8192, Q_HEADS = 4, KV_HEADS = 2, WIDTH = 64, GROUP = Q_HEADS / KV_HEADS };

static float k[N_TOKENS][KV_HEADS][WIDTH], v[N_TOKENS][KV_HEADS][WIDTH];

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "hello: %s: %s\n", what, winnow_error_text());
    exit(1);
}

/* Uniform with variance 1. */
static float draw(void)
{
    return ((float)rand() / (float)RAND_MAX - 0.5F) * sqrtf(12);
}

/* Softmax attention over all tokens, in double. */
static void attend_here(const float *q, uint32_t kv_head, double out[WIDTH])
{
    static double logit[N_TOKENS];
    double logit_max = -INFINITY, sum = 0;
    for (uint32_t t = 0; t < N_TOKENS; t++) {
        logit[t] = 0;
        for (uint32_t i = 0; i < WIDTH; i++)
            logit[t] += (double)q[i] * k[t][kv_head][i] / sqrt(WIDTH);
        logit_max = fmax(logit_max, logit[t]);
    }
    memset(out, 0, WIDTH * sizeof *out);
    for (uint32_t t = 0; t < N_TOKENS; t++) {
        double weight = exp(logit[t] - logit_max);
        sum += weight;
        for (uint32_t i = 0; i < WIDTH; i++)
            out[i] += weight * v[t][kv_head][i];
    }
    for (uint32_t i = 0; i < WIDTH; i++)
        out[i] /= sum;
}

/* One step of layer 0 that appends nothing. */
static void attend(winnow_client *client, winnow_attend_item *item, const char *name)
{
    static const char *const verdicts[] = {"-", "EXACT", "MET", "SHORT", "DEGRADED"};
    if (winnow_attend(client, 0, item, 1, 0) < 0 || item->status < 0)
        die(name);
    const winnow_certificate *c = &item->certificate;
    printf(
        "%s: %s, mass %.3f of %.3f asked (estimate), %u of %u blocks, %.2f MiB from disk, %u us\n",
        name, verdicts[c->verdict], c->mass_reached, c->mass_asked,
        c->blocks_device + c->blocks_host + c->blocks_disk, c->blocks_total,
        (double)c->bytes_read / (1 << 20), c->micros);
}

int main(void)
{
    float q[Q_HEADS][WIDTH], sparse[Q_HEADS][WIDTH], exact[Q_HEADS][WIDTH];
    for (size_t i = 0; i < sizeof k / sizeof(float); i++) {
        (&k[0][0][0])[i] = draw();
        (&v[0][0][0])[i] = draw();
    }
    for (uint32_t h = 0; h < Q_HEADS; h++) /* head h looks for token 1,000 (h + 1) */
        for (uint32_t i = 0; i < WIDTH; i++)
            q[h][i] = 2 * k[1000 * (h + 1)][h / GROUP][i];

    winnow_client *client;
    winnow_session *session;
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    options.label = "hello";
    options.model = (winnow_model){.layers = 1,
                                   .q_heads = Q_HEADS,
                                   .kv_heads = KV_HEADS,
                                   .k_width = WIDTH,
                                   .v_width = WIDTH,
                                   .softmax_scale = 1 / sqrtf(WIDTH),
                                   .kv_dtype = WINNOW_DTYPE_FP32,
                                   .io_dtype = WINNOW_DTYPE_FP32};
    if (winnow_client_open(NULL, &client) < 0)
        die("open");
    if (winnow_session_open(client, &options, &session, 0) < 0)
        die("session");
    if (winnow_append(session, 0, 0, N_TOKENS, k, v, 0) < 0)
        die("append");
    printf("%d tokens in layer 0\n", (int)winnow_session_held(session, 0));

    winnow_attend_item item = {
        .session = session, .position = N_TOKENS, .mass = 0.95F, .q = q, .out = sparse};
    attend(client, &item, "sparse");
    item.flags = WINNOW_ITEM_EXACT_ALL;
    item.out = exact;
    attend(client, &item, "exact");

    double error_sparse = 0, error_exact = 0;
    for (uint32_t h = 0; h < Q_HEADS; h++) {
        double dense[WIDTH];
        attend_here(q[h], h / GROUP, dense);
        for (uint32_t i = 0; i < WIDTH; i++) {
            error_sparse = fmax(error_sparse, fabs(sparse[h][i] - dense[i]));
            error_exact = fmax(error_exact, fabs(exact[h][i] - dense[i]));
        }
    }
    printf("largest difference to plain attention: sparse %.1e, exact %.1e\n", error_sparse,
           error_exact);
    winnow_session_close(session);
    winnow_client_close(client);
    if (error_exact > 1e-4) {
        fprintf(stderr, "hello: the exact step differs from plain attention\n");
        return 1;
    }
    return 0;
}
