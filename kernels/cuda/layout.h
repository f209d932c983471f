/* What a gpu reserves and where it lies. Needs no device. */
#pragma once

#include <kernels/cuda/window.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    WINNOW_GPU_RING_SLACK_BLOCKS = 32, /* of a tail beyond one segment: what is being sealed */
    WINNOW_GPU_AREAS_MAX = 48,
};

/* Bytes that belong to a pointer of the view. */
struct winnow_gpu_area {
    void **pointer;
    uint64_t n_bytes;
    uint64_t *of; /* where it is counted */
};

struct winnow_gpu_layout {
    struct winnow_gpu_view view; /* its pointers are set by winnow_gpu_layout_place */
    struct winnow_gpu_sizes sizes;
    uint64_t n_bytes, n_blocks_max; /* blocks of a launch, all KV heads */
    uint64_t n_more;                /* words of view.more */
    /* A launch's q, k, v of one item, its out, lse and certificate: bytes, and where each lies. */
    uint64_t in_bytes, k_at, v_at, out_bytes, lse_at, certificate_at;
    /* Of build jobs, one after the other: rows of keys, then of values; results; scratch. */
    uint64_t build_keys_bytes, build_rows_bytes, build_result_bytes, build_scratch_bytes;
    uint8_t *build_rows, *build_result, *build_scratch;
    struct winnow_gpu_window_view window; /* likewise */
    struct winnow_gpu_area area[WINNOW_GPU_AREAS_MAX];
    uint32_t n_areas;
};

/* 0, or -EINVAL, -EOVERFLOW with a line in text. */
int winnow_gpu_layout_init(struct winnow_gpu_layout *layout,
                           const struct winnow_gpu_options *options, char text[256]);
/* Sets the view's pointers into memory [n_bytes], aligned to 256. */
void winnow_gpu_layout_place(struct winnow_gpu_layout *layout, uint8_t *memory);

/* What a launch copies up: the launch as far as it has items, then, from in_at on, their q, k, v. */
uint64_t winnow_gpu_layout_in_at(uint32_t n_items);
uint64_t winnow_gpu_layout_launch_bytes(const struct winnow_gpu_layout *layout, uint32_t n_items);

/* A build job's result: kernels.h's arrays of all KV heads, one after the other. */
struct winnow_gpu_result {
    uint16_t *order;                /* [n_kv_heads][S] */
    struct winnow_index_view index; /* of KV head 0; var NULL */
};
/* Places it in memory, aligned to 16 (NULL: as offsets); returns its bytes. */
uint64_t winnow_gpu_layout_result(const struct winnow_gpu_view *view, uint8_t *memory,
                                  struct winnow_gpu_result *ret_result);

/* What a window has in pinned memory (NULL: as offsets); returns its bytes. ret_list: of every
 * stage. */
uint64_t winnow_gpu_layout_window(const struct winnow_gpu_window_view *view, uint32_t n_pos,
                                  uint8_t *memory, struct winnow_gpu_window_rows *ret_rows,
                                  struct winnow_gpu_window_list *ret_list);

/* The most partials that a KV head of an item may make. */
uint32_t winnow_gpu_layout_partials(const struct winnow_gpu_view *view, uint32_t n_blocks);

int winnow_gpu_sizes(const struct winnow_gpu_options *options, struct winnow_gpu_sizes *sizes,
                     char text[256]);

#ifdef __cplusplus
}
#endif
