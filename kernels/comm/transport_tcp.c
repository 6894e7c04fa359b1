/* Messages between ranks over TCP: one socket for every pair, nothing but the operating system needed.
 *
 * A message is a header and its bytes. Those to one rank leave in the order in which they were started, and
 * are read straight into the memory of the receives that were started in the same order; what nobody asked
 * for yet stays in the system's buffers, which stops the sender. The header says what the receiver knows
 * already, so that ranks that have lost step are found out at once.
 *
 * When a rank finds that the run cannot go on, it sends all others an `end` with the reason. Each hands it on
 * and ends too, and the first rank that is still to be reached says it, once for the whole run: it is the one
 * whose terminal a user looks at. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/comm/tcp_rendezvous.h"
#include "kernels/comm/tcp_socket.h"
#include "kernels/comm/transport.h"

enum { HEADER_MAGIC = 0x41484954, LINE = 1500, SPARE_FILES = 256 };
/* Seconds: for the first rank to say that it has said why; for a reason to come behind a closed connection;
 * for the others to take leave. */
static const double SAY_SECONDS = 3, REASON_SECONDS = 1, LEAVE_SECONDS = 1;

enum kind { DATA, END, END_SAID /* and one rank has said why */ };

struct header {
    uint32_t magic, kind;
    uint64_t sequence, bytes; /* of the data that follow; of an end: of its text */
};

struct message {
    struct message *next;
    char *data;
    size_t bytes;
    enum kind kind;
    int peer;
    bool pending;
};

struct queue {
    struct message *first, *last;
};

struct peer {
    int fd;      /* -1: this rank, or closed */
    int problem; /* errno why it was closed, 0: by the other side */
    struct queue in, out;
    struct header header_in, header_out;
    size_t moved_in, moved_out; /* of the message at hand, its header included */
    uint64_t received, sent;    /* messages so far */
    char text[LINE];            /* of an end that is arriving */
};

struct tcp {
    struct transport base;
    struct peer *peers;    /* [ranks] */
    struct message *slots; /* by slot */
    struct pollfd *polled; /* [ranks] */
    bool ending;           /* this rank ends the run: what data still come are not wanted */
    bool reported;         /* and a rank has said why */
};

enum finder { FOUND_HERE, FOUND_BY_ANOTHER };

static struct tcp *tcp_of(struct transport *t) {
    return (struct tcp *)t;
}

static void end_run(struct tcp *t, const char *line, enum finder finder) __attribute__((noreturn));

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

static void hang_up(struct peer *p, int problem) {
    close(p->fd);
    p->fd = -1;
    p->problem = problem;
}

/* ---- what arrives ---- */

/* Ranks that do not agree on what comes next. */
static void lost_step(struct tcp *t, int rank, const struct message *expected) {
    const struct header *h = &t->peers[rank].header_in;
    char line[LINE];
    snprintf(
        line, sizeof line,
        "rank %d (%s): rank %d (%s) sent message %llu of %llu bytes (magic %x) where message %llu of %zu "
        "bytes should be: a bug, or ranks of different programs; please report it",
        t->base.rank, t->base.hosts[t->base.rank], rank, t->base.hosts[rank], (unsigned long long)h->sequence,
        (unsigned long long)h->bytes, h->magic, (unsigned long long)t->peers[rank].received,
        expected ? expected->bytes : 0);
    end_run(t, line, FOUND_HERE);
}

/* Where the next bytes from a rank go; 0: nowhere yet. */
static size_t space_for(struct tcp *t, int rank, char **to) {
    struct peer *p = &t->peers[rank];
    struct header *h = &p->header_in;
    if (p->moved_in < sizeof *h) {
        *to = (char *)h + p->moved_in;
        return sizeof *h - p->moved_in;
    }
    size_t done = p->moved_in - sizeof *h;
    struct message *m = p->in.first;
    if (t->ending) {
        static char sink[1 << 16];
        bool text = h->kind != DATA && h->bytes < sizeof p->text;
        *to = text ? p->text + done : sink;
        return text || h->bytes - done < sizeof sink ? h->bytes - done : sizeof sink;
    }
    if (h->magic != HEADER_MAGIC || (h->kind == DATA && h->sequence != p->received) || h->kind > END_SAID ||
        (h->kind != DATA && h->bytes >= sizeof p->text) || (h->kind == DATA && m && h->bytes != m->bytes))
        lost_step(t, rank, m);
    if (h->kind == DATA && !m)
        return 0;
    *to = (h->kind == DATA ? m->data : p->text) + done;
    return h->bytes - done;
}

static void note_end(struct tcp *t, struct peer *p) {
    p->text[p->header_in.bytes] = '\0';
    t->reported = t->reported || p->header_in.kind == END_SAID;
    if (!t->ending)
        end_run(t, p->text, FOUND_BY_ANOTHER);
}

/* The message at hand is complete where that is so, and the next one is at hand. */
static bool complete(struct tcp *t, struct peer *p) {
    const struct header *h = &p->header_in;
    if (p->moved_in < sizeof *h || p->moved_in - sizeof *h < h->bytes ||
        (h->kind == DATA && !p->in.first && !t->ending))
        return false;
    p->moved_in = 0;
    if (h->kind != DATA && h->bytes < sizeof p->text) {
        note_end(t, p);
    } else if (!t->ending) {
        pop(&p->in);
        p->received++;
    }
    return true;
}

static void read_from(struct tcp *t, int rank) {
    struct peer *p = &t->peers[rank];
    char *to;
    while (p->fd >= 0) {
        size_t space = space_for(t, rank, &to);
        if (space == 0 && !complete(t, p))
            return;
        if (space == 0)
            continue;
        ssize_t n = recv(p->fd, to, space, 0);
        if (n > 0)
            p->moved_in += (size_t)n;
        else if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        else
            hang_up(p, n == 0 ? 0 : errno);
        if (n > 0)
            complete(t, p);
    }
}

/* ---- what leaves ---- */

static void write_to(struct peer *p) {
    while (p->fd >= 0 && p->out.first) {
        struct message *m = p->out.first;
        struct header *h = &p->header_out;
        if (p->moved_out == 0)
            *h = (struct header){HEADER_MAGIC, m->kind, p->sent, m->bytes};
        size_t head = p->moved_out < sizeof *h ? sizeof *h - p->moved_out : 0;
        size_t done = p->moved_out - (sizeof *h - head);
        struct iovec parts[2] = {{(char *)h + (sizeof *h - head), head}, {m->data + done, m->bytes - done}};
        struct msghdr both = {.msg_iov = parts, .msg_iovlen = 2};
        ssize_t n = sendmsg(p->fd, &both, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0) { /* what it sent before it went is still to be read, there may be the reason */
            p->problem = errno;
            return;
        }
        p->moved_out += (size_t)n;
        if (p->moved_out == sizeof *h + m->bytes) {
            p->moved_out = 0;
            p->sent++;
            pop(&p->out);
        }
    }
}

/* ---- progress ---- */

/* Wait at most so many milliseconds for something to move, and let it. */
static void move(struct tcp *t, int milliseconds) {
    for (int r = 0; r < t->base.ranks; r++) {
        struct peer *p = &t->peers[r];
        bool unasked = p->moved_in == sizeof p->header_in && p->header_in.kind == DATA &&
                       p->header_in.bytes > 0 && !p->in.first && !t->ending;
        t->polled[r] = (struct pollfd){
            .fd = unasked && !p->out.first ? -1 : p->fd, /* or its hanging up would be reported for ever */
            .events = (short)((unasked ? 0 : POLLIN) | (p->out.first ? POLLOUT : 0))};
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

/* ---- the end of a run ---- */

static void say(struct tcp *t, const char *line) {
    fprintf(stderr, "\ntrain_iha: %s\n", line);
    t->reported = true;
}

/* Behind the message that is half sent; those after it nobody will miss. */
static void send_end(struct tcp *t, int rank, struct message *end, const char *line) {
    struct peer *p = &t->peers[rank];
    bool begun = p->out.first && p->moved_out > 0;
    *end = (struct message){
        .data = (char *)line, .bytes = strlen(line), .kind = t->reported ? END_SAID : END, .peer = rank};
    p->out.last = p->out.first;
    if (begun)
        p->out.first->next = NULL;
    else
        p->out.first = NULL;
    push(&p->out, end);
}

/* Those of this rank's connections on which the other side may still speak; ours of it ends when all is sent.
 */
static int still_open(struct tcp *t) {
    int open = 0;
    for (int r = 0; r < t->base.ranks; r++) {
        struct peer *p = &t->peers[r];
        if (p->fd >= 0 && !p->out.first)
            shutdown(p->fd, SHUT_WR);
        open += p->fd >= 0;
    }
    return open;
}

static void end_run(struct tcp *t, const char *line, enum finder finder) {
    int ranks = t->base.ranks, first = 0;
    char text[LINE];
    struct message *ends = calloc((size_t)ranks, sizeof *ends);
    snprintf(text, sizeof text, "%s", line);
    t->ending = true;
    while (first != t->base.rank && (t->peers[first].fd < 0 || t->peers[first].problem))
        first++;
    if (first == t->base.rank && !t->reported)
        say(t, text);
    for (int r = 0; r < ranks && ends; r++)
        if (t->peers[r].fd >= 0)
            send_end(t, r, &ends[r], text);
    double begin = now();
    for (;;) {
        bool waits = finder == FOUND_HERE && !t->reported;
        if (still_open(t) == 0 || now() - begin > (waits ? SAY_SECONDS : LEAVE_SECONDS))
            break;
        move(t, 20);
    }
    if (finder == FOUND_HERE && !t->reported)
        say(t, text);
    _exit(EXIT_RUN);
}

static void tcp_end(struct transport *t, const char *line) {
    end_run(tcp_of(t), line, FOUND_HERE);
}

static void tcp_pause(struct transport *t, double seconds) {
    double begin = now();
    while (now() - begin < seconds) {
        move(tcp_of(t), 0);
        rest(0.01);
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
    (void)e; /* what is wrong with a peer is found by test() */
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
    move(tcp, 0);
    for (int i = slot; i < slot + count; i++) {
        const struct message *m = &tcp->slots[i];
        const struct peer *p = &tcp->peers[m->peer];
        pending += m->pending;
        if (!m->pending || p->fd >= 0)
            continue;
        tcp_pause(t, REASON_SECONDS); /* it may have ended because another did, who says why */
        if (p->problem)
            return fail_run(e, "the connection with rank %d (%s) is lost: %s", m->peer, t->hosts[m->peer],
                            strerror(p->problem));
        return fail_run(e, "rank %d (%s) has gone: it died, or was ended", m->peer, t->hosts[m->peer]);
    }
    return pending == 0;
}

static bool tcp_unasked(struct transport *t, int source, size_t bytes) {
    const struct peer *p = &tcp_of(t)->peers[source];
    move(tcp_of(t), 0);
    return p->fd >= 0 && !p->in.first && p->moved_in == sizeof p->header_in && p->header_in.kind == DATA &&
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

/* A socket for every rank, and those of strangers who knock. */
static void allow_files(int ranks) {
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

static int meet(struct tcp *tcp, const struct start *start, double timeout, struct error *e) {
    struct transport *t = &tcp->base;
    int *sockets = malloc((size_t)t->ranks * sizeof *sockets);
    struct meeting m = {.start = start, .timeout = timeout, .sockets = sockets, .listener = -1};
    if (!sockets)
        return fail_run(e, "rank %d: out of memory opening tcp", t->rank);
    for (int r = 0; r < t->ranks; r++)
        sockets[r] = -1;
    int gathered = tcp_gather(&m, e), meshed = gathered == 0 ? tcp_mesh(&m, e) : -1;
    for (int r = 0; r < t->ranks; r++)
        tcp->peers[r].fd = sockets[r];
    tcp_meeting_free(&m);
    free(sockets);
    if (gathered == 0 && meshed != 0) {
        char line[LINE];
        snprintf(line, sizeof line, "rank %d (%s): %s", t->rank, t->hosts[t->rank], e->text);
        end_run(tcp, line, FOUND_HERE);
    }
    return gathered;
}

struct transport *transport_tcp_open(const struct start *start, double timeout, struct error *e) {
    static const struct transport_ops ops = {
        .name = "tcp",
        .closes_alone = true,
        .reserve = tcp_reserve,
        .receive = tcp_receive,
        .send = tcp_send,
        .test = tcp_test,
        .unasked = tcp_unasked,
        .pause = tcp_pause,
        .end = tcp_end,
        .close = tcp_close,
        .release = tcp_close,
    };
    double start_timeout = timeout;
    if (read_timeout(&start_timeout, e) != 0)
        return NULL;
    struct tcp *tcp = calloc(1, sizeof *tcp);
    size_t ranks = (size_t)start->ranks;
    if (tcp) {
        tcp->base = (struct transport){.ops = &ops,
                                       .rank = start->rank,
                                       .ranks = start->ranks,
                                       .local_rank = start->local_rank,
                                       .local_ranks = start->local_ranks,
                                       .timeout = timeout,
                                       .hosts = calloc(ranks, TRANSPORT_HOST)};
        tcp->peers = calloc(ranks, sizeof *tcp->peers);
        for (size_t r = 0; r < ranks && tcp->peers; r++)
            tcp->peers[r].fd = -1;
        tcp->polled = calloc(ranks, sizeof *tcp->polled);
    }
    if (!tcp || !tcp->base.hosts || !tcp->peers || !tcp->polled) {
        fail_run(e, "rank %d: out of memory opening tcp", start->rank);
        if (tcp)
            tcp_close(&tcp->base);
        return NULL;
    }
    gethostname(tcp->base.hosts[start->rank], TRANSPORT_HOST - 1);
    allow_files(start->ranks);
    if (meet(tcp, start, start_timeout, e) == 0)
        return &tcp->base;
    tcp_close(&tcp->base);
    return NULL;
}
