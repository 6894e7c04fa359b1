/* How comm.c reaches the communicators behind it. */
#ifndef IHA_KERNELS_COMM_COMM_INTERNAL_H
#define IHA_KERNELS_COMM_COMM_INTERNAL_H

#include "kernels/comm.h"
#include "kernels/comm/transport.h"

enum { COMM_IN_FLIGHT = 3 }; /* collectives at once; one more waits for the oldest */

/* Collectives over the messages of a transport, which is the communicator's from then on. NULL and *e: there
 * is no memory, or the transport is NULL, and *e set already. */
struct comm *comm_p2p_open(struct transport *transport, struct error *e);
void comm_p2p_set_timeout(struct comm *comm, double seconds);

#endif
