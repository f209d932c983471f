/*
 * A test bed for the core: team, optional store, a loop that runs requests to their end, synthetic
 * keys, and a dense fp64 oracle that shares no code with the product.
 */
#pragma once

#include <base/clock.h>
#include <base/rng.h>
#include <base/team.h>
#include <core/core.h>
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <test.h>
#include <unistd.h>

struct bed {
    struct winnow_core *core;
    struct winnow_team *team;
    struct winnow_store *store;
    int wake_fd;
};

struct bed_options {
    uint64_t host_pool_bytes, index_memory_bytes;
    uint32_t segment_tokens, dense_below, n_threads;
    const char *kernels, *dir, *io_method; /* dir NULL: no store */
    uint64_t disk_cap_bytes;
};

static void bed_notify(void *arg)
{
    uint64_t one = 1;
    if (write(((struct bed *)arg)->wake_fd, &one, sizeof one) != sizeof one)
        abort();
}

static inline void bed_init(struct bed *bed, const struct bed_options *options)
{
    char text[256] = "";
    *bed = (struct bed){.wake_fd = eventfd(0, EFD_NONBLOCK)};
    struct winnow_team_options team = {.n_workers = options->n_threads ? options->n_threads - 1 : 0,
                                       .spin_us = 50,
                                       .notify = bed_notify,
                                       .notify_arg = bed};
    CHECK_EQ(winnow_team_create(&team, &bed->team), 0);
    struct winnow_core_options core = {
        .host_pool_bytes = options->host_pool_bytes ? options->host_pool_bytes : 64 << 20,
        .index_memory_bytes = options->index_memory_bytes ? options->index_memory_bytes : 64 << 20,
        .segment_tokens = options->segment_tokens ? options->segment_tokens : 256,
        .dense_below = options->dense_below,
        .policy = WINNOW_POLICY_CODES,
        .mass = 0.9f,
        .n_sessions_max = 64,
        .n_steps_max = 16,
        .n_tokens_max = 1 << 20,
        .kernels = winnow_kernels_find(options->kernels),
        .team = bed->team,
        .notify = bed_notify,
        .notify_arg = bed,
        .seed = test_seed()};
    CHECK(core.kernels);
    if (winnow_core_create(&core, &bed->core, text) < 0)
        test_fail(__FILE__, __LINE__, text);
    if (!options->dir)
        return;
    struct winnow_store_options store = {.dir = options->dir,
                                         .disk_cap_bytes = options->disk_cap_bytes,
                                         .io_method =
                                             options->io_method ? options->io_method : "auto",
                                         .n_requests_max = WINNOW_STORE_REQUESTS,
                                         .n_segments_max = 4096,
                                         .notify = bed_notify,
                                         .notify_arg = bed,
                                         .seed = test_seed()};
    winnow_core_arena(bed->core, &store.arena, &store.arena_bytes);
    if (winnow_store_open(&store, &bed->store, text) < 0)
        test_fail(__FILE__, __LINE__, text);
    CHECK_EQ(winnow_store_start(bed->store), 0);
    winnow_core_set_store(bed->core, bed->store);
}

static inline void bed_finish(struct bed *bed)
{
    struct winnow_request all = {.kind = WINNOW_REQUEST_STATS};
    (void)all;
    if (bed->store)
        CHECK_EQ(winnow_store_close(bed->store), 0);
    winnow_core_destroy(bed->core);
    winnow_team_destroy(bed->team);
    close(bed->wake_fd);
}

static void bed_done(struct winnow_request *request)
{
    *(int *)request->user = 1;
}

/* Steps until the flag is set; a request that takes over 60 s fails the test. */
static inline void bed_wait(struct bed *bed, const int *done)
{
    int64_t give_up_ns = winnow_clock_now_ns() + 60 * WINNOW_NS_PER_S;
    while (!*done) {
        int64_t now_ns = winnow_clock_now_ns(), wake_ns = winnow_core_step(bed->core, now_ns);
        int64_t wait_ms = wake_ns <= now_ns ? 0 : (wake_ns - now_ns) / WINNOW_NS_PER_MS + 1;
        struct pollfd wait = {.fd = bed->wake_fd, .events = POLLIN};
        uint64_t n;
        CHECK(winnow_clock_now_ns() < give_up_ns);
        if (!*done && wait_ms && poll(&wait, 1, wait_ms > 1000 ? 1000 : (int)wait_ms) > 0)
            CHECK_EQ(read(bed->wake_fd, &n, sizeof n), sizeof n);
    }
}

static inline int bed_run(struct bed *bed, struct winnow_request *request)
{
    int done = 0;
    request->user = &done;
    request->done = bed_done;
    request->owner = request->owner ? request->owner : 1;
    request->deadline_ns = request->deadline_ns ? request->deadline_ns : WINNOW_NEVER_NS;
    CHECK_EQ(winnow_core_submit(bed->core, request), 0);
    bed_wait(bed, &done);
    return request->status;
}

/* A context whose every K, V and Q is a function of (seed, layer, position): the oracle needs no
 * state of the core. io_dtype fp32. Keys gather around topics, so that blocks differ. */
struct bed_model {
    struct winnow_model_shape shape;
    uint64_t seed;
    float spread; /* of logits: how peaked attention is */
};

/* Mean 0, variance 1, near enough to normal: the sum of three uniform numbers. */
static inline double bed_noise(struct winnow_rng *rng)
{
    uint64_t x = winnow_rng_next(rng);
    return (double)((x & 0x1fffff) + (x >> 21 & 0x1fffff) + (x >> 42 & 0x1fffff)) * 0x1p-20 - 3;
}

static inline void bed_rows(const struct bed_model *model, uint64_t what, uint32_t layer,
                            uint64_t position, uint32_t n_heads, uint32_t width, float *row)
{
    struct winnow_rng rng, topic;
    winnow_rng_init(&rng,
                    model->seed ^ (what * 1000003 + layer) * 0x9e3779b97f4a7c15u ^ position << 20);
    for (uint32_t head = 0; head < n_heads; head++) {
        uint32_t group = model->shape.n_q_heads / model->shape.n_kv_heads;
        uint64_t kv_head = what == 2 ? head / group : head;
        uint64_t subject = what == 2 ? winnow_rng_below(&rng, 8) : position / 24 % 8;
        winnow_rng_init(&topic,
                        model->seed ^ (subject * 64 + kv_head + 1) * 0xd1342543de82ef95u ^ layer);
        for (uint32_t i = 0; i < width; i++) {
            double noise = bed_noise(&rng);
            double t = what == 1 ? 0 : bed_noise(&topic);
            row[head * width + i] = (float)(model->spread * 0.6 * t + 0.8 * noise);
        }
    }
}

enum { BED_K = 0, BED_V = 1, BED_Q = 2 };

/* The value that kv_dtype keeps of x: rounding is the product's business, but not the oracle's. */
static inline double bed_at_rest(const struct bed_model *model, float x)
{
    if (model->shape.kv_dtype == WINNOW_FP16)
        return (double)(float)(_Float16)x;
    if (model->shape.kv_dtype == WINNOW_BF16) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        memcpy(&x, &bits, 4);
    }
    return (double)x;
}

static inline uint64_t bed_open(struct bed *bed, const struct bed_model *model,
                                const struct winnow_session_options *options)
{
    struct winnow_request open = {.kind = WINNOW_REQUEST_OPEN,
                                  .open = {.shape = model->shape, .options = *options}};
    if (bed_run(bed, &open) < 0)
        test_fail(__FILE__, __LINE__, open.text);
    return open.open.ret_session_id;
}

/* A window of every layer; out [n][Hq][v_width] of the last layer when wanted. Returns status. */
static inline int bed_window(struct bed *bed, const struct bed_model *model, uint64_t session_id,
                             uint32_t epoch, uint64_t first, uint32_t n, float *out)
{
    const struct winnow_model_shape *s = &model->shape;
    size_t n_q = (size_t)s->n_q_heads * s->k_width, n_k = (size_t)s->n_kv_heads * s->k_width;
    size_t n_v = (size_t)s->n_kv_heads * s->v_width, n_o = (size_t)s->n_q_heads * s->v_width;
    float *q = malloc(n * n_q * 4), *k = malloc(n * n_k * 4), *v = malloc(n * n_v * 4);
    float *o = malloc(n * n_o * 4);
    int rc = 0;
    for (uint32_t layer = 0; rc == 0 && layer < s->n_layers; layer++) {
        for (uint32_t i = 0; i < n; i++) {
            bed_rows(model, BED_Q, layer, first + i, s->n_q_heads, s->k_width, q + i * n_q);
            bed_rows(model, BED_K, layer, first + i, s->n_kv_heads, s->k_width, k + i * n_k);
            bed_rows(model, BED_V, layer, first + i, s->n_kv_heads, s->v_width, v + i * n_v);
        }
        struct winnow_request window = {
            .kind = WINNOW_REQUEST_EXACT,
            .session_id = session_id,
            .epoch = epoch,
            .exact = {
                .layer = layer, .n_tokens = n, .first = first, .q = q, .k = k, .v = v, .out = o}};
        rc = bed_run(bed, &window);
        if (rc < 0)
            fprintf(stderr, "window: %s\n", window.text);
    }
    if (out)
        memcpy(out, o, n * n_o * 4);
    free(q), free(k), free(v), free(o);
    return rc;
}

/* A window without queries, every layer. Returns status. */
static inline int bed_append(struct bed *bed, const struct bed_model *model, uint64_t session_id,
                             uint32_t epoch, uint64_t first, uint32_t n)
{
    const struct winnow_model_shape *s = &model->shape;
    size_t n_k = (size_t)s->n_kv_heads * s->k_width, n_v = (size_t)s->n_kv_heads * s->v_width;
    float *k = malloc(n * n_k * 4), *v = malloc(n * n_v * 4);
    int rc = 0;
    for (uint32_t layer = 0; rc == 0 && layer < s->n_layers; layer++) {
        for (uint32_t i = 0; i < n; i++) {
            bed_rows(model, BED_K, layer, first + i, s->n_kv_heads, s->k_width, k + i * n_k);
            bed_rows(model, BED_V, layer, first + i, s->n_kv_heads, s->v_width, v + i * n_v);
        }
        struct winnow_request append = {
            .kind = WINNOW_REQUEST_APPEND,
            .session_id = session_id,
            .epoch = epoch,
            .append = {.layer = layer, .n_tokens = n, .first = first, .k = k, .v = v}};
        rc = bed_run(bed, &append);
    }
    free(k), free(v);
    return rc;
}

/* A decode step of one layer. */
static inline int bed_step(struct bed *bed, const struct bed_model *model, uint64_t session_id,
                           uint32_t epoch, uint32_t layer, uint64_t position, float mass,
                           float *out, struct winnow_request *ret_request)
{
    const struct winnow_model_shape *s = &model->shape;
    static float q[128 * 256], k[128 * 256], v[128 * 256];
    bed_rows(model, BED_Q, layer, position, s->n_q_heads, s->k_width, q);
    bed_rows(model, BED_K, layer, position, s->n_kv_heads, s->k_width, k);
    bed_rows(model, BED_V, layer, position, s->n_kv_heads, s->v_width, v);
    struct winnow_request step = {.kind = WINNOW_REQUEST_ATTEND,
                                  .session_id = session_id,
                                  .epoch = epoch,
                                  .attend = {.layer = layer,
                                             .flags = WINNOW_ITEM_HAS_KV,
                                             .position = position,
                                             .mass = mass,
                                             .q = q,
                                             .k = k,
                                             .v = v,
                                             .out = out}};
    int rc = bed_run(bed, &step);
    if (ret_request)
        *ret_request = step;
    return rc;
}

/* Largest relative error, over query heads, of out against dense fp64 attention of the query at
 * `position` over tokens 0 .. position. */
static inline double bed_error(const struct bed_model *model, uint32_t layer, uint64_t position,
                               const float *out)
{
    const struct winnow_model_shape *s = &model->shape;
    uint32_t G = s->n_q_heads / s->n_kv_heads, n = (uint32_t)position + 1;
    static float q[128 * 256], row[128 * 256];
    double *logit = malloc((size_t)n * s->n_q_heads * sizeof *logit), worst = 0;
    double *dense = calloc((size_t)s->n_q_heads * s->v_width, sizeof *dense);
    double *largest = malloc(s->n_q_heads * sizeof *largest),
           *sum = calloc(s->n_q_heads, sizeof *sum);
    bed_rows(model, BED_Q, layer, position, s->n_q_heads, s->k_width, q);
    for (uint32_t h = 0; h < s->n_q_heads; h++)
        largest[h] = -INFINITY;
    for (uint32_t t = 0; t < n; t++) {
        bed_rows(model, BED_K, layer, t, s->n_kv_heads, s->k_width, row);
        for (uint32_t h = 0; h < s->n_q_heads; h++) {
            double dot = 0;
            for (uint32_t i = 0; i < s->k_width; i++)
                dot +=
                    (double)q[h * s->k_width + i] * bed_at_rest(model, row[h / G * s->k_width + i]);
            logit[(size_t)t * s->n_q_heads + h] = dot * (double)s->softmax_scale;
            largest[h] = fmax(largest[h], dot * (double)s->softmax_scale);
        }
    }
    for (uint32_t t = 0; t < n; t++) {
        bed_rows(model, BED_V, layer, t, s->n_kv_heads, s->v_width, row);
        for (uint32_t h = 0; h < s->n_q_heads; h++) {
            double p = exp(logit[(size_t)t * s->n_q_heads + h] - largest[h]);
            sum[h] += p;
            for (uint32_t i = 0; i < s->v_width; i++)
                dense[h * s->v_width + i] += p * bed_at_rest(model, row[h / G * s->v_width + i]);
        }
    }
    for (uint32_t h = 0; h < s->n_q_heads; h++) {
        double d2 = 0, n2 = 0;
        for (uint32_t i = 0; i < s->v_width; i++) {
            double one = dense[h * s->v_width + i] / sum[h],
                   d = (double)out[h * s->v_width + i] - one;
            d2 += d * d;
            n2 += one * one;
        }
        worst = fmax(worst, sqrt(d2 / n2));
    }
    free(logit), free(dense), free(largest), free(sum);
    return worst;
}
