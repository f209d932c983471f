/*
 * Device: found, opened, lost, closed.
 *
 * Large registrations of host memory fail on some drivers, and cudaHostAlloc takes ten times as
 * long (0.5 s/GiB): the arena is registered by pieces of 1 GiB.
 */
#include <base/alloc.h>
#include <base/assert.h>
#include <errno.h>
#include <kernels/cuda/device.h>
#include <stdio.h>
#include <string.h>

static const uint64_t PIECE_BYTES = UINT64_C(1) << 30;
enum { ALIGNMENT = 256 };

int winnow_gpu_probe(uint32_t device_ordinal, char text[256])
{
    struct cudaDeviceProp properties;
    int n_devices = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&n_devices);

    if (error == cudaErrorInsufficientDriver) {
        snprintf(text, 256, "no CUDA driver, or one older than CUDA %d", CUDART_VERSION / 1000);
        return -ENODEV;
    }
    if (error != cudaSuccess || device_ordinal >= (uint32_t)n_devices) {
        snprintf(text, 256, "no GPU %u: %.200s", device_ordinal,
                 error != cudaSuccess ? cudaGetErrorString(error) : "the driver lists fewer");
        return -ENODEV;
    }
    error = cudaGetDeviceProperties(&properties, (int)device_ordinal);
    if (error != cudaSuccess) {
        snprintf(text, 256, "GPU %u: %.200s", device_ordinal, cudaGetErrorString(error));
        return -ENODEV;
    }
    cudaDriverGetVersion(&driver);
    snprintf(text, 256, "%.99s, compute capability %d.%d, %d multiprocessors, %.1f GiB, CUDA %d.%d",
             properties.name, properties.major, properties.minor, properties.multiProcessorCount,
             (double)properties.totalGlobalMem / (1 << 30), driver / 1000, driver % 1000 / 10);
    return properties.major >= 8 ? 0 : -ENOTSUP;
}

int winnow_gpu_device_check(struct winnow_gpu_device *device, cudaError_t error)
{
    if (error == cudaSuccess)
        return 0;
    cudaGetLastError();
    if (error == cudaErrorMemoryAllocation)
        return -ENOMEM;
    device->is_lost = true;
    return -EIO;
}

int winnow_gpu_device_reached(struct winnow_gpu_device *device, cudaEvent_t event, bool wait)
{
    cudaError_t error = wait ? cudaEventSynchronize(event) : cudaEventQuery(event);

    if (error == cudaErrorNotReady) {
        cudaGetLastError(); /* or the next launch would find it */
        return 0;
    }
    return error == cudaSuccess ? 1 : winnow_gpu_device_check(device, error);
}

int winnow_gpu_device_enter(struct winnow_gpu_device *device)
{
    if (device->is_lost)
        return -EIO;
    return winnow_gpu_device_check(device, cudaSetDevice(device->ordinal));
}

static int register_host(struct winnow_gpu_device *device, char text[256])
{
    while (device->registered_bytes < device->host_bytes) {
        uint8_t *piece = device->host + device->registered_bytes;
        uint64_t left_bytes = device->host_bytes - device->registered_bytes;
        uint64_t n_bytes = left_bytes < PIECE_BYTES ? left_bytes : PIECE_BYTES;
        void *of_device = NULL;
        cudaError_t error =
            cudaHostRegister(piece, n_bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
        if (error == cudaSuccess) {
            device->registered_bytes += n_bytes;
            error = cudaHostGetDevicePointer(&of_device, piece, 0);
        }
        if (error != cudaSuccess) {
            snprintf(text, 256,
                     "host memory from %.1f GiB on can't be pinned: %.99s. hint: ulimit -l",
                     (double)device->registered_bytes / (1 << 30), cudaGetErrorString(error));
            cudaGetLastError();
            return -ENOMEM;
        }
        if (of_device != piece) {
            snprintf(text, 256, "GPU %d sees host memory at other addresses", device->ordinal);
            return -ENOTSUP;
        }
    }
    return 0;
}

static int reserve(struct winnow_gpu_device *device, char text[256])
{
    cudaError_t error = cudaSetDevice(device->ordinal);
    int n_multiprocessors = 0;
    size_t free_bytes = 0, all_bytes = 0;

    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount,
                                       device->ordinal);
    if (error == cudaSuccess)
        error = cudaMemGetInfo(&free_bytes, &all_bytes);
    if (error == cudaSuccess)
        error = cudaMalloc((void **)&device->memory, device->memory_bytes);
    device->n_multiprocessors = (uint32_t)n_multiprocessors;
    if (error == cudaSuccess)
        return 0;
    cudaGetLastError();
    device->memory = NULL;
    snprintf(text, 256, "gpu_memory %.2f GiB can't be reserved (%.2f of %.2f GiB are free): %.99s",
             (double)device->memory_bytes / (1 << 30), (double)free_bytes / (1 << 30),
             (double)all_bytes / (1 << 30), cudaGetErrorString(error));
    return error == cudaErrorMemoryAllocation ? -ENOMEM : -EIO;
}

int winnow_gpu_device_open(uint32_t device_ordinal, uint64_t memory_bytes, void *host_arena,
                           uint64_t host_arena_bytes, struct winnow_gpu_device **ret_device,
                           char text[256])
{
    int rc = winnow_gpu_probe(device_ordinal, text);

    *ret_device = NULL;
    if (rc < 0)
        return rc;
    if (memory_bytes == 0 || host_arena_bytes >> 12 > UINT32_C(0x7fffffff)) {
        snprintf(text, 256,
                 "gpu_memory %llu, host_pool %llu bytes: the first is 0, or the second "
                 "above 8 TiB",
                 (unsigned long long)memory_bytes, (unsigned long long)host_arena_bytes);
        return -EINVAL;
    }
    struct winnow_gpu_device *device = winnow_alloc(sizeof *device);
    if (!device) {
        snprintf(text, 256, "no memory for a GPU's state");
        return -ENOMEM;
    }
    device->ordinal = (int)device_ordinal;
    device->memory_bytes = memory_bytes;
    device->host = host_arena;
    device->host_bytes = host_arena ? host_arena_bytes : 0;
    rc = reserve(device, text);
    if (rc == 0)
        rc = register_host(device, text);
    if (rc < 0) {
        winnow_gpu_device_close(device);
        return rc;
    }
    *ret_device = device;
    return 0;
}

void winnow_gpu_device_close(struct winnow_gpu_device *device)
{
    if (!device)
        return;
    winnow_assert(device->n_taken == 0);
    cudaSetDevice(device->ordinal);
    for (uint64_t at = 0; at < device->registered_bytes; at += PIECE_BYTES)
        cudaHostUnregister(device->host + at);
    cudaFree(device->memory);
    cudaGetLastError(); /* of a lost device each of these fails; the process's end frees it */
    winnow_alloc_free(device);
}

/* Where the gap before taken[i] begins. */
static uint64_t gap_first(const struct winnow_gpu_device *device, uint32_t i)
{
    return i > 0 ? device->taken[i - 1].first + device->taken[i - 1].n_bytes : 0;
}

static uint64_t gap_bytes(const struct winnow_gpu_device *device, uint32_t i)
{
    uint64_t end =
        i < device->n_taken ? device->taken[i].first : device->memory_bytes / ALIGNMENT * ALIGNMENT;
    return end - gap_first(device, i);
}

uint64_t winnow_gpu_device_left(const struct winnow_gpu_device *device)
{
    uint64_t largest = 0;
    for (uint32_t i = 0; i <= device->n_taken; i++)
        if (gap_bytes(device, i) > largest)
            largest = gap_bytes(device, i);
    return largest;
}

uint8_t *winnow_gpu_device_take(struct winnow_gpu_device *device, uint64_t n_bytes)
{
    n_bytes = (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    for (uint32_t i = 0; i <= device->n_taken && device->n_taken < WINNOW_GPU_MODELS_MAX; i++) {
        if (gap_bytes(device, i) < n_bytes)
            continue;
        struct winnow_gpu_extent extent = {gap_first(device, i), n_bytes};
        memmove(&device->taken[i + 1], &device->taken[i],
                (device->n_taken - i) * sizeof device->taken[0]);
        device->taken[i] = extent;
        device->n_taken++;
        return device->memory + extent.first;
    }
    return NULL;
}

void winnow_gpu_device_give(struct winnow_gpu_device *device, const uint8_t *memory)
{
    uint32_t i = 0;

    while (i < device->n_taken && device->memory + device->taken[i].first != memory)
        i++;
    winnow_assert(i < device->n_taken);
    device->n_taken--;
    memmove(&device->taken[i], &device->taken[i + 1],
            (device->n_taken - i) * sizeof device->taken[0]);
}
