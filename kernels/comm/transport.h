/* Non-blocking point-to-point messages between ranks, over MPI (transport_mpi.c) or TCP (transport_tcp.c):
 * what the collectives of comm_p2p.c are made of.
 *
 * Messages from one rank to another arrive in the order in which they were started, and every rank starts
 * the matching sends and receives in the same order; so they need no tags. A message in flight is
 * identified by a slot, a number that the caller chooses. Functions that can fail return -1 and an
 * EXIT_RUN error whose text names the rank where it is known; the run cannot continue then. */
#ifndef IHA_KERNELS_COMM_TRANSPORT_H
#define IHA_KERNELS_COMM_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>

#include "kernels/comm/launcher.h"
#include "kernels/error.h"

enum { TRANSPORT_HOST_BYTES = 256 };

struct transport {
    const struct transport_ops *ops;
    int rank, ranks;
    int local_rank, local_ranks; /* local_ranks 0: unknown; comm_p2p.c then compares host names */
    double timeout;              /* seconds to wait for a message */
    char (*hosts)
        [TRANSPORT_HOST_BYTES]; /* [ranks]; only this rank's own until comm_p2p_open has gathered them */
};

struct transport_ops {
    const char *name;
    bool close_needs_barrier; /* close() itself does not wait for the other ranks */

    /* Room for messages with slots 0 to count-1. */
    int (*reserve)(struct transport *, int count, struct error *e);

    int (*receive)(struct transport *, int slot, int source, void *to, size_t bytes, struct error *e);
    int (*send)(struct transport *, int slot, int target, const void *from, size_t bytes, struct error *e);

    /* Make progress. 1: the messages of these slots are complete, or were never started; 0: not yet. */
    int (*test)(struct transport *, int slot, int count, struct error *e);

    /* Whether a message of so many bytes has arrived from that rank without a receive for it. */
    bool (*probe)(struct transport *, int source, size_t bytes);

    /* Wait some seconds, in which another rank may abort the run. */
    void (*pause)(struct transport *, double seconds);

    /* Print `line`, once for the whole run, and end every rank with exit code 1. Does not return. */
    void (*abort_run)(struct transport *, const char *line);

    /* After a successful run. */
    void (*close)(struct transport *);
    /* Free the transport when opening the communicator has failed. */
    void (*release)(struct transport *);
};

/* NULL and *e: not possible. timeout: seconds to wait for the other ranks to start, and for every message
 * until the field is changed. */
struct transport *transport_mpi_open(double timeout, struct error *e);
struct transport *transport_tcp_open(const struct launcher_env *env, double timeout, struct error *e);

#endif
