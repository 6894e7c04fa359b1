/* Communicators for ranks with GPUs: the choice of one, and what they share. */
#include "kernels/cuda/comm/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the communication stream ---- */

void gpu_comm_open(struct gpu_comm *g, struct device *dev, struct comm *ranks, const struct comm_ops *ops) {
    int least, greatest;
    g->base = *ranks;
    g->base.ops = ops;
    g->ranks = ranks;
    g->dev = dev;
    /* Other ranks wait for a message to complete, while the model's kernels can run on fewer SMs
     * meanwhile: so communication has the higher priority. */
    cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    cuda_check(cudaStreamCreateWithPriority(&g->stream, cudaStreamNonBlocking, greatest));
    cuda_check(cudaEventCreateWithFlags(&g->ready, cudaEventDisableTiming));
    for (cudaEvent_t &event : g->done)
        cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
}

void gpu_comm_close(struct gpu_comm *g) {
    for (cudaEvent_t event : g->done)
        cuda_check(cudaEventDestroy(event));
    cuda_check(cudaEventDestroy(g->ready));
    cuda_check(cudaStreamDestroy(g->stream));
}

void gpu_comm_wait_device(struct gpu_comm *g) {
    cuda_check(cudaEventRecord(g->ready, g->dev->stream));
    cuda_check(cudaStreamWaitEvent(g->stream, g->ready, 0));
}

comm_event gpu_comm_record(struct gpu_comm *g) {
    g->events++;
    cuda_check(cudaEventRecord(g->done[g->events % COMM_EVENTS], g->stream));
    return g->events;
}

void gpu_comm_wait(struct comm *c, comm_event event) {
    struct gpu_comm *g = gpu_comm_of(c);
    if (event)
        cuda_check(cudaStreamWaitEvent(g->dev->stream, g->done[event % COMM_EVENTS], 0));
}

void gpu_comm_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes) {
    struct comm *ranks = gpu_comm_of(c)->ranks;
    ranks->ops->all_gather_host(ranks, mine, all, bytes);
}

void gpu_comm_abort_run(struct comm *c, const char *text) {
    struct comm *ranks = gpu_comm_of(c)->ranks;
    ranks->ops->abort_run(ranks, text);
}

/* ---- choosing a communicator ---- */

/* Whether every rank has a GPU to itself; sets the number of ranks that share this one. Device indices do not
 * tell, because every rank may see its own GPU as number 0; UUIDs do. */
static bool gpus_are_exclusive(struct device *dev, struct comm *ranks) {
    struct cudaDeviceProp p;
    bool exclusive = true;
    cuda_check(cudaGetDeviceProperties(&p, dev->index));
    const cudaUUID_t *all = (const cudaUUID_t *)comm_all_gather_small(ranks, &p.uuid, sizeof p.uuid);
    dev->sharers = 0;
    for (int r = 0; r < ranks->ranks; r++) {
        dev->sharers += memcmp(&all[r], &p.uuid, sizeof *all) == 0;
        for (int other = 0; other < r; other++)
            exclusive = exclusive && memcmp(&all[r], &all[other], sizeof *all) != 0;
    }
    return exclusive;
}

/* Of comm_nccl.cu, which needs the most. */
size_t cuda_staging_bytes(struct device *dev, int64_t elements, int ranks, enum dtype dtype,
                          enum dtype wire) {
    if (wire == DTYPE_BF16)
        return 2 * (size_t)elements * sizeof(bf16); /* sent and received */
    return (size_t)(dev->deterministic ? elements : elements / ranks) * dtype_bytes(dtype);
}

struct comm *cuda_open_comm(struct device *dev, struct comm *ranks, enum comm_backend how, struct error *e) {
    bool exclusive = gpus_are_exclusive(dev, ranks);
    if (how == COMM_BACKEND_NCCL && !exclusive) {
        fail_user(
            e, "system.comm = nccl needs a GPU for every rank, and here ranks share one; start fewer ranks "
               "per machine, or use auto");
        return NULL;
    }
#ifdef WITH_NCCL
    if (how == COMM_BACKEND_NCCL || (how == COMM_BACKEND_AUTO && exclusive))
        return comm_nccl_open(dev, ranks, e);
#else
    if (how == COMM_BACKEND_NCCL) {
        fail_user(e,
                  "system.comm = nccl, but this program was built without NCCL; use auto, or install it and "
                  "build again");
        return NULL;
    }
#endif
    return comm_staged_open(dev, ranks, e);
}
