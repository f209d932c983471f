/*
 * What lies on the device between launches: the index of segments, homes, the segments of a
 * session, tails. All goes through pinned staging and one stream, so that a launch sees what was
 * put before it and none sees half.
 */
#include <base/assert.h>
#include <errno.h>
#include <kernels/cuda/control.h>
#include <kernels/cuda/index_pack.h>
#include <kernels/cuda/state.h>
#include <string.h>

/* Memory that the last copy out of it has left. */
static int staging_take(struct winnow_gpu *gpu, uint8_t **ret_memory)
{
    struct winnow_gpu_staging *staging = &gpu->staging[gpu->staging_idx];

    *ret_memory = staging->memory;
    return winnow_gpu_device_check(gpu->device, cudaEventSynchronize(staging->event));
}

/* Its copies are in the stream. */
static int staging_give(struct winnow_gpu *gpu, cudaError_t error)
{
    struct winnow_gpu_staging *staging = &gpu->staging[gpu->staging_idx];

    if (error == cudaSuccess)
        error = cudaEventRecord(staging->event, gpu->stream);
    gpu->staging_idx ^= 1;
    return winnow_gpu_device_check(gpu->device, error);
}

bool winnow_gpu_home_is_in_arena(const struct winnow_gpu *gpu, uint32_t home)
{
    uint64_t block_bytes = gpu->layout.view.block_bytes;
    return ((uint64_t)home << 12) + block_bytes <= gpu->device->host_bytes;
}

static bool home_is_valid(const struct winnow_gpu *gpu, uint32_t home)
{
    return home == WINNOW_GPU_ON_DISK || winnow_gpu_home_is_in_arena(gpu, home);
}

static bool homes_are_valid(const struct winnow_gpu *gpu, uint32_t n, const uint32_t *home)
{
    for (uint32_t i = 0; i < n; i++)
        if (!home_is_valid(gpu, home[i]))
            return false;
    return true;
}

int winnow_gpu_segment_put(struct winnow_gpu *gpu, uint32_t segment_slot, uint32_t layer,
                           const struct winnow_index_view *views, const uint32_t *homes)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint64_t n_bytes = (uint64_t)view->n_kv_heads * view->unit_bytes;
    uint8_t *staging;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (segment_slot >= gpu->options.n_segments_max || layer >= view->n_layers ||
        !homes_are_valid(gpu, view->n_kv_heads * view->span_blocks, homes))
        return -EINVAL;
    for (uint32_t h = 0; h < view->n_kv_heads; h++)
        if (views[h].n_blocks != view->span_blocks)
            return -EINVAL;
    rc = staging_take(gpu, &staging);
    if (rc < 0)
        return rc;
    for (uint32_t h = 0; h < view->n_kv_heads; h++)
        winnow_gpu_index_pack(view, &views[h], homes + h * view->span_blocks,
                              staging + (uint64_t)h * view->unit_bytes);
    cudaError_t error = winnow_gpu_slots_drop(view, segment_slot, layer, 1, gpu->stream);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(view->index + segment_slot * view->segment_bytes + layer * n_bytes,
                                staging, n_bytes, cudaMemcpyHostToDevice, gpu->stream);
    return staging_give(gpu, error);
}

int winnow_gpu_homes_set(struct winnow_gpu *gpu, uint32_t n, const struct winnow_gpu_home *homes)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint32_t n_max = (uint32_t)(gpu->staging_bytes / sizeof *homes);
    uint32_t n_blocks = view->n_layers * view->n_kv_heads * view->span_blocks;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < n; i++)
        if (homes[i].segment_slot >= gpu->options.n_segments_max || homes[i].block >= n_blocks ||
            !home_is_valid(gpu, homes[i].home))
            return -EINVAL;
    for (uint32_t first = 0; first < n; first += n_max) {
        uint32_t n_now = n - first < n_max ? n - first : n_max;
        uint8_t *staging;
        rc = staging_take(gpu, &staging);
        if (rc < 0)
            return rc;
        memcpy(staging, homes + first, n_now * sizeof *homes);
        rc = staging_give(gpu, winnow_gpu_homes_write(view, n_now,
                                                      (const struct winnow_gpu_home *)staging,
                                                      gpu->stream));
        if (rc < 0)
            return rc;
    }
    return 0;
}

int winnow_gpu_segment_drop(struct winnow_gpu *gpu, uint32_t segment_slot)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (segment_slot >= gpu->options.n_segments_max)
        return -EINVAL;
    return winnow_gpu_device_check(
        gpu->device, winnow_gpu_slots_drop(view, segment_slot, 0, view->n_layers, gpu->stream));
}

int winnow_gpu_session_set(struct winnow_gpu *gpu, uint32_t session, uint32_t n_segments,
                           const uint32_t *segment_slots)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint64_t n_bytes = n_segments * sizeof *segment_slots;
    uint8_t *staging;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (session >= gpu->options.n_sessions_max || n_segments > view->n_session_segments_max)
        return -EINVAL;
    for (uint32_t i = 0; i < n_segments; i++)
        if (segment_slots[i] >= gpu->options.n_segments_max)
            return -EINVAL;
    gpu->session[session].n_segments = n_segments;
    uint64_t past_bytes = (uint64_t)view->n_layers * view->n_kv_heads * sizeof *view->past;
    rc = winnow_gpu_device_check(gpu->device,
                                 cudaMemsetAsync((uint8_t *)view->past + session * past_bytes, 0xff,
                                                 past_bytes, gpu->stream));
    if (rc < 0 || n_segments == 0)
        return rc;
    rc = staging_take(gpu, &staging);
    if (rc < 0)
        return rc;
    memcpy(staging, segment_slots, n_bytes);
    return staging_give(
        gpu,
        cudaMemcpyAsync(view->session_segments + (uint64_t)session * view->n_session_segments_max,
                        staging, n_bytes, cudaMemcpyHostToDevice, gpu->stream));
}

/* Place of a block of the sinks and tail in its ring (view.h). */
static uint32_t tail_place(const struct winnow_gpu_view *view, uint32_t block_number)
{
    if (block_number < view->n_sink_blocks)
        return block_number;
    return view->n_sink_blocks + (block_number - view->n_sink_blocks) % view->ring_blocks;
}

/* How many blocks from i on stand one after the other in the ring, at most n_max. */
static uint32_t tail_run(const struct winnow_gpu_view *view, uint32_t n_max,
                         const uint32_t *block_number)
{
    uint32_t n = 1;
    while (n < n_max &&
           tail_place(view, block_number[n]) == tail_place(view, block_number[n - 1]) + 1)
        n++;
    return n;
}

/* n blocks whose places follow each other, of all heads. */
static int tail_put_run(struct winnow_gpu *gpu, uint32_t session, uint32_t layer, uint32_t n,
                        uint32_t place, const void *const *data)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint64_t block_bytes = view->block_bytes, run_bytes = n * block_bytes;
    uint64_t head_bytes = (view->n_sink_blocks + view->ring_blocks) * block_bytes;
    uint8_t *staging, *to = view->tails + session * view->session_bytes +
                            layer * view->n_kv_heads * head_bytes + place * block_bytes;
    int rc = staging_take(gpu, &staging);

    if (rc < 0)
        return rc;
    for (uint32_t h = 0; h < view->n_kv_heads; h++)
        for (uint32_t i = 0; i < n; i++)
            memcpy(staging + h * run_bytes + i * block_bytes, data[i * view->n_kv_heads + h],
                   block_bytes);
    return staging_give(gpu,
                        cudaMemcpy2DAsync(to, head_bytes, staging, run_bytes, run_bytes,
                                          view->n_kv_heads, cudaMemcpyHostToDevice, gpu->stream));
}

int winnow_gpu_tail_put(struct winnow_gpu *gpu, uint32_t session, uint32_t layer, uint32_t n,
                        const uint32_t *block_number, const void *const *data)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint64_t row_bytes = (uint64_t)view->n_kv_heads * view->block_bytes;
    uint32_t n_max = (uint32_t)(gpu->staging_bytes / row_bytes);
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (session >= gpu->options.n_sessions_max || layer >= view->n_layers)
        return -EINVAL;
    for (uint32_t i = 0; i < n;) {
        uint32_t n_run = tail_run(view, n - i < n_max ? n - i : n_max, block_number + i);
        rc = tail_put_run(gpu, session, layer, n_run, tail_place(view, block_number[i]),
                          data + (uint64_t)i * view->n_kv_heads);
        if (rc < 0)
            return rc;
        i += n_run;
    }
    return 0;
}

int winnow_gpu_counters(struct winnow_gpu *gpu, uint32_t layer,
                        struct winnow_gpu_counters *counters)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (layer >= view->n_layers)
        return -EINVAL;
    cudaError_t error = cudaMemcpyAsync(counters, view->counters + layer, sizeof *counters,
                                        cudaMemcpyDeviceToHost, gpu->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(gpu->stream);
    return winnow_gpu_device_check(gpu->device, error);
}
