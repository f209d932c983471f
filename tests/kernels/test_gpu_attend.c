/*
 * begin, tail, attend and more on the device against ref/, with selection made by ref/ and placed by
 * hand: blocks in slots, on their way, on the host without a slot, on disk.
 *
 * Logits on the device are as exact as a query in two 16-bit halves: 2^-16 of the largest sum of
 * |q_i k_i| (bf16; fp16 2^-20); outputs may differ by twice that, as in versions.h.
 */
#include "gpu_placed.h"

static double values_largest(const struct unit *unit)
{
    double largest = 0;
    uint32_t width = scene.of.shape.v_width;

    for (uint32_t s = 0; s <= unit->n_blocks / SPAN; s++) {
        const struct kernel_data *data =
            s < unit->n_blocks / SPAN ? &unit->segment[s] : &unit->tail;
        for (size_t i = 0; i < 16 * (size_t)data->n_blocks * width; i++)
            largest = fmax(largest, fabs((double)data->v[i]));
    }
    return largest;
}

/* What ref says of the blocks marked in unit->selected; last_key: of the last one selected. */
static void unit_expect(struct unit *unit, float last_key, float *out, float *lse)
{
    const struct winnow_model_shape *shape = &unit->tail.shape;
    float *acc = case_alloc(unit->tail.n_partial * sizeof(float));
    float *partial = case_alloc(unit->tail.n_partial * sizeof(float));
    struct winnow_selection sel = unit->sel;
    uint32_t last = 0;

    memcpy(acc, unit->tail_acc, unit->tail.n_partial * sizeof(float));
    for (uint32_t b = 0; b < unit->n_blocks; b++) {
        uint32_t in_segment, n_tokens = 16;
        const struct kernel_data *data = unit_block(unit, b, &in_segment);
        if (!unit->selected[b])
            continue;
        ref->attend_partial(shape, unit->q, 1, data->block + in_segment, &n_tokens, partial,
                            unit->ln_m + b * group());
        ref->merge(shape, 1, partial, acc);
    }
    for (uint32_t b = 0; b < unit->n_blocks; b++)
        if (unit->ln_key[b] == last_key)
            last = b;
    sel.block_idx = &last;
    sel.n_selected = 1;
    for (uint32_t s = 0; s < unit->n_blocks / SPAN; s++) {
        partial_clear(partial);
        ref->compensate(shape, &unit->segment[s].view, &sel, s * SPAN, partial);
        ref->merge(shape, 1, partial, acc);
    }
    ref->finish(shape, acc, out, lse);
    winnow_alloc_free(acc);
    winnow_alloc_free(partial);
}

static double error_largest;

static void unit_check(uint32_t u, const uint8_t *out_item, const float *lse_item,
                       const struct winnow_gpu_unit *of)
{
    struct unit *unit = &scene.unit[u];
    uint32_t v_width = scene.of.shape.v_width, head = u % N_HEADS;
    float *out = case_alloc(group() * v_width * sizeof(float)), lse[WINNOW_GQA_MAX];
    float mass[WINNOW_GQA_MAX];
    double v_largest = values_largest(unit);
    double io_eps = scene.io_dtype == WINNOW_FP32   ? 0
                    : scene.io_dtype == WINNOW_FP16 ? 0x1p-11
                                                    : 0x1p-8;

    unit_expect(unit, of->key_threshold, out, lse);
    for (uint32_t g = 0; g < group(); g++) {
        double difference = logit_difference(unit, g);
        double tolerance = (2 * fmin(difference, 1) + 1e-4) * v_largest;
        size_t row = head * group() + g;
        CHECK_NEAR(lse_item[row], lse[g], difference + 1e-4 + 1e-6 * fabs((double)lse[g]));
        for (uint32_t d = 0; d < v_width; d++) {
            double x = (double)io_read(out_item, row * v_width + d),
                   y = (double)out[g * v_width + d];
            if (fabs(x - y) > tolerance + io_eps * fabs(y) + 0x1p-24)
                fprintf(stderr, "%s, %s, unit %u, g %u, d %u: %.9g, ref has %.9g\n", scene.of.name,
                        kernel_input_name[scene.input], u, g, d, x, y);
            CHECK(fabs(x - y) <= tolerance + io_eps * fabs(y) + 0x1p-24);
            if (scene.input == INPUT_RANDOM && scene.io_dtype == WINNOW_FP32)
                error_largest = fmax(error_largest, fabs(x - y) / v_largest);
        }
    }
    if (scene.input == INPUT_RANDOM || scene.input == INPUT_NEEDLE) {
        struct winnow_selection sel = unit->sel;
        memcpy(unit->rho, of->rho, sizeof unit->rho);
        ref->select_more(&sel, unit->rho, mass, 0, unit->scratch);
        for (uint32_t g = 0; g < group(); g++)
            CHECK_NEAR(of->mass[g], mass[g], 2e-3);
    }
    winnow_alloc_free(out);
}

static uint32_t n_units_more;

/* rho of a unit that was selected and attended whole, as ref prices it. */
static void rho_check(uint32_t u, const struct winnow_gpu_unit *of)
{
    struct unit *unit = &scene.unit[u];
    struct winnow_selection sel = unit->sel;
    uint8_t *selected = case_alloc(unit->n_blocks + 1);
    float rho[WINNOW_GQA_MAX], mass[WINNOW_GQA_MAX];

    memcpy(selected, unit->selected, unit->n_blocks);
    for (uint32_t b = 0; b < unit->n_blocks; b++)
        selected[b] = selected[b] == 1; /* before the second round */
    sel.selected = selected;
    ref->select_more(&sel, rho, mass, 1, unit->scratch);
    for (uint32_t g = 0; g < group(); g++)
        CHECK_NEAR(of->rho[g], rho[g], 2e-3 * (double)rho[g]);
    winnow_alloc_free(selected);
}

/* Estimates of query head g that the second round added, from keys of `least` on. */
static double more_sum(const struct unit *unit, const struct winnow_gpu_unit *of, uint32_t g,
                       double least)
{
    double sum = 0;

    for (uint32_t b = 0; b < unit->n_blocks; b++)
        if (unit->selected[b] == 2 && (double)unit->ln_key[b] >= least)
            sum += exp((double)unit->ln_e[b * group() + g] - (double)of->largest[g]);
    return sum;
}

/* The second round read on in key order, by bins of 1/64 nat, until every query head had what it
 * needed, or the budget was spent. */
static void more_check(uint32_t u, const struct winnow_gpu_unit *of)
{
    const struct unit *unit = &scene.unit[u];
    uint32_t n_max = scene.n_blocks_max ? scene.n_blocks_max : unit->n_blocks, n_new = 0;
    bool is_capped = of->n_selected + of->n_more == n_max && n_max < unit->n_blocks;
    bool is_enough = true, is_less_enough = true;
    double smallest = INFINITY, largest_out = -INFINITY;

    for (uint32_t b = 0; b < unit->n_blocks; b++) {
        double key = (double)unit->ln_key[b];
        if (unit->selected[b] == 2)
            smallest = fmin(smallest, key), n_new++;
        else if (!unit->selected[b])
            largest_out = fmax(largest_out, key);
    }
    for (uint32_t g = 0; g < group(); g++) {
        double need = (double)of->need[g];
        double slack = 1e-5 * need + unit->n_blocks * 0x1p-71 * (double)of->total[g];
        is_enough &= more_sum(unit, of, g, -INFINITY) >= need - slack;
        is_less_enough &= more_sum(unit, of, g, smallest + 1.01 / 64) >= need + slack;
    }
    bool is_open = smallest < (double)of->more_threshold - 15.9; /* all below is one bin */
    CHECK_EQ(n_new, of->n_more);
    CHECK(of->n_selected + of->n_more <= n_max);
    CHECK(largest_out <= smallest + (is_capped ? 1.01 / 64 : 0));
    CHECK(is_capped || (is_enough && (is_open || !is_less_enough)));
    n_units_more++;
}

static void certificate_check(uint32_t i, const struct winnow_gpu_unit *units)
{
    struct winnow_gpu_certificate c;
    uint32_t n_device = 0, n_host = 0, n_unfit = 0, n_disk = 0, n_rounds = 1;
    float least = INFINITY;

    from_device(&c, scene.certificate[i], sizeof c);
    for (uint32_t h = 0; h < N_HEADS; h++) {
        const struct winnow_gpu_unit *unit = units + i * N_HEADS + h;
        for (uint32_t g = 0; g < group(); g++)
            least = fminf(least, unit->mass[g]);
        n_device += unit->n_device;
        n_host += unit->n_host;
        n_unfit += unit->n_unfit;
        n_disk += unit->n_disk;
        if (unit->n_more)
            n_rounds = 2;
    }
    CHECK_EQ(c.status, 0);
    CHECK_EQ(c.n_rounds, n_rounds);
    CHECK(c.mass_reached == least && c.mass_mean >= least && c.mass_mean <= 1);
    CHECK_EQ(c.n_blocks_device, n_device);
    CHECK_EQ(c.n_blocks_host, n_host);
    CHECK_EQ(c.n_blocks_unfit, n_unfit);
    CHECK_EQ(c.n_blocks_disk, n_disk);
}

static void scene_check(bool is_rho_known)
{
    struct winnow_gpu_unit units[N_UNITS];
    uint8_t *out = case_alloc(out_bytes() + 2 * GUARD);
    float *lse = case_alloc(N_HEADS * group() * sizeof(float));

    from_device(units, scene.view.unit, sizeof units);
    for (uint32_t u = 0; u < N_UNITS; u++)
        from_device(scene.unit[u].selected, scene.view.selected + units[u].block_first,
                    scene.unit[u].n_blocks);
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        from_device(out, scene.out[i], out_bytes() + 2 * GUARD);
        from_device(lse, scene.lse[i], N_HEADS * group() * sizeof(float));
        for (uint32_t at = 0; at < GUARD; at++)
            CHECK(out[at] == 0xa5 && out[GUARD + out_bytes() + at] == 0xa5);
        for (uint32_t h = 0; h < N_HEADS; h++) {
            unit_check(i * N_HEADS + h, out + GUARD, lse, &units[i * N_HEADS + h]);
            if (units[i * N_HEADS + h].n_more)
                more_check(i * N_HEADS + h, &units[i * N_HEADS + h]);
            if (is_rho_known)
                rho_check(i * N_HEADS + h, &units[i * N_HEADS + h]);
        }
        certificate_check(i, units);
    }
    winnow_alloc_free(out);
    winnow_alloc_free(lse);
}

#define CASE(name, n_q, k_width, v_width, dtype) KERNEL_CASE(name, n_q, k_width, v_width, dtype)

static const struct kernel_case cases[] = {
    CASE("llama", 4, 128, 128, WINNOW_BF16),      CASE("smollm2", 3, 64, 64, WINNOW_FP16),
    CASE("qwen", 7, 128, 128, WINNOW_FP16),       CASE("narrow-v", 2, 192, 112, WINNOW_BF16),
    CASE("one-to-one", 1, 256, 256, WINNOW_FP16), CASE("one-to-16", 16, 80, 48, WINNOW_FP16),
    CASE("widest", 16, 256, 256, WINNOW_BF16),    CASE("smallest", 1, 16, 16, WINNOW_BF16),
    CASE("eight", 8, 64, 128, WINNOW_BF16),       CASE("narrow-16", 9, 48, 64, WINNOW_BF16),
};

static void lengths(uint32_t a, uint64_t a_tail, uint32_t b, uint64_t b_tail)
{
    scene.n_segments[0] = a;
    scene.n_segments[1] = b;
    scene.n_tokens[0] = (uint64_t)a * SPAN * 16 + a_tail;
    scene.n_tokens[1] = (uint64_t)b * SPAN * 16 + b_tail;
}

/* Every form, every input, whatever the blocks' places: outputs, ln z, ln m, certificate and rho are
 * the reference's. */
static void test_attend__is_as_ref(void)
{
    static const uint32_t io[] = {WINNOW_FP32, WINNOW_BF16, WINNOW_FP16};
    static const struct places places[] = {{0, 0, 0}, {40, 10, 0}, {100, 0, 0}};

    for (uint32_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int input = 0; input < N_INPUTS; input++) {
            if (c >= 2 && input != INPUT_RANDOM &&
                input != 1 + (int)(test_seed() + c) % (N_INPUTS - 1))
                continue;
            lengths(c == 0 ? 14 : 3, 16 + 301, 2, 16 + 48);
            scene.n_blocks_max = 0;
            bool is_wide = input == INPUT_HUGE || input == INPUT_OVERFLOW;
            scene_init(&cases[c], (enum kernel_input)input, is_wide ? WINNOW_FP32 : io[c % 3], 0.9f,
                       test_seed() + 17 * c);
            launch(&places[(c + (uint32_t)input) % 3], 1 + c, test_seed());
            scene_check(input == INPUT_RANDOM);
            scene_finish();
        }
    printf("largest error, fp32 out, random input: %.3g of the largest value\n", error_largest);
}

/* Nothing sealed, no block selected, everything selected, a budget: the ends of every range. */
static void test_attend__ends_of_ranges(void)
{
    static const struct places places = {50, 10, 0};
    static const struct {
        uint32_t a, b, n_blocks_max;
        uint64_t a_tail, b_tail;
        float mass;
    } tries[] = {{0, 0, 0, 5, 16, 0.9f},    {0, 1, 0, 330, 17, 0.9f},  {2, 1, 0, 17, 33, 0.9999f},
                 {3, 1, 0, 100, 77, 1e-6f}, {14, 13, 5, 64, 17, 0.9f}, {5, 6, 1, 300, 31, 0.5f}};

    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        lengths(tries[i].a, tries[i].a_tail, tries[i].b, tries[i].b_tail);
        scene.n_blocks_max = tries[i].n_blocks_max;
        scene_init(&cases[i % 2], INPUT_RANDOM, WINNOW_FP32, tries[i].mass, test_seed() + i);
        launch(&places, 32, test_seed());
        scene_check(false);
        scene_finish();
    }
    scene.n_blocks_max = 0;
}

/* Hits, misses and blocks without a slot in any mixture, 1 to 64 fetching thread blocks: one result,
 * to the bit. */
static void test_attend__bits_do_not_depend_on_places(void)
{
    enum { N_RUNS = 100 };
    struct winnow_gpu_unit units[N_UNITS], units_again[N_UNITS];
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    lengths(14, 16 + 301, 9, 16 + 48);
    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP32, 0.9f, test_seed());
    uint8_t *first = case_alloc(N_ITEMS * out_bytes()), *again = case_alloc(N_ITEMS * out_bytes());
    for (uint32_t run = 0; run < N_RUNS; run++) {
        struct places places = {(uint32_t)winnow_rng_below(&rng, 90),
                                (uint32_t)winnow_rng_below(&rng, 10), 0};
        launch(&places, 1 + (uint32_t)winnow_rng_below(&rng, 64), test_seed() + run);
        for (uint32_t i = 0; i < N_ITEMS; i++)
            from_device(again + i * out_bytes(), scene.out[i] + GUARD, out_bytes());
        from_device(units_again, scene.view.unit, sizeof units_again);
        if (run == 0) {
            memcpy(first, again, N_ITEMS * out_bytes());
            memcpy(units, units_again, sizeof units);
        }
        CHECK(!memcmp(first, again, N_ITEMS * out_bytes()));
        for (uint32_t u = 0; u < N_UNITS; u++)
            CHECK(!memcmp(units[u].mass, units_again[u].mass, sizeof units[u].mass) &&
                  !memcmp(units[u].rho, units_again[u].rho, group() * sizeof(float)));
    }
    scene_check(true);
    scene_finish();
    winnow_alloc_free(first);
    winnow_alloc_free(again);
}

/* Where estimates promise too much, short units read on as far as they need or the budget goes: results
 * as ref's over what was read, and the same bits whatever the first round's places. */
static void test_attend__overrated_blocks(void)
{
    static const struct places places[] = {{0, 0, 0}, {40, 10, 0}, {100, 0, 0}};
    static const struct {
        uint32_t of, n_blocks_max;
        float mass;
    } tries[] = {{0, 0, 0.9f}, {1, 0, 0.6f}, {5, 0, 0.8f}, {6, 0, 0.95f}, {0, 120, 0.9f}};

    scene.is_overrated = true;
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        lengths(14, 16 + 301, 13, 16 + 48);
        scene.n_blocks_max = tries[i].n_blocks_max;
        scene_init(&cases[tries[i].of], INPUT_RANDOM, WINNOW_FP32, tries[i].mass, test_seed() + i);
        size_t n_bytes = out_bytes();
        uint8_t *first = case_alloc(n_bytes), *again = case_alloc(n_bytes);
        for (uint32_t run = 0; run < 6; run++) {
            launch(&places[run % 3], 1 + 7 * run, test_seed() + run);
            if (run == 0)
                scene_check(true);
            from_device(run == 0 ? first : again, scene.out[0] + GUARD, n_bytes);
            CHECK(run == 0 || !memcmp(first, again, n_bytes));
        }
        winnow_alloc_free(first);
        winnow_alloc_free(again);
        scene_finish();
    }
    scene.n_blocks_max = 0;
    scene.is_overrated = false;
    printf("%u units read more\n", n_units_more);
}

/* A block on disk is compensated and counted; all that no slot holds are named. */
static void test_attend__compensates_what_is_on_disk(void)
{
    static const struct places places = {30, 5, 25};
    struct winnow_gpu_unit units[N_UNITS];
    uint32_t disk_block[N_BLOCKS_MAX * N_HEADS];

    lengths(9, 16 + 30, 3, 16 + 48);
    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP32, 0.9f, test_seed());
    launch(&places, 8, test_seed());
    scene_check(false);
    from_device(units, scene.view.unit, sizeof units);
    for (uint32_t i = 0; i < N_ITEMS; i++) {
        uint32_t n = 0;
        from_device(disk_block, scene.disk_block[i], N_BLOCKS_MAX * sizeof *disk_block);
        for (uint32_t h = 0; h < N_HEADS; h++) {
            const struct unit *unit = &scene.unit[i * N_HEADS + h];
            for (uint32_t l = 0; l < unit->sel.n_selected; l++)
                if (unit->listed[l].place & WINNOW_GPU_FROM_HOST) /* or on disk */
                    CHECK_EQ(disk_block[n++], h * unit->n_blocks + unit->listed[l].block);
        }
        CHECK(n > 0);
    }
    scene_finish();
}

static void out_check_nan(uint32_t i, uint32_t status)
{
    struct winnow_gpu_certificate c;
    uint8_t *out = case_alloc(out_bytes());

    from_device(&c, scene.certificate[i], sizeof c);
    from_device(out, scene.out[i] + GUARD, out_bytes());
    CHECK_EQ(c.status, status);
    for (size_t at = 0; at < out_bytes() / io_bytes(); at++)
        CHECK(isnan(io_read(out, at)));
    winnow_alloc_free(out);
}

/* Values of sinks and tail become 1.2e30, beyond fp16. */
static void values_enlarge(void)
{
    const struct winnow_gpu_view *view = &scene.view;
    size_t v_at = (size_t)32 * view->k_width;

    for (size_t at = 0; at < N_ITEMS * view->session_bytes; at += view->block_bytes)
        CUDA(cudaMemset(view->tails + at + v_at, 0x71, view->block_bytes - v_at));
}

/* NaN in q, k or v, or an output that overflows, fails its item, and no other. */
static void test_attend__not_finite_fails_its_item(void)
{
    static const struct places places = {30, 5, 0};
    const float hostile[] = {NAN, INFINITY, -INFINITY};
    struct winnow_gpu_unit units[N_UNITS];

    lengths(2, 16 + 30, 3, 16 + 48);
    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP32, 0.9f, test_seed());
    for (uint32_t what = 0; what < 3; what++) {
        const void *of[] = {scene.launch->item[0].q, scene.launch->item[0].k,
                            scene.launch->item[0].v};
        float *at = (float *)(uintptr_t)of[what] + 5, kept;
        from_device(&kept, at, sizeof kept);
        to_device(at, &hostile[what], sizeof kept);
        launch(&places, 8, test_seed());
        out_check_nan(0, EDOM);
        from_device(units, scene.view.unit, sizeof units);
        certificate_check(1, units);
        to_device(at, &kept, sizeof kept);
    }
    launch(&places, 8, test_seed());
    scene_check(true);
    scene_finish();

    scene_init(&cases[0], INPUT_RANDOM, WINNOW_FP16, 0.9f, test_seed());
    values_enlarge();
    launch(&places, 8, test_seed());
    out_check_nan(0, EDOM);
    out_check_nan(1, EDOM);
    scene_finish();
}

int main(int argc, char **argv)
{
    int n_devices = 0;

    TEST_INIT(argc, argv);
    ref = winnow_kernels_ref();
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0)
        TEST_SKIP("no CUDA device");
    TEST_RUN(test_attend__is_as_ref);
    TEST_RUN(test_attend__ends_of_ranges);
    TEST_RUN(test_attend__bits_do_not_depend_on_places);
    TEST_RUN(test_attend__overrated_blocks);
    TEST_RUN(test_attend__compensates_what_is_on_disk);
    TEST_RUN(test_attend__not_finite_fails_its_item);
    return TEST_END();
}
