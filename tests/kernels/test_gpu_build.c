/* Build jobs through the GPU's contract: what ref promises of any input, the same bits whatever runs
 * beside them, refusals. */
#include "built.h"
#include "gpu_item.h"

static struct scene scene;
static const struct scene_gpu_options of_gpu = {.n_slots = 64};

/* A job's homes and results, poisoned. */
struct job {
    uint32_t n_heads;
    uint32_t *homes;
    uint16_t **order;
    struct winnow_index_view *view;
    int64_t ticket;
};

/* Of the blocks of one segment, in the order in which they lie there. */
static void job_init(struct job *job, uint32_t layer, uint32_t segment)
{
    uint32_t n_heads = scene.of.shape.n_kv_heads, span = scene.span;

    *job = (struct job){
        .n_heads = n_heads,
        .homes = case_alloc((size_t)n_heads * span * sizeof *job->homes),
        .order = case_alloc(n_heads * sizeof *job->order),
        .view = case_alloc(n_heads * sizeof *job->view),
    };
    for (uint32_t h = 0; h < n_heads; h++) {
        memcpy(job->homes + h * span, scene_head(&scene, 0, layer, h)->segment[segment].home,
               span * sizeof *job->homes);
        job->order[h] = case_alloc((size_t)16 * span * sizeof **job->order);
        memset(job->order[h], 0xff, (size_t)16 * span * sizeof **job->order);
        case_view_init(&job->view[h], &scene.head_shape, span);
        winnow_alloc_free(job->view[h].var);
        job->view[h].var = NULL;
    }
}

static void job_finish(struct job *job)
{
    for (uint32_t h = 0; h < job->n_heads; h++) {
        winnow_alloc_free(job->order[h]);
        case_view_finish(&job->view[h]);
    }
    winnow_alloc_free(job->homes);
    winnow_alloc_free(job->order);
    winnow_alloc_free(job->view);
}

static void job_begin(struct winnow_gpu *gpu, struct job *job)
{
    job->ticket = api->build(gpu, job->homes);
    CHECK(job->ticket > 0);
}

static int job_poll(struct winnow_gpu *gpu, struct job *job, bool wait)
{
    return api->build_poll(gpu, job->ticket, wait, job->order, job->view);
}

/* Against ref, on the tokens that its blocks hold. */
static void job_check(const struct job *job)
{
    size_t k_floats = (size_t)16 * scene.head_shape.k_width;
    size_t v_floats = (size_t)16 * scene.head_shape.v_width;
    float *k = case_alloc(scene.span * k_floats * sizeof *k);
    float *v = case_alloc(scene.span * v_floats * sizeof *v);

    for (uint32_t h = 0; h < job->n_heads; h++) {
        for (uint32_t b = 0; b < scene.span; b++)
            scene.ref->block_unpack(&scene.head_shape,
                                    scene.arena + (uint64_t)job->homes[h * scene.span + b] * 4096,
                                    k + b * k_floats, v + b * v_floats);
        struct built built = {
            .name = "job",
            .shape = &scene.head_shape,
            .n_blocks = scene.span,
            .k = k,
            .v = v,
            .order = job->order[h],
            .view = &job->view[h],
            .is_ref_order =
                !scene.of.trace && (scene.of.input == INPUT_EQUAL || scene.of.input == INPUT_STEPS),
        };
        built_check(&built);
    }
    winnow_alloc_free(k);
    winnow_alloc_free(v);
}

/* The same bits. */
static void job_same(const struct job *a, const struct job *b)
{
    size_t n = scene.span, k_width = scene.head_shape.k_width, v_width = scene.head_shape.v_width;

    for (uint32_t h = 0; h < a->n_heads; h++) {
        const struct winnow_index_view *x = &a->view[h], *y = &b->view[h];
        CHECK(!memcmp(a->order[h], b->order[h], 16 * n * sizeof **a->order));
        CHECK(!memcmp(x->head, y->head, n * sizeof *x->head));
        CHECK(!memcmp(x->centroid, y->centroid, n * k_width));
        CHECK(!memcmp(x->vmean, y->vmean, n * v_width));
        CHECK(!memcmp(x->code, y->code, 8 * n * k_width));
        CHECK(!memcmp(x->code_scale, y->code_scale, 16 * n * sizeof *x->code_scale));
        CHECK(!memcmp(x->mean_k, y->mean_k, k_width * sizeof *x->mean_k));
        CHECK(!memcmp(x->mean_v, y->mean_v, v_width * sizeof *x->mean_v));
        CHECK(!memcmp(x->v_max, y->v_max, sizeof *x->v_max));
    }
}

static const struct {
    uint32_t k_width, v_width, kv_dtype, segment_tokens, n_segments;
} form[] = {
    {64, 64, WINNOW_FP16, 128, 2},    {128, 128, WINNOW_BF16, 1024, 1},
    {256, 256, WINNOW_BF16, 384, 1},  {48, 80, WINNOW_FP16, 1024, 1},
    {128, 64, WINNOW_FP16, 384, 2},   {192, 128, WINNOW_FP16, 1024, 1},
    {16, 16, WINNOW_BF16, 640, 1},    {96, 96, WINNOW_BF16, 2048, 1},
    {256, 128, WINNOW_FP16, 2048, 1},
};

/* Whatever the keys are, of any width and both types, a job holds what ref promises. */
static void test_gpu_build__holds_what_ref_promises(void)
{
    for (uint32_t f = 0; f < sizeof form / sizeof form[0]; f++)
        for (uint32_t input = 0; input < N_INPUTS; input++) {
            struct scene_options options = {
                .shape = SCENE_SHAPE(1, 4, 2, form[f].k_width, form[f].v_width, form[f].kv_dtype,
                                     WINNOW_FP32),
                .segment_tokens = form[f].segment_tokens,
                .n_sinks = 16,
                .n_sessions = 1,
                .n_segments = {form[f].n_segments},
                .n_tail = {20},
                .input = input,
                .seed = test_seed() + f,
            };
            struct job job;

            if (scene_is_small() && (f > 0 || input > 0))
                continue;
            if (f > 1 && input != INPUT_RANDOM && input != 1 + (test_seed() + f) % (N_INPUTS - 1))
                continue;
            scene_open(&scene, &options);
            struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
            for (uint32_t k = 0; k < options.n_segments[0]; k++) {
                job_init(&job, 0, k);
                job_begin(gpu, &job);
                CHECK_EQ(job_poll(gpu, &job, true), 1);
                job_check(&job);
                job_finish(&job);
            }
            api->destroy(gpu);
            scene_close(&scene);
        }
}

/* Real keys: every segment of the traces. */
static void test_gpu_build__real_keys_as_ref(void)
{
    static struct scene_traces traces;

    if (scene_is_small())
        return;
    scene_open_traces(&scene, &traces);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
    for (uint32_t layer = 0; layer < scene.of.shape.n_layers; layer++)
        for (uint32_t k = 0; k < 7; k++) {
            struct job job;
            job_init(&job, layer, k);
            job_begin(gpu, &job);
            CHECK_EQ(job_poll(gpu, &job, true), 1);
            job_check(&job);
            job_finish(&job);
        }
    api->destroy(gpu);
    scene_close_traces(&scene, &traces);
}

static const struct scene_options llama = {
    .shape = SCENE_SHAPE(2, 8, 4, 128, 128, WINNOW_BF16, WINNOW_BF16),
    .segment_tokens = 256,
    .n_sinks = 16,
    .n_sessions = 1,
    .n_segments = {4},
    .n_tail = {70},
};

/* Four jobs out, steps in between, taken in any order: each has the bits that it has alone, and so
 * have the steps. */
static void test_gpu_build__same_bits_beside_steps(void)
{
    enum { N = WINNOW_GPU_BUILDS_MAX };
    scene_open(&scene, &llama);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
    struct job alone[N], job[N];
    struct scene_item first, item;
    uint32_t n_rounds = scene_is_small() ? 1 : 20;
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    scene_item_init(&scene, &first, 0, 0, 0, 0.9f);
    scene_decode(&scene, gpu, 1, &first);
    for (uint32_t i = 0; i < N; i++) {
        job_init(&alone[i], i % 2, i);
        job_begin(gpu, &alone[i]);
        CHECK_EQ(job_poll(gpu, &alone[i], true), 1);
        job_check(&alone[i]);
    }
    for (uint32_t round = 0; round < n_rounds; round++) {
        uint32_t n_left = N, shift = (uint32_t)winnow_rng_below(&rng, N);
        scene_item_init(&scene, &item, 0, 0, 0, 0.9f);
        for (uint32_t i = 0; i < N; i++) {
            job_init(&job[i], i % 2, i);
            job_begin(gpu, &job[i]);
            if (i == 1)
                scene_decode(&scene, gpu, 1, &item);
        }
        CHECK_EQ(api->build(gpu, job[0].homes), -EBUSY);
        for (uint32_t i = shift; n_left > 0; i = (i + 1) % N) {
            int rc = job[i].ticket > 0 ? job_poll(gpu, &job[i], round % 2) : 0;
            CHECK(rc >= 0);
            if (rc == 0)
                continue;
            CHECK_EQ(job_poll(gpu, &job[i], false), -EINVAL);
            job[i].ticket = 0;
            n_left--;
        }
        for (uint32_t i = 0; i < N; i++) {
            job_same(&job[i], &alone[i]);
            job_finish(&job[i]);
        }
        scene_same(&scene, &item, &first);
        scene_item_finish(&scene, &item);
    }
    for (uint32_t i = 0; i < N; i++)
        job_finish(&alone[i]);
    scene_item_finish(&scene, &first);
    api->destroy(gpu);
    scene_close(&scene);
}

/* A home that is none, a job that is none, views of another size: nothing is done, and what was
 * asked before goes on. A gpu that is destroyed waits for its jobs. */
static void test_gpu_build__refuses_what_is_not_there(void)
{
    scene_open(&scene, &llama);
    struct winnow_gpu *gpu = scene_put(&scene, &of_gpu);
    struct job job;

    job_init(&job, 0, 0);
    uint32_t last = job.homes[4 * scene.span - 1];
    job.homes[4 * scene.span - 1] = WINNOW_GPU_ON_DISK;
    CHECK_EQ(api->build(gpu, job.homes), -EINVAL);
    job.homes[4 * scene.span - 1] = (uint32_t)(scene.arena_bytes / 4096);
    CHECK_EQ(api->build(gpu, job.homes), -EINVAL);
    job.homes[4 * scene.span - 1] = last;
    job_begin(gpu, &job);
    CHECK_EQ(api->build_poll(gpu, 0, true, job.order, job.view), -EINVAL);
    CHECK_EQ(api->build_poll(gpu, job.ticket + 1, true, job.order, job.view), -EINVAL);
    job.view[3].n_blocks++;
    CHECK_EQ(job_poll(gpu, &job, true), -EINVAL);
    job.view[3].n_blocks--;
    CHECK_EQ(job.order[0][0], 0xffff);
    CHECK_EQ(job_poll(gpu, &job, true), 1);
    job_check(&job);
    job_begin(gpu, &job);
    api->destroy(gpu);
    scene_close(&scene);
    job_finish(&job);
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    TEST_RUN(test_gpu_build__holds_what_ref_promises);
    TEST_RUN(test_gpu_build__real_keys_as_ref);
    TEST_RUN(test_gpu_build__same_bits_beside_steps);
    TEST_RUN(test_gpu_build__refuses_what_is_not_there);
    return TEST_END();
}
