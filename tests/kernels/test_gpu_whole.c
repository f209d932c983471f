/*
 * Whole items, mass 1, through the GPU's contract: everything attended, against attention in fp64
 * within 4 eps of the storage type times sum p|v| (out) and 1e-4 + 1e-6 of the largest logit (lse),
 * and against themselves to the bit, whatever the cache holds; of which they take what is empty.
 */
#include "gpu_item.h"

static struct scene scene;

static uint32_t n_sealed_of(uint32_t session)
{
    return scene.of.n_segments[session] * scene.span * scene.of.shape.n_kv_heads;
}

static void certificate_check(const struct scene_item *item)
{
    const struct winnow_gpu_certificate *c = &item->certificate;

    CHECK_EQ(c->status, 0);
    CHECK_EQ(c->n_rounds, 1);
    CHECK(c->mass_reached == 1 && c->mass_mean == 1);
    CHECK_EQ(c->n_blocks_device + c->n_blocks_host, n_sealed_of(item->item.session));
    CHECK(c->n_blocks_unfit <= c->n_blocks_host);
    CHECK_EQ(c->n_blocks_disk, 0);
    CHECK_EQ(c->n_heads_spent, 0);
}

/* One query head over n tokens, in fp64: ref's own sum of a million terms is 2e-4 off. */
struct exact {
    double out[WINNOW_WIDTH_MAX], weight[WINNOW_WIDTH_MAX]; /* sum p v, sum p |v| */
    double lse, largest;                                    /* of |logit| */
};

static void exact_init(struct exact *exact, const struct scene_head *head, const float *q,
                       uint64_t n)
{
    uint32_t k_width = scene.of.shape.k_width, v_width = scene.of.shape.v_width;
    double *s = case_alloc(n * sizeof *s), highest = -INFINITY, sum = 0;

    *exact = (struct exact){0};
    for (uint64_t t = 0; t < n; t++) {
        s[t] = 0;
        for (uint32_t d = 0; d < k_width; d++)
            s[t] += (double)q[d] * (double)head->data.k[t * k_width + d];
        s[t] *= (double)scene.head_shape.softmax_scale;
        exact->largest = fmax(exact->largest, fabs(s[t]));
        highest = fmax(highest, s[t]);
    }
    for (uint64_t t = 0; t < n; t++) {
        double p = exp(s[t] - highest);
        sum += p;
        for (uint32_t d = 0; d < v_width; d++) {
            exact->out[d] += p * (double)head->data.v[t * v_width + d];
            exact->weight[d] += p * fabs((double)head->data.v[t * v_width + d]);
        }
    }
    for (uint32_t d = 0; d < v_width; d++) {
        exact->out[d] /= sum;
        exact->weight[d] /= sum;
    }
    exact->lse = highest + log(sum);
    winnow_alloc_free(s);
}

/* Of all that was checked, the largest error over its tolerance. */
static double out_error, lse_error;

static void error_take(double *largest, double a, double b, double tolerance, const char *what)
{
    double error = a == b ? 0 : fabs(a - b) / tolerance;

    if (!(error <= 1))
        fprintf(stderr, "%s, width %u, %u, G %u: %s is %.9g, exact is %.9g (+-%.3g)\n",
                scene.of.trace ? "trace" : kernel_input_name[scene.of.input],
                scene.of.shape.k_width, scene.of.shape.v_width, scene.n_group, what, a, b,
                tolerance);
    CHECK(error <= 1);
    *largest = fmax(*largest, error);
}

static void item_check(const struct scene_item *item, uint32_t query)
{
    const struct winnow_model_shape *shape = &scene.of.shape;
    uint32_t session = item->item.session, v_width = shape->v_width, G = scene.n_group;
    uint64_t n = scene_n_tokens(&scene, session);
    double eps = shape->kv_dtype == WINNOW_BF16 ? 0x1p-8 : 0x1p-11;
    double io_eps = shape->io_dtype == WINNOW_FP32   ? 0
                    : shape->io_dtype == WINNOW_FP16 ? 0x1p-11
                                                     : 0x1p-8;
    struct exact exact;

    certificate_check(item);
    for (uint32_t i = 0; i < shape->n_q_heads; i++) {
        const struct scene_head *head = scene_head(&scene, session, item->item.layer, i / G);
        exact_init(&exact, head, head->data.q + ((size_t)query * G + i % G) * shape->k_width, n);
        error_take(&lse_error, (double)item->lse[i], exact.lse, 1e-4 + 1e-6 * exact.largest, "lse");
        for (uint32_t d = 0; d < v_width; d++)
            error_take(&out_error, (double)item->wide[i * v_width + d], exact.out[d],
                       4 * eps * exact.weight[d] + io_eps * fabs(exact.out[d]) + 0x1p-24, "out");
    }
}

/* Every session at once, each layer, from a cold cache and from one that sparse steps have filled. */
static void scene_check(struct winnow_gpu *gpu)
{
    struct scene_item items[SCENE_SESSIONS_MAX];

    for (uint32_t layer = 0; layer < scene.of.shape.n_layers; layer++)
        for (uint32_t query = 0; query < 2; query++) {
            for (uint32_t i = 0; i <= query; i++) {
                for (uint32_t s = 0; s < scene.of.n_sessions; s++)
                    scene_item_init(&scene, &items[s], s, layer, query, i < query ? 0.8f : 1);
                scene_decode(&scene, gpu, scene.of.n_sessions, items);
                for (uint32_t s = 0; s < scene.of.n_sessions; s++) {
                    if (i == query)
                        item_check(&items[s], query);
                    scene_item_finish(&scene, &items[s]);
                }
            }
        }
}

/* Every width, ratio and type, for contexts of 16 tokens and more: without a segment, with a few, and
 * with a tail that ends anywhere. */
static void test_gpu_whole__is_exact(void)
{
    static const enum kernel_input other[] = {INPUT_EQUAL, INPUT_STEPS, INPUT_TINY};

    out_error = lse_error = 0;
    for (uint32_t i = 0; i < SCENE_N_SHAPES; i++)
        for (int is_random = 0; is_random < 2; is_random++) {
            struct scene_options options = {
                .shape = scene_shapes[i],
                .segment_tokens = 128,
                .n_sinks = i % 2 ? 16 : 64,
                .n_sessions = 5,
                .n_segments = {0, 1, 4, 19, 0},
                .n_tail = {i % 2 ? 0 : 1, 40, 128, 639, 300},
                .input = is_random ? INPUT_RANDOM : other[(test_seed() + i) % 3],
                .seed = test_seed() + 100 * i,
            };
            if (scene_is_small() && (!is_random || i > 2))
                continue;
            scene_open(&scene, &options);
            struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 512});
            scene_check(gpu);
            api->destroy(gpu);
            scene_close(&scene);
        }
    printf("   largest error over its tolerance: out %.3f, lse %.3f\n", out_error, lse_error);
}

/* Real keys, values and queries. */
static void test_gpu_whole__traces_are_exact(void)
{
    static struct scene_traces traces;

    out_error = lse_error = 0;
    scene_open_traces(&scene, &traces);
    struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 96});
    scene_check(gpu);
    api->destroy(gpu);
    scene_close_traces(&scene, &traces);
    printf("   largest error over its tolerance: out %.3f, lse %.3f\n", out_error, lse_error);
}

/* 256 sessions of different lengths in one launch; and one of 1,048,576 tokens. */
static void test_gpu_whole__256_sessions_a_million_tokens(void)
{
    for (uint32_t i = 0; i < 2; i++) {
        struct scene_options options = i == 0 ? scene_options_many() : scene_options_million();
        out_error = lse_error = 0;
        scene_open(&scene, &options);
        struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 4096});
        static struct scene_item items[SCENE_SESSIONS_MAX];
        for (uint32_t s = 0; s < options.n_sessions; s++)
            scene_item_init(&scene, &items[s], s, 0, s % SCENE_QUERIES, 1);
        scene_decode(&scene, gpu, options.n_sessions, items);
        for (uint32_t s = 0; s < options.n_sessions; s++) {
            item_check(&items[s], s % SCENE_QUERIES);
            scene_item_finish(&scene, &items[s]);
        }
        api->destroy(gpu);
        scene_close(&scene);
        printf("   largest error over its tolerance: out %.3f, lse %.3f\n", out_error, lse_error);
    }
}

static const struct scene_options crowd = {
    .shape = SCENE_SHAPE(2, 8, 2, 128, 64, WINNOW_BF16, WINNOW_FP16),
    .segment_tokens = 128,
    .n_sinks = 16,
    .n_sessions = 16,
    .n_segments = {9, 0, 1, 2, 3, 4, 5, 6, 30, 1, 2, 3, 0, 5, 6, 7},
    .n_tail = {5, 16, 100, 1, 7, 9, 33, 80, 640, 3, 17, 18, 19, 20, 21, 22},
    .seed = 17,
};

/* Same bits from a cache of any size and content, alone or in a batch, with any number of fetching
 * thread blocks, in any run; and the counters of the cache stand still. */
static void test_gpu_whole__same_bits(void)
{
    static const struct scene_gpu_options of_gpu[] = {
        {.n_slots = 4096, .n_fetchers = 32}, {.n_slots = 0}, {.n_slots = 64, .n_fetchers = 2}};
    static struct scene_item first[SCENE_SESSIONS_MAX], items[SCENE_SESSIONS_MAX];
    struct scene_options options = crowd;
    uint32_t n = scene_is_small() ? 4 : options.n_sessions;
    struct winnow_gpu_counters before, after;

    options.n_sessions = n;
    scene_open(&scene, &options);
    for (size_t i = 0; i < sizeof of_gpu / sizeof of_gpu[0]; i++) {
        struct winnow_gpu *gpu = scene_put(&scene, &of_gpu[i]);
        for (uint32_t run = 0; run < (scene_is_small() ? 3 : 12); run++) {
            uint32_t step = run % 3 == 0 ? n : run % 3 == 1 ? 3 : 1, n_device = 0;
            struct scene_item *now = i == 0 && run == 0 ? first : items;
            for (uint32_t s = 0; s < n; s++) /* run 0 finds an empty cache */
                scene_item_init(&scene, &items[s], s, 1, run % 4, 0.9f);
            if (run > 0)
                scene_decode(&scene, gpu, n, items);
            for (uint32_t s = 0; s < n; s++)
                scene_item_finish(&scene, &items[s]);
            for (uint32_t s = 0; s < n; s++)
                scene_item_init(&scene, &now[s], s, 1, 0, 1);
            CHECK_EQ(api->counters(gpu, 1, &before), 0);
            for (uint32_t s = 0; s < n; s += step)
                scene_decode(&scene, gpu, n - s < step ? n - s : step, now + s);
            CHECK_EQ(api->counters(gpu, 1, &after), 0);
            CHECK(!memcmp(&before, &after, sizeof before));
            for (uint32_t s = 0; s < n; s++) {
                certificate_check(&now[s]);
                n_device += now[s].certificate.n_blocks_device;
                if (now == first)
                    continue;
                scene_same(&scene, &first[s], &items[s]);
                scene_item_finish(&scene, &items[s]);
            }
            CHECK_EQ(n_device > 0, run > 0 && of_gpu[i].n_slots > 0);
        }
        api->destroy(gpu);
    }
    for (uint32_t s = 0; s < n; s++)
        scene_item_finish(&scene, &first[s]);
    scene_close(&scene);
}

/* Sparse steps find all that they would find without whole reads between them, in a cache that those
 * would fill twice over; and whole reads find what an earlier one put into empty slots. */
static void test_gpu_whole__evicts_nothing(void)
{
    struct scene_options options = crowd;
    static struct scene_item item, whole;
    uint32_t n_host[2][4];

    options.n_sessions = 1;
    options.n_segments[0] = 30;
    scene_open(&scene, &options);
    for (int with_whole = 0; with_whole < 2; with_whole++) {
        struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 512});
        for (uint32_t i = 0; i < 4; i++) {
            scene_item_init(&scene, &item, 0, 0, i % 3, 0.99f);
            item.item.n_blocks_max = 16; /* of 240; 256 slots hold the steps' 96 at most */
            scene_decode(&scene, gpu, 1, &item);
            n_host[with_whole][i] = item.certificate.n_blocks_host;
            CHECK(n_host[with_whole][i] <= n_host[0][i]);
            scene_item_finish(&scene, &item);
            if (!with_whole)
                continue;
            scene_item_init(&scene, &whole, 0, 0, i, 1);
            scene_decode(&scene, gpu, 1, &whole);
            certificate_check(&whole);
            /* more than all sparse steps put there: which tries for a slot fail is chance */
            CHECK(whole.certificate.n_blocks_device >= (i == 0 ? 32 : 97));
            scene_item_finish(&scene, &whole);
        }
        api->destroy(gpu);
    }
    CHECK(n_host[0][0] == 32 && n_host[0][1] > 0 && n_host[0][3] == 0);
    scene_close(&scene);
}

/* Whom the next step drives out is decided by sparse steps alone: session 1, used before session 0,
 * though a whole read of 1 came last. A window of eight slots is all the cache. */
static void test_gpu_whole__renews_no_stamp(void)
{
    static const struct {
        uint32_t session, budget, n_host; /* budget 0: whole */
    } steps[] = {{0, 3, 3}, {1, 3, 3}, {0, 3, 0}, {0, 0, 69}, {1, 0, 69}, {2, 4, 4}, {0, 3, 0}};
    struct scene_options options = {
        .shape = SCENE_SHAPE(1, 2, 1, 64, 64, WINNOW_FP16, WINNOW_FP32),
        .segment_tokens = 128,
        .n_sinks = 16,
        .n_sessions = 3,
        .n_segments = {9, 9, 9},
        .n_tail = {20, 30, 40},
        .seed = test_seed(),
    };
    static struct scene_item item;

    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 8});
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        scene_item_init(&scene, &item, steps[i].session, 0, 0, steps[i].budget ? 0.9999f : 1);
        item.item.n_blocks_max = steps[i].budget;
        scene_decode(&scene, gpu, 1, &item);
        CHECK_EQ(item.certificate.status, 0);
        CHECK_EQ(item.certificate.n_blocks_host, steps[i].n_host);
        scene_item_finish(&scene, &item);
    }
    api->destroy(gpu);
    scene_close(&scene);
}

/* What is on disk is left out, the certificate is 0, and all that is in no slot is named; with homes
 * set the bits are those of a gpu that had all. */
static void test_gpu_whole__disk_blocks_are_named(void)
{
    struct scene_options options = crowd;
    struct winnow_gpu_home homes[9 * 8 * 2]; /* segments, blocks, heads */
    static struct scene_item all, item;
    uint32_t n_disk = 0;

    options.n_sessions = 1;
    scene_open(&scene, &options);
    struct winnow_gpu *a = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 64});
    struct winnow_gpu *b =
        scene_put(&scene, &(struct scene_gpu_options){.n_slots = 64, .disk_every = 5});
    scene_item_init(&scene, &all, 0, 1, 3, 1);
    scene_decode(&scene, a, 1, &all);
    certificate_check(&all);
    for (uint32_t k = 0; k < scene.of.n_segments[0]; k++)
        for (uint32_t at = 0; at < 2 * scene.span; at++)
            n_disk += at % 5 == 0;
    for (int i = 0; i < 2; i++) {
        uint32_t n_blocks = scene.of.n_segments[0] * scene.span, n_listed = 0, n_here = 0;
        scene_item_init(&scene, &item, 0, 1, 3, 1);
        scene_decode(&scene, b, 1, &item);
        CHECK_EQ(item.certificate.status, 0);
        CHECK_EQ(item.certificate.n_blocks_disk, i == 0 ? n_disk : 0);
        CHECK(item.certificate.mass_reached == (float)i);
        if (i == 0)
            n_listed = n_disk + item.certificate.n_blocks_unfit;
        for (uint32_t j = 0; j < n_listed; j++) {
            uint32_t block = item.disk_block[j], head = block / n_blocks;
            uint32_t segment = block % n_blocks / scene.span, at = block % scene.span;
            CHECK(block < 2 * n_blocks && (j == 0 || block > item.disk_block[j - 1]));
            n_here += (head * scene.span + at) % 5 == 0;
            homes[j] = (struct winnow_gpu_home){
                scene_slot(&scene, 0, segment), (2 + head) * scene.span + at,
                scene_head(&scene, 0, 1, head)->segment[segment].home[at]};
        }
        CHECK_EQ(api->homes_set(b, n_listed, homes), 0);
        CHECK_EQ(n_here, i == 0 ? n_disk : 0);
        if (i == 1)
            scene_same(&scene, &all, &item);
        scene_item_finish(&scene, &item);
    }
    scene_item_finish(&scene, &all);
    api->destroy(a);
    api->destroy(b);
    scene_close(&scene);
}

/* A launch is whole or sparse, and a whole item has no budget. */
static void test_gpu_whole__refuses_a_mixture(void)
{
    struct scene_options options = crowd;
    static struct scene_item items[2];

    options.n_sessions = 2;
    scene_open(&scene, &options);
    struct winnow_gpu *gpu = scene_put(&scene, &(struct scene_gpu_options){.n_slots = 64});
    for (uint32_t first = 0; first < 2; first++) {
        struct winnow_gpu_item list[2];
        for (uint32_t s = 0; s < 2; s++) {
            scene_item_init(&scene, &items[s], s, 0, 0, s == first ? 1 : 0.9f);
            list[s] = items[s].item;
        }
        CHECK_EQ(api->decode(gpu, 2, list), -EINVAL);
        list[first].n_blocks_max = 3;
        CHECK_EQ(api->decode(gpu, 1, &list[first]), -EINVAL);
        for (uint32_t s = 0; s < 2; s++)
            scene_item_finish(&scene, &items[s]);
    }
    api->destroy(gpu);
    scene_close(&scene);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_whole__refuses_a_mixture);
    TEST_RUN(test_gpu_whole__evicts_nothing);
    TEST_RUN(test_gpu_whole__renews_no_stamp);
    TEST_RUN(test_gpu_whole__disk_blocks_are_named);
    TEST_RUN(test_gpu_whole__same_bits);
    TEST_RUN(test_gpu_whole__is_exact);
    TEST_RUN(test_gpu_whole__traces_are_exact);
    TEST_RUN(test_gpu_whole__256_sessions_a_million_tokens);
    return TEST_END();
}
