/* How the emulator's NCCL transfers data: every rank sends each other rank what it needs, and each adds up
 * for itself.
 *
 * A message begins with a header of its sender's operation; a receiver that runs a different one aborts. Sums
 * are taken in the order of a ring: rank r's part of the result is summed from rank r + 1 on, around to r.
 *
 * While a task is in flight, nothing else may use its buffers: its receive buffer is filled with 0xff (NaN)
 * when it begins and written when it ends, and checksums detect writes to its send and receive buffers
 * meanwhile.
 *
 * Faults are injected by the environment: EMULATOR_NCCL_FAULT="rank:operation:kind" stops that rank at the
 * operation of that number (counted from 0 over all communicators, as they begin):
 *
 *   hang    the operation never runs
 *   error   the same, and ncclCommGetAsyncError of the other ranks returns ncclRemoteError a little later
 *   die     the process kills itself
 *
 * EMULATOR_NCCL_DELAY_US: the longest time that a task waits between beginning and sending. */
#include "tests/cuda/emulator/nccl.h"

#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ns() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- shapes ---- */

size_t nccl_type_bytes(ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8:
        return 1;
    case ncclBfloat16:
        return 2;
    case ncclInt32:
    case ncclFloat32:
        return 4;
    case ncclInt64:
    case ncclFloat64:
        return 8;
    default:
        return 0;
    }
}

const char *nccl_kind_name(enum nccl_kind kind) {
    static const char *const names[] = {"ncclReduceScatter", "ncclAllGather", "ncclAllReduce",
                                        "ncclBroadcast",     "ncclSend",      "ncclRecv"};
    return names[kind];
}

size_t nccl_send_bytes(const struct nccl_op &op, const struct ncclComm *c) {
    bool sends = op.kind != RECV && (op.kind != BROADCAST || op.peer == c->rank);
    size_t shares = op.kind == REDUCE_SCATTER ? (size_t)c->ranks : 1;
    return sends ? shares * op.count * nccl_type_bytes(op.type) : 0;
}

size_t nccl_recv_bytes(const struct nccl_op &op, const struct ncclComm *c) {
    size_t shares = op.kind == ALL_GATHER ? (size_t)c->ranks : 1;
    return op.kind == SEND ? 0 : shares * op.count * nccl_type_bytes(op.type);
}

/* ---- sums ---- */

template <typename T> static void add(void *sum, const void *more, size_t n) {
    for (size_t i = 0; i < n; i++) {
        T a, b;
        memcpy(&a, (const char *)sum + i * sizeof a, sizeof a);
        memcpy(&b, (const char *)more + i * sizeof b, sizeof b);
        if constexpr (std::is_same_v<T, __nv_bfloat16>)
            a = __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
        else
            a = (T)(a + b);
        memcpy((char *)sum + i * sizeof a, &a, sizeof a);
    }
}

static void add_typed(void *sum, const void *more, size_t n, ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8: /* the same bits */
        return add<uint8_t>(sum, more, n);
    case ncclInt32:
        return add<uint32_t>(sum, more, n);
    case ncclInt64:
        return add<uint64_t>(sum, more, n);
    case ncclBfloat16:
        return add<__nv_bfloat16>(sum, more, n);
    case ncclFloat32:
        return add<float>(sum, more, n);
    default:
        return add<double>(sum, more, n);
    }
}

/* out [n] = the sum of the ranks' elements [first, first + n), in the order of a ring that ends at owner. */
static void sum_ring(char *out, const std::vector<const char *> &from, int owner, size_t first, size_t n,
                     ncclDataType_t type) {
    size_t ranks = from.size(), bytes = nccl_type_bytes(type);
    memcpy(out, from[((size_t)owner + 1) % ranks] + first * bytes, n * bytes);
    for (size_t i = 2; i <= ranks; i++)
        add_typed(out, from[((size_t)owner + i) % ranks] + first * bytes, n, type);
}

/* ---- faults ---- */

static uint64_t operations; /* begun by this process */

/* Apply the fault that the environment asks for; returns whether it stops these operations. */
static bool inject_fault(struct ncclComm *c, size_t ops) {
    const char *text = getenv("EMULATOR_NCCL_FAULT");
    int rank;
    unsigned long long at;
    char kind[8] = "";
    uint64_t first = operations;
    operations += ops;
    if (!text)
        return false;
    if (sscanf(text, "%d:%llu:%7s", &rank, &at, kind) != 3)
        emulator_fail("EMULATOR_NCCL_FAULT=%s is not rank:operation:kind", text);
    if (rank != c->rank || at < first || at >= operations)
        return false;
    if (strcmp(kind, "die") == 0) {
        kill(getpid(), SIGKILL);
    } else if (strcmp(kind, "error") == 0) {
        c->shared->broken_seen_ns = now_ns() + 100000000;
        c->shared->broken = 1 + c->rank;
    } else if (strcmp(kind, "hang") != 0) {
        emulator_fail("EMULATOR_NCCL_FAULT=%s: the kind must be hang, error or die", text);
    }
    return true;
}

static int64_t delay_ns() {
    const char *text = getenv("EMULATOR_NCCL_DELAY_US");
    return text && atoi(text) > 0 ? (int64_t)emulator_random((uint64_t)atoi(text) + 1) * 1000 : 0;
}

/* ---- tasks ---- */

/* At the beginning of every message. */
struct header {
    uint64_t number; /* of the collective; 0 for ncclSend */
    uint64_t count;
    int kind, type, root, unused;
};

struct message {
    int peer;
    bool out;
    struct header header, received;
    char *data;
    size_t bytes, moved; /* of the data; transferred so far, header included */
};

struct range {
    const char *data;
    size_t bytes;
    uint64_t checksum;
};

struct task {
    struct ncclComm *comm;
    std::vector<struct nccl_op> ops;
    bool begun, stopped;
    int64_t send_ns;
    std::vector<struct message> messages;
    std::vector<std::vector<char>> received; /* of each operation: [ranks, count], by rank */
    std::vector<struct range> buffers;       /* each operation's send and recv */
};

static uint64_t checksum(const char *data, size_t bytes) {
    uint64_t sum = 0xcbf29ce484222325u, word = 0;
    for (size_t i = 0; i < bytes; i += 8) {
        word = 0;
        memcpy(&word, data + i, bytes - i < 8 ? bytes - i : 8);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 29;
    }
    return sum;
}

/* Fill the receive buffer with 0xff, except where it overlaps the send buffer (in-place operations). */
static void poison_received(const struct nccl_op &op, const struct ncclComm *c) {
    char *recv = op.recv, *end = recv + nccl_recv_bytes(op, c);
    const char *send = op.send, *send_end = send + nccl_send_bytes(op, c);
    if (recv == end)
        return;
    if (send == send_end || send_end <= recv || send >= end) {
        memset(recv, 0xff, (size_t)(end - recv));
        return;
    }
    if (send > recv)
        memset(recv, 0xff, (size_t)(send - recv));
    if (send_end < end)
        memset(end - (end - send_end), 0xff, (size_t)(end - send_end));
}

static void plan_messages(struct task *t, const struct nccl_op &op, std::vector<char> *received) {
    struct ncclComm *c = t->comm;
    size_t bytes = op.count * nccl_type_bytes(op.type);
    bool collective = op.kind != SEND && op.kind != RECV;
    struct header header = {collective ? c->collectives++ : 0, op.count,
                            op.kind == RECV ? SEND : op.kind,  op.type,
                            collective ? op.peer : 0,          0};
    received->resize(nccl_recv_bytes(op, c) == 0 ? 0 : (size_t)c->ranks * bytes);
    for (int r = 0; r < c->ranks; r++) {
        bool other = collective && r != c->rank, broadcast = op.kind == BROADCAST;
        char *share = (char *)op.send + (op.kind == REDUCE_SCATTER ? (size_t)r * bytes : 0);
        /* In a broadcast all ranks send a header to all, so that ranks with different roots detect it. */
        if (other || (op.kind == SEND && r == op.peer))
            t->messages.push_back(
                {r, true, header, {}, share, broadcast && op.peer != c->rank ? 0 : bytes, 0});
        if (other || (op.kind == RECV && r == op.peer))
            t->messages.push_back({r,
                                   false,
                                   header,
                                   {},
                                   received->data() + (size_t)r * bytes,
                                   broadcast && op.peer != r ? 0 : bytes,
                                   0});
    }
}

static void begin(struct task *t) {
    t->begun = true;
    t->stopped = inject_fault(t->comm, t->ops.size());
    t->send_ns = now_ns() + delay_ns();
    t->messages.clear();
    t->buffers.clear();
    t->received.assign(t->ops.size(), {});
    for (size_t i = 0; i < t->ops.size(); i++) {
        plan_messages(t, t->ops[i], &t->received[i]);
        poison_received(t->ops[i], t->comm);
    }
    for (const struct nccl_op &op : t->ops) {
        size_t sent = nccl_send_bytes(op, t->comm), received = nccl_recv_bytes(op, t->comm);
        t->buffers.push_back({op.send, sent, checksum(op.send, sent)});
        t->buffers.push_back({op.recv, received, checksum(op.recv, received)});
    }
}

static std::string describe(const struct header &h) {
    char text[160];
    snprintf(text, sizeof text, "%s of %llu elements of type %d, root %d, collective number %llu",
             h.kind >= REDUCE_SCATTER && h.kind <= RECV ? nccl_kind_name((enum nccl_kind)h.kind) : "?",
             (unsigned long long)h.count, h.type, h.root, (unsigned long long)h.number);
    return text;
}

/* Transfer as much of a message as possible now. Returns whether it is complete. */
static bool transfer(struct ncclComm *c, struct message *m) {
    struct nccl_pipe *pipe =
        m->out ? &c->shared->pipes[c->rank][m->peer] : &c->shared->pipes[m->peer][c->rank];
    size_t head = sizeof m->header;
    if (m->moved < head) {
        m->moved += m->out ? nccl_pipe_write(pipe, (char *)&m->header + m->moved, head - m->moved)
                           : nccl_pipe_read(pipe, (char *)&m->received + m->moved, head - m->moved);
        if (m->moved < head)
            return false;
        if (!m->out && memcmp(&m->received, &m->header, head) != 0)
            emulator_fail("ranks do not agree: rank %d calls %s; rank %d calls %s", c->rank,
                          describe(m->header).c_str(), m->peer, describe(m->received).c_str());
    }
    char *data = m->data + (m->moved - head);
    size_t left = m->bytes - (m->moved - head);
    m->moved += m->out ? nccl_pipe_write(pipe, data, left) : nccl_pipe_read(pipe, data, left);
    return m->moved == head + m->bytes;
}

/* Messages to one rank, and from one rank, are transferred one after the other. */
static bool transfer_all(struct task *t) {
    bool waits[2][NCCL_MAX_RANKS] = {}, all = true;
    for (struct message &m : t->messages)
        if (!waits[m.out][m.peer] && m.moved < sizeof m.header + m.bytes)
            all &= !(waits[m.out][m.peer] = !transfer(t->comm, &m));
    return all;
}

static void write_results(const struct task *t, const struct nccl_op &op, const std::vector<char> &received) {
    const struct ncclComm *c = t->comm;
    size_t bytes = op.count * nccl_type_bytes(op.type), rank = (size_t)c->rank, ranks = (size_t)c->ranks;
    std::vector<const char *> from(ranks);
    for (size_t r = 0; r < ranks; r++)
        from[r] = received.data() + r * bytes;
    std::vector<char> out(nccl_recv_bytes(op, c));
    switch (op.kind) {
    case REDUCE_SCATTER:
        from[rank] = op.send + rank * bytes;
        sum_ring(out.data(), from, c->rank, 0, op.count, op.type);
        break;
    case ALL_REDUCE: /* each part as reduce_scatter would sum it, so that all ranks get the same bits */
        from[rank] = op.send;
        for (size_t r = 0; r < ranks; r++) {
            size_t first = op.count * r / ranks, end = op.count * (r + 1) / ranks;
            sum_ring(out.data() + first * nccl_type_bytes(op.type), from, (int)r, first, end - first,
                     op.type);
        }
        break;
    case ALL_GATHER:
        from[rank] = op.send;
        for (size_t r = 0; r < ranks; r++)
            memcpy(out.data() + r * bytes, from[r], bytes);
        break;
    case BROADCAST:
        memcpy(out.data(), op.peer == c->rank ? op.send : from[(size_t)op.peer], bytes);
        break;
    case RECV:
        memcpy(out.data(), from[(size_t)op.peer], bytes);
        break;
    case SEND:
        break;
    }
    memcpy(op.recv, out.data(), out.size());
}

static void end(struct task *t) {
    for (size_t i = 0; i < t->buffers.size(); i++)
        if (checksum(t->buffers[i].data, t->buffers[i].bytes) != t->buffers[i].checksum)
            emulator_fail(
                "rank %d: the buffer that %s %s was written by something else while it was in flight; "
                "that has to wait for the collective, or the collective for that",
                t->comm->rank, nccl_kind_name(t->ops[i / 2].kind), i % 2 ? "receives" : "sends");
    for (size_t i = 0; i < t->ops.size(); i++)
        write_results(t, t->ops[i], t->received[i]);
}

emulator_step nccl_task(struct ncclComm *comm, std::vector<struct nccl_op> ops) {
    auto t = std::make_shared<struct task>();
    t->comm = comm;
    t->ops = std::move(ops);
    return [t] {
        emulator_running_name = nccl_kind_name(t->ops[0].kind);
        if (t->comm->aborted)
            return true;
        if (t->comm->closed)
            emulator_fail("rank %d: runs after its communicator was destroyed", t->comm->rank);
        if (!t->begun)
            begin(t.get());
        if (t->stopped || now_ns() < t->send_ns || !transfer_all(t.get()))
            return false;
        end(t.get());
        t->begun = false;
        return true;
    };
}
