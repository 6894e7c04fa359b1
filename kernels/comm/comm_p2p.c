/* Collectives for tensors in host memory, made of non-blocking messages between pairs of ranks.
 *
 * Not of MPI's own collectives, where there is MPI, for three reasons: a sum is taken in rank order whatever
 * the library chooses, so results do not depend on it; every byte travels once, (W-1)/W of a buffer out and
 * in per rank, which is the floor for both halves of an all-reduce; and when a message does not come, we know
 * whose.
 *
 * Messages move only while the transport is asked about them, so progress() is called between operations. */
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/comm/comm_internal.h"
#include "kernels/rounding.h"

enum { TURN_SECONDS = 5 }; /* for a rank that knows better to end the run first */
enum { SMALL = 8 };

struct transfer {
    comm_event event; /* 0: free */
    const char *name;
    int slot;             /* of the transport: receives from each rank, then sends to each */
    char *staging;        /* [ranks*n] what the others send, for a sum */
    uint16_t *rounded;    /* [ranks*n] bf16, what they get, where that is not what the buffer holds */
    tensor buffer, piece; /* of a reduce_scatter; piece.data NULL otherwise */
    bool accumulate;
};

struct p2p {
    struct comm base;
    struct comm_ops ops;
    struct transport *transport;
    comm_event events; /* handed out so far */
    struct transfer transfers[COMM_IN_FLIGHT];
    enum dtype wire;
    size_t staging_bytes;
    double *small; /* [ranks * SMALL] */
};

static struct p2p *p2p_of(struct comm *c) {
    return (struct p2p *)c;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the end of a run ---- */

/* Say why and take every rank down. */
static void die(const struct p2p *p, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
static void die(const struct p2p *p, const char *format, ...) {
    char line[1400], text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    snprintf(line, sizeof line, "rank %d (%s): %s", p->base.rank, p->transport->hosts[p->base.rank], text);
    p->transport->ops->end(p->transport, line);
    abort();
}

static void p2p_abort_run(struct comm *c, const char *text) {
    die(p2p_of(c), "%s", text);
}

static void check(const struct p2p *p, int status, const char *name, const struct error *e) {
    if (status < 0)
        die(p, "%s failed: %s; the last checkpoint is good: start again to go on from it", name, e->text);
}

/* End the run, naming the peers whose part of a transfer has not come (or, when all have, has not been
 * taken); return when there are none. What a thousand ranks find at once is to be one line, by who knows
 * best: a rank that waits for a single peer has found the culprit, while one that waits for several may be a
 * collective further on, where those that wait for the culprit are late too. Of equals the first speaks. */
static void die_waiting(struct p2p *p, struct transfer *t, double waited) {
    char late[640] = "";
    struct transport *transport = p->transport;
    int ranks = p->base.ranks, count = 0, first = -1;
    for (int half = t->slot; half <= t->slot + ranks && count == 0; half += ranks)
        for (int rank = 0; rank < ranks; rank++) {
            if (transport->ops->test(transport, half + rank, 1, &(struct error){0}) > 0) {
                first = first < 0 ? rank : first;
                continue;
            }
            size_t used = strlen(late);
            if (count++ < 8)
                snprintf(late + used, sizeof late - used, "%srank %d (%.64s)", used ? ", " : "", rank,
                         transport->hosts[rank]);
        }
    if (count == 0)
        return;
    int turn = 2 * (count > 1) + (first != p->base.rank);
    transport->ops->pause(transport, turn * TURN_SECONDS);
    die(p,
        "no answer from %s%s for %.0f s in %s: dead, stuck or cut off; the last checkpoint is good: start "
        "again to go on from it (system.peer_timeout = %.0f sets how long to wait)",
        late, count > 8 ? " and more" : "", waited, t->name, transport->timeout);
}

/* ---- transfers ---- */

/* type: of the sum and of this rank's own part; arrived, load: of the others' parts, and how to read one. */
#define ADD_IN_RANK_ORDER(type, arrived, load)                                                               \
    do {                                                                                                     \
        type *out = t->piece.data;                                                                           \
        const type *own = (const type *)t->buffer.data + (size_t)p->base.rank * (size_t)n;                   \
        const arrived *other = (const arrived *)t->staging;                                                  \
        _Pragma("omp parallel for schedule(static)") for (int64_t block = 0; block < n; block += 4096) {     \
            int64_t end = block + 4096 < n ? block + 4096 : n;                                               \
            type sum[4096];                                                                                  \
            for (int64_t i = block; i < end; i++)                                                            \
                sum[i - block] = p->base.rank == 0 ? own[i] : load(other[i]);                                \
            for (int r = 1; r < p->base.ranks; r++) {                                                        \
                const arrived *x = other + (size_t)r * (size_t)n;                                            \
                for (int64_t i = block; i < end; i++)                                                        \
                    sum[i - block] += r == p->base.rank ? own[i] : load(x[i]);                               \
            }                                                                                                \
            for (int64_t i = block; i < end; i++)                                                            \
                out[i] = t->accumulate ? out[i] + sum[i - block] : sum[i - block];                           \
        }                                                                                                    \
    } while (0)

static void finish(struct p2p *p, struct transfer *t) {
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

/* Finished, now or before? */
static bool advance(struct p2p *p, struct transfer *t) {
    struct error e = {0};
    if (!t->event)
        return true;
    int done = p->transport->ops->test(p->transport, t->slot, 2 * p->base.ranks, &e);
    check(p, done, t->name, &e);
    if (done)
        finish(p, t);
    return done;
}

static void p2p_progress(struct comm *c) {
    struct p2p *p = p2p_of(c);
    for (int i = 0; i < COMM_IN_FLIGHT; i++)
        advance(p, &p->transfers[i]);
}

static bool p2p_probe(struct comm *c, size_t bytes) {
    struct transport *t = p2p_of(c)->transport;
    bool called = false;
    for (int rank = 0; rank < c->ranks; rank++)
        called |= rank != c->rank && t->ops->unasked(t, rank, bytes);
    return called;
}

/* Ranks may share processors, so a wait gives way at once, and sleeps when it takes long. While we were
 * stopped (by a scheduler that suspends jobs, say) nobody was late: of a longer gap a second counts. */
static void wait_for(struct p2p *p, struct transfer *t) {
    double last = now(), waited = 0;
    while (!advance(p, t)) {
        p2p_progress(&p->base);
        double time = now();
        waited += time - last < 1 ? time - last : 1;
        last = time;
        if (waited > p->transport->timeout) {
            die_waiting(p, t, waited);
            waited = 0;
        }
        if (waited > 0.01)
            nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
        else
            sched_yield();
    }
}

static void p2p_wait(struct comm *c, comm_event event) {
    struct p2p *p = p2p_of(c);
    for (int i = 0; i < COMM_IN_FLIGHT; i++)
        if (event && p->transfers[i].event == event)
            wait_for(p, &p->transfers[i]);
}

/* A free transfer. */
static struct transfer *begin(struct p2p *p, const char *name) {
    int index = (int)(p->events % COMM_IN_FLIGHT);
    struct transfer *t = &p->transfers[index];
    wait_for(p, t);
    *t = (struct transfer){.event = ++p->events,
                           .name = name,
                           .slot = index * 2 * p->base.ranks,
                           .staging = t->staging,
                           .rounded = t->rounded};
    return t;
}

/* Exchange `bytes` with every other rank: `from` + rank*from_stride is sent, `to` + rank*to_stride filled. */
static void start(struct p2p *p, struct transfer *t, const void *from, size_t from_stride, void *to,
                  size_t to_stride, size_t bytes) {
    int W = p->base.ranks;
    const struct transport_ops *ops = p->transport->ops;
    struct error e = {0};
    for (int step = 1; step < W; step++) {
        int source = (p->base.rank + W - step) % W;
        char *at = (char *)to + (size_t)source * to_stride;
        check(p, ops->receive(p->transport, t->slot + source, source, at, bytes, &e), t->name, &e);
    }
    for (int step = 1; step < W; step++) {
        int target = (p->base.rank + step) % W;
        const char *at = (const char *)from + (size_t)target * from_stride;
        check(p, ops->send(p->transport, t->slot + W + target, target, at, bytes, &e), t->name, &e);
    }
}

/* The other ranks' shares of a buffer, to the nearest bf16; a double by way of the nearest float. */
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
    struct transfer *t = begin(p, "reduce_scatter");
    t->buffer = buffer;
    t->piece = piece;
    t->accumulate = accumulate;
    if (rounded)
        round_shares(p, t, n);
    start(p, t, rounded ? (void *)t->rounded : buffer.data, bytes, t->staging, bytes, bytes);
    return t->event;
}

static comm_event p2p_all_gather(struct comm *c, tensor buffer) {
    struct p2p *p = p2p_of(c);
    size_t bytes = (size_t)tensor_count(buffer) * dtype_bytes(buffer.dtype) / (size_t)c->ranks;
    struct transfer *t = begin(p, "all_gather");
    start(p, t, (char *)buffer.data + (size_t)c->rank * bytes, 0, buffer.data, bytes, bytes);
    return t->event;
}

static void p2p_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes) {
    struct p2p *p = p2p_of(c);
    struct transfer *t = begin(p, "exchange");
    memcpy((char *)all + (size_t)c->rank * bytes, mine, bytes);
    start(p, t, mine, 0, all, bytes, bytes);
    wait_for(p, t);
}

static void p2p_all_reduce(struct comm *c, double *values, int count) {
    struct p2p *p = p2p_of(c);
    if (count > SMALL)
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
                             comm_staging_bytes(elements, dtype, wire));
    }
    return 0;
}

static void release(struct p2p *p) {
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
    if (t->ops->closes_alone) { /* nobody leaves before all have come so far */
        struct transfer *last = begin(p, "the end of the run");
        start(p, last, &mine, 0, p->small, 1, 1);
        wait_for(p, last);
    }
    t->ops->close(t);
    release(p);
}

void comm_p2p_set_timeout(struct comm *c, double seconds) {
    p2p_of(c)->transport->timeout = seconds;
}

/* Every rank learns the names of all hosts, and with them, where the transport does not know, which ranks
 * share its own. */
static void meet(struct p2p *p) {
    struct comm *c = &p->base;
    struct transport *t = p->transport;
    char host[TRANSPORT_HOST];
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
        p->small = malloc(ranks * SMALL * sizeof *p->small);
        p->base.small_buffer = malloc(ranks * COMM_SMALL_BYTES);
    }
    if (!p || !p->small || !p->base.small_buffer) {
        fail_run(e, "rank %d: out of memory opening %s", t->rank, t->ops->name);
    } else if (t->ops->reserve(t, COMM_IN_FLIGHT * 2 * t->ranks, e) == 0) {
        meet(p);
        return &p->base;
    }
    t->ops->release(t);
    if (p)
        release(p);
    return NULL;
}
