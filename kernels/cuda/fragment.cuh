/*
 * Matrix instructions and the form of a kernel: which widths, heads and type it is compiled for.
 *
 * A warp attends a block. K and V lie in the order of operand A (kernels.h, layout 2), the query in
 * that of operand B (view.h), so that no number passes through shared memory on its way into
 *     S [16 tokens][8 columns] = K q^T        O^T [16 dimensions][8 columns] = V P^T
 * In both results lane 4 r + c holds rows r and r + 8 of columns 2c and 2c + 1. The exponentials of
 * S, packed in pairs of columns, are turned by movmatrix into operand B of the second product.
 *
 * Query and weights are split into two halves of 16 bits: an fp32 query then loses what is beyond
 * 2^-17 of it (bf16; fp16 2^-22), instead of 2^-9. Up to 4 heads the second half costs nothing: it
 * takes the columns that would be empty.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <kernels/cuda/view.h>

/* WIDTH: largest of k_width and v_width, 64, 128 or 256. HEADS: query heads, 4, 8 or 16. */
template <int WIDTH_, int HEADS_, uint32_t DTYPE_> struct form {
    static constexpr int WIDTH = WIDTH_, HEADS = HEADS_, TILES = WIDTH_ / 16;
    static constexpr uint32_t DTYPE = DTYPE_;
    static constexpr int PARTS = HEADS_ == 4 ? 1 : HEADS_ / 4; /* of q_fragment */
    static constexpr int SUMS = HEADS_ == 16 ? 2 : 1;          /* results of 8 columns */
    static constexpr int PER_LANE = HEADS_ / 4;                /* heads that a lane holds */
    /* Floats between the heads of a block's output in shared memory: writes meet no bank twice. */
    static constexpr int STRIDE = WIDTH_ + (HEADS_ == 4 ? 8 : 4);
    /* Of tail, for its registers: a thread block fits beside the scan's (tail.cu). */
    static constexpr int TAIL_THREADS = WIDTH_ <= 128 && HEADS_ <= 8 ? 320 : 256;
    static constexpr int BLOCKS_PER_SM = WIDTH_ == 256 || (WIDTH_ == 128 && HEADS_ == 16) ? 1 : 2;
};

constexpr int GROUP = WINNOW_GROUP_BLOCKS;
constexpr int ATTEND_THREADS = 32 * GROUP; /* a warp a block */
constexpr float LOG2_E = 1.4426950408889634f;
constexpr uint32_t EIO_STATUS = 5, EDOM_STATUS = 33; /* errno, as the host has it */

/* Loads that a condition guards without a branch, so that many are under way before the first is
 * used; 0 where the condition is false. Past L1: other thread blocks may have written there. */
__device__ inline uint4 load_if(bool is_wanted, const uint4 *at)
{
    uint4 x = {0, 0, 0, 0};
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0;"
                 "@p ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
                 : "l"(at), "r"((uint32_t)is_wanted));
    return x;
}

__device__ inline uint2 load_if(bool is_wanted, const uint2 *at)
{
    uint2 x = {0, 0};
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.cg.v2.u32 {%0,%1}, [%2];}"
                 : "+r"(x.x), "+r"(x.y)
                 : "l"(at), "r"((uint32_t)is_wanted));
    return x;
}

/* Copies 16 or 8 bytes to shared memory, behind the thread's back; copies are told apart by when
 * they were grouped, and waited for by how many later groups may still be under way. */
template <int N_BYTES> __device__ inline void copy_start(uint32_t to, const void *from)
{
    if constexpr (N_BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void copies_group()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N_LATER> __device__ inline void copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N_LATER) : "memory");
}

__device__ inline uint32_t shared_address(const void *at)
{
    return (uint32_t)__cvta_generic_to_shared(at);
}

/* A word that this launch's earlier kernels wrote, or (IS_SHARED) other thread blocks of this one. */
template <bool IS_SHARED, class T> __device__ inline T load(const T *at)
{
    if constexpr (IS_SHARED)
        return __ldcg(at);
    else
        return *at;
}

__device__ inline uint32_t lane_id()
{
    return threadIdx.x % 32;
}

/* A unit's query heads as operand B. */
template <class F>
__device__ inline const uint2 *unit_queries(const winnow_gpu_view &view, uint32_t unit_idx)
{
    uint32_t n_words = view.k_width / 16 * F::PARTS * 64; /* as winnow_gpu_q_fragment_words */
    return (const uint2 *)(view.q_fragment + (uint64_t)unit_idx * n_words);
}

/* The head that a lane's i-th value belongs to. */
template <class F> __device__ inline uint32_t lane_head(uint32_t lane, int i)
{
    return F::HEADS == 4 ? lane % 4 : 8 * (i / 2) + 2 * (lane % 4) + i % 2;
}

/* d += A x B, 16 x 8 x 16. */
template <uint32_t DTYPE> __device__ inline void mma(float (&d)[4], const uint4 &a, const uint2 &b)
{
    if constexpr (DTYPE == WINNOW_BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

/* 8 x 8 of 16 bits, turned: lane 4 r + c gives (r, 2c), (r, 2c + 1) and gets (2c, r), (2c + 1, r). */
__device__ inline uint32_t turn(uint32_t x)
{
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Two numbers as 16 bits each, x in the low half of the word. */
template <uint32_t DTYPE> __device__ inline uint32_t pack(float x, float y)
{
    uint32_t word;
    if constexpr (DTYPE == WINNOW_BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
    return word;
}

/* What rounding x to 16 bits loses. */
template <uint32_t DTYPE> __device__ inline float rest_of(float x)
{
    if constexpr (DTYPE == WINNOW_BF16)
        return x - __bfloat162float(__float2bfloat16_rn(x));
    else
        return x - __half2float(__float2half_rn(x));
}

/* exp(x), but 0 below -80 and for -inf, as in ref: nothing subnormal is left for exp2f to care for. */
__device__ inline float exp_or_0(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * LOG2_E));
    return x < -80.0f ? 0.0f : y;
}
