// Chunks: how an exact window reads what is sealed. Blocks are walked in disk order (segment, KV head,
// block); those in memory are used where they are, the others come through staging, in runs that the
// store merges into large reads. Two chunks alternate: one is attended while the next is read.
//
// Where a chunk ends depends on what is resident, and the kernels attend eight blocks of a call at
// once: so a chunk has whole groups of eight of a head, and the same eight meet in every run.
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>

enum { N_READS_ONCE = 256 };

struct filler {
    struct winnow_core *core;
    struct winnow_session *session;
    struct winnow_chunk *chunk;
    uint32_t chunk_idx;
    struct winnow_stage stage;
    uint64_t staged_bytes;
    uint32_t n;
    struct winnow_load *load[N_READS_ONCE];
    struct winnow_store_read read[N_READS_ONCE];
};

static void filler_send(struct filler *filler)
{
    struct winnow_op *op = &filler->session->op;
    winnow_assert(filler->n == filler->chunk->n_missing);
    winnow_assert(filler->n <= N_READS_ONCE);
    if (filler->n == 0)
        return;
    int rc = winnow_store_read(filler->core->tiers.store, filler->read, filler->n, WINNOW_IO_EXACT,
                               op->request->deadline_ns);
    winnow_assert(rc == 0); /* WINNOW_STORE_REQUESTS: one for each load, and for each spill */
    op->n_loads += filler->n;
}

/* Asks for a block that is not in memory. False: no staging now. */
static bool filler_load(struct filler *filler, struct winnow_segment *segment, uint32_t in_segment,
                        uint32_t at)
{
    struct winnow_core *core = filler->core;
    uint64_t half_bytes =
        (uint64_t)winnow_arena_staging_pieces(core->tiers.arena) * WINNOW_STAGING_BYTES / 2;
    if (filler->staged_bytes + segment->block_bytes > half_bytes || filler->n == N_READS_ONCE)
        return false;
    void *data = winnow_stage_take(core, &filler->stage, segment->block_bytes);
    if (!data)
        return false;
    struct winnow_load *load = winnow_load_take(core, filler->session, segment, in_segment);
    if (!load) {
        winnow_arena_staging_give(core->tiers.arena, data);
        return false;
    }
    load->data = data;
    load->group = filler->chunk_idx;
    load->place = at;
    filler->load[filler->n] = load;
    filler->read[filler->n++] = (struct winnow_store_read){segment->stored, in_segment, data,
                                                           winnow_pool_handle(core->loads, load)};
    filler->staged_bytes += segment->block_bytes;
    filler->chunk->n_missing++;
    return true;
}

/* Takes the cursor's block into the chunk. False: it does not fit now. */
static bool filler_take(struct filler *filler, const struct winnow_cursor *cursor)
{
    struct winnow_chunk *chunk = filler->chunk;
    const struct winnow_context *context = filler->session->context;
    struct winnow_op *op = &filler->session->op;
    struct winnow_segment *segment = context->segment[cursor->segment_idx];
    uint32_t cap = op->pass->chunk_blocks_max, *n_of_head = &chunk->n_of_head[cursor->head];
    winnow_assert(cursor->head < context->shape.n_kv_heads);
    winnow_assert(segment->layer[op->layer].in_force);
    winnow_assert(*n_of_head <= cap);
    if (*n_of_head == cap)
        return false;
    uint32_t at = cursor->head * cap + *n_of_head;
    uint32_t of_layer = cursor->head * segment->n_blocks + cursor->block_idx;
    uint32_t place = winnow_segment_place(segment, op->layer)[of_layer];
    chunk->source[at] = WINNOW_FROM_NOWHERE;
    if (place) {
        winnow_arena_pin(filler->core->tiers.arena, place - 1);
        chunk->source[at] = WINNOW_FROM_CACHE;
        chunk->slot[at] = place - 1;
        chunk->data[at] = winnow_arena_data(filler->core->tiers.arena, place - 1);
        op->certificate.n_blocks_host++;
    } else {
        uint32_t in_segment = op->layer * context->shape.n_kv_heads * segment->n_blocks + of_layer;
        if (!filler_load(filler, segment, in_segment, at))
            return false;
        op->certificate.n_blocks_disk++;
    }
    (*n_of_head)++;
    chunk->n_blocks++;
    return true;
}

/* Puts back the last n blocks of a head: their group is not whole. */
static void filler_untake(struct filler *filler, uint32_t head, uint32_t n)
{
    struct winnow_chunk *chunk = filler->chunk;
    struct winnow_op *op = &filler->session->op;
    winnow_assert(n < WINNOW_GROUP_BLOCKS);
    winnow_assert(chunk->n_of_head[head] >= n);
    for (; n > 0; n--) {
        uint32_t at = head * op->pass->chunk_blocks_max + --chunk->n_of_head[head];
        chunk->n_blocks--;
        if (chunk->source[at] == WINNOW_FROM_CACHE) {
            winnow_arena_unpin(filler->core->tiers.arena, chunk->slot[at]);
            chunk->source[at] = WINNOW_FROM_NOWHERE;
            op->certificate.n_blocks_host--;
            continue;
        }
        winnow_assert(filler->n > 0);
        struct winnow_load *load = filler->load[--filler->n];
        winnow_assert(load->place == at);
        winnow_assert(chunk->n_missing > 0);
        winnow_assert(filler->staged_bytes >= load->segment->block_bytes);
        filler->staged_bytes -= load->segment->block_bytes;
        winnow_load_abandon(filler->core, load);
        chunk->n_missing--;
        op->certificate.n_blocks_disk--;
    }
}

static bool cursor_next(const struct winnow_session *session, struct winnow_cursor *cursor,
                        bool one_head)
{
    const struct winnow_context *context = session->context;
    winnow_assert(cursor->head < context->shape.n_kv_heads);
    winnow_assert(cursor->block_idx < context->segment_tokens / WINNOW_BLOCK_TOKENS);
    if (++cursor->block_idx < context->segment_tokens / WINNOW_BLOCK_TOKENS)
        return true;
    cursor->block_idx = 0;
    if (++cursor->head < context->shape.n_kv_heads)
        return !one_head;
    cursor->head = 0;
    cursor->segment_idx++;
    return !one_head;
}

bool winnow_chunk_fill(struct winnow_core *core, struct winnow_session *session,
                       struct winnow_chunk *chunk, uint32_t chunk_idx, bool one_head)
{
    struct winnow_op *op = &session->op;
    const struct winnow_context *context = session->context;
    struct filler filler = {
        .core = core, .session = session, .chunk = chunk, .chunk_idx = chunk_idx};
    winnow_assert(chunk->state == WINNOW_CHUNK_FREE);
    winnow_assert(chunk == &op->pass->chunk[chunk_idx]);
    chunk->n_missing = chunk->n_blocks = 0;
    for (uint32_t head = 0; head < context->shape.n_kv_heads; head++)
        chunk->n_of_head[head] = 0;
    while (op->cursor.segment_idx < context->layer[op->layer].n_segments) {
        uint32_t n_of_group = op->cursor.block_idx % WINNOW_GROUP_BLOCKS;
        if (!filler_take(&filler, &op->cursor)) {
            filler_untake(&filler, op->cursor.head, n_of_group);
            op->cursor.block_idx -= n_of_group;
            break;
        }
        if (!cursor_next(session, &op->cursor, one_head))
            break;
    }
    winnow_stage_finish(core, &filler.stage);
    winnow_assert(chunk->n_missing <= chunk->n_blocks);
    winnow_assert(chunk->n_missing == filler.n);
    if (chunk->n_blocks == 0)
        return false;
    chunk->state = chunk->n_missing ? WINNOW_CHUNK_READING : WINNOW_CHUNK_READY;
    filler_send(&filler);
    return true;
}

void winnow_chunk_loaded(struct winnow_core *core, struct winnow_session *session,
                         const struct winnow_load *load, int result)
{
    struct winnow_op *op = &session->op;
    struct winnow_chunk *chunk = &op->pass->chunk[load->group];
    (void)core;
    winnow_assert(load->group < 2);
    winnow_assert(chunk->state == WINNOW_CHUNK_READING);
    winnow_assert(chunk->n_missing > 0);
    winnow_assert(load->place < session->context->shape.n_kv_heads * op->pass->chunk_blocks_max);
    winnow_assert(chunk->source[load->place] == WINNOW_FROM_NOWHERE);
    if (result == 0) {
        chunk->data[load->place] = load->data;
        chunk->source[load->place] = WINNOW_FROM_STAGING;
    } else {
        winnow_op_lost(op, load->segment, result);
    }
    if (--chunk->n_missing == 0)
        chunk->state = WINNOW_CHUNK_READY;
}

void winnow_chunk_release(struct winnow_core *core, struct winnow_session *session,
                          struct winnow_chunk *chunk)
{
    uint32_t cap = session->op.pass->chunk_blocks_max;
    winnow_assert(chunk->state <= WINNOW_CHUNK_RUNNING);
    if (chunk->state == WINNOW_CHUNK_FREE)
        return;
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++)
        for (uint32_t i = 0; i < chunk->n_of_head[head]; i++) {
            uint32_t at = head * cap + i;
            if (chunk->source[at] == WINNOW_FROM_CACHE)
                winnow_arena_unpin(core->tiers.arena, chunk->slot[at]);
            else if (chunk->source[at] == WINNOW_FROM_STAGING)
                winnow_arena_staging_give(core->tiers.arena, chunk->data[at]);
            chunk->source[at] = WINNOW_FROM_NOWHERE;
        }
    chunk->state = WINNOW_CHUNK_FREE;
}
