/*
 * Scan and select as single stages, held against kernels/ref: estimates
 * within 1e-4 + 1e-6 |x| and what fp32 sums may differ by, the same bits for any grid and batch;
 * selections by their definition (gpu_selection.cuh).
 */
extern "C" {
#include <bench/trace.h>
}
#include "gpu_selection.cuh"

/* How far apart two fp32 sums may lie, and whether one may overflow. */
static double logit_slack(const batch &b, host_index &index, uint32_t block, const float *q)
{
    uint32_t width = b.s.view.k_width;
    double sum = 0, sum_q = 0, scale = 0;

    for (uint32_t d = 0; d < width; d++) {
        sum += fabs((double)q[d] * index.centroid[block * width + d]);
        sum_q += fabs((double)q[d]);
    }
    for (uint32_t t = 0; t < 16; t++) {
        __half_raw bits;
        bits.x = index.code_scale[block * 16 + t];
        scale = fmax(scale, (double)__half2float(__half(bits)));
    }
    return b.s.view.softmax_scale *
           (sum * fmax((double)index.head[block].centroid_scale, 1) + 7 * scale * sum_q);
}

static void check_unit_scan(batch *b, uint32_t unit, const char *what, const float *ln_e)
{
    const winnow_gpu_view *v = &b->s.view;
    uint32_t heads = v->n_kv_heads, head = unit % heads, n = v->span_blocks;
    winnow_model_shape shape = model_shape(b->s);
    const float *q = b->q[unit / heads].data() + (size_t)head * v->n_group * v->k_width;
    std::vector<float> want(n * v->n_group);

    for (uint32_t j = 0; j < b->segments[unit / heads].size(); j++) {
        host_index &index = b->index[b->segments[unit / heads][j] * heads + head];
        winnow_index_view view = index.view();
        winnow_kernels_ref()->score(&shape, WINNOW_POLICY_CODES, &view, q, want.data(), nullptr);
        for (uint32_t i = 0; i < n * v->n_group; i++) {
            float x = ln_e[(size_t)j * n * v->n_group + i], y = want[i];
            double slack = logit_slack(*b, index, i / v->n_group, q + i % v->n_group * v->k_width);
            uint32_t bits;
            memcpy(&bits, &x, 4);
            EXPECT(bits != 0xffffffff, "%s: unit %u, block %u not written", what, unit, i);
            if (slack > 1e36)
                continue;
            EXPECT((x < INFINITY) == (y < INFINITY), "%s: unit %u: %g, ref %g", what, unit, x, y);
            double tolerance = 1e-4 + 1e-6 * fabs(y) + 0x1p-20 * slack;
            EXPECT(!(y < INFINITY) || fabs((double)x - y) <= tolerance,
                   "%s: unit %u, block %u, head %u: %.9g, ref %.9g +- %.3g", what, unit,
                   j * n + i / v->n_group, i % v->n_group, x, y, tolerance);
        }
    }
}

/* Every estimate; then the same bits from other grids and of items alone. */
static void check_scan(batch *b, const char *what)
{
    const winnow_gpu_view *v = &b->s.view;
    static winnow_gpu_item items[WINNOW_GPU_ITEMS_MAX];

    scene_launch_write(&b->s, b->n_items, 1);
    std::vector<float> ln_e = batch_scan(b, b->s.grid.n_multiprocessors);
    memcpy(items, b->s.launch->item, sizeof items);
    for (uint32_t unit = 0; unit < b->s.launch->n_units; unit++) {
        uint32_t item = unit / v->n_kv_heads, head = unit % v->n_kv_heads;
        uint32_t n = items[item].n_segments * v->span_blocks;
        size_t first = b->s.launch->block_first[item] + (size_t)head * n;
        check_unit_scan(b, unit, what, ln_e.data() + first * v->n_group);
    }
    for (uint32_t grid : {1u, 7u})
        EXPECT(!memcmp(batch_scan(b, grid).data(), ln_e.data(), ln_e.size() * 4),
               "%s: other bits from %u thread blocks", what, grid);
    size_t at = 0;
    for (uint32_t i = 0; i < b->n_items; i++) {
        size_t n = (size_t)items[i].n_segments * v->span_blocks * v->n_kv_heads * v->n_group;
        b->s.launch->item[0] = items[i];
        scene_launch_write(&b->s, 1, 1);
        EXPECT(!memcmp(batch_scan(b, b->s.grid.n_multiprocessors).data(), &ln_e[at], n * 4),
               "%s: other bits of item %u alone", what, i);
        at += n;
    }
    memcpy(b->s.launch->item, items, sizeof items);
}

/* Estimates as ref's, for any grid and batch with the same bits; selections by their definition. Every
 * width and ratio of the list, hostile input too. */
static void test_gpu_scan__as_ref(void)
{
    static const uint32_t shapes[][3] = {
        {4, 128, WINNOW_BF16}, {3, 64, WINNOW_FP16},  {7, 128, WINNOW_FP16},
        {8, 128, WINNOW_FP32}, {16, 80, WINNOW_FP16}, {1, 256, WINNOW_BF16},
        {2, 192, WINNOW_FP32}, {1, 16, WINNOW_FP32},  {16, 256, WINNOW_BF16},
        {12, 96, WINNOW_FP32}, {5, 208, WINNOW_BF16}, {6, 112, WINNOW_FP16}};
    random_source random(test_seed());
    bool is_small = getenv("WINNOW_TEST_SMALL");
    int n = 0;

    for (const uint32_t *shape : shapes)
        for (int input = 0; input < N_INPUTS; input++) {
            if (shape[2] == WINNOW_FP16 && (input == OVERFLOWING || input == TINY))
                continue;
            if (is_small && (shape != shapes[0] || input > 0))
                continue;
            if (shape != shapes[0] && shape != shapes[1] && input % 3 != n++ % 3)
                continue;
            scene_options options = {2,  2, shape[0], shape[1], 32,          shape[2], 16,
                                     10, 7, 10,       7,        7 * 2 * 160, 4000};
            std::vector<float> centre;
            char what[64];
            batch b;
            snprintf(what, sizeof what, "G %u, width %u, %s", shape[0], shape[1],
                     check_input_name[input]);
            batch_init(&b, options, random, (check_input)input, {3, 0, 1, 10, 7, 1, 2}, &centre);
            queries_fill(&b, random, (check_input)input, centre);
            check_scan(&b, what);
            check_select(&b, random, what);
            batch_finish(&b);
        }
}

/* Units that several thread blocks share, beside short ones: the same selection from any number. */
static void test_gpu_scan__long_units_by_any_team(void)
{
    random_source random(test_seed());
    scene_options options = {2, 1, 4, 64, 32, WINNOW_BF16, 64, 144, 2, 140, 2, 8 * 143 * 64, 3000};
    std::vector<float> centre;
    batch b;

    batch_init(&b, options, random, RANDOM, {140, 3}, &centre);
    queries_fill(&b, random, RANDOM, centre);
    check_scan(&b, "long");
    check_select(&b, random, "long");
    for (uint32_t stamp = 100; stamp < 140; stamp += 4) {
        for (uint32_t i = 0; i < b.n_items; i++) {
            b.s.launch->item[i].mass = stamp % 8 ? 0.5f : 0.95f;
            b.s.launch->item[i].n_blocks_max = stamp < 120 ? 0 : 1 + (uint32_t)random() % 3000;
        }
        downloaded one = batch_select(&b, stamp, 1);
        scene_fetched(b.s, 0);
        for (uint32_t i = 1; i <= 3; i++) {
            uint32_t ranks = 1u << i;
            downloaded d = batch_select(&b, stamp + i, ranks * (uint32_t)one.unit.size());
            scene_fetched(b.s, 0);
            for (uint32_t u = 0; u < d.unit.size(); u++)
                EXPECT(same_selection(one, d, u), "unit %u: %u thread blocks select other blocks",
                       u, ranks);
            check_work(d, "long");
            check_places(&b, d, "long");
        }
    }
    batch_finish(&b);
}

/* Many launches over few slots, sessions sharing segments: each listed block is where it is said to
 * be, and hits and misses add up. */
static void test_gpu_scan__few_slots_many_launches(void)
{
    random_source random(test_seed());

    for (uint32_t n_slots : {0u, 5u, 64u, 300u, 5000u}) {
        scene_options options = {2, 2, 4, 64, 64,          WINNOW_FP32, 64,
                                 8, 6, 4, 6,  6 * 2 * 256, n_slots};
        std::vector<float> centre;
        batch b;
        batch_init(&b, options, random, RANDOM, {4, 4, 4, 4, 3, 2}, &centre);
        uint64_t n_listed = 0;
        for (uint32_t stamp = 5; stamp < 45; stamp++) {
            queries_fill(&b, random, RANDOM, centre);
            for (uint32_t i = 0; i < b.n_items; i++)
                b.s.launch->item[i].mass = stamp % 8 ? 0.5f : 0.95f;
            downloaded d = batch_select(&b, stamp);
            check_work(d, "cache");
            check_places(&b, d, "cache");
            for (const winnow_gpu_unit &unit : d.unit)
                n_listed += unit.n_selected;
            scene_fetched(b.s, 0);
        }
        winnow_gpu_counters c = device_read(b.s.view.counters, 2)[1];
        EXPECT(c.n_hits + c.n_misses == n_listed, "cache of %u: counters", n_slots);
        batch_finish(&b);
    }
}

/* Segments of 1,024 tokens after the sinks; the queries of several steps, a launch each. Returns what
 * was read over what ref reads. */
static double check_trace(const winnow_trace &trace)
{
    uint32_t n_segments = (trace.n_tokens - 16) / 1024, width = trace.width;
    scene_options options = {1,          1, trace.n_q,  width, width,           WINNOW_FP32,    64,
                             n_segments, 1, n_segments, 1,     n_segments * 64, n_segments * 64};
    random_source random(1);
    batch b;
    double n_selected = 0, n_ref = 0;
    std::vector<float> centre;

    batch_init(&b, options, random, RANDOM, {n_segments}, &centre);
    for (uint32_t i = 0; i < n_segments; i++) {
        const float *k = trace.k + (size_t)(16 + 1024 * i) * width;
        const float *v = trace.v + (size_t)(16 + 1024 * i) * width;
        b.index[i] = host_index();
        index_build(b.s, std::vector<float>(k, k + 1024 * width),
                    std::vector<float>(v, v + 1024 * width), &b.index[i]);
        index_write(b.s, i, 0, 0, &b.index[i]);
    }
    for (uint32_t step = 0; step < trace.n_steps; step += 8) {
        const float *q = trace.q + (size_t)step * trace.n_q * width;
        b.q[0].assign(q, q + trace.n_q * width);
        device_write((float *)b.q_device[0], q, trace.n_q * width);
        check_scan(&b, trace.name);
        scene_launch_write(&b.s, 1, step + 1);
        std::vector<float> ln_e = batch_scan(&b, b.s.grid.n_multiprocessors);
        b.ln_z.assign(trace.n_q, -INFINITY);
        downloaded d = batch_select(&b, step + 1);
        check_unit_select(b, d, 0, trace.name);
        uint32_t n = b.s.launch->n_blocks;
        std::vector<float> key(n);
        std::vector<uint32_t> idx(n);
        std::vector<uint8_t> selected(n);
        std::vector<uint64_t> scratch(2 * n);
        winnow_selection sel = {};
        sel.n_q = trace.n_q;
        sel.n_blocks = sel.n_blocks_max = n;
        sel.mass = 0.9f;
        sel.ln_z = b.ln_z.data();
        sel.ln_e = ln_e.data();
        sel.ln_key = key.data();
        sel.block_idx = idx.data();
        sel.selected = selected.data();
        winnow_kernels_ref()->select(WINNOW_POLICY_CODES, &sel, scratch.data());
        EXPECT(d.unit[0].n_selected >= sel.n_selected, "%s, step %u: %u, ref %u", trace.name, step,
               d.unit[0].n_selected, sel.n_selected);
        n_selected += d.unit[0].n_selected;
        n_ref += sel.n_selected;
        scene_fetched(b.s, 0);
    }
    batch_finish(&b);
    return n_selected / n_ref;
}

/* Real attention: no less than ref reads, and no more than the rest of a bin beyond it. */
static void test_gpu_scan__traces_as_ref(void)
{
    winnow_trace_list list;

    CHECK_EQ(winnow_trace_list_open("tests/golden/traces", &list), 0);
    for (uint32_t i = 0; i < list.n_paths; i++) {
        winnow_trace trace;
        CHECK_EQ(winnow_trace_open(list.path[i], &trace), 0);
        double share = check_trace(trace);
        printf("   %s: %.2f %% more blocks than ref\n", trace.name, 100 * (share - 1));
        EXPECT(share < 1.03, "%s: %.2f %% more blocks than ref", trace.name, 100 * (share - 1));
        winnow_trace_close(&trace);
    }
    winnow_trace_list_close(&list);
}

int main(int argc, char **argv)
{
    int n_devices = 0;

    TEST_INIT(argc, argv);
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0)
        TEST_SKIP("no cuda device");
    TEST_RUN(test_gpu_scan__as_ref);
    TEST_RUN(test_gpu_scan__long_units_by_any_team);
    TEST_RUN(test_gpu_scan__few_slots_many_launches);
    TEST_RUN(test_gpu_scan__traces_as_ref);
    return TEST_END();
}
