/*
 * The RPC server: gRPC and the core on one thread, the serving thread. The only room that includes
 * gRPC; nothing of it shows here. See docs/rpc.md for what clients see.
 *
 * Thread: run is the serving thread. wake, drain and add_connection: any.
 */
#pragma once

#include <daemon/config.h>
#include <daemon/limits.h>
#include <stdint.h>

struct winnow_core;
struct winnow_store;

struct winnow_rpc_options {
    const struct winnow_limits *limits; /* borrowed until destroy, as all pointers here */
    const struct winnow_config *config;
    const char *kernels_name;
};

struct winnow_rpc;

int winnow_rpc_create(const struct winnow_rpc_options *options, struct winnow_rpc **ret_rpc);
/* After run has returned, or instead of it. NULL is fine. */
void winnow_rpc_destroy(struct winnow_rpc *rpc);

/* Serves until drained: then no call, lease or session is left. `store` may be NULL. */
void winnow_rpc_run(struct winnow_rpc *rpc, struct winnow_core *core, struct winnow_store *store);

/* The core should step: a work item or a read has finished. void * for the notify hooks. */
void winnow_rpc_wake(void *rpc);
/* Takes over a connected socket. */
void winnow_rpc_add_connection(struct winnow_rpc *rpc, int fd);
/* New work is refused, running calls may end until deadline_ns, then they are cancelled. */
void winnow_rpc_drain(struct winnow_rpc *rpc, int64_t deadline_ns);
