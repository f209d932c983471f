/*
 * A chunk: 512 blocks of a unit, of which those not selected are compensated, weight e_b, value the
 * stored mean; a warp takes 64. Same result as ref/compensate.c defines, within rounding.
 *
 * O^T [dimension][head] = vmean^T [dimension][block] x e^T [block][head] is a product of matrices as
 * well. The means lie as rows of bytes, a row a block, and operand A wants pairs of blocks: a lane
 * loads 16 bytes of four rows and pairs them by byte permutes; dimension 16 r + 2 j is then row r of
 * tile j, and 16 r + 2 j + 1 row r + 8. Bytes become fp16 by being put under 0x64 (1024 + n).
 * Weights are taken relative to the largest, times the largest scale of the means, in two halves.
 */
#pragma once

#include <kernels/cuda/block.cuh>

constexpr float NATS_NEAR = 8;
constexpr int CHUNK_WARP_BLOCKS = WINNOW_GPU_CHUNK_BLOCKS / GROUP;

/* What a lane knows of two of the warp's 64 blocks: lane and lane + 32. */
struct chunk_blocks {
    uint32_t row[2];  /* where the mean is: from the index on, in 16 bytes */
    float scale[2];   /* of the mean */
    bool is_there[2]; /* not selected */
    bool is_far[2];
};

__device__ inline const uint8_t *chunk_unit(const winnow_gpu_view &view,
                                            const winnow_gpu_unit *unit, uint32_t segment)
{
    uint32_t session = view.launch->item[unit->item].session;
    const uint32_t *slots = view.session_segments + (uint64_t)session * view.n_session_segments_max;

    return view.index + __ldg(slots + segment) * view.segment_bytes +
           (uint64_t)(unit->layer * view.n_kv_heads + unit->head) * view.unit_bytes;
}

__device__ inline chunk_blocks chunk_blocks_load(const winnow_gpu_view &view,
                                                 const winnow_gpu_unit *unit, uint32_t first)
{
    float near_key = __ldcg(&unit->key_threshold) - NATS_NEAR, key[2];
    uint64_t at = unit->block_first;
    uint8_t selected[2];
    chunk_blocks x;

#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t block = first + lane_id() + 32 * half;
        x.is_there[half] = block < unit->n_blocks;
        block = min(block, unit->n_blocks - 1);
        uint32_t segment = block / view.span_blocks, b = block % view.span_blocks;
        const uint8_t *index = chunk_unit(view, unit, segment);
        selected[half] = __ldcg(view.selected + at + block);
        key[half] = __ldg(view.key + at + block);
        x.scale[half] = __ldg((const float *)(index + view.vmean_scale_at) + b);
        x.row[half] =
            (uint32_t)((index - view.index + view.vmean_at + (uint64_t)b * view.v_width) / 16);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        x.is_there[half] &= !selected[half];
        x.is_far[half] = x.is_there[half] && key[half] < near_key;
    }
    return x;
}

/* Block t of step of a lane: operand B's rows 2c, 2c + 1, 2c + 8, 2c + 9. */
__device__ inline uint32_t chunk_block(int step, int t)
{
    return 16 * step + 8 * (t / 2) + 2 * (lane_id() % 4) + t % 2;
}

/* A lane's column of operand B, or its two of 16 heads. */
template <class F> __device__ inline uint32_t column_head(int i)
{
    return F::HEADS == 4 ? lane_id() / 8 : lane_id() / 4 + 8 * i;
}

/* Over the four lanes that share a column. */
__device__ inline float column_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float column_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/* The weights of a lane's 16 blocks and columns. */
template <class F> struct chunk_weights {
    float e[F::SUMS][16];     /* near: times the scale of the mean over `scale` */
    uint32_t near[2], far[2]; /* bit a block of the warp's; neither: not compensated */
    float scale;              /* a power of 2 near the largest */
};

/* ln_e of a lane's blocks; all are loaded before the first is used. */
template <class F>
__device__ inline void chunk_estimates(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                       uint32_t first, chunk_weights<F> &w)
{
    uint32_t n = min(unit->n_blocks - first, (uint32_t)CHUNK_WARP_BLOCKS);
    const float *ln_e = view.ln_e + ((uint64_t)unit->block_first + first) * view.n_group;

#pragma unroll
    for (int t = 0; t < 16; t++)
#pragma unroll
        for (int c = 0; c < F::SUMS; c++)
            w.e[c][t] = __ldg(ln_e + min(chunk_block(t / 4, t % 4), n - 1) * view.n_group +
                              min(column_head<F>(c), view.n_group - 1));
}

template <class F>
__device__ inline void chunk_weigh(const winnow_gpu_view &view, const chunk_blocks &blocks,
                                   chunk_weights<F> &w, float (&m)[F::SUMS], float (&l)[F::SUMS])
{
    float largest = 0;

#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_near = blocks.is_there[half] && !blocks.is_far[half];
        w.near[half] = __ballot_sync(~0u, is_near);
        w.far[half] = __ballot_sync(~0u, blocks.is_far[half]);
        largest = fmaxf(largest, is_near ? blocks.scale[half] : 0);
    }
    uint32_t exponent = __reduce_max_sync(~0u, __float_as_uint(largest)) >> 23;
    exponent = min(max(exponent, 1u), 253u);
    float inverse = __uint_as_float((254 - exponent) << 23);
    w.scale = __uint_as_float(exponent << 23);
#pragma unroll
    for (int c = 0; c < F::SUMS; c++) {
        m[c] = -INFINITY;
        l[c] = 0;
#pragma unroll
        for (int t = 0; t < 16; t++) {
            uint32_t i = chunk_block(t / 4, t % 4);
            bool is_there = (w.near[t / 8] | w.far[t / 8]) >> i % 32 & 1;
            if (!is_there || !(w.e[c][t] < INFINITY) || column_head<F>(c) >= view.n_group)
                w.e[c][t] = -INFINITY;
            m[c] = fmaxf(m[c], w.e[c][t]);
        }
        m[c] = column_max(m[c]);
#pragma unroll
        for (int t = 0; t < 16; t++) {
            w.e[c][t] = m[c] == -INFINITY ? 0 : exp_or_0(w.e[c][t] - m[c]);
            l[c] += w.e[c][t];
        }
        l[c] = column_sum(l[c]);
    }
#pragma unroll
    for (int t = 0; t < 16; t++) {
        uint32_t i = chunk_block(t / 4, t % 4);
        float scale = __shfl_sync(~0u, blocks.scale[t / 8], i) * inverse;
#pragma unroll
        for (int c = 0; c < F::SUMS; c++)
            w.e[c][t] *= w.near[t / 8] >> i % 32 & 1 ? scale : 1;
    }
}

/* Bytes p and p + 1 (p = 0, 2) of x and y: as fp16 {x[p], y[p]} and {x[p + 1], y[p + 1]}. */
__device__ inline void bytes_pair(uint32_t x, uint32_t y, bool is_high, uint32_t *even,
                                  uint32_t *odd)
{
    const __half2 bias = __float2half2_rn(1024 + 128);
    uint32_t z = __byte_perm(x, y, is_high ? 0x7362 : 0x5140) ^ 0x80808080;
    uint32_t a = __byte_perm(z, 0x64646464, 0x4140), b = __byte_perm(z, 0x64646464, 0x4342);
    __half2 a2 = __hsub2(*(__half2 *)&a, bias), b2 = __hsub2(*(__half2 *)&b, bias);

    *even = *(uint32_t *)&a2;
    *odd = *(uint32_t *)&b2;
}

/* Bytes that a lane takes of a row at once, and the dimensions that 8 lanes cover with them. */
template <class F> constexpr int ROW_BYTES = F::WIDTH == 64 ? 8 : 16;
template <class F> constexpr int SLAB = 8 * ROW_BYTES<F>;

/* A lane's parts of four rows. */
template <class F> struct chunk_rows {
    uint32_t word[4][ROW_BYTES<F> / 4];
};

/* Those of step, from dimension d on; 0 where nothing is near. */
template <class F>
__device__ inline void chunk_rows_load(const winnow_gpu_view &view, const chunk_blocks &blocks,
                                       const chunk_weights<F> &w, int step, uint32_t d,
                                       chunk_rows<F> &rows)
{
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint32_t i = chunk_block(step, t);
        bool is_near = w.near[step / 2] >> i % 32 & 1 && d < view.v_width;
        uint64_t row = __shfl_sync(~0u, blocks.row[step / 2], i);
        const uint8_t *at = view.index + 16 * row + d;
        if constexpr (ROW_BYTES<F> == 16) {
            uint4 x = load_if(is_near, (const uint4 *)at);
            rows.word[t][0] = x.x;
            rows.word[t][1] = x.y;
            rows.word[t][2] = x.z;
            rows.word[t][3] = x.w;
        } else {
            uint2 x = load_if(is_near, (const uint2 *)at);
            rows.word[t][0] = x.x;
            rows.word[t][1] = x.y;
        }
    }
}

/* The near weights as operand B of the four steps. */
template <class F> struct chunk_operand {
    uint2 b[4][F::PARTS];
};

template <class F> __device__ inline chunk_operand<F> chunk_pack(const chunk_weights<F> &w)
{
    chunk_operand<F> to;

#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int c = 0; c < F::SUMS; c++) {
            float x[4], rest[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                bool is_near = w.near[step / 2] >> chunk_block(step, t) % 32 & 1;
                x[t] = is_near ? w.e[c][4 * step + t] : 0;
                rest[t] = rest_of<WINNOW_FP16>(x[t]);
                if (F::HEADS == 4 && lane_id() / 4 % 2)
                    x[t] = rest[t]; /* the column of the low half */
            }
            to.b[step][2 * c] =
                make_uint2(pack<WINNOW_FP16>(x[0], x[1]), pack<WINNOW_FP16>(x[2], x[3]));
            if constexpr (F::HEADS > 4)
                to.b[step][2 * c + 1] = make_uint2(pack<WINNOW_FP16>(rest[0], rest[1]),
                                                   pack<WINNOW_FP16>(rest[2], rest[3]));
        }
    return to;
}

/* The near blocks: added to o [heads][STRIDE] if it holds the far ones, dimensions from slab_first
 * on for a slab. */
template <class F>
__device__ inline void chunk_slab(const winnow_gpu_view &view, const chunk_blocks &blocks,
                                  const chunk_weights<F> &w, const chunk_operand<F> &operand,
                                  uint32_t slab_first, float (*o)[F::STRIDE])
{
    constexpr int N_TILES = ROW_BYTES<F> / 2;
    uint32_t lane = lane_id(), d = slab_first + lane / 4 * ROW_BYTES<F>;
    float sum[N_TILES][F::SUMS][4] = {};
    chunk_rows<F> rows[3];

    chunk_rows_load<F>(view, blocks, w, 0, d, rows[0]);
    chunk_rows_load<F>(view, blocks, w, 1, d, rows[1]);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const uint32_t(&row)[4][ROW_BYTES<F> / 4] = rows[step % 3].word;
        if (step < 2)
            chunk_rows_load<F>(view, blocks, w, step + 2, d, rows[(step + 2) % 3]);
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
            uint4 a;
            bytes_pair(row[0][j / 2], row[1][j / 2], j % 2, &a.x, &a.y);
            bytes_pair(row[2][j / 2], row[3][j / 2], j % 2, &a.z, &a.w);
#pragma unroll
            for (int part = 0; part < F::PARTS; part++)
                mma<WINNOW_FP16>(sum[j][part / 2], a, operand.b[step][part]);
        }
    }
    if (d >= view.v_width)
        return;
    bool has_far = w.far[0] | w.far[1];
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float y = F::HEADS == 4 ? sum[j][0][2 * half] + sum[j][0][2 * half + 1]
                                        : sum[j][i / 2][2 * half + i % 2];
                float *at = &o[lane_head<F>(lane, i)][d + 2 * j + half];
                *at = (has_far ? *at : 0) + w.scale * y;
            }
}

/* The far blocks: their summed weights times the segment's mean value, a segment after the other. */
template <class F>
__device__ inline void chunk_far(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                 uint32_t first, const chunk_weights<F> &w, float (*o)[F::STRIDE])
{
    uint32_t segment = first / view.span_blocks;
    uint32_t last = (min(first + CHUNK_WARP_BLOCKS, unit->n_blocks) - 1) / view.span_blocks;

    for (uint32_t g = 0; g < F::HEADS; g++)
        for (uint32_t d = lane_id(); d < view.v_width; d += 32)
            o[g][d] = 0;
    for (; segment <= last; segment++) {
        float sum[F::SUMS] = {};
#pragma unroll
        for (int t = 0; t < 16; t++) {
            uint32_t i = chunk_block(t / 4, t % 4);
            bool is_in = w.far[t / 8] >> i % 32 & 1 && (first + i) / view.span_blocks == segment;
#pragma unroll
            for (int c = 0; c < F::SUMS; c++)
                sum[c] += is_in ? w.e[c][t] : 0;
        }
#pragma unroll
        for (int c = 0; c < F::SUMS; c++)
            sum[c] = column_sum(sum[c]);
        const float *mean = (const float *)(chunk_unit(view, unit, segment) + view.mean_v_at);
        for (uint32_t g = 0; g < view.n_group; g++) {
            float of_column = g < 8 ? sum[0] : sum[F::SUMS - 1];
            float x = __shfl_sync(~0u, of_column, F::HEADS == 4 ? 8 * g : g % 8 * 4);
            for (uint32_t d = lane_id(); d < view.v_width; d += 32)
                o[g][d] += x * __ldg(mean + d);
        }
    }
    __syncwarp();
}

/* A warp's 64 blocks into its place of the group's memory. */
template <class F>
__device__ inline void chunk_attend(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                    uint32_t chunk, group_memory<F> *memory)
{
    uint32_t warp = threadIdx.x / 32, lane = lane_id();
    uint32_t first = chunk * WINNOW_GPU_CHUNK_BLOCKS + warp * CHUNK_WARP_BLOCKS;
    chunk_weights<F> w;
    float m[F::SUMS], l[F::SUMS];

    if (first >= unit->n_blocks) {
        block_absent<F>(memory);
        return;
    }
    chunk_estimates<F>(view, unit, first, w);
    chunk_blocks blocks = chunk_blocks_load(view, unit, first);
    chunk_weigh<F>(view, blocks, w, m, l);
    if (w.far[0] | w.far[1])
        chunk_far<F>(view, unit, first, w, memory->o[warp]);
    chunk_operand<F> operand = chunk_pack<F>(w);
    for (uint32_t d = 0; d < view.v_width; d += SLAB<F>)
        chunk_slab<F>(view, blocks, w, operand, d, memory->o[warp]);
#pragma unroll
    for (int c = 0; c < F::SUMS; c++)
        if (lane % 4 == 0 && (F::HEADS != 4 || lane % 8 == 0)) {
            memory->m[warp][column_head<F>(c)] = m[c];
            memory->l[warp][column_head<F>(c)] = l[c];
        }
}
