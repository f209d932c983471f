/*
 * A selection held against its definition, in fp64, and its places against what the slots' words
 * then say. Outputs are poisoned first.
 */
#pragma once

#include "gpu_batch.cuh"

#include <map>
#include <set>

struct downloaded { /* of one launch after select */
    std::vector<float> ln_e, key;
    std::vector<uint8_t> selected;
    std::vector<winnow_gpu_listed> listed;
    std::vector<winnow_gpu_unit> unit;
    std::vector<winnow_gpu_fetch> fetch;
    std::vector<winnow_gpu_work> ready, waiting;
    std::vector<uint64_t> word;
};

static downloaded download(const batch &b)
{
    const winnow_gpu_view *v = &b.s.view;
    uint32_t n = b.s.launch->n_blocks;
    winnow_gpu_queue queue = device_read(v->queue, 1)[0];

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
        /* a key at the edge of its bin may fall to either side */
        n_below += is_listed[i] && (key[i] < unit.key_quarter + 1e-5f || key[i] == INFINITY);
        n_next += is_listed[i] && key[i] < unit.key_quarter - 1.01f / 64;
    }
    EXPECT(n_below >= std::min(n_quarter, unit.n_selected) &&
               (n_next < n_quarter || n_unknown || unit.key_quarter == INFINITY),
           "%s: unit %u: quarter of %u: %u, %u", what, u, unit.n_selected, n_below, n_next);
}

/* Every group once, in the right list, and every chunk once. */
static void check_work(const downloaded &d, const char *what)
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
            uint32_t first = 8 * work.idx;
            for (uint32_t i = first; i < unit.n_selected && i < first + 8; i++) {
                uint32_t place = d.listed[unit.block_first + i].place;
                waits |= place < d.word.size() && (d.word[place] & WINNOW_GPU_FETCHING);
            }
            EXPECT(waits == is_waiting, "%s: unit %u: group %u in the wrong list", what, work.unit,
                   work.idx);
        }
    for (const winnow_gpu_unit &unit : d.unit)
        n += unit.n_groups + unit.n_chunks;
    EXPECT(n == seen.size(), "%s: %zu pieces of work, not %zu", what, seen.size(), n);
}

/* Every listed block is where it is said to be, and what is being fetched is fetched once. */
static void check_places(batch *b, const downloaded &d, const char *what)
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
        EXPECT(unit.n_device + unit.n_host + unit.n_disk == unit.n_selected,
               "%s: unit %u: %u + %u + %u of %u", what, u, unit.n_device, unit.n_host, unit.n_disk,
               unit.n_selected);
        for (uint32_t i = 0; i < unit.n_selected; i++) {
            winnow_gpu_listed listed = d.listed[unit.block_first + i];
            uint32_t id, home = batch_home(*b, u, listed.block, &id);
            uint8_t selected = d.selected[unit.block_first + listed.block];
            bool is_disk = listed.place == WINNOW_GPU_ON_DISK;
            EXPECT(selected == !is_disk, "%s: unit %u: selected %u", what, u, selected);
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
    return download(*b);
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
        check_work(d, what);
        check_places(b, d, what);
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
