/*
 * The outcome of one text, the same calls in any world: windows, steps at several P, a truncate
 * inside a segment, steps again. Rule 6 says that outcomes are equal to the bit.
 */
#pragma once

#include "text.h"

enum { N_LAYERS = 3, N_STEPS = 40, N_TOKENS = 1500, ROW = 4 * 256 };

struct outcome {
    float window[N_LAYERS][ROW];
    float step[N_LAYERS][N_STEPS][ROW];
    struct winnow_core_certificate certificate[N_LAYERS][N_STEPS];
    uint64_t n_disk;
};

static struct sim_text outcome_text;

static inline void windows_run(struct sim_text *of, struct outcome *outcome, uint64_t first,
                               uint64_t end)
{
    static float out[200 * ROW];
    for (uint64_t at = first; at < end; at += 200)
        for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
            uint32_t n = end - at < 200 ? (uint32_t)(end - at) : 200;
            CHECK_EQ(sim_text_window(of, layer, at, n, out), 0);
            memcpy(outcome->window[layer], out + (n - 1) * ROW, sizeof outcome->window[layer]);
        }
}

static inline void steps_run(struct sim_text *of, struct outcome *outcome, uint64_t first, int from,
                             int end)
{
    static const float mass[] = {0.9f, 0.5f, 1, 0.97f};
    for (int i = from; i < end; i++)
        for (uint32_t layer = 0; layer < N_LAYERS; layer++) {
            uint64_t position = first + (uint64_t)(i - from);
            CHECK_EQ(sim_text_step(of, layer, position, mass[i % 4], outcome->step[layer][i]), 0);
            outcome->certificate[layer][i] = of->last.attend.certificate;
            outcome->n_disk += of->last.attend.certificate.n_blocks_disk;
        }
}

/* The shape has N_LAYERS and 4 query heads. */
static inline void outcome_of(const struct sim_options *options,
                              const struct winnow_model_shape *shape, uint32_t policy,
                              struct outcome *outcome)
{
    struct winnow_session_options session = {.policy = policy};
    struct sim_world world;
    *outcome = (struct outcome){0};
    sim_world_init(&world, options);
    sim_text_init(&outcome_text, &world, shape, test_seed());
    CHECK_EQ(sim_text_open(&outcome_text, &session), 0);
    windows_run(&outcome_text, outcome, 0, N_TOKENS - 20);
    steps_run(&outcome_text, outcome, N_TOKENS - 20, 0, N_STEPS / 2);
    CHECK_EQ(sim_text_truncate(&outcome_text, 1111), 0);
    windows_run(&outcome_text, outcome, 1111, N_TOKENS);
    steps_run(&outcome_text, outcome, N_TOKENS, N_STEPS / 2, N_STEPS);
    CHECK_EQ(sim_text_close(&outcome_text), 0);
    sim_world_settle(&world);
    sim_baseline_check(&world);
    sim_world_finish(&world);
}

/* Bits of outputs and of what certificates estimate; where blocks were found may differ. */
static inline void same_check(const struct outcome *a, const struct outcome *b)
{
    CHECK(!memcmp(a->window, b->window, sizeof a->window));
    CHECK(!memcmp(a->step, b->step, sizeof a->step));
    for (int layer = 0; layer < N_LAYERS; layer++)
        for (int i = 0; i < N_STEPS; i++) {
            const struct winnow_core_certificate *x = &a->certificate[layer][i];
            const struct winnow_core_certificate *y = &b->certificate[layer][i];
            CHECK_EQ(x->verdict, y->verdict);
            CHECK_EQ(x->n_rounds, y->n_rounds);
            CHECK_EQ(x->n_blocks_device + x->n_blocks_host + x->n_blocks_disk,
                     y->n_blocks_device + y->n_blocks_host + y->n_blocks_disk);
            CHECK(!memcmp(&x->mass_reached, &y->mass_reached, sizeof(float)));
            CHECK(!memcmp(&x->mass_mean, &y->mass_mean, sizeof(float)));
        }
}

/* A slow disk that shuffles what it answers. */
static inline struct sim_options shuffling(uint64_t pool_mib, uint64_t seed)
{
    struct sim_options options = {.seed = seed,
                                  .host_pool_bytes = pool_mib << 20,
                                  .disk_cap_bytes = 64 << 20,
                                  .data_file_bytes = 4 << 20,
                                  .shuffled = true,
                                  .jitter_ns = 200 * WINNOW_NS_PER_US,
                                  .lazy = 0.5,
                                  .disk = winnow_sim_defaults(seed)};
    options.disk.jitter = 0.95;
    return options;
}
