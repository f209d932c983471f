#include <client/client.h>

#include <assert.h>

static_assert((int)WINNOW_EXACT == (int)WINNOW__V1__VERDICT__VERDICT_EXACT, "as on the wire");
static_assert((int)WINNOW_MET == (int)WINNOW__V1__VERDICT__VERDICT_MET, "as on the wire");
static_assert((int)WINNOW_SHORT == (int)WINNOW__V1__VERDICT__VERDICT_SHORT, "as on the wire");
static_assert((int)WINNOW_DEGRADED == (int)WINNOW__V1__VERDICT__VERDICT_DEGRADED, "as on the wire");
static_assert(WINNOW_EXACT > 0, "0: nothing was added yet");
static_assert(WINNOW_EXACT < WINNOW_MET, "the worst verdict is the largest");
static_assert(WINNOW_MET < WINNOW_SHORT, "the worst verdict is the largest");
static_assert(WINNOW_SHORT < WINNOW_DEGRADED, "the worst verdict is the largest");

void winnow_certificate_decode(const Winnow__V1__Certificate *from, winnow_certificate *to)
{
    *to = (winnow_certificate){
        .verdict = from->verdict,
        .reason = from->reason,
        .mass_asked = from->mass_asked,
        .mass_reached = from->mass_reached,
        .mass_mean = from->mass_mean,
        .rounds = from->rounds,
        .blocks_total = from->blocks_total,
        .blocks_device = from->blocks_device,
        .blocks_host = from->blocks_host,
        .blocks_disk = from->blocks_disk,
        .blocks_remote = from->blocks_remote,
        .blocks_missed = from->blocks_missed,
        .bytes_read = from->bytes_read,
        .micros = from->micros,
    };
}

void winnow_certificate_add(winnow_certificate *sum, const winnow_certificate *one)
{
    bool first = !sum->verdict;
    if (one->verdict > sum->verdict)
        sum->verdict = one->verdict;
    if (!sum->reason)
        sum->reason = one->reason;
    if (first || one->mass_asked < sum->mass_asked)
        sum->mass_asked = one->mass_asked;
    if (first || one->mass_reached < sum->mass_reached)
        sum->mass_reached = one->mass_reached;
    sum->mass_mean += one->mass_mean;
    sum->rounds += one->rounds;
    sum->blocks_total += one->blocks_total;
    sum->blocks_device += one->blocks_device;
    sum->blocks_host += one->blocks_host;
    sum->blocks_disk += one->blocks_disk;
    sum->blocks_remote += one->blocks_remote;
    sum->blocks_missed += one->blocks_missed;
    sum->bytes_read += one->bytes_read;
    sum->micros += one->micros;
}
