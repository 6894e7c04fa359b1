/* The emulator's NCCL, between forked processes: its results, the misuse it reports, and that it does what
 * it promises to. */
#include "tests/cuda/death.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <nccl.h>
#include <stdlib.h>
#include <time.h>

#include "tests/cuda/emulator/control.h"

enum { MAX_RANKS = 4, SEEDS = 6 };

/* What a rank checks; where it does not hold, the rank ends. */
#define check(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                          \
            _exit(1);                                                                                        \
        }                                                                                                    \
    } while (0)
#define ok(call) check((call) == 0)

/* ---- ranks ---- */

struct rank {
    int rank, ranks;
    ncclUniqueId id;
    ncclComm_t comm;
    cudaStream_t stream, other;
    uint64_t seed;
    int argument;
};

struct ended {
    int status[MAX_RANKS]; /* waitpid's */
    char said[16384];      /* on stderr, by all */
};

static void join(struct rank *r) {
    ok(cudaSetDevice(r->rank));
    ok(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking));
    ok(cudaStreamCreateWithFlags(&r->other, cudaStreamNonBlocking));
    ok(ncclCommInitRank(&r->comm, r->ranks, r->id, r->rank));
}

static void leave(struct rank *r) {
    ok(cudaDeviceSynchronize());
    ok(ncclCommDestroy(r->comm));
    check(ncclCommDestroy(r->comm) == ncclInvalidArgument);
    ok(cudaStreamDestroy(r->stream));
    ok(cudaStreamDestroy(r->other));
    check(emulator_allocations() == 0);
}

/* f on each of `ranks` processes, whose GPUs are threads where `background`. */
static struct ended on_ranks(int ranks, void (*f)(struct rank *), uint64_t seed, bool background,
                             int argument) {
    struct rank r = {.ranks = ranks, .argument = argument};
    struct ended e = {0};
    int err[2];
    pid_t child[MAX_RANKS];
    assert_int_equal(ncclGetUniqueId(&r.id), ncclSuccess);
    assert_int_equal(pipe(err), 0);
    fflush(NULL);
    for (r.rank = 0; r.rank < ranks; r.rank++) {
        child[r.rank] = fork();
        if (child[r.rank] != 0)
            continue;
        int fatal[] = {SIGABRT, SIGSEGV, SIGBUS};
        for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
            signal(fatal[i], SIG_DFL);
        close(err[0]);
        dup2(err[1], STDERR_FILENO);
        alarm(60); /* nothing waits for ever */
        r.seed = seed < 2 ? seed : seed + (uint64_t)r.rank * 1000;
        emulator_seed(r.seed);
        emulator_gpu.count = MAX_RANKS;
        if (background)
            emulator_background(100);
        f(&r);
        _exit(0);
    }
    close(err[1]);
    size_t length = 0;
    for (ssize_t n; (n = read(err[0], e.said + length, sizeof e.said - 1 - length)) > 0;)
        length += (size_t)n;
    close(err[0]);
    for (int i = 0; i < ranks; i++)
        assert_int_equal(waitpid(child[i], &e.status[i], 0), child[i]);
    char left[160]; /* nothing is left behind */
    snprintf(left, sizeof left, "/dev/shm%s", r.id.internal);
    assert_int_equal(access(left, F_OK), -1);
    return e;
}

static void all_well(int ranks, void (*f)(struct rank *), uint64_t seed, bool background, int argument) {
    struct ended e = on_ranks(ranks, f, seed, background, argument);
    for (int i = 0; i < ranks; i++)
        if (e.status[i] != 0)
            fail_msg("%d ranks, seed %d: rank %d ended with status %x: %s", ranks, (int)seed, i, e.status[i],
                     e.said);
}

static bool aborted(int status) {
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

/* ---- numbers ---- */

struct type {
    ncclDataType_t type;
    size_t bytes;
};

static const struct type types[] = {{ncclFloat32, 4}, {ncclFloat64, 8}, {ncclBfloat16, 2}, {ncclInt8, 1},
                                    {ncclUint8, 1},   {ncclInt32, 4},   {ncclInt64, 8}};

/* Small integers, which all types and their sums hold exactly. */
static void put(struct type t, void *at, size_t i, int x) {
    char *p = (char *)at + i * t.bytes;
    float f = (float)x;
    double d = x;
    int64_t l = x;
    if (t.type == ncclFloat64)
        memcpy(p, &d, 8);
    else if (t.type == ncclFloat32)
        memcpy(p, &f, 4);
    else if (t.type == ncclBfloat16)
        memcpy(p, (char *)&f + 2, 2);
    else
        memcpy(p, &l, t.bytes);
}

static int given(int rank, size_t i) {
    return (int)((i * 7 + (size_t)rank * 3) % 11);
}

static int sum_given(int ranks, size_t i) {
    int sum = 0;
    for (int r = 0; r < ranks; r++)
        sum += given(r, i);
    return sum;
}

static char *device(size_t bytes, const void *host) {
    char *p;
    ok(cudaMalloc((void **)&p, bytes));
    if (host)
        ok(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

static void expect_bytes(const void *on_device, const void *want, size_t bytes) {
    char *got = malloc(bytes);
    ok(cudaMemcpy(got, on_device, bytes, cudaMemcpyDeviceToHost));
    check(memcmp(got, want, bytes) == 0);
    free(got);
}

/* ---- what it computes ---- */

static void each_collective(struct rank *r, struct type t, size_t n, bool in_place) {
    size_t W = (size_t)r->ranks, R = (size_t)r->rank, bytes = n * t.bytes;
    char *mine = malloc(W * bytes), *want = malloc(W * bytes);
    for (size_t i = 0; i < W * n; i++)
        put(t, mine, i, given(r->rank, i));

    for (size_t i = 0; i < n; i++)
        put(t, want, i, sum_given(r->ranks, R * n + i));
    char *send = device(W * bytes, mine), *recv = in_place ? send + R * bytes : device(bytes, NULL);
    ok(ncclReduceScatter(send, recv, n, t.type, ncclSum, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    expect_bytes(recv, want, bytes);
    if (!in_place) {
        expect_bytes(send, mine, W * bytes);
        ok(cudaFree(recv));
    }
    ok(cudaFree(send));

    for (size_t i = 0; i < W * n; i++)
        put(t, want, i, given((int)(i / n), i % n));
    recv = device(W * bytes, NULL);
    send = in_place ? recv + R * bytes : device(bytes, NULL);
    ok(cudaMemcpy(send, mine, bytes, cudaMemcpyHostToDevice));
    ok(ncclAllGather(send, recv, n, t.type, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    expect_bytes(recv, want, W * bytes);
    if (!in_place)
        ok(cudaFree(send));
    ok(cudaFree(recv));

    for (size_t i = 0; i < n; i++)
        put(t, want, i, sum_given(r->ranks, i));
    send = device(bytes, mine);
    recv = in_place ? send : device(bytes, NULL);
    ok(ncclAllReduce(send, recv, n, t.type, ncclSum, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    expect_bytes(recv, want, bytes);

    int root = r->ranks - 1;
    for (size_t i = 0; i < n; i++)
        put(t, want, i, given(root, i));
    ok(cudaMemcpy(send, mine, bytes, cudaMemcpyHostToDevice));
    ok(ncclBroadcast(send, recv, n, t.type, root, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    expect_bytes(recv, want, bytes);
    if (!in_place)
        ok(cudaFree(recv));
    ok(cudaFree(send));
    free(mine);
    free(want);
}

static void run_collectives(struct rank *r) {
    join(r);
    int count = 0, rank = -1;
    ok(ncclCommCount(r->comm, &count));
    ok(ncclCommUserRank(r->comm, &rank));
    check(count == r->ranks && rank == r->rank);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        for (int in_place = 0; in_place < 2; in_place++)
            each_collective(r, types[i], 5, in_place);
    each_collective(r, types[0], 50000, false); /* more than a pipe holds */
    each_collective(r, types[2], 50001, true);
    leave(r);
}

static void collectives(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= MAX_RANKS; ranks++)
        for (uint64_t seed = 0; seed < 4; seed++)
            all_well(ranks, run_collectives, seed, seed == 2, 0);
}

/* The share of rank r begins with rank r + 1's, so that who relies on the order of ranks sees other bits. */
static void run_order(struct rank *r) {
    static const float x[MAX_RANKS] = {1e8f, 3, -1e8f, 1};
    join(r);
    float all[MAX_RANKS], in_ring = 0, in_rank_order = 0, got;
    for (int i = 0; i < r->ranks; i++) {
        all[i] = x[r->rank];
        in_rank_order += x[i];
        in_ring += x[(r->rank + 1 + i) % r->ranks];
    }
    char *send = device(sizeof all, all), *recv = device(sizeof got, NULL);
    ok(ncclReduceScatter(send, recv, 1, ncclFloat32, ncclSum, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    ok(cudaMemcpy(&got, recv, sizeof got, cudaMemcpyDeviceToHost));
    check(got == in_ring);
    check(r->rank == 3 ? got == in_rank_order : r->rank != 1 || got != in_rank_order);
    float sums[MAX_RANKS]; /* all_reduce: the same bits everywhere, the part of each rank in its order */
    ok(ncclAllReduce(send, send, 4, ncclFloat32, ncclSum, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    ok(cudaMemcpy(sums, send, sizeof sums, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 4; i++) {
        float want = 0;
        for (int j = 0; j < 4; j++)
            want += x[(i + 1 + j) % 4];
        check(sums[i] == want);
    }
    ok(cudaFree(send));
    ok(cudaFree(recv));
    leave(r);
}

static void order_of_sums(void **state) {
    (void)state;
    all_well(4, run_order, 0, false, 0);
}

/* Everyone sends to both neighbours, itself and more than a pipe holds, in one group. */
static void run_groups(struct rank *r) {
    enum { LONG = 100000 };
    join(r);
    int next = (r->rank + 1) % r->ranks, before = (r->rank + r->ranks - 1) % r->ranks;
    int32_t *host = malloc(LONG * sizeof *host);
    for (int i = 0; i < LONG; i++)
        host[i] = r->rank * LONG + i;
    int32_t *out = (int32_t *)device(LONG * 4, host), *in = (int32_t *)device(LONG * 4, NULL),
            *self = (int32_t *)device(16, NULL);
    ok(ncclGroupStart());
    ok(ncclGroupStart());
    ok(ncclSend(out, LONG - 1, ncclInt32, next, r->comm, r->stream));
    ok(ncclSend(out + LONG - 1, 1, ncclInt32, next, r->comm, r->stream)); /* in the order of the calls */
    ok(ncclSend(out, 4, ncclInt32, r->rank, r->comm, r->stream));
    ok(ncclGroupEnd());
    ok(cudaStreamQuery(r->stream)); /* nothing is queued before the outer group ends */
    ok(ncclRecv(in, LONG - 1, ncclInt32, before, r->comm, r->stream));
    ok(ncclRecv(in + LONG - 1, 1, ncclInt32, before, r->comm, r->stream));
    ok(ncclRecv(self, 4, ncclInt32, r->rank, r->comm, r->stream));
    ok(ncclGroupEnd());
    check(ncclGroupEnd() == ncclInvalidUsage);
    ok(cudaStreamSynchronize(r->stream));
    expect_bytes(self, host, 16);
    for (int i = 0; i < LONG; i++)
        host[i] = before * LONG + i;
    expect_bytes(in, host, LONG * 4);
    free(host);
    ok(cudaFree(out));
    ok(cudaFree(in));
    ok(cudaFree(self));
    leave(r);
}

static void groups(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 3; seed++) {
        all_well(1, run_groups, seed, false, 0);
        all_well(3, run_groups, seed, false, 0);
    }
    all_well(2, run_groups, 2, true, 0);
}

/* A graph with collectives on two streams, between others outside of it, some of them on a stream that
 * nothing orders: the calls' order holds on every rank. */
static void run_graph(struct rank *r) {
    join(r);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t fork, joined;
    ok(cudaEventCreate(&fork));
    ok(cudaEventCreate(&joined));
    float *a = (float *)device(16, NULL), *b = (float *)device(16, NULL), *c = (float *)device(16, NULL);
    ok(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeGlobal));
    ok(cudaEventRecord(fork, r->stream));
    ok(cudaStreamWaitEvent(r->other, fork, 0));
    ok(ncclAllReduce(a, a, 4, ncclFloat32, ncclSum, r->comm, r->stream));
    ok(ncclAllReduce(b, b, 4, ncclFloat32, ncclSum, r->comm, r->other));
    ok(cudaEventRecord(joined, r->other));
    ok(cudaStreamWaitEvent(r->stream, joined, 0));
    ok(cudaStreamEndCapture(r->stream, &graph));
    ok(cudaGraphInstantiate(&exec, graph, 0));
    ok(cudaGraphDestroy(graph));
    float host[4] = {1, 2, 3, 4}, want = 1;
    for (int i = 0; i < 3; i++) {
        ok(cudaMemcpy(a, host, 16, cudaMemcpyHostToDevice));
        ok(cudaMemcpy(b, host, 16, cudaMemcpyHostToDevice));
        ok(cudaMemcpy(c, host, 16, cudaMemcpyHostToDevice));
        ok(cudaGraphLaunch(exec, r->stream));
        ok(ncclAllReduce(c, c, 4, ncclFloat32, ncclSum, r->comm, r->other));
        ok(cudaGraphLaunch(exec, r->stream));
        ok(cudaDeviceSynchronize());
        float got[3];
        ok(cudaMemcpy(&got[0], a, 4, cudaMemcpyDeviceToHost));
        ok(cudaMemcpy(&got[1], b, 4, cudaMemcpyDeviceToHost));
        ok(cudaMemcpy(&got[2], c, 4, cudaMemcpyDeviceToHost));
        want = (float)r->ranks;
        check(got[0] == want * want && got[1] == want * want && got[2] == want);
    }
    ok(cudaGraphExecDestroy(exec));
    ok(cudaEventDestroy(fork));
    ok(cudaEventDestroy(joined));
    ok(cudaFree(a));
    ok(cudaFree(b));
    ok(cudaFree(c));
    leave(r);
}

static void graphs(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < SEEDS; seed++)
        all_well(3, run_graph, seed, seed >= 4, 0);
}

/* ---- what it catches ---- */

/* Rank 1 does something else than the others. */
static void run_mismatch(struct rank *r) {
    join(r);
    char *p = device(1024, NULL);
    bool odd = r->rank == 1;
    if (r->argument == 0)
        ok(ncclAllReduce(p, p, odd ? 5 : 4, ncclFloat32, ncclSum, r->comm, r->stream));
    else if (r->argument == 1)
        ok(ncclAllReduce(p, p, 4, odd ? ncclInt32 : ncclFloat32, ncclSum, r->comm, r->stream));
    else if (r->argument == 2 && odd)
        ok(ncclAllGather(p, p + 512, 4, ncclFloat32, r->comm, r->stream));
    else if (r->argument == 2)
        ok(ncclAllReduce(p, p, 4, ncclFloat32, ncclSum, r->comm, r->stream));
    else if (r->argument == 3)
        ok(ncclBroadcast(p, p, 4, ncclFloat32, odd, r->comm, r->stream));
    else if (odd)
        ok(ncclSend(p, 4, ncclFloat32, 0, r->comm, r->stream));
    else
        ok(ncclRecv(p, 3, ncclFloat32, 1, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
}

static void mismatches(void **state) {
    (void)state;
    for (int kind = 0; kind < 5; kind++) {
        struct ended e = on_ranks(2, run_mismatch, 0, true, kind);
        if (!strstr(e.said, "ranks do not agree"))
            fail_msg("kind %d: nothing was caught: %s", kind, e.said);
        assert_true(aborted(e.status[0]) || aborted(e.status[1]));
    }
}

static void run_duplicate(struct rank *r) {
    ncclComm_t comm;
    ok(cudaSetDevice(1));
    check(ncclCommInitRank(&comm, r->ranks, r->id, r->rank) == ncclInvalidUsage);
    check(strstr(ncclGetLastError(NULL), "duplicate GPU"));
}

static void two_ranks_on_a_gpu(void **state) {
    (void)state;
    all_well(3, run_duplicate, 0, false, 0);
}

/* Two ranks with one number, or that disagree on the number of ranks. */
static void run_refused(struct rank *r) {
    ncclComm_t comm;
    int ranks = 2, rank = 0;
    if (r->argument == 1) {
        rank = r->rank;
        ranks = 2 + r->rank;
    }
    ncclResult_t result = ncclCommInitRank(&comm, ranks, r->id, rank);
    check(result == ncclInvalidArgument || result == ncclInternalError);
    check(strstr(ncclGetLastError(NULL), result == ncclInternalError ? "did not fit"
                                         : r->argument               ? "do not agree how many"
                                                                     : "two ranks with number 0") ||
          strstr(ncclGetLastError(NULL), "is every rank there already"));
    fprintf(stderr, "%s\n", ncclGetLastError(NULL));
}

static void refused(void **state) {
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        struct ended e = on_ranks(2, run_refused, 0, false, kind);
        assert_int_equal(e.status[0] | e.status[1], 0);
        assert_non_null(strstr(e.said, kind ? "do not agree how many" : "two ranks with number 0"));
    }
}

static void run_bad_arguments(struct rank *r) {
    join(r);
    float host[4];
    float *p = (float *)device(16, NULL);
    check(ncclAllReduce(p, p, 4, ncclFloat32, ncclMax, r->comm, r->stream) == ncclInvalidArgument);
    check(ncclAllReduce(p, p, 4, ncclFloat16, ncclSum, r->comm, r->stream) == ncclInvalidArgument);
    check(ncclBroadcast(p, p, 4, ncclFloat32, 1, r->comm, r->stream) == ncclInvalidArgument);
    check(ncclSend(p, 4, ncclFloat32, -1, r->comm, r->stream) == ncclInvalidArgument);
    if (r->argument == 0)
        ncclAllReduce(host, p, 4, ncclFloat32, ncclSum, r->comm, r->stream);
    else
        ncclAllReduce(p, p, 5, ncclFloat32, ncclSum, r->comm, r->stream);
}

static void bad_arguments(void **state) {
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        struct ended e = on_ranks(1, run_bad_arguments, 0, false, kind);
        assert_true(aborted(e.status[0]));
        assert_non_null(strstr(e.said, "is not device memory"));
    }
}

/* A collective in flight, and something on another stream that should have waited for it: 0 writes what is
 * sent, 1 writes what is received, 2 reads what is received; 3 waits. Seed 0 begins with the collective. */
static void run_reuse(struct rank *r) {
    setenv("EMULATOR_NCCL_DELAY_US", "200000", 1);
    join(r);
    float host[2] = {1, 1}, got;
    float *send = (float *)device(4, host), *recv = (float *)device(8, host),
          *copy = (float *)device(4, host);
    cudaEvent_t done;
    ok(cudaEventCreate(&done));
    ok(ncclAllGather(send, recv, 1, ncclFloat32, r->comm, r->stream));
    ok(cudaEventRecord(done, r->stream));
    if (r->argument == 3)
        ok(cudaStreamWaitEvent(r->other, done, 0));
    if (r->argument == 0 || r->argument == 3)
        ok(cudaMemsetAsync(send, 0, 4, r->other));
    if (r->argument == 1)
        ok(cudaMemsetAsync(recv, 0, 4, r->other));
    if (r->argument == 2 || r->argument == 3)
        ok(cudaMemcpyAsync(copy, recv, 4, cudaMemcpyDeviceToDevice, r->other));
    ok(cudaDeviceSynchronize());
    ok(cudaMemcpy(&got, copy, 4, cudaMemcpyDeviceToHost));
    check(r->argument == 2 ? isnan(got) : got == 1);
    expect_bytes(recv, host, 8);
}

static void buffers_in_flight(void **state) {
    (void)state;
    static const char *const says[] = {"the buffer that ncclAllGather sends was written",
                                       "the buffer that ncclAllGather receives was written"};
    for (int kind = 0; kind < 2; kind++) {
        struct ended e = on_ranks(2, run_reuse, 0, false, kind);
        assert_true(aborted(e.status[0]) && aborted(e.status[1]));
        assert_non_null(strstr(e.said, says[kind]));
    }
    all_well(2, run_reuse, 0, false, 2);
    for (uint64_t seed = 0; seed < SEEDS; seed++)
        all_well(2, run_reuse, seed, seed == 5, 3);
}

/* ---- faults ---- */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Rank 1 fails at its third operation. The others wait for it, are notified or not, and abort. */
static void run_fault(struct rank *r) {
    static const char *const faults[] = {"1:2:hang", "1:2:error", "1:2:die"};
    setenv("EMULATOR_NCCL_FAULT", faults[r->argument], 1);
    join(r);
    float host[4] = {1, 2, 3, 4};
    float *p = (float *)device(16, host);
    cudaEvent_t done;
    ok(cudaEventCreate(&done));
    for (int i = 0; i < 2; i++)
        ok(ncclAllReduce(p, p, 4, ncclFloat32, ncclSum, r->comm, r->stream));
    ok(cudaStreamSynchronize(r->stream));
    for (int i = 0; i < 4; i++)
        host[i] *= (float)(r->ranks * r->ranks);
    expect_bytes(p, host, 16);
    ok(ncclAllReduce(p, p, 4, ncclFloat32, ncclSum, r->comm, r->stream));
    ok(ncclAllReduce(p, p, 4, ncclFloat32, ncclSum, r->comm, r->stream));
    ok(cudaEventRecord(done, r->stream));
    bool told = r->argument == 1 && r->rank != 1;
    ncclResult_t error = ncclSuccess;
    for (double begin = seconds(); seconds() - begin < (told ? 30 : 0.5) && error == ncclSuccess;
         usleep(1000)) {
        check(cudaEventQuery(done) == cudaErrorNotReady);
        ok(ncclCommGetAsyncError(r->comm, &error));
    }
    check(error == (told ? ncclRemoteError : ncclSuccess));
    check(!told || strstr(ncclGetLastError(r->comm), "rank 1"));
    ok(ncclCommAbort(r->comm));
    ok(cudaEventSynchronize(done));
    ok(cudaStreamSynchronize(r->stream));
    float got;
    ok(cudaMemcpy(&got, p, 4, cudaMemcpyDeviceToHost));
    check(got != host[0] * (float)r->ranks);
    check(ncclAllReduce(p, p, 4, ncclFloat32, ncclSum, r->comm, r->stream) == ncclInvalidArgument);
    check(ncclCommGetAsyncError(r->comm, &error) == ncclInvalidArgument);
    check(ncclCommAbort(r->comm) == ncclInvalidArgument);
}

static void faults(void **state) {
    (void)state;
    all_well(3, run_fault, 2, true, 0);
    all_well(2, run_fault, 3, true, 1);
    struct ended e = on_ranks(3, run_fault, 2, true, 2);
    assert_true(e.status[0] == 0 && e.status[2] == 0);
    assert_true(WIFSIGNALED(e.status[1]) && WTERMSIG(e.status[1]) == SIGKILL);
}

/* A communicator that does not block while it waits for a rank which never comes. */
static void run_incomplete(struct rank *r) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t error;
    check(ncclCommInitRankConfig(&r->comm, 2, r->id, 0, &config) == ncclInProgress);
    ok(ncclCommGetAsyncError(r->comm, &error));
    check(error == ncclInProgress);
    ok(ncclCommAbort(r->comm));
}

static void incomplete(void **state) {
    (void)state;
    all_well(1, run_incomplete, 0, false, 0);
}

static void run_delays(struct rank *r) {
    setenv("EMULATOR_NCCL_DELAY_US", "3000", 1);
    join(r);
    each_collective(r, types[0], 1000, true);
    leave(r);
}

static void delays(void **state) {
    (void)state;
    for (uint64_t seed = 2; seed < 5; seed++)
        all_well(3, run_delays, seed, true, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(collectives),
        cmocka_unit_test(order_of_sums),
        cmocka_unit_test(groups),
        cmocka_unit_test(graphs),
        cmocka_unit_test(mismatches),
        cmocka_unit_test(refused),
        cmocka_unit_test(two_ranks_on_a_gpu),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(incomplete),
        cmocka_unit_test(faults),
        cmocka_unit_test(buffers_in_flight),
        cmocka_unit_test(delays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
