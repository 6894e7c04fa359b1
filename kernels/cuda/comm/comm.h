/* What the communicators of GPUs share: a queue of their own beside the device's, events between the two, and
 * the processes' communicator behind them, which carries all that is said in host memory. */
#ifndef IHA_KERNELS_CUDA_COMM_COMM_H
#define IHA_KERNELS_CUDA_COMM_COMM_H

#include "kernels/cuda/cuda.h"

enum { COMM_EVENTS = 1024 };

struct gpu_comm {
    struct comm base;
    struct comm *ranks; /* how the processes talk; the caller's */
    struct device *dev;
    cudaStream_t stream;
    cudaEvent_t ready;             /* how far the device's queue was at the last call of gpu_comm_follow */
    cudaEvent_t done[COMM_EVENTS]; /* of the last collectives; one queue, so a later one's will do as well */
    comm_event events;             /* handed out so far */
};

static inline struct gpu_comm *gpu_comm_of(struct comm *c) {
    return (struct gpu_comm *)c;
}

void gpu_comm_open(struct gpu_comm *g, struct device *dev, struct comm *ranks, const struct comm_ops *ops);
void gpu_comm_close(struct gpu_comm *g);

/* What is queued on g->stream from now on comes after all that the device's queue holds. */
void gpu_comm_follow(struct gpu_comm *g);
/* Mark what has been queued on g->stream; the device's queue waits for it in gpu_comm_wait. */
comm_event gpu_comm_mark(struct gpu_comm *g);
void gpu_comm_wait(struct comm *c, comm_event event);
void gpu_comm_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes);
void gpu_comm_abort_run(struct comm *c, const char *text);

/* NCCL, one rank a GPU; NULL and *e where that cannot be. Called by all ranks at once. */
extern "C" struct comm *comm_nccl_open(struct device *dev, struct comm *ranks, struct error *e);
/* Through host memory and `ranks`: slow, for ranks that share a GPU, and for machines without NCCL. */
struct comm *comm_staged_open(struct device *dev, struct comm *ranks, struct error *e);

#endif
