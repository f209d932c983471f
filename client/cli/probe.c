// A few tokens through the daemon and back: an engine's calls, compared with plain attention. A
// build whose kernels are wrong on this processor is told by this, and by nothing else here.
#include <client/cli/cli.h>

#include <assert.h>
#include <base/assert.h>
#include <base/clock.h>
#include <errno.h>
#include <math.h>
#include <winnow/winnow.h>

enum { N_TOKENS = 32, WIDTH = 64, N_Q_HEADS = 2 };
#define PROBE_NS    (5 * WINNOW_NS_PER_S)
#define ERROR_LIMIT 2e-3 /* of fp16 at rest */

struct probe {
    float q[N_TOKENS][N_Q_HEADS][WIDTH], k[N_TOKENS][WIDTH], v[N_TOKENS][WIDTH];
    float out[N_TOKENS][N_Q_HEADS][WIDTH];
};

static_assert(WIDTH == 8 * 8, "softmax_scale, 1 / 8, is 1 / sqrt(WIDTH)");
static_assert(N_TOKENS % 16 == 0, "whole blocks, so that none but sealed ones are read");
static_assert(N_TOKENS > 16, "more than one block");
static_assert(N_Q_HEADS > 1, "query heads share a KV head");
static_assert(sizeof(struct probe) == sizeof(float) * N_TOKENS * WIDTH * (2 * N_Q_HEADS + 2),
              "tensors are contiguous");

static void pattern_fill(struct probe *probe)
{
    for (int t = 0; t < N_TOKENS; t++)
        for (int i = 0; i < WIDTH; i++) {
            probe->k[t][i] = (float)((t * 7 + i * 3) % 17 - 8) / 8;
            probe->v[t][i] = (float)((t * 5 + i) % 13 - 6) / 4;
            for (int h = 0; h < N_Q_HEADS; h++)
                probe->q[t][h][i] = (float)((t * 3 + h * 5 + i * 7) % 11 - 5) / 4;
        }
}

/* The largest error of a row, over the largest value there is. */
static double row_error(const struct probe *probe, int t, int h)
{
    winnow_assert(t >= 0 && t < N_TOKENS);
    winnow_assert(h >= 0 && h < N_Q_HEADS);
    double weight[N_TOKENS], sum = 0, error = 0;
    for (int s = 0; s <= t; s++) {
        double dot = 0;
        for (int i = 0; i < WIDTH; i++)
            dot += (double)probe->q[t][h][i] * (double)probe->k[s][i];
        weight[s] = exp(dot / sqrt(WIDTH));
        sum += weight[s];
    }
    winnow_assert(isfinite(sum));
    winnow_assert(sum > 0);
    for (int i = 0; i < WIDTH; i++) {
        double out = 0;
        for (int s = 0; s <= t; s++)
            out += weight[s] / sum * (double)probe->v[s][i];
        error = fmax(error, fabs(out - (double)probe->out[t][h][i]) / 1.5);
        if (isnan(probe->out[t][h][i]))
            return INFINITY;
    }
    winnow_assert(error >= 0);
    return error;
}

int cli_probe(const char *path, double *ret_error)
{
    winnow_assert(path);
    winnow_assert(ret_error);
    static struct probe probe;
    winnow_client_options client_options = WINNOW_CLIENT_OPTIONS;
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    winnow_client *client = NULL;
    winnow_session *session = NULL;
    client_options.address = path;
    options.label = "doctor";
    options.model = (winnow_model){.layers = 1,
                                   .q_heads = N_Q_HEADS,
                                   .kv_heads = 1,
                                   .k_width = WIDTH,
                                   .v_width = WIDTH,
                                   .softmax_scale = 1.0F / 8,
                                   .kv_dtype = WINNOW_DTYPE_FP16,
                                   .io_dtype = WINNOW_DTYPE_FP32};
    pattern_fill(&probe);
    int64_t deadline_ns = winnow_clock_now_ns() + PROBE_NS;
    int rc = winnow_client_open(&client_options, &client);
    if (!rc)
        rc = winnow_session_open(client, &options, &session, deadline_ns);
    winnow_assert((session != NULL) == (rc == 0));
    winnow_assert(client || !session);
    if (!rc)
        rc = winnow_attend_exact(session, 0, 0, N_TOKENS, probe.q, probe.k, probe.v, probe.out,
                                 NULL, NULL, deadline_ns);
    *ret_error = 0;
    for (int t = 0; !rc && t < N_TOKENS; t++)
        for (int h = 0; h < N_Q_HEADS; h++)
            *ret_error = fmax(*ret_error, row_error(&probe, t, h));
    if (session) {
        int closed = winnow_session_close(session);
        rc = rc ? rc : closed;
    }
    winnow_client_close(client);
    return rc ? rc : *ret_error > ERROR_LIMIT ? -EPROTO : 0;
}
