// Reads, writes and their ends, as the owner sees them.
//
// Sums are taken here, in the owner's thread, before a write is asked for: the memory was packed a
// moment ago and lies in a cache (26 GB/s: 15 us for a layer of 384 KiB), and a sum taken later, by
// the I/O thread, would need the table to outlive the segment. They are checked in the I/O thread,
// where the wait for the disk hides the cost.
//
// A sum begins with the store's uuid, the segment and the block's number, so that a block that was
// written to, or read from, another's place does not vouch for itself.
#include <base/assert.h>
#include <base/clock.h>
#include <base/crc32c.h>
#include <errno.h>
#include <storage/inside.h>
#include <string.h>

static const int64_t errors_within_ns = 60 * WINNOW_NS_PER_S;

static uint32_t sum_begin(const struct winnow_stored *stored, uint32_t block_idx)
{
    return winnow_crc32c(stored->sum_seed, &block_idx, sizeof block_idx);
}

static struct winnow_io_request *request_take(struct winnow_store *store,
                                              struct winnow_stored *stored, uint32_t block_idx,
                                              uint64_t tag)
{
    struct winnow_io_request *request = store->free_request;
    winnow_assert(request);
    winnow_assert(store->n_free_requests > 0);
    store->free_request = request->next;
    store->n_free_requests--;
    stored->n_requests++;
    struct winnow_place place = winnow_stored_place(store, stored, block_idx);
    *request = (struct winnow_io_request){.stored = stored,
                                          .dropped = &stored->dropped,
                                          .tag = tag,
                                          .block_idx = block_idx,
                                          .file_no = place.file_no,
                                          .offset_bytes = place.offset_bytes,
                                          .deadline_ns = WINNOW_NEVER_NS};
    return request;
}

static void request_give(struct winnow_store *store, struct winnow_io_request *request)
{
    winnow_assert(store->n_free_requests < store->n_requests_max);
    winnow_stored_release(store, request->stored);
    request->next = store->free_request;
    store->free_request = request;
    store->n_free_requests++;
}

/* Hands a list over; wakes the I/O thread when it may be asleep. */
static void requests_ask(struct winnow_store *store, struct winnow_io_request *list)
{
    struct winnow_message message = {.kind = WINNOW_MESSAGE_REQUESTS, .request = list};
    int rc = winnow_ring_put(store->dispatch.asks, &message);
    winnow_assert(rc >= 0); /* a list holds a request, and the ring as many as there are */
    if (rc == 1)
        store->dispatch.method->wake(store->dispatch.io);
}

int winnow_store_read(struct winnow_store *store, const struct winnow_store_read *read, uint32_t n,
                      enum winnow_io_priority priority, int64_t deadline_ns)
{
    winnow_assert(priority < WINNOW_IO_SPILL);
    if (n > store->n_free_requests)
        return -EAGAIN;
    struct winnow_io_request *list = NULL, **end = &list;
    for (uint32_t i = 0; i < n; i++) {
        struct winnow_stored *stored = read[i].stored;
        winnow_assert(!stored->dropped);
        winnow_assert(read[i].data);
        winnow_assert((uintptr_t)read[i].data % WINNOW_PAGE_BYTES == 0);
        struct winnow_io_request *request =
            request_take(store, stored, read[i].block_idx, read[i].tag);
        request->kind = WINNOW_IO_READ;
        request->priority = (uint8_t)priority;
        request->deadline_ns = deadline_ns;
        request->data = read[i].data;
        request->n_bytes = stored->block_bytes;
        request->n_blocks = 1;
        request->sum_seed = sum_begin(stored, read[i].block_idx);
        request->sum = stored->block_crc[read[i].block_idx];
        *end = request;
        end = &request->next;
    }
    if (list)
        requests_ask(store, list);
    return 0;
}

/* Blocks from block_idx on that lie in one grain and make one piece. */
static uint32_t piece_blocks(const struct winnow_stored *stored, uint32_t block_idx,
                             uint32_t n_left)
{
    uint32_t in_grain = stored->blocks_per_grain - block_idx % stored->blocks_per_grain;
    uint32_t in_piece = WINNOW_PIECE_BYTES_MAX / stored->block_bytes;
    uint32_t n_blocks = in_grain < in_piece ? in_grain : in_piece;
    winnow_assert(n_blocks > 0);
    winnow_assert(n_left > 0);
    return n_blocks < n_left ? n_blocks : n_left;
}

int winnow_store_write(struct winnow_store *store, struct winnow_stored *stored, uint32_t block_idx,
                       uint32_t n_blocks, const void *data, uint64_t tag)
{
    winnow_assert(!stored->dropped);
    winnow_assert(n_blocks > 0);
    winnow_assert(n_blocks <= stored->n_blocks);
    winnow_assert(block_idx <= stored->n_blocks - n_blocks);
    winnow_assert(data);
    winnow_assert((uintptr_t)data % WINNOW_PAGE_BYTES == 0);
    if (store->facts.degraded)
        return -EIO;
    if (n_blocks > store->n_free_requests)
        return -EAGAIN;
    uint8_t *bytes = (uint8_t *)(uintptr_t)data;
    for (uint32_t i = 0; i < n_blocks; i++)
        stored->block_crc[block_idx + i] =
            winnow_crc32c(sum_begin(stored, block_idx + i), bytes + (size_t)i * stored->block_bytes,
                          stored->block_bytes);

    struct winnow_io_request *whole = NULL, **end = &whole;
    for (uint32_t done = 0, n; done < n_blocks; done += n) {
        n = piece_blocks(stored, block_idx + done, n_blocks - done);
        struct winnow_io_request *piece = request_take(store, stored, block_idx + done, tag);
        piece->kind = WINNOW_IO_WRITE;
        piece->priority = WINNOW_IO_SPILL;
        piece->data = bytes + (size_t)done * stored->block_bytes;
        piece->n_bytes = n * stored->block_bytes;
        piece->n_blocks = n;
        *end = piece;
        end = &piece->next;
        piece->whole = whole;
        whole->n_pieces++;
    }
    requests_ask(store, whole);
    return 0;
}

/* Counts an error of writing; the third within a minute ends it. */
static void write_error_count(struct winnow_store *store, int64_t now_ns)
{
    int64_t *error_ns = store->write_error_ns;
    memmove(error_ns, error_ns + 1, (WINNOW_N_WRITE_ERRORS - 1) * sizeof *error_ns);
    error_ns[WINNOW_N_WRITE_ERRORS - 1] = now_ns;
    if (now_ns - error_ns[0] < errors_within_ns)
        store->facts.degraded = true;
}

static uint32_t request_grain(const struct winnow_store *store,
                              const struct winnow_io_request *request)
{
    return request->file_no * store->grains.n_per_file +
           (uint32_t)(request->offset_bytes / WINNOW_GRAIN_BYTES);
}

/* A lost block's grain is not used again; sixteen within a minute, and its file is not either. */
static void read_error_count(struct winnow_store *store, const struct winnow_io_request *request)
{
    struct winnow_data_file *file = &store->file[request->file_no];
    winnow_assert(file->made);
    winnow_grains_suspect(&store->grains, request_grain(store, request));
    if (request->done_ns - file->errors_from_ns >= errors_within_ns) {
        file->errors_from_ns = request->done_ns;
        file->n_errors = 0;
    }
    if (++file->n_errors == WINNOW_N_READ_ERRORS)
        winnow_store_file_suspect(store, request->file_no);
}

/* True: the piece is on its way to another grain. */
static bool piece_moved(struct winnow_store *store, struct winnow_io_request *piece)
{
    if (piece->result == 0 || piece->result == -ECANCELED)
        return false;
    write_error_count(store, piece->done_ns);
    winnow_grains_suspect(&store->grains, request_grain(store, piece));
    if (piece->moved || piece->stored->dropped || store->facts.degraded ||
        winnow_stored_move(store, piece->stored, piece->block_idx, piece->n_blocks) < 0)
        return false;
    struct winnow_place place = winnow_stored_place(store, piece->stored, piece->block_idx);
    piece->moved = true;
    piece->file_no = place.file_no;
    piece->offset_bytes = place.offset_bytes;
    piece->n_retries++;
    piece->next = NULL;
    requests_ask(store, piece);
    return true;
}

static void request_count(struct winnow_store *store, const struct winnow_io_request *request)
{
    struct winnow_store_facts *facts = &store->facts;
    if (request->kind == WINNOW_IO_READ)
        facts->read_bytes[request->priority] += request->disk_bytes;
    else
        facts->written_bytes += request->disk_bytes;
    facts->errors_crc += request->n_bad_sums;
    facts->errors_io += request->n_io_errors;
    facts->retries += request->n_retries;
}

/* A write is done with its last piece, as its worst piece. True: *done is filled. */
static bool piece_end(struct winnow_store *store, struct winnow_io_request *piece,
                      struct winnow_store_done *done)
{
    struct winnow_io_request *whole = piece->whole;
    winnow_assert(whole->n_pieces > 0);
    winnow_assert(whole->tag == piece->tag);
    if (piece_moved(store, piece))
        return false;
    request_count(store, piece);
    if (piece->result < 0)
        whole->whole_result = piece->result;
    whole->whole_disk_bytes += piece->disk_bytes;
    if (piece != whole)
        request_give(store, piece);
    if (--whole->n_pieces)
        return false;
    *done = (struct winnow_store_done){
        .tag = whole->tag, .result = whole->whole_result, .disk_bytes = whole->whole_disk_bytes};
    request_give(store, whole);
    return true;
}

static bool request_end(struct winnow_store *store, struct winnow_io_request *request,
                        struct winnow_store_done *done)
{
    if (request->kind == WINNOW_IO_WRITE)
        return piece_end(store, request, done);
    winnow_assert(request->kind == WINNOW_IO_READ);
    winnow_assert(request->priority < WINNOW_IO_SPILL);
    request_count(store, request);
    if (request->priority == WINNOW_IO_DECODE && request->begun_ns)
        winnow_latency_add(&store->reads, request->done_ns - request->begun_ns);
    if (request->result == -ENODATA)
        read_error_count(store, request);
    store->facts.timeouts += request->result == -ETIMEDOUT;
    *done = (struct winnow_store_done){
        .tag = request->tag, .result = request->result, .disk_bytes = request->disk_bytes};
    request_give(store, request);
    return true;
}

static bool answer_handle(struct winnow_store *store, const struct winnow_message *message,
                          struct winnow_store_done *done)
{
    switch (message->kind) {
    case WINNOW_MESSAGE_DONE:
        return request_end(store, message->request, done);
    case WINNOW_MESSAGE_LATE:
        winnow_assert(message->request->timed_out);
        winnow_assert(message->request->kind == WINNOW_IO_READ);
        store->facts.timeouts++;
        *done = (struct winnow_store_done){
            .tag = message->request->tag, .result = -ETIMEDOUT, .held = true};
        return true;
    default:
        winnow_assert(message->kind == WINNOW_MESSAGE_FILE);
        winnow_store_file_end(store, message->file_no, message->result);
        return false;
    }
}

uint32_t winnow_store_poll(struct winnow_store *store, struct winnow_store_done *done,
                           uint32_t n_done_max)
{
    struct winnow_message message;
    uint32_t n_done = 0;
    if (winnow_ring_take(store->grow.answers, &message))
        winnow_store_file_made(store, message.file_no, message.result);
    while (n_done < n_done_max && winnow_ring_take(store->dispatch.answers, &message))
        n_done += answer_handle(store, &message, &done[n_done]);
    return n_done;
}
