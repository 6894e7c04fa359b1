/* What the communicators of GPUs share: a communication stream beside the device's stream, events between the
 * two, and the processes' communicator for everything in host memory. */
#ifndef IHA_KERNELS_CUDA_COMM_COMM_H
#define IHA_KERNELS_CUDA_COMM_COMM_H

#include "kernels/cuda/cuda.h"

enum { COMM_EVENTS = 1024 };

struct gpu_comm {
    struct comm base;
    struct comm *ranks; /* the communicator of the processes; owned by the caller */
    struct device *dev;
    cudaStream_t stream;
    cudaEvent_t ready; /* in the device's stream, at the last gpu_comm_wait_device */
    cudaEvent_t
        done[COMM_EVENTS]; /* of the last collectives; waiting for a reused, later one is correct too */
    comm_event events;     /* so far */
};

static inline struct gpu_comm *gpu_comm_of(struct comm *c) {
    return (struct gpu_comm *)c;
}

void gpu_comm_open(struct gpu_comm *g, struct device *dev, struct comm *ranks, const struct comm_ops *ops);
void gpu_comm_close(struct gpu_comm *g);

/* Work queued on g->stream from now on waits for all work in the device's stream. */
void gpu_comm_wait_device(struct gpu_comm *g);
/* An event for the work queued on g->stream so far; gpu_comm_wait makes the device's stream wait for it. */
comm_event gpu_comm_record(struct gpu_comm *g);
void gpu_comm_wait(struct comm *c, comm_event event);
void gpu_comm_all_gather_host(struct comm *c, const void *mine, void *all, size_t bytes);
void gpu_comm_abort_run(struct comm *c, const char *text);

/* NCCL, for ranks with a GPU each. NULL and *e: NCCL fails. Called by all ranks. */
extern "C" struct comm *comm_nccl_open(struct device *dev, struct comm *ranks, struct error *e);
/* Staged through host memory and `ranks`: slow; for ranks that share a GPU, and for builds without NCCL. */
struct comm *comm_staged_open(struct device *dev, struct comm *ranks, struct error *e);

#endif
