/* Collectives between ranks. Implementations: point-to-point messages over MPI or TCP for host memory
 * (kernels/comm/comm_p2p.c), NCCL or staging through host memory for GPUs (kernels/cuda/comm/), and no-ops
 * for a single process.
 *
 * A rank is one process with one device. Every rank calls the same collectives in the same order. Those on
 * tensors are asynchronous: they return an event, and their buffers must not be touched until a wait on that
 * event returns. Sums are taken in rank order, so every rank, and every run on the same number of ranks, gets
 * the same bits. The exception is fp32 over NCCL without system.deterministic, where NCCL chooses the order.
 *
 * A rank that dies or hangs must not leave the others waiting: a rank that waits for another longer than
 * system.peer_timeout aborts the whole run, exit code 1, with a line that names that rank. So collectives
 * return no errors. */
#ifndef IHA_KERNELS_COMM_H
#define IHA_KERNELS_COMM_H

#include "kernels/error.h"
#include "kernels/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What to do after an aborted run, for messages. */
#define COMM_RESUME_HINT "start the run again to resume from the last checkpoint"

struct comm {
    const struct comm_ops *ops;
    int rank, ranks;
    int local_rank, local_ranks; /* among those on this machine */
    double timeout;              /* peer_timeout, seconds */
    char *small_buffer;          /* [ranks * COMM_SMALL_BYTES] for comm_all_gather_small */
};

enum { COMM_SMALL_BYTES = 1536 };

typedef int64_t comm_event; /* 0: nothing to wait for */

struct comm_ops {
    const char *name;
    bool queued; /* collectives on tensors run on the device's queue, so a CUDA graph can hold them */

    void (*close)(struct comm *);

    /* The run cannot go on: print `text`, prefixed with this rank and its host, and end every rank with exit
     * code 1. Does not return. */
    void (*abort_run)(struct comm *, const char *text);

    /* Allocate staging memory for reduce_scatter, before its first use; `elements` of the longest buffer,
     * of `dtype`. wire: the type in which elements are sent. DTYPE_BF16: the other ranks' elements are
     * rounded to the nearest bf16 and summed in `dtype`; this rank's own are not rounded. Any other:
     * `dtype`. */
    int (*reserve)(struct comm *, int64_t elements, enum dtype dtype, enum dtype wire, struct error *e);

    /* piece (+)= this rank's share of the sum over ranks of `buffer`. buffer [ranks*n]: rank r's share is
     * elements [r*n, (r+1)*n). piece [n] may be this rank's share of buffer itself. */
    comm_event (*reduce_scatter)(struct comm *, tensor buffer, tensor piece, bool accumulate);

    /* buffer [ranks*n]: each rank fills in its own share and receives the others'. */
    comm_event (*all_gather)(struct comm *, tensor buffer);

    /* all_gathers from begin to end may be started together at the end, as one collective. Their events are valid
     * only then, and the buffers must not be touched from their calls on. NULL: each starts at once anyway. */
    void (*group_begin)(struct comm *);
    void (*group_end)(struct comm *);

    /* A few doubles on the device, summed over ranks in place; on return done, or queued on the device. */
    void (*all_reduce)(struct comm *, double *values, int count);

    /* Wait for the event's collective; later operations on the device's queue see its result. */
    void (*wait)(struct comm *, comm_event event);

    /* Make progress with messages. To be called now and then while the host computes. */
    void (*progress)(struct comm *);

    /* Communicators of processes only: whether a rank has started an all_gather_host of so many bytes that
     * this rank has not. */
    bool (*probe)(struct comm *, size_t bytes);

    /* Host memory: all[r*bytes ...] = `mine` of rank r. Blocks. */
    void (*all_gather_host)(struct comm *, const void *mine, void *all, size_t bytes);
};

/* Connects the ranks that mpirun, srun or torchrun's variables started (launcher.h); a single rank without
 * these. peer_timeout in seconds; the environment variable IHA_START_TIMEOUT limits the wait for the other
 * ranks to start. NULL and *e: the ranks cannot be connected. */
struct comm *comm_open(double peer_timeout, struct error *e);

/* This process's rank according to its launcher, before ranks are connected; 0 where it is not known. */
int comm_launch_rank(void);

/* The communicator of a single rank; its collectives do nothing. */
struct comm *comm_single(void);

/* Host memory that reserve() allocates on each of several ranks. */
size_t comm_staging_bytes(int64_t elements, enum dtype dtype, enum dtype wire);

/* Ranks are connected before the configuration, and with it peer_timeout, has been read. */
void comm_set_timeout(struct comm *comm, double seconds);

/* all_gather_host() of at most COMM_SMALL_BYTES bytes into preallocated memory, so that it works on a rank
 * that is out of memory too. Returns [ranks * bytes], valid until the next call of this or of comm_agree. */
const void *comm_all_gather_small(struct comm *comm, const void *mine, size_t bytes);

/* Whether all ranks succeeded: 0 where `status` is 0 on all of them. Otherwise -1 on all, and *e is the
 * error of the lowest rank that failed, prefixed with its number unless all failed with the same error. */
int comm_agree(struct comm *comm, int status, struct error *e);

#ifdef __cplusplus
}
#endif

#endif
