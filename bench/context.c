// bench-context: time of one decode step of one layer against the context's length, 1K to 256K
// tokens, sparse at the default P beside everything read, from a pool that holds all. The core is
// embedded: no RPC, no model.
//
// Synthetic keys: each KV head has 512 topics, unit vectors u_j in a random subspace of 16 dimensions,
// so that topics resemble each other more or less. A token at position t belongs to the topic of its
// predecessor with probability 15/16 (text stays with its subject), else to any. key = 8 u + noise / 2,
// value = noise; a query is 12 u_j + noise / 2 for the topic j of a random earlier token, one for each
// query head: logits spread by 3 nats with a bump of 12 on the topic itself, so that 0.9 of the mass
// lies on a few percent of the tokens, as in most heads of tests/golden.
// Shape: SmolLM2-135M's heads (Hq 9, Hkv 3, d 64, fp16), one layer.
#include <base/clock.h>
#include <base/rng.h>
#include <base/team.h>
#include <core/core.h>
#include <getopt.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { D = 64, HQ = 9, HKV = 3, N_TOPICS = 512, SUBSPACE = 16, WINDOW = 512, N_STEPS = 64 };

static int wake_fd;

static void notify(void *arg)
{
    (void)arg;
    uint64_t one = 1;
    if (write(wake_fd, &one, sizeof one) < 0)
        abort();
}

static void request_done(struct winnow_request *request)
{
    *(int *)request->user = 1;
}

/* Submits and steps the core until the request is done; ends the program on failure. */
static void request_run(struct winnow_core *core, struct winnow_request *request)
{
    int done = 0;
    request->user = &done;
    request->done = request_done;
    request->owner = 1;
    request->deadline_ns = WINNOW_NEVER_NS;
    if (winnow_core_submit(core, request) < 0)
        abort();
    while (!done) {
        int64_t wake_ns = winnow_core_step(core, winnow_clock_now_ns());
        int64_t wait_ms = (wake_ns - winnow_clock_now_ns()) / WINNOW_NS_PER_MS;
        struct pollfd wait = {.fd = wake_fd, .events = POLLIN};
        uint64_t n;
        if (!done && wait_ms > 0 && poll(&wait, 1, wait_ms > 1000 ? 1000 : (int)wait_ms) > 0 &&
            read(wake_fd, &n, sizeof n) < 0)
            abort();
    }
    if (request->status < 0) {
        fprintf(stderr, "bench-context: %s: %s\n", strerror(-request->status), request->text);
        exit(1);
    }
}

struct keys {
    struct winnow_rng rng;
    float topic[HKV][N_TOPICS][D];
    uint32_t current[HKV];
    uint32_t *seen; /* topic of each token, head 0 */
};

static void unit_make(float *x, int n)
{
    double square = 0;
    for (int i = 0; i < n; i++)
        square += (double)x[i] * (double)x[i];
    for (int i = 0; i < n; i++)
        x[i] /= (float)sqrt(square);
}

/* Topics are the same random mixtures of SUBSPACE directions that are nearly orthogonal. */
static void topics_make(struct keys *keys, int head)
{
    static float direction[SUBSPACE][D];
    for (int s = 0; s < SUBSPACE; s++) {
        for (int i = 0; i < D; i++)
            direction[s][i] = (float)winnow_rng_normal(&keys->rng);
        unit_make(direction[s], D);
    }
    for (int j = 0; j < N_TOPICS; j++) {
        float *topic = keys->topic[head][j];
        for (int s = 0; s < SUBSPACE; s++) {
            float weight = (float)winnow_rng_normal(&keys->rng);
            for (int i = 0; i < D; i++)
                topic[i] += weight * direction[s][i];
        }
        unit_make(topic, D);
    }
}

static void keys_init(struct keys *keys, uint64_t seed, uint32_t *seen)
{
    winnow_rng_init(&keys->rng, seed);
    keys->seen = seen;
    for (int head = 0; head < HKV; head++)
        topics_make(keys, head);
}

static void token_make(struct keys *keys, uint64_t t, float k[HKV][D], float v[HKV][D])
{
    for (int h = 0; h < HKV; h++) {
        if (t == 0 || winnow_rng_below(&keys->rng, 16) == 0)
            keys->current[h] = (uint32_t)winnow_rng_below(&keys->rng, N_TOPICS);
        for (int i = 0; i < D; i++) {
            k[h][i] = 8 * keys->topic[h][keys->current[h]][i] +
                      0.5f * (float)winnow_rng_normal(&keys->rng);
            v[h][i] = (float)winnow_rng_normal(&keys->rng);
        }
    }
    keys->seen[t] = keys->current[0];
}

static void query_make(struct keys *keys, uint64_t n_tokens, float q[HQ][D])
{
    for (int h = 0; h < HQ; h++) {
        uint32_t j = keys->seen[winnow_rng_below(&keys->rng, n_tokens)];
        for (int i = 0; i < D; i++)
            q[h][i] = 12 * keys->topic[h / (HQ / HKV)][j][i] +
                      0.5f * (float)winnow_rng_normal(&keys->rng);
    }
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct figures {
    double median_us, share;
    float mass_reached;
};

/* N_STEPS steps at `mass` on a fork, so that both sides see the same context. */
static struct figures steps_time(struct winnow_core *core, struct keys *keys, uint64_t session_id,
                                 uint64_t n_tokens, float mass)
{
    static float q[HQ][D], k[HKV][D], v[HKV][D], out[HQ][D];
    double us[N_STEPS], n_read = 0, n_total = 0;
    float mass_reached = 1;
    struct winnow_request fork = {.kind = WINNOW_REQUEST_FORK, .session_id = session_id};
    request_run(core, &fork);
    for (uint64_t i = 0; i < N_STEPS; i++) {
        token_make(keys, n_tokens + i, k, v);
        query_make(keys, n_tokens, q);
        struct winnow_request step = {.kind = WINNOW_REQUEST_ATTEND,
                                      .session_id = fork.fork.ret_session_id,
                                      .attend = {.flags = WINNOW_ITEM_HAS_KV,
                                                 .position = n_tokens + i,
                                                 .mass = mass,
                                                 .q = q,
                                                 .k = k,
                                                 .v = v,
                                                 .out = out}};
        step.epoch = fork.epoch;
        int64_t start_ns = winnow_clock_now_ns();
        request_run(core, &step);
        us[i] = (double)(winnow_clock_now_ns() - start_ns) / 1e3;
        const struct winnow_core_certificate *c = &step.attend.certificate;
        n_read += c->n_blocks_host + c->n_blocks_disk;
        n_total += c->n_blocks_total;
        mass_reached = fminf(mass_reached, c->mass_reached);
    }
    struct winnow_request close = {.kind = WINNOW_REQUEST_CLOSE,
                                   .session_id = fork.fork.ret_session_id};
    request_run(core, &close);
    qsort(us, N_STEPS, sizeof *us, compare_double);
    return (struct figures){us[N_STEPS / 2], n_total > 0 ? n_read / n_total : 0, mass_reached};
}

static struct winnow_core *core_make(uint64_t n_tokens_max, uint32_t n_threads, const char *kernels)
{
    struct winnow_team *team;
    struct winnow_core *core;
    char text[256];
    wake_fd = eventfd(0, EFD_NONBLOCK);
    struct winnow_team_options team_options = {
        .n_workers = n_threads - 1, .spin_us = 50, .notify = notify};
    uint64_t kv_bytes = n_tokens_max * HKV * 2 * D * 2;
    struct winnow_core_options options = {.host_pool_bytes =
                                              kv_bytes + kv_bytes / 4 + (UINT64_C(64) << 20),
                                          .index_memory_bytes = kv_bytes / 4 + (UINT64_C(16) << 20),
                                          .segment_tokens = 1024,
                                          .dense_below = 1024,
                                          .policy = WINNOW_POLICY_CODES,
                                          .mass = 0.9f,
                                          .n_sessions_max = 4,
                                          .n_steps_max = 4,
                                          .n_tokens_max = n_tokens_max + 4096,
                                          .kernels = winnow_kernels_find(kernels),
                                          .notify = notify,
                                          .seed = 1};
    if (!options.kernels || winnow_team_create(&team_options, &team) < 0)
        exit(1);
    options.team = team;
    if (winnow_core_create(&options, &core, text) < 0) {
        fprintf(stderr, "bench-context: %s\n", text);
        exit(1);
    }
    printf("kernels %s, %u threads, S 1024, P 0.9, median of %d steps, one layer\n",
           options.kernels->name, n_threads, N_STEPS);
    return core;
}

/* Appends synthetic tokens until the layer holds n_tokens. */
static void context_grow(struct winnow_core *core, struct keys *keys, uint64_t session_id,
                         uint64_t held, uint64_t n_tokens)
{
    static float k[WINDOW][HKV][D], v[WINDOW][HKV][D];
    while (held < n_tokens) {
        uint32_t n = n_tokens - held < WINDOW ? (uint32_t)(n_tokens - held) : WINDOW;
        for (uint32_t i = 0; i < n; i++)
            token_make(keys, held + i, k[i], v[i]);
        struct winnow_request append = {.kind = WINNOW_REQUEST_APPEND,
                                        .session_id = session_id,
                                        .epoch = 1, /* nothing was truncated */
                                        .append = {.n_tokens = n, .first = held, .k = k, .v = v}};
        request_run(core, &append);
        held += n;
    }
}

int main(int argc, char **argv)
{
    uint64_t n_tokens_max = 256 * 1024, seed = 1;
    uint32_t n_threads = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);
    const char *kernels = NULL;
    for (int c; (c = getopt(argc, argv, "n:t:k:s:")) != -1;) {
        if (c == 'n')
            n_tokens_max = strtoull(optarg, NULL, 0);
        else if (c == 't')
            n_threads = (uint32_t)strtoul(optarg, NULL, 0);
        else if (c == 'k')
            kernels = optarg;
        else if (c == 's')
            seed = strtoull(optarg, NULL, 0);
        else
            return fprintf(stderr,
                           "bench-context [-n tokens] [-t threads] [-k kernels] [-s seed]\n"),
                   64;
    }
    struct winnow_core *core = core_make(n_tokens_max, n_threads, kernels);
    struct winnow_request open = {.kind = WINNOW_REQUEST_OPEN,
                                  .open = {.shape = {.n_layers = 1,
                                                     .n_q_heads = HQ,
                                                     .n_kv_heads = HKV,
                                                     .k_width = D,
                                                     .v_width = D,
                                                     .softmax_scale = 0.125f,
                                                     .kv_dtype = WINNOW_FP16,
                                                     .io_dtype = WINNOW_FP32,
                                                     .block_layout = WINNOW_BLOCK_LAYOUT}}};
    request_run(core, &open);
    static struct keys keys;
    keys_init(&keys, seed, calloc(n_tokens_max + 4096, sizeof(uint32_t)));
    printf("%9s %12s %12s %7s %10s %13s\n", "tokens", "P 0.9 us", "P 1 us", "ratio", "share read",
           "least reached");
    uint64_t held = 0;
    for (uint64_t n = 1024; n <= n_tokens_max; n *= 2) {
        context_grow(core, &keys, open.open.ret_session_id, held, n);
        held = n;
        struct figures sparse = steps_time(core, &keys, open.open.ret_session_id, n, 0);
        struct figures exact = steps_time(core, &keys, open.open.ret_session_id, n, 1);
        printf("%9llu %12.1f %12.1f %7.2f %9.2f%% %13.3f\n", (unsigned long long)n,
               sparse.median_us, exact.median_us, exact.median_us / sparse.median_us,
               100 * sparse.share, (double)sparse.mass_reached);
        fflush(stdout);
    }
    return 0;
}
