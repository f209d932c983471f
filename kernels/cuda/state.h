/* A gpu: one model's part of a device. Contract of each function: gpu.h. */
#pragma once

#include <kernels/cuda/device.h>
#include <kernels/cuda/layout.h>

enum {
    WINNOW_GPU_LAUNCHES_MAX = 2, /* out at once */
    WINNOW_GPU_BUCKETS = 9,      /* of 1, 2, 4 .. 256 items */
    WINNOW_GPU_KINDS = 2,        /* of launches: sparse, whole */
};

/* Of one launch, until it was polled: pinned memory that the kernels read and write. */
struct winnow_gpu_flight {
    struct winnow_gpu_launch *launch; /* with addresses that the device sees; q, k, v behind it */
    struct winnow_gpu_item item[WINNOW_GPU_ITEMS_MAX]; /* as given */
    uint32_t n_items, n_polls;
    uint8_t *out;         /* [n_items_max] of the layout's out_bytes */
    uint32_t *disk_block; /* [n_blocks_max] */
    cudaEvent_t event;
};

/* A job: its blocks up, built, its result down; one graph, which finds its homes in pinned memory. */
struct winnow_gpu_builder {
    int64_t ticket; /* 0: free */
    uint32_t *homes;
    uint8_t *result; /* winnow_gpu_layout_result's */
    cudaStream_t stream;
    cudaGraphExec_t graph;
    cudaEvent_t event;
};

/* The window under way: parts bring their blocks in one stream and attend them in the other. */
struct winnow_gpu_windower {
    cudaStream_t gather_stream, attend_stream;
    uint8_t *memory; /* pinned: rows and lists */
    struct winnow_gpu_window_rows rows;
    struct winnow_gpu_window_list list[WINNOW_GPU_WINDOW_STAGES];
    cudaEvent_t gathered[WINNOW_GPU_WINDOW_STAGES], attended[WINNOW_GPU_WINDOW_STAGES], finished;
    bool is_last[WINNOW_GPU_WINDOW_STAGES];
    int64_t n_parts, n_taken; /* tickets given out; found complete */
    uint32_t n_pos;           /* of the window that may go on; 0: none */
    uint64_t first;
};

/* Pinned memory on its way to the device. */
struct winnow_gpu_staging {
    uint8_t *memory;
    cudaEvent_t event; /* of the last copy out of it */
};

struct winnow_gpu_session {
    uint32_t n_segments; /* as session_set said */
    uint64_t checked;    /* the last call of decode that named it */
};

struct winnow_gpu {
    struct winnow_gpu_device *device;
    struct winnow_gpu_options options;
    struct winnow_gpu_layout layout;
    uint8_t *memory; /* the device's */
    cudaStream_t stream;
    cudaGraphExec_t graph[WINNOW_GPU_KINDS][WINNOW_GPU_BUCKETS];
    struct winnow_gpu_flight flight[WINNOW_GPU_LAUNCHES_MAX];
    int64_t n_launched, n_taken; /* tickets given out; launches whose results were copied out */
    struct winnow_gpu_staging staging[2];
    uint64_t staging_bytes;
    uint32_t staging_idx;
    struct winnow_gpu_builder builder[WINNOW_GPU_BUILDS_MAX];
    int64_t n_builds; /* tickets given out */
    struct winnow_gpu_windower windower;
    struct winnow_gpu_session *session; /* [n_sessions_max] */
    uint64_t n_checks;                  /* calls of decode */
};

cudaError_t winnow_gpu_pinned_alloc(void *pointer, uint64_t n_bytes);
/* A home that a block lies at; ON_DISK is none. */
bool winnow_gpu_home_is_in_arena(const struct winnow_gpu *gpu, uint32_t home);

int winnow_gpu_create(struct winnow_gpu_device *device, const struct winnow_gpu_options *options,
                      struct winnow_gpu **ret_gpu, char text[256]);
void winnow_gpu_destroy(struct winnow_gpu *gpu);

int winnow_gpu_segment_put(struct winnow_gpu *gpu, uint32_t segment_slot, uint32_t layer,
                           const struct winnow_index_view *views, const uint32_t *homes);
int winnow_gpu_homes_set(struct winnow_gpu *gpu, uint32_t n, const struct winnow_gpu_home *homes);
int winnow_gpu_segment_drop(struct winnow_gpu *gpu, uint32_t segment_slot);
int winnow_gpu_session_set(struct winnow_gpu *gpu, uint32_t session, uint32_t n_segments,
                           const uint32_t *segment_slots);
int winnow_gpu_tail_put(struct winnow_gpu *gpu, uint32_t session, uint32_t layer, uint32_t n,
                        const uint32_t *block_number, const void *const *data);

/* The builders' memory, streams and graphs. */
cudaError_t winnow_gpu_builders_create(struct winnow_gpu *gpu);
void winnow_gpu_builders_destroy(struct winnow_gpu *gpu); /* waits for them */
int64_t winnow_gpu_build(struct winnow_gpu *gpu, const uint32_t *homes);
int winnow_gpu_build_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait, uint16_t *const *order,
                          const struct winnow_index_view *views);

/* The window's streams and pinned memory. */
cudaError_t winnow_gpu_windower_create(struct winnow_gpu *gpu);
void winnow_gpu_windower_destroy(struct winnow_gpu *gpu); /* waits for it */
void winnow_gpu_window_rows(struct winnow_gpu *gpu, struct winnow_gpu_window_rows *rows);
int64_t winnow_gpu_window(struct winnow_gpu *gpu, const struct winnow_gpu_window_part *part);
int winnow_gpu_window_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait);

int winnow_gpu_counters(struct winnow_gpu *gpu, uint32_t layer,
                        struct winnow_gpu_counters *counters);

int64_t winnow_gpu_decode(struct winnow_gpu *gpu, uint32_t n_items,
                          const struct winnow_gpu_item *items);
int winnow_gpu_poll(struct winnow_gpu *gpu, int64_t ticket, bool wait);
