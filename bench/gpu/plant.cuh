/*
 * A stack filled by the model, with two things set from outside:
 *   the share selected   the queries are scaled until select chooses it at P .9 (planted_tune)
 *   the hit rate         the cache is planted (planted_hits): a share h of the selected blocks, drawn
 *                        of both rounds, is in slots, spread evenly; the other slots hold blocks
 *                        that nobody asks for and that were used longer ago. planted_restore brings
 *                        that state back before every replay, outside the timed part
 * and what the step before left (planted_past): totals and thresholds such that as much of what is
 * missing is foreseen, and as much fetched in vain, as on real attention (bench-foresight: P .9, a
 * cache of a tenth).
 */
#pragma once

#include "model.cuh"
#include "stack.cuh"

constexpr uint32_t PLANTED_STAMP = 1000; /* of every replay; slots have older ones */
/* Of the blocks missing (bench/results/foresight.txt, scan + .25): 20.6 and 24.1 of 39.6 %. */
constexpr double PLANTED_EARLY = 0.520, PLANTED_VAIN = 0.609;

/* A selected block: its id, and slot + 1 or 0. */
struct planted_loc {
    uint32_t id, loc;
};

/* Of a unit: its threshold; how far above it are the keys of blocks that miss, and of those not
 * selected; sorted. */
struct planted_keys {
    float threshold;
    std::vector<float> missing, others;
    float shift; /* drawn, normal */
};

/* A selected block. */
struct planted_block {
    uint32_t id, unit;
    float key; /* above the unit's threshold */
};

struct planted {
    stack s;
    uint32_t n_aliases;
    std::vector<uint32_t> tail_alias;                 /* of view.h's tails */
    std::vector<float> q;                             /* [layer][session][Hq][d], before scaling */
    float scale;                                      /* of the queries */
    std::vector<std::vector<planted_block>> selected; /* [layer] */
    std::vector<planted_keys> keys;                   /* [layer][unit] */
    std::vector<winnow_gpu_past> past, past_true;     /* [session][layer][KV head] */
    winnow_gpu_past *past_of_device;                  /* what restore brings back */
    std::vector<planted_loc *> loc;                   /* [layer][selected] */
    std::vector<uint64_t *> word;                     /* [layer][n_slots_layer] */
};

inline uint32_t planted_id(const stack &s, uint32_t l, uint32_t unit, uint32_t block)
{
    const winnow_gpu_view &view = s.layer[l].view; /* the stack may be finished */
    uint32_t session = unit / view.n_kv_heads, head = unit % view.n_kv_heads;
    uint32_t segment = s.table[session * s.n_segments + block / view.span_blocks];
    return ((segment * view.n_layers + l) * view.n_kv_heads + head) * view.span_blocks +
           block % view.span_blocks;
}

/* Query heads of a group share .9 of their variance's root. */
inline std::vector<float> planted_queries(std::mt19937 &random, size_t n, uint32_t n_group)
{
    std::normal_distribution<float> normal;
    std::vector<float> q(n);

    for (size_t i = 0; i < n; i += n_group * MODEL_WIDTH)
        for (uint32_t d = 0; d < MODEL_WIDTH; d++) {
            float shared = 0.9f * normal(random);
            for (uint32_t g = 0; g < n_group; g++)
                q[i + g * MODEL_WIDTH + d] = shared + 0.43f * normal(random);
        }
    return q;
}

/* arena: the model's blocks of n_aliases. */
inline void planted_init(planted *p, uint32_t n_tokens, uint32_t batch, uint32_t n_layers,
                         uint8_t *arena, uint32_t n_aliases)
{
    stack *s = &p->s;
    *p = {};
    p->n_aliases = n_aliases;
    p->scale = 1;
    stack_init(s, model_shape(n_layers), n_tokens, batch, arena,
               (uint64_t)n_aliases * MODEL_BLOCK_BYTES);
    const winnow_gpu_view &view = s->gpu->layout.view;
    p->tail_alias.resize(s->gpu->layout.sizes.tail_bytes / MODEL_BLOCK_BYTES);
    for (uint32_t &x : p->tail_alias)
        x = (uint32_t)(s->random() % n_aliases);
    model_blocks_write(view.tails, p->tail_alias);
    model_index_write(view, s->n_segments * batch, n_aliases);
    stack_launches_make(s);
    p->q = planted_queries(s->random, (size_t)n_layers * batch * view.n_q_heads * MODEL_WIDTH,
                           view.n_group);
    stack_queries_write(*s, p->q, p->scale);
    p->selected.resize(n_layers);
    p->loc.resize(n_layers);
    for (stack_layer &layer : s->layer) {
        layer.launch.stamp = PLANTED_STAMP;
        stack_launch_write(layer);
        p->word.push_back(device_alloc<uint64_t>(view.n_slots_layer));
    }
    p->keys.resize(n_layers * s->n_units);
    p->past_true = device_read(view.past, n_layers * s->n_units);
    p->past_of_device = device_copy(p->past_true);
}

inline void planted_finish(planted *p)
{
    stack_finish(&p->s);
    for (planted_loc *loc : p->loc)
        ok(cudaFree(loc), "cudaFree");
    for (uint64_t *word : p->word)
        ok(cudaFree(word), "cudaFree");
    ok(cudaFree(p->past_of_device), "cudaFree");
}

/* Place of a layer's unit in what its sessions' steps leave. */
inline uint32_t planted_past_idx(const stack &s, uint32_t l, uint32_t unit)
{
    uint32_t n_heads = s.gpu->layout.view.n_kv_heads;
    return (unit / n_heads * s.n_layers + l) * n_heads + unit % n_heads;
}

/* Selects in layer l, into an empty cache. Returns the share of the blocks; blocks: they and those
 * of the second round, or NULL; keys [unit]: of all that are not among them. */
inline double planted_select(const stack &s, uint32_t l, std::vector<planted_block> *blocks,
                             planted_keys *keys)
{
    const winnow_gpu_view &view = s.layer[l].view;
    uint64_t n_selected = 0;

    stack_cache_empty(s);
    stack_layer_put(s, l, blocks ? STACK_N_STAGES : STACK_N_SELECT);
    ok(cudaStreamSynchronize(s.gpu->stream), "select");
    std::vector<winnow_gpu_unit> unit = device_read(view.unit, s.n_units);
    for (uint32_t u = 0; u < s.n_units; u++) {
        n_selected += unit[u].n_selected;
        if (!blocks)
            continue;
        uint32_t n = unit[u].n_selected + unit[u].n_more;
        std::vector<float> key = device_read(view.key + unit[u].block_first, s.n_blocks);
        std::vector<uint8_t> is_read = device_read(view.selected + unit[u].block_first, s.n_blocks);
        float threshold = unit[u].n_selected ? INFINITY : 0;
        for (uint32_t b = 0; b < s.n_blocks; b++)
            if (is_read[b] == 1)
                threshold = std::min(threshold, key[b]);
        for (const winnow_gpu_listed &at : device_read(view.listed + unit[u].block_first, n))
            blocks->push_back({planted_id(s, l, u, at.block), u, key[at.block] - threshold});
        keys[u].threshold = threshold;
        keys[u].others.clear();
        for (uint32_t b = 0; b < s.n_blocks; b++)
            if (!is_read[b] && key[b] > -INFINITY)
                keys[u].others.push_back(key[b] - threshold);
        std::sort(keys[u].others.begin(), keys[u].others.end());
    }
    return (double)n_selected / ((double)s.n_units * s.n_blocks);
}

/* Scales the queries until the layers select a share `share` of the blocks on average, +- .5 %. */
inline void planted_tune(planted *p, double share)
{
    float low = 0.1f, high = 16;

    for (int i = 0; i < 16; i++) {
        double sum = 0;
        p->scale = sqrtf(low * high);
        stack_queries_write(p->s, p->q, p->scale);
        for (uint32_t l = 0; l < p->s.n_layers; l++)
            sum += planted_select(p->s, l, NULL, NULL);
        double off = sum / p->s.n_layers / share - 1;
        if (fabs(off) < 0.005)
            break;
        (off > 0 ? low : high) = p->scale;
    }
    for (uint32_t l = 0; l < p->s.n_layers; l++) {
        p->selected[l].clear();
        planted_select(p->s, l, &p->selected[l], &p->keys[l * p->s.n_units]);
    }
    p->past_true = device_read(p->s.gpu->layout.view.past, p->past_true.size());
}

static __global__ void planted_restore_kernel(winnow_gpu_view view, uint32_t l,
                                              const uint64_t *word, const planted_loc *loc,
                                              uint32_t n)
{
    uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;

    for (uint32_t i = first; i < view.n_slots_layer; i += step)
        view.slot_word[(size_t)l * view.n_slots_layer + i] = word[i];
    for (uint32_t i = first; i < n; i += step) {
        uint8_t *unit = view.index + (size_t)(loc[i].id / view.span_blocks) * view.unit_bytes;
        ((uint32_t *)(unit + view.loc_at))[loc[i].id % view.span_blocks] = loc[i].loc;
    }
}

/* As planted, in all layers. */
inline void planted_restore(const planted &p)
{
    ok(cudaMemcpyAsync(p.s.gpu->layout.view.past, p.past_of_device,
                       p.past.size() * sizeof *p.past_of_device, cudaMemcpyDeviceToDevice,
                       p.s.gpu->stream),
       "restore");
    for (uint32_t l = 0; l < p.s.n_layers; l++)
        planted_restore_kernel<<<128, 256, 0, p.s.gpu->stream>>>(
            p.s.layer[l].view, l, p.word[l], p.loc[l], (uint32_t)p.selected[l].size());
    ok(cudaGetLastError(), "restore");
}

/* Shares of the missing blocks that would be foreseen, and fetched in vain, were every unit's
 * threshold moved by mean + spread x its shift. */
inline void planted_foreseen(const planted &p, float mean, float spread, double *early,
                             double *vain)
{
    double n_missing = 0, n_early = 0, n_vain = 0;
    auto above = [](const std::vector<float> &x, float from) {
        return (double)(x.end() - std::lower_bound(x.begin(), x.end(), from));
    };

    for (const planted_keys &of : p.keys) {
        float from = mean + spread * of.shift;
        n_missing += (double)of.missing.size();
        n_early += above(of.missing, from);
        n_vain += above(of.others, from);
    }
    *early = n_early / std::max(n_missing, 1.0);
    *vain = n_vain / std::max(n_missing, 1.0);
}

/* What the last step left, so that PLANTED_EARLY and PLANTED_VAIN come about: the totals are this
 * step's, thresholds are off by a shift a unit, which is found by halving. */
inline void planted_past(planted *p)
{
    const stack &s = p->s;
    float mean = 0, spread_low = 0, spread_high = 8, spread = 0;
    std::normal_distribution<float> normal;
    double early, vain;
    bool is_any = false;

    for (planted_keys &of : p->keys) {
        std::sort(of.missing.begin(), of.missing.end());
        of.shift = normal(p->s.random);
        is_any |= !of.missing.empty();
    }
    for (int i = 0; i < 24; i++) {
        float low = -16, high = 16;
        spread = (spread_low + spread_high) / 2;
        for (int j = 0; j < 24; j++) {
            mean = (low + high) / 2;
            planted_foreseen(*p, mean, spread, &early, &vain);
            (early > PLANTED_EARLY ? low : high) = mean;
        }
        (vain < PLANTED_VAIN ? spread_low : spread_high) = spread;
    }
    p->past = p->past_true;
    for (uint32_t l = 0; l < s.n_layers; l++)
        for (uint32_t u = 0; u < s.n_units; u++) {
            winnow_gpu_past *past = &p->past[planted_past_idx(s, l, u)];
            const planted_keys &of = p->keys[l * s.n_units + u];
            past->key_foreseen = is_any ? of.threshold + mean + spread * of.shift : INFINITY;
        }
    device_write(p->past_of_device, p->past.data(), p->past.size());
}

inline void planted_hits(planted *p, double hits)
{
    stack *s = &p->s;
    const winnow_gpu_view &view = s->gpu->layout.view;
    uint32_t n_slots = view.n_slots_layer;

    for (uint32_t l = 0; l < s->n_layers; l++) {
        std::vector<uint32_t> alias(n_slots, MODEL_NO_BLOCK);
        std::vector<planted_block> blocks = p->selected[l];
        std::vector<planted_loc> loc;
        std::vector<uint64_t> word(n_slots);
        uint32_t n_hits = (uint32_t)(hits * (double)blocks.size() + .5);
        for (uint64_t &x : word) /* of a block in no list */
            x = (uint64_t)0xfffffff0 << 32 | (1 + s->random() % (PLANTED_STAMP / 2));
        std::shuffle(blocks.begin(), blocks.end(), s->random);
        for (uint32_t u = 0; u < s->n_units; u++)
            p->keys[l * s->n_units + u].missing.clear();
        for (uint32_t i = 0; i < blocks.size(); i++) {
            uint32_t slot = (uint32_t)((uint64_t)i * n_slots / std::max(n_hits, 1u));
            loc.push_back({blocks[i].id, i < n_hits ? l * n_slots + slot + 1 : 0});
            if (i >= n_hits) {
                p->keys[l * s->n_units + blocks[i].unit].missing.push_back(blocks[i].key);
                continue;
            }
            word[slot] = (uint64_t)(blocks[i].id + 1) << 32 | (PLANTED_STAMP - 1);
            alias[slot] = blocks[i].id % p->n_aliases;
        }
        model_blocks_write(view.slots + (size_t)l * n_slots * MODEL_BLOCK_BYTES, alias);
        device_write(p->word[l], word.data(), n_slots);
        ok(cudaFree(p->loc[l]), "cudaFree");
        p->loc[l] = device_copy(loc);
    }
    planted_past(p);
    planted_restore(*p);
}
