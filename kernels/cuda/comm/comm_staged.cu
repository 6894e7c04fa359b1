/* Collectives on device memory staged through host memory: a copy to the host, the processes' collective
 * there, a copy back.
 *
 * The host must start the processes' collectives in the same order on every rank. It starts one when the
 * next one is called, or when it is waited for; until then its copy to the host can run. So the order
 * depends on the sequence of calls alone, and ranks that are about to make different calls must first wait
 * for all events (model_await_params). */
#include <stdio.h>
#include <stdlib.h>

#include "kernels/comm/comm_p2p.h"
#include "kernels/cuda/comm/comm.h"
#include "kernels/cuda/comm/comm_sums.h"

enum { MAX_REDUCED = 8 /* doubles in an all_reduce */ };

enum staged_state { STAGED_FREE, STAGED_TO_HOST, STAGED_COLLECTIVE, STAGED_TO_DEVICE };

struct staged {
    enum staged_state state;
    comm_event event, inner; /* this communicator's, and the processes' */
    tensor buffer, piece;    /* on the device; piece.data NULL: an all_gather */
    bool accumulate;
    cudaEvent_t to_host, to_device; /* after the copies */
    char *host, *host_piece;        /* pinned: the whole buffer, and this rank's share of its sum */
};

struct staged_comm {
    struct gpu_comm g;
    struct staged slots[COMM_IN_FLIGHT];
    float *share; /* on the device: a sum to be added to a piece */
    double *values;
    cudaEvent_t copied;
};

static struct staged_comm *staged_of(struct comm *c) {
    return (struct staged_comm *)c;
}

static tensor on_host(tensor like, char *host) {
    return tensor_of(host, like.dtype, tensor_count(like), 0, 0, 0, 0);
}

static size_t bytes_of(tensor t) {
    return (size_t)tensor_count(t) * dtype_bytes(t.dtype);
}

/* Wait for the copy to the host, and start the processes' collective. */
static void start_collective(struct staged_comm *s, struct staged *t) {
    struct comm *ranks = s->g.ranks;
    if (t->state != STAGED_TO_HOST)
        return;
    cuda_host_wait(s->g.dev, t->to_host);
    t->inner = t->piece.data ? ranks->ops->reduce_scatter(ranks, on_host(t->buffer, t->host),
                                                          on_host(t->piece, t->host_piece), false)
                             : ranks->ops->all_gather(ranks, on_host(t->buffer, t->host));
    t->state = STAGED_COLLECTIVE;
}

/* Wait for the processes' collective, and queue the copy to the device. */
static void copy_to_device(struct staged_comm *s, struct staged *t) {
    struct comm *ranks = s->g.ranks;
    start_collective(s, t);
    if (t->state != STAGED_COLLECTIVE)
        return;
    ranks->ops->wait(ranks, t->inner);
    bool adds = t->piece.data && t->accumulate;
    tensor to = t->piece.data ? t->piece : t->buffer;
    cuda_check(cudaMemcpyAsync(adds ? s->share : to.data, t->piece.data ? t->host_piece : t->host,
                               bytes_of(to), cudaMemcpyHostToDevice, s->g.stream));
    if (adds)
        comm_add_to(s->g.stream, s->share, tensor_count(to), (float *)to.data);
    cuda_check(cudaEventRecord(t->to_device, s->g.stream));
    t->state = STAGED_TO_DEVICE;
}

static comm_event copy_to_host(struct staged_comm *s, tensor buffer, tensor piece, bool accumulate) {
    struct staged *last = &s->slots[s->g.events % COMM_IN_FLIGHT];
    struct staged *t = &s->slots[(s->g.events + 1) % COMM_IN_FLIGHT];
    start_collective(s, last);
    copy_to_device(s, t);
    gpu_comm_wait_device(&s->g);
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
    cuda_check(cudaEventRecord(t->to_host, s->g.stream));
    t->state = STAGED_TO_HOST;
    return t->event;
}

static comm_event staged_reduce_scatter(struct comm *c, tensor buffer, tensor piece, bool accumulate) {
    return copy_to_host(staged_of(c), buffer, piece, accumulate);
}

static comm_event staged_all_gather(struct comm *c, tensor buffer) {
    return copy_to_host(staged_of(c), buffer, tensor_none(), false);
}

static void staged_wait(struct comm *c, comm_event event) {
    struct staged_comm *s = staged_of(c);
    for (struct staged &t : s->slots) {
        if (event == 0 || t.event != event)
            continue;
        copy_to_device(s, &t);
        cuda_check(cudaStreamWaitEvent(s->g.dev->stream, t.to_device, 0));
    }
    /* The slot is reused, so the copy to the device is already queued on the stream. */
    if (event && event + COMM_IN_FLIGHT <= s->g.events) {
        cuda_check(cudaEventRecord(s->copied, s->g.stream));
        cuda_check(cudaStreamWaitEvent(s->g.dev->stream, s->copied, 0));
    }
}

static void staged_all_reduce(struct comm *c, double *values, int count) {
    struct staged_comm *s = staged_of(c);
    struct comm *ranks = s->g.ranks;
    size_t bytes = (size_t)count * sizeof *values;
    if (count > MAX_REDUCED)
        abort();
    gpu_comm_wait_device(&s->g);
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
        cuda_check(cudaEventDestroy(t.to_host));
        cuda_check(cudaEventDestroy(t.to_device));
    }
    cuda_check(cudaFree(s->share));
    cuda_check(cudaFreeHost(s->values));
    cuda_check(cudaEventDestroy(s->copied));
    gpu_comm_close(&s->g);
    free(s);
}

struct comm *comm_staged_open(struct device *dev, struct comm *ranks, struct error *e) {
    static const struct comm_ops common_ops = {
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
    ops = common_ops;
    snprintf(name, sizeof name, "%s through host memory", ranks->ops->name);
    ops.name = name;
    gpu_comm_open(&s->g, dev, ranks, &ops);
    cuda_check(cudaEventCreateWithFlags(&s->copied, cudaEventDisableTiming));
    cuda_check(cudaMallocHost((void **)&s->values, MAX_REDUCED * sizeof *s->values));
    for (struct staged &t : s->slots) {
        cuda_check(cudaEventCreateWithFlags(&t.to_host, cudaEventDisableTiming));
        cuda_check(cudaEventCreateWithFlags(&t.to_device, cudaEventDisableTiming));
    }
    return &s->g.base;
}
