/*
 * A stack of layers as the daemon holds them: a real gpu (kernels/gpu.h) of several layers, and the
 * stages of a decode step of each, in create.c's order. Every layer has a launch of its own, made by
 * a real decode, so that one graph runs all layers one after the other over rotating data. Who
 * fills index, tails and queries is the caller.
 */
#pragma once

#include "card.cuh"

#include <cuda_bf16.h>
#include <kernels/cuda/stage.h>
#include <numeric>
#include <random>
extern "C" {
#include <kernels/cuda/state.h>
}

constexpr uint32_t STACK_SEGMENT = 1024, STACK_SINKS = 16;
constexpr float STACK_MASS = 0.9f;

typedef cudaError_t stack_stage(const winnow_gpu_view *, const winnow_gpu_grid *, cudaStream_t);
static const struct {
    const char *name;
    stack_stage *put;
} STACK_STAGES[] = {
    {"scan", winnow_gpu_stage_scan},
    {"tail", winnow_gpu_stage_tail},
    {"select", winnow_gpu_stage_select},
    {"attend", winnow_gpu_stage_attend},
};
constexpr uint32_t STACK_N_STAGES = sizeof STACK_STAGES / sizeof STACK_STAGES[0];
constexpr uint32_t STACK_N_SELECT = 3; /* stages after which the lists are there */

struct stack_layer {
    winnow_gpu_view view;
    winnow_gpu_launch launch; /* as on the device */
};

struct stack {
    uint32_t n_tokens, batch, n_layers; /* tokens of a session: the last segment's are the tail */
    uint32_t n_segments, n_blocks, n_units; /* of a session; of a unit, sealed; of a layer */
    const winnow_gpu_api *api;
    winnow_gpu_device *device;
    winnow_gpu *gpu;
    winnow_gpu_grid grid;
    std::vector<uint32_t> table; /* [session][n_segments]: segment slots, shuffled */
    std::vector<stack_layer> layer;
    uint8_t *in;      /* [layer][session] of the layout's in_bytes: q, k, v, bf16 */
    bool is_complete; /* the tails hold the new token: decode appends nothing */
    std::mt19937 random;
};

inline void stack_ok(int rc, const char *text)
{
    if (rc >= 0)
        return;
    fprintf(stderr, "%s: %s\n", text, strerror(-rc));
    exit(1);
}

inline uint64_t stack_kv_bytes(const winnow_model_shape &shape, uint32_t n_tokens, uint32_t batch)
{
    return (uint64_t)n_tokens * batch * shape.n_kv_heads * (shape.k_width + shape.v_width) * 2;
}

/* The cache: a tenth of the KV. */
inline winnow_gpu_options stack_options(const winnow_model_shape &shape, uint32_t n_tokens,
                                        uint32_t batch)
{
    winnow_gpu_options o = {};
    uint64_t n_blocks = (uint64_t)n_tokens / WINNOW_BLOCK_TOKENS * batch * shape.n_kv_heads;

    o.shape = shape;
    o.segment_tokens = STACK_SEGMENT;
    o.n_sinks = STACK_SINKS;
    o.n_session_segments_max = n_tokens / STACK_SEGMENT - 1;
    o.n_segments_max = o.n_session_segments_max * batch;
    o.n_sessions_max = batch;
    o.n_slots = shape.n_layers * (uint32_t)(n_blocks / 10);
    o.n_items_max = batch;
    o.n_launch_blocks_max = (uint64_t)o.n_segments_max * (STACK_SEGMENT / WINNOW_BLOCK_TOKENS);
    return o;
}

/* Bytes on the device. */
inline uint64_t stack_bytes(const winnow_gpu_options &options)
{
    winnow_gpu_layout layout;
    char text[256];

    stack_ok(winnow_gpu_layout_init(&layout, &options, text), text);
    return layout.n_bytes + (1 << 20);
}

/* The arena is pinned until stack_finish. batch: a power of 2. */
inline void stack_init(stack *s, const winnow_model_shape &shape, uint32_t n_tokens, uint32_t batch,
                       uint8_t *arena, uint64_t arena_bytes)
{
    winnow_gpu_options o = stack_options(shape, n_tokens, batch);
    char text[256];

    *s = {};
    s->n_tokens = n_tokens;
    s->batch = batch;
    s->n_layers = shape.n_layers;
    s->n_segments = o.n_session_segments_max;
    s->n_blocks = s->n_segments * (STACK_SEGMENT / WINNOW_BLOCK_TOKENS);
    s->n_units = batch * shape.n_kv_heads;
    s->api = winnow_gpu_find(WINNOW_GPU_API_VERSION);
    stack_ok(s->api->open(0, stack_bytes(o), arena, arena_bytes, &s->device, text), text);
    stack_ok(s->api->create(s->device, &o, &s->gpu, text), text);
    s->grid = {s->n_units, s->device->n_multiprocessors, s->gpu->layout.n_blocks_max};
    s->in = device_alloc<uint8_t>(s->n_layers * batch * s->gpu->layout.in_bytes);
    s->table.resize(o.n_segments_max);
    std::iota(s->table.begin(), s->table.end(), 0);
    std::shuffle(s->table.begin(), s->table.end(), s->random);
    for (uint32_t i = 0; i < batch; i++)
        stack_ok(s->api->session_set(s->gpu, i, s->n_segments, &s->table[i * s->n_segments]),
                 "session_set");
}

inline uint8_t *stack_in(const stack &s, uint32_t l, uint32_t session)
{
    return s.in + ((size_t)l * s.batch + session) * s.gpu->layout.in_bytes;
}

/* q [layer][session][Hq][d], scaled. */
inline void stack_queries_write(const stack &s, const std::vector<float> &q, float scale)
{
    size_t n = q.size() / (s.n_layers * s.batch);
    std::vector<__nv_bfloat16> to(n);

    for (uint32_t i = 0; i < s.n_layers * s.batch; i++) {
        for (size_t j = 0; j < n; j++)
            to[j] = __float2bfloat16_rn(scale * q[i * n + j]);
        device_write(stack_in(s, i / s.batch, i % s.batch), (uint8_t *)to.data(), 2 * n);
    }
}

/* Decodes layer l of all sessions, through the contract, and waits; in: in_bytes of every one.
 * Returns the ticket. */
inline int64_t stack_decode(const stack &s, uint32_t l, const std::vector<uint8_t> &in)
{
    const winnow_gpu_layout &layout = s.gpu->layout;
    std::vector<winnow_gpu_item> items(s.batch);
    std::vector<winnow_gpu_certificate> certificate(s.batch);
    std::vector<uint8_t> out(layout.out_bytes);

    for (uint32_t i = 0; i < s.batch; i++) {
        items[i] = {};
        items[i].session = i;
        items[i].layer = l;
        items[i].n_segments = s.n_segments;
        items[i].n_tokens = s.n_tokens;
        items[i].mass = STACK_MASS;
        items[i].q = in.data();
        items[i].k = s.is_complete ? NULL : in.data() + layout.k_at;
        items[i].v = s.is_complete ? NULL : in.data() + layout.v_at;
        items[i].out = out.data();
        items[i].certificate = &certificate[i];
    }
    int64_t ticket = s.api->decode(s.gpu, s.batch, items.data());
    stack_ok((int)std::min(ticket, (int64_t)0), "decode");
    stack_ok(s.api->poll(s.gpu, ticket, true), "poll");
    return ticket;
}

/* The launch of a layer as it is, to the device. */
inline void stack_launch_write(const stack_layer &layer)
{
    device_write(layer.view.launch, &layer.launch, 1);
}

/* The launches, out of real decodes, with inputs of their own in s->in: k, v drawn. Index and tails
 * are there. */
inline void stack_launches_make(stack *s)
{
    const winnow_gpu_layout &layout = s->gpu->layout;
    std::vector<uint8_t> in(layout.in_bytes);
    std::normal_distribution<float> normal;

    s->layer.resize(s->n_layers);
    for (uint32_t l = 0; l < s->n_layers; l++) {
        stack_layer *layer = &s->layer[l];
        for (size_t i = 0; i < in.size(); i += 2)
            *(__nv_bfloat16 *)&in[i] = __float2bfloat16_rn(normal(s->random));
        int64_t ticket = stack_decode(*s, l, in);
        layer->view = layout.view;
        memcpy(&layer->launch, s->gpu->flight[ticket % WINNOW_GPU_LAUNCHES_MAX].launch,
               offsetof(winnow_gpu_launch, item) + s->batch * sizeof(winnow_gpu_item));
        for (uint32_t i = 0; i < s->batch; i++) {
            winnow_gpu_item *item = &layer->launch.item[i];
            item->q = stack_in(*s, l, i);
            item->k = s->is_complete ? NULL : stack_in(*s, l, i) + layout.k_at;
            item->v = s->is_complete ? NULL : stack_in(*s, l, i) + layout.v_at;
            device_write(stack_in(*s, l, i), in.data(), in.size());
        }
        layer->view.launch = device_alloc<winnow_gpu_launch>(1);
        stack_launch_write(*layer);
    }
}

inline void stack_finish(stack *s)
{
    ok(cudaDeviceSynchronize(), "stack");
    for (stack_layer &layer : s->layer)
        ok(cudaFree(layer.view.launch), "cudaFree");
    ok(cudaFree(s->in), "cudaFree");
    s->api->destroy(s->gpu);
    s->api->close(s->device);
}

/* The first n_stages of a layer. */
inline void stack_layer_put(const stack &s, uint32_t l, uint32_t n_stages)
{
    for (uint32_t i = 0; i < n_stages; i++)
        ok(STACK_STAGES[i].put(&s.layer[l].view, &s.grid, s.gpu->stream), STACK_STAGES[i].name);
}

/* A whole read of a layer whose items have mass 1. */
inline void stack_whole_put(const stack &s, uint32_t l)
{
    stack_stage *stages[] = {winnow_gpu_stage_tail_first, winnow_gpu_stage_whole,
                             winnow_gpu_stage_attend};
    for (stack_stage *put : stages)
        ok(put(&s.layer[l].view, &s.grid, s.gpu->stream), "whole");
}

inline void stack_mass_write(stack *s, uint32_t l, float mass)
{
    for (uint32_t i = 0; i < s->batch; i++)
        s->layer[l].launch.item[i].mass = mass;
    stack_launch_write(s->layer[l]);
}

/* Of a layer, from graphs over all of them; before(): before each replay, untimed. */
template <class BEFORE>
spread stack_time(const stack &s, const stopwatch &w, uint32_t n_stages, BEFORE before)
{
    return graph_time(
        w, s.n_layers,
        [&] {
            for (uint32_t l = 0; l < s.n_layers; l++)
                stack_layer_put(s, l, n_stages);
        },
        before);
}

/* The cache holds nothing. */
inline void stack_cache_empty(const stack &s)
{
    const winnow_gpu_view &view = s.gpu->layout.view;
    ok(cudaMemset(view.slot_word, 0, sizeof(uint64_t) * view.n_slots_layer * view.n_layers),
       "empty");
    ok(cudaDeviceSynchronize(), "empty");
}

/* Of all layers. */
inline struct winnow_gpu_counters stack_counters(const stack &s)
{
    struct winnow_gpu_counters sum = {};

    for (const struct winnow_gpu_counters &of :
         device_read(s.gpu->layout.view.counters, s.n_layers)) {
        sum.n_hits += of.n_hits;
        sum.n_misses += of.n_misses;
        sum.n_ahead += of.n_ahead;
        sum.n_ahead_used += of.n_ahead_used;
    }
    return sum;
}

/* What certificates say, summed over items. */
struct stack_seen {
    struct winnow_gpu_counters before;
    double n_items, n_rounds, n_blocks, n_device, n_unfit, mass_least;
    std::vector<double> of_step; /* blocks */
};

inline stack_seen stack_seen_begin(const stack &s)
{
    stack_seen seen = {};
    seen.before = stack_counters(s);
    return seen;
}

/* Adds the last step's. Ends the program where an item failed. */
inline void stack_seen_add(stack_seen *seen, const stack &s)
{
    double n_before = seen->n_blocks;

    for (const stack_layer &layer : s.layer)
        for (uint32_t i = 0; i < s.batch; i++) {
            const winnow_gpu_certificate *c = layer.launch.item[i].certificate;
            if (c->status || c->n_blocks_disk) {
                fprintf(stderr, "item %u: status %u, %u blocks on disk\n", i, c->status,
                        c->n_blocks_disk);
                exit(1);
            }
            seen->mass_least = seen->n_items > 0 && seen->mass_least < c->mass_reached
                                   ? seen->mass_least
                                   : c->mass_reached;
            seen->n_items++;
            seen->n_rounds += c->n_rounds;
            seen->n_blocks += c->n_blocks_device + c->n_blocks_host;
            seen->n_device += c->n_blocks_device;
            seen->n_unfit += c->n_blocks_unfit;
        }
    seen->of_step.push_back(seen->n_blocks - n_before);
}

inline void stack_seen_text(stack_seen seen, const stack &s, char text[200])
{
    double n_all = (double)s.n_units * s.n_blocks * s.n_layers,
           n_steps = (double)seen.of_step.size();
    auto middle = seen.of_step.begin() + seen.of_step.size() / 2;
    struct winnow_gpu_counters n = stack_counters(s);
    double n_ahead = (double)(n.n_ahead - seen.before.n_ahead),
           n_early = (double)(n.n_ahead_used - seen.before.n_ahead_used),
           n_missing = std::max(1.0, (double)(n.n_misses - seen.before.n_misses));

    std::nth_element(seen.of_step.begin(), middle, seen.of_step.end());
    snprintf(text, 200,
             "read %.3g %% (median %.3g); found %.3f; rounds %.2f; least mass %.4f; unfit %.4f; "
             "of what was missing foreseen %.3f and in vain %.3f",
             100 * seen.n_blocks / n_all / n_steps, 100 * *middle / n_all,
             seen.n_device / seen.n_blocks, seen.n_rounds / seen.n_items, seen.mass_least,
             seen.n_unfit / seen.n_blocks, n_early / n_missing, (n_ahead - n_early) / n_missing);
}
