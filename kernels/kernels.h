/*
 * The contract of the numbers: one table of functions over plain arrays, three versions.
 * ref/ (plain C) defines every result, cpu/ (AVX2, AVX-512, chosen at run time) and cuda/ are held
 * against it by tests/kernels. No state, no allocation, no I/O: memory comes from the caller.
 *
 * One KV head a call with the G = n_q_heads / n_kv_heads query heads that share it. Arrays are
 * fp32, C order, unless said. Logits l = softmax_scale x q.k, natural log everywhere.
 *
 * A **block** is 16 tokens: K and V of one layer and KV head, opaque outside this room. Layout 1:
 *     K transposed [k_width][16], then V [16][v_width], in kv_dtype, padded to 4,096 bytes
 * so that sixteen tokens are sixteen lanes of one load, and a logit needs no horizontal sum.
 * Layout 2, "fragments" (fp16 and bf16): tiles of 16 x 16, each [32 lanes][8] in the order in which
 * mma.m16n8k16 takes its operand A, so that 32 threads load a tile as 512 contiguous bytes:
 *     K [k_width / 16] tiles, a row a token, then V [v_width / 16], a row a dimension
 *     lane 4 r + c: (r, 2c), (r, 2c+1), (r+8, 2c), (r+8, 2c+1), and the same 8 columns on
 * padded likewise. The CPU's versions read it by ref's slow path: for a session whose GPU was lost.
 * A part-filled block has n_tokens < 16; the bytes of its other tokens are never used in a result.
 *
 * A **partial** is [G] times {m, l, o[v_width]}: m the largest logit, l = sum exp(logit - m),
 * o = sum exp(logit - m) v; m = -inf, l = 0, o = 0 when nothing was attended. Stride v_width + 2.
 *
 * The **index** of a segment, layer and KV head (struct winnow_index_view) holds per block a
 * centroid, a value mean, scalars and a 4-bit code of every key. Formulas: docs/algorithm.md.
 *
 * Same bits: one version gives the same bits for the same arguments on any thread. Versions differ
 * by rounding, except the integer dot products of `score`, which are exact in all of them.
 *
 * Thread: any. This header is C17 and C++17.
 */
#pragma once

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    WINNOW_BLOCK_TOKENS = 16,
    WINNOW_GROUP_BLOCKS = 8, /* blocks of one work item and one partial */
    WINNOW_WIDTH_MIN = 16,
    WINNOW_WIDTH_MAX = 256,     /* widths are multiples of 16 */
    WINNOW_GQA_MAX = 16,        /* query heads a KV head */
    WINNOW_BLOCK_LAYOUT = 1,    /* the CPU's */
    WINNOW_BLOCK_FRAGMENTS = 2, /* the GPU's */
};

static_assert(WINNOW_WIDTH_MIN % 16 == 0, "a width itself");
static_assert(WINNOW_WIDTH_MAX % 16 == 0, "a width itself");

enum winnow_dtype { WINNOW_BF16 = 1, WINNOW_FP16 = 2, WINNOW_FP32 = 3 };
enum winnow_policy {
    WINNOW_POLICY_CODES = 1,  /* e_b from the 4-bit code of every key: the default */
    WINNOW_POLICY_TACTIC = 2, /* Tactic, arXiv 2502.12216 sections 3-4: curve fitted to samples */
    WINNOW_POLICY_MOMENT = 3, /* a normal fitted to each block; unfit for retrieval */
    WINNOW_POLICY_EXACT = 4,  /* everything */
};

struct winnow_model_shape {
    uint32_t n_layers, n_q_heads, n_kv_heads, k_width, v_width;
    float softmax_scale; /* a field of the model, never assumed */
    uint32_t kv_dtype;   /* enum winnow_dtype: at rest, in blocks */
    uint32_t io_dtype;   /* enum winnow_dtype: q, k, v, out on the wire */
    uint32_t block_layout;
};

struct winnow_block_head {
    float centroid_scale, vmean_scale; /* absmax / 127 */
    float spread;                      /* mean over dimensions of the key variance */
    float radius;                      /* largest |k - stored centroid| (length), rounded up */
};
static_assert(sizeof(struct winnow_block_head) == 16, "one load of a GPU");

/*
 * Index of one segment, layer and KV head; memory is the caller's (core's index_memory).
 *   head [n_blocks]; centroid i8 [n_blocks][k_width]; vmean i8 [n_blocks][v_width]
 *   code [n_blocks][k_width / 8][16 tokens][4 bytes]: byte i of group j holds dimension 8 j + i in
 *     its low and 8 j + 4 + i in its high nibble, as code + 8 (codes -7..7): 16 tokens are 16 lanes
 *   code_scale fp16 bits [n_blocks][16];  var fp16 bits [n_blocks][k_width], NULL unless wanted
 *   mean_k [k_width], mean_v [v_width] of the segment; v_max: largest length |v|, rounded up
 */
struct winnow_index_view {
    uint32_t n_blocks;
    struct winnow_block_head *head;
    int8_t *centroid, *vmean;
    uint8_t *code;
    uint16_t *code_scale, *var;
    float *mean_k, *mean_v, *v_max;
};

/*
 * One KV head's selection over the blocks of all its segments, in list order (rising segment, then
 * block). Memory is the caller's.
 *   in:  n_q G; n_blocks; n_blocks_max budget cap (n_blocks: none); mass P asked, 0 < P < 1
 *        ln_z  [G]            ln of the mass of sinks and tail, -inf when there are none
 *        ln_e  [n_blocks][G]  from score; tactic's select replaces it by what it fitted
 *        ln_m  [n_blocks][G]  ln of the exact mass, read of attended blocks alone: of probes by
 *                             tactic's select, of all selected ones by select_more
 *   out: block_idx [n_blocks] all blocks, key falling, ties by block number (tactic: probes first,
 *        then the selected, then the rest, each so); the selected are the first n_selected, the
 *        reserve (up to P + (1 - P) / 2) the next n_reserve
 *        selected u8 [n_blocks]: 0, or 1 for the first round, 2 for the second, 3 for a probe
 *        (in for tactic's select). A caller that lost a selected block sets 0: from then on it
 *        counts by its estimate
 *        ln_key [n_blocks]: ln of sum over g of e_b,g / T_g, T_g = Z_g + sum of e_b,g
 * Sums of e are u64 fixed point 2^-40 relative to M_g, the largest of ln_z, ln_e (and ln_m) of the
 * query head; saturating: same bits in any order. An e_b of NaN or +Inf is unknown: the block comes
 * first, is selected, and counts 0 until it was attended; left out by n_blocks_max it makes the
 * certificate 0.
 */
struct winnow_selection {
    uint32_t n_q, n_blocks, n_blocks_max, n_selected, n_reserve;
    float mass;
    const float *ln_z, *ln_m;
    float *ln_e;
    float *ln_key;
    uint32_t *block_idx;
    uint8_t *selected;
};

struct winnow_kernels {
    const char *name; /* "ref", "avx2", "avx512" */

    /* Bytes of scratch (64-byte aligned) that build, score, probe, select and select_more of
     * n_blocks may use. */
    size_t (*scratch_bytes)(const struct winnow_model_shape *, uint32_t n_blocks);
    /* The same without build: of score, probe, select and select_more over n_blocks. */
    size_t (*select_scratch_bytes)(const struct winnow_model_shape *, uint32_t n_blocks);

    /* n numbers of `dtype` to fp32 and back (round to nearest even). 0; -EDOM: a NaN or Inf
     * (from_float: or a value that overflows the type), dst then partly written. */
    int (*to_float)(uint32_t dtype, size_t n, const void *src, float *dst);
    int (*from_float)(uint32_t dtype, size_t n, const float *src, void *dst);

    /*
     * Clusters n_blocks x 16 tokens by balanced bisection (docs/algorithm.md) and fills the index.
     *   k [16 n_blocks][k_width], v [16 n_blocks][v_width], in position order
     *   order [16 n_blocks]: order[16 b + j] = place in the input of token j of block b, rising
     * Returns 0 or -EDOM (NaN or Inf in k or v; nothing then holds).
     */
    int (*build)(const struct winnow_model_shape *, uint32_t n_blocks, const float *k,
                 const float *v, uint16_t *order, struct winnow_index_view *view, void *scratch);

    /* Writes tokens [first, first + n) of a block from k [n][k_width], v [n][v_width], the others
     * kept; values overflowing kv_dtype saturate to its largest. unpack gives all 16 tokens. */
    void (*block_pack)(const struct winnow_model_shape *, uint32_t first, uint32_t n,
                       const float *k, const float *v, void *block);
    void (*block_unpack)(const struct winnow_model_shape *, const void *block, float *k, float *v);

    /* ln_e [n_blocks][G] of one segment's blocks for q [G][k_width]. policy CODES or MOMENT; TACTIC
     * gives s q.mu + ln 16, its order. The query is taken to 15 bits a head (two int8 halves) for
     * the codes' dot product, not for the centroid's. */
    void (*score)(const struct winnow_model_shape *, uint32_t policy,
                  const struct winnow_index_view *, const float *q, float *ln_e, void *scratch);

    /* tactic: marks the blocks whose exact mass is wanted first (selected = 3, all others 0) and
     * lists them in block_idx, rising; returns their number. Their ln_m stands before select. */
    uint32_t (*probe)(struct winnow_selection *, void *scratch);

    /* Shortest prefix by key with (Z + sum e) / T >= mass for every g; policy EXACT: every
     * block, rising, ln_e not read. Fills every `out` field. n_blocks_max ends the
     * prefix early. */
    void (*select)(uint32_t policy, struct winnow_selection *, void *scratch);

    /*
     * Verification and second round. Writes the certificate mass [G] and, when any
     * g is below P and may_add, selects more (selected = 2) and returns their number, appended to
     * block_idx's prefix; call again with may_add = 0 once they are attended: same rho, certificate
     * only.
     *   rho [G]: in and out; computed when may_add, reused when not
     */
    uint32_t (*select_more)(struct winnow_selection *, float *rho, float *mass, int may_add,
                            void *scratch);

    /* Attends n <= 8 blocks exactly. q [G][k_width]; block [n], n_tokens [n] (1..16). Writes
     * partial [G], and ln_m [n][G], the ln of each block's mass (NULL: not wanted). A logit beyond
     * fp32's range counts as its largest. */
    void (*attend_partial)(const struct winnow_model_shape *, const float *q, uint32_t n,
                           const void *const *block, const uint32_t *n_tokens, float *partial,
                           float *ln_m);

    /*
     * Exact attention of a window of n_pos query positions first, first + 1, ... (causal).
     *   q [n_pos][G][k_width]; block [n]; position [n] of each block's first token, or UINT64_MAX:
     *   sealed before the window, unmasked; n_tokens [n]
     *   partial [n_pos][G], continued: give {-inf, 0, 0} at first
     *   scratch: window_scratch_bytes
     */
    void (*attend_window)(const struct winnow_model_shape *, uint32_t n_pos, uint64_t first,
                          const float *q, uint32_t n, const void *const *block,
                          const uint64_t *position, const uint32_t *n_tokens, float *partial,
                          void *scratch);
    size_t (*window_scratch_bytes)(const struct winnow_model_shape *, uint32_t n_pos);

    /* Adds the unselected blocks of one segment, the first of which is number block_first of the
     * selection, to partial [G], which continues: weight e_b, value the stored mean.
     * Blocks more than 8 nats below the last selected key (none selected: the first key) go in
     * as one: summed e times the segment's mean v. An unknown e_b goes in nowhere. */
    void (*compensate)(const struct winnow_model_shape *, const struct winnow_index_view *,
                       const struct winnow_selection *, uint32_t block_first, float *partial);

    /* Joins n partials [n][G] in list order into acc [G], which continues. */
    void (*merge)(const struct winnow_model_shape *, uint32_t n, const float *partial, float *acc);
    /* out [G][v_width], lse [G]; nothing attended: out 0, lse -inf. */
    void (*finish)(const struct winnow_model_shape *, const float *acc, float *out, float *lse);
};

/* Bytes of one block at rest: a multiple of 4,096. */
static inline uint32_t winnow_block_bytes(const struct winnow_model_shape *shape)
{
    uint32_t element_bytes = shape->kv_dtype == WINNOW_FP32 ? 4 : 2;
    uint32_t n_bytes = WINNOW_BLOCK_TOKENS * (shape->k_width + shape->v_width) * element_bytes;
    return (n_bytes + 4095) & ~UINT32_C(4095);
}

/* Bytes of the partial of one query head, and of the query heads that share a KV head. */
static inline size_t winnow_partial_floats(const struct winnow_model_shape *shape)
{
    return (size_t)(shape->n_q_heads / shape->n_kv_heads) * (shape->v_width + 2);
}

/* 0, or -EINVAL with a line in text: a width, ratio or dtype that no version handles. */
int winnow_model_shape_check(const struct winnow_model_shape *shape, char text[256]);

/* The reference, which defines every result. */
const struct winnow_kernels *winnow_kernels_ref(void);
/* The fastest version this CPU runs, or the one named ("ref", "avx2", "avx512"); NULL: not here. */
const struct winnow_kernels *winnow_kernels_find(const char *name);

#ifdef __cplusplus
}
#endif
