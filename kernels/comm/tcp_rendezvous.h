/* How ranks that were told where the first one listens come to have a socket for every pair. */
#ifndef IHA_KERNELS_COMM_TCP_RENDEZVOUS_H
#define IHA_KERNELS_COMM_TCP_RENDEZVOUS_H

#include "kernels/comm/launcher.h"

struct address; /* of a rank */

struct meeting {
    const struct start *start;
    double timeout;      /* seconds to wait for the others */
    int *sockets;        /* [ranks], -1: none (yet) */
    int listener;        /* where ranks of higher numbers connect */
    struct address *all; /* [ranks] */
};

/* Rank 0 waits for all others and tells each where all are; the others come to it and are told. Afterwards
 * rank 0 has all its sockets, and they theirs with rank 0. A rank that rank 0 refuses ends there and then,
 * for rank 0 says why. -1 and *e: EXIT_USER for what was given, EXIT_RUN where ranks do not come; rank 0 has
 * told those that did. */
int tcp_gather(struct meeting *m, struct error *e);

/* The sockets among the others. -1 and an EXIT_RUN error: the run has to end, on all ranks. */
int tcp_mesh(struct meeting *m, struct error *e);

/* Frees all but the sockets. */
void tcp_meeting_free(struct meeting *m);

#endif
