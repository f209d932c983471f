// Memory of steps. A run's arrays depend on the context's length, so they are cut from index_memory
// when a step starts and what it has is too small: page marks, no allocation.
#include <base/alloc.h>
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>
#include <string.h>

/* Cuts aligned arrays from one piece; with base NULL it only adds up. */
struct cutter {
    uint8_t *base;
    size_t at;
};

static void *cut(struct cutter *cutter, size_t n_items, size_t item_bytes)
{
    winnow_assert((uintptr_t)cutter->base % 64 == 0);
    void *piece = cutter->base ? cutter->base + cutter->at : NULL;
    cutter->at += (n_items * item_bytes + 63) & ~(size_t)63;
    return piece;
}

static size_t run_cut(struct winnow_run *run, uint8_t *base, const struct winnow_core *core,
                      const struct winnow_model_shape *shape, uint32_t n_blocks)
{
    struct cutter c = {base, 0};
    uint32_t n_kv = shape->n_kv_heads, n_q = shape->n_q_heads, G = winnow_group_heads(shape);
    size_t partial_floats = winnow_partial_floats(shape);
    run->q = cut(&c, (size_t)n_q * shape->k_width, sizeof(float));
    run->kv = cut(&c, (size_t)n_kv * (shape->k_width + shape->v_width), sizeof(float));
    run->acc = cut(&c, n_kv * partial_floats, sizeof(float));
    run->base = cut(&c, n_kv * partial_floats, sizeof(float));
    run->partial = cut(&c, WINNOW_N_GROUPS * partial_floats, sizeof(float));
    run->out = cut(&c, (size_t)n_q * shape->v_width, sizeof(float));
    run->lse = cut(&c, n_q, sizeof(float));
    run->ln_z = cut(&c, n_q, sizeof(float));
    run->rho = cut(&c, n_q, sizeof(float));
    run->mass = cut(&c, n_q, sizeof(float));
    run->n_more = cut(&c, n_kv, sizeof(uint32_t));
    run->exact = cut(&c, n_kv, 1);
    run->selection = cut(&c, n_kv, sizeof *run->selection);
    run->scratch_bytes =
        (core->options.kernels->select_scratch_bytes(shape, n_blocks) + 63) & ~(size_t)63;
    run->scratch = cut(&c, n_kv, run->scratch_bytes);
    run->ln_m = cut(&c, (size_t)n_kv * n_blocks * G, sizeof(float));
    run->pin = cut(&c, core->tiers.device ? (size_t)n_kv * n_blocks : 0, sizeof(uint32_t));
    for (uint32_t head = 0; head < n_kv; head++) {
        float *ln_e = cut(&c, (size_t)n_blocks * G, sizeof(float));
        float *ln_key = cut(&c, n_blocks, sizeof(float));
        uint32_t *block_idx = cut(&c, n_blocks, sizeof(uint32_t));
        uint8_t *selected = cut(&c, n_blocks, 1);
        if (base)
            run->selection[head] =
                (struct winnow_selection){.n_q = G,
                                          .n_blocks = n_blocks,
                                          .ln_z = run->ln_z + head * G,
                                          .ln_e = ln_e,
                                          .ln_m = run->ln_m + (size_t)head * n_blocks * G,
                                          .ln_key = ln_key,
                                          .block_idx = block_idx,
                                          .selected = selected};
    }
    return c.at;
}

int winnow_run_prepare(struct winnow_core *core, struct winnow_run *run,
                       const struct winnow_session *session, uint32_t n_blocks)
{
    const struct winnow_model_shape *shape = &session->context->shape;
    struct winnow_run sums = {0};
    winnow_assert(run->taken);
    size_t need_bytes = run_cut(&sums, NULL, core, shape, n_blocks);
    if (need_bytes > run->memory_bytes) {
        size_t take_bytes = need_bytes + need_bytes / 4; /* room for some segments more */
        winnow_index_memory_give(core->tiers.index, run->memory, run->memory_bytes);
        run->memory = winnow_index_memory_take(core->tiers.index, take_bytes);
        if (!run->memory) {
            take_bytes = need_bytes;
            run->memory = winnow_index_memory_take(core->tiers.index, take_bytes);
        }
        run->memory_bytes = run->memory ? take_bytes : 0;
        if (!run->memory)
            return -EDQUOT;
    }
    size_t cut_bytes = run_cut(run, run->memory, core, shape, n_blocks);
    winnow_assert(cut_bytes == need_bytes);
    winnow_assert(cut_bytes <= run->memory_bytes);
    run->n_blocks = n_blocks;
    memset(run->exact, 0, shape->n_kv_heads);
    return 0;
}

size_t winnow_run_wants(const struct winnow_core *core, const struct winnow_session *session,
                        uint32_t n_blocks)
{
    struct winnow_run sums = {0};
    size_t need_bytes = run_cut(&sums, NULL, core, &session->context->shape, n_blocks);
    for (uint32_t i = 0; i < core->n_runs_max; i++)
        if (core->run[i].memory_bytes >= need_bytes)
            return 0;
    return need_bytes;
}

uint32_t winnow_chunk_blocks_max(uint32_t n_kv_heads, uint32_t n_span)
{
    return n_span > 512 / n_kv_heads ? n_span
                                     : 512 / n_kv_heads / WINNOW_GROUP_BLOCKS * WINNOW_GROUP_BLOCKS;
}

static size_t pass_cut(struct winnow_pass *pass, uint8_t *base,
                       const struct winnow_model_shape *shape, uint32_t chunk_blocks_max)
{
    struct cutter c = {base, 0};
    uint32_t n_kv = shape->n_kv_heads;
    pass->chunk_blocks_max = chunk_blocks_max;
    size_t n = (size_t)n_kv * pass->chunk_blocks_max;
    pass->partial =
        cut(&c, n_kv * WINNOW_WINDOW_POSITIONS * winnow_partial_floats(shape), sizeof(float));
    for (int i = 0; i < 2; i++) {
        struct winnow_chunk chunk = {0};
        chunk.n_of_head = cut(&c, n_kv, sizeof(uint32_t));
        chunk.data = cut(&c, n, sizeof(void *));
        chunk.slot = cut(&c, n, sizeof(uint32_t));
        chunk.source = cut(&c, n, 1);
        if (base)
            pass->chunk[i] = chunk;
    }
    return c.at;
}

int winnow_pass_prepare(struct winnow_pass *pass, const struct winnow_session *session)
{
    const struct winnow_context *context = session->context;
    uint32_t n_most = winnow_chunk_blocks_max(context->shape.n_kv_heads,
                                              context->segment_tokens / WINNOW_BLOCK_TOKENS);
    uint32_t n_of_part =
        session->device_slot ? context->tiers->device->shape_options.n_window_blocks : 0;
    n_most = n_of_part > n_most ? n_of_part : n_most;
    struct winnow_pass sums = {0};
    winnow_assert(pass->taken);
    size_t need_bytes = pass_cut(&sums, NULL, &context->shape, n_most);
    if (need_bytes > pass->memory_bytes) {
        void *memory = winnow_alloc(need_bytes);
        if (!memory)
            return -ENOMEM;
        winnow_alloc_free(pass->memory);
        pass->memory = memory;
        pass->memory_bytes = need_bytes;
    }
    size_t cut_bytes = pass_cut(pass, pass->memory, &context->shape, n_most);
    winnow_assert(cut_bytes == need_bytes);
    winnow_assert(cut_bytes <= pass->memory_bytes);
    return 0;
}

/* What one item may use: fp32 K and V of a span and the build's scratch, or a tile of queries. */
static size_t worker_bytes(const struct winnow_core *core, const struct winnow_model_shape *shape,
                           uint32_t segment_tokens)
{
    const struct winnow_kernels *kernels = core->options.kernels;
    size_t row_floats = shape->k_width + shape->v_width;
    size_t build = segment_tokens * row_floats * sizeof(float) +
                   kernels->scratch_bytes(shape, segment_tokens / WINNOW_BLOCK_TOKENS);
    size_t tile =
        (size_t)WINNOW_TILE_POSITIONS * winnow_group_heads(shape) * row_floats * sizeof(float) +
        kernels->window_scratch_bytes(shape, WINNOW_TILE_POSITIONS);
    return (build > tile ? build : tile) + 4096;
}

static void scratch_free(uint8_t **scratch, uint32_t n_workers)
{
    for (uint32_t i = 0; scratch && i < n_workers; i++)
        winnow_alloc_free(scratch[i]);
    winnow_alloc_free(scratch);
}

int winnow_core_scratch_grow(struct winnow_core *core, const struct winnow_model_shape *shape,
                             uint32_t segment_tokens)
{
    size_t need_bytes = worker_bytes(core, shape, segment_tokens);
    if (need_bytes <= core->scratch_bytes)
        return 0;
    winnow_assert(core->n_retired <= WINNOW_N_RETIRED);
    if (core->n_retired == WINNOW_N_RETIRED)
        return -EDQUOT;
    uint8_t **grown = winnow_alloc_array(core->n_workers, sizeof *grown);
    bool complete = grown;
    for (uint32_t i = 0; complete && i < core->n_workers; i++)
        complete = (grown[i] = winnow_alloc(need_bytes));
    if (!complete) {
        scratch_free(grown, core->n_workers);
        return -ENOMEM;
    }
    if (core->scratch)
        core->retired[core->n_retired++] = core->scratch; /* running items may still use it */
    core->scratch = grown;
    core->scratch_bytes = need_bytes;
    return 0;
}

void winnow_core_scratch_free(struct winnow_core *core)
{
    scratch_free(core->scratch, core->n_workers);
    for (uint32_t i = 0; i < core->n_retired; i++)
        scratch_free(core->retired[i], core->n_workers);
}
