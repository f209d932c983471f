/* A small language model made of a seed, whose attention is Winnow's: the tokens that it writes are
 * those of plain attention, also when the daemon is killed under it again and again. */
#include <base/clock.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <system/daemon.h>
#include <system/engine.h>
#include <test.h>

enum {
    LAYERS = 2,
    Q_HEADS = 4,
    KV_HEADS = 2,
    WIDTH = 32,
    DIM = Q_HEADS * WIDTH,
    KV_DIM = KV_HEADS * WIDTH,
    N_VOCABULARY = 256,
    N_PROMPT = 700, /* more than a segment: some of it is sealed */
    N_MAX = 4096,
    N_KILLS = 20,
};

static const char *const small[] = {"--host-pool", "32MiB", "--disk-cap", "512MiB",
                                    "--threads",   "1",     NULL};

struct weights {
    float embedding[N_VOCABULARY][DIM];
    float q[LAYERS][DIM][DIM], k[LAYERS][KV_DIM][DIM], v[LAYERS][KV_DIM][DIM];
    float out[LAYERS][DIM][DIM];
};
static struct weights weights;

struct writer {
    struct daemon *daemon; /* NULL: attends by itself */
    winnow_client *client;
    winnow_session *session;
    uint32_t n_tokens, n_kills;
    uint8_t token[N_MAX];
    float k[LAYERS][N_MAX][KV_DIM], v[LAYERS][N_MAX][KV_DIM];
};

static void draw(uint64_t *state, float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) {
        *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        x[i] = scale * ((float)(*state >> 40) / (float)(1 << 23) - 1);
    }
}

static void weights_init(uint64_t seed)
{
    draw(&seed, weights.embedding[0], sizeof weights.embedding / sizeof(float), 1);
    draw(&seed, weights.q[0][0], sizeof weights.q / sizeof(float), 0.6F);
    draw(&seed, weights.k[0][0], sizeof weights.k / sizeof(float), 0.6F);
    draw(&seed, weights.v[0][0], sizeof weights.v / sizeof(float), 0.3F);
    draw(&seed, weights.out[0][0], sizeof weights.out / sizeof(float), 0.3F);
}

static void multiply(const float *matrix, uint32_t n_rows, const float *x, float *y)
{
    for (uint32_t i = 0; i < n_rows; i++) {
        y[i] = 0;
        for (uint32_t d = 0; d < DIM; d++)
            y[i] += matrix[i * DIM + d] * x[d];
    }
}

static void normalise(float *x)
{
    double square = 0;
    for (uint32_t d = 0; d < DIM; d++)
        square += (double)x[d] * (double)x[d];
    for (uint32_t d = 0; d < DIM; d++)
        x[d] = (float)((double)x[d] / sqrt(square / DIM));
}

/* Plain attention of one position over the tokens up to it. */
static void attend_plain(const struct writer *writer, uint32_t layer, uint32_t position,
                         const float *q, float *out)
{
    static double weight[N_MAX];
    for (uint32_t head = 0; head < Q_HEADS; head++) {
        uint32_t at = head / (Q_HEADS / KV_HEADS) * WIDTH;
        double largest = -INFINITY, sum = 0, o[WIDTH] = {0};
        for (uint32_t t = 0; t <= position; t++) {
            weight[t] = 0;
            for (uint32_t d = 0; d < WIDTH; d++)
                weight[t] +=
                    (double)q[head * WIDTH + d] * (double)writer->k[layer][t][at + d] / sqrt(WIDTH);
            largest = fmax(largest, weight[t]);
        }
        for (uint32_t t = 0; t <= position; t++) {
            double e = exp(weight[t] - largest);
            sum += e;
            for (uint32_t d = 0; d < WIDTH; d++)
                o[d] += e * (double)writer->v[layer][t][at + d];
        }
        for (uint32_t d = 0; d < WIDTH; d++)
            out[head * WIDTH + d] = (float)(o[d] / sum);
    }
}

/* Attention by Winnow, exactly, which takes k and v of the position with it. */
static int attend(struct writer *writer, uint32_t layer, uint32_t position, const float *q,
                  float *out)
{
    if (!writer->daemon) {
        attend_plain(writer, layer, position, q, out);
        return 0;
    }
    winnow_attend_item item = {.session = writer->session,
                               .position = position,
                               .mass = 1,
                               .q = q,
                               .k = writer->k[layer][position],
                               .v = writer->v[layer][position],
                               .out = out};
    int rc = winnow_attend(writer->client, layer, &item, 1, 0);
    return rc < 0 ? rc : item.status;
}

/* One position through the model; *ret_next the token that follows. */
static int step(struct writer *writer, uint8_t *ret_next)
{
    uint32_t position = writer->n_tokens;
    float x[DIM], q[DIM], out[DIM], added[DIM];
    CHECK(position < N_MAX);
    memcpy(x, weights.embedding[writer->token[position]], sizeof x);
    for (uint32_t d = 0; d < DIM; d++)
        x[d] += cosf((float)position / (1 + (float)d)); /* where it stands */
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        normalise(x);
        multiply(weights.q[layer][0], DIM, x, q);
        multiply(weights.k[layer][0], KV_DIM, x, writer->k[layer][position]);
        multiply(weights.v[layer][0], KV_DIM, x, writer->v[layer][position]);
        memset(out, 0xff, sizeof out);
        int rc = attend(writer, layer, position, q, out);
        if (rc < 0)
            return rc;
        multiply(weights.out[layer][0], DIM, out, added);
        for (uint32_t d = 0; d < DIM; d++)
            x[d] += added[d];
    }
    uint32_t best = 0;
    float best_logit = -INFINITY;
    for (uint32_t token = 0; token < N_VOCABULARY; token++) {
        float logit = 0;
        for (uint32_t d = 0; d < DIM; d++)
            logit += weights.embedding[token][d] * x[d];
        best = logit > best_logit ? token : best;
        best_logit = fmaxf(logit, best_logit);
    }
    *ret_next = (uint8_t)best;
    writer->n_tokens++;
    return 0;
}

/* A session that holds the tokens so far, sent from the engine's own copy of k and v. */
static void session_fill(struct writer *writer)
{
    enum { N_CHUNK = 256 };
    winnow_session_options options = WINNOW_SESSION_OPTIONS;
    options.model =
        engine_model(LAYERS, Q_HEADS, KV_HEADS, WIDTH, WIDTH, WINNOW_DTYPE_FP32, WINNOW_DTYPE_FP32);
    ENGINE_OK(winnow_session_open(writer->client, &options, &writer->session, 0));
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t t = 0; t < writer->n_tokens; t += N_CHUNK) {
            uint32_t n_left = writer->n_tokens - t;
            ENGINE_OK(winnow_append(writer->session, layer, t, n_left < N_CHUNK ? n_left : N_CHUNK,
                                    writer->k[layer][t], writer->v[layer][t], 0));
        }
}

static void *kill_daemon(void *arg)
{
    daemon_stop(arg, SIGKILL);
    return NULL;
}

/* Writes until the daemon that is being killed is missed, then goes on with the next one. */
static void killed_once(struct writer *writer)
{
    pthread_t killer;
    uint8_t next;
    int rc;
    CHECK_EQ(pthread_create(&killer, NULL, kill_daemon, writer->daemon), 0);
    while ((rc = step(writer, &next)) == 0)
        writer->token[writer->n_tokens] = next;
    CHECK_EQ(rc, -EHOSTDOWN);
    pthread_join(killer, NULL);
    daemon_start(writer->daemon);
    int64_t give_up_ns = winnow_clock_now_ns() + 10 * WINNOW_NS_PER_S;
    while ((rc = winnow_session_truncate(writer->session, 0, 0)) == -EHOSTDOWN)
        CHECK(winnow_clock_now_ns() < give_up_ns); /* the breaker, until it finds the next one */
    CHECK_EQ(rc, -ESTALE);
    CHECK_EQ(winnow_session_close(writer->session), -ESTALE);
    session_fill(writer);
    writer->n_kills++;
}

/* The prompt, then n_tokens in all, or until the daemon was killed n_kills times. */
static void write_text(struct writer *writer, uint32_t n_tokens, uint32_t n_kills, uint64_t seed)
{
    uint8_t next = 0;
    for (uint32_t i = 0; i < N_PROMPT; i++)
        writer->token[i] = (uint8_t)(seed >> i % 57);
    while (writer->n_tokens < n_tokens || writer->n_kills < n_kills) {
        CHECK_EQ(step(writer, &next), 0);
        if (writer->n_tokens >= N_PROMPT)
            writer->token[writer->n_tokens] = next;
        if (writer->n_tokens > N_PROMPT && writer->n_kills < n_kills &&
            (seed >> writer->n_tokens % 61) % 7 == 0)
            killed_once(writer);
    }
}

static void writer_open(struct writer *writer, struct daemon *daemon)
{
    winnow_client_options options = WINNOW_CLIENT_OPTIONS;
    options.address = daemon->socket;
    writer->daemon = daemon;
    ENGINE_OK(winnow_client_open(&options, &writer->client));
    session_fill(writer);
}

static void writer_close(struct writer *writer)
{
    winnow_session_close(writer->session);
    winnow_client_close(writer->client);
}

/* Three times the same text: by plain attention, through winnowd, and through winnowd killed twenty
 * times at random, in one engine process. */
static void test_tokens__plain_served_and_killed_are_the_same(void)
{
    static struct writer plain, served, killed;
    struct daemon daemon;
    uint64_t seed = test_seed() * UINT64_C(0x9e3779b97f4a7c15) | 1;
    weights_init(seed);
    daemon_init(&daemon, small);
    daemon_start(&daemon);
    writer_open(&killed, &daemon);
    write_text(&killed, N_PROMPT + 50, N_KILLS, seed);
    writer_close(&killed);
    writer_open(&served, &daemon);
    write_text(&served, killed.n_tokens, 0, seed);
    writer_close(&served);
    write_text(&plain, killed.n_tokens, 0, seed);

    uint32_t n_different = 0;
    for (uint32_t i = N_PROMPT; i < plain.n_tokens; i++)
        n_different += plain.token[i] != plain.token[N_PROMPT];
    CHECK(n_different > 10); /* a text that says something */
    CHECK(!memcmp(plain.token, served.token, plain.n_tokens));
    CHECK(!memcmp(plain.token, killed.token, plain.n_tokens));
    printf("%u tokens written, the daemon killed %u times\n", plain.n_tokens - N_PROMPT,
           killed.n_kills);
    TEST_ROW(F35, killed.n_kills);
    CHECK_EQ(daemon_stop(&daemon, SIGTERM), 0);
    daemon_remove(&daemon);
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_tokens__plain_served_and_killed_are_the_same);
    return TEST_END();
}
