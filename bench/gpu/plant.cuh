/*
 * A stack filled by the model, with two things set from outside:
 *   the share selected   the queries are scaled until select chooses it at P .9 (planted_tune)
 *   the hit rate         the cache is planted (planted_hits): a share h of the selected blocks, drawn
 *                        of both rounds, is in slots, spread evenly; the other slots hold blocks
 *                        that nobody asks for and that were used longer ago. planted_restore brings
 *                        that state back before every replay, outside the timed part
 */
#pragma once

#include "model.cuh"
#include "stack.cuh"

constexpr uint32_t PLANTED_STAMP = 1000; /* of every replay; slots have older ones */

/* A selected block: its id, and slot + 1 or 0. */
struct planted_loc {
    uint32_t id, loc;
};

struct planted {
    stack s;
    uint32_t n_aliases;
    std::vector<uint32_t> tail_alias;            /* of view.h's tails */
    std::vector<float> q;                        /* [layer][session][Hq][d], before scaling */
    float scale;                                 /* of the queries */
    std::vector<std::vector<uint32_t>> selected; /* [layer]: block ids */
    std::vector<planted_loc *> loc;              /* [layer][selected] */
    std::vector<uint64_t *> word;                /* [layer][n_slots_layer] */
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
}

inline void planted_finish(planted *p)
{
    stack_finish(&p->s);
    for (planted_loc *loc : p->loc)
        ok(cudaFree(loc), "cudaFree");
    for (uint64_t *word : p->word)
        ok(cudaFree(word), "cudaFree");
}

/* Selects in layer l, into an empty cache. Returns the share of the blocks; ids: they and those of
 * the second round, or NULL. */
inline double planted_select(const stack &s, uint32_t l, std::vector<uint32_t> *ids)
{
    const winnow_gpu_view &view = s.layer[l].view;
    uint64_t n_selected = 0;

    stack_cache_empty(s);
    stack_layer_put(s, l, ids ? STACK_N_STAGES : STACK_N_SELECT);
    ok(cudaStreamSynchronize(s.gpu->stream), "select");
    std::vector<winnow_gpu_unit> unit = device_read(view.unit, s.n_units);
    for (uint32_t u = 0; u < s.n_units; u++) {
        n_selected += unit[u].n_selected;
        if (!ids)
            continue;
        uint32_t n = unit[u].n_selected + unit[u].n_more;
        for (const winnow_gpu_listed &at : device_read(view.listed + unit[u].block_first, n))
            ids->push_back(planted_id(s, l, u, at.block));
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
            sum += planted_select(p->s, l, NULL);
        double off = sum / p->s.n_layers / share - 1;
        if (fabs(off) < 0.005)
            break;
        (off > 0 ? low : high) = p->scale;
    }
    for (uint32_t l = 0; l < p->s.n_layers; l++) {
        p->selected[l].clear();
        planted_select(p->s, l, &p->selected[l]);
    }
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
    for (uint32_t l = 0; l < p.s.n_layers; l++)
        planted_restore_kernel<<<128, 256, 0, p.s.gpu->stream>>>(
            p.s.layer[l].view, l, p.word[l], p.loc[l], (uint32_t)p.selected[l].size());
    ok(cudaGetLastError(), "restore");
}

inline void planted_hits(planted *p, double hits)
{
    stack *s = &p->s;
    const winnow_gpu_view &view = s->gpu->layout.view;
    uint32_t n_slots = view.n_slots_layer;

    for (uint32_t l = 0; l < s->n_layers; l++) {
        std::vector<uint32_t> alias(n_slots, MODEL_NO_BLOCK), ids = p->selected[l];
        std::vector<planted_loc> loc;
        std::vector<uint64_t> word(n_slots);
        uint32_t n_hits = (uint32_t)(hits * (double)ids.size() + .5);
        for (uint64_t &x : word) /* of a block in no list */
            x = (uint64_t)0xfffffff0 << 32 | (1 + s->random() % (PLANTED_STAMP / 2));
        std::shuffle(ids.begin(), ids.end(), s->random);
        for (uint32_t i = 0; i < ids.size(); i++) {
            uint32_t slot = (uint32_t)((uint64_t)i * n_slots / std::max(n_hits, 1u));
            loc.push_back({ids[i], i < n_hits ? l * n_slots + slot + 1 : 0});
            if (i >= n_hits)
                continue;
            word[slot] = (uint64_t)(ids[i] + 1) << 32 | (PLANTED_STAMP - 1);
            alias[slot] = ids[i] % p->n_aliases;
        }
        model_blocks_write(view.slots + (size_t)l * n_slots * MODEL_BLOCK_BYTES, alias);
        device_write(p->word[l], word.data(), n_slots);
        ok(cudaFree(p->loc[l]), "cudaFree");
        p->loc[l] = device_copy(loc);
    }
    planted_restore(*p);
}
