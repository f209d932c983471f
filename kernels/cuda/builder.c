/*
 * Build jobs: a layer's span each, in a stream and a graph of its own.
 *
 * A job's stages wait for one another, and none fills the card or the link: four jobs side by side
 * do, the blocks of one going up while another is cut. Their streams have the lowest priority, so
 * that a decode step waits for thread blocks that run, some 40 us each, and for none that wait.
 *
 * The result comes down in one copy to pinned memory and is handed out by the poll that finds it.
 */
#include <errno.h>
#include <kernels/cuda/build.h>
#include <kernels/cuda/state.h>
#include <string.h>

static struct winnow_gpu_build launch_of(const struct winnow_gpu *gpu, uint32_t idx)
{
    const struct winnow_gpu_layout *layout = &gpu->layout;
    const struct winnow_gpu_view *view = &layout->view;
    uint8_t *rows = layout->build_rows + idx * layout->build_rows_bytes;
    struct winnow_gpu_result result;

    winnow_gpu_layout_result(view, layout->build_result + idx * layout->build_result_bytes,
                             &result);
    return (struct winnow_gpu_build){
        .k_width = view->k_width,
        .v_width = view->v_width,
        .dtype = view->kv_dtype,
        .n_units = view->n_kv_heads,
        .k = rows,
        .v = rows + layout->build_keys_bytes,
        .order = result.order,
        .index = result.index,
        .scratch = layout->build_scratch + idx * layout->build_scratch_bytes,
    };
}

static cudaError_t stages_put(const struct winnow_gpu *gpu, uint32_t idx)
{
    const struct winnow_gpu_builder *builder = &gpu->builder[idx];
    const struct winnow_gpu_view *view = &gpu->layout.view;
    struct winnow_gpu_build launch = launch_of(gpu, idx);
    cudaError_t error =
        winnow_gpu_build_gather(view, view->n_kv_heads * view->span_blocks, builder->homes,
                                (void *)launch.k, (void *)launch.v, builder->stream);

    if (error == cudaSuccess)
        error = winnow_gpu_build_launch(&launch, builder->stream);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(builder->result, launch.order, gpu->layout.build_result_bytes,
                                cudaMemcpyDeviceToHost, builder->stream);
    return error;
}

static cudaError_t graph_create(struct winnow_gpu *gpu, uint32_t idx)
{
    struct winnow_gpu_builder *builder = &gpu->builder[idx];
    cudaGraph_t graph = NULL;
    cudaError_t error = cudaStreamBeginCapture(builder->stream, cudaStreamCaptureModeThreadLocal);

    if (error != cudaSuccess)
        return error;
    error = stages_put(gpu, idx);
    cudaError_t error_of_end = cudaStreamEndCapture(builder->stream, &graph);
    if (error == cudaSuccess)
        error = error_of_end;
    if (error == cudaSuccess)
        error = cudaGraphInstantiate(&builder->graph, graph, 0);
    if (error == cudaSuccess)
        error = cudaGraphUpload(builder->graph, builder->stream);
    if (graph)
        cudaGraphDestroy(graph);
    return error;
}

cudaError_t winnow_gpu_builders_create(struct winnow_gpu *gpu)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    int least, greatest;
    cudaError_t error = cudaDeviceGetStreamPriorityRange(&least, &greatest);

    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX && error == cudaSuccess; i++) {
        struct winnow_gpu_builder *builder = &gpu->builder[i];
        uint64_t n_blocks = (uint64_t)view->n_kv_heads * view->span_blocks;
        error = cudaStreamCreateWithPriority(&builder->stream, cudaStreamNonBlocking, least);
        if (error == cudaSuccess)
            error = winnow_gpu_pinned_alloc(&builder->homes, n_blocks * sizeof *builder->homes);
        if (error == cudaSuccess)
            error = winnow_gpu_pinned_alloc(&builder->result, gpu->layout.build_result_bytes);
        if (error == cudaSuccess)
            error = cudaEventCreateWithFlags(&builder->event, cudaEventDisableTiming);
        if (error == cudaSuccess)
            error = graph_create(gpu, i);
        if (error == cudaSuccess)
            error = cudaStreamSynchronize(builder->stream);
    }
    return error;
}

void winnow_gpu_builders_destroy(struct winnow_gpu *gpu)
{
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++) {
        struct winnow_gpu_builder *builder = &gpu->builder[i];
        if (builder->stream)
            cudaStreamSynchronize(builder->stream);
        if (builder->graph)
            cudaGraphExecDestroy(builder->graph);
        if (builder->event)
            cudaEventDestroy(builder->event);
        cudaFreeHost(builder->homes);
        cudaFreeHost(builder->result);
        if (builder->stream)
            cudaStreamDestroy(builder->stream);
    }
}

static struct winnow_gpu_builder *builder_of(struct winnow_gpu *gpu, int64_t ticket)
{
    for (uint32_t i = 0; i < WINNOW_GPU_BUILDS_MAX; i++)
        if (gpu->builder[i].ticket == ticket)
            return &gpu->builder[i];
    return NULL;
}

int64_t winnow_gpu_build(struct winnow_gpu *gpu, const uint32_t *homes)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    uint32_t n_blocks = view->n_kv_heads * view->span_blocks;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < n_blocks; i++)
        if (!winnow_gpu_home_is_in_arena(gpu, homes[i]))
            return -EINVAL;
    struct winnow_gpu_builder *builder = builder_of(gpu, 0);
    if (!builder)
        return -EBUSY;
    memcpy(builder->homes, homes, n_blocks * sizeof *homes);
    cudaError_t error = cudaGraphLaunch(builder->graph, builder->stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(builder->event, builder->stream);
    if (winnow_gpu_device_check(gpu->device, error) < 0) { /* part of it may be in the stream */
        gpu->device->is_lost = true;
        return -EIO;
    }
    return builder->ticket = ++gpu->n_builds;
}

static void result_take(const struct winnow_gpu *gpu, const struct winnow_gpu_builder *builder,
                        uint16_t *const *order, const struct winnow_index_view *views)
{
    size_t n = gpu->layout.view.span_blocks, k_width = gpu->layout.view.k_width,
           v_width = gpu->layout.view.v_width;
    struct winnow_gpu_result of;

    winnow_gpu_layout_result(&gpu->layout.view, builder->result, &of);
    for (size_t h = 0; h < gpu->layout.view.n_kv_heads; h++) {
        const struct winnow_index_view *to = &views[h];
        memcpy(order[h], of.order + h * 16 * n, 16 * n * sizeof *of.order);
        memcpy(to->head, of.index.head + h * n, n * sizeof *to->head);
        memcpy(to->centroid, of.index.centroid + h * n * k_width, n * k_width);
        memcpy(to->vmean, of.index.vmean + h * n * v_width, n * v_width);
        memcpy(to->code, of.index.code + h * 8 * n * k_width, 8 * n * k_width);
        memcpy(to->code_scale, of.index.code_scale + h * 16 * n, 16 * n * sizeof *to->code_scale);
        memcpy(to->mean_k, of.index.mean_k + h * k_width, k_width * sizeof *to->mean_k);
        memcpy(to->mean_v, of.index.mean_v + h * v_width, v_width * sizeof *to->mean_v);
        *to->v_max = of.index.v_max[h];
    }
}

int winnow_gpu_build_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait, uint16_t *const *order,
                          const struct winnow_index_view *views)
{
    struct winnow_gpu_builder *builder = ticket > 0 ? builder_of(gpu, ticket) : NULL;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (!builder)
        return -EINVAL;
    for (uint32_t h = 0; h < gpu->layout.view.n_kv_heads; h++)
        if (views[h].n_blocks != gpu->layout.view.span_blocks || views[h].var)
            return -EINVAL;
    rc = winnow_gpu_device_reached(gpu->device, builder->event, wait);
    if (rc <= 0)
        return rc;
    result_take(gpu, builder, order, views);
    builder->ticket = 0;
    return 1;
}
