/* Collectives over NCCL, for ranks with a GPU each, on a stream of their own beside the device's.
 *
 * fp32 gradients use ncclReduceScatter, whose order of summation NCCL chooses. For bf16, and for fp32 with
 * system.deterministic, every rank sends each other rank its share and sums what it receives in rank order.
 * That sends as many bytes, gives the same bits whatever algorithm NCCL chooses, and rounds to bf16 once
 * instead of at every hop.
 *
 * NCCL never blocks the host: calls that return ncclInProgress are polled, and the host calls progress()
 * while it waits for the GPU. There a rank finds that NCCL reports an error, that a collective has made no
 * progress for peer_timeout, or that another rank has found one of these. Then all ranks exchange how many
 * collectives their GPUs have started, which identifies the GPU that did not reach the collective; a rank
 * whose process does not answer is identified by the processes' communicator. */
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
#include "kernels/cuda/cuda.cuh"
#include "kernels/limits.h"

enum {
    MAX_REDUCED = 8,   /* doubles in an all_reduce */
    DELAY_SECONDS = 3, /* for rank 0 to abort the run first */
    MAX_GROUPED = 64,  /* all_gathers that start together */
};

/* Numbers of collectives that the GPU has started and finished; in pinned memory, written by the GPU. */
struct gpu_progress {
    volatile int64_t started, done;
};

struct nccl_comm {
    struct gpu_comm g;
    ncclComm_t nccl;
    double timeout;
    enum dtype wire;
    bool in_rank_order;
    char *staging; /* device memory; see reserve */
    int64_t staging_elements;
    double *all; /* device [ranks MAX_REDUCED] */
    bool grouping;
    int grouped_count;
    tensor grouped[MAX_GROUPED]; /* buffers of all_gathers that have not been started */
    struct gpu_progress *gpu;
    pthread_t watchdog;
    volatile bool stop_watchdog;
    bool has_watchdog;
    struct gpu_progress seen; /* at the last check_progress */
    double waited;            /* seconds in the host's waits since `seen` changed */
    double last_check;        /* time of the last check_progress, */
    double last_probe;        /* and of its last probe */
};

static struct nccl_comm *nccl_of(struct comm *c) {
    return (struct nccl_comm *)c;
}

/* ---- aborting the run ---- */

/* When all ranks find the same error, rank 0 reports it. Without ncclCommAbort, which would wait for every
 * graph that holds the communicator; the end of the process releases its peers too. */
static void abort_run(struct nccl_comm *n, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));
static void abort_run(struct nccl_comm *n, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n->g.base.rank > 0)
        sleep(DELAY_SECONDS);
    gpu_comm_abort_run(&n->g.base, text);
    _exit(EXIT_RUN);
}

/* What the ranks exchange when the run cannot go on. No other all_gather_host has this size, so a rank
 * that has found no error itself recognizes it with probe(). */
struct report {
    int64_t started;
    double waited;
    char nccl_error[480]; /* empty: none */
};

/* "rank 3, rank 5": those whose GPU has started the fewest collectives; empty when all have started as
 * many. */
static void list_late_ranks(const struct report *all, int ranks, char *late, size_t size) {
    int64_t least = all[0].started, most = least;
    late[0] = '\0';
    for (int r = 0; r < ranks; r++) {
        least = all[r].started < least ? all[r].started : least;
        most = all[r].started > most ? all[r].started : most;
    }
    for (int r = 0; r < ranks && least < most; r++)
        if (all[r].started == least && strlen(late) + 16 < size)
            snprintf(late + strlen(late), size - strlen(late), "%srank %d", late[0] ? ", " : "", r);
}

static void abort_together(struct nccl_comm *n, double waited, const char *nccl_error)
    __attribute__((noreturn));
static void abort_together(struct nccl_comm *n, double waited, const char *nccl_error) {
    char late[256];
    int ranks = n->g.base.ranks;
    struct report mine = {.started = n->gpu->started, .waited = waited};
    snprintf(mine.nccl_error, sizeof mine.nccl_error, "%s", nccl_error);
    const struct report *all = (const struct report *)comm_all_gather_small(n->g.ranks, &mine, sizeof mine);
    const char *why = "";
    list_late_ranks(all, ranks, late, sizeof late);
    for (int r = ranks - 1; r >= 0; r--) {
        waited = all[r].waited > waited ? all[r].waited : waited;
        why = all[r].nccl_error[0] ? all[r].nccl_error : why;
    }
    if (why[0])
        abort_run(n, "NCCL: %s%s%s; " COMM_RESUME_HINT, why, late[0] ? "; GPUs that are behind: " : "", late);
    if (late[0])
        abort_run(n,
                  "the GPU of %s has not started a collective in which other GPUs have waited for %.0f s: it "
                  "is hung or far slower than they are; " COMM_RESUME_HINT
                  " (system.peer_timeout = %.0f sets how long to wait)",
                  late, waited, n->timeout);
    abort_run(n,
              "a collective that the GPUs of all ranks have started has not finished for %.0f s: the network "
              "between them hangs; NCCL_DEBUG=INFO shows what NCCL does; " COMM_RESUME_HINT,
              waited);
}

static void abort_on_error(struct nccl_comm *n, ncclResult_t result, const char *call) {
    char why[480];
    const char *last = ncclGetLastError(n->nccl);
    snprintf(why, sizeof why, "%s%s%.300s in %.80s", ncclGetErrorString(result), last && last[0] ? ": " : "",
             last ? last : "", call);
    for (char *p = why; *p; p++)
        if (*p == '\n')
            *p = ' ';
    abort_together(n, 0, why);
}

/* ---- watchdog ---- */

enum {
    WATCH_MS = 500,
    GRACE_SECONDS = 10, /* for the main thread to find the timeout itself, and which rank causes it */
};

/* When the GPU hangs in a collective, its launch queue fills up, and the main thread then blocks in a CUDA
 * call. So this thread checks as well; it calls neither CUDA nor other ranks. */
static void *watch(void *context) {
    struct nccl_comm *n = (struct nccl_comm *)context;
    struct gpu_progress last = {-1, -1};
    double waited = 0, time = clock_seconds();
    while (!n->stop_watchdog) {
        struct gpu_progress now = {n->gpu->started, n->gpu->done};
        double before = time;
        usleep(WATCH_MS * 1000);
        time = clock_seconds();
        bool progresses = now.started == now.done || now.started != last.started || now.done != last.done;
        waited = progresses ? 0 : waited + (time - before < 1 ? time - before : 1); /* not while suspended */
        last.started = now.started;
        last.done = now.done;
        if (waited > n->timeout + GRACE_SECONDS) {
            fprintf(stderr,
                    "\ntrain_iha: rank %d: its GPU has waited for %.0f s in a collective, and its launch "
                    "queue is full: another rank, its GPU or the network hangs; " COMM_RESUME_HINT "\n",
                    n->g.base.rank, waited);
            _exit(EXIT_RUN);
        }
    }
    return NULL;
}

static int start_watchdog(struct nccl_comm *n, struct error *e) {
    int status = pthread_create(&n->watchdog, NULL, watch, n);
    n->has_watchdog = status == 0;
    return n->has_watchdog ? 0 : limits_fail_thread(e, "the watchdog thread of the collectives", status);
}

static void stop_watchdog(struct nccl_comm *n) {
    n->stop_watchdog = true;
    if (n->has_watchdog)
        pthread_join(n->watchdog, NULL);
    n->has_watchdog = false;
}

/* ---- non-blocking calls ---- */

/* Add the time since `last` to a wait, one second at most: in a longer gap this process was suspended (by
 * a batch scheduler, say), and the others were not late. */
static void add_wait(double *waited, double *last) {
    double time = clock_seconds(), gap = time - *last;
    *waited += gap < 1 ? gap : 1;
    *last = time;
}

/* Abort when the GPU has made no progress in a collective for too long, or when another rank is aborting. */
static void check_progress(struct nccl_comm *n) {
    struct gpu_progress now = {n->gpu->started, n->gpu->done};
    struct comm *ranks = n->g.ranks;
    add_wait(&n->waited, &n->last_check);
    if (now.started != n->seen.started || now.done != n->seen.done || now.started == now.done) {
        n->seen.started = now.started;
        n->seen.done = now.done;
        n->waited = 0;
    }
    if (n->waited > n->timeout)
        abort_together(n, n->waited, "");
    if (n->last_check - n->last_probe > 0.1) {
        n->last_probe = n->last_check;
        if (ranks->ops->probe(ranks, sizeof(struct report)))
            abort_together(n, n->waited, "");
    }
}

static void nccl_progress(struct comm *c) {
    struct nccl_comm *n = nccl_of(c);
    struct comm *ranks = n->g.ranks;
    ncclResult_t state = ncclSuccess;
    ranks->ops->progress(ranks);
    if (ncclCommGetAsyncError(n->nccl, &state) == ncclSuccess && state != ncclSuccess &&
        state != ncclInProgress)
        abort_on_error(n, state, "a collective");
    check_progress(n);
}

static const double SPIN_SECONDS = 1e-3;

/* Poll until NCCL has accepted the call; the first of a kind connects to the peers. NCCL accepts the others within
 * microseconds, less than the shortest sleep: those are polled without a pause. */
static ncclResult_t await_nccl(struct nccl_comm *n, ncclResult_t result) {
    double waited = 0, last = clock_seconds();
    struct comm *ranks = n->g.ranks;
    while (result == ncclInProgress) {
        add_wait(&waited, &last);
        if (waited > n->timeout)
            abort_together(n, waited, "");
        if (waited > SPIN_SECONDS) {
            ranks->ops->progress(ranks);
            usleep(100);
        }
        if (!n->nccl || ncclCommGetAsyncError(n->nccl, &result) != ncclSuccess)
            return ncclInternalError;
    }
    return result;
}

#define nccl_check(n, call)                                                                                  \
    do {                                                                                                     \
        ncclResult_t result_ = await_nccl(n, call);                                                          \
        if (result_ != ncclSuccess)                                                                          \
            abort_on_error(n, result_, #call);                                                               \
    } while (0)

/* ---- collectives ---- */

static __global__ void increment(volatile int64_t *counter) {
    wait_for_previous();
    *counter = *counter + 1;
    __threadfence_system();
}

static void queue_begin(struct nccl_comm *n) {
    gpu_comm_wait_device(&n->g);
    launch_on<increment>(n->g.stream, 1, 1, 0, &n->gpu->started);
}

static comm_event end_collective(struct nccl_comm *n) {
    launch_on<increment>(n->g.stream, 1, 1, 0, &n->gpu->done);
    return gpu_comm_record(&n->g);
}

static void gather(struct nccl_comm *n, tensor buffer) {
    size_t share = (size_t)tensor_count(buffer) * dtype_bytes(buffer.dtype) / (size_t)n->g.base.ranks;
    nccl_check(n, ncclAllGather((char *)buffer.data + share * (size_t)n->g.base.rank, buffer.data, share,
                                ncclUint8, n->nccl, n->g.stream));
}

/* Start the all_gathers that have been put off. NCCL runs those of a group in one kernel. */
static void start_grouped(struct nccl_comm *n) {
    int count = n->grouped_count;
    n->grouped_count = 0;
    if (count == 0)
        return;
    queue_begin(n);
    nccl_check(n, ncclGroupStart());
    for (int i = 0; i < count; i++)
        gather(n, n->grouped[i]);
    nccl_check(n, ncclGroupEnd());
    end_collective(n);
}

static void begin_collective(struct nccl_comm *n) {
    start_grouped(n);
    queue_begin(n);
}

/* Send each rank its share of `buffer`; receive the others' for this rank into `others`, [ranks n]. */
static void exchange_shares(struct nccl_comm *n, const char *buffer, char *others, ncclDataType_t type,
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
    begin_collective(n);
    if (n->wire == DTYPE_BF16) {
        bf16 *rounded = (bf16 *)n->staging, *others = rounded + all;
        comm_round_to_bf16(n->g.stream, (const float *)buffer.data, all, rounded);
        exchange_shares(n, (const char *)rounded, (char *)others, ncclBfloat16, sizeof *rounded, share);
        comm_add_in_rank_order(n->g.stream, own, others, DTYPE_BF16, c->rank, c->ranks, share, out,
                               accumulate);
    } else if (n->in_rank_order) {
        exchange_shares(n, (const char *)buffer.data, n->staging, ncclFloat, sizeof *own, share);
        comm_add_in_rank_order(n->g.stream, own, n->staging, DTYPE_F32, c->rank, c->ranks, share, out,
                               accumulate);
    } else {
        float *sum = accumulate ? (float *)n->staging : out;
        nccl_check(
            n, ncclReduceScatter(buffer.data, sum, (size_t)share, ncclFloat, ncclSum, n->nccl, n->g.stream));
        if (accumulate)
            comm_add_to(n->g.stream, sum, share, out);
    }
    return end_collective(n);
}

static comm_event nccl_all_gather(struct comm *c, tensor buffer) {
    struct nccl_comm *n = nccl_of(c);
    if (n->grouping) {
        if (n->grouped_count == MAX_GROUPED)
            start_grouped(n);
        n->grouped[n->grouped_count++] = buffer;
        return n->g.events + 1; /* recorded when the group starts */
    }
    begin_collective(n);
    gather(n, buffer);
    return end_collective(n);
}

static void nccl_group_begin(struct comm *c) {
    nccl_of(c)->grouping = true;
}

static void nccl_group_end(struct comm *c) {
    struct nccl_comm *n = nccl_of(c);
    n->grouping = false;
    start_grouped(n);
}

static void nccl_all_reduce(struct comm *c, double *values, int count) {
    struct nccl_comm *n = nccl_of(c);
    if (count > MAX_REDUCED)
        abort();
    begin_collective(n);
    nccl_check(n, ncclAllGather(values, n->all, (size_t)count, ncclDouble, n->nccl, n->g.stream));
    comm_sum_doubles(n->g.stream, n->all, c->ranks, count, values);
    gpu_comm_wait(c, end_collective(n));
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
    cuda_check(cudaFreeHost(n->gpu));
    gpu_comm_close(&n->g);
    free(n);
}

/* NCCL waits until no graph holds the communicator. */
static void nccl_close(struct comm *c) {
    struct nccl_comm *n = nccl_of(c);
    struct device *dev = n->g.dev;
    gpu_comm_wait(c, gpu_comm_record(&n->g));
    cuda_await_queue(dev);
    graphs_free(dev->graphs);
    dev->graphs = NULL;
    stop_watchdog(n);
    nccl_check(n, ncclCommFinalize(n->nccl));
    ncclCommDestroy(n->nccl);
    release(n);
}

/* NCCL allocates rings and channels at their first use. This is it, so that the model's memory is planned
 * from what is really left. */
static void warm_up(struct nccl_comm *n) {
    size_t ranks = (size_t)n->g.base.ranks;
    float *numbers = (float *)n->all;
    cuda_check(cudaMemsetAsync(n->all, 0, ranks * MAX_REDUCED * sizeof *n->all, n->g.stream));
    nccl_check(n, ncclAllGather(n->all, n->all, 1, ncclDouble, n->nccl, n->g.stream));
    if (n->in_rank_order)
        exchange_shares(n, (const char *)numbers, (char *)(numbers + ranks), ncclFloat, sizeof *numbers, 1);
    else
        nccl_check(n,
                   ncclReduceScatter(numbers, numbers + ranks, 1, ncclFloat, ncclSum, n->nccl, n->g.stream));
}

/* Share rank 0's NCCL id, and connect. */
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
    /* Half of peer_timeout: a rank whose NCCL failed at once waits in comm_agree meanwhile. */
    for (double since = clock_seconds(); result == ncclInProgress; usleep(1000)) {
        ranks->ops->progress(ranks);
        if (clock_seconds() - since > n->timeout / 2)
            return fail_run(
                e,
                "NCCL has not connected the GPUs within %.0f s; NCCL_DEBUG=INFO shows what it waits for, "
                "NCCL_SOCKET_IFNAME=eth1 selects the network",
                n->timeout / 2);
        if (ncclCommGetAsyncError(n->nccl, &result) != ncclSuccess)
            result = ncclInternalError;
    }
    if (result == ncclSuccess)
        return 0;
    const char *why = ncclGetLastError(NULL);
    return fail_run(e, "NCCL cannot connect the GPUs: %s%s%.300s; NCCL_DEBUG=INFO shows more",
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
        .group_begin = nccl_group_begin,
        .group_end = nccl_group_end,
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
    cuda_check(cudaMalloc((void **)&n->all, (size_t)ranks->ranks * MAX_REDUCED * sizeof *n->all));
    cuda_check(cudaMallocHost((void **)&n->gpu, sizeof *n->gpu));
    n->gpu->started = n->gpu->done = 0;
    if (comm_agree(ranks, connect(n, e), e) != 0 || start_watchdog(n, e) != 0) {
        release(n);
        return NULL;
    }
    warm_up(n);
    return &n->g.base;
}
#endif
