/*
 * Windows through the GPU's contract: against ref/ within 4 eps of the storage type times sum p|v|
 * (out) and 1e-4 + 1e-6 of the largest logit (lse), and against themselves to the bit, wherever their
 * parts end.
 */
#include <float.h>

#include "gpu_scene.h"

enum { BLOCKS_MAX = 64, POSITIONS_MAX = 512, GUARD_FLOATS = 16, POISON = 0xa5 };

struct context {
    struct winnow_model_shape shape;
    uint32_t n_sinks, n_sealed, n_tail, n_pos; /* tokens before the window; positions */
    enum kernel_input input;
};

#define SHAPE(n_q, n_kv, k_width, v_width, kv_dtype, io_dtype)                                     \
    {                                                                                              \
        1, n_q, n_kv, k_width, v_width, 1, kv_dtype, io_dtype, WINNOW_BLOCK_FRAGMENTS              \
    }

/* A context's blocks in the arena, every head's; sealed ones first, then open ones by position. */
static struct {
    struct context of;
    struct winnow_model_shape head_shape;
    uint32_t n_group, n_blocks, n_sealed_blocks, block_bytes, n_pages;
    uint64_t first, arena_bytes;
    uint8_t *arena;
    struct kernel_data *data; /* [n_kv_heads] */
    uint32_t *home;           /* [n_kv_heads][n_blocks] */
    uint64_t *position;       /* [n_blocks] */
    uint32_t *n_tokens;
    struct winnow_gpu_device *device;
    struct winnow_gpu *gpu;
    struct winnow_gpu_window_rows rows;
} c;

static struct winnow_rng rng;
static double out_error, lse_error;

static void head_fill(uint32_t h)
{
    struct kernel_data *data = &c.data[h];
    size_t k_width = c.of.shape.k_width, v_width = c.of.shape.v_width;
    const struct winnow_kernels *ref = winnow_kernels_ref();

    *data = (struct kernel_data){
        .shape = c.head_shape, .n_q = c.n_group, .n_blocks = c.n_blocks, .n_pos = c.of.n_pos};
    data->k = case_alloc(16 * c.n_blocks * k_width * sizeof(float));
    data->v = case_alloc(16 * c.n_blocks * v_width * sizeof(float));
    data->q = case_alloc(c.of.n_pos * c.n_group * k_width * sizeof(float));
    case_fill_random(data, &rng);
    case_fill_hostile(data, c.of.input);
    scene_round_all(c.of.shape.kv_dtype, data->k, 16 * c.n_blocks * k_width);
    scene_round_all(c.of.shape.kv_dtype, data->v, 16 * c.n_blocks * v_width);
    scene_round_all(c.of.shape.io_dtype, data->q, c.of.n_pos * c.n_group * k_width);
    for (uint32_t b = 0; b < c.n_blocks; b++)
        ref->block_pack(&c.head_shape, 0, c.n_tokens[b], data->k + 16 * b * k_width,
                        data->v + 16 * b * v_width,
                        c.arena + (uint64_t)c.home[h * c.n_blocks + b] * 4096);
}

/* Homes in any order. */
static void homes_draw(void)
{
    uint32_t n = c.of.shape.n_kv_heads * c.n_blocks;

    for (uint32_t i = 0; i < n; i++) {
        uint32_t j = (uint32_t)winnow_rng_below(&rng, i + 1);
        c.home[i] = c.home[j];
        c.home[j] = i * (c.block_bytes / 4096);
    }
}

static void blocks_place(void)
{
    uint32_t n_sink_blocks = c.of.n_sinks / 16;
    uint64_t end = c.of.n_sinks + c.of.n_sealed + c.of.n_tail + c.of.n_pos;

    for (uint32_t b = 0; b < c.n_blocks; b++) {
        uint32_t open = b - c.n_sealed_blocks;
        bool is_sealed = b < c.n_sealed_blocks;
        uint64_t at = 16 * (uint64_t)open + (open < n_sink_blocks ? 0 : c.of.n_sealed);
        c.position[b] = is_sealed ? UINT64_MAX : at;
        c.n_tokens[b] = is_sealed || end - at > 16 ? 16 : (uint32_t)(end - at);
    }
    c.first = end - c.of.n_pos;
}

static void gpu_open(void)
{
    struct winnow_gpu_options options = {
        .shape = c.of.shape,
        .segment_tokens = 128,
        .n_sinks = 16,
        .n_segments_max = 1,
        .n_sessions_max = 1,
        .n_session_segments_max = 1,
        .n_items_max = 1,
        .n_launch_blocks_max = 8,
        .n_window_positions = POSITIONS_MAX,
        .n_window_blocks = BLOCKS_MAX,
    };
    char text[256] = "";

    if (api->open(0, UINT64_C(1) << 30, c.arena, c.arena_bytes, &c.device, text) < 0 ||
        api->create(c.device, &options, &c.gpu, text) < 0)
        test_fail(__FILE__, __LINE__, text);
    api->window_rows(c.gpu, &c.rows);
}

static void context_open(const struct context *of)
{
    uint32_t n_open_tokens = of->n_sinks + of->n_tail + of->n_pos;

    memset(&c, 0, sizeof c);
    c.of = *of;
    c.of.shape.softmax_scale = 1 / sqrtf((float)of->shape.k_width);
    c.head_shape = c.of.shape;
    c.head_shape.n_q_heads = c.n_group = of->shape.n_q_heads / of->shape.n_kv_heads;
    c.head_shape.n_kv_heads = 1;
    c.n_sealed_blocks = of->n_sealed / 16;
    c.n_blocks = c.n_sealed_blocks + (n_open_tokens + 15) / 16;
    c.block_bytes = winnow_block_bytes(&c.head_shape);
    c.arena_bytes = (uint64_t)of->shape.n_kv_heads * c.n_blocks * c.block_bytes;
    c.arena = winnow_alloc_map(c.arena_bytes);
    CHECK(c.arena);
    memset(c.arena, 0xff, c.arena_bytes);
    c.home = case_alloc((size_t)of->shape.n_kv_heads * c.n_blocks * sizeof *c.home);
    c.position = case_alloc(c.n_blocks * sizeof *c.position);
    c.n_tokens = case_alloc(c.n_blocks * sizeof *c.n_tokens);
    c.data = case_alloc(of->shape.n_kv_heads * sizeof *c.data);
    homes_draw();
    blocks_place();
    for (uint32_t h = 0; h < of->shape.n_kv_heads; h++)
        head_fill(h);
    gpu_open();
}

static void context_close(void)
{
    api->destroy(c.gpu);
    api->close(c.device);
    for (uint32_t h = 0; h < c.of.shape.n_kv_heads; h++) {
        winnow_alloc_free(c.data[h].k);
        winnow_alloc_free(c.data[h].v);
        winnow_alloc_free(c.data[h].q);
    }
    winnow_alloc_free(c.data);
    winnow_alloc_free(c.home);
    winnow_alloc_free(c.position);
    winnow_alloc_free(c.n_tokens);
    winnow_alloc_unmap(c.arena, c.arena_bytes);
}

/* --- a window ---------------------------------------------------------------------------------- */

static size_t rows_floats(uint32_t width)
{
    return (size_t)c.of.shape.n_kv_heads * POSITIONS_MAX * c.n_group * width;
}

static void queries_put(void)
{
    size_t row_floats = c.n_group * c.of.shape.k_width;

    memset(c.rows.q, POISON, rows_floats(c.of.shape.k_width) * sizeof(float));
    memset(c.rows.lse, POISON, rows_floats(1) * sizeof(float));
    for (uint32_t h = 0; h < c.of.shape.n_kv_heads; h++)
        memcpy(c.rows.q + h * POSITIONS_MAX * row_floats, c.data[h].q,
               c.of.n_pos * row_floats * sizeof(float));
}

/* A part; where two are out, once the last of them, *ticket, is complete. */
static void part_send(const struct winnow_gpu_window_part *part, int64_t *ticket)
{
    int64_t next = api->window(c.gpu, part);

    if (next == -EBUSY) {
        CHECK_EQ(api->window_poll(c.gpu, *ticket, true), 1);
        next = api->window(c.gpu, part);
    }
    CHECK(next > 0);
    *ticket = next;
}

/* Attends all of it in parts of `step` groups; 0: of as many as chance says, of each head its own.
 * Result: c.rows. */
static void window_run(uint32_t step)
{
    uint32_t n_heads = c.of.shape.n_kv_heads, at[64] = {0}, n[64], n_left = n_heads;
    uint32_t *homes = case_alloc((size_t)n_heads * BLOCKS_MAX * sizeof *homes);
    struct winnow_gpu_window_part part = {
        .is_first = true, .n_pos = c.of.n_pos, .first = c.first, .n_blocks = n, .homes = homes};
    int64_t ticket = 0;

    queries_put();
    CHECK(n_heads <= 64);
    while (!part.is_last) {
        bool is_open = true;
        for (uint32_t h = 0; h < n_heads; h++)
            is_open &= at[h] >= c.n_sealed_blocks;
        uint32_t end = is_open ? c.n_blocks : c.n_sealed_blocks, n_wanted = 8 * step;
        for (uint32_t h = 0; h < n_heads; h++) {
            if (step == 0 && (!is_open || h == 0))
                n_wanted = 8 * (uint32_t)winnow_rng_below(&rng, BLOCKS_MAX / 8 + 1);
            n[h] = end - at[h] < n_wanted ? end - at[h] : n_wanted;
            memcpy(homes + (size_t)h * BLOCKS_MAX, c.home + (size_t)h * c.n_blocks + at[h],
                   n[h] * sizeof *homes);
        }
        part.position = is_open ? c.position + at[0] : NULL;
        part.n_tokens = is_open ? c.n_tokens + at[0] : NULL;
        for (uint32_t h = n_left = 0; h < n_heads; h++)
            n_left += c.n_blocks - (at[h] += n[h]);
        part.is_last = n_left == 0;
        part_send(&part, &ticket);
        part.is_first = false;
    }
    CHECK_EQ(api->window_poll(c.gpu, ticket, true), 1);
    CHECK_EQ(api->window_poll(c.gpu, ticket, false), 1);
    winnow_alloc_free(homes);
}

static bool is_poison(const float *x)
{
    uint32_t bits, poison;

    memcpy(&bits, x, sizeof bits);
    memset(&poison, POISON, sizeof poison);
    return bits == poison;
}

/* Nothing but the window's rows was written: behind a head's rows poison stands, or q's. */
static void guards_check(void)
{
    uint32_t v_width = c.of.shape.v_width, k_width = c.of.shape.k_width;

    for (uint32_t h = 0; h < c.of.shape.n_kv_heads; h++) {
        size_t row = ((size_t)h * POSITIONS_MAX + c.of.n_pos) * c.n_group;
        if (c.of.n_pos == POSITIONS_MAX)
            continue;
        CHECK(is_poison(c.rows.lse + row));
        CHECK(v_width != k_width || is_poison(c.rows.out + row * v_width));
        CHECK(!is_poison(c.rows.lse + row - 1));
        CHECK(!is_poison(c.rows.out + row * v_width - 1));
    }
}

/* --- against ref ------------------------------------------------------------------------------- */

static uint32_t n_seen(uint32_t b, uint64_t at)
{
    if (c.position[b] == UINT64_MAX)
        return c.n_tokens[b];
    if (c.position[b] > at)
        return 0;
    return at - c.position[b] + 1 < c.n_tokens[b] ? (uint32_t)(at - c.position[b] + 1)
                                                  : c.n_tokens[b];
}

/* Of one query head in fp64: the largest |logit|, and sum p|v| [v_width]. */
static double weigh(const struct kernel_data *data, const float *q, uint64_t at, double *weight)
{
    uint32_t k_width = c.of.shape.k_width, v_width = c.of.shape.v_width;
    double *s = case_alloc(16 * c.n_blocks * sizeof *s), largest = 0, highest = -INFINITY, sum = 0;

    for (uint32_t b = 0; b < c.n_blocks; b++)
        for (uint32_t t = 16 * b; t < 16 * b + n_seen(b, at); t++) {
            s[t] = 0;
            for (uint32_t d = 0; d < k_width; d++)
                s[t] += (double)q[d] * (double)data->k[t * k_width + d];
            s[t] *= (double)c.head_shape.softmax_scale;
            largest = fmax(largest, fabs(s[t]));
            highest = fmax(highest, s[t]);
        }
    memset(weight, 0, v_width * sizeof *weight);
    for (uint32_t b = 0; b < c.n_blocks; b++)
        for (uint32_t t = 16 * b; t < 16 * b + n_seen(b, at); t++) {
            double p = exp(s[t] - highest);
            sum += p;
            for (uint32_t d = 0; d < v_width; d++)
                weight[d] += p * fabs((double)data->v[t * v_width + d]);
        }
    for (uint32_t d = 0; d < v_width; d++)
        weight[d] /= sum;
    winnow_alloc_free(s);
    return largest;
}

static void error_take(double *largest, double a, double b, double tolerance, const char *what)
{
    double error = a == b ? 0 : fabs(a - b) / tolerance;

    if (!(error <= 1))
        fprintf(stderr, "%s, width %u, %u, G %u, %u of %u: %s is %.9g, ref has %.9g (+-%.3g)\n",
                kernel_input_name[c.of.input], c.of.shape.k_width, c.of.shape.v_width, c.n_group,
                c.of.n_pos, c.n_blocks, what, a, b, tolerance);
    CHECK(error <= 1);
    *largest = fmax(*largest, error);
}

/* One position of one head. */
static void position_check(uint32_t h, uint32_t pos)
{
    const struct winnow_kernels *ref = winnow_kernels_ref();
    static float partial[WINNOW_GQA_MAX * (WINNOW_WIDTH_MAX + 2)];
    static float out[WINNOW_GQA_MAX * WINNOW_WIDTH_MAX], lse[WINNOW_GQA_MAX];
    const struct kernel_data *data = &c.data[h];
    const float *q = data->q + (size_t)pos * c.n_group * c.of.shape.k_width;
    uint32_t v_width = c.of.shape.v_width;
    size_t row = ((size_t)h * POSITIONS_MAX + pos) * c.n_group;
    double eps = c.of.shape.kv_dtype == WINNOW_BF16 ? 0x1p-8 : 0x1p-11, weight[WINNOW_WIDTH_MAX];

    memset(partial, 0, sizeof partial);
    for (uint32_t g = 0; g < c.n_group; g++)
        partial[g * (v_width + 2)] = -INFINITY;
    for (uint32_t b = 0; b < c.n_blocks; b++) {
        const void *block = c.arena + (uint64_t)c.home[h * c.n_blocks + b] * 4096;
        ref->attend_window(&c.head_shape, 1, c.first + pos, q, 1, &block, &c.position[b],
                           &c.n_tokens[b], partial, NULL);
    }
    ref->finish(&c.head_shape, partial, out, lse);
    for (uint32_t g = 0; g < c.n_group; g++) {
        double largest = weigh(data, q + g * c.of.shape.k_width, c.first + pos, weight);
        error_take(&lse_error, (double)c.rows.lse[row + g], (double)lse[g], 1e-4 + 1e-6 * largest,
                   "lse");
        for (uint32_t d = 0; d < v_width; d++)
            error_take(&out_error, (double)c.rows.out[(row + g) * v_width + d],
                       (double)out[g * v_width + d], 4 * eps * weight[d] + 0x1p-24, "out");
    }
}

static void window_check(void)
{
    guards_check();
    for (uint32_t h = 0; h < c.of.shape.n_kv_heads; h++)
        for (uint32_t pos = 0; pos < c.of.n_pos; pos++)
            if (c.of.n_pos < 20 || pos % 29 == 0 || pos + 1 == c.of.n_pos)
                position_check(h, pos);
}

/* --- tests ------------------------------------------------------------------------------------- */

static const struct winnow_model_shape shapes[] = {
    SHAPE(8, 2, 128, 128, WINNOW_BF16, WINNOW_BF16),
    SHAPE(6, 2, 64, 64, WINNOW_FP16, WINNOW_FP32),
    SHAPE(1, 1, 256, 256, WINNOW_BF16, WINNOW_BF16),
    SHAPE(16, 1, 96, 64, WINNOW_FP16, WINNOW_FP16),
    SHAPE(7, 1, 192, 128, WINNOW_FP16, WINNOW_FP32),
    SHAPE(8, 1, 80, 112, WINNOW_BF16, WINNOW_FP32),
    SHAPE(5, 1, 16, 16, WINNOW_FP16, WINNOW_FP32),
    SHAPE(4, 1, 128, 128, WINNOW_BF16, WINNOW_FP32),
    SHAPE(3, 1, 64, 64, WINNOW_BF16, WINNOW_BF16),
    SHAPE(2, 1, 256, 128, WINNOW_FP16, WINNOW_FP16),
};
static const struct {
    uint32_t n_sinks, n_sealed, n_tail, n_pos;
} extents[] = {
    {0, 0, 0, 1},       {16, 0, 0, 15},      {0, 0, 0, 64},       {16, 0, 84, 17},
    {16, 128, 5, 16},   {64, 1280, 100, 64}, {0, 1024, 0, 500},   {16, 384, 639, 1},
    {16, 2048, 30, 33}, {48, 128, 1, 512},   {16, 128, 1000, 64},
};

/* Every width, ratio and type; windows of one position, fewer than a tile, many tiles; over nothing,
 * over a tail alone, over segments. */
static void test_gpu_window__as_ref(void)
{
    static const enum kernel_input input[] = {INPUT_RANDOM, INPUT_EQUAL, INPUT_STEPS, INPUT_TINY};

    out_error = lse_error = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (size_t k = 0; k < sizeof extents / sizeof extents[0]; k++) {
            struct context of = {
                shapes[i],           extents[k].n_sinks,
                extents[k].n_sealed, extents[k].n_tail,
                extents[k].n_pos,    k % 3 ? INPUT_RANDOM : input[(test_seed() + i + k) % 4]};
            if (scene_is_small() && (i > 2 || k % 4 != 1))
                continue;
            context_open(&of);
            window_run(BLOCKS_MAX / 8);
            window_check();
            context_close();
        }
    printf("   largest error over its tolerance: out %.3f, lse %.3f\n", out_error, lse_error);
}

static void beyond_check(float x, float most)
{
    if (!(fabsf(x) <= most))
        fprintf(stderr, "%s, width %u, %u, G %u: %g of %g\n", kernel_input_name[c.of.input],
                c.of.shape.k_width, c.of.shape.v_width, c.n_group, (double)x, (double)most);
    CHECK(fabsf(x) <= most);
}

/* Logits beyond fp32 count as its largest: the result is a mean of values, and a number. */
static void test_gpu_window__logits_beyond_fp32(void)
{
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int input = INPUT_HUGE; input <= INPUT_OVERFLOW; input++) {
            struct context of = {shapes[i], 16, 128, 30, 20, (enum kernel_input)input};
            float largest = 0;
            if (of.shape.io_dtype == WINNOW_FP16 || (scene_is_small() && i > 1))
                continue;
            context_open(&of);
            window_run(1);
            for (uint32_t h = 0; h < c.of.shape.n_kv_heads; h++) {
                size_t row = (size_t)h * POSITIONS_MAX * c.n_group, n_rows = 20 * c.n_group;
                for (size_t k = 0; k < 16 * (size_t)c.n_blocks * of.shape.v_width; k++)
                    largest = fmaxf(largest, fabsf(c.data[h].v[k]));
                for (size_t k = 0; k < n_rows * of.shape.v_width; k++)
                    beyond_check(c.rows.out[row * of.shape.v_width + k], 1.01f * largest);
                for (size_t k = 0; k < n_rows; k++)
                    beyond_check(c.rows.lse[row + k], FLT_MAX);
            }
            context_close();
        }
}

/* Wherever parts end, alone or behind others that are still under way. */
static void test_gpu_window__same_bits_for_any_parts(void)
{
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i += 3) {
        struct context of = {shapes[i], 16, 1152, 77, 130, INPUT_RANDOM};
        context_open(&of);
        size_t n_out = rows_floats(c.of.shape.v_width), n_lse = rows_floats(1);
        float *out = case_alloc(n_out * sizeof *out), *lse = case_alloc(n_lse * sizeof *lse);
        for (uint32_t run = 0; run < (scene_is_small() ? 2 : 20); run++) {
            window_run(run == 1 ? 1 : run < 3 ? BLOCKS_MAX / 8 : 0);
            if (run == 0) {
                memcpy(lse, c.rows.lse, n_lse * sizeof *lse);
                memcpy(out, c.rows.out, n_out * sizeof *out);
            }
            for (uint32_t h = 0; h < c.of.shape.n_kv_heads; h++) {
                size_t row = (size_t)h * POSITIONS_MAX * c.n_group, n = c.of.n_pos * c.n_group;
                uint32_t v_width = c.of.shape.v_width;
                CHECK(!memcmp(lse + row, c.rows.lse + row, n * sizeof *lse));
                CHECK(!memcmp(out + row * v_width, c.rows.out + row * v_width,
                              n * v_width * sizeof *out));
            }
        }
        winnow_alloc_free(out);
        winnow_alloc_free(lse);
        context_close();
    }
}

/* A place in the arena whose bytes another block takes as soon as its part is complete: each part is
 * what stood there when it was sent. */
static void test_gpu_window__reads_what_stands_there_now(void)
{
    for (size_t i = 0; i < 2; i++) {
        struct context of = {shapes[i], 0, 8192, 0, 16, INPUT_RANDOM};
        if (scene_is_small())
            of.n_sealed = 1024;
        context_open(&of);
        uint32_t n_heads = c.of.shape.n_kv_heads, n[64], n_parts = c.n_sealed_blocks / 8;
        uint64_t place_bytes = (uint64_t)n_heads * 8 * c.block_bytes;
        uint8_t *kept = case_alloc(c.arena_bytes);
        uint32_t *homes = case_alloc((size_t)n_heads * BLOCKS_MAX * sizeof *homes);
        int64_t ticket[2] = {0};
        memcpy(kept, c.arena, c.arena_bytes);
        CHECK(2 * place_bytes <= c.arena_bytes);
        queries_put();
        for (uint32_t p = 0; p <= n_parts; p++) { /* the open block is the last part's */
            uint8_t *place = c.arena + p % 2 * place_bytes;
            if (p > 1)
                CHECK_EQ(api->window_poll(c.gpu, ticket[p % 2], true), 1);
            for (uint32_t h = 0; h < n_heads; h++) {
                n[h] = p < n_parts ? 8 : c.n_blocks - c.n_sealed_blocks;
                for (uint32_t b = 0; b < n[h]; b++) {
                    uint8_t *to = place + (h * 8 + b) * (size_t)c.block_bytes;
                    uint32_t from = c.home[h * c.n_blocks + 8 * p + b];
                    memcpy(to, kept + (uint64_t)from * 4096, c.block_bytes);
                    homes[h * BLOCKS_MAX + b] = (uint32_t)((to - c.arena) / 4096);
                }
            }
            struct winnow_gpu_window_part part = {
                .is_first = p == 0,
                .is_last = p == n_parts,
                .n_pos = c.of.n_pos,
                .first = c.first,
                .n_blocks = n,
                .homes = homes,
                .position = p < n_parts ? NULL : c.position + c.n_sealed_blocks,
                .n_tokens = p < n_parts ? NULL : c.n_tokens + c.n_sealed_blocks,
            };
            ticket[p % 2] = api->window(c.gpu, &part);
            CHECK(ticket[p % 2] > 0);
        }
        CHECK_EQ(api->window_poll(c.gpu, ticket[n_parts % 2], true), 1);
        memcpy(c.arena, kept, c.arena_bytes);
        window_check();
        winnow_alloc_free(kept);
        winnow_alloc_free(homes);
        context_close();
    }
}

/* What is out of range or does not go on is refused and changes nothing; a window that is given up
 * leaves nothing to the next. */
static void test_gpu_window__refuses_what_does_not_fit(void)
{
    struct context of = {shapes[0], 16, 256, 40, 33, INPUT_RANDOM};
    uint32_t n[2] = {16, 16}, homes[2 * BLOCKS_MAX], n_tokens[16];
    uint64_t position[16];

    context_open(&of);
    for (uint32_t i = 0; i < 2 * BLOCKS_MAX; i++)
        homes[i] = c.home[i % 16];
    for (uint32_t i = 0; i < 16; i++) {
        position[i] = 16 * i;
        n_tokens[i] = 16;
    }
    const struct winnow_gpu_window_part good = {
        .is_first = true, .n_pos = 33, .first = c.first, .n_blocks = n, .homes = homes};
    struct winnow_gpu_window_part part = good;
    part.is_first = false;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    part = good, part.n_pos = 0;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    part.n_pos = POSITIONS_MAX + 1;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    n[1] = 15;
    CHECK_EQ(api->window(c.gpu, &good), -EINVAL);
    n[1] = BLOCKS_MAX + 8;
    CHECK_EQ(api->window(c.gpu, &good), -EINVAL);
    n[1] = 8;
    part = good, part.position = position, part.n_tokens = n_tokens;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    n[1] = 16, n_tokens[3] = 17;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    homes[BLOCKS_MAX] = (uint32_t)(c.arena_bytes / 4096);
    CHECK_EQ(api->window(c.gpu, &good), -EINVAL);
    homes[BLOCKS_MAX] = WINNOW_GPU_ON_DISK;
    CHECK_EQ(api->window(c.gpu, &good), -EINVAL);
    homes[BLOCKS_MAX] = homes[0];
    CHECK_EQ(api->window_poll(c.gpu, 1, false), -EINVAL);
    CHECK_EQ(api->window(c.gpu, &good), 1);
    part = good, part.is_first = false, part.first++;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    CHECK_EQ(api->window_poll(c.gpu, 2, true), -EINVAL);
    CHECK_EQ(api->window_poll(c.gpu, 1, true), 1);
    window_run(2);
    window_check();
    part = good, part.is_first = false;
    CHECK_EQ(api->window(c.gpu, &part), -EINVAL);
    CHECK(api->window(c.gpu, &good) > 0);
    context_close();
}

int main(int argc, char **argv)
{
    scene_api_init(argc, argv);
    winnow_rng_init(&rng, test_seed());
    TEST_RUN(test_gpu_window__as_ref);
    TEST_RUN(test_gpu_window__logits_beyond_fp32);
    TEST_RUN(test_gpu_window__same_bits_for_any_parts);
    TEST_RUN(test_gpu_window__reads_what_stands_there_now);
    TEST_RUN(test_gpu_window__refuses_what_does_not_fit);
    return TEST_END();
}
