/*
 * The peers of a planted stack: dense attention over the same KV in device memory, and the KV
 * streamed from pinned memory in front of the dense kernel.
 */
#pragma once

#include "dense.cuh"
#include "plant.cuh"

using peer_form = form<MODEL_WIDTH, 4, WINNOW_BF16>;
constexpr uint32_t PEER_WAVES_MAX = 4; /* thread blocks a unit is split over: tried up to this */

/* With queries of its own: those of the stack's layer 0. Outlives the stack. */
struct peer {
    winnow_gpu_view view; /* q_fragment and unit are the peer's */
    dense d;
    uint32_t n_layers, n_units, n_multiprocessors;
};

inline void peer_init(peer *p, const planted &of)
{
    const stack &s = of.s;
    size_t n_words = winnow_gpu_q_fragment_words(&s.layer[0].view), n_group = peer_form::HEADS;

    stack_layer_put(s, 0, 1);
    ok(cudaStreamSynchronize(s.gpu->stream), "begin");
    *p = {s.layer[0].view, {}, 0, s.n_units, s.grid.n_multiprocessors};
    size_t n_partials = s.n_units + 2 * PEER_WAVES_MAX * s.grid.n_multiprocessors;
    p->view.q_fragment = device_copy(device_read(p->view.q_fragment, s.n_units * n_words));
    p->view.unit = device_copy(device_read(p->view.unit, s.n_units));
    p->d.n_blocks = s.n_tokens / WINNOW_BLOCK_TOKENS;
    p->d.n_done = device_copy(std::vector<uint32_t>(s.n_units));
    p->d.out = device_alloc<float>(s.n_units * n_group * MODEL_WIDTH);
    p->d.partial = device_alloc<float>(n_partials * winnow_gpu_partial_floats(&p->view));
    dense_prepare<peer_form, 1>();
    dense_prepare<peer_form, 2>();
}

inline void peer_finish(peer *p)
{
    void *owned[] = {p->view.q_fragment, p->view.unit, p->d.n_done,
                     p->d.out,           p->d.partial, (void *)p->d.blocks};
    for (void *memory : owned)
        ok(cudaFree(memory), "cudaFree");
}

/* Aliases of all blocks of layer l, by unit: sinks, sealed, tail. */
inline std::vector<uint32_t> peer_aliases(const planted &of, const peer &p, uint32_t l)
{
    uint32_t n = p.d.n_blocks, n_sinks = p.view.n_sink_blocks, n_heads = p.view.n_kv_heads;
    std::vector<uint32_t> alias((size_t)p.n_units * n);

    for (uint32_t u = 0; u < p.n_units; u++) {
        size_t row = ((size_t)u / n_heads * p.view.n_layers + l) * n_heads + u % n_heads;
        const uint32_t *tail = &of.tail_alias[row * (n_sinks + p.view.ring_blocks)];
        uint32_t *to = &alias[(size_t)u * n];
        for (uint32_t i = 0; i < n; i++)
            if (i < n_sinks)
                to[i] = tail[i];
            else if (i < n_sinks + of.s.n_blocks)
                to[i] = planted_id(of.s, l, u, i - n_sinks) % of.n_aliases;
            else
                to[i] = tail[n_sinks + (i - n_sinks) % p.view.ring_blocks];
    }
    return alias;
}

/* As many layers as fit beside reserve_bytes, at most the stack's; the stack may be finished. */
inline void peer_blocks_make(peer *p, const planted &of, size_t reserve_bytes)
{
    size_t layer_bytes = (size_t)p->n_units * p->d.n_blocks * MODEL_BLOCK_BYTES;
    size_t free_bytes, all_bytes;

    ok(cudaMemGetInfo(&free_bytes, &all_bytes), "memory");
    free_bytes -= std::min(free_bytes, reserve_bytes);
    p->n_layers = std::min(of.s.n_layers, (uint32_t)(free_bytes / layer_bytes));
    if (p->n_layers == 0)
        return;
    uint8_t *blocks = device_alloc<uint8_t>(p->n_layers * layer_bytes);
    for (uint32_t l = 0; l < p->n_layers; l++)
        model_blocks_write(blocks + l * layer_bytes, peer_aliases(of, *p, l));
    p->d.blocks = blocks;
}

template <int PER_SM> spread peer_dense_time_of(const peer &p, const stopwatch &w, uint32_t n_waves)
{
    size_t layer_bytes = (size_t)p.n_units * p.d.n_blocks * MODEL_BLOCK_BYTES;
    uint32_t n_splits = std::max(1u, PER_SM * p.n_multiprocessors * n_waves / p.n_units);

    return graph_time(
        w, p.n_layers,
        [&] {
            for (uint32_t l = 0; l < p.n_layers; l++) {
                dense d = p.d;
                d.blocks += l * layer_bytes;
                dense_put<peer_form, PER_SM>(p.view, d, p.n_units, n_splits, w.stream);
            }
        },
        [] {});
}

/* The best of several ways to split it. */
inline spread peer_dense_time(const peer &p, const stopwatch &w)
{
    spread best = {1e30, 1e30};

    for (uint32_t n_waves = 1; n_waves <= PEER_WAVES_MAX; n_waves++)
        for (spread s :
             {peer_dense_time_of<1>(p, w, n_waves), peer_dense_time_of<2>(p, w, n_waves)})
            best = s.us < best.us ? s : best;
    return best;
}

/* The new token, which tail puts at the end of the tail: the last block of the stack's layer 0. */
inline void peer_token_copy(peer *p, const stack &s)
{
    uint32_t n = p->d.n_blocks, n_sinks = p->view.n_sink_blocks, n_heads = p->view.n_kv_heads;
    uint32_t last = n_sinks + (n - 1 - n_sinks) % p->view.ring_blocks;

    for (uint32_t u = 0; u < p->n_units; u++) {
        size_t row = (size_t)u / n_heads * s.n_layers * n_heads + u % n_heads;
        size_t at = row * (n_sinks + p->view.ring_blocks) + last;
        ok(cudaMemcpy((uint8_t *)p->d.blocks + ((size_t)u * n + n - 1) * MODEL_BLOCK_BYTES,
                      s.layer[0].view.tails + at * MODEL_BLOCK_BYTES, MODEL_BLOCK_BYTES,
                      cudaMemcpyDeviceToDevice),
           "token");
    }
    ok(cudaDeviceSynchronize(), "token");
}

/* |Winnow - dense| / |dense| of layer 0 as put() computes it, mean over query heads. */
template <class PUT> double peer_distance(peer *p, const planted &of, PUT put)
{
    const stack &s = of.s;
    uint32_t n_heads = s.batch * p->view.n_q_heads;
    double sum = 0;

    peer_token_copy(p, s);
    dense_put<peer_form, 2>(p->view, p->d, p->n_units, 1, s.gpu->stream);
    planted_restore(of);
    put();
    ok(cudaStreamSynchronize(s.gpu->stream), "layer");
    std::vector<float> dense_out = device_read(p->d.out, (size_t)n_heads * MODEL_WIDTH);
    for (uint32_t h = 0; h < n_heads; h++) {
        const winnow_gpu_item &item = s.layer[0].launch.item[h / p->view.n_q_heads];
        const __nv_bfloat16 *out =
            (const __nv_bfloat16 *)item.out + h % p->view.n_q_heads * MODEL_WIDTH;
        double difference = 0, all = 0;
        for (uint32_t d = 0; d < MODEL_WIDTH; d++) {
            double x = dense_out[(size_t)h * MODEL_WIDTH + d], y = __bfloat162float(out[d]);
            difference += (y - x) * (y - x);
            all += x * x;
        }
        sum += sqrt(difference / all);
    }
    return sum / n_heads;
}

/* A streamed layer: heads in turn into two buffers, a copy each. */
struct stream_pair {
    cudaStream_t copies, work;
    cudaEvent_t full[2], empty[2];
    uint8_t *buffer;
};

inline void peer_streamed_put(const peer &p, const stream_pair &s, const uint8_t *arena,
                              size_t arena_bytes)
{
    size_t unit_bytes = (size_t)p.d.n_blocks * MODEL_BLOCK_BYTES;

    for (uint32_t u = 0; u < p.n_units; u++) {
        winnow_gpu_view view = p.view;
        dense d = p.d;
        uint8_t *to = s.buffer + u % 2 * unit_bytes;
        d.blocks = to;
        d.out += (size_t)u * peer_form::HEADS * MODEL_WIDTH;
        view.unit += u;
        view.q_fragment += (size_t)u * winnow_gpu_q_fragment_words(&view);
        if (u >= 2)
            ok(cudaStreamWaitEvent(s.copies, s.empty[u % 2], 0), "event");
        ok(cudaMemcpyAsync(to, arena + u * unit_bytes % arena_bytes, unit_bytes,
                           cudaMemcpyHostToDevice, s.copies),
           "copy");
        ok(cudaEventRecord(s.full[u % 2], s.copies), "event");
        ok(cudaStreamWaitEvent(s.work, s.full[u % 2], 0), "event");
        dense_put<peer_form, 2>(view, d, 1, 2 * p.n_multiprocessors, s.work);
        ok(cudaEventRecord(s.empty[u % 2], s.work), "event");
    }
}

/* Of one layer, five times. arena: pinned; its bytes need not be the layer's. */
inline spread peer_streamed_time(const peer &p, const uint8_t *arena, size_t arena_bytes)
{
    constexpr int N_WARM = 2;
    stream_pair s = {};
    cudaEvent_t begin, end;
    std::vector<float> times;

    s.buffer = device_alloc<uint8_t>(2 * (size_t)p.d.n_blocks * MODEL_BLOCK_BYTES);
    ok(cudaStreamCreateWithFlags(&s.copies, cudaStreamNonBlocking), "stream");
    ok(cudaStreamCreateWithFlags(&s.work, cudaStreamNonBlocking), "stream");
    cudaEvent_t *events[] = {&begin, &end, &s.full[0], &s.full[1], &s.empty[0], &s.empty[1]};
    for (cudaEvent_t *event : events)
        ok(cudaEventCreate(event), "event");
    for (int i = 0; i < N_WARM + 5; i++) {
        float ms;
        ok(cudaEventRecord(begin, s.copies), "event");
        peer_streamed_put(p, s, arena, arena_bytes);
        ok(cudaEventRecord(end, s.work), "event");
        ok(cudaDeviceSynchronize(), "streamed");
        ok(cudaEventElapsedTime(&ms, begin, end), "event");
        if (i >= N_WARM)
            times.push_back(ms);
    }
    for (cudaEvent_t *event : events)
        ok(cudaEventDestroy(*event), "event");
    ok(cudaStreamDestroy(s.copies), "stream");
    ok(cudaStreamDestroy(s.work), "stream");
    ok(cudaFree(s.buffer), "cudaFree");
    return spread_of(times, 1);
}
