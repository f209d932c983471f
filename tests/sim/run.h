/*
 * Runs: a swarm whose every circumstance is drawn from its seed (shapes, pools, disk, faults,
 * deadlines, threads' manners), driven until it has made its calls, closed, and looked over.
 *
 * WINNOW_SIM_TRACE=1 prints every request as it ends.
 */
#pragma once

#include "client.h"

// --- the draw -----------------------------------------------------------------------------------

enum sim_manner {
    SIM_AT_LEISURE, /* everything, at moderate rates */
    SIM_STORM,      /* much disk, and a fault on every few reads */
    SIM_SMALL,      /* the reference kernels, little of everything */
    SIM_BY_GPU,     /* a GPU too, that may be lost */
};

static inline struct winnow_model_shape sim_shape_draw(struct sim_swarm *swarm, bool wide,
                                                       enum sim_manner manner)
{
    static const uint32_t narrow[] = {16, 32, 64, 80};
    uint32_t n_widths = manner == SIM_SMALL ? 2 : 4;
    uint32_t k_width = narrow[sim_below(swarm, n_widths)];
    uint32_t v_width = narrow[sim_below(swarm, n_widths)];
    uint32_t n_layers = 1 + (uint32_t)sim_below(swarm, manner == SIM_SMALL ? 2 : 4);
    uint32_t n_kv_heads = 1 + (uint32_t)sim_below(swarm, manner == SIM_SMALL ? 2 : 3);
    if (wide) { /* few tokens fill the pool */
        k_width = 256;
        v_width = sim_chance(swarm, 0.5) ? 256 : 128;
        n_layers = 2 + (uint32_t)sim_below(swarm, 3);
        n_kv_heads = 2;
    }
    return (struct winnow_model_shape){
        .n_layers = n_layers,
        .n_kv_heads = n_kv_heads,
        .n_q_heads = n_kv_heads * (1 + (uint32_t)sim_below(swarm, 3)),
        .k_width = k_width,
        .v_width = v_width,
        .softmax_scale = 1 / sqrtf((float)k_width),
        .kv_dtype = wide ? (manner == SIM_BY_GPU ? WINNOW_FP16 : WINNOW_FP32)
                         : 1 + (uint32_t)sim_below(swarm, 3),
        .io_dtype = 1 + (uint32_t)sim_below(swarm, 3)};
}

static inline struct winnow_sim_options sim_disk_draw(struct sim_swarm *swarm, uint64_t seed)
{
    struct winnow_sim_options disk = winnow_sim_defaults(seed);
    if (sim_chance(swarm, 0.5))
        for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++)
            disk.p[fault] = sim_chance(swarm, 0.5) ? 0.02 * winnow_rng_unit(&swarm->rng) : 0;
    return disk;
}

static inline void sim_trouble_draw(struct sim_swarm *swarm, const struct winnow_sim_options *disk,
                                    enum sim_manner manner)
{
    struct sim_trouble *trouble = &swarm->trouble;
    bool stuck = disk->p[WINNOW_SIM_STUCK] > 0 || manner == SIM_STORM;
    trouble->quota = true;
    trouble->rot = sim_chance(swarm, 0.3) ? 0.001 : 0;
    trouble->storm = manner == SIM_STORM ? 0.5 : 0;
    trouble->lossy = trouble->rot > 0 || trouble->storm > 0;
    for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++)
        trouble->lossy |= disk->p[fault] > 0;
    trouble->deadlines = stuck ? 1 : sim_chance(swarm, 0.5) ? 0.2 : 0;
    trouble->deadline_ns =
        (int64_t)(1 + sim_below(swarm, 20)) * WINNOW_NS_PER_MS * (stuck ? 10 : 1);
    trouble->opens = manner == SIM_STORM ? 0.1 : 0.002;
    trouble->cancels = sim_chance(swarm, 0.5) ? 0.0003 : 0;
    trouble->closes = sim_chance(swarm, 0.5) ? 0.0001 : 0;
    trouble->mistakes = 0.002;
}

static inline void sim_swarm_init(struct sim_swarm *swarm, uint64_t seed, enum sim_manner manner)
{
    *swarm = (struct sim_swarm){.trace = getenv("WINNOW_SIM_TRACE")};
    swarm->ended_last = &swarm->ended_first;
    winnow_rng_init(&swarm->rng, seed);
    bool wide = manner == SIM_STORM || (manner != SIM_SMALL && sim_chance(swarm, 0.7));
    swarm->by_gpu = manner == SIM_BY_GPU;
    swarm->window_max = manner == SIM_SMALL ? 100 : SIM_WINDOW_MAX;
    swarm->n_shapes = 1 + sim_below(swarm, 3);
    for (uint32_t i = 0; i < swarm->n_shapes; i++)
        swarm->shape[i] = sim_shape_draw(swarm, wide, manner);
    swarm->n_clients = 2 + (uint32_t)sim_below(swarm, SIM_N_CLIENTS_MAX - 1);
    for (uint32_t i = 0; i < swarm->n_clients; i++)
        swarm->client[i].swarm = swarm;
    static const double lazy[] = {0.1, 0.9, 1};
    struct sim_options options = {
        .seed = seed,
        .index_memory_bytes = (2 + sim_below(swarm, 6)) << 20,
        .disk_cap_bytes = sim_chance(swarm, 0.9) ? (8 + 8 * sim_below(swarm, 8)) << 20 : 0,
        .data_file_bytes = 4 << 20,
        .dense_below = 128 * (uint32_t)sim_below(swarm, 4),
        .n_steps_max = 1 + (uint32_t)sim_below(swarm, 4),
        .kernels = manner == SIM_SMALL ? "ref" : NULL,
        .shuffled = true,
        .jitter_ns = 1 + (int64_t)sim_below(swarm, 100000),
        .lazy = lazy[sim_below(swarm, 3)],
        .disk = sim_disk_draw(swarm, seed + 2)};
    if (manner == SIM_STORM) {
        options.disk_cap_bytes = 64 << 20;
        options.index_memory_bytes = 16 << 20;
        options.disk = winnow_sim_defaults(seed + 2);
        options.disk.late_ns = 20 * WINNOW_NS_PER_MS;
    }
    if (manner == SIM_BY_GPU) {
        options.gpu_memory_bytes = (4 + 4 * sim_below(swarm, 12)) << 20;
        options.gpu_fails_after = sim_chance(swarm, 0.3) ? 1 + sim_below(swarm, 4000) : 0;
        options.index_memory_bytes = 16 << 20;
    }
    sim_trouble_draw(swarm, &options.disk, manner);
    sim_world_init(&swarm->world, &options);
    sim_world_init(&swarm->calm, &(struct sim_options){.seed = seed,
                                                       .host_pool_bytes = 256 << 20,
                                                       .index_memory_bytes = 64 << 20,
                                                       .kernels = options.kernels,
                                                       .dense_below = options.dense_below});
}

static inline void sim_swarm_finish(struct sim_swarm *swarm)
{
    sim_world_finish(&swarm->world);
    sim_world_finish(&swarm->calm);
}

// --- the run ------------------------------------------------------------------------------------

static inline void sim_ends_take(struct sim_swarm *swarm)
{
    while (swarm->ended_first) {
        struct sim_call *call = swarm->ended_first;
        swarm->ended_first = call->next;
        if (!swarm->ended_first)
            swarm->ended_last = &swarm->ended_first;
        sim_call_end(call);
        sim_call_free(call);
    }
}

/* Bytes change where they lie, change places, or are gone. */
static inline void sim_medium_rot(struct sim_swarm *swarm)
{
    struct winnow_store_facts facts;
    char name[32];
    swarm->counts.n_rot++;
    winnow_store_facts(swarm->world.store, &facts);
    uint64_t file_bytes = facts.data_file_bytes, n_files = facts.allocated_bytes / file_bytes;
    snprintf(name, sizeof name, "%08x.dat", (uint32_t)sim_below(swarm, n_files));
    uint64_t at = sim_below(swarm, file_bytes), page = sim_below(swarm, file_bytes) & ~4095ull;
    if (sim_chance(swarm, 0.8))
        winnow_sim_disk_flip(swarm->world.disk, name, at);
    else if (sim_chance(swarm, 0.8))
        winnow_sim_disk_swap(swarm->world.disk, name, at & ~4095ull, page, 4096);
    else
        winnow_sim_disk_truncate(swarm->world.disk, name, at);
}

static inline uint64_t sim_faults_met(const struct sim_swarm *swarm)
{
    struct winnow_sim_counts counts;
    uint64_t n = 0;
    winnow_sim_disk_counts(swarm->world.disk, &counts);
    for (int fault = 1; fault < WINNOW_N_SIM_FAULTS; fault++)
        n += counts.n_faults[fault];
    return n;
}

/* The next reads meet a fault, once those that were to meet one have. */
static inline void sim_fault_arm(struct sim_swarm *swarm)
{
    if (sim_faults_met(swarm) < swarm->n_armed)
        return;
    static const enum winnow_sim_fault mild[] = {WINNOW_SIM_EAGAIN, WINNOW_SIM_EINTR,
                                                 WINNOW_SIM_SHORT};
    uint64_t n_times = 1 + sim_below(swarm, 4);
    enum winnow_sim_fault fault = mild[sim_below(swarm, 3)];
    if (sim_chance(swarm, 0.1))
        fault = 1 + (enum winnow_sim_fault)sim_below(swarm, WINNOW_N_SIM_FAULTS - 1);
    winnow_sim_disk_fail(swarm->world.disk, WINNOW_IO_READ, 1 + sim_below(swarm, 3), n_times,
                         fault);
    swarm->n_armed = sim_faults_met(swarm) + n_times;
}

/* Cancels, closes, leases that end, a disk that comes back: whatever the clients are at. */
static inline void sim_intrude(struct sim_swarm *swarm)
{
    struct sim_client *client = &swarm->client[sim_below(swarm, swarm->n_clients)];
    if (swarm->out && sim_chance(swarm, swarm->trouble.cancels)) {
        swarm->out->cancelled = true;
        sim_world_cancel(&swarm->world, &swarm->out->request);
    }
    if (client->open && !client->closing && sim_chance(swarm, swarm->trouble.closes)) {
        if (sim_chance(swarm, 0.2) && !swarm->closing_owner)
            sim_owner_close(swarm, client->owner);
        else
            sim_client_close(client);
    }
    if (client->open && !client->closing && client->n_out == 0 && !client->sync &&
        client->task == SIM_IDLE && sim_chance(swarm, swarm->trouble.mistakes))
        sim_mistake_send(client);
    if (sim_chance(swarm, 0.01))
        winnow_sim_disk_release(swarm->world.disk);
    if (sim_chance(swarm, 0.01))
        sim_world_builders_wait(&swarm->world, sim_chance(swarm, 0.3));
    if (swarm->world.store && sim_chance(swarm, swarm->trouble.rot))
        sim_medium_rot(swarm);
    if (swarm->world.store && sim_chance(swarm, swarm->trouble.storm))
        sim_fault_arm(swarm);
}

static inline void sim_invariants_check(struct sim_swarm *swarm)
{
    const struct winnow_core *core = swarm->world.core;
    const struct sim_client *client = &swarm->client[sim_below(swarm, swarm->n_clients)];
    int64_t now_ns = sim_world_now(&swarm->world);
    for (const struct sim_call *call = swarm->out; call; call = call->next)
        CHECK(call->request.deadline_ns >= now_ns - SIM_LATE_NS);
    if (sim_core_rests(core) && sim_chance(swarm, 0.1))
        sim_memory_check(core);
    if (!client->open || client->closing || client->n_out || !sim_chance(swarm, 0.05))
        return;
    const struct winnow_session *session = sim_session(core, client->id[0]);
    if (session->op.state == WINNOW_OP_NONE)
        sim_bytes_check(&client->model, core, session,
                        (uint32_t)sim_below(swarm, client->model.shape.n_layers),
                        (uint32_t)sim_below(swarm, client->model.shape.n_kv_heads), client->token);
}

static inline void sim_swarm_step(struct sim_swarm *swarm)
{
    int64_t until_ns = sim_world_now(&swarm->world) + WINNOW_NS_PER_S;
    if (!sim_world_step(&swarm->world, until_ns) && swarm->out) {
        sim_world_builders_wait(&swarm->world, false); /* nothing else can happen */
        if (++swarm->n_idle > 100)
            test_fail(__FILE__, __LINE__, "nothing happens, and requests wait");
    }
    if (swarm->ended_first)
        swarm->n_idle = 0;
    sim_ends_take(swarm);
    sim_invariants_check(swarm);
}

/* n_calls by chance, then every session is closed and nothing may be left. */
static inline void sim_swarm_run(struct sim_swarm *swarm, uint64_t n_calls)
{
    while (swarm->counts.n_calls < n_calls) {
        for (uint32_t i = 0; i < swarm->n_clients; i++)
            sim_client_next(&swarm->client[i]);
        sim_intrude(swarm);
        sim_swarm_step(swarm);
    }
    swarm->trouble.deadlines = 0;
    sim_world_builders_wait(&swarm->world, false);
    winnow_sim_disk_release(swarm->world.disk);
    for (uint64_t owner = 1; owner <= 2; owner++) {
        while (swarm->closing_owner)
            sim_swarm_step(swarm);
        sim_owner_close(swarm, owner);
    }
    while (swarm->out)
        sim_swarm_step(swarm);
    for (int i = 0; i == 0 || (i < 20 && !sim_core_rests(swarm->world.core)); i++) {
        winnow_sim_disk_release(
            swarm->world.disk); /* a read is tried again, and may be stuck again */
        sim_world_settle(&swarm->world);
    }
    sim_baseline_check(&swarm->world);
    sim_world_settle(&swarm->calm);
    sim_baseline_check(&swarm->calm);
}
