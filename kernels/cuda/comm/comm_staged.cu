/* Collectives on device memory through host memory: a copy out, the processes' own collective, a copy back.
 *
 * The host takes part, so it must run the collectives behind this in the same order on every rank. One that
 * is begun here is begun there when the next is begun, or when it is waited for: its copy out goes on in the
 * meantime, and the order follows from the calls alone, so ranks that are about to call different things wait
 * for everything first (model_await_params). */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/comm/comm_internal.h"
#include "kernels/cuda/comm/comm.h"
#include "kernels/cuda/comm/comm_sums.h"

enum { SMALL = 8 };

enum staged_state { STAGED_FREE, STAGED_COPYING, STAGED_MOVING, STAGED_DONE };

struct staged {
    enum staged_state state;
    comm_event event, inner; /* here, and of the processes' communicator */
    tensor buffer, piece;    /* on the device; piece absent: an all_gather */
    bool accumulate;
    cudaEvent_t out;         /* the copy out is over */
    cudaEvent_t back;        /* the copy back is */
    char *host, *host_piece; /* pinned: the whole buffer, and this rank's share of its sum */
};

struct staged_comm {
    struct gpu_comm g;
    struct staged slots[COMM_IN_FLIGHT];
    float *share; /* on the device: what is added to a piece */
    double *values;
    cudaEvent_t copied;
};

static struct staged_comm *staged_of(struct comm *c) {
    return (struct staged_comm *)c;
}

static tensor at(tensor like, char *host) {
    return tensor_of(host, like.dtype, tensor_count(like), 0, 0, 0, 0);
}

static size_t bytes_of(tensor t) {
    return (size_t)tensor_count(t) * dtype_bytes(t.dtype);
}

/* The copy out is over: give it to the processes' communicator. */
static void move(struct staged_comm *s, struct staged *t) {
    struct comm *ranks = s->g.ranks;
    if (t->state != STAGED_COPYING)
        return;
    cuda_host_wait(s->g.dev, t->out);
    t->inner = t->piece.data ? ranks->ops->reduce_scatter(ranks, at(t->buffer, t->host),
                                                          at(t->piece, t->host_piece), false)
                             : ranks->ops->all_gather(ranks, at(t->buffer, t->host));
    t->state = STAGED_MOVING;
}

/* Wait for the processes' collective, and queue the copy back. */
static void bring_back(struct staged_comm *s, struct staged *t) {
    struct comm *ranks = s->g.ranks;
    move(s, t);
    if (t->state != STAGED_MOVING)
        return;
    ranks->ops->wait(ranks, t->inner);
    bool adds = t->piece.data && t->accumulate;
    tensor to = t->piece.data ? t->piece : t->buffer;
    cuda_check(cudaMemcpyAsync(adds ? s->share : to.data, t->piece.data ? t->host_piece : t->host,
                               bytes_of(to), cudaMemcpyHostToDevice, s->g.stream));
    if (adds)
        add_to(s->g.stream, s->share, tensor_count(to), (float *)to.data);
    cuda_check(cudaEventRecord(t->back, s->g.stream));
    t->state = STAGED_DONE;
}

static comm_event begin(struct staged_comm *s, tensor buffer, tensor piece, bool accumulate) {
    struct staged *last = &s->slots[s->g.events % COMM_IN_FLIGHT];
    struct staged *t = &s->slots[(s->g.events + 1) % COMM_IN_FLIGHT];
    move(s, last);
    bring_back(s, t);
    gpu_comm_follow(&s->g);
    t->event = ++s->g.events;
    t->buffer = buffer;
    t->piece = piece;
    t->accumulate = accumulate;
    size_t share = bytes_of(buffer) / (size_t)s->g.base.ranks, own = share * (size_t)s->g.base.rank;
    if (piece.data)
        cuda_check(
            cudaMemcpyAsync(t->host, buffer.data, bytes_of(buffer), cudaMemcpyDeviceToHost, s->g.stream));
    else
        cuda_check(cudaMemcpyAsync(t->host + own, (char *)buffer.data + own, share, cudaMemcpyDeviceToHost,
                                   s->g.stream));
    cuda_check(cudaEventRecord(t->out, s->g.stream));
    t->state = STAGED_COPYING;
    return t->event;
}

static comm_event staged_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    return begin(staged_of(c), buffer, piece, accumulate);
}

static comm_event staged_all_gather(struct comm *c, tensor buffer) {
    return begin(staged_of(c), buffer, tensor_none(), false);
}

static void staged_wait(struct comm *c, comm_event event) {
    struct staged_comm *s = staged_of(c);
    for (struct staged &t : s->slots) {
        if (event == 0 || t.event != event)
            continue;
        bring_back(s, &t);
        cuda_check(cudaStreamWaitEvent(s->g.dev->stream, t.back, 0));
    }
    /* Of one that has made room for another the copy back is queued; the queue's order covers it. */
    if (event && event + COMM_IN_FLIGHT <= s->g.events) {
        cuda_check(cudaEventRecord(s->copied, s->g.stream));
        cuda_check(cudaStreamWaitEvent(s->g.dev->stream, s->copied, 0));
    }
}

static void staged_all_reduce(struct comm *c, double *values, int count) {
    struct staged_comm *s = staged_of(c);
    struct comm *ranks = s->g.ranks;
    size_t bytes = (size_t)count * sizeof *values;
    if (count > SMALL)
        abort();
    gpu_comm_follow(&s->g);
    cuda_check(cudaMemcpyAsync(s->values, values, bytes, cudaMemcpyDeviceToHost, s->g.stream));
    cuda_check(cudaEventRecord(s->copied, s->g.stream));
    cuda_host_wait(s->g.dev, s->copied);
    ranks->ops->all_reduce(ranks, s->values, count);
    cuda_check(cudaMemcpyAsync(values, s->values, bytes, cudaMemcpyHostToDevice, s->g.stream));
    cuda_check(cudaEventRecord(s->copied, s->g.stream));
    cuda_check(cudaStreamWaitEvent(s->g.dev->stream, s->copied, 0));
}

static void staged_progress(struct comm *c) {
    struct comm *ranks = staged_of(c)->g.ranks;
    ranks->ops->progress(ranks);
}

static void free_slot(struct staged *t) {
    for (char **memory : {&t->host, &t->host_piece})
        if (*memory) {
            cuda_check(cudaFreeHost(*memory));
            *memory = NULL;
        }
}

static int staged_reserve(struct comm *c, int64_t elements, enum dtype dtype, enum dtype wire,
                          struct error *e) {
    struct staged_comm *s = staged_of(c);
    size_t bytes = (size_t)elements * dtype_bytes(dtype), share = bytes / (size_t)c->ranks;
    for (struct staged &t : s->slots) {
        free_slot(&t);
        if (cudaMallocHost((void **)&t.host, bytes) != cudaSuccess ||
            cudaMallocHost((void **)&t.host_piece, share) != cudaSuccess)
            return fail_user(e, "no pinned host memory for messages between ranks (%zu bytes)",
                             bytes + share);
    }
    cuda_check(cudaFree(s->share));
    if (cudaMalloc((void **)&s->share, share) != cudaSuccess)
        return fail_user(e, "no GPU memory for messages between ranks (%zu bytes); lower train.micro_batch",
                         share);
    return s->g.ranks->ops->reserve(s->g.ranks, elements, dtype, wire, e);
}

static void staged_close(struct comm *c) {
    struct staged_comm *s = staged_of(c);
    for (struct staged &t : s->slots) {
        free_slot(&t);
        cuda_check(cudaEventDestroy(t.out));
        cuda_check(cudaEventDestroy(t.back));
    }
    cuda_check(cudaFree(s->share));
    cuda_check(cudaFreeHost(s->values));
    cuda_check(cudaEventDestroy(s->copied));
    gpu_comm_close(&s->g);
    free(s);
}

struct comm *comm_staged_open(struct device *dev, struct comm *ranks, struct error *e) {
    static const struct comm_ops any = {
        .close = staged_close,
        .abort_run = gpu_comm_abort_run,
        .reserve = staged_reserve,
        .reduce_scatter = staged_reduce_scatter,
        .all_gather = staged_all_gather,
        .all_reduce = staged_all_reduce,
        .wait = staged_wait,
        .progress = staged_progress,
        .all_gather_host = gpu_comm_all_gather_host,
    };
    static struct comm_ops ops;
    static char name[64];
    struct staged_comm *s = (struct staged_comm *)calloc(1, sizeof *s);
    if (!s) {
        fail_run(e, "out of memory for messages between ranks");
        return NULL;
    }
    ops = any;
    snprintf(name, sizeof name, "%s through host memory", ranks->ops->name);
    ops.name = name;
    gpu_comm_open(&s->g, dev, ranks, &ops);
    cuda_check(cudaEventCreateWithFlags(&s->copied, cudaEventDisableTiming));
    cuda_check(cudaMallocHost((void **)&s->values, SMALL * sizeof *s->values));
    for (struct staged &t : s->slots) {
        cuda_check(cudaEventCreateWithFlags(&t.out, cudaEventDisableTiming));
        cuda_check(cudaEventCreateWithFlags(&t.back, cudaEventDisableTiming));
    }
    return &s->g.base;
}
