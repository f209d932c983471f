/*
 * The window under way, part by part, in two streams: while one part is attended the next one's blocks
 * cross the link. 2,048 positions compute for longer than their blocks take to come, 128K tokens or
 * 2K, so the cache's slots are not asked for them.
 *
 * A part is complete when its blocks have been read: a stage of the device holds them until they are
 * attended, and the part after the next waits for that in its stream, not here.
 */
#include <errno.h>
#include <kernels/cuda/state.h>
#include <string.h>

static cudaError_t events_create(struct winnow_gpu_windower *windower)
{
    cudaError_t error = cudaEventCreateWithFlags(&windower->finished, cudaEventDisableTiming);

    for (int i = 0; i < WINNOW_GPU_WINDOW_STAGES && error == cudaSuccess; i++) {
        error = cudaEventCreateWithFlags(&windower->gathered[i], cudaEventDisableTiming);
        if (error == cudaSuccess)
            error = cudaEventCreateWithFlags(&windower->attended[i], cudaEventDisableTiming);
    }
    return error;
}

cudaError_t winnow_gpu_windower_create(struct winnow_gpu *gpu)
{
    struct winnow_gpu_windower *windower = &gpu->windower;
    const struct winnow_gpu_window_view *view = &gpu->layout.window;
    uint32_t n_pos = gpu->options.n_window_positions;
    int least, greatest;

    if (n_pos == 0)
        return cudaSuccess;
    cudaError_t error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
    if (error == cudaSuccess)
        error =
            cudaStreamCreateWithPriority(&windower->attend_stream, cudaStreamNonBlocking, least);
    if (error == cudaSuccess) /* few thread blocks, which the others are not to keep waiting */
        error = cudaStreamCreateWithPriority(&windower->gather_stream, cudaStreamNonBlocking,
                                             least > greatest ? least - 1 : least);
    if (error == cudaSuccess)
        error = winnow_gpu_pinned_alloc(&windower->memory, gpu->layout.sizes.window_host_bytes);
    if (error == cudaSuccess)
        error = events_create(windower);
    if (error != cudaSuccess)
        return error;
    winnow_gpu_layout_window(view, n_pos, windower->memory, &windower->rows, windower->list);
    return winnow_gpu_window_prepare(view);
}

void winnow_gpu_windower_destroy(struct winnow_gpu *gpu)
{
    struct winnow_gpu_windower *windower = &gpu->windower;

    if (windower->gather_stream)
        cudaStreamSynchronize(windower->gather_stream);
    if (windower->attend_stream)
        cudaStreamSynchronize(windower->attend_stream);
    for (int i = 0; i < WINNOW_GPU_WINDOW_STAGES; i++) {
        if (windower->gathered[i])
            cudaEventDestroy(windower->gathered[i]);
        if (windower->attended[i])
            cudaEventDestroy(windower->attended[i]);
    }
    if (windower->finished)
        cudaEventDestroy(windower->finished);
    cudaFreeHost(windower->memory);
    if (windower->gather_stream)
        cudaStreamDestroy(windower->gather_stream);
    if (windower->attend_stream)
        cudaStreamDestroy(windower->attend_stream);
}

void winnow_gpu_window_rows(struct winnow_gpu *gpu, struct winnow_gpu_window_rows *rows)
{
    *rows = gpu->windower.rows;
}

/* The most blocks of a head; UINT32_MAX: a number is out of range. */
static uint32_t blocks_check(const struct winnow_gpu *gpu,
                             const struct winnow_gpu_window_part *part)
{
    const struct winnow_gpu_window_view *view = &gpu->layout.window;
    uint32_t n_most = 0;

    for (uint32_t head = 0; head < view->n_kv_heads; head++) {
        uint32_t n = part->n_blocks[head];
        const uint32_t *homes = part->homes + (size_t)head * view->n_blocks_max;
        if (n > view->n_blocks_max || (n % WINNOW_GROUP_BLOCKS && !part->is_last) ||
            (part->position && n != part->n_blocks[0]))
            return UINT32_MAX;
        for (uint32_t i = 0; i < n; i++)
            if (!winnow_gpu_home_is_in_arena(gpu, homes[i]))
                return UINT32_MAX;
        n_most = n > n_most ? n : n_most;
    }
    for (uint32_t i = 0; part->position && i < n_most; i++)
        if (part->n_tokens[i] == 0 || part->n_tokens[i] > WINNOW_BLOCK_TOKENS)
            return UINT32_MAX;
    return n_most;
}

static bool part_goes_on(const struct winnow_gpu *gpu, const struct winnow_gpu_window_part *part)
{
    const struct winnow_gpu_windower *windower = &gpu->windower;

    if (part->is_first)
        return part->n_pos > 0 && part->n_pos <= gpu->options.n_window_positions;
    return part->n_pos > 0 && part->n_pos == windower->n_pos && part->first == windower->first;
}

static void list_write(const struct winnow_gpu_window_view *view,
                       const struct winnow_gpu_window_part *part, uint32_t n_most,
                       const struct winnow_gpu_window_list *list)
{
    size_t n = view->n_blocks_max;

    memcpy(list->n_blocks, part->n_blocks, view->n_kv_heads * sizeof *list->n_blocks);
    for (size_t head = 0; head < view->n_kv_heads; head++)
        memcpy(list->home + head * n, part->homes + head * n,
               part->n_blocks[head] * sizeof *list->home);
    if (!part->position)
        return;
    memcpy(list->position, part->position, n_most * sizeof *list->position);
    memcpy(list->n_tokens, part->n_tokens, n_most * sizeof *list->n_tokens);
}

/* The queries of a window, by way of where its outputs will stand. */
static cudaError_t queries_put(struct winnow_gpu *gpu, uint32_t n_pos)
{
    const struct winnow_gpu_windower *windower = &gpu->windower;
    const struct winnow_gpu_window_view *view = &gpu->layout.window;
    size_t row_bytes = view->n_group * view->k_width * sizeof(float);
    size_t width = winnow_gpu_window_width(view->k_width, view->v_width);
    cudaError_t error =
        cudaMemcpy2DAsync(view->output, view->n_rows_max * width * sizeof(float), windower->rows.q,
                          gpu->options.n_window_positions * row_bytes, n_pos * row_bytes,
                          view->n_kv_heads, cudaMemcpyHostToDevice, windower->attend_stream);

    if (error == cudaSuccess)
        error =
            winnow_gpu_window_queries(view, (const float *)view->output, view->n_rows_max * width,
                                      n_pos * view->n_group, windower->attend_stream);
    return error;
}

static cudaError_t result_take(struct winnow_gpu *gpu, uint32_t n_pos)
{
    const struct winnow_gpu_windower *windower = &gpu->windower;
    const struct winnow_gpu_window_view *view = &gpu->layout.window;
    size_t n_rows = n_pos * view->n_group, v_bytes = view->v_width * sizeof(float);
    size_t stride = (size_t)gpu->options.n_window_positions * view->n_group;
    size_t width = winnow_gpu_window_width(view->k_width, view->v_width);
    cudaError_t error = cudaMemcpy2DAsync(
        windower->rows.lse, stride * sizeof(float), view->lse, view->n_rows_max * sizeof(float),
        n_rows * sizeof(float), view->n_kv_heads, cudaMemcpyDeviceToHost, windower->attend_stream);

    for (size_t head = 0; head < view->n_kv_heads && error == cudaSuccess; head++)
        error = cudaMemcpy2DAsync(windower->rows.out + head * stride * view->v_width, v_bytes,
                                  (const float *)view->output + head * view->n_rows_max * width,
                                  width * sizeof(float), v_bytes, n_rows, cudaMemcpyDeviceToHost,
                                  windower->attend_stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(windower->finished, windower->attend_stream);
    return error;
}

static cudaError_t part_put(struct winnow_gpu *gpu, const struct winnow_gpu_window_part *part,
                            uint32_t n_most, uint32_t idx)
{
    struct winnow_gpu_windower *windower = &gpu->windower;
    const struct winnow_gpu_window_view *view = &gpu->layout.window;
    struct winnow_gpu_window_launch launch = {
        .n_rows = part->n_pos * view->n_group,
        .stage_idx = idx,
        .first = part->first,
        .is_first = part->is_first,
        .is_last = part->is_last,
        .has_positions = part->position != NULL,
    };
    cudaError_t error = cudaStreamWaitEvent(windower->gather_stream, windower->attended[idx], 0);

    if (error == cudaSuccess)
        error = winnow_gpu_window_gather(view, idx, &windower->list[idx], n_most,
                                         launch.has_positions, windower->gather_stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(windower->gathered[idx], windower->gather_stream);
    if (error == cudaSuccess && part->is_first)
        error = queries_put(gpu, part->n_pos);
    if (error == cudaSuccess)
        error = cudaStreamWaitEvent(windower->attend_stream, windower->gathered[idx], 0);
    if (error == cudaSuccess)
        error = winnow_gpu_window_attend(view, &launch, windower->attend_stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(windower->attended[idx], windower->attend_stream);
    if (error == cudaSuccess && part->is_last)
        error = result_take(gpu, part->n_pos);
    return error;
}

int64_t winnow_gpu_window(struct winnow_gpu *gpu, const struct winnow_gpu_window_part *part)
{
    struct winnow_gpu_windower *windower = &gpu->windower;
    uint32_t idx = (uint32_t)(windower->n_parts % WINNOW_GPU_WINDOW_STAGES);
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    uint32_t n_most = part_goes_on(gpu, part) ? blocks_check(gpu, part) : UINT32_MAX;
    if (n_most == UINT32_MAX)
        return -EINVAL;
    if (windower->n_parts - windower->n_taken == WINNOW_GPU_WINDOW_STAGES)
        return -EBUSY;
    list_write(&gpu->layout.window, part, n_most, &windower->list[idx]);
    cudaError_t error = part_put(gpu, part, n_most, idx);
    if (winnow_gpu_device_check(gpu->device, error) < 0) { /* part of it may be in a stream */
        gpu->device->is_lost = true;
        return -EIO;
    }
    windower->is_last[idx] = part->is_last;
    windower->n_pos = part->is_last ? 0 : part->n_pos;
    windower->first = part->first;
    return ++windower->n_parts;
}

int winnow_gpu_window_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait)
{
    struct winnow_gpu_windower *windower = &gpu->windower;
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (ticket <= 0 || ticket > windower->n_parts)
        return -EINVAL;
    while (windower->n_taken < ticket) {
        uint32_t idx = (uint32_t)(windower->n_taken % WINNOW_GPU_WINDOW_STAGES);
        cudaEvent_t event = windower->is_last[idx] ? windower->finished : windower->gathered[idx];
        rc = winnow_gpu_device_reached(gpu->device, event, wait);
        if (rc <= 0)
            return rc;
        windower->n_taken++;
    }
    return 1;
}
