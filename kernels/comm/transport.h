/* What the collectives of comm_p2p.c are made of: non-blocking messages between pairs of ranks, over MPI
 * (transport_mpi.c) or TCP (transport_tcp.c).
 *
 * Messages from one rank to another arrive in the order in which both sides started them; every rank starts
 * the same ones in the same order. A message under way has a slot, a number that its user chooses. Functions
 * that can fail return -1 and an EXIT_RUN error whose text names the rank, where it is known; the run cannot
 * go on then. */
#ifndef IHA_KERNELS_COMM_TRANSPORT_H
#define IHA_KERNELS_COMM_TRANSPORT_H

#include "kernels/comm.h"

enum { TRANSPORT_HOST = 256 };

struct transport {
    const struct transport_ops *ops;
    int rank, ranks;
    int local_rank, local_ranks;   /* local_ranks 0: not known; names of hosts will tell */
    double timeout;                /* seconds to wait for a rank */
    char (*hosts)[TRANSPORT_HOST]; /* [ranks]; here this rank's own, until the ranks have exchanged theirs */
};

struct transport_ops {
    const char *name;
    bool closes_alone; /* close() does not wait for the other ranks */

    /* Room for messages with slots 0 to count-1. */
    int (*reserve)(struct transport *, int count, struct error *e);

    int (*receive)(struct transport *, int slot, int source, void *to, size_t bytes, struct error *e);
    int (*send)(struct transport *, int slot, int target, const void *from, size_t bytes, struct error *e);

    /* Let messages move. 1: those of the slots are done, or were never started; 0: not yet. */
    int (*test)(struct transport *, int slot, int count, struct error *e);

    /* Has a message of so many bytes come from that rank, which nobody has asked for? */
    bool (*unasked)(struct transport *, int source, size_t bytes);

    /* Leave another rank some seconds to end the run. */
    void (*pause)(struct transport *, double seconds);

    /* Say `line` and take every rank down, exit code 1. Does not return. */
    void (*end)(struct transport *, const char *line);

    /* The end of a run that went well; release() alone, of one that never came to be. */
    void (*close)(struct transport *);
    void (*release)(struct transport *);
};

/* How the program was started among others without MPI; see launcher.h. */
struct start;

/* NULL and *e: they cannot be had. timeout: seconds to wait for ranks to come, and for every message until
 * the field says otherwise. */
struct transport *transport_mpi_open(double timeout, struct error *e);
struct transport *transport_tcp_open(const struct start *start, double timeout, struct error *e);

#endif
