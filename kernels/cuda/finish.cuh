/*
 * The end of a launch: certificates, then the word that says it is complete. By the thread block that
 * ended the last unit.
 */
#pragma once

#include <kernels/cuda/fragment.cuh>

/* NaN into all of an item's output, by one warp: in every type, all bits set. */
__device__ inline void item_poison(const winnow_gpu_view &view, const winnow_gpu_item &item)
{
    uint32_t n_words = view.n_q_heads * view.v_width / (view.io_dtype == WINNOW_FP32 ? 1 : 2);

    for (uint32_t i = lane_id(); i < n_words; i += 32)
        ((uint32_t *)item.out)[i] = ~0u;
    for (uint32_t i = lane_id(); item.lse && i < view.n_q_heads; i += 32)
        item.lse[i] = NAN;
}

/* The blocks of an item that no slot holds, by one warp, in order. */
__device__ inline void item_list_disk(const winnow_gpu_view &view, const winnow_gpu_item &item,
                                      const winnow_gpu_unit *units)
{
    uint32_t n = 0, lane = lane_id();

    for (uint32_t h = 0; h < view.n_kv_heads; h++) {
        const winnow_gpu_unit *unit = units + h;
        uint32_t n_listed = __ldcg(&unit->n_selected) + __ldcg(&unit->n_more);
        if (!__ldcg(&unit->n_disk) && !__ldcg(&unit->n_unfit))
            continue;
        for (uint32_t first = 0; first < n_listed; first += 32) {
            winnow_gpu_listed listed = {0, 0};
            if (first + lane < n_listed) {
                uint2 x = __ldcg((const uint2 *)(view.listed + unit->block_first + first + lane));
                listed = {x.x, x.y};
            }
            /* from the host, on disk (all bits), or staged: none of the cache's slots */
            bool is_slotless = listed.place >= view.n_layers * view.n_slots_layer;
            uint32_t all = __ballot_sync(~0u, is_slotless);
            uint32_t at = n + __popc(all & ((1u << lane) - 1));
            if (is_slotless && at < item.n_disk_block_max)
                item.disk_block[at] = h * unit->n_blocks + listed.block;
            n += __popc(all);
        }
    }
}

/* An item's certificate, by one warp, which writes it at once: over the link, a store is a packet. */
__device__ inline void item_finish(const winnow_gpu_view &view, uint32_t item_idx,
                                   winnow_gpu_certificate *memory)
{
    const winnow_gpu_item &item = view.launch->item[item_idx];
    const winnow_gpu_unit *units = view.unit + item_idx * view.n_kv_heads;
    winnow_gpu_certificate c = {0, 1, INFINITY, 0, 0, 0, 0, 0, 0}, *to = item.certificate;
    uint32_t lane = lane_id();

    for (uint32_t h = lane; h < view.n_kv_heads; h += 32) {
        const winnow_gpu_unit *unit = units + h;
        uint32_t n_more = __ldcg(&unit->n_more);
        c.status = max(c.status, __ldcg(&unit->status));
        c.n_rounds = n_more > 0 ? 2 : c.n_rounds;
        c.n_blocks_device += __ldcg(&unit->n_device);
        uint32_t n_host = __ldcg(&unit->n_host);
        c.n_blocks_host += n_host;
        if (view.n_ahead > 0 && n_host == 0)
            view.past[(item.session * view.n_layers + item.layer) * view.n_kv_heads + h]
                .key_foreseen = INFINITY; /* nothing is missing: nothing to look for */
        c.n_blocks_unfit += __ldcg(&unit->n_unfit);
        c.n_blocks_disk += __ldcg(&unit->n_disk);
        c.n_heads_spent +=
            item.n_blocks_max && __ldcg(&unit->n_selected) + n_more >= item.n_blocks_max;
#pragma unroll 4
        for (uint32_t g = 0; g < view.n_group; g++) {
            float mass = __ldcg(&unit->mass[g]);
            c.mass_reached = fminf(c.mass_reached, mass);
            c.mass_mean += mass;
        }
    }
#pragma unroll 1
    for (int offset = 1; offset < 32; offset *= 2) {
        c.mass_reached = fminf(c.mass_reached, __shfl_xor_sync(~0u, c.mass_reached, offset));
        c.mass_mean += __shfl_xor_sync(~0u, c.mass_mean, offset);
    }
    c.mass_mean = fminf(fmaxf(c.mass_mean / (float)view.n_q_heads, c.mass_reached), 1);
    c.status = __reduce_max_sync(~0u, c.status);
    c.n_rounds = __reduce_max_sync(~0u, c.n_rounds);
    c.n_blocks_device = __reduce_add_sync(~0u, c.n_blocks_device);
    c.n_blocks_host = __reduce_add_sync(~0u, c.n_blocks_host);
    c.n_blocks_unfit = __reduce_add_sync(~0u, c.n_blocks_unfit);
    c.n_blocks_disk = __reduce_add_sync(~0u, c.n_blocks_disk);
    c.n_heads_spent = __reduce_add_sync(~0u, c.n_heads_spent);
    if (c.status) {
        c = {c.status, 1};
        item_poison(view, item);
    }
    if (lane == 0)
        *memory = c;
    __syncwarp();
    if (lane < sizeof c / 4)
        ((uint32_t *)to)[lane] = ((const uint32_t *)memory)[lane];
    if (c.n_blocks_disk > 0 && item.disk_block)
        item_list_disk(view, item, units);
}

/* When all units are done, by one thread block: a warp an item. */
__device__ inline void launch_finish(const winnow_gpu_view &view)
{
    __shared__ winnow_gpu_certificate certificate[GROUP];
    uint32_t n_items = view.launch->n_items, stamp = view.launch->stamp;

    for (uint32_t i = threadIdx.x / 32; i < n_items; i += GROUP)
        item_finish(view, i, certificate + threadIdx.x / 32);
    __syncthreads();
    if (threadIdx.x == 0 && view.done) {
        __threadfence_system();
        *view.done = stamp;
    }
}
