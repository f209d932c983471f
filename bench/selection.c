/*
 * bench-selection: which share of the blocks each policy reads on real attention, and whether the
 * mass it asked for is there. The method is bench/trace.h's; figures to reproduce: docs/algorithm.md.
 */
#include "trace.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    uint32_t policy;
} policies[] = {
    {"codes", WINNOW_POLICY_CODES},
    {"moment", WINNOW_POLICY_MOMENT},
    {"tactic", WINNOW_POLICY_TACTIC},
    {"oracle", WINNOW_TRACE_POLICY_ORACLE},
};
static const float masses[] = {0.8f, 0.9f, 0.95f};

enum { N_MASSES = 3, N_CASES_MAX = 4 * N_MASSES };

struct arguments {
    const char *directory, *policy, *kernels;
    struct winnow_trace_options options;
    bool json;
};

static void usage(FILE *out)
{
    fprintf(
        out,
        "usage: bench-selection --traces DIR [--policy codes|moment|tactic|oracle]\n"
        "           [--kernels ref|avx2|avx512] [--segment-tokens N] [--steps N] [--json]\n"
        "\n"
        "Means over the heads of DIR, for mass 0.8, 0.9 and 0.95: share of blocks read and\n"
        "success (true mass >= mass asked, by the fp64 oracle) after round 1 and 2, least mass\n"
        "of all heads and steps, relative error of the output when the unread blocks are\n"
        "dropped, and when they are compensated.\n");
}

static int parse(int argc, char **argv, struct arguments *arguments)
{
    static const struct option options[] = {
        {"traces", required_argument, NULL, 't'},  {"policy", required_argument, NULL, 'p'},
        {"kernels", required_argument, NULL, 'k'}, {"segment-tokens", required_argument, NULL, 's'},
        {"steps", required_argument, NULL, 'n'},   {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},          {0}};
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 't')
            arguments->directory = optarg;
        else if (option == 'p')
            arguments->policy = optarg;
        else if (option == 'k')
            arguments->kernels = optarg;
        else if (option == 's')
            arguments->options.segment_tokens = (uint32_t)strtoul(optarg, NULL, 0);
        else if (option == 'n')
            arguments->options.n_steps = (uint32_t)strtoul(optarg, NULL, 0);
        else if (option == 'j')
            arguments->json = true;
        else if (option == 'h') {
            usage(stdout);
            exit(0);
        } else
            return -EINVAL;
    }
    return arguments->directory && optind == argc ? 0 : -EINVAL;
}

static uint32_t list_cases(const char *policy, struct winnow_trace_case *cases)
{
    uint32_t n = 0;

    for (size_t i = 0; i < sizeof policies / sizeof policies[0]; i++)
        for (size_t m = 0; m < N_MASSES && (!policy || !strcmp(policy, policies[i].name)); m++)
            cases[n++] = (struct winnow_trace_case){policies[i].policy, masses[m]};
    return n;
}

static const char *policy_name(uint32_t policy)
{
    for (size_t i = 0; i < sizeof policies / sizeof policies[0]; i++)
        if (policies[i].policy == policy)
            return policies[i].name;
    return "?";
}

static void print_result(const struct winnow_trace_case *c, const struct winnow_trace_result *r,
                         bool json)
{
    const char *format = json ? "\"policy\": \"%s\", \"blocks\": \"bisect\", \"mass\": %.2f, "
                                "\"share1\": %.5f, \"share2\": %.5f, \"success1\": %.5f, "
                                "\"success2\": %.5f, \"mass_min\": %.5f, \"relerr_drop\": %.5f, "
                                "\"relerr_compensated\": %.5f}"
                              : "%-7s %.2f  %7.5f %7.5f  %7.5f %7.5f  %7.5f  %7.5f %7.5f\n";
    printf(format, policy_name(c->policy), (double)c->mass, r->share1, r->share2, r->success1,
           r->success2, r->mass_min, r->relerr_drop, r->relerr_compensated);
}

static void print_table(const char *name, uint32_t n_cases, const struct winnow_trace_case *cases,
                        const struct winnow_trace_result *result)
{
    printf("%s\npolicy  mass  share1  share2   succ1   succ2    least    drop    compensated\n",
           name);
    for (uint32_t i = 0; i < n_cases; i++)
        print_result(&cases[i], &result[i], false);
}

static void add(struct winnow_trace_result *sum, const struct winnow_trace_result *r, double weight)
{
    sum->share1 += weight * r->share1;
    sum->share2 += weight * r->share2;
    sum->success1 += weight * r->success1;
    sum->success2 += weight * r->success2;
    sum->relerr_drop += weight * r->relerr_drop;
    sum->relerr_compensated += weight * r->relerr_compensated;
    sum->mass_min = fmin(sum->mass_min, r->mass_min);
}

/* Runs all heads; prints each as it ends. Returns the exit status. */
static int run(const struct arguments *arguments, const struct winnow_kernels *kernels,
               const struct winnow_trace_list *list)
{
    struct winnow_trace_case cases[N_CASES_MAX];
    struct winnow_trace_result result[N_CASES_MAX], mean[N_CASES_MAX] = {0};
    uint32_t n_cases = list_cases(arguments->policy, cases);

    for (uint32_t c = 0; c < n_cases; c++)
        mean[c].mass_min = 1;
    if (arguments->json)
        printf("{\"kernels\": \"%s\", \"heads\": [", kernels->name);
    for (uint32_t i = 0; i < list->n_paths; i++) {
        struct winnow_trace trace;
        int rc = winnow_trace_open(list->path[i], &trace);
        if (rc == 0)
            rc = winnow_trace_run(&trace, kernels, &arguments->options, n_cases, cases, result);
        if (rc < 0) {
            fprintf(stderr, "bench-selection: %s: %s\n", list->path[i], strerror(-rc));
            return 1;
        }
        if (!arguments->json)
            print_table(trace.name, n_cases, cases, result);
        for (uint32_t c = 0; c < n_cases; c++) {
            add(&mean[c], &result[c], 1.0 / list->n_paths);
            if (!arguments->json)
                continue;
            printf("%s\n  {\"head\": \"%s\", ", i + c > 0 ? "," : "", trace.name);
            print_result(&cases[c], &result[c], true);
        }
        winnow_trace_close(&trace);
    }
    if (!arguments->json) {
        print_table("mean of all heads", n_cases, cases, mean);
        return 0;
    }
    printf("],\n \"results\": [");
    for (uint32_t c = 0; c < n_cases; c++) {
        printf("%s\n  {", c > 0 ? "," : "");
        print_result(&cases[c], &mean[c], true);
    }
    printf("]}\n");
    return 0;
}

int main(int argc, char **argv)
{
    struct arguments arguments = {0};
    struct winnow_trace_list list;
    struct winnow_trace_case cases[N_CASES_MAX];

    if (parse(argc, argv, &arguments) < 0 || list_cases(arguments.policy, cases) == 0) {
        usage(stderr);
        return 2;
    }
    const struct winnow_kernels *kernels = winnow_kernels_find(arguments.kernels);
    if (!kernels) {
        fprintf(stderr, "bench-selection: kernels '%s': this CPU or build has none\n",
                arguments.kernels);
        return 2;
    }
    int rc = winnow_trace_list_open(arguments.directory, &list);
    if (rc < 0) {
        fprintf(stderr, "bench-selection: %s: no traces (TEXT/layerLL_headH_K.npy): %s\n",
                arguments.directory, strerror(-rc));
        return 2;
    }
    int status = run(&arguments, kernels, &list);
    winnow_trace_list_close(&list);
    return status;
}
