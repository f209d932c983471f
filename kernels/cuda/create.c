/*
 * A gpu, made and ended. All memory is taken here, and the stages are captured into graphs for every
 * power of two of items, sparse and whole, so that a decode step allocates nothing and is one launch.
 *
 * Fresh device memory is filled with NaN: what reads bytes that nobody wrote is seen at once.
 */
#include <base/alloc.h>
#include <base/assert.h>
#include <errno.h>
#include <kernels/cuda/stage.h>
#include <kernels/cuda/state.h>
#include <stdio.h>

cudaError_t winnow_gpu_pinned_alloc(void *pointer, uint64_t n_bytes)
{
    return cudaHostAlloc(pointer, n_bytes > 0 ? n_bytes : 1,
                         cudaHostAllocPortable | cudaHostAllocMapped);
}

static cudaError_t flight_create(struct winnow_gpu *gpu, struct winnow_gpu_flight *flight)
{
    const struct winnow_gpu_layout *layout = &gpu->layout;
    uint64_t n_items = gpu->options.n_items_max;
    cudaError_t error = winnow_gpu_pinned_alloc(
        &flight->launch, winnow_gpu_layout_launch_bytes(layout, gpu->options.n_items_max));

    if (error == cudaSuccess)
        error = winnow_gpu_pinned_alloc(&flight->out, n_items * layout->out_bytes);
    if (error == cudaSuccess)
        error =
            winnow_gpu_pinned_alloc(&flight->disk_block, layout->n_blocks_max * sizeof(uint32_t));
    if (error == cudaSuccess)
        error = cudaEventCreateWithFlags(&flight->event, cudaEventDisableTiming);
    return error;
}

static cudaError_t staging_create(struct winnow_gpu *gpu, struct winnow_gpu_staging *staging)
{
    cudaError_t error = winnow_gpu_pinned_alloc(&staging->memory, gpu->staging_bytes);

    if (error == cudaSuccess)
        error = cudaEventCreateWithFlags(&staging->event, cudaEventDisableTiming);
    return error;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* Staging holds an index of one layer, or a block of every head, and a few MiB at least. */
static uint64_t staging_bytes_of(const struct winnow_gpu *gpu)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint64_t n_bytes = larger(UINT64_C(4) << 20, (uint64_t)view->n_kv_heads * view->unit_bytes);

    n_bytes = larger(n_bytes, (uint64_t)view->n_kv_heads * view->block_bytes);
    return larger(n_bytes, (uint64_t)view->n_session_segments_max * sizeof(uint32_t));
}

static cudaError_t host_create(struct winnow_gpu *gpu)
{
    struct winnow_gpu_view *view = &gpu->layout.view;
    cudaError_t error = winnow_gpu_pinned_alloc((void *)&view->done, sizeof *view->done);

    if (error == cudaSuccess)
        *view->done = 0;
    for (int i = 0; i < WINNOW_GPU_LAUNCHES_MAX && error == cudaSuccess; i++)
        error = flight_create(gpu, &gpu->flight[i]);
    gpu->staging_bytes = staging_bytes_of(gpu);
    for (int i = 0; i < 2 && error == cudaSuccess; i++)
        error = staging_create(gpu, &gpu->staging[i]);
    return error;
}

/* NaN everywhere, but 0 in what stages count in. */
static cudaError_t memory_clear(struct winnow_gpu *gpu)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint64_t n_slots = (uint64_t)view->n_slots_layer * view->n_layers + view->n_stage;
    uint64_t n_units = (uint64_t)gpu->options.n_items_max * view->n_kv_heads;
    cudaError_t error = cudaMemsetAsync(gpu->memory, 0xff, gpu->layout.n_bytes, gpu->stream);

    if (error == cudaSuccess && n_slots > 0)
        error = cudaMemsetAsync(view->slot_word, 0, n_slots * sizeof *view->slot_word, gpu->stream);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(view->hand, 0, view->n_layers * sizeof *view->hand, gpu->stream);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(view->counters, 0, view->n_layers * sizeof *view->counters,
                                gpu->stream);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(view->tally, 0, sizeof *view->tally, gpu->stream);
    if (error == cudaSuccess)
        error =
            cudaMemsetAsync(view->more, 0, gpu->layout.n_more * sizeof *view->more, gpu->stream);
    if (error == cudaSuccess)
        error =
            cudaMemsetAsync(view->unit_tally, 0, n_units * sizeof *view->unit_tally, gpu->stream);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(view->ahead, 0, view->n_stage * sizeof *view->ahead, gpu->stream);
    return error;
}

typedef cudaError_t stage(const struct winnow_gpu_view *, const struct winnow_gpu_grid *,
                          cudaStream_t);

static cudaError_t stages_put(const struct winnow_gpu *gpu, const struct winnow_gpu_grid *grid,
                              bool is_whole)
{
    static stage *const stages[WINNOW_GPU_KINDS][5] = {
        {winnow_gpu_stage_scan, winnow_gpu_stage_tail, winnow_gpu_stage_select,
         winnow_gpu_stage_attend},
        {winnow_gpu_stage_tail_first, winnow_gpu_stage_whole, winnow_gpu_stage_attend},
    };
    cudaError_t error = cudaSuccess;

    for (int i = 0; i < 5 && stages[is_whole][i] && error == cudaSuccess; i++)
        error = stages[is_whole][i](&gpu->layout.view, grid, gpu->stream);
    return error;
}

static cudaError_t graph_create(struct winnow_gpu *gpu, bool is_whole, int bucket)
{
    struct winnow_gpu_grid grid = {
        .n_units_max = gpu->layout.view.n_kv_heads << bucket,
        .n_multiprocessors = gpu->device->n_multiprocessors,
        .n_blocks_max = gpu->layout.n_blocks_max,
    };
    cudaGraph_t graph = NULL;
    cudaError_t error = cudaStreamBeginCapture(gpu->stream, cudaStreamCaptureModeThreadLocal);

    if (error != cudaSuccess)
        return error;
    error = stages_put(gpu, &grid, is_whole);
    cudaError_t error_of_end = cudaStreamEndCapture(gpu->stream, &graph);
    if (error == cudaSuccess)
        error = error_of_end;
    if (error == cudaSuccess)
        error = cudaGraphInstantiate(&gpu->graph[is_whole][bucket], graph, 0);
    if (error == cudaSuccess)
        error = cudaGraphUpload(gpu->graph[is_whole][bucket], gpu->stream);
    if (graph)
        cudaGraphDestroy(graph);
    return error;
}

static cudaError_t graphs_create(struct winnow_gpu *gpu)
{
    cudaError_t error = winnow_gpu_stages_prepare(&gpu->layout.view);
    uint32_t n_items = 1;

    for (int bucket = 0; error == cudaSuccess; bucket++, n_items *= 2) {
        error = graph_create(gpu, false, bucket);
        if (error == cudaSuccess)
            error = graph_create(gpu, true, bucket);
        if (n_items >= gpu->options.n_items_max)
            break;
    }
    return error;
}

static cudaError_t device_create(struct winnow_gpu *gpu)
{
    int least, greatest;
    cudaError_t error = cudaDeviceGetStreamPriorityRange(&least, &greatest);

    if (error == cudaSuccess)
        error = cudaStreamCreateWithPriority(&gpu->stream, cudaStreamNonBlocking, greatest);
    if (error == cudaSuccess)
        error = memory_clear(gpu);
    if (error == cudaSuccess)
        error = host_create(gpu);
    if (error == cudaSuccess)
        error = graphs_create(gpu);
    if (error == cudaSuccess)
        error = winnow_gpu_builders_create(gpu);
    if (error == cudaSuccess)
        error = winnow_gpu_windower_create(gpu);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(gpu->stream);
    return error;
}

int winnow_gpu_create(struct winnow_gpu_device *device, const struct winnow_gpu_options *options,
                      struct winnow_gpu **ret_gpu, char text[256])
{
    int rc = winnow_gpu_device_enter(device);

    *ret_gpu = NULL;
    if (rc < 0) {
        snprintf(text, 256, "the GPU is lost");
        return rc;
    }
    struct winnow_gpu *gpu = winnow_alloc(sizeof *gpu);
    if (!gpu) {
        snprintf(text, 256, "no memory for a GPU's state");
        return -ENOMEM;
    }
    gpu->device = device;
    gpu->options = *options;
    rc = winnow_gpu_layout_init(&gpu->layout, options, text);
    if (rc < 0) {
        winnow_gpu_destroy(gpu);
        return rc == -EOVERFLOW ? -EINVAL : rc;
    }
    gpu->session = winnow_alloc_array(options->n_sessions_max, sizeof *gpu->session);
    gpu->memory = winnow_gpu_device_take(device, gpu->layout.n_bytes);
    if (!gpu->memory || !gpu->session) {
        snprintf(text, 256,
                 "a model needs %.2f GiB of GPU memory, %.2f are left in one piece. hint: "
                 "raise gpu_memory, or open fewer sessions",
                 (double)gpu->layout.n_bytes * 0x1p-30,
                 (double)winnow_gpu_device_left(device) * 0x1p-30);
        winnow_gpu_destroy(gpu);
        return -ENOMEM;
    }
    winnow_gpu_layout_place(&gpu->layout, gpu->memory);
    gpu->layout.view.host = gpu->layout.window.host = device->host;
    cudaError_t error = device_create(gpu);
    rc = winnow_gpu_device_check(device, error);
    if (rc < 0) {
        snprintf(text, 256, "a model could not be put on the GPU: %.99s",
                 cudaGetErrorString(error));
        winnow_gpu_destroy(gpu);
        return rc;
    }
    *ret_gpu = gpu;
    return 0;
}

static void flight_destroy(struct winnow_gpu_flight *flight)
{
    cudaFreeHost(flight->launch);
    cudaFreeHost(flight->out);
    cudaFreeHost(flight->disk_block);
    if (flight->event)
        cudaEventDestroy(flight->event);
}

void winnow_gpu_destroy(struct winnow_gpu *gpu)
{
    if (!gpu)
        return;
    cudaSetDevice(gpu->device->ordinal);
    if (gpu->stream)
        cudaStreamSynchronize(gpu->stream);
    winnow_gpu_builders_destroy(gpu);
    winnow_gpu_windower_destroy(gpu);
    for (int i = 0; i < WINNOW_GPU_KINDS * WINNOW_GPU_BUCKETS; i++)
        if (gpu->graph[i / WINNOW_GPU_BUCKETS][i % WINNOW_GPU_BUCKETS])
            cudaGraphExecDestroy(gpu->graph[i / WINNOW_GPU_BUCKETS][i % WINNOW_GPU_BUCKETS]);
    for (int i = 0; i < WINNOW_GPU_LAUNCHES_MAX; i++)
        flight_destroy(&gpu->flight[i]);
    for (int i = 0; i < 2; i++) {
        cudaFreeHost(gpu->staging[i].memory);
        if (gpu->staging[i].event)
            cudaEventDestroy(gpu->staging[i].event);
    }
    cudaFreeHost((void *)gpu->layout.view.done);
    if (gpu->stream)
        cudaStreamDestroy(gpu->stream);
    cudaGetLastError(); /* of a lost device each of these fails; the process's end frees it */
    if (gpu->memory)
        winnow_gpu_device_give(gpu->device, gpu->memory);
    winnow_alloc_free(gpu->session);
    winnow_alloc_free(gpu);
}
