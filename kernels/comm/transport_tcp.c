/* Messages between ranks over TCP, with one socket between every two ranks and no library.
 *
 * A message is a header and its data. Messages to one rank leave in the order in which they were started, and
 * are read straight into the buffers of the receives, which were started in the same order. Data without a
 * receive stay in the socket's buffer, which makes the sender wait. The header repeats what the receiver
 * expects, so that ranks that are out of step are found at once.
 *
 * A rank that finds that the run cannot go on sends all others an ABORT message with the reason. Each rank
 * forwards it and ends. The lowest rank that can still be reached prints the reason, once for the whole run:
 * usually rank 0, whose output the user sees. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/comm/tcp_rendezvous.h"
#include "kernels/comm/tcp_socket.h"
#include "kernels/comm/transport.h"

enum {
    HEADER_MAGIC = 0x41484954,
    LINE_BYTES = 1500,
    SPARE_FILES = 256, /* open files besides the sockets of the ranks, including pending connections */
};

/* After an abort, in seconds: for another rank to confirm that it has printed the reason; for an ABORT
 * message to arrive from a rank whose connection is closed; for the other ranks to close their
 * connections. */
static const double REPORT_SECONDS = 3, REASON_SECONDS = 1, DRAIN_SECONDS = 1;

enum message_kind { DATA, ABORT, ABORT_REPORTED /* a rank has printed the reason */ };

struct header {
    uint32_t magic, kind;
    uint64_t sequence, bytes; /* of the data that follow, or of an abort's text */
};

struct message {
    struct message *next;
    char *data;
    size_t bytes;
    enum message_kind kind;
    int peer;
    bool pending;
};

struct queue {
    struct message *first, *last;
};

struct peer {
    int fd;    /* -1: this rank, or closed */
    int error; /* errno of the failure; 0: none, or closed by the peer */
    struct queue in, out;
    struct header header_in, header_out;
    size_t bytes_in, bytes_out; /* of the current message so far, its header included */
    uint64_t received, sent;    /* messages so far */
    char text[LINE_BYTES];      /* of an abort that is arriving */
};

struct tcp {
    struct transport base;
    struct peer *peers;    /* [ranks] */
    struct message *slots; /* by slot */
    struct pollfd *polled; /* [ranks] */
    bool aborting;         /* arriving data are discarded */
    bool reported;         /* a rank has printed why */
};

enum abort_origin { ABORT_LOCAL, ABORT_FORWARDED };

static struct tcp *tcp_of(struct transport *t) {
    return (struct tcp *)t;
}

static void abort_run(struct tcp *t, const char *line, enum abort_origin origin) __attribute__((noreturn));

/* ---- queues ---- */

static void push(struct queue *q, struct message *m) {
    m->next = NULL;
    m->pending = true;
    if (q->first)
        q->last->next = m;
    else
        q->first = m;
    q->last = m;
}

static void pop(struct queue *q) {
    q->first->pending = false;
    q->first = q->first->next;
}

static void close_peer(struct peer *p, int error) {
    close(p->fd);
    p->fd = -1;
    p->error = error;
}

/* ---- receiving ---- */

/* The ranks' sequences of messages differ. */
static void abort_out_of_step(struct tcp *t, int rank, const struct message *expected) {
    const struct header *h = &t->peers[rank].header_in;
    char line[LINE_BYTES];
    snprintf(
        line, sizeof line,
        "rank %d (%s): rank %d (%s) sent message %llu of %llu bytes (magic %x) where message %llu of %zu "
        "bytes was expected: the ranks run different programs, or this is a bug; please report it",
        t->base.rank, t->base.hosts[t->base.rank], rank, t->base.hosts[rank], (unsigned long long)h->sequence,
        (unsigned long long)h->bytes, h->magic, (unsigned long long)t->peers[rank].received,
        expected ? expected->bytes : 0);
    abort_run(t, line, ABORT_LOCAL);
}

/* Where the next bytes from a rank go, and how many at most; 0: there is no receive for them yet. */
static size_t receive_space(struct tcp *t, int rank, char **to) {
    struct peer *p = &t->peers[rank];
    struct header *h = &p->header_in;
    if (p->bytes_in < sizeof *h) {
        *to = (char *)h + p->bytes_in;
        return sizeof *h - p->bytes_in;
    }
    size_t done = p->bytes_in - sizeof *h;
    struct message *m = p->in.first;
    if (t->aborting) {
        static char discard[1 << 16];
        bool text = h->kind != DATA && h->bytes < sizeof p->text;
        *to = text ? p->text + done : discard;
        return text || h->bytes - done < sizeof discard ? h->bytes - done : sizeof discard;
    }
    if (h->magic != HEADER_MAGIC || (h->kind == DATA && h->sequence != p->received) ||
        h->kind > ABORT_REPORTED || (h->kind != DATA && h->bytes >= sizeof p->text) ||
        (h->kind == DATA && m && h->bytes != m->bytes))
        abort_out_of_step(t, rank, m);
    if (h->kind == DATA && !m)
        return 0;
    *to = (h->kind == DATA ? m->data : p->text) + done;
    return h->bytes - done;
}

static void receive_abort(struct tcp *t, struct peer *p) {
    p->text[p->header_in.bytes] = '\0';
    t->reported = t->reported || p->header_in.kind == ABORT_REPORTED;
    if (!t->aborting)
        abort_run(t, p->text, ABORT_FORWARDED);
}

/* Whether the current message is complete; if so, the next one becomes current. */
static bool finish_message(struct tcp *t, struct peer *p) {
    const struct header *h = &p->header_in;
    if (p->bytes_in < sizeof *h || p->bytes_in - sizeof *h < h->bytes ||
        (h->kind == DATA && !p->in.first && !t->aborting))
        return false;
    p->bytes_in = 0;
    if (h->kind != DATA && h->bytes < sizeof p->text) {
        receive_abort(t, p);
    } else if (!t->aborting) {
        pop(&p->in);
        p->received++;
    }
    return true;
}

static void read_from(struct tcp *t, int rank) {
    struct peer *p = &t->peers[rank];
    char *to;
    while (p->fd >= 0) {
        size_t space = receive_space(t, rank, &to);
        if (space == 0 && !finish_message(t, p))
            return;
        if (space == 0)
            continue;
        ssize_t n = recv(p->fd, to, space, 0);
        if (n > 0)
            p->bytes_in += (size_t)n;
        else if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        else
            close_peer(p, n == 0 ? 0 : errno);
        if (n > 0)
            finish_message(t, p);
    }
}

/* ---- sending ---- */

static void write_to(struct peer *p) {
    while (p->fd >= 0 && p->out.first) {
        struct message *m = p->out.first;
        struct header *h = &p->header_out;
        if (p->bytes_out == 0)
            *h = (struct header){HEADER_MAGIC, m->kind, p->sent, m->bytes};
        size_t head = p->bytes_out < sizeof *h ? sizeof *h - p->bytes_out : 0;
        size_t done = p->bytes_out - (sizeof *h - head);
        struct iovec parts[2] = {{(char *)h + (sizeof *h - head), head}, {m->data + done, m->bytes - done}};
        struct msghdr both = {.msg_iov = parts, .msg_iovlen = 2};
        ssize_t n = sendmsg(p->fd, &both, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0) { /* still read from it: an ABORT may have arrived before the peer ended */
            p->error = errno;
            return;
        }
        p->bytes_out += (size_t)n;
        if (p->bytes_out == sizeof *h + m->bytes) {
            p->bytes_out = 0;
            p->sent++;
            pop(&p->out);
        }
    }
}

/* ---- progress ---- */

/* Send and receive what is possible without blocking, after waiting at most so many milliseconds. */
static void progress(struct tcp *t, int milliseconds) {
    for (int r = 0; r < t->base.ranks; r++) {
        struct peer *p = &t->peers[r];
        bool unexpected = p->bytes_in == sizeof p->header_in && p->header_in.kind == DATA &&
                          p->header_in.bytes > 0 && !p->in.first && !t->aborting;
        /* fd -1 is ignored: otherwise POLLHUP would keep poll from waiting. */
        t->polled[r] =
            (struct pollfd){.fd = unexpected && !p->out.first ? -1 : p->fd,
                            .events = (short)((unexpected ? 0 : POLLIN) | (p->out.first ? POLLOUT : 0))};
    }
    if (poll(t->polled, (nfds_t)t->base.ranks, milliseconds) <= 0)
        return;
    for (int r = 0; r < t->base.ranks; r++) {
        if (t->polled[r].revents & (POLLOUT | POLLERR | POLLHUP))
            write_to(&t->peers[r]);
        if (t->polled[r].revents & (POLLIN | POLLERR | POLLHUP))
            read_from(t, r);
    }
}

/* ---- aborting the run ---- */

static void print_line(struct tcp *t, const char *line) {
    fprintf(stderr, "\ntrain_iha: %s\n", line);
    t->reported = true;
}

/* Queue an ABORT behind the message that is partly sent; the rest of the queue is dropped. */
static void queue_abort(struct tcp *t, int rank, struct message *abort_message, const char *line) {
    struct peer *p = &t->peers[rank];
    bool partly_sent = p->out.first && p->bytes_out > 0;
    *abort_message = (struct message){.data = (char *)line,
                                      .bytes = strlen(line),
                                      .kind = t->reported ? ABORT_REPORTED : ABORT,
                                      .peer = rank};
    p->out.last = p->out.first;
    if (partly_sent)
        p->out.first->next = NULL;
    else
        p->out.first = NULL;
    push(&p->out, abort_message);
}

/* Shut down the sending side of connections with nothing left to send; returns how many the peer keeps
 * open. */
static int shutdown_sent(struct tcp *t) {
    int open = 0;
    for (int r = 0; r < t->base.ranks; r++) {
        struct peer *p = &t->peers[r];
        if (p->fd >= 0 && !p->out.first)
            shutdown(p->fd, SHUT_WR);
        open += p->fd >= 0;
    }
    return open;
}

static void abort_run(struct tcp *t, const char *line, enum abort_origin origin) {
    int ranks = t->base.ranks, first = 0;
    char text[LINE_BYTES];
    struct message *messages = calloc((size_t)ranks, sizeof *messages);
    snprintf(text, sizeof text, "%s", line);
    t->aborting = true;
    while (first != t->base.rank && (t->peers[first].fd < 0 || t->peers[first].error))
        first++;
    if (first == t->base.rank && !t->reported)
        print_line(t, text);
    for (int r = 0; r < ranks && messages; r++)
        if (t->peers[r].fd >= 0)
            queue_abort(t, r, &messages[r], text);
    double begin = clock_seconds();
    for (;;) {
        bool must_report = origin == ABORT_LOCAL && !t->reported;
        if (shutdown_sent(t) == 0 || clock_seconds() - begin > (must_report ? REPORT_SECONDS : DRAIN_SECONDS))
            break;
        progress(t, 20);
    }
    if (origin == ABORT_LOCAL && !t->reported)
        print_line(t, text);
    _exit(EXIT_RUN);
}

static void tcp_abort_run(struct transport *t, const char *line) {
    abort_run(tcp_of(t), line, ABORT_LOCAL);
}

static void tcp_pause(struct transport *t, double seconds) {
    double begin = clock_seconds();
    while (clock_seconds() - begin < seconds) {
        progress(tcp_of(t), 0);
        clock_sleep(0.01);
    }
}

/* ---- messages ---- */

static int tcp_reserve(struct transport *t, int count, struct error *e) {
    struct message *slots = calloc((size_t)count, sizeof *slots);
    if (!slots)
        return fail_run(e, "rank %d: out of memory opening tcp", t->rank);
    tcp_of(t)->slots = slots;
    return 0;
}

static int tcp_receive(struct transport *t, int slot, int source, void *to, size_t bytes, struct error *e) {
    (void)e; /* test() finds closed connections */
    struct message *m = &tcp_of(t)->slots[slot];
    *m = (struct message){.data = to, .bytes = bytes, .peer = source};
    push(&tcp_of(t)->peers[source].in, m);
    return 0;
}

static int tcp_send(struct transport *t, int slot, int target, const void *from, size_t bytes,
                    struct error *e) {
    (void)e;
    struct message *m = &tcp_of(t)->slots[slot];
    *m = (struct message){.data = (char *)from, .bytes = bytes, .peer = target};
    push(&tcp_of(t)->peers[target].out, m);
    write_to(&tcp_of(t)->peers[target]);
    return 0;
}

static int tcp_test(struct transport *t, int slot, int count, struct error *e) {
    struct tcp *tcp = tcp_of(t);
    int pending = 0;
    progress(tcp, 0);
    for (int i = slot; i < slot + count; i++) {
        const struct message *m = &tcp->slots[i];
        const struct peer *p = &tcp->peers[m->peer];
        pending += m->pending;
        if (!m->pending || p->fd >= 0)
            continue;
        tcp_pause(t, REASON_SECONDS); /* it may have ended because the run is being aborted */
        if (p->error)
            return fail_run(e, "lost the connection to rank %d (%s): %s", m->peer, t->hosts[m->peer],
                            strerror(p->error));
        return fail_run(e, "rank %d (%s) has ended: it crashed or was killed", m->peer, t->hosts[m->peer]);
    }
    return pending == 0;
}

static bool tcp_probe(struct transport *t, int source, size_t bytes) {
    const struct peer *p = &tcp_of(t)->peers[source];
    progress(tcp_of(t), 0);
    return p->fd >= 0 && !p->in.first && p->bytes_in == sizeof p->header_in && p->header_in.kind == DATA &&
           p->header_in.bytes == bytes;
}

/* ---- opening and closing ---- */

static void tcp_close(struct transport *t) {
    struct tcp *tcp = tcp_of(t);
    for (int r = 0; tcp->peers && r < t->ranks; r++)
        if (tcp->peers[r].fd >= 0)
            close(tcp->peers[r].fd);
    free(tcp->peers);
    free(tcp->slots);
    free(tcp->polled);
    free(t->hosts);
    free(tcp);
}

/* A socket for every rank, unidentified connections during the rendezvous, and files. */
static void raise_file_limit(int ranks) {
    struct rlimit limit;
    rlim_t need = (rlim_t)ranks + SPARE_FILES;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < need) {
        limit.rlim_cur = limit.rlim_max < need ? limit.rlim_max : need;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static int read_timeout(double *seconds, struct error *e) {
    const char *text = getenv("IHA_START_TIMEOUT");
    char *end;
    if (!text)
        return 0;
    *seconds = strtod(text, &end);
    if (end == text || *end || !(*seconds > 0 && *seconds < 1e6))
        return fail_user(e, "IHA_START_TIMEOUT = %.40s: not a number of seconds", text);
    return 0;
}

static int connect_ranks(struct tcp *tcp, const struct launcher_env *env, double timeout, struct error *e) {
    struct transport *t = &tcp->base;
    int *sockets = malloc((size_t)t->ranks * sizeof *sockets);
    struct tcp_rendezvous rdzv = {.env = env, .timeout = timeout, .sockets = sockets, .listener = -1};
    if (!sockets)
        return fail_run(e, "rank %d: out of memory opening tcp", t->rank);
    for (int r = 0; r < t->ranks; r++)
        sockets[r] = -1;
    int gathered = tcp_rendezvous_gather(&rdzv, e);
    int connected = gathered == 0 ? tcp_rendezvous_connect_peers(&rdzv, e) : -1;
    for (int r = 0; r < t->ranks; r++)
        tcp->peers[r].fd = sockets[r];
    tcp_rendezvous_free(&rdzv);
    free(sockets);
    if (gathered == 0 && connected != 0) {
        char line[LINE_BYTES];
        snprintf(line, sizeof line, "rank %d (%s): %s", t->rank, t->hosts[t->rank], e->text);
        abort_run(tcp, line, ABORT_LOCAL);
    }
    return gathered;
}

struct transport *transport_tcp_open(const struct launcher_env *env, double timeout, struct error *e) {
    static const struct transport_ops ops = {
        .name = "tcp",
        .close_needs_barrier = true,
        .reserve = tcp_reserve,
        .receive = tcp_receive,
        .send = tcp_send,
        .test = tcp_test,
        .probe = tcp_probe,
        .pause = tcp_pause,
        .abort_run = tcp_abort_run,
        .close = tcp_close,
        .release = tcp_close,
    };
    double start_timeout = timeout;
    if (read_timeout(&start_timeout, e) != 0)
        return NULL;
    struct tcp *tcp = calloc(1, sizeof *tcp);
    size_t ranks = (size_t)env->ranks;
    if (tcp) {
        tcp->base = (struct transport){.ops = &ops,
                                       .rank = env->rank,
                                       .ranks = env->ranks,
                                       .local_rank = env->local_rank,
                                       .local_ranks = env->local_ranks,
                                       .timeout = timeout,
                                       .hosts = calloc(ranks, TRANSPORT_HOST_BYTES)};
        tcp->peers = calloc(ranks, sizeof *tcp->peers);
        for (size_t r = 0; r < ranks && tcp->peers; r++)
            tcp->peers[r].fd = -1;
        tcp->polled = calloc(ranks, sizeof *tcp->polled);
    }
    if (!tcp || !tcp->base.hosts || !tcp->peers || !tcp->polled) {
        fail_run(e, "rank %d: out of memory opening tcp", env->rank);
        if (tcp)
            tcp_close(&tcp->base);
        return NULL;
    }
    gethostname(tcp->base.hosts[env->rank], TRANSPORT_HOST_BYTES - 1);
    raise_file_limit(env->ranks);
    if (connect_ranks(tcp, env, start_timeout, e) == 0)
        return &tcp->base;
    tcp_close(&tcp->base);
    return NULL;
}
