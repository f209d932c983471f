/*
 * A decode step: items checked, copied and launched; polled by a word that the device writes.
 *
 * Everything a launch needs goes up in one copy from pinned memory (the launch as far as it has
 * items, then their q, k and v); its results are written by the kernels into pinned memory and
 * copied out by poll, which asks the driver only now and then: a look at the word takes 20 ns, a
 * question to the driver 1 us.
 */
#include <base/assert.h>
#include <errno.h>
#include <kernels/cuda/state.h>
#include <string.h>

enum { N_POLLS_A_QUERY = 256 }; /* a lost device is found no sooner */

static bool item_is_valid(const struct winnow_gpu *gpu, const struct winnow_gpu_item *item)
{
    const struct winnow_gpu_options *options = &gpu->options;
    uint64_t n_sealed = (uint64_t)item->n_segments * options->segment_tokens;
    uint64_t n_ring = (uint64_t)gpu->layout.view.ring_blocks * WINNOW_BLOCK_TOKENS;

    if (item->session >= options->n_sessions_max || item->layer >= options->shape.n_layers)
        return false;
    if (item->n_segments > gpu->session[item->session].n_segments)
        return false;
    if (item->n_segments > 0 && item->n_tokens < options->n_sinks + n_sealed)
        return false;
    if (item->n_tokens > options->n_sinks + n_sealed + n_ring)
        return false;
    if (!(item->mass > 0 && item->mass <= 1) || (item->mass == 1 && item->n_blocks_max > 0))
        return false;
    if (!item->q || !item->out || !item->certificate || !item->k != !item->v)
        return false;
    return item->n_tokens > 0 || !item->k;
}

/* A session at most once, all whole or none, and room for all lists. */
static bool items_are_valid(struct winnow_gpu *gpu, uint32_t n_items,
                            const struct winnow_gpu_item *items)
{
    uint64_t n_blocks = 0;

    gpu->n_checks++;
    if (n_items == 0 || n_items > gpu->options.n_items_max)
        return false;
    for (uint32_t i = 0; i < n_items; i++) {
        if (!item_is_valid(gpu, &items[i]) || (items[i].mass == 1) != (items[0].mass == 1))
            return false;
        if (gpu->session[items[i].session].checked == gpu->n_checks)
            return false;
        gpu->session[items[i].session].checked = gpu->n_checks;
        n_blocks += (uint64_t)items[i].n_segments * gpu->layout.view.span_blocks;
    }
    return n_blocks <= gpu->options.n_launch_blocks_max;
}

/* Copies an item's q, k, v to pinned memory; *to is the item as the device sees it. */
static void item_put(const struct winnow_gpu *gpu, struct winnow_gpu_flight *flight, uint32_t i,
                     struct winnow_gpu_item *to)
{
    const struct winnow_gpu_item *item = &flight->item[i];
    const struct winnow_gpu_layout *layout = &gpu->layout;
    const struct winnow_gpu_view *view = &layout->view;
    uint64_t element_bytes = view->io_dtype == WINNOW_FP32 ? 4 : 2;
    uint64_t in_at = winnow_gpu_layout_in_at(flight->n_items) + i * layout->in_bytes;
    uint8_t *in = (uint8_t *)flight->launch + in_at, *out = flight->out + i * layout->out_bytes;
    uint8_t *in_of_device = (uint8_t *)view->launch + in_at;

    *to = *item;
    memcpy(in, item->q, view->n_q_heads * view->k_width * element_bytes);
    to->q = in_of_device;
    if (item->k) {
        memcpy(in + layout->k_at, item->k, view->n_kv_heads * view->k_width * element_bytes);
        memcpy(in + layout->v_at, item->v, view->n_kv_heads * view->v_width * element_bytes);
        to->k = in_of_device + layout->k_at;
        to->v = in_of_device + layout->v_at;
    }
    to->out = out;
    to->lse = (float *)(out + layout->lse_at);
    to->certificate = (struct winnow_gpu_certificate *)(out + layout->certificate_at);
}

static void launch_fill(const struct winnow_gpu *gpu, struct winnow_gpu_flight *flight,
                        uint32_t stamp)
{
    const struct winnow_gpu_view *view = &gpu->layout.view;
    struct winnow_gpu_launch *launch = flight->launch;
    uint32_t n_blocks = 0, n_partials = 0;

    launch->n_items = flight->n_items;
    launch->n_units = flight->n_items * view->n_kv_heads;
    launch->stamp = stamp;
    for (uint32_t i = 0; i < flight->n_items; i++) {
        struct winnow_gpu_item *item = &launch->item[i];
        uint32_t n_of_head = flight->item[i].n_segments * view->span_blocks;
        uint32_t n_of_item = n_of_head * view->n_kv_heads;
        item_put(gpu, flight, i, item);
        if (item->disk_block) {
            item->disk_block = flight->disk_block + n_blocks;
            if (item->n_disk_block_max > n_of_item)
                item->n_disk_block_max = n_of_item;
        }
        launch->block_first[i] = n_blocks;
        launch->partial_first[i] = n_partials;
        launch->partials_of_head[i] = winnow_gpu_layout_partials(view, n_of_head);
        n_blocks += n_of_item;
        n_partials += launch->partials_of_head[i] * view->n_kv_heads;
    }
    launch->n_blocks = n_blocks;
}

static int bucket_of(uint32_t n_items)
{
    int bucket = 0;
    while (UINT32_C(1) << bucket < n_items)
        bucket++;
    return bucket;
}

static cudaError_t launch_put(struct winnow_gpu *gpu, const struct winnow_gpu_flight *flight)
{
    cudaGraphExec_t graph = gpu->graph[flight->item[0].mass == 1][bucket_of(flight->n_items)];
    cudaError_t error =
        cudaMemcpyAsync(gpu->layout.view.launch, flight->launch,
                        winnow_gpu_layout_launch_bytes(&gpu->layout, flight->n_items),
                        cudaMemcpyHostToDevice, gpu->stream);

    if (error == cudaSuccess)
        error = cudaGraphLaunch(graph, gpu->stream);
    if (error == cudaSuccess)
        error = cudaEventRecord(flight->event, gpu->stream);
    return error;
}

int64_t winnow_gpu_decode(struct winnow_gpu *gpu, uint32_t n_items,
                          const struct winnow_gpu_item *items)
{
    int rc = winnow_gpu_device_enter(gpu->device);

    if (rc < 0)
        return rc;
    if (!items_are_valid(gpu, n_items, items))
        return -EINVAL;
    if (gpu->n_launched - gpu->n_taken == WINNOW_GPU_LAUNCHES_MAX)
        return -EBUSY;

    int64_t ticket = gpu->n_launched + 1;
    struct winnow_gpu_flight *flight = &gpu->flight[ticket % WINNOW_GPU_LAUNCHES_MAX];
    flight->n_items = n_items;
    flight->n_polls = 0;
    memcpy(flight->item, items, n_items * sizeof *items);
    launch_fill(gpu, flight, (uint32_t)ticket & WINNOW_GPU_STAMP_MASK);
    rc = winnow_gpu_device_check(gpu->device, launch_put(gpu, flight));
    if (rc < 0) { /* part of it may be in the stream */
        gpu->device->is_lost = true;
        return -EIO;
    }
    gpu->n_launched = ticket;
    return ticket;
}

/* Results of a complete launch to where its items want them. */
static void launch_take(struct winnow_gpu *gpu, int64_t ticket)
{
    const struct winnow_gpu_layout *layout = &gpu->layout;
    const struct winnow_gpu_view *view = &layout->view;
    const struct winnow_gpu_flight *flight = &gpu->flight[ticket % WINNOW_GPU_LAUNCHES_MAX];
    uint64_t out_bytes =
        (uint64_t)view->n_q_heads * view->v_width * (view->io_dtype == WINNOW_FP32 ? 4 : 2);

    for (uint32_t i = 0; i < flight->n_items; i++) {
        const struct winnow_gpu_item *item = &flight->item[i], *of = &flight->launch->item[i];
        const uint8_t *out = flight->out + i * layout->out_bytes;
        memcpy(item->out, out, out_bytes);
        memcpy(item->certificate, out + layout->certificate_at, sizeof *item->certificate);
        if (item->lse)
            memcpy(item->lse, out + layout->lse_at, view->n_q_heads * sizeof *item->lse);
        uint32_t n_listed = item->certificate->n_blocks_disk + item->certificate->n_blocks_unfit;
        if (item->disk_block && item->certificate->n_blocks_disk > 0)
            memcpy(item->disk_block, of->disk_block,
                   (n_listed < of->n_disk_block_max ? n_listed : of->n_disk_block_max) *
                       sizeof *item->disk_block);
    }
    gpu->n_taken = ticket;
}

/* 1, 0 or -EIO. The word names the last complete launch, by 31 bits of its ticket. */
static int launch_is_complete(struct winnow_gpu *gpu, int64_t ticket, bool wait)
{
    struct winnow_gpu_flight *flight = &gpu->flight[ticket % WINNOW_GPU_LAUNCHES_MAX];
    uint32_t ahead = (*gpu->layout.view.done - (uint32_t)ticket) & WINNOW_GPU_STAMP_MASK;

    if (ahead < WINNOW_GPU_LAUNCHES_MAX) {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return 1;
    }
    if (!wait && ++flight->n_polls % N_POLLS_A_QUERY)
        return 0;
    int rc = winnow_gpu_device_enter(gpu->device);
    if (rc < 0)
        return rc;
    return winnow_gpu_device_reached(gpu->device, flight->event, wait);
}

int winnow_gpu_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait)
{
    if (gpu->device->is_lost)
        return -EIO;
    if (ticket <= 0 || ticket > gpu->n_launched)
        return -EINVAL;
    while (gpu->n_taken < ticket) {
        int rc = launch_is_complete(gpu, gpu->n_taken + 1, wait);
        if (rc <= 0)
            return rc;
        launch_take(gpu, gpu->n_taken + 1);
    }
    return 1;
}
