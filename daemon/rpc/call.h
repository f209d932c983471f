/*
 * A call: one RPC from its arrival to its last completion, and the few things one can do with it.
 *
 *   posted --request--> open --message*--> [core items]* --finish--> finished --last batch--> posted
 *                         \--cancelled (peer, deadline, drain): items cancelled, no batch started
 *
 * A call goes back to its pool when it is finished or cancelled, no batch is pending (gRPC holds a
 * tag until its batch completes) and no item is in the core (the core holds a request until done).
 * At most one batch that receives and one that only sends are pending.
 *
 * Thread: the serving thread.
 */
#pragma once

#include <assert.h>
#include <base/clock.h>
#include <base/pool.h>
#include <core/core.h>
#include <daemon/inflight.h>
#include <daemon/journal.h>
#include <daemon/registry.h>
#include <daemon/rpc/rpc.h>
#include <grpc/grpc.h>
#include <proto/wire.h>
#include <stdatomic.h>

struct winnow_rpc_call;

enum winnow_rpc_tag_kind {
    WINNOW_TAG_REQUEST, /* a posted call has arrived */
    WINNOW_TAG_MESSAGE, /* a batch that receives */
    WINNOW_TAG_SENT,    /* a batch that only sends */
    WINNOW_TAG_STATUS,  /* the last words */
    WINNOW_TAG_CLOSE,   /* the peer is done with the call, or it was cancelled */
    WINNOW_N_CALL_TAGS,
    WINNOW_TAG_WAKE = WINNOW_N_CALL_TAGS, /* the rest are the server's */
    WINNOW_TAG_SHUTDOWN,
};

struct winnow_rpc_tag {
    enum winnow_rpc_tag_kind kind;
    struct winnow_rpc_call *call;
};

/* A request in the core. Its call waits for it. */
struct winnow_rpc_item {
    struct winnow_request request; /* first: done gets it back */
    struct winnow_rpc_call *call;
    struct winnow_rpc_item *next; /* of the same message */
    int64_t submitted_ns;
    bool is_busy; /* in the core */
};

static_assert(offsetof(struct winnow_rpc_item, request) == 0, "done casts it back");

/* Every hook runs on an open call only; a NULL hook is not needed. */
struct winnow_rpc_method {
    const char *path;
    const ProtobufCMessageDescriptor *request;
    uint32_t tensor_bytes_max;
    bool is_stream; /* may not take the reserved calls */
    void (*begin)(struct winnow_rpc_call *call);
    void (*message)(struct winnow_rpc_call *call, const struct winnow_wire_message *message);
    void (*half_close)(struct winnow_rpc_call *call); /* no more messages; default: finish OK */
    void (*sent)(struct winnow_rpc_call *call);
    void (*done)(struct winnow_rpc_call *call, struct winnow_rpc_item *item);
    void (*reserved)(struct winnow_rpc_call *call); /* the range asked for is there */
    void (*timeout)(struct winnow_rpc_call *call);
    /* The call ends (finished or cancelled), once; items may still be in the core. */
    void (*end)(struct winnow_rpc_call *call);
    void (*release)(struct winnow_rpc_call *call); /* the call goes back to its pool */
};

/* Attend: one message in hand at a time. */
struct winnow_rpc_attend {
    uint64_t seq;
    uint32_t layer, part, n_items;
    uint32_t n_left;               /* items not done */
    struct winnow_rpc_item *first; /* items in order of the message */
    uint8_t *data;                 /* the message's tensor */
    size_t data_bytes_max;
    grpc_slice out; /* out and lse of the reply */
    size_t out_item_bytes, lse_item_bytes;
    bool has_out;
};

/* Append and AttendExact. */
struct winnow_rpc_upload {
    bool has_header, is_exact, want_lse, is_repeat;
    uint64_t session_id, first;
    uint32_t layer, epoch, n_tokens; /* of the window */
    uint32_t n_kv, n_q, n_sent;      /* tokens received, replied */
    struct winnow_model_shape shape;
    uint8_t append_id[16];
    uint8_t *q, *k, *v, *out;
    float *lse;
    struct winnow_core_certificate certificate;
    uint64_t n_held;
};

struct winnow_rpc_lease {
    struct winnow_lease *lease; /* NULL: not granted, or given back */
    bool is_beat_wanted, is_draining_wanted;
};

struct winnow_rpc_watch {
    bool is_asked, is_unknown;
    uint32_t told; /* ServingStatus */
};

struct winnow_rpc_row {
    Winnow__V1__SessionRow row;
    uint8_t name[4];
    char label[65];
};

struct winnow_rpc_stats {
    struct winnow_core_stats total;
    uint32_t n_rows, session_idx; /* rows done; place looked at */
    uint64_t session_id;          /* of the row under way; 0: the total */
    bool is_everything;
    struct winnow_rpc_row *row; /* [WINNOW_WIRE_N_ROWS_MAX] */
};

struct winnow_rpc_open {
    struct winnow_model *model;
    uint64_t lease_id;
    uint8_t request_id[16], weights_id[32], branch[32];
    size_t weights_id_bytes, branch_bytes;
    struct winnow_registry_session parent; /* of a fork, as it was */
    uint64_t session_id;                   /* of the session opened before by the same request id */
    char label[65];
};

static_assert(sizeof((struct winnow_rpc_open *)0)->label == WINNOW_WIRE_LABEL_BYTES_MAX + 1,
              "and a NUL");
static_assert(sizeof((struct winnow_rpc_row *)0)->label == WINNOW_WIRE_LABEL_BYTES_MAX + 1,
              "and a NUL");
static_assert(sizeof((struct winnow_rpc_open *)0)->request_id == WINNOW_WIRE_ID_BYTES,
              "the wire's");
static_assert(sizeof((struct winnow_rpc_upload *)0)->append_id == WINNOW_WIRE_ID_BYTES,
              "the wire's");
static_assert(sizeof((struct winnow_rpc_open *)0)->weights_id == WINNOW_WIRE_FINGERPRINT_BYTES,
              "a hash");

struct winnow_rpc_call {
    struct winnow_rpc *rpc;
    const struct winnow_rpc_method *method;
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    struct winnow_rpc_tag tag[WINNOW_N_CALL_TAGS];
    uint32_t n_batches, n_items;
    bool is_open; /* arrived, neither finished nor cancelled */
    bool is_receiving;
    grpc_byte_buffer *received, *sending;
    enum winnow_rpc_tag_kind sending_kind; /* of the batch that sends it */
    int was_cancelled;
    grpc_metadata trailer[4];
    grpc_slice status_text;
    int64_t deadline_ns; /* the caller's; WINNOW_NEVER_NS: none */
    int64_t timer_ns;    /* when `timeout` runs */
    uint64_t lease_id;   /* 0: none yet */

    uint8_t *range; /* of in-flight memory; NULL with range_bytes: waiting for it */
    uint64_t range_bytes;
    struct winnow_rpc_call *next_waiting;

    struct winnow_rpc_item own; /* for methods with one request at a time */
    union {
        struct winnow_rpc_attend attend;
        struct winnow_rpc_upload upload;
        struct winnow_rpc_lease lease;
        struct winnow_rpc_stats stats;
        struct winnow_rpc_open open;
        struct winnow_rpc_watch watch;
    };
};

struct winnow_rpc {
    const struct winnow_limits *limits;
    const struct winnow_config *config;
    struct winnow_core *core;
    struct winnow_store *store;
    const char *kernels_name;
    struct winnow_registry *registry;
    struct winnow_inflight *inflight;
    struct winnow_pool *calls, *items;
    struct winnow_wire_arena *arena;       /* of the message being decoded */
    struct winnow_wire_arena *reply_arena; /* of the one being encoded */
    struct winnow_wire_slice slice[1024];
    uint8_t boot_id[16];
    int64_t started_ns, next_timer_ns;
    struct winnow_journal journal;
    struct winnow_request hour; /* the summary's stats */
    bool is_hour_asked;
    struct winnow_rpc_call *waiting, **waiting_end;

    grpc_server *server;
    grpc_completion_queue *queue;
    grpc_channel *wake_channel; /* to nowhere */
    grpc_call *wake_call;       /* an empty batch on it posts wake_tag */
    grpc_metadata boot;         /* initial metadata of every call */
    struct winnow_rpc_tag wake_tag, shutdown_tag;
    uint32_t n_posted, n_open;
    bool is_draining, is_shut_down, is_stepping;
    bool is_gpu_lost;      /* told */
    uint64_t n_gpu_shapes; /* told */

    /* Any thread sets, the serving thread reads once woken. */
    _Atomic bool is_woken;
    _Atomic int64_t drain_deadline_ns; /* WINNOW_NEVER_NS: not draining */
};

/* call.c */
bool winnow_rpc_is_healthy(const struct winnow_rpc *rpc); /* server.c */
void winnow_rpc_call_post(struct winnow_rpc *rpc);        /* as many as there should be */
void winnow_rpc_call_release_if_over(struct winnow_rpc_call *call);
void winnow_rpc_call_begin(struct winnow_rpc_call *call); /* initial metadata, close watch */
void winnow_rpc_call_receive(struct winnow_rpc_call *call);
/* Sends a message (copied) and, behind its head, a tensor slice (taken; NULL: none). */
void winnow_rpc_call_send(struct winnow_rpc_call *call, const void *message, grpc_slice *tensor,
                          bool then_receive);
void winnow_rpc_call_answer(struct winnow_rpc_call *call, const void *message); /* and ends, OK */
void winnow_rpc_call_end(struct winnow_rpc_call *call);                         /* OK */
/* Ends with -errno. */
void winnow_rpc_call_fail(struct winnow_rpc_call *call, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Ends as the request did: status, text, truncate_to, tokens held. */
void winnow_rpc_call_fail_request(struct winnow_rpc_call *call,
                                  const struct winnow_request *request);
void winnow_rpc_call_cancel(struct winnow_rpc_call *call); /* no last words */
void winnow_rpc_call_complete(struct winnow_rpc_tag *tag, bool ok);
void winnow_rpc_call_set_timer(struct winnow_rpc_call *call, int64_t when_ns);
/* min(the message's relative deadline or the method's default, the call's), absolute. */
int64_t winnow_rpc_call_deadline(const struct winnow_rpc_call *call, uint64_t deadline_us,
                                 int64_t default_ns);

/* server.c */
const struct winnow_rpc_method *winnow_rpc_method_find(const char *path, size_t n_bytes);
/* The item is the core's until its call's `done`. Never fails: a full core ends it with -EDQUOT. */
void winnow_rpc_submit(struct winnow_rpc_item *item);
/* Calls `reserved` once n_bytes of in-flight memory are there, now or later. */
void winnow_rpc_reserve(struct winnow_rpc_call *call, uint64_t n_bytes);
void winnow_rpc_unreserve(struct winnow_rpc_call *call);
void winnow_rpc_cancel_items(struct winnow_rpc *rpc, uint64_t lease_id);
/* The lease and session of a request; NULL after the call has failed with the one denial. */
struct winnow_registry_session *winnow_rpc_session(struct winnow_rpc_call *call,
                                                   const ProtobufCBinaryData *token,
                                                   uint64_t session_id);

#define WINNOW_NO_SUCH_SESSION "no such session. hint: open it again"

enum { /* deadlines of calls that bring none */
       WINNOW_CONTROL_DEFAULT_S = 5,
       WINNOW_ATTEND_DEFAULT_S = 2,
       WINNOW_EXACT_DEFAULT_S = 60,
       WINNOW_STALL_S = 10, /* an upload whose peer sends nothing, or does not read its reply */
};

/* attend.c */
void winnow_rpc_certificate(const struct winnow_core_certificate *from,
                            Winnow__V1__Certificate *to);

extern const struct winnow_rpc_method winnow_rpc_info, winnow_rpc_lease, winnow_rpc_open_session,
    winnow_rpc_append, winnow_rpc_attend, winnow_rpc_attend_exact, winnow_rpc_truncate,
    winnow_rpc_fork, winnow_rpc_close, winnow_rpc_stats, winnow_rpc_health_check,
    winnow_rpc_health_watch;
/* Pushes what has changed (draining) to a lease's or watcher's stream. */
void winnow_rpc_lease_drain(struct winnow_rpc_call *call);
void winnow_rpc_watch_push(struct winnow_rpc_call *call);
