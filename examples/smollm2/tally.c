#include "tally.h"

#include "fault.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int tally_create(struct tally *tally, uint32_t n_layers)
{
    *tally = (struct tally){.n_layers = n_layers, .mass_worst = 1};
    tally->blocks_total = calloc(n_layers, sizeof *tally->blocks_total);
    tally->blocks_read = calloc(n_layers, sizeof *tally->blocks_read);
    if (tally->blocks_total && tally->blocks_read)
        return 0;
    tally_destroy(tally);
    return fault_set(-ENOMEM, "no memory for a tally of %u layers", n_layers);
}

void tally_destroy(struct tally *tally)
{
    free(tally->step_s);
    free(tally->blocks_total);
    free(tally->blocks_read);
    *tally = (struct tally){0};
}

static int reserve(struct tally *tally, uint64_t n_more)
{
    if (tally->n_steps + n_more <= tally->n_steps_max)
        return 0;
    uint64_t n_steps_max = (tally->n_steps + n_more) * 2;
    float *step_s = realloc(tally->step_s, n_steps_max * sizeof *step_s);
    if (!step_s)
        return fault_set(-ENOMEM, "no memory for the times of %llu steps",
                         (unsigned long long)n_steps_max);
    tally->step_s = step_s;
    tally->n_steps_max = n_steps_max;
    return 0;
}

static void add_layer(struct tally *tally, uint32_t layer, const winnow_certificate *one)
{
    tally->blocks_total[layer] += one->blocks_total;
    tally->blocks_read[layer] +=
        (uint64_t)one->blocks_device + one->blocks_host + one->blocks_disk + one->blocks_remote;
    tally->blocks_device += one->blocks_device;
    tally->blocks_host += one->blocks_host;
    tally->blocks_remote += one->blocks_remote;
    tally->disk_bytes += one->bytes_read;
    tally->n_verdicts[one->verdict <= WINNOW_DEGRADED ? one->verdict : 0]++;
    tally->n_rounds_extra += one->rounds > 1 ? one->rounds - 1 : 0;
    tally->daemon_s += one->micros / 1e6;
    tally->mass_sum += (double)one->mass_mean;
    tally->mass_asked = one->mass_asked;
    tally->mass_worst = fminf(tally->mass_worst, one->mass_reached);
}

int tally_add(struct tally *tally, const winnow_certificate *certificates, double step_s,
              double attend_s)
{
    int is_short = 0;
    int rc = reserve(tally, 1);
    if (rc < 0)
        return rc;
    for (uint32_t layer = 0; layer < tally->n_layers; layer++) {
        add_layer(tally, layer, &certificates[layer]);
        is_short |= certificates[layer].verdict == WINNOW_SHORT;
    }
    tally->n_steps_short += (uint64_t)is_short;
    tally->attend_s += attend_s;
    tally->step_s[tally->n_steps++] = (float)step_s;
    return 0;
}

int tally_merge(struct tally *sum, const struct tally *one)
{
    int rc = reserve(sum, one->n_steps);
    if (rc < 0)
        return rc;
    if (one->n_steps)
        memcpy(sum->step_s + sum->n_steps, one->step_s, one->n_steps * sizeof *sum->step_s);
    sum->n_steps += one->n_steps;
    for (uint32_t layer = 0; layer < sum->n_layers; layer++) {
        sum->blocks_total[layer] += one->blocks_total[layer];
        sum->blocks_read[layer] += one->blocks_read[layer];
    }
    for (uint32_t i = 0; i < 5; i++)
        sum->n_verdicts[i] += one->n_verdicts[i];
    sum->n_steps_short += one->n_steps_short;
    sum->n_rounds_extra += one->n_rounds_extra;
    sum->blocks_device += one->blocks_device;
    sum->blocks_host += one->blocks_host;
    sum->blocks_remote += one->blocks_remote;
    sum->disk_bytes += one->disk_bytes;
    sum->attend_s += one->attend_s;
    sum->daemon_s += one->daemon_s;
    sum->mass_sum += one->mass_sum;
    sum->mass_asked = one->mass_asked;
    sum->mass_worst = fminf(sum->mass_worst, one->mass_worst);
    return 0;
}

static double share(uint64_t read, uint64_t total)
{
    return total ? (double)read / (double)total : 1;
}

double tally_share_read(const struct tally *tally)
{
    uint64_t total = 0, read = 0;
    for (uint32_t layer = 0; layer < tally->n_layers; layer++) {
        total += tally->blocks_total[layer];
        read += tally->blocks_read[layer];
    }
    return share(read, total);
}

double tally_mass_reached(const struct tally *tally)
{
    return tally->n_steps ? tally->mass_sum / (double)(tally->n_steps * tally->n_layers) : 1;
}

void tally_write(const struct tally *tally, struct json *json)
{
    static const char *const names[] = {NULL, "EXACT", "MET", "SHORT", "DEGRADED"};

    json_number(json, "share_read", tally_share_read(tally));
    json_number(json, "mass_reached", tally_mass_reached(tally));
    json_number(json, "mass_worst", (double)tally->mass_worst);
    json_object_begin(json, "verdicts");
    for (uint32_t i = WINNOW_EXACT; i <= WINNOW_DEGRADED; i++)
        if (tally->n_verdicts[i])
            json_count(json, names[i], tally->n_verdicts[i]);
    json_object_end(json);
}

static int float_compare(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void write_times(const struct tally *tally, double total_s, struct json *json)
{
    float *sorted = malloc((tally->n_steps + 1) * sizeof *sorted);

    json_count(json, "tokens", tally->n_steps);
    json_number(json, "tokens_per_s", total_s > 0 ? (double)tally->n_steps / total_s : NAN);
    json_object_begin(json, "step_s");
    if (sorted && tally->n_steps) {
        memcpy(sorted, tally->step_s, tally->n_steps * sizeof *sorted);
        qsort(sorted, tally->n_steps, sizeof *sorted, float_compare);
        json_number(json, "p50", (double)sorted[(tally->n_steps - 1) / 2]);
        json_number(json, "p99", (double)sorted[(tally->n_steps - 1) * 99 / 100]);
    }
    json_object_end(json);
    free(sorted);
}

void tally_write_report(const struct tally *tally, uint64_t block_bytes, struct json *json)
{
    const double n_steps = tally->n_steps ? (double)tally->n_steps : NAN;
    double total_s = 0;

    for (uint64_t i = 0; i < tally->n_steps; i++)
        total_s += (double)tally->step_s[i];
    write_times(tally, total_s, json);
    json_object_begin(json, "token_s");
    json_number(json, "daemon", tally->daemon_s / n_steps);
    json_number(json, "way", (tally->attend_s - tally->daemon_s) / n_steps);
    json_number(json, "engine", (total_s - tally->attend_s) / n_steps);
    json_object_end(json);
    json_object_begin(json, "read_bytes_per_token");
    json_number(json, "device", (double)(tally->blocks_device * block_bytes) / n_steps);
    json_number(json, "host", (double)(tally->blocks_host * block_bytes) / n_steps);
    json_number(json, "disk", (double)tally->disk_bytes / n_steps);
    json_number(json, "remote", (double)(tally->blocks_remote * block_bytes) / n_steps);
    json_object_end(json);
    json_array_begin(json, "share_read_layer");
    for (uint32_t layer = 0; layer < tally->n_layers; layer++)
        json_number(json, NULL, share(tally->blocks_read[layer], tally->blocks_total[layer]));
    json_array_end(json);
    json_number(json, "mass_asked", (double)tally->mass_asked);
    json_count(json, "steps_short", tally->n_steps_short);
    json_count(json, "rounds_extra", tally->n_rounds_extra);
}
