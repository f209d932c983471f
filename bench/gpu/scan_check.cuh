/*
 * Scan, select and resolve held against kernels/ref: estimates within 1e-4 + 1e-6 |x| and what fp32
 * sums may differ by, the same bits for any grid and batch; selections by their definition, in
 * fp64; places by what the slots' words then say. Outputs are poisoned first.
 */
#pragma once

#include "scene.cuh"

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <kernels/cuda/stage.h>
#include <map>
#include <math.h>
#include <random>
#include <set>

static int n_failures; /* of each line the first three are printed */
#define EXPECT(condition, ...)                                                                     \
    do {                                                                                           \
        static int n_here;                                                                         \
        if (condition)                                                                             \
            break;                                                                                 \
        n_failures++;                                                                              \
        if (n_here++ < 3) {                                                                        \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                        \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fprintf(stderr, "\n");                                                                 \
        }                                                                                          \
    } while (0)

enum check_input { RANDOM, NEEDLE, EQUAL, HUGE_NUMBERS, OVERFLOWING, TINY, DENORMAL, N_INPUTS };
static const char *const check_input_name[N_INPUTS] = {"random",   "needle", "equal",   "huge",
                                                       "overflow", "tiny",   "denormal"};

typedef std::mt19937_64 random_source;

static float normal(random_source &random)
{
    return std::normal_distribution<float>()(random);
}

/* A host index and its memory. */
struct host_index {
    std::vector<winnow_block_head> head;
    std::vector<int8_t> centroid, vmean;
    std::vector<uint8_t> code;
    std::vector<uint16_t> code_scale;
    std::vector<float> mean_k, mean_v;
    float v_max;
    std::vector<uint32_t> home;

    winnow_index_view view()
    {
        return {(uint32_t)head.size(), head.data(), centroid.data(), vmean.data(),  code.data(),
                code_scale.data(),     nullptr,     mean_k.data(),   mean_v.data(), &v_max};
    }
};

static winnow_model_shape model_shape(const scene &s)
{
    return {s.view.n_layers, s.view.n_q_heads, s.view.n_kv_heads,
            s.view.k_width,  s.view.v_width,   s.view.softmax_scale,
            s.view.kv_dtype, s.view.io_dtype,  WINNOW_BLOCK_LAYOUT};
}

static void index_build(const scene &s, const std::vector<float> &k, const std::vector<float> &v,
                        host_index *index)
{
    const winnow_kernels *ref = winnow_kernels_ref();
    winnow_model_shape shape = model_shape(s);
    uint32_t n = s.view.span_blocks;
    std::vector<uint16_t> order(16 * n);
    void *scratch = aligned_alloc(64, (ref->scratch_bytes(&shape, n) + 63) / 64 * 64);

    index->head.resize(n);
    index->centroid.resize((size_t)n * shape.k_width);
    index->vmean.resize((size_t)n * shape.v_width);
    index->code.resize((size_t)n * shape.k_width * 8);
    index->code_scale.resize(n * 16);
    index->mean_k.resize(shape.k_width);
    index->mean_v.resize(shape.v_width);
    index->home.resize(n);
    winnow_index_view view = index->view();
    int rc = ref->build(&shape, n, k.data(), v.data(), order.data(), &view, scratch);
    EXPECT(rc == 0, "build %d", rc);
    free(scratch);
}

static void index_write(const scene &s, uint32_t segment, uint32_t layer, uint32_t head,
                        host_index *index)
{
    std::vector<uint8_t> packed(s.view.unit_bytes);
    winnow_index_view view = index->view();

    winnow_gpu_index_pack(&s.view, &view, index->home.data(), packed.data());
    device_write(s.view.index + segment * s.view.segment_bytes +
                     (size_t)(layer * s.view.n_kv_heads + head) * s.view.unit_bytes,
                 packed.data(), packed.size());
}

/* The numbers of q as the wire's type holds them, and the bytes. */
static std::vector<uint8_t> query_bytes(uint32_t dtype, std::vector<float> *q)
{
    std::vector<uint8_t> bytes(q->size() * 4);

    for (size_t i = 0; i < q->size(); i++)
        if (dtype == WINNOW_FP16) {
            __half x = __float2half_rn((*q)[i]);
            memcpy(&bytes[2 * i], &x, 2);
            (*q)[i] = __half2float(x);
        } else if (dtype == WINNOW_BF16) {
            __nv_bfloat16 x = __float2bfloat16_rn((*q)[i]);
            memcpy(&bytes[2 * i], &x, 2);
            (*q)[i] = __bfloat162float(x);
        } else
            memcpy(&bytes[4 * i], &(*q)[i], 4);
    return bytes;
}

/* A batch: sessions with lists of segments, one KV index a (segment, head) of layer `layer`. */
struct batch {
    scene s;
    uint32_t layer, n_items;
    std::vector<std::vector<uint32_t>> segments; /* [session] */
    std::vector<host_index> index;               /* [segment][head] */
    std::vector<std::vector<float>> q;           /* [item][Hq x d] */
    std::vector<void *> q_device;
    std::vector<float> ln_z; /* [unit][G] */
};

static uint32_t batch_block(const batch &b, uint32_t unit, uint32_t block, uint32_t *segment)
{
    *segment = b.segments[unit / b.s.view.n_kv_heads][block / b.s.view.span_blocks];
    return block % b.s.view.span_blocks;
}

static uint32_t batch_home(batch &b, uint32_t unit, uint32_t block, uint32_t *ret_id)
{
    uint32_t segment, i = batch_block(b, unit, block, &segment), heads = b.s.view.n_kv_heads;
    uint32_t head = unit % heads;
    *ret_id = ((segment * b.s.view.n_layers + b.layer) * heads + head) * b.s.view.span_blocks + i;
    return b.index[segment * heads + head].home[i];
}

/* Keys of topics, so that blocks differ; hostile ones on top. */
static void keys_fill(random_source &random, check_input input, uint32_t width,
                      const std::vector<float> &centre, std::vector<float> *k)
{
    size_t n = k->size() / width, topic = 0;

    for (size_t t = 0; t < n; t++) {
        if (random() % 16 == 0)
            topic = random() % 8;
        for (uint32_t d = 0; d < width; d++) {
            float x = centre[topic * width + d] + 0.5f * normal(random);
            x = input == EQUAL ? centre[d] : x;
            x *= input == HUGE_NUMBERS || input == OVERFLOWING ? 1e4f : 1;
            x *= input == TINY ? 1e-3f : input == DENORMAL ? 1e-6f : 1;
            (*k)[t * width + d] = x;
        }
    }
}

static void queries_fill(batch *b, random_source &random, check_input input,
                         const std::vector<float> &centre)
{
    uint32_t width = b->s.view.k_width;

    for (uint32_t i = 0; i < b->n_items; i++) {
        uint32_t topic = (uint32_t)(random() % 8);
        for (uint32_t j = 0; j < b->s.view.n_q_heads * width; j++) {
            float x = 0.5f * centre[topic * width + j % width] + normal(random);
            x *= input == NEEDLE ? 8 : input == HUGE_NUMBERS ? 1e3f : 1;
            x *= input == OVERFLOWING ? 1e36f : input == TINY ? 1e-25f : 1;
            b->q[i][j] = x;
        }
        std::vector<uint8_t> bytes = query_bytes(b->s.view.io_dtype, &b->q[i]);
        device_write((uint8_t *)b->q_device[i], bytes.data(), bytes.size());
    }
}

static void batch_init(batch *b, const scene_options &options, random_source &random,
                       check_input input, const std::vector<uint32_t> &n_segments,
                       std::vector<float> *centre)
{
    const winnow_gpu_view *v = &b->s.view;
    uint32_t tokens = options.span_blocks * 16, max = options.n_session_segments_max;

    scene_init(&b->s, options);
    b->layer = options.n_layers - 1;
    b->n_items = (uint32_t)n_segments.size();
    centre->resize(8 * options.k_width);
    for (float &x : *centre)
        x = normal(random);
    b->index.resize(options.n_segments * options.n_kv_heads);
    std::vector<float> k(tokens * v->k_width), values(tokens * v->v_width);
    for (uint32_t i = 0; i < b->index.size(); i++) {
        keys_fill(random, input, v->k_width, *centre, &k);
        for (float &x : values)
            x = normal(random);
        index_build(b->s, k, values, &b->index[i]);
        for (uint32_t j = 0; j < options.span_blocks; j++)
            b->index[i].home[j] = random() % 8 ? i * options.span_blocks + j : WINNOW_GPU_ON_DISK;
        index_write(b->s, i / v->n_kv_heads, b->layer, i % v->n_kv_heads, &b->index[i]);
    }
    for (uint32_t i = 0; i < b->n_items; i++) {
        std::vector<uint32_t> all(options.n_segments);
        for (uint32_t j = 0; j < all.size(); j++)
            all[j] = j;
        std::shuffle(all.begin(), all.end(), random);
        all.resize(n_segments[i]);
        b->segments.push_back(all);
        device_write(v->session_segments + i * max, all.data(), all.size());
        b->q.push_back(std::vector<float>(v->n_q_heads * v->k_width));
        b->q_device.push_back(device_alloc<float>(v->n_q_heads * v->k_width));
        winnow_gpu_item *item = &b->s.launch->item[i];
        *item = winnow_gpu_item();
        item->session = i;
        item->layer = b->layer;
        item->n_segments = n_segments[i];
        item->mass = 0.9f;
        item->q = b->q_device[i];
    }
    b->ln_z.resize((size_t)b->n_items * v->n_kv_heads * v->n_group, -INFINITY);
}

static void batch_finish(batch *b)
{
    for (void *q : b->q_device)
        ok(cudaFree(q), "cudaFree");
    scene_finish(&b->s);
}

static std::vector<float> batch_scan(batch *b, uint32_t n_multiprocessors)
{
    size_t n = (size_t)b->s.launch->n_blocks * b->s.view.n_group;
    winnow_gpu_grid grid = b->s.grid;

    grid.n_multiprocessors = n_multiprocessors;
    ok(cudaMemset(b->s.view.ln_e, 0xff, (n + 64) * 4), "poison");
    scene_begin(b->s, 0, 0);
    ok(winnow_gpu_stage_scan(&b->s.view, &grid, 0), "scan");
    ok(cudaDeviceSynchronize(), "scan");
    std::vector<float> ln_e = device_read(b->s.view.ln_e, n + 64);
    for (size_t i = 0; i < 64; i++)
        EXPECT(!memcmp(&ln_e[n + i], "\xff\xff\xff\xff", 4), "written behind the end");
    return ln_e;
}

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

/* --- selection --- */

struct downloaded { /* of one launch after select */
    std::vector<float> ln_e, key;
    std::vector<uint8_t> selected;
    std::vector<winnow_gpu_listed> listed;
    std::vector<winnow_gpu_unit> unit;
    std::vector<winnow_gpu_fetch> fetch;
    std::vector<winnow_gpu_work> ready, waiting;
    std::vector<uint64_t> word;
};

static downloaded download(const batch &b, uint32_t round)
{
    const winnow_gpu_view *v = &b.s.view;
    uint32_t n = b.s.launch->n_blocks;
    winnow_gpu_queue queue = device_read(v->queue, 2)[round - 1];

    return {device_read(v->ln_e, (size_t)n * v->n_group),
            device_read(v->key, n),
            device_read(v->selected, n),
            device_read(v->listed, n),
            device_read(v->unit, b.s.launch->n_units),
            device_read(v->fetch, queue.n_fetch),
            device_read(v->ready, queue.n_ready),
            device_read(v->waiting, queue.n_waiting),
            device_read(v->slot_word, (size_t)v->n_layers * v->n_slots_layer)};
}

struct expected { /* of one unit, in fp64 */
    std::vector<double> largest, z, total;
    std::vector<double> key;
    std::vector<bool> is_known;
};

static double mass_of(float ln_e, double largest)
{
    double x = (double)ln_e - largest;
    return ln_e < INFINITY && x >= -80 ? exp(x) : 0;
}

static expected expect_unit(uint32_t n, uint32_t G, const float *ln_e, const float *ln_z)
{
    expected e;

    e.key.resize(n);
    e.is_known.assign(n, true);
    for (uint32_t g = 0; g < G; g++) {
        double largest = ln_z[g], total;
        for (uint32_t b = 0; b < n; b++)
            if (ln_e[b * G + g] < INFINITY)
                largest = fmax(largest, ln_e[b * G + g]);
        e.largest.push_back(largest);
        e.z.push_back(mass_of(ln_z[g], largest));
        total = e.z[g];
        for (uint32_t b = 0; b < n; b++) {
            total += mass_of(ln_e[b * G + g], largest);
            if (!(ln_e[b * G + g] < INFINITY))
                e.is_known[b] = false;
        }
        e.total.push_back(total);
    }
    for (uint32_t b = 0; b < n; b++) {
        double sum = 0;
        for (uint32_t g = 0; g < G; g++)
            sum += e.total[g] > 0 ? mass_of(ln_e[b * G + g], e.largest[g]) / e.total[g] : 0;
        e.key[b] = e.is_known[b] ? log(sum) : INFINITY;
    }
    return e;
}

/* Whether z and the blocks that `in` names hold P of every head, P raised by slack. */
template <class IN>
static bool is_reached(const expected &e, uint32_t n, uint32_t G, const float *ln_e, double mass,
                       double slack, IN in)
{
    for (uint32_t g = 0; g < G; g++) {
        double sum = e.z[g];
        for (uint32_t b = 0; b < n; b++)
            sum += in(b) ? mass_of(ln_e[b * G + g], e.largest[g]) : 0;
        if (sum < (mass + slack) * e.total[g])
            return false;
    }
    return true;
}

static void check_unit_select(const batch &b, const downloaded &d, uint32_t u, const char *what)
{
    const winnow_gpu_unit &unit = d.unit[u];
    const winnow_gpu_item &item = b.s.launch->item[unit.item];
    uint32_t n = unit.n_blocks, G = b.s.view.n_group, n_selected = 0, n_unknown = 0;
    const float *ln_e = &d.ln_e[(size_t)unit.block_first * G], *key = &d.key[unit.block_first];
    const winnow_gpu_listed *listed = &d.listed[unit.block_first];
    expected e = expect_unit(n, G, ln_e, &b.ln_z[u * G]);
    std::vector<bool> is_listed(n);
    float smallest = INFINITY, largest_out = -INFINITY, largest = -INFINITY;

    for (uint32_t i = 0; i < unit.n_selected; i++) {
        EXPECT(listed[i].block < n && (i == 0 || listed[i].block > listed[i - 1].block),
               "%s: unit %u: listed %u is %u", what, u, i, listed[i].block);
        if (listed[i].block < n)
            is_listed[listed[i].block] = true;
    }
    for (uint32_t i = 0; i < n; i++) {
        n_selected += d.selected[unit.block_first + i] == 1;
        n_unknown += !e.is_known[i];
        largest = key[i] < INFINITY ? fmaxf(largest, key[i]) : largest;
        EXPECT(key[i] == e.key[i] || fabs(key[i] - e.key[i]) < 1e-4 || e.key[i] < -70,
               "%s: unit %u: key of %u is %.8g, not %.8g", what, u, i, key[i], e.key[i]);
        if (is_listed[i])
            smallest = fminf(smallest, key[i]);
        else
            largest_out = fmaxf(largest_out, key[i]);
    }
    EXPECT(n_selected + unit.n_disk == unit.n_selected, "%s: unit %u: %u marked, %u on disk of %u",
           what, u, n_selected, unit.n_disk, unit.n_selected);
    EXPECT(unit.n_groups == (unit.n_selected + 7) / 8, "%s: unit %u", what, u);
    EXPECT(unit.key_largest == largest, "%s: unit %u: key_largest", what, u);
    for (uint32_t g = 0; g < G; g++)
        EXPECT(n == 0 || unit.largest[g] == (float)e.largest[g], "%s: unit %u: largest", what, u);
    uint32_t n_max = item.n_blocks_max ? std::min(item.n_blocks_max, n) : n;
    EXPECT(unit.n_selected <= n_max, "%s: unit %u: beyond the budget", what, u);
    if (unit.n_selected == 0)
        EXPECT(n_unknown == 0 && (n_max == 0 || is_reached(e, n, G, ln_e, item.mass, -1e-6,
                                                           [](uint32_t) { return false; })),
               "%s: unit %u: nothing selected", what, u);
    else
        EXPECT(unit.key_threshold == smallest, "%s: unit %u: key_threshold", what, u);
    if (unit.n_selected == 0)
        return;
    EXPECT(largest_out <= smallest + (unit.n_selected == n_max ? 1.01f / 64 : 0),
           "%s: unit %u: no prefix: %g left, %g taken", what, u, largest_out, smallest);
    if (unit.n_selected < n_max || n_max == n)
        EXPECT(
            is_reached(e, n, G, ln_e, item.mass, -1e-6, [&](uint32_t i) { return is_listed[i]; }),
            "%s: unit %u: mass not reached by %u of %u", what, u, unit.n_selected, n);
    EXPECT(unit.n_selected <= n_unknown ||
               !is_reached(e, n, G, ln_e, item.mass, 1e-6,
                           [&](uint32_t i) {
                               return is_listed[i] && (double)key[i] > smallest + 1.01 / 64;
                           }),
           "%s: unit %u: a bin too many", what, u);
    uint32_t n_quarter = std::max(4u, (unit.n_selected + 3) / 4), n_below = 0, n_next = 0;
    for (uint32_t i = 0; i < n; i++) {
        n_below += is_listed[i] && (key[i] < unit.key_quarter || key[i] == INFINITY);
        n_next += is_listed[i] && key[i] < unit.key_quarter - 1.01f / 64;
    }
    EXPECT(n_below >= std::min(n_quarter, unit.n_selected) &&
               (n_next < n_quarter || n_unknown || unit.key_quarter == INFINITY),
           "%s: unit %u: quarter of %u: %u, %u", what, u, unit.n_selected, n_below, n_next);
}

/* Every group once, in the right list, and every chunk once. */
static void check_work(const downloaded &d, uint32_t round, const char *what)
{
    std::map<std::pair<uint32_t, uint32_t>, int> seen;
    size_t n = 0;

    for (const std::vector<winnow_gpu_work> *list : {&d.ready, &d.waiting})
        for (const winnow_gpu_work &work : *list) {
            bool is_waiting = list == &d.waiting, waits = false;
            std::pair<uint32_t, uint32_t> id(work.unit, work.idx);
            EXPECT(work.unit < d.unit.size() && seen[id]++ == 0, "%s: unit %u: work %x twice", what,
                   work.unit, work.idx);
            const winnow_gpu_unit &unit = d.unit[work.unit];
            if (work.idx & WINNOW_GPU_WORK_CHUNK) {
                EXPECT(!is_waiting && (work.idx & ~WINNOW_GPU_WORK_CHUNK) < unit.n_chunks,
                       "%s: chunk", what);
                continue;
            }
            uint32_t first = round == 1 ? 0 : unit.n_selected, group = work.idx;
            uint32_t end = first + (round == 1 ? unit.n_selected : unit.n_more);
            group -= round == 1 ? 0 : unit.n_groups;
            for (uint32_t i = first + 8 * group; i < end && i < first + 8 * group + 8; i++) {
                uint32_t place = d.listed[unit.block_first + i].place;
                waits |= place < d.word.size() && (d.word[place] & WINNOW_GPU_FETCHING);
            }
            EXPECT(waits == is_waiting, "%s: unit %u: group %u in the wrong list", what, work.unit,
                   group);
        }
    for (const winnow_gpu_unit &unit : d.unit)
        n += (round == 1 ? unit.n_groups : unit.n_groups_more) + unit.n_chunks;
    EXPECT(round == 2 || n == seen.size(), "%s: %zu pieces of work, not %zu", what, seen.size(), n);
}

/* Every listed block is where it is said to be, and what is being fetched is fetched once. */
static void check_places(batch *b, const downloaded &d, uint32_t round, const char *what)
{
    std::set<uint32_t> slots, ids;

    for (const winnow_gpu_fetch &fetch : d.fetch) {
        uint64_t word = d.word[fetch.slot];
        EXPECT(word & WINNOW_GPU_FETCHING, "%s: slot %u is not being fetched", what, fetch.slot);
        EXPECT(slots.insert(fetch.slot).second && ids.insert((uint32_t)(word >> 32)).second,
               "%s: slot %u or its block fetched twice", what, fetch.slot);
    }
    for (size_t slot = 0; slot < d.word.size(); slot++)
        EXPECT(!(d.word[slot] & WINNOW_GPU_FETCHING) || slots.count((uint32_t)slot),
               "%s: slot %zu waits for no fetch", what, slot);
    for (uint32_t u = 0; u < d.unit.size(); u++) {
        const winnow_gpu_unit &unit = d.unit[u];
        uint32_t first = round == 1 ? 0 : unit.n_selected;
        uint32_t end = first + (round == 1 ? unit.n_selected : unit.n_more);
        EXPECT(unit.n_device + unit.n_host + unit.n_disk == unit.n_selected + unit.n_more,
               "%s: unit %u: %u + %u + %u of %u + %u", what, u, unit.n_device, unit.n_host,
               unit.n_disk, unit.n_selected, unit.n_more);
        for (uint32_t i = first; i < end; i++) {
            winnow_gpu_listed listed = d.listed[unit.block_first + i];
            uint32_t id, home = batch_home(*b, u, listed.block, &id);
            uint8_t selected = d.selected[unit.block_first + listed.block];
            bool is_disk = listed.place == WINNOW_GPU_ON_DISK;
            EXPECT(selected == (is_disk ? 0 : round), "%s: unit %u: selected %u", what, u,
                   selected);
            if (is_disk)
                EXPECT(home == WINNOW_GPU_ON_DISK, "%s: unit %u: not on disk", what, u);
            else if (listed.place & WINNOW_GPU_FROM_HOST)
                EXPECT((listed.place & ~WINNOW_GPU_FROM_HOST) == home, "%s: unit %u: host", what,
                       u);
            else
                EXPECT(d.word[listed.place] >> 32 == id + 1u &&
                           (d.word[listed.place] & WINNOW_GPU_STAMP_MASK) == b->s.launch->stamp,
                       "%s: unit %u: slot %u holds %lx, not block %u", what, u, listed.place,
                       d.word[listed.place], id);
        }
    }
}

static downloaded batch_select(batch *b, uint32_t stamp, uint32_t n_multiprocessors = 0)
{
    const winnow_gpu_view *v = &b->s.view;
    uint32_t n = b->s.options.n_blocks_max + 64;
    winnow_gpu_grid grid = b->s.grid;

    if (n_multiprocessors)
        grid.n_multiprocessors = n_multiprocessors;

    scene_launch_write(&b->s, b->n_items, stamp);
    device_write(b->s.ln_z, b->ln_z.data(), b->ln_z.size());
    ok(cudaMemset(v->key, 0xff, 4 * (size_t)n), "poison");
    ok(cudaMemset(v->selected, 0xff, n), "poison");
    ok(cudaMemset(v->listed, 0xff, sizeof(winnow_gpu_listed) * n), "poison");
    scene_begin(b->s, 0, 0);
    ok(winnow_gpu_stage_scan(v, &b->s.grid, 0), "scan");
    ok(winnow_gpu_stage_select(v, &grid, 0), "select");
    ok(cudaDeviceSynchronize(), "select");
    return download(*b, 1);
}

/* Resident mass: from none to more than all blocks together. */
static void ln_z_draw(batch *b, random_source &random, const std::vector<float> &ln_e)
{
    uint32_t G = b->s.view.n_group;

    for (uint32_t u = 0; u < b->ln_z.size() / G; u++)
        for (uint32_t g = 0; g < G; g++) {
            const winnow_gpu_launch *launch = b->s.launch;
            uint32_t i = u / b->s.view.n_kv_heads;
            uint32_t n = launch->item[i].n_segments * b->s.view.span_blocks;
            size_t first = launch->block_first[i] + (size_t)(u % b->s.view.n_kv_heads) * n;
            float largest = -INFINITY;
            for (uint32_t j = 0; j < n; j++)
                if (ln_e[(first + j) * G + g] < INFINITY)
                    largest = fmaxf(largest, ln_e[(first + j) * G + g]);
            b->ln_z[u * G + g] = u % 4 == 0 ? -INFINITY : largest + 3 * normal(random);
        }
}

static void check_select(batch *b, random_source &random, const char *what)
{
    static const float masses[] = {0.5f, 0.8f, 0.9f, 0.99f, 0.9999f};
    uint32_t stamp = 10;

    scene_launch_write(&b->s, b->n_items, 1);
    std::vector<float> ln_e = batch_scan(b, b->s.grid.n_multiprocessors);
    for (int round = 0; round < 10; round++) {
        for (uint32_t i = 0; i < b->n_items; i++) {
            b->s.launch->item[i].mass = masses[(round + i) % 5];
            b->s.launch->item[i].n_blocks_max = round < 5 ? 0 : 1 + (uint32_t)random() % 40;
        }
        ln_z_draw(b, random, ln_e);
        downloaded d = batch_select(b, ++stamp);
        for (uint32_t u = 0; u < d.unit.size(); u++)
            check_unit_select(*b, d, u, what);
        check_work(d, 1, what);
        check_places(b, d, 1, what);
        scene_fetched(b->s, 0);
    }
}

/* What selection says of a unit, but for places. */
static bool same_selection(const downloaded &a, const downloaded &b, uint32_t u)
{
    const winnow_gpu_unit &x = a.unit[u], &y = b.unit[u];
    bool is_same = x.n_selected == y.n_selected && x.n_groups == y.n_groups &&
                   x.has_unknown == y.has_unknown && x.key_threshold == y.key_threshold &&
                   x.key_quarter == y.key_quarter && x.key_largest == y.key_largest &&
                   !memcmp(x.largest, y.largest, sizeof x.largest) &&
                   !memcmp(x.z, y.z, sizeof x.z) && !memcmp(x.total, y.total, sizeof x.total) &&
                   !memcmp(&a.key[x.block_first], &b.key[x.block_first], 4 * x.n_blocks);

    for (uint32_t i = x.block_first; is_same && i < x.block_first + x.n_selected; i++)
        is_same = a.listed[i].block == b.listed[i].block;
    return is_same;
}

/* The second round adds what it is asked for, by bins, from where the first ended. */
static void check_more(batch *b, random_source &random, const char *what)
{
    const winnow_gpu_view *v = &b->s.view;
    uint32_t G = v->n_group;
    winnow_gpu_queue queue = {};

    for (uint32_t i = 0; i < b->n_items; i++) {
        b->s.launch->item[i].mass = 0.8f;
        b->s.launch->item[i].n_blocks_max = i % 2 ? 0 : 30;
    }
    downloaded first = batch_select(b, 1000);
    for (winnow_gpu_unit &unit : first.unit) {
        unit.is_short = 1;
        for (uint32_t g = 0; g < G; g++) {
            double rest = 0;
            for (uint32_t i = 0; i < unit.n_blocks; i++)
                if (!(first.key[unit.block_first + i] >= unit.key_threshold))
                    rest += mass_of(first.ln_e[(size_t)(unit.block_first + i) * G + g],
                                    unit.largest[g]);
            unit.need[g] = (float)(rest * (int)(random() % 4 - 1) / 3);
        }
    }
    queue.n_short = (uint32_t)first.unit.size();
    device_write(v->unit, first.unit.data(), first.unit.size());
    scene_fetched(b->s, 0);
    device_write(v->queue, &queue, 1);
    ok(winnow_gpu_list_more_put(v, &b->s.grid, 0), "more");
    ok(cudaDeviceSynchronize(), "more");
    downloaded d = download(*b, 2);
    check_work(d, 2, what);
    check_places(b, d, 2, what);
    for (uint32_t u = 0; u < d.unit.size(); u++) {
        const winnow_gpu_unit &unit = d.unit[u], &was = first.unit[u];
        uint32_t n = unit.n_blocks, n_max = b->s.launch->item[unit.item].n_blocks_max;
        float smallest = INFINITY, largest_out = -INFINITY;
        std::vector<bool> is_new(n);
        n_max = n_max ? std::min(n_max, n) : n;
        for (uint32_t i = 0; i < unit.n_more; i++)
            is_new[d.listed[unit.block_first + unit.n_selected + i].block] = true;
        for (uint32_t i = 0; i < n; i++) {
            float key = d.key[unit.block_first + i];
            bool was_out = was.n_selected ? key < was.key_threshold : true;
            EXPECT(!is_new[i] || was_out, "%s: unit %u: block %u again", what, u, i);
            if (is_new[i])
                smallest = fminf(smallest, key);
            else if (was_out)
                largest_out = fmaxf(largest_out, key);
        }
        bool is_capped = unit.n_selected + unit.n_more == n_max && n_max < n;
        EXPECT(unit.n_selected + unit.n_more <= n_max, "%s: unit %u: budget", what, u);
        EXPECT(is_capped || largest_out <= smallest, "%s: unit %u: no prefix", what, u);
        for (int is_less = 0; is_less < 2; is_less++) {
            bool is_enough = true;
            for (uint32_t g = 0; g < G; g++) {
                double sum = 0;
                for (uint32_t i = 0; i < n; i++)
                    if (is_new[i] &&
                        (!is_less || d.key[unit.block_first + i] > smallest + 1.01f / 64))
                        sum += mass_of(d.ln_e[(size_t)(unit.block_first + i) * G + g],
                                       unit.largest[g]);
                double slack = 1e-5 * unit.need[g] + n * 0x1p-71 * (double)unit.total[g];
                is_enough &= sum >= unit.need[g] + (is_less ? slack : -slack);
            }
            EXPECT(is_capped || is_enough == !is_less || (is_less && unit.n_more == 0),
                   "%s: unit %u: %u more, less %d", what, u, unit.n_more, is_less);
        }
    }
    scene_fetched(b->s, 0);
}

/* Units that several thread blocks share, beside short ones: the same selection from any number. */
static void check_long(random_source &random)
{
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
            check_work(d, 1, "long");
            check_places(&b, d, 1, "long");
        }
    }
    check_more(&b, random, "long");
    batch_finish(&b);
    printf("  long units: %s\n", n_failures ? "FAILED" : "ok");
}

/* Many launches over few slots, sessions sharing segments. */
static void check_cache(random_source &random)
{
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
            check_work(d, 1, "cache");
            check_places(&b, d, 1, "cache");
            for (const winnow_gpu_unit &unit : d.unit)
                n_listed += unit.n_selected;
            ok(cudaMemset(b.s.view.queue + 1, 0, sizeof(winnow_gpu_queue)), "clear");
            scene_fetched(b.s, 0);
        }
        winnow_gpu_counters c = device_read(b.s.view.counters, 2)[1];
        EXPECT(c.n_hits + c.n_misses == n_listed, "cache of %u: counters", n_slots);
        printf("  cache of %4u slots: %lu hits, %lu misses, %lu evictions, %lu unfit\n", n_slots,
               c.n_hits, c.n_misses, c.n_evictions, c.n_unfit);
        batch_finish(&b);
    }
}

static void check_all(void)
{
    static const uint32_t shapes[][3] = {
        {4, 128, WINNOW_BF16}, {3, 64, WINNOW_FP16},  {7, 128, WINNOW_FP16},
        {8, 128, WINNOW_FP32}, {16, 80, WINNOW_FP16}, {1, 256, WINNOW_BF16},
        {2, 192, WINNOW_FP32}, {1, 16, WINNOW_FP32},  {16, 256, WINNOW_BF16},
        {12, 96, WINNOW_FP32}, {5, 208, WINNOW_BF16}, {6, 112, WINNOW_FP16}};
    random_source random(20250101);
    int n = 0;

    for (const uint32_t *shape : shapes)
        for (int input = 0; input < N_INPUTS; input++) {
            if (shape[2] == WINNOW_FP16 && (input == OVERFLOWING || input == TINY))
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
            check_more(&b, random, what);
            batch_finish(&b);
            printf("  %s: %s\n", what, n_failures ? "FAILED" : "ok");
        }
    check_long(random);
    check_cache(random);
}
