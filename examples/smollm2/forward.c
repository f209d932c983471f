// The forward pass.
//
// Decode is bound by memory: 96 MB of weights a token. Each thread keeps its own packed copy of the
// vector it multiplies, so that norms and packing need no barrier of their own: four barriers a
// layer, and one run of the team a layer (what follows attention in one layer and what precedes it
// in the next), because between runs the cores are winnowd's.
//
// A window is bound by arithmetic: each thread unpacks a tile of 64 rows of a matrix to fp32, small
// enough to stay in its cache, and has OpenBLAS multiply the window with it. Rejected: OpenBLAS's
// own threads (they spin after each product, on the cores that winnowd needs next), and matrices
// kept as fp32 (540 MB).
//
// Rotary embedding turns neighbouring pairs (2 i, 2 i + 1): GGUF files of this architecture store
// Q and K rows permuted for that.
#include "forward.h"

#include "quant.h"
#include "team.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TILE_ROWS = 64, VOCAB_TILE_ROWS = 1024 };

/* What one thread needs of its own. */
struct lane {
    struct quant_vector vector;
    float *row;  /* [max(n_embed, n_ffn)] */
    float *tile; /* [TILE_ROWS][max(n_embed, n_ffn)] */
};

struct forward {
    const struct model *model;
    struct team *team;
    struct lane *lanes; /* [n_threads] */
    /* Activations of a window, or in row 0 of a decode step. */
    float *x;            /* [512][n_embed] the residual stream */
    float *normed;       /* [512][n_embed] */
    float *q, *attended; /* [512][n_q_heads][head_width] */
    float *k, *v;        /* [512][n_kv_heads][head_width] */
    float *gate, *up;    /* [512][n_ffn] */
    float *turns;        /* [512][head_width / 2][cos, sin] of the window's positions */
    float *logits;       /* [n_vocab] */
    float *vocab_logits; /* [512][VOCAB_TILE_ROWS], rows as long as the tile */
    double *sums, *tops; /* [512] running softmax of forward_logprobs */
    uint32_t n_rows;     /* positions in x */
    uint32_t layer;      /* the run's layer; n_layers: none */
    const uint32_t *next_ids;
    double *logprobs;
};

static uint32_t n_q_columns(const struct model *m)
{
    return m->n_q_heads * m->head_width;
}

static uint32_t n_kv_columns(const struct model *m)
{
    return m->n_kv_heads * m->head_width;
}

static void norm(const float *x, const float *weight, uint32_t n, float epsilon, float *out)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    float scale = 1.0f / sqrtf((float)(sum / n) + epsilon);
    for (uint32_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

static void turn(float *heads, uint32_t n_heads, uint32_t head_width, const float *turns)
{
    for (uint32_t h = 0; h < n_heads; h++, heads += head_width) {
        for (uint32_t i = 0; i < head_width; i += 2) {
            float cosine = turns[i], sine = turns[i + 1], a = heads[i], b = heads[i + 1];
            heads[i] = a * cosine - b * sine;
            heads[i + 1] = a * sine + b * cosine;
        }
    }
}

/* In double: at position 8,000 the fastest angle in fp32 is off by 5e-4. */
static void turns_fill(struct forward *f, uint64_t first, uint32_t n)
{
    const uint32_t width = f->model->head_width;
    for (uint32_t i = 0; i < width; i += 2) {
        double speed = pow((double)f->model->rope_base, -(double)i / width);
        for (uint32_t row = 0; row < n; row++) {
            double angle = (double)(first + row) * speed;
            f->turns[row * width + i] = (float)cos(angle);
            f->turns[row * width + i + 1] = (float)sin(angle);
        }
    }
}

static float swish(float x)
{
    return x / (1.0f + expf(-x));
}

static void embed(struct forward *f, const uint32_t *ids, uint32_t n)
{
    const struct matrix *e = &f->model->embed;
    for (uint32_t row = 0; row < n; row++)
        quant_row_unpack(e->type, e->rows + ids[row] * e->row_bytes, e->n_columns,
                         f->x + (size_t)row * e->n_columns);
    f->n_rows = n;
}

/* ---- a window ---- */

/* out [n_rows][matrix rows] = (or +=) in [n_rows][columns] x matrix^T, this thread's rows of it. */
static void project(struct forward *f, uint32_t thread_idx, const struct matrix *matrix,
                    const float *in, float *out, int add)
{
    struct lane *lane = &f->lanes[thread_idx];
    const uint32_t n_columns = matrix->n_columns;
    uint32_t first, end;

    team_share(f->team, thread_idx, matrix->n_rows, 16, &first, &end);
    for (uint32_t row = first; row < end; row += TILE_ROWS) {
        uint32_t n_tile = end - row < TILE_ROWS ? end - row : TILE_ROWS;
        for (uint32_t i = 0; i < n_tile; i++)
            quant_row_unpack(matrix->type, matrix->rows + (row + i) * matrix->row_bytes, n_columns,
                             lane->tile + (size_t)i * n_columns);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)f->n_rows, (int)n_tile,
                    (int)n_columns, 1, in, (int)n_columns, lane->tile, (int)n_columns, add ? 1 : 0,
                    out + row, (int)matrix->n_rows);
    }
}

static void window_norm(struct forward *f, uint32_t thread_idx, const float *weight)
{
    const struct model *m = f->model;
    uint32_t first, end;

    team_share(f->team, thread_idx, f->n_rows, 1, &first, &end);
    for (uint32_t row = first; row < end; row++)
        norm(f->x + (size_t)row * m->n_embed, weight, m->n_embed, m->norm_epsilon,
             f->normed + (size_t)row * m->n_embed);
    team_barrier(f->team);
}

static void window_before_attend(struct forward *f, uint32_t thread_idx)
{
    const struct model *m = f->model;
    const struct model_layer *layer = &m->layers[f->layer];
    uint32_t first, end;

    window_norm(f, thread_idx, layer->attend_norm);
    project(f, thread_idx, &layer->q, f->normed, f->q, 0);
    project(f, thread_idx, &layer->k, f->normed, f->k, 0);
    project(f, thread_idx, &layer->v, f->normed, f->v, 0);
    team_barrier(f->team);
    team_share(f->team, thread_idx, f->n_rows, 1, &first, &end);
    for (uint32_t row = first; row < end; row++) {
        const float *turns = f->turns + (size_t)row * m->head_width;
        turn(f->q + (size_t)row * n_q_columns(m), m->n_q_heads, m->head_width, turns);
        turn(f->k + (size_t)row * n_kv_columns(m), m->n_kv_heads, m->head_width, turns);
    }
}

static void window_after_attend(struct forward *f, uint32_t thread_idx)
{
    const struct model *m = f->model;
    const struct model_layer *layer = &m->layers[f->layer];
    uint32_t first, end;

    project(f, thread_idx, &layer->o, f->attended, f->x, 1);
    team_barrier(f->team);
    window_norm(f, thread_idx, layer->ffn_norm);
    project(f, thread_idx, &layer->gate, f->normed, f->gate, 0);
    project(f, thread_idx, &layer->up, f->normed, f->up, 0);
    team_barrier(f->team);
    team_share(f->team, thread_idx, f->n_rows, 1, &first, &end);
    for (size_t i = (size_t)first * m->n_ffn; i < (size_t)end * m->n_ffn; i++)
        f->gate[i] = swish(f->gate[i]) * f->up[i];
    team_barrier(f->team);
    project(f, thread_idx, &layer->down, f->gate, f->x, 1);
}

static void run_window_before(void *arg, uint32_t thread_idx)
{
    window_before_attend(arg, thread_idx);
}

static void run_window_after(void *arg, uint32_t thread_idx)
{
    window_after_attend(arg, thread_idx);
}

int forward_window(struct forward *f, winnow_session *session, const uint32_t *ids, uint64_t first,
                   uint32_t n)
{
    embed(f, ids, n);
    turns_fill(f, first, n);
    for (f->layer = 0; f->layer < f->model->n_layers; f->layer++) {
        team_run(f->team, run_window_before, f);
        int rc = winnow_attend_exact(session, f->layer, first, n, f->q, f->k, f->v, f->attended,
                                     NULL, NULL, 0);
        if (rc < 0)
            return rc;
        team_run(f->team, run_window_after, f);
    }
    return 0;
}

/* ---- a decode step ---- */

/* out [rows] = (or +=) matrix x the lane's packed vector, this thread's rows. */
static void multiply(struct forward *f, uint32_t thread_idx, const struct matrix *matrix,
                     float *out, int add)
{
    struct lane *lane = &f->lanes[thread_idx];
    float products[TILE_ROWS];
    uint32_t first, end;

    team_share(f->team, thread_idx, matrix->n_rows, 16, &first, &end);
    for (uint32_t row = first; row < end; row += TILE_ROWS) {
        uint32_t n_tile = end - row < TILE_ROWS ? end - row : TILE_ROWS;
        quant_rows_dot(matrix->type, matrix->rows + row * matrix->row_bytes, n_tile, &lane->vector,
                       products);
        for (uint32_t i = 0; i < n_tile; i++)
            out[row + i] = add ? out[row + i] + products[i] : products[i];
    }
}

static void lane_norm(struct forward *f, uint32_t thread_idx, const float *x, const float *weight)
{
    struct lane *lane = &f->lanes[thread_idx];
    norm(x, weight, f->model->n_embed, f->model->norm_epsilon, lane->row);
    quant_vector_pack(&lane->vector, lane->row, f->model->n_embed);
}

static void step_before_attend(struct forward *f, uint32_t thread_idx)
{
    const struct model_layer *layer = &f->model->layers[f->layer];

    lane_norm(f, thread_idx, f->x, layer->attend_norm);
    multiply(f, thread_idx, &layer->q, f->q, 0);
    multiply(f, thread_idx, &layer->k, f->k, 0);
    multiply(f, thread_idx, &layer->v, f->v, 0);
}

static void step_after_attend(struct forward *f, uint32_t thread_idx, uint32_t layer_idx)
{
    const struct model *m = f->model;
    const struct model_layer *layer = &m->layers[layer_idx];
    uint32_t first, end;

    quant_vector_pack(&f->lanes[thread_idx].vector, f->attended, n_q_columns(m));
    multiply(f, thread_idx, &layer->o, f->x, 1);
    team_barrier(f->team);
    lane_norm(f, thread_idx, f->x, layer->ffn_norm);
    multiply(f, thread_idx, &layer->gate, f->gate, 0);
    multiply(f, thread_idx, &layer->up, f->up, 0);
    team_share(f->team, thread_idx, m->n_ffn, 16, &first, &end);
    for (uint32_t i = first; i < end; i++)
        f->gate[i] = swish(f->gate[i]) * f->up[i];
    team_barrier(f->team);
    quant_vector_pack(&f->lanes[thread_idx].vector, f->gate, m->n_ffn);
    multiply(f, thread_idx, &layer->down, f->x, 1);
    team_barrier(f->team);
}

/* From one attention to the next: layer - 1's end, then layer's beginning. */
static void run_step(void *arg, uint32_t thread_idx)
{
    struct forward *f = arg;
    if (f->layer > 0)
        step_after_attend(f, thread_idx, f->layer - 1);
    if (f->layer < f->model->n_layers)
        step_before_attend(f, thread_idx);
}

static int step_attend(struct forward *f, winnow_client *client, winnow_attend_item *item,
                       winnow_certificate *certificate)
{
    const struct model *m = f->model;

    turn(f->q, m->n_q_heads, m->head_width, f->turns);
    turn(f->k, m->n_kv_heads, m->head_width, f->turns);
    item->q = f->q;
    item->k = f->k;
    item->v = f->v;
    item->out = f->attended;
    int rc = winnow_attend(client, f->layer, item, 1, 0);
    *certificate = item->certificate;
    return rc < 0 ? rc : item->status;
}

int forward_step(struct forward *f, winnow_client *client, winnow_session *session, uint32_t id,
                 uint64_t position, float mass, winnow_certificate *certificates,
                 uint64_t *truncate_to)
{
    winnow_attend_item item = {.session = session, .position = position, .mass = mass};

    embed(f, &id, 1);
    turns_fill(f, position, 1);
    for (f->layer = 0; f->layer < f->model->n_layers; f->layer++) {
        team_run(f->team, run_step, f);
        int rc = step_attend(f, client, &item, &certificates[f->layer]);
        if (rc < 0) {
            *truncate_to = item.truncate_to;
            return rc;
        }
    }
    team_run(f->team, run_step, f);
    return 0;
}

/* ---- logits ---- */

static void run_logits(void *arg, uint32_t thread_idx)
{
    struct forward *f = arg;
    const struct model *m = f->model;

    lane_norm(f, thread_idx, f->x + (size_t)(f->n_rows - 1) * m->n_embed, m->output_norm);
    multiply(f, thread_idx, &m->output, f->logits, 0);
}

const float *forward_logits(struct forward *f)
{
    team_run(f->team, run_logits, f);
    return f->logits;
}

/* Folds a tile of logits into each row's running softmax. */
static void fold_tile(struct forward *f, uint32_t row, uint32_t first_id, uint32_t n_ids)
{
    const float *logits = f->vocab_logits + (size_t)row * n_ids;
    double top = f->tops[row], sum = f->sums[row];
    float tile_top = logits[0];

    for (uint32_t i = 1; i < n_ids; i++)
        tile_top = fmaxf(tile_top, logits[i]);
    if ((double)tile_top > top) {
        sum *= exp(top - (double)tile_top);
        top = (double)tile_top;
    }
    for (uint32_t i = 0; i < n_ids; i++)
        sum += (double)expf(logits[i] - (float)top);
    f->tops[row] = top;
    f->sums[row] = sum;
    if (f->next_ids[row] - first_id < n_ids)
        f->logprobs[row] = (double)logits[f->next_ids[row] - first_id];
}

static void run_logprobs(void *arg, uint32_t thread_idx)
{
    struct forward *f = arg;
    const struct model *m = f->model;
    uint32_t first, end;

    window_norm(f, thread_idx, m->output_norm);
    team_share(f->team, thread_idx, f->n_rows, 1, &first, &end);
    for (uint32_t id = 0; id < m->n_vocab; id += VOCAB_TILE_ROWS) {
        struct matrix tile = m->output;
        tile.rows += id * tile.row_bytes;
        tile.n_rows = m->n_vocab - id < VOCAB_TILE_ROWS ? m->n_vocab - id : VOCAB_TILE_ROWS;
        project(f, thread_idx, &tile, f->normed, f->vocab_logits, 0);
        team_barrier(f->team);
        for (uint32_t row = first; row < end; row++)
            fold_tile(f, row, id, tile.n_rows);
        team_barrier(f->team);
    }
    for (uint32_t row = first; row < end; row++)
        f->logprobs[row] -= f->tops[row] + log(f->sums[row]);
}

void forward_logprobs(struct forward *f, const uint32_t *next_ids, uint32_t n, double *logprobs)
{
    for (uint32_t row = 0; row < n; row++) {
        f->tops[row] = -INFINITY;
        f->sums[row] = 0;
    }
    f->next_ids = next_ids;
    f->logprobs = logprobs;
    f->n_rows = n;
    team_run(f->team, run_logprobs, f);
}

/* ---- memory ---- */

static int lanes_create(struct forward *f, uint32_t n_threads)
{
    const struct model *m = f->model;
    uint32_t width = m->n_ffn > m->n_embed ? m->n_ffn : m->n_embed;

    f->lanes = calloc(n_threads, sizeof *f->lanes);
    if (!f->lanes)
        return -ENOMEM;
    for (uint32_t i = 0; i < n_threads; i++) {
        struct lane *lane = &f->lanes[i];
        lane->row = malloc(width * sizeof(float));
        lane->tile = aligned_alloc(64, (size_t)TILE_ROWS * width * sizeof(float));
        if (!lane->row || !lane->tile || quant_vector_create(&lane->vector, width) < 0)
            return -ENOMEM;
    }
    return 0;
}

static int activations_create(struct forward *f)
{
    const struct model *m = f->model;
    const struct {
        float **array;
        size_t n_columns;
    } arrays[] = {
        {&f->x, m->n_embed},        {&f->normed, m->n_embed},
        {&f->q, n_q_columns(m)},    {&f->attended, n_q_columns(m)},
        {&f->k, n_kv_columns(m)},   {&f->v, n_kv_columns(m)},
        {&f->gate, m->n_ffn},       {&f->up, m->n_ffn},
        {&f->turns, m->head_width}, {&f->vocab_logits, VOCAB_TILE_ROWS},
    };

    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i].array = aligned_alloc(64, FORWARD_WINDOW * arrays[i].n_columns * sizeof(float));
        if (!*arrays[i].array)
            return -ENOMEM;
    }
    f->logits = malloc(m->n_vocab * sizeof(float));
    f->sums = malloc(FORWARD_WINDOW * sizeof(double));
    f->tops = malloc(FORWARD_WINDOW * sizeof(double));
    return f->logits && f->sums && f->tops ? 0 : -ENOMEM;
}

int forward_create(const struct model *model, uint32_t n_threads, struct forward **ret_forward)
{
    struct forward *f = calloc(1, sizeof *f);
    if (!f)
        return -ENOMEM;
    f->model = model;
    openblas_set_num_threads(1);
    int rc = team_create(n_threads, &f->team);
    if (rc == 0)
        rc = lanes_create(f, team_n_threads(f->team));
    if (rc == 0)
        rc = activations_create(f);
    if (rc < 0) {
        forward_destroy(f);
        return rc;
    }
    *ret_forward = f;
    return 0;
}

void forward_destroy(struct forward *f)
{
    if (!f)
        return;
    for (uint32_t i = 0; f->lanes && i < team_n_threads(f->team); i++) {
        quant_vector_destroy(&f->lanes[i].vector);
        free(f->lanes[i].row);
        free(f->lanes[i].tile);
    }
    free(f->lanes);
    team_destroy(f->team);
    float *arrays[] = {f->x,    f->normed, f->q,     f->attended, f->k,           f->v,
                       f->gate, f->up,     f->turns, f->logits,   f->vocab_logits};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        free(arrays[i]);
    free(f->sums);
    free(f->tops);
    free(f);
}
