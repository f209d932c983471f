/* Selection, its verification and its compensation, against the sums they are defined by. */
#include "fixture.h"

static const struct winnow_kernels *ref(void)
{
    return winnow_kernels_ref();
}

/* Estimates with a long tail, as attention has; a third of the heads hold much in sinks and tail. */
static void fill_random(struct fixture_selection *f, struct winnow_rng *rng)
{
    uint32_t n_q = f->sel.n_q;
    double spread = 0.5 + 3 * winnow_rng_unit(rng);

    for (uint32_t g = 0; g < n_q; g++)
        f->ln_z[g] = (float)(winnow_rng_below(rng, 3) ? 3 * winnow_rng_normal(rng) : -INFINITY);
    for (uint32_t b = 0; b < f->sel.n_blocks; b++) {
        double shared = spread * winnow_rng_normal(rng);
        for (uint32_t g = 0; g < n_q; g++) {
            f->sel.ln_e[b * n_q + g] = (float)(shared + winnow_rng_normal(rng));
            f->ln_m[b * n_q + g] = f->sel.ln_e[b * n_q + g] + (float)(0.3 * winnow_rng_normal(rng));
        }
    }
}

static double weight(const struct fixture_selection *f, uint32_t b, uint32_t g)
{
    return exp((double)f->sel.ln_e[b * f->sel.n_q + g]);
}

static double total(const struct fixture_selection *f, uint32_t g)
{
    double sum = exp((double)f->ln_z[g]);
    for (uint32_t b = 0; b < f->sel.n_blocks; b++)
        sum += weight(f, b, g);
    return sum;
}

/* Share that sinks, tail and the first n of block_idx hold, of the query head that holds least. */
static double least_share(const struct fixture_selection *f, uint32_t n)
{
    double least = 1;
    for (uint32_t g = 0; g < f->sel.n_q; g++) {
        double sum = exp((double)f->ln_z[g]);
        for (uint32_t i = 0; i < n; i++)
            sum += weight(f, f->sel.block_idx[i], g);
        least = fmin(least, sum / total(f, g));
    }
    return least;
}

static void check_order(const struct winnow_selection *sel)
{
    for (uint32_t i = 0; i + 1 < sel->n_blocks; i++) {
        uint32_t a = sel->block_idx[i], b = sel->block_idx[i + 1];
        CHECK(sel->ln_key[a] > sel->ln_key[b] || (sel->ln_key[a] == sel->ln_key[b] && a < b));
    }
    for (uint32_t i = 0; i < sel->n_blocks; i++)
        CHECK_EQ(sel->selected[sel->block_idx[i]], i < sel->n_selected);
}

/* Every query head gets its mass, one block fewer and some would not; the reserve goes half of the
 * way on; keys are the summed shares. */
static void test_select__shortest_prefix_that_reaches_the_mass(void)
{
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (int i = 0; i < 300; i++) {
        struct fixture_selection f;
        float mass = (float)(0.5 + 0.499 * winnow_rng_unit(&rng));
        double p = (double)mass;
        fixture_selection_init(&f, 1 + (uint32_t)winnow_rng_below(&rng, 16),
                               1 + (uint32_t)winnow_rng_below(&rng, 300), mass);
        fill_random(&f, &rng);
        ref()->select(i % 2 ? WINNOW_POLICY_CODES : WINNOW_POLICY_MOMENT, &f.sel, f.scratch);

        uint32_t n = f.sel.n_selected, n_reserve = f.sel.n_reserve;
        check_order(&f.sel);
        CHECK(n + n_reserve <= f.sel.n_blocks);
        CHECK(least_share(&f, n) >= p - 1e-9);
        CHECK(n == 0 || least_share(&f, n - 1) < p + 1e-9);
        CHECK(least_share(&f, n + n_reserve) >= p + (1 - p) / 2 - 1e-9);
        CHECK(n_reserve == 0 || least_share(&f, n + n_reserve - 1) < p + (1 - p) / 2 + 1e-9);
        for (uint32_t b = 0; b < f.sel.n_blocks; b++) {
            double key = 0;
            for (uint32_t g = 0; g < f.sel.n_q; g++)
                key += weight(&f, b, g) / total(&f, g);
            CHECK_NEAR(f.sel.ln_key[b], log(key), 2e-5);
        }
        fixture_selection_finish(&f);
    }
}

/* A head whose sinks and tail hold the mass selects nothing; so does one with no blocks. */
static void test_select__nothing_when_residents_suffice(void)
{
    struct fixture_selection f;
    fixture_selection_init(&f, 2, 5, 0.9f);
    for (int i = 0; i < 10; i++)
        f.sel.ln_e[i] = -3;
    f.ln_z[0] = f.ln_z[1] = 2;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 0);
    CHECK_EQ(f.sel.block_idx[0], 0); /* ties by number */
    CHECK_EQ(f.sel.block_idx[4], 4);
    f.ln_z[1] = -2; /* one head short: the list is for all */
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK(f.sel.n_selected > 0);
    f.sel.n_blocks = 0;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 0);
    CHECK_EQ(f.sel.n_reserve, 0);
    fixture_selection_finish(&f);
}

/* Blocks in any order give the same blocks and the same bits: the sums have no order. */
static void test_select__same_bits_in_any_order(void)
{
    enum { N = 257, N_Q = 3 };
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (int i = 0; i < 40; i++) {
        struct fixture_selection f, shuffled;
        uint32_t to[N];
        fixture_selection_init(&f, N_Q, N, 0.9f);
        fixture_selection_init(&shuffled, N_Q, N, 0.9f);
        fill_random(&f, &rng);
        for (uint32_t b = 0; b < N; b++)
            to[b] = b;
        for (uint32_t b = N - 1; b > 0; b--) {
            uint32_t other = (uint32_t)winnow_rng_below(&rng, b + 1), kept = to[b];
            to[b] = to[other];
            to[other] = kept;
        }
        for (uint32_t b = 0; b < N; b++) {
            memcpy(shuffled.sel.ln_e + to[b] * N_Q, f.sel.ln_e + b * N_Q, N_Q * sizeof(float));
            memcpy(shuffled.ln_m + to[b] * N_Q, f.ln_m + b * N_Q, N_Q * sizeof(float));
        }
        memcpy(shuffled.ln_z, f.ln_z, N_Q * sizeof(float));

        float rho[2][N_Q], mass[2][N_Q];
        ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
        ref()->select(WINNOW_POLICY_CODES, &shuffled.sel, shuffled.scratch);
        uint32_t n_more = ref()->select_more(&f.sel, rho[0], mass[0], 1, f.scratch);
        CHECK_EQ(ref()->select_more(&shuffled.sel, rho[1], mass[1], 1, shuffled.scratch), n_more);
        CHECK_EQ(shuffled.sel.n_selected, f.sel.n_selected);
        CHECK(!memcmp(rho[0], rho[1], sizeof rho[0]) && !memcmp(mass[0], mass[1], sizeof mass[0]));
        for (uint32_t b = 0; b < N; b++) {
            CHECK_EQ(shuffled.sel.selected[to[b]], f.sel.selected[b]);
            CHECK(shuffled.sel.ln_key[to[b]] == f.sel.ln_key[b]);
        }
        fixture_selection_finish(&f);
        fixture_selection_finish(&shuffled);
    }
}

/* What has no estimate is read first, and counts for nothing until it was. */
static void test_select__unknown_blocks_come_first(void)
{
    struct fixture_selection f;
    float rho[2], mass[2];
    fixture_selection_init(&f, 2, 100, 0.8f);
    for (uint32_t i = 0; i < 200; i++)
        f.sel.ln_e[i] = f.ln_m[i] = -(float)(i / 2) / 10;
    f.ln_z[0] = f.ln_z[1] = -INFINITY;
    f.sel.ln_e[2 * 70] = NAN;
    f.sel.ln_e[2 * 50 + 1] = INFINITY;
    f.sel.ln_e[2 * 99] = -INFINITY; /* known: no mass */
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.block_idx[0], 50);
    CHECK_EQ(f.sel.block_idx[1], 70);
    CHECK_EQ(f.sel.block_idx[2], 0);
    CHECK(f.sel.n_selected >= 10 && f.sel.n_selected < 50);
    CHECK_EQ(f.sel.selected[99], 0);
    ref()->select_more(&f.sel, rho, mass, 1, f.scratch);
    CHECK(mass[0] >= 0.8f && mass[1] >= 0.8f);

    f.ln_z[0] = f.ln_z[1] =
        20; /* sinks and tail hold the mass: the unknown are read all the same */
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 2);
    f.ln_z[0] = f.ln_z[1] = -INFINITY;

    f.sel.n_blocks_max = 1; /* the cap leaves one out: nothing can be certified */
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 1);
    CHECK_EQ(ref()->select_more(&f.sel, rho, mass, 1, f.scratch), 0);
    CHECK(mass[0] == 0 && mass[1] == 0);
    fixture_selection_finish(&f);
}

/* A budget ends the prefix, and the second round; the certificate says what that cost. */
static void test_select__budget_ends_the_prefix(void)
{
    struct fixture_selection f;
    float rho, mass;
    fixture_selection_init(&f, 1, 100, 0.9f);
    f.ln_z[0] = -INFINITY;
    f.sel.n_blocks_max = 30;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch); /* all ln_e 0 */
    CHECK_EQ(f.sel.n_selected, 30);
    CHECK_EQ(f.sel.n_reserve, 65);
    CHECK_EQ(ref()->select_more(&f.sel, &rho, &mass, 1, f.scratch), 0);
    CHECK_NEAR(mass, 0.3, 1e-6);
    fixture_selection_finish(&f);
}

/* Policy exact takes all, rising, and reads no estimate. */
static void test_select__exact_takes_all(void)
{
    struct fixture_selection f;
    fixture_selection_init(&f, 1, 33, 0.9f);
    for (uint32_t b = 0; b < 33; b++)
        f.sel.ln_e[b] = NAN;
    ref()->select(WINNOW_POLICY_EXACT, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 33);
    CHECK_EQ(f.sel.n_reserve, 0);
    for (uint32_t b = 0; b < 33; b++)
        CHECK(f.sel.block_idx[b] == b && f.sel.selected[b] == 1);
    fixture_selection_finish(&f);
}

/* rho: exact over estimated mass of the last quarter, at least four blocks, within 1 to 8. */
static double expected_rho(const struct fixture_selection *f, uint32_t n_selected, uint32_t g)
{
    uint32_t n_quarter = (n_selected + 3) / 4 > 4 ? (n_selected + 3) / 4 : 4;
    double sum_m = 0, sum_e = 0;

    if (n_quarter > n_selected)
        n_quarter = n_selected;
    for (uint32_t i = n_selected - n_quarter; i < n_selected; i++) {
        sum_e += weight(f, f->sel.block_idx[i], g);
        sum_m += exp((double)f->ln_m[f->sel.block_idx[i] * f->sel.n_q + g]);
    }
    return sum_e > 0 ? fmin(fmax(sum_m / sum_e, 1), 8) : 1;
}

static double expected_mass(const struct fixture_selection *f, double rho, uint32_t g)
{
    double read = exp((double)f->ln_z[g]), rest = 0;
    for (uint32_t b = 0; b < f->sel.n_blocks; b++) {
        if (f->sel.selected[b])
            read += exp((double)f->ln_m[b * f->sel.n_q + g]);
        else
            rest += weight(f, b, g);
    }
    return read / (read + rho * rest);
}

/* The certificate is what it is defined to be; short of P, more is selected until the priced
 * estimate reaches it, and no more; afterwards rho stays. */
static void test_verify__certificate_and_second_round(void)
{
    struct winnow_rng rng;
    uint32_t n_second_rounds = 0;
    winnow_rng_init(&rng, test_seed());

    for (int i = 0; i < 300; i++) {
        struct fixture_selection f;
        float rho[16], mass[16], least = 1;
        uint32_t n_q = 1 + (uint32_t)winnow_rng_below(&rng, 4);
        fixture_selection_init(&f, n_q, 1 + (uint32_t)winnow_rng_below(&rng, 200), 0.9f);
        fill_random(&f, &rng);
        for (uint32_t j = 0; j < f.sel.n_blocks * n_q; j++)
            f.ln_m[j] -= (float)(i % 3 - 1); /* estimates too high, right, too low */
        ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
        uint32_t n_first = f.sel.n_selected,
                 n_more = ref()->select_more(&f.sel, rho, mass, 1, f.scratch);
        CHECK_EQ(f.sel.n_selected, n_first + n_more);
        for (uint32_t j = 0; j < f.sel.n_blocks; j++) {
            uint8_t mark = f.sel.selected[f.sel.block_idx[j]];
            CHECK_EQ(mark, j < n_first ? 1 : j < n_first + n_more ? 2 : 0);
            if (mark == 2)
                f.sel.selected[f.sel.block_idx[j]] = 0; /* as it was when it was judged */
        }
        for (uint32_t g = 0; g < n_q; g++) {
            CHECK_NEAR(rho[g], expected_rho(&f, n_first, g), 1e-4 * (double)rho[g]);
            CHECK_NEAR(mass[g], expected_mass(&f, (double)rho[g], g), 1e-6);
            least = fminf(least, mass[g]);
        }
        CHECK((n_more > 0) == (least < 0.9f));
        for (uint32_t stop = n_more > 0 ? n_more - 1 : 0; stop <= n_more; stop++) {
            double reached = 1;
            for (uint32_t g = 0; g < n_q; g++) {
                double rest = 0, added = 0, read = exp((double)f.ln_z[g]);
                for (uint32_t j = 0; j < f.sel.n_blocks; j++) {
                    uint32_t b = f.sel.block_idx[j];
                    read += j < n_first ? exp((double)f.ln_m[b * n_q + g]) : 0;
                    rest += j >= n_first ? weight(&f, b, g) : 0;
                    added += j >= n_first && j < n_first + stop ? weight(&f, b, g) : 0;
                }
                reached =
                    fmin(reached, (read + (double)rho[g] * added) / (read + (double)rho[g] * rest));
            }
            CHECK(n_more == 0 || (stop < n_more ? reached < 0.9 + 1e-6 : reached >= 0.9 - 1e-6));
        }
        if (n_more > 0) {
            float rho_before[16], mass_after[16];
            n_second_rounds++;
            for (uint32_t j = n_first; j < n_first + n_more; j++)
                f.sel.selected[f.sel.block_idx[j]] = 2;
            memcpy(rho_before, rho, sizeof rho);
            CHECK_EQ(ref()->select_more(&f.sel, rho, mass_after, 0, f.scratch), 0);
            CHECK(!memcmp(rho_before, rho, n_q * sizeof *rho));
            for (uint32_t g = 0; g < n_q; g++)
                CHECK_NEAR(mass_after[g], expected_mass(&f, (double)rho[g], g), 1e-6);
        }
        fixture_selection_finish(&f);
    }
    CHECK(n_second_rounds > 20 && n_second_rounds < 280);
}

/* rho at its edges: nothing selected 1; no estimated mass 8, or 1 when there is no exact mass
 * either; never above 8. */
static void test_verify__rho_at_its_edges(void)
{
    static const struct {
        float ln_z, ln_e, ln_m, rho;
    } edges[] = {
        {10, -1, -1, 1},
        {-1, -1, 9, 8},
        {-1, -1, -5, 1},
        {-1, -1, 0, 2.7182818f},
    };
    struct fixture_selection f;
    float rho, mass;

    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        fixture_selection_init(&f, 1, 8, 0.9f);
        f.ln_z[0] = edges[i].ln_z;
        for (uint32_t b = 0; b < 8; b++) {
            f.sel.ln_e[b] = edges[i].ln_e;
            f.ln_m[b] = edges[i].ln_m;
        }
        ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
        ref()->select_more(&f.sel, &rho, &mass, 1, f.scratch);
        CHECK_NEAR(rho, edges[i].rho, 1e-5);
        fixture_selection_finish(&f);
    }
    /* one block, its estimate nothing beside the sinks, needed by no one but forced */
    fixture_selection_init(&f, 2, 2, 0.9f);
    f.ln_z[0] = 0;
    f.ln_z[1] = -INFINITY;
    f.sel.ln_e[0] = -60;
    f.sel.ln_e[1] = f.ln_m[1] = 0;
    f.sel.ln_e[2] = -60;
    f.sel.ln_e[3] = -1;
    f.ln_m[0] = -1;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    float rhos[2], masses[2];
    ref()->select_more(&f.sel, rhos, masses, 1, f.scratch);
    CHECK(rhos[0] == 8);
    fixture_selection_finish(&f);
}

/* A selected block that was lost counts by its estimate again, and prices nothing. */
static void test_verify__lost_block_lowers_the_certificate(void)
{
    struct fixture_selection f;
    float rho = 1, whole, without;
    fixture_selection_init(&f, 1, 40, 0.9f);
    f.ln_z[0] = -INFINITY;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 36);
    ref()->select_more(&f.sel, &rho, &whole, 0, f.scratch);
    f.sel.selected[f.sel.block_idx[34]] = 0; /* of the last quarter */
    f.ln_m[f.sel.block_idx[34]] = 3;         /* never attended: anything may stand here */
    ref()->select_more(&f.sel, &rho, &without, 1, f.scratch);
    CHECK(rho == 1);
    CHECK_NEAR(without, 35.0 / 40, 1e-6);
    fixture_selection_finish(&f);
}

/* Probes stand with their exact mass and so price nothing: only estimates do. */
static void test_verify__probes_do_not_price(void)
{
    struct fixture_selection f;
    float rho, certificate;
    fixture_selection_init(&f, 1, 10, 0.9f);
    f.ln_z[0] = -INFINITY;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 9);
    for (uint32_t i = 0; i < 9; i++) {
        f.sel.selected[f.sel.block_idx[i]] = i < 7 ? 3 : 1;
        f.ln_m[f.sel.block_idx[i]] = i < 7 ? 0 : logf(3);
    }
    ref()->select_more(&f.sel, &rho, &certificate, 1, f.scratch);
    CHECK_NEAR(rho, 3, 1e-5);
    fixture_selection_finish(&f);
}

/* Compensation adds each near block by its own mean and the far ones by the segment's. */
static void test_compensate__weighs_what_was_not_read(void)
{
    enum { N = 20, N_Q = 2, FIRST = 5, N_BLOCKS = 30, WIDTH = 16 };
    struct winnow_model_shape shape = fixture_shape(N_Q, 16, WIDTH, WINNOW_FP16);
    struct fixture_segment segment;
    struct fixture_selection f;
    struct winnow_rng rng;
    float partial[N_Q * (WIDTH + 2)], before[N_Q * (WIDTH + 2)];
    winnow_rng_init(&rng, test_seed());
    fixture_segment_init(&segment, &shape, N);
    for (uint32_t i = 0; i < segment.n_tokens * 16; i++)
        segment.k[i] = segment.v[i] = (float)winnow_rng_normal(&rng);
    CHECK_EQ(fixture_segment_build(&segment), 0);
    fixture_selection_init(&f, N_Q, N_BLOCKS, 0.9f);
    for (uint32_t g = 0; g < N_Q; g++)
        f.ln_z[g] = -INFINITY;
    for (uint32_t b = 0; b < N_BLOCKS; b++) /* a third each selected, near, far */
        for (uint32_t g = 0; g < N_Q; g++)
            f.sel.ln_e[b * N_Q + g] =
                (float)(b % 3 == 0 ? 0 : (b % 3 == 1 ? -6 : -12) + 0.5 * winnow_rng_unit(&rng));
    f.sel.ln_e[9 * N_Q] = -INFINITY;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, N_BLOCKS / 3);
    f.sel.ln_e[8 * N_Q] = NAN; /* unknown: goes in nowhere */

    for (uint32_t g = 0; g < N_Q; g++)
        for (uint32_t i = 0; i < WIDTH + 2; i++) /* one head goes on, one begins */
            before[g * (WIDTH + 2) + i] = g == 1 ? (i ? 0 : -INFINITY) : i ? 0.5f + (float)i : -6;
    memcpy(partial, before, sizeof partial);
    ref()->compensate(&shape, &segment.view, &f.sel, FIRST, partial);
    float near = f.sel.ln_key[f.sel.block_idx[f.sel.n_selected - 1]] - 8;
    uint32_t n_near = 0, n_far = 0;
    for (uint32_t g = 0; g < N_Q; g++) {
        const float *was = before + g * (WIDTH + 2), *is = partial + g * (WIDTH + 2);
        double l = (double)was[1] * exp((double)was[0]), o[WIDTH];
        for (uint32_t d = 0; d < WIDTH; d++)
            o[d] = (double)was[2 + d] * exp((double)was[0]);
        for (uint32_t b = FIRST; b < FIRST + N; b++) {
            if (f.sel.selected[b] || isnan(f.sel.ln_e[b * N_Q + g]))
                continue;
            bool is_near = f.sel.ln_key[b] >= near;
            n_near += is_near;
            n_far += !is_near;
            l += weight(&f, b, g);
            for (uint32_t d = 0; d < WIDTH; d++)
                o[d] +=
                    weight(&f, b, g) * (is_near ? (double)segment.view.head[b - FIRST].vmean_scale *
                                                      segment.view.vmean[(b - FIRST) * WIDTH + d]
                                                : (double)segment.view.mean_v[d]);
        }
        CHECK_NEAR((double)is[0] + log((double)is[1]), log(l), 1e-5);
        for (uint32_t d = 0; d < WIDTH; d++)
            CHECK_NEAR(is[2 + d] / is[1], o[d] / l, 1e-5 + 1e-6 * fabs(o[d] / l));
    }
    CHECK(n_near > 0 && n_far > 0);
    fixture_selection_finish(&f);
    fixture_segment_finish(&segment);
}

/* With everything selected compensation changes nothing; with nothing attended it is all there is. */
static void test_compensate__all_and_nothing(void)
{
    struct winnow_model_shape shape = fixture_shape(1, 16, 16, WINNOW_FP16);
    struct fixture_segment segment;
    struct fixture_selection f;
    float partial[18] = {-INFINITY}, before[18];
    fixture_segment_init(&segment, &shape, 4);
    for (uint32_t i = 0; i < segment.n_tokens * 16; i++)
        segment.v[i] = 3;
    CHECK_EQ(fixture_segment_build(&segment), 0);
    fixture_selection_init(&f, 1, 4, 0.9f);
    f.ln_z[0] = -INFINITY;
    ref()->select(WINNOW_POLICY_CODES, &f.sel, f.scratch);
    CHECK_EQ(f.sel.n_selected, 4);
    memcpy(before, partial, sizeof partial);
    ref()->compensate(&shape, &segment.view, &f.sel, 0, partial);
    CHECK(!memcmp(before, partial, sizeof partial));
    memset(f.sel.selected, 0, 4);
    ref()->compensate(&shape, &segment.view, &f.sel, 0, partial);
    CHECK_NEAR(partial[0] + logf(partial[1]), log(4), 1e-6);
    CHECK_NEAR(partial[2] / partial[1], 3, 0.02);
    fixture_selection_finish(&f);
    fixture_segment_finish(&segment);
}

/* Tokens whose mass is a / x + b at rank x: block i of query head g's order holds this much. */
static double curve_block(uint32_t i, double a, double b)
{
    double sum = 0;
    for (uint32_t x = 16 * i + 1; x <= 16 * i + 16; x++)
        sum += fmax(a / x + b, 0);
    return sum;
}

/* Where the masses follow the curve, tactic finds it and reads what is needed: few probes, and each
 * head's list ends where its true mass is reached. */
static void test_tactic__fits_the_curve_it_assumes(void)
{
    enum { N = 480, N_Q = 2 };
    static const double a[N_Q] = {50, 20}, b[N_Q] = {0.001, 0.01};
    struct fixture_selection f;
    uint32_t n_needed = 0;
    fixture_selection_init(&f, N_Q, N, 0.9f);
    for (uint32_t g = 0; g < N_Q; g++) {
        f.ln_z[g] = -INFINITY;
        double all = 0, sum = 0;
        for (uint32_t i = 0; i < N; i++) {
            uint32_t block = i * 7 % N; /* both heads order alike */
            f.sel.ln_e[block * N_Q + g] = -(float)i;
            f.ln_m[block * N_Q + g] = NAN; /* only what is probed may be read */
            all += curve_block(i, a[g], b[g]);
        }
        for (uint32_t i = 0; i < N && sum < 0.9 * all; i++) {
            sum += curve_block(i, a[g], b[g]);
            n_needed = i + 1 > n_needed ? i + 1 : n_needed;
        }
    }
    uint32_t n_probes = ref()->probe(&f.sel, f.scratch);
    CHECK_EQ(n_probes, 10 + 2 + 2); /* 2 % and two windows of 19 tokens */
    CHECK_EQ(f.sel.selected[N / 10 * 7 % N], 3);
    CHECK_EQ(f.sel.selected[N * 3 / 5 * 7 % N], 3);
    for (uint32_t i = 0; i < n_probes; i++) {
        uint32_t block = f.sel.block_idx[i];
        CHECK_EQ(f.sel.selected[block], 3);
        CHECK(i == 0 || block > f.sel.block_idx[i - 1]);
        for (uint32_t g = 0; g < N_Q; g++)
            f.ln_m[block * N_Q + g] =
                (float)log(curve_block((uint32_t)-f.sel.ln_e[block * N_Q + g], a[g], b[g]));
    }
    ref()->select(WINNOW_POLICY_TACTIC, &f.sel, f.scratch);
    CHECK_NEAR(f.sel.n_selected, n_needed, 3 + 0.02 * n_needed);
    for (uint32_t i = 0; i < f.sel.n_selected; i++)
        CHECK_EQ(f.sel.selected[f.sel.block_idx[i]], i < n_probes ? 3 : 1);
    for (uint32_t i = 10; i < N; i++) /* the estimate it leaves is the curve's */
        for (uint32_t g = 0; g < N_Q; g++)
            CHECK_NEAR(f.sel.ln_e[i * 7 % N * N_Q + g], log(curve_block(i, a[g], b[g])), 0.03);
    fixture_selection_finish(&f);
}

/* Few blocks, or none, are no trouble to the fit. */
static void test_tactic__short_contexts(void)
{
    struct winnow_rng rng;
    winnow_rng_init(&rng, test_seed());

    for (uint32_t n = 0; n < 70; n++) {
        struct fixture_selection f;
        float rho[3], mass[3];
        fixture_selection_init(&f, 3, n, 0.9f);
        fill_random(&f, &rng);
        uint32_t n_probes = ref()->probe(&f.sel, f.scratch);
        CHECK(n_probes <= n && (n_probes > 0) == (n > 0));
        ref()->select(WINNOW_POLICY_TACTIC, &f.sel, f.scratch);
        CHECK(f.sel.n_selected >= n_probes && f.sel.n_selected <= n);
        ref()->select_more(&f.sel, rho, mass, 1, f.scratch);
        for (uint32_t g = 0; g < 3; g++)
            CHECK(mass[g] >= 0 && mass[g] <= 1 && rho[g] >= 1 && rho[g] <= 8);
        fixture_selection_finish(&f);
    }
}

int main(int argc, char **argv)
{
    TEST_INIT(argc, argv);
    TEST_RUN(test_select__shortest_prefix_that_reaches_the_mass);
    TEST_RUN(test_select__nothing_when_residents_suffice);
    TEST_RUN(test_select__same_bits_in_any_order);
    TEST_RUN(test_select__unknown_blocks_come_first);
    TEST_RUN(test_select__budget_ends_the_prefix);
    TEST_RUN(test_select__exact_takes_all);
    TEST_RUN(test_verify__certificate_and_second_round);
    TEST_RUN(test_verify__rho_at_its_edges);
    TEST_RUN(test_verify__lost_block_lowers_the_certificate);
    TEST_RUN(test_verify__probes_do_not_price);
    TEST_RUN(test_compensate__weighs_what_was_not_read);
    TEST_RUN(test_compensate__all_and_nothing);
    TEST_RUN(test_tactic__fits_the_curve_it_assumes);
    TEST_RUN(test_tactic__short_contexts);
    return TEST_END();
}
