// bench-rpc: what the way to winnowd costs, beside what it computes. Against a running daemon
// (WINNOW_ADDRESS or the usual sockets), idle otherwise; one session of a small context, so that a
// step's own work is a few microseconds (its certificate says how many).
//
//   step    winnow_attend of one layer and item, q + k + v + out as of an 8B model (16 KiB)
//   stats   a unary call: why decode steps do not use them
//   append  upload of 16 MiB of keys and values in 256 KiB chunks
//
// Medians over all calls of a run and the best of RUNS runs; p99 of the same run.
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <winnow/winnow.h>

enum { RUNS = 5, N_STEPS = 2000, N_STATS = 500, Q_HEADS = 32, KV_HEADS = 8, WIDTH = 128 };
enum { N_TOKENS = 2048 }; /* of an append: 8 KiB a token */

struct bench {
    winnow_client *client;
    winnow_session *session;
    uint16_t *tensor; /* zeros: bf16, enough for every call */
    uint64_t step_micros;
};

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "bench-rpc: %s: %s\n", what, winnow_error_text());
    exit(1);
}

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void step(struct bench *bench)
{
    static uint16_t out[Q_HEADS * WIDTH];
    winnow_attend_item item = {.session = bench->session,
                               .position = winnow_session_held(bench->session, 0),
                               .q = bench->tensor,
                               .k = bench->tensor,
                               .v = bench->tensor,
                               .out = out};
    if (winnow_attend(bench->client, 0, &item, 1, 0) < 0 || item.status < 0)
        die("step");
    bench->step_micros += item.certificate.micros;
    if (item.position >= 64 && winnow_session_truncate(bench->session, 0, 0) < 0)
        die("truncate");
}

static void stats(struct bench *bench)
{
    winnow_stats result = WINNOW_STATS;
    if (winnow_stats_get(bench->client, bench->session, &result, 0) < 0)
        die("stats");
}

static void append(struct bench *bench)
{
    if (winnow_append(bench->session, 0, 0, N_TOKENS, bench->tensor, bench->tensor, 0) < 0)
        die("append");
}

/* Calls `run` n times, RUNS times over; prints the best run's median and its p99. Between calls of
 * an upload the session is emptied, untimed. */
static double measure(struct bench *bench, const char *name, void (*run)(struct bench *bench),
                      int n_calls)
{
    double *took_us = calloc((size_t)n_calls, sizeof *took_us), best = 1e18, best_p99 = 0;
    if (!took_us)
        die("memory");
    for (int i = 0; i < RUNS; i++) {
        for (int j = 0; j < n_calls; j++) {
            if (run == append && winnow_session_truncate(bench->session, 0, 0) < 0)
                die("truncate");
            double begin_us = now_us();
            run(bench);
            took_us[j] = now_us() - begin_us;
        }
        qsort(took_us, (size_t)n_calls, sizeof *took_us, compare);
        if (took_us[n_calls / 2] < best) {
            best = took_us[n_calls / 2];
            best_p99 = took_us[n_calls * 99 / 100];
        }
    }
    printf("| %-6s | %9.1f | %9.1f |", name, best, best_p99);
    free(took_us);
    return best;
}

int main(void)
{
    struct bench bench = {0};
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    options.label = "bench-rpc";
    options.model = (winnow_model){.layers = 1,
                                   .q_heads = Q_HEADS,
                                   .kv_heads = KV_HEADS,
                                   .k_width = WIDTH,
                                   .v_width = WIDTH,
                                   .softmax_scale = 0.088F,
                                   .kv_dtype = WINNOW_DTYPE_BF16,
                                   .io_dtype = WINNOW_DTYPE_BF16};
    bench.tensor = calloc(N_TOKENS, KV_HEADS * WIDTH * 2);
    if (!bench.tensor || winnow_client_open(NULL, &bench.client) < 0 ||
        winnow_session_open(bench.client, &options, &bench.session, 0) < 0)
        die("open");
    puts("| call   | median us |    p99 us |\n| --- | --- | --- |");
    measure(&bench, "step", step, N_STEPS);
    printf(" of it %.1f us in the core\n", (double)bench.step_micros / (RUNS * N_STEPS));
    measure(&bench, "stats", stats, N_STATS);
    putchar('\n');
    double append_us = measure(&bench, "append", append, 5);
    printf(" %.2f GB/s\n", N_TOKENS * 2.0 * KV_HEADS * WIDTH * 2 / append_us / 1e3);
    winnow_session_close(bench.session);
    winnow_client_close(bench.client);
    free(bench.tensor);
    return 0;
}
