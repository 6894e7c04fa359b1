/* Collectives on host memory, made of non-blocking messages between pairs of ranks.
 *
 * MPI's own collectives are not used, for three reasons: a sum in rank order does not depend on the library's
 * choice of algorithm; every byte is sent once, so a rank sends and receives (W-1)/W of a buffer, the minimum
 * for both halves of an all-reduce; and when a message does not arrive, it is known from which rank.
 *
 * Messages make progress only while the transport is called, so progress() is called between operations. */
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/clock.h"
#include "kernels/comm/comm_p2p.h"
#include "kernels/rounding.h"

enum {
    DELAY_SECONDS = 5, /* so that a rank with a better error message aborts the run first */
    MAX_REDUCED = 8,   /* doubles in an all_reduce */
};

struct transfer {
    comm_event event; /* 0: free */
    const char *name;
    int slot;             /* the transport's first: receives from each rank, then sends to each */
    char *staging;        /* [ranks*n] received shares to be summed */
    uint16_t *rounded;    /* [ranks*n] bf16 shares to be sent */
    tensor buffer, piece; /* of a reduce_scatter; piece.data NULL otherwise */
    bool accumulate;
};

struct p2p {
    struct comm base;
    struct comm_ops ops;
    struct transport *transport;
    comm_event events; /* so far */
    struct transfer transfers[COMM_IN_FLIGHT];
    enum dtype wire;
    size_t staging_bytes;
    double *small; /* [ranks * MAX_REDUCED] */
};

static struct p2p *p2p_of(struct comm *c) {
    return (struct p2p *)c;
}

/* ---- aborting the run ---- */

/* Print the reason and end every rank. */
static void abort_run(const struct p2p *p, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));
static void abort_run(const struct p2p *p, const char *format, ...) {
    char line[1400], text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    snprintf(line, sizeof line, "rank %d (%s): %s", p->base.rank, p->transport->hosts[p->base.rank], text);
    p->transport->ops->abort_run(p->transport, line);
    abort();
}

static void p2p_abort_run(struct comm *c, const char *text) {
    abort_run(p2p_of(c), "%s", text);
}

static void check_status(const struct p2p *p, int status, const char *name, const struct error *e) {
    if (status < 0)
        abort_run(p, "%s failed: %s; " COMM_RESUME_HINT, name, e->text);
}

/* Abort the run, naming the ranks whose messages have not arrived (or, if all have, that have not received
 * ours); return if there are none. When one rank fails, all others time out at almost the same moment, but
 * only one should report. A rank that waits for a single peer has found the failed one, while one that
 * waits for several may be a collective ahead, waiting for ranks that themselves wait for the failed one:
 * so the former aborts first, and of several such ranks the lowest. */
static void abort_on_timeout(struct p2p *p, struct transfer *t, double waited) {
    char late[640] = "";
    struct transport *transport = p->transport;
    int ranks = p->base.ranks, count = 0, lowest_alive = -1;
    for (int half = t->slot; half <= t->slot + ranks && count == 0; half += ranks)
        for (int rank = 0; rank < ranks; rank++) {
            if (transport->ops->test(transport, half + rank, 1, &(struct error){0}) > 0) {
                lowest_alive = lowest_alive < 0 ? rank : lowest_alive;
                continue;
            }
            size_t used = strlen(late);
            if (count++ < 8)
                snprintf(late + used, sizeof late - used, "%srank %d (%.64s)", used ? ", " : "", rank,
                         transport->hosts[rank]);
        }
    if (count == 0)
        return;
    int priority = 2 * (count > 1) + (lowest_alive != p->base.rank);
    transport->ops->pause(transport, priority * DELAY_SECONDS);
    abort_run(p,
              "no answer from %s%s for %.0f s in %s: dead, hung or unreachable; " COMM_RESUME_HINT
              " (system.peer_timeout = %.0f sets how long to wait)",
              late, count > 8 ? " and more" : "", waited, t->name, transport->timeout);
}

/* ---- transfers ---- */

/* type: of the sum and of this rank's own share; received, load: of the others' shares, and how to read
 * one. */
#define ADD_IN_RANK_ORDER(type, received, load)                                                              \
    do {                                                                                                     \
        type *out = t->piece.data;                                                                           \
        const type *own = (const type *)t->buffer.data + (size_t)p->base.rank * (size_t)n;                   \
        const received *other = (const received *)t->staging;                                                \
        _Pragma("omp parallel for schedule(static)") for (int64_t block = 0; block < n; block += 4096) {     \
            int64_t end = block + 4096 < n ? block + 4096 : n;                                               \
            type sum[4096];                                                                                  \
            for (int64_t i = block; i < end; i++)                                                            \
                sum[i - block] = p->base.rank == 0 ? own[i] : load(other[i]);                                \
            for (int r = 1; r < p->base.ranks; r++) {                                                        \
                const received *x = other + (size_t)r * (size_t)n;                                           \
                for (int64_t i = block; i < end; i++)                                                        \
                    sum[i - block] += r == p->base.rank ? own[i] : load(x[i]);                               \
            }                                                                                                \
            for (int64_t i = block; i < end; i++)                                                            \
                out[i] = t->accumulate ? out[i] + sum[i - block] : sum[i - block];                           \
        }                                                                                                    \
    } while (0)

static void finish_transfer(struct p2p *p, struct transfer *t) {
    int64_t n = tensor_count(t->piece);
    bool wide = t->piece.dtype == DTYPE_F64, rounded = p->wire == DTYPE_BF16;
    if (t->piece.data && wide && rounded)
        ADD_IN_RANK_ORDER(double, uint16_t, from_bf16);
    else if (t->piece.data && wide)
        ADD_IN_RANK_ORDER(double, double, );
    else if (t->piece.data && rounded)
        ADD_IN_RANK_ORDER(float, uint16_t, from_bf16);
    else if (t->piece.data)
        ADD_IN_RANK_ORDER(float, float, );
    t->event = 0;
}

/* Whether the transfer is complete, now or already before. */
static bool test_transfer(struct p2p *p, struct transfer *t) {
    struct error e = {0};
    if (!t->event)
        return true;
    int done = p->transport->ops->test(p->transport, t->slot, 2 * p->base.ranks, &e);
    check_status(p, done, t->name, &e);
    if (done)
        finish_transfer(p, t);
    return done;
}

static void p2p_progress(struct comm *c) {
    struct p2p *p = p2p_of(c);
    for (int i = 0; i < COMM_IN_FLIGHT; i++)
        test_transfer(p, &p->transfers[i]);
}

static bool p2p_probe(struct comm *c, size_t bytes) {
    struct transport *t = p2p_of(c)->transport;
    bool found = false;
    for (int rank = 0; rank < c->ranks; rank++)
        found |= rank != c->rank && t->ops->probe(t, rank, bytes);
    return found;
}

/* Ranks may share cores, so waiting yields the core, and sleeps after 10 ms. Of a gap between two tests at
 * most one second counts: in a longer one this process was suspended (by a batch scheduler, say), and the
 * others were not late. */
static void wait_transfer(struct p2p *p, struct transfer *t) {
    double last = clock_seconds(), waited = 0;
    while (!test_transfer(p, t)) {
        p2p_progress(&p->base);
        double time = clock_seconds();
        waited += time - last < 1 ? time - last : 1;
        last = time;
        if (waited > p->transport->timeout) {
            abort_on_timeout(p, t, waited);
            waited = 0;
        }
        if (waited > 0.01)
            clock_sleep(50e-6);
        else
            sched_yield();
    }
}

static void p2p_wait(struct comm *c, comm_event event) {
    struct p2p *p = p2p_of(c);
    for (int i = 0; i < COMM_IN_FLIGHT; i++)
        if (event && p->transfers[i].event == event)
            wait_transfer(p, &p->transfers[i]);
}

/* A new transfer; waits for the oldest one and reuses its slot. */
static struct transfer *new_transfer(struct p2p *p, const char *name) {
    int index = (int)(p->events % COMM_IN_FLIGHT);
    struct transfer *t = &p->transfers[index];
    wait_transfer(p, t);
    *t = (struct transfer){.event = ++p->events,
                           .name = name,
                           .slot = index * 2 * p->base.ranks,
                           .staging = t->staging,
                           .rounded = t->rounded};
    return t;
}

/* Start to exchange `bytes` with every other rank: `from` + rank*from_stride is sent, `to` + rank*to_stride
 * received. Each rank begins with its neighbour, so that not all send to rank 0 first. */
static void start_exchange(struct p2p *p, struct transfer *t, const void *from, size_t from_stride, void *to,
                           size_t to_stride, size_t bytes) {
    int W = p->base.ranks;
    const struct transport_ops *ops = p->transport->ops;
    struct error e = {0};
    for (int step = 1; step < W; step++) {
        int source = (p->base.rank + W - step) % W;
        char *at = (char *)to + (size_t)source * to_stride;
        check_status(p, ops->receive(p->transport, t->slot + source, source, at, bytes, &e), t->name, &e);
    }
    for (int step = 1; step < W; step++) {
        int target = (p->base.rank + step) % W;
        const char *at = (const char *)from + (size_t)target * from_stride;
        check_status(p, ops->send(p->transport, t->slot + W + target, target, at, bytes, &e), t->name, &e);
    }
}

/* Round the other ranks' shares to the nearest bf16; doubles to the nearest float first. */
static void round_shares(struct p2p *p, struct transfer *t, int64_t n) {
    const float *narrow = t->buffer.data;
    const double *wide = t->buffer.data;
    bool is_wide = t->buffer.dtype == DTYPE_F64;
    int64_t own = p->base.rank * n, all = p->base.ranks * n;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < all; i++)
        if (i < own || i >= own + n)
            t->rounded[i] = round_to_bf16(is_wide ? (float)wide[i] : narrow[i]);
}

static comm_event p2p_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    struct p2p *p = p2p_of(c);
    bool rounded = p->wire == DTYPE_BF16;
    int64_t n = tensor_count(piece);
    size_t bytes = (size_t)n * dtype_bytes(rounded ? DTYPE_BF16 : piece.dtype);
    if (tensor_count(buffer) != c->ranks * n || buffer.dtype != piece.dtype ||
        bytes * (size_t)c->ranks > p->staging_bytes) {
        fprintf(stderr, "reduce_scatter: %lld elements in %d pieces of %lld, %zu bytes of staging\n",
                (long long)tensor_count(buffer), c->ranks, (long long)n, p->staging_bytes);
        abort();
    }
    struct transfer *t = new_transfer(p, "reduce_scatter");
    t->buffer = buffer;
    t->piece = piece;
    t->accumulate = accumulate;
    if (rounded)
        round_shares(p, t, n);
    start_exchange(p, t, rounded ? (void *)t->rounded : buffer.data, bytes, t->staging, bytes, bytes);
    return t->event;
}

static comm_event p2p_all_gather(struct comm *c, tensor buffer) {
    struct p2p *p = p2p_of(c);
    size_t bytes = (size_t)tensor_count(buffer) * dtype_bytes(buffer.dtype) / (size_t)c->ranks;
    struct transfer *t = new_transfer(p, "all_gather");
    start_exchange(p, t, (char *)buffer.data + (size_t)c->rank * bytes, 0, buffer.data, bytes, bytes);
    return t->event;
}

static void p2p_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes) {
    struct p2p *p = p2p_of(c);
    struct transfer *t = new_transfer(p, "all_gather_host");
    memcpy((char *)all + (size_t)c->rank * bytes, mine, bytes);
    start_exchange(p, t, mine, 0, all, bytes, bytes);
    wait_transfer(p, t);
}

static void p2p_all_reduce(struct comm *c, double *values, int count) {
    struct p2p *p = p2p_of(c);
    if (count > MAX_REDUCED)
        abort();
    p2p_all_gather_host(c, values, p->small, (size_t)count * sizeof *values);
    for (int i = 0; i < count; i++) {
        double sum = p->small[i];
        for (int r = 1; r < c->ranks; r++)
            sum += p->small[r * count + i];
        values[i] = sum;
    }
}

/* ---- opening and closing ---- */

size_t comm_p2p_staging_bytes(int64_t elements, enum dtype dtype, enum dtype wire) {
    bool rounded = wire == DTYPE_BF16;
    size_t received = dtype_bytes(rounded ? wire : dtype), sent = rounded ? dtype_bytes(wire) : 0;
    return COMM_IN_FLIGHT * (size_t)elements * (received + sent);
}

static int p2p_reserve(struct comm *c, int64_t elements, enum dtype dtype, enum dtype wire, struct error *e) {
    struct p2p *p = p2p_of(c);
    bool rounded = wire == DTYPE_BF16;
    p->wire = wire;
    p->staging_bytes = (size_t)elements * dtype_bytes(rounded ? DTYPE_BF16 : dtype);
    for (int i = 0; i < COMM_IN_FLIGHT; i++) {
        struct transfer *t = &p->transfers[i];
        free(t->staging);
        free(t->rounded);
        t->staging = malloc(p->staging_bytes);
        t->rounded = rounded ? malloc(p->staging_bytes) : NULL;
        if (!t->staging || (rounded && !t->rounded))
            return fail_user(e, "out of memory for messages between ranks (%zu bytes)",
                             comm_p2p_staging_bytes(elements, dtype, wire));
    }
    return 0;
}

static void free_p2p(struct p2p *p) {
    for (int i = 0; i < COMM_IN_FLIGHT; i++) {
        free(p->transfers[i].staging);
        free(p->transfers[i].rounded);
    }
    free(p->small);
    free(p->base.small_buffer);
    free(p);
}

static void p2p_close(struct comm *c) {
    struct p2p *p = p2p_of(c);
    struct transport *t = p->transport;
    char mine = 0;
    if (t->ops->close_needs_barrier) { /* a rank that ends earlier would look like one that has died */
        struct transfer *last = new_transfer(p, "the end of the run");
        start_exchange(p, last, &mine, 0, p->small, 1, 1);
        wait_transfer(p, last);
    }
    t->ops->close(t);
    free_p2p(p);
}

void comm_p2p_set_timeout(struct comm *c, double seconds) {
    p2p_of(c)->transport->timeout = seconds;
}

/* Host names of all ranks, and from them local_rank and local_ranks if the transport does not provide
 * them. */
static void gather_hosts(struct p2p *p) {
    struct comm *c = &p->base;
    struct transport *t = p->transport;
    char host[TRANSPORT_HOST_BYTES];
    memcpy(host, t->hosts[c->rank], sizeof host);
    p2p_all_gather_host(c, host, t->hosts, sizeof host);
    c->local_rank = t->local_rank;
    c->local_ranks = t->local_ranks;
    for (int r = 0; r < c->ranks && t->local_ranks == 0; r++)
        if (strcmp(t->hosts[r], host) == 0) {
            c->local_rank += r < c->rank;
            c->local_ranks++;
        }
}

struct comm *comm_p2p_open(struct transport *t, struct error *e) {
    static const struct comm_ops ops = {
        .close = p2p_close,
        .abort_run = p2p_abort_run,
        .reserve = p2p_reserve,
        .reduce_scatter = p2p_reduce_scatter,
        .all_gather = p2p_all_gather,
        .all_reduce = p2p_all_reduce,
        .wait = p2p_wait,
        .progress = p2p_progress,
        .probe = p2p_probe,
        .all_gather_host = p2p_all_gather_host,
    };
    struct p2p *p = t ? calloc(1, sizeof *p) : NULL;
    if (!t)
        return NULL;
    size_t ranks = (size_t)t->ranks;
    if (p) {
        p->ops = ops;
        p->ops.name = t->ops->name;
        p->base = (struct comm){.ops = &p->ops, .rank = t->rank, .ranks = t->ranks};
        p->transport = t;
        p->small = malloc(ranks * MAX_REDUCED * sizeof *p->small);
        p->base.small_buffer = malloc(ranks * COMM_SMALL_BYTES);
    }
    if (!p || !p->small || !p->base.small_buffer) {
        fail_run(e, "rank %d: out of memory opening %s", t->rank, t->ops->name);
    } else if (t->ops->reserve(t, COMM_IN_FLIGHT * 2 * t->ranks, e) == 0) {
        gather_hosts(p);
        return &p->base;
    }
    t->ops->release(t);
    if (p)
        free_p2p(p);
    return NULL;
}
