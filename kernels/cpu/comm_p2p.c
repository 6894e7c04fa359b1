/* Collectives over MPI for tensors in host memory.
 *
 * They are made of non-blocking messages between pairs rather than MPI's own collectives, for three reasons:
 * a sum is taken in rank order whatever the library chooses, so results do not depend on it; every byte
 * travels once, (W-1)/W of a buffer out and in per rank, which is the floor for both halves of an all-reduce;
 * and when a message does not come, we know whose.
 *
 * Messages move only while some MPI function runs, so progress() is called between operations. */
#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/comm_internal.h"

enum {
    TAGS = 1 << 15,   /* what every MPI has at least */
    DIE_SECONDS = 5,  /* for MPI_Abort to tell the others, before we end anyway */
    TURN_SECONDS = 5, /* for a rank that knows better to end the run first */
};

struct transfer {
    comm_event event; /* 0: free */
    const char *name;
    MPI_Request *requests; /* [2*ranks]: receives from each rank, then sends to each */
    char *staging;         /* [ranks*n] what the others send, for a sum */
    tensor buffer, piece;  /* of a reduce_scatter; piece.data NULL otherwise */
    bool accumulate;
};

struct mpi_comm {
    struct comm base;
    double timeout;
    comm_event events; /* handed out so far */
    struct transfer transfers[COMM_IN_FLIGHT];
    char (*hosts)[MPI_MAX_PROCESSOR_NAME];
    size_t staging_bytes;
    double *small; /* [ranks * SMALL] */
};
enum { SMALL = 8 };

static struct mpi_comm *mpi_of(struct comm *c) {
    return (struct mpi_comm *)c;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the end of a run -----------------------------------------------------------------------------------
 */

/* MPI itself waits for ranks where it opens and closes, and knows no timeout: an alarm ends the process. */
static char overdue[256]; /* what is said then */

static void give_up(int number) {
    (void)number;
    ssize_t written = write(STDERR_FILENO, overdue, strlen(overdue));
    (void)written;
    _exit(EXIT_RUN);
}

/* Of the ranks that wait the first speaks. */
static void set_alarm(const struct mpi_comm *m, int rank, const char *call) {
    double seconds = m->timeout + DIE_SECONDS + (rank > 0 ? TURN_SECONDS : 0);
    snprintf(
        overdue, sizeof overdue,
        "\ntrain_iha: rank %d: %s has not returned for %.0f s: another rank is dead, stuck or cut off; the "
        "last checkpoint is good: start again to go on from it\n",
        rank, call, seconds);
    signal(SIGALRM, give_up);
    alarm((unsigned)seconds);
}

/* Say why and take every rank down. */
static void die(const struct mpi_comm *m, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));
static void die(const struct mpi_comm *m, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "\ntrain_iha: rank %d (%s): %s\n", m->base.rank, m->hosts[m->base.rank], text);
    overdue[0] = '\0';
    alarm(DIE_SECONDS); /* the way to the others may be what is broken */
    MPI_Abort(MPI_COMM_WORLD, EXIT_RUN);
    _exit(EXIT_RUN);
}

static void check(const struct mpi_comm *m, int code, const char *name) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    if (code == MPI_SUCCESS)
        return;
    MPI_Error_string(code, text, &length);
    die(m, "%s failed: %s; the last checkpoint is good: start again to go on from it", name, text);
}

/* End the run, naming the peers whose part of a transfer has not come (or, when all have, has not been
 * taken); return when there are none. What a thousand ranks find at once is to be one line, by who knows
 * best: a rank that waits for a single peer has found the culprit, while one that waits for several may be a
 * collective further on, where those that wait for the culprit are late too. Of equals the first speaks. */
static void die_waiting(struct mpi_comm *m, struct transfer *t, double waited) {
    char late[640] = "";
    int ranks = m->base.ranks, count = 0, first = -1;
    for (MPI_Request *half = t->requests; half <= t->requests + ranks && count == 0; half += ranks)
        for (int rank = 0, done = 1; rank < ranks; rank++, done = 1) {
            if (half[rank] == MPI_REQUEST_NULL ||
                (MPI_Test(&half[rank], &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done)) {
                first = first < 0 ? rank : first;
                continue;
            }
            size_t used = strlen(late);
            if (count++ < 8)
                snprintf(late + used, sizeof late - used, "%srank %d (%.64s)", used ? ", " : "", rank,
                         m->hosts[rank]);
        }
    if (count == 0)
        return;
    int turn = 2 * (count > 1) + (first != m->base.rank);
    nanosleep(&(struct timespec){.tv_sec = turn * TURN_SECONDS}, NULL);
    die(m,
        "no answer from %s%s for %.0f s in %s: dead, stuck or cut off; the last checkpoint is good: start "
        "again to go on from it (system.peer_timeout = %.0f sets how long to wait)",
        late, count > 8 ? " and more" : "", waited, t->name, m->timeout);
}

/* ---- transfers ------------------------------------------------------------------------------------------
 */

#define ADD_IN_RANK_ORDER(type)                                                                              \
    do {                                                                                                     \
        type *out = t->piece.data;                                                                           \
        const type *own = (const type *)t->buffer.data + (size_t)m->base.rank * (size_t)n;                   \
        const type *other = (const type *)t->staging;                                                        \
        _Pragma("omp parallel for schedule(static)") for (int64_t block = 0; block < n; block += 4096) {     \
            int64_t end = block + 4096 < n ? block + 4096 : n;                                               \
            type sum[4096];                                                                                  \
            for (int64_t i = block; i < end; i++)                                                            \
                sum[i - block] = m->base.rank == 0 ? own[i] : other[i];                                      \
            for (int r = 1; r < m->base.ranks; r++) {                                                        \
                const type *x = r == m->base.rank ? own : other + (size_t)r * (size_t)n;                     \
                for (int64_t i = block; i < end; i++)                                                        \
                    sum[i - block] += x[i];                                                                  \
            }                                                                                                \
            for (int64_t i = block; i < end; i++)                                                            \
                out[i] = t->accumulate ? out[i] + sum[i - block] : sum[i - block];                           \
        }                                                                                                    \
    } while (0)

static void finish(struct mpi_comm *m, struct transfer *t) {
    int64_t n = tensor_count(t->piece);
    if (t->piece.data && t->piece.dtype == DTYPE_F64)
        ADD_IN_RANK_ORDER(double);
    else if (t->piece.data)
        ADD_IN_RANK_ORDER(float);
    t->event = 0;
}

/* Finished, now or before? */
static bool advance(struct mpi_comm *m, struct transfer *t) {
    int done = 0;
    if (!t->event)
        return true;
    check(m, MPI_Testall(2 * m->base.ranks, t->requests, &done, MPI_STATUSES_IGNORE), t->name);
    if (done)
        finish(m, t);
    return done;
}

static void mpi_progress(struct comm *c) {
    struct mpi_comm *m = mpi_of(c);
    for (int i = 0; i < COMM_IN_FLIGHT; i++)
        advance(m, &m->transfers[i]);
}

/* Ranks may share processors, so a wait gives way at once, and sleeps when it takes long. While we were
 * stopped (by a scheduler that suspends jobs, say) nobody was late: of a longer gap a second counts. */
static void wait_for(struct mpi_comm *m, struct transfer *t) {
    double last = now(), waited = 0;
    while (!advance(m, t)) {
        mpi_progress(&m->base);
        double time = now();
        waited += time - last < 1 ? time - last : 1;
        last = time;
        if (waited > m->timeout) {
            die_waiting(m, t, waited);
            waited = 0;
        }
        if (waited > 0.01)
            nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
        else
            sched_yield();
    }
}

static void mpi_wait(struct comm *c, comm_event event) {
    struct mpi_comm *m = mpi_of(c);
    for (int i = 0; i < COMM_IN_FLIGHT; i++)
        if (event && m->transfers[i].event == event)
            wait_for(m, &m->transfers[i]);
}

/* A free transfer, all its requests null. */
static struct transfer *begin(struct mpi_comm *m, const char *name) {
    struct transfer *t = &m->transfers[m->events % COMM_IN_FLIGHT];
    wait_for(m, t);
    char *staging = t->staging;
    MPI_Request *requests = t->requests;
    *t = (struct transfer){.event = ++m->events, .name = name, .requests = requests, .staging = staging};
    for (int i = 0; i < 2 * m->base.ranks; i++)
        t->requests[i] = MPI_REQUEST_NULL;
    return t;
}

/* Exchange `bytes` with every other rank: `from` + rank*from_stride is sent, `to` + rank*to_stride filled. */
static void start(struct mpi_comm *m, struct transfer *t, const void *from, size_t from_stride, void *to,
                  size_t to_stride, size_t bytes) {
    int W = m->base.ranks, tag = (int)(t->event % TAGS);
    for (int step = 1; step < W; step++) {
        int source = (m->base.rank + W - step) % W;
        check(m,
              MPI_Irecv((char *)to + (size_t)source * to_stride, (int)bytes, MPI_BYTE, source, tag,
                        MPI_COMM_WORLD, &t->requests[source]),
              t->name);
    }
    for (int step = 1; step < W; step++) {
        int target = (m->base.rank + step) % W;
        check(m,
              MPI_Isend((const char *)from + (size_t)target * from_stride, (int)bytes, MPI_BYTE, target, tag,
                        MPI_COMM_WORLD, &t->requests[W + target]),
              t->name);
    }
}

static comm_event mpi_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    struct mpi_comm *m = mpi_of(c);
    size_t bytes = (size_t)tensor_count(piece) * dtype_bytes(piece.dtype);
    if (tensor_count(buffer) != c->ranks * tensor_count(piece) || buffer.dtype != piece.dtype ||
        bytes * (size_t)c->ranks > m->staging_bytes) {
        fprintf(stderr, "reduce_scatter: %lld elements in %d pieces of %lld, %zu bytes of staging\n",
                (long long)tensor_count(buffer), c->ranks, (long long)tensor_count(piece), m->staging_bytes);
        abort();
    }
    struct transfer *t = begin(m, "reduce_scatter");
    t->buffer = buffer;
    t->piece = piece;
    t->accumulate = accumulate;
    start(m, t, buffer.data, bytes, t->staging, bytes, bytes);
    return t->event;
}

static comm_event mpi_all_gather(struct comm *c, tensor buffer) {
    struct mpi_comm *m = mpi_of(c);
    size_t bytes = (size_t)tensor_count(buffer) * dtype_bytes(buffer.dtype) / (size_t)c->ranks;
    struct transfer *t = begin(m, "all_gather");
    start(m, t, (char *)buffer.data + (size_t)c->rank * bytes, 0, buffer.data, bytes, bytes);
    return t->event;
}

static void mpi_exchange(struct comm *c, const void *mine, void *all, size_t bytes) {
    struct mpi_comm *m = mpi_of(c);
    struct transfer *t = begin(m, "exchange");
    memcpy((char *)all + (size_t)c->rank * bytes, mine, bytes);
    start(m, t, mine, 0, all, bytes, bytes);
    wait_for(m, t);
}

static void mpi_all_reduce(struct comm *c, double *values, int count) {
    struct mpi_comm *m = mpi_of(c);
    if (count > SMALL)
        abort();
    mpi_exchange(c, values, m->small, (size_t)count * sizeof *values);
    for (int i = 0; i < count; i++) {
        double sum = m->small[i];
        for (int r = 1; r < c->ranks; r++)
            sum += m->small[r * count + i];
        values[i] = sum;
    }
}

/* ---- opening and closing --------------------------------------------------------------------------------
 */

static int mpi_reserve(struct comm *c, int64_t elements, enum dtype dtype, struct error *e) {
    struct mpi_comm *m = mpi_of(c);
    m->staging_bytes = (size_t)elements * dtype_bytes(dtype);
    for (int i = 0; i < COMM_IN_FLIGHT; i++) {
        free(m->transfers[i].staging);
        m->transfers[i].staging = malloc(m->staging_bytes);
        if (!m->transfers[i].staging)
            return fail_user(e, "out of memory for messages between ranks (%zu bytes)", m->staging_bytes);
    }
    return 0;
}

static void release(struct mpi_comm *m) {
    for (int i = 0; i < COMM_IN_FLIGHT; i++) {
        free(m->transfers[i].staging);
        free(m->transfers[i].requests);
    }
    free(m->hosts);
    free(m->small);
    free(m->base.said);
    free(m);
}

static void mpi_close(struct comm *c) {
    struct mpi_comm *m = mpi_of(c);
    set_alarm(m, c->rank, "MPI_Finalize");
    if (MPI_Finalize() != MPI_SUCCESS) { /* past that there is no MPI_Abort; the launcher ends the others */
        fprintf(stderr, "\ntrain_iha: rank %d: MPI_Finalize failed; what was saved is good\n", c->rank);
        _exit(EXIT_RUN);
    }
    alarm(0);
    release(m);
}

void comm_mpi_set_timeout(struct comm *c, double seconds) {
    mpi_of(c)->timeout = seconds;
}

static int place(struct mpi_comm *m, struct error *e) {
    struct comm *c = &m->base;
    MPI_Comm local;
    char host[MPI_MAX_PROCESSOR_NAME] = "";
    int length;
    if (MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN) != MPI_SUCCESS ||
        MPI_Comm_rank(MPI_COMM_WORLD, &c->rank) != MPI_SUCCESS ||
        MPI_Comm_size(MPI_COMM_WORLD, &c->ranks) != MPI_SUCCESS)
        return fail_run(e, "rank %d: MPI cannot tell how many ranks there are", comm_started_rank());
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &local) != MPI_SUCCESS ||
        MPI_Comm_rank(local, &c->local_rank) != MPI_SUCCESS ||
        MPI_Comm_size(local, &c->local_ranks) != MPI_SUCCESS || MPI_Comm_free(&local) != MPI_SUCCESS)
        return fail_run(e, "rank %d: MPI cannot tell which ranks share a machine", c->rank);
    m->hosts = calloc((size_t)c->ranks, sizeof *m->hosts);
    m->small = malloc((size_t)c->ranks * SMALL * sizeof *m->small);
    c->said = malloc((size_t)c->ranks * COMM_SAID);
    bool complete = m->hosts && m->small && c->said;
    for (int i = 0; i < COMM_IN_FLIGHT; i++) {
        m->transfers[i].requests = malloc(2 * (size_t)c->ranks * sizeof(MPI_Request));
        complete = complete && m->transfers[i].requests;
    }
    if (!complete)
        return fail_run(e, "rank %d: out of memory opening MPI", c->rank);
    MPI_Get_processor_name(host, &length);
    memcpy(m->hosts[c->rank], host, sizeof host);
    mpi_exchange(c, host, m->hosts, sizeof host);
    return 0;
}

struct comm *comm_mpi_open(double peer_timeout, struct error *e) {
    static const struct comm_ops ops = {
        .name = "mpi",
        .close = mpi_close,
        .reserve = mpi_reserve,
        .reduce_scatter = mpi_reduce_scatter,
        .all_gather = mpi_all_gather,
        .all_reduce = mpi_all_reduce,
        .wait = mpi_wait,
        .progress = mpi_progress,
        .exchange = mpi_exchange,
    };
    struct mpi_comm *m = calloc(1, sizeof *m);
    int given;
    if (!m) {
        fail_run(e, "rank %d: out of memory opening MPI", comm_started_rank());
        return NULL;
    }
    m->base.ops = &ops;
    m->timeout = peer_timeout;
    set_alarm(m, comm_started_rank(), "MPI_Init");
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &given) != MPI_SUCCESS) {
        fail_run(e, "rank %d: MPI does not start; look at what it printed", comm_started_rank());
        free(m);
        return NULL;
    }
    /* Not closed: that would wait for ranks which wait for this one. A process that ends without closing
     * takes them along. */
    if (place(m, e) != 0) {
        release(m);
        return NULL;
    }
    alarm(0);
    return &m->base;
}
