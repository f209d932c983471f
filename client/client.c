// A client: which life of the daemon calls go to, and what they answer while there is none.
//
// The lease thread waits in poll(2) on the lease's own socket, so a daemon's death is seen when the
// kernel closes it, not when somebody's deadline passes; in the second after it, every call answers
// from memory. It alone reconnects (50 ms doubling to 5 s, +-20 %), so that no engine thread ever
// pays for a probe. The breaker is for the other case, a daemon that is there and silent: three
// calls without an answer within a second open it, the lease kept, and the thread asks Info until
// one is answered.
#include <client/client.h>

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#define PROBE_FIRST_NS  (50 * WINNOW_NS_PER_MS)
#define PROBE_LAST_NS   (5 * WINNOW_NS_PER_S)
#define PROBE_ANSWER_NS (250 * WINNOW_NS_PER_MS)
#define TEND_NS         WINNOW_NS_PER_S
#define BREAKER_NS      WINNOW_NS_PER_S
#define DEADLINE_NS_MAX (86400 * WINNOW_NS_PER_S) /* so that sums of times do not overflow */

static_assert(DEADLINE_NS_MAX + WINNOW_GRACE_NS < INT64_MAX / 2, "added to now, and back");
static_assert(WINNOW_DEFAULT_CONTROL_NS <= DEADLINE_NS_MAX, "a default is no deadline refused");
static_assert(WINNOW_DEFAULT_ATTEND_NS <= DEADLINE_NS_MAX, "a default is no deadline refused");
static_assert(WINNOW_DEFAULT_APPEND_NS <= DEADLINE_NS_MAX, "a default is no deadline refused");
static_assert(WINNOW_DEFAULT_EXACT_NS <= DEADLINE_NS_MAX, "a default is no deadline refused");
static_assert(PROBE_FIRST_NS < PROBE_LAST_NS, "waits grow");
static_assert(PROBE_FIRST_NS * 8 / 10 >= WINNOW_NS_PER_MS, "a jittered wait is no busy loop");
static_assert(PROBE_LAST_NS * 12 / 10 / WINNOW_NS_PER_MS < INT_MAX, "poll(2) takes an int");
static_assert(TEND_NS >= WINNOW_NS_PER_MS, "tending is no busy loop");
static_assert(TEND_NS / WINNOW_NS_PER_MS < INT_MAX, "poll(2) takes an int");
static_assert(PROBE_ANSWER_NS < TEND_NS, "a probe of a silent daemon delays no tending by more");
static_assert(sizeof(winnow_model) == 32, "ABI: no struct_bytes tells its version");
static_assert(sizeof(winnow_certificate) == 64, "ABI: no struct_bytes tells its version");
static_assert(sizeof(winnow_attend_item) == 152, "ABI: no struct_bytes tells its version");
static_assert(offsetof(winnow_attend_item, status) == 72, "ABI: results begin here");
static_assert(offsetof(winnow_client_options, struct_bytes) == 0, "read before all else");
static_assert(offsetof(winnow_session_options, struct_bytes) == 0, "read before all else");
static_assert(offsetof(winnow_stats, struct_bytes) == 0, "read before all else");
static_assert(sizeof(((struct winnow_client *)0)->timeout_ns) == 2 * sizeof(int64_t),
              "the third time-out in a second opens the breaker");

const char *winnow_version(void)
{
    return WINNOW_VERSION;
}

uint64_t winnow_deadline_left_us(int64_t deadline_ns)
{
    int64_t left_us = (deadline_ns - winnow_clock_now_ns()) / WINNOW_NS_PER_US;
    return left_us > 0 ? (uint64_t)left_us : 1;
}

int winnow_client_begin(struct winnow_client *client, uint64_t generation, int64_t *deadline_ns,
                        int64_t default_ns, struct winnow_link **ret_link)
{
    int64_t now_ns = winnow_clock_now_ns();
    if (!*deadline_ns)
        *deadline_ns = now_ns + default_ns;
    if (*deadline_ns > now_ns + DEADLINE_NS_MAX)
        *deadline_ns = now_ns + DEADLINE_NS_MAX;
    if (!client)
        return winnow_error_set(-EINVAL, "client is NULL");
    if (winnow_rpc_forked())
        return winnow_error_set(-ECHILD, "the client belongs to the parent process. hint: fork "
                                         "before the first winnow_client_open, or exec");
    if (atomic_load(&client->broken))
        return winnow_error_set(-EHOSTDOWN, "winnowd left three calls unanswered within a second. "
                                            "hint: run without it; it is asked until it answers");
    if (*deadline_ns <= now_ns)
        return winnow_error_set(-ETIMEDOUT, "the deadline had passed before the call");
    pthread_mutex_lock(&client->lock);
    struct winnow_link *link = client->link ? winnow_link_ref(client->link) : NULL;
    bool closed = client->closed;
    pthread_mutex_unlock(&client->lock);
    if (closed)
        return winnow_error_set(-EINVAL, "the client is closed");
    if (!link)
        return winnow_error_set(-EHOSTDOWN, "winnowd is gone. hint: run without it; sessions have "
                                            "to be opened again once it is back");
    if (generation && generation != link->generation) {
        winnow_link_unref(link);
        return winnow_error_set(-ESTALE, "the session ended with its lease: winnowd was restarted. "
                                         "hint: open it again");
    }
    *ret_link = link;
    return 0;
}

static void client_wake(struct winnow_client *client)
{
    uint64_t one = 1;
    if (write(client->wake_fd, &one, sizeof one) < 0)
        return; /* its count is full: it is awake */
}

static void client_count_timeout(struct winnow_client *client)
{
    int64_t now_ns = winnow_clock_now_ns();
    pthread_mutex_lock(&client->lock);
    bool third = client->timeout_ns[0] && now_ns - client->timeout_ns[0] <= BREAKER_NS;
    client->timeout_ns[0] = client->timeout_ns[1];
    client->timeout_ns[1] = now_ns;
    pthread_mutex_unlock(&client->lock);
    if (third && !atomic_exchange(&client->broken, true))
        client_wake(client);
}

int winnow_client_note(struct winnow_client *client, const struct winnow_status *status)
{
    if (status->local && status->error == -ETIMEDOUT)
        client_count_timeout(client);
    return status->error < 0 ? winnow_error_set_status(status) : 0;
}

/* ---- the lease thread ---- */

/* A wait before the next probe, +-20 %, so that a thousand clients do not come back at once. */
static int wait_jittered_ms(int64_t wait_ns)
{
    uint32_t random = 0;
    if (getrandom(&random, sizeof random, GRND_NONBLOCK) < 0)
        random = 1U << 31;
    double factor = 0.8 + 0.4 * random / 4294967296.0;
    return (int)((double)wait_ns * factor / (double)WINNOW_NS_PER_MS);
}

static int64_t wait_longer(int64_t wait_ns)
{
    return 2 * wait_ns < PROBE_LAST_NS ? 2 * wait_ns : PROBE_LAST_NS;
}

static bool client_is_closed(struct winnow_client *client)
{
    pthread_mutex_lock(&client->lock);
    bool closed = client->closed;
    pthread_mutex_unlock(&client->lock);
    return closed;
}

/* false: the client was closed meanwhile, the link stays the caller's. */
static bool client_set_link(struct winnow_client *client, struct winnow_link *link)
{
    pthread_mutex_lock(&client->lock);
    bool open = !client->closed;
    if (open) {
        client->link = link;
        if (link)
            link->generation = ++client->generation;
    }
    pthread_mutex_unlock(&client->lock);
    atomic_store(&client->broken, false);
    return open;
}

/* Waits, then tries to find the daemon again. */
static void lease_reconnect(struct winnow_client *client, int64_t *wait_ns)
{
    struct pollfd wake = {.fd = client->wake_fd, .events = POLLIN};
    poll(&wake, 1, wait_jittered_ms(*wait_ns));
    if (client_is_closed(client))
        return;
    struct winnow_link *link;
    int64_t deadline_ns = winnow_clock_now_ns() + PROBE_ANSWER_NS;
    if (winnow_link_open(client->address, true, deadline_ns, &link) < 0) {
        *wait_ns = wait_longer(*wait_ns);
        return;
    }
    *wait_ns = PROBE_FIRST_NS;
    if (!client_set_link(client, link))
        winnow_link_unref(link);
}

/* Closes the breaker when Info is answered. */
static void lease_probe(struct winnow_client *client, struct winnow_link *link, int64_t *wait_ns)
{
    *wait_ns = wait_longer(*wait_ns);
    if (winnow_link_ping(link, winnow_clock_now_ns() + PROBE_ANSWER_NS) < 0)
        return;
    *wait_ns = PROBE_FIRST_NS;
    atomic_store(&client->broken, false);
}

/* One wait on a living link. false: it is dead. */
static bool lease_watch(struct winnow_client *client, struct winnow_link *link, int64_t *wait_ns)
{
    bool broken = atomic_load(&client->broken);
    int wait_ms = broken ? wait_jittered_ms(*wait_ns) : (int)(TEND_NS / WINNOW_NS_PER_MS);
    struct pollfd fds[2] = {
        {.fd = client->wake_fd, .events = POLLIN},
        {.fd = winnow_channel_watch_fd(link->lease), .events = POLLIN | POLLRDHUP},
    };
    int n_ready = poll(fds, 2, wait_ms);
    if (fds[0].revents) {
        uint64_t n_wakes;
        if (read(client->wake_fd, &n_wakes, sizeof n_wakes) < 0)
            return true;
    }
    if (fds[1].revents & (POLLRDHUP | POLLHUP | POLLERR))
        return false;
    if (fds[1].revents && winnow_link_read_lease(link) < 0)
        return false;
    if (n_ready == 0) {
        winnow_rpc_tend();
        if (broken)
            lease_probe(client, link, wait_ns);
    }
    return true;
}

static void *lease_main(void *arg)
{
    struct winnow_client *client = arg;
    int64_t wait_ns = PROBE_FIRST_NS;
    while (!client_is_closed(client)) {
        pthread_mutex_lock(&client->lock);
        struct winnow_link *link = client->link ? winnow_link_ref(client->link) : NULL;
        pthread_mutex_unlock(&client->lock);
        if (!link) {
            lease_reconnect(client, &wait_ns);
            continue;
        }
        if (!lease_watch(client, link, &wait_ns) && client_set_link(client, NULL)) {
            wait_ns = PROBE_FIRST_NS;
            winnow_link_unref(link); /* the client's */
        }
        winnow_link_unref(link);
    }
    return NULL;
}

/* ---- open, close ---- */

void winnow_client_unref(struct winnow_client *client)
{
    if (atomic_fetch_sub(&client->n_refs, 1) > 1)
        return;
    if (client->wake_fd >= 0)
        close(client->wake_fd);
    pthread_mutex_destroy(&client->lock);
    free(client->address);
    free(client);
}

/* The engine's signals are the engine's: none is delivered to this thread. */
static int client_start_thread(struct winnow_client *client)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&client->lease_thread, NULL, lease_main, client);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

int winnow_client_open(const winnow_client_options *options, winnow_client **client)
{
    if (!client || (options && options->struct_bytes != sizeof *options))
        return winnow_error_set(-EINVAL, "options of winnow_client_open: begin with "
                                         "WINNOW_CLIENT_OPTIONS");
    struct winnow_client *new_client = calloc(1, sizeof *new_client);
    if (!new_client)
        return winnow_error_set(-ENOMEM, "out of memory");
    new_client->n_refs = 1;
    new_client->generation = 1;
    new_client->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&new_client->lock, NULL);
    if (options && options->address)
        new_client->address = strdup(options->address);

    int rc = 0;
    if (new_client->wake_fd < 0 || (options && options->address && !new_client->address))
        rc = winnow_error_set(new_client->wake_fd < 0 ? -errno : -ENOMEM, "no room for a client");
    if (!rc)
        rc = winnow_link_open(new_client->address, true,
                              winnow_clock_now_ns() + WINNOW_DEFAULT_CONTROL_NS, &new_client->link);
    if (!rc) {
        new_client->link->generation = 1;
        rc = client_start_thread(new_client);
        if (rc < 0)
            winnow_error_set(rc, "no thread for the lease: %s", strerror(-rc));
    }
    if (rc < 0) {
        winnow_link_unref(new_client->link);
        winnow_client_unref(new_client);
        return rc;
    }
    *client = new_client;
    return 0;
}

void winnow_client_close(winnow_client *client)
{
    if (!client || winnow_rpc_forked())
        return;
    pthread_mutex_lock(&client->lock);
    struct winnow_link *link = client->link;
    client->link = NULL;
    client->closed = true;
    pthread_mutex_unlock(&client->lock);
    client_wake(client);
    pthread_join(client->lease_thread, NULL);
    winnow_link_unref(link);
    winnow_client_unref(client);
}
