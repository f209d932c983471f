// Places. A block's place is arithmetic over its segment's grains, but for blocks whose write
// failed: those moved, alone, to the same bytes of another grain, since the other blocks of their
// grain are on disk already and may have left memory. The list of moves is short (three errors in a
// minute end all writing) and is looked at only for segments that have one.
#include <base/assert.h>
#include <base/crc32c.h>
#include <errno.h>
#include <storage/inside.h>

enum { WINNOW_FREE_FILES = 2 };

static uint32_t stored_n_grains(const struct winnow_stored *stored)
{
    return (stored->n_blocks + stored->blocks_per_grain - 1) / stored->blocks_per_grain;
}

void winnow_store_grow(struct winnow_store *store)
{
    uint32_t file_no = 0;
    if (store->growing || store->n_files == store->n_files_max || store->facts.degraded ||
        store->grains.n_free >= WINNOW_FREE_FILES * store->grains.n_per_file)
        return;
    while (store->file[file_no].made)
        file_no++;
    winnow_assert(file_no < store->n_files_max);
    struct winnow_message message = {.kind = WINNOW_MESSAGE_FILE, .file_no = file_no};
    int rc = winnow_ring_put(store->grow.asks, &message);
    winnow_assert(rc >= 0);
    store->growing = true;
    store->grow.method->wake(store->grow.io);
}

void winnow_store_file_made(struct winnow_store *store, uint32_t file_no, int rc)
{
    winnow_assert(store->growing);
    winnow_assert(file_no < store->n_files_max);
    if (rc < 0) {
        store->growing = false;
        store->grow_error = rc;
        return;
    }
    struct winnow_message message = {.kind = WINNOW_MESSAGE_FILE, .file_no = file_no};
    rc = winnow_ring_put(store->dispatch.asks, &message);
    winnow_assert(rc >= 0);
    store->dispatch.method->wake(store->dispatch.io);
}

void winnow_store_file_end(struct winnow_store *store, uint32_t file_no, int rc)
{
    winnow_assert(store->growing);
    store->growing = false;
    store->grow_error = rc;
    if (rc < 0)
        return;
    winnow_store_file_add(store, file_no);
    winnow_store_grow(store);
}

void winnow_store_file_add(struct winnow_store *store, uint32_t file_no)
{
    winnow_assert(file_no < store->n_files_max);
    winnow_assert(store->n_files < store->n_files_max);
    winnow_assert(!store->file[file_no].made);
    store->file[file_no].made = true;
    store->n_files++;
    winnow_grains_add_file(&store->grains, file_no);
}

void winnow_store_file_suspect(struct winnow_store *store, uint32_t file_no)
{
    winnow_assert(store->file[file_no].made);
    for (uint32_t i = 0; i < store->grains.n_per_file; i++)
        winnow_grains_suspect(&store->grains, file_no * store->grains.n_per_file + i);
}

int winnow_store_segment_create(struct winnow_store *store, uint32_t n_layers,
                                uint32_t blocks_per_layer, uint32_t block_bytes,
                                uint32_t *block_crc, struct winnow_stored **ret_stored)
{
    winnow_assert(n_layers > 0);
    winnow_assert(blocks_per_layer > 0);
    winnow_assert(block_crc);
    winnow_assert(blocks_per_layer <= UINT32_MAX / n_layers);
    winnow_assert(block_bytes > 0);
    winnow_assert(block_bytes % WINNOW_PAGE_BYTES == 0);
    winnow_assert(block_bytes <= WINNOW_PIECE_BYTES_MAX);
    if (store->facts.degraded)
        return -ENOSPC;
    struct winnow_stored *stored = winnow_pool_take(store->stored);
    if (!stored)
        return -ENOSPC;
    uint64_t segment_id = store->n_segments_made + 1;
    uint32_t uuid_sum = winnow_crc32c(0, store->uuid, sizeof store->uuid);
    *stored = (struct winnow_stored){
        .segment_idx = (uint32_t)winnow_pool_handle(store->stored, stored),
        .n_blocks = n_layers * blocks_per_layer,
        .blocks_per_layer = blocks_per_layer,
        .block_bytes = block_bytes,
        .blocks_per_grain = WINNOW_GRAIN_BYTES / block_bytes,
        .sum_seed = winnow_crc32c(uuid_sum, &segment_id, sizeof segment_id),
        .block_crc = block_crc,
    };
    int rc = winnow_grains_take_run(&store->grains, stored->segment_idx, stored_n_grains(stored));
    winnow_store_grow(store);
    if (rc < 0) {
        winnow_pool_give(store->stored, stored);
        return store->growing && !store->grow_error ? -EAGAIN : -ENOSPC;
    }
    store->n_segments_made = segment_id;
    *ret_stored = stored;
    return 0;
}

/* The moves of a segment end with it. */
static void moves_end(struct winnow_store *store, const struct winnow_stored *stored)
{
    uint32_t n_ended = 0;
    for (uint32_t i = 0; i < store->n_moves;) {
        if (store->move[i].stored != stored) {
            i++;
            continue;
        }
        winnow_grains_give(&store->grains, store->move[i].to_grain);
        store->move[i] = store->move[--store->n_moves];
        n_ended++;
    }
    winnow_assert(n_ended == stored->n_moves);
}

static void stored_free(struct winnow_store *store, struct winnow_stored *stored)
{
    winnow_assert(stored->dropped);
    winnow_assert(stored->n_requests == 0);
    moves_end(store, stored);
    winnow_grains_give_run(&store->grains, stored->segment_idx);
    winnow_pool_give(store->stored, stored);
}

void winnow_store_segment_destroy(struct winnow_store *store, struct winnow_stored *stored)
{
    winnow_assert(!stored->dropped);
    winnow_assert(stored->block_crc);
    atomic_store_explicit(&stored->dropped, true, memory_order_relaxed);
    stored->block_crc = NULL;
    if (!stored->n_requests)
        stored_free(store, stored);
}

void winnow_stored_release(struct winnow_store *store, struct winnow_stored *stored)
{
    winnow_assert(stored->n_requests > 0);
    if (--stored->n_requests == 0 && stored->dropped)
        stored_free(store, stored);
}

struct winnow_place winnow_stored_place(const struct winnow_store *store,
                                        const struct winnow_stored *stored, uint32_t block_idx)
{
    winnow_assert(block_idx < stored->n_blocks);
    uint32_t in_grain = block_idx % stored->blocks_per_grain;
    uint32_t grain =
        winnow_grains_of(&store->grains, stored->segment_idx, block_idx / stored->blocks_per_grain);
    for (uint32_t i = 0; stored->n_moves && i < store->n_moves; i++) {
        const struct winnow_move *move = &store->move[i];
        if (move->stored == stored && block_idx - move->block_idx < move->n_blocks)
            grain = move->to_grain;
    }
    winnow_assert(store->file[grain / store->grains.n_per_file].made);
    uint64_t grain_bytes = (uint64_t)(grain % store->grains.n_per_file) * WINNOW_GRAIN_BYTES;
    return (struct winnow_place){.file_no = grain / store->grains.n_per_file,
                                 .offset_bytes =
                                     grain_bytes + (uint64_t)in_grain * stored->block_bytes};
}

int winnow_stored_move(struct winnow_store *store, struct winnow_stored *stored, uint32_t block_idx,
                       uint32_t n_blocks)
{
    winnow_assert(n_blocks > 0);
    winnow_assert(n_blocks <= stored->blocks_per_grain - block_idx % stored->blocks_per_grain);
    if (store->n_moves == WINNOW_N_MOVES_MAX)
        return -ENOSPC;
    uint32_t to_grain = winnow_grains_take(&store->grains);
    if (to_grain == UINT32_MAX)
        return -ENOSPC;
    store->move[store->n_moves++] = (struct winnow_move){
        .stored = stored, .block_idx = block_idx, .n_blocks = n_blocks, .to_grain = to_grain};
    stored->n_moves++;
    return 0;
}
