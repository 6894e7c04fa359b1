/* How this process was started among others, read from the variables that launchers set.
 *
 * mpirun's ranks find each other through MPI. Others need to be told how many they are and where the first
 * one listens: by torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), which a user can set by
 * hand too, or by Slurm's, for every task that srun starts. */
#ifndef IHA_KERNELS_COMM_LAUNCHER_H
#define IHA_KERNELS_COMM_LAUNCHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/error.h"

struct start {
    int rank, ranks;
    int local_rank, local_ranks; /* on this machine; local_ranks 0: not told */
    char address[256];           /* where rank 0 listens: a name, IPv4 or IPv6 */
    int port;
    const char *port_from; /* for messages: what the port comes from */
    uint64_t token;        /* the same for all ranks of a run, and most likely not for those of another */
};

/* ranks 1: alone. -1 and an EXIT_USER error: the variables make no sense. */
int start_read(struct start *start, struct error *e);

/* Was this process started by a launcher that MPI may know? And how many does mpirun say it started, 0: it
 * says nothing. */
bool start_by_mpi(void);
int start_mpi_ranks(void);

/* The first host of Slurm's short form of a list: node03 of "node[03-07,9],x1". -1: it is no such list, or
 * does not fit. */
int start_first_host(const char *list, char *host, size_t bytes);

#endif
