// Stats: the daemon's totals and a row a session, or one session. The core answers for one session
// at a time, so the rows are asked for one after the other by the call's own request.
#include <assert.h>
#include <base/alloc.h>
#include <base/assert.h>
#include <daemon/rpc/call.h>
#include <errno.h>
#include <grpc/byte_buffer.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_ERRNOS = sizeof((struct winnow_core_stats *)0)->n_errors /
               sizeof((struct winnow_core_stats *)0)->n_errors[0]
};

static_assert(WINNOW_VERDICT_DEGRADED < 5, "n_steps has a place a verdict");
static_assert(sizeof((struct winnow_rpc_row *)0)->name ==
                  sizeof((struct winnow_registry_session *)0)->name,
              "what is shown of a session");
static_assert(sizeof((struct winnow_rpc_row *)0)->label ==
                  sizeof((struct winnow_registry_session *)0)->label,
              "a copy");

static void ask(struct winnow_rpc_call *call, uint64_t session_id, uint64_t owner)
{
    winnow_assert(!call->own.is_busy);
    struct winnow_request *request = &call->own.request;
    memset(request, 0, sizeof *request);
    request->kind = WINNOW_REQUEST_STATS;
    request->owner = owner;
    request->session_id = session_id;
    request->deadline_ns =
        winnow_rpc_call_deadline(call, 0, WINNOW_CONTROL_DEFAULT_S * WINNOW_NS_PER_S);
    call->own.call = call;
    winnow_rpc_submit(&call->own);
}

static uint64_t read_status_kib(const char *key)
{
    char line[128];
    uint64_t kib = 0;
    FILE *file = fopen("/proc/self/status", "re");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, key, strlen(key)))
            kib = strtoull(line + strlen(key), NULL, 10);
    if (file)
        fclose(file);
    return kib;
}

static float mean_of(const struct winnow_core_stats *stats)
{
    return stats->n_mass ? (float)((double)stats->mass_sum_micro / 1e6 / (double)stats->n_mass)
                         : 0.0F;
}

static void set_totals(const struct winnow_core_stats *stats, Winnow__V1__StatsReply *reply)
{
    reply->tokens_held = stats->n_tokens_held;
    reply->tokens_sealed = stats->n_tokens_sealed;
    reply->kv_bytes = stats->kv_bytes;
    reply->kv_host_bytes = stats->kv_host_bytes;
    reply->kv_disk_bytes = stats->kv_disk_bytes;
    reply->pool_tail_bytes = stats->pool_tail_bytes;
    reply->pool_cache_bytes = stats->pool_cache_bytes;
    reply->pool_staging_bytes = stats->pool_staging_bytes;
    reply->pool_free_bytes = stats->pool_free_bytes;
    reply->pool_cap_bytes = stats->pool_cap_bytes;
    reply->index_bytes = stats->index_bytes;
    reply->index_cap_bytes = stats->index_cap_bytes;
    reply->steps_exact = stats->n_steps[WINNOW_VERDICT_EXACT];
    reply->steps_met = stats->n_steps[WINNOW_VERDICT_MET];
    reply->steps_short = stats->n_steps[WINNOW_VERDICT_SHORT];
    reply->steps_degraded = stats->n_steps[WINNOW_VERDICT_DEGRADED];
    reply->second_rounds = stats->n_second_rounds;
    reply->exact_windows = stats->n_exact_windows;
    reply->blocks_total = stats->n_blocks_total;
    reply->blocks_device = stats->n_blocks_device;
    reply->blocks_host = stats->n_blocks_host;
    reply->blocks_disk = stats->n_blocks_disk;
    reply->read_bytes_attend = stats->read_bytes_attend;
    reply->read_bytes_exact = stats->read_bytes_exact;
    reply->read_bytes_readahead = stats->read_bytes_readahead;
    reply->read_bytes_truncate = stats->read_bytes_truncate;
    reply->written_bytes = stats->written_bytes;
    reply->mass_mean = mean_of(stats);
    reply->device_steps = stats->n_device_steps;
    reply->device_launches = stats->n_device_launches;
    reply->device_hits = stats->device.n_hits;
    reply->device_misses = stats->device.n_misses;
    reply->device_evictions = stats->device.n_evictions;
    reply->device_unfit = stats->device.n_unfit;
    reply->device_windows = stats->n_device_windows;
}

static void set_daemon(const struct winnow_rpc *rpc, const struct winnow_store_facts *facts,
                       Winnow__V1__StatsReply *reply)
{
    reply->sessions_open = winnow_registry_session_count(rpc->registry);
    reply->disk_used_bytes = facts->used_bytes;
    reply->disk_allocated_bytes = facts->allocated_bytes;
    reply->disk_cap_bytes = facts->disk_cap_bytes;
    reply->io_method = (char *)facts->io.method;
    reply->io_flags = (char *)facts->io.flags;
    reply->io_remedy = (char *)facts->io.remedy;
    reply->io_direct = facts->io.direct;
    reply->io_errors = facts->errors_crc + facts->errors_io;
    reply->io_timeouts = facts->timeouts;
    reply->disk_stuck = facts->stuck;
    reply->step_p50_us = (uint64_t)winnow_journal_step_ns(&rpc->journal, 0.5) / WINNOW_NS_PER_US;
    reply->step_p99_us = (uint64_t)winnow_journal_step_ns(&rpc->journal, 0.99) / WINNOW_NS_PER_US;
    reply->io_p99_us = (uint64_t)winnow_journal_read_ns(&rpc->journal, 0.99) / WINNOW_NS_PER_US;
    reply->tokens_per_s = (float)winnow_journal_tokens_per_s(&rpc->journal);
    reply->uptime_s = (uint64_t)((winnow_clock_now_ns() - rpc->started_ns) / WINNOW_NS_PER_S);
    reply->rss_bytes = read_status_kib("VmRSS:") << 10;
    reply->rss_peak_bytes = read_status_kib("VmHWM:") << 10;
    reply->printed_bytes = winnow_limits_sum_bytes(rpc->limits);
    bool is_degraded = facts->degraded || facts->stuck || rpc->is_gpu_lost;
    reply->state = (char *)(rpc->is_draining ? "draining" : is_degraded ? "degraded" : "ready");
    reply->gpu = (char *)(rpc->is_gpu_lost                 ? "lost"
                          : winnow_core_has_gpu(rpc->core) ? "ready"
                                                           : "off");
    reply->kernels = (char *)rpc->kernels_name;
    reply->threads = rpc->limits->n_threads;
}

static void answer(struct winnow_rpc_call *call)
{
    winnow_assert(call->stats.n_rows <= WINNOW_WIRE_N_ROWS_MAX);
    winnow_assert(call->stats.is_everything || !call->stats.n_rows);
    struct winnow_rpc_stats *state = &call->stats;
    Winnow__V1__StatsReply reply = WINNOW__V1__STATS_REPLY__INIT;
    struct winnow_store_facts facts = {.io = {.method = "none"}};
    if (call->rpc->store)
        winnow_store_facts(call->rpc->store, &facts);
    set_totals(&state->total, &reply);
    set_daemon(call->rpc, &facts, &reply);

    Winnow__V1__SessionRow *rows[WINNOW_WIRE_N_ROWS_MAX];
    for (uint32_t i = 0; i < state->n_rows; i++)
        rows[i] = &state->row[i].row;
    reply.sessions = rows;
    reply.n_sessions = state->n_rows;

    Winnow__V1__ErrorCount error[N_ERRNOS], *errors[N_ERRNOS];
    for (int i = 1; i < N_ERRNOS; i++) {
        if (!state->total.n_errors[i] || !strerrorname_np(i))
            continue;
        Winnow__V1__ErrorCount *count = &error[reply.n_errors];
        winnow__v1__error_count__init(count);
        count->reason = (char *)strerrorname_np(i);
        count->n = state->total.n_errors[i];
        errors[reply.n_errors++] = count;
    }
    winnow_assert(reply.n_errors < N_ERRNOS);
    reply.errors = errors;
    winnow_rpc_call_answer(call, &reply);
}

static void set_row(struct winnow_rpc_row *row, const struct winnow_registry_session *session,
                    const struct winnow_core_stats *stats)
{
    memcpy(row->name, session->name, sizeof row->name);
    strcpy(row->label, session->label);
    winnow__v1__session_row__init(&row->row);
    row->row.name = (ProtobufCBinaryData){sizeof row->name, row->name};
    row->row.label = row->label;
    row->row.tokens_held = stats->n_tokens_held;
    row->row.tokens_sealed = stats->n_tokens_sealed;
    row->row.kv_bytes = stats->kv_bytes;
    row->row.kv_host_bytes = stats->kv_host_bytes;
    row->row.kv_disk_bytes = stats->kv_disk_bytes;
    row->row.mass_mean = mean_of(stats);
    if (stats->n_blocks_total)
        row->row.share_read =
            (float)((double)(stats->n_blocks_device + stats->n_blocks_host + stats->n_blocks_disk) /
                    (double)stats->n_blocks_total);
    for (uint32_t i = 0; i < 5; i++)
        row->row.n_steps += stats->n_steps[i];
    row->row.state = (char *)(!stats->n_tokens_held     ? "empty"
                              : !stats->n_tokens_sealed ? "short: all read"
                              : !row->row.n_steps       ? "prefill"
                                                        : "decode");
}

/* The next session's row, or the answer. */
static void next_row(struct winnow_rpc_call *call)
{
    winnow_assert(call->stats.is_everything);
    winnow_assert(call->stats.row);
    struct winnow_rpc_stats *state = &call->stats;
    struct winnow_registry *registry = call->rpc->registry;
    while (state->n_rows < WINNOW_WIRE_N_ROWS_MAX &&
           state->session_idx < winnow_registry_session_places(registry)) {
        struct winnow_registry_session *session =
            winnow_registry_session_at(registry, state->session_idx++);
        if (!session)
            continue;
        state->session_id = session->id;
        ask(call, session->id, session->lease->id);
        return;
    }
    answer(call);
}

static void stats_message(struct winnow_rpc_call *call, const struct winnow_wire_message *message)
{
    const Winnow__V1__StatsRequest *request = message->message;
    if (request->token.len && !request->session) { /* all of the lease's own */
        const struct winnow_lease *lease =
            winnow_lease_find(call->rpc->registry, request->token.data, request->token.len);
        if (lease)
            ask(call, 0, lease->id);
        else
            winnow_rpc_call_fail(call, -ESTALE, "no such lease. hint: take one");
        return;
    }
    if (request->session) {
        if (winnow_rpc_session(call, &request->token, request->session))
            ask(call, request->session, call->lease_id);
        return;
    }
    winnow_assert(!call->stats.row);
    call->stats.is_everything = true;
    call->stats.row = winnow_alloc_array(WINNOW_WIRE_N_ROWS_MAX, sizeof *call->stats.row);
    if (!call->stats.row)
        winnow_rpc_call_fail(call, -ENOMEM, "no memory for a reply");
    else
        ask(call, 0, 0);
}

static void stats_done(struct winnow_rpc_call *call, struct winnow_rpc_item *item)
{
    struct winnow_rpc_stats *state = &call->stats;
    struct winnow_request *request = &item->request;
    winnow_assert(request->kind == WINNOW_REQUEST_STATS);
    if (!call->is_open)
        return;
    if (!state->session_id) { /* the total, or the one session asked for */
        if (request->status < 0) {
            winnow_rpc_call_fail_request(call, request);
            return;
        }
        state->total = request->stats;
        if (!state->is_everything) {
            answer(call);
            return;
        }
    } else if (!request->status) { /* a session that went meanwhile has no row */
        winnow_assert(state->session_idx);
        winnow_assert(state->n_rows < WINNOW_WIRE_N_ROWS_MAX);
        struct winnow_registry_session *session =
            winnow_registry_session_at(call->rpc->registry, state->session_idx - 1);
        if (session && session->id == state->session_id)
            set_row(&state->row[state->n_rows++], session, &request->stats);
    }
    next_row(call);
}

static void stats_half_close(struct winnow_rpc_call *call)
{
    winnow_rpc_call_fail(call, -EINVAL, "a request message is missing");
}

static void stats_release(struct winnow_rpc_call *call)
{
    winnow_alloc_free(call->stats.row);
}

const struct winnow_rpc_method winnow_rpc_stats = {
    .path = "/winnow.v1.Winnow/Stats",
    .request = &winnow__v1__stats_request__descriptor,
    .message = stats_message,
    .half_close = stats_half_close,
    .done = stats_done,
    .release = stats_release,
};
