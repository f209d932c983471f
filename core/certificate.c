// Certificate: what a decode reply says of itself, from the masses of its heads; the counters behind
// Stats; and the flag of heavy heads, which follows the session's own steps.
#include <assert.h>
#include <base/assert.h>
#include <core/session.h>
#include <errno.h>

static_assert(sizeof(((struct winnow_core_stats *)0)->n_steps) / sizeof(uint64_t) ==
                  WINNOW_VERDICT_DEGRADED + 1,
              "a counter a verdict");
/* The least and the mean mass over all query heads. */
static void mass_take(const struct winnow_session *session, struct winnow_core_certificate *c)
{
    uint32_t n_q = session->context->shape.n_q_heads;
    float least = 1, sum = 0;
    for (uint32_t h = 0; h < n_q; h++) {
        float mass = session->op.run->mass[h];
        least = mass < least ? mass : least;
        sum += mass;
    }
    c->mass_reached = least;
    c->mass_mean = sum / (float)n_q;
}

static bool any_sparse(const struct winnow_session *session)
{
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++)
        if (!session->op.run->exact[head] && session->op.run->n_blocks)
            return true;
    return false;
}

static bool budget_ended(const struct winnow_session *session)
{
    const struct winnow_run *run = session->op.run;
    if (session->op.by_device)
        return session->op.budget_spent;
    for (uint32_t head = 0; head < session->context->shape.n_kv_heads; head++)
        if (!run->exact[head] && run->selection[head].n_selected >= session->op.n_blocks_max)
            return session->op.n_blocks_max > 0;
    return false;
}

static void heavy_count(struct winnow_session *session)
{
    const struct winnow_run *run = session->op.run;
    uint32_t n_heads = session->context->shape.n_kv_heads;
    for (uint32_t head = 0; head < n_heads; head++) {
        struct winnow_heavy *heavy = &session->heavy[session->op.layer * n_heads + head];
        if (session->op.whole || session->op.by_device || run->n_blocks == 0)
            continue;
        heavy->n_steps++;
        if (run->exact[head])
            continue;
        float share = (float)run->selection[head].n_selected / (float)run->n_blocks;
        if (heavy->heavy) { /* the step that looks again */
            winnow_assert(session->n_heavy > 0);
            session->n_heavy -= share < 0.15f;
            heavy->heavy = share >= 0.15f;
            heavy->n_steps = 0;
            heavy->share_sum = 0;
            continue;
        }
        heavy->share_sum += share;
        if (heavy->n_steps < WINNOW_HEAVY_STEPS)
            continue;
        heavy->heavy = heavy->share_sum / (float)heavy->n_steps > 0.25f;
        session->n_heavy += heavy->heavy;
        heavy->n_steps = 0;
        heavy->share_sum = 0;
    }
}

static void stats_count(struct winnow_session *session, const struct winnow_core_certificate *c)
{
    struct winnow_core_stats *stats = &session->stats;
    winnow_assert(c->verdict >= WINNOW_VERDICT_EXACT);
    winnow_assert(c->verdict <= WINNOW_VERDICT_DEGRADED);
    stats->n_steps[c->verdict]++;
    stats->n_blocks_total += c->n_blocks_total;
    stats->n_blocks_device += c->n_blocks_device;
    stats->n_blocks_host += c->n_blocks_host;
    stats->n_blocks_disk += c->n_blocks_disk;
    stats->mass_sum_micro += (uint64_t)(c->mass_mean * 1e6f);
    stats->n_mass++;
}

void winnow_certificate_close(struct winnow_core *core, struct winnow_session *session)
{
    struct winnow_op *op = &session->op;
    struct winnow_core_certificate *c = &op->certificate;
    bool may_degrade = winnow_op_may_degrade(session);
    winnow_assert(op->state == WINNOW_OP_STRICT);
    winnow_assert(op->n_items == 0);
    if (!op->by_device)
        mass_take(session, c);
    if (op->whole || !any_sparse(session))
        c->verdict = WINNOW_VERDICT_EXACT;
    else
        c->verdict = c->mass_reached >= op->mass ? WINNOW_VERDICT_MET : WINNOW_VERDICT_SHORT;
    if (c->n_blocks_missed)
        c->verdict = WINNOW_VERDICT_DEGRADED;
    if (c->verdict == WINNOW_VERDICT_SHORT && budget_ended(session)) {
        if (!may_degrade)
            winnow_op_fail(
                op, -ERANGE,
                "mass %.3f reached of %.3f, budget %u spent. hint: budget, allow_degraded",
                (double)c->mass_reached, (double)op->mass, op->n_blocks_max);
        c->verdict = WINNOW_VERDICT_DEGRADED;
        c->reason = ERANGE;
    }
    if (c->verdict == WINNOW_VERDICT_SHORT && session->options.strict && !op->whole)
        return; /* read whole next; counted then */
    int64_t us = (core->now_ns - op->arrived_ns) / 1000;
    c->micros = us > 0 ? (uint32_t)us : 0;
    heavy_count(session);
    stats_count(session, c);
    op->request->attend.certificate = *c;
}
