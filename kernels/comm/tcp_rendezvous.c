/* Rank 0 listens at the address that all were told, the others on ports that the system chooses. Each
 * connects to rank 0 and says who it is; when all have come, rank 0 answers each with the addresses of all,
 * and every rank connects to those of lower number. That makes W-1 sockets a rank, W (W-1) / 2 in all.
 *
 * Ports are open to anybody while ranks meet, so who connects must say the right words: `hello`, with the
 * token of the run. Port scanners, and ranks of other runs, are hung up on and change nothing; one that says
 * nothing is not waited for. */
#define _GNU_SOURCE
#include "kernels/comm/tcp_rendezvous.h"

#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/comm/tcp_socket.h"

enum {
    VERSION = 1,
    STRANGERS = 64,  /* connections at once that have not said who they are, beside the ranks' */
    ANOTHER_RUN = 9, /* a verdict */
    BUSY_SECONDS = 2,
    CONNECT_SECONDS = 30, /* to a rank that listens already */
    SLACK_SECONDS = 10,   /* for rank 0, which knows who is missing, to speak first */
    QUIET_SECONDS = 5,    /* of waiting, before a line says for whom */
};

static const char MAGIC[8] = "IHA-TCP";

struct hello {
    char magic[8];
    uint64_t token;
    uint32_t version, ranks, rank, port;
};

struct answer {
    char magic[8];
    uint32_t verdict; /* 0: welcome; EXIT_USER, EXIT_RUN: the run ends, and rank 0 says why; ANOTHER_RUN */
};

/* "HOST:PORT" of rank 0. */
static const char *meeting_place(const struct start *s, char text[300]) {
    snprintf(text, 300, strchr(s->address, ':') ? "[%s]:%d" : "%s:%d", s->address, s->port);
    return text;
}

/* ---- those who connect ---- */

/* What was said so far on a connection. */
struct caller {
    int fd;
    size_t got;
    struct hello hello;
};

static void answer(int fd, int verdict) {
    struct answer a = {.verdict = (uint32_t)verdict};
    memcpy(a.magic, MAGIC, sizeof a.magic);
    tcp_send_all(fd, &a, sizeof a, now() + 1);
}

/* Rank 0: none of those who came is to wait for the others any longer. */
static void answer_all(const struct meeting *m, const struct error *e) {
    for (int r = 1; r < m->start->ranks; r++)
        if (m->sockets[r] >= 0)
            answer(m->sockets[r], e->exit_code);
}

/* 1: a rank has come; 0: nobody of ours; -1: ranks were started so that they cannot run together. */
static int judge(struct meeting *m, const struct caller *c, struct error *e) {
    const struct hello *h = &c->hello;
    int own = m->start->rank, ranks = m->start->ranks, rank = (int)h->rank;
    if (h->token != m->start->token) {
        if (own == 0)
            answer(c->fd, ANOTHER_RUN);
        return 0;
    }
    if (own != 0 && (h->version != VERSION || (int)h->ranks != ranks || rank <= own || rank >= ranks ||
                     m->sockets[rank] >= 0))
        return 0; /* rank 0 would not have let it come so far */
    if (h->version != VERSION)
        return fail_user(e, "rank %d is of another version of this program than rank 0; build them alike",
                         rank);
    if ((int)h->ranks != ranks)
        return fail_user(e,
                         "rank %d was started as one of %d ranks, rank 0 as one of %d; WORLD_SIZE must be "
                         "the same for all",
                         rank, (int)h->ranks, ranks);
    if (rank <= 0 || rank >= ranks)
        return fail_user(e, "two processes were started as rank 0; RANK must be another for each");
    if (m->sockets[rank] >= 0)
        return fail_user(e, "two processes were started as rank %d; RANK must be another for each", rank);
    return 1;
}

static void let_in(struct meeting *m, const struct caller *c) {
    int rank = (int)c->hello.rank;
    m->sockets[rank] = c->fd;
    if (m->start->rank == 0) {
        m->all[rank] = tcp_peer(c->fd);
        m->all[rank].port = c->hello.port;
    }
}

/* 1: all is said that has to be, 0: not yet, -1: that was no rank. */
static int listen_to(struct caller *c) {
    ssize_t n = recv(c->fd, (char *)&c->hello + c->got, sizeof c->hello - c->got, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        return -1;
    c->got += (size_t)n;
    if (memcmp(c->hello.magic, MAGIC, c->got < sizeof MAGIC ? c->got : sizeof MAGIC) != 0)
        return -1;
    return c->got == sizeof c->hello;
}

static void forget(struct caller *callers, int *count, int i, bool hang_up) {
    if (hang_up)
        close(callers[i].fd);
    memmove(callers + i, callers + i + 1, (size_t)(--*count - i) * sizeof *callers);
}

/* Whoever is waiting at the door; where there are too many, the one that has been silent longest goes. */
static int accept_all(struct meeting *m, struct caller *callers, int *count, int room, struct error *e) {
    for (;;) {
        int fd = accept4(m->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE))
            return fail_run(e, "too many open files for %d ranks; raise the limit (ulimit -n)",
                            m->start->ranks);
        if (fd < 0)
            return 0;
        if (*count == room)
            forget(callers, count, 0, true);
        tcp_prepare(fd);
        callers[(*count)++] = (struct caller){.fd = fd};
    }
}

static int hear_all(struct meeting *m, struct caller *callers, int *count, struct error *e) {
    for (int i = 0; i < *count;) {
        int heard = listen_to(&callers[i]), verdict = heard == 1 ? judge(m, &callers[i], e) : heard;
        if (heard == 1 && verdict < 0) {
            answer(callers[i].fd, e->exit_code);
            return -1;
        }
        if (heard == 0) {
            i++;
            continue;
        }
        if (verdict == 1)
            let_in(m, &callers[i]);
        forget(callers, count, i, verdict != 1);
    }
    return 0;
}

/* Those of higher number that have not come; 0: all are here. */
static int missing(const struct meeting *m, char text[256]) {
    int count = 0;
    text[0] = '\0';
    for (int r = m->start->rank + 1; r < m->start->ranks; r++) {
        size_t used = strlen(text);
        if (m->sockets[r] < 0 && count++ < 16)
            snprintf(text + used, 256 - used, "%s%d", used ? ", " : "", r);
    }
    if (count > 16)
        strcat(text, ", ...");
    return count;
}

/* Rank 0: who came and has ended since, may come again. */
static void drop_gone(struct meeting *m) {
    for (int r = 1; r < m->start->ranks; r++)
        if (m->sockets[r] >= 0 && tcp_has_hung_up(m->sockets[r])) {
            close(m->sockets[r]);
            m->sockets[r] = -1;
        }
}

static void say_who_is_missing(const struct meeting *m, double left) {
    char text[256], place[300];
    int count = missing(m, text);
    fprintf(stderr, "waiting for rank%s %s of %d at %s (%.0f s left)\n", count > 1 ? "s" : "", text,
            m->start->ranks, meeting_place(m->start, place), left);
}

/* Until every rank of higher number has connected. */
static int accept_ranks(struct meeting *m, double deadline, struct error *e) {
    double patience = now() + QUIET_SECONDS;
    int room = m->start->ranks + STRANGERS, count = 0, status = 0;
    char text[256];
    struct caller *callers = malloc((size_t)room * sizeof *callers);
    struct pollfd *polled = malloc((size_t)(room + 1) * sizeof *polled);
    if (!callers || !polled)
        status = fail_run(e, "out of memory waiting for the other ranks");
    while (status == 0 && missing(m, text) > 0 && now() < deadline) {
        polled[0] = (struct pollfd){.fd = m->listener, .events = POLLIN};
        for (int i = 0; i < count; i++)
            polled[i + 1] = (struct pollfd){.fd = callers[i].fd, .events = POLLIN};
        poll(polled, (nfds_t)count + 1, 100);
        if (m->start->rank == 0)
            drop_gone(m);
        if (m->start->rank == 0 && now() > patience && now() < deadline) {
            say_who_is_missing(m, deadline - now());
            patience = deadline;
        }
        status =
            accept_all(m, callers, &count, room, e) != 0 || hear_all(m, callers, &count, e) != 0 ? -1 : 0;
    }
    while (count > 0)
        forget(callers, &count, 0, true);
    free(callers);
    free(polled);
    return status;
}

/* ---- saying who one is ---- */

static int say_hello(const struct meeting *m, int fd, double deadline) {
    const struct start *s = m->start;
    struct hello h = {.token = s->token,
                      .version = VERSION,
                      .ranks = (uint32_t)s->ranks,
                      .rank = (uint32_t)s->rank,
                      .port = (uint32_t)tcp_port(m->listener)};
    memcpy(h.magic, MAGIC, sizeof h.magic);
    return tcp_send_all(fd, &h, sizeof h, deadline);
}

/* Say hello, and wait for rank 0's answer. -1: it was none, and *why. */
static int introduce(struct meeting *m, int fd, double deadline, const char **why) {
    struct answer a;
    *why = "whoever listens there is not rank 0";
    if (say_hello(m, fd, deadline) != 0 || tcp_receive_all(fd, &a, sizeof a, deadline) != 0) {
        *why = errno ? strerror(errno) : "it hangs up";
        return -1;
    }
    if (memcmp(a.magic, MAGIC, sizeof a.magic) != 0)
        return -1;
    if (a.verdict == ANOTHER_RUN) {
        *why = "rank 0 of another run answers";
        return -1;
    }
    if (a.verdict != 0) /* which rank 0 has said */
        _exit(a.verdict == EXIT_USER ? EXIT_USER : EXIT_RUN);
    return tcp_receive_all(fd, m->all, (size_t)m->start->ranks * sizeof *m->all, deadline);
}

/* ---- rank 0 ---- */

static int resolve(const struct start *s, struct addrinfo **found, struct error *e) {
    char port[16];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    snprintf(port, sizeof port, "%d", s->port);
    int problem = getaddrinfo(s->address, port, &hints, found);
    if (problem == 0)
        return 0;
    return fail_user(e, "MASTER_ADDR = %.200s: %s; it must be the name or the address of rank 0's machine",
                     s->address, gai_strerror(problem));
}

/* Another process has the port. One that was started as rank 0 too, of this very run, says so and ends the
 * run, this process included. */
static void ask_who_listens(struct meeting *m, const struct addrinfo *found) {
    for (const struct addrinfo *a = found; a; a = a->ai_next) {
        const char *why;
        int fd = tcp_connect(a->ai_addr, a->ai_addrlen, now() + 1);
        if (fd < 0)
            continue;
        introduce(m, fd, now() + 1, &why);
        close(fd);
    }
}

/* A run that has just ended may have the port for a moment more. */
static int open_door(struct meeting *m, struct error *e) {
    const struct start *s = m->start;
    double deadline = now() + BUSY_SECONDS;
    struct addrinfo *found = NULL;
    while (resolve(s, &found, e) != 0) /* names may come late where machines are new */
        if (now() > deadline)
            return -1;
        else
            rest(0.1);
    while ((m->listener = tcp_listen(s->port)) < 0 && errno == EADDRINUSE && now() < deadline) {
        ask_who_listens(m, found);
        rest(0.1);
    }
    int problem = errno;
    freeaddrinfo(found);
    if (m->listener >= 0)
        return 0;
    return fail_user(e,
                     "cannot listen on port %d (%s): %s; another run here may have it: choose another "
                     "MASTER_PORT",
                     s->port, s->port_from, strerror(problem));
}

static int welcome_all(struct meeting *m, struct error *e) {
    int ranks = m->start->ranks;
    for (int r = 1; r < ranks; r++) {
        answer(m->sockets[r], 0);
        if (tcp_send_all(m->sockets[r], m->all, (size_t)ranks * sizeof *m->all, now() + SLACK_SECONDS) != 0)
            return fail_run(e, "rank %d has gone while the ranks met: look at what it says", r);
    }
    return 0;
}

static int gather_all(struct meeting *m, struct error *e) {
    char text[256];
    const struct start *s = m->start;
    if (open_door(m, e) != 0)
        return -1;
    int status = accept_ranks(m, now() + m->timeout, e), count = missing(m, text);
    if (status == 0 && count > 0)
        status = fail_run(e,
                          "rank%s %s of %d did not come to rank 0 at %.200s, port %d, within %g s: are they "
                          "started, with these MASTER_ADDR and MASTER_PORT, and does no firewall stand "
                          "between? (IHA_START_TIMEOUT sets how long to wait)",
                          count > 1 ? "s" : "", text, s->ranks, s->address, s->port, m->timeout);
    if (status == 0)
        status = welcome_all(m, e);
    if (status != 0)
        answer_all(m, e);
    return status;
}

/* ---- the others ---- */

/* Rank 0 may not listen yet, and its machine's name not be known yet. */
static int come(struct meeting *m, struct error *e) {
    const struct start *s = m->start;
    const char *why = "";
    double deadline = now() + m->timeout, patience = now() + QUIET_SECONDS;
    char unknown[600] = "", place[300];
    do {
        struct error not_found;
        struct addrinfo *found = NULL;
        if (resolve(s, &found, &not_found) != 0)
            snprintf(unknown, sizeof unknown, "%.500s", not_found.text), why = unknown;
        for (struct addrinfo *a = found; a; a = a->ai_next) {
            int fd = tcp_connect(a->ai_addr, a->ai_addrlen, patience < deadline ? patience : deadline);
            if (fd >= 0 && introduce(m, fd, now() + m->timeout + SLACK_SECONDS, &why) == 0) {
                m->sockets[0] = fd;
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
        if (now() > patience && now() < deadline) {
            fprintf(stderr, "rank %d: waiting for rank 0 at %s: %s (%.0f s left)\n", s->rank,
                    meeting_place(s, place), why, deadline - now());
            patience = deadline;
        }
        rest(0.1);
    } while (now() < deadline);
    return fail_run(e,
                    "rank %d: cannot reach rank 0 at %.200s, port %d (%s) for %g s: %.300s; is rank 0 "
                    "started, are MASTER_ADDR and MASTER_PORT right, and does no firewall stand between? "
                    "(IHA_START_TIMEOUT sets how long to wait)",
                    s->rank, s->address, s->port, s->port_from, m->timeout, why);
}

int tcp_gather(struct meeting *m, struct error *e) {
    m->all = calloc((size_t)m->start->ranks, sizeof *m->all);
    if (!m->all)
        return fail_run(e, "rank %d: out of memory opening tcp", m->start->rank);
    if (m->start->rank == 0)
        return gather_all(m, e);
    m->listener = tcp_listen(0);
    if (m->listener < 0)
        return fail_run(e, "rank %d: cannot listen: %s", m->start->rank, strerror(errno));
    return come(m, e);
}

/* A rank on rank 0's machine may have come by a way that only leads there: others take theirs to rank 0. */
static int join(struct meeting *m, int rank, struct error *e) {
    struct address a = m->all[rank];
    struct sockaddr_storage to;
    double limit = m->timeout < CONNECT_SECONDS ? m->timeout : CONNECT_SECONDS, deadline = now() + limit;
    int problem;
    if (tcp_is_loopback(&a)) {
        a = tcp_peer(m->sockets[0]);
        a.port = m->all[rank].port;
    }
    socklen_t bytes = tcp_address(&a, &to);
    do {
        int fd = tcp_connect((struct sockaddr *)&to, bytes, deadline);
        if (fd >= 0 && say_hello(m, fd, deadline) == 0) {
            m->sockets[rank] = fd;
            return 0;
        }
        problem = errno;
        if (fd >= 0)
            close(fd);
        rest(0.1);
    } while (now() < deadline);
    char name[INET6_ADDRSTRLEN + 1] = "?";
    getnameinfo((struct sockaddr *)&to, bytes, name, sizeof name, NULL, 0, NI_NUMERICHOST);
    return fail_run(
        e,
        "cannot connect to rank %d at %s, port %u: %s; every two ranks have a connection, on ports "
        "that the system chooses: does a firewall stand between?",
        rank, name, a.port, strerror(problem));
}

int tcp_mesh(struct meeting *m, struct error *e) {
    char text[256];
    int rank = m->start->rank;
    if (rank == 0)
        return 0;
    for (int r = 1; r < rank; r++)
        if (join(m, r, e) != 0)
            return -1;
    if (accept_ranks(m, now() + m->timeout, e) != 0)
        return -1;
    int count = missing(m, text);
    if (count == 0)
        return 0;
    return fail_run(e,
                    "rank%s %s did not connect for %g s; every two ranks have a connection, on ports that "
                    "the system chooses: does a firewall stand between?",
                    count > 1 ? "s" : "", text, m->timeout);
}

void tcp_meeting_free(struct meeting *m) {
    if (m->listener >= 0)
        close(m->listener);
    free(m->all);
}
