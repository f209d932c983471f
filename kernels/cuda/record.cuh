/*
 * A record of 8 blocks: its way into shared memory, and ln_e of its blocks.
 */
#pragma once

#include <kernels/cuda/query.cuh>

namespace
{

constexpr uint32_t RECORD_BLOCKS = 8;

__device__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ float log2_approx(float x)
{
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ void mma_codes(int (&c)[4], const uint32_t (&a)[4], uint2 b)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

/* Eight rows: the other eight are zero. */
__device__ void mma_centroids(int (&c)[4], uint32_t a0, uint32_t a2, uint2 b)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b.x), "r"(b.y));
}

__device__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

#if __CUDA_ARCH__ >= 900
__device__ void barrier_init(uint64_t *barrier)
{
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ void record_load(uint8_t *slot, const uint8_t *record, uint32_t n_bytes,
                            uint64_t *barrier)
{
    if (threadIdx.x % 32)
        return;
    uint64_t once; /* the index is read once a step: leave the L2 to what is read again */
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(n_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(slot)),
                 "l"(record), "r"(n_bytes), "r"(shared_address(barrier)), "l"(once)
                 : "memory");
}

__device__ void record_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n.reg .pred p;\nwait:\n"
                 "mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                 "@!p bra wait;\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}
#else
__device__ void barrier_init(uint64_t *)
{
}

__device__ void record_load(uint8_t *slot, const uint8_t *record, uint32_t n_bytes, uint64_t *)
{
    for (uint32_t at = threadIdx.x % 32 * 16; at < n_bytes; at += 32 * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot + at)),
                     "l"(record + at)
                     : "memory");
}

__device__ void record_wait(uint64_t *, uint32_t) /* one slot a warp: all of it */
{
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
}
#endif

/* Of one block and n-tile: this lane's keys lane / 4 and + 8 of head lane % 4, logits to base 2
 * without the centroid's part. */
template <int KT>
__device__ void block_logits(const uint8_t *code, const uint8_t *scales, const uint2 (&b)[2 * KT],
                             int4 start, float factor, float *x0, float *x1)
{
    uint32_t lane = threadIdx.x % 32;
    int low[4] = {start.x, start.y, start.x, start.y};
    int high[4] = {start.z, start.w, start.z, start.w};

#pragma unroll
    for (int j = 0; j < KT; j++) {
        uint4 word = ((const uint4 *)code)[j * 32 + lane];
        uint32_t n[4] = {word.x & 0x0f0f0f0f, word.y & 0x0f0f0f0f, word.z & 0x0f0f0f0f,
                         word.w & 0x0f0f0f0f};
        uint32_t n16[4] = {word.x & 0xf0f0f0f0, word.y & 0xf0f0f0f0, word.z & 0xf0f0f0f0,
                           word.w & 0xf0f0f0f0};
        mma_codes(low, n, b[2 * j]);
        mma_codes(high, n16, b[2 * j + 1]);
    }
    float2 a = __half22float2(((const __half2 *)scales)[lane / 4]);
    int dot0 = (low[0] * 16 + high[0]) * 128 + (low[1] * 16 + high[1]); /* 16 q.c */
    int dot1 = (low[2] * 16 + high[2]) * 128 + (low[3] * 16 + high[3]);
    *x0 = __fmul_rn(__fmul_rn(a.x, factor), __int2float_rn(dot0));
    *x1 = __fmul_rn(__fmul_rn(a.y, factor), __int2float_rn(dot1));
}

/* s q.mu to base 2 of block lane / 4 and head lane % 4. */
template <int KT>
__device__ float record_base(uint32_t width, const uint8_t *centroids, const uint8_t *scales,
                             const uint2 (&query)[2][2 * KT][32], float factor)
{
    uint32_t lane = threadIdx.x % 32;
    const uint8_t *row = centroids + lane / 4 * width;
    int dot[2][4] = {};

#pragma unroll
    for (int m = 0; m < KT; m++) {
        uint32_t at = 64 * m + lane % 4 * 16;
        uint4 word = at < width ? *(const uint4 *)(row + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            mma_centroids(dot[tile], word.x, word.y, query[tile][2 * m][lane]);
            mma_centroids(dot[tile], word.z, word.w, query[tile][2 * m + 1][lane]);
        }
    }
    float high = __int2float_rn(dot[0][0] * 128 + dot[0][1]);
    float low = __int2float_rn(dot[1][0] * 128 + dot[1][1]);
    float sum = __fmul_rn(__fmaf_rn(high, 16384.0f, low), 0x1p-26f);
    return __fmul_rn(__fmul_rn(sum, ((const float *)scales)[lane / 4]), factor);
}

/* part[b] summed over the 8 lanes of a head, for the block b = lane / 4. */
__device__ float transposing_sum(float (&part)[8])
{
    uint32_t lane = threadIdx.x % 32;

#pragma unroll
    for (int n = 4; n; n >>= 1)
#pragma unroll
        for (int i = 0; i < n; i++) {
            bool is_upper = lane & 4 * n;
            float keep = is_upper ? part[i + n] : part[i];
            float give = is_upper ? part[i] : part[i + n];
            part[i] = __fadd_rn(keep, __shfl_xor_sync(~0u, give, 4 * n));
        }
    return part[0];
}

/* log2 of a block's sum where 2^x leaves fp32's range: relative to the block's largest. */
template <int KT>
__device__ __noinline__ float record_rescue(const uint8_t *record, uint32_t width,
                                            const uint2 (&b)[2 * KT], int4 start, float factor)
{
    const uint8_t *scales = record + RECORD_BLOCKS * (512 * KT + width);
    uint32_t lane = threadIdx.x % 32;
    float result = 0;

    for (uint32_t i = 0; i < RECORD_BLOCKS; i++) {
        float x0, x1, m, sum;
        block_logits<KT>(record + i * 512 * KT, scales + i * 32, b, start, factor, &x0, &x1);
        m = fmaxf(x0, x1);
        for (int at = 4; at < 32; at <<= 1)
            m = fmaxf(m, __shfl_xor_sync(~0u, m, at));
        sum = __fadd_rn(exp2_approx(__fsub_rn(x0, m)), exp2_approx(__fsub_rn(x1, m)));
        for (int at = 16; at >= 4; at >>= 1)
            sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, at));
        if (lane / 4 == i)
            result = __fadd_rn(m, log2_approx(sum));
    }
    return result;
}

/* ln_e of the 8 blocks and 4 heads of one n-tile: of block lane / 4 and head lane % 4. */
template <int KT, int NT>
__device__ float record_score(const uint8_t *record, uint32_t width,
                              const query_operands<KT, NT> &query, int tile)
{
    const uint8_t *centroids = record + RECORD_BLOCKS * 512 * KT;
    const uint8_t *scales = centroids + RECORD_BLOCKS * width;
    uint32_t lane = threadIdx.x % 32;
    int4 start = query.start[tile][lane % 4];
    float2 factor = query.factor[tile][lane % 4];
    uint2 b[2 * KT];
    float part[8];

#pragma unroll
    for (int j = 0; j < 2 * KT; j++)
        b[j] = query.code[tile][j][lane];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float x0, x1;
        block_logits<KT>(record + i * 512 * KT, scales + i * 32, b, start, factor.x, &x0, &x1);
        part[i] = __fadd_rn(exp2_approx(x0), exp2_approx(x1));
    }
    float sum = transposing_sum(part), log2_sum = log2_approx(sum);
    bool is_out = !(sum > 0x1p-80f && sum < 0x1p126f);
    if (__any_sync(~0u, is_out)) {
        float rescued = record_rescue<KT>(record, width, b, start, factor.x);
        log2_sum = is_out ? rescued : log2_sum;
    }
    float base = record_base<KT>(width, centroids, scales + RECORD_BLOCKS * 32,
                                 query.centroid[tile], factor.y);
    float y = __fmul_rn(__fadd_rn(base, log2_sum), LN_2);
    return isfinite(y) ? y : NAN;
}

} // namespace
