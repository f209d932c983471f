/* A device: its memory, which gpus carve, and the host arena that its kernels read. Contract of
 * open and close: gpu.h. */
#pragma once

#include <cuda_runtime_api.h>
#include <kernels/gpu.h>

enum { WINNOW_GPU_MODELS_MAX = 64 }; /* gpus of one device */

struct winnow_gpu_extent {
    uint64_t first, n_bytes;
};

struct winnow_gpu_device {
    int ordinal;
    uint32_t n_multiprocessors;
    bool is_lost; /* a sticky error came; nothing but destroy and close is tried any more */
    uint8_t *memory;
    uint64_t memory_bytes;
    struct winnow_gpu_extent taken[WINNOW_GPU_MODELS_MAX]; /* rising */
    uint32_t n_taken;
    uint8_t *host;
    uint64_t host_bytes, registered_bytes;
};

int winnow_gpu_probe(uint32_t device_ordinal, char text[256]);
int winnow_gpu_device_open(uint32_t device_ordinal, uint64_t memory_bytes, void *host_arena,
                           uint64_t host_arena_bytes, struct winnow_gpu_device **ret_device,
                           char text[256]);
void winnow_gpu_device_close(struct winnow_gpu_device *device);

/* The device becomes this thread's. 0, or -EIO: it is lost. */
int winnow_gpu_device_enter(struct winnow_gpu_device *device);
/* 0; -ENOMEM: no memory, nothing else happened; -EIO: the device is lost from here on. */
int winnow_gpu_device_check(struct winnow_gpu_device *device, cudaError_t error);
/* 1: the event has happened; 0: not yet, never if told to wait; -EIO. After enter. */
int winnow_gpu_device_reached(struct winnow_gpu_device *device, cudaEvent_t event, bool wait);

/* n_bytes of its memory, at a multiple of 256; NULL: no such piece is left. */
uint8_t *winnow_gpu_device_take(struct winnow_gpu_device *device, uint64_t n_bytes);
void winnow_gpu_device_give(struct winnow_gpu_device *device, const uint8_t *memory);
/* The largest piece. */
uint64_t winnow_gpu_device_left(const struct winnow_gpu_device *device);
