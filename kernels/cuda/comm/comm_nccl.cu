/* Collectives over NCCL, one rank a GPU, on a queue of their own beside the device's.
 *
 * Gradients in fp32 travel with NCCL's own reduce-scatter, whose order of summation is the library's. In
 * bf16, and in fp32 with system.deterministic, every rank sends each other its share and sums what it gets in
 * rank order: as many bytes, the same bits whatever way NCCL chooses, and bf16 is rounded once and not at
 * every hop.
 *
 * The communicator never blocks the host: calls that are still under way are asked again, and whoever waits
 * for the GPU calls progress() meanwhile. There a rank sees that NCCL reports an error, or that a collective
 * has stood still for peer_timeout, or that another rank has seen such a thing. Then all ranks tell each
 * other how far their GPUs came, which names the one that never reached the collective; a rank that does not
 * even answer is named by the processes' communicator. */
#ifdef WITH_NCCL
#include <nccl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/cuda/comm/comm.h"
#include "kernels/cuda/comm/comm_sums.h"

enum {
    SMALL = 8,
    TURN_SECONDS = 3, /* for the rank that speaks for all to end the run first */
};

/* In pinned memory, written by the GPU: collectives that its queue has come to, and that it has done. */
struct places {
    volatile int64_t reached, done;
};

struct nccl_comm {
    struct gpu_comm g;
    ncclComm_t nccl;
    double timeout;
    enum dtype wire;
    bool in_rank_order;
    char *staging; /* device memory; see reserve */
    int64_t staging_elements;
    double *all; /* device [ranks SMALL] */
    struct places *places;
    pthread_t watcher;
    volatile bool unwatched;
    bool watched;
    struct places seen; /* when progress() last looked */
    double waited;      /* in the host's waits, since that changed */
    double last;        /* when progress() last looked, */
    double asked;       /* and when, whether it is called */
};

static struct nccl_comm *nccl_of(struct comm *c) {
    return (struct nccl_comm *)c;
}

/* ---- the end of a run ---- */

/* Of the ranks that find the same the first speaks. The communicator is not aborted before: that would wait
 * for every graph that holds it, and the end of the processes lets go of their peers as well. */
static void end_run(struct nccl_comm *n, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));
static void end_run(struct nccl_comm *n, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n->g.base.rank > 0)
        sleep(TURN_SECONDS);
    gpu_comm_abort_run(&n->g.base, text);
    _exit(EXIT_RUN);
}

/* What each rank tells when the run cannot go on; no other exchange is of this size, so that a rank which
 * knows of nothing yet sees that it is called. */
struct report {
    int64_t reached;
    double waited;
    char why[480]; /* NCCL's error; empty: it says nothing */
};

/* "rank 3, rank 5" of those whose GPU has come to the fewest collectives; empty when all have come as far. */
static void name_late(const struct report *all, int ranks, char *late, size_t size) {
    int64_t least = all[0].reached, most = least;
    late[0] = '\0';
    for (int r = 0; r < ranks; r++) {
        least = all[r].reached < least ? all[r].reached : least;
        most = all[r].reached > most ? all[r].reached : most;
    }
    for (int r = 0; r < ranks && least < most; r++)
        if (all[r].reached == least && strlen(late) + 16 < size)
            snprintf(late + strlen(late), size - strlen(late), "%srank %d", late[0] ? ", " : "", r);
}

static void end_together(struct nccl_comm *n, double waited, const char *error) __attribute__((noreturn));
static void end_together(struct nccl_comm *n, double waited, const char *error) {
    char late[256];
    int ranks = n->g.base.ranks;
    struct report mine = {.reached = n->places->reached, .waited = waited};
    snprintf(mine.why, sizeof mine.why, "%s", error);
    const struct report *all = (const struct report *)comm_all_gather_small(n->g.ranks, &mine, sizeof mine);
    const char *why = "";
    name_late(all, ranks, late, sizeof late);
    for (int r = ranks - 1; r >= 0; r--) {
        waited = all[r].waited > waited ? all[r].waited : waited;
        why = all[r].why[0] ? all[r].why : why;
    }
    if (why[0])
        end_run(n, "NCCL: %s%s%s; the last checkpoint is good: start again to go on from it", why,
                late[0] ? "; last heard from: " : "", late);
    if (late[0])
        end_run(n,
                "the GPU of %s has not come to a collective in which others have waited for %.0f s: stuck, "
                "or far slower than they are; the last checkpoint is good: start again to go on from it "
                "(system.peer_timeout = %.0f sets how long to wait)",
                late, waited, n->timeout);
    end_run(n,
            "a collective has not ended for %.0f s, though the GPU of every rank has come to it: the network "
            "between them is stuck; NCCL_DEBUG=INFO tells what NCCL does; the last checkpoint is good: start "
            "again to go on from it",
            waited);
}

static void end_failed(struct nccl_comm *n, ncclResult_t result, const char *call) {
    char why[480];
    const char *last = ncclGetLastError(n->nccl);
    snprintf(why, sizeof why, "%s%s%.300s in %.80s", ncclGetErrorString(result), last && last[0] ? ": " : "",
             last ? last : "", call);
    for (char *p = why; *p; p++)
        if (*p == '\n')
            *p = ' ';
    end_together(n, 0, why);
}

/* ---- a host that cannot look ---- */

enum { WATCH_MS = 500, LATE_SECONDS = 10 /* for the host to find out by itself, and to name the rank */ };

/* A host whose GPU stands still in a collective may itself stand still in a CUDA call, for the GPU's queue is
 * of limited length. So a thread looks too, which asks nothing of CUDA or of other ranks. */
static void *watch(void *context) {
    struct nccl_comm *n = (struct nccl_comm *)context;
    struct places last = {-1, -1};
    double waited = 0, time = clock_seconds();
    while (!n->unwatched) {
        struct places now = {n->places->reached, n->places->done};
        double before = time;
        usleep(WATCH_MS * 1000);
        time = clock_seconds();
        bool moves = now.reached == now.done || now.reached != last.reached || now.done != last.done;
        waited = moves ? 0 : waited + (time - before < 1 ? time - before : 1); /* not while we were stopped */
        last.reached = now.reached;
        last.done = now.done;
        if (waited > n->timeout + LATE_SECONDS) {
            fprintf(
                stderr,
                "\ntrain_iha: rank %d: its GPU has waited for %.0f s in a collective, and its queue is full: "
                "another rank, its GPU or the network is stuck; the last checkpoint is good: start again to "
                "go on from it\n",
                n->g.base.rank, waited);
            _exit(EXIT_RUN);
        }
    }
    return NULL;
}

static int begin_watch(struct nccl_comm *n, struct error *e) {
    n->watched = pthread_create(&n->watcher, NULL, watch, n) == 0;
    return n->watched ? 0 : fail_run(e, "cannot start the thread that watches over collectives");
}

static void end_watch(struct nccl_comm *n) {
    n->unwatched = true;
    if (n->watched)
        pthread_join(n->watcher, NULL);
    n->watched = false;
}

/* ---- calls that do not block ---- */

/* A wait that goes on. While we were stopped (by a scheduler that suspends jobs, say) nobody was late: of a
 * longer gap a second counts. */
static void count_wait(double *waited, double *last) {
    double time = clock_seconds(), gap = time - *last;
    *waited += gap < 1 ? gap : 1;
    *last = time;
}

/* Has a collective that the GPU is in stood still for too long, or has another rank found that? */
static void look(struct nccl_comm *n) {
    struct places now = {n->places->reached, n->places->done};
    struct comm *ranks = n->g.ranks;
    count_wait(&n->waited, &n->last);
    if (now.reached != n->seen.reached || now.done != n->seen.done || now.reached == now.done) {
        n->seen.reached = now.reached;
        n->seen.done = now.done;
        n->waited = 0;
    }
    if (n->waited > n->timeout)
        end_together(n, n->waited, "");
    if (n->last - n->asked > 0.1) {
        n->asked = n->last;
        if (ranks->ops->probe(ranks, sizeof(struct report)))
            end_together(n, n->waited, "");
    }
}

static void nccl_progress(struct comm *c) {
    struct nccl_comm *n = nccl_of(c);
    struct comm *ranks = n->g.ranks;
    ncclResult_t state = ncclSuccess;
    ranks->ops->progress(ranks);
    if (ncclCommGetAsyncError(n->nccl, &state) == ncclSuccess && state != ncclSuccess &&
        state != ncclInProgress)
        end_failed(n, state, "a collective");
    look(n);
}

/* Until NCCL has taken the call; over the first one of a kind it connects to its peers. */
static ncclResult_t settled(struct nccl_comm *n, ncclResult_t result) {
    double waited = 0, last = clock_seconds();
    struct comm *ranks = n->g.ranks;
    while (result == ncclInProgress) {
        ranks->ops->progress(ranks);
        count_wait(&waited, &last);
        if (waited > n->timeout)
            end_together(n, waited, "");
        usleep(100);
        if (!n->nccl || ncclCommGetAsyncError(n->nccl, &result) != ncclSuccess)
            return ncclInternalError;
    }
    return result;
}

#define nccl_check(n, call)                                                                                  \
    do {                                                                                                     \
        ncclResult_t result_ = settled(n, call);                                                             \
        if (result_ != ncclSuccess)                                                                          \
            end_failed(n, result_, #call);                                                                   \
    } while (0)

/* ---- collectives ---- */

static __global__ void count(volatile int64_t *place) {
    *place = *place + 1;
    __threadfence_system();
}

static void enter(struct nccl_comm *n) {
    gpu_comm_follow(&n->g);
    launch_on<count>(n->g.stream, 1, 1, 0, &n->places->reached);
}

static comm_event leave(struct nccl_comm *n) {
    launch_on<count>(n->g.stream, 1, 1, 0, &n->places->done);
    return gpu_comm_mark(&n->g);
}

/* Every rank's share of `buffer` to it; what the others have for this one to `others`, [ranks n]. */
static void send_shares(struct nccl_comm *n, const char *buffer, char *others, ncclDataType_t type,
                        size_t size, int64_t share) {
    int W = n->g.base.ranks;
    nccl_check(n, ncclGroupStart());
    for (int step = 1; step < W; step++) {
        int to = (n->g.base.rank + step) % W, from = (n->g.base.rank + W - step) % W;
        nccl_check(
            n, ncclSend(buffer + (size_t)(to * share) * size, (size_t)share, type, to, n->nccl, n->g.stream));
        nccl_check(n, ncclRecv(others + (size_t)(from * share) * size, (size_t)share, type, from, n->nccl,
                               n->g.stream));
    }
    nccl_check(n, ncclGroupEnd());
}

static comm_event nccl_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    struct nccl_comm *n = nccl_of(c);
    int64_t share = tensor_count(piece), all = share * c->ranks;
    const float *own = (const float *)buffer.data + share * c->rank;
    float *out = (float *)piece.data;
    if (tensor_count(buffer) != all || all > n->staging_elements || buffer.dtype != DTYPE_F32) {
        fprintf(stderr, "reduce_scatter: %lld elements in %d pieces of %lld, staging for %lld\n",
                (long long)tensor_count(buffer), c->ranks, (long long)share, (long long)n->staging_elements);
        abort();
    }
    enter(n);
    if (n->wire == DTYPE_BF16) {
        bf16 *rounded = (bf16 *)n->staging, *others = rounded + all;
        round_all_to_bf16(n->g.stream, (const float *)buffer.data, all, rounded);
        send_shares(n, (const char *)rounded, (char *)others, ncclBfloat16, sizeof *rounded, share);
        add_in_rank_order(n->g.stream, own, others, DTYPE_BF16, c->rank, c->ranks, share, out, accumulate);
    } else if (n->in_rank_order) {
        send_shares(n, (const char *)buffer.data, n->staging, ncclFloat, sizeof *own, share);
        add_in_rank_order(n->g.stream, own, n->staging, DTYPE_F32, c->rank, c->ranks, share, out, accumulate);
    } else {
        float *sum = accumulate ? (float *)n->staging : out;
        nccl_check(
            n, ncclReduceScatter(buffer.data, sum, (size_t)share, ncclFloat, ncclSum, n->nccl, n->g.stream));
        if (accumulate)
            add_to(n->g.stream, sum, share, out);
    }
    return leave(n);
}

static comm_event nccl_all_gather(struct comm *c, tensor buffer) {
    struct nccl_comm *n = nccl_of(c);
    size_t share = (size_t)tensor_count(buffer) * dtype_bytes(buffer.dtype) / (size_t)c->ranks;
    enter(n);
    nccl_check(n, ncclAllGather((char *)buffer.data + share * (size_t)c->rank, buffer.data, share, ncclUint8,
                                n->nccl, n->g.stream));
    return leave(n);
}

static void nccl_all_reduce(struct comm *c, double *values, int count) {
    struct nccl_comm *n = nccl_of(c);
    if (count > SMALL)
        abort();
    enter(n);
    nccl_check(n, ncclAllGather(values, n->all, (size_t)count, ncclDouble, n->nccl, n->g.stream));
    sum_doubles(n->g.stream, n->all, c->ranks, count, values);
    gpu_comm_wait(c, leave(n));
}

/* ---- opening and closing ---- */

static int nccl_reserve(struct comm *c, int64_t elements, enum dtype dtype, enum dtype wire,
                        struct error *e) {
    struct nccl_comm *n = nccl_of(c);
    size_t bytes = cuda_staging_bytes(n->g.dev, elements, c->ranks, dtype, wire);
    cuda_check(cudaFree(n->staging));
    n->staging = NULL;
    if (cudaMalloc((void **)&n->staging, bytes) != cudaSuccess)
        return fail_user(e, "no GPU memory for messages between ranks (%.2f GB); lower train.micro_batch",
                         (double)bytes / 1e9);
    n->wire = wire;
    n->staging_elements = elements;
    return 0;
}

static void release(struct nccl_comm *n) {
    cuda_check(cudaFree(n->staging));
    cuda_check(cudaFree(n->all));
    cuda_check(cudaFreeHost(n->places));
    gpu_comm_close(&n->g);
    free(n);
}

/* Graphs hold the communicator, and NCCL waits until they are gone. */
static void nccl_close(struct comm *c) {
    struct nccl_comm *n = nccl_of(c);
    struct device *dev = n->g.dev;
    gpu_comm_wait(c, gpu_comm_mark(&n->g));
    cuda_await_queue(dev);
    graphs_free(dev->graphs);
    dev->graphs = NULL;
    end_watch(n);
    nccl_check(n, ncclCommFinalize(n->nccl));
    ncclCommDestroy(n->nccl);
    release(n);
}

/* Rings and channels take memory, and are made when they are first used: before the model's memory is planned
 * from what is left. */
static void warm_up(struct nccl_comm *n) {
    size_t ranks = (size_t)n->g.base.ranks;
    float *numbers = (float *)n->all;
    cuda_check(cudaMemsetAsync(n->all, 0, ranks * SMALL * sizeof *n->all, n->g.stream));
    nccl_check(n, ncclAllGather(n->all, n->all, 1, ncclDouble, n->nccl, n->g.stream));
    if (n->in_rank_order)
        send_shares(n, (const char *)numbers, (char *)(numbers + ranks), ncclFloat, sizeof *numbers, 1);
    else
        nccl_check(n,
                   ncclReduceScatter(numbers, numbers + ranks, 1, ncclFloat, ncclSum, n->nccl, n->g.stream));
}

/* Rank 0's id for all; then all connect. */
static int connect(struct nccl_comm *n, struct error *e) {
    struct comm *ranks = n->g.ranks;
    ncclUniqueId id = {};
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t result = ranks->rank == 0 ? ncclGetUniqueId(&id) : ncclSuccess;
    int status =
        result == ncclSuccess ? 0 : fail_run(e, "NCCL does not start: %s", ncclGetErrorString(result));
    if (comm_agree(ranks, status, e) != 0)
        return -1;
    memcpy(&id, comm_all_gather_small(ranks, &id, sizeof id), sizeof id);
    result = ncclCommInitRankConfig(&n->nccl, ranks->ranks, id, ranks->rank, &config);
    /* Half the time that ranks give each other: those that have failed wait for the others to find out. */
    for (double since = clock_seconds(); result == ncclInProgress; usleep(1000)) {
        ranks->ops->progress(ranks);
        if (clock_seconds() - since > n->timeout / 2)
            return fail_run(
                e,
                "NCCL has not connected the GPUs in %.0f s; NCCL_DEBUG=INFO tells what it waits for, "
                "NCCL_SOCKET_IFNAME=eth1 names the network to use",
                n->timeout / 2);
        if (ncclCommGetAsyncError(n->nccl, &result) != ncclSuccess)
            result = ncclInternalError;
    }
    if (result == ncclSuccess)
        return 0;
    const char *why = ncclGetLastError(NULL);
    return fail_run(e, "NCCL cannot connect the GPUs: %s%s%.300s; NCCL_DEBUG=INFO tells more",
                    ncclGetErrorString(result), why && why[0] ? ": " : "", why ? why : "");
}

struct comm *comm_nccl_open(struct device *dev, struct comm *ranks, struct error *e) {
    static const struct comm_ops ops = {
        .name = "NCCL",
        .queued = true,
        .close = nccl_close,
        .abort_run = gpu_comm_abort_run,
        .reserve = nccl_reserve,
        .reduce_scatter = nccl_reduce_scatter,
        .all_gather = nccl_all_gather,
        .all_reduce = nccl_all_reduce,
        .wait = gpu_comm_wait,
        .progress = nccl_progress,
        .all_gather_host = gpu_comm_all_gather_host,
    };
    struct nccl_comm *n = (struct nccl_comm *)calloc(1, sizeof *n);
    if (!n) {
        fail_run(e, "out of memory for messages between ranks");
        return NULL;
    }
    gpu_comm_open(&n->g, dev, ranks, &ops);
    n->timeout = ranks->timeout;
    n->in_rank_order = dev->deterministic;
    cuda_check(cudaMalloc((void **)&n->all, (size_t)ranks->ranks * SMALL * sizeof *n->all));
    cuda_check(cudaMallocHost((void **)&n->places, sizeof *n->places));
    n->places->reached = n->places->done = 0;
    if (comm_agree(ranks, connect(n, e), e) != 0 || begin_watch(n, e) != 0) {
        release(n);
        return NULL;
    }
    warm_up(n);
    return &n->g.base;
}
#endif
