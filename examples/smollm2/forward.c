// The forward pass.
//
// Decode is bound by memory: 96 MB of weights a token. A product's rows are shared out in tiles of
// 32; the norms and the packing of the vector (2 to 3 us each) are the caller's alone. While winnowd
// attends, the team rests: the cores are winnowd's.
//
// A window is bound by arithmetic: whoever takes a tile of 64 rows unpacks it to fp32, small enough
// to stay in its cache, and has OpenBLAS multiply the window with it. Rejected: OpenBLAS's own
// threads (they spin after each product, on the cores that winnowd needs next), and matrices kept as
// fp32 (540 MB).
//
// Rotary embedding turns neighbouring pairs (2 i, 2 i + 1): GGUF files of this architecture store
// Q and K rows permuted for that.
#include "forward.h"

#include "clock.h"
#include "quant.h"
#include "team.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STEP_ROWS = 32, TILE_ROWS = 64, VOCAB_TILE_ROWS = 1024, ROWS_AT_ONCE = 16 };
enum { N_PRODUCTS_MAX = 3 };

/* out [.][matrix rows] = (or +=) the input x matrix^T. */
struct product {
    const struct matrix *matrix;
    float *out;
    int add;
};

struct forward {
    const struct model *model;
    struct team *team;
    float **tiles; /* [n_threads] of [TILE_ROWS][max(n_embed, n_ffn)]: unpacked weights */
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
    /* The run at hand. */
    struct product products[N_PRODUCTS_MAX]; /* all of one input */
    const float *in;                         /* a window's input [n_rows][columns] */
    struct quant_vector vector;              /* a step's input, packed */
    const float *norm_weight;
    uint32_t tile_first_id, n_tile_ids; /* of forward_logprobs */
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

/* The product and the rows [*first, *end) of its matrix that an item stands for. */
static const struct product *item_rows(const struct forward *f, uint32_t item_idx, uint32_t n_tile,
                                       uint32_t *first, uint32_t *end)
{
    const struct product *product = f->products;
    uint32_t n_tiles;

    while (item_idx >= (n_tiles = (product->matrix->n_rows + n_tile - 1) / n_tile)) {
        item_idx -= n_tiles;
        product++;
    }
    const uint32_t n_rows = product->matrix->n_rows;
    *first = item_idx * n_tile;
    *end = n_rows - *first < n_tile ? n_rows : *first + n_tile;
    return product;
}

static uint32_t products_set(struct forward *f, const struct product *products, uint32_t n_products,
                             uint32_t n_tile)
{
    uint32_t n_items = 0;
    for (uint32_t i = 0; i < n_products; i++) {
        f->products[i] = products[i];
        n_items += (products[i].matrix->n_rows + n_tile - 1) / n_tile;
    }
    return n_items;
}

static uint32_t n_row_items(const struct forward *f)
{
    return (f->n_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
}

static uint32_t rows_end(const struct forward *f, uint32_t item_idx)
{
    uint32_t end = (item_idx + 1) * ROWS_AT_ONCE;
    return end < f->n_rows ? end : f->n_rows;
}

/* ---- a window ---- */

static void window_product_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;
    uint32_t first, end;
    const struct product *product = item_rows(f, item_idx, TILE_ROWS, &first, &end);
    const struct matrix *matrix = product->matrix;
    const uint32_t n_columns = matrix->n_columns;
    float *tile = f->tiles[thread_idx];

    for (uint32_t row = first; row < end; row++)
        quant_row_unpack(matrix->type, matrix->rows + row * matrix->row_bytes, n_columns,
                         tile + (size_t)(row - first) * n_columns);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)f->n_rows, (int)(end - first),
                (int)n_columns, 1, f->in, (int)n_columns, tile, (int)n_columns,
                product->add ? 1 : 0, product->out + first, (int)matrix->n_rows);
}

static void window_multiply(struct forward *f, const float *in, const struct product *products,
                            uint32_t n_products)
{
    f->in = in;
    team_run(f->team, window_product_item, f, products_set(f, products, n_products, TILE_ROWS));
}

static void window_norm_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;
    const struct model *m = f->model;

    (void)thread_idx;
    for (uint32_t row = item_idx * ROWS_AT_ONCE; row < rows_end(f, item_idx); row++)
        norm(f->x + (size_t)row * m->n_embed, f->norm_weight, m->n_embed, m->norm_epsilon,
             f->normed + (size_t)row * m->n_embed);
}

static void window_norm(struct forward *f, const float *weight)
{
    f->norm_weight = weight;
    team_run(f->team, window_norm_item, f, n_row_items(f));
}

static void window_turn_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;
    const struct model *m = f->model;

    (void)thread_idx;
    for (uint32_t row = item_idx * ROWS_AT_ONCE; row < rows_end(f, item_idx); row++) {
        const float *turns = f->turns + (size_t)row * m->head_width;
        turn(f->q + (size_t)row * n_q_columns(m), m->n_q_heads, m->head_width, turns);
        turn(f->k + (size_t)row * n_kv_columns(m), m->n_kv_heads, m->head_width, turns);
    }
}

static void window_swish_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;
    const size_t n_ffn = f->model->n_ffn;

    (void)thread_idx;
    for (size_t i = item_idx * ROWS_AT_ONCE * n_ffn; i < rows_end(f, item_idx) * n_ffn; i++)
        f->gate[i] = swish(f->gate[i]) * f->up[i];
}

static void window_before_attend(struct forward *f, const struct model_layer *layer)
{
    const struct product qkv[] = {{&layer->q, f->q, 0}, {&layer->k, f->k, 0}, {&layer->v, f->v, 0}};

    window_norm(f, layer->attend_norm);
    window_multiply(f, f->normed, qkv, 3);
    team_run(f->team, window_turn_item, f, n_row_items(f));
}

static void window_after_attend(struct forward *f, const struct model_layer *layer)
{
    const struct product o = {&layer->o, f->x, 1}, down = {&layer->down, f->x, 1};
    const struct product gate_up[] = {{&layer->gate, f->gate, 0}, {&layer->up, f->up, 0}};

    window_multiply(f, f->attended, &o, 1);
    window_norm(f, layer->ffn_norm);
    window_multiply(f, f->normed, gate_up, 2);
    team_run(f->team, window_swish_item, f, n_row_items(f));
    window_multiply(f, f->gate, &down, 1);
}

int forward_window(struct forward *f, winnow_session *session, const uint32_t *ids, uint64_t first,
                   uint32_t n)
{
    embed(f, ids, n);
    turns_fill(f, first, n);
    for (uint32_t layer = 0; layer < f->model->n_layers; layer++) {
        window_before_attend(f, &f->model->layers[layer]);
        team_rest(f->team);
        int rc = winnow_attend_exact(session, layer, first, n, f->q, f->k, f->v, f->attended, NULL,
                                     NULL, 0);
        if (rc < 0)
            return rc;
        window_after_attend(f, &f->model->layers[layer]);
    }
    team_rest(f->team);
    return 0;
}

/* ---- a decode step ---- */

static void step_product_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;
    float products[STEP_ROWS];
    uint32_t first, end;
    const struct product *product = item_rows(f, item_idx, STEP_ROWS, &first, &end);
    const struct matrix *matrix = product->matrix;

    (void)thread_idx;
    quant_rows_dot(matrix->type, matrix->rows + first * matrix->row_bytes, end - first, &f->vector,
                   products);
    for (uint32_t row = first; row < end; row++)
        product->out[row] =
            product->add ? product->out[row] + products[row - first] : products[row - first];
}

/* Rows of gate and up together, so that their joint result is made where they are. */
static void step_gate_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;
    float ups[STEP_ROWS];
    uint32_t first, end;
    const struct matrix *gate = item_rows(f, item_idx, STEP_ROWS, &first, &end)->matrix;
    const struct matrix *up = f->products[1].matrix;

    (void)thread_idx;
    quant_rows_dot(gate->type, gate->rows + first * gate->row_bytes, end - first, &f->vector,
                   f->gate + first);
    quant_rows_dot(up->type, up->rows + first * up->row_bytes, end - first, &f->vector, ups);
    for (uint32_t row = first; row < end; row++)
        f->gate[row] = swish(f->gate[row]) * ups[row - first];
}

/* in [columns of the matrices] is packed before it is multiplied. */
static void step_multiply(struct forward *f, const float *in, const struct product *products,
                          uint32_t n_products)
{
    quant_vector_pack(&f->vector, in, products->matrix->n_columns);
    team_run(f->team, step_product_item, f, products_set(f, products, n_products, STEP_ROWS));
}

static void step_norm(struct forward *f, const float *x, const float *weight)
{
    norm(x, weight, f->model->n_embed, f->model->norm_epsilon, f->normed);
}

static void step_before_attend(struct forward *f, const struct model_layer *layer)
{
    const struct model *m = f->model;
    const struct product qkv[] = {{&layer->q, f->q, 0}, {&layer->k, f->k, 0}, {&layer->v, f->v, 0}};

    step_norm(f, f->x, layer->attend_norm);
    step_multiply(f, f->normed, qkv, 3);
    turn(f->q, m->n_q_heads, m->head_width, f->turns);
    turn(f->k, m->n_kv_heads, m->head_width, f->turns);
}

static void step_after_attend(struct forward *f, const struct model_layer *layer)
{
    const struct product o = {&layer->o, f->x, 1}, down = {&layer->down, f->x, 1};
    const struct product gate = {&layer->gate, f->gate, 0};

    step_multiply(f, f->attended, &o, 1);
    step_norm(f, f->x, layer->ffn_norm);
    quant_vector_pack(&f->vector, f->normed, f->model->n_embed);
    uint32_t n_items = products_set(f, &gate, 1, STEP_ROWS);
    f->products[1].matrix = &layer->up;
    team_run(f->team, step_gate_item, f, n_items);
    step_multiply(f, f->gate, &down, 1);
}

static int step_attend(struct forward *f, winnow_client *client, uint32_t layer,
                       struct forward_step *step)
{
    winnow_attend_item item = {
        .session = step->session,
        .position = step->position,
        .mass = step->mass,
        .q = f->q,
        .k = f->k,
        .v = f->v,
        .out = f->attended,
    };

    team_rest(f->team);
    const int64_t start_ns = clock_now_ns();
    int rc = winnow_attend(client, layer, &item, 1, 0);
    step->attend_ns += clock_now_ns() - start_ns;
    step->certificates[layer] = item.certificate;
    step->truncate_to = item.truncate_to;
    return rc < 0 ? rc : item.status;
}

int forward_step(struct forward *f, winnow_client *client, struct forward_step *step)
{
    step->attend_ns = 0;
    embed(f, &step->id, 1);
    turns_fill(f, step->position, 1);
    for (uint32_t layer = 0; layer < f->model->n_layers; layer++) {
        step_before_attend(f, &f->model->layers[layer]);
        int rc = step_attend(f, client, layer, step);
        if (rc < 0)
            return rc;
        step_after_attend(f, &f->model->layers[layer]);
    }
    team_rest(f->team);
    return 0;
}

/* ---- logits ---- */

const float *forward_logits(struct forward *f)
{
    const struct model *m = f->model;
    const struct product product = {&m->output, f->logits, 0};

    step_norm(f, f->x + (size_t)(f->n_rows - 1) * m->n_embed, m->output_norm);
    step_multiply(f, f->normed, &product, 1);
    team_rest(f->team);
    return f->logits;
}

/* Folds a row's tile of logits into its running softmax. */
static void fold_row(struct forward *f, uint32_t row)
{
    const uint32_t n_ids = f->n_tile_ids, next = f->next_ids[row] - f->tile_first_id;
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
    if (next < n_ids)
        f->logprobs[row] = (double)logits[next];
}

static void fold_item(void *arg, uint32_t item_idx, uint32_t thread_idx)
{
    struct forward *f = arg;

    (void)thread_idx;
    for (uint32_t row = item_idx * ROWS_AT_ONCE; row < rows_end(f, item_idx); row++)
        fold_row(f, row);
}

void forward_logprobs(struct forward *f, const uint32_t *next_ids, uint32_t n, double *logprobs)
{
    const struct model *m = f->model;

    for (uint32_t row = 0; row < n; row++) {
        f->tops[row] = -INFINITY;
        f->sums[row] = 0;
    }
    f->next_ids = next_ids;
    f->logprobs = logprobs;
    f->n_rows = n;
    window_norm(f, m->output_norm);
    for (uint32_t id = 0; id < m->n_vocab; id += VOCAB_TILE_ROWS) {
        struct matrix tile = m->output;
        tile.rows += id * tile.row_bytes;
        tile.n_rows = m->n_vocab - id < VOCAB_TILE_ROWS ? m->n_vocab - id : VOCAB_TILE_ROWS;
        window_multiply(f, f->normed, &(struct product){&tile, f->vocab_logits, 0}, 1);
        f->tile_first_id = id;
        f->n_tile_ids = tile.n_rows;
        team_run(f->team, fold_item, f, n_row_items(f));
    }
    team_rest(f->team);
    for (uint32_t row = 0; row < n; row++)
        logprobs[row] -= f->tops[row] + log(f->sums[row]);
}

/* ---- memory ---- */

static uint32_t widest(const struct model *m)
{
    return m->n_ffn > m->n_embed ? m->n_ffn : m->n_embed;
}

static int tiles_create(struct forward *f)
{
    const uint32_t n_threads = team_n_threads(f->team);

    f->tiles = calloc(n_threads, sizeof *f->tiles);
    if (!f->tiles)
        return -ENOMEM;
    for (uint32_t i = 0; i < n_threads; i++) {
        f->tiles[i] = aligned_alloc(64, (size_t)TILE_ROWS * widest(f->model) * sizeof(float));
        if (!f->tiles[i])
            return -ENOMEM;
    }
    return quant_vector_create(&f->vector, widest(f->model));
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
        rc = tiles_create(f);
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
    for (uint32_t i = 0; f->tiles && i < team_n_threads(f->team); i++)
        free(f->tiles[i]);
    free(f->tiles);
    quant_vector_destroy(&f->vector);
    team_destroy(f->team);
    float *arrays[] = {f->x,    f->normed, f->q,     f->attended, f->k,           f->v,
                       f->gate, f->up,     f->turns, f->logits,   f->vocab_logits};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        free(arrays[i]);
    free(f->sums);
    free(f->tops);
    free(f);
}
