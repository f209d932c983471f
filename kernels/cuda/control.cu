/* A thread a slot or a home; contracts in control.h. */
#include <kernels/cuda/control.h>

namespace
{
constexpr uint32_t N_THREADS = 256;

__global__ void slots_drop(const __grid_constant__ winnow_gpu_view view, uint32_t segment_slot,
                           uint32_t layer_first)
{
    uint32_t i = blockIdx.x * N_THREADS + threadIdx.x, layer = layer_first + blockIdx.y;
    uint32_t n = view.n_kv_heads * view.span_blocks;
    uint32_t first = (segment_slot * view.n_layers + layer) * n;

    if (i >= view.n_slots_layer)
        return;
    uint64_t *word = view.slot_word + (uint64_t)layer * view.n_slots_layer + i;
    uint32_t id_next = (uint32_t)(*word >> 32);
    if (id_next > first && id_next - 1 - first < n)
        *word = 0;
}

__global__ void homes_write(const __grid_constant__ winnow_gpu_view view, uint32_t n,
                            const struct winnow_gpu_home *homes)
{
    uint32_t i = blockIdx.x * N_THREADS + threadIdx.x;

    if (i >= n)
        return;
    struct winnow_gpu_home of = homes[i];
    uint8_t *at = view.index + of.segment_slot * view.segment_bytes +
                  (uint64_t)(of.block / view.span_blocks) * view.unit_bytes;
    ((uint32_t *)(at + view.home_at))[of.block % view.span_blocks] = of.home;
}
} /* namespace */

cudaError_t winnow_gpu_slots_drop(const struct winnow_gpu_view *view, uint32_t segment_slot,
                                  uint32_t layer, uint32_t n_layers, cudaStream_t stream)
{
    dim3 grid((view->n_slots_layer + N_THREADS - 1) / N_THREADS, n_layers);

    if (view->n_slots_layer > 0)
        slots_drop<<<grid, N_THREADS, 0, stream>>>(*view, segment_slot, layer);
    return cudaGetLastError();
}

cudaError_t winnow_gpu_homes_write(const struct winnow_gpu_view *view, uint32_t n,
                                   const struct winnow_gpu_home *homes, cudaStream_t stream)
{
    if (n > 0)
        homes_write<<<(n + N_THREADS - 1) / N_THREADS, N_THREADS, 0, stream>>>(*view, n, homes);
    return cudaGetLastError();
}
