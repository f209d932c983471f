/*
 * Attention of a part: flash attention on the blocks' own layout.
 *
 * A tile of K in the order of operand A (kernels.h, layout 2) is two operands B of
 *     S [16 rows][8 tokens] = Q K^T,      a tile of V two of      O [16 rows][8 dimensions] = P V
 * words x, z of a lane the one, y, w the other: blocks go to shared memory as they lie, are loaded
 * from there 512 contiguous bytes at a time and feed mma with nothing between. S's registers, packed,
 * are operand A of the second product.
 *
 * A thread block has a tile of rows of one head and walks the part's blocks in order, BLOCKS at a
 * step, the next step's copied while it computes. Sums and outputs go on where the part before left
 * them, in the same order: where a part ends is in no bit of the result.
 *
 * P is rounded to the blocks' type; fp16's is scaled by 2^15 first, so that what is small beside the
 * largest does not fall out of its range.
 */
#include <float.h>
#include <kernels/cuda/forms.cuh>
#include <kernels/cuda/window.h>

namespace
{

/* WIDTH: largest of k_width and v_width; IS_FULL: both are it, which makes loops constant (293 instead
 * of 235 TFLOP/s). PARTS: of a query. Shared memory is 96 KiB at most: two thread blocks a
 * multiprocessor. */
template <int WIDTH_, bool IS_FULL_, int PARTS_, uint32_t DTYPE_> struct window_form {
    static constexpr bool IS_FULL = IS_FULL_;
    static constexpr int WIDTH = WIDTH_, PARTS = PARTS_, TILES = WIDTH_ / 16;
    static constexpr uint32_t DTYPE = DTYPE_;
    static constexpr int ROW_TILES = WIDTH_ == 256 ? 1 : 2; /* of a warp */
    static constexpr int BLOCKS = WIDTH_ * PARTS_ <= 128 ? 4 : WIDTH_ * PARTS_ <= 256 ? 2 : 1;
    static constexpr int N8 = 2 * BLOCKS; /* operands B of a step */
    static constexpr float SHIFT = DTYPE_ == WINNOW_FP16 ? 15 : 0;
};

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr float LN_2 = 0.6931471805599453f;

__device__ float exp_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* What a thread keeps: of row tile i rows r and r + 8 (half): largest logit in powers of 2, its own
 * part of the sum, outputs. */
template <class F> struct window_state {
    float m[F::ROW_TILES][2], l[F::ROW_TILES][2];
    float o[F::ROW_TILES][2 * F::TILES][4];
};

template <class F> struct window_tile {
    const winnow_gpu_window_view &view;
    const winnow_gpu_window_launch &part;
    uint32_t head, tile;
    uint32_t n_k, n_v; /* tiles of a block */
    uint64_t row;      /* first */

    __device__ window_tile(const winnow_gpu_window_view &view_,
                           const winnow_gpu_window_launch &part_)
        : view(view_), part(part_), head(blockIdx.y), tile(blockIdx.x),
          n_k(F::IS_FULL ? F::TILES : view_.k_width / 16),
          n_v(F::IS_FULL ? F::TILES : view_.v_width / 16)
    {
        row = (uint64_t)head * view.n_rows_max + tile * ROWS;
    }
    static constexpr uint32_t ROWS = WARPS * 16 * F::ROW_TILES;
    __device__ uint32_t row_of(int i, int half) const /* of the tile */
    {
        return (threadIdx.x / 32 * F::ROW_TILES + i) * 16 + lane_id() / 4 + 8 * half;
    }
    __device__ float4 *sums() const
    {
        return view.sum + row / 16 / F::ROW_TILES / WARPS * F::ROW_TILES * THREADS + threadIdx.x;
    }
    __device__ float4 *outputs() const
    {
        return view.output + row * F::WIDTH / 4 + threadIdx.x;
    }
};

template <class F> __device__ void state_load(const window_tile<F> &tile, window_state<F> &state)
{
    bool is_there = !tile.part.is_first;

#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++) {
        float4 x = {-INFINITY, 0, -INFINITY, 0};
        if (is_there)
            x = tile.sums()[i * THREADS];
        state.m[i][0] = x.x;
        state.l[i][0] = x.y;
        state.m[i][1] = x.z;
        state.l[i][1] = x.w;
#pragma unroll
        for (int n = 0; n < 2 * F::TILES; n++) {
            float4 y = {0, 0, 0, 0};
            if (is_there && n < 2 * tile.n_v)
                y = tile.outputs()[(i * 2 * F::TILES + n) * THREADS];
            state.o[i][n][0] = y.x;
            state.o[i][n][1] = y.y;
            state.o[i][n][2] = y.z;
            state.o[i][n][3] = y.w;
        }
    }
}

template <class F>
__device__ void state_store(const window_tile<F> &tile, const window_state<F> &state)
{
#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++) {
        tile.sums()[i * THREADS] =
            make_float4(state.m[i][0], state.l[i][0], state.m[i][1], state.l[i][1]);
#pragma unroll
        for (int n = 0; n < 2 * F::TILES; n++)
            if (n < 2 * tile.n_v)
                tile.outputs()[(i * 2 * F::TILES + n) * THREADS] = make_float4(
                    state.o[i][n][0], state.o[i][n][1], state.o[i][n][2], state.o[i][n][3]);
    }
}

/* The result, a row after the other, in the place of the outputs: all have been loaded. */
template <class F>
__device__ void state_finish(const window_tile<F> &tile, const window_state<F> &state)
{
#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float l = state.l[i][half];
            uint64_t row = tile.row + tile.row_of(i, half);
            float *out = (float *)tile.view.output + row * F::WIDTH + 2 * (lane_id() % 4);
            l += __shfl_xor_sync(~0u, l, 1);
            l += __shfl_xor_sync(~0u, l, 2);
            if (lane_id() % 4 == 0)
                tile.view.lse[row] =
                    l > 0 ? (state.m[i][half] - F::SHIFT) * LN_2 + logf(l) : -INFINITY;
            float scale = l > 0 ? 1 / l : 0;
#pragma unroll
            for (int n = 0; n < 2 * F::TILES; n++)
                if (n < 2 * tile.n_v)
                    *(float2 *)(out + 8 * n) = make_float2(state.o[i][n][2 * half] * scale,
                                                           state.o[i][n][2 * half + 1] * scale);
        }
}

/*
 * Copies to shared memory, behind the threads' back: of whole steps by the bulk engine where there is
 * one (301 instead of 282 TFLOP/s), told by a barrier a buffer, else by each thread its pieces.
 */
struct copier {
    uint32_t barrier; /* two of 8 bytes, in shared memory */

    __device__ void begin(void *barriers)
    {
        barrier = shared_address(barriers);
#if __CUDA_ARCH__ >= 900
        for (int i = 0; i < 2 && threadIdx.x == 0; i++)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncthreads();
#endif
    }
    /* n words will come to buffer idx; by all, before they are copied. */
    __device__ void expect(uint32_t idx, uint32_t n)
    {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0)
            asm volatile(
                "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier + 8 * idx),
                "r"(16 * n)
                : "memory");
#endif
    }
    __device__ void copy(uint32_t idx, uint4 *to, const uint4 *from, uint32_t n)
    {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                         "[%1], %2, [%3];" ::"r"(shared_address(to)),
                         "l"(from), "r"(16 * n), "r"(barrier + 8 * idx)
                         : "memory");
#else
        for (uint32_t i = threadIdx.x; i < n; i += THREADS)
            copy_start<16>(shared_address(to + i), from + i);
        copies_group();
#endif
    }
    /* What was copied to the buffer for the step is there: the thread's own pieces, or all. */
    __device__ void wait(uint32_t step)
    {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p;\n"
                     "AGAIN%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                     "@!p bra AGAIN%=;}" ::"r"(barrier + 8 * (step % 2)),
                     "r"(step / 2 % 2)
                     : "memory");
#else
        copies_wait<0>();
#endif
    }
};

/* Step `step` of the part's blocks, as they lie, to its buffer; n_more words come there too. */
template <class F>
__device__ void step_copy(const window_tile<F> &tile, copier &copies, uint32_t step, uint4 *block,
                          uint32_t n_more)
{
    uint32_t n_block = (tile.n_k + tile.n_v) * 32, n = F::BLOCKS * n_block;
    const uint4 *from = tile.view.stage[tile.part.stage_idx].block +
                        ((uint64_t)tile.head * tile.view.n_blocks_max + step * F::BLOCKS) * n_block;

    copies.expect(step % 2, n + n_more);
    copies.copy(step % 2, block + step % 2 * n, from, n);
}

template <class F>
__device__ void step_products(const window_tile<F> &tile, const uint4 *query, const uint4 *block,
                              float (&s)[F::ROW_TILES][F::N8][4])
{
    const uint4 *q = query + threadIdx.x / 32 * F::ROW_TILES * F::PARTS * tile.n_k * 32 + lane_id();
    const uint4 *k = block + lane_id();
    uint32_t block_words = (tile.n_k + tile.n_v) * 32;

#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
        for (int n = 0; n < F::N8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][n][e] = 0;
#pragma unroll
    for (int j = 0; j < F::TILES; j++) {
        if (j >= tile.n_k)
            break;
        uint4 a[F::ROW_TILES][F::PARTS];
#pragma unroll
        for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
            for (int part = 0; part < F::PARTS; part++)
                a[i][part] = q[((i * F::PARTS + part) * tile.n_k + j) * 32];
#pragma unroll
        for (int b = 0; b < F::BLOCKS; b++) {
            uint4 x = k[b * block_words + j * 32];
#pragma unroll
            for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
                for (int part = 0; part < F::PARTS; part++) {
                    mma<F::DTYPE>(s[i][2 * b], a[i][part], make_uint2(x.x, x.z));
                    mma<F::DTYPE>(s[i][2 * b + 1], a[i][part], make_uint2(x.y, x.w));
                }
        }
    }
}

/* Products to logits as kernels.h has them: none beyond fp32. */
template <class F>
__device__ void step_clamp(const float (&scale)[F::ROW_TILES][2],
                           float (&s)[F::ROW_TILES][F::N8][4])
{
#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
        for (int n = 0; n < F::N8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][n][e] = fminf(fmaxf(scale[i][e / 2] * s[i][n][e], -FLT_MAX), FLT_MAX);
}

/* Tokens that a row's query does not see, and those that are not there. */
template <class F>
__device__ void step_mask(const window_tile<F> &tile, uint32_t step,
                          float (&s)[F::ROW_TILES][F::N8][4])
{
    const winnow_gpu_window_list &list = tile.view.stage[tile.part.stage_idx].list;

#pragma unroll
    for (int b = 0; b < F::BLOCKS; b++) {
        uint64_t position = list.position[step * F::BLOCKS + b];
        uint32_t n_tokens = list.n_tokens[step * F::BLOCKS + b];
#pragma unroll
        for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t row = tile.tile * tile.ROWS + tile.row_of(i, half);
                uint64_t at = tile.part.first + row / tile.view.n_group;
                uint32_t n =
                    at < position ? 0 : (uint32_t)min(at - position + 1, (uint64_t)n_tokens);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    uint32_t t = 8 * (e / 2) + 2 * (lane_id() % 4) + e % 2;
                    float &x = s[i][2 * b + e / 2][2 * half + e % 2];
                    x = t < n ? x : -INFINITY;
                }
            }
    }
}

/* Logits, s times scale, to weights; the state's sums with them, and its outputs where a largest
 * logit rose. False: one is not finite, or so large that the largest, rounded, is far from what it
 * stands for; the state is as before, s is spoilt. Never where is_clamped: s are logits then. */
template <class F>
__device__ bool step_weights(const float (&scale)[F::ROW_TILES][2], bool is_clamped,
                             float (&s)[F::ROW_TILES][F::N8][4], window_state<F> &state)
{
    float m[F::ROW_TILES][2], l[F::ROW_TILES][2];
    bool is_exact = true, is_more = false;

#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float by = is_clamped ? 1 : scale[i][half], largest = -INFINITY, sum = 0;
#pragma unroll
            for (int n = 0; n < F::N8; n++)
                largest = fmaxf(largest, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            largest *= by;
            m[i][half] = fmaxf(state.m[i][half], largest);
            float from = m[i][half] == -INFINITY ? 0 : m[i][half];
            if (is_clamped) { /* SHIFT would be lost beside it */
#pragma unroll
                for (int n = 0; n < F::N8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        s[i][n][2 * half + e] -= from;
                from = 0;
            }
            from -= F::SHIFT;
#pragma unroll
            for (int n = 0; n < F::N8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[i][n][2 * half + e];
                    x = exp_2(fmaf(x, by, -from));
                    sum += x;
                }
            l[i][half] = sum;
            is_exact &= sum < INFINITY && fabsf(largest) < 0x1p22f;
            is_more |= m[i][half] != state.m[i][half];
        }
    if (!is_clamped && !__all_sync(~0u, is_exact))
        return false;
    is_more = __any_sync(~0u, is_more);
#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float shrink = 1;
            if (m[i][half] != state.m[i][half])
                shrink = exp_2(state.m[i][half] - m[i][half]);
            state.l[i][half] = state.l[i][half] * shrink + l[i][half];
            state.m[i][half] = m[i][half];
#pragma unroll
            for (int n = 0; n < 2 * F::TILES; n++)
                if (is_more) {
                    state.o[i][n][2 * half] *= shrink;
                    state.o[i][n][2 * half + 1] *= shrink;
                }
        }
    return true;
}

template <class F>
__device__ void step_outputs(const window_tile<F> &tile, const uint4 *block,
                             const float (&p)[F::ROW_TILES][F::N8][4], window_state<F> &state)
{
    uint32_t block_words = (tile.n_k + tile.n_v) * 32;

#pragma unroll
    for (int b = 0; b < F::BLOCKS; b++) {
        const uint4 *v = block + b * block_words + tile.n_k * 32 + lane_id();
        uint4 a[F::ROW_TILES];
#pragma unroll
        for (int i = 0; i < F::ROW_TILES; i++) {
            const float(&x)[4] = p[i][2 * b], (&y)[4] = p[i][2 * b + 1];
            a[i] = make_uint4(pack<F::DTYPE>(x[0], x[1]), pack<F::DTYPE>(x[2], x[3]),
                              pack<F::DTYPE>(y[0], y[1]), pack<F::DTYPE>(y[2], y[3]));
        }
#pragma unroll
        for (int j = 0; j < F::TILES; j++) {
            if (j >= tile.n_v)
                break;
            uint4 x = v[j * 32];
#pragma unroll
            for (int i = 0; i < F::ROW_TILES; i++) {
                mma<F::DTYPE>(state.o[i][2 * j], a[i], make_uint2(x.x, x.z));
                mma<F::DTYPE>(state.o[i][2 * j + 1], a[i], make_uint2(x.y, x.w));
            }
        }
    }
}

/* Steps that some row of the tile sees, and those from which on some row may not see all. */
template <class F>
__device__ void steps_of(const window_tile<F> &tile, uint32_t &n_steps, uint32_t &n_clear)
{
    const winnow_gpu_window_list &list = tile.view.stage[tile.part.stage_idx].list;
    uint32_t row_last = min((tile.tile + 1) * tile.ROWS, tile.part.n_rows) - 1;
    uint64_t first = tile.part.first + tile.tile * tile.ROWS / tile.view.n_group,
             last = tile.part.first + row_last / tile.view.n_group;

    n_steps = n_clear = (list.n_blocks[tile.head] + F::BLOCKS - 1) / F::BLOCKS;
    if (!tile.part.has_positions)
        return;
    while (n_steps > 0 && list.position[(n_steps - 1) * F::BLOCKS] > last)
        n_steps--;
    n_clear = min(n_clear, n_steps);
    for (; n_clear > 0; n_clear--) {
        uint32_t b = n_clear * F::BLOCKS - 1;
        if (list.n_tokens[b] == WINNOW_BLOCK_TOKENS && list.position[b] + 15 <= first)
            break;
    }
}

template <class F>
__global__ void __launch_bounds__(THREADS, 2)
    attend_window(const __grid_constant__ winnow_gpu_window_view view,
                  const __grid_constant__ winnow_gpu_window_launch part)
{
    extern __shared__ uint4 memory[];
    window_tile<F> tile(view, part);
    window_state<F> state;
    uint32_t n_query = WARPS * F::ROW_TILES * F::PARTS * tile.n_k * 32;
    uint32_t n_step = F::BLOCKS * (tile.n_k + tile.n_v) * 32, n_steps, n_clear;
    uint4 *query = memory, *block = query + n_query;
    float scale[F::ROW_TILES][2];
    copier copies;

    copies.begin(block + 2 * n_step);
    steps_of(tile, n_steps, n_clear);
    if (n_steps > 0) {
        step_copy(tile, copies, 0, block, n_query);
        copies.copy(0, query, view.query + tile.row / 16 * F::PARTS * tile.n_k * 32, n_query);
    }
    state_load(tile, state);
#pragma unroll
    for (int i = 0; i < F::ROW_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            scale[i][half] = view.row_scale[tile.row + tile.row_of(i, half)];
#pragma unroll 1
    for (uint32_t step = 0; step < n_steps; step++) {
        float s[F::ROW_TILES][F::N8][4];
        const uint4 *from = block + step % 2 * n_step;
        copies.wait(step);
        __syncthreads(); /* all pieces; and the other buffer is free */
        if (step + 1 < n_steps)
            step_copy(tile, copies, step + 1, block, 0);
        bool is_clamped = false, is_done;
#pragma unroll 1
        do {
            step_products(tile, query, from, s);
            if (is_clamped)
                step_clamp<F>(scale, s);
            if (step >= n_clear)
                step_mask(tile, step, s);
            is_done = step_weights(scale, is_clamped, s, state);
            is_clamped = true;
        } while (!is_done);
        step_outputs(tile, from, s, state);
    }
    if (!part.is_last) {
        state_store(tile, state);
        return;
    }
    __syncthreads();
    state_finish(tile, state);
}

template <int WIDTH, bool IS_FULL, class Call>
cudaError_t window_call_parts(const winnow_gpu_window_view &view, Call call)
{
    bool is_bf16 = view.kv_dtype == WINNOW_BF16;

    if (view.n_parts == 1)
        return is_bf16 ? call(window_form<WIDTH, IS_FULL, 1, WINNOW_BF16>())
                       : call(window_form<WIDTH, IS_FULL, 1, WINNOW_FP16>());
    return is_bf16 ? call(window_form<WIDTH, IS_FULL, 2, WINNOW_BF16>())
                   : call(window_form<WIDTH, IS_FULL, 2, WINNOW_FP16>());
}

template <int WIDTH, class Call>
cudaError_t window_call_full(const winnow_gpu_window_view &view, Call call)
{
    if (view.k_width == WIDTH && view.v_width == WIDTH)
        return window_call_parts<WIDTH, true>(view, call);
    return window_call_parts<WIDTH, false>(view, call);
}

template <class Call> cudaError_t window_call(const winnow_gpu_window_view &view, Call call)
{
    switch (winnow_gpu_window_width(view.k_width, view.v_width)) {
    case 64:
        return window_call_full<64>(view, call);
    case 128:
        return window_call_full<128>(view, call);
    default:
        return window_call_full<256>(view, call);
    }
}

template <class F> uint32_t shared_bytes(const winnow_gpu_window_view &view)
{
    uint32_t n_k = view.k_width / 16, n_v = view.v_width / 16;

    return (WARPS * F::ROW_TILES * F::PARTS * n_k + 2 * F::BLOCKS * (n_k + n_v)) * 512 + 16;
}
} /* namespace */

cudaError_t winnow_gpu_window_attend(const struct winnow_gpu_window_view *view,
                                     const struct winnow_gpu_window_launch *part,
                                     cudaStream_t stream)
{
    return window_call(*view, [&](auto form) {
        using F = decltype(form);
        dim3 grid((part->n_rows + window_tile<F>::ROWS - 1) / window_tile<F>::ROWS,
                  view->n_kv_heads);
        attend_window<F><<<grid, THREADS, shared_bytes<F>(*view), stream>>>(*view, *part);
        return cudaGetLastError();
    });
}

cudaError_t winnow_gpu_window_prepare(const struct winnow_gpu_window_view *view)
{
    return window_call(*view, [&](auto form) {
        using F = decltype(form);
        return kernel_prepare(attend_window<F>, shared_bytes<F>(*view));
    });
}
