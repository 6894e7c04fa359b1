/* The communicator for host memory: collectives made of a transport's point-to-point messages. */
#ifndef IHA_KERNELS_COMM_COMM_P2P_H
#define IHA_KERNELS_COMM_COMM_P2P_H

#include "kernels/comm.h"
#include "kernels/comm/transport.h"

enum { COMM_IN_FLIGHT = 3 }; /* collectives at once; starting one more waits for the oldest */

/* Takes ownership of `transport`. NULL and *e: out of memory, or `transport` is NULL and *e set already. */
struct comm *comm_p2p_open(struct transport *transport, struct error *e);
void comm_p2p_set_timeout(struct comm *comm, double seconds);

/* See comm_staging_bytes. */
size_t comm_p2p_staging_bytes(int64_t elements, enum dtype dtype, enum dtype wire);

#endif
