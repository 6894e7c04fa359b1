/* The emulator's NCCL, between processes of one machine: its calls. Only sums, and one stream per group.
 *
 * These errors abort with a message: ranks that call different operations, buffers that are not device
 * memory, and buffers that are written while an operation is in flight. Others are returned, as NCCL does. */
#include "tests/cuda/emulator/nccl.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include <map>
#include <mutex>

static struct calls {
    std::mutex mutex;
    std::vector<ncclComm_t> communicators; /* never freed, so that calls on a destroyed one are detected */
    struct group {
        int depth;
        ncclResult_t result;
        std::map<ncclComm_t, std::vector<struct nccl_op>> ops;
        std::map<ncclComm_t, cudaStream_t> streams;
    };
    std::map<pthread_t, struct group> groups;
    std::string last_error;
} &C = *new struct calls();

typedef std::lock_guard<std::mutex> guard;

static ncclResult_t fail_with(ncclResult_t result, const std::string &why) {
    guard lock(C.mutex);
    C.last_error = why;
    return result;
}

static bool alive(ncclComm_t c) {
    guard lock(C.mutex);
    for (ncclComm_t known : C.communicators)
        if (known == c)
            return !c->aborted && !c->closed;
    return false;
}

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
    static const char *const texts[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "NCCL operation in progress"};
    return result >= 0 && (size_t)result < sizeof texts / sizeof *texts ? texts[result]
                                                                        : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t) {
    guard lock(C.mutex);
    return C.last_error.c_str();
}

/* ---- communicators ---- */

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    std::string name = nccl_shared_create();
    if (name.empty())
        return fail_with(ncclSystemError, std::string("cannot create shared memory: ") + strerror(errno));
    memset(id, 0, sizeof *id);
    memcpy(id->internal, name.c_str(), name.size());
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    if (ranks < 1 || ranks > NCCL_MAX_RANKS || rank < 0 || rank >= ranks)
        return fail_with(ncclInvalidArgument, "rank " + std::to_string(rank) + " of " +
                                                  std::to_string(ranks) + ": there are 1 to " +
                                                  std::to_string((int)NCCL_MAX_RANKS) + " ranks");
    if (emulator_gpu.count == 0)
        return fail_with(ncclUnhandledCudaError, "no GPU");
    int device;
    cudaGetDevice(&device);
    std::string why;
    struct nccl_shared *shared = nccl_shared_join(id.internal, ranks, rank, device, &why);
    if (!shared)
        return fail_with(ncclInvalidArgument, why);
    ncclComm_t c = new ncclComm();
    c->shared = shared;
    c->rank = rank;
    c->ranks = ranks;
    {
        guard lock(C.mutex);
        C.communicators.push_back(c);
    }
    *out = c;
    if (config && config->blocking == 0)
        return ncclInProgress;
    int complete;
    while ((complete = nccl_shared_complete(shared)) == 0)
        usleep(200);
    if (complete < 0) {
        c->closed = true;
        return complete == -1 ? fail_with(ncclInternalError, "a rank that joined did not fit")
                              : fail_with(ncclInvalidUsage, "duplicate GPU: two ranks are on the same one");
    }
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *c, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(c, ranks, id, rank, nullptr);
}

ncclResult_t ncclCommCount(const ncclComm_t c, int *count) {
    if (!alive(c))
        return fail_with(ncclInvalidArgument, "no communicator");
    *count = c->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) {
    if (!alive(c))
        return fail_with(ncclInvalidArgument, "no communicator");
    *rank = c->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    if (!alive(c))
        return fail_with(ncclInvalidArgument, "no communicator");
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int complete = nccl_shared_complete(c->shared), broken = c->shared->broken;
    bool seen = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec >= c->shared->broken_seen_ns;
    *error = complete == -1                                 ? ncclInternalError
             : complete == -2                               ? ncclInvalidUsage
             : complete == 0                                ? ncclInProgress
             : broken != 0 && broken != 1 + c->rank && seen ? ncclRemoteError
                                                            : ncclSuccess;
    if (*error == ncclRemoteError)
        fail_with(*error, "connection to rank " + std::to_string(broken - 1) + " broken");
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t c) {
    if (!alive(c))
        return fail_with(ncclInvalidArgument, "no communicator");
    if (emulator_chain_in_graphs(&c->chain) > 0)
        return fail_with(ncclInvalidUsage,
                         "a graph still holds the communicator: NCCL would wait until it is destroyed");
    emulator_wait_chain(&c->chain);
    c->closed = true;
    return ncclSuccess;
}

/* Also allowed after ncclCommFinalize. */
ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (alive(c))
        ncclCommFinalize(c);
    guard lock(C.mutex);
    for (ncclComm_t known : C.communicators)
        if (known == c && c->shared && !c->aborted) {
            nccl_shared_leave(c->shared);
            c->shared = nullptr;
            return ncclSuccess;
        }
    C.last_error = "no communicator";
    return ncclInvalidArgument;
}

/* The shared memory stays mapped: an operation of this communicator may be running. */
ncclResult_t ncclCommAbort(ncclComm_t c) {
    if (!alive(c))
        return fail_with(ncclInvalidArgument, "no communicator");
    c->aborted = true;
    nccl_shared_abandon(c->shared);
    return ncclSuccess;
}

/* ---- operations ---- */

static ncclResult_t enqueue(ncclComm_t c, cudaStream_t stream, std::vector<struct nccl_op> ops) {
    if (emulator_enqueue_steps(stream, nccl_task(c, std::move(ops)), &c->chain) != cudaSuccess)
        return fail_with(ncclUnhandledCudaError, "the operation cannot be queued on the stream");
    return ncclSuccess;
}

static ncclResult_t submit(ncclComm_t c, cudaStream_t stream, ncclRedOp_t sum, struct nccl_op op) {
    if (!alive(c))
        return fail_with(ncclInvalidArgument, "no communicator, or one that was aborted or destroyed");
    if (nccl_shared_complete(c->shared) != 1)
        return fail_with(ncclInvalidUsage, "the communicator is not complete yet");
    if (sum != ncclSum || nccl_type_bytes(op.type) == 0)
        return fail_with(ncclInvalidArgument, "the emulator only supports sums, and not every type");
    if (op.peer < 0 || op.peer >= c->ranks)
        return fail_with(ncclInvalidArgument, "there is no rank " + std::to_string(op.peer));
    emulator_check_device(op.send, nccl_send_bytes(op, c), nccl_kind_name(op.kind));
    emulator_check_device(op.recv, nccl_recv_bytes(op, c), nccl_kind_name(op.kind));
    {
        guard lock(C.mutex);
        auto found = C.groups.find(pthread_self());
        if (found != C.groups.end()) {
            struct calls::group &g = found->second;
            if (g.ops.count(c) && g.streams[c] != stream)
                emulator_fail("calls of one group on several streams: the emulator supports one");
            g.ops[c].push_back(op);
            g.streams[c] = stream;
            return ncclSuccess;
        }
    }
    return enqueue(c, stream, {op});
}

ncclResult_t ncclGroupStart() {
    guard lock(C.mutex);
    C.groups[pthread_self()].depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    struct calls::group g;
    {
        guard lock(C.mutex);
        auto found = C.groups.find(pthread_self());
        if (found == C.groups.end())
            return ncclInvalidUsage;
        if (--found->second.depth > 0)
            return ncclSuccess;
        g = std::move(found->second);
        C.groups.erase(found);
    }
    ncclResult_t result = ncclSuccess;
    for (auto &[c, ops] : g.ops) {
        ncclResult_t each = enqueue(c, g.streams[c], std::move(ops));
        result = result == ncclSuccess ? each : result;
    }
    return result;
}

ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t sum, ncclComm_t c, cudaStream_t stream) {
    return submit(c, stream, sum, {REDUCE_SCATTER, (const char *)send, (char *)recv, count, type, 0});
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t stream) {
    return submit(c, stream, ncclSum, {ALL_GATHER, (const char *)send, (char *)recv, count, type, 0});
}

ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t sum,
                           ncclComm_t c, cudaStream_t stream) {
    return submit(c, stream, sum, {ALL_REDUCE, (const char *)send, (char *)recv, count, type, 0});
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root,
                           ncclComm_t c, cudaStream_t stream) {
    return submit(c, stream, ncclSum, {BROADCAST, (const char *)send, (char *)recv, count, type, root});
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream) {
    return submit(c, stream, ncclSum, {SEND, (const char *)send, nullptr, count, type, peer});
}

ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream) {
    return submit(c, stream, ncclSum, {RECV, nullptr, (char *)recv, count, type, peer});
}
