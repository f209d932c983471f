/* Score, selection, certificate and compensation in every version. Rules and tolerances: versions.h. */
#include "versions.h"

static void score_run(const struct winnow_kernels *kernels, uint32_t policy, bool with_var,
                      uint32_t n_blocks, size_t offset, float *ln_e)
{
    struct winnow_index_view view = data.view;
    size_t e_bytes = (size_t)n_blocks * data.n_q * sizeof(float);
    size_t k_width = data.shape.k_width, q_bytes = data.n_q * k_width * sizeof(float);
    struct guarded q, out, centroid, code, scale, var, scratch;

    view.n_blocks = n_blocks;
    view.centroid = guarded_copy(&centroid, view.centroid, n_blocks * k_width, offset);
    view.code = guarded_copy(&code, view.code, n_blocks * k_width * 8, offset);
    view.code_scale = guarded_copy(&scale, view.code_scale, n_blocks * 32, offset);
    view.var = guarded_copy(&var, view.var, n_blocks * k_width * 2, offset);
    if (!with_var)
        view.var = NULL;
    float *at = guarded_init(&out, e_bytes, offset);
    kernels->score(&data.shape, policy, &view, guarded_copy(&q, data.q, q_bytes, offset), at,
                   guarded_init(&scratch, kernels->scratch_bytes(&data.shape, n_blocks), 0));
    memcpy(ln_e, at, e_bytes);
    guarded_finish(&q);
    guarded_finish(&out);
    guarded_finish(&centroid);
    guarded_finish(&code);
    guarded_finish(&scale);
    guarded_finish(&var);
    guarded_finish(&scratch);
}

static void score_check(uint32_t policy, bool with_var, uint32_t n_blocks)
{
    float a[N_BLOCKS * WINNOW_GQA_MAX], moved[N_BLOCKS * WINNOW_GQA_MAX];
    float b[N_BLOCKS * WINNOW_GQA_MAX];

    score_run(version, policy, with_var, n_blocks, 0, a);
    score_run(version, policy, with_var, n_blocks, 4, moved);
    score_run(ref, policy, with_var, n_blocks, 0, b);
    CHECK(!memcmp(a, moved, n_blocks * data.n_q * sizeof(float)));
    for (uint32_t i = 0; i < n_blocks * data.n_q; i++) {
        double tolerance = logit_tolerance(data.q + (size_t)(i % data.n_q) * data.shape.k_width,
                                           16 * data.n_blocks);
        if (isinf(tolerance))
            continue;
        CHECK_EQ(winnow_ref_is_known(a[i]), winnow_ref_is_known(b[i]));
        if (winnow_ref_is_known(b[i]))
            check_close("ln_e", i, (double)a[i], (double)b[i],
                        tolerance + SUM_TOLERANCE + 2e-7 * fabs((double)b[i]));
    }
}

/* Estimates of all policies, for any number of blocks, with and without variances. */
static void test_score(void)
{
    static const uint32_t n_blocks[] = {1, 15, 16, 17, N_BLOCKS};

    for (size_t i = 0; i < sizeof n_blocks / sizeof n_blocks[0]; i++) {
        score_check(WINNOW_POLICY_CODES, false, n_blocks[i]);
        score_check(WINNOW_POLICY_MOMENT, true, n_blocks[i]);
        score_check(WINNOW_POLICY_MOMENT, false, n_blocks[i]);
        score_check(WINNOW_POLICY_TACTIC, false, n_blocks[i]);
    }
}

/* A selection and its arrays, outputs poisoned. */
struct selected {
    struct winnow_selection sel;
    struct guarded key, idx, selected, scratch;
    void *at;
};

static void selected_init(struct selected *s, const struct winnow_kernels *kernels, uint32_t n,
                          uint32_t n_max, const float *ln_z, float *ln_e, const float *ln_m)
{
    s->sel = (struct winnow_selection){
        .n_q = data.n_q,
        .n_blocks = n,
        .n_blocks_max = n_max,
        .mass = 0.9f,
        .ln_z = ln_z,
        .ln_m = ln_m,
        .ln_e = ln_e,
        .ln_key = guarded_init(&s->key, n * sizeof(float), 4),
        .block_idx = guarded_init(&s->idx, n * sizeof(uint32_t), 4),
        .selected = guarded_init(&s->selected, n, 1),
    };
    s->at = guarded_init(&s->scratch, kernels->scratch_bytes(&data.shape, n), 0);
}

static void selected_finish(struct selected *s)
{
    guarded_finish(&s->key);
    guarded_finish(&s->idx);
    guarded_finish(&s->selected);
    guarded_finish(&s->scratch);
}

/* Keys alike; a list in order of its own keys, ties by number, that holds each block once. */
static void selected_check(const struct winnow_selection *a, const struct winnow_selection *b)
{
    uint8_t seen[N_BLOCKS] = {0};
    double largest = 0; /* T_g is as exact as its logarithm can be */

    for (uint32_t i = 0; i < a->n_blocks * a->n_q; i++)
        if (isfinite(a->ln_e[i]))
            largest = fmax(largest, fabs((double)a->ln_e[i]));
    for (uint32_t g = 0; g < a->n_q; g++)
        if (isfinite(a->ln_z[g]))
            largest = fmax(largest, fabs((double)a->ln_z[g]));
    for (uint32_t i = 0; i < a->n_blocks; i++) {
        uint32_t at = a->block_idx[i], before = i ? a->block_idx[i - 1] : 0;
        CHECK(at < a->n_blocks && !seen[at]);
        seen[at] = 1;
        CHECK(i == 0 || a->ln_key[before] > a->ln_key[at] ||
              (a->ln_key[before] == a->ln_key[at] && before < at));
        if (a->ln_key[i] > -80 || b->ln_key[i] > -80) /* below, each may have none */
            check_close("ln_key", i, (double)a->ln_key[i], (double)b->ln_key[i],
                        2e-6 + 4e-7 * largest);
    }
}

/* The first n of the list hold the mass, and one less would not (1e-5: rounding of e). */
static void prefix_check(const struct winnow_selection *sel, uint32_t n, double mass)
{
    for (int shorter = 0; shorter < 2; shorter++) {
        bool all_reach = true, has_unknown = false;
        for (uint32_t g = 0; g < sel->n_q; g++) {
            double sum = exp((double)sel->ln_z[g]), total = sum;
            for (uint32_t i = 0; i < sel->n_blocks; i++) {
                double ln_e = (double)sel->ln_e[(size_t)sel->block_idx[i] * sel->n_q + g];
                bool known = ln_e < INFINITY;
                has_unknown |= !known && i >= n - (uint32_t)shorter;
                total += known ? exp(ln_e) : 0;
                sum += known && i < n - (uint32_t)shorter ? exp(ln_e) : 0;
            }
            all_reach &= sum >= (mass + (shorter ? 1e-5 : -1e-5)) * total;
        }
        CHECK_EQ(shorter ? !all_reach || has_unknown || n == 0 : all_reach && !has_unknown, true);
        if (n == 0)
            break;
    }
}

static void select_check(uint32_t n, uint32_t n_max, const float *ln_z, float *ln_e,
                         const float *ln_m, bool is_plain)
{
    struct selected a, b;
    float rho_a[WINNOW_GQA_MAX], rho_b[WINNOW_GQA_MAX];
    float mass_a[WINNOW_GQA_MAX], mass_b[WINNOW_GQA_MAX];

    selected_init(&a, version, n, n_max, ln_z, ln_e, ln_m);
    selected_init(&b, ref, n, n_max, ln_z, ln_e, ln_m);
    version->select(WINNOW_POLICY_CODES, &a.sel, a.at);
    ref->select(WINNOW_POLICY_CODES, &b.sel, b.at);
    selected_check(&a.sel, &b.sel);
    CHECK(abs((int)a.sel.n_selected - (int)b.sel.n_selected) <= 1);
    if (is_plain) {
        prefix_check(&a.sel, a.sel.n_selected, 0.9);
        prefix_check(&a.sel, a.sel.n_selected + a.sel.n_reserve, 0.95);
    }
    for (uint32_t i = 0; i < n; i++)
        CHECK_EQ(a.sel.selected[a.sel.block_idx[i]], i < a.sel.n_selected);

    /* From here on both go from the same first round. */
    memcpy(a.sel.block_idx, b.sel.block_idx, n * sizeof *b.sel.block_idx);
    memcpy(a.sel.selected, b.sel.selected, n);
    a.sel.n_selected = b.sel.n_selected;
    a.sel.n_reserve = b.sel.n_reserve;
    for (int may_add = 1; may_add >= 0; may_add--) {
        uint32_t n_a = version->select_more(&a.sel, rho_a, mass_a, may_add, a.at);
        uint32_t n_b = ref->select_more(&b.sel, rho_b, mass_b, may_add, b.at);
        CHECK(abs((int)n_a - (int)n_b) <= 1);
        for (uint32_t g = 0; g < data.n_q; g++) {
            check_close("rho", g, (double)rho_a[g], (double)rho_b[g], 1e-4);
            if (n_a == n_b)
                check_close("mass", g, (double)mass_a[g], (double)mass_b[g], 2e-5);
        }
        if (n_a == n_b) {
            CHECK_EQ(a.sel.n_reserve, b.sel.n_reserve);
            CHECK(!memcmp(a.sel.selected, b.sel.selected, n));
        }
    }
    selected_finish(&a);
    selected_finish(&b);
}

/* Selects, certifies and adds as the reference does, with sinks and without, with estimates that
 * are equal, unknown or none, and with a budget that leaves unknown ones out. */
static void test_select(void)
{
    float ln_z[WINNOW_GQA_MAX], *ln_e, *ln_m;
    size_t n = (size_t)N_BLOCKS * data.n_q;
    struct guarded e, m;
    struct winnow_rng rng;

    winnow_rng_init(&rng, test_seed());
    ln_e = guarded_init(&e, n * sizeof(float), 4);
    ln_m = guarded_init(&m, n * sizeof(float), 4);
    for (int kind = 0; kind < 7; kind++)
        for (uint32_t n_blocks = kind == 0 ? 0 : 1; n_blocks <= N_BLOCKS; n_blocks += 12) {
            float spread = data_input == INPUT_HUGE   ? 1000.0f
                           : data_input == INPUT_TINY ? 1e-6f
                                                      : 3;
            for (size_t i = 0; i < n; i++) {
                ln_e[i] = spread * (float)winnow_rng_normal(&rng);
                ln_m[i] = ln_e[i] + 0.3f * (float)winnow_rng_normal(&rng);
            }
            for (uint32_t g = 0; g < data.n_q; g++)
                ln_z[g] = kind == 1 ? -INFINITY : kind == 2 ? 60.0f : 1.0f;
            for (size_t i = 0; kind == 3 && i < n; i++)
                ln_e[i] = ln_m[i] = 0.5f;
            for (size_t i = 0; kind == 4 && i < n; i += 5)
                ln_e[i] = i % 2 ? NAN : INFINITY;
            for (size_t i = 0; kind == 6 && i < n; i += 2)
                ln_e[i] = NAN;
            for (size_t i = 0; kind == 5 && i < n; i++)
                ln_e[i] = ln_m[i] = -INFINITY;
            select_check(n_blocks, kind == 6 ? 3 : n_blocks, ln_z, ln_e, ln_m,
                         kind < 4 && spread < 10);
        }
    guarded_finish(&e);
    guarded_finish(&m);
}

/* Adds unread blocks to a partial, near and far ones, from any block on, as the reference does. */
static void test_compensate(void)
{
    enum { BEFORE = 5 };
    uint32_t n = N_BLOCKS + BEFORE;
    size_t partial_bytes = data.n_partial * sizeof(float);
    float ln_z[WINNOW_GQA_MAX] = {0}, *ln_e = case_alloc(n * data.n_q * sizeof(float));
    struct winnow_selection sel;
    struct winnow_rng rng;
    double v_largest = value_largest();

    winnow_rng_init(&rng, test_seed());
    for (int kind = 0; kind < 4; kind++) {
        struct guarded a, b;
        float *to_a = guarded_init(&a, partial_bytes, 4),
              *to_b = guarded_init(&b, partial_bytes, 0);
        for (uint32_t i = 0; i < n * data.n_q; i++)
            ln_e[i] = kind == 3 ? -INFINITY : 5 * (float)winnow_rng_normal(&rng);
        for (uint32_t i = 0; kind == 2 && i < n * data.n_q; i += 7)
            ln_e[i] = NAN;
        for (uint32_t i = 0; i < data.n_partial; i++)
            to_b[i] = i % (data.shape.v_width + 2) == 1 ? 2.0f : 0.25f;
        for (uint32_t g = 0; g < data.n_q && kind == 1; g++) {
            memset(to_b + g * (data.shape.v_width + 2), 0, partial_bytes / data.n_q);
            to_b[g * (data.shape.v_width + 2)] = -INFINITY;
        }
        memcpy(to_a, to_b, partial_bytes);
        struct selected s;
        selected_init(&s, ref, n, n, ln_z, ln_e, ln_e);
        ref->select(WINNOW_POLICY_CODES, &s.sel, s.at);
        sel = s.sel;
        version->compensate(&data.shape, &data.view, &sel, BEFORE, to_a);
        ref->compensate(&data.shape, &data.view, &sel, BEFORE, to_b);
        for (uint32_t g = 0; g < data.n_q; g++)
            check_partial("compensate", to_a + g * (data.shape.v_width + 2),
                          to_b + g * (data.shape.v_width + 2), 0, fmax(v_largest, 0.25));
        selected_finish(&s);
        guarded_finish(&a);
        guarded_finish(&b);
    }
    winnow_alloc_free(ln_e);
}

static void test_versions__score(void)
{
    each(test_score);
}

static void test_versions__select(void)
{
    each(test_select);
}

static void test_versions__compensate(void)
{
    each(test_compensate);
}

int main(int argc, char **argv)
{
    versions_init(argc, argv);
    TEST_RUN(test_versions__score);
    TEST_RUN(test_versions__select);
    TEST_RUN(test_versions__compensate);
    return TEST_END();
}
