/*
 * A chunk: 512 blocks of a unit, of which those not selected are compensated, weight e_b, value the
 * stored mean; a warp takes 64. Same result as ref/compensate.c defines, within rounding.
 *
 * O^T [dimension][head] = vmean^T [dimension][block] x e^T [block][head] is a product of matrices as
 * well. The means lie as rows of bytes, a row a block, and operand A wants pairs of blocks: a lane
 * takes 8 bytes of four rows and pairs them by byte permutes; dimension 8 r + 2 j of a slab of 64 is
 * then row r of tile j, and 8 r + 2 j + 1 row r + 8. Bytes become fp16 by being put under 0x64 (1024
 * + n). Weights are taken relative to the largest, times the largest scale of the means, in two
 * halves.
 */
#pragma once

#include <kernels/cuda/block.cuh>

constexpr float NATS_NEAR = 8;
constexpr int CHUNK_WARP_BLOCKS = WINNOW_GPU_CHUNK_BLOCKS / GROUP;

/* What a lane knows of two of the warp's 64 blocks, lane and lane + 32, and all lanes of all. */
struct chunk_blocks {
    uint32_t row[2];          /* where the mean is: from the index on, in 16 bytes */
    float scale[2];           /* of the mean */
    uint32_t near[2], far[2]; /* bit a block; neither: not compensated */
};

__device__ inline const uint8_t *chunk_unit(const winnow_gpu_view &view,
                                            const winnow_gpu_unit *unit, uint32_t segment)
{
    const uint32_t *slots = view.session_segments + unit->session * view.n_session_segments_max;

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
        uint32_t block = min(first + lane_id() + 32 * half, unit->n_blocks - 1);
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
        bool is_there = first + lane_id() + 32 * half < unit->n_blocks && !selected[half];
        bool is_far = key[half] < near_key;
        x.near[half] = __ballot_sync(~0u, is_there && !is_far);
        x.far[half] = __ballot_sync(~0u, is_there && is_far);
    }
    return x;
}

/* Block t of step of a lane: operand B's rows 2c, 2c + 1, 2c + 8, 2c + 9. */
__device__ inline uint32_t chunk_block(int step, int t)
{
    return 16 * step + 8 * (t / 2) + 2 * (lane_id() % 4) + t % 2;
}

/* Bit t of step of a lane, from its masks: those of the warp's blocks from its first on. */
__device__ inline bool chunk_bit(const uint32_t (&mask)[2], int step, int t)
{
    return mask[step / 2] & 1u << (16 * (step % 2) + 8 * (t / 2) + t % 2);
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
    uint32_t near[2], far[2]; /* as chunk_bit wants them */
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
    uint32_t there[2], lane = lane_id();
    float largest = 0;

#pragma unroll
    for (int half = 0; half < 2; half++) {
        w.near[half] = blocks.near[half] >> 2 * (lane % 4);
        w.far[half] = blocks.far[half] >> 2 * (lane % 4);
        there[half] = w.near[half] | w.far[half];
        largest = fmaxf(largest, blocks.near[half] >> lane & 1 ? blocks.scale[half] : 0);
    }
    uint32_t exponent = __reduce_max_sync(~0u, __float_as_uint(largest)) >> 23;
    exponent = min(max(exponent, 1u), 253u);
    float inverse = __uint_as_float((254 - exponent) << 23);
    w.scale = __uint_as_float(exponent << 23);
#pragma unroll
    for (int c = 0; c < F::SUMS; c++) {
        bool is_head = column_head<F>(c) < view.n_group;
        m[c] = -INFINITY;
        l[c] = 0;
#pragma unroll
        for (int t = 0; t < 16; t++) {
            if (!is_head || !chunk_bit(there, t / 4, t % 4) || !(w.e[c][t] < INFINITY))
                w.e[c][t] = -INFINITY;
            m[c] = fmaxf(m[c], w.e[c][t]);
        }
        m[c] = column_max(m[c]);
        float from = m[c] == -INFINITY ? 0 : m[c];
#pragma unroll
        for (int t = 0; t < 16; t++) {
            w.e[c][t] = exp_or_0(w.e[c][t] - from);
            l[c] += w.e[c][t];
        }
        l[c] = column_sum(l[c]);
    }
#pragma unroll
    for (int t = 0; t < 16; t++) {
        float scale = __shfl_sync(~0u, blocks.scale[t / 8], chunk_block(t / 4, t % 4)) * inverse;
#pragma unroll
        for (int c = 0; c < F::SUMS; c++)
            w.e[c][t] *= chunk_bit(w.near, t / 4, t % 4) ? scale : 1;
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

constexpr int ROW_BYTES = 8;        /* a lane takes of a row at once */
constexpr int SLAB = 8 * ROW_BYTES; /* dimensions that 8 lanes cover with them */

/* A warp's rows come to shared memory, slabs ahead of their use, each lane reading later what it has
 * copied itself: no register waits for them. */
template <class F> struct chunk_memory {
    static constexpr int SLOTS = F::HEADS * F::WIDTH < 2048 ? 2 : 1;

    group_memory<F> group;
    uint2 rows[GROUP][SLOTS][16][32]; /* [warp][slab % SLOTS][step, t][lane] */
};

/* Starts the loads of a lane's parts of the warp's rows, of dimensions from slab on; of 16 blocks none
 * of which is near nothing. A row that weighs nothing may be anything: bytes are finite. Up to 48
 * bytes behind a row are read. */
template <int SLOTS>
__device__ inline void chunk_rows_load(const winnow_gpu_view &view, const chunk_blocks &blocks,
                                       uint32_t slab, uint2 (&rows)[SLOTS][16][32])
{
    uint32_t to = shared_address(&rows[slab / SLAB % SLOTS][0][lane_id()]);
    const uint8_t *from = view.index + slab + lane_id() / 4 * ROW_BYTES;

#pragma unroll
    for (int step = 0; step < 4; step++) {
        if (!(blocks.near[step / 2] & 0xffffu << 16 * (step % 2)) || slab >= view.v_width)
            continue;
#pragma unroll
        for (int t = 0; t < 4; t++) {
            uint64_t row = __shfl_sync(~0u, blocks.row[step / 2], chunk_block(step, t));
            copy_start<ROW_BYTES>(to + (4 * step + t) * (uint32_t)sizeof rows[0][0],
                                  from + 16 * row);
        }
    }
    copies_group();
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
                x[t] = chunk_bit(w.near, step, t) ? w.e[c][4 * step + t] : 0;
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

/* Adds the far blocks of a warp to what a lane has of a slab, dimensions d .. d + 7: a segment after
 * the other, their summed weights times its mean value. */
template <class F>
__device__ inline void chunk_far(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                 uint32_t first, const chunk_weights<F> &w, uint32_t d,
                                 float (&y)[F::PER_LANE][ROW_BYTES])
{
    uint32_t last = min(first + CHUNK_WARP_BLOCKS, unit->n_blocks) - 1, lane = lane_id();

#pragma unroll 1
    for (uint32_t segment = first / view.span_blocks; segment * view.span_blocks <= last;
         segment++) {
        const uint8_t *mean = chunk_unit(view, unit, segment) + view.mean_v_at + 4 * d;
        uint32_t from = segment * view.span_blocks - first; /* below 0: this counts modulo 2^32 */
        float sum[F::SUMS] = {};
        float4 a = {}, b = {};
        if (d < view.v_width) {
            a = __ldg((const float4 *)mean);
            b = __ldg((const float4 *)mean + 1);
        }
#pragma unroll
        for (int t = 0; t < 16; t++) {
            bool is_in = chunk_bit(w.far, t / 4, t % 4) &&
                         chunk_block(t / 4, t % 4) - from < view.span_blocks;
#pragma unroll
            for (int c = 0; c < F::SUMS; c++)
                sum[c] += is_in ? w.e[c][t] : 0;
        }
#pragma unroll
        for (int c = 0; c < F::SUMS; c++)
            sum[c] = column_sum(sum[c]);
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++) {
            uint32_t g = lane_head<F>(lane, i);
            float x = __shfl_sync(~0u, sum[i / 2], F::HEADS == 4 ? 8 * g : g % 8 * 4);
            y[i][0] += x * a.x, y[i][1] += x * a.y, y[i][2] += x * a.z, y[i][3] += x * a.w;
            y[i][4] += x * b.x, y[i][5] += x * b.y, y[i][6] += x * b.z, y[i][7] += x * b.w;
        }
    }
}

/* A slab of the near blocks' product. */
template <class F>
__device__ inline void chunk_slab(const chunk_blocks &blocks, const chunk_operand<F> &operand,
                                  float scale, const uint2 (&rows)[16][32],
                                  float (&y)[F::PER_LANE][ROW_BYTES])
{
    constexpr int N_TILES = ROW_BYTES / 2;
    float sum[N_TILES][F::SUMS][4] = {};

#pragma unroll
    for (int step = 0; step < 4; step++) {
        uint2 row[4];
        if (!(blocks.near[step / 2] & 0xffffu << 16 * (step % 2)))
            continue;
#pragma unroll
        for (int t = 0; t < 4; t++)
            row[t] = rows[4 * step + t][lane_id()];
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
            uint4 a;
            bytes_pair(j < 2 ? row[0].x : row[0].y, j < 2 ? row[1].x : row[1].y, j % 2, &a.x, &a.y);
            bytes_pair(j < 2 ? row[2].x : row[2].y, j < 2 ? row[3].x : row[3].y, j % 2, &a.z, &a.w);
#pragma unroll
            for (int part = 0; part < F::PARTS; part++)
                mma<WINNOW_FP16>(sum[j][part / 2], a, operand.b[step][part]);
        }
    }
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                y[i][2 * j + half] =
                    scale * (F::HEADS == 4 ? sum[j][0][2 * half] + sum[j][0][2 * half + 1]
                                           : sum[j][i / 2][2 * half + i % 2]);
}

/* A warp's 64 blocks into its place of the group's memory. */
template <class F>
__device__ inline void chunk_attend(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                    uint32_t chunk, chunk_memory<F> *memory)
{
    uint32_t warp = threadIdx.x / 32, lane = lane_id();
    uint32_t first = chunk * WINNOW_GPU_CHUNK_BLOCKS + warp * CHUNK_WARP_BLOCKS;
    chunk_weights<F> w;
    float m[F::SUMS], l[F::SUMS];

    if (first >= unit->n_blocks) {
        block_absent<F>(&memory->group);
        return;
    }
    chunk_estimates<F>(view, unit, first, w);
    chunk_blocks blocks = chunk_blocks_load(view, unit, first);
#pragma unroll 1
    for (int i = 0; i < memory->SLOTS; i++)
        chunk_rows_load(view, blocks, i * SLAB, memory->rows[warp]);
    chunk_weigh<F>(view, blocks, w, m, l);
    chunk_operand<F> operand = chunk_pack<F>(w);
#pragma unroll 1
    for (uint32_t slab = 0; slab < view.v_width; slab += SLAB) {
        uint32_t d = slab + lane / 4 * ROW_BYTES;
        float y[F::PER_LANE][ROW_BYTES];
        copies_wait<memory->SLOTS - 1>();
        chunk_slab<F>(blocks, operand, w.scale, memory->rows[warp][slab / SLAB % memory->SLOTS], y);
        chunk_rows_load(view, blocks, slab + memory->SLOTS * SLAB, memory->rows[warp]);
        if (blocks.far[0] | blocks.far[1])
            chunk_far<F>(view, unit, first, w, d, y);
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++) {
            float4 *at = (float4 *)&memory->group.o[warp][lane_head<F>(lane, i)][d];
            if (d < view.v_width) {
                at[0] = {y[i][0], y[i][1], y[i][2], y[i][3]};
                at[1] = {y[i][4], y[i][5], y[i][6], y[i][7]};
            }
        }
    }
#pragma unroll
    for (int c = 0; c < F::SUMS; c++)
        if (lane % 4 == 0 && (F::HEADS != 4 || lane % 8 == 0)) {
            memory->group.m[warp][column_head<F>(c)] = m[c];
            memory->group.l[warp][column_head<F>(c)] = l[c];
        }
}
