/*
 * Runs a trace: seals it, then takes every step through score, (probe,) select, attend, verify,
 * attend and compensate as the core would, for every policy and mass asked.
 */
#include "trace.h"

#include <base/alloc.h>
#include <errno.h>
#include <kernels/ref/oracle.h>
#include <math.h>
#include <string.h>

struct segment {
    uint32_t first; /* token */
    uint32_t block_first;
    struct winnow_index_view view;
};

struct run {
    const struct winnow_trace *trace;
    const struct winnow_kernels *kernels;
    struct winnow_model_shape shape;
    uint32_t n_q, n_segments, n_blocks, sealed_end, n_tail_blocks;
    struct segment *segment;
    uint16_t *order; /* [16 n_blocks], places in the segment */
    uint32_t *token; /* [16 n_blocks], positions */
    char *block;     /* sealed, sinks, tail */
    void *scratch;
    /* of a step */
    const float *q;
    double *logit;                                 /* [n_q][n_tokens] */
    double *ln_true;                               /* [n_blocks][n_q] */
    double *dense;                                 /* [n_q][width] */
    double lse[WINNOW_GQA_MAX], z[WINNOW_GQA_MAX]; /* dense; mass share of sinks and tail */
    float *resident;                               /* partial of sinks and tail */
    float ln_z[WINNOW_GQA_MAX];
    /* of a step and case */
    struct winnow_selection sel;
    float *ln_m, *partial, *acc, *out;
};

static void *take(int *rc, size_t n, size_t item_bytes)
{
    void *memory = winnow_alloc_array(n, item_bytes);
    if (!memory)
        *rc = -ENOMEM;
    return memory;
}

static int view_init(struct winnow_index_view *view, uint32_t n_blocks, uint32_t width)
{
    int rc = 0;

    view->n_blocks = n_blocks;
    view->head = take(&rc, n_blocks, sizeof *view->head);
    view->centroid = take(&rc, n_blocks, width);
    view->vmean = take(&rc, n_blocks, width);
    view->code = take(&rc, n_blocks, 8 * width);
    view->code_scale = take(&rc, n_blocks, 16 * sizeof *view->code_scale);
    view->var = take(&rc, n_blocks, width * sizeof *view->var);
    view->mean_k = take(&rc, width, sizeof *view->mean_k);
    view->mean_v = take(&rc, width, sizeof *view->mean_v);
    view->v_max = take(&rc, 1, sizeof *view->v_max);
    return rc;
}

static void view_finish(struct winnow_index_view *view)
{
    winnow_alloc_free(view->head);
    winnow_alloc_free(view->centroid);
    winnow_alloc_free(view->vmean);
    winnow_alloc_free(view->code);
    winnow_alloc_free(view->code_scale);
    winnow_alloc_free(view->var);
    winnow_alloc_free(view->mean_k);
    winnow_alloc_free(view->mean_v);
    winnow_alloc_free(view->v_max);
}

static void run_finish(struct run *run)
{
    for (uint32_t i = 0; run->segment && i < run->n_segments; i++)
        view_finish(&run->segment[i].view);
    void *owned[] = {run->segment,      run->order,    run->token,      run->block,
                     run->scratch,      run->logit,    run->ln_true,    run->dense,
                     run->resident,     run->sel.ln_e, run->sel.ln_key, run->sel.block_idx,
                     run->sel.selected, run->ln_m,     run->partial,    run->acc,
                     run->out};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
        winnow_alloc_free(owned[i]);
}

static void *block_at(const struct run *run, uint32_t idx)
{
    return run->block + (size_t)idx * winnow_block_bytes(&run->shape);
}

/* Sealed blocks are numbered 0..n_blocks - 1, sinks n_blocks, the tail's go on from there. */
static void pack_plain(struct run *run, uint32_t idx, uint32_t first)
{
    const struct winnow_trace *trace = run->trace;
    uint32_t n = trace->n_tokens - first < 16 ? trace->n_tokens - first : 16;

    run->kernels->block_pack(&run->shape, 0, n, trace->k + (size_t)first * trace->width,
                             trace->v + (size_t)first * trace->width, block_at(run, idx));
}

static int seal(struct run *run, struct segment *segment)
{
    uint32_t width = run->trace->width;
    const float *k = run->trace->k + (size_t)segment->first * width;
    const float *v = run->trace->v + (size_t)segment->first * width;
    uint16_t *order = run->order + 16 * (size_t)segment->block_first;

    int rc = run->kernels->build(&run->shape, segment->view.n_blocks, k, v, order, &segment->view,
                                 run->scratch);
    if (rc < 0)
        return rc;
    for (uint32_t i = 0; i < 16 * segment->view.n_blocks; i++) {
        run->token[16 * segment->block_first + i] = segment->first + order[i];
        run->kernels->block_pack(&run->shape, i % 16, 1, k + (size_t)order[i] * width,
                                 v + (size_t)order[i] * width,
                                 block_at(run, segment->block_first + i / 16));
    }
    return 0;
}

static int run_alloc(struct run *run)
{
    const struct winnow_trace *trace = run->trace;
    uint32_t n = run->n_blocks, n_q = run->n_q;
    size_t n_floats = winnow_partial_floats(&run->shape);
    int rc = 0;

    run->segment = take(&rc, run->n_segments, sizeof *run->segment);
    run->order = take(&rc, 16 * (size_t)n, sizeof *run->order);
    run->token = take(&rc, 16 * (size_t)n, sizeof *run->token);
    run->block = take(&rc, n + 1 + run->n_tail_blocks, winnow_block_bytes(&run->shape));
    run->scratch = take(&rc, run->kernels->scratch_bytes(&run->shape, n), 1);
    run->logit = take(&rc, (size_t)n_q * trace->n_tokens, sizeof *run->logit);
    run->ln_true = take(&rc, (size_t)n_q * n, sizeof *run->ln_true);
    run->dense = take(&rc, (size_t)n_q * trace->width, sizeof *run->dense);
    run->resident = take(&rc, n_floats, sizeof *run->resident);
    run->sel = (struct winnow_selection){
        .n_q = n_q,
        .n_blocks = n,
        .n_blocks_max = n,
        .ln_z = run->ln_z,
        .ln_e = take(&rc, (size_t)n_q * n, sizeof(float)),
        .ln_key = take(&rc, n, sizeof(float)),
        .block_idx = take(&rc, n, sizeof(uint32_t)),
        .selected = take(&rc, n, 1),
    };
    run->sel.ln_m = run->ln_m = take(&rc, (size_t)n_q * n, sizeof *run->ln_m);
    run->partial = take(&rc, n_floats, sizeof *run->partial);
    run->acc = take(&rc, n_floats, sizeof *run->acc);
    run->out = take(&rc, (size_t)n_q * trace->width, sizeof *run->out);
    return rc;
}

static int run_init(struct run *run, const struct winnow_trace *trace,
                    const struct winnow_kernels *kernels, uint32_t segment_tokens)
{
    uint32_t n_sealed = WINNOW_TRACE_SEALED_END - WINNOW_TRACE_N_SINKS;

    if (segment_tokens == 0)
        segment_tokens = n_sealed;
    if (segment_tokens % 16 || segment_tokens > n_sealed || trace->n_q > WINNOW_GQA_MAX ||
        trace->n_tokens < WINNOW_TRACE_SEALED_END + trace->n_steps)
        return -EINVAL;
    *run = (struct run){.trace = trace, .kernels = kernels, .n_q = trace->n_q};
    run->n_segments = n_sealed / segment_tokens;
    run->sealed_end = WINNOW_TRACE_N_SINKS + run->n_segments * segment_tokens;
    run->n_blocks = run->n_segments * segment_tokens / 16;
    run->n_tail_blocks = (trace->n_tokens - run->sealed_end + 15) / 16;
    run->shape = (struct winnow_model_shape){
        .n_layers = 1,
        .n_q_heads = trace->n_q,
        .n_kv_heads = 1,
        .k_width = trace->width,
        .v_width = trace->width,
        .softmax_scale = 1 / sqrtf((float)trace->width),
        .kv_dtype = WINNOW_FP16,
        .io_dtype = WINNOW_FP32,
        .block_layout = WINNOW_BLOCK_LAYOUT,
    };
    int rc = run_alloc(run);
    for (uint32_t i = 0; i < run->n_segments && rc == 0; i++) {
        struct segment *segment = &run->segment[i];
        segment->first = WINNOW_TRACE_N_SINKS + i * segment_tokens;
        segment->block_first = i * (segment_tokens / 16);
        rc = view_init(&segment->view, segment_tokens / 16, trace->width);
        if (rc == 0)
            rc = seal(run, segment);
    }
    if (rc < 0)
        return rc;
    pack_plain(run, run->n_blocks, 0);
    for (uint32_t i = 0; i < run->n_tail_blocks; i++)
        pack_plain(run, run->n_blocks + 1 + i, run->sealed_end + 16 * i);
    return 0;
}

static void acc_clear(const struct run *run, float *acc)
{
    memset(acc, 0, winnow_partial_floats(&run->shape) * sizeof *acc);
    for (uint32_t g = 0; g < run->n_q; g++)
        acc[g * (run->shape.v_width + 2)] = -INFINITY;
}

/* Attends n blocks by number, in groups of eight, into acc. ln_m by block number, unless NULL. */
static void attend(struct run *run, uint32_t n, const uint32_t *block_idx, const uint32_t *n_tokens,
                   float *ln_m, float *acc)
{
    const struct winnow_kernels *kernels = run->kernels;

    for (uint32_t first = 0; first < n; first += WINNOW_GROUP_BLOCKS) {
        uint32_t n_group = n - first < WINNOW_GROUP_BLOCKS ? n - first : WINNOW_GROUP_BLOCKS;
        const void *block[WINNOW_GROUP_BLOCKS];
        float group_m[WINNOW_GROUP_BLOCKS * WINNOW_GQA_MAX];
        for (uint32_t i = 0; i < n_group; i++)
            block[i] = block_at(run, block_idx[first + i]);
        kernels->attend_partial(&run->shape, run->q, n_group, block, n_tokens + first, run->partial,
                                group_m);
        kernels->merge(&run->shape, 1, run->partial, acc);
        for (uint32_t i = 0; ln_m && i < n_group; i++)
            memcpy(ln_m + (size_t)block_idx[first + i] * run->n_q, group_m + i * run->n_q,
                   run->n_q * sizeof *ln_m);
    }
}

/* The blocks whose mark is in [least, most], in rising order. */
static void attend_marked(struct run *run, uint8_t least, uint8_t most)
{
    uint32_t block_idx[WINNOW_GROUP_BLOCKS], n_tokens[WINNOW_GROUP_BLOCKS], n = 0;

    for (uint32_t b = 0; b < run->n_blocks; b++) {
        if (run->sel.selected[b] >= least && run->sel.selected[b] <= most) {
            block_idx[n] = b;
            n_tokens[n++] = 16;
        }
        if (n == WINNOW_GROUP_BLOCKS || (n > 0 && b + 1 == run->n_blocks)) {
            attend(run, n, block_idx, n_tokens, run->ln_m, run->acc);
            n = 0;
        }
    }
}

static void attend_resident(struct run *run, uint32_t n_seen)
{
    uint32_t n = 0, block_idx[1024], n_tokens[1024];

    block_idx[n] = run->n_blocks;
    n_tokens[n++] = 16;
    for (uint32_t first = run->sealed_end; first < n_seen; first += 16) {
        block_idx[n] = run->n_blocks + n;
        n_tokens[n++] = n_seen - first < 16 ? n_seen - first : 16;
    }
    acc_clear(run, run->resident);
    attend(run, n, block_idx, n_tokens, NULL, run->resident);
    run->kernels->finish(&run->shape, run->resident, run->out, run->ln_z);
}

/* What the oracle says of a step. */
static void judge_step(struct run *run, uint32_t n_seen)
{
    const struct winnow_trace *trace = run->trace;
    uint32_t width = trace->width;

    for (uint32_t g = 0; g < run->n_q; g++) {
        double *l = run->logit + (size_t)g * trace->n_tokens;
        winnow_oracle_logits(width, (double)run->shape.softmax_scale, run->q + g * width, n_seen,
                             trace->k, l);
        run->lse[g] = winnow_oracle_attend(width, l, n_seen, trace->v, run->dense + g * width);
        run->z[g] = exp(winnow_oracle_ln_mass(l, WINNOW_TRACE_N_SINKS, NULL) - run->lse[g]) +
                    exp(winnow_oracle_ln_mass(l + run->sealed_end, n_seen - run->sealed_end, NULL) -
                        run->lse[g]);
        for (uint32_t b = 0; b < run->n_blocks; b++)
            run->ln_true[(size_t)b * run->n_q + g] =
                winnow_oracle_ln_mass(l, 16, run->token + 16 * (size_t)b);
    }
}

static void score(struct run *run, uint32_t policy)
{
    if (policy == WINNOW_TRACE_POLICY_ORACLE) {
        for (size_t i = 0; i < (size_t)run->n_blocks * run->n_q; i++)
            run->sel.ln_e[i] = (float)run->ln_true[i];
        return;
    }
    for (uint32_t i = 0; i < run->n_segments; i++) {
        const struct segment *segment = &run->segment[i];
        run->kernels->score(&run->shape, policy, &segment->view, run->q,
                            run->sel.ln_e + (size_t)segment->block_first * run->n_q, run->scratch);
    }
}

/* True mass of what was read, of one query head. */
static double true_mass(const struct run *run, uint32_t g)
{
    double sum = run->z[g];
    for (uint32_t b = 0; b < run->n_blocks; b++)
        if (run->sel.selected[b])
            sum += exp(run->ln_true[(size_t)b * run->n_q + g] - run->lse[g]);
    return sum;
}

static double relative_error(struct run *run, uint32_t g)
{
    double difference = 0, square = 0;

    for (uint32_t i = g * run->trace->width; i < (g + 1) * run->trace->width; i++) {
        difference += ((double)run->out[i] - run->dense[i]) * ((double)run->out[i] - run->dense[i]);
        square += run->dense[i] * run->dense[i];
    }
    return sqrt(difference / square);
}

static void finish_step(struct run *run, double *sum)
{
    float lse[WINNOW_GQA_MAX];

    run->kernels->finish(&run->shape, run->acc, run->out, lse);
    for (uint32_t g = 0; g < run->n_q; g++)
        *sum += relative_error(run, g);
}

/* One step of one case: sums go into result. */
static void run_case(struct run *run, const struct winnow_trace_options *options, uint32_t case_idx,
                     const struct winnow_trace_case *cases, struct winnow_trace_result *result)
{
    struct winnow_selection *sel = &run->sel;
    uint32_t policy =
        cases->policy == WINNOW_TRACE_POLICY_ORACLE ? WINNOW_POLICY_CODES : cases->policy;
    float rho[WINNOW_GQA_MAX], certificate[WINNOW_GQA_MAX];
    double mass = (double)cases->mass;

    sel->mass = cases->mass;
    score(run, cases->policy);
    memcpy(run->acc, run->resident, winnow_partial_floats(&run->shape) * sizeof *run->acc);
    if (policy == WINNOW_POLICY_TACTIC) {
        run->kernels->probe(sel, run->scratch);
        attend_marked(run, 3, 3);
    }
    run->kernels->select(policy, sel, run->scratch);
    if (options->visit)
        options->visit(options->visit_arg, case_idx, sel);
    attend_marked(run, 1, 1);
    result->share1 += (double)sel->n_selected / run->n_blocks;
    for (uint32_t g = 0; g < run->n_q; g++)
        result->success1 += true_mass(run, g) >= mass;

    if (run->kernels->select_more(sel, rho, certificate, 1, run->scratch) > 0) {
        attend_marked(run, 2, 2);
        run->kernels->select_more(sel, rho, certificate, 0, run->scratch);
    }
    result->share2 += (double)sel->n_selected / run->n_blocks;
    for (uint32_t g = 0; g < run->n_q; g++) {
        double reached = true_mass(run, g);
        result->success2 += reached >= mass;
        result->mass_min = fmin(result->mass_min, reached);
    }
    if (sel->n_selected < result->n_read_min)
        result->n_read_min = sel->n_selected;
    if (sel->n_selected > result->n_read_max)
        result->n_read_max = sel->n_selected;

    finish_step(run, &result->relerr_drop);
    for (uint32_t i = 0; i < run->n_segments; i++)
        run->kernels->compensate(&run->shape, &run->segment[i].view, sel,
                                 run->segment[i].block_first, run->acc);
    finish_step(run, &result->relerr_compensated);
}

static void result_divide(struct winnow_trace_result *result, uint32_t n_steps, uint32_t n_q)
{
    double n_items = (double)n_steps * n_q;

    result->share1 /= n_steps;
    result->share2 /= n_steps;
    result->success1 /= n_items;
    result->success2 /= n_items;
    result->relerr_drop /= n_items;
    result->relerr_compensated /= n_items;
}

int winnow_trace_run(const struct winnow_trace *trace, const struct winnow_kernels *kernels,
                     const struct winnow_trace_options *options, uint32_t n_cases,
                     const struct winnow_trace_case *cases, struct winnow_trace_result *result)
{
    struct run run = {0};
    uint32_t n_steps = options->n_steps ? options->n_steps : trace->n_steps;

    for (uint32_t i = 0; i < n_cases; i++)
        result[i] = (struct winnow_trace_result){.mass_min = 1, .n_read_min = UINT32_MAX};
    int rc = n_steps <= trace->n_steps ? run_init(&run, trace, kernels, options->segment_tokens)
                                       : -EINVAL;
    for (uint32_t i = 0; i < n_steps && rc == 0; i++) {
        uint32_t step = (uint32_t)((uint64_t)i * trace->n_steps / n_steps);
        uint32_t n_seen = trace->n_tokens - trace->n_steps + step + 1;
        run.q = trace->q + (size_t)step * trace->n_q * trace->width;
        judge_step(&run, n_seen);
        attend_resident(&run, n_seen);
        for (uint32_t c = 0; c < n_cases; c++)
            run_case(&run, options, c, &cases[c], &result[c]);
    }
    for (uint32_t i = 0; i < n_cases && rc == 0; i++)
        result_divide(&result[i], n_steps, trace->n_q);
    run_finish(&run);
    return rc;
}
