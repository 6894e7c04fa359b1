/* Collectives between ranks, once, with their manners; behind them messages over MPI or TCP
 * (kernels/comm/comm_p2p.c), NCCL or a detour through host memory for tensors on GPUs
 * (kernels/cuda/comm/), and, for one process, nothing at all.
 *
 * A rank is one process with one device. Every rank calls the same collectives in the same order. Those on
 * tensors are asynchronous: they return an event, and the memory they were given is theirs until a wait on
 * that event returns. Sums are taken in rank order, so every rank, and every run on the same number of ranks,
 * gets the same bits; NCCL's own sums alone, of fp32 without system.deterministic, are in an order of its
 * own.
 *
 * A rank that dies or hangs must not leave the others waiting: whoever waits longer than peer_timeout for a
 * rank ends the whole run, exit code 1, with a line that names that rank. So collectives return no errors. */
#ifndef IHA_KERNELS_COMM_H
#define IHA_KERNELS_COMM_H

#include "kernels/error.h"
#include "kernels/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/* This process's place. */
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
    bool queued; /* collectives on tensors only join the device's queue: they may be part of a graph */

    void (*close)(struct comm *);

    /* This rank found that the run cannot go on: say `text`, prefixed with rank and host, and take every rank
     * down, exit code 1. Does not return. */
    void (*abort_run)(struct comm *, const char *text);

    /* Staging memory for reduce_scatter, before its first use: comm_staging_bytes of the longest buffer, of
     * `dtype`. wire: the type in which its elements travel. DTYPE_BF16: what other ranks give arrives rounded
     * to the nearest bf16, and is summed in the buffer's own type; this rank's own part is not rounded. Any
     * other: the buffer's own. */
    int (*reserve)(struct comm *, int64_t elements, enum dtype dtype, enum dtype wire, struct error *e);

    /* piece (+)= this rank's share of the sum over ranks of `buffer`. buffer [ranks*n]: rank r's share is
     * elements [r*n, (r+1)*n). piece [n] may be this rank's share of buffer itself. */
    comm_event (*reduce_scatter)(struct comm *, tensor buffer, tensor piece, bool accumulate);

    /* buffer [ranks*n]: each rank gives its own share and gets the others'. */
    comm_event (*all_gather)(struct comm *, tensor buffer);

    /* A few doubles on the device, summed in place; returns when they are (or will be, on a queue). */
    void (*all_reduce)(struct comm *, double *values, int count);

    /* Until the event's collective is done; later operations on the device's queue see its result. */
    void (*wait)(struct comm *, comm_event event);

    /* Let messages move. To be called now and then while the host computes. */
    void (*progress)(struct comm *);

    /* Between processes alone: has a rank begun an exchange of so many bytes, in which this one has no part
     * yet? */
    bool (*probe)(struct comm *, size_t bytes);

    /* Host memory: all[r*bytes ...] = what rank r gave. Blocks. */
    void (*all_gather_host)(struct comm *, const void *mine, void *all, size_t bytes);
};

/* The ranks this process was started among by mpirun, by srun or with torchrun's variables (launcher.h), or
 * itself alone. peer_timeout in seconds; IHA_START_TIMEOUT, a variable,
 * says how many to wait for ranks to
 * come. NULL and *e: started among several that cannot find each other. */
struct comm *comm_open(double peer_timeout, struct error *e);

/* Before ranks know of each other: which of the processes that were started together is this? */
int comm_launch_rank(void);

/* One rank: no collective does anything. */
struct comm *comm_single(void);

/* Host memory that several ranks reserve, each. */
size_t comm_staging_bytes(int64_t elements, enum dtype dtype, enum dtype wire);

/* peer_timeout is known only once the configuration has been read. */
void comm_set_timeout(struct comm *comm, double seconds);

/* all_gather_host() of at most COMM_SMALL_BYTES bytes into memory that is there already, so that a rank which has none left
 * can still tell. What each rank said, one after the other, until the next call of this or of comm_agree. */
const void *comm_all_gather_small(struct comm *comm, const void *mine, size_t bytes);

/* Ranks agree on how a phase ended: 0 where `status` is 0 on all; otherwise -1 on all, and *e is that of the
 * first rank that failed, prefixed with its number where not all failed alike. */
int comm_agree(struct comm *comm, int status, struct error *e);

#ifdef __cplusplus
}
#endif

#endif
