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
 * split evenly instead. Queries are asked for before the first records, behind which they would
 * wait 10 us. Nothing that a step writes is read here: scan is the step's first kernel, and tail runs
 * beside it.
 *
 * Of the card's read ceiling the loads and stores alone reach 94 % at 128K x 8, with the arithmetic
 * 90 %. Writing ln_e costs 2.5 % of it, units spread over the index 1 %, the first and last records
 * the rest. Rejected: codes loaded to registers (5-10 % slower), a grid a unit (short units leave
 * SMs idle), the query prepared by every warp (some thousand instructions beside a record's 500),
 * the heads of a segment one after the other (no gain beside the arithmetic), two records in
 * flight a warp (1 us slower at 32K).
 */
#include <kernels/cuda/ahead.cuh>
#include <kernels/cuda/edge.cuh>
#include <kernels/cuda/record.cuh>
#include <kernels/cuda/stage.h>

namespace
{

constexpr uint32_t N_WARPS_MAX = 24, N_SLOTS_WARP_MAX = 4;
/* Of a thread block: more in flight waits in line, 1-3 % at any size. */
constexpr uint32_t SLOTS_BYTES = 155648, N_SLOTS_MIN = 16;
constexpr uint32_t N_MEMBERS = 4; /* thread blocks that share a run */
constexpr uint32_t NO_RECORD = 0xffffffffu;

struct scan_unit {
    uint32_t record_first, record_end; /* of the launch */
    uint32_t segment_table;            /* its session's entries in session_segments */
    uint32_t head, past;               /* of its layer and head: in a segment slot, in past */
    uint64_t offset;                   /* of its layer and head in a segment slot */
    const void *q;                     /* [G][k_width] */
};

template <int KT, int NT> struct scan_memory {
    static constexpr uint32_t N_UNITS = KT * NT <= 4 ? 4 : 2; /* of a pass */
    alignas(16) query_operands<KT, NT> query[N_UNITS];
    scan_unit unit[N_UNITS];
    ahead_past<NT> past[N_UNITS];
    uint32_t largest[N_UNITS][NT * 4];               /* ranks of the largest estimates */
    uint32_t unit_first;                             /* of the pass */
    uint32_t record[N_WARPS_MAX * N_SLOTS_WARP_MAX]; /* in each slot */
    alignas(8) uint64_t barrier[N_WARPS_MAX * N_SLOTS_WARP_MAX];
};

struct scan_config { /* of a launch, from the host */
    uint32_t n_warps, n_slots_warp;
};

__device__ const uint8_t *record_at(const winnow_gpu_view &view, const scan_unit &unit,
                                    uint32_t record)
{
    uint32_t span = view.span_blocks / RECORD_BLOCKS, i = record - unit.record_first;
    uint32_t slot = view.session_segments[unit.segment_table + i / span];
    return view.index + slot * view.segment_bytes + unit.offset +
           (uint64_t)(i % span) * view.record_bytes;
}

/* The item that is this thread's number. */
struct scan_item {
    uint32_t n_heads;         /* 0: there is none */
    uint32_t record_first, n; /* of head 0; a head's */
    uint32_t session, layer;
    const uint8_t *q;
};

__device__ scan_item item_load(const winnow_gpu_view &view)
{
    const winnow_gpu_launch *launch = view.launch;
    uint32_t i = threadIdx.x < WINNOW_GPU_ITEMS_MAX ? threadIdx.x : 0;
    const winnow_gpu_item &item = launch->item[i];
    bool is_there = threadIdx.x < launch->n_items;

    return {is_there ? view.n_kv_heads : 0,
            launch->block_first[i] / RECORD_BLOCKS,
            item.n_segments * (view.span_blocks / RECORD_BLOCKS),
            item.session,
            item.layer,
            (const uint8_t *)item.q};
}

/* The units of a pass: those that hold records from `at` on, N_UNITS at most. Returns the end of
 * the pass. Ends with a barrier. */
template <int KT, int NT>
__device__ __noinline__ uint32_t pass_begin(const winnow_gpu_view &view, scan_item item,
                                            scan_memory<KT, NT> *memory, uint32_t at, uint32_t end)
{
    constexpr uint32_t N_UNITS = scan_memory<KT, NT>::N_UNITS;
    uint32_t unit_idx = threadIdx.x * view.n_kv_heads;
    uint32_t head_bytes = view.n_group * view.k_width * (view.io_dtype == WINNOW_FP32 ? 4 : 2);

    __syncthreads(); /* the pass before has read its units */
    if (threadIdx.x < N_UNITS)
        memory->unit[threadIdx.x] = {end, end, 0, 0, 0, 0, nullptr};
    if (threadIdx.x < N_UNITS * NT * 4)
        memory->largest[0][threadIdx.x] = 0;
    if (at - item.record_first < item.n * item.n_heads)
        memory->unit_first = unit_idx + (at - item.record_first) / item.n;
    __syncthreads();
    uint32_t unit_first = memory->unit_first;
#pragma unroll 1
    for (uint32_t i = 0; i < N_UNITS; i++) {
        uint32_t head = unit_first + i - unit_idx, first = item.record_first + head * item.n;
        if (head < item.n_heads)
            memory->unit[i] = {first,
                               first + item.n,
                               item.session * view.n_session_segments_max,
                               item.layer * item.n_heads + head,
                               (item.session * view.n_layers + item.layer) * item.n_heads + head,
                               (uint64_t)(item.layer * item.n_heads + head) * view.unit_bytes,
                               item.q + (size_t)head * head_bytes};
    }
    __syncthreads();
    return min(end, memory->unit[N_UNITS - 1].record_end);
}

/* Which records this warp takes: step i of its own, and then from a counter, or by the step. */
struct scan_run {
    uint32_t first, step, end;
    uint32_t *next;     /* how many were taken behind the first slots of all members and one more;
                         * NULL: by the step. Back at 0 after the last */
    uint32_t next_last; /* of them: every record but a warp's first takes another one */
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

/* Select's origin, as ranks, which begin at 0. */
__device__ void largest_raise(uint32_t *largest, float ln_e)
{
    uint32_t rank = winnow_gpu_rank(__float_as_uint(ln_e));
    if (ln_e > -INFINITY && rank > *(volatile uint32_t *)largest)
        atomicMax(largest, rank);
}

/* From the pass to its units. After a barrier. */
template <int KT, int NT>
__device__ void largest_store(const winnow_gpu_view &view, const scan_memory<KT, NT> &memory)
{
    uint32_t i = threadIdx.x / (NT * 4), g = threadIdx.x % (NT * 4);
    if (i < memory.N_UNITS && g < view.n_group && memory.largest[i][g])
        atomicMax(&view.unit_tally[memory.unit_first + i].largest[g], memory.largest[i][g]);
}

/* Blocks of a record that are foreseen, to those that fetch. */
template <int KT, int NT>
__device__ void foreseen_list(const winnow_gpu_view &view, const scan_memory<KT, NT> &memory,
                              uint32_t unit_idx, uint32_t record, uint32_t lanes)
{
    const scan_unit &unit = memory.unit[unit_idx];
    uint32_t lane = threadIdx.x % 32, span = view.span_blocks, id = 0;
    uint32_t block = (record - unit.record_first) * RECORD_BLOCKS + lane / 4;
    bool is_there = lanes >> lane & 1;

    if (is_there) {
        uint32_t slot = view.session_segments[unit.segment_table + block / span];
        id = (slot * view.n_layers * view.n_kv_heads + unit.head) * span + block % span;
    }
    ahead_list(view, is_there, id);
}

/* All records of a run that fall to this warp; its slots are empty before and after. */
template <int KT, int NT>
__device__ void warp_scan(const winnow_gpu_view &view, const scan_run &run, uint32_t depth,
                          scan_warp<KT, NT> *warp)
{
    uint32_t unit = 0, record, next = run.first + (depth - 1) * run.step;
    bool is_first = true;

    for (;;) {
        uint32_t slot = warp->slot_next;
        const uint8_t *data = warp->slot + slot * view.record_bytes;
        float ln_e[NT];
        __syncwarp();
        record = warp->record[slot];
        if (record == NO_RECORD)
            break;
        next = run.next && !is_first && threadIdx.x % 32 == 0
                   ? run.end + depth * run.step - 1 - run.next_last +
                         atomicInc(run.next, run.next_last)
                   : next + run.step;
        while (record >= warp->memory->unit[unit].record_end)
            unit++;
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
        is_first = false;
#pragma unroll
        for (int tile = 0; tile < NT; tile++) {
            uint32_t g = tile * 4 + threadIdx.x % 4;
            largest_raise(&warp->memory->largest[unit][g], ln_e[tile]);
            record_store<KT, NT>(view, record, tile, ln_e[tile]);
        }
        if (uint32_t lanes = ahead_foreseen<NT>(warp->memory->past[unit], ln_e))
            foreseen_list<KT, NT>(view, *warp->memory, unit, record, lanes);
    }
}

/* The queries of the pass are asked for before the first records: behind those they would wait for
 * all of them. */
template <int KT, int NT>
__device__ void pass_scan(const winnow_gpu_view &view, const scan_config &config,
                          const scan_run &run, scan_warp<KT, NT> *warp)
{
    scan_memory<KT, NT> *memory = warp->memory;
    uint32_t warp_idx = threadIdx.x / 32, n_warps = blockDim.x / 32, depth = config.n_slots_warp;
    bool has_slots = warp_idx < config.n_warps;
    uint32_t task = warp_idx, n_tasks = 0;
    head_bits<KT> bits;

    while (n_tasks < memory->N_UNITS * NT * 4 &&
           memory->unit[n_tasks / (NT * 4)].record_first < run.end)
        n_tasks += NT * 4;
    if (task < n_tasks)
        bits = head_load<KT>(view, memory->unit[task / (NT * 4)].q, task % (NT * 4));
#pragma unroll 1
    for (uint32_t i = 0; has_slots && i < depth; i++)
        warp_load(view, *warp, run.first + i * run.step, run.end, (warp->slot_next + i) % depth);
#pragma unroll 1
    while (task < n_tasks) {
        query_prepare<KT, NT>(view, bits, task % (NT * 4), &memory->query[task / (NT * 4)]);
        task += n_warps;
        if (task < n_tasks)
            bits = head_load<KT>(view, memory->unit[task / (NT * 4)].q, task % (NT * 4));
    }
    for (uint32_t i = threadIdx.x; i < memory->N_UNITS * NT * 4; i += blockDim.x)
        ahead_past_load<NT>(view, memory->unit[i / (NT * 4)].past, i % (NT * 4),
                            &memory->past[i / (NT * 4)]);
    __syncthreads();
    if (has_slots)
        warp_scan<KT, NT>(view, run, depth, warp);
    __syncthreads();
    largest_store<KT, NT>(view, *memory);
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

    later_kernel_launch();
    uint32_t n_scanning = gridDim.x - ahead_n_fetching(view);
    if (blockIdx.x >= n_scanning) {
        ahead_run(view, n_scanning);
        return;
    }
    scan_item item = item_load(view);
    uint32_t n_records = view.launch->n_blocks / RECORD_BLOCKS;
    if (threadIdx.x < config.n_warps * n_slots)
        barrier_init(memory->barrier + threadIdx.x);
    uint32_t n_runs = min(max(n_scanning / N_MEMBERS, 1u), (uint32_t)WINNOW_GPU_SCAN_RUNS_MAX);
    uint32_t run_idx = blockIdx.x % n_runs, member = blockIdx.x / n_runs;
    uint32_t n_rest = n_scanning % n_runs, n_members = n_scanning / n_runs + (run_idx < n_rest);
    uint32_t n_before = run_idx * (n_scanning / n_runs) + min(run_idx, n_rest);
    uint32_t n_each = n_records / n_scanning, n_over = n_records % n_scanning;
    uint32_t at = n_each * n_before + n_over * n_before / n_scanning;
    uint32_t end = n_each * (n_before + n_members) + n_over * (n_before + n_members) / n_scanning;
    uint32_t step = config.n_warps * n_members;
    scan_run run = {at + warp_idx * n_members + member, step, end, &view.tally->scan_next[run_idx],
                    end - at - step - 1};
    if (at >= end) {
        ahead_scan_end(view);
        return;
    }

    uint32_t pass_end = pass_begin(view, item, memory, at, end);
    bool is_split = pass_end < end;
    if (is_split) {
        uint32_t n = end - at;
        end = at + n / n_members * (member + 1) + n % n_members * (member + 1) / n_members;
        at += n / n_members * member + n % n_members * member / n_members;
        pass_end = pass_begin(view, item, memory, at, end);
    }
#pragma unroll 1
    for (;;) {
        if (is_split)
            run = {at + warp_idx, config.n_warps, pass_end, nullptr, 0};
        pass_scan<KT, NT>(view, config, run, &warp);
        at = pass_end;
        if (at >= end)
            break;
        pass_end = pass_begin(view, item, memory, at, end);
    }
    ahead_scan_end(view);
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

/* As many slots as are wanted and the device's shared memory holds. */
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
    uint32_t n_free = 0;
    if ((uint32_t)n_bytes_max > version.memory_bytes)
        n_free = (uint32_t)n_bytes_max - version.memory_bytes;
    uint32_t n_slots = n_free / view->record_bytes, n_wanted = SLOTS_BYTES / view->record_bytes;
    n_wanted = n_wanted > N_SLOTS_MIN ? n_wanted : N_SLOTS_MIN;
    n_slots = n_slots < n_wanted ? n_slots : n_wanted;
    uint32_t depth_max = major >= 9 ? N_SLOTS_WARP_MAX : 1; /* cp.async waits for all */
    *config = {0, 1};
    for (uint32_t depth = 1; depth <= depth_max; depth++) {
        uint32_t n_warps = n_slots / depth < N_WARPS_MAX ? n_slots / depth : N_WARPS_MAX;
        if (n_warps * depth > config->n_warps * config->n_slots_warp)
            *config = {n_warps, depth};
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
    return kernel_beside_prepare(version.function, n_bytes);
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
    uint32_t n_threads = 32 * config.n_warps, n_threads_min = WINNOW_GPU_ITEMS_MAX;
    n_threads = n_threads < n_threads_min ? n_threads_min : n_threads; /* pass_begin: one an item */
    version.function<<<grid->n_multiprocessors, n_threads, n_bytes, stream>>>(*view, config);
    return cudaGetLastError();
}
