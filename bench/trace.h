/*
 * Traces: keys, values and queries of a real model, and what a policy makes of them. Shared by
 * bench-selection and tests/kernels. The table of kernels does all the work that a decode step
 * would ask of it; the fp64 oracle judges.
 *
 * Method: sinks are the tokens 0..15; sealed are 16..7695, as one segment or in segments of
 * segment_tokens; the rest is tail. A query at position p sees tokens 0..p. Success: the true mass
 * of sinks, tail and what was read is >= P, a (query head, step).
 */
#pragma once

#include <kernels/kernels.h>

enum { WINNOW_TRACE_SEALED_END = 7696, WINNOW_TRACE_N_SINKS = 16 };
enum { WINNOW_TRACE_POLICY_ORACLE = 100 }; /* beside enum winnow_policy: the true masses */

/* One KV head. Queries stand at the last n_steps positions. */
struct winnow_trace {
    char name[64]; /* history/layer21_head2 */
    uint32_t n_tokens, width, n_steps, n_q;
    float *k, *v; /* [n_tokens][width] */
    float *q;     /* [n_steps][n_q][width] */
};

struct winnow_trace_list {
    uint32_t n_paths;
    char (*path)[512]; /* of K; sorted */
};

struct winnow_trace_case {
    uint32_t policy;
    float mass;
};

/* Means over query heads and steps, but for mass_min, the least true mass after round 2. */
struct winnow_trace_result {
    double share1, share2, success1, success2, mass_min;
    double relerr_drop, relerr_compensated; /* |out - dense| / |dense|, after round 2 */
    uint32_t n_read_min, n_read_max;        /* blocks of one step */
};

struct winnow_trace_options {
    uint32_t segment_tokens; /* 0: one segment */
    uint32_t n_steps;        /* 0: all; else that many, evenly spaced */
    /* NULL, or called after select of every step, in order, of every case. */
    void (*visit)(void *arg, uint32_t case_idx, const struct winnow_selection *);
    void *visit_arg;
};

/*
 * The traces of a directory: the K of each, TEXT/layerLL_headH_K.npy (fp16, C order, heads from the
 * shape) and TEXT_layerLL_headH_K.f16 (raw fp16, 64 wide, 3 query heads). 0, -ENOENT: none, -ENOMEM.
 */
int winnow_trace_list_open(const char *directory, struct winnow_trace_list *list);
void winnow_trace_list_close(struct winnow_trace_list *list);

/* Loads the K of a list and its V and Q. 0, -ENOMEM, -EINVAL: not such files, -errno of reading. */
int winnow_trace_open(const char *path, struct winnow_trace *trace);
void winnow_trace_close(struct winnow_trace *trace);

/* result [n_cases]. 0, -ENOMEM, -EDOM (NaN in K or V), -EINVAL: too short for the method. */
int winnow_trace_run(const struct winnow_trace *trace, const struct winnow_kernels *kernels,
                     const struct winnow_trace_options *options, uint32_t n_cases,
                     const struct winnow_trace_case *cases, struct winnow_trace_result *result);
