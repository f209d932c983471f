/*
 * libwinnow: an engine's side of Winnow.
 *
 * winnowd keeps a context's KV cache in host memory and on disk and answers each attention step by
 * reading only the blocks that carry the asked share P of the attention mass. An engine opens a
 * client, a session per context, and then for every layer of every token calls winnow_attend (or,
 * for a prompt, winnow_attend_exact with a window of positions). The engine keeps no KV.
 *
 *   winnow_client *client;  winnow_session *session;
 *   winnow_session_options so = WINNOW_SESSION_OPTIONS;
 *   so.model = shape;  so.label = "demo";
 *   if (winnow_client_open(NULL, &client) < 0) die(winnow_error_text());
 *   winnow_session_open(client, &so, &session, deadline);
 *   winnow_attend_exact(session, layer, 0, n, q, k, v, out, NULL, NULL, deadline);
 *   winnow_attend(client, layer, &item, 1, deadline);
 *
 * Tensors are contiguous in C order, in the model's io_dtype; K comes after RoPE:
 *   q [n][q_heads][k_width]   k [n][kv_heads][k_width]   v [n][kv_heads][v_width]
 *   out [n][q_heads][v_width]   lse f32 [n][q_heads], natural log
 * Query head h reads KV head h / (q_heads / kv_heads).
 *
 * Errors: every function returns 0 or a negative errno and winnow_error_text() says more:
 *   -EINVAL wrong shape, position or option   -EMSGSIZE above a limit   -EDOM NaN or Inf
 *   -ENOENT no such session    -EACCES not allowed    -EDQUOT -ENOSPC no room: back off, recompute
 *   -ENODATA a block is lost: winnow_session_truncate to item.truncate_to, send the tokens again
 *   -ERANGE budget cap ended below P   -EPROTO versions disjoint   -ESTALE session gone (the daemon
 *   was restarted, or the epoch is old): open it again   -ETIMEDOUT the deadline passed
 *   -EHOSTDOWN no daemon, or it died: run without   -ENOTSUP -ECANCELED -EIO
 *   -ECHILD this process is a child of one that opened a client: its handles are the parent's, and
 *   gRPC does not survive a fork. Fork before the first winnow_client_open, or exec.
 *
 * Deadlines are absolute CLOCK_MONOTONIC nanoseconds; 0 takes the call's default (control 5 s,
 * attend 2 s, append 10 s, exact 60 s). Every call is back by deadline + 50 ms whatever the daemon
 * does. After a death, or three calls without an answer within a second, calls answer -EHOSTDOWN at
 * once; the library finds the daemon again by itself.
 *
 * A call that broke may have appended its tokens in some layers: winnow_session_truncate to where
 * the step began evens them. On failure `out` and `lse` of a decode step are untouched, those of an
 * exact window hold what had come.
 *
 * Threads: any thread may call; calls on one session must not overlap. The library starts one
 * thread of its own (lease), never prints, exits or aborts.
 */
#ifndef WINNOW_WINNOW_H
#define WINNOW_WINNOW_H

#include <stddef.h>
#include <stdint.h>

/* The initialiser of a struct that begins with its own size, all else zero. Another size than this
 * version's is refused (-EINVAL): the caller was built with another winnow.h. */
#ifdef __cplusplus
template <typename type> static inline type winnow_init()
{
    type value = type();
    value.struct_bytes = sizeof value;
    return value;
}
#define WINNOW_INIT(type) winnow_init<type>()
#else
#define WINNOW_INIT(type)                                                                          \
    {                                                                                              \
        .struct_bytes = sizeof(type)                                                               \
    }
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define WINNOW_API __attribute__((visibility("default")))

typedef struct winnow_client winnow_client;
typedef struct winnow_session winnow_session;

enum { WINNOW_DTYPE_BF16 = 1, WINNOW_DTYPE_FP16 = 2, WINNOW_DTYPE_FP32 = 3 };
enum {
    WINNOW_BY_DEFAULT = 0, /* the daemon's default policy */
    WINNOW_BY_CODES = 1,
    WINNOW_BY_TACTIC = 2,
    WINNOW_BY_MOMENT = 3,
    WINNOW_BY_EXACT = 4,
};
enum { WINNOW_EXACT = 1, WINNOW_MET = 2, WINNOW_SHORT = 3, WINNOW_DEGRADED = 4 };

typedef struct winnow_model {
    uint32_t layers, q_heads, kv_heads, k_width, v_width;
    float softmax_scale; /* usually 1 / sqrt(k_width) */
    uint32_t kv_dtype;   /* at rest */
    uint32_t io_dtype;   /* of q, k, v, out here */
} winnow_model;

typedef struct winnow_client_options {
    size_t struct_bytes;
    /* Path of winnowd's socket. NULL: WINNOW_ADDRESS, else $XDG_RUNTIME_DIR/winnow/winnow.sock,
     * else /run/winnow/winnow.sock. */
    const char *address;
} winnow_client_options;
#define WINNOW_CLIENT_OPTIONS WINNOW_INIT(winnow_client_options)

typedef struct winnow_session_options {
    size_t struct_bytes;
    winnow_model model;
    const char *label; /* at most 64 of [A-Za-z0-9._-]; shown, never a key */
    uint32_t policy;
    float mass;            /* 0: the daemon's default; 1: everything */
    uint32_t n_blocks_max; /* budget a layer and KV head; 0: none */
    uint32_t n_sinks;      /* 0: 16 */
    uint64_t n_tokens_max; /* its index is reserved; 0: as tokens come */
    int strict;            /* a layer short of P is attended exactly instead */
    int allow_degraded;    /* WINNOW_ITEM_DEGRADED_OK for every item */
    int admit_nonfinite;   /* no -EDOM: NaN and Inf in K, V are kept and always read */
} winnow_session_options;
#define WINNOW_SESSION_OPTIONS WINNOW_INIT(winnow_session_options)

/*
 * What a reply says of itself, of one item and layer. mass_reached is an estimate by the index that
 * chose what to read, never a guarantee; EXACT alone is certain. Blocks are sealed ones (16 tokens
 * of a KV head), each counted where it was found.
 */
typedef struct winnow_certificate {
    uint32_t verdict; /* WINNOW_EXACT, _MET, _SHORT (mass_reached < mass_asked), _DEGRADED */
    uint32_t reason;  /* of DEGRADED: an errno, positive */
    float mass_asked;
    float mass_reached, mass_mean; /* the least over query heads, and their mean */
    uint32_t rounds;               /* 2: the first selection fell short and more was read */
    uint32_t blocks_total, blocks_device, blocks_host, blocks_disk, blocks_remote;
    uint32_t blocks_missed; /* lost or late, compensated: DEGRADED */
    uint64_t bytes_read;    /* from disk, holes and retries too */
    uint32_t micros;        /* in the daemon */
} winnow_certificate;

enum {
    WINNOW_ITEM_EXACT_ALL = 1,   /* everything, whatever the policy */
    WINNOW_ITEM_DEGRADED_OK = 2, /* a lost block is compensated instead of -ENODATA */
};

/* One context's part of a decode step of one layer. */
typedef struct winnow_attend_item {
    winnow_session *session;
    uint64_t position;     /* tokens the layer held before; the new token's position */
    uint32_t flags;        /* WINNOW_ITEM_* */
    float mass;            /* 0: the session's; 1: everything */
    uint32_t n_blocks_max; /* 0: the session's */
    const void *q, *k, *v; /* of this token and layer; k, v NULL: nothing is appended */
    void *out;
    float *lse; /* may be NULL */
    /* results */
    int status;
    uint64_t truncate_to;
    winnow_certificate certificate;
} winnow_attend_item;

WINNOW_API const char *winnow_version(void);
/* This thread's last failure: what, value, limit; hint. Never NULL. */
WINNOW_API const char *winnow_error_text(void);

/* Connects, agrees on a version, takes a lease. -EHOSTDOWN -EACCES -EPROTO -EINVAL -ENOMEM */
WINNOW_API int winnow_client_open(const winnow_client_options *options, winnow_client **client);
/* Ends the lease and with it every session still open. NULL is fine. */
WINNOW_API void winnow_client_close(winnow_client *client);

WINNOW_API int winnow_session_open(winnow_client *client, const winnow_session_options *options,
                                   winnow_session **session, int64_t deadline_ns);
/* Frees the handle in any case. NULL is fine. */
WINNOW_API int winnow_session_close(winnow_session *session);
/* Drops every token from n_tokens on, in each layer; evens layers after a broken call. */
WINNOW_API int winnow_session_truncate(winnow_session *session, uint64_t n_tokens,
                                       int64_t deadline_ns);
/* A second session that shares all tokens held; every layer must hold the same number. */
WINNOW_API int winnow_session_fork(winnow_session *session, const char *label,
                                   winnow_session **fork, int64_t deadline_ns);
/* Tokens the layer holds, as far as this client knows. */
WINNOW_API uint64_t winnow_session_held(const winnow_session *session, uint32_t layer);
/* Where to truncate to after the last -ENODATA of a call on this session. */
WINNOW_API uint64_t winnow_session_truncate_to(const winnow_session *session);

/* Appends tokens [first, first + n) of one layer without attending. first = tokens held. */
WINNOW_API int winnow_append(winnow_session *session, uint32_t layer, uint64_t first, uint32_t n,
                             const void *k, const void *v, int64_t deadline_ns);
/* Appends the window, then attends it: query i sees tokens <= first + i, exactly. A long window is
 * split to the daemon's limits. lse and certificate may be NULL. */
WINNOW_API int winnow_attend_exact(winnow_session *session, uint32_t layer, uint64_t first,
                                   uint32_t n, const void *q, const void *k, const void *v,
                                   void *out, float *lse, winnow_certificate *certificate,
                                   int64_t deadline_ns);
/* A decode step of one layer, batched over sessions of one model. Returns 0 when the call went
 * through (each item has its own status) or a negative errno (every item's status is set). */
WINNOW_API int winnow_attend(winnow_client *client, uint32_t layer, winnow_attend_item *items,
                             uint32_t n_items, int64_t deadline_ns);
/* winnow_attend in two halves: other work may run between. At most one step in flight a client
 * and thread; `items` is borrowed until wait returns. */
WINNOW_API int winnow_attend_submit(winnow_client *client, uint32_t layer,
                                    winnow_attend_item *items, uint32_t n_items,
                                    int64_t deadline_ns);
WINNOW_API int winnow_attend_wait(winnow_client *client);

/* Adds `one` into `sum` as a certificate over layers and steps: worst verdict, least mass, the rest
 * summed (mass_mean: sum; divide by the count). Begin with a zeroed sum. */
WINNOW_API void winnow_certificate_add(winnow_certificate *sum, const winnow_certificate *one);

typedef struct winnow_stats {
    size_t struct_bytes;
    uint64_t tokens_held, tokens_sealed, kv_bytes, kv_host_bytes, kv_disk_bytes;
    uint64_t pool_tail_bytes, pool_cache_bytes, pool_staging_bytes, pool_free_bytes, pool_cap_bytes;
    uint64_t index_bytes, index_cap_bytes, disk_used_bytes, disk_cap_bytes;
    uint64_t steps_exact, steps_met, steps_short, steps_degraded, second_rounds, exact_windows;
    uint64_t blocks_total, blocks_device, blocks_host, blocks_disk;
    uint64_t read_bytes_attend, read_bytes_exact, read_bytes_readahead, read_bytes_truncate;
    uint64_t written_bytes;
    uint64_t rss_bytes, rss_peak_bytes, printed_bytes;
    float mass_mean;
    /* Of a GPU: steps it answered, in so many launches; blocks that these found in its cache, or
     * not (unfit: no slot was free for them); of exact_windows, those it attended. */
    uint64_t device_steps, device_launches;
    uint64_t device_hits, device_misses, device_evictions, device_unfit, device_windows;
} winnow_stats;
#define WINNOW_STATS WINNOW_INIT(winnow_stats)

/* Of one session, or with session NULL of the whole daemon. */
WINNOW_API int winnow_stats_get(winnow_client *client, winnow_session *session, winnow_stats *stats,
                                int64_t deadline_ns);

#ifdef __cplusplus
}
#endif
#endif
