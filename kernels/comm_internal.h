/* How comm.c reaches the communicators behind it. */
#ifndef IHA_COMM_INTERNAL_H
#define IHA_COMM_INTERNAL_H

#include "kernels/comm.h"

enum { COMM_IN_FLIGHT = 3 }; /* collectives at once; one more waits for the oldest */

/* Start MPI (once a process) over the ranks that mpirun or srun launched. */
struct comm *comm_mpi_open(double peer_timeout, struct error *e);
void comm_mpi_set_timeout(struct comm *comm, double seconds);

#endif
