/*
 * The cache of blocks on the device: where a selected block is, and which slot it gets.
 *
 * The slot's word is the truth, `loc` a hint. A hit stamps the word by CAS, so that nobody evicts
 * what this launch reads; whoever loses that CAS to an eviction takes the way of a miss. A miss
 * first takes `loc` (PLACING), so that two sessions that share a segment place a block once: the
 * second waits for the first to write loc, which holds nothing that the second has. Then the hand
 * moves by 8 slots and the one longest unused goes: least recently used of 8, where the hand has
 * not been for longest. Slots used by this launch never go. Nothing found in N_TRIES windows: the
 * block is read from the host, without a slot.
 *
 * A whole read wants every block once and none more than another: were it to evict or to stamp, it
 * would sweep the cache for blocks that no sparse step chose. It takes empty slots alone, as if they
 * had been unused for long, and stamps nothing; so the next that look for a slot find its blocks first.
 *
 * Rejected: an age that halves until a victim is found (up to 11 dependent loads a miss).
 */
#pragma once

#include <cooperative_groups.h>
#include <cuda/atomic>
#include <kernels/cuda/view.h>

struct winnow_gpu_resolved {
    uint32_t place;      /* winnow_gpu_listed's */
    uint32_t home, slot; /* when it has to be fetched: winnow_gpu_fetch's */
    bool is_hit;         /* found in a slot, complete */
    bool has_to_wait;    /* its slot is filled in this launch */
    bool has_to_fetch;   /* and by the caller's order */
    bool is_unfit;       /* on the host, no slot free */
    bool is_eviction;    /* its slot held another block */
    bool is_ahead;       /* missed, but fetched beside the scan: its place is on the stage */
};

/* A unit's layer and head in the index. */
struct winnow_gpu_place {
    uint32_t session, layer, head, stamp;
    bool is_whole; /* of a launch that reads everything */
};

namespace winnow_gpu_cache
{

constexpr uint32_t PLACING = 0xffffffffu; /* loc: somebody looks for a slot */
constexpr uint32_t WINDOW_SLOTS = 8, N_TRIES = 4;
constexpr uint32_t WHOLE_AGE = UINT32_C(1) << 30; /* older than what any sparse launch used */

typedef cuda::atomic_ref<uint32_t, cuda::thread_scope_device> atomic_u32;
typedef cuda::atomic_ref<uint64_t, cuda::thread_scope_device> atomic_u64;

static __device__ bool is_slot_of(const winnow_gpu_view &view, uint32_t layer, uint32_t loc)
{
    return loc != 0 && loc - 1 - layer * view.n_slots_layer < view.n_slots_layer;
}

/* loc names the block's place on the stage, where this launch has brought it. */
static __device__ bool is_staged(const winnow_gpu_view &view, const winnow_gpu_place &unit,
                                 uint32_t block_id, uint32_t loc)
{
    return loc != 0 && loc - 1 - view.n_layers * view.n_slots_layer < view.n_stage &&
           view.slot_word[loc - 1] == ((block_id + UINT64_C(1)) << 32 | unit.stamp);
}

/* A window of slots of its own for every caller of the warp that is here now. */
static __device__ uint32_t hand_take(uint32_t *hand)
{
    cooperative_groups::coalesced_group here = cooperative_groups::coalesced_threads();
    uint32_t first = 0;

    if (here.thread_rank() == 0)
        first = atomicAdd(hand, here.size());
    return here.shfl(first, 0) + here.thread_rank();
}

/* The word becomes mine with this launch's stamp (a whole read leaves it as it is: nobody evicts
 * beside it); false: it holds another block. */
static __device__ bool word_stamp(uint64_t *slot_word, uint32_t block_id,
                                  const winnow_gpu_place &unit, uint64_t *ret_word)
{
    atomic_u64 word(*slot_word);
    uint64_t old = word.load(cuda::memory_order_relaxed);

    while (old >> 32 == block_id + UINT64_C(1)) {
        uint64_t mine = unit.is_whole ? old : (old & ~WINNOW_GPU_STAMP_MASK) | unit.stamp;
        if (old == mine || word.compare_exchange_weak(old, mine, cuda::memory_order_relaxed)) {
            *ret_word = mine;
            return true;
        }
    }
    return false;
}

/* The slot of a window that was not used for longest, an empty one first; false: all are in use. */
static __device__ bool victim_find(const uint64_t *slot_word, uint32_t n_slots, uint32_t window,
                                   const winnow_gpu_place &unit, uint32_t *ret_slot,
                                   uint64_t *ret_word)
{
    uint32_t n_windows = (n_slots + WINDOW_SLOTS - 1) / WINDOW_SLOTS;
    uint32_t first = window % n_windows * WINDOW_SLOTS, oldest = 0;

#pragma unroll
    for (uint32_t i = 0; i < WINDOW_SLOTS; i++) {
        uint64_t word = first + i < n_slots ? __ldcg(slot_word + first + i) : WINNOW_GPU_FETCHING;
        uint32_t age = (unit.stamp - (uint32_t)word) & WINNOW_GPU_STAMP_MASK;
        age = unit.is_whole ? 0 : age;
        age = word >> 32 ? age : WINNOW_GPU_STAMP_MASK; /* empty */
        if (!(word & WINNOW_GPU_FETCHING) && age > oldest) {
            oldest = age;
            *ret_slot = first + i;
            *ret_word = word;
        }
    }
    return oldest > 0;
}

/* A slot of the layer marked as mine and as being filled; false: none is free. */
static __device__ bool slot_take(const winnow_gpu_view &view, const winnow_gpu_place &unit,
                                 uint32_t block_id, uint32_t *ret_slot, bool *ret_is_eviction)
{
    uint64_t *words = view.slot_word + (size_t)unit.layer * view.n_slots_layer;
    uint64_t stamp = (unit.stamp - (unit.is_whole ? WHOLE_AGE : 0)) & WINNOW_GPU_STAMP_MASK;
    uint64_t mine = (block_id + UINT64_C(1)) << 32 | WINNOW_GPU_FETCHING | stamp;

    for (uint32_t i = 0; i < N_TRIES && view.n_slots_layer > 0; i++) {
        uint64_t word;
        uint32_t slot, window = hand_take(view.hand + unit.layer);
        if (!victim_find(words, view.n_slots_layer, window, unit, &slot, &word))
            continue;
        if (!atomic_u64(words[slot])
                 .compare_exchange_strong(word, mine, cuda::memory_order_relaxed))
            continue;
        *ret_slot = unit.layer * view.n_slots_layer + slot;
        *ret_is_eviction = word >> 32 != 0;
        return true;
    }
    return false;
}

/* The holder of loc gives the block a slot, the host or the disk as its place, and loc back. */
static __device__ winnow_gpu_resolved place_missing(const winnow_gpu_view &view,
                                                    const winnow_gpu_place &unit, uint32_t block_id,
                                                    uint32_t home, uint32_t loc_old, uint32_t *loc)
{
    winnow_gpu_resolved block = {WINNOW_GPU_ON_DISK, home};
    uint32_t loc_new = 0;

    if (home != WINNOW_GPU_ON_DISK) {
        block.is_ahead = is_staged(view, unit, block_id, loc_old);
        block.home = block.is_ahead ? WINNOW_GPU_FROM_STAGE | (loc_old - 1) : home;
        block.has_to_fetch = slot_take(view, unit, block_id, &block.slot, &block.is_eviction);
        block.has_to_wait = block.has_to_fetch && !block.is_ahead;
        block.is_unfit = !block.has_to_fetch;
        block.place = block.is_ahead       ? loc_old - 1
                      : block.has_to_fetch ? block.slot
                                           : WINNOW_GPU_FROM_HOST | home;
        loc_new = block.has_to_fetch ? block.slot + 1 : 0;
    }
    atomic_u32(*loc).store(loc_new, cuda::memory_order_release);
    return block;
}

} // namespace winnow_gpu_cache

static __device__ inline uint8_t *winnow_gpu_unit_index(const winnow_gpu_view &view,
                                                        const winnow_gpu_place &unit,
                                                        uint32_t segment_slot)
{
    uint32_t unit_idx = unit.layer * view.n_kv_heads + unit.head;
    return view.index + segment_slot * view.segment_bytes + (uint64_t)unit_idx * view.unit_bytes;
}

/* Brings near what winnow_gpu_resolve reads first, of n segments whose slots stand at slots. All
 * threads of a thread block. */
static __device__ void winnow_gpu_resolve_prefetch(const winnow_gpu_view &view,
                                                   const winnow_gpu_place &unit,
                                                   const uint32_t *slots, uint32_t n)
{
    constexpr uint32_t SECTOR_BYTES = 32;
    uint32_t n_bytes = view.loc_at + view.span_blocks * 4 - view.home_at; /* home, then loc */

#pragma unroll 1
    for (uint32_t i = threadIdx.x / 32; i < n; i += blockDim.x / 32) {
        const uint8_t *homes = winnow_gpu_unit_index(view, unit, slots[i]) + view.home_at;
#pragma unroll 1
        for (uint32_t at = threadIdx.x % 32 * SECTOR_BYTES; at < n_bytes; at += 32 * SECTOR_BYTES)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(homes + at));
    }
}

/*
 * Where block `block` of a unit's list, in segment_slot, is. Any thread, for any blocks at once;
 * blocks of one warp differ. What has to be fetched is the caller's to order: until then its slot says FETCHING.
 */
static __device__ winnow_gpu_resolved winnow_gpu_resolve(const winnow_gpu_view &view,
                                                         const winnow_gpu_place &unit,
                                                         uint32_t segment_slot, uint32_t block)
{
    using namespace winnow_gpu_cache;
    uint32_t unit_idx = unit.layer * view.n_kv_heads + unit.head, i = block % view.span_blocks;
    uint8_t *index = winnow_gpu_unit_index(view, unit, segment_slot);
    uint32_t block_id =
        (segment_slot * view.n_layers * view.n_kv_heads + unit_idx) * view.span_blocks + i;
    uint32_t *loc_at = (uint32_t *)(index + view.loc_at) + i;
    uint32_t home = ((const uint32_t *)(index + view.home_at))[i];
    atomic_u32 loc(*loc_at);
    uint32_t at = loc.load(cuda::memory_order_acquire);

    for (;;) {
        uint64_t word;
        if (at == PLACING) {
            at = loc.load(cuda::memory_order_acquire);
            continue;
        }
        if (is_slot_of(view, unit.layer, at) &&
            word_stamp(view.slot_word + at - 1, block_id, unit, &word)) {
            bool is_filling = word & WINNOW_GPU_FETCHING;
            return {at - 1, home, 0, !is_filling, is_filling};
        }
        if (loc.compare_exchange_strong(at, PLACING, cuda::memory_order_acquire))
            return place_missing(view, unit, block_id, home, at, loc_at);
    }
}
