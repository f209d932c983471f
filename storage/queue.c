// Two figures rule here. A disk reads neighbours almost for free: 13 % less time a 4 KiB block when
// adjacent reads are merged, 1.4 to 1.6 times when a batch goes by place. And a write of 1 MiB
// holds reads up: 64 reads of 16 KiB take 1.5 ms alone, 7.0 to 9.5 beside an unthrottled spill, 1.4
// to 2.0 beside one of at most 300 MB/s. So for 100 ms after a decode read writes go at the pace of 1
// MiB in 10 ms; what is due goes first, or reads that fill the window would keep it out for ever.
// Rejected: a share of the disk's speed, which nobody knows and neighbours change.
// Rejected too: reads through a hole of one block that nobody asked for. A token of the real model
// would send 359 reads for 414, and win 4 us by each of the 55 (12 KiB take 24 us, twice 4 KiB 28).
#include <base/assert.h>
#include <base/clock.h>
#include <stddef.h>
#include <storage/queue.h>

enum {
    MERGE_BYTES_MAX = 256 << 10,
    MERGE_EXACT_BYTES_MAX = 1 << 20,
    N_WRITES_MAX = 2,
};
static const int64_t decode_quiet_ns = 100 * WINNOW_NS_PER_MS;
static const int64_t write_ns_per_mib = 10 * WINNOW_NS_PER_MS;

void winnow_queue_init(struct winnow_queue *queue, uint32_t window)
{
    winnow_assert(window > 0);
    *queue = (struct winnow_queue){.n_readahead_max = window > 1 ? window / 2 : 1,
                                   .last_decode_ns = INT64_MIN / 2};
}

static bool place_before(const struct winnow_io_request *a, const struct winnow_io_request *b)
{
    return a->file_no != b->file_no ? a->file_no < b->file_no : a->offset_bytes < b->offset_bytes;
}

static struct winnow_io_request *lists_merge(struct winnow_io_request *a,
                                             struct winnow_io_request *b)
{
    struct winnow_io_request *head = NULL, **end = &head;
    while (a && b) {
        struct winnow_io_request **first = place_before(b, a) ? &b : &a;
        *end = *first;
        end = &(*first)->next;
        *first = *end;
    }
    *end = a ? a : b;
    return head;
}

/* Merge sort from below: run[k] holds a sorted list of 2^k requests, or none. */
static struct winnow_io_request *list_sort(struct winnow_io_request *list)
{
    struct winnow_io_request *run[32] = {NULL};
    while (list) {
        struct winnow_io_request *sorted = list;
        list = list->next;
        sorted->next = NULL;
        uint32_t k = 0;
        for (; run[k]; k++) {
            winnow_assert(k < 31);
            sorted = lists_merge(run[k], sorted);
            run[k] = NULL;
        }
        run[k] = sorted;
    }
    struct winnow_io_request *all = NULL;
    for (uint32_t k = 0; k < 32; k++)
        all = lists_merge(run[k], all);
    return all;
}

void winnow_queue_add(struct winnow_queue *queue, struct winnow_io_request *batch)
{
    winnow_assert(batch);
    winnow_assert(batch->priority < WINNOW_N_IO_PRIORITIES);
    struct winnow_queue_list *list = &queue->list[batch->priority];
    winnow_assert(!list->head == !list->tail);
    winnow_assert(!list->tail || !list->tail->next);
    batch = list_sort(batch);
    if (list->tail)
        list->tail->next = batch;
    else
        list->head = batch;
    while (batch->next)
        batch = batch->next;
    list->tail = batch;
}

void winnow_queue_add_first(struct winnow_queue *queue, struct winnow_io_request *request)
{
    winnow_assert(request->priority < WINNOW_N_IO_PRIORITIES);
    struct winnow_queue_list *list = &queue->list[request->priority];
    winnow_assert(!list->head == !list->tail);
    request->alone = true;
    request->next = list->head;
    list->head = request;
    if (!list->tail)
        list->tail = request;
}

static bool adjacent(const struct winnow_io_request *a, const struct winnow_io_request *b)
{
    return a->kind == WINNOW_IO_READ && !a->alone && !b->alone && a->file_no == b->file_no &&
           a->offset_bytes + a->n_bytes == b->offset_bytes;
}

static struct winnow_io_request *list_take(struct winnow_queue_list *list, uint32_t n_bytes_max)
{
    struct winnow_io_request *first = list->head, *last = first;
    winnow_assert(first);
    uint32_t n_bytes = first->n_bytes, n_parts = 1;
    while (last->next && adjacent(last, last->next) &&
           n_bytes + last->next->n_bytes <= n_bytes_max) {
        n_parts += last->data + last->n_bytes != last->next->data;
        if (n_parts > WINNOW_MERGE_PARTS_MAX)
            break;
        last = last->next;
        n_bytes += last->n_bytes;
    }
    list->head = last->next;
    if (!list->head) {
        winnow_assert(list->tail == last);
        list->tail = NULL;
    }
    last->next = NULL;
    return first;
}

static struct winnow_io_request *write_take(struct winnow_queue *queue, int64_t now_ns)
{
    struct winnow_io_request *piece = list_take(&queue->list[WINNOW_IO_SPILL], 0);
    winnow_assert(piece->kind == WINNOW_IO_WRITE);
    winnow_assert(queue->n_writes < N_WRITES_MAX);
    queue->n_writes++;
    queue->write_due_ns = now_ns + (write_ns_per_mib * piece->n_bytes >> 20);
    return piece;
}

static bool write_waits(const struct winnow_queue *queue)
{
    return queue->list[WINNOW_IO_SPILL].head && queue->n_writes < N_WRITES_MAX;
}

struct winnow_io_request *winnow_queue_take(struct winnow_queue *queue, int64_t now_ns)
{
    if (write_waits(queue) && now_ns >= queue->write_due_ns)
        return write_take(queue, now_ns);
    if (queue->list[WINNOW_IO_DECODE].head) {
        queue->last_decode_ns = now_ns;
        return list_take(&queue->list[WINNOW_IO_DECODE], MERGE_BYTES_MAX);
    }
    if (queue->list[WINNOW_IO_EXACT].head)
        return list_take(&queue->list[WINNOW_IO_EXACT], MERGE_EXACT_BYTES_MAX);
    if (queue->list[WINNOW_IO_READAHEAD].head && queue->n_readahead < queue->n_readahead_max) {
        queue->n_readahead++;
        return list_take(&queue->list[WINNOW_IO_READAHEAD], MERGE_BYTES_MAX);
    }
    if (write_waits(queue) && now_ns - queue->last_decode_ns >= decode_quiet_ns)
        return write_take(queue, now_ns);
    return NULL;
}

void winnow_queue_ended(struct winnow_queue *queue, uint32_t priority)
{
    winnow_assert(priority < WINNOW_N_IO_PRIORITIES);
    uint32_t *count = priority == WINNOW_IO_READAHEAD ? &queue->n_readahead
                      : priority == WINNOW_IO_SPILL   ? &queue->n_writes
                                                      : NULL;
    if (!count)
        return;
    winnow_assert(*count > 0);
    --*count;
}

int64_t winnow_queue_next(const struct winnow_queue *queue)
{
    if (!write_waits(queue))
        return WINNOW_NEVER_NS;
    int64_t quiet_ns = queue->last_decode_ns + decode_quiet_ns;
    return queue->write_due_ns < quiet_ns ? queue->write_due_ns : quiet_ns;
}

static struct winnow_io_request *list_take_expired(struct winnow_queue_list *list, int64_t now_ns,
                                                   struct winnow_io_request *expired)
{
    struct winnow_io_request *kept = NULL, **end = &kept, *tail = NULL;
    for (struct winnow_io_request *request = list->head, *next; request; request = next) {
        next = request->next;
        if (request->deadline_ns <= now_ns) {
            request->next = expired;
            expired = request;
        } else {
            *end = tail = request;
            end = &request->next;
        }
    }
    *end = NULL;
    *list = (struct winnow_queue_list){.head = kept, .tail = tail};
    return expired;
}

struct winnow_io_request *winnow_queue_take_expired(struct winnow_queue *queue, int64_t now_ns)
{
    struct winnow_io_request *expired = NULL;
    for (uint32_t i = 0; i < WINNOW_N_IO_PRIORITIES; i++)
        expired = list_take_expired(&queue->list[i], now_ns, expired);
    return expired;
}

struct winnow_io_request *winnow_queue_take_reads(struct winnow_queue *queue)
{
    struct winnow_io_request *reads = NULL;
    for (uint32_t i = 0; i < WINNOW_IO_SPILL; i++)
        reads = list_take_expired(&queue->list[i], WINNOW_NEVER_NS, reads);
    return reads;
}
