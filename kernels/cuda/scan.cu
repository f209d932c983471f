/*
 * Scan: the index streamed once, ln_e of every block of every unit.
 *
 * The scan is bound by memory (1,188 bytes a block at d 128), so the arithmetic only has to stay
 * out of the way, and integers do: codes are u8 operands of mma.m16n8k32 against the 15-bit query
 * in two int8 halves, columns 2 h and 2 h + 1 of head h. Two ANDs of one word make both operands, n
 * and 16 n (n = code + 8); accumulators start at -8 sum q, so the bias costs nothing. Products with
 * the centroid are exact too: the query to 28 bits below its largest element, in four int8 digits,
 * which is more than fp32 sums keep. All lanes then end where they are wanted: after a transposing
 * sum over the 8 lanes of a head, lane 4 b + h holds block b and head h of the record.
 *
 * y = base + log2 sum 2^x is relative to the centroid: no maximum is needed unless a sum leaves
 * fp32's range, and then that block alone is taken again with its maximum. Every rounding is
 * explicit and every sum has one order, so the bits of a block depend on nothing but the block and
 * its query.
 *
 * One thread block an SM; a warp has its own slots of shared memory, filled by one bulk copy a
 * record (sm_90; else cp.async). Thread blocks far apart share a run of records and take them one
 * by one, which evens out what the SMs get of memory (1 %); a run that spans many short units is
 * split evenly instead. Of the card's read ceiling the loads and stores alone reach 89 % at 128K x
 * 8, with the arithmetic 86 %; neither fewer warps nor larger runs nor segments in order move that.
 * Rejected: codes loaded to registers (5-10 % slower), a grid a unit (short units leave SMs idle),
 * the query prepared by every warp (some thousand instructions beside a record's 500).
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/stage.h>

namespace
{

constexpr uint32_t N_WARPS_MAX = 24, N_SLOTS_WARP_MAX = 4;
constexpr uint32_t RECORD_BLOCKS = 8, N_MEMBERS = 4; /* thread blocks that share a run */
constexpr uint32_t NO_RECORD = 0xffffffffu;
constexpr int QUERY_LARGEST = 16256; /* as ref: 15 bits */
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* Query of a unit as operands. KT = coded width / 64, NT = query heads / 4, rounded up. */
template <int KT, int NT> struct query_operands {
    uint2 code[NT][2 * KT][32];        /* B of mma (j, low or high nibbles), by lane */
    uint2 centroid[NT][2][2 * KT][32]; /* digits 3 and 2, then 1 and 0 */
    int4 start[NT][4];                 /* accumulators: low nibbles' halves, then the high's */
    float2 factor[NT][4];              /* of a_t x 16 dot, and of q'.mu: logits to base 2 */
};

struct scan_unit {
    uint32_t record_first, record_end; /* of the launch */
    uint32_t segment_table;            /* its session's entries in session_segments */
    uint64_t offset;                   /* of its layer and head in a segment slot */
    const void *q;                     /* [G][k_width] */
};

template <int KT, int NT> struct scan_memory {
    static constexpr uint32_t N_UNITS = KT * NT <= 4 ? 4 : 2; /* of a pass */
    alignas(16) query_operands<KT, NT> query[N_UNITS];
    scan_unit unit[N_UNITS];
    uint32_t unit_first;                             /* of the pass */
    uint32_t record[N_WARPS_MAX * N_SLOTS_WARP_MAX]; /* in each slot */
    alignas(8) uint64_t barrier[N_WARPS_MAX * N_SLOTS_WARP_MAX];
};

struct scan_config { /* of a launch, from the host */
    uint32_t n_warps, n_slots_warp, n_runs;
};

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

/* --- records into shared memory --- */

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

__device__ const uint8_t *record_at(const winnow_gpu_view &view, const scan_unit &unit,
                                    uint32_t record)
{
    uint32_t span = view.span_blocks / RECORD_BLOCKS, i = record - unit.record_first;
    uint32_t slot = view.session_segments[unit.segment_table + i / span];
    return view.index + slot * view.segment_bytes + unit.offset +
           (uint64_t)(i % span) * view.record_bytes;
}

/* --- the query --- */

__device__ float query_load(uint32_t dtype, const void *q, uint32_t at)
{
    if (dtype == WINNOW_FP16)
        return __half2float(((const __half *)q)[at]);
    if (dtype == WINNOW_BF16)
        return __bfloat162float(((const __nv_bfloat16 *)q)[at]);
    return ((const float *)q)[at];
}

__device__ int digit_take(int *x) /* x = 128 x' + digit, -64 <= digit < 64 */
{
    int digit = ((*x + 64) & 127) - 64;
    *x = (*x - digit) >> 7;
    return digit;
}

/* Element d of head g, as 15 and as 28 bits, to its places. */
template <int KT, int NT>
__device__ void query_store(query_operands<KT, NT> *query, uint32_t g, uint32_t d, int hi, int lo,
                            int x)
{
    uint32_t half = 32 * KT, low = d % half, column = g % 4 * 2;
    uint32_t byte = low % 32 / 16 * 4 + low % 4, lane = column * 4 + low % 16 / 4;
    int8_t *code = (int8_t *)query->code[g / 4][low / 32 * 2 + d / half];

    code[lane * 8 + byte] = (int8_t)hi;
    code[(lane + 4) * 8 + byte] = (int8_t)lo;
    lane = column * 4 + d % 64 / 16;
    byte = d % 8;
    for (int tile = 1; tile >= 0; tile--) {
        int8_t *centroid = (int8_t *)query->centroid[g / 4][tile][d / 64 * 2 + d % 16 / 8];
        centroid[(lane + 4) * 8 + byte] = (int8_t)digit_take(&x);
        centroid[lane * 8 + byte] = (int8_t)(tile == 1 ? digit_take(&x) : x);
    }
}

/* Head g of a unit by one warp; a head that is not there is zero. */
template <int KT, int NT>
__device__ void query_prepare(const winnow_gpu_view &view, const void *q, uint32_t g,
                              query_operands<KT, NT> *query)
{
    constexpr int N = 2 * KT; /* elements of a lane */
    uint32_t lane = threadIdx.x % 32;
    float x[N], largest = 0, bad = 0;
    int sum[4] = {0, 0, 0, 0};

    for (int i = 0; i < N; i++) {
        uint32_t d = lane + 32 * i;
        bool is_there = d < view.k_width && g < view.n_group;
        x[i] = is_there ? query_load(view.io_dtype, q, g * view.k_width + d) : 0;
        largest = fmaxf(largest, fabsf(x[i]));
        bad += x[i] - x[i]; /* NaN for what is not finite */
    }
    for (int at = 16; at; at >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, at));
        bad += __shfl_xor_sync(~0u, bad, at);
    }
    float scale = __fdiv_rn(largest, QUERY_LARGEST);
    int exponent = largest > 0 ? ilogbf(largest) : 0;
    for (int i = 0; i < N; i++) {
        float part = scale > 0 ? __fdiv_rn(x[i], scale) : 0;
        int lo = (int)rintf(fminf(fmaxf(part, -QUERY_LARGEST), QUERY_LARGEST)), hi, low;
        hi = lo;
        low = digit_take(&hi);
        query_store(query, g, lane + 32 * i, hi, low, (int)rintf(scalbnf(x[i], 26 - exponent)));
        sum[i < KT ? 0 : 2] += hi;
        sum[i < KT ? 1 : 3] += low;
    }
    for (int i = 0; i < 4; i++)
        sum[i] = __reduce_add_sync(~0u, sum[i]) * (i < 2 ? -8 : -128);
    if (lane == 0) {
        float base2 = __fmul_rn(view.softmax_scale, LOG2_E);
        query->start[g / 4][g % 4] = make_int4(sum[0], sum[1], sum[2], sum[3]);
        query->factor[g / 4][g % 4] = make_float2(__fmul_rn(__fmul_rn(base2, scale), 0.0625f),
                                                  __fmul_rn(scalbnf(base2, exponent), 1 + bad));
    }
}

/* --- a record --- */

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

/* --- the launch --- */

/* The units of a pass: those that hold records from `at` on, N_UNITS at most. A thread an item.
 * Returns the end of the pass. Ends with a barrier. */
template <int KT, int NT>
__device__ uint32_t pass_begin(const winnow_gpu_view &view, scan_memory<KT, NT> *memory,
                               uint32_t at, uint32_t end)
{
    constexpr uint32_t N_UNITS = scan_memory<KT, NT>::N_UNITS;
    const winnow_gpu_launch *launch = view.launch;
    uint32_t i = threadIdx.x < WINNOW_GPU_ITEMS_MAX ? threadIdx.x : 0;
    uint32_t first = launch->block_first[i] / RECORD_BLOCKS;
    uint32_t n = launch->item[i].n_segments * (view.span_blocks / RECORD_BLOCKS);
    uint32_t session = launch->item[i].session, layer = launch->item[i].layer;
    uint32_t element_bytes = view.io_dtype == WINNOW_FP32 ? 4 : 2;
    const uint8_t *q = (const uint8_t *)launch->item[i].q;
    bool is_item = threadIdx.x < launch->n_items;

    __syncthreads(); /* the pass before has read its units */
    if (threadIdx.x < N_UNITS)
        memory->unit[threadIdx.x] = {end, end, 0, 0, nullptr};
    if (is_item && at >= first && at - first < n * view.n_kv_heads)
        memory->unit_first = i * view.n_kv_heads + (at - first) / n;
    __syncthreads();
    uint32_t unit_first = memory->unit_first;
    for (uint32_t u = unit_first; is_item && u < unit_first + N_UNITS; u++) {
        if (u / view.n_kv_heads != i)
            continue;
        uint32_t head = u % view.n_kv_heads;
        memory->unit[u - unit_first] = {
            first + head * n, first + head * n + n, session * view.n_session_segments_max,
            (uint64_t)(layer * view.n_kv_heads + head) * view.unit_bytes,
            q + (size_t)head * view.n_group * view.k_width * element_bytes};
    }
    __syncthreads();
    return min(end, memory->unit[N_UNITS - 1].record_end);
}

/* Which records this warp takes: step i of its own, and then from a counter, or by the step. */
struct scan_run {
    uint32_t first, step, end;
    uint32_t *next; /* how many were taken from base on, which is behind the first slots of all
                     * members; NULL: by the step */
    uint32_t base;
};

template <int KT, int NT> struct scan_warp {
    scan_memory<KT, NT> *memory;
    uint8_t *slot; /* [n_slots_warp], record_bytes each */
    uint64_t *barrier;
    uint32_t *record;           /* in each slot, or NO_RECORD */
    uint32_t slot_next, parity; /* slot to wait for, and of its barrier's phase */
};

template <int KT, int NT>
__device__ void warp_load(const winnow_gpu_view &view, const scan_warp<KT, NT> &warp,
                          uint32_t record, uint32_t end, uint32_t slot)
{
    const scan_unit *unit = warp.memory->unit;
    if (threadIdx.x % 32 == 0)
        warp.record[slot] = record < end ? record : NO_RECORD;
    if (record >= end)
        return;
    while (record >= unit->record_end)
        unit++;
    record_load(warp.slot + slot * view.record_bytes, record_at(view, *unit, record),
                view.record_bytes, warp.barrier + slot);
}

/* Read again by the next kernel: kept in the L2 against the stream of records. */
__device__ void ln_e_store(float *at, float ln_e)
{
    uint64_t keep;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
    asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(at), "f"(ln_e), "l"(keep)
                 : "memory");
}

template <int KT, int NT>
__device__ void record_store(const winnow_gpu_view &view, uint32_t record, int tile, float ln_e)
{
    uint32_t lane = threadIdx.x % 32, g = tile * 4 + lane % 4;
    size_t block = (size_t)record * RECORD_BLOCKS + lane / 4;
    if (g < view.n_group)
        ln_e_store(view.ln_e + block * view.n_group + g, ln_e);
}

/* The warp's largest estimates to the unit: select's origin. As ranks, which begin at 0. */
template <int NT>
__device__ void largest_store(const winnow_gpu_view &view, uint32_t unit_idx, float (&largest)[NT])
{
    uint32_t lane = threadIdx.x % 32;

#pragma unroll
    for (int tile = 0; tile < NT; tile++) {
        for (int at = 4; at < 32; at <<= 1)
            largest[tile] = fmaxf(largest[tile], __shfl_xor_sync(~0u, largest[tile], at));
        if (lane < 4 && tile * 4 + lane < view.n_group && largest[tile] > -INFINITY)
            atomicMax((uint32_t *)&view.unit[unit_idx].largest[tile * 4 + lane],
                      winnow_gpu_rank(__float_as_uint(largest[tile])));
        largest[tile] = -INFINITY;
    }
}

/* All records of a run that fall to this warp; its slots are empty before and after. */
template <int KT, int NT>
__device__ void warp_scan(const winnow_gpu_view &view, const scan_run &run, uint32_t depth,
                          scan_warp<KT, NT> *warp)
{
    uint32_t unit = 0, record, next = run.first + (depth - 1) * run.step;
    float largest[NT];

    for (int tile = 0; tile < NT; tile++)
        largest[tile] = -INFINITY;
    for (;;) {
        uint32_t slot = warp->slot_next, at = unit;
        const uint8_t *data = warp->slot + slot * view.record_bytes;
        float ln_e[NT];
        __syncwarp();
        record = warp->record[slot];
        if (record == NO_RECORD)
            break;
        next =
            run.next && threadIdx.x % 32 == 0 ? run.base + atomicAdd(run.next, 1) : next + run.step;
        while (record >= warp->memory->unit[at].record_end)
            at++;
        if (at != unit)
            largest_store<NT>(view, warp->memory->unit_first + unit, largest);
        unit = at;
        record_wait(warp->barrier + slot, warp->parity);
#pragma unroll
        for (int tile = 0; tile < NT; tile++)
            ln_e[tile] = record_score<KT, NT>(data, view.k_width, warp->memory->query[unit], tile);
        if (run.next)
            next = __shfl_sync(~0u, next, 0);
        __syncwarp();
        warp_load(view, *warp, next, run.end, slot);
        if (++warp->slot_next == depth) {
            warp->slot_next = 0;
            warp->parity ^= 1;
        }
#pragma unroll
        for (int tile = 0; tile < NT; tile++) {
            largest[tile] = fmaxf(largest[tile], ln_e[tile]);
            record_store<KT, NT>(view, record, tile, ln_e[tile]);
        }
    }
    largest_store<NT>(view, warp->memory->unit_first + unit, largest);
}

/* Loads of the first slots, the queries of the pass beside them, then the records. */
template <int KT, int NT>
__device__ void pass_scan(const winnow_gpu_view &view, const scan_config &config,
                          const scan_run &run, scan_warp<KT, NT> *warp)
{
    scan_memory<KT, NT> *memory = warp->memory;
    uint32_t warp_idx = threadIdx.x / 32, depth = config.n_slots_warp;
    bool has_slots = warp_idx < config.n_warps;

    for (uint32_t i = 0; has_slots && i < depth; i++)
        warp_load(view, *warp, run.first + i * run.step, run.end, (warp->slot_next + i) % depth);
    for (uint32_t i = warp_idx; i < memory->N_UNITS * NT * 4; i += blockDim.x / 32) {
        const scan_unit &unit = memory->unit[i / (NT * 4)];
        if (unit.record_first < run.end)
            query_prepare<KT, NT>(view, unit.q, i % (NT * 4), &memory->query[i / (NT * 4)]);
    }
    __syncthreads();
    if (has_slots)
        warp_scan<KT, NT>(view, run, depth, warp);
}

template <int KT, int NT>
__global__ void __launch_bounds__(32 * N_WARPS_MAX, 1)
    scan_kernel(const __grid_constant__ winnow_gpu_view view, const scan_config config)
{
    extern __shared__ uint8_t dynamic[];
    scan_memory<KT, NT> *memory = (scan_memory<KT, NT> *)dynamic;
    uint32_t warp_idx = threadIdx.x / 32, n_slots = config.n_slots_warp;
    uint32_t slots_at = (sizeof(scan_memory<KT, NT>) + 127) / 128 * 128;
    scan_warp<KT, NT> warp = {memory,
                              dynamic + slots_at + (size_t)warp_idx * n_slots * view.record_bytes,
                              memory->barrier + warp_idx * n_slots,
                              memory->record + warp_idx * n_slots,
                              0,
                              0};

    if (threadIdx.x < config.n_warps * n_slots)
        barrier_init(memory->barrier + threadIdx.x);
    later_kernel_launch();
    earlier_kernels_wait();
    uint64_t n_records = view.launch->n_blocks / RECORD_BLOCKS;
    uint32_t n_runs = config.n_runs, run_idx = blockIdx.x % n_runs, member = blockIdx.x / n_runs;
    uint32_t n_rest = gridDim.x % n_runs, n_members = gridDim.x / n_runs + (run_idx < n_rest);
    uint64_t n_before = run_idx * (gridDim.x / n_runs) + min(run_idx, n_rest);
    uint32_t at = (uint32_t)(n_records * n_before / gridDim.x);
    uint32_t end = (uint32_t)(n_records * (n_before + n_members) / gridDim.x);
    if (at >= end)
        return;

    uint32_t pass_end = pass_begin(view, memory, at, end);
    if (pass_end == end) {
        scan_run run = {at + warp_idx * n_members + member, config.n_warps * n_members, end,
                        &view.queue[0].scan_next[run_idx],
                        at + n_slots * config.n_warps * n_members};
        pass_scan<KT, NT>(view, config, run, &warp);
        return;
    }
    uint32_t n = end - at;
    end = at + (uint32_t)((uint64_t)n * (member + 1) / n_members);
    at += (uint32_t)((uint64_t)n * member / n_members);
    for (; at < end; at = pass_end) {
        pass_end = pass_begin(view, memory, at, end);
        pass_scan<KT, NT>(view, config, {at + warp_idx, config.n_warps, pass_end, nullptr, 0},
                          &warp);
    }
}

typedef void scan_function(winnow_gpu_view, scan_config);

struct scan_version {
    scan_function *function;
    uint32_t memory_bytes;
};

template <int KT, int NT> scan_version version()
{
    return {scan_kernel<KT, NT>, (uint32_t)((sizeof(scan_memory<KT, NT>) + 127) / 128 * 128)};
}

template <int KT> scan_version version_of_heads(uint32_t n_group)
{
    return n_group <= 4    ? version<KT, 1>()
           : n_group <= 8  ? version<KT, 2>()
           : n_group <= 12 ? version<KT, 3>()
                           : version<KT, 4>();
}

scan_version version_find(const winnow_gpu_view *view)
{
    return view->k_width <= 64    ? version_of_heads<1>(view->n_group)
           : view->k_width <= 128 ? version_of_heads<2>(view->n_group)
           : view->k_width <= 192 ? version_of_heads<3>(view->n_group)
                                  : version_of_heads<4>(view->n_group);
}

/* As many slots as the device's shared memory holds. */
cudaError_t config_find(const winnow_gpu_view *view, const scan_version &version,
                        scan_config *config, uint32_t *n_bytes)
{
    int device, n_bytes_max, major;
    cudaError_t rc = cudaGetDevice(&device);

    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&n_bytes_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (rc != cudaSuccess)
        return rc;
    uint32_t n_free = (uint32_t)n_bytes_max - version.memory_bytes;
    uint32_t n_slots =
        (uint32_t)n_bytes_max > version.memory_bytes ? n_free / view->record_bytes : 0;
    uint32_t depth_max = major >= 9 ? N_SLOTS_WARP_MAX : 1; /* cp.async waits for all */
    *config = {0, 1, 1};
    for (uint32_t depth = 1; depth <= depth_max; depth++) {
        uint32_t n_warps = n_slots / depth < N_WARPS_MAX ? n_slots / depth : N_WARPS_MAX;
        if (n_warps * depth > config->n_warps * config->n_slots_warp)
            *config = {n_warps, depth, 1};
    }
    *n_bytes = version.memory_bytes + config->n_warps * config->n_slots_warp * view->record_bytes;
    return config->n_warps ? cudaSuccess : cudaErrorInvalidConfiguration;
}

} // namespace

cudaError_t winnow_gpu_scan_prepare(const struct winnow_gpu_view *view)
{
    scan_version version = version_find(view);
    scan_config config;
    uint32_t n_bytes;
    cudaError_t rc = config_find(view, version, &config, &n_bytes);

    if (rc != cudaSuccess)
        return rc;
    return cudaFuncSetAttribute(version.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)n_bytes);
}

cudaError_t winnow_gpu_stage_scan(const struct winnow_gpu_view *view,
                                  const struct winnow_gpu_grid *grid, cudaStream_t stream)
{
    scan_version version = version_find(view);
    scan_config config;
    uint32_t n_bytes;
    cudaError_t rc = config_find(view, version, &config, &n_bytes);

    if (rc != cudaSuccess)
        return rc;
    uint32_t n_threads = 32 * config.n_warps;
    uint32_t n_runs = grid->n_multiprocessors / N_MEMBERS, n_runs_max = WINNOW_GPU_SCAN_RUNS_MAX;
    config.n_runs = n_runs < 1 ? 1 : n_runs > n_runs_max ? n_runs_max : n_runs;
    uint32_t n_threads_min = WINNOW_GPU_ITEMS_MAX; /* pass_begin: one an item */
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t launch = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    launch.gridDim = dim3(grid->n_multiprocessors);
    launch.blockDim = dim3(n_threads < n_threads_min ? n_threads_min : n_threads);
    launch.dynamicSmemBytes = n_bytes;
    launch.stream = stream;
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    return cudaLaunchKernelEx(&launch, version.function, *view, config);
}
