/* Rank 0 listens at MASTER_ADDR:MASTER_PORT, the others on ports that the system chooses. Each connects to
 * rank 0 and identifies itself with a `hello`; once all have, rank 0 sends everyone the addresses of all, and
 * every rank connects to the lower ones. That makes W-1 sockets a rank, W (W-1) / 2 in all.
 *
 * The ports accept connections from any program until the rendezvous is over, so a connection counts only
 * once it has sent a valid `hello` with the run's token. Unidentified connections (port scanners, ranks of
 * other runs) are closed and change nothing; one that sends nothing does not block the others. */
#define _GNU_SOURCE
#include "kernels/comm/tcp_rendezvous.h"

#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/comm/tcp_socket.h"

enum {
    VERSION = 1,
    MAX_UNIDENTIFIED = 64,   /* pending connections in addition to those of the ranks */
    PORT_IN_USE_SECONDS = 2, /* retry binding MASTER_PORT: a run that has just ended may still hold it */
    CONNECT_SECONDS = 30,    /* to a rank that is listening already */
    GRACE_SECONDS = 10,      /* beyond the timeout: rank 0, which knows the missing ranks, reports first */
    QUIET_SECONDS = 5,       /* of waiting, before a line names the missing ranks */
    RETRY_MS = 100,
};

static const double RETRY_SECONDS = 1e-3 * RETRY_MS;

static const char MAGIC[8] = "IHA-TCP";

struct hello {
    char magic[8];
    uint64_t run_token;
    uint32_t version, ranks, rank, port;
};

enum { ACCEPTED = 0, ANOTHER_RUN = 9 };

struct reply {
    char magic[8];
    uint32_t status; /* ACCEPTED; EXIT_USER, EXIT_RUN: the run ends, rank 0 reports why; ANOTHER_RUN */
};

/* "HOST:PORT" of rank 0. */
static const char *master_address(const struct launcher_env *env, char text[300]) {
    snprintf(text, 300, strchr(env->master_addr, ':') ? "[%s]:%d" : "%s:%d", env->master_addr,
             env->master_port);
    return text;
}

/* ---- accepting connections ---- */

/* An accepted connection whose hello is not complete yet. */
struct pending {
    int fd;
    size_t received;
    struct hello hello;
};

static void send_reply(int fd, int status) {
    struct reply reply = {.status = (uint32_t)status};
    memcpy(reply.magic, MAGIC, sizeof reply.magic);
    tcp_send_all(fd, &reply, sizeof reply, clock_seconds() + 1);
}

/* Rank 0: notify the ranks that have connected that the run ends. */
static void send_failure(const struct tcp_rendezvous *rdzv, const struct error *e) {
    for (int r = 1; r < rdzv->env->ranks; r++)
        if (rdzv->sockets[r] >= 0)
            send_reply(rdzv->sockets[r], e->exit_code);
}

/* 1: a rank of this run; 0: not one; -1 and *e: the ranks' settings contradict each other. */
static int check_hello(struct tcp_rendezvous *rdzv, const struct pending *c, struct error *e) {
    const struct hello *h = &c->hello;
    int own = rdzv->env->rank, ranks = rdzv->env->ranks, rank = (int)h->rank;
    if (h->run_token != rdzv->env->run_token) {
        if (own == 0)
            send_reply(c->fd, ANOTHER_RUN);
        return 0;
    }
    if (own != 0 && (h->version != VERSION || (int)h->ranks != ranks || rank <= own || rank >= ranks ||
                     rdzv->sockets[rank] >= 0))
        return 0; /* not a rank that rank 0 has accepted */
    if (h->version != VERSION)
        return fail_user(e, "rank %d runs another version of this program than rank 0; use the same build",
                         rank);
    if ((int)h->ranks != ranks)
        return fail_user(e,
                         "rank %d was started as one of %d ranks, rank 0 as one of %d; WORLD_SIZE must be "
                         "the same for all",
                         rank, (int)h->ranks, ranks);
    if (rank <= 0 || rank >= ranks)
        return fail_user(e, "two processes were started as rank 0; RANK must differ between processes");
    if (rdzv->sockets[rank] >= 0)
        return fail_user(e, "two processes were started as rank %d; RANK must differ between processes",
                         rank);
    return 1;
}

static void accept_rank(struct tcp_rendezvous *rdzv, const struct pending *c) {
    int rank = (int)c->hello.rank;
    rdzv->sockets[rank] = c->fd;
    if (rdzv->env->rank == 0) {
        rdzv->addresses[rank] = tcp_peer_address(c->fd);
        rdzv->addresses[rank].port = c->hello.port;
    }
}

/* 1: the hello is complete; 0: not yet; -1: closed, or not a hello. */
static int receive_hello(struct pending *c) {
    ssize_t n = recv(c->fd, (char *)&c->hello + c->received, sizeof c->hello - c->received, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        return -1;
    c->received += (size_t)n;
    if (memcmp(c->hello.magic, MAGIC, c->received < sizeof MAGIC ? c->received : sizeof MAGIC) != 0)
        return -1;
    return c->received == sizeof c->hello;
}

static void remove_pending(struct pending *pending, int *count, int i, bool close_it) {
    if (close_it)
        close(pending[i].fd);
    memmove(pending + i, pending + i + 1, (size_t)(--*count - i) * sizeof *pending);
}

/* Accept all waiting connections; when there are too many, the oldest unidentified one is closed. */
static int accept_waiting(struct tcp_rendezvous *rdzv, struct pending *pending, int *count, int capacity,
                          struct error *e) {
    for (;;) {
        int fd = accept4(rdzv->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE))
            return fail_run(e, "too many open files for %d ranks; raise the limit (ulimit -n)",
                            rdzv->env->ranks);
        if (fd < 0)
            return 0;
        if (*count == capacity)
            remove_pending(pending, count, 0, true);
        tcp_set_options(fd);
        pending[(*count)++] = (struct pending){.fd = fd};
    }
}

static int read_hellos(struct tcp_rendezvous *rdzv, struct pending *pending, int *count, struct error *e) {
    for (int i = 0; i < *count;) {
        int received = receive_hello(&pending[i]);
        int status = received == 1 ? check_hello(rdzv, &pending[i], e) : received;
        if (received == 1 && status < 0) {
            send_reply(pending[i].fd, e->exit_code);
            return -1;
        }
        if (received == 0) {
            i++;
            continue;
        }
        if (status == 1)
            accept_rank(rdzv, &pending[i]);
        remove_pending(pending, count, i, status != 1);
    }
    return 0;
}

/* The number of higher ranks that have not connected, and their list in `text`. */
static int missing_ranks(const struct tcp_rendezvous *rdzv, char text[256]) {
    int count = 0;
    text[0] = '\0';
    for (int r = rdzv->env->rank + 1; r < rdzv->env->ranks; r++) {
        size_t used = strlen(text);
        if (rdzv->sockets[r] < 0 && count++ < 16)
            snprintf(text + used, 256 - used, "%s%d", used ? ", " : "", r);
    }
    if (count > 16)
        strcat(text, ", ...");
    return count;
}

/* Rank 0: a rank whose process has ended since may be started again and connect again. */
static void drop_closed(struct tcp_rendezvous *rdzv) {
    for (int r = 1; r < rdzv->env->ranks; r++)
        if (rdzv->sockets[r] >= 0 && tcp_is_closed(rdzv->sockets[r])) {
            close(rdzv->sockets[r]);
            rdzv->sockets[r] = -1;
        }
}

static void print_missing(const struct tcp_rendezvous *rdzv, double seconds_left) {
    char text[256], address[300];
    int count = missing_ranks(rdzv, text);
    fprintf(stderr, "waiting for rank%s %s of %d at %s (%.0f s left)\n", count > 1 ? "s" : "", text,
            rdzv->env->ranks, master_address(rdzv->env, address), seconds_left);
}

/* Wait until every higher rank has connected, or the deadline has passed. */
static int accept_ranks(struct tcp_rendezvous *rdzv, double deadline, struct error *e) {
    double quiet_until = clock_seconds() + QUIET_SECONDS;
    int capacity = rdzv->env->ranks + MAX_UNIDENTIFIED, count = 0, status = 0;
    char text[256];
    struct pending *pending = malloc((size_t)capacity * sizeof *pending);
    struct pollfd *polled = malloc((size_t)(capacity + 1) * sizeof *polled);
    if (!pending || !polled)
        status = fail_run(e, "out of memory waiting for the other ranks");
    while (status == 0 && missing_ranks(rdzv, text) > 0 && clock_seconds() < deadline) {
        polled[0] = (struct pollfd){.fd = rdzv->listener, .events = POLLIN};
        for (int i = 0; i < count; i++)
            polled[i + 1] = (struct pollfd){.fd = pending[i].fd, .events = POLLIN};
        poll(polled, (nfds_t)count + 1, RETRY_MS);
        if (rdzv->env->rank == 0)
            drop_closed(rdzv);
        if (rdzv->env->rank == 0 && clock_seconds() > quiet_until && clock_seconds() < deadline) {
            print_missing(rdzv, clock_seconds_left(deadline));
            quiet_until = deadline;
        }
        if (accept_waiting(rdzv, pending, &count, capacity, e) != 0 ||
            read_hellos(rdzv, pending, &count, e) != 0)
            status = -1;
    }
    while (count > 0)
        remove_pending(pending, &count, 0, true);
    free(pending);
    free(polled);
    return status;
}

/* ---- identifying this rank ---- */

static int send_hello(const struct tcp_rendezvous *rdzv, int fd, double deadline) {
    const struct launcher_env *env = rdzv->env;
    struct hello h = {.run_token = env->run_token,
                      .version = VERSION,
                      .ranks = (uint32_t)env->ranks,
                      .rank = (uint32_t)env->rank,
                      .port = (uint32_t)tcp_local_port(rdzv->listener)};
    memcpy(h.magic, MAGIC, sizeof h.magic);
    return tcp_send_all(fd, &h, sizeof h, deadline);
}

/* Send hello, and wait for rank 0's reply and the addresses. -1 and *why: no valid reply. */
static int register_with_rank0(struct tcp_rendezvous *rdzv, int fd, double deadline, const char **why) {
    struct reply reply;
    *why = "another program listens there";
    if (send_hello(rdzv, fd, deadline) != 0 || tcp_receive_all(fd, &reply, sizeof reply, deadline) != 0) {
        *why = errno ? strerror(errno) : "the connection was closed without a reply";
        return -1;
    }
    if (memcmp(reply.magic, MAGIC, sizeof reply.magic) != 0)
        return -1;
    if (reply.status == ANOTHER_RUN) {
        *why = "rank 0 of another run answers";
        return -1;
    }
    if (reply.status != ACCEPTED) /* rank 0 has reported why */
        _exit(reply.status == EXIT_USER ? EXIT_USER : EXIT_RUN);
    return tcp_receive_all(fd, rdzv->addresses, (size_t)rdzv->env->ranks * sizeof *rdzv->addresses, deadline);
}

/* ---- rank 0 ---- */

static int resolve(const struct launcher_env *env, struct addrinfo **found, struct error *e) {
    char port[16];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    snprintf(port, sizeof port, "%d", env->master_port);
    int status = getaddrinfo(env->master_addr, port, &hints, found);
    if (status == 0)
        return 0;
    return fail_user(e, "MASTER_ADDR = %.200s: %s; it must be the name or the address of rank 0's machine",
                     env->master_addr, gai_strerror(status));
}

/* Another process has the port. If it is a second rank 0 of this very run, it reports that and ends the run,
 * this process included. */
static void check_duplicate_rank0(struct tcp_rendezvous *rdzv, const struct addrinfo *found) {
    for (const struct addrinfo *a = found; a; a = a->ai_next) {
        const char *why;
        int fd = tcp_connect(a->ai_addr, a->ai_addrlen, clock_seconds() + 1);
        if (fd < 0)
            continue;
        register_with_rank0(rdzv, fd, clock_seconds() + 1, &why);
        close(fd);
    }
}

static int listen_at_master_port(struct tcp_rendezvous *rdzv, struct error *e) {
    const struct launcher_env *env = rdzv->env;
    double deadline = clock_seconds() + PORT_IN_USE_SECONDS;
    struct addrinfo *found = NULL;
    while (resolve(env, &found, e) != 0) /* on new machines DNS may lag behind */
        if (clock_seconds() > deadline)
            return -1;
        else
            clock_sleep(RETRY_SECONDS);
    while ((rdzv->listener = tcp_listen(env->master_port)) < 0 && errno == EADDRINUSE &&
           clock_seconds() < deadline) {
        check_duplicate_rank0(rdzv, found);
        clock_sleep(RETRY_SECONDS);
    }
    int error_number = errno;
    freeaddrinfo(found);
    if (rdzv->listener >= 0)
        return 0;
    return fail_user(e,
                     "cannot listen on port %d (%s): %s; another run on this machine may use it: choose "
                     "another MASTER_PORT",
                     env->master_port, env->port_source, strerror(error_number));
}

static int send_addresses(struct tcp_rendezvous *rdzv, struct error *e) {
    int ranks = rdzv->env->ranks;
    for (int r = 1; r < ranks; r++) {
        send_reply(rdzv->sockets[r], ACCEPTED);
        if (tcp_send_all(rdzv->sockets[r], rdzv->addresses, (size_t)ranks * sizeof *rdzv->addresses,
                         clock_seconds() + GRACE_SECONDS) != 0)
            return fail_run(e, "rank %d ended while the ranks connected; see its own output", r);
    }
    return 0;
}

static int gather_at_rank0(struct tcp_rendezvous *rdzv, struct error *e) {
    char text[256];
    const struct launcher_env *env = rdzv->env;
    if (listen_at_master_port(rdzv, e) != 0)
        return -1;
    int status = accept_ranks(rdzv, clock_seconds() + rdzv->timeout, e), count = missing_ranks(rdzv, text);
    if (status == 0 && count > 0)
        status = fail_run(e,
                          "rank%s %s of %d did not connect to rank 0 at %.200s, port %d, within %g s; check "
                          "that they were started with this MASTER_ADDR and MASTER_PORT and that no firewall "
                          "blocks the port (IHA_START_TIMEOUT sets how long to wait)",
                          count > 1 ? "s" : "", text, env->ranks, env->master_addr, env->master_port,
                          rdzv->timeout);
    if (status == 0)
        status = send_addresses(rdzv, e);
    if (status != 0)
        send_failure(rdzv, e);
    return status;
}

/* ---- the other ranks ---- */

/* Retries, because rank 0 may not listen yet, or its machine's name may not be resolvable yet. */
static int connect_to_rank0(struct tcp_rendezvous *rdzv, struct error *e) {
    const struct launcher_env *env = rdzv->env;
    const char *why = "";
    double deadline = clock_seconds() + rdzv->timeout, quiet_until = clock_seconds() + QUIET_SECONDS;
    char unresolved[600] = "", address[300];
    do {
        struct error not_found;
        struct addrinfo *found = NULL;
        if (resolve(env, &found, &not_found) != 0) {
            snprintf(unresolved, sizeof unresolved, "%.500s", not_found.text);
            why = unresolved;
        }
        for (struct addrinfo *a = found; a; a = a->ai_next) {
            int fd = tcp_connect(a->ai_addr, a->ai_addrlen, quiet_until < deadline ? quiet_until : deadline);
            if (fd >= 0 &&
                register_with_rank0(rdzv, fd, clock_seconds() + rdzv->timeout + GRACE_SECONDS, &why) == 0) {
                rdzv->sockets[0] = fd;
                freeaddrinfo(found);
                return 0;
            }
            if (fd >= 0)
                close(fd);
            else
                why = strerror(errno);
        }
        if (found)
            freeaddrinfo(found);
        if (clock_seconds() > quiet_until && clock_seconds() < deadline) {
            fprintf(stderr, "rank %d: waiting for rank 0 at %s: %s (%.0f s left)\n", env->rank,
                    master_address(env, address), why, clock_seconds_left(deadline));
            quiet_until = deadline;
        }
        clock_sleep(RETRY_SECONDS);
    } while (clock_seconds() < deadline);
    return fail_run(
        e,
        "rank %d: cannot reach rank 0 at %.200s, port %d (%s) for %g s: %.300s; check that rank 0 "
        "was started, that MASTER_ADDR and MASTER_PORT are right, and that no firewall blocks the "
        "port (IHA_START_TIMEOUT sets how long to wait)",
        env->rank, env->master_addr, env->master_port, env->port_source, rdzv->timeout, why);
}

int tcp_rendezvous_gather(struct tcp_rendezvous *rdzv, struct error *e) {
    rdzv->addresses = calloc((size_t)rdzv->env->ranks, sizeof *rdzv->addresses);
    if (!rdzv->addresses)
        return fail_run(e, "rank %d: out of memory opening tcp", rdzv->env->rank);
    if (rdzv->env->rank == 0)
        return gather_at_rank0(rdzv, e);
    rdzv->listener = tcp_listen(0);
    if (rdzv->listener < 0)
        return fail_run(e, "rank %d: cannot listen: %s", rdzv->env->rank, strerror(errno));
    return connect_to_rank0(rdzv, e);
}

/* Rank 0 saw a rank of its own machine under a loopback address, which is of no use on other machines:
 * they use rank 0's address instead. */
static int connect_to_rank(struct tcp_rendezvous *rdzv, int rank, struct error *e) {
    struct tcp_address a = rdzv->addresses[rank];
    struct sockaddr_storage to;
    double limit = rdzv->timeout < CONNECT_SECONDS ? rdzv->timeout : CONNECT_SECONDS;
    double deadline = clock_seconds() + limit;
    int error_number;
    if (tcp_is_loopback(&a)) {
        a = tcp_peer_address(rdzv->sockets[0]);
        a.port = rdzv->addresses[rank].port;
    }
    socklen_t bytes = tcp_to_sockaddr(&a, &to);
    do {
        int fd = tcp_connect((struct sockaddr *)&to, bytes, deadline);
        if (fd >= 0 && send_hello(rdzv, fd, deadline) == 0) {
            rdzv->sockets[rank] = fd;
            return 0;
        }
        error_number = errno;
        if (fd >= 0)
            close(fd);
        clock_sleep(RETRY_SECONDS);
    } while (clock_seconds() < deadline);
    char name[INET6_ADDRSTRLEN + 1] = "?";
    getnameinfo((struct sockaddr *)&to, bytes, name, sizeof name, NULL, 0, NI_NUMERICHOST);
    return fail_run(e,
                    "cannot connect to rank %d at %s, port %u: %s; every two ranks need a connection, on "
                    "ports that the system chooses: check that no firewall blocks them",
                    rank, name, a.port, strerror(error_number));
}

int tcp_rendezvous_connect_peers(struct tcp_rendezvous *rdzv, struct error *e) {
    char text[256];
    int rank = rdzv->env->rank;
    if (rank == 0)
        return 0;
    for (int r = 1; r < rank; r++)
        if (connect_to_rank(rdzv, r, e) != 0)
            return -1;
    if (accept_ranks(rdzv, clock_seconds() + rdzv->timeout, e) != 0)
        return -1;
    int count = missing_ranks(rdzv, text);
    if (count == 0)
        return 0;
    return fail_run(e,
                    "rank%s %s did not connect within %g s; every two ranks need a connection, on ports that "
                    "the system chooses: check that no firewall blocks them",
                    count > 1 ? "s" : "", text, rdzv->timeout);
}

void tcp_rendezvous_free(struct tcp_rendezvous *rdzv) {
    if (rdzv->listener >= 0)
        close(rdzv->listener);
    free(rdzv->addresses);
}
