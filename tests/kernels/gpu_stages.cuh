/*
 * What the benches of single stages share: the device memory that a decode step sees, filled by
 * hand, and the part of tail that select relies on.
 */
#pragma once

#include <bench/gpu/card.cuh>
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/stage.h>

struct scene_options {
    uint32_t n_layers, n_kv_heads, n_group, k_width, v_width, io_dtype;
    uint32_t span_blocks, n_segments, n_sessions, n_session_segments_max, n_items_max;
    uint32_t n_blocks_max; /* of a launch, all units together */
    uint32_t n_slots_layer;
};

struct scene {
    winnow_gpu_view view; /* ln_z [unit][G]: scene_begin makes it the mass of a tail group */
    winnow_gpu_grid grid;
    winnow_gpu_launch *launch; /* host */
    float *ln_z;
    scene_options options;
};

inline void scene_init(scene *s, const scene_options &o)
{
    winnow_gpu_view *v = &s->view;
    cudaDeviceProp prop;
    size_t n_units = (size_t)o.n_items_max * o.n_kv_heads;

    ok(cudaGetDeviceProperties(&prop, 0), "cudaGetDeviceProperties");
    *s = scene();
    s->options = o;
    v->n_layers = o.n_layers;
    v->n_kv_heads = o.n_kv_heads;
    v->n_group = o.n_group;
    v->n_q_heads = o.n_kv_heads * o.n_group;
    v->k_width = o.k_width;
    v->v_width = o.v_width;
    v->kv_dtype = WINNOW_FP16;
    v->io_dtype = o.io_dtype;
    v->softmax_scale = 1 / sqrtf((float)o.k_width);
    v->span_blocks = o.span_blocks;
    v->block_bytes = 4096;
    winnow_gpu_index_layout(v);
    v->segment_bytes = (uint64_t)v->unit_bytes * o.n_layers * o.n_kv_heads;
    v->index = device_alloc<uint8_t>(v->segment_bytes * o.n_segments);
    v->n_slots_layer = o.n_slots_layer;
    v->slot_word = device_alloc<uint64_t>((size_t)o.n_layers * o.n_slots_layer + 1);
    ok(cudaMemset(v->slot_word, 0, 8 * ((size_t)o.n_layers * o.n_slots_layer + 1)), "clear");
    v->hand = device_alloc<uint32_t>(o.n_layers);
    v->counters = device_alloc<winnow_gpu_counters>(o.n_layers);
    ok(cudaMemset(v->hand, 0, 4 * o.n_layers), "clear");
    ok(cudaMemset(v->counters, 0, sizeof(winnow_gpu_counters) * o.n_layers), "clear");
    v->session_segments = device_alloc<uint32_t>((size_t)o.n_sessions * o.n_session_segments_max);
    v->n_session_segments_max = o.n_session_segments_max;
    v->launch = device_alloc<winnow_gpu_launch>(1);
    v->unit = device_alloc<winnow_gpu_unit>(n_units);
    v->tally = device_alloc<winnow_gpu_tally>(1);
    v->unit_tally = device_alloc<winnow_gpu_unit_tally>(n_units);
    ok(cudaMemset(v->tally, 0, sizeof(winnow_gpu_tally)), "clear");
    ok(cudaMemset(v->unit_tally, 0, sizeof(winnow_gpu_unit_tally) * n_units), "clear");
    v->queue = device_alloc<winnow_gpu_queue>(1);
    v->ln_e = device_alloc<float>((size_t)o.n_blocks_max * o.n_group + 64);
    v->key = device_alloc<float>(o.n_blocks_max + 64);
    v->selected = device_alloc<uint8_t>(o.n_blocks_max + 64);
    v->listed = device_alloc<winnow_gpu_listed>(o.n_blocks_max + 64);
    v->fetch = device_alloc<winnow_gpu_fetch>(o.n_blocks_max + 64);
    v->ready = device_alloc<winnow_gpu_work>(o.n_blocks_max + n_units + 64);
    v->waiting = device_alloc<winnow_gpu_work>(o.n_blocks_max + 64);
    v->partial = device_alloc<float>(n_units * winnow_gpu_partial_floats(v));
    s->ln_z = device_alloc<float>(n_units * o.n_group);
    s->launch = (winnow_gpu_launch *)calloc(1, sizeof(winnow_gpu_launch));
    s->grid = {(uint32_t)n_units, (uint32_t)prop.multiProcessorCount, o.n_blocks_max};
    ok(winnow_gpu_scan_prepare(v), "scan_prepare");
    ok(winnow_gpu_select_prepare(v), "select_prepare");
}

inline void scene_finish(scene *s)
{
    winnow_gpu_view *v = &s->view;
    void *owned[] = {v->index,    v->slot_word,  v->hand,    v->counters, v->session_segments,
                     v->launch,   v->unit,       v->queue,   v->ln_e,     v->key,
                     v->selected, v->listed,     v->fetch,   v->ready,    v->waiting,
                     v->tally,    v->unit_tally, v->partial, s->ln_z};
    for (void *memory : owned)
        ok(cudaFree(memory), "cudaFree");
    free(s->launch);
}

/* Numbers of the launch out of its items, to the device. */
inline void scene_launch_write(scene *s, uint32_t n_items, uint32_t stamp)
{
    winnow_gpu_launch *launch = s->launch;

    launch->n_items = n_items;
    launch->n_units = n_items * s->view.n_kv_heads;
    launch->stamp = stamp;
    launch->n_blocks = 0;
    for (uint32_t i = 0; i < n_items; i++) {
        launch->block_first[i] = launch->n_blocks;
        launch->partial_first[i] = i * s->view.n_kv_heads;
        launch->partials_of_head[i] = 1;
        launch->item[i].n_tokens =
            (uint64_t)WINNOW_BLOCK_TOKENS * (launch->item[i].n_segments * s->view.span_blocks + 1);
        launch->n_blocks += launch->item[i].n_segments * s->view.span_blocks * s->view.n_kv_heads;
    }
    device_write(s->view.launch, launch, 1);
}

/* A thread block a unit. */
static __global__ void scene_begin_kernel(winnow_gpu_view view, const float *ln_z,
                                          uint32_t stamp_step)
{
    winnow_gpu_launch *launch = view.launch;
    uint32_t u = blockIdx.x, item = u / view.n_kv_heads, n = sizeof(winnow_gpu_unit) / 4;
    winnow_gpu_unit *unit = view.unit + u;

    later_kernel_launch(); /* as tail does */
    if (u == 0 && threadIdx.x == 0) {
        launch->stamp += stamp_step;
        view.queue[0] = winnow_gpu_queue();
    }
    if (u >= launch->n_units)
        return;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x)
        ((uint32_t *)unit)[i] = 0;
    if (threadIdx.x < view.n_group)
        view.unit_tally[u].largest[threadIdx.x] = 0; /* of a scan without a select */
    __syncthreads();
    if (threadIdx.x < view.n_group) {
        float *partial = view.partial + (size_t)u * winnow_gpu_partial_floats(&view);
        partial[4 * threadIdx.x] = ln_z[u * view.n_group + threadIdx.x];
        partial[4 * threadIdx.x + 1] = 1;
    }
    if (threadIdx.x > 0)
        return;
    unit->item = item;
    unit->head = u % view.n_kv_heads;
    unit->layer = launch->item[item].layer;
    unit->n_blocks = launch->item[item].n_segments * view.span_blocks;
    unit->block_first = launch->block_first[item] + unit->head * unit->n_blocks;
    unit->n_chunks = (unit->n_blocks + WINNOW_GPU_CHUNK_BLOCKS - 1) / WINNOW_GPU_CHUNK_BLOCKS;
    unit->n_chunks = max(1, unit->n_chunks);
}

/* Clears units and queue; the stamp moves on by stamp_step. */
inline void scene_begin(const scene &s, uint32_t stamp_step, cudaStream_t stream)
{
    scene_begin_kernel<<<s.grid.n_units_max, 128, 0, stream>>>(s.view, s.ln_z, stamp_step);
    ok(cudaGetLastError(), "begin");
}

static __global__ void scene_fetched_kernel(winnow_gpu_view view)
{
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < view.queue->n_fetch;
         i += gridDim.x * blockDim.x)
        view.slot_word[view.fetch[i].slot] &= ~WINNOW_GPU_FETCHING;
}

/* As if the fetchers had done their work. */
inline void scene_fetched(const scene &s, cudaStream_t stream)
{
    scene_fetched_kernel<<<32, 256, 0, stream>>>(s.view);
    ok(cudaGetLastError(), "fetched");
}
