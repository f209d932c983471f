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

/* Where the means of a warp's 64 blocks are: they may begin anywhere in a segment. */
struct chunk_place {
    const uint8_t *index; /* of layer and head, in segment slot 0 */
    const uint32_t *segment_slot;
    uint64_t segment_bytes;
    uint32_t span_blocks, segment, block; /* of the first block */
};

__device__ inline const uint8_t *chunk_segment(const chunk_place &place, uint32_t segment)
{
    return place.index + __ldg(place.segment_slot + segment) * place.segment_bytes;
}

/* Segment of the i-th block; *block is its number there. */
__device__ inline uint32_t chunk_locate(const chunk_place &place, uint32_t i, uint32_t *block)
{
    uint32_t segment = place.segment, b = place.block + i;

    for (; b >= place.span_blocks; b -= place.span_blocks)
        segment++;
    *block = b;
    return segment;
}

__device__ inline chunk_place chunk_place_init(const winnow_gpu_view &view,
                                               const winnow_gpu_unit *unit, uint32_t first)
{
    uint32_t session = view.launch->item[unit->item].session;
    chunk_place place;

    place.index =
        view.index + (uint64_t)(unit->layer * view.n_kv_heads + unit->head) * view.unit_bytes;
    place.segment_slot = view.session_segments + (uint64_t)session * view.n_session_segments_max;
    place.segment_bytes = view.segment_bytes;
    place.span_blocks = view.span_blocks;
    place.segment = first / view.span_blocks;
    place.block = first % view.span_blocks;
    return place;
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

/* A lane's 16 blocks. */
template <class F> struct chunk_weights {
    float e[F::SUMS][16]; /* 0: not compensated */
    float scale[16];      /* of the mean; 0: not near */
    uint32_t near, far;   /* bit a block */
};

template <class F>
__device__ inline void chunk_weigh(const winnow_gpu_view &view, const winnow_gpu_unit *unit,
                                   uint32_t first, chunk_weights<F> &w, float (&m)[F::SUMS],
                                   float (&l)[F::SUMS])
{
    float near_key = __ldcg(&unit->key_threshold) - NATS_NEAR;
    uint32_t n = unit->n_blocks > first ? unit->n_blocks - first : 0;
    uint64_t at = (uint64_t)unit->block_first + first;

    w.near = w.far = 0;
#pragma unroll
    for (int t = 0; t < 16; t++) {
        uint32_t i = chunk_block(t / 4, t % 4);
        bool is_there = i < n && !__ldcg(view.selected + at + i);
        if (is_there)
            (__ldg(view.key + at + i) < near_key ? w.far : w.near) |= 1u << t;
#pragma unroll
        for (int c = 0; c < F::SUMS; c++) {
            uint32_t g = column_head<F>(c);
            w.e[c][t] = -INFINITY;
            if (is_there && g < view.n_group)
                w.e[c][t] = __ldg(view.ln_e + (at + i) * view.n_group + g);
            if (!(w.e[c][t] < INFINITY))
                w.e[c][t] = -INFINITY;
        }
    }
#pragma unroll
    for (int c = 0; c < F::SUMS; c++) {
        m[c] = -INFINITY;
        l[c] = 0;
#pragma unroll
        for (int t = 0; t < 16; t++)
            m[c] = fmaxf(m[c], w.e[c][t]);
        m[c] = column_max(m[c]);
#pragma unroll
        for (int t = 0; t < 16; t++) {
            w.e[c][t] = m[c] == -INFINITY ? 0 : exp_or_0(w.e[c][t] - m[c]);
            l[c] += w.e[c][t];
        }
        l[c] = column_sum(l[c]);
    }
}

/* Fills scale; returns a power of 2 near the largest. */
template <class F>
__device__ inline float chunk_scales(const winnow_gpu_view &view, const chunk_place &place,
                                     chunk_weights<F> &w)
{
    float largest = 0;

#pragma unroll
    for (int t = 0; t < 16; t++) {
        w.scale[t] = 0;
        if (!(w.near >> t & 1))
            continue;
        uint32_t b, segment = chunk_locate(place, chunk_block(t / 4, t % 4), &b);
        w.scale[t] =
            __ldg((const float *)(chunk_segment(place, segment) + view.vmean_scale_at) + b);
        largest = fmaxf(largest, w.scale[t]);
    }
    for (int offset = 1; offset < 32; offset *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    uint32_t exponent = __float_as_uint(largest) >> 23;
    return __uint_as_float(min(max(exponent, 1u), 253u) << 23);
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

/* A lane's part of the row of block t of step; 0 where nothing is near. */
template <class F>
__device__ inline void chunk_row(const winnow_gpu_view &view, const chunk_place &place,
                                 const chunk_weights<F> &w, int step, int t, uint32_t d,
                                 uint32_t (&word)[ROW_BYTES<F> / 4])
{
#pragma unroll
    for (int i = 0; i < ROW_BYTES<F> / 4; i++)
        word[i] = 0;
    if (!(w.near >> (4 * step + t) & 1) || d >= view.v_width)
        return;
    uint32_t b, segment = chunk_locate(place, chunk_block(step, t), &b);
    const uint8_t *row =
        chunk_segment(place, segment) + view.vmean_at + (uint64_t)b * view.v_width + d;
    if constexpr (ROW_BYTES<F> == 16) {
        uint4 x = __ldg((const uint4 *)row);
        word[0] = x.x;
        word[1] = x.y;
        word[2] = x.z;
        word[3] = x.w;
    } else {
        uint2 x = __ldg((const uint2 *)row);
        word[0] = x.x;
        word[1] = x.y;
    }
}

/* The near blocks: o [heads][STRIDE], all dimensions from slab_first on for a slab. */
template <class F>
__device__ inline void chunk_slab(const winnow_gpu_view &view, const chunk_place &place,
                                  const chunk_weights<F> &w, float scale, uint32_t slab_first,
                                  float (*o)[F::STRIDE])
{
    constexpr int N_TILES = ROW_BYTES<F> / 2;
    uint32_t lane = lane_id(), d = slab_first + lane / 4 * ROW_BYTES<F>;
    float sum[N_TILES][F::SUMS][4] = {};

#pragma unroll
    for (int step = 0; step < 4; step++) {
        uint32_t row[4][ROW_BYTES<F> / 4];
        uint2 b[F::PARTS];
#pragma unroll
        for (int t = 0; t < 4; t++)
            chunk_row<F>(view, place, w, step, t, d, row[t]);
#pragma unroll
        for (int c = 0; c < F::SUMS; c++) {
            float x[4];
#pragma unroll
            for (int t = 0; t < 4; t++)
                x[t] = w.e[c][4 * step + t] * (w.scale[4 * step + t] / scale);
            if constexpr (F::HEADS == 4) {
#pragma unroll
                for (int t = 0; t < 4; t++)
                    x[t] = lane / 4 % 2 ? rest_of<WINNOW_FP16>(x[t]) : x[t];
                b[0] = make_uint2(pack<WINNOW_FP16>(x[0], x[1]), pack<WINNOW_FP16>(x[2], x[3]));
            } else {
                b[2 * c] = make_uint2(pack<WINNOW_FP16>(x[0], x[1]), pack<WINNOW_FP16>(x[2], x[3]));
#pragma unroll
                for (int t = 0; t < 4; t++)
                    x[t] = rest_of<WINNOW_FP16>(x[t]);
                b[2 * c + 1] =
                    make_uint2(pack<WINNOW_FP16>(x[0], x[1]), pack<WINNOW_FP16>(x[2], x[3]));
            }
        }
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
            uint4 a;
            bytes_pair(row[0][j / 2], row[1][j / 2], j % 2, &a.x, &a.y);
            bytes_pair(row[2][j / 2], row[3][j / 2], j % 2, &a.z, &a.w);
#pragma unroll
            for (int part = 0; part < F::PARTS; part++)
                mma<WINNOW_FP16>(sum[j][part / 2], a, b[part]);
        }
    }
    if (d >= view.v_width)
        return;
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
#pragma unroll
        for (int i = 0; i < F::PER_LANE; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float y = F::HEADS == 4 ? sum[j][0][2 * half] + sum[j][0][2 * half + 1]
                                        : sum[j][i / 2][2 * half + i % 2];
                o[lane_head<F>(lane, i)][d + 2 * j + half] = scale * y;
            }
}

/* The far blocks: their summed weights times the segment's mean value, a segment after the other. */
template <class F>
__device__ inline void chunk_far(const winnow_gpu_view &view, const chunk_place &place,
                                 const chunk_weights<F> &w, float (*o)[F::STRIDE])
{
    uint32_t last_block, last = chunk_locate(place, CHUNK_WARP_BLOCKS - 1, &last_block);

    for (uint32_t segment = place.segment; segment <= last; segment++) {
        float sum[F::SUMS] = {};
        bool is_any = false;
#pragma unroll
        for (int t = 0; t < 16; t++) {
            uint32_t b;
            if (!(w.far >> t & 1) || chunk_locate(place, chunk_block(t / 4, t % 4), &b) != segment)
                continue;
            is_any = true;
#pragma unroll
            for (int c = 0; c < F::SUMS; c++)
                sum[c] += w.e[c][t];
        }
        if (!__any_sync(~0u, is_any))
            continue;
#pragma unroll
        for (int c = 0; c < F::SUMS; c++)
            sum[c] = column_sum(sum[c]);
        const float *mean = (const float *)(chunk_segment(place, segment) + view.mean_v_at);
        for (uint32_t g = 0; g < view.n_group; g++) {
            float of_column = g < 8 ? sum[0] : sum[F::SUMS - 1];
            float x = __shfl_sync(~0u, of_column, F::HEADS == 4 ? 8 * g : g % 8 * 4);
            for (uint32_t d = lane_id(); d < view.v_width; d += 32)
                o[g][d] += x * __ldg(mean + d);
        }
    }
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
    chunk_place place = chunk_place_init(view, unit, first);
    chunk_weigh<F>(view, unit, first, w, m, l);
    float scale = chunk_scales<F>(view, place, w);
    for (uint32_t d = 0; d < view.v_width; d += SLAB<F>)
        chunk_slab<F>(view, place, w, scale, d, memory->o[warp]);
    __syncwarp();
    if (__any_sync(~0u, w.far != 0))
        chunk_far<F>(view, place, w, memory->o[warp]);
#pragma unroll
    for (int c = 0; c < F::SUMS; c++)
        if (lane % 4 == 0 && (F::HEADS != 4 || lane % 8 == 0)) {
            memory->m[warp][column_head<F>(c)] = m[c];
            memory->l[warp][column_head<F>(c)] = l[c];
        }
}
