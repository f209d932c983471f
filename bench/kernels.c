// bench-kernels: time of every entry of the kernels, by shape and version, beside what the machine
// could do at best: read bandwidth for what streams, multiply-adds for what computes.
//
//   bench-kernels [--threads N] [WORD]      only rows that contain WORD
//
// Each row: best of several runs, per call and, where they count, GB/s read or GFLOP/s, and the
// ratio to ref. `cache` rows repeat one call's data; `step` rows do on all threads what a step does
// over all layers and KV heads of a context of 7,000 tokens, its data anew in 256 MiB of memory:
// attend everything, in blocks of random order; score everything. Inputs and shapes: tests/kernels/cases.h.
#include <base/clock.h>
#include <getopt.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "../tests/kernels/cases.h"

enum { N_BLOCKS = 416, N_POS = 512, N_RUNS = 7, RUN_NS = 30 * 1000 * 1000, N_THREADS_MAX = 64 };

/* One timed thing: run(arg, i) for i in [0, n_items), shared by the threads. */
struct job {
    void (*run)(void *arg, uint32_t item_idx, uint32_t thread_idx);
    void *arg;
    uint32_t n_items;
    _Atomic uint32_t next;
};

static uint32_t n_threads = 2;
static const char *word = "";

struct share {
    struct job *job;
    uint32_t thread_idx;
};

static void *share_run(void *arg)
{
    struct share *share = arg;
    struct job *job = share->job;
    for (uint32_t i; (i = atomic_fetch_add(&job->next, 1)) < job->n_items;)
        job->run(job->arg, i, share->thread_idx);
    return NULL;
}

static int64_t job_once_ns(struct job *job, uint32_t threads)
{
    pthread_t thread[N_THREADS_MAX];
    struct share share[N_THREADS_MAX];
    int64_t start_ns = winnow_clock_now_ns();

    atomic_store(&job->next, 0);
    for (uint32_t i = 1; i < threads; i++) {
        share[i] = (struct share){job, i};
        if (pthread_create(&thread[i], NULL, share_run, &share[i]))
            abort();
    }
    share[0] = (struct share){job, 0};
    share_run(&share[0]);
    for (uint32_t i = 1; i < threads; i++)
        pthread_join(thread[i], NULL);
    return winnow_clock_now_ns() - start_ns;
}

/* Nanoseconds of one pass over all items: the best run, each long enough to be seen. */
static double job_ns(struct job *job, uint32_t threads)
{
    int64_t once_ns = job_once_ns(job, threads);
    int64_t n_passes = once_ns < RUN_NS ? RUN_NS / (once_ns + 1) + 1 : 1;
    double best = 1e30;

    for (int run = 0; run < N_RUNS; run++) {
        int64_t sum_ns = 0;
        for (int64_t i = 0; i < n_passes; i++)
            sum_ns += job_once_ns(job, threads);
        best = fmin(best, (double)sum_ns / (double)n_passes);
        if (once_ns > 10 * (int64_t)RUN_NS && run >= 1)
            break;
    }
    return best;
}

/* The machine. */

static uint8_t *big; /* BIG_BYTES, touched */
enum { BIG_BYTES = 256 << 20, BIG_PIECE = 1 << 20 };
static volatile float sink;

__attribute__((target("avx2"))) static void read_bytes(const uint8_t *at, size_t n_bytes)
{
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t i = 0; i < n_bytes; i += 64) {
        a = _mm256_or_si256(a, _mm256_load_si256((const __m256i *)(at + i)));
        b = _mm256_or_si256(b, _mm256_load_si256((const __m256i *)(at + i + 32)));
    }
    sink = (float)_mm256_extract_epi32(_mm256_or_si256(a, b), 0);
}

static void read_pieces(void *arg, uint32_t i, uint32_t thread_idx)
{
    (void)arg, (void)thread_idx;
    read_bytes(big + (size_t)i * BIG_PIECE, BIG_PIECE);
}

/* A MiB as pages from all over: an odd stride meets each once. */
static void read_pages(void *arg, uint32_t i, uint32_t thread_idx)
{
    (void)arg, (void)thread_idx;
    for (size_t page = i * 256; page < (i + 1) * 256; page++)
        read_bytes(big + page * 40503 % (BIG_BYTES / 4096) * 4096, 4096);
}

enum { FMA_STEPS = 20000, FMA_CHAINS = 12 };

#define FMA_PEAK(name, isa, type, set1, fmadd, first)                                              \
    __attribute__((target(isa))) static void name(void *arg, uint32_t i, uint32_t thread_idx)      \
    {                                                                                              \
        type x[FMA_CHAINS], y = set1(0.999f);                                                      \
        (void)arg, (void)thread_idx;                                                               \
        for (int c = 0; c < FMA_CHAINS; c++)                                                       \
            x[c] = set1((float)(i + 1));                                                           \
        for (int step = 0; step < FMA_STEPS; step++)                                               \
            _Pragma("GCC unroll 12") for (int c = 0; c < FMA_CHAINS; c++) x[c] =                   \
                fmadd(x[c], y, y);                                                                 \
        for (int c = 1; c < FMA_CHAINS; c++)                                                       \
            x[0] = fmadd(x[0], y, x[c]);                                                           \
        sink = first(x[0]);                                                                        \
    }
FMA_PEAK(fma_avx2, "avx2,fma", __m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_cvtss_f32)
FMA_PEAK(fma_avx512, "avx512f", __m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_cvtss_f32)

static void machine_print(void)
{
    struct job reads = {.run = read_pieces, .n_items = BIG_BYTES / BIG_PIECE};
    struct job pages = {.run = read_pages, .n_items = BIG_BYTES / BIG_PIECE};
    struct job avx2 = {.run = fma_avx2, .n_items = 1}, avx512 = {.run = fma_avx512, .n_items = 1};

    for (uint32_t threads = 1; threads <= n_threads; threads += n_threads > 1 ? n_threads - 1 : 1)
        printf("machine  read %2u threads %6.1f GB/s, pages in odd order %6.1f GB/s\n", threads,
               (double)BIG_BYTES / job_ns(&reads, threads),
               (double)BIG_BYTES / job_ns(&pages, threads));
    if (winnow_kernels_find("avx2"))
        printf("machine  fma avx2     1 core %6.1f GFLOP/s\n",
               2.0 * 8 * FMA_CHAINS * FMA_STEPS / job_ns(&avx2, 1));
    if (winnow_kernels_find("avx512"))
        printf("machine  fma avx512   1 core %6.1f GFLOP/s\n",
               2.0 * 16 * FMA_CHAINS * FMA_STEPS / job_ns(&avx512, 1));
}

/* The entries. */

struct bench {
    const struct winnow_kernels *kernels;
    struct kernel_data data;
    uint32_t *place; /* `step`: order of the blocks in `big` */
    uint32_t n_places;
    size_t head_bytes;
    float *partial[N_THREADS_MAX], *ln_e, *ln_m;
    void *scratch, *window_scratch;
    float *k_out;
    uint8_t *block_out;
    uint16_t *half;
    struct winnow_index_view view_out;
    uint16_t *order_out;
    uint64_t position[N_BLOCKS];
    uint32_t n_tokens[N_BLOCKS];
    float ln_z[WINNOW_GQA_MAX], rho[WINNOW_GQA_MAX], mass[WINNOW_GQA_MAX];
    struct winnow_selection sel;
};

static void attend_cache(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i;
    b->kernels->attend_partial(&b->data.shape, b->data.q, 8, b->data.block, b->n_tokens,
                               b->partial[thread_idx], b->ln_m);
}

/* Item: eight blocks of a head. */
static void attend_step(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    const void *block[8];
    float ln_m[8 * WINNOW_GQA_MAX];
    for (uint32_t j = 0; j < 8; j++)
        block[j] = big + b->place[(i * 8 + j) % b->n_places] * b->data.block_bytes;
    b->kernels->attend_partial(&b->data.shape, b->data.q, 8, block, b->n_tokens,
                               b->partial[thread_idx], ln_m);
}

static void attend_window(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->attend_window(&b->data.shape, N_POS, 1u << 20, b->data.q, 8, b->data.block,
                              b->position, b->n_tokens, b->partial[0], b->window_scratch);
}

static void score_cache(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->score(&b->data.shape, WINNOW_POLICY_CODES, &b->data.view, b->data.q, b->ln_e,
                      b->scratch);
}

/* Item: a head; codes, centroids and scales of each lie in `big`. */
static void score_step(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    struct winnow_index_view view = b->data.view;
    uint8_t *at = big + i % (BIG_BYTES / b->head_bytes) * b->head_bytes;
    (void)thread_idx;
    view.code = at;
    view.centroid = (int8_t *)(at + (size_t)N_BLOCKS * 8 * b->data.shape.k_width);
    b->kernels->score(&b->data.shape, WINNOW_POLICY_CODES, &view, b->data.q, b->partial[thread_idx],
                      b->scratch);
}

static void build_segment(struct bench *b, uint32_t n_blocks)
{
    b->view_out.n_blocks = n_blocks;
    if (b->kernels->build(&b->data.shape, n_blocks, b->data.k, b->data.v, b->order_out,
                          &b->view_out, b->scratch))
        abort();
}

static void build_512(void *arg, uint32_t i, uint32_t thread_idx)
{
    (void)i, (void)thread_idx;
    build_segment(arg, 32);
}

static void build_1024(void *arg, uint32_t i, uint32_t thread_idx)
{
    (void)i, (void)thread_idx;
    build_segment(arg, 64);
}

static void pack(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->block_pack(&b->data.shape, 0, 16, b->data.k, b->data.v, b->block_out);
}

static void unpack(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->block_unpack(&b->data.shape, b->data.block[0], b->k_out, b->k_out + 16 * 256);
}

static void to_float(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    if (b->kernels->to_float(WINNOW_FP16, 4096, b->half, b->k_out))
        abort();
}

static void from_float(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    if (b->kernels->from_float(WINNOW_FP16, 4096, b->data.k, b->half))
        abort();
}

static void select_blocks(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->select(WINNOW_POLICY_CODES, &b->sel, b->scratch);
}

static void select_more(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->select_more(&b->sel, b->rho, b->mass, 0, b->scratch);
}

static void compensate(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->compensate(&b->data.shape, &b->data.view, &b->sel, 0, b->partial[0]);
}

static void merge(void *arg, uint32_t i, uint32_t thread_idx)
{
    struct bench *b = arg;
    (void)i, (void)thread_idx;
    b->kernels->merge(&b->data.shape, 16, b->partial[1], b->partial[0]);
}

static void bench_init(struct bench *b, const struct kernel_case *of)
{
    struct winnow_rng rng;

    *b = (struct bench){0};
    case_data_init(&b->data, of, INPUT_RANDOM, N_BLOCKS, N_POS, 1);
    for (uint32_t i = 0; i < n_threads || i < 2; i++)
        b->partial[i] = case_alloc(sizeof(float) * b->data.n_partial * N_POS);
    b->ln_e = case_alloc(sizeof(float) * N_BLOCKS * b->data.n_q);
    b->ln_m = case_alloc(sizeof(float) * N_BLOCKS * b->data.n_q);
    b->k_out = case_alloc(sizeof(float) * 2 * 16 * WINNOW_WIDTH_MAX);
    b->half = case_alloc(sizeof *b->half * 4096);
    b->block_out = case_alloc(b->data.block_bytes);
    b->order_out = case_alloc(sizeof(uint16_t) * 16 * N_BLOCKS);
    case_view_init(&b->view_out, &b->data.shape, N_BLOCKS);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        b->position[i] = UINT64_MAX;
        b->n_tokens[i] = 16;
    }
    for (size_t i = 0; i < BIG_BYTES; i += b->data.block_bytes)
        memcpy(big + i, b->data.block[i / b->data.block_bytes % N_BLOCKS],
               i + b->data.block_bytes <= BIG_BYTES ? b->data.block_bytes : BIG_BYTES - i);
    b->head_bytes = (size_t)N_BLOCKS * 9 * b->data.shape.k_width;
    b->n_places = BIG_BYTES / (uint32_t)b->data.block_bytes;
    b->place = case_alloc(b->n_places * sizeof *b->place);
    winnow_rng_init(&rng, 2);
    for (uint32_t i = 0; i < b->n_places; i++) { /* shuffled as it is filled */
        uint32_t other = (uint32_t)winnow_rng_below(&rng, i + 1);
        b->place[i] = b->place[other];
        b->place[other] = i;
    }
    winnow_kernels_ref()->score(&b->data.shape, WINNOW_POLICY_CODES, &b->data.view, b->data.q,
                                b->ln_e, b->data.scratch);
    memcpy(b->ln_m, b->ln_e, sizeof(float) * N_BLOCKS * b->data.n_q);
    b->sel = (struct winnow_selection){
        .n_q = b->data.n_q,
        .n_blocks = N_BLOCKS,
        .n_blocks_max = N_BLOCKS,
        .mass = 0.9f,
        .ln_z = b->ln_z,
        .ln_m = b->ln_m,
        .ln_e = b->ln_e,
        .ln_key = case_alloc(sizeof(float) * N_BLOCKS),
        .block_idx = case_alloc(sizeof(uint32_t) * N_BLOCKS),
        .selected = case_alloc(N_BLOCKS),
    };
    winnow_kernels_ref()->select(WINNOW_POLICY_CODES, &b->sel, b->data.scratch);
}

struct row {
    const char *name;
    void (*run)(void *arg, uint32_t item_idx, uint32_t thread_idx);
    uint32_t n_items, threads;
    double n_bytes, n_flop; /* of a pass; 0: says nothing */
};

static double row_print(struct bench *b, const char *shape, const struct row *row, double ref_ns)
{
    struct job job = {.run = row->run, .arg = b, .n_items = row->n_items};
    char name[64];

    snprintf(name, sizeof name, "%-14s %-8s", row->name, shape);
    if (!strstr(name, word) && !strstr(b->kernels->name, word))
        return ref_ns;
    double ns = job_ns(&job, row->threads);
    printf("%s %-7s %u %12.0f ns", name, b->kernels->name, row->threads, ns);
    if (row->n_bytes > 0)
        printf(" %7.1f GB/s", row->n_bytes / ns);
    else if (row->n_flop > 0)
        printf(" %7.1f GFLOP/s", row->n_flop / ns);
    else
        printf(" %12s", "");
    if (ref_ns > 0)
        printf(" %7.1f x ref", ref_ns / ns);
    printf("\n");
    return ns;
}

/* n_heads: layers x KV heads of the model. */
static void case_bench(const struct kernel_case *of, uint32_t n_heads)
{
    static const char *const version[] = {"ref", "avx2", "avx512"};
    struct bench b;

    bench_init(&b, of);
    const struct winnow_model_shape *shape = &b.data.shape;
    uint32_t n_q = b.data.n_q, widths = shape->k_width + shape->v_width;
    double code_bytes = N_BLOCKS * (9.0 * shape->k_width + 32 + 16);
    double block_flop = 2.0 * 16 * widths * n_q;
    uint32_t n_groups = n_heads * (7000 / 128 + 1);
    double group_bytes = 8.0 * (double)b.data.block_bytes;
    const struct row rows[] = {
        {"attend cache", attend_cache, 1, 1, group_bytes, 0},
        {"attend step", attend_step, n_groups, n_threads, group_bytes * n_groups, 0},
        {"window", attend_window, 1, 1, 0, N_POS * 8 * block_flop},
        {"score cache", score_cache, 1, 1, code_bytes, 0},
        {"score step", score_step, n_heads, n_threads, code_bytes * n_heads, 0},
        {"build 512", build_512, 1, 1, 0, 0},
        {"build 1024", build_1024, 1, 1, 0, 0},
        {"pack", pack, 1, 1, 0, 0},
        {"unpack", unpack, 1, 1, 0, 0},
        {"to_float", to_float, 1, 1, 4096.0 * 2, 0},
        {"from_float", from_float, 1, 1, 4096.0 * 4, 0},
        {"select", select_blocks, 1, 1, 0, 0},
        {"select_more", select_more, 1, 1, 0, 0},
        {"compensate", compensate, 1, 1, 0, 0},
        {"merge 16", merge, 1, 1, 0, 0},
    };

    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        double ref_ns = 0;
        for (int v = 0; v < 3; v++) {
            b.kernels = winnow_kernels_find(version[v]);
            if (!b.kernels)
                continue;
            b.scratch = case_alloc(b.kernels->scratch_bytes(shape, N_BLOCKS));
            b.window_scratch = case_alloc(b.kernels->window_scratch_bytes(shape, N_POS));
            double ns = row_print(&b, of->name, &rows[r], ref_ns);
            ref_ns = v ? ref_ns : ns;
            winnow_alloc_free(b.scratch);
            winnow_alloc_free(b.window_scratch);
        }
    }
    case_data_finish(&b.data);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"threads", required_argument, NULL, 't'}, {0}};
    int option;

    while ((option = getopt_long(argc, argv, "t:", options, NULL)) != -1) {
        if (option != 't') {
            fprintf(stderr, "usage: %s [--threads N] [WORD]\n", argv[0]);
            return 2;
        }
        n_threads = (uint32_t)strtoul(optarg, NULL, 10);
    }
    if (n_threads < 1 || n_threads > N_THREADS_MAX)
        return 2;
    if (optind < argc)
        word = argv[optind];
    setvbuf(stdout, NULL, _IOLBF, 0);
    big = winnow_alloc_map(BIG_BYTES);
    winnow_assert(big);
    memset(big, 1, BIG_BYTES);
    machine_print();
    case_bench(&kernel_cases[0], 30 * 3);
    case_bench(&kernel_cases[1], 32 * 8);
    winnow_alloc_unmap(big, BIG_BYTES);
    return 0;
}
