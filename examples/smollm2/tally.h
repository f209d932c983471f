/*
 * What decode steps cost and reached: sums of the certificates over layers and steps.
 */
#pragma once

#include "json.h"

#include <stdint.h>
#include <winnow/winnow.h>

struct tally {
    uint32_t n_layers;
    uint64_t n_steps, n_steps_max;
    float *step_s;                        /* [n_steps] seconds of each, logits included */
    uint64_t *blocks_total, *blocks_read; /* [n_layers] */
    uint64_t n_verdicts[5];               /* by WINNOW_EXACT .. WINNOW_DEGRADED */
    uint64_t n_steps_short, n_rounds_extra;
    uint64_t blocks_device, blocks_host, blocks_remote, disk_bytes;
    double mass_sum;           /* of the items' means */
    double attend_s, daemon_s; /* in winnow_attend, and of that in winnowd */
    float mass_asked, mass_worst;
};

/* -ENOMEM. destroy is fine on a zeroed struct. */
int tally_create(struct tally *tally, uint32_t n_layers);
void tally_destroy(struct tally *tally);

/* certificates [n_layers] of one step that took step_s, attend_s of it in winnow_attend. -ENOMEM */
int tally_add(struct tally *tally, const winnow_certificate *certificates, double step_s,
              double attend_s);
/* sum += one. -ENOMEM */
int tally_merge(struct tally *sum, const struct tally *one);

/* Of the sealed blocks, the share that was read; 1 when there were none. */
double tally_share_read(const struct tally *tally);
/* Mean over steps and layers of what the certificates estimate. */
double tally_mass_reached(const struct tally *tally);

/* Keys share_read, mass_reached, mass_worst and verdicts {name: items} into an open object. */
void tally_write(const struct tally *tally, struct json *json);
/* The keys that report.json has beside them; block_bytes: KV bytes of a block. */
void tally_write_report(const struct tally *tally, uint64_t block_bytes, struct json *json);
